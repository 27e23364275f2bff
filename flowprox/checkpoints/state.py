"""A trainer's state: one file of tensors and plain values, read without unpickling objects."""

from __future__ import annotations

import io
import os
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowprox.checkpoints.card import CheckpointError
from flowprox.files import atomic_write, first_line

_READ_ERRORS = (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError)


def save_training_state(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Write a trainer's state to one file, whole or not at all.

    Arguments:
        path: file to write; its folder must exist.
        state: nested dictionaries, lists and tuples of tensors, numbers, text, bytes and None.

    Raises:
        TypeError: a value could not be read back without unpickling objects; the message names the place.
        OSError: the file cannot be written; one that was there is still whole.
    """
    import torch

    _check_state(state, "state")
    content = io.BytesIO()  # torch's zip writer turns a full disk into a RuntimeError
    torch.save(dict(state), content)
    with atomic_write(path, "wb") as file:
        file.write(content.getbuffer())


def _check_state(value: Any, where: str) -> None:
    import torch

    plain = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
    if isinstance(value, torch.Tensor) or value is None or type(value) in plain:
        return
    if type(value) in (dict, OrderedDict) or (where == "state" and isinstance(value, Mapping)):
        for key, item in value.items():
            _check_state(key, f"a key of {where}")
            _check_state(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple, set):
        for i, item in enumerate(value):
            _check_state(item, f"{where}[{i}]")
    else:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise TypeError(
            f"{where} is a {kind}, which cannot be read back without unpickling objects; store tensors or text"
        )


def load_training_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what ``save_training_state`` wrote, tensors on the CPU. Objects are never unpickled.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged, or holds more than tensors and plain values.
    """
    import pickle
    import zipfile

    import torch

    if not Path(path).is_file():
        raise FileNotFoundError(f"no training state {os.fspath(path)}; check the path, or start without resuming")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):  # may expand without end
                raise zipfile.BadZipFile("it is compressed")
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"{damaged} is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (*_READ_ERRORS, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        reason = f"is not a whole training state ({first_line(error)})"
        raise CheckpointError(f"{os.fspath(path)} {reason}; resume from an earlier one") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{os.fspath(path)} holds a {type(state).__name__}, not a training state")
    return state
