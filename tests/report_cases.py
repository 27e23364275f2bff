"""Results folders made for tests of the report."""

from __future__ import annotations

import html.parser
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from flowprox.data import save_image
from flowprox.evaluation.report import picture_path, truth_path
from flowprox.records import RecordWriter

NASTY = '<script>alert("x")</script> & $a_b$ ../up'
"""Text that is markup, a formula and a path."""

GAINS = {"measurement": 0.0, "bm3d": 5.0, "flow": 7.5}


class Tags(html.parser.HTMLParser):
    """Collects tags and text; complains about a tag that is not closed."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def make_records(
    problems: Mapping[str, Mapping[str, Any]] | None = None,
    gains: Mapping[str, float] = GAINS,
    images: Sequence[str] = ("face", "cat", "dog"),
    **others: Any,
) -> list[dict[str, Any]]:
    """Records as an evaluation writes them: image i has 20 + i dB plus the gain of the method."""
    problems = problems or {"denoising": {"sigma": 0.2}}
    return [
        {
            "problem": problem,
            "problem_name": "denoising",
            "parameters": dict(parameters),
            "method": method,
            "method_name": method,
            "options": {},
            "tuned": {},
            "image": image,
            "seed": i,
            "run_seed": 0,
            "recipe": "made",
            "version": "1",
            "psnr": 20.0 + i + gain,
            "ssim": 0.5 + 0.01 * gain,
            "residual": 0.1,
            "seconds": 0.25 + gain,
            **others,
        }
        for problem, parameters in problems.items()
        for method, gain in gains.items()
        for i, image in enumerate(images)
    ]


def write_results(folder: Path, records: Sequence[Mapping[str, Any]], n_pictures: int = 2) -> Path:
    """A results folder with these records and random pictures of the first images."""
    (folder / "images").mkdir(parents=True)
    with RecordWriter(folder / "records.jsonl") as writer:
        for record in records:
            writer.write(record)
    for image in list(dict.fromkeys(record["image"] for record in records))[:n_pictures]:
        save_image(torch.rand(3, 12, 12), truth_path(folder, image))
        for record in records:
            if record["image"] == image and "failed" not in record:
                save_image(torch.rand(3, 12, 12), picture_path(folder, record["problem"], image, record["method"]))
    return folder


def write_figures_of_a_study(folder: Path, captions: Mapping[str, Any] | None = None) -> Path:
    """A folder with drawn figures only."""
    figures = folder / "figures"
    figures.mkdir(parents=True)
    (figures / "norm.svg").write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"><path d="M0 0h9"/></svg>'
    )
    save_image(torch.rand(3, 12, 12), figures / "landscape.png")
    if captions is not None:
        (figures / "figures.json").write_text(json.dumps(captions))
    return folder
