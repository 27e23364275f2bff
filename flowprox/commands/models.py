"""The commands that show models: the demo, samples, cards."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

from flowprox.commands.tables import print_table

__all__ = ["demo", "models", "sample"]


def demo(out: str = "flowprox-demo", device: str = "cpu", seed: int = 0, overwrite: bool = False) -> None:
    """Reconstruct the bundled pictures for three problems and write a report. Needs no download.

    Arguments:
        out: folder to write; report.html in it shows the result.
        device: cpu, cuda or mps.
        seed: of the noise.
        overwrite: replace the folder if an earlier demo is in it.
    """
    from flowprox.evaluation.demo import run_demo

    print(f"report: {run_demo(out, device=device, seed=seed, overwrite=overwrite)}")


def sample(
    model: str,
    out: str = "samples.png",
    n: int = 16,
    temperature: float = 0.7,
    seed: int = 0,
    size: int | None = None,
    device: str = "cpu",
) -> None:
    """Draw images or noise from a trained flow, as one picture.

    Noise is stretched so that its lowest value is black and its highest white.

    Arguments:
        model: a shipped model (see "flowprox models"), a folder, or a hub id.
        out: PNG file to write.
        n: how many images.
        temperature: standard deviation of the latent; below 1 images are smoother.
        seed: the same seed draws the same images.
        size: height and width in pixels; by default those the flow was made for.
        device: cpu, cuda or mps.
    """
    if n < 1:
        raise ValueError(f"n must be positive, got {n}")
    if not out.lower().endswith(".png"):
        raise ValueError(f"out must end in .png, got {out!r}")
    import torch
    from torchvision.utils import make_grid

    from flowprox.checkpoints import load_model
    from flowprox.data import save_image
    from flowprox.flows import Flow
    from flowprox.noise import FlowNoise

    loaded = load_model(model, device=device)
    flow = loaded.flow if isinstance(loaded, FlowNoise) else loaded
    if not isinstance(flow, Flow):
        raise ValueError(f"model {model!r} is a {type(flow).__name__}, not a flow; see flowprox models")
    generator = torch.Generator(device).manual_seed(seed)
    x = flow.sample(n, temperature, None if size is None else (size, size), generator)
    if isinstance(loaded, FlowNoise):
        x = (x - x.amin()) / (x.amax() - x.amin())
    os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
    save_image(make_grid(x.clamp(0, 1).cpu(), nrow=math.ceil(math.sqrt(n)), padding=2, pad_value=1.0), out)
    print(f"written to {out}")


def models(name: str | None = None) -> None:
    """List the shipped models, or print the card of one.

    Arguments:
        name: a shipped model, a folder, or a hub id whose card to print.
    """
    from flowprox.checkpoints import list_models, load_card

    if name is not None:
        print(load_card(name).to_json(), end="")
        return
    cards = [load_card(name) for name in list_models()]
    if not cards:
        print("no models are shipped with this installation")
        return
    rows = [[card.name, card.model["kind"], _problem(card.problem), _trained(card)] for card in cards]
    print_table(["model", "kind", "problem", "parameters, file, validation"], rows, justify="left")


def _problem(problem: Mapping[str, Any] | None) -> str:
    if not problem:
        return "–"
    given = [f"{key} {value}" for key, value in problem.get("parameters", {}).items() if value is not None]
    given += [f"{key} {low:g} to {high:g}" for key, (low, high) in problem.get("ranges", {}).items()]
    return f"{problem.get('name')}" + (f" ({', '.join(given)})" if given else "")


def _trained(card: Any) -> str:
    """The size and the figures on a ``Card``."""
    figures = [f"{key} {value:.4g}" for key, value in card.metrics.items() if isinstance(value, float)]
    return ", ".join([f"{card.n_parameters:,}", f"{card.n_bytes / 1e6:.1f} MB", *figures])
