"""Models on disk: a folder with a card to read and weights that cannot run code.

    NAME/card.json            what the model is, how it was made, how to rebuild it (``Card``)
    NAME/model.safetensors    its tensors; the card holds their SHA-256

A model is rebuilt from the constructor call written in its card (see ``flowprox.spec``), never from a pickle, and gives
bitwise the outputs it gave when it was saved. Files appear whole or not at all: they are written beside their target,
forced to disk and renamed. The card is renamed last; until then the weights that belong to the old card are kept, so a
full disk or a kill at any moment leaves either the old model or the new one.

A trainer's state (``save_training_state``) is one file of tensors and plain values, read without unpickling objects.
Nothing here imports torch before a model is needed.
"""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import hashlib
import importlib
import json
import math
import os
import platform
import re
import secrets
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from flowprox.spec import Specified, build, registered_kinds

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

__all__ = [
    "Card",
    "CheckpointError",
    "atomic_write",
    "list_models",
    "load_card",
    "load_model",
    "load_training_state",
    "push_to_hub",
    "save_model",
    "save_training_state",
    "sha256",
]

FORMAT_VERSION = 1
CARD = "card.json"
WEIGHTS = "model.safetensors"
PREVIOUS = "model.safetensors.previous"  # exists only while a save is under way, or after one was killed

LICENCE = "research use only; see the terms of the training data"
INTENDED_USE = (
    "Research on image reconstruction. Not for medical diagnosis, identification of persons or any use in which "
    "invented detail can do harm: a learned prior fills in what the measurement does not show."
)

_MODEL_MODULES = (  # lowest first: a flow is loaded without importing deepinv
    "flowprox.networks",
    "flowprox.flows",
    "flowprox.prox",
    "flowprox.operators",
    "flowprox.unfolded",
    "flowprox.baselines",
)
_PICKLE_SUFFIXES = {".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".bin", ".th", ".tar"}
_SHORT_LIST = re.compile(r"\[\n[^\[\]{}\"]{1,200}\n\s*\]")  # of numbers; JSON text has no line breaks inside strings
_SMALL = 1024  # tensors with fewer elements stay float32 in a half-precision file: they weigh nothing and steer much


class CheckpointError(ValueError):
    """A model or training state on disk that cannot be used; the message names the file and the remedy."""


@dataclass
class Card:
    """What is known about a saved model, as written to ``card.json``.

    ``save_model`` fills in the fields that it can read from the model: ``model``, ``preprocessing``, ``n_parameters``,
    ``n_bytes``, ``sha256``, ``weights_dtype``, and ``training``'s ``versions``, ``machine`` and ``date`` where absent.

    Arguments:
        name: short name of the model.
        model: the constructor call, ``{"kind": ..., "arguments": {...}}``.
        preprocessing: what the model takes: ``range`` of pixel values, ``channels``, ``image_shape`` (C, H, W) it was
            made for and ``divisor``, a number that must divide H and W.
        problem: name and parameters of the operator an unfolded model was trained for; None for a prior alone.
        training: free-form; usually data, terms (of the data), recipe, images, epochs, seed, machine, versions, date.
        metrics: free-form, e.g. ``{"psnr_db": 25.1, "bits_per_dim": 3.2}``. NaN and infinity are written as text.
        notes: anything else worth keeping.
        licence: terms of use of the weights.
        intended_use: what the model is for, and what not.
        n_parameters: number of parameters, shared ones counted once.
        n_bytes: size of the weights file.
        sha256: hash of the weights file.
        weights_dtype: "float32", or "float16" / "bfloat16" where large tensors were rounded to save space; these are
            loaded as float32.
        format_version: version of this layout.
    """

    name: str
    model: dict[str, Any] = field(default_factory=dict)
    preprocessing: dict[str, Any] = field(default_factory=dict)
    problem: dict[str, Any] | None = None
    training: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    licence: str = LICENCE
    intended_use: str = INTENDED_USE
    n_parameters: int = 0
    n_bytes: int = 0
    sha256: str = ""
    weights_dtype: str = "float32"
    format_version: int = FORMAT_VERSION

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Card:
        """Make a card from plain values.

        Raises:
            CheckpointError: a key is missing, unknown, or holds a value of the wrong type.
        """
        known = {f.name: f for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise CheckpointError(f"unknown key {unknown[0]!r} in the card; put free remarks under 'notes'")
        if "name" not in values:
            raise CheckpointError("the card lacks the key 'name'")
        for key, value in values.items():
            expected = {"str": str, "int": int}.get(str(known[key].type), Mapping)
            if not isinstance(value, expected) and not (key == "problem" and value is None):
                raise CheckpointError(f"the card's {key!r} must be {known[key].type}, got {type(value).__name__}")
        return cls(**values)

    def to_json(self) -> str:
        """The card as indented JSON."""
        values = {f.name: _plain(getattr(self, f.name), f.name) for f in dataclasses.fields(self) if f.name != "model"}
        first = {"format_version": values.pop("format_version"), "name": values.pop("name"), "model": self.model}
        text = json.dumps(first | values, indent=2, ensure_ascii=False)
        return (
            _SHORT_LIST.sub(lambda found: re.sub(r"\n\s*", " ", found[0]).replace("[ ", "[").replace(" ]", "]"), text)
            + "\n"
        )


# --------------------------------------------------------------------------------------------------------------- files


@contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a file for writing that replaces ``path`` only when the block ends without an error.

    The data go to a hidden file in the same folder, are forced to disk and renamed. On any error ``path`` is as it was
    and the hidden file is gone. A symbolic link is replaced, not followed.

    Arguments:
        path: file to write; its folder must exist.
        mode: "wb" for bytes or "w" for text (UTF-8, line ends as given).

    Raises:
        FileNotFoundError: the folder does not exist.
        OSError: the path is a folder or a device, or the disk is full.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.txt"
        >>> with atomic_write(path, "w") as f:
        ...     _ = f.write("whole")
        >>> path.read_text()
        'whole'
    """
    if mode not in ("w", "wb"):
        raise ValueError(f"mode must be 'w' or 'wb', got {mode!r}")
    target = Path(path).absolute()
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {os.fspath(path)}: the folder {target.parent} does not exist; create it")
    if target.exists() and not target.is_file():
        raise OSError(f"cannot write {os.fspath(path)}: it exists and is not a regular file; choose another path")
    temporary = target.with_name(f".{target.name[:200]}.{secrets.token_hex(6)}.tmp")
    # "x" and not mkstemp, which ignores the umask
    file: IO[Any] = open(temporary, "xb") if mode == "wb" else open(temporary, "x", encoding="utf-8", newline="")
    try:
        with file:
            yield file
            _force_to_disk(file)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def _force_to_disk(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; folders cannot be opened on Windows, where this is not needed."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sha256(path: str | os.PathLike[str]) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# -------------------------------------------------------------------------------------------------------------- saving


def save_model(
    model: nn.Module,
    folder: str | os.PathLike[str],
    card: Card | Mapping[str, Any] | None = None,
    *,
    half: bool | str = False,
) -> Card:
    """Write a model to a folder, replacing a model that is there only once the new one is complete.

    Before anything is written the model is rebuilt once from its constructor arguments, so that what is saved can be
    loaded. torch's random number generator is left as it was.

    Arguments:
        model: a flowprox model (anything that derives from ``Specified``); a compiled or data-parallel wrapper is
            unwrapped.
        folder: where to; created if needed. Its name is the model's name unless the card has one.
        card: what to record besides what the model tells; a ``Card`` or a dictionary with its fields. Not changed.
        half: store large tensors in half precision: "float16" (True means the same; finer) or "bfloat16" (wider range).
            They are rounded, so outputs of the loaded model differ slightly from those of ``model``.

    Returns:
        The complete card, as written.

    Raises:
        TypeError: ``model`` or a value in the card cannot be written down.
        CheckpointError: the model cannot be rebuilt from its constructor arguments.
        ValueError: a weight is too large for float16.
        OSError: the folder cannot be written; a model that was there is still whole.

    Example:
        >>> import tempfile, torch, flowprox
        >>> flow = flowprox.Glow((3, 8, 8), n_levels=2, n_steps=1, hidden_channels=8).eval()
        >>> folder = tempfile.mkdtemp()
        >>> _ = save_model(flow, folder, {"name": "tiny", "training": {"seed": 0}})
        >>> x = torch.rand(2, 3, 8, 8)
        >>> torch.equal(load_model(folder).log_prob(x), flow.log_prob(x))
        True
    """
    import safetensors.torch
    import torch

    folder = Path(folder)
    model = _unwrap(model)
    stored_dtype = _half_name(half)
    tensors, shared = _distinct_tensors(model)
    spec = _specified(model).spec()
    _check_rebuild(model, spec)

    values = vars(card) if isinstance(card, Card) else dict(card or {})
    problem = {"problem": _plain(values.get("problem"), "problem")}
    card = Card.from_dict({"name": folder.absolute().name} | values | problem)
    card.format_version = FORMAT_VERSION
    card.model = spec
    card.preprocessing = _preprocessing(model) | dict(card.preprocessing)
    card.training = dict(card.training) | {k: v for k, v in _provenance(model).items() if k not in card.training}
    card.n_parameters = sum(p.numel() for p in model.parameters())
    card.weights_dtype = stored_dtype or str(next(model.parameters(), torch.empty(0)).dtype).removeprefix("torch.")
    data = safetensors.torch.save(
        {name: _to_store(name, tensor, stored_dtype) for name, tensor in tensors.items()},
        metadata={"shared": json.dumps(shared)},  # one key only: safetensors writes several in random order
    )
    card.n_bytes = len(data)
    card.sha256 = hashlib.sha256(data).hexdigest()
    text = card.to_json()

    folder.mkdir(parents=True, exist_ok=True)
    _settle_interrupted_save(folder)
    with atomic_write(folder / CARD, "w") as card_file:
        card_file.write(text)
        _force_to_disk(card_file)
        with atomic_write(folder / WEIGHTS, "wb") as weights_file:
            weights_file.write(data)
            _force_to_disk(weights_file)
            # Both files are on disk, only renames are left. Between them the old card finds its weights under PREVIOUS.
            if (folder / WEIGHTS).exists():
                os.replace(folder / WEIGHTS, folder / PREVIOUS)
    (folder / PREVIOUS).unlink(missing_ok=True)
    return Card.from_dict(json.loads(text))


def _settle_interrupted_save(folder: Path) -> None:
    """After a killed save: give the weights that belong to the card their name back, or drop what is left over."""
    previous = folder / PREVIOUS
    if not previous.exists():
        return
    # searched, not parsed: a damaged card must not keep a new model from being saved
    if (folder / CARD).exists() and sha256(previous).encode() in (folder / CARD).read_bytes():
        os.replace(previous, folder / WEIGHTS)
    else:
        previous.unlink()


def _unwrap(model: Any) -> Any:
    while not isinstance(model, Specified):
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)  # torch.compile; data parallel
        if inner is None:
            break
        model = inner
    return model


def _specified(model: Any) -> Specified:
    if not isinstance(model, Specified):
        raise TypeError(
            f"cannot save a {type(model).__name__}: models are saved with their constructor arguments, so the class "
            "must derive from flowprox.spec.Specified first: class Mine(Specified, nn.Module)"
        )
    return model


def _half_name(half: bool | str) -> str | None:
    name = {False: None, True: "float16"}.get(half, half) if isinstance(half, bool) else half
    if name not in (None, "float16", "bfloat16"):
        raise ValueError(f"half must be False, True, 'float16' or 'bfloat16', got {half!r}")
    return name


def _distinct_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor once, under its first name, and the other names of shared ones."""
    import torch

    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"cannot save {name}: {type(tensor).__name__} in a model's state; keep it as a buffer")
        kept = first.setdefault(id(tensor), name)
        if kept == name:
            tensors[name] = tensor.detach()
        else:
            shared[name] = kept
    return tensors, shared


def _to_store(name: str, tensor: Tensor, half: str | None) -> Tensor:
    import torch

    tensor = tensor.cpu().clone(memory_format=torch.contiguous_format)  # a copy of its own: views may overlap
    if half is None or not tensor.is_floating_point() or tensor.numel() < _SMALL:
        return tensor
    rounded = tensor.to(getattr(torch, half))
    if not bool(torch.isfinite(rounded).all()) and bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name} holds values too large for {half}; pass half='bfloat16' or half=False")
    return rounded


