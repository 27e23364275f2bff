"""The implementations that are timed side by side: ours, normflows and FrEIA, as one architecture.

Each is a multi-scale Glow (squeeze, steps, split) with the same steps per level, widths and kernels (3, 1, 3). What cannot
be made alike is left as the peers have it, to their advantage:

    normflows   sigmoid scale; 1x1 convolution with LU factors, inverted in float64
    FrEIA       ``AllInOneBlock``: a fixed rotation in place of the learned 1x1 convolution, bounded log-scale; its coupling
                nets have no ActNorm where the paper's have

A peer "in bfloat16" runs under autocast with weights and images channels-last, the best that one line each can lend it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowprox.flows import Flow, Glow, GlowSteps, Sequential
from flowprox.flows.conditioners import CouplingNet
from flowprox.graphs import compile_regions

__all__ = ["CONTENDERS", "PRESETS", "TRAINING_ONLY", "Architecture", "Contender", "MultiScale"]


@dataclass(frozen=True)
class Architecture:
    """What all contenders share."""

    n_steps: tuple[int, ...]
    hidden_channels: int
    coupling: str
    squeeze: str

    def flops_per_pixel(self, n_channels: int = 3) -> float:
        """Floating-point operations (two per multiplication) of all convolutions in one direction, per image pixel."""
        total, channels, pixels = 0.0, n_channels, 1.0
        for n in self.n_steps:
            channels, pixels = 4 * channels, pixels / 4
            half, width = channels // 2, self.hidden_channels
            macs = 9 * half * width + width * width + 9 * width * 2 * half + channels * channels
            total += 2 * n * macs * pixels
            channels //= 2
        return total


PRESETS = {
    "paper": Architecture((18, 18, 18, 1), 512, "conv-actnorm", "pixels"),
    "compact": Architecture((4, 4, 4), 64, "conv", "haar"),
    "tiny": Architecture((2, 2), 16, "conv", "pixels"),
}


class MultiScale(nn.Module):
    """A peer's blocks between squeezes and splits, with the interface of ``flowprox.flows.Flow`` that is timed.

    Arguments:
        blocks: number of channels -> one step of flow.
        encode, decode: apply a block, (block, x) -> (z, logdet).
    """

    def __init__(
        self,
        architecture: Architecture,
        blocks: Callable[[int, int], nn.Module],
        encode: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]],
        decode: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]],
        image_size: int,
    ) -> None:
        super().__init__()
        self.levels = nn.ModuleList()
        channels, size = 3, image_size
        for n in architecture.n_steps:
            channels, size = 4 * channels, size // 2
            self.levels.append(nn.ModuleList(blocks(channels, size) for _ in range(n)))
            channels //= 2
        self._encode, self._decode = encode, decode

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        x, logdet, done = x - 0.5, x.new_zeros(x.shape[0]), []
        for level in self.levels:
            x = F.pixel_unshuffle(x, 2)
            for block in level:  # type: ignore[union-attr]
                x, step = self._encode(block, x)
                logdet = logdet + step
            x, rest = x.chunk(2, dim=1)
            done.append(rest)
        return [*done, x], logdet

    def inverse(self, z: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        *done, x = z
        logdet = x.new_zeros(x.shape[0])
        for level, rest in zip(reversed(self.levels), reversed(done), strict=True):
            x = torch.cat([x, rest], dim=1)
            for block in reversed(level):  # type: ignore[arg-type]
                x, step = self._decode(block, x)
                logdet = logdet + step
            x = F.pixel_shuffle(x, 2)
        return x + 0.5, logdet

    def log_prob(self, x: Tensor) -> Tensor:
        z, logdet = self(x)
        return logdet - 0.5 * sum(part.square().flatten(1).sum(1) for part in z)

    def prox(self, x: Tensor, step: Tensor | float) -> Tensor:
        return self.inverse([part / (1 + step) for part in self(x)[0]])[0]


class Ours(nn.Module):
    """A ``Flow`` with that interface; no determinant where nobody asks for it."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.flow(x)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.flow.inverse(z)

    def log_prob(self, x: Tensor) -> Tensor:
        return self.flow.log_prob(x)

    def prox(self, x: Tensor, step: Tensor | float) -> Tensor:
        return self.flow.decode_image(self.flow.encode_image(x) / (1 + step))


