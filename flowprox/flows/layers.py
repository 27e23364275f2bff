r"""The layers that Glow and RealNVP are made of.

    ActNorm         z = exp(s) * x + b                    logdet = H W sum(s)
    PixelNorm       the same with s, b (C, H, W)          logdet = sum(s)
    Conv1x1         z = W x,  W = P L (U + diag(d))       logdet = H W sum(log|d|)
    AffineCoupling  z_a = exp(s(x_b)) * x_a + t(x_b)      logdet = sum(s(x_b))
    Squeeze         2x2 pixels to 4 channels              logdet = 0
    Split           an inner bijection maps the first half of the channels, the others are final

Symbols: x (B, C, H, W) in, z out, (s, t) log-scale and shift. The log-scale of a coupling layer is bounded,
s = m tanh(r / m) for a net's raw output r: a scale that may approach zero is what breaks the inverse in float32. The shift
can be bounded likewise.
Under autocast only the coupling nets run in low precision; the arithmetic above stays in the dtype of x.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowprox.flows.bijection import Bijection
from flowprox.naming import require_positive

__all__ = [
    "ActNorm", "AffineCoupling", "Conv1x1", "GlowStep", "HaarSqueeze", "PixelNorm", "Split", "Squeeze", "Unsqueeze",
    "soft_bound",
]  # fmt: skip


def _per_sample(value: Tensor, x: Tensor) -> Tensor:
    """A log-determinant that is the same for every image, as (B,)."""
    return (value * (x.shape[-2] * x.shape[-1])).expand(x.shape[0])


class _FromData(Bijection):
    """Scale and shift that are initialized from the first training batch; the flag that says so is read until it is set."""

    averaged: tuple[int, ...]
    """Dimensions of a batch over which mean and deviation are taken."""

    CONSTANT = 0.0
    """Standard deviation up to which values count as constant and keep scale 1."""

    initialized: Tensor

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(*shape))
        self.bias = nn.Parameter(torch.zeros(*shape))
        self.register_buffer("initialized", torch.tensor(False))
        self._initialization_pending = True

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Set scale and shift from x (B, C, H, W)."""
        std, mean = torch.std_mean(x.float(), dim=self.averaged, correction=0)
        self.log_scale.copy_(torch.where(std > self.CONSTANT, -torch.log(std + 1e-6), 0.0))
        self.bias.copy_(-mean * torch.exp(self.log_scale))
        self.initialized.fill_(True)

    def initialize_once(self, x: Tensor) -> None:
        """Initialize from x in train mode unless that has happened."""
        if self._initialization_pending and self.training and len(x):
            if not bool(self.initialized):
                self.initialize(x)
            self._initialization_pending = False

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._initialization_pending = True


class ActNorm(_FromData):
    """Scale and shift per channel, initialized so that the first training batch has mean 0 and variance 1.

    The flag that says so, ``initialized``, is a buffer and is saved with the weights. A channel that is constant in that batch
    keeps scale 1: its reciprocal standard deviation would blow up whatever another image has there.

    References:
        Kingma and Dhariwal 2018, Glow, https://arxiv.org/abs/1807.03039, Sec. 3.1

    Arguments:
        n_channels: C.

    Example:
        >>> layer = ActNorm(3)
        >>> z, logdet = layer(torch.randn(64, 3, 8, 8) * 5 + 1)
        >>> round(z.std().item(), 3), logdet.shape
        (1.0, torch.Size([64]))
    """

    averaged = (0, 2, 3)
    CONSTANT = 1e-4  # one of 256 gray levels, dequantized, has 1e-3

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.initialize_once(x)
        return self.scaled(x), _per_sample(self.log_scale.sum(), x)

    def scaled(self, x: Tensor) -> Tensor:
        """exp(s) * x + b in the dtype of x, whatever is initialized."""
        scale = torch.exp(self.log_scale).to(x.dtype).view(1, -1, 1, 1)
        return x * scale + self.bias.to(x.dtype).view(1, -1, 1, 1)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        scale = torch.exp(-self.log_scale).view(1, -1, 1, 1)
        return (z - self.bias.view(1, -1, 1, 1)) * scale, _per_sample(-self.log_scale.sum(), z)


