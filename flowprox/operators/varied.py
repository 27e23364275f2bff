"""Problems whose parameters are drawn anew for every image: what one network for many measurements is trained on.

    sigma       noise level, uniform                                          any problem with white noise
    mask_size   sides of a hidden rectangle, uniform, anywhere in the image   inpainting
    keep        fraction of the pixels that are seen, uniform                 random-inpainting, inpainting

Inpainting with both ``mask_size`` and ``keep`` hides a rectangle in one half of the images and single pixels in the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from deepinv.physics import Inpainting, LinearPhysics
from torch import Tensor

from flowprox.operators.kinds import ImageShape
from flowprox.operators.noise import SeededGaussianNoise
from flowprox.operators.problems import Problem, make_physics

__all__ = ["VariedProblem"]

_RANGES = {"inpainting": ("sigma", "mask_size", "keep"), "random-inpainting": ("sigma", "keep")}


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
        self.image_shape: Any = tuple(image_shape)
        self.ranges = {key: _checked(key, ends) for key, ends in ranges.items()}
        known = _RANGES.get(Problem(name).name, ("sigma",))
        for key in self.ranges:
            if key not in known:
                raise ValueError(f"{key} cannot vary in {name}; what can: {', '.join(known)}")
            if key in parameters:
                raise ValueError(f"{key} is both in parameters and in ranges; give it once")
            if key != "sigma" and "mask" in parameters:
                raise ValueError(f"{key} in ranges draws a mask for every image: leave the mask out of the parameters")
        if "noise" in parameters and "sigma" in self.ranges:
            raise ValueError("ranges of sigma are for white noise: leave out noise")
        _check_masks(self.ranges, self.image_shape)
        if self._masks_vary:  # a mask that fits images of any size stands in for those that are drawn
            parameters = {**parameters, "mask": torch.ones(self.image_shape[1:])}
        self._fixed = make_physics(name, self.image_shape, seed=seed, **parameters)

    def to(self, *args: Any, **kwargs: Any) -> VariedProblem:
        """As ``torch.nn.Module.to``."""
        self._fixed.to(*args, **kwargs)
        return self

    @property
    def _masks_vary(self) -> bool:
        return "mask_size" in self.ranges or "keep" in self.ranges

    def draw(self, n: int, generator: torch.Generator) -> LinearPhysics:
        """A physics for n images, on the generator's device, valid until the next is drawn: they share their fixed part."""
        physics = self._fixed
        if self._masks_vary:
            mask = self._masks(n, generator).expand(n, *self.image_shape).contiguous()
            noise = physics.noise_model
            physics = Inpainting(  # pyright: ignore[reportAbstractUsage]
                img_size=self.image_shape, mask=mask, device=generator.device, noise_model=noise
            )
        if "sigma" in self.ranges:
            physics.set_noise_model(SeededGaussianNoise(0.0).to(generator.device))
            physics.noise_model.update_parameters(sigma=self._uniform("sigma", n, generator))
        return physics

    def _uniform(self, key: str, n: int, generator: torch.Generator) -> Tensor:
        low, high = self.ranges[key]
        return low + (high - low) * torch.rand(n, generator=generator, device=generator.device)

    def _masks(self, n: int, generator: torch.Generator) -> Tensor:
        """(n, 1, H, W), 1 where a pixel is seen."""
        rectangles = self._rectangles(n, generator) if "mask_size" in self.ranges else None
        pixels = self._pixels(n, generator) if "keep" in self.ranges else None
        if rectangles is None or pixels is None:
            return pixels if rectangles is None else rectangles  # type: ignore[return-value]
        heads = torch.rand(n, 1, 1, 1, generator=generator, device=generator.device) < 0.5
        return torch.where(heads, rectangles, pixels)

    def _rectangles(self, n: int, generator: torch.Generator) -> Tensor:
        sides = []
        for length in self.image_shape[1:]:
            size = self._uniform("mask_size", n, generator).round()
            start = ((length - size + 1) * torch.rand(n, generator=generator, device=generator.device)).floor()
            at = torch.arange(length, device=generator.device)
            sides.append((at >= start[:, None]) & (at < (start + size)[:, None]))
        return 1.0 - (sides[0][:, None, :, None] & sides[1][:, None, None, :]).float()

    def _pixels(self, n: int, generator: torch.Generator) -> Tensor:
        keep = self._uniform("keep", n, generator).view(n, 1, 1, 1)
        return (torch.rand(n, 1, *self.image_shape[1:], generator=generator, device=generator.device) < keep).float()


def _checked(key: str, ends: Sequence[float]) -> tuple[float, float]:
    if isinstance(ends, str) or not isinstance(ends, Sequence) or len(ends) != 2 or not 0 <= ends[0] <= ends[1]:
        raise ValueError(f"the range of {key} must be two numbers, 0 <= low <= high; got {ends!r}")
    return float(ends[0]), float(ends[1])


def _check_masks(ranges: Mapping[str, tuple[float, float]], image_shape: Sequence[int]) -> None:
    if "mask_size" in ranges and not 1 <= ranges["mask_size"][0] <= ranges["mask_size"][1] < min(image_shape[1:]):
        raise ValueError(
            f"the range of mask_size must lie between 1 and the image's sides {image_shape[1:]}; got {ranges['mask_size']}"
        )
    if "keep" in ranges and not 0 < ranges["keep"][0] <= ranges["keep"][1] <= 1:
        raise ValueError(f"the range of keep must lie in (0, 1]; got {ranges['keep']}")
