"""Models to disk and from it: rebuilt from the constructor call in the card, filled with tensors, never unpickled.

A tensor that a model uses under several names is stored once; the file's metadata list its other names.
"""

from __future__ import annotations

import datetime
import difflib
import hashlib
import importlib
import io
import json
import os
import platform
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from flowprox import MODEL_MODULES, __version__
from flowprox.checkpoints.card import (
    CARD,
    FORMAT_VERSION,
    PREVIOUS,
    WEIGHTS,
    Card,
    CheckpointError,
    plain,
    read_card,
    read_weights,
    refuse_pickle,
)
from flowprox.checkpoints.hub import HUB, download, push_to_hub
from flowprox.files import atomic_write, first_line, force_to_disk, sha256
from flowprox.naming import Specified, Values, build, few, registered_kinds, require_device

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

MODELS = "FLOWPROX_MODELS"
"""Environment variable; a folder of models, or of training runs, that are found by their names."""

_SMALL = 1024  # tensors with fewer elements stay float32 in a half-precision file: they weigh nothing and steer much
_BOTH = (CARD, WEIGHTS)


# From disk -----------------------------------------------------------------------------------------------------------


def load_model(
    name: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    *,
    revision: str | None = None,
    compile: bool = False,
) -> Any:
    """Load a model, in evaluation mode, with its card as ``model.card``.

    Arguments:
        name: in this order: a folder with a model (or a file in it, or a training run's folder), the name of a model in the
            folder FLOWPROX_MODELS of the environment or of one shipped with flowprox (``list_models()``), or "hf:ORG/NAME"
            for one of the Hugging Face hub. Nothing else is looked up on the network.
        device: where to put it.
        dtype: floating-point type to convert to; by default the one it was saved in (float32 for half-precision files).
        revision: branch, tag or commit on the hub.
        compile: compile what the model repeats (``flowprox.graphs.compile_regions``), for a GPU. The first image of every size
            then takes up to a minute.

    Raises:
        CheckpointError: no such model, damaged or unfitting card or weights, or a pickle (a ``ValueError``).
        ValueError: the device or dtype is not available.

    No code from the folder is run, whoever made it: a card can name registered classes only, weights are numbers.
    """
    import torch

    target = require_device(device)
    float_type = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(float_type, torch.dtype) and float_type.is_floating_point):
        raise ValueError(f"dtype must be a floating-point type such as 'float32' or 'float64', got {dtype!r}")
    folder = find_model(name, (CARD, WEIGHTS), revision)
    card = read_card(folder / CARD)
    tensors, shared = _unpack(read_weights(folder, card), folder / WEIGHTS)
    model = _rebuild(card.model, str(folder / CARD), tensors)
    _fill(model, tensors, shared, str(folder))
    model.card = card
    model = model.to(device=target, dtype=float_type).eval()
    if compile:
        from flowprox.graphs import compile_regions

        compile_regions(model)
    return model


def load_card(name: str | os.PathLike[str], *, revision: str | None = None) -> Card:
    """The card of a model; ``name`` and errors as in ``load_model``. The weights are neither read nor downloaded."""
    return read_card(find_model(name, (CARD,), revision) / CARD)


def list_models() -> list[str]:
    """Names for ``load_model``: of the models shipped with flowprox, and of those in the folder FLOWPROX_MODELS."""
    return sorted({path.name for folder in _folders() if folder.is_dir() for path in folder.iterdir() if _within(path)})


def _folders() -> list[Path]:
    """Where models have names: the user's own folder comes first."""
    own = os.environ.get(MODELS)
    if own and not os.path.isdir(own):
        raise CheckpointError(f"{MODELS} is {own!r}, which is no folder; make it, or unset the variable")
    return [*([Path(own)] if own else []), _shipped_folder()]


def _shipped_folder() -> Path:
    return Path(str(resources.files("flowprox"))) / "models"


def _within(path: Path) -> Path | None:
    """The folder with the card: this one, or the one in which a training run keeps its model."""
    return next((folder for folder in (path, path / "model") if (folder / CARD).exists()), None)


