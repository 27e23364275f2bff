"""Every bijection keeps the contract; a new one is a new line in ``CASES``."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from flowprox.flows import (
    ActNorm,
    AffineCoupling,
    Bijection,
    Conv1x1,
    Flow,
    Glow,
    GlowStep,
    GlowSteps,
    HaarSqueeze,
    PixelNorm,
    PixelwiseFlow,
    RealNVP,
    Reversible,
    Sequential,
    Split,
    Squeeze,
    Unsqueeze,
)
from flowprox.flows.conditioners import CouplingAttention, CouplingNet, CouplingResNet, CouplingUNet, ZeroConv2d
from flowprox.flows.glow import ChannelFlip, CheckerboardCoupling

SMALL = (3, 4, 4)


def steps(n_channels: int = 4, n: int = 2) -> list[Bijection]:
    return [GlowStep(n_channels, CouplingNet(n_channels // 2, n_channels, 5)) for _ in range(n)]


# name: (constructor, shape of one input)
CASES: dict[str, tuple[Callable[[], Bijection], tuple[int, ...]]] = {
    "actnorm": (lambda: ActNorm(3), (3, 4, 2)),
    "pixel norm": (lambda: PixelNorm((3, 4, 2)), (3, 4, 2)),
    "conv1x1": (lambda: Conv1x1(5), (5, 2, 4)),
    "coupling": (lambda: AffineCoupling(CouplingNet(2, 4, 5)), (4, 4, 4)),
    "coupling, odd channels": (lambda: AffineCoupling(CouplingNet(2, 2, 5)), (3, 4, 4)),
    "coupling, bounded shift": (lambda: AffineCoupling(CouplingNet(2, 4, 5), 2.0, 1.0), (4, 4, 4)),
    "coupling, U-Net": (lambda: AffineCoupling(CouplingUNet(2, 4, [4, 6])), (4, 5, 3)),
    "coupling, residual": (lambda: AffineCoupling(CouplingResNet(2, 4, 5, 2)), (4, 3, 4)),
    "coupling, attention": (lambda: AffineCoupling(CouplingAttention(2, 4, 4, 2)), (4, 3, 4)),
    "checkerboard, even": (lambda: CheckerboardCoupling(CouplingResNet(2, 4, 4, 1, True), 0), (2, 4, 3)),
    "checkerboard, odd": (lambda: CheckerboardCoupling(CouplingResNet(2, 4, 4, 1, True), 1), (2, 3, 4)),
    "flip": (lambda: ChannelFlip(), SMALL),
    "step": (lambda: steps()[0], (4, 4, 4)),
    "step, actnorm in the net": (lambda: GlowStep(4, CouplingNet(2, 4, 5, actnorm=True)), (4, 4, 4)),
    "squeeze": (Squeeze, SMALL),
    "unsqueeze": (Unsqueeze, (12, 2, 2)),
    "haar": (HaarSqueeze, SMALL),
    "split": (lambda: Split(ActNorm(2)), (4, 2, 2)),
    "sequential": (lambda: Sequential(steps()), (4, 4, 4)),
    "reversible, inputs": (lambda: Reversible(steps(), "inputs"), (4, 4, 4)),
    "reversible, invert": (lambda: Reversible(steps(), "invert", check_drift=True), (4, 4, 4)),
    "reversible, mixed": (lambda: Reversible([Squeeze(), *steps(12, 1), Unsqueeze()], "invert"), SMALL),
    "glow": (lambda: Glow(SMALL, 2, 2, 4), SMALL),
    "glow, one channel": (lambda: Glow((1, 4, 4), 2, [1, 2], [8, 16]), (1, 4, 8)),
    "glow, Haar, U-Net": (lambda: Glow(SMALL, 1, 2, [[4, 4]], coupling="unet", squeeze="haar"), SMALL),
    "glow, a kind per level": (lambda: Glow(SMALL, 2, 1, 4, coupling=["residual", "attention"]), SMALL),
    "glow, as published": (lambda: Glow(SMALL, 2, 1, 4, coupling="conv-actnorm"), SMALL),
    "glow, inputs": (lambda: Glow(SMALL, 2, 1, 4, backward="inputs"), SMALL),
    "glow, invert": (lambda: Glow(SMALL, 2, 1, 4, backward="invert"), SMALL),
    "fast steps": (lambda: GlowSteps(steps(), "fast-nothing"), (4, 4, 4)),
    "fast steps, odd channels": (lambda: GlowSteps([GlowStep(3, CouplingNet(2, 2, 5))], "fast-invert"), (3, 4, 2)),
    "glow, fast": (lambda: Glow(SMALL, 2, 1, 4, shift_bound=2.0, squeeze="haar", backward="fast-nothing"), SMALL),
    "glow, fast-inputs": (lambda: Glow(SMALL, 2, 1, 4, coupling="conv-actnorm", backward="fast-inputs"), SMALL),
    "glow, fast-invert": (lambda: Glow(SMALL, 2, 1, 4, coupling="conv-actnorm", backward="fast-invert"), SMALL),
    "glow behind a pixel norm": (lambda: PixelwiseFlow(Glow(SMALL, 2, 1, 4)), SMALL),
    "realnvp": (lambda: RealNVP(SMALL, 2, 2, 4, 1), SMALL),
    "realnvp, invert": (lambda: RealNVP(SMALL, 1, 2, 4, 1, backward="invert"), SMALL),
}
every_bijection = pytest.mark.parametrize("name", CASES)


def perturb(module: nn.Module, std: float = 0.1) -> nn.Module:
    """Move every parameter, so that no layer is the identity any more."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(std * torch.randn_like(parameter))
    return module


