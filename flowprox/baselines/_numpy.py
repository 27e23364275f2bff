"""Calls numpy code that knows one channel-last image at a time on a batch of tensors, and imports optional packages."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

__all__ = ["map_images", "noise_sigmas", "require_images", "require_measurement", "require_package"]


def require_package(module: str, package: str, needed_for: str, extra: str | None = None) -> ModuleType:
    """Import ``module``, or raise ``ImportError`` with one line that names the package, and the extra that has it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        install = package if extra is None else f'"flowprox[{extra}]"'
        raise ImportError(f"{needed_for} needs the package {package}: pip install {install}") from error


def require_images(y: Tensor) -> Tensor:
    """Return y, or raise ``ValueError`` unless it is a finite floating-point batch (B, C, H, W)."""
    if y.ndim != 4 or not y.is_floating_point():
        raise ValueError(f"y must be a floating-point batch (B, C, H, W), got {y.dtype} of shape {tuple(y.shape)}")
    return require_measurement(y)


def require_measurement(y: Tensor) -> Tensor:
    """Return y, or raise ``ValueError`` unless it is a finite batch of images or vectors, floating-point or complex."""
    if y.ndim in (0, 1, 3) or not (y.is_floating_point() or y.is_complex()):
        raise ValueError(
            f"y must be a floating-point batch (B, C, H, W) or (B, m), got {y.dtype} of shape {tuple(y.shape)}"
        )
    if not bool(torch.isfinite(y).all()):
        raise ValueError("y holds NaN or infinite values; check the measurement")
    return y


def map_images(y: Tensor, estimate: Callable[[np.ndarray, int], np.ndarray]) -> Tensor:
    """Stack ``estimate(image, i)`` over the batch: image i is (H, W, C) in float64 on the CPU, so is the estimate."""
    images = y.detach().double().cpu().permute(0, 2, 3, 1).numpy()
    estimates = [np.asarray(estimate(np.ascontiguousarray(image), i)) for i, image in enumerate(images)]
    if not estimates:
        return y.clone()
    return torch.from_numpy(np.stack(estimates)).permute(0, 3, 1, 2).to(device=y.device, dtype=y.dtype).contiguous()


def noise_sigmas(physics: torch.nn.Module, n_images: int) -> list[float]:
    """Standard deviation of the Gaussian noise per image, read from ``physics.noise_model.sigma``.

    A noise with a level for each entry (``HeteroscedasticNoise``, its ``scale``) counts with its root mean square.

    Raises:
        ValueError: the physics has no Gaussian noise model, or as many sigmas as fit neither one nor every image.
    """
    noise = getattr(physics, "noise_model", None)
    sigma, scale = getattr(noise, "sigma", None), getattr(noise, "scale", None)
    if sigma is None and isinstance(scale, Tensor):
        sigma = scale.double().square().mean().sqrt()  # broadcasting repeats every entry equally often
    if sigma is None:
        raise ValueError(
            "physics.noise_model has no sigma; give the physics a deepinv.physics.GaussianNoise, "
            "or the noise level to the method as sigma="
        )
    values = torch.as_tensor(sigma).flatten().double().cpu().tolist()
    if len(values) not in (1, n_images):
        raise ValueError(
            f"physics.noise_model.sigma has {len(values)} values for {n_images} images; give one, or one each"
        )
    return values * n_images if len(values) == 1 else values
