"""Reversible backpropagation against plain autograd, and the ways in which it is called."""

from __future__ import annotations

import copy
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from flow_cases import (
    FAST_MODES,
    MODES,
    chain,
    decode_loss,
    every_loss,
    every_mode,
    gradients,
    log_prob_loss,
    pair,
)
from torch import Tensor, nn

from flowprox.flows import Bijection, DriftError, Flow, Glow, GlowStep, NonFiniteError, RealNVP, Reversible, Sequential
from flowprox.flows.conditioners import CouplingNet


@every_mode
@every_loss
@pytest.mark.parametrize("kind", [Glow, RealNVP])
def test_gradients_are_those_of_plain_autograd(mode: str, loss: Callable[[Flow, Tensor], Tensor], kind: type) -> None:
    if kind is RealNVP and mode in FAST_MODES:
        pytest.skip("the fast path is Glow's")
    plain, reversible, x = pair(mode, kind)
    torch.testing.assert_close(loss(reversible, x), loss(plain, x), rtol=1e-12, atol=1e-12)
    for found, expected in zip(gradients(reversible, loss, x), gradients(plain, loss, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@every_mode
@every_loss
def test_backward_accumulates(mode: str, loss: Callable[[Flow, Tensor], Tensor]) -> None:
    plain, reversible, x = pair(mode)
    for flow in (plain, reversible):
        for _ in range(2):
            loss(flow, x).backward()
    for found, expected in zip(reversible.parameters(), plain.parameters(), strict=True):
        assert (found.grad is None) == (expected.grad is None)
        if expected.grad is not None:
            torch.testing.assert_close(found.grad, expected.grad, rtol=1e-10, atol=1e-10)


@every_mode
def test_gradient_of_the_input_alone_and_of_the_parameters_alone(mode: str) -> None:
    plain, reversible, x = pair(mode)
    for flow in (plain, reversible):
        flow.requires_grad_(False)
    found, expected = (
        torch.autograd.grad(log_prob_loss(flow, x.requires_grad_()), x)[0] for flow in (reversible, plain)
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    x = x.detach()
    assert not log_prob_loss(reversible, x).requires_grad
    for flow in (plain, reversible):
        for i, parameter in enumerate(flow.parameters()):
            parameter.requires_grad_(i % 3 == 2 and i > 12)  # the first step is frozen as a whole
        log_prob_loss(flow, x).backward()
    for found, expected in zip(reversible.parameters(), plain.parameters(), strict=True):
        assert (found.grad is None) == (expected.grad is None)
        if expected.grad is not None:
            torch.testing.assert_close(found.grad, expected.grad, rtol=1e-10, atol=1e-10)


@every_mode
def test_tied_steps_add_their_gradients(mode: str) -> None:
    step = GlowStep(4, CouplingNet(2, 4, 6)).double().eval()
    x = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    found, expected = (
        torch.autograd.grad(sum(t.pow(2).sum() for t in steps.eval()(x)), list(step.parameters()))
        for steps in (chain([step, step, step], mode), Sequential([step, step, step]))
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@every_mode
def test_hooks_see_each_gradient_once(mode: str) -> None:
    plain, reversible, x = pair(mode)
    for flow in (plain, reversible):
        for parameter in flow.parameters():
            parameter.register_hook(lambda g: 2 * g)
        log_prob_loss(flow, x).backward()
    for found, expected in zip(reversible.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-10, atol=1e-10)


@every_mode
def test_replaced_parameters_are_differentiated(mode: str) -> None:
    """torch.func.functional_call: the backward uses the tensors of the recorded pass, not what the module holds later."""
    plain, reversible, x = pair(mode)
    weights = {name: (1.1 * p).detach().requires_grad_() for name, p in plain.named_parameters()}
    found, expected = (
        torch.autograd.grad(
            torch.func.functional_call(flow, weights, (x,))[0].pow(2).sum(), list(weights.values()), allow_unused=True
        )
        for flow in (reversible, plain)
    )
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@every_mode
def test_parameters_changed_in_place_before_the_backward_pass_are_noticed(mode: str) -> None:
    _, reversible, x = pair(mode)
    loss = log_prob_loss(reversible, x)
    with torch.no_grad():
        next(p for name, p in reversible.named_parameters() if name.endswith("hidden.0.weight")).add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_mode
def test_second_derivatives_are_those_of_plain_autograd_or_refused(mode: str) -> None:
    def derivative(flow: Flow) -> Tensor:
        return torch.autograd.grad(log_prob_loss(flow, x), x, create_graph=True)[0].pow(2).sum()

    plain, reversible, x = pair(mode)
    x.requires_grad_()
    if mode != "inputs":
        with pytest.raises(RuntimeError, match="once_differentiable"):
            derivative(reversible).backward()
        return
    second = [
        torch.autograd.grad(derivative(flow), [x, *flow.parameters()], allow_unused=True, materialize_grads=True)
        for flow in (reversible, plain)
    ]
    torch.testing.assert_close(*second, rtol=1e-9, atol=1e-9)


@every_mode
@every_loss
def test_callers_tensors_are_left_alone(mode: str, loss: Callable[[Flow, Tensor], Tensor]) -> None:
    _, reversible, x = pair(mode)
    x.requires_grad_()
    body = reversible.bijection.layers[1]  # type: ignore[index]
    state = {
        name: (value, value.clone(), value._version) for name, value in reversible.state_dict(keep_vars=True).items()
    }
    inside = torch.randn(2, 12, 4, 4, dtype=x.dtype, requires_grad=True)
    tensors = [x, inside, inside * 1.0]
    before = [(t.detach().clone(), t._version) for t in tensors]
    loss(reversible, x).backward()
    for t in tensors[1:]:
        outputs = [body.encode(t), body.decode(t), *body(t), *body.inverse(t)]
        kept = [(o.detach().clone(), o._version) for o in outputs]
        sum(o.sum() for o in outputs).backward()
        assert all(
            torch.equal(o, value) and o._version == version for o, (value, version) in zip(outputs, kept, strict=True)
        )
    assert all(
        torch.equal(t, value) and t._version == version for t, (value, version) in zip(tensors, before, strict=True)
    )
    for name, value in reversible.state_dict(keep_vars=True).items():
        same, content, version = state[name]
        assert value is same and torch.equal(value, content) and value._version == version, name


def test_parameter_names_are_those_of_the_plain_container() -> None:
    plain, *others = (Glow((3, 8, 8), 2, 2, 4, backward=b) for b in ("plain", "fast", *MODES, *FAST_MODES))
    for flow in others:
        assert list(flow.state_dict()) == list(plain.state_dict())
        assert list(dict(flow.named_parameters())) == list(dict(plain.named_parameters()))


@every_mode
def test_deep_copies_are_independent(mode: str) -> None:
    _, reversible, x = pair(mode)
    other = copy.deepcopy(reversible)
    log_prob_loss(other, x).backward()
    assert all(p.grad is None for p in reversible.parameters()) and all(p.grad is not None for p in other.parameters())


@every_mode
def test_nothing_is_recorded_where_nothing_is_asked(mode: str) -> None:
    _, reversible, x = pair(mode)
    with torch.no_grad():
        assert not reversible.log_prob(x).requires_grad
    assert chain([], mode)(x)[0] is x


@every_mode
@pytest.mark.parametrize("loss", [log_prob_loss, decode_loss], ids=lambda f: f.__name__)
def test_autocast_on_the_cpu(mode: str, loss: Callable[[Flow, Tensor], Tensor]) -> None:
    """The recomputation runs in the precision of the recorded pass, though backward is called outside."""
    plain, reversible, x = pair(mode, dtype=torch.float32)
    found = []
    for flow in (reversible, plain):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(flow, x)
        assert value.dtype == torch.float32
        value.backward()
        found.append(torch.cat([p.grad.flatten() for p in flow.parameters() if p.grad is not None]))
    exact = torch.cat([g.flatten() for g in gradients(plain, loss, x)[1:]])
    if mode == "inputs":  # had it run in full precision, it would agree with the exact gradient instead
        assert (found[0] - found[1]).norm() <= 1e-6 * found[1].norm()
        assert (found[0] - exact).norm() > 1e-4 * exact.norm()
    else:
        assert (found[0] - exact).norm() <= 1.5 * (found[1] - exact).norm() + 1e-3 * exact.norm()


@every_mode
def test_only_the_recorded_pass_decides_about_autocast(mode: str) -> None:
    plain, reversible, x = pair(mode, dtype=torch.float32)
    expected = gradients(plain, log_prob_loss, x)
    x = x.clone().requires_grad_()
    loss = log_prob_loss(reversible, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(loss, [x, *reversible.parameters()])
    tolerance = {"rtol": 0, "atol": 0} if mode == "inputs" else {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(list(found), expected, **tolerance)


class Leaky(Bijection):
    """An inverse that is off by ``error``, in every call or in those without gradients."""

    def __init__(self, error: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.error = error

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * self.weight, x.new_zeros(len(x)) + self.weight.log() * x[0].numel()

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return z / self.weight + self.error, z.new_zeros(len(z)) - self.weight.log() * z[0].numel()


def leaky_chain(error: float, **options: int) -> Reversible:
    good = [GlowStep(4, CouplingNet(2, 4, 4)) for _ in range(3)]
    return Reversible([good[0], good[1], Leaky(error), good[2]], "invert", **options).eval()


def test_drift_is_noticed_and_its_step_is_named() -> None:
    x = torch.randn(2, 4, 4, 4)
    chain = leaky_chain(0.05, check_drift=True)
    with pytest.raises(DriftError, match=r"layers\.2 \(Leaky\) .* forward direction"):
        chain(x)[0].sum().backward()
    with pytest.raises(DriftError, match=r"layers\.2 \(Leaky\) .* inverse direction"):
        chain.decode(x).sum().backward()
    leaky_chain(0.0, check_drift=True)(x)[0].sum().backward()


def test_drift_is_looked_for_every_so_often() -> None:
    x = torch.randn(2, 4, 4, 4)
    chain = leaky_chain(0.0, check_drift=3)
    chain.encode(x).sum().backward()
    chain.layers[2].error = 0.05  # type: ignore[assignment]
    chain.encode(x).sum().backward()
    chain.encode(x).sum().backward()
    with pytest.raises(DriftError):
        chain.encode(x).sum().backward()
    chain = leaky_chain(0.05, check_drift=0)
    for _ in range(5):
        chain.encode(x).sum().backward()


def test_non_finite_recomputation_names_step_and_direction() -> None:
    x = torch.randn(2, 4, 4, 4)
    for check_drift in (0, 1):
        chain = leaky_chain(float("inf"), check_drift=check_drift)
        with pytest.raises(NonFiniteError, match=r"layers\.2 \(Leaky\) .* forward direction was undone"):
            chain(x)[0].sum().backward()
    with pytest.raises(NonFiniteError, match=r"layers\.\d \(\w+\) of a Reversible chain of 4 .* inverse direction"):
        chain = leaky_chain(0.0)
        with torch.no_grad():
            chain.layers[2].weight.fill_(0.0)  # type: ignore[union-attr]
        chain.decode(x).sum().backward()


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="recompute must be"):
        Reversible([], "outputs")
    with pytest.raises(ValueError, match="check_drift must be"):
        Reversible([], "invert", check_drift=-1)


@every_mode
def test_uninitialized_chain_in_train_mode_decodes_without_being_initialized(mode: str) -> None:
    steps = chain([GlowStep(4, CouplingNet(2, 4, 4)) for _ in range(2)], mode).train()
    z = torch.randn(2, 4, 4, 4)
    steps.decode(z).sum().backward()
    assert not any(m.initialized for m in steps.modules() if hasattr(m, "initialized"))
    steps.encode(z).sum().backward()
    assert all(m.initialized for m in steps.modules() if hasattr(m, "initialized"))


def test_memory_does_not_grow_with_depth() -> None:
    """What autograd keeps between the passes: with "inputs" a tensor per step, with "invert" nothing that grows."""

    def kept(mode: str, n: int) -> int:
        body = [GlowStep(4, CouplingNet(2, 4, 32)) for _ in range(n)]
        chain = (Sequential(body) if mode == "plain" else Reversible(body, mode)).eval()
        held: dict[int, int] = {p.untyped_storage().data_ptr(): 0 for p in chain.parameters()}

        def pack(t: Tensor) -> Tensor:
            held.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            z, logdet = chain(torch.randn(4, 4, 16, 16))
        del z, logdet
        return sum(held.values())

    one = 4 * 4 * 16 * 16 * 4
    assert kept("invert", 3) == kept("invert", 9) <= 2 * one
    assert kept("inputs", 9) <= 10 * one
    assert kept("plain", 9) > 5 * kept("inputs", 9)


def data_parallel_worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    errors = []
    for mode in (*MODES, *FAST_MODES):
        torch.manual_seed(0)
        plain, reversible, x = pair(mode)
        wrapped = nn.parallel.DistributedDataParallel(Likelihood(reversible))
        wrapped(x[2 * rank : 2 * rank + 2]).backward()
        expected = torch.autograd.grad(log_prob_loss(plain, x), list(plain.parameters()))
        errors += [float((p.grad - g).abs().max()) for p, g in zip(reversible.parameters(), expected, strict=True)]
    (Path(folder) / f"{rank}.txt").write_text(str(max(errors)))
    torch.distributed.destroy_process_group()


class Likelihood(nn.Module):
    """DDP wraps ``forward``; the loss is a method."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor) -> Tensor:
        return log_prob_loss(self.flow, x)


@pytest.mark.filterwarnings("ignore:Grad strides do not match")  # of 1x1 weights, whose two layouts are the same
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_processes_give_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments, n_threads = (port, str(tmp_path)), torch.get_num_threads()
    other = torch.multiprocessing.get_context("spawn").Process(target=data_parallel_worker, args=(1, *arguments))
    other.start()
    data_parallel_worker(0, *arguments)
    other.join()
    torch.set_num_threads(n_threads)
    for rank in range(2):
        assert float((tmp_path / f"{rank}.txt").read_text()) < 1e-10
