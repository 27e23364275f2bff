"""The command line as a user meets it: what works, and what a wrong word, file or recipe ends in."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from flowprox import FlowProx, Glow, ResNetProx, UnfoldedPGD, __version__, checkpoints, files, make_physics, save_model
from flowprox.cli import completed, main
from flowprox.commands.sweep import _name as name_of_setting
from flowprox.commands.terminal import key_values
from flowprox.methods import METHODS
from flowprox.records import read_records

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated.*:DeprecationWarning")


def _glow(channels: int = 3) -> Glow:
    torch.manual_seed(0)
    flow = Glow((channels, 8, 8), n_levels=2, n_steps=1, hidden_channels=4)
    flow.initialize(torch.rand(8, channels, 8, 8))
    return flow


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a flow, unfolded networks for color and for gray, pictures and measurements."""
    folder = tmp_path_factory.mktemp("world")
    with torch.random.fork_rng():
        save_model(_glow(), folder / "flow", {"name": "tiny-flow", "metrics": {"bits_per_dimension": 3.5}})
        network = UnfoldedPGD([FlowProx(_glow())])
        save_model(ResNetProx(3, 4, 1), folder / "resnet")
        save_model(network, folder / "network", {"name": "tiny", "problem": {"name": "denoising", "parameters": {}}})
        save_model(UnfoldedPGD([FlowProx(_glow(1))]), folder / "gray-network", {"problem": {"name": "denoising"}})
    rng = np.random.default_rng(0)
    (folder / "pictures").mkdir()
    for i in range(8):
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"p{i}.png")
    Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / "a.png")
    Image.fromarray(rng.integers(0, 256, (9, 10, 3), dtype=np.uint8)).save(folder / "odd.png")
    np.save(folder / "y.npy", rng.random((3, 8, 8), dtype=np.float32))
    np.save(folder / "mask.npy", np.ones((5, 5), dtype=np.float32))
    recipe = {
        "flow": {"kind": "Glow", "arguments": {"n_levels": 1, "n_steps": 1, "hidden_channels": 4}},
        "data": {"train": str(folder / "pictures"), "validation": str(folder / "pictures"), "image_size": 8},
        "training": {"max_steps": 2, "batch_size": 2, "accelerator": "cpu", "progress": False, "num_threads": 1},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture
def here(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder; the world is beside it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# What works ----------------------------------------------------------------------------------------------------------


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys; from flowprox.cli import main; assert main(['--help']) == 0;"
        "assert main(['train-unfolded', '--help']) == 0;"
        "print([m for m in ('torch', 'deepinv', 'lightning_fabric', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "train-flow" in done.stdout and "--data.train" in done.stdout


@pytest.mark.parametrize(
    "command",
    [
        "demo",
        "train-flow",
        "train-denoiser",
        "reconstruct",
        "calibrate",
        "evaluate",
        "report",
        "sample",
        "recipes",
    ],
)
def test_help_of_each_command_explains_every_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert not re.search(r"--[\w.]+ ([A-Z_]+|\{\S+\}) (--|\((required|type|default))", words.partition("options:")[2])


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"flowprox {__version__}\n"


def test_sample_is_the_same_for_the_same_seed(world: Path, here: Path) -> None:
    for out, seed in (("a.png", "1"), ("new/b.png", "1"), ("c.png", "2")):
        words = ["sample", "--model", str(world / "flow"), "-n", "3", "--seed", seed, "--size", "12", "--out", out]
        assert main(words) == 0
    contents = [Path(name).read_bytes() for name in ("a.png", "new/b.png", "c.png")]
    assert contents[0] == contents[1] != contents[2]


@pytest.mark.filterwarnings("ignore:No complete tensor found in the group")
def test_export_writes_what_the_network_computes(world: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["export", str(world / "network"), "--size", "8", "12", "--parameters", "sigma=0.1"]
    assert main([*words, "--out", "a.pt2"]) == 0
    assert "(B, 3, 8, 12) for denoising-sigma0.1" in capsys.readouterr().out
    program, network = torch.export.load("a.pt2").module(), checkpoints.load_model(world / "network")
    y = torch.rand(3, 3, 8, 12)
    with torch.no_grad():
        expected = network(y, make_physics("denoising", (3, 8, 12), sigma=0.1))
        torch.testing.assert_close(program(y), expected, rtol=1e-5, atol=1e-5)
    _assert_refused([*words, "--out", "a.txt"], ".pt2 or .onnx", capsys)
    _assert_refused(["export", str(world / "flow")], "only unfolded networks", capsys)


def test_push_says_where(world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls = []
    monkeypatch.setattr(checkpoints, "push_to_hub", lambda *given, **options: calls.append((given, options)) or "URL")
    assert main(["push", str(world / "flow"), "hf:org/name", "--no-private"]) == 0
    assert calls == [((world / "flow", "hf:org/name", False), {"revision": None})]
    assert "uploaded: URL" in capsys.readouterr().out


def test_completion(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    assert main(["--print-completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert "--training.max_steps" in script and "reconstruct" in script
    _assert_refused(["--print-completion=bsh"], "unknown shell 'bsh'; did you mean bash", capsys)


def test_models_lists_shipped_models_and_prints_a_card(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checkpoints.store, "_shipped_folder", lambda: world)
    assert main(["models"]) == 0
    assert "\n flow " in capsys.readouterr().out  # the name that loads it, which may be another than the card's
    assert main(["models", "flow"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"] == {"bits_per_dimension": 3.5}


def test_models_fits_the_terminal_and_says_what_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["models"]) == 0
    printed = capsys.readouterr().out
    assert max(len(line) for line in printed.splitlines()) <= 80
    for words in (
        "prior: --flow NAME",
        "noise: --noise NAME",
        "error bars: --intervals unfolded-denoising-faces64-intervals",
        "mask_size",
        "CelebA",
        "license of the weights",
        "5.4",
    ):
        assert words in printed


def test_reconstruct_prints_a_table(world: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["reconstruct", str(world / "a.png"), "--simulate", "--model", str(world / "network"), "--out", "rec"]
    assert main([*words, "--parameters", "sigma=1e-2"]) == 0
    assert "PSNR" in capsys.readouterr().out
    assert read_records("rec/records.jsonl")[0]["problem"] == "denoising-sigma0.01"


def test_recipe_is_overridden_wherever_the_option_stands_and_can_be_resumed(world: Path, here: Path) -> None:
    recipe = ["--config", str(world / "recipe.yaml")]
    assert main(["train-flow", "--training.max_steps=1", *recipe, "--out", "run"]) == 0
    written = yaml.safe_load(Path("run/recipe.yaml").read_text())
    assert written["training"]["max_steps"] == 1
    assert main(["train-flow", "--config=run/recipe.yaml", "--resume", "--training.max_steps", "3"]) == 0
    assert checkpoints.load_training_state("run/state.pt")["counters"]["step"] == 3
    assert main(["sample", "--model", "run/model", "-n", "1"]) == 0


def test_a_sweep_trains_every_setting_and_goes_on(
    world: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[list[str]] = []

    def run(words: list[str]) -> SimpleNamespace:
        started.append(words)
        return SimpleNamespace(returncode=130 if len(started) == 2 else main(words[3:]))

    monkeypatch.setattr(subprocess, "run", run)
    plan = {"command": "train-flow", "config": str(world / "recipe.yaml"), "options": {"training.max_steps": 1}}
    plan["options"]["training.precision"] = "32"  # a word of the option, not a number
    plan["grid"] = {"training.learning_rate": [0.1, 0.01]}
    Path("sweep.yaml").write_text(yaml.safe_dump(plan))
    assert main(["sweep", "sweep.yaml", "--out", "runs"]) == 130
    assert main(["sweep", "sweep.yaml", "--out", "runs"]) == 0
    assert len(started) == 3 and started[1] == started[2]
    names = [record["run"] for record in read_records("runs/sweep.jsonl")]
    assert names == ["learning_rate=0.1", "learning_rate=0.01"]
    assert "bits_per_dimension" in capsys.readouterr().out
    Path("sweep.yaml").write_text(yaml.safe_dump({**plan, "grid": {"training.seed": 3}}))
    _assert_refused(["sweep", "sweep.yaml", "--out", "other"], "grid.training.seed must be a list", capsys)


def test_settings_of_a_sweep_that_look_alike_have_folders_of_their_own() -> None:
    alike = [
        {"data.train": "a/b"},
        {"data.train": "a:b"},
        {"data.train": ["x" * 300, 1]},
        {"data.train": ["x" * 300, 2]},
    ]
    names = {name_of_setting(setting) for setting in (*alike, {"a.seed": 1, "b.seed": 2})}
    assert len(names) == 5 and all(len(name) < 255 for name in names)
    assert name_of_setting({"training.seed": 1}) == "seed=1"


def test_termination_ends_a_command_as_interruption_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    started = tmp_path / "half written"

    def killed(words: list[str]) -> int:
        started.touch()
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
            return 0
        finally:
            started.unlink()

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("flowprox.cli._run", killed)
    assert main(["models"]) == 130
    assert "interrupted: terminated" in capsys.readouterr().err
    assert not started.exists()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("command", ["train-flow", "evaluate"])
def test_a_recipe_in_the_folder_is_not_overwritten(
    command: str, world: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = (world / "recipe.yaml").read_text() if command == "train-flow" else EVALUATION
    Path("recipe.yaml").write_text(recipe)
    words = [command, "--config", "recipe.yaml", "--out", "."]
    _assert_refused(words, "recipe.yaml is of no earlier run and would be overwritten; choose another out", capsys)


@pytest.mark.filterwarnings("default")
def test_a_warning_is_one_line(world: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save("bright.npy", np.ones((3, 3)))
    words = ["reconstruct", str(world / "a.png"), "--method", "adjoint", "--problem", "deblurring", "--measured"]
    assert main([*words, "--parameters", "kernel=bright.npy", "--out", "rec"]) == 0
    printed = capsys.readouterr().err.strip()
    assert (
        printed.startswith("flowprox: warning: kernel sums to 9 and its smallest value is 1") and ".py" not in printed
    )
    assert printed.count("\n") == 0


def test_a_reader_that_has_seen_enough_ends_a_command_in_silence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    with open(writes, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert main(["recipes", "evaluate/readme"]) == 141
        monkeypatch.undo()
    assert capsys.readouterr().err == ""


def test_interruption_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> list[str]:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "list_models", interrupted)
    assert main(["models"]) == 130
    assert capsys.readouterr().err == "flowprox: interrupted\n"


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "list_models", lambda: [].pop())
    with pytest.raises(IndexError):
        main(["models"])


def test_traceback_on_demand(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FLOWPROX_TRACEBACK", "1")
    assert main(["models", "no-such-model"]) == 2
    assert "Traceback" in capsys.readouterr().err


# Bad input -----------------------------------------------------------------------------------------------------------


def _text_as_png(world: Path) -> list[str]:
    Path("fake.png").write_text("not a picture")
    return ["fake.png"]


def _array(values: np.ndarray) -> Callable[[Path], list[str]]:
    def write(world: Path) -> list[str]:
        np.save("given.npy", values)
        return ["given.npy"]

    return write


def _nan() -> np.ndarray:
    values = np.zeros((3, 8, 8), dtype=np.float32)
    values[0, 0, 0] = np.nan
    return values


def _objects(world: Path) -> list[str]:
    np.save("given.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return ["given.npy"]


def _float_tiff(world: Path) -> list[str]:
    Image.fromarray(np.full((8, 8), 3.0, dtype=np.float32)).save("bright.tif")
    return ["bright.tif"]


def _picture(*options: str) -> Callable[[Path], list[str]]:
    return lambda world: [str(world / "a.png"), *options]


def _file_as_out(world: Path) -> list[str]:
    Path("taken").write_text("a file")
    return [str(world / "a.png"), "--out", "taken"]


def _full_out(world: Path) -> list[str]:
    Path("full").mkdir()
    Path("full/precious.txt").write_text("keep")
    return [str(world / "a.png"), "--out", "full"]


def _model(change: Callable[[Path], None]) -> Callable[[Path], list[str]]:
    """A copy of the network with something wrong."""

    def write(world: Path) -> list[str]:
        folder = Path("broken")
        folder.mkdir()
        for name in ("card.json", "model.safetensors"):
            (folder / name).write_bytes((world / "network" / name).read_bytes())
        change(folder)
        return [str(world / "a.png"), "--model", "broken"]

    return write


def _truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])


def _alter(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def _misfit(folder: Path) -> None:
    card = json.loads((folder / "card.json").read_text())
    card["model"]["arguments"]["proxes"][0]["arguments"]["flow"]["arguments"]["hidden_channels"] = 6
    (folder / "card.json").write_text(json.dumps(card))


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps({"weight": [1.0]}))


def _pickle_as_model(world: Path) -> list[str]:
    torch.save({"weight": torch.ones(1)}, "weights.pt")
    return [str(world / "a.png"), "--model", "weights.pt"]


BAD_INPUTS: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "missing file": (lambda world: ["missing.png"], "missing.png"),
    "missing array": (lambda world: ["missing.npy"], "missing.npy"),
    "text as png": (_text_as_png, "fake.png cannot be read as an image"),
    "folder without pictures": (lambda world: ["."], "holds no images"),
    "one bad among good": (lambda world: [str(world / "a.png"), *_text_as_png(world)], "fake.png"),
    "two channels": (_array(np.zeros((2, 8, 8), dtype=np.float32)), "channels"),
    "gray for color": (_array(np.zeros((1, 8, 8), dtype=np.float32)), "1 channel(s) but the model takes 3"),
    "color for gray": (
        lambda world: [str(world / "a.png"), "--model", str(world / "gray-network")],
        "has 3 channels but the model takes 1",
    ),
    "channels last": (_array(np.zeros((8, 8, 3), dtype=np.float32)), "channels come first"),
    "size not divisible": (lambda world: [str(world / "odd.png"), "--no-pad"], "size 9x10"),
    "NaN": (_array(_nan()), "NaN"),
    "8-bit values": (_array(np.full((3, 8, 8), 200.0, dtype=np.float32)), "divide by 255"),
    "whole numbers": (_array(np.zeros((3, 8, 8), dtype=np.uint8)), "floats"),
    "objects": (_objects, "not a plain .npy array"),
    "float tiff out of range": (_float_tiff, "bright.tif"),
    "unknown problem": (_picture("--problem", "denoisin"), "did you mean denoising"),
    "unknown parameter": (_picture("--parameters", "sigm=0.1"), "did you mean sigma"),
    "parameter without value": (_picture("--parameters", "sigma"), "KEY=VALUE"),
    "negative sigma": (_picture("--parameters", "sigma=-0.1"), "sigma"),
    "sigma is text": (_picture("--parameters", "sigma=much"), "sigma"),
    "mask of the wrong shape": (
        lambda world: [str(world / "a.png"), "--problem=inpainting", "--parameters", f"mask={world / 'mask.npy'}"],
        "mask has shape (5, 5)",
    ),
    "missing mask": (_picture("--problem=inpainting", "--parameters", "mask=no.npy"), "no.npy"),
    "mask too large": (_picture("--problem=inpainting", "--parameters", "mask_size=9"), "mask_size 9x9"),
    "kernel too large": (_picture("--problem=deblurring", "--parameters", "kernel_size=11"), "kernel"),
    "no enlargement": (
        _picture("--problem=super-resolution", "--measured", "--parameters", "factor=0"),
        "factor must be",
    ),
    "enlarged by a half": (
        _picture("--problem=super-resolution", "--measured", "--parameters", "factor=2.5"),
        "factor must be a positive whole number that divides the sides of the image, got 2.5",
    ),
    "kernel size is text": (
        _picture("--problem=deblurring", "--measured", "--parameters", "boundary=valid", "kernel_size=big"),
        "kernel_size must be a positive odd number",
    ),
    "which mask": (_picture("--problem=random-inpainting", "--measured"), "operator_seed"),
    "option of the method": (_picture("--options", "n_folds=3"), "method unfolded has no option 'n_folds'"),
    "unknown method": (_picture("--method", "latent-mop", "--problem=denoising"), "did you mean latent-map"),
    "noise of no use": (_picture("--noise", "gaussian", "sigma=0.1"), "no use for noise"),
    "unknown model": (_picture("--model", "unfolded-denoisin"), "unfolded-denoisin"),
    "a flow does not reconstruct": (
        lambda world: [str(world / "a.png"), "--model", str(world / "flow"), "--problem", "denoising"],
        "does not reconstruct by itself",
    ),
    "card does not fit weights": (_model(_misfit), "does not fit its weights"),
    "truncated weights": (_model(_truncate), "model.safetensors"),
    "altered weights": (_model(_alter), "model.safetensors"),
    "pickle as weights": (_model(_pickled), "model.safetensors"),
    "pickle as model": (_pickle_as_model, "weights.pt"),
    "no weights": (_model(lambda folder: (folder / "model.safetensors").unlink()), "model.safetensors"),
    "card is no JSON": (_model(lambda folder: (folder / "card.json").write_text("{") and None), "card.json"),
    "unknown device": (_picture("--device", "gpu"), "gpu"),
    "out is a file": (_file_as_out, "taken"),
    "out below a file": (_picture("--out", str(Path(__file__) / "out")), "out"),
    "out cannot be written": (_picture("--out", "/proc/flowprox/out"), "out"),
    "out is not empty": (_full_out, "not empty"),
}


def _tree(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def _assert_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    before = _tree(Path.cwd())
    status = main(words)
    printed = capsys.readouterr()
    assert status == 2, printed
    assert printed.out == ""
    assert printed.err.startswith("flowprox: ") and printed.err.count("\n") == 1, printed.err
    assert "Traceback" not in printed.err and message in printed.err, printed.err
    assert _tree(Path.cwd()) == before


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_to_reconstruct(case: str, world: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, message = BAD_INPUTS[case]
    given = make(world)
    model = [] if "--model" in given else ["--model", str(world / "network")]
    out = [] if "--out" in given else ["--out", "rec"]
    _assert_refused(["reconstruct", *given[:1], *model, *out, *given[1:]], message, capsys)


def _recipe(world: Path, change: Callable[[dict], object]) -> list[str]:
    recipe = yaml.safe_load((world / "recipe.yaml").read_text())
    change(recipe)
    Path("changed.yaml").write_text(yaml.safe_dump(recipe))
    return ["train-flow", "--config", "changed.yaml", "--out", "run"]


EVALUATION = (
    "{images: {source: samples, image_size: 16, limit: 1}, problems: [{name: denoising}], methods: [{name: adjoint}]}"
)


def _evaluation(*options: str, text: str = EVALUATION) -> Callable[[Path], list[str]]:
    def make(world: Path) -> list[str]:
        Path("evaluation.yaml").write_text(text)
        return ["evaluate", "--config", "evaluation.yaml", "--out", "results", *options]

    return make


def _not_yaml(world: Path) -> list[str]:
    Path("broken.yaml").write_text("flow: [compact\n")
    return ["train-flow", "--config", "broken.yaml", "--out", "run"]


def _bomb(world: Path) -> list[str]:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{b}: &{b} [{', '.join(9 * [f'*{a}'])}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)]
    Path("bomb.yaml").write_text("\n".join(lines))
    return ["train-flow", "--config", "bomb.yaml"]


def _circle(world: Path) -> list[str]:
    Path("circle.yaml").write_text("data: &a {train: *a}\n")
    return ["train-flow", "--config", "circle.yaml"]


def _pipe(*words: str) -> Callable[[Path], list[str]]:
    def make(world: Path) -> list[str]:
        os.mkfifo("pipe")
        return [*words]

    return make


BAD_COMMANDS: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "no command": (lambda world: [], 'expected "command" to be one of'),
    "misspelt command": (lambda world: ["train-flo"], "did you mean train-flow"),
    "misspelt option": (lambda world: ["sample", "--temprature", "1"], "did you mean --temperature"),
    "abbreviated option": (lambda world: ["sample", "--model", "m", "--temp=1"], "did you mean --temperature"),
    "a word as long as a book": (lambda world: ["methods", "x" * 5000], "... "),
    "no such recipe among many": (lambda world: ["recipes", "zzzz"], "more"),
    "option missing": (lambda world: ["sample"], "sample needs --model; flowprox sample --help"),
    "no place for results": (lambda world: ["reconstruct", "a.png", "--measured"], "reconstruct needs --out;"),
    "nothing given": (lambda world: ["calibrate"], "calibrate needs MODEL, DATA, --out;"),
    "no recipe": (lambda world: ["evaluate"], "evaluate needs --problems, --methods or a recipe, --config;"),
    "option of another type": (
        lambda world: ["sample", "--model", "m", "--seed", "one"],
        "Parser key \"seed\": Expected a <class 'int'>. Got value: one",
    ),
    "sample from no flow": (lambda world: ["sample", "--model", str(world / "resnet")], "not a flow"),
    "sample of odd size": (lambda world: ["sample", "--model", str(world / "flow"), "--size", "9"], "divisible by 4"),
    "sample nothing": (lambda world: ["sample", "--model", str(world / "flow"), "-n", "0"], "n must be at least 1"),
    "sample as jpeg": (lambda world: ["sample", "--model", str(world / "flow"), "--out", "a.jpg"], ".png"),
    "sample too cold": (
        lambda world: ["sample", "--model", str(world / "flow"), "--temperature=-1"],
        "temperature must be finite and at least 0",
    ),
    "unknown card": (lambda world: ["models", "no-such-model"], "no model 'no-such-model'"),
    "demo into a file": (lambda world: ["demo", "--out", str(world / "recipe.yaml")], "out"),
    "missing recipe": (lambda world: ["train-flow", "--config", "no.yaml"], "no.yaml"),
    "recipe of nested anchors": (_bomb, "refers to itself"),
    "recipe within itself": (_circle, "refers to itself"),
    "recipe from a pipe": (_pipe("train-flow", "--config", "pipe"), "not a regular file"),
    "picture from a pipe": (_pipe("reconstruct", "pipe", "--method=tv", "--out=rec"), "a device or a pipe"),
    "misspelt recipe by name": (lambda world: ["train-flow", "--config", "glow-face64"], "did you mean glow-faces64"),
    "escape sequence in a name": (lambda world: ["models", "a\x1b[31mb"], r"a\x1b[31mb"),
    "device that is a word": (lambda world: ["demo", "--device", "gpu"], "device must be cpu"),
    "unknown problem": (lambda world: ["problems", "deblur"], "did you mean deblurring"),
    "unknown method": (lambda world: ["methods", "latent-mop"], "did you mean latent-map"),
    "recipe is no YAML": (_not_yaml, "parsing"),
    "misspelt key": (
        lambda world: _recipe(world, lambda r: r["training"].update(max_stepz=3)),
        "unknown key 'training.max_stepz' in the recipe or options; did you mean training.max_steps",
    ),
    "misspelt group": (lambda world: _recipe(world, lambda r: r.update(trainin={"seed": 1})), "'trainin"),
    "misspelt flow": (lambda world: _recipe(world, lambda r: r["flow"].update(kind="Glo")), "Glo"),
    "misspelt argument of the flow": (
        lambda world: _recipe(world, lambda r: r["flow"]["arguments"].update(hiden_channels=4)),
        "hiden_channels",
    ),
    "value of another type": (
        lambda world: _recipe(world, lambda r: r["training"].update(max_steps="many")),
        "training.max_steps",
    ),
    "never ending": (lambda world: _recipe(world, lambda r: r["training"].pop("max_steps")), "max_steps"),
    "negative rate": (lambda world: _recipe(world, lambda r: r["training"].update(learning_rate=-1)), "learning_rate"),
    "no data": (lambda world: _recipe(world, lambda r: r["data"].update(train="nowhere")), "nowhere"),
    "not divisible": (lambda world: _recipe(world, lambda r: r["data"].update(image_size=7)), "7"),
    "recipe of another command": (
        lambda world: ["train-unfolded", *_recipe(world, lambda r: None)[1:]],
        "'flow' is a key of train-flow",
    ),
    "empty recipe": (_evaluation(text=""), "evaluation.yaml has no keys"),
    "recipe is a list": (_evaluation(text="[1, 2]"), "evaluation.yaml has no keys"),
    "less than no pictures": (_evaluation("--n_pictures=-1"), "n_pictures must be 0 or more, got -1"),
    "published in words": (
        _evaluation(text=EVALUATION.replace("denoising", "denoising, published: {tv: high}")),
        "published tv of denoising must be PSNR in dB; got 'high'",
    ),
    "long seed": (_evaluation(f"--seed={2**63}"), "seed must be a whole number of at most 63 bits"),
    "long seed of a run": (
        lambda world: _recipe(world, lambda r: r["training"].update(seed=2**63)),
        "training.seed must be a whole number of at most 63 bits",
    ),
    "no such device": (lambda world: _recipe(world, lambda r: r["training"].update(accelerator="abacus")), "abacus"),
}


@pytest.mark.parametrize("case", BAD_COMMANDS)
def test_bad_command(case: str, world: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, message = BAD_COMMANDS[case]
    _assert_refused(make(world), message, capsys)


def test_accelerator_that_is_not_there(
    world: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    words = ["train-flow", "--config", str(world / "recipe.yaml"), "--training.accelerator=cuda"]
    _assert_refused(words, "training.accelerator 'cuda' is not available", capsys)


def test_out_of_a_run_that_is_a_file(world: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("taken").write_text("a file")
    words = ["train-flow", "--config", str(world / "recipe.yaml"), "--out", "taken"]
    _assert_refused(words, "taken", capsys)


def test_words_of_numbers() -> None:
    words = {
        ".1": 0.1,
        "1.": 1.0,
        "+0.1": 0.1,
        "1e-1": 0.1,
        "-3": -3,
        "2e3": 2000,
        "007": 7,
        "true": True,
        "1,2": "1,2",
    }
    for word, value in words.items():
        assert (key_values([f"k={word}"], "options")["k"], type(value)) == (value, type(value)), word


def test_recipes_by_name_and_other_training_images(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("glow-faces64", "recipes/glow-faces64.yaml"):
        command, config, *rest = completed(["train-flow", "--out=x", "--config", name, "--data.train", "mine"])
        assert (command, Path(config).name) == ("train-flow", "glow-faces64.yaml")
        assert rest[:4] == ["--out=x", "--data.train", "mine", "--data.validation=null"]
        assert len(rest) == 5 and rest[4].startswith("--data.terms=not stated")
    assert "--data.validation=null" not in completed(
        ["train-flow", f"--config={name}", "--data.train=a", "--data.validation=b"]
    )
    Path("glow-faces64").write_text("name: mine\n")
    assert "--config=glow-faces64" in completed(["train-flow", "--config", "glow-faces64"])


def test_recipes_are_listed_and_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "600")
    assert main(["recipes"]) == 0
    table = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[3:-1])
    assert "evaluate/readme" in table and all(what.rstrip().endswith(".") for what in table.values())
    assert "Sec. VII" in table["ablation/tied"]
    assert main(["recipes", "evaluate/readme"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["name"] == "readme"


def test_problems_are_listed_with_units_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["problems"]) == 0
    assert "deblurring" in capsys.readouterr().out
    assert main(["problems", "deblurring"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "sigma_blur 5.0 pixels standard deviation of the Gaussian" in words


def test_methods_are_listed_with_options_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    for method in capsys.readouterr().out.split():
        if method in METHODS:
            assert main(["methods", method]) == 0
            assert f"{method}: {METHODS[method].description}" in capsys.readouterr().out
    assert main(["methods", "tv"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "n_iterations" in words and "for denoising by default regularization=0.24" in words


def test_refusals_do_not_wait_for_torch(world: Path, tmp_path: Path) -> None:
    """A missing file, a misspelt model and a wrong device are told at once, as ``python -m flowprox``, to any terminal."""
    code = (
        "import sys; from flowprox.cli import main;"
        "codes = [main(w) for w in (['reconstruct', 'no.png', '--method=tv', '--out=x'],"
        "['reconstruct', sys.argv[1], '--model=glow-face', '--out=x'], ['sample', '--model=m', '--device=gpu'])];"
        "assert codes == [2, 2, 2] and 'torch' not in sys.modules, codes"
    )
    picture = str(world / "a.png")
    subprocess.run([sys.executable, "-c", code, picture], check=True, capture_output=True, cwd=tmp_path)
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-m", "flowprox", "models"], capture_output=True, text=True, env=ascii_only)
    assert done.returncode == 0 and "glow-faces64" in done.stdout


def test_builds_that_do_not_fit_are_one_line(tmp_path: Path, world: Path) -> None:
    """A CUDA torchvision beside a CPU torch."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    words = [sys.executable, "-m", "flowprox", "sample", "--model", str(world / "flow")]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "pip install --force-reinstall torch torchvision" in done.stderr


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    def no_space(file: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    yield lambda: monkeypatch.setattr(files, "force_to_disk", no_space)


def test_full_disk_leaves_the_old_checkpoint(
    world: Path, here: Path, full_disk: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train-flow", "--config", str(world / "recipe.yaml"), "--out", "run", "--resume"]
    assert main(words) == 0
    kept = {name: Path("run", name).read_bytes() for name in ("state.pt", "model/card.json", "model/model.safetensors")}
    full_disk()
    capsys.readouterr()
    assert main([*words, "--training.max_steps", "4"]) == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error and "Traceback" not in error and error.count("\n") == 1
    assert {name: Path("run", name).read_bytes() for name in kept} == kept
    assert not [path for path in Path("run").rglob("*.tmp")]
