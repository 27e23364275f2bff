"""Checks of uncertainties pass for the exact posterior of a Gaussian and fail for one that is too sure or biased."""

from __future__ import annotations

import math

import pytest
import torch
from deepinv.models import Reconstructor
from scipy.stats import spearmanr
from torch import Tensor

from flowprox import load_model, make_physics, save_model
from flowprox.operators import measure_each
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
    "factor": (lambda: Intervals(ScaleNet(1, 4, 1), 0.1, -1.0), "factor must be positive"),
    "shapes": (lambda: crps(torch.rand(4, 2), torch.rand(3)), r"samples must be \(L, B, ...\)"),
    "one image": (lambda: tarp(torch.rand(4, 1, 2), torch.rand(1, 2)), "at least two"),
    "few ranks": (lambda: rank_p_value(torch.zeros(9), 20), "too few"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()
