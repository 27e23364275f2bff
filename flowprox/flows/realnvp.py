r"""RealNVP: a multi-scale flow of affine couplings with checkerboard and channel-wise masks.

    level l:   n x (ActNorm, checkerboard coupling) -> squeeze -> n x (ActNorm, channel coupling, flip)
               -> split -> level l+1

    checkerboard coupling    z = m x + (1 - m) (exp(s(m x)) x + t(m x))        logdet = sum((1 - m) s)

Symbols: x (B, C, H, W) in, z out, m the mask of black squares (1 where row + column is even, or odd in every other
layer), (s, t) log-scale and shift by a residual net, |s| <= ``scale_bound``. Half of a level's channels are final
latents, the other half go on to the next, coarser level.

References:
    Dinh, Sohl-Dickstein and Bengio 2017, Density estimation using Real NVP, https://arxiv.org/abs/1605.08803
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flowprox.flows.bijection import Bijection, Sequential
from flowprox.flows.conditioners import CouplingResNet
from flowprox.flows.flow import Flow
from flowprox.flows.glow import _check_choice, _per_level
from flowprox.flows.layers import ActNorm, AffineCoupling, Split, Squeeze, Unsqueeze
from flowprox.flows.reversible import Reversible
from flowprox.naming import Specified


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

    def _map(self, x: Tensor) -> tuple[Tensor, Tensor]:
        black, log_scale, shift = self._masked(x)
        return torch.where(black, x, x * torch.exp(log_scale) + shift), log_scale

    def _unmap(self, z: Tensor) -> tuple[Tensor, Tensor]:
        black, log_scale, shift = self._masked(z)
        return torch.where(black, z, (z - shift) * torch.exp(-log_scale)), log_scale

    def _masked(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(mask of what passes (H, W), s with zeros there, t) from the squares that pass."""
        rows, columns = (torch.arange(n, device=x.device) for n in x.shape[-2:])
        black = (rows[:, None] + columns) % 2 == self.parity
        log_scale, shift = self.scale_and_shift(x * black)
        return black, log_scale * ~black, shift


class ChannelFlip(Bijection):
    """The channels in reverse order, so that the next channel-wise coupling transforms the other half."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.flip(1), x.new_zeros(x.shape[0])

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.forward(z)


class RealNVP(Specified, Flow):
    """Multi-scale RealNVP with bounded log-scales.

    Where Dinh et al. put batch normalization there is ActNorm: with batch statistics the map of one image would depend
    on the others of its batch, and a fold of an unfolded network sees other images than the likelihood does.

    References:
        Dinh et al. 2017, Density estimation using Real NVP, https://arxiv.org/abs/1605.08803

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
        _check_choice("backward", backward, ("plain", "inputs", "invert"))
        if n_couplings < 2:
            raise ValueError(
                f"n_couplings must be at least 2, for each leaves half of the image alone; got {n_couplings}"
            )
        if n_blocks < 0:
            raise ValueError(f"n_blocks must be at least 0, got {n_blocks}")

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
