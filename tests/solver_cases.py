"""A Gaussian prior as a flow, whose posteriors are known in closed form, and small flows that are not Gaussian."""

from __future__ import annotations

import torch
from deepinv.physics import LinearPhysics
from helpers import dense_matrix
from torch import Tensor

from flowprox.flows import Conv1x1, Flow, Glow, HaarSqueeze, Sequential, Unsqueeze
from flowprox.operators import make_physics

SHAPE = (1, 4, 4)


def gaussian_flow() -> Flow:
    """g(z) = W z + 1/2 with a matrix W that differs from the identity; no log-determinant that varies."""
    mix = Conv1x1(4).double()
    with torch.no_grad():
        mix.lu += 0.3 * torch.randn_like(mix.lu)
    return Flow(Sequential([HaarSqueeze().double(), mix, Unsqueeze()]), SHAPE, n_levels=1)


def small_glow() -> Glow:
    """A flow with curved level sets: fresh, then moved away from the identity."""
    flow = Glow(SHAPE, n_levels=1, n_steps=3, hidden_channels=8).double()
    flow.initialize(torch.rand(16, *SHAPE, dtype=torch.float64))
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return flow


def operators() -> dict[str, LinearPhysics]:
    return {
        "denoising": make_physics("denoising", SHAPE, sigma=0.1),
        "inpainting": make_physics("inpainting", SHAPE, mask_size=2, sigma=0.1),
        "deblurring": make_physics("deblurring", SHAPE, sigma_blur=1.0, kernel_size=3, sigma=0.1),
        "compressed-sensing": make_physics("compressed-sensing", SHAPE, m=7, sigma=0.1),
    }


def affine(flow: Flow) -> tuple[Tensor, Tensor]:
    """(W, b) with g(z) = W z + b for a Gaussian flow."""
    with torch.no_grad():
        b = flow.decode(torch.zeros(1, 16, dtype=torch.float64)).flatten()
    return dense_matrix(lambda z: flow.decode(z.flatten(1)) - b.view(1, *SHAPE), SHAPE), b


def matrix(physics: LinearPhysics) -> Tensor:
    return dense_matrix(physics.A, SHAPE)
