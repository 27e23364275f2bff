"""What the scripts of the gallery share: the command line, images and their measurements, numbers, figures."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepinv.physics import LinearPhysics, Physics
from matplotlib.figure import Figure
from torch import Tensor

from flowprox.checkpoints import load_card, load_model
from flowprox.data import ImageDataset
from flowprox.files import atomic_write, sole_writer
from flowprox.flows import Flow
from flowprox.operators import make_physics, measure_each
from flowprox.reconstruction import image_seed
from flowprox.records import RecordWriter
from flowprox.samples import SAMPLES_FOLDER

Record = Mapping[str, Any]


@dataclass
class Scene:
    """What a script works on; ``settings`` are the numbers of its scale, ``x`` the images (B, C, H, W) in [0, 1]."""

    name: str
    out: Path
    scale: str
    settings: Mapping[str, Any]
    seed: int
    device: str
    basis: Mapping[str, Any]
    flow: Flow
    image_names: Sequence[str]
    x: Tensor

    def generator(self, *key: int) -> torch.Generator:
        """Random numbers that depend on the seed and the key only, the same on every device."""
        seed = self.seed
        for number in key:
            seed = (seed * 1_000_003 + number) % 2**63
        return torch.Generator().manual_seed(seed)

    def generators(self) -> list[torch.Generator]:
        """A source of random numbers for each image, which depends on the seed and the image's name."""
        return [torch.Generator().manual_seed(image_seed(self.seed, name)) for name in self.image_names]

    def measured(self, problem: str, **parameters: Any) -> tuple[Tensor, Physics]:
        """(y, physics) of the images; the noise of an image depends on the seed and its name."""
        channels, height, width = self.x.shape[1:]
        physics = make_physics(problem, (channels, height, width), seed=self.seed, device=self.device, **parameters)
        assert isinstance(physics, LinearPhysics)
        return measure_each(self.x, physics, [image_seed(self.seed, name) for name in self.image_names]), physics

    def numbers(self, units: Sequence[Record], measure: Callable[[Scene, Record], Record]) -> list[dict[str, Any]]:
        """One record per unit, from OUT/NAME.jsonl where it stands there; an interrupted script goes on."""
        ids = [_digest({"figure": self.name, **self.basis, **unit}) for unit in units]
        facts = {"figure": self.name, "scale": self.scale, "seed": self.seed}
        path = self.out / f"{self.name}.jsonl"
        with sole_writer(self.out), RecordWriter(path, resume=True) as writer:
            done = {record.get("id"): record for record in writer.records}
            if not done.keys() <= set(ids):
                raise SystemExit(f"{path} holds another run (scale, images, flow or seed differ); choose another --out")
            for key, unit in zip(ids, units, strict=True):
                if key not in done:
                    writer.write({"id": key, **facts, **unit, **measure(self, unit)})
                    print(f"{self.name}: {len(writer.records)} of {len(units)}", file=sys.stderr)
            return sorted(writer.records, key=lambda record: ids.index(record["id"]))

    def save(self, figure: Figure, title: str, caption: str, alt: str, name: str | None = None) -> None:
        """OUT/figures/NAME.png, and its words in figures.json, which ``flowprox report OUT`` shows beside it."""
        folder, file_name = self.out / "figures", f"{name or self.name}.png"
        folder.mkdir(exist_ok=True)
        with atomic_write(folder / file_name, "wb") as file:
            figure.savefig(file, format="png", dpi=130, metadata={"Software": None})
        words = folder / "figures.json"
        listed = json.loads(words.read_text(encoding="utf-8")) if words.exists() else {}
        listed[file_name] = {"title": title, "caption": caption, "alt": alt}
        with atomic_write(words, "w") as file:
            json.dump(listed, file, indent=2, ensure_ascii=False)
            file.write("\n")
        print(folder / file_name)


def scene_of(
    name: str, scales: Mapping[str, Mapping[str, Any]], arguments: Sequence[str] | None = None, needs_flow: bool = True
) -> Scene:
    """The scene that the command line asks for."""
    parser = argparse.ArgumentParser(description=(sys.modules["__main__"].__doc__ or name).strip().splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gallery") / name, help="folder of figure and numbers")
    parser.add_argument(
        "--scale", choices=scales, default="small", help="seconds, minutes on two cores, or the paper's"
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps")
    if needs_flow:
        parser.add_argument("--flow", default="glow-faces64", help="the prior: a shipped model or a folder")
        parser.add_argument(
            "--images", default=SAMPLES_FOLDER / "*.png", help="a folder; by default pictures that ship"
        )
        parser.add_argument(
            "--split", choices=("all", "train", "val", "test"), default="all", help="part of the images"
        )
        parser.add_argument("--limit", type=int, help="so many images; by default the scale's number")
    given = parser.parse_args(arguments)
    settings = scales[given.scale]
    basis: dict[str, Any] = {"settings": settings, "seed": given.seed}
    fixed = name, given.out, given.scale, settings, given.seed, given.device
    if not needs_flow:
        return Scene(*fixed, basis, Flow.__new__(Flow), (), torch.empty(0))
    flow = load_model(given.flow, device=given.device)
    if not isinstance(flow, Flow):
        parser.error(f"--flow {given.flow} is a {type(flow).__name__}, not a flow; see flowprox models")
    limit = given.limit or settings["n_images"]
    data = ImageDataset(given.images, settings["image_size"], given.split, channels=flow.n_channels, limit=limit)
    if len(data) < min(settings["n_images"], 3):
        parser.error(f"--images {given.images} has {len(data)} images; the figure needs 3 or more")
    if len(data) < settings["n_images"] and given.limit is None:
        print(f"{len(data)} images, where {given.scale} takes {settings['n_images']}; see --images", file=sys.stderr)
    x = torch.stack([data[i]["x"] for i in range(len(data))]).to(given.device)
    content = hashlib.blake2b(data.images.numpy().tobytes(), digest_size=8).hexdigest()
    names = [Path(name).stem if "[" not in name else Path(name).name for name in data.names]
    return Scene(*fixed, basis | {"flow": load_card(given.flow).sha256, "images": content}, flow.eval(), names, x)


def new_figure(
    n_columns: int = 1, n_rows: int = 1, width: float = 4.2, height: float = 3.2
) -> tuple[Figure, list[Any]]:
    """A figure and its axes, row by row, without the upper and right frame; made without a display."""
    figure = Figure(figsize=(width * n_columns, height * n_rows), layout="constrained")
    axes = list(figure.subplots(n_rows, n_columns, squeeze=False).flat)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def rounded(values: Tensor | float | Sequence[Any], digits: int = 6) -> Any:
    """A number, or nested lists, with so many significant digits, for records that stay small."""
    listed: Any = values.tolist() if isinstance(values, Tensor) else values
    if isinstance(listed, list | tuple):
        return [rounded(item, digits) for item in listed]
    return float(f"{listed:.{digits}g}")


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=10).hexdigest()
