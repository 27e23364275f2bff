"""All that waits for a GPU, in one run of at most six minutes on an H100: it writes one Markdown table.

    sh benchmarks/gpu_check.sh                        on a GPU
    sh benchmarks/gpu_check.sh --miniature            the same on a CPU with tiny sizes: whether the script runs, no figures

Tests marked "gpu"; exactness; the likelihood step beside the peers; one image as it comes and replayed as a CUDA graph; a
solver; training throughput of three networks through the real training loop. Sections that no longer fit the time are left
out, and the table says so. Extra packages: ``pip install 'flowprox[bench]'``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from contenders import CONTENDERS, PRESETS
from speed import Bench, machine
from timing import Stopwatch
from torch import Tensor, nn

import flowprox
from flowprox.data import save_image
from flowprox.files import atomic_write
from flowprox.flows import Flow, Glow, frozen
from flowprox.graphs import Replayed
from flowprox.options import DataOptions, ProblemOptions, TrainingOptions, UnfoldedOptions
from flowprox.prox import FlowProx
from flowprox.solvers import LBFGS, LatentMAP
from flowprox.training import train_unfolded
from flowprox.training.loop import Callback, listening
from flowprox.unfolding import UnfoldedPGD

Row = tuple[str, str, str]  # what, its figure, the aim
ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    preset: str = "paper"
    image: int = 64
    batch: int = 128
    repeats: int = 5
    steps: int = 60
    solver_images: int = 12
    measurements: int = 1000
    iterations: int = 200


MINIATURE = Sizes("tiny", 16, 2, 1, 6, 2, 50, 2)


def tests(device: torch.device, sizes: Sizes) -> Iterator[Row]:
    """Those that are marked."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-o",
        "addopts=",
        "-m",
        "gpu",
        "tests/flows",
        "tests/solvers",
        "tests/test_training.py",
    ]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    yield "tests marked gpu", run.stdout.strip().splitlines()[-1].strip("= "), "all pass"


def exactness(device: torch.device, sizes: Sizes) -> Iterator[Row]:
    """After a few training steps, and against the CPU."""
    torch.manual_seed(0)
    flow = Glow.compact((3, sizes.image, sizes.image)).to(device)
    optimizer = torch.optim.Adam(flow.parameters(), lr=2e-3)
    for _ in range(sizes.steps):
        optimizer.zero_grad()
        x = nn.functional.interpolate(torch.rand(sizes.batch, 3, 4, 4, device=device), (sizes.image, sizes.image))
        flow.bits_per_dimension(x + torch.rand_like(x) / 256).mean().backward()
        optimizer.step()
    with torch.no_grad():
        yield "round trip after training", f"{float((flow.eval().decode(flow.encode(x)) - x).abs().max()):.1e}", "1e-4"
        y = torch.rand(4, 3, 64, 64)
        outputs = []
        for place in (torch.device("cpu"), device):
            physics = flowprox.make_physics("denoising", (3, 64, 64), sigma=0.1, device=place)
            outputs.append(flowprox.load_model("unfolded-denoising-faces64", place)(y.to(place), physics).cpu())
        yield "shipped denoiser, off the CPU by", f"{float((outputs[0] - outputs[1]).abs().max()):.1e}", "1e-4"


def likelihood(device: torch.device, sizes: Sizes) -> Iterator[Row]:
    """A step of each contender, milliseconds per image."""
    names = ("plain", "default, bf16", "fast, bf16", "compiled, bf16", "FrEIA, bf16", "normflows, bf16")
    for name in names if device.type == "cuda" else names[:3]:
        try:
            bench = Bench(CONTENDERS[name], PRESETS[sizes.preset], sizes.image, sizes.batch, 1, device)
        except ImportError as error:
            yield f"likelihood step, {name}", f"left out: {error}", ""
            continue
        with bench.prepared("likelihood step"):
            seconds = _median(bench.task("likelihood step"), device, sizes.repeats) / sizes.batch
        aim = "0.45; FrEIA 0.85" if name == "compiled, bf16" else ""
        yield f"likelihood step, {name}, ms per image", f"{1e3 * seconds:.2f}", aim


def one_image(device: torch.device, sizes: Sizes) -> Iterator[Row]:
    """Latency of a reconstruction."""
    physics = flowprox.make_physics("denoising", (3, 64, 64), sigma=0.1, device=device)
    models: dict[str, Callable[[], nn.Module]] = {
        "compact": lambda: flowprox.load_model("unfolded-denoising-faces64", device)
    }
    if device.type == "cuda":
        models["paper's four folds"] = lambda: UnfoldedPGD([FlowProx(Glow.paper()) for _ in range(4)]).to(device).eval()
    for name, make in models.items():
        aim = "2" if name == "compact" else "8"
        for how, seconds in _latencies(make(), physics, device, sizes.repeats).items():
            yield f"one image, {name}, {how}, ms", f"{1e3 * seconds:.1f}", aim if how == "replayed" else ""


@torch.no_grad()
def _latencies(model: nn.Module, physics: Any, device: torch.device, repeats: int) -> dict[str, float]:
    y = torch.rand(1, 3, 64, 64, device=device)
    replayed = Replayed(lambda y: model(y, physics))
    with frozen(model):
        return {
            "as it comes": _median(lambda: model(y, physics), device, repeats),
            "replayed": _median(lambda: replayed(y), device, repeats),
        }


