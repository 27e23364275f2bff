"""Saved models come back bitwise, whatever happens while they are written, and bad files are refused with a remedy."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import flowprox
from flowprox import files
from flowprox.checkpoints import (
    CARD,
    PREVIOUS,
    WEIGHTS,
    Card,
    CheckpointError,
    list_models,
    load_card,
    load_model,
    load_training_state,
    push_to_hub,
    save_model,
    save_training_state,
    store,
)
from flowprox.checkpoints.card import refuse_pickle
from flowprox.files import atomic_write, sha256, sole_writer
from flowprox.naming import Specified


class Tiny(Specified, nn.Module):
    """A linear map with a buffer that is not a float."""

    def __init__(self, width: int = 4, scale: float = 1.0) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.scale = scale
        self.initialized: Tensor
        self.register_buffer("initialized", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.scale


class Chain(Specified, nn.Module):
    """Parts one after the other; the same part twice shares its parameters."""

    def __init__(self, parts: list[Tiny]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x


class Pair(Specified, nn.Module):
    """Two parts given by name."""

    def __init__(self, left: Tiny, right: Tiny) -> None:
        super().__init__()
        self.left, self.right = left, right

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) - 2 * self.right(x)


def glow() -> flowprox.Glow:
    flow = flowprox.Glow((3, 8, 8), n_levels=2, n_steps=1, hidden_channels=8)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    flow.initialize(torch.rand(4, 3, 8, 8))
    return flow


def unfolded(tied: bool) -> flowprox.UnfoldedPGD:
    n = 1 if tied else 2
    proxes = [flowprox.FlowProx(glow()) for _ in range(n)] * (2 // n)
    return flowprox.UnfoldedPGD(proxes, step_size=0.4)


def twice() -> Pair:
    part = Tiny()
    return Pair(part, part)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "plain": (lambda: Tiny(4, scale=0.5), (2, 4)),
    "infinite argument": (lambda: Tiny(4, scale=float("inf")), (2, 4)),
    "nested": (lambda: Chain([Tiny(), Tiny()]), (2, 4)),
    "tied in a list": (lambda: Chain([Tiny()] * 3), (2, 4)),
    "tied by name": (twice, (2, 4)),
    "glow": (glow, (2, 3, 8, 8)),
    "unfolded": (lambda: unfolded(tied=False), (2, 3, 8, 8)),
    "unfolded, tied": (lambda: unfolded(tied=True), (2, 3, 8, 8)),
}


def output(model: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        if isinstance(model, flowprox.UnfoldedPGD):
            return model(x, flowprox.make_physics("denoising", (3, 8, 8)))
        return model.log_prob(x) if hasattr(model, "log_prob") else model(x)


# -------------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_gives_bitwise_the_same(name: str, tmp_path: Path) -> None:
    make, shape = MODELS[name]
    model, x = make().eval(), torch.rand(shape)
    card = save_model(model, tmp_path / "m")
    loaded = load_model(tmp_path / "m")
    assert torch.equal(output(loaded, x), output(model, x))
    assert not loaded.training
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == [CARD, WEIGHTS]
    assert loaded.card == card == load_card(tmp_path / "m")
    # sharing is restored, gradients flow to the same number of parameters
    assert (
        sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in model.parameters()) == card.n_parameters
    )
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in model.parameters()]
    # and a second generation is the same file
    assert save_model(loaded, tmp_path / "n", loaded.card).sha256 == card.sha256


def test_buffers_and_float64_come_back(tmp_path: Path) -> None:
    model = Tiny().double()
    model.initialized.fill_(True)
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.initialized.item() is True
    assert loaded.linear.weight.dtype == torch.float64
    assert torch.equal(loaded.linear.weight, model.linear.weight)
    assert load_card(tmp_path).weights_dtype == "float64"
    assert load_model(tmp_path, dtype="float32").linear.weight.dtype == torch.float32
    assert load_model(tmp_path, dtype=torch.float32).initialized.dtype == torch.bool


@pytest.mark.parametrize("half", [True, "float16", "bfloat16"])
def test_half_precision_halves_the_file_and_loads_as_float32(half: bool | str, tmp_path: Path) -> None:
    model = Tiny(64)
    full = save_model(model, tmp_path / "full")
    card = save_model(model, tmp_path / "half", half=half)
    loaded = load_model(tmp_path / "half")
    assert card.weights_dtype == ("float16" if half is True else half)
    assert card.n_bytes < 0.6 * full.n_bytes
    assert loaded.linear.weight.dtype == torch.float32
    assert torch.allclose(loaded.linear.weight, model.linear.weight, rtol=2**-8, atol=1e-7)
    assert torch.equal(loaded.linear.bias, model.linear.bias)  # small tensors are not rounded
    assert sha256(tmp_path / "half" / WEIGHTS) == card.sha256


def test_half_precision_refuses_overflow_and_unknown_types(tmp_path: Path) -> None:
    model = Tiny(64)
    with torch.no_grad():
        model.linear.weight[0, 0] = 1e5
    with pytest.raises(ValueError, match=r"linear\.weight holds values too large for float16.*bfloat16"):
        save_model(model, tmp_path, half=True)
    with pytest.raises(ValueError, match="half must be"):
        save_model(model, tmp_path, half="int8")
    assert not list(tmp_path.iterdir())


def test_saving_and_loading_leave_the_random_state_alone(tmp_path: Path) -> None:
    model = Tiny()
    before = torch.get_rng_state()
    save_model(model, tmp_path)
    load_model(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_card_tells_what_the_model_takes(tmp_path: Path) -> None:
    given = {
        "problem": {"name": "denoising", "parameters": {"sigma": 0.2}},
        "training": {"seed": 0, "machine": "one GPU"},
        "metrics": {"psnr_db": torch.tensor(25.0), "lpips": float("nan")},
    }
    save_model(unfolded(tied=False), tmp_path / "denoiser", given)
    text = (tmp_path / "denoiser" / CARD).read_text(encoding="utf-8")
    card = json.loads(text)
    assert text.count("\n") > 20
    assert '"image_shape": [3, 8, 8]' in text
    assert card["name"] == "denoiser"
    assert card["model"]["kind"] == "UnfoldedPGD"
    assert card["preprocessing"] == {"range": [0, 1], "channels": 3, "image_shape": [3, 8, 8], "divisor": 4}
    assert card["problem"] == given["problem"]
    assert card["training"]["machine"] == "one GPU"
    assert {"seed", "versions", "date"} <= set(card["training"])
    assert card["metrics"] == {"psnr_db": 25.0, "lpips": "nan"}
    assert "esearch" in card["license"] + card["intended_use"]


def test_a_problem_of_the_operators_goes_into_the_card(tmp_path: Path) -> None:
    from flowprox.operators import Problem

    problem = Problem("denoising", {"sigma": 0.1})
    save_model(Tiny(), tmp_path, Card("t", problem=problem))  # type: ignore[arg-type]
    assert Problem(**(load_card(tmp_path).problem or {})) == problem


def test_wrappers_are_unwrapped(tmp_path: Path) -> None:
    model = Tiny()
    save_model(nn.DataParallel(model), tmp_path)
    assert torch.equal(load_model(tmp_path).linear.weight, model.linear.weight)


def test_what_cannot_be_saved_says_so_before_writing(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    with pytest.raises(TypeError, match="Specified"):
        save_model(nn.Linear(2, 2), folder)
    with pytest.raises(TypeError, match=r"cannot write object into the card at metrics\.x\[0\]"):
        save_model(Tiny(), folder, {"metrics": {"x": [object()]}})
    with pytest.raises(CheckpointError, match="unknown key 'metric'"):
        save_model(Tiny(), folder, {"metric": {}})
    with pytest.raises(CheckpointError, match="'metrics' must be"):
        save_model(Tiny(), folder, {"metrics": 3})
    changed = Tiny()
    changed.linear = nn.Linear(3, 4)
    with pytest.raises(CheckpointError, match=r"cannot save this Tiny.*linear\.weight has shape \(4, 3\)"):
        save_model(changed, folder)
    untied = Chain([Tiny()] * 2)
    untied.parts[1] = Tiny()
    with pytest.raises(CheckpointError, match="no longer shared"):
        save_model(untied, folder)
    assert not folder.exists()


# ------------------------------------------------------------------------------------------------ interrupted writing


class FullDisk:
    """A file on a disk that is full after a number of bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: Any) -> int:
        if len(data) > self.room:
            self.file.write(data[: self.room])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.room -= len(data)
        return self.file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def fill_disk(monkeypatch: pytest.MonkeyPatch, name: str, room: int) -> None:
    """Let writing of the file that replaces ``name`` fail after ``room`` bytes: a card is begun before its weights."""
    begun = iter(range(100))

    def full_open(path: Any, mode: str = "r", **kwargs: Any) -> Any:
        file = open(path, mode, **kwargs)
        return FullDisk(file, room) if "x" in mode and next(begun) == int(name == WEIGHTS) else file

    monkeypatch.setattr(files, "open", full_open, raising=False)


