r"""Glow and RealNVP: multi-scale flows of affine couplings.

    Glow, level l:      squeeze -> n_steps[l] x (ActNorm, Conv1x1, AffineCoupling) -> split -> level l+1
    RealNVP, level l:   n x (ActNorm, checkerboard coupling) -> squeeze -> n x (ActNorm, channel coupling, flip)
                        -> split -> level l+1

    checkerboard coupling    z = m x + (1 - m) (exp(s(m x)) x + t(m x))        logdet = sum((1 - m) s)

Symbols: x (B, C, H, W) in, z out, m the mask of black squares (1 where row + column is even, or odd in every other layer),
(s, t) log-scale and shift, |s| <= ``scale_bound``.

Half of a level's channels are final latents, the other half go on to the next, coarser level.

References:
    Kingma and Dhariwal 2018, Glow: generative flow with invertible 1x1 convolutions, https://arxiv.org/abs/1807.03039
    Asim et al. 2020, Invertible generative models for inverse problems, https://arxiv.org/abs/1905.11672
    Dinh, Sohl-Dickstein and Bengio 2017, Density estimation using Real NVP, https://arxiv.org/abs/1605.08803
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flowprox.flows.bijection import Bijection, Sequential
from flowprox.flows.conditioners import CouplingAttention, CouplingNet, CouplingResNet, CouplingUNet
from flowprox.flows.fast import GlowSteps
from flowprox.flows.flow import Flow
from flowprox.flows.layers import ActNorm, AffineCoupling, GlowStep, HaarSqueeze, Split, Squeeze, Unsqueeze
from flowprox.flows.reversible import Reversible
from flowprox.naming import Specified, require_choice, require_count

BACKWARD = (*GlowSteps.MODES, "fast")
FAST_WIDTH = 128
"""Widest coupling nets for which ``backward`` "auto" and "fast" are plain autograd, which trains faster there."""


class Glow(Specified, Flow):
    """Multi-scale Glow with bounded log-scales.

    Arguments:
        image_shape: (C, H, W) it is made for; other sizes work too.
        n_levels: L; H and W must be divisible by 2^L.
        n_steps: steps of flow per level, one number or one per level.
        hidden_channels: width of the coupling nets, one number or one per level.
        coupling: the conditioners (``flowprox.flows.conditioners``), one kind or one per level: "conv" (3x3, 1x1, 3x3),
            "conv-actnorm" (the same with ActNorm after the hidden convolutions, as published), "residual", "attention", for
            coarse levels, or "unet" (its entry of ``hidden_channels`` is a list of widths, finest scale first).
        scale_bound: bound of the log-scales.
        shift_bound: bound of the shifts, None for none; 4 keeps the inverse from blowing up when a flow is trained as a
            prox.
        squeeze: "pixels" or "haar" (orthonormal averages and details).
        backward: how passes are recorded for the backward pass; those without gradients in ``eval()`` are fast in any case (see
            ``GlowSteps``). "auto", the default, is the fastest: "plain" for nets up to ``FAST_WIDTH`` and on accelerators,
            "fast-early" for wider ones on the CPU. "plain" is autograd, the reference; "inputs" keeps each step's input and
            recomputes the coupling nets; "invert" keeps only a level's output (memory flat in depth). "fast-nothing",
            "fast-early", "fast-inputs" and "fast-invert" take the fast path and recompute what follows the dash; "fast" is
            "fast-inputs" for nets wider than ``FAST_WIDTH`` and "plain" below. The fast path is for coupling "conv" and
            "conv-actnorm"; only "plain" and "inputs" have second derivatives.

    Raises:
        ValueError: lists whose length is not n_levels, an image size not divisible by 2^L, an unknown option.

    Example:
        >>> sum(p.numel() for p in Glow.paper().parameters())
        25771456
    """

    def __init__(
        self,
        image_shape: Sequence[int] = (3, 64, 64),
        n_levels: int = 3,
        n_steps: int | Sequence[int] = 6,
        hidden_channels: int | Sequence[int | Sequence[int]] = 64,
        coupling: str | Sequence[str] = "conv",
        scale_bound: float = 0.5,
        shift_bound: float | None = None,
        squeeze: str = "pixels",
        backward: str = "auto",
    ) -> None:
        steps = _per_level(n_steps, n_levels, "n_steps")
        widths = _per_level(hidden_channels, n_levels, "hidden_channels")
        couplings = _per_level(coupling, n_levels, "coupling")
        for kind in couplings:
            require_choice("coupling", kind, ("conv", "conv-actnorm", "residual", "attention", "unet"))
        require_choice("squeeze", squeeze, ("pixels", "haar"))
        require_choice("backward", backward, BACKWARD)

        def level(index: int, channels: int) -> Bijection:
            channels = 4 * channels
            flow_steps = [
                GlowStep(channels, _coupling_net(couplings[index], channels, widths[index]), scale_bound, shift_bound)
                for _ in range(steps[index])
            ]
            body = GlowSteps(flow_steps, _recompute(backward, couplings[index], widths[index]))
            layers: list[Bijection] = [HaarSqueeze() if squeeze == "haar" else Squeeze(), body]
            if index + 1 < n_levels:
                layers.append(Split(level(index + 1, channels // 2)))
            return Sequential([*layers, Unsqueeze()])

        channels, height, width = image_shape
        Flow.__init__(self, level(0, channels), (channels, height, width), n_levels)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # the layout of the nets' convolutions

    @classmethod
    def paper(cls, image_shape: Sequence[int] = (3, 64, 64), backward: str = "auto") -> Glow:
        """The Glow of Asim et al. and Wei et al.: 18 steps in three levels and one in the fourth, width 512, 25,771,456
        parameters for 3 channels; the log-scale is bounded where theirs is a sigmoid."""
        return cls(image_shape, 4, [18, 18, 18, 1], 512, coupling="conv-actnorm", backward=backward)

    @classmethod
    def compact(cls, image_shape: Sequence[int] = (3, 64, 64), backward: str = "auto") -> Glow:
        """The small preset for laptops: three levels of four steps, width 64."""
        return cls(image_shape, 3, 4, 64, squeeze="haar", backward=backward)


def _recompute(backward: str, coupling: str, width: int | Sequence[int]) -> str:
    """The mode of a level."""
    is_wide = coupling.startswith("conv") and isinstance(width, int) and width > FAST_WIDTH
    if backward == "auto":
        return "auto" if is_wide else "plain"
    if backward == "fast":
        return "fast-inputs" if is_wide else "plain"
    return backward


def _coupling_net(kind: str, channels: int, width: int | Sequence[int]) -> nn.Module:
    passes, transformed = channels - channels // 2, channels // 2
    if kind == "unet":
        return CouplingUNet(passes, 2 * transformed, [width] if isinstance(width, int) else width)
    if not isinstance(width, int):
        raise ValueError(f"hidden_channels must hold one width per level for coupling {kind!r}, got {width}")
    if kind in ("residual", "attention"):
        return {"residual": CouplingResNet, "attention": CouplingAttention}[kind](passes, 2 * transformed, width)
    return CouplingNet(passes, 2 * transformed, width, actnorm=kind == "conv-actnorm")


def _per_level(value, n_levels: int, name: str) -> list:
    values = [value] * n_levels if isinstance(value, int | str) else list(value)
    if n_levels < 1 or len(values) != n_levels:
        raise ValueError(f"{name} has {len(values)} entries for n_levels={n_levels}; give one, or one per level")
    least = 0 if name == "n_steps" else 1  # a level without steps is one of the family's variants
    if any(isinstance(entry, int) and entry < least for entry in values):
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return values


# RealNVP --------------------------------------------------------------------------------------------------------------


class CheckerboardCoupling(AffineCoupling):
    """Affine coupling that transforms the white squares of a checkerboard from the black (Dinh et al. 2017, Sec. 3.4).

    Arguments:
        net: maps the masked image (B, C, H, W) to (s, t) stacked, (B, 2C, H, W).
        parity: 0 if the top left pixel is passed through, 1 if it is transformed.
        scale_bound: bound of the log-scale.
    """

    def __init__(self, net: nn.Module, parity: int = 0, scale_bound: float = 0.5) -> None:
        super().__init__(net, scale_bound)
        self.parity = parity % 2

    def _mapped(self, x: Tensor, backwards: bool = False) -> tuple[Tensor, Tensor]:
        rows, columns = (torch.arange(n, device=x.device) for n in x.shape[-2:])
        black = (rows[:, None] + columns) % 2 == self.parity  # what passes, (H, W)
        log_scale, shift = self.scale_and_shift(x * black)
        log_scale = log_scale * ~black
        return torch.where(black, x, self._moved(x, log_scale, shift, backwards)), log_scale


class ChannelFlip(Bijection):
    """The channels in reverse order, so that the next channel-wise coupling transforms the other half."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.flip(1), x.new_zeros(x.shape[0])

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.forward(z)


