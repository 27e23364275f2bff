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
from flowprox.prox import FlowProx
from flowprox.unfolding import UnfoldedPGD

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


def test_graphs_are_for_a_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    from speed import contenders_of, main

    assert main(["--preset", "tiny", "--contenders", "fast, graph", "--out", str(tmp_path / "out")]) == 2
    assert "leave ['fast, graph', 'fast, bf16, graph'] out of --contenders" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert contenders_of("likelihood step", ["fast", "fast, graph", "fast-early"]) == ["fast", "fast-early"]
    assert contenders_of("prox", ["fast", "fast, graph", "fast-early"]) == ["fast", "fast, graph"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are captured on a GPU")
def test_a_captured_graph_computes_what_was_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    from contenders import CONTENDERS, PRESETS
    from speed import Bench, captured

    for name in ("fast, graph", "fast, bf16, graph"):
        bench = Bench(CONTENDERS[name], PRESETS["tiny"], 16, 2, 4, torch.device("cuda"))
        with bench.prepared("reconstruction, batch"):
            found: list[torch.Tensor] = []
            replay = captured(
                lambda bench=bench, found=found: found.append(bench.task("reconstruction, batch")()), bench.device
            )
            bench.x.copy_(torch.rand_like(bench.x))
            replay()
            torch.testing.assert_close(found[-1], bench.task("reconstruction, batch")())


def test_operations_are_those_pytorch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    from contenders import PRESETS

    for preset in ("compact", "tiny"):
        a = PRESETS[preset]
        flow = Glow((3, 16, 16), len(a.n_steps), a.n_steps, a.hidden_channels, a.coupling, squeeze="pixels")
        with FlopCounterMode(display=False) as counter:  # with gradients: packed convolutions are not counted
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


def test_cost_on_a_gpu_is_counted_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu_cost

    with gpu_cost.as_on_a_gpu(), gpu_cost.Cost() as cost:
        a, b = torch.empty(4, 5, dtype=torch.bfloat16), torch.empty(5, 6, dtype=torch.bfloat16)
        (a @ b).view(24)
    assert dict(cost.kernels) == {"mm bfloat16": 1}
    assert cost.bytes["mm bfloat16"] == 2 * (20 + 30 + 24) and cost.operations["mm bfloat16"] == 2 * 4 * 5 * 6
    plain, default = (
        gpu_cost.cost_of(gpu_cost.contender(name, "tiny"), gpu_cost.likelihood(2)).summary()
        for name in ("plain, bf16", "default, bf16")
    )
    assert default["kernels"] < plain["kernels"] and default["GB"] < 1.05 * plain["GB"]
    assert plain["TFLOP"] <= default["TFLOP"] < 1.15 * plain["TFLOP"]  # a few channels of ones more, which are the bias
    model = UnfoldedPGD([FlowProx(Glow((3, 64, 64), 1, 1, 8))])
    assert 20 < gpu_cost.cost_of(lambda: model, gpu_cost.reconstruction(1)).summary()["kernels"] < 100
