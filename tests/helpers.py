"""Checks that every member of a kind passes: operators are linear and have their adjoint, proxes minimize. A killed task.

Meant for float64; shapes are (B, C, H, W).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flowprox.training.tasks import Task

Map = Callable[[Tensor], Tensor]


def assert_linear(A: Map, shape: tuple[int, ...], *, dtype: torch.dtype = torch.float64, atol: float = 1e-10) -> None:
    """A (2 u - 3 v) = 2 A u - 3 A v."""
    u, v = torch.randn(2, *shape, dtype=dtype)
    torch.testing.assert_close(A(2 * u - 3 * v), 2 * A(u) - 3 * A(v), rtol=0, atol=atol)


def assert_adjoint(
    A: Map, A_adjoint: Map, shape: tuple[int, ...], *, dtype: torch.dtype = torch.float64, rtol: float = 1e-10
) -> None:
    """<A u, w> = <u, A^T w>."""
    u = torch.randn(shape, dtype=dtype)
    Au = A(u)
    w = torch.randn_like(Au)
    left, right = (Au * w).sum(), (u * A_adjoint(w)).sum()
    assert abs(left - right) <= rtol * Au.norm() * w.norm(), f"<Au, w> = {left:.12g} but <u, A^T w> = {right:.12g}"


def dense_matrix(A: Map, shape: tuple[int, ...], *, dtype: torch.dtype = torch.float64) -> Tensor:
    """The matrix of A for one image of shape (C, H, W): column j is A applied to pixel j."""
    n = torch.Size(shape).numel()
    with torch.no_grad():
        return A(torch.eye(n, dtype=dtype).view(n, *shape)).reshape(n, -1).T


def assert_prox(
    prox: Callable[[Tensor, float], Tensor],
    functional: Map,
    v: Tensor,
    step: float,
    *,
    scales: tuple[float, ...] = (1e-3, 1e-2, 0.1, 1.0),
    n_directions: int = 32,
) -> None:
    """x = prox(v, step) minimizes 1/2 ||x - v||^2 + step * functional(x), which maps (B, ...) to (B,).

    No random direction, no direction along one coordinate and not the way to v leads lower, at any scale. For a convex
    functional that is the minimum.
    """
    x = prox(v, step)

    def objective(u: Tensor) -> Tensor:
        return 0.5 * (u - v).flatten(1).square().sum(1) + step * functional(u)

    with torch.no_grad():
        reached = objective(x)
        directions = [torch.randn_like(x) for _ in range(n_directions)]
        for i in torch.randperm(x[0].numel())[:n_directions].tolist():
            direction = torch.zeros_like(x)
            direction.flatten(1)[:, i] = 1.0
            directions.append(direction)
        for direction in [*directions, v - x, -x]:
            for scale in scales:
                for sign in (-1, 1):
                    lower = reached - objective(x + sign * scale * direction)
                    assert lower.max() <= 1e-9 * (1 + reached.abs().max()), (
                        f"a step of {sign * scale:g} lowers the objective by {lower.max():.3g}"
                    )


def terminated_while_validating(make_task: Callable[[], Task]) -> Task:
    """A task whose process is asked to end, by SIGTERM, in its first validation."""
    task = make_task()
    evaluate = task.evaluate

    def and_terminate(*arguments: Any) -> dict[str, Tensor]:
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*arguments)

    task.evaluate = and_terminate  # type: ignore[method-assign]
    return task
