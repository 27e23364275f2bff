r"""
A flow in two dimensions
========================

Two-dimensional data, their density, and reconstruction from one measurement:

.. math::

    x_1 &\text{ from two Gaussians at } \pm 1/2, \quad x_2 \text{ uniform}; \qquad y = x_2 = a \cdot x \\
    \text{latent } &\min_z (y - a \cdot g(z))^2 + \gamma \|z\| \qquad
    \text{image } \min_x (y - a \cdot x)^2 - \gamma \log p(x)

The modes are connected in latent space: points of low density have likely latents, and a start there ends between the modes.
The flow has affine couplings on images of two channels and one pixel, a learned rotation before each: couplings of the
independent coordinates alone stay at the saddle point they start at. After Asim et al. 2020, Figs. 8 and 53 to 56.
"""

from __future__ import annotations

from typing import Any

import torch
from common import Record, Scene, rounded, scene_of
from matplotlib.figure import Figure
from torch import Tensor, nn

from flowprox.flows import Flow, GlowStep, Sequential, frozen

MEASURED, GAMMA, STEP = 0.3, 0.01, 0.2
SCALES = {
    "smoke": {"n_steps": 5, "batch_size": 32, "n_points": 5, "n_descent": 4},
    "small": {"n_steps": 1500, "batch_size": 256, "n_points": 81, "n_descent": 400},
    "paper": {"n_steps": 20000, "batch_size": 1024, "n_points": 161, "n_descent": 2000},
}


def bimodal_points(n: int, generator: torch.Generator) -> Tensor:
    """n points (n, 2, 1, 1): the first coordinate N(+-1/2, 0.1^2), the second uniform in [-0.8, 0.8]."""
    modes = torch.randint(0, 2, (n,), generator=generator) - 0.5
    first = modes + 0.1 * torch.randn(n, generator=generator)
    return as_images(torch.stack([first, 1.6 * torch.rand(n, generator=generator) - 0.8], dim=1))


def as_images(points: Tensor) -> Tensor:
    return points[:, :, None, None]


def two_dimensional_flow(n_steps: int = 8, width: int = 32) -> Flow:
    """Steps of flow for points (B, 2, 1, 1): rotate, then transform one coordinate with the help of the other."""

    def net() -> nn.Module:
        first, second, last = nn.Conv2d(1, width, 1), nn.Conv2d(width, width, 1), nn.Conv2d(width, 2, 1)
        last.weight.data.zero_(), last.bias.data.zero_()
        return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last)

    return Flow(Sequential([GlowStep(2, net(), 2.0) for _ in range(n_steps)]), (2, 1, 1), n_levels=0, offset=0.0)


def trained_flow(scene: Scene) -> Flow:
    with torch.random.fork_rng():
        torch.manual_seed(scene.seed)
        flow = two_dimensional_flow()
    generator = scene.generator(0)
    flow.initialize(bimodal_points(1000, generator))
    optimizer = torch.optim.Adam(flow.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, scene.settings["n_steps"])
    for _ in range(scene.settings["n_steps"]):
        optimizer.zero_grad()
        (-flow.log_prob(bimodal_points(scene.settings["batch_size"], generator)).mean()).backward()
        optimizer.step()
        schedule.step()
    return flow.eval()


def descent(flow: Flow, form: str, start: Tensor | None, n: int) -> list[list[float]]:
    """Every second point x that gradient descent with steps of a bounded length passes; None starts at z = 0."""
    x = flow.decode(torch.zeros(1, 2), (1, 1)) if start is None else as_images(start)
    point = flow.encode(x) if form == "latent" else x
    passed = []
    for i in range(n + 1):
        point = point.detach().requires_grad_(True)
        x = flow.decode(point, (1, 1)) if form == "latent" else point
        if i % 2 == 0 or i == n:
            passed.append(rounded(x.detach().flatten(), 4))
        prior = point.norm() if form == "latent" else -flow.log_prob(x).sum()
        (gradient,) = torch.autograd.grad((MEASURED - x[:, 1]).square().sum() + GAMMA * prior, point)
        step = STEP * gradient
        point = point - step * torch.clamp(0.05 / step.norm().clamp_min(1e-12), max=1.0)
    return passed


