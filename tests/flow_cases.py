"""Pairs of flows with the same weights, one plain and one with another backward pass, and losses that reach all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from flowprox.flows import Bijection, Flow, Glow, GlowSteps, RealNVP, Reversible, Sequential
from flowprox.graphs import HostReads

MODES = ("inputs", "invert")
FAST_MODES = ("fast-nothing", "fast-early", "fast-inputs", "fast-invert")
every_mode = pytest.mark.parametrize("mode", (*MODES, *FAST_MODES))


def chain(steps: Sequence[Bijection], mode: str, **options: int) -> Sequential:
    """The container that a mode stands for."""
    if mode == "plain":
        return Sequential(steps)
    if mode in FAST_MODES:
        return GlowSteps(steps, mode, **options)
    return Reversible(steps, mode, **options)


def log_prob_loss(flow: Flow, x: Tensor) -> Tensor:
    return -flow.log_prob(x).mean()


def decode_loss(flow: Flow, x: Tensor) -> Tensor:
    z = x.flatten(1)
    return (flow.decode(3 * z) - 0.5).square().mean()


def prox_loss(flow: Flow, x: Tensor) -> Tensor:
    return (flow.decode_image(flow.encode_image(x) / 1.1) - 0.5).square().mean()


def inverse_loss(flow: Flow, x: Tensor) -> Tensor:
    image, logdet = flow.inverse(x.flatten(1))
    return image.square().sum() + logdet.sum()


def logdet_loss(flow: Flow, x: Tensor) -> Tensor:
    return flow(x)[1].mean()


LOSSES = {f.__name__: f for f in (log_prob_loss, decode_loss, prox_loss, inverse_loss, logdet_loss)}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def pair(mode: str, kind: type = Glow, dtype: torch.dtype = torch.float64) -> tuple[Flow, Flow, Tensor]:
    """A plain flow, a reversible one with the same weights, and images."""
    if kind is Glow:
        plain, reversible = (Glow((3, 8, 8), 2, 3, 8, backward=b) for b in ("plain", mode))
    else:
        plain, reversible = (RealNVP((3, 8, 8), 2, 2, 8, 1, backward=b) for b in ("plain", mode))
    plain, x = plain.to(dtype), torch.rand(4, 3, 8, 8, dtype=dtype)
    plain.initialize(x)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    reversible.to(dtype).load_state_dict(plain.state_dict())
    return plain, reversible, x


def gradients(flow: Flow, loss: Callable[[Flow, Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """d loss / d (x, parameters) by torch.autograd.grad."""
    x = x.clone().requires_grad_()
    return list(torch.autograd.grad(loss(flow, x), [x, *flow.parameters()], allow_unused=True, materialize_grads=True))


class NoHostReads(HostReads):
    """Refuses what makes the host wait for an accelerator."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if self.names:
            raise AssertionError(f"the host would wait for {func}")
        return out
