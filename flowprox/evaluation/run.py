"""Methods x problems x images in one loop, recorded as it goes.

    y_i = A x_i + noise_i  ->  x_hat_i = method(y_i)  ->  PSNR, SSIM, residual, seconds, peak memory

The noise of image i depends on the run's seed and the image's name alone. Results stand in a folder:

    recipe.yaml     what was run, with the published figures
    records.jsonl   one line per problem, method and image, appended by all processes of the run
    tuning.jsonl    one line per problem, method and combination of the options that are tuned
    images/         pictures of the first images, for the report
    unfinished      there until the run has ended

A run that was interrupted is continued by the same command. What is recorded is recognized by ``id``, a hash of everything it
depends on, so images, problems and methods may be added later. Failures are tried again. A method whose package or trained
network is missing is recorded as "not run".
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import deepinv
import torch
from deepinv.models import Reconstructor
from deepinv.physics import LinearPhysics, Physics
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.multiprocessing.spawn import ProcessException, spawn

from flowprox import __version__
from flowprox.checkpoints import CheckpointError, load_card, load_model
from flowprox.data import save_image
from flowprox.data.datasets import check_apart
from flowprox.estimates import estimate
from flowprox.evaluation.plan import Case, EvaluatedImage, at_scale, combinations, load_images, planned, write_recipe
from flowprox.evaluation.report.pictures import HALF_WIDTHS, picture_path, truth_path
from flowprox.files import refuse_foreign, remove_temporaries, sole_writer
from flowprox.methods import make_method
from flowprox.naming import Values, printable, require_device
from flowprox.operators import PROBLEMS, make_physics, measure_each, measurement_shape
from flowprox.options import SAMPLES, EvaluationOptions, ImageOptions
from flowprox.records import NOT_RUN, UNFINISHED, Record, RecordWriter, read_records, write_records
from flowprox.uncertainty import Intervals, calibration_records


class EvaluationInterrupted(KeyboardInterrupt):
    """The run was interrupted; what is finished is recorded."""


def evaluate(options: EvaluationOptions, console: Console | None = None) -> list[Record]:
    """Run an evaluation, or what is left of it.

    Arguments:
        options: images, problems, methods, and how they are run; the folder ``out`` may hold an earlier run.
        console: for the progress; None is standard error.

    Returns:
        the records of this recipe, in its order, those of earlier runs included. A method that failed on an image has
        one with the key failed in the place of the figures.

    Raises:
        ValueError, OSError: before anything runs: something in the recipe does not fit, images cannot be read, or another
            process is writing to ``out``.
        EvaluationInterrupted: on Ctrl-C; the message says how far it came.
    """
    scaled = at_scale(options, options.scale)
    for images in (scaled.images, scaled.tune_images):
        check_apart(scaled.out, [] if images is None or images.source == SAMPLES else images.source)
    require_device(options.device)
    evaluation = _Evaluation(scaled, planned(scaled), console or Console(stderr=True))
    with sole_writer(options.out):
        evaluation.begin(options)
        try:
            evaluation.run_all()
        except KeyboardInterrupt as error:
            n, n_done = evaluation.progress()
            raise EvaluationInterrupted(
                f"{n_done} of {n} reconstructions are recorded in {options.out}; the same command continues the run"
            ) from error
        return evaluation.end()


def progress_bar(console: Console) -> Progress:
    """A bar with what is done, of how much, and the times, which vanishes at the end."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, TimeRemainingColumn(), console=console, transient=True)


class _Task(NamedTuple):
    """A case, everything its reconstructions depend on apart from the image, and why it cannot run, "" if it can."""

    case: Case
    identity: Record
    not_run: str

    def id(self, image: EvaluatedImage) -> str:
        """The image's name is left out: what it is called may depend on others that came later."""
        return hashed({**self.identity, "image_hash": image.hash, "seed": image.seed})


