r"""Proximal maps, learned and exact: what an unfolded network does between two data steps.

    prox_{s R}(v) = argmin_x 1/2 ||x - v||^2 + s R(x)                                contract: prox(v, step) -> x

For a flow f with inverse g, Wei et al. 2022 take the prox in the latent space, where the prior is a plain norm:

    FlowProx:  x = g(P(f(v))),   P(z) = z / (1 + s w)                Gaussian base, R = 1/2 sum w z^2     (Eqs. 9 to 11)
                                 P(z) = sign(z) max(|z| - s w, 0)    Laplace base,  R = sum w |z|

Symbols: v image after the data step (B, C, H, W), x image of the same shape, s >= 0 the step (the fold's shrinkage lambda_k),
w > 0 weights: 1, or one learned number per latent channel. A base density with mean mu(y) shrinks towards it: mu + P(z - mu).
Numbers that depend on the noise level sigma are learned at levels, as logarithms, and interpolated linearly in log sigma.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from flowprox.flows import Flow
from flowprox.flows.flow import require_flow
from flowprox.naming import Specified, require_choice
from flowprox.networks import ResNet, UNet


class Prox(nn.Module):
    """Contract of every prox."""

    divisor: int = 1
    n_channels: int | None = None  # of the images that it takes; None: any
    uses_step: bool = True  # whether the output depends on the step

    def forward(
        self, v: Tensor, step: float | Tensor, sigma: Tensor | None = None, mean: Tensor | None = None
    ) -> Tensor:
        """Map v (B, C, H, W) to an image of the same shape.

        Arguments:
            v: the image after the data step.
            step: at least 0, a scalar or one per image (B,).
            sigma: noise level of the measurement (B,), for a prox that is told.
            mean: what to shrink towards (B, C, H, W), for a prox that shrinks: a flow's in its latent space; None is 0.
        """
        raise NotImplementedError


class SoftThreshold(Specified, Prox):
    """The exact prox of step * ||x||_1: sign(v) max(|v| - step, 0).

    Example:
        >>> SoftThreshold()(torch.tensor([-2.0, 0.5, 3.0]), 1.0)
        tensor([-1.,  0.,  2.])
    """

    def __init__(self) -> None:
        super().__init__()

    def forward(
        self, v: Tensor, step: float | Tensor, sigma: Tensor | None = None, mean: Tensor | None = None
    ) -> Tensor:
        if mean is None:
            return soft_threshold(v, _per_image(step))
        return mean + soft_threshold(v - mean, _per_image(step))


class FlowProx(Specified, Prox):
    """Shrinkage in the latent space of a flow (Wei et al. 2022, Eqs. 9 to 11).

    A round trip through an exact inverse: with step 0 it is the identity. One number per fold shrinks all latents alike, as
    in the paper; with ``channelwise`` the base density has a learned precision w for every (level, channel) of the latent.

    References:
        Wei et al. 2022, Deep unfolding with normalizing flow priors for inverse problems, https://arxiv.org/abs/2107.02848

    Arguments:
        flow: image (B, C, H, W) to latent.
        base: "gaussian" (divide) or "laplace" (soft threshold).
        channelwise: learn one weight per latent channel; all are 1 at the start.
        levels: rising noise levels at which the weights of ``channelwise`` are learned, interpolated between them; None
            learns one set for all levels.
        log_determinant: shrink by the whole density of the image, log|det Dg| included, which Wei et al. leave out (Eq. 7):
            z = P(f(v) - s grad log|det Dg(f(v))|), a gradient step on that term. It trains with flows of ``backward`` "plain".

    Raises:
        ValueError: an unknown base, or levels that are not positive and rising, or without ``channelwise``.

    Example:
        >>> from flowprox.flows import Glow
        >>> prox = FlowProx(Glow(image_shape=(3, 8, 8), n_levels=1, n_steps=1, hidden_channels=4))
        >>> v = torch.rand(2, 3, 8, 8)
        >>> bool((prox(v, 0.0) - v).abs().max() < 1e-5)
        True
    """

    groups: Tensor
    _levels: Tensor

    def __init__(
        self,
        flow: Flow,
        base: str = "gaussian",
        channelwise: bool = False,
        levels: Sequence[float] | None = None,
        log_determinant: bool = False,
    ) -> None:
        super().__init__()
        require_choice("base", base, ("gaussian", "laplace"))
        if levels is not None and not channelwise:
            raise ValueError("levels are those of the weights per channel: set channelwise to True, or levels to None")
        require_flow(flow)
        self.flow = flow
        self.base = base
        self.n_channels = flow.n_channels
        self.log_determinant = log_determinant
        self.levels = checked_levels(levels)
        self.register_buffer("_levels", torch.tensor(self.levels or ()), persistent=False)
        shape = (flow.n_latent_groups,) if self.levels is None else (len(self.levels), flow.n_latent_groups)
        self.log_weight = nn.Parameter(torch.zeros(shape)) if channelwise else None
        self.register_buffer("groups", flow.latent_groups(), persistent=False)

    @property
    def divisor(self) -> int:  # type: ignore[override]
        """Height and width must be multiples of this."""
        return self.flow.divisor

    def forward(
        self, v: Tensor, step: float | Tensor, sigma: Tensor | None = None, mean: Tensor | None = None
    ) -> Tensor:
        # Eq. (9)
        z = self.flow.encode_image(v)
        if self.log_determinant:
            z = z - _per_image(step) * gradient(lambda u: self.flow.inverse_image(u)[1], z)
        # Eq. (10)
        z = self.shrink(z, step, sigma) if mean is None else mean + self.shrink(z - mean, step, sigma)
        # Eq. (11)
        return self.flow.decode_image(z)

    def shrink(self, z: Tensor, step: float | Tensor, sigma: Tensor | None = None) -> Tensor:
        """P(z) for an image-shaped latent (B, C, H, W)."""
        step = _per_image(step)
        if self.log_weight is not None:
            step = step * torch.exp(self._log_weight(z, sigma))
        return z / (1 + step) if self.base == "gaussian" else soft_threshold(z, step)

    def log_prob(self, x: Tensor, sigma: Tensor | None = None, mean: Tensor | None = None) -> Tensor:
        """log p(x) in nats (B,) of the density whose negative logarithm the prox shrinks by, x (B, C, H, W).

        p(z) = N(z; mean, 1/w) or Laplace(z; mean, 1/w),   log p(x) = log p(f(x)) + log|det Df(x)|
        """
        z, logdet = self.flow(x)
        z = z.view_as(x) if mean is None else z.view_as(x) - mean
        log_weight = torch.zeros_like(z) if self.log_weight is None else self._log_weight(z, sigma)
        if self.base == "gaussian":
            values = 0.5 * (log_weight - math.log(2 * math.pi) - torch.exp(log_weight) * z.square())
        else:
            values = log_weight - math.log(2) - torch.exp(log_weight) * z.abs()
        return values.flatten(1).sum(1) + logdet

    @torch.no_grad()
    def sample(
        self,
        n: int,
        temperature: float = 1.0,
        image_size: tuple[int, int] | None = None,
        generator: torch.Generator | None = None,
        sigma: Tensor | None = None,
        mean: Tensor | None = None,
    ) -> Tensor:
        """n images (n, C, H, W) of the density of ``log_prob``, the latent's deviation from its mean times ``temperature``."""
        like = next(self.flow.parameters())
        z = like.new_empty(n, self.flow.n_channels, *(image_size or self.flow.image_shape[1:]))
        if self.base == "gaussian":
            z.normal_(generator=generator)
        else:  # the difference of two exponential variables
            z.exponential_(generator=generator).sub_(torch.empty_like(z).exponential_(generator=generator))
        if self.log_weight is not None:
            z *= torch.exp(self._log_weight(z, sigma) * (-0.5 if self.base == "gaussian" else -1.0))
        return self.flow.decode_image(temperature * z if mean is None else mean + temperature * z)

    def _log_weight(self, z: Tensor, sigma: Tensor | None) -> Tensor:
        """log w of every entry of z (B, C, H, W): (C, H, W), or (B, C, H, W) where they depend on the level."""
        assert self.log_weight is not None
        size = (z.shape[-2], z.shape[-1])
        groups = self.groups if self.groups.shape[-2:] == size else self.flow.latent_groups(size).to(z.device)
        if self.levels is None:
            return self.log_weight[groups]
        if sigma is None:
            raise ValueError("this prox is told the noise level: pass sigma (B,)")
        return at_level(self.log_weight, self._levels, sigma)[:, groups]


