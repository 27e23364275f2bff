"""A model with its weights held fixed: what reconstructs, and what solvers run hundreds of times and differentiate by image or
latent only. Autograd computes no gradients of weights, a third of a backward pass, and Glow steps run on the fast path also
where they are differentiated (``flowprox.flows.fast``), with matrices from float64, which gains half a digit of the round trip.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.utils import parametrize

from flowprox.flows.fast import GlowSteps, all_modules

_LOCK = threading.RLock()
_HELD: WeakKeyDictionary[nn.Module, tuple[int, ExitStack | None]] = WeakKeyDictionary()


@contextmanager
def frozen(flow: nn.Module) -> Iterator[None]:
    """Hold the weights of a flow, or of a model with flows, fixed within the block; everything is as before when it ends.

    Blocks may be nested. Gradients with respect to images and latents flow as usual, second derivatives do not. The block keeps
    a second copy of the coupling nets' weights and, on the CPU, a third and a fourth for the shapes of the last two batches.

    Arguments:
        flow: any module. Its weights must not be changed inside the block.

    Example:
        >>> from flowprox.flows import Glow
        >>> flow = Glow(image_shape=(3, 8, 8), n_levels=1, n_steps=1, hidden_channels=4)
        >>> x = torch.rand(1, 3, 8, 8)
        >>> with frozen(flow):
        ...     z = flow.encode(x)
        >>> z.requires_grad, flow.encode(x).requires_grad
        (False, True)
    """
    with _LOCK:  # several threads may reconstruct with one model: the first prepares it, the last restores it
        count, stack = _HELD.get(flow, (0, None))
        _HELD[flow] = (count + 1, _prepare(flow) if stack is None else stack)
    try:
        yield
    finally:
        with _LOCK:
            count, stack = _HELD.pop(flow)
            if count > 1:
                _HELD[flow] = (count - 1, stack)
            elif stack is not None:
                stack.close()


def _prepare(flow: nn.Module) -> ExitStack:
    """Fix everything; closing the stack undoes it."""
    modules = all_modules(flow)
    chains = [module for module in modules if isinstance(module, GlowSteps)]
    in_training = [module for module in modules if module.training]
    parameters = [p for module in modules for p in module._parameters.values() if p is not None and p.requires_grad]
    with ExitStack() as stack:
        stack.callback(_restore, parameters, in_training, chains)
        for parameter in parameters:
            parameter.requires_grad_(False)
        for module in in_training:
            module.training = False
        for chain in chains:
            chain.freeze(True)
        on_the_fast_path = {module for chain in chains if chain.has_fast_path for module in all_modules(chain)}
        for module in modules:
            if not isinstance(module, nn.Conv2d) or module in on_the_fast_path or parametrize.is_parametrized(module):
                continue  # a parametrized weight is made anew by every access
            if module.weight.device.type == "cpu":
                stack.callback(setattr, module.weight, "data", module.weight.data)
                module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
        return stack.pop_all()


def _restore(parameters: list[nn.Parameter], in_training: list[nn.Module], chains: list[GlowSteps]) -> None:
    for module in in_training:
        module.training = True
    for parameter in parameters:
        parameter.requires_grad_(True)
    for chain in chains:
        chain.freeze(False)
