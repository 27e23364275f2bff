r"""Scale and shift per pixel, for images whose statistics depend on the place.

    z = exp(s) * x + b,    s, b of shape (C, H, W)        logdet = sum(s)

The other layers of a flow treat all places alike: ActNorm has one scale per channel, and a coupling net sees a place only
through its distance from the border. Noise whose level changes from row to row needs this layer at its end of the flow.
The price is that the flow then belongs to one image size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flowprox.flows.bijection import Bijection, Sequential
from flowprox.flows.flow import Flow
from flowprox.naming import Specified

__all__ = ["PixelNorm", "PixelwiseFlow"]


class PixelNorm(Bijection):
    """Scale and shift per pixel, initialized so that the first training batch has mean 0 and variance 1 in each.

    Arguments:
        image_shape: (C, H, W); no other size is taken.

    Example:
        >>> layer = PixelNorm((1, 2, 2))
        >>> z, logdet = layer(torch.randn(1000, 1, 2, 2) * torch.tensor([[1.0], [9.0]]))
        >>> z.detach().std(dim=0).round(decimals=2).flatten()
        tensor([1., 1., 1., 1.])
    """

    initialized: Tensor

    def __init__(self, image_shape: Sequence[int]) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(*image_shape))
        self.bias = nn.Parameter(torch.zeros(*image_shape))
        self.register_buffer("initialized", torch.tensor(False))
        self._initialization_pending = True

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Set scale and shift from x (B, C, H, W); of one image only the shift."""
        std, mean = torch.std_mean(x.float(), dim=0, correction=0)
        self.log_scale.copy_(torch.where(std > 0, -torch.log(std + 1e-6), 0.0))
        self.bias.copy_(-mean * torch.exp(self.log_scale))
        self.initialized.fill_(True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """z and log|det|.

        Raises:
            ValueError: x is not of the size the layer was made for.
        """
        self._check(x)
        if self._initialization_pending and self.training:
            if not bool(self.initialized):
                self.initialize(x)
            self._initialization_pending = False
        return x * torch.exp(self.log_scale) + self.bias, self.log_scale.sum().expand(len(x))

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """x and log|det|; errors as in ``forward``."""
        self._check(z)
        return (z - self.bias) * torch.exp(-self.log_scale), -self.log_scale.sum().expand(len(z))

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._initialization_pending = True

    def _check(self, x: Tensor) -> None:
        if x.shape[1:] != self.log_scale.shape:
            raise ValueError(
                f"the flow has a scale for each pixel of images of shape {tuple(self.log_scale.shape)} and takes no other "
                f"size, got {tuple(x.shape[1:])}; train one for that size"
            )


class PixelwiseFlow(Specified, Flow):
    """Any flow behind a scale and shift per pixel.

    Arguments:
        flow: the flow that sees images whose pixels all have mean 0 and variance 1.
        image_shape: (C, H, W); by default that of the flow.

    Raises:
        ValueError: image_shape is not the flow's.

    Example:
        >>> from flowprox.flows import Glow
        >>> flow = PixelwiseFlow(Glow((1, 8, 8), n_levels=1, n_steps=1, hidden_channels=8))
        >>> x = torch.rand(2, 1, 8, 8)
        >>> bool((flow.decode(flow.encode(x)) - x).abs().max() < 1e-5)
        True
    """

    def __init__(self, flow: Flow, image_shape: Sequence[int] | None = None) -> None:
        if image_shape is not None and tuple(image_shape) != flow.image_shape:
            raise ValueError(
                f"image_shape is {tuple(image_shape)} but the flow's is {flow.image_shape}; give both alike"
            )
        Flow.__init__(
            self, Sequential([PixelNorm(flow.image_shape), flow.bijection]), flow.image_shape, flow.n_levels, offset=0.0
        )
