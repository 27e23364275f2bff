"""A flow with its weights held fixed: what solvers run hundreds of times and differentiate by image or latent only.

Inside the block it is in evaluation mode, no parameter asks for a gradient, so that autograd computes none for the weights
(a third of the work of a backward pass), and every Glow step keeps its two 1x1 matrices, which otherwise are put together
from their factors and inverted in every pass. They are computed in float64 and rounded once: the round trip gains half a
digit. On the CPU the convolutions' weights are laid out channels-last meanwhile, which is an eighth faster.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from flowprox.flows.layers import GlowStep

__all__ = ["frozen"]


@contextmanager
def frozen(flow: nn.Module) -> Iterator[None]:
    """Hold the weights of a flow fixed within the block; everything is as before when it ends. Blocks may be nested.

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
    wanted = [parameter for parameter in flow.parameters() if parameter.requires_grad]
    steps = [step for step in flow.modules() if isinstance(step, GlowStep) and step.fixed is None]
    convolutions = [
        module for module in flow.modules() if isinstance(module, nn.Conv2d) and module.weight.device.type == "cpu"
    ]
    weights = [convolution.weight.data for convolution in convolutions]
    in_training = [module for module in flow.modules() if module.training]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        flow.eval()
        for convolution in convolutions:
            convolution.weight.data = convolution.weight.data.contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            for step in steps:
                step.fixed = step.matrices()
        yield
    finally:
        for convolution, weight in zip(convolutions, weights, strict=True):
            convolution.weight.data = weight
        for module in in_training:
            module.training = True
        for step in steps:
            step.fixed = None
        for parameter in wanted:
            parameter.requires_grad_(True)
