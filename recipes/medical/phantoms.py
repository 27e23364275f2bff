"""Random phantoms to train on where no medical images may be had: nested ellipses with texture, gray PNGs.

python recipes/medical/phantoms.py runs/phantoms --n 400 --size 256 --seed 0
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--n", type=int, default=400)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for i in range(options.n):
        image = phantom(options.size, np.random.default_rng([options.seed, i]))
        Image.fromarray(image).save(options.folder / f"{i:04}.png")


if __name__ == "__main__":
    main()
