r"""What the folds of an unfolded network are told beside the image, and what they share.

    level       c(sigma)                             the learned scalars depend on the noise level of y   (``flowprox.prox``)
    mean        p(z | y) = N(z; mu(y), diag(1/w))    what the latents are shrunk towards is predicted from y
                R(z) = 1/2 sum w (z - mu(y))^2,      prox_{s R}(z) = mu + (z - mu) / (1 + s w)
    low rank    W_k = W + B_k A_k                    the folds' flows share the convolutions W of their coupling nets

Symbols: y measurement, sigma standard deviation of its noise, z latent, w > 0 weights, s >= 0 the step.

A predicted mean makes the flow a conditional one whose coupling nets stay as they are: fast and memory-saving paths, exact
inverse and step 0 = identity hold unchanged. With large s the network's estimate is g(mu(y)), with s = 0 the image after the
data step; the learned w decide for each latent channel which of the two to believe.

W is a convolution's weight read as an (m, n) matrix; A_k (r, n), B_k (m, r), which is 0 at the start, so that the folds begin
with the same convolutions. Unlike in LoRA W is trained along. ActNorms, 1x1 matrices and biases stay each fold's own.

References:
    Winkler et al. 2019, Learning likelihoods with conditional normalizing flows, https://arxiv.org/abs/1912.00042 (a base
    density that depends on the condition, there beside coupling nets that do)
    Hu et al. 2021, LoRA: Low-rank adaptation of large language models, https://arxiv.org/abs/2106.09685, Eq. (3)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from deepinv.physics import LinearPhysics
from torch import Tensor, nn
from torch.nn.utils import parametrize

from flowprox.flows import Flow
from flowprox.flows.layers import AffineCoupling
from flowprox.naming import Specified
from flowprox.operators import visibility
from flowprox.prox import FlowProx, checked_levels


class Conditioning(Specified):
    """What an ``Unfolded`` network is told beside the image, and what its folds share; without arguments nothing.

    Arguments:
        levels: rising noise levels at which the network's scalars are learned, interpolated between them; it is then told the
            level of a measurement, ``physics.noise_model.sigma``. None: one set for all.
        latent_mean: network that predicts what each fold shrinks towards from the first fold's v, A^T A 1 averaged over the
            channels and, with ``levels``, the noise level: C + 1 or C + 2 channels. A^T A 1 shows where a mask is open; it is
            constant for blurs, and noise for random matrices. None shrinks towards 0.
        adaptation_rank: the folds' flows share the weights of the first one's coupling nets but for a correction of this rank
            in each fold (the later flows' own are given up). None: every fold has its own.

    Raises:
        ValueError: levels that are not positive and rising.
    """

    def __init__(
        self,
        levels: Sequence[float] | None = None,
        latent_mean: LatentMeanNet | None = None,
        adaptation_rank: int | None = None,
    ) -> None:
        self.levels = checked_levels(levels)
        self.latent_mean = latent_mean
        self.adaptation_rank = adaptation_rank

    def fit(self, proxes: Sequence[nn.Module]) -> None:
        """Let the flows of the proxes share weights; ValueError where ``latent_mean`` or ``adaptation_rank`` does not fit
        them."""
        flows = [prox.flow for prox in proxes if isinstance(prox, FlowProx)]
        if self.adaptation_rank is not None:
            adapt(list(dict.fromkeys(flows)), self.adaptation_rank)
        if self.latent_mean is None:
            return
        if len(flows) != len(proxes):
            raise ValueError("latent_mean needs a FlowProx in every fold: only these have a latent")
        needs = {
            "n_inputs": {flow.n_channels + 1 + int(self.levels is not None) for flow in flows},
            "n_channels": {flow.n_channels for flow in flows},
            "n_levels": {flow.n_levels for flow in flows},
            "n_folds": {len(proxes)},
        }
        for name, values in needs.items():
            if values != {own := getattr(self.latent_mean, name)}:
                wanted = " or ".join(map(str, sorted(values)))
                hint = ", one entry of hidden_channels for each" if name == "n_levels" else ""
                raise ValueError(f"latent_mean has {name} {own} and the proxes need {wanted}{hint}")


class MultiScaleNet(nn.Module):
    """A U-Net of residual blocks without norms; scale l works at 1/2^(l+1) of the image's resolution.

    Arguments:
        n_inputs: channels of what it is given.
        hidden_channels: one width per scale, finest first.
        n_blocks: residual blocks per scale and direction, one number or one per scale.

    Raises:
        ValueError: no widths, numbers that are not whole or below 1, or lists of different lengths.
    """

    def __init__(self, n_inputs: int, hidden_channels: Sequence[int], n_blocks: int | Sequence[int] = 1) -> None:
        super().__init__()
        widths = _whole_numbers("hidden_channels", hidden_channels)
        depths = _whole_numbers("n_blocks", [n_blocks] * len(widths) if isinstance(n_blocks, int) else n_blocks)
        if len(depths) != len(widths):
            wanted = f"one number, or one per entry of hidden_channels, {len(widths)}"
            raise ValueError(f"n_blocks must be {wanted}; got {n_blocks}")
        self.n_inputs = n_inputs
        self.first = nn.Conv2d(4 * n_inputs, widths[0], 3, padding=1)
        self.contract = nn.ModuleList(_blocks(w, n) for w, n in zip(widths, depths, strict=True))
        self.down = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in pairwise(widths))
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in pairwise(widths))
        self.expand = nn.ModuleList(_blocks(w, n) for w, n in zip(widths[:-1], depths, strict=False))

    def features(self, x: Tensor) -> list[Tensor]:
        """Of each scale (B, width, h, w), finest first, from x (B, n_inputs, H, W)."""
        h = self.first(F.pixel_unshuffle(x.contiguous(memory_format=torch.channels_last), 2))
        features: list[Tensor] = []
        for i, block in enumerate(self.contract):
            h = block(h if i == 0 else self.down[i - 1](h))
            features.append(h)
        for i in reversed(range(len(self.up))):
            h = self.expand[i](self.up[i](h) + features[i])
            features[i] = h
        return features


class LatentMeanNet(Specified, MultiScaleNet):
    """A ``MultiScaleNet`` whose scales are the levels of a multi-scale flow (Glow, RealNVP).

    Scale l works at the resolution of level l, 1/2^(l+1) of the image's, and a last convolution of each gives the means of the
    latents that the flow has finished there. All means are 0 at the start.

    Arguments:
        n_inputs: channels of what it is given.
        n_channels: C of the images and latents.
        n_folds: how many means it predicts, one for each prox of an unfolded network.
        hidden_channels: one width per level, finest first.
        n_blocks: residual blocks per scale and direction, one number or one per level.
        every_fold: predict anew in every fold from its own v, not once from the first fold's.

    Raises:
        ValueError: no widths, numbers that are not whole or below 1, or lists of different lengths.

    Example:
        >>> net = LatentMeanNet(n_inputs=4, n_channels=3, n_folds=2, hidden_channels=[8, 16])
        >>> means = net(torch.rand(5, 4, 16, 16))
        >>> len(means), means[0].shape, means[0].abs().max().item()
        (2, torch.Size([5, 3, 16, 16]), 0.0)
    """

    def __init__(
        self,
        n_inputs: int,
        n_channels: int,
        n_folds: int,
        hidden_channels: Sequence[int],
        n_blocks: int | Sequence[int] = 1,
        every_fold: bool = False,
    ) -> None:
        _whole_numbers("n_inputs, n_channels and n_folds", [n_inputs, n_channels, n_folds])
        super().__init__(n_inputs, hidden_channels, n_blocks)
        self.n_channels, self.n_folds, self.every_fold = n_channels, n_folds, every_fold
        # channels that end at each level of nested ``Squeeze``, ``Split`` and ``Unsqueeze``: half, at the last all
        finished = [4 * n_channels * 2**level // 2 for level in range(len(hidden_channels))]
        finished[-1] *= 2
        pairs = zip(hidden_channels, finished, strict=True)
        self.means = nn.ModuleList(nn.Conv2d(w, n_folds * n, 3, padding=1) for w, n in pairs)
        for convolution in self.means:
            nn.init.zeros_(convolution.weight)  # type: ignore[arg-type]
            nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]

    @property
    def n_levels(self) -> int:
        """Levels of the flows that it fits."""
        return len(self.means)

    def of_measurement(self, v: Tensor, physics: LinearPhysics, sigma: Tensor | None) -> list[Tensor]:
        """Each fold's mean (B, C, H, W), from a fold's v (B, C, H, W), the operator and, if told, the level (B,)."""
        with torch.no_grad():
            seen = visibility(v, physics)
        inputs = [v - 0.5, seen.expand(v.shape[0], -1, -1, -1)]
        if sigma is not None:
            inputs.append(sigma.view(-1, 1, 1, 1).expand(-1, 1, *v.shape[-2:]))
        return self(torch.cat(inputs, dim=1))

    def forward(self, x: Tensor) -> list[Tensor]:
        """One image-shaped latent mean (B, C, H, W) per fold, from x (B, n_inputs, H, W), H and W divisible by 2^n_levels."""
        divisor = 2**self.n_levels
        if any(side % divisor for side in x.shape[-2:]):
            size = tuple(x.shape[-2:])
            raise ValueError(f"x has size {size}; height and width must be divisible by {divisor}: pad or crop")
        features = self.features(x)
        with torch.autocast(x.device.type, enabled=False):  # what becomes part of the image is not rounded to bfloat16
            levels = [mean(F.relu(h).to(x.dtype)) for mean, h in zip(self.means, features, strict=True)]
        return [_assembled(parts) for parts in zip(*(level.chunk(self.n_folds, 1) for level in levels), strict=True)]


class _Residual(nn.Module):
    is_region = True  # of ``flowprox.graphs.compile_regions``

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(x)))


def _whole_numbers(name: str, values: object) -> list[int]:
    numbers = list(values) if isinstance(values, Sequence) and not isinstance(values, str) else []
    if not numbers or not all(type(number) is int and number >= 1 for number in numbers):
        raise ValueError(f"{name} must be whole numbers, at least 1; got {values}")
    return numbers


def _blocks(width: int, n: int) -> nn.Module:
    return nn.Sequential(*(_Residual(width) for _ in range(n)))


def _assembled(levels: Sequence[Tensor]) -> Tensor:
    """The levels' latents, finest first, as one image-shaped latent."""
    latent = None
    for level in reversed(levels):
        latent = F.pixel_shuffle(level if latent is None else torch.cat([latent, level], dim=1), 2)
    assert latent is not None
    return latent


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
        how = "by weight normalization (RealNVP) or an earlier adaptation"
        raise ValueError(f"these convolutions are parametrized already, {how}; adapt fresh Glows")
    for same in zip(*convolutions, strict=True):
        for convolution in same:
            correction = _LowRankCorrection(convolution.weight, rank)
            parametrize.register_parametrization(convolution, "weight", correction)
            convolution.parametrizations.weight.original = same[0].parametrizations.weight.original  # type: ignore[union-attr]


def _convolutions(flow: Flow) -> list[nn.Conv2d | nn.ConvTranspose2d]:
    nets = [module.net for module in flow.modules() if isinstance(module, AffineCoupling)]
    return [c for net in nets for c in net.modules() if isinstance(c, nn.Conv2d | nn.ConvTranspose2d)]
