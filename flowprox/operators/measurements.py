"""Measurements of images, what belongs to them, and steps from an image estimate towards them.

    y = A(x) + n                                                     the noise n from a generator, or a seed per image
    <A x, w> = <x, A^T w>                                            for all images x and measurements w
    data_gradient:  A^T (y - A x)                                    the direction of descent of 1/2 ||y - A x||^2
    data_prox:      argmin_x 1/2 ||y - A x||^2 + rho/2 ||x - v||^2   = (A^T A + rho I)^-1 (A^T y + rho v)

x and v images, y measurement, A operator, A^T its adjoint if it is linear, rho > 0 the weight of staying close to v.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from deepinv.optim.linear import least_squares_implicit_backward
from deepinv.physics import DecomposablePhysics, Inpainting, LinearPhysics, Physics
from torch import Tensor

from flowprox.noise import Noise

ImageShape = tuple[int, int, int]


def measure(x: Tensor, physics: Physics, generator: torch.Generator | None = None) -> Tensor:
    """y = A x + noise of images x (B, C, H, W) in [0, 1], deterministic for a given generator, which advances. ValueError for
    images that are not of the size of the operator's mask.

    The noise of a ``flowprox.noise.Noise``, as ``make_physics`` sets it, depends on neither the device nor the memory layout
    of x.

    Example:
        >>> from flowprox.operators import make_physics
        >>> physics = make_physics("denoising", (3, 8, 8))
        >>> x = torch.rand(2, 3, 8, 8)
        >>> a, b = (measure(x, physics, torch.Generator().manual_seed(0)) for _ in range(2))
        >>> torch.equal(a, b)
        True
    """
    return _add_noise(_before_noise(x, physics), physics, generator)


def measure_each(x: Tensor, physics: Physics, seeds: Sequence[int]) -> Tensor:
    """y = A x + noise of images x (B, C, H, W) with one seed each: an image gets the same noise in every batch, method and run.
    ValueError for another number of seeds, or images that are not of the size of the operator's mask."""
    if len(seeds) != len(x):
        raise ValueError(f"seeds must hold one number per image: got {len(seeds)} for {len(x)} images")
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    y = _before_noise(x, physics)
    if isinstance(physics.noise_model, Noise):
        return _add_noise(y, physics, generators)
    return torch.cat([_add_noise(y[i : i + 1], physics, generator) for i, generator in enumerate(generators)])


def _before_noise(x: Tensor, physics: Physics) -> Tensor:
    """What the noise is added to: A(x), but for an operator that says otherwise (``OneBitSensing``)."""
    if isinstance(physics, Inpainting) and x.shape[-2:] != physics.get_buffer("mask").shape[-2:]:
        own, (h, w) = "x".join(map(str, physics.get_buffer("mask").shape[-2:])), x.shape[-2:]
        raise ValueError(f"images of {h}x{w} do not fit the operator's mask of {own}; make it for that size")
    return getattr(physics, "before_noise", physics.A)(x)


def _add_noise(y: Tensor, physics: Physics, generator: torch.Generator | Sequence[torch.Generator] | None) -> Tensor:
    if generator is None:
        return physics.sensor(physics.noise(y))
    if isinstance(physics.noise_model, Noise):
        return physics.sensor(physics.noise(y, generator=generator))
    # any other deepinv noise draws from its own generator, which takes a seed, or from the global one
    assert isinstance(generator, torch.Generator)
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    if getattr(physics.noise_model, "rng", None) is not None:
        return physics.sensor(physics.noise(y, seed=seed))
    with torch.random.fork_rng(devices=[y.device] if y.is_cuda else []):
        torch.manual_seed(seed)
        return physics.sensor(physics.noise(y))


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


def measured_entries(y: Tensor, physics: Physics, image_shape: ImageShape) -> Tensor:
    """Which entries of y (B, ...) a linear operator measures: those where positive pixels do not give exactly 0; bool, like y.

    Example:
        >>> from flowprox.operators import make_physics
        >>> physics = make_physics("inpainting", (1, 4, 4), mask_size=2)
        >>> int(measured_entries(torch.zeros(1, 1, 4, 4), physics, (1, 4, 4)).sum())
        12
    """
    if not isinstance(physics, LinearPhysics):
        return torch.ones_like(y, dtype=torch.bool)
    pixels = 0.5 + torch.rand(1, *image_shape, generator=torch.Generator().manual_seed(0), dtype=y.real.dtype)
    with torch.no_grad():
        return (physics.A(pixels.to(y.device).expand(len(y), -1, -1, -1)) != 0).expand_as(y)


