"""Steps from an image estimate towards the measurement.

    data_gradient:  A^T (y - A x)                                    the direction of descent of 1/2 ||y - A x||^2
    data_prox:      argmin_x 1/2 ||y - A x||^2 + rho/2 ||x - v||^2   = (A^T A + rho I)^-1 (A^T y + rho v)

x and v images, y measurement, A linear operator, A^T its adjoint, rho > 0 the weight of staying close to v.
"""

from __future__ import annotations

import math

from deepinv.optim.linear import least_squares_implicit_backward
from deepinv.physics import DecomposablePhysics, LinearPhysics
from torch import Tensor

__all__ = ["data_gradient", "data_prox"]


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

    In closed form for operators with a ``regularized_inverse(v, y, rho)`` (circular blur, the learned one included, and
    structured sensing) and those that deepinv decomposes (denoising, inpainting); otherwise by conjugate gradient, whose
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
    closed_form = getattr(physics, "regularized_inverse", None)
    if closed_form is not None:
        return closed_form(v, y, rho)
    if isinstance(physics, DecomposablePhysics):
        return physics.prox_l2(v, y, 1.0 / rho)
    # LinearPhysics.prox_l2 would write solver, max_iter and tol to the operator; its default eps of 1e-8 costs 3 digits
    gamma = 1.0 / rho
    gamma = gamma.flatten() if isinstance(gamma, Tensor) and gamma.ndim > 1 else gamma
    return least_squares_implicit_backward(
        physics, y, z=v, init=v, gamma=gamma, solver="CG", max_iter=max_iter, tol=tol, parallel_dim=[0], eps=1e-20
    )
