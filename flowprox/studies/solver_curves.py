r"""What a gradient evaluation buys: L-BFGS against Adam on the way.

    min_z ||y - A g(z)||^2,   residual ||y - A g(z_n)|| / ||y|| over n

Compressed sensing from z = 0 with gamma = 0, every image by itself. An iteration of Adam is one evaluation of objective and
gradient, one of L-BFGS a little more than one (its line search).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flowprox.metrics import psnr
from flowprox.solvers import LBFGS, Adam, LatentMAP
from flowprox.studies.contract import Drawn, Record, Study, StudyRun
from flowprox.studies.drawing import curve, new_figure, rounded

__all__ = ["SOLVER_CURVES"]


def _units(run: StudyRun) -> list[Record]:
    return [{"solver": "L-BFGS"}, *({"solver": "Adam", "learning_rate": rate} for rate in run.settings["rates"])]


def _measure(run: StudyRun, unit: Record) -> Record:
    settings = run.settings
    y, physics = run.measured("compressed-sensing", m=settings["m"], noise_norm=0.1)
    if unit["solver"] == "Adam":
        optimizer = Adam(settings["n_iterations"], unit["learning_rate"])
    else:
        optimizer = LBFGS(settings["n_iterations"])
    solution = LatentMAP(run.prior, gamma=0.0, optimizer=optimizer).solve(y, physics)
    return {
        "m": settings["m"],
        "n_images": len(run.x),
        "residuals": curve(solution.losses.clamp(min=0).sqrt() / y.norm(dim=1)),
        "evaluations_per_iteration": rounded(
            float(solution.n_evaluations.double().mean()) / (len(solution.losses) - 1)
        ),
        "noise": rounded(float((0.1 / y.norm(dim=1)).mean())),
        "psnr": rounded(float(psnr(solution.estimate, run.x).mean())),
    }


def _draw(records: Sequence[Record]) -> Mapping[str, Drawn]:
    figure, (axis,) = new_figure(width=5.6, height=3.8)
    ends = []
    for record in records:
        residuals, pace = record["residuals"], record["evaluations_per_iteration"]
        rate = f", rate {record['learning_rate']:g}" if "learning_rate" in record else ""
        axis.semilogy([i * pace for i in range(len(residuals))], residuals, label=record["solver"] + rate)
        ends.append(f"{record['solver']}{rate}: {residuals[-1]:.2g}, {record['psnr']:.2f} dB")
    axis.axhline(records[0]["noise"], color="0.5", linestyle=":", label="the noise")
    axis.set(xlabel="evaluations of the gradient", ylabel="relative residual")
    axis.legend(fontsize=8)
    drawn = Drawn(
        figure,
        "L-BFGS against Adam",
        f"Compressed sensing, m = {records[0]['m']}, gamma = 0, mean of {records[0]['n_images']} images; at the end "
        f"{'; '.join(ends)}. After Asim et al. 2020, Fig. 18.",
        f"Relative residual over evaluations of the gradient, one line per solver. At the end {'; '.join(ends)}.",
    )
    return {"solver-curves": drawn}


SOLVER_CURVES = Study(
    "residual over iterations, L-BFGS against Adam",
    "Asim et al. 2020, Fig. 18 (right)",
    {
        "smoke": {"image_size": 16, "n_images": 1, "m": 200, "n_iterations": 3, "rates": [0.01]},
        "small": {"image_size": 64, "n_images": 3, "m": 1000, "n_iterations": 200, "rates": [0.01, 0.03, 0.1]},
        "paper": {"image_size": 64, "n_images": 12, "m": 5000, "n_iterations": 2000, "rates": [0.01, 0.03, 0.1]},
    },
    _units,
    _measure,
    _draw,
)
