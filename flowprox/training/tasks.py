r"""What is trained, on what, and how well it does: the contract between a model and the training loop, and its members.

    likelihood       min E[-log p(x~) / (D ln 2)] + b        bits per dimension of dequantized images x~
                                                             (``flowprox.flows.Flow.bits_per_dimension``)
    reconstruction   min E||x_hat(y, A) - x||^2              y = A x + noise made on the fly (Wei et al. 2022, Sec. V),
                                                             A and the noise's level fixed, or drawn per image
    denoising        min E||prox(x + n) - x||^2              n Gaussian, its level drawn per image
    noise            min E[-log p(n)] / D                    n drawn anew for every batch (Whang et al. 2021, Sec. 3)

Symbols: x clean image (B, C, H, W) in [0, 1], D = C H W, b bit depth, y measurement, x_hat estimate.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from deepinv.physics import Denoising, LinearPhysics
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from flowprox.baselines import GANPrior
from flowprox.flows import Flow
from flowprox.metrics import psnr
from flowprox.naming import Values, require_choice
from flowprox.networks import DCGANDiscriminator, DCGANGenerator
from flowprox.noise import FlowNoise, Noise, is_exact, make_noise
from flowprox.operators import VariedProblem, make_physics, measure
from flowprox.options import (
    DataOptions,
    DenoiserOptions,
    GANOptions,
    LikelihoodOptions,
    NoiseOptions,
    ProblemOptions,
    TrainingOptions,
    UnfoldedOptions,
)
from flowprox.training.building import image_shape, load_unfolded, make_flow, make_net_prox, make_unfolded


class Task(nn.Module):
    """What is trained, on what, and how well it does: the contract between a model and the training loop.

    Arguments:
        model: the network to train; the task itself has no other parameters.

    Attributes:
        figure: what decides which model is the best.
        higher_is_better: whether more of it is better.
        lost: a run that validates so much worse than its best has lost its way and goes back.
    """

    figure: str = "psnr"
    higher_is_better: bool = True
    lost: float = float("inf")

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def batch(self, x: Tensor, generator: torch.Generator) -> tuple[Any, ...]:
        """The loss's inputs for clean images x (B, C, H, W) in [0, 1]; all randomness comes from ``generator``."""
        raise NotImplementedError

    def forward(self, *inputs: Tensor) -> Tensor:
        """The loss, a scalar."""
        raise NotImplementedError

    def evaluate(self, model: nn.Module, x: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Figures (B,) of ``model`` on clean images x (B, C, H, W)."""
        raise NotImplementedError

    def initialize(self, x: Tensor) -> None:
        """Data-dependent initialization from clean images x (B, C, H, W), before the first step."""

    def parameter_groups(self, options: TrainingOptions) -> list[Values]:
        """Adam's parameter groups, each with its learning rate ``lr``."""
        return [{"params": list(self.model.parameters()), "lr": options.learning_rate}]

    def pictures(self, model: nn.Module, x: Tensor, generator: torch.Generator) -> list[Tensor]:
        """Rows of images (n, C, H, W) for ``samples.png``."""
        raise NotImplementedError

    def saved(self, model: nn.Module) -> nn.Module:
        """The part of ``model`` that is written to the run's model folder."""
        return model


class LikelihoodTask(Task):
    """Maximum likelihood of dequantized images, in bits per dimension."""

    figure = "bits_per_dimension"
    higher_is_better = False
    lost: float = 0.5

    def __init__(self, flow: Flow, options: LikelihoodOptions | None = None) -> None:
        super().__init__(flow)
        self.options = options or LikelihoodOptions()
        # the magnitudes g of w = g v / |v|
        self.magnitudes = [p for name, p in flow.named_parameters() if name.endswith("weight.original0")]
        if self.options.weight_norm_penalty and not self.magnitudes:
            raise ValueError(
                "weight_norm_penalty is for flows with weight-normalized convolutions, such as RealNVP; set it to 0"
            )

    def batch(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        return (_add_noise(dequantize(x, self.options.bit_depth, generator), self.options.noise_range, generator),)

    def forward(self, *inputs: Tensor) -> Tensor:
        loss = self.model.bits_per_dimension(inputs[0], self.options.bit_depth).mean()  # type: ignore[operator]
        weight = self.options.weight_norm_penalty
        return loss + weight * torch.stack([g.square().sum() for g in self.magnitudes]).sum() if weight else loss

    def evaluate(self, model: nn.Module, x: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        assert isinstance(model, Flow)
        depth = self.options.bit_depth
        clean = dequantize(x, depth, generator)
        noisy = _add_noise(clean, self.options.noise_range, generator)  # as in training
        figures = {self.figure: model.bits_per_dimension(noisy, depth)}
        if noisy is not clean:
            figures["bits_per_dimension_clean"] = model.bits_per_dimension(clean, depth)
        return figures

    def initialize(self, x: Tensor) -> None:
        generator = torch.Generator(x.device).manual_seed(0)
        _initialize_flow(self.model, self.batch(x, generator)[0])

    def pictures(self, model: nn.Module, x: Tensor, generator: torch.Generator) -> list[Tensor]:
        assert isinstance(model, Flow)
        size = (x.shape[-2], x.shape[-1])
        return [model.sample(len(x), temperature, size, generator=generator) for temperature in (0.7, 1.0)]


class NoiseTask(Task):
    """Maximum likelihood of noise, in nats per dimension, by a ``FlowNoise``; ValueError for a noise with sigma 0.

    Of a noise whose density is known in closed form a validation also gives ``excess_nats``, the mean of
    log p(n) - log p_flow(n): the flow's divergence from it, in nats per image.
    """

    figure = "nats_per_dimension"
    higher_is_better = False
    lost: float = 0.5

    def __init__(self, flow: Flow, noise: Noise, validation: Noise | None = None) -> None:
        super().__init__(FlowNoise(flow))
        self.noise, self.validation = noise, validation or noise
        if is_exact(noise):
            raise ValueError("noise with sigma 0 has no density that a flow could learn; give sigma above 0")

    def batch(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        return (_noise_like(self.noise, x, generator),)

    def forward(self, *inputs: Tensor) -> Tensor:
        return _nats_per_dimension(self.model, inputs[0]).mean()

    def evaluate(self, model: nn.Module, x: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        n = _noise_like(self.validation, x, generator)
        nats = _nats_per_dimension(model, n)
        if not self.validation.has_density:
            return {self.figure: nats}
        return {self.figure: nats, "excess_nats": self.validation.log_prob(n) + nats * n[0].numel()}

    def initialize(self, x: Tensor) -> None:
        likes = x[:1].expand(256, *x.shape[1:])
        _initialize_flow(self.model.flow, _noise_like(self.noise, likes, torch.Generator(x.device).manual_seed(0)))  # type: ignore[arg-type]

    def pictures(self, model: nn.Module, x: Tensor, generator: torch.Generator) -> list[Tensor]:
        """Noise and the flow's samples, on the gray scale that the noise spans."""
        assert isinstance(model, FlowNoise)
        n = _noise_like(self.validation, x, generator)
        low, high = n.amin(), n.amax()
        return [(row - low) / (high - low) for row in (n, model.sample_like(x, generator))]


@torch.no_grad()
def _noise_like(noise: Noise, x: Tensor, generator: torch.Generator) -> Tensor:
    """Noise of x's shape and memory layout."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return noise.sample_like(x, generator).contiguous(memory_format=layout)


def _nats_per_dimension(model: nn.Module, n: Tensor) -> Tensor:
    return -model.log_prob(n) / n[0].numel()  # type: ignore[operator]


class ReconstructionTask(Task):
    """Error of a reconstruction network on measurements made on the fly.

        "mse"       mean over the batch of e_i = ||x_hat_i - x_i||^2 / D
        "log-mse"   mean over the batch of ln(e_i + 1e-4), which is what an average of PSNRs counts: easy images weigh as
                    much as hard ones. Above e_i = 0.01 the tangent continues it: an image gone astray keeps its weight

    With a teacher x_i is replaced by (1 - w) x_i + w t_i in e_i, t_i = teacher(y_i) clipped to [0, 1], a target of less
    variance (distillation; Hinton et al. 2015, https://arxiv.org/abs/1503.02531).

    The folds' latents z_k = f_k(v_k) can be drawn towards a standard normal distribution: the mean over folds and channels
    of KL(N(m, s^2) || N(0, 1)) = (m^2 + s^2 - 1 - ln s^2) / 2, m and s^2 their mean and variance over batch and pixels.

    Arguments:
        model: deepinv ``Reconstructor`` with ``parameter_groups``; ``x_hat = model(y, physics)``.
        physics: the operator with its noise model, or a problem that draws one for every batch.
        likelihood_weight: weight of the bits per dimension of the clean images, averaged over the flows of the folds.
        latent_weight: weight of the latents' divergence from a normal distribution.
        loss: "mse" or "log-mse".
        teacher: a trained ``Reconstructor`` to imitate, of the same measurements; it is put in evaluation mode and not trained.
        teacher_weight: w, in (0, 1].
    """

    lost: float = 1.0  # dB

    def __init__(
        self,
        model: nn.Module,
        physics: LinearPhysics | VariedProblem,
        likelihood_weight: float = 0.0,
        latent_weight: float = 0.0,
        loss: str = "mse",
        teacher: nn.Module | None = None,
        teacher_weight: float = 0.5,
    ) -> None:
        super().__init__(model)
        require_choice("loss", loss, ("mse", "log-mse"))
        self.loss = loss
        self._physics = [physics]  # in a list it is no submodule: neither trained nor part of the state
        self._teacher = [] if teacher is None else [teacher.eval()]
        self.teacher_weight = teacher_weight
        self.likelihood_weight, self.latent_weight = likelihood_weight, latent_weight
        if (likelihood_weight or latent_weight) and not model.flows():  # type: ignore[operator]
            raise ValueError("likelihood_weight and latent_weight need a network whose proxes are flows; set them to 0")

    @property
    def physics(self) -> LinearPhysics | VariedProblem:
        """The operator, or what draws it."""
        return self._physics[0]

    def to(self, *args: Any, **kwargs: Any) -> ReconstructionTask:
        """As ``nn.Module.to``; the operator moves along."""
        self.physics.to(*args, **kwargs)
        for teacher in self._teacher:
            teacher.to(*args, **kwargs)
        return super().to(*args, **kwargs)

    def batch(self, x: Tensor, generator: torch.Generator) -> tuple[Any, ...]:
        y, physics = self._measured(x, generator)
        inputs = x, y, physics
        return (*inputs, dequantize(x, 8, generator)) if self.likelihood_weight else inputs

    @torch.no_grad()
    def _measured(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, LinearPhysics]:
        physics = self.physics
        drawn = physics.draw(len(x), generator) if isinstance(physics, VariedProblem) else physics
        return measure(x, drawn, generator=generator), drawn

    def forward(self, *inputs: Any) -> Tensor:
        x, y, physics = inputs[:3]
        for teacher in self._teacher:
            with torch.no_grad():
                x = torch.lerp(x, teacher(y, physics).to(x.dtype).clamp(0, 1), self.teacher_weight)
        with self.model.noting_latents() if self.latent_weight else nullcontext() as latents:  # type: ignore[operator]
            x_hat = self.model(y, physics)
        loss = F.mse_loss(x_hat, x, reduction="none").flatten(1).mean(1)
        if self.loss == "log-mse":
            beyond = (loss - _LARGE_ERROR).clamp(min=0) / (_LARGE_ERROR + _SMALL_ERROR)
            loss = torch.log(loss.clamp(max=_LARGE_ERROR) + _SMALL_ERROR) + beyond
        loss = loss.mean()
        if latents:
            parts = (torch.var_mean(z, dim=(0, 2, 3)) for z in latents)
            divergences = [0.5 * (mean.square() + variance - 1 - variance.log()).mean() for variance, mean in parts]
            loss = loss + self.latent_weight * torch.stack(divergences).mean()
        if self.likelihood_weight:
            flows = self.model.flows()  # type: ignore[operator]
            bits = sum(flow.bits_per_dimension(inputs[3]).mean() for flow in flows) / len(flows)
            loss = loss + self.likelihood_weight * bits
        return loss

    def evaluate(self, model: nn.Module, x: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        return {"psnr": psnr(model(*self._measured(x, generator)), x).clamp(max=_HIGHEST)}

    def initialize(self, x: Tensor) -> None:
        flows = self.model.flows()  # type: ignore[operator]
        fresh = [_initialize_flow(flow, dequantize(x, 8, torch.Generator(x.device).manual_seed(0))) for flow in flows]
        start = getattr(self.model, "start_image", None)
        if any(fresh) and start is not None:
            start.copy_(flows[0].decode(start.new_zeros(1, start[0].numel()), start.shape[-2:]))

    def parameter_groups(self, options: TrainingOptions) -> list[Values]:
        rates = options.learning_rate, options.scalar_learning_rate
        return self.model.parameter_groups(*rates)  # type: ignore[operator]

    def pictures(self, model: nn.Module, x: Tensor, generator: torch.Generator) -> list[Tensor]:
        y, physics = self._measured(x, generator)
        return [x, physics.A_adjoint(y), model(y, physics)]


class DenoisingTask(Task):
    """Mean squared error of a prox network, at step 1, as a denoiser of Gaussian noise; the lowest and highest standard
    deviation are ``noise_range``, drawn uniformly per image."""

    lost: float = 1.0  # dB

    def __init__(self, prox: nn.Module, noise_range: list[float]) -> None:
        super().__init__(prox)
        self.noise_range = noise_range

    def batch(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        return x, _add_noise(x, self.noise_range, generator)

    def forward(self, *inputs: Tensor) -> Tensor:
        x, v = inputs
        return F.mse_loss(self.model(v, 1.0), x)

    def evaluate(self, model: nn.Module, x: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        return {"psnr": psnr(model(_add_noise(x, self.noise_range, generator), 1.0), x).clamp(max=_HIGHEST)}

    def pictures(self, model: nn.Module, x: Tensor, generator: torch.Generator) -> list[Tensor]:
        v = _add_noise(x, self.noise_range, generator)
        return [x, v, model(v, 1.0)]


_SMALL_ERROR, _LARGE_ERROR = 1e-4, 1e-2
_HIGHEST = 120.0  # dB; a mean over images must stay finite


def dequantize(x: Tensor, bit_depth: int, generator: torch.Generator | None = None) -> Tensor:
    """x = (floor(x 2^b) + u) / 2^b with u uniform in [0, 1), for images (B, C, H, W) in [0, 1]."""
    levels = 2**bit_depth
    u = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return ((x * levels).floor().clamp_(max=levels - 1) + u) / levels


def _add_noise(x: Tensor, noise_range: list[float], generator: torch.Generator) -> Tensor:
    low, high = noise_range
    if high == 0:
        return x
    level = low + (high - low) * torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device)
    return x + level * torch.randn(x.shape, generator=generator, device=x.device)


def _initialize_flow(flow: nn.Module, x: Tensor) -> bool:
    """Initialize a flow that is not yet; whether it was needed."""
    fresh = not all(bool(flag) for name, flag in flow.named_buffers() if name.endswith("initialized"))
    if fresh:
        flow.initialize(x)  # type: ignore[operator]
    return fresh


def likelihood_task(flow: str | Values, data: DataOptions, options: LikelihoodOptions) -> LikelihoodTask:
    """The task of ``train_flow``."""
    return LikelihoodTask(make_flow(flow, data), options)


def noise_task(flow: str | Values, options: NoiseOptions) -> NoiseTask:
    """The task of ``train_flow`` with noise."""
    shape = image_shape(options)
    noise = make_noise(options.name, shape, **options.parameters)
    validation = make_noise(options.name, shape, **{**options.parameters, **options.validation})
    return NoiseTask(make_flow(flow, options), noise, validation)


def denoising_task(options: DenoiserOptions, data: DataOptions) -> DenoisingTask:
    """The task of ``train_denoiser``."""
    return DenoisingTask(make_net_prox(options.prox, options.prox_arguments, data), options.noise_range)


def reconstruction_task(options: UnfoldedOptions, problem: ProblemOptions, data: DataOptions) -> ReconstructionTask:
    """The task of ``train_unfolded``."""
    make = functools.partial(VariedProblem, ranges=problem.ranges) if problem.ranges else make_physics
    physics = make(problem.name, image_shape(data), seed=problem.seed, **problem.parameters)
    model = make_unfolded(options, problem, data)
    teacher = None if options.teacher is None else load_unfolded("teacher", options.teacher)
    weights = options.likelihood_weight, options.latent_weight
    return ReconstructionTask(model, physics, *weights, options.loss, teacher, options.teacher_weight)


# A generator and its discriminator ------------------------------------------------------------------------------------

_SETTLING = 8  # batches of 64 latents
_STEEPEST = 20.0  # exp(-l) is bounded there: such an image gives no gradient to speak of


class GANTask(Task):
    """Generator against discriminator; validated by projection of images onto the generator's range."""

    figure = "projection_psnr"

    def __init__(self, generator: DCGANGenerator, discriminator: DCGANDiscriminator, options: GANOptions) -> None:
        super().__init__(nn.ModuleDict({"generator": generator, "discriminator": discriminator}))
        self.latent_size, self.options = generator.latent_size, options

    def batch(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        return x, torch.randn(len(x), self.latent_size, generator=generator, device=x.device)

    def forward(self, *inputs: Tensor) -> Tensor:
        """The discriminator's loss, a scalar; in the generator its gradient is that of the generator's own loss."""
        x, z = inputs
        generated = self.model.generator(z)  # type: ignore[operator]
        if generated.requires_grad:
            generated.register_hook(lambda gradient: gradient * scale.to(gradient.dtype))
        logits = self.model.discriminator(torch.cat([x.to(generated.dtype), generated])).to(x.dtype)  # type: ignore[operator]
        real, fake = logits.chunk(2)
        scale = -torch.exp(-fake.detach().clamp(-_STEEPEST, _STEEPEST)).view(-1, 1, 1, 1)
        return F.softplus(-real).mean() + F.softplus(fake).mean()

    def evaluate(self, model: nn.Module, x: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        return {self.figure: psnr(self._project(model, x), x, clip=False)}

    def parameter_groups(self, options: TrainingOptions) -> list[Values]:
        (group,) = super().parameter_groups(options)
        return [{**group, "betas": (self.options.betas[0], self.options.betas[1])}]

    def pictures(self, model: nn.Module, x: Tensor, generator: torch.Generator) -> list[Tensor]:
        projected = self._project(model, x)
        return [x, projected, *_settled(model).sample(3 * len(x), generator).chunk(3)]

    def saved(self, model: nn.Module) -> nn.Module:
        return _settled(model)

    def _project(self, model: nn.Module, x: Tensor) -> Tensor:
        options = {"n_restarts": 1, "n_steps": self.options.projection_steps, "learning_rate": 0.3}
        return GANPrior(_settled(model), regularization=0.0, **options)(x, Denoising())


def _settled(model: nn.Module) -> DCGANGenerator:
    """The generator of a pair with batch statistics of its own weights: averaged weights come with those of the last ones."""
    generator = model.generator
    assert isinstance(generator, DCGANGenerator)
    device = next(generator.parameters()).device
    random = torch.Generator(device).manual_seed(0)
    latents = (torch.randn(64, generator.latent_size, generator=random, device=device) for _ in range(_SETTLING))
    update_bn(latents, generator)
    return generator.eval()


def gan_task(options: GANOptions, data: DataOptions) -> GANTask:
    """The task of ``train_gan``."""
    shape = image_shape(data)
    generator = DCGANGenerator(shape, options.latent_size, options.hidden_channels, options.n_scales)
    discriminator = DCGANDiscriminator(shape, options.discriminator_channels, options.n_scales)
    return GANTask(generator, discriminator, options)