def measure(scene: Scene, unit: Record) -> Record:
    flow, n = trained_flow(scene), scene.settings["n_points"]
    axis_x, axis_z = torch.linspace(-1, 1, n), torch.linspace(-3.5, 3.5, n)
    with frozen(flow), torch.no_grad():
        x, z = as_images(torch.cartesian_prod(axis_x, axis_x)), torch.cartesian_prod(axis_z, axis_z)
        densities = {
            "log_p_of_x": flow.log_prob(x),
            "log_p_of_latent": flow.base_log_prob(flow.encode(x)),
            "log_p_over_z": flow.log_prob(flow.decode(z, (1, 1))),
        }
        between = x[x[:, 0].flatten().abs() < 0.2]
        latents = flow.encode(between)
        likely = flow.base_log_prob(latents).topk(min(9, len(between))).indices
        log_likelihood = float(flow.log_prob(bimodal_points(2000, scene.generator(1))).mean())
    with frozen(flow):
        starts = {"good": None, "bad": torch.tensor([[0.0, -0.6]])}
        paths = {
            f"{form}, {name}": descent(flow, form, start, scene.settings["n_descent"])
            for name, start in starts.items()
            for form in ("latent", "image")
        }
        ends = as_images(torch.tensor([path[-1] for path in paths.values()]))
        log_p_at_end = dict(zip(paths, rounded(flow.log_prob(ends).detach()), strict=True))
    return {
        "log_likelihood": rounded(log_likelihood),
        "points": rounded(bimodal_points(300, scene.generator(1)).flatten(1), 3),
        "axis_x": rounded(axis_x, 4),
        "axis_z": rounded(axis_z, 4),
        **{key: rounded(values.view(n, n).T, 4) for key, values in densities.items()},
        "bridge": rounded(between[likely].flatten(1), 4),
        "bridge_latents": rounded(latents[likely], 4),
        "paths": paths,
        "log_p_at_end": log_p_at_end,
    }


def draw_densities(record: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(14, 3.6), layout="constrained")
    first, *others = figure.subplots(1, 4)
    first.scatter(*zip(*record["points"], strict=True), s=4)
    first.set(title="data", xlabel="x1", ylabel="x2", xlim=(-1, 1), ylim=(-1, 1), aspect="equal")
    shown = [
        ("log p(x) over x", "axis_x", "log_p_of_x", "bridge", "x"),
        ("log N(f(x); 0, I) over x", "axis_x", "log_p_of_latent", "bridge", "x"),
        ("log p(g(z)) over z", "axis_z", "log_p_over_z", "bridge_latents", "z"),
    ]
    for cell, (title, axis, key, marks, letter) in zip(others, shown, strict=True):
        values, reach = torch.tensor(record[key]).clamp(min=-12), (record[axis][0], record[axis][-1])
        figure.colorbar(cell.contourf(record[axis], record[axis], values, levels=24, cmap="viridis"), ax=cell)
        cell.plot(*zip(*record[marks], strict=True), "r+")
        cell.set(title=title, xlabel=f"{letter}1", ylabel=f"{letter}2", aspect="equal", xlim=reach, ylim=reach)
    return figure


def draw_descent(record: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(3.4 * len(record["paths"]), 3.5), layout="constrained")
    values = torch.tensor(record["log_p_of_x"]).clamp(min=-12)
    for cell, (name, path) in zip(figure.subplots(1, len(record["paths"])), record["paths"].items(), strict=True):
        cell.contourf(record["axis_x"], record["axis_x"], values, levels=24, cmap="Grays")
        cell.axhline(MEASURED, color="C0", linestyle=":")
        cell.plot(*zip(*path, strict=True), "C1.-", markersize=3)
        cell.plot(*path[0], "C2o")
        cell.plot(*path[-1], "C3*", markersize=10)
        cell.set(title=f"{name} start", xlabel="x1", ylabel="x2", xlim=(-1, 1), ylim=(-1, 1), aspect="equal")
    return figure


def main(arguments: list[str] | None = None) -> None:
    scene = scene_of("two-dimensional", SCALES, arguments, needs_flow=False)
    (record,) = scene.numbers([{"part": "all"}], measure)
    ends = ", ".join(f"{name} {end:.2f}" for name, end in record["log_p_at_end"].items())
    scene.save(
        draw_densities(record),
        "A flow in two dimensions",
        "Data, density of the flow over x, likelihood of the latent over x, and density over the latent (values below -12 "
        "are drawn as -12). Red crosses: the points between the modes whose latents are most likely. Mean log-likelihood "
        f"{record['log_likelihood']:.2f} nats. After Asim et al. 2020, Figs. 8 and 53 to 55.",
        "Four panels: the data, in two vertical bars; the density of the flow and the likelihood of the latent over them; "
        "the density over the latent. Red crosses mark where the likelihood of the latent connects the two bars.",
        "two-dimensional-densities",
    )
    scene.save(
        draw_descent(record),
        "Gradient descent in latent and in image space",
        "Paths from a good (z = 0) and a bad start (circle) to the end (star), given the second coordinate (dotted); log p(x) "
        f"at the end: {ends}. After Asim et al. 2020, Fig. 56.",
        f"Four panels with the path of gradient descent over the density. log p(x) at the end: {ends}.",
        "two-dimensional-descent",
    )


if __name__ == "__main__":
    main()
