"""Tiles: what a network sees whole it sees in parts too, without seams; gray pictures through networks of color."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepinv.models import Reconstructor
from torch import Tensor

from flowprox import FlowProx, Glow, UnfoldedPGD, load_model
from flowprox.estimates import divisor_of, estimate
from flowprox.methods import Tiled, _places, _weights, make_method
from flowprox.operators import PROBLEMS, make_physics


@pytest.fixture(scope="module")
def network() -> UnfoldedPGD:
    """Random weights that change the image; a pixel depends on no other one that is 8 or more away."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        flow = Glow((3, 8, 8), n_levels=1, n_steps=1, hidden_channels=4)
        flow.initialize(torch.rand(8, 3, 8, 8))
        for parameter in flow.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        levels = [0.05, 0.2]
        prox = FlowProx(flow, channelwise=True, levels=levels)
        return UnfoldedPGD([prox], shrinkage=0.3, start="adjoint", levels=levels).eval()


@pytest.mark.parametrize("problem", ["denoising", "random-inpainting"])
@torch.no_grad()
def test_tiles_give_what_the_whole_gives_and_tell_how_far_they_are(problem: str, network: UnfoldedPGD) -> None:
    physics = make_physics(problem, (3, 101, 150), sigma=0.1)
    y = physics(torch.rand(1, 3, 101, 150))
    done: list[tuple[int, int]] = []
    x_hat = Tiled(network, tile=72, overlap=32)(y, physics, callback=lambda *n: done.append(n))
    whole = network(y, physics)
    assert (whole - y).abs().max() > 0.01
    torch.testing.assert_close(x_hat, whole, rtol=0, atol=1e-5)
    assert done == [(i, 6) for i in range(1, 7)]


@torch.no_grad()
def test_tiles_that_see_too_little_have_no_seams(network: UnfoldedPGD) -> None:
    """What differs from the whole fades in and out over the overlap: the difference has no jump at a tile's border."""
    physics = make_physics("denoising", (3, 40, 200), sigma=0.1)
    smooth = torch.linspace(0, 1, 200).expand(1, 3, 40, 200) * torch.tensor([1.0, 0.9, 0.8]).view(3, 1, 1)
    error = Tiled(network, tile=48, overlap=16)(smooth, physics) - network(smooth, physics)
    alone = network(smooth[..., :48], physics) - network(smooth, physics)[..., :48]
    assert error.diff(dim=-1).abs().max() < 0.5 * alone.diff(dim=-1).abs().max().clamp_min(1e-6)


@pytest.mark.parametrize(("side", "tile", "overlap"), [(100, 48, 16), (48, 48, 16), (49, 48, 8), (30, 48, 16)])
def test_places_cover_an_axis_and_weights_are_one_in_the_middle(side: int, tile: int, overlap: int) -> None:
    total = torch.zeros(side)
    for where in _places(side, tile, overlap):
        assert 0 <= where.start and where.stop <= side
        total[where] += _weights(where, side, overlap)
    assert (total > 0).all() and total[0] == 1


@torch.no_grad()
def test_a_gray_picture_goes_through_a_network_of_color(network: UnfoldedPGD) -> None:
    physics = make_physics("denoising", (1, 16, 16), sigma=0.1)
    y = torch.rand(2, 1, 16, 16)
    x_hat = make_method("unfolded", "denoising", model=network)(y, physics)
    louder = make_physics("denoising", (3, 16, 16), sigma=0.1 * 3**0.5)
    torch.testing.assert_close(x_hat, network(y.expand(-1, 3, -1, -1), louder).mean(1, keepdim=True))
    # beyond the highest level, 0.2, the contrast falls until the noise has it
    physics, highest = (
        make_physics("denoising", (1, 16, 16), sigma=0.4 / 3**0.5),
        make_physics("denoising", (3, 16, 16), sigma=0.2),
    )
    half = network((0.25 + 0.5 * y).expand(-1, 3, -1, -1), highest).mean(1, keepdim=True)
    torch.testing.assert_close(make_method("unfolded", "denoising", model=network)(y, physics), 2 * half - 0.5)


def test_a_tile_that_the_network_cannot_take_is_refused(network: UnfoldedPGD) -> None:
    with pytest.raises(ValueError, match="tile must be a multiple of 2"):
        Tiled(network, tile=33, overlap=8)
    with pytest.raises(ValueError, match="more than twice the overlap"):
        Tiled(network, tile=32, overlap=16)


def test_a_network_of_color_is_told_more_noise_of_a_gray_picture() -> None:
    """Its three colors share one noise; mean colors of independent noise of sqrt(3) times the level have as much."""
    seen: list[Tensor] = []

    class Listening(Reconstructor):
        n_channels = 3

        def forward(self, y: Tensor, physics: Any) -> Tensor:  # type: ignore[override]
            seen.append(physics.noise_model.sigma)
            return y

    physics = make_physics("denoising", (1, 8, 8), sigma=0.1)
    y = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(Tiled(Listening())(y, physics), y)
    torch.testing.assert_close(seen[0].flatten()[0], torch.tensor(0.1 * 3**0.5))
    assert float(physics.noise_model.sigma) == pytest.approx(0.1)
    Tiled(Listening(), is_measured=False)(y, physics)
    torch.testing.assert_close(seen[1].flatten()[0], torch.tensor(0.1))


@pytest.mark.parametrize(("problem", "size"), [("deblurring", (1, 11, 13)), ("super-resolution", (1, 12, 20))])
def test_plug_and_play_takes_any_size_without_extending_the_measurement(
    problem: str, size: tuple[int, int, int]
) -> None:
    network = load_model("unfolded-denoising-natural")
    method = make_method("plug-and-play", problem, model=network, n_iterations=1)
    assert divisor_of(method) == 1 and divisor_of(network) == 8
    physics = make_physics(problem, size, sigma=0.05)
    y = physics(torch.rand(1, *size))
    assert estimate(method, y, physics, PROBLEMS[problem])[0].x_hat.shape == size
