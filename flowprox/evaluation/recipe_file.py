"""The recipe of an evaluation beside its records: ``recipe.yaml``, which runs again and holds the published figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jsonargparse import get_loader

from flowprox.evaluation.plan import planned_problems
from flowprox.evaluation_options import EvaluatedProblem, EvaluationOptions
from flowprox.files import atomic_write

__all__ = ["Published", "read_published", "write_recipe"]


class Published(NamedTuple):
    """Published PSNR in dB by label of the problem and of the method, and by label of the problem where it stands."""

    psnr: Mapping[tuple[str, str], float]
    sources: Mapping[str, str]


def write_recipe(recipe: EvaluationOptions, path: Path) -> None:
    """Write a recipe that ``flowprox evaluate --config`` reads; what is empty by default, and is, is left out."""
    with atomic_write(path, "w") as file:
        yaml.safe_dump(_plain(recipe), file, sort_keys=False, allow_unicode=True, width=120)


def _plain(record: Any) -> Any:
    if dataclasses.is_dataclass(record):
        values = {field: getattr(record, field.name) for field in dataclasses.fields(record)}
        return {field.name: _plain(value) for field, value in values.items() if not _is_empty(field, value)}
    if isinstance(record, Mapping):
        return {str(key): _plain(value) for key, value in record.items()}
    return [_plain(value) for value in record] if isinstance(record, list | tuple) else record


def _is_empty(field: dataclasses.Field[Any], value: Any) -> bool:
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return value == default and default in (None, {}, [])


def read_published(path: Path, scales: Collection[str] = ()) -> Published:
    """The published figures that a recipe names for some scales; for all, if none is given.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no recipe of ``flowprox evaluate``.
    """
    try:
        recipe = get_loader("yaml")(path.read_text(encoding="utf-8"))  # as flowprox evaluate reads it: 1e-1 is a number
        known = {field.name for field in dataclasses.fields(EvaluatedProblem)}
        problems = [
            EvaluatedProblem(**{key: value for key, value in problem.items() if key in known})
            for problem in recipe["problems"]
        ]
        used = [p for p in problems if not scales or p.scales is None or set(p.scales) & set(scales)]
        planned = planned_problems(used)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} is no recipe of flowprox evaluate ({reason}); mend it or remove it") from error
    return Published(
        {(problem.label, method): figure for problem in planned for method, figure in problem.published.items()},
        {problem.label: problem.published_in for problem in planned if problem.published_in},
    )
