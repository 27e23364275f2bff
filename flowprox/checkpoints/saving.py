"""Models to disk: nothing is replaced before the new model is complete."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from flowprox.checkpoints.card import CARD, FORMAT_VERSION, Card, plain
from flowprox.checkpoints.rebuilding import check_rebuild
from flowprox.checkpoints.weights import PREVIOUS, WEIGHTS, pack
from flowprox.files import atomic_write, force_to_disk, sha256
from flowprox.naming import Specified

if TYPE_CHECKING:
    from torch import nn

__all__ = ["save_model"]


def save_model(
    model: nn.Module,
    folder: str | os.PathLike[str],
    card: Card | Mapping[str, Any] | None = None,
    *,
    half: bool | str = False,
) -> Card:
    """Write a model to a folder, replacing a model that is there only once the new one is complete.

    Before anything is written the model is rebuilt once from its constructor arguments, so that what is saved can be
    loaded. torch's random number generator is left as it was.

    Arguments:
        model: a flowprox model (anything that derives from ``Specified``); a compiled or data-parallel wrapper is
            unwrapped.
        folder: where to; created if needed. Its name is the model's name unless the card has one.
        card: what to record besides what the model tells; a ``Card`` or a dictionary with its fields. Not changed.
        half: store large tensors in half precision: "float16" (True means the same; finer) or "bfloat16" (wider range).
            They are rounded, so outputs of the loaded model differ slightly from those of ``model``.

    Returns:
        The complete card, as written.

    Raises:
        TypeError: ``model`` or a value in the card cannot be written down.
        CheckpointError: the model cannot be rebuilt from its constructor arguments.
        ValueError: a weight is too large for float16.
        OSError: the folder cannot be written; a model that was there is still whole.

    Example:
        >>> import tempfile, torch, flowprox
        >>> flow = flowprox.Glow((3, 8, 8), n_levels=2, n_steps=1, hidden_channels=8).eval()
        >>> folder = tempfile.mkdtemp()
        >>> _ = save_model(flow, folder, {"name": "tiny", "training": {"seed": 0}})
        >>> x = torch.rand(2, 3, 8, 8)
        >>> torch.equal(flowprox.load_model(folder).log_prob(x), flow.log_prob(x))
        True
    """
    import torch

    folder = Path(folder)
    model, spec = _unwrap(model)
    stored_dtype = _half_name(half)
    check_rebuild(model, spec)

    values = vars(card) if isinstance(card, Card) else dict(card or {})
    problem = {"problem": plain(values.get("problem"), "problem")}
    card = Card.from_dict({"name": folder.absolute().name} | values | problem)
    card.format_version = FORMAT_VERSION
    card.model = spec
    card.preprocessing = _preprocessing(model) | dict(card.preprocessing)
    card.training = dict(card.training) | {k: v for k, v in _provenance(model).items() if k not in card.training}
    card.n_parameters = sum(p.numel() for p in model.parameters())
    card.weights_dtype = stored_dtype or str(next(model.parameters(), torch.empty(0)).dtype).removeprefix("torch.")
    data = pack(model, stored_dtype)
    card.n_bytes = len(data)
    card.sha256 = hashlib.sha256(data).hexdigest()
    text = card.to_json()
    _write(folder, text, data)
    return Card.from_dict(json.loads(text))


def _write(folder: Path, card: str, weights: bytes) -> None:
    """Put a card and its weights in the place of those that are there."""
    folder.mkdir(parents=True, exist_ok=True)
    _settle_interrupted_save(folder)
    with atomic_write(folder / CARD, "w") as card_file:
        card_file.write(card)
        force_to_disk(card_file)
        with atomic_write(folder / WEIGHTS, "wb") as weights_file:
            weights_file.write(weights)
            force_to_disk(weights_file)
            # Both files are on disk, only renames are left. Between them the old card finds its weights under PREVIOUS.
            if (folder / WEIGHTS).exists():
                os.replace(folder / WEIGHTS, folder / PREVIOUS)
    (folder / PREVIOUS).unlink(missing_ok=True)


def _unwrap(model: Any) -> tuple[nn.Module, dict[str, Any]]:
    """The model inside its wrappers, and its constructor call."""
    while not isinstance(model, Specified):
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)  # torch.compile; data parallel
        if inner is None:
            raise TypeError(
                f"cannot save a {type(model).__name__}: models are saved with their constructor arguments, so the class "
                "must derive from flowprox.naming.Specified first: class Mine(Specified, nn.Module)"
            )
        model = inner
    return cast("nn.Module", model), model.spec()


def _half_name(half: bool | str) -> str | None:
    name = "float16" if half is True else half or None
    if name not in (None, "float16", "bfloat16"):
        raise ValueError(f"half must be False, True, 'float16' or 'bfloat16', got {half!r}")
    return name


def _settle_interrupted_save(folder: Path) -> None:
    """After a killed save: give the weights that belong to the card their name back, or drop what is left over."""
    previous = folder / PREVIOUS
    if not previous.exists():
        return
    # searched, not parsed: a damaged card must not keep a new model from being saved
    if (folder / CARD).exists() and sha256(previous).encode() in (folder / CARD).read_bytes():
        os.replace(previous, folder / WEIGHTS)
    else:
        previous.unlink()


def _preprocessing(model: Any) -> dict[str, Any]:
    """Pixel range, channels, image shape and divisor, from the model or from its first flow."""
    flows = model.flows() if callable(getattr(model, "flows", None)) else []
    owner = model if hasattr(model, "image_shape") else next(iter(flows), model)
    shape = getattr(owner, "image_shape", None)
    return {
        "range": getattr(model, "value_range", [0, 1]),
        "channels": None if shape is None else int(shape[0]),
        "image_shape": None if shape is None else [int(n) for n in shape],
        "divisor": getattr(model, "divisor", getattr(owner, "divisor", None)),
    }


def _provenance(model: nn.Module) -> dict[str, Any]:
    import torch

    import flowprox

    versions = {"flowprox": flowprox.__version__, "torch": str(torch.__version__), "python": platform.python_version()}
    if "deepinv" in sys.modules:  # a flow alone does not depend on it
        versions["deepinv"] = version("deepinv")
    tensor = next(model.parameters(), torch.empty(0))
    machine = (
        torch.cuda.get_device_name(tensor.device) if tensor.is_cuda else f"{tensor.device.type}, {os.cpu_count()} cores"
    )
    return {
        "machine": f"{platform.system()} {platform.machine()}, {machine}",
        "versions": versions,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }
