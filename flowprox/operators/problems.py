"""A problem by name and parameters, and its operator, one for all images or one that varies."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepinv.physics import LinearPhysics, NoiseModel, Physics
from torch import Tensor

from flowprox.naming import Values, nearest, require_device, require_level, require_positive
from flowprox.noise import NOISES, GaussianNoise, Noise, make_noise
from flowprox.noise.base import at_least_zero, finite_number
from flowprox.operators.imaging import PhotonNoise
from flowprox.operators.kinds import PROBLEMS, ImageShape
from flowprox.operators.measurements import measurement_shape

_NOISE = ("sigma", "noise_norm", "noise", "noise_parameters")
_PHOTONS = ("photons", "attenuation")
_OF_ONES_OWN = {
    "mask": ("mask_size", "keep", "acceleration", "center_fraction", "pattern"),
    "kernel": ("sigma_blur", "kernel_size"),
    "coil_maps": ("n_coils",),
    "photons": ("sigma", "noise", "noise_parameters"),
}
"""An operator's part of one's own, and the parameters of the one whose place it takes."""


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
        >>> Problem(**json.loads(problem.to_json())) == problem
        True
    """

    name: str
    parameters: Values = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or self.name not in PROBLEMS:
            raise ValueError(f"unknown problem {self.name!r}; {nearest(str(self.name), PROBLEMS)}")
        defaults = PROBLEMS[self.name].defaults
        for key in self.parameters:
            if key not in defaults:
                raise ValueError(f"{self.name} has no parameter {key!r}; {nearest(str(key), defaults)}")
        object.__setattr__(self, "parameters", _complete(self.name, self.parameters, defaults))

    def replaced(self, **parameters: object) -> Problem:
        """The same problem with other parameters; a new noise takes the place of the one it had."""
        replaced = _displaced(parameters)
        others = {key: value for key, value in self.parameters.items() if key not in replaced}
        return Problem(self.name, {**others, **parameters})

    @property
    def operator_parameters(self) -> Values:
        """The parameters but for those of the noise."""
        return {key: value for key, value in self.parameters.items() if key not in (*_NOISE, *_PHOTONS)}

    @property
    def label(self) -> str:
        """Short name for tables and files: the first parameter, and every other one that is not at its default."""
        defaults, given = PROBLEMS[self.name].defaults, self.parameters
        first = next((key for key in ("mask", "kernel") if given.get(key) is not None), next(iter(defaults)))
        gone = _displaced(given)
        shown = {key: value for key, value in given.items() if value is not None or key not in gone}
        parts = [
            _label_part(key, value)
            for key, value in shown.items()
            if isinstance(value, np.ndarray) or value != defaults[key] or (key == first and value is not None)
        ]
        return "-".join([self.name, *parts])

    def to_json(self) -> str:
        """One line of JSON, ``name`` and ``parameters``; ValueError where one of these is an array or a noise object."""
        try:
            return json.dumps({"name": self.name, "parameters": self.parameters}, sort_keys=True)
        except TypeError as error:
            remedy = "save the array as .npy and give its path, name a noise instead of passing an object"
            raise ValueError(f"a parameter of {self.name} cannot be written as JSON ({error}): {remedy}") from error


def make_physics(
    problem: Problem | str,
    image_shape: ImageShape = (3, 64, 64),
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    **parameters: object,
) -> LinearPhysics:
    """Build the forward operator of a problem, with its noise model.

    Arguments:
        problem: a name from ``PROBLEMS`` or a ``Problem``.
        image_shape: (C, H, W) of the images. Masks and sensing matrices are made for this size.
        seed: of whatever in the operator is random (masks, sensing matrices).
        device: where the operator's tensors are kept.
        parameters: of the problem, see ``PROBLEMS[name].parameters``; they override those of a ``Problem``. The noise is white
            and Gaussian with standard deviation ``sigma`` in every measurement (for compressed sensing ``noise_norm`` /
            sqrt(m)), or ``noise``: a name from ``flowprox.noise.NOISES`` with its ``noise_parameters``, or a
            ``flowprox.noise.Noise``. A noise replaces the level that is default.

    Raises:
        ValueError: unknown problem, noise or parameter, or a value that does not fit; the message names it.
        MemoryError: a dense sensing matrix that does not fit in memory.
        FileNotFoundError: the .npy file does not exist.

    Example:
        >>> physics = make_physics("inpainting", (3, 16, 16), mask_size=4)
        >>> physics.A(torch.ones(1, 3, 16, 16)).mean().item()
        0.9375
    """
    if not isinstance(problem, Problem):
        problem = Problem(problem, parameters)
    elif parameters:
        problem = problem.replaced(**parameters)
    shape = _canonical(image_shape)
    if not isinstance(shape, tuple) or len(shape) != 3 or any(not isinstance(n, int) or n < 1 for n in shape):
        raise ValueError(f"image_shape must be three positive numbers (C, H, W), got {image_shape!r}")
    whole, device = _canonical(seed), require_device(device)
    if not isinstance(whole, int):
        raise ValueError(f"seed must be a whole number, got {seed!r}")
    physics = PROBLEMS[problem.name].constructor(shape, seed=whole, device=device, **problem.operator_parameters)
    physics.set_noise_model(noise_of(problem, physics, shape, device))
    return physics  # pyright: ignore[reportReturnType]  # one-bit sensing alone is not linear


