"""Every recipe that ships can be read, built and run, and the scripts train what the evaluations name."""

from __future__ import annotations

import functools
import gzip
import itertools
import json
import os
import shlex
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from flowprox import list_models
from flowprox.cli import completed, main, make_parser
from flowprox.methods import METHODS, make_method
from flowprox.training.tasks import gan_task, reconstruction_task

FOLDER = Path(__file__).parents[1] / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
SLICES = subprocess.run(["sh", FOLDER / "gpu" / "train.sh"], capture_output=True, text=True, check=True).stdout.split()
SCRIPTS: dict[str, list[list[str]]] = {  # the arguments of every call
    "ablation": [[]],
    "ablation paper": [["paper"]],
    "bits": [[]],
    "family": [[]],
    "gpu": [[name] for name in SLICES],
    "paper": [[]],
    "wei": [[]],
}
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


@functools.cache
def _options(path: Path) -> Any:
    command, parser = _command(path), make_parser()
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


@pytest.mark.parametrize("path", {(_command(path), "noise" in path.stem): path for path in RECIPES}.values())
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
    size = 32
    for i in range(4):
        Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(pictures / f"{i}.png")
    source = {"noise": json.dumps(noise)}
    if not noise:
        source = {"data.train": pictures, "data.validation": pictures, "data.image_size": size}
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
        assert sum(p.numel() for p in gan_task(_options(path).gan, _options(path).data).parameters()) > 0
        options |= {"gan.projection_steps": 1, "gan.hidden_channels": 8, "gan.discriminator_channels": 8}
    words = [f"--{name}={value}" for name, value in options.items()]
    assert main([_command(path), "--config", str(path), *_without_earlier_runs(path), *words]) == 0
    assert (out / "model" / "model.safetensors").is_file()
    assert yaml.safe_load((out / "recipe.yaml").read_text())["name"] == path.stem


# Scripts that train a series ------------------------------------------------------------------------------------------


def _commands(script: str, folder: Path) -> Iterator[list[str]]:
    """The words of every flowprox command that a script gives."""
    stub, log = folder / "flowprox", folder / "commands"
    stub.write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >> {shlex.quote(str(log))}\n')
    stub.chmod(0o755)
    path = FOLDER / script.split()[0] / "train.sh"
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    for arguments in SCRIPTS[script]:
        subprocess.run(["sh", str(path), *arguments], env=environment, check=True, timeout=60)
    return (shlex.split(line) for line in log.read_text().splitlines())


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_gives_commands_that_can_be_read_and_built(script: str, tmp_path: Path) -> None:
    parser = make_parser()
    used, outs = set(), []
    for words in _commands(script, tmp_path):
        used |= {Path(word) for word in words if word.endswith(".yaml")}
        options = parser.instantiate(parser.parse_args(completed(words)))[words[0]]
        assert options.training.max_steps or options.training.max_epochs or options.training.max_time
        assert options.resume
        outs.append(options.out)
        if words[0] == "train-unfolded":
            small = {"kind": "Glow", "arguments": {"n_levels": 1, "n_steps": 1, "hidden_channels": 8}}
            if options.model.flow and options.model.latent_mean is None:
                options.model.flow = small
            options.model.pretrained = None
            options.model.n_folds = 1 if options.model.adaptation_rank is None else 2
            options.model.prox_arguments = {key: 2 for key in options.model.prox_arguments}
            reconstruction_task(options.model, options.problem, options.data)
    assert len(set(outs)) == len(outs)
    unused = set((FOLDER / script.split()[0]).glob("*.yaml")) - used
    assert {path.name for path in unused} <= {"train-unfolded-ablation.yaml", "train-flow-ablation.yaml"}


def _models(recipe: dict[str, Any]) -> Iterator[str]:
    """The names of models in an evaluation, at every scale and for every problem."""
    scales = [{}, *(scale.get("models", {}) for scale in recipe.get("scales", {}).values())]
    for method, problem in itertools.product(recipe["methods"], recipe["problems"]):
        if method.get("problems") is None or {problem["name"], problem.get("label")} & {*method["problems"]}:
            names = [method[part] for part in ("flow", "model", "noise") if isinstance(method.get(part), str)]
            names = [other.get(name, name) for name in names for other in scales]
            yield from (name.replace("{problem}", problem["name"]) for name in names)


def test_models_that_evaluations_name_are_trained_by_a_recipe(tmp_path: Path) -> None:
    recipes = [yaml.safe_load(path.read_text()) for path in (FOLDER / "evaluate").glob("*.yaml")]
    named = {name for recipe in recipes for name in _models(recipe) if name.startswith("runs/")}
    made = set()
    for i, script in enumerate(SCRIPTS):
        (tmp_path / str(i)).mkdir()
        made |= {f"{words[words.index('--out') + 1]}/model" for words in _commands(script, tmp_path / str(i))}
    assert named and named <= made


def test_later_recipes_override_earlier_ones_and_options_both(tmp_path: Path) -> None:
    recipes = [FOLDER / "ablation" / name for name in ("base.yaml", "folds-4.yaml")]
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(2):
        pixels = np.full((32, 32, 3), 90 * i, np.uint8)
        Image.fromarray(pixels).save(pictures / f"{i}.png")
    words = ["--out", str(tmp_path / "run"), "--config", str(recipes[0]), "--training.max_steps", "1"]
    words += [f"--config={recipes[1]}", f"--data.train={pictures}", f"--data.validation={pictures}"]
    words += ["--training.batch_size=2", "--training.progress=false", "--training.accelerator=cpu", "--name=mine"]
    assert main(["train-unfolded", *words]) == 0
    made = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert (made["name"], made["model"]["n_folds"], made["training"]["max_steps"]) == ("mine", 4, 1)
    assert made["problem"]["parameters"] == {"sigma": 0.2}


@pytest.mark.parametrize("path", sorted((FOLDER / "evaluate").glob("*.yaml")), ids=lambda path: path.stem)
def test_methods_take_every_value_that_a_recipe_tries(path: Path) -> None:
    """At smoke a grid has one value only."""
    recipe = yaml.safe_load(path.read_text())
    problems = {problem["name"] for problem in recipe["problems"]}
    for method in recipe["methods"]:
        name, grids = method["name"], {**method.get("tune", {}), **method.get("series", {})}
        fitting = filter(METHODS[name].applies_to, () if METHODS[name].parts else problems)
        for problem, (option, values) in itertools.product(fitting, grids.items()):
            for value in values:
                make_method(name, problem, **{option: value})