def _check_rebuild(model: nn.Module, spec: Mapping[str, Any]) -> None:
    """Fail before writing if ``build(spec)`` gives other tensors than the model has."""
    kind = spec["kind"]
    rebuilt = _build(spec, f"cannot save this {kind}")
    problems = _misfits(_shapes(rebuilt), _shapes(model))
    tied, wanted = _distinct_tensors(rebuilt)[1], _distinct_tensors(model)[1]
    problems += [f"{name} is no longer shared with {kept}" for name, kept in tied.items() if wanted.get(name) != kept]
    if problems:
        raise CheckpointError(
            f"cannot save this {kind}: built again from its constructor arguments it differs ({_few(problems)}); "
            "construct the model with the parts it is to have instead of exchanging them later"
        )


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _misfits(expected: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]]) -> list[str]:
    problems = [f"{name} is missing" for name in expected if name not in given]
    problems += [f"{name} is unexpected" for name in given if name not in expected]
    for name, shape in expected.items():
        if name in given and given[name] != shape:
            problems.append(f"{name} has shape {given[name]} instead of {shape}")
    return problems


def _few(problems: list[str], n: int = 4) -> str:
    more = f"; and {len(problems) - n} more" if len(problems) > n else ""
    return "; ".join(problems[:n]) + more


