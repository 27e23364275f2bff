"""Single images: read, written and checked."""

from __future__ import annotations

import io
from os import PathLike
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from flowprox.data.decoding import as_float, deep_gray, is_deep, opaque, open_bytes, pixels_of, read_file
from flowprox.files import atomic_write

__all__ = ["check_image", "load_image", "save_image"]

StrPath = str | PathLike[str]


def load_image(path: StrPath, channels: int | None = None) -> Tensor:
    """Read an image file as float32 (C, H, W) in [0, 1].

    Transparent pixels are put on white. Gray 16-bit files keep their precision (color ones come from Pillow in
    8 bits); a TIFF of floats must hold values in [0, 1].

    Arguments:
        path: image file.
        channels: 3 turns gray into color, 1 color into gray (ITU-R 601); None keeps what the file has.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an image, damaged, or values outside [0, 1]; the message names the file.
    """
    if channels not in (None, 1, 3):
        raise ValueError(f"channels must be 1 (gray), 3 (color) or None (as in the file), got {channels}")
    image = open_bytes(read_file(Path(path)), str(path))
    if is_deep(image):
        gray = torch.from_numpy(deep_gray(image, str(path)))
        return gray[None].repeat(channels or 1, 1, 1)
    image = opaque(image)
    wanted = channels or (1 if image.mode in ("1", "L") else 3)
    return as_float(torch.from_numpy(pixels_of(image.convert("L" if wanted == 1 else "RGB"))))


def save_image(x: Tensor, path: StrPath) -> None:
    """Write an image as an 8-bit PNG file, whole or not at all.

    Arguments:
        x: (C, H, W) or (1, C, H, W), C 1 or 3; values are clipped to [0, 1].
        path: ends in .png; its folder must exist.

    Raises:
        ValueError: x is not one image, or holds NaN or infinity; the path does not end in .png.
        FileNotFoundError: the folder does not exist.
    """
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"path must end in .png, got {str(path)!r}")
    x = x.detach()
    if x.ndim == 4 and len(x) == 1:
        x = x[0]
    check_shape(x, "x", (3,))
    if not torch.isfinite(x).all():
        raise ValueError("x holds NaN or infinite values and cannot be written as an image")
    pixels = (x.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().permute(1, 2, 0).numpy()
    content = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(content, format="PNG")
    with atomic_write(path, mode="wb") as f:
        f.write(content.getvalue())


def check_image(x: Tensor, name: str = "x") -> Tensor:
    """Return x if it is an image or a batch of images with finite values in [0, 1], else say what is wrong.

    Arguments:
        x: floats, (C, H, W) or (B, C, H, W) with C 1 or 3.
        name: what the message calls it.

    Raises:
        ValueError: wrong dimensions, channels or type; NaN; values outside [0, 1].

    Example:
        >>> check_image(torch.full((3, 4, 4), 2.0))
        Traceback (most recent call last):
        ValueError: x holds values in [2, 2]; an image lies in [0, 1]: rescale or clamp it
    """
    check_shape(x, name, (3, 4))
    if not x.is_floating_point():
        raise ValueError(f"{name} has type {x.dtype}; an image holds floats in [0, 1]: divide 8-bit values by 255")
    check_finite(x, name)
    low, high = x.min().item(), x.max().item()
    if low < -1e-6 or high > 1 + 1e-6:
        remedy = "divide it by 255" if 2 < high <= 255 and low >= 0 else "rescale or clamp it"
        raise ValueError(f"{name} holds values in [{low:g}, {high:g}]; an image lies in [0, 1]: {remedy}")
    return x


def check_shape(x: Tensor, name: str, dims: tuple[int, ...]) -> None:
    """Raise unless x has one of these numbers of dimensions and 1 or 3 channels."""
    expected = " or ".join({3: "(C, H, W)", 4: "(B, C, H, W)"}[dim] for dim in dims)
    if x.ndim not in dims or 0 in x.shape:
        raise ValueError(f"{name} must have shape {expected}, got {tuple(x.shape)}")
    if x.shape[-3] not in (1, 3):
        raise ValueError(f"{name} must have 1 or 3 channels in shape {expected}, got {tuple(x.shape)}")


def check_finite(x: Tensor, name: str) -> None:
    """Raise if x holds NaN or infinity."""
    n = int((~torch.isfinite(x)).sum())
    if n:
        raise ValueError(f"{name} holds {n} NaN or infinite value(s); mend the file or mask these pixels")
