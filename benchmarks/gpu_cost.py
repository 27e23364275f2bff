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
"""

from __future__ import annotations

import argparse
import collections
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from contenders import CONTENDERS, PRESETS
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import flowprox
from flowprox.flows import frozen

RATE = {torch.bfloat16: 500e12, torch.float32: 250e12, torch.float64: 30e12}
"""Operations per second; float32 stands for TF32 in the coupling nets' convolutions."""
BANDWIDTH, LAUNCH, HOST = 2.6e12, 3e-6, 8e-6  # bytes per second; seconds per kernel on the device and on the host
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

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func.overloadpacket
        if packet.__name__ in NO_KERNEL:
            return out
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        n_bytes = sum(t.numel() * t.element_size() for t in tensors)
        operations = flop_registry[packet](*args, **kwargs, out_val=out) if packet in flop_registry else 0
        dtype = next(
            (t.dtype for t in tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point()), torch.float32
        )
        n_kernels = 1
        if packet.__name__ == "convolution" and args[2] is not None:  # the bias is added by a kernel of its own
            n_kernels, n_bytes = 2, n_bytes + 2 * out.numel() * out.element_size()
        elif packet.__name__ == "convolution_backward":  # data, weight and bias, as asked for; each reads the gradient
            n_kernels = sum(args[-1])
            n_bytes += (n_kernels - 1) * args[0].numel() * args[0].element_size()
        kind = f"{packet.__name__} {str(dtype).removeprefix('torch.')}"
        roofline = max(operations / RATE.get(dtype, RATE[torch.float32]), n_bytes / BANDWIDTH)
        for counter, value in (
            (self.seconds, roofline + LAUNCH * n_kernels),
            (self.kernels, n_kernels),
            (self.bytes, n_bytes),
            (self.operations, operations),
        ):
            counter[kind] += value
        return out

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


@contextmanager
def as_on_a_gpu() -> Iterator[FakeTensorMode]:
    """Fake tensors, which say they are on the CPU since autograd has no threads for a GPU that is not there; the flows are told
    that they are on an accelerator."""
    with ExitStack() as stack:
        for module in ("fast", "layers", "conditioners"):
            stack.enter_context(mock.patch(f"flowprox.flows.{module}.on_cpu", lambda _: False))
        stack.enter_context(mock.patch("flowprox.flows.packed._can_pack", lambda _: False))
        stack.enter_context(mock.patch("flowprox.flows.flow.check_finite", lambda value, *_: value))
        yield stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))


def faked(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """The model with shapes in the place of its weights."""
    for module in model.modules():
        if hasattr(module, "_initialization_pending"):
            module._initialization_pending = False  # type: ignore[assignment]
        for values in (module._parameters, module._buffers):
            for name, value in values.items():
                if value is not None:
                    values[name] = mode.from_tensor(value)
    return model


Task = Callable[[nn.Module, FakeTensorMode], Cost]


def likelihood(batch: int, size: int = 64, bfloat16: bool = True) -> Task:
    """Forward and backward of the mean negative log-likelihood."""

    def step(model: nn.Module, mode: FakeTensorMode) -> Cost:
        x = mode.from_tensor(torch.rand(batch, 3, size, size))
        with Cost() as cost:
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
