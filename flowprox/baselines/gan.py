"""GAN prior: the image is one that a generator makes, found by descent in its latent space.

    x_hat = G(z_hat),   z_hat = argmin_z  ||y - A G(z)||^2 + regularization ||z||^2

Symbols: G generator, z latent (B, k) with k far below the number of pixels, y measurement, A any differentiable operator.
The squared norms are sums, per image. What G cannot make, x_hat cannot show: more measurements do not lift that limit.
"""

from __future__ import annotations

import torch
from deepinv.models import Reconstructor
from deepinv.physics import Physics
from torch import Tensor, nn

from flowprox.baselines._numpy import require_measurement
from flowprox.flows import frozen

__all__ = ["GANPrior"]

_START = 0.1  # standard deviation of the first latents, Asim et al.'s


class GANPrior(Reconstructor):
    r"""Reconstruction in the range of a generator, by Adam from several random latents at once.

        z <- Adam step on  ||y - A G(z)||^2 + regularization ||z||^2,     z_0 ~ N(0, 0.1^2 I)

    Of all restarts and steps of an image the latent with the smallest objective is kept. The restarts of all images are
    one batch; each descends on its own objective, so an image's estimate does not depend on its neighbors. The learning
    rate falls to zero along a cosine.

    References:
        Bora, Jalal, Price, Dimakis (2017), Compressed Sensing using Generative Models, https://arxiv.org/abs/1703.03208,
        Eq. (1) and Sec. 6; the start and three restarts are Asim et al.'s (2020), https://arxiv.org/abs/1905.11672, Appendix A.

    Arguments:
        generator: maps z (N, k) to images (N, C, H, W) in [0, 1]; k is its ``latent_size``. It is used in evaluation mode
            and left in the mode and with the ``requires_grad`` it had.
        n_restarts: descents per image, from different latents.
        n_steps: Adam steps.
        learning_rate: Adam's step size at the start.
        regularization: weight of ||z||^2, >= 0.
        seed: of the first latents, the same ones for every image.

    Raises:
        ValueError: a number out of range, a generator without ``latent_size``; on call: a measurement of another shape than
            the operator gives, or not finite.

    Example:
        >>> from deepinv.physics import Inpainting
        >>> from flowprox.networks import DCGANGenerator
        >>> generator = DCGANGenerator((1, 8, 8), latent_size=2, hidden_channels=4, n_scales=2)
        >>> x = generator.eval().sample(1, torch.Generator().manual_seed(0)).detach()
        >>> physics = Inpainting((1, 8, 8), mask=torch.arange(8).expand(1, 8, 8) < 4)
        >>> x_hat = GANPrior(generator, regularization=0.0)(physics(x), physics)  # the hidden half follows from the seen one
        >>> bool((x_hat - x).abs().max() < 1e-3)
        True
    """

    def __init__(
        self,
        generator: nn.Module,
        n_restarts: int = 3,
        n_steps: int = 500,
        learning_rate: float = 0.3,
        regularization: float = 1e-2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(getattr(generator, "latent_size", None), int):
            raise ValueError(
                f"generator must be a module with a latent_size, such as DCGANGenerator; got {type(generator).__name__}"
            )
        for name, value in (("n_restarts", n_restarts), ("n_steps", n_steps)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 < learning_rate < float("inf"):
            raise ValueError(f"learning_rate must be finite and > 0, got {learning_rate}")
        if not 0 <= regularization < float("inf"):
            raise ValueError(f"regularization must be finite and >= 0, got {regularization}")
        self.generator = generator
        self.n_restarts = n_restarts
        self.n_steps = n_steps
        self.learning_rate = learning_rate
        self.regularization = regularization
        self.seed = seed

    def forward(self, y: Tensor, physics: Physics) -> Tensor:  # type: ignore[override]
        require_measurement(y)
        with frozen(self.generator):
            with torch.enable_grad():
                z = self._descend(y, physics)
            with torch.no_grad():
                return self.generator(z)

    def _descend(self, y: Tensor, physics: Physics) -> Tensor:
        """The best latent of each image, (B, k)."""
        z = self._first_latents(y).requires_grad_()
        target = y.detach().repeat_interleave(self.n_restarts, 0)
        optimizer = torch.optim.Adam([z], lr=self.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.n_steps)
        best, lowest = z.detach().clone(), torch.full_like(z[:, 0], torch.inf)
        for step in range(self.n_steps + 1):
            objective = self._objective(z, target, physics)
            lower = objective.detach() < lowest  # never with NaN
            best = torch.where(lower[:, None], z.detach(), best)
            lowest = torch.where(lower, objective.detach(), lowest)
            if step < self.n_steps:
                (z.grad,) = torch.autograd.grad(objective.sum(), z)
                optimizer.step()
                schedule.step()
        if not bool(torch.isfinite(lowest).all()):
            raise ValueError("||y - A G(z)||^2 is not finite from the start; check the operator and the generator")
        chosen = lowest.view(len(y), self.n_restarts).argmin(1)
        return best.view(len(y), self.n_restarts, -1)[torch.arange(len(y), device=y.device), chosen]

    def _objective(self, z: Tensor, target: Tensor, physics: Physics) -> Tensor:
        """||y - A G(z)||^2 + regularization ||z||^2 of each latent."""
        measured = physics.A(self.generator(z))
        if measured.shape != target.shape:
            raise ValueError(
                f"y has shape {tuple(target.shape[1:])} per image, but the operator gives {tuple(measured.shape[1:])} "
                "for this generator's images; use the physics that measured y"
            )
        misfit = (measured - target).abs().square().flatten(1).sum(1)  # abs: measurements may be complex
        return misfit + self.regularization * z.square().sum(1)

    def _first_latents(self, y: Tensor) -> Tensor:
        # made on the CPU so that every device starts from the same ones
        generator = torch.Generator().manual_seed(self.seed)
        z = _START * torch.randn(self.n_restarts, self.generator.latent_size, generator=generator)  # type: ignore[call-overload]
        weight = next(self.generator.parameters())
        return z.to(weight).repeat(len(y), 1)
