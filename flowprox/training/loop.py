r"""The training loop, on one device or many, resumable to the bit.

Every random number of step t on process r comes from a generator seeded with (seed, t, r), and the images of step t
follow from (seed, t). So the state of a run is its weights, optimizer, averages and t, and a run that was killed
continues exactly as if it had not been. A step whose loss or gradient is not finite, or
whose gradient is far above its running average, is counted and not applied.

The host does not wait for the device between two readings of the log: whether a step is applied is decided on the device, where
skipped steps are counted too. What still reads: "muon" in every step; several processes, which vote; a callback that reads the
loss. Other bits come of another number of processes or threads, device, memory layout, precision or version of torch; and of
``max_time``, when rates follow the clock. The loop is ours; devices and processes are Lightning Fabric's.
"""

from __future__ import annotations

import functools
import inspect
import math
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy
from torch import Tensor, nn
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException
from torch.nn.parallel import DistributedDataParallel

from flowprox.checkpoints import save_model, save_training_state
from flowprox.data.datasets import check_apart
from flowprox.files import first_line, handled_signals, refuse_foreign, sole_writer
from flowprox.flows import FiniteChecks, NonFiniteError, gathered_checks
from flowprox.graphs import HostReads, compile_regions
from flowprox.naming import Values
from flowprox.operators import VariedProblem
from flowprox.options import DataOptions, NoiseOptions, TrainingOptions, TrainingResult, parse_duration
from flowprox.training.callbacks import Callback, current_callbacks
from flowprox.training.images import TrainingImages, mixed_seed, seed_global_generators
from flowprox.training.log import RunLog, check_loggers
from flowprox.training.optimizers import WeightAverage, apply_if, make_optimizer, schedule_factor
from flowprox.training.state import Counts, check_optimizer, check_tensors, read_state, run_identity
from flowprox.training.tasks import Task

_LOG_EVERY = 20  # steps between two readings of the loss and of what was skipped, each of which waits for the device
_MOST_SKIPPED = 20  # in a row
_VALIDATION_CHUNK = 64  # images


@dataclass
class _Job:
    """What every process of a run is given."""

    make_task: Callable[[], Task]
    data: DataOptions | NoiseOptions
    training: TrainingOptions
    out: Path
    recipe: Values
    resume: bool
    name: str
    callbacks: tuple[Callback, ...]


