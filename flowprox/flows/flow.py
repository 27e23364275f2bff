r"""A flow: a bijection from image to latent together with a base density.

    log p(x) = log N(f(x); 0, I) + log|det Df(x)|          (Wei et al. 2022, Eq. 6)

Symbols: x image (B, C, H, W) in [0, 1]; z = f(x) latent, flat (B, D), D = C H W; g = f^-1. A flow is fully
convolutional: any H, W divisible by ``divisor`` will do, whatever size it was made for. Weights may be held in half precision;
images and latents are float32 or float64 inside, since the inverse needs the digits.

What comes back is finite, or ``NonFiniteError`` is raised: at once, or later within ``gathered_checks`` (see
``flowprox.flows.bijection``). ``unchecked_log_prob`` and the methods in ``..._image`` leave that to the caller.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from flowprox.checkpoints import Pretrained
from flowprox.flows.bijection import Bijection, Sequential, check_finite
from flowprox.flows.layers import PixelNorm
from flowprox.naming import Specified, require_count, require_positive


class Flow(Pretrained, Bijection):
    """A bijection with a standard normal base density.

    Arguments:
        bijection: shape-preserving map of (B, C, H, W).
        image_shape: (C, H, W) the flow was made for; the default size of ``sample``, ``inverse`` and ``decode``.
        n_levels: number of squeezes; H and W must be divisible by 2^n_levels.
        offset: subtracted from x before the bijection, so that a fresh flow sees centered images.

    Example:
        >>> from flowprox.flows import Glow
        >>> flow = Glow(image_shape=(3, 16, 16), n_levels=2, n_steps=2, hidden_channels=8)
        >>> x = torch.rand(4, 3, 16, 16)
        >>> z, logdet = flow(x)
        >>> z.shape, logdet.shape, bool((flow.decode(z) - x).abs().max() < 1e-5)
        (torch.Size([4, 768]), torch.Size([4]), True)
    """

    def __init__(
        self, bijection: Bijection, image_shape: tuple[int, int, int], n_levels: int = 0, offset: float = 0.5
    ) -> None:
        super().__init__()
        self.bijection = bijection
        self.n_channels, self.height, self.width = (int(n) for n in image_shape)
        self.n_levels = n_levels
        self.offset = offset
        self._check_size(self.height, self.width, "image_shape")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) the flow was made for."""
        return self.n_channels, self.height, self.width

    @property
    def divisor(self) -> int:
        """Height and width of an image must be multiples of this."""
        return 2**self.n_levels

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Image (B, C, H, W) to (latent (B, D), log|det Df(x)| (B,)).

        Raises:
            ValueError: wrong number of channels, or H or W not divisible by ``divisor``.
            NonFiniteError: the latent is not finite.
        """
        self._check_image(x)
        z, logdet = self.bijection(self._laid_out(x) - self.offset)
        return check_finite(z.flatten(1), type(self).__name__, "forward"), logdet

    def inverse(self, z: Tensor, image_size: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
        """Latent (B, D) to (image (B, C, H, W), log|det Dg(z)| (B,)).

        ``image_size`` (H, W) is by default the size the flow was made for if D fits it, else a square.

        Raises:
            ValueError: D does not fit ``image_size``.
            NonFiniteError: the image is not finite.
        """
        x, logdet = self.bijection.inverse(self._laid_out(self._unflatten(z, image_size)))
        return check_finite(x + self.offset, type(self).__name__, "inverse"), logdet

    def encode(self, x: Tensor) -> Tensor:
        """f(x): image (B, C, H, W) to latent (B, D), without the determinant; errors as in ``forward``."""
        return check_finite(self.encode_image(x).flatten(1), type(self).__name__, "forward")

    def decode(self, z: Tensor, image_size: tuple[int, int] | None = None) -> Tensor:
        """g(z): latent (B, D) to image (B, C, H, W), without the determinant; errors as in ``inverse``."""
        return check_finite(self.decode_image(self._unflatten(z, image_size)), type(self).__name__, "inverse")

    def encode_image(self, x: Tensor) -> Tensor:
        """f(x) with the latent arranged as an image (B, C, H, W), not checked to be finite."""
        self._check_image(x)
        return self.bijection.encode(self._laid_out(x) - self.offset)

    def decode_image(self, z: Tensor) -> Tensor:
        """g of a latent arranged as an image (B, C, H, W), not checked to be finite."""
        self._check_image(z, "z")
        return self.bijection.decode(self._laid_out(z)) + self.offset

    def inverse_image(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(g(z), log|det Dg(z)|) of a latent arranged as an image (B, C, H, W), not checked to be finite."""
        self._check_image(z, "z")
        x, logdet = self.bijection.inverse(self._laid_out(z))
        return x + self.offset, logdet

    def unchecked_log_prob(self, x: Tensor) -> Tensor:
        """log p(x), not checked to be finite: an image that overflows stays alone."""
        self._check_image(x)
        z, logdet = self.bijection(self._laid_out(x) - self.offset)
        return self.base_log_prob(z.flatten(1)) + logdet

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) in nats, (B,), of images (B, C, H, W)."""
        z, logdet = self.forward(x)
        return self.base_log_prob(z) + logdet

    def base_log_prob(self, z: Tensor) -> Tensor:
        """log N(z; 0, I), (B,), of flat latents (B, D)."""
        return -0.5 * (z.square().sum(dim=1) + z.shape[1] * math.log(2 * math.pi))

    def bits_per_dimension(self, x: Tensor, n_bits: int = 8) -> Tensor:
        """Negative log-likelihood of x in [0, 1] on the scale of its 2^n_bits gray levels, (B,)."""
        return n_bits - self.log_prob(x) / (math.prod(x.shape[1:]) * math.log(2))

    @torch.no_grad()
    def sample(
        self,
        n: int,
        temperature: float = 1.0,
        image_size: tuple[int, int] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """n images (n, C, H, W) = g(temperature * z), z ~ N(0, I).

        Raises:
            ValueError: n below 1, negative temperature, or a size that is not divisible by ``divisor``.
        """
        require_count("n", n)
        require_positive("temperature", temperature, or_zero=True)
        height, width = self._sides(image_size)
        like = next(self.parameters())
        z = torch.randn(n, self.n_channels * height * width, dtype=like.dtype, device=like.device, generator=generator)
        return self.decode(temperature * z, (height, width))

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Data-dependent initialization of every ActNorm that is not initialized yet, from images x (B, C, H, W)."""
        training = self.training
        self.train()
        self.encode(x)
        self.train(training)

    def distribution(self, image_size: tuple[int, int] | None = None) -> FlowDistribution:
        """p(x) as a distribution of ``torch.distributions`` over images (C, H, W); by default of the size of ``sample``."""
        return FlowDistribution(self, self._sides(image_size))

    def latent_groups(self, image_size: tuple[int, int] | None = None) -> Tensor:
        """Which (level, channel) of the multi-scale latent each entry of the image-shaped latent belongs to.

        This is for the nesting of Glow and RealNVP: a ``Split`` after every level but the last.

        Returns:
            integers (C, H, W) from 0 to ``n_latent_groups`` - 1.
        """
        height, width = self._sides(image_size)
        first = torch.arange(self.n_channels).view(1, -1, 1, 1).expand(1, self.n_channels, height, width)
        return first[0] if self.n_levels == 0 else _groups(self.n_channels, height, width, self.n_levels)[0]

    @property
    def n_latent_groups(self) -> int:
        """Number of (level, channel) pairs of the latent."""
        return int(self.latent_groups().max()) + 1

    def _unflatten(self, z: Tensor, image_size: tuple[int, int] | None) -> Tensor:
        if image_size is not None:
            image_size = self._sides(image_size)
        elif z.ndim == 2:
            image_size = (self.height, self.width)
            if z.shape[1] != math.prod(self.image_shape):
                side = math.isqrt(z.shape[1] // self.n_channels)
                image_size = (side, side)
        if z.ndim != 2 or image_size is None or z.shape[1] != self.n_channels * math.prod(image_size):
            expected = f"{self.n_channels} channels at {image_size}"
            raise ValueError(
                f"z {tuple(z.shape)} does not fit {expected}; pass a flat latent (B, D) and its image_size"
            )
        self._check_size(*image_size, "image_size")
        return z.view(z.shape[0], self.n_channels, *image_size)

    def _sides(self, image_size: tuple[int, int] | None) -> tuple[int, int]:
        """(H, W) as asked for, or those the flow was made for."""
        sides = (self.height, self.width) if image_size is None else image_size
        if not isinstance(sides, Sequence) or len(sides) != 2:
            raise ValueError(f"image_size must be (height, width), got {image_size!r}")
        self._check_size(*sides, "image_size")
        return sides[0], sides[1]

    def _check_image(self, x: Tensor, name: str = "x") -> None:
        if x.ndim != 4 or x.shape[1] != self.n_channels:
            raise ValueError(f"{name} must have shape (B, {self.n_channels}, H, W), got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"{name} must hold floating-point numbers, images in [0, 1]; got {x.dtype}")
        self._check_size(x.shape[-2], x.shape[-1], name)

    def _laid_out(self, x: Tensor) -> Tensor:
        """In the weights' type, of at least float32, and channels-last, in which the layers stay: narrow nets gain a third."""
        dtype = torch.promote_types(next(self.parameters(), x).dtype, torch.float32)
        return x.to(dtype).contiguous(memory_format=torch.channels_last)

    def _check_size(self, height: int, width: int, name: str) -> None:
        if height % self.divisor or width % self.divisor or height < 1 or width < 1:
            raise ValueError(
                f"{name} has size {height}x{width}; height and width must be divisible by {self.divisor}: pad or crop"
            )


class FlowDistribution(Distribution):
    """The density of a flow over images of one size; samples can be differentiated with respect to its weights.

    Example:
        >>> from flowprox.flows import Glow
        >>> p = Glow(image_shape=(3, 8, 8), n_levels=1, n_steps=1, hidden_channels=4).distribution()
        >>> x = p.sample((2, 5))
        >>> x.shape, p.log_prob(x).shape
        (torch.Size([2, 5, 3, 8, 8]), torch.Size([2, 5]))
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = True

    def __init__(self, flow: Flow, image_size: tuple[int, int]) -> None:
        self.flow, self.image_size = flow, image_size
        super().__init__(event_shape=torch.Size((flow.n_channels, *image_size)), validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """All images."""
        return constraints.independent(constraints.real, 3)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Images (*sample_shape, C, H, W) = g(z), z ~ N(0, I)."""
        like, shape = next(self.flow.parameters()), self.event_shape
        z = torch.randn(math.prod(sample_shape), shape.numel(), dtype=like.dtype, device=like.device)
        return self.flow.decode(z, self.image_size).view(*sample_shape, *shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(x) of images (..., C, H, W); ValueError for others."""
        if value.shape[-3:] != self.event_shape:
            raise ValueError(
                f"images must have shape (..., {', '.join(map(str, self.event_shape))}), got {tuple(value.shape)}"
            )
        return self.flow.log_prob(value.reshape(-1, *self.event_shape)).view(value.shape[:-3])


def require_flow(flow: object) -> None:
    """Raise ``ValueError`` for what is no flow."""
    if not isinstance(flow, Flow):
        raise ValueError(f"flow must be a Flow, got {type(flow).__name__}; flowprox.load_model(name) gives one")


class PixelwiseFlow(Specified, Flow):
    """Any flow behind a scale and shift per pixel.

    Arguments:
        flow: the flow that sees images whose pixels all have mean 0 and variance 1.
        image_shape: (C, H, W); by default that of the flow.

    Raises:
        ValueError: image_shape is not the flow's.

    Example:
        >>> from flowprox.flows import Glow
        >>> flow = PixelwiseFlow(Glow((1, 8, 8), n_levels=1, n_steps=1, hidden_channels=8))
        >>> x = torch.rand(2, 1, 8, 8)
        >>> bool((flow.decode(flow.encode(x)) - x).abs().max() < 1e-5)
        True
    """

    def __init__(self, flow: Flow, image_shape: Sequence[int] | None = None) -> None:
        if image_shape is not None and tuple(image_shape) != flow.image_shape:
            raise ValueError(
                f"image_shape is {tuple(image_shape)} but the flow's is {flow.image_shape}; give both alike"
            )
        Flow.__init__(
            self, Sequential([PixelNorm(flow.image_shape), flow.bijection]), flow.image_shape, flow.n_levels, offset=0.0
        )


def _groups(n_channels: int, height: int, width: int, n_levels: int, first: int = 0) -> Tensor:
    """Group numbers (1, C, H, W) of a latent made by nested Squeeze, Split and Unsqueeze."""
    channels, height, width = 4 * n_channels, height // 2, width // 2
    groups = torch.arange(first, first + channels).view(1, -1, 1, 1).expand(1, channels, height, width)
    if n_levels > 1:
        half = channels // 2
        inner = _groups(half, height, width, n_levels - 1, first + channels - half)
        final = torch.arange(first, first + channels - half).view(1, -1, 1, 1)
        groups = torch.cat([inner, final.expand(1, -1, height, width)], dim=1)
    return torch.nn.functional.pixel_shuffle(groups, 2)