def noise_of(
    problem: Problem, physics: Physics, image_shape: ImageShape, device: torch.device | str = "cpu"
) -> NoiseModel:
    """The noise of a problem, for what its operator measures."""
    sigma, noise_norm, noise, noise_parameters = (problem.parameters.get(key) for key in _NOISE)
    if problem.parameters.get("photons") is not None:
        photons, attenuation = (finite_number(key, problem.parameters[key]) for key in _PHOTONS)
        for key, value in zip(_PHOTONS, (photons, attenuation), strict=True):
            require_positive(key, value)
        return PhotonNoise(photons, attenuation * float(physics.get_buffer("operator_norm"))).to(device)
    if noise is None and noise_norm is None:
        return GaussianNoise(0.0 if sigma is None else sigma).to(device)
    measured = measurement_shape(physics, image_shape, device=device)
    if noise_norm is not None:
        return GaussianNoise(at_least_zero("noise_norm", noise_norm) / math.sqrt(measured.numel())).to(device)
    if isinstance(noise, str):
        level = {} if sigma is None else {"sigma": sigma}
        return make_noise(noise, measured, **{**level, **(noise_parameters or {})}).to(device)
    if isinstance(noise, Noise):  # one of another shape is refused here, not after the measurement
        noise.sample_like(torch.zeros(1, *measured), torch.Generator().manual_seed(0))
    assert isinstance(noise, NoiseModel)  # Problem has seen to it
    return noise.to(device)


class VariedProblem:
    """A problem whose parameters are drawn anew for every image: what one network for many measurements is trained on.

    Arguments:
        name: of a problem.
        image_shape: (C, H, W).
        ranges: parameter -> (low, high); each is drawn uniformly and independently for every image. ``sigma`` of any problem
            with white noise, and what its ``ProblemKind.ranges`` says.
        seed: of what is drawn once with the operator.
        parameters: the fixed ones, none of them in ``ranges``.

    Raises:
        ValueError: an unknown problem or parameter, a parameter that cannot vary or is given twice, or a range that is none.

    Example:
        >>> problem = VariedProblem("denoising", (3, 8, 8), {"sigma": (0.0, 0.2)})
        >>> problem.draw(5, torch.Generator().manual_seed(0)).noise_model.sigma.shape
        torch.Size([5])
    """

    def __init__(
        self,
        name: str,
        image_shape: ImageShape,
        ranges: Mapping[str, Sequence[float]],
        *,
        seed: int = 0,
        **parameters: object,
    ) -> None:
        channels, height, width = image_shape
        self.image_shape = (channels, height, width)
        self.problem, self.seed = Problem(name, parameters), seed
        self._kind, self._ranges = PROBLEMS[name], dict[str, tuple[float, float]]()
        known = ("sigma", *self._kind.ranges)
        for key, ends in ranges.items():
            if key not in known:
                raise ValueError(f"{key} cannot vary in {name}; what can: {', '.join(known)}")
            if key in parameters:
                raise ValueError(f"{key} is both in parameters and in ranges; give it once")
            if key != "sigma" and "mask" in parameters:
                raise ValueError(f"{key} in ranges draws a mask for every image: leave the mask out of the parameters")
            is_pair = isinstance(ends, Sequence) and not isinstance(ends, str) and len(ends) == 2
            if not is_pair or not 0 <= ends[0] <= ends[1]:
                raise ValueError(f"the range of {key} must be two numbers, 0 <= low <= high; got {ends!r}")
            if key == "sigma" and self._kind.measures_pictures:
                require_level(key, ends[1])
            self._ranges[key] = float(ends[0]), float(ends[1])
        if "noise" in parameters and "sigma" in ranges:
            raise ValueError("ranges of sigma are for white noise: leave out noise")
        self._level = self._ranges.pop("sigma", None)
        if self._ranges:  # a range that is none is refused now
            self._fixed = self._varied(1, torch.Generator().manual_seed(0))
            self._fixed.set_noise_model(noise_of(self.problem, self._fixed, self.image_shape))
        else:
            self._fixed = make_physics(self.problem, self.image_shape, seed=seed)

    def to(self, *args: Any, **kwargs: object) -> VariedProblem:
        """As ``torch.nn.Module.to``."""
        self._fixed.to(*args, **kwargs)
        return self

    def draw(self, n: int, generator: torch.Generator) -> LinearPhysics:
        """A physics for n images, on the generator's device, valid until the next is drawn: they share their fixed part."""
        physics = self._fixed
        if self._ranges:
            physics = self._varied(n, generator)
            physics.set_noise_model(self._fixed.noise_model)
        if self._level is not None:
            noise = GaussianNoise(0.0).to(generator.device)
            noise.update_parameters(sigma=_uniform(self._level, n, generator))
            physics.set_noise_model(noise)
        return physics

    def _varied(self, n: int, generator: torch.Generator) -> LinearPhysics:
        if self._kind.vary is not None:
            return self._kind.vary(self._ranges, self.image_shape, n, generator)
        values = {key: _uniform(ends, n, generator) for key, ends in self._ranges.items()}
        constructor, fixed = self._kind.constructor, self.problem.operator_parameters
        return constructor(self.image_shape, seed=self.seed, device=generator.device, **{**fixed, **values})  # pyright: ignore