def fit(
    make_task: Callable[[], Task],
    data: DataOptions | NoiseOptions,
    training: TrainingOptions,
    out: str | Path,
    recipe: Values | None = None,
    resume: bool = False,
    name: str = "model",
) -> TrainingResult:
    """Train a task; what ``train_flow``, ``train_unfolded``, ``train_denoiser`` and ``train_gan`` come down to.

    Arguments:
        make_task: builds the task; called once in every process (under "ddp_spawn" it must be picklable).
        data: the images; of noise, which the task draws, only the size is used.
        training: the limits, the optimizer and the devices.
        out: folder of the run: ``model/`` (the best one so far), ``state.pt`` (to resume from), ``recipe.yaml``,
            ``metrics.jsonl``, ``loss.png``, ``samples.png``, and what ``training.loggers`` write.
        recipe: the other parts of the recipe, records or plain values, which are written to ``recipe.yaml`` and into the
            model's card with these.
        resume: continue the run in ``out``, if there is one.
        name: the model's name in its card.

    Raises:
        FileExistsError: ``out`` holds a run and ``resume`` is false, or other files that the run would overwrite.
        ValueError: the run in ``out`` is another one (the message says in what), its state is damaged, weights are not
            finite, ``out`` lies among the images, or another process is training there.
        NonFiniteError: twenty steps or more in a row were skipped, and that once more often than ``n_rollbacks``; with several
            processes, also when a reversible flow cannot invert, since the others already wait for that gradient.
        MemoryError: the device's memory is too small.
        ChildProcessError: a process of the run has ended, or was killed.
    """
    folder = Path(out)
    if (folder / "state.pt").exists() and not resume:
        raise FileExistsError(f"{folder} already holds a run; resume it, or choose another out")
    refuse_foreign(folder, ("state.pt", "metrics.jsonl"), ("recipe.yaml", "loss.png", "samples.png", "model"))
    if isinstance(data, DataOptions):
        check_apart(folder, data.train)
        check_apart(folder, data.validation or [])
    check_loggers(training.loggers)
    parts = {**(recipe or {}), "noise" if isinstance(data, NoiseOptions) else "data": data, "training": training}
    plain = {key: asdict(part) if is_dataclass(part) else part for key, part in parts.items()}  # type: ignore[arg-type]
    plain |= {"out": str(out), "name": name}
    job = _Job(make_task, data, training, folder, plain, resume, name, current_callbacks())
    strategy: DDPStrategy | str = "auto"
    if training.devices * training.num_nodes > 1:
        start = "spawn" if training.strategy == "ddp_spawn" else "popen"
        # buffers are not broadcast in every step: only batch normalization's change, and they are before a validation
        known = inspect.signature(DistributedDataParallel).parameters
        quiet: Values = {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}
        strategy = DDPStrategy(start_method=start, gradient_as_bucket_view=True, **quiet)
    try:
        places = {"accelerator": training.accelerator, "devices": training.devices, "num_nodes": training.num_nodes}
        return Fabric(**places, strategy=strategy).launch(functools.partial(_run, job=job))
    except ProcessExitedException as error:
        how = error.signal_name or f"exit status {error.exit_code}"
        raise ChildProcessError(_ended(f"process {error.error_index}", folder, how)) from error
    except ProcessRaisedException as error:  # its message ends with that of the process
        raise ChildProcessError(f"process {error.error_index}: {str(error).strip().splitlines()[-1]}") from error


def _ended(which: str, folder: Path, how: str) -> str:
    return f"{which} of the run in {folder} has ended ({how}); the same command with --resume continues the run"


def _run(fabric: Fabric, job: _Job) -> TrainingResult:
    with _only_run(fabric, job.out), torch.random.fork_rng(devices=[]):
        with _threads(job.training.num_threads), _stop_signals() as stop, _one_line_failures(fabric, job):
            run = _Run(fabric, job, stop)
            with gathered_checks() as run.checks:
                return run.train()


@contextmanager
def _only_run(fabric: Fabric, folder: Path) -> Iterator[None]:
    """The first process locks the run's folder; if it cannot, all of them end. What a killed run left half-written goes."""
    with ExitStack() as stack:
        error: Exception | None = None
        if fabric.is_global_zero:
            try:
                stack.enter_context(sole_writer(folder))
                for leftover in (*folder.glob(".*.tmp"), *folder.glob("model/.*.tmp")):
                    leftover.unlink()
            except (ValueError, OSError) as refusal:
                error = refusal
        if message := fabric.broadcast(str(error) if error else ""):
            raise error or ValueError(message)
        yield


@contextmanager
def _threads(n: int | None) -> Iterator[None]:
    """n threads within the block. Untouched for None: setting their number breaks batched LU (pytorch/pytorch#142815)."""
    before = torch.get_num_threads()
    if n in (None, before):
        yield
        return
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event set by SIGTERM or SIGINT, so that a run can write its state; a second SIGINT interrupts as usual."""
    stop = threading.Event()

    def on_signal(number: int, frame: object) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()

    with handled_signals(on_signal, signal.SIGTERM, signal.SIGINT):
        yield stop


@contextmanager
def _one_line_failures(fabric: Fabric, job: _Job) -> Iterator[None]:
    """Memory that ends and processes that vanish are no faults of the program: the error says what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        allocator = "allocate memory" in text or "not enough memory" in text
        if allocator or isinstance(error, MemoryError | torch.OutOfMemoryError):
            remedy = f"train with a batch_size below {job.training.batch_size} or on more devices"
            stays = f"what is in {job.out} stays, --resume continues from there"
            raise MemoryError(f"{first_line(error)}; {stays}; {remedy}") from error
        if fabric.world_size > 1 and ("onnection" in text or isinstance(error, torch.distributed.DistError)):
            raise ChildProcessError(_ended("another process", job.out, "the connection to it broke")) from error
        raise


