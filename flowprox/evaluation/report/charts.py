"""Charts as inline SVG, drawn by matplotlib, colored by the page.

Ink, grid lines and the colors of series are written as custom properties (``var(--ink)``, ``var(--line)``, ``var(--c0)``
...), so that one drawing serves a light and a dark page. Text stays text. Series differ in marker and color.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any, NamedTuple
from xml.etree import ElementTree

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

__all__ = ["N_COLORS", "Box", "Line", "Point", "box_chart", "line_chart", "point_chart"]

N_COLORS = 8
"""Series that are told apart in one chart; the page defines ``--c0`` to ``--c7``."""

_INK, _GRID = "#010101", "#020202"
_COLORS = [f"#03030{i}" for i in range(N_COLORS)]
_MARKERS = "osD^vPX*"
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "flowprox",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}
_WIDTH = 4.1  # inches; at 72 points to the inch about the width of a phone, so that text keeps its size there


class Line(NamedTuple):
    """A method over a number; ``half`` holds half widths of intervals, ``published`` figures at some places.

    Lines of one chart whose ``color`` is the same, or unknown, are colored in their order.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    half: Sequence[float | None]
    published: Sequence[tuple[float, float]] = ()
    chosen: float | None = None
    color: int | None = None


class Point(NamedTuple):
    """A method's cost and quality."""

    label: str
    x: float
    y: float
    half: float | None
    color: int


class Box(NamedTuple):
    """The figures of a method, one per image."""

    label: str
    values: Sequence[float]
    color: int


def line_chart(name: str, lines: Sequence[Line], x_label: str, y_label: str) -> str:
    """Figures over a number with their intervals; published ones hollow, chosen ones ringed.

    Arguments:
        name: prefix of the identifiers in the drawing; another for every chart of a page.
        lines: at most ``N_COLORS``.
        x_label: of the number.
        y_label: of the figure.

    Returns:
        the ``svg`` element.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 2.9 + _height([line.label for line in lines])), layout="constrained")
        axes = figure.subplots()
        given = [line.color % N_COLORS for line in lines if line.color is not None]
        places = given if len(set(given)) == len(lines) else range(len(lines))
        for line, place in zip(lines, places, strict=True):
            color, marker = _COLORS[place], _MARKERS[place]
            half = [h or 0.0 for h in line.half]
            axes.errorbar(
                line.x,
                line.y,
                half,
                color=color,
                marker=marker,
                markersize=4,
                linewidth=1.4,
                elinewidth=1,
                label=_shortened(line.label, 44),
            )
            if line.published:
                x, y = zip(*line.published, strict=True)
                axes.plot(
                    x, y, color=color, marker=marker, markersize=5, markerfacecolor="none", linestyle=":", linewidth=1
                )
            for x, y in zip(line.x, line.y, strict=True):
                if x == line.chosen:
                    axes.plot([x], [y], color=color, marker="o", markersize=10, markerfacecolor="none")
        _scale_x(axes, [x for line in lines for x in line.x])
        axes.set(xlabel=x_label, ylabel=y_label)
        _legend(figure, axes)
        return _inline(figure, name)


def point_chart(name: str, points: Sequence[Point], x_label: str, y_label: str) -> str:
    """Cost to the right on a logarithmic axis, quality upwards; arguments as ``line_chart``."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 2.7 + _height([point.label for point in points])), layout="constrained")
        axes = figure.subplots()
        for point in points:
            color, marker = _COLORS[point.color % N_COLORS], _MARKERS[point.color % N_COLORS]
            axes.errorbar(
                [point.x],
                [point.y],
                [point.half or 0.0],
                color=color,
                marker=marker,
                markersize=6,
                markerfacecolor=color if point.color < N_COLORS else "none",  # the colors begin again, hollow
                linestyle="",
                elinewidth=1,
                label=_shortened(point.label, 44),
            )
        axes.set_xscale("log")
        axes.margins(x=0.1, y=0.1)
        axes.set(xlabel=x_label, ylabel=y_label)
        _legend(figure, axes)
        return _inline(figure, name)


def box_chart(name: str, boxes: Sequence[Box], x_label: str) -> str:
    """One row per method: extremes, quartiles and median over images; arguments as ``line_chart``."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 0.8 + 0.32 * len(boxes)), layout="constrained")
        axes = figure.subplots()
        for row, box in enumerate(boxes):
            color = _COLORS[box.color % N_COLORS]
            line = {"color": color, "linewidth": 1.4}
            axes.boxplot(
                [box.values],
                positions=[row],
                orientation="horizontal",
                whis=(0, 100),
                widths=0.5,
                boxprops=line,
                whiskerprops=line,
                capprops=line,
                medianprops={"color": _INK, "linewidth": 1.6},
                manage_ticks=False,
            )
        axes.set_yticks(range(len(boxes)), [_shortened(box.label) for box in boxes])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(x_label)
        return _inline(figure, name)


def _scale_x(axes: Any, values: Sequence[float]) -> None:
    """A logarithmic axis where the values span much, with zero where it occurs; ticks at the values themselves."""
    distinct = sorted(set(values))
    positive = [value for value in distinct if value > 0]
    if len(positive) > 1 and distinct[0] >= 0 and positive[-1] / positive[0] >= 10:
        axes.set_xscale(
            "log" if distinct[0] > 0 else "symlog", **({} if distinct[0] > 0 else {"linthresh": positive[0]})
        )
    if len(distinct) <= 10:
        axes.set_xticks(distinct)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _n_columns(labels: Sequence[str]) -> int:
    """Of the legend: two where every label takes less than half of the width."""
    return 2 if len(labels) > 1 and max(map(len, labels)) <= 20 else 1


def _height(labels: Sequence[str]) -> float:
    """Of the legend, in inches."""
    return 0.17 * -(-len(labels) // _n_columns(labels))


def _legend(figure: Figure, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=_n_columns(labels))


def _shortened(label: str, n: int = 24) -> str:
    return (label if len(label) <= n else label[: n - 1] + "…").replace("$", r"\$")


# SVG for a page ------------------------------------------------------------------------------------------------------


def _inline(figure: Figure, name: str) -> str:
    """The drawing without what only a file of its own needs, its identifiers made unique, its colors the page's."""
    file = io.BytesIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    root = ElementTree.fromstring(file.getvalue())
    used = set(re.findall(r"#([\w-]+)", " ".join(v for e in root.iter() for k, v in e.attrib.items() if _refers(k, v))))
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for key, value in list(element.attrib.items()):
            del element.attrib[key]
            plain = key.rpartition("}")[2]
            if plain == "id" and value not in used:
                continue
            if plain == "id":
                value = f"{name}-{value}"
            elif _refers(key, value):
                value = re.sub(r"#([\w-]+)", rf"#{name}-\1", value)
            elif plain == "style":
                value = _colored(value)
            element.set(plain, value)
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    for definitions in root.findall("defs"):  # rules for every element, which would be those of the whole page
        for rules in definitions.findall("style"):
            definitions.remove(rules)
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=True)


def _refers(key: str, value: str) -> bool:
    return key.rpartition("}")[2] == "href" or "url(#" in value


def _colored(style: str) -> str:
    style = style.replace(_INK, "var(--ink)").replace(_GRID, "var(--line)")
    style = re.sub(r"#03030(\d)", r"var(--c\1)", style)
    return re.sub(r"'DejaVu Sans'[^;]*", "system-ui, sans-serif", style)
