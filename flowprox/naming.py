"""Names: what a misspelt one may have meant, and models that write down their own constructor call.

A model card must say how to rebuild a model without pickle and without importing a name that a stranger wrote. Every class
that derives from ``Specified`` is entered in a registry under its own name and remembers the arguments it was constructed
with; ``spec()`` gives them as plain JSON values, nested models included, and ``build`` accepts registered names only.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import requires
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias

from flowprox.files import first_line

if TYPE_CHECKING:
    import torch

Values: TypeAlias = dict[str, Any]
"""Parameters, options or arguments by name: plain values, as a recipe or a card holds them."""

_REGISTRY: dict[str, type] = {}
_MOST_NAMES = 30  # in one message


def nearest(name: object, known: Iterable[str], prefix: str = "") -> str:
    """What to say of a name that is not known: the names that look like it, or all of them, each behind ``prefix``.

    Example:
        >>> nearest("denoise", ["denoising", "inpainting"])
        'did you mean denoising?'
        >>> nearest("ct", ["denoising", "inpainting"])
        'known: denoising, inpainting'
    """
    names = [str(one) for one in known]
    if near := difflib.get_close_matches(str(name)[:200], names, n=3, cutoff=0.5):
        return f"did you mean {' or '.join(prefix + one for one in near)}?"
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return f"known: {', '.join(prefix + one for one in names[:_MOST_NAMES]) or 'none'}{more}"


def printable(text: str) -> str:
    r"""Text on one line, whose control characters and undecodable bytes are written out: a file's name may hold anything.

    Example:
        >>> printable("a\x1b[31m\nb")
        'a\\x1b[31m b'
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))


def few(names: Sequence[str], n: int = 5) -> str:
    """The first n names and how many more there are."""
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")


def digits(value: float | None, n: int = 2) -> str:
    """A number with n digits behind the point; "-" for None."""
    return "-" if value is None else f"{value:.{n}f}"


def require_choice(name: str, value: object, choices: Iterable[object]) -> None:
    """Raise ``ValueError`` for a value that is none of the choices."""
    known = list(choices)
    if (type(value), value) not in [(type(choice), choice) for choice in known]:  # 1 is not True
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}; got {value!r}")


def require_count(name: str, value: object, least: int = 1) -> None:
    """Raise ``ValueError`` unless it is a whole number of at least so many."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or int(value) < least:
        raise ValueError(f"{name} must be at least {least} and a whole number, got {value!r}")


def require_positive(name: str, value: float, or_zero: bool = False) -> None:
    """Raise ``ValueError`` unless a number is finite and positive, or 0 where that is allowed."""
    if not (0 <= value if or_zero else 0 < value) or math.isinf(value):
        raise ValueError(f"{name} must be finite and {'at least 0' if or_zero else 'positive'}, got {value!r}")


def require_level(name: str, value: object, most: float = 1.0) -> None:
    """Raise ``ValueError`` for a noise level above ``most``, which pictures in [0, 1] do not have."""
    if isinstance(value, int | float) and value > most:
        known = f"{value:g}/255 = {value / 255:.3g}, as {name}={value / 255:.3g}"
        raise ValueError(
            f"{name} is {value:g}, and images lie in [0, 1]; one of 8-bit gray levels is divided by 255: {known}"
        )


def require_package(module: str, package: str, needed_for: str, extra: str | None = None) -> ModuleType:
    """Import ``module``, or raise ``ImportError`` with one line that names the package, and the extra that has it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        wanted = [
            r.partition(";")[0].strip() for r in requires("flowprox") or () if extra and f"extra == '{extra}'" in r
        ]
        install = " ".join(f"'{one}'" for one in wanted) or package  # works in a clone and outside of one
        install += f" (the extra {extra})" if extra else ""
        raise ImportError(f"{needed_for} needs the package {package}: pip install {install}") from error


