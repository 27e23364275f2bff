"""What a training run writes while it goes: metrics.jsonl, a progress bar, loss.png, samples.png, and to loggers by name.

TensorBoard and CSV are Lightning Fabric's. Weights & Biases and MLflow are written by their own clients, offline or into the
run's folder unless their environment variables say otherwise.

A row of metrics.jsonl has the step, the elapsed seconds, and either the training figures (loss, learning_rate, skipped,
images_per_second) or those of a validation (validation_psnr, ...). Figures that are not finite are written as null.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from flowprox.data import save_image
from flowprox.files import atomic_write
from flowprox.naming import Values
from flowprox.options import TrainingOptions
from flowprox.records import RecordWriter


class RunLog:
    """The log of one run; rows after ``step`` that a killed predecessor left are dropped.

    Arguments:
        folder: of the run; created if needed.
        recipe: written to recipe.yaml.
        step: step the run starts from.
        options: of the run: its batch size, for the speed, whether it shows progress, its loggers.
    """

    def __init__(self, folder: Path, recipe: Values, step: int, options: TrainingOptions) -> None:
        self.folder, self.batch_size, self.show = folder, options.batch_size, options.progress
        self.writer = RecordWriter(folder / "metrics.jsonl", True, lambda row: row.get("step", math.inf) <= step)
        self.rows = self.writer.records
        with atomic_write(folder / "recipe.yaml", mode="w") as f:
            yaml.safe_dump(recipe, f, sort_keys=False)
        self.loggers = [_LOGGERS[name](folder, recipe, self.rows) for name in options.loggers]
        self.measured = (step, time.monotonic())
        self.validated = ""
        self.bar: Progress | None = None
        if self.show and (console := Console()).is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, TextColumn("{task.fields[text]}"), console=console, refresh_per_second=1)
            self.bar.add_task("starting", total=1.0, text="")
            self.bar.start()

    def training(self, step: int, elapsed: float, figures: Mapping[str, float], progress: float) -> None:
        """Note training figures; ``progress`` of the run is between 0 and 1."""
        (last_step, then), now = self.measured, time.monotonic()
        self.measured = (step, now)
        speed = (step - last_step) * self.batch_size / max(now - then, 1e-9)
        self._write(step, elapsed, {**figures, "images_per_second": round(speed, 2)})
        if self.bar is not None:
            text = f"loss {figures['loss']:.4g}  {self.validated}  {speed:.0f} images/s"
            self.bar.update(self.bar.task_ids[0], completed=progress, description=f"step {step}", text=text)

    def validation(self, step: int, elapsed: float, figures: Mapping[str, float], seconds: float) -> None:
        """Note a validation's figures; the ``seconds`` it took are not counted in images per second."""
        last_step, then = self.measured
        self.measured = (last_step, then + seconds)
        self._write(step, elapsed, {f"validation_{name}": value for name, value in figures.items()})
        self.validated = "  ".join(f"{name} {value:.3f}" for name, value in figures.items())
        if self.show and self.bar is None:
            losses, speeds = self._columns("loss")[1], self._columns("images_per_second")[1]
            loss, speed = f"{losses[-1]:.4g}" if losses else "-", f"{speeds[-1]:.0f}" if speeds else "-"
            print(f"step {step}  {elapsed:.0f} s  loss {loss}  {self.validated}  {speed} images/s", flush=True)

    def pictures(self, step: int, rows: Sequence[Tensor]) -> None:
        """Write samples.png from rows of images (n, C, H, W) in [0, 1]; loggers keep those of all steps."""
        grid = torch.cat([torch.cat(list(row.float().nan_to_num().clamp(0, 1)), dim=-1) for row in rows], dim=-2).cpu()
        save_image(grid, self.folder / "samples.png")
        for logger in self.loggers:
            logger.picture(grid, step)

    def _write(self, step: int, elapsed: float, figures: Mapping[str, float]) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in figures.items()}
        self.writer.write({"step": step, "elapsed": round(elapsed, 2), **finite})
        for logger in self.loggers:
            logger.figures({name: value for name, value in finite.items() if value is not None}, step)

    def draw_loss(self, figure: str) -> None:
        """Write loss.png: the training loss and a validation figure over the steps."""
        picture = Figure(figsize=(7, 3.5), layout="constrained")
        axes = picture.add_subplot()
        axes.set_xlabel("step")
        steps, losses = self._columns("loss")
        axes.plot(steps, losses, color="C0", alpha=0.7, label="training")
        other = axes
        if figure.endswith("_per_dimension"):  # the loss itself
            axes.set_ylabel(figure.replace("_", " "))
        else:
            axes.set_ylabel("training loss")
            axes.set_yscale("log" if all(loss > 0 for loss in losses) else "linear")
            other = axes.twinx()
            other.set_ylabel(f"validation {figure}")
        other.plot(*self._columns(f"validation_{figure}"), "o-", color="C1", label="validation")
        picture.legend(loc="outside upper right", ncols=2)
        with atomic_write(self.folder / "loss.png", mode="wb") as f:
            picture.savefig(f, format="png", dpi=100)

    def _columns(self, name: str) -> tuple[list[float], list[float]]:
        pairs = [(row["step"], row[name]) for row in self.rows if row.get(name) is not None]
        return [step for step, _ in pairs], [value for _, value in pairs]

    def close(self) -> None:
        """Stop the bar and close the files."""
        if self.bar is not None:
            self.bar.stop()
        self.writer.close()
        for logger in self.loggers:
            logger.close()


