"""The tables of a report, each from the records of one evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from flowprox.evaluation.report.reading import Evaluation, ordered
from flowprox.evaluation.report.tables import NOTHING, Cell, Table, number, significant
from flowprox.evaluation.summary import (
    METRICS,
    Metric,
    Row,
    Scores,
    confidence,
    extremes,
    mean_per_image,
    paired_comparison,
    scores,
    summary_rows,
)

__all__ = ["Contents"]


class Contents:
    """An evaluation seen through one figure of its records.

    Arguments:
        evaluation: what was read.
        metric: key of ``METRICS``.
        reference: the method that the others are compared with; None takes the best of each problem.
    """

    def __init__(self, evaluation: Evaluation, metric: str = "psnr", reference: str | None = None) -> None:
        self.evaluation, self.key, self.reference = evaluation, metric, reference
        self.metric: Metric = METRICS[metric]
        self.problems = ordered(str(record["problem"]) for record in evaluation.records)
        self.methods = ordered(str(record["method"]) for record in evaluation.records)

    @cached_property
    def rows(self) -> list[Row]:
        return summary_rows(self.evaluation.records, self.evaluation.published.psnr)

    @cached_property
    def figures(self) -> dict[tuple[str, str], Scores]:
        """By problem and method, in the order of the records; methods without any figure included."""
        members: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
        for record in self.evaluation.records:
            members.setdefault((str(record["problem"]), str(record["method"])), []).append(record)
        return {place: scores(records, self.key) for place, records in members.items()}

    def mean(self, problem: str, method: str) -> tuple[float | None, float | None]:
        """Mean over images and half of its interval."""
        values = list(mean_per_image(self.figures.get((problem, method), {})).values())
        return confidence(values) if values else (None, None)

    def methods_of(self, problem: str) -> list[str]:
        return [method for of, method in self.figures if of == problem]

    def best(self, problem: str) -> str | None:
        """The method with the best mean."""
        means = {method: self.mean(problem, method)[0] for method in self.methods_of(problem)}
        known = {method: mean for method, mean in means.items() if mean is not None}
        choose = max if self.metric.high_is_best else min
        return choose(known, key=known.__getitem__) if known else None

    def label(self) -> str:
        return f"{self.metric.label} ({self.metric.unit})" if self.metric.unit else self.metric.label

    # Tables -----------------------------------------------------------------------------------------------------------

    def overview(self) -> Table:
        """Methods down, problems across."""
        best = {problem: self.best(problem) for problem in self.problems}
        rows = []
        for method in self.methods:
            cells = [Cell(method)]
            for problem in self.problems:
                mean, half = self.mean(problem, method)
                cell = number(mean, self.metric.digits, best=len(self.methods) > 1 and best[problem] == method)
                if (problem, method) not in self.figures:
                    cell = Cell("")
                elif half is not None:
                    cell = cell._replace(text=f"{cell.text} ± {half:.{self.metric.digits}f}")
                cells.append(cell)
            rows.append(cells)
        caption = f"{self.label()}, mean over images ± 95 % confidence; the best mean of each problem is bold."
        return Table("overview", caption, ["method", *self.problems], rows)

    def beside_published(self) -> Table:
        """Every published figure, also of methods that were not run here."""
        published = self.evaluation.published
        measured = {(row.problem, row.method): row for row in self.rows}
        sources = {published.sources.get(problem) for problem, _ in published.psnr if problem in self.problems}
        rows = []
        for (problem, method), figure in published.psnr.items():
            if problem not in self.problems:
                continue
            row = measured.get((problem, method))
            psnr, half = (row.psnr, row.psnr_interval) if row is not None else (None, None)
            rows.append(
                [
                    Cell(method if row is not None else f"{method} (not run here)"),
                    Cell(problem),
                    number(psnr, 2),
                    number(half, 2),
                    number(figure, 2),
                    number(None if psnr is None else psnr - figure, 2, sign=True),
                    Cell("" if len(sources) == 1 else published.sources.get(problem, "")),
                ]
            )
        caption = (
            "PSNR in dB measured here beside the published figure; the difference is measured minus published. The interval "
            "is that of the measured mean alone."
        )
        if len(sources) == 1 and (source := next(iter(sources))):
            caption += f" Published in: {source}."
        head = ["method", "problem", "measured", "± 95 %", "published", "difference", "published in"]
        return Table("published", caption, head, rows).without_empty_columns()

    def summary(self, problem: str | None = None) -> Table:
        """Everything about each method, on one problem or with a column that names it."""
        rows = [row for row in self.rows if problem in (None, row.problem)]
        groups = ordered(name for row in rows for name, mean in row.psnr_of_group.items() if mean is not None)
        groups = groups if len(groups) > 1 else []
        means = [self.mean(row.problem, row.method) for row in rows]
        columns: list[tuple[str, list[Cell]]] = [
            ("problem", [Cell("" if problem else row.problem) for row in rows]),
            (
                self.label(),
                self._column([mean for mean, _ in means], self.metric.digits, problem, self.metric.high_is_best),
            ),
            ("± 95 %", self._column([half for _, half in means], self.metric.digits)),
        ]
        if self.key != "psnr":
            columns.append(("PSNR (dB)", self._column([row.psnr for row in rows], 2, problem, True)))
        for name in groups:
            columns.append((f"PSNR, {name}", self._column([row.psnr_of_group[name] for row in rows], 2, problem, True)))
        differences = [None if row.psnr is None or row.published is None else row.psnr - row.published for row in rows]
        columns += [
            ("published", self._column([row.published for row in rows], 2)),
            ("difference", [number(value, 2, sign=True) for value in differences]),
        ]
        if self.key != "ssim":
            columns.append(("SSIM", self._column([row.ssim for row in rows], 3, problem, True)))
        columns += [
            ("s / image", [significant(row.seconds) for row in rows]),
            ("peak MiB", self._column([row.peak_memory_mib for row in rows], 0)),
            ("images", self._column([row.n_images for row in rows], 0)),
            ("failed", [number(row.n_failed, 0) if row.n_failed else Cell("") for row in rows]),
            ("tuned", [Cell(_words(row.tuned)) for row in rows]),
        ]
        table = Table(
            "summary",
            f"{self.label()} and other means over images; ± is half of the 95 % confidence interval of the mean.",
            ["method", *(name for name, _ in columns)],
            [[Cell(row.method), *(cells[i] for _, cells in columns)] for i, row in enumerate(rows)],
        )
        return table.without_empty_columns()

    def comparisons(self, problem: str | None = None) -> Table:
        """Every method against the reference, image by image."""
        unit = f" ({self.metric.unit})" if self.metric.unit else ""
        rows = []
        for place in self.problems if problem is None else [problem]:
            reference = self.reference if self.reference in self.methods_of(place) else self.best(place)
            for method in self.methods_of(place):
                if reference is None or method == reference:
                    continue
                found = paired_comparison(self.figures[place, method], self.figures[place, reference])
                if found is None:
                    continue
                digits = self.metric.digits
                clear = found.interval is not None and abs(found.difference) > found.interval
                cells = [
                    Cell(method),
                    Cell("" if problem else place),
                    Cell(reference),
                    number(found.difference, digits, sign=True),
                    number(found.interval, digits),
                    Cell("yes" if clear else "no" if found.interval is not None else NOTHING),
                    Cell(f"{found.n_higher} of {found.n_images}", found.n_higher / found.n_images),
                ]
                rows.append(cells)
        caption = (
            f"{self.metric.label} of the method minus {self.metric.label} of the reference on the same images and noise; ± is "
            "half of the paired 95 % interval. Intervals are not widened for the number of comparisons"
            + ("." if self.reference else ", and the reference is the method with the best mean, which favors it.")
        )
        head = ["method", "problem", "reference", f"difference{unit}", "± 95 %", "clear of 0", "higher on"]
        return Table("comparisons", caption, head, rows).without_empty_columns()

    def cases(self, problem: str | None = None) -> Table:
        """Best and worst image of every method."""
        rows = []
        for place, method in self.figures:
            found = extremes(self.figures[place, method])
            if found is None or problem not in (None, place):
                continue
            worst, best = found.lowest, found.highest
            if not self.metric.high_is_best:
                worst, best = best, worst
            digits = self.metric.digits
            cells = [Cell(method), Cell("" if problem else place), number(worst[1], digits), Cell(worst[0])]
            rows.append([*cells, number(found.median, digits), number(best[1], digits), Cell(best[0])])
        caption = f"{self.label()} of the worst and the best image of each method, and the median over images."
        head = ["method", "problem", "worst", "worst image", "median", "best", "best image"]
        return Table("cases", caption, head, rows).without_empty_columns()

    def tuning(self) -> Table:
        """Every combination of options that was tried."""
        chosen = {(row.problem, row.method): row.tuned for row in self.rows}
        rows = []
        for record in self.evaluation.tuning:
            place = str(record.get("problem")), str(record.get("method"))
            options = dict(record.get("options") or {})
            rows.append(
                [
                    Cell(place[1]),
                    Cell(place[0]),
                    Cell(_words(options)),
                    number(record.get("psnr"), 2, best=chosen.get(place) == options),
                    number(record.get("n_images"), 0),
                    Cell(str(record.get("failed", ""))),
                ]
            )
        caption = "Mean PSNR of every combination on the images for tuning; the chosen one is bold."
        head = ["method", "problem", "options", "PSNR (dB)", "images", "failed"]
        return Table("tuning", caption, head, rows).without_empty_columns()

    def failures(self) -> Table:
        """Every reconstruction that failed, with its message."""
        rows = [
            [Cell(str(r["method"])), Cell(str(r["problem"])), Cell(str(r["image"])), Cell(str(r["failed"]))]
            for r in self.evaluation.records
            if "failed" in r
        ]
        caption = "Reconstructions that failed; the means are those of the others."
        return Table("failures", caption, ["method", "problem", "image", "message"], rows)

    def _column(
        self, values: Sequence[float | None], digits: int, problem: str | None = None, high_is_best: bool | None = None
    ) -> list[Cell]:
        """Cells of numbers; within one problem the best is marked."""
        known = [value for value in values if value is not None]
        best: float | None = None
        if problem is not None and high_is_best is not None and len(known) > 1 and min(known) < max(known):
            best = max(known) if high_is_best else min(known)
        return [number(value, digits, best=value is not None and value == best) for value in values]


def _words(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in options.items())
