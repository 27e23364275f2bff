"""The loop over cases: a problem and a method, every image, recorded as it goes."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import deepinv
import torch
from deepinv.models import Reconstructor
from deepinv.physics import Physics
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from flowprox import __version__
from flowprox.checkpoints import load_card, load_model
from flowprox.data import save_image
from flowprox.evaluation.images import EvaluatedImage, figures, load_images
from flowprox.evaluation.plan import AS_WRITTEN, Case, combinations
from flowprox.evaluation.recipe_file import write_recipe
from flowprox.evaluation.report import picture_path, truth_path
from flowprox.evaluation.resources import measured_cost
from flowprox.evaluation_options import EvaluationOptions, ImageOptions
from flowprox.methods import make_method, run_method
from flowprox.noise import NOISES
from flowprox.operators import make_physics, measure_each, measurement_shape
from flowprox.operators.sizes import fit_to_divisor
from flowprox.records import RecordWriter

__all__ = ["Evaluation", "EvaluationInterrupted", "RunOptions", "is_success"]


@dataclass
class RunOptions:
    """How an evaluation is run.

    Arguments:
        scale: "smoke" (seconds, on the pictures that ship), "small" (the recipe as written) or a scale of the recipe.
        limit: use only the first so many images; None leaves it to the recipe.
        seed: of the noise.
        device: where the methods run: "cpu", "cuda" or "mps".
        devices: how many of them, or processes on the CPU; each takes whole cases of a problem and a method.
        n_pictures: of so many images pictures are written.
        console: for the progress; None is standard error.
    """

    scale: str = AS_WRITTEN
    limit: int | None = None
    seed: int = 0
    device: str = "cpu"
    devices: int = 1
    n_pictures: int = 4
    console: Console | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be positive, got {self.limit}")
        if self.devices < 1:
            raise ValueError(f"devices must be positive, got {self.devices}")
        if self.devices > 1 and ":" in self.device:
            raise ValueError(f"device {self.device!r} is a single one; with devices={self.devices} give its kind only")


class EvaluationInterrupted(KeyboardInterrupt):
    """The run was interrupted; what is finished is recorded."""


class Evaluation:
    """One run: what it has loaded, where it writes, how far it is.

    Arguments:
        recipe: at the scale of the run.
        cases: what is run of it.
        out: folder of the results.
        run: scale, seed, device.
        as_written: the recipe to leave in the folder; None leaves none.
    """

    def __init__(
        self,
        recipe: EvaluationOptions,
        cases: Sequence[Case],
        out: Path,
        run: RunOptions,
        as_written: EvaluationOptions | None = None,
    ) -> None:
        self.recipe, self.cases, self.out, self.options, self.as_written = recipe, cases, out, run, as_written
        self.console = run.console or Console(stderr=True)
        self.models: dict[str, Any] = {}
        self._last: tuple[str, tuple[int, ...], Physics] | None = None
        self.hashes: dict[str, str] = {}
        for case in cases:
            for name in (case.method.flow, case.method.model, case.method.noise):
                if _is_model(name) and name not in self.hashes:
                    self.hashes[name] = load_card(name).sha256[:16]
        tuned = any(case.method.tune for case in cases)
        self.images = _images_of("images", recipe.images, run.seed, run.limit)
        self.tune_images = []
        if tuned and recipe.tune_images:
            self.tune_images = _images_of("tune_images", recipe.tune_images, run.seed, None)
        self._check_methods()

    def _check_methods(self) -> None:
        """Make every method and operator once, so that a mistake is found before the first hour of work."""
        for case in self.cases:
            self._physics(case, self.images[0])
            grid = combinations({key: values[:1] for key, values in case.method.tune.items()})
            self._make(case, grid[0])

    def _accept_earlier(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Two different reconstructions under one name in one file would be averaged by a reader."""
        expected = {}
        for case in self.cases:
            identity = self._identity(case)
            for image in self.images:
                expected[case.problem.label, case.method.label, image.name] = _id(identity, image)
        for record in records:
            wanted = expected.get((record["problem"], record["method"], record["image"]))
            if wanted is not None and wanted != record["id"]:
                raise ValueError(
                    f"{self.out} holds {record['method']} on {record['problem']}, {record['image']}, from other options, "
                    "images, models or another seed; choose another out, or give the method another label"
                )
        if self.as_written is not None:
            write_recipe(self.as_written, self.out / "recipe.yaml")

    def begin(self) -> list[dict[str, Any]]:
        """Make the folder, or check the one that an earlier run left; the records in it, without failures."""
        self.out.mkdir(parents=True, exist_ok=True)
        self._write_truth()
        with RecordWriter(self.out / "records.jsonl", resume=True, keep=is_success) as records:
            self._accept_earlier(records.records)
        return records.records

    def unfinished(self, done: Collection[str]) -> list[Case]:
        """The cases of which a reconstruction is not among ``done``, ids."""
        return [
            case
            for case in self.cases
            for i in [self._identity(case)]
            if any(_id(i, x) not in done for x in self.images)
        ]

    def run(self) -> list[dict[str, Any]]:
        """Do what is not recorded yet; the records of all, in the recipe's order."""
        self.out.mkdir(parents=True, exist_ok=True)
        self._write_truth()
        n_units = len(self.cases) * len(self.images)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with (
            Progress(*columns, TimeRemainingColumn(), console=self.console, transient=True) as progress,
            RecordWriter(self.out / "tuning.jsonl", resume=True, keep=is_success) as tuning,
            RecordWriter(self.out / "records.jsonl", resume=True, keep=is_success) as records,
        ):
            self._accept_earlier(records.records)
            task = progress.add_task("", total=n_units)
            done = {record["id"]: record for record in records.records}
            try:
                for case in self.cases:
                    progress.update(task, description=f"{case.problem.label}: {case.method.label}")
                    self._run_case(case, done, tuning, records, lambda n: progress.advance(task, n))
            except KeyboardInterrupt as error:
                n_done = sum(1 for i in self.ids() if i in done)
                raise EvaluationInterrupted(
                    f"{n_done} of {n_units} reconstructions are recorded in {self.out}; "
                    "the same command continues the run"
                ) from error
        if not tuning.records:
            (self.out / "tuning.jsonl").unlink()
        return [done[i] for i in self.ids() if i in done]

    def ids(self) -> Iterator[str]:
        """Of every reconstruction, in the recipe's order."""
        for case in self.cases:
            identity = self._identity(case)
            for image in self.images:
                yield _id(identity, image)

    # One problem and one method --------------------------------------------------------------------------------------

    def _run_case(
        self,
        case: Case,
        done: dict[str, dict[str, Any]],
        tuning: RecordWriter,
        records: RecordWriter,
        advance: Callable[[int], Any],
    ) -> None:
        identity = self._identity(case)
        missing = [image for image in self.images if _id(identity, image) not in done]
        advance(len(self.images) - len(missing))
        if not missing:
            return
        try:
            chosen = self._tuned(case, tuning)
            method = self._make(case, chosen)
        except Exception as error:  # one method must not end the others' run; the message is recorded
            failures = [self._record(case, identity, image, {}) | _failure(error) for image in missing]
            for record in failures:
                records.write(record)
                done[record["id"]] = record
            return advance(len(missing))
        for batch in _batches(missing, case.method.batch_size):
            for image, facts, x_hat in self._attempt(case, method, batch):
                record = self._record(case, identity, image, chosen) | facts
                if x_hat is not None and image.name in self._pictured():
                    self._write_picture(case, image, x_hat)
                records.write(record)
                done[record["id"]] = record
                advance(1)

    def _attempt(
        self, case: Case, method: Reconstructor, batch: Sequence[EvaluatedImage]
    ) -> list[tuple[EvaluatedImage, dict[str, Any], Tensor | None]]:
        """The estimates and their figures, of images of one size; a batch that fails is repeated image by image."""
        x = torch.stack([image.x for image in batch]).to(self.options.device)
        try:
            physics = self._physics(case, batch[0])
            y = measure_each(x, physics, [image.seed for image in batch])
            with measured_cost(self.options.device) as cost:
                x_hat, facts = _estimate(method, y, physics, x.shape)
            found = figures(x_hat, x, y, physics)
        except Exception as error:  # recorded, and the run ends with status 1
            if len(batch) > 1:
                return [one for image in batch for one in self._attempt(case, method, [image])]
            return [(batch[0], _failure(error), None)]
        shared = {
            "seconds": cost.seconds / len(batch),
            "peak_memory_mib": cost.peak_memory_mib,
            "batch": len(batch),
            "device": self.options.device,
        }
        return [
            (image, figure | shared | fact, estimate)
            for image, figure, fact, estimate in zip(batch, found, facts, x_hat.cpu(), strict=True)
        ]

    def _tuned(self, case: Case, tuning: RecordWriter) -> dict[str, Any]:
        """The combination with the highest mean PSNR on the images for tuning; every one is recorded."""
        grid = combinations(case.method.tune)
        if len(grid) == 1:
            return grid[0]
        known = {record["id"]: record for record in tuning.records}
        scores: list[float] = []
        for values in grid:
            identity = self._identity(case) | {"combination": values, "images": [i.hash for i in self.tune_images]}
            record = known.get(_hash(identity))
            if record is None:
                record = self._score(case, values) | {"id": _hash(identity)}
                tuning.write(record)
            scores.append(-math.inf if record["psnr"] is None else float(record["psnr"]))
        best = max(range(len(grid)), key=scores.__getitem__)
        if scores[best] == -math.inf:
            raise ValueError(f"no combination of {', '.join(case.method.tune)} gave a finite result; see tuning.jsonl")
        self._warn_at_end(case, grid[best])
        return grid[best]

    def _score(self, case: Case, values: Mapping[str, Any]) -> dict[str, Any]:
        method = self._make(case, values)
        found: list[tuple[EvaluatedImage, dict[str, Any], Tensor | None]] = []
        for batch in _batches(self.tune_images, case.method.batch_size):
            found += self._attempt(case, method, batch)
        failures = [facts["failed"] for _, facts, _ in found if "failed" in facts]
        known = [facts["psnr"] for _, facts, _ in found if facts.get("psnr") is not None]
        return {
            "problem": case.problem.label,
            "method": case.method.label,
            "options": dict(values),
            "psnr": math.fsum(known) / len(known) if known and not failures else None,
            "n_images": len(found),
            "images": [image.name for image, _, _ in found],
        } | ({"failed": failures[0]} if failures else {})

    def _warn_at_end(self, case: Case, chosen: Mapping[str, Any]) -> None:
        for key, values in case.method.tune.items():
            numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
            if len(numbers) > 2 and chosen[key] in (min(numbers), max(numbers)):
                self.console.print(
                    f"{case.problem.label}: {case.method.label} is best at the end of its grid, {key}={chosen[key]}; "
                    "a wider one may be better",
                    highlight=False,
                )

    # Parts ------------------------------------------------------------------------------------------------------------

    def _physics(self, case: Case, image: EvaluatedImage) -> Physics:
        """The operator of a problem for an image's size; the last one is kept, for a sensing matrix takes seconds to draw."""
        shape = (image.x.shape[0], image.x.shape[1], image.x.shape[2])
        if self._last is None or self._last[:2] != (case.problem.label, shape):
            physics = make_physics(case.problem.problem, shape, seed=case.problem.seed, device=self.options.device)
            self._last = (case.problem.label, shape, physics)
        return self._last[2]

    def _make(self, case: Case, chosen: Mapping[str, Any]) -> Reconstructor:
        method = case.method
        return make_method(
            method.name,
            case.problem.problem,
            flow=self._model(method.flow),
            model=self._model(method.model),
            noise=self._model(method.noise),
            shape=self._measured_shape(case) if method.noise is not None else None,
            device=self.options.device,
            **{**method.options_on(case.problem), **chosen},
        )

    def _measured_shape(self, case: Case) -> tuple[int, ...]:
        channels, height, width = self.images[0].x.shape
        physics = self._physics(case, self.images[0])
        return tuple(measurement_shape(physics, (channels, height, width), device=self.options.device))

    def _model(self, name: Any) -> Any:
        """What a name stands for, loaded once; what is no model's name stands for itself."""
        if not _is_model(name):
            return name
        if name not in self.models:
            self.models[name] = load_model(name, device=self.options.device)
        return self.models[name]

    def _identity(self, case: Case) -> dict[str, Any]:
        """Everything a reconstruction depends on apart from the image."""
        method = case.method
        tuned = {"tune": {k: list(v) for k, v in method.tune.items()}} if method.tune else {}
        return {
            "problem_name": case.problem.problem.name,
            "parameters": json.loads(case.problem.problem.to_json())["parameters"],
            "operator_seed": case.problem.seed,
            "method_name": method.name,
            "label": method.label,
            "options": method.options_on(case.problem),
            "models": {
                part: self.hashes[name] if _is_model(name) else name
                for part, name in (("flow", method.flow), ("model", method.model), ("noise", method.noise))
                if name is not None
            },
        } | tuned

    def _record(
        self, case: Case, identity: Mapping[str, Any], image: EvaluatedImage, chosen: Mapping[str, Any]
    ) -> dict[str, Any]:
        method = case.method
        return {
            "id": _id(identity, image),
            "problem": case.problem.label,
            "problem_name": identity["problem_name"],
            "parameters": identity["parameters"],
            "operator_seed": case.problem.seed,
            "method": method.label,
            "method_name": method.name,
            "options": {**identity["options"], **chosen},
            "tuned": dict(chosen),
            **{part: getattr(method, part) for part in ("flow", "model", "noise") if getattr(method, part)},
            "model_hashes": identity["models"],
            "image": image.name,
            "image_hash": image.hash,
            "channels": image.x.shape[0],
            "height": image.x.shape[1],
            "width": image.x.shape[2],
            "seed": image.seed,
            "run_seed": self.options.seed,
            "recipe": self.recipe.name,
            "scale": self.options.scale,
            "version": __version__,
            "versions": _versions(),
        }

    def _pictured(self) -> set[str]:
        return {image.name for image in self.images[: self.options.n_pictures]}

    def _write_truth(self) -> None:
        if self.options.n_pictures > 0:
            (self.out / "images").mkdir(exist_ok=True)
        for image in self.images[: self.options.n_pictures]:
            save_image(image.x, truth_path(self.out, image.name))

    def _write_picture(self, case: Case, image: EvaluatedImage, x_hat: Tensor) -> None:
        save_image(x_hat, picture_path(self.out, case.problem.label, image.name, case.method.label))


