"""One call for one picture: ``flowprox.restore(image, sigma=0.1)``.

The picture is the measurement y, of an operator that is named or follows from what is given: a mask means inpainting, a
kernel deblurring, neither denoising. What comes back is of the kind that went in.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepinv.models import Reconstructor
from PIL import Image
from torch import Tensor

from flowprox.baselines import PlugAndPlay
from flowprox.checkpoints import load_model
from flowprox.data import ARRAY_SUFFIXES, load_image, load_measurement, picture_form, suffix_of
from flowprox.data.files import as_pil, form_of_pil, from_pil
from flowprox.estimates import calibration_of, channels_of, doubts_of, estimate
from flowprox.flows import Flow
from flowprox.methods import make_method
from flowprox.metrics import psnr
from flowprox.naming import Values, require_device
from flowprox.operators import PROBLEMS, Problem, make_physics, measured_part
from flowprox.operators.kinds import gray_levels
from flowprox.records import Record

Picture = str | os.PathLike[str] | Image.Image | np.ndarray | Tensor
"""A path, a PIL image, an array (H, W) or (H, W, C), or a tensor (H, W), (C, H, W) or (1, C, H, W); whole numbers of 8 or 16
bits, or floats in [0, 1]."""

DENOISER = "unfolded-denoising-natural"
"""The network that is used where none is given: by itself for denoising, else as the prior of plug and play."""


@dataclass(frozen=True)
class Restored:
    """A restored picture; notebooks show it.

    Arguments:
        image: of the kind that was given, whole numbers rounded, floats not clipped; a path gives a PIL image, that
            of an array a tensor.
        x_hat, y, x: the same, what was given, and the truth if it was given, as tensors (C, H, W), not clipped.
        psnr: in dB, both clipped to [0, 1]; None where the truth is not known.
        problem: name and parameters of the operator.
        alarm: of a calibrated network, whether the result is not to be trusted (``raised``), and its p-values; None of others.
        deviation: standard deviation of each pixel (C, H, W), of a method that samples the posterior; else None.
        reason: why a solver stopped, or that its chains have not mixed; else "".
    """

    image: Any = field(repr=False)
    x_hat: Tensor = field(repr=False)
    y: Tensor = field(repr=False)
    x: Tensor | None = field(repr=False)
    psnr: float | None
    problem: str
    alarm: Record | None = None
    deviation: Tensor | None = field(default=None, repr=False)
    reason: str = ""

    def compare(self) -> Image.Image:
        """What was given, what came out and, if known, the truth, side by side."""
        height, width = self.x_hat.shape[-2:]
        shown = [x for x in (self.y, self.x_hat, self.x) if x is not None]
        sheet = Image.new("RGB", (len(shown) * width + 4 * (len(shown) - 1), height), "white")
        for i, x in enumerate(shown):
            shown_x = as_pil(x).convert("RGB").resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(shown_x, (i * (width + 4), 0))
        return sheet

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.compare().save(buffer, "PNG")
        return buffer.getvalue()


def restore(
    image: Picture,
    problem: str | None = None,
    model: str | torch.nn.Module | None = None,
    mask: Picture | None = None,
    kernel: np.ndarray | Tensor | Image.Image | str | os.PathLike[str] | None = None,
    truth: Picture | None = None,
    device: str = "cpu",
    tile: int = 1024,
    **parameters: Any,
) -> Restored:
    """Restore one picture of any size.

    Arguments:
        image: what was measured.
        problem: its operator, a name of ``PROBLEMS`` that measures pictures; by default as mask and kernel say.
        model: a trained network, denoiser or flow, or where one is, or any method (y, physics) -> x_hat; by default the
            shipped denoiser of photographs, for other problems as the prior of plug and play.
        mask: of the size of the image; white (1) is kept, black (0) is filled in.
        kernel: the blur (h, w), odd sides and sum 1; or an .npy file, or a picture, which is scaled to sum 1.
        truth: the clean picture, to compare with.
        device: cpu, cuda or mps.
        tile: side of the tiles, in pixels, that a network computes a picture of more than tile x tile pixels in; 0: never.
        parameters: of the problem, such as ``sigma``, the noise's standard deviation where pixels lie in [0, 1], which
            denoising needs.

    Raises:
        ValueError: something does not fit; the message names it.
        OSError: a file cannot be read.

    Warns:
        UserWarning: the alarm of a calibrated model is raised, or the model was not trained for what it is used for.

    Example:
        >>> from flowprox.samples import sample_images
        >>> x = dict(sample_images())["coffee"][:, :40, :52]
        >>> y = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        >>> restored = restore(y, sigma=0.1, truth=x)
        >>> restored.image.shape == y.shape, restored.psnr > 25
        (True, True)
    """
    require_device(device)
    name = problem or ("inpainting" if mask is not None else "deblurring" if kernel is not None else "denoising")
    network = model if isinstance(model, torch.nn.Module) else load_model(model or DENOISER, device=device)
    trained = getattr(getattr(network, "card", None), "problem", None) or {}
    own = mask is not None or kernel is not None
    known = trained.get("parameters", {}) if trained.get("name") == name and not own else {}
    operator = Problem(name, known).replaced(**{**_operator_parameters(name, mask, kernel), **parameters})
    kind = PROBLEMS[name]
    if not kind.measures_pictures:
        raise ValueError(f"problem {name} measures no pictures; use flowprox reconstruct")
    is_guessed = not known and not {"mask", "mask_size"} & set(parameters)
    if name.endswith("inpainting") and mask is None and (is_guessed or kind.drawn):
        raise ValueError(f"{name} needs mask, of the size of the image: white (1) is kept, black (0) is filled in")
    if name == "denoising" and "sigma" not in {*parameters, *known} and "noise" not in parameters:
        raise ValueError("denoising needs sigma, the standard deviation of the noise where pixels lie in [0, 1]")

    y, back = _as_tensor(image, "image")
    channels = channels_of(network) or y.shape[0]
    if y.shape[0] not in (1, channels):
        raise ValueError(f"image has {y.shape[0]} channels, the model takes {channels}; convert it to gray")
    wide = y.expand(channels, -1, -1)[None].to(device, torch.float32)
    height, width = wide.shape[-2:]
    if kind.image_size is not None:
        height, width = kind.image_size(height, width, operator.parameters)
    physics = make_physics(operator, (channels, height, width), device=device)
    if name.endswith("inpainting"):
        wide = physics.A(wide)  # what the mask hides is no measurement
    method = _method(network, trained, operator, device, tile)
    check = getattr(network, "check", None)
    used_for = Problem("denoising", {"sigma": 0.0}) if isinstance(method, PlugAndPlay) else operator
    for remark in check(used_for) if check is not None else ():
        warnings.warn(remark, stacklevel=2)
    doubts = doubts_of(network, calibration_of(network, operator))
    x_hat, facts, deviation = estimate(method, wide, physics, kind, doubts=doubts)[0]
    alarm = facts.get("alarm")
    if alarm is not None and alarm["raised"]:
        p_values = ", ".join(f"{key} p {value:.2g}" for key, value in alarm.items() if key != "raised")
        reason = "it is unlike those of the images on which the model was calibrated"
        warnings.warn(f"the result is not to be trusted: {reason} ({p_values})", stacklevel=2)
    if name.endswith("inpainting") and not operator.parameters["sigma"] and operator.parameters["noise"] is None:
        kept = physics.get_buffer("mask").reshape(-1, *x_hat.shape[-2:]).cpu() > 0
        x_hat = torch.where(kept, wide[0].cpu(), x_hat)  # what is known without noise stays
    x_hat = measured_part(x_hat, wide, physics)
    deviation = None if deviation is None else measured_part(deviation, wide, physics)
    if y.shape[0] == 1:
        x_hat, deviation = x_hat.mean(0, keepdim=True), None if deviation is None else deviation.mean(0, keepdim=True)
    x = None if truth is None else _as_tensor(truth, "truth")[0].float()
    if x is not None and x.shape != x_hat.shape:
        raise ValueError(f"truth has shape {tuple(x.shape)}, the restored image {tuple(x_hat.shape)}")
    level = None if x is None else float(psnr(x_hat[None], x[None]))
    reason = str(facts.get("reason", ""))
    return Restored(back(x_hat), x_hat, y.float().cpu(), x, level, operator.label, alarm, deviation, reason)


def _operator_parameters(name: str, mask: Picture | None, kernel: object) -> Values:
    """What a photograph's operator is told: its own mask or kernel, and that nothing is known beyond its border."""
    parameters: Values = {}
    for key, value in (("mask", mask), ("kernel", kernel)):
        if value is not None and key not in PROBLEMS.get(name, PROBLEMS["denoising"]).parameters:
            raise ValueError(f"problem {name} has no use for {key}; leave it out")
    if mask is not None:
        parameters["mask"] = str(mask) if isinstance(mask, str | os.PathLike) else _seen(mask)
    if kernel is not None:
        gray = gray_levels(kernel) if isinstance(kernel, Image.Image) else None
        kernel = str(kernel) if isinstance(kernel, os.PathLike) else kernel
        parameters["kernel"] = kernel if gray is None else gray / (gray.sum() or 1.0)
    return parameters | ({"boundary": "valid"} if name == "deblurring" else {})


