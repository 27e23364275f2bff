"""Image grids: the truth and every method's estimate of an image, each over a map of its error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from flowprox.evaluation.report.contents import Contents
from flowprox.evaluation.report.pictures import (
    MEASUREMENT,
    Pixels,
    data_uri,
    error_map,
    error_white,
    find_picture,
    picture_path,
    read_picture,
    truth_path,
)
from flowprox.evaluation.report.reading import ordered
from flowprox.evaluation.report.tables import number
from flowprox.evaluation.summary import extremes, mean_per_image

__all__ = ["Gallery", "Tile", "make_gallery"]


_ABSENT, _DAMAGED = "is missing", "cannot be read"


class Tile(NamedTuple):
    """One picture of a grid; ``missing`` says what stands in its place."""

    caption: str
    score: str
    alt: str
    picture: str = ""
    error: str = ""
    error_alt: str = ""
    missing: str = ""
    best: bool = False


@dataclass
class Gallery:
    """The grids of one problem: of each image its name, what is remarkable about it, and its tiles."""

    rows: list[tuple[str, str, list[Tile]]]
    white: float | None
    n_images: int
    n_missing: int
    has_measurement: bool


def make_gallery(contents: Contents, problem: str, n_images: int | None = None) -> Gallery:
    """Grids of the images that have pictures.

    Arguments:
        contents: of the evaluation.
        problem: its label.
        n_images: at most so many, in the order of the records; None shows all.
    """
    folders = contents.evaluation.folders
    records = [record for record in contents.evaluation.records if str(record["problem"]) == problem]
    images = ordered(str(record["image"]) for record in records)
    methods = contents.methods_of(problem)
    pictured = [image for image in images if _has_pictures(folders, problem, image, methods)][:n_images]
    estimates = {(i, m): _read(_found(folders, problem, i, m)) for i in pictured for m in methods}
    truths = {image: _read(find_picture([truth_path(folder, image) for folder in folders])) for image in pictured}
    errors = {
        (image, method): error_map(x_hat, x)
        for (image, method), x_hat in estimates.items()
        if x_hat is not None and (x := truths[image]) is not None and x.shape == x_hat.shape
    }
    degraded = {str(r["method"]) for r in records if MEASUREMENT == r["method"] or r.get("method_name") == "adjoint"}
    white = _white(errors, degraded)
    figures = {method: mean_per_image(contents.figures[problem, method]) for method in methods}
    failed = {(str(r["image"]), str(r["method"])): str(r["failed"]) for r in records if "failed" in r}
    recorded = {(str(record["image"]), str(record["method"])) for record in records}
    gallery = Gallery([], white, len(images), 0, bool(degraded))
    for image in pictured:
        tiles = [_truth(image, folders, truths[image])]
        known = [figures[m][image] for m in methods if image in figures[m]]
        best = (max if contents.metric.high_is_best else min)(known) if len(known) > 1 else None
        for method in methods:
            value = figures[method].get(image)
            score = (
                "" if value is None else f"{number(value, contents.metric.digits).text} {contents.metric.unit}".strip()
            )
            alt = f"{image}, {problem}: {method}, {contents.metric.label} {score or 'unknown'}"
            tile = Tile(method, score, alt, best=value is not None and value == best)
            x_hat = estimates[image, method]
            if x_hat is not None:
                tile = tile._replace(picture=data_uri(x_hat))
            elif (image, method) in failed:
                tile = tile._replace(missing=f"failed: {failed[image, method]}")
            elif (image, method) in recorded:
                tile = tile._replace(missing=_missing(picture_path(Path(), problem, image, method), folders))
            else:
                tile = tile._replace(missing="not run on this image")
            if white is not None and (image, method) in errors:
                shown = errors[image, method] / white
                tile = tile._replace(error=data_uri(shown), error_alt=f"error map of {method} on {image}")
            tiles.append(tile)
        gallery.n_missing += sum(tile.missing.endswith((_ABSENT, _DAMAGED)) for tile in tiles)
        gallery.rows.append((image, _remarks(contents, problem, image, records), tiles))
    return gallery


def _white(errors: Mapping[tuple[str, str], Pixels], degraded: set[str]) -> float | None:
    """One scale for the estimates; the degraded input is far off and may burn out."""
    if not errors:
        return None
    return error_white([e for (_, method), e in errors.items() if method not in degraded] or list(errors.values()))


def _truth(image: str, folders: list[Path], x: Pixels | None) -> Tile:
    tile = Tile("truth", "", f"{image}: true image")
    if x is None:
        return tile._replace(missing=_missing(truth_path(Path(), image), folders))
    return tile._replace(picture=data_uri(x))


def _remarks(contents: Contents, problem: str, image: str, records: list[dict[str, object]]) -> str:
    remarks = [str(r["group"]) for r in records if str(r["image"]) == image and "group" in r][:1]
    best = contents.best(problem)
    found = extremes(contents.figures[problem, best]) if best is not None else None
    if found is not None and found.lowest[0] != found.highest[0]:
        worst, finest = (found.lowest[0], found.highest[0])[:: 1 if contents.metric.high_is_best else -1]
        remarks += [f"worst case of {best}"] * (image == worst) + [f"best case of {best}"] * (image == finest)
    return ", ".join(remarks)


def _has_pictures(folders: list[Path], problem: str, image: str, methods: list[str]) -> bool:
    if find_picture([truth_path(folder, image) for folder in folders]):
        return True
    return any(_found(folders, problem, image, method) for method in methods)


def _found(folders: list[Path], problem: str, image: str, method: str) -> Path | None:
    return find_picture([picture_path(folder, problem, image, method) for folder in folders])


def _read(path: Path | None) -> Pixels | None:
    """None also where there is a file that is no picture, which ``_missing`` then says."""
    if path is None:
        return None
    try:
        return read_picture(path)
    except OSError:
        return None


def _missing(path: Path, folders: list[Path]) -> str:
    there = find_picture([folder / path for folder in folders])
    return f"{path.name} {_ABSENT if there is None else _DAMAGED}"
