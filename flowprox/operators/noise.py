"""White noise that is the same everywhere for the same seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from deepinv.physics import GaussianNoise
from torch import Tensor

__all__ = ["SeededGaussianNoise", "at_least_zero"]


class SeededGaussianNoise(GaussianNoise):
    """White Gaussian noise that is the same on every device and in every memory layout for the same generator.

    deepinv's own noise draws in the memory order of its input and replaces a generator that was moved, so that the
    caller's generator never advances. Here the values are drawn in (B, C, H, W) order on the generator's device.

    Arguments:
        sigma: noise standard deviation, at least 0, in the units of the measurement.

    Raises:
        ValueError: sigma is negative or not finite.

    Example:
        >>> noise = SeededGaussianNoise(0.1)
        >>> y = torch.zeros(1, 3, 4, 4)
        >>> torch.equal(noise(y, seed=1), noise(y, seed=1))
        True
    """

    def __init__(self, sigma: float = 0.1) -> None:
        super().__init__(sigma=at_least_zero("sigma", sigma))

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Tensor,
        sigma: float | Tensor | None = None,
        seed: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """x + sigma n; ``generator`` is one for the batch or one per image; ``sigma`` is kept, as deepinv's does."""
        self.update_parameters(sigma=sigma)
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
        level = self.sigma.to(x.device)
        return x + level[(...,) + (None,) * (x.ndim - 1)] * _standard_normal(x, generator)


def _standard_normal(x: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None) -> Tensor:
    """Standard normal values of x's shape, dtype and device."""
    if generator is None:
        return torch.randn(x.shape, dtype=x.dtype, device=x.device)
    if isinstance(generator, torch.Generator):
        return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=generator.device).to(x.device)
    each = [torch.randn(x.shape[1:], generator=g, dtype=x.dtype, device=g.device) for g in generator]
    return torch.stack(each).to(x.device)


def at_least_zero(name: str, value: Any) -> float:
    """The standard deviation as a float, or an error if it is none."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} is a standard deviation and must be a finite number of at least 0, got {value!r}")
    return float(value)
