"""Charts as inline SVG, drawn by matplotlib, colored by the page; and what varies in an evaluation, for curves over it.

Ink, grid lines and the colors of series are written as custom properties (``var(--ink)``, ``var(--c0)`` ...), so that one
drawing serves a light and a dark page. Every mark has a title and names its method, so that the page can hide it.

What varies are those numbers among the parameters of a problem, or the options of a method, that are not the same everywhere.
Where two vary together the first that tells all points apart is the axis; in a grid each is, for every value of the others.
"""

from __future__ import annotations

import io
import itertools
import json
import re
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from markupsafe import escape
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from flowprox.evaluation.report.tables import TIME, Contents, number
from flowprox.records import Record

N_COLORS = 8
"""Series that are told apart in one chart; the page defines ``--c0`` to ``--c7``."""

_INK, _GRID = "#010101", "#020202"
_COLORS = [f"#03030{i}" for i in range(N_COLORS)]
_MARKERS = "osD^vPX*"
_FEWEST_RANKED = 40  # images: five in each of eight bins
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "flowprox",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
} | dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK)
_WIDTH = 4.1  # inches; at 72 points to the inch about the width of a phone, so that text keeps its size there


class Chart(NamedTuple):
    """A drawing with its words; ``svg`` is markup, everything else text."""

    svg: str
    title: str
    caption: str
    alt: str


class Series(NamedTuple):
    """Figures of a method over a number, with half widths of intervals and published figures at some places; ``method`` is what
    the page filters by."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    half: Sequence[float | None] = ()
    published: Sequence[tuple[float, float]] = ()
    chosen: float | None = None
    color: int | None = None
    method: str = ""


class _Drawing:
    """Axes whose marks name their method and have titles, as inline SVG; used within ``matplotlib.rc_context(_STYLE)``."""

    def __init__(self, height: float) -> None:
        self.figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        self.axes: Axes = self.figure.subplots()
        self._marks: list[str] = []

    def mark(self, artists: Iterable[Artist], method: str, title: str = "") -> None:
        """Say what artists show."""
        for artist in artists:
            artist.set_gid(f"mark {len(self._marks)}")
        hidden_with = f' data-method="{escape(method)}"' if method else ""
        self._marks.append(f"<g{hidden_with}>" + (f"<title>{escape(title)}</title>" if title else ""))

    def svg(self, name: str) -> str:
        """The drawing without what only a file of its own needs, ``name`` before its identifiers, its colors the page's."""
        file = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        self.figure.savefig(file, format="svg", transparent=True, metadata=nothing)
        svg = file.getvalue().partition("<svg ")[2]
        svg = re.sub(r'^[^>]*(viewBox="[^"]*")[^>]*', r"<svg \1", svg)
        svg = re.sub(r"<defs>\s*<style.*?</defs>", "", svg, flags=re.DOTALL)  # rules would be those of the whole page
        svg = re.sub(r'<g id="mark (\d+)">', lambda found: self._marks[int(found[1])], svg)
        used = set(re.findall(r'(?:href="|url\()#([\w-]+)', svg))
        svg = re.sub(r'(<\w+) id="([^"]*)"', lambda f: f[1] + (f' id="{name}-{f[2]}"' if f[2] in used else ""), svg)
        svg = re.sub(r'(?:xlink:)?(href="|url\()#', rf"\1#{name}-", svg)
        svg = svg.replace(_INK, "var(--ink)").replace(_GRID, "var(--line)")
        svg = re.sub(r"#03030(\d)", r"var(--c\1)", svg)
        return re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", svg)


