r"""Samples of the posterior in one pass: a density of the error of a trained network's estimate.

    e = x - x_hat(y),   c_l = H_l e                                 Haar coefficients of the error, level by level
    c_l = s_l(y) (b_l(y) + K_l^(1/2) t_l),  t_l ~ Student's t       a sample: x_hat plus the inverse transform of c
    log p(x | y) = sum_l log t(K_l^(-1/2) (c_l / s_l - b_l)) - sum log s_l - log|K_l^(1/2)|
    K = A (sum_k e_k e_k^T x R_k x C_k) A^T                         channels A, then rows and columns of each

Symbols: y measurement, x image (B, C, H, W), x_hat the network's estimate, s > 0 and b deviations and shifts of the
coefficients. A small U-Net predicts them from the estimate and the measurement, trained by the likelihood of images. This is a
conditional affine flow around the network, which stays as it is. K lets neighbours and channels err together. It is fitted in
closed form and does not depend on y; t has one number of degrees of freedom a level, since how much detail an image has is not
known from y. The Haar transform is orthonormal: it has no log-determinant, and what a blur tells of the coarse levels is told
to their coefficients alone.

References:
    Winkler et al. 2019, Learning likelihoods with conditional normalizing flows, https://arxiv.org/abs/1912.00042
    Dutilleul 1999, The MLE algorithm for the matrix normal distribution (the alternating fit of R and C)
    Switzer, Green 1984, Min/max autocorrelation factors for multivariate spatial imagery (A)
    Liu, Rubin 1995, ML estimation of the t distribution using EM and its extensions (the weights of images)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from deepinv.physics import LinearPhysics
from torch import Tensor, nn

from flowprox.flows import HaarSqueeze
from flowprox.naming import Specified
from flowprox.operators import visibility
from flowprox.unfolding.conditioning import MultiScaleNet
from flowprox.unfolding.networks import Unfolded

_SMALLEST = 1e-4  # of a deviation, so that what the measurement tells without noise keeps a density
_LARGEST_FACTOR = 3.0  # of log s beside that of its channel
_TAILS = [4 * 1.1**i for i in range(80)]  # degrees of freedom that are tried; with the last it is nearly normal


class Spread(NamedTuple):
    """Where the coefficients of one level lie: b and log s, (B, c, h, w) each."""

    shift: Tensor
    log_scale: Tensor

    def standardized(self, coefficients: Tensor) -> Tensor:
        """c / s - b."""
        return coefficients * torch.exp(-self.log_scale) - self.shift


class ErrorDensity(Specified, nn.Module):
    """Density of the error of an estimate: shifts and deviations of its Haar coefficients, their correlations and tails.

    Arguments:
        image_shape: (C, H, W); there is no density at other sizes.
        box: (top, left, height, width) in pixels of where the estimate can err: the image, or the part of it that a mask hides.
            Sides that 2^levels does not divide are continued at their ends.
        hidden_channels: of the U-Net, one width per level, finest first.
    """

    def __init__(self, image_shape: Sequence[int], box: Sequence[int], hidden_channels: Sequence[int]) -> None:
        super().__init__()
        n_channels = image_shape[0]
        self.image_size: tuple[int, int] = (image_shape[1], image_shape[2])
        self.top, self.left, self.height, self.width = box
        self.net: MultiScaleNet = MultiScaleNet(2 * n_channels + 1, hidden_channels)
        shapes = [level.shape[1:] for level in _levels(self.inside(torch.zeros(1, *image_shape)), len(hidden_channels))]
        pairs = zip(hidden_channels, shapes, strict=True)
        self.heads = nn.ModuleList(nn.Conv2d(width, 2 * shape[0], 3, padding=1) for width, shape in pairs)
        for head in self.heads:
            nn.init.zeros_(head.weight)  # type: ignore[arg-type]
            nn.init.zeros_(head.bias)  # type: ignore[arg-type]
        self.log_scale: nn.ParameterList = nn.ParameterList(torch.zeros(shape[0], 1, 1) for shape in shapes)
        self.channels: nn.ParameterList = _fixed(torch.eye(shape[0]) for shape in shapes)
        self.rows: nn.ParameterList = _fixed(torch.eye(shape[1]).repeat(shape[0], 1, 1) for shape in shapes)
        self.columns: nn.ParameterList = _fixed(torch.eye(shape[2]).repeat(shape[0], 1, 1) for shape in shapes)
        self.tails: nn.Parameter = nn.Parameter(torch.full((len(shapes),), _TAILS[-1]), requires_grad=False)

    def inside(self, x: Tensor) -> Tensor:
        """The box of images (B, C, H, W), continued to sides that the levels divide."""
        divisor = 2 ** len(self.net.contract)
        box = x[..., self.top : self.top + self.height, self.left : self.left + self.width]
        return F.pad(box, (0, -self.width % divisor, 0, -self.height % divisor), mode="replicate")

    def coefficients(self, error: Tensor) -> list[Tensor]:
        """c_l of errors (B, C, H, W), finest level first."""
        return _levels(self.inside(error), len(self.heads))

    def forward(self, inputs: Tensor) -> list[Spread]:
        """b and log s of each level, from the box of what ``ConditionalDensity`` computes, (B, 2 C + 1, h, w)."""
        spreads = []
        for head, h, own in zip(self.heads, self.net.features(inputs), self.log_scale, strict=True):
            shift, factor = head(F.relu(h)).chunk(2, dim=1)
            factor = _LARGEST_FACTOR * torch.tanh(factor / _LARGEST_FACTOR)
            spreads.append(Spread(shift, torch.log(torch.exp(own + factor) + _SMALLEST)))
        return spreads

    def draw(self, spreads: Sequence[Spread], generator: torch.Generator | None = None) -> Tensor:
        """One error (B, C, H, W) of each image; zero outside of the box."""
        error = _assembled([self._drawn(i, spread, generator) for i, spread in enumerate(spreads)])
        error = error[..., : self.height, : self.width]
        height, width = self.image_size
        right, below = width - self.left - self.width, height - self.top - self.height
        return F.pad(error, (self.left, right, self.top, below))

    def _drawn(self, i: int, spread: Spread, generator: torch.Generator | None) -> Tensor:
        """Coefficients of level i."""
        like, half = spread.shift, 0.5 * self.tails[i].item()
        device = like.device if generator is None else generator.device
        n = torch.randn(like.shape, generator=generator, dtype=like.dtype, device=device)
        halves = torch.full((len(n), 1, 1, 1), half, dtype=torch.float64, device=device)
        gamma = torch._standard_gamma(halves, generator)  # pyright: ignore[reportPrivateImportUsage]  # others take none
        n = (n * (half / gamma).sqrt().to(n)).to(like.device)
        parts = self.rows[i] @ n @ self.columns[i].mT
        return spread.log_scale.exp() * (like + torch.einsum("cd,bdhw->bchw", self.channels[i], parts))

    def log_prob(self, error: Sequence[Tensor], spreads: Sequence[Spread]) -> Tensor:
        """Log-density in nats, (B,), of an error given by its coefficients."""
        total = error[0].new_zeros(len(error[0]))
        for i, (level, spread) in enumerate(zip(error, spreads, strict=True)):
            white, log_determinant = self._whitened(i, spread.standardized(level))
            squares = white.flatten(1).square().sum(1)
            total = total + _student(squares, white[0].numel(), self.tails[i]) - log_determinant
            total = total - spread.log_scale.flatten(1).sum(1)
        return total

    def fit_correlations(self, error: Sequence[Tensor], spreads: Sequence[Spread], n_rounds: int = 6) -> None:
        """Fit K and the tails to the coefficients of errors: channels, places, and how images weigh, in turn.

        In the end samples are made to vary as much as errors do, level by level.
        """
        for i, (coefficients, spread) in enumerate(zip(error, spreads, strict=True)):
            level = spread.standardized(coefficients)
            w, n = level.double(), level[0].numel()
            weights = w.new_ones(len(w))
            for _ in range(n_rounds):
                factors = _separable(w, weights)
                for own, fitted in zip((self.channels, self.rows, self.columns), factors, strict=True):
                    own[i].data.copy_(fitted)
                squares = self._whitened(i, level)[0].flatten(1).square().sum(1).double()
                tail = max(_TAILS, key=lambda tail: float(_student(squares, n, torch.tensor(tail)).sum()))
                weights = (tail + n) / (tail + squares)
            self.tails.data[i] = tail
            rows, columns = (factors[i].square().sum(2) for factors in (self.rows, self.columns))
            variance = rows[:, :, None] * columns[:, None] * tail / (tail - 2)
            mixed = torch.einsum("cd,dhw->chw", self.channels[i].square(), variance)
            variance = spread.log_scale.exp().square() * mixed
            own = (coefficients - spread.shift * spread.log_scale.exp()).square().sum()
            self.channels[i].data *= (own / variance.sum()).sqrt()

    def _whitened(self, i: int, w: Tensor) -> tuple[Tensor, Tensor]:
        """K^(-1/2) w at level i, and log|det K^(1/2)|."""
        parts = torch.einsum("cd,bdhw->bchw", torch.linalg.inv(self.channels[i]), w)
        parts = torch.linalg.solve_triangular(self.rows[i], parts, upper=False)
        height, width = parts.shape[-2:]
        log_determinant = height * width * torch.linalg.slogdet(self.channels[i])[1]
        for factors, n in ((self.rows[i], width), (self.columns[i], height)):
            log_determinant = log_determinant + n * factors.diagonal(dim1=1, dim2=2).log().sum()
        return torch.linalg.solve_triangular(self.columns[i], parts.mT, upper=False).mT, log_determinant


def _fixed(values: Iterable[Tensor]) -> nn.ParameterList:
    return nn.ParameterList(nn.Parameter(value, requires_grad=False) for value in values)


def _student(squares: Tensor, n: int, tail: Tensor) -> Tensor:
    """Log-density of Student's t with n entries and ``tail`` degrees of freedom, from their sum of squares."""
    tail = tail.double()
    constant = torch.lgamma(0.5 * (tail + n)) - torch.lgamma(0.5 * tail) - 0.5 * n * torch.log(math.pi * tail)
    return (constant - 0.5 * (tail + n) * torch.log1p(squares / tail)).to(squares)


