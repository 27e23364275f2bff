"""How far an estimate may be from the truth: calibrated intervals, and checks of posteriors that can fail."""

from flowprox.uncertainty.checks import (
    coverage,
    coverage_limits,
    crps,
    rank_p_value,
    ranks,
    tarp,
    uniform_p_value,
)
from flowprox.uncertainty.intervals import (
    Intervals,
    ScaleNet,
    conformal_factor,
    fit_intervals,
    interval_statistics,
    measured_intervals,
)

__all__ = [
    "Intervals",
    "ScaleNet",
    "conformal_factor",
    "coverage",
    "coverage_limits",
    "crps",
    "fit_intervals",
    "interval_statistics",
    "measured_intervals",
    "rank_p_value",
    "ranks",
    "tarp",
    "uniform_p_value",
]
