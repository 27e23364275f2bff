"""FlowPrior, FlowDenoiser and NoiseFidelity against closed forms, and inside deepinv's own algorithms."""

from __future__ import annotations

import copy
import math

import deepinv
import pytest
import torch
from deepinv.optim import ADMM, FISTA, HQS, L2, PGD
from helpers import assert_prox, dense_matrix
from torch import Tensor, nn

from flowprox.flows import Conv1x1, Flow, Glow, Sequential, Squeeze, Unsqueeze
from flowprox.noise import GaussianNoise, make_noise
from flowprox.operators import make_physics
from flowprox.priors import FlowDenoiser, FlowPrior, NoiseFidelity
from flowprox.prox import FlowProx

SHAPE = (3, 8, 8)


def tiny_glow(dtype: torch.dtype = torch.float64) -> Glow:
    """A flow that is not linear: its coupling nets start at zero."""
    flow = Glow(image_shape=SHAPE, n_levels=2, n_steps=2, hidden_channels=4)
    for module in flow.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.1)
    flow.initialize(torch.rand(16, *SHAPE))
    return flow.to(dtype).eval()


def rotation() -> Flow:
    """A flow that is a rotation, so that -log p(x) is 1/2 ||x||^2 and a constant."""
    return Flow(Sequential([Squeeze(), Conv1x1(12), Unsqueeze()]), SHAPE, n_levels=1, offset=0.0).double()


def linear_flow() -> tuple[Flow, Tensor]:
    """A linear flow z = W (x - 1/2) with W far from a rotation, and W (D, D)."""
    flow = rotation()
    layer = next(module for module in flow.modules() if isinstance(module, Conv1x1))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    flow.offset = 0.5
    return flow, dense_matrix(lambda x: flow.encode(x + 0.5), SHAPE)


@pytest.mark.parametrize("form", ["density", "latent"])
@pytest.mark.parametrize("base", ["gaussian", "laplace"])
def test_fn_is_the_density_and_grad_its_gradient(form: str, base: str) -> None:
    flow = tiny_glow()
    prior = FlowPrior(flow, base, form)
    x = torch.rand(3, *SHAPE, dtype=torch.float64)
    z, logdet = flow(x)
    distribution = torch.distributions.Normal(0, 1) if base == "gaussian" else torch.distributions.Laplace(0, 1)
    density = distribution.log_prob(z).sum(1) + logdet
    mode = distribution.log_prob(torch.zeros_like(z)).sum(1)
    expected = -density if form == "density" else mode - (density - logdet)
    torch.testing.assert_close(prior(x), expected)
    u = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(prior.fn(u).sum(), u)
    with torch.no_grad():
        torch.testing.assert_close(prior.grad(x), gradient)
        torch.testing.assert_close(prior.score(x, 0.1), -gradient)
    assert not x.requires_grad and not prior.grad(x.requires_grad_()).isnan().any()


def test_grad_can_be_trained_through() -> None:
    prior = FlowPrior(tiny_glow())
    prior.grad(torch.rand(1, *SHAPE, dtype=torch.float64)).square().sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in prior.parameters())


@pytest.mark.parametrize("base", ["gaussian", "laplace"])
def test_prox_is_that_of_flow_prox(base: str) -> None:
    flow = tiny_glow()
    prior, prox = FlowPrior(flow, base), FlowProx(flow, base)
    v = torch.rand(2, *SHAPE, dtype=torch.float64)
    assert torch.equal(prior.prox(v, 0.3, gamma=0.1), prox(v, 0.1))
    assert torch.equal(prior.prox(v, gamma=torch.tensor(0.1, dtype=v.dtype)), prox(v, 0.1))
    each = torch.tensor([0.1, 0.4], dtype=v.dtype)
    expected = torch.cat([prox(v[i : i + 1], float(each[i])) for i in range(2)])
    torch.testing.assert_close(prior.prox(v, gamma=each), expected)
    torch.testing.assert_close(prior.prox(v, gamma=each.view(2, 1, 1, 1)), expected)


