"""Invertible maps with a tractable Jacobian determinant, and their composition.

    z, logdet = f.forward(x)        logdet = log|det Df(x)|,   shape (B,)
    x, logdet = f.inverse(z)        logdet = log|det Df^-1(z)|, shape (B,)

so that the change of variables reads log p(x) = log p_base(f(x)) + log|det Df(x)|. Symbols: x image (B, C, H, W),
z latent, B batch. Both directions always return value and log-determinant; ``encode`` and ``decode`` are the value
alone, for callers (every prox) that have no use for the determinant.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

__all__ = ["Bijection", "NonFiniteError", "Sequential", "check_finite"]


class NonFiniteError(ArithmeticError):
    """A value became NaN or infinite inside a flow; the message names the block and the direction."""


class Bijection(nn.Module):
    """Contract of every invertible layer.

    A subclass implements ``forward`` and ``inverse``. It may override ``encode`` and ``decode`` where the value is
    cheaper without the determinant.
    """

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map x (B, C, H, W) to (z, logdet): z of the layer's output shape, logdet = log|det Df(x)| of shape (B,)."""
        raise NotImplementedError

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Map z back to (x, logdet): logdet = log|det Df^-1(z)| of shape (B,), the negative of forward's at x."""
        raise NotImplementedError

    def encode(self, x: Tensor) -> Tensor:
        """The value of ``forward`` alone."""
        return self.forward(x)[0]

    def decode(self, z: Tensor) -> Tensor:
        """The value of ``inverse`` alone."""
        return self.inverse(z)[0]


class Sequential(Bijection):
    """Composition of bijections, applied left to right in ``forward``.

    Example:
        >>> from flowprox.flows import Conv1x1, Squeeze
        >>> f = Sequential([Squeeze(), Conv1x1(12)])
        >>> x = torch.rand(2, 3, 8, 8)
        >>> z, logdet = f(x)
        >>> bool(torch.allclose(f.inverse(z)[0], x, atol=1e-5))
        True
    """

    def __init__(self, layers: Iterable[Bijection]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logdet = x.new_zeros(x.shape[0])
        for layer in self.layers:
            x, layer_logdet = layer(x)
            logdet = logdet + layer_logdet
        return x, logdet

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        logdet = z.new_zeros(z.shape[0])
        for layer in reversed(self.layers):
            z, layer_logdet = layer.inverse(z)  # type: ignore[operator]
            logdet = logdet + layer_logdet
        return z, logdet

    def encode(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer.encode(x)  # type: ignore[operator]
        return x

    def decode(self, z: Tensor) -> Tensor:
        for layer in reversed(self.layers):
            z = layer.decode(z)  # type: ignore[operator]
        return z


def check_finite(value: Tensor, block: str, direction: str) -> Tensor:
    """Return ``value`` unchanged, or raise ``NonFiniteError`` naming the block and the direction.

    One reduction and one host synchronization: called at the ends of a flow, not per layer.
    """
    if not bool(torch.isfinite(value.sum())):
        raise NonFiniteError(
            f"{block} gave a non-finite value in the {direction} direction; "
            "check the input for NaN, and train with a tighter bound on the log-scale or a smaller learning rate"
        )
    return value
