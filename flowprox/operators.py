"""Forward operators: a problem's name becomes a deepinv ``Physics`` with its noise.

    y = A x + sigma n,    n ~ N(0, I)

x image in [0, 1], shape (B, C, H, W); y measurement; A linear operator, A^T its adjoint; sigma noise standard deviation
in the units of x. Two functions reach the data from an image estimate, and every unfolded network and solver uses them:

    data_gradient:  A^T (y - A x)                                    the direction of descent of 1/2 ||y - A x||^2
    data_prox:      argmin_x 1/2 ||y - A x||^2 + rho/2 ||x - v||^2   = (A^T A + rho I)^-1 (A^T y + rho v)

All operators keep the size of the image. Denoising and deblurring take images of any size, whatever size they were made
for; a mask belongs to one size.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from deepinv.optim.linear import least_squares_implicit_backward
from deepinv.physics import (
    Blur,
    DecomposablePhysics,
    Denoising,
    GaussianNoise,
    Inpainting,
    LinearPhysics,
    NoiseModel,
    Physics,
)
from deepinv.physics.functional import filter_fft, gaussian_blur
from torch import Tensor, nn

from flowprox.spec import Specified

__all__ = [
    "BOUNDARIES",
    "PROBLEMS",
    "CircularBlur",
    "LearnedBlur",
    "Problem",
    "ProblemKind",
    "SeededGaussianNoise",
    "centre_mask",
    "data_gradient",
    "data_prox",
    "make_physics",
    "measure",
    "measure_each",
    "random_mask",
]

BOUNDARIES = ("circular", "reflect", "replicate", "zeros")
"""What a blur sees outside the image: the image repeated, mirrored, its last pixel, black."""

ImageShape = tuple[int, int, int]


class SeededGaussianNoise(GaussianNoise):
    """White Gaussian noise that is the same on every device and in every memory layout for the same generator.

    deepinv's own noise draws in the memory order of its input and replaces a generator that was moved, so that the
    caller's generator never advances. Here the values are drawn in (B, C, H, W) order on the generator's device.

    Arguments:
        sigma: noise standard deviation, at least 0, in the units of the measurement.

    Raises:
        ValueError: sigma is negative or not finite.

    Example:
        >>> noise = SeededGaussianNoise(0.1)
        >>> y = torch.zeros(1, 3, 4, 4)
        >>> torch.equal(noise(y, seed=1), noise(y, seed=1))
        True
    """

    def __init__(self, sigma: float = 0.1) -> None:
        super().__init__(sigma=_at_least_zero("sigma", sigma))

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Tensor,
        sigma: float | Tensor | None = None,
        seed: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """x + sigma n; ``generator`` is one for the batch or one per image; ``sigma`` is kept, as deepinv's does."""
        self.update_parameters(sigma=sigma)
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
        level = self.sigma.to(x.device)
        return x + level[(...,) + (None,) * (x.ndim - 1)] * _standard_normal(x, generator)


def _standard_normal(x: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None) -> Tensor:
    """Standard normal values of x's shape, dtype and device."""
    if generator is None:
        return torch.randn(x.shape, dtype=x.dtype, device=x.device)
    if isinstance(generator, torch.Generator):
        return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=generator.device).to(x.device)
    each = [torch.randn(x.shape[1:], generator=g, dtype=x.dtype, device=g.device) for g in generator]
    return torch.stack(each).to(x.device)