# Loggers --------------------------------------------------------------------------------------------------------------


class Logger(NamedTuple):
    """Where the figures and pictures of a run go: the methods of one of Lightning Fabric's loggers, or of a client.

    Arguments:
        figures: notes figures by name, all of them finite, of a step.
        picture: notes the grid of samples (C, H, W) in [0, 1] of a step; a logger of numbers leaves it out.
        close: writes what is still to be written.
    """

    figures: Callable[[Values, int], object]
    picture: Callable[[Tensor, int], object]
    close: Callable[[], object]


def _tensorboard(folder: Path, recipe: Values, rows: Sequence[Values]) -> Logger:
    from lightning_fabric.loggers.tensorboard import TensorBoardLogger

    purge_step = rows[-1]["step"] + 1 if rows else None  # what a killed predecessor wrote beyond its state
    logger = TensorBoardLogger(folder, "tensorboard", "", purge_step=purge_step)
    writer: Any = logger.experiment
    return Logger(logger.log_metrics, lambda x, step: writer.add_image("samples", x, step), writer.close)


def _csv(folder: Path, recipe: Values, rows: Sequence[Values]) -> Logger:
    from lightning_fabric.loggers.csv_logs import CSVLogger

    (folder / "csv" / "metrics.csv").unlink(missing_ok=True)  # the earlier rows are written again
    logger = CSVLogger(folder, "csv", "")
    for row in rows:
        known = {key: value for key, value in row.items() if key != "step" and value is not None}
        logger.log_metrics(known, row["step"])
    return Logger(logger.log_metrics, lambda x, step: None, logger.save)


def _wandb(folder: Path, recipe: Values, rows: Sequence[Values]) -> Logger:
    module = importlib.import_module("wandb")
    mode = os.environ.get("WANDB_MODE", "offline")
    run: Any = module.init(dir=folder, mode=mode, name=recipe.get("name"), config=recipe)

    def note(values: Values, step: int) -> None:
        run.log(values, step=step)

    return Logger(note, lambda x, step: note({"samples": module.Image(_pixels(x))}, step), run.finish)


def _mlflow(folder: Path, recipe: Values, rows: Sequence[Values]) -> Logger:
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # a folder; MLflow would rather have a database
    place = os.environ.get("MLFLOW_TRACKING_URI") or (folder / "mlflow").resolve().as_uri()
    client: Any = importlib.import_module("mlflow").MlflowClient(place)
    run = client.create_run("0", run_name=recipe.get("name")).info.run_id

    def note(values: Values, step: int) -> None:
        for name, value in values.items():
            client.log_metric(run, name, value, step=step)

    def picture(x: Tensor, step: int) -> None:
        client.log_image(run, _pixels(x), key="samples", step=step)

    return Logger(note, picture, lambda: client.set_terminated(run))


def _pixels(x: Tensor) -> np.ndarray:
    """Whole numbers (H, W, C): Weights & Biases takes floats for those."""
    return (x * 255).round().byte().permute(1, 2, 0).numpy()


_LOGGERS = {"tensorboard": _tensorboard, "csv": _csv, "wandb": _wandb, "mlflow": _mlflow}
_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow-skinny"}


def check_loggers(names: Sequence[str]) -> None:
    """Raise ``ImportError`` for the first of these whose package is missing; the message says what to install."""
    for name in names:
        if name in _PACKAGES and (sys.modules.get(name, "") is None or not importlib.util.find_spec(name)):
            package = _PACKAGES[name]
            raise ImportError(f"logger {name} needs the package {package}: pip install {package}")
