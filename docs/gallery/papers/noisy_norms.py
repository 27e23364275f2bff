r"""
Noisy images lie far out in the latent space
============================================

Does the flow know a clean image from a noisy one? Histograms of the norm of the latent,

.. math:: \|f(x + \sigma n)\|, \qquad n \sim N(0, I),

beside sqrt(D), that of a latent drawn from the base density. After Asim et al. 2020, Fig. 50: the more noise, the larger
the norm.
"""

from __future__ import annotations

import math

import torch
from common import Record, Scene, new_figure, rounded, scene_of

SIGMAS = [0.0, 0.01, 0.05, 0.1]
SCALES = {
    "smoke": {"image_size": 16, "n_images": 3, "sigmas": [0.0, 0.1]},
    "small": {"image_size": 64, "n_images": 300, "sigmas": SIGMAS},
    "paper": {"image_size": 64, "n_images": 3000, "sigmas": SIGMAS},
}


@torch.no_grad()
def measure(scene: Scene, unit: Record) -> Record:
    n = torch.stack([torch.randn(scene.x.shape[1:], generator=generator) for generator in scene.generators()])
    noisy = scene.x + unit["sigma"] * n.to(scene.x)
    return {"norms": rounded(torch.cat([scene.flow.encode(x).norm(dim=1) for x in noisy.split(64)]))}


def main(arguments: list[str] | None = None) -> None:
    scene = scene_of("noisy-norms", SCALES, arguments)
    records = scene.numbers([{"sigma": sigma} for sigma in scene.settings["sigmas"]], measure)
    figure, (axis,) = new_figure(width=5.6, height=3.6)
    norms = torch.tensor([record["norms"] for record in records])
    edges = torch.logspace(math.log10(norms.min()), math.log10(1.01 * norms.max()), 61).tolist()
    means = []
    for record, values in zip(records, norms, strict=True):
        label = f"sigma {record['sigma']:g}" if record["sigma"] else "clean"
        axis.hist(values, bins=edges, alpha=0.6, label=label)
        means.append(f"{label} {values.mean():.0f}")
    axis.axvline(math.sqrt(scene.x[0].numel()), color="0.4", linestyle=":", label="sqrt(D)")
    axis.set(xlabel="norm of the latent", ylabel="images", xscale="log")
    axis.legend(fontsize=8)
    scene.save(
        figure,
        "Noisy images lie far out in the latent space",
        f"Norm of the latent of {len(scene.x)} images with white noise; means: {', '.join(means)}. After Asim et al. 2020, "
        "Fig. 50.",
        f"One histogram per noise level on a logarithmic axis, further right with more noise; means: {', '.join(means)}.",
    )


if __name__ == "__main__":
    main()
