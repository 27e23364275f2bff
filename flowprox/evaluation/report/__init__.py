"""Shows the results of an evaluation: one HTML page, tables, figures. No model is run, nothing is loaded from the network.

A results folder holds ``records.jsonl``, one line per reconstruction with the keys problem, method, image, psnr (dB),
ssim, seconds (optional: group, a kind of image; and what ``flowprox evaluate`` adds), ``images/`` with the pictures under
the names that ``picture_path`` gives, and optionally ``recipe.yaml`` with the published figures, ``tuning.jsonl``, and
``figures/`` with drawn figures and their captions in ``figures.json``. The method named "measurement" is the degraded
input itself.
"""

from flowprox.evaluation import PARTS, ReportOptions
from flowprox.evaluation.report.page import Results, read_results, write_page, write_report, write_tables
from flowprox.evaluation.report.pictures import MEASUREMENT, picture_path, truth_path

__all__ = [
    "MEASUREMENT", "PARTS", "ReportOptions", "Results", "picture_path", "read_results", "truth_path", "write_page",
    "write_report", "write_tables",
]  # fmt: skip
