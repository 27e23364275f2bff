"""Minimizers that treat every image of a batch by itself: history, line search, step, stopping and restarts are its own.

    z <- z - t H grad F(z)       L-BFGS: H from the last changes of z and grad F; t by a strong-Wolfe line search
    z <- z - t m / (sqrt(v)+e)   Adam:   m, v running averages of the gradient and its square

Symbols: z latents (B, D), F objective (B,), t step. All images are evaluated in one batch; each is in a phase of its own line
search, a small state machine in tensors (B,). The best iterate is returned. A trial step with a non-finite value is halved;
where no step along a direction helps, the image restarts from its best point with an empty history. The host looks at the
batch only now and then; once half of the images have stopped, they leave it. ``TorchLBFGS`` is torch's, as published.

References:
    Nocedal, Wright 2006, Numerical optimization, 2nd ed., https://doi.org/10.1007/978-0-387-40065-5, Alg. 3.5, 3.6, 7.4
    Hager, Zhang 2005, A new conjugate gradient method, https://doi.org/10.1137/030601880, Eq. (4.1): Wolfe condition that
        rounding does not spoil
    Kingma, Ba 2015, Adam, https://arxiv.org/abs/1412.6980
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from flowprox.naming import require_choice, require_count, require_positive

Evaluate = Callable[[Tensor], tuple[Tensor, Tensor]]
"""z (B, D) to (F (B,), grad F (B, D)); image i of the result depends on image i of z only. If it has a method
``select(images)``, which gives the same function for some images of the batch or None, ``LBFGS`` lets stopped ones leave."""

REASONS = ("running", "converged", "iterations", "evaluations", "line search", "interrupted")
RUNNING, CONVERGED, ITERATIONS, EVALUATIONS, LINE_SEARCH, INTERRUPTED = range(len(REASONS))

_SUFFICIENT_DECREASE, _CURVATURE = 1e-4, 0.9  # c1 and c2 of the strong Wolfe conditions
_MAX_TRIALS = 20  # per line search
_LOOK_EVERY = 8  # evaluations between two looks at which images have stopped


@dataclass
class Trace:
    """How a minimization went; N iterations, B images, D dimensions.

    Arguments:
        z: best iterate (B, D).
        losses, norms: F and ||z|| after each iteration, (N + 1, B); a stopped image keeps its last value.
        status: indices of ``REASONS``, (B,).
        n_evaluations, restarts: per image, (B,).
    """

    z: Tensor
    losses: Tensor
    norms: Tensor
    status: Tensor
    n_evaluations: Tensor
    restarts: Tensor

    @property
    def reasons(self) -> list[str]:
        """Why each image stopped."""
        return [REASONS[code] for code in self.status.tolist()]

    def best_of(self, n: int) -> Trace:
        """The best of every n successive images, which are n attempts at one; evaluations and restarts are summed."""
        if n == 1:
            return self
        lowest = torch.nan_to_num(self.losses, nan=torch.inf).amin(dim=0).view(-1, n)  # Adam's last is not its best
        chosen = lowest.argmin(dim=1) + torch.arange(len(lowest), device=lowest.device) * n
        sums = (counts.view(-1, n).sum(dim=1) for counts in (self.n_evaluations, self.restarts))
        return Trace(self.z[chosen], self.losses[:, chosen], self.norms[:, chosen], self.status[chosen], *sums)

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended it."""
        return bool((self.status == INTERRUPTED).any())


class Optimizer(Protocol):
    """Contract: minimize F from z, in at most ``n_iterations`` steps."""

    @property
    def n_iterations(self) -> int:
        """Steps at most."""
        ...

    @property
    def max_trials(self) -> int:
        """Evaluations of F at most, but for one."""
        ...

    def minimize(self, evaluate: Evaluate, z: Tensor, scales: Tensor | None = None) -> Trace:
        """Minimize from z (B, D); ``scales`` (D,) or (B, D) says by how much dimensions differ: as 1 / curvature. ValueError
        where F or its gradient is not finite there.
        """
        ...


