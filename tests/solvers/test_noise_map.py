"""NoiseMAP: its special cases are the older methods, other noises have their closed forms, clear errors."""

from __future__ import annotations

import pytest
import torch
from deepinv.physics import Inpainting, LinearPhysics, Physics
from solver_cases import SHAPE, affine, gaussian_flow, matrix, operators, small_glow
from torch import Tensor, nn

from flowprox.baselines import GANPrior
from flowprox.flows import Glow
from flowprox.networks import DCGANGenerator
from flowprox.noise import FlowNoise, GaussianNoise, HeteroscedasticNoise, Noise
from flowprox.operators import make_physics
from flowprox.solvers import LBFGS, Adam, LatentMAP, NoiseMAP
from flowprox.solvers.objective import Objective, squared_error
from flowprox.solvers.problem import LatentProblem

EXACT = LBFGS(n_iterations=300, tolerance=0)
SIGMA = 0.2


def measurement(physics: Physics, n: int = 2) -> Tensor:
    return physics(torch.rand(n, *SHAPE, dtype=torch.float64))


def difference_of_objectives(
    one: NoiseMAP, other: LatentMAP, gamma: float, y: Tensor, physics: LinearPhysics
) -> Tensor:
    """2 sigma^2 NoiseMAP's objective minus LatentMAP's at random latents, (30,): a constant if they are the same."""
    noise = GaussianNoise(SIGMA)
    problem = LatentProblem(one.flow, y.expand(30, *y.shape[1:]), physics)
    z = torch.randn(30, problem.dimension, dtype=torch.float64)
    first = one._objective(problem, noise)(z)[0]
    prior = "density" if other.form == "image" else other.norm
    second = Objective(problem, squared_error, gamma, prior)(z)[0]
    assert second.std() > 0.1
    return 2 * SIGMA**2 * first - second


@pytest.mark.parametrize("beta", [1.0, 0.3])
@pytest.mark.parametrize("name", ["denoising", "compressed-sensing"])
def test_gaussian_noise_gives_the_image_space_objective(name: str, beta: float) -> None:
    flow, physics = small_glow(), operators()[name]
    gamma = 2 * SIGMA**2 * beta
    difference = difference_of_objectives(
        NoiseMAP(flow, beta=beta), LatentMAP(flow, gamma, form="image"), gamma, measurement(physics, 1), physics
    )
    torch.testing.assert_close(
        difference, difference[:1].expand(30), atol=1e-5, rtol=0
    )  # the noise keeps sigma in float32


def test_a_constant_determinant_gives_the_latent_objective() -> None:
    flow, physics = gaussian_flow(), operators()["inpainting"]
    gamma = SIGMA**2  # of ||z||^2 beside ||r||^2: half of 2 sigma^2
    difference = difference_of_objectives(
        NoiseMAP(flow), LatentMAP(flow, gamma, norm="squared"), gamma, measurement(physics, 1), physics
    )
    torch.testing.assert_close(
        difference, difference[:1].expand(30), atol=1e-5, rtol=0
    )  # the noise keeps sigma in float32


def test_the_latent_form_leaves_the_determinant_out() -> None:
    flow, physics = small_glow(), operators()["deblurring"]
    gamma = 0.3 * SIGMA**2
    difference = difference_of_objectives(
        NoiseMAP(flow, beta=0.3, form="latent"),
        LatentMAP(flow, gamma, norm="squared"),
        gamma,
        measurement(physics, 1),
        physics,
    )
    torch.testing.assert_close(difference, difference[:1].expand(30), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["denoising", "inpainting", "deblurring", "compressed-sensing"])
def test_a_gaussian_prior_and_noise_with_a_level_per_entry_have_a_closed_form(name: str) -> None:
    """Weighted least squares, the mean of the noise taken away."""
    flow, physics = gaussian_flow(), operators()[name]
    y = measurement(physics)
    scale = 0.1 + torch.rand(y.shape[1:], dtype=torch.float64)
    noise = HeteroscedasticNoise(scale, mean=0.3)
    W, b = affine(flow)
    A = matrix(physics)
    M, weight = A @ W, 1 / scale.flatten().square()
    z = torch.linalg.solve(
        M.T @ (weight[:, None] * M) + torch.eye(16, dtype=torch.float64),
        M.T @ (weight * ((y - noise.mean).flatten(1) - A @ b)).T,
    ).T
    solution = NoiseMAP(flow, noise, optimizer=EXACT).solve(y, physics)
    torch.testing.assert_close(solution.latent, z, atol=1e-5, rtol=0)


