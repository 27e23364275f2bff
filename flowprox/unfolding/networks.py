r"""Unfolded networks: K iterations of a proximal algorithm whose prox is learned, trained end to end.

    fold k:   v_k     = D_k(x_k, y)                 data step
              x_{k+1} = prox_k(v_k, lambda_k)       learned prox

    GradientStep:  D_k = x + mu_k A^T (y - A x)                                    descends 1/2 ||y - A x||^2
    ProximalStep:  D_k = argmin_u 1/2 ||y - A u||^2 + rho_k/2 ||u - x||^2          exact step of half-quadratic splitting

Symbols: y measurement, A operator, x image (B, C, H, W), mu step size, rho penalty, lambda shrinkage. The start x_0
is g(0), the image of the most likely latent of the pretrained flow, learned on from there, or A^T y. Wei et al. 2022,
Sec. III; their Eq. (8) prints the gradient step with the opposite sign, which ascends for mu > 0, and their Eq. (12)
leaves the last shrinkage out, which makes the last flow the identity: ``shrink_last=False`` gives that form.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from deepinv.models import Reconstructor
from deepinv.physics import LinearPhysics, Physics
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.func import functional_call

from flowprox.checkpoints import Pretrained
from flowprox.flows import Flow, frozen
from flowprox.naming import Specified, nearest
from flowprox.noise import noise_level
from flowprox.operators import (
    PROBLEMS,
    PaddedBlur,
    Problem,
    data_gradient,
    data_prox,
    filtered_backprojection,
    fit_to_divisor,
)
from flowprox.prox import FlowProx, at_level
from flowprox.unfolding.conditioning import Conditioning


class GradientStep(Specified):
    """D(x, y) = x + mu A^T (y - A x), a step down 1/2 ||y - A x||^2.

    Arguments:
        step_size: mu at the start, > 0, one number or one per data step; 0.5 with noise-trained flows.
    """

    name = "step_size"

    def __init__(self, step_size: float | Sequence[float] = 0.5) -> None:
        self.weight = step_size

    def __call__(self, x: Tensor, y: Tensor, physics: LinearPhysics, weight: Tensor) -> Tensor:
        """D(x, y) (B, C, H, W); ``weight`` is the step's learned mu, or one per image (B,)."""
        return x + (weight.view(-1, 1, 1, 1) if weight.ndim == 1 else weight) * data_gradient(x, y, physics)


class ProximalStep(Specified):
    """D(x, y) = argmin_u 1/2 ||y - A u||^2 + rho/2 ||u - x||^2, which a blur's small singular values reward.

    Arguments:
        penalty: rho at the start, > 0, one number or one per data step, relative to a data term of weight one.
    """

    name = "penalty"

    def __init__(self, penalty: float | Sequence[float] = 0.1) -> None:
        self.weight = penalty

    def __call__(self, x: Tensor, y: Tensor, physics: LinearPhysics, weight: Tensor) -> Tensor:
        """D(x, y) (B, C, H, W); ``weight`` is the step's learned rho, or one per image (B,)."""
        return data_prox(x, y, physics, weight)


