"""The white noise of ``make_physics``, under the name it has had from the start; see ``flowprox.noise``."""

from __future__ import annotations

from flowprox.noise.base import at_least_zero
from flowprox.noise.gaussian import GaussianNoise

__all__ = ["SeededGaussianNoise", "at_least_zero"]

SeededGaussianNoise = GaussianNoise
