"""The command line: typed functions become subcommands, the records of ``flowprox.options`` become recipes.

Bad input ends in one line on standard error and exit status 2; an interrupted command in 130. Nothing heavy is imported
before a command runs, so that help is immediate. (jsonargparse also executes what stands under ``TYPE_CHECKING``.)
"""

from __future__ import annotations

import argparse
import difflib
import errno
import inspect
import json
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Any, Literal, NamedTuple

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

__all__ = ["main"]

TRACEBACK = "FLOWPROX_TRACEBACK"
"""Environment variable; when set, the traceback of an error is shown too."""

_BAD_INPUT = (ValueError, TypeError, OSError, ArithmeticError, argparse.ArgumentError)
_LIKELIHOOD = LikelihoodOptions()
_Table = tuple[list[str], list[list[str]]]  # head and rows


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
    _prepare(training)
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
    _prepare(training)
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
    _prepare(training)
    from flowprox.training import train_denoiser

    return _ended(train_denoiser(denoiser, data, training, out, resume, name))


def reconstruct(
    inputs: list[str],
    model: str,
    out: str,
    problem: str | None = None,
    parameters: list[str] | None = None,
    measured: bool = False,
    seed: int = 0,
    operator_seed: int | None = None,
    pad: bool = True,
    device: str = "cpu",
) -> None:
    """Reconstruct images or measurements with a trained unfolded network.

    Clean images are measured first, and compared with what is reconstructed from that.

    Arguments:
        inputs: image files, measured arrays (.npy), folders of either.
        model: a shipped model (see "flowprox models"), a folder, or a hub id.
        out: folder to make.
        problem: denoising, inpainting, random-inpainting or deblurring; by default the one in the model's card.
        parameters: KEY=VALUE ... of the problem.
        measured: image files are measurements, not clean images; arrays always are.
        seed: of the noise; each image's own follows from it and the file's name.
        operator_seed: of a random mask; by default the one in the model's card.
        pad: extend images whose sides the model cannot take, and crop back; --no-pad refuses them.
        device: cpu, cuda or mps.
    """
    given = _parameters(parameters or [])
    from flowprox.reconstruction import ReconstructionJob, reconstruct_files

    job = ReconstructionJob(model, problem, given, measured, seed, operator_seed, pad, device)
    records = reconstruct_files(job, inputs, out)
    _print_table(_results(records))
    print(f"written to {out}")


def sample(
    model: str,
    out: str = "samples.png",
    n: int = 16,
    temperature: float = 0.7,
    seed: int = 0,
    size: int | None = None,
    device: str = "cpu",
) -> None:
    """Draw images from a trained flow, as one picture.

    Arguments:
        model: a shipped model (see "flowprox models"), a folder, or a hub id.
        out: PNG file to write.
        n: how many images.
        temperature: standard deviation of the latent; below 1 images are smoother.
        seed: the same seed draws the same images.
        size: height and width in pixels; by default those the flow was made for.
        device: cpu, cuda or mps.
    """
    if n < 1:
        raise ValueError(f"n must be positive, got {n}")
    if not out.lower().endswith(".png"):
        raise ValueError(f"out must end in .png, got {out!r}")
    import torch
    from torchvision.utils import make_grid

    from flowprox.checkpoints import load_model
    from flowprox.data import save_image
    from flowprox.flows import Flow

    flow = load_model(model, device=device)
    if not isinstance(flow, Flow):
        raise ValueError(f"model {model!r} is a {type(flow).__name__}, not a flow; see flowprox models")
    generator = torch.Generator(device).manual_seed(seed)
    x = flow.sample(n, temperature, None if size is None else (size, size), generator)
    os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
    save_image(make_grid(x.clamp(0, 1).cpu(), nrow=math.ceil(math.sqrt(n)), padding=2, pad_value=1.0), out)
    print(f"written to {out}")


def models(name: str | None = None) -> None:
    """List the shipped models, or print the card of one.

    Arguments:
        name: a shipped model, a folder, or a hub id whose card to print.
    """
    from flowprox.checkpoints import list_models, load_card

    if name is not None:
        print(load_card(name).to_json(), end="")
        return
    cards = [load_card(name) for name in list_models()]
    if not cards:
        print("no models are shipped with this installation")
        return
    rows = [[card.name, card.model["kind"], _problem(card.problem), _trained(card)] for card in cards]
    _print_table((["model", "kind", "problem", "parameters, file, figures"], rows), justify="left")


def _problem(problem: Mapping[str, Any] | None) -> str:
    if not problem:
        return "–"
    given = ", ".join(f"{key} {value}" for key, value in problem.get("parameters", {}).items() if value is not None)
    return f"{problem.get('name')}" + (f" ({given})" if given else "")


def _trained(card: Any) -> str:
    """The size and the figures on a ``Card``."""
    figures = [f"{key} {value:.4g}" for key, value in card.metrics.items() if isinstance(value, float)]
    return ", ".join([f"{card.n_parameters:,}", f"{card.n_bytes / 1e6:.1f} MB", *figures])


