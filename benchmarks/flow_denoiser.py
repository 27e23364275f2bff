"""What a flow is worth as a denoiser: shrinking the latent, a Wiener filter with the flow's spectrum, and ``FlowDenoiser``.

    python benchmarks/flow_denoiser.py --data FOLDER/val-*.npz --out runs/flow-denoiser [--flow glow-faces64] [--limit 8]

An evaluation with two methods of its own; what is recorded in ``--out`` is not done again. Prints a Markdown table of the mean
PSNR in dB; the shrinkage is g(f(y) / (1 + w)) for w > 0 of a grid.
"""

from __future__ import annotations

import argparse

from deepinv.models import Reconstructor
from deepinv.physics import Physics
from torch import Tensor

from flowprox.evaluation.run import evaluate
from flowprox.flows import Flow
from flowprox.methods import METHODS, Method
from flowprox.options import EvaluatedMethod, EvaluatedProblem, EvaluationOptions, ImageOptions
from flowprox.priors import FlowDenoiser, FlowPrior
from flowprox.summary import summary_markdown, summary_rows

WEIGHTS = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0]


class Shrinkage(Reconstructor):
    """x_hat = g(f(y) / (1 + w))."""

    def __init__(self, flow: Flow, w: float) -> None:
        super().__init__()
        self.prior, self.w = FlowPrior(flow), w

    def forward(self, y: Tensor, physics: Physics) -> Tensor:  # type: ignore[override]
        return self.prior.prox(y, gamma=self.w)


class MostLikely(Reconstructor):
    """``FlowDenoiser``; with n_steps 0 its start, a Wiener filter with the flow's spectrum."""

    def __init__(self, flow: Flow, n_steps: int) -> None:
        super().__init__()
        self.denoiser = FlowDenoiser(flow, n_steps=n_steps)

    def forward(self, y: Tensor, physics: Physics) -> Tensor:  # type: ignore[override]
        return self.denoiser(y, physics.noise_model.sigma)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--flow", default="glow-faces64")
    parser.add_argument("--limit", type=int, default=8)
    parser.add_argument("--sigmas", type=float, nargs="+", default=[0.05, 0.1, 0.2])
    parser.add_argument("--out", default="runs/flow-denoiser", help="folder of the records")
    options = parser.parse_args()
    METHODS["shrinkage"] = Method(Shrinkage, "the latent, shrunk", ("denoising",))
    METHODS["most-likely"] = Method(MostLikely, "the most likely latent", ("denoising",))
    recipe = EvaluationOptions(
        ImageOptions(options.data, limit=options.limit),
        [EvaluatedProblem("denoising", series={"sigma": options.sigmas})],
        [
            EvaluatedMethod("measurement", "noisy"),
            EvaluatedMethod("shrinkage", flow=options.flow, series={"w": WEIGHTS}),
            EvaluatedMethod("most-likely", flow=options.flow, series={"n_steps": [0, 20, 40]}),
        ],
        name="flow-denoiser",
        out=options.out,
    )
    print(summary_markdown(summary_rows(evaluate(recipe))))


if __name__ == "__main__":
    main()
