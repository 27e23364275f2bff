r"""Calibrated error bars: for each pixel an interval around an estimate, with a promise that is kept on average.

    interval       x_hat -+ c s(x_hat, y)              s half-width that a small network predicts, c one number
    training of s  min E pinball(|x - x_hat| - s),     pinball(t) = max((1 - alpha) t, -alpha t)
    choice of c    the smallest with   n/(n + 1) R(c) + 1/(n + 1) <= alpha,
                   R(c) = mean over n images of the part of their pixels with |x - x_hat| > c s

Symbols: y measurement, x truth, x_hat the estimate of a method that stays as it is. For images exchangeable with the n
calibration images, the expected part of pixels outside is at most alpha (conformal risk control). The promise is about the
mean over pixels and images: it says nothing of a single pixel, of one image, or of images of another kind.

References:
    Angelopoulos, Bates, Fisch, Lei, Schuster 2022, Conformal risk control, https://arxiv.org/abs/2208.02814, Eq. (4), Thm. 1
    Koenker, Bassett 1978, Regression quantiles (the pinball loss)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from deepinv.models import Reconstructor
from deepinv.physics import LinearPhysics
from scipy.stats import rankdata
from torch import Tensor, nn

from flowprox.naming import Specified, require_count, require_positive
from flowprox.operators import PROBLEMS, Problem, measure_each, visibility
from flowprox.uncertainty.alarm import Alarm
from flowprox.uncertainty.checks import coverage, crps, ranks, required, tarp
from flowprox.unfolding import ConditionalDensity, ErrorDensity, Unfolded

_N_RANKED = 15  # samples of an image among which the truth is ranked
_SMALLEST = 1e-4  # in units of the image: a half-width of zero could not be scaled up


class ScaleNet(Specified, nn.Module):
    """Half-widths s(x_hat, y) > 0 from the estimate, A^T y - x_hat and A^T A 1: residual blocks at half the resolution.

    Arguments:
        n_channels: C of the images.
        hidden_channels: width.
        n_blocks: residual blocks of two 3x3 convolutions.

    Example:
        >>> x = torch.rand(2, 3, 10, 9)
        >>> ScaleNet(hidden_channels=8, n_blocks=1)(x, x, torch.ones(1, 1, 10, 9)).shape
        torch.Size([2, 3, 10, 9])
    """

    def __init__(self, n_channels: int = 3, hidden_channels: int = 48, n_blocks: int = 3) -> None:
        super().__init__()
        width = hidden_channels
        self.first = nn.Conv2d(4 * (2 * n_channels + 1), width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))
            for _ in range(n_blocks)
        )
        self.last = nn.Conv2d(width, 4 * n_channels, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.constant_(self.last.bias, -2.5)  # type: ignore[arg-type]  # softplus(-2.5) = 0.08: a usual error

    def forward(self, x_hat: Tensor, adjoint: Tensor, seen: Tensor) -> Tensor:
        """s (B, C, H, W) from x_hat and A^T y (B, C, H, W) and A^T A 1 (1 or B, 1, H, W)."""
        height, width = x_hat.shape[-2:]
        features = torch.cat([x_hat - 0.5, adjoint - x_hat, seen.expand(len(x_hat), -1, -1, -1)], dim=1)
        features = F.pad(features, (0, width % 2, 0, height % 2), mode="replicate")
        h = self.first(F.pixel_unshuffle(features, 2))
        for block in self.blocks:
            h = h + block(h)
        s = F.pixel_shuffle(self.last(F.relu(h)), 2)[..., :height, :width]
        return F.softplus(s) + _SMALLEST


class Intervals(Specified, nn.Module):
    """Half-widths of calibrated intervals for one network and problem.

    Saved as any model (``save_model``); its card says for which network (hash), problem and images it holds.

    Arguments:
        scale: network of the half-widths before calibration.
        alpha: one minus the coverage, in (0, 1).
        factor: c, by which they are multiplied.
        alarm: tells reconstructions that are unlike those of the calibration; None is none.
        density: of the error of the network's estimate, which samples are drawn from; None is none.

    Raises:
        ValueError: alpha is outside (0, 1), or the factor is not positive.
    """

    def __init__(
        self,
        scale: ScaleNet,
        alpha: float,
        factor: float = 1.0,
        alarm: Alarm | None = None,
        density: ErrorDensity | None = None,
    ) -> None:
        super().__init__()
        if not 0 < alpha < 1:
            raise ValueError(f"alpha must lie between 0 and 1, got {alpha}; 0.1 asks for intervals that hold 90 %")
        require_positive("factor", factor)
        self.scale, self.alpha, self.factor, self.alarm, self.density = scale, alpha, factor, alarm, density
        self.card: Any = None

    def forward(self, x_hat: Tensor, y: Tensor, physics: LinearPhysics) -> Tensor:
        """c s(x_hat, y), (B, C, H, W): the interval of a pixel is x_hat -+ this."""
        return self.factor * self.scale(x_hat, physics.A_adjoint(y), visibility(x_hat, physics))

    def check(self, sha256: str, problem: Problem, seed: int = 0) -> None:
        """Raise ``ValueError`` unless the card says that they were calibrated for the network of this hash, the problem, and
        the seed of what is drawn with the operator, such as a mask."""
        training, known = getattr(self.card, "training", {}), getattr(self.card, "problem", None)
        if not (known and training.get("model_sha256")):
            raise ValueError(
                "the card of the intervals names no network and problem; make them with flowprox calibrate"
            )
        if sha256 != training["model_sha256"]:
            raise ValueError(
                f"the intervals were calibrated for the network {training.get('model')} with the hash "
                f"{training['model_sha256'][:12]}, not for one with {sha256[:12]}; make others with flowprox calibrate"
            )
        calibrated = Problem(known["name"], known.get("parameters", {}))
        if json.loads(problem.to_json()) != json.loads(calibrated.to_json()):
            raise ValueError(
                f"the intervals were calibrated for {calibrated.label}, not for {problem.label}; give the same problem "
                "and parameters, or make others with flowprox calibrate"
            )
        if PROBLEMS[problem.name].drawn and seed != known.get("seed", 0):
            raise ValueError(
                f"the intervals were calibrated for the {PROBLEMS[problem.name].drawn} of operator_seed "
                f"{known.get('seed', 0)}, not {seed}"
            )


def conformal_factor(errors: Tensor, scales: Tensor, alpha: float) -> float:
    """The smallest c for which c s holds enough of n images' pixels, with the correction for n (conformal risk control).

    Arguments:
        errors: |x - x_hat| of the calibration images (n, ...).
        scales: s of the same shape, positive.
        alpha: largest expected part of pixels outside.

    Raises:
        ValueError: alpha is outside (0, 1), or there are too few images for it; the message says how many are needed.

    Example:
        >>> errors = torch.linspace(0, 1, 1000).repeat(99, 1)
        >>> round(conformal_factor(errors, torch.ones_like(errors), 0.1), 2)
        0.91
    """
    n = len(errors)
    required(n, alpha)
    ratios = (errors / scales).flatten().double()
    allowed = (alpha * (n + 1) - 1) / n  # of R(c)
    ordered = ratios.sort().values
    n_outside = int(allowed * len(ordered) + 1e-9)
    return max(float(ordered[len(ordered) - 1 - n_outside]), 1e-12)


@torch.no_grad()
def measured_estimates(
    method: Reconstructor, images: Tensor, physics: LinearPhysics, seeds: Sequence[int], batch_size: int = 32
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """x, y and x_hat of batches of images (B, C, H, W), whose noise has the seeds."""
    for start in range(0, len(images), batch_size):
        x = images[start : start + batch_size]
        y = measure_each(x, physics, seeds[start : start + batch_size])
        yield x, y, method(y, physics)


def fit_intervals(
    method: Reconstructor,
    physics: LinearPhysics,
    training: Tensor,
    calibration: Tensor,
    alpha: float = 0.1,
    n_steps: int = 600,
    seed: int = 0,
    callback: Callable[[str, int, int], None] | None = None,
) -> Intervals:
    """Train the half-widths of a method's estimates on some images, and calibrate them on others.

    Arguments:
        method: stays as it is.
        physics: operator with its noise.
        training: images (N, C, H, W) in [0, 1] for the half-widths.
        calibration: images (n, C, H, W) that neither the method nor the half-widths have seen.
        alpha: one minus the coverage.
        n_steps: of Adam, 16 images each.
        seed: of the noise, the first weights and the order.
        callback: called with what is being done, how much of it is done and how much there is.

    Raises:
        ValueError: alpha is outside (0, 1), there are too few calibration images for it, or no step.
    """
    required(len(calibration), alpha)
    require_count("n_steps", n_steps)
    show = callback or (lambda what, n, n_at_most: None)
    device = training.device
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        scale = ScaleNet(training.shape[1]).to(device)
    inputs, errors = _features(method, training, physics, seed, partial(show, "estimates to learn from"))
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(scale.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=n_steps)
    for step in range(n_steps):
        chosen = torch.randint(len(errors), (min(16, len(errors)),), generator=generator).to(device)
        excess = errors[chosen] - scale(inputs[0][chosen], inputs[1][chosen], inputs[2])
        loss = torch.maximum((1 - alpha) * excess, -alpha * excess).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        show("half-widths", step + 1, n_steps)
    scale.eval().requires_grad_(False)
    show_estimates = partial(show, "estimates to calibrate on")
    inputs, errors = _features(method, calibration, physics, seed + len(training), show_estimates)
    scales = torch.cat([scale(a, b, inputs[2]) for a, b in zip(inputs[0].split(32), inputs[1].split(32), strict=True)])
    return Intervals(scale, alpha, conformal_factor(errors, scales, alpha)).to(device)


def _features(
    method: Reconstructor, images: Tensor, physics: LinearPhysics, seed: int, show: Callable[[int, int], None]
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """What the half-widths are predicted from, and the absolute errors."""
    estimates, adjoints, errors = [], [], []
    for x, y, x_hat in measured_estimates(method, images, physics, range(seed, seed + len(images))):
        estimates.append(x_hat)
        adjoints.append(physics.A_adjoint(y))
        errors.append((x - x_hat).abs())
        show(sum(map(len, errors)), len(images))
    return (torch.cat(estimates), torch.cat(adjoints), visibility(images, physics)), torch.cat(errors)


@torch.no_grad()
def calibration_records(
    intervals: Intervals,
    network: Reconstructor,
    x: Tensor,
    estimates: Tensor,
    y: Tensor,
    physics: LinearPhysics,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """How a network's error bars fit the images they were not made of, in figures that a report can draw.

    Arguments:
        intervals: of the network and problem.
        network: what made the estimates; the density of the intervals, if there is one, is around them.
        x: the truth (B, C, H, W).
        estimates: x_hat of the same shape.
        y: measurements (B, ...).
        physics: their operator.
        seed: of the samples of a density.

    Returns:
        of each image: alpha, coverage, mean_half_width; widths, errors and coverages, means over each tenth of its pixels, the
        smallest half-widths first; with a density also crps, its mean over the pixels; ranks, of the truth among n_ranked
        samples, in a few smooth directions; and tarp, of batches of two images or more.
    """
    half_widths, errors = intervals(estimates, y, physics), (x - estimates).abs()
    order = half_widths.flatten(1).argsort(1)

    def tenths(values: Tensor) -> list[list[float]]:
        parts = values.flatten(1).gather(1, order).tensor_split(10, dim=1)
        return torch.stack([part.mean(1) for part in parts], dim=1).tolist()

    columns: dict[str, list[Any]] = {
        "alpha": [intervals.alpha] * len(x),
        "coverage": (errors <= half_widths).float().flatten(1).mean(1).tolist(),
        "mean_half_width": half_widths.flatten(1).mean(1).tolist(),
        "widths": tenths(half_widths),
        "errors": tenths(errors),
        "coverages": tenths((errors <= half_widths).float()),
    }
    if intervals.density is not None and isinstance(network, Unfolded):
        generator = torch.Generator().manual_seed(seed)
        samples = ConditionalDensity(network, intervals.density).sample(y, physics, _N_RANKED, generator)
        coarse = torch.randn(
            4, *x.shape[1:2], 4, 4, generator=torch.Generator().manual_seed(0)
        )  # the same for all images
        directions = F.interpolate(coarse, x.shape[-2:]).flatten(1).T.to(x)
        columns["n_ranked"] = [_N_RANKED] * len(x)
        columns["ranks"] = ranks(samples.flatten(2) @ directions, x.flatten(1) @ directions).tolist()
        columns["crps"] = crps(samples, x).flatten(1).mean(1).tolist()
        if len(x) > 1:
            columns["tarp"] = tarp(samples, x, generator).tolist()
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


@torch.no_grad()
def measured_intervals(
    intervals: Intervals, method: Reconstructor, physics: LinearPhysics, images: Tensor, seed: int = 0
) -> dict[str, float]:
    """``interval_statistics`` of intervals on test images (B, C, H, W), whose noise has the seeds seed, seed + 1, ...."""
    widths, errors = [], []
    for x, y, x_hat in measured_estimates(method, images, physics, range(seed, seed + len(images))):
        widths.append(intervals(x_hat, y, physics))
        errors.append((x - x_hat).abs())
    return interval_statistics(torch.cat(widths), torch.cat(errors))


def interval_statistics(half_widths: Tensor, errors: Tensor) -> dict[str, float]:
    """What half-widths (B, ...) are worth beside errors |x - x_hat| of test images.

    Returns:
        mean_half_width (in units of the image), coverage, coverage_5 (5 % quantile over images), coverage_of_largest (of the
        tenth of all entries with the largest errors), rank_correlation (Spearman's, of half-width and error over entries; 0 for
        half-widths that are all the same).
    """
    per_image = coverage(-half_widths, half_widths, errors)
    n_large = max(1, round(0.1 * errors.numel()))
    large = errors >= errors.flatten().kthvalue(errors.numel() + 1 - n_large).values
    order = np.stack([rankdata(t.detach().flatten().cpu().numpy()) for t in (half_widths, errors)])  # ties share a rank
    return {
        "mean_half_width": float(half_widths.mean()),
        "coverage": float(per_image.mean()),
        "coverage_5": float(per_image.quantile(0.05)),
        "coverage_of_largest": float((errors <= half_widths)[large].double().mean()),
        "rank_correlation": float(torch.corrcoef(torch.from_numpy(order))[0, 1].nan_to_num(0.0)),
    }
