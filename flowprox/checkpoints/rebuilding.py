"""A model from its constructor call and its tensors."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flowprox.checkpoints.card import CheckpointError
from flowprox.checkpoints.weights import distinct_tensors
from flowprox.naming import build, registered_kinds

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["check_rebuild", "fill", "rebuild"]

_MODEL_MODULES = (  # lowest first: a flow is loaded without importing deepinv
    "flowprox.networks",
    "flowprox.flows",
    "flowprox.noise",
    "flowprox.prox",
    "flowprox.operators",
    "flowprox.unfolded",
    "flowprox.baselines",
)


def rebuild(spec: Mapping[str, Any], where: str) -> Any:
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


def check_rebuild(model: nn.Module, spec: Mapping[str, Any]) -> None:
    """Fail before writing if ``build(spec)`` gives other tensors than the model has."""
    kind = spec["kind"]
    rebuilt = rebuild(spec, f"cannot save this {kind}")
    problems = _misfits(_shapes(rebuilt), _shapes(model))
    tied, wanted = distinct_tensors(rebuilt)[1], distinct_tensors(model)[1]
    problems += [f"{name} is no longer shared with {kept}" for name, kept in tied.items() if wanted.get(name) != kept]
    if problems:
        raise CheckpointError(
            f"cannot save this {kind}: built again from its constructor arguments it differs ({_few(problems)}); "
            "construct the model with the parts it is to have instead of exchanging them later"
        )


def fill(model: nn.Module, tensors: Mapping[str, Tensor], shared: Mapping[str, str], half: bool, where: str) -> None:
    """Copy tensors into a model that was just built, and share what was shared."""
    import torch

    given = dict(tensors) | {name: tensors[kept] for name, kept in shared.items()}
    problems = _misfits(_shapes(model), {name: tuple(tensor.shape) for name, tensor in given.items()})
    built_shared = distinct_tensors(model)[1]
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