def _computes_in_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16; the others emulate it, several times slower than float32."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    checks = [getattr(torch.cpu, name, None) for name in names]  # not in every version of torch
    return platform.machine() not in ("x86_64", "AMD64") or any(check is None or check() for check in checks)


class _Tally:
    """What is counted on the device, so that the host need not wait: skipped steps, losses, the gradient's usual norm."""

    def __init__(self, counts: Counts, device: torch.device) -> None:
        values = [counts.skipped, counts.skipped_in_a_row, counts.typical_norm, *counts.losses]
        self.values = torch.tensor(values, dtype=torch.float32, device=device)
        self.skipped, self.in_a_row, self.typical_norm = self.values[:3].unbind()
        self.losses = self.values[3:]

    def judge(self, loss: Tensor, norm: Tensor, skip_above: float, only_norm: bool) -> Tensor:
        """Whether the step is to be applied, a scalar: all that decide see the same norm, and with ``only_norm`` no loss.

        A norm far above its running average is an outlier. The average takes in at most the threshold, so that a few outliers
        in a row raise it: a run is not stuck for ever where gradients have become larger.
        """
        threshold = skip_above * self.typical_norm
        is_outlier = (threshold > 0) & (norm > threshold)
        is_finite = torch.isfinite(norm if only_norm else norm + loss)
        share = torch.where(self.typical_norm > 0, 0.02, 1.0)
        typical = self.typical_norm + share * (torch.where(is_outlier, threshold, norm) - self.typical_norm)
        self.typical_norm.copy_(torch.where(is_finite, typical, self.typical_norm))
        is_good = is_finite & ~is_outlier
        self.skipped += ~is_good
        self.in_a_row.add_(1).mul_(~is_good)
        self.losses += torch.where(is_good, torch.stack([loss, torch.ones_like(loss)]), 0.0)
        return is_good

    def read(self, counts: Counts) -> None:
        """Put the values into the counts; waits for the device."""
        skipped, in_a_row, counts.typical_norm, *counts.losses = self.values.tolist()
        counts.skipped, counts.skipped_in_a_row = int(skipped), int(in_a_row)


class _OfTensors(nn.Module):
    """A task as a module of the tensors among its inputs; the others stay what they are."""

    def __init__(self, task: Task, inputs: tuple[Any, ...]) -> None:
        super().__init__()
        self.task, self.others = task, [None if isinstance(part, Tensor) else part for part in inputs]

    def forward(self, *tensors: Tensor) -> Tensor:
        left = iter(tensors)
        return self.task(*(next(left) if part is None else part for part in self.others))


