r"""Samples of the posterior in one pass: a density around a trained network's estimate, in the latent space of its flow.

    p(x | y) = N(f(x); m(y), S K S) |det Df(x)|,     m(y) = f(x_hat(y)),   S = diag s(y)
    x = f^-1(m(y) + s(y) K^(1/2) n),  n ~ N(0, I)                  a sample
    training of s    min E sum log s + (f(x) - m)^2 / (2 s^2)        the likelihood of x given y, for K = I
    K = K_channel x K_row x K_column at each level                 the correlations that are left, fitted in closed form

Symbols: y measurement, x image (B, C, H, W), x_hat the network's estimate, f its last flow, s > 0 deviations that a small
network predicts. The network itself stays as it is, so that the estimate does not change. K lets neighbours and channels
of one level err together. It does not depend on y, and levels are independent given y.

References:
    Winkler et al. 2019, Learning likelihoods with conditional normalizing flows, https://arxiv.org/abs/1912.00042
    Dutilleul 1999, The MLE algorithm for the matrix normal distribution (the alternating fit of separable covariances)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from deepinv.physics import LinearPhysics
from torch import Tensor, nn

from flowprox.flows import Flow
from flowprox.naming import Specified
from flowprox.operators import visibility
from flowprox.unfolding.conditioning import LatentMeanNet, assembled, separated
from flowprox.unfolding.networks import Unfolded

_SMALLEST = 1e-4  # of a deviation, so that what the measurement tells without noise keeps a density
_LARGEST_FACTOR = 3.0  # of log s beside that of its channel


class LatentScale(Specified, nn.Module):
    """Deviations s(y) of the latents and their correlations K: how far images may be from an estimate.

    s is one number of each latent channel times what a U-Net predicts of the estimate and A^T y.

    Arguments:
        image_shape: (C, H, W); at other sizes there is no K.
        hidden_channels: of the U-Net, one width per level of the flow, finest first.
    """

    def __init__(self, image_shape: Sequence[int], hidden_channels: Sequence[int]) -> None:
        super().__init__()
        n_channels, height, width = image_shape
        self.image_size = (height, width)
        self.net = LatentMeanNet(2 * n_channels + 1, n_channels, 1, hidden_channels)
        levels = separated(torch.zeros(1, n_channels, height, width), self.net.n_levels)
        self.log_scale = nn.Parameter(torch.zeros(sum(level.shape[1] for level in levels)))
        self.factors = nn.ParameterList(
            nn.Parameter(torch.eye(n), requires_grad=False) for level in levels for n in level.shape[1:]
        )  # triangular, three of each level: of channels, rows and columns

    def forward(self, inputs: Tensor, groups: Tensor) -> Tensor:
        """log s (B, C, H, W), from ``inputs`` of ``features`` and the groups (C, H, W) of the latents."""
        factor = _LARGEST_FACTOR * torch.tanh(self.net(inputs)[0] / _LARGEST_FACTOR)
        return torch.log(torch.exp(self.log_scale[groups] + factor) + _SMALLEST)

    def correlated(self, n: Tensor) -> Tensor:
        """K^(1/2) n of white noise n (B, C, H, W)."""
        return self._mapped(n, [list(factors) for factors in self._levels()])

    def whitened(self, w: Tensor) -> tuple[Tensor, float]:
        """K^(-1/2) w (B, C, H, W), and log|det K^(1/2)|."""
        inverses = [[torch.linalg.inv(factor) for factor in factors] for factors in self._levels()]
        log_determinant = 0.0
        for factors in self._levels():
            sizes = [len(factor) for factor in factors]
            for factor in factors:
                log_determinant += float(factor.diagonal().log().sum()) * math.prod(sizes) / len(factor)
        return self._mapped(w, inverses), log_determinant

    def fit_correlations(self, w: Tensor, n_rounds: int = 3) -> None:
        """Fit K to latents w (B, C, H, W) that have been divided by s: each factor in turn, given the others."""
        fitted: list[Tensor] = []
        for level in separated(w.double(), self.net.n_levels):
            factors = [torch.eye(n, dtype=level.dtype, device=level.device) for n in level.shape[1:]]
            for _ in range(n_rounds):
                for axis in range(3):
                    others = [
                        torch.eye(len(factor)).to(factor) if i == axis else torch.linalg.inv(factor)
                        for i, factor in enumerate(factors)
                    ]
                    rows = _applied(level, others).movedim(axis + 1, 0).flatten(1)
                    covariance = rows @ rows.T / rows.shape[1]
                    covariance += 1e-6 * covariance.diagonal().mean() * torch.eye(len(rows)).to(rows)
                    factors[axis] = torch.linalg.cholesky(covariance)
            fitted += factors
        for own, factor in zip(self.factors, fitted, strict=True):
            own.data.copy_(factor)

    def _levels(self) -> list[Sequence[Tensor]]:
        factors = list(self.factors)
        return [factors[i : i + 3] for i in range(0, len(factors), 3)]

    def _mapped(self, w: Tensor, factors: list[list[Tensor]]) -> Tensor:
        levels = separated(w, self.net.n_levels)
        return assembled([_applied(level, three) for level, three in zip(levels, factors, strict=True)])


def _applied(level: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """Matrices of channels, rows and columns applied to (B, c, h, w)."""
    return torch.einsum("ij,kl,mn,bjln->bikm", *factors, level)


class BoundDensity(NamedTuple):
    """p(x | y) for some measurements, as ``flowprox.solvers.importance_samples`` takes a proposal."""

    network: Unfolded
    mean: Tensor  # m(y) (B, C, H, W)
    log_scale: Tensor  # log s(y), likewise
    scale: LatentScale
    y: Tensor
    physics: LinearPhysics

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n images of each measurement (n, B, C, H, W)."""
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        device = self.mean.device if generator is None else generator.device
        samples = []
        for _ in range(n):
            noise = torch.randn(self.mean.shape, generator=generator, dtype=self.mean.dtype, device=device)
            deviation = self.log_scale.exp() * self.scale.correlated(noise.to(self.mean.device))
            x = self.network.flows()[-1].decode_image(self.mean + deviation)
            samples.append(self.network.final_data_step(x, self.y, self.physics))
        return torch.stack(samples)

    @torch.no_grad()
    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x | y) in nats, (..., B), of images (..., B, C, H, W); ValueError for a network that ends with a data step,
        whose samples have no density."""
        if self.network.ends_with_data_step:
            raise ValueError("a network that ends with a data step puts what was measured into its samples: no density")
        values = []
        for one in x.reshape(-1, *x.shape[-4:]):
            z, logdet = self.network.flows()[-1](one)
            white, log_determinant = self.scale.whitened(
                (z.view_as(self.mean) - self.mean) * torch.exp(-self.log_scale)
            )
            entries = -0.5 * (white.square() + math.log(2 * math.pi)) - self.log_scale
            values.append(entries.flatten(1).sum(1) + logdet - log_determinant)
        return torch.stack(values).reshape(x.shape[:-3])


class ConditionalDensity:
    """p(x | y) of a trained network and its latent deviations.

    Arguments:
        network: with a flow, or ValueError.
        scale: trained for it by ``fit_density``.

    Example:
        >>> from flowprox import FlowProx, Glow, UnfoldedPGD, make_physics
        >>> flow = Glow((3, 8, 8), n_levels=2, n_steps=1, hidden_channels=4)
        >>> network = UnfoldedPGD([FlowProx(flow)]).eval()
        >>> density = ConditionalDensity(network, LatentScale((3, 8, 8), [8, 8]))
        >>> y, physics = torch.rand(2, 3, 8, 8), make_physics("denoising", (3, 8, 8), sigma=0.1)
        >>> x = density.sample(y, physics, 5)
        >>> x.shape, density.log_prob(x, y, physics).shape
        (torch.Size([5, 2, 3, 8, 8]), torch.Size([5, 2]))
    """

    def __init__(self, network: Unfolded, scale: LatentScale) -> None:
        self.network, self.scale, self.flow = network, scale, _last_flow(network)

    @torch.no_grad()
    def of(self, y: Tensor, physics: LinearPhysics) -> BoundDensity:
        """The density of the images behind measurements (B, ...), of the training's size, or ValueError: samples and
        ``log_prob`` without the network's run."""
        x_hat = self.network(y, physics)
        if tuple(x_hat.shape[-2:]) != self.scale.image_size:
            sizes = ["x".join(map(str, size)) for size in (self.scale.image_size, tuple(x_hat.shape[-2:]))]
            raise ValueError(
                f"samples are of images of {sizes[0]} pixels, as the density was trained on, not {sizes[1]}"
            )
        groups = self.flow.latent_groups((x_hat.shape[-2], x_hat.shape[-1])).to(x_hat.device)
        log_scale = self.scale(_features(x_hat, y, physics), groups)
        return BoundDensity(self.network, self.flow.encode_image(x_hat), log_scale, self.scale, y, physics)

    def sample(self, y: Tensor, physics: LinearPhysics, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n images (n, B, C, H, W) of p(x | y) for each measurement (B, ...).

        A network that ends with a data step ends so here too: what was measured without noise is then kept.
        """
        return self.of(y, physics).sample(n, generator)

    def log_prob(self, x: Tensor, y: Tensor, physics: LinearPhysics) -> Tensor:
        """log p(x | y) in nats, (..., B), of images (..., B, C, H, W); see ``BoundDensity.log_prob``."""
        return self.of(y, physics).log_prob(x)


def _last_flow(network: Unfolded) -> Flow:
    if not network.flows():
        raise ValueError("the network has no flow, and so no density: samples need a FlowProx")
    return network.flows()[-1]


def _features(x_hat: Tensor, y: Tensor, physics: LinearPhysics) -> Tensor:
    """What the deviations are predicted from: the estimate, A^T y - x_hat and A^T A 1, (B, 2 C + 1, H, W)."""
    seen = visibility(x_hat, physics).expand(len(x_hat), -1, -1, -1)
    return torch.cat([x_hat - 0.5, physics.A_adjoint(y) - x_hat, seen], dim=1)


def fit_density(
    network: Unfolded,
    estimates: list[tuple[Tensor, Tensor, Tensor]],
    physics: LinearPhysics,
    hidden_channels: Sequence[int] | None = None,
    n_steps: int = 400,
    seed: int = 0,
    callback: Callable[[int, int, float], None] | None = None,
) -> LatentScale:
    """Train the deviations of a network's latents by the likelihood of images; the network stays as it is.

    Arguments:
        network: with a flow, or ValueError.
        estimates: batches of images x (B, C, H, W), their measurements y and the network's estimates.
        physics: the operator.
        hidden_channels: widths of the predictor, see ``LatentScale``; None is 16, 24, 32, ....
        n_steps: of Adam, 16 images each.
        seed: of the first weights and the order.
        callback: called with the step, their number, and the likelihood in nats per entry, without the log-determinant.
    """
    flow = _last_flow(network)
    with torch.no_grad():
        parts = [
            (_features(x_hat, y, physics), flow.encode_image(x) - flow.encode_image(x_hat)) for x, y, x_hat in estimates
        ]
    inputs, deviations = (torch.cat(one) for one in zip(*parts, strict=True))
    groups = flow.latent_groups((deviations.shape[-2], deviations.shape[-1])).to(deviations.device)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        widths = hidden_channels or [16 + 8 * level for level in range(flow.n_levels)]
        scale = LatentScale(deviations.shape[1:], widths).to(deviations.device)
    squares = torch.zeros_like(scale.log_scale).index_add_(0, groups.flatten(), deviations.square().mean(0).flatten())
    with torch.no_grad():
        scale.log_scale.copy_(0.5 * (squares / torch.bincount(groups.flatten()) + _SMALLEST**2).log())
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(scale.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=n_steps)
    for step in range(n_steps):
        chosen = torch.randint(len(inputs), (min(16, len(inputs)),), generator=generator).to(inputs.device)
        log_scale = scale(inputs[chosen], groups)
        loss = (log_scale + 0.5 * (deviations[chosen] * torch.exp(-log_scale)).square()).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(scale.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if callback is not None:
            callback(step + 1, n_steps, -float(loss.detach()))
    scale.eval().requires_grad_(False)
    with torch.no_grad():
        log_scale = torch.cat([scale(one, groups) for one in inputs.split(32)])
        scale.fit_correlations(deviations * torch.exp(-log_scale))
    return scale
