"""What a study is: units of work that give a record each, and figures drawn from the records alone.

    units(run)  ->  measure(run, unit) = record  ->  draw(records) = figures

A study answers what no table of methods x problems x images does: what a solver does on the way, or what the density of a
flow looks like. ``flowprox.studies.running`` runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from deepinv.physics import Physics
from torch import Tensor

from flowprox.flows import Flow
from flowprox.operators import make_physics, measure_each
from flowprox.reconstruction import image_seed

__all__ = ["Drawn", "Study", "StudyRun"]

Record = Mapping[str, Any]


@dataclass(frozen=True)
class StudyRun:
    """What a study works on.

    Arguments:
        settings: numbers of the scale: iterations, measurements, image size.
        flow: the prior; None for a study that needs none.
        names, x: the images, (B, C, H, W) in [0, 1]; none for a study that needs none.
        seed: every random number follows from it.
        device: where it runs.
    """

    settings: Mapping[str, Any]
    flow: Flow | None = None
    names: Sequence[str] = ()
    x: Tensor = field(default_factory=lambda: torch.empty(0, 3, 1, 1))
    seed: int = 0
    device: str = "cpu"

    @property
    def prior(self) -> Flow:
        """The flow of a study that needs one."""
        if self.flow is None:
            raise ValueError("the study needs a flow; give the name, folder or hub id of one")
        return self.flow

    def generator(self, *key: int) -> torch.Generator:
        """Random numbers that depend on the seed and the key only, the same on every device."""
        seed = self.seed
        for number in key:
            seed = (seed * 1_000_003 + number) % 2**63
        return torch.Generator().manual_seed(seed)

    def measured(self, problem: str, **parameters: Any) -> tuple[Tensor, Physics]:
        """(y, physics) of the images; the noise of an image depends on the seed and its name."""
        channels, height, width = self.x.shape[1:]
        physics = make_physics(problem, (channels, height, width), seed=self.seed, device=self.device, **parameters)
        return measure_each(self.x, physics, [image_seed(self.seed, name) for name in self.names]), physics


class Drawn(NamedTuple):
    """A figure and what stands beside it; ``alt`` says in words what it shows, for those who cannot see it."""

    figure: Any
    title: str
    caption: str
    alt: str


class Study(NamedTuple):
    """One study.

    Arguments:
        description: one line.
        source: the figures of the papers that it repeats.
        scales: "smoke", "small" and "paper" -> settings.
        units: what is measured, each a JSON-able mapping with keys of its own.
        measure: the record of a unit, JSON-able; lists are curves or grids.
        draw: name of a figure -> the figure, from all records in the order of the units.
        needs_flow: whether it works on a trained flow and images.
    """

    description: str
    source: str
    scales: Mapping[str, Mapping[str, Any]]
    units: Callable[[StudyRun], Sequence[Record]]
    measure: Callable[[StudyRun, Record], Record]
    draw: Callable[[Sequence[Record]], Mapping[str, Drawn]]
    needs_flow: bool = True
