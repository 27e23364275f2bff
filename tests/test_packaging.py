"""What the wheel is to hold and to say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from flowprox import __version__, list_models
from flowprox.cli import main
from flowprox.data import save_image
from flowprox.samples import SAMPLES_FOLDER

ROOT = Path(__file__).parents[1]


def test_the_project_says_what_it_is() -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    content = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project = content["project"]
    assert project["version"] == __version__
    assert f"version: {__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert project["license"] == "MIT AND LicenseRef-flowprox-weights"
    assert all(list(ROOT.glob(pattern)) for pattern in project["license-files"])
    assert (ROOT / "flowprox" / "py.typed").is_file()
    names = {line.split("[")[0].split(">")[0] for line in project["dependencies"]}
    assert {"torch", "torchvision", "filelock"} <= names
    assert content["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"] == {"recipes": "flowprox/recipes"}


def test_the_weights_have_their_terms() -> None:
    terms = (ROOT / "LICENSES" / "LicenseRef-flowprox-weights.txt").read_text(encoding="utf-8")
    assert list_models() and all(name in terms for name in ("CelebA", "BSDS500", "MNIST", "TCGA"))


SMOKE = {
    "evaluate": "--scale smoke --n_pictures 0",
    "train-flow": "--training.max_steps 1 --training.batch_size 2 --training.precision 32 --data.image_size 32",
}
"""Command -> what makes it short; the demo is one of ``.ci/run``."""


def test_every_command_of_the_readme_runs_in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FOLDER").mkdir()
    (tmp_path / "photo.jpg").write_bytes((SAMPLES_FOLDER / "coffee.png").read_bytes())
    for i in range(24):  # some of them validate
        save_image(torch.rand(3, 64, 64), tmp_path / "FOLDER" / f"{i}.png")
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    commands = [
        line.partition(" #")[0] for block in blocks for line in block.splitlines() if line.startswith("flowprox ")
    ]
    names = [command.split()[1] for command in commands]
    assert names == ["reconstruct", "evaluate", "report", "train-flow"]
    for name, command in zip(names, commands, strict=True):
        head, inputs, files = command.partition(" -- ")
        assert main(f"{head} {SMOKE.get(name, '')}{inputs}{files}".split()[1:]) == 0, command
    assert (tmp_path / "clean" / "photo.png").exists() and (tmp_path / "runs" / "pictures" / "report.html").exists()


def test_the_reference_lists_modules_that_there_are() -> None:
    listed = re.findall(r"^   flowprox\.(\w+)$", (ROOT / "docs" / "api" / "index.md").read_text(), flags=re.MULTILINE)
    there = {path.stem for path in (ROOT / "flowprox").iterdir() if path.stem[0] != "_"}
    assert len(listed) > 20 and set(listed) <= there