@dataclass(frozen=True)
class LBFGS:
    """Limited-memory BFGS with a strong-Wolfe line search, every image by itself.

    Arguments:
        n_iterations: accepted steps per image.
        learning_rate: first trial step along a quasi-Newton direction.
        n_pairs: changes of z and of the gradient that are remembered.
        tolerance: an image has converged when a step lowers F by less than this part of F.
        max_evaluations: of F and its gradient per image; None allows 1.25 n_iterations + 20.

    Raises:
        ValueError: a value that is not positive (``tolerance`` may be 0).

    Example:
        >>> def evaluate(z):  # the sum over (z - 3)^2
        ...     return (z - 3).square().sum(1), 2 * (z - 3)
        >>> LBFGS(n_iterations=5).minimize(evaluate, torch.zeros(1, 4)).z
        tensor([[3., 3., 3., 3.]])
    """

    n_iterations: int = 100
    learning_rate: float = 1.0
    n_pairs: int = 30
    tolerance: float = 1e-8
    max_evaluations: int | None = None

    def __post_init__(self) -> None:
        require_count("n_iterations", self.n_iterations)
        require_count("n_pairs", self.n_pairs)
        require_count("max_evaluations", 1 if self.max_evaluations is None else self.max_evaluations)
        require_positive("learning_rate", self.learning_rate)
        require_positive("tolerance", self.tolerance, or_zero=True)

    @property
    def max_trials(self) -> int:
        """Evaluations at most, that of the start not counted."""
        return self.max_evaluations or (5 * self.n_iterations) // 4 + 20

    def minimize(self, evaluate: Evaluate, z: Tensor, scales: Tensor | None = None) -> Trace:
        """See ``Optimizer``; ``scales`` is the diagonal that the quasi-Newton matrix H begins with."""
        search = _Search(evaluate, z, evaluate(z), self, scales)
        try:
            for n in range(1, self.max_trials + 1):
                search.trial(last=n == self.max_trials)
                if n % _LOOK_EVERY == 0 and not search.look():
                    break
        except KeyboardInterrupt:
            search.stop(search.status == RUNNING, INTERRUPTED)
        return search.trace()


