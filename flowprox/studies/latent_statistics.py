r"""Are the latents of images what the prior takes them for? Their moments beside those of the standard normal.

    z = f(x~),   x~ = (floor(256 x) + u) / 256,   u uniform in [0, 1)        p(z) = N(0, I): mean 0, deviation 1, excess
                                                                            kurtosis 0, norm sqrt(D) +- 1/sqrt(2)

Symbols: f the flow from image x to latent z, D its dimension. Each latent channel of each level is summed up over images and
pixels. What likelihood training has not made Gaussian is what MAP in latent space gets wrong.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flowprox.flows import frozen
from flowprox.reconstruction import image_seed
from flowprox.studies.contract import Drawn, Record, Study, StudyRun
from flowprox.studies.drawing import new_figure, rounded

__all__ = ["LATENT_STATISTICS"]

_BATCH = 64
_EDGES = torch.linspace(-5.0, 5.0, 81)


def _units(run: StudyRun) -> list[Record]:
    return [{"base": "standard normal"}]


@torch.no_grad()
def _measure(run: StudyRun, unit: Record) -> Record:
    flow, bits, latents = run.prior, [], []
    with frozen(flow):
        for start in range(0, len(run.x), _BATCH):
            x = _dequantized(run.x[start : start + _BATCH], run.names[start : start + _BATCH], run.seed)
            latents.append(flow.encode_image(x).double().cpu())
            bits += flow.bits_per_dimension(x).tolist()
    z = torch.cat(latents)
    groups = flow.latent_groups((z.shape[-2], z.shape[-1])).cpu()
    channels = [z[:, groups == group] for group in groups.unique().tolist()]
    inside = torch.histogram(z.flatten().float(), _EDGES).hist
    return {
        "n_images": len(z),
        "bits_per_dimension": rounded(sum(bits) / len(bits)),
        "bits_standard_error": rounded(float(torch.tensor(bits).std(correction=0)) / math.sqrt(len(bits))),
        "levels": [_level(values.shape[1], z[0, 0].numel()) for values in channels],
        "means": rounded([float(values.mean()) for values in channels]),
        "deviations": rounded([float(values.std(correction=0)) for values in channels]),
        "kurtoses": rounded([_excess_kurtosis(values) for values in channels]),
        "density": rounded(inside / (z.numel() * (_EDGES[1] - _EDGES[0]))),
        "beyond": rounded(float((z.abs() > float(_EDGES[-1])).double().mean())),
        "norms": rounded(z.flatten(1).norm(dim=1)),
        "typical_norm": rounded(math.sqrt(z[0].numel())),
    }


def _dequantized(x: Tensor, names: Sequence[str], seed: int) -> Tensor:
    generators = [torch.Generator().manual_seed(image_seed(seed, name)) for name in names]
    u = torch.stack([torch.rand(x.shape[1:], generator=generator) for generator in generators]).to(x)
    return ((x * 256).floor().clamp_(max=255) + u) / 256


def _level(n_values: int, n_pixels: int) -> int:
    """A channel of level l has 1 / 4^l of the image's pixels."""
    return round(math.log(n_pixels / n_values, 4))


def _excess_kurtosis(values: Tensor) -> float:
    centered = values - values.mean()
    return float(centered.pow(4).mean() / centered.square().mean().square().clamp(min=1e-30)) - 3


def _draw(records: Sequence[Record]) -> Mapping[str, Drawn]:
    (record,) = records
    figure, (values, spread, norms) = new_figure(3, width=3.6)
    centers = (_EDGES[1:] + _EDGES[:-1]) / 2
    values.plot(centers, record["density"], label="latents")
    values.plot(centers, (-centers.square() / 2).exp() / math.sqrt(2 * math.pi), color="0.4", ls=":", label="N(0, 1)")
    values.set(xlabel="latent value", ylabel="density", yscale="log", ylim=(1e-6, 1))
    values.legend(fontsize=8)
    for level in sorted(set(record["levels"])):
        chosen = [i for i, other in enumerate(record["levels"]) if other == level]
        points = [[record[name][i] for i in chosen] for name in ("means", "deviations")]
        spread.scatter(*points, s=18, label=f"level {level}")
    spread.plot(0, 1, "k+", markersize=12)
    spread.set(xlabel="mean of a channel", ylabel="standard deviation")
    spread.legend(fontsize=8)
    norms.hist(record["norms"], bins=40, label="images")
    norms.axvline(record["typical_norm"], color="0.4", linestyle=":", label="sqrt(D)")
    norms.set(xlabel="norm of the latent", ylabel="images")
    norms.legend(fontsize=8)
    mean = sum(record["norms"]) / len(record["norms"])
    facts = (
        f"{record['n_images']} images, {record['bits_per_dimension']:.3f} bits per dimension; mean norm {mean:.1f} "
        f"(sqrt(D) = {record['typical_norm']:.1f}); deviations of the channels {min(record['deviations']):.2f} to "
        f"{max(record['deviations']):.2f}"
    )
    drawn = Drawn(
        figure,
        "Latents beside the standard normal",
        f"All values, mean and deviation of each channel, and norms: {facts}.",
        f"Three panels: density of latent values with that of N(0, 1), a point per channel, a histogram of norms. {facts}.",
    )
    return {"latent-statistics": drawn}


LATENT_STATISTICS = Study(
    "moments and norms of the latents of images, bits per dimension",
    "Asim et al. 2020, App. E; Kingma and Dhariwal 2018, Sec. 5",
    {
        "smoke": {"image_size": 16, "n_images": 3},
        "small": {"image_size": 64, "n_images": 1500},
        "paper": {"image_size": 64, "n_images": 1500},
    },
    _units,
    _measure,
    _draw,
)
