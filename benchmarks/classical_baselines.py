"""Tunes the classical baselines on validation images and measures them, and trained models, on test images.

    python benchmarks/classical_baselines.py --data "../shared/data/faces64" --problem deblurring --n-images 48

A baseline's free number (``regularization``) is chosen on images of the split ``val`` only: a grid with a factor 2
between values, extended while the best lies at an end, then a finer one around the best. The test images are touched
once per method, with the chosen number. One JSON line per method: what was chosen, every point of the grid, mean PSNR
and SSIM.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from deepinv.models import Reconstructor
from deepinv.physics import LinearPhysics
from torch import Tensor

from flowprox import __version__
from flowprox.baselines import BM3D, Biharmonic, TotalVariation, Wiener
from flowprox.checkpoints import load_model
from flowprox.data import ImageDataset
from flowprox.methods import SelfEnsemble
from flowprox.metrics import psnr, ssim
from flowprox.operators import PROBLEMS, make_physics, measure_each
from flowprox.records import RecordWriter


class Candidate(NamedTuple):
    """A method, and the middle of the grid for its free number (None: it has none)."""

    make: Callable[..., Reconstructor]
    start: float | None = None
    arguments: dict[str, Any] = {}  # noqa: RUF012


class Measurement(Reconstructor):
    """The measurement taken for the image: what doing nothing gives."""

    def forward(self, y: Tensor, physics: LinearPhysics) -> Tensor:  # type: ignore[override]
        return y


def total_variations(start: float, **arguments: Any) -> dict[str, Candidate]:
    return {
        "tv": Candidate(TotalVariation, start, arguments),
        "tv-separate-channels": Candidate(TotalVariation, start, {"couple_channels": False, **arguments}),
    }


# iterations and steps with which each problem converges (see TotalVariation)
CANDIDATES: dict[str, dict[str, Candidate]] = {
    "denoising": {
        "measurement": Candidate(Measurement),
        "bm3d": Candidate(BM3D),
        **total_variations(0.24, dual_step=0.05),
    },
    "inpainting": {
        "measurement": Candidate(Measurement),
        "biharmonic": Candidate(Biharmonic),
        **total_variations(6e-3, n_iterations=4000),
    },
    "deblurring": {
        "measurement": Candidate(Measurement),
        "wiener-identity": Candidate(Wiener, 4e-3, {"penalty": "identity"}),
        "wiener-gradient": Candidate(Wiener, 3e-3, {"penalty": "gradient"}),
        "wiener-laplacian": Candidate(Wiener, 2e-3, {"penalty": "laplacian"}),
        **total_variations(6e-4),
    },
}
CANDIDATES["random-inpainting"] = CANDIDATES["inpainting"]


class Images(NamedTuple):
    """Truth and measurement, in batches small enough for a processor's cache."""

    x: Tensor
    y: Tensor

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(self.x.split(size), self.y.split(size), strict=True)


def load(data: str, split: str, n: int, physics: LinearPhysics, seed: int) -> Images:
    """The first n images of a split; image i has the noise of its own seed, one million apart per run seed."""
    dataset = ImageDataset(data, split=split, limit=n)
    x = torch.stack([dataset[i]["x"] for i in range(len(dataset))])
    offset = {"val": 500_000, "test": 0}[split]
    return Images(x, measure_each(x, physics, [seed * 1_000_000 + offset + i for i in range(len(x))]))


def mean_psnr(method: Reconstructor, images: Images, physics: LinearPhysics, batch_size: int) -> float:
    return float(torch.cat([psnr(method(y, physics), x) for x, y in images.batches(batch_size)]).mean())


def tune(
    candidate: Candidate, images: Images, physics: LinearPhysics, batch_size: int
) -> tuple[float, dict[float, float]]:
    """The regularization with the highest mean PSNR on ``images``, and every value tried with its PSNR in dB."""
    assert candidate.start is not None
    tried: dict[float, float] = {}

    def score(value: float) -> float:
        if value not in tried:
            method = candidate.make(regularization=value, **candidate.arguments)
            tried[value] = mean_psnr(method, images, physics, batch_size)
        return tried[value]

    exponents = [-2, -1, 0, 1, 2]
    while True:
        best = max(exponents, key=lambda e: score(candidate.start * 2.0**e))
        if best == exponents[0] and best > -12:
            exponents.insert(0, best - 1)
        elif best == exponents[-1] and best < 12:
            exponents.append(best + 1)
        else:
            break
    fine = [candidate.start * 2.0 ** (best + step / 4) for step in (-3, -2, -1, 0, 1, 2, 3)]
    return max(fine, key=score), tried


