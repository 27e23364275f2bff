"""LatentMAP: closed forms with a Gaussian prior, every image by itself, the weight from the noise, clear errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepinv.models import Reconstructor
from deepinv.physics import Denoising, GaussianNoise, Inpainting, LinearPhysics, Physics, PoissonGaussianNoise
from solver_cases import SHAPE, affine, gaussian_flow, matrix, operators, small_glow
from torch import Tensor

from flowprox.flows import Flow, Glow, HaarSqueeze, Sequential, Unsqueeze
from flowprox.noise import FlowNoise, Noise
from flowprox.operators import make_physics, measured_entries
from flowprox.solvers import (
    LBFGS,
    Adam,
    Discrepancy,
    LatentMAP,
    SolverInterrupted,
    TorchLBFGS,
    null_space_perturbed,
)
from flowprox.solvers.latent_map import noise_energy
from flowprox.solvers.objective import Objective, squared_error
from flowprox.solvers.problem import LatentProblem

EXACT = LBFGS(n_iterations=300, tolerance=0)
OPERATORS = ["denoising", "inpainting", "deblurring", "compressed-sensing"]


def measurement(physics: LinearPhysics, n: int = 2) -> Tensor:
    return physics(torch.rand(n, *SHAPE, dtype=torch.float64))


def squared_solution(A: Tensor, W: Tensor, b: Tensor, y: Tensor, gamma: float) -> Tensor:
    """argmin_z ||y - A (W z + b)||^2 + gamma ||z||^2, one row per measurement."""
    M = A @ W
    return torch.linalg.solve(M.T @ M + gamma * torch.eye(M.shape[1], dtype=M.dtype), M.T @ (y.flatten(1) - A @ b).T).T


@pytest.mark.parametrize("precondition", [False, True])
@pytest.mark.parametrize("name", OPERATORS)
def test_a_gaussian_prior_has_a_closed_form(name: str, precondition: bool) -> None:
    flow, physics = gaussian_flow(), operators()[name]
    y = measurement(physics)
    W, b = affine(flow)
    z = squared_solution(matrix(physics), W, b, y, 0.3)
    solution = LatentMAP(flow, 0.3, norm="squared", optimizer=EXACT, precondition=precondition).solve(y, physics)
    torch.testing.assert_close(solution.latent, z, atol=1e-5, rtol=0)
    torch.testing.assert_close(solution.estimate.flatten(1), z @ W.T + b, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", OPERATORS)
def test_the_unsquared_norm_is_the_squared_one_with_another_weight(name: str) -> None:
    """At the minimum gamma z / ||z|| = 2 gamma' z, so gamma' = gamma / (2 ||z||) has the same solution."""
    flow, physics = gaussian_flow(), operators()[name]
    y = measurement(physics, 1)
    solution = LatentMAP(flow, 0.2, optimizer=EXACT).solve(y, physics)
    assert solution.latent is not None
    equivalent = 0.2 / (2 * solution.latent.norm().item())
    W, b = affine(flow)
    torch.testing.assert_close(
        solution.latent, squared_solution(matrix(physics), W, b, y, equivalent), atol=1e-5, rtol=0
    )


def test_a_heavy_weight_leaves_the_most_likely_latent() -> None:
    flow, physics = gaussian_flow(), operators()["denoising"]
    solution = LatentMAP(flow, 1e3).solve(measurement(physics), physics)
    assert solution.latent is not None and bool((solution.latent == 0).all())
    assert solution.reasons == ["converged"] * 2
    assert solution.residual_p_value is not None and bool((solution.residual_p_value < 1e-3).all())


@pytest.mark.parametrize("share", [0.3, 0.7, 0.95])
def test_scales_do_not_turn_the_way_out_of_the_kink_uphill(share: float) -> None:
    """gamma a little below ||grad|| at z = 0: the minimum is near 0 but not there, whatever the scales."""
    flow, physics = gaussian_flow(), operators()["denoising"]
    y = measurement(physics)
    W, b = affine(flow)
    gamma = share * torch.linalg.vector_norm(2 * (y.flatten(1) - b) @ W, dim=1)
    plain, scaled = (LatentMAP(flow, gamma, precondition=choice, optimizer=EXACT) for choice in (False, True))
    strong = torch.logspace(-2, 2, 16, dtype=torch.float64).expand(2, 16)
    expected = plain.solve(y, physics)
    assert expected.latent is not None and bool((expected.latent != 0).any(dim=1).all())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LatentProblem, "channel_scales", lambda self, seed: strong)
        solution = scaled.solve(y, physics)
    torch.testing.assert_close(solution.latent, expected.latent, atol=1e-5, rtol=0)


def test_a_weight_of_zero_for_one_image_does_not_change_the_others() -> None:
    flow, physics = small_glow(), operators()["compressed-sensing"]
    y = measurement(physics)
    few = LBFGS(n_iterations=3)
    together = LatentMAP(flow, torch.tensor([0.3, 0.0]), optimizer=few).solve(y, physics)
    for i, gamma in enumerate((0.3, 0.0)):
        alone = LatentMAP(flow, gamma, optimizer=few).solve(y[i : i + 1], physics)
        torch.testing.assert_close(alone.estimate[0], together.estimate[i], atol=1e-9, rtol=0)


NOISY = {
    "per row": ("denoising", {"noise": "sinusoidal"}, (3, 8, 8)),
    "per measurement": ("compressed-sensing", {"m": 5, "noise": "sinusoidal"}, (1, 8, 8)),
    "as many images as measurements": ("compressed-sensing", {"m": 3, "noise": "sinusoidal"}, (1, 8, 8)),
    "with a mean": ("compressed-sensing", {"m": 5, "noise": GaussianNoise(0.1)}, (1, 8, 8)),
    "masked": ("inpainting", {"mask_size": 4}, (3, 8, 8)),
    "lines of k-space": ("mri", {"acceleration": 4}, (1, 16, 16)),
}


@pytest.mark.parametrize("name", NOISY)
def test_the_energy_of_the_noise_is_what_the_operator_adds(name: str) -> None:
    problem, parameters, shape = NOISY[name]
    if name != "with a mean":
        parameters = parameters | {"sigma": 0.1}
    physics = make_physics(problem, shape, **parameters)
    x = torch.zeros(3, *shape)
    y = physics(x)
    energy, _ = noise_energy(y, physics, measured_entries(y, physics, shape))
    drawn = torch.stack([(physics(x) - physics.A(x)).square().flatten(1).sum(1) for _ in range(400)]).mean()
    assert energy.shape == (3,) and bool((energy / drawn - 1).abs().max() < 0.1)


def test_the_image_form_maximizes_the_density() -> None:
    """No image around has a lower objective ||y - A x||^2 - gamma log p(x)."""
    flow, physics = small_glow(), operators()["inpainting"]
    y = measurement(physics, 1)
    x = LatentMAP(flow, 0.02, form="image", optimizer=EXACT)(y, physics)

    def objective(x: Tensor) -> Tensor:
        with torch.no_grad():
            return (y - physics.A(x)).flatten(1).square().sum(1) - 0.02 * flow.log_prob(x)

    reached = objective(x)
    for scale in (1e-3, 1e-2, 1e-1):
        others = x + scale * torch.randn(200, *SHAPE, dtype=torch.float64)
        assert bool((objective(others) >= reached - 1e-9).all())


def test_losses_are_the_objective() -> None:
    flow, physics = small_glow(), operators()["deblurring"]
    y = measurement(physics)
    solution = LatentMAP(flow, torch.tensor([0.1, 0.2]), optimizer=LBFGS(n_iterations=20)).solve(y, physics)
    assert solution.latent is not None and solution.latent_norms is not None
    with torch.no_grad():
        misfit = (y - physics.A(flow.decode(solution.latent))).flatten(1).square().sum(1)
    norms = solution.latent.norm(dim=1)
    torch.testing.assert_close(solution.losses[-1], misfit + torch.tensor([0.1, 0.2], dtype=torch.float64) * norms)
    torch.testing.assert_close(solution.latent_norms[-1], norms)
    torch.testing.assert_close(solution.estimate, flow.decode(solution.latent).detach())


STARTS = {
    "zero": "zero",
    "adjoint": "adjoint",
    "random": 0.3,
    "image": torch.rand(3, *SHAPE, dtype=torch.float64),
}


@pytest.mark.parametrize("gamma", [0.1, "discrepancy"])
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("optimizer", [LBFGS(n_iterations=12), Adam(n_iterations=12)], ids=["lbfgs", "adam"])
def test_an_image_does_not_depend_on_its_batch(optimizer: LBFGS | Adam, start: str, gamma: float | str) -> None:
    flow, physics = small_glow(), operators()["inpainting"]
    y = measurement(physics, 3)
    first = STARTS[start]
    one = first[1:2] if isinstance(first, Tensor) else first
    together = LatentMAP(flow, gamma, start=first, optimizer=optimizer).solve(y, physics)
    alone = LatentMAP(flow, gamma, start=one, optimizer=optimizer).solve(y[1:2], physics)
    torch.testing.assert_close(alone.estimate, together.estimate[1:2], atol=1e-8, rtol=0)
    assert alone.reasons == together.reasons[1:2]


def test_starts() -> None:
    flow, physics = small_glow(), operators()["compressed-sensing"]
    x = torch.rand(2, *SHAPE, dtype=torch.float64)
    y = physics.A(x)
    problem = LatentProblem(flow, y, physics)

    class Adjoint(Reconstructor):
        def forward(self, y: Tensor, physics: LinearPhysics) -> Tensor:  # type: ignore[override]
            return physics.A_adjoint(y)

    torch.testing.assert_close(problem.decode(problem.latents(x)), x)
    torch.testing.assert_close(problem.decode(problem.latents("adjoint")), physics.A_adjoint(y))
    torch.testing.assert_close(problem.decode(problem.latents(Adjoint())), physics.A_adjoint(y))
    assert torch.equal(problem.latents("zero"), torch.zeros(2, 16, dtype=torch.float64))
    assert torch.equal(problem.latents(0.7, seed=1), problem.latents(0.7, seed=1))
    assert not torch.equal(problem.latents(0.7, seed=1), problem.latents(0.7, seed=2))


@pytest.mark.parametrize("seed", [0, 1])
def test_a_null_space_perturbation_is_not_seen(seed: int) -> None:
    """With the seed of the sensing matrix too."""
    physics = operators()["compressed-sensing"]
    x = torch.rand(2, *SHAPE, dtype=torch.float64)
    perturbed = null_space_perturbed(x, physics, scale=0.5, seed=seed)
    torch.testing.assert_close(physics.A(perturbed), physics.A(x), atol=1e-5, rtol=0)
    assert (perturbed - x).std() > 0.2


@pytest.mark.parametrize("norm", ["unsquared", "squared"])
@pytest.mark.parametrize("name", ["denoising", "inpainting"])
def test_the_discrepancy_principle_leaves_as_much_as_the_noise(name: str, norm: str) -> None:
    """Without a limit, the residual has the energy tau^2 sigma^2 m, sigma = 0.1 and m the number of seen pixels."""
    flow, physics = gaussian_flow(), operators()[name]
    x = flow.sample(4, generator=torch.Generator().manual_seed(0))
    y = physics(x)
    rule = Discrepancy(tau=1.0, limit=1e6, n_stages=10)
    solution = LatentMAP(flow, rule, norm=norm, optimizer=LBFGS(n_iterations=150)).solve(y, physics)
    seen = {"denoising": 16, "inpainting": 12}[name]
    left = (y - physics.A(solution.estimate)).flatten(1).square().sum(1) / (seen * 0.01)
    assert bool(((left - 1).abs() < 0.1).all()), left
    assert solution.gamma is not None and solution.gamma.shape == (4,) and len(set(solution.gamma.tolist())) == 4


def test_the_energy_of_a_noise_without_formula_is_drawn() -> None:
    """Neither an attribute called sigma nor a flow's scale need be its level."""

    class Uniform(Noise):
        """On [0, 1]; its sigma is something else."""

        sigma = torch.tensor(0.01)

        def sample_like(self, y: Tensor, generator: Any = None) -> Tensor:
            return torch.rand(y.shape, generator=generator, dtype=y.dtype)

    for noise in (Uniform(), FlowNoise(gaussian_flow(), scale=2.0)):
        physics = Denoising(noise_model=noise)
        y = torch.zeros(200, *SHAPE, dtype=torch.float64)
        drawn = noise.sample_like(y, torch.Generator().manual_seed(1)).square().flatten(1).sum(1).mean()
        energy, n = noise_energy(y, physics, torch.ones_like(y))
        assert n[0] == 16 and 0.8 < energy[0] / drawn < 1.25
    with pytest.raises(ValueError, match="PoissonGaussianNoise does not tell"):
        noise_energy(torch.ones(1, *SHAPE), Denoising(noise_model=PoissonGaussianNoise()), torch.ones(1, *SHAPE))


