"""A trained reconstruction network as one program for one operator, without flowprox.

    program = export_program(model, physics, y)       torch.export.ExportedProgram,   x_hat = program.module()(y)

The weights are fixed: matrices are inverted and scales folded beforehand, and the operator's constants (mask, kernel) are part
of the program. What ``torch.export.save`` writes is read by ``torch.export.load`` wherever PyTorch runs, and is what
ahead-of-time compilers take. Saving warns that a constant is not a "complete tensor" since the weights are channels-last;
what is loaded is the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from deepinv.models import Reconstructor
from deepinv.physics import Physics
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.func import functional_call

from flowprox.flows import frozen
from flowprox.naming import nearest
from flowprox.unfolding.networks import Unfolded


class _Reconstruction(nn.Module):
    """y -> x_hat for one operator, whose tensors become constants."""

    def __init__(self, model: Reconstructor, physics: Physics) -> None:
        super().__init__()
        self.model = model
        self.physics = physics

    def forward(self, y: Tensor) -> Tensor:
        return self.model(y, self.physics)


class _WithInputs(nn.Module):
    """(y, values of the operator's tensors) -> x_hat."""

    def __init__(self, reconstruction: _Reconstruction, names: list[str]) -> None:
        super().__init__()
        self.reconstruction = reconstruction
        self.names = names

    def forward(self, y: Tensor, *values: Tensor) -> Tensor:
        return functional_call(self.reconstruction, dict(zip(self.names, values, strict=True)), (y,))


def export_program(model: Reconstructor, physics: Physics, y: Tensor, inputs: Sequence[str] = ()) -> ExportedProgram:
    """Export a reconstruction network for measurements like y.

    Arguments:
        model: an ``UnfoldedPGD`` or ``UnfoldedHQS``, whose flows are initialized.
        physics: the operator that measured y.
        y: an example (B, ...), B at least 2. The program takes any batch size and measurements of this shape otherwise.
        inputs: tensors of the operator that the program takes after y, by name: "sigma", the noise's standard deviation (),
            "mask" (1, C, H, W). Without them they are constants.

    Raises:
        ValueError: the model is no unfolded network (solvers decide as they go, which no program can); y holds a single
            measurement, for which the batch size cannot be left open; the operator has no tensor of that name.

    Example:
        >>> from flowprox import Glow, FlowProx, UnfoldedPGD, make_physics
        >>> model = UnfoldedPGD([FlowProx(Glow((3, 16, 16), n_levels=1, n_steps=1, hidden_channels=4))]).eval()
        >>> physics = make_physics("denoising", (3, 16, 16), sigma=0.2)
        >>> y = physics(torch.rand(3, 3, 16, 16))
        >>> program = export_program(model, physics, y[:2])
        >>> with torch.no_grad():
        ...     bool((program.module()(y) - model(y, physics)).abs().max() < 1e-5)
        True
    """
    if not isinstance(model, Unfolded):
        raise ValueError(f"only unfolded networks can be exported; {type(model).__name__} decides as it goes")
    if len(y) < 2:
        raise ValueError("y must hold at least two measurements, so that the batch size can be left open; repeat it")
    tensors = {key.rpartition(".")[2]: key for key, _ in physics.named_buffers()}
    for name in inputs:
        if name not in tensors:
            raise ValueError(f"inputs: {type(physics).__name__} has no tensor {name!r}; {nearest(name, tensors)}")
    values = tuple(physics.get_buffer(tensors[name]) for name in inputs)
    reconstruction = _Reconstruction(model, physics)
    with torch.no_grad(), frozen(model):
        model(y, physics)  # whatever is computed once and kept is not to be part of the program
        batch = Dim("batch", min=1)
        if not inputs:
            return torch.export.export(reconstruction, (y,), dynamic_shapes=({0: batch},), strict=False)
        opened = _WithInputs(reconstruction, [f"physics.{tensors[name]}" for name in inputs])
        shapes = ({0: batch}, (None,) * len(values))
        return torch.export.export(opened, (y, *values), dynamic_shapes=shapes, strict=False)
