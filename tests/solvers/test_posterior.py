"""Samples of posteriors whose moments are known in closed form or by quadrature; errors are measured in standard errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from deepinv.physics import Denoising, GaussianNoise, Inpainting, LinearPhysics, Physics, PoissonNoise
from helpers import dense_matrix
from torch import Tensor, nn

from flowprox.flows import ActNorm, Conv1x1, Flow, HaarSqueeze, Sequential, Unsqueeze
from flowprox.operators import make_physics
from flowprox.solvers.posterior import TRACES, PosteriorSampling, PosteriorSolution, SamplerOptions, _add_square
from flowprox.solvers.sampling import KERNELS

SHAPE = (1, 4, 4)
D = 16


def linear_flow(channels: int = 1) -> Flow:
    """x = G z + b with scales from 0.4 to 1."""
    flow = Flow(
        Sequential([HaarSqueeze(), ActNorm(4 * channels), Conv1x1(4 * channels), Unsqueeze()]), (channels, 4, 4), 1
    )
    actnorm = flow.bijection.layers[1]
    with torch.no_grad():
        actnorm.log_scale.copy_(-torch.linspace(math.log(0.4), math.log(1.0), 4 * channels))
        actnorm.bias.copy_(torch.linspace(-0.5, 0.5, 4 * channels))
        actnorm.initialized.fill_(True)
    return flow.double().eval()


class Sensing(LinearPhysics):
    """y = M x with a dense matrix."""

    def __init__(self, n_measurements: int, sigma: float) -> None:
        super().__init__(noise_model=GaussianNoise(sigma))
        matrix = torch.randn(n_measurements, D, dtype=torch.float64) / math.sqrt(n_measurements)
        self.register_buffer("matrix", matrix)

    def A(self, x: Tensor, **kwargs: Any) -> Tensor:
        return x.flatten(1) @ self.matrix.T

    def A_adjoint(self, y: Tensor, **kwargs: Any) -> Tensor:
        return (y @ self.matrix).view(-1, *SHAPE)


class Uneven(nn.Module):
    """Gaussian noise with a mean and a standard deviation per entry: a noise of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.linspace(0.1, 0.5, D, dtype=torch.float64).view(SHAPE))

    def log_prob(self, residual: Tensor) -> Tensor:
        return -0.5 * ((residual - 0.3) / self.scale).square().flatten(1).sum(1)


def checkerboard() -> Tensor:
    return ((torch.arange(4)[:, None] + torch.arange(4)) % 2).double().expand(SHAPE)


# name: (physics, noise, mean and standard deviation of the noise per measurement)
CASES: dict[str, Callable[[], tuple[Physics, Any, Any, Any]]] = {
    "denoising": lambda: (make_physics("denoising", SHAPE, sigma=0.3), None, 0.0, 0.3),
    "masked": lambda: (Inpainting(SHAPE, mask=checkerboard(), noise_model=GaussianNoise(0.6)), None, 0.0, 0.6),
    "blur": lambda: (make_physics("deblurring", SHAPE, kernel_size=3, sigma=0.2).double(), None, 0.0, 0.2),
    "sensing": lambda: (Sensing(7, 0.6), None, 0.0, 0.6),
    "uneven noise": lambda: (Denoising(GaussianNoise(0.0)), Uneven(), 0.3, Uneven().scale.flatten()),
}
METROPOLIS = [name for name, kernel in KERNELS.items() if kernel.metropolis]
LENGTHS = {"mala": 300, "pcnl": 450, "hmc": 60, "split-hmc": 60}


