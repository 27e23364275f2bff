"""A set of images in memory: which images there are in folders and shards, and which of them belong to a split.

A shard is an .npz file with two arrays: ``webp``, the bytes of all its images one after the other (any format that
Pillow reads; WebP by custom), and ``offsets``, whole numbers, where each image begins and the last one ends.
"""

from __future__ import annotations

import glob
import hashlib
import math
import os
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatch
from functools import partial
from itertools import pairwise
from os import PathLike
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from flowprox.data.files import StrPath, as_float, fitted, read_file
from flowprox.naming import few, require_choice, require_count
from flowprox.operators.sensing import check_free

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"})
SPLITS = ("train", "val", "test")
FRACTIONS = (0.9, 0.05, 0.05)
_RECORDS = ("records.jsonl", "records.jsonl.partial", "metrics.jsonl")


class ImageDataset(Dataset[dict[str, Tensor]]):
    """Images of one size from folders, files, shards or globs of them, in 8 bits; items are ``{"x": image}``.

    Every image is turned upright (EXIF), converted to sRGB, put on white where it is transparent, converted to gray or color,
    cropped to its central square and resized with the Lanczos filter. A folder is searched recursively, linked folders too;
    hidden files and folders and results of flowprox are left out, the last with a warning. FileNotFoundError where nothing is
    there; ValueError for no image, an unreadable one, which it names, or several sizes.

    Splits: an image of a folder belongs to the split that a hash of its name chooses (``split_indices``). Shards whose names
    begin with train, val or test carry their split in their name; in a folder exactly ``train-*.npz`` is the split train.

    Arguments:
        source: folder (searched recursively), image file, .npz shard, glob of files, or a list of these.
        image_size: height and width in pixels; None keeps the images as they are, then all must have one size.
        split: "train", "val", "test", or "all".
        patches: in place of the central square, cut so many squares of image_size at random places out of every image, at
            its own resolution; the places depend on the image's name alone.
        channels: 3 for color, 1 for gray.
        skip_corrupt: skip images that cannot be read, warn once and list them in ``skipped``.
        limit: read only the first so many images, or so many patches, evenly from all images.

    Attributes:
        images: all images, uint8 (N, C, H, W).
        names: N names, a path or ``shard.npz[i]``.
        skipped: names of the images that could not be read.

    Example:
        >>> import tempfile
        >>> from pathlib import Path, PurePath
        >>> from flowprox.data import save_image
        >>> folder = Path(tempfile.mkdtemp())
        >>> save_image(torch.rand(3, 20, 30), folder / "a.png")
        >>> ImageDataset(folder, image_size=16)[0]["x"].shape
        torch.Size([3, 16, 16])
    """

    def __init__(
        self,
        source: StrPath | Sequence[StrPath],
        image_size: int | None = 64,
        split: str = "all",
        *,
        patches: int = 0,
        channels: int = 3,
        skip_corrupt: bool = False,
        limit: int | None = None,
    ) -> None:
        require_choice("split", split, (*SPLITS, "all"))
        require_choice("channels", channels, (1, 3))
        require_count("image_size", 1 if image_size is None else image_size)
        require_count("limit", 1 if limit is None else limit)
        if patches < 0 or (patches and image_size is None):
            raise ValueError(f"patches must be a number of squares of image_size, which must be given; got {patches}")
        entries = entries_of_split(source, split)
        if patches and limit is not None:
            patches = min(patches, math.ceil(limit / len(entries)))
        entries = entries[:limit]
        self.skipped: list[str] = []
        self.names: list[str] = []
        images: np.ndarray | None = None
        per_image = max(1, patches)
        for entry in entries:
            try:
                image = fitted(entry.read(), entry.name, None if patches else image_size, channels)[None]
                if patches:
                    image = _squares(image[0], entry, image_size or 1, patches)
            except ValueError as error:
                if not skip_corrupt:
                    raise ValueError(f"{error}; remove it or set skip_corrupt=True") from error
                self.skipped.append(entry.name)
                continue
            if images is None:
                images = np.empty((len(entries) * per_image, *image.shape[1:]), dtype=np.uint8)
            if image.shape[1:] != images.shape[1:]:
                own, first = ("{2}x{3}".format(*one.shape) for one in (image, images))
                raise ValueError(f"{entry.name} is {own} but {self.names[0]} is {first}; give an image_size")
            images[len(self.names) : len(self.names) + per_image] = image
            self.names += [entry.name] if not patches else [f"{entry.name}[{i}]" for i in range(patches)]
        if images is None:
            raise ValueError(f"none of the {len(entries)} images can be read, the first is {entries[0].name}")
        self.images = torch.from_numpy(images[: len(self.names)])[:limit]
        del self.names[len(self.images) :]
        if self.skipped:
            n = f"{len(self.skipped)} of {len(entries)} images"
            warnings.warn(f"skipped {n}, which cannot be read: {few(self.skipped)}", stacklevel=2)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": as_float(self.images[index])}


def _squares(image: np.ndarray, entry: Entry, size: int, n: int) -> np.ndarray:
    """n squares (n, C, size, size) of an image (C, H, W), at places that follow from the image's key."""
    _, height, width = image.shape
    if min(height, width) < size:
        raise ValueError(f"{entry.name} is {height}x{width}, too small for patches of {size}x{size}")
    random = np.random.default_rng(list(hashlib.sha256(os.fsencode(entry.key)).digest()))
    tops, lefts = random.integers(height - size + 1, size=n), random.integers(width - size + 1, size=n)
    return np.stack([image[:, i : i + size, j : j + size] for i, j in zip(tops, lefts, strict=True)])


