"""Super-resolution, magnetic resonance and computed tomography; but for several coils each channel alone.

    SR:     y = R x C^T              R and C the weights of a filter around every factor-th row and column
    MRI:    y = M F x                F the orthogonal Fourier transform, M a mask of lines in k-space
    coils:  y_n = M F S_n x          S_n the sensitivity of coil n, x complex
    CT:     y = R x / ||R||          R line integrals along beams at n_angles angles

x image (B, C, H, W), real, or with real and imaginary part as two channels; y measurement. MRI and CT are deepinv's operators.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from deepinv.physics import MRI, LinearPhysics, LogPoissonNoise, MultiCoilMRI, Tomography, adjoint_function
from deepinv.physics.functional import Radon
from deepinv.physics.generator import EquispacedMaskGenerator, GaussianMaskGenerator, RandomMaskGenerator
from torch import Tensor

from flowprox.naming import nearest, require_choice, require_count
from flowprox.noise import GaussianNoise
from flowprox.operators.masks import checked_mask
from flowprox.operators.measurements import ExactProx

FILTERS = ("bicubic", "bilinear", "gaussian", "sinc")
"""What super-resolution filters the image with before it is sampled; None for nothing."""

_COLUMNS = {"random": RandomMaskGenerator, "gaussian": GaussianMaskGenerator, "equispaced": EquispacedMaskGenerator}

PATTERNS = (*_COLUMNS, "radial")
"""What of k-space is measured: columns, or lines through its middle."""

MATRIX_LIMIT = 2 * 10**7
"""Entries up to which tomography keeps the sparse matrix of its Radon transform: 4 W^2 n_angles."""

ImageShape = tuple[int, int, int]


class RealMRI(ExactProx):
    """Single-coil MRI of a real image: y = M F x, real and imaginary part as channels; the adjoint is Re F^H M y.

    A^T A is a circular convolution, so the data step has a closed form. Lines that are not measured are zero in y, with
    noise and without.

    Arguments:
        mask: (H, W) of ones (measured) and zeros, the zero frequency in the middle.
        image_shape: (C, H, W); every channel is measured alone, y is (B, 2 C, H, W).
        device: where the mask is kept.

    Raises:
        ValueError: the mask does not fit the image or holds other values.

    Example:
        >>> physics = RealMRI(kspace_mask(16, 16, acceleration=2), (1, 16, 16))
        >>> physics.A(torch.rand(3, 1, 16, 16)).shape
        torch.Size([3, 2, 16, 16])
    """

    def __init__(self, mask: Tensor, image_shape: ImageShape, *, device: torch.device | str = "cpu") -> None:
        super().__init__(img_size=tuple(image_shape))
        self.set_noise_model(GaussianNoise(0.0))
        mask = checked_mask(mask, image_shape).float()
        self.register_buffer("mask", mask)
        self.mri = MRI(mask=mask)
        # A^T A in the Fourier domain: the mask and its mirror image, each by half
        half = torch.fft.ifftshift(mask)
        mirrored = half.flip((0, 1)).roll((1, 1), (0, 1))
        self.register_buffer("gram", (half + mirrored)[:, : mask.shape[1] // 2 + 1] / 2, persistent=False)
        self.to(device)

    def A(self, x: Tensor, **kwargs: object) -> Tensor:
        """M F x: (B, 2 C, H, W) from images (B, C, H, W)."""
        self._check("images", x, 1)
        x = x.reshape(-1, 1, *x.shape[-2:])
        y = self.mri.A(torch.cat([x, torch.zeros_like(x)], 1))
        return y.reshape(-1, 2 * self._channels, *y.shape[-2:])

    def A_adjoint(self, y: Tensor, **kwargs: object) -> Tensor:
        """Re F^H M y: (B, C, H, W) from measurements (B, 2 C, H, W)."""
        self._check("y", y, 2)
        x = self.mri.A_adjoint(y.reshape(-1, 2, *y.shape[-2:]))[:, :1]
        return x.reshape(-1, self._channels, *x.shape[-2:])

    def noise(self, x: Tensor, **kwargs: object) -> Tensor:
        """x with noise where it is measured."""
        return self.get_buffer("mask") * self.noise_model(x, **kwargs)

    def regularized_inverse(self, v: Tensor, y: Tensor, rho: float | Tensor) -> Tensor:
        """argmin_x 1/2 ||y - A x||^2 + rho/2 ||x - v||^2, a division in the Fourier domain."""
        spectrum = torch.fft.rfft2(self.A_adjoint(y) + rho * v)
        return torch.fft.irfft2(spectrum / (self.get_buffer("gram") + rho), s=v.shape[-2:])

    def A_dagger(self, y: Tensor, **kwargs: object) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Pseudo-inverse: frequencies that neither the line nor its mirror image measures are set to zero."""
        gram = self.get_buffer("gram")
        inverse = torch.where(gram > 0, 1.0 / torch.where(gram > 0, gram, torch.ones_like(gram)), 0.0)
        return torch.fft.irfft2(inverse * torch.fft.rfft2(self.A_adjoint(y)), s=y.shape[-2:])

    def symmetry(self, k: int) -> RealMRI:
        """The operator of images and measurements after ``centered_symmetry(., k)``."""
        mask = centered_symmetry(self.get_buffer("mask"), k)
        other = RealMRI(mask, (self._channels, mask.shape[0], mask.shape[1]), device=mask.device)
        other.set_noise_model(self.noise_model)
        return other

    @property
    def _channels(self) -> int:
        assert self.img_size is not None
        return self.img_size[0]

    def _check(self, name: str, x: Tensor, factor: int) -> None:
        expected, got = (factor * self._channels, *self.get_buffer("mask").shape), tuple(x.shape[1:])
        if got != expected:
            raise ValueError(f"{name} of shape {got} do not fit the MRI operator, which takes {expected}")


