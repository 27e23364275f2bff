"""Noise: a density that integrates to one, samples that belong to it, the same noise for an image everywhere."""

from __future__ import annotations

import gzip
import math
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import deepinv
import pytest
import torch
from helpers import terminated_while_validating

from flowprox.checkpoints import load_card, load_model, load_training_state
from flowprox.cli import main
from flowprox.flows import ActNorm, AffineCoupling, Conv1x1, Flow, Glow, PixelwiseFlow, Sequential
from flowprox.flows.conditioners import CouplingNet
from flowprox.noise import (
    FlowNoise,
    GaussianNoise,
    HeteroscedasticNoise,
    MNISTNoise,
    Noise,
    make_noise,
    noise_level,
    radial_noise,
    sinusoidal_noise,
)
from flowprox.operators import make_physics, measure, measure_each
from flowprox.options import LikelihoodOptions, NoiseOptions, TrainingOptions
from flowprox.training import train_flow
from flowprox.training.loop import fit
from flowprox.training.tasks import noise_task

SHAPE = (3, 8, 12)


def small_flow(shape: tuple[int, int, int] = SHAPE, pixelwise: bool = False) -> Flow:
    """A flow in float64 that is not the identity."""
    glow = Glow(shape, n_levels=1, n_steps=1, hidden_channels=4)
    return _moved(PixelwiseFlow(glow) if pixelwise else glow)


def _moved(flow: Flow) -> Flow:
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return flow.double().eval()


# name: (constructor, shape of one residual)
DENSITIES: dict[str, tuple[Callable[[], Noise], tuple[int, ...]]] = {
    "gaussian": (lambda: GaussianNoise(0.3), SHAPE),
    "gaussian with a mean": (lambda: make_noise("gaussian", (7,), sigma=2.0, mean=0.5), (7,)),
    "one level per entry": (lambda: HeteroscedasticNoise(0.1 + torch.rand(SHAPE), torch.rand(SHAPE)), SHAPE),
    "sinusoidal": (lambda: make_noise("sinusoidal", SHAPE, sigma=0.5), SHAPE),
    "sinusoidal vector with a mean": (lambda: make_noise("sinusoidal", (20,), mean=0.2), (20,)),
    "radial": (lambda: make_noise("radial", SHAPE, sigma=0.5, length=3.0), SHAPE),
    "flow": (lambda: FlowNoise(small_flow(), 0.5), SHAPE),
    "flow with a scale per pixel": (lambda: FlowNoise(small_flow(pixelwise=True)), SHAPE),
}
every_density = pytest.mark.parametrize("name", DENSITIES)


