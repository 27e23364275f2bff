"""The command ``flowprox report``: results folders in, a page and tables out."""

from __future__ import annotations

import os
import sys

__all__ = ["report"]


def report(
    folders: list[str],
    out: str | None = None,
    metric: str = "psnr",
    parts: list[str] | None = None,
    reference: str | None = None,
    n_images: int | None = None,
    recipe: str | None = None,
    title: str | None = None,
) -> None:
    """Show finished evaluations as one HTML page and as tables; reads records only and runs no model.

    Arguments:
        folders: results folders of evaluate, the demo or a study, or files of records; those of one recipe are one chapter.
        out: folder to write report.html and tables/ to; by default the results folder, if it is one.
        metric: what tables and charts are about: psnr, psnr_unclipped, ssim or residual.
        parts: show only these: overview, curves, comparisons, cost, spread, cases, images, tuning, figures.
        reference: method that the others are compared with; by default the best of each problem.
        n_images: show the pictures of so many images of each problem; by default all there are.
        recipe: recipe with the published figures, for records without a recipe.yaml beside them.
        title: heading of the page.
    """
    from flowprox.evaluation.report import ReportOptions, read_results, write_page, write_tables

    options = ReportOptions(title, metric, parts, reference, n_images, recipe)
    results = read_results(folders, out, options)
    for note in results.notes:
        print(f"flowprox: note: {note}", file=sys.stderr)
    tables = write_tables(results)
    page = write_page(results, options)
    if tables:
        print(f"tables: {os.path.join(results.out, 'tables')} ({len(tables)} files)")
    print(f"report: {page}")