def test_for_a_rotation_the_prox_minimizes_in_image_space_too() -> None:
    prior = FlowPrior(rotation())
    with torch.no_grad():
        assert_prox(lambda v, step: prior.prox(v, gamma=step), prior.fn, torch.randn(2, *SHAPE).double(), 0.7)


def test_the_shrinkage_is_not_the_prox_of_the_density_and_the_descent_is_of_the_norm() -> None:
    """A linear flow has both in closed form: g(f(v) / (1 + gamma)) and (I + gamma W^T W)^-1 v."""
    flow, matrix = linear_flow()
    v = torch.rand(2, *SHAPE, dtype=torch.float64)
    gamma = 0.5
    system = torch.eye(len(matrix), dtype=torch.float64) + gamma * matrix.T @ matrix
    exact = 0.5 + torch.linalg.solve(system, (v - 0.5).flatten(1).T).T.view_as(v)
    shrunk = FlowPrior(flow).prox(v, gamma=gamma)
    torch.testing.assert_close(shrunk, 0.5 + (v - 0.5) / (1 + gamma))
    assert (shrunk - exact).abs().max() > 0.01
    torch.testing.assert_close(FlowPrior(flow, n_prox_steps=400).prox(v, gamma=gamma), exact, rtol=0, atol=1e-3)


def test_denoiser_has_the_posterior_mean_of_a_linear_flow() -> None:
    flow, matrix = linear_flow()
    v = torch.rand(2, *SHAPE, dtype=torch.float64)
    sigma = torch.tensor([0.3, 1.0], dtype=torch.float64)
    x_hat = FlowDenoiser(flow, n_steps=400)(v, sigma)
    for i in range(2):
        system = torch.eye(len(matrix), dtype=torch.float64) + sigma[i] ** 2 * matrix.T @ matrix
        exact = 0.5 + torch.linalg.solve(system, (v[i] - 0.5).flatten()).view(SHAPE)
        torch.testing.assert_close(x_hat[i], exact, rtol=0, atol=1e-3)


def test_denoiser_lowers_its_objective_image_by_image() -> None:
    flow = tiny_glow()
    flow.requires_grad_(True)
    flow.bijection.train()
    denoiser = FlowDenoiser(flow, n_steps=10)
    v = torch.rand(3, *SHAPE, dtype=torch.float64)
    before = v.clone()
    sigma = torch.tensor([0.0, 0.1, 0.5], dtype=torch.float64)
    with torch.no_grad():
        x_hat = denoiser(v, sigma)
    assert torch.equal(x_hat[0], v[0]) and torch.equal(v, before)
    assert (
        denoiser.objective(x_hat, v, sigma)
        <= denoiser.objective(denoiser.wiener(v, sigma.square().view(-1, 1, 1, 1)), v, sigma)
    ).all()
    for i in range(3):
        torch.testing.assert_close(denoiser(v[i : i + 1], sigma[i]), x_hat[i : i + 1], rtol=0, atol=1e-8)
    assert all(p.requires_grad and p.grad is None for p in flow.parameters())
    assert flow.bijection.training
    assert copy.deepcopy(denoiser)(v, sigma).equal(x_hat)


def test_denoiser_takes_other_sizes_and_removes_noise() -> None:
    flow = tiny_glow(torch.float32)
    x = flow.sample(2, image_size=(12, 16))
    v = x + 0.3 * torch.randn_like(x)
    x_hat = FlowDenoiser(flow)(v, 0.3)
    assert (x_hat - x).norm() < 0.9 * (v - x).norm()


def test_the_wiener_filter_is_told_by_the_flow() -> None:
    """For a white flow it is the scalar x / (1 + sigma^2), up to the sampling error of the spectrum."""
    v = torch.randn(2, *SHAPE, dtype=torch.float64)
    filtered = FlowDenoiser(rotation(), n_samples=4000).wiener(v, torch.full((2, 1, 1, 1), 0.5, dtype=v.dtype))
    assert (filtered - v / 1.5).abs().max() < 0.15


