r"""MAP with a flow, for any operator and without training (Asim et al. 2020).

    form "latent":  ||y - A g(z)||^2 + gamma ||z||        (norm "unsquared"; gamma ||z||^2 with "squared")
    form "image":   ||y - A x||^2 - gamma log p(x),       x = g(z)

Symbols: y measurement, A operator (linear or any differentiable map), g = f^-1 the flow from latent z (B, D) to image x
(B, C, H, W), gamma >= 0 weight of the prior. Squared norms are sums over an image. Both forms can be minimized over z or
over x; ``flowprox.solvers.objective.Objective.value`` computes them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from deepinv.models import Reconstructor
from deepinv.physics import Physics
from torch import Tensor

from flowprox.flows import Flow, frozen
from flowprox.flows.flow import require_flow
from flowprox.naming import require_choice, require_count, require_positive
from flowprox.noise import Noise, as_noise
from flowprox.operators import measured_entries
from flowprox.solvers.objective import SPACES, Callback, Objective, squared_error
from flowprox.solvers.optimizers import LBFGS, Optimizer, Trace
from flowprox.solvers.problem import LatentProblem, Solution, Start

NORMS = ("unsquared", "squared")
FORMS = ("latent", "image")

_SLOPE = 0.2  # of log residual against log gamma near the best image, measured on faces
_SLOPES = (0.1, 2.0)  # the secant is kept within; 2 is the slope far from the solution of a linear problem
_LONGEST = 2.0  # factor of gamma from one stage to the next


@dataclass(frozen=True)
class Discrepancy:
    r"""How ``LatentMAP`` chooses gamma: Bayes' rule for the scale, the discrepancy principle from there.

        ||y - A g(z_gamma)||^2 = tau^2 E||noise||^2          gamma near the rule of Bayes

    z_gamma is the minimizer with the weight gamma. The rule of Bayes is gamma = sigma^2 for the squared norm and
    2 sigma^2 ||z|| for the unsquared one, with the ||z|| of the estimate itself. In stages, each of which begins where the last
    one ended, gamma is moved, for every image by itself, along the secant of log residual against log gamma, but never further
    than ``limit`` from that rule: where few measurements determine little, the residual of a good image is far below the noise,
    and where the iterations are few, it is still above.

    References:
        Morozov 1966, On the solution of functional equations by the method of regularization, Soviet Math. Dokl. 7, 414.

    Arguments:
        tau: root of the wanted ratio of residual energy to noise energy; the best in PSNR leave a little less than all noise.
        share: the middle gamma as a part of Bayes' rule: of 2 sigma^2 ||z||, of sigma^2 for the squared norm, and of
            0.7 sigma^2 for the image form, whose density is best trusted by a third (docs/evidence/log.md).
        limit: largest factor between the middle gamma and the last.
        n_stages: how often gamma is set.

    Raises:
        ValueError: a value out of its range.
    """

    tau: float = 0.98
    share: float = 0.85
    limit: float = 1.25
    n_stages: int = 4

    def __post_init__(self) -> None:
        require_positive("tau", self.tau)
        require_positive("share", self.share)
        if not 1 <= self.limit < float("inf"):
            raise ValueError(f"limit must be at least 1 and finite, got {self.limit}")
        require_count("n_stages", self.n_stages)


def noise_energy(y: Tensor, physics: Physics, measured: Tensor) -> tuple[Tensor, Tensor]:
    """(E||noise||^2 (B,), number of entries (B,)) in the ``measured`` entries, as the noise model tells, or ValueError."""
    noise = as_noise(physics)
    if not isinstance(noise, Noise):
        kind = type(noise).__name__
        raise ValueError(f"gamma='discrepancy' needs the level of the noise, which {kind} does not tell: give a number")
    energy = (noise.energy_like(y) * measured).flatten(1).sum(dim=1)
    if not bool((energy > 0).all()):
        raise ValueError("gamma='discrepancy' needs noise: its level is 0, so that gamma=0 is what fits")
    return energy, measured.flatten(1).sum(dim=1)


class LatentMAP(Reconstructor):
    r"""The image whose latent is small and which explains the measurement (Asim et al. 2020, Eqs. 1 to 4).

        x_hat = g(z_hat),   z_hat = argmin_z ||y - A g(z)||^2 + gamma ||z||

    Any operator will do; its adjoint is not used. With gamma = 0 and the start z = 0 the descent itself regularizes (Asim et
    al., Sec. 4), which suits measurements with little noise. An image's result does not depend on its batch.

    As published, the optimizer is ``TorchLBFGS(20, 1.0)`` for denoising and inpainting and ``TorchLBFGS(30, 0.1)`` for
    compressed sensing; Fig. 17 has ``Adam(2000, 0.01)`` beside it.

    References:
        Asim, Daniels, Leong, Ahmed, Hand 2020, Invertible generative models for inverse problems: mitigating
        representation error and dataset bias, https://arxiv.org/abs/1905.11672, Eqs. (1) to (4), Appendix A.

    Arguments:
        flow: the prior, trained on clean images. It is left as it is.
        gamma: weight of the prior, at least 0: a number, one per image (B,), or "discrepancy" (or a ``Discrepancy``) to
            choose it per image from the level of ``physics.noise_model``.
        norm: "unsquared", as published, or "squared", the Gaussian log-prior; for the form "latent".
        form: "latent", or "image": the density of the image itself, with the log-determinant.
        start: "zero"; "adjoint" (A^T y); a number, the standard deviation of random latents; images (B, C, H, W); or a
            method that makes them from (y, physics), such as a Lasso or an unfolded network. Images go through the flow.
        optimizer: ``LBFGS``, ``Adam`` or ``TorchLBFGS``.
        precondition: scale each latent channel by what it does to the measurement, found by a few random probes: several times
            fewer iterations where gamma > 0 fixes the solution, and None uses it exactly there. For the space "latent".
        seed: of a random start and of the probes.
        space: minimize over the "latent" z, or over the "image" x (Asim et al., Eqs. 1 and 3), where the same function has
            another landscape; not with the norm "unsquared", whose kink x does not show.

    Raises:
        ValueError: a negative gamma, an unknown norm, form, space or start; on call: y that does not fit the operator or is
            not finite, a flow for other images, an adjoint that does not fit.
        SolverInterrupted: Ctrl-C; its ``solution`` holds what is finished.

    Example:
        >>> from flowprox.flows import Flow, HaarSqueeze, Sequential, Unsqueeze
        >>> from flowprox.operators import make_physics
        >>> flow = Flow(Sequential([HaarSqueeze(), Unsqueeze()]), (1, 4, 4), n_levels=1)  # a Gaussian prior around 1/2
        >>> y, physics = torch.ones(1, 1, 4, 4), make_physics("denoising", (1, 4, 4))
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
        space: str = "latent",
    ) -> None:
        super().__init__()
        for name, value, choices in (("norm", norm, NORMS), ("form", form, FORMS), ("space", space, SPACES)):
            require_choice(name, value, choices)
        if space == "image" and form == "latent" and norm == "unsquared":
            why = "||z|| has a kink that x does not show"
            raise ValueError(f"space 'image' needs form 'image' or norm 'squared': {why}")
        if isinstance(gamma, str):
            if gamma != "discrepancy":
                raise ValueError(f"gamma must be a number, one per image, or 'discrepancy'; got {gamma!r}")
            gamma = Discrepancy()
        weights = torch.zeros(1) if isinstance(gamma, Discrepancy) else torch.as_tensor(gamma)
        if weights.ndim > 1 or not bool((torch.isfinite(weights) & (weights >= 0)).all()):
            raise ValueError(f"gamma must be finite and at least 0, a number or one per image; got {gamma}")
        require_flow(flow)
        if optimizer is not None and not hasattr(optimizer, "minimize"):
            raise ValueError(f"optimizer must be LBFGS(...) or Adam(...) of flowprox.solvers, got {optimizer!r}")
        self.flow, self.gamma, self.norm, self.form, self.space = flow, gamma, norm, form, space
        self.start, self.seed = start, seed
        self.optimizer = optimizer or LBFGS(n_iterations=200)
        self.precondition = precondition

    def forward(self, y: Tensor, physics: Physics, callback: Callback | None = None) -> Tensor:  # type: ignore[override]
        """x_hat (B, C, H, W), not clipped; see ``solve``."""
        return self.solve(y, physics, callback).estimate

    @torch.no_grad()
    def solve(self, y: Tensor, physics: Physics, callback: Callback | None = None) -> Solution:
        """Minimize; y (B, ...) as ``physics`` measures; ``callback(n, n_at_most)`` is called after every evaluation."""
        with frozen(self.flow):
            problem = LatentProblem(self.flow, y, physics)
            if problem.is_empty:
                return problem.nothing()
            prior = "density" if self.form == "image" else self.norm
            objective = Objective(problem, squared_error, 0.0, prior, self.space, callback=callback)
            objective.n_evaluations = self.optimizer.max_trials
            u = objective.start(self.start, self.seed)
            wanted = self.precondition
            if wanted is None:
                wanted = isinstance(self.gamma, Discrepancy) or bool(torch.as_tensor(self.gamma).any())
            if wanted and self.space == "latent":
                objective.scales = problem.channel_scales(self.seed)
            if isinstance(self.gamma, Discrepancy):
                trace, gamma = self._with_discrepancy(objective, u, self.gamma)
            else:
                each = torch.as_tensor(self.gamma).to(u)
                if each.ndim and each.shape != (len(u),):
                    raise ValueError(
                        f"gamma has shape {tuple(each.shape)}; give one number, or one for each of {len(u)}"
                    )
                objective.weight = gamma = each.expand(len(u))
                if objective.scales is not None and self.precondition is None:  # where nothing holds z back, the plain
                    objective.scales = torch.where(gamma[:, None] > 0, objective.scales, 1.0)  # descent does
                trace = objective.minimize(self.optimizer, u)
            return objective.solution(trace, gamma)

    def _with_discrepancy(self, objective: Objective, u: Tensor, rule: Discrepancy) -> tuple[Trace, Tensor]:
        """Run the stages: their traces, joined, and gamma (B,)."""
        problem, optimizer, n = objective.problem, self.optimizer, self.optimizer.n_iterations
        measured = measured_entries(problem.y, problem.physics, problem.image_shape)
        energy, n_measured = noise_energy(problem.y, problem.physics, measured)
        limit = getattr(optimizer, "max_evaluations", None)

        def bayes(z: Tensor) -> Tensor:
            """log of the middle gamma: a share of the weight in ||r||^2 / (2 sigma^2) + 1/2 ||z||^2, times 2 sigma^2."""
            scale = energy / n_measured
            if self.form == "image":
                scale = 0.7 * scale  # the density of images is best trusted by a third (docs/log.md)
            elif self.norm == "unsquared":
                length = torch.linalg.vector_norm(z, dim=1)  # at the start z = 0 a common one
                scale = 2 * scale * torch.where(length > 0, length, 0.4 * math.sqrt(z.shape[1]))
            return (rule.share * scale).log()

        def stage(gamma: Tensor, u: Tensor, n_stage: int) -> tuple[Trace, Tensor]:
            """So many iterations with exp(gamma), and the log of the energy of what they leave of y."""
            objective.weight = gamma.exp()
            limits = {} if limit is None else {"max_evaluations": max(1, limit * n_stage // n)}
            trace = objective.minimize(replace(optimizer, n_iterations=n_stage, **limits), u)  # type: ignore[type-var]
            return trace, squared_error(problem.residual(objective.image(trace.z))).log()

        wanted, gamma = 2 * math.log(rule.tau) + energy.log(), bayes(u)
        slope, n_each = torch.full_like(gamma, _SLOPE), max(1, n // (rule.n_stages + 1))
        trace, left = stage(gamma, u, max(1, n - (rule.n_stages - 1) * n_each))
        parts = [trace]
        while len(parts) < rule.n_stages and not parts[-1].interrupted:
            middle = bayes(parts[-1].z)
            step = ((wanted - left) / slope).clamp(-math.log(_LONGEST), math.log(_LONGEST))
            step = (gamma + step).clamp(middle - math.log(rule.limit), middle + math.log(rule.limit)) - gamma
            gamma, before = gamma + step, left
            trace, left = stage(gamma, parts[-1].z, n_each)
            parts.append(trace)
            secant = ((left - before) / step).clamp(*_SLOPES)
            slope = torch.where(step.abs() > 0.05, secant, slope)  # of a short step rounding makes anything
        return _joined(parts), gamma.exp()


def _joined(parts: list[Trace]) -> Trace:
    """Stages one after the other; the status is that of the last."""
    return replace(
        parts[-1],
        losses=torch.cat([part.losses if i == 0 else part.losses[1:] for i, part in enumerate(parts)]),
        norms=torch.cat([part.norms if i == 0 else part.norms[1:] for i, part in enumerate(parts)]),
        n_evaluations=sum((part.n_evaluations for part in parts[1:]), parts[0].n_evaluations),
        restarts=sum((part.restarts for part in parts[1:]), parts[0].restarts),
    )
