"""How far an estimate may be from the truth: calibrated intervals, and checks of posteriors that can fail."""

from flowprox.noise import residual_p_value
from flowprox.uncertainty.alarm import Alarm, fit_alarm
from flowprox.uncertainty.checks import coverage, coverage_limits, crps, rank_p_value, ranks, tarp, uniform_p_value
from flowprox.uncertainty.intervals import (
    Intervals,
    ScaleNet,
    calibration_records,
    conformal_factor,
    fit_intervals,
    interval_statistics,
    measured_estimates,
    measured_intervals,
)

__all__ = [
    "Alarm", "Intervals", "ScaleNet", "calibration_records", "conformal_factor", "coverage", "coverage_limits", "crps",
    "fit_alarm", "fit_intervals", "interval_statistics", "measured_estimates", "measured_intervals", "rank_p_value",
    "ranks", "residual_p_value", "tarp", "uniform_p_value",
]  # fmt: skip
