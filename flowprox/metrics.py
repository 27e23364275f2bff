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

from flowprox.naming import Values

_SSIM_WINDOW = 11
_STRIP = 2**18  # pixels that are looked at together: memory does not grow with the image


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

    That of scikit-image with ``gaussian_weights`` and without ``use_sample_covariance``; arguments as in ``psnr``.

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
    from skimage.metrics import structural_similarity  # whoever measures no SSIM does not wait for it

    x_hat, x = _prepared(x_hat, x, clip)
    if min(x.shape[-2:]) < _SSIM_WINDOW:
        raise ValueError(f"ssim needs images of at least {_SSIM_WINDOW}x{_SSIM_WINDOW}, got {tuple(x.shape)}")
    options: Values = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1}
    height, width = x.shape[-2:]
    n, inside = max(1, _STRIP // width), slice(_SSIM_WINDOW // 2, -(_SSIM_WINDOW // 2))
    sums = [0.0] * len(x)
    for i, (a, b) in enumerate(zip(x_hat.cpu().numpy(), x.cpu().numpy(), strict=True)):
        for top in range(0, height - _SSIM_WINDOW + 1, n):
            strip = slice(top, top + n + _SSIM_WINDOW - 1)
            similarity = structural_similarity(a[:, strip], b[:, strip], channel_axis=0, full=True, **options)[1]
            sums[i] += float(similarity[:, inside, inside].sum())
    return x.new_tensor(sums) / (x.shape[1] * (height - _SSIM_WINDOW + 1) * (width - _SSIM_WINDOW + 1))


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