ALGORITHMS = {
    "PGD": (PGD, {}),
    "FISTA": (FISTA, {}),
    "HQS": (HQS, {}),
    "ADMM": (ADMM, {}),
    "PGD, gradient of the prior": (PGD, {"g_first": True, "lambda_reg": 1e-4}),
}


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("prior", [{}, {"explicit": True}, {"n_prox_steps": 2}], ids=str)
def test_runs_in_deepinv(name: str, prior: dict) -> None:
    algorithm, options = ALGORITHMS[name]
    settings = {"stepsize": 0.5, "lambda_reg": 0.1, "max_iter": 3} | options
    model = algorithm(prior=FlowPrior(tiny_glow(torch.float32), **prior), data_fidelity=L2(), **settings)
    physics = make_physics("inpainting", SHAPE, mask_size=2)
    y = torch.rand(2, *SHAPE)
    x_hat = model(y, physics)
    assert x_hat.shape == y.shape and x_hat.isfinite().all()
    torch.testing.assert_close(model(y[1:], physics), x_hat[1:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("algorithm", [PGD, HQS, ADMM])
def test_minimizes_with_a_gaussian_prior(algorithm: type) -> None:
    """min 1/2 ||y - x||^2 + lambda 1/2 ||x||^2 has the solution y / (1 + lambda); HQS smooths the data term."""
    prior = FlowPrior(rotation(), explicit=True)
    model = algorithm(prior=prior, data_fidelity=L2(), stepsize=0.5, lambda_reg=0.4, max_iter=100)
    y = torch.rand(2, *SHAPE, dtype=torch.float64)
    smoothed = 1 / (1 + 0.5)  # prox of the data term moves x to (x + 0.5 y) / 1.5
    expected = y * (0.5 * smoothed / (1.2 - smoothed) if algorithm is HQS else 1 / 1.4)
    torch.testing.assert_close(model(y, make_physics("denoising", SHAPE)), expected, rtol=0, atol=1e-8)


def test_fn_is_evaluated_only_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = FlowPrior.fn
    monkeypatch.setattr(FlowPrior, "fn", lambda self, x, *args: calls.append(1) or original(self, x))
    physics, y = make_physics("denoising", SHAPE), torch.rand(1, *SHAPE)
    for explicit, expected in ((False, 0), (True, 4)):
        prior = FlowPrior(tiny_glow(torch.float32), explicit=explicit)
        PGD(prior=prior, data_fidelity=L2(), stepsize=0.5, lambda_reg=0.1, max_iter=3)(y, physics)
        assert len(calls) == expected


@pytest.mark.parametrize("algorithm", [PGD, HQS, ADMM])
def test_unfolded_trains_steps_and_flows(algorithm: type) -> None:
    priors = [FlowPrior(tiny_glow(torch.float32)) for _ in range(2)]
    model = algorithm(prior=priors, data_fidelity=L2(), **FlowPrior.unfolding(2))
    physics, x = make_physics("denoising", SHAPE), torch.rand(4, *SHAPE)
    y = physics(x, seed=0)
    adam = torch.optim.Adam(model.parameters(), 3e-2)
    losses = []
    for _ in range(5):
        loss = (model(y, physics) - x).square().mean()
        adam.zero_grad()
        loss.backward()
        losses.append(loss.item())
        adam.step()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert missing == [] and losses[-1] < 0.9 * losses[0]
    assert len(model.params_algo["stepsize"]) == len(model.params_algo["lambda"]) == 2


def test_ula_samples_the_posterior_of_a_gaussian_prior() -> None:
    prior, physics = FlowPrior(rotation()), make_physics("denoising", SHAPE)
    y = torch.ones(1, *SHAPE, dtype=torch.float64)
    sampler = deepinv.sampling.sampling_builder(
        "ULA",
        data_fidelity=L2(sigma=1.0),
        prior=prior,
        params_algo={"step_size": 0.1, "alpha": 1.0, "sigma": 0.1},
        max_iter=400,
        thinning=2,
    )
    mean, variance = sampler.sample(y, physics, seed=0)
    assert abs(mean.mean() - 0.5) < 0.05 and abs(variance.mean() - 0.5 / (1 - 0.1)) < 0.05


@pytest.mark.parametrize("name", ["gaussian", "sinusoidal", "radial"])
@pytest.mark.parametrize("problem", ["inpainting", "one-bit"])
def test_noise_fidelity_is_the_negative_log_density(name: str, problem: str) -> None:
    noise = make_noise(name, SHAPE, sigma=0.3)
    parameters = {"mask_size": 2} if problem == "inpainting" else {"m": 20}
    physics = make_physics(problem, SHAPE, **parameters)
    if problem == "one-bit":
        noise = GaussianNoise(0.3)
    fidelity = NoiseFidelity(noise)
    x = torch.rand(2, *SHAPE)
    y = physics.A(torch.rand(2, *SHAPE))
    torch.testing.assert_close(fidelity(x, y, physics), -noise.log_prob(y - physics.A(x)))
    u = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(-noise.log_prob(y - physics.A(u)).sum(), u)
    with torch.no_grad():
        gradient = fidelity.grad(x, y, physics)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)
    assert gradient.abs().max() > 0 and not x.requires_grad


def test_gaussian_noise_fidelity_is_deepinvs_l2() -> None:
    fidelity, l2 = NoiseFidelity(GaussianNoise(0.3)), L2(sigma=0.3)
    physics = make_physics("deblurring", SHAPE, kernel_size=3)
    x, y = torch.rand(2, 3, *SHAPE, dtype=torch.float64)
    constant = 0.5 * math.log(2 * math.pi * 0.3**2) * x[0].numel()
    torch.testing.assert_close(fidelity(x, y, physics), l2(x, y, physics) + constant, rtol=1e-6, atol=0)
    torch.testing.assert_close(fidelity.grad(x, y, physics), l2.grad(x, y, physics), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        fidelity.prox(x, y, physics, gamma=0.2), l2.prox(x, y, physics, gamma=0.2), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("algorithm", [PGD, HQS, ADMM, FISTA])
def test_noise_fidelity_runs_in_deepinv(algorithm: type) -> None:
    fidelity = NoiseFidelity(make_noise("sinusoidal", SHAPE, sigma=0.5))
    model = algorithm(
        prior=FlowPrior(tiny_glow(torch.float32)), data_fidelity=fidelity, stepsize=1e-3, lambda_reg=1.0, max_iter=3
    )
    y = torch.rand(2, *SHAPE)
    x_hat = model(y, make_physics("denoising", SHAPE))
    assert x_hat.isfinite().all()
    torch.testing.assert_close(model(y[:1], make_physics("denoising", SHAPE)), x_hat[:1], rtol=0, atol=1e-5)


def test_a_flow_is_a_noise_too() -> None:
    flow, physics = tiny_glow(), make_physics("denoising", SHAPE)
    x, y = torch.rand(2, 2, *SHAPE, dtype=torch.float64)
    torch.testing.assert_close(NoiseFidelity(flow)(x, y, physics), -flow.log_prob(y - x))


WRONG = {
    "form": (lambda: FlowPrior(tiny_glow(), form="image"), "form must be"),  # type: ignore[arg-type]
    "base": (lambda: FlowPrior(tiny_glow(), base="cauchy"), "base must be"),  # type: ignore[arg-type]
    "steps": (lambda: FlowPrior(tiny_glow(), "laplace", n_prox_steps=3), "n_prox_steps"),
    "denoiser steps": (lambda: FlowDenoiser(tiny_glow(), n_steps=-1), "n_steps"),
    "noise": (lambda: NoiseFidelity(deepinv.physics.PoissonNoise()), "log_prob"),
    "size": (lambda: FlowPrior(tiny_glow()).prox(torch.rand(1, 3, 9, 8).double()), "divisible by 4"),
    "size of the denoiser": (lambda: FlowDenoiser(tiny_glow())(torch.rand(1, 3, 9, 8).double(), 0.1), "divisible by 4"),
    "channels": (lambda: FlowPrior(tiny_glow()).fn(torch.rand(1, 1, 8, 8).double()), r"\(B, 3, H, W\)"),
    "sigmas": (lambda: FlowDenoiser(tiny_glow())(torch.rand(3, *SHAPE).double(), torch.rand(2)), "batch size"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(name: str) -> None:
    call, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        call()
