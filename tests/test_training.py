"""Training: every kind learns, a killed run continues to the bit, steps that are not finite change nothing."""

from __future__ import annotations

import inspect
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from flow_cases import NoHostReads
from helpers import terminated_while_validating
from tensorboard.backend.event_processing import event_accumulator
from torch import Tensor, nn

from flowprox.checkpoints import load_card, load_model, load_training_state, save_training_state
from flowprox.data import save_image
from flowprox.files import sole_writer
from flowprox.flows import Glow, NonFiniteError, RealNVP
from flowprox.graphs import compile_regions
from flowprox.naming import Specified
from flowprox.operators import make_physics, measure
from flowprox.options import (
    DataOptions,
    DenoiserOptions,
    LikelihoodOptions,
    ProblemOptions,
    TrainingOptions,
    TrainingResult,
    UnfoldedOptions,
    parse_duration,
)
from flowprox.prox import FlowProx, UNetProx
from flowprox.training import (
    Callback,
    loop,
    optimizers,
    reporting_to,
    train_denoiser,
    train_flow,
    train_gan,
    train_unfolded,
)
from flowprox.training.building import make_flow
from flowprox.training.loop import _only_run, fit
from flowprox.training.optimizers import make_optimizer
from flowprox.training.tasks import LikelihoodTask, ReconstructionTask, Task, dequantize, reconstruction_task
from flowprox.unfolding import UnfoldedPGD

SIZE = 8
FLOW: dict[str, Any] = {"kind": "Glow", "arguments": {"n_levels": 1, "n_steps": 2, "hidden_channels": 8}}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 40 smooth images."""
    folder = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for i in range(40):
        x = F.interpolate(torch.rand(1, 3, 2, 2, generator=generator), (SIZE, SIZE), mode="bilinear")
        save_image(x[0], folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def flow(images: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a pretrained flow."""
    out = tmp_path_factory.mktemp("flow")
    likelihood = LikelihoodOptions(noise_range=[0.0, 0.2])
    train_flow(FLOW, options(max_steps=40), data(images), likelihood=likelihood, out=str(out))
    return str(out / "model")


def data(images: Path, **changes: Any) -> DataOptions:
    return DataOptions(**{"train": str(images), "validation": str(images), "image_size": SIZE, **changes})