def centered_symmetry(x: Tensor, k: int, back: bool = False) -> Tensor:
    """The k-th of the 8 symmetries of a square, of x (..., H, W) about the pixel (H // 2, W // 2); ``back`` undoes it.

    Those below 4 keep the shape. An image and its centered Fourier transform take them alike.
    """
    if k & 4 and back:
        x = x.mT
    for dim in (-1, -2):
        if k & -dim:
            x = x.flip(dim).roll(1 - x.shape[dim] % 2, dim)
    return x.mT if k & 4 and not back else x


class CoilMRI(MultiCoilMRI):
    """Parallel MRI: y_n = M F S_n x for coils n = 1..N, deepinv's ``MultiCoilMRI``.

    Arguments:
        mask: (H, W) of ones (measured) and zeros, the zero frequency in the middle.
        coil_maps: S, complex (N, H, W).
        image_shape: (2, H, W) of complex images, real and imaginary part as channels, with y (B, 2, N, H, W); any other
            (C, H, W) of real images, every channel measured alone, with y (B, 2 C, N, H, W).
        device: where mask and maps are kept.

    Raises:
        ValueError: maps that are not complex or of another size.

    Example:
        >>> physics = CoilMRI(kspace_mask(16, 16), coil_sensitivities(4, 16, 16), (2, 16, 16))
        >>> physics.A(torch.rand(3, 2, 16, 16)).shape
        torch.Size([3, 2, 4, 16, 16])
    """

    def __init__(
        self, mask: Tensor, coil_maps: Tensor, image_shape: ImageShape, *, device: torch.device | str = "cpu"
    ) -> None:
        if not coil_maps.is_complex() or coil_maps.ndim != 3 or coil_maps.shape[1:] != torch.Size(image_shape[1:]):
            got = f"{tuple(coil_maps.shape)} of {coil_maps.dtype}"
            raise ValueError(f"coil_maps must be complex (N, {image_shape[1]}, {image_shape[2]}), got {got}")
        super().__init__(checked_mask(mask, image_shape).float(), coil_maps, tuple(image_shape), device=device)
        self.is_complex = image_shape[0] == 2

    def A(self, x: Tensor, **kwargs: object) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """M F S_n x, from images (B, C, H, W)."""
        if self.is_complex:
            return super().A(x)
        each = x.reshape(-1, 1, *x.shape[-2:])
        y = super().A(torch.cat([each, torch.zeros_like(each)], 1))
        return y.reshape(len(x), -1, *y.shape[2:])

    def A_adjoint(self, y: Tensor, **kwargs: object) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """sum_n S_n^H F^H M y_n, of real images the real part: (B, C, H, W)."""
        if self.is_complex:
            return super().A_adjoint(y)
        each = super().A_adjoint(y.reshape(-1, 2, *y.shape[2:]))[:, :1]
        return each.reshape(len(y), -1, *each.shape[2:])

    def noise(self, x: Tensor, **kwargs: object) -> Tensor:
        """x with noise where it is measured."""
        return self.get_buffer("mask")[:, :1, None] * self.noise_model(x, **kwargs)