def _results(records: list[dict[str, Any]], n_shown: int = 40) -> _Table:
    known = [record for record in records if "psnr" in record]
    head = ["image", "height x width", *(["PSNR (dB)", "SSIM"] if known else []), "seconds"]
    rows = [_result(record, bool(known)) for record in records[:n_shown]]
    if len(records) > n_shown:
        rows.append([f"... {len(records) - n_shown} more", *[""] * (len(head) - 1)])
    means = {key: _mean(records, key) for key in ("psnr", "ssim", "seconds")}
    return head, [*rows, _result({"image": f"mean of {len(records)}", **means}, bool(known))]


def _result(record: Mapping[str, Any], with_figures: bool) -> list[str]:
    size = f"{record['height']}x{record['width']}" if "height" in record else ""
    figures = [_digits(record.get("psnr"), 2), _digits(record.get("ssim"), 3)] if with_figures else []
    return [record["image"], size, *figures, _digits(record["seconds"], 3)]


def _mean(records: list[dict[str, Any]], key: str) -> float | None:
    values = [record[key] for record in records if key in record]
    return sum(values) / len(values) if values else None


def _digits(value: float | None, n: int) -> str:
    return "–" if value is None else f"{value:.{n}f}"


def _print_table(table: _Table, justify: Literal["left", "right"] = "right") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table()
    for i, name in enumerate(table[0]):
        drawn.add_column(name, justify=justify if i else "left", overflow="fold")
    for row in table[1]:
        drawn.add_row(*(Text(cell) for cell in row))
    Console().print(drawn)


def _parameters(words: list[str]) -> dict[str, Any]:
    """KEY=VALUE words; a value is a number, true, false, null, a list in brackets, or text."""
    given = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not (key and equals):
            raise ValueError(f"parameters: {word!r} is not KEY=VALUE; put the inputs before --parameters")
        given[key] = _value(value)
    return given


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


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


class _Command(NamedTuple):
    run: Callable[..., int | None]
    has_recipe: bool = False
    positional: str = ""
    n_positional: str = "?"


_COMMANDS: dict[str, _Command] = {
    "demo": _Command(demo),
    "train-flow": _Command(train_flow, has_recipe=True),
    "train-unfolded": _Command(train_unfolded, has_recipe=True),
    "train-denoiser": _Command(train_denoiser, has_recipe=True),
    "reconstruct": _Command(reconstruct, positional="inputs", n_positional="+"),
    "sample": _Command(sample),
    "models": _Command(models, positional="name"),
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
    own: set[str | int] = {"parameters", "n", command.positional}
    own &= set(inspect.signature(command.run).parameters)
    if command.positional:
        parser.add_argument(command.positional, nargs=command.n_positional, help=_help(command.run, command.positional))
    if "parameters" in own:
        parser.add_argument("--parameters", nargs="+", metavar="KEY=VALUE", help=_help(command.run, "parameters"))
    if "n" in own:
        parser.add_argument("-n", "--n", type=int, default=16, help=_help(command.run, "n"))
    parser.add_function_arguments(command.run, as_positional=False, skip=own)
    return parser


def _help(function: Callable[..., Any], name: str) -> str:
    """What the docstring says about an argument, for options that jsonargparse does not make by itself."""
    found = re.search(rf"^ +{name}: (.*(?:\n {{12,}}.*)*)", function.__doc__ or "", re.MULTILINE)
    return " ".join(found[1].split()) if found else ""


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
    """``--resume`` becomes ``--resume=true`` and ``--no-resume`` becomes ``--resume=false``, for every such option."""
    switches = {f"--{name}" for name, value in _defaults(words).items() if isinstance(value, bool)}
    completed = []
    for word, following in zip_longest(words, words[1:]):
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
        remedy = {
            errno.ENOSPC: "free some space and run the command again, a training run with --resume",
            errno.EEXIST: "a file is in the way: choose another --out",
            errno.ENOTDIR: "a file is in the way: choose another --out",
            errno.EACCES: "choose an --out that can be written",
            errno.EROFS: "choose an --out that can be written",
        }.get(error.errno or 0)
        return ": ".join([*places[:1], error.strerror]) + (f"; {remedy}" if remedy else "")
    return " ".join(str(error).split()) or type(error).__name__


def _with_remedy(message: str, words: list[str]) -> str:
    """jsonargparse's message, shortened, with the nearest names of what is not known."""
    if unknown := re.search(r"does not accept option '([^']+)'", message):
        remedy = _whose_key(unknown[1], words) or _nearest(unknown[1], _option_names(words))
        return f"unknown key {unknown[1]!r} in the recipe or options; {remedy}"
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


def _whose_key(key: str, words: list[str]) -> str:
    """Which other training command has a key that this one lacks: the recipe may be meant for it."""
    top = key.partition(".")[0]
    having = [n for n, c in _COMMANDS.items() if c.has_recipe and top in inspect.signature(c.run).parameters]
    return f"{top!r} is a key of {' and '.join(having)}" if having and not {*having} & {*words} else ""


def _wrong_value(message: str) -> str:
    found = re.search(r'Parser key "([^"]+)":\s*(.*)', message, re.DOTALL)
    if not found:
        return message
    key, reason = found.groups()
    kinds = re.findall(r"<class '(\w+)'>", reason.partition("Errors:")[0])
    value = re.search(r"(?:Given|Got) value: (.*)", reason)
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
