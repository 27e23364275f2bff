r"""
Where the solver begins
=======================

PSNR over the weight gamma of the prior, from several starts:

.. math:: \min_z \|y - A g(z)\|^2 + \gamma \|z\| \quad \text{from } z_0 = 0, \text{ small and large random latents},
          f(\text{Lasso}), f(x + n) \text{ with } A n = 0

The last start needs the true image x, which is why it is no method of an evaluation. After Asim et al. 2020, Figs. 4 and 47
(right): z_0 = 0 with gamma = 0 is best, and the worse the start, the more a positive gamma helps.
"""

from __future__ import annotations

from typing import Any

from common import Record, Scene, new_figure, rounded, scene_of

from flowprox.baselines import Lasso
from flowprox.metrics import psnr
from flowprox.solvers import LBFGS, LatentMAP, null_space_perturbed

STARTS = ("zero", "small random", "large random", "Lasso", "null space")
NULL_SPACE_SCALE = 0.1  # standard deviation of the noise whose part in the null space is added; not published
SCALES: dict[str, dict[str, Any]] = {
    "smoke": {"image_size": 16, "n_images": 1, "n_iterations": 2, "lasso": 3, "gammas": [0.0], "m": 200, "mask": 5},
    "small": {"image_size": 64, "n_images": 2, "n_iterations": 120, "lasso": 300, "gammas": [0.0, 0.1], "m": 2500}
    | {"mask": 19},
    "paper": {"image_size": 64, "n_images": 12, "n_iterations": 400, "lasso": 2000, "gammas": [0.0, 0.01, 0.1, 1.0]}
    | {"m": 5000, "mask": 19},
}


def measure(scene: Scene, unit: Record) -> Record:
    settings = scene.settings
    sensing = {"m": settings["m"], "noise_norm": 0.1}
    parameters = sensing if unit["problem"] == "compressed-sensing" else {"mask_size": settings["mask"]}
    y, physics = scene.measured(unit["problem"], **parameters)
    start: Any = {"zero": "zero", "small random": 0.1, "large random": 0.7}.get(unit["start"])
    if unit["start"] == "Lasso":
        start = Lasso("wavelet", n_iterations=settings["lasso"])
    elif unit["start"] == "null space":
        # not the operator's seed: with it the noise is the first row of A, and none of it is in the null space
        start = null_space_perturbed(scene.x, physics, NULL_SPACE_SCALE, scene.seed + 1)
    optimizer = LBFGS(settings["n_iterations"])
    solver = LatentMAP(scene.flow, unit["gamma"], start=start, optimizer=optimizer, seed=scene.seed)
    solution = solver.solve(y, physics)
    return {"psnr": rounded(psnr(solution.estimate, scene.x)), "reasons": solution.reasons}


def main(arguments: list[str] | None = None) -> None:
    scene = scene_of("starts", SCALES, arguments)
    problems, gammas = ("compressed-sensing", "inpainting"), scene.settings["gammas"]
    tried = [(p, s) for p in problems for s in STARTS if (p, s) != ("inpainting", "Lasso")]
    units = [{"problem": p, "start": s, "gamma": gamma} for p, s in tried for gamma in gammas]
    records = scene.numbers(units, measure)
    figure, axes = new_figure(len(problems))
    best = []
    for problem, start in tried:
        line = [record["psnr"] for record in records if (record["problem"], record["start"]) == (problem, start)]
        means = [sum(values) / len(values) for values in line]
        axes[problems.index(problem)].plot(gammas, means, "o-", color=f"C{STARTS.index(start)}", label=start)
        best.append(f"{problem}, {start}: {means[0]:.2f}")
    for axis, problem in zip(axes, problems, strict=True):
        axis.set(xlabel="gamma", ylabel="PSNR (dB)", title=problem)
        axis.set_xscale("symlog", linthresh=0.01)
        axis.legend(fontsize=8)
    scene.save(
        figure,
        "Where the solver begins",
        f"PSNR over the weight of the prior, mean of {len(scene.x)} images; with gamma = {gammas[0]:g}, in dB: "
        f"{'; '.join(best)}. After Asim et al. 2020, Figs. 4 (right) and 47 (right).",
        f"PSNR over gamma, one line per start, one panel per problem. With the smallest gamma: {'; '.join(best)}.",
    )


if __name__ == "__main__":
    main()
