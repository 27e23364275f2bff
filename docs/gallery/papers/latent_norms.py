r"""
Norm of the latent over the iterations
======================================

How the norm of the latent grows while a solver explains a measurement, from starts of several sizes:

.. math:: z_0 \sim N(0, s^2 I), \qquad \min_z \|y - A g(z)\|^2

Compressed sensing with gamma = 0, so that whatever regularizes is the start. Left: PSNR and final norm over the norm of the
start. Middle and right: the norm over the iterations of L-BFGS and Adam. After Asim et al. 2020, Figs. 19 and 20: the norm
only grows, and a larger start ends in a larger latent and a worse image.
"""

from __future__ import annotations

import math

from common import Record, Scene, new_figure, rounded, scene_of

from flowprox.metrics import psnr
from flowprox.solvers import LBFGS, Adam, LatentMAP

NAMES = {"lbfgs": "L-BFGS", "adam": "Adam"}
STARTS = [0.0, 0.1, 0.3, 0.7, 1.0]
SCALES = {
    "smoke": {"image_size": 16, "n_images": 2, "m": 200, "lbfgs": 3, "adam": 3, "rate": 0.01, "starts": [0.0, 0.7]},
    "small": {"image_size": 64, "n_images": 3, "m": 2500, "lbfgs": 100, "adam": 100, "rate": 0.05, "starts": STARTS},
    "paper": {"image_size": 64, "n_images": 12, "m": 5000, "lbfgs": 200, "adam": 2000, "rate": 0.01, "starts": STARTS},
}


def measure(scene: Scene, unit: Record) -> Record:
    settings = scene.settings
    optimizer = Adam(settings["adam"], settings["rate"]) if unit["optimizer"] == "adam" else LBFGS(settings["lbfgs"])
    y, physics = scene.measured("compressed-sensing", m=settings["m"], noise_norm=0.1)
    start = unit["start"] or "zero"
    solution = LatentMAP(scene.flow, gamma=0.0, start=start, optimizer=optimizer, seed=scene.seed).solve(y, physics)
    assert solution.latent_norms is not None
    norms = solution.latent_norms.double().mean(dim=1)
    return {
        "start_norm": rounded(unit["start"] * math.sqrt(scene.x[0].numel())),
        "norms": rounded(norms),
        "final_norm": rounded(norms[-1]),
        "psnr": rounded(psnr(solution.estimate, scene.x).mean()),
        "truth_norm": rounded(scene.flow.encode(scene.x).norm(dim=1).mean().detach()),
    }


def main(arguments: list[str] | None = None) -> None:
    scene = scene_of("latent-norms", SCALES, arguments)
    units = [{"optimizer": name, "start": std} for name in NAMES for std in scene.settings["starts"]]
    records = scene.numbers(units, measure)
    by_optimizer = {name: [record for record in records if record["optimizer"] == name] for name in NAMES}
    figure, (left, *panels) = new_figure(3)
    right = left.twinx()
    at = [record["start_norm"] for record in by_optimizer["lbfgs"]]
    left.plot(at, [record["psnr"] for record in by_optimizer["lbfgs"]], "o-", color="C0")
    right.plot(at, [record["final_norm"] for record in by_optimizer["lbfgs"]], "s--", color="C1")
    left.set(xlabel="norm of the start", title="L-BFGS, where it ends")
    left.set_ylabel("PSNR (dB), circles", color="C0")
    right.set_ylabel("final norm of the latent, squares", color="C1")
    right.spines["top"].set_visible(False)
    ends = {}
    for axis, (name, lines) in zip(panels, by_optimizer.items(), strict=True):
        for record in lines:
            axis.plot(record["norms"], label=f"start {record['start']:g}")
        axis.axhline(records[0]["truth_norm"], color="0.5", linestyle=":", label="latent of the true image")
        axis.set(xlabel="iteration", ylabel="norm of the latent", title=NAMES[name])
        said = [f"start {r['start']:g}: {r['psnr']:.2f} dB, norm {r['final_norm']:.0f}" for r in lines]
        ends[name] = "; ".join(said)
    panels[-1].legend(fontsize=7)
    scene.save(
        figure,
        "Norm of the latent over the iterations",
        f"Compressed sensing, m = {scene.settings['m']}, gamma = 0, mean of {len(scene.x)} images. Starts are standard "
        f"deviations of the first latent. At the end, L-BFGS: {ends['lbfgs']}. Adam: {ends['adam']}. After Asim et al. 2020, "
        "Figs. 19 and 20.",
        f"Left: PSNR and final norm of the latent over the norm of the start, L-BFGS ({ends['lbfgs']}). "
        "Middle and right: the norm over iterations for L-BFGS and Adam, one line per start.",
    )


if __name__ == "__main__":
    main()