def _preprocessing(model: Any) -> dict[str, Any]:
    """Pixel range, channels, image shape and divisor, from the model or from its first flow."""
    flows = model.flows() if callable(getattr(model, "flows", None)) else []
    owner = model if hasattr(model, "image_shape") else next(iter(flows), model)
    shape = getattr(owner, "image_shape", None)
    return {
        "range": [0, 1],
        "channels": None if shape is None else int(shape[0]),
        "image_shape": None if shape is None else [int(n) for n in shape],
        "divisor": getattr(model, "divisor", getattr(owner, "divisor", None)),
    }


def _provenance(model: nn.Module) -> dict[str, Any]:
    import torch

    import flowprox

    versions = {"flowprox": flowprox.__version__, "torch": str(torch.__version__), "python": platform.python_version()}
    if "deepinv" in sys.modules:  # a flow alone does not depend on it
        versions["deepinv"] = version("deepinv")
    tensor = next(model.parameters(), torch.empty(0))
    machine = (
        torch.cuda.get_device_name(tensor.device) if tensor.is_cuda else f"{tensor.device.type}, {os.cpu_count()} cores"
    )
    return {
        "machine": f"{platform.system()} {platform.machine()}, {machine}",
        "versions": versions,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def _plain(value: Any, where: str) -> Any:
    """``value`` as JSON: numpy and torch numbers, dataclasses, paths, dates included; NaN and infinity as text."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in dataclasses.fields(value)]
        return {name: _plain(getattr(value, name), f"{where}.{name}") for name in names}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, datetime.date | datetime.datetime):
        return value.isoformat()
    to_list = getattr(value, "tolist", None)  # numpy and torch
    if callable(to_list):
        return _plain(to_list(), where)
    raise TypeError(
        f"cannot write {type(value).__name__} into the card at {where}; pass numbers, text, lists or mappings"
    )


# ------------------------------------------------------------------------------------------------------------- loading


def load_model(
    name: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    *,
    revision: str | None = None,
) -> Any:
    """Load a model, in evaluation mode, with its card as ``model.card``.

    Arguments:
        name: in this order: a folder (or a file in it), the name of a model shipped with flowprox (``list_models()``),
            or a Hugging Face hub id "org/name".
        device: where to put it.
        dtype: floating-point type to convert to; by default the one it was saved in (float32 for half-precision files).
        revision: branch, tag or commit on the hub.

    Raises:
        CheckpointError: no such model, damaged or unfitting card or weights, or a pickle (a ``ValueError``).
        ValueError: the device or dtype is not available.

    No code from the folder is run, whoever made it: a card can name registered classes only, weights are numbers.
    """
    target = _device(device)
    float_type = _dtype(dtype)
    folder = _resolve(name, (CARD, WEIGHTS), revision)
    card = _read_card(folder / CARD)
    tensors, shared = _parse_weights(_read_weights(folder, card), folder / WEIGHTS)
    model = _build(card.model, str(folder / CARD))
    _fill(model, tensors, shared, half=card.weights_dtype in ("float16", "bfloat16"), where=str(folder))
    model.card = card
    return model.to(device=target, dtype=float_type).eval()


def load_card(name: str | os.PathLike[str], *, revision: str | None = None) -> Card:
    """The card of a model; ``name`` and errors as in ``load_model``. The weights are neither read nor downloaded."""
    return _read_card(_resolve(name, (CARD,), revision) / CARD)


def list_models() -> list[str]:
    """Names of the models shipped with flowprox, for ``load_model``."""
    shipped = _shipped_folder()
    if not shipped.is_dir():
        return []
    return sorted(folder.name for folder in shipped.iterdir() if (folder / CARD).is_file())


def _shipped_folder() -> Path:
    return Path(str(resources.files("flowprox"))) / "models"


def _resolve(name: str | os.PathLike[str], files: tuple[str, ...], revision: str | None) -> Path:
    """The folder of a model: an existing path, a shipped name, or a download."""
    path = Path(name).expanduser()
    if path.is_file() and path.name in (CARD, WEIGHTS):
        return path.parent
    if path.is_file():
        _refuse_pickle(path)
        raise CheckpointError(f"{path} is not a flowprox model; give the folder that holds {CARD} and {WEIGHTS}")
    if path.is_dir():
        return path
    name = os.fspath(name)
    if name in list_models():
        return _shipped_folder() / name
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) and path.suffix not in _PICKLE_SUFFIXES:
        return _download(name, files, revision)
    near = difflib.get_close_matches(name, list_models(), n=3, cutoff=0.4) or list_models()
    hint = f"nearest shipped models: {', '.join(near)}" if near else "no models are shipped with this installation"
    raise CheckpointError(f"no model {name!r}: not a folder, not a shipped model, not a hub id 'org/name'; {hint}")


def _download(repo_id: str, files: tuple[str, ...], revision: str | None) -> Path:
    import huggingface_hub

    where = f"{repo_id!r} is not a folder here, and the hub"
    try:
        folder = huggingface_hub.snapshot_download(repo_id, revision=revision, allow_patterns=list(files))
    except _hub_errors() as error:
        raise CheckpointError(
            f"{where} could not be asked for it ({_first_line(error)}); check the path or id, the revision, the "
            "connection, and for a private model run `hf auth login`"
        ) from error
    missing = [file for file in files if not (Path(folder) / file).is_file()]
    if missing:
        raise CheckpointError(f"{where} has no {missing[0]} under that id: it is not a flowprox model")
    return Path(folder)


def _hub_errors() -> tuple[type[Exception], ...]:
    """Failures of the hub, of ids and of the connection: the HTTP library's base class, whichever library it is."""
    from huggingface_hub.errors import HfHubHTTPError

    return (*(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)), OSError, ValueError)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _read_card(path: Path) -> Card:
    if not path.is_file():
        for other in sorted(path.parent.glob("*")):
            if other.suffix in _PICKLE_SUFFIXES:
                _refuse_pickle(other)
        raise CheckpointError(
            f"{path} does not exist: {path.parent} is not a flowprox model; write one with flowprox.save_model"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise CheckpointError(f"{path} is not JSON ({error}); restore the file or save the model again") from error
    if not isinstance(values, dict):
        raise CheckpointError(
            f"{path} is not a card: it holds a {type(values).__name__}, not an object; save the model again"
        )
    if values.get("format_version", FORMAT_VERSION) != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {values['format_version']!r}, this flowprox reads {FORMAT_VERSION}; "
            "update flowprox"
        )
    missing = [key for key in ("format_version", "name", "model", "sha256", "weights_dtype") if not values.get(key)]
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}; restore the file or save the model again")
    try:
        return Card.from_dict(values)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _read_weights(folder: Path, card: Card) -> bytes:
    """The bytes that belong to the card: hashed and parsed from one reading."""
    path = folder / WEIGHTS
    candidates = [file for file in (path, folder / PREVIOUS) if file.is_file()]
    if not candidates:
        raise CheckpointError(f"{path} does not exist; copy it beside {CARD} or save the model again")
    _refuse_pickle(candidates[0])
    for candidate in candidates:
        data = candidate.read_bytes()
        if hashlib.sha256(data).hexdigest() == card.sha256:
            return data
    size = path.stat().st_size if path.is_file() else 0
    state = f"has {size} of {card.n_bytes} bytes" if size != card.n_bytes else "was altered"
    raise CheckpointError(
        f"{path} {state} and does not match the SHA-256 in {CARD}; copy or download the folder again (a file that "
        "git-lfs left as a pointer has about 130 bytes)"
    )


