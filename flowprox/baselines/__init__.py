"""Reconstruction methods that flow priors are compared with.

Each is a ``deepinv.models.Reconstructor``: ``x_hat = method(y, physics)`` with measurement y (B, ...) and estimate x_hat
(B, C, H, W) on y's device and in y's dtype. What they need to know (noise level, mask, blur) is read from ``physics``.
``GANPrior`` has a generator that was trained; the others learn nothing.
"""

from flowprox.baselines.bm3d import BM3D
from flowprox.baselines.deconvolution import TotalVariation, Wiener, transfer_function
from flowprox.baselines.inpainting import Biharmonic
from flowprox.baselines.lasso import Lasso
from flowprox.baselines.plug_and_play import PlugAndPlay
from flowprox.baselines.wavelet import WaveletPrior
from flowprox.solvers import GANPrior

__all__ = [
    "BM3D",
    "Biharmonic",
    "GANPrior",
    "Lasso",
    "PlugAndPlay",
    "TotalVariation",
    "WaveletPrior",
    "Wiener",
    "transfer_function",
]