class _Evaluation:
    """One run of a recipe at its scale: what it has loaded, where it writes, how far it is."""

    def __init__(self, recipe: EvaluationOptions, cases: Sequence[Case], console: Console) -> None:
        self.recipe, self.console, self.out = recipe, console, Path(recipe.out)
        self.models: dict[str, nn.Module] = {}
        self.methods: dict[str, Reconstructor] = {}
        self.hashes: dict[str, str] = {}
        self._last: tuple[str, tuple[int, ...], Physics] | None = None
        self.images = _images_of("images", recipe.images, recipe.seed, recipe.limit)
        self.pictured = {image.name for image in self.images[: recipe.n_pictures]}
        self.tune_images: list[EvaluatedImage] = []
        if recipe.tune_images and any(case.method.tune for case in cases):
            self.tune_images = _images_of("tune_images", recipe.tune_images, recipe.seed, None)
        # every method and operator is made once, so that a mistake is found before the first hour of work
        reasons = [self._why_not(case) for case in cases]
        self.tasks = [_Task(case, self._identity(case), why) for case, why in zip(cases, reasons, strict=True)]

    def _why_not(self, case: Case) -> str:
        """What a case lacks to be run, "" if nothing: an optional package, or a network that is not trained yet."""
        self._physics(case, self.images[0])
        for name in case.models.values():
            try:
                self.hashes[name] = self.hashes.get(name) or load_card(name).sha256[:16]
            except (CheckpointError, OSError) as error:
                if "/" not in name or Path(name).exists():  # a misspelt name, or a damaged model
                    raise
                return printable(str(error))
        try:
            method = self._method(case, combinations({key: values[:1] for key, values in case.method.tune.items()})[0])
        except (ImportError, FileNotFoundError) as error:
            if getattr(error, "name", None) is not None:  # no optional package, for which our message names the remedy
                raise
            return printable(str(error))
        self._as_given(case, method, self.images[0])
        self._intervals(case)
        return ""

    # The folder -------------------------------------------------------------------------------------------------------

    def begin(self, as_written: EvaluationOptions) -> None:
        """Make the folder, or check the one that an earlier run left, and forget its failures."""
        if all(task.not_run for task in self.tasks):
            raise ValueError(f"no method can run: {self.tasks[0].not_run}")
        refuse_foreign(self.out, ("records.jsonl",), ("recipe.yaml", "summary.md"))
        (self.out / "images").mkdir(parents=True, exist_ok=True)
        for folder in (self.out, self.out / "images"):
            remove_temporaries(folder)
        path = self.out / "records.jsonl"
        # two different reconstructions under one name in one file would be averaged by a reader
        expected = {(t.case.problem.label, t.case.label, i.name): t.id(i) for t in self.tasks for i in self.images}
        for record in filter(_is_success, read_records(path) if path.exists() else []):
            if expected.get((record["problem"], record["method"], record["image"]), record["id"]) != record["id"]:
                raise ValueError(
                    f"{self.out} holds {record['method']} on {record['problem']}, {record['image']}, from other options, "
                    "images, models or another seed; choose another out, or give the method another label"
                )
        RecordWriter(path, resume=True, keep=_is_success).close()
        write_recipe(as_written, self.out / "recipe.yaml")
        (self.out / UNFINISHED).touch()
        for image in self.images:
            if image.name in self.pictured:
                save_image(image.x, truth_path(self.out, image.name))

    def progress(self) -> tuple[int, int]:
        """How many reconstructions there are, and how many of them are recorded."""
        ids = set(self.ids())
        return len(ids), len(ids & self._done())

    def ids(self) -> list[str]:
        """Of every reconstruction, in the recipe's order."""
        return list(dict.fromkeys(task.id(image) for task in self.tasks for image in self.images))

    def _done(self) -> set[str]:
        return {record["id"] for record in read_records(self.out / "records.jsonl") if _is_success(record)}

    def end(self) -> list[Record]:
        """The records of the recipe, in its order, which is also that of the file."""
        path = self.out / "records.jsonl"
        left = {record["id"]: record for record in read_records(path)}
        ordered = [left.pop(i) for i in self.ids()]
        if self.recipe.devices > 1:
            write_records(path, [*ordered, *left.values()])
        (self.out / UNFINISHED).unlink()
        for case, _, reason in self.tasks:
            if reason:
                self._say(f"{NOT_RUN}{case.label} on {case.problem.label}: {reason}")
        return ordered

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False)

    # The loop ---------------------------------------------------------------------------------------------------------

    def run_all(self) -> None:
        """Do what is not recorded yet, on as many devices as the options say."""
        done = self._done()
        left = [task.case for task in self.tasks if any(task.id(image) not in done for image in self.images)]
        n = min(self.recipe.devices, len(left))
        with progress_bar(self.console) as progress:
            n_all, n_done = self.progress()
            bar = progress.add_task("", total=n_all, completed=n_done)
            if n <= 1:
                self.run_cases(lambda label, n: progress.update(bar, description=label, advance=n))
            else:
                self._run_shares([left[i::n] for i in range(n)], lambda n: progress.update(bar, completed=n))

    def _run_shares(self, shares: Sequence[Sequence[Case]], show: Callable[[int], None]) -> None:
        """A process for each share; all append to one file."""
        context = spawn(_run_share, (self.recipe, shares), len(shares), join=False, daemon=True)
        assert context is not None
        try:
            while not context.join(timeout=1):
                show(len(self._done()))
        except ProcessException as error:
            raise ChildProcessError(
                f"a process of the run has ended ({printable(str(error))[-300:]}); the same command continues the run"
            ) from error
        finally:
            for process in context.processes:
                process.terminate()  # type: ignore[attr-defined]

    def run_cases(self, advance: Callable[[str, int], object] = lambda label, n: None) -> None:
        """Every case of this process, one after the other."""
        done = self._done()
        with RecordWriter(self.out / "records.jsonl", resume=True) as records:
            for task in self.tasks:
                left = [image for image in self.images if task.id(image) not in done]
                label = f"{task.case.problem.label}: {task.case.label}"
                advance(label, 0)
                for record in self._reconstructed(task, left) if left else ():
                    records.write(record)
                    advance(label, 1)

    def _reconstructed(self, task: _Task, images: Sequence[EvaluatedImage]) -> Iterator[Record]:
        """The record of each image; its picture is written before."""
        case, identity, reason = task
        try:
            chosen = self._tuned(case, identity) if not reason else {}
            method = self._method(case, chosen) if not reason else None
            failure: Record = {"failed": NOT_RUN + reason}
        except Exception as error:  # one method must not end the others' run; the message is recorded
            method, failure = None, _failure(error)
        if method is None:
            yield from (self._record(task, image, {}) | failure for image in images)
            return
        for batch in _batches(images, case.method.batch_size):
            for image, (x_hat, facts) in zip(batch, self._attempt(case, method, batch), strict=True):
                if x_hat is not None and image.name in self.pictured:
                    save_image(x_hat, picture_path(self.out, case.problem.label, image.name, case.label))
                yield self._record(task, image, chosen) | facts

    def _attempt(
        self, case: Case, method: Reconstructor, batch: Sequence[EvaluatedImage]
    ) -> list[tuple[Tensor | None, Record]]:
        """The estimates and their figures, of images of one size; a batch that fails is repeated image by image."""
        x = torch.stack([image.x for image in batch]).to(self.recipe.device)
        try:
            physics = self._physics(case, batch[0])
            y = measure_each(x, physics, [image.seed for image in batch])
            method = self._as_given(case, method, batch[0])
            estimates = estimate(method, y, physics, PROBLEMS[case.problem.problem.name], x)
            x_hat = torch.stack([one.x_hat for one in estimates]).to(x)
            calibrated = self._calibrated(case, x_hat, x, y, physics, batch)
        except Exception as error:  # recorded, and the run ends with status 1
            if len(batch) > 1:
                return [one for image in batch for one in self._attempt(case, method, [image])]
            return [(None, _failure(error))]
        if any(one.facts.get("reason") == "interrupted" for one in estimates):
            raise KeyboardInterrupt
        return [(one.x_hat, one.facts | more) for one, more in zip(estimates, calibrated, strict=True)]

    def _calibrated(
        self, case: Case, x_hat: Tensor, x: Tensor, y: Tensor, physics: Physics, batch: Sequence[EvaluatedImage]
    ) -> list[Record]:
        """What the intervals of estimates are worth; a map of the half-widths stands beside each picture."""
        intervals = self._intervals(case)
        if intervals is None or not isinstance(physics, LinearPhysics):
            return [{} for _ in batch]
        network = self.models[case.models["model"]]
        assert isinstance(network, Reconstructor)
        facts = calibration_records(intervals, network, x, x_hat, y, physics, batch[0].seed)
        for image, half_width in zip(batch, intervals(x_hat, y, physics).cpu(), strict=True):
            if image.name in self.pictured:
                path = picture_path(self.out, case.problem.label, image.name, case.label + HALF_WIDTHS)
                save_image(half_width / half_width.max(), path)
        return [{"calibration": fact} for fact in facts]

    def _intervals(self, case: Case) -> Intervals | None:
        """Those of the method, if they are of its network and problem."""
        name = case.method.intervals
        if name is None:
            return None
        intervals = self._model(name)
        if not isinstance(intervals, Intervals) or case.method.name != "unfolded":
            raise ValueError(f"intervals {name} of {case.label} must be intervals, of method unfolded")
        sha256 = load_card(case.models["model"]).sha256
        intervals.check(sha256, case.problem.problem, case.problem.seed)
        return intervals

    def _tuned(self, case: Case, identity: Record) -> Record:
        """The combination with the highest mean PSNR on the images for tuning; every one is recorded."""
        grid = combinations(case.method.tune)
        if len(grid) == 1:
            return grid[0]
        scores: list[float] = []
        with RecordWriter(self.out / "tuning.jsonl", resume=True) as tuning:
            known = {record["id"]: record for record in tuning.records if _is_success(record)}
            for values in grid:
                i = hashed(identity | {"combination": values, "images": [image.hash for image in self.tune_images]})
                record = known.get(i) or self._score(case, values) | {"id": i}
                if i not in known:
                    tuning.write(record)
                exact = math.inf if record["psnr"] is None else float(record["psnr"])  # JSON knows no infinity
                scores.append(exact if _is_success(record) else -math.inf)
        best = max(range(len(grid)), key=scores.__getitem__)
        if scores[best] == -math.inf:
            raise ValueError(f"no combination of {', '.join(case.method.tune)} gave a finite result; see tuning.jsonl")
        for key, values in case.method.tune.items():
            numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
            if len(numbers) > 2 and grid[best][key] in (min(numbers), max(numbers)):
                self._say(
                    f"{case.problem.label}: {case.label} is best at the end of its grid, {key}={grid[best][key]}; "
                    "a wider one may be better"
                )
        return grid[best]

    def _score(self, case: Case, values: Values) -> Record:
        method = self._method(case, values)
        batches = _batches(self.tune_images, case.method.batch_size)
        facts = [facts for batch in batches for _, facts in self._attempt(case, method, batch)]
        failures = [{"failed": fact["failed"]} for fact in facts if "failed" in fact]
        return {
            "problem": case.problem.label,
            "method": case.label,
            "options": dict(values),
            "psnr": None if failures else math.fsum(fact["psnr"] for fact in facts) / len(facts),
            "n_images": len(facts),
            "images": [image.name for image in self.tune_images],
        } | (failures[0] if failures else {})

    # Parts ------------------------------------------------------------------------------------------------------------

    def _model(self, name: str) -> nn.Module:
        if name not in self.models:
            self.models[name] = load_model(name, device=self.recipe.device)
        return self.models[name]

    def _physics(self, case: Case, image: EvaluatedImage) -> Physics:
        """The operator of a problem for an image's size; the last one is kept, for a sensing matrix takes seconds to draw."""
        shape = image.shape
        if self._last is None or self._last[:2] != (case.problem.label, shape):
            physics = make_physics(case.problem.problem, shape, seed=case.problem.seed, device=self.recipe.device)
            self._last = (case.problem.label, shape, physics)
        return self._last[2]

    def _as_given(self, case: Case, method: Reconstructor, image: EvaluatedImage) -> Reconstructor:
        """The method, with the operators of the case in place of the measuring one."""
        seed, device = case.problem.seed, self.recipe.device
        operators = [make_physics(problem, image.shape, seed=seed, device=device) for problem in case.operators]
        return _WithOperators(method, operators) if operators else method

    def _method(self, case: Case, chosen: Values) -> Reconstructor:
        """The method with its options, made once."""
        method, shape = case.method, None
        if method.noise is not None:
            image = self.images[0]
            shape = tuple(measurement_shape(self._physics(case, image), image.shape, device=self.recipe.device))
        options = {**case.options, **chosen}
        problem = case.problem.problem
        key = hashed({"name": method.name, "problem": problem.name, "shape": shape, **case.parts, "options": options})
        if key not in self.methods:
            parts: Values = case.parts | {part: self._model(name) for part, name in case.models.items()} | options
            self.methods[key] = make_method(method.name, problem, shape=shape, device=self.recipe.device, **parts)
        return self.methods[key]

    def _identity(self, case: Case) -> Record:
        """Everything a reconstruction depends on apart from the image."""
        method = case.method
        tuned = {"tune": {k: list(v) for k, v in method.tune.items()}} if method.tune else {}
        tuned |= {"operators": method.operators} if method.operators else {}
        tuned |= {"intervals": load_card(method.intervals).sha256[:16]} if method.intervals else {}
        return {
            "problem_name": case.problem.problem.name,
            "parameters": json.loads(case.problem.problem.to_json())["parameters"],
            "operator_seed": case.problem.seed,
            "method_name": method.name,
            "label": case.label,
            "options": case.options,
            "models": case.parts | {part: self.hashes.get(name, name) for part, name in case.models.items()},
        } | tuned

    def _record(self, task: _Task, image: EvaluatedImage, chosen: Values) -> Record:
        case, identity, _ = task
        return {
            "id": task.id(image),
            "problem": case.problem.label,
            **{key: identity[key] for key in ("problem_name", "parameters", "operator_seed")},
            "method": case.label,
            "method_name": case.method.name,
            "options": {**identity["options"], **chosen},
            "tuned": dict(chosen),
            **case.parts,
            "model_hashes": identity["models"],
            **({"operators": identity["operators"]} if "operators" in identity else {}),
            "image": image.name,
            "image_hash": image.hash,
            **({} if image.group is None else {"group": image.group}),
            **dict(zip(("channels", "height", "width"), image.shape, strict=True)),
            "seed": image.seed,
            "run_seed": self.recipe.seed,
            "recipe": self.recipe.name,
            "scale": self.recipe.scale,
            "version": __version__,
            "versions": {
                "flowprox": __version__,
                "torch": torch.__version__,
                "deepinv": deepinv.__version__,
                "python": platform.python_version(),
                "platform": sys.platform,
            },
        }