def _refuse_pickle(path: Path) -> None:
    """Pickles and zip archives can run code when they are read."""
    with open(path, "rb") as file:
        start = file.read(9)
    # a safetensors file starts with a length, which may happen to look like a pickle's first bytes, and then "{"
    looks_like_one = start.startswith((b"PK\x03\x04", b"\x80")) and start[8:] != b"{"
    if path.suffix in _PICKLE_SUFFIXES or looks_like_one:
        raise CheckpointError(
            f"{path} is a pickle or zip archive (.pt, .pth, .ckpt): pickles are never read as models, since they can "
            "run code. To convert: construct the model, "
            "model.load_state_dict(torch.load(file, weights_only=True)), then "
            "flowprox.save_model(model, folder)"
        )


def _parse_weights(data: bytes, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    import safetensors.torch
    from safetensors import SafetensorError

    try:
        tensors = safetensors.torch.load(data)
        length = int.from_bytes(data[:8], "little")
        shared = json.loads(json.loads(data[8 : 8 + length]).get("__metadata__", {}).get("shared", "{}"))
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is not a safetensors file ({error}); copy or download it again") from error
    return tensors, {str(name): str(kept) for name, kept in shared.items() if kept in tensors}


def _build(spec: Mapping[str, Any], where: str) -> Any:
    """``build(spec)`` on the CPU, with the classes it names imported and the random number generator left alone."""
    import torch

    for module in _MODEL_MODULES:
        if _kinds(spec) <= set(registered_kinds()):
            break
        importlib.import_module(module)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            return build(spec)
    except (ValueError, TypeError, LookupError, RuntimeError, ArithmeticError) as error:  # constructors of any kind
        raise CheckpointError(f"{where}: {error}") from error


def _kinds(value: Any) -> set[str]:
    """All names of classes in a spec."""
    if isinstance(value, Mapping):
        own = {value["kind"]} if isinstance(value.get("kind"), str) else set()
        return own.union(*(_kinds(item) for item in value.values()))
    if isinstance(value, list):
        return set().union(*(_kinds(item) for item in value))
    return set()


def _fill(model: nn.Module, tensors: Mapping[str, Tensor], shared: Mapping[str, str], half: bool, where: str) -> None:
    """Copy tensors into a model that was just built, and share what was shared."""
    import torch

    given = dict(tensors) | {name: tensors[kept] for name, kept in shared.items()}
    problems = _misfits(_shapes(model), {name: tuple(tensor.shape) for name, tensor in given.items()})
    built_shared = _distinct_tensors(model)[1]
    for name, kept in built_shared.items():
        if shared.get(name, name) != shared.get(kept, kept):
            problems.append(f"{name} must be shared with {kept}, but is stored on its own")
    if problems:
        raise CheckpointError(f"the card in {where} does not fit its weights: {_few(problems)}; save the model again")
    if half:
        halves = (torch.float16, torch.bfloat16)
        given = {name: tensor.float() if tensor.dtype in halves else tensor for name, tensor in given.items()}
    for name, own in model.state_dict(keep_vars=True).items():
        own.data = own.data.to(given[name].dtype)  # a model saved in float64 comes back in float64
    model.load_state_dict(given)
    for name, kept in shared.items():
        if name not in built_shared:
            _share(model, name, kept)


def _share(model: nn.Module, name: str, kept: str) -> None:
    """Make two names one tensor again where the constructor call alone did not."""
    (parent, _, leaf), (other, _, other_leaf) = name.rpartition("."), kept.rpartition(".")
    setattr(model.get_submodule(parent), leaf, getattr(model.get_submodule(other), other_leaf))


def _device(device: str | torch.device) -> torch.device:
    import torch

    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device {device!r} is not known: {_first_line(error)}; use 'cpu' or 'cuda'") from error
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {str(target)!r} is not available: torch sees {torch.cuda.device_count()} GPUs; use 'cpu'"
        )
    return target


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    import torch

    if dtype is None:
        return None
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype must be a floating-point type such as 'float32' or 'float64', got {dtype!r}")
    return found


