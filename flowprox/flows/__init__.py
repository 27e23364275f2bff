"""Normalizing flows: bijections with both directions and their determinants, and the flows made of them."""

from flowprox.flows.bijection import Bijection, FiniteChecks, NonFiniteError, Sequential, check_finite, gathered_checks
from flowprox.flows.fast import GlowSteps
from flowprox.flows.flow import Flow, PixelwiseFlow
from flowprox.flows.frozen import frozen
from flowprox.flows.glow import Glow, RealNVP
from flowprox.flows.layers import (
    ActNorm,
    AffineCoupling,
    Conv1x1,
    GlowStep,
    HaarSqueeze,
    PixelNorm,
    Split,
    Squeeze,
    Unsqueeze,
)
from flowprox.flows.reversible import DriftError, Reversible

__all__ = [
    "ActNorm", "AffineCoupling", "Bijection", "Conv1x1", "DriftError", "FiniteChecks", "Flow", "Glow", "GlowStep",
    "GlowSteps", "HaarSqueeze", "NonFiniteError", "PixelNorm", "PixelwiseFlow", "RealNVP", "Reversible", "Sequential",
    "Split", "Squeeze", "Unsqueeze", "check_finite", "frozen", "gathered_checks",
]  # fmt: skip
