"""Problems whose parameters are drawn anew for every image: what one network for many measurements is trained on.

    sigma       noise level, uniform                                          any problem with white noise
    mask_size   sides of a hidden rectangle, uniform, anywhere in the image   inpainting
    keep        fraction of the pixels that are seen, uniform                 random-inpainting, inpainting

Inpainting with both ``mask_size`` and ``keep`` hides a rectangle in one half of the images and single pixels in the other.
Another operator says in ``ProblemKind.ranges`` what of it can vary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from deepinv.physics import LinearPhysics

from flowprox.noise import GaussianNoise
from flowprox.operators.kinds import PROBLEMS, ImageShape
from flowprox.operators.problems import Problem, make_physics, noise_of

__all__ = ["VariedProblem"]


class VariedProblem:
    """Draws operators: one physics for a batch, with parameters of its own for every image.

    Arguments:
        name: of a problem.
        image_shape: (C, H, W).
        ranges: parameter -> (low, high), see above; each is drawn uniformly and independently for every image.
        seed: of what is drawn once with the operator.
        parameters: the fixed ones.

    Raises:
        ValueError: an unknown problem or parameter, a parameter that cannot vary or is given twice, or a range that is none.

    Example:
        >>> problem = VariedProblem("denoising", (3, 8, 8), {"sigma": (0.0, 0.2)})
        >>> problem.draw(5, torch.Generator().manual_seed(0)).noise_model.sigma.shape
        torch.Size([5])
    """

    def __init__(
        self,
        name: str,
        image_shape: ImageShape,
        ranges: Mapping[str, Sequence[float]],
        *,
        seed: int = 0,
        **parameters: Any,
    ) -> None:
        channels, height, width = image_shape
        self.image_shape = (channels, height, width)
        self.problem, self.seed = Problem(name, parameters), seed
        self._kind = PROBLEMS[name]
        for key in ranges:
            known = ("sigma", *self._kind.ranges)
            if key not in known:
                raise ValueError(f"{key} cannot vary in {name}; what can: {', '.join(known)}")
            if key in parameters:
                raise ValueError(f"{key} is both in parameters and in ranges; give it once")
            if key != "sigma" and "mask" in parameters:
                raise ValueError(f"{key} in ranges draws a mask for every image: leave the mask out of the parameters")
        if "noise" in parameters and "sigma" in ranges:
            raise ValueError("ranges of sigma are for white noise: leave out noise")
        ends = {key: _checked(key, ends) for key, ends in ranges.items()}
        self._level = ends.pop("sigma", None)
        self._ranges = ends
        if ends:  # a range that is none is refused now
            self._fixed = self._varied(1, torch.Generator().manual_seed(0))
            self._fixed.set_noise_model(noise_of(self.problem, self._fixed, self.image_shape))
        else:
            self._fixed = make_physics(self.problem, self.image_shape, seed=seed)

    def to(self, *args: Any, **kwargs: Any) -> VariedProblem:
        """As ``torch.nn.Module.to``."""
        self._fixed.to(*args, **kwargs)
        return self

    def draw(self, n: int, generator: torch.Generator) -> LinearPhysics:
        """A physics for n images, on the generator's device, valid until the next is drawn: they share their fixed part."""
        physics = self._fixed
        if self._ranges:
            physics = self._varied(n, generator)
            physics.set_noise_model(self._fixed.noise_model)
        if self._level is not None:
            low, high = self._level
            noise = GaussianNoise(0.0).to(generator.device)
            noise.update_parameters(
                sigma=low + (high - low) * torch.rand(n, generator=generator, device=generator.device)
            )
            physics.set_noise_model(noise)
        return physics

    def _varied(self, n: int, generator: torch.Generator) -> LinearPhysics:
        if self._kind.vary is not None:
            return self._kind.vary(self._ranges, self.image_shape, n, generator)
        drawn = {
            key: low + (high - low) * torch.rand(n, generator=generator, device=generator.device)
            for key, (low, high) in self._ranges.items()
        }
        constructor, fixed = self._kind.constructor, self.problem.operator_parameters
        return constructor(self.image_shape, seed=self.seed, device=generator.device, **{**fixed, **drawn})  # pyright: ignore


def _checked(key: str, ends: Sequence[float]) -> tuple[float, float]:
    if isinstance(ends, str) or not isinstance(ends, Sequence) or len(ends) != 2 or not 0 <= ends[0] <= ends[1]:
        raise ValueError(f"the range of {key} must be two numbers, 0 <= low <= high; got {ends!r}")
    return float(ends[0]), float(ends[1])