class RealNVP(Specified, Flow):
    """Multi-scale RealNVP with bounded log-scales.

    Where Dinh et al. put batch normalization there is ActNorm, lest the map of one image depend on the others of its batch.

    Arguments:
        image_shape: (C, H, W) it is made for; other sizes work too.
        n_levels: L; H and W must be divisible by 2^L.
        n_couplings: checkerboard couplings before, and channel-wise couplings after the squeeze of each level.
        hidden_channels: width of the residual nets, one number or one per level.
        n_blocks: residual blocks of each net.
        scale_bound: bound of the log-scales.
        backward: "plain", "inputs" or "invert", as in ``Glow``.

    Raises:
        ValueError: a list whose length is not n_levels, an image size not divisible by 2^L, an unknown option, fewer
            than two couplings (half of the pixels would never be transformed).

    Example:
        >>> flow = RealNVP((3, 8, 8), n_levels=2, n_couplings=2, hidden_channels=8, n_blocks=1)
        >>> x = torch.rand(4, 3, 8, 8)
        >>> bool((flow.decode(flow.encode(x)) - x).abs().max() < 1e-5)
        True
    """

    def __init__(
        self,
        image_shape: Sequence[int] = (3, 64, 64),
        n_levels: int = 3,
        n_couplings: int = 3,
        hidden_channels: int | Sequence[int] = 32,
        n_blocks: int = 2,
        scale_bound: float = 0.5,
        backward: str = "plain",
    ) -> None:
        widths = _per_level(hidden_channels, n_levels, "hidden_channels")
        require_choice("backward", backward, ("plain", "inputs", "invert"))
        if n_couplings < 2:
            raise ValueError(
                f"n_couplings must be at least 2, for each leaves half of the image alone; got {n_couplings}"
            )
        require_count("n_blocks", n_blocks, least=0)

        def checkerboard_step(channels: int, width: int, parity: int) -> Bijection:
            net = CouplingResNet(channels, 2 * channels, width, n_blocks, normalize=True)
            return Sequential([ActNorm(channels), CheckerboardCoupling(net, parity, scale_bound)])

        def channel_step(channels: int, width: int) -> Bijection:
            net = CouplingResNet(channels - channels // 2, 2 * (channels // 2), width, n_blocks, normalize=True)
            return Sequential([ActNorm(channels), AffineCoupling(net, scale_bound), ChannelFlip()])

        def chain(steps: list[Bijection]) -> Bijection:
            return Sequential(steps) if backward == "plain" else Reversible(steps, recompute=backward)

        def level(index: int, channels: int) -> Bijection:
            fine = chain([checkerboard_step(channels, widths[index], i) for i in range(n_couplings)])
            coarse = chain([channel_step(4 * channels, widths[index]) for _ in range(n_couplings)])
            layers = [fine, Squeeze(), coarse]
            if index + 1 < n_levels:
                layers.append(Split(level(index + 1, 2 * channels)))
            return Sequential([*layers, Unsqueeze()])

        channels, height, width = image_shape
        Flow.__init__(self, level(0, channels), (channels, height, width), n_levels)
