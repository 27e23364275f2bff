r"""MAP with any noise that has a density and any differentiable operator (Whang et al. 2021).

    MAP:     min_z  -log p_noise(y - A(g(z))) - beta log p(g(z))         prior with a density: a flow
    latent:  min_z  -log p_noise(y - A(g(z))) - beta log N(z; 0, I)      the same without the log-determinant
    MLE:     min_z  -log p_noise(y - A(G(z)))                            beta = 0: a GAN's or VAE's decoder G

Symbols: y measurement, A any differentiable operator, p_noise density of the noise, g = f^-1 a flow from latent z (B, D)
to image x = g(z) (B, C, H, W) with log p(g(z)) = log N(z; 0, I) - log|det Dg(z)|, beta the smoothing parameter. With
Gaussian noise the MAP is Asim et al.'s image-space objective (gamma = 2 sigma^2 beta), the latent form theirs in latent
space with the squared norm (gamma = sigma^2 beta), and so is the MAP where the determinant is constant; the MLE is the
objective of Bora et al.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import deepinv
import torch
from deepinv.models import Reconstructor
from deepinv.physics import Physics
from torch import Tensor, nn

from flowprox.flows import Flow, frozen
from flowprox.solvers.optimizers import LBFGS, Optimizer
from flowprox.solvers.problem import LatentProblem, Start, noise_density
from flowprox.solvers.solution import Solution, SolverInterrupted

__all__ = ["NoiseMAP"]


class NoiseMAP(Reconstructor):
    r"""The most likely image under a flow prior and a noise density (Whang et al. 2021, Eqs. 3 to 5).

        z_hat = argmin_z -log p_noise(y - A(g(z))) - beta log p(g(z)),   x_hat = g(z_hat)

    References:
        Whang, Lei, Dimakis 2021, Solving inverse problems with a flow-based noise model,
        https://arxiv.org/abs/2003.08089, Eqs. (3), (4) (MAP), (5) (MLE); beta: Eq. (10).

    Arguments:
        flow: the prior: a flow, or for the MLE a decoder, any module that maps (B, latent_size) to images and has
            ``latent_size`` and ``image_shape``. Left as it is.
        noise: density of the noise, anything with ``log_prob(residual) -> (B,)``: a member of ``flowprox.noise``, a
            trained flow among them. None takes ``physics.noise_model``.
        beta: weight of the prior's log-density, at least 0. 1 is Bayes' rule; less trusts the prior less.
        form: "image", as published, or "latent", without the log-determinant; a decoder that is no flow has none.
        start: see ``LatentMAP``; for a decoder, "zero" or the standard deviation of random latents.
        n_restarts: random starts per image, of which the best objective wins; needs a positive number as start.
        optimizer: ``LBFGS`` or ``Adam`` (the published one).
        seed: of the starts.

    Raises:
        ValueError: beta negative, or above 0 in the image form for a decoder; a noise without a density; on call: a
            measurement, operator, noise or flow that do not fit.
        SolverInterrupted: Ctrl-C; its ``solution`` holds what is finished.

    Example:
        >>> from flowprox.flows import Flow, HaarSqueeze, Sequential, Unsqueeze
        >>> from flowprox.noise import GaussianNoise
        >>> from flowprox.operators import make_physics
        >>> flow = Flow(Sequential([HaarSqueeze(), Unsqueeze()]), (1, 4, 4), n_levels=1)  # a Gaussian prior around 1/2
        >>> y = torch.ones(1, 1, 4, 4)
        >>> x_hat = NoiseMAP(flow, GaussianNoise(1.0))(y, make_physics("denoising", (1, 4, 4)))
        >>> round(x_hat.mean().item(), 4)  # half way from 1/2 to 1
        0.75
    """

    def __init__(
        self,
        flow: nn.Module,
        noise: Any = None,
        beta: float = 1.0,
        form: str = "image",
        start: Start = "zero",
        n_restarts: int = 1,
        optimizer: Optimizer | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        has_density = isinstance(flow, Flow)
        if not 0 <= beta < float("inf"):
            raise ValueError(f"beta must be finite and at least 0, got {beta}")
        if form not in ("image", "latent"):
            raise ValueError(f"form must be 'image' or 'latent', got {form!r}")
        if not has_density and beta > 0 and form == "image":
            raise ValueError(
                f"{type(flow).__name__} has no density: set beta to 0 (the MLE form) or form to 'latent', or give a flow"
            )
        if not has_density and not isinstance(getattr(flow, "latent_size", None), int):
            raise ValueError(
                f"flow must be a Flow, or a decoder with latent_size and image_shape; got {type(flow).__name__}"
            )
        if n_restarts < 1:
            raise ValueError(f"n_restarts must be at least 1, got {n_restarts}")
        if n_restarts > 1 and not (isinstance(start, int | float) and start > 0):
            raise ValueError("n_restarts above 1 needs random starts: give start a positive standard deviation")
        _check_density(noise)
        self.flow, self.noise, self.beta, self.form = flow, noise, float(beta), form
        self.start, self.n_restarts, self.seed = start, n_restarts, seed
        self.optimizer = optimizer or LBFGS(n_iterations=200)

    def forward(self, y: Tensor, physics: Physics, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """x_hat (B, C, H, W), not clipped."""
        return self.solve(y, physics).estimate

    @torch.no_grad()
    def solve(self, y: Tensor, physics: Physics) -> Solution:
        """Minimize; y (B, ...) as ``physics`` measures."""
        noise = noise_density(self.noise, physics)
        _check_restarts(physics, self.n_restarts)
        with frozen(self.flow), frozen(noise) if isinstance(noise, nn.Module) else nullcontext():
            problem = LatentProblem(self.flow, y.repeat_interleave(self.n_restarts, 0), physics)
            scales = problem.channel_scales(self.seed) if problem.has_density and self.beta > 0 else None
            trace = self.optimizer.minimize(
                self._evaluation(problem, noise), problem.latents(self.start, self.seed, self.n_restarts), scales
            )
            trace = trace.best_of(self.n_restarts)
            estimate = problem.decode(trace.z)
        solution = Solution(
            estimate,
            trace.z,
            trace.losses,
            trace.reasons,
            trace.n_evaluations,
            restarts=trace.restarts,
            latent_norms=trace.norms,
        )
        if trace.interrupted:
            raise SolverInterrupted(solution)
        return solution

    def _evaluation(self, problem: LatentProblem, noise: Any) -> Any:
        def objective(z: Tensor) -> Tensor:
            log_prior = _log_normal(z)
            if self.form == "image" and self.beta > 0:
                x, logdet = problem.decode_with_logdet(z)
                log_prior = log_prior - logdet
            else:
                x = problem.decode(z)
            return -noise.log_prob(problem.residual(x)) - self.beta * log_prior  # Eqs. (4) and (5), and beta

        return problem.evaluation(objective)


def _check_restarts(physics: Physics, n_restarts: int) -> None:
    """Restarts are further images of the batch, for which an operator with a parameter per image has none."""
    parameters = {name: getattr(physics, name, None) for name in ("mask", "filter")}
    own = [
        name for name, value in parameters.items() if isinstance(value, Tensor) and value.ndim == 4 and len(value) > 1
    ]
    if n_restarts > 1 and own:
        raise ValueError(
            f"n_restarts above 1 needs the same operator for all images, and this one has a {own[0]} each; "
            "solve the images one by one, or set n_restarts to 1"
        )


def _log_normal(z: Tensor) -> Tensor:
    """log N(z; 0, I), (B,)."""
    return -0.5 * (z.square().sum(dim=1) + z.shape[1] * math.log(2 * math.pi))


def _check_density(noise: Any) -> None:
    if noise is None or isinstance(noise, deepinv.physics.GaussianNoise):
        return
    if not callable(getattr(noise, "log_prob", None)):
        raise ValueError(
            f"noise must have log_prob(residual) -> (B,), and {type(noise).__name__} has none: "
            "take one of flowprox.noise or a trained noise flow"
        )
    if getattr(noise, "has_density", True) is False:
        raise ValueError(f"{type(noise).__name__} can be drawn but has no density: train a noise flow on it")
