r"""The mean of a flow's latent, predicted from the measurement: a base density that depends on what was measured.

    p(z | y) = N(z; mu(y), diag(1/w))            R(z) = 1/2 sum w (z - mu(y))^2
    prox_{s R}(z) = mu + (z - mu) / (1 + s w)    shrinkage towards mu(y) instead of towards 0  (``flowprox.prox``)

A conditional flow whose coupling nets stay as they are: fast and memory-saving paths, exact inverse and step 0 = identity hold
unchanged. With large s the network's estimate is g(mu(y)), with s = 0 the image after the data step; the learned weights w
decide for each latent channel which of the two to believe.

References:
    Winkler et al. 2019, Learning likelihoods with conditional normalizing flows, https://arxiv.org/abs/1912.00042 (a base
    density that depends on the condition, there beside coupling nets that do)
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowprox.naming import Specified

__all__ = ["LatentMeanNet"]


class LatentMeanNet(Specified, nn.Module):
    """A U-Net of residual blocks without norms whose scales are the levels of a multi-scale flow (Glow, RealNVP).

    Scale l works at the resolution of level l, 1/2^(l+1) of the image's, and a last convolution of each gives the means of the
    latents that the flow has finished there. All means are 0 at the start.

    Arguments:
        n_inputs: channels of what it is given.
        n_channels: C of the images and latents.
        n_folds: how many means it predicts, one for each prox of an unfolded network.
        hidden_channels: one width per level, finest first.
        n_blocks: residual blocks per scale and direction, one number or one per level.

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
    ) -> None:
        super().__init__()
        widths = _whole_numbers("hidden_channels", hidden_channels)
        depths = _whole_numbers("n_blocks", [n_blocks] * len(widths) if isinstance(n_blocks, int) else n_blocks)
        if len(depths) != len(widths):
            raise ValueError(
                f"n_blocks must be one number, or one per entry of hidden_channels, {len(widths)}; got {n_blocks}"
            )
        _whole_numbers("n_inputs, n_channels and n_folds", [n_inputs, n_channels, n_folds])
        self.n_inputs, self.n_channels, self.n_folds = n_inputs, n_channels, n_folds
        self.first = nn.Conv2d(4 * n_inputs, widths[0], 3, padding=1)
        self.contract = nn.ModuleList(_blocks(w, n) for w, n in zip(widths, depths, strict=True))
        self.down = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in pairwise(widths))
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in pairwise(widths))
        self.expand = nn.ModuleList(_blocks(w, n) for w, n in zip(widths[:-1], depths, strict=False))
        finished = _finished_channels(n_channels, len(widths))
        self.means = nn.ModuleList(
            nn.Conv2d(w, n_folds * n, 3, padding=1) for w, n in zip(widths, finished, strict=True)
        )
        for convolution in self.means:
            nn.init.zeros_(convolution.weight)  # type: ignore[arg-type]
            nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]

    @property
    def n_levels(self) -> int:
        """Levels of the flows that it fits."""
        return len(self.means)

    def forward(self, x: Tensor) -> list[Tensor]:
        """One image-shaped latent mean (B, C, H, W) per fold, from x (B, n_inputs, H, W).

        Raises:
            ValueError: height or width is not divisible by 2^n_levels.
        """
        divisor = 2**self.n_levels
        if x.shape[-2] % divisor or x.shape[-1] % divisor:
            raise ValueError(
                f"x has size {tuple(x.shape[-2:])}; height and width must be divisible by {divisor}: pad or crop"
            )
        h = self.first(F.pixel_unshuffle(x.contiguous(memory_format=torch.channels_last), 2))
        features: list[Tensor] = []
        for i, block in enumerate(self.contract):
            h = block(h if i == 0 else self.down[i - 1](h))
            features.append(h)
        for i in reversed(range(len(self.up))):
            h = self.expand[i](self.up[i](h) + features[i])
            features[i] = h
        with torch.autocast(x.device.type, enabled=False):  # what becomes part of the image is not rounded to bfloat16
            levels = [mean(F.relu(h).to(x.dtype)) for mean, h in zip(self.means, features, strict=True)]
        return [_assembled(parts) for parts in zip(*(level.chunk(self.n_folds, 1) for level in levels), strict=True)]


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(x)))


def _whole_numbers(name: str, values: Any) -> list[int]:
    found = list(values) if isinstance(values, Sequence) and not isinstance(values, str) else []
    if not found or not all(isinstance(value, int) and value >= 1 for value in found):
        raise ValueError(f"{name} must be whole numbers, at least 1; got {values}")
    return found


def _blocks(width: int, n: int) -> nn.Module:
    return nn.Sequential(*(_Residual(width) for _ in range(n)))


def _finished_channels(n_channels: int, n_levels: int) -> list[int]:
    """Channels of the latent that end at each level of nested ``Squeeze``, ``Split`` and ``Unsqueeze``."""
    finished = []
    for level in range(n_levels):
        channels = 4 * n_channels
        n_channels = channels // 2  # what goes on to the next level
        finished.append(channels if level + 1 == n_levels else channels - n_channels)
    return finished


def _assembled(levels: Sequence[Tensor]) -> Tensor:
    """The levels' latents, finest first, as one image-shaped latent."""
    latent = None
    for level in reversed(levels):
        latent = F.pixel_shuffle(level if latent is None else torch.cat([latent, level], dim=1), 2)
    assert latent is not None
    return latent
