"""Measurements of a size that a network does not take: the extended equation holds exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from deepinv.physics import LinearPhysics
from helpers import assert_adjoint, assert_linear
from torch import Tensor

from flowprox import FlowProx, Glow, UnfoldedHQS, UnfoldedPGD
from flowprox.operators import WindowedBlur, fit_to_divisor, make_physics, measured_part, mirrored
from flowprox.operators.sizes import _continued

SIGMA_ZERO: dict[str, dict[str, Any]] = {
    "denoising": {"sigma": 0.0},
    "inpainting": {"mask_size": 3},
    "random-inpainting": {"keep": 0.5},
    "deblurring": {"kernel_size": 5, "sigma_blur": 1.5, "sigma": 0.0},
}


def _signal(height: int, width: int) -> Tensor:
    return torch.rand(2, 3, height, width, dtype=torch.float64)


def _continued_image(x: Tensor, fitted: Any, mode: str) -> Tensor:
    """The image on the extended grid that the extended equation is about."""
    rows, columns = (
        _continued(n, where.start, size, mode)
        for n, where, size in zip(x.shape[-2:], (fitted.rows, fitted.columns), fitted.y.shape[-2:], strict=True)
    )
    return x[..., rows, :][..., columns]


@pytest.mark.parametrize("size", [(9, 14), (12, 13), (7, 7)], ids=str)
@pytest.mark.parametrize(
    ("name", "parameters", "mode"),
    [
        ("denoising", {}, "reflect"),
        ("inpainting", {}, "reflect"),
        ("random-inpainting", {}, "reflect"),
        ("deblurring", {}, "circular"),
        ("deblurring", {"boundary": "reflect"}, "reflect"),
        ("deblurring", {"boundary": "replicate"}, "replicate"),
    ],
    ids=lambda value: "-".join(value.values()) if isinstance(value, dict) else value,
)
def test_continued_image_satisfies_the_extended_equation(
    name: str, parameters: dict[str, Any], mode: str, size: tuple[int, int]
) -> None:
    physics = make_physics(name, (3, *size), **SIGMA_ZERO[name], **parameters).double()
    x = _signal(*size)
    fitted = fit_to_divisor(physics.A(x), physics, 4)
    assert all(side % 4 == 0 for side in fitted.y.shape[-2:])
    torch.testing.assert_close(fitted.y[..., fitted.rows, fitted.columns], physics.A(x), rtol=0, atol=1e-12)
    residual = fitted.physics.A_adjoint(fitted.y) - fitted.physics.A_adjoint(
        fitted.physics.A(_continued_image(x, fitted, mode))
    )
    assert residual.abs().max() < 1e-6  # the kernel is kept in float32


def test_measurement_of_a_zero_boundary_binds_the_inside_only() -> None:
    physics = make_physics("deblurring", (3, 9, 9), **SIGMA_ZERO["deblurring"], boundary="zeros")
    x = torch.rand(1, 3, 9, 9)
    fitted = fit_to_divisor(physics.A(x), physics, 4)
    outside = torch.zeros_like(fitted.y)
    outside[..., fitted.rows, fitted.columns] = x
    inside = fitted.physics.A(outside)[..., fitted.rows, fitted.columns]
    torch.testing.assert_close(inside, physics.A(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(12, 12), (9, 14)], ids=str)
def test_a_valid_boundary_belongs_to_the_image(size: tuple[int, int]) -> None:
    kernel = torch.rand(3, 5)
    physics = make_physics("deblurring", (3, *size), kernel=kernel / kernel.sum(), boundary="valid", sigma=0.0)
    x = torch.rand(1, 3, *size)
    y = physics.A(x)
    fitted = fit_to_divisor(y, physics, 4)
    extended = torch.rand(1, 3, *fitted.y.shape[-2:])
    extended[..., fitted.rows, fitted.columns] = x
    measured = fitted.physics.get_buffer("mask") > 0
    assert measured.sum() == y[0, 0].numel() and all(side % 4 == 0 for side in extended.shape[-2:])
    torch.testing.assert_close(fitted.physics.A(extended)[..., measured], y.flatten(-2), rtol=0, atol=1e-5)


def test_what_a_blur_without_border_shows_is_the_middle() -> None:
    kernel = torch.zeros(3, 5)
    kernel[1, 2] = 1.0
    physics = make_physics("deblurring", (3, 9, 14), kernel=kernel, boundary="valid", sigma=0.0)
    x = torch.rand(1, 3, 9, 14)
    assert torch.equal(measured_part(x, physics.A(x), physics), physics.A(x))


MIRRORED: dict[str, tuple[str, dict[str, Any]]] = {
    "odd hole": ("inpainting", {"mask_size": 3}),
    "kernel": ("deblurring", {"kernel": torch.tensor([[0.2, 0.5, 0.3]])}),
    "padded kernel": ("deblurring", {"kernel": torch.tensor([[0.2, 0.5, 0.3]]), "boundary": "replicate"}),
    "noise": ("denoising", {"noise": "radial"}),
    "smaller": ("super-resolution", {"factor": 2}),
    "subsampled": ("super-resolution", {"factor": 2, "filter": None}),
}


@pytest.mark.parametrize("case", MIRRORED)
def test_mirrored(case: str) -> None:
    name, parameters = MIRRORED[case]
    physics, x = make_physics(name, (1, 8, 10), **parameters), torch.rand(2, 1, 8, 10)
    other = mirrored(physics)
    torch.testing.assert_close(other.A(x.flip(-1)), physics.A(x).flip(-1))
    if case == "noise":
        assert torch.equal(other.noise_model.scale, physics.noise_model.scale.flip(-1))  # type: ignore[union-attr, operator]


def test_asymmetric_kernel_is_not_mirrored() -> None:
    kernel = torch.rand(3, 5)
    physics = make_physics("deblurring", (3, 9, 9), kernel=kernel / kernel.sum(), boundary="reflect", sigma=0.0)
    x = torch.rand(1, 3, 9, 9)
    fitted = fit_to_divisor(physics.A(x), physics, 4)
    residual = fitted.physics.A(_continued_image(x, fitted, "reflect")) - fitted.y
    assert residual[..., fitted.rows, fitted.columns].abs().max() < 1e-5
    assert float(fitted.physics.get_buffer("mask").sum()) == 81


def test_windowed_blur_is_linear_and_has_its_adjoint() -> None:
    physics = WindowedBlur(torch.rand(3, 5), (torch.rand(8, 12) < 0.7).float()).double()
    assert_linear(physics.A, (2, 1, 8, 12))
    assert_adjoint(physics.A, physics.A_adjoint, (2, 1, 8, 12))


@pytest.mark.parametrize("sides", [(8, 8), (12, 4)], ids=str)
def test_fitting_sizes_are_left_alone(sides: Sequence[int]) -> None:
    physics = make_physics("deblurring", (3, sides[0], sides[1]), kernel_size=3)
    y = torch.rand(1, 3, *sides)
    fitted = fit_to_divisor(y, physics, 4)
    assert fitted.y is y and fitted.physics is physics
    assert y[..., fitted.rows, fitted.columns].shape == y.shape


def test_unknown_operator_is_refused() -> None:
    with pytest.raises(ValueError, match="divisible by 4"):
        fit_to_divisor(torch.rand(1, 3, 7, 7), LinearPhysics(), 4)


@pytest.mark.parametrize("name", SIGMA_ZERO)
def test_both_iterations_take_extended_operators(name: str) -> None:
    flow = Glow((3, 8, 8), n_levels=2, n_steps=1, hidden_channels=4).eval()
    physics = make_physics(name, (3, 9, 10), **SIGMA_ZERO[name])
    fitted = fit_to_divisor(physics.A(torch.rand(1, 3, 9, 10)), physics, 4)
    for network in (UnfoldedPGD([FlowProx(flow)], start="adjoint"), UnfoldedHQS([FlowProx(flow)], start="adjoint")):
        with torch.no_grad():
            x_hat = network(fitted.y, fitted.physics)
        assert x_hat.shape == fitted.y.shape and bool(x_hat.isfinite().all())


def test_an_operator_without_a_mirror_image_is_refused() -> None:
    with pytest.raises(ValueError, match="RealMRI has no mirror image"):
        mirrored(make_physics("mri", (1, 8, 8)))
