"""What a call costs: seconds on the clock, and the most memory in use meanwhile."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["Cost", "measured_cost"]

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Cost:
    """Filled when the block ends.

    Arguments:
        seconds: on the clock, the device's queue emptied.
        peak_memory_mib: on a GPU, of its tensors; on the CPU, of the whole process, weights and libraries included.
            None where the system does not tell.
    """

    seconds: float = 0.0
    peak_memory_mib: float | None = None


@contextmanager
def measured_cost(device: str | torch.device) -> Iterator[Cost]:
    """Measure the block.

    Example:
        >>> with measured_cost("cpu") as cost:
        ...     _ = torch.zeros(10)
        >>> cost.seconds >= 0
        True
    """
    target = torch.device(device)
    on_gpu = target.type == "cuda"
    cost = Cost()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(target)
        torch.cuda.synchronize(target)
    else:
        _forget_peak()
    start = time.perf_counter()
    yield cost
    if on_gpu:
        torch.cuda.synchronize(target)
    cost.seconds = time.perf_counter() - start
    cost.peak_memory_mib = torch.cuda.max_memory_allocated(target) / 2**20 if on_gpu else _peak()


def _forget_peak() -> None:
    """Linux keeps a high-water mark that can be set back; elsewhere it stays that of the whole run."""
    if sys.platform == "linux":
        try:
            _RESET.write_text("5")
        except OSError:  # not allowed in some containers: the mark then includes earlier methods
            return


def _peak() -> float | None:
    if sys.platform == "linux" and (found := re.search(r"VmHWM:\s*(\d+) kB", _STATUS.read_text())):
        return int(found[1]) / 1024
    return None
