"""Files in, files out: which inputs there are, what they are called, and a folder that fills as they are finished."""

from __future__ import annotations

import gzip
import io
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from flowprox.data import (
    ARRAY_SUFFIXES,
    IMAGE_SUFFIXES,
    SCAN_SUFFIXES,
    PictureForm,
    Stack,
    load_stack,
    picture_form,
    save_image,
    suffix_of,
)
from flowprox.files import atomic_write, remove_temporaries
from flowprox.records import UNFINISHED, Record, RecordWriter, read_records, write_records

_USUAL = PictureForm()
ARRAY, VOLUME = ".npy", ".nii.gz"
RECORDS = "records.jsonl"
_FOLDERS = ("", "measurements", "deviations", "lower", "upper", "half-widths")


class Input(NamedTuple):
    """One image or measurement to reconstruct."""

    path: Path
    name: str  # in the output folder
    is_measurement: bool
    index: int | None = None  # within a batch of measurements, of which
    part: Tensor | None = None  # this is the one
    stack: Stack | None = None  # or of slices

    @property
    def is_picture(self) -> bool:
        """Whether it is a picture or a slice, not an array."""
        return self.part is None or self.stack is not None

    @property
    def form(self) -> PictureForm:
        """How the file's picture is stored; of an array, the usual."""
        if self.part is None:
            return picture_form(self.path)
        return PictureForm(8 if self.stack is None else 16)

    @property
    def label(self) -> str:
        """For messages and records."""
        return str(self.path) if self.index is None else f"{self.path}[{self.index}]"


def list_inputs(
    inputs: Sequence[str | Path], measured: bool, load_batch: Callable[[Path], Tensor], names: Mapping[str, str]
) -> list[Input]:
    """The images of all inputs, each with a name of its own.

    Arguments:
        inputs: image files, stacks of slices, arrays and folders of these.
        measured: image files are measurements.
        load_batch: reads an array of measurements, (B, ...).
        names: label of an input -> the name it has already.
    """
    images: dict[str, Input] = {}
    taken = {name.casefold() for name in names.values()}
    for path in (file for given in inputs for file in _files(Path(given))):
        is_array = suffix_of(path) in ARRAY_SUFFIXES
        stack = None if is_array else load_stack(path)
        batch = load_batch(path) if is_array else None if stack is None else stack.slices
        stem = path.name[: -len(suffix_of(path)) or None]
        for i in range(1 if batch is None else len(batch)):
            image = Input(path, stem, is_array or measured, part=batch, stack=stack)
            if batch is not None and len(batch) > 1:
                image = image._replace(name=f"{stem}-{i}", index=i, part=batch[i : i + 1])
            if image.label not in images:
                images[image.label] = image._replace(name=names.get(image.label) or _free_name(image.name, taken))
    if not images:
        raise ValueError("inputs is empty; give image files, .npy arrays or folders of them")
    return list(images.values())


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    suffixes = {*IMAGE_SUFFIXES, *ARRAY_SUFFIXES, *SCAN_SUFFIXES}
    files = sorted(p for p in path.iterdir() if suffix_of(p) in suffixes and not p.name.startswith("."))
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


# The folder of results -----------------------------------------------------------------------------------------------


def earlier_records(out: Path) -> list[Record]:
    """What an earlier run left in the folder."""
    return read_records(out / RECORDS) if (out / RECORDS).exists() else []


@contextmanager
def results_folder(out: Path, overwrite: bool) -> Iterator[RecordWriter]:
    """The folder, made where it is missing, and the records in it, to which the block appends; ``overwrite`` begins anew,
    without the images of earlier ones. A folder that was made here and holds nothing finished at the end is removed."""
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        (out / "measurements").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(error.errno, f"out cannot be written ({error.strerror})", str(out)) from error
    if overwrite:
        for record in earlier_records(out):
            remove_image(out, str(record["image"]))
        for volume in out.glob(f"*{VOLUME}"):
            volume.unlink()
        write_records(out / RECORDS, [])
    for name in _FOLDERS:
        remove_temporaries(out / name)
    with RecordWriter(out / RECORDS, resume=True) as records:
        (out / UNFINISHED).touch()
        try:
            yield records
            (out / UNFINISHED).unlink()
        finally:
            if made and not records.records:
                for path in (out / UNFINISHED, out / RECORDS):
                    path.unlink(missing_ok=True)
                for folder in (out / "measurements", *made):
                    with suppress(OSError):  # something else stands in it
                        folder.rmdir()


def remove_image(out: Path, name: str) -> None:
    """Delete what was written of an image."""
    for folder in _FOLDERS:
        for suffix in (".png", ARRAY):
            (out / folder / f"{name}{suffix}").unlink(missing_ok=True)
    shutil.rmtree(out / "samples" / name, ignore_errors=True)


def write_picture(x: Tensor, folder: Path, name: str, form: PictureForm = _USUAL) -> None:
    """x (C, H, W) as ``name.png``, of the form that the picture in its place had, and, not clipped, ``name.npy``.

    Of a complex image, real and imaginary part, the picture is the magnitude.
    """
    shown = x.square().sum(0, keepdim=True).sqrt() if len(x) == 2 else x
    save_image(shown, folder / f"{name}.png", form)
    write_array(x, folder, name)


def write_deviation(std: Tensor, folder: Path, name: str) -> None:
    """Standard deviations or half-widths (C, H, W) as ``name.npy``, and as ``name.png``, where white is the highest."""
    save_image(std / std.max().clamp(min=1e-12), folder / f"{name}.png")
    write_array(std, folder, name)


def write_volumes(images: Sequence[Input], out: Path) -> None:
    """What was made of each NIfTI file as one again: in its units, and where its affine places it."""
    for first in images:
        stack = first.stack
        if stack is None or stack.affine is None or first.index not in (None, 0):
            continue
        import nibabel  # pyright: ignore[reportMissingImports]

        names = [image.name for image in images if image.path == first.path]
        values = np.stack([np.load(out / f"{name}{ARRAY}").mean(0) for name in names], -1)
        factors = [a / b for a, b in zip(stack.slices.shape[-2:], values.shape, strict=False)]  # of super-resolution
        zoom = np.diag([*factors, 1.0, 1.0])
        zoom[:2, 3] = [(factor - 1) / 2 for factor in factors]
        values = values * (stack.high - stack.low) + stack.low
        content = nibabel.Nifti1Image(values.astype(np.float32), stack.affine @ zoom).to_bytes()
        with atomic_write(out / f"{first.name.removesuffix('-0')}{VOLUME}", "wb") as file:
            file.write(gzip.compress(content))


def write_array(x: Tensor, folder: Path, name: str) -> None:
    """x as ``name.npy``, float32."""
    content = io.BytesIO()  # written to a file, numpy hides the system's reason when it fails
    np.save(content, x.numpy().astype(np.float32), allow_pickle=False)
    with atomic_write(folder / f"{name}{ARRAY}", "wb") as file:
        file.write(content.getbuffer())
