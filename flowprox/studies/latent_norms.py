r"""How the norm of the latent grows while a solver explains a measurement, from starts of several sizes.

    z_0 ~ N(0, s^2 I),   min_z ||y - A g(z)||^2        ||z_n|| over n, and the PSNR of the end over ||z_0||

Compressed sensing with gamma = 0: whatever regularizes is the start. Asim et al. 2020, App. C: the norm only grows, and
a larger start ends in a larger latent and a worse image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from flowprox.metrics import psnr
from flowprox.solvers import LBFGS, Adam, LatentMAP
from flowprox.studies.contract import Drawn, Record, Study, StudyRun
from flowprox.studies.drawing import curve, new_figure, rounded

__all__ = ["LATENT_NORMS"]

_NAMES = {"lbfgs": "L-BFGS", "adam": "Adam"}


def _units(run: StudyRun) -> list[Record]:
    return [{"optimizer": name, "start": std} for name in _NAMES for std in run.settings["starts"]]


def _measure(run: StudyRun, unit: Record) -> Record:
    settings = run.settings
    if unit["optimizer"] == "adam":
        optimizer = Adam(settings["adam_iterations"], settings["learning_rate"])
    else:
        optimizer = LBFGS(settings["n_iterations"])
    y, physics = run.measured("compressed-sensing", m=settings["m"], noise_norm=0.1)
    start = unit["start"] or "zero"
    solution = LatentMAP(run.prior, gamma=0.0, start=start, optimizer=optimizer, seed=run.seed).solve(y, physics)
    norms = solution.latent_norms
    assert norms is not None
    return {
        "m": settings["m"],
        "n_images": len(run.x),
        "start_norm": rounded(float(unit["start"]) * math.sqrt(run.x[0].numel())),
        "norms": curve(norms),
        "final_norm": rounded(float(norms[-1].mean())),
        "psnr": rounded(float(psnr(solution.estimate, run.x).mean())),
        "truth_norm": rounded(float(run.prior.encode(run.x).norm(dim=1).mean().detach())),
    }


def _draw(records: Sequence[Record]) -> Mapping[str, Drawn]:
    figure, (left, *panels) = new_figure(3)
    right = left.twinx()
    found = [record for record in records if record["optimizer"] == "lbfgs"]
    at = [record["start_norm"] for record in found]
    left.plot(at, [record["psnr"] for record in found], "o-", color="C0")
    right.plot(at, [record["final_norm"] for record in found], "s--", color="C1")
    left.set(xlabel="norm of the start", title="L-BFGS, where it ends")
    left.set_ylabel("PSNR (dB), circles", color="C0")
    right.set_ylabel("norm of the latent found, squares", color="C1")
    right.spines["top"].set_visible(False)
    for axis, name in zip(panels, _NAMES, strict=True):
        for record in records:
            if record["optimizer"] == name:
                axis.plot(record["norms"], label=f"start {record['start']:g}")
        axis.axhline(records[0]["truth_norm"], color="0.5", linestyle=":", label="latent of the true image")
        axis.set(xlabel="iteration", ylabel="norm of the latent", title=_NAMES[name])
    panels[-1].legend(fontsize=7)
    m, n = records[0]["m"], records[0]["n_images"]
    ends = {
        name: "; ".join(
            f"start {r['start']:g}: {r['psnr']:.2f} dB, norm {r['final_norm']:.0f}"
            for r in records
            if r["optimizer"] == name
        )
        for name in _NAMES
    }
    drawn = Drawn(
        figure,
        "Norm of the latent over the iterations",
        f"Compressed sensing, m = {m}, gamma = 0, mean of {n} images. Starts are standard deviations of the first latent. "
        f"At the end, L-BFGS: {ends['lbfgs']}. Adam: {ends['adam']}. After Asim et al. 2020, Figs. 19 and 20.",
        f"Left: PSNR and final norm of the latent over the norm of the start, L-BFGS ({ends['lbfgs']}). "
        "Middle and right: the norm over iterations for L-BFGS and Adam, one line per start.",
    )
    return {"latent-norms": drawn}


_STARTS = [0.0, 0.1, 0.3, 0.7, 1.0]
LATENT_NORMS = Study(
    "norm of the latent over iterations, from starts of several sizes",
    "Asim et al. 2020, Figs. 19, 20",
    {
        "smoke": {
            "image_size": 16, "n_images": 2, "m": 200, "n_iterations": 3, "adam_iterations": 3, "learning_rate": 0.01,
            "starts": [0.0, 0.7],
        },
        "small": {
            "image_size": 64, "n_images": 3, "m": 2500, "n_iterations": 100, "adam_iterations": 100,
            "learning_rate": 0.05, "starts": _STARTS,
        },
        "paper": {
            "image_size": 64, "n_images": 12, "m": 5000, "n_iterations": 200, "adam_iterations": 2000,
            "learning_rate": 0.01, "starts": _STARTS,
        },
    },
    _units,
    _measure,
    _draw,
)  # fmt: skip
