"""The noise of counted photons in transmission, as of computed tomography.

    y = -log(max(n, 1/2) / N_0) / mu,    n ~ Poisson(N_0 exp(-mu x))

Symbols: x measurement without noise, N_0 photons of a beam that meets nothing, mu attenuation of a measurement of one.
"""

from __future__ import annotations

import torch
from deepinv.physics import LogPoissonNoise
from torch import Tensor


class PhotonNoise(LogPoissonNoise):
    """deepinv's ``LogPoissonNoise``, finite where no photon arrives.

    Arguments:
        N0: photons of a beam that meets nothing.
        mu: attenuation, natural logarithm, of a measurement of one.
    """

    def forward(self, x: Tensor, seed: int | None = None, **kwargs: object) -> Tensor:  # pyright: ignore
        """y of the measurements x without noise, of any shape."""
        self.rng_manual_seed(seed)  # pyright: ignore[reportArgumentType]  # None leaves it
        n, mu = self.get_buffer("N0"), self.get_buffer("mu")
        counts = torch.poisson(n * torch.exp(-mu * x), generator=self.rng).clamp_min(0.5)
        return (n / counts).log() / mu