def make(name: str) -> tuple[Noise, tuple[int, ...]]:
    constructor, shape = DENSITIES[name]
    return constructor(), shape


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty digits of 5x4 pixels; all pixels of the k-th one are k + 1."""
    path = tmp_path_factory.mktemp("digits") / "images.gz"
    pixels = b"".join(bytes([k + 1]) * 20 for k in range(20))
    path.write_bytes(gzip.compress(struct.pack(">4I", 0x0803, 20, 5, 4) + pixels))
    return path


# Density --------------------------------------------------------------------------------------------------------------


def two_dimensional_flow() -> Flow:
    layers = [ActNorm(2)]
    for _ in range(2):
        layers += [AffineCoupling(CouplingNet(1, 2, 8)), Conv1x1(2)]
    return _moved(Flow(Sequential(layers), (2, 1, 1)))


PLANAR: dict[str, tuple[Callable[[], Noise], tuple[int, ...]]] = {
    "gaussian": (lambda: GaussianNoise(0.7, mean=0.4), (2,)),
    "one level per entry": (lambda: HeteroscedasticNoise(torch.tensor([0.3, 1.2]), 0.2), (2,)),
    "flow": (lambda: FlowNoise(two_dimensional_flow(), 0.6), (2, 1, 1)),
}


@pytest.mark.parametrize("name", PLANAR)
def test_density_integrates_to_one(name: str) -> None:
    constructor, shape = PLANAR[name]
    side = torch.linspace(-8, 8, 161, dtype=torch.float64)
    points = torch.cartesian_prod(side, side)
    with torch.no_grad():
        density = constructor().log_prob(points.view(-1, *shape)).exp()
    assert float(density.sum() * (side[1] - side[0]) ** 2) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("name", [name for name in DENSITIES if "flow" not in name])
def test_log_prob_is_that_of_independent_normals(name: str) -> None:
    noise, shape = make(name)
    residual = torch.randn(3, *shape, dtype=torch.float64)
    scale = noise.sigma if isinstance(noise, GaussianNoise) else noise.scale  # type: ignore[union-attr]
    normal = torch.distributions.Normal(noise.mean.double(), scale.double())  # type: ignore[union-attr, operator]
    torch.testing.assert_close(noise.log_prob(residual), normal.log_prob(residual).flatten(1).sum(1))


@every_density
def test_log_prob_of_samples_is_the_negative_entropy(name: str) -> None:
    """Of a flow: E log p = E log N(z) + logdet, whose first part is known."""
    noise, shape = make(name)
    n = math.prod(shape)
    with torch.no_grad():
        drawn = noise.sample_like(torch.zeros(200, *shape, dtype=torch.float64), generator())
        reached = noise.log_prob(drawn)
        if isinstance(noise, FlowNoise):
            logdet = noise.flow(drawn / noise.scale)[1] - n * math.log(noise.scale)
            expected = logdet.mean() - n / 2 * math.log(2 * math.pi * math.e)
        else:
            scale = noise.sigma if isinstance(noise, GaussianNoise) else noise.scale
            log_scale = scale.log().expand(shape).sum()  # type: ignore[operator, union-attr]
            expected = -log_scale - n / 2 * math.log(2 * math.pi * math.e)
    assert abs(float(reached.mean() - expected)) < 4 * math.sqrt(n / 2 / 200)


@every_density
def test_gradient_of_the_log_prob(name: str) -> None:
    noise, shape = make(name)
    for parameter in noise.parameters():
        parameter.requires_grad_(False)
    residual = torch.randn(2, *shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(noise.log_prob, residual, fast_mode=True)
    (gradient,) = torch.autograd.grad(noise.log_prob(residual).sum(), residual)
    if isinstance(noise, GaussianNoise):
        torch.testing.assert_close(gradient, (noise.mean - residual.detach()) / noise.sigma.double() ** 2)


@every_density
def test_each_image_has_its_own_log_prob(name: str) -> None:
    noise, shape = make(name)
    residual = torch.randn(3, *shape, dtype=torch.float64)
    alone = torch.cat([noise.log_prob(residual[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(noise.log_prob(residual), alone)


def test_scaled_flow_is_the_density_of_larger_noise() -> None:
    noise, residual = FlowNoise(small_flow()), torch.randn(2, *SHAPE, dtype=torch.float64)
    larger = noise.scaled(3.0)
    torch.testing.assert_close(
        larger.log_prob(3 * residual), noise.log_prob(residual) - residual[0].numel() * math.log(3)
    )
    y = torch.zeros_like(residual)
    torch.testing.assert_close(larger.sample_like(y, generator()), 3 * noise.sample_like(y, generator()))


# Samples --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in DENSITIES if "flow" not in name])
def test_samples_have_the_moments(name: str) -> None:
    noise, shape = make(name)
    drawn = noise.sample_like(torch.zeros(4000, *shape), generator())
    scale = noise.sigma if isinstance(noise, GaussianNoise) else noise.scale
    std, mean = torch.std_mean(drawn, dim=0)
    assert ((std / scale - 1).abs() < 0.06).all()  # type: ignore[operator]
    assert ((mean - noise.mean).abs() / scale < 0.08).all()  # type: ignore[operator]


def test_levels_are_those_of_the_paper() -> None:
    rows = sinusoidal_noise((3, 64, 64)).scale
    assert rows.shape == (64, 1) and rows.max() == 1.0 and rows.argmax() == 4
    torch.testing.assert_close(rows[:48], rows[16:])
    assert float(rows[12] / rows[4]) == pytest.approx(math.exp(-2))
    pixels = radial_noise((3, 64, 64), length=8.0, floor=0.01).scale
    assert pixels[31, 31] == 1.0 and pixels.min() == pixels[63, 63] == pytest.approx(0.01)
    assert float(pixels[31, 39]) == float(pixels[23, 31]) == pytest.approx(math.exp(-1))


@pytest.mark.parametrize("name", [*DENSITIES, "mnist"])
def test_an_image_keeps_its_noise_in_every_batch_and_layout(name: str, digits: Path) -> None:
    noise, shape = (make_noise("mnist", SHAPE, path=str(digits)), SHAPE) if name == "mnist" else make(name)
    y = torch.rand(3, *shape)
    together = noise.sample_like(y, [generator(5), generator(6), generator(7)])
    assert together.shape == y.shape and together.dtype == y.dtype and not together.requires_grad
    alone = torch.cat([noise.sample_like(y[i : i + 1], [generator(5 + i)]) for i in range(3)])
    torch.testing.assert_close(together, alone)
    assert not torch.equal(together[0], together[1])
    if len(shape) == 3:
        last = y.contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(noise.sample_like(last, generator()), noise.sample_like(y, generator()))


@pytest.mark.parametrize("name", [name for name in DENSITIES if DENSITIES[name][1] == SHAPE] + ["mnist"])
def test_every_noise_is_one_of_deepinv_and_of_measure(name: str, digits: Path) -> None:
    noise = make_noise("mnist", SHAPE, path=str(digits)) if name == "mnist" else make(name)[0]
    x = torch.rand(3, *SHAPE)
    physics = deepinv.physics.Denoising(noise)
    assert torch.equal(physics(x, seed=1), physics(x, seed=1))
    torch.manual_seed(3)
    first = physics(x)
    torch.manual_seed(3)
    assert torch.equal(physics(x), first)
    flowprox_physics = make_physics("deblurring", SHAPE, kernel_size=3, sigma_blur=1.0)
    flowprox_physics.set_noise_model(noise)
    flowprox_physics.update(sigma=torch.tensor([0.1, 0.2, 0.3]), filter=None)
    together = measure_each(x, flowprox_physics, [4, 5, 6])
    flowprox_physics.update(sigma=torch.tensor(0.2))
    torch.testing.assert_close(together[1:2], measure_each(x[1:2], flowprox_physics, [5]))
    torch.testing.assert_close(measure(x, flowprox_physics, generator()), measure(x, flowprox_physics, generator()))


def test_the_noise_of_make_physics_has_a_density() -> None:
    physics, x = make_physics("denoising", SHAPE, sigma=0.3), torch.rand(2, *SHAPE)
    assert isinstance(physics.noise_model, GaussianNoise)
    expected = GaussianNoise(0.3).log_prob(x)
    assert torch.equal(physics.noise_model.log_prob(x), expected)
    physics.update(sigma=torch.tensor([0.3, 0.6]))
    assert torch.equal(physics.noise_model.log_prob(x)[0], expected[0])
    assert not torch.equal(physics.noise_model.log_prob(x)[1], expected[1])


# Digits ---------------------------------------------------------------------------------------------------------------


def test_digits_lie_whole_at_random_places_and_colors(digits: Path) -> None:
    noise = MNISTNoise(digits, n_digits=1, sigma=0.0, split="all")
    drawn = noise.sample_like(torch.zeros(200, *SHAPE), generator()) * 255
    seen = set()
    for image in drawn:
        channel, row, column = (int(axis[0]) for axis in torch.nonzero(image, as_tuple=True))
        block = image[channel, row : row + 5, column : column + 4]
        assert block.unique().numel() == 1 and int((image > 0).sum()) == 20
        seen.add((channel, row, column, round(float(block[0, 0]))))
    for axis, n in enumerate((3, 4, 9, 20)):
        assert len({place[axis] for place in seen}) == n


def test_overlapping_digits_add_up_over_white_noise(digits: Path) -> None:
    y = torch.zeros(300, 1, 5, 4)
    drawn = MNISTNoise(digits, n_digits=2, amplitude=2.0, sigma=0.1, split="test").sample_like(y, generator())
    levels = 2 * torch.tensor([10 + 10, 10 + 20, 20 + 20]) / 255  # all digits of the split, in pairs
    nearest = (drawn.mean(dim=(1, 2, 3))[:, None] - levels).abs().amin(dim=1)
    assert float(nearest.max()) < 0.1 and float(drawn.std(dim=(1, 2, 3)).mean()) == pytest.approx(0.1, rel=0.1)


def test_splits_are_disjoint_and_complete(digits: Path) -> None:
    splits = {split: set(MNISTNoise(digits, split=split).digits[:, 0, 0].tolist()) for split in ("train", "validation")}  # type: ignore[arg-type]
    splits["test"] = set(MNISTNoise(digits).digits[:, 0, 0].tolist())
    assert sum(map(len, splits.values())) == 20 and set.union(*splits.values()) == set(range(1, 21))
    assert splits["test"] == {10, 20}


# Flows trained on noise -----------------------------------------------------------------------------------------------

PIXELWISE: dict[str, Any] = {
    "kind": "PixelwiseFlow",
    "arguments": {
        "flow": {
            "kind": "Glow",
            "arguments": {"image_shape": [1, 8, 8], "n_levels": 1, "n_steps": 1, "hidden_channels": 4},
        }
    },
}


def options(**changes: Any) -> TrainingOptions:
    defaults = {"batch_size": 64, "max_steps": 4, "accelerator": "cpu", "progress": False, "validate_every": 1000}
    return TrainingOptions(**{**defaults, **changes})


def test_trained_flow_approaches_the_exact_density(tmp_path: Path) -> None:
    name = "radial"  # its level is another one in every pixel
    noise = NoiseOptions(name, {"sigma": 0.5}, image_size=8, channels=1)
    training = options(max_steps=30, learning_rate=3e-3, validate_every=15, n_validation_images=256)
    result = train_flow(PIXELWISE, training, noise=noise, out=str(tmp_path), name="toy")
    assert result.skipped == 0 and abs(result.metrics["excess_nats"]) < 0.3  # of 64 entries
    model = load_model(tmp_path / "model")
    assert isinstance(model, FlowNoise) and model.image_shape == (1, 8, 8)
    exact = make_noise(name, (1, 8, 8), sigma=0.5)
    n = exact.sample_like(torch.zeros(500, 1, 8, 8), generator())
    with torch.no_grad():
        torch.testing.assert_close(model.log_prob(n), exact.log_prob(n), rtol=0, atol=6.0)
        drawn = model.sample_like(torch.zeros(2000, 1, 8, 8), generator())
    torch.testing.assert_close(drawn.std(dim=0) / exact.scale, torch.ones(1, 8, 8), rtol=0, atol=0.12)  # type: ignore[operator]
    assert main(["sample", "--model", str(tmp_path), "--out", str(tmp_path / "drawn.png"), "-n", "2"]) == 0
    card = load_card(tmp_path / "model")
    assert card.model["kind"] == "FlowNoise" and card.training["recipe"]["noise"]["name"] == name
    assert card.preprocessing["range"] is None and name in card.training["data"]


def test_a_flow_alike_everywhere_cannot_learn_levels_by_row() -> None:
    """Why there is a layer with a scale per pixel."""
    exact = sinusoidal_noise((1, 8, 8), sigma=0.5)
    n = exact.sample_like(torch.zeros(2000, 1, 8, 8), generator())
    alike, pixelwise = (Glow((1, 8, 8), n_levels=1, n_steps=1, hidden_channels=4) for _ in range(2))
    gaps = {}
    for name, flow in {"glow": alike, "with a scale per pixel": PixelwiseFlow(pixelwise)}.items():
        flow.initialize(n)
        with torch.no_grad():
            gaps[name] = float((exact.log_prob(n) - flow.eval().log_prob(n)).mean())
    assert gaps["with a scale per pixel"] < 0.1 < 5 < gaps["glow"]


def test_stopped_run_continues_to_the_bit(digits: Path, tmp_path: Path) -> None:
    noise = NoiseOptions(
        "mnist", {"path": str(digits), "split": "train"}, {"split": "validation"}, image_size=8, channels=1
    )
    glow = PIXELWISE["arguments"]["flow"]
    job = partial(noise_task, glow, noise)
    training = options(max_steps=6, batch_size=4, validate_every=3, n_validation_images=4, ema_decay=0.5)
    fit(job, noise, training, tmp_path / "whole")

    terminated = partial(terminated_while_validating, job)
    assert fit(terminated, noise, training, tmp_path / "stopped").steps == 3
    other = NoiseOptions("mnist", {"path": str(digits), "split": "all"}, image_size=8, channels=1)
    with pytest.raises(ValueError, match="was made with noise"):
        fit(partial(noise_task, glow, other), other, training, tmp_path / "stopped", resume=True)
    assert fit(job, noise, training, tmp_path / "stopped", resume=True).steps == 6
    whole, stopped = (load_training_state(tmp_path / run / "state.pt")["model"] for run in ("whole", "stopped"))
    for name, value in whole.items():
        assert torch.equal(value, stopped[name]), name


def test_training_continues_from_a_noise_flow(tmp_path: Path) -> None:
    noise = NoiseOptions("gaussian", {"sigma": 0.2}, image_size=8, channels=1)
    train_flow(PIXELWISE, options(max_steps=1), noise=noise, out=str(tmp_path / "first"))
    train_flow(str(tmp_path / "first" / "model"), options(max_steps=1), noise=noise, out=str(tmp_path / "second"))
    assert isinstance(load_model(tmp_path / "second").flow, PixelwiseFlow)


# Bad input ------------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "unknown noise": (lambda: make_noise("sinusoid", SHAPE), "did you mean sinusoidal"),
    "unknown parameter": (lambda: make_noise("radial", SHAPE, sigmas=1.0), "radial noise has no parameter 'sigmas'"),
    "negative sigma": (lambda: make_noise("gaussian", SHAPE, sigma=-1.0), "sigma is a standard deviation"),
    "mean of NaN": (lambda: GaussianNoise(0.1, math.nan), "mean must be a finite number"),
    "negative scale": (lambda: HeteroscedasticNoise(torch.tensor([-1.0])), "scale holds standard deviations"),
    "infinite mean": (lambda: HeteroscedasticNoise(torch.ones(2), torch.tensor(math.inf)), "mean must be finite"),
    "no period": (lambda: sinusoidal_noise(SHAPE, period=0.0), "period must be positive"),
    "no shape": (lambda: sinusoidal_noise(()), "shape must hold"),
    "radial vector": (lambda: radial_noise((9,)), r"radial noise is for images"),
    "floor above one": (lambda: radial_noise(SHAPE, floor=2.0), "floor between 0 and 1"),
    "no density": (lambda: GaussianNoise(0.0).log_prob(torch.zeros(1, 3)), "standard deviation of 0 has no density"),
    "wrong size": (lambda: sinusoidal_noise(SHAPE).log_prob(torch.zeros(1, 3, 9, 9)), r"\(8, 1\).*\(3, 9, 9\)"),
    "too few axes": (lambda: sinusoidal_noise(SHAPE).sample_like(torch.zeros(1, 8)), r"\(8, 1\).*\(8,\)"),
    "flow, channels": (
        lambda: FlowNoise(small_flow()).log_prob(torch.zeros(1, 1, 8, 12)),
        r"residual has shape \(1, 1, 8, 12\), but the noise flow was made for \(B, 3, 8, 12\)",
    ),
    "flow, vector": (lambda: FlowNoise(small_flow()).log_prob(torch.zeros(1, 9)), r"residual has shape \(1, 9\)"),
    "flow, odd size": (
        lambda: FlowNoise(small_flow()).sample_like(torch.zeros(1, 3, 7, 8)),
        r"y has shape \(1, 3, 7, 8\)",
    ),
    "flow, other pixels": (
        lambda: FlowNoise(small_flow(pixelwise=True)).log_prob(torch.zeros(1, 3, 8, 8, dtype=torch.float64)),
        r"\(3, 8, 12\).*\(3, 8, 8\)",
    ),
    "flow, scale": (lambda: FlowNoise(small_flow(), 0.0), "scale must be finite and positive"),
    "two sizes": (lambda: PixelwiseFlow(small_flow(), (3, 8, 8)), r"\(3, 8, 8\).*\(3, 8, 12\)"),
    "generators": (lambda: GaussianNoise().sample_like(torch.zeros(2, 3), [generator()]), "got 1 for 2 images"),
    "no digits": (lambda: make_noise("mnist", SHAPE), "needs path"),
    "not a file of digits": (lambda: make_noise("mnist", SHAPE, path=__file__), "no idx file"),
    "data and noise": (lambda: train_flow("compact", options()), "give data"),
    "likelihood of noise": (
        lambda: train_flow(
            "compact", options(), noise=NoiseOptions("gaussian"), likelihood=LikelihoodOptions(bit_depth=5)
        ),
        "likelihood tells how images",
    ),
    "epochs of noise": (
        lambda: fit(lambda: None, NoiseOptions("gaussian"), options(max_epochs=1.0), "no-such-run"),  # type: ignore[arg-type]
        "no epochs",
    ),
    "flow for nothing": (
        lambda: noise_task("compact", NoiseOptions("gaussian", {"sigma": 0})),
        "no density that a flow",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_named(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_digits_have_no_density_and_need_room(digits: Path, tmp_path: Path) -> None:
    noise = MNISTNoise(digits)
    with pytest.raises(ValueError, match="flow trained on it"):
        noise.log_prob(torch.zeros(1, *SHAPE))
    with pytest.raises(ValueError, match="digits of 5x4 need images"):
        noise.sample_like(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="split must be one of"):
        make_noise("mnist", SHAPE, path=str(digits), split="tset")
    with pytest.raises(ValueError, match="n_digits"):
        MNISTNoise(digits, n_digits=0)
    with pytest.raises(FileNotFoundError, match="no file"):
        MNISTNoise(tmp_path / "no.gz")
    (tmp_path / "cut.gz").write_bytes(digits.read_bytes()[:40])
    with pytest.raises(ValueError, match="damaged"):
        MNISTNoise(tmp_path / "cut.gz")


def test_the_level_is_that_of_the_noise_model() -> None:
    physics = make_physics("denoising", (3, 8, 8), sigma=0.1)
    assert noise_level(physics, torch.zeros(3, 3, 8, 8)).tolist() == pytest.approx([0.1] * 3)
    physics.noise_model.update_parameters(sigma=torch.tensor([0.1, 0.2, 0.3]))
    assert noise_level(physics, torch.zeros(3, 3, 8, 8)).tolist() == pytest.approx([0.1, 0.2, 0.3])
    exact = deepinv.physics.Denoising(deepinv.physics.ZeroNoise())
    assert noise_level(exact, torch.zeros(2, 3, 8, 8)).tolist() == [0.0, 0.0]


def test_noise_without_a_level_and_a_wrong_number_of_levels_are_named() -> None:
    poisson = deepinv.physics.Denoising(deepinv.physics.PoissonNoise())
    with pytest.raises(ValueError, match="PoissonNoise"):
        noise_level(poisson, torch.zeros(1, 3, 8, 8))
    physics = make_physics("denoising", (3, 8, 8))
    physics.noise_model.update_parameters(sigma=torch.tensor([0.1, 0.2]))
    with pytest.raises(ValueError, match="2 levels for 3 images"):
        noise_level(physics, torch.zeros(3, 3, 8, 8))
