"""Images from folders and shards, measurements from files, and the order in which training sees them.

Images are float32 tensors (C, H, W) in [0, 1]. A data set is decoded once, into one uint8 tensor, so that training
never waits for files; an image that cannot be read stops it with the file's name, or is skipped and reported.

A shard is an .npz file with two arrays: ``webp``, the bytes of all its images one after the other (any format that
Pillow reads; WebP by custom), and ``offsets``, whole numbers, where each image begins and the last one ends.
"""

from __future__ import annotations

import glob
import hashlib
import io
import math
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from flowprox.checkpoints import atomic_write

__all__ = [
    "ImageDataset",
    "ResumableSampler",
    "check_image",
    "load_image",
    "load_measurement",
    "save_image",
    "split_indices",
]

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"})
SPLITS = ("train", "val", "test")
FRACTIONS = (0.9, 0.05, 0.05)

StrPath = str | PathLike[str]


class _Entry(NamedTuple):
    """One image of a data set: its name, what its split is decided by, and how to read its bytes."""

    name: str
    key: str
    split: str | None
    read: Callable[[], bytes]


class ImageDataset(Dataset[dict[str, Tensor]]):
    """Images of one size from folders, files, shards or globs of them; items are ``{"x": image}``.

    Every image is turned upright (EXIF), put on white where it is transparent, converted to grey or colour, cropped to
    its central square and resized with the Lanczos filter. It is kept in 8 bits.

    Splits: an image of a folder belongs to the split that a hash of its name chooses (``split_indices``), so that
    adding files moves none. Shards whose names begin with train, val or test carry their split in their name; in a
    folder of shards exactly ``train-*.npz`` is the split train, so that an extra set must be named.

    Arguments:
        source: folder (searched recursively), image file, .npz shard, glob of files, or a list of these.
        image_size: height and width in pixels; None keeps the images as they are, then all must have one size.
        split: "train", "val", "test", or "all".
        crop: "centre" takes the central square, "stretch" the whole image, distorted where it is not square.
        channels: 3 for colour, 1 for grey.
        skip_corrupt: skip images that cannot be read, warn once and list them in ``skipped``.
        limit: read only the first so many images.

    Attributes:
        images: all images, uint8 (N, C, H, W).
        names: N names, a path or ``shard.npz[i]``.
        skipped: names of the images that could not be read.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: no image or an unreadable one (the message names it), images of several sizes, an unknown option.

    Example:
        >>> import tempfile
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
        crop: str = "centre",
        channels: int = 3,
        skip_corrupt: bool = False,
        limit: int | None = None,
    ) -> None:
        if split not in (*SPLITS, "all"):
            raise ValueError(f"split must be one of {', '.join(SPLITS)} or all, got {split!r}")
        if crop not in ("centre", "stretch"):
            raise ValueError(f"crop must be 'centre' or 'stretch', got {crop!r}")
        if channels not in (1, 3):
            raise ValueError(f"channels must be 1 (grey) or 3 (colour), got {channels}")
        if image_size is not None and image_size < 1:
            raise ValueError(f"image_size must be a positive number of pixels, got {image_size}")
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be a positive number of images, got {limit}")
        entries = _of_split(_entries(source, split), split)
        if not entries:
            raise ValueError(f"no image of the split {split!r} in {_shown(source)}; add images or use split='all'")
        self.skipped: list[str] = []
        self.names: list[str] = []
        self.images = self._decode_all(entries[:limit], image_size, crop, channels, skip_corrupt)
        if self.skipped:
            warnings.warn(
                f"skipped {len(self.skipped)} of {len(entries[:limit])} images, which cannot be read: "
                f"{_few(self.skipped)}",
                stacklevel=2,
            )

    def _decode_all(
        self, entries: Sequence[_Entry], image_size: int | None, crop: str, channels: int, skip_corrupt: bool
    ) -> Tensor:
        images: np.ndarray | None = None
        for entry in entries:
            try:
                image = _fitted(_open_bytes(entry.read(), entry.name), image_size, crop, channels)
            except ValueError as error:
                if not skip_corrupt:
                    raise ValueError(f"{error}; remove it or set skip_corrupt=True") from error
                self.skipped.append(entry.name)
                continue
            if images is None:
                images = np.empty((len(entries), *image.shape), dtype=np.uint8)
            if image.shape != images.shape[1:]:
                raise ValueError(
                    f"{entry.name} is {image.shape[1]}x{image.shape[2]} but {self.names[0]} is "
                    f"{images.shape[2]}x{images.shape[3]}; give an image_size"
                )
            images[len(self.names)] = image
            self.names.append(entry.name)
        if images is None:
            raise ValueError(f"none of the {len(entries)} images can be read, the first is {entries[0].name}")
        return torch.from_numpy(images[: len(self.names)])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": _as_float(self.images[index])}

    def batch(self, indices: Sequence[int] | Tensor) -> dict[str, Tensor]:
        """Several items at once: ``{"x": (B, C, H, W)}``, without a loop over images."""
        return {"x": _as_float(self.images[torch.as_tensor(indices)])}


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


class ResumableSampler(Sampler[list[int]]):
    """Batches of indices in an order that depends only on (seed, epoch), to be continued at any step.

    A batch sampler: ``DataLoader(dataset, batch_sampler=sampler)``. Each pass goes from the current position to the end
    of the epoch; the next one begins the next epoch. Under data-parallel training every process takes its share of each
    batch, so that a step sees the same images on any number of processes.

    A loader with worker processes asks for batches ahead of training: then restore with ``seek(step)``, which needs
    only the number of training steps done.

    Arguments:
        n: number of images.
        batch_size: images per step, over all processes.
        seed: of the order.
        rank: this process, 0 to world_size - 1.
        world_size: number of processes; it divides batch_size.
        shuffle: without it the order is 0 to n - 1 in every epoch.
        drop_last: leave out the last, smaller batch; otherwise it is filled up to a multiple of world_size from the
            epoch's first images.

    Raises:
        ValueError: a number out of range, or fewer images than one batch with drop_last.

    Example:
        >>> sampler = ResumableSampler(n=6, batch_size=2, seed=0)
        >>> whole = list(sampler)
        >>> sampler.seek(1)
        >>> list(sampler) == whole[1:]
        True
    """

    def __init__(
        self,
        n: int,
        batch_size: int = 1,
        seed: int = 0,
        *,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        drop_last: bool = True,
    ) -> None:
        if n < 1 or batch_size < 1:
            raise ValueError(f"n and batch_size must be positive, got n={n}, batch_size={batch_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in 0 .. world_size - 1, got rank={rank}, world_size={world_size}")
        if batch_size % world_size:
            raise ValueError(f"batch_size {batch_size} must be a multiple of world_size {world_size}")
        if drop_last and n < batch_size:
            raise ValueError(f"{n} images are fewer than one batch of {batch_size}; use a smaller batch_size")
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.shuffle, self.drop_last = shuffle, drop_last
        self.epoch = 0
        self.position = 0

    def __len__(self) -> int:
        """Batches in an epoch, wherever the position is."""
        return self.n // self.batch_size if self.drop_last else -(-self.n // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        self.seek(self.epoch * len(self) + self.position)  # a finished epoch rolls over
        order = self.order(self.epoch)
        while self.position < len(self):
            start = self.position * self.batch_size
            self.position += 1
            yield self._share(order, start)
        self.epoch, self.position = self.epoch + 1, 0

    def order(self, epoch: int) -> list[int]:
        """All n indices in the order of an epoch."""
        if not self.shuffle:
            return list(range(self.n))
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        return torch.randperm(self.n, generator=generator).tolist()

    def _share(self, order: list[int], start: int) -> list[int]:
        batch = order[start : start + self.batch_size]
        while len(batch) % self.world_size:
            batch += order[: self.world_size - len(batch) % self.world_size]
        share = len(batch) // self.world_size
        return batch[self.rank * share : (self.rank + 1) * share]

    def seek(self, step: int) -> None:
        """Go to where ``step`` batches since the start of training have been used."""
        if step < 0:
            raise ValueError(f"step must be at least 0, got {step}")
        self.epoch, self.position = divmod(step, len(self))

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch; inside that epoch already, stay."""
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0

    def state_dict(self) -> dict[str, int]:
        """Where it stands, and what the order depends on."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "n": self.n,
            "batch_size": self.batch_size,
            "seed": self.seed,
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue where ``state_dict`` was taken, on any number of processes.

        Raises:
            ValueError: the state belongs to other data or another batch size or seed.
        """
        for name in ("n", "batch_size", "seed"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"the saved order has {name}={state[name]}, this run has {getattr(self, name)}; "
                    f"continue with the same {name} or start a new run"
                )
        self.epoch, self.position = state["epoch"], state["position"]


