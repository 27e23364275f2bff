"""Sensing matrices keep the energy, one-bit sensing passes gradients straight through, too much memory is refused."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_linear, dense_matrix
from torch import Tensor

from flowprox.operators import (
    DenseSensing,
    OneBitSensing,
    StructuredSensing,
    data_gradient,
    data_prox,
    make_physics,
    measure,
    measure_each,
    sensing,
)

SHAPE = (3, 8, 10)
N = 240
MATRICES = {"dense": DenseSensing, "structured": StructuredSensing}
every_matrix = pytest.mark.parametrize("kind", MATRICES.values(), ids=MATRICES.keys())


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# The matrices --------------------------------------------------------------------------------------------------------


@every_matrix
def test_energy_is_kept_on_average(kind: type[DenseSensing | StructuredSensing]) -> None:
    x = torch.rand(1, 1, 4, 5)
    energies = torch.stack([kind(3, (1, 4, 5), seed=seed).A(x).square().sum() for seed in range(200)])
    error = energies.std() / 200**0.5
    assert abs(energies.mean() - x.square().sum()) < 4 * error


@every_matrix
def test_matrix_follows_the_seed_and_leaves_the_global_generator_alone(
    kind: type[DenseSensing | StructuredSensing],
) -> None:
    state = torch.get_rng_state()
    x = torch.rand(1, *SHAPE, generator=_generator())
    first, again, other = (kind(30, SHAPE, seed=seed).A(x) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_dense_entries_are_normal_of_variance_one_over_m() -> None:
    m = 200
    matrix = DenseSensing(m, SHAPE).get_buffer("matrix")
    assert matrix.shape == (m, N)
    assert matrix.dtype == torch.float32
    scaled = matrix.flatten() * m**0.5
    for power, moment in ((1, 0.0), (2, 1.0), (4, 3.0)):
        sample = scaled**power
        assert abs(sample.mean() - moment) < 5 * sample.std() / sample.numel() ** 0.5


def test_structured_rows_are_orthogonal_and_differ() -> None:
    matrix = dense_matrix(StructuredSensing(60, SHAPE).double().A, SHAPE)
    torch.testing.assert_close(matrix @ matrix.T, N / 60 * torch.eye(60, dtype=torch.float64))


def test_structured_pseudo_inverse_is_that_of_its_matrix() -> None:
    physics = StructuredSensing(60, SHAPE).double()
    matrix = dense_matrix(physics.A, SHAPE)
    y = torch.randn(2, 60, dtype=torch.float64)
    torch.testing.assert_close(physics.A_dagger(y).flatten(1), y @ torch.linalg.pinv(matrix).T)


@every_matrix
def test_float64_images_are_measured_in_float64_by_a_float32_operator(
    kind: type[DenseSensing | StructuredSensing],
) -> None:
    physics = kind(30, SHAPE)
    assert_linear(physics.A, (2, *SHAPE))
    assert physics.A_adjoint(torch.zeros(1, 30, dtype=torch.float64)).dtype == torch.float64


@every_matrix
def test_what_does_not_fit_is_named(kind: type[DenseSensing | StructuredSensing]) -> None:
    physics = kind(30, SHAPE)
    with pytest.raises(ValueError, match=r"images of shape \(3, 10, 8\) do not fit the sensing matrix"):
        physics.A(torch.rand(1, 3, 10, 8))
    with pytest.raises(ValueError, match=r"y has shape \(1, 29\) but the operator takes 30 measurements"):
        physics.A_adjoint(torch.rand(1, 29))
    for m in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="m must be at least 1 and a whole number"):
            kind(m, SHAPE)  # pyright: ignore[reportArgumentType]


def test_more_structured_measurements_than_pixels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"m=241 is more than the 240 pixels .* structured=False"):
        make_physics("compressed-sensing", SHAPE, m=241, structured=True)


def test_a_matrix_beyond_memory_says_how_much_it_needs() -> None:
    with pytest.raises(MemoryError, match=r"100000000 x 12288 needs 4,915\.2 GB, .* structured=True"):
        make_physics("compressed-sensing", (3, 64, 64), m=10**8)


def test_memory_is_asked_for_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensing, "_free_memory", lambda device: 1000)
    with pytest.raises(MemoryError, match=r"2 x 240 needs 0\.0 MB, and cpu has 0\.0 MB free"):
        DenseSensing(2, SHAPE)
    assert DenseSensing(1, SHAPE).m == 1
    monkeypatch.setattr(sensing, "_free_memory", lambda device: None)
    assert DenseSensing(2, SHAPE).m == 2


# One bit -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structured", [False, True])
def test_one_bit_is_the_sign_with_the_gradient_of_the_linear_part(structured: bool) -> None:
    physics = make_physics("one-bit", SHAPE, m=50, structured=structured)
    assert isinstance(physics, OneBitSensing)
    x = torch.randn(2, *SHAPE, requires_grad=True)
    signs, weight = physics.A(x), torch.randn(2, 50)
    assert torch.equal(signs, physics.linear.A(x).sign())
    (gradient,) = torch.autograd.grad((signs * weight).sum(), x)
    (linear,) = torch.autograd.grad((physics.linear.A(x) * weight).sum(), x)
    torch.testing.assert_close(gradient, linear)
    torch.testing.assert_close(physics.A_adjoint(weight), linear)
    torch.testing.assert_close(physics.A_vjp(x.detach(), weight), linear)
    torch.testing.assert_close(data_gradient(x, signs + weight, physics), linear)  # type: ignore[arg-type]


def test_the_sign_of_zero_is_positive() -> None:
    physics = make_physics("one-bit", SHAPE, m=50)
    assert torch.equal(physics.A(torch.zeros(1, *SHAPE)), torch.ones(1, 50))


def test_noise_after_the_sign_is_the_residual() -> None:
    physics, x = make_physics("one-bit", SHAPE, m=50, sigma=0.3), torch.randn(2, *SHAPE)
    residual = measure(x, physics, _generator()) - physics.A(x)
    expected = physics.noise_model(torch.zeros(2, 50), generator=_generator())
    torch.testing.assert_close(residual, expected)


def test_noise_before_the_sign_flips_signs() -> None:
    x = torch.randn(40, *SHAPE)

    def flipped(sigma: float) -> Tensor:
        physics = make_physics("one-bit", SHAPE, m=50, sigma=sigma, noise_first=True)
        y = measure_each(x, physics, range(40))
        assert set(y.unique().tolist()) == {-1.0, 1.0}
        assert torch.equal(measure_each(x[1:2], physics, [1]), y[1:2])
        return (y != physics.A(x)).float().mean()

    assert flipped(0.0) == 0
    # P(sign(a + n) != sign(a)) = atan(std(n) / std(a)) / pi for Gaussian a and n
    level = (x.flatten(1).square().sum(1) / 50).sqrt().mean()
    expected = torch.atan(5.0 / level) / torch.pi
    assert abs(flipped(5.0) - expected) < 0.04


def test_one_bit_forward_is_a_measurement() -> None:
    for noise_first in (False, True):
        physics = make_physics("one-bit", SHAPE, m=50, noise_first=noise_first)
        x = torch.randn(2, *SHAPE)
        assert torch.equal(physics(x, seed=1), physics(x, seed=1))
        assert torch.equal(physics(x, generator=_generator()), measure(x, physics, _generator()))


def test_data_prox_refuses_one_bit() -> None:
    physics = make_physics("one-bit", SHAPE, m=50)
    with pytest.raises(ValueError, match="data_prox takes a linear operator and OneBitSensing is none"):
        data_prox(torch.zeros(1, *SHAPE), torch.ones(1, 50), physics, 1.0)


def test_flags_must_be_flags() -> None:
    with pytest.raises(ValueError, match="structured must be one of True, False; got 'no'"):
        make_physics("compressed-sensing", SHAPE, m=5, structured="no")
    with pytest.raises(ValueError, match="noise_first must be one of True, False; got 1"):
        make_physics("one-bit", SHAPE, m=5, noise_first=1)
