"""Super-resolution, MRI and CT are deepinv's operators; measurements and adjoints that do not fit are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import deepinv
import numpy as np
import pytest
import torch
from helpers import assert_adjoint
from PIL import Image
from torch import Tensor

from flowprox.data import load_image
from flowprox.operators import (
    FILTERS,
    RealMRI,
    check_adjoint,
    check_measurement,
    data_prox,
    imaging,
    kspace_mask,
    make_physics,
    measure_each,
    measurement_shape,
)
from flowprox.reconstruction import ReconstructionJob, reconstruct_files

SHAPE = (3, 12, 14)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# MRI -----------------------------------------------------------------------------------------------------------------


def test_mri_of_one_channel_is_deepinvs_with_zero_imaginary_part() -> None:
    mask, x = kspace_mask(12, 14), torch.rand(2, 1, 12, 14)
    theirs = deepinv.physics.MRI(mask=mask)
    assert torch.equal(RealMRI(mask, (1, 12, 14)).A(x), theirs.A(torch.cat([x, torch.zeros_like(x)], 1)))


def test_mri_measures_every_channel_alone() -> None:
    physics, x = make_physics("mri", SHAPE), torch.rand(2, *SHAPE)
    mask = physics.get_buffer("mask")
    each = [RealMRI(mask, (1, 12, 14)).A(x[:, c : c + 1]) for c in range(3)]
    torch.testing.assert_close(physics.A(x), torch.cat(each, 1))


def test_mri_pseudo_inverse_agrees_with_the_measurement() -> None:
    physics, x = make_physics("mri", SHAPE).double(), torch.rand(2, *SHAPE, dtype=torch.float64)
    y = physics.A(x)
    torch.testing.assert_close(physics.A(physics.A_dagger(y)), y)
    almost = data_prox(torch.zeros_like(x), y, physics, 1e-8)
    torch.testing.assert_close(physics.A_dagger(y), almost, rtol=0, atol=1e-6)


def test_mri_without_acceleration_loses_nothing() -> None:
    physics, x = make_physics("mri", SHAPE, acceleration=1), torch.rand(2, *SHAPE)
    torch.testing.assert_close(physics.A_adjoint(physics.A(x)), x)


def test_mri_has_noise_only_where_it_measures() -> None:
    physics, x = make_physics("mri", SHAPE, sigma=0.5), torch.rand(2, *SHAPE)
    noise = measure_each(x, physics, [0, 1]) - physics.A(x)
    measured = physics.get_buffer("mask") > 0
    assert (noise[..., ~measured] == 0).all()
    assert abs(noise[..., measured].std() - 0.5) < 0.05


@pytest.mark.parametrize(("acceleration", "center_fraction"), [(4, None), (8, None), (2, 0.25), (4, 0.25), (1, 0.0)])
def test_kspace_mask_measures_one_in_so_many_columns(acceleration: int, center_fraction: float | None) -> None:
    mask = kspace_mask(16, 64, acceleration, center_fraction, seed=3)
    assert torch.equal(mask, mask[:1].expand(16, 64))
    assert mask[0].sum() == 64 // acceleration
    assert torch.equal(mask, kspace_mask(16, 64, acceleration, center_fraction, seed=3))
    n_center = int(64 * (center_fraction or 0.0))
    assert mask[0, 32 - n_center // 2 : 32 + (n_center + 1) // 2].all()


def test_kspace_mask_follows_the_seed() -> None:
    assert not torch.equal(kspace_mask(16, 64, seed=1), kspace_mask(16, 64, seed=2))


@pytest.mark.parametrize("pattern", imaging.PATTERNS)
def test_every_pattern_measures_the_middle_and_about_one_in_so_many(pattern: str) -> None:
    mask = kspace_mask(48, 64, 4, seed=3, pattern=pattern)
    assert mask[24, 32] == 1 and mask.unique().tolist() == [0, 1]
    assert abs(float(mask.mean()) - 1 / 4) < 0.05
    assert torch.equal(mask, kspace_mask(48, 64, 4, seed=3, pattern=pattern))


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_parallel_mri_is_deepinvs_by_every_coil(channels: int) -> None:
    """Of own maps as of simulated ones, whose squares sum to one: then nothing is lost where nothing is left out."""
    maps = torch.randn(3, 12, 14, dtype=torch.complex64)
    physics = make_physics("multicoil-mri", (channels, 12, 14), acceleration=2, coil_maps=maps.numpy(), sigma=0.0)
    x = torch.rand(2, channels, 12, 14)
    assert physics.A(x).shape == (2, 6 if channels == 3 else 2, 3, 12, 14)
    assert_adjoint(physics.A, physics.A_adjoint, (2, channels, 12, 14), dtype=torch.float32, rtol=1e-4)
    single = deepinv.physics.MRI(mask=physics.get_buffer("mask"))
    parts = x if channels == 2 else torch.cat([x[:, :1], torch.zeros_like(x[:, :1])], 1)
    seen = torch.view_as_real(maps[1] * torch.complex(parts[:, 0], parts[:, 1])).movedim(-1, 1)
    torch.testing.assert_close(physics.A(x)[:, :2, 1], single.A(seen))
    full = make_physics("multicoil-mri", (channels, 12, 14), acceleration=1, n_coils=4)
    torch.testing.assert_close(full.A_adjoint(full.A(x)), x, rtol=0, atol=1e-5)


def test_a_complex_image_is_reconstructed_from_its_coils(tmp_path: Path) -> None:
    """By total variation, which leaves negative parts alone, and from a file, with a picture of the magnitude."""
    x = torch.stack([torch.linspace(-0.5, 0.5, 16).expand(16, 16), torch.full((16, 16), 0.3)])[None]
    parameters = {"acceleration": 2, "n_coils": 4}
    y = measure_each(x, make_physics("multicoil-mri", (2, 16, 16), **parameters), [0])
    np.save(tmp_path / "y.npy", y.numpy())
    options = {"regularization": 1e-3, "n_iterations": 300}
    job = ReconstructionJob(None, "multicoil-mri", parameters, operator_seed=0, method="tv", options=options)
    reconstruct_files(replace(job, size=(2, 16, 16)), [tmp_path / "y.npy"], tmp_path / "out")
    x_hat = torch.from_numpy(np.load(tmp_path / "out" / "y.npy"))
    assert (x_hat - x[0]).square().mean().sqrt() < 0.03
    assert load_image(tmp_path / "out" / "y.png").shape == (1, 16, 16)


# CT and super-resolution ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0, imaging.MATRIX_LIMIT], ids=["rotated", "matrix"])
@pytest.mark.parametrize("width", [7, 8])
def test_ct_is_deepinvs_by_matrix_and_by_rotation(width: int, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imaging, "MATRIX_LIMIT", limit)
    physics = make_physics("ct", (2, width, width), n_angles=5)
    theirs = deepinv.physics.Tomography(5, width, normalize=True)
    x = torch.rand(3, 2, width, width)
    y = theirs.A(x)
    torch.testing.assert_close(physics.A(x), y, rtol=1e-3, atol=1e-3)  # the norm is found to 1e-3
    scale = physics.get_buffer("operator_norm") / theirs.get_buffer("operator_norm")
    torch.testing.assert_close(physics.A(x) * scale, y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(physics.A_adjoint(y) * scale, theirs.A_adjoint(y), rtol=1e-5, atol=1e-5)
    assert isinstance(physics, imaging.CT)
    torch.testing.assert_close(physics.fbp(y / scale), theirs.fbp(y), rtol=1e-4, atol=1e-4)


def test_a_fan_sees_what_deepinvs_fan_sees() -> None:
    physics = make_physics("ct", (1, 16, 16), n_angles=6, fan_beam=True)
    x = torch.rand(2, 1, 16, 16)
    angles = torch.linspace(0, 360, 7)[:-1]
    theirs = deepinv.physics.Tomography(angles, 16, fan_beam=True, fan_parameters=imaging._fan(16), normalize=False)
    scale = physics.get_buffer("operator_norm")
    torch.testing.assert_close(physics.A(x) * scale, theirs.A(x), rtol=1e-4, atol=1e-4)
    assert_adjoint(physics.A, physics.A_adjoint, (1, 1, 16, 16), dtype=torch.float32, rtol=1e-4)
    corner = torch.zeros(1, 1, 16, 16)
    corner[..., 0, 0] = 1
    assert (physics.A(corner).sum(2) > 0).all()  # no beam passes beside the detector


def test_photons_are_noise_that_falls_with_the_dose() -> None:
    x, errors = torch.full((1, 1, 16, 16), 0.5), []
    for photons in (1e1, 1e3, 1e5):
        physics = make_physics("ct", (1, 16, 16), n_angles=8, photons=photons)
        y = measure_each(x, physics, [0])
        assert torch.equal(y, measure_each(x, physics, [0])) and torch.isfinite(y).all()
        errors.append(float((y - physics.A(x)).square().mean().sqrt()))
    assert errors[0] > 5 * errors[1] > 25 * errors[2]
    with pytest.raises(ValueError, match="photons takes the place of what sigma describes"):
        make_physics("ct", (1, 16, 16), photons=1e4, sigma=0.1)


def test_ct_has_norm_one_and_its_adjoint_for_every_dtype_and_batch() -> None:
    physics = make_physics("ct", (2, 8, 8), n_angles=6)
    assert_adjoint(physics.A, physics.A_adjoint, (3, 2, 8, 8), dtype=torch.float32, rtol=1e-5)
    physics = physics.double()
    assert_adjoint(physics.A, physics.A_adjoint, (1, 2, 8, 8))
    x = torch.rand(1, 1, 8, 8, dtype=torch.float64)
    for _ in range(50):
        x = physics.A_adjoint(physics.A(x / x.norm()))
    assert x.norm() == pytest.approx(1.0, rel=0.01)


def test_ct_is_not_rounded_where_training_rounds() -> None:
    physics, x = make_physics("ct", (1, 8, 8), n_angles=6), torch.rand(2, 1, 8, 8, requires_grad=True)
    exact = physics.A_adjoint(physics.A(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(physics.A_adjoint(physics.A(x)), exact, rtol=0, atol=0)


def test_ct_sees_the_mass_of_the_image_at_every_angle() -> None:
    x = torch.zeros(1, 1, 16, 16)
    x[..., 6:11, 5:12] = torch.rand(5, 7)
    sums = make_physics("ct", (1, 16, 16), n_angles=8).A(x).sum(2)
    assert (sums - sums.mean()).abs().max() < 0.02 * sums.mean()


def test_gradient_through_the_adjoint_of_ct() -> None:
    physics = make_physics("ct", (1, 8, 8), n_angles=4).double()
    y = physics.A(torch.rand(1, 1, 8, 8, dtype=torch.float64)).requires_grad_()
    weight = torch.rand(1, 1, 8, 8, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((physics.A_adjoint(y) * weight).sum(), y)
    torch.testing.assert_close(gradient, physics.A(weight))


@pytest.mark.parametrize("factor", [2, 3, 4])
@pytest.mark.parametrize("filter", ["bicubic", "bilinear"])
def test_super_resolution_is_pillows_resize(filter: str, factor: int) -> None:
    x = torch.rand(12 * factor, 10 * factor)
    resample = Image.Resampling.BICUBIC if filter == "bicubic" else Image.Resampling.BILINEAR
    small = Image.fromarray(x.numpy()).resize((10, 12), resample)
    y = make_physics("super-resolution", (1, *x.shape), factor=factor, filter=filter).A(x[None, None])
    torch.testing.assert_close(y[0, 0], torch.from_numpy(np.array(small)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("factor", [2, 3, 4])
@pytest.mark.parametrize("filter", FILTERS)
def test_samples_stand_in_the_middle_of_their_pixels(filter: str, factor: int) -> None:
    ramp = torch.arange(16.0 * factor).expand(1, 1, 16 * factor, -1)
    y = make_physics("super-resolution", (1, *ramp.shape[2:]), factor=factor, filter=filter).A(ramp)
    middle = factor * torch.arange(16) + (factor - 1) / 2
    torch.testing.assert_close(y[0, 0, 8, 4:-4], middle[4:-4], rtol=0, atol=1e-3)


@pytest.mark.parametrize("filter", ["bicubic", "sinc"])
def test_super_resolution_is_deepinvs_inside(filter: str) -> None:
    physics, x = make_physics("super-resolution", (3, 32, 32), filter=filter, factor=2), torch.rand(2, 3, 32, 32)
    theirs = deepinv.physics.Downsampling(
        img_size=(3, 32, 32), filter=filter, factor=2
    )  # of factor 2 alone the same grid
    torch.testing.assert_close(physics.A(x)[..., 3:-3, 3:-3], theirs.A(x)[..., 3:-3, 3:-3], rtol=0, atol=1e-3)


# Checks for solvers --------------------------------------------------------------------------------------------------

PROBLEMS_OF_EVERY_SHAPE: dict[str, dict[str, Any]] = {
    "denoising": {},
    "compressed-sensing": {"m": 30},
    "one-bit": {"m": 30},
    "super-resolution": {"factor": 2},
    "mri": {},
}


@pytest.mark.parametrize("name", PROBLEMS_OF_EVERY_SHAPE)
def test_what_was_measured_passes_the_checks(name: str) -> None:
    physics = make_physics(name, SHAPE, **PROBLEMS_OF_EVERY_SHAPE[name])
    y = measure_each(torch.rand(2, *SHAPE), physics, [0, 1])
    assert measurement_shape(physics, SHAPE) == y.shape[1:]
    check_measurement(y, physics, SHAPE)
    check_adjoint(physics, SHAPE)


@pytest.mark.parametrize(
    ("y", "error", "message"),
    [
        (torch.zeros(2, 29), ValueError, r"y has shape \(2, 29\), but the operator measures an image .* as \(30,\)"),
        (torch.zeros(30), ValueError, r"y must be \(B, 30\)"),
        (torch.zeros(()), ValueError, r"y must be \(B, 30\)"),
        (torch.zeros(2, 30).int(), ValueError, r"y must be a tensor of floating-point numbers, got torch\.int32"),
        ([[0.0] * 30], ValueError, "y must be a tensor of floating-point numbers, got list"),
        (
            torch.zeros(3, 30).index_fill(0, torch.tensor(1), torch.nan),
            ValueError,
            r"y holds 30 values .* in images \[1\]",
        ),
        (torch.full((1, 30), torch.inf), ValueError, "y holds 30 values that are NaN or infinite"),
    ],
)
def test_a_measurement_that_does_not_fit_is_refused(y: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_measurement(y, make_physics("compressed-sensing", SHAPE, m=30), SHAPE)


def test_what_is_not_measured_may_hold_anything() -> None:
    mask = torch.ones(8, 8)
    mask[2:4] = 0
    for name in ("inpainting", "mri"):
        physics = make_physics(name, (1, 8, 8), mask=mask, sigma=0.0)
        y = physics.A(torch.rand(2, 1, 8, 8))
        filled = torch.where(mask > 0, y, torch.nan)
        checked = check_measurement(filled, physics, (1, 8, 8))
        assert torch.equal(checked, check_measurement(y, physics, (1, 8, 8)))
        assert torch.equal(physics.A_adjoint(checked), physics.A_adjoint(y))


def _doubled(x: Tensor) -> Tensor:
    return 2 * x


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda y: y, "A_adjoint is not the adjoint of A"),
        (lambda y: -2 * y, "A_adjoint is not the adjoint of A"),
        (lambda y: 2 * y.roll(1, -1), "A_adjoint is not the adjoint of A"),
        (lambda y: y * torch.nan, "A_adjoint is not the adjoint of A"),
        (lambda y: 2 * y[..., 1:], "A_adjoint gives shape"),
    ],
)
def test_an_adjoint_that_does_not_fit_is_refused(wrong: Any, message: str) -> None:
    check_adjoint(deepinv.physics.LinearPhysics(A=_doubled, A_adjoint=_doubled), SHAPE)
    with pytest.raises(ValueError, match=message):
        check_adjoint(deepinv.physics.LinearPhysics(A=_doubled, A_adjoint=wrong), SHAPE)


def test_the_check_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    check_adjoint(make_physics("denoising", SHAPE), SHAPE)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("super-resolution", {"factor": 5}, "factor must be a positive whole number that divides .* 12x14, got 5"),
        ("super-resolution", {"factor": 0}, "factor must be a positive whole number"),
        ("super-resolution", {"factor": 2, "filter": "cubic"}, "unknown filter 'cubic'; known: bicubic"),
        ("mri", {"acceleration": 0}, "acceleration must be a whole number from 1 to the width 14, got 0"),
        ("mri", {"acceleration": 15}, "acceleration must be a whole number"),
        ("mri", {"acceleration": 4, "center_fraction": 0.5}, r"at most 1/acceleration = 0\.25, got 0\.5"),
        ("mri", {"pattern": "spiral"}, "unknown pattern 'spiral'"),
        ("mri", {"pattern": "radial", "center_fraction": 0.1}, "center_fraction is of columns"),
        ("multicoil-mri", {"n_coils": 0}, "n_coils must be at least 1"),
        ("multicoil-mri", {"coil_maps": torch.ones(2, 12, 13)}, r"coil_maps must be complex \(N, 12, 14\)"),
        ("mri", {"mask": torch.zeros(12, 14)}, "mask hides every pixel"),
        ("ct", {}, "computed tomography takes square images, got 12x14"),
        ("ct", {"n_angles": 0}, "n_angles must be at least 1"),
    ],
)
def test_bad_input_is_named(name: str, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_physics(name, SHAPE, **parameters)


def test_images_and_measurements_of_another_size_are_refused() -> None:
    physics = make_physics("mri", SHAPE)
    with pytest.raises(ValueError, match=r"images of shape \(1, 12, 14\) do not fit the MRI operator"):
        physics.A(torch.rand(1, 1, 12, 14))
    with pytest.raises(ValueError, match=r"y of shape \(3, 12, 14\) do not fit .* which takes \(6, 12, 14\)"):
        physics.A_adjoint(torch.rand(1, 3, 12, 14))
