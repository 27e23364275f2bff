"""Malformed input against every command: no traceback, no hang, nothing half-written.

    python tools/fuzz.py                         600 inputs from seed 0; a table by command and kind
    python tools/fuzz.py --n 60 --commands sample report
    python tools/fuzz.py --case sample/7         one of them again, with what it prints

Each input is a command that works with one thing made wrong in it: a word, an option, a picture, an array, a recipe, a
model's card or weights, a run's state, records. It runs in a process forked from this one, in a folder of its own, within
20 s of the processor's time. It may be accepted, or refused in one line with exit status 2, which leaves nothing but
finished work behind.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image

import flowprox.reconstruction
import flowprox.training.loop
import flowprox.uncertainty  # noqa: F401  # what commands import, so that no process has to
from flowprox import Glow, ResNetProx, UnfoldedPGD, checkpoints, cli, demo, prox
from flowprox.commands import COMMANDS
from flowprox.options import EvaluatedMethod, ImageOptions
from flowprox.records import read_records

CPU_LIMIT, TIME_LIMIT = 20, 300.0  # seconds; the second for what waits for ever
FAULTS = ("traceback", "hang", "left behind", "not one line")

RECIPES = {
    "flow.yaml": """
        flow: {kind: Glow, arguments: {n_levels: 1, n_steps: 1, hidden_channels: 4}}
        data: {train: pictures, validation: pictures, image_size: 8}
        training: &training {max_steps: 2, max_time: 5, batch_size: 2, accelerator: cpu, progress: false}
    """,
    "noise.yaml": """
        flow: {kind: Glow, arguments: {n_levels: 1, n_steps: 1, hidden_channels: 4}}
        noise: {name: sinusoidal, parameters: {sigma: 0.5}, image_size: 8}
        training: {max_steps: 2, max_time: 5, batch_size: 2, n_validation_images: 2, accelerator: cpu, progress: false}
    """,
    "unfolded.yaml": """
        model: {flow: flow, n_folds: 2, levels: [0.1, 0.2]}
        problem: {name: denoising, parameters: {sigma: 0.1}, ranges: {sigma: [0.0, 0.2]}}
        data: {train: pictures, validation: pictures, image_size: 8}
        training: {max_steps: 2, max_time: 5, batch_size: 2, accelerator: cpu, progress: false}
    """,
    "denoiser.yaml": """
        denoiser: {prox: resnet, prox_arguments: {hidden_channels: 4, n_blocks: 1}}
        data: {train: pictures, validation: pictures, image_size: 8}
        training: {max_steps: 2, max_time: 5, batch_size: 2, accelerator: cpu, progress: false}
    """,
    "gan.yaml": """
        gan: {latent_size: 4, hidden_channels: 4, discriminator_channels: 4, n_scales: 2, projection_steps: 2}
        data: {train: pictures, validation: pictures, image_size: 8}
        training: {max_steps: 2, max_time: 5, batch_size: 2, accelerator: cpu, progress: false}
    """,
    "sweep.yaml": """
        command: train-flow
        config: flow.yaml
        options: {training.max_steps: 1}
        grid: {training.learning_rate: [0.001]}
    """,
    "evaluation.yaml": """
        name: tiny
        images: {source: pictures, image_size: 8, limit: 2}
        problems: [{name: denoising, parameters: {sigma: 0.1}, published: {tv: 20.0}}]
        methods: [{name: adjoint}, {name: tv, options: {n_iterations: 2}}, {name: unfolded, model: network}]
    """,
}

WORKING: dict[str, list[str]] = {
    "demo": ["demo --out made", "demo --out made --seed 3 --overwrite"],
    "train-flow": [
        "train-flow --config flow.yaml --out made",
        "train-flow --config noise.yaml --out made",
        "train-flow --config run/recipe.yaml --out run --resume --training.max_steps 4",
    ],
    "train-unfolded": ["train-unfolded --config unfolded.yaml --out made"],
    "train-denoiser": ["train-denoiser --config denoiser.yaml --out made --training.seed 1"],
    "train-gan": ["train-gan --config gan.yaml --out made"],
    "sweep": ["sweep sweep.yaml --out made"],
    "reconstruct": [
        "reconstruct a.png --model network --parameters sigma=0.1 --out made",
        "reconstruct pictures --simulate --model network --problem denoising --parameters sigma=0.1 --out made",
        "reconstruct y.npy --method tv --problem denoising --options n_iterations=2 --out made",
        "reconstruct a.png --measured --method biharmonic --problem inpainting --parameters mask=mask.png --out made",
        "reconstruct a.png --method latent-map --flow flow --problem denoising --options n_iterations=2 --out made",
    ],
    "calibrate": [
        "calibrate network pictures --out made --n_training 4 --n_calibration 10 --n_test 0 --n_steps 2 --image_size 8 "
        "--parameters sigma=0.1"
    ],
    "evaluate": ["evaluate --config evaluation.yaml --out made", "evaluate --config evaluation.yaml --out results"],
    "report": ["report results", "report results --out made --metric ssim --parts overview cost --title Results"],
    "sample": [
        "sample --model flow --out made.png --n 2",
        "sample --model flow --out made.png -n 2 --size 12 --seed 1",
    ],
    "export": ["export network --size 8 8 --out made.pt2 --parameters sigma=0.1"],
    "push": ["push network org/name", "push run org/name --no-private --revision main"],
    "models": ["models network", "models"],
    "problems": ["problems deblurring", "problems"],
    "methods": ["methods tv", "methods"],
    "recipes": ["recipes evaluate/readme", "recipes"],
}

JUNK: tuple[str, ...] = (
    *(
        "",
        " ",
        "-",
        "--",
        "=",
        "a=b",
        "=1",
        "%s",
        "*",
        "~",
        "..",
        "/",
        "/dev/zero",
        "/proc/self/mem",
        "pipe",
        "x" * 5000,
    ),
    *("-1", "0", "nan", "inf", "-inf", "1e400", "9" * 25, "-" + "9" * 25, "1e-400", "0x10", "1_000", "3.7", "1,2", "१"),
    *("true", "null", "none", "[]", "{}", "[1, 2", "{a: 1}", "[[[", "&a [*a]", "!!python/object:os.system x", "'", "é"),
    *(
        "\udcff",
        "a\x1b[31mb",
        "a\nb",
        "hf:",
        "hf:a",
        "hf:a/b",
        "a/b",
        "pictures",
        "a.png",
        "y.npy",
        "flow.yaml",
        "network",
    ),
    *("network/card.json", "missing.png", "missing/missing", "cuda", "cuda:99", "meta", "tv", "flow", "results"),
)
VALUES: tuple[object, ...] = (
    *(
        None,
        True,
        -1,
        0,
        1,
        0.5,
        10**25,
        -(10**25),
        float("nan"),
        float("inf"),
        "",
        "x",
        "nan",
        "1",
        "\x00",
        "../x",
        "é\x1b",
    ),
    *([], {}, [1], [None], [[]], {"a": 1}, {"kind": "Glow"}, {"kind": 3}, ["x"] * 3, [0.1, -0.1], [[[[[[[]]]]]]]),
)


def build_world(folder: Path) -> None:
    """All that the working commands read: models, pictures, arrays, recipes, a run, results."""
    torch.manual_seed(0)
    draw = np.random.default_rng(0)
    flow = Glow((3, 8, 8), n_levels=2, n_steps=1, hidden_channels=4)
    flow.initialize(torch.rand(8, 3, 8, 8))
    checkpoints.save_model(flow, folder / "flow", {"name": "tiny-flow"})
    network = UnfoldedPGD([prox.FlowProx(flow)])
    problem = {"name": "denoising", "parameters": {"sigma": 0.1}, "seed": 0}
    checkpoints.save_model(network, folder / "network", {"name": "tiny", "problem": problem})
    checkpoints.save_model(ResNetProx(3, 4, 1), folder / "resnet")
    (folder / "pictures").mkdir()
    for path in (folder / "a.png", *(folder / "pictures" / f"p{i}.png" for i in range(16))):
        Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    Image.fromarray(draw.integers(0, 2, (8, 8), dtype=np.uint8) * 255).save(folder / "mask.png")
    np.save(folder / "y.npy", draw.random((3, 8, 8), dtype=np.float32))
    for name, text in RECIPES.items():
        (folder / name).write_text(text)
    os.mkfifo(folder / "pipe")
    before = Path.cwd()
    os.chdir(folder)
    for words in ("train-flow --config flow.yaml --out run --training.max_steps 1", WORKING["evaluate"][1]):
        assert cli.main(words.split()) == 0, words
    os.chdir(before)


# What is made wrong ---------------------------------------------------------------------------------------------------


def wrong_words(draw: random.Random, words: list[str]) -> list[str]:
    """A word missing, twice, misspelt, cut short, exchanged or replaced."""
    i = draw.randrange(1, len(words)) if len(words) > 1 else 0
    word = words[i]
    at = draw.randrange(len(word)) if word else 0
    new: list[str] = draw.choice(
        [
            [],
            [word, word],
            [word[:at]],
            [word[:at] + word[at + 1 :]],
            [word + "x"],
            [draw.choice(JUNK)],
            [JUNK[0], word],
        ]
    )
    if draw.random() < 0.2:
        words = [*words]
        draw.shuffle(words)
        return words
    return [*words[:i], *new, *words[i + 1 :]]


def wrong_option(draw: random.Random, words: list[str]) -> list[str]:
    """Any option of the command, or one that it has not, with junk behind it."""
    name = draw.choice([*cli._defaults(words), "junk", *COMMANDS[words[0]].several])
    junk = draw.choice(JUNK)
    return [*words, *draw.choice([[f"--{name}={junk}"], [f"--{name}", junk], [f"--{name}"], [f"--{name[:-1]}", "1"]])]


def wrong_bytes(draw: random.Random, content: bytes) -> bytes:
    """Cut short, flipped, empty, something else, or with more behind it."""
    at = draw.randrange(len(content) or 1)
    noise = draw.randbytes(40)
    pickled = b"\x80\x04cos\nsystem\n(S'true'\ntR."
    return draw.choice(
        [
            *(content[:at], content[:at] + bytes([draw.randrange(256)]) + content[at + 1 :], b"", noise, pickled),
            *(
                content[:at] + noise + content[at + 1 :],
                content + content,
                b"\xff\xfe" + content,
                b"PK\x03\x04" + content,
            ),
            (2**62).to_bytes(8, "little") + content[8:],
        ]
    )


def wrong_array(draw: random.Random, content: bytes) -> bytes:
    """Of another type or shape, not finite, or with a header that does not fit."""
    y = np.load(io.BytesIO(content))
    spoilt = y.copy()
    spoilt.flat[draw.randrange(y.size)] = draw.choice([np.nan, np.inf, 1e30])
    choices = [
        spoilt,
        y * 255,
        y[None, None],
        y[..., 0],
        y[0, 0],
        y[:2],
        y.T,
        y[:0],
        y.astype(np.uint8),
        y.astype(complex),
    ]
    choices += [
        y.astype(str),
        np.float32(1.0),
        y.astype(">f8"),
        y.astype(np.float16),
        np.zeros((3, 8, 8, 0), np.float32),
    ]
    file = io.BytesIO()
    np.save(file, draw.choice(choices))
    header = content[:128].replace(b"(3, 8, 8)", draw.choice([b"(9" + b"9" * 9 + b",)", b"(-3, 8, 8)", b"'abcdefgh'"]))
    return draw.choice([file.getvalue(), header + content[128:], wrong_bytes(draw, content)])


def wrong_picture(draw: random.Random, content: bytes) -> bytes:
    """Of another mode, size or format, or damaged."""
    image = Image.open(io.BytesIO(content))
    shape = draw.choice([(1, 1), (1, 8), (9, 7), (3000, 1)])
    other = draw.choice([image.convert("RGBA"), image.convert("LA"), image.convert("I;16"), image.convert("P"), image])
    file = io.BytesIO()
    (other if other is not image else image.resize(shape)).save(file, format=draw.choice(["PNG", "TIFF"]))
    return draw.choice([file.getvalue(), wrong_bytes(draw, content), wrong_bytes(draw, content)])


def wrong_tree(draw: random.Random, tree: object) -> object:
    """One node of nested lists and dictionaries replaced, removed, renamed or moved."""
    nodes: list[tuple[dict | list, str | int]] = []

    def walk(node: object) -> None:
        keys = node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in keys:
            nodes.append((node, key))  # type: ignore[arg-type]
            walk(node[key])  # type: ignore[index]

    walk(tree)
    if not nodes or draw.random() < 0.05:
        return draw.choice(VALUES)
    node, key = draw.choice(nodes)
    action = draw.randrange(8)
    if action == 0:
        del node[key]  # type: ignore[arg-type]
    elif action == 1 and isinstance(node, dict):
        node[f"{key}s"] = node.pop(key)  # type: ignore[arg-type]
    elif action == 2:
        other, place = draw.choice(nodes)
        node[key] = json.loads(json.dumps(other[place], default=str))  # type: ignore[index]
    else:
        node[key] = draw.choice(VALUES)  # type: ignore[index]
    return tree


def wrong_recipe(draw: random.Random, content: bytes) -> bytes:
    """YAML with one node wrong, or no YAML."""
    changed = wrong_tree(draw, yaml.safe_load(content))
    return draw.choice([wrong_bytes(draw, content), *[yaml.dump(changed, allow_unicode=True).encode()] * 4])


def wrong_json(draw: random.Random, content: bytes) -> bytes:
    """JSON with one node wrong, or no JSON."""
    changed = wrong_tree(draw, json.loads(content))
    return draw.choice([wrong_bytes(draw, content), *[json.dumps(changed).encode()] * 4])


def wrong_records(draw: random.Random, content: bytes) -> bytes:
    """A line of records wrong, missing or twice."""
    lines = content.splitlines()
    i = draw.randrange(len(lines))
    lines[i : i + 1] = draw.choice(
        [[], [lines[i]] * 2, [b""], *[[wrong_json(draw, lines[i]).replace(b"\n", b" ")]] * 5]
    )
    return b"\n".join(lines) + b"\n"


Change = Callable[[random.Random, bytes], bytes]
FILES: dict[str, tuple[str, Change]] = {
    "picture": ("a.png mask.png pictures/p0.png", wrong_picture),
    "array": ("y.npy", wrong_array),
    "recipe": (" ".join([*RECIPES, "run/recipe.yaml", "results/recipe.yaml"]), wrong_recipe),
    "card": ("flow/card.json network/card.json", wrong_json),
    "weights": ("flow/model.safetensors network/model.safetensors", wrong_bytes),
    "state": ("run/state.pt run/metrics.jsonl", wrong_bytes),
    "records": ("results/records.jsonl", wrong_records),
}
READS = {  # files that a command reads without naming them
    "unfolded.yaml": "flow/card.json flow/model.safetensors pictures/p0.png",
    "evaluation.yaml": "network/card.json network/model.safetensors pictures/p0.png",
    "network": "network/card.json network/model.safetensors",
    "flow": "flow/card.json flow/model.safetensors",
    "results": "results/records.jsonl results/recipe.yaml",
    "run": "run/state.pt run/metrics.jsonl run/recipe.yaml",
    "pictures": "pictures/p0.png",
    **dict.fromkeys(("flow.yaml", "denoiser.yaml", "gan.yaml"), "pictures/p0.png"),
}


def spoil(draw: random.Random, folder: Path, words: list[str]) -> tuple[str, list[str]]:
    """Make one thing wrong; its kind, and the words of the command."""
    read = {name for word in words for name in (word.partition("=")[2] or word, *READS.get(word, "").split())}
    kinds = {kind: sorted(read & set(names.split())) for kind, (names, _) in FILES.items()}
    kind = draw.choice(["words", "option", *[kind for kind, names in kinds.items() if names]])
    if kind == "words":
        return kind, wrong_words(draw, words)
    if kind == "option":
        return kind, wrong_option(draw, words)
    path = folder / draw.choice(kinds[kind])
    content = FILES[kind][1](draw, path.read_bytes())
    path.unlink()
    if draw.random() < 0.1:
        draw.choice([path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to(path.name), lambda: None])()
    else:
        path.write_bytes(content)
    return kind, words


# What came of it ------------------------------------------------------------------------------------------------------


def run_apart(words: list[str], folder: Path) -> int | None:
    """Exit status of the command in a process of its own, 99 for an exception; None if it was stopped for taking too long."""
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_LIMIT, CPU_LIMIT))
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(folder.parent / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        try:
            status = cli.main(words)
        except BaseException:
            traceback.print_exc()
            status = 99
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    ends = time.monotonic() + TIME_LIMIT
    while time.monotonic() < ends:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return None if code in (-signal.SIGXCPU, -signal.SIGKILL) else code
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def tree_of(folder: Path) -> dict[Path, tuple[int, int]]:
    """Regular files and folders, with when they changed and how large they are."""
    return {
        path: (0, 0) if path.is_dir() else (path.stat().st_mtime_ns, path.stat().st_size)
        for path in folder.rglob("*")
        if path.is_dir() or path.is_file()
    }


def is_whole(path: Path) -> bool:
    """Whether a file that was written can be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            if path.suffix == ".png":
                Image.open(path).load()
            elif path.suffix == ".npy":
                np.load(path)
            elif path.suffix in (".json", ".jsonl"):
                json.loads(path.read_text()) if path.suffix == ".json" else read_records(path)
    except (OSError, ValueError, SyntaxError, EOFError, Warning):  # what Pillow, numpy and json say of half a file
        return False
    return path.suffix != ".tmp"


