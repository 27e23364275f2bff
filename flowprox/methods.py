"""Every reconstruction method by name.

    x_hat = make_method(name, ...)(y, physics)

Symbols: y measurement, physics the operator with its noise, x_hat the estimate. A method is one entry of ``METHODS``: a
function, often the class itself, whose arguments named flow, model and noise are the trained parts it uses, and whose other
arguments are its options. To add one, enter it:

    METHODS["brighter"] = Method(Brighter, "twice the measurement")
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import product
from typing import Any, NamedTuple, TypeAlias

import torch
from deepinv.models import Reconstructor
from deepinv.physics import Denoising, Inpainting, LinearPhysics, NoiseModel, Physics
from torch import Tensor, nn

from flowprox.baselines import (
    BM3D,
    Biharmonic,
    FFDNet,
    FilteredBackprojection,
    GANPrior,
    Lasso,
    PlugAndPlay,
    Pretrained,
    TotalVariation,
    WaveletPrior,
    Wiener,
)
from flowprox.checkpoints import load_model
from flowprox.flows import Flow, frozen
from flowprox.graphs import compile_regions
from flowprox.naming import Values, nearest, require_level
from flowprox.noise import NOISES, FlowNoise, make_noise
from flowprox.operators import PROBLEMS, PaddedBlur, Problem, fit_to_divisor, mirrored
from flowprox.operators.imaging import RealMRI, centered_symmetry
from flowprox.operators.sizes import continued
from flowprox.solvers import LBFGS, Adam, LatentMAP, NoiseMAP, PosteriorSampling, SamplerOptions, TorchLBFGS

_PARTS = ("flow", "model", "noise")

Settings: TypeAlias = LBFGS | Adam | TorchLBFGS | SamplerOptions
"""Options of a solver that are an object of their own."""


class Adjoint(Reconstructor):
    """x_hat = A^T y: what the measurement shows by itself.

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


class Measurement(Reconstructor):
    """x_hat = y: what doing nothing gives, where the measurement is a picture of the image's size, or less a blur's frame."""

    def forward(self, y: Tensor, physics: Physics) -> Tensor:  # type: ignore[override]
        if isinstance(physics, PaddedBlur) and physics.padding == "valid":
            return continued(y, physics.A_adjoint(y))
        return y


class SelfEnsemble(Reconstructor):
    """x_hat = (D(y, A) + M D(M y, M A M)) / 2: a network D averaged over the image and its mirror image, M left to right.

    For MRI of real images M runs over all symmetries of the square, or of the rectangle.

    References:
        Lim et al. 2017, Enhanced deep residual networks for super-resolution, https://arxiv.org/abs/1707.02921, Sec. 3.4

    Arguments:
        model: ``x_hat = model(y, physics)`` for an operator that ``flowprox.operators.mirrored`` knows; its mask or kernel is
            mirrored too, so that the model may know nothing of left and right.

    Example:
        >>> from flowprox.operators import make_physics
        >>> y = torch.rand(1, 3, 4, 4)
        >>> x_hat = SelfEnsemble(Adjoint())(y, make_physics("denoising", (3, 4, 4)))
        >>> torch.allclose(x_hat, y)
        True
    """

    def __init__(self, model: Reconstructor) -> None:
        super().__init__()
        self.model = network(model)

    def forward(self, y: Tensor, physics: Physics) -> Tensor:  # type: ignore[override]
        if not isinstance(physics, LinearPhysics):
            raise ValueError(f"{type(physics).__name__} has no mirror image that is known")
        if isinstance(physics, RealMRI):
            n = 8 if y.shape[-2] == y.shape[-1] else 4
            each = (self.model(centered_symmetry(y, k), physics.symmetry(k)) for k in range(n))
            return torch.stack([centered_symmetry(x_hat, k, back=True) for k, x_hat in enumerate(each)]).mean(0)
        return (self.model(y, physics) + self.model(y.flip(-1), mirrored(physics)).flip(-1)) / 2


