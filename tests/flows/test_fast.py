"""The fast path against the plain one: exactness in each precision, chunks, what is kept, what ``frozen`` does with it.

That its gradients are those of plain autograd in float64, however it is called, is in ``test_reversible.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import product
from unittest import mock

import pytest
import torch
from flow_cases import (
    FAST_MODES,
    chain,
    decode_loss,
    every_loss,
    gradients,
    inverse_loss,
    log_prob_loss,
    pair,
    prox_loss,
)
from torch import Tensor
from torch._dynamo.utils import counters

from flowprox.flows import (
    Flow,
    Glow,
    GlowStep,
    GlowSteps,
    RealNVP,
    Reversible,
    Sequential,
    conditioners,
    fast,
    frozen,
    layers,
)
from flowprox.flows.conditioners import CouplingNet, CouplingUNet
from flowprox.flows.glow import FAST_WIDTH
from flowprox.graphs import compile_regions
from flowprox.operators import make_physics
from flowprox.prox import FlowProx
from flowprox.unfolding import LatentMeanNet, UnfoldedPGD

every_fast_mode = pytest.mark.parametrize("mode", FAST_MODES)
every_coupling = pytest.mark.parametrize("coupling", ["conv", "conv-actnorm"])


@cache
def references(coupling: str) -> tuple[Flow, Flow, Tensor]:
    """Plain flows in float64 and float32 with the same weights, and float32 images; nothing changes them."""
    torch.manual_seed(0)
    exact, plain = (Glow((3, 8, 8), 2, 3, 32, coupling, backward="plain") for _ in range(2))
    x = torch.rand(4, 3, 8, 8)
    plain.initialize(x)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    exact.load_state_dict(plain.state_dict())
    return exact.double(), plain, x


def flows(mode: str, coupling: str) -> tuple[Flow, Flow, Flow, Tensor]:
    """Those, and a fast one with the same weights."""
    exact, plain, x = references(coupling)
    quick = Glow((3, 8, 8), 2, 3, 32, coupling, backward=mode)
    quick.load_state_dict(plain.state_dict())
    return exact, plain, quick, x


@cache
def exact_gradients(coupling: str, loss: Callable[[Flow, Tensor], Tensor]) -> Tensor:
    exact, _, x = references(coupling)
    return flat_gradients(exact, loss, x.double())


def relative(found: Tensor, exact: Tensor) -> float:
    found, exact = found.detach().double(), exact.detach().double()
    return float((found - exact).norm() / exact.norm())


def flat_gradients(flow: Flow, loss: Callable[[Flow, Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.cat([g.flatten() for g in gradients(flow, loss, x)])


@every_fast_mode
@every_coupling
def test_float32_values_are_those_of_float64(mode: str, coupling: str) -> None:
    exact, _, quick, x = flows(mode, coupling)
    z = torch.randn(4, 192)
    for found, expected in [(quick(x), exact(x.double())), (quick.inverse(z), exact.inverse(z.double()))]:
        assert relative(found[0], expected[0]) < 1e-5 and relative(found[1], expected[1]) < 1e-5
    assert relative(quick.decode(quick.encode(x)), x) < 1e-5


@every_fast_mode
@every_coupling
@every_loss
def test_float32_gradients_are_as_good_as_plain_ones(
    mode: str, coupling: str, loss: Callable[[Flow, Tensor], Tensor]
) -> None:
    _, plain, quick, x = flows(mode, coupling)
    expected = exact_gradients(coupling, loss)
    found, plain_found = (relative(flat_gradients(flow, loss, x), expected) for flow in (quick, plain))
    assert found < 2 * plain_found + 1e-7


@every_fast_mode
@every_coupling
def test_bfloat16_nets_are_as_good_as_plain_ones(mode: str, coupling: str) -> None:
    """Under autocast: values within 1e-2, gradients within 5e-2 of float64, and not much worse than the plain path."""
    exact, plain, quick, x = flows(mode, coupling)

    def low(flow: Flow, t: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return log_prob_loss(flow, t)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, z_plain = quick.encode(x), plain.encode(x)
    z_exact = exact.encode(x.double())
    assert z.dtype == torch.float32
    assert relative(z, z_exact) < min(1e-2, 1.5 * relative(z_plain, z_exact))
    expected = exact_gradients(coupling, log_prob_loss)
    found, plain_found = (relative(flat_gradients(flow, low, x), expected) for flow in (quick, plain))
    assert found < min(5e-2, 2 * plain_found)


@every_coupling
@pytest.mark.parametrize("mode", ["plain", "fast-nothing"])
def test_what_accelerators_take_together_is_the_same(mode: str, coupling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of a level folded at once, products for 1x1 convolutions, no chunks: on the CPU only for this test."""
    _, _, quick, x = flows(mode, coupling)
    for loss, is_low in product((log_prob_loss, inverse_loss), (False, True)):

        def error() -> float:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_low):  # noqa: B023
                value = loss(quick, x)  # noqa: B023
            gradients = torch.autograd.grad(value, list(quick.parameters()))
            return relative(torch.cat([g.flatten() for g in gradients]), exact_gradients(coupling, loss)[x.numel() :])  # noqa: B023

        on_the_cpu = error()
        with monkeypatch.context() as patch:
            for module in (fast, layers, conditioners):
                patch.setattr(module, "on_cpu", lambda _: False)
            assert error() < 2 * on_the_cpu + 1e-6


