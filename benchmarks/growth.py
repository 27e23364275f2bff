"""How time and memory grow with the size of the image and of the batch: plain and fast path beside each other.

    OMP_NUM_THREADS=2 python benchmarks/growth.py --preset paper --image-sizes 64 128 256 512 --batch-sizes 1 2 4 8
    python benchmarks/growth.py --preset paper --device cuda --batch-sizes 16 64 256 --out runs/growth-gpu

Sizes at batch 1, batches at 64x64: "forward", and "likelihood step" with the peak of its memory above weights and gradients.
The plain path is left out above ``--plain-pixels``, where its activations fill the memory. It writes ``growth.jsonl`` and
``growth.png``. Growth with depth and folds: ``memory.py``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import speed
import torch

from flowprox.files import atomic_write

CONTENDERS = ("plain", "fast", "fast, bf16")


def points(options: argparse.Namespace) -> list[tuple[int, int]]:
    """(image size, batch size) of every point."""
    found = [(size, 1) for size in options.image_sizes] + [(64, batch) for batch in options.batch_sizes]
    return sorted(set(found))


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of ``speed.py`` for every point."""
    rows = []
    for size, batch in points(options):
        names = [name for name in CONTENDERS if name != "plain" or batch * size**2 <= options.plain_pixels]
        arguments = ["--preset", options.preset, "--device", options.device, "--clock", options.clock]
        arguments += ["--image-size", str(size), "--batch-size", str(batch), "--repeats", str(options.repeats)]
        arguments += ["--only", "forward", "likelihood step", "--contenders", *names]
        rows += speed.records(speed.parser().parse_args(arguments), torch.device(options.device))[1:]
    return rows


def figure(rows: list[dict[str, Any]], path: Path) -> None:
    """Seconds of a forward pass, seconds and memory of a training step against size; memory against batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = [
        ("forward", "image_size", "seconds_per_image", "forward, s"),
        ("likelihood step", "image_size", "seconds_per_image", "likelihood step, s"),
        ("likelihood step", "image_size", "peak_mib", "likelihood step, MiB"),
        ("likelihood step", "batch_size", "peak_mib", "likelihood step, MiB"),
    ]
    fig, axes = plt.subplots(1, 4, figsize=(13, 3.3), layout="constrained")
    for axis, (task, against, key, label) in zip(axes, panels, strict=True):
        fixed = "batch_size" if against == "image_size" else "image_size"
        value = 1 if against == "image_size" else 64
        for name, marker in zip(CONTENDERS, "os^", strict=True):
            chosen = [r for r in rows if (r["task"], r["contender"], r[fixed]) == (task, name, value)]
            if chosen:
                axis.plot(*zip(*sorted((r[against], r[key]) for r in chosen), strict=True), marker=marker, label=name)
        axis.set_xscale("log", base=2)
        axis.set(xlabel=against.replace("_", " "), ylabel=label, yscale="log")
        values = sorted({r[against] for r in rows if r[fixed] == value})
        axis.set_xticks(values, [str(v) for v in values])
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    with atomic_write(path) as file:
        fig.savefig(file, format="png", dpi=130)
    plt.close(fig)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a row per point and contender."""
    lines = [
        "| image | batch | path | forward, ms per image | likelihood step, ms per image | peak, MiB |",
        "|---|---|---|---|---|---|",
    ]
    steps = {(r["image_size"], r["batch_size"], r["contender"]): r for r in rows if r["task"] == "likelihood step"}
    for r in rows:
        key = (r["image_size"], r["batch_size"], r["contender"])
        if r["task"] == "forward":
            times = [f"{1e3 * row['seconds_per_image']:.0f}" for row in (r, steps[key])]
            lines.append("| " + " | ".join([*map(str, key), *times, f"{steps[key]['peak_mib']:.0f}"]) + " |")
    return "\n".join(lines)


def run(options: argparse.Namespace) -> None:
    """Measure, write, print."""
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    rows = measure(options)
    with atomic_write(out / "growth.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    figure(rows, out / "growth.png")
    print(table(rows))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="paper")
    parser.add_argument("--image-sizes", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument(
        "--plain-pixels", type=int, default=128**2 * 2, help="most pixels of a batch for the plain path"
    )
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--clock", default="wall")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", default="runs/growth", help="folder of growth.jsonl and growth.png")
    try:
        run(parser.parse_args(arguments))
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
