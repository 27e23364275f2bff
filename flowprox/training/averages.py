"""What goes along with the weights of a run: their average, batch statistics, and the weights to go back to."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

__all__ = ["BatchStatistics", "KeptWeights", "WeightAverage"]


class WeightAverage:
    """Running average of a model's weights, a <- d a + (1 - d) w, with d rising to ``decay`` over the first steps.

    With decay 0 it is the model itself.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.averaged = copy.deepcopy(model) if decay else model
        trained = [p.requires_grad for p in model.parameters()]
        averages, weights = (
            [p.detach() for p, t in zip(m.parameters(), trained, strict=True) if t] for m in (self.averaged, model)
        )
        self.pairs = averages, weights

    def update(self, n: int) -> None:
        """Take the weights in after the n-th step."""
        if self.decay:
            get_ema_multi_avg_fn(min(self.decay, n / (n + 10)))(*self.pairs, n)

    def current(self, distributed: bool = False) -> nn.Module:
        """The averaged model, with the model's present buffers; all processes then have those of process 0."""
        if distributed:
            for buffer in self.model.buffers():
                if buffer.is_floating_point():
                    torch.distributed.broadcast(buffer, 0)
        if self.decay:
            for ours, theirs in zip(self.averaged.buffers(), self.model.buffers(), strict=True):
                ours.copy_(theirs)
        return self.averaged

    def state_dict(self) -> dict[str, Tensor] | None:
        """None without averaging."""
        return self.averaged.state_dict() if self.decay else None

    def load_state_dict(self, state: dict[str, Tensor] | None) -> None:
        """A run that was not averaged so far starts from its present weights."""
        if self.decay:
            self.averaged.load_state_dict(self.model.state_dict() if state is None else state)


class BatchStatistics:
    """The running statistics of batch normalizations before a step: one that has seen a NaN would keep it for ever."""

    def __init__(self, model: nn.Module) -> None:
        names = ("running_mean", "running_var", "num_batches_tracked")
        self.live = [buffer for name, buffer in model.named_buffers() if name.endswith(names)]
        self.kept = [buffer.clone() for buffer in self.live]

    def keep(self) -> None:
        for kept, live in zip(self.kept, self.live, strict=True):
            kept.copy_(live)

    def put_back(self) -> None:
        for kept, live in zip(self.kept, self.live, strict=True):
            live.copy_(kept)


class KeptWeights:
    """A copy in main memory of a model and its average, to go back to when a run has lost its way."""

    def __init__(self, model: nn.Module, average: WeightAverage) -> None:
        self.model, self.average = model, average
        self.keep()

    def keep(self) -> None:
        self.state = {"model": _copied(self.model.state_dict()), "average": _copied(self.average.state_dict())}

    def put_back(self) -> None:
        self.model.load_state_dict(self.state["model"])
        self.average.load_state_dict(self.state["average"])


def _copied(state: dict[str, Tensor] | None) -> Any:
    return None if state is None else {name: value.detach().cpu().clone() for name, value in state.items()}
