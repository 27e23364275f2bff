"""Reversible backpropagation (placeholder while it is being written): plain composition."""

from __future__ import annotations

from collections.abc import Iterable

from flowprox.flows.bijection import Bijection, Sequential

__all__ = ["Reversible"]


class Reversible(Sequential):
    def __init__(self, layers: Iterable[Bijection], recompute: str = "inputs") -> None:
        super().__init__(layers)
        self.recompute = recompute
