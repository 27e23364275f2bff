"""The tables of a report, each from the records of one chapter, and how they are written: page, Markdown, CSV, LaTeX."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import pandas as pd

from flowprox.evaluation.report.sources import Chapter, ordered
from flowprox.records import Record
from flowprox.summary import METRICS, Metric, Row, confidence, figures_of, paired_comparisons, per_image, summary_rows

MINUS, NOTHING = "−", "–"
TIME = "time"
"""Format of a column of seconds."""


def number(value: float | None, form: str = ".2f") -> str:
    """A number as it is read: by a format, or as a time to three significant digits.

    Example:
        >>> number(-1.234), number(1.234, "+.2f"), number(None), number(5.0494, TIME), number(0.00012, TIME)
        ('−1.23', '+1.23', '–', '5.05', '< 0.01')
    """
    if value is None or math.isnan(value):
        return NOTHING
    if form != TIME:
        return f"{value:{form}}".replace("-", MINUS)
    if 0 < value < 0.01:
        return "< 0.01"
    rounded = float(f"{value:.3g}")
    return f"{rounded:.{min(max(2 - math.floor(math.log10(rounded)), 0), 3) if rounded else 0}f}"


class Table(NamedTuple):
    """A data frame whose first column names the row: ``values`` with every digit, ``text`` what is read, ``best`` which
    cells are the best of their column; ``slug`` is the name of its files, ``caption`` one sentence."""

    slug: str
    caption: str
    values: pd.DataFrame
    text: pd.DataFrame
    best: pd.DataFrame

    def is_text(self, column: str) -> bool:
        """Whether a column holds words, not numbers."""
        return not pd.api.types.is_numeric_dtype(self.values[column])

    def lines(self) -> list[list[tuple[str, float | None, bool]]]:
        """The rows, each cell as (text, value or None, whether it is the best)."""
        parts = [frame.to_numpy(dtype=object).tolist() for frame in (self.text, self.values, self.best)]
        known = [[v if isinstance(v, int | float) and v == v else None for v in line] for line in parts[1]]
        return [list(zip(*line, strict=True)) for line in zip(parts[0], known, parts[2], strict=True)]


def make_table(
    slug: str,
    caption: str,
    content: pd.DataFrame | Mapping[str, Sequence[object]] | Sequence[Record],
    forms: Mapping[str, str | Sequence[str]] | None = None,
    best: Mapping[str, Sequence[bool]] | None = None,
) -> Table:
    """A table without the columns that have nothing in them.

    ``content`` is a data frame or what makes one, whose unknown values are None; ``forms`` head of a column of numbers -> their
    format as for ``number``, or the texts of all its cells; ``best`` head -> which cells are the best.
    """
    forms, best = forms or {}, best or {}
    values = pd.DataFrame(content)
    for name in values.columns.intersection([*forms]):
        values[name] = pd.to_numeric(values[name])
    is_shown = [i == 0 or (values[c].notna() & (values[c] != "")).any() for i, c in enumerate(values)]
    values = values.loc[:, is_shown]
    text = pd.DataFrame(index=values.index)
    for name, column in values.items():
        form = forms.get(str(name), "")
        known = [number(v, form) for v in column] if isinstance(form, str) and form else list(form)
        text[name] = known if form else ["" if v is None else str(v) for v in column.astype(object)]
    marks = pd.DataFrame({name: best.get(str(name), [False] * len(values)) for name in values}, index=values.index)
    return Table(slug, caption, values, text, marks)


def to_markdown(table: Table) -> str:
    """The table in Markdown, best figures bold.

    Example:
        >>> print(to_markdown(make_table("t", "A table.", {"method": ["tv"], "PSNR": [1.0]}, {"PSNR": ".2f"})), end="")
        | method | PSNR |
        |---|--:|
        | tv | 1.00 |
    """

    def escaped(text: object) -> str:
        return " ".join(re.sub(r"([\\`*_|<>\[\]])", r"\\\1", str(text)).split())

    lines = [[escaped(name) for name in table.text]]
    lines += [[f"**{escaped(t)}**" if best else escaped(t) for t, _, best in line] for line in table.lines()]
    head, *rows = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([head, f"|---|{'--:|' * (len(table.text.columns) - 1)}", *rows]) + "\n"


def to_csv(table: Table) -> str:
    """The table as comma-separated values, numbers with every digit, unknown ones empty.

    Words that a spreadsheet would take for a formula get an apostrophe in front.
    """

    def plain(value: object) -> object:
        return f"'{value}" if isinstance(value, str) and re.match(r"[=+\-@\t\r]", value) else value

    words = table.values.map(plain).rename(columns=plain)
    return words.to_csv(index=False, lineterminator="\n")


def to_latex(table: Table) -> str:
    """The table as a LaTeX ``tabular`` with the rules of the package booktabs, best figures bold."""
    text = table.text.map(_tex)
    text = text.mask(table.best, r"\textbf{" + text + "}").rename(columns=_tex)
    columns = "l" + "r" * (len(text.columns) - 1)
    return f"% {' '.join(table.caption.split())}\n" + text.to_latex(index=False, column_format=columns, escape=False)


_TEX: dict[str, str] = {character: "\\" + character for character in "&%$#_{}"} | {"±": r"$\pm$", "×": r"$\times$"}
_TEX |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_TEX |= {"<": r"\textless{}", ">": r"\textgreater{}", MINUS: "$-$", NOTHING: "--"}


def _tex(text: object) -> str:
    return " ".join(str(text).split()).translate(str.maketrans(_TEX))


class Contents:
    """A chapter seen through one figure of its records, whose ``key`` is in ``METRICS``; ``reference`` is the method that the
    others are compared with, None the best of each problem."""

    def __init__(self, chapter: Chapter, key: str = "psnr", reference: str | None = None) -> None:
        self.chapter, self.key, self.reference = chapter, key, reference
        self.metric: Metric = METRICS[key]
        self.problems = ordered(str(record["problem"]) for record in chapter.records)
        self.methods = ordered(str(record["method"]) for record in chapter.records)

    @cached_property
    def rows(self) -> list[Row]:
        """A row per problem and method, whatever the figure."""
        return summary_rows(self.chapter.records, self.chapter.published.psnr)

    @cached_property
    def figures(self) -> pd.DataFrame:
        """Every measurement, a line each."""
        return figures_of(self.chapter.records)

    @cached_property
    def images(self) -> dict[tuple[str, str], pd.Series]:
        """The figure by image, of each problem and method in the order of the records; methods without any included."""
        images = per_image(self.figures)[self.key]
        return {place: values.droplevel([0, 1]).dropna() for place, values in images.groupby(level=[0, 1], sort=False)}  # type: ignore[misc]

    @cached_property
    def _means(self) -> dict[tuple[str, str], tuple[float, float | None]]:
        return {place: confidence(values) for place, values in self.images.items() if len(values)}

    def mean(self, problem: str, method: str) -> tuple[float | None, float | None]:
        """Mean over images and half of its interval."""
        return self._means.get((problem, method), (None, None))

    def methods_of(self, problem: str) -> list[str]:
        """The methods that were run on a problem."""
        return [method for of, method in self.images if of == problem]

    def best(self, problem: str) -> str | None:
        """The method with the best mean."""
        known = {method: mean for (of, method), (mean, _) in self._means.items() if of == problem}
        return self.metric.best(known, key=known.__getitem__) if known else None

    def ends(self, problem: str, method: str) -> tuple[str, str]:
        """The images with the worst and the best figure of a method that has any."""
        values = self.images[problem, method]
        lowest, highest = str(values.idxmin()), str(values.idxmax())
        return (lowest, highest) if self.metric.high_is_best else (highest, lowest)

    # Tables -----------------------------------------------------------------------------------------------------------

    def overview(self) -> Table:
        """Methods down, problems across."""
        form, columns = self.metric.form, {"method": self.methods}
        texts, best = {}, {}
        for problem in self.problems:
            means = [self.mean(problem, method) for method in self.methods]
            columns[problem] = [mean for mean, _ in means]  # type: ignore[misc]
            spreads = ["" if half is None else f" ± {number(half, form)}" for _, half in means]
            texts[problem] = [
                f"{number(mean, form)}{spread}" if (problem, method) in self.images else ""
                for method, (mean, _), spread in zip(self.methods, means, spreads, strict=True)
            ]
            best[problem] = [len(self.methods) > 1 and method == self.best(problem) for method in self.methods]
        caption = f"{self.metric.title}, mean over images ± 95 % confidence; the best mean of each problem is bold."
        return make_table("overview", caption, columns, texts, best)

    def beside_published(self) -> Table:
        """Every published figure, also of methods that were not run here."""
        published = self.chapter.published
        measured = {(row.problem, row.method): row for row in self.rows}
        lines = []
        for (problem, method), figure in published.psnr.items():
            if problem in self.problems:
                row = measured.get((problem, method))
                line = {
                    "method": method if row else f"{method} (not run here)",
                    "problem": problem,
                    "measured": row and row.psnr,
                    "± 95 %": row and row.psnr_interval,
                    "published": figure,
                    "difference": None if row is None or row.psnr is None else row.psnr - figure,
                    "published in": published.sources.get(problem, ""),
                }
                lines.append(line)
        caption = (
            "PSNR in dB measured here beside the published figure; the interval is that of the measured mean alone."
        )
        sources = {line["published in"] for line in lines}
        if len(sources) == 1:
            caption += "".join(f" Published in: {source}." for source in sources if source)
            lines = [line | {"published in": ""} for line in lines]
        forms = dict.fromkeys(("measured", "± 95 %", "published"), ".2f") | {"difference": "+.2f"}
        return make_table("published", caption, lines, forms)

    def summary(self, problem: str | None = None) -> Table:
        """Everything about each method, on one problem or with a column that names it."""
        rows = [row for row in self.rows if problem in (None, row.problem)]
        metric, lines = self.metric.title, []
        groups = ordered(name for row in rows for name, mean in row.psnr_of_group.items() if mean is not None)
        compared = [metric, "PSNR (dB)", "SSIM"]
        for row in rows:
            mean, half = self.mean(row.problem, row.method)
            line = {
                "method": row.method,
                "problem": "" if problem else row.problem,
                metric: mean,
                "± 95 %": half,
                "PSNR (dB)": row.psnr,
                **({f"PSNR, {name}": row.psnr_of_group[name] for name in groups} if len(groups) > 1 else {}),
                "published": row.published,
                "difference": None if row.psnr is None or row.published is None else row.psnr - row.published,
                "SSIM": row.ssim,
                "s / image": row.seconds,
                "peak MiB": row.peak_memory_mib,
                "images": row.n_images,
                "failed": row.n_failed or None,
                "tuned": _words(row.tuned),
            }
            lines.append(line)
        values = pd.DataFrame(lines).astype({"failed": "Int64"} if lines else {})
        forms: dict[str, str | Sequence[str]] = dict.fromkeys([*values][2:-2], ".2f")
        forms |= {"SSIM": ".3f", "s / image": TIME, "peak MiB": ".0f", "images": ".0f", "difference": "+.2f"}
        forms |= {metric: self.metric.form, "± 95 %": self.metric.form, "failed": [row.failures for row in rows]}
        caption = f"{metric} and other means over images; ± is half of the 95 % confidence interval of the mean."
        compared += [name for name in values if name.startswith("PSNR, ")]
        high = {name: self.metric.high_is_best if name == metric else True for name in compared}
        best = {} if problem is None else {name: _best(values[name], is_best) for name, is_best in high.items()}
        return make_table("summary", caption, values, forms, best)

    def comparisons(self, problem: str | None = None) -> Table:
        """Every method against the reference, image by image."""
        label, form = self.metric.label, self.metric.form
        head = f"difference ({self.metric.unit})" if self.metric.unit else "difference"
        lines, shares = [], []
        for place in self.problems if problem is None else [problem]:
            chosen = self.reference is not None and len(self.images.get((place, self.reference), ())) > 0
            reference = self.reference if chosen else self.best(place)
            if reference is None:
                continue
            figures = self.figures[self.figures["problem"] == place]
            for method, n, difference, half, n_higher in paired_comparisons(figures, self.key, reference).itertuples():
                line = {
                    "method": method,
                    "problem": "" if problem else place,
                    "reference": reference,
                    head: difference,
                    "± 95 %": half,
                    "clear of 0": NOTHING if math.isnan(half) else "yes" if abs(difference) > half else "no",
                    "higher on": n_higher / n,
                }
                lines.append(line)
                shares.append(f"{n_higher} of {n}")
        caption = (
            f"{label} of the method minus {label} of the reference on the same images and noise; ± is "
            "half of the paired 95 % interval. Intervals are not widened for the number of comparisons"
            + ("." if self.reference else ", and the reference is the method with the best mean, which favors it.")
        )
        return make_table("comparisons", caption, lines, {head: f"+{form}", "± 95 %": form, "higher on": shares})

    def cases(self, problem: str | None = None) -> Table:
        """Best and worst image of every method."""
        lines = []
        for (place, method), values in self.images.items():
            if len(values) and problem in (None, place):
                worst, best = self.ends(place, method)
                line = {"method": method, "problem": "" if problem else place, "worst": values[worst]}
                line |= {"worst image": worst, "median": values.median(), "best": values[best], "best image": best}
                lines.append(line)
        caption = f"{self.metric.title} of the worst and the best image of each method, and the median over images."
        return make_table("cases", caption, lines, dict.fromkeys(("worst", "median", "best"), self.metric.form))

    def tuning(self) -> Table:
        """Every combination of options that was tried."""
        chosen = {(row.problem, row.method): row.tuned for row in self.rows}
        lines, best = [], []
        for record in self.chapter.tuning:
            line = {key: str(record.get(key)) for key in ("method", "problem")}
            options = record.get("options") or {}
            best.append(chosen.get((line["problem"], line["method"])) == options and "failed" not in record)
            line |= {"options": _words(options), "PSNR (dB)": record.get("psnr"), "images": record.get("n_images")}
            lines.append(line | {"failed": str(record.get("failed", ""))})
        caption = "Mean PSNR of every combination on the images for tuning; the chosen one is bold."
        return make_table("tuning", caption, lines, {"PSNR (dB)": ".2f", "images": ".0f"}, {"PSNR (dB)": best})

    def failures(self) -> Table:
        """Every reconstruction that failed, with its message."""
        failed = self.figures.dropna(subset="failed")[["method", "problem", "image", "failed"]].astype(str)
        lines = failed.rename(columns={"failed": "message"}).reset_index(drop=True)
        return make_table("failures", "Reconstructions that failed; the means are those of the others.", lines)


def _best(values: pd.Series, high_is_best: bool) -> list[bool]:
    best = values.max() if high_is_best else values.min()
    return ((values == best) & (values.nunique() > 1)).tolist()


def _words(options: Mapping[str, object]) -> str:
    return ", ".join(f"{key} {value}" for key, value in options.items())