class _Run:
    """One process's part of a training run."""

    def __init__(self, fabric: Fabric, job: _Job, stop: threading.Event) -> None:
        self.fabric, self.job, self.stop, self.options = fabric, job, stop, job.training
        self.device, self.distributed = fabric.device, fabric.world_size > 1
        self.images = TrainingImages(job.data, job.training, self.device, fabric.global_rank, fabric.world_size)
        epochs = self.options.max_epochs
        if epochs is not None and isinstance(job.data, NoiseOptions):
            raise ValueError("noise is drawn anew for every batch and has no epochs: set max_steps or max_time")
        by_epochs = math.inf if epochs is None else max(1, round(epochs * len(self.images.sampler)))
        self.limit = min(self.options.max_steps or math.inf, by_epochs)
        self.max_time = math.inf if self.options.max_time is None else parse_duration(self.options.max_time)
        self.in_bfloat16 = self.options.precision == "bf16"
        if self.in_bfloat16 and self.device.type == "cpu" and not _computes_in_bfloat16():
            self.in_bfloat16 = False
            fabric.print("this CPU has no arithmetic in bfloat16 (AVX512-BF16 or AMX): training in float32", flush=True)
        self.counts, self.started, self.reason = Counts(), time.monotonic(), ""
        self.error: NonFiniteError | None = None

        self.identity = run_identity(job.recipe, self.images.fingerprint)
        state = read_state(job.out / "state.pt", self.identity) if job.resume else None
        seed_global_generators(self.options.seed, self.device)
        self.task = job.make_task().to(self.device)
        if self.options.channels_last:
            self.task.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._initialize_model(state)
        if self.options.compile:  # every shape by itself, lest bits depend on which was met first
            compile_regions(self.task.model, dynamic=False)
        groups, fused = self.task.parameter_groups(self.options), self.device.type in ("cpu", "cuda")
        self.optimizer = make_optimizer(self.options.optimizer, groups, fused, self.options.weight_decay)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.forward: Callable[..., Tensor] = fabric.setup_module(self.task)
        self.to_record, self.has_looked = self.options.cuda_graph, False
        self.average = WeightAverage(self.task.model, self.options.ema_decay)
        # a batch normalization that has seen a NaN would keep it for ever
        names = ("running_mean", "running_var", "num_batches_tracked")
        self.statistics = [buffer for name, buffer in self.task.model.named_buffers() if name.endswith(names)]
        self.earlier_statistics = [buffer.clone() for buffer in self.statistics]
        self._keep_weights()
        if state is not None:
            self._restore(state)
        self.tally, self.checks = _Tally(self.counts, self.device), FiniteChecks()
        self.batches = self.images.batches(self.counts.step)
        place = job.out, job.recipe, self.counts.step
        self.log = RunLog(*place, self.options) if fabric.is_global_zero else None

    # -- before the first step

    def _initialize_model(self, state: Values | None) -> None:
        model = self.task.model
        if state is None:  # from the same images in every process; the data-parallel wrapper then sends process 0's
            with torch.no_grad():
                self.task.initialize(self.images.first(256))
            for name, value in model.state_dict().items():
                if value.is_floating_point() and not bool(value.isfinite().all()):
                    raise ValueError(f"{name} of the model is not finite before the first step; start from others")
        else:
            check_tensors(state["model"], model.state_dict(), f"the model in {self.job.out}/state.pt")
            model.load_state_dict(state["model"])
        self.task.train()

    # -- the course of the run

    def train(self) -> TrainingResult:
        """Train to the end; what the run came to."""
        saved = time.monotonic()
        self.started = saved - self.counts.elapsed
        try:
            while not self._is_finished():
                loss = self._take_step()
                self.counts.step += 1
                self._call("on_step", self.counts.step, loss, self.task.model)
                if self.counts.step % _LOG_EVERY == 0:
                    self._look()
                    self._log_training()
                if self.counts.step % self.options.validate_every == 0:
                    self._look()
                    if len(self.images.validation):
                        self._validate()
                    elif not self.counts.skipped_in_a_row:
                        self._keep_weights()
                if time.monotonic() - saved >= self.options.checkpoint_every:
                    self._save_state()
                    saved = time.monotonic()
            self._finish()
        finally:
            if self.log is not None:
                self.log.close()
        self.fabric.barrier()
        at = self.counts
        result = TrainingResult(str(self.job.out), at.step, at.skipped, at.elapsed, self.reason, at.figures, at.best)
        self._call("on_end", result)
        return result

    def _call(self, event: str, *arguments: object) -> None:
        """Tell the callbacks. Random numbers are seeded anew in every step; what they left switched is switched back."""
        if self.job.callbacks and self.fabric.is_global_zero:
            for callback in self.job.callbacks:
                getattr(callback, event)(*arguments)
            self.task.train()

    def _is_finished(self) -> bool:
        if self.reason:
            return True
        if self.counts.step >= self.limit:
            self.reason = "max_steps" if self.limit == self.options.max_steps else "max_epochs"
        elif self.counts.elapsed >= self.max_time:
            self.reason = "max_time"
        elif self.options.patience and self.counts.stale >= self.options.patience:
            self.reason = "patience"
        elif not self.distributed and self.stop.is_set():  # several processes vote in ``_agree``
            self.reason = "signal"
        return bool(self.reason)

    def _finish(self) -> None:
        if self.reason != "signal":  # what resumes looks where the whole run would have looked
            self._look()
        validated = self.counts.figures.get("step") == self.counts.step
        if len(self.images.validation) and self.reason != "signal" and not validated:
            self._validate()
        elif not validated:
            self._draw_samples()
        self._save_state()
        if not len(self.images.validation):
            self._save_model()
        if self.log is not None:
            self.log.draw_loss(self.task.figure)

    # -- one step

    def _take_step(self) -> Tensor:
        """The step's loss; NaN if it was skipped."""
        seed = mixed_seed("step", self.options.seed, self.counts.step, self.fabric.global_rank)
        seed_global_generators(seed, self.device)
        generator = torch.Generator(self.device).manual_seed(seed)
        inputs = self.task.batch(self.images.flip(next(self.batches), generator), generator)
        for earlier, live in zip(self.earlier_statistics, self.statistics, strict=True):
            earlier.copy_(live)
        self.optimizer.zero_grad(set_to_none=True)
        with HostReads() if self.to_record else nullcontext() as reads:
            loss = self._loss_and_gradients(inputs)
        if reads is not None:
            self._record(inputs, reads.names)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.options.gradient_clip or math.inf, foreach=True)
        if loss is None:
            loss = norm = torch.full((), math.nan, device=self.device)
        is_good = self.tally.judge(loss, norm, self.options.skip_above, self.distributed)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self._rate()
        apply_if(is_good, self.optimizer)
        self.average.update(self.counts.step + 1 - self.tally.skipped, is_good)
        for earlier, live in zip(self.earlier_statistics, self.statistics, strict=True):
            live.copy_(torch.where(is_good, live, earlier))
        return torch.where(is_good, loss, math.nan)

    def _loss_and_gradients(self, inputs: tuple[Any, ...]) -> Tensor | None:
        """The loss, backpropagated; None where a process found out on the host that it has none.

        A process that went on alone would wait for ever in the gradient's reduction, so that all of them vote. What is not
        finite in one has spread to the gradients of all.
        """
        loss = None
        try:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.in_bfloat16):
                loss = self.forward(*inputs)
        except NonFiniteError as error:
            self.error = error
        if not self._agree(loss is not None) or loss is None:
            return None
        try:
            self.fabric.backward(loss)
        except NonFiniteError as error:  # a reversible flow that cannot recompute what it needs
            if self.distributed:
                raise
            self.error = error
            return None
        return loss.detach()

    def _record(self, inputs: tuple[Any, ...], reads: set[str]) -> None:
        """Replay forward and backward pass from now on, if this step has shown that it can be."""
        if reads and not self.has_looked:  # ActNorm, whether it is initialized
            self.has_looked = True
            return
        self.to_record = False
        tensors = tuple(part for part in inputs if isinstance(part, Tensor))
        is_drawn = isinstance(getattr(self.task, "physics", None), VariedProblem)
        reasons = {
            "CUDA graphs are for NVIDIA's GPUs": self.device.type != "cuda",
            "several processes exchange gradients meanwhile": self.distributed,
            "the operator is another one in every step": is_drawn,
            f"the host waits for {', '.join(sorted(reads))}": bool(reads),
        }
        refused = [reason for reason, holds in reasons.items() if holds]
        if refused:
            self.fabric.print(f"cuda_graph: trains without, since {refused[0]}", flush=True)
            return
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.in_bfloat16, cache_enabled=False):
            replayed: Callable[..., Tensor] = torch.cuda.make_graphed_callables(  # type: ignore[assignment]
                _OfTensors(self.task, inputs), tensors
            )
        self.forward = lambda *parts: replayed(*(part for part in parts if isinstance(part, Tensor)))
        for earlier, live in zip(self.earlier_statistics, self.statistics, strict=True):
            live.copy_(earlier)

    def _agree(self, has_loss: bool) -> bool:
        """Whether all processes have a loss; process 0's clock and requests to stop travel along."""
        self.counts.elapsed = time.monotonic() - self.started
        if not self.distributed:
            return has_loss
        vote = [float(not has_loss), float(self.stop.is_set()), self.counts.elapsed * self.fabric.is_global_zero]
        votes = self.fabric.all_reduce(torch.tensor(vote, device=self.device), reduce_op="sum")
        bad, stops, self.counts.elapsed = votes.tolist()  # type: ignore[union-attr]
        if stops:
            self.reason = "signal"
        return bad == 0

    def _progress(self) -> float:
        return min(1.0, max(self.counts.step / self.limit, self.counts.elapsed / self.max_time))

    def _rate(self) -> float:
        warmup = self.options.warmup_steps
        warm = min(1.0, (self.counts.step + 1) / warmup) if warmup else 1.0
        return warm * schedule_factor(self.options.schedule, self._progress()) / 2**self.counts.rollbacks

    def _look(self) -> None:
        """Read what the device has counted; after too many skipped steps go back, or give up."""
        self.tally.read(self.counts)
        try:
            self.checks.report()
        except NonFiniteError as error:
            self.error = error
        if self.counts.skipped_in_a_row < _MOST_SKIPPED:
            return
        if self.counts.rollbacks >= self.options.n_rollbacks:
            reason = f"an outlying or not finite gradient{f' ({self.error})' if self.error else ''}"
            steps = f"{self.counts.skipped_in_a_row} steps in a row, up to step {self.counts.step}"
            remedy = "lower learning_rate or gradient_clip, or tighten the flow's scale_bound"
            raise NonFiniteError(f"{steps}, had {reason}; {remedy}")
        self._go_back()

    def _keep_weights(self) -> None:
        """Copy the model and its average to main memory: a run that loses its way goes back to them."""
        states = {"model": self.task.model.state_dict(), "average": self.average.state_dict()}
        self.kept = {
            name: state and {key: value.detach().cpu().clone() for key, value in state.items()}
            for name, state in states.items()
        }

    def _go_back(self) -> None:
        """To the best weights, more slowly: the run has come to a place from which no step leads on."""
        self.counts.rollbacks += 1
        self.counts.skipped_in_a_row, self.counts.typical_norm = 0, 0.0
        self.tally.values[1:3].zero_()
        self.task.model.load_state_dict(self.kept["model"])
        self.average.load_state_dict(self.kept["average"])
        self.optimizer.state.clear()
        self.task.train()

    # -- validation

    @torch.no_grad()
    def _validate(self) -> None:
        started, images = time.monotonic(), self.images.validation
        sums: dict[str, float] = {}
        model = self.average.current(self.distributed).eval()
        try:
            chunks = range(0, len(images), _VALIDATION_CHUNK)
            with gathered_checks():
                for start in chunks[self.fabric.global_rank :: self.fabric.world_size]:
                    x = self.images.to_float(images[start : start + _VALIDATION_CHUNK])
                    for name, values in self.task.evaluate(model, x, self._validation_generator(start)).items():
                        sums[name] = sums.get(name, 0.0) + float(values.double().sum())
        except NonFiniteError as error:  # the run goes on: such a model is never the best one
            self.error, sums = error, dict.fromkeys([self.task.figure, *sums], math.nan)
        parts = [sums]
        if self.distributed:
            parts = [{} for _ in range(self.fabric.world_size)]
            torch.distributed.all_gather_object(parts, sums)
        names = dict.fromkeys(name for part in parts for name in part)
        figures = {name: sum(part.get(name, 0.0) for part in parts) / len(images) for name in names}
        self.counts.figures = {**figures, "step": self.counts.step}
        if self.log is not None:
            self.log.validation(self.counts.step, self.counts.elapsed, figures, time.monotonic() - started)
        self._call("on_validation", self.counts.step, figures, model)
        self.task.train()
        self._note_best(figures[self.task.figure])
        self._draw_samples()

    def _validation_generator(self, start: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(mixed_seed("validation", self.options.seed, start))

    def _note_best(self, value: float) -> None:
        """Save the best model; go back to it where this one has lost its way, NaN included."""
        best = self.counts.best.get(self.task.figure)
        better = best is None or (value > best if self.task.higher_is_better else value < best)
        self.counts.stale += 1
        if math.isfinite(value) and better:
            self.counts.best, self.counts.stale = dict(self.counts.figures), 0
            self._keep_weights()
            self._save_model()
        elif best is not None and self.counts.rollbacks < self.options.n_rollbacks:
            if math.isfinite(self.task.lost) and not abs(value - best) < self.task.lost:
                self._go_back()

    # -- what is written

    def _log_training(self) -> None:
        if self.log is not None:
            at, (total, n) = self.counts, self.counts.losses
            figures = {"loss": total / n if n else math.nan, "learning_rate": self.rates[0] * self._rate()}
            self.log.training(at.step, at.elapsed, {**figures, "skipped": at.skipped}, self._progress())
        self.tally.losses.zero_()

    def _save_model(self) -> None:
        if self.log is None:
            return
        data, at = self.job.data, self.counts
        is_noise = isinstance(data, NoiseOptions)
        training = {
            "data": f"{data.name} noise, drawn anew for every batch" if is_noise else data.train,
            "terms": data.terms,
            "seed": self.options.seed,
            "steps": at.step,
            "skipped_steps": at.skipped,
            "rollbacks": at.rollbacks,
            "seconds": round(at.elapsed, 1),
            "n_images": None if is_noise else len(self.images),
            "recipe": {name: part for name, part in self.job.recipe.items() if name != "out"},
        }
        card = {"name": self.job.name, "metrics": at.figures, "training": training}
        if "problem" in self.job.recipe:
            card["problem"] = self.job.recipe["problem"]
        save_model(self.task.saved(self.average.current().eval()), self.job.out / "model", card)
        self.task.train()

    @torch.no_grad()
    def _draw_samples(self) -> None:
        if self.log is None:
            return
        shown = self.images.validation if len(self.images.validation) else self.images.train
        try:
            x, model = self.images.to_float(shown[:8]), self.average.current().eval()
            with gathered_checks():
                pictures = self.task.pictures(model, x, self._validation_generator(0))
            self.log.pictures(self.counts.step, pictures)
        except NonFiniteError as error:
            self.fabric.print(f"no samples.png: {error}", flush=True)
        self.task.train()

    # -- resumption

    def _save_state(self) -> None:
        if self.log is None:
            return
        self.tally.read(self.counts)
        state = {
            "identity": self.identity,
            "counters": asdict(self.counts) | {"elapsed": time.monotonic() - self.started},
            "model": self.task.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "kept": self.kept,
        }
        save_training_state(self.job.out / "state.pt", state)

    def _restore(self, state: Values) -> None:
        where, model = self.job.out / "state.pt", self.task.model.state_dict()
        self.counts = Counts.of_state(state["counters"], where)
        self.kept = {name: state["kept"].get(name) for name in ("model", "average")}
        check_tensors(self.kept["model"], model, f"the best model in {where}")
        for average in (state.get("average"), self.kept["average"]):
            if average is not None:
                check_tensors(average, model, f"the average in {where}")
        optimizer = check_optimizer(state["optimizer"], self.optimizer, f"the optimizer in {where}")
        self.optimizer.load_state_dict(optimizer)
        self.average.load_state_dict(state.get("average"))
