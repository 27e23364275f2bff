r"""Does the flow know a clean image from a noisy one? Histograms of the norm of the latent.

    ||f(x + sigma n)||,   n ~ N(0, I)       a latent drawn from the base density has norm sqrt(D)

Symbols: f the flow from image x to latent, D its dimension. Asim et al. 2020, App. E: the more noise, the larger the norm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from flowprox.reconstruction import image_seed
from flowprox.studies.contract import Drawn, Record, Study, StudyRun
from flowprox.studies.drawing import new_figure, rounded

__all__ = ["NOISY_NORMS"]

_BATCH = 64


def _units(run: StudyRun) -> list[Record]:
    return [{"sigma": sigma} for sigma in run.settings["sigmas"]]


@torch.no_grad()
def _measure(run: StudyRun, unit: Record) -> Record:
    norms = []
    for start in range(0, len(run.x), _BATCH):
        x, names = run.x[start : start + _BATCH], run.names[start : start + _BATCH]
        seeds = [torch.Generator().manual_seed(image_seed(run.seed, name)) for name in names]
        noise = torch.stack([torch.randn(x.shape[1:], generator=generator) for generator in seeds]).to(x)
        norms += run.prior.encode(x + unit["sigma"] * noise).norm(dim=1).tolist()
    return {"norms": rounded(norms), "typical_norm": rounded(math.sqrt(run.x[0].numel()))}


def _draw(records: Sequence[Record]) -> Mapping[str, Drawn]:
    figure, (axis,) = new_figure(width=5.6, height=3.6)
    everything = [norm for record in records for norm in record["norms"]]
    edges = _edges(min(everything), max(everything))
    means = []
    for record in records:
        label = f"sigma {record['sigma']:g}" if record["sigma"] else "clean"
        axis.hist(record["norms"], bins=edges, alpha=0.6, label=label)
        means.append(f"{label} {sum(record['norms']) / len(record['norms']):.0f}")
    axis.axvline(records[0]["typical_norm"], color="0.4", linestyle=":", label="sqrt(D)")
    axis.set(xlabel="norm of the latent", ylabel="images", xscale="log")
    axis.legend(fontsize=8)
    drawn = Drawn(
        figure,
        "Noisy images lie far out in the latent space",
        f"Norm of the latent of {len(records[0]['norms'])} images with white noise; means: {', '.join(means)}. "
        "After Asim et al. 2020, Fig. 50.",
        f"One histogram per noise level on a logarithmic axis, further right with more noise; means: {', '.join(means)}.",
    )
    return {"noisy-norms": drawn}


def _edges(low: float, high: float, n: int = 60) -> list[float]:
    ratio = max(high / low, 1.01)
    return [low * ratio ** (i / n) for i in range(n + 1)]


_SIGMAS = [0.0, 0.01, 0.05, 0.1]
NOISY_NORMS = Study(
    "histogram of the latent norm of clean and noisy images",
    "Asim et al. 2020, Fig. 50",
    {
        "smoke": {"image_size": 16, "n_images": 3, "sigmas": [0.0, 0.1]},
        "small": {"image_size": 64, "n_images": 300, "sigmas": _SIGMAS},
        "paper": {"image_size": 64, "n_images": 3000, "sigmas": _SIGMAS},
    },
    _units,
    _measure,
    _draw,
)
