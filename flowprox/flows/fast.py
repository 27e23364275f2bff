r"""The fast path: the steps of a level as one autograd node whose backward pass is written by hand.

    step        u = M x + m                          ActNorm folded into the 1x1 convolution: M = W diag(e^c), m = W b
                z_1 = e^s u_1 + t,  z_2 = u_2        (s, t) = bound(net(u_2)),  logdet = sum(s) + H W log|det M|
    net         h_0 = u_2,  h_j = relu(V_j h_{j-1} + v_j),  raw = V_n h_{n-1} + v_n      scales folded into V_j, v_j
    backward    given a = dL/dz and l = dL/dlogdet
                du_1 = e^s a_1,   ds = du_1 u_1 + l,   dt = a_1,   draw = bound'(ds, dt)
                dV_j = sum dh_j h_{j-1}^T,   dh_{j-1} = V_j^T dh_j where h_{j-1} > 0
                du_2 = a_2 + dh_0,   dx = M^T du,   dM = sum du x^T,   dm = sum du

Symbols: x (B, C, H, W) in, z out, index 1 and 2 the halves of the channels, M (C, C), V_j convolutions; sums run over images
and pixels. The inverse direction is u_1 = (z_1 - t) / e^s, x = N u + n with N = M^-1, and its backward likewise.

The reference is the plain path, autograd through the layers of a ``GlowStep``. This one is faster since tensors stay
channels-last, the matrices of a level are inverted in one batched call, and hidden layers are computed for a chunk of images
that fits the cache. Under autocast the nets run in its precision, sums over pixels and the bijection in the dtype of x.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import register_optimizer_step_post_hook

from flowprox.flows.bijection import Bijection, current_checks
from flowprox.flows.conditioners import CouplingNet, PackedConvolution, convolved, folded, folded_together
from flowprox.flows.layers import (
    AffineCoupling,
    Bounds,
    GlowStep,
    LinearParts,
    bounded,
    full_precision,
    halves,
    on_cpu,
    pixelwise,
)
from flowprox.flows.reversible import (
    AutocastState,
    ParameterSlots,
    Reversible,
    StepChain,
    applied,
    parameter_slots,
    recomputed,
)
from flowprox.naming import Values

__all__ = ["GlowSteps", "all_modules"]

_T = TypeVar("_T")
_CHUNK = 2**21  # hidden values computed at a time on the CPU: 8 MiB in float32; larger tensors leave the cache
_FEW_CHANNELS = 8
_KEPT_LAYERS = {"nothing": slice(None), "early": slice(-1, None), "inputs": slice(0, 0)}  # of h_1 .. h_{n-1}


class GlowSteps(Reversible):
    """The steps of a level: the values, gradients and parameter names of ``Sequential``, by the fastest way there is.

    The rule. In ``eval()`` and without gradients the fast path computes (where the conditioners are ``CouplingNet``), with
    matrices and folded weights that are kept until a parameter changes, ``train()`` is called or the module moves; the same
    within ``frozen``, with gradients of images and latents. What is differentiated otherwise goes by ``recompute``. A changed
    parameter is known by its version, which an operation on ``parameter.data`` does not raise: call ``train()`` after one.

    Arguments:
        layers: ``GlowStep``, with a ``CouplingNet`` each for the fast path.
        recompute: how a pass is recorded.
            "plain": ordinary autograd; second derivatives.
            "auto": "fast-early" on the CPU, "plain" on an accelerator, whose kernels are the same on both paths.
            "inputs", "invert": as in ``Reversible``.
            "fast-nothing": the fast path as one node per call (``once_differentiable``); all hidden layers are kept.
            "fast-early": the hidden layers but the last; in Glow's nets (3x3, 1x1, 3x3) half of the memory, and costs little.
            "fast-inputs": all hidden layers are computed again, from each step's input and net output, two small tensors.
            "fast-invert": everything, from the output of the chain.
        check_drift: as in ``Reversible``, for "invert" and "fast-invert".

    Raises:
        ValueError: a layer of another kind, an unknown ``recompute``, a negative ``check_drift``.

    Example:
        >>> from flowprox.flows import Glow
        >>> plain, fast = Glow((3, 8, 8), 1, 2, 8), Glow((3, 8, 8), 1, 2, 8, backward="fast-inputs")
        >>> _ = fast.load_state_dict(plain.state_dict())
        >>> x = torch.rand(2, 3, 8, 8)
        >>> bool((fast.encode(x) - plain.encode(x)).abs().max() < 1e-5)
        True
    """

    is_region = True  # of ``flowprox.graphs.compile_regions``
    MODES = ("plain", "auto", "inputs", "invert", "fast-nothing", "fast-early", "fast-inputs", "fast-invert")

    def __init__(self, layers: Iterable[Bijection], recompute: str = "plain", check_drift: int = 100) -> None:
        super().__init__(layers, recompute, check_drift)
        for layer in self.layers:
            if not isinstance(layer, GlowStep):
                raise ValueError(f"layers must be GlowStep, got {type(layer).__name__}; use Sequential or Reversible")
        self._constants: _Constants | None = None
        self._n_frozen = 0
        self._compiled: Callable[..., tuple[Tensor, Tensor | None]] | None = None
        if recompute.startswith("fast") and not self.has_fast_path:
            nets = sorted({type(step.coupling.net).__name__ for step in self.layers})  # type: ignore[union-attr]
            raise ValueError(
                f"the fast path is for convolutional coupling nets, got {', '.join(nets)}; "
                "use backward='plain', 'inputs' or 'invert'"
            )

    @property
    def has_fast_path(self) -> bool:
        """Whether every step is an ``AffineCoupling`` with a ``CouplingNet``."""
        couplings: list[Any] = [step.coupling for step in self.layers]
        return all(type(c) is AffineCoupling and isinstance(c.net, CouplingNet) for c in couplings)

    def compile(self, **options: Any) -> None:
        """Compile one step, in whatever direction it is called, with options of ``torch.compile``.

        Passes of ``recompute`` "plain", "auto" and "inputs" and those without gradients then run it. "invert" and "fast-..."
        record theirs as before. A copy is not compiled. Of chains without the fast path the nets are compiled.
        """
        if self.has_fast_path:
            self._compiled = torch.compile(step_with_net, **options)
        else:
            for step in self.layers:
                step.coupling.net.compile(**options)  # type: ignore[operator, union-attr]

    def freeze(self, is_frozen: bool) -> None:
        """Record passes by the fast path with kept constants; parameters must stay as they are until this is undone."""
        self._n_frozen += 1 if is_frozen else -1  # blocks around a model and around its flow may be nested
        if is_frozen and self._n_frozen == 1:
            self._constants = self._current_constants() or _Constants(all_modules(self), None)
        elif not self._is_frozen and (self.training or self._constants is None or self._constants.stamp is None):
            self._constants = None

    @property
    def _is_frozen(self) -> bool:
        return self._n_frozen > 0

    def train(self, mode: bool = True) -> GlowSteps:
        """As ``torch.nn.Module.train``; training forgets what is kept."""
        if mode:
            self._constants = None
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> GlowSteps:
        """As ``torch.nn.Module._apply``, by which ``to``, ``half`` and the like set ``parameter.data``: no version tells."""
        self._constants = None
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> Values:
        """Without what is kept: a copy computes it again."""
        return {**super().__getstate__(), "_constants": None, "_n_frozen": 0, "_compiled": None}

    def _stepwise(self, method: str, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if not len(self.layers) or (self.training and not self._is_initialized()):
            return super()._stepwise(method, x)
        may_be_fast = not self.training and (self._is_frozen or not torch.compiler.is_compiling())
        is_fast = may_be_fast and self.has_fast_path and self._compiled is None
        return self._fast(method, x, None) if is_fast else self._plain(method, x)

    def _recorded(self, method: str, x: Tensor, recompute: str) -> tuple[Tensor, Tensor | None]:
        if not len(self.layers):
            return super()._stepwise(method, x)
        if recompute == "auto":
            recompute = "fast-early" if on_cpu(x) and self._compiled is None else "plain"
        if self._is_frozen and self.has_fast_path and (self._compiled is None or recompute == "invert"):
            recompute = {"plain": "fast-nothing", "inputs": "fast-inputs", "invert": "fast-invert"}.get(
                recompute, recompute
            )
        if recompute in ("plain", "inputs"):
            return self._plain(method, x, checkpointed=recompute == "inputs")
        if recompute.startswith("fast-"):
            return self._fast(method, x, recompute.removeprefix("fast-"))
        return super()._recorded(method, x, recompute)

    def _plain(self, method: str, x: Tensor, checkpointed: bool = False) -> tuple[Tensor, Tensor | None]:
        """Step by step; all matrices in one batched call, on accelerators and where steps are compiled all weights too.

        With ``checkpointed`` each step's input is kept and the rest recomputed.
        """
        backwards = method in ("inverse", "decode")
        constants = self._kept()
        linear = self._linear(constants, backwards)
        logdet = _whole(linear.logdet.sum(), x) if method in ("forward", "inverse") else None
        together = self._compiled is not None or not (checkpointed or on_cpu(x))
        nets = self._nets_together(constants, x) if together else None
        matrices, biases = linear.matrix.unbind(), linear.bias.unbind()
        with nullcontext() if nets is None else full_precision(x):
            for i in reversed(range(len(self.layers))) if backwards else range(len(self.layers)):
                coupling: Any = self.layers[i].coupling
                if nets is not None:
                    step: Callable[..., Any] = self._compiled or step_with_net
                    arguments = method, coupling.bounds, x, matrices[i], biases[i], *nets[i]
                else:
                    step, slots = _step, parameter_slots(coupling) if checkpointed else []
                    parameters = [values[name] for values, name in slots]
                    arguments = coupling, method, slots, x, matrices[i], biases[i], *parameters
                x, step_logdet = (recomputed(step) if checkpointed else step)(*arguments)
                if logdet is not None and step_logdet is not None:
                    logdet = logdet + step_logdet
        return x, logdet

    def _nets_together(self, constants: _Constants | None, x: Tensor) -> list[list[Tensor]] | None:
        """What ``folded_together`` gives of all coupling nets, if these are alike, in the precision they run in."""
        steps: list[Any] = list(self.layers)
        nets: list[Any] = [step.coupling.net for step in steps]
        if not self.has_fast_path or len({tuple(p.shape for layer in net.parts() for p in layer) for net in nets}) > 1:
            return None
        dtype = self._dtype_of_nets(AutocastState.current(x.device.type))
        compute = partial(_in_full_precision, x, partial(folded_together, nets, dtype))
        return compute() if constants is None else constants.once(("nets together", dtype), compute)

    def _dtype_of_nets(self, autocast: AutocastState) -> torch.dtype:
        step: Any = self.layers[0]
        return (autocast.dtype if autocast.enabled else None) or step.coupling.net.last.bias.dtype

    def _fast(self, method: str, x: Tensor, recompute: str | None) -> tuple[Tensor, Tensor | None]:
        """One pass on the fast path, without gradients or as one autograd node."""
        backwards = method in ("inverse", "decode")
        steps: list[Any] = list(reversed(self.layers)) if backwards else list(self.layers)
        autocast = AutocastState.current(x.device.type)
        dtype = self._dtype_of_nets(autocast)
        constants = self._kept()
        linear = self._linear(constants, backwards)
        nets = None if constants is None else constants.once(("nets", dtype), partial(self._packed_nets, dtype))
        parts = [step.coupling.net.parts() for step in steps] if nets is None else [net.parts for net in nets]
        if nets is not None and backwards:
            nets, parts = nets[::-1], parts[::-1]
        matrix, bias = (part.flip(0) if backwards else part for part in (linear.matrix, linear.bias))
        undo = None
        if recompute == "invert":
            with torch.no_grad():
                undone = self._linear(constants, not backwards)
            undo = (
                undone.matrix.flip(0) if backwards else undone.matrix,
                undone.bias.flip(0) if backwards else undone.bias,
            )
        chain = _Chain(
            couplings=[step.coupling for step in steps],
            layout=[[len(layer) for layer in step] for step in parts],
            backwards=backwards,
            keep=recompute,
            undo=undo,
            nets=nets,
            dtype=dtype,
            plain=StepChain(steps, method, recompute == "invert" and self._is_guarded(), autocast, current_checks()),
        )
        tensors = [matrix, bias, *(p for step in parts for layer in step for p in layer)]
        with full_precision(x):
            x = x.contiguous(memory_format=torch.channels_last)
            if recompute is None:
                logdets = (linear.logdet.flip(0) if backwards else linear.logdet) * (x.shape[-2] * x.shape[-1])
                z, logdet, _ = chain.run(x, tensors, logdets)
            else:
                z, logdet = _FastPass.apply(chain, x, *tensors)  # type: ignore[misc]
                logdet = logdet + _whole(linear.logdet.sum(), x)
        return z, logdet if method in ("forward", "inverse") else None

    def _packed_nets(self, dtype: torch.dtype) -> list[_Net]:
        steps: list[Any] = list(self.layers)
        return [_Net(step.coupling.net.parts(), dtype, packed=True) for step in steps]

    def _linear(self, constants: _Constants | None, inverse: bool) -> LinearParts:
        steps: list[Any] = list(self.layers)
        if constants is None:
            return LinearParts.of(steps, inverse)
        # rounded from float64 within ``frozen`` and in half precision; else those of the layers, to the bit
        is_exact = self._is_frozen or steps[0].mix.lu.dtype not in (torch.float32, torch.float64)
        compute = partial(LinearParts.of if is_exact else LinearParts.stepwise, steps, inverse)
        return constants.once(("linear", inverse, is_exact), partial(_in_full_precision, steps[0].mix.lu, compute))

    def _kept(self) -> _Constants | None:
        """What depends on the parameters alone, where they are constant: in evaluation mode, not to be differentiated."""
        if self._is_frozen:
            return self._constants
        if self.training or torch.compiler.is_compiling():
            return None
        constants = self._current_constants()
        if constants is None or (torch.is_grad_enabled() and any(p.requires_grad for p in constants.parameters())):
            return None
        self._constants = constants
        return constants

    def _current_constants(self) -> _Constants | None:
        """Those at hand if no parameter has changed since, else empty ones; None if a change could not be seen later."""
        if self._constants is not None and self._constants.stamp == _stamp(self._constants.modules):
            return self._constants
        modules = all_modules(self)
        stamp = _stamp(modules)
        return None if stamp is None else _Constants(modules, stamp, _tensors(modules))


def _in_full_precision(x: Tensor, compute: Callable[[], _T]) -> _T:
    """``compute`` without autocast; where its result is at hand there is no such region, which would be empty in an export."""
    with full_precision(x):
        return compute()


def _step(
    coupling: AffineCoupling,
    method: str,
    slots: ParameterSlots,
    x: Tensor,
    matrix: Tensor,
    bias: Tensor,
    *parameters: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """One step, its linear part M x + m given; (value, logdet of the coupling, if asked for)."""
    if method in ("forward", "encode"):
        with full_precision(x):
            x = pixelwise(x, matrix, bias)
    out = applied(coupling, method, slots, x, *parameters)
    x, logdet = out if isinstance(out, tuple) else (out, None)
    if method in ("inverse", "decode"):
        with full_precision(x):
            x = pixelwise(x, matrix, bias)
    return x, logdet


def step_with_net(
    method: str, bounds: Bounds, x: Tensor, matrix: Tensor, bias: Tensor, *net: Tensor
) -> tuple[Tensor, Tensor | None]:
    """``_step`` with a net of ``folded_together`` given: a function of tensors alone, which is what is compiled.

    Autocast is to be off around it, not inside: a compiled backward pass runs under that of the whole forward one.
    """
    backwards, asks_logdet = method in ("inverse", "decode"), method in ("forward", "inverse")
    first, second = halves(x if backwards else pixelwise(x, matrix, bias))
    layers = [(net[0], None), *zip(net[1::2], net[2::2], strict=True)]
    raw = convolved(second.to(net[0].dtype), layers).to(x.dtype)
    log_scale, shift = bounded(bounds, *raw.chunk(2, dim=1))
    if backwards:
        log_scale = -log_scale
        x = pixelwise(_cat((first - shift) * torch.exp(log_scale), second), matrix, bias)
    else:
        x = _cat(first * torch.exp(log_scale) + shift, second)
    return x, log_scale.sum((1, 2, 3)) if asks_logdet else None


def _whole(logdet: Tensor, x: Tensor) -> Tensor:
    """log|det M| of the steps, at every pixel, as (B,)."""
    return (logdet * (x.shape[-2] * x.shape[-1])).expand(x.shape[0])


def all_modules(parent: nn.Module) -> list[nn.Module]:
    """``parent.modules()`` without its nested generators, which take longer than a small network."""
    found, waiting = {}, [parent]
    while waiting:
        module = waiting.pop()
        if module not in found:
            found[module] = None
            waiting += [child for child in module._modules.values() if child is not None]
    return list(found)


def _stamp(modules: list[nn.Module]) -> tuple[Any, ...] | None:
    """Another one after any change of a parameter, buffer or layer; None for tensors whose changes are not counted."""
    tensors = _tensors(modules)
    if any(type(t) not in (nn.Parameter, Tensor) or t.is_inference() for t in tensors):
        return None
    children = [id(child) for m in modules for child in m._modules.values()]
    return (*children, *((id(t), t._version, t.data_ptr()) for t in tensors))


def _tensors(modules: list[nn.Module]) -> list[Tensor]:
    return [t for m in modules for values in (m._parameters, m._buffers) for t in values.values() if t is not None]


def _count_change(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Raise the versions of what a fused optimizer has changed, which its kernels leave as they are."""
    for group in optimizer.param_groups:
        if group.get("fused"):
            for parameter in group["params"]:
                if not parameter.is_inference():  # such tensors have no version
                    torch.autograd.graph.increment_version(parameter)


