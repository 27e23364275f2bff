"""What the methods share: checks of what they are given, the norm of an operator, optional packages."""

from __future__ import annotations

import importlib
from importlib.metadata import requires
from types import ModuleType

import torch
from deepinv.models import Reconstructor
from deepinv.physics import LinearPhysics, Physics
from torch import Tensor

__all__ = [
    "Baseline",
    "noise_sigmas",
    "require_count",
    "require_package",
    "require_weight",
    "squared_norm",
]


class Baseline(Reconstructor):
    """A method for linear operators: ``forward`` checks what it is given, ``_estimate`` computes."""

    takes_vectors = True  # whether y may be something else than images

    def forward(self, y: Tensor, physics: Physics) -> Tensor:  # type: ignore[override]
        """x_hat (B, C, H, W) of measurements y (B, ...).

        Raises:
            ValueError: y is not finite or no batch of floating-point numbers, or the operator is not linear.
        """
        shapes = "(B, C, H, W) or (B, m)" if self.takes_vectors else "(B, C, H, W)"
        fits = y.ndim == 4 or (self.takes_vectors and y.ndim not in (0, 1, 3))
        if not fits or not (y.is_floating_point() or (self.takes_vectors and y.is_complex())):
            raise ValueError(f"y must be a floating-point batch {shapes}, got {y.dtype} of shape {tuple(y.shape)}")
        if not bool(torch.isfinite(y).all()):
            raise ValueError("y holds NaN or infinite values; check the measurement")
        if not isinstance(physics, LinearPhysics):
            raise ValueError(f"{type(self).__name__} needs a linear operator (deepinv.physics.LinearPhysics)")
        if not len(y):
            return physics.A_adjoint(y.new_zeros(1, *y.shape[1:]))[:0]
        return self._estimate(y, physics)

    def _estimate(self, y: Tensor, physics: LinearPhysics) -> Tensor:
        """x_hat of at least one measurement that fits."""
        raise NotImplementedError


def squared_norm(physics: LinearPhysics, x: Tensor) -> float:
    """||A||^2 by the power method from a fixed start, with the margin its tolerance needs; x gives shape and dtype."""
    v = torch.randn(x[:1].shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype).to(x.device)
    norm = v.new_ones(())
    for _ in range(50):
        v = v / torch.linalg.vector_norm(v).clamp_min(1e-12)
        v = physics.A_adjoint_A(v)
        norm = torch.linalg.vector_norm(v)
    return 1.05 * max(float(norm), 1e-12)


def require_weight(regularization: float) -> None:
    """Raise ``ValueError`` unless the weight of a penalty is finite and not negative."""
    if not 0 <= regularization < float("inf"):
        raise ValueError(f"regularization must be finite and >= 0, got {regularization}")


def require_count(name: str, value: int) -> None:
    """Raise ``ValueError`` unless a number of iterations or the like is at least 1."""
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def require_package(module: str, package: str, needed_for: str, extra: str | None = None) -> ModuleType:
    """Import ``module``, or raise ``ImportError`` with one line that names the package, and the extra that has it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        wanted = [
            r.partition(";")[0].strip() for r in requires("flowprox") or () if extra and f"extra == '{extra}'" in r
        ]
        install = " ".join(f"'{one}'" for one in wanted) or package  # works in a clone and outside of one
        raise ImportError(f"{needed_for} needs the package {package}: pip install {install}") from error


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
