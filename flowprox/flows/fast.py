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

The reference is the plain path, ``Sequential`` of ``GlowStep``, which computes the same from the same parameters. This one is
faster since tensors stay channels-last, every matrix of a level is inverted in one batched call, relu is in place, the hidden
layers, wide as they are, are computed for a chunk of images that fits the cache, and weights and their gradients, which
outweigh the images at coarse levels, are passed over few times. Under autocast the nets run in its precision, sums over pixels
and the bijection itself in the dtype of x.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from flowprox.coupling_nets import CouplingNet
from flowprox.flows.bijection import Bijection, Sequential
from flowprox.flows.layers import AffineCoupling, GlowStep, mixing_parts, soft_bound, unmixing_parts
from flowprox.flows.packed import PackedConvolution
from flowprox.flows.reversible import AutocastState, Reversible, StepChain

__all__ = ["FastSteps"]

_CHUNK = 2**21  # hidden values computed at a time on the CPU: 8 MiB in float32; larger tensors leave the cache
_FEW_CHANNELS = 8
_KEPT_LAYERS = {"nothing": slice(None), "early": slice(-1, None), "inputs": slice(0, 0)}  # of h_1 .. h_{n-1}


class FastSteps(Reversible):
    """Glow steps with ``CouplingNet`` conditioners, computed fast: values, gradients and parameter names of ``Sequential``.

    As ``Reversible`` it records one node per call, which has no second derivatives, initializes ActNorm before the recorded
    pass, and guards against drift and non-finite values.

    Arguments:
        layers: ``GlowStep`` with a ``CouplingNet`` each.
        recompute: what the backward pass computes again. "nothing": all hidden layers are kept, the least work.
            "early": the hidden layers but the last; in Glow's nets (3x3, 1x1, 3x3) that halves the memory and costs little.
            "inputs": all hidden layers, from each step's input and net output, two small tensors per step.
            "invert": everything, from the output of the chain.
        check_drift: as in ``Reversible``, for "invert".

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

    MODES = ("nothing", "early", "inputs", "invert")

    def __init__(self, layers: Iterable[Bijection], recompute: str = "inputs", check_drift: int = 100) -> None:
        super().__init__(layers, recompute, check_drift)
        for layer in self.layers:
            if not _is_supported(layer):
                raise ValueError(
                    f"the fast path is for Glow steps with convolutional coupling nets, got {_described(layer)}; "
                    "use backward='plain', 'inputs' or 'invert'"
                )
        self._constants: _Constants | None = None

    @staticmethod
    def supports(chain: nn.Module) -> bool:
        """Whether a chain of layers could be computed by this class."""
        return isinstance(chain, Sequential) and len(chain.layers) > 0 and all(map(_is_supported, chain.layers))

    @torch.no_grad()
    def hold(self) -> None:
        """Compute matrices and folded weights once, for all passes until ``release``; parameters must stay as they are."""
        steps: list[Any] = list(self.layers)
        self._constants = _Constants(mixing_parts(steps), unmixing_parts(steps), {})

    @property
    def is_held(self) -> bool:
        """Whether constants are kept at present."""
        return self._constants is not None

    def release(self) -> None:
        """Forget what ``hold`` keeps."""
        self._constants = None

    def _record(self, method: str, x: Tensor) -> tuple[Any, ...] | None:
        if not len(self.layers):
            return None
        if self.training and not self._is_initialized():  # the inverse direction before any data
            return _plain(self, method, x)
        chain, tensors = self._prepared(method, x)
        with torch.autocast(x.device.type, enabled=False):
            x = x.contiguous(memory_format=torch.channels_last)
            if chain.keep is not None:
                z, logdet = _FastPass.apply(chain, x, *tensors)  # type: ignore[misc]
            else:
                z, logdet, _ = chain.run(x, tensors)
        if method in ("encode", "decode"):
            return z, None
        steps: list[Any] = list(self.layers)
        constant = sum(s.actnorm.log_scale.sum() + s.mix.log_determinant() for s in steps) * (x.shape[-2] * x.shape[-1])
        return z, logdet - constant if chain.backwards else logdet + constant

    def _prepared(self, method: str, x: Tensor) -> tuple[_Chain, list[Tensor]]:
        """One pass, and the tensors it may have to differentiate: matrices, their biases, parameters of the nets."""
        backwards = method in ("inverse", "decode")
        steps: list[Any] = list(reversed(self.layers)) if backwards else list(self.layers)
        autocast = AutocastState.current(x.device.type)
        dtype = (autocast.dtype if autocast.enabled else None) or x.dtype
        nets = self._held_nets(backwards, dtype)
        parts = [_net_parts(step.coupling.net) for step in steps] if nets is None else [net.parts for net in nets]
        tensors = [*self._linear_parts(steps, backwards), *(p for step in parts for layer in step for p in layer)]
        recorded = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *tensors))
        invert = recorded and self.recompute == "invert"
        guarded = recorded and bool(self.check_drift) and self._n_recorded % self.check_drift == 0
        self._n_recorded += int(recorded)
        chain = _Chain(
            couplings=[step.coupling for step in steps],
            layout=[[len(layer) for layer in step] for step in parts],
            backwards=backwards,
            keep=self.recompute if recorded else None,
            undo=self._linear_parts(steps, backwards, undo=True) if invert else None,
            nets=nets,
            dtype=dtype,
            plain=StepChain(steps, [], method, 0, invert, guarded, autocast),
        )
        return chain, tensors

    def _linear_parts(self, steps: list[Any], backwards: bool, undo: bool = False) -> tuple[Tensor, Tensor]:
        """Matrices and biases of the pass or of its inverse, in the order of application."""
        unmix = backwards != undo
        if self._constants is not None:
            matrix, bias = self._constants.unmix if unmix else self._constants.mix
            return (matrix.flip(0), bias.flip(0)) if backwards else (matrix, bias)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not undo):
            return unmixing_parts(steps) if unmix else mixing_parts(steps)

    def _held_nets(self, backwards: bool, dtype: torch.dtype) -> list[_Net] | None:
        if self._constants is None:
            return None
        if dtype not in self._constants.nets:
            steps: list[Any] = list(self.layers)
            with torch.no_grad():
                self._constants.nets[dtype] = [
                    _Net(_net_parts(step.coupling.net), dtype, packed=True) for step in steps
                ]
        nets = self._constants.nets[dtype]
        return nets[::-1] if backwards else nets


class _Constants(NamedTuple):
    """What does not change while the parameters are held."""

    mix: tuple[Tensor, Tensor]
    unmix: tuple[Tensor, Tensor]
    nets: dict[torch.dtype, list[_Net]]


def _plain(chain: Sequential, method: str, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The reference, for the rare pass that comes before the initialization from data."""
    out = getattr(Sequential, method)(chain, x)
    return out if isinstance(out, tuple) else (out, None)