def options(**changes: Any) -> TrainingOptions:
    defaults = {"batch_size": 8, "max_steps": 4, "accelerator": "cpu", "progress": False, "validate_every": 1000}
    return TrainingOptions(**{**defaults, "n_validation_images": 16, **changes})


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_same(a: Any, b: Any, where: str = "state") -> None:
    """Equal to the bit, whatever the nesting."""
    if isinstance(a, Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (u, v) in enumerate(zip(a, b, strict=True)):
            assert_same(u, v, f"{where}[{i}]")
    else:
        assert a == b, where


def assert_same_run(first: Path, second: Path) -> None:
    """The same state to the bit, but for the clock, and the same model."""
    a, b = load_training_state(first / "state.pt"), load_training_state(second / "state.pt")
    for state in (a, b):
        del state["counters"]["elapsed"]
    assert_same(a, b)
    assert_same(load_model(first / "model").state_dict(), load_model(second / "model").state_dict())


# ------------------------------------------------------------------------------------------------------ what is trained


def test_flow_learns(images: Path, tmp_path: Path) -> None:
    likelihood = LikelihoodOptions(bit_depth=5, noise_range=[0.0, 0.1])
    training = options(max_steps=60, learning_rate=1e-2, validate_every=20, ema_decay=0.9)
    result = train_flow(FLOW, training, data(images), likelihood=likelihood, out=str(tmp_path), name="toy")
    figures = [row["validation_bits_per_dimension"] for row in rows(tmp_path) if "validation_bits_per_dimension" in row]
    assert len(figures) == 3 and figures[-1] < figures[0] - 0.05
    assert result.reason == "max_steps" and result.skipped == 0 and result.metrics["bits_per_dimension_clean"] > 0
    card = load_card(tmp_path / "model")
    assert card.name == "toy" and card.training["steps"] == result.best["step"] and card.metrics == result.best
    assert {"loss.png", "samples.png", "recipe.yaml", "state.pt"} <= set(os.listdir(tmp_path))
    average = load_training_state(tmp_path / "state.pt")["average"]
    assert_same(dict(load_model(tmp_path / "model").state_dict()), dict(average))  # the average is what is saved


UNFOLDED: dict[str, dict[str, Any]] = {
    "flow": {"prox": "flow"},
    "flow from random weights": {"prox": "flow", "flow": FLOW, "tied": True},
    "flow, Laplace, HQS": {"prox": "flow", "base": "laplace", "channelwise": True, "iteration": "hqs"},
    "flow with likelihood": {
        "prox": "flow",
        "likelihood_weight": 0.01,
        "latent_weight": 0.1,
        "shrink_last": False,
        "start": "adjoint",
    },
    "flow with a learned operator": {"prox": "flow", "learn_operator": True},
    "flow that is told the level": {"prox": "flow", "channelwise": True, "levels": [0.005, 0.02]},
    "flow that shrinks towards a mean": {
        "prox": "flow",
        "flow": FLOW,
        "latent_mean": {"hidden_channels": [4]},
        "loss": "log-mse",
    },
    "flow with low-rank folds": {"prox": "flow", "flow": FLOW, "adaptation_rank": 2},
    "plug-and-play": {"prox": "plug-and-play"},
    "resnet": {"prox": "resnet", "prox_arguments": {"hidden_channels": 4}},
    "unet": {"prox": "unet", "prox_arguments": {"hidden_channels": 4, "n_scales": 2}},
}


@pytest.mark.parametrize("kind", UNFOLDED)
def test_unfolded_networks_train_and_are_saved(kind: str, images: Path, flow: str, tmp_path: Path) -> None:
    with_flow = UNFOLDED[kind]["prox"] in ("flow", "plug-and-play")
    model = UnfoldedOptions(n_folds=2, **{"flow": flow if with_flow else None, **UNFOLDED[kind]})
    problem = ProblemOptions("deblurring", {"kernel_size": 3, "sigma_blur": 1.0})
    physics = make_physics(problem.name, (3, SIZE, SIZE), **problem.parameters)
    result = train_unfolded(model, problem, data(images), options(max_steps=2), str(tmp_path))
    assert result.steps == 2 and result.skipped == 0 and math.isfinite(result.metrics["psnr"])
    x_hat = load_model(tmp_path / "model")(torch.rand(1, 3, SIZE, SIZE), physics)
    assert x_hat.shape == (1, 3, SIZE, SIZE)
    trained = load_training_state(tmp_path / "state.pt")["model"]
    state = reconstruction_task(model, problem, data(images)).model.state_dict()
    moved = {name for name in state if not torch.equal(trained[name], state[name])}
    assert "log_data_weight" in moved
    assert {name for name in state if name.startswith("latent_mean.means")} <= moved
    if kind == "plug-and-play":
        assert moved == {"log_data_weight", "log_shrinkage"}
    if kind == "flow with a learned operator":
        assert "operator.weight" in moved


def test_unfolded_network_learns_to_denoise(images: Path, flow: str, tmp_path: Path) -> None:
    training = options(max_steps=60, learning_rate=3e-3, scalar_learning_rate=3e-2, validate_every=20)
    result = train_unfolded(
        UnfoldedOptions(flow=flow, n_folds=2), ProblemOptions(), data(images), training, str(tmp_path)
    )
    figures = [row["validation_psnr"] for row in rows(tmp_path) if "validation_psnr" in row]
    assert figures[-1] > figures[0] and figures[-1] > 15.5  # 14.3 is the noisy image
    assert load_card(tmp_path / "model").problem == asdict(ProblemOptions())
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    assert TrainingOptions(**recipe["training"]) == training and recipe["model"]["flow"] == flow
    assert result.best["psnr"] == max(figures)


RANGES = {
    "denoising": {"sigma": [0.0, 0.3]},
    "inpainting": {"mask_size": [2, 4], "keep": [0.3, 0.9]},
}


@pytest.mark.parametrize("name", RANGES)
def test_one_network_learns_many_measurements(name: str, images: Path, flow: str, tmp_path: Path) -> None:
    model = UnfoldedOptions(flow=flow, n_folds=2, channelwise=True, levels=[0.05, 0.3] if name == "denoising" else None)
    problem = ProblemOptions(name, ranges=RANGES[name])
    training = options(max_steps=60, optimizer="muon", learning_rate=3e-3, scalar_learning_rate=3e-2, validate_every=20)
    train_unfolded(model, problem, data(images), training, str(tmp_path))
    figures = [row["validation_psnr"] for row in rows(tmp_path) if "validation_psnr" in row]
    assert figures[-1] > figures[0] + 0.3


class Shift(nn.Module):
    """The measurement plus a learned number per image."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.tensor([0.04, 0.1]))

    def forward(self, y: torch.Tensor, physics: Any) -> torch.Tensor:
        return y + self.shift.view(-1, 1, 1, 1)


def test_a_student_comes_close_to_its_teacher(images: Path, flow: str, tmp_path: Path) -> None:
    model = UnfoldedOptions(flow=flow, n_folds=1, start="adjoint")
    training = options(max_steps=60, learning_rate=3e-3, scalar_learning_rate=3e-2)
    less = replace(training, max_steps=30)
    train_unfolded(model, ProblemOptions(), data(images), less, str(tmp_path / "teacher"))
    taught = replace(model, teacher=str(tmp_path / "teacher" / "model"), teacher_weight=1.0)
    train_unfolded(taught, ProblemOptions(), data(images), training, str(tmp_path / "student"))
    physics = make_physics("denoising", (3, SIZE, SIZE), sigma=0.2)
    x = F.interpolate(torch.rand(4, 3, 2, 2), (SIZE, SIZE), mode="bilinear")
    y = measure(x, physics)
    target = load_model(tmp_path / "teacher" / "model")(y, physics).clamp(0, 1)
    student = load_model(tmp_path / "student" / "model")
    fresh = reconstruction_task(model, ProblemOptions(), data(images)).model
    with torch.no_grad():
        assert (student(y, physics) - target).norm() < 0.8 * (fresh.eval()(y, physics) - target).norm()


def test_a_teacher_takes_the_weighted_place_of_the_image() -> None:
    physics = make_physics("denoising", (3, SIZE, SIZE), sigma=0.0)
    x = torch.rand(2, 3, SIZE, SIZE)
    shifted = Shift()  # by 0.04 and 0.1; clipping shortens the second here and there
    task = ReconstructionTask(Shift(), physics, teacher=Shift(), teacher_weight=1.0)
    clipped = (shifted(x, physics) - shifted(x, physics).clamp(0, 1)).square().mean()
    torch.testing.assert_close(task(x, x, physics), clipped)
    assert len(list(task.parameters())) == 1  # the teacher is not trained
    half = ReconstructionTask(Shift(), physics, teacher=Shift(), teacher_weight=0.5)
    x = 0.2 + 0.5 * x
    torch.testing.assert_close(half(x, x, physics).item(), 0.5 * (0.02**2 + 0.05**2), rtol=1e-4, atol=0)


def _mean_divergence(z: Tensor) -> Tensor:
    m, s = z.mean((0, 2, 3)), z.std((0, 2, 3))
    normal = torch.distributions.Normal
    return torch.distributions.kl_divergence(normal(m, s), normal(0.0, 1.0)).mean()


def test_latents_are_drawn_towards_a_normal_distribution(images: Path, flow: str) -> None:
    model = UnfoldedOptions(flow=flow, n_folds=1, start="adjoint", latent_weight=2.0)
    task = reconstruction_task(model, ProblemOptions(), data(images)).double()
    x, y = torch.rand(2, 4, 3, SIZE, SIZE, dtype=torch.float64)
    plain = ReconstructionTask(task.model, task.physics)(x, y, task.physics)
    z = load_model(flow).double().encode_image(y)  # the start is y, and so is the first data step's result
    torch.testing.assert_close(task(x, y, task.physics) - plain, 2 * _mean_divergence(z))
    mixed = UnfoldedPGD([task.model.proxes[0], UNetProx(3, 4, 2).double()], start="adjoint").double()  # type: ignore[index, union-attr]
    weighted, alone = (ReconstructionTask(mixed, task.physics, latent_weight=w)(x, y, task.physics) for w in (2.0, 0.0))
    torch.testing.assert_close(weighted - alone, 2 * _mean_divergence(mixed.latents(y, task.physics)[0]))
    with pytest.raises(ValueError, match="latent_weight need"):
        ReconstructionTask(UnfoldedPGD([UNetProx(3, 4, 2)], start="adjoint"), task.physics, latent_weight=1.0)


def test_what_cannot_teach_is_refused(images: Path, flow: str) -> None:
    with pytest.raises(ValueError, match=r"teacher .* is a Glow, not an unfolded network"):
        reconstruction_task(UnfoldedOptions(flow=flow, teacher=flow), ProblemOptions(), data(images))


def test_the_logarithm_weighs_images_that_have_gone_astray_by_their_error() -> None:
    physics = make_physics("denoising", (3, SIZE, SIZE), sigma=0.0)
    x = torch.rand(2, 3, SIZE, SIZE)
    model = Shift()
    with torch.no_grad():
        model.shift.copy_(torch.tensor([0.3, 3.0]))  # 10 and -10 dB
    ReconstructionTask(model, physics, loss="log-mse")(x, x, physics).backward()
    assert model.shift.grad is not None
    torch.testing.assert_close(model.shift.grad[1] / model.shift.grad[0], torch.tensor(10.0), rtol=1e-3, atol=0)


def test_the_logarithm_weighs_easy_and_hard_images_alike() -> None:
    physics = make_physics("denoising", (3, SIZE, SIZE), sigma=0.0)
    x = torch.rand(2, 3, SIZE, SIZE)
    relative = {}
    for loss in ("mse", "log-mse"):
        model = Shift()
        value = ReconstructionTask(model, physics, loss=loss)(x, x, physics)
        value.backward()
        assert model.shift.grad is not None
        relative[loss] = (model.shift.grad * model.shift).detach()
    torch.testing.assert_close(relative["mse"][1] / relative["mse"][0], torch.tensor(6.25), rtol=1e-3, atol=0)
    torch.testing.assert_close(relative["log-mse"], torch.ones(2), rtol=0.07, atol=0)
    psnr = -10 * torch.log10(torch.tensor([1.6e-3, 1e-2]))
    torch.testing.assert_close(value.item(), -psnr.mean().item() * math.log(10) / 10, rtol=0.01, atol=0)


def test_a_trained_network_starts_one_for_all_levels(images: Path, flow: str, tmp_path: Path) -> None:
    first = UnfoldedOptions(flow=flow, n_folds=2, channelwise=True)
    train_unfolded(first, ProblemOptions(), data(images), options(max_steps=3), str(tmp_path))
    trained = load_model(tmp_path / "model")
    more = UnfoldedOptions(
        flow=flow, n_folds=2, channelwise=True, levels=[0.1, 0.2], pretrained=str(tmp_path / "model")
    )
    network = reconstruction_task(more, ProblemOptions(), data(images)).model.eval()
    physics, y = make_physics("denoising", (3, SIZE, SIZE), sigma=0.2), torch.rand(2, 3, SIZE, SIZE)
    x_hat = trained(y, physics)
    torch.testing.assert_close(network(y, physics), x_hat)  # at the highest level
    told = replace(more, latent_mean={"hidden_channels": [4]})  # which the other has not; a fresh one predicts 0
    torch.testing.assert_close(
        reconstruction_task(told, ProblemOptions(), data(images)).model.eval()(y, physics), x_hat
    )
    other = UnfoldedOptions(flow=flow, n_folds=3, channelwise=True, pretrained=str(tmp_path / "model"))
    with pytest.raises(ValueError, match="is another network"):
        reconstruction_task(other, ProblemOptions(), data(images))


def test_a_network_for_some_levels_starts_one_for_others(images: Path, tmp_path: Path) -> None:
    first = UnfoldedOptions(flow=FLOW, n_folds=2, channelwise=True, levels=[0.1, 0.3])
    training = options(max_steps=5, scalar_learning_rate=0.1)
    train_unfolded(first, ProblemOptions(ranges={"sigma": [0.0, 0.3]}), data(images), training, str(tmp_path))
    trained = load_model(tmp_path / "model")
    more = replace(first, levels=[0.05, 0.1, 0.2, 0.3], pretrained=str(tmp_path / "model"))
    network = reconstruction_task(more, ProblemOptions(), data(images)).model.eval()
    y = torch.rand(2, 3, SIZE, SIZE)
    for sigma in (0.02, 0.1, 0.15, 0.25, 0.3):  # a knot more changes nothing between its neighbors
        physics = make_physics("denoising", (3, SIZE, SIZE), sigma=sigma)
        torch.testing.assert_close(network(y, physics), trained(y, physics))


def test_a_denoiser_starts_what_deblurs_and_fills_in(images: Path, tmp_path: Path) -> None:
    first = UnfoldedOptions(
        flow=FLOW, n_folds=1, channelwise=True, latent_mean={"hidden_channels": [4]}, start="adjoint"
    )
    train_unfolded(first, ProblemOptions(), data(images), options(max_steps=5), str(tmp_path))
    trained = load_model(tmp_path / "model")
    more = replace(first, pretrained=str(tmp_path / "model"), start=None)
    holes = ProblemOptions(name="inpainting", parameters={"mask_size": 4})
    for changed in (replace(more, iteration="hqs", penalty=0.03), replace(more, step_size=1.0, final_data_step=True)):
        network = reconstruction_task(changed, holes, data(images)).model
        fresh = reconstruction_task(replace(changed, pretrained=None), holes, data(images)).model
        for name, value in network.state_dict().items():
            own = name in ("log_data_weight", "start_image")  # another data step, another start
            assert_same({name: value}, {name: (fresh if own else trained).state_dict()[name]})


def test_a_mean_that_was_not_told_the_level_starts_one_that_is(images: Path, tmp_path: Path) -> None:
    first = UnfoldedOptions(flow=FLOW, n_folds=1, channelwise=True, latent_mean={"hidden_channels": [4]})
    train_unfolded(first, ProblemOptions(), data(images), options(max_steps=3), str(tmp_path))
    trained = load_model(tmp_path / "model")
    more = replace(first, levels=[0.1, 0.2], pretrained=str(tmp_path / "model"))
    network = reconstruction_task(more, ProblemOptions(), data(images)).model.eval()
    physics, y = make_physics("denoising", (3, SIZE, SIZE), sigma=0.2), torch.rand(2, 3, SIZE, SIZE)
    torch.testing.assert_close(network(y, physics), trained(y, physics))
    wider = replace(more, latent_mean={"hidden_channels": [8]})
    with pytest.raises(ValueError, match="is another network"):
        reconstruction_task(wider, ProblemOptions(), data(images))


def test_muon_moves_convolutions_by_matrices_of_full_rank(images: Path, flow: str, tmp_path: Path) -> None:
    before = load_model(flow)
    training = options(max_steps=1, optimizer="muon", learning_rate=1e-2, scalar_learning_rate=0.0, gradient_clip=0.0)
    train_flow(flow, training, data(images), out=str(tmp_path))
    moved = {
        name: (p - q).flatten(1)
        for (name, p), q in zip(load_model(tmp_path / "model").named_parameters(), before.parameters(), strict=True)
        if p.ndim == 4
    }
    assert moved
    for name, step in moved.items():
        singular = torch.linalg.svdvals(step) / (0.2 * max(step.shape) ** 0.5 * 1e-2)
        assert 0.3 < singular.max() < 1.4, name  # Newton and Schulz's iteration is approximate
        assert (singular > 0.3).float().mean() > 0.5, name


def test_pretrained_denoiser_starts_the_folds(images: Path, tmp_path: Path) -> None:
    denoiser = DenoiserOptions(prox="resnet", prox_arguments={"hidden_channels": 4}, noise_range=[0.1, 0.2])
    train_denoiser(denoiser, data(images), options(), str(tmp_path / "denoiser"))
    model = UnfoldedOptions(prox="resnet", pretrained=str(tmp_path / "denoiser" / "model"), n_folds=2)
    task = reconstruction_task(model, ProblemOptions(), data(images))
    pretrained = load_model(tmp_path / "denoiser" / "model").state_dict()
    for k in range(2):
        assert_same(dict(task.model.proxes[k].state_dict()), dict(pretrained))  # type: ignore[operator, index, union-attr]
    with pytest.raises(ValueError, match="not a unet prox"):
        reconstruction_task(UnfoldedOptions(prox="unet", pretrained=model.pretrained), ProblemOptions(), data(images))


def test_without_validation_the_last_model_is_saved(images: Path, tmp_path: Path) -> None:
    sources = sorted(str(path) for path in images.iterdir())
    result = train_flow(FLOW, options(), data(images, train=sources[:20], validation=None), out=str(tmp_path))
    assert result.metrics == {} and (tmp_path / "loss.png").exists()
    assert_same(
        dict(load_model(tmp_path / "model").state_dict()), dict(load_training_state(tmp_path / "state.pt")["model"])
    )


def test_the_penalty_on_weight_normalization_is_the_sum_of_squared_magnitudes() -> None:
    torch.manual_seed(0)
    flow = RealNVP((1, 8, 8), n_levels=1, n_couplings=2, hidden_channels=4, n_blocks=1)
    x = torch.rand(2, 1, 8, 8)
    flow.encode(x)
    plain, penalized = LikelihoodTask(flow)(x), LikelihoodTask(flow, LikelihoodOptions(weight_norm_penalty=0.5))(x)
    magnitudes = [
        conv.weight.flatten(1).norm(dim=1)
        for conv in flow.modules()
        if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3)
    ]
    torch.testing.assert_close(penalized - plain, 0.5 * torch.cat(magnitudes).square().sum())
    with pytest.raises(ValueError, match="weight_norm_penalty is for flows with weight-normalized"):
        LikelihoodTask(Glow((1, 8, 8), n_levels=1), LikelihoodOptions(weight_norm_penalty=0.5))


def test_dequantize_keeps_the_level() -> None:
    x = torch.arange(256) / 255
    assert torch.equal((dequantize(x, 8) * 256).floor(), torch.arange(256.0))
    assert torch.equal((dequantize(x, 5) * 32).floor(), (torch.arange(256) // 8).float())


# ----------------------------------------------------------------------------------------------------------- resumption

KILLED = """
import os, signal, sys, yaml
from flowprox.options import DataOptions, LikelihoodOptions, TrainingOptions
from flowprox.training import Callback, reporting_to, train_flow

class Kill(Callback):
    def on_step(self, step, loss, model):
        if step == 9:
            os.kill(os.getpid(), signal.SIGKILL)

recipe = yaml.safe_load(sys.argv[1])
parts = {"data": DataOptions, "training": TrainingOptions, "likelihood": LikelihoodOptions}
options = {name: parts[name](**value) if name in parts else value for name, value in recipe.items()}
with reporting_to(Kill()):
    train_flow(**options)
"""


def test_killed_run_continues_to_the_bit(images: Path, tmp_path: Path) -> None:
    """Killed in step 9, of which the log and the state know nothing."""
    training = options(
        max_steps=24,
        validate_every=7,
        n_validation_images=8,
        ema_decay=0.95,
        checkpoint_every=0.0,
        num_threads=1,
        warmup_steps=5,
        patience=10**6,
    )
    likelihood = LikelihoodOptions(noise_range=[0.0, 0.1])
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    recipe = {"flow": FLOW, "data": asdict(data(images)), "training": asdict(training), "out": str(killed)}
    recipe["likelihood"] = asdict(likelihood)
    process = subprocess.run([sys.executable, "-c", KILLED, yaml.safe_dump(recipe)], timeout=240)
    assert process.returncode == -signal.SIGKILL and (killed / "model").exists()
    state = load_training_state(killed / "state.pt")
    assert state["counters"]["step"] == 8
    flags = [value for name, value in state["model"].items() if name.endswith("initialized")]
    assert flags and all(flags)
    leftovers = [killed / ".state.pt.0123456789ab.tmp", killed / "model" / ".card.json.0123456789ab.tmp"]
    for path in leftovers:
        path.write_bytes(b"half a file")

    result = train_flow(FLOW, training, data(images), likelihood=likelihood, out=str(killed), resume=True)
    assert result.steps == 24 and not any(path.exists() for path in leftovers)
    train_flow(FLOW, training, data(images), likelihood=likelihood, out=str(whole))
    assert_same_run(whole, killed)
    assert without_clock(rows(killed)) == without_clock(rows(whole))


def without_clock(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The log without what no two runs share."""
    return [{k: v for k, v in row.items() if k not in ("elapsed", "images_per_second")} for row in rows]


@pytest.mark.parametrize("kind", ["flow", "unet"])
def test_terminated_run_writes_its_state_and_continues(kind: str, images: Path, flow: str, tmp_path: Path) -> None:
    settings = UNFOLDED[kind] | {"n_folds": 2, "flow": flow if kind == "flow" else None}
    training = options(max_steps=9, validate_every=3, ema_decay=0.5)
    job = partial(reconstruction_task, UnfoldedOptions(**settings), ProblemOptions(), data(images))
    fit(job, data(images), training, tmp_path / "whole")

    terminated = partial(terminated_while_validating, job)
    result = fit(terminated, data(images), training, tmp_path / "stopped")
    assert result.reason == "signal" and result.steps == 3
    result = fit(job, data(images), training, tmp_path / "stopped", resume=True)
    assert result.reason == "max_steps"
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


@pytest.fixture(scope="module")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What made a run, which stands in ``out``."""
    arguments: dict[str, Any] = {
        "model": UnfoldedOptions(flow=FLOW, n_folds=1),
        "problem": ProblemOptions(parameters={"sigma": 0.1}),
        "data": data(images, validation=None),
        "training": options(max_steps=1),
        "out": str(tmp_path_factory.mktemp("run")),
    }
    train_unfolded(**arguments)
    return arguments


OTHER_RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "problem.parameters": ("problem", {"parameters": {"sigma": 0.5}}),
    "problem.name": ("problem", {"name": "inpainting"}),
    "problem.ranges": ("problem", {"ranges": {"sigma": [0.0, 0.1]}}),
    "problem.seed": ("problem", {"seed": 1}),
    "model.loss": ("model", {"loss": "log-mse"}),
    "model.iteration": ("model", {"iteration": "hqs"}),
    "model.n_folds": ("model", {"n_folds": 2}),
    "model.flow": ("model", {"flow": "compact"}),
    "model.base": ("model", {"base": "laplace"}),
    "model.likelihood_weight": ("model", {"likelihood_weight": 0.1}),
    "data.image_size": ("data", {"image_size": 4}),
    "data.channels": ("data", {"channels": 1}),
    "data.limit": ("data", {"limit": 10}),
    "training.seed 0, not 1": ("training", {"seed": 1}),
    "training.batch_size": ("training", {"batch_size": 4}),
    "training.optimizer": ("training", {"optimizer": "muon"}),
    "training images": ("data", {"train": "other images"}),
}


@pytest.mark.parametrize("name", OTHER_RUNS)
def test_another_run_is_not_continued(name: str, run: dict[str, Any], images: Path, tmp_path: Path) -> None:
    part, changes = OTHER_RUNS[name]
    if "train" in changes:
        save_image(torch.rand(3, SIZE, SIZE), tmp_path / "a.png")
        changes = {"train": [str(images), str(tmp_path / "a.png")], "validation": str(images)}
    state = (Path(run["out"]) / "state.pt").read_bytes()
    with pytest.raises(ValueError, match=f"was made with .*{name}"):
        train_unfolded(**{**run, part: replace(run[part], **changes)}, resume=True)
    assert (Path(run["out"]) / "state.pt").read_bytes() == state


def test_a_run_of_another_kind_is_not_continued(run: dict[str, Any], images: Path) -> None:
    with pytest.raises(ValueError, match="was made with recipe"):
        train_flow(FLOW, run["training"], run["data"], out=run["out"], resume=True)
    with pytest.raises(FileExistsError, match="already holds a run"):
        train_unfolded(**run)


def test_limits_rates_and_places_may_change(run: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(run["out"], tmp_path / "run")
    shutil.copytree(run["data"].train, tmp_path / "moved")
    changes = {"max_steps": 3, "validate_every": 2, "num_threads": 1, "learning_rate": 1e-4, "weight_decay": 0.5}
    changed = {
        "training": replace(run["training"], **changes),
        "data": replace(run["data"], train=str(tmp_path / "moved")),
    }
    result = train_unfolded(**{**run, **changed, "out": str(tmp_path / "run")}, resume=True)
    assert result.steps == 3
    groups = load_training_state(tmp_path / "run" / "state.pt")["optimizer"]["param_groups"]
    assert {group["name"]: group["weight_decay"] for group in groups} == {"networks": 0.5, "start": 0.0, "scalars": 0.0}


def _damaged(state: dict[str, Any], path: str, value: Any) -> None:
    """Put a value in a place of a state, or apply a function to what is there; None removes it."""
    *parents, last = path.split("/")
    for name in parents:
        state = state[int(name) if name.isdigit() else name]
    key: Any = int(last) if last.isdigit() else last
    if value is None:
        del state[key]
    else:
        state[key] = value(state[key]) if callable(value) else value


DAMAGE: dict[str, tuple[str, Any]] = {
    "no model": ("model", None),
    "a weight is missing": ("model/scale", None),
    "a weight too many": ("model/other", torch.zeros(2)),
    "a weight of another shape": ("model/scale", torch.zeros(2)),
    "a weight of another type": ("model/scale", torch.zeros((), dtype=torch.float64)),
    "a weight that is text": ("model/scale", "0.5"),
    "a weight that is NaN": ("model/scale", torch.tensor(math.nan)),
    "a weight without values": ("model/scale", torch.zeros((), device="meta")),
    "no counters": ("counters", None),
    "a negative step": ("counters/step", -3),
    "a step that is text": ("counters/step", "3"),
    "an infinite time": ("counters/elapsed", math.inf),
    "a loss too many": ("counters/losses", [0.0, 0.0, 0.0]),
    "a best figure that is text": ("counters/best", {"psnr": "high"}),
    "no optimizer": ("optimizer", []),
    "no groups": ("optimizer/param_groups", None),
    "groups that are text": ("optimizer/param_groups", ["a"]),
    "no moments": ("optimizer/state", None),
    "a moment of another shape": ("optimizer/state/0/exp_avg", torch.zeros(10**6)),
    "a moment too short": ("optimizer/state/0/exp_avg_sq", torch.zeros(0)),
    "a moment of another type": ("optimizer/state/0/exp_avg", torch.zeros((), dtype=torch.int64)),
    "a moment is missing": ("optimizer/state/0/exp_avg_sq", None),
    "a moment that is NaN": ("optimizer/state/0/exp_avg", torch.tensor(math.nan)),
    "no number of steps": ("optimizer/state/0/step", "two"),
    "moments that are text": ("optimizer/state/0", "moments"),
    "another optimizer's moments": ("optimizer/state/0", {"momentum_buffer": torch.zeros(())}),
    "a group of tensors": ("optimizer/param_groups/0/params", [torch.zeros(0)]),
    "other groups": ("optimizer/param_groups/0/params", [0, 1]),
    "no weights to go back to": ("kept/model", None),
    "an average of another model": ("average", {"scale": torch.zeros(3)}),
    "no identity": ("identity", 3),
}


@pytest.fixture(scope="module")
def scripted_run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scripted")
    fit(partial(_Scripted, {}), data(images), options(max_steps=2), out)
    return out


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_state_is_refused_before_it_is_loaded(
    case: str, scripted_run: Path, images: Path, tmp_path: Path
) -> None:
    state = load_training_state(scripted_run / "state.pt")
    _damaged(state, *DAMAGE[case])
    save_training_state(tmp_path / "state.pt", state)
    with pytest.raises(ValueError) as caught:
        fit(partial(_Scripted, {}), data(images), options(max_steps=4), tmp_path, resume=True)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    assert "choose another out" in str(caught.value) or "start another run" in str(caught.value)


def test_a_file_cut_short_is_refused(scripted_run: Path, images: Path, tmp_path: Path) -> None:
    (tmp_path / "state.pt").write_bytes((scripted_run / "state.pt").read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a whole training state"):
        fit(partial(_Scripted, {}), data(images), options(max_steps=4), tmp_path, resume=True)


def test_weights_that_are_not_finite_are_refused(images: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"scale of the model is not finite before the first step"):
        fit(_NotANumber, data(images), options(), tmp_path / "run")


@pytest.mark.parametrize("source", ["", "*.png", "**/*.png"])
def test_a_run_among_its_images_is_refused(source: str, images: Path, tmp_path: Path) -> None:
    shutil.copytree(images, tmp_path / "images")
    for out, is_apart in (
        (tmp_path / "images", False),
        (tmp_path / "images/run", source == "*.png"),
        (tmp_path / "run", True),
    ):
        run = partial(fit, partial(_Scripted, {}), data(images, train=str(tmp_path / "images" / source)))
        if is_apart:
            run(options(max_steps=1), out)
        else:
            with pytest.raises(ValueError, match="lies among the images"):
                run(options(max_steps=1), out)


# ------------------------------------------------------------------------------------------------------ limits, options


class _Line(Specified, nn.Module):
    """x -> a x, with a batch normalization whose statistics are to survive."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.norm = nn.BatchNorm2d(3, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x + 0 * self.norm(x)


class _Scripted(Task):
    """Fits a line; the loss of chosen steps is NaN or raises, the validation figures are given."""

    def __init__(self, bad: dict[int, str], figures: list[float] | None = None, only_rank: int = 0) -> None:
        super().__init__(_Line())
        self.bad, self.given, self.step, self.only_rank = bad, list(figures or []), -1, only_rank

    def batch(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        self.step += 1
        return (x,)

    def forward(self, *inputs: Tensor) -> Tensor:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        how = self.bad.get(self.step) if rank == self.only_rank else None
        if how == "raise":
            raise NonFiniteError("Glow gave a non-finite value")
        x = inputs[0] * (math.nan if how == "NaN" else 1.0)
        if how == "memory":
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            )
        return F.mse_loss(self.model(x), inputs[0])

    def evaluate(self, model: nn.Module, x: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        return {"psnr": torch.full((len(x),), self.given.pop(0) if self.given else 0.0)}

    def pictures(self, model: nn.Module, x: Tensor, generator: torch.Generator) -> list[Tensor]:
        return [x]


class _NotANumber(_Scripted):
    def __init__(self) -> None:
        super().__init__({})
        self.model.scale.data.fill_(math.nan)  # type: ignore[union-attr, operator]


@pytest.mark.parametrize("on_cpu", [True, False])
def test_steps_that_are_not_finite_change_nothing(
    on_cpu: bool, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizers, "on_cpu", lambda _: on_cpu)
    result = fit(partial(_Scripted, {3: "NaN", 4: "raise", 6: "NaN"}), data(images), options(max_steps=8), tmp_path)
    assert result.steps == 8 and result.skipped == 3
    state = load_training_state(tmp_path / "state.pt")
    assert state["optimizer"]["state"][0]["step"] == 5
    assert all(bool(value.isfinite().all()) for value in state["model"].values())
    assert state["model"]["norm.num_batches_tracked"] == 5
    with pytest.raises(NonFiniteError, match="20 steps in a row"):
        bad = dict.fromkeys(range(2, 100), "raise")
        fit(partial(_Scripted, bad), data(images), options(max_steps=100), tmp_path / "hopeless")


def test_a_run_that_lost_its_way_goes_back_to_its_best_weights(images: Path, tmp_path: Path) -> None:
    """Validated best at step 4; steps 8 to 27 fail, whereupon the run goes on from there with half the rate."""
    figures = [1.0, 3.0, 2.0] + [0.0] * 20
    bad = dict.fromkeys(range(8, 28), "NaN")
    training = options(max_steps=28, validate_every=2, schedule="constant")
    result = fit(partial(_Scripted, bad, figures), data(images), training, tmp_path / "run")
    assert result.steps == 28 and result.skipped == 20
    state = load_training_state(tmp_path / "run/state.pt")
    best = fit(
        partial(_Scripted, {}, [1.0, 3.0]), data(images), options(max_steps=4, schedule="constant"), tmp_path / "b"
    )
    expected = load_training_state(tmp_path / "b/state.pt")["model"]
    assert best.steps == 4 and state["counters"]["rollbacks"] == 1
    assert all(torch.equal(state["model"][name], value) for name, value in expected.items())
    assert state["optimizer"]["state"] == {}
    training = options(max_steps=40, validate_every=2, schedule="constant", n_rollbacks=0)
    with pytest.raises(NonFiniteError, match="20 steps in a row"):
        fit(partial(_Scripted, bad, figures), data(images), training, tmp_path / "none")


class _ScriptedDecibels(_Scripted):
    lost = 1.0


@pytest.mark.parametrize(("figure", "is_lost"), [(2.1, False), (1.9, True), (math.nan, True)])
def test_a_validation_far_below_the_best_sends_a_run_back(
    figure: float, is_lost: bool, images: Path, tmp_path: Path
) -> None:
    """The best one, 3.0, is at step 4."""
    training = options(max_steps=6, validate_every=2, schedule="constant")
    fit(partial(_ScriptedDecibels, {}, [1.0, 3.0, figure]), data(images), training, tmp_path / "run")
    fit(partial(_Scripted, {}), data(images), options(max_steps=4, schedule="constant"), tmp_path / "to the best")
    state, best = (load_training_state(tmp_path / name / "state.pt") for name in ("run", "to the best"))
    assert state["counters"]["rollbacks"] == is_lost
    same = all(torch.equal(state["model"][name], value) for name, value in best["model"].items())
    assert same == is_lost
    assert bool(state["optimizer"]["state"]) != is_lost


def test_early_stopping_keeps_the_best(images: Path, tmp_path: Path) -> None:
    figures = [1.0, 3.0, 2.0, math.nan, 2.5, 9.0]
    training = options(max_steps=100, validate_every=2, patience=3)
    result = fit(partial(_Scripted, {}, figures), data(images), training, tmp_path)
    assert result.reason == "patience" and result.steps == 10 and result.best == {"psnr": 3.0, "step": 4}
    assert load_card(tmp_path / "model").training["steps"] == 4


def test_time_and_epochs_limit_a_run(images: Path, tmp_path: Path) -> None:
    training = options(max_steps=None, max_time=0.5, schedule="one-cycle")
    result = fit(partial(_Scripted, {}), data(images), training, tmp_path / "time")
    assert result.reason == "max_time" and result.steps >= 1 and 0.5 <= result.elapsed < 5
    again = fit(partial(_Scripted, {}), data(images), training, tmp_path / "time", resume=True)
    assert again.steps == result.steps  # the time is summed over resumptions
    result = fit(partial(_Scripted, {}), data(images), options(max_steps=None, max_epochs=2), tmp_path / "epochs")
    assert result.reason == "max_epochs" and result.steps == 10


def test_a_folder_is_trained_in_by_one_run_at_a_time(images: Path, tmp_path: Path) -> None:
    with sole_writer(tmp_path), pytest.raises(ValueError, match="another process is writing to"):
        fit(partial(_Scripted, {}), data(images), options(max_steps=1), tmp_path)
    fit(partial(_Scripted, {}), data(images), options(max_steps=1), tmp_path)


class _Rank:
    """What a process knows of its run: its rank, and what the first one told it."""

    def __init__(self, is_global_zero: bool, told: str = "") -> None:
        self.is_global_zero, self.told = is_global_zero, told

    def broadcast(self, message: str) -> str:
        return message if self.is_global_zero else self.told


def test_all_processes_of_a_run_share_the_lock_of_the_first(tmp_path: Path) -> None:
    first, second, third = (_Rank(True), _Rank(False), _Rank(False, "another process is writing"))
    with _only_run(first, tmp_path):  # type: ignore[arg-type]
        with _only_run(second, tmp_path):  # type: ignore[arg-type]
            pass
        for rank in (first, third):
            with pytest.raises(ValueError, match="another process"), _only_run(rank, tmp_path):  # type: ignore[arg-type]
                pass


def test_the_gradient_is_clipped(images: Path, tmp_path: Path) -> None:
    for clip in (1e-4, 0.0):
        training = options(max_steps=1, gradient_clip=clip)
        fit(partial(_Scripted, {}), data(images), training, tmp_path / str(clip))
    clipped, free = (
        abs(float(load_training_state(tmp_path / name / "state.pt")["optimizer"]["state"][0]["exp_avg"]))
        for name in ("0.0001", "0.0")
    )
    assert clipped == pytest.approx(1e-5, rel=1e-2) and free > 1e-3


BAD_OPTIONS: dict[str, tuple[type, dict[str, Any], str]] = {
    "no limit": (TrainingOptions, {}, "never end"),
    "negative rate": (TrainingOptions, {"max_steps": 1, "learning_rate": -1.0}, "learning_rate must be positive"),
    "time": (TrainingOptions, {"max_time": "ten minutes"}, "max_time must look like"),
    "decay": (TrainingOptions, {"max_steps": 1, "ema_decay": 1.0}, "ema_decay"),
    "batch not divisible": (TrainingOptions, {"max_steps": 1, "batch_size": 3, "devices": 2}, "batch_size"),
    "bits": (LikelihoodOptions, {"bit_depth": 9}, "bit_depth"),
    "noise": (LikelihoodOptions, {"noise_range": [0.2, 0.1]}, "noise_range"),
    "no flow": (UnfoldedOptions, {}, "needs flow"),
    "teacher's weight": (UnfoldedOptions, {"flow": FLOW, "teacher_weight": 0.0}, "teacher_weight"),
    "likelihood of a U-Net": (UnfoldedOptions, {"prox": "unet", "likelihood_weight": 1.0}, "likelihood_weight"),
    "loss": (UnfoldedOptions, {"flow": "a", "loss": "log_mse"}, "loss must be"),
    "latent mean and likelihood": (
        UnfoldedOptions,
        {"flow": "a", "latent_mean": {"hidden_channels": [4]}, "likelihood_weight": 0.1},
        "likelihood_weight pulls",
    ),
    "latent mean of a U-Net": (
        UnfoldedOptions,
        {"prox": "unet", "latent_mean": {"hidden_channels": [8]}},
        "latent_mean",
    ),
    "pretrained plug-and-play": (
        UnfoldedOptions,
        {"prox": "plug-and-play", "flow": "a", "pretrained": "b"},
        "pretrained",
    ),
    "a range the wrong way": (ProblemOptions, {"ranges": {"sigma": [0.3, 0.0]}}, "ranges.sigma"),
    "channels": (DataOptions, {"train": "a", "channels": 2}, "channels"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_wrong_options_are_refused(case: str) -> None:
    kind, arguments, message = BAD_OPTIONS[case]
    with pytest.raises(ValueError, match=message):
        kind(**arguments)


def test_durations() -> None:
    assert [parse_duration(text) for text in ("1:00:00:01", "00:10:00", "02:30", "7", 7.5)] == [86401, 600, 150, 7, 7.5]


def test_recipe_with_a_misspelt_key_fails(capsys: pytest.CaptureFixture[str]) -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser()
    parser.add_function_arguments(train_unfolded)
    good = {"model": {"flow": "x"}, "problem": {}, "data": {"train": "a"}, "training": {"max_steps": 1}}
    assert parser.parse_object(good).training.max_steps == 1
    with pytest.raises(SystemExit):
        parser.parse_object({**good, "training": {"max_steps": 1, "lerning_rate": 0.1}})
    assert "lerning_rate" in capsys.readouterr().err


MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "adaptation of one fold": ({"n_folds": 1, "adaptation_rank": 2}, "two flows or more"),
    "adaptation of tied folds": ({"tied": True, "adaptation_rank": 2}, "two flows or more"),
    "rank": ({"adaptation_rank": -1}, "at least 1"),
    "start": ({"prox": "unet", "flow": None, "start": "flow"}, "start='adjoint'"),
    "a misspelt key of latent_mean": ({"latent_mean": {"hidden_channels": [4], "widths": [4]}}, "widths"),
    "widths of latent_mean": ({"latent_mean": {"hidden_channels": [4, 4.5]}}, "whole numbers"),
    "levels of latent_mean": ({"latent_mean": {"hidden_channels": [4, 4, 4]}}, "n_levels 3"),
    "latent mean and no last shrinkage": (
        {"latent_mean": {"hidden_channels": [4]}, "shrink_last": False},
        "shrink_last",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_parts_that_do_not_fit_are_refused_before_data_is_read(case: str) -> None:
    options, message = MISFITS[case]
    with pytest.raises(ValueError, match=message):
        reconstruction_task(
            UnfoldedOptions(**{"flow": FLOW, **options}), ProblemOptions(), DataOptions("nowhere", image_size=16)
        )


def test_misfits_name_the_remedy(images: Path, flow: str) -> None:
    with pytest.raises(ValueError, match="divisible by 8"):
        make_flow("compact", data(images, image_size=12))
    with pytest.raises(ValueError, match="deblurring"):
        reconstruction_task(UnfoldedOptions(flow=flow, learn_operator=True), ProblemOptions(), data(images))
    with pytest.raises(ValueError, match="unknown kind"):
        LikelihoodTask(make_flow({"kind": "Glov"}, data(images)))


# ---------------------------------------------------------------------------------------------------- several processes


class _Eventful(ReconstructionTask):
    """Of the second process, step 1 is NaN, step 2 fails and step 3 ends it."""

    n_batches = 0

    def batch(self, x: Tensor, generator: torch.Generator) -> tuple[Any, ...]:
        self.n_batches += 1
        return super().batch(x, generator)

    def forward(self, *inputs: Any) -> Tensor:
        loss = super().forward(*inputs)
        second = torch.distributed.is_initialized() and torch.distributed.get_rank() == 1
        if second and self.n_batches == 2:
            return loss * math.nan
        if second and self.n_batches == 3:
            raise NonFiniteError("a block gave a non-finite value")
        if second and self.n_batches == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss


def _make_eventful(data: DataOptions) -> _Eventful:
    task = reconstruction_task(
        UnfoldedOptions(flow=FLOW, n_folds=2), ProblemOptions("inpainting", {"mask_size": 2}), data
    )
    return _Eventful(task.model, task.physics)


def test_two_processes_have_the_gradient_of_one_skip_together_and_name_the_one_that_is_killed(
    images: Path, tmp_path: Path
) -> None:
    """Adam's first moment after one step is a tenth of the gradient."""
    job, common = (
        partial(_make_eventful, data(images)),
        {"horizontal_flip": False, "gradient_clip": 0.0, "num_threads": 1},
    )
    fit(job, data(images), options(max_steps=1, **common), tmp_path / "one")
    common |= {"validate_every": 1, "checkpoint_every": 0.0, "devices": 2, "strategy": "ddp_spawn"}
    with pytest.raises(ChildProcessError, match=r"process \d of the run in .* has ended .*--resume continues the run"):
        fit(job, data(images), options(max_steps=5, **common), tmp_path / "two")
    one, two = (load_training_state(tmp_path / name / "state.pt") for name in ("one", "two"))
    assert two["counters"]["step"] == 3 and two["counters"]["skipped"] == 2
    assert {float(moments["step"]) for moments in two["optimizer"]["state"].values()} == {1.0}
    for key, moments in one["optimizer"]["state"].items():
        torch.testing.assert_close(two["optimizer"]["state"][key]["exp_avg"], moments["exp_avg"], rtol=1e-4, atol=1e-7)
    assert two["counters"]["figures"]["psnr"] == pytest.approx(one["counters"]["figures"]["psnr"], abs=1e-3)


# ------------------------------------------------------------------------------------------------------ what stands around


class _Witness(Callback):
    """Notes what it is told, and disturbs whatever it may."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []

    def on_step(self, step: int, loss: Tensor, model: nn.Module) -> None:
        self.events.append(("step", step, math.isnan(float(loss))))
        model.eval()
        torch.rand(3)

    def on_validation(self, step: int, metrics: Any, model: nn.Module) -> None:
        self.events.append(("validation", step, sorted(metrics), model.training))

    def on_end(self, result: TrainingResult) -> None:
        self.events.append(("end", result.steps, result.reason))


@pytest.mark.parametrize(
    "train", [train_flow, train_unfolded, train_denoiser, train_gan], ids=lambda train: train.__name__
)
def test_a_run_is_resumed_and_named_by_position(train: Callable[..., object]) -> None:
    parameters = inspect.signature(train).parameters
    assert list(parameters)[-3:] == ["out", "resume", "name"]
    assert all(one.kind is one.POSITIONAL_OR_KEYWORD for one in parameters.values())


def test_callbacks_are_told_and_change_no_bit(images: Path, tmp_path: Path) -> None:
    witness, training = _Witness(), options(max_steps=3, validate_every=2, ema_decay=0.5)
    with reporting_to(witness):
        fit(partial(_Scripted, {1: "NaN"}), data(images), training, tmp_path / "with")
    fit(partial(_Scripted, {1: "NaN"}), data(images), training, tmp_path / "without")
    assert witness.events == [
        ("step", 1, False),
        ("step", 2, True),
        ("validation", 2, ["psnr"], False),
        ("step", 3, False),
        ("validation", 3, ["psnr"], False),
        ("end", 3, "max_steps"),
    ]
    states = [load_training_state(tmp_path / name / "state.pt") for name in ("with", "without")]
    for state in states:
        del state["counters"]["elapsed"]
    assert_same(*states)


class _Client(ModuleType):
    """Stands in for the clients of Weights & Biases and MLflow: notes what it is told."""

    def __init__(self) -> None:
        super().__init__("client")
        self.__spec__ = ModuleSpec("client", None)
        self.calls: list[tuple[str, Any]] = []
        self.Image = lambda pixels: pixels
        self.info = SimpleNamespace(run_id="id")

    def __getattr__(self, name: str) -> Any:
        return lambda *given, **options: self.calls.append((name, given)) or self


def test_loggers_by_name_get_figures_and_samples_and_go_on(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb, mlflow = _Client(), _Client()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    for max_steps in (2, 4):
        training = options(max_steps=max_steps, validate_every=2, loggers=["csv", "tensorboard", "wandb", "mlflow"])
        fit(partial(_Scripted, {}), data(images), training, tmp_path, resume=max_steps == 4)
    rows = (tmp_path / "csv" / "metrics.csv").read_text().splitlines()
    assert "validation_psnr" in rows[0] and len(rows) == 3
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"), {"images": 0}).Reload()
    assert [event.step for event in events.Scalars("validation_psnr")] == [2, 4]
    assert [event.step for event in events.Images("samples")] == [2, 4]
    for client in (wandb, mlflow):
        names = [name for name, _ in client.calls]
        assert {"finish", "set_terminated"} & {*names} and len(names) >= 8
    pictures = [given[0]["samples"] for name, given in wandb.calls if name == "log" and "samples" in given[0]]
    pictures += [given[1] for name, given in mlflow.calls if name == "log_image"]
    assert len(pictures) == 4 and all(picture.dtype == "uint8" and picture.max() > 1 for picture in pictures)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="logger wandb needs the package wandb: pip install wandb"):
        fit(partial(_Scripted, {}), data(images), options(max_steps=1, loggers=["wandb"]), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_memory_that_ends_is_said_in_one_line_and_what_is_finished_stays(images: Path, tmp_path: Path) -> None:
    training = options(max_steps=4, checkpoint_every=0.0, validate_every=2)
    with pytest.raises(MemoryError, match=r"--resume continues from there; train with a batch_size below 8"):
        fit(partial(_Scripted, {3: "memory"}), data(images), training, tmp_path)
    assert (tmp_path / "model").exists() and load_training_state(tmp_path / "state.pt")["counters"]["step"] == 3
    assert fit(partial(_Scripted, {}), data(images), training, tmp_path, resume=True).steps == 4


def test_a_cpu_without_bfloat16_trains_in_float32(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("flowprox.training.loop._computes_in_bfloat16", lambda: False)
    denoiser = DenoiserOptions(prox="resnet", prox_arguments={"hidden_channels": 4})
    for precision in ("32", "bf16"):
        training = options(max_steps=1, precision=precision)
        train_denoiser(denoiser, data(images), training, str(tmp_path / precision))
    assert "training in float32" in capsys.readouterr().out
    one, two = (load_training_state(tmp_path / name / "state.pt")["model"] for name in ("32", "bf16"))
    assert_same(one, two)


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_weights_decay_and_scalars_do_not(optimizer: str, images: Path) -> None:
    model = UnfoldedOptions(flow=FLOW, n_folds=2, channelwise=True)
    task = reconstruction_task(model, ProblemOptions(), data(images))
    groups = task.parameter_groups(options(max_steps=1, learning_rate=0.1, scalar_learning_rate=0.1))
    before = {name: p.detach().clone() for name, p in task.named_parameters()}
    steps = make_optimizer(optimizer, groups, fused=False, weight_decay=0.5)
    for parameter in task.parameters():
        parameter.grad = torch.zeros_like(parameter)  # so that nothing but the decay is left
    steps.step()
    for name, parameter in task.named_parameters():
        scalar = name.endswith(("log_data_weight", "log_shrinkage", "log_weight", "start_image"))
        torch.testing.assert_close(parameter, before[name] * (1.0 if scalar else 1 - 0.1 * 0.5))


def test_no_step_waits_for_the_device_between_two_readings(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batch, forward, backward, clipping, the decision to skip, step and average; ActNorm looks at its flag in the first."""
    take_step = loop._Run._take_step

    def guarded(run: loop._Run) -> Tensor:
        with NoHostReads() if run.counts.step else nullcontext():
            return take_step(run)

    monkeypatch.setattr(loop._Run, "_take_step", guarded)
    monkeypatch.setattr(optimizers, "on_cpu", lambda _: False)
    training = options(gradient_clip=0.1, skip_above=3.0, ema_decay=0.9, warmup_steps=2)
    problem = ProblemOptions("denoising", {"sigma": 0.1})
    train_flow(FLOW, training, data(images), out=str(tmp_path / "flow"))
    out = tmp_path / "unfolded"
    train_unfolded(UnfoldedOptions(flow=FLOW, n_folds=2), problem, data(images), training, out=str(out))
    assert load_card(out / "model").training["steps"] == 4


def test_graphs_are_refused_in_plain_words_where_they_cannot_be_recorded(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training, problem = options(cuda_graph=True, max_steps=2), ProblemOptions("denoising", {"sigma": 0.1})
    train_unfolded(UnfoldedOptions(flow=FLOW, n_folds=1), problem, data(images), training, out=str(tmp_path / "cpu"))
    assert "cuda_graph: trains without, since CUDA graphs are for NVIDIA's GPUs" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_replayed_step_is_the_step(images: Path, tmp_path: Path) -> None:
    problem = ProblemOptions("denoising", {"sigma": 0.1})
    for name, replays in (("plain", False), ("replayed", True)):
        training = options(cuda_graph=replays, accelerator="cuda", max_steps=8)
        train_unfolded(UnfoldedOptions(flow=FLOW, n_folds=2), problem, data(images), training, out=str(tmp_path / name))
    found, expected = (load_training_state(tmp_path / name / "state.pt")["model"] for name in ("replayed", "plain"))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_a_compiled_run_continues_to_the_bit_and_computes_the_same(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = partial(compile_regions, backend="eager")
    monkeypatch.setattr(loop, "compile_regions", backend)
    likelihood = LikelihoodOptions()
    for name, compiles, steps in (("whole", True, (4,)), ("resumed", True, (2, 4)), ("plain", False, (4,))):
        for n in steps:
            training = options(compile=compiles, max_steps=n, schedule="constant", gradient_clip=0.0)
            train_flow(
                FLOW, training, data(images), likelihood=likelihood, out=str(tmp_path / name), resume=n != steps[0]
            )
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")
    found, plain = (load_training_state(tmp_path / name / "state.pt")["model"] for name in ("whole", "plain"))
    torch.testing.assert_close(found, plain, rtol=1e-3, atol=1e-4)


class OneBadBatch(ReconstructionTask):
    """NaN in the measurements of the second step."""

    n_batches = 0

    def batch(self, x: Tensor, generator: torch.Generator) -> tuple[Any, ...]:
        x, y, physics = super().batch(x, generator)
        self.n_batches += 1
        return x, torch.full_like(y, math.nan) if self.n_batches == 2 else y, physics


@pytest.mark.parametrize("backward", ["plain", "inputs", "invert", "fast-inputs"])
def test_nan_in_the_data_skips_the_step_however_gradients_are_computed(
    images: Path, tmp_path: Path, backward: str
) -> None:
    """A reversible flow finds it in its backward pass only; the run goes on all the same."""

    def make_task() -> Task:
        flow = make_flow({**FLOW, "arguments": {**FLOW["arguments"], "backward": backward}}, data(images))
        physics = make_physics("denoising", (3, SIZE, SIZE))
        return OneBadBatch(UnfoldedPGD([FlowProx(flow)]), physics)

    result = fit(make_task, data(images), options(), str(tmp_path / "run"))
    assert (result.steps, result.skipped) == (4, 1)
