"""Steps from an image estimate towards the measurement.

    data_gradient:  A^T (y - A x)                                    the direction of descent of 1/2 ||y - A x||^2
    data_prox:      argmin_x 1/2 ||y - A x||^2 + rho/2 ||x - v||^2   = (A^T A + rho I)^-1 (A^T y + rho v)

x and v images, y measurement, A linear operator, A^T its adjoint, rho > 0 the weight of staying close to v.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from deepinv.optim.linear import least_squares_implicit_backward
from deepinv.physics import DecomposablePhysics, LinearPhysics
from torch import Tensor

__all__ = ["ExactProx", "data_gradient", "data_prox"]


class ExactProx(LinearPhysics):
    """A linear operator whose ``data_prox`` has a closed form; deepinv's ``prox_l2`` follows from it."""

    def regularized_inverse(self, v: Tensor, y: Tensor, rho: float | Tensor) -> Tensor:
        """argmin_x 1/2 ||y - A x||^2 + rho/2 ||x - v||^2, for images v (B, C, H, W), measurements y and rho > 0.

        rho broadcasts against v; the result is differentiable in all three, and nothing is written to the operator.
        """
        raise NotImplementedError

    def prox_l2(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, z: Tensor | float | None, y: Tensor, gamma: float | Tensor, **kwargs: Any
    ) -> Tensor:
        """argmin_x gamma/2 ||A x - y||^2 + 1/2 ||x - z||^2."""
        if not isinstance(z, Tensor):
            z = torch.full_like(self.A_adjoint(y), float(z or 0.0))
        return self.regularized_inverse(z, y, 1.0 / gamma)


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

    In closed form for an ``ExactProx`` (circular blur, the learned one included, structured sensing, super-resolution, MRI)
    and the operators that deepinv decomposes (denoising, inpainting); otherwise by conjugate gradient, whose
    gradient deepinv computes by implicit differentiation. Nothing is written to ``physics``.

    Arguments:
        v: images (B, C, H, W) to stay close to.
        y: measurements.
        physics: linear operator.
        rho: weight of closeness, positive; a number, a 0-d tensor, or one per image (B,).
        max_iter: of the conjugate gradient, where there is no closed form.
        tol: relative residual at which the conjugate gradient stops.

    Raises:
        ValueError: rho is a number that is not positive (a tensor is not looked at: that would stall a GPU), or the
            operator is not linear.

    Example:
        >>> import torch
        >>> from flowprox.operators import make_physics
        >>> physics = make_physics("denoising", (1, 2, 2))
        >>> data_prox(torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2), physics, rho=1.0).flatten().tolist()
        [0.5, 0.5, 0.5, 0.5]
    """
    if isinstance(rho, Tensor):
        rho = rho.view(-1, *[1] * (v.ndim - 1)) if rho.ndim == 1 else rho
    elif not (math.isfinite(rho) and rho > 0):
        raise ValueError(f"rho must be a positive number, got {rho}")
    if not isinstance(physics, LinearPhysics):
        raise ValueError(
            f"data_prox takes a linear operator and {type(physics).__name__} is none; use a solver that takes any operator, "
            "such as NoiseMAP"
        )
    if isinstance(physics, ExactProx):
        return physics.regularized_inverse(v, y, rho)
    if isinstance(physics, DecomposablePhysics):
        return physics.prox_l2(v, y, 1.0 / rho)
    # LinearPhysics.prox_l2 would write solver, max_iter and tol to the operator; its default eps of 1e-8 costs 3 digits
    gamma = 1.0 / rho
    gamma = gamma.flatten() if isinstance(gamma, Tensor) and gamma.ndim > 1 else gamma
    return least_squares_implicit_backward(
        physics, y, z=v, init=v, gamma=gamma, solver="CG", max_iter=max_iter, tol=tol, parallel_dim=[0], eps=1e-20
    )
