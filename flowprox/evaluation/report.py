"""Turns records and pictures into one HTML file and PNG figures. No model is run, nothing is loaded from the network.

A results folder holds ``records.jsonl``, one line per reconstruction with the keys problem, method, image, psnr (dB),
ssim, seconds (optional: group, a kind of image; seed, version), and ``images/`` with the pictures under the names that
``picture_path`` gives. The method named "measurement" is the degraded input itself.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from flowprox.checkpoints import atomic_write
from flowprox.evaluation.records import read_records

__all__ = ["MEASUREMENT", "Summary", "picture_path", "summarise", "truth_path", "write_figures", "write_report"]

MEASUREMENT = "measurement"
"""Name of the method that returns the degraded input."""

_REQUIRED = ("problem", "method", "image")


def picture_path(folder: Path, problem: str, image: str, method: str) -> Path:
    """Where the reconstruction of an image by a method stands; any text is safe in a name."""
    return folder / "images" / f"{'--'.join(quote(part, safe='') for part in (problem, image, method))}.png"


def truth_path(folder: Path, image: str) -> Path:
    """Where the true image stands."""
    return folder / "images" / f"{quote(image, safe='')}.png"


class Summary(NamedTuple):
    """Means of one method on one problem; None where no record has the number."""

    problem: str
    method: str
    n_images: int
    psnr: float | None
    ssim: float | None
    seconds: float | None
    psnr_of_group: dict[str, float | None]


def summarise(records: Sequence[Mapping[str, Any]]) -> list[Summary]:
    """Means per problem and method, in the order in which they first occur.

    Raises:
        ValueError: a record lacks problem, method or image.
    """
    rows: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for number, record in enumerate(records, start=1):
        missing = [key for key in _REQUIRED if key not in record]
        if missing:
            raise ValueError(
                f"record {number} lacks {', '.join(missing)}; make the records with the demo or a benchmark"
            )
        rows.setdefault((str(record["problem"]), str(record["method"])), []).append(record)
    groups = _ordered(str(record["group"]) for record in records if "group" in record)
    summaries = []
    for (problem, method), members in rows.items():
        of_group = {g: _mean(r.get("psnr") for r in members if str(r.get("group")) == g) for g in groups}
        means = [_mean(r.get(key) for r in members) for key in ("psnr", "ssim", "seconds")]
        summaries.append(Summary(problem, method, len(members), means[0], means[1], means[2], of_group))
    return summaries


def write_report(folder: str | Path, title: str = "flowprox report") -> Path:
    """Write ``report.html`` into a results folder: one file, everything in it.

    Arguments:
        folder: holds ``records.jsonl`` and ``images/``; a picture that is missing is named in its place.
        title: heading.

    Returns:
        path of the report.

    Raises:
        FileNotFoundError: no ``records.jsonl``.
        ValueError: it is empty or damaged.
    """
    folder = Path(folder)
    records = read_records(folder / "records.jsonl")
    if not records:
        raise ValueError(f"{folder / 'records.jsonl'} holds no record; nothing to report")
    summaries = summarise(records)
    problems = _ordered(summary.problem for summary in summaries)
    sections = "".join(_section(folder, problem, records, summaries) for problem in problems)
    page = _PAGE.format(title=escape(title), style=_STYLE, facts=_facts(records), sections=sections)
    with atomic_write(folder / "report.html", "w") as file:
        file.write(page)
    return folder / "report.html"


def write_figures(folder: str | Path) -> list[Path]:
    """Write ``<problem>.png`` (every image by every method) and ``summary.png`` (mean PSNR) into ``figures/``.

    Raises:
        FileNotFoundError: no ``records.jsonl``.
        ValueError: it is empty or damaged.
    """
    folder = Path(folder)
    records = read_records(folder / "records.jsonl")
    if not records:
        raise ValueError(f"{folder / 'records.jsonl'} holds no record; nothing to draw")
    (folder / "figures").mkdir(exist_ok=True)
    summaries = summarise(records)
    problems = _ordered(summary.problem for summary in summaries)
    paths = [_save(_grid_figure(folder, problem, records), folder, problem) for problem in problems]
    return [*paths, _save(_summary_figure(summaries), folder, "summary")]


# HTML ----------------------------------------------------------------------------------------------------------------

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
<p class="facts">{facts}</p>
{sections}
</main>
</body>
</html>
"""

