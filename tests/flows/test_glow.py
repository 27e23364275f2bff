"""Glow as a density: sizes, round trips after training, log-likelihood, samples."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flowprox.flows import Flow, Glow, RealNVP
from flowprox.flows.conditioners import ZeroConv2d
from flowprox.naming import build

FLOWS = {
    "glow": lambda: Glow((3, 16, 16), 2, 4, 16),
    "glow, as published": lambda: Glow((3, 16, 16), 2, 4, 16, coupling="conv-actnorm", squeeze="haar"),
    "glow, U-Net": lambda: Glow((3, 16, 16), 2, 4, [[8, 8], [8]], coupling="unet"),
    "realnvp": lambda: RealNVP((3, 16, 16), 2, 3, 16, 1),
}
every_flow = pytest.mark.parametrize("name", FLOWS)


def natural_images(n: int, size: int) -> Tensor:
    """Images in [0, 1] whose amplitude falls like 1/frequency, on 256 gray levels with uniform dequantization."""
    rows, columns = torch.fft.fftfreq(size)[:, None], torch.fft.rfftfreq(size)
    amplitude = 1 / (rows.square() + columns.square()).sqrt().clamp(min=1 / size)
    x = torch.fft.irfft2(torch.fft.rfft2(torch.randn(n, 3, size, size)) * amplitude, s=(size, size))
    x = (0.5 + 0.2 * x / x.std((1, 2, 3), keepdim=True)).clamp(0, 1)
    return ((x * 255).floor() + torch.rand_like(x)) / 256


def trained(flow: Flow, n_steps: int, batch: int, learning_rate: float = 2e-3) -> Flow:
    """Initialization from data and a few likelihood steps with Adam."""
    flow.initialize(natural_images(32, flow.height))
    optimizer = torch.optim.Adam(flow.parameters(), lr=learning_rate)
    for _ in range(n_steps):
        optimizer.zero_grad()
        flow.bits_per_dimension(natural_images(batch, flow.height)).mean().backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
        optimizer.step()
    return flow.eval()


@torch.no_grad()
def shaken(flow: Flow) -> Flow:
    """The last convolution of every net moved by N(0, 0.02^2)."""
    for module in flow.modules():
        if isinstance(module, ZeroConv2d):
            module.weight.add_(0.02 * torch.randn_like(module.weight))
    return flow.eval()


def round_trip_error(flow: Flow, x: Tensor) -> float:
    with torch.no_grad():
        size = (x.shape[-2], x.shape[-1])
        return float((flow.decode(flow.encode(x), size) - x).abs().max())


def assert_round_trip(flow: Flow, x: Tensor) -> None:
    """Clean and noisy images come back."""
    x = torch.cat([x, x + 0.2 * torch.randn_like(x)])
    assert round_trip_error(flow, x) < 1e-4
    assert round_trip_error(flow.double(), x.double()) < 1e-10


@every_flow
def test_round_trip_after_training(name: str) -> None:
    fresh = FLOWS[name]().eval()
    x = natural_images(8, 16)
    flow = trained(FLOWS[name](), 12, 16)
    assert flow.log_prob(x).mean() > fresh.log_prob(x).mean()
    assert_round_trip(shaken(flow), x)


def test_round_trip_of_the_published_size() -> None:
    """25.8 million parameters on 16x16 images: after three steps of Adam at the paper's rate, and fresh but shaken.

    Both at once is another thing: shaking trained nets of width 512 with unit activations by this much makes the map itself
    chaotic (latents of 1e7), which no arithmetic undoes.
    """
    x = natural_images(1, 16)
    assert_round_trip(trained(Glow.paper((3, 16, 16)), 3, 1, learning_rate=1e-5), x)
    assert_round_trip(shaken(Glow.paper((3, 16, 16))), x)


def test_published_size_has_the_published_number_of_parameters() -> None:
    assert sum(p.numel() for p in Glow.paper().parameters()) == 25_771_456


@every_flow
@pytest.mark.parametrize("size", [(4, 4), (8, 20), (24, 12)])
def test_any_divisible_size(name: str, size: tuple[int, int]) -> None:
    flow = FLOWS[name]().double().eval()
    x = torch.rand(2, 3, *size, dtype=torch.float64)
    z, logdet = flow(x)
    assert z.shape == (2, 3 * size[0] * size[1]) and logdet.shape == (2,)
    torch.testing.assert_close(flow.decode(z, size), x, rtol=0, atol=1e-10)
    assert flow.sample(1, image_size=size).shape == (1, 3, *size)


@every_flow
def test_card_builds_the_same_flow(name: str) -> None:
    flow = FLOWS[name]()
    copy = build(flow.spec())
    copy.load_state_dict(flow.state_dict())
    x = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(copy.eval().log_prob(x), flow.eval().log_prob(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    "flow", [lambda: Glow((1, 2, 2), 1, 3, 8), lambda: RealNVP((1, 2, 2), 1, 2, 8, 1)], ids=["glow", "realnvp"]
)
def test_density_integrates_to_one(flow: Callable[[], Flow]) -> None:
    """In four dimensions, by importance sampling from a Gaussian that is wider than the flow's."""
    density = flow().double().eval()
    with torch.no_grad():
        for parameter in density.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    center = density.sample(4000).mean(0)
    deviation = 1.5 * density.sample(4000).std(0)
    n = 40_000
    e = torch.randn(n, 1, 2, 2, dtype=torch.float64)
    log_proposal = -0.5 * e.square().flatten(1).sum(1) - 2 * math.log(2 * math.pi) - deviation.log().sum()
    with torch.no_grad():
        weights = (density.log_prob(center + deviation * e) - log_proposal).exp()
    standard_error = float(weights.std()) / math.sqrt(n)
    assert standard_error < 0.02
    assert abs(float(weights.mean()) - 1) < 4 * standard_error


