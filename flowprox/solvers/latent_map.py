r"""MAP in the latent space of a flow, for any operator and without training (Asim et al. 2020).

    form "latent":  min_z  ||y - A g(z)||^2 + gamma ||z||        (norm "unsquared"; gamma ||z||^2 with "squared")
    form "image":   min_x  ||y - A x||^2 - gamma log p(x),       x = g(z)

Symbols: y measurement, A operator (linear or any differentiable map), g = f^-1 the flow from latent z (B, D) to image x
(B, C, H, W), gamma >= 0 weight of the prior. Squared norms are sums over an image. The image form is minimized over z too,
where -log p(g(z)) = 1/2 ||z||^2 + log|det Dg(z)| + constant.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from deepinv.models import Reconstructor
from deepinv.physics import Physics
from torch import Tensor

from flowprox.flows import Flow, frozen
from flowprox.solvers.discrepancy import Discrepancy, noise_energy
from flowprox.solvers.optimizers import LBFGS, Evaluate, Optimizer, Trace
from flowprox.solvers.problem import LatentProblem, Start
from flowprox.solvers.solution import Solution, SolverInterrupted

__all__ = ["LatentMAP"]

NORMS = ("unsquared", "squared")
FORMS = ("latent", "image")


class LatentMAP(Reconstructor):
    r"""The image whose latent is small and which explains the measurement (Asim et al. 2020, Eqs. 2 and 3).

        x_hat = g(z_hat),   z_hat = argmin_z ||y - A g(z)||^2 + gamma ||z||

    Any operator will do; its adjoint is not used. With gamma = 0 and the start z = 0 the descent itself regularizes: it
    ends near the smallest latent that explains y (Asim et al., Sec. 4), which suits measurements with little noise. Every
    image is optimized by itself, so that its result does not depend on its batch.

    References:
        Asim, Daniels, Leong, Ahmed, Hand 2020, Invertible generative models for inverse problems: mitigating
        representation error and dataset bias, https://arxiv.org/abs/1905.11672, Eqs. (1) to (3).

    Arguments:
        flow: the prior, trained on clean images. It is left as it is.
        gamma: weight of the prior, at least 0: a number, one per image (B,), or "discrepancy" (or a ``Discrepancy``) to
            choose it per image from the level of ``physics.noise_model``.
        norm: "unsquared", as published, or "squared", the Gaussian log-prior; for the form "latent".
        form: "latent", or "image": the density of the image itself, with the log-determinant.
        start: "zero"; "adjoint" (A^T y); a number, the standard deviation of random latents; images (B, C, H, W); or a
            method that makes them from (y, physics), such as a Lasso. Images go through the flow.
        optimizer: ``LBFGS`` or ``Adam``.
        precondition: scale each latent channel by what it does to the measurement, found by a few random probes at the
            start: several times fewer iterations where gamma > 0 fixes the solution. With gamma = 0 it changes which
            solution the descent ends at, so None uses it exactly when gamma > 0.
        seed: of a random start and of the probes.

    Raises:
        ValueError: a negative gamma, an unknown norm, form or start; on call: y that does not fit the operator or is not
            finite, a flow for other images, an adjoint that does not fit.
        SolverInterrupted: Ctrl-C; its ``solution`` holds what is finished.

    Example:
        >>> from flowprox.flows import Flow, HaarSqueeze, Sequential, Unsqueeze
        >>> from flowprox.operators import make_physics
        >>> flow = Flow(Sequential([HaarSqueeze(), Unsqueeze()]), (1, 4, 4), n_levels=1)  # a Gaussian prior around 1/2
        >>> physics = make_physics("denoising", (1, 4, 4))
        >>> y = torch.ones(1, 1, 4, 4)
        >>> LatentMAP(flow, gamma=1.0, norm="squared")(y, physics).mean().item()  # half way from 1/2 to 1
        0.75
    """

    def __init__(
        self,
        flow: Flow,
        gamma: float | Tensor | str | Discrepancy = 0.0,
        norm: str = "unsquared",
        form: str = "latent",
        start: Start = "zero",
        optimizer: Optimizer | None = None,
        precondition: bool | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(NORMS)}; got {norm!r}")
        if form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}; got {form!r}")
        if isinstance(gamma, str):
            if gamma != "discrepancy":
                raise ValueError(f"gamma must be a number, one per image, or 'discrepancy'; got {gamma!r}")
            gamma = Discrepancy()
        if not isinstance(gamma, Discrepancy):
            _check_gamma(gamma)
        if not isinstance(flow, Flow):
            raise ValueError(f"flow must be a Flow, got {type(flow).__name__}; flowprox.load_model(name) gives one")
        if optimizer is not None and not hasattr(optimizer, "minimize"):
            raise ValueError(f"optimizer must be LBFGS(...) or Adam(...) of flowprox.solvers, got {optimizer!r}")
        self.flow, self.gamma, self.norm, self.form = flow, gamma, norm, form
        self.start, self.seed = start, seed
        self.optimizer = optimizer or LBFGS(n_iterations=200)
        self.precondition = precondition

    def forward(self, y: Tensor, physics: Physics, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """x_hat (B, C, H, W), not clipped."""
        return self.solve(y, physics).estimate

    @torch.no_grad()
    def solve(self, y: Tensor, physics: Physics) -> Solution:
        """Minimize; y (B, ...) as ``physics`` measures."""
        with frozen(self.flow):
            problem = LatentProblem(self.flow, y, physics)
            z = problem.latents(self.start, self.seed)
            scales = self._scales(problem)
            if isinstance(self.gamma, Discrepancy):
                trace, gamma = self._with_discrepancy(problem, z, self.gamma, scales)
            else:
                gamma = torch.as_tensor(self.gamma).to(z)
                if gamma.ndim and gamma.shape != (len(z),):
                    raise ValueError(
                        f"gamma has shape {tuple(gamma.shape)}; give one number, or one for each of {len(z)}"
                    )
                gamma = gamma.expand(len(z))
                trace = self._minimize(problem, gamma, z, self.optimizer, scales)
            estimate = problem.decode(trace.z)
        solution = Solution(
            estimate, trace.z, trace.losses, trace.reasons, trace.n_evaluations, gamma, trace.restarts, trace.norms
        )
        if trace.interrupted:
            raise SolverInterrupted(solution)
        return solution

    def _scales(self, problem: LatentProblem) -> Tensor | None:
        """The diagonal that the optimizer begins with, (B, D)."""
        if self.precondition is False or (self.precondition is None and _is_zero(self.gamma)):
            return None
        return problem.channel_scales(self.seed)

    def _minimize(
        self, problem: LatentProblem, gamma: Tensor, z: Tensor, optimizer: Optimizer, scales: Tensor | None
    ) -> Trace:
        if scales is not None and self.precondition is None:  # where nothing holds z back, the plain descent does
            scales = torch.where(gamma[:, None] > 0, scales, 1.0)
        return optimizer.minimize(self._evaluation(problem, gamma, scales), z, scales)

    def _with_discrepancy(
        self, problem: LatentProblem, z: Tensor, rule: Discrepancy, scales: Tensor | None
    ) -> tuple[Trace, Tensor]:
        energy, n_measured = noise_energy(problem.y, problem.physics)
        variance = energy / n_measured

        def bayes(z: Tensor) -> Tensor:
            """The weight in ||r||^2 / (2 sigma^2) + 1/2 ||z||^2, times 2 sigma^2."""
            if self.form == "image":
                return 0.7 * variance  # the density of images is best trusted by a third (docs/evidence/log.md)
            if self.norm == "squared":
                return variance
            length = torch.linalg.vector_norm(z, dim=1)  # at the start z = 0 a common one
            return 2 * variance * torch.where(length > 0, length, 0.4 * math.sqrt(z.shape[1]))

        def minimize(gamma: Tensor, z: Tensor, n_iterations: int) -> Trace:
            return self._minimize(problem, gamma, z, rule.stage(self.optimizer, n_iterations), scales)

        def misfit(z: Tensor) -> Tensor:
            return _energy(problem.residual(problem.decode(z)))

        return rule.choose(minimize, misfit, energy, z, bayes, self.optimizer.n_iterations)

    def _evaluation(self, problem: LatentProblem, gamma: Tensor, scales: Tensor | None = None) -> Evaluate:
        def objective(z: Tensor) -> Tensor:
            if self.form == "image":
                x, logdet = problem.decode_with_logdet(z)
                prior = 0.5 * z.square().sum(dim=1) + 0.5 * z.shape[1] * math.log(2 * math.pi) + logdet
            else:
                x = problem.decode(z)
                prior = z.square().sum(dim=1) if self.norm == "squared" else torch.linalg.vector_norm(z, dim=1)
            return _energy(problem.residual(x)) + gamma * prior  # Eq. (2), (3)

        evaluate = problem.evaluation(objective)
        if self.form == "image" or self.norm == "squared":
            return evaluate
        return _with_kink(evaluate, gamma, torch.ones_like(gamma)[:, None] if scales is None else scales)


def _with_kink(evaluate: Evaluate, gamma: Tensor, scales: Tensor) -> Evaluate:
    """At the start z = 0, where gamma ||z|| has no gradient, the descent along -S v takes the subgradient v of least v S v.

    That is v = (1 + S / mu)^-1 grad with ||v - grad|| = gamma; any other may point uphill.
    """
    at_start = True

    def evaluate_with_kink(z: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal at_start
        value, gradient = evaluate(z)  # torch gives ||z|| the gradient 0 there
        if at_start:
            at_start = False
            gradient = torch.where((z == 0).all(dim=1, keepdim=True), shortest(gradient), gradient)
        return value, gradient

    def shortest(gradient: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(gradient, dim=1)
        excess = (length / gamma - 1).nan_to_num(0.0).clamp_min(0)[:, None]  # all of the subgradient is 0 without
        low, high = (excess * end for end in (scales.amin(1, keepdim=True), scales.amax(1, keepdim=True)))
        for _ in range(60):
            mu = low.sqrt() * high.sqrt()
            far = torch.linalg.vector_norm(gradient / (1 + mu / scales), dim=1, keepdim=True) > gamma[:, None]
            low, high = torch.where(far, mu, low), torch.where(far, high, mu)
        return gradient / (1 + scales / high)

    return evaluate_with_kink


def _is_zero(gamma: float | Tensor | Discrepancy) -> bool:
    return not isinstance(gamma, Discrepancy) and not bool(torch.as_tensor(gamma).any())


def _energy(residual: Tensor) -> Tensor:
    """||r||^2 per image, for complex measurements too."""
    return residual.abs().square().flatten(1).sum(dim=1)


def _check_gamma(gamma: float | Tensor) -> None:
    values = torch.as_tensor(gamma)
    if values.ndim > 1 or not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
        raise ValueError(f"gamma must be finite and at least 0, a number or one per image; got {gamma}")
