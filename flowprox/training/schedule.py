"""The learning rate over a run."""

from __future__ import annotations

import math

__all__ = ["schedule_factor"]


def schedule_factor(schedule: str, progress: float) -> float:
    """The learning rate relative to its peak, for progress from 0 to 1.

    Example:
        >>> [round(schedule_factor("cosine", p), 3) for p in (0.0, 0.5, 1.0)]
        [1.0, 0.5, 0.0]
    """
    if schedule == "constant":
        return 1.0
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    rise, low = 0.3, 0.04  # one-cycle
    if progress < rise:
        return low + (1 - low) * 0.5 * (1 - math.cos(math.pi * progress / rise))
    return 0.5 * (1 + math.cos(math.pi * (progress - rise) / (1 - rise)))