def _separable(w: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A, R and C for w (B, c, h, w) of images with weights (B,)."""
    weighted = weights.sqrt()[:, None, None, None] * w
    mixing = _autocorrelation_factors(weighted)
    parts = torch.einsum("cd,bdhw->cbhw", torch.linalg.inv(mixing), weighted)
    rows, columns = (torch.eye(n).to(parts).repeat(len(parts), 1, 1) for n in parts.shape[2:])
    for _ in range(2):
        columns = _cholesky_factors(torch.linalg.solve_triangular(rows[:, None], parts, upper=False))
        rows = _cholesky_factors(torch.linalg.solve_triangular(columns[:, None], parts.mT, upper=False))
    return mixing, rows, columns


def _cholesky_factors(parts: Tensor) -> Tensor:
    """Of the covariances of the last dimension of (c, ..., n), (c, n, n)."""
    vectors = parts.flatten(1, -2)
    covariances = vectors.mT @ vectors / vectors.shape[1]
    diagonal = covariances.diagonal(dim1=1, dim2=2).mean(1)
    return torch.linalg.cholesky(covariances + 1e-6 * diagonal[:, None, None] * torch.eye(vectors.shape[2]).to(parts))


def _autocorrelation_factors(w: Tensor) -> Tensor:
    """A (c, c) with w = A v, where the channels of v are uncorrelated with each other at one place and at neighbours."""
    here = w.transpose(0, 1).flatten(1)
    covariance = here @ here.T / here.shape[1]
    half = torch.linalg.cholesky(covariance + 1e-6 * covariance.diagonal().mean() * torch.eye(len(here)).to(w))
    v = torch.linalg.solve_triangular(half, here, upper=False).view(len(here), -1, *w.shape[2:])
    neighbours = ((v[..., :-1, :], v[..., 1:, :]), (v[..., :-1], v[..., 1:]))
    products = [a.flatten(1) @ b.flatten(1).T / max(1, a[0].numel()) for a, b in neighbours]
    beside = torch.stack(products).mean(0)
    return half @ torch.linalg.eigh(0.5 * (beside + beside.T)).eigenvectors


def _levels(x: Tensor, n_levels: int) -> list[Tensor]:
    """Orthonormal Haar coefficients of (B, C, H, W), finest first: 3 C channels each, and C more, the means, at the last."""
    fine, n_channels, haar = [], x.shape[1], HaarSqueeze().to(x.device)
    for _ in range(n_levels):
        x, details = haar.encode(x).split([n_channels, 3 * n_channels], dim=1)
        fine.append(details)
    return [*fine[:-1], torch.cat([x, fine[-1]], dim=1)]


def _assembled(levels: Sequence[Tensor]) -> Tensor:
    """The images (B, C, H, W) of ``_levels``."""
    haar, x = HaarSqueeze().to(levels[0].device), levels[-1]
    for details in reversed(levels[:-1]):
        x = torch.cat([haar.decode(x), details], dim=1)
    return haar.decode(x)


class BoundDensity(NamedTuple):
    """p(x | y) for some measurements, as ``flowprox.solvers.importance_samples`` takes a proposal."""

    network: Unfolded
    x_hat: Tensor  # (B, C, H, W)
    spreads: list[Spread]
    density: ErrorDensity
    y: Tensor
    physics: LinearPhysics

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n images of each measurement (n, B, C, H, W)."""
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        samples = (self.x_hat + self.density.draw(self.spreads, generator) for _ in range(n))
        return torch.stack([self.network.final_data_step(x, self.y, self.physics) for x in samples])

    @torch.no_grad()
    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x | y) in nats, (..., B), of images (..., B, C, H, W). ValueError for a network that ends with a data step,
        whose samples have no density, or a density of a part only.
        """
        if self.network.ends_with_data_step:
            raise ValueError("a network that ends with a data step puts what was measured into its samples: no density")
        if self.density.inside(self.x_hat).shape != self.x_hat.shape:
            raise ValueError("the density is of a part of the image only, or continued: there is none of the image")
        errors = (x - self.x_hat).reshape(-1, *self.x_hat.shape)
        values = [self.density.log_prob(self.density.coefficients(one), self.spreads) for one in errors]
        return torch.stack(values).reshape(x.shape[:-3])


class ConditionalDensity:
    """p(x | y) of a trained network and the density of its error.

    Arguments:
        network: any unfolded network.
        density: trained for it by ``fit_density``.

    Example:
        >>> from flowprox import FlowProx, Glow, UnfoldedPGD, make_physics
        >>> network = UnfoldedPGD([FlowProx(Glow((3, 8, 8), n_levels=2, n_steps=1, hidden_channels=4))]).eval()
        >>> density = ConditionalDensity(network, ErrorDensity((3, 8, 8), (0, 0, 8, 8), [8, 8]))
        >>> y, physics = torch.rand(2, 3, 8, 8), make_physics("denoising", (3, 8, 8), sigma=0.1)
        >>> x = density.sample(y, physics, 5)
        >>> x.shape, density.log_prob(x, y, physics).shape
        (torch.Size([5, 2, 3, 8, 8]), torch.Size([5, 2]))
    """

    def __init__(self, network: Unfolded, density: ErrorDensity) -> None:
        self.network, self.density = network, density

    @torch.no_grad()
    def of(self, y: Tensor, physics: LinearPhysics) -> BoundDensity:
        """The density of the images behind measurements (B, ...): samples and ``log_prob`` without the network's run.
        ValueError for images of another size than in training.
        """
        x_hat = self.network(y, physics)
        if tuple(x_hat.shape[-2:]) != self.density.image_size:
            own, other = ("x".join(map(str, size)) for size in (self.density.image_size, x_hat.shape[-2:]))
            raise ValueError(f"samples are of images of {own} pixels, as the density was trained on, not {other}")
        spreads = self.density(self.density.inside(_features(x_hat, y, physics)))
        return BoundDensity(self.network, x_hat, spreads, self.density, y, physics)

    def sample(self, y: Tensor, physics: LinearPhysics, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n images (n, B, C, H, W) of p(x | y) for each measurement (B, ...).

        A network that ends with a data step ends so here too: what was measured without noise is then kept.
        """
        return self.of(y, physics).sample(n, generator)

    def log_prob(self, x: Tensor, y: Tensor, physics: LinearPhysics) -> Tensor:
        """log p(x | y) in nats, (..., B), of images (..., B, C, H, W); see ``BoundDensity.log_prob``."""
        return self.of(y, physics).log_prob(x)