def find_model(name: str | os.PathLike[str], files: tuple[str, ...] = _BOTH, revision: str | None = None) -> Path:
    """The folder of a model, named as in ``load_model``; of a hub's model ``files`` are downloaded. Imports no torch."""
    text = os.fspath(name)
    if not text:
        raise CheckpointError("the name of the model is empty; give a folder, a shipped name or hf:ORG/NAME")
    if text.startswith(HUB):
        return download(text, files, revision)
    path = Path(name).expanduser()
    if path.is_file() and path.name in (CARD, WEIGHTS):
        return path.parent
    if path.is_file():
        refuse_pickle(path)
        raise CheckpointError(f"{path} is not a flowprox model; give the folder that holds {CARD} and {WEIGHTS}")
    named = [path, *(folder / text for folder in _folders() if os.path.basename(text) == text)]
    for folder in filter(None, map(_within, named)):  # a folder without a model does not hide one that has the name
        return folder
    if path.is_dir():
        return path  # read_card says what it lacks
    near = difflib.get_close_matches(text, list_models(), n=3, cutoff=0.4) or list_models()
    hint = f"nearest shipped models: {', '.join(near)}" if near else "no models are shipped with this installation"
    hint = f"neither a folder here nor a shipped model; {hint}; one of the hub is written {HUB}ORG/NAME"
    raise CheckpointError(f"no model {text!r}: {hint}")


