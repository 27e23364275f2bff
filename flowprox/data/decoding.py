"""From the bytes of an image file to its pixels."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

__all__ = ["as_float", "deep_gray", "fitted", "is_deep", "opaque", "open_bytes", "pixels_of", "read_file"]


def read_file(path: Path) -> bytes:
    """The bytes of a file, or an error that says what stands in its place."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give an image file")
    if not path.exists():
        raise FileNotFoundError(f"no file {str(path)!r}; check the path")
    return path.read_bytes()


def open_bytes(content: bytes, name: str) -> Image.Image:
    """The decoded image, turned upright."""
    try:
        image = Image.open(io.BytesIO(content))
        image.load()
        return ImageOps.exif_transpose(image)
    # Pillow's decoders raise all of these for damaged files
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        reason = "its content is of no image format" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise ValueError(f"{name} cannot be read as an image ({reason})") from error


def fitted(content: bytes, name: str, image_size: int | None, crop: str, channels: int) -> np.ndarray:
    """8-bit pixels (C, H, W) of an image file's content, cropped and resized.

    Raises:
        ValueError: it cannot be read; the message begins with ``name``.
    """
    image = open_bytes(content, name)
    if is_deep(image):
        image = Image.fromarray((deep_gray(image, name) * 255).round().astype(np.uint8))
    image = opaque(image).convert("L" if channels == 1 else "RGB")
    if image_size is None:
        return pixels_of(image)
    if crop == "center":
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    if image.size != (image_size, image_size):
        image = image.resize((image_size, image_size), Image.Resampling.LANCZOS)
    return pixels_of(image)


def opaque(image: Image.Image) -> Image.Image:
    """The image on white, where it is transparent."""
    if image.mode not in ("RGBA", "LA", "PA", "RGBa", "La") and "transparency" not in image.info:
        return image
    gray = image.mode in ("L", "LA", "La")
    over = image.convert("RGBA")
    white = Image.new("RGBA", over.size, "white")
    return Image.alpha_composite(white, over).convert("L" if gray else "RGB")


def is_deep(image: Image.Image) -> bool:
    """Whether it is gray with more than 8 bits."""
    return image.mode.startswith("I") or image.mode == "F"


def deep_gray(image: Image.Image, name: str) -> np.ndarray:
    """A 16-bit or float gray image as float32 (H, W) in [0, 1]."""
    values = np.asarray(image).astype(np.float32) / (1.0 if image.mode == "F" else 65535.0)
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
        raise ValueError(f"{name} holds values outside the range of an image; rescale them to 8 or 16 bits")
    return values


def pixels_of(image: Image.Image) -> np.ndarray:
    """The image as an array (C, H, W)."""
    array = np.array(image)
    return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))


def as_float(pixels: Tensor) -> Tensor:
    """8-bit pixels as float32 in [0, 1]."""
    return pixels.to(torch.float32) / 255
