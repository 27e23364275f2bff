r"""
Loss landscapes in image and latent space
=========================================

What the objectives look like around the true image:

.. math::

    \|y - A x\|^2 - \gamma \log p(x) \quad&\text{at } x^* + a u + b v \\
    \|y - A g(z)\|^2 + \gamma \|z\| \quad&\text{at } z^* + a u + b v

with u, v random and as long as x* or z*, or ways to the latents of other images. Misfit and prior are recorded apart, so that
one record gives the landscape of every gamma. After Asim et al. 2020, Figs. 7, 52 (c, d) and 57: in image space the density
makes a sharp dip at the truth, in latent space a smooth bowl.
"""

from __future__ import annotations

from typing import Any

import torch
from common import Record, Scene, rounded, scene_of
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor

PLANES = {
    "image": "image space, random",
    "latent": "latent space, random",
    "interpolation": "latent space, towards others",
}
FLOOR = 1e-4
LEVELS = [FLOOR * 10 ** (i / 4) for i in range(17)]  # 1e-4 to 1
SCALES: dict[str, dict[str, Any]] = {
    "smoke": {"image_size": 16, "n_images": 3, "m": 200, "n_points": 3, "reach": 0.5, "gammas": [0.01, 0.1]},
    "small": {"image_size": 64, "n_images": 3, "m": 2500, "n_points": 21, "reach": 0.5, "gammas": [0.01, 1.0]},
    "paper": {"image_size": 64, "n_images": 3, "m": 5000, "n_points": 51, "reach": 1.0, "gammas": [10.0, 50.0, 100.0]},
}


@torch.no_grad()
def measure(scene: Scene, unit: Record) -> Record:
    y, physics = scene.measured("compressed-sensing", m=scene.settings["m"], noise_norm=0.1)
    center = scene.x[:1].flatten(1) if unit["plane"] == "image" else scene.flow.encode(scene.x[:1])
    if unit["plane"] == "interpolation":
        directions = scene.flow.encode(scene.x[1:3]) - center
    else:
        directions = torch.randn(2, center.shape[1], generator=scene.generator(int(unit["plane"] == "image")))
        directions = directions.to(center) * center.norm() / directions.to(center).norm(dim=1, keepdim=True)

    def parts(points: Tensor) -> Tensor:
        """Misfit and prior (2, N) at points (N, D)."""
        if unit["plane"] == "image":
            x = points.view(-1, *scene.x.shape[1:])
            prior = -scene.flow.log_prob(x)
        else:
            x, prior = scene.flow.decode(points, (scene.x.shape[2], scene.x.shape[3])), points.norm(dim=1)
        return torch.stack([(y[:1] - physics.A(x)).square().sum(dim=1), prior])

    axis = torch.linspace(-1, 1, scene.settings["n_points"]) * scene.settings["reach"]
    grid = torch.cartesian_prod(axis, axis).to(center)
    both = torch.cat([parts(center + share @ directions) for share in grid.split(64)], dim=1)
    misfit, prior = both.view(2, len(axis), -1)
    return {"axis": rounded(axis), "misfit": rounded(misfit), "prior": rounded(prior)}


def main(arguments: list[str] | None = None) -> None:
    scene = scene_of("landscapes", SCALES, arguments)
    records, gammas = scene.numbers([{"plane": plane} for plane in PLANES], measure), scene.settings["gammas"]
    figure = Figure(figsize=(2.6 * (2 + len(gammas)), 2.9 * len(records)), layout="constrained")
    rows, drawn = figure.subplots(len(records), 2 + len(gammas), squeeze=False), None
    for row, record in zip(rows, records, strict=True):
        misfit, prior = torch.tensor(record["misfit"]), torch.tensor(record["prior"])
        symbol = "-log p(x)" if record["plane"] == "image" else "||z||"
        shown = [("misfit", misfit), (symbol, prior)]
        shown += [(f"misfit + {gamma:g} [{symbol}]", misfit + gamma * prior) for gamma in gammas]
        for cell, (name, values) in zip(row, shown, strict=True):
            excess = ((values - values.min()) / (values.max() - values.min())).clamp(min=1.001 * FLOOR)
            drawn = cell.contourf(record["axis"], record["axis"], excess, levels=LEVELS, norm=LogNorm(), cmap="viridis")
            cell.plot(0, 0, "r+")
            cell.set_title(f"{PLANES[record['plane']]}\n{name}", fontsize=8)
            cell.set(aspect="equal", xlabel="b, along v", ylabel="a, along u")
            cell.tick_params(labelsize=7)
    figure.colorbar(drawn, ax=rows, shrink=0.5, label="above the lowest value, as a part of the highest")
    scene.save(
        figure,
        "Loss landscapes in image and latent space",
        f"Misfit, prior and their sum with gamma = {', '.join(f'{gamma:g}' for gamma in gammas)} in planes through the true "
        "image (red cross), compressed sensing; both axes in lengths of the true image or latent, or of the way to another "
        "image. After Asim et al. 2020, Figs. 7, 52 and 57.",
        "Contours of misfit, prior and their weighted sums in three planes: random directions in image space, random "
        "directions in latent space, directions towards other images in latent space.",
    )


if __name__ == "__main__":
    main()
