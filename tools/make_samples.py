"""Makes the bundled pictures again from the images inside scikit-image and matplotlib.

Run it as ``python tools/make_samples.py``. Nothing is downloaded. ``SOURCES.md`` tells where each picture
comes from and why it may be handed on.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import matplotlib.cbook
import numpy as np
import skimage.data
import torch
from PIL import Image

from flowprox.data import save_image
from flowprox.samples import SAMPLES_FOLDER


class Crop(NamedTuple):
    """Box (left, top, right, bottom) in pixels of the original, and the size (height, width) it is resized to."""

    box: tuple[int, int, int, int]
    size: tuple[int, int]


# the portraits are framed as CelebA-HQ frames a face: eyes 47 % down, a quarter of the width apart
CROPS = {
    "astronaut": Crop((139, 20, 311, 192), (64, 64)),
    "grace-hopper": Crop((100, 35, 426, 361), (64, 64)),
    "coffee": Crop((110, 10, 490, 390), (64, 64)),
    "chelsea": Crop((25, 0, 425, 300), (96, 128)),
}


def originals() -> dict[str, Image.Image]:
    """The uncropped pictures, RGB."""
    hopper = matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    with Image.open(str(hopper)) as image:
        pictures = {"grace-hopper": image.convert("RGB")}
    for name in ("astronaut", "coffee", "chelsea"):
        pictures[name] = Image.fromarray(np.asarray(getattr(skimage.data, name)()))
    return pictures


def make_samples(folder: Path = SAMPLES_FOLDER) -> list[Path]:
    """Write one PNG per picture into ``folder`` and return their paths."""
    paths = []
    for name, picture in originals().items():
        height, width = CROPS[name].size
        small = picture.resize((width, height), Image.Resampling.LANCZOS, box=CROPS[name].box)
        paths.append(folder / f"{name}.png")
        save_image(torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 255, paths[-1])
    return paths


if __name__ == "__main__":
    print("\n".join(str(path) for path in make_samples()))
