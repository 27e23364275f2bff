"""Pictures of a results folder: where they stand, how they get into a page, and maps of their errors.

    error map = mean over channels of |x_hat - x|,    black where it is 0, white where it reaches ``white``

Symbols: x true picture, x_hat picture of the estimate, both from PNG files with 8 bits, so clipped to [0, 1].
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.float64]

MEASUREMENT = "measurement"
"""Name of the method that returns the degraded input."""

HALF_WIDTHS = " half-widths"
"""Stands behind the name of a method in that of a map of its intervals."""

MAX_SIDE = 512
"""Larger pictures are reduced to this many pixels on the longer side."""

_WHITES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_MEDIA = {".png": "image/png", ".svg": "image/svg+xml"}


def file_stem(*parts: str) -> str:
    """A name for a file that holds the parts: as they are, or, with what a file system may refuse, told apart by a hash.

    Example:
        >>> file_stem("denoising", "a cat", "latent-map beta=1"), file_stem("a/b")
        ('denoising--a cat--latent-map beta=1', 'a-b-82badf67')
    """
    whole = "--".join(parts)
    plain = re.sub(r"[^\w .,=+@()\[\]-]", "-", whole)
    while len(plain.encode()) > 180:
        plain = plain[:-1]
    if plain == whole and not any("--" in part for part in parts):
        return plain
    content = "\0".join(parts).encode("utf-8", "surrogateescape")
    return f"{plain}-{hashlib.blake2b(content, digest_size=4).hexdigest()}"


def picture_path(folder: Path, problem: str, image: str, method: str) -> Path:
    """Where the reconstruction of an image by a method stands; any text is safe in a name."""
    return folder / "images" / f"{file_stem(problem, image, method)}.png"


def truth_path(folder: Path, image: str) -> Path:
    """Where the true image stands."""
    return folder / "images" / f"{file_stem(image)}.png"


def find_picture(folders: Sequence[Path], *parts: str) -> Path | None:
    """The picture of an image, or of (problem, image, method), in the first folder that has it."""
    paths = (folder / "images" / f"{file_stem(*parts)}.png" for folder in folders)
    return next((path for path in paths if path.is_file()), None)


def read_picture(path: Path) -> Pixels:
    """Pixels (H, W, 3) in [0, 1]; OSError for a file that is no picture."""
    with Image.open(path) as picture:
        picture = picture.convert("RGB")
        if max(picture.size) > MAX_SIDE:
            picture.thumbnail((MAX_SIDE, MAX_SIDE))
        return np.asarray(picture, dtype=np.float64) / 255


def error_white(errors: Sequence[Pixels]) -> float:
    """The error shown white: the smallest round one that 99 % of the pixels of the median map stay below."""
    highest = float(np.median([np.quantile(error, 0.99) for error in errors]))
    return next((white for white in _WHITES if highest <= white), _WHITES[-1])


def error_map(x_hat: Pixels, x: Pixels) -> Pixels:
    """Mean over channels of the absolute error, (H, W), of pictures (H, W, 3) of one size."""
    return np.abs(x_hat - x).mean(-1)


def data_uri(picture: Path | Pixels) -> str:
    """A picture as text for ``src``: a file as it is, pixels (H, W) or (H, W, 3) in [0, 1] as PNG."""
    if isinstance(picture, Path):
        content, media = picture.read_bytes(), _MEDIA[picture.suffix.lower()]
    else:
        file = io.BytesIO()
        Image.fromarray((picture.clip(0, 1) * 255).round().astype(np.uint8)).save(file, format="PNG", optimize=True)
        content, media = file.getvalue(), "image/png"
    return f"data:{media};base64,{base64.b64encode(content).decode('ascii')}"
