r"""Checks of stated uncertainties against truths: they hold for an honest method and fail for one that is too sure or biased.

    rank       r = #{l : s(x_l) < s(x)},  x_1 .. x_L samples of p(x | y)           uniform on 0 .. L if honest
    TARP       f = (#{l : d(x_l, r) < d(x, r)} + u) / (L + 1),  r a reference      uniform on [0, 1] if honest
    CRPS       mean |x_l - x| - 1/2 mean |x_l - x_l'|                              on average lowest for the true posterior
    coverage   part of the pixels of an image that its interval holds

Symbols: x truth (B, ...), x_l samples (L, B, ...), s a statistic of an image, d the Euclidean distance, u uniform on [0, 1).
Lemos et al. have the count over L in the place of f, which takes L + 1 values and is uniform only for many samples.

References:
    Talts et al. 2018, Validating Bayesian inference algorithms with simulation-based calibration, https://arxiv.org/abs/1804.06788
    Lemos et al. 2023, Sampling-based accuracy testing of posterior estimators for general inference,
    https://arxiv.org/abs/2302.03026, Algorithm 2
    Gneiting, Raftery 2007, Strictly proper scoring rules, prediction, and estimation, Eq. (21)
    Angelopoulos, Bates 2021, A gentle introduction to conformal prediction, https://arxiv.org/abs/2107.07511, Sec. 3.2
"""

from __future__ import annotations

import numpy as np
import torch
from scipy import stats
from torch import Tensor

__all__ = ["coverage", "coverage_limits", "crps", "rank_p_value", "ranks", "tarp", "uniform_p_value"]


def ranks(samples: Tensor, truth: Tensor) -> Tensor:
    """How many samples (L, B, ...) lie below the truth (B, ...), 0 to L entry by entry; of ties one half counts, at random.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> ranks(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([2.5])).tolist()
        [2]
    """
    _check(samples, truth)
    below, ties = (samples < truth).sum(0), (samples == truth).sum(0)
    return below + (torch.rand(truth.shape, device=truth.device) * (ties + 1)).floor().long()


def rank_p_value(found: Tensor, n_samples: int, n_bins: int = 10) -> float:
    """Chi-squared test that ranks (N,) of independent images, not of all pixels of an image, are uniform on 0 .. ``n_samples``.

    Arguments:
        found: the ranks.
        n_samples: L.
        n_bins: bins of ranks; at most L + 1 and few enough for five expected in each.

    Raises:
        ValueError: too few ranks for the bins; the message says how many are needed.
    """
    n_bins = min(n_bins, n_samples + 1)
    values = found.flatten().cpu().numpy()
    if len(values) < 5 * n_bins:
        raise ValueError(f"{len(values)} ranks are too few for {n_bins} bins: use {5 * n_bins} or fewer bins")
    edges = np.round(np.linspace(0, n_samples + 1, n_bins + 1)).astype(int)
    counts, _ = np.histogram(values, edges)
    expected = len(values) * np.diff(edges) / (n_samples + 1)
    return float(stats.chisquare(counts, expected).pvalue)


def tarp(samples: Tensor, truth: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """For each image the part of its samples that lie nearer to a random reference than the truth does, spread over [0, 1].

    Uniform on [0, 1) over images if the samples are of the posterior. The reference is the truth of another image of the batch,
    drawn at random. It does not depend on y, so that samples of the prior pass too: ``crps`` tells these apart.

    Arguments:
        samples: (L, B, ...).
        truth: (B, ...), B at least 2.
        generator: of the references and of u, on the CPU.

    Raises:
        ValueError: the shapes do not fit, or there is one image only.
    """
    _check(samples, truth)
    n = len(truth)
    if n < 2:
        raise ValueError("tarp takes its references from other images of the batch: give at least two")
    shift = torch.randint(1, n, (n,), generator=generator)
    reference = truth[((torch.arange(n) + shift) % n).to(truth.device)]
    of_truth = (truth - reference).flatten(1).norm(dim=1)
    of_samples = (samples - reference).flatten(2).norm(dim=2)
    u = torch.rand(n, generator=generator, dtype=torch.float64).to(truth.device)
    return ((of_samples < of_truth).sum(0) + u) / (len(samples) + 1)


def uniform_p_value(values: Tensor) -> float:
    """Kolmogorov and Smirnov's test that values (N,) are uniform on [0, 1]."""
    return float(stats.kstest(values.flatten().cpu().double().numpy(), "uniform").pvalue)


def crps(samples: Tensor, truth: Tensor) -> Tensor:
    """Continuous ranked probability score of L >= 2 samples (L, B, ...), per entry of the truth (B, ...), in its unit.

    Its mean is what counts. The pairs' term is the unbiased one, divided by L (L - 1).

    Example:
        >>> samples = torch.tensor([[0.0], [1.0]])
        >>> crps(samples, torch.tensor([0.5])).tolist()
        [0.0]
    """
    _check(samples, truth)
    n = len(samples)
    if n < 2:
        raise ValueError("crps needs at least two samples")
    ordered = samples.sort(dim=0).values
    weights = (2 * torch.arange(n, device=truth.device, dtype=truth.dtype) - n + 1).view(-1, *[1] * truth.ndim)
    pairs = (weights * ordered).sum(0) / (n * (n - 1))  # half the mean |x_l - x_l'| over l != l'
    return (samples - truth).abs().mean(0) - pairs


def coverage(lower: Tensor, upper: Tensor, truth: Tensor) -> Tensor:
    """Part of each image's entries (B, ...) that lie in their interval, (B,)."""
    return ((truth >= lower) & (truth <= upper)).double().flatten(1).mean(1)


def coverage_limits(n: int, alpha: float, probability: float = 0.99) -> tuple[float, float]:
    """Within which limits the coverage of a split-conformal interval lies, calibrated on n exchangeable values.

    The coverage is Beta(n + 1 - l, l) with l = floor((n + 1) alpha), over draws of the calibration set. That is for one value
    per image, which its interval holds or not; the part of the pixels that ``conformal_factor`` controls varies otherwise.

    Arguments:
        n: calibration values, of distinct images.
        alpha: one minus the nominal coverage, in (0, 1).
        probability: of lying within the limits.

    Raises:
        ValueError: alpha is outside (0, 1), or n is too small for it; the message says how many are needed.

    Example:
        >>> low, high = coverage_limits(1000, 0.1)
        >>> 0.87 < low < 0.9 < high < 0.93
        True
    """
    left = required(n, alpha)
    tail = (1 - probability) / 2
    low, high = stats.beta.ppf([tail, 1 - tail], n + 1 - left, left)
    return float(low), float(high)


def required(n: int, alpha: float) -> int:
    """floor((n + 1) alpha), how many of n calibration values may lie outside; an error where that is none."""
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie between 0 and 1, got {alpha}; 0.1 asks for intervals that hold 90 %")
    left = int(np.floor((n + 1) * alpha + 1e-9))
    if left < 1:
        raise ValueError(
            f"alpha {alpha} needs at least {int(np.ceil(1 / alpha - 1 - 1e-9))} calibration images, got {n}"
        )
    return left


def _check(samples: Tensor, truth: Tensor) -> None:
    if samples.ndim < 2 or samples.shape[1:] != truth.shape:
        raise ValueError(
            f"samples must be (L, B, ...) for a truth (B, ...), got {tuple(samples.shape)} and {tuple(truth.shape)}"
        )