# Sources --------------------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """One image of a data set: its name, what its split is decided by, and how to read its bytes."""

    name: str
    key: str
    split: str | None
    read: Callable[[], bytes]


def entries_of_split(source: StrPath | Sequence[StrPath], split: str) -> list[Entry]:
    """The images of a split, in the order of sources and file names; arguments and errors as those of ``ImageDataset``."""
    sources = [source] if isinstance(source, str | PathLike) else list(source)
    if not sources:
        raise ValueError("source names no file; give a folder, an .npz shard or a glob")
    known = [entry for one in sources for entry in _entries_of(Path(one), split)]
    if split == "all":
        return known
    hashed = [i for i, entry in enumerate(known) if entry.split is None]
    chosen = {hashed[j] for j in split_indices([known[i].key for i in hashed])[split]}
    entries = [entry for i, entry in enumerate(known) if entry.split == split or i in chosen]
    if not entries:
        none = (
            f"none of the {len(known)} image(s) in {few([str(one) for one in sources])} falls into the split {split!r}"
        )
        decided = f"which their names decide and which is {FRACTIONS[SPLITS.index(split)]:.0%} of them on average"
        remedy = "give others to validate on with data.validation" if split == "val" else "use the split 'all'"
        raise ValueError(f"{none}, {decided}; add images, or {remedy}")
    return entries


def check_apart(out: StrPath, source: StrPath | Sequence[StrPath]) -> None:
    """Raise ``ValueError`` if pictures that a run writes to ``out`` would be among these images at its next start."""
    picture = str(Path(out).resolve() / "samples.png")
    for one in [source] if isinstance(source, str | PathLike) else source:
        pattern = str(Path(one).resolve()) + ("/**/*" if Path(one).is_dir() else "")
        if fnmatch(picture, pattern.replace("/**/", "/")) if "**" in pattern else PurePath(picture).match(pattern):
            raise ValueError(f"out {out} lies among the images of {one}, its own would be too; choose another")


def _entries_of(source: Path, split: str) -> Iterator[Entry]:
    if source.is_dir():
        yield from _entries_of_folder(source, split)
    elif source.exists():
        yield from _entries_of_file(source, source.name)
    else:
        matches = [Path(match) for match in sorted(glob.glob(str(source), recursive=True))]
        named = source.parents  # folders of results count where the pattern names them
        matches = [one for one in matches if not any(f not in named and _is_result(f) for f in (one, *one.parents))]
        if not matches:
            raise FileNotFoundError(f"source {str(source)!r}: no such file or folder, and no file matches it as a glob")
        for match in matches:
            yield from _entries_of_folder(match, split) if match.is_dir() else _entries_of_file(match, match.name)


def _is_result(folder: Path) -> bool:
    """Whether flowprox wrote it: what is in it are no pictures to learn from or to test with. Says so."""
    if not any((folder / name).exists() for name in _RECORDS):
        return False
    warnings.warn(f"{folder} holds results of flowprox and is left out; name it to use it", stacklevel=2)
    return True


def _files_below(folder: Path, entered: set[Path]) -> Iterator[Path]:
    """Regular files in a folder and its folders, linked ones once, but for hidden ones and results of flowprox."""
    entered.add(folder.resolve())
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if path.resolve() not in entered and not _is_result(path):
                yield from _files_below(path, entered)
        elif path.is_file():
            yield path


def _entries_of_folder(folder: Path, split: str) -> Iterator[Entry]:
    files = sorted(_files_below(folder, set()))
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
    if path.suffix.lower() != ".npz":
        return [Entry(str(path), key, None, partial(read_file, path))]
    data, offsets = _read_shard(path)
    return [
        Entry(f"{path}[{i}]", f"{key}[{i}]", _named_split(path), data[int(start) : int(stop)].tobytes)
        for i, (start, stop) in enumerate(pairwise(offsets))
    ]


def _read_shard(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            if not {"webp", "offsets"} <= set(archive.files):
                raise ValueError(f"it holds {', '.join(archive.files) or 'nothing'}, not webp and offsets")
            for name in ("webp", "offsets"):
                _check_member(archive.zip, f"{name}.npy")
            data, offsets = archive["webp"], archive["offsets"]
    except (ValueError, EOFError, OSError, KeyError, zipfile.BadZipFile, zipfile.LargeZipFile) as error:
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


def _check_member(archive: zipfile.ZipFile, name: str) -> None:
    """Raise if an array declares more numbers than the archive holds, or more than the memory."""
    with archive.open(name) as file:
        version = np.lib.format.read_magic(file)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = header(file)
    declared, size = math.prod(shape) * dtype.itemsize, archive.getinfo(name).file_size
    if not dtype.hasobject and declared > size:
        raise ValueError(f"{name} declares {declared:,} bytes and holds {size:,}")
    check_free(size, name)


def _named_split(path: Path) -> str | None:
    match = re.match("train|val|test", path.name)
    return match.group() if match else None


def split_indices(names: Sequence[str]) -> dict[str, list[int]]:
    """Which of the names belong to train, val and test, decided for each name alone by its hash.

    Adding or removing names moves no other one; on average the parts are 90, 5 and 5 percent.

    Example:
        >>> parts = split_indices([f"{i}.png" for i in range(1000)])
        >>> [len(part) for part in parts.values()]
        [913, 40, 47]
    """
    parts: dict[str, list[int]] = {split: [] for split in SPLITS}
    for index, name in enumerate(names):
        digest = hashlib.sha256(os.fsencode(f"0:{name}")).digest()
        u = int.from_bytes(digest[:8], "big") / 2**64
        parts["train" if u < FRACTIONS[0] else "val" if u < FRACTIONS[0] + FRACTIONS[1] else "test"].append(index)
    return parts