def require_device(device: str | torch.device) -> torch.device:
    """The device, if it is there; otherwise ``ValueError`` says what to use."""
    import torch

    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device {device!r} is not known: {first_line(error)}; use 'cpu' or 'cuda'") from error
    n = {
        "cpu": lambda: math.inf,
        "cuda": torch.cuda.device_count,
        "mps": lambda: int(torch.backends.mps.is_available()),
    }.get(target.type, lambda: 0)()
    if (target.index or 0) >= n:
        raise ValueError(f"device {str(target)!r} is not available: torch sees {n} such devices here; use 'cpu'")
    return target


class Specified:
    """Mixin that records constructor arguments.

    Example:
        >>> class Scale(Specified):
        ...     def __init__(self, factor: float = 2.0):
        ...         self.factor = factor
        >>> Scale(3.0).spec()
        {'kind': 'Scale', 'arguments': {'factor': 3.0}}
        >>> build({'kind': 'Scale', 'arguments': {'factor': 4.0}}).factor
        4.0
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _REGISTRY[cls.__name__] = cls
        if "__init__" in cls.__dict__:
            type.__setattr__(cls, "__init__", _recording(cls.__init__))

    def __repr__(self) -> str:
        card = self.__dict__.get("card")
        return super().__repr__() if card is None else f"{type(self).__name__}: {card}"

    def _repr_html_(self) -> str | None:
        """The card as a table, where a notebook shows the model."""
        card = self.__dict__.get("card")
        return None if card is None else card.to_html()

    def spec(self) -> dict[str, Any]:
        """The constructor call as JSON values: ``{"kind": class name, "arguments": {...}}``."""
        arguments = self.__dict__.get("_arguments", {})
        return {"kind": type(self).__name__, "arguments": {name: _encode(value) for name, value in arguments.items()}}


def _recording(init: Any) -> Any:
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        if "_arguments" not in self.__dict__:  # the outermost constructor wins over those it calls
            bound = signature.bind(self, *args, **kwargs)
            bound.apply_defaults()  # a card outlives a change of defaults
            arguments = dict(bound.arguments)
            del arguments[next(iter(signature.parameters))]
            for name, parameter in signature.parameters.items():
                if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                    arguments.update(arguments.pop(name, {}))
            # nn.Module.__setattr__ would register modules a second time
            object.__setattr__(self, "_arguments", arguments)
        init(self, *args, **kwargs)

    return wrapper


def _encode(value: Any) -> Any:
    if isinstance(value, Specified):
        return value.spec()
    if isinstance(value, list | tuple):
        items: list[Any] = []
        for i, item in enumerate(value):
            first = next((j for j in range(i) if value[j] is item), i) if isinstance(item, Specified) else i
            items.append(_encode(item) if first == i else {"same_as": first})
        return items
    if isinstance(value, Mapping):
        return {str(key): _encode(item) for key, item in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    raise TypeError(f"cannot write {type(value).__name__} into a model card; pass plain values or flowprox models")


def _decode(value: Any) -> Any:
    if isinstance(value, Mapping):
        if "kind" in value:
            return build(value)
        return {key: _decode(item) for key, item in value.items()}
    if isinstance(value, list):
        items: list[Any] = []
        for item in value:
            same = isinstance(item, Mapping) and set(item) == {"same_as"}
            items.append(items[item["same_as"]] if same else _decode(item))
        return items
    return value


def build(spec: Mapping[str, Any]) -> Any:
    """Construct what ``spec()`` described; ValueError for a kind that is not registered, or arguments that do not fit it."""
    kind = spec.get("kind")
    if not isinstance(kind, str) or kind not in _REGISTRY:
        raise ValueError(f"unknown kind {kind!r} in the model card; known kinds: {', '.join(registered_kinds())}")
    arguments = spec.get("arguments", {})
    try:
        inspect.signature(_REGISTRY[kind]).bind(**arguments)
    except TypeError as error:
        raise ValueError(f"the card's arguments do not fit {kind}: {error}") from error
    return _REGISTRY[kind](**{name: _decode(value) for name, value in arguments.items()})


def registered_kinds() -> list[str]:
    """Names of all classes a card may name."""
    return sorted(_REGISTRY)
