"""What the machine can do at best: rates of the convolutions a flow is made of, and of a matrix product.

Rates are GFLOP/s (two operations per multiplication), the median of several calls, each long enough to time. Tensors are
channels-last and, at width 512, as large as one chunk of the fast path.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from timing import Stopwatch
from torch import Tensor

__all__ = ["measure_ceilings"]


def measure_ceilings(device: torch.device, width: int, repeats: int, clock: str) -> dict[str, float]:
    """GFLOP/s of "conv1x1", "conv3x3" and "matmul" in "float32" and "bfloat16", keys like "conv1x1 float32"."""
    images = 4 if device.type == "cpu" else 256
    rates = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        x = torch.randn(images, width, 32, 32, device=device, dtype=dtype).to(memory_format=torch.channels_last)
        for kind, size in (("conv1x1", 1), ("conv3x3", 3)):
            weight = torch.randn(width, width, size, size, device=device, dtype=dtype) / (width * size * size) ** 0.5
            weight = weight.to(memory_format=torch.channels_last)
            operations = 2.0 * images * 1024 * width * width * size * size
            rates[f"{kind} {name}"] = _rate(_convolution(x, weight), operations, repeats, device, clock)
        a = torch.randn(4 * width, 4 * width, device=device, dtype=dtype)
        rates[f"matmul {name}"] = _rate(_product(a), 2.0 * a.shape[0] ** 3, repeats, device, clock)
    return rates


def _convolution(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    return lambda: F.conv2d(x, weight, padding=weight.shape[-1] // 2)


def _product(a: Tensor) -> Callable[[], Tensor]:
    return lambda: a @ a


@torch.no_grad()
def _rate(call: Callable[[], Tensor], operations: float, repeats: int, device: torch.device, clock: str) -> float:
    """Median GFLOP/s over ``repeats`` timings of at least 50 ms each."""
    watch = Stopwatch(device, clock)
    call()
    once = max(watch.time(call), 1e-5)
    n = max(1, int(0.05 / once))

    def several() -> None:
        for _ in range(n):
            call()

    return operations * n / statistics.median(watch.time(several) for _ in range(repeats)) / 1e9
