"""One method on measurements of one operator: the estimates, how good they are, and what they cost.

    x_hat_i = method(y_i)  ->  PSNR, SSIM, residual, seconds, peak memory

Symbols: y_i measurement of image i, x_hat_i its estimate.
"""

from __future__ import annotations

import inspect
import math
import re
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from deepinv.models import Reconstructor
from deepinv.physics import Inpainting, Physics
from torch import Tensor, nn

from flowprox.checkpoints import Card, list_models, load_card, load_model
from flowprox.flows import Flow, NonFiniteError
from flowprox.metrics import best_scaled, psnr, ssim
from flowprox.naming import Values
from flowprox.operators import Fitted, Problem, ProblemKind
from flowprox.priors import ReconstructorDenoiser
from flowprox.records import Record
from flowprox.solvers import Solution, SolverInterrupted
from flowprox.uncertainty import Intervals, residual_p_value
from flowprox.unfolding import Unfolded

Doubts = Callable[[Tensor, Tensor, Physics], list[Record]]
"""x_hat (B, C, H, W), y, physics -> of each image whether an alarm is raised, and its p-values."""

_SSIM_SIDE = 11
_HARDLY_LOUDER = 1.05  # a level that is so far off, or an estimate that leaves as much, is nothing to warn of


class Estimate(NamedTuple):
    """What a method makes of one measurement: x_hat (C, H, W) on the processor; facts, figures where the truth is known,
    cost, and what a solver says about itself; deviation of each pixel (C, H, W), from a method that samples the posterior."""

    x_hat: Tensor
    facts: Record
    deviation: Tensor | None


def divisor_of(method: nn.Module) -> int:
    """What height and width must be multiples of; a ``ReconstructorDenoiser`` takes any."""
    if isinstance(method, ReconstructorDenoiser):
        return 1
    return math.lcm(int(getattr(method, "divisor", 1)), *(divisor_of(part) for part in method.children()))


@torch.no_grad()
def estimate(
    method: Reconstructor,
    y: Tensor,
    physics: Physics,
    kind: ProblemKind,
    x: Tensor | None = None,
    callback: Callable[[int, int], None] | None = None,
    doubts: Doubts | None = None,
) -> list[Estimate]:
    """The estimates of a batch of measurements, their figures and cost.

    A method that does not take the image's sides gets an extended measurement, and its estimate is cropped.

    Arguments:
        method: ``x_hat = method(y, physics)``; a solver's ``solve`` is used where there is one.
        y: measurements (B, ...).
        physics: their operator.
        kind: what it is.
        x: the images (B, C, H, W) behind them, if they are known.
        callback: called by a solver after every evaluation, and after every tile of a large picture, with their number and
            the most there can be.
        doubts: what the estimates are looked at with, see ``doubts_of``.

    Raises:
        NonFiniteError: an estimate holds NaN or infinity.
        ValueError: what the method refuses.
    """
    divisor = divisor_of(method)
    fitted = Fitted(y, physics, slice(None), slice(None))  # type: ignore[arg-type]
    if kind.extend is not None and divisor > 1:
        fitted = kind.extend(y, physics, divisor)  # type: ignore[arg-type]
    solve = getattr(method, "solve", method)
    takes = inspect.signature(getattr(method, "solve", method.forward)).parameters
    progress = {"callback": callback} if "callback" in takes else {}
    if y.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(y.device)
    elif sys.platform == "linux":  # elsewhere the mark stays that of the whole run
        with suppress(OSError):  # not allowed in some containers: the mark then includes earlier methods
            Path("/proc/self/clear_refs").write_text("5")
    _wait(y.device)
    started = time.perf_counter()
    try:
        found = solve(fitted.y, fitted.physics, **progress)
    except SolverInterrupted as error:  # of a long solve the best so far is worth keeping
        found = error.solution
    _wait(y.device)
    seconds = (time.perf_counter() - started) / len(y)
    solution = found if isinstance(found, Solution) else None
    x_hat = (found.estimate if isinstance(found, Solution) else found)[..., fitted.rows, fitted.columns]
    if not torch.isfinite(x_hat).all():
        raise NonFiniteError("the estimate is not finite; the measurement may be unlike those of training")
    facts: list[Record] = [{} for _ in x_hat]
    for key, name in (("reason", "reasons"), *((key, key) for key in ("n_evaluations", "gamma", "restarts"))):
        values = getattr(solution, name, None)  # per image what a solver says about itself
        if values is not None:
            for fact, value in zip(facts, values.tolist() if isinstance(values, Tensor) else values, strict=True):
                fact[key] = value
    if x is not None:
        facts = [figure | fact for figure, fact in zip(figures(x_hat, x, y, physics, kind), facts, strict=True)]
    p_values = residual_p_value(x_hat, y, physics, _HARDLY_LOUDER)
    if p_values is not None:
        facts = [fact | {"residual_p_value": p} for fact, p in zip(facts, p_values.tolist(), strict=True)]
    if doubts is not None:
        facts = [fact | {"alarm": alarm} for fact, alarm in zip(facts, doubts(x_hat, y, physics), strict=True)]
    shared = {"seconds": seconds, "peak_memory_mib": _peak_mib(y.device), "batch": len(y)}
    deviation = getattr(solution, "std", None)
    deviations = [None] * len(y) if deviation is None else deviation[..., fitted.rows, fitted.columns].cpu()
    return [
        Estimate(one, fact | shared | {"device": str(y.device)}, std)
        for one, fact, std in zip(x_hat.cpu(), facts, deviations, strict=True)
    ]