class Tiled(Reconstructor):
    """A network applied to pictures of any size, large ones in tiles that overlap, and gray ones to a network of color.

    Memory is that of one tile and of a few copies of the picture. Tiles are for operators that act on each pixel alone:
    denoising with one noise level, and inpainting. What another operator measured is passed on whole.

    Arguments:
        model: ``x_hat = model(y, physics)``, images (B, C, H, W).
        tile: side of a tile in pixels, a multiple of the model's divisor; pictures of more than tile x tile pixels are
            computed in tiles. 0: never.
        overlap: of two tiles, in pixels; the outer quarter of it is thrown away, and the tiles are faded over within.
        is_measured: the level is that of a measurement. Then a gray picture, whose colors share one noise, is told to a network
            of C colors as sqrt(C) times as noisy. The levels of plug and play are a schedule and stay as they are.

    Raises:
        ValueError: a tile that the divisor does not divide, or not larger than twice the overlap.

    Example:
        >>> from deepinv.models import ArtifactRemoval, MedianFilter
        >>> from flowprox.operators import make_physics
        >>> model = ArtifactRemoval(MedianFilter(3))
        >>> y, physics = torch.rand(1, 3, 40, 70), make_physics("denoising", (3, 40, 70))
        >>> torch.allclose(Tiled(model, tile=32, overlap=8)(y, physics), model(y, physics))
        True
    """

    def __init__(self, model: Reconstructor, tile: int = 1024, overlap: int = 64, is_measured: bool = True) -> None:
        super().__init__()
        self.divisor = int(getattr(model, "divisor", 1))
        if tile and (tile % self.divisor or overlap % self.divisor or not 0 <= 2 * overlap < tile):
            form = f"a multiple of {self.divisor} and more than twice the overlap, another multiple, or 0"
            raise ValueError(f"tile must be {form}; got tile {tile} and overlap {overlap}")
        self.model, self.tile, self.overlap, self.is_measured = model, tile, overlap, is_measured
        self.levels = getattr(model, "levels", None)
        self.n_channels = next((n for part in model.modules() if (n := getattr(part, "n_channels", None))), None)

    def forward(  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]
        self, y: Tensor, physics: LinearPhysics, callback: Callable[[int, int], None] | None = None
    ) -> Tensor:
        """x_hat (B, C, H, W); ``callback`` is called after every tile with their number so far and in all."""
        is_local, n = isinstance(physics, Denoising | Inpainting), int(self.n_channels or 1)
        alike = self.is_measured and y.shape[1] == n and bool((y == y[:, :1]).all())  # gray, in colors
        if is_local and n > 1 and (y.shape[1] == 1 or alike):
            # the colors' noise is one: gray has as much of it as colors of sqrt(C) times the level have
            contrast, louder = 1.0, _louder(physics, math.sqrt(n)) if self.is_measured else physics
            if isinstance(physics, Denoising) and self.levels and louder is not physics:  # no more than it knows
                contrast = float((max(self.levels) / louder.noise_model.sigma.max()).clamp(max=1))  # type: ignore[union-attr, operator]
                louder = _louder(louder, contrast)
            colors = (0.5 + contrast * (y - 0.5)).expand(-1, n, -1, -1)
            gray = 0.5 + (self._whole(colors, louder, callback).mean(1, keepdim=True) - 0.5) / contrast
            return gray.expand_as(y)
        return self._whole(y, physics, callback)

    def _whole(self, y: Tensor, physics: LinearPhysics, callback: Callable[[int, int], None] | None) -> Tensor:
        """The estimate of measurements with the channels that the model takes."""
        is_local = isinstance(physics, Denoising | Inpainting)
        if not is_local or not self.tile or y.shape[-2] * y.shape[-1] <= self.tile**2:
            return self.model(y, physics)
        fitted = fit_to_divisor(y, physics, self.divisor)
        is_fixed = not self.model.training and not torch.is_grad_enabled()
        with frozen(self.model) if is_fixed else nullcontext():
            x_hat = self._assembled(fitted.y, fitted.physics, callback)
        return x_hat[..., fitted.rows, fitted.columns]

    def _assembled(
        self, y: Tensor, physics: LinearPhysics, callback: Callable[[int, int], None] | None = None
    ) -> Tensor:
        """The whole from its tiles, for sides that the model takes."""
        x_hat, total = torch.zeros_like(y), y.new_zeros(y.shape[-2:])
        places = list(product(*(_places(side, self.tile, self.overlap) for side in y.shape[-2:])))
        for i, (rows, columns) in enumerate(places):
            part = self.model(y[..., rows, columns].contiguous(), _part(physics, rows, columns))
            ends = ((rows, y.shape[-2]), (columns, y.shape[-1]))
            down, across = (_weights(where, side, self.overlap).to(y) for where, side in ends)
            weights = down[:, None] * across
            x_hat[..., rows, columns] += weights * part
            total[rows, columns] += weights
            if callback is not None:
                callback(i + 1, len(places))
        return x_hat.div_(total)