# ----------------------------------------------------------------------------------------------------------------- hub


def push_to_hub(
    folder: str | os.PathLike[str],
    repo_id: str,
    private: bool = True,
    *,
    revision: str | None = None,
    token: str | None = None,
) -> str:
    """Upload a saved model to the Hugging Face hub, in one commit, with a README made from its card.

    Arguments:
        folder: a folder written by ``save_model``.
        repo_id: "org/name"; created if needed.
        private: whether a repository that is created is private.
        revision: branch to commit to; the main one by default.
        token: access token; by default the one stored by ``hf auth login``.

    Returns:
        The address of the commit.

    Raises:
        CheckpointError: the folder is not a whole model, or the hub refused.
    """
    import huggingface_hub

    folder = Path(folder)
    card = _read_card(folder / CARD)
    files = {
        CARD: (folder / CARD).read_bytes(),
        WEIGHTS: _read_weights(folder, card),
        "README.md": _readme(card, repo_id).encode(),
    }
    operations = [huggingface_hub.CommitOperationAdd(path, data) for path, data in files.items()]
    api = huggingface_hub.HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.create_commit(repo_id, operations, commit_message=f"{card.name} (flowprox)", revision=revision)
    except _hub_errors() as error:
        raise CheckpointError(
            f"could not upload {folder} to {repo_id!r}: {_first_line(error)}; check the id and run `hf auth login`"
        ) from error
    return str(commit.commit_url)


