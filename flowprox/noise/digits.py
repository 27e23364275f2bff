r"""Handwritten digits at random places and in random color channels, over a little white noise.

    n = sum_j digit_j placed at (row_j, column_j) in channel_j  +  sigma u,    u ~ N(0, I)

Digits alone have no density; with the white noise the sum has one, which a flow can learn. MNIST's file does not ship.
"""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from flowprox.naming import require_choice, require_count
from flowprox.noise.base import Generators, Noise, at_least_zero, generator_each, standard_normal


class MNISTNoise(Noise):
    """MNIST digits on top of an image. It can be drawn; for its density train a flow on it.

    The digits of a file are kept apart by their number: the last one of each ten is for "test", the one before for
    "validation", the others for "train", so that a flow is trained on other digits than those it is tested with.

    References:
        Whang et al. 2021, Solving inverse problems with a flow-based noise model, https://arxiv.org/abs/2003.08089,
        Sec. 5.1.1; they tell neither the number of digits nor how the density was made proper
        LeCun, Cortes and Burges 1998, The MNIST database, http://yann.lecun.com/exdb/mnist/

    Arguments:
        path: images in MNIST's idx format, gzipped or not, such as t10k-images-idx3-ubyte.gz.
        n_digits: how many in an image; each falls anywhere inside it, in any channel. Where they overlap they add up.
        amplitude: value of a white pixel of a digit, in the units of the measurement.
        sigma: standard deviation of the white noise.
        split: "train", "validation", "test", or "all".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no idx file of images, or a number is out of range.
    """

    has_density = False
    digits: Tensor
    sigma: Tensor
    amplitude: Tensor

    def __init__(
        self,
        path: str | Path,
        n_digits: int = 3,
        amplitude: float = 1.0,
        sigma: float = 0.05,
        split: Literal["train", "validation", "test", "all"] = "test",
    ) -> None:
        super().__init__()
        require_count("n_digits", n_digits)
        self.n_digits = n_digits
        self.register_buffer("amplitude", torch.tensor(float(amplitude)))
        self.register_buffer("sigma", torch.tensor(at_least_zero("sigma", sigma)))
        # not in the state: files of models and of physics must not carry the digits along
        all_digits = _read_idx(Path(path))
        rest = torch.arange(len(all_digits)) % 10
        chosen = {"train": rest < 8, "validation": rest == 8, "test": rest == 9, "all": rest >= 0}
        require_choice("split", split, chosen)
        self.register_buffer("digits", all_digits[chosen[split]], persistent=False)

    def sample_like(self, y: Tensor, generator: Generators = None) -> Tensor:
        """Digits and white noise of y's shape (B, C, H, W); ValueError for no image, or one smaller than a digit."""
        height, width = self.digits.shape[-2:]
        if y.ndim != 4 or y.shape[-2] < height or y.shape[-1] < width:
            size = f"images (B, C, H, W) of at least that size, got {tuple(y.shape)}"
            raise ValueError(f"digits of {height}x{width} need {size}")
        places = torch.stack([self._draw(y, g) for g in generator_each(y, generator)])
        white = standard_normal(y, generator)
        noise = torch.zeros(y.shape, dtype=y.dtype, device=y.device)
        digits = self.digits.to(y.device)
        for image, placed in zip(noise, places.tolist(), strict=True):
            for index, row, column, channel in placed:
                image[channel, row : row + height, column : column + width] += digits[index].to(y.dtype)
        amplitude, sigma = (value.to(y)[(..., None, None, None)] for value in (self.amplitude, self.sigma))
        return amplitude / 255 * noise + sigma * white

    def log_prob(self, residual: Tensor) -> Tensor:
        """Digit noise has no density that can be written down: a ValueError tells what to use."""
        remedy = 'use a flow trained on it: load_model("noise-mnist64")'
        raise ValueError(f"digit noise has no closed-form density; {remedy}")

    def _draw(self, y: Tensor, generator: torch.Generator) -> Tensor:
        """Digit, row, column and channel of each digit of one image, (n_digits, 4) integers."""
        n_digits, height, width = self.digits.shape
        limits = (n_digits, y.shape[-2] - height + 1, y.shape[-1] - width + 1, y.shape[1])
        size, device = (self.n_digits,), generator.device
        return torch.stack([torch.randint(n, size, generator=generator, device=device) for n in limits], 1).cpu()


def _read_idx(path: Path) -> Tensor:
    """The images of an idx file, uint8 (N, H, W)."""
    if not path.is_file():
        raise FileNotFoundError(f"path: no file {str(path)!r}; give MNIST's images, such as t10k-images-idx3-ubyte.gz")
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError) as error:
            raise ValueError(f"path: {str(path)!r} is damaged ({error}); fetch it again") from error
    kind, *sizes = struct.unpack(">4I", content[:16]) if len(content) >= 16 else (0, 0, 0, 0)
    n, height, width = sizes
    if kind != 0x0803 or len(content) != 16 + n * height * width or n < 10:
        raise ValueError(f"path: {str(path)!r} is no idx file of at least ten images; give MNIST's image file")
    return torch.frombuffer(bytearray(content[16:]), dtype=torch.uint8).view(n, height, width)