def _unpack(data: bytes, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name, and for each further name of a shared one the name it is stored under."""
    import safetensors.torch
    import torch
    from safetensors import SafetensorError

    try:
        tensors = safetensors.torch.load(data)
        length = int.from_bytes(data[:8], "little")
        shared = json.loads(json.loads(data[8 : 8 + length]).get("__metadata__", {}).get("shared", "{}"))
        names = {str(name): str(kept) for name, kept in shared.items() if kept in tensors}
    except (SafetensorError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a safetensors file ({error}); copy or download it again") from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            raise CheckpointError(f"{path}: {name} holds NaN or infinity, the model is of no use; train it again")
    return tensors, names


def _rebuild(spec: Mapping[str, object], where: str, tensors: Mapping[str, Tensor] | None = None) -> Any:
    """``build(spec)`` on the CPU, with the classes it names imported and the random number generator left alone.

    With tensors, it stops as soon as the card asks for much more than these could fill.
    """
    import torch

    kinds = {value for key, value in _leaves(spec) if key == "kind"}
    for module in MODEL_MODULES:
        if kinds <= set(registered_kinds()):
            break
        importlib.import_module(module)
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=[]))
            stack.enter_context(torch.device("cpu"))
            if tensors is not None:
                stack.enter_context(_limited(spec, tensors))
            return build(spec)
    except (ValueError, TypeError, LookupError, RuntimeError, ArithmeticError, AttributeError, MemoryError) as error:
        raise CheckpointError(f"{where}: {first_line(error)}") from error  # constructors of any kind


@contextmanager
def _limited(spec: Mapping[str, object], tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Refuse a card that asks for a model far larger than its weights, before memory and time are gone."""
    import torch
    from torch.overrides import TorchFunctionMode

    n_numbers = max(1 << 20, 4 * sum(tensor.numel() for tensor in tensors.values()))
    n_calls = 2_000 + 200 * len(tensors)
    message = f"the card asks for a much larger model than its {len(tensors)} tensors can fill; restore the card"
    if any(isinstance(value, int) and abs(value) > n_numbers for _, value in _leaves(spec)):
        raise ValueError(message)

    class Limit(TorchFunctionMode):
        calls = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            self.calls += 1
            if self.calls > n_calls or (isinstance(result, torch.Tensor) and result.numel() > n_numbers):
                raise ValueError(message)
            return result

    with Limit():
        yield


def _leaves(value: object, key: str = "") -> Iterator[tuple[str, object]]:
    """Everything in a spec that is no mapping or list, each with the key that leads to it."""
    if isinstance(value, Mapping | list):
        for name, item in value.items() if isinstance(value, Mapping) else ((key, item) for item in value):
            yield from _leaves(item, name)
    else:
        yield key, value


def _fill(model: nn.Module, tensors: Mapping[str, Tensor], shared: Mapping[str, str], where: str) -> None:
    """Put tensors into a model that was just built, in its memory layout; names that shared one share it again."""
    import torch

    known = dict(tensors) | {name: tensors[kept] for name, kept in shared.items()}
    problems = _misfits(model.state_dict(), known)
    problems += [
        f"{name} must be shared with {kept}, but is stored on its own"
        for name, kept in distinct_tensors(model)[1].items()
        if shared.get(name, name) != shared.get(kept, kept)
    ]
    if problems:
        raise CheckpointError(f"the card in {where} does not fit its weights: {few(problems)}; save the model again")
    filled: dict[str, Tensor] = {}
    for name, own in model.state_dict(keep_vars=True).items():
        stored = tensors[shared.get(name, name)]
        dtype = torch.float32 if stored.dtype in (torch.float16, torch.bfloat16) else stored.dtype
        values = torch.empty_like(own, dtype=dtype, requires_grad=False).copy_(stored)  # float64 comes back as float64
        is_parameter = isinstance(own, torch.nn.Parameter)
        filled[name] = torch.nn.Parameter(values, requires_grad=own.requires_grad) if is_parameter else values
    model.load_state_dict(filled | {name: filled[kept] for name, kept in shared.items()}, assign=True)


def _misfits(expected: Mapping[str, Tensor], known: Mapping[str, Tensor]) -> list[str]:
    """What differs in names, shapes and kinds of numbers; floats of any usual precision count as one kind."""

    def kind(tensor: Tensor) -> str:
        name = str(tensor.dtype).removeprefix("torch.")
        return "float" if name in ("float16", "bfloat16", "float32", "float64") else name

    problems = [f"{name} is missing" for name in expected if name not in known]
    problems += [f"{name} is unexpected" for name in known if name not in expected]
    for name, wanted in expected.items():
        there = known.get(name, wanted)
        if there.shape != wanted.shape:
            problems.append(f"{name} has shape {tuple(there.shape)} instead of {tuple(wanted.shape)}")
        if kind(there) != kind(wanted):
            problems.append(f"{name} has type {kind(there)} instead of {kind(wanted)}")
    return problems


# To disk -------------------------------------------------------------------------------------------------------------


def save_model(
    model: nn.Module,
    folder: str | os.PathLike[str],
    card: Card | Mapping[str, object] | None = None,
    *,
    half: bool | str = False,
) -> Card:
    """Write a model to a folder, replacing a model that is there only once the new one is complete.

    Before anything is written the model is rebuilt once from its constructor arguments, so that what is saved can be loaded.

    Arguments:
        model: a flowprox model (anything that derives from ``Specified``); compiled and data-parallel wrappers are taken off.
        folder: where to; created if needed. Its name is the model's name unless the card has one.
        card: what to record besides what the model tells; a ``Card`` or a dictionary with its fields. Not changed.
        half: store large tensors rounded to half precision: "float16" (True means the same) or "bfloat16" (wider range).

    Returns:
        the complete card, as written.

    Raises:
        TypeError: ``model`` or a value in the card cannot be written down.
        CheckpointError: the model cannot be rebuilt from its constructor arguments.
        ValueError: a weight is not finite, or too large for float16.
        OSError: the folder cannot be written; a model that was there is still whole.

    Example:
        >>> import tempfile, torch, flowprox
        >>> flow = flowprox.Glow((3, 8, 8), n_levels=2, n_steps=1, hidden_channels=8).eval()
        >>> folder = tempfile.mkdtemp()
        >>> _ = save_model(flow, folder, {"name": "tiny", "training": {"seed": 0}})
        >>> x = torch.rand(2, 3, 8, 8)
        >>> torch.equal(flowprox.load_model(folder).log_prob(x), flow.log_prob(x))
        True
    """
    import safetensors.torch
    import torch

    if os.fspath(folder).startswith(HUB):
        raise ValueError(f"folder {os.fspath(folder)!r} is a name of the hub; save to a folder, then push_to_hub it")
    folder = Path(folder)
    model, spec = _unwrapped(model)
    half = "float16" if half is True else half
    if half not in (False, "float16", "bfloat16"):
        raise ValueError(f"half must be False, True, 'float16' or 'bfloat16', got {half!r}")
    rebuilt = _rebuild(spec, f"cannot save this {spec['kind']}")  # fails before writing
    tensors, shared = distinct_tensors(model)
    problems = _misfits(rebuilt.state_dict(), model.state_dict())
    tied = distinct_tensors(rebuilt)[1].items()
    problems += [f"{name} is no longer shared with {kept}" for name, kept in tied if shared.get(name) != kept]
    if problems:
        differs = f"built again from its constructor arguments it differs ({few(problems)})"
        raise CheckpointError(f"cannot save this {spec['kind']}: {differs}; construct it with the parts it is to have")

    values = vars(card) if isinstance(card, Card) else dict(card or {})
    problem = {"problem": plain(values.get("problem"), "problem")}
    card = Card.from_dict({"name": folder.absolute().name} | values | problem)
    card.format_version = FORMAT_VERSION
    card.model = spec
    card.preprocessing = _preprocessing(model) | dict(card.preprocessing)
    card.training = _provenance(model) | dict(card.training)
    card.n_parameters = sum(p.numel() for p in model.parameters())
    card.weights_dtype = half or str(next(model.parameters(), torch.empty(0)).dtype).removeprefix("torch.")
    data = safetensors.torch.save(
        {name: _stored(name, tensor, half) for name, tensor in tensors.items()},
        metadata={"shared": json.dumps(shared)},  # one key only: safetensors writes several in random order
    )
    card.n_bytes = len(data)
    card.sha256 = hashlib.sha256(data).hexdigest()
    text = card.to_json()
    _write(folder, text, data)
    return Card.from_dict(json.loads(text))


def _unwrapped(model: nn.Module) -> tuple[nn.Module, Values]:
    """The model inside its wrappers, and its constructor call."""
    while not isinstance(model, Specified):
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)  # torch.compile; data parallel
        if inner is None:
            needed = "its class must derive from flowprox.naming.Specified first: class Mine(Specified, nn.Module)"
            raise TypeError(f"cannot save a {type(model).__name__} without its constructor arguments: {needed}")
        model = inner
    return model, model.spec()  # type: ignore[return-value]


