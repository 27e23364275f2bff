"""What a step would cost on a GPU, estimated without one.

    python benchmarks/gpu_cost.py                                   the table
    python benchmarks/gpu_cost.py --only "likelihood, paper" --kinds 12

A step runs on fake tensors, which have shapes and no values, so that it takes seconds. Every kernel is charged by the roofline
of an H100:

    seconds = max(operations / rate, bytes / bandwidth) + launch        bytes: all inputs and outputs of the kernel once

and the host ``HOST`` seconds per kernel; the step takes the longer of the two unless it is captured as a graph.

How far off it is (paper's Glow, batch 128, 64x64, likelihood step, version 0.1.0; measured on one H100 with torch 2.11):

                            estimated    measured    ratio
    plain float32             146 ms       232 ms     1.6
    plain bf16                 89          180        2.0
    fast bf16                  88          189        2.1
    fast-nothing bf16          74          193        2.6

Take bytes, kernels and ratios from it, and twice the seconds.

"compiled" is a guess on top of an estimate: the graphs of ``torch.compile`` are charged by the kernels that inductor's
scheduler makes of them, which fuses here as it does for a CPU.
"""

from __future__ import annotations

import argparse
import collections
import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from contenders import CONTENDERS, PRESETS
from torch import Tensor, fx, nn
from torch._functorch.aot_autograd import aot_function
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.ir import MultiOutput
from torch._inductor.scheduler import NopKernelSchedulerNode
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import flowprox
from flowprox.flows import GlowSteps, frozen
from flowprox.flows.fast import step_with_net

RATE = {torch.bfloat16: 500e12, torch.float32: 250e12, torch.float64: 30e12}
"""Operations per second; float32 stands for TF32 in the coupling nets' convolutions."""
BANDWIDTH, LAUNCH, HOST = 2.6e12, 3e-6, 8e-6  # bytes per second; seconds per kernel on the device and on the host
COUNTED_AS = {torch.ops.aten._addmm_activation: torch.ops.aten.addmm}
NO_KERNEL = frozenset(
    "device layout dtype size stride view _unsafe_view reshape expand permute transpose t slice select detach alias unsqueeze "
    "squeeze split chunk as_strided unbind diagonal narrow lift_fresh empty empty_like new_empty empty_strided _reshape_alias "
    "view_as unfold set_ is_same_size split_with_sizes new_empty_strided promote_types".split()
)


class Cost(TorchDispatchMode):
    """Seconds, kernels, bytes and operations of what runs inside, by kind of operation and dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: collections.Counter[str] = collections.Counter()
        self.kernels: collections.Counter[str] = collections.Counter()
        self.bytes: collections.Counter[str] = collections.Counter()
        self.operations: collections.Counter[str] = collections.Counter()
        self.is_paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func.overloadpacket
        if self.is_paused or packet.__name__ in NO_KERNEL:
            return out
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        n_bytes = sum(t.numel() * t.element_size() for t in tensors)
        counted = COUNTED_AS.get(packet, packet)
        operations = flop_registry[counted](*args, **kwargs, out_val=out) if counted in flop_registry else 0
        dtype = next(
            (t.dtype for t in tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point()), torch.float32
        )
        n_kernels = 1
        if packet.__name__ == "convolution" and args[2] is not None:  # the bias is added by a kernel of its own
            n_kernels, n_bytes = 2, n_bytes + 2 * out.numel() * out.element_size()
        elif packet.__name__ == "convolution_backward":  # data, weight and bias, as asked for; each reads the gradient
            n_kernels = sum(args[-1])
            n_bytes += (n_kernels - 1) * args[0].numel() * args[0].element_size()
        self.add(packet.__name__, dtype, n_kernels, n_bytes, operations)
        return out

    def add(self, name: str, dtype: torch.dtype, n_kernels: int, n_bytes: float, operations: float) -> None:
        """Charge one operation."""
        kind = f"{name} {str(dtype).removeprefix('torch.')}"
        roofline = max(operations / RATE.get(dtype, RATE[torch.float32]), n_bytes / BANDWIDTH)
        for counter, value in (
            (self.seconds, roofline + LAUNCH * n_kernels),
            (self.kernels, n_kernels),
            (self.bytes, n_bytes),
            (self.operations, operations),
        ):
            counter[kind] += value

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is charged within the block."""
        before, self.is_paused = self.is_paused, True
        try:
            yield
        finally:
            self.is_paused = before

    def summary(self) -> dict[str, float]:
        """Totals: milliseconds on the device and on the host, kernels, GB, TFLOP."""
        n = sum(self.kernels.values())
        return {
            "device, ms": 1e3 * sum(self.seconds.values()),
            "host, ms": 1e3 * HOST * n,
            "kernels": n,
            "GB": sum(self.bytes.values()) / 1e9,
            "TFLOP": sum(self.operations.values()) / 1e12,
        }


