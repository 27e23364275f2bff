"""Make a method by name: load what it needs, gather its options."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from deepinv.models import Reconstructor

from flowprox.checkpoints import load_model
from flowprox.flows import Flow
from flowprox.methods.kinds import METHODS, default_options, method_kind
from flowprox.methods.options import (
    GIVEN_APART,
    check_options,
    method_class,
    model_argument,
    option_classes,
    parameters_of,
)
from flowprox.noise import NOISES, FlowNoise, make_noise
from flowprox.operators import Problem

__all__ = ["make_method"]


def make_method(
    name: str,
    problem: Problem | str | None = None,
    flow: Flow | str | None = None,
    model: Any = None,
    noise: Any = None,
    shape: Sequence[int] | None = None,
    device: str | torch.device = "cpu",
    **options: Any,
) -> Reconstructor:
    """Make a reconstruction method by name.

    Arguments:
        name: a key of ``METHODS``.
        problem: what it will be used for; some methods have other defaults for other problems.
        flow: the prior: a flow, or the name, folder or hub id of one; for "noise-map" with beta 0 also a generator.
        model: the trained network ("unfolded"), generator ("gan") or denoiser ("plug-and-play"), or where it is.
        noise: density of the noise: a ``flowprox.noise.Noise``; a flow trained on noise, or where it is; a name of
            ``flowprox.noise.NOISES``, or {"name": ..., parameters}, made for ``shape``. None takes the physics' own.
        shape: of one measurement, (C, H, W) or (m,), for a noise by name.
        device: where models that are loaded here are put.
        options: of the method, see ``default_options``; also the fields of an option object among its arguments.

    Raises:
        ValueError: unknown name or option (the message offers the nearest), something needed is missing, given but of
            no use, or of another kind; the method is not for this problem.
        ImportError: an optional package is missing; the message names it.

    Example:
        >>> make_method("tv", problem="denoising").regularization
        0.24
    """
    kind = method_kind(name)
    _check_needs(name, {"flow": flow, "model": model}, noise is not None)
    problem_name = problem.name if isinstance(problem, Problem) else problem
    if problem_name is not None and not kind.applies_to(problem_name):
        raise ValueError(f"method {name} is not for {problem_name}; it is for {', '.join(kind.applicable)}")
    if not kind.target:
        if options:
            raise ValueError(f"method {name} has no options, got {', '.join(options)}; it is as it was trained")
        return _as_reconstructor(model, device)
    merged = default_options(name, problem_name) | options
    check_options(name, merged)
    parts: dict[str, Any] = {}
    if flow is not None:
        parts["flow"] = _as_flow(flow, device, kind.takes_decoder)
    if model is not None:
        parts[model_argument(name)] = load_model(model, device=device) if isinstance(model, str) else model
    if noise is not None:
        parts["noise"] = _as_noise(noise, shape, device)
    cls = method_class(name)
    return _constructed(cls, parts, merged).to(device)


def _check_needs(name: str, given: Mapping[str, Any], has_noise: bool) -> None:
    kind = METHODS[name]
    missing = kind.missing(given)
    if missing is not None:
        raise ValueError(f"method {name} needs {missing}: give the name, folder or hub id of a trained one")
    for key, value in given.items():
        if value is not None and not any(key in need.split(" or ") for need in kind.needs):
            raise ValueError(f"method {name} has no use for {key}; leave it out")
    if has_noise and not kind.takes_noise:
        takers = [other for other, line in METHODS.items() if line.takes_noise]
        raise ValueError(f"method {name} has no use for noise, which is for {' and '.join(takers)}; leave it out")


def _constructed(cls: Any, parts: Mapping[str, Any], options: Mapping[str, Any]) -> Reconstructor:
    """The method, with options gathered into the option objects of its class."""
    parameters = parameters_of(cls)
    arguments = {key: value for key, value in options.items() if key in parameters}
    left = {key: value for key, value in options.items() if key not in parameters}
    for argument in set(parameters) - GIVEN_APART:
        choices = option_classes(cls, argument)
        word = arguments.get(argument)
        if argument == "optimizer" and word is not None and word not in choices:
            raise ValueError(f"{argument} must be {' or '.join(choices)}, got {word!r}")
        if not choices or not (word is None or word in choices):
            continue  # a number, for example
        start = choices[word]() if word is not None else None
        if start is None and argument == "optimizer":
            start = cls(**parts, **{k: v for k, v in arguments.items() if k in parameters}).optimizer
        elif start is None:
            start = next(iter(choices.values()))()
        given = {f.name: left.pop(f.name) for f in dataclasses.fields(start) if f.name in left}
        if given or word is not None:
            arguments[argument] = dataclasses.replace(start, **given)
    if left:
        raise ValueError(f"{', '.join(left)} is of no use with the other options chosen; leave it out")
    return cls(**parts, **arguments)


def _as_flow(flow: Any, device: str | torch.device, takes_decoder: bool) -> Any:
    loaded = load_model(flow, device=device) if isinstance(flow, str) else flow
    is_decoder = takes_decoder and isinstance(getattr(loaded, "latent_size", None), int)
    if not (isinstance(loaded, Flow) or is_decoder):
        raise ValueError(f"flow {str(flow)!r} is a {type(loaded).__name__}, not a flow; see flowprox models")
    return loaded


def _as_noise(noise: Any, shape: Sequence[int] | None, device: str | torch.device) -> Any:
    given = {"name": noise} if isinstance(noise, str) and noise in NOISES else noise
    if isinstance(given, Mapping):
        if shape is None or "name" not in given:
            raise ValueError(f"noise {given!r} by name needs a name, one of {', '.join(NOISES)}, and shape")
        parameters = {key: value for key, value in given.items() if key != "name"}
        return make_noise(given["name"], shape, **parameters).to(device)
    loaded = load_model(given, device=device) if isinstance(given, str) else given
    return FlowNoise(loaded) if isinstance(loaded, Flow) else loaded


def _as_reconstructor(model: Any, device: str | torch.device) -> Reconstructor:
    loaded = load_model(model, device=device) if isinstance(model, str) else model
    if not isinstance(loaded, Reconstructor):
        raise ValueError(
            f"model {str(model)!r} is a {type(loaded).__name__}, which does not reconstruct by itself; "
            "give an unfolded network (flowprox train-unfolded makes one of it), or a flow with a method that uses it"
        )
    return loaded
