r"""Have the chains mixed, and how many independent draws are they worth?

    R-hat = sqrt(((n - 1) / n W + B / n) / W)         ESS = m n / tau,   tau = 1 + 2 sum_t rho_t

Symbols: m chains of n draws of one scalar, B / n variance of the chains' means, W mean of their variances, rho_t
autocorrelation at lag t, tau autocorrelation time. Every chain is split in two, so that a drift within a chain is seen
too, and the draws are replaced by the normal scores of their ranks, so that heavy tails do not hide a difference.

References:
    Vehtari, Gelman, Simpson, Carpenter, Bürkner 2021, Rank-normalization, folding, and localization: an improved R-hat
    for assessing convergence of MCMC, https://arxiv.org/abs/1903.08008
    Geyer 1992, Practical Markov chain Monte Carlo, https://doi.org/10.1214/ss/1177011137
"""

from __future__ import annotations

import math

import torch
from scipy.stats import rankdata
from torch import Tensor


def split_r_hat(draws: Tensor) -> Tensor:
    """Rank-normalized split R-hat (...), float64, of draws (..., n_chains, n_draws): 1 for chains that sample the same
    distribution, more for others; NaN where a draw is not finite or all draws are equal.

    The larger of the values for the location and for the scale (draws folded around their median), Vehtari et al.
    2021, who ask for less than 1.01. One chain will do, it is split; fewer than four draws per chain are a ValueError.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> draws = torch.randn(4, 500, generator=generator)
        >>> bool(split_r_hat(draws) < 1.01), bool(split_r_hat(draws + torch.arange(4.0)[:, None]) > 1.1)
        (True, True)
    """
    halves = _split(draws)
    ordered = halves.flatten(-2).sort(dim=-1).values
    n = ordered.shape[-1]
    median = (0.5 * (ordered[..., (n - 1) // 2] + ordered[..., n // 2]))[..., None, None]
    folded = (halves - median).abs()
    return torch.maximum(_r_hat(_normal_scores(halves)), _r_hat(_normal_scores(folded)))


def effective_sample_size(draws: Tensor) -> Tensor:
    """Bulk effective sample size (...) of draws as for ``split_r_hat``: how many independent ones give the mean as precisely.

    That of the rank-normalized split chains, with the sum over lags cut by Geyer's initial monotone sequence (Vehtari et al.
    2021). It can exceed the number of draws for chains that alternate; it is bounded by
    N log10(N), N = n_chains n_draws.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> draws = torch.randn(4, 500, generator=generator)
        >>> bool(effective_sample_size(draws) > 1500), bool(effective_sample_size(draws.cumsum(-1)) < 50)
        (True, True)
    """
    draws = _normal_scores(_split(draws))
    n_chains, n = draws.shape[-2:]
    within, total = _variances(draws)
    # 1/n sum_i d_i d_(i+t) for t = 0 ... n - 1, by the Fourier transform
    spectrum = torch.fft.rfft(draws - draws.mean(dim=-1, keepdim=True), n=2 * n)
    autocovariance = torch.fft.irfft(spectrum.abs().square(), n=2 * n)[..., :n] / n
    # autocorrelation combined over the chains as in Vehtari et al. 2021; the lags in pairs
    rho = 1 - (within[..., None] - autocovariance.mean(dim=-2)) / total[..., None]
    rho[..., 0] = 1.0
    n_pairs = max(1, (n - 1) // 2)
    pairs = rho[..., : 2 * n_pairs].unflatten(-1, (-1, 2)).sum(dim=-1)
    positive = (pairs > 0).long().cumprod(dim=-1)
    positive[..., -1] = 0
    monotone = pairs.cummin(dim=-1).values * positive
    # of the pair at which the sum is cut the even lag still counts, once (Stan's and ArviZ's estimate)
    next_lag = rho.gather(-1, 2 * positive.sum(dim=-1, keepdim=True)).squeeze(-1).clamp(min=0)
    n_total = n_chains * n
    tau = (-1 + 2 * monotone.sum(dim=-1) + next_lag).clamp(min=1 / math.log10(n_total))
    return torch.where(within > 0, n_total / tau, torch.full_like(tau, math.nan))


def _split(draws: Tensor) -> Tensor:
    """Every chain as two, (..., 2 n_chains, n_draws // 2) in float64; the middle draw of an odd number is left out."""
    if draws.ndim < 2 or draws.shape[-1] < 4 or draws.shape[-2] < 1:
        wanted = "(..., n_chains, n_draws) with at least 4 draws"
        raise ValueError(f"draws must have shape {wanted}, got {tuple(draws.shape)}; sample longer")
    half = draws.shape[-1] // 2
    draws = draws.detach().to(torch.float64)
    return torch.cat([draws[..., :half], draws[..., -half:]], dim=-2)


def _normal_scores(draws: Tensor) -> Tensor:
    """Normal scores of the ranks over all chains (Vehtari et al. 2021); ties share their mean rank."""
    pooled = draws.flatten(-2)
    rank = torch.as_tensor(rankdata(pooled.cpu().numpy(), axis=-1)).to(pooled)
    scores = torch.special.ndtri((rank - 0.375) / (pooled.shape[-1] + 0.25)).view_as(draws)
    finite = torch.isfinite(pooled).all(dim=-1)[..., None, None]
    return torch.where(finite, scores, torch.full_like(scores, math.nan))


def _variances(draws: Tensor) -> tuple[Tensor, Tensor]:
    """W and (n - 1) / n W + B / n of (..., m, n) draws; R-hat is the root of the second over the first."""
    n = draws.shape[-1]
    within = draws.var(dim=-1).mean(dim=-1)
    return within, (n - 1) / n * within + draws.mean(dim=-1).var(dim=-1)


def _r_hat(draws: Tensor) -> Tensor:
    within, total = _variances(draws)
    return torch.sqrt(total / within)
