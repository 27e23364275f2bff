"""Reconstruction methods that flow priors are compared with.

Each is a ``deepinv.models.Reconstructor``: ``x_hat = method(y, physics)`` with measurement y (B, ...) and estimate x_hat
(B, C, H, W) on y's device and in y's dtype. What they need to know (noise level, mask, blur) is read from ``physics``.
``GANPrior`` has a generator that was trained, ``FFDNet`` and ``Pretrained`` are networks of others; the rest learn nothing.
"""

from flowprox.baselines.deconvolution import TotalVariation, Wiener, transfer_function
from flowprox.baselines.external import BM3D, Biharmonic, FFDNet, FilteredBackprojection, Pretrained
from flowprox.baselines.plug_and_play import PlugAndPlay
from flowprox.baselines.sparse import Lasso, WaveletPrior
from flowprox.solvers import GANPrior

__all__ = [
    "BM3D", "Biharmonic", "FFDNet", "FilteredBackprojection", "GANPrior", "Lasso", "PlugAndPlay", "Pretrained",
    "TotalVariation", "WaveletPrior", "Wiener", "transfer_function",
]  # fmt: skip