@matplotlib.rc_context(_STYLE)
def line_chart(
    name: str,
    series: Sequence[Series],
    labels: tuple[str, str],
    *,
    form: str = ".2f",
    top: float | None = None,
    scale: str = "swept",
) -> str:
    """The ``svg`` of figures over a number with their intervals; published ones hollow, chosen ones ringed.

    Arguments:
        name: prefix of the identifiers in the drawing; another for every chart of a page.
        series: at most ``N_COLORS`` lines; of points any number, the colors beginning again, hollow.
        labels: of the number and of the figure.
        form: format of the figures in the titles of the marks.
        top: where the axis of the figure ends; None lets the figures say it.
        scale: of the number: "swept" has ticks at the values; "linear"; "log", where points are not connected.
    """
    connected = scale != "log"
    colors = [one.color % N_COLORS for one in series if one.color is not None]
    places = colors if not connected or len(set(colors)) == len(series) else range(len(series))
    wrapped = [textwrap.fill(one.label, 44) for one in series]
    n_columns = 2 if len(series) > 1 and max(map(len, wrapped)) <= 20 else 1
    n_lines = -(-sum(label.count("\n") + 1 for label in wrapped) // n_columns)
    drawing = _Drawing(2.8 + 0.17 * n_lines)
    axes = drawing.axes
    for one, place, label in zip(series, places, wrapped, strict=True):
        color, marker = _COLORS[place], _MARKERS[place]
        face = "none" if not connected and (one.color or 0) >= N_COLORS else color
        line = {"color": color, "linewidth": 1.4 if connected else 0}
        drawing.mark(axes.plot(one.x, one.y, **line), one.method)
        style = line | {"marker": marker, "markersize": 4 if connected else 6, "mfc": face, "elinewidth": 1}
        for i, (x, y, half) in enumerate(itertools.zip_longest(one.x, one.y, one.half)):
            bar = axes.errorbar([x], [y], half, label="" if i else _plain(label), **style)
            spread = "" if half is None else f" ± {number(half, form)}"
            drawing.mark(bar.get_children(), one.method, f"{one.label}: {number(y, form)}{spread} at {x:.4g}")
            if x == one.chosen:
                drawing.mark(axes.plot([x], [y], color=color, marker="o", ms=10, mfc="none"), one.method)
        if one.published:
            style = {"color": color, "marker": marker, "markersize": 5, "mfc": "none", "ls": ":", "linewidth": 1}
            drawing.mark(axes.plot(*zip(*one.published, strict=True), **style), one.method)
    if scale == "swept":
        _scale_x(axes, [x for one in series for x in one.x])
    elif scale == "log":
        axes.set_xscale("log")
        axes.margins(x=0.1, y=0.1)
    axes.set(xlabel=_plain(labels[0]), ylabel=_plain(labels[1]))
    if top is not None:
        axes.set_ylim(top=top)
    drawing.figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=n_columns)
    return drawing.svg(name)


@matplotlib.rc_context(_STYLE)
def box_chart(name: str, boxes: Sequence[Series], label: str, *, form: str = ".2f", right: float | None = None) -> str:
    """One row per method: extremes, quartiles and median of ``y`` over images; other arguments as ``line_chart``."""
    wrapped = [textwrap.fill(box.label, 24) for box in boxes]
    heights = [max(0.32, 0.16 * (text.count("\n") + 1)) for text in wrapped]
    places = [sum(heights[:i]) + height / 2 for i, height in enumerate(heights)]
    drawing = _Drawing(0.8 + sum(heights))
    axes = drawing.axes
    for box, place in zip(boxes, places, strict=True):
        color = _COLORS[(box.color or 0) % N_COLORS]
        line = {"color": color, "linewidth": 1.4}
        parts = axes.boxplot(
            [box.y],
            positions=[place],
            widths=0.18,
            whis=(0, 100),
            orientation="horizontal",
            patch_artist=True,
            manage_ticks=False,
            boxprops={"edgecolor": color, "linewidth": 1.4, "facecolor": to_rgba(color, 0.15)},
            whiskerprops=line,
            capprops=line,
            medianprops={"color": _INK, "linewidth": 1.6},
        )
        drawing.mark(itertools.chain(*parts.values()), box.method, f"{_range(box, form, ':')}, {len(box.y)} images")
    axes.set_yticks(places, [_plain(text) for text in wrapped])
    axes.set_ylim(sum(heights), 0)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(_plain(label))
    if right is not None:
        axes.set_xlim(right=right)
    return drawing.svg(name)


def _range(box: Series, form: str, after: str = " from") -> str:
    return f"{box.label}{after} {number(min(box.y), form)} to {number(max(box.y), form)}"


