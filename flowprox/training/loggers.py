"""Loggers by name: a run's figures and sample images for the programs in which people compare runs.

TensorBoard and CSV are Lightning Fabric's. Weights & Biases and MLflow are written by their own clients, offline or into the
run's folder unless their environment variables say otherwise.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from flowprox.naming import Values


class Logger:
    """Where the figures and pictures of a run go."""

    def figures(self, values: Mapping[str, float], step: int) -> None:
        """Note figures by name, all of them finite."""

    def picture(self, x: Tensor, step: int) -> None:
        """Note the grid of samples (C, H, W) in [0, 1]; a logger of numbers leaves it out."""

    def close(self) -> None:
        """Write what is still to be written."""


class _TensorBoard(Logger):
    def __init__(self, folder: Path, recipe: Values, rows: Sequence[Values]) -> None:
        from lightning_fabric.loggers.tensorboard import TensorBoardLogger

        purge_step = rows[-1]["step"] + 1 if rows else None  # what a killed predecessor wrote beyond its state
        self.logger = TensorBoardLogger(folder, "tensorboard", "", purge_step=purge_step)

    def figures(self, values: Mapping[str, float], step: int) -> None:
        self.logger.log_metrics(dict(values), step)

    def picture(self, x: Tensor, step: int) -> None:
        self.logger.experiment.add_image("samples", x, step)

    def close(self) -> None:
        self.logger.experiment.close()


class _CSV(Logger):
    def __init__(self, folder: Path, recipe: Values, rows: Sequence[Values]) -> None:
        from lightning_fabric.loggers.csv_logs import CSVLogger

        (folder / "csv" / "metrics.csv").unlink(missing_ok=True)  # the earlier rows are written again
        self.logger = CSVLogger(folder, "csv", "")
        for row in rows:
            self.figures({key: value for key, value in row.items() if key != "step" and value is not None}, row["step"])

    def figures(self, values: Mapping[str, float], step: int) -> None:
        self.logger.log_metrics(dict(values), step)

    def close(self) -> None:
        self.logger.save()


class _WandB(Logger):
    def __init__(self, folder: Path, recipe: Values, rows: Sequence[Values]) -> None:
        self.module: Any = importlib.import_module("wandb")
        mode = os.environ.get("WANDB_MODE", "offline")
        self.run: Any = self.module.init(dir=folder, mode=mode, name=recipe.get("name"), config=recipe)

    def figures(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def picture(self, x: Tensor, step: int) -> None:
        self.run.log({"samples": self.module.Image(_pixels(x))}, step=step)

    def close(self) -> None:
        self.run.finish()


class _MLflow(Logger):
    def __init__(self, folder: Path, recipe: Values, rows: Sequence[Values]) -> None:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # a folder; MLflow would rather have a database
        module: Any = importlib.import_module("mlflow")
        place = os.environ.get("MLFLOW_TRACKING_URI") or (folder / "mlflow").resolve().as_uri()
        self.client: Any = module.MlflowClient(place)
        self.run = self.client.create_run("0", run_name=recipe.get("name")).info.run_id

    def figures(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.client.log_metric(self.run, name, value, step=step)

    def picture(self, x: Tensor, step: int) -> None:
        self.client.log_image(self.run, _pixels(x), key="samples", step=step)

    def close(self) -> None:
        self.client.set_terminated(self.run)


def _pixels(x: Tensor) -> np.ndarray:
    """Whole numbers (H, W, C): Weights & Biases takes floats for those."""
    return (x * 255).round().byte().permute(1, 2, 0).numpy()


_LOGGERS: dict[str, type[Logger]] = {"tensorboard": _TensorBoard, "csv": _CSV, "wandb": _WandB, "mlflow": _MLflow}


_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow-skinny"}


def check_loggers(names: Sequence[str]) -> None:
    """Raise ``ImportError`` for the first of these whose package is missing; the message says what to install."""
    for name in names:
        if name in _PACKAGES and (sys.modules.get(name, "") is None or not importlib.util.find_spec(name)):
            package = _PACKAGES[name]
            raise ImportError(f"logger {name} needs the package {package}: pip install {package}")


def make_logger(name: str, folder: Path, recipe: Values, rows: Sequence[Values]) -> Logger:
    """The logger of that name, for a run that goes on after ``rows``, the figures of an earlier part of it."""
    return _LOGGERS[name](folder, recipe, rows)  # type: ignore[call-arg]
