"""The images of an evaluation: the names, noise seeds and hashes they are recorded with, and the figures of an estimate."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from deepinv.physics import Physics
from torch import Tensor

from flowprox.data import ImageDataset
from flowprox.data.decoding import as_float, fitted
from flowprox.data.sources import entries_of_split
from flowprox.evaluation_options import SAMPLES, ImageOptions
from flowprox.metrics import best_scaled, psnr, ssim
from flowprox.operators import OneBitSensing
from flowprox.reconstruction import image_seed
from flowprox.samples import SAMPLES_FOLDER

__all__ = ["EvaluatedImage", "figures", "load_images"]

_SSIM_SIDE = 11


class EvaluatedImage(NamedTuple):
    name: str
    x: Tensor  # (C, H, W)
    seed: int
    hash: str


def load_images(options: ImageOptions, seed: int, limit: int | None) -> list[EvaluatedImage]:
    """The images that options describe, at most ``limit``; each with the seed of its noise under the run's ``seed``."""
    source = [SAMPLES_FOLDER / "*.png"] if options.source == SAMPLES else options.source
    n = min((n for n in (options.limit, limit) if n is not None), default=None)
    names, pixels = _as_they_are(source, options, n) if options.image_size is None else _of_one_size(source, options, n)
    images = []
    for name, values in zip(_short_names(names), pixels, strict=True):
        content = hashlib.blake2b(values.tobytes(), digest_size=8).hexdigest()
        images.append(EvaluatedImage(name, as_float(torch.from_numpy(values)), image_seed(seed, name), content))
    return images


def _of_one_size(source: Any, options: ImageOptions, n: int | None) -> tuple[list[str], list[np.ndarray]]:
    dataset = ImageDataset(source, options.image_size, options.split, channels=options.channels, limit=n)
    return dataset.names, list(dataset.images.numpy())


def _as_they_are(source: Any, options: ImageOptions, n: int | None) -> tuple[list[str], list[np.ndarray]]:
    entries = entries_of_split(source, options.split)[:n]
    return [e.name for e in entries], [fitted(e.read(), e.name, None, "center", options.channels) for e in entries]


def _short_names(names: Sequence[str]) -> list[str]:
    """File names without folders and suffixes where that leaves them distinct."""
    short = [Path(name).stem if "[" not in name else Path(name).name for name in names]
    if len(set(short)) == len(short):
        return short
    longer = ["/".join(Path(name).parts[-2:]) for name in names]
    return longer if len(set(longer)) == len(longer) else [f"{i}-{name}" for i, name in enumerate(short)]


def figures(x_hat: Tensor, x: Tensor, y: Tensor, physics: Physics) -> list[dict[str, Any]]:
    """Per image: PSNR clipped and not, SSIM, and the root mean square of y - A x_hat.

    One-bit measurements say nothing about brightness, so that every method's estimate is scaled to fit the truth first.
    """
    if x_hat.shape != x.shape:
        raise ValueError(f"the estimate has shape {tuple(x_hat.shape)}, the images {tuple(x.shape)}")
    if not torch.isfinite(x_hat).all():
        raise ArithmeticError("the estimate is not finite")
    with torch.no_grad():
        residual = (y - physics.A(x_hat)).abs().flatten(1).square().mean(1).sqrt()
    if isinstance(physics, OneBitSensing):
        x_hat = best_scaled(x_hat, x)
    columns: dict[str, Tensor] = {"psnr": psnr(x_hat, x), "psnr_unclipped": psnr(x_hat, x, clip=False)}
    if min(x.shape[-2:]) >= _SSIM_SIDE:
        columns["ssim"] = ssim(x_hat, x)
    columns["residual"] = residual
    lists = {key: values.cpu().tolist() for key, values in columns.items()}
    return [{key: values[i] for key, values in lists.items()} for i in range(len(x))]
