r"""MAP with any noise that has a density and any differentiable operator (Whang et al. 2021).

    MAP:     min_z  -log p_noise(y - A(g(z))) - beta log p(g(z))         prior with a density: a flow
    latent:  min_z  -log p_noise(y - A(g(z))) - beta log N(z; 0, I)      the same without the log-determinant
    MLE:     min_z  -log p_noise(y - A(G(z)))                            beta = 0: a GAN's or VAE's decoder G

Symbols: y measurement, A any differentiable operator, p_noise density of the noise, g = f^-1 a flow from latent z (B, D)
to image x = g(z) (B, C, H, W), beta the smoothing parameter. With Gaussian noise the MAP is Asim et al.'s image-space
objective (gamma = 2 sigma^2 beta), the latent form theirs with the squared norm (gamma = sigma^2 beta), the MLE Bora et al.'s.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from deepinv.models import Reconstructor
from deepinv.physics import Physics
from torch import Tensor, nn

from flowprox.flows import Flow, frozen
from flowprox.naming import require_choice, require_count, require_positive
from flowprox.noise import Density, GaussianNoise, noise_density
from flowprox.solvers.objective import SPACES, Callback, Objective, squared_error
from flowprox.solvers.optimizers import LBFGS, Adam, Optimizer
from flowprox.solvers.problem import LatentProblem, Solution, Start


class NoiseMAP(Reconstructor):
    r"""The most likely image under a flow prior and a noise density (Whang et al. 2021, Eqs. 3 to 5).

        z_hat = argmin_z -log p_noise(y - A(g(z))) - beta log p(g(z)),   x_hat = g(z_hat)

    References:
        Whang, Lei, Dimakis 2021, Solving inverse problems with a flow-based noise model,
        https://arxiv.org/abs/2003.08089, Eqs. (3), (4) (MAP), (5) (MLE); beta: Eq. (10).

    Arguments:
        flow: the prior: a flow, or for the MLE a decoder, any module that maps (B, latent_size) to images and has
            ``latent_size`` and ``image_shape``. Left as it is.
        noise: density of the noise, anything with ``log_prob(residual) -> (B,)``: a member of ``flowprox.noise``, a
            trained flow among them. None takes ``physics.noise_model``.
        beta: weight of the prior's log-density, at least 0. 1 is Bayes' rule; less trusts the prior less.
        form: "image", as published, or "latent", without the log-determinant; a decoder that is no flow has none.
        start: see ``LatentMAP``; for a decoder, "zero" or the standard deviation of random latents.
        n_restarts: random starts per image, of which the best objective wins; needs a positive number as start.
        optimizer: ``LBFGS``, ``Adam`` (the published one) or ``TorchLBFGS``.
        seed: of the starts.
        space: minimize over the "latent" z, or for a flow over the "image" x: the same function.

    Raises:
        ValueError: beta negative, or above 0 in the image form for a decoder; a noise without a density; on call: a
            measurement, operator, noise or flow that do not fit.
        SolverInterrupted: Ctrl-C; its ``solution`` holds what is finished.

    Example:
        >>> from flowprox.flows import Flow, HaarSqueeze, Sequential, Unsqueeze
        >>> from flowprox.noise import GaussianNoise
        >>> from flowprox.operators import make_physics
        >>> flow = Flow(Sequential([HaarSqueeze(), Unsqueeze()]), (1, 4, 4), n_levels=1)  # a Gaussian prior around 1/2
        >>> y = torch.ones(1, 1, 4, 4)
        >>> x_hat = NoiseMAP(flow, GaussianNoise(1.0))(y, make_physics("denoising", (1, 4, 4)))
        >>> round(x_hat.mean().item(), 4)  # half way from 1/2 to 1
        0.75
    """

    def __init__(
        self,
        flow: nn.Module,
        noise: Density | None = None,
        beta: float = 1.0,
        form: str = "image",
        start: Start = "zero",
        n_restarts: int = 1,
        optimizer: Optimizer | None = None,
        seed: int = 0,
        space: str = "latent",
    ) -> None:
        super().__init__()
        has_density = isinstance(flow, Flow)
        require_positive("beta", beta, or_zero=True)
        require_choice("form", form, ("image", "latent"))
        if space not in (SPACES if has_density else SPACES[:1]):
            raise ValueError(f"space must be 'latent', or for a flow 'image'; got {space!r}")
        if not has_density and beta > 0 and form == "image":
            kind = type(flow).__name__
            raise ValueError(f"{kind} has no density: set beta to 0 (the MLE form) or form to 'latent', or give a flow")
        if not has_density and not isinstance(getattr(flow, "latent_size", None), int):
            kind = type(flow).__name__
            raise ValueError(f"flow must be a Flow, or a decoder with latent_size and image_shape; got {kind}")
        require_count("n_restarts", n_restarts)
        if n_restarts > 1 and not (isinstance(start, int | float) and start > 0):
            raise ValueError("n_restarts above 1 needs random starts: give start a positive standard deviation")
        if noise is not None:
            noise_density(noise)
        self.flow, self.noise, self.beta, self.form, self.space = flow, noise, float(beta), form, space
        self.start, self.n_restarts, self.seed = start, n_restarts, seed
        self.optimizer = optimizer or LBFGS(n_iterations=200)

    def forward(self, y: Tensor, physics: Physics, callback: Callback | None = None) -> Tensor:  # type: ignore[override]
        """x_hat (B, C, H, W), not clipped; see ``solve``."""
        return self.solve(y, physics, callback).estimate

    @torch.no_grad()
    def solve(self, y: Tensor, physics: Physics, callback: Callback | None = None) -> Solution:
        """Minimize; y (B, ...) as ``physics`` measures; ``callback(n, n_at_most)`` is called after every evaluation."""
        noise = noise_density(self.noise, physics)
        with frozen(self.flow), frozen(noise) if isinstance(noise, nn.Module) else nullcontext():
            problem = LatentProblem(self.flow, y, physics)
            if problem.is_empty:
                return problem.nothing()
            if self.n_restarts > 1:  # restarts are further images
                if not problem.is_separable(self._objective(problem, noise).misfit):
                    other = "this one has a mask or the like for each; solve them one by one"
                    raise ValueError(f"n_restarts above 1 needs the same operator and noise for all images: {other}")
                each = torch.arange(len(y), device=y.device)
                problem = problem.select(each.repeat_interleave(self.n_restarts))
            objective = self._objective(problem, noise)
            objective.callback, objective.n_evaluations = callback, self.optimizer.max_trials
            if problem.has_density and self.beta > 0 and self.space == "latent":
                objective.scales = problem.channel_scales(self.seed)
            trace = objective.minimize(self.optimizer, objective.start(self.start, self.seed, self.n_restarts))
            return objective.solution(trace.best_of(self.n_restarts))

    def _objective(self, problem: LatentProblem, noise: Density) -> Objective:
        def misfit(residual: Tensor) -> Tensor:  # -log p_noise, Whang (3)
            return -noise.log_prob(torch.view_as_real(residual) if residual.is_complex() else residual)

        prior = "density" if self.form == "image" and self.beta > 0 else "normal"
        return Objective(problem, misfit, self.beta, prior, self.space)


class GANPrior(NoiseMAP):
    r"""The image that a generator makes, by descent from several random latents at once: ``NoiseMAP`` with a decoder.

        x_hat = G(z_hat),   z_hat = argmin_z  ||y - A G(z)||^2 + regularization ||z||^2

    That is beta = 1 and noise of variance ``regularization``, or beta = 0 for none. What G cannot make, x_hat cannot show.

    References:
        Bora, Jalal, Price, Dimakis 2017, Compressed sensing using generative models, https://arxiv.org/abs/1703.03208,
        Eq. (1) and Sec. 6. Start and three restarts: Asim et al. 2020, https://arxiv.org/abs/1905.11672, Appendix A, who print
        the mean PSNR of the three (``n_restarts=1`` with the seeds 0, 1 and 2); here the best objective wins.

    Arguments:
        generator: maps z (N, k) to images (N, C, H, W) in [0, 1]; k is its ``latent_size``. It is left as it is.
        n_restarts: descents per image, from different latents N(0, 0.1^2 I), the same ones for every image.
        n_steps, learning_rate: of Adam, whose rate falls to zero along a cosine.
        regularization: weight of ||z||^2, at least 0.
        seed: of the first latents.
        optimizer: instead of Adam.

    Raises:
        ValueError: a number out of range, a generator without ``latent_size``; on call: see ``NoiseMAP``.

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
        optimizer: Optimizer | None = None,
    ) -> None:
        if isinstance(generator, Flow) or not isinstance(getattr(generator, "latent_size", None), int):
            kind = type(generator).__name__
            raise ValueError(f"generator must be a module with a latent_size, such as DCGANGenerator; got {kind}")
        require_count("n_steps", n_steps)
        require_positive("regularization", regularization, or_zero=True)
        noise, beta = GaussianNoise(math.sqrt(regularization or 0.5)), float(regularization > 0)
        adam = Adam(n_steps, learning_rate, final_learning_rate=0.0)
        super().__init__(generator, noise, beta, "latent", 0.1, n_restarts, optimizer or adam, seed)
        self.regularization = regularization

    def _objective(self, problem: LatentProblem, noise: Density) -> Objective:
        # NoiseMAP's times 2 regularization, without the constants that would cost float32 its digits
        return Objective(problem, squared_error, self.regularization, "squared")
