"""Blur by a given or a learned kernel: ``CircularBlur`` sees the image repeated, ``PaddedBlur`` has the other boundaries."""

from __future__ import annotations

import torch
from deepinv.physics import Blur, LinearPhysics
from deepinv.physics.functional import conv2d, conv_transpose2d, filter_fft, gaussian_blur
from torch import Tensor, nn

from flowprox.naming import Specified
from flowprox.noise import GaussianNoise
from flowprox.noise.base import at_least_zero
from flowprox.operators.measurements import ExactProx

BOUNDARIES = ("circular", "reflect", "replicate", "zeros", "valid")
"""What a blur sees outside the image: the image repeated, mirrored, its last pixel, black; or it keeps to the pixels whose
whole neighborhood is known, "valid", so that the measurement is smaller by the kernel's sides less one."""


class CircularConvolution(ExactProx):
    """Convolution of every channel with one kernel, the image repeated periodically.

        A x = F^-1 (h F x),    A^T y = F^-1 (conj(h) F y),    h = F(kernel)

    F is the discrete Fourier transform. Unlike deepinv's ``BlurFFT`` it takes images of any size that holds the kernel, and
    ``prox_l2`` is exact and differentiable in every argument and in the kernel.
    """

    def kernel(self) -> Tensor:
        """The kernel, shape (1, 1, h, w) with h and w odd, its center in the middle."""
        raise NotImplementedError

    def A(self, x: Tensor, **kwargs: object) -> Tensor:
        """k * x, of the shape of x (B, C, H, W)."""
        return self._filtered(x, self._transfer(x))

    def A_adjoint(self, y: Tensor, **kwargs: object) -> Tensor:
        """Correlation of y with the kernel, of the shape of y (B, C, H, W)."""
        return self._filtered(y, self._transfer(y).conj())

    def regularized_inverse(self, v: Tensor, y: Tensor, rho: float | Tensor) -> Tensor:
        """argmin_x 1/2 ||y - A x||^2 + rho/2 ||x - v||^2 = F^-1[(conj(h) F y + rho F v) / (|h|^2 + rho)]."""
        transfer = self._transfer(y)
        spectrum = transfer.conj() * _fourier(y) + rho * _fourier(v)
        return torch.fft.irfft2(spectrum / (transfer.abs().square() + rho), s=y.shape[-2:])

    def A_dagger(self, y: Tensor, *, tolerance: float = 1e-6, **kwargs: object) -> Tensor:  # pyright: ignore
        """Pseudo-inverse; frequencies that the kernel damps below ``tolerance`` are set to zero."""
        transfer = self._transfer(y)
        passes = transfer.abs() > tolerance
        inverse = torch.where(passes, 1.0 / torch.where(passes, transfer, torch.ones_like(transfer)), 0.0)
        return self._filtered(y, inverse)

    def _transfer(self, x: Tensor) -> Tensor:
        kernel = self.kernel().to(torch.promote_types(x.dtype, torch.float32))
        _check_fits(kernel, *x.shape[-2:])
        return filter_fft(kernel, (1, *x.shape[-2:]), dims=(-2, -1))

    @staticmethod
    def _filtered(x: Tensor, transfer: Tensor) -> Tensor:
        return torch.fft.irfft2(transfer * _fourier(x), s=x.shape[-2:])


def _fourier(x: Tensor) -> Tensor:
    return torch.fft.rfft2(x.to(torch.promote_types(x.dtype, torch.float32)))  # there is no FFT in bfloat16


