"""The registry of problems: how each operator is built, its parameters, and what it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from deepinv.physics import Blur, Denoising, Inpainting, LinearPhysics, NoiseModel, Physics
from torch import Tensor

from flowprox.naming import nearest
from flowprox.operators.blur import CircularBlur, checked_kernel, gaussian_kernel
from flowprox.operators.imaging import ParallelCT, RealMRI, SuperResolution, cartesian_mask
from flowprox.operators.masks import center_mask, checked_mask, random_mask
from flowprox.operators.noise import SeededGaussianNoise
from flowprox.operators.sensing import DenseSensing, OneBitSensing, StructuredSensing

__all__ = ["BOUNDARIES", "PROBLEMS", "ImageShape", "ProblemKind"]

BOUNDARIES = ("circular", "reflect", "replicate", "zeros")
"""What a blur sees outside the image: the image repeated, mirrored, its last pixel, black."""

ImageShape = tuple[int, int, int]


class ProblemKind(NamedTuple):
    """One line of the registry: how to build the operator, its parameters, and what it is."""

    constructor: Callable[..., Physics]
    defaults: Mapping[str, Any]
    description: str


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
    pattern = center_mask(*image_shape[1:], mask_size) if mask is None else _array("mask", mask)
    return _masking(pattern, image_shape, noise, device)


def _random_inpainting(
    image_shape: ImageShape, noise: NoiseModel, *, seed: int, device: torch.device | str, keep: float, mask: Any
) -> LinearPhysics:
    pattern = random_mask(*image_shape[1:], keep, seed) if mask is None else _array("mask", mask)
    return _masking(pattern, image_shape, noise, device)


def _masking(pattern: Tensor, image_shape: ImageShape, noise: NoiseModel, device: torch.device | str) -> LinearPhysics:
    mask = checked_mask(pattern, image_shape).expand(image_shape).contiguous()
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
        raise ValueError(f"unknown boundary {boundary!r}; {nearest(str(boundary), BOUNDARIES)}")
    given = gaussian_kernel(kernel_size, sigma_blur) if kernel is None else _array("kernel", kernel)
    checked = checked_kernel(given, image_shape)
    if boundary == "circular":
        return CircularBlur(checked, noise_model=noise, image_shape=image_shape, device=device)
    return Blur(
        filter=checked[None, None],
        padding=boundary,
        device=torch.device(device),
        noise_model=noise,
        img_size=image_shape,
    )


def _compressed_sensing(
    image_shape: ImageShape,
    noise: NoiseModel,
    *,
    seed: int,
    device: torch.device | str,
    m: int,
    structured: bool,
) -> LinearPhysics:
    if not isinstance(structured, bool):
        raise ValueError(f"structured must be True or False, got {structured!r}")
    sensing = StructuredSensing if structured else DenseSensing
    return sensing(m, image_shape, noise_model=noise, seed=seed, device=device)


def _one_bit(
    image_shape: ImageShape,
    noise: NoiseModel,
    *,
    seed: int,
    device: torch.device | str,
    m: int,
    structured: bool,
    noise_first: bool,
) -> Physics:
    if not isinstance(noise_first, bool):
        raise ValueError(f"noise_first must be True or False, got {noise_first!r}")
    none = SeededGaussianNoise(0.0)
    linear = _compressed_sensing(image_shape, none, seed=seed, device=device, m=m, structured=structured)
    return OneBitSensing(linear, noise_model=noise, noise_first=noise_first).to(device)


def _super_resolution(
    image_shape: ImageShape,
    noise: NoiseModel,
    *,
    seed: int,
    device: torch.device | str,
    factor: int,
    filter: str | None,
) -> LinearPhysics:
    return SuperResolution(factor, image_shape, filter=filter, noise_model=noise, device=device)


def _mri(
    image_shape: ImageShape,
    noise: NoiseModel,
    *,
    seed: int,
    device: torch.device | str,
    acceleration: int,
    center_fraction: float | None,
    mask: Any,
) -> LinearPhysics:
    size = image_shape[1:]
    pattern = cartesian_mask(*size, acceleration, center_fraction, seed) if mask is None else _array("mask", mask)
    return RealMRI(pattern, image_shape, noise_model=noise, device=device)


def _ct(
    image_shape: ImageShape, noise: NoiseModel, *, seed: int, device: torch.device | str, n_angles: int
) -> LinearPhysics:
    return ParallelCT(n_angles, image_shape, noise_model=noise, device=device)


_KINDS: dict[str, ProblemKind] = {
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
    "compressed-sensing": ProblemKind(
        _compressed_sensing,
        {"m": 1000, "structured": False, "noise_norm": 0.1, "sigma": None},
        "m random linear measurements of the whole image, by a Gaussian matrix or a structured one without a matrix; "
        "noise of sqrt(E||noise||^2) = noise_norm, or of standard deviation sigma in each measurement",
    ),
    "one-bit": ProblemKind(
        _one_bit,
        {"m": 1000, "structured": False, "noise_first": False, "sigma": 0.1},
        "the sign of m random linear measurements and noise, which comes after the sign, or before it with noise_first",
    ),
    "super-resolution": ProblemKind(
        _super_resolution,
        {"factor": 4, "filter": "bicubic", "sigma": 0.01},
        "an image factor times smaller in height and width, filtered before it is sampled, and noise",
    ),
    "mri": ProblemKind(
        _mri,
        {"acceleration": 4, "center_fraction": None, "sigma": 0.01, "mask": None},
        "one in acceleration columns of k-space of a real image, single coil, at random places, or a mask of your own",
    ),
    "ct": ProblemKind(
        _ct,
        {"n_angles": 60, "sigma": 0.01},
        "parallel-beam tomography of a square image from n_angles angles over 180 degrees, divided by its norm",
    ),
}

PROBLEMS: dict[str, ProblemKind] = {
    name: kind._replace(defaults={**kind.defaults, "noise": None, "noise_parameters": None})
    for name, kind in _KINDS.items()
}
"""Problem name -> constructor, defaults (the first one stands in the label), description."""


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
