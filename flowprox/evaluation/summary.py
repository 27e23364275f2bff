"""Means over images with their confidence intervals, measured beside published.

    mean +- t s / sqrt(n),    t the 97.5 % quantile of Student's distribution with n - 1 degrees of freedom

Symbols: s standard deviation over the n images; the interval is that of the mean over images like these.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from scipy.stats import t as student

__all__ = ["Row", "confidence", "summary_markdown", "summary_rows"]


class Row(NamedTuple):
    """One method on one problem; None where nothing is known."""

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


def summary_rows(
    records: Sequence[Mapping[str, Any]], published: Mapping[tuple[str, str], float] | None = None
) -> list[Row]:
    """One row per problem and method, in the order in which they first occur.

    Arguments:
        records: with problem, method, and psnr, ssim, seconds or failed.
        published: PSNR by label of the problem and of the method.
    """
    members: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for record in records:
        members.setdefault((str(record["problem"]), str(record["method"])), []).append(record)
    rows = []
    for (problem, method), group in members.items():
        good = [record for record in group if "failed" not in record]
        figures = [record["psnr"] for record in good if record.get("psnr") is not None]
        mean, half = confidence(figures) if figures else (None, None)
        row = Row(
            problem,
            method,
            len(good),
            len(group) - len(good),
            mean,
            half,
            _mean(good, "ssim"),
            _mean(good, "seconds"),
            dict(good[0].get("tuned", {})) if good else {},
            (published or {}).get((problem, method)),
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
    known = [float(record[key]) for record in records if record.get(key) is not None]
    return math.fsum(known) / len(known) if known else None
