"""Every reconstruction method by name.

    x_hat = make_method(name, ...)(y, physics)

Symbols: y measurement, physics the operator with its noise, x_hat the estimate. ``METHODS`` says for each name which
class it is, what it needs (a flow, a trained network, a noise) and to which problems it applies; the options are the
arguments of the class, and those of an option object among them.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from deepinv.models import Reconstructor
from deepinv.physics import LinearPhysics, Physics
from torch import Tensor

from flowprox.checkpoints import load_model
from flowprox.flows import Flow
from flowprox.operators import Problem

__all__ = [
    "METHODS",
    "Adjoint",
    "MethodKind",
    "Outcome",
    "check_options",
    "default_options",
    "make_method",
    "run_method",
]

_GIVEN_APART = frozenset({"self", "flow", "model", "noise", "generator", "device"})
_LINEAR = (
    "denoising",
    "inpainting",
    "random-inpainting",
    "deblurring",
    "super-resolution",
    "compressed-sensing",
    "mri",
    "ct",
)
_NO_OPTIONS: Mapping[str, Any] = {}
_OPTIMISERS = {"lbfgs": "LBFGS", "adam": "Adam"}


class MethodKind(NamedTuple):
    """One line of the registry.

    Arguments:
        target: "module:Class", imported when the method is made; "" for a trained network, which is the method itself.
        description: one line.
        needs: what must be given: "flow" (a trained flow), "model" (a trained network or generator), or one of several.
        takes_noise: whether a noise may be given in the place of the physics' own.
        takes_decoder: whether the flow may be a generator without a density.
        problems: names of the problems it applies to; None: all.
        defaults: options that differ from those of the class, by problem; those of "" hold for all.
        quick: the options that make it end within seconds, for trying a recipe out.
    """

    target: str
    description: str
    needs: tuple[str, ...] = ()
    takes_noise: bool = False
    takes_decoder: bool = False
    problems: tuple[str, ...] | None = None
    defaults: Mapping[str, Mapping[str, Any]] = _NO_OPTIONS
    quick: Mapping[str, Any] = _NO_OPTIONS

    def missing(self, given: Mapping[str, Any]) -> str | None:
        """What the method needs and is None in ``given``, which has the keys flow and model."""
        ways = [need.split(" or ") for need in self.needs]
        return next((" or ".join(way) for way in ways if all(given.get(key) is None for key in way)), None)

    def applies_to(self, problem: str) -> bool:
        """Whether the method can be used for a problem of this name."""
        return self.problems is None or problem in self.problems


# a line search cannot follow the straight-through gradient of a sign
_STRAIGHT_THROUGH = {"optimiser": "adam", "n_iterations": 150, "learning_rate": 0.05, "final_learning_rate": 0.0}

METHODS: dict[str, MethodKind] = {
    "adjoint": MethodKind("flowprox.methods:Adjoint", "A^T y: the measurement carried back", problems=_LINEAR),
    "unfolded": MethodKind("", "a network trained for the operator", needs=("model",), problems=_LINEAR),
    "latent-map": MethodKind(
        "flowprox.solvers:LatentMAP",
        "MAP in the latent space of a flow (Asim et al. 2020)",
        needs=("flow",),
        # Asim et al. (2020), App. A.1: no prior term where A loses much
        defaults={
            "denoising": {"gamma": "discrepancy"},
            "deblurring": {"gamma": "discrepancy"},
            "one-bit": {"gamma": 1.0, **_STRAIGHT_THROUGH},
        },
        quick={"n_iterations": 2},
    ),
    "noise-map": MethodKind(
        "flowprox.solvers:NoiseMAP",
        "MAP with a flow and a density of the noise (Whang et al. 2021)",
        needs=("flow",),
        takes_noise=True,
        takes_decoder=True,
        defaults={"one-bit": {"form": "latent", **_STRAIGHT_THROUGH}},
        quick={"n_iterations": 2},
    ),
    "posterior": MethodKind(
        "flowprox.solvers:PosteriorSampling",
        "mean of posterior samples drawn in the latent space of a flow",
        needs=("flow",),
        takes_noise=True,
        quick={"n_samples": 4, "n_warmup": 4, "n_chains": 2},
    ),
    "bm3d": MethodKind("flowprox.baselines:BM3D", "block matching and 3D filtering", problems=("denoising",)),
    "lasso-dct": MethodKind(
        "flowprox.baselines:Lasso",
        "sparse in a cosine basis",
        problems=_LINEAR,
        defaults={"": {"basis": "dct"}},
        quick={"n_iterations": 5},
    ),
    "lasso-wavelet": MethodKind(
        "flowprox.baselines:Lasso",
        "sparse in a wavelet basis",
        problems=_LINEAR,
        defaults={"": {"basis": "wavelet"}},
        quick={"n_iterations": 5},
    ),
    "tv": MethodKind(
        "flowprox.baselines:TotalVariation",
        "total variation",
        problems=_LINEAR,
        # tuned on validation faces (benchmarks/classical_baselines.py)
        defaults={
            "denoising": {"regularisation": 0.24, "dual_step": 0.05},
            "compressed-sensing": {"regularisation": 0.1},
            "inpainting": {"regularisation": 6e-3, "n_iterations": 4000},
            "random-inpainting": {"regularisation": 6e-3, "n_iterations": 4000},
        },
        quick={"n_iterations": 5},
    ),
    "wavelet": MethodKind(
        "flowprox.baselines:WaveletPrior", "wavelet shrinkage prior", problems=_LINEAR, quick={"n_iterations": 5}
    ),
    "gan": MethodKind(
        "flowprox.baselines:GANPrior",
        "in the range of a generator (Bora et al. 2017)",
        needs=("model",),
        quick={"n_steps": 2, "n_restarts": 1},
    ),
    "plug-and-play": MethodKind(
        "flowprox.baselines:PlugAndPlay",
        "a flow, or a network trained as a denoiser, in the place of the prox",
        needs=("flow or model",),
        problems=_LINEAR,
        quick={"n_iterations": 2},
    ),
    "biharmonic": MethodKind(
        "flowprox.baselines:Biharmonic", "the smoothest filling", problems=("inpainting", "random-inpainting")
    ),
    "wiener": MethodKind("flowprox.baselines:Wiener", "regularised inverse filter", problems=("deblurring",)),
}
"""Method name -> how it is made."""


class Adjoint(Reconstructor):
    """x_hat = A^T y: what the measurement shows by itself.

    For denoising and inpainting this is the measurement.

    Example:
        >>> from flowprox.operators import make_physics
        >>> physics = make_physics("denoising", (1, 4, 4))
        >>> y = torch.rand(1, 1, 4, 4)
        >>> torch.equal(Adjoint()(y, physics), y)
        True
    """

    def forward(self, y: Tensor, physics: Physics) -> Tensor:  # type: ignore[override]
        if not isinstance(physics, LinearPhysics):
            raise ValueError(f"{type(physics).__name__} is not linear and has no adjoint; use another method")
        return physics.A_adjoint(y)


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
        >>> make_method("tv", problem="denoising").regularisation
        0.24
    """
    kind = _kind(name)
    _check_needs(name, {"flow": flow, "model": model}, noise is not None)
    problem_name = problem.name if isinstance(problem, Problem) else problem
    if problem_name is not None and not kind.applies_to(problem_name):
        raise ValueError(f"method {name} is not for {problem_name}; it is for {', '.join(kind.problems or ())}")
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
        parts[_model_argument(name)] = load_model(model, device=device) if isinstance(model, str) else model
    if noise is not None:
        parts["noise"] = _as_noise(noise, shape, device)
    cls = _class(name)
    return _constructed(cls, parts, merged).to(device)


