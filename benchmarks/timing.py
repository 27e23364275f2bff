"""One clock for CPU and GPU."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

__all__ = ["CLOCKS", "Stopwatch"]

CLOCKS = ("wall", "process")


class Stopwatch:
    """Times a call: "wall" seconds, or on the CPU "process" seconds over threads, which other programs disturb less.

    Arguments:
        device: a GPU is waited for before and after.
        clock: "wall" or "process"; a GPU has the former only.
    """

    def __init__(self, device: torch.device, clock: str = "wall") -> None:
        if clock not in CLOCKS:
            raise ValueError(f"clock must be one of {', '.join(CLOCKS)}; got {clock!r}")
        self.device = device
        self.on_gpu = device.type == "cuda"
        self.process = clock == "process" and not self.on_gpu

    def time(self, call: Callable[[], object]) -> float:
        """Seconds of one call."""
        start = self._now()
        call()
        return self._now() - start

    def _now(self) -> float:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)
        return time.process_time() / torch.get_num_threads() if self.process else time.perf_counter()