class _Search:
    """State of L-BFGS for a batch: everything (B,), (B, D) or, for the history, (n_pairs, B, D)."""

    def __init__(
        self, evaluate: Evaluate, z: Tensor, start: tuple[Tensor, Tensor], options: LBFGS, scales: Tensor | None
    ) -> None:
        self.evaluate, self.whole, self.options = evaluate, evaluate, options
        self.scales = z.new_ones(()) if scales is None else scales.to(z).expand_as(z)
        self.z = z.detach().clone()
        self.f, self.g = _at_start(*start)
        n_images, dimension = z.shape
        self.images = self.members = torch.arange(n_images, device=z.device)  # in this batch and in the first one
        self.status = torch.full_like(self.images, RUNNING)
        self.iteration, self.n_evaluations, self.restarts = (torch.zeros_like(self.images) for _ in range(3))
        self.losses, self.norms = _Curve(options.n_iterations, self.f), _Curve(options.n_iterations, self.z.norm(dim=1))
        self.s, self.y = (z.new_zeros(options.n_pairs, n_images, dimension) for _ in range(2))
        self.rho = z.new_zeros(options.n_pairs, n_images)
        self.n_pushed = torch.zeros_like(self.images)
        self.d, self.g_lo = torch.zeros_like(self.z), self.g
        self.t, self.t_lo, self.t_hi, self.f_lo, self.f_hi = (torch.zeros_like(self.f) for _ in range(5))
        self.slope, self.slope_lo, self.slope_hi = (torch.zeros_like(self.f) for _ in range(3))
        self.n_trials, self.zooming = torch.zeros_like(self.images), torch.zeros_like(self.images, dtype=torch.bool)
        self.results = {name: getattr(self, name).clone() for name in ("z", "status", "n_evaluations", "restarts")}
        self.stop(self.g.norm(dim=1) == 0, CONVERGED)
        self._begin_search(torch.ones_like(self.zooming))

    def look(self) -> bool:
        """Whether any image goes on; if half of them or more have stopped, they leave the batch."""
        left = (self.status == RUNNING).nonzero().flatten()
        select = getattr(self.whole, "select", None)
        smaller = select(self.members[left]) if select and 0 < len(left) <= len(self.images) // 2 else None
        if smaller is not None:
            self._store()
            self.evaluate, n_images = smaller, len(self.images)
            for name, value in vars(self).items():
                if isinstance(value, Tensor) and value.ndim and name != "images":
                    dim = 1 if name in ("s", "y", "rho") else 0
                    if value.shape[dim] == n_images:
                        setattr(self, name, value.index_select(dim, left))
            self.images = self.images[: len(left)]
        return len(left) > 0

    def _store(self) -> None:
        for name, value in self.results.items():
            value[self.members] = getattr(self, name)

    # One evaluation for every image, and what each makes of it ---------------------------------------------------------

    def trial(self, last: bool = False) -> None:
        """Evaluate the batch once; ``last``: take the best point of every unfinished line search."""
        running = self.status == RUNNING
        f, g = self.evaluate(torch.addcmul(self.z, self.t[:, None], self.d))
        slope = _dot(g, self.d)
        finite = torch.isfinite(f) & torch.isfinite(slope)
        f = torch.where(finite, f, torch.inf)
        self.n_evaluations += running
        self.n_trials += 1

        decrease = f <= self.f + _SUFFICIENT_DECREASE * self.t * self.slope
        lower = decrease & ((f < self.f_lo) | (self.t_lo == 0))
        flat = slope.abs() <= -_CURVATURE * self.slope
        # where F cannot resolve the decrease any more, its derivative can (Hager and Zhang)
        resolution = 4 * torch.finfo(f.dtype).eps * self.f.abs()
        bracketed = (slope <= (2 * _SUFFICIENT_DECREASE - 1) * self.slope) & (slope >= _CURVATURE * self.slope)
        accepted = running & finite & ((lower & flat) | (bracketed & (f <= self.f_lo + resolution)))

        searching = running & ~accepted
        self._narrow(searching, f, g, slope, lower, finite)
        exhausted = searching & ((self.n_trials >= _MAX_TRIALS) | last)
        settled = exhausted & (self.t_lo > 0)
        self._accept(accepted, self.t, f, g)
        self._accept(settled, self.t_lo, self.f_lo, self.g_lo)
        if last:
            self.stop(self.status == RUNNING, EVALUATIONS)
        else:  # no step along d lowers F: down the gradient without a history; if that was it already, stop
            lost, fresh = exhausted & ~settled, self.n_pushed == 0
            self.stop(lost & fresh, LINE_SEARCH)
            self.restarts += lost & ~fresh
            self._forget(lost)
        self._begin_search(accepted | exhausted)

    def _narrow(self, searching: Tensor, f: Tensor, g: Tensor, slope: Tensor, lower: Tensor, finite: Tensor) -> None:
        """Next trial step: further out until the minimum is bracketed by (lo, hi), then within."""
        ascending = slope * torch.where(self.zooming, self.t_hi - self.t_lo, 1.0) >= 0
        # a worse point is the new far end; a better one becomes the near end, and the old near end the far one if F rises
        far = searching & ~lower
        turn = searching & lower & ascending
        near = searching & lower
        t_hi = torch.where(far, self.t, torch.where(turn, self.t_lo, self.t_hi))
        f_hi = torch.where(far, f, torch.where(turn, self.f_lo, self.f_hi))
        slope_hi = torch.where(far, slope, torch.where(turn, self.slope_lo, self.slope_hi))
        outer = torch.where(near & ~self.zooming & ~turn, self.t - self.t_lo, 0.0)
        beyond = self.t + _cubic_step(self.t_lo, self.f_lo, self.slope_lo, self.t, f, slope, outside=True)
        self.t_hi, self.f_hi, self.slope_hi = t_hi, f_hi, slope_hi
        self.t_lo = torch.where(near, self.t, self.t_lo)
        self.f_lo = torch.where(near, f, self.f_lo)
        self.slope_lo = torch.where(near, slope, self.slope_lo)
        self.g_lo = torch.where(near[:, None], g, self.g_lo)
        self.zooming = self.zooming | far | turn
        within = self.t_lo + _cubic_step(self.t_lo, self.f_lo, self.slope_lo, self.t_hi, self.f_hi, self.slope_hi)
        further = torch.clamp(beyond, self.t + outer, self.t + 9 * outer)
        self.t = torch.where(searching, torch.where(self.zooming, within, further), self.t)

    def _accept(self, where: Tensor, t: Tensor, f: Tensor, g: Tensor) -> None:
        """Take the step t along d for the images in ``where``."""
        s = torch.where(where[:, None], t[:, None] * self.d, 0.0)
        y = torch.where(where[:, None], g - self.g, 0.0)
        sy = _dot(s, y)
        curved = where & (sy > torch.finfo(s.dtype).eps * s.norm(dim=1) * y.norm(dim=1))
        slot = self.n_pushed % self.options.n_pairs
        self.s[slot, self.images] = torch.where(curved[:, None], s, self.s[slot, self.images])
        self.y[slot, self.images] = torch.where(curved[:, None], y, self.y[slot, self.images])
        self.rho[slot, self.images] = torch.where(curved, 1 / sy, self.rho[slot, self.images])
        self.n_pushed += curved
        small = self.f - f <= self.options.tolerance * self.f.abs()
        self.z = self.z + s
        self.g = torch.where(where[:, None], g, self.g)
        self.f = torch.where(where, f, self.f)
        self.iteration += where
        self.losses.record(self.iteration, self.f, self.members)
        self.norms.record(self.iteration, self.z.norm(dim=1), self.members)
        self.stop(where & (small | (self.g.norm(dim=1) == 0)), CONVERGED)
        self.stop(where & (self.iteration >= self.options.n_iterations), ITERATIONS)

    def _forget(self, where: Tensor) -> None:
        self.rho = torch.where(where, 0.0, self.rho)
        self.n_pushed = torch.where(where, 0, self.n_pushed)

    def _begin_search(self, where: Tensor) -> None:
        """A new direction and first trial step for the images in ``where``; stopped ones stay where they are."""
        running = self.status == RUNNING
        d, t = self._direction()
        slope = _dot(d, self.g)
        uphill = ~(slope < 0)  # rounding has spoilt the history
        d = torch.where(uphill[:, None], -self.scales * self.g, d)
        self._forget(where & uphill)
        t = torch.where(uphill, self._first_step(), t)
        self.d = torch.where(where[:, None], d, self.d)
        self.slope = torch.where(where, _dot(self.d, self.g), self.slope)
        self.t = torch.where(running, torch.where(where, t, self.t), 0.0)
        self.t_lo = torch.where(where, 0.0, self.t_lo)
        self.f_lo = torch.where(where, self.f, self.f_lo)
        self.slope_lo = torch.where(where, self.slope, self.slope_lo)
        self.g_lo = torch.where(where[:, None], self.g, self.g_lo)
        self.n_trials = torch.where(where, 0, self.n_trials)
        self.zooming = self.zooming & ~where

    def _direction(self) -> tuple[Tensor, Tensor]:
        """(-H g (B, D), first trial step (B,)) by the two-loop recursion; an empty slot has rho = 0 and changes nothing."""
        q = self.g
        alphas = []
        slots = [(self.n_pushed - 1 - j) % self.options.n_pairs for j in range(self.options.n_pairs)]
        for slot in slots:
            alpha = self.rho[slot, self.images] * _dot(self.s[slot, self.images], q)
            q = torch.addcmul(q, alpha[:, None], self.y[slot, self.images], value=-1)
            alphas.append(alpha)
        newest = self.y[slots[0], self.images]
        known = self.n_pushed > 0
        size = 1 / (self.rho[slots[0], self.images] * _dot(newest, self.scales * newest))
        q = self.scales * q * torch.where(known, size, 1.0)[:, None]
        for slot, alpha in zip(reversed(slots), reversed(alphas), strict=True):
            beta = self.rho[slot, self.images] * _dot(self.y[slot, self.images], q)
            q = torch.addcmul(q, (alpha - beta)[:, None], self.s[slot, self.images])
        return -q, torch.where(known, self.options.learning_rate, self._first_step())

    def _first_step(self) -> Tensor:
        """Down the scaled gradient by an rms of 0.1, or to where F would reach zero if it fell on straight."""
        tiny = torch.finfo(self.f.dtype).tiny
        downhill = self.scales * self.g
        by_size = 0.1 * self.g.shape[1] ** 0.5 / downhill.norm(dim=1).clamp_min(tiny)
        to_zero = self.f / _dot(downhill, self.g).clamp_min(tiny)
        return torch.where(self.f > 0, torch.minimum(by_size, to_zero), by_size)

    def stop(self, where: Tensor, reason: int) -> None:
        """End the running images in ``where``."""
        self.status = torch.where(where & (self.status == RUNNING), reason, self.status)

    def trace(self) -> Trace:
        """The result so far. F falls with every step, so the last iterate is the best."""
        self._store()
        return Trace(losses=self.losses.finish(), norms=self.norms.finish(), **self.results)


