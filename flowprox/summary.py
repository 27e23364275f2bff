"""Means over images with their confidence intervals, measured beside published, and methods compared image by image.

    mean +- t s / sqrt(n),    t the 97.5 % quantile of Student's distribution with n - 1 degrees of freedom

Symbols: s standard deviation over the n images. Two methods are compared by the same interval of the differences image by
image. An image that was measured several times, with other seeds, counts once, with the mean of its figures.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text
from scipy import stats

from flowprox.naming import digits
from flowprox.records import NOT_RUN, Record


class Metric(NamedTuple):
    """How a figure of the records is called and read; ``highest`` is the most it can be."""

    label: str
    unit: str
    digits: int
    high_is_best: bool = True
    highest: float | None = None

    @property
    def best(self) -> Callable[..., Any]:
        """Takes the best of some figures: ``max`` or ``min``."""
        return max if self.high_is_best else min

    @property
    def form(self) -> str:
        """The format of its numbers."""
        return f".{self.digits}f"

    @property
    def title(self) -> str:
        """The label with its unit."""
        return f"{self.label} ({self.unit})" if self.unit else self.label


METRICS = {
    "psnr": Metric("PSNR", "dB", 2),
    "psnr_unclipped": Metric("PSNR, not clipped", "dB", 2),
    "ssim": Metric("SSIM", "", 3, highest=1.0),
    "psnr_hidden": Metric("PSNR, hidden pixels", "dB", 2),
    "residual": Metric("residual", "", 4, False),
}
"""Figures that a record holds for its image, by key."""

NUMBERS = [*METRICS, "seconds", "peak_memory_mib"]
"""Keys of everything that is a number in a record of a reconstruction."""

_PLACE = ["problem", "method"]


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
    tuned: Mapping[str, object]
    published: float | None
    n_exact: int = 0
    peak_memory_mib: float | None = None
    psnr_of_group: Mapping[str, float | None] = {}
    not_run: bool = False  # a package or a trained network is missing

    @property
    def failures(self) -> str:
        """How many images failed, in words; "" for none."""
        return "not run" if self.not_run else str(self.n_failed or "")


def confidence(values: Iterable[float], level: float = 0.95) -> tuple[float, float | None]:
    """Mean, and half the width of its confidence interval (None for a single value).

    Example:
        >>> mean, half = confidence([1.0, 2.0, 3.0])
        >>> mean, round(half, 3)
        (2.0, 2.484)
    """
    known = np.asarray([*values], dtype=float)
    if len(known) < 2:
        return float(known.mean()), None
    return float(known.mean()), float(stats.t.ppf(0.5 + level / 2, len(known) - 1) * stats.sem(known))


def figures_of(records: Iterable[Record]) -> pd.DataFrame:
    """Every measurement that the records hold, a line each: its place, its figures (NaN where unknown), its failure.

    ``measurement`` is what y depends on apart from the image's name; two methods are compared where it is the same.
    """
    depends_on = ("seed", "operator_seed", "parameters", "image_hash")
    lines = [
        {key: str(record[key]) for key in ("problem", "method", "image")}
        | {
            "measurement": json.dumps([record.get(key) for key in depends_on], sort_keys=True),
            "group": record.get("group"),
            "failed": record.get("failed"),
            "exact": "failed" not in record and "psnr" in record and record["psnr"] is None,
        }
        | {key: None if "failed" in record else record.get(key) for key in NUMBERS}
        for record in records
    ]
    columns = ["problem", "method", "image", "measurement", "group", "failed", "exact", *NUMBERS]
    return pd.DataFrame(lines, columns=columns).astype(dict.fromkeys(NUMBERS, float))


def per_image(figures: pd.DataFrame) -> pd.DataFrame:
    """The figures of each problem, method and image, which index them: the mean over its measurements."""
    once = figures.drop_duplicates([*_PLACE, "image", "measurement"], keep="last")
    return once.groupby([*_PLACE, "image"], sort=False)[NUMBERS].mean()


def paired_comparisons(figures: pd.DataFrame, metric: str, reference: str) -> pd.DataFrame:
    """Every method against a reference, on the measurements that both have; of the records of one problem.

    By method: n_images, the mean difference (method minus reference), half of its paired t interval, and n_higher, the images
    where the method's figure is higher.

    Example:
        >>> a, b = ({"problem": "p", "image": i, "psnr": x} for i, x in (("1", 20.0), ("2", 24.0)))
        >>> records = [{**a, "method": "m"}, {**b, "method": "m"}, {**a, "method": "n", "psnr": 21.0}]
        >>> paired_comparisons(figures_of(records), "psnr", "m").loc["n"].tolist()
        [1.0, 1.0, nan, 1.0]
    """
    wide = figures.pivot_table(metric, ["image", "measurement"], "method", aggfunc="last", sort=False)
    differences = wide.sub(wide[reference], axis=0).groupby(level="image").mean().drop(columns=reference)
    lines = {}
    for method, column in differences.items():
        if len(values := column.dropna()):
            mean, half = confidence(values)
            lines[method] = (len(values), mean, half, int((values > 0).sum()))
    columns = ["n_images", "difference", "interval", "n_higher"]
    return pd.DataFrame.from_dict(lines, orient="index", columns=columns).astype({"interval": float})


def summary_rows(records: Sequence[Record], published: Mapping[tuple[str, str], float] | None = None) -> list[Row]:
    """One row per problem and method, in the order in which they first occur; ``published`` is PSNR by their labels."""
    figures = figures_of(records)
    groups = [str(name) for name in figures["group"].dropna().unique()]
    tuned = {(str(r["problem"]), str(r["method"])): r["tuned"] for r in reversed(records) if r.get("tuned")}
    rows = []
    for place, members in figures.groupby(_PLACE, sort=False):
        problem, method = map(str, place)  # type: ignore[call-overload]
        good = members[members["failed"].isna()]
        images = per_image(good)
        psnr = images["psnr"].dropna()
        mean, half = confidence(psnr) if len(psnr) else (None, None)
        row = Row(
            problem,
            method,
            len(images),
            len(members) - len(good),
            mean,
            half,
            _mean(images, "ssim"),
            _mean(images, "seconds"),
            tuned.get((problem, method), {}),
            (published or {}).get((problem, method)),
            int(members["exact"].sum()),
            _mean(images, "peak_memory_mib"),
            {name: _mean(per_image(good[good["group"] == name]), "psnr") for name in groups},
            bool(members["failed"].fillna("").str.startswith(NOT_RUN).all()),
        )
        rows.append(row)
    return rows


def _mean(images: pd.DataFrame, key: str) -> float | None:
    mean = images[key].mean()
    return None if np.isnan(mean) else float(mean)


def terminal_table(rows: Sequence[Row]) -> Table:
    """What is known of every row, a section per problem; a column appears where a row has something in it."""
    groups = dict.fromkeys(name for row in rows for name in row.psnr_of_group)
    lines = [
        {
            "method": " " + row.method,
            "PSNR (dB)": digits(row.psnr) + ("" if row.psnr_interval is None else f" ± {row.psnr_interval:.2f}"),
            "published": "" if row.published is None else digits(row.published),
            **({name: digits(row.psnr_of_group[name]) for name in groups} if len(groups) > 1 else {}),
            "SSIM": digits(row.ssim, 3),
            "seconds": digits(row.seconds, 3),
            "images": str(row.n_images),
            "failed": row.failures,
            "tuned": ", ".join(f"{key} {value}" for key, value in row.tuned.items()),
        }
        for row in rows
    ]
    heads = [head for head in (lines[0] if lines else ()) if any(line[head] for line in lines)]
    counts, n_images = {line["images"] for line in lines}, "images"
    if len(counts) == 1:
        heads.remove("images")
        n_images = f"{min(counts)} image" + "s" * (counts != {"1"})
    caption = f"PSNR clipped to [0, 1], mean over {n_images} ± 95 % confidence"
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True, min_width=len(caption))
    table.caption, table.caption_justify = caption, "left"
    for head in heads:
        whole = head == "PSNR (dB)" or (head == "method" and all(len(line[head]) < 40 for line in lines))
        table.add_column(head, justify="left" if head == "method" else "right", overflow="fold", no_wrap=whole)
    before = None
    for row, line in zip(rows, lines, strict=True):
        if row.problem != before:
            table.add_section()
            table.add_row(Text(row.problem, style="bold"))
        table.add_row(*(Text(line[head]) for head in heads))
        before = row.problem
    return table


def summary_markdown(rows: Sequence[Row]) -> str:
    """A table of PSNR, methods down and problems across: mean ± 95 % confidence, published figures in brackets, the best bold.

    Example:
        >>> row = Row("denoising", "bm3d", 12, 0, 25.1, 0.4, 0.8, 0.1, {}, 25.2)
        >>> print(summary_markdown([row]), end="")
        | PSNR (dB) | denoising |
        |---|---|
        | bm3d | **25.10** ± 0.40 (25.20) |
    """
    problems, methods = dict.fromkeys(row.problem for row in rows), dict.fromkeys(row.method for row in rows)
    best = {p: max((r.psnr for r in rows if r.problem == p and r.psnr is not None), default=None) for p in problems}
    cells = {(row.problem, row.method): _cell(row, best[row.problem]) for row in rows}
    lines = [["PSNR (dB)", *problems]]
    lines += [[method, *(cells.get((problem, method), "") for problem in problems)] for method in methods]
    written = [f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines]
    return "".join([written[0], "|" + "---|" * (len(problems) + 1) + "\n", *written[1:]])


def _cell(row: Row, best: float | None) -> str:
    words = [] if row.psnr is None else [f"**{row.psnr:.2f}**" if row.psnr == best else f"{row.psnr:.2f}"]
    words += [f"± {row.psnr_interval:.2f}"] if row.psnr_interval is not None else []
    words += [f"({row.published:.2f})"] if row.published is not None else []
    return " ".join([*words, *([row.failures + " failed" * (not row.not_run)] if row.n_failed else [])])
