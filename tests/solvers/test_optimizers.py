"""Minimizers: they reach the minimum, an image's path is its own, and bad values do not stop them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from flow_cases import NoHostReads
from scipy.optimize import minimize
from solver_cases import SHAPE, operators, small_glow
from torch import Tensor, nn

from flowprox.flows import frozen
from flowprox.graphs import Replayed
from flowprox.solvers import LBFGS, Adam, TorchLBFGS
from flowprox.solvers.objective import Objective, squared_error
from flowprox.solvers.optimizers import _LOOK_EVERY, Evaluate, _Search
from flowprox.solvers.problem import LatentProblem

OPTIMIZERS = {
    "lbfgs": LBFGS(n_iterations=400, tolerance=0),
    "lbfgs, short memory": LBFGS(n_iterations=400, n_pairs=2, tolerance=0),
    "lbfgs, small steps": LBFGS(n_iterations=400, learning_rate=0.1, tolerance=0),
    "adam": Adam(n_iterations=700, learning_rate=0.1, final_learning_rate=0.0),
}
SHORT = {"lbfgs": LBFGS(30), "lbfgs, short memory": LBFGS(30, n_pairs=2), "adam": Adam(40, 0.1, 0.1)}


def with_gradient(function: Callable[[Tensor], Tensor]) -> Evaluate:
    def evaluate(z: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            z = z.detach().requires_grad_(True)
            value = function(z)
            (gradient,) = torch.autograd.grad(value.sum(), z)
        return value.detach(), gradient

    return evaluate


def rosenbrock(z: Tensor) -> Tensor:
    return (100 * (z[:, 1:] - z[:, :-1] ** 2) ** 2 + (1 - z[:, :-1]) ** 2).sum(1)


def ill_conditioned(z: Tensor) -> Tensor:
    return (torch.logspace(-2, 1, z.shape[1], dtype=z.dtype) * (z - 1).square()).sum(1)


FUNCTIONS = {"quadratic": ill_conditioned, "Rosenbrock": rosenbrock}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_reaches_the_minimum(name: str, function: str) -> None:
    z = torch.rand(3, 2, dtype=torch.float64) * 0.5
    trace = OPTIMIZERS[name].minimize(with_gradient(FUNCTIONS[function]), z)
    accuracy = 1e-6 if "lbfgs" in name else 0.15
    assert (trace.z - 1).abs().max() < accuracy


@pytest.mark.parametrize("name", SHORT)
def test_an_image_does_not_depend_on_its_batch(name: str) -> None:
    z = torch.randn(4, 6, dtype=torch.float64)
    evaluate = with_gradient(rosenbrock)
    together = SHORT[name].minimize(evaluate, z)
    alone = SHORT[name].minimize(evaluate, z[2:3])
    assert torch.equal(alone.z[0], together.z[2])
    assert alone.reasons[0] == together.reasons[2]
    assert torch.equal(alone.losses[:, 0], together.losses[: len(alone.losses), 2])
    if "lbfgs" in name:
        assert alone.n_evaluations[0] == together.n_evaluations[2]


@pytest.mark.parametrize("name", SHORT)
def test_the_best_iterate_is_returned(name: str) -> None:
    evaluate = with_gradient(rosenbrock)
    trace = SHORT[name].minimize(evaluate, torch.randn(3, 6, dtype=torch.float64))
    best = trace.losses.min(0).values
    torch.testing.assert_close(evaluate(trace.z)[0], best, rtol=1e-12, atol=0)
    if "lbfgs" in name:
        assert bool((trace.losses.diff(dim=0) <= 1e-12 * trace.losses[:-1].abs()).all()), "the loss went up"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_values_that_are_not_finite_are_stepped_back_from(name: str) -> None:
    """log is undefined beyond a wall close to the minimum at 0.9, and nothing is known of it in advance."""

    def walled(z: Tensor) -> Tensor:
        return -(z - 0.4).log().sum(1) + 10 * (z - 0.9).square().sum(1)

    start = torch.full((2, 3), 5.0, dtype=torch.float64)
    start[1] = 0.41
    trace = OPTIMIZERS[name].minimize(with_gradient(walled), start)
    minimum = 0.4 + (0.5 + (0.25 + 0.2) ** 0.5) / 2  # of 10 (z - 0.9)^2 - log(z - 0.4)
    assert (trace.z - minimum).abs().max() < (1e-6 if "lbfgs" in name else 0.02)


def test_a_cliff_of_nan_around_the_start_ends_the_search_with_a_reason() -> None:
    def cliff(z: Tensor) -> Tensor:
        return torch.where(z.norm(dim=1) > 0, torch.nan, 1.0) + z.sum(1)

    trace = LBFGS(n_iterations=50).minimize(with_gradient(cliff), torch.zeros(1, 3))
    assert trace.reasons == ["line search"]
    assert torch.equal(trace.z, torch.zeros(1, 3))


def test_a_start_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match=r"not finite at the start for image \[1\]"):
        LBFGS().minimize(with_gradient(lambda z: z.log().sum(1)), torch.tensor([[1.0], [-1.0]]))


def test_one_scale_per_dimension_saves_iterations() -> None:
    curvature = torch.logspace(-3, 3, 30, dtype=torch.float64)
    evaluate = with_gradient(lambda z: (curvature * (z - 1).square()).sum(1))
    z = torch.zeros(1, 30, dtype=torch.float64)
    plain = LBFGS(n_iterations=40, tolerance=0).minimize(evaluate, z)
    scaled = LBFGS(n_iterations=200, tolerance=0).minimize(evaluate, z, 1 / curvature)
    assert scaled.n_evaluations.item() < 10 < plain.n_evaluations.item()
    torch.testing.assert_close(scaled.z, torch.ones_like(z))


def test_limits_are_kept_and_told() -> None:
    evaluate = with_gradient(rosenbrock)
    z = torch.randn(2, 6, dtype=torch.float64)
    trace = LBFGS(n_iterations=3).minimize(evaluate, z)
    assert trace.reasons == ["iterations"] * 2 and trace.losses.shape == (4, 2)
    trace = LBFGS(n_iterations=100, max_evaluations=5).minimize(evaluate, z)
    assert trace.reasons == ["evaluations"] * 2 and trace.n_evaluations.tolist() == [5, 5]


@pytest.mark.parametrize("optimizer", [LBFGS(n_iterations=100), Adam(n_iterations=100)])
def test_an_interruption_keeps_the_best_so_far(optimizer: LBFGS | Adam) -> None:
    calls = 0

    def evaluate(z: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        if calls == 20:
            raise KeyboardInterrupt
        return with_gradient(rosenbrock)(z)

    start = torch.zeros(1, 4, dtype=torch.float64)
    trace = optimizer.minimize(evaluate, start)
    assert trace.reasons == ["interrupted"]
    assert rosenbrock(trace.z) < rosenbrock(start)


def test_best_of_several_attempts() -> None:
    z = torch.tensor([[0.1], [5.0], [7.0], [2.5]], dtype=torch.float64)  # the second and the fourth are at minima
    trace = LBFGS(n_iterations=1, max_evaluations=1).minimize(with_gradient(lambda z: (z - 5).square().sum(1)), z)
    chosen = trace.best_of(2)
    assert chosen.z.shape == (2, 1) and chosen.n_evaluations.shape == (2,)
    assert chosen.losses[-1, 0] == trace.losses[-1, :2].min() and chosen.losses[-1, 1] == trace.losses[-1, 2:].min()


def test_the_best_attempt_is_that_with_the_best_iterate() -> None:
    """Adam's last iterate may be worse than its best: here the attempt that began at the minimum ends above the other."""
    z = torch.tensor([[0.0], [0.9]], dtype=torch.float64)
    trace = Adam(n_iterations=1, learning_rate=0.5).minimize(with_gradient(lambda z: (z - 0.01).square().sum(1)), z)
    assert trace.losses[-1, 0] > trace.losses[-1, 1] > trace.losses[0, 0]
    assert trace.best_of(2).z.item() == 0.0