def _cubic_step(
    t_lo: Tensor, f_lo: Tensor, slope_lo: Tensor, t_hi: Tensor, f_hi: Tensor, slope_hi: Tensor, outside: bool = False
) -> Tensor:
    """From t_lo to the minimum of the cubic through both ends, within 0.1 to 0.9 of the way; the middle if it has none.

    With ``outside`` from t_hi on, unlimited, and far out if there is none.
    """
    width = t_hi - t_lo
    safe = torch.where(width == 0, 1.0, width)
    d1 = slope_lo + slope_hi - 3 * (f_hi - f_lo) / safe
    square = d1.square() - slope_lo * slope_hi
    d2 = square.clamp_min(0).sqrt() * torch.sign(safe)
    share = 1 - (slope_hi + d2 - d1) / (slope_hi - slope_lo + 2 * d2)
    share = torch.where((square >= 0) & torch.isfinite(share), share, 10.0 if outside else 0.5)
    return (share - 1) * width if outside else share.clamp(0.1, 0.9) * width


@dataclass(frozen=True)
class Adam:
    """Adam with the best iterate kept, every image by itself.

    A non-finite trial is taken back half way; after five in a row the image restarts from its best point with half the
    step size.

    Arguments:
        n_iterations: steps.
        learning_rate: step size at the start.
        final_learning_rate: what the step size falls towards, as a part of ``learning_rate``; 1 keeps it constant.
        decay: how it falls: along a "cosine", or "linear".
        betas: decay of the averages of gradient and squared gradient.
        epsilon: added to the root of the latter.

    Raises:
        ValueError: a value out of its range.

    Example:
        >>> def evaluate(z):
        ...     return (z - 3).square().sum(1), 2 * (z - 3)
        >>> trace = Adam(n_iterations=300, learning_rate=0.1).minimize(evaluate, torch.zeros(1, 4))
        >>> bool((trace.z - 3).abs().max() < 1e-3), trace.reasons
        (True, ['iterations'])
    """

    n_iterations: int = 500
    learning_rate: float = 0.01
    final_learning_rate: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    decay: str = "cosine"

    def __post_init__(self) -> None:
        require_count("n_iterations", self.n_iterations)
        require_positive("learning_rate", self.learning_rate)
        if not 0 <= self.final_learning_rate <= 1:
            raise ValueError(f"final_learning_rate must lie in [0, 1], got {self.final_learning_rate}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas}")
        require_positive("epsilon", self.epsilon)
        require_choice("decay", self.decay, ("cosine", "linear"))

    @property
    def max_trials(self) -> int:
        """Evaluations at most, that of the start not counted."""
        return self.n_iterations

    def minimize(self, evaluate: Evaluate, z: Tensor, scales: Tensor | None = None) -> Trace:
        """See ``Optimizer``; Adam finds scales of its own, and ``scales`` is not used."""
        z = z.detach().clone()
        f, g = _at_start(*evaluate(z))
        best_z, best_f = z, f
        mean, square, step = torch.zeros_like(z), torch.zeros_like(z), torch.zeros_like(z)
        n_moments, n_halvings, restarts = (torch.zeros_like(f, dtype=torch.long) for _ in range(3))
        rate = torch.full_like(f, self.learning_rate)
        losses, norms = _Curve(self.n_iterations, f), _Curve(self.n_iterations, z.norm(dim=1))
        status, n = ITERATIONS, 0
        try:
            for n in range(1, self.n_iterations + 1):
                finite = torch.isfinite(f) & torch.isfinite(g).all(dim=1)
                n_halvings = torch.where(finite, 0, n_halvings + 1)
                lost = n_halvings > 5
                restarts += lost
                rate = torch.where(lost, rate / 2, rate)
                clean = torch.where(finite[:, None], g, 0.0)
                mean = torch.where(finite[:, None], torch.lerp(clean, mean, self.betas[0]), mean)
                square = torch.where(finite[:, None], torch.lerp(clean.square(), square, self.betas[1]), square)
                mean, square = (torch.where(lost[:, None], 0.0, moment) for moment in (mean, square))
                n_moments = torch.where(lost, 0, n_moments + finite)
                progress = (n - 1) / self.n_iterations
                left = 1 - progress if self.decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
                share = self.final_learning_rate + (1 - self.final_learning_rate) * left
                forward = -(share * rate)[:, None] * self._direction(mean, square, n_moments)
                # a bad trial is taken back by half of the step that led to it
                step = torch.where(finite[:, None], forward, torch.where(lost[:, None], 0.0, step / 2))
                z = torch.where(lost[:, None], best_z, torch.where(finite[:, None], z + step, z - step))
                n_halvings = torch.where(lost, 0, n_halvings)
                f, g = evaluate(z)
                better = f < best_f  # never with NaN
                best_f, best_z = torch.where(better, f, best_f), torch.where(better[:, None], z, best_z)
                losses.record(n, f)
                norms.record(n, z.norm(dim=1))
        except KeyboardInterrupt:
            status = INTERRUPTED
        codes = torch.full_like(restarts, status)
        return Trace(best_z, losses.finish(), norms.finish(), codes, torch.full_like(restarts, n + 1), restarts)

    def _direction(self, mean: Tensor, square: Tensor, n: Tensor) -> Tensor:
        """m / (sqrt(v) + e), both corrected for their start at zero after n averages."""
        count = n.clamp_min(1)[:, None]
        mean = mean / (1 - self.betas[0] ** count)
        return mean / ((square / (1 - self.betas[1] ** count)).sqrt() + self.epsilon)


