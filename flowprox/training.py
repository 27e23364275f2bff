r"""Training of flows and of unfolded networks, on one device or many, resumable to the bit.

    flow       min E[-log p(x) / (D ln 2)] + b         bits per dimension of dequantised images
    unfolded   min E||x_hat(A x + noise, A) - x||^2    (Wei et al. 2022, Eq. 13); mu and lambda have their own rate

Symbols: x clean image (B, C, H, W) in [0, 1], D = C H W, b bit depth. The loop is ours; devices, processes and the logger
are Lightning Fabric's, and this is the only file that imports it.

Every random number of step t on process r comes from a generator seeded with (seed, t, r), and the images of step t follow
from (seed, t). So the state of a run is its weights, optimiser, averages and t, and a run that was killed continues exactly
as if it had not been.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.fabric import Fabric
from lightning.fabric.loggers import TensorBoardLogger
from torch import Tensor, nn

from flowprox.checkpoints import atomic_write, load_model, load_training_state, save_model, save_training_state
from flowprox.data import ImageDataset, ResumableSampler, save_image
from flowprox.flows import Flow, Glow, NonFiniteError
from flowprox.operators import LearnedBlur, make_physics, measure
from flowprox.options import (
    DataOptions,
    DenoiserOptions,
    LikelihoodOptions,
    ProblemOptions,
    TrainingOptions,
    UnfoldedOptions,
    parse_duration,
)
from flowprox.prox import FlowProx, ResNetProx, UNetProx
from flowprox.spec import build
from flowprox.unfolded import Unfolded, UnfoldedHQS, UnfoldedPGD

__all__ = [
    "DenoisingTask",
    "LikelihoodTask",
    "ReconstructionTask",
    "Task",
    "TrainingResult",
    "fit",
    "train_denoiser",
    "train_flow",
    "train_unfolded",
]

_LOG_EVERY = 20  # steps between two readings of the loss, each of which waits for the device
_MOST_SKIPPED = 20
_VALIDATION_CHUNK = 64
_VALIDATION_STREAM = -1


@dataclass
class TrainingResult:
    """What a run came to.

    Arguments:
        folder: the run's folder.
        steps: optimiser steps taken, skipped ones included.
        skipped: steps whose loss or gradient was not finite and that changed nothing.
        elapsed: seconds, summed over resumptions.
        reason: why it ended: "max_steps", "max_epochs", "max_time", "patience" or "signal".
        metrics: the last validation's figures.
        best: the best validation's figure and its step; the model saved in ``folder/model`` is the one of that step.
    """

    folder: str
    steps: int
    skipped: int
    elapsed: float
    reason: str
    metrics: dict[str, float]
    best: dict[str, float]


# --------------------------------------------------------------------------------------------------------------- tasks


class Task(nn.Module):
    """What is trained, on what, and how well it does: the contract between a model and the training loop.

    Arguments:
        model: the network to train; the task itself has no other parameters.
    """

    figure: str = "psnr"
    higher_is_better: bool = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def batch(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        """The loss's inputs for clean images x (B, C, H, W) in [0, 1]; all randomness comes from ``generator``."""
        raise NotImplementedError

    def forward(self, *inputs: Tensor) -> Tensor:
        """The loss, a scalar."""
        raise NotImplementedError

    def evaluate(self, model: nn.Module, x: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Figures (B,) of ``model`` on clean images x (B, C, H, W)."""
        raise NotImplementedError

    def initialize(self, x: Tensor) -> None:
        """Data-dependent initialisation from clean images x (B, C, H, W), before the first step."""

    def parameter_groups(self, options: TrainingOptions) -> list[dict[str, Any]]:
        """Adam's parameter groups, each with its learning rate ``lr``."""
        return [{"params": list(self.model.parameters()), "lr": options.learning_rate}]

    def pictures(self, model: nn.Module, x: Tensor, generator: torch.Generator) -> list[Tensor]:
        """Rows of images (n, C, H, W) for ``samples.png``."""
        raise NotImplementedError


class LikelihoodTask(Task):
    """Maximum likelihood of dequantised images, in bits per dimension.

    Arguments:
        flow: the flow.
        options: bit depth and added noise.
    """

    figure = "bits_per_dimension"
    higher_is_better = False

    def __init__(self, flow: Flow, options: LikelihoodOptions | None = None) -> None:
        super().__init__(flow)
        self.options = options or LikelihoodOptions()

    def batch(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        return (_add_noise(dequantise(x, self.options.bit_depth, generator), self.options.noise_range, generator),)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model.bits_per_dimension(inputs[0], self.options.bit_depth).mean()  # type: ignore[operator]

    def evaluate(self, model: nn.Module, x: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        assert isinstance(model, Flow)
        clean = dequantise(x, self.options.bit_depth, generator)
        figures = {self.figure: model.bits_per_dimension(clean, self.options.bit_depth)}
        if (
            self.options.noise_range[1] > 0
        ):  # what is trained is the likelihood of noisy images; the clean one stands beside it
            noisy = _add_noise(clean, self.options.noise_range, generator)
            figures = {
                self.figure: model.bits_per_dimension(noisy, self.options.bit_depth),
                "bits_per_dimension_clean": figures[self.figure],
            }
        return figures

    def initialize(self, x: Tensor) -> None:
        generator = torch.Generator(x.device).manual_seed(0)
        _initialize_flow(self.model, self.batch(x, generator)[0])

    def pictures(self, model: nn.Module, x: Tensor, generator: torch.Generator) -> list[Tensor]:
        assert isinstance(model, Flow)
        size = (x.shape[-2], x.shape[-1])
        return [model.sample(len(x), temperature, size, generator=generator) for temperature in (0.7, 1.0)]


class ReconstructionTask(Task):
    """Mean squared error of a reconstruction network on measurements made on the fly.

    Arguments:
        model: deepinv ``Reconstructor`` with ``parameter_groups``; ``x_hat = model(y, physics)``.
        physics: the operator with its noise model.
        likelihood_weight: weight of the bits per dimension of the clean images, averaged over the flows of the folds.
    """

    def __init__(self, model: nn.Module, physics: nn.Module, likelihood_weight: float = 0.0) -> None:
        super().__init__(model)
        object.__setattr__(self, "physics", physics)  # not a submodule: it is neither trained nor part of the state
        self.likelihood_weight = likelihood_weight
        if likelihood_weight and not model.flows():  # type: ignore[operator]
            raise ValueError("likelihood_weight needs a network whose proxes are flows; set it to 0")

    def batch(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        with torch.no_grad():
            y = measure(x, self.physics, generator=generator)  # type: ignore[arg-type]
        return (x, y, dequantise(x, 8, generator)) if self.likelihood_weight else (x, y)

    def forward(self, *inputs: Tensor) -> Tensor:
        x, y = inputs[:2]
        loss = nn.functional.mse_loss(self.model(y, self.physics), x)
        if self.likelihood_weight:
            flows = self.model.flows()  # type: ignore[operator]
            bits = sum(flow.bits_per_dimension(inputs[2]).mean() for flow in flows) / len(flows)
            loss = loss + self.likelihood_weight * bits
        return loss

    def evaluate(self, model: nn.Module, x: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        y = measure(x, self.physics, generator=generator)  # type: ignore[arg-type]
        return {"psnr": _psnr(model(y, self.physics), x)}

    def initialize(self, x: Tensor) -> None:
        flows = self.model.flows()  # type: ignore[operator]
        fresh = [_initialize_flow(flow, dequantise(x, 8, torch.Generator(x.device).manual_seed(0))) for flow in flows]
        start = getattr(self.model, "start_image", None)
        if any(fresh) and start is not None:
            start.copy_(flows[0].decode(start.new_zeros(1, start[0].numel()), start.shape[-2:]))

    def parameter_groups(self, options: TrainingOptions) -> list[dict[str, Any]]:
        return self.model.parameter_groups(options.learning_rate, options.scalar_learning_rate)  # type: ignore[operator]

    def pictures(self, model: nn.Module, x: Tensor, generator: torch.Generator) -> list[Tensor]:
        y = measure(x, self.physics, generator=generator)  # type: ignore[arg-type]
        back = self.physics.A_adjoint(y)  # type: ignore[operator]
        return [x, back, model(y, self.physics)]


class DenoisingTask(Task):
    """Mean squared error of a prox network as a denoiser of Gaussian noise.

    Arguments:
        prox: ``x_hat = prox(v, step)``; the step is 1.
        noise_range: lowest and highest standard deviation, drawn uniformly per image.
    """

    def __init__(self, prox: nn.Module, noise_range: list[float]) -> None:
        super().__init__(prox)
        self.noise_range = noise_range

    def batch(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        return x, _add_noise(x, self.noise_range, generator)

    def forward(self, *inputs: Tensor) -> Tensor:
        x, v = inputs
        return nn.functional.mse_loss(self.model(v, 1.0), x)

    def evaluate(self, model: nn.Module, x: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        return {"psnr": _psnr(model(_add_noise(x, self.noise_range, generator), 1.0), x)}

    def pictures(self, model: nn.Module, x: Tensor, generator: torch.Generator) -> list[Tensor]:
        v = _add_noise(x, self.noise_range, generator)
        return [x, v, model(v, 1.0)]


def dequantise(x: Tensor, bit_depth: int, generator: torch.Generator | None = None) -> Tensor:
    """x = (floor(x 2^b) + u) / 2^b with u uniform in [0, 1), for images (B, C, H, W) in [0, 1]."""
    levels = 2**bit_depth
    u = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return ((x * levels).floor().clamp_(max=levels - 1) + u) / levels


def _add_noise(x: Tensor, noise_range: list[float], generator: torch.Generator) -> Tensor:
    low, high = noise_range
    if high == 0:
        return x
    level = low + (high - low) * torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device)
    return x + level * torch.randn(x.shape, generator=generator, device=x.device)


def _psnr(x_hat: Tensor, x: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image (B,), peak 1, the estimate clipped to [0, 1]."""
    return -10 * (x_hat.clamp(0, 1) - x).square().flatten(1).mean(1).clamp(min=1e-12).log10()


def _initialize_flow(flow: nn.Module, x: Tensor) -> bool:
    """Initialise a flow that is not yet; whether it was needed."""
    flags = [buffer for name, buffer in flow.named_buffers() if name.endswith("initialized")]
    fresh = not all(bool(flag) for flag in flags)
    if fresh:
        flow.initialize(x)  # type: ignore[operator]
    return fresh


# ------------------------------------------------------------------------------------------------------------ the loop


@dataclass
class _Job:
    """What the processes of a run are given: how to make the task, and everything that is written down."""

    make_task: Callable[[], Task]
    data: DataOptions
    training: TrainingOptions
    out: Path
    recipe: dict[str, Any]
    resume: bool
    name: str


def fit(
    make_task: Callable[[], Task],
    data: DataOptions,
    training: TrainingOptions,
    out: str,
    recipe: dict[str, Any] | None = None,
    resume: bool = False,
    name: str = "model",
) -> TrainingResult:
    """Train a task; what ``train_flow`` and ``train_unfolded`` come down to.

    Arguments:
        make_task: builds the task; called once in every process (under "ddp_spawn" it must be picklable).
        data: the images.
        training: the limits, the optimiser and the devices.
        out: folder of the run: ``model/``, ``state.pt``, ``recipe.yaml``, ``metrics.jsonl``, ``tensorboard/``, ``loss.png``,
            ``samples.png``.
        recipe: what is written to ``recipe.yaml`` and into the model's card.
        resume: continue the run in ``out``, if there is one.
        name: the model's name in its card.

    Raises:
        FileExistsError: ``out`` holds a run and ``resume`` is false.
        ValueError: the run in ``out`` was made with other data, batch size or seed.
        NonFiniteError: twenty steps in a row had a loss or gradient that is not finite.
    """
    folder = Path(out)
    if (folder / "state.pt").exists() and not resume:
        raise FileExistsError(f"{folder} already holds a run; resume it, or choose another out")
    if training.num_threads is not None:
        torch.set_num_threads(training.num_threads)
    fabric = Fabric(
        accelerator=training.accelerator,
        devices=training.devices,
        num_nodes=training.num_nodes,
        strategy=training.strategy,
    )
    job = _Job(make_task, data, training, folder, recipe or {}, resume, name)
    return fabric.launch(functools.partial(_run_job, job=job))


def _run_job(fabric: Fabric, job: _Job) -> TrainingResult:
    with torch.random.fork_rng(devices=[]), _stop_signals() as stop:
        if job.training.num_threads is not None:
            torch.set_num_threads(job.training.num_threads)
        return _Run(fabric, job, stop).train()


class _Run:
    """One process's part of a training run."""

    def __init__(self, fabric: Fabric, job: _Job, stop: threading.Event) -> None:
        self.fabric, self.job, self.stop, self.options = fabric, job, stop, job.training
        self.device = fabric.device
        self.images, self.validation = _load_both(job.data, self.options.n_validation_images)
        self.sampler = self._sampler(fabric.global_rank, fabric.world_size)
        self.limit = self._step_limit()
        self.max_time = parse_duration(self.options.max_time) if self.options.max_time is not None else math.inf
        self.step, self.skipped, self.skipped_in_a_row, self.previously = 0, 0, 0, 0.0
        self.best: dict[str, float] = {}
        self.stale, self.reason = 0, ""
        self.figures: dict[str, float] = {}
        self.error: NonFiniteError | None = None

        torch.manual_seed(self.options.seed)
        self.task = job.make_task()
        state = self._read_state()
        self.task.to(self.device)
        _move_physics(self.task, self.device)
        if self.options.channels_last:
            self.task.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if state is None:
            with torch.no_grad():
                self.task.initialize(self._clean(next(iter(self._sampler(0, 1)))[:256]))
        else:
            self.task.model.load_state_dict(state["model"])
        self.task.train()
        groups = [
            {**group, "params": [p for p in group["params"] if p.requires_grad]}
            for group in self.task.parameter_groups(self.options)
        ]
        groups = [group for group in groups if group["params"]]
        self.rates = [group["lr"] for group in groups]
        fused = self.device.type in ("cpu", "cuda")
        optimizer = torch.optim.Adam(groups, fused=fused or None)
        self.forward, self.optimizer = fabric.setup(self.task, optimizer)
        self.parameters = [p for group in groups for p in group["params"]]
        self.average = copy.deepcopy(self.task.model) if self.options.ema_decay else self.task.model
        self.average_pairs = [
            (a, p)
            for a, p in zip(self.average.parameters(), self.task.model.parameters(), strict=True)
            if p.requires_grad
        ]
        if state is not None:
            self._restore(state)
        kept = [b for n, b in self.task.model.named_buffers() if n.endswith(("running_mean", "running_var"))]
        self.statistics, self.statistics_kept = kept, [b.clone() for b in kept]
        self.batches = self._endless_batches()
        self.log = _Log(fabric, job, self.step, self.limit, self.max_time)

    # -- the course of the run

    def train(self) -> TrainingResult:
        started, saved = time.monotonic(), time.monotonic()
        self.elapsed = self.previously
        loss = torch.zeros((), device=self.device)
        n_summed = 0
        self.log.start(self.elapsed)
        try:
            while not self._finished():
                step_loss = self._take_step(self.previously + time.monotonic() - started)
                if step_loss is not None:
                    loss += step_loss
                    n_summed += 1
                self.step += 1
                if self.step % _LOG_EVERY == 0:
                    self.log.training(self.step, self.elapsed, self._row(float(loss) / max(n_summed, 1)))
                    loss, n_summed = torch.zeros_like(loss), 0
                if len(self.validation) and self.step % self.options.validate_every == 0:
                    self._validate()
                if time.monotonic() - saved >= self.options.checkpoint_every:
                    self._save_state(self.previously + time.monotonic() - started)
                    saved = time.monotonic()
            self.elapsed = self.previously + time.monotonic() - started
            if len(self.validation) and self.reason != "signal" and self.figures.get("step") != self.step:
                self._validate()
            self._save_state(self.elapsed)
            if not len(self.validation):
                self._save_model()
            self._draw()
        finally:
            self.log.close()
        self.fabric.barrier()
        return TrainingResult(
            str(self.job.out), self.step, self.skipped, self.elapsed, self.reason, dict(self.figures), dict(self.best)
        )

    def _finished(self) -> bool:
        if self.step >= self.limit:
            self.reason = "max_steps" if self.limit == self.options.max_steps else "max_epochs"
        elif self.elapsed >= self.max_time:
            self.reason = "max_time"
        elif self.options.patience and self.stale >= self.options.patience:
            self.reason = "patience"
        elif self.fabric.world_size == 1 and self.stop.is_set():
            self.reason = "signal"
        return bool(self.reason)

    def _take_step(self, elapsed: float) -> Tensor | None:
        """One optimiser step; the detached loss, or None where the step was skipped."""
        self.elapsed = elapsed if self.fabric.world_size == 1 else self.elapsed
        generator = self._seed_step()
        inputs = self.task.batch(self._flip(self._clean(next(self.batches)), generator), generator)
        if self.statistics:
            torch._foreach_copy_(self.statistics_kept, self.statistics)
        self.optimizer.zero_grad(set_to_none=True)
        loss, applied = None, False
        try:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.precision == "bf16"):
                loss = self.forward(*inputs)
            if self._agree(loss, elapsed):
                self.fabric.backward(loss)
                applied = self._apply_gradients(loss)
        except NonFiniteError as error:
            self.error = error
            if loss is None:  # the others wait for this process's vote
                self._agree(None, elapsed)
        if not applied:
            self._skip()
            return None
        self.skipped_in_a_row = 0
        return loss.detach() if loss is not None else None

    def _agree(self, loss: Tensor | None, elapsed: float) -> bool:
        """Whether all processes have a finite loss; process 0's clock and stop signals travel along.

        A process that went on alone would wait for ever in the gradient's reduction. A single process needs no vote: it
        finds out with the gradient's norm, at no further synchronisation.
        """
        if self.fabric.world_size == 1:
            return loss is not None
        finite = loss is not None and bool(torch.isfinite(loss.detach()))
        mine = [float(not finite), float(self.stop.is_set()), elapsed if self.fabric.is_global_zero else 0.0]
        votes = self.fabric.all_reduce(torch.tensor(mine, dtype=torch.float32, device=self.device), reduce_op="sum")
        bad, stopped, self.elapsed = votes.tolist()  # type: ignore[union-attr]
        if stopped:
            self.reason = "signal"
        return bad == 0

    def _apply_gradients(self, loss: Tensor) -> bool:
        most = self.options.gradient_clip or math.inf
        norm = nn.utils.clip_grad_norm_(self.parameters, most, foreach=True)
        if not bool(torch.isfinite(norm + loss.detach())):
            return False
        rate = self._rate()
        for group, base in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = base * rate
        self.optimizer.step()
        if self.options.ema_decay:
            done = self.step - self.skipped + 1
            decay = min(self.options.ema_decay, done / (done + 10))
            with torch.no_grad():
                averages, weights = zip(*self.average_pairs, strict=True)
                torch._foreach_lerp_(averages, weights, 1 - decay)
        return True

    def _skip(self) -> None:
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.statistics:  # a batch normalisation that has seen a NaN would keep it for ever
            torch._foreach_copy_(self.statistics, self.statistics_kept)
        if self.skipped_in_a_row >= _MOST_SKIPPED:
            raise NonFiniteError(
                f"{_MOST_SKIPPED} steps in a row (up to step {self.step}) had a loss or gradient that is not finite"
                + (f" ({self.error})" if self.error else "")
                + "; lower learning_rate or gradient_clip, or tighten the flow's scale_bound"
            )

    def _rate(self) -> float:
        of_steps = self.step / self.limit if math.isfinite(self.limit) else 0.0
        progress = max(of_steps, self.elapsed / self.max_time if self.max_time < math.inf else 0.0)
        warm = min(1.0, (self.step + 1) / self.options.warmup_steps) if self.options.warmup_steps else 1.0
        return warm * schedule_factor(self.options.schedule, min(progress, 1.0))

    # -- images

    def _seed_step(self) -> torch.Generator:
        seed = _mix(self.options.seed, self.step, self.fabric.global_rank)
        torch.manual_seed(seed)  # for whatever draws from the global generator, such as dropout
        return torch.Generator(self.device).manual_seed(seed)

    def _sampler(self, rank: int, world_size: int) -> ResumableSampler:
        n, batch_size = len(self.images), self.options.batch_size
        whole = n >= batch_size
        return ResumableSampler(n, batch_size, self.options.seed, rank=rank, world_size=world_size, drop_last=whole)

    def _endless_batches(self) -> Iterator[list[int]]:
        self.sampler.seek(self.step)
        while True:
            yield from self.sampler

    def _clean(self, indices: list[int]) -> Tensor:
        return self._to_float(self.images[torch.tensor(indices)])

    def _to_float(self, images: Tensor) -> Tensor:
        x = images.to(self.device, non_blocking=True).float().div_(255)
        return x.contiguous(memory_format=torch.channels_last) if self.options.channels_last else x

    def _flip(self, x: Tensor, generator: torch.Generator) -> Tensor:
        if not self.options.horizontal_flip:
            return x
        mirrored = torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device) < 0.5
        return torch.where(mirrored, x.flip(-1), x)

    # -- validation and what is written

    def _evaluated(self) -> nn.Module:
        """The averaged model (or the model itself) with the model's current buffers, in evaluation mode."""
        if self.average is not self.task.model:
            for ours, theirs in zip(self.average.buffers(), self.task.model.buffers(), strict=True):
                ours.copy_(theirs)
        return self.average.eval()

    @torch.no_grad()
    def _validate(self) -> None:
        started = time.monotonic()
        model, sums = self._evaluated(), {}
        chunks = list(range(0, len(self.validation), _VALIDATION_CHUNK))
        total = torch.zeros(8, device=self.device, dtype=torch.float64 if self.device.type != "mps" else torch.float32)
        try:
            for start in chunks[self.fabric.global_rank :: self.fabric.world_size]:
                x = self._to_float(self.validation[start : start + _VALIDATION_CHUNK])
                generator = torch.Generator(self.device).manual_seed(_mix(self.options.seed, start, _VALIDATION_STREAM))
                for name, value in self.task.evaluate(model, x, generator).items():
                    sums[name] = sums.get(name, 0.0) + value.double().sum()
        except NonFiniteError as error:  # the run goes on: such a model is never the best one
            self.error = error
            sums = {self.task.figure: torch.tensor(math.nan)}
        names = sorted(sums)
        if self.fabric.world_size > 1:
            names = sorted(set().union(*self._gather(names)))
        for i, name in enumerate(names):
            total[i] = sums.get(name, 0.0)
        total = self.fabric.all_reduce(total, reduce_op="sum")
        values = (total / len(self.validation)).tolist()  # type: ignore[operator]
        self.task.train()
        self.figures = {**dict(zip(names, values, strict=False)), "step": self.step}
        self.log.validation(self.step, self.elapsed, self.figures, time.monotonic() - started)
        self._note_best(self.figures[self.task.figure])

    def _gather(self, names: list[str]) -> list[list[str]]:
        everyone: list[list[str]] = [[] for _ in range(self.fabric.world_size)]
        torch.distributed.all_gather_object(everyone, names)
        return everyone

    def _note_best(self, value: float) -> None:
        before = self.best.get(self.task.figure)
        better = before is None or (value > before if self.task.higher_is_better else value < before)
        if math.isfinite(value) and better:
            self.best, self.stale = {self.task.figure: value, "step": self.step}, 0
            self._save_model()
        else:
            self.stale += 1

    def _save_model(self) -> None:
        if not self.fabric.is_global_zero:
            return
        model = self._evaluated()
        training = {
            "seed": self.options.seed,
            "steps": self.step,
            "skipped_steps": self.skipped,
            "seconds": round(self.elapsed, 1),
            "n_training_images": len(self.images),
            "recipe": self.job.recipe,
        }
        card = {"name": self.job.name, "metrics": dict(self.figures), "training": training}
        if "problem" in self.job.recipe:
            card["problem"] = self.job.recipe["problem"]
        save_model(model, self.job.out / "model", card)
        self.task.train()

    def _save_state(self, elapsed: float) -> None:
        if not self.fabric.is_global_zero:
            return
        state = {
            "identity": self._identity(),
            "step": self.step,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "elapsed": elapsed,
            "best": self.best,
            "stale": self.stale,
            "figures": self.figures,
            "model": self.task.model.state_dict(),
            "average": self.average.state_dict() if self.options.ema_decay else None,
            "optimizer": self.optimizer.state_dict(),
        }
        save_training_state(self.job.out / "state.pt", state)

    def _read_state(self) -> dict[str, Any] | None:
        path = self.job.out / "state.pt"
        if not (self.job.resume and path.exists()):
            return None
        state = load_training_state(path)
        for key, mine in self._identity().items():
            if state["identity"].get(key) != mine:
                raise ValueError(
                    f"the run in {self.job.out} was made with {key} {state['identity'].get(key)}, not {mine}: "
                    "resume it with the same data, batch_size and seed, or start another run"
                )
        return state

    def _identity(self) -> dict[str, Any]:
        options = self.options
        return {
            "seed": options.seed,
            "batch_size": options.batch_size,
            "n_images": len(self.images),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        self.step, self.skipped, self.skipped_in_a_row = state["step"], state["skipped"], state["skipped_in_a_row"]
        self.previously, self.best, self.stale = state["elapsed"], state["best"], state["stale"]
        self.figures = state["figures"]
        self.optimizer.load_state_dict(state["optimizer"])
        if self.options.ema_decay:
            self.average.load_state_dict(state["average"] or state["model"])

    @torch.no_grad()
    def _draw(self) -> None:
        if not self.fabric.is_global_zero:
            return
        self.log.draw_loss(self.task.figure)
        shown = self.validation if len(self.validation) else self.images
        generator = torch.Generator(self.device).manual_seed(_mix(self.options.seed, 0, _VALIDATION_STREAM))
        try:
            rows = self.task.pictures(self._evaluated(), self._to_float(shown[:8]), generator)
        except NonFiniteError as error:
            self.fabric.print(f"no samples.png: {error}")
            return
        grid = torch.cat([torch.cat(list(row.clamp(0, 1)), dim=-1) for row in rows], dim=-2)
        save_image(grid.cpu(), self.job.out / "samples.png")

    def _row(self, loss: float) -> dict[str, float]:
        return {"loss": loss, "rate": self._rate(), "skipped": self.skipped}

    def _step_limit(self) -> float:
        options = self.options
        epochs = options.max_epochs * len(self.sampler) if options.max_epochs else math.inf
        return min(options.max_steps or math.inf, max(1, round(epochs)) if epochs < math.inf else math.inf)


def _mix(*numbers: int) -> int:
    """One seed, below 2^63, from several numbers; neighbouring numbers give unrelated seeds."""
    text = ",".join(str(number) for number in numbers).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def schedule_factor(schedule: str, progress: float) -> float:
    """The learning rate relative to its peak, for progress from 0 to 1.

    Example:
        >>> [round(schedule_factor("cosine", p), 3) for p in (0.0, 0.5, 1.0)]
        [1.0, 0.5, 0.0]
    """
    if schedule == "constant":
        return 1.0
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    rise, low = 0.3, 0.04
    if progress < rise:
        return low + (1 - low) * 0.5 * (1 - math.cos(math.pi * progress / rise))
    return 0.5 * (1 + math.cos(math.pi * (progress - rise) / (1 - rise)))


def _move_physics(task: Task, device: torch.device) -> None:
    physics = getattr(task, "physics", None)
    if physics is not None:
        physics.to(device)


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event set by SIGTERM or SIGINT, so that a run can write its state; a second SIGINT interrupts as usual."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def on_signal(number: int, frame: Any) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# -------------------------------------------------------------------------------------------------------------- images


def _load_images(source: str | list[str], data: DataOptions, split: str, limit: int | None) -> Tensor:
    """The images of a source as one uint8 tensor (N, C, H, W)."""
    return ImageDataset(
        source,
        image_size=data.image_size,
        split=split,
        channels=data.channels,
        skip_corrupt=data.skip_corrupt,
        limit=limit,
    ).images


def _load_both(data: DataOptions, n_validation: int) -> tuple[Tensor, Tensor]:
    """Training and validation images; the latter may be none."""
    sources = [data.train] if isinstance(data.train, str) else data.train
    if data.validation is not None:
        validation = _load_images(data.validation, data, "all", n_validation)
        return _load_images(sources, data, "all", data.limit), validation
    if all(Path(source).is_dir() for source in sources):
        return _load_images(sources, data, "train", data.limit), _load_images(sources, data, "val", n_validation)
    train = _load_images(sources, data, "all", data.limit)
    return train, train[:0]


# ---------------------------------------------------------------------------------------------------------------- logs


class _Log:
    """Where process 0 writes what happened: metrics.jsonl, TensorBoard, the progress bar, loss.png."""

    def __init__(self, fabric: Fabric, job: _Job, step: int, limit: float, max_time: float) -> None:
        self.active, self.out, self.limit, self.max_time = fabric.is_global_zero, job.out, limit, max_time
        self.batch_size, self.show = job.training.batch_size, job.training.progress
        self.bar: Any = None
        self.figure_text = ""
        if not self.active:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.out / "recipe.yaml", mode="w") as f:
            yaml.safe_dump(job.recipe, f, sort_keys=False)
        self.rows = [row for row in _read_rows(self.out / "metrics.jsonl") if row["step"] <= step]
        with atomic_write(self.out / "metrics.jsonl", mode="w") as f:
            f.writelines(json.dumps(row) + "\n" for row in self.rows)
        self.file = open(self.out / "metrics.jsonl", "a", encoding="utf-8")
        self.board = TensorBoardLogger(self.out, name="tensorboard", version="")

    def start(self, elapsed: float) -> None:
        self.last = (time.monotonic(), None)
        if self.active and self.show:
            self.bar = _progress_bar(self.limit, self.max_time, elapsed)

    def training(self, step: int, elapsed: float, row: dict[str, float]) -> None:
        if not self.active:
            return
        now, (then, last_step) = time.monotonic(), self.last
        steps = step - last_step if last_step is not None else _LOG_EVERY
        row = {**row, "images_per_second": round(steps * self.batch_size / max(now - then, 1e-9), 2)}
        self.last = (now, step)
        self._write(step, elapsed, row)
        if self.bar is not None:
            text = f"loss {row['loss']:.4g}  {row['images_per_second']:.0f} images/s  {self.figure_text}"
            done = max(step / self.limit, elapsed / self.max_time) if min(self.limit, self.max_time) < math.inf else 0.0
            self.bar.update(0, completed=min(done, 1.0), description=f"step {step}", text=text)

    def validation(self, step: int, elapsed: float, figures: dict[str, float], seconds: float) -> None:
        if not self.active:
            return
        then, last_step = self.last
        self.last = (then + seconds, last_step)  # validation is not counted in images per second
        row = {f"validation_{name}": value for name, value in figures.items() if name != "step"}
        self._write(step, elapsed, row)
        self.figure_text = "  ".join(f"{name} {value:.3f}" for name, value in figures.items() if name != "step")
        if self.show and (self.bar is None or not self.bar.console.is_terminal):
            loss = next((r["loss"] for r in reversed(self.rows) if "loss" in r), math.nan)
            speed = next((r["images_per_second"] for r in reversed(self.rows) if "images_per_second" in r), math.nan)
            print(
                f"step {step}  {elapsed:.0f} s  loss {loss:.4g}  {self.figure_text}  {speed:.0f} images/s", flush=True
            )

    def _write(self, step: int, elapsed: float, row: dict[str, float]) -> None:
        entry = {"step": step, "elapsed": round(elapsed, 2), **row}
        self.rows.append(entry)
        self.file.write(json.dumps(entry) + "\n")
        self.file.flush()
        self.board.log_metrics({name: value for name, value in row.items() if math.isfinite(value)}, step)

    def draw_loss(self, figure: str) -> None:
        """Training loss and validation figure over the steps."""
        from matplotlib.figure import Figure

        picture = Figure(figsize=(7, 3.5), layout="constrained")
        axes = picture.add_subplot()
        trained = [(r["step"], r["loss"]) for r in self.rows if "loss" in r]
        validated = [(r["step"], r[f"validation_{figure}"]) for r in self.rows if f"validation_{figure}" in r]
        axes.set_xlabel("step")
        if figure == "bits_per_dimension":
            axes.set_ylabel("bits per dimension")
            axes.plot(*_columns(validated), "o-", label="validation")
        else:
            axes.set_ylabel("training loss")
            axes.set_yscale("log")
            right = axes.twinx()
            right.plot(*_columns(validated), "o-", color="C1", label=f"validation {figure}")
            right.set_ylabel(f"validation {figure}")
        axes.plot(*_columns(trained), color="C0", alpha=0.7, label="training")
        axes.legend()
        with atomic_write(self.out / "loss.png", mode="wb") as f:
            picture.savefig(f, format="png", dpi=100)

    def close(self) -> None:
        if not self.active:
            return
        if self.bar is not None:
            self.bar.stop()
        self.file.close()
        self.board.finalize("success")


def _columns(pairs: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [a for a, _ in pairs], [b for _, b in pairs]


def _read_rows(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def _progress_bar(limit: float, max_time: float, elapsed: float) -> Any:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    bounded = min(limit, max_time) < math.inf
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
        refresh_per_second=1,
    )
    bar.add_task("starting", total=1.0 if bounded else None, text="")
    if bar.console.is_terminal:
        bar.start()
    return bar


# -------------------------------------------------------------------------------------------------------- entry points


def train_flow(
    flow: str | dict[str, Any],
    data: DataOptions,
    training: TrainingOptions,
    likelihood: LikelihoodOptions | None = None,
    out: str = "runs/flow",
    resume: bool = False,
    name: str = "flow",
) -> TrainingResult:
    """Train a flow on clean images by maximum likelihood.

    Arguments:
        flow: "compact", "paper", a specification {kind: Glow, arguments: {...}}, or a pretrained flow (name, hub id, folder)
            to train on.
        data: the images.
        training: limits, optimiser and devices.
        likelihood: bit depth and added noise.
        out: folder of the run; the model is written to out/model.
        resume: continue the run in out, if there is one.
        name: the model's name in its card.

    Raises:
        FileExistsError, ValueError, NonFiniteError: see ``fit``; and ValueError for a flow that cannot be built.
    """
    likelihood = likelihood or LikelihoodOptions()
    recipe = _recipe(flow=flow, data=data, training=training, likelihood=likelihood, out=out, name=name)
    make_task = functools.partial(_likelihood_task, flow, data, likelihood)
    return fit(make_task, data, training, out, recipe, resume, name)


def train_unfolded(
    model: UnfoldedOptions,
    problem: ProblemOptions,
    data: DataOptions,
    training: TrainingOptions,
    out: str = "runs/unfolded",
    resume: bool = False,
    name: str = "unfolded",
) -> TrainingResult:
    """Train an unfolded network, end to end, for one measurement problem.

    Arguments:
        model: the network: its prox, the number of folds, where it starts.
        problem: the operator and its noise.
        data: the clean images.
        training: limits, optimiser and devices.
        out: folder of the run; the model is written to out/model.
        resume: continue the run in out, if there is one.
        name: the model's name in its card.

    Raises:
        FileExistsError, ValueError, NonFiniteError: see ``fit``; ValueError also for what cannot be built.
    """
    recipe = _recipe(model=model, problem=problem, data=data, training=training, out=out, name=name)
    make_task = functools.partial(_reconstruction_task, model, problem, data)
    return fit(make_task, data, training, out, recipe, resume, name)


def train_denoiser(
    denoiser: DenoiserOptions,
    data: DataOptions,
    training: TrainingOptions,
    out: str = "runs/denoiser",
    resume: bool = False,
    name: str = "denoiser",
) -> TrainingResult:
    """Pre-train a ResNet or U-Net prox as a denoiser; ``UnfoldedOptions.pretrained`` starts from out/model.

    Arguments:
        denoiser: the network and the noise it learns to remove.
        data: the clean images.
        training: limits, optimiser and devices.
        out: folder of the run; the prox is written to out/model.
        resume: continue the run in out, if there is one.
        name: the model's name in its card.
    """
    recipe = _recipe(denoiser=denoiser, data=data, training=training, out=out, name=name)
    make_task = functools.partial(_denoising_task, denoiser, data)
    return fit(make_task, data, training, out, recipe, resume, name)


def _recipe(**parts: Any) -> dict[str, Any]:
    return {key: asdict(part) if hasattr(part, "__dataclass_fields__") else part for key, part in parts.items()}


def _image_shape(data: DataOptions) -> tuple[int, int, int]:
    return data.channels, data.image_size, data.image_size


def _likelihood_task(flow: str | dict[str, Any], data: DataOptions, options: LikelihoodOptions) -> Task:
    return LikelihoodTask(_make_flow(flow, data), options)


def _denoising_task(options: DenoiserOptions, data: DataOptions) -> Task:
    return DenoisingTask(_make_net_prox(options.prox, options.prox_arguments, data), options.noise_range)


def _reconstruction_task(options: UnfoldedOptions, problem: ProblemOptions, data: DataOptions) -> Task:
    physics = make_physics(problem.name, _image_shape(data), seed=problem.seed, **problem.parameters)
    return ReconstructionTask(_make_unfolded(options, problem, data), physics, options.likelihood_weight)


def _make_flow(flow: str | dict[str, Any], data: DataOptions) -> Flow:
    shape = _image_shape(data)
    if flow == "compact":
        made: Any = Glow.compact(shape)
    elif flow == "paper":
        made = Glow.paper(shape)
    elif isinstance(flow, str):
        made = load_model(flow)
    else:
        arguments = {"image_shape": list(shape), **flow.get("arguments", {})}
        made = build({**flow, "arguments": arguments})
    if not isinstance(made, Flow):
        raise ValueError(f"flow must be a flow; {flow!r} is a {type(made).__name__}")
    if made.n_channels != data.channels or data.image_size % made.divisor:
        raise ValueError(
            f"the flow takes images of {made.n_channels} channels whose sides are divisible by {made.divisor}; "
            f"data has {data.channels} channels and image_size {data.image_size}"
        )
    return made


def _make_net_prox(kind: str, arguments: dict[str, Any], data: DataOptions) -> nn.Module:
    prox = {"resnet": "ResNetProx", "unet": "UNetProx"}[kind]
    return build({"kind": prox, "arguments": {"n_channels": data.channels, **arguments}})


def _make_prox(options: UnfoldedOptions, data: DataOptions) -> nn.Module:
    if options.prox in ("flow", "plug-and-play"):
        assert options.flow is not None
        return FlowProx(_make_flow(options.flow, data), base=options.base, channelwise=options.channelwise)
    if options.pretrained is None:
        return _make_net_prox(options.prox, options.prox_arguments, data)
    prox = load_model(options.pretrained)
    if not isinstance(prox, {"resnet": ResNetProx, "unet": UNetProx}[options.prox]):
        raise ValueError(f"pretrained {options.pretrained!r} is a {type(prox).__name__}, not a {options.prox} prox")
    return prox


def _make_unfolded(options: UnfoldedOptions, problem: ProblemOptions, data: DataOptions) -> Unfolded:
    first = _make_prox(options, data)
    shared = options.tied or options.prox == "plug-and-play"
    common: dict[str, Any] = {
        "proxes": [first if shared or k == 0 else copy.deepcopy(first) for k in range(options.n_folds)],
        "shrinkage": options.shrinkage,
        "start": options.start or ("flow" if isinstance(first, FlowProx) else "adjoint"),
        "shrink_last": options.shrink_last,
        "operator": _learned_blur(problem) if options.learn_operator else None,
    }
    if options.iteration == "hqs":
        model: Unfolded = UnfoldedHQS(penalty=options.penalty, **common)
    else:
        model = UnfoldedPGD(step_size=options.step_size, **common)
    if options.prox == "plug-and-play":
        model.freeze_proxes()
    if not isinstance(first, FlowProx):
        model.log_shrinkage.requires_grad_(False)  # these proxes ignore it
    return model


def _learned_blur(problem: ProblemOptions) -> LearnedBlur:
    if problem.name != "deblurring":
        raise ValueError(f'learn_operator learns a blur kernel: it needs problem "deblurring", not "{problem.name}"')
    known = {key: problem.parameters[key] for key in ("kernel_size", "sigma_blur") if key in problem.parameters}
    return LearnedBlur(**known)