def test_a_line_search_keeps_the_lowest_trial() -> None:
    """A flat place beyond a lower one, both below the start, is no reason to stop there."""
    values = []

    def evaluate(z: Tensor) -> tuple[Tensor, Tensor]:
        """Falls with slope -1 up to 0.3, is -0.05 and almost flat from there."""
        value, gradient = with_gradient(lambda z: torch.where(z < 0.3, -z, 0.1 * (z - 0.3) - 0.05).sum(1))(z)
        values.append(value.item())
        return value, gradient

    trace = LBFGS(n_iterations=1).minimize(evaluate, torch.zeros(1, 1, dtype=torch.float64))
    assert trace.losses[-1].item() == min(values) < -0.2


def test_too_few_evaluations_for_a_line_search_are_told() -> None:
    def evaluate(z: Tensor) -> tuple[Tensor, Tensor]:
        return torch.where(z[:, 0] == 0, 1.0, torch.nan), torch.ones_like(z)

    assert LBFGS(max_evaluations=2).minimize(evaluate, torch.zeros(1, 1)).reasons == ["evaluations"]
    assert LBFGS(max_evaluations=50).minimize(evaluate, torch.zeros(1, 1)).reasons == ["line search"]


@pytest.mark.parametrize(
    "arguments",
    [
        {"n_iterations": 0},
        {"learning_rate": 0},
        {"n_pairs": 0},
        {"max_evaluations": 0},
        {"n_iterations": 2.5},
        {"n_pairs": True},
        {"tolerance": -1},
        {"tolerance": float("nan")},
    ],
    ids=str,
)
def test_lbfgs_refuses(arguments: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(arguments))} must be"):
        LBFGS(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [{"n_iterations": 0}, {"learning_rate": -1}, {"final_learning_rate": 2}, {"betas": (0.9, 1.0)}, {"epsilon": 0}],
    ids=str,
)
def test_adam_refuses(arguments: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(arguments))} must"):
        Adam(**arguments)


