"""What an evaluation compares, as plain typed records: the recipes of ``flowprox evaluate`` are made of them.

As in ``flowprox.options``, each field is a key of the recipe, nothing heavy is imported, and a wrong value raises when
the record is made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from flowprox.naming import Values

__all__ = [
    "SAMPLES",
    "EvaluatedMethod",
    "EvaluatedProblem",
    "EvaluationOptions",
    "Grid",
    "ImageOptions",
    "ScaleOptions",
]

SAMPLES = "samples"
"""The source that stands for the pictures that ship with the package."""

Grid: TypeAlias = dict[str, list[Any]]
"""Values to take in turn, by the name of a parameter or an option."""


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _check_lists(name: str, values: Grid) -> None:
    for key, items in values.items():
        _require(
            isinstance(items, list) and len(items) > 0, f"{name} {key} must be a list of values to try, got {items!r}"
        )


def _check_series(name: str, values: Grid) -> None:
    _check_lists(name, values)
    lengths = {key: len(items) for key, items in values.items()}
    _require(
        len(set(lengths.values())) <= 1, f"{name} takes its lists together, so they must be equally long: {lengths}"
    )


@dataclass
class ImageOptions:
    """Which images an evaluation uses.

    Arguments:
        source: a folder of images, an .npz shard, a glob of either, a list of these, or "samples" for the pictures that
            ship with the package.
        image_size: height and width in pixels; the central square is taken and resized. null keeps images as
            they are, each of its own size.
        channels: 3 for color, 1 for gray.
        split: "train", "val" or "test" for a part of the images, see ``flowprox.data.ImageDataset``; "all" for all.
        limit: use only the first so many.
    """

    source: str | list[str] = SAMPLES
    image_size: int | None = 64
    channels: int = 3
    split: Literal["all", "train", "val", "test"] = "all"
    limit: int | None = None

    def __post_init__(self) -> None:
        _require(self.image_size is None or self.image_size >= 1, f"image_size must be positive; got {self.image_size}")
        _require(self.channels in (1, 3), f"channels must be 1 or 3; got {self.channels}")
        _require(self.limit is None or self.limit >= 1, f"limit must be positive or null; got {self.limit}")


@dataclass
class EvaluatedProblem:
    """A measurement problem, or a series of them.

    Arguments:
        name: a problem of ``flowprox.operators``.
        parameters: what differs from the problem's defaults.
        series: parameter -> list of values, lists of equal length: one problem for each place in the lists.
        seed: of whatever is drawn once with the operator, such as a random mask or matrix.
        published: label of a method -> published PSNR in dB, shown beside the measured one; a list where there is a
            series.
        label: what it is called in records and tables; by default its name and parameters. A series appends its values.
        published_in: where the published figures stand, such as "Asim et al. (2020), Fig. 4".
        scales: the scales at which it is used, "small" being the recipe as written; null: all.
    """

    name: str
    parameters: Values = field(default_factory=dict)
    series: Grid = field(default_factory=dict)
    seed: int = 0
    published: Values = field(default_factory=dict)
    label: str | None = None
    published_in: str | None = None
    scales: list[str] | None = None

    def __post_init__(self) -> None:
        _check_series(f"series of {self.name}:", self.series)
        twice = sorted(set(self.parameters) & set(self.series))
        _require(not twice, f"{self.name}: {', '.join(twice)} stands in parameters and in series; leave one out")
        n = len(next(iter(self.series.values()))) if self.series else 1
        for label, figures in self.published.items():
            fits = isinstance(figures, list) and len(figures) == n if self.series else not isinstance(figures, list)
            _require(fits, f"published {label} of {self.name} must be {n} figure(s), one per problem; got {figures!r}")
            try:
                [float(figure or 0) for figure in (figures if isinstance(figures, list) else [figures])]
            except (TypeError, ValueError) as error:
                raise ValueError(f"published {label} of {self.name} must be PSNR in dB; got {figures!r}") from error


@dataclass
class EvaluatedMethod:
    """A reconstruction method, or a series of variants of it.

    Arguments:
        name: a method of ``flowprox.methods``.
        label: what it is called in records and tables; by default its name. A series appends its values.
        flow: the prior, by name, folder or hf:ORG/NAME.
        model: the trained network, by name, folder or hf:ORG/NAME; {problem} in it stands for the name of the problem.
        noise: density of the noise: name, folder or hf:ORG/NAME of a flow trained on noise, or {name: ..., parameters} of
            ``flowprox.noise``; null takes the problem's own.
        options: of the method.
        options_for: label or name of a problem -> options that differ there.
        series: option -> list of values, lists of equal length: one variant for each place in the lists.
        tune: option -> values to choose from by the mean PSNR on ``tune_images``, for each problem apart; with several
            options every combination is tried.
        intervals: of a trained network, by name, folder or hf:ORG/NAME: how well they fit is recorded and drawn in the report.
        operators: what the network is given in place of the measuring operator, one entry for all data steps or one for each:
            the parameters of the problem that differ there, {} where none does. [{sigma: 0.2}] tells it another noise level,
            [{mask_size: 19}, {}] gives the measuring operator to the last of two data steps only. null gives it to all.
        problems: labels or names of the problems it is used for; null: all it applies to.
        batch_size: how many images it is given at once.
        scales: the scales at which it is used, "small" being the recipe as written; null: all.
    """

    name: str
    label: str | None = None
    flow: str | None = None
    model: str | None = None
    noise: str | Values | None = None
    options: Values = field(default_factory=dict)
    options_for: dict[str, Values] = field(default_factory=dict)
    series: Grid = field(default_factory=dict)
    tune: Grid = field(default_factory=dict)
    operators: list[Values] | None = None
    intervals: str | None = None
    problems: list[str] | None = None
    batch_size: int = 16
    scales: list[str] | None = None

    def __post_init__(self) -> None:
        _require(self.batch_size >= 1, f"batch_size of {self.name} must be positive; got {self.batch_size}")
        _check_series(f"series of {self.name}:", self.series)
        _check_lists(f"tune of {self.name}:", self.tune)
        twice = sorted(set(self.tune) & (set(self.series) | set(self.options)))
        _require(not twice, f"{self.name}: {', '.join(twice)} is to be tuned and is given as well; leave one out")


@dataclass
class ScaleOptions:
    """What another scale of the same recipe replaces.

    Arguments:
        limit: how many images are used.
        tune_limit: how many images the options are tuned on.
        source: of the images.
        tune_source: of the images that options are tuned on.
        image_size: of both.
        flow: in the place of every method's flow.
        noise: in the place of every method's noise flow.
        models: a flow, network or noise flow by the name it has in the recipe -> what is in its place.
        options: name of a method -> options that differ.
    """

    limit: int | None = None
    tune_limit: int | None = None
    source: str | list[str] | None = None
    tune_source: str | list[str] | None = None
    image_size: int | None = None
    flow: str | None = None
    noise: str | None = None
    models: dict[str, str] = field(default_factory=dict)
    options: dict[str, Values] = field(default_factory=dict)


@dataclass
class EvaluationOptions:
    """A whole evaluation.

    Arguments:
        images: the test images.
        problems: what is measured.
        methods: what reconstructs.
        tune_images: the images that options are tuned on, none of them among the test images.
        scales: name -> what that scale replaces.
        name: of the recipe.
    """

    images: ImageOptions
    problems: Sequence[EvaluatedProblem]
    methods: Sequence[EvaluatedMethod]
    tune_images: ImageOptions | None = None
    scales: Mapping[str, ScaleOptions] = field(default_factory=dict)
    name: str = "evaluation"

    def __post_init__(self) -> None:
        _require(len(self.problems) > 0, "problems is empty; name at least one, for example denoising")
        _require(len(self.methods) > 0, "methods is empty; name at least one, for example tv")
        known = {"smoke", "small", *self.scales}
        for one in (*self.problems, *self.methods):
            unknown = sorted({*(one.scales or ())} - known)
            _require(
                not unknown,
                f"{one.label or one.name} is for the scale {', '.join(unknown)}, which the recipe has not; "
                f"it has {', '.join(sorted(known))}",
            )
        tuned = [method.label or method.name for method in self.methods if method.tune]
        _require(
            not tuned or self.tune_images is not None,
            f"{', '.join(tuned)} is to be tuned: give tune_images, other images than those of the test",
        )
        if tuned and self.tune_images is not None and self.tune_images.source != SAMPLES:
            same = (self.tune_images.source, self.tune_images.split) == (self.images.source, self.images.split)
            _require(not same, "tune_images are the test images; choose the split val or another source")