def _places(side: int, tile: int, overlap: int) -> list[slice]:
    """Where the tiles stand on an axis; the last one ends with it."""
    starts = range(0, max(side - overlap, 1), tile - overlap)
    return [slice(start, start + min(tile, side)) for start in (max(0, min(s, side - tile)) for s in starts)]


def _weights(where: slice, side: int, overlap: int) -> Tensor:
    """w along an axis (n,): rising from 0 to 1 in the middle half of the overlap, but 1 at the picture's own border."""
    n = where.stop - where.start
    rise = ((torch.arange(n) + 0.5 - overlap / 4) / (overlap / 2 or 1)).clamp(0, 1)
    first = torch.ones(n) if where.start == 0 else rise
    return first if where.stop == side else torch.minimum(first, rise.flip(0))


def _louder(physics: LinearPhysics, factor: float) -> LinearPhysics:
    """The operator with so many times its noise level, if it states one."""
    if not isinstance(getattr(physics.noise_model, "sigma", None), Tensor):
        return physics
    louder = copy.deepcopy(physics)
    louder.noise_model.update_parameters(sigma=factor * physics.noise_model.sigma)  # type: ignore[union-attr, operator]
    return louder


def _part(physics: Physics, rows: slice, columns: slice) -> Physics:
    """The operator in a tile."""
    if not isinstance(physics, Inpainting):
        return physics
    mask, noise = physics.get_buffer("mask")[..., rows, columns], physics.noise_model
    assert isinstance(noise, NoiseModel | nn.Module)
    return Inpainting(img_size=mask.shape[-3:], mask=mask, device=mask.device, noise_model=noise)  # pyright: ignore


# Factories -----------------------------------------------------------------------------------------------------------


def network(model: Reconstructor, tile: int = 1024, overlap: int = 64, compile: bool = False) -> Reconstructor:
    """A network trained to reconstruct; large pictures in tiles, see ``Tiled``.

    Arguments:
        compile: compile what the network repeats (``flowprox.graphs.compile_regions``), for a GPU. The first image of every
            size waits for it.
    """
    if not isinstance(model, Reconstructor):
        remedy = "give an unfolded network, or a method that uses it, such as latent-map with flow"
        raise ValueError(f"model is a {type(model).__name__}, which does not reconstruct by itself; {remedy}")
    if compile:
        compile_regions(model)
    return Tiled(model, tile, overlap)


def gan(
    model: nn.Module,
    n_restarts: int = 3,
    n_steps: int = 500,
    learning_rate: float = 0.3,
    regularization: float = 1e-2,
    seed: int = 0,
    optimizer: str = "adam",
) -> GANPrior:
    """``GANPrior`` of a trained generator; ``n_steps`` and ``learning_rate`` are the optimizer's."""
    choices = {"adam": None, "lbfgs": LBFGS(n_steps), "torch-lbfgs": TorchLBFGS(n_steps, learning_rate)}
    if optimizer not in choices:
        raise ValueError(f"optimizer must be {', '.join(choices)}; got {optimizer!r}")
    return GANPrior(model, n_restarts, n_steps, learning_rate, regularization, seed, choices[optimizer])


