"""Masks of inpainting: 1 where a pixel is kept, 0 where it is hidden; of one problem (H, W), or one per image."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from deepinv.physics import Inpainting, LinearPhysics
from torch import Tensor


def center_mask(height: int, width: int, size: int | tuple[int, int] = 19) -> Tensor:
    """Mask (H, W) that hides a rectangle in the middle: 0 inside, 1 outside.

    The rectangle starts at ((H - h) // 2, (W - w) // 2): when it cannot be centered, it stands half a pixel up and left.

    Arguments:
        height, width: of the image, in pixels.
        size: side of the hidden square, or (h, w), in pixels; it leaves some of the image.

    Raises:
        ValueError: the rectangle is empty or does not leave a pixel of the image.

    Example:
        >>> center_mask(4, 4, 2).int().tolist()
        [[1, 1, 1, 1], [1, 0, 0, 1], [1, 0, 0, 1], [1, 1, 1, 1]]
    """
    pair = tuple(size) if isinstance(size, list | tuple) else (size, size)
    if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        raise ValueError(f"mask_size must be a positive number of pixels or a pair (h, w) of them, got {size!r}")
    h, w = pair
    if h > height or w > width or (h, w) == (height, width):
        hole, image = f"{h}x{w}", f"{height}x{width}"
        raise ValueError(f"mask_size {hole} does not fit in an image of {image}; choose one smaller than the image")
    top, left = (height - h) // 2, (width - w) // 2
    mask = torch.ones(height, width)
    mask[top : top + h, left : left + w] = 0.0
    return mask


def random_mask(height: int, width: int, keep: float = 0.5, seed: int = 0) -> Tensor:
    """Mask (H, W) that keeps exactly round(keep * H * W) pixels at random places: 1 kept, 0 hidden. ValueError for keep outside
    of (0, 1], or so small that no pixel is kept.

    Example:
        >>> int(random_mask(8, 8, keep=0.25).sum())
        16
    """
    if not isinstance(keep, int | float) or not 0.0 < keep <= 1.0:
        raise ValueError(f"keep must be a fraction of pixels in (0, 1], got {keep!r}")
    n = round(keep * height * width)
    if n == 0:
        raise ValueError(f"keep={keep} keeps no pixel of an image of {height}x{width}; use a larger keep")
    mask = torch.zeros(height * width)
    mask[torch.randperm(height * width, generator=torch.Generator().manual_seed(seed))[:n]] = 1.0
    return mask.view(height, width)


def checked_mask(mask: Tensor, image_shape: tuple[int, int, int]) -> Tensor:
    """The mask, or an error if it is no mask of ones and zeros for images of that shape."""
    if tuple(mask.shape) != image_shape[1:]:
        raise ValueError(f"mask has shape {tuple(mask.shape)} but the images are {image_shape[1]}x{image_shape[2]}")
    if not torch.isin(mask, torch.tensor([0.0, 1.0])).all():
        raise ValueError("mask must hold only 1 (kept) and 0 (hidden); threshold it first")
    if not mask.any():
        raise ValueError("mask hides every pixel; it must hold a 1 where a pixel is kept")
    return mask


def varied_masks(
    ranges: Mapping[str, tuple[float, float]], image_shape: tuple[int, int, int], n: int, generator: torch.Generator
) -> LinearPhysics:
    """Inpainting of n images with a mask each: a rectangle anywhere with sides in the range ``mask_size`` is hidden, or a
    fraction ``keep`` of the pixels is seen at random places; with both ranges half of the images, on average, have a rectangle.
    ValueError for a range that leaves no rectangle, no image or no pixel."""
    random = functools.partial(torch.rand, generator=generator, device=generator.device)
    height, width = image_shape[1:]
    masks = []
    if "mask_size" in ranges:
        low, high = ranges["mask_size"]
        if not 1 <= low <= high < min(height, width):
            between = f"between 1 and the image's sides {height, width}"
            raise ValueError(f"the range of mask_size must lie {between}; got {low:g} to {high:g}")
        spans = []
        for length in (height, width):
            side = (low + (high - low) * random(n)).round()
            start = ((length - side + 1) * random(n)).floor()
            at = torch.arange(length, device=generator.device)
            spans.append((at >= start[:, None]) & (at < (start + side)[:, None]))
        masks.append(1.0 - (spans[0][:, None, :, None] & spans[1][:, None, None, :]).float())
    if "keep" in ranges:
        low, high = ranges["keep"]
        if not 0 < low <= high <= 1:
            raise ValueError(f"the range of keep must lie in (0, 1]; got {low:g} to {high:g}")
        keep = low + (high - low) * random(n)
        masks.append((random(n, 1, height, width) < keep.view(n, 1, 1, 1)).float())
    mask = masks[0] if len(masks) == 1 else torch.where(random(n, 1, 1, 1) < 0.5, *masks)
    mask = mask.expand(n, *image_shape).contiguous()
    return Inpainting(img_size=image_shape, mask=mask, device=generator.device)  # pyright: ignore
