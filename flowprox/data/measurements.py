"""Measurements from arrays and images."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flowprox.data.images import StrPath, check_finite, check_shape, load_image

__all__ = ["load_array", "load_measurement"]


def load_measurement(path: StrPath, channels: int | None = None) -> Tensor:
    """Read a measurement as float32 (B, C, H, W), in the units of images in [0, 1].

    Arguments:
        path: .npy array of floats, (H, W), (C, H, W) or (B, C, H, W), or an image file. Noise may leave [0, 1].
        channels: the number of channels that the model takes; None accepts 1 or 3.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an array, of objects or whole numbers, NaN, wrong dimensions or channels, values beyond 10.
    """
    file, name = Path(path), str(path)
    if file.suffix.lower() != ".npy":
        y = load_image(file)
    else:
        y = torch.from_numpy(_read_array(file))
    if y.ndim == 2:
        y = y[None]
    if y.ndim == 3 and y.shape[0] not in (1, 3) and y.shape[-1] in (1, 3):
        raise ValueError(f"{name} has shape {tuple(y.shape)}; channels come first: save array.transpose(2, 0, 1)")
    y = y[None] if y.ndim == 3 else y
    check_shape(y, name, (4,))
    if channels is not None and y.shape[1] != channels:
        raise ValueError(
            f"{name} has {y.shape[1]} channel(s) but the model takes {channels}; convert it or use another model"
        )
    check_finite(y, name)
    if y.abs().max() > 10:
        raise ValueError(
            f"{name} holds values up to {y.abs().max().item():g}; a measurement is in the units of images in [0, 1]: "
            "divide by 255 if it was made from 8-bit images"
        )
    return y


def load_array(path: StrPath, shape: Sequence[int]) -> Tensor:
    """Read measurements that are no pictures, such as those of compressed sensing or k-space, as float32 (B, *shape).

    Arguments:
        path: .npy array of floats, of ``shape`` or (B, *shape).
        shape: of one measurement.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an array, of objects or whole numbers, NaN, another shape.
    """
    y = torch.from_numpy(_read_array(Path(path)))
    wanted = tuple(shape)
    y = y[None] if tuple(y.shape) == wanted else y
    if tuple(y.shape[1:]) != wanted or len(y) == 0:
        raise ValueError(
            f"{path} has shape {tuple(y.shape)} but the operator measures {wanted}, or (B, ...) of these; "
            "check the problem's parameters and the size of the image"
        )
    check_finite(y, str(path))
    return y


def _read_array(path: Path) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}; check the path")
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a plain .npy array; write it with numpy.save, without objects") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path} is an .npz archive; give one array written with numpy.save")
    if array.dtype.kind != "f":
        raise ValueError(
            f"{path} holds {array.dtype}; a measurement holds floats in the units of images in [0, 1]: "
            "divide 8-bit values by 255 and save as float32"
        )
    return np.ascontiguousarray(array, dtype=np.float32)
