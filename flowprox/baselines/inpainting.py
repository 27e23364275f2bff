"""Biharmonic inpainting: the smoothest surface through the known pixels.

    min over x of ||Laplacian x||^2   subject to   M x = y

Symbols: M pixel mask, y known pixels (zero elsewhere).
"""

from __future__ import annotations

import numpy as np
import torch
from deepinv.models import Reconstructor
from deepinv.physics import Physics
from torch import Tensor

from flowprox.baselines._numpy import map_images, require_images, require_package

__all__ = ["Biharmonic"]


class Biharmonic(Reconstructor):
    """Fills the pixels a mask hides with the solution of the biharmonic equation; known pixels stay as measured.

    The mask is read from ``physics.mask`` (1 known, 0 hidden), of a shape that broadcasts to (B, C, H, W) and equal
    in all channels. Filled values are clipped to the range of the known ones (scikit-image does), known ones are not
    clipped.

    References:
        Damelin, Hoang (2018), On Surface Completion and Image Inpainting by Biharmonic Functions: Numerical Aspects,
        https://doi.org/10.1155/2018/3950312.

    Raises:
        ImportError: the package ``scikit-image`` is not installed.
        ValueError: on call: the physics has no mask, hides everything, or hides other pixels in one channel than in
            another.

    Example:
        >>> from deepinv.physics import Inpainting
        >>> mask = torch.ones(1, 8, 8)
        >>> mask[:, 3:5, 3:5] = 0
        >>> physics = Inpainting((3, 8, 8), mask=mask)
        >>> x = torch.linspace(0, 1, 8).expand(1, 3, 8, 8)
        >>> bool(torch.allclose(Biharmonic()(physics(x), physics), x, atol=1e-3))  # a plane is its own completion
        True
    """

    def __init__(self) -> None:
        super().__init__()
        require_package("skimage.restoration", "scikit-image", "Biharmonic")

    def forward(self, y: Tensor, physics: Physics) -> Tensor:  # type: ignore[override]
        restoration = require_package("skimage.restoration", "scikit-image", "Biharmonic")
        mask = getattr(physics, "mask", None)
        if not isinstance(mask, Tensor) or not 2 <= mask.ndim <= 4:
            raise ValueError("Biharmonic needs an inpainting physics: this one has no mask of pixels")
        known = torch.broadcast_to(mask.to(y.device) > 0, require_images(y).shape)
        if not bool((known == known[:, :1]).all()):
            raise ValueError("Biharmonic needs the same mask in all channels")
        if not bool(known.flatten(1).any(1).all()):
            raise ValueError("the mask hides every pixel: nothing to inpaint from")
        hidden = (~known[:, 0]).cpu().numpy()

        def estimate(image: np.ndarray, i: int) -> np.ndarray:
            return restoration.inpaint_biharmonic(image, hidden[i], channel_axis=-1) if hidden[i].any() else image

        return torch.where(known, y, map_images(y, estimate))
