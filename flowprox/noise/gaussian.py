r"""Independent Gaussian noise, its level one number or one per entry.

    n_i = mean_i + sigma_i u_i,   u ~ N(0, I)
    log p(n) = -sum_i [ ((n_i - mean_i) / sigma_i)^2 / 2 + log sigma_i + log(2 pi) / 2 ]

    sinusoidal   sigma_i = sigma exp(sin(2 pi i / period)) / e        i row of an image, or index of a vector
    radial       sigma_d = sigma max(exp(-d / length), floor)         d distance from the center in pixels

n noise (B, ...), sigma standard deviation (of sinusoidal and radial: the largest), all in the units of the measurement.
``make_noise`` makes these, and digits, by name; ``noise_level`` and ``noise_density`` are how everything reads the noise of an
operator.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence

import deepinv
import torch
from deepinv.physics import Physics
from scipy import stats
from torch import Tensor, nn

from flowprox.naming import nearest
from flowprox.noise.base import Density, Generators, Noise, at_least_zero, finite_number, standard_normal
from flowprox.noise.digits import MNISTNoise

_HELD = 2**20  # entries of a residual that are looked at together


class _Normal(Noise):
    """Independent normal entries."""

    def _parameters_like(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Standard deviation and mean, broadcasting against y (B, ...)."""
        raise NotImplementedError

    def sample_like(self, y: Tensor, generator: Generators = None) -> Tensor:
        """mean + sigma u of y's shape (B, ...), u standard normal."""
        sigma, mean = self._parameters_like(y)
        return mean + sigma * standard_normal(y, generator)

    def log_prob(self, residual: Tensor) -> Tensor:
        """log p(residual) in nats, (B,), of residuals (B, ...); ValueError for another size, or a standard deviation of 0."""
        sigma, mean = self._parameters_like(residual)
        if sigma.device.type == "cpu" and not bool((sigma > 0).all()):  # elsewhere looking would make the host wait
            raise ValueError("noise with a standard deviation of 0 has no density; give one above 0")
        each = -0.5 * ((residual - mean) / sigma).square() - sigma.log() - 0.5 * math.log(2 * math.pi)
        return each.flatten(1).sum(1)

    def energy_like(self, y: Tensor) -> Tensor:
        """E |n_i|^2 = sigma_i^2 + mean_i^2, broadcasting against y (B, ...)."""
        sigma, mean = self._parameters_like(y)
        return sigma.square() + mean.square()


class GaussianNoise(_Normal, deepinv.physics.GaussianNoise):
    """White Gaussian noise that is the same on every device and in every memory layout for the same generator.

    Arguments:
        sigma: noise standard deviation, at least 0, in the units of the measurement.
        mean: of every entry, in the same units.

    Raises:
        ValueError: sigma is negative or not finite, or mean is not finite.

    Example:
        >>> noise, y = GaussianNoise(0.1), torch.zeros(1, 3, 4, 4)
        >>> torch.equal(noise(y, seed=1), noise(y, seed=1))
        True
    """

    sigma: Tensor
    mean: Tensor

    def __init__(self, sigma: float = 0.1, mean: float = 0.0) -> None:
        super().__init__(sigma=at_least_zero("sigma", sigma))
        self.register_buffer("mean", torch.tensor(finite_number("mean", mean)))

    def forward(
        self,
        x: Tensor,
        sigma: float | Tensor | None = None,
        seed: int | None = None,
        generator: Generators = None,
        **parameters: object,
    ) -> Tensor:
        """x + n; ``generator`` is one for the batch or one per image; ``sigma`` is kept, as deepinv's does."""
        return Noise.forward(self, x, generator, seed, sigma=sigma, **parameters)

    def _parameters_like(self, y: Tensor) -> tuple[Tensor, Tensor]:
        ones = (None,) * (y.ndim - 1)
        sigma, mean = (value.to(y.device, y.real.dtype) for value in (self.sigma, self.mean))
        return sigma[(..., *ones)], mean[(..., *ones)]