class PixelNorm(_FromData):
    """Scale and shift per pixel, initialized so that the first training batch has mean 0 and variance 1 in each.

    Noise whose level changes from row to row needs this layer at its end of the flow: the others treat all places alike.

    Arguments:
        image_shape: (C, H, W); no other size is taken.

    Example:
        >>> layer = PixelNorm((1, 2, 2))
        >>> z, logdet = layer(torch.randn(1000, 1, 2, 2) * torch.tensor([[1.0], [9.0]]))
        >>> z.detach().std(dim=0).round(decimals=2).flatten()
        tensor([1., 1., 1., 1.])
    """

    averaged = (0,)

    def __init__(self, image_shape: Sequence[int]) -> None:
        super().__init__(*image_shape)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """z and log|det|; ValueError where x is not of the size the layer was made for."""
        self._check(x)
        self.initialize_once(x)
        return x * torch.exp(self.log_scale) + self.bias, self.log_scale.sum().expand(x.shape[0])

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """x and log|det|; errors as in ``forward``."""
        self._check(z)
        return (z - self.bias) * torch.exp(-self.log_scale), -self.log_scale.sum().expand(len(z))

    def _check(self, x: Tensor) -> None:
        if x.shape[1:] != self.log_scale.shape:
            own, other = tuple(self.log_scale.shape), tuple(x.shape[1:])
            raise ValueError(f"the flow has a scale for each pixel of images of shape {own}; train one for {other}")


def mixing_matrix(permutation: Tensor, lu: Tensor, sign: Tensor) -> Tensor:
    """P L (U + diag(d)) from one (C, C) parameter, or from a stack of them (..., C, C)."""
    lower, upper = _lu_factors(lu, sign)
    return permutation @ (lower @ upper)


def inverse_mixing_matrix(permutation: Tensor, lu: Tensor, sign: Tensor) -> Tensor:
    """The inverse of ``mixing_matrix``, by two triangular solves."""
    lower, upper = _lu_factors(lu, sign)
    half = torch.linalg.solve_triangular(lower, permutation.mT, upper=False, unitriangular=True)
    return torch.linalg.solve_triangular(upper, half, upper=True)


def _lu_factors(lu: Tensor, sign: Tensor) -> tuple[Tensor, Tensor]:
    identity = torch.eye(lu.shape[-1], dtype=lu.dtype, device=lu.device)
    diagonal = sign * torch.exp(lu.diagonal(dim1=-2, dim2=-1))
    return lu.tril(-1) + identity, lu.triu(1) + torch.diag_embed(diagonal)


class Conv1x1(Bijection):
    """Invertible 1x1 convolution W = P L (U + diag(d)), a learned generalization of a channel permutation.

    L (unit lower), U (strictly upper) and log|d| share one C x C parameter, so the layer has C^2 of them; P and the signs of
    d are fixed. The inverse is two triangular solves.

    References:
        Kingma and Dhariwal 2018, Glow, https://arxiv.org/abs/1807.03039, Sec. 3.2, Eqs. (10) and (11) (LU decomposition)

    Arguments:
        n_channels: C. The start is a random orthogonal matrix.
    """

    permutation: Tensor
    sign: Tensor

    def __init__(self, n_channels: int) -> None:
        super().__init__()
        rotation, _ = torch.linalg.qr(torch.randn(n_channels, n_channels))
        p, lower, upper = torch.linalg.lu(rotation)
        diagonal = upper.diagonal()
        self.lu = nn.Parameter(lower.tril(-1) + upper.triu(1) + torch.diag(diagonal.abs().log()))
        self.register_buffer("permutation", p)
        self.register_buffer("sign", diagonal.sign())

    def weight(self) -> Tensor:
        """W, (C, C)."""
        return mixing_matrix(self.permutation, self.lu, self.sign)

    def inverse_weight(self) -> Tensor:
        """W^-1, (C, C), by two triangular solves."""
        return inverse_mixing_matrix(self.permutation, self.lu, self.sign)

    def log_determinant(self) -> Tensor:
        """log|det W|, a scalar."""
        return self.lu.diagonal().sum()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with full_precision(x):
            return pixelwise(x, self.weight()), _per_sample(self.log_determinant(), x)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        with full_precision(z):
            return pixelwise(z, self.inverse_weight()), _per_sample(-self.log_determinant(), z)


def full_precision(x: Tensor) -> torch.autocast:
    """Autocast off: the bijection's own arithmetic stays in the dtype of x."""
    return torch.autocast(x.device.type, enabled=False)


