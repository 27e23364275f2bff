"""A recipe written out: every problem and every variant of a method, which of them meet, and at what scale.

A series of parameters or options becomes one problem or variant for each place in its lists. The scale "smoke" is made
from any recipe: the pictures that ship, one image, the fewest iterations; "small" is the recipe as it stands; any other
is one of the recipe's own ``scales``. Images have names, noise seeds and hashes that depend on no other image.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
import yaml
from jsonargparse import get_loader
from torch import Tensor

from flowprox.checkpoints import CheckpointError, load_card
from flowprox.data.datasets import entries_of_split
from flowprox.data.files import as_float, fitted
from flowprox.files import atomic_write
from flowprox.methods import METHODS, check_options
from flowprox.naming import Values, nearest
from flowprox.noise import NOISES
from flowprox.operators import Problem
from flowprox.options import (
    SAMPLES,
    EvaluatedMethod,
    EvaluatedProblem,
    EvaluationOptions,
    Grid,
    ImageOptions,
    ScaleOptions,
)
from flowprox.samples import PORTRAITS, SAMPLES_FOLDER

SMOKE = "smoke"
AS_WRITTEN = "small"
SMOKE_FLOW = "glow-faces64"


class PlannedProblem(NamedTuple):
    """One measurement problem; ``published`` holds PSNR by label of the method."""

    problem: Problem
    seed: int
    published: Mapping[str, float]
    label: str
    published_in: str | None = None


class Case(NamedTuple):
    """A problem and one variant of a method that is used for it."""

    problem: PlannedProblem
    method: EvaluatedMethod

    @property
    def label(self) -> str:
        """What the method is called."""
        return self.method.label or self.method.name

    @property
    def options(self) -> Values:
        """The options of the method on the problem."""
        names = (self.problem.problem.name, self.problem.label)
        differing = {key: value for name in names for key, value in self.method.options_for.get(name, {}).items()}
        return {**self.method.options, **differing}

    @property
    def parts(self) -> Values:
        """What the method uses: flow, model or noise -> how the recipe names it."""
        parts = {part: getattr(self.method, part) for part in ("flow", "model", "noise")}
        return {part: name for part, name in parts.items() if name is not None}

    @property
    def operators(self) -> list[Problem]:
        """What the method is given in place of the measuring operator, one for all data steps or one for each; [] for none."""
        return [self.problem.problem.replaced(**changed) for changed in self.method.operators or ()]

    @property
    def models(self) -> dict[str, str]:
        """The parts that are trained models: name, folder or hf:ORG/NAME."""
        return {part: name for part, name in self.parts.items() if isinstance(name, str) and name not in NOISES}


def at_scale(recipe: EvaluationOptions, scale: str) -> EvaluationOptions:
    """The recipe at another scale, or ValueError: with what the scale replaces, and the problems and methods for it."""
    known = {SMOKE, AS_WRITTEN, *recipe.scales}
    if scale not in known:
        raise ValueError(f"the recipe has no scale {scale!r}; {nearest(scale, known)}")
    wanted = {scale, AS_WRITTEN} if scale == SMOKE else {scale}  # "smoke" takes those of "small" too
    problems, methods = (
        [one for one in ones if one.scales is None or not wanted.isdisjoint(one.scales)]
        for ones in (recipe.problems, recipe.methods)
    )
    used = _restricted(recipe, problems, methods)
    if scale in recipe.scales:
        return _replaced(used, recipe.scales[scale])
    return _smoke(used) if scale == SMOKE else used


def _restricted(recipe: EvaluationOptions, problems: Sequence[Any], methods: Sequence[Any]) -> EvaluationOptions:
    """The recipe with fewer problems and methods; what names a problem that has gone goes with it."""
    gone = _names(planned_problems(recipe.problems)) - _names(planned_problems(problems))
    methods = [
        dataclasses.replace(
            method,
            problems=None if method.problems is None else [name for name in method.problems if name not in gone],
            options_for={name: options for name, options in method.options_for.items() if name not in gone},
        )
        for method in methods
        if method.problems is None or set(method.problems) - gone
    ]
    return dataclasses.replace(recipe, problems=list(problems), methods=methods)


def _names(problems: Sequence[PlannedProblem]) -> set[str]:
    """By which methods may name the problems."""
    return {name for one in problems for name in (one.label, one.problem.name)}


def _smoke(recipe: EvaluationOptions) -> EvaluationOptions:
    """What runs anywhere within seconds: the pictures that ship, first places of series, a flow that ships."""
    quick = {method.name: dict(METHODS[method.name].quick) for method in recipe.methods if method.name in METHODS}
    small = _replaced(recipe, ScaleOptions(limit=1, source=SAMPLES, options=quick))
    methods = []
    for method in small.methods:
        try:
            _ = method.flow and load_card(method.flow)
        except (CheckpointError, OSError):  # it is not at hand
            method = dataclasses.replace(method, flow=SMOKE_FLOW)
        methods.append(dataclasses.replace(method, tune=_first(method.tune), series=_first(method.series)))
    problems = []
    for problem in small.problems:
        values = {**problem.parameters, **(problem.parameters.get("noise_parameters") or {})}
        files = [values[key] for key in ("path", "mask", "kernel") if isinstance(values.get(key), str)]
        if all(Path(file).is_file() for file in files):
            short = {"series": _first(problem.series), "published": _first(problem.published)}
            problems.append(dataclasses.replace(problem, **short))
    tuning = small.tune_images and dataclasses.replace(small.tune_images, source=SAMPLES, limit=1, split="all")
    return _restricted(dataclasses.replace(small, tune_images=tuning), problems, methods)


def _first(series: Values) -> Values:
    return {key: values[:1] if isinstance(values, list) else values for key, values in series.items()}


def _replaced(recipe: EvaluationOptions, scale: ScaleOptions) -> EvaluationOptions:
    def images(options: ImageOptions, **changes: Any) -> ImageOptions:
        return dataclasses.replace(options, **{key: value for key, value in changes.items() if value is not None})

    def method_at(method: EvaluatedMethod) -> EvaluatedMethod:
        differing = scale.options.get(method.name, {})
        named = method.noise if isinstance(method.noise, str) else ""
        return dataclasses.replace(
            method,
            flow=method.flow and (scale.models.get(method.flow) or scale.flow or method.flow),
            model=method.model and scale.models.get(method.model, method.model),
            noise=method.noise and (scale.models.get(named) or scale.noise or method.noise),
            options={k: v for k, v in {**method.options, **differing}.items() if k not in method.tune},
            options_for={
                problem: {k: v for k, v in options.items() if k not in differing}
                for problem, options in method.options_for.items()
            },
            series={k: v for k, v in method.series.items() if k not in differing},
        )

    size, split = scale.image_size, None if scale.source is None else "all"
    return dataclasses.replace(
        recipe,
        images=images(recipe.images, source=scale.source, limit=scale.limit, split=split, image_size=size),
        tune_images=recipe.tune_images and images(recipe.tune_images, image_size=size),
        methods=[method_at(method) for method in recipe.methods],
    )


def planned(recipe: EvaluationOptions) -> list[Case]:
    """Every problem with every method that is used for it, in the order of the recipe.

    Raises:
        ValueError: an unknown problem, parameter, method or option, two problems or methods of one label, a method
            that is used for no problem, or something a method needs that is missing.
    """
    problems = planned_problems(recipe.problems)
    methods = [one for method in recipe.methods for one in _methods(method)]
    cases = [
        Case(problem, method)
        for problem in problems
        for method in methods
        if METHODS[method.name].applies_to(problem.problem.name)
        and (method.problems is None or _names([problem]) & {*method.problems})
    ]
    _check_distinct("problems", [problem.label for problem in problems])
    names = _names(problems)
    for method in methods:
        for name in {*(method.problems or ()), *method.options_for} - names:
            raise ValueError(f"method {method.label} names the problem {name!r}; {nearest(name, names)}")
        if not any(case.method is method for case in cases):
            kinds = ", ".join(METHODS[method.name].applicable)
            raise ValueError(f"method {method.label} is used for no problem here; {method.name} is for {kinds}")
    labels = [str(method.label) for method in methods]
    for problem in problems:  # published figures may be of methods that are not compared here; a misspelt label is not
        for label in set(problem.published) - set(labels):
            if near := difflib.get_close_matches(label, labels, n=1, cutoff=0.8):
                raise ValueError(f"published of {problem.label} names {label!r}; did you mean {near[0]}?")
    _check_distinct("methods", [f"{case.label} on {case.problem.label}" for case in cases])
    planned = []
    for problem, method in cases:  # models may have the problem's name in theirs
        parts = {part: getattr(method, part) for part in ("flow", "model", "noise", "intervals")}
        own = {k: n.replace("{problem}", problem.problem.name) for k, n in parts.items() if isinstance(n, str)}
        planned.append(Case(problem, dataclasses.replace(method, **own)))
    return planned


def planned_problems(problems: Sequence[EvaluatedProblem]) -> list[PlannedProblem]:
    """Every problem, those of a series one by one; ``ValueError`` for an unknown one or an unknown parameter."""
    planned = []
    for one in problems:
        for i, values in enumerate(_places(one.series)):
            figures = {key: each[i] if isinstance(each, list) else each for key, each in one.published.items()}
            published = {key: float(figure) for key, figure in figures.items() if figure is not None}
            problem = Problem(one.name, {**one.parameters, **values})
            label = _labelled(one.label, values) if one.label else problem.label
            planned.append(PlannedProblem(problem, one.seed, published, label, one.published_in))
    return planned


def published_figures(recipe: EvaluationOptions, scale: str = AS_WRITTEN) -> dict[tuple[str, str], float]:
    """Published PSNR in dB by label of the problem and of the method."""
    cases = planned(at_scale(recipe, scale))
    return {(p.label, label): figure for p, _ in cases for label, figure in p.published.items()}


def _methods(method: EvaluatedMethod) -> Iterator[EvaluatedMethod]:
    """The variants of a method, each with a label."""
    name = method.label or method.name
    options_for = {key for options in method.options_for.values() for key in options}
    check_options(method.name, {**method.options, **method.series, **method.tune}.keys() | options_for)
    if missing := METHODS[method.name].missing({"flow": method.flow, "model": method.model}):
        raise ValueError(f"method {name} needs {missing}: the name, folder or hf:ORG/NAME of one")
    for values in _places(method.series):
        options = {**method.options, **values}
        yield dataclasses.replace(method, label=_labelled(name, values), options=options, series={})


def _labelled(name: str, values: Values) -> str:
    return " ".join([name, *(f"{key}={value}" for key, value in values.items())])


def _places(series: Grid) -> list[Values]:
    """The values at each place of lists of equal length; one empty place for no list."""
    return [dict(zip(series, values, strict=True)) for values in zip(*series.values(), strict=True)] or [{}]


def combinations(grid: Grid) -> list[Values]:
    """Every combination of the values of a grid.

    Example:
        >>> combinations({"a": [1, 2], "b": [3]})
        [{'a': 1, 'b': 3}, {'a': 2, 'b': 3}]
    """
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _check_distinct(what: str, labels: Sequence[str]) -> None:
    if twice := sorted(label for label, n in Counter(labels).items() if n > 1):
        raise ValueError(f"{what}: {twice[0]} stands there twice; give one of them another label or other values")


# Images --------------------------------------------------------------------------------------------------------------


class EvaluatedImage(NamedTuple):
    """A test image x (C, H, W), what it is called, the seed of its noise and the hash of its pixels.

    ``group`` is the kind of picture, for those that ship with the package.
    """

    name: str
    x: Tensor
    seed: int
    hash: str
    group: str | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.x.shape  # type: ignore[return-value]


def image_seed(seed: int, name: str) -> int:
    """Seed of an image's noise, below 2^62: it depends on the file's name without suffix, not on the other inputs.

    Example:
        >>> image_seed(0, "a") == image_seed(0, "a") != image_seed(1, "a")
        True
    """
    digest = hashlib.blake2b(f"{seed},{name}".encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


def load_images(options: ImageOptions, seed: int, limit: int | None) -> list[EvaluatedImage]:
    """The images that options describe, at most ``limit``, called as their file within its folder, without suffix, and,
    where that is the name of several, by the hash of their pixels too; each with the seed of its noise under the run's
    ``seed``."""
    source = [str(SAMPLES_FOLDER / "*.png")] if options.source == SAMPLES else options.source
    n = min((n for n in (options.limit, limit) if n is not None), default=None)
    images = []
    for entry in entries_of_split(source, options.split)[:n]:
        pixels = fitted(entry.read(), entry.name, options.image_size, options.channels)
        name = entry.key if entry.key.endswith("]") else str(PurePosixPath(entry.key).with_suffix(""))
        content = hashlib.blake2b(pixels.tobytes(), digest_size=8).hexdigest()
        x = as_float(torch.from_numpy(pixels))
        group = "portraits" if Path(entry.name).stem in PORTRAITS else "other pictures"
        is_ours = Path(os.path.abspath(entry.name)).parent == SAMPLES_FOLDER
        images.append(EvaluatedImage(name, x, image_seed(seed, name), content, group if is_ours else None))
    n_called = Counter(image.name.casefold() for image in images)
    return [
        image._replace(name=f"{image.name}-{image.hash[:6]}") if n_called[image.name.casefold()] > 1 else image
        for image in images
    ]


# The file ------------------------------------------------------------------------------------------------------------


class Published(NamedTuple):
    """Published PSNR in dB by label of the problem and of the method, and by label of the problem where it stands."""

    psnr: Mapping[tuple[str, str], float]
    sources: Mapping[str, str]


_OF_A_RUN = {"out", "scale", "limit", "seed", "device", "devices", "n_pictures"}


def write_recipe(recipe: EvaluationOptions, path: Path) -> None:
    """Write a recipe that ``flowprox evaluate --config`` reads; what is empty by default, and is, is left out."""
    values = _plain(recipe)
    assert isinstance(values, dict)
    with atomic_write(path, "w") as file:
        plain = {key: value for key, value in values.items() if key not in _OF_A_RUN}
        yaml.safe_dump(plain, file, sort_keys=False, allow_unicode=True, width=120)


def _plain(record: object) -> object:
    if dataclasses.is_dataclass(record):
        plain = {}
        for field in dataclasses.fields(record):
            value = getattr(record, field.name)
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            if value != default or default not in (None, {}, []):
                plain[field.name] = _plain(value)
        return plain
    if isinstance(record, Mapping):
        return {str(key): _plain(value) for key, value in record.items()}
    return [_plain(value) for value in record] if isinstance(record, list | tuple) else record


def read_published(path: Path, scales: Collection[str] = ()) -> Published:
    """The published figures that a recipe names for some scales; for all, if none is given.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no recipe of ``flowprox evaluate``.
    """
    try:
        recipe = get_loader("yaml")(path.read_text(encoding="utf-8"))  # as flowprox evaluate reads it: 1e-1 is a number
        known = {field.name for field in dataclasses.fields(EvaluatedProblem)}
        problems = [
            EvaluatedProblem(**{key: value for key, value in problem.items() if key in known})
            for problem in recipe["problems"]
        ]
        used = [p for p in problems if not scales or p.scales is None or set(p.scales) & set(scales)]
        planned = planned_problems(used)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} is no recipe of flowprox evaluate ({reason}); mend it or remove it") from error
    return Published(
        {(problem.label, method): figure for problem in planned for method, figure in problem.published.items()},
        {problem.label: problem.published_in for problem in planned if problem.published_in},
    )