class CircularBlur(CircularConvolution):
    """Blur with a given kernel and circular boundary.

    Arguments:
        kernel: (h, w) with h and w odd, used as it stands: a sum of 1 keeps the brightness.
        image_shape: (C, H, W) the operator is made for; any size that holds the kernel can be passed.
        device: where the kernel is kept.

    Raises:
        ValueError: the kernel is not a finite, non-zero matrix with odd sides, or is larger than the image.

    Example:
        >>> y = CircularBlur(torch.full((3, 3), 1 / 9)).A(torch.ones(1, 3, 8, 8))
        >>> torch.allclose(y, torch.ones(1, 3, 8, 8))
        True
    """

    def __init__(
        self, kernel: Tensor, *, image_shape: tuple[int, int, int] | None = None, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(img_size=image_shape)
        self.set_noise_model(GaussianNoise(0.0))
        self.register_buffer("filter", checked_kernel(kernel, image_shape)[None, None])
        self.to(device)

    def kernel(self) -> Tensor:
        """The kernel, shape (1, 1, h, w)."""
        return self.get_buffer("filter")


class PaddedBlur(Blur):
    """Blur with another boundary than the circular one: deepinv's ``Blur``, for images of any floating-point type.

    ``boundary`` is one of ``BOUNDARIES``; the other arguments are those of ``CircularBlur``.

    Example:
        >>> PaddedBlur(torch.full((3, 3), 1 / 9), "valid").A(torch.ones(1, 3, 8, 8)).shape
        torch.Size([1, 3, 6, 6])
    """

    def __init__(
        self,
        kernel: Tensor,
        boundary: str,
        *,
        image_shape: tuple[int, int, int] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        kernel = checked_kernel(kernel, image_shape)[None, None]
        super().__init__(filter=kernel, padding=boundary, device=torch.device(device), img_size=image_shape)
        self.set_noise_model(GaussianNoise(0.0))

    def A(self, x: Tensor, **kwargs: object) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """k * x: (B, C, H, W), or less the kernel's sides plus one where the boundary is "valid"."""
        kernel = self.get_buffer("filter").to(x.dtype)
        return conv2d(x, kernel, padding="valid" if kernel.numel() == 1 else self.padding)

    def A_adjoint(self, y: Tensor, **kwargs: object) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The adjoint of A, (B, C, H, W)."""
        kernel, (height, width) = self.get_buffer("filter").to(y.dtype), y.shape[-2:]
        if self.padding == "valid" or kernel.numel() == 1:
            return conv_transpose2d(y, kernel, padding="valid")
        h, w = (int(side == 1) for side in kernel.shape[-2:])  # deepinv folds a side of one wrongly: framed with zeros
        kernel, y = nn.functional.pad(kernel, (w, w, h, h)), nn.functional.pad(y, (0, w, 0, h))
        return conv_transpose2d(y, kernel, padding=self.padding)[..., :height, :width]


class WindowedBlur(LinearPhysics):
    """A = M (k *): a blur with a kernel (h, w) of which only the pixels of the mask M (H, W) are measured.

    Where M keeps the kernel's radius away from the border, the circular convolution inside equals any other.
    """

    def __init__(self, kernel: Tensor, mask: Tensor) -> None:
        super().__init__()
        self.blur = CircularBlur(kernel, device=kernel.device)
        self.register_buffer("mask", mask.to(kernel))

    def A(self, x: Tensor, **kwargs: object) -> Tensor:
        """M (k * x), of the shape of x (B, C, H, W)."""
        return self.get_buffer("mask") * self.blur.A(x)

    def A_adjoint(self, y: Tensor, **kwargs: object) -> Tensor:
        """The adjoint blur of M y, of the shape of y (B, C, H, W)."""
        return self.blur.A_adjoint(self.get_buffer("mask") * y)


class LearnedBlur(Specified, CircularConvolution):
    """Circular blur whose kernel is learned, starting as a Gaussian: the learned operator of an unfolded network.

    With ``normalized`` the kernel is a softmax of its parameter: positive, sum 1. Otherwise it is the parameter itself.

    Arguments:
        kernel_size: odd number of pixels.
        sigma_blur: standard deviation of the Gaussian at the start, in pixels.
        sigma: noise standard deviation, used only when this operator itself makes measurements.
        normalized: whether the kernel is kept positive with sum 1.

    Raises:
        ValueError: an even kernel_size, sigma_blur not positive, negative sigma.

    Example:
        >>> physics = LearnedBlur(kernel_size=3, sigma_blur=1.0)
        >>> physics.A(torch.rand(1, 3, 8, 8)).sum().backward()
        >>> [parameter.grad.shape for parameter in physics.parameters()]
        [torch.Size([3, 3])]
    """

    def __init__(
        self, kernel_size: int = 9, sigma_blur: float = 5.0, sigma: float = 0.0, normalized: bool = True
    ) -> None:
        super().__init__()
        self.set_noise_model(GaussianNoise(sigma))
        kernel = gaussian_kernel(kernel_size, sigma_blur)
        self.normalized = normalized
        self.weight = nn.Parameter(kernel.clamp(min=1e-12).log() if normalized else kernel)

    def kernel(self) -> Tensor:
        """The kernel as learned so far, shape (1, 1, h, w)."""
        weight = self.weight.flatten().softmax(0).view_as(self.weight) if self.normalized else self.weight
        return weight[None, None]


def gaussian_kernel(kernel_size: int, sigma_blur: float) -> Tensor:
    """Gaussian (kernel_size, kernel_size) of sum 1 with a standard deviation of sigma_blur pixels."""
    if not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be a positive odd number of pixels, got {kernel_size!r}; even ones shift")
    if at_least_zero("sigma_blur", sigma_blur) == 0:
        raise ValueError("sigma_blur must be positive; for no blur use the problem denoising")
    return gaussian_blur(psf_size=(kernel_size, kernel_size), sigma=(sigma_blur, sigma_blur))[0, 0]


def checked_kernel(kernel: Tensor, image_shape: tuple[int, int, int] | None) -> Tensor:
    """The kernel in float32, or an error if it is no kernel (h, w) with odd sides that fits the image."""
    if kernel.ndim != 2 or any(side % 2 == 0 for side in kernel.shape):
        raise ValueError(f"kernel must be a matrix (h, w) with odd sides, got {tuple(kernel.shape)}; pad it with zeros")
    if not torch.isfinite(kernel).all() or not kernel.any():
        raise ValueError("kernel must hold finite numbers that are not all zero")
    if image_shape is not None:
        _check_fits(kernel, *image_shape[1:])
    return kernel.float()


def _check_fits(kernel: Tensor, height: int, width: int) -> None:
    h, w = kernel.shape[-2:]
    if h > height or w > width:
        raise ValueError(f"the blur kernel of {h}x{w} is larger than the image of {height}x{width}; use a smaller one")
