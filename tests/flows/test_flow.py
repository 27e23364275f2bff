"""What a flow promises whoever calls it: no waiting for the host, exactness, the fast path, and what odd input gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flow_cases import NoHostReads, decode_loss, inverse_loss, log_prob_loss, prox_loss
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from flowprox.flows import (
    Flow,
    Glow,
    GlowStep,
    GlowSteps,
    NonFiniteError,
    PixelwiseFlow,
    RealNVP,
    check_finite,
    frozen,
    gathered_checks,
)
from flowprox.flows.conditioners import CouplingNet
from flowprox.flows.layers import pixelwise
from flowprox.prox import FlowProx

SMALL = (3, 8, 8)
FLOWS: dict[str, Callable[[], Flow]] = {
    "glow": lambda: Glow(SMALL, 2, 2, 8, squeeze="haar"),
    "glow, wide": lambda: Glow(SMALL, 1, 1, 136, coupling="conv-actnorm"),
    "glow, plain": lambda: Glow(SMALL, 2, 2, 8, backward="plain"),
    "glow, inputs": lambda: Glow(SMALL, 2, 2, 8, backward="inputs"),
    "glow, invert": lambda: Glow(SMALL, 2, 2, 8, backward="invert"),
    "glow, fast-invert": lambda: Glow(SMALL, 2, 2, 8, coupling="conv-actnorm", backward="fast-invert"),
    "glow, U-Net": lambda: Glow(SMALL, 1, 2, [[4, 4]], coupling="unet"),
    "glow behind a pixel norm": lambda: PixelwiseFlow(Glow(SMALL, 1, 2, 8)),
    "realnvp": lambda: RealNVP(SMALL, 1, 2, 8, 1, backward="invert"),
}
every_flow = pytest.mark.parametrize("name", FLOWS)


def moved(flow: Flow, std: float = 0.05) -> Flow:
    """Initialized, and away from the identity."""
    flow.initialize(torch.rand(8, *flow.image_shape, dtype=next(flow.parameters()).dtype))
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(std * torch.randn_like(parameter))
    return flow


@every_flow
@pytest.mark.parametrize("is_frozen", [False, True])
def test_no_pass_waits_for_the_host(name: str, is_frozen: bool) -> None:
    flow, x = moved(FLOWS[name]()).eval(), torch.rand(2, *SMALL)
    z, prox = torch.randn(2, 192), FlowProx(flow)

    def differentiate() -> None:
        (flow.decode(z.requires_grad_()).sum() + flow.log_prob(x.requires_grad_()).sum()).backward()
        assert z.grad is not None and x.grad is not None

    with gathered_checks(), frozen(flow) if is_frozen else torch.no_grad():
        if is_frozen:
            differentiate()  # the drift guard of "invert" looks at the first of these
        with NoHostReads():
            flow(x), flow.inverse(z), flow.log_prob(x), flow.bits_per_dimension(x), flow.sample(2, 0.7), prox(x, 0.1)
            if is_frozen:
                differentiate()


@every_flow
def test_no_training_step_waits_for_the_host(name: str) -> None:
    """The first one does: ActNorm looks whether it is initialized, and the drift guard at what "invert" recomputes."""
    flow, x = moved(FLOWS[name]()).train(), torch.rand(2, *SMALL)
    optimizer = torch.optim.SGD(flow.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        for loss in (log_prob_loss, prox_loss, inverse_loss):
            loss(flow, x).backward()
        optimizer.step()

    step()
    with gathered_checks(), NoHostReads():
        step()


@pytest.mark.parametrize("gathered", [False, True])
def test_values_that_are_not_finite_are_reported_with_block_and_direction(gathered: bool) -> None:
    flow, x, z = Glow(SMALL, 1, 1, 4).eval(), torch.rand(2, *SMALL), torch.randn(2, 192)
    x[1, 0, 3, 3], z[0, 5] = float("nan"), float("inf")
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("forward", lambda: flow.encode(x)),
        ("forward", lambda: flow.log_prob(x)),
        ("inverse", lambda: flow.decode(z)),
        ("inverse", lambda: flow.inverse(z)),
        ("inverse", lambda: flow.sample(1, temperature=1e39)),
    ]
    for direction, call in calls:
        with pytest.raises(NonFiniteError, match=f"Glow gave a non-finite value in the {direction} direction"):
            if gathered:
                with gathered_checks():
                    call()
            else:
                call()


def test_gathered_flags_are_read_on_demand_once_and_at_the_end() -> None:
    bad, good = torch.tensor([0.0, float("nan")]), torch.zeros(2)
    with gathered_checks() as checks:
        check_finite(good, "a", "forward")
        checks.report()
        with gathered_checks() as inner:
            check_finite(bad, "b", "inverse")
            check_finite(good, "b", "inverse")  # does not lower the flag
            with pytest.raises(NonFiniteError, match=r"b gave .* inverse"):
                inner.report()
            inner.report()  # lowered
        check_finite(good.half() + 60_000, "half precision, whose sum overflows", "forward")
    with pytest.raises(ZeroDivisionError), gathered_checks():  # what ends the block is not hidden
        check_finite(bad, "b", "inverse")
        raise ZeroDivisionError


class ReducedPrecision(TorchDispatchMode):
    """Convolutions round input and weight to the ten bits of TF32: those of the coupling nets, or all."""

    def __init__(self, flow: Flow, everywhere: bool) -> None:
        super().__init__()
        nets = [net for net in flow.modules() if isinstance(net, CouplingNet)]
        self.weights = {p.untyped_storage().data_ptr() for net in nets for p in net.parameters()}
        self.everywhere, self.n_rounded = everywhere, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            x, weight, *others = args
            if self.everywhere or weight.untyped_storage().data_ptr() in self.weights:
                self.n_rounded += 1
                args = (as_tf32(x), as_tf32(weight), *others)
        return func(*args, **(kwargs or {}))


def as_tf32(x: Tensor) -> Tensor:
    """Rounded to a mantissa of 10 bits."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def trained(flow: Flow, n_steps: int = 10) -> Flow:
    """A few likelihood steps on smooth images."""
    optimizer = torch.optim.Adam(moved(flow, 0.0).parameters(), lr=2e-3)
    for _ in range(n_steps):
        optimizer.zero_grad()
        x = nn.functional.interpolate(torch.rand(16, 3, 4, 4, device=next(flow.parameters()).device), scale_factor=4)
        flow.bits_per_dimension(x + torch.rand_like(x) / 256).mean().backward()
        optimizer.step()
    return flow.eval()


