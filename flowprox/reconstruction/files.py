"""Files in, files out: which inputs there are, what they are called, and a folder that appears when it is complete."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from flowprox.data import IMAGE_SUFFIXES, save_image
from flowprox.files import atomic_write

__all__ = ["Input", "check_free", "list_inputs", "new_folder", "write_array", "write_picture"]

ARRAY = ".npy"


class Input(NamedTuple):
    """One image or measurement to reconstruct."""

    path: Path
    name: str  # in the output folder
    is_measurement: bool
    index: int | None = None  # within a batch of measurements, of which
    part: Tensor | None = None  # this is the one

    @property
    def label(self) -> str:
        """For messages and records."""
        return str(self.path) if self.index is None else f"{self.path}[{self.index}]"


def list_inputs(inputs: Sequence[str | Path], measured: bool, load_batch: Callable[[Path], Tensor]) -> list[Input]:
    """The images of all inputs, each with a name of its own.

    Arguments:
        inputs: image files, arrays (.npy) and folders of either.
        measured: image files are measurements.
        load_batch: reads an array of measurements, (B, ...).
    """
    images: list[Input] = []
    taken: set[str] = set()
    for path in (file for given in inputs for file in _files(Path(given))):
        is_array = path.suffix.lower() == ARRAY
        batch = load_batch(path) if is_array else None
        if batch is None or len(batch) == 1:
            images.append(Input(path, _free_name(path.stem, taken), is_array or measured, part=batch))
        else:
            for i in range(len(batch)):
                images.append(Input(path, _free_name(f"{path.stem}-{i}", taken), True, i, batch[i : i + 1]))
    if not images:
        raise ValueError("inputs is empty; give image files, .npy arrays or folders of them")
    return images


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    suffixes = IMAGE_SUFFIXES | {ARRAY}
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in suffixes and not p.name.startswith("."))
    if not files:
        raise ValueError(f"{path} holds no images; expected files ending in {' '.join(sorted(suffixes))}")
    return files


def _free_name(name: str, taken: set[str]) -> str:
    """The name, or the first of name-2, name-3, ... that is free on file systems that ignore case too."""
    free, n = name, 1
    while free.casefold() in taken:
        n += 1
        free = f"{name}-{n}"
    taken.add(free.casefold())
    return free


def check_free(out: Path) -> None:
    if out.is_dir() and any(out.iterdir()):
        raise FileExistsError(f"out {str(out)!r} is not empty; choose another folder")
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"out {str(out)!r} is a file; choose a folder")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside ``out`` that becomes ``out`` when the block ends well, and vanishes otherwise."""
    try:
        made = [parent for parent in out.parents if not parent.exists()]
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise type(error)(error.errno, f"out cannot be written ({error.strerror})", str(out)) from error
    try:
        yield folder
        folder.chmod(0o777 & ~_umask())
        os.replace(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in made:
            if not any(parent.iterdir()):
                parent.rmdir()
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_picture(x: Tensor, folder: Path, name: str) -> None:
    """x (1, C, H, W) as ``name.png`` and, not clipped, ``name.npy``."""
    save_image(x, folder / f"{name}.png")
    write_array(x, folder, name)


def write_array(x: Tensor, folder: Path, name: str) -> None:
    """x (1, ...) as ``name.npy``, float32 and without the batch axis."""
    with atomic_write(folder / f"{name}{ARRAY}", "wb") as file:
        np.save(file, x[0].numpy().astype(np.float32), allow_pickle=False)