# Single images and measurements --------------------------------------------------------------------------------------


def load_image(path: StrPath, channels: int | None = None) -> Tensor:
    """Read an image file as float32 (C, H, W) in [0, 1].

    Transparent pixels are put on white. Grey 16-bit files keep their precision (colour ones come from Pillow in
    8 bits); a TIFF of floats must hold values in [0, 1].

    Arguments:
        path: image file.
        channels: 3 turns grey into colour, 1 colour into grey (ITU-R 601); None keeps what the file has.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an image, damaged, or values outside [0, 1]; the message names the file.
    """
    if channels not in (None, 1, 3):
        raise ValueError(f"channels must be 1 (grey), 3 (colour) or None (as in the file), got {channels}")
    image = _open_bytes(_read_file(Path(path)), str(path))
    if image.mode.startswith("I") or image.mode == "F":
        grey = torch.from_numpy(_deep_grey(image, str(path)))
        return grey[None].repeat(channels or 1, 1, 1)
    image = _opaque(image)
    wanted = channels or (1 if image.mode in ("1", "L") else 3)
    return _as_float(torch.from_numpy(_pixels(image.convert("L" if wanted == 1 else "RGB"))))


def save_image(x: Tensor, path: StrPath) -> None:
    """Write an image as an 8-bit PNG file, whole or not at all.

    Arguments:
        x: (C, H, W) or (1, C, H, W), C 1 or 3; values are clipped to [0, 1].
        path: ends in .png; its folder must exist.

    Raises:
        ValueError: x is not one image, or holds NaN or infinity; the path does not end in .png.
        FileNotFoundError: the folder does not exist.
    """
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"path must end in .png, got {str(path)!r}")
    x = x.detach()
    if x.ndim == 4 and len(x) == 1:
        x = x[0]
    _check_shape(x, "x", (3,))
    if not torch.isfinite(x).all():
        raise ValueError("x holds NaN or infinite values and cannot be written as an image")
    pixels = (x.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().permute(1, 2, 0).numpy()
    content = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(content, format="PNG")
    with atomic_write(path, mode="wb") as f:
        f.write(content.getvalue())


def load_measurement(path: StrPath, channels: int | None = None) -> Tensor:
    """Read a measurement as float32 (B, C, H, W), in the units of images in [0, 1].

    Arguments:
        path: .npy array of floats, (H, W), (C, H, W) or (B, C, H, W), or an image file. Noise may leave [0, 1].
        channels: the number of channels that the model takes; None accepts 1 or 3.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an array, of objects or whole numbers, NaN, wrong dimensions or channels, values beyond 10.
    """
    file, name = Path(path), str(path)
    if file.suffix.lower() != ".npy":
        y = load_image(file)
    else:
        y = torch.from_numpy(_read_array(file))
    if y.ndim == 2:
        y = y[None]
    if y.ndim == 3 and y.shape[0] not in (1, 3) and y.shape[-1] in (1, 3):
        raise ValueError(f"{name} has shape {tuple(y.shape)}; channels come first: save array.transpose(2, 0, 1)")
    y = y[None] if y.ndim == 3 else y
    _check_shape(y, name, (4,))
    if channels is not None and y.shape[1] != channels:
        raise ValueError(
            f"{name} has {y.shape[1]} channel(s) but the model takes {channels}; convert it or use another model"
        )
    _check_finite(y, name)
    if y.abs().max() > 10:
        raise ValueError(
            f"{name} holds values up to {y.abs().max().item():g}; a measurement is in the units of images in [0, 1]: "
            "divide by 255 if it was made from 8-bit images"
        )
    return y


def check_image(x: Tensor, name: str = "x") -> Tensor:
    """Return x if it is an image or a batch of images with finite values in [0, 1], else say what is wrong.

    Arguments:
        x: floats, (C, H, W) or (B, C, H, W) with C 1 or 3.
        name: what the message calls it.

    Raises:
        ValueError: wrong dimensions, channels or type; NaN; values outside [0, 1].

    Example:
        >>> check_image(torch.full((3, 4, 4), 2.0))
        Traceback (most recent call last):
        ValueError: x holds values in [2, 2]; an image lies in [0, 1]: rescale or clamp it
    """
    _check_shape(x, name, (3, 4))
    if not x.is_floating_point():
        raise ValueError(f"{name} has type {x.dtype}; an image holds floats in [0, 1]: divide 8-bit values by 255")
    _check_finite(x, name)
    low, high = x.min().item(), x.max().item()
    if low < -1e-6 or high > 1 + 1e-6:
        remedy = "divide it by 255" if 2 < high <= 255 and low >= 0 else "rescale or clamp it"
        raise ValueError(f"{name} holds values in [{low:g}, {high:g}]; an image lies in [0, 1]: {remedy}")
    return x


def _check_shape(x: Tensor, name: str, dims: tuple[int, ...]) -> None:
    expected = " or ".join({3: "(C, H, W)", 4: "(B, C, H, W)"}[dim] for dim in dims)
    if x.ndim not in dims or 0 in x.shape:
        raise ValueError(f"{name} must have shape {expected}, got {tuple(x.shape)}")
    if x.shape[-3] not in (1, 3):
        raise ValueError(f"{name} must have 1 or 3 channels in shape {expected}, got {tuple(x.shape)}")


def _check_finite(x: Tensor, name: str) -> None:
    n = int((~torch.isfinite(x)).sum())
    if n:
        raise ValueError(f"{name} holds {n} NaN or infinite value(s); mend the file or mask these pixels")


def _read_array(path: Path) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}; check the path")
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is not a plain .npy array ({error}); write it with numpy.save, without objects"
        ) from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path} is an .npz archive; give one array written with numpy.save")
    if array.dtype.kind != "f":
        raise ValueError(
            f"{path} holds {array.dtype}; a measurement holds floats in the units of images in [0, 1]: "
            "divide 8-bit values by 255 and save as float32"
        )
    return np.ascontiguousarray(array, dtype=np.float32)