def test_reduced_precision_in_the_nets_leaves_the_round_trip_exact() -> None:
    """As on a GPU where convolutions are in TF32. In the bijection's own arithmetic it would undo the inverse."""
    flow, x = trained(Glow((3, 16, 16), 2, 4, 32, backward="plain")), torch.rand(4, 3, 16, 16)
    errors = []
    for everywhere in (False, True):
        with ReducedPrecision(flow, everywhere) as mode:
            errors.append(float((flow.decode(flow.encode(x)) - x).detach().abs().max()))
        assert mode.n_rounded >= 2 * 2 * 4 * 3
    assert errors[0] < 1e-4 < errors[1]


@pytest.mark.parametrize("bias", [True, False])
def test_the_map_of_accelerators_is_that_of_the_cpu(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 6, 5, 4).contiguous(memory_format=torch.channels_last)
    matrix, vector = torch.randn(3, 6), torch.randn(3) if bias else None
    expected = pixelwise(x, matrix, vector)
    with ReducedPrecision(Glow(SMALL, 1, 1, 4), everywhere=True):
        assert (pixelwise(x, matrix, vector) - expected).abs().max() > 1e-5
        found = pixelwise(x, matrix, vector, as_product=True)  # not a convolution: nothing is rounded
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("products_in_tf32", [False, True])
def test_round_trip_on_a_gpu(products_in_tf32: bool) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if products_in_tf32 else "highest")
    try:
        for backward in ("plain", "fast-invert"):
            flow = trained(Glow((3, 16, 16), 2, 8, 64, squeeze="haar", backward=backward).cuda())
            x = torch.rand(8, 3, 16, 16, device="cuda")
            with torch.no_grad():
                assert (flow.decode(flow.encode(x)) - x).abs().max() < 1e-4
    finally:
        torch.set_float32_matmul_precision(before)