class _Clock(Callback):
    """Seconds of the steps in the second half of a run."""

    def __init__(self, device: torch.device, n: int) -> None:
        self.device, self.n, self.times = device, n, []

    def on_step(self, step: int, loss: Tensor, model: nn.Module) -> None:
        if step in (self.n // 2, self.n):
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            self.times.append(time.perf_counter())


def training(device: torch.device, sizes: Sizes) -> Iterator[Row]:
    """Images per second of three networks, as the training loop runs them."""
    shape = {"squeeze": "haar", "shift_bound": 4.0}
    compact: dict[str, Any] = {"n_levels": 3, "n_steps": [4, 4, 4], "hidden_channels": [32, 64, 64], **shape}
    wide: dict[str, Any] = {"n_levels": 3, "n_steps": [8, 8, 8], "hidden_channels": [96, 192, 192], **shape}
    networks: dict[str, tuple[dict[str, Any], int, str]] = {
        "compact": (
            {"flow": compact, "latent_mean": {"hidden_channels": [64, 128, 128], "n_blocks": 2}, "n_folds": 1},
            256,
            "",
        ),
        "7.5 M": (
            {"flow": wide, "latent_mean": {"hidden_channels": [192, 384, 384], "n_blocks": 3}, "n_folds": 1},
            256,
            "6,000",
        ),
        "paper's four folds": ({"flow": "paper", "n_folds": 4}, 64, "250"),
    }
    ways = {"as it is": {}, "cuda_graph": {"cuda_graph": True}, "compile": {"compile": True}}
    ways["compile, cuda_graph"] = {"compile": True, "cuda_graph": True}
    if device.type != "cuda":
        networks, ways = {"compact": networks["compact"]}, {"cuda_graph": ways["cuda_graph"]}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "images").mkdir()
        for i in range(256 if device.type == "cuda" else 8):
            save_image(torch.rand(3, sizes.image, sizes.image), Path(folder) / f"images/{i}.png")
        data = DataOptions(f"{folder}/images", f"{folder}/images", image_size=sizes.image)
        for name, (model, batch, aim) in networks.items():
            batch = batch if device.type == "cuda" else 2
            for way, changes in ways.items():
                options = TrainingOptions(
                    batch,
                    max_steps=sizes.steps,
                    precision="bf16",
                    channels_last=True,
                    progress=False,
                    validate_every=10**6,
                    n_validation_images=8,
                    accelerator=device.type,
                    checkpoint_every=1e9,
                    **changes,
                )
                clock, out = _Clock(device, sizes.steps), f"{folder}/{name}-{way}"
                model_options, problem = UnfoldedOptions(**model), ProblemOptions("denoising", {"sigma": 0.2})
                with listening(clock), contextlib.redirect_stdout(io.StringIO()) as said:
                    train_unfolded(model_options, problem, data, options, out)
                rate = batch * (sizes.steps - sizes.steps // 2) / (clock.times[1] - clock.times[0])
                yield f"training, {name}, {way}, images per second", f"{rate:,.0f} {said.getvalue().strip()}", aim


def _with_mean(n_steps: int, widths: list[int], mean_widths: list[int]) -> dict[str, Any]:
    """One fold whose flow shrinks towards a predicted mean, as in recipes/gpu/mean.yaml."""
    arguments = {"n_levels": 3, "n_steps": n_steps, "hidden_channels": widths, "squeeze": "haar", "shift_bound": 4.0}
    latent_mean = {"hidden_channels": mean_widths, "n_blocks": n_steps // 4 + 1}
    return {"flow": {"kind": "Glow", "arguments": arguments}, "latent_mean": latent_mean, "n_folds": 1}


def solvers(device: torch.device, sizes: Sizes) -> Iterator[Row]:
    """LatentMAP with its default optimizer on compressed sensing."""
    flow = flowprox.load_model("glow-faces64", device)
    assert isinstance(flow, Flow)
    x = flow.sample(sizes.solver_images, 0.7, generator=torch.Generator(device).manual_seed(0))
    physics = flowprox.make_physics("compressed-sensing", (3, 64, 64), m=sizes.measurements, device=device)
    y, solver = physics(x), LatentMAP(flow, optimizer=LBFGS(sizes.iterations))
    seconds = _median(lambda: solver(y, physics), device, 1)
    yield f"LatentMAP, {sizes.solver_images} images, m = {sizes.measurements}, s", f"{seconds:.2f}", "1.5"


def _median(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Seconds; the first three calls warm up."""
    watch = Stopwatch(device)
    for _ in range(3 if repeats > 1 else 1):
        call()
    return statistics.median(watch.time(call) for _ in range(repeats))


def main() -> int:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--miniature", action="store_true", help="on the CPU, tiny")
    parser.add_argument("--seconds", type=float, default=340.0, help="no section begins after this")
    parser.add_argument("--out", default="runs/gpu-check.md", help="the table")
    options = parser.parse_args()
    if not options.miniature and not torch.cuda.is_available():
        print("error: no CUDA device; --miniature runs on the CPU", file=sys.stderr)
        return 2
    warnings.filterwarnings("ignore")
    device = torch.device("cpu" if options.miniature else "cuda")
    about = f"{machine(device)}, torch {torch.__version__}, flowprox {flowprox.__version__}"
    lines = [
        f"{'MINIATURE, no figures: ' if options.miniature else ''}{about}",
        "",
        "| | measured | aim |",
        "|---|---|---|",
    ]
    started = time.monotonic()
    for section in (tests, exactness, likelihood, one_image, solvers, training):
        begun = time.monotonic()
        if begun - started > options.seconds:
            lines.append(f"| {section.__name__} | left out: the time was up | |")
            continue
        for row in section(device, MINIATURE if options.miniature else Sizes()):
            lines.append(f"| {' | '.join(row)} |")
            print(lines[-1], flush=True)
            Path(options.out).parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(options.out, "w") as file:
                file.write("\n".join(lines) + "\n")
        print(f"{section.__name__}: {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
