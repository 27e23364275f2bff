"""PlugAndPlay, and every method in deepinv.test."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Literal

import deepinv
import pytest
import torch
from deepinv.models import MedianFilter, Reconstructor
from deepinv.optim import L2, PGD
from torch import Tensor, nn
from torch.utils.data import DataLoader

from flowprox.baselines import Biharmonic, PlugAndPlay, TotalVariation
from flowprox.flows import Glow
from flowprox.methods import make_method
from flowprox.metrics import psnr
from flowprox.noise import GaussianNoise
from flowprox.operators import make_physics, measure_each
from flowprox.priors import FlowDenoiser, FlowPrior, ReconstructorDenoiser
from flowprox.prox import FlowProx, ResNetProx, UNetProx
from flowprox.solvers import Adam, LatentMAP, NoiseMAP, PosteriorSampling
from flowprox.unfolding import UnfoldedPGD

SHAPE = (3, 16, 16)
PAGE = Path(__file__).parent.parent / "docs" / "guide" / "deepinv.md"


def tiny_glow() -> Glow:
    flow = Glow(image_shape=SHAPE, n_levels=2, n_steps=2, hidden_channels=4)
    flow.initialize(smooth_images() + 0.1 * torch.randn(2, *SHAPE))
    return flow.eval()


def smooth_images() -> Tensor:
    """Two planes in different colors."""
    across = torch.linspace(0, 1, SHAPE[2]).expand(SHAPE[1:])
    x = torch.stack([0.2 + 0.3 * across, 0.6 - 0.3 * across.T, 0.3 + 0.2 * across])
    return torch.stack([x, x.flip(-1)])


def told_the_level() -> UnfoldedPGD:
    levels = [0.02, 0.2]
    prox = FlowProx(tiny_glow(), channelwise=True, levels=levels)
    assert prox.log_weight is not None
    prox.log_weight.data[:, :6] = -5.0  # the last channels are details
    return UnfoldedPGD([prox], start="adjoint", levels=levels).eval()


class Blur(deepinv.models.Denoiser):
    """The wider the noisier, and one width per image."""

    def forward(self, x: Tensor, sigma: float | Tensor, **kwargs: object) -> Tensor:
        share = torch.as_tensor(sigma).view(-1, 1, 1, 1).clamp(max=0.2) / 0.2
        mean = nn.functional.avg_pool2d(nn.functional.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
        return (1 - share) * x + share * mean


DENOISERS = {
    "median": MedianFilter,
    "by level": Blur,
    "flow": lambda: FlowDenoiser(tiny_glow(), n_steps=1, n_samples=8),
    "unfolded network": lambda: told_the_level(),
}
PROBLEMS = {
    "denoising": {"sigma": 0.1},
    "inpainting": {"mask_size": 4},
    "deblurring": {"kernel_size": 5},
    "super-resolution": {"factor": 2},
    "compressed-sensing": {"m": 300},
}
EASY = ("denoising", "inpainting", "super-resolution")  # where these denoisers, which know nothing of images, suffice


@pytest.mark.parametrize("iteration", ["hqs", "pgd"])
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("denoiser", DENOISERS)
def test_contract(denoiser: str, problem: str, iteration: str) -> None:
    """Shape, closer than the adjoint, deterministic, apart from its batch, and the physics is left as it was."""
    physics = make_physics(problem, SHAPE, **PROBLEMS[problem])
    method = PlugAndPlay(DENOISERS[denoiser](), n_iterations=4, iteration=iteration)  # type: ignore[arg-type]
    x = smooth_images()
    y = measure_each(x, physics, [0, 1])
    before = {key: value for key, value in vars(physics).items() if isinstance(value, int | float | str)}
    x_hat = method(y, physics)
    assert x_hat.shape == x.shape and x_hat.dtype == x.dtype and not x_hat.requires_grad
    assert problem not in EASY or (psnr(x_hat, x) > psnr(physics.A_adjoint(y), x) - 0.5).all()
    assert torch.equal(method(y, physics), x_hat)
    # a median, and more so an untrained network, enlarges the tolerance of conjugate gradient
    atol = 1e-2 if denoiser == "unfolded network" else 5e-3
    torch.testing.assert_close(method(y[1:], physics), x_hat[1:], rtol=0, atol=atol)
    assert {key: value for key, value in vars(physics).items() if isinstance(value, int | float | str)} == before


@pytest.mark.parametrize("size", [(16, 16), (17, 13), (1, 3)])
def test_a_network_that_is_told_the_level_denoises_any_size(size: tuple[int, int]) -> None:
    x, network = torch.rand(2, 3, *size), told_the_level()
    denoiser = ReconstructorDenoiser(network)
    assert denoiser(x, 0.1).shape == x.shape
    alone = torch.cat([denoiser(x[i : i + 1], sigma) for i, sigma in enumerate((0.03, 0.2))])
    torch.testing.assert_close(denoiser(x, torch.tensor([0.03, 0.2])), alone, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="not told a noise level"):
        ReconstructorDenoiser(UnfoldedPGD([FlowProx(tiny_glow())]))


def test_inpainting_starts_from_the_smoothest_filling() -> None:
    class Identity(deepinv.models.Denoiser):
        def forward(self, x: Tensor, sigma: float | Tensor, **kwargs: object) -> Tensor:
            return x

    physics = make_physics("random-inpainting", SHAPE, keep=0.5)
    y = physics(smooth_images(), seed=0)
    x_hat = PlugAndPlay(Identity(), start="biharmonic")(y, physics)
    torch.testing.assert_close(x_hat, Biharmonic()(y, physics), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="start must be"):
        PlugAndPlay(Identity(), start="zero")  # type: ignore[arg-type]


def test_holes_are_filled_by_default() -> None:
    """A scratch of zeros is content to a denoiser: for inpainting the defaults fill it first, and take more steps."""
    physics = make_physics("inpainting", SHAPE, mask_size=6, sigma=0.02)
    x = smooth_images()
    y = measure_each(x, physics, [0, 1])
    x_hat = PlugAndPlay(Blur())(y, physics)
    assert (psnr(x_hat, x) > 30).all() and (psnr(PlugAndPlay(Blur(), start="adjoint")(y, physics), x) < 25).all()
    levels, _ = PlugAndPlay(Blur()).schedule(x, physics)
    assert len(levels) == 24 and levels[0][0] == pytest.approx(0.1)
    assert PlugAndPlay(Blur())(y[:0], physics).shape == (0, *SHAPE)


@pytest.mark.parametrize("filtering", ["bicubic", None])
def test_super_resolution_starts_from_the_enlarged_picture(filtering: str | None) -> None:
    x = smooth_images()
    physics = make_physics("super-resolution", SHAPE, factor=2, filter=filtering, sigma=0.02)
    y = physics.A(x)
    shares = []
    for start in ("adjoint", None):
        x_hat = PlugAndPlay(MedianFilter(), start=start, n_iterations=2)(y, physics)
        shares.append(((x_hat - x).norm() / x.norm()).item())
    assert shares[1] < min(0.1, shares[0])
    with pytest.raises(ValueError, match="start 'bicubic' is for super-resolution, not Denoising"):
        PlugAndPlay(MedianFilter(), start="bicubic")(x, make_physics("denoising", SHAPE, sigma=0.1))


@pytest.mark.parametrize("iteration", ["hqs", "pgd"])
def test_a_data_step_at_the_end_comes_close_to_what_was_measured(iteration: Literal["hqs", "pgd"]) -> None:
    x, physics = smooth_images(), make_physics("inpainting", SHAPE, mask_size=4)
    left = []
    for final_data_step in (False, True):
        method = PlugAndPlay(MedianFilter(), weight=0.05, iteration=iteration, final_data_step=final_data_step)
        left.append((physics.A(method(physics(x), physics)) - physics.A(x)).norm())
    torch.testing.assert_close(left[1], left[0] * 0.05 / 1.05)


def test_a_perfect_denoiser_gives_the_image_back() -> None:
    x = smooth_images()

    class Oracle(deepinv.models.Denoiser):
        def forward(self, x_noisy: Tensor, sigma: float | Tensor, **kwargs: object) -> Tensor:
            return x

    assert torch.equal(PlugAndPlay(Oracle())(x, make_physics("denoising", SHAPE)), x)


def test_the_data_step_is_the_posterior_mean_under_a_white_prior() -> None:
    """One iteration with D the identity: the mean of y and the start, weighted by 1 / sigma^2 and weight / s^2."""

    class Identity(deepinv.models.Denoiser):
        def forward(self, x: Tensor, sigma: float | Tensor, **kwargs: object) -> Tensor:
            return x

    physics = make_physics("inpainting", SHAPE, mask_size=4, sigma=0.1)
    y = physics(smooth_images(), seed=0)
    torch.testing.assert_close(PlugAndPlay(Identity(), n_iterations=3, start="adjoint")(y, physics), y)


def test_schedule_falls_to_each_images_own_sigma() -> None:
    physics = make_physics("denoising", SHAPE)
    physics.noise_model.update_parameters(sigma=torch.tensor([0.0, 0.1, 0.5]))
    levels, sigma = PlugAndPlay(Blur(), n_iterations=4).schedule(torch.rand(3, *SHAPE), physics)
    torch.testing.assert_close(sigma, torch.tensor([0.01, 0.1, 0.5]))
    assert len(levels) == 4
    torch.testing.assert_close(levels[0], torch.tensor([49 / 255, 49 / 255, 0.5]))
    torch.testing.assert_close(levels[-1], sigma)
    torch.testing.assert_close(levels[1] / levels[0], levels[2] / levels[1])


def test_takes_the_same_as_deepinvs_dpir() -> None:
    """DPIR is the reference: the same schedule, weights and iterations, but for the sign of life it starts from."""
    physics = make_physics("deblurring", SHAPE, kernel_size=5, sigma=0.05)
    y = physics(smooth_images(), seed=0)
    expected = deepinv.optim.DPIR(sigma=0.05, denoiser=Blur())(y, copy.deepcopy(physics))
    torch.testing.assert_close(PlugAndPlay(Blur())(y, physics), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    "net", [lambda: ResNetProx(hidden_channels=4), lambda: UNetProx(hidden_channels=2, n_scales=2)]
)
def test_a_prox_trained_as_a_denoiser_is_one(net) -> None:
    physics = make_physics("inpainting", SHAPE, mask_size=4)
    model = net().eval()
    y = torch.rand(2, *SHAPE)
    assert PlugAndPlay(model, n_iterations=2)(y, physics).shape == y.shape


def test_a_flow_stands_for_its_denoiser() -> None:
    flow = tiny_glow()
    assert isinstance(PlugAndPlay(flow).denoiser, FlowDenoiser)
    assert PlugAndPlay(flow).denoiser.flow is flow


WRONG = {
    "neither": (lambda: make_method("plug-and-play", "denoising"), "needs flow or model"),
    "both": (lambda: make_method("plug-and-play", "denoising", model=Blur(), flow=tiny_glow()), "either a model"),
    "flow prox": (lambda: PlugAndPlay(FlowProx(tiny_glow())), "FlowDenoiser"),
    "method": (lambda: PlugAndPlay(TotalVariation()), "must map"),
    "iterations": (lambda: PlugAndPlay(Blur(), n_iterations=0), "n_iterations"),
    "sigma": (lambda: PlugAndPlay(Blur(), sigma=-0.1), "sigma must be"),
    "start": (lambda: PlugAndPlay(Blur(), sigma_start=0.0), "sigma_start"),
    "weight": (lambda: PlugAndPlay(Blur(), weight=float("nan")), "weight"),
    "iteration": (lambda: PlugAndPlay(Blur(), iteration="admm"), "iteration must be"),  # type: ignore[arg-type]
    "not linear": (
        lambda: PlugAndPlay(Blur())(torch.rand(1, 20), make_physics("one-bit", SHAPE, m=20)),
        "linear operator",
    ),
    "not finite": (
        lambda: PlugAndPlay(Blur())(torch.full((1, *SHAPE), float("nan")), make_physics("denoising", SHAPE)),
        "NaN",
    ),
    "size": (
        lambda: PlugAndPlay(tiny_glow())(torch.rand(1, 3, 18, 18), make_physics("denoising", (3, 18, 18))),
        "divisible by 4",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(name: str) -> None:
    call, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        call()


def methods() -> dict[str, Reconstructor]:
    flow = tiny_glow()
    found: dict[str, Reconstructor] = {
        "unfolded": UnfoldedPGD([FlowProx(flow), FlowProx(flow)]),
        "total variation": TotalVariation(n_iterations=3),
        "plug-and-play": PlugAndPlay(flow, n_iterations=2),
        "deepinv PGD": PGD(prior=FlowPrior(flow), data_fidelity=L2(), stepsize=0.5, lambda_reg=0.1, max_iter=2),
        "deepinv PGD, unfolded": PGD(prior=FlowPrior(flow), data_fidelity=L2(), **FlowPrior.unfolding(2)),
        "latent MAP": LatentMAP(flow, gamma=0.1, optimizer=Adam(n_iterations=2)),
        "noise MAP": NoiseMAP(flow, noise=GaussianNoise(0.1), optimizer=Adam(n_iterations=2)),
        "posterior": PosteriorSampling(flow, noise=GaussianNoise(0.1), n_samples=4, n_warmup=2, n_chains=2),
    }
    return found


@pytest.mark.parametrize("name", methods())
def test_runs_in_deepinv_test(name: str) -> None:
    physics = make_physics("inpainting", SHAPE, mask_size=4)
    x = smooth_images()
    y = measure_each(x, physics, [0, 1])
    pairs = DataLoader([{"x": x[i], "y": y[i]} for i in range(2)], batch_size=2)  # type: ignore[arg-type]
    results = deepinv.test(
        methods()[name],
        pairs,
        physics,
        metrics=deepinv.metric.PSNR(),
        verbose=False,
        show_progress_bar=False,
        non_blocking_transfers=False,
    )
    assert results["PSNR"] > 0


BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL) if PAGE.exists() else []


def _tiny_model(name: str) -> nn.Module:
    return told_the_level() if name.startswith("unfolded") else tiny_glow()


def test_every_example_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks run one after the other, with a tiny flow and network in the place of the shipped ones."""
    assert len(BLOCKS) >= 5
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for home in ("flowprox.checkpoints", "flowprox"):
        monkeypatch.setattr(f"{home}.load_model", _tiny_model, raising=False)
    for block in BLOCKS:
        exec(compile(block.replace("64", "16"), str(PAGE), "exec"), names)


def test_a_flat_picture_stays_flat_where_a_blur_has_seen_less_of_it() -> None:
    class Unchanged(deepinv.models.Denoiser):
        def forward(self, x: Tensor, sigma: float | Tensor, **kwargs: object) -> Tensor:
            return x

    physics = make_physics("deblurring", SHAPE, kernel_size=5, boundary="valid", sigma=0.01)
    x = torch.full((1, *SHAPE), 0.5)
    torch.testing.assert_close(PlugAndPlay(Unchanged())(physics.A(x), physics), x, rtol=0, atol=1e-4)
    assert (PlugAndPlay(Unchanged(), start="adjoint")(physics.A(x), physics) - x).abs().max() > 0.1