def plug_and_play(
    model: nn.Module | None = None, flow: Flow | None = None, tile: int = 1024, **options: Any
) -> PlugAndPlay:
    """``PlugAndPlay`` with a trained denoiser, large pictures in tiles (``Tiled``), or a flow."""
    if (denoiser := flow if model is None else model) is None or (model is not None and flow is not None):
        raise ValueError("plug-and-play needs either a model (a denoiser) or a flow")
    if isinstance(denoiser, Reconstructor) and getattr(denoiser, "levels", None) is not None:
        denoiser = Tiled(denoiser, tile, is_measured=False)
    return PlugAndPlay(denoiser, **options)


def _flat(make: Callable[..., Reconstructor], argument: str, **choices: Settings) -> Callable[..., Reconstructor]:
    """``make`` with the fields of the option object it takes as arguments of its own.

    Arguments:
        make: the class.
        argument: which of its arguments takes an option object.
        choices: the word that picks an object -> the object with its defaults; the first holds where no word is given.
    """

    def make_flat(**options: object) -> Reconstructor:
        word = str(options.pop(argument, None) or next(iter(choices)))
        if word not in choices:
            raise ValueError(f"{argument} must be {' or '.join(choices)}, got {word!r}")
        names = {field.name for field in dataclasses.fields(choices[word])}
        settings = {name: options.pop(name) for name in names & {*options}}
        if useless := [name for name in options if name not in own]:
            raise ValueError(f"{', '.join(useless)} is of no use with {argument} {word}; leave it out")
        return make(**options, **{argument: dataclasses.replace(choices[word], **settings)})

    own = {name: p for name, p in inspect.signature(make).parameters.items() if name != argument}
    fields = {argument: (next(iter(choices)), "str")} if len(choices) > 1 else {}
    for one in reversed(choices.values()):  # the defaults of the first hold
        fields |= {field.name: (getattr(one, field.name), field.type) for field in dataclasses.fields(one)}
    keyword = inspect.Parameter.KEYWORD_ONLY
    added = [inspect.Parameter(name, keyword, default=value, annotation=kind) for name, (value, kind) in fields.items()]
    make_flat.__signature__ = inspect.Signature([*own.values(), *added])  # type: ignore[attr-defined]
    return make_flat


# The registry --------------------------------------------------------------------------------------------------------


class Method(NamedTuple):
    """One line of the registry.

    Arguments:
        make: makes the method; its arguments flow, model and noise are what it uses, the others its options; ``**options`` are
            those of the first class of ``explained_in``, whose first argument the method gives.
        description: one line.
        problems: names of the problems it applies to; None: all.
        needs_linear: whether it applies to linear operators only.
        needs: what must be given where its arguments do not say: "flow or model".
        defaults: problem -> options that differ from the defaults of ``make`` there.
        quick: the options that make it end within seconds, for trying a recipe out.
        explained_in: what explains the options in its docstring; none means that ``make`` does, or a part of it.
    """

    make: Callable[..., Reconstructor]
    description: str
    problems: tuple[str, ...] | None = None
    needs_linear: bool = False
    needs: str = ""
    defaults: Mapping[str, Values] = {}
    quick: Mapping[str, object] = {}
    explained_in: tuple[Callable[..., object], ...] = ()

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """The arguments of ``make``."""
        own = dict(inspect.signature(self.make).parameters)
        others = [*inspect.signature(self.explained_in[0]).parameters.items()][1:] if own.pop("options", None) else []
        return {**dict(others), **own}

    @property
    def parts(self) -> dict[str, bool]:
        """Which of flow, model and noise it takes -> whether it must be given."""
        parameters = self.parameters
        return {part: parameters[part].default is inspect.Parameter.empty for part in _PARTS if part in parameters}

    @property
    def options(self) -> Values:
        """Its options with their defaults."""
        return {name: one.default for name, one in self.parameters.items() if name not in (*_PARTS, "device")}

    def missing(self, parts: Mapping[str, object]) -> str | None:
        """What it needs and is None in ``parts``, which has the keys flow and model."""
        ways = [part for part, is_needed in self.parts.items() if is_needed] + ([self.needs] if self.needs else [])
        return next((way for way in ways if all(parts.get(key) is None for key in way.split(" or "))), None)

    def applies_to(self, problem: str) -> bool:
        """Whether it can be used for a problem of this name."""
        fits = not self.needs_linear or (problem in PROBLEMS and PROBLEMS[problem].is_linear)
        return fits and (self.problems is None or problem in self.problems)

    @property
    def applicable(self) -> list[str]:
        """Names of the problems that it can be used for."""
        return [name for name in PROBLEMS if self.applies_to(name)]


