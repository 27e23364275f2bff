"""Imports run downwards only, and one file imports Lightning."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "flowprox"
LAYERS = [
    {"files", "naming", "metrics", "records"},
    {
        "levels",
        "latent_mean",
        "options",
        "evaluation_options",
        "operators",
        "noise",
        "networks",
        "coupling_nets",
    },
    {"flows"},
    {"prox", "priors", "adaptation"},
    {"unfolded", "solvers", "baselines"},
    {"data", "checkpoints", "samples", "exporting"},
    {"training", "reconstruction", "methods", "evaluation", "studies"},
    {"commands"},
    {"cli"},
]
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def level(name: str) -> int:
    return next((i for i, names in enumerate(LAYERS) if name in names), -1)


def imported_parts(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("flowprox.") and level(name.split(".")[1]) >= 0}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downwards(path: Path) -> None:
    own = part(path)
    assert level(own) >= 0, f"{own} has no place in the order of layers"
    upward = [name for name in imported_parts(path) if name != own and level(name) > level(own)]
    assert upward == []


def test_solvers_and_baselines_do_not_import_one_another() -> None:
    siblings = LAYERS[4]
    for path in FILES:
        if part(path) in siblings:
            assert not (imported_parts(path) & siblings - {part(path)}), path


def test_two_files_import_lightning() -> None:
    users = [path for path in FILES if "lightning" in imported_roots(path)]
    assert users == [PACKAGE / "evaluation" / "devices.py", PACKAGE / "training" / "loop.py"]


def imported_roots(path: Path) -> set[str]:
    roots: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            roots.add(node.module.split(".")[0])
    return roots
