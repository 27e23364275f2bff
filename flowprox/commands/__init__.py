"""The commands: typed functions whose docstrings are the help and whose arguments become options.

They print results as tables and return the exit status. Nothing heavy is imported before a command runs, so that help is
immediate. (jsonargparse also executes what stands under ``TYPE_CHECKING``.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from flowprox.commands.evaluate import evaluate
from flowprox.commands.models import demo, models, sample
from flowprox.commands.reconstruct import reconstruct
from flowprox.commands.report import report
from flowprox.commands.train import run_training
from flowprox.training import train_denoiser, train_flow, train_gan, train_unfolded

__all__ = ["COMMANDS", "Command"]


class Command(NamedTuple):
    """One subcommand: the function that is its options and help, whether it reads a recipe, its positional arguments."""

    function: Callable[..., Any]
    has_recipe: bool = False
    positional: str = ""
    n_positional: str = "?"
    several: Mapping[str, str] = MappingProxyType({})  # options of several words, and what a word is called
    runner: Callable[..., int] | None = None  # runs the function, where more stands around it than a call

    def run(self, **options: Any) -> int:
        """Run the command; the exit status."""
        run = self.function if self.runner is None else functools.partial(self.runner, self.function)
        return run(**options) or 0


COMMANDS: dict[str, Command] = {
    "demo": Command(demo),
    "train-flow": Command(train_flow, has_recipe=True, runner=run_training),
    "train-unfolded": Command(train_unfolded, has_recipe=True, runner=run_training),
    "train-denoiser": Command(train_denoiser, has_recipe=True, runner=run_training),
    "train-gan": Command(train_gan, has_recipe=True, runner=run_training),
    "reconstruct": Command(
        reconstruct,
        positional="inputs",
        n_positional="+",
        several={"options": "KEY=VALUE", "parameters": "KEY=VALUE", "noise": "NAME", "size": "N"},
    ),
    "evaluate": Command(evaluate, has_recipe=True),
    "report": Command(report, positional="folders", n_positional="+", several={"parts": "PART"}),
    "sample": Command(sample),
    "models": Command(models, positional="name"),
}