class HeteroscedasticNoise(_Normal):
    """Independent Gaussian noise with a standard deviation and a mean for each entry.

    Arguments:
        scale: standard deviation per entry, at least 0; broadcasts to the measurement without its batch axis, such as
            (H, 1) for one level per row.
        mean: a number, or one per entry likewise.

    Raises:
        ValueError: scale is negative, or scale or mean is not finite.

    Example:
        >>> noise = HeteroscedasticNoise(torch.tensor([[0.0], [2.0]]))
        >>> noise.sample_like(torch.zeros(100, 1, 2, 50)).std(dim=(0, 1, 3)).round()
        tensor([0., 2.])
    """

    scale: Tensor
    mean: Tensor

    def __init__(self, scale: Tensor, mean: float | Tensor = 0.0) -> None:
        super().__init__()
        scale, mean = torch.as_tensor(scale), torch.as_tensor(mean, dtype=torch.get_default_dtype())
        if not scale.is_floating_point() or not bool((torch.isfinite(scale) & (scale >= 0)).all()):
            raise ValueError("scale holds standard deviations and must be finite floats of at least 0")
        if not bool(torch.isfinite(mean).all()):
            raise ValueError("mean must be finite")
        self.register_buffer("scale", scale.clone())
        self.register_buffer("mean", mean.clone())

    def _parameters_like(self, y: Tensor) -> tuple[Tensor, Tensor]:
        for name, value in (("scale", self.scale), ("mean", self.mean)):
            own, sizes = tuple(value.shape), tuple(y.shape[1:])
            pairs = zip(reversed(own), reversed(sizes), strict=False)
            if len(own) > len(sizes) or any(a not in (1, b) for a, b in pairs):
                misfit = f"{own}, which does not fit measurements of shape {sizes} per image"
                raise ValueError(f"the noise's {name} has shape {misfit}; make the noise for that shape")
        return self.scale.to(y.device, y.real.dtype), self.mean.to(y.device, y.real.dtype)


def sinusoidal_noise(
    shape: Sequence[int], sigma: float = 1.0, period: float = 16.0, mean: float = 0.0
) -> HeteroscedasticNoise:
    """Gaussian noise whose level goes up and down over the rows of an image or the entries of a vector.

        sigma_i = sigma exp(sin(2 pi i / period)) / e

    ``shape`` is that of the measurement without its batch axis, (C, H, W) or (m,), ``period`` in rows or entries, ``mean``
    that of every entry. sigma = 1 is the paper's normalization.

    References:
        Whang et al. 2021, Solving inverse problems with a flow-based noise model, https://arxiv.org/abs/2003.08089,
        Sec. 5.1.2 (vectors; their noise has a positive mean) and 5.1.3 (rows)

    Example:
        >>> sinusoidal_noise((3, 64, 64)).scale.shape, sinusoidal_noise((500,), mean=0.1).scale.shape
        (torch.Size([64, 1]), torch.Size([500]))
    """
    sizes = _sizes(shape)
    if not period > 0:
        raise ValueError(f"period must be positive, got {period}")
    is_image = len(sizes) >= 2
    i = torch.arange(sizes[-2 if is_image else 0], dtype=torch.float64)
    scale = at_least_zero("sigma", sigma) * torch.exp(torch.sin(2 * math.pi * i / period) - 1)
    return HeteroscedasticNoise((scale[:, None] if is_image else scale).float(), finite_number("mean", mean))


