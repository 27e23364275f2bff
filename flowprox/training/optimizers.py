"""The optimizers of a training run, from parameter groups that each have their learning rate.

adam   Kingma and Ba (2015), https://arxiv.org/abs/1412.6980
muon   W <- W - 0.2 sqrt(max(m, n)) lr U V^T,   U S V^T the momentum of a convolution's weight, read as an m x n matrix
       (output channels, the rest), by Newton and Schulz's iteration; Adam for everything else. Jordan et al. (2024),
       https://kellerjordan.github.io/posts/muon; scale of Liu et al. (2025), https://arxiv.org/abs/2502.16982, Eq. (4),
       with which Adam's learning rates fit

Both shrink the weights by 1 - lr decay in every step (Loshchilov and Hutter (2019), https://arxiv.org/abs/1711.05101), if
asked to: convolutions, biases, and the scales and 1x1 matrices of flows, whose gain has no other bound. Groups called
"scalars" or "start" do not decay: for step sizes, shrinkages and a start image 0 is no natural end.
"""

from __future__ import annotations

from typing import Any

import torch
from pytorch_optimizer import Muon
from torch import Tensor

__all__ = ["make_optimizer"]

_KEPT = ("scalars", "start")
_ADAM = {"betas": (0.9, 0.999), "eps": 1e-8}


def make_optimizer(
    kind: str, groups: list[dict[str, Any]], fused: bool, weight_decay: float = 0.0
) -> torch.optim.Optimizer:
    """Adam or Muon over the parameters that ask for gradients.

    Arguments:
        kind: "adam" or "muon".
        groups: each with ``params`` and its learning rate ``lr``; Muon splits them in two, all rates stay theirs.
        fused: run Adam as one kernel.
        weight_decay: at least 0.
    """
    groups = [
        {
            **group,
            "params": [p for p in group["params"] if p.requires_grad],
            "weight_decay": 0.0 if group.get("name") in _KEPT else weight_decay,
        }
        for group in groups
    ]
    if kind == "muon":
        return Muon(_nonempty([part for group in groups for part in _split(group)]))
    return torch.optim.AdamW(_nonempty(groups), fused=fused or None, **_ADAM)  # Adam where nothing decays


def _split(group: dict[str, Any]) -> list[dict[str, Any]]:
    matrices = [p for p in group["params"] if _is_matrix(p)]
    others = [p for p in group["params"] if not _is_matrix(p)]
    return [
        {**group, "params": matrices, "use_muon": True, "use_adjusted_lr": True},
        {**_ADAM, **group, "params": others, "use_muon": False},
    ]


def _is_matrix(parameter: Tensor) -> bool:
    """Whether it is a convolution's weight with more than one row and column."""
    return parameter.ndim == 4 and min(len(parameter), parameter[0].numel()) > 1


def _nonempty(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [group for group in groups if group["params"]]
