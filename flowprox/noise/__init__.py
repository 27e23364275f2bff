"""Noise: how it is drawn, and the log-density of a residual, which a solver or a data term may climb.

``GaussianNoise`` (one level), ``HeteroscedasticNoise`` (one per entry, with ``sinusoidal_noise`` and ``radial_noise``),
``MNISTNoise`` (drawn only) and ``FlowNoise``, a trained flow as the density. Every one is a ``noise_model`` of deepinv.
"""

from flowprox.noise.base import Density, FlowNoise, Generators, Noise
from flowprox.noise.digits import MNISTNoise
from flowprox.noise.gaussian import (
    NOISES,
    GaussianNoise,
    HeteroscedasticNoise,
    as_noise,
    is_exact,
    make_noise,
    noise_density,
    noise_level,
    radial_noise,
    residual_p_value,
    sinusoidal_noise,
    standard_residual,
)

__all__ = [
    "NOISES", "Density", "FlowNoise", "Generators", "GaussianNoise", "HeteroscedasticNoise", "MNISTNoise", "Noise",
    "as_noise", "is_exact", "make_noise", "noise_density", "noise_level", "radial_noise", "residual_p_value",
    "sinusoidal_noise", "standard_residual",
]  # fmt: skip
