"""Peak of the memory that PyTorch allocates on the CPU, which has no counter of its own for it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

__all__ = ["peak_of_allocations"]


def peak_of_allocations(step: Callable[[], None]) -> int:
    """Highest running sum of PyTorch's CPU allocations and releases during ``step``, in bytes."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own notes on stderr
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    total = peak = 0
    for _, n_bytes in changes:
        total += n_bytes
        peak = max(peak, total)
    return peak