# Finding images ------------------------------------------------------------------------------------------------------


def _entries(source: StrPath | Sequence[StrPath], split: str) -> list[_Entry]:
    """All images of the sources, in the order of sources and file names."""
    sources = [source] if isinstance(source, str | PathLike) else list(source)
    if not sources:
        raise ValueError("source names no file; give a folder, an .npz shard or a glob")
    return [entry for one in sources for entry in _entries_of(Path(one), split)]


def _entries_of(source: Path, split: str) -> Iterator[_Entry]:
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


def _entries_of_folder(folder: Path, split: str) -> Iterator[_Entry]:
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


def _entries_of_file(path: Path, key: str) -> Iterable[_Entry]:
    if path.suffix.lower() == ".npz":
        return _entries_of_shard(path, key)
    return [_Entry(str(path), key, None, lambda: _read_file(path))]


def _entries_of_shard(path: Path, key: str) -> list[_Entry]:
    data, offsets = _read_shard(path)

    def reader(start: int, stop: int) -> Callable[[], bytes]:
        return lambda: data[start:stop].tobytes()

    return [
        _Entry(f"{path}[{i}]", f"{key}[{i}]", _named_split(path), reader(int(start), int(stop)))
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


def _of_split(entries: Sequence[_Entry], split: str) -> list[_Entry]:
    if split == "all":
        return list(entries)
    hashed = [i for i, entry in enumerate(entries) if entry.split is None]
    chosen = {hashed[j] for j in split_indices([entries[i].key for i in hashed])[split]}
    return [entry for i, entry in enumerate(entries) if entry.split == split or i in chosen]


def _shown(source: StrPath | Sequence[StrPath]) -> str:
    return str(source) if isinstance(source, str | PathLike) else _few([str(one) for one in source])


def _few(names: Sequence[str], n: int = 5) -> str:
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")


# Decoding ------------------------------------------------------------------------------------------------------------


def _read_file(path: Path) -> bytes:
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give an image file")
    if not path.exists():
        raise FileNotFoundError(f"no file {str(path)!r}; check the path")
    return path.read_bytes()


def _open_bytes(content: bytes, name: str) -> Image.Image:
    """The decoded image, turned upright."""
    try:
        image = Image.open(io.BytesIO(content))
        image.load()
        return ImageOps.exif_transpose(image)
    # Pillow's decoders raise all of these for damaged files
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        reason = "its content is of no image format" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise ValueError(f"{name} cannot be read as an image ({reason})") from error


def _fitted(image: Image.Image, image_size: int | None, crop: str, channels: int) -> np.ndarray:
    """8-bit pixels (C, H, W), cropped and resized."""
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray((_deep_grey(image, "it") * 255).round().astype(np.uint8))
    image = _opaque(image).convert("L" if channels == 1 else "RGB")
    if image_size is None:
        return _pixels(image)
    if crop == "centre":
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    if image.size != (image_size, image_size):
        image = image.resize((image_size, image_size), Image.Resampling.LANCZOS)
    return _pixels(image)


def _opaque(image: Image.Image) -> Image.Image:
    """The image on white, where it is transparent."""
    if image.mode not in ("RGBA", "LA", "PA", "RGBa", "La") and "transparency" not in image.info:
        return image
    grey = image.mode in ("L", "LA", "La")
    over = image.convert("RGBA")
    white = Image.new("RGBA", over.size, "white")
    return Image.alpha_composite(white, over).convert("L" if grey else "RGB")


def _deep_grey(image: Image.Image, name: str) -> np.ndarray:
    """A 16-bit or float grey image as float32 (H, W) in [0, 1]."""
    values = np.asarray(image).astype(np.float32) / (1.0 if image.mode == "F" else 65535.0)
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
        raise ValueError(f"{name} holds values outside the range of an image; rescale them to 8 or 16 bits")
    return values


def _pixels(image: Image.Image) -> np.ndarray:
    array = np.array(image)
    return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))


def _as_float(pixels: Tensor) -> Tensor:
    return pixels.to(torch.float32) / 255