def radial_noise(
    shape: Sequence[int], sigma: float = 1.0, length: float = 16.0, floor: float = 0.01, mean: float = 0.0
) -> HeteroscedasticNoise:
    """Gaussian noise whose level decays exponentially with the distance from the central pixel.

        sigma_d = sigma max(exp(-d / length), floor)

    ``shape`` is (C, H, W), ``length`` the distance in pixels over which the level falls by a factor e, ``floor`` relative to
    sigma. The central pixel is ((H - 1) // 2, (W - 1) // 2), (31, 31) for 64x64 as in the paper.

    References:
        Whang et al. 2021, Solving inverse problems with a flow-based noise model, https://arxiv.org/abs/2003.08089, App. B.2

    Example:
        >>> scale = radial_noise((3, 64, 64), sigma=0.5).scale
        >>> scale.shape, scale[31, 31].item()
        (torch.Size([64, 64]), 0.5)
    """
    sizes = _sizes(shape)
    if len(sizes) < 2:
        raise ValueError(f"radial noise is for images (C, H, W); shape is {sizes}")
    if not length > 0 or not 0 <= floor <= 1:
        raise ValueError(f"length must be positive and floor between 0 and 1, got {length} and {floor}")
    rows, columns = (torch.arange(n, dtype=torch.float64) - (n - 1) // 2 for n in sizes[-2:])
    distance = torch.hypot(rows[:, None], columns)
    scale = at_least_zero("sigma", sigma) * torch.exp(-distance / length).clamp(min=floor)
    return HeteroscedasticNoise(scale.float(), finite_number("mean", mean))


def as_noise(noise: object) -> object:
    """A noise, or that of an operator; deepinv's ``GaussianNoise`` as ours, with its level or one per image."""
    if not isinstance(noise, deepinv.physics.NoiseModel):
        noise = getattr(noise, "noise_model", noise)
    if not isinstance(noise, deepinv.physics.GaussianNoise) or isinstance(noise, Noise):
        return noise
    own = GaussianNoise()
    own.update_parameters(sigma=noise.sigma)
    return own


def is_exact(noise: object) -> bool:
    """Whether an entry has the standard deviation 0, so that the noise has no density."""
    sigma = getattr(noise, "scale" if isinstance(noise, HeteroscedasticNoise) else "sigma", None)
    return sigma is not None and not bool((torch.as_tensor(sigma) > 0).all())


def noise_density(noise: object, physics: nn.Module | None = None) -> Density:
    """The density of the noise, of None that of ``physics.noise_model``; ValueError where there is none, as with sigma 0."""
    model = as_noise(physics if noise is None else noise)
    if is_exact(model):
        raise ValueError("noise of standard deviation 0 has no density: pass noise=..., the smallest you believe in")
    if not callable(getattr(model, "log_prob", None)) or not getattr(model, "has_density", True):
        kind = type(model).__name__
        raise ValueError(f"the noise, {kind}, has no density: noise must have log_prob(residual) -> (B,)")
    return model  # type: ignore[return-value]


def noise_level(physics: nn.Module, like: Tensor, *, allow_rms: bool = False) -> Tensor:
    """The standard deviation of the noise of ``physics`` for each image of ``like`` (B, ...): (B,); without noise it is 0.
    ValueError for a noise without ``sigma``, or with another number of them.

    Arguments:
        physics: an operator with a ``noise_model``, or the noise itself.
        like: measurements or images; only their number, dtype and device are used.
        allow_rms: whether a noise with a level for each entry counts with their root mean square.

    Example:
        >>> noise_level(GaussianNoise(0.5), torch.zeros(2, 3, 8, 8)).tolist()
        [0.5, 0.5]
    """
    noise = as_noise(physics)
    sigma = 0.0 if isinstance(noise, deepinv.physics.ZeroNoise) else getattr(noise, "sigma", None)
    if allow_rms and isinstance(noise, HeteroscedasticNoise):
        sigma = noise.scale.double().square().mean().sqrt()  # broadcasting repeats every entry equally often
    if sigma is None:
        kind = type(noise).__name__
        raise ValueError(
            f"the noise, {kind}, has no level sigma; give the physics a GaussianNoise(sigma), or use NoiseMAP"
        )
    sigma = torch.as_tensor(sigma, dtype=like.dtype.to_real(), device=like.device).flatten()
    n = like.shape[0]  # not len(like), which would fix the batch size of an exported program
    if len(sigma) not in (1, n):
        raise ValueError(f"the noise model has {len(sigma)} levels for {n} images; give one, or one per image")
    return sigma.expand(n)


def _sizes(shape: Sequence[int]) -> tuple[int, ...]:
    sizes = tuple(shape)
    if not sizes or any(not isinstance(n, int) or n < 1 for n in sizes):
        raise ValueError(f"shape must hold the positive sizes of a measurement without its batch axis, got {shape!r}")
    return sizes


# By name --------------------------------------------------------------------------------------------------------------


NOISES: Mapping[str, Callable[..., Noise]] = {
    "gaussian": GaussianNoise,
    "sinusoidal": sinusoidal_noise,
    "radial": radial_noise,
    "mnist": MNISTNoise,
}
"""Noise name -> what makes it from its parameters, and a shape if it takes one; ``sigma`` is a standard deviation in each."""


def make_noise(name: str, shape: Sequence[int], **parameters: object) -> Noise:
    """Build a noise for measurements of a shape, (C, H, W) or (m,): "gaussian" (sigma, mean), "sinusoidal" (sigma, period,
    mean), "radial" (sigma, length, floor, mean) or "mnist" (path, n_digits, amplitude, sigma, split), see ``NOISES``.

    ValueError for an unknown name or parameter, for which the message offers the nearest ones, or a value that does not fit.

    Example:
        >>> make_noise("radial", (3, 64, 64), sigma=0.5).scale.max().item()
        0.5
    """
    if name not in NOISES:
        raise ValueError(f"unknown noise {name!r}; {nearest(name, NOISES)}")
    known = dict(inspect.signature(NOISES[name]).parameters)
    given = {"shape": shape, **parameters} if known.pop("shape", None) else parameters
    for key in parameters:
        if key not in known:
            raise ValueError(f"{name} noise has no parameter {key!r}; {nearest(key, known)}")
    if missing := [key for key, one in known.items() if one.default is one.empty and parameters.get(key) is None]:
        raise ValueError(f"{name} noise needs {missing[0]}")
    return NOISES[name](**given)


def standard_residual(x_hat: Tensor, y: Tensor, physics: Physics) -> Tensor | None:
    """(y - A x_hat) / sigma, (B, n) in float64: standard normal for the true image. None where the noise is not white Gaussian
    noise of one known standard deviation above 0, or y is complex.

    Where y has been clipped to [0, 1], entries at these ends are NaN, the others those of a normal variable cut at the ends:
    Phi^-1((F(y) - F(a)) / (F(b) - F(a))), F(t) = Phi((t - A x_hat) / sigma); a = 0 and b = 1, of 8 bits, which have been
    rounded, 1/510 and 1 - 1/510.
    """
    noise = getattr(physics, "noise_model", None)
    if not isinstance(noise, deepinv.physics.GaussianNoise) or y.is_complex():
        return None
    sigma, mean = torch.as_tensor(noise.sigma).to(y), getattr(noise, "mean", 0.0)
    if sigma.numel() != 1 or not sigma > 0 or mean:
        return None
    residual = ((y - physics.A(x_hat)) / sigma).flatten(1).double()
    y = y.flatten(1)
    at_end = ((y == 0) | (y == 1)) & (residual != 0)  # what a mask hides is no end
    is_clipped = at_end.any(1, keepdim=True) & ((y >= 0) & (y <= 1)).all(1, keepdim=True)
    if not is_clipped.any():
        return residual
    low = (255 * y - (255 * y).round()).abs().lt(1e-3).all(1, keepdim=True).double() / 510
    parts = zip(residual.split(_HELD, 1), y.split(_HELD, 1), strict=True)
    score = torch.cat([_cut_normal(r, t, low, sigma) for r, t in parts], 1)
    return torch.where(is_clipped & (residual != 0), score, residual)


def _cut_normal(residual: Tensor, y: Tensor, low: Tensor, sigma: Tensor) -> Tensor:
    """The residual of y between low and 1 - low as that of a normal variable cut there; NaN at 0 and 1."""
    below, here, above = (torch.special.ndtr(residual + (t - y) / sigma) for t in (low, y, 1 - low))
    score = torch.special.ndtri(((here - below) / (above - below)).clamp(1e-15, 1 - 1e-15))
    score = torch.where(score.isnan(), residual, score)  # so far away that both ends are one
    return torch.where((y > 0) & (y < 1), score, math.nan)


@torch.no_grad()
def residual_p_value(x_hat: Tensor, y: Tensor, physics: Physics, factor: float = 1.0) -> Tensor | None:
    """Chi-squared test whether white Gaussian noise of ``factor`` times the stated level explains y - A x_hat: probability of
    at least as much, (B,).

    It is exact for the true image and the factor 1. An estimate has been fitted to the noise, so that its residual is smaller
    and the test rarely rejects; one that is smoother than the image, or of another operator or noise, leaves more. Not counted
    are entries without noise, as masked ones, and clipped ones. None where ``standard_residual`` is.

    Example:
        >>> from flowprox.operators import make_physics
        >>> x, physics = torch.rand(2, 3, 16, 16), make_physics("denoising", (3, 16, 16), sigma=0.1)
        >>> (residual_p_value(x, x + 0.15 * torch.randn_like(x), physics) < 0.001).tolist()
        [True, True]
    """
    residual = standard_residual(x_hat, y, physics)
    if residual is None:
        return None
    n = (residual.nan_to_num() != 0).sum(1)
    p = stats.chi2.sf((residual / factor).square().nansum(1).cpu().numpy(), n.clamp(min=1).cpu().numpy())
    return torch.from_numpy(p).to(residual)
