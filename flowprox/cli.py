"""The command line: typed functions become subcommands, the records of ``flowprox.options`` become recipes.

Bad input ends in one line on standard error and exit status 2; an interrupted command in 130. Nothing heavy is imported
before a command runs, so that help is immediate.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from jsonargparse import ArgumentParser

from flowprox import __version__
from flowprox.options import (
    DataOptions,
    DenoiserOptions,
    LikelihoodOptions,
    ProblemOptions,
    TrainingOptions,
    UnfoldedOptions,
)

if TYPE_CHECKING:
    from flowprox.training import TrainingResult

__all__ = ["main"]

TRACEBACK = "FLOWPROX_TRACEBACK"
"""Environment variable; when set, the traceback of an error is shown too."""

_BAD_INPUT = (ValueError, TypeError, OSError, ArithmeticError, argparse.ArgumentError)
_LIKELIHOOD = LikelihoodOptions()


# Commands ------------------------------------------------------------------------------------------------------------


def demo(out: str = "flowprox-demo", device: str = "cpu", seed: int = 0, overwrite: bool = False) -> None:
    """Reconstruct the bundled pictures for three problems and write a report. Needs no download.

    Arguments:
        out: folder to write; report.html in it shows the result.
        device: cpu, cuda or mps.
        seed: of the noise.
        overwrite: replace the folder if an earlier demo is in it.
    """
    from flowprox.evaluation.demo import run_demo

    print(f"report: {run_demo(out, device=device, seed=seed, overwrite=overwrite)}")


def train_flow(
    flow: str | dict[str, Any],
    data: DataOptions,
    training: TrainingOptions,
    likelihood: LikelihoodOptions = _LIKELIHOOD,
    out: str = "runs/flow",
    resume: bool = False,
    name: str = "flow",
) -> int:
    """Train a normalizing flow on clean images by maximum likelihood.

    Arguments:
        flow: "compact", "paper", a specification {kind: Glow, arguments: {...}}, or a pretrained flow (name, hub id or
            folder) to train on.
        data: the images.
        training: limits, optimiser and devices.
        likelihood: bit depth and added noise.
        out: folder of the run; the model is written to OUT/model.
        resume: continue the run in OUT, if there is one.
        name: the model's name in its card.
    """
    _share_cores(training)
    from flowprox.training import train_flow

    return _ended(train_flow(flow, data, training, likelihood, out, resume, name))


def train_unfolded(
    model: UnfoldedOptions,
    problem: ProblemOptions,
    data: DataOptions,
    training: TrainingOptions,
    out: str = "runs/unfolded",
    resume: bool = False,
    name: str = "unfolded",
) -> int:
    """Train an unfolded network, end to end, for one measurement problem.

    Arguments:
        model: the network: its prox, the number of folds, where it starts.
        problem: the operator and its noise.
        data: the clean images.
        training: limits, optimiser and devices.
        out: folder of the run; the model is written to OUT/model.
        resume: continue the run in OUT, if there is one.
        name: the model's name in its card.
    """
    _share_cores(training)
    from flowprox.training import train_unfolded

    return _ended(train_unfolded(model, problem, data, training, out, resume, name))


def train_denoiser(
    denoiser: DenoiserOptions,
    data: DataOptions,
    training: TrainingOptions,
    out: str = "runs/denoiser",
    resume: bool = False,
    name: str = "denoiser",
) -> int:
    """Pre-train a ResNet or U-Net to remove Gaussian noise; an unfolded network may start from it.

    Arguments:
        denoiser: the network and the noise it learns to remove.
        data: the clean images.
        training: limits, optimiser and devices.
        out: folder of the run; the network is written to OUT/model.
        resume: continue the run in OUT, if there is one.
        name: the model's name in its card.
    """
    _share_cores(training)
    from flowprox.training import train_denoiser

    return _ended(train_denoiser(denoiser, data, training, out, resume, name))


def _share_cores(training: TrainingOptions) -> None:
    """Several processes on a machine share its cores; must come before torch is imported."""
    if training.devices > 1 and training.num_threads is None:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // training.devices)))


def _ended(result: TrainingResult) -> int:
    if result.reason == "signal":
        print(f"stopped after {result.steps} steps; --resume continues the run in {result.folder}", file=sys.stderr)
        return 130
    figures = ", ".join(f"{name} {value:.4g}" for name, value in (result.best or result.metrics).items())
    print(f"{result.steps} steps in {result.elapsed:.0f} s ({result.reason}), {result.skipped} skipped")
    print(f"model: {os.path.join(result.folder, 'model')}" + (f" ({figures})" if figures else ""))
    return 0


class _Command(NamedTuple):
    run: Callable[..., int | None]
    has_recipe: bool = False


_COMMANDS: dict[str, _Command] = {
    "demo": _Command(demo),
    "train-flow": _Command(train_flow, has_recipe=True),
    "train-unfolded": _Command(train_unfolded, has_recipe=True),
    "train-denoiser": _Command(train_denoiser, has_recipe=True),
}


# Parsing and errors --------------------------------------------------------------------------------------------------


def make_parser() -> ArgumentParser:
    """The parser of the whole command line."""
    parser = ArgumentParser(
        prog="flowprox",
        exit_on_error=False,
        description="Image reconstruction with normalizing-flow priors.",
        epilog=f"Set {TRACEBACK}=1 to see the traceback of an error.",
    )
    parser.add_argument("--version", action="version", version=f"flowprox {__version__}")
    commands = parser.add_subcommands(dest="command", required=True)
    for name, command in _COMMANDS.items():
        summary = (command.run.__doc__ or "").partition("\n")[0]
        commands.add_subcommand(name, _command_parser(command, summary), help=summary)
    return parser


def _command_parser(command: _Command, summary: str) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False, description=summary)
    if command.has_recipe:
        parser.add_argument("--config", action="config", help="recipe (YAML) with any of the options below")
    parser.add_function_arguments(command.run, as_positional=False)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status.

    Arguments:
        argv: the words after ``flowprox``; by default those of the process.

    Returns:
        0 on success, 2 after bad input, 130 when interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(words)
    except SystemExit as end:  # argparse, after --help or --version
        return end.code if isinstance(end.code, int) else 2
    except KeyboardInterrupt:
        print("flowprox: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if not _is_bad_input(error):
            raise
        if os.environ.get(TRACEBACK):
            traceback.print_exc()
        print(f"flowprox: {_one_line(error)}", file=sys.stderr)
        return 2


def _run(words: list[str]) -> int:
    parser = make_parser()
    try:
        parsed = parser.parse_args(_recipe_first(_complete_switches(words)))
    except argparse.ArgumentError as error:
        raise ValueError(_with_remedy(str(error), words)) from error
    arguments = parser.instantiate(parsed)
    name = str(arguments["command"])
    options = {key: value for key, value in vars(arguments[name]).items() if key != "config"}
    return _COMMANDS[name].run(**options) or 0


def _complete_switches(words: list[str]) -> list[str]:
    """``--resume`` becomes ``--resume=true`` and ``--no-resume`` ``--resume=false``, for every option that is either."""
    switches = {f"--{name}" for name, value in _defaults(words).items() if isinstance(value, bool)}
    completed = []
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word in switches and following not in ("true", "false"):
            word += "=true"
        elif word.replace("--no-", "--", 1) in switches and word not in switches:
            word = word.replace("--no-", "--", 1) + "=false"
        completed.append(word)
    return completed


def _recipe_first(words: list[str]) -> list[str]:
    """The words with ``--config`` right after the command: options override the recipe wherever they stand."""
    for i, word in enumerate(words):
        n = 1 if word.startswith("--config=") else 2 if word == "--config" else 0
        if n and i > 1:
            return [words[0], *words[i : i + n], *words[1:i], *words[i + n :]]
    return words


def _is_bad_input(error: Exception) -> bool:
    """Whether the user can mend it; the two classes that are not built in are looked up only where they are loaded."""
    classes = [*_BAD_INPUT]
    for module, name in (
        ("torch", "OutOfMemoryError"),
        ("lightning.fabric.utilities.exceptions", "MisconfigurationException"),
    ):
        if module in sys.modules:
            classes.append(getattr(sys.modules[module], name))
    return isinstance(error, tuple(classes))


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        places = [str(place) for place in (error.filename, error.filename2) if place is not None]
        return ": ".join([*places[:1], error.strerror])
    return " ".join(str(error).split()) or type(error).__name__


def _with_remedy(message: str, words: list[str]) -> str:
    """jsonargparse's message, shortened, with the nearest names of what is not known."""
    if unknown := re.search(r"does not accept option '([^']+)'", message):
        return f"unknown key {unknown[1]!r} in the recipe or options; {_nearest(unknown[1], _option_names(words))}"
    if unknown := re.search(r"unrecognized arguments: (\S+)", message):
        name = unknown[1].lstrip("-").partition("=")[0]
        return f"unknown option {unknown[1]}; {_nearest(name, _option_names(words), '--')}"
    if unknown := re.search(r"invalid choice: '([^']*)'", message):
        return f"unknown command {unknown[1]!r}; {_nearest(unknown[1], _COMMANDS)}"
    if missing := re.search(r"arguments are required: (.*)", message):
        return (
            f"missing {', '.join(name.partition('.')[2] for name in missing[1].split(', '))}; see --help of the command"
        )
    if "but it was not provided" in message:
        return f"give a command: {', '.join(_COMMANDS)} (flowprox --help)"
    return _wrong_value(message)


def _wrong_value(message: str) -> str:
    found = re.search(r'Parser key "([^"]+)":\s*(.*)', message, re.DOTALL)
    if not found:
        return message
    key, reason = found.groups()
    kinds = re.findall(r"<class '(\w+)'>", reason.partition("Errors:")[0])
    value = re.search(r"Given value: (.*)", reason)
    if kinds and value:
        return f"{key} must be {' or '.join('null' if k == 'NoneType' else k for k in kinds)}, got {value[1]}"
    return f"{key}: {reason}"


def _option_names(words: list[str]) -> list[str]:
    return list(_defaults(words))


def _defaults(words: list[str]) -> dict[str, Any]:
    """Every option of the command in ``words``, with its default."""
    command = next((word for word in words if word in _COMMANDS), None)
    return dict(_command_parser(_COMMANDS[command], "").get_defaults().items()) if command else {}


def _nearest(name: str, known: Sequence[str] | dict[str, Any], prefix: str = "") -> str:
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(prefix + n for n in near)}?"
    return f"known: {', '.join(prefix + n for n in known)}" if len(known) <= 20 else "see --help of the command"


if __name__ == "__main__":
    sys.exit(main())