def _per_image(step: float | Tensor) -> float | Tensor:
    """A scalar as it is, one number per image (B,) against images (B, C, H, W)."""
    return step.view(-1, 1, 1, 1) if isinstance(step, Tensor) and step.ndim == 1 else step


def gradient(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Gradient of fn(x), (B,), in x (B, ...); with a graph of its own where gradients are on."""
    wanted = torch.is_grad_enabled()
    with torch.enable_grad():
        u = x if wanted and x.requires_grad else x.detach().requires_grad_()
        return torch.autograd.grad(fn(u).sum(), u, create_graph=wanted, materialize_grads=True)[0]


def soft_threshold(v: Tensor, threshold: float | Tensor) -> Tensor:
    """sign(v) max(|v| - threshold, 0), the threshold broadcasting against v."""
    return torch.sign(v) * torch.clamp(v.abs() - threshold, min=0)


class _NetProx(Prox):
    """A plain network in place of the prox; it ignores the step."""

    uses_step = False

    def __init__(self, net: nn.Module, n_channels: int) -> None:
        super().__init__()
        self.n_channels = n_channels
        self.net = net

    def forward(
        self, v: Tensor, step: float | Tensor = 0.0, sigma: Tensor | None = None, mean: Tensor | None = None
    ) -> Tensor:
        if mean is not None:
            raise ValueError("a plain network has no latent that could be shrunk towards a mean: leave out mean")
        return self.net(v)


class ResNetProx(Specified, _NetProx):
    """ResNet of Mardani et al. 2018 in place of the prox (baseline of Wei et al. 2022, Sec. V-C); it ignores ``step``.

    Arguments: as ``flowprox.networks.ResNet``.
    """

    def __init__(self, n_channels: int = 3, hidden_channels: int = 128, n_blocks: int = 2) -> None:
        _NetProx.__init__(self, ResNet(n_channels, hidden_channels, n_blocks), n_channels)


class UNetProx(Specified, _NetProx):
    """U-Net of Ronneberger et al. 2015 in place of the prox (baseline of Wei et al. 2022, Sec. V-C); it ignores ``step``.

    Arguments: as ``flowprox.networks.UNet``.
    """

    def __init__(
        self, n_channels: int = 3, hidden_channels: int = 64, n_scales: int = 5, residual: bool = True
    ) -> None:
        _NetProx.__init__(self, UNet(n_channels, hidden_channels, n_scales, residual), n_channels)


def checked_levels(levels: Sequence[float] | None) -> tuple[float, ...] | None:
    """The levels as a tuple of floats, or an error if they are no rising positive numbers."""
    if levels is None:
        return None
    values = tuple(float(level) for level in levels)
    rising = all(a < b for a, b in pairwise(values))
    if len(values) < 2 or not rising or not values[0] > 0 or not math.isfinite(values[-1]):
        raise ValueError(f"levels must be at least two rising positive noise levels, or None; got {list(levels)}")
    return values


def at_level(values: Tensor, levels: Sequence[float] | Tensor, sigma: Tensor) -> Tensor:
    """Values (J, ...) at the levels (J,) interpolated at noise levels sigma (B,): (B, ...).

    Example:
        >>> at_level(torch.tensor([0.0, 1.0]), [0.01, 0.1], torch.tensor([0.001, 0.1 ** 1.5, 1.0])).tolist()
        [0.0, 0.5, 1.0]
    """
    knots = torch.as_tensor(levels, dtype=values.dtype, device=values.device).log()
    at = sigma.to(values).log().clamp(knots[0], knots[-1])[:, None]
    rise = ((at - knots[:-1]) / (knots[1:] - knots[:-1])).clamp(0, 1)  # (B, J - 1): how far each interval is passed
    ones, zeros = torch.ones_like(at), torch.zeros_like(at)
    hats = torch.cat([ones, rise], 1) - torch.cat([rise, zeros], 1)
    return torch.tensordot(hats, values, dims=1)