register_optimizer_step_post_hook(_count_change)


@dataclass
class _Constants:
    """Matrices and folded nets of a chain, computed when they are first asked for."""

    modules: list[nn.Module]
    stamp: tuple[Any, ...] | None
    tensors: list[Tensor] = field(default_factory=list)  # those of the stamp: an id is not given again while they live
    values: dict[Hashable, Any] = field(default_factory=dict)

    def parameters(self) -> Iterable[Tensor]:
        return (p for m in self.modules for p in m._parameters.values() if p is not None)

    def once(self, key: Hashable, compute: Callable[[], _T]) -> _T:
        """What has been computed under that name, or is now."""
        if key not in self.values:
            with torch.inference_mode(False), torch.no_grad():
                self.values[key] = compute()
        return self.values[key]


_NetSums = list[Any]  # per convolution [dV, dv], None before the first chunk


class _Net:
    """The convolutions of one coupling net with the scales folded in, in the precision they run in."""

    def __init__(self, parts: Sequence[Sequence[Tensor]], dtype: torch.dtype, packed: bool = False) -> None:
        self.parts = parts
        self.rates = [1.0] * (len(parts) - 1) + [3.0]  # of the exponent of the log-scale, see ``CouplingNet.rates``
        self.layers = [
            (weight.to(dtype).contiguous(memory_format=torch.channels_last), bias.to(dtype))
            for weight, bias in map(folded, parts, self.rates)
        ]
        self.packed = [PackedConvolution(*layer) for layer in self.layers] if packed else None

    def hidden(self, h: Tensor, n: int | None = None) -> list[Tensor]:
        """h_0 to h_n from h_0; by default to the last hidden layer."""
        values = [h]
        for j in range(len(self.layers) - 1 if n is None else n):
            if self.packed is None:
                values.append(_convolve(values[-1], *self.layers[j]).relu_())
            else:
                values.append(self.packed[j](values[-1], relu=True))
        return values

    def last(self, h: Tensor) -> Tensor:
        """raw from h_{n-1}."""
        return _convolve(h, *self.layers[-1]) if self.packed is None else self.packed[-1](h)

    def backward(self, hidden: Sequence[Tensor], grad: Tensor, sums: _NetSums | None) -> Tensor:
        """dh_0 from draw; dV_j and dv_j are added to ``sums``."""
        for j in reversed(range(len(self.layers))):
            if sums is not None:
                found = _weight_gradient(grad, hidden[j], self.layers[j][0].shape[-1]), grad.sum((0, 2, 3))
                found = [f.to(part.dtype) for f, part in zip(found, self.parts[j], strict=False)]
                sums[j] = found if sums[j] is None else [s.add_(f) for s, f in zip(sums[j], found, strict=True)]
            grad = _data_gradient(grad, self.layers[j][0], hidden[j])
            if j:
                torch.ops.aten.threshold_backward.grad_input(grad, hidden[j], 0, grad_input=grad)
        return grad

    def parameter_gradients(self, sums: _NetSums) -> list[Tensor]:
        """From gradients of the folded weights to those of the parameters: V = e^{r c} K, v = e^{r c} k + d."""
        found = []
        for (weight, bias, *affine), rate, (d_weight, d_bias) in zip(self.parts, self.rates, sums, strict=True):
            if not affine:
                found += [d_weight, d_bias]
                continue
            scale = torch.exp(rate * affine[0])
            d_weight, d_shift, d_bias = d_weight.mul_(scale.view(-1, 1, 1, 1)), d_bias, d_bias * scale
            d_scale = (d_weight * weight).sum((1, 2, 3)) + d_bias * bias
            found += [d_weight, d_bias, rate * d_scale, d_shift][: 2 + len(affine)]
        return found


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)