def evaluate(method: Reconstructor, images: Images, physics: LinearPhysics, batch_size: int) -> dict[str, float]:
    psnrs, ssims, seconds = [], [], 0.0
    for x, y in images.batches(batch_size):
        start = time.perf_counter()
        with torch.no_grad():
            x_hat = method(y, physics)
        seconds += time.perf_counter() - start
        psnrs.append(psnr(x_hat, x))
        ssims.append(ssim(x_hat, x))
    values, n = torch.cat(psnrs), len(images.x)
    return {
        "psnr": float(values.mean()),
        "psnr_standard_error": float(values.std() / math.sqrt(n)) if n > 1 else 0.0,
        "ssim": float(torch.cat(ssims).mean()),
        "seconds_per_image": seconds / n,
    }


def models(names: list[str], problem: str) -> dict[str, Candidate]:
    """The trained models among ``names`` whose card names this problem; denoisers also averaged over the mirror image."""
    loaded = {name: load_model(name) for name in names}
    found = {name: model for name, model in loaded.items() if (model.card.problem or {}).get("name") == problem}
    candidates = {name: Candidate(lambda model=model: model) for name, model in found.items()}
    if problem == "denoising":
        candidates |= {
            f"{name}{_ENSEMBLE}": Candidate(lambda m=model: SelfEnsemble(m)) for name, model in found.items()
        }
    return candidates


_ENSEMBLE = ", self-ensemble"


def run(options: argparse.Namespace) -> None:
    out = Path(options.out)
    with RecordWriter(out) as writer:
        for problem in options.problem:
            physics = make_physics(problem)
            validation = load(options.data, "val", options.n_validation, physics, options.seed)
            test = load(options.data, "test", options.n_images, physics, options.seed)
            for name, candidate in {**CANDIDATES[problem], **models(options.models, problem)}.items():
                of_models = name.removesuffix(_ENSEMBLE) in options.models
                if options.methods and name not in options.methods and not of_models:
                    continue
                arguments, tried = dict(candidate.arguments), {}
                if candidate.start is not None:
                    arguments["regularization"], tried = tune(candidate, validation, physics, options.batch_size)
                method = candidate.make(**arguments)
                scores = evaluate(method, test, physics, options.batch_size)
                tuning = [{"regularization": value, "psnr": tried[value]} for value in sorted(tried)]
                writer.write(
                    {
                        "problem": problem,
                        "method": name,
                        "arguments": arguments,
                        **scores,
                        "n_images": len(test.x),
                        "split": "test",
                        "seed": options.seed,
                        "tuning": {"split": "val", "n_images": len(validation.x), "grid": tuning},
                        "version": __version__,
                    }
                )
                print(
                    f"{problem:18s} {name:22s} {scores['psnr']:7.3f} dB  SSIM {scores['ssim']:.4f}  "
                    f"{scores['seconds_per_image']:.3f} s/image  {arguments}",
                    flush=True,
                )
    print(f"wrote {out}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder or glob of shards or images with the splits val and test")
    parser.add_argument("--problem", nargs="+", default=["deblurring"], choices=sorted(set(CANDIDATES) & set(PROBLEMS)))
    parser.add_argument("--methods", nargs="*", default=[], help="only these; all by default")
    parser.add_argument("--models", nargs="*", default=[], help="trained models to measure on the same measurements")
    parser.add_argument("--n-images", type=int, default=48, help="test images")
    parser.add_argument("--n-validation", type=int, default=48, help="validation images the regularization is tuned on")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="classical_baselines.jsonl", help="JSON lines file to write")
    try:
        run(parser.parse_args(arguments))
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
