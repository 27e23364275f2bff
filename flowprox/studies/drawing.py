"""Axes and small statistics that the figures of the studies share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

__all__ = ["curve", "new_figure", "rounded"]


def new_figure(n_columns: int = 1, n_rows: int = 1, width: float = 4.2, height: float = 3.2) -> tuple[Any, list[Any]]:
    """A figure and its axes, row by row, without the upper and right frame; made without a display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * n_columns, height * n_rows), layout="constrained")
    axes = list(figure.subplots(n_rows, n_columns, squeeze=False).flat)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def curve(values: Tensor) -> list[float]:
    """Mean over images of a number per iteration (N, B), as a list."""
    return rounded(values.double().mean(dim=1))


def rounded(values: Tensor | float | Sequence[Any], digits: int = 6) -> Any:
    """A number, or nested lists, with so many significant digits, for records that stay small."""
    listed: Any = values.tolist() if isinstance(values, Tensor) else values
    if isinstance(listed, list | tuple):
        return [rounded(item, digits) for item in listed]
    return float(f"{listed:.{digits}g}")
