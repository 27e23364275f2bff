"""Operators: linear, with their adjoint, an exact data step, reproducible noise, and clear words for bad input."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import deepinv
import numpy as np
import pytest
import torch
from deepinv.physics import LinearPhysics
from helpers import assert_adjoint, assert_linear, dense_matrix
from PIL import Image
from torch import Tensor

from flowprox.methods import make_method
from flowprox.naming import build
from flowprox.noise import GaussianNoise, make_noise
from flowprox.operators import (
    BOUNDARIES,
    FILTERS,
    PROBLEMS,
    CircularBlur,
    LearnedBlur,
    Problem,
    VariedProblem,
    center_mask,
    data_gradient,
    data_prox,
    make_physics,
    measure,
    measure_each,
    measurement_shape,
    random_mask,
)

SHAPE = (3, 8, 10)
OWN_MASK = (torch.arange(80).view(8, 10) % 3 > 0).float()
OWN_KERNEL = torch.tensor([[0.0, 0.1, 0.2], [0.3, 0.3, 0.0], [0.0, 0.0, 0.1]])


class Case(NamedTuple):
    make: Callable[[], LinearPhysics]
    shape: tuple[int, int, int] = SHAPE


def _made(name: str, shape: tuple[int, int, int] = SHAPE, **parameters: Any) -> Case:
    return Case(lambda: make_physics(name, shape, **parameters), shape)


CASES: dict[str, Case] = {
    "denoising": _made("denoising"),
    "inpainting": _made("inpainting", mask_size=3),
    "inpainting-rectangle": _made("inpainting", mask_size=(8, 3)),
    "inpainting-own-mask": _made("inpainting", mask=OWN_MASK),
    "random-inpainting": _made("random-inpainting"),
    **{
        f"deblurring-{b}": _made("deblurring", (1, 5, 6), boundary=b, kernel_size=5, sigma_blur=1.5) for b in BOUNDARIES
    },
    "deblurring-own-kernel": _made("deblurring", kernel=OWN_KERNEL),
    "compressed-sensing": _made("compressed-sensing", m=40),
    "compressed-sensing-more-rows-than-pixels": _made("compressed-sensing", m=300),
    "compressed-sensing-structured": _made("compressed-sensing", m=40, structured=True),
    "compressed-sensing-structured-odd": _made("compressed-sensing", (1, 5, 7), m=35, structured=True),
    **{f"super-resolution-{f}": _made("super-resolution", (1, 8, 10), factor=2, filter=f) for f in (None, *FILTERS)},
    "mri": _made("mri"),
    "mri-odd": _made("mri", (1, 7, 9), acceleration=2, center_fraction=0.3),
    "mri-own-mask": _made("mri", mask=OWN_MASK),
    "multicoil-mri": _made("multicoil-mri"),
    "multicoil-mri-complex": _made("multicoil-mri", (2, 7, 9), n_coils=3, pattern="radial"),
    "ct": _made("ct", (1, 5, 5), n_angles=3),
    "ct-fan": _made("ct", (1, 5, 5), n_angles=3, fan_beam=True),
    "learned-blur": Case(lambda: LearnedBlur(kernel_size=5, sigma_blur=1.5)),
    "learned-blur-free": Case(lambda: LearnedBlur(kernel_size=3, sigma_blur=1.0, normalized=False)),
}
every_operator = pytest.mark.parametrize(("make", "shape"), CASES.values(), ids=CASES.keys())
NON_LINEAR = {"one-bit"}


def test_every_problem_is_a_case() -> None:
    assert all(any(case.startswith(name) for case in CASES) for name in PROBLEMS if name not in NON_LINEAR)


@every_operator
def test_linear_with_its_adjoint(make: Callable[[], LinearPhysics], shape: tuple[int, int, int]) -> None:
    physics = make().double()
    assert_linear(physics.A, (2, *shape))
    assert_adjoint(physics.A, physics.A_adjoint, (2, *shape))


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("sides", [(1, 1), (1, 5), (3, 1), (3, 5)], ids=str)
def test_kernels_with_a_side_of_one_have_their_adjoint(boundary: str, sides: tuple[int, int]) -> None:
    kernel = torch.rand(sides)
    for shape in ((1, 6, 7), (1, 1, 7), (1, 6, 1)):
        if all(n >= k for n, k in zip(shape[1:], sides, strict=True)):
            physics = make_physics("deblurring", shape, kernel=kernel / kernel.sum(), boundary=boundary).double()
            assert_adjoint(physics.A, physics.A_adjoint, (2, *shape))


@every_operator
def test_same_result_in_a_batch_and_channels_last(
    make: Callable[[], LinearPhysics], shape: tuple[int, int, int]
) -> None:
    physics = make()
    x = torch.rand(3, *shape)
    together = physics.A(x)
    assert len(together) == 3
    assert together.dtype == x.dtype
    torch.testing.assert_close(together, torch.cat([physics.A(image[None]) for image in x]))
    torch.testing.assert_close(together, physics.A(x.contiguous(memory_format=torch.channels_last)))


@every_operator
def test_images_of_numpys_type_are_measured(make: Callable[[], LinearPhysics], shape: tuple[int, int, int]) -> None:
    physics, x = make(), torch.rand(1, *shape, dtype=torch.float64)
    y = physics.A(x)
    assert y.dtype == physics.A_adjoint(y).dtype == torch.float64
    torch.testing.assert_close(y.float(), physics.A(x.float()), rtol=1e-4, atol=1e-4)


@every_operator
def test_data_gradient_descends_the_data_term(make: Callable[[], LinearPhysics], shape: tuple[int, int, int]) -> None:
    physics = make().double()
    x = torch.randn(2, *shape, dtype=torch.float64, requires_grad=True)
    y = torch.randn_like(physics.A(x))
    loss = 0.5 * (y - physics.A(x)).square().sum()
    (gradient,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(data_gradient(x, y, physics), -gradient)


@every_operator
@pytest.mark.parametrize("rho", [torch.tensor(0.3), torch.tensor([0.05, 2.0])], ids=["one-rho", "rho-per-image"])
def test_data_prox_is_the_dense_solution_and_so_is_its_gradient(
    make: Callable[[], LinearPhysics], shape: tuple[int, int, int], rho: Tensor
) -> None:
    physics = make().double()
    matrix = dense_matrix(physics.A, shape)
    v, weight = torch.randn(2, 2, *shape, dtype=torch.float64)
    y = torch.randn_like(physics.A(v))
    inputs = [v.requires_grad_(), y.requires_grad_(), rho.double().requires_grad_()]

    def dense(v: Tensor, y: Tensor, rho: Tensor) -> Tensor:
        diagonal = rho.expand(2)[:, None, None] * torch.eye(matrix.shape[1], dtype=torch.float64)
        right = y.flatten(1) @ matrix + rho.expand(2)[:, None] * v.flatten(1)
        # by Cholesky: a batched LU goes wrong on the CPU after torch.set_num_threads (pytorch/pytorch#142815)
        factor = torch.linalg.cholesky(matrix.T @ matrix + diagonal)
        return torch.cholesky_solve(right[:, :, None], factor).view_as(v)

    expected = dense(*inputs)
    reached = data_prox(inputs[0], inputs[1], physics, inputs[2], max_iter=500, tol=1e-10)
    torch.testing.assert_close(reached, expected, rtol=1e-6, atol=1e-8)
    for a, b in zip(
        torch.autograd.grad((reached * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@every_operator
def test_data_prox_writes_nothing_to_the_operator(
    make: Callable[[], LinearPhysics], shape: tuple[int, int, int]
) -> None:
    physics, v = make(), torch.randn(2, *shape)
    y = torch.randn_like(physics.A(v))
    before = {name: value for name, value in vars(physics).items() if not name.startswith("_")}
    tensors = copy.deepcopy(physics.state_dict())
    data_prox(v, y, physics, 0.7, tol=1e-3)
    assert {name: value for name, value in vars(physics).items() if not name.startswith("_")} == before
    for name, tensor in physics.state_dict().items():
        assert torch.equal(tensor, tensors[name])


@pytest.mark.parametrize("rho", [0.0, -1.0, float("nan")])
def test_data_prox_refuses_a_weight_that_is_not_positive(rho: float) -> None:
    x = torch.zeros(1, *SHAPE)
    with pytest.raises(ValueError, match="rho must be a positive number"):
        data_prox(x, x, make_physics("denoising", SHAPE), rho)


@pytest.mark.parametrize("case", ["denoising", "deblurring-circular", "deblurring-reflect", "learned-blur"])
def test_takes_images_of_another_size(case: str) -> None:
    physics = CASES[case].make().double()
    shape = (2, 3, 7, 12)
    assert_adjoint(physics.A, physics.A_adjoint, shape)
    x = torch.rand(shape, dtype=torch.float64)
    y = measure(x, physics)
    assert data_prox(x, y, physics, 0.1).shape == y.shape == shape


# Blur ----------------------------------------------------------------------------------------------------------------


def test_circular_blur_agrees_with_deepinv() -> None:
    x = torch.rand(2, *SHAPE)
    ours = make_physics("deblurring", SHAPE, kernel=OWN_KERNEL)
    theirs = deepinv.physics.BlurFFT(img_size=SHAPE, filter=OWN_KERNEL[None, None])
    direct = deepinv.physics.Blur(filter=OWN_KERNEL[None, None], padding="circular")
    torch.testing.assert_close(ours.A(x), theirs.A(x))
    torch.testing.assert_close(ours.A(x), direct.A(x))
    torch.testing.assert_close(ours.prox_l2(x, x, 2.0), theirs.prox_l2(x, x, 2.0))


def test_default_kernel_is_the_gaussian_of_the_problem() -> None:
    kernel = CircularBlur.kernel(make_physics("deblurring"))[0, 0]  # type: ignore[arg-type]
    axis = torch.arange(9) - 4.0
    expected = torch.exp(-(axis[:, None] ** 2 + axis**2) / (2 * 5.0**2))
    torch.testing.assert_close(kernel, expected / expected.sum())


@pytest.mark.parametrize("kernel_size", [5, 9])
def test_float32_blur_is_inverted_by_the_inverse_filter(kernel_size: int) -> None:
    physics = make_physics("deblurring", (3, 64, 64), kernel_size=kernel_size, sigma=0.0)
    x = torch.rand(2, 3, 64, 64)
    x_hat = data_prox(torch.zeros_like(x), physics.A(x), physics, 1e-12)
    assert 10 * torch.log10(1 / (x_hat - x).square().mean()) > 85
    assert 10 * torch.log10(1 / (physics.A_dagger(physics.A(x)) - x).square().mean()) > 85


def test_blur_computes_in_float32_for_bfloat16_images() -> None:
    x = torch.rand(1, *SHAPE)
    physics = CASES["deblurring-circular"].make()
    y = physics.A(x.bfloat16())
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, physics.A(x), rtol=0, atol=1e-2)


WARNED: dict[str, tuple[str, dict[str, Any], str]] = {
    "brighter": ("deblurring", {"kernel": torch.ones(3, 3)}, "kernel sums to 9"),
    "negative": ("deblurring", {"kernel": torch.tensor([[-0.5, 2.0, -0.5]])}, r"smallest value is -0\.5"),
}


@pytest.mark.parametrize("case", WARNED)
def test_what_is_hardly_meant_is_warned_of(case: str) -> None:
    name, parameters, message = WARNED[case]
    with pytest.warns(UserWarning, match=message):
        make_physics(name, SHAPE, **parameters)


def test_levels_of_8_bit_are_refused_for_pictures_only() -> None:
    message = r"sigma is 25, and images lie in \[0, 1\]; one of 8-bit gray levels is divided by 255: 25/255 = 0\.098"
    for parameters in ({"sigma": 25}, {"noise": "radial", "noise_parameters": {"sigma": 25.0}}):
        for name in (key for key, kind in PROBLEMS.items() if kind.measures_pictures):
            with pytest.raises(ValueError, match=message):
                Problem(name, parameters)
    with pytest.raises(ValueError, match=message):
        VariedProblem("denoising", SHAPE, {"sigma": (0, 25)})
    with pytest.raises(ValueError, match=r"sigma_start is 49, .* 49/255 = 0\.192"):
        make_method("plug-and-play", "deblurring", model=torch.nn.Identity(), sigma_start=49.0)
    with pytest.raises(ValueError, match=message):
        make_method("noise-map", "denoising", flow="glow-faces64", noise={"name": "gaussian", "sigma": 25})
    assert Problem("mri", {"sigma": 25}).parameters["sigma"] == 25  # k-space in units of its own


def test_masks_and_kernels_are_read_from_pictures(tmp_path: Path) -> None:
    mask = (OWN_MASK.numpy() * 255).astype(np.uint8)
    Image.fromarray(np.stack([mask] * 3, 2)).save(tmp_path / "mask.png")
    assert torch.equal(
        make_physics("inpainting", SHAPE, mask=tmp_path / "mask.png").A(torch.ones(1, *SHAPE))[0, 0], OWN_MASK
    )
    Image.fromarray((OWN_KERNEL.numpy() * 200).astype(np.uint8)).save(tmp_path / "kernel.png")
    physics = make_physics("deblurring", SHAPE, kernel=str(tmp_path / "kernel.png"))
    torch.testing.assert_close(physics.get_buffer("filter")[0, 0], OWN_KERNEL, rtol=0, atol=0.01)


def test_a_kernel_larger_than_a_later_image_is_refused() -> None:
    with pytest.raises(ValueError, match="kernel of 5x5 is larger than the image of 4x4"):
        CASES["deblurring-circular"].make().A(torch.rand(1, 3, 4, 4))


def test_learned_blur_finds_the_kernel() -> None:
    physics = LearnedBlur(kernel_size=3, sigma_blur=5.0)
    truth = make_physics("deblurring", SHAPE, kernel=OWN_KERNEL / OWN_KERNEL.sum(), sigma=0.0)
    x = torch.rand(4, *SHAPE)
    y = truth.A(x)
    optimizer = torch.optim.Adam(physics.parameters(), lr=0.3)
    for _ in range(80):
        optimizer.zero_grad()
        (physics.A(x) - y).square().mean().backward()
        optimizer.step()
    torch.testing.assert_close(physics.kernel()[0, 0], OWN_KERNEL / OWN_KERNEL.sum(), rtol=0, atol=0.01)


def test_learned_blur_gets_a_gradient_through_the_data_step() -> None:
    physics = LearnedBlur(kernel_size=3, sigma_blur=1.0)
    v, y = torch.rand(2, 1, *SHAPE)
    data_prox(v, y, physics, 0.1).square().sum().backward()
    assert physics.weight.grad is not None
    assert physics.weight.grad.abs().sum() > 0


def test_learned_blur_is_rebuilt_from_its_spec_and_weights() -> None:
    physics = LearnedBlur(kernel_size=5, sigma_blur=2.0, normalized=False)
    with torch.no_grad():
        physics.weight.mul_(1.5)
    again = build(physics.spec())
    again.load_state_dict(physics.state_dict())
    x = torch.rand(1, *SHAPE)
    assert torch.equal(again.A(x), physics.A(x))


# Masks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "size", "first", "last"), [(64, 19, 22, 40), (64, 16, 24, 39), (7, 2, 2, 3)])
def test_center_mask_stands_in_the_middle(height: int, size: int, first: int, last: int) -> None:
    hidden = (center_mask(height, height, size) == 0).nonzero()
    assert len(hidden) == size**2
    assert hidden.min() == first
    assert hidden.max() == last


def test_random_mask_follows_the_seed_and_keeps_its_fraction() -> None:
    assert torch.equal(random_mask(16, 16, seed=3), random_mask(16, 16, seed=3))
    assert not torch.equal(random_mask(16, 16, seed=3), random_mask(16, 16, seed=4))
    assert random_mask(10, 10, keep=0.37).sum() == 37


def test_random_inpainting_hides_the_same_pixels_in_all_images_and_channels() -> None:
    y = make_physics("random-inpainting", SHAPE, seed=5).A(torch.ones(4, *SHAPE))
    assert torch.equal(y, random_mask(8, 10, 0.5, seed=5).expand(4, *SHAPE))


def test_hidden_pixels_stay_zero_under_noise() -> None:
    physics = make_physics("inpainting", SHAPE, mask=OWN_MASK, sigma=0.1)
    y = measure(torch.rand(2, *SHAPE), physics, torch.Generator().manual_seed(0))
    assert (y[..., OWN_MASK == 0] == 0).all()


def test_masks_of_any_strides_and_byte_order() -> None:
    mask = OWN_MASK.numpy()
    for array in (mask[::-1, ::-1][::-1, ::-1], mask.astype(">f4"), mask.astype(bool), mask.T.copy().T):
        assert torch.equal(make_physics("inpainting", SHAPE, mask=array).A(torch.ones(1, *SHAPE))[0, 0], OWN_MASK)


@pytest.mark.parametrize("as_text", [True, False], ids=["text", "path"])
def test_mask_and_kernel_from_files(tmp_path: Path, as_text: bool) -> None:
    mask, kernel = tmp_path / "mask.npy", tmp_path / "kernel.npy"
    np.save(mask, OWN_MASK.numpy().astype(bool))
    np.save(kernel, OWN_KERNEL.numpy().astype(np.float64))
    x = torch.rand(1, *SHAPE)
    for name, key, path, array in (
        ("inpainting", "mask", mask, OWN_MASK),
        ("random-inpainting", "mask", mask, OWN_MASK),
        ("deblurring", "kernel", kernel, OWN_KERNEL),
    ):
        problem = Problem(name, {key: str(path) if as_text else path})
        expected = make_physics(Problem(name, {key: array}), SHAPE).A(x)
        assert torch.equal(make_physics(problem, SHAPE).A(x), expected)
        assert torch.equal(make_physics(name, SHAPE, **problem.parameters).A(x), expected)
        assert problem == Problem(**json.loads(problem.to_json()))
        assert problem.label == f"{name}-{key}-{path.stem}"


# Noise ---------------------------------------------------------------------------------------------------------------


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_noise_has_the_level_that_was_asked_for() -> None:
    noise = measure(torch.zeros(1, 3, 64, 64), make_physics("denoising", sigma=0.25), _generator())
    assert abs(noise.std() - 0.25) < 0.01
    assert abs(noise.mean()) < 0.01


def test_a_generator_gives_the_same_noise_again_and_advances() -> None:
    physics, x = make_physics("denoising", SHAPE), torch.rand(2, *SHAPE)
    generator = _generator()
    first, second = measure(x, physics, generator), measure(x, physics, generator)
    assert not torch.equal(first, second)
    generator.manual_seed(0)
    torch.rand(3)  # the global generator has no part in it
    assert torch.equal(measure(x, physics, generator), first)


def test_noise_does_not_depend_on_the_memory_layout() -> None:
    physics, x = make_physics("denoising", SHAPE), torch.rand(2, *SHAPE)
    again = measure(x.contiguous(memory_format=torch.channels_last), physics, _generator())
    assert torch.equal(measure(x, physics, _generator()), again)


@pytest.mark.parametrize("noise_model", [None, "poisson", "gaussian-with-its-own-generator"])
def test_an_image_keeps_its_noise_in_every_batch(noise_model: str | None) -> None:
    physics, x = CASES["deblurring-circular"].make(), torch.rand(3, *SHAPE)
    if noise_model == "poisson":
        physics.set_noise_model(deepinv.physics.PoissonNoise(gain=0.1, clip_positive=True))
    elif noise_model:
        physics.set_noise_model(deepinv.physics.GaussianNoise(0.1, rng=_generator(9)))
    together = measure_each(x, physics, [5, 6, 7])
    alone = torch.cat([measure_each(x[i : i + 1], physics, [5 + i]) for i in range(3)])
    torch.testing.assert_close(together, alone)
    assert not torch.allclose(together - physics.A(x), together[:1] - physics.A(x[:1]))


def test_other_noise_models_leave_the_global_generator_alone() -> None:
    physics = make_physics("denoising", SHAPE)
    physics.set_noise_model(deepinv.physics.GaussianNoise(0.1))
    state = torch.get_rng_state()
    x = torch.rand(1, *SHAPE, generator=_generator())
    assert torch.equal(measure(x, physics, _generator()), measure(x, physics, _generator()))
    assert torch.equal(torch.get_rng_state(), state)


def test_without_a_generator_noise_comes_from_the_global_one() -> None:
    physics, x = make_physics("denoising", SHAPE), torch.rand(1, *SHAPE)
    torch.manual_seed(1)
    first = measure(x, physics)
    torch.manual_seed(1)
    assert torch.equal(measure(x, physics), first)
    torch.manual_seed(1)
    assert torch.equal(physics.noise(physics.A(x)), first)


def test_the_noise_level_is_kept_as_deepinv_does() -> None:
    physics = make_physics("denoising", SHAPE)
    physics.update(sigma=torch.tensor(0.5))
    assert physics.noise_model.sigma == 0.5
    sigma = torch.tensor([0.0, 1.0])
    y = GaussianNoise(0.2)(torch.zeros(2, *SHAPE), sigma=sigma)
    assert y[0].abs().max() == 0
    assert y[1].std() > 0.8


NOISES_BY_NAME: dict[str, tuple[str, dict[str, Any]]] = {
    "gaussian": ("denoising", {"noise": "gaussian", "noise_parameters": {"sigma": 0.3, "mean": 0.1}}),
    "sinusoidal": ("denoising", {"noise": "sinusoidal", "sigma": 0.4}),
    "radial": ("deblurring", {"noise": "radial", "sigma": 0.4, "kernel_size": 3}),
    "sinusoidal-sensing": ("compressed-sensing", {"m": 40, "noise": "sinusoidal", "noise_parameters": {"mean": 0.2}}),
    "sinusoidal-one-bit": ("one-bit", {"m": 40, "noise": "sinusoidal"}),
    "sinusoidal-mri": ("mri", {"noise": "sinusoidal"}),
}


@pytest.mark.parametrize(("name", "parameters"), NOISES_BY_NAME.values(), ids=NOISES_BY_NAME.keys())
def test_noise_by_name(name: str, parameters: dict[str, Any]) -> None:
    problem = Problem(name, parameters)
    assert Problem(**json.loads(problem.to_json())) == problem
    assert f"noise-{parameters['noise']}" in problem.label
    physics, x = make_physics(problem, SHAPE), torch.rand(3, *SHAPE)
    y = measure_each(x, physics, [1, 2, 3])
    torch.testing.assert_close(measure_each(x[1:2], physics, [2]), y[1:2])
    expected = {**({"sigma": parameters["sigma"]} if "sigma" in parameters else {})}
    noise = make_noise(
        parameters["noise"], measurement_shape(physics, SHAPE), **expected, **parameters.get("noise_parameters", {})
    )
    residual = y - physics.A(x)
    torch.testing.assert_close(physics.noise_model.log_prob(residual), noise.log_prob(residual))  # type: ignore[operator]


def test_noise_by_object() -> None:
    noise = make_noise("sinusoidal", SHAPE, sigma=0.5)
    physics = make_physics("denoising", SHAPE, noise=noise)
    assert physics.noise_model is noise
    assert Problem("denoising", {"noise": noise}).label == "denoising-noise-HeteroscedasticNoise"
    with pytest.raises(ValueError, match="name a noise instead of passing an object"):
        Problem("denoising", {"noise": noise}).to_json()
    with pytest.raises(ValueError, match="noise"):
        make_physics("compressed-sensing", SHAPE, m=7, noise=noise)


@pytest.mark.parametrize(
    ("parameters", "std"),
    [({}, 0.1 / 20), ({"noise_norm": 2.0}, 0.1), ({"sigma": 0.3}, 0.3), ({"sigma": 0.0}, 0.0)],
)
def test_level_of_sensing_noise_by_norm_or_by_standard_deviation(parameters: dict[str, Any], std: float) -> None:
    physics = make_physics("compressed-sensing", SHAPE, m=400, **parameters)
    assert float(physics.noise_model.sigma) == pytest.approx(std)  # type: ignore[arg-type]
    problem = Problem("compressed-sensing", {"m": 400, **parameters})
    assert Problem(**json.loads(problem.to_json())) == problem


def test_a_new_noise_takes_the_place_of_the_one_before() -> None:
    white = Problem("denoising", {"sigma": 0.3})
    named = white.replaced(noise="sinusoidal", noise_parameters={"period": 8})
    assert named.label == "denoising-noise-sinusoidal-period8"
    assert named.parameters["sigma"] is None
    assert named.replaced(sigma=0.5).parameters["noise"] == "sinusoidal"
    sensing = Problem("compressed-sensing", {"m": 10})
    assert sensing.replaced(sigma=0.1).label == "compressed-sensing-m10-sigma0.1"
    assert sensing.replaced(noise="sinusoidal").replaced(noise_norm=0.5).label == "compressed-sensing-m10-noise_norm0.5"
    assert sensing.replaced(structured=True).label == "compressed-sensing-m10-structured"
    assert make_physics(named, SHAPE, noise="gaussian", noise_parameters={"sigma": 0.7}).noise_model.sigma == 0.7  # type: ignore[comparison-overlap]


# Problems and bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters", "label"),
    [
        ("denoising", {}, "denoising-sigma0.2"),
        ("denoising", {"sigma": 0.25}, "denoising-sigma0.25"),
        ("inpainting", {}, "inpainting-mask_size19"),
        ("inpainting", {"mask_size": [16, 8], "sigma": 0.1}, "inpainting-mask_size16x8-sigma0.1"),
        ("random-inpainting", {}, "random-inpainting-keep0.5"),
        ("deblurring", {"sigma_blur": 8}, "deblurring-sigma_blur8"),
        ("deblurring", {"boundary": "reflect"}, "deblurring-sigma_blur5-boundary-reflect"),
        ("denoising", {"noise": "sinusoidal"}, "denoising-noise-sinusoidal"),
    ],
)
def test_problem_label_and_json(name: str, parameters: dict[str, Any], label: str) -> None:
    problem = Problem(name, parameters)
    assert problem.label == label
    assert Problem(**json.loads(problem.to_json())) == problem
    assert make_physics(problem, (3, 20, 24)).A(torch.rand(1, 3, 20, 24)).shape == (1, 3, 20, 24)


def test_no_filter_is_told_as_text_or_none_and_from_the_default() -> None:
    bare = Problem("super-resolution", {"filter": None, "factor": 2})
    assert bare == Problem("super-resolution", {"filter": "none", "factor": 2})
    assert bare.label == "super-resolution-factor2-filternone" != Problem("super-resolution", {"factor": 2}).label
    x = torch.rand(1, *SHAPE)
    assert torch.equal(*(make_physics("super-resolution", SHAPE, filter=f, factor=2).A(x) for f in ("none", None)))


def test_parameters_override_those_of_a_problem() -> None:
    physics = make_physics(Problem("denoising", {"sigma": 0.1}), SHAPE, sigma=0.3)
    assert float(physics.noise_model.sigma) == pytest.approx(0.3)  # type: ignore[arg-type]


def test_a_problem_with_an_array_has_a_label_but_no_json() -> None:
    problem = Problem("inpainting", {"mask": OWN_MASK})
    assert problem.label == "inpainting-mask-given"
    assert torch.equal(make_physics(problem, SHAPE).A(torch.ones(1, *SHAPE))[0, 0], OWN_MASK)
    with pytest.raises(ValueError, match=r"save the array as \.npy"):
        problem.to_json()


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("denosing", {}, "unknown problem 'denosing'; did you mean denoising"),
        ("xyz", {}, "known: denoising, inpainting"),
        ("denoising", {"sgima": 0.1}, "no parameter 'sgima'; did you mean sigma"),
        ("denoising", {"sigma": -0.1}, "sigma is a standard deviation .* at least 0, got -0.1"),
        ("denoising", {"sigma": float("nan")}, "sigma is a standard deviation"),
        ("denoising", {"sigma": "0.1"}, "sigma is a standard deviation"),
        ("inpainting", {"mask_size": 11}, "mask_size 11x11 does not fit in an image of 8x10"),
        ("inpainting", {"mask_size": (8, 10)}, "smaller than the image"),
        ("inpainting", {"mask_size": 0}, "mask_size must be a positive number"),
        ("inpainting", {"mask_size": (1, 2, 3)}, "mask_size must be a positive number"),
        ("inpainting", {"mask": torch.ones(8, 8)}, r"mask has shape \(8, 8\) but the images are 8x10"),
        ("random-inpainting", {"mask": torch.full((8, 10), 0.5)}, "mask must hold only 1"),
        ("inpainting", {"mask": torch.zeros(8, 10)}, "mask hides every pixel"),
        ("inpainting", {"mask": object()}, "mask must be an array"),
        ("inpainting", {"mask": torch.ones(8, 10), "mask_size": 4}, "mask takes the place of what mask_size describes"),
        ("deblurring", {"kernel": torch.ones(3, 3) / 9, "sigma_blur": 1}, "kernel takes the place of what sigma_blur"),
        (None, {}, "unknown problem None; "),
        ("denoising", {"seed": 1.5}, "seed must be a whole number, got 1.5"),
        ("denoising", {"device": "nope"}, "device 'nope' is not known"),
        ("random-inpainting", {"keep": 0.0}, r"keep must be a fraction of pixels in \(0, 1\]"),
        ("random-inpainting", {"keep": 1.5}, "keep must be a fraction"),
        ("random-inpainting", {"keep": "a"}, "keep must be a fraction"),
        ("inpainting", {"mask_size": 2.5}, "mask_size must be a positive number"),
        ("inpainting", {"mask_size": None}, "mask_size must be a positive number"),
        ("random-inpainting", {"keep": 1e-4}, "keeps no pixel"),
        ("deblurring", {"kernel_size": 4}, "kernel_size must be a positive odd number"),
        ("deblurring", {"kernel_size": 9}, "kernel of 9x9 is larger than the image of 8x10"),
        ("deblurring", {"kernel_size": 5, "sigma_blur": 0.0}, "sigma_blur must be positive"),
        ("deblurring", {"kernel_size": 5, "boundary": "circualr"}, "unknown boundary .* did you mean circular"),
        ("deblurring", {"kernel": torch.ones(2, 3) / 6}, "odd sides"),
        ("deblurring", {"kernel": torch.ones(3) / 3}, r"kernel must be a matrix \(h, w\)"),
        ("deblurring", {"kernel": torch.full((3, 3), torch.nan)}, "not all zero"),
        ("denoising", {"noise": "sinusiodal"}, "unknown noise 'sinusiodal'; did you mean sinusoidal"),
        ("denoising", {"noise": 0.1}, "noise must be a name .* got 0.1"),
        ("denoising", {"noise": "sinusoidal", "noise_parameters": {"peroid": 8}}, "no parameter 'peroid'"),
        ("denoising", {"noise_parameters": {"period": 8}}, "noise_parameters belong to a noise given by name"),
        ("denoising", {"noise": make_noise("gaussian", (1,)), "sigma": 0.1}, "a noise object has its own level"),
        ("compressed-sensing", {"noise_norm": 0.1, "sigma": 0.1}, "give either noise_norm or sigma"),
        ("compressed-sensing", {"noise_norm": 0.1, "noise": "sinusoidal"}, "noise_norm is the level of white noise"),
        ("compressed-sensing", {"m": 9, "noise_norm": -0.1}, "noise_norm is a standard deviation"),
    ],
)
def test_bad_input_is_named(name: str, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_physics(name, SHAPE, **parameters)


@pytest.mark.parametrize("shape", [(8, 8), (3, 0, 8), (3, 8.0, 8), 64])
def test_a_bad_image_shape_is_named(shape: Any) -> None:
    with pytest.raises(ValueError, match="image_shape must be three positive numbers"):
        make_physics("denoising", shape)


def test_an_own_mask_displaces_the_square() -> None:
    problem = Problem("inpainting", {"mask_size": 5}).replaced(mask="mine.npy")
    assert problem.parameters["mask_size"] is None and problem.label == "inpainting-mask-mine"
    assert Problem(**json.loads(problem.to_json())) == problem
    earlier = Problem("inpainting", {"mask": "mine.npy", "mask_size": 19, "sigma": 0.0})  # as cards before have it
    assert earlier == problem


def test_missing_and_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"mask: no file '.*nothing\.npy'"):
        make_physics("inpainting", SHAPE, mask=tmp_path / "nothing.npy")
    text = tmp_path / "text.npy"
    text.write_text("1 2 3")
    with pytest.raises(ValueError, match=r"kernel: '.*text\.npy' is not a plain \.npy array"):
        make_physics("deblurring", SHAPE, kernel=text)
    objects = tmp_path / "objects.npy"
    np.save(objects, np.array([{}], dtype=object))
    with pytest.raises(ValueError, match=r"is not a plain \.npy array"):
        make_physics("inpainting", SHAPE, mask=objects)


def test_images_that_do_not_fit_the_mask_are_refused() -> None:
    physics = make_physics("inpainting", SHAPE, mask_size=2)
    with pytest.raises(ValueError, match="images of 8x8 do not fit the operator's mask of 8x10"):
        measure(torch.rand(1, 3, 8, 8), physics)
    with pytest.raises(ValueError, match="seeds must hold one number per image: got 1 for 2"):
        measure_each(torch.rand(2, *SHAPE), physics, [0])
