"""A method applied to files, into a new folder."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import torch
from deepinv.models import Reconstructor
from deepinv.physics import Physics
from torch import Tensor

from flowprox.checkpoints import load_model
from flowprox.data import load_array, load_image, load_measurement
from flowprox.flows import Flow, NonFiniteError
from flowprox.methods import METHODS, check_options, make_method, outcome_of, run_method
from flowprox.metrics import best_scaled, psnr, ssim
from flowprox.noise import NOISES
from flowprox.operators import PROBLEMS, Fitted, Problem, ProblemKind, make_physics, measure_each, measurement_shape
from flowprox.reconstruction.files import Input, check_free, list_inputs, new_folder, write_array, write_picture
from flowprox.records import RecordWriter
from flowprox.solvers import SolverInterrupted

__all__ = ["ReconstructionInterrupted", "ReconstructionJob", "image_seed", "reconstruct_files"]

DEFAULT_FLOW = "glow-faces64"


@dataclass
class ReconstructionJob:
    """What to reconstruct, with what, from what.

    Arguments:
        model: folder of a trained network, name of a shipped one, or hub id.
        problem: name of the measurement problem; None takes the one in the model's card.
        parameters: of the problem, where they differ. Without another problem those of the card hold otherwise.
        measured: image files are measurements; otherwise they are clean images, which are measured first. Arrays always
            are measurements.
        seed: of the noise; an image's own seed follows from it and the file's name (``image_seed``).
        operator_seed: of what is drawn with the operator, such as a random mask; None takes the card's.
        pad: extend images whose sides are not multiples of the model's divisor; otherwise they are refused.
        device: where the method runs.
        method: a key of ``flowprox.methods.METHODS``; None is "unfolded", which needs a model.
        flow: the prior, for methods that need one; None takes the shipped one.
        noise: density of the noise, for methods that take one: see ``flowprox.methods.make_method``.
        options: of the method.
        size: (H, W) or (C, H, W) of the image behind measurements that do not show it; None takes that of the flow.
    """

    model: str | None = None
    problem: str | None = None
    parameters: Mapping[str, Any] | None = None
    measured: bool = False
    seed: int = 0
    operator_seed: int | None = None
    pad: bool = True
    device: str = "cpu"
    method: str | None = None
    flow: str | None = None
    noise: str | Mapping[str, Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    size: Sequence[int] | None = None


class ReconstructionInterrupted(KeyboardInterrupt):
    """Ctrl-C; what is finished has been kept, and the message says how much that is."""


class _Engine(NamedTuple):
    """The method, with what it was made of and what that demands of an image."""

    method: str
    label: str
    parts: Mapping[str, Any]  # flow, model, noise
    facts: Mapping[str, Any]  # for the records
    channels: int | None  # None: as the file has it
    divisor: int
    image_shape: tuple[int, int, int] | None
    trained: Mapping[str, Any]  # the problem in the model's card

    def make(self, job: ReconstructionJob, problem: Problem, shape: Sequence[int]) -> Reconstructor:
        """The method for measurements of a shape."""
        return make_method(self.method, problem, **self.parts, shape=shape, device=job.device, **job.options)


class _Operators:
    """The operator for each size of image; the last one is kept."""

    def __init__(self, problem: Problem, seed: int) -> None:
        self.problem, self.seed = problem, seed
        self._last: tuple[Any, Physics] | None = None

    @property
    def kind(self) -> ProblemKind:
        """What there is to know of the operator."""
        return PROBLEMS[self.problem.name]

    def make(self, shape: Sequence[int], device: str = "cpu") -> Physics:
        """The operator for images (C, H, W)."""
        channels, height, width = shape
        key = (channels, height, width, device)
        if self._last is None or self._last[0] != key:
            physics = make_physics(self.problem, (channels, height, width), seed=self.seed, device=device)
            self._last = (key, physics)
        return self._last[1]


def reconstruct_files(job: ReconstructionJob, inputs: Sequence[str | Path], out: str | Path) -> list[dict[str, Any]]:
    """Reconstruct files into a new folder, which appears when it is complete, or holds whole images only.

    For input a.png it holds ``a.png``, ``a.npy`` (float32 (C, H, W), not clipped), the measurement likewise as
    ``measurements/a.png`` (where it is a picture) and ``measurements/a.npy``, and a line of ``records.jsonl``; from a
    method that tells how sure it is also the standard deviation of each pixel, ``deviations/a.npy``. Inputs of equal
    names become a, a-2, ...; the images of an array (B, ...) a-0, a-1, .... Every input is read and checked before the
    first is reconstructed.

    Arguments:
        job: method, problem and settings.
        inputs: image files, measured arrays (.npy; see ``flowprox.data.load_measurement``) and folders of either, whose
            subfolders are not entered.
        out: folder to make; it may exist if it is empty.

    Returns:
        one record per image: input, image (its name in ``out``), problem, method, height, width, seconds; for inputs
        that were clean images also psnr (dB), ssim, seed; what the solver tells: reason, n_evaluations, gamma.

    Raises:
        ValueError: an input, a parameter or the model does not fit; the message names it.
        OSError: a file cannot be read, ``out`` is not empty or cannot be written.
        NonFiniteError: the method diverged on an image; the message names it. After this or a ValueError from a later
            image ``out`` holds those that are finished.
        ReconstructionInterrupted: on Ctrl-C after the first image, or within the run of a solver, whose best estimate so
            far is kept and whose record says so (reason "interrupted"); ``out`` holds the images that are finished.
    """
    out = Path(out).absolute()
    check_free(out)
    engine = _load(job)
    operators = _operators(job, engine)
    images = list_inputs(inputs, job.measured, lambda path: _load_batch(path, job, operators, engine))
    if any(image.is_measurement for image in images):
        _check_operator_is_known(job, operators)
        _check_level_is_known(job, engine)
    for image in images:
        _check(image, job, operators, engine)
    interrupted, failure = False, None
    with new_folder(out) as folder:
        (folder / "measurements").mkdir()
        with RecordWriter(folder / "records.jsonl") as writer:
            try:
                for image in images:
                    writer.write(_reconstruct(image, job, operators, engine, folder))
                    if writer.records[-1].get("reason") == "interrupted":
                        interrupted = True
                        break
            except KeyboardInterrupt as error:
                if not writer.records:
                    raise KeyboardInterrupt("no image is finished, nothing is written") from error
                interrupted = True
                _remove_unfinished(folder, {record["image"] for record in writer.records})
            except (ValueError, ArithmeticError) as error:
                if not writer.records:
                    raise
                failure = error
                _remove_unfinished(folder, {record["image"] for record in writer.records})
    if failure is not None:
        finished = f"the {len(writer.records)} of {len(images)} images before are finished, in {out}"
        raise type(failure)(f"{failure}; {finished}") from failure
    if interrupted:
        raise ReconstructionInterrupted(f"{len(writer.records)} of {len(images)} images are finished, in {out}")
    return writer.records


def image_seed(seed: int, name: str) -> int:
    """Seed of an image's noise, below 2^62: it depends on the file's name without suffix, not on the other inputs.

    Example:
        >>> image_seed(0, "a") == image_seed(0, "a") != image_seed(1, "a")
        True
    """
    digest = hashlib.blake2b(f"{seed},{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


# The method and the problem ------------------------------------------------------------------------------------------


def _load(job: ReconstructionJob) -> _Engine:
    method = job.method or "unfolded"
    if job.method is None and job.model is None:
        raise ValueError(f"give a method, one of {', '.join(METHODS)}, or a model, which means unfolded")
    if method == "unfolded" and job.model is None:
        raise ValueError("method unfolded needs model: a shipped one (see flowprox models), a folder or a hub id")
    check_options(method, job.options)
    flow, given = job.flow, {"flow": job.flow, "model": job.model}
    if "flow" in (METHODS[method].missing(given) or "").split(" or "):
        flow = DEFAULT_FLOW
    model: Any = None if job.model is None else load_model(job.model, device=job.device)
    prior = None if flow is None else load_model(flow, device=job.device)
    if method == "unfolded" and not isinstance(model, Reconstructor):
        raise ValueError(
            f"model {job.model!r} is a {type(model).__name__}, which does not reconstruct by itself; give an unfolded "
            "network (flowprox train-unfolded makes one of it), or a method that uses it, such as latent-map with flow"
        )
    if prior is not None and not isinstance(prior, Flow):
        raise ValueError(f"flow {flow!r} is a {type(prior).__name__}, not a flow; see flowprox models")
    noise = load_model(job.noise, device=job.device) if _is_model(job.noise) else job.noise
    if isinstance(noise, Flow):
        raise ValueError(
            f"noise {job.noise!r} is a flow of images; train one on noise (train-flow with noise), or give one of "
            f"{', '.join(NOISES)}"
        )
    source: Any = prior if prior is not None else model
    card: Any = getattr(model, "card", None)
    names = {"flow": flow, "model": job.model, "noise": job.noise, "options": dict(job.options)}
    return _Engine(
        method,
        card.name if method == "unfolded" and card is not None else method,
        {"flow": prior, "model": model, "noise": noise},
        {key: value for key, value in names.items() if value} if method != "unfolded" else {},
        None if source is None else _n_channels(source),
        int(getattr(source, "divisor", 1)),
        getattr(source, "image_shape", None),
        getattr(card, "problem", None) or {},
    )


def _is_model(noise: Any) -> TypeGuard[str]:
    return isinstance(noise, str) and noise not in NOISES


def _operators(job: ReconstructionJob, engine: _Engine) -> _Operators:
    name = job.problem or engine.trained.get("name")
    if name is None:
        raise ValueError(f"{engine.label} is for no problem in particular; give one with problem")
    known = engine.trained.get("parameters", {}) if name == engine.trained.get("name") else {}
    problem = Problem(name, known).replaced(**(job.parameters or {}))
    seed = engine.trained.get("seed", 0) if job.operator_seed is None else job.operator_seed
    return _Operators(problem, int(seed))


def _check_operator_is_known(job: ReconstructionJob, operators: _Operators) -> None:
    """A measurement needs the random operator it was made with; another one would be believed silently."""
    name, drawn = operators.problem.name, operators.kind.drawn
    if not drawn or job.operator_seed is not None:
        return
    if drawn not in operators.kind.parameters:
        raise ValueError(
            f"measurements of {name} need the {drawn} they were made with: give the operator_seed it was drawn with"
        )
    if operators.problem.parameters.get(drawn) is None:
        raise ValueError(
            f"measurements of {name} need the {drawn} they were made with: give parameter {drawn} (an .npy file), "
            "or the operator_seed it was drawn with"
        )


def _check_level_is_known(job: ReconstructionJob, engine: _Engine) -> None:
    """A network that is told the level reconstructs at any other one too, and wrongly."""
    if getattr(engine.parts["model"], "levels", None) is None:
        return
    if not {"sigma", "noise_norm"} & {*(job.parameters or {}), *engine.trained.get("parameters", {})}:
        raise ValueError(
            f"{engine.label} is told the noise level of a measurement: give parameter sigma, its standard deviation "
            "where images lie in [0, 1]"
        )


def _n_channels(model: Any) -> int:
    if isinstance(model, Flow):
        return model.n_channels
    card = getattr(model, "card", None)
    if card is None:
        return 3
    trained_on = card.training.get("recipe", {}).get("data", {})  # a ResNet or U-Net does not tell
    return int(card.preprocessing.get("channels") or trained_on.get("channels") or 3)


# Inputs --------------------------------------------------------------------------------------------------------------


def _load_batch(path: Path, job: ReconstructionJob, operators: _Operators, engine: _Engine) -> Tensor:
    """The measurements of an array, (B, ...)."""
    if operators.kind.measures_pictures:
        return load_measurement(path, engine.channels)
    shape = _hidden_shape(job, engine, str(path))
    try:
        physics = operators.make(shape, job.device)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return load_array(path, measurement_shape(physics, shape, device=job.device))


def _hidden_shape(job: ReconstructionJob, engine: _Engine, where: str) -> tuple[int, int, int]:
    """(C, H, W) of an image of which only a measurement in another form is known."""
    size = tuple(job.size or ())
    if len(size) not in (0, 2, 3) or any(side < 1 for side in size):
        raise ValueError(f"size must be two positive numbers, height and width, or three with the channels; got {size}")
    if len(size) == 3:
        return size[0], size[1], size[2]
    if not size and engine.image_shape is None:
        raise ValueError(f"{where} does not tell the size of the image behind it; give size, height and width")
    channels = engine.channels or 3
    return (channels, *size) if size else engine.image_shape  # type: ignore[return-value]


def _read(
    image: Input, job: ReconstructionJob, operators: _Operators, engine: _Engine
) -> tuple[Tensor, tuple[int, ...]]:
    """The input (1, ...), and the shape (C, H, W) of the image that is to be found."""
    channels = engine.channels
    if image.is_measurement:
        if not operators.kind.measures_pictures and image.part is None:
            raise ValueError(f"{image.path}: measurements of {operators.problem.name} are arrays; give an .npy file")
        y = load_measurement(image.path, channels) if image.part is None else image.part
        if not operators.kind.measures_pictures:
            return y, _hidden_shape(job, engine, image.label)
        factor = int(operators.problem.parameters.get(operators.kind.magnification, 1))
        return y, (y.shape[1], y.shape[2] * factor, y.shape[3] * factor)
    x = load_image(image.path)
    if channels is not None and x.shape[0] > channels:
        raise ValueError(f"{image.path} has {x.shape[0]} channels but the model takes {channels}; convert it to gray")
    x = (x if channels is None else x.expand(channels, -1, -1))[None]
    return x, tuple(x.shape[1:])


def _check(image: Input, job: ReconstructionJob, operators: _Operators, engine: _Engine) -> None:
    _, shape = _read(image, job, operators, engine)
    (_, height, width), divisor, name = shape, engine.divisor, operators.problem.name
    misfit = height % divisor or width % divisor
    if misfit and (not job.pad or operators.kind.extend is None):
        remedy = "allow padding (--pad) or crop it" if operators.kind.extend else f"{name} allows no padding: crop it"
        raise ValueError(
            f"{image.label} has size {height}x{width}, and the model needs multiples of {divisor}; {remedy}"
        )
    try:
        physics = operators.make(shape, job.device)
        engine.make(job, operators.problem, measurement_shape(physics, shape, device=job.device))  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"{image.label}: {error}") from error


# One image -----------------------------------------------------------------------------------------------------------


def _reconstruct(
    image: Input, job: ReconstructionJob, operators: _Operators, engine: _Engine, folder: Path
) -> dict[str, Any]:
    given, shape = _read(image, job, operators, engine)
    given = given.to(job.device)
    physics = operators.make(shape, job.device)
    seed = image_seed(job.seed, image.path.stem)
    y = given if image.is_measurement else measure_each(given, physics, [seed])
    method = engine.make(job, operators.problem, y.shape[1:])
    try:
        fitted = _fitted(y, physics, shape, operators.kind, engine.divisor)
        _wait(y)
        started = time.perf_counter()
        try:
            outcome = run_method(method, fitted.y, fitted.physics)
        except SolverInterrupted as error:  # of a long solve the best so far is worth keeping
            outcome = outcome_of(error.solution)
        _wait(y)
        seconds = time.perf_counter() - started
    except NonFiniteError as error:
        raise NonFiniteError(f"{image.label}: {error}") from error
    except ValueError as error:  # what only the method can tell
        raise ValueError(f"{image.label}: {error}") from error
    x_hat = outcome.estimate[..., fitted.rows, fitted.columns]
    if not torch.isfinite(x_hat).all():
        raise NonFiniteError(f"{image.label}: the reconstruction is not finite; the measurement may be unlike training")
    write_picture(x_hat.cpu(), folder, image.name)
    write = write_picture if operators.kind.measures_pictures else write_array
    write(y.cpu(), folder / "measurements", image.name)
    if outcome.deviation is not None:
        (folder / "deviations").mkdir(exist_ok=True)
        write_array(outcome.deviation[..., fitted.rows, fitted.columns].cpu(), folder / "deviations", image.name)
    record: dict[str, Any] = {
        "input": image.label,
        "image": image.name,
        "problem": operators.problem.label,
        "method": engine.label,
        **engine.facts,
        "height": shape[1],
        "width": shape[2],
        "seconds": seconds,
        **outcome.facts[0],
    }
    if operators.kind.drawn:
        record["operator_seed"] = operators.seed
    if image.is_measurement:
        return record
    return record | {"seed": seed} | _figures(x_hat.cpu(), given.cpu(), operators.kind.loses_scale)


def _fitted(y: Tensor, physics: Physics, shape: Sequence[int], kind: ProblemKind, divisor: int) -> Fitted:
    if kind.extend is None or (shape[-2] % divisor == 0 and shape[-1] % divisor == 0):
        return Fitted(y, physics, slice(0, shape[-2]), slice(0, shape[-1]))  # type: ignore[arg-type]
    return kind.extend(y, physics, divisor)  # type: ignore[arg-type]


def _figures(x_hat: Tensor, x: Tensor, up_to_scale: bool) -> dict[str, Any]:
    """PSNR and SSIM; signs do not tell the scale of the image, so that there the estimate is scaled to fit."""
    if up_to_scale:
        return _figures(best_scaled(x_hat, x), x, False) | {"scaled_to_fit": True}
    figures = {"psnr": float(psnr(x_hat, x))}
    return figures | ({"ssim": float(ssim(x_hat, x))} if min(x.shape[-2:]) >= 11 else {})


def _wait(y: Tensor) -> None:
    if y.is_cuda:
        torch.cuda.synchronize(y.device)


def _remove_unfinished(folder: Path, finished: set[str]) -> None:
    """Delete what was written of an image that has no record."""
    for path in (*folder.glob("*/*"), *folder.glob("*")):
        if path.suffix in (".png", ".npy") and path.stem not in finished:
            path.unlink()
