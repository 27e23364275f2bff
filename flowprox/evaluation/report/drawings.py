"""The charts of a report: what varies, what was tuned, how images differ, what quality costs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from flowprox.evaluation.report.charts import N_COLORS, Box, Line, Point, box_chart, line_chart, point_chart
from flowprox.evaluation.report.contents import Contents
from flowprox.evaluation.report.sweeps import Sweep, flattened, method_sweeps, problem_sweeps, sweeps_of
from flowprox.evaluation.report.tables import number
from flowprox.evaluation.summary import mean_per_image

__all__ = ["Chart", "cost_chart", "curves", "spread_chart", "tuning_curves"]


class Chart(NamedTuple):
    """A drawing with its words; ``svg`` is markup, everything else text."""

    svg: str
    title: str
    caption: str
    alt: str


def curves(contents: Contents, prefix: str) -> list[Chart]:
    """The figure over whatever varies: parameters of problems, a line per method; options of methods, a line per problem."""
    records = contents.evaluation.records
    of_methods = method_sweeps(records)
    swept = {
        label for sweeps in of_methods.values() for sweep in sweeps if len(sweep.points) > 2 for label in sweep.labels
    }
    charts = []
    for sweep in problem_sweeps(records):
        kept = [method for method in contents.methods if method not in swept]
        lines = [line for method in kept if (line := _problem_line(contents, sweep, method)) is not None]
        charts += _line_charts(contents, sweep, lines, f"{prefix}-p{len(charts)}", "; hollow and dotted: published")
    groups: dict[tuple[str, str], list[tuple[str, Sweep]]] = {}
    for problem, sweeps in of_methods.items():
        for sweep in sweeps:
            groups.setdefault((sweep.name, sweep.key), []).append((problem, sweep))
    for (name, key), members in groups.items():
        lines = [
            line
            for i, (problem, sweep) in enumerate(members)
            if (line := _method_line(contents, problem, sweep, _line_label(members, i))) is not None
        ]
        charts += _line_charts(contents, Sweep(name, key, ()), lines, f"{prefix}-m{len(charts)}", "")
    return charts


def tuning_curves(contents: Contents, prefix: str) -> list[Chart]:
    """Mean PSNR on the images for tuning over the value that was tried, the chosen one ringed."""
    chosen = {(row.problem, row.method): flattened(row.tuned) for row in contents.rows}
    lines: dict[tuple[str, str], list[Line]] = {}
    for method in contents.methods:
        for problem in contents.problems:
            tried = {
                str(i): record
                for i, record in enumerate(contents.evaluation.tuning)
                if record.get("problem") == problem
                and record.get("method") == method
                and record.get("psnr") is not None
            }
            found = sweeps_of({label: flattened(record["options"]) for label, record in tried.items()}, method)
            for sweep in found:
                x = [value for value, _ in sweep.points]
                y = [float(tried[label]["psnr"]) for label in sweep.labels]
                best = chosen.get((problem, method), {}).get(sweep.key)
                label = problem if len(found) == 1 else sweep.name.replace(method, problem, 1)
                lines.setdefault((method, sweep.key), []).append(Line(label, x, y, [None] * len(x), (), best))
    charts: list[Chart] = []
    for (method, key), members in lines.items():
        for start in range(0, len(members), N_COLORS):
            part = members[start : start + N_COLORS]
            title = f"{method}: tuning of {key}"
            caption = "Mean PSNR on the images for tuning; the chosen value is ringed."
            svg = line_chart(f"{prefix}-t{len(charts)}", part, key, "PSNR (dB)")
            charts.append(Chart(svg, title, caption, f"{title}. {_told(part, key)}"))
    return charts


def cost_chart(contents: Contents, problem: str, name: str) -> Chart | None:
    """Seconds per image against the figure, a point per method; None with fewer than two of them."""
    points = []
    for row in contents.rows:
        mean, half = contents.mean(row.problem, row.method)
        if row.problem == problem and mean is not None and row.seconds:
            points.append(Point(row.method, row.seconds, mean, half, contents.methods.index(row.method)))
    if len(points) < 2:
        return None
    told = "; ".join(f"{p.label} {p.y:.{contents.metric.digits}f} in {p.x:.3g} s" for p in points)
    return Chart(
        point_chart(name, points, "seconds per image", contents.label()),
        "Cost against quality",
        "Up and to the left is better. Seconds are the wall clock of a batch divided by its images.",
        f"{contents.label()} against seconds per image on {problem}: {told}.",
    )


def spread_chart(contents: Contents, problem: str, name: str) -> Chart | None:
    """The figures of the single images, a box per method; None with fewer than three images."""
    boxes = [
        Box(method, list(values), contents.methods.index(method))
        for method in contents.methods_of(problem)
        if len(values := mean_per_image(contents.figures[problem, method]).values()) > 2
    ]
    if not boxes:
        return None
    digits = contents.metric.digits
    told = "; ".join(f"{b.label} from {min(b.values):.{digits}f} to {max(b.values):.{digits}f}" for b in boxes)
    return Chart(
        box_chart(name, boxes, contents.label()),
        "Spread over images",
        "Box: the middle half of the images; line in it: the median; whiskers: the worst and the best image.",
        f"{contents.label()} of the images of {problem}: {told}.",
    )


def _problem_line(contents: Contents, sweep: Sweep, method: str) -> Line | None:
    published = contents.evaluation.published.psnr if contents.key == "psnr" else {}
    figures = [(value, published[label, method]) for value, label in sweep.points if (label, method) in published]
    places = [(value, *contents.mean(label, method)) for value, label in sweep.points]
    line = _line(method, places, figures)
    return None if line is None else line._replace(color=contents.methods.index(method))


def _method_line(contents: Contents, problem: str, sweep: Sweep, label: str) -> Line | None:
    return _line(label, [(value, *contents.mean(problem, method)) for value, method in sweep.points])


def _line(
    label: str,
    places: Sequence[tuple[float, float | None, float | None]],
    published: Sequence[tuple[float, float]] = (),
) -> Line | None:
    known = [(x, y, half) for x, y, half in places if y is not None]
    if len(known) < 2:
        return None
    x, y, half = zip(*known, strict=True)
    return Line(label, x, y, half, published)


def _line_label(members: Sequence[tuple[str, Sweep]], i: int) -> str:
    """What tells a sweep from the others of its chart: the problem, the variant of the method, or both."""
    problem, sweep = members[i]
    variant = re.sub(rf"\s*\b{re.escape(sweep.key)}=.*", "", sweep.labels[0]) or sweep.labels[0]
    problems = [other for other, _ in members]
    if len(set(problems)) == 1:
        return variant if len(problems) > 1 else problem
    return problem if len(set(problems)) == len(problems) else f"{problem}, {variant}"


def _line_charts(contents: Contents, sweep: Sweep, lines: Sequence[Line], name: str, more: str) -> list[Chart]:
    charts = []
    more = more if any(line.published for line in lines) else ""
    for start in range(0, len(lines), N_COLORS):
        part = lines[start : start + N_COLORS]
        title = f"{sweep.name}: {contents.metric.label} over {sweep.key}"
        svg = line_chart(f"{name}-{start}", part, sweep.key, contents.label())
        caption = f"Mean over images, bars: 95 % confidence{more}."
        charts.append(Chart(svg, title, caption, f"{title}. {_told(part, sweep.key, contents.metric.digits)}"))
    return charts


def _told(lines: Sequence[Line], key: str, digits: int = 2) -> str:
    """A chart in words: where each line begins and ends."""
    return " ".join(
        f"{line.label}: {number(line.y[0], digits).text} at {key} {line.x[0]:g}, "
        f"{number(line.y[-1], digits).text} at {line.x[-1]:g}."
        for line in lines
    )
