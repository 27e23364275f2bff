"""Measurements of images.

    y = A(x) + n

x image, y measurement, A operator, n noise; the noise comes from a generator or a seed per image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from deepinv.physics import Inpainting, Physics
from torch import Tensor

from flowprox.noise import Noise
from flowprox.operators.sensing import OneBitSensing

__all__ = ["measure", "measure_each"]


def measure(x: Tensor, physics: Physics, generator: torch.Generator | None = None) -> Tensor:
    """y = A x + noise, deterministic for a given generator, which advances.

    Arguments:
        x: images (B, C, H, W) in [0, 1].
        physics: the operator with its noise model.
        generator: source of the noise, on any device; torch's global one by default. With any
            ``flowprox.noise.Noise``, which ``make_physics`` sets, it depends on neither the device nor the memory layout
            of x.

    Raises:
        ValueError: x is not of the size of the operator's mask.

    Example:
        >>> from flowprox.operators import make_physics
        >>> physics = make_physics("denoising", (3, 8, 8))
        >>> x = torch.rand(2, 3, 8, 8)
        >>> a, b = (measure(x, physics, torch.Generator().manual_seed(0)) for _ in range(2))
        >>> torch.equal(a, b)
        True
    """
    _check_image(x, physics)
    return _add_noise(_before_noise(x, physics), physics, generator)


def measure_each(x: Tensor, physics: Physics, seeds: Sequence[int]) -> Tensor:
    """y = A x + noise with one seed per image: an image gets the same noise in every batch, method and run.

    Arguments:
        x: images (B, C, H, W) in [0, 1].
        physics: the operator with its noise model.
        seeds: B whole numbers.

    Raises:
        ValueError: as many seeds as images are needed; x is not of the size of the operator's mask.
    """
    if len(seeds) != len(x):
        raise ValueError(f"seeds must hold one number per image: got {len(seeds)} for {len(x)} images")
    _check_image(x, physics)
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    y = _before_noise(x, physics)
    if isinstance(physics.noise_model, Noise):
        return _add_noise(y, physics, generators)
    return torch.cat([_add_noise(y[i : i + 1], physics, generator) for i, generator in enumerate(generators)])


def _before_noise(x: Tensor, physics: Physics) -> Tensor:
    return physics.before_noise(x) if isinstance(physics, OneBitSensing) else physics.A(x)


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


def _check_image(x: Tensor, physics: Physics) -> None:
    if not isinstance(physics, Inpainting):
        return
    (h, w), (mask_h, mask_w) = x.shape[-2:], physics.get_buffer("mask").shape[-2:]
    if (h, w) != (mask_h, mask_w):
        raise ValueError(
            f"images of {h}x{w} do not fit the operator's mask of {mask_h}x{mask_w}; "
            f"build the operator with image_shape (C, {h}, {w})"
        )