def test_the_discrepancy_principle_stays_near_the_rule_of_bayes() -> None:
    """With a prior that is right and little noise, matching the residual would oversmooth: the limit holds."""
    flow, physics = gaussian_flow(), operators()["denoising"]
    y = physics(flow.sample(4))
    solution = LatentMAP(flow, Discrepancy(share=1.0, limit=1.5), norm="squared").solve(y, physics)
    assert solution.gamma is not None
    torch.testing.assert_close(solution.gamma, torch.full_like(solution.gamma, 1.5 * 0.01), rtol=1e-6, atol=0)


def test_both_norms_have_the_same_estimate_by_the_rule_of_bayes() -> None:
    """gamma = 2 sigma^2 ||z|| for the unsquared norm, sigma^2 for the squared one: the mode of the posterior."""
    flow, physics = gaussian_flow(), operators()["denoising"]
    y = physics(flow.sample(4))
    rule, optimizer = Discrepancy(share=1.0, limit=1.0, n_stages=12), LBFGS(n_iterations=120)
    unsquared, squared = (
        LatentMAP(flow, rule, norm=norm, optimizer=optimizer).solve(y, physics) for norm in ("unsquared", "squared")
    )
    torch.testing.assert_close(unsquared.estimate, squared.estimate, atol=1e-4, rtol=0)


