"""Convolutions whose weights are fixed, on the CPU: laid out once in the blocks that oneDNN computes in, relu in the same pass.

``torch.nn.functional.conv2d`` lays weights out anew in every call, which takes up to two thirds of the time where they outweigh
the images: at coarse levels and for single images. Both give the same bits wherever oneDNN computes both.

The operators are those that ``torch.compile`` puts in the place of frozen convolutions. They have no public name; where they
are missing nothing is packed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

_DTYPES = (torch.float32, torch.bfloat16)


class PackedConvolution:
    """x -> V x + v with constant weights, same size, stride 1; no gradients.

    The best blocks depend on the shape of x, and others are slower by an order of magnitude: those for two shapes are kept, a
    whole batch and the rest of one. Where a derivative is asked for, by reverse or forward mode, ``conv2d`` computes.

    Arguments:
        weight: V (O, I, h, w) with odd h = w.
        bias: v (O,).

    Example:
        >>> weight, bias, x = torch.randn(4, 3, 3, 3), torch.randn(4), torch.randn(2, 3, 8, 8)
        >>> y = PackedConvolution(weight, bias)(x, relu=True)
        >>> torch.allclose(y, F.relu(F.conv2d(x, weight, bias, padding=1)), atol=1e-5)
        True
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight, self.bias = weight.detach(), bias.detach()
        self.padding = [weight.shape[-1] // 2] * 2
        self._packs = _can_pack(weight)
        self._blocks: dict[torch.Size, Tensor] = {}  # replaced, never changed: several threads may reconstruct at once

    def __call__(self, x: Tensor, relu: bool = False) -> Tensor:
        """(B, O, H, W) from x (B, I, H, W)."""
        if torch.compiler.is_compiling() or not (self._packs and len(x)) or _is_differentiated(x):
            y = F.conv2d(x, self.weight, self.bias, padding=self.padding)
            return y.relu_() if relu else y
        blocks = self._blocks.get(x.shape)
        if blocks is None:
            blocks = _packed(self.weight, self.padding, x.shape)
            self._blocks = {**dict(list(self._blocks.items())[-1:]), x.shape: blocks}
        after = "relu" if relu else "none"
        return torch.ops.mkldnn._convolution_pointwise(
            x, blocks, self.bias, self.padding, [1, 1], [1, 1], 1, after, [], ""
        )

    def __getstate__(self) -> dict[str, Any]:
        """Without the blocks, which are opaque: a copy packs again."""
        return {**self.__dict__, "_blocks": {}}


def _is_differentiated(x: Tensor) -> bool:
    return (torch.is_grad_enabled() and x.requires_grad) or forward_ad.unpack_dual(x).tangent is not None


def _can_pack(weight: Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype in _DTYPES
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled  # type: ignore[attr-defined]
        and all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_convolution_weight", "_convolution_pointwise"))
        and (weight.dtype == torch.float32 or _has_bfloat16())
    )


def _has_bfloat16() -> bool:
    found = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return found is not None and bool(found())


def _packed(weight: Tensor, padding: list[int], shape: torch.Size) -> Tensor:
    """An opaque tensor: V laid out for x of that shape."""
    return torch.ops.mkldnn._reorder_convolution_weight(weight, padding, [1, 1], [1, 1], 1, list(shape))
