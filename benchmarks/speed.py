"""Speed and memory of flows beside the peers and the machine's limit, in one run.

    OMP_NUM_THREADS=2 python benchmarks/speed.py --preset paper --batch-size 4 --out runs/speed-paper
    python benchmarks/speed.py --preset paper --device cuda --batch-size 128 --out runs/speed-gpu
    python benchmarks/speed.py --preset compact --only "likelihood step" --contenders plain fast FrEIA --repeats 9

Measured first: the ceilings, rates of convolutions and of a matrix product (``ceilings.py``). Then every task for every
contender (``contenders.py``: ours plain and fast, normflows, FrEIA), in turns within each repetition, so that whatever else the
machine does meets all of them alike; medians are reported. Tasks: "forward" and "inverse" with log-determinant and "prox"
(there and back), "likelihood step" (forward, backward), "four-fold step" (training step of a network of four flows),
"reconstruction, one image" and "reconstruction, batch" of that network. Without gradients our fast path runs inside
``frozen``, as in our solvers; on a GPU also replayed as a captured graph ("graph").

Operations are those of the convolutions, nominally three passes for a training step: what is recomputed counts as time, not
as work. "of ceiling" is the rate over that of the 1x1 convolution in the same precision. Memory is the peak of a training
step above weights and gradients, each contender in a process of its own on the CPU.

It writes ``speed.jsonl``, ``speed.md`` and ``speed.png``. Extra packages: ``pip install 'flowprox[bench]'``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from allocations import peak_of_allocations
from ceilings import measure_ceilings
from contenders import CONTENDERS, PRESETS, TRAINING_ONLY, Architecture, Contender
from speed_report import figure, slower_than_plain, table
from timing import CLOCKS, Stopwatch
from torch import Tensor, nn

from flowprox import __version__
from flowprox.files import atomic_write
from flowprox.flows import frozen

TASKS = {  # passes through one flow, per image
    "forward": 1,
    "inverse": 1,
    "prox": 2,
    "likelihood step": 3,
    "four-fold step": 24,
    "reconstruction, one image": 8,
    "reconstruction, batch": 8,
}
TRAINING = ("likelihood step", "four-fold step")
N_FOLDS = 4


class Bench:
    """One contender with its flows and inputs.

    Arguments:
        contender: who.
        n_folds: flows to make; the first one serves the tasks of a single flow.
    """

    def __init__(
        self,
        contender: Contender,
        architecture: Architecture,
        image_size: int,
        batch_size: int,
        n_folds: int,
        device: torch.device,
    ) -> None:
        torch.manual_seed(0)
        self.contender, self.device = contender, device
        self.x = torch.rand(batch_size, 3, image_size, image_size, device=device)
        self.flows = nn.ModuleList(contender.make(architecture, image_size) for _ in range(n_folds)).to(device)
        if contender.channels_last:
            self.x = self.x.contiguous(memory_format=torch.channels_last)
            self.flows.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        with torch.no_grad(), contender.precision(device.type):
            for flow in self.flows:
                flow(self.x)  # ActNorm initializes itself
                _shake(flow)
            self.z = self.flows[0](self.x)[0]

    def task(self, name: str) -> Callable[[], Any]:
        """What is timed."""
        return {
            "forward": lambda: self.flows[0](self.x),
            "inverse": lambda: self.flows[0].inverse(self.z),
            "prox": lambda: self.flows[0].prox(self.x, 0.05),
            "likelihood step": lambda: self._train(lambda: -self.flows[0].log_prob(self.x).mean() / self.x[0].numel()),
            "four-fold step": lambda: self._train(lambda: (self._reconstruct(self.x) - self.x).square().mean()),
            "reconstruction, one image": lambda: self._reconstruct(self.x[:1]),
            "reconstruction, batch": lambda: self._reconstruct(self.x),
        }[name]

    def _reconstruct(self, y: Tensor) -> Tensor:
        """Unfolded denoising: x + mu (y - x), then the prox."""
        x = torch.full_like(y, 0.5)
        for flow in self.flows:
            x = flow.prox(x + 0.5 * (y - x), 0.05)
        return x

    def _train(self, loss: Callable[[], Tensor]) -> None:
        for parameter in self.flows.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()
        with self.contender.precision(self.device.type):
            value = loss()
        value.backward()

    @contextmanager
    def prepared(self, name: str) -> Iterator[None]:
        """The mode a task runs in."""
        if name in TRAINING:
            self.flows.train()
            yield
            return
        self.flows.eval()
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(self.contender.precision(self.device.type))
            if self.contender.is_fast:
                stack.enter_context(frozen(self.flows))
            yield

    def round_trip(self) -> float:
        """max |g(f(x)) - x|."""
        with self.prepared("prox"):
            return float((self.flows[0].prox(self.x, 0.0) - self.x).abs().max())


@torch.no_grad()
def _shake(flow: nn.Module) -> None:
    """Move every convolution that is exactly zero, so that no net gives zeros; by little, so that the map stays invertible."""
    for parameter in flow.parameters():
        if parameter.ndim == 4 and not parameter.any():
            parameter.add_(0.001 * torch.randn_like(parameter))


def n_images(task: str, batch_size: int) -> int:
    return 1 if task == "reconstruction, one image" else batch_size


def contenders_of(task: str, names: Sequence[str]) -> list[str]:
    def takes_part(name: str) -> bool:
        return not CONTENDERS[name].captured if task in TRAINING else name not in TRAINING_ONLY

    return [name for name in names if takes_part(name)]


def captured(call: Callable[[], Any], device: torch.device) -> Callable[[], None]:
    """The kernels of a call as one CUDA graph: a single launch in the place of thousands."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what is computed once, and the libraries' plans, are not to be part of it
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
    return graph.replay