def _uniform(ends: tuple[float, float], n: int, generator: torch.Generator) -> Tensor:
    return ends[0] + (ends[1] - ends[0]) * torch.rand(n, generator=generator, device=generator.device)


def _complete(name: str, parameters: Values, defaults: Values) -> Values:
    """Every parameter of the problem; a noise that is set in the place of the one of the defaults."""
    noise, set_ = parameters.get("noise"), {key for key in parameters if parameters[key] is not None}
    if "noise_norm" in set_ and set_ & {"sigma", "noise"}:
        raise ValueError(f"{name}: noise_norm is the level of white noise; give either noise_norm or sigma, or a noise")
    if "noise_parameters" in set_ and not isinstance(noise, str):
        raise ValueError(f"{name}: noise_parameters belong to a noise given by name, such as noise='sinusoidal'")
    if noise is not None and not isinstance(noise, str | NoiseModel):
        raise ValueError(f"noise must be a name ({', '.join(NOISES)}) or a flowprox.noise.Noise, got {noise!r}")
    if isinstance(noise, str) and noise not in NOISES:
        raise ValueError(f"unknown noise {noise!r}; {nearest(noise, NOISES)}")
    if isinstance(noise, NoiseModel) and "sigma" in set_:
        raise ValueError(f"{name}: a noise object has its own level; leave out sigma, or give the noise by name")
    for own in set_ & set(_OF_ONES_OWN):
        of_no_use = set_ & set(_OF_ONES_OWN[own])
        if stated := [key for key in of_no_use if parameters[key] != defaults[key]]:
            raise ValueError(f"{name}: {own} takes the place of what {stated[0]} describes; leave one of them out")
        set_ -= of_no_use
    complete: Values = {key: _canonical(parameters.get(key, default)) for key, default in defaults.items()}
    if isinstance(complete.get("filter"), str) and complete["filter"] == "none":  # as the command line gives it
        complete["filter"] = None
    if PROBLEMS[name].measures_pictures:
        for own in (complete, complete["noise_parameters"] or {}):
            require_level("sigma", own.get("sigma"))
    return complete | {key: None for key in _displaced(parameters) if key in defaults and key not in set_}


def _displaced(parameters: Values) -> set[str]:
    """The parameters whose former values, or defaults, what is given replaces."""
    levels = {
        "noise": ("sigma", "noise_norm", "noise_parameters"),
        "noise_norm": ("sigma", "noise", "noise_parameters"),
        "sigma": ("noise_norm", "photons"),
    }
    level = next((levels[name] for name in levels if parameters.get(name) is not None), ())
    return {*level, *(key for name, keys in _OF_ONES_OWN.items() if parameters.get(name) is not None for key in keys)}


def _canonical(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.generic | np.ndarray | Tensor) and value.ndim == 0:
        return value.item()  # numbers as numpy and torch give them
    if isinstance(value, Tensor):
        return value.numpy(force=True)
    if isinstance(value, Mapping):
        return {str(key): _canonical(part) for key, part in value.items()}
    return tuple(_canonical(part) for part in value) if isinstance(value, list | tuple) else value


def _label_part(key: str, value: object) -> str:
    if isinstance(value, bool):
        return key if value else f"no_{key}"
    if isinstance(value, dict):
        return "-".join(_label_part(name, part) for name, part in value.items())
    if isinstance(value, float):
        return f"{key}{value:g}"
    if isinstance(value, tuple):
        return key + "x".join(map(str, value))
    if isinstance(value, str):
        return f"{key}-{Path(value).stem}"
    if isinstance(value, np.ndarray | NoiseModel):
        return f"{key}-{'given' if isinstance(value, np.ndarray) else type(value).__name__}"
    return f"{key}{'none' if value is None else value}"
