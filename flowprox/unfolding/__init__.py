"""Unfolded networks: their folds, what they are told beside the image, and their export."""

from __future__ import annotations

from flowprox.unfolding.conditioning import Conditioning, LatentMeanNet
from flowprox.unfolding.density import BoundDensity, ConditionalDensity, LatentScale, fit_density
from flowprox.unfolding.networks import (
    GradientStep,
    ProximalStep,
    Unfolded,
    UnfoldedHQS,
    UnfoldedPGD,
    export_program,
)

__all__ = [
    "BoundDensity",
    "ConditionalDensity",
    "Conditioning",
    "GradientStep",
    "LatentMeanNet",
    "LatentScale",
    "ProximalStep",
    "Unfolded",
    "UnfoldedHQS",
    "UnfoldedPGD",
    "export_program",
    "fit_density",
]