def judge(status: int | None, folder: Path, before: dict[Path, tuple[int, int]]) -> str:
    """What came of an input: "refused", "accepted" or one of ``FAULTS``."""
    errors = (folder.parent / "stderr").read_text(errors="replace")
    if status is None:
        return "hang"
    if status not in (0, 1, 2) or "Traceback" in errors:
        return "traceback"
    after = tree_of(folder)
    new = [path for path, state in after.items() if before.get(path) != state and not path.is_dir()]
    folders = [path for path in after.keys() - before.keys() if path.is_dir()]
    finished = any(path.name in ("records.jsonl", "metrics.jsonl") for path in new)
    if not all(map(is_whole, new)) or (status == 2 and (new or folders) and not finished):
        return "left behind"
    said = [line for line in errors.splitlines() if not line.startswith(("flowprox: warning", "flowprox: note"))]
    if status == 2 and (len(said) != 1 or not said[0].startswith("flowprox: ") or len(said[0]) > 2000):
        return "not one line"
    return "refused" if status else "accepted"


def run_case(name: str, seed: int, world: Path, place: Path) -> tuple[str, str, list[str]]:
    """One input, by its name "COMMAND/number": its kind, what came of it, and the words."""
    command = name.partition("/")[0]
    draw = random.Random(f"{seed} {name}")
    folder = place / "here"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(world, folder, ignore=shutil.ignore_patterns("pipe"))
    os.mkfifo(folder / "pipe")
    kind, words = spoil(draw, folder, draw.choice(WORKING[command]).split())
    before = tree_of(folder)
    return kind, judge(run_apart(words, folder), folder, before), words