def test_operators_that_blow_up_are_survived() -> None:
    """A x is infinite wherever a pixel passes 0.56, which trial steps do that are three times too long."""
    seen = []

    def blow_up(x: Tensor) -> Tensor:
        seen.append(float(x.detach().max()))
        return torch.where(x > 0.56, torch.inf, x)

    physics = Physics(A=blow_up, noise_model=GaussianNoise(0.1))
    y = torch.full((1, *SHAPE), 0.55, dtype=torch.float64)
    flow = Flow(Sequential([HaarSqueeze(), Unsqueeze()]), SHAPE, n_levels=1).double()
    optimizer = LBFGS(n_iterations=300, learning_rate=3.0, tolerance=0)
    solution = LatentMAP(flow, 1e-4, optimizer=optimizer, precondition=False).solve(y, physics)
    assert max(seen) > 0.56
    assert bool(torch.isfinite(solution.estimate).all())
    assert (solution.estimate - y).abs().max() < 0.01


def test_an_operator_may_differ_from_image_to_image() -> None:
    masks = (torch.rand(3, *SHAPE) > 0.4).double()
    flow, physics = gaussian_flow(), Inpainting(SHAPE, mask=masks)
    y = physics.A(torch.rand(3, *SHAPE, dtype=torch.float64))
    together = LatentMAP(flow, 0.1)(y, physics)
    alone = LatentMAP(flow, 0.1)(y[1:2], Inpainting(SHAPE, mask=masks[1]))
    torch.testing.assert_close(together[1:2], alone, atol=1e-8, rtol=0)


