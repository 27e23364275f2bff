"""Lasso: the image is sparse in an orthonormal basis.

    x_hat = Phi c_hat,   c_hat = argmin_c  ||A Phi c - y||^2 + regularization ||c||_1

Symbols: x image (B, C, H, W), y measurement, A linear operator, Phi an orthonormal basis of each channel (cosines, or
wavelets on the periodic image), c coefficients (B, C, H, W). The squared norm is a sum and has no factor 1/2. That is the
convention of Asim et al. (2020); scikit-learn minimizes ||A Phi c - y||^2 / (2 m) + alpha ||c||_1 with m measurements, so
regularization = 2 m alpha.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Literal, NamedTuple

import numpy as np
import torch
from deepinv.models import Reconstructor
from deepinv.physics import LinearPhysics
from torch import Tensor

from flowprox.baselines._linear import require_count, require_weight, squared_norm
from flowprox.baselines._numpy import require_measurement, require_package

__all__ = ["Basis", "Lasso", "cosine_basis", "require_wavelet", "wavelet_basis"]

_ON_THE_WAY = 0.3  # tolerance of the weights before the last one; a tighter one wastes iterations


class Basis(NamedTuple):
    """Orthonormal separable bases, one after the other on an ever smaller corner of the image.

    Arguments:
        stages: pairs of orthogonal matrices (h, h) and (w, w); each acts on the rows and columns of the upper left (h, w)
            coefficients of the stage before.
    """

    stages: list[tuple[Tensor, Tensor]]

    def analyze(self, x: Tensor) -> Tensor:
        """Phi^T x, coefficients (B, C, H, W) of images (B, C, H, W)."""
        c = x
        for rows, columns in self.stages:
            h, w = len(rows), len(columns)
            corner = rows @ c[..., :h, :w] @ columns.mT
            c = corner if corner.shape == c.shape else _with_corner(c, corner)
        return c

    def synthesise(self, c: Tensor) -> Tensor:
        """Phi c, images (B, C, H, W) of coefficients (B, C, H, W)."""
        x = c
        for rows, columns in reversed(self.stages):
            h, w = len(rows), len(columns)
            corner = rows.mT @ x[..., :h, :w] @ columns
            x = corner if corner.shape == x.shape else _with_corner(x, corner)
        return x


def _with_corner(x: Tensor, corner: Tensor) -> Tensor:
    x = x.clone()
    x[..., : corner.shape[-2], : corner.shape[-1]] = corner
    return x


def cosine_basis(height: int, width: int, like: Tensor) -> Basis:
    """The two-dimensional discrete cosine transform (DCT-II, orthonormal), in the dtype and on the device of ``like``."""
    return Basis([(_cosines(height).to(like), _cosines(width).to(like))])


def _cosines(n: int) -> Tensor:
    k, j = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)[None, :]
    matrix = math.sqrt(2 / n) * torch.cos(math.pi * (2 * j + 1) * k / (2 * n))
    matrix[0] /= math.sqrt(2)
    return matrix


def wavelet_basis(height: int, width: int, like: Tensor, wavelet: str = "db1", n_levels: int | None = None) -> Basis:
    """The orthonormal wavelet transform of the periodic image, PyWavelets' mode "periodization".

    Arguments:
        height, width: sides of the image.
        like: gives dtype and device.
        wavelet: name of an orthogonal wavelet in PyWavelets.
        n_levels: number of halvings; None takes as many as both sides allow.

    Raises:
        ImportError: PyWavelets is not installed.
        ValueError: the wavelet is unknown or not orthogonal, or the sides cannot be halved so often.
    """
    possible = _n_halvings(height, width)
    if (n_levels is not None and not 1 <= n_levels <= possible) or possible == 0:
        asked = "" if n_levels is None else f", n_levels is {n_levels}"
        raise ValueError(f"the wavelet basis: {height}x{width} images can be halved {possible} times{asked}; crop them")
    levels = range(possible if n_levels is None else n_levels)
    filters = [(_wavelets(height >> i, wavelet), _wavelets(width >> i, wavelet)) for i in levels]
    return Basis([(rows.to(like), columns.to(like)) for rows, columns in filters])


def _n_halvings(height: int, width: int) -> int:
    common = math.gcd(height, width)
    return (common & -common).bit_length() - 1


def require_wavelet(wavelet: str) -> ModuleType:
    """PyWavelets, or ``ValueError`` unless it knows an orthogonal wavelet of that name."""
    pywt = require_package("pywt", "PyWavelets", "a wavelet basis", extra="wavelets")
    if wavelet not in pywt.wavelist(kind="discrete") or not pywt.Wavelet(wavelet).orthogonal:
        raise ValueError(f"wavelet must name an orthogonal wavelet of PyWavelets, such as 'db4', got {wavelet!r}")
    return pywt


def _wavelets(n: int, wavelet: str) -> Tensor:
    """One level on n samples: the upper half of the rows averages, the lower half differences."""
    halves = require_wavelet(wavelet).dwt(np.eye(n), wavelet, mode="periodization", axis=0)
    return torch.from_numpy(np.concatenate(halves))


class Lasso(Reconstructor):
    r"""Sparse reconstruction in a cosine or wavelet basis for any linear operator, by FISTA with restarts.

        c_{k+1} = S( u_k - s Phi^T A^T (A Phi u_k - y) ),      s = 1 / ||A||^2,  S shrinks by s regularization / 2
        u_{k+1} = c_{k+1} + (t_k - 1) / t_{k+1} (c_{k+1} - c_k)

    The momentum of an image starts anew (t = 1) when it points uphill. The regularization first falls by decades from the
    value at which c = 0 would be optimal, each a start for the next, which saves iterations where it is small. An image
    whose coefficients have settled stops; its estimate does not depend on the others in its batch. A is used through its
    products only. x_hat is not clipped.

    References:
        Tibshirani (1996), Regression shrinkage and selection via the lasso; Beck, Teboulle (2009), A fast iterative
        shrinkage-thresholding algorithm, https://doi.org/10.1137/080716542, Eq. (4.1) to (4.3); restarts: O'Donoghue, Candès
        (2015), https://arxiv.org/abs/1204.3982, Sec. 3.2; as a baseline: Asim et al. (2020),
        https://arxiv.org/abs/1905.11672, footnote 1, where regularization is 0.01.

    Arguments:
        basis: "dct" or "wavelet".
        regularization: weight of ||c||_1, >= 0, in the convention of the formula above (2 m alpha of scikit-learn).
        n_iterations: at most so many iterations.
        tolerance: an image has settled when every coefficient fulfils its optimality condition up to this fraction of the
            regularization (float32 allows about 1e-3 of 0.01).
        wavelet: an orthogonal wavelet of PyWavelets ("db1" is Haar's); unused by "dct".
        n_levels: halvings of the image; None takes as many as its sides allow; unused by "dct".

    Raises:
        ImportError: basis "wavelet" without PyWavelets.
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
        tolerance: float = 1e-2,
        wavelet: str = "db1",
        n_levels: int | None = None,
    ) -> None:
        super().__init__()
        if basis not in ("dct", "wavelet"):
            raise ValueError(f"basis must be 'dct' or 'wavelet', got {basis!r}")
        require_weight(regularization)
        require_count("n_iterations", n_iterations)
        if not tolerance >= 0:
            raise ValueError(f"tolerance must be >= 0, got {tolerance}")
        if basis == "wavelet":
            require_wavelet(wavelet)
        self.basis = basis
        self.regularization = regularization
        self.n_iterations = n_iterations
        self.tolerance = tolerance
        self.wavelet = wavelet
        self.n_levels = n_levels

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
    def forward(self, y: Tensor, physics: LinearPhysics) -> Tensor:  # type: ignore[override]
        back = physics.A_adjoint(require_measurement(y))
        basis = self.make_basis(back)
        step = 1 / squared_norm(physics, back)
        weight = _first_weight(basis.analyze(back), self.regularization)
        floor = weight.mul(1e-6).clamp_min(self.regularization)
        c = u = torch.zeros_like(back)
        t = torch.ones_like(weight)
        done = torch.zeros_like(weight, dtype=torch.bool)
        for k in range(self.n_iterations):
            gradient = basis.analyze(physics.A_adjoint(physics.A(basis.synthesise(u)) - y))
            threshold = step * weight / 2
            shrunk = _soft_threshold(u - step * gradient, threshold)
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
        return basis.synthesise(c)


def _first_weight(back: Tensor, regularization: float) -> Tensor:
    """A tenth of the weight from which on zero is the solution, or the final one where that is larger: (B, 1, 1, 1)."""
    return (2 * back.abs().amax((1, 2, 3), keepdim=True) / 10).clamp_min(regularization)


def _soft_threshold(c: Tensor, threshold: Tensor) -> Tensor:
    return c.sign() * (c.abs() - threshold).clamp_min(0)