def distinct_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
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


def _stored(name: str, tensor: Tensor, half: bool | str) -> Tensor:
    import torch

    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name} holds NaN or infinity: the model is of no use and is not saved; save an earlier one")
    tensor = tensor.cpu().clone(memory_format=torch.contiguous_format)  # a copy of its own: views may overlap
    if not half or not tensor.is_floating_point() or tensor.numel() < _SMALL:
        return tensor
    rounded = tensor.to(getattr(torch, str(half)))
    if not bool(torch.isfinite(rounded).all()):
        raise ValueError(f"{name} holds values too large for {half}; pass half='bfloat16' or half=False")
    return rounded


def _write(folder: Path, card: str, weights: bytes) -> None:
    """Put a card and its weights in the place of those that are there."""
    folder.mkdir(parents=True, exist_ok=True)
    previous, place = folder / PREVIOUS, folder / CARD
    if previous.exists():  # after a killed save: its card's weights get their name back, what is left over goes
        # searched, not parsed: a damaged card must not keep a new model from being saved
        if place.exists() and sha256(previous).encode() in place.read_bytes():
            os.replace(previous, folder / WEIGHTS)
        else:
            previous.unlink()
    with atomic_write(place, "w") as card_file:
        card_file.write(card)
        force_to_disk(card_file)
        with atomic_write(folder / WEIGHTS, "wb") as weights_file:
            weights_file.write(weights)
            force_to_disk(weights_file)
            # Both files are on disk, only renames are left. Between them the old card finds its weights under PREVIOUS.
            if (folder / WEIGHTS).exists():
                os.replace(folder / WEIGHTS, previous)
    previous.unlink(missing_ok=True)


def _preprocessing(model: Any) -> Values:
    """Pixel range, channels, image shape and divisor, from the model or from its first flow."""
    flows = model.flows() if callable(getattr(model, "flows", None)) else []
    owner = model if hasattr(model, "image_shape") else next(iter(flows), model)
    shape = getattr(owner, "image_shape", None)
    return {
        "range": getattr(model, "value_range", [0, 1]),
        "channels": None if shape is None else int(shape[0]),
        "image_shape": None if shape is None else [int(n) for n in shape],
        "divisor": getattr(model, "divisor", getattr(owner, "divisor", None)),
    }