def default_options(name: str, problem: str | None = None) -> dict[str, Any]:
    """The options of a method that differ from the defaults of its class, for a problem.

    Example:
        >>> default_options("lasso-dct")
        {'basis': 'dct'}
    """
    defaults = _kind(name).defaults
    return {**defaults.get("", {}), **defaults.get(problem or "", {})}


def check_options(name: str, options: Iterable[str]) -> None:
    """Raise ``ValueError`` with the nearest names if a method has no such option."""
    known = _option_names(name)
    for option in options:
        if option not in known:
            raise ValueError(f"method {name} has no option {option!r}; {_nearest(option, known)}")


class Outcome(NamedTuple):
    """What a method returned.

    Arguments:
        estimate: (B, C, H, W).
        facts: per image what a solver says about itself: reason, n_evaluations, gamma, restarts; empty for other methods.
        deviation: standard deviation of each pixel (B, C, H, W), from a method that samples the posterior.
    """

    estimate: Tensor
    facts: list[dict[str, Any]]
    deviation: Tensor | None = None


def run_method(method: Reconstructor, y: Tensor, physics: Physics) -> Outcome:
    """Call a method on measurements y (B, ...), by ``solve`` where it has that."""
    solve = getattr(method, "solve", None)
    with torch.no_grad():
        if solve is None:
            x_hat = method(y, physics)
            return Outcome(x_hat, [{} for _ in range(len(x_hat))])
        solution = solve(y, physics)
    facts: list[dict[str, Any]] = [{} for _ in range(len(solution.estimate))]
    for key, name in (("reason", "reasons"), *((key, key) for key in ("n_evaluations", "gamma", "restarts"))):
        values = getattr(solution, name, None)
        if values is not None:
            values = values.tolist() if isinstance(values, Tensor) else values
            for fact, value in zip(facts, values, strict=True):
                fact[key] = value
    return Outcome(solution.estimate, facts, getattr(solution, "std", None))


