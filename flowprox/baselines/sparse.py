"""Sparse images: the Lasso in an orthonormal basis, and shrinkage of wavelet details.

    Lasso:          x_hat = Phi c_hat,  c_hat = argmin_c  ||A Phi c - y||^2 + regularization ||c||_1
    WaveletPrior:   x_hat = argmin_x  1/2 ||A x - y||^2 + regularization ||Psi x||_1

Symbols: x image (B, C, H, W), y measurement, A linear operator, Phi an orthonormal basis of each channel (cosines, or
wavelets on the periodic image), c coefficients (B, C, H, W), Psi x the image's wavelet details. The Lasso's squared norm is a
sum without factor 1/2, as in Asim et al. (2020): scikit-learn's alpha is regularization / (2 m) for m measurements.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Literal, NamedTuple

import numpy as np
import torch
from deepinv.optim import FISTA, L2
from deepinv.optim import WaveletPrior as _Prior
from deepinv.physics import LinearPhysics
from scipy.fft import dct
from torch import Tensor

from flowprox.baselines.shared import Baseline, squared_norm
from flowprox.naming import require_choice, require_count, require_package, require_positive
from flowprox.prox import soft_threshold

_ON_THE_WAY = 0.3  # tolerance of the weights before the last one; a tighter one wastes iterations


class Basis(NamedTuple):
    """Orthonormal separable bases, one after the other on an ever smaller corner of the image: ``stages`` holds pairs of
    orthogonal matrices (h, h) and (w, w) for the rows and columns of the upper left (h, w) coefficients."""

    stages: list[tuple[Tensor, Tensor]]

    def analyze(self, x: Tensor) -> Tensor:
        """Phi^T x, coefficients (B, C, H, W) of images (B, C, H, W)."""
        return _applied(self.stages, x)

    def synthesize(self, c: Tensor) -> Tensor:
        """Phi c, images (B, C, H, W) of coefficients (B, C, H, W)."""
        return _applied([(rows.mT, columns.mT) for rows, columns in reversed(self.stages)], c)


def _applied(stages: list[tuple[Tensor, Tensor]], x: Tensor) -> Tensor:
    for rows, columns in stages:
        corner = rows @ x[..., : len(rows), : len(columns)] @ columns.mT
        x = x.clone()
        x[..., : len(rows), : len(columns)] = corner
    return x


def cosine_basis(height: int, width: int, like: Tensor) -> Basis:
    """The two-dimensional discrete cosine transform (DCT-II, orthonormal), in the dtype and on the device of ``like``."""
    rows, columns = (torch.from_numpy(dct(np.eye(n), axis=0, norm="ortho")).to(like) for n in (height, width))
    return Basis([(rows, columns)])


def wavelet_basis(height: int, width: int, like: Tensor, wavelet: str = "db1", n_levels: int | None = None) -> Basis:
    """The orthonormal wavelet transform of the periodic image, PyWavelets' mode "periodization", in the dtype of ``like``.

    ``n_levels`` is the number of halvings; None takes as many as both sides allow.

    Raises:
        ImportError: PyWavelets is not installed.
        ValueError: the wavelet is unknown or not orthogonal, or the sides cannot be halved so often.
    """
    common = math.gcd(height, width)
    possible = (common & -common).bit_length() - 1
    if (n_levels is not None and not 1 <= n_levels <= possible) or possible == 0:
        asked = "" if n_levels is None else f", n_levels is {n_levels}"
        raise ValueError(f"the wavelet basis: {height}x{width} images can be halved {possible} times{asked}; crop them")
    levels = range(possible if n_levels is None else n_levels)
    pywt = _require_wavelet(wavelet)

    def one_level(n: int) -> Tensor:
        """On n samples: the upper half of the rows averages, the lower half differences."""
        halves = pywt.dwt(np.eye(n), wavelet, mode="periodization", axis=0)
        return torch.from_numpy(np.concatenate(halves)).to(like)

    return Basis([(one_level(height >> i), one_level(width >> i)) for i in levels])


def _require_wavelet(wavelet: str) -> ModuleType:
    """PyWavelets, or ``ValueError`` unless it knows an orthogonal wavelet of that name."""
    pywt = require_package("pywt", "PyWavelets", "a wavelet basis", extra="wavelets")
    if wavelet not in pywt.wavelist(kind="discrete") or not pywt.Wavelet(wavelet).orthogonal:
        raise ValueError(f"wavelet must name an orthogonal wavelet of PyWavelets, such as 'db4', got {wavelet!r}")
    return pywt


class Lasso(Baseline):
    r"""Sparse reconstruction in a cosine or wavelet basis for any linear operator, by FISTA with restarts.

        c_{k+1} = S( u_k - s Phi^T A^T (A Phi u_k - y) ),      s = 1 / ||A||^2,  S shrinks by s regularization / 2
        u_{k+1} = c_{k+1} + (t_k - 1) / t_{k+1} (c_{k+1} - c_k)

    The momentum of an image starts anew (t = 1) when it points uphill. The regularization first falls by decades from where
    c = 0 would be optimal. An image whose coefficients have settled stops; it does not depend on the others of its batch.

    The figures of Asim et al. are another point: scikit-learn's coordinate descent stopped at its default tolerance, far from
    the minimum where measurements are few. The solver "coordinate-descent" computes it, with the matrix A Phi in memory.

    References:
        Beck, Teboulle 2009, A fast iterative shrinkage-thresholding algorithm, https://doi.org/10.1137/080716542, Eq. (4.1)
        O'Donoghue, Candès 2015, Adaptive restart, https://arxiv.org/abs/1204.3982, Sec. 3.2
        Asim et al. 2020, https://arxiv.org/abs/1905.11672, footnote 1 (as a baseline, with regularization 0.01)

    Arguments:
        basis: "dct" or "wavelet".
        regularization: weight of ||c||_1, >= 0.
        n_iterations: at most so many iterations.
        tolerance: an image has settled when every coefficient fulfils its optimality condition up to this fraction of the
            regularization; for "coordinate-descent" scikit-learn's ``tol``. None takes 1e-2 and scikit-learn's 1e-4.
        wavelet: an orthogonal wavelet of PyWavelets ("db1" is Haar's); unused by "dct".
        n_levels: halvings of the image; None takes as many as its sides allow; unused by "dct".
        solver: "fista", or "coordinate-descent" for the published figures; for one operator for all images.

    Raises:
        ImportError: basis "wavelet" without PyWavelets, "coordinate-descent" without scikit-learn.
        ValueError: a number out of range, an unknown basis; on call: see ``wavelet_basis``.

    Example:
        >>> from deepinv.physics import Inpainting
        >>> mask = (torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(0)) < 0.5).float()
        >>> physics = Inpainting((1, 16, 16), mask=mask)
        >>> x = torch.cos(torch.pi * (torch.arange(16) + 0.5) / 8).expand(1, 1, 16, 16)  # one coefficient
        >>> bool((Lasso("dct", 1e-3)(physics(x), physics) - x).abs().max() < 1e-2)
        True
    """

    def __init__(
        self,
        basis: Literal["dct", "wavelet"] = "dct",
        regularization: float = 0.01,
        n_iterations: int = 2000,
        tolerance: float | None = None,
        wavelet: str = "db1",
        n_levels: int | None = None,
        solver: Literal["fista", "coordinate-descent"] = "fista",
    ) -> None:
        super().__init__()
        require_choice("basis", basis, ("dct", "wavelet"))
        require_positive("regularization", regularization, or_zero=True)
        require_count("n_iterations", n_iterations)
        require_choice("solver", solver, ("fista", "coordinate-descent"))
        if tolerance is None:
            tolerance = 1e-2 if solver == "fista" else 1e-4
        require_positive("tolerance", tolerance, or_zero=True)
        if solver == "coordinate-descent":
            require_package("sklearn", "scikit-learn", "the Lasso by coordinate descent")
        if basis == "wavelet":
            _require_wavelet(wavelet)
        self.basis, self.wavelet, self.n_levels, self.solver = basis, wavelet, n_levels, solver
        self.regularization, self.n_iterations, self.tolerance = regularization, n_iterations, tolerance

    def make_basis(self, x: Tensor) -> Basis:
        """Phi for images of x's size, dtype and device."""
        height, width = x.shape[-2:]
        if self.basis == "dct":
            return cosine_basis(height, width, x)
        return wavelet_basis(height, width, x, self.wavelet, self.n_levels)

    def objective(self, x: Tensor, y: Tensor, physics: LinearPhysics) -> Tensor:
        """||A x - y||^2 + regularization ||Phi^T x||_1 of each image, (B,)."""
        misfit = (physics.A(x) - y).abs().square().flatten(1).sum(1)
        return misfit + self.regularization * self.make_basis(x).analyze(x).abs().flatten(1).sum(1)

    @torch.no_grad()
    def _estimate(self, y: Tensor, physics: LinearPhysics) -> Tensor:
        back = physics.A_adjoint(y)
        basis = self.make_basis(back)
        if self.solver == "coordinate-descent":
            return self._coordinate_descent(y, physics, basis, back)
        step = 1 / squared_norm(physics, back)
        # a tenth of the weight from which on zero is the solution, or the final one where that is larger: (B, 1, 1, 1)
        weight = (basis.analyze(back).abs().amax((1, 2, 3), keepdim=True) * 2 / 10).clamp_min(self.regularization)
        floor = weight.mul(1e-6).clamp_min(self.regularization)
        c = u = torch.zeros_like(back)
        t = torch.ones_like(weight)
        done = torch.zeros_like(weight, dtype=torch.bool)
        for k in range(self.n_iterations):
            gradient = basis.analyze(physics.A_adjoint(physics.A(basis.synthesize(u)) - y))
            threshold = step * weight / 2
            shrunk = soft_threshold(u - step * gradient, threshold)
            new = torch.where(done, c, shrunk)
            uphill = ((u - new) * (new - c)).sum((1, 2, 3), keepdim=True) > 0
            final = weight == self.regularization
            allowed = torch.where(final, self.tolerance, _ON_THE_WAY) * threshold
            settled = (u - new).abs().amax((1, 2, 3), keepdim=True) <= allowed
            done = done | (settled & final)
            t = torch.where(uphill | settled, 1.0, t)
            t_new = (1 + (1 + 4 * t.square()).sqrt()) / 2
            u = new + (t - 1) / t_new * (new - c)
            c, t = new, t_new
            lower = torch.where(weight / 10 < floor, self.regularization, weight / 10)
            weight = torch.where(settled, lower, weight)
            if k % 10 == 9 and bool(done.all()):  # each look at it waits for the device
                break
        return basis.synthesize(c)

    def _coordinate_descent(self, y: Tensor, physics: LinearPhysics, basis: Basis, back: Tensor) -> Tensor:
        """As published: coefficients one after the other, the channels of a place side by side."""
        linear_model = require_package("sklearn.linear_model", "scikit-learn", "the Lasso by coordinate descent")
        (n_channels, height, width), n = back.shape[1:], back[0].numel()
        units = torch.eye(n).to(back).view(n, height, width, n_channels).permute(0, 3, 1, 2)
        matrix = torch.cat([physics.A(basis.synthesize(some)).flatten(1) for some in units.split(256)]).T
        alpha = self.regularization / (2 * len(matrix))
        lasso = linear_model.Lasso(alpha, fit_intercept=True, tol=self.tolerance, max_iter=self.n_iterations)
        columns, rows = np.asfortranarray(matrix.double().cpu()), y.flatten(1).double().cpu().numpy()
        c = [torch.from_numpy(lasso.fit(columns, row).coef_).view(height, width, n_channels) for row in rows]
        return basis.synthesize(torch.stack(c).permute(0, 3, 1, 2).to(back)) if c else back


