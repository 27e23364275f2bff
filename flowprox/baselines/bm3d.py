"""BM3D: similar patches are stacked, transformed, shrunk and averaged back.

    y = x + noise,  noise ~ N(0, sigma^2 I)

Symbols: x image in [0, 1], y measurement, sigma noise standard deviation in units of the image range. Nothing is
clipped: y is passed on as measured, with its values outside [0, 1] (clipping would bias the noise), and x_hat may
leave [0, 1] slightly; the metrics clip.

The computation is done by the authors' package ``bm3d``, whose license allows non-commercial use only. Its deblurring
function is not offered here: in version 4.0.3 it fails with numpy 2.4 (``numpy.trapz`` is gone).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from deepinv.models import Reconstructor
from deepinv.physics import Physics
from torch import Tensor

from flowprox.baselines._numpy import map_images, noise_sigmas, require_images, require_package

__all__ = ["BM3D"]

_SMALLEST_SIDE = 16
_SMALLEST_SIGMA = 1e-4  # below this nothing is left to remove, and the package divides by sigma


class BM3D(Reconstructor):
    """Block-matching and 3D filtering for denoising, in opponent colors for RGB images.

    References:
        Dabov, Foi, Katkovnik, Egiazarian (2007), Image Denoising by Sparse 3-D Transform-Domain Collaborative
        Filtering, https://doi.org/10.1109/TIP.2007.901238. Implementation: Mäkinen, Azzari, Foi (2020),
        https://doi.org/10.1109/TIP.2020.3014721.

    Arguments:
        sigma: Noise standard deviation in units of the image range [0, 1]; None takes ``physics.noise_model.sigma``, or the
            root mean square of a noise with a level for each pixel.
        profile: Settings of the ``bm3d`` package: "np" (normal), "vn" (made for strong noise) or "high" (many
            overlapping blocks). On 64x64 faces "np" is the best of them at sigma 0.2 as well.

    Raises:
        ImportError: the package ``bm3d`` is not installed.
        ValueError: negative sigma, unknown profile; on call: no known noise level, neither 1 nor 3 channels, or a
            physics that does more than add noise.

    Example:
        >>> from deepinv.physics import Denoising, GaussianNoise
        >>> physics = Denoising(GaussianNoise(0.2))
        >>> x = torch.linspace(0, 1, 16).expand(1, 3, 16, 16)
        >>> y = physics(x)
        >>> bool((BM3D()(y, physics) - x).norm() < 0.5 * (y - x).norm())
        True
    """

    def __init__(self, sigma: float | None = None, profile: Literal["np", "vn", "high"] = "np") -> None:
        super().__init__()
        if sigma is not None and not sigma >= 0:
            raise ValueError(f"sigma must be >= 0, got {sigma}")
        if profile not in ("np", "vn", "high"):
            raise ValueError(f"profile must be 'np', 'vn' or 'high', got {profile!r}")
        self.sigma = sigma
        self.profile = profile
        require_package("bm3d", "bm3d", "BM3D", extra="bm3d")

    def forward(self, y: Tensor, physics: Physics) -> Tensor:  # type: ignore[override]
        bm3d = require_package("bm3d", "bm3d", "BM3D", extra="bm3d")
        n_images, n_channels = require_images(y).shape[:2]
        if n_channels not in (1, 3):
            raise ValueError(f"BM3D takes images with 1 or 3 channels, got {n_channels}")
        if min(y.shape[-2:]) < _SMALLEST_SIDE:
            raise ValueError(
                f"BM3D needs images of at least {_SMALLEST_SIDE}x{_SMALLEST_SIDE} (its package crashes below), got "
                f"{y.shape[-2]}x{y.shape[-1]}; pad them"
            )
        if not torch.allclose(physics.A(y), y):
            raise ValueError("BM3D only removes noise, and this physics changes the image as well; use another method")
        sigmas = noise_sigmas(physics, n_images) if self.sigma is None else [self.sigma] * n_images

        settings = {"np": bm3d.BM3DProfile, "vn": bm3d.BM3DProfileVN, "high": bm3d.BM3DProfileHigh}[self.profile]()
        settings.num_threads = 1  # with more, the order of summation and so the last bits differ from run to run

        def estimate(image: np.ndarray, i: int) -> np.ndarray:
            if sigmas[i] < _SMALLEST_SIGMA:
                return image
            if n_channels == 3:
                return bm3d.bm3d_rgb(image, sigmas[i], settings)
            return bm3d.bm3d(image, sigmas[i], settings).reshape(image.shape)

        return map_images(y, estimate)
