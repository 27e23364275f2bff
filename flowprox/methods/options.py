"""The options of a method: the arguments of its class, and the fields of the option objects among them."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from flowprox.methods.kinds import METHODS, method_kind
from flowprox.naming import nearest

__all__ = ["GIVEN_APART", "check_options", "method_class", "model_argument", "option_classes", "parameters_of"]

GIVEN_APART = frozenset({"self", "flow", "model", "noise", "generator", "device"})
"""Arguments of a method's class that are no options."""
_OPTIMIZERS = {"lbfgs": "LBFGS", "adam": "Adam"}


def check_options(name: str, options: Iterable[str]) -> None:
    """Raise ``ValueError`` with the nearest names if a method has no such option."""
    known = _option_names(name)
    for option in options:
        if option not in known:
            raise ValueError(f"method {name} has no option {option!r}; {nearest(option, sorted(known))}")


def method_class(name: str) -> Any:
    """The class of a method, imported now."""
    module, _, attribute = METHODS[name].target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def model_argument(name: str) -> str:
    """What the class calls the network it is given."""
    names = parameters_of(method_class(name))
    return next((key for key in ("model", "generator", "denoiser") if key in names), "")


def parameters_of(cls: Any) -> Mapping[str, inspect.Parameter]:
    """The arguments of a class."""
    return inspect.signature(cls.__init__).parameters


def _option_names(name: str) -> set[str]:
    """The arguments of a method's class, and the fields of the option objects among them."""
    if not method_kind(name).target:
        return set()
    cls = method_class(name)
    apart = GIVEN_APART | {model_argument(name)}
    arguments = set(parameters_of(cls)) - apart
    held = [held for argument in arguments for held in option_classes(cls, argument).values()]
    return arguments | {field.name for one in held for field in dataclasses.fields(one)}


def option_classes(cls: Any, argument: str) -> dict[str, Any]:
    """The option objects an argument takes, by the word that picks one; {} for none."""
    if argument == "optimizer":
        solvers = importlib.import_module("flowprox.solvers")
        return {word: getattr(solvers, known) for word, known in _OPTIMIZERS.items()}
    hint = typing.get_type_hints(cls.__init__).get(argument)
    members = (m for m in (hint, *typing.get_args(hint)) if isinstance(m, type) and dataclasses.is_dataclass(m))
    return {member.__name__.lower(): member for member in members}