# a line search cannot follow the straight-through gradient of a sign
_STRAIGHT_THROUGH = {"optimizer": "adam", "n_iterations": 150, "learning_rate": 0.05, "final_learning_rate": 0.0}
_OPTIMIZERS = {"lbfgs": LBFGS(n_iterations=200), "adam": Adam(), "torch-lbfgs": TorchLBFGS()}
_FIVE = {"n_iterations": 5}
_MASKED = ("inpainting", "random-inpainting")
_OF_THE_IMAGES_SIZE = ("denoising", *_MASKED, "deblurring")

METHODS: dict[str, Method] = {
    "measurement": Method(Measurement, "the measurement itself", _OF_THE_IMAGES_SIZE),
    "adjoint": Method(Adjoint, "A^T y: the measurement carried back", needs_linear=True),
    "unfolded": Method(network, "a network trained for the operator", needs_linear=True, explained_in=(Tiled, network)),
    "self-ensemble": Method(
        SelfEnsemble,
        "a trained network, averaged over the image and its mirror image",
        ("denoising", "inpainting", "random-inpainting", "deblurring", "super-resolution", "mri"),
    ),
    "latent-map": Method(
        _flat(LatentMAP, "optimizer", **_OPTIMIZERS),
        "MAP in the latent space of a flow (Asim et al. 2020)",
        # Asim et al. (2020), App. A.1: no prior term where A loses much
        defaults={
            "denoising": {"gamma": "discrepancy"},
            "deblurring": {"gamma": "discrepancy"},
            "one-bit": {"gamma": 1.0, **_STRAIGHT_THROUGH},
        },
        quick={"n_iterations": 2},
        explained_in=(LatentMAP, LBFGS, Adam, TorchLBFGS),
    ),
    "noise-map": Method(
        _flat(NoiseMAP, "optimizer", **_OPTIMIZERS),
        "MAP with a flow and a density of the noise (Whang et al. 2021)",
        defaults={"one-bit": {"form": "latent", **_STRAIGHT_THROUGH}},
        quick={"n_iterations": 2},
        explained_in=(NoiseMAP, LBFGS, Adam, TorchLBFGS),
    ),
    "posterior": Method(
        _flat(PosteriorSampling, "options", only=SamplerOptions()),
        "mean of posterior samples drawn in the latent space of a flow",
        quick={"n_samples": 4, "n_warmup": 4, "n_chains": 2},
        explained_in=(PosteriorSampling, SamplerOptions),
    ),
    "bm3d": Method(BM3D, "block matching and 3D filtering", ("denoising",)),
    "ffdnet": Method(FFDNet, "a network of others (Zhang et al. 2018), pretrained", ("denoising",)),
    "drunet": Method(
        partial(Pretrained, "drunet"),
        "a network of others (Zhang et al. 2021), where its weights are at hand",
        ("denoising",),
    ),
    "ram": Method(
        partial(Pretrained, "ram"),
        "a network of others for any operator (Terris et al. 2025), where its weights are at hand",
        needs_linear=True,
    ),
    "lasso-dct": Method(partial(Lasso, "dct"), "sparse in a cosine basis", needs_linear=True, quick=_FIVE),
    "lasso-wavelet": Method(partial(Lasso, "wavelet"), "sparse in a wavelet basis", needs_linear=True, quick=_FIVE),
    "tv": Method(
        TotalVariation,
        "total variation",
        needs_linear=True,
        # tuned on validation faces (recipes/evaluate/classical.yaml)
        defaults={
            "denoising": {"regularization": 0.24, "dual_step": 0.05},
            "compressed-sensing": {"regularization": 0.1},
            **{problem: {"regularization": 6e-3, "n_iterations": 4000} for problem in _MASKED},
        },
        quick=_FIVE,
    ),
    "wavelet": Method(WaveletPrior, "wavelet shrinkage prior", needs_linear=True, quick=_FIVE),
    "gan": Method(
        gan,
        "in the range of a generator (Bora et al. 2017)",
        quick={"n_steps": 2, "n_restarts": 1},
        explained_in=(GANPrior,),
    ),
    "plug-and-play": Method(
        plug_and_play,
        "a flow, or a network trained as a denoiser, in the place of the prox",
        needs_linear=True,
        needs="flow or model",
        quick={"n_iterations": 2},
        explained_in=(PlugAndPlay, Tiled),
    ),
    "biharmonic": Method(Biharmonic, "the smoothest filling", _MASKED),
    "fbp": Method(FilteredBackprojection, "filtered backprojection", ("ct",)),
    "wiener": Method(Wiener, "regularized inverse filter", ("deblurring",)),
}
"""Method name -> how it is made."""