@pytest.mark.parametrize("file", [CARD, WEIGHTS])
@pytest.mark.parametrize("room", [0, 100])
def test_a_full_disk_leaves_the_old_model(
    file: str, room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = Tiny(), Tiny()
    save_model(old, tmp_path, {"metrics": {"psnr": 1}})
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    fill_disk(monkeypatch, file, room)
    with pytest.raises(OSError, match="No space left"):
        save_model(new, tmp_path, {"metrics": {"psnr": 2}})
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


class Killed(BaseException):
    """Stands for the end of the process: nothing after it may matter."""


@pytest.mark.parametrize("moment", range(5))
@pytest.mark.parametrize("sync", [True, False])
def test_a_kill_at_any_step_leaves_the_old_or_the_new_model(
    moment: int, sync: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new, newer = Tiny(), Tiny(), Tiny()
    save_model(old, tmp_path, {"name": "old"})
    step = "fsync" if sync else "replace"
    real, calls = getattr(os, step), iter(range(100))

    def killing(*args: Any) -> None:
        if next(calls) == moment:
            raise Killed
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, step, killing)
        try:
            save_model(new, tmp_path, {"name": "new"})
            finished = True
        except Killed:
            finished = False
    loaded = load_model(tmp_path)
    expected = {"old": old, "new": new}[loaded.card.name]
    assert torch.equal(loaded.linear.weight, expected.linear.weight)
    assert not finished or loaded.card.name == "new"
    # the next save settles what was left, even if it fails in turn
    with monkeypatch.context() as patch:
        fill_disk(patch, WEIGHTS, 10)
        with pytest.raises(OSError, match="No space left"):
            save_model(newer, tmp_path)
    assert torch.equal(load_model(tmp_path).linear.weight, expected.linear.weight)
    save_model(newer, tmp_path)
    assert torch.equal(load_model(tmp_path).linear.weight, newer.linear.weight)
    assert not (tmp_path / PREVIOUS).exists()


def test_atomic_write_replaces_only_when_the_block_ends_well(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    with atomic_write(path, "w") as file:
        file.write("a,b\r\nü\n")
    assert path.read_bytes() == "a,b\r\nü\n".encode()
    with pytest.raises(RuntimeError), atomic_write(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["a.csv"]
    assert path.read_bytes().startswith(b"a,b")
    path.chmod(0o644)
    umask = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "b") as file:
            file.write(b"")
    finally:
        os.umask(umask)
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o640


def test_atomic_write_refuses_what_it_cannot_replace(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="create it"), atomic_write(tmp_path / "no" / "a"):
        pass
    with pytest.raises(OSError, match="not a regular file"), atomic_write(tmp_path):
        pass
    with pytest.raises(OSError, match="not a regular file"), atomic_write(os.devnull):
        pass
    with pytest.raises(ValueError, match="mode"), atomic_write(tmp_path / "a", "a"):
        pass


# -------------------------------------------------------------------------------------------------------- bad folders


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_model(Tiny(), tmp_path / "m")
    return tmp_path / "m"


def edit_card(folder: Path, **changes: Any) -> None:
    """Change keys of a card; None removes one."""
    card = json.loads((folder / CARD).read_text())
    card = {key: value for key, value in (card | changes).items() if value is not None or key == "problem"}
    (folder / CARD).write_text(json.dumps(card))


BAD_CARDS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no card": (lambda m: (m / CARD).unlink(), r"card\.json does not exist.*save_model"),
    "not JSON": (lambda m: (m / CARD).write_text("{"), r"card\.json is not JSON.*save the model again"),
    "not text": (lambda m: (m / CARD).write_bytes(b"\xff\xfe\x00"), r"is not JSON"),
    "a list": (lambda m: (m / CARD).write_text("[]"), "holds a list"),
    "no hash": (lambda m: edit_card(m, sha256=None), "lacks sha256"),
    "no model": (lambda m: edit_card(m, model=None), "lacks model"),
    "no version": (lambda m: edit_card(m, format_version=None), "lacks format_version"),
    "new version": (lambda m: edit_card(m, format_version=99), "format version 99.*update flowprox"),
    "unknown key": (lambda m: edit_card(m, extra=1), r"card\.json: unknown key 'extra'"),
    "wrong type": (lambda m: edit_card(m, model="Tiny"), "'model' must be"),
    "no kind": (lambda m: edit_card(m, model={"arguments": {}}), r"card\.json: unknown kind None"),
    "nested without end": (lambda m: (m / CARD).write_text("[" * 100_000), "is not JSON"),
    "a pipe": (lambda m: ((m / CARD).unlink(), os.mkfifo(m / CARD)), "does not exist"),
    "arguments are a list": (
        lambda m: edit_card(m, model={"kind": "Tiny", "arguments": [1]}),
        "'arguments' of 'model'",
    ),
    "problem is a number": (lambda m: edit_card(m, problem={"name": 3}), "'name' of 'problem' must be text, got 3"),
    "divisor is text": (lambda m: edit_card(m, preprocessing={"divisor": "x"}), "'divisor' of 'preprocessing'"),
    "far too large": (
        lambda m: edit_card(m, model={"kind": "Tiny", "arguments": {"width": 10**7}}),
        "much larger model",
    ),
    "far too many": (
        lambda m: edit_card(m, model={"kind": "Glow", "arguments": {"n_steps": 1_000_000}}),
        "much larger model",
    ),
    "unknown kind": (lambda m: edit_card(m, model={"kind": "os.system"}), r"unknown kind 'os\.system'.*Glow"),
    "nested kind": (
        lambda m: edit_card(m, model={"kind": "Chain", "arguments": {"parts": [{"kind": "Popen"}]}}),
        "unknown kind 'Popen'",
    ),
    "wrong argument": (lambda m: edit_card(m, model={"kind": "Tiny", "arguments": {"depth": 3}}), "do not fit Tiny"),
    "bad value": (lambda m: edit_card(m, model={"kind": "Tiny", "arguments": {"width": "x"}}), r"card\.json: "),
    "impossible value": (lambda m: edit_card(m, model={"kind": "Tiny", "arguments": {"width": -1}}), "negative dim"),
    "bad reference": (
        lambda m: edit_card(m, model={"kind": "Chain", "arguments": {"parts": [{"same_as": 7}]}}),
        r"card\.json: ",
    ),
    "other shape": (
        lambda m: edit_card(m, model={"kind": "Tiny", "arguments": {"width": 5}}),
        r"does not fit its weights: linear\.weight has shape \(4, 4\) instead of \(5, 5\)",
    ),
    "other names": (
        lambda m: edit_card(m, model={"kind": "Chain", "arguments": {"parts": [{"kind": "Tiny", "arguments": {}}]}}),
        r"parts\.0\.linear\.weight is missing, .* and \d more",
    ),
    "no weights": (lambda m: (m / WEIGHTS).unlink(), r"model\.safetensors does not exist"),
    "truncated": (lambda m: (m / WEIGHTS).write_bytes((m / WEIGHTS).read_bytes()[:-9]), r"has \d+ of \d+ bytes"),
    "one bit": (
        lambda m: (m / WEIGHTS).write_bytes((m / WEIGHTS).read_bytes()[:-1] + b"\x01"),
        "was altered and does not match the SHA-256",
    ),
}


@pytest.mark.parametrize("name", BAD_CARDS)
def test_a_bad_folder_is_refused_with_its_file_and_a_remedy(name: str, saved: Path) -> None:
    spoil, message = BAD_CARDS[name]
    spoil(saved)
    with pytest.raises(CheckpointError, match=f"(?s){message}") as caught:
        load_model(saved)
    assert str(saved) in str(caught.value)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda tensors: {**tensors, "linear.weight": tensors["linear.weight"] * torch.nan}, "holds NaN or infinity"),
        (lambda tensors: {**tensors, "linear.weight": tensors["linear.weight"].int()}, "type int32 instead of float"),
    ],
)
def test_weights_of_no_use_are_refused(saved: Path, spoil: Callable[[Any], Any], message: str) -> None:
    tensors = spoil(safetensors.torch.load_file(saved / WEIGHTS))
    safetensors.torch.save_file(tensors, saved / WEIGHTS)
    edit_card(saved, sha256=sha256(saved / WEIGHTS))
    with pytest.raises(CheckpointError, match=message):
        load_model(saved)