def make(name: str, batch: int = 3) -> tuple[Bijection, Tensor]:
    """A bijection in float64 that training has moved, in eval mode, and a batch for it."""
    constructor, shape = CASES[name]
    bijection = perturb(constructor().double())
    for module in bijection.modules():
        if hasattr(module, "initialized"):
            module.initialized.fill_(True)
    return bijection.eval(), torch.randn(batch, *shape, dtype=torch.float64)


@every_bijection
def test_inverse_undoes_forward_and_determinants_cancel(name: str) -> None:
    bijection, x = make(name)
    z, logdet = bijection(x)
    x_back, inverse_logdet = bijection.inverse(z) if z.ndim == 4 else bijection.inverse(z, x.shape[-2:])  # type: ignore
    assert logdet.shape == inverse_logdet.shape == (len(x),)
    torch.testing.assert_close(x_back, x, rtol=0, atol=1e-10)
    torch.testing.assert_close(inverse_logdet, -logdet, rtol=0, atol=1e-10)


@every_bijection
def test_forward_undoes_inverse(name: str) -> None:
    bijection, x = make(name)
    size = {"image_size": x.shape[-2:]} if isinstance(bijection, Flow) else {}
    z = torch.randn_like(bijection.encode(x))
    torch.testing.assert_close(bijection.encode(bijection.decode(z, **size)), z, rtol=0, atol=1e-10)


@every_bijection
def test_logdet_is_that_of_the_jacobian(name: str) -> None:
    bijection, x = make(name, batch=1)
    size = {"image_size": x.shape[-2:]} if isinstance(bijection, Flow) else {}
    z, logdet = bijection(x)
    for call, at, found in [
        (bijection.encode, x, logdet),
        (lambda z: bijection.decode(z, **size), z.detach(), -logdet),
    ]:
        jacobian = torch.autograd.functional.jacobian(call, at).reshape(x.numel(), x.numel())
        torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1][None], found, rtol=0, atol=1e-9)


@every_bijection
def test_values_alone_are_those_with_the_determinant(name: str) -> None:
    bijection, x = make(name)
    size = {"image_size": x.shape[-2:]} if isinstance(bijection, Flow) else {}
    z, _ = bijection(x)
    torch.testing.assert_close(bijection.encode(x), z, rtol=0, atol=1e-12)
    torch.testing.assert_close(bijection.decode(z, **size), bijection.inverse(z, **size)[0], rtol=0, atol=1e-12)


