r"""Pictures too large for memory through a network, tile by tile.

    x_hat = sum_t w_t D(y_t, A_t) / sum_t w_t

Symbols: y_t the part of the measurement y in tile t, A_t the operator there, D network, w_t weights (H, W): 1 in the middle
of a tile, falling to 0 within the overlap with the next one, where a network does not see far enough.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from itertools import product

import torch
from deepinv.models import Reconstructor
from deepinv.physics import Denoising, Inpainting, LinearPhysics, NoiseModel, Physics
from torch import Tensor, nn

from flowprox.flows import frozen
from flowprox.operators import fit_to_divisor


class Tiled(Reconstructor):
    """A network applied to pictures of any size, large ones in tiles that overlap, and gray ones to a network of color.

    Memory is that of one tile and of a few copies of the picture. Tiles are for operators that act on each pixel alone:
    denoising with one noise level, and inpainting. What another operator measured is passed on whole.

    Arguments:
        model: ``x_hat = model(y, physics)``, images (B, C, H, W).
        tile: side of a tile in pixels, a multiple of the model's divisor; pictures of more than tile x tile pixels are
            computed in tiles. 0: never.
        overlap: of two tiles, in pixels; the outer quarter of it is thrown away, and the tiles are faded over within.

    Raises:
        ValueError: a tile that the divisor does not divide, or not larger than twice the overlap.

    Example:
        >>> from deepinv.models import ArtifactRemoval, MedianFilter
        >>> from flowprox.operators import make_physics
        >>> model = ArtifactRemoval(MedianFilter(3))
        >>> y, physics = torch.rand(1, 3, 40, 70), make_physics("denoising", (3, 40, 70))
        >>> torch.allclose(Tiled(model, tile=32, overlap=8)(y, physics), model(y, physics))
        True
    """

    def __init__(self, model: Reconstructor, tile: int = 1024, overlap: int = 64) -> None:
        super().__init__()
        self.divisor = int(getattr(model, "divisor", 1))
        if tile and (tile % self.divisor or overlap % self.divisor or not 0 <= 2 * overlap < tile):
            form = f"a multiple of {self.divisor} and more than twice the overlap, another multiple, or 0"
            raise ValueError(f"tile must be {form}; got tile {tile} and overlap {overlap}")
        self.model, self.tile, self.overlap = model, tile, overlap
        self.levels = getattr(model, "levels", None)
        self.n_channels = next((n for part in model.modules() if (n := getattr(part, "n_channels", None))), None)

    def forward(  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]
        self, y: Tensor, physics: LinearPhysics, callback: Callable[[int, int], None] | None = None
    ) -> Tensor:
        """x_hat (B, C, H, W); ``callback`` is called after every tile with their number so far and in all."""
        is_local = isinstance(physics, Denoising | Inpainting)
        if is_local and y.shape[1] == 1 and self.n_channels not in (None, 1):
            return self(y.expand(-1, self.n_channels, -1, -1), physics, callback).mean(1, keepdim=True)
        if not is_local or not self.tile or y.shape[-2] * y.shape[-1] <= self.tile**2:
            return self.model(y, physics)
        fitted = fit_to_divisor(y, physics, self.divisor)
        is_fixed = not self.model.training and not torch.is_grad_enabled()
        with frozen(self.model) if is_fixed else nullcontext():
            x_hat = self._assembled(fitted.y, fitted.physics, callback)
        return x_hat[..., fitted.rows, fitted.columns]

    def _assembled(
        self, y: Tensor, physics: LinearPhysics, callback: Callable[[int, int], None] | None = None
    ) -> Tensor:
        """The whole from its tiles, for sides that the model takes."""
        x_hat, total = torch.zeros_like(y), y.new_zeros(y.shape[-2:])
        places = list(product(*(_places(side, self.tile, self.overlap) for side in y.shape[-2:])))
        for i, (rows, columns) in enumerate(places):
            part = self.model(y[..., rows, columns].contiguous(), _part(physics, rows, columns))
            ends = ((rows, y.shape[-2]), (columns, y.shape[-1]))
            down, across = (_weights(where, side, self.overlap).to(y) for where, side in ends)
            weights = down[:, None] * across
            x_hat[..., rows, columns] += weights * part
            total[rows, columns] += weights
            if callback is not None:
                callback(i + 1, len(places))
        return x_hat.div_(total)


def _places(side: int, tile: int, overlap: int) -> list[slice]:
    """Where the tiles stand on an axis; the last one ends with it."""
    starts = range(0, max(side - overlap, 1), tile - overlap)
    return [slice(start, start + min(tile, side)) for start in (max(0, min(s, side - tile)) for s in starts)]


def _weights(where: slice, side: int, overlap: int) -> Tensor:
    """w along an axis (n,): rising from 0 to 1 in the middle half of the overlap, but 1 at the picture's own border."""
    n = where.stop - where.start
    rise = ((torch.arange(n) + 0.5 - overlap / 4) / (overlap / 2 or 1)).clamp(0, 1)
    first = torch.ones(n) if where.start == 0 else rise
    return first if where.stop == side else torch.minimum(first, rise.flip(0))


def _part(physics: Physics, rows: slice, columns: slice) -> Physics:
    """The operator in a tile."""
    if not isinstance(physics, Inpainting):
        return physics
    mask, noise = physics.get_buffer("mask")[..., rows, columns], physics.noise_model
    assert isinstance(noise, NoiseModel | nn.Module)
    return Inpainting(img_size=mask.shape[-3:], mask=mask, device=mask.device, noise_model=noise)  # pyright: ignore
