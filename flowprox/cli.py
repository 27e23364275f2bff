"""The command line: the functions of ``flowprox.commands`` become subcommands, their records recipes.

Bad input ends in one line on standard error and exit status 2; an interrupted command in 130. Nothing heavy is imported
before a command runs, so that help is immediate.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import inspect
import io
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from flowprox import __version__
from flowprox.commands import COMMANDS, Command
from flowprox.commands.terminal import check_yaml, find_recipe
from flowprox.files import handled_signals
from flowprox.naming import Values, nearest, printable, require_package
from flowprox.options import EvaluatedMethod, EvaluatedProblem, ImageOptions, ScaleOptions

TRACEBACK = "FLOWPROX_TRACEBACK"
"""Environment variable; when set, the traceback of an error is shown too."""

_BAD_INPUT = (ValueError, TypeError, OSError, ArithmeticError, MemoryError, argparse.ArgumentError)
_LISTED = (EvaluatedMethod, EvaluatedProblem, ImageOptions, ScaleOptions)  # records that stand in lists of a recipe
_BUILDS_DIFFER = "operator torchvision::nms does not exist"
_REMEDIES = {
    errno.ENOSPC: "free some space and run the command again, a training run with --resume",
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR), "a file is in the way: choose another --out"),
    **dict.fromkeys((errno.EACCES, errno.EROFS), "choose an --out that can be written"),
}


def make_parser(only: str | None = None) -> ArgumentParser:
    """The parser of the whole command line; of ``only`` one command, if given, with its options, which saves time."""
    parser = ArgumentParser(
        prog="flowprox",
        exit_on_error=False,
        allow_abbrev=False,
        description="Image reconstruction with normalizing-flow priors.",
        epilog=f"Set {TRACEBACK}=1 to see the traceback of an error.",
    )
    parser.add_argument("--version", action="version", version=f"flowprox {__version__}")
    parser.add_argument(
        "--print-completion", metavar="SHELL", help="print what completes commands and options: bash, zsh or tcsh"
    )
    commands = parser.add_subcommands(dest="command", required=True)
    for name, command in COMMANDS.items():
        summary = (command.function.__doc__ or "").partition("\n")[0]
        is_read = only in (None, name)
        commands.add_subcommand(name, _command_parser(command, summary) if is_read else ArgumentParser(), help=summary)
    return parser


def _command_parser(command: Command, summary: str) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False, description=summary)
    if command.has_recipe:
        text = "recipe with any of the options below: a YAML file, or a name that flowprox recipes lists"
        parser.add_argument("--config", action="config", help=text)
    own: set[str | int] = {*command.several, "n", *command.positional.split()}
    own &= set(inspect.signature(command.source).parameters)
    for name in command.positional.split():
        n: Values = {} if command.n_positional == "1" else {"nargs": command.n_positional}
        parser.add_argument(name, **n, help=_help(command.source, name))
    for name, word in command.several.items():
        kind = int if word == "N" else str
        parser.add_argument(f"--{name}", nargs="+", metavar=word, type=kind, help=_help(command.source, name))
    if "n" in own:
        parser.add_argument("-n", "--n", type=int, default=16, help=_help(command.source, "n"))
    parser.add_function_arguments(command.source, as_positional=False, skip=own)
    if command.trains:
        parser.set_defaults({"resume": False})
    return parser


def _help(function: Callable[..., Any], name: str) -> str:
    """What the docstring says about an argument, for options that jsonargparse does not make by itself."""
    docs = "\n".join(str(one.__doc__) for one in getattr(function, "__mro__", (function,)))
    match = re.search(rf"^ +{name}: (.*(?:\n {{8,}}.*)*)", docs, re.MULTILINE)
    text = re.split(r"\n {4,8}\w+: ", match[1])[0] if match else ""
    return " ".join(text.split())


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, the words after ``flowprox``; by default those of the process.

    The exit status is 0 on success, 2 after bad input, 130 when interrupted or terminated, 141 when nobody reads on.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal may know fewer letters than a file's name has
            stream.reconfigure(errors="replace")
    try:
        with handled_signals(_interrupt, signal.SIGTERM), warnings.catch_warnings():
            # as one line, without the place in the code that it comes from
            warnings.showwarning = lambda text, *_: print(f"flowprox: warning: {printable(str(text))}", file=sys.stderr)
            status = _run(words)
            sys.stdout.flush()
            return status
    except SystemExit as end:  # argparse, after --help or --version
        return end.code if isinstance(end.code, int) else 2
    except KeyboardInterrupt as end:
        print(f"flowprox: interrupted{f': {end}' if str(end) else ''}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # who read standard output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        if not _is_bad_input(error):
            raise
        if os.environ.get(TRACEBACK):
            traceback.print_exc()
        line = _explained(error)
        print(f"flowprox: {line if len(line) <= 1500 else f'{line[:750]} ... {line[-750:]}'}", file=sys.stderr)
        return 2


def _interrupt(number: int, frame: object) -> None:
    """SIGTERM ends a command as Ctrl-C does: what is half-written is removed."""
    raise KeyboardInterrupt("terminated")


def _run(words: list[str]) -> int:
    if words and words[0].partition("=")[0] == "--print-completion":
        shell = words[0].partition("=")[2] or "".join(words[1:2])
        shtab = require_package("shtab", "shtab", "--print-completion", extra="completion")
        if shell not in shtab.SUPPORTED_SHELLS:
            raise ValueError(f"unknown shell {shell!r}; {nearest(shell, shtab.SUPPORTED_SHELLS)}")
        print(shtab.complete(make_parser(), shell))
        return 0
    parser = make_parser(words[0] if words and words[0] in COMMANDS else "")
    try:
        parsed = parser.parse_args(completed(words))
    except argparse.ArgumentError as error:
        raise ValueError(_with_remedy(str(error), words)) from error
    arguments = parser.instantiate(parsed)
    name = str(arguments["command"])
    options = {key: value for key, value in vars(arguments[name]).items() if key != "config"}
    return COMMANDS[name].run(**options)


def completed(words: list[str]) -> list[str]:
    """The words as the parser takes them.

    Switches get their value, recipes by name their path; recipes stand right after the command, so that options override
    them and a later recipe an earlier one; and other training images are validated by their own part, under terms of their own.
    """
    words = _with_values_of_switches(words)
    recipes, others, rest = [], [], iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if name == "--config":
            path = find_recipe(value if equals else next(rest, ""))
            check_yaml(path)
            recipes.append(f"--config={path}")
        else:
            if value.endswith((".yaml", ".yml")) and os.path.exists(value):  # a part of a recipe, such as --data=FILE
                check_yaml(Path(value))
            others.append(word)
    keys = {word.partition("=")[0] for word in others}
    if recipes and "--data.train" in keys:
        own = {"validation": "null", "terms": "not stated; the terms of a network that this one started from go on"}
        others += [f"--data.{key}={value}" for key, value in own.items() if not {f"--data.{key}", "--data"} & keys]
    return [*others[:1], *recipes, *others[1:]]


def _with_values_of_switches(words: list[str]) -> list[str]:
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


def _is_bad_input(error: Exception) -> bool:
    """Whether the user can mend it; the classes that are not built in are looked up only where they are loaded."""
    if type(error) is ImportError and error.name is None:  # ours: an optional package is missing, and which
        return True
    if _BUILDS_DIFFER in str(error) or (type(error) is RuntimeError and "DefaultCPUAllocator" in str(error)):
        return True
    torch = sys.modules.get("torch")
    return isinstance(error, (*_BAD_INPUT, torch.OutOfMemoryError) if torch else _BAD_INPUT)


def _explained(error: Exception) -> str:
    """What to say of an error, and what helps."""
    if isinstance(error, OSError) and error.strerror:
        places = [os.fsdecode(place) for place in (error.filename, error.filename2) if place is not None]
        remedy = _REMEDIES.get(error.errno or 0)
        return printable(": ".join([*places[:1], error.strerror]) + (f"; {remedy}" if remedy else ""))
    if _BUILDS_DIFFER in str(error):
        return (
            "torch and torchvision are builds of two kinds (such as CPU and CUDA); install both again with one command: "
            "pip install --force-reinstall torch torchvision, both from one package index"
        )
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        return printable(f"out of memory ({error}); use a smaller image, batch or model")
    return printable(str(error)) or type(error).__name__


def _with_remedy(message: str, words: list[str]) -> str:
    """jsonargparse's message; for what is not known, the nearest names."""
    if unknown := re.search(r"class_path '[\w.]*\.(\w+)':\s+Option '([^']+)' is not accepted", message):
        key = re.match(r'(?:Parser key ")?(\w+)', message)
        record = next((one for one in _LISTED if one.__name__ == unknown[1]), None)
        keys = [field.name for field in dataclasses.fields(record)] if record else []
        return f"unknown key {unknown[2]!r} in {key[1] if key else 'the recipe'}; {nearest(unknown[2], keys)}"
    if unknown := re.search(r"does not accept option '([^']+)'", message):
        # which other training command has the key: the recipe may be meant for it
        top, recipes = unknown[1].partition(".")[0], {n: c for n, c in COMMANDS.items() if c.has_recipe}
        having = [n for n, c in recipes.items() if top in inspect.signature(c.source).parameters]
        remedy = f"{top!r} is a key of {' and '.join(having)}" if having and not {*having} & {*words} else ""
        remedy = remedy or nearest(unknown[1], _defaults(words))
        return f"unknown key {unknown[1]!r} in the recipe or options; {remedy}"
    if unknown := re.search(r"unrecognized arguments: (\S+)", message):
        name = unknown[1].lstrip("-").partition("=")[0]
        return f"unknown option {unknown[1]}; {nearest(name, _defaults(words), '--')}"
    if missing := re.search(r"arguments are required: (.*)", message):
        command, names = words[0], [name.partition(".")[2] for name in missing[1].split(", ")]
        own = COMMANDS[command].positional.split() if command in COMMANDS else []
        wanted = ", ".join(name.upper() if name in own else f"--{name}" for name in names)
        recipe = " or a recipe, --config" if command in COMMANDS and COMMANDS[command].has_recipe else ""
        return f"{command} needs {wanted}{recipe}; flowprox {command} --help explains"
    if unknown := re.search(r"argument command: invalid choice: '([^']*)'", message):
        return f"unknown command {unknown[1]!r}; {nearest(unknown[1], COMMANDS)}"
    return message


def _defaults(words: list[str]) -> Values:
    """Every option of the command in ``words``, with its default."""
    command = next((word for word in words if word in COMMANDS), None)
    return dict(_command_parser(COMMANDS[command], "").get_defaults().items()) if command else {}


if __name__ == "__main__":
    sys.exit(main())