def called_nets(flow: Flow, call: Callable[[], Any]) -> bool:
    """Whether the plain path computed, which calls the nets."""
    seen = []
    hooks = [m.register_forward_hook(lambda *_: seen.append(1)) for m in flow.modules() if isinstance(m, CouplingNet)]
    call()
    for hook in hooks:
        hook.remove()
    return bool(seen)


def test_without_gradients_in_evaluation_mode_the_fast_path_computes() -> None:
    flow, x, z = moved(Glow(SMALL, 2, 2, 8)), torch.rand(2, *SMALL), torch.randn(2, 192)
    calls = [lambda: flow(x), lambda: flow.log_prob(x), lambda: flow.encode(x), lambda: flow.decode(z)]
    for call in [*calls, lambda: flow.sample(2)]:
        with torch.no_grad():
            assert called_nets(flow.train(), call)
            assert not called_nets(flow.eval(), call)
    for call in calls:
        assert called_nets(flow.eval(), call)  # recorded: plain autograd, as backward="auto" is for narrow nets


@pytest.mark.parametrize("coupling", ["conv", "conv-actnorm", "unet"])
def test_without_gradients_values_are_those_with(coupling: str) -> None:
    flow = moved(Glow(SMALL, 2, 2, [[8, 8]] * 2 if coupling == "unet" else 8, coupling=coupling).double(), 0.1).eval()
    x, z = torch.rand(2, *SMALL, dtype=torch.float64), torch.randn(2, 192, dtype=torch.float64)
    for call in (lambda: flow(x), lambda: flow.inverse(z), lambda: (flow.encode(x), flow.decode(z))):
        with torch.no_grad():
            found = call()
        torch.testing.assert_close(found, call(), rtol=1e-10, atol=1e-10)


def in_place(flow: Flow) -> None:
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.mul_(1.1)


def by_an_optimizer(flow: Flow, **kernel: bool) -> None:
    for parameter in flow.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(flow.parameters(), lr=0.01, **(kernel or {"foreach": True})).step()


def by_a_fused_optimizer(flow: Flow) -> None:
    by_an_optimizer(flow, fused=True)


def by_conversion(flow: Flow) -> None:
    """What ``to`` does to parameters, with the new values at the old address."""
    flow._apply(lambda tensor: tensor.data.mul_(1.1) if isinstance(tensor, nn.Parameter) else tensor)


def by_loading(flow: Flow) -> None:
    flow.load_state_dict(moved(Glow(SMALL, 2, 2, 8)).state_dict())


def by_assignment(flow: Flow) -> None:
    flow.load_state_dict(moved(Glow(SMALL, 2, 2, 8)).state_dict(), assign=True)


