"""The tables of a report, each from the records of one chapter, and how they are written: page, Markdown, CSV, LaTeX."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import pandas as pd

from flowprox.evaluation.report.sources import Chapter, ordered
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
    columns: Mapping[str, Sequence[object]],
    forms: Mapping[str, str | Sequence[str]] | None = None,
    best: Mapping[str, Sequence[bool]] | None = None,
) -> Table:
    """A table without the columns that have nothing in them.

    ``columns`` are head -> values (None is unknown), ``forms`` head of a column of numbers -> their format as for
    ``number``, or the texts of all its cells, ``best`` head -> which cells are the best.
    """
    forms, best = forms or {}, best or {}
    values = pd.DataFrame(dict(columns))
    for name in forms:
        values[name] = pd.to_numeric(values[name])
    first = values.columns[:1]
    values = values[[*first, *(c for c in values.columns[1:] if (values[c].notna() & (values[c] != "")).any())]]
    text = pd.DataFrame(index=values.index)
    for name, column in values.items():
        form = forms.get(str(name))
        if form is None:
            text[name] = ["" if value is None else str(value) for value in column.astype(object)]
        else:
            text[name] = [number(v, form) for v in column] if isinstance(form, str) else list(form)
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


_TEX = str.maketrans(
    {
        **{character: "\\" + character for character in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "±": r"$\pm$",
        "×": r"$\times$",
        MINUS: "$-$",
        NOTHING: "--",
    }
)


def _tex(text: object) -> str:
    return " ".join(str(text).split()).translate(_TEX)


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
        return (max if self.metric.high_is_best else min)(known, key=known.__getitem__) if known else None

    # Tables -----------------------------------------------------------------------------------------------------------

    def overview(self) -> Table:
        """Methods down, problems across."""
        columns: dict[str, Sequence[object]] = {"method": self.methods}
        texts, best = {}, {}
        for problem in self.problems:
            means = [self.mean(problem, method) for method in self.methods]
            columns[problem] = [mean for mean, _ in means]
            texts[problem] = [
                number(mean, self.metric.form) + (f" ± {number(half, self.metric.form)}" if half is not None else "")
                if (problem, method) in self.images
                else ""
                for method, (mean, half) in zip(self.methods, means, strict=True)
            ]
            best[problem] = [len(self.methods) > 1 and method == self.best(problem) for method in self.methods]
        caption = f"{self.metric.title}, mean over images ± 95 % confidence; the best mean of each problem is bold."
        return make_table("overview", caption, columns, texts, best)

    def beside_published(self) -> Table:
        """Every published figure, also of methods that were not run here."""
        published = self.chapter.published
        measured = {(row.problem, row.method): row for row in self.rows}
        places = [place for place in published.psnr if place[0] in self.problems]
        sources = [published.sources.get(problem, "") for problem, _ in places]
        rows = [measured.get(place) for place in places]
        psnr = [row.psnr if row else None for row in rows]
        figures = [published.psnr[place] for place in places]
        columns = {
            "method": [m if place in measured else f"{m} (not run here)" for place in places for m in place[1:]],
            "problem": [problem for problem, _ in places],
            "measured": psnr,
            "± 95 %": [row.psnr_interval if row else None for row in rows],
            "published": figures,
            "difference": [None if p is None else p - figure for p, figure in zip(psnr, figures, strict=True)],
            "published in": sources if len(set(sources)) > 1 else [""] * len(places),
        }
        caption = (
            "PSNR in dB measured here beside the published figure; the interval is that of the measured mean alone."
        )
        if len(set(sources)) == 1 and sources[0]:
            caption += f" Published in: {sources[0]}."
        forms = dict.fromkeys(("measured", "± 95 %", "published"), ".2f") | {"difference": "+.2f"}
        return make_table("published", caption, columns, forms)

    def summary(self, problem: str | None = None) -> Table:
        """Everything about each method, on one problem or with a column that names it."""
        rows = [row for row in self.rows if problem in (None, row.problem)]
        means = [self.mean(row.problem, row.method) for row in rows]
        metric = self.metric.title
        columns: dict[str, Sequence[object]] = {
            "method": [row.method for row in rows],
            "problem": ["" if problem else row.problem for row in rows],
            metric: [mean for mean, _ in means],
            "± 95 %": [half for _, half in means],
        }
        if self.key != "psnr":
            columns["PSNR (dB)"] = [row.psnr for row in rows]
        groups = ordered(name for row in rows for name, mean in row.psnr_of_group.items() if mean is not None)
        for name in groups if len(groups) > 1 else ():
            columns[f"PSNR, {name}"] = [row.psnr_of_group[name] for row in rows]
        compared = {name: self.metric.high_is_best if name == metric else True for name in [*columns][2:]}
        columns["published"] = [row.published for row in rows]
        columns["difference"] = [None if None in (r.psnr, r.published) else r.psnr - r.published for r in rows]  # type: ignore[operator]
        if self.key != "ssim":
            columns["SSIM"] = [row.ssim for row in rows]
            compared["SSIM"] = True
        columns |= {
            "s / image": [row.seconds for row in rows],
            "peak MiB": [row.peak_memory_mib for row in rows],
            "images": [row.n_images for row in rows],
            "failed": pd.array([row.n_failed or None for row in rows], dtype="Int64"),  # type: ignore[dict-item]
            "tuned": [_words(row.tuned) for row in rows],
        }
        forms = dict.fromkeys([*columns][2:-2], ".2f") | {metric: self.metric.form, "± 95 %": self.metric.form}
        forms |= {"SSIM": ".3f"} if self.key != "ssim" else {}
        forms |= {"s / image": TIME, "peak MiB": ".0f", "images": ".0f", "difference": "+.2f"}
        caption = f"{metric} and other means over images; ± is half of the 95 % confidence interval of the mean."
        best = {} if problem is None else {n: _best(columns[n], high) for n, high in compared.items() if n != "± 95 %"}
        counts = [row.failures for row in rows]
        return make_table("summary", caption, columns, forms | {"failed": counts}, best)

    def comparisons(self, problem: str | None = None) -> Table:
        """Every method against the reference, image by image."""
        lines: list[tuple[object, ...]] = []
        for place in self.problems if problem is None else [problem]:
            chosen = self.reference is not None and len(self.images.get((place, self.reference), ())) > 0
            reference = self.reference if chosen else self.best(place)
            if reference is None:
                continue
            figures = self.figures[self.figures["problem"] == place]
            compared = paired_comparisons(figures, self.key, reference)
            for method, n_images, difference, half, n_higher in compared.itertuples():
                clear = NOTHING if math.isnan(half) else "yes" if abs(difference) > half else "no"
                share = n_higher / n_images, f"{n_higher} of {n_images}"
                lines.append((method, "" if problem else place, reference, difference, half, clear, *share))
        unit = f" ({self.metric.unit})" if self.metric.unit else ""
        head = ["method", "problem", "reference", f"difference{unit}", "± 95 %", "clear of 0", "higher on"]
        *columns, words = [[line[i] for line in lines] for i in range(len(head) + 1)]
        caption = (
            f"{self.metric.label} of the method minus {self.metric.label} of the reference on the same images and noise; ± is "
            "half of the paired 95 % interval. Intervals are not widened for the number of comparisons"
            + ("." if self.reference else ", and the reference is the method with the best mean, which favors it.")
        )
        forms = {head[3]: f"+{self.metric.form}", "± 95 %": self.metric.form, "higher on": words}
        return make_table("comparisons", caption, dict(zip(head, columns, strict=True)), forms)

    def cases(self, problem: str | None = None) -> Table:
        """Best and worst image of every method."""
        lines: list[tuple[object, ...]] = []
        for (place, method), values in self.images.items():
            if len(values) and problem in (None, place):
                ends = [values.idxmin(), values.idxmax()]
                worst, best = map(str, ends if self.metric.high_is_best else ends[::-1])
                figures = values[worst], worst, values.median(), values[best], best
                lines.append((method, "" if problem else place, *figures))
        head = ["method", "problem", "worst", "worst image", "median", "best", "best image"]
        columns = {name: [line[i] for line in lines] for i, name in enumerate(head)}
        caption = f"{self.metric.title} of the worst and the best image of each method, and the median over images."
        return make_table("cases", caption, columns, dict.fromkeys(("worst", "median", "best"), self.metric.form))

    def tuning(self) -> Table:
        """Every combination of options that was tried."""
        chosen = {(row.problem, row.method): row.tuned for row in self.rows}
        tried = self.chapter.tuning
        columns = {
            "method": [str(record.get("method")) for record in tried],
            "problem": [str(record.get("problem")) for record in tried],
            "options": [_words(record.get("options") or {}) for record in tried],
            "PSNR (dB)": [record.get("psnr") for record in tried],
            "images": [record.get("n_images") for record in tried],
            "failed": [str(record.get("failed", "")) for record in tried],
        }
        best = [
            chosen.get((str(r.get("problem")), str(r.get("method")))) == (r.get("options") or {}) and "failed" not in r
            for r in tried
        ]
        caption = "Mean PSNR of every combination on the images for tuning; the chosen one is bold."
        return make_table("tuning", caption, columns, {"PSNR (dB)": ".2f", "images": ".0f"}, {"PSNR (dB)": best})

    def failures(self) -> Table:
        """Every reconstruction that failed, with its message."""
        failed = [record for record in self.chapter.records if "failed" in record]
        heads = {"method": "method", "problem": "problem", "image": "image", "message": "failed"}
        columns = {head: [str(record[key]) for record in failed] for head, key in heads.items()}
        return make_table("failures", "Reconstructions that failed; the means are those of the others.", columns)


def _best(values: Sequence[object], high_is_best: bool) -> list[bool]:
    known = [value for value in values if isinstance(value, int | float)]
    if len(known) < 2 or min(known) == max(known):
        return [False] * len(values)
    best = max(known) if high_is_best else min(known)
    return [value == best for value in values]


def _words(options: Mapping[str, object]) -> str:
    return ", ".join(f"{key} {value}" for key, value in options.items())
