"""Measuring reconstructions, and showing them: metrics, records, report, demo."""

from flowprox.evaluation.metrics import psnr, ssim

__all__ = ["psnr", "ssim"]
