r"""Unfolded networks: K iterations of a proximal algorithm whose prox is learned, trained end to end.

    fold k:   v_k     = D_k(x_k, y)                 data step
              x_{k+1} = prox_k(v_k, lambda_k)       learned prox

    UnfoldedPGD:  D_k = x + mu_k A^T (y - A x)                                gradient step on 1/2 ||y - A x||^2
    UnfoldedHQS:  D_k = argmin_u 1/2 ||y - A u||^2 + rho_k/2 ||u - x||^2      exact step of half-quadratic splitting

Symbols: y measurement, A operator, x image (B, C, H, W), mu step size, rho penalty, lambda shrinkage. The start x_0
is g(0), the image of the most likely latent of the pretrained flow, learned on from there, or A^T y. Wei et al. 2022,
Sec. III; their Eq. (8) prints the gradient step with the opposite sign, which ascends for mu > 0, and their Eq. (12)
leaves the last shrinkage out, which makes the last flow the identity: ``shrink_last=False`` gives that form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain

import torch
import torch.nn.functional as F
from deepinv.models import Reconstructor
from deepinv.physics import LinearPhysics
from torch import Tensor, nn

from flowprox.adaptation import adapt
from flowprox.flows import Flow, frozen
from flowprox.latent_mean import LatentMeanNet
from flowprox.levels import at_level, checked_levels, noise_level
from flowprox.naming import Specified
from flowprox.operators import data_gradient, data_prox
from flowprox.prox import FlowProx

__all__ = ["Unfolded", "UnfoldedHQS", "UnfoldedPGD"]


class Unfolded(Reconstructor):
    """What the unfolded algorithms share; a subclass gives the data step.

    Arguments:
        proxes: one per fold; the same object K times ties the folds.
        data_weight: the learned scalar of the data step at the start, > 0, one number or one per data step.
        shrinkage: lambda at the start, > 0, one number or one per fold.
        start: "flow" (g(0), kept as a learned image) or "adjoint" (A^T y).
        shrink_last: shrink in the last fold too.
        final_data_step: one more data step after the last prox, with a weight of its own. With an exact measurement it
            returns the measured pixels, so that the last prox is free to change them.
        operator: a physics of the network's own, used in place of the one passed to ``forward``; its parameters are trained
            along.
        levels: rising noise levels at which the scalars above are learned, interpolated between them (``flowprox.levels``); the
            network is then told the level of a measurement, ``physics.noise_model.sigma``. None: one set for all.
        latent_mean: network that predicts what each fold shrinks towards (``flowprox.latent_mean``) from the first fold's v,
            A^T A 1 averaged over the channels and, with ``levels``, the noise level: C + 1 or C + 2 channels. A^T A 1 shows
            where a mask is open; it is constant for blurs, and noise for random matrices. None shrinks towards 0.
        adaptation_rank: the folds' flows share the weights of the first one's coupling nets but for a correction of this rank
            in each fold (``flowprox.adaptation``; the later flows' own are given up). None: every fold has its own.

    Raises:
        ValueError: no proxes, a start value that is not positive, start "flow" without a ``FlowProx`` in the first fold, or a
            ``latent_mean`` or ``adaptation_rank`` that does not fit the proxes.
    """

    def __init__(
        self,
        proxes: Sequence[nn.Module],
        data_weight: float | Sequence[float],
        shrinkage: float | Sequence[float],
        start: str,
        shrink_last: bool,
        final_data_step: bool,
        operator: LinearPhysics | None,
        levels: Sequence[float] | None,
        latent_mean: LatentMeanNet | None,
        adaptation_rank: int | None,
    ) -> None:
        super().__init__()
        if not proxes:
            raise ValueError("proxes is empty; pass one prox per fold")
        if start not in ("flow", "adjoint"):
            raise ValueError(f"start must be 'flow' or 'adjoint', got {start!r}")
        self.proxes = nn.ModuleList(proxes)
        if adaptation_rank is not None:
            adapt(self.flows(), adaptation_rank)
        n_data_steps = len(proxes) + int(final_data_step)
        self.levels = checked_levels(levels)
        self.log_data_weight = _log_parameter(data_weight, n_data_steps, "step_size or penalty", self.levels, power=0)
        self.log_shrinkage = _log_parameter(shrinkage, len(proxes), "shrinkage", self.levels, power=2)
        if not any(getattr(prox, "uses_step", True) for prox in proxes):
            self.log_shrinkage.requires_grad_(False)  # nothing would ever train it
        self.shrink_last = shrink_last
        self.operator = operator
        self.latent_mean = latent_mean
        if latent_mean is not None:
            _check_latent_mean(latent_mean, proxes, with_level=levels is not None)
            if not shrink_last:
                raise ValueError("shrink_last=False leaves the last fold's latent_mean untrained; set it to True")
        self.start_image = None
        if start == "flow":
            if not isinstance(proxes[0], FlowProx):
                raise ValueError(
                    "start='flow' needs a FlowProx in the first fold; use start='adjoint' with other proxes"
                )
            self.start_image = nn.Parameter(_most_likely_image(proxes[0].flow, proxes[0].flow.image_shape[1:]))

    def data_step(self, x: Tensor, y: Tensor, physics: LinearPhysics, weight: Tensor) -> Tensor:
        """One data step from x (B, C, H, W); ``weight`` is the fold's learned scalar, or one per image (B,)."""
        raise NotImplementedError

    def forward(self, y: Tensor, physics: LinearPhysics) -> Tensor:
        """Reconstruct x (B, C, H, W) from the measurement y of ``physics``.

        In evaluation mode and without gradients the flows are ``frozen`` meanwhile; around many calls do that once yourself.

        Raises:
            ValueError: the image size is not divisible by ``divisor``, or the channels do not fit.
        """
        if not self.training and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            with frozen(self):
                return self.iterates(y, physics)[-1]
        return self.iterates(y, physics)[-1]

    def iterates(self, y: Tensor, physics: LinearPhysics) -> list[Tensor]:
        """The start image and the result of every fold, the last with its final data step: K + 1 images (B, C, H, W)."""
        physics = physics if self.operator is None else self.operator
        x = self.initial_image(y, physics)
        images = [x]
        sigma = None if self.levels is None else noise_level(physics, x)
        weights, steps = self._scalars(self.log_data_weight, sigma), self._scalars(self.log_shrinkage, sigma)
        means: Sequence[Tensor | None] = [None] * len(self.proxes)
        for k, prox in enumerate(self.proxes):
            v = self.data_step(x, y, physics, weights[k])
            if k == 0 and self.latent_mean is not None:
                means = self._latent_means(v, physics, sigma)
            last = k == len(self.proxes) - 1
            step = steps[k] if self.shrink_last or not last else torch.zeros_like(steps[k])
            told = {"sigma": sigma, "mean": means[k]}
            x = prox(v, step, **{name: value for name, value in told.items() if value is not None})
            images.append(x)
        if len(weights) > len(self.proxes):
            images[-1] = self.data_step(x, y, physics, weights[-1])
        return images

    def _latent_means(self, v: Tensor, physics: LinearPhysics, sigma: Tensor | None) -> list[Tensor]:
        """mu(y) of each fold, (B, C, H, W)."""
        assert self.latent_mean is not None
        with torch.no_grad():
            seen = physics.A_adjoint(physics.A(torch.ones_like(v[:1]))).mean(dim=1, keepdim=True)
        given = [v - 0.5, seen.expand(v.shape[0], -1, -1, -1)]
        if sigma is not None and self.levels is not None:
            known = sigma.clamp(max=self.levels[-1])  # no level beyond the last was seen in training
            given.append(known.view(-1, 1, 1, 1).expand(-1, 1, *v.shape[-2:]))
        return self.latent_mean(torch.cat(given, dim=1))

    def _scalars(self, logarithms: Tensor, sigma: Tensor | None) -> Tensor:
        """One number per step (n,), or one per step and image (n, B) at the images' noise levels sigma (B,)."""
        if self.levels is None or sigma is None:
            return torch.exp(logarithms)
        return torch.exp(at_level(logarithms.T, self.levels, sigma).T)

    def initial_image(self, y: Tensor, physics: LinearPhysics) -> Tensor:
        """x_0 (B, C, H, W): at another size than it was made for, the start image resized."""
        adjoint = self._checked_adjoint(y, physics)
        if self.start_image is None:
            return adjoint
        image = self.start_image
        if image.shape[-2:] != adjoint.shape[-2:]:
            image = F.interpolate(image, adjoint.shape[-2:], mode="bilinear", align_corners=False)
        return image.expand(adjoint.shape[0], -1, -1, -1)

    def _checked_adjoint(self, y: Tensor, physics: LinearPhysics) -> Tensor:
        """A^T y (B, C, H, W), or an error that says what is wrong with y."""
        if not isinstance(y, Tensor) or y.dtype != self.log_data_weight.dtype:
            found = y.dtype if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(
                f"y must be a tensor of {self.log_data_weight.dtype} like the model, got {found}; convert it"
            )
        adjoint = physics.A_adjoint(y)
        n_channels = "C" if self.start_image is None else self.start_image.shape[1]
        if adjoint.ndim != 4 or n_channels not in ("C", adjoint.shape[1]):
            raise ValueError(
                f"y of shape {tuple(y.shape)} measures an image {tuple(adjoint.shape)}; the model takes batches "
                f"(B, {n_channels}, H, W): add the missing dimensions, or repeat a gray channel with expand"
            )
        return adjoint

    @property
    def shrinkages(self) -> Tensor:
        """lambda_k, (K,), or (K, J) at J levels; without ``shrink_last`` the last one is not used."""
        return torch.exp(self.log_shrinkage.detach())

    @property
    def divisor(self) -> int:
        """Height and width of the image must be multiples of this."""
        return math.lcm(*(getattr(prox, "divisor", 1) for prox in self.proxes))

    def flows(self) -> list[Flow]:
        """The distinct flows of the folds, in order."""
        flows = [prox.flow for prox in self.proxes if isinstance(prox, FlowProx)]
        return list(dict.fromkeys(flows))

    def parameter_groups(self, learning_rate: float, scalar_learning_rate: float) -> list[dict]:
        """Groups for an optimizer: networks, the start image, and the scalars (mu or rho, lambda, latent weights), which Wei et
        al. train with 1e-2 beside 1e-5 for the flows."""
        scalars = [self.log_data_weight, self.log_shrinkage]
        scalars += [prox.log_weight for prox in self.proxes if getattr(prox, "log_weight", None) is not None]
        start = [] if self.start_image is None else [self.start_image]
        seen = {id(p) for p in (*scalars, *start)}
        others = [p for p in self.parameters() if id(p) not in seen and p.requires_grad]
        named = (("networks", others), ("start", [p for p in start if p.requires_grad]))
        groups = [{"params": found, "lr": learning_rate, "name": name} for name, found in named if found]
        unique = [p for p in dict.fromkeys(scalars) if p.requires_grad]
        return [*groups, {"params": unique, "lr": scalar_learning_rate, "name": "scalars"}]

    def freeze_proxes(self) -> None:
        """Train mu and lambda only: with one pretrained flow in every fold, the plug-and-play of Wei et al., Table II."""
        frozen_parts = [self.proxes] if self.latent_mean is None else [self.proxes, self.latent_mean]
        for parameter in (p for part in frozen_parts for p in part.parameters()):
            parameter.requires_grad_(False)
        if self.start_image is not None:
            self.start_image.requires_grad_(False)


class UnfoldedPGD(Specified, Unfolded):
    """Unfolded proximal gradient descent (Wei et al. 2022, Sec. III, Eqs. 8 to 12).

    Arguments:
        proxes: one per fold; the same object K times ties the folds.
        step_size: mu at the start; 0.5 with noise-trained flows.
        shrinkage: lambda at the start; large values throw a pretrained flow off the map.
        start, shrink_last, final_data_step, operator, levels, latent_mean, adaptation_rank: see ``Unfolded``.

    Raises:
        ValueError: no proxes, a start value that is not positive, or start "flow" without a ``FlowProx`` in the first fold.

    Example:
        >>> from flowprox.flows import Glow
        >>> from flowprox.operators import make_physics
        >>> flows = [Glow(image_shape=(3, 8, 8), n_levels=1, n_steps=1, hidden_channels=4) for _ in range(2)]
        >>> model = UnfoldedPGD([FlowProx(flow) for flow in flows])
        >>> physics = make_physics("denoising", (3, 8, 8))
        >>> model(torch.rand(2, 3, 8, 8), physics).shape
        torch.Size([2, 3, 8, 8])
    """

    def __init__(
        self,
        proxes: Sequence[nn.Module],
        step_size: float | Sequence[float] = 0.5,
        shrinkage: float | Sequence[float] = 0.05,
        start: str = "flow",
        shrink_last: bool = True,
        final_data_step: bool = False,
        operator: LinearPhysics | None = None,
        levels: Sequence[float] | None = None,
        latent_mean: LatentMeanNet | None = None,
        adaptation_rank: int | None = None,
    ) -> None:
        Unfolded.__init__(
            self,
            proxes,
            step_size,
            shrinkage,
            start,
            shrink_last,
            final_data_step,
            operator,
            levels,
            latent_mean,
            adaptation_rank,
        )

    def data_step(self, x: Tensor, y: Tensor, physics: LinearPhysics, weight: Tensor) -> Tensor:
        weight = weight.view(-1, 1, 1, 1) if weight.ndim == 1 else weight
        return x + weight * data_gradient(x, y, physics)

    @property
    def step_sizes(self) -> Tensor:
        """mu_k, (K,), or (K + 1,) with a final data step; (..., J) at J levels."""
        return torch.exp(self.log_data_weight.detach())


class UnfoldedHQS(Specified, Unfolded):
    """Unfolded half-quadratic splitting: the data step is solved exactly, which a blur's small singular values reward.

    Arguments:
        proxes: one per fold; the same object K times ties the folds.
        penalty: rho at the start, relative to a data term of weight one.
        shrinkage, start, shrink_last, final_data_step, operator, levels, latent_mean, adaptation_rank: see ``Unfolded``.

    Raises:
        ValueError: as ``UnfoldedPGD``.
    """

    def __init__(
        self,
        proxes: Sequence[nn.Module],
        penalty: float | Sequence[float] = 0.1,
        shrinkage: float | Sequence[float] = 0.05,
        start: str = "flow",
        shrink_last: bool = True,
        final_data_step: bool = False,
        operator: LinearPhysics | None = None,
        levels: Sequence[float] | None = None,
        latent_mean: LatentMeanNet | None = None,
        adaptation_rank: int | None = None,
    ) -> None:
        Unfolded.__init__(
            self,
            proxes,
            penalty,
            shrinkage,
            start,
            shrink_last,
            final_data_step,
            operator,
            levels,
            latent_mean,
            adaptation_rank,
        )

    def data_step(self, x: Tensor, y: Tensor, physics: LinearPhysics, weight: Tensor) -> Tensor:
        return data_prox(x, y, physics, weight)

    @property
    def penalties(self) -> Tensor:
        """rho_k, (K,), or (K + 1,) with a final data step; (..., J) at J levels."""
        return torch.exp(self.log_data_weight.detach())


def _check_latent_mean(net: LatentMeanNet, proxes: Sequence[nn.Module], with_level: bool) -> None:
    flows = [prox.flow for prox in proxes if isinstance(prox, FlowProx)]
    if len(flows) != len(proxes):
        raise ValueError("latent_mean needs a FlowProx in every fold: only these have a latent")
    needed = {
        "n_inputs": {flow.n_channels + 1 + int(with_level) for flow in flows},
        "n_channels": {flow.n_channels for flow in flows},
        "n_levels": {flow.n_levels for flow in flows},
        "n_folds": {len(proxes)},
    }
    for name, values in needed.items():
        if values != {getattr(net, name)}:
            wanted = " or ".join(map(str, sorted(values)))
            hint = ", one entry of hidden_channels for each" if name == "n_levels" else ""
            raise ValueError(f"latent_mean has {name} {getattr(net, name)} and the proxes need {wanted}{hint}")


def _log_parameter(
    value: float | Sequence[float], n: int, name: str, levels: Sequence[float] | None, power: int
) -> nn.Parameter:
    """log of n numbers (n,); at J levels (n, J), growing with that power of the level up to the number at the last one."""
    values = [float(value)] * n if isinstance(value, int | float) else [float(v) for v in value]
    if len(values) != n or any(not v > 0 for v in values):
        raise ValueError(f"{name} must be positive, one number or one per fold ({n}); got {value}")
    logarithms = torch.tensor(values).log()
    if levels is None:
        return nn.Parameter(logarithms)
    relative = torch.tensor(levels) / levels[-1]
    return nn.Parameter(logarithms[:, None] + power * relative.log())


@torch.no_grad()
def _most_likely_image(flow: Flow, image_size: Sequence[int]) -> Tensor:
    """g(0), (1, C, H, W): the image of the most likely latent (Wei et al. 2022, Sec. III-C)."""
    height, width = image_size
    like = next(chain(flow.parameters(), flow.buffers()), torch.empty(()))  # a flow may have no step, only squeezes
    zeros = torch.zeros(1, flow.n_channels * height * width, dtype=like.dtype, device=like.device)
    return flow.decode(zeros, (height, width))
