"""Compressed sensing: fewer random linear measurements than pixels.

    dense:        y = A x + noise,              A_ij ~ N(0, 1/m)
    structured:   y = A x + noise,              A = sqrt(n/m) S H D
    one-bit:      y = sign(A x) + noise         or, with the noise first, y = sign(A x + noise)

x image (C, H, W) as a vector of n = C H W numbers; y (m,); m number of measurements; D random signs, H the orthogonal
discrete Hartley transform, S m of its n rows, chosen at random. Both matrices keep the energy on average,
E ||A x||^2 = ||x||^2, and are drawn on the CPU: the same for a seed on every device.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from deepinv.physics import LinearPhysics, Physics
from torch import Tensor
from torch.nn import functional

from flowprox.naming import require_count
from flowprox.noise import GaussianNoise
from flowprox.operators.measurements import ExactProx

ImageShape = tuple[int, int, int]


class _Sensing(LinearPhysics):
    """What the two sensing matrices share: sizes, checks, flat measurements."""

    def __init__(self, m: int, image_shape: ImageShape, *, seed: int = 0, device: torch.device | str = "cpu") -> None:
        super().__init__(img_size=tuple(image_shape))
        self.set_noise_model(GaussianNoise(0.0))
        require_count("m", m)
        self.m, self.n = m, math.prod(image_shape)
        self._draw(torch.Generator().manual_seed(seed), device)
        self.to(device)

    def _draw(self, generator: torch.Generator, device: torch.device | str) -> None:
        """Make what is random, on the CPU; it will be kept on ``device``."""
        raise NotImplementedError

    def _vector(self, x: Tensor) -> Tensor:
        if (shape := tuple(x.shape[1:])) != self.img_size:
            raise ValueError(f"images of shape {shape} do not fit the sensing matrix, drawn for {self.img_size}")
        return x.reshape(len(x), -1)

    def _image(self, x: Tensor) -> Tensor:
        assert self.img_size is not None
        return x.reshape(len(x), *self.img_size)

    def _measured(self, y: Tensor) -> Tensor:
        if tuple(y.shape[1:]) != (self.m,):
            raise ValueError(f"y has shape {tuple(y.shape)} but the operator takes {self.m} measurements: (B, m)")
        return y


class DenseSensing(_Sensing):
    """Gaussian compressed sensing with the matrix in memory: y = A x, A_ij ~ N(0, 1/m).

    References:
        Asim et al. 2020, Invertible generative models for inverse problems, https://arxiv.org/abs/1905.11672, Sec. 3

    Arguments:
        m: number of measurements; may exceed the number of pixels.
        image_shape: (C, H, W); the matrix is drawn for it.
        seed: of the matrix.
        device: where the matrix is kept; it is drawn on the CPU.

    Raises:
        MemoryError: the matrix does not fit; the message says how much it needs.

    Example:
        >>> physics = DenseSensing(50, (1, 8, 8))
        >>> physics.A(torch.ones(2, 1, 8, 8)).shape
        torch.Size([2, 50])
    """

    def _draw(self, generator: torch.Generator, device: torch.device | str) -> None:
        remedy = "use structured=True, which keeps no matrix, a smaller m or smaller images"
        for place in dict.fromkeys(("cpu", str(device))):
            check_free(4 * self.m * self.n, f"the dense sensing matrix of {self.m} x {self.n}", remedy, place)
        # deepinv's CompressedSensing computes the pseudo-inverse of this matrix: minutes, and twice the memory
        matrix = torch.randn(self.m, self.n, generator=generator).div_(math.sqrt(self.m))
        self.register_buffer("matrix", matrix, persistent=False)

    def A(self, x: Tensor, **kwargs: object) -> Tensor:
        """A x: (B, m) from images (B, C, H, W)."""
        return functional.linear(*_same_dtype(self._vector(x), self.get_buffer("matrix")))

    def A_adjoint(self, y: Tensor, **kwargs: object) -> Tensor:
        """A^T y: (B, C, H, W) from measurements (B, m)."""
        y, matrix = _same_dtype(self._measured(y), self.get_buffer("matrix"))
        return self._image(y @ matrix)


class StructuredSensing(_Sensing, ExactProx):
    """Compressed sensing without a matrix in memory: y = sqrt(n/m) S H D x in O(n log n) time and O(n) memory.

    D are random signs, H is the orthogonal discrete Hartley transform, its own inverse, S picks m of n rows at random.
    A A^T = (n/m) I, so the data step has a closed form. Arguments as ``DenseSensing``; m is at most n.

    References:
        Do, Gan, Nguyen, Tran 2012, Fast compressive sensing using structurally random matrices, https://arxiv.org/abs/1106.5037

    Raises:
        ValueError: m is not a whole number from 1 to n.

    Example:
        >>> physics = StructuredSensing(64, (1, 8, 8))  # all rows: an orthogonal matrix
        >>> x = torch.rand(2, 1, 8, 8)
        >>> torch.allclose(physics.A_adjoint(physics.A(x)), x, atol=1e-6)
        True
    """

    def _draw(self, generator: torch.Generator, device: torch.device | str) -> None:
        if self.m > self.n:
            more = f"m={self.m} is more than the {self.n} pixels of an image, and structured sensing has a row for each"
            raise ValueError(f"{more}; use structured=False or a smaller m")
        signs = torch.randint(0, 2, (self.n,), generator=generator) * 2.0 - 1.0
        self.register_buffer("signs", signs, persistent=False)
        self.register_buffer("rows", torch.randperm(self.n, generator=generator)[: self.m], persistent=False)
        self.scale = math.sqrt(self.n / self.m)

    def A(self, x: Tensor, **kwargs: object) -> Tensor:
        """A x: (B, m) from images (B, C, H, W)."""
        x, signs = _same_dtype(self._vector(x), self.get_buffer("signs"))
        return self.scale * _hartley(signs * x)[:, self.get_buffer("rows")]

    def A_adjoint(self, y: Tensor, **kwargs: object) -> Tensor:
        """A^T y: (B, C, H, W) from measurements (B, m)."""
        y, signs = _same_dtype(self._measured(y), self.get_buffer("signs"))
        spectrum = y.new_zeros(len(y), self.n).index_copy(1, self.get_buffer("rows"), y)
        return self._image(self.scale * signs * _hartley(spectrum))

    def A_dagger(self, y: Tensor, **kwargs: object) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Pseudo-inverse: (m/n) A^T."""
        return self.A_adjoint(y) / self.scale**2

    def regularized_inverse(self, v: Tensor, y: Tensor, rho: float | Tensor) -> Tensor:
        """argmin_x 1/2 ||y - A x||^2 + rho/2 ||x - v||^2 = v + A^T (y - A v) / (n/m + rho)."""
        return v + self.A_adjoint(y - self.A(v)) / (self.scale**2 + rho)


