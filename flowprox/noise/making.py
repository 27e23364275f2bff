"""Noise by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flowprox.naming import nearest
from flowprox.noise.base import Noise
from flowprox.noise.digits import MNISTNoise
from flowprox.noise.gaussian import GaussianNoise, radial_noise, sinusoidal_noise

__all__ = ["NOISES", "make_noise"]


def _gaussian(shape: Sequence[int], sigma: float = 0.1, mean: float = 0.0) -> Noise:
    return GaussianNoise(sigma, mean)


def _mnist(
    shape: Sequence[int],
    path: str | None = None,
    n_digits: int = 3,
    amplitude: float = 1.0,
    sigma: float = 0.05,
    split: str = "test",
) -> Noise:
    if path is None:
        raise ValueError("mnist noise needs path: MNIST's image file, such as t10k-images-idx3-ubyte.gz")
    return MNISTNoise(path, n_digits, amplitude, sigma, split)  # type: ignore[arg-type]


NOISES: Mapping[str, Callable[..., Noise]] = {
    "gaussian": _gaussian,
    "sinusoidal": sinusoidal_noise,
    "radial": radial_noise,
    "mnist": _mnist,
}
"""Noise name -> what makes it from a shape and parameters; ``sigma`` is a standard deviation in each."""


def make_noise(name: str, shape: Sequence[int], **parameters: Any) -> Noise:
    """Build a noise.

    Arguments:
        name: "gaussian" (sigma, mean), "sinusoidal" (sigma, period, mean), "radial" (sigma, length, floor, mean) or
            "mnist" (path, n_digits, amplitude, sigma, split). Every sigma is a standard deviation: of white noise; the
            largest of all entries; that in the center; that of the white noise under the digits.
        shape: of the measurement without its batch axis, (C, H, W) or (m,).
        parameters: of the noise, see ``GaussianNoise``, ``sinusoidal_noise``, ``radial_noise`` and ``MNISTNoise``.

    Raises:
        ValueError: unknown name or parameter, or a value that does not fit; the message offers the nearest ones.
        FileNotFoundError: the file of the digits does not exist.

    Example:
        >>> make_noise("radial", (3, 64, 64), sigma=0.5).scale.max().item()
        0.5
    """
    if name not in NOISES:
        raise ValueError(f"unknown noise {name!r}; {nearest(name, NOISES)}")
    known = [key for key in inspect.signature(NOISES[name]).parameters if key != "shape"]
    for key in parameters:
        if key not in known:
            raise ValueError(f"{name} noise has no parameter {key!r}; {nearest(key, known)}")
    return NOISES[name](shape, **parameters)
