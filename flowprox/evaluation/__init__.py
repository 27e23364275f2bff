"""Methods compared: ``plan`` says which, ``run`` runs them, ``report`` shows what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PARTS = ("overview", "curves", "comparisons", "cost", "spread", "calibration", "cases", "images", "tuning", "figures")
"""What a report may show besides the table of each problem."""


@dataclass
class ReportOptions:
    """What a report shows.

    Arguments:
        title: heading of the page.
        metric: what tables and charts are about: psnr, psnr_unclipped, psnr_hidden, ssim or residual.
        parts: show only these: overview, curves, comparisons, cost, spread, calibration, cases, images,
            tuning, figures.
        reference: method that the others are compared with; by default the best of each problem.
        n_images: show the pictures of so many images of each problem; by default all there are.
        recipe: recipe with the published figures, for records without a recipe.yaml beside them.
    """

    title: str | None = None
    metric: str = "psnr"
    parts: Sequence[str] | None = None
    reference: str | None = None
    n_images: int | None = None
    recipe: str | Path | None = None

    def shows(self, part: str) -> bool:
        """Whether a part is wanted."""
        return self.parts is None or part in self.parts
