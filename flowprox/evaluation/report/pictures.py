"""Pictures of a results folder: where they stand, how they get into a page, maps of their errors, and figures of them.

    error map = mean over channels of |x_hat - x|,    black where it is 0, white where it reaches ``white``

Symbols: x true picture, x_hat picture of the estimate, both from PNG files with 8 bits, so clipped to [0, 1].
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from flowprox.evaluation.report.sources import ordered, read_chapters
from flowprox.evaluation.report.tables import number
from flowprox.files import atomic_write
from flowprox.records import Record
from flowprox.summary import Row, summary_rows

__all__ = [
    "MEASUREMENT",
    "Pixels",
    "data_uri",
    "error_map",
    "error_white",
    "find_picture",
    "picture_path",
    "read_picture",
    "truth_path",
    "write_figures",
]

Pixels = npt.NDArray[np.float64]

MEASUREMENT = "measurement"
"""Name of the method that returns the degraded input."""

MAX_SIDE = 512
"""Larger pictures are reduced to this many pixels on the longer side."""

_WHITES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_MEDIA = {".png": "image/png", ".svg": "image/svg+xml"}


def file_stem(*parts: str) -> str:
    """A name for a file that holds the parts: as they are, or, with what a file system may refuse, told apart by a hash.

    Example:
        >>> file_stem("denoising", "a cat", "latent-map beta=1"), file_stem("a/b")
        ('denoising--a cat--latent-map beta=1', 'a-b-82badf67')
    """
    whole = "--".join(parts)
    plain = re.sub(r"[^\w .,=+@()\[\]-]", "-", whole)
    while len(plain.encode()) > 180:
        plain = plain[:-1]
    if plain == whole and not any("--" in part for part in parts):
        return plain
    content = "\0".join(parts).encode("utf-8", "surrogateescape")
    return f"{plain}-{hashlib.blake2b(content, digest_size=4).hexdigest()}"


def picture_path(folder: Path, problem: str, image: str, method: str) -> Path:
    """Where the reconstruction of an image by a method stands; any text is safe in a name."""
    return folder / "images" / f"{file_stem(problem, image, method)}.png"


def truth_path(folder: Path, image: str) -> Path:
    """Where the true image stands."""
    return folder / "images" / f"{file_stem(image)}.png"


def find_picture(folders: Sequence[Path], *parts: str) -> Path | None:
    """The picture of an image, or of (problem, image, method), in the first folder that has it.

    Folders of flowprox 0.1.0 have names in percent-encoding.
    """
    names = file_stem(*parts), "--".join(quote(part, safe="", errors="replace") for part in parts)
    paths = (folder / "images" / f"{name}.png" for folder in folders for name in names)
    return next((path for path in paths if path.is_file()), None)


def read_picture(path: Path) -> Pixels:
    """Pixels (H, W, 3) in [0, 1].

    Raises:
        OSError: the file is no picture.
    """
    with Image.open(path) as picture:
        picture = picture.convert("RGB")
        if max(picture.size) > MAX_SIDE:
            picture.thumbnail((MAX_SIDE, MAX_SIDE))
        return np.asarray(picture, dtype=np.float64) / 255


def error_white(errors: Sequence[Pixels]) -> float:
    """The error shown white: the smallest round one that 99 % of the pixels of the median map stay below.

    Raises:
        ValueError: no map is given.
    """
    if not errors:
        raise ValueError("errors is empty; give at least one error map")
    highest = float(np.median([np.quantile(error, 0.99) for error in errors]))
    return next((white for white in _WHITES if highest <= white), _WHITES[-1])


def error_map(x_hat: Pixels, x: Pixels) -> Pixels:
    """Mean over channels of the absolute error, (H, W).

    Raises:
        ValueError: the pictures differ in size.
    """
    if x_hat.shape != x.shape:
        raise ValueError(f"estimate and truth differ in size: {x_hat.shape[:2]} and {x.shape[:2]} pixels")
    return np.abs(x_hat - x).mean(-1)


def data_uri(picture: Path | Pixels) -> str:
    """A picture as text for ``src``: a file as it is, pixels (H, W) or (H, W, 3) in [0, 1] as PNG."""
    if isinstance(picture, Path):
        content, media = picture.read_bytes(), _MEDIA[picture.suffix.lower()]
    else:
        file = io.BytesIO()
        Image.fromarray((picture.clip(0, 1) * 255).round().astype(np.uint8)).save(file, format="PNG", optimize=True)
        content, media = file.getvalue(), "image/png"
    return f"data:{media};base64,{base64.b64encode(content).decode('ascii')}"


# Figures as PNG files, for slides and documents -----------------------------------------------------------------------


def write_figures(folder: str | Path) -> list[Path]:
    """Write ``<problem>.png`` (every image by every method) and ``summary.png`` (mean PSNR) into ``figures/``.

    Raises:
        FileNotFoundError: no records.
        ValueError: they are damaged, or of several recipes.
    """
    folder = Path(folder)
    chapters = read_chapters([folder])
    if len(chapters) > 1:
        raise ValueError(f"{folder} holds several recipes; flowprox report shows them")
    records = chapters[0].records
    if not records:
        raise FileNotFoundError(f"no records in {folder}; nothing to draw")
    rows = summary_rows(records)
    figures = {file_stem(name): _grid(folder, name, records) for name in ordered(row.problem for row in rows)}
    figures["summary"] = _bars(rows)
    (folder / "figures").mkdir(exist_ok=True)
    for name, figure in figures.items():
        with atomic_write(folder / "figures" / f"{name}.png", "wb") as file:
            figure.savefig(file, format="png", dpi=130, metadata={"Software": None})
    return [folder / "figures" / f"{name}.png" for name in figures]


def _grid(folder: Path, problem: str, records: Sequence[Record]) -> Figure:
    members = {(str(r["image"]), str(r["method"])): r for r in records if str(r["problem"]) == problem}
    images, methods = (ordered(names) for names in zip(*members, strict=True))
    figure = Figure(figsize=(1.9 * (1 + len(methods)), 2.25 * len(images) + 0.4), layout="constrained")
    axes = figure.subplots(len(images), 1 + len(methods), squeeze=False)
    for row, image in zip(axes, images, strict=True):
        _draw(row[0], find_picture([folder], image), f"{image}\ntruth")
        for cell, method in zip(row[1:], methods, strict=True):
            psnr = members.get((image, method), {}).get("psnr")
            _draw(cell, find_picture([folder], problem, image, method), f"{method}\n{number(psnr)} dB")
    figure.suptitle(_plain(problem))
    return figure


def _draw(cell: Axes, path: Path | None, text: str) -> None:
    cell.set_axis_off()
    cell.set_title(_plain(text), fontsize=8)
    if path is not None:
        with Image.open(path) as picture:
            cell.imshow(picture.convert("RGB"), interpolation="nearest")


def _bars(rows: Sequence[Row]) -> Figure:
    figure = Figure(figsize=(7, 0.32 * len(rows) + 1.2), layout="constrained")
    cell = figure.subplots()
    problems = ordered(row.problem for row in rows)
    colors = [f"C{problems.index(row.problem) % 10}" for row in rows]
    bars = cell.barh(range(len(rows)), [row.psnr or 0.0 for row in rows], color=colors)
    cell.bar_label(bars, labels=[number(row.psnr) for row in rows], padding=3, fontsize=8)
    cell.set_yticks(range(len(rows)), [_plain(f"{row.method} ({row.problem})") for row in rows], fontsize=8)
    cell.invert_yaxis()
    cell.margins(x=0.12)
    cell.set(xlabel="mean PSNR (dB)", ylabel="method (problem)")
    cell.spines[["top", "right"]].set_visible(False)
    return figure


def _plain(text: str) -> str:
    return text.replace("$", r"\$")  # matplotlib would read formulas