def problem_of(trained: Mapping[str, Any], name: str | None, parameters: Values, whose: str) -> Problem:
    """The problem of that name, by default the one in a model's card (``trained``), whose parameters hold where no others are
    given; ValueError where no problem is known, with ``whose`` it is."""
    name = name or trained.get("name")
    if name is None:
        raise ValueError(f"{whose} is for no problem in particular; give one with problem")
    known = trained.get("parameters", {}) if name == trained.get("name") else {}
    return Problem(name, known).replaced(**parameters)


def channels_of(model: nn.Module) -> int | None:
    """Channels of the images that a model takes, if a flow in it or its card tells."""
    card: Card | None = getattr(model, "card", None)
    if card is not None:
        trained_on = card.training.get("recipe", {}).get("data", {})  # a ResNet or U-Net does not tell
        if known := card.preprocessing.get("channels") or trained_on.get("channels"):
            return int(known)
    return next((part.n_channels for part in model.modules() if isinstance(part, Flow)), None)


def calibration_of(network: object, problem: Problem, seed: int = 0) -> Intervals | None:
    """The intervals, alarm and density that ship with a trained network; None if not for its weights, the problem and the
    seed of what is drawn with the operator."""
    card = getattr(network, "card", None)
    if not isinstance(network, Unfolded) or card is None or (name := f"{card.name}-intervals") not in list_models():
        return None
    shipped: Intervals = load_model(name, device=network.log_shrinkage.device)
    try:
        shipped.check(card.sha256, problem, seed)
    except ValueError:  # they are for another problem
        return None
    alarm, prior_sha256 = shipped.alarm, shipped.card.training.get("prior_sha256")
    if alarm is not None and alarm.prior is not None and load_card(alarm.prior).sha256 != prior_sha256:
        warnings.warn(f"no alarm: another model {alarm.prior!r} stands before the prior it was made with", stacklevel=2)
        shipped.alarm = None
    return shipped


def doubts_of(network: object, calibration: Intervals | None) -> Doubts | None:
    """The alarm of a trained network, if its calibration has one; ValueError where its prior has other weights by now."""
    if calibration is None or (alarm := calibration.alarm) is None or not isinstance(network, Unfolded):
        return None
    if not (flows := network.flows()[-1:]):
        return None
    if alarm.prior is not None:
        flows.append(load_model(alarm.prior, device=network.log_shrinkage.device))
        known, own = calibration.card.training.get("prior_sha256"), flows[1].card.sha256
        if own != known:
            raise ValueError(
                f"the alarm was made with a prior {alarm.prior!r} of hash {known!s:.12}, not {own:.12}; make another with "
                "flowprox calibrate --intervals"
            )
    return lambda x_hat, y, physics: alarm.records(x_hat, y, physics, *flows)


def figures(x_hat: Tensor, x: Tensor, y: Tensor, physics: Physics, kind: ProblemKind) -> list[Record]:
    """Per image: PSNR clipped and not, of masked images also of the hidden pixels alone, SSIM, root mean square of y - A x_hat.

    Where measurements say nothing about brightness, every method's estimate is scaled to fit the truth first.

    Raises:
        ValueError: the shapes differ.
    """
    if x_hat.shape != x.shape:
        raise ValueError(f"the estimate has shape {tuple(x_hat.shape)}, the images {tuple(x.shape)}")
    residual = (y - physics.A(x_hat)).abs().flatten(1).square().mean(1).sqrt()
    if kind.loses_scale:
        x_hat = best_scaled(x_hat, x)
    columns = {"psnr": psnr(x_hat, x), "psnr_unclipped": psnr(x_hat, x, clip=False), "residual": residual}
    if min(x.shape[-2:]) >= _SSIM_SIDE:
        columns["ssim"] = ssim(x_hat, x)
    if isinstance(physics, Inpainting):
        hidden = (physics.get_buffer("mask") == 0).expand_as(x)
        if hidden.any():  # the mean over all pixels is that over the hidden ones times their share
            columns["psnr_hidden"] = (
                psnr(torch.where(hidden, x_hat, x), x) + 10 * hidden.double().flatten(1).mean(1).log10()
            )
    lists = {key: values.cpu().tolist() for key, values in columns.items()}
    scaled = {"scaled_to_fit": True} if kind.loses_scale else {}
    return [{key: values[i] for key, values in lists.items()} | scaled for i in range(len(x))]


def _peak_mib(device: torch.device) -> float | None:
    """Most memory in use since: on a GPU of its tensors, on the CPU of the whole process, weights and libraries included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status").read_text() if sys.platform == "linux" else ""
    mark = re.search(r"VmHWM:\s*(\d+) kB", status)
    return int(mark[1]) / 1024 if mark else None


def _wait(device: torch.device) -> None:
    """Until the device's queue is empty."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
