r"""
Latents beside the standard normal
==================================

Are the latents of images what the prior takes them for?

.. math:: z = f(\tilde x), \qquad \tilde x = (\lfloor 256 x \rfloor + u) / 256, \qquad u \text{ uniform in } [0, 1)

where :math:`p(z) = N(0, I)` has mean 0, deviation 1, excess kurtosis 0 and norm :math:`\sqrt D \pm 1/\sqrt 2`. Shown are all
values, mean and deviation of each channel of each level over images and pixels, and the norms; what likelihood training has
not made Gaussian is what MAP in latent space gets wrong. After Asim et al. 2020, App. E, and Kingma and Dhariwal 2018, Sec. 5.
"""

from __future__ import annotations

import math

import torch
from common import Record, Scene, new_figure, rounded, scene_of
from scipy.stats import kurtosis, sem

from flowprox.flows import frozen

EDGES = torch.linspace(-5.0, 5.0, 81)
SCALES = {
    "smoke": {"image_size": 16, "n_images": 3},
    "small": {"image_size": 64, "n_images": 1500},
    "paper": {"image_size": 64, "n_images": 1500},
}


@torch.no_grad()
def measure(scene: Scene, unit: Record) -> Record:
    u = torch.stack([torch.rand(scene.x.shape[1:], generator=generator) for generator in scene.generators()])
    dequantized = ((scene.x * 256).floor().clamp_(max=255) + u.to(scene.x)) / 256
    with frozen(scene.flow):
        parts = [(scene.flow.encode_image(x), scene.flow.bits_per_dimension(x)) for x in dequantized.split(64)]
    z, bits = torch.cat([part[0] for part in parts]).double().cpu(), torch.cat([part[1] for part in parts]).double()
    groups = scene.flow.latent_groups((z.shape[-2], z.shape[-1])).cpu()
    channels = [z[:, groups == group] for group in groups.unique().tolist()]
    inside = torch.histogram(z.flatten().float(), EDGES).hist
    return {
        "bits_per_dimension": rounded(bits.mean()),
        "bits_standard_error": rounded(float(sem(bits.cpu(), ddof=0))),
        # a channel of level l has 1 / 4^l of the image's pixels
        "levels": [round(math.log(z[0, 0].numel() / values.shape[1], 4)) for values in channels],
        "means": rounded([values.mean() for values in channels]),
        "deviations": rounded([values.std(correction=0) for values in channels]),
        "kurtoses": rounded([float(kurtosis(values.flatten())) for values in channels]),
        "density": rounded(inside / (z.numel() * (EDGES[1] - EDGES[0]))),
        "beyond": rounded((z.abs() > EDGES[-1]).double().mean()),
        "norms": rounded(z.flatten(1).norm(dim=1)),
    }


def main(arguments: list[str] | None = None) -> None:
    scene = scene_of("latent-statistics", SCALES, arguments)
    (record,) = scene.numbers([{"base": "standard normal"}], measure)
    typical = math.sqrt(scene.x[0].numel())
    figure, (values, spread, norms) = new_figure(3, width=3.6)
    centers = (EDGES[1:] + EDGES[:-1]) / 2
    values.plot(centers, record["density"], label="latents")
    values.plot(centers, (-centers.square() / 2).exp() / math.sqrt(2 * math.pi), color="0.4", ls=":", label="N(0, 1)")
    values.set(xlabel="latent value", ylabel="density", yscale="log", ylim=(1e-6, 1))
    for level in sorted(set(record["levels"])):
        chosen = [i for i, other in enumerate(record["levels"]) if other == level]
        points = [[record[name][i] for i in chosen] for name in ("means", "deviations")]
        spread.scatter(*points, s=18, label=f"level {level}")
    spread.plot(0, 1, "k+", markersize=12)
    spread.set(xlabel="mean of a channel", ylabel="standard deviation")
    norms.hist(record["norms"], bins=40, label="images")
    norms.axvline(typical, color="0.4", linestyle=":", label="sqrt(D)")
    norms.set(xlabel="norm of the latent", ylabel="images")
    for axis in (values, spread, norms):
        axis.legend(fontsize=8)
    facts = (
        f"{len(scene.x)} images, {record['bits_per_dimension']:.3f} bits per dimension; mean norm "
        f"{sum(record['norms']) / len(scene.x):.1f} (sqrt(D) = {typical:.1f}); deviations of the channels "
        f"{min(record['deviations']):.2f} to {max(record['deviations']):.2f}"
    )
    scene.save(
        figure,
        "Latents beside the standard normal",
        f"All values, mean and deviation of each channel, and norms: {facts}.",
        f"Three panels: density of latent values with that of N(0, 1), a point per channel, a histogram of norms. {facts}.",
    )


if __name__ == "__main__":
    main()