def _is_supported(layer: nn.Module) -> bool:
    return (
        isinstance(layer, GlowStep)
        and type(layer.coupling) is AffineCoupling
        and isinstance(layer.coupling.net, CouplingNet)
    )


def _described(layer: nn.Module) -> str:
    return (
        f"{type(layer).__name__} with {type(layer.coupling.net).__name__}"
        if isinstance(layer, GlowStep)
        else (type(layer).__name__)
    )


def _net_parts(net: CouplingNet) -> list[list[Tensor]]:
    """Per convolution: weight, bias, then log-scale and shift of what follows it, where there are such."""
    layers = [[c.weight, c.bias] for c in net.hidden]
    if net.norms is not None:
        layers = [[*layer, norm.log_scale, norm.bias] for layer, norm in zip(layers, net.norms, strict=True)]
    last = net.last
    return [*layers, [last.weight, last.bias, *([] if last.log_scale is None else [last.log_scale])]]  # type: ignore[list-item]


_NetSums = list[Any]  # per convolution [dV, dv], None before the first chunk


class _Net:
    """The convolutions of one coupling net with the scales folded in, in the precision they run in."""

    def __init__(self, parts: Sequence[Sequence[Tensor]], dtype: torch.dtype, packed: bool = False) -> None:
        self.parts = parts
        self.rates = [1.0] * (len(parts) - 1) + [3.0]  # of the exponent of the log-scale, see ``ZeroConv2d``
        self.layers = [_folded(layer, rate, dtype) for layer, rate in zip(parts, self.rates, strict=True)]
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


