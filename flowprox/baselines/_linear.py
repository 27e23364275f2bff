"""What the iterations for linear operators share."""

from __future__ import annotations

import torch
from deepinv.physics import LinearPhysics
from torch import Tensor

__all__ = ["require_count", "require_weight", "squared_norm"]


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