def _seen(mask: Image.Image | np.ndarray | Tensor) -> np.ndarray:
    """The mask (H, W) as 1 and 0; whole numbers above 1 are gray levels."""
    if isinstance(mask, Image.Image) and mask.mode[0] not in "1IF":
        mask = mask.convert("L")
    values = mask.detach().cpu().numpy() if isinstance(mask, Tensor) else np.asarray(mask)
    is_gray_level = values.dtype.kind in "iu" and values.size > 0 and values.max() > 1
    values = values / (np.iinfo(np.uint8 if values.max() < 256 else np.uint16).max if is_gray_level else 1.0)
    if values.ndim > 2:
        values = values.reshape(values.shape[-3:]).mean(-1 if values.shape[-1] in (1, 3) else 0)
    return (values > 0.5).astype(np.float32)


def _method(network: Any, trained: Values, operator: Problem, device: str, tile: int) -> Reconstructor:
    if isinstance(network, Flow):
        return make_method("latent-map", operator, flow=network, device=device)
    if hasattr(network, "solve"):  # a solver as it is
        return network
    name = "unfolded" if trained.get("name", operator.name) == operator.name else "plug-and-play"
    return make_method(name, operator, model=network, device=device, tile=tile)


def _as_tensor(picture: Picture, name: str) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """A picture as (C, H, W) in [0, 1], and the way back for a result (C, H, W) on the CPU."""
    if isinstance(picture, str | os.PathLike):
        if suffix_of(picture) in ARRAY_SUFFIXES:
            return _as_tensor(load_measurement(picture), name)
        return load_image(Path(picture)), partial(as_pil, form=picture_form(Path(picture)))
    if isinstance(picture, Image.Image):
        return from_pil(picture, name), partial(as_pil, form=form_of_pil(picture))
    if isinstance(picture, np.ndarray):
        if picture.ndim not in (2, 3):
            raise ValueError(f"{name} must have shape (H, W) or (H, W, C), got {picture.shape}")
        flat, dtype = picture.ndim == 2, picture.dtype
        # contiguous and in the machine's byte order, as torch wants it; a copy: others may be read-only
        pixels = np.array(picture if flat else np.moveaxis(picture, -1, 0), dtype=dtype.newbyteorder("="), order="C")
        pixels = pixels.astype(np.int32) if pixels.dtype == np.uint16 else pixels  # which more of torch knows
        x, back = _from_tensor(torch.from_numpy(pixels), name)
        return x, lambda x_hat: (back(x_hat).numpy() if flat else np.moveaxis(back(x_hat).numpy(), 0, -1)).astype(dtype)
    if not isinstance(picture, Tensor) or picture.ndim not in (2, 3, 4) or (picture.ndim == 4 and len(picture) != 1):
        shape = tuple(picture.shape) if isinstance(picture, Tensor) else type(picture).__name__
        raise ValueError(
            f"{name} must be a path, a PIL image, an array or a tensor (C, H, W) of one picture, got {shape}"
        )
    return _from_tensor(picture, name)