def _provenance(model: nn.Module) -> Values:
    import torch

    versions = {"flowprox": __version__, "torch": str(torch.__version__), "python": platform.python_version()}
    if "deepinv" in sys.modules:  # a flow alone does not depend on it
        versions["deepinv"] = version("deepinv")
    device = next(model.parameters(), torch.empty(0)).device
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {os.cpu_count()} cores"
    return {
        "machine": f"{platform.system()} {platform.machine()}, {machine}",
        "versions": versions,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


# Models that load and save themselves ---------------------------------------------------------------------------------


class Pretrained:
    """Mixin of models with the methods that users of the Hugging Face hub expect."""

    card: Card

    @classmethod
    def from_pretrained(
        cls: type[_Model],
        name: str | os.PathLike[str],
        device: str | torch.device = "cpu",
        dtype: torch.dtype | str | None = None,
        *,
        revision: str | None = None,
    ) -> _Model:
        """``load_model``, with a CheckpointError also for a model of another class; "hf:ORG/NAME" is one of the hub."""
        model = load_model(name, device, dtype, revision=revision)
        if not isinstance(model, cls):
            kinds = f"a {type(model).__name__}, not a {cls.__name__}"
            raise CheckpointError(f"{os.fspath(name)!r} is {kinds}; see load_model")
        return model

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        card: Card | Mapping[str, object] | None = None,
        *,
        half: bool | str = False,
    ) -> Card:
        """``save_model`` with the model's own card, if it has one and no other is given."""
        return save_model(self, folder, card or self.__dict__.get("card"), half=half)  # type: ignore[arg-type]

    def push_to_hub(self, repo_id: str, private: bool = True, **options: Any) -> str:
        """Upload the model as it is; arguments, answer and errors as in ``flowprox.checkpoints.push_to_hub``."""
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder, repo_id.rpartition("/")[2])
            self.save_pretrained(place)
            return push_to_hub(place, repo_id, private, **options)


_Model = TypeVar("_Model", bound=Pretrained)


# A trainer's state ----------------------------------------------------------------------------------------------------

_READ_ERRORS = (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError)


def save_training_state(path: str | os.PathLike[str], state: Mapping[str, object]) -> None:
    """Write a trainer's state to one file, whole or not at all.

    Arguments:
        path: file to write; its folder must exist.
        state: nested dictionaries, lists and tuples of tensors, numbers, text, bytes and None.

    Raises:
        TypeError: a value could not be read back without unpickling objects; the message names the place.
        OSError: the file cannot be written; one that was there is still whole.
    """
    import torch

    _check_state(state, "state")
    content = io.BytesIO()  # torch's zip writer turns a full disk into a RuntimeError
    torch.save(dict(state), content)
    with atomic_write(path, "wb") as file:
        file.write(content.getbuffer())


def _check_state(value: Any, where: str) -> None:
    import torch

    plain = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
    if isinstance(value, torch.Tensor) or value is None or type(value) in plain:
        return
    if type(value) in (dict, OrderedDict) or (where == "state" and isinstance(value, Mapping)):
        for key, item in value.items():
            _check_state(key, f"a key of {where}")
            _check_state(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple, set):
        for i, item in enumerate(value):
            _check_state(item, f"{where}[{i}]")
    else:
        kind, remedy = f"{type(value).__module__}.{type(value).__qualname__}", "store tensors or text"
        raise TypeError(f"{where} is a {kind}, which cannot be read back without unpickling objects; {remedy}")


def load_training_state(path: str | os.PathLike[str]) -> Values:
    """Read what ``save_training_state`` wrote, tensors on the CPU. Objects are never unpickled. FileNotFoundError without one,
    CheckpointError where it is damaged, or holds more than tensors and plain values."""
    import pickle
    import zipfile

    import torch

    if not Path(path).is_file():
        raise FileNotFoundError(f"no training state {os.fspath(path)}; check the path, or start without resuming")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):  # may expand without end
                raise zipfile.BadZipFile("it is compressed")
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"{damaged} is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (*_READ_ERRORS, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        reason = f"is not a whole training state ({first_line(error)})"
        raise CheckpointError(f"{os.fspath(path)} {reason}; resume from an earlier one") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{os.fspath(path)} holds a {type(state).__name__}, not a training state")
    return state
