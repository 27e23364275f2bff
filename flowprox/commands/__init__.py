"""The commands: typed functions whose docstrings are the help and whose arguments become options.

They print results as tables and return the exit status. Nothing heavy is imported before a command has checked its words, so
that help and refusals are immediate. (jsonargparse also executes what stands under ``TYPE_CHECKING``.)
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from flowprox.commands.calibrate import CalibrateOptions, calibrate
from flowprox.commands.catalog import app, demo, export, methods, models, problems, push, recipes, sample
from flowprox.commands.evaluate import ShowOptions, evaluate, report
from flowprox.commands.reconstruct import ReconstructOptions, reconstruct
from flowprox.commands.sweep import sweep
from flowprox.options import EvaluationOptions, TrainingOptions
from flowprox.training import train_denoiser, train_flow, train_gan, train_unfolded

__all__ = ["COMMANDS", "Command"]


class Command(NamedTuple):
    """One subcommand: the function that is its help and what its words become.

    Arguments:
        function: its arguments are the options.
        record: a dataclass whose fields are the options, where the function takes one record instead.
        has_recipe: whether ``--config`` reads options from YAML.
        positional: the argument that is no option; several with blanks between them.
        n_positional: "1" for one, "?" for at most one, "+" for at least one.
        several: options of several words, and what a word is called.
        trains: whether the function starts a training run.
    """

    function: Callable[..., Any]
    record: type | None = None
    has_recipe: bool = False
    positional: str = ""
    n_positional: str = "?"
    several: Mapping[str, str] = MappingProxyType({})
    trains: bool = False

    @property
    def source(self) -> Callable[..., Any]:
        """What has the options as arguments, and says in its docstring what they mean."""
        return self.record or self.function

    def run(self, **options: Any) -> int:
        """Run the command; the exit status."""
        for name, value in {"training.seed": getattr(options.get("training"), "seed", None), **options}.items():
            if name.endswith("seed") and value is not None and not -(2**63) <= value < 2**63:
                raise ValueError(f"{name} must be a whole number of at most 63 bits, got {value}")
        if self.trains:
            return _train(self.function, **options)
        return (self.function(self.record(**options)) if self.record else self.function(**options)) or 0


def _train(train: Callable[..., Any], training: TrainingOptions, **options: Any) -> int:
    """Train, and say what came of it; the exit status."""
    if training.devices > 1 and training.num_threads is None:  # before torch is imported
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // training.devices)))
    import torch

    cuda, mps = torch.cuda.is_available, torch.backends.mps.is_available
    is_available = {"cuda": cuda, "gpu": cuda, "mps": mps}.get(training.accelerator, lambda: True)
    if not is_available():
        raise ValueError(f"training.accelerator {training.accelerator!r} is not available here; use 'cpu' or 'auto'")
    result = train(training=training, **options)
    if result.reason == "signal":
        print(f"stopped after {result.steps} steps; --resume continues the run in {result.folder}", file=sys.stderr)
        return 130
    figures = ", ".join(f"{name} {value:.4g}" for name, value in (result.best or result.metrics).items())
    print(f"{result.steps} steps in {result.elapsed:.0f} s ({result.reason}), {result.skipped} skipped")
    print(f"model: {os.path.join(result.folder, 'model')}" + (f" ({figures})" if figures else ""))
    return 0


COMMANDS: dict[str, Command] = {
    "demo": Command(demo),
    "train-flow": Command(train_flow, has_recipe=True, trains=True),
    "train-unfolded": Command(train_unfolded, has_recipe=True, trains=True),
    "train-denoiser": Command(train_denoiser, has_recipe=True, trains=True),
    "train-gan": Command(train_gan, has_recipe=True, trains=True),
    "sweep": Command(sweep, positional="recipe", n_positional="1"),
    "reconstruct": Command(
        reconstruct,
        ReconstructOptions,
        positional="inputs",
        n_positional="+",
        several={"options": "KEY=VALUE", "parameters": "KEY=VALUE", "noise": "NAME", "size": "N"},
    ),
    "calibrate": Command(
        calibrate, CalibrateOptions, positional="model data", n_positional="1", several={"parameters": "KEY=VALUE"}
    ),
    "evaluate": Command(evaluate, EvaluationOptions, has_recipe=True),
    "report": Command(report, ShowOptions, positional="folders", n_positional="+", several={"parts": "PART"}),
    "sample": Command(sample),
    "export": Command(
        export, positional="model", n_positional="1", several={"parameters": "KEY=VALUE", "size": "N", "inputs": "NAME"}
    ),
    "app": Command(app),
    "push": Command(push, positional="model repository", n_positional="1"),
    "models": Command(models, positional="name"),
    "problems": Command(problems, positional="name"),
    "methods": Command(methods, positional="name"),
    "recipes": Command(recipes, positional="name"),
}
