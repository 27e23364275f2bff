"""Random phantoms to train on where no medical images may be had, gray PNGs: bodies of nested ellipses with texture, and heads,
layers around a brain whose cortex is folded, as bright as scanners leave them.

    python recipes/medical/phantoms.py runs/phantoms --n 400 --size 256 --seed 0
    python recipes/medical/phantoms.py runs/heads --kind head --n 600
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import distance_transform_edt, gaussian_filter


def ellipse(size: int, rng: np.random.Generator, radius: float, spread: float) -> np.ndarray:
    """(H, W) of zeros and ones: an ellipse of about ``radius``, turned, its middle up to ``spread`` from the image's."""
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    turn, center = rng.uniform(0, np.pi), rng.uniform(-spread, spread, 2)
    u = (x - center[0]) * np.cos(turn) + (y - center[1]) * np.sin(turn)
    v = (y - center[1]) * np.cos(turn) - (x - center[0]) * np.sin(turn)
    a, b = radius * rng.uniform(0.6, 1.0, 2)
    wave = 1 + rng.uniform(0, 0.15) * np.sin(rng.integers(2, 9) * np.arctan2(v, u) + rng.uniform(0, 6))
    return ((u / a) ** 2 + (v / b) ** 2 < wave).astype(float)


def texture(size: int, rng: np.random.Generator) -> np.ndarray:
    """(H, W) of mean zero and standard deviation one, smooth at a random scale."""
    field = gaussian_filter(rng.standard_normal((size, size)), np.exp(rng.uniform(0, 2.5)))
    return field / field.std()


def phantom(size: int, rng: np.random.Generator) -> np.ndarray:
    """(H, W) uint8: a body with a rim in black, up to 60 parts inside it, some folded as a brain's cortex is."""
    body = ellipse(size, rng, rng.uniform(0.75, 1.0), 0.05)
    image = body * rng.uniform(0.2, 0.7)
    folded = texture(size, rng) + 0.3 * texture(size, rng)
    image += body * rng.uniform(0, 0.3) * (np.abs(folded) < rng.uniform(0.1, 0.6))
    for _ in range(rng.integers(10, 60)):
        part = ellipse(size, rng, np.exp(rng.uniform(-3.5, -0.7)), 0.8) * body
        image += part * rng.normal(0, 0.2)
    inner = gaussian_filter(body, size * rng.uniform(0.005, 0.03)) > rng.uniform(0.55, 0.98)
    image += (body - inner * body) * rng.uniform(-0.2, 0.6)  # the rim
    image += body * (0.03 * rng.random() * texture(size, rng) + 0.02 * rng.random() * texture(size, rng))
    image = gaussian_filter(np.clip(image, 0, None) * body, rng.uniform(0.4, 1.0))
    return np.round(255 * np.clip(image / max(image.max(), 1.0), 0, 1)).astype("u1")


def head(size: int, rng: np.random.Generator) -> np.ndarray:
    """(H, W) uint8: skin, fat, skull and liquid around a brain of white matter, gray matter along its furrows, and ventricles,
    under the uneven brightness and the noise of a scanner."""
    body = ellipse(size, rng, rng.uniform(0.7, 1.1), 0.15)
    depth = distance_transform_edt(body) / size  # from the skin inwards
    borders = np.cumsum(rng.uniform([0.0, 0.005, 0.005, 0.0], [0.015, 0.03, 0.03, 0.02]))
    borders = borders[:, None, None] + 0.004 * texture(size, rng)
    levels = rng.uniform([0.3, 0.4, 0.0, 0.0], [0.8, 1.0, 0.25, 0.3])  # of skin, fat, skull, liquid
    liquid, white = levels[3], rng.uniform(0.4, 0.9)
    gray = white * rng.uniform(0.6, 0.95) if rng.random() < 0.8 else white * rng.uniform(1.05, 1.3)
    scale = rng.uniform(4.0, 10.0)
    coarse, fine = (gaussian_filter(rng.standard_normal((size, size)), s) for s in (scale, scale / 2))
    folds = coarse + 0.5 * fine
    furrow = np.abs(folds / folds.std())
    inwards = np.clip(1 - (depth - borders[3]) / rng.uniform(0.06, 0.25), 0, 1)  # 1 at the brain's surface
    cortex = np.maximum(inwards, rng.uniform(0.0, 0.3)) ** 0.5
    image = np.where(furrow < rng.uniform(0.3, 0.6) * cortex, gray, white)
    image = np.where(furrow < rng.uniform(0.03, 0.2) * inwards, liquid, image)
    for _ in range(rng.integers(0, 4)):
        image = np.where(ellipse(size, rng, rng.uniform(0.05, 0.25), 0.3) * (texture(size, rng) > -0.7), liquid, image)
    for _ in range(rng.integers(5, 30)):
        image = image + ellipse(size, rng, np.exp(rng.uniform(-4.0, -1.0)), 0.8) * rng.normal(0, 0.12)
    image = image + rng.uniform(0.0, 0.03) * texture(size, rng)
    for border, level in zip(borders[::-1], levels[::-1], strict=True):
        image = np.where(depth < border, level * (1 + 0.1 * texture(size, rng)), image)
    image = gaussian_filter(np.clip(image, 0, None) * body, rng.uniform(0.3, 0.9))
    uneven = gaussian_filter(rng.standard_normal((size, size)), size / 5)
    image = image * np.exp(rng.uniform(0.0, 0.4) * uneven / uneven.std()) * rng.uniform(0.3, 1.0)
    noise = rng.uniform(0.0, 0.015) * rng.standard_normal((2, size, size))
    return np.round(255 * np.clip(np.hypot(image + noise[0], noise[1]), 0, 1)).astype("u1")


KINDS = {"body": phantom, "head": head}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", choices=sorted(KINDS), default="body")
    parser.add_argument("--n", type=int, default=400)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for i in range(options.n):
        image = KINDS[options.kind](options.size, np.random.default_rng([options.seed, i]))
        Image.fromarray(image).save(options.folder / f"{i:04}.png")


if __name__ == "__main__":
    main()