class _Details(_Prior):
    """deepinv's prior with threshold gamma: its solvers never set ``ths``, whose default is 0.1."""

    def prox(self, x: Tensor, *args: object, gamma: float = 1.0, **kwargs: object) -> Tensor:  # type: ignore[override]
        return super().prox(x, ths=1.0, gamma=gamma)


class WaveletPrior(Baseline):
    """Sparse wavelet details for any linear operator, as deepinv's users know them, by a fixed number of FISTA's iterations.

    Beside ``Lasso(basis="wavelet")`` the coarsest level is free and the image is mirrored at its border.

    References:
        Chambolle, DeVore, Lee, Lucier 1998, Nonlinear wavelet image processing, https://doi.org/10.1109/83.661182, Sec. III

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
        >>> physics, x = Denoising(GaussianNoise(0.1)), torch.full((1, 3, 16, 16), 0.5)
        >>> y = physics(x)
        >>> bool((WaveletPrior(regularization=0.3, n_levels=2)(y, physics) - x).norm() < 0.5 * (y - x).norm())
        True
    """

    def __init__(
        self, regularization: float = 0.01, wavelet: str = "db4", n_levels: int = 3, n_iterations: int = 200
    ) -> None:
        super().__init__()
        require_positive("regularization", regularization, or_zero=True)
        require_count("n_levels", n_levels)
        require_count("n_iterations", n_iterations)
        require_package("ptwt", "ptwt", "WaveletPrior", extra="wavelets")
        _require_wavelet(wavelet)
        self.wavelet, self.n_levels = wavelet, n_levels
        self.regularization, self.n_iterations = regularization, n_iterations

    @torch.no_grad()
    def _estimate(self, y: Tensor, physics: LinearPhysics) -> Tensor:
        back = physics.A_adjoint(y)
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
