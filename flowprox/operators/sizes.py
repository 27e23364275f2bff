r"""Measurements of a size a network does not take, extended to one it does.

A network needs sides that are multiples of its divisor. A measurement y = A x + n of another size is extended, and with
it the operator, so that the extended image still satisfies the extended equation exactly:

    denoising    y and noise mirrored                                       A = identity
    inpainting   y and mask mirrored alike                                  A = mirrored mask
    deblurring   y continued as the boundary has it; A = M (k *), M = 1 where the continued y is k * x, else 0

For a blur the margin is at least the kernel's radius on every side; where the boundary is "valid" so much of it belongs to
the image. Continued means repeated for a circular boundary and, with a symmetric kernel, mirrored for "reflect"; for other
boundaries M is 1 inside the original measurement only. The reconstruction is cropped back.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from deepinv.physics import Blur, Denoising, Inpainting, LinearPhysics, Physics
from torch import Tensor

from flowprox.noise import noise_level
from flowprox.operators.blur import CircularBlur, CircularConvolution, PaddedBlur, WindowedBlur
from flowprox.operators.imaging import SuperResolution


class Fitted(NamedTuple):
    """A measurement whose sides a model can take: y (B, C, H', W'), its operator, and where the image stands."""

    y: Tensor
    physics: LinearPhysics
    rows: slice
    columns: slice


def fit_to_divisor(y: Tensor, physics: LinearPhysics, divisor: int) -> Fitted:
    """Extend a measurement (B, C, H, W) and its operator to sides that ``divisor`` divides, by the rules above. ValueError for
    other operators than these, or a noise that belongs to one size.

    Both stay as they are where the sides of y are multiples already and those of the image.

    Example:
        >>> from flowprox.operators import make_physics
        >>> physics = make_physics("inpainting", (1, 6, 6), mask_size=2)
        >>> fitted = fit_to_divisor(physics.A(torch.ones(1, 1, 6, 6)), physics, 4)
        >>> fitted.y.shape, fitted.y[..., fitted.rows, fitted.columns].shape
        (torch.Size([1, 1, 8, 8]), torch.Size([1, 1, 6, 6]))
    """
    sides = (int(y.shape[-2]), int(y.shape[-1]))
    is_valid = getattr(physics, "padding", "") == "valid"
    if not is_valid and all(side % divisor == 0 for side in sides):
        return Fitted(y, physics, slice(0, sides[0]), slice(0, sides[1]))
    try:
        noise_level(physics, y)
    except ValueError as error:
        raise ValueError(f"noise cannot be extended ({error}): use sizes divisible by {divisor}") from error
    kernel = physics.kernel() if isinstance(physics, CircularConvolution) else None
    kernel = physics.get_buffer("filter") if isinstance(physics, Blur) else kernel
    margin = max(kernel.shape[-2:]) // 2 if kernel is not None else 0
    sizes = [-(-(side + 2 * margin) // divisor) * divisor for side in sides]
    before = [(size - side) // 2 for size, side in zip(sizes, sides, strict=True)]
    radii = [n // 2 for n in kernel.shape[-2:]] if kernel is not None and is_valid else [0, 0]
    inside = [slice(start - r, start + side + r) for start, side, r in zip(before, sides, radii, strict=True)]
    if kernel is not None:
        extended, operator = _extended_blur(y, physics, kernel, before, sizes)
        operator.set_noise_model(physics.noise_model)
    elif isinstance(physics, Denoising):
        extended, operator = _extended(y, before, sizes, "reflect"), physics
    elif isinstance(physics, Inpainting):
        mask = _extended(physics.get_buffer("mask"), before, sizes, "reflect")
        operator = Inpainting(img_size=mask.shape[-3:], mask=mask, device=mask.device, noise_model=physics.noise_model)  # pyright: ignore
        extended = _extended(y, before, sizes, "reflect")
    else:
        kind = type(physics).__name__
        raise ValueError(f"measurements of {kind} cannot be extended: use sizes divisible by {divisor}")
    return Fitted(extended, operator, *inside)


def measured_part(x: Tensor, y: Tensor, physics: Physics) -> Tensor:
    """Of x (..., H, W) the pixels that y shows: all but the frame beyond it that a blur of boundary "valid" takes in."""
    if getattr(physics, "padding", "") != "valid":
        return x
    (height, width), (rows, columns) = y.shape[-2:], x.shape[-2:]
    top, left = (rows - height) // 2, (columns - width) // 2
    return x[..., top : top + height, left : left + width]


def continued(y: Tensor, like: Tensor) -> Tensor:
    """y (B, C, H, W) with a frame of its outermost pixels, of the size of ``like``."""
    below, right = ((n - m) // 2 for n, m in zip(like.shape[-2:], y.shape[-2:], strict=True))
    return F.pad(y, (right, right, below, below), mode="replicate")


def _extended_blur(
    y: Tensor, physics: LinearPhysics, kernel: Tensor, before: Sequence[int], sizes: Sequence[int]
) -> tuple[Tensor, LinearPhysics]:
    boundary = "circular" if isinstance(physics, CircularConvolution) else str(getattr(physics, "padding", ""))
    is_symmetric = all(torch.allclose(kernel, kernel.flip(dim)) for dim in (-1, -2))
    continued = boundary == "circular" or (boundary == "reflect" and is_symmetric)
    seen = torch.zeros(sizes[0], sizes[1])
    if continued:  # all but a frame that the window's own border reaches
        top, left = kernel.shape[-2] // 2, kernel.shape[-1] // 2
        seen[top : sizes[0] - top, left : sizes[1] - left] = 1.0
    else:
        seen[before[0] : before[0] + y.shape[-2], before[1] : before[1] + y.shape[-1]] = 1.0
    mode = boundary if continued else "replicate"
    return _extended(y, before, sizes, mode), WindowedBlur(kernel[0, 0], seen)


def _extended(x: Tensor, before: Sequence[int], sizes: Sequence[int], mode: str) -> Tensor:
    """x (..., H, W) continued to ``sizes``, its first pixel at ``before``."""
    places = map(_continued, x.shape[-2:], before, sizes, (mode, mode))
    rows, columns = (place.to(x.device) for place in places)
    return x[..., rows, :][..., columns]


def _continued(n: int, start: int, size: int, mode: str) -> Tensor:
    """Indices into 0 .. n - 1 of a continued axis; unlike torch's padding, by any width."""
    index = torch.arange(-start, size - start)
    if mode == "circular":
        return index % n
    if mode == "reflect" and n > 1:
        index = index % (2 * n - 2)
        return torch.minimum(index, 2 * n - 2 - index)
    return index.clamp(0, n - 1)


def mirrored(physics: LinearPhysics) -> LinearPhysics:
    """The operator of mirror images, left and right exchanged: M A M, with M the mirror, masks and kernels mirrored alike.
    ValueError for an operator that has none that is known.

    A hole that is not in the middle stands elsewhere in the mirror image: a network that reconstructs both must be told so.

    Example:
        >>> from flowprox.operators import make_physics
        >>> physics = make_physics("inpainting", (1, 4, 4), mask_size=1)
        >>> physics.get_buffer("mask").argmin().item(), mirrored(physics).get_buffer("mask").argmin().item()
        (5, 6)
    """
    if not isinstance(physics, Denoising | Inpainting | CircularBlur | PaddedBlur | WindowedBlur | SuperResolution):
        raise ValueError(f"{type(physics).__name__} has no mirror image that is known; use the method without it")
    other = copy.deepcopy(physics)
    for name, buffer in other.named_buffers():
        kind = name.rpartition(".")[2]
        if kind in ("mask", "filter", "columns") or (kind in ("scale", "mean") and buffer.ndim):
            buffer.copy_(buffer.flip(-1, -2) if kind == "columns" else buffer.flip(-1))
    return other
