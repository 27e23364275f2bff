"""Memory of one training step against depth and folds, for plain and recomputing backpropagation.

    python benchmarks/memory.py --out runs/memory
    python benchmarks/memory.py --device cuda --image-size 64 --hidden-channels 512 --batch-size 16 --out runs/memory-gpu

"depth": one likelihood step of a one-level Glow of K steps. "folds": one MSE step of an unfolded network of untied
flows. Each configuration runs in a process of its own. A first step initializes and allocates the gradients; in the second the
peak above the memory held before it is taken: activations, and gradients on their way to the parameters, without weights
and their gradients. On the CPU it is the running sum of PyTorch's own allocation events (temporary buffers of oneDNN are
not among them; the process's peak resident set stands beside it), on a GPU ``torch.cuda.max_memory_allocated``.
"Seconds" is the fastest of a few unprofiled steps: process time over threads on the CPU, wall time on a GPU.

It writes ``memory.jsonl`` and ``memory.png`` and prints a table.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from allocations import peak_of_allocations
from torch import Tensor

from flowprox import __version__
from flowprox.files import atomic_write
from flowprox.flows import Glow
from flowprox.operators import make_physics
from flowprox.prox import FlowProx
from flowprox.unfolding import UnfoldedPGD

MODES = ("plain", "inputs", "invert", "fast-nothing", "fast-inputs", "fast-invert")
_MIB = 2**20


@dataclass(frozen=True)
class Configuration:
    """One point of the figure."""

    study: str  # "depth" or "folds"
    mode: str
    n_steps: int
    n_folds: int
    image_size: int
    hidden_channels: int
    batch_size: int
    device: str


def training_step(c: Configuration) -> tuple[Callable[[], Tensor], torch.nn.Module]:
    """(loss, model)."""
    torch.manual_seed(0)
    shape = (3, c.image_size, c.image_size)
    x = torch.rand(c.batch_size, *shape, device=c.device)
    if c.study == "depth":
        flow = Glow(shape, 1, c.n_steps, c.hidden_channels, backward=c.mode).to(c.device)
        flow.initialize(x)
        return lambda: flow.bits_per_dimension(x).mean(), flow
    flows = [Glow(shape, 3, c.n_steps, c.hidden_channels, backward=c.mode) for _ in range(c.n_folds)]
    model = UnfoldedPGD([FlowProx(flow) for flow in flows]).to(c.device)
    for flow in flows:
        flow.initialize(x)
    physics = make_physics("denoising", shape, device=c.device)
    y = x + 0.2 * torch.randn_like(x)
    return lambda: (model(y, physics) - x).square().mean(), model


def measure(c: Configuration, repeats: int = 3) -> dict[str, Any]:
    """Peak memory and time of one training step."""
    loss, model = training_step(c)
    on_gpu = torch.device(c.device).type == "cuda"

    def step() -> None:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()
        loss().backward()

    step()
    seconds = []
    for _ in range(repeats):
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter() if on_gpu else time.process_time()
        step()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start if on_gpu else time.process_time() - start)
    if on_gpu:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        peak = torch.cuda.max_memory_allocated() - before
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # before the profiler takes memory of its own
    if not on_gpu:
        peak = peak_of_allocations(step)
    threads = 1 if on_gpu else torch.get_num_threads()
    return {
        **asdict(c),
        "peak_mib": round(peak / _MIB, 2),
        "weights_mib": round(sum(p.numel() * p.element_size() for p in model.parameters()) / _MIB, 2),
        "resident_mib": round(resident / _MIB, 1),
        "seconds": round(min(seconds) / threads, 4),
        "machine": torch.cuda.get_device_name() if on_gpu else f"{platform.machine()}, {threads} threads",
        "torch": torch.__version__,
        "version": __version__,
    }


def configurations(options: argparse.Namespace) -> list[Configuration]:
    """All points of both studies."""
    common = (options.image_size, options.hidden_channels, options.batch_size, options.device)
    depth = [Configuration("depth", mode, n, 1, *common) for n in options.depths for mode in MODES]
    folds = [Configuration("folds", mode, options.fold_steps, n, *common) for n in options.folds for mode in MODES]
    return depth + folds


def table(results: list[dict[str, Any]], study: str, axis: str) -> str:
    """Markdown: one row per value of ``axis``, memory and time per mode."""
    rows = [
        f"| {axis} | " + " | ".join(f"{mode}, MiB" for mode in MODES) + " | " + " | ".join(f"{m}, s" for m in MODES)
    ]
    rows = [rows[0] + " |", "|" + "---|" * (1 + 2 * len(MODES))]
    found = {(r[axis], r["mode"]): r for r in results if r["study"] == study}
    for value in sorted({value for value, _ in found}):
        memory = [f"{found[value, mode]['peak_mib']:.1f}" for mode in MODES]
        seconds = [f"{found[value, mode]['seconds']:.3f}" for mode in MODES]
        rows.append("| " + " | ".join([str(value), *memory, *seconds]) + " |")
    return "\n".join(rows)


def figure(results: list[dict[str, Any]], path: Path) -> None:
    """Two panels, memory against depth and against folds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(9, 3.6), constrained_layout=True)
    panels = [("depth", "n_steps", "steps of one level"), ("folds", "n_folds", "folds")]
    for axis, (study, key, label) in zip(axes, panels, strict=True):
        for mode, marker in zip(MODES, "os^vDx", strict=True):
            points = sorted((r[key], r["peak_mib"]) for r in results if r["study"] == study and r["mode"] == mode)
            if points:
                axis.plot(*zip(*points, strict=True), marker=marker, label=mode)
        axis.set(xlabel=label, ylabel="peak of a training step, MiB", ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend(title="backward")
    with atomic_write(path) as file:
        fig.savefig(file, format="png", dpi=150)
    plt.close(fig)


def run(options: argparse.Namespace) -> None:
    """Measure, print, write."""
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    results = []
    # a forked process has the imports but none of the memory of the configurations before it
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    with multiprocessing.get_context(method).Pool(1, maxtasksperchild=1) as pool:
        for r in pool.imap(measure, configurations(options), chunksize=1):
            at = f"{r['n_steps']:3d} steps, {r['n_folds']} folds, {r['mode']:6s}"
            print(f"{r['study']}: {at}: {r['peak_mib']:8.1f} MiB {r['seconds']:.3f} s", file=sys.stderr, flush=True)
            results.append(r)
    with atomic_write(out / "memory.jsonl", "w") as file:
        file.writelines(json.dumps(r) + "\n" for r in results)
    figure(results, out / "memory.png")
    print(table(results, "depth", "n_steps"), table(results, "folds", "n_folds"), sep="\n\n")
    print(f"\n{results[0]['machine']}; wrote {out / 'memory.jsonl'} and {out / 'memory.png'}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[6, 12, 24, 48], help="steps of the one level")
    parser.add_argument("--folds", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--fold-steps", type=int, default=4, help="steps per level (of three) of each fold's flow")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--hidden-channels", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", default="runs/memory", help="folder for memory.jsonl and memory.png")
    try:
        run(parser.parse_args(arguments))
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