@dataclass(frozen=True)
class TorchLBFGS:
    """``torch.optim.LBFGS`` on the mean of F over the batch, as Asim et al. (2020) ran it: images share history and steps.

    There is no line search, so that it may diverge; of the points after each call of its ``step`` an image keeps the best. The
    result for an image depends on its batch: use ``LBFGS`` for anything but reproducing.

    Arguments:
        n_iterations: calls of ``step``, 20 for denoising and inpainting and 30 for compressed sensing there.
        learning_rate: 1 and 0.1 there.
        n_inner: iterations of each call, torch's default.
        n_pairs: changes that are remembered, torch's default.

    Raises:
        ValueError: a value that is not positive.

    Example:
        >>> def evaluate(z):  # the sum over (z - 3)^2
        ...     return (z - 3).square().sum(1), 2 * (z - 3)
        >>> TorchLBFGS(n_iterations=1).minimize(evaluate, torch.zeros(1, 4)).z
        tensor([[3., 3., 3., 3.]])
    """

    n_iterations: int = 20
    learning_rate: float = 1.0
    n_inner: int = 20
    n_pairs: int = 100

    def __post_init__(self) -> None:
        for name in ("n_iterations", "n_inner", "n_pairs"):
            require_count(name, getattr(self, name))
        require_positive("learning_rate", self.learning_rate)

    @property
    def max_trials(self) -> int:
        """Evaluations at most, that of the end not counted."""
        return self.n_iterations * self.n_inner * 5 // 4

    def minimize(self, evaluate: Evaluate, z: Tensor, scales: Tensor | None = None) -> Trace:
        """See ``Optimizer``; ``scales`` is not used."""
        z = z.detach().clone()
        lbfgs = torch.optim.LBFGS([z], self.learning_rate, self.n_inner, history_size=self.n_pairs)
        best_z, (best_f, _) = z.clone(), _at_start(*evaluate(z))
        losses, norms = _Curve(self.n_iterations, best_f), _Curve(self.n_iterations, z.norm(dim=1))
        status, n_evaluations = ITERATIONS, 1

        def closure() -> Tensor:
            nonlocal n_evaluations
            n_evaluations += 1
            f, g = evaluate(z)
            z.grad = g / len(z)
            return f.mean()

        try:
            for n in range(1, self.n_iterations + 1):
                lbfgs.step(closure)  # type: ignore[arg-type]
                f, n_evaluations = evaluate(z)[0], n_evaluations + 1
                better = f < best_f  # never with NaN
                best_f, best_z = torch.where(better, f, best_f), torch.where(better[:, None], z, best_z)
                losses.record(n, f)
                norms.record(n, z.norm(dim=1))
        except KeyboardInterrupt:
            status = INTERRUPTED
        codes = torch.full(best_f.shape, status, device=z.device)
        counts = torch.full_like(codes, n_evaluations)
        return Trace(best_z, losses.finish(), norms.finish(), codes, counts, torch.zeros_like(codes))


