"""What a report is made from: records, tuning, published figures and drawn figures of results folders.

Folders of one recipe are read as one evaluation, so that a run that was split, or repeated with another seed, is one
chapter. What a reader should know before trusting the figures becomes a note; only what cannot be read is an error.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from flowprox.evaluation.recipe_file import Published, read_published
from flowprox.evaluation.summary import measurement_of
from flowprox.records import UNFINISHED, read_records

__all__ = ["Evaluation", "Illustration", "ordered", "read_evaluations"]

_REQUIRED = ("problem", "method", "image")
_NUMBERS = ("psnr", "psnr_unclipped", "ssim", "residual", "seconds", "peak_memory_mib")
_DRAWN = (".svg", ".png")
SMOKE = "smoke"


class Illustration(NamedTuple):
    """A drawn figure of a results folder and what ``figures.json`` says about it."""

    path: Path
    title: str
    caption: str
    alt: str


@dataclass
class Evaluation:
    """One chapter of a report.

    Arguments:
        name: of the recipe, or of the folder.
        folders: where the pictures stand.
        records: of every folder, each measurement and method once.
        tuning: a record per problem, method and combination of options that was tried.
        published: PSNR in dB by label of the problem and of the method, and where it stands.
        illustrations: drawn figures.
        notes: what a reader should know before trusting the figures.
    """

    name: str
    folders: list[Path]
    records: list[dict[str, Any]] = field(default_factory=list)
    tuning: list[dict[str, Any]] = field(default_factory=list)
    published: Published = field(default_factory=lambda: Published({}, {}))
    illustrations: list[Illustration] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_evaluations(sources: Sequence[str | Path], recipe: str | Path | None = None) -> list[Evaluation]:
    """Everything the results folders hold, a chapter per recipe.

    Arguments:
        sources: results folders, or files of records.
        recipe: names the published figures of sources that have no ``recipe.yaml`` beside their records.

    Raises:
        FileNotFoundError: a source does not exist, or has neither records nor figures.
        ValueError: records or captions are damaged, a source is given twice, or the recipe is none.
    """
    if not sources:
        raise ValueError("no results folder is given; name one that flowprox evaluate wrote")
    paths = [Path(source) for source in sources]
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError("a results folder is given twice; name each once")
    if recipe is not None:
        read_published(Path(recipe))  # is it one?
    chapters: dict[str, list[Evaluation]] = {}
    for path in paths:
        one = _read(path, recipe)
        chapters.setdefault(one.name, []).append(one)
    merged = [_merged(members) for members in chapters.values()]
    for evaluation in merged:
        evaluation.notes += _doubts(evaluation)
    return merged


def _read(source: Path, recipe: str | Path | None) -> Evaluation:
    if not source.exists():
        raise FileNotFoundError(f"no results at {source}; give a folder that flowprox evaluate wrote")
    found = _read_folder(source) if source.is_dir() else _read_file(source)
    if not found.records and not found.illustrations:
        raise FileNotFoundError(f"no records and no figures in {source}; flowprox evaluate --out {source} writes them")
    for number, record in enumerate(found.records, start=1):
        _check(record, number, source)
    found.name = next((str(r["recipe"]) for r in found.records if r.get("recipe")), source.resolve().stem)
    if recipe is not None and not found.published.psnr:
        found.published = read_published(Path(recipe), _scales(found.records))
    if found.records and all(record.get("scale") == SMOKE for record in found.records):
        found.published = Published({}, {})
    return found


def _read_folder(folder: Path) -> Evaluation:
    notes: list[str] = []
    records, tuning = (_records(folder / name, notes, optional=True) for name in ("records.jsonl", "tuning.jsonl"))
    if records and (folder / UNFINISHED).exists():
        notes.append(f"{folder}: the run has not finished; the same flowprox evaluate command continues it")
    published = Published({}, {})
    if (folder / "recipe.yaml").is_file():
        try:
            published = read_published(folder / "recipe.yaml", _scales(records))
        except ValueError as error:  # the measured figures are worth a report all the same
            notes.append(f"{error}; published figures are left out")
    if any(record.get("scale") == SMOKE for record in _records(folder / "study.jsonl", notes, optional=True)):
        notes.append(f"{folder}: a study at scale smoke, which shows that it runs and nothing else")
    illustrations = _illustrations(folder / "figures", notes) if (folder / "figures").is_dir() else []
    return Evaluation("", [folder], records, tuning, published, illustrations, notes)


def _scales(records: Sequence[Mapping[str, Any]]) -> set[str]:
    return {str(record["scale"]) for record in records if record.get("scale")}


def _read_file(path: Path) -> Evaluation:
    notes: list[str] = []
    records = _records(path, notes)
    return Evaluation("", [path.parent], records, notes=notes)


def _records(path: Path, notes: list[str], optional: bool = False) -> list[dict[str, Any]]:
    if optional and not path.exists():
        return []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        records = read_records(path)
    notes += [str(warning.message) for warning in caught]
    return records


def _check(record: Mapping[str, Any], number: int, source: Path) -> None:
    missing = [key for key in _REQUIRED if key not in record]
    if missing:
        raise ValueError(
            f"{source}: record {number} lacks {', '.join(missing)}; make the records with flowprox evaluate or the demo"
        )
    for key in _NUMBERS:
        value = record.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{source}: {key} of record {number} must be a number, got {value!r}; mend the line")


def _illustrations(folder: Path, notes: list[str]) -> list[Illustration]:
    captions = _captions(folder / "figures.json")
    drawn = {path.name: path for path in sorted(folder.iterdir()) if path.suffix.lower() in _DRAWN}
    notes += [f"{folder / 'figures.json'} names {name}, which is not there" for name in captions if name not in drawn]
    found = []
    for name in ordered([*captions, *drawn]):
        if name in drawn:
            words = {key: str(value) for key, value in captions.get(name, {}).items()}
            title = words.get("title") or drawn[name].stem
            found.append(Illustration(drawn[name], title, words.get("caption", ""), words.get("alt") or title))
    return found


def _captions(path: Path) -> dict[str, dict[str, Any]]:
    if not path.is_file():
        return {}
    try:
        captions = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # includes UnicodeDecodeError
        raise ValueError(f"{path} is no JSON ({error}); mend it or remove it") from error
    if not isinstance(captions, dict) or not all(isinstance(words, dict) for words in captions.values()):
        raise ValueError(
            f'{path} must be {{"file.svg": {{"title": ..., "caption": ..., "alt": ...}}}}; mend it or remove it'
        )
    return captions


def _merged(members: Sequence[Evaluation]) -> Evaluation:
    first = members[0]
    if len(members) == 1:
        return first
    seen: set[tuple[str, ...]] = set()
    records, n_twice = [], 0
    for record in (record for member in members for record in member.records):
        key = tuple(json.dumps(record.get(k), sort_keys=True) for k in ("problem", "method", "image", "id", "seed"))
        n_twice += key in seen
        if key not in seen:
            records.append(record)
        seen.add(key)
    notes = [note for member in members for note in member.notes]
    if n_twice:
        notes.append(f"{n_twice} reconstructions stand in several folders; those of the folder named first are used")
    published = [member.published for member in members]
    return Evaluation(
        first.name,
        [folder for member in members for folder in member.folders],
        records,
        [record for member in members for record in member.tuning],
        Published(
            {key: value for one in reversed(published) for key, value in one.psnr.items()},
            {key: value for one in reversed(published) for key, value in one.sources.items()},
        ),
        [figure for member in members for figure in member.illustrations],
        notes,
    )


def _doubts(evaluation: Evaluation) -> list[str]:
    """What makes figures of one table hard to compare."""
    records = evaluation.records
    notes = []
    for what, value_of, consequence in _COMPARED:
        found = ordered(str(value) for record in records if (value := value_of(record)) is not None)
        if len(found) > 1:
            notes.append(f"{what} differ between records ({_few(found)}): {consequence}")
    if any(record.get("scale") == SMOKE for record in records):
        notes.append(
            "run at the scale smoke, which shows that everything works: few images, few iterations; "
            "no figure here compares with a published one"
        )
    measured: dict[tuple[str, str], set[str]] = {}
    for record in records:
        measured.setdefault((str(record["problem"]), str(record["image"])), set()).add(measurement_of(record))
    if parts := ordered(problem for (problem, _), measurements in measured.items() if len(measurements) > 1):
        notes.append(
            f"an image was measured in several ways (noise seeds, operators or contents) in {_few(parts)}: it counts once, "
            "with its mean, and methods are compared where they share the measurement"
        )
    tested = {str(record["image"]) for record in records}
    if both := ordered(
        str(name) for record in evaluation.tuning for name in record.get("images", ()) if name in tested
    ):
        notes.append(
            f"images for tuning are called as images of the test ({_few(both)}): if they are the same, the figures of what "
            "was tuned are too good"
        )
    failed = [record for record in records if "failed" in record]
    if failed:
        notes.append(f"{len(failed)} of {len(records)} reconstructions failed; they are listed with their messages")
    n_exact = sum("failed" not in record and "psnr" in record and record["psnr"] is None for record in records)
    if n_exact:
        notes.append(
            f"{n_exact} estimates have no finite PSNR, being equal to the truth; they are left out of its mean"
        )
    return notes


def _few(values: Sequence[str], n_shown: int = 4) -> str:
    more = len(values) - n_shown
    return ", ".join(values[:n_shown]) + (f" and {more} more" if more > 0 else "")


def ordered(values: Iterable[str]) -> list[str]:
    """Each value once, in the order of first occurrence."""
    return list(dict.fromkeys(values))


def _version(record: Mapping[str, Any], key: str) -> Any:
    return (record.get("versions") or {}).get(key)


_COMPARED: tuple[tuple[str, Callable[[Mapping[str, Any]], Any], str], ...] = (
    ("versions of flowprox", lambda r: r.get("version"), "the methods may have changed in between"),
    ("versions of torch", lambda r: _version(r, "torch"), "numbers may differ in the last digits, times more"),
    ("versions of deepinv", lambda r: _version(r, "deepinv"), "operators may have changed in between"),
    ("seeds of the run", lambda r: r.get("run_seed"), "the noise is not the same everywhere"),
    ("scales", lambda r: r.get("scale"), "images and iterations are not the same everywhere"),
    ("devices", lambda r: str(r.get("device")).partition(":")[0], "times and memory do not compare"),
)
