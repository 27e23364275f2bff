r"""Backpropagation through a chain of bijections without keeping its activations.

    y = f_n(... f_1(x)),   logdet = sum_i logdet_i

    backward, for i = n .. 1, given  a_i = dL/dx_i  and  b = dL/dlogdet  (the same for every step, logdet being a sum):

        "inputs"   x_{i-1} was kept                      memory: one tensor per step    (torch.utils.checkpoint)
        "invert"   x_{i-1} = f_i^-1(x_i)                 memory: one tensor per chain
        (x_i, logdet_i) = f_i(x_{i-1}) is evaluated again, and autograd of this one step gives
        a_{i-1} = (df_i/dx)^T a_i + (dlogdet_i/dx)^T b
        dL/dw_i = (df_i/dw)^T a_i + (dlogdet_i/dw)^T b

Symbols: x_0 = x input, x_i output of step i, y = x_n, w_i parameters of step i, L loss. The inverse direction is the same with
f_i^-1 for f_i and the order reversed. A pass costs one evaluation of the chain more than plain autograd in mode "inputs", two
in mode "invert".

References:
    Gomez et al. 2017, The reversible residual network: backpropagation without storing activations,
    https://arxiv.org/abs/1707.04585
    Chen et al. 2016, Training deep nets with sublinear memory cost, https://arxiv.org/abs/1604.06174
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from flowprox.flows.bijection import REMEDY, Bijection, FiniteChecks, NonFiniteError, Sequential, current_checks

__all__ = ["DriftError", "Reversible"]

_UNDO = {"forward": "decode", "encode": "decode", "inverse": "encode", "decode": "encode"}


class DriftError(NonFiniteError):
    """A recomputed input differs from the one that was there; the gradient of that pass must not be used."""


class Reversible(Sequential):
    """``Sequential`` with memory-saving backpropagation: the same values, gradients and parameter names.

    Steps must be deterministic functions of their input and parameters. The recomputation runs under the autocast state and
    with the parameters of the recorded pass. With "inputs" each step is checkpointed; with "invert" a call records a single
    autograd node, whose backward is not differentiable itself (``once_differentiable``).

    Drift guard: in mode "invert" every ``check_drift``-th recorded pass, the first included, keeps the chain's input
    and compares the recomputed one with it; they may differ by 1e-3 (1e-7 in float64, 0.1 under autocast) of the largest
    magnitude. Values that are not finite are looked for in these passes, and on the CPU in every one.

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
        return self._pass("forward", x)  # type: ignore[return-value]

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self._pass("inverse", z)  # type: ignore[return-value]

    def encode(self, x: Tensor) -> Tensor:
        return self._pass("encode", x)[0]

    def decode(self, z: Tensor) -> Tensor:
        return self._pass("decode", z)[0]

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

    def _pass(self, method: str, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """``method`` of every step: (value, logdet), the latter None where it is not asked for."""
        if self.training and not self._is_initialized() and len(self.layers) and len(x):
            if method in ("inverse", "decode"):  # before any data: undoing it by ``encode`` would initialize from it
                return self._stepwise(method, x)
            with torch.no_grad():
                self._stepwise("encode", x)  # a pass of its own, so that recorded passes change nothing
        recorded = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters()))
        return self._recorded(method, x, self.recompute) if recorded else self._stepwise(method, x)

    def _stepwise(self, method: str, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """As ``Sequential`` does it, and autograd with it."""
        out = getattr(Sequential, method)(self, x)
        return out if isinstance(out, tuple) else (out, None)

    def _recorded(self, method: str, x: Tensor, recompute: str) -> tuple[Tensor, Tensor | None]:
        """A pass that will be differentiated."""
        steps: list[Any] = list(reversed(self.layers)) if method in ("inverse", "decode") else list(self.layers)
        if recompute == "invert" and steps:
            chain = StepChain(steps, method, self._is_guarded(), AutocastState.current(x.device.type), current_checks())
            out = _Invert.apply(chain, x, *(p for part in chain.parameters for p in part))
            return out if len(out) == 2 else (out[0], None)
        logdet = x.new_zeros(x.shape[0]) if method in ("forward", "inverse") else None
        for step in steps:
            slots = parameter_slots(step)
            out = recomputed(applied)(step, method, slots, x, *(values[name] for values, name in slots))
            x, step_logdet = out if isinstance(out, tuple) else (out, None)
            if logdet is not None and step_logdet is not None:
                logdet = logdet + step_logdet
        return x, logdet

    def _is_guarded(self) -> bool:
        """Whether the drift guard looks at this recorded pass; counts them."""
        self._n_recorded += 1
        return bool(self.check_drift) and (self._n_recorded - 1) % self.check_drift == 0


ParameterSlots = list[tuple[dict[str, Any], str]]


def recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with ``torch.utils.checkpoint``: what it computes is not kept, and computed again in the backward pass."""
    return partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)


def parameter_slots(module: nn.Module) -> ParameterSlots:
    """Where the parameters of a module are kept: (dictionary, name) pairs."""
    return [(m._parameters, name) for m in module.modules() for name, p in m._parameters.items() if p is not None]


@contextmanager
def _substituted(slots: ParameterSlots, tensors: Sequence[Tensor]) -> Iterator[None]:
    """Parameters replaced by ``tensors`` for a while."""
    originals = [values[name] for values, name in slots]
    try:
        for (values, name), tensor in zip(slots, tensors, strict=True):
            values[name] = tensor
        yield
    finally:
        for (values, name), tensor in zip(slots, originals, strict=True):
            values[name] = tensor


def applied(step: Any, method: str, slots: ParameterSlots, x: Tensor, *parameters: Tensor) -> Any:
    """``step.method(x)`` with those parameters: the recomputation sees what the recorded pass saw, not what came after."""
    with _substituted(slots, parameters):
        return step(x) if method == "forward" else getattr(step, method)(x)


@dataclass(frozen=True)
class AutocastState:
    """The autocast state of a moment."""

    device_type: str
    enabled: bool
    dtype: torch.dtype | None

    @classmethod
    def current(cls, device_type: str) -> AutocastState:
        """What autocast is set to on a kind of device now."""
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
    """One recorded pass of mode "invert": the steps in the order in which they were applied, and how to go back."""

    steps: list[Any]
    method: str
    is_guarded: bool
    autocast: AutocastState
    checks: FiniteChecks | None

    def __post_init__(self) -> None:
        self.slots = [parameter_slots(step) for step in self.steps]
        self.parameters = [[values[name] for values, name in part] for part in self.slots]

    def apply(self, i: int, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Step i of x (B, C, H, W): the value, and its log-determinant (B,) or None where the method has none."""
        out = applied(self.steps[i], self.method, [], x)
        return out if isinstance(out, tuple) else (out, None)

    def undo(self, i: int, y: Tensor) -> Tensor:
        """What step i made y of, (B, C, H, W)."""
        with torch.no_grad():
            return getattr(self.steps[i], _UNDO[self.method])(y)

    def run(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """All steps of x, without recording: the value and the sum of the log-determinants, as ``apply`` has them."""
        logdet = x.new_zeros(x.shape[0]) if self.method in ("forward", "inverse") else None
        for i in range(len(self.steps)):
            x, step_logdet = self.apply(i, x)
            if logdet is not None and step_logdet is not None:
                logdet = logdet + step_logdet
        return x, logdet

    def backward(
        self, y: Tensor, parameters: Sequence[Tensor], needs: Sequence[bool], grads: tuple[Tensor, ...]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The input, and the gradients of (input, *parameters) from those of (output, logdet)."""
        grad: Tensor | None = grads[0]
        parameter_grads: list[Tensor | None] = [None] * len(parameters)
        end, x = len(parameters), y
        for i in reversed(range(len(self.steps))):
            start = end - len(self.slots[i])
            leaves = [parameters[j].detach().requires_grad_(needs[1 + j]) for j in range(start, end)]
            with _substituted(self.slots[i], leaves), self.autocast.restored():
                x = self.undo(i, x).detach().requires_grad_(i > 0 or needs[0])
                with torch.enable_grad():
                    outputs = self.apply(i, x)
            found = _gradients(outputs, (grad, *grads[1:]), [x, *leaves])
            grad, parameter_grads[start:end] = found[0], found[1:]
            end = start
        return x, [grad, *parameter_grads]

    def check(self, x: Tensor, y: Tensor, x_was: Tensor | None) -> None:
        """Report what is wrong with the recomputed input x of a pass with output y.

        NaN spreads through the steps undone after it, so one look at the end is enough.
        """
        if self.checks is not None:
            self.checks.add(x, f"a Reversible chain of {len(self.steps)}, undone,", self._direction.split()[0])
        if self.is_guarded or (x.device.type == "cpu" and self.checks is None):
            with self.autocast.restored():
                if not _is_finite(x):
                    self._name_non_finite(y)
                elif x_was is not None and _deviation(x, x_was) > self._tolerance(x):
                    self._name_drift(x_was, y)

    def _name_non_finite(self, y: Tensor) -> None:
        for i in reversed(range(len(self.steps))):
            y = self.undo(i, y)
            if not _is_finite(y):
                undone = f"gave a non-finite value when its {self._direction} was undone"
                raise NonFiniteError(f"{self._name(i)} {undone}; {REMEDY}")

    def _name_drift(self, x: Tensor, y: Tensor) -> None:
        """Go forward and back once more to find the step, and raise."""
        inputs = []
        with torch.no_grad():
            for i in range(len(self.steps)):
                inputs.append(x)
                x = self.apply(i, x)[0]
        deviation = 0.0
        for i in reversed(range(len(self.steps))):
            y = self.undo(i, y)
            deviation = _deviation(y, inputs[i])
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


class _Invert(torch.autograd.Function):
    """The autograd node of mode "invert". Parameters are inputs: their gradients leave through autograd."""

    @staticmethod
    def forward(ctx: Any, chain: StepChain, x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        y, logdet = chain.run(x)
        ctx.chain, kept = chain, [x] if chain.is_guarded else []
        ctx.n_parameters = len(parameters)
        ctx.save_for_backward(*parameters, y, *kept)
        return (y,) if logdet is None else (y, logdet)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        chain, n = ctx.chain, ctx.n_parameters
        parameters, (y, *kept) = ctx.saved_tensors[:n], ctx.saved_tensors[n:]
        with replace(chain.autocast, enabled=False).restored():  # autocast is for forward passes only
            x, found = chain.backward(y, parameters, ctx.needs_input_grad[1:], grads)
            chain.check(x.detach(), y, kept[0] if kept else None)
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


def _is_finite(x: Tensor) -> bool:
    return bool(torch.isfinite(x.sum()))


def _deviation(x: Tensor, reference: Tensor) -> float:
    """max |x - reference| relative to the largest magnitude, at least 1."""
    return float((x - reference).abs().max() / reference.abs().max().clamp(min=1))
