r"""
Random and natural directions of the latent space
=================================================

How much the image changes with the latent,

.. math:: \|g(z + t d) - g(z)\| \text{ over } t, \qquad \|d\| = 1,

with d random, or towards the latent of another image. After Asim et al. 2020, Fig. 51: a step of the same length changes the
image less along a random direction, so that lowering :math:`\|z\|` takes noise away first.
"""

from __future__ import annotations

import torch
from common import Record, Scene, new_figure, rounded, scene_of

from flowprox.summary import confidence

LENGTHS = [0.0, 2.0, 5.0, 10.0, 20.0, 30.0, 40.0, 50.0]
SCALES = {
    "smoke": {"image_size": 16, "n_images": 3, "lengths": [0.0, 2.0]},
    "small": {"image_size": 64, "n_images": 100, "lengths": LENGTHS},
    "paper": {"image_size": 64, "n_images": 100, "lengths": LENGTHS},
}


@torch.no_grad()
def measure(scene: Scene, unit: Record) -> Record:
    z, size = scene.flow.encode(scene.x), (scene.x.shape[-2], scene.x.shape[-1])
    if unit["direction"] == "random":
        d = torch.randn(z.shape, generator=scene.generator(0)).to(z)
    else:
        d = z.roll(1, dims=0) - z
    d = d / d.norm(dim=1, keepdim=True)
    moved = [scene.flow.decode(z + length * d, size) for length in scene.settings["lengths"]]
    return {"changes": [rounded((x - scene.x).flatten(1).norm(dim=1)) for x in moved]}


def main(arguments: list[str] | None = None) -> None:
    scene = scene_of("perturbations", SCALES, arguments)
    records = scene.numbers([{"direction": kind} for kind in ("random", "natural")], measure)
    lengths = scene.settings["lengths"]
    figure, (axis,) = new_figure(width=5.6, height=3.6)
    ends = []
    for record in records:
        means, halves = zip(*(confidence(values) for values in record["changes"]), strict=True)
        axis.plot(lengths, means, label=record["direction"])
        low, high = ([m + sign * (h or 0) for m, h in zip(means, halves, strict=True)] for sign in (-1, 1))
        axis.fill_between(lengths, low, high, alpha=0.25)
        ends.append(f"{record['direction']} {means[-1]:.3g}")
    axis.set(xlabel="length of the step in latent space", ylabel="norm of the change of the image")
    axis.legend(title="direction", fontsize=8)
    scene.save(
        figure,
        "Random and natural directions of the latent space",
        f"Norm of the change of the image, mean of {len(scene.x)} images with its 95 % confidence interval; at length "
        f"{lengths[-1]:g}: {', '.join(ends)}. After Asim et al. 2020, Fig. 51.",
        f"Change of the image over the length of the step, two lines: {', '.join(ends)} at the longest step.",
    )


if __name__ == "__main__":
    main()
