r"""Learned numbers that depend on the noise level of a measurement.

    c(sigma) = exp(sum_j h_j(log sigma) v_j)      piecewise linear in log sigma between levels sigma_1 < ... < sigma_J,
                                                  constant beyond them

v_j the learned logarithms at the levels, h_j the hat function that is 1 at log sigma_j and 0 at its neighbors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from deepinv.physics import Physics, ZeroNoise
from torch import Tensor

__all__ = ["at_level", "checked_levels", "noise_level"]


def checked_levels(levels: Sequence[float] | None) -> tuple[float, ...] | None:
    """The levels as a tuple of floats, or an error if they are no rising positive numbers."""
    if levels is None:
        return None
    values = tuple(float(level) for level in levels)
    rising = all(a < b for a, b in pairwise(values))
    if len(values) < 2 or not rising or not values[0] > 0 or not math.isfinite(values[-1]):
        raise ValueError(f"levels must be at least two rising positive noise levels, or None; got {list(levels)}")
    return values


def at_level(values: Tensor, levels: Sequence[float], sigma: Tensor) -> Tensor:
    """Values (J, ...) at the levels (J,) interpolated at noise levels sigma (B,): (B, ...).

    Example:
        >>> at_level(torch.tensor([0.0, 1.0]), [0.01, 0.1], torch.tensor([0.001, 0.1 ** 1.5, 1.0])).tolist()
        [0.0, 0.5, 1.0]
    """
    knots = torch.tensor(levels, dtype=values.dtype, device=values.device).log()
    at = sigma.to(values).log().clamp(knots[0], knots[-1])[:, None]
    rise = ((at - knots[:-1]) / (knots[1:] - knots[:-1])).clamp(0, 1)  # (B, J - 1): how far each interval is passed
    ones, zeros = torch.ones_like(at), torch.zeros_like(at)
    hats = torch.cat([ones, rise], 1) - torch.cat([rise, zeros], 1)
    return torch.tensordot(hats, values, dims=1)


def noise_level(physics: Physics, like: Tensor) -> Tensor:
    """The standard deviation of the white noise of ``physics``, one per image of ``like`` (B, ...): (B,).

    deepinv's ``ZeroNoise``, which a physics has that was given no noise, is level 0.

    Raises:
        ValueError: the noise of ``physics`` has no level ``sigma``, or another number of them.
    """
    exact = isinstance(physics.noise_model, ZeroNoise)
    sigma = 0.0 if exact else getattr(physics.noise_model, "sigma", None)
    if sigma is None:
        name = type(physics.noise_model).__name__
        raise ValueError(
            f"this network is told the noise level, which {name} does not have; give the physics a GaussianNoise(sigma)"
        )
    sigma = torch.as_tensor(sigma, dtype=like.dtype, device=like.device).flatten()
    n = like.shape[0]  # not len(like), which would fix the batch size of an exported program
    if len(sigma) not in (1, n):
        raise ValueError(f"the noise model has {len(sigma)} levels for {n} images; give one, or one per image")
    return sigma.expand(n)
