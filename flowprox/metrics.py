"""How close an estimate is to the truth: PSNR and SSIM, per image.

    PSNR = -10 log10 mean((x_hat - x)^2)                                  in dB, for images in [0, 1]
    SSIM = mean over windows of
           (2 m m' + c1)(2 cov + c2) / ((m^2 + m'^2 + c1)(s^2 + s'^2 + c2))

Symbols: x truth, x_hat estimate, both (B, C, H, W) with data range 1; m, s^2 mean and variance in a window, primes
for x_hat, cov the covariance, c1 = 0.01^2, c2 = 0.03^2.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SSIM_WINDOW = 11
_SSIM_SIGMA = 1.5
_STRIP = 2**16  # pixels that are looked at together: they fit in the cache, and memory does not grow with the image


def psnr(x_hat: Tensor, x: Tensor, *, clip: bool = True) -> Tensor:
    """Peak signal-to-noise ratio in dB, mean square error over all channels and pixels of one image.

    Arguments:
        x_hat: estimate (B, C, H, W).
        x: truth (B, C, H, W) in [0, 1].
        clip: clip the estimate to [0, 1] first, as an image that is shown would be: the figure of every table.

    Returns:
        (B,) in dB; infinite where both are equal, so that a mean over images needs a limit (``.clamp(max=...)``).

    Raises:
        ValueError: shapes differ or are not (B, C, H, W).

    Example:
        >>> import torch
        >>> x = torch.zeros(1, 3, 16, 16)
        >>> round(float(psnr(x + 0.1, x)), 3)
        20.0
    """
    x_hat, x = _prepared(x_hat, x, clip)
    return -10 * (x_hat - x).square().flatten(1).mean(1).log10()


def ssim(x_hat: Tensor, x: Tensor, *, clip: bool = True) -> Tensor:
    """Structural similarity (B,), at most 1: Gaussian window of 11x11, sigma 1.5, mean over windows inside and channels.

    Equal to ``skimage.metrics.structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)``; arguments
    as in ``psnr``.

    Raises:
        ValueError: shapes differ, are not (B, C, H, W), or the images are smaller than the window.

    References:
        Wang, Bovik, Sheikh, Simoncelli 2004, Image quality assessment: from error visibility to structural similarity,
        https://doi.org/10.1109/TIP.2003.819861, Eq. (13)

    Example:
        >>> import torch
        >>> x = torch.rand(1, 3, 16, 16)
        >>> round(float(ssim(x, x)), 3)
        1.0
    """
    x_hat, x = _prepared(x_hat, x, clip)
    if min(x.shape[-2:]) < _SSIM_WINDOW:
        raise ValueError(f"ssim needs images of at least {_SSIM_WINDOW}x{_SSIM_WINDOW}, got {tuple(x.shape[-2:])}")
    taps = torch.arange(_SSIM_WINDOW, dtype=x.dtype, device=x.device) - _SSIM_WINDOW // 2
    taps = torch.exp(-0.5 * (taps / _SSIM_SIGMA).square())
    weights = (taps / taps.sum()).tolist()
    a, b = x_hat.flatten(0, 1), x.flatten(0, 1)
    height, width = x.shape[-2:]
    n, rows = max(1, _STRIP // (height * width)), max(1, _STRIP // width)
    sums = x.new_zeros(len(a))
    for i in range(0, len(a), n):
        for top in range(0, height - _SSIM_WINDOW + 1, rows):
            strip = slice(i, i + n), slice(top, top + rows + _SSIM_WINDOW - 1)
            sums[i : i + n] += _similarity(a[strip], b[strip], weights).flatten(1).sum(1)
    n_windows = (height - _SSIM_WINDOW + 1) * (width - _SSIM_WINDOW + 1)
    return sums.view(x.shape[:2]).mean(1) / n_windows


def _similarity(a: Tensor, b: Tensor, weights: list[float]) -> Tensor:
    """SSIM (Wang et al. 2004, Eq. 13) of every window inside pictures (N, H, W)."""
    mean_a, mean_b = _window_means(a, weights), _window_means(b, weights)
    var_a = (_window_means(a * a, weights) - mean_a * mean_a).clamp_min(0)
    var_b = (_window_means(b * b, weights) - mean_b * mean_b).clamp_min(0)
    cov = _window_means(a * b, weights) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    numerator = (2 * mean_a * mean_b + c1) * (2 * cov + c2)
    return numerator / ((mean_a * mean_a + mean_b * mean_b + c1) * (var_a + var_b + c2))


def _window_means(x: Tensor, weights: list[float]) -> Tensor:
    """Weighted means over all windows inside (N, H, W), by rows and then by columns."""
    for axis in (1, 2):
        n = x.shape[axis] - len(weights) + 1
        means = x.narrow(axis, 0, n) * weights[0]
        for k, weight in enumerate(weights[1:], 1):
            means.add_(x.narrow(axis, k, n), alpha=weight)
        x = means
    return x


def best_scaled(x_hat: Tensor, x: Tensor) -> Tensor:
    """s x_hat with the positive number s per image that brings it closest to x: <x_hat, x> / ||x_hat||^2.

    For measurements that do not tell the scale of the image, such as signs; both (B, C, H, W).

    Example:
        >>> import torch
        >>> x = torch.rand(2, 3, 4, 4)
        >>> bool(torch.allclose(best_scaled(0.1 * x, x), x))
        True
    """
    fit = (x_hat * x).flatten(1).sum(1) / x_hat.square().flatten(1).sum(1).clamp_min(torch.finfo(x_hat.dtype).tiny)
    return fit.clamp_min(0).view(-1, 1, 1, 1) * x_hat


def _prepared(x_hat: Tensor, x: Tensor, clip: bool) -> tuple[Tensor, Tensor]:
    if x_hat.shape != x.shape or x.ndim != 4:
        raise ValueError(f"estimate and truth must both be (B, C, H, W), got {tuple(x_hat.shape)} and {tuple(x.shape)}")
    x_hat, x = x_hat.detach().double(), x.detach().double()
    return (x_hat.clamp(0, 1) if clip else x_hat), x