def coil_sensitivities(n_coils: int, height: int, width: int) -> Tensor:
    """Simulated sensitivities, complex (N, H, W), of N coils on a circle around the image, sum_n |S_n|^2 = 1 everywhere.

    As Biot and Savart's law has it, a coil's field falls with the distance, and its phase turns with the direction.

    Raises:
        ValueError: n_coils is not a positive whole number.

    Example:
        >>> float((coil_sensitivities(4, 8, 8).abs().square().sum(0) - 1).abs().max()) < 1e-6
        True
    """
    require_count("n_coils", n_coils)
    angles = 2 * torch.pi * torch.arange(n_coils)[:, None, None] / n_coils
    rows, columns = torch.linspace(-1, 1, height)[:, None], torch.linspace(-1, 1, width)
    towards = torch.complex(1.5 * angles.cos() - columns, 1.5 * angles.sin() - rows)
    maps = towards / towards.abs().square()
    return maps / maps.abs().square().sum(0).sqrt()


class SuperResolution(ExactProx):
    """Filtering and subsampling, as a camera or Pillow's ``resize`` makes a smaller picture: y = R x C^T.

        y_j = sum_i h((i - c_j) / f) x_i / sum_i h((i - c_j) / f),      c_j = f j + (f - 1) / 2

    in rows and columns, R and C being these weights: sample j stands in the middle of its f pixels, and beyond the border
    there is nothing. With "bicubic" and "bilinear" it is Pillow's antialiased resize. Without a filter it is the pixel at or
    before c_j.

    Arguments:
        factor: f, divides H and W.
        image_shape: (C, H, W).
        filter: h, one of ``FILTERS``; None for bare subsampling.
        device: where the weights are kept.

    Raises:
        ValueError: factor does not divide H and W, or the filter is unknown.

    Example:
        >>> physics = SuperResolution(2, (3, 16, 16))
        >>> physics.A(torch.rand(1, 3, 16, 16)).shape
        torch.Size([1, 3, 8, 8])
    """

    def __init__(
        self,
        factor: int,
        image_shape: ImageShape,
        *,
        filter: str | None = "bicubic",
        device: torch.device | str = "cpu",
    ) -> None:
        height, width = image_shape[1:]
        checked_factor(factor, height, width)
        if filter is not None and filter not in FILTERS:
            raise ValueError(f"unknown filter {filter!r}; known: {', '.join(FILTERS)}, None")
        super().__init__(img_size=tuple(image_shape))
        self.set_noise_model(GaussianNoise(0.0))
        self.register_buffer("rows", _sampling(height, factor, filter), persistent=False)
        self.register_buffer("columns", _sampling(width, factor, filter), persistent=False)
        self._spectra: tuple[Tensor, ...] = ()
        self.to(device)

    def A(self, x: Tensor, **kwargs: object) -> Tensor:
        """R x C^T: (B, C, H/f, W/f) from images (B, C, H, W)."""
        rows, columns = self._weights(x)
        if x.shape[-2:] != (rows.shape[1], columns.shape[1]):
            own = f"{rows.shape[1]}x{columns.shape[1]}"
            raise ValueError(f"images of {x.shape[-2]}x{x.shape[-1]} do not fit the operator, which was made for {own}")
        return rows @ x @ columns.T

    def A_adjoint(self, y: Tensor, **kwargs: object) -> Tensor:
        """R^T y C: (B, C, H, W) from small images (B, C, H/f, W/f)."""
        rows, columns = self._weights(y)
        return rows.T @ y @ columns

    def regularized_inverse(self, v: Tensor, y: Tensor, rho: float | Tensor) -> Tensor:
        """v + A^T (A A^T + rho I)^-1 (y - A v), in the eigenvectors of R R^T and C C^T."""
        residual = y - self.A(v)
        rows, row_values, columns, column_values = self._eigen(residual)
        spectrum = (rows.T @ residual @ columns) / (row_values[:, None] * column_values + rho)
        return v + self.A_adjoint(rows @ spectrum @ columns.T)

    def _weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.get_buffer("rows").to(x.dtype), self.get_buffer("columns").to(x.dtype)

    def _eigen(self, x: Tensor) -> tuple[Tensor, ...]:
        """Eigenvectors and eigenvalues of R R^T, then of C C^T; computed once."""
        if not self._spectra or self._spectra[0].dtype != x.dtype or self._spectra[0].device != x.device:
            pairs = (torch.linalg.eigh(w.double() @ w.double().T) for w in (part.cpu() for part in self._weights(x)))
            self._spectra = tuple(part.to(x) for values, vectors in pairs for part in (vectors, values))
        return self._spectra


