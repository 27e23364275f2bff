"""What a flow is worth as a denoiser: shrinking the latent, a Wiener filter with the flow's spectrum, and ``FlowDenoiser``.

    python benchmarks/flow_denoiser.py --data FOLDER/val-*.npz [--flow glow-faces64] [--limit 8]

Prints a Markdown table of the mean PSNR in dB; for the shrinkage g(f(v) / (1 + w)) that of the best w > 0 of a grid.
"""

from __future__ import annotations

import argparse
import time

import torch

from flowprox.checkpoints import load_model
from flowprox.data import ImageDataset
from flowprox.metrics import psnr
from flowprox.priors import FlowDenoiser, FlowPrior

WEIGHTS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--flow", default="glow-faces64")
    parser.add_argument("--limit", type=int, default=8)
    parser.add_argument("--sigmas", type=float, nargs="+", default=[0.05, 0.1, 0.2])
    options = parser.parse_args()
    flow = load_model(options.flow)
    dataset = ImageDataset(options.data, limit=options.limit)
    x = torch.stack([dataset[i]["x"] for i in range(len(dataset))])
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    prior, denoisers = FlowPrior(flow), {n: FlowDenoiser(flow, n_steps=n) for n in (0, 20, 40)}
    print("| sigma | noisy | shrinkage, best w | Wiener filter | 20 steps | 40 steps | s per image, 40 steps |")
    print("|---|---|---|---|---|---|---|")
    for sigma in options.sigmas:
        v = x + sigma * noise
        shrunk = max((float(psnr(prior.prox(v, gamma=w), x).mean()), w) for w in WEIGHTS)
        cells = [f"{sigma}", f"{float(psnr(v, x).mean()):.2f}", f"{shrunk[0]:.2f} ({shrunk[1]:g})"]
        seconds = 0.0
        for denoiser in denoisers.values():
            start = time.perf_counter()
            cells.append(f"{float(psnr(denoiser(v, sigma), x).mean()):.2f}")
            seconds = time.perf_counter() - start
        print("| " + " | ".join([*cells, f"{seconds / len(x):.2f}"]) + " |", flush=True)


if __name__ == "__main__":
    main()
