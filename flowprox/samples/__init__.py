"""Four small pictures, free to hand on, to try the package on: two portraits and two pictures no face model expects.

``SOURCES.md`` beside this file names photographer and license of each.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from flowprox.data import load_image

__all__ = ["PORTRAITS", "SAMPLES_FOLDER", "sample_images"]

SAMPLES_FOLDER = Path(__file__).parent
"""Where the PNG files are."""

PORTRAITS = ("astronaut", "grace-hopper")
"""Names of the pictures that are framed like the faces of CelebA-HQ."""

_OTHERS = ("coffee", "chelsea")


def sample_images() -> list[tuple[str, Tensor]]:
    """Name and image (3, H, W) in [0, 1] of every bundled picture: 64x64, and one of 96x128.

    Example:
        >>> [(name, tuple(x.shape[1:])) for name, x in sample_images()]
        [('astronaut', (64, 64)), ('grace-hopper', (64, 64)), ('coffee', (64, 64)), ('chelsea', (96, 128))]
    """
    return [(name, load_image(SAMPLES_FOLDER / f"{name}.png", channels=3)) for name in (*PORTRAITS, *_OTHERS)]