def check_measurement(y: Tensor, physics: Physics | None = None, image_shape: ImageShape | None = None) -> Tensor:
    """y with 0 in the entries that the operator does not measure, or an error if it is no measurement.

    Arguments:
        y: measurements (B, ...), floating-point or complex; entries that are not measured may hold anything, NaN included.
        physics: the operator; one or two applications of A tell the shape of y. None checks only what y is by itself.
        image_shape: (C, H, W) of the images to reconstruct; None takes what the adjoint of a linear operator gives.

    Raises:
        ValueError: y is no tensor of floating-point or complex numbers, no batch, holds NaN or infinity, or is not of the
            shape that A gives.

    Example:
        >>> from flowprox.operators import make_physics
        >>> check_measurement(torch.zeros(2, 40), make_physics("compressed-sensing", (3, 8, 8), m=50), (3, 8, 8))
        Traceback (most recent call last):
            ...
        ValueError: y has shape (2, 40), but the operator measures an image of shape (3, 8, 8) as (50,): y must be (B, 50)
    """
    if not isinstance(y, Tensor) or not (y.is_floating_point() or y.is_complex()):
        kind = y.dtype if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"y must be a tensor of floating-point numbers, got {kind}; convert it with y.float()")
    if image_shape is None and (y.ndim < 2 or y.ndim == 3):
        raise ValueError(f"y must be a batch, (B, C, H, W) or (B, m), got shape {tuple(y.shape)}; use y[None]")
    if image_shape is None and isinstance(physics, LinearPhysics):
        with torch.no_grad():
            shape = tuple(physics.A_adjoint(y).shape)
        if len(shape) != 4 or shape[0] != y.shape[0]:
            raise ValueError(f"the adjoint of the operator maps y {tuple(y.shape)} to {shape}; images are (B, C, H, W)")
        image_shape = shape[1:]
    if physics is not None and image_shape is not None:
        expected = measurement_shape(physics, image_shape, device=y.device, dtype=y.real.dtype)
        if y.shape[1:] != expected:
            measures = f"the operator measures an image of shape {tuple(image_shape)} as {tuple(expected)}"
            wanted = f"(B, {', '.join(map(str, expected))})"
            raise ValueError(f"y has shape {tuple(y.shape)}, but {measures}: y must be {wanted}")
        y = torch.where(measured_entries(y, physics, image_shape), y, 0)
    bad = (~torch.isfinite(y)).flatten(1).sum(1)
    if bool(bad.any()):
        where = f"{int(bad.sum())} values that are NaN or infinite, in images {bad.nonzero().flatten().tolist()}"
        raise ValueError(f"y holds {where}; hide them with a mask, or leave those images out")
    return y


def check_adjoint(
    physics: Physics,
    image_shape: ImageShape,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    tol: float = 1e-3,
    n_images: int = 1,
) -> None:
    """Raise ValueError if ``A_adjoint`` is not the adjoint of A; costs one application of each. Non-linear operators pass.

    Arguments:
        physics: the operator; only a ``deepinv.physics.LinearPhysics`` is looked at.
        image_shape: (C, H, W).
        device, dtype: of the operator, and of the images.
        tol: allowed |<A x, w> - <x, A^T w>| relative to ||A x|| ||w||, for random x and w of a fixed seed.
        n_images: how many random images; an operator with parameters per image, such as masks (B, 1, H, W), takes B.

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
            shapes = f"{tuple(back.shape)} for an image of shape {tuple(x.shape)}"
            raise ValueError(f"A_adjoint gives shape {shapes}: it is not the adjoint of A; pass the transpose of A")
        left, right = (Ax * w).double().sum(), (x * back).double().sum()
        if not abs(left - right) <= tol * Ax.double().norm() * w.double().norm():
            differ = f"<A x, w> = {left:.4g} but <x, A^T w> = {right:.4g} for random x and w"
            remedy = "pass the transpose of A, or let deepinv.physics.adjoint_function derive it"
            raise ValueError(f"A_adjoint is not the adjoint of A: {differ}; {remedy}")


# Steps towards a measurement -------------------------------------------------------------------------------------------


class ExactProx(LinearPhysics):
    """A linear operator whose ``data_prox`` has a closed form; deepinv's ``prox_l2`` follows from it."""

    def regularized_inverse(self, v: Tensor, y: Tensor, rho: float | Tensor) -> Tensor:
        """argmin_x 1/2 ||y - A x||^2 + rho/2 ||x - v||^2, for images v (B, C, H, W), measurements y and rho > 0.

        rho broadcasts against v; the result is differentiable in all three, and nothing is written to the operator.
        """
        raise NotImplementedError

    def prox_l2(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, z: Tensor | float | None, y: Tensor, gamma: float | Tensor, **kwargs: object
    ) -> Tensor:
        """argmin_x gamma/2 ||A x - y||^2 + 1/2 ||x - z||^2."""
        if not isinstance(z, Tensor):
            z = torch.full_like(self.A_adjoint(y), float(z or 0.0))
        return self.regularized_inverse(z, y, 1.0 / gamma)