class Compiled:
    """A step of a flow as ``torch.compile`` would run it: traced with its backward pass, cut in two graphs, each fused."""

    def __init__(self, cost: Cost, mode: FakeTensorMode) -> None:
        self.cost, self.mode = cost, mode
        self.traced: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def __call__(self, method: str, bounds: Any, *tensors: Tensor) -> Any:
        key = (method, bounds, *((t.shape, t.dtype, t.requires_grad) for t in tensors))
        with self.cost.paused():
            if key not in self.traced:
                self.traced[key] = aot_function(
                    functools.partial(step_with_net, method, bounds),
                    fw_compiler=self._charged,
                    partition_fn=min_cut_rematerialization_partition,
                    decompositions=select_decomp_table(),
                )
            return self.traced[key](*tensors)

    def _charged(self, graph: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        """The graph, which charges the kernels that the scheduler has fused it to."""
        lowered, kernels = GraphLowering(graph, example_inputs=inputs), []
        debug = V.set_debug_handler(DebugContext())
        with (
            self.cost.paused(),
            debug,
            V.set_fake_mode(self.mode),
            V.set_graph_handler(lowered),
            V.set_extern_kernel_nodes([]),
        ):
            lowered.run(*inputs)
            lowered.init_wrapper_code()
            lowered._update_scheduler()
            for node in lowered.scheduler.nodes:
                if isinstance(node, NopKernelSchedulerNode) or isinstance(node.node, MultiOutput):
                    continue
                layout = next(iter(node.get_outputs())).node.layout
                dtype = layout.dtype if hasattr(layout, "dtype") else torch.bfloat16
                name, n_kernels, operations = "fused", 1, 0
                for origin in node.node.origins if node.is_extern() else ():
                    packet = COUNTED_AS.get(packet := getattr(origin.target, "overloadpacket", None), packet)
                    if packet in flop_registry:
                        values = [
                            part.meta["val"] if isinstance(part, fx.Node) else part for part in (*origin.args, origin)
                        ]
                        operations, name = flop_registry[packet](*values[:-1], out_val=values[-1]), packet.__name__
                        n_kernels = sum(origin.args[-1]) if name == "convolution_backward" else 1
                kernels.append((name, dtype, n_kernels, node.get_read_write_buffers_sizes(), operations))

        def run(*arguments: Tensor) -> Any:
            for kernel in kernels:
                self.cost.add(*kernel)
            with self.cost.paused():
                return graph(*arguments)

        return run


@contextmanager
def as_on_a_gpu() -> Iterator[FakeTensorMode]:
    """Fake tensors, which say they are on the CPU since autograd has no threads for a GPU that is not there; the flows are told
    that they are on an accelerator."""
    with ExitStack() as stack:
        for module in ("fast", "layers", "conditioners"):
            stack.enter_context(mock.patch(f"flowprox.flows.{module}.on_cpu", lambda _: False))
        stack.enter_context(mock.patch("flowprox.flows.conditioners._can_pack", lambda _: False))
        stack.enter_context(mock.patch("flowprox.flows.flow.check_finite", lambda value, *_: value))
        yield stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))