def _from_tensor(picture: Tensor, name: str) -> tuple[Tensor, Callable[[Tensor], Any]]:
    dtype, shape, device = picture.dtype, picture.shape, picture.device
    largest = {torch.uint8: 255.0, torch.uint16: 65535.0, torch.int32: 65535.0, torch.bool: 1.0}.get(dtype)
    if largest is None and not dtype.is_floating_point:
        raise ValueError(f"{name} must hold whole numbers of 8 or 16 bits, or floats in [0, 1]; got {dtype}")
    x = picture.detach().cpu().to(torch.float32).reshape(-1, *shape[-2:]) / (largest or 1.0)
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"{name} holds NaN or infinity")
    if largest is None and float(x.abs().max()) > 8:
        raise ValueError(f"{name} holds values up to {float(x.abs().max()):g}; divide by 255, floats lie in [0, 1]")
    if x.shape[0] not in (1, 3):
        raise ValueError(f"{name} must have 1 or 3 channels, got shape {tuple(shape)}; channels come first in tensors")

    def back(x_hat: Tensor) -> Tensor:
        values = x_hat if largest is None else (x_hat.clamp(0, 1) * largest).round()
        return values.reshape(*shape[:-2], *x_hat.shape[-2:]).to(device, dtype)

    return x, back