@dataclass(frozen=True)
class Contender:
    """How a contender is made and run."""

    name: str
    make: Callable[[Architecture, int], nn.Module]
    bfloat16: bool = False
    channels_last: bool = False
    is_peer: bool = False
    captured: bool = (
        False  # its kernels are recorded once as a CUDA graph and replayed; tasks without gradients, on a GPU
    )

    @property
    def is_fast(self) -> bool:
        """Whether it is our fast path."""
        return self.name.startswith("fast")

    def precision(self, device_type: str) -> AbstractContextManager[Any]:
        if not self.bfloat16:
            return nullcontext()
        return torch.autocast(device_type, torch.bfloat16, cache_enabled=not self.captured)


def _glow(backward: str) -> Callable[[Architecture, int], nn.Module]:
    def make(a: Architecture, image_size: int) -> nn.Module:
        shape = (3, image_size, image_size)
        flow = Glow(
            shape,
            len(a.n_steps),
            a.n_steps,
            a.hidden_channels,
            coupling=a.coupling,
            squeeze=a.squeeze,
            backward="auto" if backward in ("layers", "compiled") else backward,
        )
        if backward == "compiled":
            compile_regions(flow, dynamic=False)
        return Ours(_layer_by_layer(flow) if backward == "layers" else flow)

    return make


def _layer_by_layer(flow: Glow) -> Glow:
    """The reference: autograd through each layer, nothing kept or batched."""
    for parent in list(flow.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, GlowSteps):
                setattr(parent, name, Sequential(child.layers))  # type: ignore[arg-type]
    return flow


def _normflows(a: Architecture, image_size: int) -> nn.Module:
    import normflows

    def block(channels: int, size: int) -> nn.Module:
        return normflows.flows.GlowBlock(channels, a.hidden_channels, net_actnorm=a.coupling == "conv-actnorm")

    # normflows counts from latent to image
    return MultiScale(a, block, lambda b, x: b.inverse(x), lambda b, z: b(z), image_size)


def _freia(a: Architecture, image_size: int) -> nn.Module:
    from FrEIA.modules import AllInOneBlock

    def net(c_in: int, c_out: int) -> nn.Module:
        return CouplingNet(c_in, c_out, a.hidden_channels)

    def block(channels: int, size: int) -> nn.Module:
        return AllInOneBlock([(channels, size, size)], subnet_constructor=net, permute_soft=True)

    def apply(rev: bool) -> Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]:
        def call(b: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
            (y,), logdet = b((x,), rev=rev)
            return y, logdet

        return call

    return MultiScale(a, block, apply(False), apply(True), image_size)


# without gradients they are the same as "fast"
TRAINING_ONLY = frozenset({"fast-nothing", "fast-nothing, bf16", "fast-early", "fast-early, bf16"})

CONTENDERS = {
    c.name: c
    for c in (
        Contender("plain", _glow("layers")),
        Contender("plain, bf16", _glow("layers"), bfloat16=True, channels_last=True),
        Contender("default", _glow("auto")),  # what is computed when nothing is asked for
        Contender("default, bf16", _glow("auto"), bfloat16=True),
        Contender("compiled", _glow("compiled")),
        Contender("compiled, bf16", _glow("compiled"), bfloat16=True),
        Contender("fast", _glow("fast")),
        Contender("fast, bf16", _glow("fast"), bfloat16=True),
        Contender("fast, graph", _glow("fast"), captured=True),
        Contender("fast, bf16, graph", _glow("fast"), bfloat16=True, captured=True),
        Contender("fast-early", _glow("fast-early")),
        Contender("fast-early, bf16", _glow("fast-early"), bfloat16=True),
        Contender("fast-nothing", _glow("fast-nothing")),
        Contender("fast-nothing, bf16", _glow("fast-nothing"), bfloat16=True),
        Contender("normflows", _normflows, is_peer=True),
        Contender("normflows, bf16", _normflows, bfloat16=True, channels_last=True, is_peer=True),
        Contender("FrEIA", _freia, is_peer=True),
        Contender("FrEIA, bf16", _freia, bfloat16=True, channels_last=True, is_peer=True),
    )
}
