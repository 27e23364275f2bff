"""An operator of one's own is one entry of ``PROBLEMS``: every command knows it then."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deepinv.physics import LinearPhysics
from rich.console import Console
from torch import Tensor

from flowprox.data import save_image
from flowprox.evaluation.run import evaluate
from flowprox.operators import (
    PROBLEMS,
    Fitted,
    Parameter,
    Problem,
    ProblemKind,
    VariedProblem,
    fit_to_divisor,
    make_physics,
)
from flowprox.options import (
    DataOptions,
    EvaluatedMethod,
    EvaluatedProblem,
    EvaluationOptions,
    ImageOptions,
    ProblemOptions,
    TrainingOptions,
    UnfoldedOptions,
)
from flowprox.reconstruction import ReconstructionJob, reconstruct_files
from flowprox.training import train_unfolded


class Gain(LinearPhysics):
    """A x = gain x, one gain for all images or one each."""

    def __init__(self, gain: float | Tensor, device: Any) -> None:
        super().__init__()
        self.gain = torch.as_tensor(gain, dtype=torch.float32, device=device).reshape(-1, 1, 1, 1)

    def A(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.gain * x

    def A_adjoint(self, y: Tensor, **kwargs: Any) -> Tensor:
        return self.gain * y


def _make_gain(image_shape: tuple[int, int, int], *, seed: int, device: Any, gain: float | Tensor) -> Gain:
    return Gain(gain, device)


def _extend(y: Tensor, physics: LinearPhysics, divisor: int) -> Fitted:
    fitted = fit_to_divisor(y, make_physics("denoising", (3, 8, 8)), divisor)
    return fitted._replace(physics=physics)


@pytest.fixture(autouse=True)
def _gain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of what a new operator takes."""
    parameters = {
        "gain": Parameter(2.0, "factor of every pixel"),
        "sigma": Parameter(0.0, "of the noise", "image range"),
    }
    kind = ProblemKind(_make_gain, parameters, "a brighter image", extend=_extend, ranges=("gain",))
    monkeypatch.setitem(PROBLEMS, "gain", kind)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(4):
        save_image(torch.full((3, 8, 8), 0.1 * (i + 1)), folder / f"p{i}.png")
    return folder


def test_it_is_made_by_name_and_drawn_for_every_image() -> None:
    assert Problem("gain", {"gain": 3.0}).label == "gain-gain3"
    x = torch.ones(5, 3, 8, 8)
    assert torch.equal(make_physics("gain", (3, 8, 8), gain=3.0, sigma=0.0).A(x), 3 * x)
    physics = VariedProblem("gain", (3, 8, 8), {"gain": (1.0, 2.0), "sigma": (0.1, 0.2)}).draw(5, torch.Generator())
    gains = physics.A(x)[:, 0, 0, 0]
    assert len(gains.unique()) == 5 and 1 <= gains.min() and gains.max() <= 2
    assert len(physics.noise_model.sigma) == 5  # type: ignore[arg-type]


def test_it_is_reconstructed_evaluated_and_trained_for(pictures: Path, tmp_path: Path) -> None:
    job = ReconstructionJob(problem="gain", method="adjoint", parameters={"gain": 0.5})
    reconstruct_files(job, [pictures], tmp_path / "out")
    x_hat = np.load(tmp_path / "out/p3.npy")
    np.testing.assert_allclose(x_hat, 0.25 * 0.4, atol=1e-6)
    assert (tmp_path / "out/measurements/p3.png").is_file()

    images, methods = ImageOptions(str(pictures), image_size=8), [EvaluatedMethod("adjoint"), EvaluatedMethod("tv")]
    problems = [EvaluatedProblem("gain", series={"gain": [1.0, 2.0]})]
    recipe = EvaluationOptions(images, problems, methods, out=str(tmp_path / "evaluated"))
    records = evaluate(recipe, Console(file=io.StringIO()))
    assert {record["problem"] for record in records} == {"gain-gain1", "gain-gain2"}

    flow = {"kind": "Glow", "arguments": {"n_levels": 1, "n_steps": 1, "hidden_channels": 4}}
    data = DataOptions(str(pictures), str(pictures), image_size=8)
    training = TrainingOptions(batch_size=2, max_steps=2, accelerator="cpu", progress=False)
    problem = ProblemOptions("gain", ranges={"gain": [0.5, 1.0]})
    train_unfolded(UnfoldedOptions(flow=flow, n_folds=1), problem, data, training, str(tmp_path / "trained"))
    odd = tmp_path / "odd.png"
    save_image(torch.rand(3, 7, 8), odd)
    job = ReconstructionJob(str(tmp_path / "trained/model"))
    records = reconstruct_files(job, [odd], tmp_path / "extended")  # the problem is the card's
    assert records[0]["problem"] == "gain-gain2" and records[0]["height"] == 7