def _readme(card: Card, repo_id: str) -> str:
    """The card as a Hugging Face model card."""
    import huggingface_hub

    data = huggingface_hub.ModelCardData(
        library_name="flowprox",
        license="other",
        license_name="see-model-card",
        pipeline_tag="image-to-image",
        tags=["normalizing-flow", "inverse-problems", "image-reconstruction"],
    )
    sections = {
        "Input": card.preprocessing,
        "Problem it was trained for": card.problem,
        "Metrics": card.metrics,
        "Training": card.training,
        "Notes": card.notes,
    }
    tables = [f"## {title}\n\n{_table(values)}" for title, values in sections.items() if values]
    arguments = json.dumps(card.model.get("arguments", {}), indent=2)
    text = [
        f"---\n{data.to_yaml()}\n---",
        f"# {card.name}",
        f"`{card.model['kind']}` with {card.n_parameters:,} parameters, stored as {card.weights_dtype}, for "
        "image reconstruction with normalizing-flow priors.",
        f'```python\nimport flowprox\n\nmodel = flowprox.load_model("{repo_id}")\n```',
        f"**Licence.** {card.licence}",
        f"**Intended use.** {card.intended_use}",
        *tables,
        f"## Constructor\n\n`{card.model['kind']}` with\n\n```json\n{arguments}\n```",
        f"SHA-256 of `{WEIGHTS}`: `{card.sha256}`",
    ]
    content = "\n\n".join(text) + "\n"
    return str(huggingface_hub.ModelCard(content, ignore_metadata_errors=False))


