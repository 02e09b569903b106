"""Figures of one metric from its values: mean, percentiles, interval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from statistics import fmean
from typing import Concatenate, ParamSpec, TypeVar

from ..records.metric import Metric
from ..records.results import RunResult
from ..stats import percentile, supports

P = ParamSpec("P")
T = TypeVar("T")

Figures = dict[str, float | None]
"""MLflow key → value; None where the value is not known, or has no meaning for this result."""


def once_per_result(function: Callable[Concatenate[RunResult, P], T]) -> Callable[Concatenate[RunResult, P], T]:
    """Keep the values of a pure function with the result they were computed for, which is immutable.

    Report, upload, table and sweep all need the summary and the verdict of a cell, and each comparison its values.
    Further arguments are hashable and given by their places.
    """
    name = f"{function.__module__}.{function.__name__}"

    @wraps(function)
    def kept(result: RunResult, /, *further: P.args, **none: P.kwargs) -> T:
        known: dict[object, T] = result.__dict__.setdefault(name, {})
        if further not in known:
            known[further] = function(result, *further, **none)
        return known[further]

    return kept


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
