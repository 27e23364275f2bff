r"""Flows as deepinv's terms: a prior, a denoiser, and a noise as a data fidelity.

    FlowPrior:      R(x) = -log p(x),    prox(v, gamma) = g(f(v) / (1 + gamma))          (Wei et al. 2022, Eqs. 9 to 11)
    FlowDenoiser:   D(v, sigma) = g(z),  z = argmin_z 1/(2 sigma^2) ||g(z) - v||^2 + 1/2 ||z||^2
    NoiseFidelity:  d(x, y) = -log p_noise(y - A(x))

Symbols: x, v images (B, C, H, W); y measurement (B, ...), A operator; f flow from image to latent z, g = f^-1; gamma >= 0
step; sigma noise standard deviation, one number or one per image (B,).

The prox of ``FlowPrior`` shrinks the latent. It is **not** the prox of -log p, which would keep x close to v in image space;
``n_prox_steps`` gives that of the latent norm, argmin_x 1/2 ||x - v||^2 + gamma R_z(f(x)), as ``FlowDenoiser`` computes it.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from deepinv.models import Denoiser, Reconstructor
from deepinv.optim import DataFidelity, Prior
from deepinv.physics import Denoising, GaussianNoise, LinearPhysics, Physics
from torch import Tensor

from flowprox.flows import Flow, frozen
from flowprox.flows.flow import require_flow
from flowprox.naming import Values, require_choice
from flowprox.noise import Density
from flowprox.operators import fit_to_divisor
from flowprox.prox import FlowProx, gradient
from flowprox.solvers import LBFGS, Adam

_SPECTRA = 8  # sizes of image whose spectrum is kept


class FlowPrior(Prior):
    """A flow as a ``deepinv.optim.Prior``, for deepinv's PGD, FISTA, HQS, ADMM (unfolded too) and ULA.

        fn(x)     = -log p(x), (B,) in nats          p: base density of the latent times |det Df(x)|
        grad(x)   = its gradient (B, C, H, W), by autograd, under ``torch.no_grad()`` as well
        prox(v)   = g(P(f(v))), P the shrinkage of ``FlowProx`` by gamma = lambda_reg * stepsize

    deepinv's defaults lambda_reg = stepsize = 1 would halve the latent, which throws the image off the map: start from
    ``FlowPrior.unfolding``. deepinv's parameter ``g_param`` is not used.

    References:
        Wei et al. 2022, Deep unfolding with normalizing flow priors for inverse problems, https://arxiv.org/abs/2107.02848

    Arguments:
        flow: image (B, C, H, W), H and W divisible by ``flow.divisor``, to latent.
        base: density of the latent: "gaussian" (its prox divides) or "laplace" (its prox thresholds).
        form: what fn and grad are: "density" (-log p) or "latent" (R_z(f(x)), which is 1/2 ||z||^2 or ||z||_1: without the
            determinant, Asim et al. 2020).
        explicit: let deepinv evaluate fn at every iterate (``explicit_prior``), for its cost criterion and backtracking.
        n_prox_steps: 0 is the prox in latent space; more is the prox in image space of the latent norm by so many steps of
            Adam in z (carries no gradient, "gaussian" only).

    Raises:
        ValueError: an unknown base or form, or steps with a Laplace base; on call: a size that is not divisible by
            ``flow.divisor``, or other channels than the flow's.

    Example:
        >>> from deepinv.optim import L2, PGD
        >>> from flowprox.flows import Glow
        >>> from flowprox.operators import make_physics
        >>> flow = Glow(image_shape=(3, 8, 8), n_levels=1, n_steps=1, hidden_channels=4)
        >>> model = PGD(prior=FlowPrior(flow), data_fidelity=L2(), **FlowPrior.unfolding(n_folds=2))
        >>> physics = make_physics("denoising", (3, 8, 8))
        >>> model(torch.rand(2, 3, 8, 8), physics).shape
        torch.Size([2, 3, 8, 8])
    """

    def __init__(
        self,
        flow: Flow,
        base: Literal["gaussian", "laplace"] = "gaussian",
        form: Literal["density", "latent"] = "density",
        explicit: bool = False,
        n_prox_steps: int = 0,
    ) -> None:
        super().__init__()
        require_choice("form", form, ("density", "latent"))
        if n_prox_steps < 0 or (n_prox_steps and base != "gaussian"):
            raise ValueError(f"n_prox_steps must be at least 0, and 0 with base 'laplace'; got {n_prox_steps}")
        self.shrinkage = FlowProx(flow, base)
        self.form = form
        self.explicit_prior = explicit
        self.denoiser = FlowDenoiser(flow, n_steps=n_prox_steps) if n_prox_steps else None

    @property
    def flow(self) -> Flow:
        """The flow."""
        return self.shrinkage.flow

    @staticmethod
    def unfolding(n_folds: int = 4, step_size: float = 0.5, shrinkage: float = 0.05) -> Values:
        """Keyword arguments that make deepinv's PGD, HQS or ADMM the unfolded network of Wei et al.: K = ``n_folds`` folds with
        a trained ``step_size`` mu and ``shrinkage`` gamma = lambda_reg * mu. For untied folds pass a list of K priors."""
        return {  # deepinv's own trainable_params fail without a g_param
            "stepsize": [step_size] * n_folds,
            "lambda_reg": [shrinkage / step_size] * n_folds,
            "trainable_params": ["stepsize", "lambda"],
            "max_iter": n_folds,
            "unfold": True,
        }

    def fn(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """-log p(x), or the latent norm, (B,)."""
        z, logdet = self.flow(x)
        if self.shrinkage.base == "gaussian":
            penalty, constant = 0.5 * z.square().sum(dim=1), 0.5 * z.shape[1] * math.log(2 * math.pi)
        else:
            penalty, constant = z.abs().sum(dim=1), z.shape[1] * math.log(2)
        return penalty if self.form == "latent" else penalty + constant - logdet

    def grad(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Gradient of fn (B, C, H, W); differentiable where gradients are on, as deepinv's is."""
        return gradient(self.fn, x)

    def score(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """-grad(x): the score of p."""
        return -self.grad(x)

    def prox(self, x: Tensor, *args: object, gamma: float | Tensor = 1.0, **kwargs: object) -> Tensor:
        """Images (B, C, H, W) shrunk by gamma: a number, a 0-d tensor, or one per image (B,) or (B, 1, 1, 1)."""
        if self.denoiser is not None:
            sigma = torch.as_tensor(gamma, dtype=x.dtype, device=x.device).clamp_min(0).sqrt()
            return self.denoiser(x, sigma.flatten() if sigma.ndim else sigma)
        if isinstance(gamma, Tensor) and gamma.ndim:
            gamma = gamma.view(-1, 1, 1, 1)
        return self.shrinkage(x, gamma)


class FlowDenoiser(Denoiser):
    r"""A flow as a ``deepinv.models.Denoiser``: the most likely latent that explains a noisy image.

        D(v, sigma) = g(z),  z = argmin_z 1/(2 sigma^2) ||g(z) - v||^2 + 1/2 ||z||^2

    by ``n_steps`` of Adam, whose step falls to zero, from f(w), w a Wiener filter of v with the power spectrum of images drawn
    from the flow. Each image keeps its best iterate and does not depend on the others in its batch. sigma 0 returns v. The
    result carries no gradient. (Shrinking the latent of v itself is no denoiser: ``docs/guide/deepinv.md`` has the figures.)

    References:
        Asim et al. 2020, Invertible generative models for inverse problems, https://arxiv.org/abs/1905.11672, Eq. (4), squared.

    Arguments:
        flow: image (B, C, H, W), H and W divisible by ``flow.divisor``, to latent. The spectrum is measured at the first call
            of each image size: ``reset()`` after the weights have changed.
        n_steps: of Adam; each costs one pass through g and one back. 0 leaves the filter alone.
        step_size: of Adam at the start, in latent units.
        n_samples: images drawn from the flow to measure the spectrum.

    Raises:
        ValueError: a number out of range; on call: a size that is not divisible by ``flow.divisor``, other channels than the
            flow's, or as many sigmas as fit neither one nor every image.

    Example:
        >>> from flowprox.flows import Glow
        >>> flow = Glow(image_shape=(3, 8, 8), n_levels=1, n_steps=1, hidden_channels=4)
        >>> v = torch.rand(2, 3, 8, 8)
        >>> denoiser = FlowDenoiser(flow, n_steps=5)
        >>> denoiser(v, torch.tensor([0.1, 0.2])).shape, torch.equal(denoiser(v, 0.0), v)
        (torch.Size([2, 3, 8, 8]), True)
    """

    def __init__(self, flow: Flow, n_steps: int = 40, step_size: float = 0.05, n_samples: int = 64) -> None:
        super().__init__()
        if n_steps < 0 or n_samples < 2 or not 0 < step_size < math.inf:
            got = f"{n_steps}, {n_samples} and {step_size}"
            raise ValueError(f"n_steps must be at least 0, n_samples at least 2 and step_size positive, got {got}")
        require_flow(flow)
        self.flow, self.n_steps, self.step_size, self.n_samples = flow, n_steps, step_size, n_samples
        self._spectra: dict[object, tuple[Tensor, Tensor, Tensor]] = {}

    def forward(self, x: Tensor, sigma: float | Tensor, **kwargs: object) -> Tensor:
        """Denoised images (B, C, H, W) of x, whose noise has the standard deviation sigma, a number or (B,)."""
        self.flow._check_image(x)
        variance = self._handle_sigma(sigma, reference_tensor=x).square()
        v = x.detach()
        weight = 1 / variance.flatten().clamp_min(1e-12)  # images with sigma 0 are returned as they are

        def evaluate(z: Tensor) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                z = z.detach().requires_grad_()
                misfit = _squared_length(self.flow.decode_image(z.view_as(v)) - v)
                value = 0.5 * (weight * misfit + _squared_length(z))
                return value.detach(), torch.autograd.grad(value.sum(), z)[0]

        with frozen(self.flow), torch.no_grad():
            x_hat = self.wiener(v, variance)
            if self.n_steps:
                adam = Adam(self.n_steps, self.step_size, 0.0, betas=(0.9, 0.99), decay="linear")
                z = adam.minimize(evaluate, self.flow.encode(x_hat)).z
                x_hat = self.flow.decode_image(z.view_as(v))
        return torch.where(variance > 0, x_hat, v)

    def objective(self, x: Tensor, v: Tensor, sigma: float | Tensor) -> Tensor:
        """1/2 ||x - v||^2 + sigma^2/2 ||f(x)||^2, (B,): what is minimized, times sigma^2."""
        variance = self._handle_sigma(sigma, reference_tensor=v).square().flatten()
        return 0.5 * _squared_length(x - v) + 0.5 * variance * _squared_length(self.flow.encode_image(x))

    def wiener(self, v: Tensor, variance: Tensor) -> Tensor:
        """Wiener filter of v (B, C, H, W) with the mean and spectrum of the flow's own images; variance (B, 1, 1, 1)."""
        size = tuple(v.shape[-2:])
        key = size, v.dtype, v.device
        self._spectra[key] = self._spectra.pop(key, None) or self._spectrum(v)
        if len(self._spectra) > _SPECTRA:
            del self._spectra[next(iter(self._spectra))]
        mean, power, colors = self._spectra[key]
        coefficients = torch.fft.rfft2(v - mean, norm="ortho").permute(0, 2, 3, 1).unsqueeze(-1)
        gain = (power / (power + variance)).unsqueeze(-1)
        filtered = colors @ (gain * (colors.mH @ coefficients))
        return mean + torch.fft.irfft2(filtered.squeeze(-1).permute(0, 3, 1, 2), s=size, norm="ortho")

    def reset(self) -> None:
        """Forget the measured spectra."""
        self._spectra.clear()

    @torch.no_grad()
    def _spectrum(self, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean image, and per frequency the powers (H, W', C) and directions (H, W', C, C) of the channels."""
        generator = torch.Generator().manual_seed(0)
        z = torch.randn(self.n_samples, v[0].numel(), generator=generator, dtype=v.dtype).to(v.device)
        images = self.flow.decode(z, (v.shape[-2], v.shape[-1]))
        mean = images.mean(dim=0, keepdim=True)
        coefficients = torch.fft.rfft2(images - mean, norm="ortho").permute(2, 3, 1, 0)
        power, colors = torch.linalg.eigh(coefficients @ coefficients.mH / (self.n_samples - 1))
        return mean, power.clamp_min(1e-8), colors


class ReconstructorDenoiser(Denoiser):
    """A network that reconstructs from noisy images at the level it is told, as a ``deepinv.models.Denoiser``: D(x, sigma).

    Images are mirrored to a size that the network takes, and the result is cropped.

    Arguments:
        network: x_hat = network(y, physics), which reads the level in ``physics.noise_model.sigma``, such as an ``Unfolded``
            network with ``levels``.

    Raises:
        ValueError: the network is for one level.

    Example:
        >>> from flowprox import FlowProx, Glow, UnfoldedPGD
        >>> flow, levels = Glow((3, 8, 8), n_levels=1, n_steps=1, hidden_channels=4), [0.05, 0.2]
        >>> network = UnfoldedPGD([FlowProx(flow, channelwise=True, levels=levels)], start="adjoint", levels=levels)
        >>> ReconstructorDenoiser(network)(torch.rand(2, 3, 9, 7), 0.1).shape
        torch.Size([2, 3, 9, 7])
    """

    def __init__(self, network: Reconstructor) -> None:
        super().__init__()
        if getattr(network, "levels", None) is None:
            kind = type(network).__name__
            raise ValueError(f"{kind} is not told a noise level and is no denoiser for many; train one with levels")
        self.network = network

    def forward(  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Tensor, sigma: float | Tensor, **kwargs: object
    ) -> Tensor:
        """Denoise x (B, C, H, W); ``sigma`` is a number or one per image (B,) in units of the image range."""
        physics = Denoising(GaussianNoise(0.0))
        physics.noise_model.update_parameters(sigma=torch.as_tensor(sigma, dtype=x.dtype, device=x.device).flatten())
        fitted = fit_to_divisor(x, physics, int(getattr(self.network, "divisor", 1)))
        return self.network(fitted.y, fitted.physics)[..., fitted.rows, fitted.columns]


class NoiseFidelity(DataFidelity):
    """The density of a noise as a ``deepinv.optim.DataFidelity``: d(x, y) = -log p_noise(y - A(x)), (B,) in nats.

    The gradient of a linear operator is its adjoint's, any other is differentiated by autograd. The prox (HQS, ADMM) is found
    per image by L-BFGS.

    References:
        Whang et al. 2021, Solving inverse problems with a flow-based noise model, https://arxiv.org/abs/2003.08089, Eq. (3)

    Arguments:
        noise: whatever has ``log_prob(residual) -> (B,)`` for residuals of y's shape: any ``flowprox.noise.Noise``, also
            one made of a trained flow.

    Raises:
        ValueError: the noise has no ``log_prob``.

    Example:
        >>> from flowprox.noise import make_noise
        >>> from flowprox.operators import make_physics
        >>> fidelity = NoiseFidelity(make_noise("gaussian", (3, 8, 8), sigma=0.1))
        >>> x, physics = torch.rand(2, 3, 8, 8), make_physics("inpainting", (3, 8, 8), mask_size=2)
        >>> fidelity.grad(x, physics.A(x), physics).abs().max().item()
        0.0
    """

    def __init__(self, noise: Density) -> None:
        if not callable(getattr(noise, "log_prob", None)):
            raise ValueError(f"noise needs a log_prob(residual) -> (B,), and {type(noise).__name__} has none")
        super().__init__(d=self._negative_log_likelihood)
        self.noise = noise

    def _negative_log_likelihood(self, u: Tensor, y: Tensor, *args: object) -> Tensor:
        return -self.noise.log_prob(y - u)

    def grad(self, x: Tensor, y: Tensor, physics: Physics, *args: object, **kwargs: object) -> Tensor:
        """Gradient in x, (B, C, H, W), under ``torch.no_grad()`` as well; x is left as it is."""
        if not isinstance(physics, LinearPhysics):
            return gradient(lambda u: self.fn(u, y, physics), x)
        return physics.A_adjoint(gradient(lambda u: self._negative_log_likelihood(u, y), physics.A(x)))

    def prox(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Tensor,
        y: Tensor,
        physics: Physics,
        *args: object,
        gamma: float | Tensor = 1.0,
        max_iter_inter: int = 50,
        **kwargs: object,
    ) -> Tensor:
        """argmin_u 1/2 ||u - x||^2 + gamma d(u, y), (B, C, H, W), by so many steps of L-BFGS, gamma a number or (B,)."""
        weight = torch.as_tensor(gamma, dtype=x.dtype, device=x.device).flatten()

        def objective(rows: Tensor) -> tuple[Tensor, Tensor]:
            u = rows.view_as(x)
            value = 0.5 * _squared_length(u - x) + weight * self.fn(u, y, physics)
            slope = u - x + weight.view(-1, *[1] * (x.ndim - 1)) * self.grad(u, y, physics)
            return value, slope.flatten(1)

        with torch.no_grad():
            return LBFGS(max_iter_inter).minimize(objective, x.flatten(1)).z.view_as(x)


def _squared_length(x: Tensor) -> Tensor:
    return x.flatten(1).square().sum(1)