class OneBitSensing(Physics):
    """Noisy 1-bit compressed sensing: only the sign of each measurement is kept, +1 (also at zero) or -1.

        y = sign(A x) + noise                        the noise last, as in y = f(x) + noise with f = sign A (default)
        y = sign(A x + noise)                        with ``noise_first``: the noise flips signs, y holds only -1 and 1

    ``A`` is sign(A x) in both forms. Its gradient is straight-through: that of A x, as if sign were the identity. The
    residual y - A(x_hat) is the noise itself in the first form, so that its log-density is the exact likelihood; in the
    second it counts flipped signs (-2, 0 or 2), and a density of additive noise is only a surrogate.

    References:
        Whang et al. 2021, Solving inverse problems with a flow-based noise model, https://arxiv.org/abs/2003.08089, Sec. 5.1.4
        Bengio, Leonard, Courville 2013, Estimating gradients through stochastic neurons, https://arxiv.org/abs/1308.3432

    Arguments:
        linear: the measurement before the sign, ``DenseSensing`` or ``StructuredSensing``.
        noise_first: whether the noise comes before the sign.

    Example:
        >>> physics = OneBitSensing(DenseSensing(50, (1, 8, 8)))
        >>> physics.A(torch.rand(1, 1, 8, 8)).unique().tolist()
        [-1.0, 1.0]
    """

    def __init__(self, linear: LinearPhysics, *, noise_first: bool = False) -> None:
        super().__init__(noise_model=GaussianNoise(0.0))
        self.linear = linear
        self.noise_first = noise_first
        self.img_size = linear.img_size

    def A(self, x: Tensor, **kwargs: object) -> Tensor:
        """sign(A x): (B, m) of -1 and 1 from images (B, C, H, W)."""
        return _sign(self.linear.A(x))

    def A_adjoint(self, y: Tensor, **kwargs: object) -> Tensor:
        """A^T y of the linear part: the straight-through gradient of <y, A(x)>."""
        return self.linear.A_adjoint(y)

    def A_dagger(self, y: Tensor, x_init: Tensor | None = None, **kwargs: object) -> Tensor:  # pyright: ignore
        """Pseudo-inverse of the linear part, which knows no amplitude: a start, not an inverse."""
        return self.linear.A_dagger(y)

    def before_noise(self, x: Tensor) -> Tensor:
        """What the noise is added to: A x if it comes first, sign(A x) otherwise."""
        return self.linear.A(x) if self.noise_first else self.A(x)

    def sensor(self, x: Tensor) -> Tensor:
        """What follows the noise: the sign if the noise comes first, otherwise nothing."""
        return _sign(x) if self.noise_first else x

    def forward(self, x: Tensor, **kwargs: object) -> Tensor:
        """y, with noise."""
        return self.sensor(self.noise(self.before_noise(x), **kwargs))


def _sign(x: Tensor) -> Tensor:
    """+1 or -1 with the gradient of the identity."""
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype) + (x - x.detach())


def check_free(n_bytes: int, what: str, remedy: str = "use a smaller one", device: str = "cpu") -> None:
    """Raise ``MemoryError`` where that is more than the free memory of a device."""
    free = _free_memory(torch.device(device))
    if free is not None and n_bytes > free:
        raise MemoryError(f"{what} needs {_gigabytes(n_bytes)}, and {device} has {_gigabytes(free)} free; {remedy}")


def _free_memory(device: torch.device) -> int | None:
    """Bytes that can still be had on the device; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    free = []
    information = Path("/proc/meminfo")
    if information.is_file():
        lines = information.read_text().splitlines()
        free += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        free.append(int(text))
    return min(free, default=None)


def _gigabytes(n: int) -> str:
    return f"{n / 1e9:,.1f} GB" if n >= 1e8 else f"{n / 1e6:,.1f} MB"


def _same_dtype(x: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, buffer.dtype)
    return x.to(dtype), buffer.to(dtype)


def _hartley(x: Tensor) -> Tensor:
    """Orthogonal discrete Hartley transform of the last axis, its own inverse: H x = Re F x - Im F x."""
    spectrum = torch.fft.fft(x, norm="ortho")
    return spectrum.real - spectrum.imag
