"""MNIST's digits as pictures to train a flow on, and digits drawn from that flow as noise (Whang et al. 2021, Sec. 5.1.1).

    python recipes/digits/digits.py pictures ../shared/data/mnist-t10k/t10k-images-idx3-ubyte.gz runs/digits/pictures
    flowprox train-flow --config recipes/digits/glow-digits32.yaml --out runs/glow-digits32
    python recipes/digits/digits.py draw runs/glow-digits32/model runs/digits/drawn-idx3-ubyte.gz --n 2000 --seed 0

The pictures are those of the split "train" of ``MNISTNoise``, 28x28 within 32x32. What is drawn is an idx file.
"""

from __future__ import annotations

import argparse
import gzip
import struct
from pathlib import Path

import torch
from PIL import Image

import flowprox
from flowprox.noise import MNISTNoise


def save_pictures(source: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, digit in enumerate(MNISTNoise(source, split="train").digits):
        Image.fromarray(torch.nn.functional.pad(digit, (2, 2, 2, 2)).numpy()).save(folder / f"{i:04}.png")


def draw(model: str, out: Path, n: int, seed: int, temperature: float) -> None:
    flow = flowprox.load_model(model)
    samples = flow.sample(n, temperature, generator=torch.Generator().manual_seed(seed))  # (n, 1, 32, 32)
    digits = (255 * samples[:, 0, 2:30, 2:30].clamp(0, 1)).round().byte()
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(gzip.compress(struct.pack(">4I", 0x0803, *digits.shape) + digits.numpy().tobytes(), mtime=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    pictures = commands.add_parser("pictures")
    pictures.add_argument("source", type=Path)
    pictures.add_argument("folder", type=Path)
    drawing = commands.add_parser("draw")
    drawing.add_argument("model")
    drawing.add_argument("out", type=Path)
    drawing.add_argument("--n", type=int, default=2000)
    drawing.add_argument("--seed", type=int, default=0)
    drawing.add_argument("--temperature", type=float, default=1.0)
    options = vars(parser.parse_args())
    {"pictures": save_pictures, "draw": draw}[options.pop("command")](**options)


if __name__ == "__main__":
    main()
