"""Every recipe that ships can be read, built and run."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from flowprox import list_models
from flowprox.cli import main, make_parser
from flowprox.options import NoiseOptions
from flowprox.training.gan import gan_task
from flowprox.training.tasks import denoising_task, likelihood_task, noise_task, reconstruction_task

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
COMMANDS = {"flow": "train-flow", "model": "train-unfolded", "denoiser": "train-denoiser", "gan": "train-gan"}

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated.*:DeprecationWarning")
each_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


def _command(path: Path) -> str:
    (command,) = {COMMANDS[key] for key in yaml.safe_load(path.read_text()) if key in COMMANDS}
    return command


def _without_earlier_runs(path: Path) -> list[str]:
    """Options that put small, untrained parts in the place of those another recipe would have trained."""
    recipe = yaml.safe_load(path.read_text())
    options = []
    for key, flow in (("flow", recipe.get("flow")), ("model.flow", recipe.get("model", {}).get("flow"))):
        if isinstance(flow, str) and flow not in ("compact", "paper", *list_models()):
            small = {"kind": "Glow", "arguments": {"n_levels": 1, "n_steps": 1, "hidden_channels": 8}}
            options.append(f"--{key}={json.dumps(small)}")
    return [*options, "--model.pretrained=null"] if recipe.get("model", {}).get("pretrained") else options


def _options(path: Path) -> Any:
    command = _command(path)
    parser = make_parser()
    words = [command, "--config", str(path), *_without_earlier_runs(path)]
    return parser.instantiate(parser.parse_args(words))[command]


def _noise(path: Path, folder: Path) -> dict[str, Any]:
    """The recipe's noise, if it has one, on digits made for the test."""
    noise = yaml.safe_load(path.read_text()).get("noise", {})
    if "path" in noise.get("parameters", {}):
        noise["parameters"]["path"] = str(folder / "digits.gz")
        (folder / "digits.gz").write_bytes(gzip.compress(struct.pack(">4I", 0x0803, 20, 28, 28) + bytes(20 * 28 * 28)))
    return noise


def test_there_are_recipes() -> None:
    assert RECIPES


@each_recipe
def test_name_is_the_file_and_the_data_stand_beside_the_checkout(path: Path) -> None:
    options = _options(path)
    assert options.name == path.stem
    noise = yaml.safe_load(path.read_text()).get("noise")
    source = noise["parameters"].get("path") if noise else options.data.train
    assert str(source).startswith("../shared/data/") or (noise and source is None)


@each_recipe
def test_model_can_be_built(path: Path, tmp_path: Path) -> None:
    options = _options(path)
    if noise := _noise(path, tmp_path):
        task: Any = noise_task(options.flow, NoiseOptions(**noise))
    elif "flow" in options:
        task = likelihood_task(options.flow, options.data, options.likelihood)
    elif "model" in options:
        task = reconstruction_task(options.model, options.problem, options.data)
    elif "gan" in options:
        task = gan_task(options.gan, options.data)
    else:
        task = denoising_task(options.denoiser, options.data)
    assert sum(parameter.numel() for parameter in task.parameters()) > 0


@each_recipe
def test_misspelt_key_is_refused(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = yaml.safe_load(path.read_text())
    part = "noise" if "noise" in recipe else "data"
    recipe[part]["image_sise"] = 64
    (tmp_path / path.name).write_text(yaml.safe_dump(recipe))
    assert main([_command(path), "--config", str(tmp_path / path.name), "--out", str(tmp_path / "run")]) == 2
    assert f"did you mean {part}.image_size" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@each_recipe
def test_two_steps_in_miniature(path: Path, tmp_path: Path) -> None:
    pictures, out = tmp_path / "pictures", tmp_path / "run"
    pictures.mkdir()
    rng = np.random.default_rng(0)
    noise = _noise(path, tmp_path)
    size = _options(path).data.image_size
    for i in range(4):
        Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(pictures / f"{i}.png")
    source = {"noise": json.dumps(noise)} if noise else {"data.train": pictures, "data.validation": pictures}
    options = {
        **source,
        "training.max_steps": 2,
        "training.max_epochs": "null",
        "training.max_time": "null",
        "training.batch_size": 2,
        "training.n_validation_images": 2,
        "training.accelerator": "cpu",
        "training.devices": 1,
        "training.num_nodes": 1,
        "training.num_threads": 1,
        "training.precision": "32",
        "training.progress": "false",
        "out": out,
    }
    if _command(path) == "train-gan":
        options["gan.projection_steps"] = 1
    words = [f"--{name}={value}" for name, value in options.items()]
    assert main([_command(path), "--config", str(path), *_without_earlier_runs(path), *words]) == 0
    assert (out / "model" / "model.safetensors").is_file()
    assert yaml.safe_load((out / "recipe.yaml").read_text())["name"] == path.stem
