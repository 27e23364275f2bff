"""A set of images in memory."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from flowprox.data.decoding import as_float, fitted
from flowprox.data.images import StrPath
from flowprox.data.sources import SPLITS, Entry, entries_of_split, few

__all__ = ["ImageDataset"]


class ImageDataset(Dataset[dict[str, Tensor]]):
    """Images of one size from folders, files, shards or globs of them; items are ``{"x": image}``.

    Every image is turned upright (EXIF), put on white where it is transparent, converted to gray or color, cropped to
    its central square and resized with the Lanczos filter. It is kept in 8 bits.

    Splits: an image of a folder belongs to the split that a hash of its name chooses (``split_indices``), so that
    adding files moves none. Shards whose names begin with train, val or test carry their split in their name; in a
    folder of shards exactly ``train-*.npz`` is the split train, so that an extra set must be named.

    Arguments:
        source: folder (searched recursively), image file, .npz shard, glob of files, or a list of these.
        image_size: height and width in pixels; None keeps the images as they are, then all must have one size.
        split: "train", "val", "test", or "all".
        crop: "center" takes the central square, "stretch" the whole image, distorted where it is not square.
        patches: in place of that, cut so many squares of image_size at random places out of every image, at its own
            resolution; the places depend on the image's name alone.
        channels: 3 for color, 1 for gray.
        skip_corrupt: skip images that cannot be read, warn once and list them in ``skipped``.
        limit: read only the first so many images, or so many patches, evenly from all images.

    Attributes:
        images: all images, uint8 (N, C, H, W).
        names: N names, a path or ``shard.npz[i]``.
        skipped: names of the images that could not be read.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: no image or an unreadable one (the message names it), images of several sizes, an unknown option.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
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
        crop: str = "center",
        patches: int = 0,
        channels: int = 3,
        skip_corrupt: bool = False,
        limit: int | None = None,
    ) -> None:
        if split not in (*SPLITS, "all"):
            raise ValueError(f"split must be one of {', '.join(SPLITS)} or all, got {split!r}")
        if crop not in ("center", "stretch"):
            raise ValueError(f"crop must be 'center' or 'stretch', got {crop!r}")
        if channels not in (1, 3):
            raise ValueError(f"channels must be 1 (gray) or 3 (color), got {channels}")
        if image_size is not None and image_size < 1:
            raise ValueError(f"image_size must be a positive number of pixels, got {image_size}")
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be a positive number of images, got {limit}")
        if patches < 0 or (patches and image_size is None):
            raise ValueError(f"patches must be a number of squares of image_size, which must be given; got {patches}")
        entries = entries_of_split(source, split)
        if patches and limit is not None:
            patches = min(patches, math.ceil(limit / len(entries)))
        entries = entries[:limit]
        self.skipped: list[str] = []
        self.names: list[str] = []
        self.images = self._decode_all(entries, image_size, crop, patches, channels, skip_corrupt)[:limit]
        del self.names[len(self.images) :]
        if self.skipped:
            warnings.warn(
                f"skipped {len(self.skipped)} of {len(entries)} images, which cannot be read: {few(self.skipped)}",
                stacklevel=2,
            )

    def _decode_all(
        self,
        entries: Sequence[Entry],
        image_size: int | None,
        crop: str,
        patches: int,
        channels: int,
        skip_corrupt: bool,
    ) -> Tensor:
        images: np.ndarray | None = None
        per_image = max(1, patches)
        for entry in entries:
            try:
                image = fitted(entry.read(), entry.name, None if patches else image_size, crop, channels)[None]
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
                raise ValueError(
                    f"{entry.name} is {image.shape[2]}x{image.shape[3]} but {self.names[0]} is "
                    f"{images.shape[2]}x{images.shape[3]}; give an image_size"
                )
            images[len(self.names) : len(self.names) + per_image] = image
            self.names += [entry.name] if not patches else [f"{entry.name}[{i}]" for i in range(patches)]
        if images is None:
            raise ValueError(f"none of the {len(entries)} images can be read, the first is {entries[0].name}")
        return torch.from_numpy(images[: len(self.names)])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": as_float(self.images[index])}

    def batch(self, indices: Sequence[int] | Tensor) -> dict[str, Tensor]:
        """Several items at once: ``{"x": (B, C, H, W)}``, without a loop over images."""
        return {"x": as_float(self.images[torch.as_tensor(indices)])}


def _squares(image: np.ndarray, entry: Entry, size: int, n: int) -> np.ndarray:
    """n squares (n, C, size, size) of an image (C, H, W), at places that follow from the image's key."""
    _, height, width = image.shape
    if min(height, width) < size:
        raise ValueError(f"{entry.name} is {height}x{width}, too small for patches of {size}x{size}")
    random = np.random.default_rng(list(hashlib.sha256(entry.key.encode()).digest()))
    tops, lefts = random.integers(height - size + 1, size=n), random.integers(width - size + 1, size=n)
    return np.stack([image[:, i : i + size, j : j + size] for i, j in zip(tops, lefts, strict=True)])
