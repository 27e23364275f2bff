"""A method applied to files, into a folder that fills as they are finished."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from deepinv.models import Reconstructor
from deepinv.physics import LinearPhysics, Physics
from rich.console import Console
from torch import Tensor, nn

from flowprox.checkpoints import load_model
from flowprox.data import load_array, load_image, load_measurement, save_image
from flowprox.estimates import (
    Doubts,
    Estimate,
    calibration_of,
    channels_of,
    divisor_of,
    doubts_of,
    estimate,
    problem_of,
)
from flowprox.evaluation.plan import image_seed
from flowprox.evaluation.run import hashed, progress_bar
from flowprox.files import check_place, sha256, sole_writer
from flowprox.flows import Flow
from flowprox.methods import METHODS, check_options, make_method
from flowprox.noise import NOISES
from flowprox.operators import PROBLEMS, Problem, make_physics, measure_each, measured_part, measurement_shape
from flowprox.reconstruction.files import (
    Input,
    earlier_records,
    list_inputs,
    remove_image,
    results_folder,
    write_array,
    write_deviation,
    write_picture,
    write_volumes,
)
from flowprox.records import Record
from flowprox.uncertainty import Intervals
from flowprox.unfolding import ConditionalDensity, Unfolded

DEFAULT_FLOW = "glow-faces64"
_HELD = 2**27  # pixels that are held between their check and their turn


@dataclass
class ReconstructionJob:
    """What to reconstruct, with what, from what; fields as in ``flowprox.commands.reconstruct.ReconstructOptions``, but:

    Arguments:
        problem: name of the measurement problem; None takes the one in the model's card.
        parameters: of the problem, where they differ. Without another problem those of the card hold otherwise.
        measured: image files are measurements (True), or clean images, which are measured first (False). None takes them
            for measurements where the model is used by itself and they can be. Arrays always are.
        method: a key of ``flowprox.methods.METHODS``; None is "unfolded", which needs a model.
        flow: the prior, for methods that need one; None takes the shipped one.
        noise: density of the noise, for methods that take one: see ``flowprox.methods.make_method``.
        options: of the method.
        size: (H, W) or (C, H, W) of the image behind measurements that do not show it; None takes that of the flow.
    """

    model: str | None = None
    problem: str | None = None
    parameters: Mapping[str, Any] | None = None
    measured: bool | None = None
    seed: int = 0
    operator_seed: int | None = None
    pad: bool = True
    device: str = "cpu"
    method: str | None = None
    flow: str | None = None
    noise: str | Mapping[str, Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    size: Sequence[int] | None = None
    intervals: str | None = None
    samples: int = 0


class ReconstructionInterrupted(KeyboardInterrupt):
    """Ctrl-C; what is finished has been kept, and the message says how much that is."""


def reconstruct_files(
    job: ReconstructionJob,
    inputs: Sequence[str | Path],
    out: str | Path,
    *,
    overwrite: bool = False,
    console: Console | None = None,
) -> list[Record]:
    """Reconstruct files into a folder; what is finished there is not done again.

    For input a.png it holds ``a.png`` (of its bits and opacity), ``a.npy`` (float32 (C, H, W), not clipped), the measurement
    likewise in ``measurements`` (as a picture where it is one), and a line of ``records.jsonl``; from a
    method that tells how sure it is also the standard deviation of each pixel, ``deviations/a.npy``, and ``a.png``, where
    white is the highest; with intervals their ends ``lower/a.npy`` and ``upper/a.npy``, and likewise
    ``half-widths/a.npy`` and ``a.png``; with samples ``samples/a/0.png``, ... and their deviations. Each file appears whole.
    Inputs of equal names become a, a-2, ...; the images of an array (B, ...) a-0, a-1, .... Every input is read and checked
    before the first is reconstructed.

    Arguments:
        job: method, problem and settings.
        inputs: image files, stacks of slices (``flowprox.data.load_stack``), measured arrays
            (``flowprox.data.load_measurement``, ``load_array``) and folders of these, whose subfolders are not entered.
        out: folder for the results, empty, or that of an earlier run of the same job, which is continued.
        overwrite: remove the images of an earlier job from it and begin anew.
        console: for the progress; None shows none.

    Returns:
        one record per image: input, image (its name in ``out``), problem, parameters, method, measured, assumed (what was
        not given), height, width, seconds; for inputs that were clean images also the figures and seed; what the solver
        tells: reason, n_evaluations, gamma; residual_p_value, of white Gaussian noise; alarm of a calibrated network: raised,
        and p-values by name, see ``flowprox.uncertainty.alarm``; intervals: alpha, calibration (name), sha256,
        mean_half_width, and coverage where the truth is known.

    Raises:
        ValueError: an input, a parameter or the model does not fit, or ``out`` holds the results of another job; the
            message names it.
        OSError: a file cannot be read, ``out`` holds other files or cannot be written.
        NonFiniteError, MemoryError: the method diverged on an image, or it is too large; the message names it. After these
            ``out`` holds the images that are finished, and the same call continues.
        ReconstructionInterrupted: on Ctrl-C after the first image, or within the run of a solver, whose best estimate so
            far is kept and whose record says so (reason "interrupted").
    """
    out = Path(out).absolute()
    check_place(out)
    with sole_writer(out):
        earlier = [] if overwrite else earlier_records(out)
        task = _Task(job)
        names = {str(record["input"]): str(record["image"]) for record in earlier}
        images = list_inputs(inputs, task.measured, task.load_batch, names)
        task.check(images)
        if any(record.get("job") != task.hash for record in earlier):
            raise ValueError(f"{out} holds results of another job; choose another out, or overwrite them")
        finished: dict[str, Record] = {}
        shown = progress_bar(console or Console(quiet=True))
        with results_folder(out, overwrite) as records, shown:
            done = {str(record["id"]): record for record in records.records if record.get("reason") != "interrupted"}
            bar = shown.add_task("", total=len(images))
            try:
                for i, image in enumerate(images):
                    shown.update(bar, description=image.name[:40], completed=i)
                    key = {"id": hashed({"job": task.hash, "input": image.label}), "content": sha256(image.path)[:16]}
                    record = done.get(key["id"], {})
                    if record.get("content") != key["content"]:
                        y, x, physics = task.measurement(image)
                        show = partial(lambda before, n, n_most: shown.update(bar, completed=before + n / n_most), i)
                        (found,) = estimate(task.method(y.shape[1:]), y, physics, task.kind, x, show, task.doubts)
                        half_width = task.half_width(found.x_hat, y, physics)
                        if task.density is not None:
                            found = task.with_samples(image, found, y, physics, out)
                        if image.is_measurement:
                            found, half_width = _of_its_size(found, half_width, y, physics)
                        record = key | task.write(image, y[0], found, half_width, out)
                        record |= task.interval(found, half_width, x)
                        records.write(record)
                    finished[image.label] = record
                    if record.get("reason") == "interrupted":
                        raise KeyboardInterrupt
            except KeyboardInterrupt as error:
                if not finished:
                    raise KeyboardInterrupt("no image is finished, nothing is written") from error
                raise ReconstructionInterrupted(_progress(finished, images, out)) from error
            except Exception as error:
                after = f"; {_progress(finished, images, out)}" if finished else ""
                raise _explained(error, images[len(finished)].label, after) from error
            write_volumes(images, out)
    return list(finished.values())


def _of_its_size(
    found: Estimate, half_width: Tensor | None, y: Tensor, physics: Physics
) -> tuple[Estimate, Tensor | None]:
    """What is shown of a measurement's estimate, and of its intervals: as much as was measured."""
    parts = (found.x_hat, found.deviation, half_width)
    x_hat, deviation, half_width = (part if part is None else measured_part(part, y, physics) for part in parts)
    assert x_hat is not None
    return found._replace(x_hat=x_hat, deviation=deviation), half_width