class _WithOperators(Reconstructor):
    """A method that is given other operators than the measuring one."""

    def __init__(self, method: Reconstructor, operators: Sequence[Physics]) -> None:
        super().__init__()
        self.method, self.operators = method, operators

    def forward(self, y: Tensor, physics: Physics) -> Tensor:  # type: ignore[override]
        return self.method(y, self.operators if len(self.operators) > 1 else self.operators[0])


def _run_share(rank: int, recipe: EvaluationOptions, shares: Sequence[Sequence[Case]]) -> None:
    """What one process of several runs."""
    if recipe.device == "cuda":
        recipe = replace(recipe, device=f"cuda:{rank}", devices=1)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // len(shares)))
    _Evaluation(recipe, shares[rank], Console(quiet=True)).run_cases()


def _images_of(part: str, options: ImageOptions, seed: int, limit: int | None) -> list[EvaluatedImage]:
    try:
        return load_images(options, seed, limit)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{part}.{error}; give your own images with --{part}.source, or run --scale smoke on the pictures that ship"
        ) from error


def _batches(images: Sequence[EvaluatedImage], size: int) -> Iterator[list[EvaluatedImage]]:
    """At most ``size`` images of one shape at a time."""
    for shape in dict.fromkeys(image.shape for image in images):
        alike = [image for image in images if image.shape == shape]
        yield from (alike[start : start + size] for start in range(0, len(alike), size))


def _failure(error: Exception) -> Record:
    return {"failed": f"{type(error).__name__}: {printable(str(error))}"}


def _is_success(record: Record) -> bool:
    """Whether a record holds figures, and not the message of a failure."""
    return "failed" not in record


def hashed(value: Mapping[str, object]) -> str:
    """A hash of plain values, as hexadecimal digits."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=10).hexdigest()
