"""Classical reconstruction methods, the bar every learned prior has to clear.

Each is a ``deepinv.models.Reconstructor``: ``x_hat = method(y, physics)`` with measurement y (B, C, H, W) and
estimate x_hat (B, C, H, W) on y's device and in y's dtype. None of them learns anything; what they need to know
(noise level, mask, blur) is read from ``physics``.
"""

from flowprox.baselines.bm3d import BM3D
from flowprox.baselines.deconvolution import TotalVariation, Wiener, transfer_function
from flowprox.baselines.inpainting import Biharmonic

__all__ = ["BM3D", "Biharmonic", "TotalVariation", "Wiener", "transfer_function"]
