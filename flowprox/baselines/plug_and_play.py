r"""Plug-and-play: a denoiser in the place of the prox, at a noise level that falls from step to step.

    HQS:  u = argmin_u 1/(2 sigma^2) ||y - A u||^2 + weight/(2 s_k^2) ||u - x||^2,   x <- D(u, s_k)
    PGD:  u = x + tau A^T (y - A x),  tau = 1 / ||A||^2,                             x <- D(u, s_k)

Symbols: x image (B, C, H, W), y measurement, A linear operator, sigma noise standard deviation, D(u, s) denoiser, and
s_k its noise level, k = 1..K, from ``sigma_start`` down to sigma in equal ratios.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Literal

import torch
import torch.nn.functional as F
from deepinv.models import Denoiser, Reconstructor
from deepinv.optim import HQS, L2, PGD, PnP
from deepinv.physics import Inpainting, LinearPhysics, Physics
from torch import Tensor, nn

from flowprox.baselines.external import Biharmonic
from flowprox.baselines.shared import Baseline, squared_norm
from flowprox.flows import Flow
from flowprox.naming import Values, require_choice, require_count, require_positive
from flowprox.noise import noise_level
from flowprox.operators import data_prox
from flowprox.operators.imaging import SuperResolution
from flowprox.operators.sizes import continued
from flowprox.priors import FlowDenoiser, ReconstructorDenoiser
from flowprox.prox import FlowProx

_SMALLEST_SIGMA = 0.01  # the floor of Zhang et al., below which the schedule would never end


class PlugAndPlay(Baseline):
    """Any denoiser as the prior of a linear problem, by deepinv's half-quadratic splitting or proximal gradient.

    A fixed number of iterations is run, and nothing is written to the physics. An image's estimate does not depend on the
    others in its batch, but for the tolerance (1e-6) of the conjugate gradient that "hqs" runs where there is no closed form.
    Several noise levels in one batch are each treated by their own.

    References:
        Zhang, Li, Zuo, Zhang, Van Gool, Timofte 2021, Plug-and-play image restoration with deep denoiser prior,
        https://arxiv.org/abs/2008.13751, Eqs. (6), (7) and Sec. 4.2 (schedule, ``weight``, ``sigma_start``).

    Arguments:
        denoiser: x_hat = denoiser(x, s), images (B, C, H, W), s a noise level per image (B,): a ``deepinv.models.Denoiser``,
            or a ``ResNetProx`` or ``UNetProx`` trained as a denoiser, which need not be told s. A ``Flow`` stands for
            ``FlowDenoiser(flow)``, an unfolded network that is told the level for ``ReconstructorDenoiser(network)``.
        sigma: noise standard deviation in units of the image range; None takes ``physics.noise_model.sigma``. Below 0.01
            it counts as 0.01.
        n_iterations: K, one denoising each. None takes 8, and 24 for inpainting and super-resolution, which fill slowly.
        sigma_start: s_1; a sigma above it is used throughout. None takes 49 / 255, and 0.1 for inpainting.
        weight: of closeness to the denoised image in the data step of "hqs".
        iteration: "hqs" (the data step is solved exactly) or "pgd" (a gradient step).
        start: x before the first step: "adjoint" (A^T y), for inpainting "biharmonic" (``Biharmonic``), for super-resolution
            "bicubic" (y enlarged): a denoiser takes black holes for content. None takes what fits the operator: of a blur of
            boundary "valid" y, continued.
        final_data_step: end with a data step instead of a denoising, for measurements without noise.

    Raises:
        ValueError: a ``FlowProx`` (which is no denoiser), a number out of range; on
            call: an operator that is not linear, an unknown noise level, a measurement that is not finite.

    Example:
        >>> from deepinv.models import MedianFilter
        >>> from flowprox.operators import make_physics
        >>> physics = make_physics("inpainting", (3, 16, 16), mask_size=4)
        >>> x = torch.linspace(0, 1, 16).expand(1, 3, 16, 16)
        >>> bool((PlugAndPlay(MedianFilter())(physics(x), physics) - x).norm() < 0.5 * (physics(x) - x).norm())
        True
    """

    def __init__(
        self,
        denoiser: nn.Module,
        sigma: float | None = None,
        n_iterations: int | None = None,
        sigma_start: float | None = None,
        weight: float = 0.23,
        iteration: Literal["hqs", "pgd"] = "hqs",
        start: Literal["adjoint", "biharmonic", "bicubic"] | None = None,
        final_data_step: bool = False,
    ) -> None:
        super().__init__()
        require_count("n_iterations", 1 if n_iterations is None else n_iterations)
        require_positive("sigma_start", 1.0 if sigma_start is None else sigma_start)
        require_positive("weight", weight)
        require_positive("sigma", sigma or 0.0, or_zero=True)
        require_choice("iteration", iteration, ("hqs", "pgd"))
        require_choice("start", start, (None, "adjoint", "biharmonic", "bicubic"))
        self.denoiser = _as_denoiser(denoiser)
        self.sigma, self.n_iterations, self.sigma_start = sigma, n_iterations, sigma_start
        self.weight, self.iteration, self.start = weight, iteration, start
        self.final_data_step = final_data_step

    def forward(self, y: Tensor, physics: Physics, callback: Callable[[int, int], None] | None = None) -> Tensor:  # type: ignore[override]
        """As every baseline's; ``callback`` is called after every denoising with their number so far and in all."""
        n = self.n_iterations or self._defaults(physics)[0]
        done = count(1)
        hook = self.denoiser.register_forward_hook(lambda *_: None if callback is None else callback(next(done), n))
        try:
            return super().forward(y, physics)
        finally:
            hook.remove()

    @torch.no_grad()
    def _estimate(self, y: Tensor, physics: LinearPhysics) -> Tensor:
        start = self._start(y, physics)
        levels, sigma = self.schedule(start, physics)
        settings: Values = {
            "data_fidelity": _DataStep(),
            "prior": PnP(self.denoiser),
            "max_iter": len(levels),
            "g_param": levels,
        }
        if self.iteration == "hqs":
            steps = [level.square() / (self.weight * sigma.square()) for level in levels]
            x = HQS(stepsize=steps, **settings)(y, physics, init=start)  # type: ignore[arg-type]
        else:
            x = PGD(stepsize=1 / squared_norm(physics, start), **settings)(y, physics, init=start)
        return data_prox(x, y, physics, self.weight) if self.final_data_step else x

    def _start(self, y: Tensor, physics: LinearPhysics) -> Tensor:
        x, is_enlarged = physics.A_adjoint(y), isinstance(physics, SuperResolution)
        if self.start == "bicubic" and not is_enlarged:
            raise ValueError(f"start 'bicubic' is for super-resolution, not {type(physics).__name__}; use 'adjoint'")
        if self.start == "biharmonic" or (self.start is None and isinstance(physics, Inpainting)):
            return Biharmonic()(y, physics)
        if self.start is None and getattr(physics, "padding", "") == "valid":  # A^T y is dark at the border
            return continued(y, x)
        return F.interpolate(y, x.shape[-2:], mode="bicubic") if is_enlarged and self.start != "adjoint" else x

    def schedule(self, x: Tensor, physics: Physics) -> tuple[list[Tensor], Tensor]:
        """Noise levels of the denoiser s_1, ..., s_K and of the measurement sigma, each (B,), for images like x."""
        n_iterations, sigma_start = self._defaults(physics)
        n_iterations, sigma_start = self.n_iterations or n_iterations, self.sigma_start or sigma_start
        sigma = noise_level(physics, x, allow_rms=True) if self.sigma is None else x.new_full((len(x),), self.sigma)
        sigma = sigma.clamp_min(_SMALLEST_SIGMA)
        first = sigma.clamp_min(sigma_start)
        share = torch.linspace(0, 1, n_iterations).tolist() if n_iterations > 1 else [1.0]
        return [first ** (1 - t) * sigma**t for t in share], sigma

    def _defaults(self, physics: Physics) -> tuple[int, float]:
        """n_iterations and sigma_start."""
        is_filled = isinstance(physics, Inpainting | SuperResolution)
        return 24 if is_filled else 8, 0.1 if isinstance(physics, Inpainting) else 49 / 255


class _DataStep(L2):
    """1/2 ||y - A x||^2 whose prox takes one gamma per image and leaves the physics as it is."""

    def prox(
        self, x: Tensor, y: Tensor, physics: LinearPhysics, *args: object, gamma: float | Tensor = 1.0, **kwargs: object
    ) -> Tensor:
        return data_prox(x, y, physics, 1.0 / gamma)


def _as_denoiser(model: object) -> nn.Module:
    if isinstance(model, Flow):
        return FlowDenoiser(model)
    if isinstance(model, FlowProx):
        raise ValueError("a FlowProx shrinks and is no denoiser: pass FlowDenoiser(prox.flow), or the flow itself")
    if isinstance(model, Reconstructor) and not isinstance(model, Denoiser) and hasattr(model, "levels"):
        return ReconstructorDenoiser(model)
    if not isinstance(model, nn.Module) or (isinstance(model, Reconstructor) and not isinstance(model, Denoiser)):
        raise ValueError(f"denoiser must map (x, sigma) to an image, got {type(model).__name__}; see deepinv.models")
    return model
