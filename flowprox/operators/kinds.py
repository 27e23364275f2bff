"""The registry of problems: an operator is one entry of ``PROBLEMS``.

To add one, write the function that builds it and enter it:

    PROBLEMS["gain"] = ProblemKind(make_gain, {"gain": Parameter(2.0, "factor of every pixel")}, "a brighter image")
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from deepinv.physics import Denoising, Inpainting, LinearPhysics, Physics
from PIL import Image
from torch import Tensor

from flowprox.naming import Values, nearest, require_choice
from flowprox.operators.blur import BOUNDARIES, CircularBlur, PaddedBlur, checked_kernel, gaussian_kernel
from flowprox.operators.imaging import (
    CT,
    FILTERS,
    PATTERNS,
    CoilMRI,
    RealMRI,
    SuperResolution,
    checked_factor,
    coil_sensitivities,
    kspace_mask,
)
from flowprox.operators.masks import center_mask, checked_mask, random_mask, varied_masks
from flowprox.operators.sensing import DenseSensing, OneBitSensing, StructuredSensing
from flowprox.operators.sizes import Fitted, fit_to_divisor

ImageShape = tuple[int, int, int]
Device = torch.device | str
Array = Tensor | np.ndarray | Sequence[Sequence[float]] | str | Path


class Parameter(NamedTuple):
    """A parameter of a problem: its default, its meaning in one line, its unit ("" for a number of things, word, array)."""

    default: object
    meaning: str
    unit: str = ""


_SIGMA = "standard deviation of white Gaussian noise in each measurement"
_MASK = Parameter(None, "own mask (H, W): 1 seen, 0 hidden; an array or a file, of a picture white")
_NOISE = {
    "noise": Parameter(None, "another noise: a name of flowprox.noise.NOISES, or a flowprox.noise.Noise"),
    "noise_parameters": Parameter(None, "parameters of a noise by name"),
}
"""Parameters of every problem."""


@dataclass(frozen=True)
class ProblemKind:
    """An operator by name: how it is built, and all that others need to know of it.

    One entry of ``PROBLEMS`` adds an operator: commands, methods, training, evaluation and reports then know it.

    Arguments:
        constructor: ``(image_shape, *, seed, device, **parameters) -> physics``, the parameters those below but for the
            ones of the noise (``sigma``, ``noise_norm``, ``noise``, ``noise_parameters``), which is set afterwards.
        parameters: of the operator and its noise; the first one stands in labels.
        description: one line.
        is_linear: whether the operator is a ``deepinv.physics.LinearPhysics``, which most methods need.
        measures_pictures: whether y is a picture (B, C, H', W'), shown and saved as one; otherwise it is an array only.
        image_size: ``(height, width, parameters) -> (height, width)`` of the image behind a measured picture of that size; None
            where both are equal.
        loses_scale: whether y does not tell how bright the image is; estimates are then scaled to fit before they are compared.
        drawn: what is drawn at random with the operator, such as "mask"; a measurement comes with the parameter of that
            name, if there is one, or with the operator's seed. "" for nothing.
        extend: ``(y, physics, divisor) -> Fitted`` extends a measurement to sides that a network takes; None where that
            cannot be done.
        ranges: the parameters, besides ``sigma``, that ``VariedProblem`` can draw for every image.
        vary: ``(ranges, image_shape, n, generator) -> physics`` draws the operator of n images, ranges as ``{parameter: (low,
            high)}``; None calls the constructor with a tensor (n,), drawn uniformly, in the place of each of these parameters.
    """

    constructor: Callable[..., Physics]
    parameters: Mapping[str, Parameter]
    description: str
    is_linear: bool = True
    measures_pictures: bool = True
    image_size: Callable[[int, int, Values], tuple[int, int]] | None = None
    loses_scale: bool = False
    drawn: str = ""
    extend: Callable[[Tensor, LinearPhysics, int], Fitted] | None = None
    ranges: tuple[str, ...] = ()
    vary: Callable[..., LinearPhysics] | None = None

    @property
    def defaults(self) -> Values:
        """Every parameter, those of the noise included, with its default."""
        return {name: parameter.default for name, parameter in {**self.parameters, **_NOISE}.items()}


def _masking(shape: ImageShape, *, seed: int, device: Device, mask: Array | None, **pattern: Any) -> LinearPhysics:
    """Inpainting with one's own mask, one that sees a part ``keep``, or one with a hole of ``mask_size``."""
    if mask is not None:
        seen = _array("mask", mask)
    elif "keep" in pattern:
        seen = random_mask(*shape[1:], pattern["keep"], seed)
    else:
        seen = center_mask(*shape[1:], pattern["mask_size"])
    seen = checked_mask(seen, shape).expand(shape).contiguous()
    return Inpainting(img_size=shape, mask=seen, device=device)  # pyright: ignore


def _kernel(sigma_blur: float, kernel_size: int, kernel: Array | None, **others: object) -> Tensor:
    return gaussian_kernel(kernel_size, sigma_blur) if kernel is None else _array("kernel", kernel)