def test_a_decoder_without_density_gives_the_objective_of_bora_et_al() -> None:
    """Both find the generator's image again, and NoiseMAP's loss is ||y - A G(z)||^2 / (2 sigma^2) and a constant."""
    generator = DCGANGenerator((1, 8, 8), latent_size=2, hidden_channels=4, n_scales=2).eval()
    with torch.no_grad():
        x = generator(torch.tensor([[0.5, -0.4], [-0.3, 0.8]]))
    physics = make_physics("compressed-sensing", (1, 8, 8), m=20, sigma=0.0)
    y = physics.A(x)
    solver = NoiseMAP(generator, GaussianNoise(SIGMA), beta=0.0, start=0.1, n_restarts=3, optimizer=Adam(150, 0.2, 0.0))
    solution = solver.solve(y, physics)
    bora = GANPrior(generator, n_restarts=3, n_steps=150, regularization=0.0)(y, physics)
    assert (solution.estimate - x).abs().max() < 1e-2 and (bora - x).abs().max() < 1e-2
    assert solution.latent is not None and solution.latent.shape == (2, 2)
    misfit = (y - physics.A(solution.estimate)).flatten(1).square().sum(1)
    constant = -GaussianNoise(SIGMA).log_prob(torch.zeros_like(y))
    torch.testing.assert_close(solution.losses.min(0).values, misfit / (2 * SIGMA**2) + constant, atol=1e-3, rtol=1e-5)


def test_the_right_noise_model_beats_the_wrong_one() -> None:
    """Rows of which every other one is lost in noise: knowing which is worth decibels."""
    flow = gaussian_flow()
    x = flow.sample(20)
    scale = torch.tensor([0.05, 3.0, 0.05, 3.0], dtype=torch.float64)[:, None]
    physics = make_physics("denoising", SHAPE, sigma=0.0)
    noise = HeteroscedasticNoise(scale)
    y = noise(x)
    rms = scale.square().mean().sqrt().item()
    knowing, not_knowing = (NoiseMAP(flow, n)(y, physics) for n in (noise, GaussianNoise(rms)))
    assert (knowing - x).square().mean() < 0.7 * (not_knowing - x).square().mean()


def test_a_trained_flow_is_a_noise() -> None:
    """At the solution found no image around is more likely, by the flow's own density."""
    flow, noise = small_glow(), FlowNoise(small_glow(), scale=0.3)
    physics = operators()["inpainting"]
    y = measurement(physics, 1)
    x = NoiseMAP(flow, noise, optimizer=EXACT)(y, physics)

    def log_posterior(x: Tensor) -> Tensor:
        with torch.no_grad():
            return noise.log_prob(y - physics.A(x)) + flow.log_prob(x)

    for scale in (1e-3, 1e-2, 1e-1):
        around = x + scale * torch.randn(200, *SHAPE, dtype=torch.float64)
        assert bool((log_posterior(around) <= log_posterior(x) + 1e-7).all())
    assert all(parameter.requires_grad for parameter in noise.parameters())


def test_operators_that_are_not_linear() -> None:
    """One bit per measurement: the estimate agrees with more signs than the start does."""
    flow = gaussian_flow()
    physics = make_physics("one-bit", SHAPE, m=200, sigma=0.0)
    x = flow.sample(3)
    y = physics.A(x)
    solution = NoiseMAP(flow, GaussianNoise(1.0), beta=0.1, optimizer=Adam(200, 0.05)).solve(y, physics)
    start = physics.A(flow.decode(torch.zeros(3, 16, dtype=torch.float64)))
    assert bool(((physics.A(solution.estimate) == y).sum(1) > (start == y).sum(1)).all())


@pytest.mark.parametrize("start", ["zero", 0.5])
def test_an_image_does_not_depend_on_its_batch(start: str | float) -> None:
    flow, physics = small_glow(), operators()["deblurring"]
    y = measurement(physics, 3)
    few, n_restarts = LBFGS(n_iterations=12), 1 if start == "zero" else 2
    solver = NoiseMAP(flow, GaussianNoise(0.1), start=start, n_restarts=n_restarts, optimizer=few)
    torch.testing.assert_close(solver(y[2:], physics), solver(y, physics)[2:], atol=1e-8, rtol=0)


