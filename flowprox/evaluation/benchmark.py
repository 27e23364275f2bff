"""Methods x problems x images in one loop, recorded as it goes.

    y_i = A x_i + noise_i  ->  x_hat_i = method(y_i)  ->  PSNR, SSIM, residual, seconds, peak memory

The noise of image i depends on the run's seed and the image's name alone: every method, problem, batch and run sees the
same. Results stand in a folder:

    recipe.yaml     what was run, with the published figures
    records.jsonl   one line per problem, method and image; while the run goes on, records.jsonl.partial
    tuning.jsonl    one line per problem, method and combination of the options that are tuned
    images/         pictures of the first images, for the report

A run that was interrupted is continued by the same command. What is already recorded is recognised by ``id``, a hash of
everything it depends on, so images, problems and methods may also be added later. Failures are tried again.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import deepinv
import torch
from deepinv.models import Reconstructor
from deepinv.physics import Physics
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from flowprox import __version__
from flowprox.checkpoints import load_card, load_model
from flowprox.data import ImageDataset, save_image
from flowprox.evaluation.metrics import best_scaled, psnr, ssim
from flowprox.evaluation.plan import AS_WRITTEN, Case, at_scale, combinations, planned
from flowprox.evaluation.recipe_file import write_recipe
from flowprox.evaluation.records import RecordWriter
from flowprox.evaluation.report import picture_path, truth_path
from flowprox.evaluation.resources import measured_cost
from flowprox.evaluation_options import SAMPLES, EvaluationOptions, ImageOptions
from flowprox.methods import make_method, run_method
from flowprox.noise import NOISES
from flowprox.operators import OneBitSensing, make_physics, measure_each, measurement_shape
from flowprox.reconstruction import image_seed
from flowprox.samples import SAMPLES_FOLDER

__all__ = ["EvaluationInterrupted", "RunOptions", "evaluate"]

_SSIM_SIDE = 11


@dataclass
class RunOptions:
    """How an evaluation is run.

    Arguments:
        scale: "smoke" (seconds, on the pictures that ship), "small" (the recipe as written) or a scale of the recipe.
        limit: use only the first so many images; None leaves it to the recipe.
        seed: of the noise.
        device: where the methods run.
        n_pictures: of so many images pictures are written.
        console: for the progress; None is standard error.
    """

    scale: str = AS_WRITTEN
    limit: int | None = None
    seed: int = 0
    device: str = "cpu"
    n_pictures: int = 4
    console: Console | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be positive, got {self.limit}")


class EvaluationInterrupted(KeyboardInterrupt):
    """The run was interrupted; what is finished is recorded."""


class _Image(NamedTuple):
    name: str
    x: Tensor  # (C, H, W)
    seed: int
    hash: str


def evaluate(recipe: EvaluationOptions, out: str | Path, run: RunOptions | None = None) -> list[dict[str, Any]]:
    """Run an evaluation, or what is left of it.

    Arguments:
        recipe: images, problems, methods.
        out: folder of the results; one that holds an earlier run of the same recipe is continued.
        run: scale, seed, device.

    Returns:
        the records of this recipe, in its order, those of earlier runs included. A method that failed on an image has
        one with the key failed in the place of the figures.

    Raises:
        ValueError, OSError: before anything runs: something in the recipe does not fit, or images cannot be read.
        EvaluationInterrupted: on Ctrl-C; the message says how far it came.
    """
    run = run or RunOptions()
    scaled = at_scale(recipe, run.scale)
    return _Evaluation(scaled, planned(scaled), Path(out), run).run(as_written=recipe)


class _Evaluation:
    """One run: what it has loaded, where it writes, how far it is."""

    def __init__(self, recipe: EvaluationOptions, cases: Sequence[Case], out: Path, run: RunOptions) -> None:
        self.recipe, self.cases, self.out, self.options = recipe, cases, out, run
        self.console = run.console or Console(stderr=True)
        self.models: dict[str, Any] = {}
        self._last: tuple[str, Physics] | None = None
        self.hashes: dict[str, str] = {}
        for case in cases:
            for name in (case.method.flow, case.method.model, case.method.noise):
                if _is_model(name) and name not in self.hashes:
                    self.hashes[name] = load_card(name).sha256[:16]
        tuned = any(case.method.tune for case in cases)
        self.images = _load(recipe.images, run.seed, run.limit)
        self.tune_images = _load(recipe.tune_images, run.seed, None) if tuned and recipe.tune_images else []
        self._check_methods()

    def _check_methods(self) -> None:
        """Make every method and operator once, so that a mistake is found before the first hour of work."""
        for case in self.cases:
            self._physics(case, self.images[0])
            grid = combinations({key: values[:1] for key, values in case.method.tune.items()})
            self._make(case, grid[0])

    def _check_earlier(self, records: Sequence[Mapping[str, Any]]) -> None:
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

    def run(self, as_written: EvaluationOptions) -> list[dict[str, Any]]:
        self.out.mkdir(parents=True, exist_ok=True)
        self._write_truth()
        n_units = len(self.cases) * len(self.images)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with (
            Progress(*columns, TimeRemainingColumn(), console=self.console, transient=True) as progress,
            RecordWriter(self.out / "tuning.jsonl", resume=True) as tuning,
            RecordWriter(self.out / "records.jsonl", resume=True, keep=_is_success) as records,
        ):
            self._check_earlier(records.records)
            write_recipe(as_written, self.out / "recipe.yaml")
            task = progress.add_task("", total=n_units)
            done = {record["id"]: record for record in records.records}
            try:
                for case in self.cases:
                    progress.update(task, description=f"{case.problem.label}: {case.method.label}")
                    self._run_case(case, done, tuning, records, lambda n: progress.advance(task, n))
            except KeyboardInterrupt as error:
                n_done = sum(1 for i in self._ids() if i in done)
                raise EvaluationInterrupted(
                    f"{n_done} of {n_units} reconstructions are recorded in {self.out}; "
                    "the same command continues the run"
                ) from error
        if not tuning.records:
            (self.out / "tuning.jsonl").unlink()
        return [done[i] for i in self._ids() if i in done]

    def _ids(self) -> Iterator[str]:
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
        physics = self._physics(case, missing[0])
        try:
            chosen = self._tuned(case, physics, tuning)
            method = self._make(case, chosen)
        except Exception as error:  # one method must not end the others' run; the message is recorded
            failures = [self._record(case, identity, image, {}) | _failure(error) for image in missing]
            for record in failures:
                records.write(record)
                done[record["id"]] = record
            return advance(len(missing))
        for start in range(0, len(missing), case.method.batch_size):
            batch = missing[start : start + case.method.batch_size]
            for image, facts, x_hat in self._attempt(method, physics, batch):
                record = self._record(case, identity, image, chosen) | facts
                if x_hat is not None and image.name in self._pictured():
                    self._write_picture(case, image, x_hat)
                records.write(record)
                done[record["id"]] = record
                advance(1)

    def _attempt(
        self, method: Reconstructor, physics: Physics, batch: Sequence[_Image]
    ) -> list[tuple[_Image, dict[str, Any], Tensor | None]]:
        """The estimates and their figures; a batch that fails is repeated image by image."""
        x = torch.stack([image.x for image in batch]).to(self.options.device)
        y = measure_each(x, physics, [image.seed for image in batch])
        try:
            with measured_cost(self.options.device) as cost:
                x_hat, facts, _ = run_method(method, y, physics)
            figures = _figures(x_hat, x, y, physics)
        except Exception as error:  # recorded, and the run ends with status 1
            if len(batch) > 1:
                return [one for image in batch for one in self._attempt(method, physics, [image])]
            return [(batch[0], _failure(error), None)]
        shared = {
            "seconds": cost.seconds / len(batch),
            "peak_memory_mib": cost.peak_memory_mib,
            "batch": len(batch),
            "device": self.options.device,
        }
        return [
            (image, figure | shared | fact, estimate)
            for image, figure, fact, estimate in zip(batch, figures, facts, x_hat.cpu(), strict=True)
        ]

    def _tuned(self, case: Case, physics: Physics, tuning: RecordWriter) -> dict[str, Any]:
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
                record = self._score(case, physics, values) | {"id": _hash(identity)}
                tuning.write(record)
            scores.append(-math.inf if record["psnr"] is None else float(record["psnr"]))
        best = max(range(len(grid)), key=scores.__getitem__)
        if scores[best] == -math.inf:
            raise ValueError(f"no combination of {', '.join(case.method.tune)} gave a finite result; see tuning.jsonl")
        self._warn_at_end(case, grid[best])
        return grid[best]

    def _score(self, case: Case, physics: Physics, values: Mapping[str, Any]) -> dict[str, Any]:
        method = self._make(case, values)
        found: list[tuple[_Image, dict[str, Any], Tensor | None]] = []
        for start in range(0, len(self.tune_images), case.method.batch_size):
            found += self._attempt(method, physics, self.tune_images[start : start + case.method.batch_size])
        figures = [facts.get("psnr") for _, facts, _ in found]
        failures = [facts["failed"] for _, facts, _ in found if "failed" in facts]
        known = [figure for figure in figures if figure is not None]
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

    def _physics(self, case: Case, image: _Image) -> Physics:
        """The operator of a problem; the last one is kept, for a sensing matrix takes seconds to draw."""
        if self._last is None or self._last[0] != case.problem.label:
            shape = (image.x.shape[0], image.x.shape[1], image.x.shape[2])
            physics = make_physics(case.problem.problem, shape, seed=case.problem.seed, device=self.options.device)
            self._last = (case.problem.label, physics)
        return self._last[1]

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
        self, case: Case, identity: Mapping[str, Any], image: _Image, chosen: Mapping[str, Any]
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

    def _write_picture(self, case: Case, image: _Image, x_hat: Tensor) -> None:
        save_image(x_hat, picture_path(self.out, case.problem.label, image.name, case.method.label))


# Images and figures --------------------------------------------------------------------------------------------------


def _load(options: ImageOptions, seed: int, limit: int | None) -> list[_Image]:
    source = [SAMPLES_FOLDER / "*.png"] if options.source == SAMPLES else options.source
    n = min((n for n in (options.limit, limit) if n is not None), default=None)
    dataset = ImageDataset(source, options.image_size, options.split, channels=options.channels, limit=n)
    images = []
    for i, name in enumerate(_short_names(dataset.names)):
        content = hashlib.blake2b(dataset.images[i].numpy().tobytes(), digest_size=8).hexdigest()
        images.append(_Image(name, dataset[i]["x"], image_seed(seed, name), content))
    return images


def _short_names(names: Sequence[str]) -> list[str]:
    """File names without folders and suffixes where that leaves them distinct."""
    short = [Path(name).stem if "[" not in name else Path(name).name for name in names]
    if len(set(short)) == len(short):
        return short
    longer = ["/".join(Path(name).parts[-2:]) for name in names]
    return longer if len(set(longer)) == len(longer) else [f"{i}-{name}" for i, name in enumerate(short)]


def _figures(x_hat: Tensor, x: Tensor, y: Tensor, physics: Physics) -> list[dict[str, Any]]:
    """Per image: PSNR clipped and not, SSIM, and the root mean square of y - A x_hat.

    One-bit measurements say nothing about brightness, so that every method's estimate is scaled to fit the truth first.
    """
    if x_hat.shape != x.shape:
        raise ValueError(f"the estimate has shape {tuple(x_hat.shape)}, the images {tuple(x.shape)}")
    if not torch.isfinite(x_hat).all():
        raise ArithmeticError("the estimate is not finite")
    with torch.no_grad():
        residual = (y - physics.A(x_hat)).abs().flatten(1).square().mean(1).sqrt()
    if isinstance(physics, OneBitSensing):
        x_hat = best_scaled(x_hat, x)
    columns: dict[str, Tensor] = {"psnr": psnr(x_hat, x), "psnr_unclipped": psnr(x_hat, x, clip=False)}
    if min(x.shape[-2:]) >= _SSIM_SIDE:
        columns["ssim"] = ssim(x_hat, x)
    columns["residual"] = residual
    lists = {key: values.cpu().tolist() for key, values in columns.items()}
    return [{key: values[i] for key, values in lists.items()} for i in range(len(x))]


def _is_model(name: Any) -> TypeGuard[str]:
    return isinstance(name, str) and name not in NOISES


def _failure(error: Exception) -> dict[str, str]:
    return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())}"}


def _is_success(record: Mapping[str, Any]) -> bool:
    return "failed" not in record


def _id(identity: Mapping[str, Any], image: _Image) -> str:
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
