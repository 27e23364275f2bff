"""Weights and jumps against the closed form: an affine flow, a linear operator, Gaussian noise."""

from __future__ import annotations

import math

import pytest
import torch
from deepinv.physics import Physics
from helpers import dense_matrix
from solver_cases import gaussian_flow
from torch import Tensor
from torch.distributions import MultivariateNormal

from flowprox import FlowProx, Glow, ResNetProx, UnfoldedPGD, make_physics
from flowprox.flows import Flow
from flowprox.operators import measure_each
from flowprox.solvers import PosteriorSampling, importance_samples
from flowprox.uncertainty import measured_estimates
from flowprox.unfolding import ConditionalDensity, ErrorDensity, fit_density

SHAPE, D, SIGMA = (1, 4, 4), 16, 0.3


class Gaussian:
    """N(mean, spread^2 covariance) of each measurement."""

    def __init__(self, mean: Tensor, covariance: Tensor, spread: float = 1.0) -> None:
        self.density = MultivariateNormal(mean, spread**2 * covariance)

    def sample(self, n: int) -> Tensor:
        return self.density.sample((n,)).view(n, -1, *SHAPE)

    def log_prob(self, x: Tensor) -> Tensor:
        return self.density.log_prob(x.flatten(2))


def case(name: str) -> tuple[Flow, Tensor, Physics, Tensor, Tensor, Tensor]:
    """Flow, y (2, ...), operator; mean (2, D) and covariance (D, D) of the posterior, log p(y) (2,)."""
    flow = gaussian_flow()
    physics = make_physics(name, SHAPE, sigma=SIGMA, **({"kernel_size": 3} if name == "deblurring" else {})).double()
    y = physics(flow.sample(2))
    with torch.no_grad():
        b = flow.decode(torch.zeros(1, D, dtype=torch.float64)).flatten(1)
        G = flow.decode(torch.eye(D, dtype=torch.float64)).flatten(1).T - b.T
    A = dense_matrix(physics.A, SHAPE)
    eye = torch.eye(D, dtype=torch.float64)
    gain = (A @ G @ G.T @ A.T + SIGMA**2 * eye).inverse()
    residual = y.flatten(1) - b @ A.T
    mean = b + residual @ gain @ A @ G @ G.T
    covariance = G @ (eye - G.T @ A.T @ gain @ A @ G) @ G.T
    evidence = MultivariateNormal(torch.zeros(len(gain), dtype=torch.float64), precision_matrix=gain)
    return flow, y, physics, mean, 0.5 * (covariance + covariance.T), evidence.log_prob(residual)


@pytest.mark.parametrize("name", ["denoising", "deblurring"])
def test_a_wider_proposal_is_corrected_to_the_closed_form(name: str) -> None:
    flow, y, physics, mean, covariance, evidence = case(name)
    shifted = Gaussian(mean + 0.1 * torch.linalg.cholesky(covariance).sum(1), covariance, 1.2)
    found = importance_samples(flow, y, physics, shifted, n=6000)
    assert found.is_reliable.all() and found.ess.min() > 300
    deviation = covariance.diagonal().sqrt()
    errors = (found.mean.flatten(1) - mean) / deviation * found.ess.sqrt()[:, None]
    assert errors.square().mean().sqrt() < 1.6 and errors.abs().max() < 4.5  # of 32 entries
    assert ((found.log_evidence - evidence).abs() < 3 * found.evidence_error).all()
    path, moved = found.chain()
    chain = found.samples[path, torch.arange(2)]
    assert (moved > 0.1).all()
    assert ((chain.mean(0).flatten(1) - mean) / deviation).abs().max() < 0.25
    assert (chain.std(0).flatten(1) / deviation - 1).abs().max() < 0.25


def test_the_true_posterior_has_equal_weights_and_the_evidence_without_error() -> None:
    flow, y, physics, mean, covariance, evidence = case("denoising")
    found = importance_samples(flow, y, physics, Gaussian(mean, covariance), n=50)
    torch.testing.assert_close(found.log_evidence, evidence)
    assert found.ess.min() > 49.9 and found.chain()[1].min() == 1


def test_a_proposal_that_is_too_narrow_is_told() -> None:
    flow, y, physics, mean, covariance, _ = case("denoising")
    found = importance_samples(flow, y, physics, Gaussian(mean, covariance, 0.4), n=2000)
    assert not found.is_reliable.any()


@pytest.mark.parametrize("spread", [1.1, 0.6])
def test_chains_with_jumps_sample_the_posterior_whatever_the_proposal(spread: float) -> None:
    flow, y, physics, mean, covariance, _ = case("deblurring")
    proposal = Gaussian(mean, covariance, spread)
    sampling = PosteriorSampling(flow, n_samples=40, n_warmup=30, n_chains=16)
    solution = sampling.solve(y, physics, proposal=proposal)
    assert (solution.jumps > 0.1).all() if spread > 1 else (solution.jumps < 0.2).all()
    deviation, ess = covariance.diagonal().sqrt(), solution.ess.min()
    assert ess > 120
    assert ((solution.mean.flatten(1) - mean) / deviation).abs().max() < 4.5 / math.sqrt(ess)
    assert (solution.std.flatten(1) / deviation - 1).abs().max() < 4.5 / math.sqrt(2 * ess)


