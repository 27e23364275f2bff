"""What a run resumes from: how far it has come, what it is, and whether a state fits, before anything of it is loaded."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from torch import Tensor

from flowprox.checkpoints import load_training_state
from flowprox.naming import Values
from flowprox.options import require

_FIXED = ("seed", "batch_size", "optimizer", "n_validation_images")  # the training options that may not change
_PATHS = ("train", "validation", "skip_corrupt", "terms")  # the images themselves are compared
_REMEDY = "resume it with its own recipe.yaml and version of flowprox, or start another run: choose another out"


@dataclass
class Counts:
    """How far a run has come."""

    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    rollbacks: int = 0
    stale: int = 0  # validations since the best one
    typical_norm: float = 0.0  # running average of the gradient's norm
    elapsed: float = 0.0  # seconds
    losses: list[float] = field(default_factory=lambda: [0.0, 0.0])  # sum and number since the last row of the log
    figures: dict[str, float] = field(default_factory=dict)  # of the last validation
    best: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of_state(cls, values: Values, where: Path) -> Counts:
        """Counts as a state holds them; ValueError where a value cannot be one."""
        counts = cls(**{one.name: values[one.name] for one in fields(cls) if one.name in values})
        for name, default in asdict(cls()).items():
            value = getattr(counts, name)
            require(_is_like(value, default), f"{where} is damaged, its {name} is {value!r}; start another run")
        return counts


def _is_like(value: object, default: object) -> bool:
    if isinstance(default, dict):
        return isinstance(value, dict) and all(type(number) in (int, float) for number in value.values())
    if isinstance(default, list):
        return isinstance(value, list) and [type(number) for number in value] == [float] * len(default)
    sound = isinstance(value, int) or (isinstance(value, float) and isinstance(default, float))
    return sound and not isinstance(value, bool) and 0 <= value < math.inf  # type: ignore[operator]


def run_identity(recipe: Values, fingerprint: Mapping[str, str]) -> Values:
    """What a run is: all of its recipe (name of every part -> its options) but limits, rates, logging and devices, and a
    fingerprint of the images."""
    parts = {name: part for name, part in recipe.items() if name not in ("out", "name")}
    identity: Values = {"recipe": sorted(parts), **fingerprint}
    for name, part in parts.items():
        if not isinstance(part, dict) or "kind" in part:  # a specification is one value
            identity[name] = part
            continue
        for key, value in part.items():
            if key in _FIXED if name == "training" else name != "data" or key not in _PATHS:
                identity[f"{name}.{key}"] = value
    return json.loads(json.dumps(identity, default=str))


def read_state(path: Path, identity: Values) -> Values | None:
    """The state that a run of this identity left, if there is one; a ValueError tells in what the run that left it differs, or
    that it is damaged."""
    if not path.exists():
        return None
    state = load_training_state(path)
    for name in ("identity", "counters", "model", "optimizer", "kept"):
        require(isinstance(state.get(name), dict), f"{path} is no state of a training run: it lacks {name}; {_REMEDY}")
    earlier = state["identity"]  # keys that only one of them has are another version's
    differing = [key for key, value in identity.items() if earlier.get(key, value) != value]
    named = ", ".join(f"{key} {earlier[key]!r}, not {identity[key]!r}" for key in differing)
    require(not differing, f"the run in {path.parent} was made with {named}; {_REMEDY}")
    return state


def check_tensors(given: object, expected: Mapping[str, Tensor], where: str) -> None:
    """Raise ValueError unless ``given`` holds finite tensors of the names, shapes and types that are expected."""
    if not isinstance(given, dict):
        raise ValueError(f"{where} is damaged: {type(given).__name__} in place of tensors; {_REMEDY}")
    for name in {**expected, **given}:
        value, model = given.get(name), expected.get(name)
        if model is None or not isinstance(value, Tensor):
            problem = f"{name} is {'missing' if name in expected else 'unexpected'}"
        elif _form(value) != _form(model):
            problem = f"{name} is {_form(value)} in place of {_form(model)}"
        elif value.is_meta or (value.is_floating_point() and not bool(value.isfinite().all())):
            problem = f"{name} is not finite"
        else:
            continue
        raise ValueError(f"{where} does not fit this run, it is another model's or damaged ({problem}); {_REMEDY}")


def _form(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype} {tensor.layout}".replace("torch.", "").removesuffix(" strided")


def check_optimizer(given: Values, optimizer: torch.optim.Optimizer, where: str) -> Values:
    """The state that an optimizer can load: moments of the right shapes and counters of steps, its own rates and decays.
    ValueError where parameters are grouped otherwise or a moment is of another form: it would be written beyond its memory."""
    own, found = optimizer.state_dict()["param_groups"], given.get("param_groups")
    groups: list[Values] = found if isinstance(found, list) else [{}]
    lists = [group.get("params") if isinstance(group, dict) else None for group in groups]
    sound = all(isinstance(one, list) and all(type(index) is int for index in one) for one in lists)
    require(sound and isinstance(given.get("state"), dict), f"{where} is damaged; {_REMEDY}")
    indices, own_indices = ([group["params"] for group in part] for part in (groups, own))
    sizes, own_sizes = ([len(group) for group in part] for part in (indices, own_indices))
    has = f"{where} has groups of {sizes} parameters, this version with these options has {own_sizes}"
    require(indices == own_indices, f"{has}; {_REMEDY}")
    moments = {}
    for group, numbers in zip(optimizer.param_groups, own_indices, strict=True):
        for index, parameter in zip(numbers, group["params"], strict=True):
            if index in given["state"]:  # the moments' layout in memory is their parameter's
                like, entry = _moments(parameter, group), given["state"][index]
                check_tensors(entry, like, f"{where} of parameter {index}")
                moments[index] = {name: torch.empty_like(like[name], device="cpu").copy_(entry[name]) for name in like}
    steps = [{"step": group["step"]} if "step" in group else {} for group in groups]
    require(all(type(step.get("step", 0)) is int for step in steps), f"{where} has no number of steps; {_REMEDY}")
    return {"state": moments, "param_groups": [{**g, **step} for g, step in zip(own, steps, strict=True)]}


def _moments(parameter: Tensor, group: Values) -> dict[str, Tensor]:
    """Tensors of the names and shapes that the optimizers of ``make_optimizer`` keep for a parameter."""
    if group.get("use_muon"):
        return {"momentum_buffer": parameter}
    moments = {"exp_avg": parameter, "exp_avg_sq": parameter}
    return moments if "use_muon" in group else {"step": torch.zeros(()), **moments}