def _folded(layer: Sequence[Tensor], rate: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    weight, bias, *affine = layer
    if affine:
        scale = torch.exp(rate * affine[0])
        weight, bias = weight * scale.view(-1, 1, 1, 1), bias * scale
    if len(affine) > 1:
        bias = bias + affine[1]
    return weight.to(dtype).contiguous(memory_format=torch.channels_last), bias.to(dtype)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)


def _data_gradient(grad: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    """The adjoint of the convolution with ``weight``, applied to grad (B, O, H, W); of x only the shape counts.

    A CPU computes 16 output channels at a time at the least: for fewer, a matrix product whose columns are added up is faster.
    """
    size = weight.shape[-1]
    if grad.device.type != "cpu" or size == 1 or weight.shape[1] > _FEW_CHANNELS:
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


class _Coupling(NamedTuple):
    """Bounded log-scale and shift."""

    log_scale: Tensor
    shift: Tensor
    bounds: tuple[float, float | None]

    @classmethod
    def of(cls, raw: Tensor, coupling: AffineCoupling, dtype: torch.dtype) -> _Coupling:
        """From the net's output (B, 2 (C//2), H, W)."""
        log_scale, shift = raw.to(dtype).chunk(2, dim=1)
        bounds = coupling.scale_bound, coupling.shift_bound
        return cls(
            soft_bound(log_scale, bounds[0]), shift if bounds[1] is None else soft_bound(shift, bounds[1]), bounds
        )

    def pull(self, d_log_scale: Tensor, d_shift: Tensor) -> Tensor:
        """draw; the derivative of the bound is 1 - (value / bound)^2."""
        scale_bound, shift_bound = self.bounds
        d_log_scale = d_log_scale * (1 - (self.log_scale / scale_bound).square())
        if shift_bound is not None:
            d_shift = d_shift * (1 - (self.shift / shift_bound).square())
        return _cat(d_log_scale, d_shift)


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
    """One step, its tensors at hand, for a chunk of images."""

    coupling: AffineCoupling
    net: _Net
    linear: tuple[Tensor, Tensor]
    undo: tuple[Tensor, Tensor] | None
    dtype: torch.dtype

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """(z, log-scales summed, raw, hidden)."""
        u = _mixed(x, self.linear)
        first, second = _halves(u)
        hidden = self.net.hidden(self._condition(second))
        raw = self.net.last(hidden[-1])
        c = _Coupling.of(raw, self.coupling, x.dtype)
        first.mul_(torch.exp(c.log_scale)).add_(c.shift)
        return u, c.log_scale.sum((1, 2, 3)), raw, hidden

    def decode(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """(x, minus log-scales summed, raw, hidden)."""
        first, second = _halves(z)
        hidden = self.net.hidden(self._condition(second))
        raw = self.net.last(hidden[-1])
        c = _Coupling.of(raw, self.coupling, z.dtype)
        u = _cat((first - c.shift) * torch.exp(-c.log_scale), second)
        return _mixed(u, self.linear), -c.log_scale.sum((1, 2, 3)), raw, hidden

    def pull_encode(self, kept: _Kept, a: Tensor, b: Tensor | None, sums: _Sums) -> tuple[Tensor, Tensor]:
        """(dL/dx, x) from a = dL/dz, b = dL/dlogdet."""
        if self.undo is None:
            x = kept.x
            first, second = _halves(_mixed(x, self.linear))
            hidden, c = self._again(second, kept)
        else:
            z_1, second = _halves(kept.x)
            hidden, c = self._again(second, kept)
            first = (z_1 - c.shift) * torch.exp(-c.log_scale)
            x = _mixed(_cat(first, second), self.undo)
        a_1, a_2 = _halves(a)
        d_first = a_1 * torch.exp(c.log_scale)
        d_log_scale = d_first * first if b is None else d_first * first + b
        d_second = self._through_net(hidden, c, d_log_scale, a_1, sums)
        du = _cat(d_first, a_2 + d_second)
        sums.add_linear(du, x)
        return _mixed(du, (self.linear[0].T, None)), x

    def pull_decode(self, kept: _Kept, a: Tensor, b: Tensor | None, sums: _Sums) -> tuple[Tensor, Tensor]:
        """(dL/dz, z) from a = dL/dx, b = dL/dlogdet."""
        if self.undo is None:
            z = kept.x
            z_1, second = _halves(z)
            hidden, c = self._again(second, kept)
            inverse_scale = torch.exp(-c.log_scale)
            u = _cat((z_1 - c.shift) * inverse_scale, second)
        else:
            u = _mixed(kept.x, self.undo)
            first, second = _halves(u)
            hidden, c = self._again(second, kept)
            inverse_scale = torch.exp(-c.log_scale)
            z = _cat(first / inverse_scale + c.shift, second)
        sums.add_linear(a, u)
        du_1, du_2 = _halves(_mixed(a, (self.linear[0].T, None)))
        d_1 = du_1 * inverse_scale
        d_log_scale = du_1 * _halves(u)[0] if b is None else du_1 * _halves(u)[0] + b
        return _cat(d_1, du_2 + self._through_net(hidden, c, -d_log_scale, -d_1, sums)), z

    def _condition(self, second: Tensor) -> Tensor:
        return second.to(self.dtype).contiguous(memory_format=torch.channels_last)

    def _again(self, second: Tensor, kept: _Kept) -> tuple[list[Tensor], _Coupling]:
        n_again = len(self.net.layers) - 1 - len(kept.hidden)
        hidden = [*self.net.hidden(self._condition(second), n_again), *kept.hidden]
        raw = self.net.last(hidden[-1]) if kept.raw is None else kept.raw
        return hidden, _Coupling.of(raw, self.coupling, second.dtype)

    def _through_net(
        self, hidden: list[Tensor], c: _Coupling, d_log_scale: Tensor, d_shift: Tensor, sums: _Sums
    ) -> Tensor:
        """dL/du_2 by way of log-scale and shift."""
        raw = c.pull(d_log_scale, d_shift).to(self.dtype)
        return self.net.backward(hidden, raw, sums.net).to(d_shift.dtype)


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
        return _Step(self.couplings[i], net, (matrix[i], bias[i]), undo, self.dtype)

    def _net(self, i: int, parameters: Sequence[Tensor]) -> _Net:
        start, parts = sum(map(sum, self.layout[:i])), []
        for n in self.layout[i]:
            parts.append(parameters[start : start + n])
            start += n
        return _Net(parts, self.dtype)

    def chunks(self, i: int, x: Tensor) -> list[slice]:
        """Images whose hidden layers fit the cache; on an accelerator, and in an exported program, the whole batch."""
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return [slice(None)]
        n = max(1, _CHUNK // (self.couplings[i].net.last.in_channels * x.shape[-2] * x.shape[-1]))
        return [slice(start, start + n) for start in range(0, len(x), n)]

    def run(self, x: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[_Memory]]:
        """(output, logdet of the couplings, the input of each step that is kept with what is kept of its chunks)."""
        logdet, kept = x.new_zeros(x.shape[0]), []
        for i in range(len(self.couplings)):
            step = self.step(i, tensors)
            outputs, logdets, memory = [], [], []
            for part in self.chunks(i, x):
                y, step_logdet, raw, hidden = (step.decode if self.backwards else step.encode)(x[part])
                outputs.append(y)
                logdets.append(step_logdet)
                if self.keep in _KEPT_LAYERS:
                    memory.append((raw, *hidden[1:][_KEPT_LAYERS[self.keep]]))
            if memory or (i == 0 and self.keep == "invert" and self.plain.guarded):
                kept.append((x, memory))
            x = _joined(outputs)
            logdet = logdet + _joined(logdets)
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
                pulled, x = (step.pull_decode if self.backwards else step.pull_encode)(memory, grad[part], b, sums)
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
        if kept:
            chain.plain.check_output([x for x, _ in kept], y)
        with torch.autocast(y.device.type, enabled=False):
            x, found = chain.backward(y, kept, tensors, needs, grad, grad_logdet)
        if not kept:
            chain.plain.check_input(x, [*start, y])
        return None, *(g if needed else None for g, needed in zip(found, needs, strict=True))


def _mixed(x: Tensor, linear: tuple[Tensor, Tensor | None]) -> Tensor:
    """The same affine map of the channels at every pixel."""
    matrix, bias = linear
    return F.conv2d(x, matrix[:, :, None, None], bias)


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    half = x.shape[1] // 2
    return x[:, :half], x[:, half:]


def _cat(first: Tensor, second: Tensor) -> Tensor:
    return torch.cat([first, second], dim=1)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
