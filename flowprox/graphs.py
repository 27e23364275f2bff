"""Computations as graphs: what a model repeats is compiled, what is computed again and again is recorded and replayed.

Both are for GPUs, where the host cannot launch the many small kernels of a flow as fast as they are done.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

_T = TypeVar("_T")


def compile_regions(model: nn.Module, **options: Any) -> None:
    """Compile what a model repeats, in place: the parts with ``is_region``, steps of flows, blocks of a latent mean, plain
    networks.

    Each is one graph for all places where it is met with the same shapes, so that compiling takes seconds. ``options`` are
    those of ``torch.compile``. Names of parameters stay as they are, copies are not compiled.

    Example:
        >>> from flowprox.flows import Glow
        >>> flow, x = Glow((3, 8, 8), n_levels=1, n_steps=2, hidden_channels=4).eval(), torch.rand(1, 3, 8, 8)
        >>> z = flow.encode(x)
        >>> compile_regions(flow, backend="eager")
        >>> bool((flow.encode(x) - z).abs().max() < 1e-5)
        True
    """
    limits = torch._dynamo.config
    # one graph per level, direction, precision and mode; by default 8 of one function are kept
    limits.recompile_limit = max(limits.recompile_limit, 64)
    limits.optimize_ddp = False  # which cuts graphs at the ends of gradient buckets; a region holds none
    for module in list(model.modules()):
        if getattr(module, "is_region", False):
            module.compile(fullgraph=True, **options)


class HostReads(TorchDispatchMode):
    """Notes what makes the host wait for an accelerator: reading a value, copying to another device, results whose shape
    depends on values. A computation without them can be recorded as a CUDA graph; reading shows on the CPU too.

    Attributes:
        names: of the operations that were met.

    Example:
        >>> with HostReads() as reads:
        ...     _ = torch.ones(2).sum().item()
        >>> reads.names
        {'_local_scalar_dense'}
    """

    READS = "_local_scalar_dense item is_nonzero equal nonzero masked_select unique _unique2 bincount"

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, out = func.overloadpacket.__name__, func(*args, **(kwargs or {}))
        by_mask = name == "index" and any(t is not None and t.dtype == torch.bool for t in args[1])
        copies = name in ("_to_copy", "copy_") and out.device.type == "cpu"
        to_host = copies and any(isinstance(t, Tensor) and t.device.type != "cpu" for t in args)
        if name in self.READS.split() or by_mask or to_host:
            self.names.add(name)
        return out


class Replayed(Generic[_T]):
    """A function of one tensor whose kernels are recorded once, as a CUDA graph, and replayed: one launch for all of them.

    It may differentiate. What else it uses must stay at its place in memory, and what it does on the host, such as counting, is
    done while recording only. One graph is kept, for the last shape. On other devices than CUDA, and where ``HostReads`` finds
    that the function looks at values on the host, it is called each time.

    Arguments:
        function: tensor to a tensor, or to tuples of such.

    Attributes:
        refusal: why nothing is recorded, None where it is or could be.

    Example:
        >>> double = Replayed(lambda x: 2 * x)
        >>> double(torch.ones(2))
        tensor([2., 2.])
    """

    def __init__(self, function: Callable[[Tensor], _T]) -> None:
        self.function = function
        self.refusal: str | None = None
        self._graph: Any = None
        self._input: Tensor | None = None
        self._output: Any = None

    def __call__(self, x: Tensor) -> _T:
        """The function of x; the result is the caller's own."""
        if not x.is_cuda:
            self.refusal = f"CUDA graphs are for NVIDIA's GPUs, and this is on {x.device.type}"
        if self.refusal is not None:
            return self.function(x)
        if self._input is None or (self._input.shape, self._input.dtype) != (x.shape, x.dtype):
            with HostReads() as reads:  # this call also computes what is computed once
                result = self.function(x)
            if reads.names:
                self.refusal = f"the host waits for {', '.join(sorted(reads.names))}"
                return result
            with torch.cuda.device(x.device):
                self._input = x.detach().clone()
                stream = torch.cuda.Stream()
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):  # the plans of the libraries are not to be part of it
                    for _ in range(2):
                        self.function(self._input)
                torch.cuda.current_stream().wait_stream(stream)
                self._graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self._graph):
                    self._output = self.function(self._input)
        self._input.copy_(x)
        self._graph.replay()
        return tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, self._output)