def _table(values: Mapping[str, Any]) -> str:
    cells = {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}
    rows = [
        f"| {key} | {value} |"
        for key, value in ((k, v.replace("|", "\\|").replace("\n", " ")) for k, v in cells.items())
    ]
    return "\n".join(["| | |", "|---|---|", *rows])


# ------------------------------------------------------------------------------------------------------ training state


def save_training_state(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Write a trainer's state to one file, whole or not at all.

    Arguments:
        path: file to write; its folder must exist.
        state: nested dictionaries, lists and tuples of tensors, numbers, text, bytes and None; random states of torch
            are tensors, those of Python's ``random`` are tuples of numbers. numpy arrays must be made tensors.

    Raises:
        TypeError: a value could not be read back without unpickling objects; the message names the place.
        OSError: the file cannot be written; one that was there is still whole.

    Example:
        >>> import tempfile, torch
        >>> path = Path(tempfile.mkdtemp()) / "last.state"
        >>> save_training_state(path, {"step": 3, "rng": torch.get_rng_state()})
        >>> load_training_state(path)["step"]
        3
    """
    import torch

    _check_state(state, "state")
    with atomic_write(path, "wb") as file:
        guarded = _GuardedFile(file)
        try:
            torch.save(dict(state), guarded)  # type: ignore[arg-type]
        except RuntimeError:
            # torch's zip writer turns a full disk into a RuntimeError
            if guarded.error is None:
                raise
            raise guarded.error from None


class _GuardedFile:
    """A file that remembers the first error of its writes."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self.file.flush()


def _check_state(value: Any, where: str) -> None:
    import torch

    if isinstance(value, torch.Tensor):
        return
    if type(value) in (dict, OrderedDict) or (where == "state" and isinstance(value, Mapping)):
        for key, item in value.items():
            _check_state(key, f"a key of {where}")
            _check_state(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple, set):
        for i, item in enumerate(value):
            _check_state(item, f"{where}[{i}]")
    elif value is not None and type(value) not in (
        bool,
        int,
        float,
        complex,
        str,
        bytes,
        torch.dtype,
        torch.device,
        torch.Size,
    ):
        raise TypeError(
            f"{where} is a {type(value).__module__}.{type(value).__qualname__}, which cannot be read back without "
            "unpickling objects; store tensors, numbers, text, or lists and dictionaries of these"
        )


def load_training_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what ``save_training_state`` wrote, tensors on the CPU. Objects are never unpickled.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged, or holds more than tensors and plain values.
    """
    import pickle
    import zipfile

    import torch

    formats = (zipfile.BadZipFile, pickle.UnpicklingError)

    if not Path(path).is_file():
        raise FileNotFoundError(
            f"no training state {os.fspath(path)}; check the path, or start training without resuming"
        )
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"{damaged} is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, *formats) as error:
        raise CheckpointError(
            f"{os.fspath(path)} is not a whole training state ({_first_line(error)}); resume from an earlier one"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{os.fspath(path)} holds a {type(state).__name__}, not a training state")
    return state