def _kind(name: str) -> MethodKind:
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; {_nearest(str(name), METHODS)}")
    return METHODS[name]


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


def _class(name: str) -> Any:
    module, _, attribute = METHODS[name].target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _model_argument(name: str) -> str:
    """What the class calls the network it is given."""
    names = _parameters(_class(name))
    return next((key for key in ("model", "generator", "denoiser") if key in names), "")


def _parameters(cls: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(cls.__init__).parameters


def _option_names(name: str) -> set[str]:
    """The arguments of a method's class, and the fields of the option objects among them."""
    if not _kind(name).target:
        return set()
    cls = _class(name)
    apart = _GIVEN_APART | {_model_argument(name)}
    arguments = set(_parameters(cls)) - apart
    held = [held for argument in arguments for held in _option_classes(cls, argument).values()]
    return arguments | {field.name for one in held for field in dataclasses.fields(one)}


def _option_classes(cls: Any, argument: str) -> dict[str, Any]:
    """The option objects an argument takes, by the word that picks one; {} for none."""
    if argument == "optimiser":
        solvers = importlib.import_module("flowprox.solvers")
        return {word: getattr(solvers, known) for word, known in _OPTIMISERS.items()}
    hint = typing.get_type_hints(cls.__init__).get(argument)
    members = (m for m in (hint, *typing.get_args(hint)) if isinstance(m, type) and dataclasses.is_dataclass(m))
    return {member.__name__.lower(): member for member in members}


def _constructed(cls: Any, parts: Mapping[str, Any], options: Mapping[str, Any]) -> Reconstructor:
    """The method, with options gathered into the option objects of its class."""
    parameters = _parameters(cls)
    arguments = {key: value for key, value in options.items() if key in parameters}
    left = {key: value for key, value in options.items() if key not in parameters}
    for argument in set(parameters) - _GIVEN_APART:
        choices = _option_classes(cls, argument)
        word = arguments.get(argument)
        if argument == "optimiser" and word is not None and word not in choices:
            raise ValueError(f"{argument} must be {' or '.join(choices)}, got {word!r}")
        if not choices or not (word is None or word in choices):
            continue  # a number, for example
        start = choices[word]() if word is not None else None
        if start is None and argument == "optimiser":
            start = cls(**parts, **{k: v for k, v in arguments.items() if k in parameters}).optimiser
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
    from flowprox.noise import NOISES, FlowNoise, make_noise

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


def _nearest(name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names) or 'none'}"
