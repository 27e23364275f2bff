"""What stands around a training run on the command line; the commands are the functions of ``flowprox.training``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from flowprox.options import TrainingOptions

__all__ = ["run_training"]


def run_training(train: Callable[..., Any], training: TrainingOptions, **options: Any) -> int:
    """Train, and say what came of it; the exit status."""
    _prepare(training)
    return _ended(train(training=training, **options))


def _prepare(training: TrainingOptions) -> None:
    """Share the cores among the processes, before torch is imported, and refuse an accelerator that is not there."""
    if training.devices > 1 and training.num_threads is None:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // training.devices)))
    import torch

    available = {
        "cuda": torch.cuda.is_available,
        "gpu": torch.cuda.is_available,
        "mps": torch.backends.mps.is_available,
    }
    if training.accelerator in available and not available[training.accelerator]():
        raise ValueError(f"training.accelerator {training.accelerator!r} is not available here; use 'cpu' or 'auto'")


def _ended(result: Any) -> int:
    """Say what a ``TrainingResult`` came to; the exit status."""
    if result.reason == "signal":
        print(f"stopped after {result.steps} steps; --resume continues the run in {result.folder}", file=sys.stderr)
        return 130
    figures = ", ".join(f"{name} {value:.4g}" for name, value in (result.best or result.metrics).items())
    print(f"{result.steps} steps in {result.elapsed:.0f} s ({result.reason}), {result.skipped} skipped")
    print(f"model: {os.path.join(result.folder, 'model')}" + (f" ({figures})" if figures else ""))
    return 0
