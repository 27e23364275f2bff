"""Measuring reconstructions, and showing them: metrics, records, report, demo."""

from flowprox.metrics import psnr, ssim

__all__ = ["psnr", "ssim"]
