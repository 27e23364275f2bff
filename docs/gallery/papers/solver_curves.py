r"""
L-BFGS against Adam
===================

What a gradient evaluation buys: the relative residual on the way of two solvers to

.. math:: \min_z \|y - A g(z)\|^2

in compressed sensing from z = 0 with gamma = 0, every image by itself. An iteration of Adam is one evaluation of objective
and gradient, one of L-BFGS a little more than one (its line search). After Asim et al. 2020, Fig. 18 (right).
"""

from __future__ import annotations

from common import Record, Scene, new_figure, rounded, scene_of

from flowprox.metrics import psnr
from flowprox.solvers import LBFGS, Adam, LatentMAP

RATES = [0.01, 0.03, 0.1]
SCALES = {
    "smoke": {"image_size": 16, "n_images": 1, "m": 200, "n_iterations": 3, "rates": [0.01]},
    "small": {"image_size": 64, "n_images": 3, "m": 1000, "n_iterations": 200, "rates": RATES},
    "paper": {"image_size": 64, "n_images": 12, "m": 5000, "n_iterations": 2000, "rates": RATES},
}


def measure(scene: Scene, unit: Record) -> Record:
    n, rate = scene.settings["n_iterations"], unit["learning_rate"]
    y, physics = scene.measured("compressed-sensing", m=scene.settings["m"], noise_norm=0.1)
    solution = LatentMAP(scene.flow, gamma=0.0, optimizer=Adam(n, rate) if rate else LBFGS(n)).solve(y, physics)
    residuals = solution.losses.clamp(min=0).sqrt() / y.norm(dim=1)
    return {
        "residuals": rounded(residuals.double().mean(dim=1)),
        "evaluations_per_iteration": rounded(solution.n_evaluations.double().mean() / (len(solution.losses) - 1)),
        "noise": rounded((0.1 / y.norm(dim=1)).mean()),
        "psnr": rounded(psnr(solution.estimate, scene.x).mean()),
    }


def main(arguments: list[str] | None = None) -> None:
    scene = scene_of("solver-curves", SCALES, arguments)
    units = [
        {"solver": "Adam" if rate else "L-BFGS", "learning_rate": rate} for rate in [None, *scene.settings["rates"]]
    ]
    records = scene.numbers(units, measure)
    figure, (axis,) = new_figure(width=5.6, height=3.8)
    ends = []
    for record in records:
        residuals, pace = record["residuals"], record["evaluations_per_iteration"]
        label = record["solver"] + (f", rate {record['learning_rate']:g}" if record["learning_rate"] else "")
        axis.semilogy([i * pace for i in range(len(residuals))], residuals, label=label)
        ends.append(f"{label}: {residuals[-1]:.2g}, {record['psnr']:.2f} dB")
    axis.axhline(records[0]["noise"], color="0.5", linestyle=":", label="the noise")
    axis.set(xlabel="evaluations of the gradient", ylabel="relative residual")
    axis.legend(fontsize=8)
    scene.save(
        figure,
        "L-BFGS against Adam",
        f"Compressed sensing, m = {scene.settings['m']}, gamma = 0, mean of {len(scene.x)} images; at the end "
        f"{'; '.join(ends)}. After Asim et al. 2020, Fig. 18.",
        f"Relative residual over evaluations of the gradient, one line per solver. At the end {'; '.join(ends)}.",
    )


if __name__ == "__main__":
    main()
