"""What is told how a training run goes.

with reporting_to(Print()):
    train_flow("compact", training, data)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from flowprox.options import TrainingResult

if TYPE_CHECKING:
    from torch import Tensor, nn


class Callback:
    """What is told how a run goes, in its first process.

    It may use the model, draw random numbers and switch modes: the run stays the same to the bit as long as it changes no
    weights. Derive from it and override what you need.
    """

    def on_step(self, step: int, loss: Tensor, model: nn.Module) -> None:
        """After every step: their number so far, the loss (a scalar, NaN where the step was skipped; reading its value waits
        for the device), and the network that is trained."""

    def on_validation(self, step: int, metrics: Mapping[str, float], model: nn.Module) -> None:
        """After every validation, with its figures and the network that was validated, the average if there is one."""

    def on_end(self, result: TrainingResult) -> None:
        """When the run has ended and all is written."""


_TOLD: ContextVar[tuple[Callback, ...]] = ContextVar("callbacks", default=())


@contextmanager
def reporting_to(*callbacks: Callback) -> Iterator[None]:
    """Within the block the training functions tell these how the run goes; blocks add up."""
    token = _TOLD.set((*_TOLD.get(), *callbacks))
    try:
        yield
    finally:
        _TOLD.reset(token)


def current_callbacks() -> tuple[Callback, ...]:
    """Those of the ``reporting_to`` blocks around."""
    return _TOLD.get()
