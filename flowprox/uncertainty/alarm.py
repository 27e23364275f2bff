r"""An alarm: is a reconstruction like those of the images on which it was calibrated?

    residual   log ||y - A x_hat||^2                             against the stated noise: too much or too little is left
    latents    log mean z_i^2 over each (level, channel) of z = f(x_hat)             how much detail there is, of each kind
    layout     means of x_hat over a grid of 4x4 blocks                               where what colors are
    kernel     <q, d> / ||q|| ||d||,  q = P (y - A x_hat),  d = P (A' x_hat - A x_hat),  P = I - A A^T     of blurs only
    prior latents, prior means    log mean z_i^2 and mean z_i of z = f_0(x_hat)      with a prior f_0 of clean images
    score      s = (u - m)^T C^-1 (u - m)                        of each of these vectors u
    excess     e = (s - median) / (s_99 - median)                s_99: what 99 of 100 images stay below
    alarm      sum over these of max(e, 0)^2
    p-value    (1 + #{reference images with at least this excess}) / (n + 1)

Symbols: y measurement, x_hat estimate, f the network's flow, A' the blur with the square root of the kernel, which is wider (a
Gaussian one by sqrt 2): what is left must not look like a change of the kernel. P takes away what another estimate could
explain. m, C, median and s_99 are of one part of the calibration images, C drawn towards its diagonal by 0.3; the other n are
the reference. For an image exchangeable with these each p-value is valid (conformal). The alarm is raised where the p-value of
the sum is at most the level: a false alarm with at most that probability.

Without calibration there is the chi-squared test of the residual, ``flowprox.noise.residual_p_value``.

References:
    Nalisnick et al. 2019, Detecting out-of-distribution inputs to deep generative models using typicality,
    https://arxiv.org/abs/1906.02994 (why latents are looked at from both sides)
    Rao 1948, Large sample tests of statistical hypotheses concerning several parameters (the score test: kernel)
    Ledoit, Wolf 2004, A well-conditioned estimator for large-dimensional covariance matrices (the shrinking of C)
    Bates et al. 2023, Testing for outliers with conformal p-values, https://arxiv.org/abs/2104.08279, Eq. (2)
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from deepinv.physics import LinearPhysics, Physics
from torch import Tensor, nn

from flowprox.flows import Flow
from flowprox.naming import Specified
from flowprox.noise import noise_level, standard_residual

_SMALLEST = 1e-6  # a residual, and a mean square of latents, below which nothing is told apart
_SHRINKAGE = 0.3
_GRID = 4


class Alarm(Specified, nn.Module):
    """P-values of reconstructions against those of calibration images; ``fit_alarm`` makes one.

    Arguments:
        sizes: name of what is compared -> how many numbers it is.
        n_reference: images whose scores are the reference.
        level: at most this part of the images like those of the reference raises the alarm, in (0, 1).
        prior: name or folder of the prior of clean images; None is none.

    Raises:
        ValueError: sizes are no mapping; the level is outside (0, 1), or too low for the number of images, and the
            message says how many are needed.
    """

    center: Tensor
    whitener: Tensor
    median: Tensor
    unit: Tensor
    reference: Tensor

    def __init__(
        self, sizes: Mapping[str, int], n_reference: int, level: float = 0.01, prior: str | None = None
    ) -> None:
        super().__init__()
        if not isinstance(sizes, Mapping):
            raise ValueError(f"sizes must be a mapping, got {sizes}; an alarm of an earlier version is to be made anew")
        if not 0 < level < 1:
            raise ValueError(f"level must lie between 0 and 1, got {level}; 0.01 asks for one false alarm in a hundred")
        needed = math.ceil(1 / level - 1e-9) - 1
        if n_reference < needed:
            raise ValueError(f"an alarm of level {level} needs at least {needed} reference images, got {n_reference}")
        self.sizes, self.level, self.prior = dict(sizes), level, prior
        self.register_buffer("center", torch.zeros(sum(sizes.values())))
        self.register_buffer("whitener", torch.eye(sum(sizes.values())))
        self.register_buffer("median", torch.zeros(len(sizes)))
        self.register_buffer("unit", torch.ones(len(sizes)))
        self.register_buffer("reference", torch.zeros(n_reference, len(sizes)))

    def forward(self, x_hat: Tensor, y: Tensor, physics: Physics, *flows: Flow) -> Tensor:
        """P-value of each score, (B, k), from estimates (B, C, H, W), their measurements, operator, the network's flow and the
        prior, if there is one."""
        return self.p_values(self.scores(x_hat, y, physics, *flows))

    def scores(self, x_hat: Tensor, y: Tensor, physics: Physics, *flows: Flow) -> Tensor:
        """Excess of each score, (B, k); arguments as those of the call."""
        return self.excess(torch.cat([*alarm_features(x_hat, y, physics, *flows).values()], dim=1))

    def excess(self, features: Tensor) -> Tensor:
        """How far features (B, F) lie from those of the calibration: 0 is usual, one in a hundred reaches 1, (B, k)."""
        return (self.whitened(features) - self.median) / self.unit

    def whitened(self, features: Tensor) -> Tensor:
        """Squared distance of features (B, F) from the center, (B, k)."""
        white = (features - self.center) @ self.whitener
        return torch.stack([part.square().sum(1) for part in white.split([*self.sizes.values()], dim=1)], dim=1)

    def p_values(self, scores: Tensor) -> Tensor:
        """Of scores (B, k), each by itself, (B, k)."""
        return (1 + (self.reference[None] >= scores[:, None]).sum(1)) / (len(self.reference) + 1)

    def is_raised(self, scores: Tensor) -> Tensor:
        """Whether not to trust an image, (B,), by the sum of the squares of its scores (B, k)."""
        above = (total(self.reference)[None] >= total(scores)[:, None]).sum(1)
        return (1 + above) / (len(self.reference) + 1) <= self.level

    def records(self, x_hat: Tensor, y: Tensor, physics: Physics, *flows: Flow) -> list[dict[str, float | bool]]:
        """Of each image, ``raised`` and the p-values by name; arguments as those of the call."""
        scores = self.scores(x_hat, y, physics, *flows)
        return [
            {"raised": raised, **dict(zip(self.sizes, values, strict=True))}
            for raised, values in zip(self.is_raised(scores).tolist(), self.p_values(scores).tolist(), strict=True)
        ]


def total(scores: Tensor) -> Tensor:
    """What raises the alarm, (B,), of scores (B, k)."""
    return scores.clamp(min=0).square().sum(1)


def fit_alarm(
    estimates: Sequence[tuple[Tensor, Tensor]],
    physics: Physics,
    *flows: Flow,
    level: float = 0.01,
    prior: str | None = None,
) -> Alarm:
    """The alarm of reconstructions of images that the network has not seen: half of them tell center and spread.

    Arguments:
        estimates: batches of estimates (B, C, H, W) and their measurements.
        physics: the operator.
        flows: the network's last one, and the prior if there is one.
        level: of false alarms.
        prior: the prior's name.

    Raises:
        ValueError: too few images for the level; the message says how many are needed.
    """
    parts = [alarm_features(x_hat, y, physics, *flows) for x_hat, y in estimates]
    features = torch.cat([torch.cat([*one.values()], dim=1) for one in parts])
    n_fit = len(features) // 2
    sizes = {name: values.shape[1] for name, values in parts[0].items()}
    alarm = Alarm(sizes, len(features) - n_fit, level, prior).to(features.device)
    fitted, rest = features[:n_fit], features[n_fit:]
    alarm.center.copy_(fitted.mean(0))
    spread = (fitted - alarm.center).double().square().mean(0).sqrt() + _SMALLEST
    whiteners = []
    for part in ((fitted - alarm.center) / spread).split([*sizes.values()], dim=1):
        correlation = (1 - _SHRINKAGE) * part.T @ part / n_fit + _SHRINKAGE * torch.eye(part.shape[1]).to(part)
        whiteners.append(torch.linalg.inv(torch.linalg.cholesky(correlation)).T)
    alarm.whitener.copy_(torch.block_diag(*whiteners) / spread[:, None])
    median, largest = alarm.whitened(fitted).quantile(torch.tensor([0.5, 0.99]).to(fitted), dim=0)
    alarm.median.copy_(median)
    alarm.unit.copy_(largest - median)
    alarm.reference.copy_(alarm.excess(rest))
    return alarm


@torch.no_grad()
def alarm_features(x_hat: Tensor, y: Tensor, physics: Physics, *flows: Flow) -> dict[str, Tensor]:
    """What is compared, (B, n) each; the kernel of blurs only, the prior where there are two flows."""
    residual = y - physics.A(x_hat)
    squares = residual.abs().flatten(1).square().mean(1, keepdim=True)
    told = standard_residual(x_hat, y, physics)
    if told is not None and bool(told.isnan().any()):  # clipped as a picture: what is not told is as stated
        told = noise_level(physics, y)[:, None] * told.nan_to_num(nan=1.0)
        squares = told.square().mean(1, keepdim=True).to(squares)
    features = {
        "residual": (squares + _SMALLEST).log(),
        "latents": _sizes_and_means(flows[0], x_hat)[0],
        "layout": F.adaptive_avg_pool2d(x_hat, _GRID).flatten(1),
    }
    kernel = getattr(physics, "filter", None)
    if isinstance(physics, LinearPhysics) and isinstance(kernel, Tensor):
        features["kernel"] = _kernel_score(x_hat, residual, physics, kernel)[:, None]
    for prior in flows[1:]:
        features["prior latents"], features["prior means"] = _sizes_and_means(prior, x_hat)
    return features


def _sizes_and_means(flow: Flow, x: Tensor) -> tuple[Tensor, Tensor]:
    """log mean z^2 and mean z over each (level, channel) of the latents of x."""
    height, width = (side - side % flow.divisor for side in x.shape[-2:])
    z, _ = flow(x[..., :height, :width])
    groups = flow.latent_groups((height, width)).flatten().to(z.device)
    none, n = z.new_zeros(len(z), flow.n_latent_groups), torch.bincount(groups)
    return (none.index_add(1, groups, z.square()) / n + _SMALLEST).log(), none.index_add(1, groups, z) / n


def _kernel_score(x_hat: Tensor, residual: Tensor, physics: LinearPhysics, kernel: Tensor) -> Tensor:
    """Correlation (B,) of what is left of y with what a wider kernel changes, without what another estimate could explain."""
    other = copy.deepcopy(physics)
    wider = kernel.clamp(min=0).sqrt()
    other.filter = wider * (kernel.sum() / wider.sum())
    change = other.A(x_hat) - physics.A(x_hat)
    left, change = (v - physics.A(physics.A_adjoint(v)) for v in (residual, change))
    return F.cosine_similarity(left.flatten(1), change.flatten(1))