def gaussian_posterior(flow: Flow, physics: Physics, y: Tensor, mean: Any, sigma: Any) -> tuple[Tensor, Tensor]:
    """Mean (B, D) and standard deviation (D,) of x for x = G z + b, y = A x + N(mean, sigma^2)."""
    with torch.no_grad():
        b = flow.decode(torch.zeros(1, D, dtype=torch.float64)).flatten(1)
        G = flow.decode(torch.eye(D, dtype=torch.float64)).flatten(1).T - b.T
    A = dense_matrix(physics.A, SHAPE)
    scaled = (A @ G) / torch.as_tensor(sigma, dtype=torch.float64).expand(len(A))[:, None]
    covariance = torch.linalg.inv(torch.eye(D, dtype=torch.float64) + scaled.T @ scaled)
    residual = (y.flatten(1) - mean - b @ A.T) / torch.as_tensor(sigma, dtype=torch.float64)
    x_mean = b + residual @ scaled @ covariance @ G.T
    return x_mean, (G @ covariance @ G.T).diagonal().sqrt()


def assert_moments(solution: PosteriorSolution, mean: Tensor, std: Tensor) -> None:
    """Within five standard errors, as the effective sample size has them; every pixel."""
    ess = solution.ess[:, None]
    errors = (solution.mean.flatten(1) - mean) / (std / ess.sqrt())
    assert errors.abs().max() < 5, f"mean off by {errors.abs().max():.3g} standard errors"
    errors = (solution.std.flatten(1) / std - 1) * (2 * ess).sqrt()
    assert errors.abs().max() < 5, f"std off by {errors.abs().max():.3g} standard errors"


def sample(sampler: str, flow: Flow, noise: Any = None, **options: Any) -> PosteriorSampling:
    n = LENGTHS[sampler]
    return PosteriorSampling(flow, noise, sampler, n, n // 2, n_chains=16, options=SamplerOptions(**options))


# every operator with hmc; one or two are enough for the others
PAIRS = [("hmc", name) for name in CASES] + [(sampler, "masked") for sampler in METROPOLIS if sampler != "hmc"]
PAIRS += [("split-hmc", "sensing")]


@pytest.mark.parametrize(("sampler", "name"), PAIRS)
def test_gaussian_posterior(sampler: str, name: str) -> None:
    flow, (physics, noise, noise_mean, sigma) = linear_flow(), CASES[name]()
    y = physics.A(flow.sample(2))
    y = (
        y + torch.as_tensor(sigma).reshape(-1, *y.shape[1:]) * torch.randn_like(y)
        if name == "uneven noise"
        else (y + sigma * torch.randn_like(y))
    )
    solution = sample(sampler, flow, noise).solve(y, physics)
    assert solution.ess.min() > 120  # fewer would make the comparison blunt
    assert_moments(solution, *gaussian_posterior(flow, physics, y, noise_mean, sigma))


def test_dense_coordinates_mix_where_scales_do_not() -> None:
    flow, physics = linear_flow(), Sensing(7, 0.01)
    y = physics.A(flow.sample(1))
    y = y + 0.01 * torch.randn_like(y)
    solvers = {
        value: PosteriorSampling(flow, None, "hmc", 30, 16, 16, options=SamplerOptions(precondition=value))
        for value in (True, "dense")
    }
    plain, dense = (solver.solve(y, physics) for solver in solvers.values())
    assert dense.ess.item() > 2 * plain.ess.item() and dense.r_hat.item() < 1.05
    assert_moments(dense, *gaussian_posterior(flow, physics, y, 0.0, 0.01))
    assert solvers["dense"].solve(y, physics, start=dense.state).r_hat.item() < 1.05


def identity_flow(shape: tuple[int, int, int] = (1, 1, 1)) -> Flow:
    """x = z."""
    flow = Flow(ActNorm(shape[0]), shape, offset=0.0).double().eval()
    flow.bijection.initialized.fill_(True)
    return flow


class Square(Physics):
    """y = x^2: two signs explain it."""

    def A(self, x: Tensor, **kwargs: Any) -> Tensor:
        return x.square()


class Laplace:
    """A density with a kink; it has no ``sample_like``."""

    def log_prob(self, residual: Tensor) -> Tensor:
        return -residual.abs().flatten(1).sum(1) / 0.5


@pytest.mark.parametrize("sampler", METROPOLIS)
def test_posterior_of_a_nonlinear_operator_and_another_noise(sampler: str) -> None:
    y = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64).view(3, 1, 1, 1)
    grid = torch.linspace(-8, 8, 20_001, dtype=torch.float64)
    log_density = -0.5 * grid.square() - (y.view(3, 1) - grid.square()).abs() / 0.5
    weight = torch.softmax(log_density, dim=1)
    mean = (weight * grid).sum(1, keepdim=True)
    std = ((weight * grid.square()).sum(1, keepdim=True) - mean.square()).sqrt()
    solver = PosteriorSampling(identity_flow(), Laplace(), sampler, n_samples=200, n_warmup=60, n_chains=16)
    assert_moments(solver.solve(y, Square()), mean, std)


