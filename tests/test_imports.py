"""Imports run downwards only, modules have no circles, and one imports Lightning."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from flowprox import MODEL_MODULES
from flowprox.naming import registered_kinds


def _measures() -> ModuleType:
    path = Path(__file__).parent.parent / "tools" / "measures.py"
    spec = importlib.util.spec_from_file_location("measures", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


measures = _measures()
MODULES: dict[str, Path] = {name: path for name, path in measures.modules().items() if name != "flowprox"}

FLOORS = """
files naming metrics records summary
options graphs checkpoints
networks noise operators
flows prox solvers priors
unfolding baselines uncertainty
data samples
training methods estimates evaluation reconstruction demo
restoration
app
commands
cli
__main__
""".split()
"""From the ground up, one floor per part: a part imports only what stands before it."""


def part(module: str) -> str:
    return module.split(".")[1]


def imported_parts(module: str) -> set[str]:
    """Parts that a module imports, inside functions and by name in strings ("module:name") too; not its own."""
    imported = measures.imports(MODULES[module], MODULES)
    return {part(name) for name in imported} - {part(module)}


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_downwards(module: str) -> None:
    assert part(module) in FLOORS, f"{part(module)} has no floor"
    floor = FLOORS.index(part(module))
    assert [name for name in imported_parts(module) if FLOORS.index(name) > floor] == []


def test_modules_have_no_circles() -> None:
    assert measures.module_cycles() == []


def test_every_floor_has_a_part() -> None:
    assert {part(module) for module in MODULES} == set(FLOORS)
    assert len(set(FLOORS)) == len(FLOORS)


def test_networks_and_baselines_do_not_import_one_another() -> None:
    siblings = {"unfolding", "baselines"}
    for module in MODULES:
        if part(module) in siblings:
            assert not imported_parts(module) & siblings, module


def test_the_package_itself_is_imported_for_its_version_and_its_models_only() -> None:
    """It hands on names of all floors: whoever imports one from there may look upwards unseen."""
    for module, path in MODULES.items():
        for node in ast.walk(measures.syntax(path)):
            if isinstance(node, ast.ImportFrom) and node.module == "flowprox":
                names = {alias.name for alias in node.names if f"flowprox.{alias.name}" not in MODULES}
                assert names <= {"__version__", "MODEL_MODULES"}, module


def test_what_a_card_may_name_is_registered_by_the_modules_of_models() -> None:
    """A model is loaded by importing these, by name: they stand above, since models load themselves (``Pretrained``)."""
    for module in MODEL_MODULES:
        importlib.import_module(module)
    kinds = {
        node.name
        for path in MODULES.values()
        for node in ast.walk(measures.syntax(path))
        if isinstance(node, ast.ClassDef) and "Specified" in {getattr(base, "id", "") for base in node.bases}
    }
    assert kinds and kinds <= set(registered_kinds())


def test_one_module_imports_lightning() -> None:
    users = [name for name, path in MODULES.items() if "lightning_fabric" in imported_roots(path)]
    assert users == ["flowprox.training.log", "flowprox.training.loop"]
    assert not [name for name, path in MODULES.items() if "lightning" in imported_roots(path)]


def imported_roots(path: Path) -> set[str]:
    roots: set[str] = set()
    for node in ast.walk(measures.syntax(path)):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            roots.add(node.module.split(".")[0])
    return roots


def test_a_circle_and_an_import_in_a_string_are_seen(tmp_path: Path) -> None:
    package = tmp_path / "house"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "low.py").write_text('KINDS = {"high": "house.high:High"}\n')
    (package / "high.py").write_text("def make():\n    from house import low\n    return low\n")
    known = measures.modules(package)
    assert measures.imports(known["house.low"], known) == {"house.high"}
    assert measures.module_cycles(package) == [["house.high", "house.low"]]
