r"""Backpropagation through a chain of bijections without keeping its activations.

    y = f_n(... f_1(x)),   logdet = sum_i logdet_i

    backward, for i = n .. 1, given  a_i = dL/dx_i  and  b = dL/dlogdet  (the same for every step, logdet being a sum):

        "inputs"   x_{i-1} was kept                      memory: one tensor per step
        "invert"   x_{i-1} = f_i^-1(x_i)                 memory: one tensor per chain
        (x_i, logdet_i) = f_i(x_{i-1}) is evaluated again, and autograd of this one step gives
        a_{i-1} = (df_i/dx)^T a_i + (dlogdet_i/dx)^T b
        dL/dw_i = (df_i/dw)^T a_i + (dlogdet_i/dw)^T b

Symbols: x_0 = x input, x_i output of step i, y = x_n, w_i parameters of step i, L loss. What autograd keeps inside a
step (the hidden layers of its net) lives for one step only, so that memory grows with n by one small tensor per step
or not at all. The inverse direction is the same with f_i^-1 for f_i and the order reversed. A pass costs one
evaluation of the chain more than plain autograd in mode "inputs", two in mode "invert".

References:
    Gomez et al. 2017, The reversible residual network: backpropagation without storing activations,
    https://arxiv.org/abs/1707.04585
    Chen et al. 2016, Training deep nets with sublinear memory cost, https://arxiv.org/abs/1604.06174
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from flowprox.flows.bijection import Bijection, NonFiniteError, Sequential

__all__ = ["DriftError", "Reversible"]

_UNDO = {"forward": "decode", "encode": "decode", "inverse": "encode", "decode": "encode"}


class DriftError(NonFiniteError):
    """A recomputed input differs from the one that was there; the gradient of that pass must not be used."""


class Reversible(Sequential):
    """``Sequential`` with memory-saving backpropagation: the same values, gradients and parameter names.

    Each call records a single autograd node. The node's backward is not differentiable itself
    (``once_differentiable``): for second derivatives use ``Sequential``, which loads the same ``state_dict``. Steps
    must be deterministic functions of their input and parameters (no dropout, no batch statistics); the exception is
    the data-dependent initialization of ActNorm, which happens before the recorded pass. The recomputation runs under
    the autocast state of the recorded pass and with the parameters of that pass; changing them in place in between
    raises the usual error of autograd.

    Drift guard: in mode "invert" every ``check_drift``-th recorded pass, the first included, keeps the chain's input
    and compares the recomputed one with it; they may differ by 1e-3 (1e-7 in float64, 0.1 under autocast, whose
    rounding amplifies) of the largest magnitude. Non-finite values are looked for in every backward pass on the CPU,
    and on other devices, where looking makes the host wait, in the guarded ones.

    References:
        Gomez et al. 2017, The reversible residual network, https://arxiv.org/abs/1707.04585

    Arguments:
        layers: bijections, applied left to right in ``forward``.
        recompute: "inputs" keeps the input of each step, "invert" only the output of the chain.
        check_drift: every how many passes the guard looks; True for each one, False for never.

    Raises:
        ValueError: an unknown ``recompute`` or a negative ``check_drift``.
        DriftError: (in backward) the step that is named cannot be inverted accurately enough.
        NonFiniteError: (in backward) the step and direction that are named gave NaN or infinity.

    Example:
        >>> from flowprox.flows import Conv1x1
        >>> f = Reversible([Conv1x1(4) for _ in range(3)], recompute="invert")
        >>> x = torch.rand(2, 4, 8, 8)
        >>> z, logdet = f(x)
        >>> (z.square().sum() - logdet.sum()).backward()
        >>> all(p.grad is not None for p in f.parameters())
        True
    """

    MODES: tuple[str, ...] = ("inputs", "invert")

    def __init__(self, layers: Iterable[Bijection], recompute: str = "inputs", check_drift: int = 100) -> None:
        super().__init__(layers)
        if recompute not in self.MODES:
            raise ValueError(f"recompute must be one of {', '.join(map(repr, self.MODES))}, got {recompute!r}")
        if check_drift < 0:
            raise ValueError(f"check_drift must be at least 0 (never), got {check_drift}")
        self.recompute = recompute
        self.check_drift = int(check_drift)
        self._n_recorded = 0
        self._initialization_pending = True

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self._initialize_once(x)
        return self._record("forward", x) or super().forward(x)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self._record("inverse", z) or super().inverse(z)

    def encode(self, x: Tensor) -> Tensor:
        self._initialize_once(x)
        recorded = self._record("encode", x)
        return super().encode(x) if recorded is None else recorded[0]

    def decode(self, z: Tensor) -> Tensor:
        recorded = self._record("decode", z)
        return super().decode(z) if recorded is None else recorded[0]

    def extra_repr(self) -> str:
        return f"recompute={self.recompute!r}, check_drift={self.check_drift}"

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._initialization_pending = True

    def _is_initialized(self) -> bool:
        """Whether no step waits for data; the buffers are read until that is known."""
        if self._initialization_pending:
            buffers = self.named_buffers()
            self._initialization_pending = any(n.endswith("initialized") and not bool(b) for n, b in buffers)
        return not self._initialization_pending

    @torch.no_grad()
    def _initialize_once(self, x: Tensor) -> None:
        """Let the steps initialize themselves from x in a pass of their own, so that recorded passes change nothing."""
        if self.training and not self._is_initialized():
            super().encode(x)

    def _record(self, method: str, x: Tensor) -> tuple[Any, ...] | None:
        """Apply ``method`` of every step as one autograd node, or give None where there is nothing to differentiate."""
        if not torch.is_grad_enabled() or not len(self.layers):
            return None
        backwards = method in ("inverse", "decode")
        steps: list[Any] = list(reversed(self.layers)) if backwards else list(self.layers)
        slots = [_parameter_slots(step) for step in steps]
        parameters = [[values[name] for values, name in part] for part in slots]
        trained = [any(p.requires_grad for p in part) for part in parameters]
        if not x.requires_grad and not any(trained):
            return None
        # an uninitialized step would take the recomputation by ``encode`` for its first data
        invert = self.recompute == "invert" and not (backwards and self.training and not self._is_initialized())
        guarded = bool(self.check_drift) and self._n_recorded % self.check_drift == 0
        self._n_recorded += 1
        chain = StepChain(
            steps=steps,
            slots=slots,
            method=method,
            first=0 if x.requires_grad else trained.index(True),
            invert=invert,
            guarded=guarded,
            autocast=AutocastState.current(x.device.type),
        )
        return _Recompute.apply(chain, x, *(p for part in parameters for p in part))


def _parameter_slots(module: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Where the parameters of a module are kept: (dictionary, name) pairs."""
    return [(m._parameters, name) for m in module.modules() for name, p in m._parameters.items() if p is not None]