def _scale_x(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis where the values span much, with zero where it occurs; ticks at the values themselves."""
    distinct = sorted(set(values))
    positive = [value for value in distinct if value > 0]
    if len(positive) > 1 and distinct[0] >= 0 and positive[-1] / positive[0] >= 10:
        if distinct[0] > 0:
            axes.set_xscale("log")
        else:
            axes.set_xscale("symlog", linthresh=positive[0])
    if len(distinct) <= 10:
        axes.set_xticks(distinct)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _plain(text: str) -> str:
    return text.replace("$", r"\$")  # matplotlib would read formulas


# What varies ---------------------------------------------------------------------------------------------------------


class Sweep(NamedTuple):
    """Labels in the order of a number; ``name`` says what they have in common."""

    name: str
    key: str
    points: tuple[tuple[float, str], ...]

    @property
    def labels(self) -> list[str]:
        """Those that are compared, in their order."""
        return [label for _, label in self.points]


def flattened(values: Mapping[str, object], prefix: str = "") -> Record:
    """Nested keys as one level, joined by a point.

    Example:
        >>> flattened({"m": 5, "noise": {"sigma": 0.1}})
        {'m': 5, 'noise.sigma': 0.1}
    """
    flat: Record = {}
    for key, value in values.items():
        flat |= flattened(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def sweeps_of(variants: Mapping[str, Record], name: str) -> list[Sweep]:
    """The sweeps among variants of the thing of that name; only those that agree in everything but numbers are compared.

    Example:
        >>> sweeps_of({"a": {"sigma": 0.2, "noise": None}, "b": {"sigma": 0.1, "noise": None}}, "denoising")
        [Sweep(name='denoising', key='sigma', points=((0.1, 'b'), (0.2, 'a')))]
    """
    alike: dict[str, dict[str, dict[str, float]]] = defaultdict(dict)
    for label, values in variants.items():
        numbers = {k: float(v) for k, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        others = {key: value for key, value in values.items() if key not in numbers}
        alike[json.dumps([others, sorted(numbers)], sort_keys=True, default=str)][label] = numbers
    sweeps = []
    for group in alike.values():
        table = pd.DataFrame.from_dict(group, orient="index")
        varying = [key for key in table if table[key].nunique() > 1]
        telling = [key for key in varying if table[key].is_unique][:1]
        for key in telling or varying:
            others = [] if telling else [other for other in varying if other != key]
            for fixed, members in table.groupby(others, sort=False) if others else [((), table)]:
                if len(members) > 1 and members[key].is_unique:
                    constants = [f"{other} {value:g}" for other, value in zip(others, fixed, strict=True)]
                    points = sorted(zip(members[key], map(str, members.index), strict=True))
                    sweeps.append(Sweep(", ".join([name, *constants]), str(key), tuple(points)))
    return sweeps


def problem_sweeps(records: Sequence[Record]) -> list[Sweep]:
    """Problems of one name that differ in a number."""
    kinds: dict[str, dict[str, Record]] = defaultdict(dict)
    for record in records:
        if isinstance(record.get("parameters"), Mapping):
            problem = str(record["problem"])
            kinds[str(record.get("problem_name", problem))][problem] = flattened(record["parameters"])
    return [sweep for name, variants in kinds.items() for sweep in sweeps_of(variants, name)]


def method_sweeps(records: Sequence[Record]) -> dict[str, list[Sweep]]:
    """Variants of one method, with the same models, that differ in a number that was not tuned; by problem."""
    kinds: dict[tuple[str, str], dict[str, Record]] = defaultdict(dict)
    for record in records:
        method, tuned = str(record["method"]), record.get("tuned") or {}
        options = {key: value for key, value in (record.get("options") or {}).items() if key not in tuned}
        models = {key: str(record[key]) for key in ("flow", "model", "noise") if record.get(key)}
        place = str(record["problem"]), str(record.get("method_name", method))
        kinds[place][method] = flattened(options) | models
    sweeps: dict[str, list[Sweep]] = defaultdict(list)
    for (problem, name), variants in kinds.items():
        sweeps[problem] += sweeps_of(variants, name)
    return sweeps


# What an evaluation shows ---------------------------------------------------------------------------------------------


def curves(contents: Contents, prefix: str) -> list[Chart]:
    """The figure over whatever varies: parameters of problems, a line per method; options of methods, a line per problem."""
    records, published = contents.chapter.records, contents.chapter.published.psnr if contents.key == "psnr" else {}
    of_methods = method_sweeps(records)
    swept = {label for sweeps in of_methods.values() for s in sweeps if len(s.points) > 2 for label in s.labels}
    charts: list[Chart] = []
    for sweep in problem_sweeps(records):
        lines = []
        for color, method in enumerate(contents.methods):
            places = [(value, *contents.mean(label, method)) for value, label in sweep.points]
            figures = [(value, published[p, method]) for value, p in sweep.points if (p, method) in published]
            if method not in swept:
                lines += _line(method, places, published=figures, color=color, method=method)
        charts += _swept_charts(contents, sweep.name, sweep.key, lines, f"{prefix}-p{len(charts)}")
    groups: dict[tuple[str, str], list[tuple[str, Sweep]]] = defaultdict(list)
    for problem, sweeps in of_methods.items():
        for sweep in sweeps:
            groups[sweep.name, sweep.key].append((problem, sweep))
    for (name, key), members in groups.items():
        lines = []
        for (problem, sweep), label in zip(members, _labels(members), strict=True):
            lines += _line(label, [(value, *contents.mean(problem, method)) for value, method in sweep.points])
        charts += _swept_charts(contents, name, key, lines, f"{prefix}-m{len(charts)}")
    return charts


def tuning_curves(contents: Contents, prefix: str) -> list[Chart]:
    """Mean PSNR on the images for tuning over the value that was tried, the chosen one ringed."""
    chosen = {(row.problem, row.method): flattened(row.tuned) for row in contents.rows}
    tried: dict[tuple[str, str], dict[str, Record]] = defaultdict(dict)
    for i, record in enumerate(contents.chapter.tuning):
        if record.get("psnr") is not None:
            tried[str(record["method"]), str(record["problem"])][str(i)] = record
    lines: dict[tuple[str, str], list[Series]] = defaultdict(list)
    for (method, problem), records in tried.items():
        sweeps = sweeps_of({label: flattened(record["options"]) for label, record in records.items()}, method)
        for sweep in sweeps:
            places = [(value, float(records[label]["psnr"]), None) for value, label in sweep.points]
            label = problem if len(sweeps) == 1 else sweep.name.replace(method, problem, 1)
            best = chosen.get((problem, method), {}).get(sweep.key)
            lines[method, sweep.key] += _line(label, places, chosen=best, method=method)
    charts: list[Chart] = []
    caption = "Mean PSNR on the images for tuning; the chosen value is ringed."
    for (method, key), members in lines.items():
        words = f"{method}: tuning of {key}", caption
        charts += _line_charts(f"{prefix}-t{len(charts)}", members, words, (key, "PSNR (dB)"))
    return charts


def cost_chart(contents: Contents, problem: str, name: str) -> Chart | None:
    """Seconds per image against the figure, a point per method; None with fewer than two of them."""
    metric, points = contents.metric, []
    for row in contents.rows:
        mean, half = contents.mean(row.problem, row.method)
        if row.problem == problem and mean is not None and row.seconds:
            points.append(_of_method(contents, row.method, [row.seconds], [mean], [half]))
    if len(points) < 2:
        return None
    words = "; ".join(f"{p.label} {number(p.y[0], metric.form)} in {number(p.x[0], TIME)} s" for p in points)
    labels = "seconds per image", metric.title
    return Chart(
        line_chart(name, points, labels, form=metric.form, top=metric.highest, scale="log"),
        "Cost against quality",
        "Up and to the left is better. Seconds are the wall clock of a batch divided by its images.",
        f"{metric.title} against seconds per image on {problem}: {words}.",
    )


def spread_chart(contents: Contents, problem: str, name: str) -> Chart | None:
    """The figures of the single images, a box per method; None with fewer than three images."""
    figures = {method: contents.images[problem, method].tolist() for method in contents.methods_of(problem)}
    boxes = [_of_method(contents, method, (), values) for method, values in figures.items() if len(values) > 2]
    if not boxes:
        return None
    metric = contents.metric
    return Chart(
        box_chart(name, boxes, metric.title, form=metric.form, right=metric.highest),
        "Spread over images",
        "Box: the middle half of the images; line in it: the median; whiskers: the worst and the best image.",
        f"{metric.title} of the images of {problem}: {'; '.join(_range(box, metric.form) for box in boxes)}.",
    )


def calibration_charts(contents: Contents, problem: str, name: str) -> list[Chart]:
    """What the intervals of an evaluation are worth: coverage by image and by width, error over width, ranks of the truth."""
    facts: dict[str, list[Record]] = defaultdict(list)
    for record in contents.chapter.records:
        if str(record["problem"]) == problem and "calibration" in record:
            facts[str(record["method"])].append(record["calibration"])
    if not facts:
        return []
    stated = ", ".join(sorted({f"{1 - fact['alpha']:.0%}" for one in facts.values() for fact in one}))
    boxes = [_of_method(contents, method, (), [fact["coverage"] for fact in one]) for method, one in facts.items()]
    charts = [
        Chart(
            box_chart(f"{name}-image", boxes, "part of the pixels inside", form=".3f", right=1.0),
            "Coverage by image",
            f"Part of each image's pixels that their intervals hold; {stated} is asked for on average over images.",
            f"Coverage of the images of {problem}: {'; '.join(_range(box, '.3f') for box in boxes)}.",
        )
    ]
    for key, title, label, remark in (
        ("coverages", "Coverage by width", "part of the pixels inside", f"Level at {stated} would be the best."),
        ("errors", "Error over width", "mean absolute error", "Wide intervals should stand where errors are large."),
    ):
        lines = []
        for method, one in facts.items():
            x, y = (np.mean([fact[of] for fact in one], axis=0).tolist() for of in ("widths", key))
            lines.append(_of_method(contents, method, x, y))
        svg = line_chart(f"{name}-{key}", lines, ("mean half-width", label), form=".3f", scale="linear")
        caption = f"Each point is a tenth of the pixels of an image by half-width, mean over images. {remark}"
        charts.append(Chart(svg, title, caption, f"{title}, {problem}. {_told(lines, 'half-width', '.3f')}"))
    # a histogram of the truth's rank among samples, of methods that have any, with what tests say
    lines, tests = [], []
    for method, one in facts.items():
        n = max(fact.get("n_ranked", 0) for fact in one)
        ranks = np.array([fact["ranks"] for fact in one if "ranks" in fact])
        if ranks.size:
            shares = np.bincount(ranks.ravel(), minlength=n + 1)[: n + 1] * (n + 1) / ranks.size
            lines.append(_of_method(contents, method, range(n + 1), shares.tolist()))
            tests.append(f"{method}: {_tests(ranks, n, [fact['tarp'] for fact in one if 'tarp' in fact])}")
    if lines:
        svg = line_chart(f"{name}-ranks", lines, ("rank of the truth", "share, 1 is honest"), scale="linear")
        caption = (
            "How many samples lie below the truth; honest ones are level at 1. More at both ends: they are too sure. "
            f"{'; '.join(tests)}"
        )
        charts.append(Chart(svg, "Ranks of the truth", caption, f"Ranks of the truth. {_told(lines, 'rank')}"))
    return charts


def _tests(ranks: np.ndarray, n_samples: int, tarp: Sequence[float]) -> str:
    """p-values of ranks (images, directions) in each direction and of whole images; small ones reject."""
    if len(ranks) < _FEWEST_RANKED:
        return "too few images to test"
    import torch  # a report without ranks does not wait for it

    from flowprox.uncertainty import rank_p_value, uniform_p_value

    p_values = [f"{rank_p_value(torch.tensor(one), n_samples, n_bins=8):.2g}" for one in ranks.T.tolist()]
    whole = f", of whole images (TARP) {uniform_p_value(torch.tensor(tarp)):.2g}" if tarp else ""
    return f"p-values of the ranks {', '.join(p_values)}{whole}"


def _of_method(
    contents: Contents, method: str, x: Sequence[float], y: Sequence[float], half: Sequence[float | None] = ()
) -> Series:
    return Series(method, x, y, half, color=contents.methods.index(method), method=method)


def _line(label: str, places: Sequence[tuple[float, float | None, float | None]], **others: Any) -> list[Series]:
    """The line through the places whose figure is known; none through fewer than two."""
    known = [place for place in places if place[1] is not None]
    return [Series(label, *zip(*known, strict=True), **others)] if len(known) > 1 else []  # type: ignore[arg-type]


def _labels(members: Sequence[tuple[str, Sweep]]) -> list[str]:
    """What tells each sweep from the others of its chart: the problem, the variant of the method, or both."""
    problems = [problem for problem, _ in members]
    variants = [re.sub(rf"\s*\b{re.escape(s.key)}=.*", "", s.labels[0]) or s.labels[0] for _, s in members]
    if len(set(problems)) == len(problems):
        return problems
    if len(set(problems)) == 1:
        return variants
    return [f"{problem}, {variant}" for problem, variant in zip(problems, variants, strict=True)]


def _swept_charts(contents: Contents, what: str, key: str, lines: Sequence[Series], name: str) -> list[Chart]:
    metric = contents.metric
    more = "; hollow and dotted: published" if any(line.published for line in lines) else ""
    words = f"{what}: {metric.label} over {key}", f"Mean over images, bars: 95 % confidence{more}."
    return _line_charts(name, lines, words, (key, metric.title), metric.form, metric.highest)


def _line_charts(
    name: str,
    lines: Sequence[Series],
    words: tuple[str, str],
    labels: tuple[str, str],
    form: str = ".2f",
    top: float | None = None,
) -> list[Chart]:
    """As many charts as there must be for every line to have a color; ``words`` are title and caption."""
    charts = []
    for start in range(0, len(lines), N_COLORS):
        part = lines[start : start + N_COLORS]
        svg = line_chart(f"{name}-{start}", part, labels, form=form, top=top)
        charts.append(Chart(svg, *words, f"{words[0]}. {_told(part, labels[0], form)}"))
    return charts


def _told(lines: Sequence[Series], key: str, form: str = ".2f") -> str:
    """A chart in words: where each line begins and ends."""
    return " ".join(
        f"{line.label}: {number(line.y[0], form)} at {key} {line.x[0]:g}, {number(line.y[-1], form)} at {line.x[-1]:g}."
        for line in lines
    )
