"""Super-resolution, magnetic resonance and computed tomography of real images, each channel alone.

    SR:     y = S (h * x)            h a filter, circular boundary; S every factor-th row and column
    MRI:    y = M F x                F the orthogonal Fourier transform, M a mask of lines in k-space
    CT:     y = R x / ||R||          R line integrals along n_angles parallel beams

x image (B, C, H, W), real; y measurement. All three are deepinv's operators, whose MRI takes complex images and whose
tomography rotates the image for every angle.
"""

from __future__ import annotations

from typing import Any

import torch
from deepinv.physics import MRI, Downsampling, NoiseModel, Tomography, adjoint_function
from deepinv.physics.functional import Radon
from deepinv.physics.generator import RandomMaskGenerator
from torch import Tensor

from flowprox.noise import GaussianNoise
from flowprox.operators.data_steps import ExactProx
from flowprox.operators.masks import checked_mask

__all__ = ["FILTERS", "MATRIX_LIMIT", "ParallelCT", "RealMRI", "SuperResolution", "cartesian_mask"]

FILTERS = ("bicubic", "bilinear", "gaussian", "sinc")
"""What super-resolution filters the image with before it is sampled; None for nothing."""

MATRIX_LIMIT = 2 * 10**7
"""Entries up to which tomography keeps the sparse matrix of its Radon transform: 4 W^2 n_angles."""

ImageShape = tuple[int, int, int]


