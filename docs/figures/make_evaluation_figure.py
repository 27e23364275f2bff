"""Draws a picture from a finished evaluation: for one image, a row per problem, the truth and each method in it.

flowprox evaluate --config recipes/evaluate/readme.yaml --out runs/readme
python docs/figures/make_evaluation_figure.py runs/readme astronaut docs/figures/without-training.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from urllib.parse import quote

import matplotlib.pyplot as plt
from matplotlib.image import imread


def main(folder: Path, image: str, out: Path) -> None:
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    shown = [record for record in records if record["image"] == image]
    problems = list(dict.fromkeys(record["problem"] for record in shown))
    rows = [[record for record in shown if record["problem"] == problem] for problem in problems]
    width = 1 + max(map(len, rows))
    figure, axes = plt.subplots(
        len(rows), width, figsize=(1.9 * width, 2.25 * len(rows)), layout="constrained", squeeze=False
    )
    for line, problem, row in zip(axes, problems, rows, strict=True):
        line[0].imshow(imread(folder / "images" / f"{image}.png"), interpolation="nearest")
        line[0].set_title("truth", fontsize=9)
        line[0].set_ylabel(problem, fontsize=8)
        for axis, record in zip(line[1:], row, strict=False):
            axis.imshow(
                imread(
                    folder / "images" / f"{quote(problem, safe='')}--{image}--{quote(record['method'], safe='')}.png"
                ),
                interpolation="nearest",
            )
            axis.set_title(f"{record['method']}\n{record['psnr']:.1f} dB", fontsize=9)
        for axis in line:
            axis.set(xticks=[], yticks=[])
        for axis in line[1 + len(row) :]:
            axis.set_visible(False)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
