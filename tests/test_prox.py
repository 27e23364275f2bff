"""Proxes: exact ones minimize their functional; learned ones keep shape, ignore or obey the step, and report errors."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from helpers import assert_prox
from torch import Tensor, nn

from flowprox.flows import Conv1x1, Flow, Glow, Sequential, Squeeze, Unsqueeze
from flowprox.prox import FlowProx, ResNetProx, SoftThreshold, UNetProx, at_level, checked_levels


def rotation_flow() -> Flow:
    """A flow that is a rotation: shrinking its latent is then exactly the prox of the latent's norm."""
    layers = [Squeeze(), Conv1x1(12), Unsqueeze()]
    return Flow(Sequential(layers), (3, 4, 4), n_levels=1, offset=0.0).double()


def small_glow(**options) -> Glow:
    return Glow(image_shape=(3, 8, 8), n_levels=2, n_steps=2, hidden_channels=4, **options)


def weighted(prox: FlowProx) -> FlowProx:
    assert prox.log_weight is not None
    nn.init.normal_(prox.log_weight, std=0.5)
    return prox.double()


DENSITIES = {
    "Gaussian base": lambda: FlowProx(rotation_flow()),
    "Laplace base": lambda: FlowProx(rotation_flow(), base="laplace"),
    "Gaussian, one weight per channel": lambda: weighted(FlowProx(rotation_flow(), channelwise=True)),
    "Laplace, one weight per channel": lambda: weighted(FlowProx(rotation_flow(), "laplace", channelwise=True)),
    "the log-determinant of a rotation": lambda: FlowProx(rotation_flow(), log_determinant=True),
}


def exact_cases() -> dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]]:
    """A prox and what it minimizes: for a flow minus the logarithm of its density."""

    def of_density(prox: FlowProx) -> Callable[[Tensor], Tensor]:
        return lambda x: -prox.log_prob(x)

    densities: dict[str, FlowProx] = {name: make() for name, make in DENSITIES.items()}
    l1 = {"soft threshold": (SoftThreshold(), lambda x: x.abs().flatten(1).sum(1))}
    return {**l1, **{name: (prox, of_density(prox)) for name, prox in densities.items()}}


@pytest.mark.parametrize("name", DENSITIES)
def test_samples_are_of_the_density(name: str) -> None:
    prox = DENSITIES[name]()
    x = prox.sample(2000, generator=torch.Generator().manual_seed(0))
    z = prox.flow.encode_image(x)
    scale = torch.ones(()) if prox.log_weight is None else torch.exp(-prox.log_weight[prox.groups])
    normal, laplace = torch.distributions.Normal(0.0, scale.sqrt()), torch.distributions.Laplace(0.0, scale)
    density = normal if prox.base == "gaussian" else laplace
    torch.testing.assert_close(prox.log_prob(x), density.log_prob(z).flatten(1).sum(1))  # a rotation has determinant 1
    entropy = density.entropy().expand(3, 4, 4).sum().item()
    assert -prox.log_prob(x).mean().item() == pytest.approx(entropy, abs=0.5)
    mean = torch.full((1, 3, 4, 4), 2.0, dtype=torch.float64)
    there = prox.sample(2000, 0.5, generator=torch.Generator().manual_seed(0), mean=mean)
    torch.testing.assert_close(prox.flow.encode_image(there), mean + 0.5 * z)
    torch.testing.assert_close(prox.log_prob(prox.flow.decode_image(mean + z), mean=mean), prox.log_prob(x))


def test_density_of_a_plain_prox_is_that_of_its_flow() -> None:
    flow = small_glow().double()
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(FlowProx(flow).log_prob(x), flow.log_prob(x))


def test_the_log_determinant_is_descended_along() -> None:
    """1/2 ||z - f(v)||^2 + s (1/2 ||z||^2 + log|det Dg(z)|) falls below what shrinking alone reaches."""
    flow = small_glow().double()
    flow.initialize(torch.rand(8, 3, 8, 8, dtype=torch.float64))
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    v, step = torch.rand(2, 3, 8, 8, dtype=torch.float64), 0.02

    def objective(x: Tensor) -> Tensor:
        z, start = flow.encode_image(x), flow.encode_image(v)
        penalty = 0.5 * z.square().flatten(1).sum(1) + flow.inverse_image(z)[1]
        return 0.5 * (z - start).square().flatten(1).sum(1) + step * penalty

    with torch.no_grad():
        assert (objective(FlowProx(flow, log_determinant=True)(v, step)) < objective(FlowProx(flow)(v, step))).all()


@pytest.mark.parametrize("name", exact_cases())
@pytest.mark.parametrize("step", [0.0, 0.1, 2.0])
def test_minimizes_its_functional(name: str, step: float) -> None:
    prox, functional = exact_cases()[name]
    with torch.no_grad():
        assert_prox(prox, functional, torch.randn(2, 3, 4, 4, dtype=torch.float64), step)


LEARNED = {
    "flow": lambda: FlowProx(small_glow()),
    "flow, channelwise": lambda: FlowProx(small_glow(), channelwise=True),
    "flow, log-determinant": lambda: FlowProx(small_glow(), log_determinant=True),
    "flow, U-Net coupling": lambda: FlowProx(
        Glow(image_shape=(3, 8, 8), n_levels=1, n_steps=2, hidden_channels=[[4, 8]], coupling="unet")
    ),
    "resnet": lambda: ResNetProx(hidden_channels=8),
    "unet": lambda: UNetProx(hidden_channels=4, n_scales=3),
}


