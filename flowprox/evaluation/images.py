"""The images of an evaluation: the names, noise seeds and hashes they are recorded with.

Seeds and hashes depend on no other image.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch
from torch import Tensor

from flowprox.data.datasets import entries_of_split
from flowprox.data.files import as_float, fitted
from flowprox.evaluation_options import SAMPLES, ImageOptions
from flowprox.samples import PORTRAITS, SAMPLES_FOLDER

__all__ = ["EvaluatedImage", "image_seed", "load_images"]


class EvaluatedImage(NamedTuple):
    """A test image x (C, H, W), what it is called, the seed of its noise and the hash of its pixels.

    ``group`` is the kind of picture, for those that ship with the package.
    """

    name: str
    x: Tensor
    seed: int
    hash: str
    group: str | None = None


def image_seed(seed: int, name: str) -> int:
    """Seed of an image's noise, below 2^62: it depends on the file's name without suffix, not on the other inputs.

    Example:
        >>> image_seed(0, "a") == image_seed(0, "a") != image_seed(1, "a")
        True
    """
    digest = hashlib.blake2b(f"{seed},{name}".encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


def load_images(options: ImageOptions, seed: int, limit: int | None) -> list[EvaluatedImage]:
    """The images that options describe, at most ``limit``; each with the seed of its noise under the run's ``seed``.

    An image is called as its file within its folder, without suffix; images that this leaves with one name also bear the hash
    of their pixels.
    """
    source = [str(SAMPLES_FOLDER / "*.png")] if options.source == SAMPLES else options.source
    n = min((n for n in (options.limit, limit) if n is not None), default=None)
    images = []
    for entry in entries_of_split(source, options.split)[:n]:
        pixels = fitted(entry.read(), entry.name, options.image_size, "center", options.channels)
        name = entry.key if entry.key.endswith("]") else str(PurePosixPath(entry.key).with_suffix(""))
        content = hashlib.blake2b(pixels.tobytes(), digest_size=8).hexdigest()
        x = as_float(torch.from_numpy(pixels))
        images.append(EvaluatedImage(name, x, image_seed(seed, name), content, _group(entry.name)))
    n_called = Counter(image.name.casefold() for image in images)
    return [
        image._replace(name=f"{image.name}-{image.hash[:6]}") if n_called[image.name.casefold()] > 1 else image
        for image in images
    ]


def _group(path: str) -> str | None:
    if Path(os.path.abspath(path)).parent != SAMPLES_FOLDER:
        return None
    return "portraits" if Path(path).stem in PORTRAITS else "other pictures"