def main() -> int:
    """Run the inputs; 1 if one of them came to a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", nargs="+", default=list(WORKING), choices=list(WORKING))
    parser.add_argument("--case", help="COMMAND/number")
    options = parser.parse_args()
    assert set(WORKING) == {*COMMANDS} - {"app"}, (
        "a command has no working example here"
    )  # the app serves until stopped
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    quick = replace(  # the whole demo takes half a minute
        demo.demo_recipe(), images=ImageOptions("samples", image_size=24, limit=1), methods=[EvaluatedMethod("adjoint")]
    )
    demo.demo_recipe = lambda: quick
    demo.write_figures = lambda folder: []  # type: ignore[assignment]
    started, found = time.monotonic(), Counter[tuple[str, str, str]]()
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        world = Path(place, "world")
        world.mkdir()
        build_world(world)
        names = [
            f"{options.commands[i % len(options.commands)]}/{i // len(options.commands)}" for i in range(options.n)
        ]
        for name in [options.case] if options.case else names:
            kind, came, words = run_case(name, options.seed, world, Path(place))
            found[name.partition("/")[0], kind, came] += 1
            if came in FAULTS or options.case:
                text = Path(place, "stderr").read_text(errors="replace")
                print(f"{name}: {came}: {kind}: {' '.join(map(repr, words))[:300]}", file=sys.stderr)
                print(text[:20_000] if options.case else "\n".join(text.splitlines()[-2:])[:600], file=sys.stderr)
    outcomes = ("refused", "accepted", *FAULTS)
    print("| command | kind |" + "|".join(f" {came} " for came in outcomes) + "|\n|---|---|" + "---|" * len(outcomes))
    for command, kind in sorted({key[:2] for key in found}, key=lambda key: list(WORKING).index(key[0])):
        print(f"| {command} | {kind} |" + "|".join(f" {found[command, kind, came]} " for came in outcomes) + "|")
    faults = sum(n for (_, _, came), n in found.items() if came in FAULTS)
    print(f"\n{found.total()} inputs, seed {options.seed}: {faults} faults, {time.monotonic() - started:.0f} s")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
