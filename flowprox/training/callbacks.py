"""What may be told how a training run goes."""

from __future__ import annotations

from collections.abc import Mapping
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
        """After every step.

        Arguments:
            step: number of steps so far.
            loss: of this step, a scalar; NaN where the step was skipped. Reading its value waits for the device.
            model: the network that is trained.
        """

    def on_validation(self, step: int, metrics: Mapping[str, float], model: nn.Module) -> None:
        """After every validation, with its figures and the network that was validated, the average if there is one."""

    def on_end(self, result: TrainingResult) -> None:
        """When the run has ended and all is written."""
