"""Compressed sensing with a flow prior: LatentMAP beside the published recipe, same flow, same measurements, one run.

    python benchmarks/compressed_sensing.py --images "../shared/data/glowip-celeba12" --m 2500

The published recipe (Asim et al. 2020, Appendix; their code) is torch's L-BFGS on all images at once, one history and one
step size for the batch: 30 steps with learning rate 0.1, each of 20 evaluations of objective and gradient, gamma = 0, z_0 = 0.
LatentMAP solves the same problem with as many images in the batch. Both go on in turns, a few evaluations each, so that a
busy machine is busy for both; times are sums over one's own turns. Printed is how long each needs to the PSNR that the
published recipe ends at, and to somewhat less. Its published code also computes the gradients of all weights, which nobody
uses: ``--weight-gradients`` does that too; by default they are spared for both, and both have the matrices kept.
"""

from __future__ import annotations

import argparse
import json
import platform
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from flowprox import __version__, load_model
from flowprox.data import ImageDataset
from flowprox.flows import Flow, frozen
from flowprox.metrics import psnr
from flowprox.operators import make_physics, measure_each
from flowprox.solvers import LBFGS
from flowprox.solvers.objective import Objective, squared_error
from flowprox.solvers.optimizers import Evaluate
from flowprox.solvers.problem import LatentProblem

Record = tuple[int, float, float]  # evaluations, seconds, mean PSNR


class Turns:
    """Two solvers in two threads, of which one works at a time."""

    def __init__(self) -> None:
        self.locks = [threading.Semaphore(1), threading.Semaphore(0)]
        self.running = [True, True]

    def take(self, who: int) -> None:
        self.locks[who].acquire()

    def give(self, who: int) -> None:
        self.locks[1 - who if self.running[1 - who] else who].release()

    def leave(self, who: int) -> None:
        self.running[who] = False
        self.locks[1 - who].release()


class Clock:
    """Counts evaluations and one's own seconds, and notes the PSNR of the iterate every few evaluations."""

    def __init__(
        self, who: int, turns: Turns, evaluate: Evaluate, quality: Callable[[Tensor], float], every: int
    ) -> None:
        self.who, self.turns, self.inner, self.quality, self.every = who, turns, evaluate, quality, every
        self.n, self.seconds, self.records = 0, 0.0, list[Record]()
        self.started = time.perf_counter()

    def evaluate(self, z: Tensor) -> tuple[Tensor, Tensor]:
        if self.n % self.every == 0:
            self.pause(z)
        self.n += 1
        return self.inner(z)

    def pause(self, z: Tensor) -> None:
        """Note where it stands, then let the other one work."""
        self.seconds += time.perf_counter() - self.started
        self.records.append((self.n, self.seconds, self.quality(z)))
        self.turns.give(self.who)
        self.turns.take(self.who)
        self.started = time.perf_counter()


def published(clock: Clock, z: Tensor, n_steps: int) -> None:
    """torch's L-BFGS, one history for the batch."""
    z = z.clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS([z], lr=0.1)

    def closure() -> Tensor:
        value, gradient = clock.evaluate(z)
        z.grad = gradient / len(z)
        return value.mean()

    for _ in range(n_steps):
        optimizer.step(closure)  # type: ignore[arg-type]
    clock.pause(z.detach())


def ours(clock: Clock, z: Tensor, n_evaluations: int) -> None:
    """L-BFGS of LatentMAP, every image by itself; a trial point of the line search stands in for the iterate."""
    trace = LBFGS(n_iterations=n_evaluations, max_evaluations=n_evaluations).minimize(clock.evaluate, z)
    clock.pause(trace.z)