def test_a_model_that_is_not_finite_is_not_saved(saved: Path) -> None:
    model = Tiny()
    model.linear.bias.data[0] = torch.inf
    with pytest.raises(ValueError, match=r"linear\.bias holds NaN or infinity"):
        save_model(model, saved)
    assert load_model(saved)


def test_weights_that_hash_right_but_are_no_safetensors(saved: Path) -> None:
    (saved / WEIGHTS).write_bytes(b"nonsense" * 5)
    edit_card(saved, sha256=sha256(saved / WEIGHTS))
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load_model(saved)


def test_pickles_are_never_read(saved: Path, tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pt")
    torch.save({"a": torch.ones(1)}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    for path in (tmp_path / "a.pt", tmp_path / "old.ckpt"):
        with pytest.raises(CheckpointError, match=r"pickles are never read.*weights_only=True.*save_model"):
            load_model(path)
        (saved / WEIGHTS).write_bytes(path.read_bytes())
        with pytest.raises(CheckpointError, match=r"model\.safetensors is a pickle"):
            load_model(saved)
    (tmp_path / "bare").mkdir()
    (tmp_path / "a.pt").rename(tmp_path / "bare" / "a.pt")
    with pytest.raises(CheckpointError, match="pickles are never read"):
        load_model(tmp_path / "bare")


def test_a_header_length_that_looks_like_a_pickle_is_no_pickle(tmp_path: Path) -> None:
    path = tmp_path / WEIGHTS
    path.write_bytes((0x0280).to_bytes(8, "little") + b'{"a"')
    refuse_pickle(path)


def test_devices_and_types_that_do_not_exist(saved: Path) -> None:
    with pytest.raises(ValueError, match="device 'gpu'"):
        load_model(saved, device="gpu")
    with pytest.raises(ValueError, match="device 'cuda:99' is not available"):
        load_model(saved, device="cuda:99")
    for dtype in ("float31", "int64", torch.int64):
        with pytest.raises(ValueError, match="dtype must be a floating-point type"):
            load_model(saved, dtype=dtype)


# --------------------------------------------------------------------------------------------------- names and the hub


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "shipped"
    save_model(Tiny(scale=3.0), folder / "denoiser-faces", {"name": "denoiser-faces"})
    (folder / "not-a-model").mkdir()
    monkeypatch.setattr(store, "_shipped_folder", lambda: folder)
    monkeypatch.chdir(tmp_path)
    return folder


def test_names_are_looked_up_as_path_then_shipped(shipped: Path, tmp_path: Path) -> None:
    assert list_models() == ["denoiser-faces"]
    assert load_model("denoiser-faces").scale == 3.0
    save_model(Tiny(scale=5.0), tmp_path / "denoiser-faces")
    assert load_model("denoiser-faces").scale == 5.0
    for name in ("denoiser-faces", CARD, WEIGHTS):
        path = tmp_path / "denoiser-faces" / ("" if name == "denoiser-faces" else name)
        assert load_model(path).scale == load_model(str(path)).scale == 5.0


def test_an_unknown_name_names_the_nearest(shipped: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no model 'denoise-face'.*nearest shipped models: denoiser-faces"):
        load_model("denoise-face")
    (shipped.parent / "notes.txt").write_text("x")
    with pytest.raises(CheckpointError, match="is not a flowprox model"):
        load_model("notes.txt")


def test_the_models_of_the_package_load() -> None:
    for name in list_models():
        assert load_card(name).name == name
        assert load_model(name).card.sha256


def test_a_name_of_the_hub_is_downloaded(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[Any] = []

    def snapshot_download(repo_id: str, **options: Any) -> str:
        asked.append((repo_id, options))
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    load_model("hf:org/name", revision="v1")
    load_card("hf:org/name")
    assert asked == [
        ("org/name", {"revision": "v1", "allow_patterns": ["config.json", CARD, WEIGHTS]}),
        ("org/name", {"revision": None, "allow_patterns": ["config.json", CARD]}),
    ]
    (saved / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        load_model("hf:org/name")


def test_only_names_of_the_hub_go_there(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def snapshot_download(*_: Any, **__: Any) -> str:
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError, match=r"'hf:runs/m' \(no route\).*hf auth login"):
        load_model("hf:runs/m")
    with pytest.raises(CheckpointError, match=r"no model 'runs/denoising'.*hf:ORG/NAME"):
        load_model("runs/denoising")
    with pytest.raises(CheckpointError, match="write hf:ORG/NAME"):
        load_model("hf:name")


def test_a_folder_without_a_model_does_not_hide_a_shipped_one(shipped: Path, tmp_path: Path) -> None:
    (tmp_path / "denoiser-faces").mkdir()
    assert load_model("denoiser-faces").scale == 3.0


def test_a_folder_of_ones_own_has_names(shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(Tiny(scale=7.0), tmp_path / "own" / "denoiser-faces")
    save_model(Tiny(scale=8.0), tmp_path / "own" / "run" / "model")
    monkeypatch.setenv("FLOWPROX_MODELS", str(tmp_path / "own"))
    assert list_models() == ["denoiser-faces", "run"]
    assert [load_model(name).scale for name in list_models()] == [7.0, 8.0]
    monkeypatch.setenv("FLOWPROX_MODELS", str(tmp_path / "none"))
    with pytest.raises(CheckpointError, match=r"FLOWPROX_MODELS is .* no folder"):
        list_models()


def test_what_was_pushed_is_loaded_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the cache of the real client, which is told that there is no network."""
    import huggingface_hub

    place = tmp_path / "models--org--name"

    class Api:
        def __init__(self, token: str | None) -> None:
            pass

        def create_repo(self, repo_id: str, **_: Any) -> None:
            (place / "refs").mkdir(parents=True)
            (place / "refs" / "main").write_text(40 * "a")

        def create_commit(self, repo_id: str, operations: list[Any], **_: Any) -> Any:
            (place / "snapshots" / (40 * "a")).mkdir(parents=True)
            for one in operations:
                (place / "snapshots" / (40 * "a") / one.path_in_repo).write_bytes(one.path_or_fileobj)
            return type("Commit", (), {"commit_url": "https://hub/commit"})

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    flow = flowprox.Glow((3, 8, 8), n_levels=1, n_steps=1, hidden_channels=4).eval()
    assert flow.push_to_hub("org/name") == "https://hub/commit"
    loaded = flowprox.Glow.from_pretrained("hf:org/name")
    x = torch.rand(1, 3, 8, 8)
    assert torch.equal(loaded.log_prob(x), flow.log_prob(x)) and loaded.card.name == "name"
    with pytest.raises(CheckpointError, match="is a Glow, not a UnfoldedPGD"):
        flowprox.UnfoldedPGD.from_pretrained("hf:org/name")
    with pytest.raises(CheckpointError, match="could not be asked for 'hf:org/other'"):
        flowprox.Glow.from_pretrained("hf:org/other")


def test_push_to_hub_sends_all_files_in_one_commit(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    calls: list[Any] = []

    class Api:
        def __init__(self, token: str | None) -> None:
            pass

        def create_repo(self, repo_id: str, **options: Any) -> None:
            calls.append((repo_id, options))

        def create_commit(self, repo_id: str, operations: list[Any], **_: Any) -> Any:
            calls.append({op.path_in_repo: op.path_or_fileobj for op in operations})
            return type("Commit", (), {"commit_url": "https://hub/commit"})

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    edit_card(saved, metrics={"psnr_db": 25.1, "note": "a|b"}, training={"data": "faces"})
    assert push_to_hub(saved, "org/name") == "https://hub/commit"
    assert calls[0] == ("org/name", {"private": True, "exist_ok": True})
    assert calls[1][WEIGHTS] == (saved / WEIGHTS).read_bytes()
    assert json.loads(calls[1]["config.json"])["library_name"] == "flowprox"
    readme = calls[1]["README.md"].decode()
    for part in (
        "library_name: flowprox",
        'load_model("hf:org/name")',
        "| psnr_db | 25.1 |",
        "a\\|b",
        "Intended use",
        "license_link: LICENSE.md",
        "value: 25.1",
        "faces",
    ):
        assert part in readme
    (saved / WEIGHTS).write_bytes(b"x")
    with pytest.raises(CheckpointError, match="SHA-256"):
        push_to_hub(saved, "org/name")


# ------------------------------------------------------------------------------------------------------ training state


def test_a_training_state_comes_back(tmp_path: Path) -> None:
    model = Tiny()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": {"torch": torch.get_rng_state(), "python": random.getstate()},
        "step": 3,
        "best": -1.5,
        "bits": b"\x00\xff",
        "flags": [True, None, "text"],
    }
    save_training_state(tmp_path / "last.state", state)
    loaded = load_training_state(tmp_path / "last.state")
    assert torch.equal(loaded["model"]["linear.weight"], model.linear.weight)
    assert torch.equal(loaded["rng"]["torch"], state["rng"]["torch"])
    assert torch.equal(loaded["optimizer"]["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])
    random.setstate(loaded["rng"]["python"])
    for key in ("step", "best", "bits", "flags"):
        assert loaded[key] == state[key]
    optimizer.load_state_dict(loaded["optimizer"])


def test_a_training_state_of_objects_is_refused_when_saved(tmp_path: Path) -> None:
    import numpy as np

    with pytest.raises(TypeError, match=r"state\['a'\]\[1\] is a numpy\.ndarray"):
        save_training_state(tmp_path / "s", {"a": [1, np.zeros(2)]})
    with pytest.raises(TypeError, match=r"state\['p'\] is a pathlib"):
        save_training_state(tmp_path / "s", {"p": tmp_path})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("room", [0, 2000])
def test_a_full_disk_leaves_the_old_training_state(room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_training_state(tmp_path / "s", {"step": 1})
    fill_disk(monkeypatch, "s", room)
    with pytest.raises(OSError, match="No space left"):
        save_training_state(tmp_path / "s", {"step": 2, "x": torch.zeros(10_000)})
    assert load_training_state(tmp_path / "s") == {"step": 1}
    assert len(list(tmp_path.iterdir())) == 1


def test_damaged_training_states_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with pytest.raises(FileNotFoundError, match="no training state"):
        load_training_state(path)
    save_training_state(path, {"x": torch.arange(1000.0)})
    whole = path.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for bad in (b"", b"text", whole[:100], whole[:-50], flipped):
        path.write_bytes(bad)
        with pytest.raises(CheckpointError, match=r"not a whole training state.*resume from an earlier one"):
            load_training_state(path)


class Evil:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("evil",))


def test_a_training_state_cannot_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"x": Evil()}, tmp_path / "s")
    assert zipfile.is_zipfile(tmp_path / "s")
    with pytest.raises(CheckpointError, match="not a whole training state"):
        load_training_state(tmp_path / "s")
    assert not (tmp_path / "evil").exists()
    torch.save([1], tmp_path / "s")
    with pytest.raises(CheckpointError, match="holds a list"):
        load_training_state(tmp_path / "s")


# --------------------------------------------------------------------------------------------------------- the package


def test_import_is_light() -> None:
    code = (
        "import sys, flowprox, flowprox.checkpoints; flowprox.__version__; flowprox.list_models(); dir(flowprox);"
        "heavy = {'torch', 'numpy', 'deepinv', 'lightning_fabric', 'huggingface_hub'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(flowprox.__file__).parents[1])


def test_the_version_is_that_of_the_project() -> None:
    project = (Path(flowprox.__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    assert f'\nversion = "{flowprox.__version__}"\n' in project


def test_public_names_exist() -> None:
    for name in flowprox.__all__:
        assert getattr(flowprox, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = flowprox.nothing


def test_a_folder_has_one_writer(tmp_path: Path) -> None:
    out = tmp_path / "runs" / "a"
    with sole_writer(out):
        with pytest.raises(ValueError, match="another process is writing to"), sole_writer(out):
            pass
        with sole_writer(tmp_path / "runs" / "b"):
            pass
    with sole_writer(out):
        pass
    assert not (tmp_path / "runs").exists()  # the lock is not among the results


def test_a_folder_is_free_after_its_writer_was_killed(tmp_path: Path) -> None:
    code = f"import os\nfrom flowprox.files import sole_writer\nwith sole_writer({str(tmp_path / 'a')!r}): os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    with sole_writer(tmp_path / "a"):
        pass


def test_names_that_name_nothing_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    flow = flowprox.Glow((3, 8, 8), n_levels=1, n_steps=1, hidden_channels=4)
    flowprox.save_model(flow, ".")
    with pytest.raises(CheckpointError, match="name of the model is empty"):
        flowprox.load_model("")
    with pytest.raises(ValueError, match="is a name of the hub"):
        flowprox.save_model(flow, "hf:me/mine")
    assert not Path("hf:me").exists()
