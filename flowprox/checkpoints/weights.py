"""The tensors of a model as bytes: ``model.safetensors``, which cannot run code.

A tensor that a model uses under several names is stored once; the file's metadata list its other names.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from flowprox.checkpoints.card import CARD, Card, CheckpointError, refuse_pickle

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["PREVIOUS", "WEIGHTS", "distinct_tensors", "pack", "parse_weights", "read_weights"]

WEIGHTS = "model.safetensors"
PREVIOUS = "model.safetensors.previous"  # exists only while a save is under way, or after one was killed

_SMALL = 1024  # tensors with fewer elements stay float32 in a half-precision file: they weigh nothing and steer much


def distinct_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor once, under its first name, and the other names of shared ones."""
    import torch

    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"cannot save {name}: {type(tensor).__name__} in a model's state; keep it as a buffer")
        kept = first.setdefault(id(tensor), name)
        if kept == name:
            tensors[name] = tensor.detach()
        else:
            shared[name] = kept
    return tensors, shared


def pack(model: nn.Module, half: str | None) -> bytes:
    """The content of a weights file; ``half`` names the type that large tensors are rounded to.

    Raises:
        ValueError: a weight is too large for float16.
    """
    import safetensors.torch

    tensors, shared = distinct_tensors(model)
    return safetensors.torch.save(
        {name: _to_store(name, tensor, half) for name, tensor in tensors.items()},
        metadata={"shared": json.dumps(shared)},  # one key only: safetensors writes several in random order
    )


def _to_store(name: str, tensor: Tensor, half: str | None) -> Tensor:
    import torch

    tensor = tensor.cpu().clone(memory_format=torch.contiguous_format)  # a copy of its own: views may overlap
    if half is None or not tensor.is_floating_point() or tensor.numel() < _SMALL:
        return tensor
    rounded = tensor.to(getattr(torch, half))
    if not bool(torch.isfinite(rounded).all()) and bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name} holds values too large for {half}; pass half='bfloat16' or half=False")
    return rounded


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
    raise CheckpointError(
        f"{path} {state} and does not match the SHA-256 in {CARD}; copy or download the folder again (a file that "
        "git-lfs left as a pointer has about 130 bytes)"
    )


def parse_weights(data: bytes, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name, and for each further name of a shared one the name it is stored under."""
    import safetensors.torch
    from safetensors import SafetensorError

    try:
        tensors = safetensors.torch.load(data)
        length = int.from_bytes(data[:8], "little")
        shared = json.loads(json.loads(data[8 : 8 + length]).get("__metadata__", {}).get("shared", "{}"))
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is not a safetensors file ({error}); copy or download it again") from error
    return tensors, {str(name): str(kept) for name, kept in shared.items() if kept in tensors}
