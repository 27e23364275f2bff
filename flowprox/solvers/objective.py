r"""What the MAP solvers minimize: the misfit of the measurement and a weight times a prior, over z or over x.

    F = misfit(y - A x) + weight * prior,      x = g(z)

    misfit    ||r||^2                                     Asim et al. 2020
              -log p_noise(r)                             Whang et al. 2021
    prior     "unsquared"  ||z||                          Asim, Eq. (2)
              "squared"    ||z||^2                        Asim, Eq. (4) of their appendix
              "normal"     -log N(z; 0, I)                Whang without the log-determinant
              "density"    -log p(x) = -log N(z; 0, I) + log|det Dg(z)|         Asim, Eqs. (1), (3); Whang, Eqs. (3), (4)
    weight    gamma (Asim), the smoothing parameter beta (Whang, Eq. (10)); 0 is the MLE (Whang, Eq. (5))

Symbols: z latent (B, D), g flow from latent to image x (B, C, H, W), y measurement, A operator. F is one number per image.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from flowprox.graphs import Replayed
from flowprox.noise import residual_p_value
from flowprox.solvers.optimizers import Optimizer, Trace
from flowprox.solvers.problem import LatentProblem, Solution, SolverInterrupted, Start

SPACES = ("latent", "image")

Callback = Callable[[int, int], object]
"""Called with the number of evaluations done and of those there will be at most."""


@dataclass
class Objective:
    """F and its gradient, as the optimizers call it.

    Arguments:
        problem: flow, operator and measurements.
        misfit: residual (B, ...) to (B,).
        weight: of the prior, a number or one per image (B,).
        prior: "unsquared", "squared", "normal" or "density"; a decoder has only the first three.
        space: what is minimized over, u: the latent z (B, D), or "image", x with its pixels in a row (B, D).
        scales: the diagonal the optimizer begins with, (B, D) or None; decides how the start z = 0 of "unsquared" is left.
        callback: see ``Callback``.
        n_evaluations: at most, for the callback.
        count: numbers the evaluations, those of selected images too.
        at_kink: whether the next evaluation is the first, where ||z|| may have no gradient.
    """

    problem: LatentProblem
    misfit: Callable[[Tensor], Tensor]
    weight: float | Tensor
    prior: str
    space: str = "latent"
    scales: Tensor | None = None
    callback: Callback | None = None
    n_evaluations: int = 0

    count: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    at_kink: bool = False

    def __post_init__(self) -> None:
        self.replayed = Replayed(self.with_gradient)

    def start(self, start: Start, seed: int, n_restarts: int = 1) -> Tensor:
        """Where the descent begins, (B, D); see ``LatentProblem.latents``."""
        z = self.problem.latents(start, seed, n_restarts)
        return self.problem.decode(z).flatten(1) if self.space == "image" else z

    def minimize(self, optimizer: Optimizer, u: Tensor) -> Trace:
        """Minimize from u (B, D). On a GPU the evaluation is recorded once per block of images that is left, and replayed."""
        self.replayed = Replayed(self.with_gradient)  # with the present weight
        self.at_kink = self.prior == "unsquared" and bool((torch.as_tensor(self.weight) > 0).any())
        return optimizer.minimize(self, u, self.scales)

    def solution(self, trace: Trace, gamma: Tensor | None = None) -> Solution:
        """What the solver returns; raises ``SolverInterrupted`` with it after Ctrl-C."""
        x = self.image(trace.z)
        z = self.problem.flow.encode(x) if self.space == "image" else trace.z
        y = self.problem.y[:: len(self.problem.y) // len(x)]  # of the best restarts
        p_value = residual_p_value(x, y, self.problem.physics)
        facts = (trace.losses, trace.reasons, trace.n_evaluations, gamma, trace.restarts, trace.norms, p_value)
        if trace.interrupted:
            raise SolverInterrupted(Solution(x, z, *facts))
        return Solution(x, z, *facts)

    def value(self, u: Tensor) -> Tensor:
        """F (B,) at u (B, D), differentiable."""
        problem, z, logdet = self.problem, u, 0.0
        if self.space == "image":
            x = problem.as_images(u)
            z, back = problem.flow(x)
            logdet = -back if self.prior == "density" else 0.0
        elif self.prior == "density":
            x, logdet = problem.flow.inverse_image(problem.as_images(u))
        else:
            x = problem.decode(u)
        if self.prior == "unsquared":  # Asim, Eq. (2): ||z||
            prior = torch.linalg.vector_norm(z, dim=1)
        elif self.prior == "squared":  # Asim, Eq. (4): ||z||^2
            prior = z.square().sum(dim=1)
        else:  # Asim, Eqs. (1), (3); Whang, Eq. (4): -log p(x) = -log N(z; 0, I) + log|det Dg(z)|
            prior = 0.5 * (z.square().sum(dim=1) + z.shape[1] * math.log(2 * math.pi)) + logdet
        # Asim, Eqs. (1) to (4): ||y - A x||^2 + gamma prior
        # Whang, Eqs. (3), (4): -log p_noise(y - A x) - log p(x); Eq. (5) with the weight 0, Eq. (10) with beta
        return self.misfit(self.problem.residual(x)) + self.weight * prior

    def image(self, u: Tensor) -> Tensor:
        """x (B, C, H, W)."""
        return self.problem.as_images(u) if self.space == "image" else self.problem.decode(u)

    def with_gradient(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """F (B,) and its gradient (B, D), by the same kernels whatever the values."""
        with torch.enable_grad():
            u = u.detach().requires_grad_(True)
            value = self.value(u)
            (gradient,) = torch.autograd.grad(value.sum(), u)
        return value.detach(), gradient

    def __call__(self, u: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = (self.replayed if u.is_cuda else self.with_gradient)(u)
        if self.at_kink:
            self.at_kink = False  # torch gives ||z|| the gradient 0 there
            gradient = torch.where((u == 0).all(dim=1, keepdim=True), self._out_of_the_kink(gradient), gradient)
        if self.callback is not None:
            self.callback(min(next(self.count), self.n_evaluations), self.n_evaluations)
        return value, gradient

    def select(self, images: Tensor) -> Objective | None:
        """The objective of some images of the batch (their indices); None where it cannot be taken apart."""
        if not self.problem.is_separable(self.misfit):
            return None
        weight = self.weight[images] if isinstance(self.weight, Tensor) and self.weight.ndim else self.weight
        return replace(self, problem=self.problem.select(images), weight=weight, scales=None)

    def _out_of_the_kink(self, gradient: Tensor) -> Tensor:
        """At z = 0, where gamma ||z|| has no gradient, the descent along -S v takes the subgradient v of least v S v.

        That is v = (1 + S / mu)^-1 grad with ||v - grad|| = gamma; any other may point uphill.
        """
        gamma = torch.as_tensor(self.weight).to(gradient).expand(len(gradient))
        scales = torch.ones_like(gradient) if self.scales is None else self.scales
        length = torch.linalg.vector_norm(gradient, dim=1)
        excess = (length / gamma - 1).nan_to_num(0.0).clamp_min(0)[:, None]  # all of the subgradient is 0 without
        low, high = (excess * end for end in (scales.amin(1, keepdim=True), scales.amax(1, keepdim=True)))
        for _ in range(60):
            mu = low.sqrt() * high.sqrt()
            far = torch.linalg.vector_norm(gradient / (1 + mu / scales), dim=1, keepdim=True) > gamma[:, None]
            low, high = torch.where(far, mu, low), torch.where(far, high, mu)
        return gradient / (1 + scales / high)


def squared_error(residual: Tensor) -> Tensor:
    """||r||^2 per image, for complex measurements too."""
    return residual.abs().square().flatten(1).sum(dim=1)