def test_nothing_of_the_flow_changes() -> None:
    flow, physics = small_glow().train(), operators()["denoising"]
    first = next(flow.parameters()).requires_grad_(False)
    before = {name: value.clone() for name, value in flow.state_dict().items()}
    x_hat = LatentMAP(flow, 0.1, optimizer=LBFGS(n_iterations=3))(measurement(physics), physics)
    assert flow.training and not first.requires_grad and not x_hat.requires_grad
    assert all(parameter.requires_grad for parameter in list(flow.parameters())[1:])
    assert all(torch.equal(value, before[name]) for name, value in flow.state_dict().items())


def test_ctrl_c_keeps_what_is_there() -> None:
    calls = 0

    class Interrupting(Denoising):
        def A(self, x: Tensor, **kwargs: object) -> Tensor:
            nonlocal calls
            calls += 1
            if calls == 9:
                raise KeyboardInterrupt
            return x

    y = torch.rand(2, *SHAPE, dtype=torch.float64)
    with pytest.raises(SolverInterrupted) as caught:
        LatentMAP(small_glow(), 0.01, optimizer=EXACT, precondition=False).solve(y, Interrupting())
    solution = caught.value.solution
    assert "interrupted" in solution.reasons and bool((solution.losses[-1] < solution.losses[0]).all())


