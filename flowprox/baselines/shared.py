"""What the methods share: checks of what they are given, the norm of an operator."""

from __future__ import annotations

import torch
from deepinv.models import Reconstructor
from deepinv.physics import LinearPhysics, Physics
from torch import Tensor

from flowprox.operators import check_measurement


class Baseline(Reconstructor):
    """A method for linear operators: ``forward`` checks what it is given, ``_estimate`` computes."""

    def forward(self, y: Tensor, physics: Physics) -> Tensor:  # type: ignore[override]
        """x_hat (B, C, H, W) of measurements y (B, ...).

        Raises:
            ValueError: y is not finite, no batch of floating-point numbers or not of the operator's shape, or the operator
                is not linear.
        """
        if not isinstance(physics, LinearPhysics):
            raise ValueError(f"{type(self).__name__} needs a linear operator (deepinv.physics.LinearPhysics)")
        if y.ndim > 1 and not len(y):
            return physics.A_adjoint(y.new_zeros(1, *y.shape[1:]))[:0]
        return self._estimate(check_measurement(y, physics), physics)

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
