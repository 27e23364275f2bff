"""The 30 chest slices as 8-bit pictures of [-1024, 3071] Hounsfield units: 10 to train and tune on, 20 to test.

    python recipes/medical/slices.py ../shared/data/ct-chest30/ct-chest30.npz runs/ct --n 20 --seed 0

FOLDER/tune has slices 0 to 9, FOLDER/test 10 to 29, and FOLDER/train each of the ten --n times, moved at random.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import affine_transform


def moved(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(H, W) turned by up to 180 degrees, scaled by 0.8 to 1.2 and mirrored by chance; air where nothing was."""
    turn, scale = rng.uniform(-np.pi, np.pi), rng.uniform(0.8, 1.2)
    matrix = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) / scale
    matrix[:, 1] *= rng.choice([-1, 1])
    middle = (np.array(image.shape) - 1) / 2
    return affine_transform(image, matrix, middle - matrix @ middle, order=1, cval=-1024.0)


def save(image: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.round((image + 1024.0) / 4095 * 255).astype("u1")).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slices", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--n", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    for i, image in enumerate(np.load(options.slices)["hu"].astype(float)):
        save(image, options.folder / ("tune" if i < 10 else "test") / f"{i:02}.png")
        if i < 10:
            for k in range(options.n):
                save(moved(image, rng), options.folder / "train" / f"{i:02}-{k:02}.png")


if __name__ == "__main__":
    main()