BAD = {
    "negative gamma": ({"gamma": -1.0}, "gamma must be finite and at least 0"),
    "gamma by another name": ({"gamma": "discrepance"}, "gamma must be a number"),
    "norm": ({"norm": "l1"}, "norm must be one of 'unsquared', 'squared'"),
    "space": ({"space": "pixels"}, "space must be one of 'latent', 'image'"),
    "kink in image space": ({"space": "image"}, "has a kink that x does not show"),
    "form": ({"form": "x"}, "form must be one of 'latent', 'image'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused(name: str) -> None:
    arguments, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        LatentMAP(gaussian_flow(), **arguments)


def test_what_does_not_fit_is_refused() -> None:
    flow, physics = gaussian_flow(), operators()["denoising"]
    y = measurement(physics)
    solver = LatentMAP(flow, 0.1)
    with pytest.raises(ValueError, match="NaN or infinite"):
        solver(y * torch.nan, physics)
    with pytest.raises(ValueError, match="must be a batch"):
        solver(torch.zeros(16, dtype=torch.float64), physics)
    with pytest.raises(ValueError, match="3 channels and the flow has 1"):
        solver(torch.zeros(1, 3, 4, 4, dtype=torch.float64), make_physics("denoising", (3, 4, 4)))
    with pytest.raises(ValueError, match="sides divisible by"):
        LatentMAP(Glow((1, 8, 8), n_levels=3, n_steps=1, hidden_channels=4).double(), 0.1)(y, physics)
    with pytest.raises(ValueError, match="convert one of them"):
        solver(y.float(), physics)
    with pytest.raises(ValueError, match="not the adjoint"):
        solver(y, LinearPhysics(A=lambda x: 2 * x, A_adjoint=lambda y: y))
    with pytest.raises(ValueError, match="give one number, or one for each of 2"):
        LatentMAP(flow, torch.tensor([0.1, 0.1, 0.1]))(y, physics)
    with pytest.raises(ValueError, match="start has shape"):
        LatentMAP(flow, 0.1, start=torch.zeros(2, 1, 8, 8, dtype=torch.float64))(y, physics)
    with pytest.raises(ValueError, match="start must be 'zero'"):
        LatentMAP(flow, 0.1, start="null")(y, physics)
    with pytest.raises(ValueError, match="needs the level of the noise"):
        LatentMAP(flow, "discrepancy")(y, LinearPhysics(A=lambda x: x, A_adjoint=lambda y: y))
    with pytest.raises(ValueError, match="its level is 0"):
        LatentMAP(flow, "discrepancy")(y, make_physics("denoising", SHAPE, sigma=0.0))


@pytest.mark.parametrize("form", ["latent", "image"])
@pytest.mark.parametrize("name", OPERATORS)
def test_both_spaces_have_the_analytic_answer(name: str, form: str) -> None:
    """An affine flow: F is the same quadratic over z and over x; its density adds a constant and halves the weight."""
    flow, physics = gaussian_flow(), operators()[name]
    y = measurement(physics)
    W, b = affine(flow)
    z = squared_solution(matrix(physics), W, b, y, 0.3 if form == "latent" else 0.15)
    for space in ("latent", "image"):
        solver = LatentMAP(flow, 0.3, norm="squared", form=form, optimizer=EXACT, space=space)
        solution = solver.solve(y, physics)
        torch.testing.assert_close(solution.estimate.flatten(1), z @ W.T + b, atol=1e-5, rtol=0)
        torch.testing.assert_close(solution.latent, z, atol=1e-4, rtol=0)


def test_both_spaces_minimize_one_function() -> None:
    """At the minimum over x no z around has a lower objective, for a flow that is not affine."""
    flow, physics = small_glow(), operators()["inpainting"]
    y = measurement(physics, 1)
    solution = LatentMAP(flow, 0.02, form="image", space="image", optimizer=EXACT).solve(y, physics)
    assert solution.latent is not None
    objective = Objective(
        LatentProblem(flow, y.expand(200, -1, -1, -1), physics), squared_error, 0.02, "density", "latent"
    )
    around = solution.latent + 1e-2 * torch.randn(200, 16, dtype=torch.float64)
    assert bool((objective(around)[0] >= solution.losses[-1] - 1e-9).all())


@pytest.mark.parametrize("optimizer", [TorchLBFGS(10), Adam(600, 0.05, 0.0)], ids=["lbfgs", "adam"])
def test_published_optimizers_reach_the_analytic_answer(optimizer: Any) -> None:
    flow, physics = gaussian_flow(), operators()["deblurring"]
    y = measurement(physics)
    W, b = affine(flow)
    z = squared_solution(matrix(physics), W, b, y, 0.3)
    solution = LatentMAP(flow, 0.3, norm="squared", optimizer=optimizer).solve(y, physics)
    torch.testing.assert_close(solution.latent, z, atol=1e-3, rtol=0)


@pytest.mark.parametrize("optimizer", [LBFGS(8), Adam(8), TorchLBFGS(1)])
@pytest.mark.parametrize("gamma", [0.1, "discrepancy"])
def test_progress_is_told(gamma: float | str, optimizer: Any) -> None:
    calls: list[tuple[int, int]] = []
    flow, physics = gaussian_flow(), operators()["denoising"]
    LatentMAP(flow, gamma, optimizer=optimizer).solve(
        measurement(physics), physics, callback=lambda n, n_at_most: calls.append((n, n_at_most))
    )
    done, at_most = zip(*calls, strict=True)
    assert list(done) == sorted(done) and done[0] == 1 and len(set(at_most)) == 1 and done[-1] <= at_most[0]


def test_progress_goes_on_when_images_leave_the_batch() -> None:
    """Three of four are at their solution when they start; the others' results are the same as alone."""
    flow, physics = small_glow(), operators()["denoising"]
    y = measurement(physics, 4)
    start, calls = "zero", []
    gamma = torch.tensor([1e3, 1e3, 0.01, 1e3], dtype=torch.float64)
    solver = LatentMAP(flow, gamma, start=start, optimizer=LBFGS(30))
    solution = solver.solve(y, physics, callback=lambda n, _: calls.append(n))
    assert calls == list(range(1, len(calls) + 1)) and solution.n_evaluations[2] > 8 > solution.n_evaluations[0]
    alone = LatentMAP(flow, 0.01, start=start, optimizer=LBFGS(30))(y[2:3], physics)
    torch.testing.assert_close(solution.estimate[2:3], alone, atol=1e-8, rtol=0)


@pytest.mark.parametrize("gamma", [0.0, "discrepancy"])
def test_what_stands_in_hidden_pixels_changes_nothing(gamma: float | str) -> None:
    flow, physics = small_glow(), operators()["inpainting"]
    y = measurement(physics)
    scratched = torch.where(physics.mask == 0, 7.0, y)  # type: ignore[arg-type]
    solver = LatentMAP(flow, gamma, optimizer=LBFGS(12))
    assert torch.equal(solver(scratched, physics), solver(y, physics))


def test_an_empty_batch_has_an_empty_result() -> None:
    flow, physics = small_glow(), operators()["deblurring"]
    y = measurement(physics)[:0]
    for solver in (LatentMAP(flow), LatentMAP(flow, "discrepancy"), LatentMAP(flow, 0.1, optimizer=Adam(3))):
        assert solver(y, physics).shape == (0, *SHAPE)
