r"""The contract of a noise: draw it, and say how likely a residual is. A trained flow fulfils it as it is.

    y = A(x) + n,    n ~ p        sample_like(y) draws n,    log_prob(r) = log p(r),   r = y - A(x_hat)

y measurement (B, ...), r residual of the same shape. Values are drawn in (B, C, H, W) order on the generator's device, so that
the same seed gives the same noise on every device, in every memory layout and, with one generator per image, in every batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, TypeAlias

import numpy as np
import torch
from deepinv.physics import NoiseModel
from torch import Tensor, nn

from flowprox.naming import Specified, require_positive

Generators: TypeAlias = torch.Generator | Sequence[torch.Generator] | None
"""One generator for the batch, one per image, or torch's global one."""

_DRAWS = 64  # of a noise whose energy has no formula


class Density(Protocol):
    """What a solver needs of a noise: anything with ``log_prob``, a flow that was trained on residuals too."""

    def log_prob(self, residual: Tensor) -> Tensor:
        """log p(residual) in nats, (B,), differentiable in the residual (B, ...)."""
        ...


class Noise(NoiseModel):
    """Contract of every noise, which is also deepinv's: a ``noise_model`` of any physics.

    A subclass implements ``sample_like`` and ``log_prob``, or says by ``has_density`` that it has only the first.

    Example:
        >>> from flowprox.noise import make_noise
        >>> noise, y = make_noise("sinusoidal", (3, 8, 8), sigma=0.5), torch.zeros(2, 3, 8, 8)
        >>> torch.equal(noise(y, seed=1), noise(y, seed=1))
        True
        >>> noise.log_prob(noise.sample_like(y)).shape
        torch.Size([2])
    """

    has_density: bool = True

    def sample_like(self, y: Tensor, generator: Generators = None) -> Tensor:
        """One realization of the noise, of y's shape (B, ...), dtype and device.

        Arguments:
            y: measurement; only its shape, dtype and device are used.
            generator: one for the batch, or one per image; torch's global one by default.
        """
        raise NotImplementedError

    def log_prob(self, residual: Tensor) -> Tensor:
        """log p(residual) in nats, (B,), differentiable in the residual (B, ...)."""
        raise NotImplementedError

    def energy_like(self, y: Tensor) -> Tensor:
        """E |n_i|^2 of every entry, broadcasting against y (B, ...); drawn here, for a noise that has no formula."""
        generator = torch.Generator().manual_seed(0)
        draws = [self.sample_like(torch.zeros_like(y[:1]), generator) for _ in range(_DRAWS)]
        return torch.stack([draw.abs().square() for draw in draws]).mean(dim=0)

    def forward(self, x: Tensor, generator: Generators = None, seed: int | None = None, **parameters: object) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """x + n; ``seed`` takes the place of ``generator``; parameters of the noise are kept, as deepinv's are."""
        self.update_parameters(**parameters)
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
        return x + self.sample_like(x, generator)


def standard_normal(y: Tensor, generator: Generators) -> Tensor:
    """Standard normal values of y's shape, dtype and device."""
    if generator is None or isinstance(generator, torch.Generator):
        device = y.device if generator is None else generator.device
        return torch.randn(y.shape, generator=generator, dtype=y.dtype, device=device).to(y.device)
    each = [torch.randn(y.shape[1:], generator=g, dtype=y.dtype, device=g.device) for g in generator_each(y, generator)]
    return torch.stack(each).to(y.device)


def generator_each(y: Tensor, generator: Generators) -> list[torch.Generator]:
    """A generator for each image of y, the same one every time if there is one for the batch; ValueError for another number."""
    if generator is None or isinstance(generator, torch.Generator):
        return [generator or torch.default_generator] * len(y)
    if len(generator) != len(y):
        raise ValueError(f"generator must be one, or one per image: got {len(generator)} for {len(y)} images")
    return list(generator)


def finite_number(name: str, value: object) -> float:
    """The number as a float, also one of numpy or torch, or an error if it is none or not finite."""
    if isinstance(value, np.generic) or (isinstance(value, Tensor) and value.ndim == 0):
        value = value.item()
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return float(value)


def at_least_zero(name: str, value: object) -> float:
    """The standard deviation as a float, or an error if it is none."""
    try:
        number = finite_number(name, value)
    except ValueError:
        number = -1.0
    if number < 0:
        raise ValueError(f"{name} is a standard deviation and must be a finite number of at least 0, got {value!r}")
    return number


# The noise of a flow --------------------------------------------------------------------------------------------------


class FlowNoise(Specified, Noise):
    """Noise with the density of a flow that was trained on noise images as they are.

        n = scale * f^-1(z),  z ~ N(0, I)        log p(n) = log p_flow(n / scale) - D log(scale)

    What f subtracts from its input is taken up by its first learned layer. D = C H W is the number of entries of n.
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
        """Noise of y's shape (B, C, H, W), of which the flow must take images, the latent drawn from the generator."""
        self._check(y, "y")
        like = next(self.flow.parameters(), y)
        z = standard_normal(torch.empty(y.shape, dtype=like.dtype, device=y.device), generator)
        noise = self.flow.decode(z.flatten(1).to(like.device), y.shape[-2:])  # type: ignore[operator]
        return (self.scale * noise).to(y)

    def log_prob(self, residual: Tensor) -> Tensor:
        """log p(residual) in nats, (B,), of residuals (B, C, H, W); ValueError for a size that the flow does not take."""
        self._check(residual, "residual")
        n = residual[0].numel()
        # a solver steps back from what is not finite, image by image
        log_prob = getattr(self.flow, "unchecked_log_prob", self.flow.log_prob)
        return log_prob(residual / self.scale) - n * math.log(self.scale)  # type: ignore[operator]

    def _check(self, y: Tensor, name: str) -> None:
        channels, height, width = self.image_shape
        fits = y.ndim == 4 and y.shape[1] == channels and y.shape[2] % self.divisor == y.shape[3] % self.divisor == 0
        if not fits:
            own = f"(B, {channels}, {height}, {width}) and sides divisible by {self.divisor}"
            made_for = f"the noise flow was made for {own}; train one on noise of that shape"
            raise ValueError(f"{name} has shape {tuple(y.shape)}, but {made_for}")