class CircularConvolution(LinearPhysics):
    """Convolution of every channel with one kernel, the image repeated periodically.

        A x = F^-1 (h F x),    A^T y = F^-1 (conj(h) F y),    h = F(kernel)

    F is the discrete Fourier transform. Unlike deepinv's ``BlurFFT`` it takes images of any size that holds the kernel,
    and ``prox_l2`` is exact and differentiable in every argument and in the kernel. Computed in float32 or, for float64
    images, float64.
    """

    def kernel(self) -> Tensor:
        """The kernel, shape (1, 1, h, w) with h and w odd, its centre in the middle."""
        raise NotImplementedError

    def A(self, x: Tensor, **kwargs: Any) -> Tensor:
        """k * x, of the shape of x (B, C, H, W)."""
        return self._filtered(x, self._transfer(x))

    def A_adjoint(self, y: Tensor, **kwargs: Any) -> Tensor:
        """Correlation of y with the kernel, of the shape of y (B, C, H, W)."""
        return self._filtered(y, self._transfer(y).conj())

    def prox_l2(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, z: Tensor | float | None, y: Tensor, gamma: float | Tensor, **kwargs: Any
    ) -> Tensor:
        """argmin_x gamma/2 ||A x - y||^2 + 1/2 ||x - z||^2, in closed form; nothing is written to the operator."""
        z = y.new_full(y.shape, float(z or 0.0)) if not isinstance(z, Tensor) else z
        return self.regularised_inverse(z, y, 1.0 / gamma)

    def regularised_inverse(self, v: Tensor, y: Tensor, rho: float | Tensor) -> Tensor:
        """argmin_x 1/2 ||y - A x||^2 + rho/2 ||x - v||^2 = F^-1[(conj(h) F y + rho F v) / (|h|^2 + rho)]."""
        transfer = self._transfer(y)
        spectrum = transfer.conj() * _fourier(y) + rho * _fourier(v)
        return torch.fft.irfft2(spectrum / (transfer.abs().square() + rho), s=y.shape[-2:])

    def A_dagger(self, y: Tensor, *, tolerance: float = 1e-6, **kwargs: Any) -> Tensor:  # pyright: ignore
        """Pseudo-inverse; frequencies that the kernel damps below ``tolerance`` are set to zero."""
        transfer = self._transfer(y)
        kept = transfer.abs() > tolerance
        inverse = torch.where(kept, 1.0 / torch.where(kept, transfer, torch.ones_like(transfer)), 0.0)
        return self._filtered(y, inverse)

    def _transfer(self, x: Tensor) -> Tensor:
        kernel = self.kernel().to(_at_least_float32(x))
        (h, w), (height, width) = kernel.shape[-2:], x.shape[-2:]
        if h > height or w > width:
            raise ValueError(
                f"the blur kernel of {h}x{w} is larger than the image of {height}x{width}; "
                "use a smaller kernel_size (or kernel) or larger images"
            )
        return filter_fft(kernel, (1, height, width), dims=(-2, -1))

    @staticmethod
    def _filtered(x: Tensor, transfer: Tensor) -> Tensor:
        return torch.fft.irfft2(transfer * _fourier(x), s=x.shape[-2:])


def _at_least_float32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _fourier(x: Tensor) -> Tensor:
    return torch.fft.rfft2(x.to(_at_least_float32(x)))  # there is no FFT in bfloat16