def time_all(options: argparse.Namespace, device: torch.device) -> dict[tuple[str, str], dict[str, Any]]:
    """Per (task, contender): seconds of every repetition, and the round trip."""
    architecture = PRESETS[options.preset]
    n_folds = N_FOLDS if any("fold" in t or "reconstruction" in t for t in options.only) else 1
    watch = Stopwatch(device, options.clock)
    size = (options.image_size, options.batch_size, n_folds, device)
    benches = {name: Bench(CONTENDERS[name], architecture, *size) for name in options.contenders}
    results: dict[tuple[str, str], dict[str, Any]] = {}
    for task in options.only:
        names = contenders_of(task, options.contenders)
        for name in names:
            results[task, name] = {"seconds": []}
        for repeat in range(options.repeats + 1):
            for name in names:
                bench = benches[name]
                with bench.prepared(task):
                    call = bench.task(task)
                    if CONTENDERS[name].captured:
                        call = captured(call, device)
                    if repeat == 0 or (CONTENDERS[name].is_fast and task not in TRAINING):
                        first = watch.time(
                            call
                        )  # it warms up, or compiles; inside ``frozen`` each fills what that keeps
                        results[task, name].setdefault("first_seconds", first)
                    if repeat:
                        results[task, name]["seconds"].append(watch.time(call))
                for parameter in bench.flows.parameters():
                    parameter.grad = None
        for name in names:
            seconds = statistics.median(results[task, name]["seconds"]) / n_images(task, options.batch_size)
            print(f"{task:26s} {name:20s} {1e3 * seconds:9.2f} ms per image", file=sys.stderr, flush=True)
    for (_, name), result in results.items():
        result["round_trip"] = benches[name].round_trip()
    return results


def peak_memory(arguments: tuple[str, str, argparse.Namespace]) -> int:
    """Bytes above weights and gradients in the second of two training steps."""
    task, name, options = arguments
    device = torch.device(options.device)
    n_folds = N_FOLDS if task == "four-fold step" else 1
    size = (options.image_size, options.batch_size, n_folds, device)
    bench = Bench(CONTENDERS[name], PRESETS[options.preset], *size)
    with bench.prepared(task):
        step = bench.task(task)
        step()
        if device.type == "cpu":
            return peak_of_allocations(step)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before


