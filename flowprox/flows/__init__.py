"""Normalizing flows: bijections with both directions and their determinants, and the flows made of them."""

from flowprox.flows.bijection import Bijection, NonFiniteError, Sequential
from flowprox.flows.fast import FastSteps
from flowprox.flows.flow import Flow
from flowprox.flows.frozen import frozen
from flowprox.flows.glow import Glow
from flowprox.flows.layers import (
    ActNorm,
    AffineCoupling,
    Conv1x1,
    GlowStep,
    HaarSqueeze,
    Split,
    Squeeze,
    Unsqueeze,
)
from flowprox.flows.pixel_norm import PixelNorm, PixelwiseFlow
from flowprox.flows.realnvp import RealNVP
from flowprox.flows.reversible import DriftError, Reversible

__all__ = [
    "ActNorm",
    "AffineCoupling",
    "Bijection",
    "Conv1x1",
    "DriftError",
    "FastSteps",
    "Flow",
    "Glow",
    "GlowStep",
    "HaarSqueeze",
    "NonFiniteError",
    "PixelNorm",
    "PixelwiseFlow",
    "RealNVP",
    "Reversible",
    "Sequential",
    "Split",
    "Squeeze",
    "Unsqueeze",
    "frozen",
]
