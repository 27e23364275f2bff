"""Unfolded networks: their folds, what they are told beside the image, and their export."""

from __future__ import annotations

from flowprox.unfolding.conditioning import Conditioning, LatentMeanNet
from flowprox.unfolding.export import export_program
from flowprox.unfolding.networks import (
    GradientStep,
    ProximalStep,
    Unfolded,
    UnfoldedHQS,
    UnfoldedPGD,
    latent_statistics,
)

__all__ = [
    "Conditioning",
    "GradientStep",
    "LatentMeanNet",
    "ProximalStep",
    "Unfolded",
    "UnfoldedHQS",
    "UnfoldedPGD",
    "export_program",
    "latent_statistics",
]
