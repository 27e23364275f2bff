r"""Training of a generative adversarial network, on the loop of ``flowprox.training.loop``.

    discriminator:  min_D  E softplus(-D(x)) + E softplus(D(G(z)))
    generator:      min_G  E softplus(-D(G(z)))                       (non-saturating)

Symbols: x real image, z ~ N(0, I) latent, D(.) logit, G(z) generated image. Both step at once, from one backward pass:
with l = D(G(z)), the discriminator's loss sends sigmoid(l) dl/dx to the generated image, the generator's loss
-sigmoid(-l) dl/dx; their ratio is -exp(-l), one number per image, so the gradient is multiplied by it on its way into G.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from deepinv.physics import Denoising
from torch import Tensor, nn

from flowprox.baselines import GANPrior
from flowprox.metrics import psnr
from flowprox.naming import Values
from flowprox.networks import DCGANDiscriminator, DCGANGenerator
from flowprox.options import DataOptions, GANOptions, TrainingOptions
from flowprox.training.tasks import Task

_SETTLING = 8  # batches of 64 latents
_STEEPEST = 20.0  # exp(-l) is bounded there: such an image gives no gradient to speak of


class _Pair(nn.Module):
    """Generator and discriminator as one model."""

    def __init__(self, generator: DCGANGenerator, discriminator: DCGANDiscriminator) -> None:
        super().__init__()
        self.generator = generator
        self.discriminator = discriminator


class GANTask(Task):
    """Generator against discriminator; validated by projection of images onto the generator's range."""

    figure = "projection_psnr"

    def __init__(
        self, generator: DCGANGenerator, discriminator: DCGANDiscriminator, options: GANOptions | None = None
    ) -> None:
        super().__init__(_Pair(generator, discriminator))
        self.latent_size = generator.latent_size
        self.options = options or GANOptions()

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


@torch.no_grad()
def _settled(model: nn.Module) -> DCGANGenerator:
    """The generator of a pair with batch statistics of its own weights: averaged weights come with those of the last ones."""
    generator = model.generator
    assert isinstance(generator, DCGANGenerator)
    norms = [layer for layer in generator.modules() if isinstance(layer, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average of all batches
    device = next(generator.parameters()).device
    random = torch.Generator(device).manual_seed(0)
    generator.train()
    for _ in range(_SETTLING):
        generator.sample(64, random)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return generator.eval()


def gan_task(options: GANOptions, data: DataOptions) -> GANTask:
    """The task of ``train_gan``."""
    shape = (data.channels, data.image_size, data.image_size)
    generator = DCGANGenerator(shape, options.latent_size, options.hidden_channels, options.n_scales)
    discriminator = DCGANDiscriminator(shape, options.discriminator_channels, options.n_scales)
    return GANTask(generator, discriminator, options)
