"""Means over images with their confidence intervals, measured beside published, and methods compared image by image.

    mean +- t s / sqrt(n),    t the 97.5 % quantile of Student's distribution with n - 1 degrees of freedom

Symbols: s standard deviation over the n images; the interval is that of the mean over images like these. A comparison of
two methods is the same interval of the differences image by image, which share image and noise: a paired t interval. An
image that was measured several times, with other seeds, counts once, with the mean of its figures.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from scipy.stats import t as student

__all__ = [
    "METRICS",
    "Comparison",
    "Extremes",
    "Metric",
    "Row",
    "Scores",
    "confidence",
    "extremes",
    "mean_per_image",
    "measurement_of",
    "paired_comparison",
    "scores",
    "summary_markdown",
    "summary_rows",
]


class Metric(NamedTuple):
    """How a figure of the records is called and read."""

    label: str
    unit: str
    digits: int
    high_is_best: bool


METRICS = {
    "psnr": Metric("PSNR", "dB", 2, True),
    "psnr_unclipped": Metric("PSNR, not clipped", "dB", 2, True),
    "ssim": Metric("SSIM", "", 3, True),
    "residual": Metric("residual", "", 4, False),
}
"""Figures that a record holds for its image, by key."""

Scores = Mapping[tuple[str, str], float]
"""A figure by image and by what the measurement depends on: its noise seed, its operator, the content of the image."""


class Row(NamedTuple):
    """One method on one problem; None where nothing is known.

    ``n_exact`` counts images whose estimate equals the truth: their PSNR is infinite and stays out of the mean.
    """

    problem: str
    method: str
    n_images: int
    n_failed: int
    psnr: float | None
    psnr_interval: float | None
    ssim: float | None
    seconds: float | None
    tuned: dict[str, Any]
    published: float | None
    n_exact: int = 0
    peak_memory_mib: float | None = None
    psnr_of_group: Mapping[str, float | None] = {}


class Comparison(NamedTuple):
    """A method against a reference on the same measurements; the difference is method minus reference."""

    n_images: int
    difference: float
    interval: float | None
    n_higher: int


class Extremes(NamedTuple):
    """The images with the lowest and the highest figure, and the median over images."""

    lowest: tuple[str, float]
    median: float
    highest: tuple[str, float]


def confidence(values: Sequence[float], level: float = 0.95) -> tuple[float, float | None]:
    """Mean, and half the width of its confidence interval (None for a single value).

    Example:
        >>> mean, half = confidence([1.0, 2.0, 3.0])
        >>> mean, round(half, 3)
        (2.0, 2.484)
    """
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return mean, None
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    return mean, float(student.ppf(0.5 + level / 2, n - 1)) * deviation / math.sqrt(n)


def measurement_of(record: Mapping[str, Any]) -> str:
    """What y depends on apart from the image's name; two methods are compared where this is the same."""
    keys = ("seed", "operator_seed", "parameters", "image_hash")
    return json.dumps([record.get(key) for key in keys], sort_keys=True)


def scores(records: Iterable[Mapping[str, Any]], metric: str = "psnr") -> Scores:
    """A figure of every measurement that the records of one method on one problem hold; failures are left out."""
    return {
        (str(record["image"]), measurement_of(record)): float(record[metric])
        for record in records
        if "failed" not in record and record.get(metric) is not None
    }


def mean_per_image(figures: Scores) -> dict[str, float]:
    """One figure per image: the mean over its measurements.

    Example:
        >>> mean_per_image({("a", "seed 0"): 1.0, ("a", "seed 1"): 3.0, ("b", "seed 0"): 5.0})
        {'a': 2.0, 'b': 5.0}
    """
    members: dict[str, list[float]] = {}
    for (image, _), value in figures.items():
        members.setdefault(image, []).append(value)
    return {image: math.fsum(values) / len(values) for image, values in members.items()}


