r"""An alarm: is a reconstruction like those of the images on which it was calibrated?

    residual   |log ||y - A x_hat|| - m| / s                    against the stated noise: too much or too little is left
    latents    (l - m)^T C^-1 (l - m),  l_g = log mean z_i^2    over the (level, channel) groups g of z = f(x_hat)
    density    |log p(x_hat) - m| / s                           under the flow and a standard normal base
    p-value    (1 + #{reference images with at least this score}) / (n + 1)

Symbols: y measurement, x_hat estimate, f the flow, m, s and C mean, deviation and covariance over one part of the calibration
images; the other n are the reference. For an image exchangeable with these each p-value is valid (conformal). The alarm is
raised where the smallest of k p-values is at most level / k, which is a false alarm with probability level at most.

Without calibration there is the chi-squared test of the residual, ``residual_p_value``.

References:
    Nalisnick et al. 2019, Detecting out-of-distribution inputs to deep generative models using typicality,
    https://arxiv.org/abs/1906.02994 (why a density is looked at from both sides)
    Bates et al. 2023, Testing for outliers with conformal p-values, https://arxiv.org/abs/2104.08279, Eq. (2)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import deepinv
import torch
from deepinv.physics import Physics
from scipy import stats
from torch import Tensor, nn

from flowprox.flows import Flow
from flowprox.naming import Specified

SCORES = ("residual", "latents", "density")
"""What is compared with the reference, a p-value each."""

_SMALLEST = 1e-6  # a residual, and a mean square of latents, below which nothing is told apart


class Alarm(Specified, nn.Module):
    """P-values of reconstructions against those of calibration images; ``fit_alarm`` makes one.

    Arguments:
        n_features: of an image, numbers that are compared.
        n_reference: images whose scores are the reference.
        level: at most this part of the images like those of the reference raises the alarm, in (0, 1).

    Raises:
        ValueError: the level is outside (0, 1), or too low for the number of images; the message says how many are needed.
    """

    center: Tensor
    whitener: Tensor
    reference: Tensor

    def __init__(self, n_features: int, n_reference: int, level: float = 0.01) -> None:
        super().__init__()
        if not 0 < level < 1:
            raise ValueError(f"level must lie between 0 and 1, got {level}; 0.01 asks for one false alarm in a hundred")
        needed = math.ceil(len(SCORES) / level - 1e-9) - 1
        if n_reference < needed:
            raise ValueError(f"an alarm of level {level} needs at least {needed} reference images, got {n_reference}")
        self.level = level
        self.register_buffer("center", torch.zeros(n_features))
        self.register_buffer("whitener", torch.eye(n_features))
        self.register_buffer("reference", torch.zeros(n_reference, len(SCORES)))

    @torch.no_grad()
    def forward(self, x_hat: Tensor, y: Tensor, physics: Physics, flow: Flow) -> Tensor:
        """P-value of each of ``SCORES``, (B, 3), from estimates (B, C, H, W), their measurements, operator and flow."""
        scores = self.scores(alarm_features(x_hat, y, physics, flow))
        above = (self.reference[None] >= scores[:, None]).sum(1)
        return (1 + above) / (len(self.reference) + 1)

    def is_raised(self, p_values: Tensor) -> Tensor:
        """Whether not to trust an image, (B,), by its p-values (B, k)."""
        return p_values.amin(1) <= self.level / p_values.shape[1]

    def records(self, x_hat: Tensor, y: Tensor, physics: Physics, flow: Flow) -> list[dict[str, float | bool]]:
        """Of each image, ``raised`` and the p-values by name; arguments as those of the call."""
        p_values = self(x_hat, y, physics, flow)
        return [
            {"raised": raised, **dict(zip(SCORES, values, strict=True))}
            for raised, values in zip(self.is_raised(p_values).tolist(), p_values.tolist(), strict=True)
        ]

    def scores(self, features: Tensor) -> Tensor:
        """How far features (B, F) lie from the center: (B, 3), large is strange."""
        deviations = features - self.center
        ends, groups = (deviations @ self.whitener).abs(), slice(1, -1)
        return torch.stack([ends[:, 0], ends[:, groups].square().sum(1), ends[:, -1]], dim=1)


def fit_alarm(estimates: Sequence[tuple[Tensor, Tensor]], physics: Physics, flow: Flow, level: float = 0.01) -> Alarm:
    """The alarm of reconstructions of images that the network has not seen: half of them tell center and spread.

    Arguments:
        estimates: batches of estimates (B, C, H, W) and their measurements.
        physics: the operator.
        flow: sees the estimates; an unfolded network's own last one, or the prior.
        level: of false alarms.

    Raises:
        ValueError: too few images for the level; the message says how many are needed.
    """
    features = torch.cat([alarm_features(x_hat, y, physics, flow) for x_hat, y in estimates])
    n_fit = len(features) // 2
    alarm = Alarm(features.shape[1], len(features) - n_fit, level).to(features.device)
    fitted, rest = features[:n_fit], features[n_fit:]
    alarm.center.copy_(fitted.mean(0))
    centered = (fitted - alarm.center).double()
    groups = slice(1, -1)
    covariance = torch.diag(centered.square().mean(0) + _SMALLEST**2)  # residual and density stand for themselves
    covariance[groups, groups] = centered[:, groups].T @ centered[:, groups] / n_fit
    covariance += 1e-6 * torch.eye(len(covariance)).to(covariance)
    alarm.whitener.copy_(torch.linalg.inv(torch.linalg.cholesky(covariance)).T)
    alarm.reference.copy_(alarm.scores(rest))
    return alarm


@torch.no_grad()
def alarm_features(x_hat: Tensor, y: Tensor, physics: Physics, flow: Flow) -> Tensor:
    """(B, 1 + groups + 1): logarithms of the residual's and the latents' mean squares, and the log-density per entry."""
    residual = (y - physics.A(x_hat)).abs().flatten(1).square().mean(1)
    height, width = (side - side % flow.divisor for side in x_hat.shape[-2:])
    z, logdet = flow(x_hat[..., :height, :width])
    groups = flow.latent_groups((height, width)).flatten().to(z.device)
    squares = z.new_zeros(len(z), flow.n_latent_groups).index_add_(1, groups, z.square()) / torch.bincount(groups)
    log_prob = (logdet - 0.5 * z.square().sum(1)) / z.shape[1]
    return torch.cat([(residual + _SMALLEST)[:, None].log(), (squares + _SMALLEST).log(), log_prob[:, None]], dim=1)


def residual_p_value(x_hat: Tensor, y: Tensor, physics: Physics) -> Tensor | None:
    """Chi-squared test whether the stated white Gaussian noise explains y - A x_hat: probability of at least as much, (B,).

    It is exact for the true image. An estimate has been fitted to the noise, so that its residual is smaller and the test
    rarely rejects; one that is smoother than the image, or of another operator or noise, leaves more. Entries without noise, as
    masked ones, are not counted. None where the noise is not white Gaussian noise of one known standard deviation above 0, or y
    is complex.

    Example:
        >>> from flowprox.operators import make_physics
        >>> x, physics = torch.rand(2, 3, 16, 16), make_physics("denoising", (3, 16, 16), sigma=0.1)
        >>> (residual_p_value(x, x + 0.15 * torch.randn_like(x), physics) < 0.001).tolist()
        [True, True]
    """
    noise = getattr(physics, "noise_model", None)
    if not isinstance(noise, deepinv.physics.GaussianNoise) or y.is_complex():
        return None
    sigma, mean = torch.as_tensor(noise.sigma).to(y), getattr(noise, "mean", 0.0)
    if sigma.numel() != 1 or not sigma > 0 or mean:
        return None
    residual = ((y - physics.A(x_hat)) / sigma).flatten(1).double()
    n = (residual != 0).sum(1)
    p = stats.chi2.sf(residual.square().sum(1).cpu().numpy(), n.clamp(min=1).cpu().numpy())
    return torch.from_numpy(p).to(residual)
