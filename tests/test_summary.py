"""Means, intervals and paired comparisons, against scipy; what a repeated, failed or exact reconstruction counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from flowprox.summary import (
    confidence,
    figures_of,
    paired_comparisons,
    per_image,
    summary_markdown,
    summary_rows,
)


def record(method: str, image: str, psnr: float | None, **others: Any) -> dict[str, Any]:
    return {"problem": "p", "method": method, "image": image, "psnr": psnr, **others}


@pytest.mark.parametrize("n", [2, 3, 30])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_interval_is_that_of_scipy(n: int, level: float) -> None:
    values = np.random.default_rng(n).normal(25, 2, n)
    mean, half = confidence(list(values), level)
    expected = stats.ttest_1samp(values, 0).confidence_interval(level)
    assert half is not None
    assert (mean - half, mean + half) == pytest.approx((expected.low, expected.high))


def test_interval_holds_the_mean_as_often_as_it_says() -> None:
    draws = np.random.default_rng(0).normal(3.0, 1.0, (600, 6))
    hits = [abs(mean - 3.0) <= (half or 0.0) for mean, half in (confidence(list(row)) for row in draws)]
    assert np.mean(hits) == pytest.approx(0.95, abs=0.025)


def test_comparison_is_the_paired_t_interval_of_scipy() -> None:
    rng = np.random.default_rng(1)
    difficulty = rng.normal(25, 4, 12)
    a, b = difficulty + rng.normal(0.3, 0.2, 12), difficulty + rng.normal(0.0, 0.2, 12)
    figures = figures_of(
        record(method, str(i), value, seed=i)
        for method, values in (("a", a), ("b", b))
        for i, value in enumerate(values)
    )
    found = paired_comparisons(figures, "psnr", "b").loc["a"]
    expected = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert found.difference - found.interval == pytest.approx(expected.low)
    assert found.difference + found.interval == pytest.approx(expected.high)
    assert found.n_higher == int((a > b).sum()) and found.n_images == 12
    back = paired_comparisons(figures, "psnr", "a").loc["b"]
    assert back.difference == pytest.approx(-found.difference)
    assert found.interval < 0.2 * (confidence(list(a))[1] or 0)  # the difficulty of images drops out


@pytest.mark.parametrize("key", ["seed", "operator_seed", "parameters", "image_hash"])
def test_only_the_same_measurement_is_compared(key: str) -> None:
    same = record("a", "1", 20.0, **{key: 0}), record("b", "1", 21.0, **{key: 0})
    other = record("b", "1", 30.0, **{key: 1})
    assert paired_comparisons(figures_of([same[0], other]), "psnr", "b").empty
    found = paired_comparisons(figures_of([*same, other]), "psnr", "b").loc["a"]
    assert found.tolist() == pytest.approx([1, -1.0, np.nan, 0], nan_ok=True)


def test_an_image_counts_once() -> None:
    """Two noise seeds on one image tell less than two images: the interval must not shrink."""
    once = [record("a", image, psnr, seed=0, ssim=0.5) for image, psnr in (("1", 20.0), ("2", 24.0))]
    again = [{**one, "seed": 1} for one in once]
    (row,), (repeated,) = summary_rows(once), summary_rows([*once, *again])
    assert (row.psnr, row.psnr_interval, row.ssim) == (repeated.psnr, repeated.psnr_interval, repeated.ssim)
    assert repeated.n_images == 2
    images = per_image(figures_of([*once, {**once[0], "seed": 1, "psnr": 22.0}]))["psnr"]
    assert images.to_dict() == {("p", "a", "1"): 21.0, ("p", "a", "2"): 24.0}


def test_failed_and_exact_reconstructions_stay_out_of_the_mean() -> None:
    records = [
        record("a", "1", 20.0),
        record("a", "2", None),
        {"problem": "p", "method": "a", "image": "3", "failed": "no"},
    ]
    (row,) = summary_rows(records, {("p", "a"): 21.0})
    assert (row.psnr, row.psnr_interval, row.n_images, row.n_failed, row.n_exact) == (20.0, None, 2, 1, 1)
    assert summary_markdown([row]).splitlines()[2] == "| a | **20.00** (21.00) 1 failed |"


def test_means_of_groups() -> None:
    records = [
        record("a", "1", 10.0, ssim=0.1, seconds=1.0, group="g"),
        record("a", "2", 20.0, ssim=0.3, seconds=None, group="h"),
        record("b", "1", None, group="g"),
    ]
    first, second = summary_rows(records)
    assert (first.n_images, first.psnr, first.ssim, first.seconds) == (2, 15.0, pytest.approx(0.2), 1.0)
    assert first.psnr_of_group == {"g": 10.0, "h": 20.0}
    assert (second.psnr, second.ssim, second.psnr_of_group) == (None, None, {"g": None, "h": None})
