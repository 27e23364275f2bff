r"""How much the image changes with the latent, along random directions and along natural ones.

    ||g(z + t d) - g(z)|| over t,   ||d|| = 1,   d random, or towards the latent of another image

Asim et al. 2020, App. E: a step of the same length in latent space changes the image less along a random direction than
towards another image, so that lowering ||z|| takes noise away first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flowprox.evaluation.summary import confidence
from flowprox.studies.contract import Drawn, Record, Study, StudyRun
from flowprox.studies.drawing import new_figure, rounded

__all__ = ["PERTURBATIONS"]

_KINDS = ("random", "natural")


def _units(run: StudyRun) -> list[Record]:
    return [{"direction": kind} for kind in _KINDS]


@torch.no_grad()
def _measure(run: StudyRun, unit: Record) -> Record:
    z = run.prior.encode(run.x)
    if unit["direction"] == "random":
        d = torch.randn(z.shape, generator=run.generator(0)).to(z)
    else:
        d = z.roll(1, dims=0) - z
    d = d / d.norm(dim=1, keepdim=True)
    changes = [_change(run, z, length * d) for length in run.settings["lengths"]]
    return {"lengths": list(run.settings["lengths"]), "changes": rounded(changes), "n_images": len(run.x)}


def _change(run: StudyRun, z: Tensor, step: Tensor) -> list[float]:
    size = (run.x.shape[-2], run.x.shape[-1])
    return (run.prior.decode(z + step, size) - run.x).flatten(1).norm(dim=1).tolist()


def _draw(records: Sequence[Record]) -> Mapping[str, Drawn]:
    figure, (axis,) = new_figure(width=5.6, height=3.6)
    ends = []
    for record in records:
        means, halves = zip(*(confidence(values) for values in record["changes"]), strict=True)
        bands = [half or 0.0 for half in halves]
        axis.plot(record["lengths"], means, label=record["direction"])
        low, high = ([m + sign * h for m, h in zip(means, bands, strict=True)] for sign in (-1, 1))
        axis.fill_between(record["lengths"], low, high, alpha=0.25)
        ends.append(f"{record['direction']} {means[-1]:.3g}")
    axis.set(xlabel="length of the step in latent space", ylabel="change of the image")
    axis.legend(title="direction", fontsize=8)
    drawn = Drawn(
        figure,
        "Random and natural directions of the latent space",
        f"Norm of the change of the image, mean of {records[0]['n_images']} images with its 95 % confidence interval; at "
        f"length {records[0]['lengths'][-1]:g}: {', '.join(ends)}. After Asim et al. 2020, Fig. 51.",
        f"Change of the image over the length of the step, two lines: {', '.join(ends)} at the longest step.",
    )
    return {"perturbations": drawn}


_LENGTHS = [0.0, 2.0, 5.0, 10.0, 20.0, 30.0, 40.0, 50.0]
PERTURBATIONS = Study(
    "change of the image over steps in latent space, random and natural",
    "Asim et al. 2020, Fig. 51",
    {
        "smoke": {"image_size": 16, "n_images": 3, "lengths": [0.0, 2.0]},
        "small": {"image_size": 64, "n_images": 100, "lengths": _LENGTHS},
        "paper": {"image_size": 64, "n_images": 100, "lengths": _LENGTHS},
    },
    _units,
    _measure,
    _draw,
)
