"""A set of images in memory."""

from __future__ import annotations

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
        entries = entries_of_split(source, split)[:limit]
        self.skipped: list[str] = []
        self.names: list[str] = []
        self.images = self._decode_all(entries, image_size, crop, channels, skip_corrupt)
        if self.skipped:
            warnings.warn(
                f"skipped {len(self.skipped)} of {len(entries)} images, which cannot be read: {few(self.skipped)}",
                stacklevel=2,
            )

    def _decode_all(
        self, entries: Sequence[Entry], image_size: int | None, crop: str, channels: int, skip_corrupt: bool
    ) -> Tensor:
        images: np.ndarray | None = None
        for entry in entries:
            try:
                image = fitted(entry.read(), entry.name, image_size, crop, channels)
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
        return {"x": as_float(self.images[index])}

    def batch(self, indices: Sequence[int] | Tensor) -> dict[str, Tensor]:
        """Several items at once: ``{"x": (B, C, H, W)}``, without a loop over images."""
        return {"x": as_float(self.images[torch.as_tensor(indices)])}
