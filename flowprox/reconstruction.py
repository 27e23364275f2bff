r"""Saved models applied to files of any size: clean images, which are measured first, and measurements.

A network needs sides that are multiples of its divisor. A measurement y = A x + n of another size is extended, and with
it the operator, so that the extended image still satisfies the extended equation exactly:

    denoising    y and noise mirrored                                       A = identity
    inpainting   y and mask mirrored alike                                  A = mirrored mask
    deblurring   y continued as the boundary has it; A = M (k *), M = 1 where the continued y is k * x, else 0

For a blur the margin is at least the kernel's radius on every side. Continued means repeated for a circular boundary
and, with a symmetric kernel, mirrored for "reflect"; for other boundaries M is 1 inside the original measurement only.
The reconstruction is cropped back.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from deepinv.models import Reconstructor
from deepinv.physics import Blur, Denoising, Inpainting, LinearPhysics
from torch import Tensor

from flowprox.checkpoints import atomic_write, load_model
from flowprox.data import IMAGE_SUFFIXES, load_image, load_measurement, save_image
from flowprox.evaluation.metrics import psnr, ssim
from flowprox.evaluation.records import RecordWriter
from flowprox.flows import NonFiniteError
from flowprox.operators import CircularBlur, CircularConvolution, Problem, make_physics, measure_each

__all__ = ["Fitted", "ReconstructionJob", "WindowedBlur", "fit_to_divisor", "image_seed", "reconstruct_files"]

ARRAY = ".npy"


@dataclass
class ReconstructionJob:
    """What to reconstruct, with what, from what.

    Arguments:
        model: folder of an unfolded network, name of a shipped one, or hub id.
        problem: name of the measurement problem; None takes the one in the model's card.
        parameters: of the problem, where they differ. Without another problem those of the card hold otherwise.
        measured: image files are measurements; otherwise they are clean images, which are measured first. Arrays always
            are measurements.
        seed: of the noise; an image's own seed follows from it and the file's name (``image_seed``).
        operator_seed: of what is drawn with the operator, such as a random mask; None takes the card's.
        pad: extend images whose sides are not multiples of the model's divisor; otherwise they are refused.
        device: where the model runs.
    """

    model: str
    problem: str | None = None
    parameters: Mapping[str, Any] | None = None
    measured: bool = False
    seed: int = 0
    operator_seed: int | None = None
    pad: bool = True
    device: str = "cpu"


class Fitted(NamedTuple):
    """A measurement whose sides a model can take: y (B, C, H', W'), its operator, and where the original stands."""

    y: Tensor
    physics: LinearPhysics
    rows: slice
    columns: slice


class _Input(NamedTuple):
    path: Path
    name: str  # in the output folder
    is_measurement: bool
    index: int | None = None  # within a batch of measurements, of which
    part: Tensor | None = None  # this is the one

    @property
    def label(self) -> str:
        """For messages and records."""
        return str(self.path) if self.index is None else f"{self.path}[{self.index}]"


class _Operators(NamedTuple):
    problem: Problem
    seed: int

    def make(self, image: Tensor, device: str = "cpu") -> LinearPhysics:
        """The operator for an image or measurement (B, C, H, W)."""
        _, channels, height, width = image.shape
        return make_physics(self.problem, (channels, height, width), seed=self.seed, device=device)


# Whole jobs ----------------------------------------------------------------------------------------------------------


def reconstruct_files(job: ReconstructionJob, inputs: Sequence[str | Path], out: str | Path) -> list[dict[str, Any]]:
    """Reconstruct files into a new folder, which appears complete or not at all.

    For input a.png it holds ``a.png``, ``a.npy`` (float32 (C, H, W), not clipped), the measurement likewise as
    ``measurements/a.png`` and ``measurements/a.npy``, and a line of ``records.jsonl``. Inputs of equal names become a,
    a-2, ...; the images of an array (B, C, H, W) a-0, a-1, .... Every input is read and checked before the first is
    reconstructed.

    Arguments:
        job: model, problem and settings.
        inputs: image files, measured arrays (.npy; see ``flowprox.data.load_measurement``) and folders of either, whose
            subfolders are not entered.
        out: folder to make; it may exist if it is empty.

    Returns:
        one record per image: input, image (its name in ``out``), problem, method, height, width, seconds; for inputs
        that were clean images also psnr (dB), ssim, seed.

    Raises:
        ValueError: an input, a parameter or the model does not fit; the message names it.
        OSError: a file cannot be read, ``out`` is not empty or cannot be written.
        NonFiniteError: the network diverged on an image; the message names it.
    """
    out = Path(out).absolute()
    _check_free(out)
    model = _load(job)
    operators = _operators(job, model)
    images = _listed(inputs, job, _n_channels(model))
    if any(image.is_measurement for image in images):
        _check_mask_is_known(job, operators)
    for image in images:
        _check(image, job, operators, model)
    with _new_folder(out) as folder:
        (folder / "measurements").mkdir()
        with RecordWriter(folder / "records.jsonl") as writer:
            for image in images:
                writer.write(_reconstruct(image, job, operators, model, folder))
    return writer.records


def image_seed(seed: int, name: str) -> int:
    """Seed of an image's noise, below 2^62: it depends on the file's name without suffix, not on the other inputs.

    Example:
        >>> image_seed(0, "a") == image_seed(0, "a") != image_seed(1, "a")
        True
    """
    digest = hashlib.blake2b(f"{seed},{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


def _load(job: ReconstructionJob) -> Reconstructor:
    model = load_model(job.model, device=job.device)
    if not isinstance(model, Reconstructor):
        raise ValueError(
            f"model {job.model!r} is a {type(model).__name__}, which does not reconstruct by itself; "
            "give an unfolded network (flowprox train-unfolded makes one of it)"
        )
    return model


def _operators(job: ReconstructionJob, model: Any) -> _Operators:
    trained = model.card.problem or {}
    name = job.problem or trained.get("name")
    if name is None:
        raise ValueError(f"the card of {job.model!r} names no problem; give one with problem")
    known = trained.get("parameters", {}) if name == trained.get("name") else {}
    problem = Problem(name, {**known, **(job.parameters or {})})
    seed = trained.get("seed", 0) if job.operator_seed is None else job.operator_seed
    return _Operators(problem, int(seed))


def _check_mask_is_known(job: ReconstructionJob, operators: _Operators) -> None:
    """A measurement needs the random mask it was made with; another one would be believed silently."""
    name, parameters = operators.problem.name, operators.problem.parameters
    if name == "random-inpainting" and parameters.get("mask") is None and job.operator_seed is None:
        raise ValueError(
            "measurements of random-inpainting need the mask they were made with: give parameter mask (an .npy file), "
            "or the operator_seed it was drawn with"
        )


def _n_channels(model: Any) -> int:
    card = model.card
    trained_on = card.training.get("recipe", {}).get("data", {})  # a ResNet or U-Net does not tell
    return int(card.preprocessing.get("channels") or trained_on.get("channels") or 3)


def _read(image: _Input, model: Any) -> Tensor:
    """The input as (1, C, H, W)."""
    channels = _n_channels(model)
    if image.part is not None:
        return image.part
    if image.is_measurement:
        return load_measurement(image.path, channels)
    x = load_image(image.path)
    if x.shape[0] > channels:
        raise ValueError(f"{image.path} has {x.shape[0]} channels but the model takes {channels}; convert it to grey")
    return x.expand(channels, -1, -1)[None]


def _check(image: _Input, job: ReconstructionJob, operators: _Operators, model: Any) -> None:
    x = _read(image, model)
    try:
        operators.make(x)
    except ValueError as error:
        raise ValueError(f"{image.label}: {error}") from error
    (height, width), divisor = x.shape[-2:], _divisor(model)
    if not job.pad and (height % divisor or width % divisor):
        raise ValueError(
            f"{image.label} has size {height}x{width}, and the model needs multiples of {divisor}; "
            "allow padding (--pad) or crop it"
        )


def _divisor(model: Any) -> int:
    return int(getattr(model, "divisor", 1))


def _reconstruct(
    image: _Input, job: ReconstructionJob, operators: _Operators, model: Any, folder: Path
) -> dict[str, Any]:
    x = _read(image, model).to(job.device)
    physics = operators.make(x, job.device)
    seed = image_seed(job.seed, image.path.stem)
    y = x if image.is_measurement else measure_each(x, physics, [seed])
    fitted = fit_to_divisor(y, physics, _divisor(model))
    try:
        with torch.no_grad():
            _wait(y)
            started = time.perf_counter()
            x_hat = model(fitted.y, fitted.physics)[..., fitted.rows, fitted.columns]
            _wait(y)
            seconds = time.perf_counter() - started
    except NonFiniteError as error:
        raise NonFiniteError(f"{image.label}: {error}") from error
    if not torch.isfinite(x_hat).all():
        raise NonFiniteError(f"{image.label}: the reconstruction is not finite; the measurement may be unlike training")
    _write(x_hat.cpu(), folder, image.name)
    _write(y.cpu(), folder / "measurements", image.name)
    record: dict[str, Any] = {
        "input": image.label,
        "image": image.name,
        "problem": operators.problem.label,
        "method": model.card.name,
        "height": x.shape[-2],
        "width": x.shape[-1],
        "seconds": seconds,
    }
    return record if image.is_measurement else record | {"seed": seed} | _figures(x_hat.cpu(), x.cpu())


def _figures(x_hat: Tensor, x: Tensor) -> dict[str, float]:
    figures = {"psnr": float(psnr(x_hat, x))}
    return figures | ({"ssim": float(ssim(x_hat, x))} if min(x.shape[-2:]) >= 11 else {})


def _wait(y: Tensor) -> None:
    if y.is_cuda:
        torch.cuda.synchronize(y.device)


def _write(x: Tensor, folder: Path, name: str) -> None:
    save_image(x, folder / f"{name}.png")
    with atomic_write(folder / f"{name}{ARRAY}", "wb") as file:
        np.save(file, x[0].numpy().astype(np.float32), allow_pickle=False)


# Inputs and outputs --------------------------------------------------------------------------------------------------


def _listed(inputs: Sequence[str | Path], job: ReconstructionJob, channels: int) -> list[_Input]:
    """The images of all inputs, each with a name of its own."""
    images: list[_Input] = []
    taken: set[str] = set()
    for path in (file for given in inputs for file in _files(Path(given))):
        is_array = path.suffix.lower() == ARRAY
        batch = load_measurement(path, channels) if is_array else None
        if batch is None or len(batch) == 1:
            images.append(_Input(path, _free_name(path.stem, taken), is_array or job.measured))
        else:
            for i in range(len(batch)):
                images.append(_Input(path, _free_name(f"{path.stem}-{i}", taken), True, i, batch[i : i + 1]))
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


def _check_free(out: Path) -> None:
    if out.is_dir() and any(out.iterdir()):
        raise FileExistsError(f"out {str(out)!r} is not empty; choose another folder")
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"out {str(out)!r} is a file; choose a folder")


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
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


# Sizes a model does not take -----------------------------------------------------------------------------------------


def fit_to_divisor(y: Tensor, physics: LinearPhysics, divisor: int) -> Fitted:
    """Extend a measurement and its operator to sides that ``divisor`` divides, by the rules at the top of this file.

    Arguments:
        y: measurement (B, C, H, W) of an operator that keeps the image's size.
        physics: its operator, from ``flowprox.operators.make_physics``.
        divisor: of the model.

    Returns:
        y and physics unchanged where the sides are multiples already.

    Raises:
        ValueError: the operator is none of denoising, inpainting and blur.

    Example:
        >>> physics = make_physics("inpainting", (1, 6, 6), mask_size=2)
        >>> fitted = fit_to_divisor(physics.A(torch.ones(1, 1, 6, 6)), physics, 4)
        >>> fitted.y.shape, fitted.y[..., fitted.rows, fitted.columns].shape
        (torch.Size([1, 1, 8, 8]), torch.Size([1, 1, 6, 6]))
    """
    sides = (int(y.shape[-2]), int(y.shape[-1]))
    if all(side % divisor == 0 for side in sides):
        return Fitted(y, physics, slice(0, sides[0]), slice(0, sides[1]))
    kernel = _kernel(physics)
    margin = max(kernel.shape[-2:]) // 2 if kernel is not None else 0
    before, sizes = zip(*(_placed(side, margin, divisor) for side in sides), strict=True)
    inside = [slice(start, start + side) for start, side in zip(before, sides, strict=True)]
    if kernel is not None:
        extended, operator = _extended_blur(y, physics, kernel, before, sizes)
    elif isinstance(physics, Denoising):
        extended, operator = _extended(y, before, sizes, "reflect"), physics
    elif isinstance(physics, Inpainting):
        mask = _extended(physics.get_buffer("mask"), before, sizes, "reflect")
        operator = Inpainting(img_size=mask.shape[-3:], mask=mask, device=mask.device)  # pyright: ignore
        extended = _extended(y, before, sizes, "reflect")
    else:
        raise ValueError(
            f"measurements of {type(physics).__name__} cannot be extended: use sizes divisible by {divisor}"
        )
    return Fitted(extended, operator, *inside)


def _placed(side: int, margin: int, divisor: int) -> tuple[int, int]:
    """Where the original starts, and the extended side."""
    size = -(-(side + 2 * margin) // divisor) * divisor
    return (size - side) // 2, size


def _kernel(physics: LinearPhysics) -> Tensor | None:
    if isinstance(physics, CircularConvolution):
        return physics.kernel()
    return physics.get_buffer("filter") if isinstance(physics, Blur) else None


class WindowedBlur(LinearPhysics):
    """A = M (k *): a blur of which only the pixels of M are measured.

    Where M keeps the kernel's radius away from the border, the circular convolution inside equals any other.

    Arguments:
        kernel: (h, w) with odd sides.
        seen: M (H, W), 1 where the blurred image is measured, 0 elsewhere.
    """

    def __init__(self, kernel: Tensor, seen: Tensor) -> None:
        super().__init__()
        self.blur = CircularBlur(kernel, device=kernel.device)
        self.register_buffer("seen", seen.to(kernel))

    def A(self, x: Tensor, **kwargs: Any) -> Tensor:
        """M (k * x), of the shape of x (B, C, H, W)."""
        return self.get_buffer("seen") * self.blur.A(x)

    def A_adjoint(self, y: Tensor, **kwargs: Any) -> Tensor:
        """The adjoint blur of M y, of the shape of y (B, C, H, W)."""
        return self.blur.A_adjoint(self.get_buffer("seen") * y)


def _extended_blur(
    y: Tensor, physics: LinearPhysics, kernel: Tensor, before: Sequence[int], sizes: Sequence[int]
) -> tuple[Tensor, LinearPhysics]:
    boundary = "circular" if isinstance(physics, CircularConvolution) else str(getattr(physics, "padding", ""))
    continued = boundary == "circular" or (boundary == "reflect" and _is_symmetric(kernel))
    seen = torch.zeros(sizes[0], sizes[1])
    if continued:  # all but a frame that the window's own border reaches
        top, left = kernel.shape[-2] // 2, kernel.shape[-1] // 2
        seen[top : sizes[0] - top, left : sizes[1] - left] = 1.0
    else:
        seen[before[0] : before[0] + y.shape[-2], before[1] : before[1] + y.shape[-1]] = 1.0
    mode = boundary if continued else "replicate"
    return _extended(y, before, sizes, mode), WindowedBlur(kernel[0, 0], seen)


def _is_symmetric(kernel: Tensor) -> bool:
    return all(torch.allclose(kernel, kernel.flip(dim)) for dim in (-1, -2))


def _extended(x: Tensor, before: Sequence[int], sizes: Sequence[int], mode: str) -> Tensor:
    """x (..., H, W) continued to ``sizes``, its first pixel at ``before``."""
    rows, columns = (
        _continued(n, start, size, mode).to(x.device)
        for n, start, size in zip(x.shape[-2:], before, sizes, strict=True)
    )
    return x[..., rows, :][..., columns]


def _continued(n: int, start: int, size: int, mode: str) -> Tensor:
    """Indices into 0 .. n - 1 of a continued axis; unlike torch's padding, by any width."""
    index = torch.arange(-start, size - start)
    if mode == "circular":
        return index % n
    if mode == "reflect" and n > 1:
        index = index % (2 * n - 2)
        return torch.minimum(index, 2 * n - 2 - index)
    return index.clamp(0, n - 1)