def test_log_prob_is_the_change_of_variables() -> None:
    """Pushed through the inverse, the base density divided by |det Dg| is the density of the image."""
    flow = Glow((3, 8, 8), 2, 2, 8).double().eval()
    z = torch.randn(3, flow.n_channels * 64, dtype=torch.float64)
    x, logdet = flow.inverse(z)
    gaussian = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1)
    torch.testing.assert_close(flow.log_prob(x), gaussian - logdet, rtol=1e-10, atol=0)


@every_flow
def test_samples(name: str) -> None:
    flow = FLOWS[name]().eval()
    mode = flow.decode(torch.zeros(1, 3 * 16 * 16))
    torch.testing.assert_close(flow.sample(2, temperature=0.0), mode.expand(2, -1, -1, -1), rtol=0, atol=1e-6)
    first, again = (flow.sample(2, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    other = flow.sample(2, generator=torch.Generator().manual_seed(4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    with pytest.raises(ValueError, match="temperature must be finite and at least 0"):
        flow.sample(1, temperature=-1.0)
    with pytest.raises(ValueError, match="divisible"):
        flow.sample(1, image_size=(3, 3))


@every_flow
def test_latent_groups_are_levels_and_channels(name: str) -> None:
    """Finer groups cover more pixels, and a group is one channel of one level wherever the image is cut."""
    flow = FLOWS[name]()
    groups = flow.latent_groups()
    assert groups.shape == (3, 16, 16)
    counts = torch.bincount(groups.flatten())
    assert len(counts) == flow.n_latent_groups == 6 + 24
    assert counts.tolist() == [64] * 6 + [16] * 24
    torch.testing.assert_close(flow.latent_groups((8, 8)), groups[:, :8, :8])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_steps": [2, 2, 2]}, "n_steps has 3 entries"),
        ({"hidden_channels": [8]}, "hidden_channels has 1 entries"),
        ({"n_steps": [2, -1]}, "n_steps must be at least 0"),
        ({"hidden_channels": 0}, "hidden_channels must be at least 1"),
        ({"coupling": "dense"}, "coupling must be one of"),
        ({"squeeze": "fourier"}, "squeeze must be one of"),
        ({"backward": "magic"}, "backward must be one of"),
        ({"scale_bound": 0.0}, "scale_bound must be finite and positive"),
        ({"image_shape": (3, 10, 8)}, "divisible by 4"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Glow(**{"image_shape": (3, 8, 8), "n_levels": 2, "n_steps": 1, "hidden_channels": 4, **arguments})


def test_latent_that_fits_no_image_is_named() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        Glow((3, 8, 8), 1, 1, 4).decode(torch.zeros(1, 3 * 8 * 8 + 1), (8, 8))