def on_cpu(x: Tensor) -> bool:
    """Whether a CPU computes; accelerators are better served otherwise in places."""
    return x.device.type == "cpu"


def pixelwise(x: Tensor, matrix: Tensor, bias: Tensor | None = None, as_product: bool | None = None) -> Tensor:
    """The same affine map of the channels at every pixel, M x + m; never in TF32, which would undo the exact inverse.

    On a GPU cuDNN's convolutions are in TF32 unless they are told otherwise, and products of matrices are not: so there it is a
    product (``as_product``), and where TF32 is allowed for products too, one in float64. What the coupling nets use is the
    user's choice.
    """
    if not (not on_cpu(x) if as_product is None else as_product):
        return F.conv2d(x, matrix[:, :, None, None], bias)
    pixels = x.permute(0, 2, 3, 1)
    if x.is_cuda and x.dtype == torch.float32 and _products_are_tf32():
        y = F.linear(pixels.double(), matrix.double(), None if bias is None else bias.double()).to(x.dtype)
    else:
        y = F.linear(pixels, matrix, bias)
    return y.permute(0, 3, 1, 2)


@torch.compiler.assume_constant_result
def _products_are_tf32() -> bool:
    """Whether ``torch.backends`` allows TF32 for products of matrices on CUDA (torch 2.9 renamed the switch)."""
    matmul = torch.backends.cuda.matmul
    return bool(matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32)


def soft_bound(value: Tensor, bound: float) -> Tensor:
    """bound * tanh(value / bound): the identity near zero, never beyond +-bound."""
    return bound * torch.tanh(value / bound)


Bounds = tuple[float, float | None]
"""Bounds of a coupling's log-scale and shift."""


