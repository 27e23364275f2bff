"""The speed benchmark runs as a command, counts operations rightly and reports what is slower than the plain path."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flowprox.flows import Glow

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def test_command_writes_records_table_and_picture(tmp_path: Path) -> None:
    arguments = ["--preset", "tiny", "--image-size", "16", "--batch-size", "2", "--repeats", "1", "--guard", "0.001"]
    arguments += ["--contenders", "plain", "fast", "fast, bf16", "--out", str(tmp_path)]
    result = subprocess.run(
        [sys.executable, str(BENCHMARKS / "speed.py"), *arguments],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(BENCHMARKS.parent), "OMP_NUM_THREADS": "1"},
    )
    assert "the fast path is as fast as expected" in result.stdout
    first, *rows = [json.loads(line) for line in (tmp_path / "speed.jsonl").read_text().splitlines()]
    assert all(rate > 0 for rate in first["ceilings"].values())
    assert len(rows) == 7 * 3 and all(row["seconds_per_image"] > 0 for row in rows)
    assert all((row.get("peak_mib", 0) > 0) == row["task"].endswith("step") for row in rows)
    assert all(row["round_trip"] < (0.1 if row["bfloat16"] else 1e-5) for row in rows)
    assert (tmp_path / "speed.png").stat().st_size and "| reconstruction, batch |" in (
        tmp_path / "speed.md"
    ).read_text()


def test_operations_are_those_pytorch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    from contenders import PRESETS

    for preset in ("compact", "tiny"):
        a = PRESETS[preset]
        flow = Glow((3, 16, 16), len(a.n_steps), a.n_steps, a.hidden_channels, a.coupling, squeeze="pixels")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            flow.eval().encode(torch.rand(1, 3, 16, 16))
        counts = counter.get_flop_counts()["Global"]
        expected = sum(n for operation, n in counts.items() if "convolution" in str(operation))
        assert a.flops_per_pixel() * 256 == expected


def test_what_is_slower_than_plain_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    from speed_report import slower_than_plain

    rows = [{}] + [
        {"task": task, "contender": name, "seconds_per_image": seconds, "is_peer": False, "bfloat16": False}
        for task, plain, fast in (("forward", 1.0, 0.5), ("inverse", 1.0, 2.0))
        for name, seconds in (("plain", plain), ("fast", fast))
    ]
    (line,) = slower_than_plain(rows, 0.8)
    assert "inverse, 0.50 times" in line
