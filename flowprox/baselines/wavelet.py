"""Wavelet shrinkage for any linear operator, with deepinv's prior in deepinv's FISTA.

    x_hat = argmin_x  1/2 ||A x - y||^2 + regularization ||Psi x||_1

Symbols: x image (B, C, H, W), y measurement, A linear operator, Psi x the image's wavelet details (what remains of it at
the coarsest level is not penalized).
"""

from __future__ import annotations

from typing import Any

import torch
from deepinv.models import Reconstructor
from deepinv.optim import FISTA, L2
from deepinv.optim import WaveletPrior as _Prior
from deepinv.physics import LinearPhysics
from torch import Tensor

from flowprox.baselines._linear import require_count, require_weight, squared_norm
from flowprox.baselines._numpy import require_measurement, require_package
from flowprox.baselines.lasso import require_wavelet

__all__ = ["WaveletPrior"]


class _Details(_Prior):
    """deepinv's prior with threshold gamma: its solvers never set ``ths``, whose default is 0.1."""

    def prox(self, x: Tensor, *args: Any, gamma: float = 1.0, **kwargs: Any) -> Tensor:  # type: ignore[override]
        return super().prox(x, ths=1.0, gamma=gamma)


class WaveletPrior(Reconstructor):
    """Sparse wavelet details for any linear operator.

    Beside ``Lasso(basis="wavelet")`` this is the form that deepinv's users know: the coarsest level is free and the image
    is mirrored at its border, not taken as periodic. A fixed number of iterations is run, so that an image's estimate
    does not depend on the others in its batch. (deepinv's prior with several wavelets at once is not offered: its inner
    iteration stops by the whole batch.) x_hat is not clipped.

    References:
        Chambolle, DeVore, Lee, Lucier (1998), Nonlinear wavelet image processing: variational problems, compression, and
        noise removal through wavelet shrinkage, https://doi.org/10.1109/83.661182, Sec. III; deepinv's ``WaveletPrior``.

    Arguments:
        regularization: weight of the details' absolute values, >= 0.
        wavelet: name of an orthogonal wavelet in PyWavelets.
        n_levels: depth of the transform.
        n_iterations: of FISTA.

    Raises:
        ImportError: the package ``ptwt`` is not installed.
        ValueError: a number out of range, a wavelet that is unknown or not orthogonal.

    Example:
        >>> from deepinv.physics import Denoising, GaussianNoise
        >>> physics = Denoising(GaussianNoise(0.1))
        >>> x = torch.full((1, 3, 16, 16), 0.5)
        >>> y = physics(x)
        >>> x_hat = WaveletPrior(regularization=0.3, n_levels=2)(y, physics)
        >>> bool((x_hat - x).norm() < 0.5 * (y - x).norm())
        True
    """

    def __init__(
        self,
        regularization: float = 0.01,
        wavelet: str = "db4",
        n_levels: int = 3,
        n_iterations: int = 200,
    ) -> None:
        super().__init__()
        require_weight(regularization)
        require_count("n_levels", n_levels)
        require_count("n_iterations", n_iterations)
        require_package("ptwt", "ptwt", "WaveletPrior", extra="wavelets")
        require_wavelet(wavelet)
        self.wavelet = wavelet
        self.regularization = regularization
        self.n_levels = n_levels
        self.n_iterations = n_iterations

    @torch.no_grad()
    def forward(self, y: Tensor, physics: LinearPhysics) -> Tensor:  # type: ignore[override]
        back = physics.A_adjoint(require_measurement(y))
        step = 1 / squared_norm(physics, back)
        prior = _Details(level=self.n_levels, wv=self.wavelet, device=str(y.device), mode="symmetric")
        solver = FISTA(
            data_fidelity=L2(),
            prior=prior,
            lambda_reg=self.regularization,
            stepsize=step,
            max_iter=self.n_iterations,
            custom_init=lambda y, physics: {"est": (step * back, step * back)},
        )
        return solver.to(y.device)(y, physics)
