"""Pictures of a whole results folder as PNG files, for slides and documents: a grid per problem, a chart of the means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from matplotlib.figure import Figure
from PIL import Image

from flowprox.evaluation.report.pictures import picture_path, truth_path
from flowprox.evaluation.report.reading import ordered, read_evaluations
from flowprox.evaluation.report.tables import number
from flowprox.evaluation.summary import Row, summary_rows
from flowprox.files import atomic_write

__all__ = ["write_figures"]


def write_figures(folder: str | Path) -> list[Path]:
    """Write ``<problem>.png`` (every image by every method) and ``summary.png`` (mean PSNR) into ``figures/``.

    Raises:
        FileNotFoundError: no records.
        ValueError: they are damaged.
    """
    folder = Path(folder)
    (evaluation,) = read_evaluations([folder])
    records = evaluation.records
    if not records:
        raise FileNotFoundError(f"no records in {folder}; nothing to draw")
    (folder / "figures").mkdir(exist_ok=True)
    rows = summary_rows(records)
    problems = ordered(row.problem for row in rows)
    paths = [_save(_grid_figure(folder, problem, records), folder, problem) for problem in problems]
    return [*paths, _save(_summary_figure(rows), folder, "summary")]


def _grid_figure(folder: Path, problem: str, records: Sequence[Mapping[str, Any]]) -> Figure:
    members = [record for record in records if str(record["problem"]) == problem]
    methods, images = (
        ordered(str(record["method"]) for record in members),
        ordered(str(record["image"]) for record in members),
    )
    scores = {(str(record["image"]), str(record["method"])): record.get("psnr") for record in members}
    figure = Figure(figsize=(1.9 * (1 + len(methods)), 2.25 * len(images) + 0.4), layout="constrained")
    axes = figure.subplots(len(images), 1 + len(methods), squeeze=False)
    for row, image in zip(axes, images, strict=True):
        _draw(row[0], truth_path(folder, image), f"{image}\ntruth")
        for cell, method in zip(row[1:], methods, strict=True):
            text = f"{method}\n{number(scores.get((image, method)), 2).text} dB"
            _draw(cell, picture_path(folder, problem, image, method), text)
    figure.suptitle(_plain(problem))
    return figure


def _draw(cell: Any, path: Path, text: str) -> None:
    cell.set_axis_off()
    cell.set_title(_plain(text), fontsize=8)
    if path.is_file():
        with Image.open(path) as picture:
            cell.imshow(picture.convert("RGB"), interpolation="nearest")


def _summary_figure(rows: Sequence[Row]) -> Figure:
    figure = Figure(figsize=(7, 0.32 * len(rows) + 1.2), layout="constrained")
    cell = figure.subplots()
    problems = ordered(row.problem for row in rows)
    for position, row in enumerate(rows):
        bar = cell.barh(position, row.psnr or 0.0, color=f"C{problems.index(row.problem) % 10}")
        cell.bar_label(bar, labels=[number(row.psnr, 2).text], padding=3, fontsize=8)
    labels = [_plain(f"{row.method} ({row.problem})") for row in rows]
    cell.set_yticks(range(len(rows)), labels, fontsize=8)
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


def _plain(text: str) -> str:
    return text.replace("$", r"\$")  # matplotlib would read formulas
