"""The size and shape of the package in numbers, one per line, with the bound that each is to keep.

python tools/measures.py            the whole package; exit status 1 if a bound is broken
python tools/measures.py flows      the parts or modules whose names begin so, without bounds
"""

from __future__ import annotations

import ast
import functools
import signal
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "flowprox"
BOUNDS = {
    "lines": 16_500,
    "files": 100,
    "lines of the largest part": 3_000,
    "module cycles": 0,
    "signatures with more than 8 arguments": 3,
    "Any": 150,
    "median lines of a function": 6,
    "public names without a docstring": 0,
}

Function = ast.FunctionDef | ast.AsyncFunctionDef
EXTERNAL = {"forward", "inverse", "backward", "extra_repr", "A", "A_adjoint", "fn", "grad", "prox"}
"""Methods that classes of torch and deepinv document."""


def modules(package: Path = PACKAGE) -> dict[str, Path]:
    """Dotted name of every module -> its file."""
    named = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return named


@functools.cache
def syntax(path: Path) -> ast.Module:
    """The syntax tree of a file, read once."""
    return ast.parse(path.read_text())


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of the package that a file imports, inside functions too, and those that stand in strings "module:name"."""
    found: set[str] = set()
    for node in ast.walk(syntax(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else node.module for name in names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value.partition(":")[0])
    return found & set(known)


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import one another (strongly connected components of two or more)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph[node]:
            if other not in index:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                groups.append(sorted(group))

    for node in graph:
        if node not in index:
            visit(node)
    return groups


def module_cycles(package: Path = PACKAGE) -> list[list[str]]:
    """Cycles among the package's modules; a package's ``__init__`` does not count for importing what lies in it."""
    known = modules(package)
    graph = {}
    for name, path in known.items():
        own = {other for other in known if other == name or other.startswith(name + ".")}
        graph[name] = imports(path, known) - (own if path.name == "__init__.py" else {name})
    return cycles(graph)


def functions(tree: ast.Module) -> Iterator[Function]:
    """Every function and method."""
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def n_arguments(function: Function) -> int:
    """Arguments of a signature, self and cls left out."""
    given = function.args
    names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def body_lines(function: Function) -> int:
    """Lines of a function's body without its docstring."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def contracts(trees: Iterable[ast.Module]) -> dict[str, set[str]]:
    """Class name -> names of the methods that it or a base of it in the package documents."""
    classes = {node.name: node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}

    def documented(name: str) -> set[str]:
        if name not in classes:
            return EXTERNAL
        own = {f.name for f in classes[name].body if isinstance(f, Function) and ast.get_docstring(f)}
        bases = [base.id if isinstance(base, ast.Name) else getattr(base, "attr", "") for base in classes[name].bases]
        return own.union(EXTERNAL, *(documented(base) for base in bases if base != name))

    return {name: documented(name) for name in classes}


def undocumented(tree: ast.Module, where: str, documented: dict[str, set[str]]) -> list[str]:
    """Public classes, functions and methods without a docstring of their own or of the method they override."""
    missing = [] if ast.get_docstring(tree) else [where]
    for node in tree.body:
        if not isinstance(node, (*Function.__args__, ast.ClassDef)) or node.name.startswith("_"):
            continue
        missing += [] if ast.get_docstring(node) else [f"{where}.{node.name}"]
        for inner in node.body if isinstance(node, ast.ClassDef) else []:
            public = isinstance(inner, Function) and not inner.name.startswith("_")
            if public and inner.name not in documented[node.name]:
                missing.append(f"{where}.{node.name}.{inner.name}")
    return missing


def measure(prefix: str = "") -> tuple[dict[str, float], list[str]]:
    """The numbers, and what stands behind those that are easily mended."""
    chosen = {
        name: path for name, path in modules().items() if name.removeprefix("flowprox").strip(".").startswith(prefix)
    }
    trees = {name: syntax(path) for name, path in chosen.items()}
    lines = {name: len(path.read_text().splitlines()) for name, path in chosen.items()}
    parts: dict[str, int] = defaultdict(int)
    for name, n in lines.items():
        parts[name.split(".")[1] if "." in name else name] += n
    largest = max(parts, key=lambda part: parts[part])
    every = [(name, function) for name, tree in trees.items() for function in functions(tree)]
    long = [f"{name}.{f.name} ({n_arguments(f)} arguments)" for name, f in every if n_arguments(f) > 8]
    known = contracts(syntax(path) for path in modules().values())
    bare = [one for name, tree in trees.items() for one in undocumented(tree, name, known)]
    groups = module_cycles()
    anys = sum(isinstance(n, ast.Name) and n.id == "Any" for tree in trees.values() for n in ast.walk(tree))
    numbers = {
        "lines": sum(lines.values()),
        "files": len(chosen),
        "lines of the largest part": parts[largest],
        "module cycles": len(groups),
        "signatures with more than 8 arguments": len(long),
        "Any": anys,
        "median lines of a function": statistics.median(body_lines(f) for _, f in every) if every else 0,
        "public names without a docstring": len(bare),
    }
    remarks = [f"largest part: {largest}", *(f"cycle: {' <-> '.join(group)}" for group in groups), *long, *bare]
    return numbers, remarks


def main() -> int:
    """Print the numbers; 1 if a bound is broken."""
    prefix = sys.argv[1] if len(sys.argv) > 1 else ""
    numbers, remarks = measure(prefix)
    broken = [] if prefix else [name for name, bound in BOUNDS.items() if numbers[name] > bound]
    for name, number in numbers.items():
        print(f"{name:40} {number:>8g}   at most {BOUNDS[name]}{'   BROKEN' if name in broken else ''}")
    print("\n".join(remarks))
    return int(bool(broken))


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):  # head may have seen enough
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main())
