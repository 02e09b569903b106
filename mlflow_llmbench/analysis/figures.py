"""Figures of one metric from its values: mean, percentiles, interval."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from ..records.metric import Metric
from ..stats import percentile, supports

Figures = dict[str, float | None]
"""MLflow key → value; None where the value is not known, or has no meaning for this result."""


def mean_of(values: Sequence[float]) -> float | None:
    """Arithmetic mean; None without values."""
    return fmean(values) if values else None


def distribution(metric: Metric, values: Sequence[float], rows: int = 1) -> Figures:
    """Mean and percentiles that a metric declares, those that the sample supports; empty without values.

    Each value counts as `rows` equal ones in a percentile, and as one in its support.
    """
    if not values:
        return {}
    found: Figures = {metric.key("mean"): fmean(values)} if "mean" in metric.statistics else {}
    supported = [q for q in metric.percentiles if supports(len(values), q)]
    return found | {metric.key(f"p{q}"): percentile(values, q, rows) for q in supported}


def interval_figures(metric: Metric, value: float, low: float | None, high: float | None) -> Figures:
    """The value of a metric with the ends of its 95 % interval."""
    return {metric.key(): value, metric.key("ci_low"): low, metric.key("ci_high"): high}