def _data_gradient(grad: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    """The adjoint of the convolution with ``weight``, applied to grad (B, O, H, W); of x only the shape counts.

    A CPU computes 16 output channels at a time at the least: for fewer, a matrix product whose columns are added up is faster.
    """
    size = weight.shape[-1]
    if not on_cpu(grad) or size == 1 or weight.shape[1] > _FEW_CHANNELS:
        padding = [size // 2] * 2
        return torch.ops.aten.convolution_backward(
            grad, x, weight, None, [1, 1], padding, [1, 1], False, [0, 0], 1, [True, False, False]
        )[0]
    columns = weight.flatten(1).T @ grad.flatten(2)
    folded = F.fold(columns, (grad.shape[-2], grad.shape[-1]), size, padding=size // 2)
    return folded.contiguous(memory_format=torch.channels_last)


def _weight_gradient(grad: Tensor, x: Tensor, size: int) -> Tensor:
    """sum over images and pixels of grad (B, O, H, W) times the patches of x (B, I, H, W): (O, I, size, size).

    As one matrix product; the patches are taken of whichever of the two has fewer channels.
    """
    if size == 1:
        return (_rows(grad).T @ _rows(x))[:, :, None, None]
    if x.shape[1] <= grad.shape[1]:
        product = _rows(grad).T @ _patches(x, size)
        return product.view(grad.shape[1], size, size, x.shape[1]).permute(0, 3, 1, 2)
    product = _patches(grad, size).T @ _rows(x)
    return product.view(size, size, grad.shape[1], x.shape[1]).flip(0, 1).permute(2, 3, 0, 1)


def _rows(x: Tensor) -> Tensor:
    """(B, C, H, W), channels-last, as (B H W, C)."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _patches(x: Tensor, size: int) -> Tensor:
    """(B, C, H, W) to (B H W, size * size * C)."""
    radius = size // 2
    padded = F.pad(x, (radius, radius, radius, radius)).permute(0, 2, 3, 1)
    windows = padded.unfold(1, size, 1).unfold(2, size, 1)  # (B, H, W, C, size, size)
    return windows.permute(0, 1, 2, 4, 5, 3).reshape(-1, size * size * x.shape[1])


@dataclass
class _Sums:
    """What one step's backward pass adds up over the chunks; None where nothing asks."""

    matrix: Tensor | None
    bias: Tensor | None
    net: _NetSums | None

    def add_linear(self, grad: Tensor, x: Tensor) -> None:
        """dM, dm of u = M x + m."""
        if self.matrix is not None:
            self.matrix += _rows(grad).T @ _rows(x)
        if self.bias is not None:
            self.bias += grad.sum((0, 2, 3))


class _Kept(NamedTuple):
    """What the backward pass of one step starts from: its input (its output in mode "invert"), and its net's values."""

    x: Tensor
    raw: Tensor | None = None
    hidden: Sequence[Tensor] = ()


_Memory = tuple[Tensor, list[tuple[Tensor, ...]]]  # a step's input; of each chunk the net's output and hidden layers


@dataclass
class _Step:
    """One step in one direction, its tensors at hand, for a chunk of images."""

    coupling: AffineCoupling
    net: _Net
    linear: tuple[Tensor, Tensor]
    undo: tuple[Tensor, Tensor] | None
    dtype: torch.dtype
    backwards: bool

    def apply(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """(z, log-scales summed, raw, hidden), or backwards x from z and minus that sum."""
        u = x if self.backwards else pixelwise(x, *self.linear)
        first, second = halves(u)
        hidden = self.net.hidden(self._condition(second))
        raw = self.net.last(hidden[-1])
        log_scale, shift = self._bounded(raw, x.dtype)
        if not self.backwards:
            first.mul_(torch.exp(log_scale)).add_(shift)
            return u, log_scale.sum((1, 2, 3)), raw, hidden
        u = _cat((first - shift) * torch.exp(-log_scale), second)
        return pixelwise(u, *self.linear), -log_scale.sum((1, 2, 3)), raw, hidden

    def pull(self, kept: _Kept, a: Tensor, b: Tensor | None, sums: _Sums) -> tuple[Tensor, Tensor]:
        """The gradient of the input, and the input, from those of output and logdet, a and b."""
        is_mixed = (self.undo is None) == self.backwards  # z is at hand, not what the linear part makes u of
        u = kept.x if is_mixed else pixelwise(kept.x, *(self.undo or self.linear))
        first, second = halves(u)
        n_again = len(self.net.layers) - 1 - len(kept.hidden)
        hidden = [*self.net.hidden(self._condition(second), n_again), *kept.hidden]
        log_scale, shift = self._bounded(self.net.last(hidden[-1]) if kept.raw is None else kept.raw, second.dtype)
        inverse = torch.exp(-log_scale) if is_mixed or self.backwards else log_scale  # which is not used then
        if is_mixed:
            first = (first - shift) * inverse
            u = _cat(first, second)
        x, transposed = kept.x, self.linear[0].T
        if not self.backwards:
            x = x if self.undo is None else pixelwise(u, *self.undo)
            a_1, a_2 = halves(a)
            d_1 = a_1 * torch.exp(log_scale)
            d_log_scale = d_1 * first if b is None else d_1 * first + b
            du = _cat(d_1, a_2 + self._through_net(hidden, (log_scale, shift), d_log_scale, a_1, sums))
            sums.add_linear(du, x)
            return pixelwise(du, transposed), x
        x = x if self.undo is None else _cat(first / inverse + shift, second)
        sums.add_linear(a, u)
        du_1, du_2 = halves(pixelwise(a, transposed))
        d_1 = du_1 * inverse
        d_log_scale = du_1 * first if b is None else du_1 * first + b
        return _cat(d_1, du_2 + self._through_net(hidden, (log_scale, shift), -d_log_scale, -d_1, sums)), x

    def _condition(self, second: Tensor) -> Tensor:
        return second.to(self.dtype).contiguous(memory_format=torch.channels_last)

    def _bounded(self, raw: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(s, t) from the net's output (B, 2 (C//2), H, W)."""
        return bounded(self.coupling.bounds, *raw.to(dtype).chunk(2, dim=1))

    def _through_net(
        self, hidden: list[Tensor], values: tuple[Tensor, Tensor], d_log_scale: Tensor, d_shift: Tensor, sums: _Sums
    ) -> Tensor:
        """dL/du_2 by way of log-scale and shift; the derivative of a bound is 1 - (value / bound)^2."""
        scale_bound, shift_bound = self.coupling.bounds
        d_log_scale = d_log_scale * (1 - (values[0] / scale_bound).square())
        if shift_bound is not None:
            d_shift = d_shift * (1 - (values[1] / shift_bound).square())
        return self.net.backward(hidden, _cat(d_log_scale, d_shift).to(self.dtype), sums.net).to(d_shift.dtype)


@dataclass
class _Chain:
    """One pass over the steps, in the order in which they are applied, and the way back."""

    couplings: list[Any]
    layout: list[list[int]]
    backwards: bool  # the inverse direction
    keep: str | None  # mode of the backward pass; None where there will be none
    undo: tuple[Tensor, Tensor] | None
    nets: list[_Net] | None
    dtype: torch.dtype
    plain: StepChain  # the same pass for the checks

    def step(self, i: int, tensors: Sequence[Tensor]) -> _Step:
        """The i-th step; ``tensors`` are the matrices, their biases and the parameters of all nets."""
        matrix, bias, *parameters = tensors
        undo = None if self.undo is None else (self.undo[0][i], self.undo[1][i])
        net = self._net(i, parameters) if self.nets is None else self.nets[i]
        return _Step(self.couplings[i], net, (matrix[i], bias[i]), undo, self.dtype, self.backwards)

    def _net(self, i: int, parameters: Sequence[Tensor]) -> _Net:
        start, parts = sum(map(sum, self.layout[:i])), []
        for n in self.layout[i]:
            parts.append(parameters[start : start + n])
            start += n
        return _Net(parts, self.dtype)

    def chunks(self, i: int, x: Tensor) -> list[slice]:
        """Images whose hidden layers fit the cache; on an accelerator, and in an exported program, the whole batch."""
        if not on_cpu(x) or torch.compiler.is_compiling():
            return [slice(None)]
        n = max(1, _CHUNK // (self.couplings[i].net.last.in_channels * x.shape[-2] * x.shape[-1]))
        return [slice(start, start + n) for start in range(0, max(1, len(x)), n)]

    def run(
        self, x: Tensor, tensors: Sequence[Tensor], logdets_of_linear_parts: Tensor | None = None
    ) -> tuple[Tensor, Tensor, list[_Memory]]:
        """(output, logdet, the input of each step that is kept with what is kept of its chunks)."""
        logdet, kept = x.new_zeros(x.shape[0]), []
        for i in range(len(self.couplings)):
            step = self.step(i, tensors)
            outputs, logdets, memory = [], [], []
            for part in self.chunks(i, x):
                y, step_logdet, raw, hidden = step.apply(x[part])
                outputs.append(y)
                logdets.append(step_logdet)
                if self.keep in _KEPT_LAYERS:
                    memory.append((raw, *hidden[1:][_KEPT_LAYERS[self.keep]]))
            if memory or (i == 0 and self.keep == "invert" and self.plain.is_guarded):
                kept.append((x, memory))
            x = _joined(outputs)
            step_logdet = _joined(logdets)
            if logdets_of_linear_parts is not None:
                step_logdet = step_logdet + logdets_of_linear_parts[i]
            logdet = logdet + step_logdet
        return x, logdet, kept

    def backward(
        self,
        y: Tensor,
        kept: list[_Memory],
        tensors: Sequence[Tensor],
        needs: Sequence[bool],
        grad: Tensor,
        grad_logdet: Tensor | None,
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The input, and the gradients of (input, matrix, bias, *parameters)."""
        d_matrix, d_bias = (torch.zeros_like(tensors[j]) if needs[1 + j] else None for j in range(2))
        d_parameters: list[Tensor | None] = [None] * (len(tensors) - 2)
        end = len(tensors) - 2
        for i in reversed(range(len(self.couplings))):
            step, n = self.step(i, tensors), sum(self.layout[i])
            wanted = any(needs[3 + end - n : 3 + end])
            sums = _Sums(
                None if d_matrix is None else d_matrix[i],
                None if d_bias is None else d_bias[i],
                [None] * len(step.net.layers) if wanted else None,
            )
            grads, inputs = [], []
            for j, part in enumerate(self.chunks(i, grad)):
                memory = _Kept(kept[i][0][part], kept[i][1][j][0], kept[i][1][j][1:]) if kept else _Kept(y[part])
                b = None if grad_logdet is None else grad_logdet[part].view(-1, 1, 1, 1)
                pulled, x = step.pull(memory, grad[part], b, sums)
                grads.append(pulled)
                inputs.append(x)
            grad, y = _joined(grads), _joined(inputs)
            if sums.net is not None:
                d_parameters[end - n : end] = step.net.parameter_gradients(sums.net)
            end -= n
        return y, [grad, d_matrix, d_bias, *d_parameters]


class _FastPass(torch.autograd.Function):
    """The autograd node of a pass. Matrices and parameters are inputs: their gradients leave through autograd."""

    @staticmethod
    def forward(ctx: Any, chain: _Chain, x: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        y, logdet, kept = chain.run(x, tensors)
        ctx.set_materialize_grads(False)
        ctx.chain, ctx.n_tensors = chain, len(tensors)
        ctx.shape = [[len(chunk) for chunk in chunks] for _, chunks in kept]
        flat = [t for x, chunks in kept for t in (x, *(value for chunk in chunks for value in chunk))]
        ctx.save_for_backward(*tensors, y, *flat)
        return y, logdet

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_logdet: Tensor | None) -> tuple[Tensor | None, ...]:
        chain: _Chain = ctx.chain
        tensors, y = ctx.saved_tensors[: ctx.n_tensors], ctx.saved_tensors[ctx.n_tensors]
        flat = iter(ctx.saved_tensors[ctx.n_tensors + 1 :])
        kept = [(next(flat), [tuple(next(flat) for _ in range(n)) for n in sizes]) for sizes in ctx.shape]
        if grad is None and grad_logdet is None:
            return (None,) * (2 + len(tensors))
        grad = torch.zeros_like(y) if grad is None else grad.contiguous(memory_format=torch.channels_last)
        needs = ctx.needs_input_grad[1:]
        start, kept = ([x for x, _ in kept], []) if chain.keep == "invert" else ([], kept)
        with full_precision(y):
            x, found = chain.backward(y, kept, tensors, needs, grad, grad_logdet)
            if chain.keep == "invert":
                chain.plain.check(x, y, start[0] if start else None)
        return None, *(g if needed else None for g, needed in zip(found, needs, strict=True))


def _cat(first: Tensor, second: Tensor) -> Tensor:
    return torch.cat([first, second], dim=1)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