def compare(
    flow: Flow, x: Tensor, m: int, n_steps: int, n_evaluations: int, seed: int, weight_gradients: bool
) -> dict[str, list[Record]]:
    """The records of both."""
    physics = make_physics("compressed-sensing", x.shape[1:], m=m, sigma=0.1 / m**0.5, seed=seed)  # type: ignore[arg-type]
    y = measure_each(x, physics, range(seed, seed + len(x)))
    problem = LatentProblem(flow, y, physics)
    evaluate = Objective(problem, squared_error, torch.zeros(len(x)), "unsquared")

    def with_weight_gradients(z: Tensor) -> tuple[Tensor, Tensor]:
        z = z.detach().requires_grad_(True)
        misfit = problem.residual(problem.decode(z)).square().sum(dim=1)
        gradients = torch.autograd.grad(misfit.sum(), [z, *flow.parameters()])
        return misfit.detach(), gradients[0]

    def quality(z: Tensor) -> float:
        with torch.no_grad():
            return float(psnr(problem.decode(z.detach()), x).mean())

    turns = Turns()
    z = torch.zeros(len(x), problem.dimension)
    clocks = [
        Clock(0, turns, with_weight_gradients if weight_gradients else evaluate, quality, 20),
        Clock(1, turns, evaluate, quality, 20),
    ]
    work = [lambda: published(clocks[0], z, n_steps), lambda: ours(clocks[1], z, n_evaluations)]
    with ExitStack() as stack:
        if not weight_gradients:
            stack.enter_context(frozen(flow))
        run_in_turns(turns, clocks, work)
    return {"published": clocks[0].records, "LatentMAP": clocks[1].records}


def run_in_turns(turns: Turns, clocks: list[Clock], work: list[Callable[[], None]]) -> None:
    failures: list[BaseException] = []

    def enter(who: int) -> None:
        turns.take(who)
        clocks[who].started = time.perf_counter()
        try:
            work[who]()
        except BaseException as error:
            failures.append(error)
        finally:
            turns.leave(who)

    threads = [threading.Thread(target=enter, args=(who,)) for who in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def time_to(records: list[Record], quality: float) -> Record | None:
    """The first record that is as good."""
    return next((record for record in records if record[2] >= quality), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="folder of images")
    parser.add_argument("--flow", default="glow-faces64")
    parser.add_argument("--m", type=int, default=2500, help="number of measurements")
    parser.add_argument("--n-steps", type=int, default=30, help="steps of the published recipe, 20 evaluations each")
    parser.add_argument("--n-evaluations", type=int, default=300, help="of LatentMAP")
    parser.add_argument("--n-images", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weight-gradients", action="store_true", help="as the published code")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", help="JSON file to write")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    flow = load_model(arguments.flow)
    images = ImageDataset(arguments.images, 64, limit=arguments.n_images)
    x = images.images.float() / 255
    records = compare(
        flow, x, arguments.m, arguments.n_steps, arguments.n_evaluations, arguments.seed, arguments.weight_gradients
    )
    end = records["published"][-1]
    for name, lines in records.items():
        for n, seconds, quality in lines:
            print(f"{name:10} {n:4} evaluations {seconds:7.1f} s {quality:6.2f} dB")
    print(
        f"published recipe: {end[2]:.2f} dB in {end[1]:.1f} s; LatentMAP ends at {records['LatentMAP'][-1][2]:.2f} dB"
    )
    for below in (0.0, 0.1, 0.5, 1.0, 2.0):
        both = [time_to(lines, end[2] - below) for lines in records.values()]
        if both[0] and both[1]:
            ratio = both[0][1] / both[1][1]
            print(f"{end[2] - below:6.2f} dB: {both[0][1]:.1f} s and {both[1][1]:.1f} s, {ratio:.1f} times faster")
    if arguments.out:
        machine = {"machine": platform.processor() or platform.machine(), "threads": arguments.threads}
        content = {
            "arguments": {k: v for k, v in vars(arguments).items() if k != "out"},
            "version": __version__,
            **machine,
            "records": records,
        }
        Path(arguments.out).write_text(json.dumps(content) + "\n")


if __name__ == "__main__":
    main()
