"""Whether a measurement belongs to an operator, and an adjoint to its operator.

    <A x, w> = <x, A^T w>    for all images x and measurements w

A linear operator, A^T its adjoint. Solvers check once, before they spend time.
"""

from __future__ import annotations

import torch
from deepinv.physics import LinearPhysics, Physics
from torch import Tensor

__all__ = ["check_adjoint", "check_measurement", "measurement_shape"]

ImageShape = tuple[int, int, int]


def measurement_shape(
    physics: Physics, image_shape: ImageShape, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> torch.Size:
    """Shape of the measurement of one image (C, H, W), without the batch: one application of A.

    Example:
        >>> from flowprox.operators import make_physics
        >>> measurement_shape(make_physics("compressed-sensing", (3, 8, 8), m=40), (3, 8, 8))
        torch.Size([40])
    """
    with torch.no_grad():
        return physics.A(torch.zeros(1, *image_shape, device=device, dtype=dtype)).shape[1:]


def check_measurement(y: Tensor, physics: Physics, image_shape: ImageShape) -> None:
    """Raise if y cannot be a measurement of images of that shape; costs one application of A.

    Arguments:
        y: measurements (B, ...).
        physics: the operator that is said to have measured them.
        image_shape: (C, H, W) of the images to reconstruct.

    Raises:
        TypeError: y is no tensor of floating-point numbers.
        ValueError: y holds NaN or infinity, or is not of the shape that A gives.

    Example:
        >>> from flowprox.operators import make_physics
        >>> check_measurement(torch.zeros(2, 40), make_physics("compressed-sensing", (3, 8, 8), m=50), (3, 8, 8))
        Traceback (most recent call last):
            ...
        ValueError: y has shape (2, 40), but the operator measures an image of shape (3, 8, 8) as (50,): y must be (B, 50)
    """
    if not isinstance(y, Tensor) or not y.is_floating_point():
        kind = y.dtype if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(f"y must be a tensor of floating-point numbers, got {kind}; convert it with y.float()")
    expected = measurement_shape(physics, image_shape, device=y.device, dtype=y.dtype)
    if y.ndim == 0 or y.shape[1:] != expected:
        raise ValueError(
            f"y has shape {tuple(y.shape)}, but the operator measures an image of shape {tuple(image_shape)} as "
            f"{tuple(expected)}: y must be (B, {', '.join(map(str, expected))})"
        )
    finite = torch.isfinite(y)
    if not finite.all():
        bad = (~finite).flatten(1).sum(1)
        raise ValueError(
            f"y holds {int(bad.sum())} values that are NaN or infinite, in images {bad.nonzero().flatten().tolist()}; "
            "remove those images or repair the measurement"
        )


def check_adjoint(
    physics: Physics,
    image_shape: ImageShape,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    tol: float = 1e-3,
    n_images: int = 1,
) -> None:
    """Raise if ``A_adjoint`` is not the adjoint of A; costs one application of each. Non-linear operators pass.

    Arguments:
        physics: the operator; only a ``deepinv.physics.LinearPhysics`` is looked at.
        image_shape: (C, H, W).
        device: of the operator.
        dtype: of the images.
        tol: allowed |<A x, w> - <x, A^T w>| relative to ||A x|| ||w||, for random x and w that are drawn on the CPU
            with a fixed seed.
        n_images: how many random images; an operator with parameters per image, such as masks (B, 1, H, W), takes B.

    Raises:
        ValueError: A_adjoint gives another shape than the image, or the two inner products differ.

    Example:
        >>> from deepinv.physics import LinearPhysics
        >>> wrong = LinearPhysics(A=lambda x: 2 * x, A_adjoint=lambda y: y)
        >>> try:
        ...     check_adjoint(wrong, (1, 4, 4))
        ... except ValueError as error:
        ...     print(str(error)[:36])
        A_adjoint is not the adjoint of A: <
    """
    if not isinstance(physics, LinearPhysics):
        return
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        x = torch.randn(n_images, *image_shape, generator=generator, dtype=torch.float64).to(device, dtype)
        Ax = physics.A(x)
        # w leans towards A x, so that a wrong factor shows as well
        random = torch.randn(Ax.shape, generator=generator, dtype=torch.float64).to(Ax)
        w = Ax + random * Ax.norm() / max(1.0, Ax.numel() ** 0.5)
        back = physics.A_adjoint(w)
        if back.shape != x.shape:
            raise ValueError(
                f"A_adjoint gives shape {tuple(back.shape)} for an image of shape {tuple(x.shape)}: it is not the adjoint "
                "of A; pass the transpose of A as A_adjoint"
            )
        left, right = (Ax * w).double().sum(), (x * back).double().sum()
        if not abs(left - right) <= tol * Ax.double().norm() * w.double().norm():
            raise ValueError(
                f"A_adjoint is not the adjoint of A: <A x, w> = {left:.4g} but <x, A^T w> = {right:.4g} for random x and w; "
                "pass the transpose of A as A_adjoint, or let deepinv.physics.adjoint_function derive it"
            )
