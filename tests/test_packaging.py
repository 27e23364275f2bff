"""What the wheel is to hold and to say."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowprox import __version__, list_models

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
    assert list_models() and all(name in terms for name in ("CelebA", "BSDS500", "MNIST"))
