"""What the commands share: tables, KEY=VALUE words, recipes by name, and the checks that need no torch."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Literal

import yaml

from flowprox.checkpoints import find_model
from flowprox.checkpoints.hub import HUB
from flowprox.naming import nearest, printable

_MAX_BYTES, _MAX_NODES = 1 << 20, 100_000  # of a recipe; those that ship have 8 kB and 800 nodes

Value = bool | int | float | str | list | dict | None


def mean(records: Iterable[Mapping[str, Value]], key: str) -> float | None:
    """Mean of what the records say under a key; None where none says anything."""
    values = [value for record in records if isinstance(value := record.get(key), int | float)]
    return sum(values) / len(values) if values else None


def print_table(head: list[str], rows: Sequence[Sequence[str]], justify: Literal["left", "right"] = "right") -> None:
    """Print a table whose first column stays whole, up to half of the terminal; the others are wrapped to its width."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console, table = Console(), Table(box=SIMPLE_HEAD, pad_edge=False)
    n_most = console.width // 2
    is_long = any(len(printable(row[0])) > n_most for row in rows)  # it would leave no room for the figures
    for i, name in enumerate(head):
        whole, width = i == 0 and not is_long, n_most if i == 0 and is_long else None
        table.add_column(name, justify=justify if i else "left", overflow="fold", no_wrap=whole, max_width=width)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console.print(table)


def key_values(words: Iterable[str] | None, option: str) -> dict[str, Value]:
    """KEY=VALUE words; a value is a number, true, false, null, a list in brackets, or text."""
    values = {}
    for word in words or ():
        key, equals, value = word.partition("=")
        if not (key and equals):
            raise ValueError(f"{option}: {word!r} is not KEY=VALUE; put the inputs before --{option}")
        values[key] = _value(value)
    return values


def _value(text: str) -> Value:
    """``text`` as JSON, or as a number written otherwise (.1, 1., +0.1, 2e3), or as it is."""
    if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text):
        number = float(text)
        return int(number) if number.is_integer() and "." not in text and abs(number) < 2**63 else number
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def check_inputs(paths: Iterable[str]) -> None:
    """Raise ``OSError`` for the first path that is no file and no folder."""
    for path in paths:
        if not os.path.exists(path):
            raise FileNotFoundError(f"{path} does not exist; check the path")
        if not (os.path.isfile(path) or os.path.isdir(path)):
            raise OSError(f"{path} is a device or a pipe; give a file or a folder")


def check_models(*names: str | None) -> None:
    """Raise ``CheckpointError`` for the first name under which there is no model; those of the hub are not asked for."""
    for name in names:
        if name is not None and not name.startswith(HUB):
            find_model(name)


def check_device(device: str) -> None:
    """Raise ``ValueError`` for a word that names no device; whether it is there is known later."""
    if not re.fullmatch(r"(cpu|cuda|mps)(:\d+)?", device):
        raise ValueError(f"device must be cpu, cuda, cuda:N or mps, got {device!r}")


def _recipes_folder() -> Path:
    """In the wheel within the package, in a clone beside it."""
    package = Path(str(resources.files("flowprox")))
    return package / "recipes" if (package / "recipes").is_dir() else package.parent / "recipes"


def list_recipes() -> list[str]:
    """Names of the recipes of the package, such as "glow-faces64" and "evaluate/readme"."""
    folder = _recipes_folder()
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def find_recipe(name: str) -> Path:
    """A recipe by its path, or else by its name, or recipes/NAME.yaml as in a clone; else FileNotFoundError."""
    if os.path.exists(name):
        return Path(name)
    known = list_recipes()
    short = name.removeprefix("recipes/").removesuffix(".yaml")
    if short not in known:
        raise FileNotFoundError(
            f"recipe {name} does not exist, and none of this package is called so; {nearest(short, known)}"
        )
    return _recipes_folder() / f"{short}.yaml"


def check_yaml(path: Path) -> None:
    """Refuse what would take all time or memory to read: a pipe, a huge file, anchors within anchors (ValueError, OSError)."""
    if not path.is_file():
        raise OSError(f"recipe {path} is not a regular file; give a YAML file")
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"recipe {path} has more than {_MAX_BYTES >> 20} MB; it is no recipe")
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        n_nodes = _n_nodes(root, {})
        if not isinstance(root, yaml.MappingNode):
            raise ValueError(
                f"recipe {path} has no keys; it is a YAML file with those of the command, such as name: mine"
            )
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"recipe {path} cannot be read, in parsing: {printable(str(error))}") from error
    if n_nodes > _MAX_NODES:
        raise ValueError(f"recipe {path} refers to itself until it has more than {_MAX_NODES} values; write it out")


def _n_nodes(node: yaml.Node | None, known: dict[int, int]) -> int:
    """How many values a node holds once its references are written out; each node is counted once."""
    if id(node) not in known:
        known[id(node)] = _MAX_NODES + 1  # what an anchor within itself comes to
        children = [*itertools.chain(*node.value)] if isinstance(node, yaml.MappingNode) else getattr(node, "value", "")
        parts = children if isinstance(children, list) else []
        known[id(node)] = 1 + sum(_n_nodes(child, known) for child in parts)
    return known[id(node)]
