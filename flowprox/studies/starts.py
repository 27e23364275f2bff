r"""Where a solver begins, over the weight of the prior.

    min_z ||y - A g(z)||^2 + gamma ||z||   from z_0 = 0, small and large random latents, f(Lasso), f(x + n) with A n = 0

The last start needs the true image x, which is why this is no method of an evaluation. Asim et al. 2020, Sec. 3.2 and App. D:
z_0 = 0 with gamma = 0 is best, and the worse the start, the more a positive gamma helps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deepinv.physics import LinearPhysics

from flowprox.baselines import Lasso
from flowprox.metrics import psnr
from flowprox.solvers import LBFGS, LatentMAP, null_space_perturbed
from flowprox.studies.contract import Drawn, Record, Study, StudyRun
from flowprox.studies.drawing import new_figure, rounded

__all__ = ["STARTS"]

_STARTS = ("zero", "small random", "large random", "Lasso", "null space")
_NULL_SPACE_SCALE = 0.1  # standard deviation of the noise whose part in the null space is added; not published


def _units(run: StudyRun) -> list[Record]:
    return [
        {"problem": problem, "start": start, "gamma": gamma}
        for problem in run.settings["problems"]
        for start in _STARTS
        for gamma in run.settings["gammas"]
        if not (problem == "inpainting" and start == "Lasso")
    ]


def _measure(run: StudyRun, unit: Record) -> Record:
    y, physics = run.measured(unit["problem"], **run.settings["problems"][unit["problem"]])
    assert isinstance(physics, LinearPhysics)
    start: Any = {"zero": "zero", "small random": 0.1, "large random": 0.7}.get(unit["start"])
    if unit["start"] == "Lasso":
        start = Lasso("wavelet", n_iterations=run.settings["lasso_iterations"])
    elif unit["start"] == "null space":
        # not the operator's seed: with it the noise is the first row of A, and none of it is in the null space
        start = null_space_perturbed(run.x, physics, _NULL_SPACE_SCALE, run.seed + 1)
    solver = LatentMAP(
        run.prior, unit["gamma"], start=start, optimizer=LBFGS(run.settings["n_iterations"]), seed=run.seed
    )
    solution = solver.solve(y, physics)
    figures = psnr(solution.estimate, run.x)
    return {"psnr": rounded(figures), "reasons": solution.reasons}


def _draw(records: Sequence[Record]) -> Mapping[str, Drawn]:
    problems = list(dict.fromkeys(record["problem"] for record in records))
    figure, axes = new_figure(len(problems))
    best = []
    for axis, problem in zip(axes, problems, strict=True):
        for i, start in enumerate(_STARTS):
            line = [record for record in records if (record["problem"], record["start"]) == (problem, start)]
            if line:
                means = [sum(record["psnr"]) / len(record["psnr"]) for record in line]
                axis.plot([record["gamma"] for record in line], means, "o-", color=f"C{i}", label=start)
                best.append(f"{problem}, {start}: {means[0]:.2f}")
        axis.set(xlabel="gamma", ylabel="PSNR (dB)", title=problem)
        axis.set_xscale("symlog", linthresh=0.01)
        axis.legend(fontsize=8)
    drawn = Drawn(
        figure,
        "Where the solver begins",
        f"PSNR over the weight of the prior, mean of {len(records[0]['psnr'])} images; with gamma = {records[0]['gamma']:g}, "
        f"in dB: {'; '.join(best)}. After Asim et al. 2020, Figs. 4 (right) and 47 (right).",
        f"PSNR over gamma, one line per start, one panel per problem. With the smallest gamma: {'; '.join(best)}.",
    )
    return {"starts": drawn}


_GAMMAS = [0.0, 0.01, 0.1, 1.0]
STARTS = Study(
    "PSNR over gamma from several starts: zero, random, Lasso, null space",
    "Asim et al. 2020, Figs. 4 (right), 47 (right)",
    {
        "smoke": {
            "image_size": 16, "n_images": 1, "n_iterations": 2, "lasso_iterations": 3, "gammas": [0.0],
            "problems": {"compressed-sensing": {"m": 200, "noise_norm": 0.1}, "inpainting": {"mask_size": 5}},
        },
        "small": {
            "image_size": 64, "n_images": 2, "n_iterations": 120, "lasso_iterations": 300, "gammas": [0.0, 0.1],
            "problems": {"compressed-sensing": {"m": 2500, "noise_norm": 0.1}, "inpainting": {"mask_size": 19}},
        },
        "paper": {
            "image_size": 64, "n_images": 12, "n_iterations": 400, "lasso_iterations": 2000, "gammas": _GAMMAS,
            "problems": {"compressed-sensing": {"m": 5000, "noise_norm": 0.1}, "inpainting": {"mask_size": 19}},
        },
    },
    _units,
    _measure,
    _draw,
)  # fmt: skip
