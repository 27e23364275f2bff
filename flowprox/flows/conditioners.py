"""Conditioners: the nets inside coupling layers, from the half that passes to (log-scale, shift) of the other half.

    conv       3x3, 1x1, 3x3                                     Glow's, the only one on the fast path
    residual   3x3, blocks of two 3x3 around a skip, 3x3         stronger per step
    attention  3x3, self-attention over all pixels, 1x1, 3x3     sees the whole image; for coarse levels
    unet       a small U-Net                                     sees the whole image; any level

All are zero at the start, so that a coupling layer starts as the identity. Shapes: x (B, C_in, H, W) to (B, C_out, H, W), any H
and W.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils.parametrizations import weight_norm

from flowprox.flows.layers import ActNorm, on_cpu
from flowprox.naming import Values

__all__ = ["CouplingAttention", "CouplingNet", "CouplingResNet", "CouplingUNet", "ZeroConv2d"]


class ZeroConv2d(nn.Conv2d):
    """Convolution that starts at zero, so that a coupling layer starts as the identity (Kingma and Dhariwal 2018).

    Arguments:
        in_channels, out_channels, kernel_size: as in ``torch.nn.Conv2d``; padding keeps the size.
        learn_scale: multiply the output by exp(3 * scale) with a learned scale per channel, as Glow does.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, learn_scale: bool = False) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)  # type: ignore[arg-type]
        self.log_scale = nn.Parameter(torch.zeros(out_channels)) if learn_scale else None

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out if self.log_scale is None else out * torch.exp(3 * self.log_scale).view(1, -1, 1, 1)


class CouplingNet(nn.Module):
    """Conditioner of an affine coupling layer: a stack of convolutions with ReLU, the last one zero at the start.

    Arguments:
        in_channels, out_channels: channels of the conditioning half, and of (log-scale, shift) together.
        hidden_channels: width.
        kernel_sizes: one per convolution; (3, 1, 3) is Glow's.
        actnorm: a learned scale and shift, initialized from data, after each hidden convolution, and a learned output scale
            (the form of Kingma and Dhariwal 2018, which GlowIP uses too).

    Example:
        >>> CouplingNet(6, 12, 32)(torch.rand(2, 6, 8, 8)).abs().max().item()
        0.0
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        hidden_channels: int,
        kernel_sizes: Sequence[int] = (3, 1, 3),
        actnorm: bool = False,
    ) -> None:
        super().__init__()
        widths = [in_channels] + [hidden_channels] * (len(kernel_sizes) - 1)
        self.hidden = nn.ModuleList(
            nn.Conv2d(c_in, hidden_channels, size, padding=size // 2)
            for c_in, size in zip(widths, kernel_sizes[:-1], strict=False)
        )
        self.norms = nn.ModuleList(ActNorm(hidden_channels) for _ in self.hidden) if actnorm else None
        self.last = ZeroConv2d(widths[-1], out_channels, kernel_sizes[-1], learn_scale=actnorm)

    def forward(self, x: Tensor) -> Tensor:
        return convolved(x, [folded(layer, rate) for layer, rate in zip(self.parts(), self.rates, strict=True)])

    @property
    def rates(self) -> list[float]:
        """Factor of the log-scale in the exponent, per convolution (see ``ZeroConv2d``)."""
        return [1.0] * len(self.hidden) + [3.0]

    def parts(self) -> list[list[Tensor]]:
        """Per convolution: weight, bias, then log-scale and shift of what follows it, where there are such."""
        layers = [[c.weight, c.bias] for c in self.hidden]
        if self.norms is not None:
            layers = [[*layer, norm.log_scale, norm.bias] for layer, norm in zip(layers, self.norms, strict=True)]
        scale = [] if self.last.log_scale is None else [self.last.log_scale]
        return [*layers, [self.last.weight, self.last.bias, *scale]]  # type: ignore[list-item]

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Data-dependent initialization of the inner scales from the conditioning half x (B, C, H, W)."""
        for i, convolution in enumerate(self.hidden):
            x = convolution(x)
            if self.norms is not None:
                self.norms[i].initialize(x)  # type: ignore[operator]
                x = self.norms[i].scaled(x)  # type: ignore[operator]
            x = F.relu(x)


