"""Whether samples of the shipped densities are honest: figures of docs/evidence/results.md, on test faces.

    python benchmarks/samples.py --faces '../shared/data/faces64/test-*.npz'

One column per network. Block means are of k x k pixels in three random directions; their ranks are tested by chi-squared over
images, with 19 samples each. An interval from the smallest to the largest of 19 samples should hold 90 %. Pixels that are
measured without noise are left out of it.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from flowprox import load_model, make_physics
from flowprox.data import ImageDataset
from flowprox.metrics import psnr
from flowprox.operators import measure_each
from flowprox.uncertainty import crps, rank_p_value, ranks, tarp, uniform_p_value
from flowprox.unfolding import ConditionalDensity

NETWORKS = ("denoising", "deblurring", "inpainting")
BLOCKS = (1, 4, 8, 16, 32, 64)


def directions(k: int, n: int = 3) -> Tensor:
    """(3 * 64 * 64, n) random directions that see means over blocks of k x k pixels."""
    coarse = torch.randn(n, 3, 64 // k, 64 // k, generator=torch.Generator().manual_seed(k))
    return coarse.repeat_interleave(k, 2).repeat_interleave(k, 3).flatten(1).T


def figures(name: str, images: Tensor, seed: int, n_samples: int) -> dict[str, str]:
    network = load_model(f"unfolded-{name}-faces64")
    density = ConditionalDensity(network, load_model(f"unfolded-{name}-faces64-intervals").density)
    physics = make_physics(name, (3, 64, 64), **network.card.problem["parameters"])
    generator = torch.Generator().manual_seed(seed)
    columns: dict[str, list[Tensor]] = {}
    for i, x in enumerate(images.split(25)):
        y = measure_each(x, physics, range(seed + 25 * i, seed + 25 * i + len(x)))
        bound = density.of(y, physics)
        samples = bound.sample(n_samples, generator)
        few, mean = samples[:19], samples.mean(0)
        errors = (x - bound.x_hat).square().flatten(1).mean(1)
        spread = samples.var(0).flatten(1).mean(1)
        below = (few < x).sum(0)
        free = few.std(0) > 0
        row = {
            "PSNR of the network": psnr(bound.x_hat, x),
            "PSNR of the mean of 16": psnr(samples[:16].mean(0), x),
            f"PSNR of the mean of {n_samples}": psnr(mean, x),
            "PSNR of one": psnr(samples[0], x),
            "CRPS": crps(few, x).flatten(1).mean(1),
            "mean absolute error of the network": (x - bound.x_hat).abs().flatten(1).mean(1),
            "coverage": ((below > 0) & (below < 19) & free).flatten(1).sum(1) / free.flatten(1).sum(1),
            "errors": errors,
            "spread": spread,
            "tarp": tarp(few, x, generator),
        }
        if not network.ends_with_data_step:
            row["nats per entry"] = bound.log_prob(x) / x[0].numel()
        row |= {f"ranks {k}": ranks(few.flatten(2) @ directions(k), x.flatten(1) @ directions(k)) for k in BLOCKS}
        for key, values in row.items():
            columns.setdefault(key, []).append(values)
    table = {key: torch.cat(values) for key, values in columns.items()}
    told = {key: f"{values.mean():.4f}" for key, values in table.items() if values.ndim == 1 and key not in ("tarp",)}
    told["5 % quantile of coverage"] = f"{table['coverage'].quantile(0.05):.4f}"
    told["variance of samples over squared errors"] = f"{table['spread'].mean() / table['errors'].mean():.3f}"
    told["p of TARP"] = f"{uniform_p_value(table['tarp']):.3g}"
    for k in BLOCKS:
        told[f"p of the ranks, blocks of {k}"] = " ".join(f"{rank_p_value(r, 19):.2g}" for r in table[f"ranks {k}"].T)
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--faces", required=True, help="test faces: folder, shard or glob")
    parser.add_argument("--limit", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0, help="of the noise and the samples")
    parser.add_argument("--n_samples", type=int, default=64)
    parser.add_argument("--networks", nargs="*", default=NETWORKS, choices=NETWORKS)
    given = parser.parse_args()
    images = ImageDataset(given.faces, 64).images[: given.limit].float() / 255
    for name in given.networks:
        for key, value in figures(name, images, given.seed, given.n_samples).items():
            print(f"{name:12}{key:45}{value}", flush=True)


if __name__ == "__main__":
    main()
