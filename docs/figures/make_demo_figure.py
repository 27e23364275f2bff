"""Draws the picture of the README from a finished demo.

    flowprox demo --out flowprox-demo && python docs/figures/make_demo_figure.py flowprox-demo docs/figures/demo.png

One row per problem: truth, measurement, classical method, unfolded flow, for one of the bundled portraits.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.image import imread

IMAGE = "astronaut"
TITLES = {"bm3d": "BM3D", "tv": "total variation", "biharmonic": "biharmonic", "measurement": "measurement"}


def main(folder: Path, out: Path) -> None:
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    shown = [record for record in records if record["image"] == IMAGE]
    problems = list(dict.fromkeys(record["problem"] for record in shown))
    figure, axes = plt.subplots(len(problems), 4, figsize=(8, 2.25 * len(problems)), layout="constrained")
    for row, problem in zip(axes, problems, strict=True):
        row[0].imshow(imread(folder / "images" / f"{IMAGE}.png"), interpolation="nearest")
        row[0].set_title("truth", fontsize=9)
        row[0].set_ylabel(problem.split("-")[0], fontsize=10)
        for axis, record in zip(row[1:], [r for r in shown if r["problem"] == problem], strict=True):
            path = folder / "images" / f"{problem}--{IMAGE}--{record['method']}.png"
            axis.imshow(imread(path), interpolation="nearest")
            axis.set_title(f"{TITLES.get(record['method'], 'unfolded flow')}, {record['psnr']:.1f} dB", fontsize=9)
        for axis in row:
            axis.set(xticks=[], yticks=[])
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
