r"""Samples of an approximate posterior, corrected to the true one: both densities are exact, so that their ratio is known.

    weight           log w_i = log p(y | x_i) + log p(x_i) - log q(x_i),      x_i ~ q independent
    evidence         log p(y) = log mean w_i
    reliable         k of a generalized Pareto distribution fitted to the largest weights below 0.7
    chain            from i to j with probability min(1, w_j / w_i)          independence Metropolis: exact for any q

Symbols: y measurement, x image (C, H, W), p(x) density of a flow, p(y | x) of the noise, q the proposal, n samples of each of
B measurements. In many dimensions the weights of any q but a very good one degenerate: then k is large, the effective sample
size is that of a few samples, and the chain stands still. It says so; nothing is corrected then.

References:
    Vehtari, Simpson, Gelman, Yao, Gabry 2024, Pareto smoothed importance sampling, https://arxiv.org/abs/1507.02646
    Tierney 1994, Markov chains for exploring posterior distributions (independence chains)
    Noe et al. 2019, Boltzmann generators, https://arxiv.org/abs/1812.01729 (a flow as the proposal)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from deepinv.physics import Physics
from torch import Tensor

from flowprox.flows import Flow, frozen
from flowprox.naming import require_package
from flowprox.noise import noise_density
from flowprox.solvers.problem import LatentProblem

RELIABLE_BELOW = 0.7
"""Weights whose k-hat is smaller give means with finite error at usual numbers of samples (Vehtari et al., Sec. 3.2)."""

_BATCH = 64


class Proposal(Protocol):
    """What approximates the posteriors of B measurements: anything that draws images and knows their density."""

    def sample(self, n: int) -> Tensor:
        """n independent images for each measurement, (n, B, C, H, W)."""
        ...

    def log_prob(self, x: Tensor) -> Tensor:
        """log q(x) in nats, (n, B), of images (n, B, C, H, W)."""
        ...


@dataclass(frozen=True)
class WeightedSamples:
    """Samples of a proposal with what they weigh under the posterior; n samples of B measurements.

    Arguments:
        samples: (n, B, C, H, W).
        log_ratios: log w, (n, B), before smoothing, in nats; it includes the constants, so that its mean is the evidence.
        weights: Pareto-smoothed, (n, B), of sum 1 over the samples.
        k_hat: shape of the Pareto distribution fitted to the largest weights, (B,); see ``is_reliable``.
    """

    samples: Tensor = field(repr=False)
    log_ratios: Tensor = field(repr=False)
    weights: Tensor = field(repr=False)
    k_hat: Tensor

    @property
    def is_reliable(self) -> Tensor:
        """Whether the weights may be used, (B,): k-hat below ``RELIABLE_BELOW``."""
        return self.k_hat < RELIABLE_BELOW

    @property
    def ess(self) -> Tensor:
        """Effective sample size of the weights, 1 / sum w^2, (B,)."""
        return 1 / self.weights.square().sum(0)

    @property
    def log_evidence(self) -> Tensor:
        """log p(y) in nats, (B,)."""
        return torch.logsumexp(self.log_ratios, 0) - math.log(len(self.log_ratios))

    @property
    def evidence_error(self) -> Tensor:
        """Standard error of ``log_evidence``, (B,), by the delta method; meaningless where k-hat is large."""
        w = torch.exp(self.log_ratios - self.log_ratios.amax(0))
        return w.std(0) / w.mean(0) / math.sqrt(len(w))

    @property
    def mean(self) -> Tensor:
        """Mean of the posterior per pixel, (B, C, H, W)."""
        return (self.weights[..., None, None, None] * self.samples).sum(0)

    @property
    def std(self) -> Tensor:
        """Standard deviation of the posterior per pixel, (B, C, H, W)."""
        return (self.weights[..., None, None, None] * (self.samples - self.mean).square()).sum(0).sqrt()

    def chain(self, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """The independence Metropolis chain through the samples in their order, which is exact for every proposal.

        Returns:
            which sample each step is at, (n, B), and the part of the steps that moved, (B,).
        """
        n, n_images = self.log_ratios.shape
        uniform = torch.rand(n, n_images, generator=generator, dtype=torch.float64).to(self.log_ratios.device)
        place = torch.zeros(n_images, dtype=torch.long, device=self.log_ratios.device)
        places, columns = [place], torch.arange(n_images, device=place.device)
        for i in range(1, n):
            gain = self.log_ratios[i] - self.log_ratios[place, columns]
            place = torch.where(uniform[i].log() < gain, i, place)
            places.append(place)
        path = torch.stack(places)
        return path, (path[1:] != path[:-1]).double().mean(0) if n > 1 else torch.zeros(n_images)


@torch.no_grad()
def importance_samples(
    flow: Flow, y: Tensor, physics: Physics, proposal: Proposal, n: int = 1000, noise: Any = None
) -> WeightedSamples:
    """Draw n samples of a proposal and weigh them by the posterior of a flow prior.

    Arguments:
        flow: the prior p(x).
        y: measurements (B, ...).
        physics: the operator, linear or not.
        proposal: q; for a trained network, ``ConditionalDensity.of`` of ``flowprox.unfolding``.
        n: samples of each measurement, at least 20.
        noise: density of the noise, anything with ``log_prob(residual) -> (B,)``; None takes that of ``physics``.

    Raises:
        ValueError: too few samples, a noise without density, or samples that do not fit the flow.
        ImportError: arviz-stats, which smooths the weights, is not installed.

    Example:
        >>> from flowprox.flows import ActNorm, Flow
        >>> from flowprox.operators import make_physics
        >>> flow = Flow(ActNorm(1), (1, 2, 2), offset=0.0)  # x = z
        >>> flow.bijection.initialized.fill_(True)
        tensor(True)
        >>> class Prior:
        ...     def sample(self, n): return torch.randn(n, 1, 1, 2, 2)
        ...     def log_prob(self, x): return -0.5 * (x.square() + math.log(2 * math.pi)).flatten(2).sum(2)
        >>> y, physics = torch.ones(1, 1, 2, 2), make_physics("denoising", (1, 2, 2), sigma=1.0)
        >>> weighted = importance_samples(flow, y, physics, Prior(), n=4000)
        >>> bool(weighted.is_reliable), bool((weighted.mean - 0.5).abs().max() < 0.1)
        (True, True)
    """
    if n < 20:
        raise ValueError(f"n must be at least 20, got {n}: fewer weights tell nothing of their tail")
    problem, noise = LatentProblem(flow, y, physics), noise_density(noise, physics)
    x = proposal.sample(n)
    if x.shape[1:] != (len(y), *problem.image_shape):
        raise ValueError(f"samples of the proposal must be (n, {len(y)}, *{problem.image_shape}), got {tuple(x.shape)}")
    log_q = proposal.log_prob(x).double()
    with frozen(flow):
        log_prior = torch.cat([flow.log_prob(part) for part in x.flatten(0, 1).split(_BATCH)]).view(log_q.shape)
    # one after the other, for an operator may differ between images
    log_likelihood = torch.stack([noise.log_prob(y - physics.A(one)) for one in x])
    log_ratios = log_prior.double() + log_likelihood.double() - log_q
    weights, k_hat = _smoothed(log_ratios)
    return WeightedSamples(x, log_ratios, weights.to(x), k_hat)


def _smoothed(log_ratios: Tensor) -> tuple[Tensor, Tensor]:
    """Pareto-smoothed weights (n, B) of sum 1, and k-hat (B,)."""
    module = require_package("arviz_stats.base.array", "arviz-stats", "Pareto smoothing of weights", extra="posterior")
    if not torch.isfinite(log_ratios).all():
        raise ValueError("a weight is not finite: the proposal has samples of which the posterior knows no density")
    # it takes log-likelihoods that are left out, whose weights are the inverse
    smoothed, k_hat = module.array_stats.psislw(-log_ratios.T.cpu().numpy())
    log_weights = torch.as_tensor(smoothed).T.to(log_ratios)
    return torch.softmax(log_weights, 0), torch.as_tensor(k_hat).reshape(-1).to(log_ratios)