@every_fast_mode
@every_loss
def test_chunks_change_nothing(
    mode: str, loss: Callable[[Flow, Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, quick, x = pair(mode)
    x = torch.cat([x, 1 - x])[:7]
    whole = gradients(quick, loss, x)
    monkeypatch.setattr(fast, "_CHUNK", 3 * 8 * 16)  # three images at the first level, seven at the second
    for found, expected in zip(gradients(quick, loss, x), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@every_fast_mode
@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16"])
def test_the_same_twice_to_the_bit(mode: str, low: bool) -> None:
    _, _, quick, x = flows(mode, "conv-actnorm")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
        first, second = (gradients(quick, log_prob_loss, x) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@every_fast_mode
@pytest.mark.parametrize("kernel_sizes", [(3,), (1, 1), (3, 3), (5, 1, 3), (3, 1, 1, 1)])
@pytest.mark.parametrize("actnorm", [False, True])
def test_coupling_nets_of_any_depth_and_kernels(mode: str, kernel_sizes: tuple[int, ...], actnorm: bool) -> None:
    steps = [GlowStep(6, CouplingNet(3, 6, 5, kernel_sizes, actnorm), 0.7, 2.0).double() for _ in range(2)]
    plain, quick = (chain(steps, m).eval() for m in ("plain", mode))
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    x = torch.randn(2, 6, 5, 4, dtype=torch.float64, requires_grad=True)
    for method in ("forward", "inverse"):
        results = []
        for steps_of in (plain, quick):
            value, logdet = getattr(steps_of, method)(x)
            results.append(torch.autograd.grad(value.pow(3).sum() + logdet.sin().sum(), [x, *plain.parameters()]))
        torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)


def test_what_is_kept_for_the_backward_pass() -> None:
    """With "inputs" two small tensors per step, with "invert" matrices only, with "nothing" less than plain autograd."""

    def kept(mode: str, n: int) -> int:
        steps = chain([GlowStep(4, CouplingNet(2, 4, 32)) for _ in range(n)], mode).eval()
        held = {p.untyped_storage().data_ptr(): 0 for p in steps.parameters()}

        def pack(t: Tensor) -> Tensor:
            held.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            z, logdet = steps(torch.randn(4, 4, 16, 16))
        del z, logdet
        return sum(held.values())

    one, growth = 4 * 4 * 16 * 16 * 4, {m: kept(m, 9) - kept(m, 3) for m in ("plain", *FAST_MODES)}
    assert growth["fast-invert"] < 6 * 0.2 * one
    assert growth["fast-inputs"] < 6 * 2.2 * one
    assert 4 * growth["fast-inputs"] < growth["fast-early"] < 0.65 * growth["fast-nothing"]
    assert growth["fast-nothing"] < growth["plain"]


@every_fast_mode
def test_drift_guard_finds_a_map_that_cannot_be_inverted(mode: str) -> None:
    """A nearly singular 1x1 convolution: its inverse loses all digits of float32."""
    steps = chain([GlowStep(4, CouplingNet(2, 4, 4)) for _ in range(3)], mode, check_drift=True).eval()
    with torch.no_grad():
        steps.layers[1].mix.lu.diagonal()[0] -= 18.0  # type: ignore[union-attr, operator]
    z = steps.encode(torch.randn(2, 4, 4, 4)).sum()
    if mode == "fast-invert":
        with pytest.raises(ArithmeticError, match=r"layers\.\d \(GlowStep\) .* forward direction"):
            z.backward()
    else:
        z.backward()


def test_the_rule_of_auto_and_fast() -> None:
    """Narrow nets take the plain path, wide ones compute hidden layers again."""
    for backward, wide in (("auto", "auto"), ("fast", "fast-inputs"), ("invert", "invert")):
        flow = Glow((3, 8, 8), 2, 1, [FAST_WIDTH, FAST_WIDTH + 1], backward=backward)
        narrow = wide if backward == "invert" else "plain"
        assert [m.recompute for m in flow.modules() if isinstance(m, GlowSteps)] == [narrow, wide]
    flow = Glow((3, 8, 8), 1, 1, [[FAST_WIDTH + 1]], coupling="unet")
    assert [m.recompute for m in flow.modules() if isinstance(m, GlowSteps)] == ["plain"]


def test_other_layers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got CouplingUNet; use backward="):
        Glow((3, 8, 8), 1, 1, [[4]], coupling="unet", backward="fast-inputs")
    with pytest.raises(ValueError, match="got Sequential; use"):
        GlowSteps([Sequential([])])
    with pytest.raises(ValueError, match="recompute must be"):
        GlowSteps([], "everything")


FROZEN = {
    "plain": lambda: Glow((3, 8, 8), 2, 2, 8, coupling="conv-actnorm"),
    "inputs": lambda: Glow((3, 8, 8), 2, 2, 8, backward="inputs"),
    "fast": lambda: Glow((3, 8, 8), 2, 2, 8, backward="fast-nothing"),
    "U-Net": lambda: Glow((3, 8, 8), 2, 2, [[4, 4], [4]], coupling="unet"),
    "realnvp": lambda: RealNVP((3, 8, 8), 2, 2, 8, 1),
}


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_gives_the_same_values_and_image_gradients_and_leaves_no_trace(name: str) -> None:
    flow, x = FROZEN[name]().double(), torch.rand(2, 3, 8, 8, dtype=torch.float64)
    flow.initialize(x)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    modules, state = dict(flow.named_modules()), {k: v.clone() for k, v in flow.state_dict().items()}

    def outcome() -> list[Tensor]:
        point = x.clone().requires_grad_()
        loss = decode_loss(flow, point) + log_prob_loss(flow, point)
        return [loss.detach(), *torch.autograd.grad(loss, point)]

    expected = outcome()
    for _ in range(2):
        with frozen(flow), frozen(flow):
            found = outcome() and outcome()  # the second pass meets what the first one kept
            assert not any(p.requires_grad for p in flow.parameters())
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert dict(flow.named_modules()) == modules and flow.training and all(p.requires_grad for p in flow.parameters())
    assert all(torch.equal(value, state[key]) for key, value in flow.state_dict().items())
    with torch.no_grad():
        next(iter(flow.parameters())).add_(0.5)
    with frozen(flow):
        found = outcome()
    torch.testing.assert_close(found, outcome(), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(found[0], expected[0])


@torch.no_grad()
def test_a_block_around_a_flow_ends_within_one_around_its_model() -> None:
    model, y = UnfoldedPGD([FlowProx(Glow((3, 8, 8), 1, 2, 8))]), torch.rand(2, 3, 8, 8)
    flow = model.flows()[0].eval()
    for parameter in flow.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    with frozen(model):
        expected = flow.encode(y)
        with frozen(flow):
            pass
        assert torch.equal(flow.encode(y), expected)  # of matrices rounded from float64
    assert not torch.equal(flow.encode(y), expected)


def test_threads_share_a_frozen_model() -> None:
    flow = Glow((3, 8, 8), 2, 2, 8).eval()
    x = torch.rand(2, 3, 8, 8)
    expected, names = flow.encode(x).detach(), list(flow.state_dict())

    def encode(i: int) -> float:
        with torch.no_grad(), frozen(flow):
            return float((flow.encode(x) - expected).abs().max())

    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(encode, range(60))) < 1e-5
    assert list(flow.state_dict()) == names and all(p.requires_grad for p in flow.parameters())


def test_frozen_is_undone_after_an_error() -> None:
    flow = Glow((3, 8, 8), 1, 1, 4)
    with pytest.raises(RuntimeError, match="by hand"), frozen(flow):
        assert not flow.training
        raise RuntimeError("by hand")
    assert flow.training and all(p.requires_grad for p in flow.parameters())


def test_frozen_keeps_the_memory_mode() -> None:
    flow = Glow((3, 8, 8), 1, 1, 4, backward="invert")
    with frozen(flow):
        assert [m.recompute for m in flow.modules() if isinstance(m, Reversible)] == ["invert"]


def test_an_unfolded_network_reconstructs_on_the_fast_path_in_evaluation_mode() -> None:
    proxes = [FlowProx(Glow((3, 8, 8), 2, 2, 8), channelwise=True) for _ in range(2)]
    model, physics = UnfoldedPGD(proxes).double(), make_physics("denoising", (3, 8, 8))
    with torch.no_grad():
        for parameter in model.proxes.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    y, seen = torch.rand(2, 3, 8, 8, dtype=torch.float64), set()
    for module in model.modules():
        if isinstance(module, GlowStep):
            module.coupling.net.register_forward_hook(lambda m, *_: seen.add(m))
    expected = model.eval()(y, physics)
    assert seen  # with gradients: the plain path calls the nets
    seen.clear()
    with torch.no_grad():
        torch.testing.assert_close(model(y, physics), expected.detach(), rtol=1e-10, atol=1e-10)
    assert not seen


def test_nets_with_a_learned_scale_and_none_are_supported() -> None:
    assert GlowSteps([GlowStep(4, CouplingNet(2, 4, 4, actnorm=True))]).has_fast_path
    assert not GlowSteps([GlowStep(4, CouplingUNet(2, 4, [4]))]).has_fast_path


@pytest.mark.parametrize("mode", ["auto", "inputs"])
def test_compiled_steps_compute_the_same_as_one_graph_per_level_and_direction(mode: str) -> None:
    """Both as on the CPU and, in mode "auto", with the kernels of an accelerator; a break of a graph would be an error."""
    on_cpu = [
        mock.patch.object(module, "on_cpu", lambda _: mode == "inputs") for module in (fast, layers, conditioners)
    ]
    plain, compiled, x = pair(mode)
    names, before = list(compiled.state_dict()), counters["stats"]["unique_graphs"]
    compile_regions(compiled, backend="aot_eager" if mode == "auto" else "eager", dynamic=False)
    for patch in on_cpu:
        patch.start()
    try:
        found, expected = (gradients(flow, prox_loss, x) for flow in (compiled, plain))
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
        assert counters["stats"]["unique_graphs"] - before == 2 * 2  # levels; encode, decode
        with torch.autocast("cpu", torch.bfloat16):  # its backward pass is full precision but for the nets
            losses = [log_prob_loss(flow, x) for flow in (compiled, plain)]
        found, expected = (
            torch.autograd.grad(loss, next(m for m in flow.modules() if isinstance(m, GlowStep)).mix.lu)[0]
            for loss, flow in zip(losses, (compiled, plain), strict=True)
        )
        assert relative(found, expected) < (1e-6 if mode == "auto" else 0.1)
        with frozen(compiled), frozen(plain):
            x.requires_grad_()
            found, expected = (torch.autograd.grad(flow.log_prob(x).sum(), x)[0] for flow in (compiled, plain))
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
    finally:
        for patch in on_cpu:
            patch.stop()
    assert list(compiled.state_dict()) == names
    assert all(m._compiled is None for m in copy.deepcopy(compiled).modules() if isinstance(m, GlowSteps))


def test_compiled_blocks_of_a_latent_mean_are_one_graph_per_level() -> None:
    net, x = LatentMeanNet(4, 3, 1, [4, 8], n_blocks=3), torch.rand(2, 4, 8, 8)
    torch.nn.init.normal_(net.means[0].weight)  # type: ignore[arg-type]
    expected, before = net(x)[0], counters["stats"]["unique_graphs"]
    compile_regions(net, backend="eager", dynamic=False)
    torch.testing.assert_close(net(x)[0], expected)
    assert counters["stats"]["unique_graphs"] - before == 2