def _deblurring(shape: ImageShape, *, seed: int, device: Device, boundary: str, **kernel: Any) -> LinearPhysics:
    if boundary not in BOUNDARIES:
        raise ValueError(f"unknown boundary {boundary!r}; {nearest(str(boundary), BOUNDARIES)}")
    k = _kernel(**kernel)
    if abs(float(k.sum()) - 1) > 0.01 or bool((k < 0).any()):
        has = f"kernel sums to {float(k.sum()):.4g} and its smallest value is {float(k.min()):.4g}"
        wanted = "a blur that keeps the brightness has no negative values and the sum 1: divide the kernel by its sum"
        warnings.warn(f"{has}; {wanted}", stacklevel=2)
    if boundary == "circular":
        return CircularBlur(k, image_shape=shape, device=device)
    return PaddedBlur(k, boundary, image_shape=shape, device=device)


def _blurred_image_size(height: int, width: int, parameters: Values) -> tuple[int, int]:
    if parameters["boundary"] != "valid":
        return height, width
    h, w = checked_kernel(_kernel(**parameters), (1, height, width)).shape
    return height + h - 1, width + w - 1


def _compressed_sensing(shape: ImageShape, *, m: int, structured: bool, **where: Any) -> LinearPhysics:
    require_choice("structured", structured, (True, False))
    return (StructuredSensing if structured else DenseSensing)(m, shape, **where)


def _one_bit(shape: ImageShape, *, noise_first: bool, **sensing: Any) -> Physics:
    require_choice("noise_first", noise_first, (True, False))
    return OneBitSensing(_compressed_sensing(shape, **sensing), noise_first=noise_first).to(sensing["device"])


def _mri(shape: ImageShape, *, device: Device, mask: Array | None, **kspace: Any) -> LinearPhysics:
    coils = {key: kspace.pop(key) for key in ("n_coils", "coil_maps") if key in kspace}
    seen = kspace_mask(*shape[1:], **kspace) if mask is None else _array("mask", mask)
    if not coils:
        return RealMRI(seen, shape, device=device)
    own = None if coils["coil_maps"] is None else _array("coil_maps", coils["coil_maps"], torch.complex64)
    maps = coil_sensitivities(coils["n_coils"], *shape[1:]) if own is None else own
    return CoilMRI(seen, maps, shape, device=device)


_KSPACE = {
    "acceleration": Parameter(4, "one in so many columns of k-space is measured, or of its points by radial lines"),
    "center_fraction": Parameter(None, "middle fraction always measured; by default 0.08, 0.04 from acceleration 8"),
    "pattern": Parameter("random", f"which: {', '.join(PATTERNS)}"),
    "sigma": Parameter(0.01, f"{_SIGMA}, real and imaginary part", "image range (orthonormal Fourier transform)"),
    "mask": Parameter(None, "own mask (H, W), zero frequency in the middle: 1 measured, 0 not; an array or file"),
}


