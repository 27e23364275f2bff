"""Checks of uncertainties pass for the exact posterior of a Gaussian and fail for one that is too sure or biased."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deepinv.models import Reconstructor
from scipy.stats import spearmanr
from torch import Tensor

from flowprox import FlowProx, Glow, UnfoldedPGD, load_model, make_physics, save_model
from flowprox.checkpoints import Card, load_card
from flowprox.cli import main
from flowprox.data import load_image, save_image
from flowprox.operators import Problem, measure_each
from flowprox.reconstruction import ReconstructionJob, reconstruct_files
from flowprox.uncertainty import (
    Intervals,
    ScaleNet,
    conformal_factor,
    coverage,
    coverage_limits,
    crps,
    fit_intervals,
    interval_statistics,
    rank_p_value,
    ranks,
    tarp,
    uniform_p_value,
)

N_IMAGES, N_SAMPLES, N_PIXELS = 1000, 49, 6
SIGMA = 0.5


def posterior(spread: float = 1.0, shift: float = 0.0, n_samples: int = N_SAMPLES) -> tuple[Tensor, Tensor]:
    """Samples (L, B, D) and truth (B, D) of x ~ N(0, 1), y = x + N(0, sigma^2), of which the posterior is known."""
    x = torch.randn(N_IMAGES, N_PIXELS)
    y = x + SIGMA * torch.randn_like(x)
    mean, deviation = y / (1 + SIGMA**2), SIGMA / math.sqrt(1 + SIGMA**2)
    noise = torch.randn(n_samples, *x.shape)
    return mean + deviation * (spread * noise + shift), x


@pytest.mark.parametrize(
    ("spread", "shift", "is_honest"), [(1.0, 0.0, True), (0.7, 0.0, False), (1.0, 0.4, False), (1.4, 0.0, False)]
)
def test_ranks_tell_an_honest_posterior(spread: float, shift: float, is_honest: bool) -> None:
    samples, x = posterior(spread, shift)
    p = rank_p_value(ranks(samples, x)[:, 0], N_SAMPLES)
    assert p > 0.01 if is_honest else p < 1e-4


@pytest.mark.parametrize(("spread", "shift", "is_honest"), [(1.0, 0.0, True), (0.7, 0.0, False), (1.0, 0.7, False)])
def test_tarp_tells_an_honest_posterior(spread: float, shift: float, is_honest: bool) -> None:
    samples, x = posterior(spread, shift)
    p = uniform_p_value(tarp(samples, x, torch.Generator().manual_seed(0)))
    assert p > 0.01 if is_honest else p < 1e-3


@pytest.mark.parametrize("n_samples", [1, 8])
def test_tarp_accepts_few_samples_of_an_honest_posterior(n_samples: int) -> None:
    assert uniform_p_value(tarp(*posterior(n_samples=n_samples), torch.Generator().manual_seed(0))) > 0.01


def test_crps_tells_the_posterior_from_the_prior_and_tarp_does_not() -> None:
    samples, x = posterior()
    prior = torch.randn(N_SAMPLES, *x.shape)
    assert uniform_p_value(tarp(prior, x, torch.Generator().manual_seed(0))) > 0.01
    assert crps(prior, x).mean() > 1.5 * crps(samples, x).mean()


def test_the_true_posterior_has_the_lowest_crps() -> None:
    scores = {case: float(crps(*posterior(*case)).mean()) for case in [(1.0, 0.0), (0.7, 0.0), (1.0, 0.4), (1.4, 0.0)]}
    assert min(scores, key=lambda case: scores[case]) == (1.0, 0.0)


def test_crps_is_that_of_all_pairs() -> None:
    samples, x = torch.randn(7, 3, 2), torch.randn(3, 2)
    pairs = (samples[:, None] - samples[None]).abs().sum((0, 1)) / (7 * 6)
    torch.testing.assert_close(crps(samples, x), (samples - x).abs().mean(0) - pairs / 2)


def test_ties_are_broken_at_random() -> None:
    drawn = ranks(torch.zeros(4, 2000), torch.zeros(2000))
    assert rank_p_value(drawn, 4) > 0.01 and set(drawn.tolist()) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("n", [9, 20, 57])
def test_the_conformal_factor_keeps_its_promise_on_average(n: int) -> None:
    alpha, outside = 0.1, []
    for _ in range(400):
        errors = torch.randn(n + 20, 30).abs() * torch.rand(n + 20, 1)  # images differ in difficulty
        factor = conformal_factor(errors[:n], torch.ones(n, 30), alpha)
        outside.append(1 - float(coverage(-torch.tensor(factor), torch.tensor(factor), errors[n:]).mean()))
    mean, error = torch.tensor(outside).mean(), torch.tensor(outside).std() / 20
    assert alpha - 1.5 / n - 3 * error < mean < alpha + 3 * error


def test_split_conformal_coverage_lies_within_its_limits() -> None:
    n, alpha = 40, 0.2
    scores = torch.rand(3000, n).sort(dim=1).values  # uniform: the coverage of [0, q] is q itself
    covered = scores[:, math.ceil((n + 1) * (1 - alpha)) - 1]
    low, high = coverage_limits(n, alpha, probability=0.9)
    assert float(((covered >= low) & (covered <= high)).float().mean()) == pytest.approx(0.9, abs=0.02)


class _Measurement(Reconstructor):
    def forward(self, y: Tensor, physics: object) -> Tensor:
        return y


def test_intervals_find_where_the_error_is_and_keep_their_coverage(tmp_path) -> None:
    rows = torch.tensor([0.02, 0.2]).repeat_interleave(4).view(1, 1, 8, 1).expand(1, 1, 8, 8)
    images = 0.5 + rows * torch.randn(300, 1, 8, 8)  # the method answers 0.5, so the rows' deviations are its errors

    class Constant(_Measurement):
        def forward(self, y: Tensor, physics: object) -> Tensor:
            return torch.full_like(y, 0.5) + 0 * y

    physics = make_physics("inpainting", (1, 8, 8), mask=(rows[0, 0] < 0.1).float())
    intervals = fit_intervals(Constant(), physics, images[:100], images[100:200], alpha=0.2, n_steps=80)
    test = images[200:]
    y = measure_each(test, physics, range(100))
    widths = intervals(Constant()(y, physics), y, physics)
    figures = interval_statistics(widths, (test - 0.5).abs())
    assert widths[:, :, 5:].mean() > 4 * widths[:, :, :3].mean()
    assert 0.75 < figures["coverage"] < 0.87 and figures["rank_correlation"] > 0.4
    save_model(intervals, tmp_path / "intervals", {"problem": {"name": "inpainting", "parameters": {}}})
    assert torch.equal(load_model(tmp_path / "intervals")(Constant()(y, physics), y, physics), widths)


def test_statistics_of_intervals_are_those_of_scipy() -> None:
    errors = torch.arange(2500.0).view(1, 1, 50, 50) / 2500
    figures = interval_statistics(torch.full_like(errors, 0.1), errors)
    assert figures["rank_correlation"] == 0 and figures["mean_half_width"] == pytest.approx(0.1)
    widths = (10 * torch.rand(errors.shape)).round()  # many are equal
    found = interval_statistics(widths + errors, errors.round(decimals=1))["rank_correlation"]
    assert found == pytest.approx(spearmanr((widths + errors).flatten(), errors.round(decimals=1).flatten()).statistic)
    errors = torch.arange(1.0, 11).view(2, 1, 1, 5)
    assert interval_statistics(torch.where(errors == 10, 2, 0.5) * errors, errors)["coverage_of_largest"] == 1


REFUSED = {
    "alpha": (lambda: Intervals(ScaleNet(1, 4, 1), 1.2), "alpha must lie between 0 and 1"),
    "few images": (lambda: conformal_factor(torch.rand(8, 3), torch.ones(8, 3), 0.1), "at least 9 calibration images"),
    "factor": (lambda: Intervals(ScaleNet(1, 4, 1), 0.1, -1.0), "factor must be finite and positive"),
    "shapes": (lambda: crps(torch.rand(4, 2), torch.rand(3)), r"samples must be \(L, B, ...\)"),
    "one image": (lambda: tarp(torch.rand(4, 1, 2), torch.rand(1, 2)), "at least two"),
    "few ranks": (lambda: rank_p_value(torch.zeros(9), 20), "too few"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()


# From the command line --------------------------------------------------------------------------------------------------


def _network(folder: Path, seed: int = 0) -> str:
    """A network for denoising at 0.1, of 8x8 images."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        flow = Glow((3, 8, 8), n_levels=2, n_steps=1, hidden_channels=4)
        flow.initialize(torch.rand(8, 3, 8, 8))
        problem = {"name": "denoising", "parameters": {"sigma": 0.1}, "seed": 0}
        save_model(UnfoldedPGD([FlowProx(flow)]), folder, {"problem": problem})
    return str(folder)