def all_peaks(options: argparse.Namespace) -> dict[tuple[str, str], int]:
    """Peak of every training task of every contender, each in a process of its own."""
    jobs = [
        (task, name, options)
        for task in options.only
        if task in TRAINING
        for name in contenders_of(task, options.contenders)
    ]
    if torch.device(options.device).type != "cpu":
        return {job[:2]: peak_memory(job) for job in jobs}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        return {job[:2]: peak for job, peak in zip(jobs, pool.imap(peak_memory, jobs, chunksize=1), strict=True)}


def records(options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """The ceilings, then one record per task and contender."""
    architecture = PRESETS[options.preset]
    ceilings = measure_ceilings(device, architecture.hidden_channels, max(5, options.repeats), options.clock)
    about = {
        "preset": options.preset,
        "image_size": options.image_size,
        "batch_size": options.batch_size,
        "clock": options.clock,
        "machine": machine(device),
        "torch": torch.__version__,
        "version": __version__,
    }
    results = time_all(options, device)
    peaks = {} if options.no_memory else all_peaks(options)
    per_pass = architecture.flops_per_pixel() * options.image_size**2
    rows = [{"ceilings": {key: round(rate, 1) for key, rate in ceilings.items()}, **about}]
    for (task, name), result in results.items():
        contender = CONTENDERS[name]
        seconds = statistics.median(result["seconds"]) / n_images(task, options.batch_size)
        rate = TASKS[task] * per_pass / seconds / 1e9
        ceiling = ceilings[f"conv1x1 {'bfloat16' if contender.bfloat16 else 'float32'}"]
        row = {
            "task": task,
            "contender": name,
            "is_peer": contender.is_peer,
            "bfloat16": contender.bfloat16,
            "seconds_per_image": seconds,
            "first_seconds": round(result["first_seconds"], 2),
            "repetitions": [round(s, 5) for s in result["seconds"]],
            "gflops": round(rate, 1),
            "of_ceiling": round(rate / ceiling, 3),
            "round_trip": result["round_trip"],
        }
        if (task, name) in peaks:
            row["peak_mib"] = round(peaks[task, name] / 2**20, 1)
        rows.append(row | about)
    return rows


def machine(device: torch.device) -> str:
    """What it ran on, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def run(options: argparse.Namespace) -> None:
    """Measure, write, print."""
    warnings.filterwarnings("ignore", message="torch.lu is deprecated")  # normflows
    out, device = Path(options.out), torch.device(options.device)
    graphs = [name for name, contender in CONTENDERS.items() if contender.captured]
    if device.type != "cuda" and set(options.contenders or []) & set(graphs):
        raise ValueError(f"graphs are captured on a GPU: leave {graphs} out of --contenders, or use --device cuda")
    options.contenders = options.contenders or [n for n in CONTENDERS if device.type == "cuda" or n not in graphs]
    out.mkdir(parents=True, exist_ok=True)
    rows = records(options, device)
    text = table(rows)
    with atomic_write(out / "speed.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    with atomic_write(out / "speed.md", "w") as file:
        file.write(text + "\n")
    figure(rows, out / "speed.png")
    print(text)
    if options.guard is not None:
        print(*slower_than_plain(rows, options.guard) or ["the fast path is as fast as expected"], sep="\n")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--preset", choices=list(PRESETS), default="paper")
    p.add_argument("--device", default="cpu")
    p.add_argument("--batch-size", type=int, default=4)
    p.add_argument("--image-size", type=int, default=64)
    p.add_argument("--only", nargs="+", choices=list(TASKS), default=list(TASKS), help="tasks")
    p.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), help="by default all that the device can run")
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--clock", choices=CLOCKS, default="wall", help="process: CPU seconds over threads")
    p.add_argument("--no-memory", action="store_true", help="skip the peaks of memory")
    p.add_argument(
        "--guard", type=float, help="report tasks in which fast has less than so many times the speed of plain"
    )
    p.add_argument("--out", default="runs/speed", help="folder of the results")
    return p


def main(arguments: list[str] | None = None) -> int:
    try:
        run(parser().parse_args(arguments))
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
