"""Draws the picture of docs/guide/uncertainty.md: what the shipped calibrations say of a bundled portrait.

    python docs/figures/make_uncertainty_figure.py docs/figures/uncertainty.png

One row per problem: measurement, estimate, two samples, their deviation over 64 samples, the half-width of the calibrated
interval and the error. The last three share a scale.
"""

from __future__ import annotations

import sys

import matplotlib.pyplot as plt
import torch
from PIL import Image

from flowprox import load_model, make_physics
from flowprox.samples import sample_images
from flowprox.unfolding import ConditionalDensity

NETWORKS = ("denoising", "deblurring", "inpainting")


def main(out: str) -> None:
    x = dict(sample_images())["grace-hopper"][None]  # US Navy, public domain
    figure, axes = plt.subplots(len(NETWORKS), 7, figsize=(11.5, 5.2), layout="constrained")
    for row, name in zip(axes, NETWORKS, strict=True):
        network = load_model(f"unfolded-{name}-faces64")
        calibration = load_model(f"unfolded-{name}-faces64-intervals")
        physics = make_physics(name, (3, 64, 64), **network.card.problem["parameters"])
        y = physics(x, seed=0)
        with torch.no_grad():
            x_hat = network(y, physics)
            density = ConditionalDensity(network, calibration.density)
            samples = density.sample(y, physics, 64, torch.Generator().manual_seed(0))
            half_width = calibration(x_hat, y, physics)
        pictures = {"measured": y, "estimate": x_hat, "a sample": samples[0], "another": samples[1]}
        maps = {"deviation of samples": samples.std(0), "half-width, 90 %": half_width, "error": (x - x_hat).abs()}
        largest = float(half_width.mean(1).quantile(0.995))
        for axis, (title, picture) in zip(row, (pictures | maps).items(), strict=True):
            if title in maps:
                axis.imshow(picture[0].mean(0), cmap="magma", vmin=0, vmax=largest)
            else:
                axis.imshow(picture[0].clamp(0, 1).permute(1, 2, 0))
            axis.set(xticks=[], yticks=[])
            if name == NETWORKS[0]:
                axis.set_title(title, fontsize=9)
        row[0].set_ylabel(name, fontsize=9)
    figure.savefig(out, dpi=80)
    Image.open(out).convert("RGB").quantize(256).save(out, optimize=True)  # a quarter of the bytes


if __name__ == "__main__":
    main(sys.argv[1])
