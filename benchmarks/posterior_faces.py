"""Exact correction on real faces: importance weights of a density's samples, and chains with jumps to them.

    python benchmarks/posterior_faces.py --faces ../shared/data/faces64 --size 32 --problem denoising

The prior is ``glow-faces64``, which takes any size; faces of 32x32 are the middles of those of 64x64. The proposal is the
density of a shipped network's errors, trained here for the problem. Hamiltonian chains start from its samples, move in the
coordinates of the Gauss-Newton Hessian ("dense") or with a scale for each latent ("scales"), and try to jump to a sample after
each draw. Inpainting has no proposal, for its network ends with a data step: chains start from the prior.
"""

from __future__ import annotations

import argparse
import time
from typing import Literal

import torch
from torch import Tensor

from flowprox import load_model, make_physics
from flowprox.data import ImageDataset
from flowprox.metrics import psnr
from flowprox.operators import measure_each
from flowprox.solvers import PosteriorSampling, SamplerOptions, importance_samples
from flowprox.uncertainty import measured_estimates
from flowprox.unfolding import ConditionalDensity, fit_density

PROBLEMS = {
    "denoising": ({"sigma": 0.1}, "unfolded-denoising-range-faces64"),
    "inpainting": ({"mask_size": 16, "sigma": 0.1}, "unfolded-inpainting-range-faces64"),
}


def middles(source: str, size: int, first: int, n: int) -> Tensor:
    edge = (64 - size) // 2
    images = ImageDataset(source, 64).images[first : first + n, :, edge : edge + size, edge : edge + size]
    return images.float() / 255


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--faces", required=True, help="folder with train-000.npz and test-000.npz")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--problem", default="denoising", choices=PROBLEMS)
    parser.add_argument("--first", type=int, default=0, help="test face to begin with")
    parser.add_argument("--limit", type=int, default=1, help="test faces")
    parser.add_argument("--n_training", type=int, default=1000, help="faces that train the proposal")
    parser.add_argument("--n_steps", type=int, default=400, help="of training it")
    parser.add_argument("--n_warmup", type=int, default=60)
    parser.add_argument("--n_samples", type=int, default=100)
    parser.add_argument("--n_leapfrog", type=int, default=16)
    parser.add_argument("--coordinates", default="dense", choices=["dense", "scales"])
    given = parser.parse_args()
    parameters, name = PROBLEMS[given.problem]
    flow, network = load_model("glow-faces64"), load_model(name)
    physics = make_physics(given.problem, (3, given.size, given.size), **parameters)
    density = None
    if not network.ends_with_data_step:
        x = middles(f"{given.faces}/train-000.npz", given.size, 0, given.n_training)
        digits = (torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) - 0.5) / 255
        measured = zip(measured_estimates(network, x, physics, range(len(x))), digits.split(32), strict=True)
        density = fit_density(
            [(one + part, y, x_hat) for (one, y, x_hat), part in measured], physics, n_steps=given.n_steps
        )
    precondition: bool | Literal["dense"] = "dense" if given.coordinates == "dense" else True
    options = SamplerOptions(n_leapfrog=given.n_leapfrog, precondition=precondition)
    sampling = PosteriorSampling(flow, n_samples=given.n_samples, n_warmup=given.n_warmup, options=options)
    torch.manual_seed(0)  # of the proposal's samples
    for i in range(given.first, given.first + given.limit):
        x = middles(f"{given.faces}/test-000.npz", given.size, i, 1)
        y = measure_each(x, physics, [i])
        x_hat = network(y, physics)
        proposal = None if density is None else ConditionalDensity(network, density).of(y, physics)
        if proposal is not None:
            weighted = importance_samples(flow, y, physics, proposal, n=500)
            print(
                f"face {i}: weights of 500: k-hat {weighted.k_hat.item():.2f}, ESS {weighted.ess.item():.1f}, "
                f"log p(y) {weighted.log_evidence.item():.0f}, log weights vary by {weighted.log_ratios.std().item():.0f}",
                flush=True,
            )
        started = time.perf_counter()
        solution = sampling.solve(y, physics, proposal=proposal)
        error = (solution.mean - x).square().mean().sqrt()
        print(
            f"face {i}: chains: R-hat {solution.r_hat.item():.3f}, ESS {solution.ess.item():.0f}, "
            f"acceptance {solution.acceptance.item():.2f}, jumps {solution.jumps.item():.3f}, "
            f"step {solution.step_size.item():.3f}, "
            f"PSNR of the mean {psnr(solution.mean, x).item():.2f} (network {psnr(x_hat, x).item():.2f}), "
            f"deviation over error {(solution.std.square().mean().sqrt() / error).item():.2f}, "
            f"{time.perf_counter() - started:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