def visibility(x: Tensor, physics: LinearPhysics) -> Tensor:
    """A^T A 1 averaged over the channels, (1, 1, H, W), for images like x (B, C, H, W): where the operator sees something."""
    return physics.A_adjoint(physics.A(torch.ones_like(x[:1]))).mean(dim=1, keepdim=True)


def data_gradient(x: Tensor, y: Tensor, physics: LinearPhysics) -> Tensor:
    """A^T (y - A x), the direction in which 1/2 ||y - A x||^2 falls, of images x (B, C, H, W) and measurements y (B, ...).

    References:
        Wei et al. 2022, https://arxiv.org/abs/2107.02848, Eq. (8), whose sign is that of ascent.
    """
    return physics.A_adjoint(y - physics.A(x))


def data_prox(
    v: Tensor, y: Tensor, physics: LinearPhysics, rho: float | Tensor, *, max_iter: int = 200, tol: float = 1e-6
) -> Tensor:
    """argmin_x 1/2 ||y - A x||^2 + rho/2 ||x - v||^2, differentiable in v, y and rho.

    In closed form for an ``ExactProx`` (circular blur, the learned one included, structured sensing, super-resolution, MRI)
    and the operators that deepinv decomposes (denoising, inpainting); otherwise by conjugate gradient, whose
    gradient deepinv computes by implicit differentiation. Nothing is written to ``physics``.

    Arguments:
        v: images (B, C, H, W) to stay close to.
        y: measurements.
        physics: linear operator.
        rho: weight of closeness, positive; a number, a 0-d tensor, or one per image (B,).
        max_iter: of the conjugate gradient, where there is no closed form.
        tol: relative residual at which the conjugate gradient stops.

    Raises:
        ValueError: rho is a number that is not positive (a tensor is not looked at: that would stall a GPU), or the
            operator is not linear.

    Example:
        >>> import torch
        >>> from flowprox.operators import make_physics
        >>> physics = make_physics("denoising", (1, 2, 2))
        >>> data_prox(torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2), physics, rho=1.0).flatten().tolist()
        [0.5, 0.5, 0.5, 0.5]
    """
    if isinstance(rho, Tensor):
        rho = rho.view(-1, *[1] * (v.ndim - 1)) if rho.ndim == 1 else rho
    elif not (math.isfinite(rho) and rho > 0):
        raise ValueError(f"rho must be a positive number, got {rho}")
    if not isinstance(physics, LinearPhysics):
        raise ValueError(f"data_prox takes a linear operator and {type(physics).__name__} is none; NoiseMAP takes any")
    if isinstance(physics, ExactProx):
        return physics.regularized_inverse(v, y, rho)
    if isinstance(physics, DecomposablePhysics):
        return physics.prox_l2(v, y, 1.0 / rho)
    # LinearPhysics.prox_l2 would write solver, max_iter and tol to the operator; its default eps of 1e-8 costs 3 digits
    gamma = 1.0 / rho
    gamma = gamma.flatten() if isinstance(gamma, Tensor) and gamma.ndim > 1 else gamma
    return least_squares_implicit_backward(
        physics, y, z=v, init=v, gamma=gamma, solver="CG", max_iter=max_iter, tol=tol, parallel_dim=[0], eps=1e-20
    )
