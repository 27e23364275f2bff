r"""Markov chains that sample a density p(z) of which log p and its gradient are known, many chains side by side.

    w = (z - m) / s                          whitened by a reference Gaussian N(m, s^2)
    q ~ N(0, I)                              momentum
    n_steps times:                           q <- q + k grad,   (w, q) <- drift(w, q),   q <- q + k grad
    accept with probability min(1, p(z') N(q'; 0, I) / (p(z) N(q; 0, I)))

    straight drift    w + h q, q                         k = h / 2         grad of log p(w)
    rotating drift    w cos h + q sin h, q cos h - w sin h   k = tan(h / 2)   grad of log p(w) - log N(w; 0, I)

Symbols: z (M, B, D), M chains of each of B targets; h step size, one per target. One straight step is MALA, several are
Hamiltonian Monte Carlo. The rotation solves the Gaussian part exactly, so that its acceptance does not decay with the
dimension for a Gaussian reference: one step with the prior as reference is the preconditioned Crank-Nicolson Langevin
proposal (Cotter et al. 2013, Eq. 4.7, with h = 2 atan(sqrt(delta / 2))).

References:
    Cotter, Roberts, Stuart, White 2013, MCMC methods for functions, https://arxiv.org/abs/1202.0709
    Shahbaba, Lan, Johnson, Neal 2014, Split Hamiltonian Monte Carlo, https://arxiv.org/abs/1106.5941
    Hoffman, Gelman 2014, The No-U-Turn sampler, https://arxiv.org/abs/1111.4246 (dual averaging: Eq. 6)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flowprox.solvers.optimizers import Adam


class Kernel(NamedTuple):
    """One way to move: what distinguishes the samplers."""

    rotates: bool
    n_leapfrog: int
    target_acceptance: float
    preconditions: bool
    metropolis: bool = True


KERNELS: dict[str, Kernel] = {
    "ula": Kernel(False, 1, 0.8, True, metropolis=False),
    "mala": Kernel(False, 1, 0.574, True),
    "pcnl": Kernel(True, 1, 0.574, False),
    "hmc": Kernel(False, 8, 0.7, True),
    "split-hmc": Kernel(True, 8, 0.7, True),
}
"""Sampler name -> its kernel with the default settings."""


class Position(NamedTuple):
    """Where the chains are: z (M, B, D), log p (M, B), its gradient (M, B, D), and the images (M, B, C, H, W)."""

    z: Tensor
    log_prob: Tensor
    gradient: Tensor
    image: Tensor


class Reference(NamedTuple):
    """The Gaussian N(mean, scale^2) that whitens, (B, D) or broadcastable."""

    mean: Tensor
    scale: Tensor


class Moments(NamedTuple):
    """Running mean and sum of squared deviations over the first dimension of everything added."""

    count: int
    mean: Tensor
    deviations: Tensor

    @classmethod
    def like(cls, value: Tensor) -> Moments:
        """Nothing added yet; ``value`` has the shape of one entry."""
        return cls(0, torch.zeros_like(value), torch.zeros_like(value))

    def add(self, values: Tensor) -> Moments:
        """With the entries of values (n, ...) (Chan, Golub, LeVeque 1983)."""
        n, total = len(values), self.count + len(values)
        mean = values.mean(dim=0)
        shift = mean - self.mean
        deviations = self.deviations + (values - mean).square().sum(dim=0) + shift.square() * (n * self.count / total)
        return Moments(total, self.mean + shift * (n / total), deviations)

    @property
    def variance(self) -> Tensor:
        """Unbiased; zero of a single entry."""
        return self.deviations / max(self.count - 1, 1)


class Randomness:
    """Normal and uniform numbers for M chains of B targets.

    Arguments:
        source: a seed (every target gets the same numbers, so that its chains do not depend on what else is in the
            batch), one generator for all, one per target, or None for torch's global one.
    """

    def __init__(self, source: int | torch.Generator | Sequence[torch.Generator] | None, like: Tensor) -> None:
        self.like = like
        self.shared = isinstance(source, int)
        if isinstance(source, int):
            source = torch.Generator(device=like.device).manual_seed(source)
        self.generators = list(source) if isinstance(source, Sequence) else source

    def normal(self, *shape: int) -> Tensor:
        """(M, B, ...) standard normal values."""
        return self._draw(torch.randn, shape)

    def uniform(self, *shape: int) -> Tensor:
        """(M, B, ...) values in [0, 1)."""
        return self._draw(torch.rand, shape)

    def _draw(self, function: Callable[..., Tensor], shape: Sequence[int]) -> Tensor:
        each = isinstance(self.generators, list)
        one = (shape[0], 1, *shape[2:]) if each or self.shared else shape
        parts = []
        for generator in self.generators if isinstance(self.generators, list) else [self.generators]:
            device = self.like.device if generator is None else generator.device
            parts.append(function(one, generator=generator, dtype=self.like.dtype, device=device).to(self.like.device))
        return torch.cat(parts, dim=1).expand(*shape)


class DualAveraging:
    """Step sizes (B,) that make the acceptance meet a target (Hoffman and Gelman 2014, Eq. 6 and Sec. 3.2.1)."""

    def __init__(self, start: Tensor, target: float, largest: float) -> None:
        self.target, self.largest = target, largest
        self.restart(start)

    def restart(self, start: Tensor) -> None:
        """Forget everything and go on from ``start``."""
        self.aim: Tensor = math.log(10) + start.log()
        self.log_step: Tensor = start.log()
        self.log_average: Tensor = torch.zeros_like(start)
        self.error: Tensor = torch.zeros_like(start)
        self.n: int = 0

    def update(self, acceptance: Tensor) -> None:
        """Learn from the acceptance probability (B,) of one step."""
        self.n += 1
        weight = 1 / (self.n + 10)
        self.error = (1 - weight) * self.error + weight * (self.target - acceptance)
        self.log_step = (self.aim - math.sqrt(self.n) / 0.05 * self.error).clamp(max=math.log(self.largest))
        decay = self.n**-0.75
        self.log_average = decay * self.log_step + (1 - decay) * self.log_average

    @property
    def step(self) -> Tensor:
        """The step size to try next."""
        return self.log_step.exp()

    @property
    def average(self) -> Tensor:
        """The step size to stay with."""
        return (self.log_average if self.n else self.log_step).exp()


class Chains:
    """M chains of each of B targets, and the adaptation of their step sizes and reference.

    Arguments:
        target: z (M, B, D) -> ``Position``.
        position: where they start.
        kernel: how they move.
        randomness: where the numbers come from.
        step_size: h; None adapts it during warm-up.
        jitter: each step of each chain is drawn from h (1 +- jitter), so that no oscillation is met in its period.
    """

    def __init__(
        self,
        target: Callable[[Tensor], Position],
        position: Position,
        kernel: Kernel,
        randomness: Randomness,
        step_size: float | None = None,
        jitter: float = 0.2,
    ) -> None:
        self.target, self.kernel = target, kernel
        self.randomness, self.jitter = randomness, jitter
        self.n_chains, n_targets, self.n_dimensions = position.z.shape
        one = position.z.new_ones(n_targets)
        self.fixed: bool = step_size is not None
        self.first_step = 0.5 * self.n_dimensions**-0.25 * one
        self.averaging: DualAveraging = DualAveraging(
            self.first_step if step_size is None else step_size * one,
            kernel.target_acceptance,
            # a quarter oscillation makes a whitened Gaussian forget its start; half of one keeps its energy
            0.5 * math.pi / kernel.n_leapfrog,
        )
        self.n_accepted = self.n_jumps = self.n_not_finite = torch.zeros_like(one)
        self.n_steps: int = 0
        self.restart(position)

    @property
    def step_size(self) -> Tensor:
        """h (B,) after warm-up."""
        return self.averaging.average

    def warm_up(
        self,
        n_steps: int,
        after_step: Callable[[], None],
        descend: bool = True,
        precision: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Move n_steps times; adapt the step size, and the reference at the end of each of a few windows.

        The first fifth descends to where the density is high, if asked to. The last fifth adapts the step size only. What
        is adapted stays fixed afterwards.

        Arguments:
            n_steps: proposals, or as much work of another kind.
            after_step: called after each.
            descend: begin with Adam.
            precision: z (M, B, D) -> curvature of -log p along each dimension (B, D), for a first reference.
        """
        ends = [round(share * n_steps) for share in (0.2, 0.35, 0.55, 0.8)]
        if descend:
            self._descend(ends[0], after_step)
        if precision is not None and self.kernel.preconditions and n_steps:
            self._set_reference(self.position.z.mean(dim=0), precision(self.position.z).rsqrt())
        places = gradients = Moments.like(self.position.z[0])
        for i in range(ends[0] + 1 if descend else 1, n_steps + 1):
            self.step(self.averaging.step)
            after_step()
            places, gradients = places.add(self.position.z), gradients.add(self.position.gradient)
            if i not in ends:
                continue
            if i > ends[1] and self.kernel.preconditions and places.count >= 40:
                # s^2 = sqrt(var z / var grad): exact for a Gaussian of independent entries, even from few draws
                smallest = torch.finfo(places.mean.dtype).tiny
                variances = places.variance.clamp(min=smallest), gradients.variance.clamp(min=smallest)
                usable = (places.variance > 0) & (gradients.variance > 0)
                scale = torch.where(usable, (variances[0] / variances[1]) ** 0.25, self.reference.scale)
                self._set_reference(places.mean, scale)
                if not self.fixed:
                    self.averaging.restart(self.first_step)
            places = gradients = Moments.like(self.position.z[0])

    def restart(self, position: Position) -> None:
        """Go on from there in other coordinates: what was adapted is forgotten."""
        self.position: Position = position
        self.reference: Reference = Reference(torch.zeros_like(position.z[0]), torch.ones_like(position.z[0]))
        if not self.fixed:
            self.averaging.restart(self.first_step)

    def sample(self, n_steps: int, after_step: Callable[[], None], jump: Callable[[], None] = lambda: None) -> None:
        """Move n_steps times with everything fixed; ``jump`` is a further move after each step."""
        step_size = self.step_size
        self.n_accepted, self.n_steps = torch.zeros_like(self.n_accepted), 0
        for _ in range(n_steps):
            self.step(step_size, adapt=False)
            jump()
            after_step()

    def jump(self, z: Tensor, log_q: Callable[[Tensor], Tensor]) -> None:
        """Propose z (M, B, D), independent draws of a density log q (M, B): independence Metropolis (Tierney 1994)."""
        here, there = self.position, self.target(z)
        log_ratio = there.log_prob - log_q(there.image) - here.log_prob + log_q(here.image)
        finite = torch.isfinite(log_ratio) & torch.isfinite(there.gradient).all(dim=-1)
        accepted = finite & (self.randomness.uniform(*log_ratio.shape).log() < log_ratio)
        self._move(there, accepted)
        self.n_jumps = self.n_jumps + accepted.to(log_ratio.dtype).mean(dim=0)

    def step(self, step_size: Tensor, adapt: bool = True) -> None:
        """One proposal, accepted or not."""
        here = self.position
        shape = here.log_prob.shape
        momentum = self.randomness.normal(*shape, self.n_dimensions)
        u = self.randomness.uniform(*shape, 2)
        h = step_size * (1 + self.jitter * (2 * u[..., 0] - 1))
        there, end_momentum = self._trajectory(here, momentum, h[..., None])
        gain = 0.5 * ((momentum - end_momentum) * (momentum + end_momentum)).sum(dim=-1)
        log_ratio = there.log_prob - here.log_prob + gain
        finite = torch.isfinite(log_ratio) & torch.isfinite(there.gradient).all(dim=-1)
        probability = torch.where(finite, log_ratio.clamp(max=0).exp(), torch.zeros_like(log_ratio))
        accepted = (u[..., 1] < probability) if self.kernel.metropolis else finite
        self._move(there, accepted)
        self.n_not_finite = self.n_not_finite + (~finite).sum(dim=0)
        self.n_accepted = self.n_accepted + accepted.to(h.dtype).mean(dim=0)
        self.n_steps += 1
        if adapt and not self.fixed:
            self.averaging.update(probability.mean(dim=0))

    def _move(self, there: Position, where: Tensor) -> None:
        """Take the chains in ``where`` (M, B) to another position."""
        pairs = zip(there, self.position, strict=True)
        self.position = Position(*(torch.where(where[(...,) + (None,) * (t.ndim - 2)], t, old) for t, old in pairs))

    def _trajectory(self, here: Position, q: Tensor, h: Tensor) -> tuple[Position, Tensor]:
        mean, scale = self.reference
        kick = torch.tan(h / 2) if self.kernel.rotates else h / 2
        w = (here.z - mean) / scale

        def force(position: Position, w: Tensor) -> Tensor:
            return scale * position.gradient + w if self.kernel.rotates else scale * position.gradient

        push = force(here, w)
        for _ in range(self.kernel.n_leapfrog):
            q = q + kick * push
            turned = w * torch.cos(h) + q * torch.sin(h), q * torch.cos(h) - w * torch.sin(h)
            w, q = turned if self.kernel.rotates else (w + h * q, q)
            here = self.target(mean + scale * w)
            push = force(here, w)
            q = q + kick * push
        return here, q

    def _set_reference(self, mean: Tensor, scale: Tensor) -> None:
        scale = torch.where(torch.isfinite(scale), scale, self.reference.scale).clamp(1e-4, 1e4)
        self.reference = Reference(mean if self.kernel.rotates else self.reference.mean, scale)

    def _descend(self, n_steps: int, after_step: Callable[[], None]) -> None:
        """``Adam`` on -log p from where the chains are, ``n_leapfrog`` updates per step, to the best point of each."""
        if not n_steps:
            return
        shape, n = self.position.z.shape, 0

        def evaluate(z: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal n
            there = self.target(z.view(shape)) if n else self.position
            finite = torch.isfinite(there.log_prob) & torch.isfinite(there.gradient).all(dim=-1)
            self._move(there, finite)
            self.n_not_finite = self.n_not_finite + (~finite).sum(dim=0)
            if n and n % self.kernel.n_leapfrog == 0:
                after_step()
            n += 1
            return -there.log_prob.flatten(), -there.gradient.flatten(0, 1)

        adam = Adam(n_steps * self.kernel.n_leapfrog, 0.1, 0.1, betas=(0.9, 0.99))
        trace = adam.minimize(evaluate, self.position.z.flatten(0, 1))
        if trace.interrupted:
            raise KeyboardInterrupt
        self.position = self.target(trace.z.view(shape))