@contextmanager
def _substituted(slots: Sequence[tuple[dict[str, Any], str]], tensors: Sequence[Tensor]) -> Iterator[None]:
    """Parameters replaced by ``tensors`` for a while."""
    originals = [values[name] for values, name in slots]
    try:
        for (values, name), tensor in zip(slots, tensors, strict=True):
            values[name] = tensor
        yield
    finally:
        for (values, name), tensor in zip(slots, originals, strict=True):
            values[name] = tensor


@dataclass(frozen=True)
class AutocastState:
    """The autocast state of a moment."""

    device_type: str
    enabled: bool
    dtype: torch.dtype | None

    @classmethod
    def current(cls, device_type: str) -> AutocastState:
        if not torch.amp.is_autocast_available(device_type):
            return cls(device_type, False, None)
        enabled = torch.is_autocast_enabled(device_type)
        return cls(device_type, enabled, torch.get_autocast_dtype(device_type) if enabled else None)

    def restored(self) -> AbstractContextManager[Any]:
        """That state again; without the cache of cast weights, which would hold the recomputation's own copies."""
        if not self.enabled and not AutocastState.current(self.device_type).enabled:
            return nullcontext()
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.enabled, cache_enabled=False)


@dataclass
class StepChain:
    """One recorded pass: the steps in the order in which they were applied, and how to go back."""

    steps: list[Any]
    slots: list[list[tuple[dict[str, Any], str]]]
    method: str
    first: int  # steps before this one have nothing to differentiate
    invert: bool
    guarded: bool
    autocast: AutocastState

    def apply(self, i: int, x: Tensor) -> tuple[Tensor, Tensor | None]:
        step = self.steps[i]
        if self.method == "forward":
            return step(x)
        out = getattr(step, self.method)(x)
        return out if self.method == "inverse" else (out, None)

    def undo(self, i: int, y: Tensor) -> Tensor:
        with torch.no_grad():
            return getattr(self.steps[i], _UNDO[self.method])(y)

    def run(self, x: Tensor) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """(output, logdet, tensors to keep)."""
        logdet = x.new_zeros(x.shape[0]) if self.method in ("forward", "inverse") else None
        kept = []
        for i in range(len(self.steps)):
            if i >= self.first and not self.invert:
                kept.append(x)
            elif i == self.first and self.guarded:
                kept.append(x)
            x, step_logdet = self.apply(i, x)
            if logdet is not None and step_logdet is not None:
                logdet = logdet + step_logdet
        return x, logdet, [*kept, x] if self.invert else kept

    def backward(
        self, kept: Sequence[Tensor], parameters: Sequence[Tensor], needs: Sequence[bool], grads: tuple[Tensor, ...]
    ) -> list[Tensor | None]:
        """Gradients of (input, *parameters) from those of (output, logdet)."""
        grad: Tensor | None = grads[0]
        parameter_grads: list[Tensor | None] = [None] * len(parameters)
        end, x = len(parameters), kept[-1]
        for i in reversed(range(self.first, len(self.steps))):
            start = end - len(self.slots[i])
            leaves = [parameters[j].detach().requires_grad_(needs[1 + j]) for j in range(start, end)]
            with _substituted(self.slots[i], leaves), self.autocast.restored():
                x = self.undo(i, x) if self.invert else kept[i - self.first]
                x = x.detach().requires_grad_(i > self.first or needs[0])
                with torch.enable_grad():
                    outputs = self.apply(i, x)
            if i == len(self.steps) - 1 and not self.invert:
                self.check_output(kept, outputs[0])
            found = _gradients(outputs, (grad, *grads[1:]), [x, *leaves])
            grad, parameter_grads[start:end] = found[0], found[1:]
            end = start
        if self.invert:
            self.check_input(x, kept)
        return [grad, *parameter_grads]

    def check_output(self, kept: Sequence[Tensor], y: Tensor) -> None:
        """Mode "inputs": what was finite in the recorded pass is finite now, so one look at the end is enough."""
        if (y.device.type == "cpu" or self.guarded) and not _is_finite(y):
            values = [*kept[1:], y]
            i = next(i for i, value in enumerate(values) if not _is_finite(value) or i == len(values) - 1)
            raise NonFiniteError(
                f"{self._name(self.first + i)} gave a non-finite value in its {self._direction}; {_REMEDY}"
            )

    def check_input(self, x: Tensor, kept: Sequence[Tensor]) -> None:
        """Mode "invert": NaN spreads through the steps undone after it, so one look at the end is enough."""
        if (x.device.type == "cpu" or self.guarded) and not _is_finite(x):
            x = kept[-1]
            for i in reversed(range(self.first, len(self.steps))):
                with self.autocast.restored():
                    x = self.undo(i, x)
                if not _is_finite(x):
                    raise NonFiniteError(
                        f"{self._name(i)} gave a non-finite value when its {self._direction} was undone; {_REMEDY}"
                    )
        if self.guarded and _deviation(x, kept[0]) > self._tolerance(x):
            with self.autocast.restored():
                self._name_drift(*kept)

    def _name_drift(self, x: Tensor, y: Tensor) -> None:
        """Go forward and back once more to find the step, and raise."""
        inputs = []
        with torch.no_grad():
            for i in range(self.first, len(self.steps)):
                inputs.append(x)
                x = self.apply(i, x)[0]
        deviation = 0.0
        for i in reversed(range(self.first, len(self.steps))):
            y = self.undo(i, y)
            deviation = _deviation(y, inputs[i - self.first])
            if deviation > self._tolerance(y):
                break
        raise DriftError(
            f"{self._name(i)}: its input in the {self._direction}, recomputed from its output, is off by "
            f"{deviation:.2g} of the largest magnitude, more than {self._tolerance(y):.0e}; "
            "use recompute='inputs' (backward='inputs') or a tighter bound on the log-scale"
        )

    def _tolerance(self, x: Tensor) -> float:
        if self.autocast.enabled or x.dtype in (torch.float16, torch.bfloat16):
            return 0.1
        return 1e-7 if x.dtype == torch.float64 else 1e-3

    @property
    def _direction(self) -> str:
        return "forward direction" if self.method in ("forward", "encode") else "inverse direction"

    def _name(self, i: int) -> str:
        position = i if self.method in ("forward", "encode") else len(self.steps) - 1 - i
        return f"layers.{position} ({type(self.steps[i]).__name__}) of a Reversible chain of {len(self.steps)}"