def folded(layer: Sequence[Tensor], rate: float) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution with the scale and shift after it: a few weights are multiplied, no activations."""
    weight, bias, *affine = layer
    if affine:
        scale = torch.exp(rate * affine[0])
        weight, bias = weight * scale[..., None, None, None], bias * scale
    if len(affine) > 1:
        bias = bias + affine[1]
    return weight, bias


def convolved(x: Tensor, layers: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor:
    """The convolutions of a ``CouplingNet`` and relu between them.

    Where the first weight has more channels than x, these see ones.
    """
    n_missing = layers[0][0].shape[1] - x.shape[1]
    x = F.pad(x, (0, 0, 0, 0, 0, n_missing), value=1.0) if n_missing else x
    *hidden, last = layers
    for weight, bias in hidden:
        x = _convolved(x, weight, bias, relu=True)
    return _convolved(x, *last)


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool = False) -> Tensor:
    """On accelerators 1x1 kernels in low precision are a product of matrices, with bias and relu in passing."""
    if weight.shape[-1] == 1 and not on_cpu(x) and x.dtype in (torch.bfloat16, torch.float16):
        pixels, matrix = x.permute(0, 2, 3, 1), weight.flatten(1)
        if (
            relu and bias is not None and not torch.compiler.is_compiling()
        ):  # where it is compiled the compiler fuses them
            y = LinearReLU.apply(pixels.flatten(0, 2), matrix, bias).view(*pixels.shape[:3], -1)  # type: ignore[attr-defined]
        else:
            y = F.linear(pixels, matrix, bias)
            y = F.relu(y) if relu else y  # y is a view, in place costs autograd a copy
        return y.permute(0, 3, 1, 2)
    y = F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)
    return y.relu_() if relu else y


class LinearReLU(torch.autograd.Function):
    """relu(x W^T + b) for x (N, I), W (O, I), b (O,) as one kernel, of which autograd makes two; twice differentiable.

    Example:
        >>> x, w, b = torch.randn(5, 3), torch.randn(4, 3), torch.randn(4)
        >>> torch.allclose(LinearReLU.apply(x, w, b), F.relu(F.linear(x, w, b)), atol=1e-6)
        True
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.ops.aten._addmm_activation(bias, x, weight.T)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Keep what the backward pass needs."""
        ctx.save_for_backward(*inputs[:2], output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, y = ctx.saved_tensors
        grad, needs = torch.ops.aten.threshold_backward(grad, y, 0), ctx.needs_input_grad
        return grad @ weight if needs[0] else None, grad.T @ x if needs[1] else None, grad.sum(0) if needs[2] else None


_ALIGNED = 8  # channels; products of matrices in low precision want multiples


def folded_together(nets: Sequence[CouplingNet], dtype: torch.dtype) -> list[list[Tensor]]:
    """The folded convolutions of every net in ``dtype``, computed at once: a few kernels in the place of many.

    The nets are alike in their shapes. Weights come out channels-last. The first bias is the weight of one more channel, which
    sees ones (see ``convolved``): added by a kernel of its own it would cost as much memory traffic as the convolution.

    Returns:
        for every net the first weight, then weight and bias of every other convolution.
    """
    together: list[Sequence[Tensor]] = []
    for layers, rate in zip(zip(*(net.parts() for net in nets), strict=True), nets[0].rates, strict=True):
        weights, *others = zip(*layers, strict=True)
        weight = torch.stack([w.permute(0, 2, 3, 1) for w in weights]).permute(0, 1, 4, 2, 3)
        weight, bias = folded([weight, *map(torch.stack, others)], rate)
        if together:
            together += [weight.to(dtype).unbind(), bias.to(dtype).unbind()]
        else:
            n_more, border = _ALIGNED - weight.shape[2] % _ALIGNED, [weight.shape[-1] // 2] * 4
            at_center = F.pad(bias[:, :, None, None, None], (*border, 0, n_more - 1)).permute(0, 1, 3, 4, 2)
            weight = torch.cat([weight.permute(0, 1, 3, 4, 2), at_center], dim=-1).permute(0, 1, 4, 2, 3)
            together.append(weight.to(dtype).unbind())
    return [list(tensors) for tensors in zip(*together, strict=True)]


class CouplingResNet(nn.Module):
    """Conditioner of residual blocks: 3x3, then x + 3x3(relu(3x3(relu(x)))) n_blocks times, relu, and a last convolution.

    References:
        Dinh et al. 2017, Density estimation using Real NVP, https://arxiv.org/abs/1605.08803, Sec. 3.7 (residual conditioners)

    Arguments:
        in_channels, out_channels: channels of the conditioning input, and of (log-scale, shift) together.
        hidden_channels: width.
        n_blocks: residual blocks.
        normalize: RealNVP's form: weight normalization, and a last convolution of 1x1 with a learned scale.
    """

    def __init__(
        self, in_channels: int, out_channels: int, hidden_channels: int, n_blocks: int = 1, normalize: bool = False
    ) -> None:
        super().__init__()

        def convolution(n_channels: int) -> nn.Module:
            made = nn.Conv2d(n_channels, hidden_channels, 3, padding=1)
            return weight_norm(made) if normalize else made

        self.first = convolution(in_channels)
        self.blocks = nn.ModuleList(
            nn.ModuleList(convolution(hidden_channels) for _ in range(2)) for _ in range(n_blocks)
        )
        self.last = ZeroConv2d(hidden_channels, out_channels, 1 if normalize else 3, learn_scale=normalize)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for first, second in self.blocks:  # type: ignore[misc]
            h = h + second(F.relu(first(F.relu(h))))
        return self.last(F.relu(h))


class CouplingAttention(nn.Module):
    """Conditioner that sees the whole image: 3x3, x + attention(x), relu, 1x1, relu, 3x3.

    Its cost grows with the square of the number of pixels, so it is meant for coarse levels (8x8 of a 64x64 image).

    References:
        Vaswani et al. 2017, Attention is all you need, https://arxiv.org/abs/1706.03762, Eq. (1)
        Ho et al. 2019, Flow++, https://arxiv.org/abs/1902.00275, Sec. 3.2.2 (self-attention in conditioners)

    Arguments:
        in_channels, out_channels: channels of the conditioning half, and of (log-scale, shift) together.
        hidden_channels: width, a multiple of n_heads.
        n_heads: attention heads.
    """

    def __init__(self, in_channels: int, out_channels: int, hidden_channels: int, n_heads: int = 4) -> None:
        super().__init__()
        if hidden_channels % n_heads:
            raise ValueError(f"hidden_channels must be a multiple of {n_heads} for attention, got {hidden_channels}")
        self.n_heads = n_heads
        self.first = nn.Conv2d(in_channels, hidden_channels, 3, padding=1)
        self.norm = nn.GroupNorm(1, hidden_channels)
        self.projections = nn.Conv2d(hidden_channels, 3 * hidden_channels, 1)
        self.mix = ZeroConv2d(hidden_channels, hidden_channels, 1)
        self.hidden = nn.Conv2d(hidden_channels, hidden_channels, 1)
        self.last = ZeroConv2d(hidden_channels, out_channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = h + self.mix(self._attention(self.norm(h)))
        return self.last(F.relu(self.hidden(F.relu(h))))

    def _attention(self, h: Tensor) -> Tensor:
        n, n_channels, height, width = h.shape
        of_head = n_channels // self.n_heads
        projected = self.projections(h).reshape(n, 3, self.n_heads, of_head, height * width)
        query, key, value = projected.transpose(-1, -2).unbind(1)  # (B, heads, pixels, channels of a head)
        seen = F.scaled_dot_product_attention(query, key, value)
        return seen.transpose(-1, -2).reshape(n, n_channels, height, width)


class CouplingUNet(nn.Module):
    """Conditioner with a wide view: a small U-Net whose every scale is one residual 3x3 block.

    Arguments:
        in_channels, out_channels: channels of the conditioning half, and of (log-scale, shift) together.
        hidden_channels: one width per scale, finest first.
    """

    def __init__(self, in_channels: int, out_channels: int, hidden_channels: Sequence[int]) -> None:
        super().__init__()
        widths = list(hidden_channels)
        self.first = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in pairwise(widths))
        self.blocks = nn.ModuleList(nn.Conv2d(w, w, 3, padding=1) for w in widths[1:])
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in pairwise(widths))
        self.last = ZeroConv2d(widths[0], out_channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        skips = []
        for down, block in zip(self.down, self.blocks, strict=True):
            skips.append(x)
            height, width = x.shape[-2:]
            x = F.relu(down(F.pad(x, (0, width % 2, 0, height % 2), mode="replicate")))
            x = x + F.relu(block(x))
        for up, skip in zip(reversed(self.up), reversed(skips), strict=True):
            x = F.relu(up(x)[..., : skip.shape[-2], : skip.shape[-1]] + skip)
        return self.last(x)


# Fixed weights --------------------------------------------------------------------------------------------------------

_DTYPES = (torch.float32, torch.bfloat16)


class PackedConvolution:
    """x -> V x + v with constant weights, same size, stride 1; no gradients.

    oneDNN's blocks are laid out once; ``torch.nn.functional.conv2d`` lays weights out in every call, which takes up to two
    thirds of the time at coarse levels. The best blocks depend on the shape of x: those for two shapes are kept, a whole
    batch and the rest of one. Where a derivative is asked for, ``conv2d`` computes; both give the same bits. The operators
    are those that ``torch.compile`` uses, without a public name: where they are missing nothing is packed.

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
        is_differentiated = (torch.is_grad_enabled() and x.requires_grad) or forward_ad.unpack_dual(
            x
        ).tangent is not None
        if torch.compiler.is_compiling() or not (self._packs and len(x)) or is_differentiated:
            y = F.conv2d(x, self.weight, self.bias, padding=self.padding)
            return y.relu_() if relu else y
        blocks = self._blocks.get(x.shape)
        if blocks is None:
            places = [self.padding, [1, 1], [1, 1], 1, list(x.shape)]
            blocks = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *places)
            self._blocks = {**dict(list(self._blocks.items())[-1:]), x.shape: blocks}
        after = "relu" if relu else "none"
        return torch.ops.mkldnn._convolution_pointwise(
            x, blocks, self.bias, self.padding, [1, 1], [1, 1], 1, after, [], ""
        )

    def __getstate__(self) -> Values:
        """Without the blocks, which are opaque: a copy packs again."""
        return {**self.__dict__, "_blocks": {}}


def _can_pack(weight: Tensor) -> bool:
    has_bfloat16 = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    return (
        weight.device.type == "cpu"
        and weight.dtype in _DTYPES
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled  # type: ignore[attr-defined]
        and all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_convolution_weight", "_convolution_pointwise"))
        and (weight.dtype == torch.float32 or bool(has_bfloat16()))
    )