def _words(world: Path, *others: str, out: str = "out") -> list[str]:
    sizes = ["--alpha=0.2", "--n_training=10", "--n_calibration=20", "--n_steps=20", "--image_size=16"]
    return ["calibrate", str(world / "network"), str(world / "pictures"), f"--out={world / out}", *sizes, *others]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, a network, another one, and the intervals of the first."""
    folder = tmp_path_factory.mktemp("world")
    _network(folder / "network")
    _network(folder / "other", seed=1)
    (folder / "pictures").mkdir()
    generator = torch.Generator().manual_seed(0)
    for i in range(52):
        save_image(torch.rand(3, 16, 16, generator=generator), folder / "pictures" / f"{i}.png")
    assert main(_words(folder, out="intervals")) == 0
    return folder


def test_a_calibration_says_what_it_holds_for(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card, network = load_card(world / "intervals"), load_card(world / "network")
    assert card.problem is not None and card.problem["name"] == "denoising"
    assert card.problem["parameters"]["sigma"] == 0.1
    told = {"model": network.name, "model_sha256": network.sha256, "alpha": 0.2, "seed": 0, "n_test": 22}
    assert told.items() <= card.training.items() and len(card.training["calibration_sha256"]) == 64
    assert {"coverage", "mean_half_width"} <= card.metrics.keys() and 0.7 < card.metrics["coverage"] < 0.9
    words = ["--n_calibration=30", "--n_training=12", "--parameters", "sigma=0.2"]
    assert main(_words(world, *words, out="again")) == 0
    assert "not measured: 10 images are left" in capsys.readouterr().out
    again = load_card(world / "again")
    assert again.problem is not None and again.problem["parameters"]["sigma"] == 0.2 and not again.metrics
    pictures = str(world / "pictures")
    assert main(_words(world, f"--training={pictures}", f"--test={pictures}", out="named")) == 0
    assert load_card(world / "named").training["n_test"] == 52


def test_reconstruct_writes_the_intervals_ends(world: Path) -> None:
    out, picture = world / "rec", world / "pictures/0.png"
    job = ReconstructionJob(str(world / "network"), measured=False, intervals=str(world / "intervals"))
    words = ["--model", str(world / "network"), "--simulate", "--intervals", str(world / "intervals")]
    assert main(["reconstruct", str(picture), "--out", str(out), *words]) == 0
    (record,) = reconstruct_files(job, [picture], out)  # finished by the command
    x_hat, lower, upper, widths, y = (
        torch.from_numpy(np.load(out / folder / "0.npy"))
        for folder in ("", "lower", "upper", "half-widths", "measurements")
    )
    intervals = load_model(world / "intervals")
    expected = intervals(x_hat[None], y[None], make_physics("denoising", (3, 16, 16), sigma=0.1))[0]
    torch.testing.assert_close(widths, expected)
    torch.testing.assert_close(torch.stack([lower, upper]), torch.stack([x_hat - widths, x_hat + widths]))
    assert load_image(out / "half-widths/0.png").max() == 1
    facts = record["intervals"]
    assert (facts["alpha"], facts["calibration"]) == (0.2, "intervals")
    assert facts["sha256"] == intervals.card.sha256[:16]
    x = load_image(picture)
    assert facts["coverage"] == pytest.approx(float(coverage(lower[None], upper[None], x[None])))
    with pytest.raises(ValueError, match="another job"):
        reconstruct_files(replace(job, intervals=None), [picture], out)
    reconstruct_files(replace(job, intervals=None), [picture], out, overwrite=True)
    assert {path.parent.name for path in out.rglob("0.*")} == {"rec", "measurements"}


JOBS_REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another network": ({"model": "other"}, "calibrated for the network network with the hash"),
    "other parameters": ({"parameters": {"sigma": 0.2}}, "denoising-sigma0.1, not for denoising-sigma0.2"),
    "another problem": ({"problem": "inpainting"}, "calibrated for denoising-sigma0.1, not for inpainting"),
    "another method": ({"method": "self-ensemble"}, "not of method self-ensemble"),
    "no intervals": ({"intervals": "other"}, "is a UnfoldedPGD; make some with flowprox calibrate"),
    "not there": ({"intervals": "nowhere"}, "no model"),
}


@pytest.mark.parametrize("case", JOBS_REFUSED)
def test_a_job_refused(case: str, world: Path) -> None:
    changes, message = JOBS_REFUSED[case]
    job = ReconstructionJob(str(world / "network"), measured=False, intervals=str(world / "intervals"))
    folders = {key: str(world / value) if key in ("model", "intervals") else value for key, value in changes.items()}
    with pytest.raises(ValueError, match=message):
        reconstruct_files(replace(job, **folders), [world / "pictures/0.png"], world / "refused")
    assert not (world / "refused").exists()


def test_intervals_are_of_one_drawn_mask_and_need_a_card() -> None:
    intervals, problem = Intervals(ScaleNet(1, 4, 1), 0.1), Problem("random-inpainting")
    with pytest.raises(ValueError, match="names no network and problem"):
        intervals.check("a" * 64, problem)
    known = {"name": "random-inpainting", "parameters": {}, "seed": 3}
    intervals.card = Card("c", problem=known, training={"model_sha256": "a" * 64})
    intervals.check("a" * 64, problem, seed=3)
    with pytest.raises(ValueError, match="mask of operator_seed 3, not 4"):
        intervals.check("a" * 64, problem, seed=4)


COMMANDS_REFUSED = {
    "alpha": (["--alpha=1.5"], "alpha must lie between 0 and 1"),
    "few to calibrate": (["--n_calibration=3"], "alpha 0.2 needs at least 4 calibration images, got 3"),
    "few images": (["--n_calibration=50"], "holds 52 images, but 50 to calibrate and 10 for the half-widths are 60"),
    "few to learn from": (["--n_training=60", "--training={pictures}"], "holds 52 images, not 60"),
    "no steps": (["--n_steps=0"], "n_steps must be at least 1"),
    "negative": (["--n_test=-1"], "n_test must be at least 0"),
    "split": (["--split=valid"], "split must be one of"),
    "array": (["--parameters", "sigma"], "is not KEY=VALUE"),
    "not linear": (["--problem=one-bit"], "method unfolded is not for one-bit"),
    "no problem": (["--problem=nothing"], "unknown problem"),
}


@pytest.mark.parametrize("case", COMMANDS_REFUSED)
def test_a_command_refused(case: str, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, message = COMMANDS_REFUSED[case]
    words = [word.format(pictures=world / "pictures") for word in words]
    assert main(_words(world, *words, out="refused")) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert not (world / "refused").exists()
