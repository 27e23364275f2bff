"""Where a denoiser of photographs loses to FFDNet on small pictures: at the border, or for what the pictures show.

    (a) squares that were made small (cbsd68-64), as they are, and mirrored beyond their border before they are denoised
    (b) the middle of full-size photographs, cut out first, and cut out of the denoised photograph

If (b) shows no difference and mirroring in (a) helps nothing, the border is not to blame.

    python benchmarks/borders.py --data ../shared/data
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from flowprox import load_model
from flowprox.baselines import FFDNet
from flowprox.data import load_image
from flowprox.evaluation.plan import image_seed
from flowprox.metrics import psnr
from flowprox.operators import make_physics, measure_each

SIDE, RING, MARGIN = 64, 8, 16


def middle(x: Tensor, side: int = SIDE) -> Tensor:
    """The central square."""
    top, left = ((n - side) // 2 for n in x.shape[-2:])
    return x[..., top : top + side, left : left + side]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--limit", type=int, default=None, help="of the photographs in (b)")
    options = parser.parse_args()
    network = load_model("unfolded-denoising-natural").eval()
    methods = {"unfolded-natural": network, "ffdnet": FFDNet()}
    ring = torch.ones(SIDE, SIDE, dtype=torch.bool)
    ring[RING:-RING, RING:-RING] = False
    paths = sorted((options.data / "cbsd68").iterdir())[: options.limit]
    small = [p for p in sorted((options.data / "cbsd68-64").iterdir()) if p.suffix == ".png"]
    print("| sigma | method | pictures | all | border of 8 | within |\n|---|---|---|---|---|---|")
    for level in (15, 25, 50):
        physics = make_physics("denoising", (3, SIDE, SIDE), sigma=level / 255)
        for label, method in methods.items():
            rows: dict[str, list[tuple[Tensor, Tensor]]] = {}
            for path in small:
                x = load_image(path)[None]
                y = measure_each(x, physics, [image_seed(0, path.stem)])
                wide = torch.nn.functional.pad(y, [MARGIN] * 4, mode="reflect")
                rows.setdefault("made small", []).append((method(y, physics), x))
                rows.setdefault("made small, mirrored by 16", []).append((middle(method(wide, physics)), x))
            for path in paths:
                x = load_image(path)[None]
                y = measure_each(x, physics, [image_seed(0, path.stem)])
                rows.setdefault("cut out first", []).append((method(middle(y), physics), middle(x)))
                rows.setdefault("cut out of the whole", []).append((middle(method(y, physics)), middle(x)))
            for name, pairs in rows.items():
                x_hat, x = (torch.cat(parts) for parts in zip(*pairs, strict=True))
                shown = [
                    psnr(x_hat, x),
                    *(psnr(x_hat[..., where, None], x[..., where, None]) for where in (ring, ~ring)),
                ]
                print(
                    f"| {level} | {label} | {name} | " + " | ".join(f"{p.mean():.2f}" for p in shown) + " |", flush=True
                )


if __name__ == "__main__":
    main()