@pytest.mark.parametrize("name", LEARNED)
def test_keeps_the_shape_and_trains_every_parameter(name: str) -> None:
    prox = LEARNED[name]()
    for module in prox.modules():
        if hasattr(module, "last") and isinstance(module.last, nn.Conv2d):
            nn.init.normal_(module.last.weight, std=0.1)
    v = torch.rand(2, 3, 16, 8)
    x = prox(v, torch.tensor(0.1, requires_grad=True))
    assert x.shape == v.shape
    x.square().sum().backward()
    assert [name for name, p in prox.named_parameters() if p.grad is None] == []


def test_flow_prox_with_step_zero_is_the_identity() -> None:
    prox = FlowProx(small_glow().double())
    v = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(prox(v, 0.0), v, rtol=0, atol=1e-10)


def test_large_steps_lead_to_the_most_likely_image() -> None:
    flow = small_glow().double()
    flow.initialize(torch.rand(8, 3, 8, 8, dtype=torch.float64))
    v = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    mode = flow.decode(torch.zeros(2, 192, dtype=torch.float64))
    torch.testing.assert_close(FlowProx(flow)(v, 1e12), mode, rtol=0, atol=1e-8)
    torch.testing.assert_close(FlowProx(flow, base="laplace")(v, 1e12), mode, rtol=0, atol=1e-8)


def test_channel_weights_act_on_their_own_latents() -> None:
    prox = FlowProx(small_glow().double(), channelwise=True)
    assert prox.log_weight is not None
    nn.init.constant_(prox.log_weight, -40.0)
    prox.log_weight.data[3] = 40.0
    z = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    shrunk = prox.shrink(z, 1.0)
    dropped = prox.groups.expand_as(z) == 3
    assert shrunk[dropped].abs().max() < 1e-12
    torch.testing.assert_close(shrunk[~dropped], z[~dropped], rtol=0, atol=1e-12)


def test_channel_weights_by_level_are_those_of_the_level() -> None:
    plain = FlowProx(small_glow().double(), channelwise=True)
    told = FlowProx(plain.flow, channelwise=True, levels=[0.1, 0.2])
    assert plain.log_weight is not None and told.log_weight is not None
    nn.init.normal_(told.log_weight)
    z = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    at_both = told.shrink(z, 0.3, torch.tensor([0.1, 0.2], dtype=torch.float64))
    for i in range(2):
        plain.log_weight.data = told.log_weight.data[i]
        torch.testing.assert_close(at_both[i : i + 1], plain.shrink(z[i : i + 1], 0.3))
    with pytest.raises(ValueError, match="pass sigma"):
        told.shrink(z, 0.3)


@pytest.mark.parametrize("base", ["gauss", "student", ""])
def test_an_unknown_base_names_the_choices(base: str) -> None:
    with pytest.raises(ValueError, match="base must be one of 'gaussian', 'laplace'"):
        FlowProx(small_glow(), base=base)


def test_parameter_counts_of_the_published_baselines() -> None:
    assert sum(p.numel() for p in UNetProx().parameters()) == pytest.approx(31.04e6, rel=1e-3)
    assert sum(p.numel() for p in ResNetProx().parameters()) == pytest.approx(0.63e6, rel=0.01)
    assert sum(p.numel() for p in ResNetProx(hidden_channels=64).parameters()) == pytest.approx(0.16e6, rel=0.02)


def test_another_size_leaves_the_buffers_as_they_are() -> None:
    prox = FlowProx(small_glow(), channelwise=True)
    before = {name: buffer.shape for name, buffer in prox.named_buffers()}
    assert prox(torch.rand(1, 3, 12, 16), 0.1).shape == (1, 3, 12, 16)
    assert {name: buffer.shape for name, buffer in prox.named_buffers()} == before


LEVELS = (0.01, 0.03, 0.2, 0.25)


def test_interpolates_as_numpy_does_in_log_sigma() -> None:
    values = torch.randn(4, 5, dtype=torch.float64)
    sigma = torch.tensor([0.0, 1e-3, 0.01, 0.02, 0.03, 0.1, 0.24, 0.25, 3.0], dtype=torch.float64)
    expected = [np.interp(sigma.clamp_min(1e-9).log().numpy(), np.log(LEVELS), column) for column in values.T.numpy()]
    np.testing.assert_allclose(at_level(values, LEVELS, sigma).T, expected, atol=1e-12)


def test_only_the_neighboring_levels_get_a_gradient() -> None:
    values = torch.zeros(4, 2, requires_grad=True)
    at_level(values, LEVELS, torch.tensor([0.1])).sum().backward()
    assert values.grad is not None
    assert (values.grad.abs().sum(1) > 0).tolist() == [False, True, True, False]


@pytest.mark.parametrize("levels", [[], [0.1], [0.2, 0.1], [0.0, 0.1], [0.1, float("inf")]])
def test_levels_must_rise(levels: list[float]) -> None:
    with pytest.raises(ValueError, match="levels must be at least two rising positive"):
        checked_levels(levels)
