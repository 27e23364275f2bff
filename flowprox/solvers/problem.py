"""A measurement seen from the latent space of a flow, and what a solver makes of it: what every latent solver shares.

    z (B, D)  ->  x = g(z) (B, C, H, W)  ->  A(x), compared with y

Symbols: z flat latent, g = f^-1 the flow from latent to image, A operator, y measurement, B images.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from deepinv.models import Reconstructor
from deepinv.physics import LinearPhysics, Physics
from torch import Tensor

from flowprox.flows import Flow
from flowprox.operators import check_adjoint, check_measurement

Start = str | float | Tensor | Reconstructor
"""Where a solver begins: "zero", "adjoint" (A^T y through the flow), the standard deviation of random latents, images
(B, C, H, W), which go through the flow, or a method that makes them of y, such as a Lasso."""


@dataclass
class Solution:
    """Result of ``solver.solve(y, physics)``; B images, D latent dimensions.

    Arguments:
        estimate: images (B, C, H, W), not clipped.
        latent: their latents (B, D), or None where the method has none.
        losses: objective after each iteration, (n_iterations + 1, B), the start first; an image that stopped keeps its
            last value.
        reasons: per image, why it stopped: "converged", "iterations", "evaluations", "line search", "interrupted".
        n_evaluations: evaluations of objective and gradient per image, (B,).
        gamma: weight of the prior that was used, (B,), or None.
        restarts: how often a non-finite value or a failed line search sent the image back to its best point, (B,).
        latent_norms: ||z|| after each iteration, laid out as ``losses``; in the space "image" ||x||, which is what moves there.
        residual_p_value: how likely the stated noise is to leave at least as much of y as was left, (B,); see
            ``flowprox.noise.residual_p_value``. None where the noise is not white Gaussian noise of a known level.
    """

    estimate: Tensor
    latent: Tensor | None
    losses: Tensor
    reasons: list[str]
    n_evaluations: Tensor
    gamma: Tensor | None = None
    restarts: Tensor | None = None
    latent_norms: Tensor | None = None
    residual_p_value: Tensor | None = None


class SolverInterrupted(KeyboardInterrupt):
    """Ctrl-C during a solve; ``solution`` holds the best iterates so far, with "interrupted" among its reasons."""

    def __init__(self, solution: Solution) -> None:
        super().__init__("interrupted; the attribute solution holds what is finished")
        self.solution = solution


class LatentProblem:
    """A flow, an operator and measurements that fit together, or a ValueError; of an empty batch, a measurement of zeros.

    Arguments:
        flow: the prior: a flow, or a decoder that maps (B, latent_size) to images and has ``image_shape``.
        y: measurement (B, ...).
        physics: its operator.
    """

    def __init__(self, flow: Any, y: Tensor, physics: Physics) -> None:
        if not isinstance(flow, Flow) and not isinstance(getattr(flow, "latent_size", None), int):
            kind = f"{type(flow).__name__}; load_model(name) gives one"
            raise ValueError(f"flow must be a Flow, or a decoder with latent_size, got {kind}")
        self.is_empty = isinstance(y, Tensor) and y.ndim > 1 and not len(y)
        y = y.new_zeros(1, *y.shape[1:]) if self.is_empty else y
        self.flow, self.y, self.physics = flow, check_measurement(y, physics).detach(), physics
        self._separable: bool | None = None
        shape = self._image_shape()
        self.channels, self.size = shape[0], (shape[1], shape[2])
        channels = flow.image_shape[0]
        if self.channels != channels:
            raise ValueError(f"the operator takes images with {self.channels} channels and the flow has {channels}")
        if not self.has_density and shape != tuple(flow.image_shape):
            raise ValueError(f"the operator takes images {shape} and {type(flow).__name__} makes {flow.image_shape}")
        if self.has_density and any(side % flow.divisor for side in self.size):
            size = "the operator takes images of {}x{}".format(*self.size)
            raise ValueError(f"{size}, and the flow needs sides divisible by {flow.divisor}")
        self.image_shape = (shape[0], shape[1], shape[2])
        if self.y.dtype.to_real() != self._like.dtype:
            raise ValueError(f"y is {self.y.dtype} and the flow {self._like.dtype}; convert one of them")
        if not isinstance(physics, LinearPhysics):  # whose adjoint has told the shape of its images
            check_measurement(self.y, physics, self.image_shape)
        check_adjoint(physics, self.image_shape, device=y.device, dtype=self._like.dtype, n_images=self.n_images)

    @property
    def has_density(self) -> bool:
        """Whether the prior is a flow."""
        return isinstance(self.flow, Flow)

    @property
    def n_images(self) -> int:
        """B."""
        return self.y.shape[0]

    @property
    def dimension(self) -> int:
        """D = C H W, or the size of the decoder's latent."""
        return self.channels * math.prod(self.size) if self.has_density else int(self.flow.latent_size)  # pyright: ignore

    def as_images(self, u: Tensor) -> Tensor:
        """Rows (B, D) arranged as (B, C, H, W)."""
        return u.view(-1, self.channels, *self.size)

    def decode(self, z: Tensor) -> Tensor:
        """g(z) (B, C, H, W) of flat latents (B, D)."""
        return self.flow.decode_image(self.as_images(z)) if self.has_density else self.flow(z)

    def residual(self, x: Tensor) -> Tensor:
        """y - A x."""
        residual = self.y - self.physics.A(x)
        if x.requires_grad and not residual.requires_grad:
            raise ValueError("physics.A cuts the graph (numpy, detach or no_grad): the solver needs its derivative")
        return residual

    def latents(self, start: Start, seed: int = 0, n_restarts: int = 1) -> Tensor:
        """Latents (B, D) to begin from. Random ones are the same for all images, and different for successive n_restarts.
        ValueError for another start, a negative standard deviation, or images of another shape.
        """
        zeros = torch.zeros(self.n_images, self.dimension, dtype=self._like.dtype, device=self._like.device)
        if isinstance(start, str):
            if start == "zero":
                return zeros
            if start == "adjoint":
                if not isinstance(self.physics, LinearPhysics):
                    raise ValueError("start='adjoint' needs a linear operator; use start='zero' or images")
                return self._encoded(self.physics.A_adjoint(self.y))
            raise ValueError(f"start must be 'zero', 'adjoint', a number, images or a method; got {start!r}")
        if isinstance(start, Tensor):
            return self._encoded(start)
        if isinstance(start, Reconstructor):
            return self._encoded(start(self.y, self.physics))
        if not (isinstance(start, int | float) and 0 <= start < float("inf")):
            raise ValueError(f"start is the standard deviation of random latents and must be at least 0, got {start!r}")
        generator = torch.Generator().manual_seed(seed)  # on the CPU so that every device has the same
        noise = torch.randn(n_restarts, self.dimension, generator=generator, dtype=zeros.dtype)
        return zeros + start * noise.to(zeros.device).repeat(self.n_images // n_restarts, 1)

    def select(self, images: Tensor) -> LatentProblem:
        """The problem of some images of the batch, by their indices; only where ``is_separable`` says so."""
        chosen = copy.copy(self)
        chosen.y = self.y[images]
        return chosen

    def nothing(self) -> Solution:
        """The solution of an empty batch."""
        u, none = self.latents("zero")[:0], torch.zeros(0, dtype=torch.long, device=self.y.device)
        return Solution(u.view(0, *self.image_shape), u, u.new_zeros(1, 0), [], none)

    def is_separable(self, misfit: Callable[[Tensor], Tensor]) -> bool:
        """Whether operator and ``misfit`` of a residual take one image of the batch alone, none having its own parameters."""
        if self._separable is None:
            try:
                with torch.no_grad():
                    x = torch.zeros(1, *self.image_shape).to(self._like)
                    self._separable = len(misfit(self.y[:1] - self.physics.A(x))) == 1
            except (RuntimeError, ValueError):
                self._separable = False
        return self._separable

    def channel_scales(self, seed: int = 0, n_probes: int = 4, damping: float = 0.02) -> Tensor:
        """1 / (c + damping max c) per image and latent dimension (B, D): c is the mean square of J^T w over a channel.

        J is the Jacobian of A(g(z)) at z = 0 and w are random signs, the same for every image, so that c estimates the
        diagonal of J^T J, the curvature of the misfit.
        """
        generator = torch.Generator().manual_seed(seed)  # on the CPU so that every device has the same signs
        squares = self.latents("zero")
        for _ in range(n_probes):
            with torch.enable_grad():
                z = torch.zeros_like(squares).requires_grad_(True)
                seen = self.physics.A(self.decode(z))
                seen = torch.view_as_real(seen) if seen.is_complex() else seen
                signs = 2 * torch.randint(0, 2, seen.shape[1:], generator=generator) - 1
                (back,) = torch.autograd.grad((seen * signs.to(seen)).sum(), z)
            squares += back.square() / n_probes
        groups = self.flow.latent_groups(self.size).flatten().to(squares.device)
        sizes = torch.bincount(groups).to(squares)
        curvature = torch.zeros(len(squares), len(sizes)).to(squares).index_add_(1, groups, squares) / sizes
        return (1 / (curvature + damping * curvature.amax(dim=1, keepdim=True)))[:, groups]

    @property
    def _like(self) -> Tensor:
        """A tensor of the latents' dtype and device; a flow without parameters takes those of y."""
        return next(self.flow.parameters(), self.y.real if self.y.is_complex() else self.y)

    def _encoded(self, x: Tensor) -> Tensor:
        if not self.has_density:
            kind = type(self.flow).__name__
            raise ValueError(f"start must be 'zero' or a number for {kind}, which encodes no images")
        expected = (self.n_images, self.channels, *self.size)
        if tuple(x.shape) != expected:
            raise ValueError(f"start has shape {tuple(x.shape)}; images to begin from must be {expected}")
        with torch.no_grad():
            return self.flow.encode(x.to(self._like))

    def _image_shape(self) -> tuple[int, ...]:
        """(C, H, W) of the operator's images, as the operator tells; otherwise those the flow was made for."""
        if isinstance(self.physics, LinearPhysics):
            with torch.no_grad():
                return tuple(self.physics.A_adjoint(self.y).shape[1:])
        size = getattr(self.physics, "img_size", None)
        return tuple(size) if size is not None and len(size) == 3 else self.flow.image_shape


_APART = 2**40  # from the seeds of sensing matrices: noise that is a row of one has nothing in its null space


def null_space_perturbed(x: Tensor, physics: LinearPhysics, scale: float = 1.0, seed: int = 0) -> Tensor:
    """x + n with A n = 0 (B, C, H, W): an image that explains the measurement as well as x does (Asim et al. 2020, Sec. 3.2).

    n is the part in the null space of white noise of standard deviation ``scale``, in the units of x.
    """
    generator = torch.Generator().manual_seed(seed + _APART)
    noise = scale * torch.randn(x.shape[1:], generator=generator, dtype=x.dtype).to(x.device)
    noise = noise.expand_as(x)
    with torch.no_grad():
        return x + noise - physics.A_dagger(physics.A(noise))
