r"""Sampling the posterior in latent space: not one image but all that explain the measurement, and how they vary.

    p(z | y)  proportional to  N(z; 0, I) p_noise(y - A(g(z))),      x = g(z)

Symbols: x image (B, C, H, W), z latent (B, D), g the flow's inverse, A any differentiable operator, y measurement,
p_noise density of the noise. In latent space the prior is exactly standard normal, whatever the flow: g carries N(0, I)
to the flow's density of images, so that no log-determinant is needed. The mean of the samples is the estimate of least
mean squared error under the model, their standard deviation per pixel its uncertainty.

References:
    Asim et al. 2020, Invertible generative models for inverse problems, https://arxiv.org/abs/1905.11672 (the latent
        objective whose exponential is sampled here); of chains and diagnostics see ``sampling`` and ``diagnostics``
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeGuard

import torch
import torch.nn.functional as F
from deepinv.models import Reconstructor
from deepinv.physics import Physics
from torch import Tensor

from flowprox.flows import Flow, frozen
from flowprox.graphs import Replayed
from flowprox.naming import require_choice, require_count, require_positive
from flowprox.noise import noise_density, noise_level, residual_p_value
from flowprox.solvers.diagnostics import effective_sample_size, split_r_hat
from flowprox.solvers.importance import Proposal
from flowprox.solvers.objective import Callback
from flowprox.solvers.problem import LatentProblem, Solution, Start
from flowprox.solvers.sampling import KERNELS, Chains, Moments, Position, Randomness

MIXED_BELOW = 1.05
"""Chains whose R-hat is smaller count as mixed."""

_STEP, _BATCH = 0.01, 64  # of differences in z: a Hessian that is not exact makes slower chains, not wrong ones
_N_DIRECTIONS = 4
TRACES = (
    "log posterior",
    "mean of the image",
    *(f"white direction {i}" for i in range(_N_DIRECTIONS)),
    *(f"smooth direction {i}" for i in range(_N_DIRECTIONS)),
)
"""The scalars R-hat and effective sample size are computed of: the last two kinds are inner products of x with fixed random
images, white noise and noise on a grid of 4x4 blocks."""


@dataclass
class PosteriorSolution(Solution):
    """Samples of the posterior; B images, M chains, n draws per chain after warm-up. ``estimate`` is the mean image.

    ``losses`` is -log p(z, y) averaged over the chains, warm-up included; ``restarts`` counts proposals that were rejected
    because they were not finite; ``latent`` is None, since the mean image is not the image of a latent; ``reasons`` says
    "mixed" (R-hat below ``MIXED_BELOW``), "not mixed: r_hat 1.3" or "interrupted".

    Arguments:
        samples: draws kept, evenly spaced over the chains, (B, M, n_kept, C, H, W).
        std: standard deviation of the posterior per pixel, over all draws of all chains, (B, C, H, W).
        standard_error: of ``mean`` per pixel, by batch means, (B, C, H, W); NaN from a single batch.
        ess, r_hat: the smallest effective sample size and the largest split R-hat over ``TRACES``, (B,).
        traces: the scalars named in ``TRACES`` of every draw, (B, M, n, len(TRACES)).
        acceptance, jumps: shares of accepted proposals and of jumps to samples of the proposal after warm-up, (B,).
        step_size: h, fixed after warm-up, (B,).
        state: where the chains ended, (B, M, D): the ``start`` that continues them.
    """

    samples: Tensor = field(kw_only=True)
    std: Tensor = field(kw_only=True)
    standard_error: Tensor = field(kw_only=True)
    ess: Tensor = field(kw_only=True)
    r_hat: Tensor = field(kw_only=True)
    traces: Tensor = field(kw_only=True)
    acceptance: Tensor = field(kw_only=True)
    jumps: Tensor = field(kw_only=True)
    step_size: Tensor = field(kw_only=True)
    state: Tensor = field(kw_only=True)

    @property
    def mean(self) -> Tensor:
        """Mean of the posterior per pixel, (B, C, H, W): the estimate."""
        return self.estimate


@dataclass(frozen=True)
class SamplerOptions:
    """Fine settings of ``PosteriorSampling``; None takes the sampler's default (``KERNELS``).

    Arguments:
        n_leapfrog: gradient evaluations per draw, for "hmc" and "split-hmc".
        step_size: h > 0, fixed; None adapts it per image during warm-up.
        target_acceptance: acceptance the adaptation aims at, between 0 and 1.
        precondition: estimate a scale per latent dimension and image (and, for the rotating samplers, a center) during
            warm-up. "dense" moves in the coordinates in which the posterior is white where the chains are after a third of
            the warm-up, by its Gauss-Newton Hessian I + J^T J / sigma^2: for Gaussian noise. It takes D runs of the flow
            for each chain, twice, and 20 D^2 bytes.
        n_kept: draws per chain that are returned, evenly spaced; mean and standard deviation are over all of them.
        jitter: relative spread of the step size, at least 0 and less than 1.

    Raises:
        ValueError: a value outside of its range.
    """

    n_leapfrog: int | None = None
    step_size: float | None = None
    target_acceptance: float | None = None
    precondition: bool | Literal["dense"] | None = None
    n_kept: int = 16
    jitter: float = 0.2

    def __post_init__(self) -> None:
        require_count("n_kept", self.n_kept)
        if self.n_leapfrog is not None:
            require_count("n_leapfrog", self.n_leapfrog)
        if self.step_size is not None:
            require_positive("step_size", self.step_size)
        if self.target_acceptance is not None and not 0 < self.target_acceptance < 1:
            raise ValueError(f"target_acceptance must lie between 0 and 1, got {self.target_acceptance!r}")
        if not 0 <= self.jitter < 1:
            raise ValueError(f"jitter must be at least 0 and less than 1, got {self.jitter!r}")


class PosteriorSampling(Reconstructor):
    """Markov chain Monte Carlo in the latent space of a flow, for any differentiable operator and any noise density.

    Every image has its own chains, step size and preconditioner. After warm-up these are fixed. The samplers:

        ula        unadjusted Langevin: every step is taken, the posterior is sampled with an error that shrinks with the step
        mala       Langevin with Metropolis correction
        pcnl       preconditioned Crank-Nicolson Langevin: the prior is solved exactly, the step does not shrink with D
        hmc        Hamiltonian Monte Carlo: several leapfrog steps per draw
        split-hmc  the same, with the Gaussian fitted in warm-up solved exactly

    References:
        See the module; Neal 2011, MCMC using Hamiltonian dynamics, https://arxiv.org/abs/1206.1901 (hmc); Shahbaba et
        al. 2014, Split Hamiltonian Monte Carlo, https://arxiv.org/abs/1106.5941.

    Arguments:
        flow: the prior; left as it is.
        noise: density of the measurement's noise, anything with ``log_prob(residual) -> (B,)``; None takes that of
            ``physics.noise_model``, or a Gaussian of its ``sigma``.
        sampler: a key of ``KERNELS``.
        n_samples, n_warmup: draws per chain, and those before, which adapt it and are not counted.
        n_chains: chains per image, all of which go through the flow in one batch.
        seed: of the chains, the same numbers for all images, so that a result does not depend on what else is in the batch (up
            to rounding); None takes torch's global generator.
        options: ``SamplerOptions``.

    Raises:
        ValueError: unknown sampler, a count that is too small, a noise without ``log_prob``.

    Example:
        >>> from flowprox.flows import ActNorm, Flow, HaarSqueeze, Sequential, Unsqueeze
        >>> from flowprox.operators import make_physics
        >>> flow = Flow(Sequential([ActNorm(1), HaarSqueeze(), Unsqueeze()]), (1, 4, 4), n_levels=1)  # a Gaussian prior
        >>> y = torch.rand(2, 1, 4, 4)
        >>> physics = make_physics("denoising", (1, 4, 4), sigma=1.0)
        >>> solution = PosteriorSampling(flow, n_samples=60, n_warmup=60).solve(y, physics)
        >>> bool((solution.mean - (y + 0.5) / 2).abs().max() < 5 * solution.standard_error.max())
        True
    """

    def __init__(
        self,
        flow: Flow,
        noise: Any = None,
        sampler: str = "hmc",
        n_samples: int = 200,
        n_warmup: int = 200,
        n_chains: int = 4,
        seed: int | None = 0,
        options: SamplerOptions | None = None,
    ) -> None:
        super().__init__()
        require_choice("sampler", sampler, KERNELS)
        for name, value, least in (("n_samples", n_samples, 1), ("n_warmup", n_warmup, 0), ("n_chains", n_chains, 1)):
            require_count(name, value, least)
        if noise is not None:
            noise_density(noise)
        options = options or SamplerOptions()
        if n_warmup == 0 and options.step_size is None:
            raise ValueError("n_warmup is 0, so that nothing adapts the step size: give options.step_size")
        self.flow, self.noise, self.sampler, self.seed, self.options = flow, noise, sampler, seed, options
        self.n_samples, self.n_warmup, self.n_chains = n_samples, n_warmup, n_chains
        if KERNELS[sampler].n_leapfrog == 1 and options.n_leapfrog not in (None, 1):
            raise ValueError(f"n_leapfrog is for hmc and split-hmc; {sampler} takes one step per draw")
        given: dict[str, Any] = {"n_leapfrog": options.n_leapfrog, "target_acceptance": options.target_acceptance}
        if options.precondition is not None:
            given["preconditions"] = bool(options.precondition)
        given = {name: value for name, value in given.items() if value is not None}
        self.kernel = KERNELS[sampler]._replace(**given)

    def forward(self, y: Tensor, physics: Physics, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """The posterior mean (B, C, H, W); see ``solve`` for the arguments."""
        return self.solve(y, physics, **kwargs).estimate

    @torch.no_grad()
    def solve(
        self,
        y: Tensor,
        physics: Physics,
        start: Start = "prior",
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        callback: Callback | None = None,
        proposal: Proposal | None = None,
    ) -> PosteriorSolution:
        """Sample the posterior of every image of the batch; Ctrl-C ends that with the draws so far, if one has been kept.

        Arguments:
            y: measurements (B, ...).
            physics: the operator A, linear or not.
            start: "prior" (overdispersed: independent draws from the prior), or latents, (B, D) for all chains of an
                image or (B, M, D) for each; or what the other solvers take: "zero", "adjoint", images, a method. From
                latents the chains go on where they are; from everything else warm-up first descends.
            generator: one for all images, or one per image; None uses ``seed``.
            callback: called after every draw with the numbers of those done and of all, warm-up included.
            proposal: approximates the posterior. The chains start from its samples, and after each draw try to jump to another
                of them, with the exact correction (independence Metropolis). Jumps are accepted only where it is close.

        Raises:
            ValueError: y is not finite or does not fit operator or flow; the noise has no density; nothing is
                differentiable; as many generators as images are needed; the start has a posterior that is not finite.
        """
        problem = LatentProblem(self.flow, y, physics)
        if problem.is_empty:
            return self._nothing(problem)
        noise = noise_density(self.noise, physics)
        target = _Target(problem, noise, self.n_chains)
        if isinstance(generator, Sequence) and len(generator) != len(y):
            raise ValueError(f"generator: got {len(generator)} for {len(y)} images; pass one, or one per image")
        randomness = Randomness(self.seed if generator is None else generator, y)

        def proposed(proposal: Proposal) -> Tensor:
            return torch.stack([self.flow.encode(one) for one in proposal.sample(self.n_chains)])

        def log_q(x: Tensor) -> Tensor:  # of the latents of images
            assert proposal is not None
            logdet = torch.stack([self.flow(one)[1] for one in x])
            return (proposal.log_prob(x) - logdet).to(x)

        def jump() -> None:  # every chain to a sample of the proposal, if it is accepted
            if proposal is not None:
                chains.jump(target.coordinates(proposed(proposal)), log_q)

        with frozen(self.flow):
            z = self._start(start, randomness, problem) if proposal is None else proposed(proposal)
            dense = self.options.precondition == "dense"
            if dense:
                sigma = noise_level(physics if self.noise is None else self.noise, y)
                target.whiten(z[:1], sigma)
            position = _finite_position(target, target.coordinates(z))
            steps = self.options.step_size, self.options.jitter
            chains = Chains(target, position, self.kernel, randomness, *steps)
            record = _Record(chains, self.n_samples, self.options.n_kept, callback, self.n_warmup + self.n_samples)
            interrupted = False
            try:
                precision = target.precision if callable(getattr(noise, "sample_like", None)) and not dense else None
                descend = proposal is None and not _is_latent(start)
                n_first = self.n_warmup // 3 if dense else 0
                if n_first:  # from where the chains have come to the Hessian is a better one
                    chains.warm_up(n_first, record.add_loss, descend)
                    z, descend = target.latents(chains.position.z), False
                    target.whiten(z, sigma)
                    chains.restart(target(target.coordinates(z)))
                chains.warm_up(self.n_warmup - n_first, record.add_loss, descend, precision)
                chains.sample(self.n_samples, record.add_draw, jump)
            except KeyboardInterrupt:
                if not record.samples:
                    raise
                interrupted = True
        solution = record.solution(target.n_evaluations, interrupted)
        state = target.latents(solution.state.transpose(0, 1)).transpose(0, 1)
        return replace(solution, state=state, residual_p_value=residual_p_value(solution.estimate, problem.y, physics))

    def _nothing(self, problem: LatentProblem) -> PosteriorSolution:
        """Of an empty batch."""
        empty = problem.nothing()
        image, one, shape = empty.estimate, empty.losses[0], (0, self.n_chains, 0)
        values: dict[str, Any] = dict.fromkeys(("std", "standard_error"), image)
        values |= dict.fromkeys(("ess", "r_hat", "acceptance", "jumps", "step_size"), one)
        values["samples"] = image.new_zeros(*shape, *image.shape[1:])
        values["traces"] = one.new_zeros(*shape, len(TRACES))
        values["state"] = one.new_zeros(0, self.n_chains, problem.dimension)
        return PosteriorSolution(**{**vars(empty), "latent": None}, **values)

    def _start(self, start: Start, randomness: Randomness, problem: LatentProblem) -> Tensor:
        shape = (self.n_chains, problem.n_images, problem.dimension)
        if isinstance(start, str) and start == "prior":
            return randomness.normal(*shape).contiguous()
        if not _is_latent(start):
            return problem.latents(start, self.seed or 0).expand(shape).contiguous()
        each = start[:, None].expand(-1, self.n_chains, -1) if start.ndim == 2 else start
        if each.shape != (shape[1], shape[0], shape[2]):
            n, d = problem.n_images, problem.dimension
            wanted = f"pass latents ({n}, {d}) or ({n}, {self.n_chains}, {d}), or images"
            raise ValueError(f"start has shape {tuple(start.shape)}; {wanted}")
        return each.transpose(0, 1).to(randomness.like).contiguous()


def _is_latent(start: Any) -> TypeGuard[Tensor]:
    """Latents, rather than images or a rule."""
    return isinstance(start, Tensor) and start.ndim != 4


class _Target:
    """log p(z, y) with its gradient, of M chains of B images at once; the images repeat within the batch, M times.

    On a GPU it is recorded once and replayed. After ``whiten`` it takes coordinates w in the place of z: z = m + L^-T w with
    H = L L^T, so that w is white where the posterior is N(m, H^-1); m (B, D), L (B, D, D) lower.
    """

    def __init__(self, problem: LatentProblem, noise: Any, n_chains: int) -> None:
        self.problem, self.noise, self.n_chains = problem, noise, n_chains
        self.y, self.physics = problem.y, problem.physics
        self.n_evaluations, self.replayed = 0, Replayed(self._position)
        self.whitening: tuple[Tensor, Tensor] | None = None  # m and L
        # an operator or noise per image fits a batch of B images only: then one chain after the other
        self.per_image = problem.n_images > 1 and not problem.is_separable(noise.log_prob)

    def __call__(self, z: Tensor) -> Position:
        self.n_evaluations += len(z)
        return self.replayed(z)

    def whiten(self, z: Tensor, sigma: Tensor) -> None:
        """Move from now on in the coordinates of the mean Gauss-Newton Hessian over z (M, B, D), for noise of sigma (B,)."""
        if self.per_image:
            raise ValueError('precondition "dense" is for operators and noise that all images share: solve one by one')
        factors = []
        for image, level in enumerate(sigma.expand(z.shape[1]).tolist()):
            hessian = torch.eye(z.shape[2]).to(z)
            for one in z[:, image]:
                _add_square(hessian, self._jacobian(one) / level, 1 / len(z))
            factors.append(torch.linalg.cholesky(hessian.double()).to(z))
        self.whitening = z.mean(0), torch.stack(factors)

    def _jacobian(self, z: Tensor) -> Tensor:
        """Of A(g(z)) at z (D,), transposed, (D, m), by differences."""
        self.n_evaluations += len(z)
        here = self.physics.A(self.problem.decode(z[None])).flatten()
        steps = torch.eye(len(z)).to(z).mul_(_STEP).split(_BATCH)
        return torch.cat([(self.physics.A(self.problem.decode(z + step)).flatten(1) - here) / _STEP for step in steps])

    def latents(self, w: Tensor) -> Tensor:
        """z (M, B, D) of what the chains move in."""
        if self.whitening is None:
            return w
        origin, factor = self.whitening
        columns = torch.linalg.solve_triangular(factor.mT, w.permute(1, 2, 0), upper=True)
        return origin + columns.permute(2, 0, 1).contiguous()

    def coordinates(self, z: Tensor) -> Tensor:
        """What the chains move in, of z (M, B, D)."""
        if self.whitening is None:
            return z
        origin, factor = self.whitening
        return torch.einsum("mbd,bde->mbe", z - origin, factor)

    def _position(self, w: Tensor) -> Position:
        with torch.enable_grad():
            w = w.detach().requires_grad_()
            z = self.latents(w)
            x = self.problem.decode(z)
            y = self.y.repeat(self.n_chains, *(1,) * (self.y.ndim - 1))
            log_likelihood = self._each(self.noise.log_prob, y - self._each(self.physics.A, x))
            if not log_likelihood.requires_grad:
                raise ValueError("the posterior is not differentiable: physics.A or noise.log_prob cuts the graph")
            log_prior = self.problem.flow.base_log_prob(z.flatten(0, 1))
            log_prob = log_likelihood.view(z.shape[:2]) + log_prior.view(z.shape[:2])
            gradient = torch.autograd.grad(log_prob.sum(), w)[0]
        return Position(w.detach(), log_prob.detach(), gradient, x.detach().unflatten(0, z.shape[:2]))

    def precision(self, z: Tensor, n_probes: int = 8) -> Tensor:
        """1 + diagonal of the Fisher information of y about z, (B, D): mean square of the score over replicated noise."""
        generators = [torch.Generator().manual_seed(0) for _ in self.y]
        squares = torch.zeros_like(z[0])
        for _ in range(n_probes):
            noise = torch.cat([self.noise.sample_like(self.y, generator=generators) for _ in z])
            self.n_evaluations += len(z)
            with torch.enable_grad():
                z = z.detach().requires_grad_()
                measured = self._each(self.physics.A, self.problem.decode(z))
                log_prob = self._each(self.noise.log_prob, noise + measured.detach() - measured)
                squares += torch.autograd.grad(log_prob.sum(), z)[0].square().mean(dim=0)
        return 1 + squares / n_probes

    def _each(self, function: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
        """Operator or noise of all chains; where they have parameters per image, of one chain after the other."""
        if not self.per_image:
            return function(values)
        return torch.cat([function(chain) for chain in values.split(len(self.y))])


def _add_square(hessian: Tensor, jacobian: Tensor, weight: float, n_rows: int = 1024) -> None:
    """Add weight J J^T, of J (D, m), to the lower triangle of a matrix (D, D); above it some of it is missing."""
    for end in range(n_rows, len(jacobian) + n_rows, n_rows):
        hessian[end - n_rows : end, :end].addmm_(jacobian[end - n_rows : end], jacobian[:end].T, alpha=weight)


class _Record:
    """What is kept of the chains. Each draw is taken up by single assignments, so that an interruption loses only itself."""

    def __init__(self, chains: Chains, n_samples: int, n_kept: int, callback: Callback | None, n_draws: int) -> None:
        self.chains, self.callback, self.n_draws = chains, callback, n_draws
        n_kept = min(n_kept, n_samples)
        self.keep = {(i + 1) * n_samples // n_kept for i in range(n_kept)}
        self.batch_length = max(1, round(n_samples ** (2 / 3)))
        image = chains.position.image
        self.directions = _directions(tuple(image.shape[2:])).to(image)
        self.losses = [-chains.position.log_prob.mean(dim=0)]
        self.traces: list[Tensor] = []
        self.samples: list[Tensor] = []
        self.moments = self.batch_means = Moments.like(image[0])
        self.batch = Moments.like(image)

    def add_loss(self) -> None:
        """After a step of warm-up."""
        self.losses.append(-self.chains.position.log_prob.mean(dim=0))
        if self.callback is not None:
            self.callback(len(self.losses) - 1, self.n_draws)

    def add_draw(self) -> None:
        """After a step of sampling."""
        self.add_loss()
        position = self.chains.position
        projections = position.image.flatten(2) @ self.directions
        self.traces.append(torch.cat([position.log_prob[..., None], projections], dim=-1))
        self.moments = self.moments.add(position.image)
        self.batch = self.batch.add(position.image[None])
        if self.batch.count == self.batch_length:
            self.batch_means = self.batch_means.add(self.batch.mean)
            self.batch = Moments.like(position.image)
        if len(self.traces) in self.keep:
            self.samples.append(position.image)

    def solution(self, n_evaluations: int, interrupted: bool) -> PosteriorSolution:
        """Everything as (B, ...)."""
        chains = self.chains
        traces = torch.stack(self.traces, dim=0).permute(2, 1, 0, 3)
        n_draws, n_batches = traces.shape[2], self.batch_means.count
        one = torch.ones_like(chains.n_accepted)
        ess = r_hat = math.nan * one
        if n_draws >= 4:
            scalars = traces.permute(0, 3, 1, 2)
            ess = effective_sample_size(scalars).amin(dim=1).to(one)
            r_hat = split_r_hat(scalars).amax(dim=1).to(one)
        error = (self.batch_means.variance / n_batches).sqrt() if n_batches > 1 else math.nan * self.moments.mean
        return PosteriorSolution(
            estimate=self.moments.mean,
            latent=None,
            losses=torch.stack(self.losses),
            reasons=["interrupted" if interrupted else _reason(value) for value in r_hat.tolist()],
            n_evaluations=torch.full(one.shape, n_evaluations, device=one.device),
            restarts=chains.n_not_finite.long(),
            samples=torch.stack(self.samples, dim=0).permute(2, 1, 0, 3, 4, 5),
            std=self.moments.variance.sqrt(),
            standard_error=error,
            ess=ess,
            r_hat=r_hat,
            traces=traces,
            acceptance=chains.n_accepted / max(chains.n_steps, 1),
            jumps=chains.n_jumps / max(chains.n_steps, 1),
            step_size=chains.step_size,
            state=chains.position.z.transpose(0, 1),
        )


def _reason(r_hat: float) -> str:
    if math.isnan(r_hat):
        return "not mixed: too few draws, or none accepted"
    return "mixed" if r_hat < MIXED_BELOW else f"not mixed: r_hat {r_hat:.3g}"


def _directions(image_shape: tuple[int, ...]) -> Tensor:
    """The fixed images (D, 1 + 2 n) whose inner products with x are traced; the same in every run."""
    generator = torch.Generator().manual_seed(0)
    flat = torch.full((1, *image_shape), 1 / math.prod(image_shape))
    white = torch.randn(_N_DIRECTIONS, *image_shape, generator=generator)
    smooth = torch.randn(_N_DIRECTIONS, image_shape[0], 4, 4, generator=generator)
    smooth = F.interpolate(smooth, image_shape[1:], mode="nearest")
    return torch.cat([flat, white, smooth]).flatten(1).T


def _finite_position(target: _Target, z: Tensor) -> Position:
    """Where the chains start; those whose posterior is not finite there start nearer to zero."""
    position = target(z)
    for _ in range(10):
        finite = torch.isfinite(position.log_prob) & torch.isfinite(position.gradient).all(dim=-1)
        if bool(finite.all()):
            return position
        z = torch.where(finite[..., None], z, 0.5 * z)
        position = target(z)
    raise ValueError("the posterior is not finite at the start; pass another start, and check the flow and the noise")