def test_the_noise_of_the_operator_is_the_default() -> None:
    flow, physics = gaussian_flow(), operators()["denoising"]
    y = measurement(physics)
    torch.testing.assert_close(NoiseMAP(flow)(y, physics), NoiseMAP(flow, GaussianNoise(0.1))(y, physics))


class Drawn(Noise):
    """A noise without density."""

    has_density = False


BAD = {
    "negative beta": (lambda: NoiseMAP(gaussian_flow(), beta=-1.0), "beta must be finite and at least 0"),
    "beta for a decoder": (lambda: NoiseMAP(DCGANGenerator((1, 8, 8), 2, 4, 2)), "has no density: set beta to 0"),
    "form": (lambda: NoiseMAP(gaussian_flow(), form="x"), "form must be one of 'image', 'latent'"),
    "no decoder": (lambda: NoiseMAP(nn.Identity(), beta=0.0), "must be a Flow, or a decoder"),
    "restarts from zero": (lambda: NoiseMAP(gaussian_flow(), n_restarts=2), "needs random starts"),
    "no restart": (lambda: NoiseMAP(gaussian_flow(), n_restarts=0), "n_restarts must be at least 1"),
    "noise that is no noise": (lambda: NoiseMAP(gaussian_flow(), nn.Identity()), "noise must have log_prob"),
    "noise without density": (lambda: NoiseMAP(gaussian_flow(), Drawn()), "Drawn, has no density"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused(name: str) -> None:
    construct, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        construct()


def test_what_does_not_fit_is_refused() -> None:
    flow, physics = gaussian_flow(), operators()["denoising"]
    y = measurement(physics)
    with pytest.raises(ValueError, match="has no density"):
        NoiseMAP(flow)(y, LinearPhysics(A=lambda x: x, A_adjoint=lambda y: y))
    with pytest.raises(ValueError, match="does not fit measurements of shape"):
        NoiseMAP(flow, HeteroscedasticNoise(torch.ones(5)))(y, physics)
    other = FlowNoise(Glow((1, 8, 8), n_levels=3, n_steps=1, hidden_channels=4).double())
    with pytest.raises(ValueError, match="8"):
        NoiseMAP(flow, other)(y, physics)
    with pytest.raises(ValueError, match="y has shape"):
        NoiseMAP(flow, GaussianNoise(0.1))(torch.zeros(1, 9, dtype=torch.float64), operators()["compressed-sensing"])
    masked = Inpainting(SHAPE, mask=torch.ones(2, *SHAPE).double())
    with pytest.raises(ValueError, match="a mask or the like for each"):
        NoiseMAP(flow, GaussianNoise(0.1), start=0.1, n_restarts=2)(y, masked)
    with pytest.raises(ValueError, match="not finite at the start"):
        NoiseMAP(flow, GaussianNoise(0.1))(y, Physics(A=lambda x: x / (x - 0.5)))


def test_both_spaces_have_the_same_answer() -> None:
    """Gaussian noise and an affine flow: the posterior mode, over z and over x."""
    flow, physics = gaussian_flow(), operators()["deblurring"]
    y = measurement(physics)
    over_z, over_x = (
        NoiseMAP(flow, beta=0.5, optimizer=EXACT, space=space)(y, physics) for space in ("latent", "image")
    )
    torch.testing.assert_close(over_z, over_x, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="space must be 'latent', or for a flow 'image'"):
        NoiseMAP(DCGANGenerator((1, 8, 8), 2, 4, 2), beta=0.0, space="image")


def test_what_stands_in_hidden_pixels_changes_nothing() -> None:
    flow, physics = small_glow(), operators()["inpainting"]
    y = measurement(physics)
    scratched = torch.where(physics.mask == 0, 7.0, y)  # type: ignore[arg-type]
    solver = NoiseMAP(flow, optimizer=LBFGS(12))
    assert torch.equal(solver(scratched, physics), solver(y, physics))
    assert solver(y[:0], physics).shape == (0, *SHAPE)
