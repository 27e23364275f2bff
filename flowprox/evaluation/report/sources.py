"""What a report is made from: records, tuning, published figures and drawn figures of results folders.

Folders of one recipe are one chapter; records of different recipes never share a mean, also where one file or one name holds
both. What a reader should know before trusting the figures becomes a note; only what cannot be read is an error.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from flowprox.evaluation.plan import Published, read_published
from flowprox.naming import few
from flowprox.records import UNFINISHED, Record, read_records
from flowprox.summary import NUMBERS, figures_of

_NOTHING_PUBLISHED = Published({}, {})
SMOKE = "smoke"


class Illustration(NamedTuple):
    """A drawn figure of a results folder and what ``figures.json`` says about it."""

    path: Path
    title: str
    caption: str
    alt: str


@dataclass
class Chapter:
    """One chapter of a report, named as its recipe or folder: folders with pictures, records (each measurement and method
    once), a record of ``tuning`` per combination of options, and notes on what to know before trusting the figures."""

    name: str
    folders: list[Path]
    records: list[Record] = field(default_factory=list)
    tuning: list[Record] = field(default_factory=list)
    published: Published = _NOTHING_PUBLISHED
    illustrations: list[Illustration] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_chapters(sources: Sequence[str | Path], recipe: str | Path | None = None) -> list[Chapter]:
    """Everything that results folders or files of records hold, a chapter per recipe.

    ``recipe`` names the published figures of sources that have no ``recipe.yaml`` beside their records.

    Raises:
        FileNotFoundError: a source does not exist, or has neither records nor figures.
        ValueError: records or captions are damaged, one file holds two meanings of a label, a source is given twice, or the
            recipe is none.
    """
    if not sources:
        raise ValueError("no results folder is given; name one that flowprox evaluate wrote")
    paths = [Path(source) for source in sources]
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError("a results folder is given twice; name each once")
    if recipe is not None:
        read_published(Path(recipe))  # is it one?
    by_recipe: dict[str, list[Chapter]] = {}
    for one in (one for path in paths for one in _read(path, recipe)):
        by_recipe.setdefault(one.name, []).append(one)
    chapters = []
    for name, members in by_recipe.items():
        conflict = _conflict(record for member in members for record in member.records)
        if conflict is None:
            chapters.append(_merged(members) if len(members) > 1 else members[0])
            continue
        for member in members:
            member.name = f"{name} ({member.folders[0]})"
            member.notes.append(f"other records call themselves {name} too, but {conflict}: they are a chapter apart")
        chapters += members
    for chapter in chapters:
        chapter.notes += _doubts(chapter)
    return chapters


def _read(source: Path, recipe: str | Path | None) -> list[Chapter]:
    """The chapters of one source: one, unless it holds the records of several recipes."""
    if not source.exists():
        raise FileNotFoundError(f"no results at {source}; give a folder that flowprox evaluate wrote")
    chapter = Chapter("", [source if source.is_dir() else source.parent])
    if source.is_dir():
        _read_folder(source, chapter)
    else:
        chapter.records = _records(source, chapter.notes)
    if not chapter.records and not chapter.illustrations:
        raise FileNotFoundError(f"no records and no figures in {source}; flowprox evaluate --out {source} writes them")
    for number, record in enumerate(chapter.records, start=1):
        if missing := [key for key in ("problem", "method", "image") if key not in record]:
            raise ValueError(
                f"{source}: record {number} lacks {', '.join(missing)}; make the records with flowprox evaluate"
            )
        for key in NUMBERS:
            value = record.get(key)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise ValueError(f"{source}: {key} of record {number} must be a number, got {value!r}; mend the line")
    if (conflict := _conflict(chapter.records)) is not None:
        raise ValueError(f"{source} holds records of two recipes under one name: {conflict}; report them apart")
    scales = {str(record["scale"]) for record in chapter.records if record.get("scale")}
    if recipe is not None and not chapter.published.psnr:
        chapter.published = read_published(Path(recipe), scales)
    if scales == {SMOKE} and all(record.get("scale") for record in chapter.records):
        chapter.published = _NOTHING_PUBLISHED
    names = ordered(str(record["recipe"]) for record in chapter.records if record.get("recipe"))
    chapter.name = names[0] if names else source.resolve().stem
    if len(names) < 2:
        return [chapter]
    chapter.notes.append(f"{source} holds records of several recipes ({few(names)}); each is a chapter of its own")
    parts = {name: [r for r in chapter.records if str(r.get("recipe") or names[0]) == name] for name in names}
    others = [Chapter(name, chapter.folders, parts[name], notes=chapter.notes[-1:]) for name in names[1:]]
    return [replace(chapter, records=parts[names[0]]), *others]


def _read_folder(folder: Path, chapter: Chapter) -> None:
    notes = chapter.notes
    chapter.records, chapter.tuning = (_records(folder / name, notes) for name in ("records.jsonl", "tuning.jsonl"))
    if chapter.records and (folder / UNFINISHED).exists():
        notes.append(f"{folder}: the run has not finished; the same flowprox evaluate command continues it")
    if (folder / "recipe.yaml").is_file():
        scales = {str(record["scale"]) for record in chapter.records if record.get("scale")}
        try:
            chapter.published = read_published(folder / "recipe.yaml", scales)
        except ValueError as error:  # the measured figures are worth a report all the same
            notes.append(f"{error}; published figures are left out")
    if (folder / "figures").is_dir():
        chapter.illustrations = _illustrations(folder / "figures", notes)
    if chapter.illustrations and not chapter.records:
        drawn_from = (record for path in sorted(folder.glob("*.jsonl")) for record in _records(path, notes))
        if any(record.get("scale") == SMOKE for record in drawn_from):
            notes.append(f"{folder}: figures at scale smoke, which shows that a script runs and nothing else")


def _records(path: Path, notes: list[str]) -> list[Record]:
    """Those of a file, if there is one."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        records = read_records(path) if path.exists() else []
    notes += [str(warning.message) for warning in caught]
    return records


