"""Numbers that depend on the noise level, and what reads the level of a measurement."""

from __future__ import annotations

import deepinv
import numpy as np
import pytest
import torch

from flowprox.noise import noise_level
from flowprox.operators import make_physics
from flowprox.prox import at_level, checked_levels

LEVELS = (0.01, 0.03, 0.2, 0.25)


def test_interpolates_as_numpy_does_in_log_sigma() -> None:
    values = torch.randn(4, 5, dtype=torch.float64)
    sigma = torch.tensor([0.0, 1e-3, 0.01, 0.02, 0.03, 0.1, 0.24, 0.25, 3.0], dtype=torch.float64)
    expected = [np.interp(sigma.clamp_min(1e-9).log().numpy(), np.log(LEVELS), column) for column in values.T.numpy()]
    np.testing.assert_allclose(at_level(values, LEVELS, sigma).T, expected, atol=1e-12)


def test_only_the_neighboring_levels_get_a_gradient() -> None:
    values = torch.zeros(4, 2, requires_grad=True)
    at_level(values, LEVELS, torch.tensor([0.1])).sum().backward()
    assert values.grad is not None
    assert (values.grad.abs().sum(1) > 0).tolist() == [False, True, True, False]


def test_the_level_is_that_of_the_noise_model() -> None:
    physics = make_physics("denoising", (3, 8, 8), sigma=0.1)
    assert noise_level(physics, torch.zeros(3, 3, 8, 8)).tolist() == pytest.approx([0.1] * 3)
    physics.noise_model.update_parameters(sigma=torch.tensor([0.1, 0.2, 0.3]))
    assert noise_level(physics, torch.zeros(3, 3, 8, 8)).tolist() == pytest.approx([0.1, 0.2, 0.3])
    exact = deepinv.physics.Denoising(deepinv.physics.ZeroNoise())
    assert noise_level(exact, torch.zeros(2, 3, 8, 8)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("levels", [[], [0.1], [0.2, 0.1], [0.0, 0.1], [0.1, float("inf")]])
def test_levels_must_rise(levels: list[float]) -> None:
    with pytest.raises(ValueError, match="levels must be at least two rising positive"):
        checked_levels(levels)


def test_noise_without_a_level_and_a_wrong_number_of_levels_are_named() -> None:
    poisson = deepinv.physics.Denoising(deepinv.physics.PoissonNoise())
    with pytest.raises(ValueError, match="PoissonNoise"):
        noise_level(poisson, torch.zeros(1, 3, 8, 8))
    physics = make_physics("denoising", (3, 8, 8))
    physics.noise_model.update_parameters(sigma=torch.tensor([0.1, 0.2]))
    with pytest.raises(ValueError, match="2 levels for 3 images"):
        noise_level(physics, torch.zeros(3, 3, 8, 8))