def test_langevin_without_correction_has_the_variance_its_step_gives() -> None:
    """For precision a of every direction: 1 / (a (1 - a h^2 / 4))."""
    a, h = 1 + 1 / 0.5**2, 0.5
    options = SamplerOptions(step_size=h, precondition=False, jitter=0.0)
    solver = PosteriorSampling(identity_flow(SHAPE), None, "ula", 400, 40, options=options)
    solution = solver.solve(torch.zeros(1, *SHAPE, dtype=torch.float64), make_physics("denoising", SHAPE, sigma=0.5))
    std = torch.full((D,), (a * (1 - a * h**2 / 4)) ** -0.5, dtype=torch.float64)
    assert_moments(solution, torch.zeros(1, D, dtype=torch.float64), std)
    assert solution.acceptance.item() == 1 and solution.step_size.item() == pytest.approx(h)


def quick(flow: Flow | None = None, **options: Any) -> PosteriorSampling:
    return PosteriorSampling(flow or linear_flow(), n_samples=10, n_warmup=10, n_chains=3, **options)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


class Masks(Physics):
    """A mask per image."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__(noise_model=GaussianNoise(0.3))
        self.register_buffer("mask", mask)

    def A(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.mask * x


@pytest.mark.parametrize("sampler", KERNELS)
@pytest.mark.parametrize("own_generators", [False, True])
def test_an_image_does_not_depend_on_its_batch(sampler: str, own_generators: bool) -> None:
    mask = (torch.rand(2, *SHAPE) > 0.3).double()  # an operator per image
    y = mask * torch.rand(2, *SHAPE, dtype=torch.float64)
    solver = quick(sampler=sampler)
    both, alone = (
        solver.solve(y[some], Masks(mask[some]), generator=seeds)
        for some, seeds in [
            (slice(0, 2), generators(1, 2) if own_generators else None),
            (slice(1, 2), generators(2) if own_generators else None),
        ]
    )
    for name in ("samples", "std", "traces", "step_size", "state"):
        torch.testing.assert_close(getattr(both, name)[1:], getattr(alone, name), rtol=0, atol=1e-9)
    torch.testing.assert_close(both.losses[:, 1:], alone.losses, rtol=0, atol=1e-9)


def test_what_a_solution_holds() -> None:
    solver = quick(options=SamplerOptions(n_kept=10))
    flow, physics, y = solver.flow, make_physics("denoising", SHAPE, sigma=0.3), torch.rand(2, *SHAPE).double()
    wanted, training = [p.requires_grad for p in flow.parameters()], flow.training
    with torch.no_grad():
        solution = solver.solve(y, physics)
        assert torch.equal(solver(y, physics), solution.mean)
    assert [p.requires_grad for p in flow.parameters()] == wanted and flow.training == training
    assert solution.samples.shape == (2, 3, 10, *SHAPE)
    draws = solution.samples.flatten(1, 2)
    torch.testing.assert_close(solution.mean, draws.mean(1))
    torch.testing.assert_close(solution.std, draws.std(1))
    assert solution.traces.shape == (2, 3, 10, len(TRACES))
    torch.testing.assert_close(solution.traces[..., 1], solution.samples.mean((-3, -2, -1)))
    assert solution.losses.shape == (21, 2) and solution.latent is None
    torch.testing.assert_close(solution.losses[-10:], -solution.traces[..., 0].mean(1).T)
    torch.testing.assert_close(flow.decode(solution.state[:, 0]), solution.samples[:, 0, -1])
    assert not any(getattr(solution, name).requires_grad for name in ("mean", "std", "samples", "traces", "losses"))
    again = PosteriorSampling(
        flow, n_samples=7, n_warmup=0, n_chains=3, options=SamplerOptions(step_size=0.1, n_kept=2)
    )
    again = again.solve(y, physics, start=solution.state)
    torch.testing.assert_close(again.losses[0], solution.losses[-1])
    assert again.samples.shape[2] == 2


def test_standard_error_is_that_of_the_mean() -> None:
    solver = PosteriorSampling(identity_flow((1, 16, 16)), None, "hmc", n_samples=200, n_warmup=40)
    y = torch.zeros(1, 1, 16, 16, dtype=torch.float64)
    solution = solver.solve(y, make_physics("denoising", (1, 16, 16), sigma=1.0))
    assert (solution.mean / solution.standard_error).square().mean().sqrt().item() == pytest.approx(1.0, abs=0.25)


@pytest.mark.parametrize("start", ["prior", "zero", "adjoint", "images", "latents"])
def test_starts(start: str) -> None:
    y, flow = torch.rand(2, *SHAPE).double(), linear_flow()
    z = flow.encode(y).detach()
    solution = quick(flow).solve(
        y, make_physics("denoising", SHAPE, sigma=0.3), start={"images": y, "latents": z}.get(start, start)
    )
    assert solution.mean.isfinite().all()


class Bounded:
    """Uniform noise in [-b, b] by a logarithm that is NaN beyond."""

    def log_prob(self, residual: Tensor) -> Tensor:
        return (0.5 - residual.abs()).log().flatten(1).sum(1)


@pytest.mark.parametrize("sampler", KERNELS)
def test_what_is_not_finite_is_never_accepted(sampler: str) -> None:
    y = torch.zeros(1, 1, 1, 2, dtype=torch.float64)
    options = SamplerOptions(step_size=0.4, precondition=False, n_kept=50)
    solver = PosteriorSampling(identity_flow((1, 1, 2)), Bounded(), sampler, 50, 10, 8, options=options)
    solution = solver.solve(y, Denoising(GaussianNoise(1.0)), start="zero")
    assert solution.samples.abs().max() < 0.5
    assert solution.restarts is not None and solution.restarts.item() > 0


class Interrupting:
    """Gaussian noise of standard deviation 1 whose log_prob is interrupted in the n-th call."""

    def __init__(self, n: int) -> None:
        self.n = n

    def log_prob(self, residual: Tensor) -> Tensor:
        self.n -= 1
        if self.n == 0:
            raise KeyboardInterrupt
        return -0.5 * residual.flatten(1).square().sum(1)


def test_interruption_keeps_what_is_finished() -> None:
    y, physics = torch.rand(2, *SHAPE).double(), make_physics("denoising", SHAPE, sigma=1.0)
    arguments: dict[str, Any] = {"sampler": "mala", "n_samples": 20, "n_warmup": 5, "n_chains": 2}
    flow = linear_flow()
    complete = PosteriorSampling(flow, Interrupting(0), **arguments).solve(y, physics)
    solution = PosteriorSampling(flow, Interrupting(2 + 5 + 1 + 13), **arguments).solve(y, physics)
    assert solution.reasons == ["interrupted"] * 2
    assert solution.traces.shape[2] == 12
    torch.testing.assert_close(solution.traces, complete.traces[:, :, :12])
    with pytest.raises(KeyboardInterrupt):
        PosteriorSampling(flow, Interrupting(4), **arguments).solve(y, physics)


def test_progress_is_told_and_an_empty_batch_is_empty() -> None:
    calls: list[tuple[int, int]] = []
    physics, y = make_physics("denoising", SHAPE, sigma=0.3), torch.rand(2, *SHAPE).double()
    quick().solve(y, physics, callback=lambda n, n_draws: calls.append((n, n_draws)))
    assert calls == [(n, 20) for n in range(1, 21)]
    empty = quick().solve(y[:0], physics)
    assert empty.mean.shape == (0, *SHAPE) and empty.samples.shape == (0, 3, 0, *SHAPE) and empty.reasons == []


def test_chains_that_have_not_mixed_say_so() -> None:
    far = torch.linspace(-3, 3, 4, dtype=torch.float64).expand(1, D, 4).transpose(1, 2)
    options = SamplerOptions(step_size=1e-3)
    solver = PosteriorSampling(identity_flow(SHAPE), n_samples=20, n_warmup=0, options=options)
    y, physics = torch.zeros(1, *SHAPE).double(), make_physics("denoising", SHAPE, sigma=1.0)
    assert solver.solve(y, physics, start=far).reasons[0].startswith("not mixed: r_hat ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_samples": 0}, "n_samples must be at least 1"),
        ({"n_chains": 0}, "n_chains"),
        ({"n_warmup": -1}, "n_warmup"),
        ({"n_warmup": 0}, "give options.step_size"),
        ({"sampler": "gibbs"}, "must be one of .ula., .mala."),
        ({"noise": object()}, "log_prob"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PosteriorSampling(linear_flow(), **arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step_size": -0.1}, "step_size must be finite and positive"),
        ({"target_acceptance": 1.0}, "between 0 and 1"),
        ({"n_kept": 0}, "n_kept"),
        ({"n_leapfrog": 0}, "n_leapfrog"),
        ({"jitter": 1.0}, "jitter"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplerOptions(**options)


class Cut(Denoising):
    def A(self, x: Tensor, **kwargs: Any) -> Tensor:
        return x.detach()


@pytest.mark.parametrize(
    ("y", "physics", "arguments", "message"),
    [
        (torch.zeros(2, 1, 4, 4), None, {}, "convert"),
        (torch.full((2, *SHAPE), math.nan).double(), None, {}, "NaN"),
        (torch.zeros(2, 3, 4, 4).double(), None, {}, "channels"),
        (torch.zeros(2, 1, 3, 4).double(), None, {}, "divisible"),
        (torch.zeros(2, *SHAPE).double(), Denoising(GaussianNoise(0.0)), {}, "standard deviation 0"),
        (torch.zeros(2, *SHAPE).double(), Denoising(PoissonNoise()), {}, "no density"),
        (torch.zeros(2, *SHAPE).double(), Cut(GaussianNoise(0.1)), {}, "not differentiable"),
        (torch.zeros(2, *SHAPE).double(), None, {"start": torch.zeros(2, 5)}, "start has shape"),
        (torch.zeros(2, *SHAPE).double(), None, {"start": "nowhere"}, "start"),
        (torch.zeros(2, *SHAPE).double(), None, {"generator": generators(1)}, "got 1 for 2 images"),
    ],
)
def test_wrong_measurements(y: Tensor, physics: Physics | None, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quick().solve(y, physics or make_physics("denoising", SHAPE, sigma=0.1), **arguments)


@pytest.mark.parametrize("n_rows", [3, 100])
def test_a_hessian_is_added_up_in_blocks_of_rows(n_rows: int) -> None:
    jacobian = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    hessian = torch.eye(7)
    _add_square(hessian, jacobian, 0.5, n_rows)
    torch.testing.assert_close(hessian.tril(), (torch.eye(7) + 0.5 * jacobian @ jacobian.T).tril())
