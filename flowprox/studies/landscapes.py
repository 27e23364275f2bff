r"""What the objectives look like around the true image, in image space and in latent space.

    image   ||y - A x||^2 - gamma log p(x)       at x* + a u + b v,    u, v random, as long as x*
    latent  ||y - A g(z)||^2 + gamma ||z||       at z* + a u + b v,    u, v random, or towards other images

Symbols: x* true image, z* = f(x*) its latent, gamma weight of the prior. The parts are recorded apart, so that one record
gives the landscape of every gamma. Asim et al. 2020, Sec. 4: in image space the density makes a sharp dip at the truth and a
smooth bowl in latent space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flowprox.studies.contract import Drawn, Record, Study, StudyRun
from flowprox.studies.drawing import rounded

__all__ = ["LANDSCAPES"]

_TITLES = {
    "image": "image space, random",
    "latent": "latent space, random",
    "interpolation": "latent space, towards other images",
}
_BATCH = 64
_FLOOR = 1e-4
_LEVELS = [_FLOOR * 10 ** (i / 4) for i in range(17)]  # 1e-4 to 1


def _units(run: StudyRun) -> list[Record]:
    return [{"plane": plane} for plane in _TITLES]


@torch.no_grad()
def _measure(run: StudyRun, unit: Record) -> Record:
    settings, plane = run.settings, unit["plane"]
    y, physics = run.measured("compressed-sensing", m=settings["m"], noise_norm=0.1)
    center = run.x[:1].flatten(1) if plane == "image" else run.prior.encode(run.x[:1])
    axis = torch.linspace(-1, 1, settings["n_points"]) * settings["reach"]
    grid = torch.cartesian_prod(axis, axis).to(center)
    parts = [
        _parts(run, plane, center + share @ _directions(run, plane, center), y[:1], physics)
        for share in grid.split(_BATCH)
    ]
    misfit, prior = (torch.cat(values).view(len(axis), -1) for values in zip(*parts, strict=True))
    return {"axis": rounded(axis), "misfit": rounded(misfit), "prior": rounded(prior), "gammas": settings["gammas"]}


def _directions(run: StudyRun, plane: str, center: Tensor) -> Tensor:
    """Two directions (2, D), as long as the center; or the ways to two other images, as long as they are."""
    if plane == "interpolation":
        return run.prior.encode(run.x[1:3]) - center
    directions = torch.randn(2, center.shape[1], generator=run.generator(int(plane == "image"))).to(center)
    return directions * center.norm() / directions.norm(dim=1, keepdim=True)


def _parts(run: StudyRun, plane: str, points: Tensor, y: Tensor, physics: torch.nn.Module) -> tuple[Tensor, Tensor]:
    """Misfit and prior (N,) at points (N, D)."""
    shape = run.x.shape[1:]
    if plane == "image":
        x = points.view(-1, *shape)
        prior = -run.prior.log_prob(x)
    else:
        x = run.prior.decode(points, (shape[1], shape[2]))
        prior = points.norm(dim=1)
    return (y - physics.A(x)).square().sum(dim=1), prior  # type: ignore[operator]


def _draw(records: Sequence[Record]) -> Mapping[str, Drawn]:
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    n_columns = 2 + len(records[0]["gammas"])
    figure = Figure(figsize=(2.6 * n_columns, 2.75 * len(records)), layout="constrained")
    rows = figure.subplots(len(records), n_columns, squeeze=False)
    drawn: Any = None
    for row, record in zip(rows, records, strict=True):
        misfit, prior = torch.tensor(record["misfit"]), torch.tensor(record["prior"])
        symbol = "[-log p(x)]" if record["plane"] == "image" else "||z||"
        shown = [("misfit", misfit), (symbol.strip("[]"), prior)]
        shown += [(f"misfit + {gamma:g} {symbol}", misfit + gamma * prior) for gamma in record["gammas"]]
        for cell, (name, values) in zip(row, shown, strict=True):
            excess = (values - values.min()) / (values.max() - values.min())
            drawn = cell.contourf(
                record["axis"],
                record["axis"],
                excess.clamp(min=1.001 * _FLOOR),
                levels=_LEVELS,
                norm=LogNorm(),
                cmap="viridis",
            )
            cell.plot(0, 0, "r+")
            cell.set_title(f"{_TITLES[record['plane']]}\n{name}", fontsize=8)
            cell.set_aspect("equal")
            cell.tick_params(labelsize=7)
    figure.colorbar(drawn, ax=rows, shrink=0.5, label="above the lowest value, as a part of the highest")
    gammas = ", ".join(f"{gamma:g}" for gamma in records[0]["gammas"])
    text = Drawn(
        figure,
        "Loss landscapes in image and latent space",
        f"Misfit, prior and their sum with gamma = {gammas} in planes through the true image (red cross), compressed "
        "sensing; both axes in lengths of the true image or latent, or of the way to another image. After Asim et al. 2020, "
        "Figs. 7, 52 and 57.",
        "Contours of misfit, prior and their weighted sums in three planes: random directions in image space, random "
        "directions in latent space, directions towards other images in latent space.",
    )
    return {"landscapes": text}


LANDSCAPES = Study(
    "loss landscapes around the true image in image and latent space",
    "Asim et al. 2020, Figs. 7, 52 (c, d), 57",
    {
        "smoke": {"image_size": 16, "n_images": 3, "m": 200, "n_points": 3, "reach": 0.5, "gammas": [0.01, 0.1]},
        "small": {"image_size": 64, "n_images": 3, "m": 2500, "n_points": 21, "reach": 0.5, "gammas": [0.01, 1.0]},
        "paper": {
            "image_size": 64,
            "n_images": 3,
            "m": 5000,
            "n_points": 51,
            "reach": 1.0,
            "gammas": [10.0, 50.0, 100.0],
        },
    },
    _units,
    _measure,
    _draw,
)