def faked(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """The model with shapes in the place of its weights."""
    for module in model.modules():
        if hasattr(module, "_initialization_pending"):
            module._initialization_pending = False  # type: ignore[assignment]
        if module._buffers.pop("data_dep_init_done", None) is not None:  # normflows' ActNorm reads it in every pass
            module.data_dep_init_done = True  # type: ignore[assignment]
        for values in (module._parameters, module._buffers):
            for name, value in values.items():
                if value is not None:
                    values[name] = mode.from_tensor(value)
    return model


Task = Callable[[nn.Module, FakeTensorMode], Cost]


def likelihood(batch: int, size: int = 64, bfloat16: bool = True, compiled: bool = False) -> Task:
    """Forward and backward of the mean negative log-likelihood."""

    def step(model: nn.Module, mode: FakeTensorMode) -> Cost:
        x = mode.from_tensor(torch.rand(batch, 3, size, size))
        with Cost() as cost:
            for steps in model.modules() if compiled else ():
                if isinstance(steps, GlowSteps):
                    steps._compiled = Compiled(cost, mode)
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                loss = -model.train().log_prob(x).mean() / x[0].numel()  # type: ignore[operator]
            loss.backward()
        return cost

    return step


def reconstruction(batch: int, size: int = 64) -> Task:
    """Denoising by an unfolded network; float32, weights held."""

    def step(model: nn.Module, mode: FakeTensorMode) -> Cost:
        y = mode.from_tensor(torch.rand(batch, 3, size, size))
        physics = flowprox.make_physics("denoising", (3, size, size), sigma=0.1)
        with torch.no_grad(), frozen(model.eval()):
            model(y, physics)  # what is computed once
            with Cost() as cost:
                model(y, physics)
        return cost

    return step


def contender(name: str, preset: str) -> Callable[[], nn.Module]:
    return lambda: CONTENDERS[name].make(PRESETS[preset], 64)


CASES: dict[str, tuple[Callable[[], nn.Module], Task]] = {
    "likelihood, paper, plain float32": (contender("plain", "paper"), likelihood(128, bfloat16=False)),
    **{
        f"likelihood, {preset}, compiled, bf16": (contender("default", preset), likelihood(128, compiled=True))
        for preset in ("paper", "compact")
    },
    **{
        f"likelihood, {preset}, {name}": (contender(name, preset), likelihood(128))
        for preset in ("paper", "compact")
        for name in (
            "plain, bf16",
            "default, bf16",
            "fast-nothing, bf16",
            "fast, bf16",
            "normflows, bf16",
            "FrEIA, bf16",
        )
    },
    **{
        f"one image, {name}": (lambda name=name: flowprox.load_model(name), reconstruction(1))
        for name in ("unfolded-denoising-faces64", "unfolded-denoising-natural")
    },
}


def cost_of(make: Callable[[], nn.Module], task: Task) -> Cost:
    """The cost of a task for a model."""
    model = make()
    with as_on_a_gpu() as mode:
        return task(faked(model, mode), mode)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument(
        "--kinds", type=int, default=0, help="so many kinds of operation below each case, dearest first"
    )
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    for name, case in CASES.items():
        if options.only not in name:
            continue
        try:
            cost = cost_of(*case)
        except ImportError as error:
            print(f"{name:45s} left out: {error}")
            continue
        print(f"{name:45s}", *(f"{value:9.4g} {key}" for key, value in cost.summary().items()), flush=True)
        for kind, seconds in cost.seconds.most_common(options.kinds):
            print(
                f"    {kind:41s} {1e3 * seconds:9.4g} ms {cost.kernels[kind]:6d} kernels {cost.bytes[kind] / 1e9:9.4g} GB "
                f"{cost.operations[kind] / 1e12:9.4g} TFLOP"
            )


if __name__ == "__main__":
    main()