class Quadratics:
    """A quadratic per image, of which some can be taken; it notes how many images each evaluation had."""

    def __init__(self, curvature: Tensor, counts: list[int]) -> None:
        self.curvature, self.counts = curvature, counts

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        self.counts.append(len(z))
        return (self.curvature * (z - 1).square()).sum(1), 2 * self.curvature * (z - 1)

    def select(self, images: Tensor) -> Quadratics:
        return Quadratics(self.curvature[images], self.counts)


def test_images_that_have_stopped_leave_the_batch() -> None:
    """Without changing anything for the others, also with scales."""
    hard = torch.logspace(-3, 3, 6, dtype=torch.float64)
    curvature = torch.stack([torch.ones(6, dtype=torch.float64), hard, torch.full((6,), 2.0).double(), hard.flip(0)])
    z, counts = torch.zeros(4, 6, dtype=torch.float64), []
    lbfgs = LBFGS(n_iterations=40, n_pairs=5, tolerance=0)
    for scales in (None, torch.linspace(0.5, 2, 6, dtype=torch.float64)):
        staying = lbfgs.minimize(Quadratics(curvature, counts).__call__, z, scales)
        assert counts.pop() == 4
        leaving = lbfgs.minimize(Quadratics(curvature, counts), z, scales)
        assert counts.pop() < 4
        for name in ("z", "losses", "norms", "status", "restarts", "n_evaluations"):
            assert torch.equal(getattr(staying, name), getattr(leaving, name)), name


def test_an_iteration_reads_nothing_on_the_host() -> None:
    """Between two looks at which images have stopped."""
    evaluate, z = with_gradient(rosenbrock), torch.randn(3, 4, dtype=torch.float64)
    search = _Search(evaluate, z, evaluate(z), LBFGS(), None)
    flow, physics = small_glow(), operators()["inpainting"]
    with frozen(flow), torch.no_grad():
        problem = LatentProblem(flow, torch.rand(2, *SHAPE, dtype=torch.float64), physics)
        objective = Objective(problem, squared_error, torch.tensor([0.1, 0.2]).double(), "density")
        zero = problem.latents("zero")
        of_flow = _Search(objective, zero, objective(zero), LBFGS(), None)
        of_flow.trial()
        with NoHostReads():
            of_flow.trial()
    with NoHostReads():
        for _ in range(_LOOK_EVERY - 1):
            search.trial()
        with pytest.raises(AssertionError, match="the host would wait"):
            search.look()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_replayed_evaluation_is_the_evaluation() -> None:
    flow, physics = small_glow().cuda(), operators()["inpainting"].to("cuda")
    with frozen(flow), torch.no_grad():
        y = torch.rand(2, *SHAPE, dtype=torch.float64, device="cuda")
        problem = LatentProblem(flow, y, physics)
        objective = Objective(problem, squared_error, torch.tensor([0.1, 0.2]).to(y), "density")
        for _ in range(3):
            z = torch.randn(2, problem.dimension).to(y)
            torch.testing.assert_close(objective(z), objective.with_gradient(z))
        assert objective.replayed.refusal is None
        reads = Replayed(lambda x: x * float(x.sum()))
        torch.testing.assert_close(reads(y), y * y.sum())
        assert reads.refusal == "the host waits for _local_scalar_dense"


def test_every_optimizer_agrees_with_scipy_on_a_convex_problem() -> None:
    """A logistic regression with a ridge."""
    features = torch.randn(40, 5, dtype=torch.float64)
    labels = torch.sign(features.sum(1) + torch.randn(40).double())

    def loss(z: Tensor) -> Tensor:
        return nn.functional.softplus(-labels * (z @ features.T)).sum(1) + 0.1 * z.square().sum(1)

    evaluate, start = with_gradient(loss), torch.zeros(1, 5, dtype=torch.float64)

    def peer(z: np.ndarray) -> tuple[float, np.ndarray]:
        f, g = evaluate(torch.from_numpy(z)[None])
        return float(f), g[0].numpy()

    expected = minimize(peer, start[0].numpy(), jac=True, method="L-BFGS-B", options={"ftol": 1e-15, "gtol": 1e-10})
    for optimizer in (LBFGS(200, tolerance=0), TorchLBFGS(10), Adam(800, 0.1, 0.0)):
        np.testing.assert_allclose(optimizer.minimize(evaluate, start).z[0].numpy(), expected.x, atol=1e-5)
    ours = LBFGS(200, tolerance=1e-12).minimize(evaluate, start)
    assert ours.n_evaluations.item() < 1.5 * expected.nfev
