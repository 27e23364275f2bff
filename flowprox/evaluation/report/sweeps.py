"""What varies in an evaluation: problems or variants of a method that differ in a number, for curves over it.

Records tell it by themselves: among the parameters of a problem, or the options of a method, those numbers that are not
the same everywhere. Where two vary together (a series with two lists) the first that tells all points apart is the axis;
where they form a grid, each is an axis for every value of the others.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from flowprox.records import Record

__all__ = ["Sweep", "flattened", "method_sweeps", "problem_sweeps", "sweeps_of"]


class Sweep(NamedTuple):
    """Labels in the order of a number; ``name`` says what they have in common."""

    name: str
    key: str
    points: tuple[tuple[float, str], ...]

    @property
    def labels(self) -> list[str]:
        """Those that are compared, in their order."""
        return [label for _, label in self.points]


def flattened(given: Mapping[str, object], prefix: str = "") -> Record:
    """Nested keys as one level, joined by a point.

    Example:
        >>> flattened({"m": 5, "noise": {"sigma": 0.1}})
        {'m': 5, 'noise.sigma': 0.1}
    """
    flat: Record = {}
    for key, value in given.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def sweeps_of(variants: Mapping[str, Record], name: str) -> list[Sweep]:
    """The sweeps among variants of one thing.

    Arguments:
        variants: label -> its values; only those that agree in everything but numbers are compared.
        name: of the thing.

    Example:
        >>> sweeps_of({"a": {"sigma": 0.2, "noise": None}, "b": {"sigma": 0.1, "noise": None}}, "denoising")
        [Sweep(name='denoising', key='sigma', points=((0.1, 'b'), (0.2, 'a')))]
    """
    alike: dict[str, dict[str, dict[str, float]]] = {}
    for label, values in variants.items():
        numbers = {key: float(value) for key, value in values.items() if _is_number(value)}
        others = json.dumps({k: v for k, v in values.items() if k not in numbers}, sort_keys=True, default=str)
        alike.setdefault(others + json.dumps(sorted(numbers)), {})[label] = numbers
    return [sweep for group in alike.values() for sweep in _numeric_sweeps(group, name)]


def _numeric_sweeps(group: Mapping[str, Mapping[str, float]], name: str) -> Iterator[Sweep]:
    keys = next(iter(group.values()))
    varying = [key for key in keys if len({values[key] for values in group.values()}) > 1]
    for key in varying:
        if len({values[key] for values in group.values()}) == len(group):
            yield _sweep(group, name, key)
            return
    for key in varying:
        rest: dict[tuple[float, ...], dict[str, Mapping[str, float]]] = {}
        others = [other for other in varying if other != key]
        for label, values in group.items():
            rest.setdefault(tuple(values[other] for other in others), {})[label] = values
        for fixed, members in rest.items():
            if len(members) > 1 and len({values[key] for values in members.values()}) == len(members):
                given = ", ".join(f"{other} {value:g}" for other, value in zip(others, fixed, strict=True))
                yield _sweep(members, f"{name}, {given}", key)


def _sweep(members: Mapping[str, Mapping[str, float]], name: str, key: str) -> Sweep:
    return Sweep(name, key, tuple(sorted((values[key], label) for label, values in members.items())))


def problem_sweeps(records: Sequence[Record]) -> list[Sweep]:
    """Problems of one name that differ in a number."""
    kinds: dict[str, dict[str, Record]] = {}
    for record in records:
        if isinstance(record.get("parameters"), Mapping):
            kind = kinds.setdefault(str(record.get("problem_name", record["problem"])), {})
            kind[str(record["problem"])] = flattened(record["parameters"])
    return [sweep for name, variants in kinds.items() for sweep in sweeps_of(variants, name)]


def method_sweeps(records: Sequence[Record]) -> dict[str, list[Sweep]]:
    """Variants of one method, with the same models, that differ in a number that was not tuned; by problem."""
    kinds: dict[tuple[str, str], dict[str, Record]] = {}
    for record in records:
        name = str(record.get("method_name", record["method"]))
        given = {
            key: value for key, value in (record.get("options") or {}).items() if key not in (record.get("tuned") or {})
        }
        models = {key: str(record[key]) for key in ("flow", "model", "noise") if record.get(key)}
        kinds.setdefault((str(record["problem"]), name), {})[str(record["method"])] = flattened(given) | models
    found: dict[str, list[Sweep]] = {}
    for (problem, name), variants in kinds.items():
        found.setdefault(problem, []).extend(sweeps_of(variants, name))
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
