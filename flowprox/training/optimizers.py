"""How the weights move: the optimizers, their learning rates over a run, and the running average of the weights.

    adam   Kingma and Ba (2015), https://arxiv.org/abs/1412.6980
    muon   W <- W - 0.2 sqrt(max(m, n)) lr U V^T,   U S V^T the momentum of a convolution's weight, read as an m x n matrix
           (output channels, the rest), by Newton and Schulz's iteration; Adam for everything else. Jordan et al. (2024),
           https://kellerjordan.github.io/posts/muon; scale of Liu et al. (2025), https://arxiv.org/abs/2502.16982, Eq. (4),
           with which Adam's learning rates fit

Both shrink the weights by 1 - lr decay in every step (Loshchilov and Hutter (2019), https://arxiv.org/abs/1711.05101), if
asked to: convolutions, biases, and the scales and 1x1 matrices of flows, whose gain has no other bound. Parameters called
"scalars" or "start" do not decay: for step sizes, shrinkages and a start image 0 is no natural end.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import torch
from pytorch_optimizer import Muon
from torch import Tensor, nn

from flowprox.flows.layers import on_cpu
from flowprox.naming import Values

_WITHOUT_DECAY = ("scalars", "start")
_ADAM = {"betas": (0.9, 0.999), "eps": 1e-8}


def make_optimizer(kind: str, groups: list[Values], fused: bool, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    """Adam (one kernel, if ``fused``) or "muon" over the parameters that ask for gradients.

    ``groups`` have ``params`` and their learning rate ``lr`` each; Muon splits them in two, all rates stay theirs.
    """
    parts: list[Values] = []
    for group in groups:
        learned = [p for p in group["params"] if p.requires_grad]
        decay = 0.0 if group.get("name") in _WITHOUT_DECAY else weight_decay
        group = {**group, "params": learned, "weight_decay": decay}
        if kind == "muon":  # convolutions' weights of more than one row and column; Adam has the others
            matrices = [p for p in learned if p.ndim == 4 and min(len(p), p[0].numel()) > 1]
            others = [p for p in learned if not any(p is one for one in matrices)]
            parts.append({**group, "params": matrices, "use_muon": True, "use_adjusted_lr": True})
            group = {**_ADAM, **group, "params": others, "use_muon": False}
        parts.append(group)
    parts = [part for part in parts if part["params"]]
    # AdamW is Adam where nothing decays
    return Muon(parts) if kind == "muon" else torch.optim.AdamW(parts, fused=fused or None, **_ADAM)


def apply_if(is_good: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Step the optimizer where ``is_good``, a scalar on the device, is true, else change nothing.

    Kernels of fused optimizers read the flag themselves, as they do for gradient scalers; for others, and on the CPU where that
    costs nothing, the host reads it.
    """
    if optimizer.defaults.get("fused") and not on_cpu(is_good):
        optimizer.found_inf = (~is_good).float()  # type: ignore[attr-defined]
        optimizer.step()
    elif bool(is_good):
        optimizer.step()


def schedule_factor(schedule: str, progress: float) -> float:
    """The learning rate relative to its peak, for progress from 0 to 1.

    Example:
        >>> [round(schedule_factor("cosine", p), 3) for p in (0.0, 0.5, 1.0)]
        [1.0, 0.5, 0.0]
        >>> [schedule_factor("halving", p) for p in (0.0, 0.5, 1.0)]
        [1.0, 0.25, 0.0625]
    """
    if schedule == "halving":
        return 0.5 ** min(int(5 * progress), 4)
    rise, low = (0.3, 0.04) if schedule == "one-cycle" else (0.0, 0.0)
    if schedule == "constant":
        return 1.0
    if progress < rise:
        return low + (1 - low) * 0.5 * (1 - math.cos(math.pi * progress / rise))
    return 0.5 * (1 + math.cos(math.pi * (progress - rise) / (1 - rise)))


class WeightAverage:
    """Running average of a model's weights, a <- d a + (1 - d) w, with d rising to ``decay`` over the first steps.

    With decay 0 it is the model itself.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.averaged = copy.deepcopy(model) if decay else model
        self.pairs = [p.detach() for p in self.averaged.parameters()], [p.detach() for p in model.parameters()]

    def update(self, n: Tensor, is_good: Tensor) -> None:
        """Take the weights in after the n-th step, if that step was good; n and ``is_good`` are scalars on the device."""
        if self.decay:  # not ``AveragedModel``, which reads its counter on the host and copies all buffers every time
            share = torch.where(is_good, 1 - (n / (n + 10)).clamp(max=self.decay), 0.0)
            if on_cpu(share):
                torch._foreach_lerp_(*self.pairs, float(share))  # type: ignore[attr-defined]
                return
            difference = torch._foreach_sub(self.pairs[1], self.pairs[0])  # type: ignore[attr-defined]
            torch._foreach_mul_(difference, share)  # type: ignore[attr-defined]
            torch._foreach_add_(self.pairs[0], difference)  # type: ignore[attr-defined]

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

    def load_state_dict(self, state: Mapping[str, Tensor] | None) -> None:
        """A run that was not averaged so far starts from its present weights."""
        if self.decay:
            self.averaged.load_state_dict(self.model.state_dict() if state is None else state)
