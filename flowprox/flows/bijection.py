"""Invertible maps with a tractable Jacobian determinant, and their composition.

    z, logdet = f.forward(x)        logdet = log|det Df(x)|,   shape (B,)
    x, logdet = f.inverse(z)        logdet = log|det Df^-1(z)|, shape (B,)

so that the change of variables reads log p(x) = log p_base(f(x)) + log|det Df(x)|. Symbols: x image (B, C, H, W),
z latent, B batch. Both directions always return value and log-determinant; ``encode`` and ``decode`` are the value
alone, for callers (every prox) that have no use for the determinant.

Values that are not finite are reported by ``NonFiniteError``. On an accelerator a look at a value makes the host wait: a call
by itself (``flow.log_prob(x)``) looks before it returns, a loop gathers flags on the device and looks when it reads its own
results (``gathered_checks``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

__all__ = ["Bijection", "FiniteChecks", "NonFiniteError", "Sequential", "check_finite", "gathered_checks"]


class NonFiniteError(ArithmeticError):
    """A value became NaN or infinite inside a flow; the message names the block and the direction."""


class Bijection(nn.Module):
    """Contract of every invertible layer.

    A subclass implements ``forward`` and ``inverse``. It may override ``encode`` and ``decode`` where the value is
    cheaper without the determinant.
    """

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map x (B, C, H, W) to (z, logdet): z of the layer's output shape, logdet = log|det Df(x)| of shape (B,)."""
        raise NotImplementedError

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Map z back to (x, logdet): logdet = log|det Df^-1(z)| of shape (B,), the negative of forward's at x."""
        raise NotImplementedError

    def encode(self, x: Tensor) -> Tensor:
        """The value of ``forward`` alone."""
        return self.forward(x)[0]

    def decode(self, z: Tensor) -> Tensor:
        """The value of ``inverse`` alone."""
        return self.inverse(z)[0]


class Sequential(Bijection):
    """Composition of bijections, applied left to right in ``forward``.

    Example:
        >>> from flowprox.flows import Conv1x1, Squeeze
        >>> f = Sequential([Squeeze(), Conv1x1(12)])
        >>> x = torch.rand(2, 3, 8, 8)
        >>> z, logdet = f(x)
        >>> bool(torch.allclose(f.inverse(z)[0], x, atol=1e-5))
        True
    """

    def __init__(self, layers: Iterable[Bijection]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logdet = x.new_zeros(x.shape[0])
        for layer in self.layers:
            x, layer_logdet = layer(x)
            logdet = logdet + layer_logdet
        return x, logdet

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        logdet = z.new_zeros(z.shape[0])
        for layer in reversed(self.layers):
            z, layer_logdet = layer.inverse(z)  # type: ignore[operator]
            logdet = logdet + layer_logdet
        return z, logdet

    def encode(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer.encode(x)  # type: ignore[operator]
        return x

    def decode(self, z: Tensor) -> Tensor:
        for layer in reversed(self.layers):
            z = layer.decode(z)  # type: ignore[operator]
        return z


class FiniteChecks:
    """Flags on the device, one per block and direction: whether a value there was not finite."""

    def __init__(self) -> None:
        self._flags: dict[tuple[str, str, torch.device], Tensor] = {}

    def add(self, value: Tensor, block: str, direction: str) -> None:
        """Note whether ``value`` is finite: one reduction, no host read. Flags are updated in place, as CUDA graphs need."""
        with torch.inference_mode(False), torch.no_grad():
            total = value.detach().sum(dtype=torch.promote_types(value.dtype, torch.float32))
            flag = torch.isfinite(total).logical_not()
            gathered = self._flags.setdefault((block, direction, value.device), flag)
            if gathered is not flag:
                gathered.logical_or_(flag)

    def report(self) -> None:
        """Read all flags at once and lower them; a NonFiniteError names the first block and direction whose flag was up."""
        if not self._flags:
            return
        flags = list(self._flags.values())
        found = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist()
        for (block, direction, _), is_bad in zip(self._flags, found, strict=True):
            if is_bad:
                for flag in flags:
                    flag.zero_()
                raise NonFiniteError(f"{block} gave a non-finite value in the {direction} direction; {REMEDY}")


REMEDY = "check the input for NaN, and train with a tighter bound on the log-scale or a smaller learning rate"
_GATHERED: ContextVar[FiniteChecks | None] = ContextVar("gathered checks", default=None)


@contextmanager
def gathered_checks() -> Iterator[FiniteChecks]:
    """Within the block no flow looks at its values; the flags it raises are read by ``report`` and at the end of the block.

    Blocks nest (the inner one gathers), and each thread has its own.

    Example:
        >>> from flowprox.flows import Glow
        >>> flow = Glow((3, 8, 8), n_levels=1, n_steps=1, hidden_channels=4).eval()
        >>> with gathered_checks() as checks:
        ...     z = flow.encode(torch.full((1, 3, 8, 8), float("nan")))
        ...     try:
        ...         checks.report()
        ...     except NonFiniteError as error:
        ...         print(str(error).split(";")[0])
        Glow gave a non-finite value in the forward direction
    """
    checks = FiniteChecks()
    token = _GATHERED.set(checks)
    try:
        yield checks
    finally:
        _GATHERED.reset(token)
    checks.report()


def current_checks() -> FiniteChecks | None:
    """Those of the innermost ``gathered_checks`` block."""
    return _GATHERED.get()


def check_finite(value: Tensor, block: str, direction: str) -> Tensor:
    """Return ``value`` unchanged; where it is not finite, ``NonFiniteError`` names the block and the direction.

    It is raised at once, at the price of one host read, or within ``gathered_checks`` later. Nothing is read, nor reported,
    in a program that is compiled or captured as a CUDA graph outside of such a block.
    """
    gathered = current_checks()
    is_captured = gathered is None and value.is_cuda and torch.cuda.is_current_stream_capturing()
    if not (torch.compiler.is_compiling() or is_captured):
        checks = FiniteChecks() if gathered is None else gathered
        checks.add(value, block, direction)
        if gathered is None:
            checks.report()
    return value
