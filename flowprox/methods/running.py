"""Call a method, and keep what it says about itself."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from deepinv.models import Reconstructor
from deepinv.physics import Denoising, LinearPhysics, Physics
from torch import Tensor

from flowprox.solvers import Solution

__all__ = ["Adjoint", "Outcome", "SelfEnsemble", "outcome_of", "run_method"]


class Adjoint(Reconstructor):
    """x_hat = A^T y: what the measurement shows by itself.

    For denoising and inpainting this is the measurement.

    Example:
        >>> from flowprox.operators import make_physics
        >>> physics = make_physics("denoising", (1, 4, 4))
        >>> y = torch.rand(1, 1, 4, 4)
        >>> torch.equal(Adjoint()(y, physics), y)
        True
    """

    def forward(self, y: Tensor, physics: Physics) -> Tensor:  # type: ignore[override]
        if not isinstance(physics, LinearPhysics):
            raise ValueError(f"{type(physics).__name__} is not linear and has no adjoint; use another method")
        return physics.A_adjoint(y)


class SelfEnsemble(Reconstructor):
    """x_hat = (D(y) + M D(M y)) / 2: a denoising network D averaged over the image and its mirror image, M left to right.

    What a network does differently to the two is its own error, at twice the time.

    References:
        Lim et al. 2017, Enhanced deep residual networks for single image super-resolution,
        https://arxiv.org/abs/1707.02921, Sec. 3.4 (there over eight transforms)

    Arguments:
        model: ``x_hat = model(y, physics)`` for a denoising physics, which knows nothing of left and right.

    Example:
        >>> from flowprox.operators import make_physics
        >>> y = torch.rand(1, 3, 4, 4)
        >>> x_hat = SelfEnsemble(Adjoint())(y, make_physics("denoising", (3, 4, 4)))
        >>> torch.allclose(x_hat, y)
        True
    """

    def __init__(self, model: Reconstructor) -> None:
        super().__init__()
        if not isinstance(model, Reconstructor):
            raise ValueError(f"model must be a trained network that reconstructs, got {type(model).__name__}")
        self.model = model

    def forward(self, y: Tensor, physics: Physics) -> Tensor:  # type: ignore[override]
        if not isinstance(physics, Denoising):
            raise ValueError(f"{type(physics).__name__} has another mirror image; a self-ensemble is for denoising")
        return (self.model(y, physics) + self.model(y.flip(-1), physics).flip(-1)) / 2


class Outcome(NamedTuple):
    """What a method returned.

    Arguments:
        estimate: (B, C, H, W).
        facts: per image what a solver says about itself: reason, n_evaluations, gamma, restarts; empty for other methods.
        deviation: standard deviation of each pixel (B, C, H, W), from a method that samples the posterior.
    """

    estimate: Tensor
    facts: list[dict[str, Any]]
    deviation: Tensor | None = None


def run_method(method: Reconstructor, y: Tensor, physics: Physics) -> Outcome:
    """Call a method on measurements y (B, ...), by ``solve`` where it has that."""
    solve = getattr(method, "solve", None)
    with torch.no_grad():
        if solve is None:
            x_hat = method(y, physics)
            return Outcome(x_hat, [{} for _ in range(len(x_hat))])
        return outcome_of(solve(y, physics))


def outcome_of(solution: Solution) -> Outcome:
    """The parts of a solver's solution that are kept with the image."""
    facts: list[dict[str, Any]] = [{} for _ in range(len(solution.estimate))]
    for key, name in (("reason", "reasons"), *((key, key) for key in ("n_evaluations", "gamma", "restarts"))):
        values = getattr(solution, name, None)
        if values is not None:
            values = values.tolist() if isinstance(values, Tensor) else values
            for fact, value in zip(facts, values, strict=True):
                fact[key] = value
    return Outcome(solution.estimate, facts, getattr(solution, "std", None))