OPTIMIZERS = {"lbfgs": LBFGS, "adam": Adam, "torch-lbfgs": TorchLBFGS}
"""Optimizers by the word that picks one in recipes and on the command line."""


class _Curve:
    """A number per iteration and image; images proceed at different times."""

    def __init__(self, n_iterations: int, start: Tensor) -> None:
        self.values = torch.full((n_iterations + 1, len(start)), torch.nan, dtype=start.dtype, device=start.device)
        self.values[0] = start
        self.rows = torch.arange(n_iterations + 1, device=start.device)[:, None].expand_as(self.values)

    def record(self, iteration: Tensor | int, value: Tensor, images: Tensor | slice = slice(None)) -> None:
        """Enter values (n,) of some images, each at its iteration or all at one."""
        self.values[iteration, images] = value

    def finish(self) -> Tensor:
        """Rows up to the last iteration of any image; the others keep their last value."""
        known = torch.cummax(torch.where(self.values.isnan(), -1, self.rows), dim=0).values.clamp_min(0)
        return self.values.gather(0, known)[: int(known.max()) + 1]


def _at_start(f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    if bad := (~(torch.isfinite(f) & torch.isfinite(g).all(dim=1))).nonzero().flatten().tolist():
        raise ValueError(f"the objective or its gradient is not finite at the start for image {bad}; choose another")
    return f, g


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dim=1)