class Option(NamedTuple):
    """An option of a method: its default for a problem, and what it means."""

    default: object
    meaning: str


def method_options(name: str, problem: str | None = None) -> dict[str, Option]:
    """The options of a method with their defaults for a problem.

    Raises:
        ValueError: no such method; the message offers the nearest.

    Example:
        >>> method_options("tv", "denoising")["regularization"].default
        0.24
        >>> method_options("latent-map")["n_pairs"].meaning
        'changes of z and of the gradient that are remembered.'
    """
    method = _known(name)
    defaults = {**method.options, **method.defaults.get(problem or "", {})}
    explained_in = method.explained_in or (getattr(method.make, "func", method.make),)  # of partial the class
    meanings = [_meanings(cls) for cls in explained_in]
    return {key: Option(value, next((m[key] for m in meanings if key in m), "")) for key, value in defaults.items()}


def check_options(name: str, options: Iterable[str]) -> None:
    """Raise ``ValueError`` with the nearest names if a method has no such option."""
    known = _known(name).options
    for option in options:
        if option not in known:
            if not known:
                raise ValueError(f"method {name} has no options, got {option}; it is as it was trained")
            raise ValueError(f"method {name} has no option {option!r}; {nearest(option, sorted(known))}")


_PLAIN = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,), "None": (type(None),)}


def _check_type(what: str, value: object, annotation: object) -> None:
    """Raise ``ValueError`` for a plain value, as recipes and words have it, that is none of the annotation's plain types."""
    names = str(getattr(annotation, "__name__", annotation)).split(" | ")
    if not {*names} <= {*_PLAIN} or not isinstance(value, bool | int | float | str | list | dict | None):
        return
    if not any(type(value) in _PLAIN[name] for name in names):
        raise ValueError(f"{what} must be {' or '.join(names).replace('None', 'null')}, got {value!r}")