_STYLE = """
:root { --ink: #1c1e21; --soft: #5a6069; --line: #d9dce1; --paper: #ffffff; --card: #f5f6f8; --best: #0b6b43; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaed; --soft: #a3aab4; --line: #3a3f47; --paper: #15171a; --card: #1f2227; --best: #6fd3a4; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 1.25rem 1rem 3rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.25rem; margin: 2.25rem 0 .5rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; overflow-wrap: anywhere; }
.facts, .group { color: var(--soft); }
.group { font-weight: 400; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; min-width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; font-weight: 400; }
thead th { color: var(--soft); font-weight: 600; font-size: .85rem; }
.best { color: var(--best); font-weight: 700; }
.grid { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 13rem)); }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: .5rem; overflow: hidden; }
figure img { display: block; width: 100%; height: auto; image-rendering: pixelated; }
figcaption { padding: .4rem .5rem; font-size: .85rem; line-height: 1.35; overflow-wrap: anywhere; }
figcaption b { display: block; font-variant-numeric: tabular-nums; }
@media (max-width: 30rem) {
  .grid { grid-template-columns: repeat(2, 1fr); }
  th, td { padding: .35rem .3rem; font-size: .8rem; }
  thead th { white-space: normal; font-size: .75rem; vertical-align: bottom; }
  tbody th { white-space: normal; overflow-wrap: break-word; min-width: 6.2rem; }
}
"""


def _facts(records: Sequence[Mapping[str, Any]]) -> str:
    n_images = len(_ordered(str(record["image"]) for record in records))
    facts = [f"{n_images} image{'s' if n_images != 1 else ''}", "PSNR in dB, images in [0, 1], means over images"]
    for key, name in (("seed", "seed"), ("version", "flowprox")):
        values = _ordered(str(record[key]) for record in records if key in record)
        if values:
            facts.append(f"{name} {', '.join(values)}")
    return escape("; ".join(facts) + ".")


def _section(folder: Path, problem: str, records: Sequence[Mapping[str, Any]], summaries: Sequence[Summary]) -> str:
    members = [record for record in records if str(record["problem"]) == problem]
    rows = [summary for summary in summaries if summary.problem == problem]
    images = "".join(_image_row(folder, problem, image, members) for image in _images(members))
    return f"<section>\n<h2>{escape(problem)}</h2>\n{_table(rows)}\n{images}</section>\n"


def _table(rows: Sequence[Summary]) -> str:
    groups = [group for group in rows[0].psnr_of_group if any(row.psnr_of_group[group] is not None for row in rows)]
    groups = groups if len(groups) > 1 else []
    columns: list[tuple[str, list[float | None], int, bool | None]] = [
        ("PSNR", [row.psnr for row in rows], 2, True),
        *((f"PSNR, {group}", [row.psnr_of_group[group] for row in rows], 2, True) for group in groups),
        ("SSIM", [row.ssim for row in rows], 3, True),
        ("s / image", [row.seconds for row in rows], 3, None),
        ("images", [float(row.n_images) for row in rows], 0, None),
    ]
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in ("method", *(column[0] for column in columns)))
    body = ""
    for i, row in enumerate(rows):
        cells = "".join(_cell(values[i], values, digits, high) for _, values, digits, high in columns)
        body += f'<tr><th scope="row">{escape(row.method)}</th>{cells}</tr>\n'
    table = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table>"
    # focusable, so that a keyboard can scroll a table wider than the screen
    return f'<div class="scroll" tabindex="0" role="region" aria-label="mean scores">{table}</div>'


def _cell(value: float | None, column: Sequence[float | None], digits: int, high_is_best: bool | None) -> str:
    known = [other for other in column if other is not None]
    best = high_is_best and value is not None and value == max(known) > min(known)
    return f"<td{' class=best' if best else ''}>{_number(value, digits)}</td>"