def test_what_does_not_fit_is_refused() -> None:
    flow, y, physics, mean, covariance, _ = case("denoising")
    with pytest.raises(ValueError, match="n must be at least 20, got 5"):
        importance_samples(flow, y, physics, Gaussian(mean, covariance), n=5)
    with pytest.raises(ValueError, match=r"must be \(n, 2, \*\(1, 4, 4\)\)"):
        importance_samples(flow, y, physics, Gaussian(mean[:1], covariance), n=30)


# The density of a network -----------------------------------------------------------------------------------------------


def test_a_fitted_density_has_the_closed_form_and_integrates_with_its_samples() -> None:
    """White images around 0.5: the error of y's shrinkage is white, of a known deviation in every coefficient."""
    flow = Glow((1, 4, 4), n_levels=1, n_steps=1, hidden_channels=4, squeeze="haar")
    physics = make_physics("denoising", (1, 4, 4), sigma=0.2)
    network = UnfoldedPGD([FlowProx(flow)], step_size=1.0, shrinkage=1e-9, start="adjoint").eval()  # x_hat = y
    x = 0.5 + 0.2 * torch.randn(400, 1, 4, 4)
    estimates = list(measured_estimates(network, x, physics, range(400)))
    likelihoods: list[float] = []
    fitted = fit_density(estimates, physics, [8], 60, callback=lambda i, n, value: likelihoods.append(value))
    density = ConditionalDensity(network, fitted)
    y = measure_each(x[:100], physics, range(100))
    bound = density.of(y, physics)
    samples = bound.sample(30, torch.Generator().manual_seed(0))
    torch.testing.assert_close(samples, density.sample(y, physics, 30, torch.Generator().manual_seed(0)))
    assert (samples.std(0).mean() / 0.2 - 1).abs() < 0.1 and (samples.mean(0) - y).mean().abs() < 0.03
    entropy = 16 * (0.5 * math.log(2 * math.pi) + 0.5 + math.log(0.2))
    assert -bound.log_prob(samples).mean().item() == pytest.approx(entropy, abs=0.8)
    assert sum(likelihoods[-10:]) / 10 > sum(likelihoods[:10]) / 10 - 0.05
    whole = density.log_prob(x[:100], y, physics)
    assert whole.shape == (100,) and -whole.mean().item() == pytest.approx(entropy, abs=1.0)


def test_densities_that_do_not_fit_are_refused() -> None:
    network = UnfoldedPGD([ResNetProx(3, 4, 1)], start="adjoint", final_data_step=True).eval()
    physics = make_physics("inpainting", (3, 8, 8), mask_size=4)
    y = physics.A(torch.rand(1, 3, 8, 8))
    density = ConditionalDensity(network, ErrorDensity((3, 8, 8), (2, 2, 3, 4), [4]))
    assert density.sample(y, physics, 2).shape == (2, 1, 3, 8, 8)
    with pytest.raises(ValueError, match="ends with a data step"):
        density.log_prob(y, y, physics)
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        density.sample(y, physics, 0)
    part = ConditionalDensity(UnfoldedPGD([ResNetProx(3, 4, 1)], start="adjoint").eval(), density.density)
    with pytest.raises(ValueError, match="of a part of the image only"):
        part.log_prob(y, y, physics)
    with pytest.raises(ValueError, match="of 8x8 pixels, as the density was trained on, not 12x12"):
        density.of(torch.rand(1, 3, 12, 12), make_physics("inpainting", (3, 12, 12), mask_size=4))


def test_correlations_tails_and_box_are_those_of_the_errors() -> None:
    """Errors drawn from a density are fitted by it: the same covariance and log-density, heavy tails included."""
    true = ErrorDensity((2, 12, 16), (4, 0, 8, 16), [4, 4]).requires_grad_(False)
    for factors in (true.channels, true.rows, true.columns):
        for factor in factors:
            n = factor.shape[-1]
            factor.data.copy_(torch.tril(torch.eye(n) + 0.3 * torch.rand(n, n)))
    true.tails.data.copy_(torch.tensor([6.0, 12.0]))
    spreads = true(torch.zeros(4000, 5, 8, 16))
    errors = true.draw(spreads, torch.Generator().manual_seed(0))
    assert errors.shape == (4000, 2, 12, 16) and not errors[:, :, :4].any() and errors[:, :, 4:].all()
    coefficients = true.coefficients(errors)
    assert sum(level.square().sum() for level in coefficients) == pytest.approx(errors.square().sum().item(), rel=1e-5)
    fitted = ErrorDensity((2, 12, 16), (4, 0, 8, 16), [4, 4]).requires_grad_(False)
    fitted.fit_correlations(coefficients, spreads)
    assert 4.5 < fitted.tails[0] < 8 and 9 < fitted.tails[1] < 16
    values = [density.log_prob(coefficients, spreads) for density in (true, fitted)]
    assert (values[1] - values[0]).mean().item() == pytest.approx(0, abs=0.01 * 256)
    again = fitted.draw(spreads, torch.Generator().manual_seed(1))
    assert again.var(0).sum().item() == pytest.approx(errors.var(0).sum().item(), rel=0.05)