PROBLEMS: dict[str, ProblemKind] = {
    "denoising": ProblemKind(
        lambda shape, *, seed, device: Denoising(device=device, img_size=shape),
        {"sigma": Parameter(0.2, _SIGMA, "image range")},
        "white Gaussian noise of standard deviation sigma",
        extend=fit_to_divisor,
    ),
    "inpainting": ProblemKind(
        _masking,
        {
            "mask_size": Parameter(19, "side of the hidden square in the middle, or height and width", "pixels"),
            "sigma": Parameter(0.0, _SIGMA, "image range"),
            "mask": _MASK,
        },
        "a hidden square of mask_size pixels in the middle, or a mask of your own",
        extend=fit_to_divisor,
        ranges=("mask_size", "keep"),
        vary=varied_masks,
    ),
    "random-inpainting": ProblemKind(
        _masking,
        {
            "keep": Parameter(0.5, "fraction of the pixels that are seen, at random places"),
            "sigma": Parameter(0.0, _SIGMA, "image range"),
            "mask": _MASK,
        },
        "a fraction keep of the pixels seen, at random places, or a mask of your own",
        drawn="mask",
        extend=fit_to_divisor,
        ranges=("keep",),
        vary=varied_masks,
    ),
    "deblurring": ProblemKind(
        _deblurring,
        {
            "sigma_blur": Parameter(5.0, "standard deviation of the Gaussian kernel", "pixels"),
            "kernel_size": Parameter(9, "odd side of the square that the kernel is cut to", "pixels"),
            "boundary": Parameter(
                "circular",
                f"what is seen outside: {', '.join(BOUNDARIES)} (nothing: y is smaller); of measured pictures it is "
                "valid where none is given",
            ),
            "sigma": Parameter(0.01, _SIGMA, "image range"),
            "kernel": Parameter(None, "own kernel (h, w) with odd sides and sum 1; an array, .npy file or picture"),
        },
        "Gaussian blur of sigma_blur pixels cut to kernel_size, or a kernel of your own, and noise",
        image_size=_blurred_image_size,
        extend=fit_to_divisor,
    ),
    "compressed-sensing": ProblemKind(
        _compressed_sensing,
        {
            "m": Parameter(1000, "number of measurements"),
            "structured": Parameter(False, "signs, a Hartley transform and a choice of its rows, in place of a matrix"),
            "noise_norm": Parameter(0.1, "sqrt(E||noise||^2) over all m measurements", "image range"),
            "sigma": Parameter(None, f"{_SIGMA}, in the place of noise_norm", "image range"),
        },
        "m random linear measurements of the whole image, by a Gaussian matrix or a structured one without a matrix; "
        "noise of sqrt(E||noise||^2) = noise_norm, or of standard deviation sigma in each measurement",
        measures_pictures=False,
        drawn="matrix",
    ),
    "one-bit": ProblemKind(
        _one_bit,
        {
            "m": Parameter(1000, "number of measurements"),
            "structured": Parameter(False, "as in compressed-sensing"),
            "noise_first": Parameter(False, "whether the noise comes before the sign"),
            "sigma": Parameter(0.1, _SIGMA, "of a sign, or of a measurement before it"),
        },
        "the sign of m random linear measurements and noise, which comes after the sign, or before it with noise_first",
        is_linear=False,
        measures_pictures=False,
        loses_scale=True,
        drawn="matrix",
    ),
    "super-resolution": ProblemKind(
        lambda shape, *, seed, factor, **more: SuperResolution(factor, shape, **more),
        {
            "factor": Parameter(4, "how many times smaller the picture is in height and width"),
            "filter": Parameter("bicubic", f"what filters the image before sampling: {', '.join(FILTERS)}, or none"),
            "sigma": Parameter(0.01, _SIGMA, "image range"),
        },
        "an image factor times smaller in height and width, filtered before it is sampled, and noise",
        image_size=lambda height, width, p: (height * checked_factor(p["factor"]), width * p["factor"]),
    ),
    "mri": ProblemKind(
        _mri,
        _KSPACE,
        "one in acceleration columns of k-space of a real image, single coil, at random places, or a mask of your own",
        measures_pictures=False,
        drawn="mask",
    ),
    "multicoil-mri": ProblemKind(
        _mri,
        {
            **_KSPACE,
            "n_coils": Parameter(8, "number of simulated coils around the image"),
            "coil_maps": Parameter(None, "own sensitivities in their place, complex (N, H, W); an array or .npy file"),
        },
        "mri by several coils, of a complex image with real and imaginary part as its two channels, or of a real one",
        measures_pictures=False,
        drawn="mask",
    ),
    "ct": ProblemKind(
        lambda shape, *, seed, n_angles, **more: CT(n_angles, shape, **more),
        {
            "n_angles": Parameter(60, "number of angles, evenly spaced over 180 degrees, of a fan over 360"),
            "fan_beam": Parameter(
                False, "whether the beams come from one point, two sides of the image off its middle"
            ),
            "sigma": Parameter(0.01, _SIGMA, "of the line integrals divided by the operator's norm"),
            "photons": Parameter(None, "dose in place of sigma: photons of a beam that meets nothing, Poisson counts"),
            "attenuation": Parameter(0.03, "of a pixel of value one, for photons", "natural logarithm per pixel"),
        },
        "tomography of a square image from n_angles angles by parallel beams or a fan, divided by its norm",
        measures_pictures=False,
    ),
}
"""The operators by name; another entry adds one."""


def gray_levels(picture: Image.Image) -> np.ndarray:
    """A picture (H, W) of 8 or 16 bits as gray levels in [0, 1], float64; of floats as they are."""
    is_deep = picture.mode[0] in "IF"  # Pillow would cut 16 bits off at 255
    values = np.asarray(picture if is_deep else picture.convert("L"), dtype=np.float64)
    return values if picture.mode == "F" else values / (65535 if is_deep else 255)


def _array(name: str, value: Array, dtype: torch.dtype = torch.float32) -> Tensor:
    """An array, tensor, nested list, .npy file or picture as float32; a picture of a mask is 1 where it is bright, one of a
    kernel has the sum 1."""
    if isinstance(value, str | Path):
        path = Path(value)
        if not path.is_file():
            raise FileNotFoundError(f"{name}: no file {str(value)!r}; give the path of an .npy array or a picture")
        try:
            if path.suffix.lower() == ".npy":
                value = np.array(np.load(path, mmap_mode="r", allow_pickle=False))  # a header of too much fails
            else:
                with Image.open(path) as picture:
                    gray = gray_levels(picture)
                value = gray / (gray.sum() or 1.0) if name == "kernel" else gray >= 0.5
        except (ValueError, EOFError, OSError) as error:
            what = f"{name}: {str(value)!r} is not a plain .npy array or a picture"
            raise ValueError(f"{what} ({error}); write it with numpy.save") from error
    try:
        if isinstance(value, np.ndarray):  # of any strides and byte order
            value = np.array(value, dtype=np.complex64 if dtype.is_complex else np.float32)
        return torch.as_tensor(value).to(dtype)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be an array of numbers or the path of a file of one ({error})") from error