def _features(x_hat: Tensor, y: Tensor, physics: LinearPhysics) -> Tensor:
    """What the deviations are predicted from: the estimate, A^T y - x_hat and A^T A 1, (B, 2 C + 1, H, W)."""
    seen = visibility(x_hat, physics).expand(len(x_hat), -1, -1, -1)
    return torch.cat([x_hat - 0.5, physics.A_adjoint(y) - x_hat, seen], dim=1)


def fit_density(
    estimates: Sequence[tuple[Tensor, Tensor, Tensor]],
    physics: LinearPhysics,
    hidden_channels: Sequence[int] = (12, 18, 24),
    n_steps: int = 400,
    seed: int = 0,
    callback: Callable[[int, int, float], None] | None = None,
) -> ErrorDensity:
    """Train the density of a network's errors by the likelihood of images, and fit its correlations halfway and at the end.

    Correlations and tails are of the last quarter of the images, which the U-Net is not trained on: on its own its errors are
    smaller.

    Arguments:
        estimates: batches of images x (B, C, H, W), their measurements y and the network's estimates. Images of 8 bits should
            be spread over their digits (uniform noise of 1/255), or what is measured exactly has an infinite density.
        physics: the operator.
        hidden_channels: widths of the predictor, see ``ErrorDensity``.
        n_steps: of Adam, 16 images each.
        seed: of the first weights and the order.
        callback: called with the step, their number, and the likelihood in nats per entry.
    """
    squares = torch.stack([(x - x_hat).square().sum((0, 1)) for x, _, x_hat in estimates]).sum(0)
    image_shape = estimates[0][0].shape[1:]
    places = [(p > 1e-3 * p.amax()).nonzero().flatten().tolist() for p in (squares.amax(1), squares.amax(0))]
    box = places[0][0], places[1][0], places[0][-1] + 1 - places[0][0], places[1][-1] + 1 - places[1][0]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        density = ErrorDensity(image_shape, box, hidden_channels).to(squares.device)
    with torch.no_grad():
        inputs = torch.cat([density.inside(_features(x_hat, y, physics)) for _, y, x_hat in estimates])
        coefficients = density.coefficients(torch.cat([x - x_hat for x, _, x_hat in estimates]))
        for own, level in zip(density.log_scale, coefficients, strict=True):
            own.copy_(0.5 * (level.square().mean((0, 2, 3)) + _SMALLEST**2).log()[:, None, None])
    generator = torch.Generator().manual_seed(seed)
    n_training = len(inputs) - max(1, len(inputs) // 4)
    ends = (0, n_steps // 2, n_steps)
    for first, last in pairwise(ends):
        if last > first:
            optimizer = torch.optim.Adam([p for p in density.parameters() if p.requires_grad], lr=2e-3)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=last - first)
            for step in range(first, last):
                chosen = torch.randint(n_training, (min(16, n_training),), generator=generator).to(inputs.device)
                log_prob = density.log_prob([level[chosen] for level in coefficients], density(inputs[chosen]))
                likelihood = log_prob.mean() / inputs[0, : image_shape[0]].numel()
                optimizer.zero_grad()
                (-likelihood).backward()
                nn.utils.clip_grad_norm_(density.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                if callback is not None:
                    callback(step + 1, n_steps, float(likelihood.detach()))
        with torch.no_grad():
            parts = zip(*(density(one) for one in inputs[n_training:].split(32)), strict=True)
            spreads = [Spread(*map(torch.cat, zip(*level, strict=True))) for level in parts]
            density.fit_correlations([level[n_training:] for level in coefficients], spreads)
    return density.eval().requires_grad_(False)
