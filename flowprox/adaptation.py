r"""Low-rank adaptation: folds that share the coupling nets of one flow, each with a small correction of its own.

    W_k = W + B_k A_k      W a convolution's weight read as an (m, n) matrix, m its first dimension; A_k (r, n), B_k (m, r)

B_k is 0 at the start, so that the folds begin with the same convolutions: copies of one flow as the same flow. Unlike in LoRA
W is trained along. What is left of a step, ActNorm, 1x1 matrix and biases, is small and stays each fold's own.

References:
    Hu et al. 2021, LoRA: Low-rank adaptation of large language models, https://arxiv.org/abs/2106.09685, Eq. (3)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from flowprox.flows import Flow
from flowprox.flows.layers import AffineCoupling

__all__ = ["adapt"]


class _LowRankCorrection(nn.Module):
    """W -> W + B A for a weight of any shape."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        n_out, n_in = weight.flatten(1).shape
        rank = min(rank, n_out, n_in)
        self.down = nn.Parameter(torch.randn(rank, n_in).to(weight) / math.sqrt(n_in))
        self.up = nn.Parameter(weight.new_zeros(n_out, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down).view(weight.shape)


def adapt(flows: Sequence[Flow], rank: int) -> None:
    """Let flows of one architecture share the convolutions of the first one's coupling nets but for a correction of that rank.

    Arguments:
        flows: distinct flows, changed in place; the weights of the later ones' convolutions are given up.
        rank: r, at least 1; a weight whose smaller side is below that gets a correction of full rank.

    Raises:
        ValueError: a rank that is not positive, fewer than two flows, flows without coupling nets or of different
            architectures, or convolutions that are parametrized already (RealNVP's by weight normalization).
    """
    convolutions = [_convolutions(flow) for flow in flows]
    shapes = {tuple(tuple(c.weight.shape) for c in found) for found in convolutions}
    if rank < 1:
        raise ValueError(f"the rank of an adaptation must be at least 1, got {rank}")
    if len(set(map(id, flows))) < 2:
        raise ValueError("adaptation shares weights between folds: it needs two flows or more, which are not the same")
    if len(shapes) > 1 or shapes == {()}:
        raise ValueError("adaptation needs flows with the same coupling nets of convolutions in every fold")
    if any(parametrize.is_parametrized(c) for found in convolutions for c in found):
        raise ValueError(
            "these convolutions are parametrized already, by weight normalization (RealNVP) or an earlier adaptation; "
            "adapt fresh Glows"
        )
    for same in zip(*convolutions, strict=True):
        for convolution in same:
            correction = _LowRankCorrection(convolution.weight, rank)
            parametrize.register_parametrization(convolution, "weight", correction)
            convolution.parametrizations.weight.original = same[0].parametrizations.weight.original  # type: ignore[union-attr]


def _convolutions(flow: Flow) -> list[nn.Conv2d | nn.ConvTranspose2d]:
    nets = [module.net for module in flow.modules() if isinstance(module, AffineCoupling)]
    return [c for net in nets for c in net.modules() if isinstance(c, nn.Conv2d | nn.ConvTranspose2d)]
