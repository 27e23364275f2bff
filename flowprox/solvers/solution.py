"""What a solver found, and how it got there."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Solution", "SolverInterrupted"]


@dataclass
class Solution:
    """Result of ``solver.solve(y, physics)``; B images, D latent dimensions.

    Arguments:
        estimate: images (B, C, H, W), not clipped.
        latent: their latents (B, D), or None where the method has none.
        losses: objective after each iteration, (n_iterations + 1, B), the start first; an image that stopped keeps its
            last value.
        reasons: per image, why it stopped: "converged", "iterations", "evaluations", "line search", "interrupted".
        n_evaluations: evaluations of objective and gradient per image, (B,).
        gamma: weight of the prior that was used, (B,), or None.
        restarts: how often a non-finite value or a failed line search sent the image back to its best point, (B,).
        latent_norms: ||z|| after each iteration, laid out as ``losses``.
    """

    estimate: Tensor
    latent: Tensor | None
    losses: Tensor
    reasons: list[str]
    n_evaluations: Tensor
    gamma: Tensor | None = None
    restarts: Tensor | None = None
    latent_norms: Tensor | None = None


class SolverInterrupted(KeyboardInterrupt):
    """Ctrl-C during a solve; ``solution`` holds the best iterates so far, with "interrupted" among its reasons."""

    def __init__(self, solution: Solution) -> None:
        super().__init__("interrupted; the attribute solution holds what is finished")
        self.solution = solution