def checked_factor(factor: object, height: int = 0, width: int = 0) -> int:
    """The factor, or an error if it is no positive whole number or does not divide the sides of the image."""
    if not isinstance(factor, int) or isinstance(factor, bool) or factor < 1 or height % factor or width % factor:
        sides = "the sides of the image" + (f", {height}x{width}" if height else "")
        raise ValueError(f"factor must be a positive whole number that divides {sides}, got {factor!r}")
    return factor


def _sampling(length: int, factor: int, filter: str | None) -> Tensor:
    """Weights (length // factor, length) of every pixel in every sample."""
    if filter is None:
        return torch.eye(length)[(factor - 1) // 2 :: factor]
    centers = factor * torch.arange(length // factor, dtype=torch.float64) + (factor - 1) / 2
    weights = _filter_value((torch.arange(length) - centers[:, None]) / factor, factor, filter)
    return (weights / weights.sum(1, keepdim=True)).float()


def _filter_value(t: Tensor, factor: int, filter: str) -> Tensor:
    """h(t), t in small pixels."""
    t = t.abs()
    if filter == "bilinear":
        return (1 - t).clamp_min(0)
    if filter == "gaussian":
        return torch.exp(-0.5 * t.square()) * (t <= 3)
    if filter == "bicubic":  # Keys, a = -1/2
        inner, outer = 1.5 * t**3 - 2.5 * t**2 + 1, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
        return torch.where(t <= 1, inner, torch.where(t < 2, outer, 0.0))
    # a sinc of 4 f taps in a Kaiser window, as deepinv's sinc_filter has it
    attenuation = 2.285 * (4 * factor - 1) * math.pi * 2 * (2 - math.sqrt(2)) / factor + 7.95
    below = attenuation - 21
    beta = 0.5842 * below**0.4 + 0.07886 * below if below < 29 else 0.1102 * (attenuation - 8.7)
    inside = 1 - (2 * t * factor / (4 * factor - 1)).square()
    return torch.sinc(t) * torch.special.i0(beta * inside.clamp_min(0).sqrt()) * (inside >= 0)


class CT(Tomography):
    """Computed tomography with parallel or fan beams, divided by its norm, with the exact adjoint: y (B, C, N, n_angles).

    deepinv's ``Tomography``, computed with the sparse matrix of its Radon transform up to ``MATRIX_LIMIT`` entries. N is the
    diagonal of the image in pixels, and 1.52 of its sides for a fan: its source stands two sides from the middle, the detector
    one, with cells that are a pixel wide in the middle of the image.

    Arguments:
        n_angles: number of angles, evenly spaced over 180 degrees, of a fan over 360.
        image_shape: (C, H, W) with H = W; every channel is measured alone.
        fan_beam: whether the beams come from one point.
        device: where the operator's tensors are kept.

    Raises:
        ValueError: n_angles is not a positive whole number; the image is not square.

    Example:
        >>> physics = CT(6, (1, 16, 16))
        >>> physics.A(torch.rand(2, 1, 16, 16)).shape
        torch.Size([2, 1, 23, 6])
    """

    def __init__(
        self, n_angles: int, image_shape: ImageShape, *, fan_beam: bool = False, device: torch.device | str = "cpu"
    ) -> None:
        require_count("n_angles", n_angles)
        require_choice("fan_beam", fan_beam, (True, False))
        width, height = image_shape[2], image_shape[1]
        if width != height:
            raise ValueError(f"computed tomography takes square images, got {height}x{width}; crop or pad them")
        # made on the CPU, so that its norm is the same on every device
        fan = {"fan_beam": fan_beam, "fan_parameters": _fan(width) if fan_beam else None}
        angles = torch.linspace(0, 360 if fan_beam else 180, n_angles + 1)[:-1]
        super().__init__(angles.tolist(), width, normalize=False, img_size=tuple(image_shape), **fan)
        self.set_noise_model(GaussianNoise(0.0))
        matrix = _radon_matrix(width, angles, **fan) if 4 * width**2 * n_angles <= MATRIX_LIMIT else None
        self.register_buffer("matrix", None if matrix is None else _compressed(matrix), persistent=False)
        self.register_buffer("transpose", None if matrix is None else _compressed(matrix.t()), persistent=False)
        self.register_buffer("operator_norm", torch.ones(()))
        x = torch.zeros(1, 1, *image_shape[1:])
        with torch.random.fork_rng(devices=[]):  # the power method starts at random
            torch.manual_seed(0)
            self.operator_norm = self.compute_sqnorm(x, verbose=False).sqrt()
        self.normalize = True
        self.to(device)

    def A(self, x: Tensor, **kwargs: object) -> Tensor:
        """R x / ||R||: (B, C, N, n_angles) from images (B, C, W, W)."""
        norm, matrix = self.get_buffer("operator_norm"), self.matrix
        if not isinstance(matrix, Tensor) or tuple(x.shape[-2:]) != (self.img_width, self.img_width):
            return super().A(x.to(norm.dtype)).to(x.dtype)
        y = _SparseProduct.apply(x.flatten(-2).to(norm.dtype), matrix, self.transpose)
        y = y.view(*x.shape[:2], -1, len(self.angles))  # pyright: ignore
        return (y / norm if self.normalize else y).to(x.dtype)

    def A_adjoint(self, y: Tensor, **kwargs: object) -> Tensor:
        """R^T y / ||R||: (B, C, W, W) from measurements (B, C, N, n_angles)."""
        norm, shape = self.get_buffer("operator_norm"), (*y.shape[:2], self.img_width, self.img_width)
        own = y.to(norm.dtype)
        if self.matrix is None:
            return adjoint_function(self.A, shape, device=y.device, dtype=own.dtype)(own).to(y.dtype)  # pyright: ignore
        x = _SparseProduct.apply(own.flatten(-2), self.transpose, self.matrix).view(shape)  # pyright: ignore
        return (x / norm if self.normalize else x).to(y.dtype)


class PhotonNoise(LogPoissonNoise):
    """The noise of counted photons in transmission: deepinv's ``LogPoissonNoise``, finite where no photon arrives.

        y = -log(max(n, 1/2) / N_0) / mu,    n ~ Poisson(N_0 exp(-mu x))         x measurement without noise

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


def _fan(width: int) -> dict[str, float]:
    """Where source and detector stand, in pixels; the outermost beams touch the corners of the image."""
    distances = {"pixel_spacing": 1.0, "source_radius": 2.0 * width, "detector_radius": 1.0 * width}
    return distances | {"detector_spacing": 1.5, "n_detector_pixels": math.ceil(1.52 * width)}


class _SparseProduct(torch.autograd.Function):
    """matrix @ x for each vector of x (B, C, n); the gradient uses the transpose that is at hand."""

    @staticmethod
    def forward(x: Tensor, matrix: Tensor, transpose: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        with torch.autocast(x.device.type, enabled=False):
            return (matrix @ x.flatten(0, -2).t().contiguous()).t().reshape(*x.shape[:-1], -1)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, ctx.matrix, ctx.transpose = inputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore
        return _SparseProduct.apply(gradients[0], ctx.transpose, ctx.matrix), None, None  # pyright: ignore


def _compressed(matrix: Tensor) -> Tensor:
    """A sparse matrix by rows with 32-bit indices: its product takes a tenth of the time of one by coordinates."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse (CSR tensor support|invariant checks)")
        rows = matrix.coalesce().to_sparse_csr()
        parts = rows.crow_indices().int(), rows.col_indices().int(), rows.values()
        return torch.sparse_csr_tensor(*parts, rows.shape, check_invariants=False)


def _radon_matrix(width: int, angles: Tensor, **fan: Any) -> Tensor:
    """The matrix of deepinv's Radon transform of one channel: (N n_angles, W W), sparse."""
    grids = Radon(width, angles, parallel_computation=False, **fan).get_buffer("all_grids").double()
    n, n_cells = grids.shape[-3:-1]
    before = n // 2 - width // 2  # where the image stands in the padded square
    indices, values = [], []
    for a, grid in enumerate(grids.reshape(len(angles), n, n_cells, 2)):
        position = (grid + 1) / 2 * (n - 1)
        column = torch.arange(n_cells).expand(n, n_cells)  # of the detector: rows are summed
        for shift in ((0, 0), (0, 1), (1, 0), (1, 1)):
            corner = position.floor() + torch.tensor(shift)
            weight = (1 - (position - corner).abs()).prod(-1)
            pixel = corner.long() - before
            inside = ((pixel >= 0) & (pixel < width)).all(-1)
            place = pixel[inside][:, 1] * width + pixel[inside][:, 0]
            indices.append(torch.stack([column[inside] * len(angles) + a, place]))
            values.append(weight[inside])
    shape = (n_cells * len(angles), width * width)
    entries = torch.cat(values).float()
    return torch.sparse_coo_tensor(torch.cat(indices, 1), entries, shape, check_invariants=False).coalesce()


def filtered_backprojection(y: Tensor, physics: LinearPhysics) -> Tensor:
    """(B, C, W, W) from y of a tomography, with the ramp filter: deepinv's ``Tomography.fbp``. ValueError for another physics.

    A fan's beams are not weighted by their distance to the source there, which costs accuracy.
    """
    if not isinstance(physics, Tomography):
        raise ValueError("filtered backprojection needs a tomography (problem ct): this physics is none")
    return physics.fbp(y)


def kspace_mask(
    height: int,
    width: int,
    acceleration: int = 4,
    center_fraction: float | None = None,
    seed: int = 0,
    pattern: str = "random",
) -> Tensor:
    """Mask (H, W) of 1/acceleration of k-space, the zero frequency in the middle: 1 measured, 0 not.

    Of columns a fraction ``center_fraction`` of all in the middle is always measured, the others are drawn by deepinv's mask
    generators. Radial lines are evenly spaced in angle, and as few as reach 1/acceleration.

    Arguments:
        height, width: of the image, in pixels.
        acceleration: one in so many columns is measured.
        center_fraction: of the columns; by default 0.08, and 0.04 from an acceleration of 8.
        seed: of the columns.
        pattern: "random", "gaussian" (denser in the middle) or "equispaced" columns, or "radial" lines.

    Raises:
        ValueError: another pattern, a center_fraction of radial lines; acceleration is not a whole number from 1 to W, or
            center_fraction asks for more columns than there are.

    Example:
        >>> int(kspace_mask(16, 32, acceleration=4)[0].sum())
        8
    """
    if pattern not in PATTERNS:
        raise ValueError(f"unknown pattern {pattern!r}; {nearest(str(pattern), PATTERNS)}")
    if not isinstance(acceleration, int) or isinstance(acceleration, bool) or not 1 <= acceleration <= width:
        raise ValueError(f"acceleration must be a whole number from 1 to the width {width}, got {acceleration!r}")
    if pattern == "radial":
        if center_fraction is not None:
            raise ValueError("center_fraction is of columns, and a radial pattern has none; leave it out")
        return _radial_mask(height, width, acceleration)
    if center_fraction is None:
        center_fraction = 0.08 if acceleration < 8 else 0.04
    if not isinstance(center_fraction, int | float) or not 0 <= int(center_fraction * width) <= width // acceleration:
        limit = f"a fraction of the {width} columns and at most 1/acceleration = {1 / acceleration:g}"
        raise ValueError(f"center_fraction must be {limit}, got {center_fraction!r}")
    if int(center_fraction * width) == width // acceleration:  # deepinv warns that it draws none beside the center
        mask = torch.zeros(height, width)
        start = width // 2 - int(center_fraction * width) // 2
        mask[:, start : start + width // acceleration] = 1.0
        return mask
    rng = torch.Generator().manual_seed(seed)
    generator = _COLUMNS[pattern]((height, width), acceleration, float(center_fraction), rng=rng)
    return generator.step(batch_size=1)["mask"][0, 0]


def _radial_mask(height: int, width: int, acceleration: int) -> Tensor:
    along = torch.linspace(-1, 1, 2 * (height + width), dtype=torch.float64)
    mask, n_lines = torch.zeros(height, width), 0
    while mask.mean() < 1 / acceleration:
        n_lines += 1
        angles = torch.pi * torch.arange(n_lines, dtype=torch.float64)[:, None] / n_lines
        places = [
            (n // 2 + (along * turned * max(height, width) / 2).round()).long()
            for n, turned in ((height, angles.sin()), (width, angles.cos()))
        ]
        inside = (places[0] >= 0) & (places[0] < height) & (places[1] >= 0) & (places[1] < width)
        mask = torch.zeros(height, width)
        mask[places[0][inside], places[1][inside]] = 1.0
    return mask
