"""Which images there are in folders and shards, and which of them belong to a split.

A shard is an .npz file with two arrays: ``webp``, the bytes of all its images one after the other (any format that
Pillow reads; WebP by custom), and ``offsets``, whole numbers, where each image begins and the last one ends.
"""

from __future__ import annotations

import glob
import hashlib
import math
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flowprox.data.decoding import read_file
from flowprox.data.images import StrPath

__all__ = ["IMAGE_SUFFIXES", "SPLITS", "Entry", "entries_of_split", "split_indices"]

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"})
SPLITS = ("train", "val", "test")
FRACTIONS = (0.9, 0.05, 0.05)


class Entry(NamedTuple):
    """One image of a data set: its name, what its split is decided by, and how to read its bytes."""

    name: str
    key: str
    split: str | None
    read: Callable[[], bytes]


def entries_of_split(source: StrPath | Sequence[StrPath], split: str) -> list[Entry]:
    """The images of a split, in the order of sources and file names.

    Arguments:
        source: as ``ImageDataset`` takes it.
        split: one of ``SPLITS``, or "all".

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: no image of that split, or a damaged shard.
    """
    sources = [source] if isinstance(source, str | PathLike) else list(source)
    if not sources:
        raise ValueError("source names no file; give a folder, an .npz shard or a glob")
    entries = _of_split([entry for one in sources for entry in _entries_of(Path(one), split)], split)
    if not entries:
        shown = few([str(one) for one in sources])
        remedy = "give a folder of its own (data.validation)" if split == "val" else "use the split 'all'"
        raise ValueError(f"no image of the split {split!r} in {shown}; add images, or {remedy}")
    return entries


def _entries_of(source: Path, split: str) -> Iterator[Entry]:
    if source.is_dir():
        yield from _entries_of_folder(source, split)
    elif source.is_file():
        yield from _entries_of_file(source, source.name)
    else:
        matches = sorted(glob.glob(str(source), recursive=True))
        if not matches:
            raise FileNotFoundError(f"source {str(source)!r}: no such file or folder, and no file matches it as a glob")
        for match in map(Path, matches):
            yield from _entries_of_folder(match, split) if match.is_dir() else _entries_of_file(match, match.name)


def _entries_of_folder(folder: Path, split: str) -> Iterator[Entry]:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    images = [p for p in files if p.suffix.lower() in IMAGE_SUFFIXES]
    shards = [p for p in files if p.suffix.lower() == ".npz"]
    if not images and not shards:
        suffixes = " ".join(sorted(IMAGE_SUFFIXES))
        raise ValueError(f"source {str(folder)!r} holds no images; expected files ending in {suffixes} or .npz")
    if not images and split != "all" and any(_named_split(p) for p in shards):
        shards = [p for p in shards if re.match(rf"{split}[-.]", p.name)]
    for path in images or shards:
        yield from _entries_of_file(path, path.relative_to(folder).as_posix())


def _entries_of_file(path: Path, key: str) -> Iterable[Entry]:
    if path.suffix.lower() == ".npz":
        return _entries_of_shard(path, key)
    return [Entry(str(path), key, None, lambda: read_file(path))]


def _entries_of_shard(path: Path, key: str) -> list[Entry]:
    data, offsets = _read_shard(path)

    def reader(start: int, stop: int) -> Callable[[], bytes]:
        return lambda: data[start:stop].tobytes()

    return [
        Entry(f"{path}[{i}]", f"{key}[{i}]", _named_split(path), reader(int(start), int(stop)))
        for i, (start, stop) in enumerate(pairwise(offsets))
    ]


def _read_shard(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            if not {"webp", "offsets"} <= set(archive.files):
                raise ValueError(f"it holds {', '.join(archive.files) or 'nothing'}, not webp and offsets")
            data, offsets = archive["webp"], archive["offsets"]
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, zipfile.LargeZipFile) as error:
        raise ValueError(f"{path} is not a shard of images ({error}); make it anew or leave it out") from error
    sound = (
        data.dtype == np.uint8
        and data.ndim == offsets.ndim == 1
        and offsets.dtype.kind in "iu"
        and len(offsets) > 1
        and offsets[0] >= 0
        and (np.diff(offsets.astype(np.int64)) >= 0).all()
        and offsets[-1] <= len(data)
    )
    if not sound:
        raise ValueError(f"{path}: offsets do not fit the {len(data)} bytes of webp; make the shard anew")
    return data, offsets


def _named_split(path: Path) -> str | None:
    match = re.match("train|val|test", path.name)
    return match.group() if match else None


def _of_split(entries: Sequence[Entry], split: str) -> list[Entry]:
    if split == "all":
        return list(entries)
    hashed = [i for i, entry in enumerate(entries) if entry.split is None]
    chosen = {hashed[j] for j in split_indices([entries[i].key for i in hashed])[split]}
    return [entry for i, entry in enumerate(entries) if entry.split == split or i in chosen]


def split_indices(
    names: Sequence[str], fractions: tuple[float, float, float] = FRACTIONS, seed: int = 0
) -> dict[str, list[int]]:
    """Which of the names belong to train, val and test, decided for each name alone by its hash.

    Adding or removing names moves no other one; the parts have the fractions' sizes only on average.

    Arguments:
        names: one per image, as stable as possible (a path inside the data set's folder).
        fractions: of train, val and test; they sum to 1.
        seed: another seed gives another split.

    Raises:
        ValueError: fractions that are negative or do not sum to 1.

    Example:
        >>> parts = split_indices([f"{i}.png" for i in range(1000)])
        >>> [len(part) for part in parts.values()]
        [913, 40, 47]
    """
    if len(fractions) != 3 or min(fractions) < 0 or not math.isclose(sum(fractions), 1.0, abs_tol=1e-6):
        raise ValueError(f"fractions must be three numbers of at least 0 that sum to 1, got {fractions}")
    parts: dict[str, list[int]] = {split: [] for split in SPLITS}
    for index, name in enumerate(names):
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        u = int.from_bytes(digest[:8], "big") / 2**64
        parts["train" if u < fractions[0] else "val" if u < fractions[0] + fractions[1] else "test"].append(index)
    return parts


def few(names: Sequence[str], n: int = 5) -> str:
    """The first n names and how many more there are."""
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")
