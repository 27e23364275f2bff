r"""A trained flow as the density of a noise.

    n = scale * f^-1(z),  z ~ N(0, I)        log p(n) = log p_flow(n / scale) - D log(scale)

n noise (B, C, H, W) of D = C H W entries, f the flow, which was trained on noise images as they are: what it subtracts
from its input is taken up by its first learned layer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from flowprox.naming import Specified, require_positive
from flowprox.noise.base import Generators, Noise, standard_normal


class FlowNoise(Specified, Noise):
    """Noise with the density of a flow that was trained on noise images.

    ``flowprox train-flow`` with a recipe that has ``noise`` writes one; ``flowprox.load_model`` reads it.

    References:
        Whang et al. 2021, Solving inverse problems with a flow-based noise model, https://arxiv.org/abs/2003.08089, Sec. 3

    Arguments:
        flow: anything with ``log_prob(x)``, ``decode(z, image_size)`` and ``image_shape``, such as ``flowprox.Glow``.
        scale: the noise is so many times what the flow was trained on.

    Raises:
        ValueError: scale is not positive and finite.

    Example:
        >>> from flowprox.flows import Glow
        >>> noise = FlowNoise(Glow((3, 8, 8), n_levels=1, n_steps=1, hidden_channels=8))
        >>> noise.log_prob(torch.zeros(2, 3, 8, 8)).shape, noise.sample_like(torch.zeros(2, 3, 8, 8)).shape
        (torch.Size([2]), torch.Size([2, 3, 8, 8]))
    """

    value_range = None  # of a card: noise is not bound to [0, 1]

    def __init__(self, flow: nn.Module, scale: float = 1.0) -> None:
        super().__init__()
        require_positive("scale", scale)
        self.flow = flow
        self.scale = float(scale)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the noise that the flow was made for."""
        return tuple(self.flow.image_shape)  # type: ignore[return-value, arg-type]

    @property
    def divisor(self) -> int:
        """Height and width must be multiples of this."""
        return int(getattr(self.flow, "divisor", 1))

    def scaled(self, factor: float) -> FlowNoise:
        """The same flow as the density of noise that is ``factor`` times as large; the weights are shared."""
        return FlowNoise(self.flow, self.scale * factor)

    @torch.no_grad()
    def sample_like(self, y: Tensor, generator: Generators = None) -> Tensor:
        """Noise of y's shape (B, C, H, W), the latent drawn from the generator.

        Raises:
            ValueError: the flow does not take images of y's size.
        """
        self._check(y, "y")
        like = next(self.flow.parameters(), y)
        z = standard_normal(torch.empty(y.shape, dtype=like.dtype, device=y.device), generator)
        noise = self.flow.decode(z.flatten(1).to(like.device), y.shape[-2:])  # type: ignore[operator]
        return (self.scale * noise).to(y)

    def log_prob(self, residual: Tensor) -> Tensor:
        """log p(residual) in nats, (B,), of residuals (B, C, H, W).

        Raises:
            ValueError: the flow does not take images of the residual's size.
        """
        self._check(residual, "residual")
        n = residual[0].numel()
        # a solver steps back from what is not finite, image by image
        log_prob = getattr(self.flow, "unchecked_log_prob", self.flow.log_prob)
        return log_prob(residual / self.scale) - n * math.log(self.scale)  # type: ignore[operator]

    def _check(self, y: Tensor, name: str) -> None:
        channels, height, width = self.image_shape
        fits = y.ndim == 4 and y.shape[1] == channels and y.shape[2] % self.divisor == y.shape[3] % self.divisor == 0
        if not fits:
            made_for = (
                f"the noise flow was made for (B, {channels}, {height}, {width}) and sides divisible by {self.divisor}"
            )
            raise ValueError(f"{name} has shape {tuple(y.shape)}, but {made_for}; train one on noise of that shape")