def _is_file(value: object) -> bool:
    return isinstance(value, str | Path) and Path(value).is_file()


def _progress(found: Mapping[str, Record], images: Sequence[Input], out: Path) -> str:
    return f"{len(found)} of {len(images)} images are finished, in {out}; the same command continues"


def _explained(error: Exception, label: str, after: str) -> Exception:
    """The error with the image and how far the run came; memory that does not suffice is a ``MemoryError``."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "memory" in str(error).lower():
        reason = next(iter(str(error).splitlines()), "") or "out of memory"
        return MemoryError(f"{label}: not enough memory ({reason[:120]}); crop or shrink the image{after}")
    if isinstance(error, OSError) and error.strerror:
        return type(error)(error.errno, f"{error.strerror}{after}", error.filename or label)
    if isinstance(error, ValueError | ArithmeticError):
        return type(error)(f"{label}: {error}{after}")
    return error


class _Task:
    """A job with all it needs: the method's parts, the problem, and what they demand of an image."""

    def __init__(self, job: ReconstructionJob) -> None:
        self.job, self.name = job, job.method or "unfolded"
        if job.method is None and job.model is None:
            raise ValueError(f"give a method, one of {', '.join(METHODS)}, or a model, which means unfolded")
        if self.name == "unfolded" and job.model is None:
            raise ValueError(
                "method unfolded needs model: a shipped one (see flowprox models), a folder or hf:ORG/NAME"
            )
        if job.samples < 0 or job.samples == 1:
            raise ValueError(f"samples must be at least 2, or 0 for none, got {job.samples}: one shows no spread")
        check_options(self.name, job.options)
        missing = METHODS[self.name].missing({"flow": job.flow, "model": job.model}) or ""
        flow = DEFAULT_FLOW if "flow" in missing.split(" or ") else job.flow
        names = {"flow": flow, "model": job.model, "noise": job.noise}
        self.parts = {
            part: load_model(name, device=job.device) if isinstance(name, str) and name not in NOISES else name
            for part, name in names.items()
        }
        if isinstance(self.parts["noise"], Flow):
            raise ValueError(
                f"noise {job.noise!r} is a flow of images; train one on noise (train-flow with noise), or give one of "
                f"{', '.join(NOISES)}"
            )
        card: Any = getattr(self.parts["model"], "card", None)
        self.trained: Mapping[str, Any] = getattr(card, "problem", None) or {}
        self.sha256 = str(getattr(card, "sha256", ""))
        self.label = card.name if self.name == "unfolded" and card is not None else self.name
        named = {key: value for key, value in {**names, "options": dict(job.options)}.items() if value}
        self.facts: Record = {} if self.name == "unfolded" else named
        source = self.parts["flow"] if self.parts["flow"] is not None else self.parts["model"]
        self.channels = channels_of(source) or 3 if isinstance(source, nn.Module) else None
        self.image_shape: tuple[int, int, int] | None = getattr(source, "image_shape", None)
        self.problem = problem_of(self.trained, job.problem, dict(job.parameters or {}), self.label)
        self.operator_seed = int(self.trained.get("seed", 0) if job.operator_seed is None else job.operator_seed)
        self.kind = PROBLEMS[self.problem.name]
        self.measured = job.method is None and self.kind.measures_pictures if job.measured is None else job.measured
        self.assumed: list[str] = []
        self.intervals: Intervals | None = None
        if job.intervals is not None:
            if self.name != "unfolded":
                raise ValueError(
                    f"intervals are of a trained network by itself, not of method {self.name}; leave one out"
                )
            self.intervals = load_model(job.intervals, device=job.device)
            if not isinstance(self.intervals, Intervals):
                kind = type(self.intervals).__name__
                raise ValueError(f"intervals {job.intervals!r} is a {kind}; make some with flowprox calibrate")
        self.doubts: Doubts | None = None
        self.density: ConditionalDensity | None = None
        self._physics: tuple[tuple[int, ...], Physics] | None = None
        self._methods: dict[tuple[int, ...] | None, Reconstructor] = {}
        self._held: dict[str, Tensor] = {}

    @cached_property  # once the inputs are checked the problem stays
    def hash(self) -> str:
        """Of all that a reconstruction depends on apart from its input."""
        models = {part: getattr(getattr(model, "card", None), "sha256", model) for part, model in self.parts.items()}
        files = {key: sha256(Path(one)) for key, one in self.problem.parameters.items() if _is_file(one)}
        problem = {"name": self.problem.name, **self.problem.parameters, **files}
        job = {key: getattr(self.job, key) for key in ("seed", "size")}
        job |= {"options": dict(self.job.options), "measured": self.measured}
        if self.intervals is not None:
            models["intervals"] = self.intervals.card.sha256
        if self.job.samples:
            job["samples"] = self.job.samples
        return hashed({"method": self.name, "problem": problem, "operator": self.operator_seed, **models, **job})

    def physics(self, shape: tuple[int, ...]) -> Physics:
        """The operator for images (C, H, W); the last one is kept."""
        if self._physics is None or self._physics[0] != shape:
            physics = make_physics(self.problem, shape, seed=self.operator_seed, device=self.job.device)  # type: ignore[arg-type]
            self._physics = (shape, physics)
        return self._physics[1]

    def method(self, shape: Sequence[int]) -> Reconstructor:
        """The method for measurements of a shape, made once; only a noise by name asks for the shape."""
        key = tuple(shape) if isinstance(self.job.noise, Mapping) or self.job.noise in NOISES else None
        if key not in self._methods:
            self._methods[key] = make_method(
                self.name, self.problem, **self.parts, shape=shape, device=self.job.device, **self.job.options
            )
        return self._methods[key]

    # Inputs -----------------------------------------------------------------------------------------------------------

    def load_batch(self, path: Path) -> Tensor:
        """The measurements of an array, (B, ...)."""
        if self.kind.measures_pictures:
            return load_measurement(path, self.channels)
        shape = self._hidden_shape(str(path))
        try:
            physics = self.physics(shape)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return load_array(path, measurement_shape(physics, shape, device=self.job.device))

    def _hidden_shape(self, where: str) -> tuple[int, int, int]:
        """(C, H, W) of an image of which only a measurement in another form is known."""
        size = tuple(self.job.size or ())
        if len(size) not in (0, 2, 3) or any(side < 1 for side in size):
            raise ValueError(
                f"size must be two positive numbers, height and width, or three with the channels; got {size}"
            )
        if not size and self.image_shape is None:
            raise ValueError(f"{where} does not tell the size of the image behind it; give size, height and width")
        shape = (self.channels or 3, *size) if len(size) == 2 else (size or self.image_shape)
        return shape  # type: ignore[return-value]

    def check(self, images: Sequence[Input]) -> None:
        """Read every input, and refuse what does not fit before anything is reconstructed."""
        measured = [image for image in images if image.is_measurement]
        if measured:
            self._check_problem_is_known()
        self._assume(pictures=[image for image in images if image.is_picture], measured=measured)
        ranges = {image.path: image.stack for image in images if image.stack is not None and image.stack.high != 1}
        self.assumed += [f"{path.name}: 0 is {s.low:g} in the file, 1 is {s.high:g}" for path, s in ranges.items()]
        for image in images:
            content, shape = self._read(image)
            if math.prod(content.shape) + sum(one.numel() for one in self._held.values()) < _HELD:
                self._held[image.label] = content
            try:
                y_shape = measurement_shape(self.physics(shape), shape, device=self.job.device)  # type: ignore[arg-type]
                divisor = divisor_of(self.method(y_shape))
            except ValueError as error:
                raise ValueError(f"{image.label}: {error}") from error
            (_, height, width), can_extend = shape, self.kind.extend is not None
            if (height % divisor or width % divisor) and not (self.job.pad and can_extend):
                remedy = "allow padding (--pad) or crop it"
                remedy = remedy if can_extend else f"{self.problem.name} allows no padding: crop it"
                sides = content.shape[2:] or content.shape[1:]
                behind = f" and shows an image of {height}x{width}" if (height, width) != tuple(sides) else ""
                size = "x".join(map(str, sides)) + behind
                raise ValueError(f"{image.label} has size {size}, and the model needs multiples of {divisor}; {remedy}")

    def _check_problem_is_known(self) -> None:
        """A measurement needs the random operator and the noise level it was made with; others would be believed silently."""
        name, drawn = self.problem.name, self.kind.drawn
        if drawn and self.job.operator_seed is None and self.problem.parameters.get(drawn) is None:
            own = f"parameter {drawn} (an .npy file), or " if drawn in self.kind.parameters else ""
            raise ValueError(
                f"measurements of {name} need the {drawn} they were made with: give {own}the operator_seed it was drawn with"
            )
        known = {**self.trained.get("parameters", {}), **(self.job.parameters or {})}
        is_told = getattr(self.parts["model"], "levels", None) is not None
        if is_told and all(known.get(key) is None for key in ("sigma", "noise_norm", "noise", "photons")):
            raise ValueError(
                f"{self.label} is told the noise level of a measurement: give parameter sigma, its standard deviation "
                "where images lie in [0, 1]"
            )

    def _assume(self, pictures: Sequence[Input], measured: Sequence[Input]) -> None:
        """Fill in what was not given, and say so; say too where a network is used for what it was not trained for."""
        if pictures and self.job.measured is None:
            self.assumed.append(
                "pictures are the measurements (--simulate degrades clean ones first and compares)"
                if self.measured
                else "pictures are clean: they were degraded first and compared (--measured takes them as they are)"
            )
        has_border = "boundary" in self.kind.parameters and "boundary" not in (self.job.parameters or {})
        if has_border and len({image.is_picture for image in measured}) > 1:
            raise ValueError(
                "the blur of pictures and of arrays is taken at the border in two ways: give parameter boundary"
            )
        if has_border and measured and measured[0].is_picture and self.name != "wiener":
            self.problem, self._physics = self.problem.replaced(boundary="valid"), None
            self._methods.clear()
            self.assumed.append("what lies beyond a photograph's border is not known, boundary=valid")
        elif has_border and measured:  # an array, or a method that knows no other
            self.assumed.append(
                "the blur goes round the border, boundary=circular; that of a photograph does not (valid)"
            )
        check = getattr(self.parts["model"], "check", None)
        used_for = Problem("denoising", {"sigma": 0.0}) if self.name == "plug-and-play" else self.problem
        self.assumed += [] if check is None else check(used_for)
        if self.intervals is not None:
            self.intervals.check(self.sha256, self.problem, self.operator_seed)
        network = self.parts["model"] if self.name == "unfolded" else None
        calibration = self.intervals or calibration_of(network, self.problem, self.operator_seed)
        self.doubts = doubts_of(network, calibration)
        if self.job.samples:
            if calibration is None or calibration.density is None or not isinstance(network, Unfolded):
                raise ValueError(
                    f"{self.label} has no density of {self.problem.label} to draw samples from: make one with flowprox "
                    "calibrate --samples and give it as intervals, or use method posterior, which samples with a flow"
                )
            self.density = ConditionalDensity(network, calibration.density)

    def _read(self, image: Input) -> tuple[Tensor, tuple[int, ...]]:
        """The input (1, ...), and the shape (C, H, W) of the image that is to be found."""
        if not image.is_picture and image.part is not None and not self.kind.measures_pictures:
            return image.part, self._hidden_shape(image.label)
        if image.is_measurement and not self.kind.measures_pictures:
            raise ValueError(
                f"{image.path}: measurements of {self.problem.name} are arrays; give an .npy, .mat or .h5 file"
            )
        content = image.part if image.part is not None else self._held.pop(image.label, None)
        content = load_image(image.path)[None] if content is None else content
        n_channels, height, width = content.shape[1:]
        if self.channels is not None and n_channels > self.channels:
            raise ValueError(
                f"{image.path} has {n_channels} channels but the model takes {self.channels}; convert it to gray"
            )
        content = content if self.channels is None else content.expand(-1, self.channels, -1, -1)
        if image.is_measurement and self.kind.image_size is not None:
            height, width = self.kind.image_size(height, width, self.problem.parameters)
        return content, (content.shape[1], height, width)

    # One image --------------------------------------------------------------------------------------------------------

    def measurement(self, image: Input) -> tuple[Tensor, Tensor | None, Physics]:
        """y (1, ...), the clean image (1, C, H, W) if it is known, and the operator."""
        content, shape = self._read(image)
        content, physics = content.to(self.job.device), self.physics(shape)
        if image.is_measurement:
            return content, None, physics
        return measure_each(content, physics, [self._seed(image)]), content, physics

    def _seed(self, image: Input) -> int:
        return image_seed(self.job.seed, image.path.stem)

    @torch.no_grad()
    def half_width(self, x_hat: Tensor, y: Tensor, physics: Physics) -> Tensor | None:
        """Of the intervals (C, H, W), if there are any."""
        return None if self.intervals is None else self.intervals(x_hat[None].to(y.device), y, physics)[0].cpu()

    def with_samples(self, image: Input, found: Estimate, y: Tensor, physics: Physics, out: Path) -> Estimate:
        """Draw and write the samples, with the image's seed: the estimate with their deviation."""
        assert self.density is not None and isinstance(physics, LinearPhysics)
        generator = torch.Generator().manual_seed(self._seed(image))
        samples = self.density.sample(y, physics, self.job.samples, generator)[:, 0].cpu()
        shown = measured_part(samples, y, physics) if image.is_measurement else samples
        folder = _made(out, "samples", image.name)
        for i, x in enumerate(shown):
            save_image(x, folder / f"{i}.png")
        deviation = samples.std(0)
        facts = {"samples": len(samples), "mean_deviation": float(deviation.mean())}
        return found._replace(deviation=deviation, facts=found.facts | facts)

    def interval(self, found: Estimate, half_width: Tensor | None, x: Tensor | None) -> Record:
        """What the record says of the intervals."""
        if self.intervals is None or half_width is None:
            return {}
        card, facts = self.intervals.card, {"mean_half_width": float(half_width.mean())}
        if x is not None:
            inside = (found.x_hat - x[0].cpu()).abs() <= half_width
            facts["coverage"] = float(inside.double().mean())
        return {
            "intervals": {"alpha": self.intervals.alpha, "calibration": card.name, "sha256": card.sha256[:16], **facts}
        }

    def write(self, image: Input, y: Tensor, found: Estimate, half_width: Tensor | None, out: Path) -> Record:
        """Write the image's files, or none; its record. What was measured in gray stays gray."""
        colored = half_width is not None or self.density is not None
        if image.is_measurement and not colored and y.ndim == 3 and len(y) == 3 and bool((y == y[:1]).all()):
            std = None if found.deviation is None else found.deviation.mean(0, keepdim=True)
            found, y = found._replace(x_hat=found.x_hat.mean(0, keepdim=True), deviation=std), y[:1]
        try:
            write_picture(found.x_hat, out, image.name, image.form)
            write = write_picture if self.kind.measures_pictures else write_array
            write(y.cpu(), out / "measurements", image.name)
            if found.deviation is not None:
                write_deviation(found.deviation, _made(out, "deviations"), image.name)
            if half_width is not None:
                write_array(found.x_hat - half_width, _made(out, "lower"), image.name)
                write_array(found.x_hat + half_width, _made(out, "upper"), image.name)
                write_deviation(half_width, _made(out, "half-widths"), image.name)
        except BaseException:
            remove_image(out, image.name)
            raise
        parameters = json.loads(json.dumps(self.problem.parameters, default=lambda value: type(value).__name__))
        return {
            "job": self.hash,
            "input": image.label,
            "image": image.name,
            "problem": self.problem.label,
            "parameters": {key: value for key, value in parameters.items() if value is not None},
            "method": self.label,
            **self.facts,
            "measured": image.is_measurement,
            "assumed": self.assumed,
            "height": found.x_hat.shape[1],
            "width": found.x_hat.shape[2],
            **({"operator_seed": self.operator_seed} if self.kind.drawn else {}),
            **({} if image.is_measurement else {"seed": self._seed(image)}),
            **found.facts,
        }


def _made(*parts: str | Path) -> Path:
    """A folder, made where it is missing."""
    folder = Path(*parts)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