def _conflict(records: Iterable[Record]) -> str | None:
    """Two different things that go by one label, so that a mean over both would mean nothing; None without any."""
    seen: dict[tuple[str, str, str], str] = {}
    for record in records:
        problem, method = str(record["problem"]), str(record["method"])
        facts = {key: record.get(key) for key in ("problem_name", "parameters", "method_name", "model_hashes")}
        if "options" in record:
            tuned = record.get("tuned") or {}
            facts["options"] = {k: v for k, v in (record["options"] or {}).items() if k not in tuned}
        for key, value in facts.items():
            text = json.dumps(value, sort_keys=True, ensure_ascii=False)
            if value is not None and (first := seen.setdefault((problem, method, key), text)) != text:
                return f"{method} on {problem} has {key} {first} here and {text} there"
    return None


def _illustrations(folder: Path, notes: list[str]) -> list[Illustration]:
    words, captions = folder / "figures.json", {}
    if words.exists():
        try:
            captions = json.loads(words.read_text(encoding="utf-8"))
        except ValueError:
            captions = None
        if not isinstance(captions, dict) or not all(isinstance(one, dict) for one in captions.values()):
            form = '{"figure.svg": {"title": ..., "caption": ..., "alt": ...}}'
            raise ValueError(f"{words} must read {form}; mend it or remove it")
    paths = {path.name: path for path in sorted(folder.iterdir()) if path.suffix.lower() in (".svg", ".png")}
    notes += [f"{words} names {name}, which is not there" for name in captions if name not in paths]
    illustrations = []
    for name in ordered(name for name in [*captions, *paths] if name in paths):
        said = {key: str(value) for key, value in captions.get(name, {}).items()}
        title = said.get("title") or paths[name].stem
        illustrations.append(Illustration(paths[name], title, said.get("caption", ""), said.get("alt") or title))
    return illustrations


def _merged(members: Sequence[Chapter]) -> Chapter:
    """One chapter of several; what stands in the first holds."""
    merged, n_records = Chapter(members[0].name, []), 0
    seen: dict[str, Record] = {}
    for member in members:
        n_records += len(member.records)
        for record in member.records:
            place = [record.get(key) for key in ("problem", "method", "image", "id", "seed")]
            seen.setdefault(json.dumps(place, sort_keys=True), record)
        merged.folders += member.folders
        merged.tuning += member.tuning
        merged.illustrations += member.illustrations
        merged.notes += member.notes
        known, more = merged.published, member.published
        merged.published = Published({**more.psnr, **known.psnr}, {**more.sources, **known.sources})
    merged.records = list(seen.values())
    if n_twice := n_records - len(seen):
        merged.notes.append(
            f"{n_twice} reconstructions stand in several folders; those of the folder named first are used"
        )
    return merged


_COMPARED = {
    "version": ("versions of flowprox", "the methods may have changed in between"),
    "versions.torch": ("versions of torch", "numbers may differ in the last digits, times more"),
    "versions.deepinv": ("versions of deepinv", "operators may have changed in between"),
    "run_seed": ("seeds of the run", "the noise is not the same everywhere"),
    "scale": ("scales", "images and iterations are not the same everywhere"),
    "device": ("devices", "times and memory do not compare"),
}


def _doubts(chapter: Chapter) -> list[str]:
    """What makes figures of one table hard to compare."""
    records, notes = chapter.records, []
    for key, (what, consequence) in _COMPARED.items():
        part, _, library = key.partition(".")
        values = [(r.get(part) or {}).get(library) if library else r.get(part) for r in records]
        distinct = ordered(str(value).partition(":")[0] for value in values if value is not None)
        if len(distinct) > 1:
            notes.append(f"{what} differ between records ({few(distinct)}): {consequence}")
    if any(record.get("scale") == SMOKE for record in records):
        notes.append(
            "run at the scale smoke, which shows that everything works: few images, few iterations; "
            "no figure here compares with a published one"
        )
    figures = figures_of(records)
    n_measurements = figures.groupby(["problem", "image"], sort=False)["measurement"].nunique()
    if parts := ordered(str(place[0]) for place, n in n_measurements.items() if n > 1):  # type: ignore[index]
        how = "it counts once, with its mean, and methods are compared where they share the measurement"
        notes.append(
            f"an image was measured in several ways (noise seeds, operators or contents) in {few(parts)}: {how}"
        )
    tested = set(figures["image"])
    if both := ordered(str(name) for record in chapter.tuning for name in record.get("images", ()) if name in tested):
        caution = "if they are the same, the figures of what was tuned are too good"
        notes.append(f"images for tuning are called as images of the test ({few(both)}): {caution}")
    if n_failed := int(figures["failed"].notna().sum()):
        notes.append(f"{n_failed} of {len(records)} reconstructions failed; they are listed with their messages")
    if n_exact := int(figures["exact"].sum()):
        notes.append(
            f"{n_exact} estimates have no finite PSNR, being equal to the truth; they are left out of its mean"
        )
    return notes


def ordered(values: Iterable[str]) -> list[str]:
    """Each value once, in the order of first occurrence."""
    return list(dict.fromkeys(values))