def bounded(bounds: Bounds, raw: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """(s, t) from the two halves of a net's raw output."""
    scale_bound, shift_bound = bounds
    return soft_bound(raw, scale_bound), shift if shift_bound is None else soft_bound(shift, shift_bound)


class AffineCoupling(Bijection):
    """z_a = exp(s(x_b)) x_a + t(x_b), z_b = x_b (Dinh et al. 2017, Eqs. 4 and 5; Wei et al. 2022, Sec. IV).

    Arguments:
        net: maps x_b (B, C - C//2, H, W) to (s, t) stacked, (B, 2 (C//2), H, W).
        scale_bound: bound m of the log-scale; 0.5 cost no likelihood and kept the inverse exact on noisy images.
        shift_bound: bound of the shift, None for none: without one a latent off the flow's map may grow in every inverse step.
    """

    def __init__(self, net: nn.Module, scale_bound: float = 0.5, shift_bound: float | None = None) -> None:
        super().__init__()
        require_positive("scale_bound", scale_bound)
        require_positive("shift_bound", 4.0 if shift_bound is None else shift_bound)
        self.net = net
        self.scale_bound = scale_bound
        self.shift_bound = shift_bound

    def scale_and_shift(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        """(s, t) from the half that passes; in the dtype of the input whatever the net computed in."""
        like = next(self.net.parameters(), condition)  # nets may be held in half precision, the bijection is not
        raw, shift = self.net(condition.to(like.dtype)).to(condition.dtype).chunk(2, dim=1)
        return bounded(self.bounds, raw, shift)

    @property
    def bounds(self) -> Bounds:
        """Of log-scale and shift."""
        return self.scale_bound, self.shift_bound

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, log_scale = self._mapped(x)
        return z, log_scale.sum(dim=(1, 2, 3))

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        x, log_scale = self._mapped(z, backwards=True)
        return x, -log_scale.sum(dim=(1, 2, 3))

    def encode(self, x: Tensor) -> Tensor:
        return self._mapped(x)[0]

    def decode(self, z: Tensor) -> Tensor:
        return self._mapped(z, backwards=True)[0]

    def _mapped(self, x: Tensor, backwards: bool = False) -> tuple[Tensor, Tensor]:
        """z from x, or x from z, and the log-scale s."""
        a, b = halves(x)
        log_scale, shift = self.scale_and_shift(b)
        return torch.cat([self._moved(a, log_scale, shift, backwards), b], dim=1), log_scale

    @staticmethod
    def _moved(x: Tensor, log_scale: Tensor, shift: Tensor, backwards: bool) -> Tensor:
        """exp(s) x + t, or what that is undone to."""
        return (x - shift) * torch.exp(-log_scale) if backwards else x * torch.exp(log_scale) + shift


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """The first C//2 channels and the others."""
    half = x.shape[1] // 2
    first, others = x.split([half, x.shape[1] - half], dim=1)  # one kernel in backward, where slices take three
    return first, others


class GlowStep(Bijection):
    """ActNorm, 1x1 convolution and affine coupling: one step of flow (Kingma and Dhariwal 2018, Fig. 2a).

    The first two are linear per pixel and are applied as one convolution: W (exp(s) x + b).

    Arguments:
        n_channels: C, at least 2.
        net: conditioner of the coupling, see ``AffineCoupling``.
        scale_bound, shift_bound: bounds of the coupling's log-scale and shift.
    """

    def __init__(
        self, n_channels: int, net: nn.Module, scale_bound: float = 0.5, shift_bound: float | None = None
    ) -> None:
        super().__init__()
        self.actnorm = ActNorm(n_channels)
        self.mix = Conv1x1(n_channels)
        self.coupling = AffineCoupling(net, scale_bound, shift_bound)

    def initialize_once(self, x: Tensor) -> None:
        """Initialize ActNorm, and those inside the net, from x in train mode unless that has happened."""
        if not (self.training and self.actnorm._initialization_pending and len(x)):
            return
        fresh = not bool(self.actnorm.initialized)
        self.actnorm.initialize_once(x)
        if fresh and hasattr(self.coupling.net, "initialize"):
            with torch.no_grad():
                mixed = self.mix.forward(self.actnorm.forward(x)[0])[0]
                self.coupling.net.initialize(halves(mixed)[1])  # type: ignore[operator]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, logdet = self.coupling(self._mixed(x))
        return z, logdet + _per_sample(self._logdet(), x)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        x, logdet = self.coupling.inverse(z)
        return self._unmixed(x), logdet - _per_sample(self._logdet(), z)

    def encode(self, x: Tensor) -> Tensor:
        return self.coupling.encode(self._mixed(x))

    def decode(self, z: Tensor) -> Tensor:
        return self._unmixed(self.coupling.decode(z))

    def linear(self, inverse: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """M (C, C), m (C,) and log|det M| of the linear part u = M x + m, or of its inverse."""
        log_scale, logdet = self.actnorm.log_scale, self._logdet()
        if inverse:
            scale = torch.exp(-log_scale)
            return scale[:, None] * self.mix.inverse_weight(), -scale * self.actnorm.bias, -logdet
        weight = self.mix.weight()
        return weight * torch.exp(log_scale), weight @ self.actnorm.bias, logdet

    def _mixed(self, x: Tensor) -> Tensor:
        self.initialize_once(x)
        with full_precision(x):
            return pixelwise(x, *self.linear()[:2])

    def _unmixed(self, z: Tensor) -> Tensor:
        with full_precision(z):
            return pixelwise(z, *self.linear(inverse=True)[:2])

    def _logdet(self) -> Tensor:
        return self.actnorm.log_scale.sum() + self.mix.log_determinant()


class LinearParts(NamedTuple):
    """The linear part of every step of a chain, u = M x + m: M (n, C, C), m (n, C), log|det M| (n,)."""

    matrix: Tensor
    bias: Tensor
    logdet: Tensor

    @classmethod
    def stepwise(cls, steps: Sequence[GlowStep], inverse: bool = False) -> LinearParts:
        """As the steps compute them, one after the other."""
        return cls(*(torch.stack(parts) for parts in zip(*(step.linear(inverse) for step in steps), strict=True)))

    @classmethod
    def of(cls, steps: Sequence[GlowStep], inverse: bool = False) -> LinearParts:
        """All at once, in float64 and rounded at the end, which gains half a digit of the round trip."""
        parts = [(s.mix.permutation, s.mix.lu, s.mix.sign, s.actnorm.log_scale, s.actnorm.bias) for s in steps]
        # Apple's accelerator has no float64
        device = torch.device("cpu") if parts[0][0].device.type == "mps" else parts[0][0].device
        together = (torch.stack(part).to(device, torch.float64) for part in zip(*parts, strict=True))
        permutation, lu, sign, log_scale, bias = together
        logdet = log_scale.sum(-1) + lu.diagonal(dim1=-2, dim2=-1).sum(-1)
        if inverse:
            scale, logdet = torch.exp(-log_scale), -logdet
            linear = scale[:, :, None] * inverse_mixing_matrix(permutation, lu, sign), -scale * bias, logdet
        else:
            weight = mixing_matrix(permutation, lu, sign)
            linear = weight * torch.exp(log_scale)[:, None], (weight @ bias[:, :, None])[:, :, 0], logdet
        like = steps[0].mix.lu
        return cls(*(part.to(like.device, torch.promote_types(like.dtype, torch.float32)) for part in linear))


def _unshuffled(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    if h % 2 or w % 2:
        raise ValueError(f"x has odd height or width {(h, w)}; pad or crop it to even numbers")
    return (
        F.pixel_unshuffle(x, 2) if n else x.reshape(0, 4 * c, h // 2, w // 2)
    )  # torch leaves empty batches as they are


def _shuffled(z: Tensor) -> Tensor:
    n, c, h, w = z.shape
    if c % 4:
        raise ValueError(f"z has {c} channels, which is not a multiple of 4")
    return F.pixel_shuffle(z, 2) if n else z.reshape(0, c // 4, 2 * h, 2 * w)


class Squeeze(Bijection):
    """Each 2x2 block of pixels becomes four channels: (B, C, H, W) to (B, 4C, H/2, W/2) (Dinh et al. 2017)."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.encode(x), x.new_zeros(x.shape[0])

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.decode(z), z.new_zeros(z.shape[0])

    def encode(self, x: Tensor) -> Tensor:
        return _unshuffled(x)

    def decode(self, z: Tensor) -> Tensor:
        return _shuffled(z)


class Unsqueeze(Squeeze):
    """The inverse of ``Squeeze``: (B, 4C, H, W) to (B, C, 2H, 2W)."""

    def encode(self, x: Tensor) -> Tensor:
        return Squeeze.decode(self, x)

    def decode(self, z: Tensor) -> Tensor:
        return Squeeze.encode(self, z)


class HaarSqueeze(Squeeze):
    """The orthonormal 2-D Haar transform of each 2x2 block: (B, C, H, W) to (B, 4C, H/2, W/2), the C averages first.

    Averages and details start apart, which a random rotation has to learn.
    """

    haar: Tensor

    def __init__(self) -> None:
        super().__init__()
        bands = [[[1, 1], [1, 1]], [[1, -1], [1, -1]], [[1, 1], [-1, -1]], [[1, -1], [-1, 1]]]
        self.register_buffer("haar", torch.tensor(bands).float() / 2, persistent=False)

    def _matrix(self, x: Tensor, n_channels: int) -> Tensor:
        """(4C, 4C), orthogonal: band i of channel c in row i C + c, from pixel p of channel c in column 4 c + p."""
        identity = torch.eye(n_channels, dtype=x.dtype, device=x.device)
        return torch.einsum("ip,cd->icdp", self.haar.to(x.dtype).flatten(1), identity).reshape(4 * n_channels, -1)

    def encode(self, x: Tensor) -> Tensor:
        with full_precision(x):
            return pixelwise(_unshuffled(x), self._matrix(x, x.shape[1]))

    def decode(self, z: Tensor) -> Tensor:
        with full_precision(z):
            return _shuffled(pixelwise(z, self._matrix(z, z.shape[1] // 4).T))


class Split(Bijection):
    """The last channels are final; ``inner``, which keeps its input's shape, maps the first C//2.

    Nesting ``Squeeze``, steps, ``Split`` and ``Unsqueeze`` gives the multi-scale architecture of Dinh et al. 2017 as one
    bijection from (B, C, H, W) to (B, C, H, W).

    Arguments:
        inner: a shape-preserving bijection.
    """

    def __init__(self, inner: Bijection) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rest, done = halves(x)
        rest, logdet = self.inner(rest)
        return torch.cat([rest, done], dim=1), logdet

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        rest, done = halves(z)
        rest, logdet = self.inner.inverse(rest)
        return torch.cat([rest, done], dim=1), logdet

    def encode(self, x: Tensor) -> Tensor:
        rest, done = halves(x)
        return torch.cat([self.inner.encode(rest), done], dim=1)

    def decode(self, z: Tensor) -> Tensor:
        rest, done = halves(z)
        return torch.cat([self.inner.decode(rest), done], dim=1)