def make_method(
    name: str,
    problem: Problem | str | None = None,
    flow: Flow | str | None = None,
    model: nn.Module | str | None = None,
    noise: object = None,
    shape: Sequence[int] | None = None,
    device: str | torch.device = "cpu",
    **options: object,
) -> Reconstructor:
    """Make a reconstruction method by name.

    Arguments:
        name: a key of ``METHODS``.
        problem: what it will be used for; some methods have other defaults for other problems.
        flow: the prior: a flow, or the name, folder or hf:ORG/NAME of one; for "noise-map" with beta 0 also a generator.
        model: the trained network ("unfolded"), generator ("gan") or denoiser ("plug-and-play"), or where it is.
        noise: density of the noise: a ``flowprox.noise.Noise``; a flow trained on noise, or where it is; a name of
            ``flowprox.noise.NOISES``, or {"name": ..., parameters}, made for ``shape``. None takes the physics' own.
        shape: of one measurement, (C, H, W) or (m,), for a noise by name.
        device: where models that are loaded here are put.
        options: of the method, see ``method_options``.

    Raises:
        ValueError: unknown name or option (the message offers the nearest), something needed is missing, given but of
            no use, or of another kind; the method is not for this problem.
        ImportError: an optional package is missing; the message names it.

    Example:
        >>> make_method("tv", problem="denoising").regularization
        0.24
    """
    method, parts = _known(name), {"flow": flow, "model": model, "noise": noise}
    if (missing := method.missing(parts)) is not None:
        raise ValueError(f"method {name} needs {missing}: give the name, folder or hf:ORG/NAME of a trained one")
    for key, part in parts.items():
        if part is not None and key not in method.parts:
            takers = [other for other, one in METHODS.items() if key in one.parts]
            raise ValueError(f"method {name} has no use for {key}, which is for {', '.join(takers)}; leave it out")
    problem_name = problem.name if isinstance(problem, Problem) else problem
    if problem_name is not None and not method.applies_to(problem_name):
        raise ValueError(f"method {name} is not for {problem_name}; it is for {', '.join(method.applicable)}")
    check_options(name, options)
    for option, value in options.items():
        _check_type(f"option {option} of {name}", value, method.parameters[option].annotation)
    if problem_name in PROBLEMS and PROBLEMS[problem_name].measures_pictures:
        for key, value in (*options.items(), *(noise.items() if isinstance(noise, Mapping) else ())):
            if key in ("sigma", "sigma_start"):
                require_level(key, value, most=2.0)  # a method may be told more than there is
    loaded = {
        key: _noise(part, shape, device) if key == "noise" else _loaded(part, device)
        for key, part in parts.items()
        if part is not None
    }
    return method.make(**loaded, **{**method.defaults.get(problem_name or "", {}), **options}).to(device)


def _known(name: str) -> Method:
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; {nearest(name, sorted(METHODS))}")
    return METHODS[name]


def _loaded(part: object, device: str | torch.device) -> object:
    return load_model(part, device=device) if isinstance(part, str) else part


def _noise(noise: object, shape: Sequence[int] | None, device: str | torch.device) -> object:
    named = {"name": noise} if isinstance(noise, str) and noise in NOISES else noise
    if isinstance(named, Mapping):
        if shape is None or "name" not in named:
            raise ValueError(f"noise {named!r} by name needs a name, one of {', '.join(NOISES)}, and shape")
        parameters = {key: value for key, value in named.items() if key != "name"}
        return make_noise(named["name"], shape, **parameters).to(device)
    loaded = _loaded(named, device)
    return FlowNoise(loaded) if isinstance(loaded, Flow) else loaded


def _meanings(cls: Callable[..., object]) -> dict[str, str]:
    """What the section ``Arguments:`` of a docstring says of each."""
    section = re.search(r"\n *Arguments:\n(.*?)(?:\n\n|\Z)", inspect.getdoc(cls) or "", re.DOTALL)
    entries = re.findall(r"^ {4}([\w, ]+): (.*(?:\n {5,}.*)*)", section[1] if section else "", re.MULTILINE)
    return {name: " ".join(text.split()) for names, text in entries for name in names.split(", ")}
