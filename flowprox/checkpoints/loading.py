"""Models from disk: found by folder, shipped name or hub id, checked and rebuilt."""

from __future__ import annotations

import difflib
import os
import re
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowprox.checkpoints.card import CARD, PICKLE_SUFFIXES, Card, CheckpointError, read_card, refuse_pickle
from flowprox.checkpoints.hub import download
from flowprox.checkpoints.rebuilding import fill, rebuild
from flowprox.checkpoints.weights import WEIGHTS, parse_weights, read_weights
from flowprox.files import first_line

if TYPE_CHECKING:
    import torch

__all__ = ["list_models", "load_card", "load_model"]


def load_model(
    name: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    *,
    revision: str | None = None,
) -> Any:
    """Load a model, in evaluation mode, with its card as ``model.card``.

    Arguments:
        name: in this order: a folder (or a file in it), the name of a model shipped with flowprox (``list_models()``),
            or a Hugging Face hub id "org/name".
        device: where to put it.
        dtype: floating-point type to convert to; by default the one it was saved in (float32 for half-precision files).
        revision: branch, tag or commit on the hub.

    Raises:
        CheckpointError: no such model, damaged or unfitting card or weights, or a pickle (a ``ValueError``).
        ValueError: the device or dtype is not available.

    No code from the folder is run, whoever made it: a card can name registered classes only, weights are numbers.
    """
    target = require_device(device)
    float_type = _dtype(dtype)
    folder = _resolve(name, (CARD, WEIGHTS), revision)
    card = read_card(folder / CARD)
    tensors, shared = parse_weights(read_weights(folder, card), folder / WEIGHTS)
    model = rebuild(card.model, str(folder / CARD))
    fill(model, tensors, shared, half=card.weights_dtype in ("float16", "bfloat16"), where=str(folder))
    model.card = card
    return model.to(device=target, dtype=float_type).eval()


def load_card(name: str | os.PathLike[str], *, revision: str | None = None) -> Card:
    """The card of a model; ``name`` and errors as in ``load_model``. The weights are neither read nor downloaded."""
    return read_card(_resolve(name, (CARD,), revision) / CARD)


def list_models() -> list[str]:
    """Names of the models shipped with flowprox, for ``load_model``."""
    shipped = _shipped_folder()
    if not shipped.is_dir():
        return []
    return sorted(folder.name for folder in shipped.iterdir() if (folder / CARD).is_file())


def _shipped_folder() -> Path:
    return Path(str(resources.files("flowprox"))) / "models"


def _resolve(name: str | os.PathLike[str], files: tuple[str, ...], revision: str | None) -> Path:
    """The folder of a model: an existing path, a shipped name, or a download."""
    path = Path(name).expanduser()
    if path.is_file() and path.name in (CARD, WEIGHTS):
        return path.parent
    if path.is_file():
        refuse_pickle(path)
        raise CheckpointError(f"{path} is not a flowprox model; give the folder that holds {CARD} and {WEIGHTS}")
    if path.is_dir():
        of_run = path / "model"  # of a training run's folder
        return of_run if not (path / CARD).exists() and (of_run / CARD).exists() else path
    name = os.fspath(name)
    if name in list_models():
        return _shipped_folder() / name
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) and path.suffix not in PICKLE_SUFFIXES:
        return download(name, files, revision)
    near = difflib.get_close_matches(name, list_models(), n=3, cutoff=0.4) or list_models()
    hint = f"nearest shipped models: {', '.join(near)}" if near else "no models are shipped with this installation"
    raise CheckpointError(f"no model {name!r}: not a folder, not a shipped model, not a hub id 'org/name'; {hint}")


def require_device(device: str | torch.device) -> torch.device:
    """The device, if it is there; otherwise ``ValueError`` says what to use."""
    import torch

    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device {device!r} is not known: {first_line(error)}; use 'cpu' or 'cuda'") from error
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {str(target)!r} is not available: torch sees {torch.cuda.device_count()} GPUs; use 'cpu'"
        )
    return target


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    import torch

    if dtype is None:
        return None
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype must be a floating-point type such as 'float32' or 'float64', got {dtype!r}")
    return found
