"""A problem by name and parameters, and its operator."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepinv.physics import LinearPhysics
from torch import Tensor

from flowprox.operators.kinds import PROBLEMS, ImageShape, nearest
from flowprox.operators.noise import SeededGaussianNoise

__all__ = ["Problem", "make_physics"]


@dataclass(frozen=True)
class Problem:
    """A named inverse problem and its parameters, complete and JSON-able.

    Arguments:
        name: a key of ``PROBLEMS``.
        parameters: those that differ from the defaults; the defaults are filled in.

    Raises:
        ValueError: unknown name or parameter; the message offers the nearest ones.

    Example:
        >>> problem = Problem("inpainting", {"mask_size": 16})
        >>> problem.label
        'inpainting-mask_size16'
        >>> Problem.from_json(problem.to_json()) == problem
        True
    """

    name: str
    parameters: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in PROBLEMS:
            raise ValueError(f"unknown problem {self.name!r}; {nearest(str(self.name), PROBLEMS)}")
        defaults = PROBLEMS[self.name].defaults
        for key in self.parameters:
            if key not in defaults:
                raise ValueError(f"{self.name} has no parameter {key!r}; {nearest(str(key), defaults)}")
        complete = {key: _canonical(self.parameters.get(key, default)) for key, default in defaults.items()}
        object.__setattr__(self, "parameters", complete)

    @property
    def label(self) -> str:
        """Short name for tables and files: the first parameter, and every other one that is not at its default."""
        defaults = PROBLEMS[self.name].defaults
        given = next((key for key in ("mask", "kernel") if self.parameters.get(key) is not None), None)
        first = given or next(iter(defaults))
        shown = [
            key
            for key, value in self.parameters.items()
            if key == first or (isinstance(value, np.ndarray) or value != defaults[key])
        ]
        return "-".join([self.name, *(key + _label_value(self.parameters[key]) for key in shown)])

    def to_json(self) -> str:
        """One line of JSON.

        Raises:
            ValueError: a parameter is an array; save it as .npy and give the path.
        """
        try:
            return json.dumps({"name": self.name, "parameters": self.parameters}, sort_keys=True)
        except TypeError as error:
            raise ValueError(
                f"a parameter of {self.name} cannot be written as JSON ({error}); "
                "save the array as .npy and give its path"
            ) from error

    @classmethod
    def from_json(cls, text: str) -> Problem:
        """Read what ``to_json`` wrote.

        Raises:
            ValueError: the text is not a problem in JSON.
        """
        content = json.loads(text)
        if not isinstance(content, dict) or set(content) - {"name", "parameters"} or "name" not in content:
            raise ValueError(
                f'a problem in JSON has the form {{"name": ..., "parameters": {{...}}}}, got {text[:80]!r}'
            )
        return cls(content["name"], content.get("parameters", {}))


def make_physics(
    problem: Problem | str,
    image_shape: ImageShape = (3, 64, 64),
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    **parameters: Any,
) -> LinearPhysics:
    """Build the forward operator of a problem, with its noise model.

    Arguments:
        problem: a name from ``PROBLEMS`` or a ``Problem``.
        image_shape: (C, H, W) of the images. Masks are made for this H and W.
        seed: of whatever in the operator is random (the random inpainting mask).
        device: where the operator's tensors are kept.
        parameters: of the problem, see ``PROBLEMS[name].defaults``; they override those of a ``Problem``. ``mask``
            (H, W; 1 kept, 0 hidden) and ``kernel`` (h, w; odd sides) may be an array or the path of an .npy file.

    Raises:
        ValueError: unknown problem or parameter, or a value that does not fit; the message names the parameter.
        FileNotFoundError: the .npy file does not exist.

    Example:
        >>> physics = make_physics("inpainting", (3, 16, 16), mask_size=4)
        >>> physics.A(torch.ones(1, 3, 16, 16)).mean().item()
        0.9375
    """
    if isinstance(problem, str):
        problem = Problem(problem, parameters)
    elif parameters:
        problem = Problem(problem.name, {**problem.parameters, **parameters})
    shape = tuple(image_shape)
    if len(shape) != 3 or any(not isinstance(n, int) or n < 1 for n in shape):
        raise ValueError(f"image_shape must be three positive numbers (C, H, W), got {image_shape!r}")
    values = dict(problem.parameters)
    noise = SeededGaussianNoise(values.pop("sigma"))
    return PROBLEMS[problem.name].constructor(shape, noise, seed=seed, device=device, **values)


def _canonical(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Tensor):
        return value.numpy(force=True)
    return tuple(value) if isinstance(value, list) else value


def _label_value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, np.ndarray):
        return "-given"
    if isinstance(value, tuple):
        return "x".join(str(part) for part in value)
    if isinstance(value, str):
        return f"-{Path(value).stem}"
    return str(value)
