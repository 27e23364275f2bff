"""How well the alarm tells results that are not to be trusted: area under the ROC curve, and alarms, of shipped networks.

    python benchmarks/alarm.py --faces '../shared/data/faces64/test-*.npz' --anime '../shared/data/anime64/*.npz' \
        --photographs '../shared/data/bsds500-300'

Faces measured as stated are the ones to trust. "area" compares the sum of an image's scores, which is what raises the
alarm; the areas of the single scores follow. "Alarms" is the part of the images that raise it at its level, 1 %; of faces
measured as stated these are false.

Wrong: sigma 1.25 times the stated one; the blur of sigma_blur 4, 6 or 8 where 5 is stated; a mask (of the hole's size, at
another place) other than the stated one. "hidden twice" is the latter with the pixels that the stated mask hides set to zero
too.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from flowprox import load_model, make_physics
from flowprox.data import ImageDataset
from flowprox.uncertainty import measured_estimates
from flowprox.uncertainty.alarm import total

NETWORKS = ("denoising", "deblurring", "inpainting")


def wrong_operators(name: str, parameters: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What a measurement was really made with, while the network is told otherwise."""
    if name == "inpainting":
        mask = np.ones((64, 64), dtype=np.float32)
        mask[4:23, 8:27] = 0
        yield "wrong mask", {"mask": mask}
        yield "wrong mask, hidden twice", {"mask": mask}
    else:
        yield "sigma x 1.25", parameters | {"sigma": 1.25 * parameters["sigma"]}
    if name == "deblurring":
        for sigma_blur in (4.0, 6.0, 8.0):
            yield f"sigma_blur {sigma_blur:g}", parameters | {"sigma_blur": sigma_blur}


def area(honest: Tensor, strange: Tensor) -> float:
    """Under the ROC curve of scores that should be larger for the second."""
    ranks = rankdata(torch.cat([honest, strange]).numpy())[len(honest) :]
    n, m = len(honest), len(strange)
    return float((ranks.sum() - m * (m + 1) / 2) / (n * m))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, text in (("faces", "test faces"), ("anime", "drawn faces"), ("photographs", "no faces")):
        parser.add_argument(f"--{name}", required=True, help=f"{text}: folder, shard or glob")
    parser.add_argument("--limit", type=int, default=300, help="images of each kind")
    parser.add_argument("--skip_faces", type=int, default=300, help="test faces that the scores were chosen on")
    parser.add_argument("--skip_anime", type=int, default=300, help="drawn faces that they were chosen on")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--networks", nargs="*", default=NETWORKS, choices=NETWORKS)
    given = parser.parse_args()
    sets = {kind: ImageDataset(getattr(given, kind), 64).images for kind in ("faces", "anime", "photographs")}
    first = {"faces": given.skip_faces, "anime": given.skip_anime}
    images = {kind: found[first.get(kind, 0) :][: given.limit].float() / 255 for kind, found in sets.items()}
    for name in given.networks:
        network = load_model(f"unfolded-{name}-faces64")
        alarm = load_model(f"unfolded-{name}-faces64-intervals").alarm
        flows = [network.flows()[-1], *([load_model(alarm.prior)] if alarm.prior else [])]
        print(f"{name:40}{'area':>7}" + "".join(f"{score:>15}" for score in alarm.sizes) + f"{'alarms':>9}  of")
        parameters = network.card.problem["parameters"]
        stated = make_physics(name, (3, 64, 64), **parameters)

        def scores_of(x: Tensor, really: Any, hide: bool = False) -> tuple[Tensor, Tensor]:
            found = []
            for _, y, _ in measured_estimates(lambda y, physics: y, x, really, range(given.seed, given.seed + len(x))):
                y = stated.A(y) if hide else y  # noqa: B023
                with torch.no_grad():
                    x_hat = network(y, stated)  # noqa: B023
                found.append(alarm.scores(x_hat, y, stated, *flows))  # noqa: B023
            scores = torch.cat(found)
            return scores, alarm.is_raised(scores)  # noqa: B023

        cases = {"as stated": (images["faces"], stated, False)}
        for what, others in wrong_operators(name, parameters):
            cases[what] = images["faces"], make_physics(name, (3, 64, 64), **others), what.endswith("twice")
        cases |= {kind: (images[kind], stated, False) for kind in ("anime", "photographs")}
        scores = {what: scores_of(*case) for what, case in cases.items()}
        for what, (found, raised) in scores.items():
            honest = scores["as stated"][0]
            areas = [area(honest[:, i], found[:, i]) for i in range(honest.shape[1])]
            combined = area(total(honest), total(found))
            print(
                f"{'':12}{what:28}{combined:7.3f}"
                + "".join(f"{value:15.3f}" for value in areas)
                + f"{raised.double().mean():9.3f}  {len(raised)}",
                flush=True,
            )


if __name__ == "__main__":
    main()