class RealMRI(ExactProx):
    """Single-coil MRI of a real image: y = M F x, real and imaginary part as channels; the adjoint is Re F^H M y.

    A^T A is a circular convolution, so the data step has a closed form. Lines that are not measured are zero in y, with
    noise and without.

    Arguments:
        mask: (H, W) of ones (measured) and zeros, the zero frequency in the middle.
        image_shape: (C, H, W); every channel is measured alone, so that y is (B, 2 C, H, W): for each channel its real
            part, then its imaginary part.
        noise_model: noise added to the real and imaginary part of what is measured; none by default.
        device: where the mask is kept.

    Raises:
        ValueError: the mask does not fit the image or holds other values.

    Example:
        >>> physics = RealMRI(cartesian_mask(16, 16, acceleration=2), (1, 16, 16))
        >>> physics.A(torch.rand(3, 1, 16, 16)).shape
        torch.Size([3, 2, 16, 16])
    """

    def __init__(
        self,
        mask: Tensor,
        image_shape: ImageShape,
        *,
        noise_model: NoiseModel | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(img_size=tuple(image_shape))
        self.set_noise_model(noise_model or GaussianNoise(0.0))
        mask = checked_mask(mask, image_shape).float()
        self.register_buffer("mask", mask)
        self.mri = MRI(mask=mask)
        # A^T A in the Fourier domain: the mask and its mirror image, each by half
        half = torch.fft.ifftshift(mask)
        mirrored = half.flip((0, 1)).roll((1, 1), (0, 1))
        self.register_buffer("gram", (half + mirrored)[:, : mask.shape[1] // 2 + 1] / 2, persistent=False)
        self.to(device)

    def A(self, x: Tensor, **kwargs: Any) -> Tensor:
        """M F x: (B, 2 C, H, W) from images (B, C, H, W)."""
        self._check("images", x, 1)
        x = x.reshape(-1, 1, *x.shape[-2:])
        y = self.mri.A(torch.cat([x, torch.zeros_like(x)], 1))
        return y.reshape(-1, 2 * self._channels, *y.shape[-2:])

    def A_adjoint(self, y: Tensor, **kwargs: Any) -> Tensor:
        """Re F^H M y: (B, C, H, W) from measurements (B, 2 C, H, W)."""
        self._check("y", y, 2)
        x = self.mri.A_adjoint(y.reshape(-1, 2, *y.shape[-2:]))[:, :1]
        return x.reshape(-1, self._channels, *x.shape[-2:])

    def noise(self, x: Tensor, **kwargs: Any) -> Tensor:
        """x with noise where it is measured."""
        return self.get_buffer("mask") * self.noise_model(x, **kwargs)

    def regularized_inverse(self, v: Tensor, y: Tensor, rho: float | Tensor) -> Tensor:
        """argmin_x 1/2 ||y - A x||^2 + rho/2 ||x - v||^2, a division in the Fourier domain."""
        spectrum = torch.fft.rfft2(self.A_adjoint(y) + rho * v)
        return torch.fft.irfft2(spectrum / (self.get_buffer("gram") + rho), s=v.shape[-2:])

    def A_dagger(self, y: Tensor, **kwargs: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Pseudo-inverse: frequencies that neither the line nor its mirror image measures are set to zero."""
        gram = self.get_buffer("gram")
        inverse = torch.where(gram > 0, 1.0 / torch.where(gram > 0, gram, torch.ones_like(gram)), 0.0)
        return torch.fft.irfft2(inverse * torch.fft.rfft2(self.A_adjoint(y)), s=y.shape[-2:])

    @property
    def _channels(self) -> int:
        assert self.img_size is not None
        return self.img_size[0]

    def _check(self, name: str, x: Tensor, factor: int) -> None:
        height, width = self.get_buffer("mask").shape
        expected = (factor * self._channels, height, width)
        if tuple(x.shape[1:]) != expected:
            raise ValueError(
                f"{name} of shape {tuple(x.shape[1:])} do not fit the MRI operator, which takes {expected}; "
                "build it with the image_shape of the images"
            )


class SuperResolution(ExactProx, Downsampling):
    """Filtering and subsampling: y = S (h * x), every factor-th row and column of the circularly filtered image.

    deepinv's ``Downsampling`` with an exact data step that is stable for small rho: A A^T is a circular convolution of
    the small image, so its inverse is a division in the Fourier domain.

    Arguments:
        factor: divides H and W.
        image_shape: (C, H, W).
        filter: h, one of ``FILTERS``; None for bare subsampling.
        noise_model: noise added to the small image; none by default.
        device: where the filter is kept.

    Raises:
        ValueError: factor does not divide H and W, the filter is unknown or larger than the image.

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
        noise_model: NoiseModel | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        height, width = image_shape[1:]
        if not isinstance(factor, int) or isinstance(factor, bool) or factor < 1 or height % factor or width % factor:
            raise ValueError(
                "factor must be a positive whole number that divides the height and width of the image, "
                f"{height}x{width}, got {factor!r}"
            )
        if filter is not None and filter not in FILTERS:
            raise ValueError(f"unknown filter {filter!r}; known: {', '.join(FILTERS)}, None")
        super().__init__(img_size=tuple(image_shape), filter=filter, factor=factor)  # pyright: ignore
        self.set_noise_model(noise_model or GaussianNoise(0.0))
        if filter is not None and any(
            h > side for h, side in zip(self.get_buffer("filter").shape[-2:], (height, width), strict=True)
        ):
            raise ValueError(
                f"the {filter} filter of factor {factor} is larger than the image of {height}x{width}; "
                "use a smaller factor or larger images"
            )
        self.to(device)

    def regularized_inverse(self, v: Tensor, y: Tensor, rho: float | Tensor) -> Tensor:
        """argmin_x 1/2 ||y - A x||^2 + rho/2 ||x - v||^2 = v + A^T (A A^T + rho I)^-1 (y - A v)."""
        impulse = torch.zeros_like(y[:1])
        impulse[..., 0, 0] = 1.0
        gram = torch.fft.rfft2(self.A(self.A_adjoint(impulse))).real  # A A^T in the Fourier domain
        spectrum = torch.fft.rfft2(y - self.A(v)) / (gram + rho)
        return v + self.A_adjoint(torch.fft.irfft2(spectrum, s=y.shape[-2:]))


class ParallelCT(Tomography):
    """Computed tomography with parallel beams, divided by its norm, with the exact adjoint: y (B, C, N, n_angles).

    deepinv's ``Tomography``, computed with the sparse matrix of its Radon transform: the same values and the exact
    adjoint in a fraction of the time. Images and angles too many for that (``MATRIX_LIMIT``) are rotated as deepinv does.
    N is the diagonal of the image in pixels.

    Arguments:
        n_angles: number of angles, evenly spaced over 180 degrees.
        image_shape: (C, H, W) with H = W; every channel is measured alone.
        noise_model: noise added to the measurement; none by default.
        device: where the operator's tensors are kept.

    Raises:
        ValueError: n_angles is not a positive whole number; the image is not square.

    Example:
        >>> physics = ParallelCT(6, (1, 16, 16))
        >>> physics.A(torch.rand(2, 1, 16, 16)).shape
        torch.Size([2, 1, 23, 6])
    """

    def __init__(
        self,
        n_angles: int,
        image_shape: ImageShape,
        *,
        noise_model: NoiseModel | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if not isinstance(n_angles, int) or isinstance(n_angles, bool) or n_angles < 1:
            raise ValueError(f"n_angles must be a positive whole number, got {n_angles!r}")
        if image_shape[1] != image_shape[2]:
            raise ValueError(
                f"computed tomography takes square images, got {image_shape[1]}x{image_shape[2]}; crop or pad them"
            )
        # made on the CPU, so that its norm is the same on every device
        super().__init__(angles=n_angles, img_width=image_shape[1], normalize=False, img_size=tuple(image_shape))
        self.set_noise_model(noise_model or GaussianNoise(0.0))
        matrix = (
            _radon_matrix(image_shape[1], self.angles) if 4 * image_shape[1] ** 2 * n_angles <= MATRIX_LIMIT else None
        )
        self.register_buffer("matrix", matrix, persistent=False)
        self.register_buffer("transpose", None if matrix is None else matrix.t().coalesce(), persistent=False)
        x = torch.zeros(1, 1, *image_shape[1:])
        with torch.random.fork_rng(devices=[]):  # the power method starts at random
            torch.manual_seed(0)
            self.register_buffer("operator_norm", self.compute_sqnorm(x, verbose=False).sqrt())
        self.normalize = True
        self.to(device)

    def A(self, x: Tensor, **kwargs: Any) -> Tensor:
        """R x / ||R||: (B, C, N, n_angles) from images (B, C, W, W)."""
        if self.matrix is None or tuple(x.shape[-2:]) != (self.img_width, self.img_width):
            return super().A(x)
        y = _SparseProduct.apply(x.flatten(-2), self.matrix, self.transpose)
        y = y.view(*x.shape[:2], -1, len(self.angles))  # pyright: ignore
        return y / self.operator_norm if self.normalize else y

    def A_adjoint(self, y: Tensor, **kwargs: Any) -> Tensor:
        """R^T y / ||R||: (B, C, W, W) from measurements (B, C, N, n_angles)."""
        shape = (*y.shape[:2], self.img_width, self.img_width)
        if self.matrix is None:
            return adjoint_function(self.A, shape, device=y.device, dtype=y.dtype)(y)  # pyright: ignore
        x = _SparseProduct.apply(y.flatten(-2), self.transpose, self.matrix).view(shape)  # pyright: ignore
        return x / self.operator_norm if self.normalize else x


class _SparseProduct(torch.autograd.Function):
    """matrix @ x for each vector of x (B, C, n); the gradient uses the transpose that is at hand."""

    @staticmethod
    def forward(x: Tensor, matrix: Tensor, transpose: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return torch.sparse.mm(matrix, x.flatten(0, -2).t().contiguous()).t().reshape(*x.shape[:-1], -1)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, ctx.matrix, ctx.transpose = inputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore
        return _SparseProduct.apply(gradients[0], ctx.transpose, ctx.matrix), None, None  # pyright: ignore


def _radon_matrix(width: int, angles: Tensor) -> Tensor:
    """The matrix of deepinv's Radon transform of one channel: (N n_angles, W W), sparse."""
    grids = Radon(width, angles, parallel_computation=False).get_buffer("all_grids").double()
    n = grids.shape[-2]
    before = n // 2 - width // 2  # where the image stands in the padded square
    indices, values = [], []
    for a, grid in enumerate(grids.reshape(len(angles), n, n, 2)):
        position = (grid + 1) / 2 * (n - 1)
        column = torch.arange(n).expand(n, n)  # of the detector: rows are summed
        for shift in ((0, 0), (0, 1), (1, 0), (1, 1)):
            corner = position.floor() + torch.tensor(shift)
            weight = (1 - (position - corner).abs()).prod(-1)
            pixel = corner.long() - before
            inside = ((pixel >= 0) & (pixel < width)).all(-1)
            indices.append(
                torch.stack([column[inside] * len(angles) + a, pixel[inside][:, 1] * width + pixel[inside][:, 0]])
            )
            values.append(weight[inside])
    shape = (n * len(angles), width * width)
    entries = torch.cat(values).float()
    return torch.sparse_coo_tensor(torch.cat(indices, 1), entries, shape, check_invariants=False).coalesce()


def cartesian_mask(
    height: int, width: int, acceleration: int = 4, center_fraction: float | None = None, seed: int = 0
) -> Tensor:
    """Mask (H, W) of W // acceleration columns of k-space, the zero frequency in the middle: 1 measured, 0 not.

    A fraction ``center_fraction`` of all columns in the middle is always measured, the others are drawn at random.

    Arguments:
        height: of the image, in pixels.
        width: of the image, in pixels.
        acceleration: one in so many columns is measured.
        center_fraction: of the columns; by default 0.08, and 0.04 from an acceleration of 8.
        seed: of the columns.

    Raises:
        ValueError: acceleration is not a whole number from 1 to W, or center_fraction asks for more columns than there
            are.

    Example:
        >>> int(cartesian_mask(16, 32, acceleration=4)[0].sum())
        8
    """
    if not isinstance(acceleration, int) or isinstance(acceleration, bool) or not 1 <= acceleration <= width:
        raise ValueError(f"acceleration must be a whole number from 1 to the width {width}, got {acceleration!r}")
    if center_fraction is None:
        center_fraction = 0.08 if acceleration < 8 else 0.04
    if not isinstance(center_fraction, int | float) or not 0 <= int(center_fraction * width) <= width // acceleration:
        raise ValueError(
            f"center_fraction must be a fraction of the {width} columns and at most 1/acceleration = {1 / acceleration:g}, "
            f"got {center_fraction!r}"
        )
    if int(center_fraction * width) == width // acceleration:  # deepinv warns that it draws none beside the center
        mask = torch.zeros(height, width)
        start = width // 2 - int(center_fraction * width) // 2
        mask[:, start : start + width // acceleration] = 1.0
        return mask
    generator = RandomMaskGenerator(
        (height, width), acceleration, float(center_fraction), rng=torch.Generator().manual_seed(seed)
    )
    return generator.step(batch_size=1)["mask"][0, 0]