class Unfolded(Pretrained, Specified, Reconstructor):
    """K times a data step and a learned prox.

    Arguments:
        proxes: one per fold; the same object K times ties the folds.
        data_step: what a fold does with the measurement.
        shrinkage: lambda at the start, > 0, one number or one per fold; large values throw a pretrained flow off the map.
        start: "flow" (g(0), kept as a learned image), "adjoint" (A^T y) or "fbp" (filtered backprojection, of tomography).
        shrink_last: shrink in the last fold too.
        final_data_step: one more data step after the last prox, with a weight of its own. With an exact measurement it
            returns the measured pixels, so that the last prox is free to change them.
        operator: a physics of the network's own, used in place of the one passed to ``forward``; its parameters are trained
            along.
        conditioning: what the folds are told beside the image and what they share; None is nothing.

    Raises:
        ValueError: no proxes, a start value that is not positive, start "flow" without a ``FlowProx`` in the first fold, or
            ``conditioning`` that does not fit the proxes.

    Example:
        >>> from flowprox.flows import Glow
        >>> from flowprox.operators import make_physics
        >>> flows = [Glow(image_shape=(3, 8, 8), n_levels=1, n_steps=1, hidden_channels=4) for _ in range(2)]
        >>> model = Unfolded([FlowProx(flow) for flow in flows], GradientStep(0.5))
        >>> physics = make_physics("denoising", (3, 8, 8))
        >>> model(torch.rand(2, 3, 8, 8), physics).shape
        torch.Size([2, 3, 8, 8])
    """

    _levels: Tensor

    def __init__(
        self,
        proxes: Sequence[nn.Module],
        data_step: GradientStep | ProximalStep,
        shrinkage: float | Sequence[float] = 0.05,
        start: str = "flow",
        shrink_last: bool = True,
        final_data_step: bool = False,
        operator: LinearPhysics | None = None,
        conditioning: Conditioning | None = None,
    ) -> None:
        super().__init__()
        if not proxes:
            raise ValueError("proxes is empty; pass one prox per fold")
        if start not in ("flow", "adjoint", "fbp"):
            raise ValueError(f"start must be 'flow', 'adjoint' or 'fbp', got {start!r}")
        if not isinstance(operator, LinearPhysics | None):
            raise ValueError(f"operator must be a linear physics or None, got {type(operator).__name__}")
        conditioning = conditioning or Conditioning()
        conditioning.fit(proxes)
        if conditioning.latent_mean is not None and not shrink_last:
            raise ValueError("shrink_last=False leaves the last fold's latent_mean untrained; set it to True")
        self.proxes = nn.ModuleList(proxes)
        self.data_step = data_step
        self.levels = conditioning.levels
        self.register_buffer("_levels", torch.tensor(self.levels or ()), persistent=False)
        n_data_steps = len(proxes) + bool(final_data_step)
        self.log_data_weight = _log_parameter(data_step.weight, n_data_steps, data_step.name, self.levels, power=0)
        self.log_shrinkage = _log_parameter(shrinkage, len(proxes), "shrinkage", self.levels, power=2)
        if not any(getattr(prox, "uses_step", True) for prox in proxes):
            self.log_shrinkage.requires_grad_(False)  # nothing would ever train it
        self.shrink_last = shrink_last
        self.operator = operator
        self.latent_mean = conditioning.latent_mean
        self.starts_with_fbp = start == "fbp"
        self.start_image = None
        if start == "flow":
            if not isinstance(proxes[0], FlowProx):
                raise ValueError("start='flow' needs a FlowProx in the first fold; use start='adjoint' with others")
            flow = proxes[0].flow
            like = next(chain(flow.parameters(), flow.buffers()), torch.empty(()))  # it may have no step, only squeezes
            with torch.no_grad():  # g(0), the image of the most likely latent (Wei et al. 2022, Sec. III-C)
                self.start_image = nn.Parameter(flow.decode(like.new_zeros(1, math.prod(flow.image_shape))))

    def forward(self, y: Tensor, physics: LinearPhysics | Sequence[LinearPhysics]) -> Tensor:
        """Reconstruct x (B, C, H, W) from the measurement y of ``physics``.

        In evaluation mode and without gradients the flows are ``frozen`` meanwhile; around many calls do that once yourself.
        A measurement of an image whose sides ``divisor`` does not divide is extended, and the result cropped
        (``flowprox.operators.fit_to_divisor``). With one operator for each data step, K or, with a final one, K + 1, the
        start and what the folds are told are the first one's.

        Raises:
            ValueError: the measurement cannot be extended to sides that ``divisor`` divides, the channels do not fit, or
                another number of operators.
        """
        if not self.training and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            with frozen(self):
                return self.iterates(y, physics)[-1]
        return self.iterates(y, physics)[-1]

    def iterates(self, y: Tensor, physics: LinearPhysics | Sequence[LinearPhysics]) -> list[Tensor]:
        """The start image and the result of every fold, the last with its final data step: K + 1 images (B, C, H, W)."""
        n = len(self.log_data_weight)
        operators = list(physics) if isinstance(physics, Sequence) else [physics] * n
        operators = operators if self.operator is None else [self.operator] * n
        if len(operators) != n:
            raise ValueError(f"physics has {len(operators)} operators for {n} data steps; give one, or one for each")
        adjoint = self._checked_adjoint(y, operators[0])
        # pixel_unshuffle leaves the shape of an empty batch as it is
        if not torch.compiler.is_compiling() and not len(adjoint):
            return [adjoint] * (len(self.proxes) + 1)
        if not any(side % self.divisor for side in adjoint.shape[-2:]):
            return self._folds(y, operators, adjoint)
        if any(operator is not operators[0] for operator in operators):
            raise ValueError(f"with several operators the sides must be divisible by {self.divisor}: pad or crop")
        fitted = fit_to_divisor(y, operators[0], self.divisor)
        images = self._folds(fitted.y, [fitted.physics] * len(operators), fitted.physics.A_adjoint(fitted.y))
        return [image[..., fitted.rows, fitted.columns] for image in images]

    def _folds(self, y: Tensor, operators: Sequence[LinearPhysics], adjoint: Tensor) -> list[Tensor]:
        """``iterates`` for sides that ``divisor`` divides."""
        x = filtered_backprojection(y, operators[0]) if self.starts_with_fbp else self._start(adjoint)
        images = [x]
        sigma = None if self.levels is None else noise_level(operators[0], x).clamp(max=self.levels[-1])
        weights, steps = self._scalars(self.log_data_weight, sigma), self._scalars(self.log_shrinkage, sigma)
        means: Sequence[Tensor | None] = [None] * len(self.proxes)
        for k, prox in enumerate(self.proxes):
            # Eq. (8) with the sign of descent
            v = self.data_step(x, y, operators[k], weights[k])
            if self.latent_mean is not None and (k == 0 or self.latent_mean.every_fold):
                means = self.latent_mean.of_measurement(v, operators[0], sigma)
            last = k == len(self.proxes) - 1
            step = steps[k] if self.shrink_last or not last else torch.zeros_like(steps[k])
            condition = {"sigma": sigma, "mean": means[k]}
            # Eqs. (9) to (11)
            x = prox(v, step, **{name: value for name, value in condition.items() if value is not None})
            images.append(x)
        if self.ends_with_data_step:
            images[-1] = self.data_step(x, y, operators[-1], weights[-1])
        return images

    @property
    def ends_with_data_step(self) -> bool:
        """Whether there is a data step after the last prox."""
        return len(self.log_data_weight) > len(self.proxes)

    def final_data_step(self, x: Tensor, y: Tensor, physics: LinearPhysics) -> Tensor:
        """x (B, C, H, W) after the network's data step after the last prox; itself, if there is none."""
        if not self.ends_with_data_step:
            return x
        sigma = None if self.levels is None else noise_level(physics, x).clamp(max=self.levels[-1])
        return self.data_step(x, y, physics, self._scalars(self.log_data_weight, sigma)[-1])

    def _scalars(self, logarithms: Tensor, sigma: Tensor | None) -> Tensor:
        """One number per step (n,), or one per step and image (n, B) at the images' noise levels sigma (B,)."""
        if self.levels is None or sigma is None:
            return torch.exp(logarithms)
        return torch.exp(at_level(logarithms.T, self._levels, sigma).T)

    def _start(self, adjoint: Tensor) -> Tensor:
        """x_0 (B, C, H, W): at another size than it was made for, the start image resized."""
        if self.start_image is None:
            return adjoint
        image = self.start_image
        if image.shape[-2:] != adjoint.shape[-2:]:
            image = F.interpolate(image, adjoint.shape[-2:], mode="bilinear", align_corners=False)
        return image.expand(adjoint.shape[0], -1, -1, -1)

    def _checked_adjoint(self, y: Tensor, physics: LinearPhysics) -> Tensor:
        """A^T y (B, C, H, W), or an error that says what is wrong with y."""
        own = self.log_data_weight.dtype
        if own not in (torch.float32, torch.float64):
            remedy = "call model.float(), and torch.autocast for half precision"
            raise ValueError(f"a flow is not inverted in {own}: {remedy}")
        if not isinstance(y, Tensor) or y.dtype != own:
            dtype = y.dtype if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(f"y must be a tensor of {own} like the model, got {dtype}; convert it")
        adjoint = physics.A_adjoint(y)
        n_channels = getattr(self.proxes[0], "n_channels", None)
        if adjoint.ndim != 4 or n_channels not in (None, adjoint.shape[1]):
            measured = f"y of shape {tuple(y.shape)} measures an image {tuple(adjoint.shape)}"
            wanted = f"the model takes batches (B, {n_channels or 'C'}, H, W)"
            remedy = "add the missing dimensions, or repeat a gray channel with expand"
            raise ValueError(f"{measured}; {wanted}: {remedy}")
        return adjoint

    def check(self, problem: Problem) -> list[str]:
        """What of a problem the network was not trained for, by its card, a sentence each; without a card nothing is known.

        Less noise than in training is harmless; another kind of problem, another mask size or more noise are not.
        """
        card = getattr(self, "card", None)
        if card is None or not card.problem:
            return []
        trained = Problem(card.problem["name"], card.problem.get("parameters") or {})
        ranges = card.problem.get("ranges") or {}
        varied = PROBLEMS[problem.name].ranges
        if problem.name != trained.name and not (varied and set(varied) <= set(ranges)):
            return [f"{card.name} was trained for {trained.name} and is used for {problem.name}"]
        remarks = []
        for key, value in problem.parameters.items():
            low, high = ranges.get(key, [trained.parameters.get(key)] * 2)
            if key == "sigma":
                low, high = 0.0, max(high or 0.0, self.levels[-1] if self.levels else 0.0)
            is_known = (key in ranges or key in trained.parameters) and not (key == "mask" and ranges)
            if is_known and not _lies_within(value, low, high):
                span = low if low == high else f"{low} to {high}"
                uses = f"was trained with {key} {span} and is used with {value}"
                remarks.append(f"{card.name} {f'was not trained with this {key}' if low is None else uses}")
        return remarks

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

    def sample(
        self,
        n: int,
        temperature: float = 1.0,
        image_size: tuple[int, int] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """n images (n, C, H, W) of the density of every fold's prox, fold after fold, those of tied folds once; with ``levels``
        at the lowest one. ValueError for a fold without a flow, or a predicted mean: without a measurement there is no density.
        """
        proxes = [prox for prox in dict.fromkeys(self.proxes) if isinstance(prox, FlowProx)]
        if self.latent_mean is not None or not proxes:
            why = "the proxes are no flows, or latent_mean makes them depend on a measurement"
            raise ValueError(f"there is no density to draw images from: {why}; use proxes[k].sample(n, mean=...)")
        sigma = None if self.levels is None else self._levels[:1].expand(n)
        return torch.cat([prox.sample(n, temperature, image_size, generator, sigma=sigma) for prox in proxes])

    @torch.no_grad()
    def latents(self, y: Tensor, physics: LinearPhysics | Sequence[LinearPhysics]) -> list[Tensor]:
        """z_k = f_k(v_k) (B, C, H, W): what each fold with a flow shrinks when y is reconstructed."""
        with self.noting_latents() as latents:
            self(y, physics)
        return latents

    @contextmanager
    def noting_latents(self) -> Iterator[list[Tensor]]:
        """Within the block every fold with a flow appends f_k(v_k) (B, C, H, W), at the cost of one more pass of its flow."""
        latents: list[Tensor] = []

        def keep(prox: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            if isinstance(prox, FlowProx):
                latents.append(prox.flow.encode_image(arguments[0]))

        hooks = [prox.register_forward_pre_hook(keep) for prox in dict.fromkeys(self.proxes)]
        try:
            yield latents
        finally:
            for hook in hooks:
                hook.remove()

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


class UnfoldedPGD(Unfolded):
    """Unfolded proximal gradient descent (Wei et al. 2022, Sec. III, Eqs. 8 to 12): ``Unfolded`` with a ``GradientStep``.

    Arguments:
        proxes, shrinkage, start, shrink_last, final_data_step, operator: see ``Unfolded``.
        step_size: mu at the start, see ``GradientStep``.
        conditioning: levels, latent_mean and adaptation_rank, see ``Conditioning``.

    Raises:
        ValueError: as ``Unfolded``.
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
        **conditioning: Any,
    ) -> None:
        rules = start, shrink_last, final_data_step, operator, Conditioning(**conditioning)
        super().__init__(proxes, GradientStep(step_size), shrinkage, *rules)

    @property
    def step_sizes(self) -> Tensor:
        """mu_k, (K,), or (K + 1,) with a final data step; (..., J) at J levels."""
        return torch.exp(self.log_data_weight.detach())


class UnfoldedHQS(Unfolded):
    """Unfolded half-quadratic splitting: ``Unfolded`` with a ``ProximalStep``.

    Arguments:
        penalty: rho at the start, see ``ProximalStep``; the others and errors are those of ``UnfoldedPGD``.

    Raises:
        ValueError: as ``Unfolded``.
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
        **conditioning: Any,
    ) -> None:
        rules = start, shrink_last, final_data_step, operator, Conditioning(**conditioning)
        super().__init__(proxes, ProximalStep(penalty), shrinkage, *rules)

    @property
    def penalties(self) -> Tensor:
        """rho_k, (K,), or (K + 1,) with a final data step; (..., J) at J levels."""
        return torch.exp(self.log_data_weight.detach())


def _lies_within(value: object, low: object, high: object) -> bool:
    if isinstance(value, tuple):
        return all(_lies_within(part, low, high) for part in value)
    if isinstance(value, int | float) and isinstance(low, int | float) and isinstance(high, int | float):
        return low <= value <= high
    return value is None or repr(value) == repr(low)


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


# Export ---------------------------------------------------------------------------------------------------------------


class _Reconstruction(nn.Module):
    """y and values of some of the operator's tensors -> x_hat; the other tensors become constants."""

    def __init__(self, model: Reconstructor, physics: Physics, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.physics, self.names = model, physics, names

    def forward(self, y: Tensor, *values: Tensor) -> Tensor:
        if not values:
            return self.model(y, self.physics)
        given = {f"physics.{name}": value for name, value in zip(self.names, values, strict=True)}
        return functional_call(_Reconstruction(self.model, self.physics, ()), given, (y,))


def export_program(model: Reconstructor, physics: Physics, y: Tensor, inputs: Sequence[str] = ()) -> ExportedProgram:
    """A trained network for one operator as one program, x_hat = program.module()(y), which needs no flowprox.

    The weights are fixed: matrices are inverted and scales folded beforehand, and the operator's constants (mask, kernel) are
    part of the program. ``torch.export.save`` writes it, with a warning that a constant is not a "complete tensor" (the weights
    are channels-last), ``torch.export.load`` reads it wherever PyTorch runs, and ahead-of-time compilers take it.

    Arguments:
        model: an ``UnfoldedPGD`` or ``UnfoldedHQS``, whose flows are initialized.
        physics: the operator that measured y.
        y: an example (B, ...), B at least 2. The program takes any batch size and measurements of this shape otherwise.
        inputs: tensors of the operator that the program takes after y, by name: "sigma", the noise's standard deviation (),
            "mask" (1, C, H, W). Without them they are constants.

    Raises:
        ValueError: the model is no unfolded network (solvers decide as they go, which no program can); exact data steps of a
            blur that is not circular; y holds a single measurement, for which the batch size cannot be left open; the operator
            has no tensor of that name.

    Example:
        >>> from flowprox import Glow, FlowProx, UnfoldedPGD, make_physics
        >>> model = UnfoldedPGD([FlowProx(Glow((3, 16, 16), n_levels=1, n_steps=1, hidden_channels=4))]).eval()
        >>> physics = make_physics("denoising", (3, 16, 16), sigma=0.2)
        >>> y = physics(torch.rand(3, 3, 16, 16))
        >>> program = export_program(model, physics, y[:2])
        >>> with torch.no_grad():
        ...     bool((program.module()(y) - model(y, physics)).abs().max() < 1e-5)
        True
    """
    if not isinstance(model, Unfolded):
        raise ValueError(f"only unfolded networks can be exported; {type(model).__name__} decides as it goes")
    if len(y) < 2:
        raise ValueError("y must hold at least two measurements, so that the batch size can be left open; repeat it")
    if isinstance(physics, PaddedBlur) and isinstance(model.data_step, ProximalStep):
        gradients = "its exact data steps take conjugate gradients, which no program holds"
        raise ValueError(f"a blur of boundary {physics.padding!r} cannot be exported: {gradients}; use 'circular'")
    tensors = {key.rpartition(".")[2]: key for key, _ in physics.named_buffers()}
    for name in inputs:
        if name not in tensors:
            raise ValueError(f"inputs: {type(physics).__name__} has no tensor {name!r}; {nearest(name, tensors)}")
    values = tuple(physics.get_buffer(tensors[name]) for name in inputs)
    reconstruction = _Reconstruction(model, physics, [tensors[name] for name in inputs])
    with torch.no_grad(), frozen(model):
        model(y, physics)  # whatever is computed once and kept is not to be part of the program
        shapes = ({0: Dim("batch", min=1)}, *([(None,) * len(values)] if values else []))
        return torch.export.export(reconstruction, (y, *values), dynamic_shapes=shapes, strict=False)