class _Recompute(torch.autograd.Function):
    """The autograd node of a recorded pass. Parameters are inputs: their gradients leave through autograd."""

    @staticmethod
    def forward(ctx: Any, chain: StepChain, x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        y, logdet, kept = chain.run(x)
        ctx.chain, ctx.n_kept = chain, len(kept)
        ctx.save_for_backward(*kept, *parameters)
        return (y,) if logdet is None else (y, logdet)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved, chain = ctx.saved_tensors, ctx.chain
        with replace(chain.autocast, enabled=False).restored():  # autocast is for forward passes only
            found = chain.backward(saved[: ctx.n_kept], saved[ctx.n_kept :], ctx.needs_input_grad[1:], grads)
        return None, *found


def _gradients(
    outputs: Sequence[Tensor | None], grads: Sequence[Tensor | None], inputs: Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradient with respect to each of ``inputs``; None for those that do not ask or do not matter."""
    used = [(y, g.to(y.dtype)) for y, g in zip(outputs, grads, strict=False) if y is not None and g is not None]
    used = [(y, g) for y, g in used if y.requires_grad]
    if not used:
        return [None] * len(inputs)
    values, value_grads = zip(*used, strict=True)
    wanted = [x for x in inputs if x.requires_grad]
    found = iter(torch.autograd.grad(values, wanted, value_grads, allow_unused=True))
    return [next(found) if x.requires_grad else None for x in inputs]


_REMEDY = "check the input for NaN, and train with a tighter bound on the log-scale or a smaller learning rate"


def _is_finite(x: Tensor) -> bool:
    return bool(torch.isfinite(x.sum()))


def _deviation(x: Tensor, reference: Tensor) -> float:
    """max |x - reference| relative to the largest magnitude, at least 1."""
    return float((x - reference).abs().max() / reference.abs().max().clamp(min=1))
