"""The report: one HTML file that opens from disk and loads nothing, and the tables as Markdown, CSV and LaTeX.

Only what stands in results folders is read; no model is loaded and nothing is reconstructed.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from flowprox.evaluation import PARTS, ReportOptions
from flowprox.evaluation.report import charts, pictures
from flowprox.evaluation.report.pictures import MEASUREMENT, Pixels, data_uri, file_stem, find_picture
from flowprox.evaluation.report.sources import ordered, read_chapters
from flowprox.evaluation.report.tables import Contents, number, to_csv, to_latex, to_markdown
from flowprox.files import atomic_write
from flowprox.naming import nearest
from flowprox.records import Record
from flowprox.summary import METRICS

_HERE = Path(__file__).parent
_FORMATS = {"md": to_markdown, "csv": to_csv, "tex": to_latex}
_ABSENT, _DAMAGED = "is missing", "cannot be read"


class Results(NamedTuple):
    """What was read, and the folder that the report goes to."""

    chapters: list[Contents]
    out: Path

    @property
    def notes(self) -> list[str]:
        """What a reader should know before trusting the figures."""
        return ordered(note for contents in self.chapters for note in contents.chapter.notes)


class Tile(NamedTuple):
    """One picture of a grid; ``missing`` says what stands in its place, ``method`` is empty for the truth."""

    method: str
    score: str
    alt: str
    picture: Pixels | None
    missing: str = ""
    error: Pixels | None = None
    is_best: bool = False


def read_results(
    sources: Sequence[str | Path], out: str | Path | None = None, options: ReportOptions | None = None
) -> Results:
    """Read everything a report is made from: results folders, or files of records.

    ``out`` is the folder to write to, made if needed; by default the results folder, if it is one.

    Raises:
        FileNotFoundError: a source does not exist, or holds neither records nor figures.
        ValueError: records are damaged, an option does not fit them, or several sources are given without ``out``.
    """
    options = options or ReportOptions()
    _check_known("metric", [options.metric], METRICS)
    _check_known("parts", options.parts or (), PARTS)
    if options.n_images is not None and options.n_images < 0:
        raise ValueError(f"n_images must be 0 or more, got {options.n_images}")
    chapters = read_chapters(sources, options.recipe)
    if out is None and (len(sources) > 1 or not Path(sources[0]).is_dir()):
        raise ValueError("out is missing: the report of several sources, or of a file, needs a folder of its own")
    records = [record for chapter in chapters for record in chapter.records]
    if options.reference is not None:
        _check_known("reference", [options.reference], ordered(str(record["method"]) for record in records))
    held = [key for key in METRICS if any(record.get(key) is not None for record in records)]
    if held and options.metric not in held:
        raise ValueError(f"metric: no record holds {options.metric}; the records hold {', '.join(held)}")
    folder = Path(sources[0] if out is None else out)
    folder.mkdir(parents=True, exist_ok=True)
    return Results([Contents(chapter, options.metric, options.reference) for chapter in chapters], folder)


def write_report(folder: str | Path, options: ReportOptions | None = None) -> Path:
    """Write ``report.html`` into a results folder; ``read_results`` and ``write_page`` in one."""
    return write_page(read_results([folder], options=options), options)


def write_page(results: Results, options: ReportOptions | None = None) -> Path:
    """Write ``report.html``: one file, everything in it. A picture that is missing is named in its place."""
    options = options or ReportOptions()
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["uri"] = data_uri
    script = (_HERE / "report.js").read_text(encoding="utf-8")
    page = environment.get_template("report.html").render(
        title=options.title or ", ".join(contents.chapter.name for contents in results.chapters),
        style=(_HERE / "report.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii"),
        chapters=[_chapter(contents, f"c{i}", options) for i, contents in enumerate(results.chapters)],
    )
    path = results.out / "report.html"
    with atomic_write(path, "w") as file:
        file.write(page.encode("utf-8", "replace").decode("utf-8"))  # a file name may not be text
    return path


def write_tables(results: Results) -> list[Path]:
    """Write every table into ``tables/`` as Markdown, CSV (every digit) and LaTeX."""
    folder = results.out / "tables"
    paths = []
    for contents in results.chapters:
        prefix = f"{file_stem(contents.chapter.name)}-" if len(results.chapters) > 1 else ""
        tables = [contents.overview(), contents.summary(), contents.beside_published(), contents.comparisons()]
        for table in [*tables, contents.cases(), contents.tuning(), contents.failures()]:
            for suffix, written in _FORMATS.items():
                path = folder / f"{prefix}{table.slug}.{suffix}"
                if table.values.empty:  # of an earlier report
                    path.unlink(missing_ok=True)
                    continue
                folder.mkdir(exist_ok=True)
                with atomic_write(path, "w") as file:
                    file.write(written(table).encode("utf-8", "replace").decode("utf-8"))
                paths.append(path)
    return paths


def _chapter(contents: Contents, name: str, options: ReportOptions) -> Record:
    """What the template shows of a chapter, whose drawings have identifiers that begin with the name."""
    chapter, shows = contents.chapter, options.shows
    sections = [_section(contents, problem, f"{name}-{i}", options) for i, problem in enumerate(contents.problems)]
    tiles = [tile for section in sections for _, _, row in section["rows"] for tile in row]
    n_missing = sum(tile.missing.endswith((_ABSENT, _DAMAGED)) for tile in tiles)
    missing = [f"{n_missing} pictures are missing; they are named in their places"] * bool(n_missing)
    overview = [contents.overview()] if len(contents.problems) > 1 else []
    return {
        "id": name,
        "name": chapter.name,
        "facts": _facts(chapter.records),
        "notes": [*chapter.notes, *missing],
        "overview": [*overview, contents.beside_published()] if shows("overview") else [],
        "curves": charts.curves(contents, f"{name}-v") if shows("curves") else [],
        "sections": sections,
        "tuning": contents.tuning() if shows("tuning") and chapter.tuning else None,
        "tuning_curves": charts.tuning_curves(contents, f"{name}-u") if shows("tuning") else [],
        "illustrations": chapter.illustrations if shows("figures") else [],
        "failures": contents.failures(),
        "one_bit": any(record.get("problem_name") == "one-bit" for record in chapter.records),
    }


def _section(contents: Contents, problem: str, name: str, options: ReportOptions) -> Record:
    records, shows = [r for r in contents.chapter.records if str(r["problem"]) == problem], options.shows
    degraded = {str(r["method"]) for r in records if MEASUREMENT == r["method"] or r.get("method_name") == "adjoint"}
    drawn = [charts.cost_chart(contents, problem, f"{name}-cost")] if shows("cost") else []
    drawn += [charts.spread_chart(contents, problem, f"{name}-spread")] if shows("spread") else []
    drawn += charts.calibration_charts(contents, problem, f"{name}-calibration") if shows("calibration") else []
    tables = [contents.comparisons(problem)] if shows("comparisons") else []
    tables += [contents.cases(problem)] if shows("cases") else []
    white, rows = _pictures(contents, problem, records, degraded, options.n_images) if shows("images") else (None, [])
    return {
        "id": name,
        "problem": problem,
        "stated": _stated(records[0]),
        "summary": contents.summary(problem),
        "tables": tables,
        "charts": [chart for chart in drawn if chart is not None],
        "shows_images": shows("images"),
        "rows": rows,
        "white": white,
        "n_images": len(ordered(str(record["image"]) for record in records)),
        "has_measurement": bool(degraded),
    }


def _stated(record: Record) -> str:
    """The parameters of a problem in words: sigma, mask, blur."""
    parameters = {key.replace("_", " "): value for key, value in (record.get("parameters") or {}).items()}
    words = [
        f"{key} {value:g}" if isinstance(value, float) else key if value is True else f"{key} {value}"
        for key, value in parameters.items()
        if value is not None and value is not False
    ]
    return f"{record.get('problem_name', record['problem'])}: {', '.join(words)}" if words else ""


def _facts(records: Sequence[Record]) -> list[str]:
    if not records:
        return []
    n_images = len(ordered(str(record["image"]) for record in records))
    facts = [f"{n_images} image{'s' if n_images != 1 else ''}"]
    sizes = ordered(f"{r['height']}×{r['width']}" for r in records if "height" in r and "width" in r)
    facts += [f"{', '.join(sizes[:3])}{' ...' if len(sizes) > 3 else ''} pixels"] if sizes else []
    seeds = "run_seed" if any(record.get("run_seed") is not None for record in records) else "seed"
    for key, name in ((seeds, "seed"), ("scale", "scale"), ("device", "device"), ("version", "flowprox")):
        values = ordered(str(record[key]) for record in records if record.get(key) is not None)
        facts += [f"{name} {', '.join(values)}"] if values else []
    torch = ordered(str(r["versions"]["torch"]) for r in records if (r.get("versions") or {}).get("torch"))
    return [*facts, *([f"torch {', '.join(torch)}"] if torch else [])]


# Pictures -------------------------------------------------------------------------------------------------------------


def _pictures(
    contents: Contents, problem: str, records: Sequence[Record], degraded: set[str], n_images: int | None
) -> tuple[float | None, list[tuple[str, str, list[Tile]]]]:
    """The error shown white, and of each image that has pictures its name, what is remarkable about it, and its tiles."""
    folders, methods, metric = contents.chapter.folders, contents.methods_of(problem), contents.metric
    best_method = contents.best(problem)
    worst, finest = contents.ends(problem, best_method) if best_method else ("", "")
    recorded = {(str(record["image"]), str(record["method"])): record for record in records}
    found: dict[str, dict[str, tuple[Pixels | None, str]]] = {}
    for image in ordered(image for image, _ in recorded):
        places = {"": (image,), **{method: (problem, image, method) for method in methods}}
        if len(found) != n_images and any(find_picture(folders, *parts) for parts in places.values()):
            found[image] = {method: _picture(folders, *parts) for method, parts in places.items()}
    errors = {
        (image, method): pictures.error_map(x_hat, x)
        for image, pixels in found.items()
        for method, (x_hat, _) in pixels.items()
        if method and x_hat is not None and (x := pixels[""][0]) is not None and x.shape == x_hat.shape
    }
    # one scale for the estimates; the degraded input is far off and may burn out
    judged = [e for (_, method), e in errors.items() if method not in degraded] or list(errors.values())
    white = pictures.error_white(judged) if judged else None
    rows = []
    for image, pixels in found.items():
        tiles = [Tile("", "", f"{image}: true image", *pixels[""])]
        known = [contents.images[problem, m][image] for m in methods if image in contents.images[problem, m]]
        best = metric.best(known) if len(known) > 1 else None
        for method in methods:
            value, record = contents.images[problem, method].get(image), recorded.get((image, method))
            score = "" if value is None else f"{number(value, metric.form)} {metric.unit}".strip()
            alt = f"{image}, {problem}: {method}, {metric.label} {score or 'unknown'}"
            x_hat, missing = pixels[method]
            if record is None or "failed" in record:
                x_hat, missing = None, f"failed: {record['failed']}" if record else "not run on this image"
            error = errors[image, method] / white if white is not None and (image, method) in errors else None
            tiles.append(Tile(method, score, alt, x_hat, missing, error, value is not None and value == best))
            widths, _ = _picture(folders, problem, image, method + pictures.HALF_WIDTHS)
            if widths is not None:
                alt = f"{image}, {problem}: half-widths of {method}, white the widest"
                tiles.append(Tile(method, "half-widths", alt, widths))
        remarks = [str(r["group"]) for (of, _), r in recorded.items() if of == image and "group" in r][:1]
        if worst != finest:
            remarks += [
                f"{end} case of {best_method}" for end, of in (("worst", worst), ("best", finest)) if of == image
            ]
        rows.append((image, ", ".join(remarks), tiles))
    return white, rows


def _picture(folders: Sequence[Path], *parts: str) -> tuple[Pixels | None, str]:
    """A picture, or None and what to say in its place."""
    path = find_picture(folders, *parts)
    if path is None:
        return None, f"{file_stem(*parts)}.png {_ABSENT}"
    try:
        return pictures.read_picture(path), ""
    except OSError:
        return None, f"{path.name} {_DAMAGED}"


def _check_known(what: str, names: Iterable[str], known: Iterable[str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{what}: unknown {name!r}; {nearest(name, sorted(known))}")
