r"""A flow one can look at: two-dimensional data, their density, and reconstruction from one measurement.

    x_1 from two Gaussians at -1/2 and 1/2, x_2 uniform;   y = x_2
    latent  min_z (y - a.g(z))^2 + gamma ||z||        image  min_x (y - a.x)^2 - gamma log p(x)

Symbols: x data (2,), z latent, g = f^-1 the flow, a = (0, 1). The two modes are connected in latent space, so that points of
a low density p(x) have likely latents: a start there ends between the modes in the latent form. Asim et al. 2020, Sec. 4 and
App. G.1. The flow has affine couplings, as their RealNVP, on images of two channels and one pixel. A learned rotation stands
before each: the two coordinates are independent, and couplings of the coordinates alone stay at the saddle point they start at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from flowprox.coupling_nets import ZeroConv2d
from flowprox.flows import Flow, GlowStep, Sequential, frozen
from flowprox.studies.contract import Drawn, Record, Study, StudyRun
from flowprox.studies.drawing import rounded

__all__ = ["TWO_DIMENSIONAL", "bimodal_points", "two_dimensional_flow"]

_MEASURED = 0.3
_STARTS = {"good": None, "bad": (0.0, -0.6)}  # the good start is z = 0
_GAMMA, _STEP = 0.01, 0.2


def bimodal_points(n: int, generator: torch.Generator) -> Tensor:
    """n points (n, 2, 1, 1): the first coordinate N(+-1/2, 0.1^2), the second uniform in [-0.8, 0.8]."""
    modes = torch.randint(0, 2, (n,), generator=generator) - 0.5
    first = modes + 0.1 * torch.randn(n, generator=generator)
    second = 1.6 * torch.rand(n, generator=generator) - 0.8
    return torch.stack([first, second], dim=1)[:, :, None, None]


def two_dimensional_flow(n_steps: int = 8, hidden_channels: int = 32, scale_bound: float = 2.0) -> Flow:
    """Steps of flow for points (B, 2, 1, 1): rotate, then transform one coordinate with the help of the other.

    Example:
        >>> flow = two_dimensional_flow(2, 4)
        >>> x = torch.randn(3, 2, 1, 1)
        >>> bool((flow.decode(flow.encode(x), (1, 1)) - x).abs().max() < 1e-5)
        True
    """

    def net() -> nn.Module:
        hidden = [
            nn.Conv2d(1, hidden_channels, 1),
            nn.ReLU(),
            nn.Conv2d(hidden_channels, hidden_channels, 1),
            nn.ReLU(),
        ]
        return nn.Sequential(*hidden, ZeroConv2d(hidden_channels, 2, 1))

    steps = [GlowStep(2, net(), scale_bound) for _ in range(n_steps)]
    return Flow(Sequential(steps), (2, 1, 1), n_levels=0, offset=0.0)


def _trained(run: StudyRun) -> tuple[Flow, float]:
    """The flow and its mean log-likelihood on other points."""
    settings = run.settings
    with torch.random.fork_rng():
        torch.manual_seed(run.seed)
        flow = two_dimensional_flow()
    generator = run.generator(0)
    flow.initialize(bimodal_points(1000, generator))
    optimizer = torch.optim.Adam(flow.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings["n_steps"])
    for _ in range(settings["n_steps"]):
        optimizer.zero_grad()
        (-flow.log_prob(bimodal_points(settings["batch_size"], generator)).mean()).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return flow.eval(), float(flow.log_prob(bimodal_points(2000, run.generator(1))).mean())


def _measure(run: StudyRun, unit: Record) -> Record:
    flow, log_likelihood = _trained(run)
    n = run.settings["n_points"]
    axes = torch.linspace(-1, 1, n), torch.linspace(-3.5, 3.5, n)
    with frozen(flow), torch.no_grad():
        x, z = (torch.cartesian_prod(axis, axis) for axis in axes)
        densities = {
            "log_p_of_x": flow.log_prob(_points(x)),
            "log_p_of_latent": flow.base_log_prob(flow.encode(_points(x))),
            "log_p_over_z": flow.log_prob(flow.decode(z, (1, 1))),
        }
        between = x[x[:, 0].abs() < 0.2]
        likely = flow.base_log_prob(flow.encode(_points(between))).topk(min(9, len(between))).indices
        bridge = between[likely]
        record = {
            "log_likelihood": rounded(log_likelihood),
            "points": rounded(bimodal_points(300, run.generator(1)).flatten(1), 3),
            "axis_x": rounded(axes[0], 4),
            "axis_z": rounded(axes[1], 4),
            **{key: rounded(values.view(n, n).T, 4) for key, values in densities.items()},
            "bridge": rounded(bridge, 4),
            "bridge_latents": rounded(flow.encode(_points(bridge)), 4),
        }
        paths = {f"{form}, {start}": _path(run, flow, form, start) for start in _STARTS for form in ("latent", "image")}
        ends = {name: float(flow.log_prob(_points(torch.tensor(path[-1:])))) for name, path in paths.items()}
    return {**record, "paths": paths, "log_p_at_end": {name: rounded(end) for name, end in ends.items()}}


def _path(run: StudyRun, flow: Flow, form: str, start: str) -> list[list[float]]:
    """The points x that gradient descent passes."""
    given = _STARTS[start]
    x = flow.decode(torch.zeros(1, 2), (1, 1)) if given is None else _points(torch.tensor([given]))

    def latent(z: Tensor) -> Tensor:
        return (_MEASURED - flow.decode(z, (1, 1))[:, 1]).square().sum() + _GAMMA * z.norm()

    def image(x: Tensor) -> Tensor:
        return (_MEASURED - x[:, 1]).square().sum() - _GAMMA * flow.log_prob(x).sum()

    if form == "image":
        return [rounded(point.flatten(), 4) for point in _descent(image, x, run.settings["n_descent"])]
    passed = _descent(latent, flow.encode(x), run.settings["n_descent"])
    return [rounded(flow.decode(z, (1, 1)).flatten(), 4) for z in passed]


def _descent(objective: Callable[[Tensor], Tensor], start: Tensor, n_steps: int) -> list[Tensor]:
    """Gradient descent with steps of a bounded length; every second point."""
    passed, point = [start], start
    for _ in range(n_steps):
        with torch.enable_grad():
            point = point.detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad(objective(point), point)
        step = _STEP * gradient
        point = point.detach() - step * torch.clamp(0.05 / step.norm().clamp_min(1e-12), max=1.0)
        passed.append(point)
    return [*passed[::2], passed[-1]]


def _points(x: Tensor) -> Tensor:
    return x[:, :, None, None]


def _draw(records: Sequence[Record]) -> Mapping[str, Drawn]:
    from matplotlib.figure import Figure

    (record,) = records
    densities = Figure(figsize=(14, 3.6), layout="constrained")
    first, *others = densities.subplots(1, 4)
    first.scatter(*zip(*record["points"], strict=True), s=4)
    first.set(title="data", xlabel="x1", ylabel="x2", xlim=(-1, 1), ylim=(-1, 1), aspect="equal")
    shown = [
        ("log p(x) over x", "axis_x", "log_p_of_x", "bridge", "x"),
        ("log N(f(x); 0, I) over x", "axis_x", "log_p_of_latent", "bridge", "x"),
        ("log p(g(z)) over z", "axis_z", "log_p_over_z", "bridge_latents", "z"),
    ]
    for cell, (title, axis, key, marks, letter) in zip(others, shown, strict=True):
        values = torch.tensor(record[key]).clamp(min=-12)
        drawn = cell.contourf(record[axis], record[axis], values, levels=24, cmap="viridis")
        densities.colorbar(drawn, ax=cell)
        cell.plot(*zip(*record[marks], strict=True), "r+")
        cell.set(title=title, xlabel=f"{letter}1", ylabel=f"{letter}2", aspect="equal")
        cell.set(xlim=(record[axis][0], record[axis][-1]), ylim=(record[axis][0], record[axis][-1]))
    descent = Figure(figsize=(3.4 * len(record["paths"]), 3.5), layout="constrained")
    for cell, (name, path) in zip(descent.subplots(1, len(record["paths"])), record["paths"].items(), strict=True):
        values = torch.tensor(record["log_p_of_x"]).clamp(min=-12)
        cell.contourf(record["axis_x"], record["axis_x"], values, levels=24, cmap="Grays")
        cell.axhline(_MEASURED, color="C0", linestyle=":")
        cell.plot(*zip(*path, strict=True), "C1.-", markersize=3)
        cell.plot(*path[0], "C2o")
        cell.plot(*path[-1], "C3*", markersize=10)
        cell.set(title=f"{name} start", xlabel="x1", ylabel="x2", xlim=(-1, 1), ylim=(-1, 1), aspect="equal")
    ends = ", ".join(f"{name} {end:.2f}" for name, end in record["log_p_at_end"].items())
    return {
        "two-dimensional-densities": Drawn(
            densities,
            "A flow in two dimensions",
            "Data, density of the flow over x, likelihood of the latent over x, and density over the latent (values below -12 "
            "are drawn as -12). Red crosses: the points between the modes whose latents are most likely. Mean log-likelihood "
            f"{record['log_likelihood']:.2f} nats. After Asim et al. 2020, Figs. 8 and 53 to 55.",
            "Four panels: the data, in two vertical bars; the density of the flow and the likelihood of the latent over them; "
            "the density over the latent. Red crosses mark where the likelihood of the latent connects the two bars.",
        ),
        "two-dimensional-descent": Drawn(
            descent,
            "Gradient descent in latent and in image space",
            f"Paths from a good (z = 0) and a bad start (circle) to the end (star), given the second coordinate (dotted); log "
            f"p(x) at the end: {ends}. After Asim et al. 2020, Fig. 56.",
            f"Four panels with the path of gradient descent over the density. log p(x) at the end: {ends}.",
        ),
    }


TWO_DIMENSIONAL = Study(
    "a flow of two-dimensional data: densities, and descent in latent and in image space",
    "Asim et al. 2020, Figs. 8, 53 to 56",
    {
        "smoke": {"n_steps": 5, "batch_size": 32, "n_points": 5, "n_descent": 4},
        "small": {"n_steps": 1500, "batch_size": 256, "n_points": 81, "n_descent": 400},
        "paper": {"n_steps": 20000, "batch_size": 1024, "n_points": 161, "n_descent": 2000},
    },
    lambda run: [{"part": "all"}],
    _measure,
    _draw,
    needs_flow=False,
)