class CircularBlur(CircularConvolution):
    """Blur with a given kernel and circular boundary.

    Arguments:
        kernel: (h, w) with h and w odd, used as it stands: a sum of 1 keeps the brightness.
        noise_model: noise added to the blurred image; none by default.
        image_shape: (C, H, W) the operator is made for; any size that holds the kernel can be passed.
        device: where the kernel is kept.

    Raises:
        ValueError: the kernel is not a finite, non-zero matrix with odd sides, or is larger than the image.

    Example:
        >>> physics = CircularBlur(torch.full((3, 3), 1 / 9))
        >>> y = physics.A(torch.ones(1, 3, 8, 8))
        >>> torch.allclose(y, torch.ones(1, 3, 8, 8))
        True
    """

    def __init__(
        self,
        kernel: Tensor,
        *,
        noise_model: NoiseModel | None = None,
        image_shape: ImageShape | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(img_size=image_shape)
        self.set_noise_model(noise_model or SeededGaussianNoise(0.0))
        self.register_buffer("filter", _checked_kernel(kernel, image_shape)[None, None])
        self.to(device)

    def kernel(self) -> Tensor:
        """The kernel, shape (1, 1, h, w)."""
        return self.get_buffer("filter")


class LearnedBlur(Specified, CircularConvolution):
    """Circular blur whose kernel is learned, starting as a Gaussian: the learned operator of an unfolded network.

    With ``normalised`` the kernel is a softmax of its parameter: positive, sum 1. Otherwise it is the parameter itself.

    Arguments:
        kernel_size: odd number of pixels.
        sigma_blur: standard deviation of the Gaussian at the start, in pixels.
        sigma: noise standard deviation, used only when this operator itself makes measurements.
        normalised: whether the kernel is kept positive with sum 1.

    Raises:
        ValueError: an even kernel_size, sigma_blur not positive, negative sigma.

    Example:
        >>> physics = LearnedBlur(kernel_size=3, sigma_blur=1.0)
        >>> physics.A(torch.rand(1, 3, 8, 8)).sum().backward()
        >>> [parameter.grad.shape for parameter in physics.parameters()]
        [torch.Size([3, 3])]
    """

    def __init__(
        self, kernel_size: int = 9, sigma_blur: float = 5.0, sigma: float = 0.0, normalised: bool = True
    ) -> None:
        super().__init__()
        self.set_noise_model(SeededGaussianNoise(sigma))
        kernel = _gaussian_kernel(kernel_size, sigma_blur)
        self.normalised = normalised
        self.weight = nn.Parameter(kernel.clamp(min=1e-12).log() if normalised else kernel)

    def kernel(self) -> Tensor:
        """The kernel as learned so far, shape (1, 1, h, w)."""
        weight = self.weight.flatten().softmax(0).view_as(self.weight) if self.normalised else self.weight
        return weight[None, None]


def centre_mask(height: int, width: int, size: int | tuple[int, int] = 19) -> Tensor:
    """Mask (H, W) that hides a rectangle in the middle: 0 inside, 1 outside.

    The rectangle starts at ((H - h) // 2, (W - w) // 2): when it cannot be centred, it stands half a pixel up and left.

    Arguments:
        height: of the image, in pixels.
        width: of the image, in pixels.
        size: side of the hidden square, or (h, w), in pixels.

    Raises:
        ValueError: the rectangle is empty or does not leave a pixel of the image.

    Example:
        >>> centre_mask(4, 4, 2).int().tolist()
        [[1, 1, 1, 1], [1, 0, 0, 1], [1, 0, 0, 1], [1, 1, 1, 1]]
    """
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        raise ValueError(f"mask_size must be a positive number of pixels or a pair (h, w) of them, got {size!r}")
    h, w = pair
    if h > height or w > width or (h, w) == (height, width):
        raise ValueError(
            f"mask_size {h}x{w} does not fit in an image of {height}x{width}; choose a mask_size smaller than the image"
        )
    top, left = (height - h) // 2, (width - w) // 2
    mask = torch.ones(height, width)
    mask[top : top + h, left : left + w] = 0.0
    return mask


def random_mask(height: int, width: int, keep: float = 0.5, seed: int = 0) -> Tensor:
    """Mask (H, W) that keeps exactly round(keep * H * W) pixels at random places: 1 kept, 0 hidden.

    Raises:
        ValueError: keep is outside (0, 1] or so small that no pixel is kept.

    Example:
        >>> int(random_mask(8, 8, keep=0.25).sum())
        16
    """
    if not 0.0 < keep <= 1.0:
        raise ValueError(f"keep must be a fraction of pixels in (0, 1], got {keep}")
    n = round(keep * height * width)
    if n == 0:
        raise ValueError(f"keep={keep} keeps no pixel of an image of {height}x{width}; use a larger keep")
    mask = torch.zeros(height * width)
    mask[torch.randperm(height * width, generator=torch.Generator().manual_seed(seed))[:n]] = 1.0
    return mask.view(height, width)


# Problems ------------------------------------------------------------------------------------------------------------


class ProblemKind(NamedTuple):
    """One line of the registry: how to build the operator, its parameters, and what it is."""

    constructor: Callable[..., LinearPhysics]
    defaults: Mapping[str, Any]
    description: str


@dataclass(frozen=True)
class Problem:
    """A named inverse problem and its parameters, complete and JSON-able.

    Arguments:
        name: a key of ``PROBLEMS``.
        parameters: those that differ from the defaults; the defaults are filled in.

    Raises:
        ValueError: unknown name or parameter; the message offers the nearest ones.

    Example:
        >>> problem = Problem("inpainting", {"mask_size": 16})
        >>> problem.label
        'inpainting-mask_size16'
        >>> Problem.from_json(problem.to_json()) == problem
        True
    """

    name: str
    parameters: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in PROBLEMS:
            raise ValueError(f"unknown problem {self.name!r}; {_nearest(str(self.name), PROBLEMS)}")
        defaults = PROBLEMS[self.name].defaults
        for key in self.parameters:
            if key not in defaults:
                raise ValueError(f"{self.name} has no parameter {key!r}; {_nearest(str(key), defaults)}")
        complete = {key: _canonical(self.parameters.get(key, default)) for key, default in defaults.items()}
        object.__setattr__(self, "parameters", complete)

    @property
    def label(self) -> str:
        """Short name for tables and files: the first parameter, and every other one that is not at its default."""
        defaults = PROBLEMS[self.name].defaults
        given = next((key for key in ("mask", "kernel") if self.parameters.get(key) is not None), None)
        first = given or next(iter(defaults))
        shown = [
            key
            for key, value in self.parameters.items()
            if key == first or (isinstance(value, np.ndarray) or value != defaults[key])
        ]
        return "-".join([self.name, *(key + _label_value(self.parameters[key]) for key in shown)])

    def to_json(self) -> str:
        """One line of JSON.

        Raises:
            ValueError: a parameter is an array; save it as .npy and give the path.
        """
        try:
            return json.dumps({"name": self.name, "parameters": self.parameters}, sort_keys=True)
        except TypeError as error:
            raise ValueError(
                f"a parameter of {self.name} cannot be written as JSON ({error}); "
                "save the array as .npy and give its path"
            ) from error

    @classmethod
    def from_json(cls, text: str) -> Problem:
        """Read what ``to_json`` wrote.

        Raises:
            ValueError: the text is not a problem in JSON.
        """
        content = json.loads(text)
        if not isinstance(content, dict) or set(content) - {"name", "parameters"} or "name" not in content:
            raise ValueError(
                f'a problem in JSON has the form {{"name": ..., "parameters": {{...}}}}, got {text[:80]!r}'
            )
        return cls(content["name"], content.get("parameters", {}))


def make_physics(
    problem: Problem | str,
    image_shape: ImageShape = (3, 64, 64),
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    **parameters: Any,
) -> LinearPhysics:
    """Build the forward operator of a problem, with its noise model.

    Arguments:
        problem: a name from ``PROBLEMS`` or a ``Problem``.
        image_shape: (C, H, W) of the images. Masks are made for this H and W.
        seed: of whatever in the operator is random (the random inpainting mask).
        device: where the operator's tensors are kept.
        parameters: of the problem, see ``PROBLEMS[name].defaults``; they override those of a ``Problem``. ``mask``
            (H, W; 1 kept, 0 hidden) and ``kernel`` (h, w; odd sides) may be an array or the path of an .npy file.

    Raises:
        ValueError: unknown problem or parameter, or a value that does not fit; the message names the parameter.
        FileNotFoundError: the .npy file does not exist.

    Example:
        >>> physics = make_physics("inpainting", (3, 16, 16), mask_size=4)
        >>> physics.A(torch.ones(1, 3, 16, 16)).mean().item()
        0.9375
    """
    if isinstance(problem, str):
        problem = Problem(problem, parameters)
    elif parameters:
        problem = Problem(problem.name, {**problem.parameters, **parameters})
    shape = tuple(image_shape)
    if len(shape) != 3 or any(not isinstance(n, int) or n < 1 for n in shape):
        raise ValueError(f"image_shape must be three positive numbers (C, H, W), got {image_shape!r}")
    values = dict(problem.parameters)
    noise = SeededGaussianNoise(values.pop("sigma"))
    return PROBLEMS[problem.name].constructor(shape, noise, seed=seed, device=device, **values)


def _denoising(image_shape: ImageShape, noise: NoiseModel, *, seed: int, device: torch.device | str) -> LinearPhysics:
    return Denoising(noise, device=device, img_size=image_shape)


def _inpainting(
    image_shape: ImageShape,
    noise: NoiseModel,
    *,
    seed: int,
    device: torch.device | str,
    mask_size: int | tuple[int, int],
    mask: Any,
) -> LinearPhysics:
    pattern = centre_mask(*image_shape[1:], mask_size) if mask is None else _checked_mask(mask, image_shape)
    return _masking(pattern, image_shape, noise, device)


def _random_inpainting(
    image_shape: ImageShape, noise: NoiseModel, *, seed: int, device: torch.device | str, keep: float, mask: Any
) -> LinearPhysics:
    pattern = random_mask(*image_shape[1:], keep, seed) if mask is None else _checked_mask(mask, image_shape)
    return _masking(pattern, image_shape, noise, device)


def _masking(pattern: Tensor, image_shape: ImageShape, noise: NoiseModel, device: torch.device | str) -> LinearPhysics:
    mask = pattern.expand(image_shape).contiguous()
    return Inpainting(img_size=image_shape, mask=mask, device=device, noise_model=noise)  # pyright: ignore


def _deblurring(
    image_shape: ImageShape,
    noise: NoiseModel,
    *,
    seed: int,
    device: torch.device | str,
    sigma_blur: float,
    kernel_size: int,
    boundary: str,
    kernel: Any,
) -> LinearPhysics:
    if boundary not in BOUNDARIES:
        raise ValueError(f"unknown boundary {boundary!r}; {_nearest(str(boundary), BOUNDARIES)}")
    given = _gaussian_kernel(kernel_size, sigma_blur) if kernel is None else _array("kernel", kernel)
    checked = _checked_kernel(given, image_shape)
    if boundary == "circular":
        return CircularBlur(checked, noise_model=noise, image_shape=image_shape, device=device)
    return Blur(
        filter=checked[None, None],
        padding=boundary,
        device=torch.device(device),
        noise_model=noise,
        img_size=image_shape,
    )


PROBLEMS: dict[str, ProblemKind] = {
    "denoising": ProblemKind(_denoising, {"sigma": 0.2}, "white Gaussian noise of standard deviation sigma"),
    "inpainting": ProblemKind(
        _inpainting,
        {"mask_size": 19, "sigma": 0.0, "mask": None},
        "a hidden square of mask_size pixels in the middle, or a mask of your own",
    ),
    "random-inpainting": ProblemKind(
        _random_inpainting,
        {"keep": 0.5, "sigma": 0.0, "mask": None},
        "a fraction keep of the pixels seen, at random places, or a mask of your own",
    ),
    "deblurring": ProblemKind(
        _deblurring,
        {"sigma_blur": 5.0, "kernel_size": 9, "boundary": "circular", "sigma": 0.01, "kernel": None},
        "Gaussian blur of sigma_blur pixels cut to kernel_size, or a kernel of your own, and noise",
    ),
}
"""Problem name -> constructor, defaults (the first one stands in the label), description."""


# Measurements and the data term --------------------------------------------------------------------------------------


def measure(x: Tensor, physics: Physics, generator: torch.Generator | None = None) -> Tensor:
    """y = A x + noise, deterministic for a given generator, which advances.

    Arguments:
        x: images (B, C, H, W) in [0, 1].
        physics: the operator with its noise model.
        generator: source of the noise, on any device; torch's global one by default. With ``SeededGaussianNoise``,
            which ``make_physics`` sets, the noise depends on neither the device nor the memory layout of x.

    Raises:
        ValueError: x is not of the size of the operator's mask.

    Example:
        >>> physics = make_physics("denoising", (3, 8, 8))
        >>> x = torch.rand(2, 3, 8, 8)
        >>> a, b = (measure(x, physics, torch.Generator().manual_seed(0)) for _ in range(2))
        >>> torch.equal(a, b)
        True
    """
    _check_image(x, physics)
    return _add_noise(physics.A(x), physics, generator)


def measure_each(x: Tensor, physics: Physics, seeds: Sequence[int]) -> Tensor:
    """y = A x + noise with one seed per image: an image gets the same noise in every batch, method and run.

    Arguments:
        x: images (B, C, H, W) in [0, 1].
        physics: the operator with its noise model.
        seeds: B whole numbers.

    Raises:
        ValueError: as many seeds as images are needed; x is not of the size of the operator's mask.
    """
    if len(seeds) != len(x):
        raise ValueError(f"seeds must hold one number per image: got {len(seeds)} for {len(x)} images")
    _check_image(x, physics)
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    y = physics.A(x)
    if isinstance(physics.noise_model, SeededGaussianNoise):
        return _add_noise(y, physics, generators)
    return torch.cat([_add_noise(y[i : i + 1], physics, generator) for i, generator in enumerate(generators)])


def _add_noise(y: Tensor, physics: Physics, generator: torch.Generator | Sequence[torch.Generator] | None) -> Tensor:
    if generator is None:
        return physics.sensor(physics.noise(y))
    if isinstance(physics.noise_model, SeededGaussianNoise):
        return physics.sensor(physics.noise(y, generator=generator))
    # any other deepinv noise draws from its own generator, which takes a seed, or from the global one
    assert isinstance(generator, torch.Generator)
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    if getattr(physics.noise_model, "rng", None) is not None:
        return physics.sensor(physics.noise(y, seed=seed))
    with torch.random.fork_rng(devices=[y.device] if y.is_cuda else []):
        torch.manual_seed(seed)
        return physics.sensor(physics.noise(y))


def data_gradient(x: Tensor, y: Tensor, physics: LinearPhysics) -> Tensor:
    """A^T (y - A x): the direction in which 1/2 ||y - A x||^2 falls, so that x + mu * data_gradient is a gradient step.

    References:
        Wei, van Gorp, Gonzalez-Carabarin, Freedman, Eldar, van Sloun (2022), Deep unfolding with normalizing flow
        priors for inverse problems, https://arxiv.org/abs/2107.02848, Eq. (8), whose sign is that of ascent.

    Arguments:
        x: images (B, C, H, W).
        y: measurements.
        physics: linear operator.
    """
    return physics.A_adjoint(y - physics.A(x))


def data_prox(
    v: Tensor, y: Tensor, physics: LinearPhysics, rho: float | Tensor, *, max_iter: int = 200, tol: float = 1e-6
) -> Tensor:
    """argmin_x 1/2 ||y - A x||^2 + rho/2 ||x - v||^2, differentiable in v, y and rho.

    In closed form for denoising, inpainting and circular blur, the learned one included; otherwise by conjugate
    gradient, whose gradient deepinv computes by implicit differentiation. Nothing is written to ``physics``.

    Arguments:
        v: images (B, C, H, W) to stay close to.
        y: measurements.
        physics: linear operator.
        rho: weight of closeness, positive; a number, a 0-d tensor, or one per image (B,).
        max_iter: of the conjugate gradient, where there is no closed form.
        tol: relative residual at which the conjugate gradient stops.

    Raises:
        ValueError: rho is a number that is not positive. (A tensor is not looked at: that would stall a GPU.)

    Example:
        >>> physics = make_physics("denoising", (1, 2, 2))
        >>> data_prox(torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2), physics, rho=1.0).flatten().tolist()
        [0.5, 0.5, 0.5, 0.5]
    """
    if isinstance(rho, Tensor):
        rho = rho.view(-1, *[1] * (v.ndim - 1)) if rho.ndim == 1 else rho
    elif not (math.isfinite(rho) and rho > 0):
        raise ValueError(f"rho must be a positive number, got {rho}")
    if isinstance(physics, CircularConvolution):
        return physics.regularised_inverse(v, y, rho)
    if isinstance(physics, DecomposablePhysics):
        return physics.prox_l2(v, y, 1.0 / rho)
    # LinearPhysics.prox_l2 would write solver, max_iter and tol to the operator; its default eps of 1e-8 costs 3 digits
    gamma = 1.0 / rho
    gamma = gamma.flatten() if isinstance(gamma, Tensor) and gamma.ndim > 1 else gamma
    return least_squares_implicit_backward(
        physics, y, z=v, init=v, gamma=gamma, solver="CG", max_iter=max_iter, tol=tol, parallel_dim=[0], eps=1e-20
    )


# Checks of what the user gave ----------------------------------------------------------------------------------------


def _check_image(x: Tensor, physics: Physics) -> None:
    if not isinstance(physics, Inpainting):
        return
    (h, w), (mask_h, mask_w) = x.shape[-2:], physics.get_buffer("mask").shape[-2:]
    if (h, w) != (mask_h, mask_w):
        raise ValueError(
            f"images of {h}x{w} do not fit the operator's mask of {mask_h}x{mask_w}; "
            f"build the operator with image_shape (C, {h}, {w})"
        )


def _at_least_zero(name: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} is a standard deviation and must be a finite number of at least 0, got {value!r}")
    return float(value)


def _gaussian_kernel(kernel_size: int, sigma_blur: float) -> Tensor:
    if not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(
            f"kernel_size must be a positive odd number of pixels, got {kernel_size!r} "
            "(an even kernel has no centre and would shift the image by half a pixel)"
        )
    if _at_least_zero("sigma_blur", sigma_blur) == 0:
        raise ValueError("sigma_blur must be positive; for no blur use the problem denoising")
    return gaussian_blur(psf_size=(kernel_size, kernel_size), sigma=(sigma_blur, sigma_blur))[0, 0]


def _checked_kernel(kernel: Tensor, image_shape: ImageShape | None) -> Tensor:
    if kernel.ndim != 2 or any(side % 2 == 0 for side in kernel.shape):
        raise ValueError(
            f"kernel must be a matrix (h, w) with odd sides, got shape {tuple(kernel.shape)}; "
            "pad it with a row or column of zeros"
        )
    if not torch.isfinite(kernel).all() or not kernel.any():
        raise ValueError("kernel must hold finite numbers that are not all zero")
    if image_shape is not None and (kernel.shape[0] > image_shape[1] or kernel.shape[1] > image_shape[2]):
        raise ValueError(
            f"the blur kernel of {kernel.shape[0]}x{kernel.shape[1]} is larger than the image of "
            f"{image_shape[1]}x{image_shape[2]}; use a smaller kernel_size (or kernel) or larger images"
        )
    return kernel.float()


def _checked_mask(mask: Any, image_shape: ImageShape) -> Tensor:
    array = _array("mask", mask)
    if tuple(array.shape) != image_shape[1:]:
        raise ValueError(
            f"mask has shape {tuple(array.shape)} but the images are {image_shape[1]}x{image_shape[2]}; "
            f"give a mask of shape {image_shape[1:]}"
        )
    if not torch.isin(array, torch.tensor([0.0, 1.0])).all():
        raise ValueError("mask must hold only 1 (kept) and 0 (hidden); threshold it first")
    if not array.any():
        raise ValueError("mask hides every pixel; it must hold a 1 where a pixel is kept")
    return array


def _array(name: str, value: Any) -> Tensor:
    """An array, tensor, nested list or .npy path as float32."""
    if isinstance(value, str | Path):
        if not Path(value).is_file():
            raise FileNotFoundError(f"{name}: no file {str(value)!r}; give the path of an .npy array")
        try:
            value = np.load(value, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(
                f"{name}: {str(value)!r} is not a plain .npy array ({error}); write it with numpy.save"
            ) from error
    try:
        return torch.as_tensor(value).to(torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be an array of numbers or the path of an .npy file ({error})") from error


def _nearest(name: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    names = difflib.get_close_matches(name, list(known), n=3, cutoff=0.4)
    return f"did you mean {' or '.join(names)}?" if names else f"known: {', '.join(known)}"


def _canonical(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Tensor):
        return value.numpy(force=True)
    return tuple(value) if isinstance(value, list) else value


def _label_value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, np.ndarray):
        return "-given"
    if isinstance(value, tuple):
        return "x".join(str(part) for part in value)
    if isinstance(value, str):
        return f"-{Path(value).stem}"
    return str(value)
