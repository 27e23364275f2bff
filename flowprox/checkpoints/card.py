"""The card of a model, ``card.json``: what it is, how it was made, how to rebuild it; and the weights that belong to it."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from flowprox.naming import Values

FORMAT_VERSION = 1
CARD = "card.json"
WEIGHTS = "model.safetensors"
PREVIOUS = "model.safetensors.previous"  # exists only while a save is under way, or after one was killed

LICENSE = "research use only; see the terms of the training data"
INTENDED_USE = (
    "Research on image reconstruction. Not for medical diagnosis, identification of persons or any use in which "
    "invented detail can do harm: a learned prior fills in what the measurement does not show."
)

_SHORT_LIST = re.compile(r"\[\n[^\[\]{}\"]{1,200}\n\s*\]")  # of numbers; JSON text has no line breaks inside strings

_MAX_BYTES = 1 << 24  # of a card; those that ship have 5 kB

PICKLE_SUFFIXES = {".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".bin", ".th", ".tar"}


class CheckpointError(ValueError):
    """A model or training state on disk that cannot be used; the message names the file and the remedy."""


@dataclass
class Card:
    """What is known about a saved model, as written to ``card.json``.

    ``save_model`` fills in the fields that it can read from the model: ``model``, ``preprocessing``, ``n_parameters``,
    ``n_bytes``, ``sha256``, ``weights_dtype``, and ``training``'s ``versions``, ``machine`` and ``date`` where absent.

    Arguments:
        name: short name of the model.
        model: the constructor call, ``{"kind": ..., "arguments": {...}}``.
        preprocessing: what the model takes: ``range`` of pixel values, ``channels``, ``image_shape`` (C, H, W) it was
            made for and ``divisor``, a number that must divide H and W.
        problem: name and parameters of the operator an unfolded model was trained for; None for a prior alone.
        training: free-form; usually data, terms (of the data), recipe, images, epochs, seed, machine, versions, date.
        metrics: free-form, e.g. ``{"psnr_db": 25.1, "bits_per_dim": 3.2}``. NaN and infinity are written as text.
        notes: anything else worth keeping.
        license: terms of use of the weights.
        intended_use: what the model is for, and what not.
        n_parameters: number of parameters, shared ones counted once.
        n_bytes: size of the weights file.
        sha256: hash of the weights file.
        weights_dtype: "float32", or "float16" / "bfloat16" where large tensors were rounded to save space; these are
            loaded as float32.
        format_version: version of this layout.
    """

    name: str
    model: Values = field(default_factory=dict)
    preprocessing: Values = field(default_factory=dict)
    problem: Values | None = None
    training: Values = field(default_factory=dict)
    metrics: Values = field(default_factory=dict)
    notes: Values = field(default_factory=dict)
    license: str = LICENSE
    intended_use: str = INTENDED_USE
    n_parameters: int = 0
    n_bytes: int = 0
    sha256: str = ""
    weights_dtype: str = "float32"
    format_version: int = FORMAT_VERSION

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Card:
        """A card of plain values; CheckpointError where a key is missing, unknown, or holds a value of the wrong type."""
        known = {f.name: f for f in dataclasses.fields(cls)}
        values = {"license" if key == "licence" else key: value for key, value in values.items()}  # cards before 0.2
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise CheckpointError(f"unknown key {unknown[0]!r} in the card; put free remarks under 'notes'")
        if "name" not in values:
            raise CheckpointError("the card lacks the key 'name'")
        for key, value in values.items():
            expected = {"str": str, "int": int}.get(str(known[key].type), Mapping)
            if not isinstance(value, expected) and not (key == "problem" and value is None):
                form = {str: "text", int: "a whole number"}.get(expected, "an object")
                raise CheckpointError(f"the card's {key!r} must be {form}, got {type(value).__name__}")
        for (part, key), (form, holds) in _FORMS.items():
            if key in (values.get(part) or {}) and not holds(values[part][key]):
                raise CheckpointError(f"the card's {key!r} of {part!r} must be {form}, got {values[part][key]!r:.60}")
        return cls(**values)

    @property
    def facts(self) -> dict[str, str]:
        """What to know first of a model: its problem, what it takes, its size, its figures."""
        facts = {"name": self.name}
        if self.problem:
            spans = {key: f"{low:g} to {high:g}" for key, (low, high) in self.problem.get("ranges", {}).items()}
            values = {**self.problem.get("parameters", {}), **spans}
            parts = [str(self.problem["name"]), *(f"{key} {value}" for key, value in values.items())]
            facts["problem"] = ", ".join(parts)
        taken = {key: self.preprocessing.get(key) for key in ("channels", "divisor")}
        facts |= {key: str(value) for key, value in taken.items() if value is not None}
        facts["parameters"] = f"{self.n_parameters:,}"
        figures = {key: value for key, value in self.metrics.items() if isinstance(value, float)}
        return facts | {key: f"{value:.4g}" for key, value in figures.items()}

    def __str__(self) -> str:
        return "; ".join(value if key in ("name", "problem") else f"{key} {value}" for key, value in self.facts.items())

    def to_html(self) -> str:
        """The facts and the terms as a table."""
        facts = {**self.facts, "license": self.license}
        rows = (f"<tr><th>{escape(key)}</th><td>{escape(value)}</td></tr>" for key, value in facts.items())
        return f"<table>{''.join(rows)}</table>"

    def to_json(self) -> str:
        """The card as indented JSON."""
        values = {f.name: plain(getattr(self, f.name), f.name) for f in dataclasses.fields(self) if f.name != "model"}
        first = {"format_version": values.pop("format_version"), "name": values.pop("name"), "model": self.model}
        text = json.dumps(first | values, indent=2, ensure_ascii=False)
        return _SHORT_LIST.sub(lambda found: f"[{' '.join(found[0][1:-1].split())}]", text) + "\n"


def _is_count(value: object, largest: int = 1 << 20) -> bool:
    return value is None or (type(value) is int and 1 <= value <= largest)


def _is_shape(value: object) -> bool:
    return value is None or (isinstance(value, list | tuple) and len(value) == 3 and all(map(_is_count, value)))


_OBJECT = ("an object", lambda value: isinstance(value, Mapping))
_FORMS: dict[tuple[str, str], tuple[str, Callable[[object], bool]]] = {
    **dict.fromkeys((("model", "arguments"), ("problem", "parameters"), ("problem", "ranges")), _OBJECT),
    ("problem", "name"): ("text", lambda value: isinstance(value, str)),
    ("preprocessing", "channels"): ("a whole number", _is_count),
    ("preprocessing", "divisor"): ("a whole number to 4096", lambda value: _is_count(value, 4096)),
    ("preprocessing", "image_shape"): ("three whole numbers", _is_shape),
}
"""What other modules read from a card, where present: what it must be."""


def read_card(path: Path) -> Card:
    """Read ``card.json``; CheckpointError where it is missing, damaged or of another format version."""
    if not path.is_file():
        for other in sorted(path.parent.glob("*")):
            if other.suffix in PICKLE_SUFFIXES:
                refuse_pickle(other)
        raise CheckpointError(f"{path} does not exist: {path.parent} is not a flowprox model, as save_model writes one")
    if path.stat().st_size > _MAX_BYTES:
        raise CheckpointError(f"{path} is not a card: it has more than {_MAX_BYTES >> 20} MB; save the model again")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested without end
        raise CheckpointError(f"{path} is not JSON ({error}); restore the file or save the model again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is not a card: it holds a {type(values).__name__}; save the model again")
    if (version := values.get("format_version", FORMAT_VERSION)) != FORMAT_VERSION:
        raise CheckpointError(f"{path} has format version {version!r}, this flowprox reads 1; update flowprox")
    missing = [key for key in ("format_version", "name", "model", "sha256", "weights_dtype") if not values.get(key)]
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}; restore the file or save the model again")
    try:
        return Card.from_dict(values)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def plain(value: object, where: str) -> object:
    """``value`` as JSON: numpy and torch numbers, dataclasses, paths, dates included; NaN and infinity as text."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in dataclasses.fields(value)]
        return {name: plain(getattr(value, name), f"{where}.{name}") for name in names}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, datetime.date | datetime.datetime):
        return value.isoformat()
    to_list = getattr(value, "tolist", None)  # numpy and torch
    if callable(to_list):
        return plain(to_list(), where)
    kind = type(value).__name__
    raise TypeError(f"cannot write {kind} into the card at {where}; pass numbers, text, lists or mappings")