def paired_comparison(method: Scores, reference: Scores) -> Comparison | None:
    """The differences on the measurements both have, averaged over images, with a paired t interval; None without any.

    Example:
        >>> same = {("a", "0"): 21.0, ("b", "0"): 26.0}, {("a", "0"): 20.0, ("b", "0"): 24.0, ("c", "0"): 9.0}
        >>> comparison = paired_comparison(*same)
        >>> comparison.n_images, comparison.difference, comparison.n_higher
        (2, 1.5, 2)
    """
    differences = mean_per_image({key: method[key] - reference[key] for key in method if key in reference})
    if not differences:
        return None
    mean, half = confidence(list(differences.values()))
    return Comparison(len(differences), mean, half, sum(value > 0 for value in differences.values()))


def extremes(figures: Scores) -> Extremes | None:
    """The images with the lowest and the highest figure; None without any."""
    values = mean_per_image(figures)
    if not values:
        return None
    lowest, highest = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
    return Extremes((lowest, values[lowest]), statistics.median(values.values()), (highest, values[highest]))


def summary_rows(
    records: Sequence[Mapping[str, Any]], published: Mapping[tuple[str, str], float] | None = None
) -> list[Row]:
    """One row per problem and method, in the order in which they first occur.

    Arguments:
        records: with problem, method, image, and psnr, ssim, seconds or failed; optional group, a kind of image.
        published: PSNR by label of the problem and of the method.
    """
    members: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for record in records:
        members.setdefault((str(record["problem"]), str(record["method"])), []).append(record)
    groups = list(dict.fromkeys(str(record["group"]) for record in records if "group" in record))
    rows = []
    for (problem, method), group in members.items():
        good = [record for record in group if "failed" not in record]
        figures = list(mean_per_image(scores(good)).values())
        mean, half = confidence(figures) if figures else (None, None)
        row = Row(
            problem,
            method,
            len({str(record["image"]) for record in good}),
            len(group) - len(good),
            mean,
            half,
            _mean(good, "ssim"),
            _mean(good, "seconds"),
            dict(good[0].get("tuned", {})) if good else {},
            (published or {}).get((problem, method)),
            sum("psnr" in record and record["psnr"] is None for record in good),
            _mean(good, "peak_memory_mib"),
            {name: _mean([r for r in good if str(r.get("group")) == name], "psnr") for name in groups},
        )
        rows.append(row)
    return rows


def summary_markdown(rows: Sequence[Row]) -> str:
    """A table of PSNR, methods down and problems across: mean ± 95 % confidence, the published figure in brackets.

    The best mean of each problem is bold. Failed images are counted beside the mean of the others.

    Example:
        >>> row = Row("denoising", "bm3d", 12, 0, 25.1, 0.4, 0.8, 0.1, {}, 25.2)
        >>> print(summary_markdown([row]), end="")
        | PSNR (dB) | denoising |
        |---|---|
        | bm3d | **25.10** ± 0.40 (25.20) |
    """
    problems, methods = (
        list(dict.fromkeys(row.problem for row in rows)),
        list(dict.fromkeys(row.method for row in rows)),
    )
    at = {(row.problem, row.method): row for row in rows}
    best = {
        problem: max((row.psnr for row in rows if row.problem == problem and row.psnr is not None), default=None)
        for problem in problems
    }
    lines = [["PSNR (dB)", *problems], ["---"] * (len(problems) + 1)]
    for method in methods:
        cells = [_cell(at.get((problem, method)), best[problem]) for problem in problems]
        lines.append([method.replace("|", "/"), *cells])
    return "".join(
        ("|" + "|".join(line) if line[0] == "---" else "| " + " | ".join(line) + " ") + "|\n" for line in lines
    )


def _cell(row: Row | None, best: float | None) -> str:
    if row is None:
        return ""
    words = [] if row.psnr is None else [f"**{row.psnr:.2f}**" if row.psnr == best else f"{row.psnr:.2f}"]
    words += [f"± {row.psnr_interval:.2f}"] if row.psnr_interval is not None else []
    words += [f"({row.published:.2f})"] if row.published is not None else []
    return " ".join([*words, *([f"{row.n_failed} failed"] if row.n_failed else [])])


def _mean(records: Sequence[Mapping[str, Any]], key: str) -> float | None:
    known = list(mean_per_image(scores(records, key)).values())
    return math.fsum(known) / len(known) if known else None