def _images_of(part: str, options: ImageOptions, seed: int, limit: int | None) -> list[EvaluatedImage]:
    try:
        return load_images(options, seed, limit)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{part}.{error}; give your own images with --{part}.source, or run --scale smoke on the pictures that ship"
        ) from error


def _batches(images: Sequence[EvaluatedImage], size: int) -> Iterator[list[EvaluatedImage]]:
    """At most ``size`` images of one shape at a time."""
    shapes = dict.fromkeys(image.x.shape for image in images)
    for shape in shapes:
        alike = [image for image in images if image.x.shape == shape]
        yield from (alike[start : start + size] for start in range(0, len(alike), size))


def _estimate(
    method: Reconstructor, y: Tensor, physics: Physics, shape: Sequence[int]
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Estimates of images of that shape (B, C, H, W), and what the method says of each.

    A network that does not take their sides gets an extended measurement.
    """
    divisor = int(getattr(method, "divisor", 1))
    if not any(side % divisor for side in shape[-2:]):
        return run_method(method, y, physics)[:2]
    extended = fit_to_divisor(y, physics, divisor)  # type: ignore[arg-type]
    x_hat, facts, _ = run_method(method, extended.y, extended.physics)
    return x_hat[..., extended.rows, extended.columns], facts


def _is_model(name: Any) -> TypeGuard[str]:
    return isinstance(name, str) and name not in NOISES


def _failure(error: Exception) -> dict[str, str]:
    return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())}"}


def is_success(record: Mapping[str, Any]) -> bool:
    """Whether a record holds figures, and not the message of a failure."""
    return "failed" not in record


def _id(identity: Mapping[str, Any], image: EvaluatedImage) -> str:
    return _hash({**identity, "image": image.name, "image_hash": image.hash, "seed": image.seed})


def _hash(value: Mapping[str, Any]) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=10).hexdigest()


def _versions() -> dict[str, str]:
    return {
        "flowprox": __version__,
        "torch": torch.__version__,
        "deepinv": deepinv.__version__,
        "python": platform.python_version(),
        "platform": sys.platform,
    }