def by_parametrization(flow: Flow) -> None:
    class Half(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight / 2

    net = next(m for m in flow.modules() if isinstance(m, CouplingNet))
    nn.utils.parametrize.register_parametrization(net.hidden[0], "weight", Half())


def to_float64(flow: Flow) -> None:
    flow.double()


def another_layer(flow: Flow) -> None:
    step = next(m for m in flow.modules() if isinstance(m, GlowStep))
    step.coupling.net.hidden[0] = nn.Conv2d(6, 8, 3, padding=1)  # type: ignore[operator, index, union-attr]


def through_data(flow: Flow) -> None:
    for parameter in flow.parameters():
        parameter.data.mul_(1.1)
    flow.train().eval()


CHANGES = (
    in_place,
    by_an_optimizer,
    by_a_fused_optimizer,
    by_conversion,
    by_loading,
    by_assignment,
    by_parametrization,
    to_float64,
    another_layer,
    through_data,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@torch.no_grad()
def test_what_is_kept_is_forgotten_when_a_parameter_changes(change: Callable[[Flow], None]) -> None:
    flow, x = moved(Glow(SMALL, 2, 2, 8)).eval(), torch.rand(2, *SMALL)
    z = flow.encode(x)
    assert torch.equal(flow.encode(x), z)
    kept = [m._constants for m in flow.modules() if isinstance(m, GlowSteps)]
    assert None not in kept and kept == [m._constants for m in flow.modules() if isinstance(m, GlowSteps)]
    change(flow)
    x = x.to(next(flow.parameters()).dtype)
    with torch.enable_grad():
        expected = flow.encode(x)
    torch.testing.assert_close(flow.encode(x), expected, rtol=1e-4, atol=1e-4)
    assert change is to_float64 or not torch.allclose(flow.encode(x).to(z), z)


def test_what_is_kept_is_not_used_for_replaced_parameters() -> None:
    flow, x = moved(Glow(SMALL, 1, 2, 8)).eval(), torch.rand(2, *SMALL)
    weights = {name: 1.1 * p.detach() for name, p in flow.named_parameters()}
    with torch.no_grad():
        before = flow.encode(x)
        found = torch.func.functional_call(flow, weights, (x,))[0]
        assert torch.equal(flow.encode(x), before)
    flow.load_state_dict(weights, strict=False)
    torch.testing.assert_close(found, flow.encode(x), rtol=1e-4, atol=1e-4)


def test_a_model_made_in_inference_mode_works() -> None:
    with torch.inference_mode():
        flow = moved(Glow(SMALL, 1, 2, 8)).eval()
        x = torch.rand(2, *SMALL)
        first = flow.encode(x)
        for parameter in flow.parameters():
            parameter.mul_(1.1)  # not counted there
        assert not torch.allclose(flow.encode(x), first)
    flow = moved(Glow(SMALL, 1, 2, 8)).eval()
    with torch.inference_mode():
        flow.encode(x)
    with frozen(flow):
        image = torch.rand(2, *SMALL, requires_grad=True)
        flow.encode(image).sum().backward()


@every_flow
@pytest.mark.parametrize("training", [False, True])
def test_empty_batches_give_empty_batches(name: str, training: bool) -> None:
    flow = FLOWS[name]().train(training)
    for recorded in (False, True):
        with torch.set_grad_enabled(recorded):
            z, logdet = flow(torch.zeros(0, *SMALL))
            assert z.shape == (0, 192) and logdet.shape == (0,) and flow.log_prob(torch.zeros(0, *SMALL)).shape == (0,)
            assert flow.decode(z).shape == flow.inverse(z)[0].shape == (0, *SMALL)
            assert flow.bits_per_dimension(torch.zeros(0, *SMALL)).shape == (0,)
    flow.zero_grad()
    flow.log_prob(torch.zeros(0, *SMALL)).sum().backward()
    assert all(torch.isfinite(p).all() and (p.grad is None or not p.grad.any()) for p in flow.parameters())
    assert not any(m.initialized for m in flow.modules() if hasattr(m, "initialized"))


@every_flow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_in_half_precision_leave_the_bijection_exact(name: str, dtype: torch.dtype) -> None:
    flow, x = moved(FLOWS[name]()).eval().to(dtype), torch.rand(2, *SMALL)
    with torch.no_grad():
        assert torch.isfinite(flow.sample(2)).all()
        assert flow.encode(x.to(dtype)).dtype == torch.float32
        assert (flow.decode(flow.encode(x)) - x).abs().max() < 0.02


@every_flow
def test_images_and_latents_of_any_type_are_computed_in_that_of_the_weights(name: str) -> None:
    for own in (torch.float32, torch.float64):
        flow = moved(FLOWS[name]()).to(own).eval()
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            x, z = torch.rand(2, *SMALL).to(dtype), torch.randn(2, 192).to(dtype)
            for call, v in [(flow.encode, x), (flow.log_prob, x), (flow.decode, z)]:
                for recorded in (False, True):
                    with torch.set_grad_enabled(recorded):
                        found = call(v)
                        assert found.dtype == own and torch.equal(found, call(v.to(own)))


def test_sizes_of_samples_and_densities_that_do_not_fit_are_named() -> None:
    flow, z = FLOWS["realnvp"]().eval(), torch.randn(1, 192)
    assert flow.sample(np.int64(2)).shape == (2, *SMALL)  # type: ignore[arg-type]
    assert Glow(SMALL, np.int64(1), 1, 4).spec() == Glow(SMALL, 1, 1, 4).spec()  # type: ignore[arg-type]
    for n in (True, 2.0, np.int64(0), np.bool_(True)):
        with pytest.raises(ValueError, match="n must be at least 1 and a whole number"):
            flow.sample(n)  # type: ignore[arg-type]
    size: Any
    for size, message in [(8, r"image_size must be \(height, width\), got 8"), ((7, 7), "image_size has size 7x7")]:
        for call in (lambda s: flow.sample(1, image_size=s), lambda s: flow.decode(z, s), flow.distribution):
            with pytest.raises(ValueError, match=message):
                call(size)
    p = flow.distribution()
    assert p.log_prob(p.sample((2, 5))).shape == (2, 5) and p.log_prob(torch.rand(SMALL)).shape == ()
    for shape in ((5, 8, 8, 3), (2, 3, 8, 6), (8, 8), (192,)):
        with pytest.raises(ValueError, match=r"images must have shape \(..., 3, 8, 8\), got"):
            p.log_prob(torch.rand(shape))


@pytest.mark.parametrize("name", ["glow", "realnvp"])
def test_what_does_not_fit_is_named(name: str) -> None:
    flow = FLOWS[name]().eval()
    calls = [flow, flow.encode, flow.log_prob, flow.encode_image, flow.decode_image, flow.inverse_image]
    for x, message in [
        (torch.rand(2, 1, 8, 8), r"must have shape \(B, 3, H, W\), got \(2, 1, 8, 8\)"),
        (torch.rand(3, 8, 8), r"must have shape \(B, 3, H, W\), got \(3, 8, 8\)"),
        (torch.rand(2, 3, 8, 7), "divisible by"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "must hold floating-point numbers"),
    ]:
        for call in calls:
            with pytest.raises(ValueError, match=message):
                call(x)
    for z in (torch.randn(192), torch.randn(2, 191), torch.rand(2, 3, 8, 8)):
        with pytest.raises(ValueError, match="does not fit 3 channels"):
            flow.decode(z)


@pytest.mark.parametrize("squeeze", ["pixels", "haar"])
def test_a_constant_channel_leaves_the_flow_invertible(squeeze: str) -> None:
    """Two flat channels when ActNorm initializes itself, one of them but for rounding, and any image afterwards."""
    x = torch.rand(16, 3, 16, 16)
    x[:, 2], x[:, 1] = 0.0, 0.3 + 1e-7 * torch.rand(16, 16, 16)
    flow = Glow((3, 16, 16), 2, 3, 16, "conv-actnorm", squeeze=squeeze)
    flow.initialize(x)
    with torch.no_grad():
        for image in (x, torch.rand(4, 3, 16, 16)):
            assert (flow.eval().decode(flow.encode(image)) - image).abs().max() < 1e-4


def test_losses_agree_whether_checks_are_gathered_or_not() -> None:
    flow, x = moved(Glow(SMALL, 1, 1, 4)), torch.rand(2, *SMALL)
    expected = decode_loss(flow, x)
    with gathered_checks():
        assert torch.equal(decode_loss(flow, x), expected)
