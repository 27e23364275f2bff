"""Runs a study, or what is left of it, and draws its figures.

A study's folder holds

    study.jsonl              one line per unit of work; while the study goes on, study.jsonl.partial
    figures/NAME.png         drawn from the records alone
    figures/figures.json     file -> title, caption, alternative text

What is already recorded is recognized by ``id``, a hash of everything it depends on, so that an interrupted study goes on.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from flowprox import __version__
from flowprox.checkpoints import load_card, load_model
from flowprox.data import ImageDataset
from flowprox.evaluation_options import SAMPLES, ImageOptions
from flowprox.files import atomic_write
from flowprox.flows import Flow
from flowprox.naming import nearest
from flowprox.records import RecordWriter, read_records
from flowprox.samples import SAMPLES_FOLDER
from flowprox.studies.contract import Study, StudyRun
from flowprox.studies.landscapes import LANDSCAPES
from flowprox.studies.latent_norms import LATENT_NORMS
from flowprox.studies.latent_statistics import LATENT_STATISTICS
from flowprox.studies.noisy_norms import NOISY_NORMS
from flowprox.studies.perturbations import PERTURBATIONS
from flowprox.studies.solver_curves import SOLVER_CURVES
from flowprox.studies.starts import STARTS
from flowprox.studies.two_dimensional import TWO_DIMENSIONAL

__all__ = ["STUDIES", "StudyOptions", "run_study"]

STUDIES: dict[str, Study] = {
    "latent-norms": LATENT_NORMS,
    "solver-curves": SOLVER_CURVES,
    "latent-statistics": LATENT_STATISTICS,
    "noisy-norms": NOISY_NORMS,
    "perturbations": PERTURBATIONS,
    "landscapes": LANDSCAPES,
    "starts": STARTS,
    "two-dimensional": TWO_DIMENSIONAL,
}
"""Name -> study."""


@dataclass
class StudyOptions:
    """How a study is run.

    Arguments:
        scale: "smoke" (seconds), "small" (minutes on two cores) or "paper".
        flow: name, folder or hub id of the prior.
        images: what ``ImageDataset`` takes as source and split; image size and limit are those of the scale, the limit
            unless it is given.
        seed: of everything random.
        device: cpu, cuda or mps.
        console: for the progress; None is standard error.
    """

    scale: str = "small"
    flow: str = "glow-faces64"
    images: ImageOptions = field(default_factory=ImageOptions)
    seed: int = 0
    device: str = "cpu"
    console: Console | None = field(default=None, repr=False)


def run_study(name: str, out: str | Path, options: StudyOptions | None = None) -> list[dict[str, Any]]:
    """Run a study, or what is left of it, and draw its figures.

    Arguments:
        name: a key of ``STUDIES``.
        out: folder of the results; one that holds the same study, interrupted or not, is continued.
        options: scale, flow, images, seed, device.

    Returns:
        the records, in the order of the units.

    Raises:
        ValueError: an unknown name or scale (the message offers the nearest), too few images, a flow that is none, or a
            folder that holds another study.
        OSError: images or flow cannot be read, or the folder cannot be written.
    """
    options = options or StudyOptions()
    study = _known(name, STUDIES, "study")
    settings = _known(options.scale, study.scales, "scale")
    run, basis = _prepared(study, settings, options)
    units = study.units(run)
    ids = [_id({"study": name, **basis, **unit}) for unit in units]
    out = Path(out)
    _check_earlier(out, set(ids))
    console = options.console or Console(stderr=True)
    facts = {"study": name, "scale": options.scale, "seed": options.seed, "version": __version__}
    with (
        RecordWriter(out / "study.jsonl", resume=True) as writer,
        Progress(console=console, transient=True) as progress,
    ):
        done = {record["id"]: record for record in writer.records}
        task = progress.add_task(name, total=len(units), completed=len(done))
        for key, unit in zip(ids, units, strict=True):
            if key not in done:
                writer.write({"id": key, **facts, **unit, **study.measure(run, unit)})
                done[key] = writer.records[-1]
                progress.advance(task)
    records = [done[key] for key in ids]
    _write_figures(study, records, out)
    return records


def _prepared(study: Study, settings: Mapping[str, Any], options: StudyOptions) -> tuple[StudyRun, dict[str, Any]]:
    """What the study works on, and everything its records depend on."""
    basis: dict[str, Any] = {"settings": settings, "seed": options.seed}
    if not study.needs_flow:
        return StudyRun(settings, seed=options.seed, device=options.device), basis
    flow = load_model(options.flow, device=options.device)
    if not isinstance(flow, Flow):
        raise ValueError(f"flow {options.flow!r} is a {type(flow).__name__}, not a flow; see flowprox models")
    given = options.images
    source = [SAMPLES_FOLDER / "*.png"] if given.source == SAMPLES else given.source
    limit = given.limit or settings["n_images"]
    dataset = ImageDataset(source, settings["image_size"], given.split, channels=flow.n_channels, limit=limit)
    x = torch.stack([dataset[i]["x"] for i in range(len(dataset))]).to(options.device)
    needed = min(settings["n_images"], 3)
    if len(x) < needed:
        raise ValueError(f"the study needs {needed} images and {given.source} has {len(x)}; give a folder with more")
    if len(x) < settings["n_images"] and given.limit is None:
        print(
            f"the figure is made of {len(x)} images, {given.source} having no more; the study asks for {settings['n_images']}: "
            "give a folder with images.source",
            file=sys.stderr,
        )
    content = hashlib.blake2b(dataset.images.numpy().tobytes(), digest_size=8).hexdigest()
    names = [Path(name).stem if "[" not in name else Path(name).name for name in dataset.names]
    run = StudyRun(settings, flow.eval(), names, x, options.seed, options.device)
    return run, basis | {"flow": load_card(options.flow).sha256, "images": content}


def _check_earlier(out: Path, ids: set[str]) -> None:
    """Records of two studies in one file would be drawn as one."""
    if not any((out / name).exists() for name in ("study.jsonl", "study.jsonl.partial")):
        return
    if any(record.get("id") not in ids for record in read_records(out / "study.jsonl")):
        raise ValueError(
            f"{out} holds another study, or this one with other settings, images, flow or seed; choose another out"
        )


def _write_figures(study: Study, records: Sequence[Mapping[str, Any]], out: Path) -> None:
    folder = out / "figures"
    folder.mkdir(exist_ok=True)
    listed = {}
    for name, drawn in study.draw(records).items():
        with atomic_write(folder / f"{name}.png", "wb") as file:
            drawn.figure.savefig(file, format="png", dpi=130, metadata={"Software": None})
        listed[f"{name}.png"] = {"title": drawn.title, "caption": drawn.caption, "alt": drawn.alt}
    with atomic_write(folder / "figures.json", "w") as file:
        json.dump(listed, file, indent=2, ensure_ascii=False)
        file.write("\n")


def _known(name: str, known: Mapping[str, Any], kind: str) -> Any:
    if name not in known:
        raise ValueError(f"unknown {kind} {name!r}; {nearest(name, known)}")
    return known[name]


def _id(value: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=10).hexdigest()