def refuse_pickle(path: Path) -> None:
    """Pickles and zip archives can run code when they are read."""
    with open(path, "rb") as file:
        start = file.read(9)
    # a safetensors file starts with a length, which may happen to look like a pickle's first bytes, and then "{"
    looks_like_one = start.startswith((b"PK\x03\x04", b"\x80")) and start[8:] != b"{"
    if path.suffix in PICKLE_SUFFIXES or looks_like_one:
        why = "pickles are never read as models, for they can run code"
        read = "make the model, model.load_state_dict(torch.load(file, weights_only=True))"
        remedy = f"To convert: {read}, then flowprox.save_model(model, folder)"
        raise CheckpointError(f"{path} is a pickle or zip archive: {why}. {remedy}")


def read_weights(folder: Path, card: Card) -> bytes:
    """The bytes that belong to the card: hashed and parsed from one reading."""
    path = folder / WEIGHTS
    candidates = [file for file in (path, folder / PREVIOUS) if file.is_file()]
    if not candidates:
        raise CheckpointError(f"{path} does not exist; copy it beside {CARD} or save the model again")
    refuse_pickle(candidates[0])
    for candidate in candidates:
        data = candidate.read_bytes()
        if hashlib.sha256(data).hexdigest() == card.sha256:
            return data
    size = path.stat().st_size if path.is_file() else 0
    state = f"has {size} of {card.n_bytes} bytes" if size != card.n_bytes else "was altered"
    raise CheckpointError(f"{path} {state} and does not match the SHA-256 in {CARD}; copy or download the folder again")
