r"""The weight of the prior from the level of the noise: Bayes' rule for the scale, the discrepancy principle from there.

    ||y - A g(z_gamma)||^2 = tau^2 E||noise||^2          gamma near the rule of Bayes

Symbols: y measurement, A operator, g flow, sigma noise standard deviation, z_gamma minimizer with the weight gamma, tau a
number near 1. The residual grows with gamma, slowly: near the best image by a fifth of a power. The rule of Bayes, where the
posterior has its mode if the flow is right, is gamma = sigma^2 for the squared norm; for the unsquared one it is
2 sigma^2 ||z||, with the ||z|| of the estimate itself. In stages, each of which begins where the last one ended, gamma is
moved, for every image by itself, along the secant of log residual against log gamma, but never further than ``limit`` from
that rule: where few measurements determine little, the residual of a good image is far below the noise, and matching it
would oversmooth; where the iterations are few, it is still above, and matching it would leave the noise in.

References:
    Morozov 1966, On the solution of functional equations by the method of regularization, Soviet Math. Dokl. 7, 414.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import deepinv
import torch
from deepinv.physics import Physics
from torch import Tensor

from flowprox.noise import HeteroscedasticNoise, Noise
from flowprox.solvers.optimizers import Optimizer, Trace

__all__ = ["Discrepancy", "noise_energy"]

_SLOPE = 0.2  # of log residual against log gamma near the best image, measured on faces
_SLOPES = (0.1, 2.0)  # the secant is kept within; 2 is the slope far from the solution of a linear problem
_DRAWS = 64  # of a noise whose energy has no formula
_LONGEST = 2.0  # factor of gamma from one stage to the next

Minimize = Callable[[Tensor, Tensor, int], Trace]
"""(gamma (B,), z (B, D), number of iterations) to a trace."""


@dataclass(frozen=True)
class Discrepancy:
    """How ``LatentMAP`` chooses gamma.

    Arguments:
        tau: root of the wanted ratio of residual energy to noise energy; MAP estimates that are best in PSNR leave a
            little less than all of the noise.
        share: the middle gamma as a part of Bayes' rule: of 2 sigma^2 ||z||, of sigma^2 for the squared norm, and of
            0.7 sigma^2 for the image form, whose density is best trusted by a third (docs/evidence/log.md).
        limit: largest factor between the middle gamma and the last.
        n_stages: how often gamma is set.

    Raises:
        ValueError: a value out of its range.
    """

    tau: float = 0.98
    share: float = 0.85
    limit: float = 1.25
    n_stages: int = 4

    def __post_init__(self) -> None:
        for name in ("tau", "share"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if not 1 <= self.limit < float("inf"):
            raise ValueError(f"limit must be at least 1 and finite, got {self.limit}")
        if self.n_stages < 1:
            raise ValueError(f"n_stages must be at least 1, got {self.n_stages}")

    def stage(self, optimizer: Optimizer, n_iterations: int) -> Optimizer:
        """The optimizer with another number of iterations, and its share of a limit on evaluations."""
        changes: dict[str, int] = {"n_iterations": n_iterations}
        limit = getattr(optimizer, "max_evaluations", None)
        if limit is not None:
            changes["max_evaluations"] = max(1, limit * n_iterations // optimizer.n_iterations)
        return replace(optimizer, **changes)  # type: ignore[type-var]

    def choose(
        self,
        minimize: Minimize,
        misfit: Callable[[Tensor], Tensor],
        target: Tensor,
        z: Tensor,
        scale: Callable[[Tensor], Tensor],
        n_iterations: int,
    ) -> tuple[Trace, Tensor]:
        """Run the stages.

        Arguments:
            minimize: of one stage.
            misfit: ||y - A g(z)||^2 of latents (B, D), (B,).
            target: E||noise||^2, (B,).
            z: where the first stage begins, (B, D).
            scale: what ``share`` is a part of, (B,), for latents (B, D).
            n_iterations: of all stages together; the first has as many as two of the others.

        Returns:
            the trace of all stages, joined, and gamma (B,).
        """
        wanted = 2 * math.log(self.tau) + target.log()
        middle = (self.share * scale(z)).log()
        gamma, slope = middle, torch.full_like(middle, _SLOPE)
        n_each = max(1, n_iterations // (self.n_stages + 1))
        parts = [minimize(gamma.exp(), z, max(1, n_iterations - (self.n_stages - 1) * n_each))]
        left = misfit(parts[-1].z).log()
        for _ in range(self.n_stages - 1):
            if parts[-1].interrupted:
                break
            middle = (self.share * scale(parts[-1].z)).log()
            step = ((wanted - left) / slope).clamp(-math.log(_LONGEST), math.log(_LONGEST))
            step = (gamma + step).clamp(middle - math.log(self.limit), middle + math.log(self.limit)) - gamma
            gamma = gamma + step
            parts.append(minimize(gamma.exp(), parts[-1].z, n_each))
            before, left = left, misfit(parts[-1].z).log()
            secant = ((left - before) / step).clamp(*_SLOPES)
            slope = torch.where(step.abs() > 0.05, secant, slope)  # of a short step rounding makes anything
        return _joined(parts), gamma.exp()


def noise_energy(y: Tensor, physics: Physics, measured: Tensor) -> tuple[Tensor, Tensor]:
    """(E||noise||^2 (B,), number of entries (B,)) as the noise model tells, in the entries that are ``measured``.

    Raises:
        ValueError: the noise model of the physics has no level.
    """
    energy = (_entry_energy(getattr(physics, "noise_model", None), y) * measured).flatten(1).sum(dim=1)
    if not bool((energy > 0).all()):
        raise ValueError("gamma='discrepancy' needs noise: its level is 0, so that gamma=0 is what fits")
    return energy, measured.flatten(1).sum(dim=1)


def _entry_energy(noise: Any, y: Tensor) -> Tensor:
    """E n^2 of every entry, broadcasting against y; drawn where no formula is known."""
    if isinstance(noise, deepinv.physics.GaussianNoise):  # sigma: one for all images, or one each
        level, mean = (_like(value, y) for value in (noise.sigma, getattr(noise, "mean", 0.0)))
        ones = (1,) * (y.ndim - 1)
        level, mean = (v.view(-1, *ones) if v.ndim <= 1 else v for v in (level, mean))
        return level.square() + mean.square()
    if isinstance(noise, HeteroscedasticNoise):
        return _like(noise.scale, y).square() + _like(noise.mean, y).square()
    if isinstance(noise, Noise):
        generator = torch.Generator().manual_seed(0)
        draws = (noise.sample_like(torch.zeros_like(y[:1]), generator) for _ in range(_DRAWS))
        return torch.stack([draw.abs().square() for draw in draws]).mean(dim=0)
    raise ValueError(
        f"gamma='discrepancy' needs the level of the noise, which {type(noise).__name__} does not tell: give the operator a "
        "GaussianNoise or a noise of flowprox.noise, or gamma as a number"
    )


def _like(value: Any, y: Tensor) -> Tensor:
    return torch.as_tensor(value).to(y.device, y.real.dtype)


def _joined(parts: list[Trace]) -> Trace:
    """Stages one after the other; the status is that of the last."""
    return replace(
        parts[-1],
        losses=torch.cat([part.losses if i == 0 else part.losses[1:] for i, part in enumerate(parts)]),
        norms=torch.cat([part.norms if i == 0 else part.norms[1:] for i, part in enumerate(parts)]),
        n_evaluations=sum((part.n_evaluations for part in parts[1:]), parts[0].n_evaluations),
        restarts=sum((part.restarts for part in parts[1:]), parts[0].restarts),
    )
