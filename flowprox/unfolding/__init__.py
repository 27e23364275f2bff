"""Unfolded networks: their folds, what they are told beside the image, and their export."""

from __future__ import annotations

from flowprox.unfolding.conditioning import Conditioning, LatentMeanNet, MultiScaleNet
from flowprox.unfolding.density import BoundDensity, ConditionalDensity, ErrorDensity, fit_density
from flowprox.unfolding.networks import GradientStep, ProximalStep, Unfolded, UnfoldedHQS, UnfoldedPGD, export_program

__all__ = [
    "BoundDensity", "ConditionalDensity", "Conditioning", "ErrorDensity", "GradientStep", "LatentMeanNet",
    "MultiScaleNet", "ProximalStep", "Unfolded", "UnfoldedHQS", "UnfoldedPGD", "export_program", "fit_density",
]  # fmt: skip
