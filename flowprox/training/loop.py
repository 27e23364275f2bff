r"""The training loop, on one device or many, resumable to the bit.

Every random number of step t on process r comes from a generator seeded with (seed, t, r), and the images of step t
follow from (seed, t). So the state of a run is its weights, optimizer, averages and t, and a run that was killed
continues exactly as if it had not been. A step whose loss or gradient is not finite, or
whose gradient is far above its running average, is counted and not applied.

The loop is ours; devices, processes and the logger are Lightning Fabric's, and this is the only file that imports it.
"""

from __future__ import annotations

import functools
import inspect
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.loggers.tensorboard import TensorBoardLogger
from lightning_fabric.strategies.ddp import DDPStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from flowprox.checkpoints import load_training_state, save_model, save_training_state
from flowprox.data import save_image
from flowprox.files import sole_writer
from flowprox.flows import NonFiniteError
from flowprox.options import DataOptions, NoiseOptions, TrainingOptions, TrainingResult, parse_duration
from flowprox.training.averages import BatchStatistics, KeptWeights, WeightAverage
from flowprox.training.images import TrainingImages
from flowprox.training.optimizers import make_optimizer
from flowprox.training.process import mixed_seed, seed_global_generators, stop_signals
from flowprox.training.run_log import RunLog
from flowprox.training.schedule import schedule_factor
from flowprox.training.tasks import Task

__all__ = ["fit"]

_LOG_EVERY = 20  # steps between two readings of the loss, each of which waits for the device
_MOST_SKIPPED = 20  # in a row
_VALIDATION_CHUNK = 64  # images


@dataclass
class _Job:
    """What every process of a run is given."""

    make_task: Callable[[], Task]
    data: DataOptions | NoiseOptions
    training: TrainingOptions
    out: Path
    recipe: dict[str, Any]
    resume: bool
    name: str


def fit(
    make_task: Callable[[], Task],
    data: DataOptions | NoiseOptions,
    training: TrainingOptions,
    out: str | Path,
    recipe: dict[str, Any] | None = None,
    resume: bool = False,
    name: str = "model",
) -> TrainingResult:
    """Train a task; what ``train_flow``, ``train_unfolded`` and ``train_denoiser`` come down to.

    Arguments:
        make_task: builds the task; called once in every process (under "ddp_spawn" it must be picklable).
        data: the images; of noise, which the task draws, only the size is used.
        training: the limits, the optimizer and the devices.
        out: folder of the run: ``model/`` (the best one so far), ``state.pt`` (to resume from), ``recipe.yaml``,
            ``metrics.jsonl``, ``tensorboard/``, ``loss.png``, ``samples.png``.
        recipe: what is written to ``recipe.yaml`` and into the model's card.
        resume: continue the run in ``out``, if there is one.
        name: the model's name in its card.

    Raises:
        FileExistsError: ``out`` holds a run and ``resume`` is false.
        ValueError: the run in ``out`` was made with other data, batch size, seed or model, or another process is training
            there.
        NonFiniteError: twenty steps in a row were skipped, and that once more often than ``n_rollbacks``; with several
            processes, also when a reversible flow finds in backward that it cannot invert, since the others already wait
            for that gradient.
    """
    folder = Path(out)
    if (folder / "state.pt").exists() and not resume:
        raise FileExistsError(f"{folder} already holds a run; resume it, or choose another out")
    fabric = Fabric(
        accelerator=training.accelerator,
        devices=training.devices,
        num_nodes=training.num_nodes,
        strategy=_strategy(training),
    )
    job = _Job(make_task, data, training, folder, recipe or {}, resume, name)
    return fabric.launch(functools.partial(_run_job, job=job))


def _strategy(training: TrainingOptions) -> DDPStrategy | str:
    if training.devices * training.num_nodes == 1:
        return "auto"
    start = "spawn" if training.strategy == "ddp_spawn" else "popen"
    # buffers are not broadcast in every step: only batch normalization's change, and they are before a validation
    known = inspect.signature(DistributedDataParallel).parameters
    quiet: dict[str, Any] = {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}
    return DDPStrategy(start_method=start, gradient_as_bucket_view=True, **quiet)