@every_bijection
def test_gradient_reaches_every_parameter_and_the_input(name: str) -> None:
    bijection, x = make(name)
    size = {"image_size": x.shape[-2:]} if isinstance(bijection, Flow) else {}
    for call in (bijection, lambda z: bijection.inverse(z, **size)):
        point = (x if call is bijection else bijection.encode(x).detach()).requires_grad_()
        value, logdet = call(point)
        loss = value.pow(3).sum() + logdet.sum()
        gradients = torch.autograd.grad(loss, [point, *bijection.parameters()])
        missing = [n for n, g in zip(["x", *dict(bijection.named_parameters())], gradients, strict=True) if not g.any()]
        # a 1x1 convolution's or actnorm's gradient is never zero by accident; relu may switch off whole units of tiny nets
        assert not [n for n in missing if not n.endswith(("hidden.0.bias", "hidden.1.bias"))]


@every_bijection
def test_saved_and_loaded_it_is_the_same(name: str) -> None:
    bijection, x = make(name)
    copy = CASES[name][0]().double().train()
    copy.load_state_dict(bijection.state_dict())
    for found, expected in zip(copy(x), bijection(x), strict=True):  # train mode: a lost flag would initialize again
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@every_bijection
def test_low_precision_nets_leave_the_values_in_full_precision(name: str) -> None:
    bijection, x = make(name)
    bijection, x = bijection.float(), x.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, logdet = bijection(x)
    assert z.dtype == logdet.dtype == torch.float32
    torch.testing.assert_close(z, bijection(x)[0], rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("constructor", "shape", "message"),
    [
        (Squeeze, (1, 3, 5, 4), "odd height or width"),
        (HaarSqueeze, (1, 3, 4, 5), "odd height or width"),
        (Unsqueeze, (1, 6, 4, 4), "not a multiple of 4"),
        (lambda: Glow(SMALL, 2, 1, 4), (1, 3, 6, 4), "divisible by 4"),
        (lambda: Glow(SMALL, 2, 1, 4), (1, 1, 4, 4), r"shape \(B, 3, H, W\)"),
        (lambda: RealNVP(SMALL, 1, 2, 4, 1), (3, 4, 4), r"shape \(B, 3, H, W\)"),
    ],
)
def test_wrong_shapes_are_named(constructor: Callable[[], Bijection], shape: tuple[int, ...], message: str) -> None:
    for call in ("forward", "encode"):
        with pytest.raises(ValueError, match=message):
            getattr(constructor(), call)(torch.zeros(shape))


INITIALIZED = ("actnorm", "step", "step, actnorm in the net", "glow", "glow, inputs", "glow, invert")


@pytest.mark.parametrize("name", [*INITIALIZED, "glow, fast", "glow, fast-invert"])
def test_initialization_from_data_happens_once(name: str) -> None:
    constructor, shape = CASES[name]
    bijection = constructor().double()
    plain = constructor().double()
    plain.load_state_dict(bijection.state_dict())
    first, second = torch.randn(2, 16, *shape, dtype=torch.float64) * 3 + 1
    bijection.eval()(first)
    assert not any(m.initialized for m in bijection.modules() if hasattr(m, "initialized"))
    z, _ = bijection.train()(first)
    if name == "actnorm":
        torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(3, dtype=z.dtype), atol=1e-5, rtol=0)
        torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(3, dtype=z.dtype), atol=1e-2, rtol=0)
    assert all(m.initialized for m in bijection.modules() if hasattr(m, "initialized"))
    state = {key: value.clone() for key, value in bijection.state_dict().items()}
    bijection(second)
    for key, value in bijection.state_dict().items():
        assert torch.equal(value, state[key]), key
    with torch.no_grad():
        plain.train()(first)  # without gradients there is no reversible pass: the plain way
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=0, atol=1e-12)


def test_zero_convolution_starts_at_zero() -> None:
    assert not ZeroConv2d(2, 3)(torch.randn(1, 2, 4, 4)).any()
