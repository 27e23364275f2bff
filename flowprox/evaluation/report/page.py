"""The report: one HTML file that opens from disk and loads nothing, and the tables as Markdown, CSV and LaTeX.

Only what stands in results folders is read; no model is loaded and nothing is reconstructed.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from flowprox.evaluation.report import drawings
from flowprox.evaluation.report.contents import Contents
from flowprox.evaluation.report.gallery import make_gallery
from flowprox.evaluation.report.pictures import data_uri
from flowprox.evaluation.report.reading import ordered, read_evaluations
from flowprox.evaluation.report.tables import Table, to_csv, to_latex, to_markdown
from flowprox.evaluation.summary import METRICS
from flowprox.files import atomic_write
from flowprox.naming import nearest

__all__ = ["PARTS", "ReportOptions", "Results", "read_results", "write_page", "write_report", "write_tables"]

PARTS = ("overview", "curves", "comparisons", "cost", "spread", "cases", "images", "tuning", "figures")
"""What a report may show besides the table of each problem."""

_HERE = Path(__file__).parent
_FORMATS = {"md": to_markdown, "csv": to_csv, "tex": to_latex}


@dataclass
class ReportOptions:
    """What a report shows.

    Arguments:
        title: heading; None names the evaluations.
        metric: the figure that tables, comparisons and charts are about, a key of ``METRICS``.
        parts: which of ``PARTS`` to show; None shows all.
        reference: method that the others are compared with; None takes the best of each problem.
        n_images: show the pictures of so many images of each problem; None shows all there are.
        recipe: names the published figures of folders without ``recipe.yaml``.
    """

    title: str | None = None
    metric: str = "psnr"
    parts: Sequence[str] | None = None
    reference: str | None = None
    n_images: int | None = None
    recipe: str | Path | None = None

    def __post_init__(self) -> None:
        _check_known("metric", [self.metric], METRICS)
        _check_known("parts", self.parts or (), PARTS)
        if self.n_images is not None and self.n_images < 0:
            raise ValueError(f"n_images must be 0 or more, got {self.n_images}")

    def shows(self, part: str) -> bool:
        return self.parts is None or part in self.parts


class Results(NamedTuple):
    """What was read, and the folder that the report goes to."""

    chapters: list[Contents]
    out: Path

    @property
    def notes(self) -> list[str]:
        """What a reader should know before trusting the figures."""
        return ordered(note for chapter in self.chapters for note in chapter.evaluation.notes)


def read_results(
    sources: Sequence[str | Path], out: str | Path | None = None, options: ReportOptions | None = None
) -> Results:
    """Read everything a report is made from.

    Arguments:
        sources: results folders, or files of records.
        out: folder to write to, made if needed; by default the results folder, if it is one.
        options: what is going to be shown.

    Raises:
        FileNotFoundError: a source does not exist, or holds neither records nor figures.
        ValueError: records are damaged, an option does not fit them, or several sources are given without ``out``.
    """
    options = options or ReportOptions()
    evaluations = read_evaluations(sources, options.recipe)
    if out is None and (len(sources) > 1 or not Path(sources[0]).is_dir()):
        raise ValueError(
            "out is missing: the report of several sources, or of a file of records, needs a folder of its own"
        )
    records = [record for evaluation in evaluations for record in evaluation.records]
    if options.reference is not None:
        _check_known("reference", [options.reference], ordered(str(record["method"]) for record in records))
    held = [key for key in METRICS if any(record.get(key) is not None for record in records)]
    if held and options.metric not in held:
        raise ValueError(f"metric: no record holds {options.metric}; the records hold {', '.join(held)}")
    folder = Path(sources[0] if out is None else out)
    folder.mkdir(parents=True, exist_ok=True)
    return Results([Contents(evaluation, options.metric, options.reference) for evaluation in evaluations], folder)


def write_report(folder: str | Path, options: ReportOptions | None = None) -> Path:
    """Read one results folder and write its ``report.html`` into it; arguments and errors as ``read_results``."""
    return write_page(read_results([folder], options=options), options)


def write_page(results: Results, options: ReportOptions | None = None) -> Path:
    """Write ``report.html``: one file, everything in it. A picture that is missing is named in its place."""
    options = options or ReportOptions()
    chapters = results.chapters
    template = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).get_template("report.html")
    script = (_HERE / "sort.js").read_text(encoding="utf-8")
    page = template.render(
        title=options.title or ", ".join(chapter.evaluation.name for chapter in chapters),
        style=Markup((_HERE / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii"),
        chapters=[_chapter(contents, f"c{i}", options) for i, contents in enumerate(chapters)],
    )
    with atomic_write(results.out / "report.html", "w") as file:
        file.write(page)
    return results.out / "report.html"


def write_tables(results: Results) -> list[Path]:
    """Write every table into ``tables/`` as Markdown, CSV (every digit) and LaTeX."""
    folder = results.out / "tables"
    paths = []
    for contents in results.chapters:
        prefix = f"{_slug(contents.evaluation.name)}-" if len(results.chapters) > 1 else ""
        for table in _tables(contents):
            for suffix, written in _FORMATS.items():
                path = folder / f"{prefix}{table.slug}.{suffix}"
                if not table.rows:  # of an earlier report
                    path.unlink(missing_ok=True)
                    continue
                folder.mkdir(exist_ok=True)
                with atomic_write(path, "w") as file:
                    file.write(written(table))
                paths.append(path)
    return paths


def _tables(contents: Contents) -> list[Table]:
    return [
        contents.overview(),
        contents.summary(),
        contents.beside_published(),
        contents.comparisons(),
        contents.cases(),
        contents.tuning(),
        contents.failures(),
    ]


def _chapter(contents: Contents, name: str, options: ReportOptions) -> dict[str, Any]:
    evaluation = contents.evaluation
    has = bool(evaluation.records)
    overview = [contents.overview()] if has and len(contents.problems) > 1 else []
    sections = [_section(contents, problem, f"{name}-{i}", options) for i, problem in enumerate(contents.problems)]
    n_missing = sum(section["gallery"].n_missing for section in sections if section["gallery"])
    notes = [
        *evaluation.notes,
        *([f"{n_missing} pictures are missing; they are named in their places"] * bool(n_missing)),
    ]
    return {
        "id": name,
        "name": evaluation.name,
        "facts": _facts(contents),
        "notes": notes,
        "overview": _shown([*overview, contents.beside_published()]) if options.shows("overview") else [],
        "wants_published": not evaluation.published.psnr and any(record.get("recipe") for record in evaluation.records),
        "curves": _drawn(drawings.curves(contents, f"{name}-v")) if options.shows("curves") else [],
        "sections": sections,
        "tuning": _shown([contents.tuning()]) if options.shows("tuning") else [],
        "tuning_curves": _drawn(drawings.tuning_curves(contents, f"{name}-u")) if options.shows("tuning") else [],
        "illustrations": [
            {"title": f.title, "caption": f.caption, "alt": f.alt, "src": data_uri(f.path)}
            for f in (evaluation.illustrations if options.shows("figures") else [])
        ],
        "failures": _shown([contents.failures()]),
        "metric": contents.metric,
        "one_bit": any(record.get("problem_name") == "one-bit" for record in evaluation.records),
    }


def _section(contents: Contents, problem: str, name: str, options: ReportOptions) -> dict[str, Any]:
    charts = [
        drawings.cost_chart(contents, problem, f"{name}-cost") if options.shows("cost") else None,
        drawings.spread_chart(contents, problem, f"{name}-spread") if options.shows("spread") else None,
    ]
    tables = [contents.comparisons(problem)] if options.shows("comparisons") else []
    tables += [contents.cases(problem)] if options.shows("cases") else []
    return {
        "id": name,
        "problem": problem,
        "summary": contents.summary(problem),
        "tables": _shown(tables),
        "charts": _drawn(chart for chart in charts if chart is not None),
        "gallery": make_gallery(contents, problem, options.n_images) if options.shows("images") else None,
    }


def _facts(contents: Contents) -> list[str]:
    records = contents.evaluation.records
    if not records:
        return []
    n_images = len(ordered(str(record["image"]) for record in records))
    facts = [f"{n_images} image{'s' if n_images != 1 else ''}"]
    sizes = ordered(f"{r['height']}×{r['width']}" for r in records if "height" in r and "width" in r)
    facts += [f"{', '.join(sizes[:3])}{' ...' if len(sizes) > 3 else ''} pixels"] if sizes else []
    for key, name in (("run_seed", "seed"), ("scale", "scale"), ("device", "device"), ("version", "flowprox")):
        values = ordered(str(record[key]) for record in records if record.get(key) is not None)
        if key == "run_seed" and not values:
            values = ordered(str(record["seed"]) for record in records if "seed" in record)
        facts += [f"{name} {', '.join(values)}"] if values else []
    torch = ordered(str(r["versions"]["torch"]) for r in records if (r.get("versions") or {}).get("torch"))
    return [*facts, *([f"torch {', '.join(torch)}"] if torch else [])]


def _shown(tables: Iterable[Table]) -> list[Table]:
    return [table for table in tables if table.rows]


def _drawn(charts: Iterable[drawings.Chart]) -> list[dict[str, Any]]:
    return [
        {**chart._asdict(), "svg": Markup(chart.svg)} for chart in charts
    ]  # made here, so no text of a record in it


def _check_known(what: str, names: Iterable[str], known: Iterable[str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{what}: unknown {name!r}; {nearest(name, sorted(known))}")


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name)