def _run_job(fabric: Fabric, job: _Job) -> TrainingResult:
    with _only_run(fabric, job.out), torch.random.fork_rng(devices=[]):
        with _threads(job.training.num_threads), stop_signals() as stop:
            return _Run(fabric, job, stop).train()


@contextmanager
def _only_run(fabric: Fabric, folder: Path) -> Iterator[None]:
    """The first process locks the run's folder; if it cannot, all of them end."""
    with ExitStack() as stack:
        error: Exception | None = None
        if fabric.is_global_zero:
            try:
                stack.enter_context(sole_writer(folder))
            except (ValueError, OSError) as refusal:
                error = refusal
        message = fabric.broadcast(str(error) if error else "")
        if error is not None:
            raise error
        if message:
            raise ValueError(message)
        yield


@contextmanager
def _threads(n: int | None) -> Iterator[None]:
    """n threads within the block. Untouched for None: setting their number breaks batched LU (pytorch/pytorch#142815)."""
    before = torch.get_num_threads()
    if n is not None and n != before:
        torch.set_num_threads(n)
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


class _Run:
    """One process's part of a training run."""

    def __init__(self, fabric: Fabric, job: _Job, stop: threading.Event) -> None:
        self.fabric, self.job, self.stop, self.options = fabric, job, stop, job.training
        self.device, self.distributed = fabric.device, fabric.world_size > 1
        self.images = TrainingImages(job.data, job.training, self.device, fabric.global_rank, fabric.world_size)
        self.limit = self._step_limit()
        self.max_time = math.inf if self.options.max_time is None else parse_duration(self.options.max_time)
        self.step, self.skipped, self.skipped_in_a_row, self.typical_norm = 0, 0, 0, 0.0
        self.started, self.elapsed = time.monotonic(), 0.0
        self.figures: dict[str, float] = {}
        self.best: dict[str, float] = {}
        self.rollbacks = 0
        self.stale, self.reason = 0, ""  # validations since the best one; why the run ends
        self.error: NonFiniteError | None = None

        state = self._read_state()
        seed_global_generators(self.options.seed, self.device)
        self.task = job.make_task().to(self.device)
        if self.options.channels_last:
            self.task.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._initialize_model(state)
        self.optimizer, self.rates = self._make_optimizer()
        self.forward = fabric.setup_module(self.task)
        self.average = WeightAverage(self.task.model, self.options.ema_decay)
        self.batch_statistics = BatchStatistics(self.task.model)
        self.kept = KeptWeights(self.task.model, self.average)
        if state is not None:
            self._restore(state)
        self.batches = self.images.batches(self.step)
        self.log = self._make_log() if fabric.is_global_zero else None

    # -- before the first step

    def _step_limit(self) -> float:
        epochs = self.options.max_epochs
        if epochs is not None and isinstance(self.job.data, NoiseOptions):
            raise ValueError("noise is drawn anew for every batch and has no epochs: set max_steps or max_time")
        by_epochs = math.inf if epochs is None else max(1, round(epochs * len(self.images.sampler)))
        return min(self.options.max_steps or math.inf, by_epochs)

    def _initialize_model(self, state: dict[str, Any] | None) -> None:
        if state is None:  # from the same images in every process; the data-parallel wrapper then sends process 0's
            with torch.no_grad():
                self.task.initialize(self.images.first(256))
        else:
            try:
                self.task.model.load_state_dict(state["model"])
            except RuntimeError as error:
                raise ValueError(
                    f"the run in {self.job.out} trains another model ({str(error).splitlines()[0]} ...): "
                    "resume it with its own recipe.yaml, or choose another out"
                ) from error
        self.task.train()

    def _make_optimizer(self) -> tuple[torch.optim.Optimizer, list[float]]:
        fused = self.device.type in ("cpu", "cuda")
        groups = self.task.parameter_groups(self.options)
        optimizer = make_optimizer(self.options.optimizer, groups, fused, self.options.weight_decay)
        return optimizer, [group["lr"] for group in optimizer.param_groups]

    def _make_log(self) -> RunLog:
        out, options = self.job.out, self.options
        board = TensorBoardLogger(out, name="tensorboard", version="")
        return RunLog(out, self.job.recipe, board, self.step, options.batch_size, options.progress)

    # -- the course of the run

    def train(self) -> TrainingResult:
        saved = time.monotonic()
        self.started = saved - self.elapsed
        losses = torch.zeros(2, device=self.device)  # sum and count since the last reading
        try:
            while not self._finished():
                self._take_step(losses)
                self.step += 1
                if self.step % _LOG_EVERY == 0:
                    self._log_training(losses)
                if self.step % self.options.validate_every == 0:
                    if len(self.images.validation):
                        self._validate()
                    elif not self.skipped_in_a_row:
                        self.kept.keep()
                if time.monotonic() - saved >= self.options.checkpoint_every:
                    self._save_state()
                    saved = time.monotonic()
            self._finish()
        finally:
            if self.log is not None:
                self.log.close()
        self.fabric.barrier()
        out = str(self.job.out)
        return TrainingResult(out, self.step, self.skipped, self.elapsed, self.reason, self.figures, self.best)

    def _finished(self) -> bool:
        if self.reason:
            return True
        if self.step >= self.limit:
            self.reason = "max_steps" if self.limit == self.options.max_steps else "max_epochs"
        elif self.elapsed >= self.max_time:
            self.reason = "max_time"
        elif self.options.patience and self.stale >= self.options.patience:
            self.reason = "patience"
        elif not self.distributed and self.stop.is_set():  # several processes vote in ``_agree``
            self.reason = "signal"
        return bool(self.reason)

    def _finish(self) -> None:
        if len(self.images.validation) and self.reason != "signal" and self.figures.get("step") != self.step:
            self._validate()
        self._save_state()
        if not len(self.images.validation):
            self._save_model()
        if self.log is not None:
            self.log.draw_loss(self.task.figure)
            self._draw_samples()

    def _clock(self) -> float:
        return time.monotonic() - self.started

    # -- one step

    def _take_step(self, losses: Tensor) -> None:
        generator = self._seed_step()
        inputs = self.task.batch(self.images.flip(next(self.batches), generator), generator)
        self.batch_statistics.keep()
        self.optimizer.zero_grad(set_to_none=True)
        loss, applied = None, False
        try:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.precision == "bf16"):
                loss = self.forward(*inputs)
        except NonFiniteError as error:
            self.error = error
        if self._agree(loss):
            assert loss is not None
            applied = self._backward(loss) and self._apply_gradients(loss.detach())
        if applied:
            assert loss is not None
            self.skipped_in_a_row = 0
            losses += torch.stack([loss.detach(), torch.ones_like(loss)])
        else:
            self._skip()

    def _backward(self, loss: Tensor) -> bool:
        """Backpropagate; whether a reversible flow could recompute what it needs."""
        try:
            self.fabric.backward(loss)
        except NonFiniteError as error:
            if self.distributed:
                raise
            self.error = error
            return False
        return True

    def _agree(self, loss: Tensor | None) -> bool:
        """Whether all processes have a finite loss; process 0's clock and requests to stop travel along.

        A process that went on alone would wait for ever in the gradient's reduction. A single process needs no vote: it
        finds out with the gradient's norm, at no further synchronization.
        """
        self.elapsed = self._clock()
        if not self.distributed:
            return loss is not None
        finite = loss is not None and bool(torch.isfinite(loss.detach()))
        vote = [float(not finite), float(self.stop.is_set()), self.elapsed if self.fabric.is_global_zero else 0.0]
        votes = self.fabric.all_reduce(torch.tensor(vote, device=self.device), reduce_op="sum")
        bad, stops, self.elapsed = votes.tolist()  # type: ignore[union-attr]
        if stops:
            self.reason = "signal"
        return bad == 0

    def _apply_gradients(self, loss: Tensor) -> bool:
        """Clip and step, if the gradient is finite: every process sees the same reduced one."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self.options.gradient_clip or math.inf, foreach=True)
        if not bool(torch.isfinite(norm if self.distributed else norm + loss)) or self._is_outlier(float(norm)):
            return False
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self._rate()
        self.optimizer.step()
        self.average.update(self.step - self.skipped + 1)
        return True

    def _is_outlier(self, norm: float) -> bool:
        """Whether a gradient's norm is far above its running average.

        The average takes in at most the threshold, so that a few outliers in a row raise it: a run is not stuck for ever
        where gradients have become larger.
        """
        threshold = self.options.skip_above * self.typical_norm
        is_outlier = 0 < threshold < norm
        counted = threshold if is_outlier else norm
        self.typical_norm += (0.02 if self.typical_norm else 1.0) * (counted - self.typical_norm)
        return is_outlier

    def _skip(self) -> None:
        self.skipped += 1
        self.skipped_in_a_row += 1
        self.batch_statistics.put_back()
        if self.skipped_in_a_row < _MOST_SKIPPED:
            return
        if self.rollbacks >= self.options.n_rollbacks:
            raise NonFiniteError(
                f"{_MOST_SKIPPED} steps in a row, up to step {self.step}, had an outlying or not finite gradient"
                + (f" ({self.error})" if self.error else "")
                + "; lower learning_rate or gradient_clip, or tighten the flow's scale_bound"
            )

        self._go_back()

    def _go_back(self) -> None:
        """To the best weights, more slowly: the run has come to a place from which no step leads on."""
        self.rollbacks += 1
        self.skipped_in_a_row, self.typical_norm = 0, 0.0
        self.kept.put_back()
        self.optimizer.state.clear()
        self.task.train()

    def _progress(self) -> float:
        return min(1.0, max(self.step / self.limit, self.elapsed / self.max_time))

    def _rate(self) -> float:
        warm = min(1.0, (self.step + 1) / self.options.warmup_steps) if self.options.warmup_steps else 1.0
        return warm * schedule_factor(self.options.schedule, self._progress()) / 2**self.rollbacks

    def _seed_step(self) -> torch.Generator:
        seed = mixed_seed("step", self.options.seed, self.step, self.fabric.global_rank)
        seed_global_generators(seed, self.device)
        return torch.Generator(self.device).manual_seed(seed)

    # -- validation

    @torch.no_grad()
    def _validate(self) -> None:
        started = time.monotonic()
        sums: dict[str, float] = {}
        model = self.average.current(self.distributed).eval()
        try:
            chunks = range(0, len(self.images.validation), _VALIDATION_CHUNK)
            for start in chunks[self.fabric.global_rank :: self.fabric.world_size]:
                x = self.images.to_float(self.images.validation[start : start + _VALIDATION_CHUNK])
                for name, values in self.task.evaluate(model, x, self._validation_generator(start)).items():
                    sums[name] = sums.get(name, 0.0) + float(values.double().sum())
        except NonFiniteError as error:  # the run goes on: such a model is never the best one
            self.error, sums = error, dict.fromkeys([self.task.figure, *sums], math.nan)
        self.task.train()
        figures = {name: value / len(self.images.validation) for name, value in self._sum_over_processes(sums).items()}
        self.figures = {**figures, "step": self.step}
        if self.log is not None:
            self.log.validation(self.step, self.elapsed, figures, time.monotonic() - started)
        self._note_best(figures[self.task.figure])

    def _validation_generator(self, start: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(mixed_seed("validation", self.options.seed, start))

    def _sum_over_processes(self, sums: dict[str, float]) -> dict[str, float]:
        if not self.distributed:
            return sums
        parts: list[dict[str, float]] = [{} for _ in range(self.fabric.world_size)]
        torch.distributed.all_gather_object(parts, sums)
        return {name: sum(part.get(name, 0.0) for part in parts) for name in sorted(set().union(*parts))}

    def _note_best(self, value: float) -> None:
        before = self.best.get(self.task.figure)
        better = before is None or (value > before if self.task.higher_is_better else value < before)
        self.stale += 1
        if math.isfinite(value) and better:
            self.best, self.stale = dict(self.figures), 0
            self.kept.keep()
            self._save_model()
        elif before is not None and self._is_lost(value, before) and self.rollbacks < self.options.n_rollbacks:
            self._go_back()

    def _is_lost(self, value: float, best: float) -> bool:
        return math.isfinite(self.task.lost) and not abs(value - best) < self.task.lost  # NaN is lost too

    # -- what is written

    def _log_training(self, losses: Tensor) -> None:
        if self.log is not None:
            total, count = losses.tolist()
            figures = {"loss": total / count if count else math.nan, "learning_rate": self.rates[0] * self._rate()}
            self.log.training(self.step, self.elapsed, {**figures, "skipped": self.skipped}, self._progress())
        losses.zero_()

    def _save_model(self) -> None:
        if self.log is None:
            return
        data = self.job.data
        is_noise = isinstance(data, NoiseOptions)
        training = {
            "data": f"{data.name} noise, drawn anew for every batch" if is_noise else data.train,
            "terms": data.terms,
            "seed": self.options.seed,
            "steps": self.step,
            "skipped_steps": self.skipped,
            "rollbacks": self.rollbacks,
            "seconds": round(self.elapsed, 1),
            "n_images": None if is_noise else len(self.images),
            "recipe": {name: part for name, part in self.job.recipe.items() if name != "out"},
        }
        card = {"name": self.job.name, "metrics": self.figures, "training": training}
        if "problem" in self.job.recipe:
            card["problem"] = self.job.recipe["problem"]
        save_model(self.task.saved(self.average.current().eval()), self.job.out / "model", card)
        self.task.train()

    @torch.no_grad()
    def _draw_samples(self) -> None:
        shown = self.images.validation if len(self.images.validation) else self.images.train
        model = self.average.current().eval()
        try:
            rows = self.task.pictures(model, self.images.to_float(shown[:8]), self._validation_generator(0))
        except NonFiniteError as error:
            print(f"no samples.png: {error}")
            return
        grid = torch.cat([torch.cat(list(row.float().clamp(0, 1)), dim=-1) for row in rows], dim=-2)
        save_image(grid.cpu(), self.job.out / "samples.png")

    def _save_state(self) -> None:
        if self.log is None:
            return
        state = {
            "identity": self._identity(),
            "counters": {name: getattr(self, name) for name in _COUNTERS} | {"elapsed": self._clock()},
            "model": self.task.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "kept": self.kept.state,
        }
        save_training_state(self.job.out / "state.pt", state)

    def _read_state(self) -> dict[str, Any] | None:
        path = self.job.out / "state.pt"
        if not (self.job.resume and path.exists()):
            return None
        state = load_training_state(path)
        for name, value in self._identity().items():
            if state["identity"].get(name) != value:
                raise ValueError(
                    f"the run in {self.job.out} was made with {name} {state['identity'].get(name)}, not {value}: "
                    "resume it with the same data, batch_size and seed, or start another run"
                )
        return state

    def _identity(self) -> dict[str, Any]:
        identity = {"seed": self.options.seed, "batch_size": self.options.batch_size, "n_images": len(self.images)}
        return identity | ({"noise": asdict(self.job.data)} if isinstance(self.job.data, NoiseOptions) else {})

    def _restore(self, state: dict[str, Any]) -> None:
        both = state["optimizer"], self.optimizer.state_dict()
        groups = [[len(group["params"]) for group in part["param_groups"]] for part in both]
        if groups[0] != groups[1]:
            raise ValueError(
                f"the run in {self.job.out} divides its parameters in groups of {groups[0]}, this version with these options "
                f"in {groups[1]}: resume it with its own model, optimizer and version of flowprox, or start another run"
            )
        for name in _COUNTERS:
            setattr(self, name, state["counters"].get(name, 0))
        decays = [group.get("weight_decay", 0.0) for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, decay in zip(self.optimizer.param_groups, decays, strict=True):
            group["weight_decay"] = decay  # like the rates it is the present options'
        self.average.load_state_dict(state["average"])
        self.kept.state = state.get("kept", self.kept.state)


_COUNTERS = ("step", "skipped", "skipped_in_a_row", "rollbacks", "typical_norm", "elapsed", "figures", "best", "stale")