def _image_row(folder: Path, problem: str, image: str, records: Sequence[Mapping[str, Any]]) -> str:
    members = [record for record in records if str(record["image"]) == image]
    group = next((str(record["group"]) for record in members if "group" in record), "")
    figures = _figure(truth_path(folder, image), f"{image}: true image", "truth", "")
    for record in members:
        method, score = str(record["method"]), f"{_number(record.get('psnr'), 2)} dB"
        alternative = f"{image}, {problem}: {method}, PSNR {score}"
        figures += _figure(picture_path(folder, problem, image, method), alternative, method, score)
    kind = f' <span class="group">({escape(group)})</span>' if group else ""
    return f'<h3>{escape(image)}{kind}</h3>\n<div class="grid">\n{figures}</div>\n'


def _figure(path: Path, alternative: str, caption: str, score: str) -> str:
    score = f"<b>{escape(score)}</b>" if score else ""
    if path.is_file():
        data = base64.b64encode(path.read_bytes()).decode("ascii")
        picture = f'<img alt="{escape(alternative)}" src="data:image/png;base64,{data}">'
    else:
        picture = f"<p>no picture {escape(path.name)}</p>"
    return f"<figure>{picture}<figcaption>{escape(caption)}{score}</figcaption></figure>\n"


# Figures -------------------------------------------------------------------------------------------------------------


def _grid_figure(folder: Path, problem: str, records: Sequence[Mapping[str, Any]]) -> Any:
    from matplotlib.figure import Figure

    members = [record for record in records if str(record["problem"]) == problem]
    methods, images = _ordered(str(record["method"]) for record in members), _images(members)
    scores = {(str(record["image"]), str(record["method"])): record.get("psnr") for record in members}
    figure = Figure(figsize=(1.9 * (1 + len(methods)), 2.25 * len(images) + 0.4), layout="constrained")
    axes = figure.subplots(len(images), 1 + len(methods), squeeze=False)
    for row, image in zip(axes, images, strict=True):
        _draw(row[0], truth_path(folder, image), f"{image}\ntruth")
        for cell, method in zip(row[1:], methods, strict=True):
            text = f"{method}\n{_number(scores.get((image, method)), 2)} dB"
            _draw(cell, picture_path(folder, problem, image, method), text)
    figure.suptitle(_plain(problem))
    return figure


def _draw(cell: Any, path: Path, text: str) -> None:
    from PIL import Image

    cell.set_axis_off()
    cell.set_title(_plain(text), fontsize=8)
    if path.is_file():
        with Image.open(path) as picture:
            cell.imshow(picture.convert("RGB"), interpolation="nearest")


def _summary_figure(summaries: Sequence[Summary]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.32 * len(summaries) + 1.2), layout="constrained")
    cell = figure.subplots()
    problems = _ordered(summary.problem for summary in summaries)
    for position, summary in enumerate(summaries):
        bar = cell.barh(position, summary.psnr or 0.0, color=f"C{problems.index(summary.problem) % 10}")
        cell.bar_label(bar, labels=[_number(summary.psnr, 2)], padding=3, fontsize=8)
    labels = [_plain(f"{summary.method} ({summary.problem})") for summary in summaries]
    cell.set_yticks(range(len(summaries)), labels, fontsize=8)
    cell.invert_yaxis()
    cell.margins(x=0.12)
    cell.set_xlabel("mean PSNR (dB)")
    cell.spines[["top", "right"]].set_visible(False)
    return figure


def _save(figure: Any, folder: Path, name: str) -> Path:
    path = folder / "figures" / f"{quote(name, safe='')}.png"
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png", dpi=130, metadata={"Software": None})
    return path


# Small things --------------------------------------------------------------------------------------------------------


def _plain(text: str) -> str:
    return text.replace("$", r"\$")  # matplotlib would read formulas


def _images(records: Sequence[Mapping[str, Any]]) -> list[str]:
    return _ordered(str(record["image"]) for record in records)


def _ordered(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def _mean(values: Iterable[Any]) -> float | None:
    known = [float(value) for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def _number(value: Any, digits: int) -> str:
    return "–" if value is None else f"{float(value):.{digits}f}"
