"""Token rates of a result, and the evidence behind them. Pure."""

from __future__ import annotations

from statistics import fmean

from ..records.metrics import (
    COST,
    DECODE_RATE,
    EFFECTIVE_REPETITIONS,
    OUTPUT_RATE,
    PER_INSTANCE_RATE,
    PREFILL_RATE,
    RELATIVE_HALF_WIDTH,
    REPETITIONS,
    TOTAL_RATE,
    VARIATION,
)
from ..records.results import RunResult
from ..stats import LEAST_CORRELATED, coefficient_of_variation, effective_size
from .figures import Figures
from .repetitions import (
    decode_rate,
    mean_interval,
    output_rate,
    prefill_rate,
    process_count,
    total_rate,
    unit_values,
    work_rate,
)


def throughput_figures(result: RunResult) -> Figures:
    """Token rates, means over `inference_units`; the interval and the trust metrics are over these units too."""
    rate_of = {OUTPUT_RATE: output_rate, TOTAL_RATE: total_rate, PREFILL_RATE: prefill_rate, DECODE_RATE: decode_rate}
    rates = {metric: unit_values(result, of) for metric, of in rate_of.items()}
    means = {metric.key(): fmean(values) for metric, values in rates.items() if values}
    found: Figures = {**means, REPETITIONS.key(): len(result.repetitions)}
    judged = unit_values(result, work_rate)
    if judged is None:
        return found
    mean, price = fmean(judged), result.price_per_hour
    may_correlate = process_count(result) == 1 and len(judged) >= LEAST_CORRELATED
    low, high = mean_interval(result, judged) or (None, None)
    of_tokens: Figures = {
        PER_INSTANCE_RATE.key(): mean / result.cell.batch_size,
        OUTPUT_RATE.key("ci_low"): None if low is None else max(low, 0.0),  # Student's interval may be below 0
        OUTPUT_RATE.key("ci_high"): high,
    }
    has_tokens = rates[OUTPUT_RATE] is not None
    return (found | of_tokens if has_tokens else found) | {
        RELATIVE_HALF_WIDTH.key(): None if low is None or high is None or not mean else (high - low) / 2 / mean,
        EFFECTIVE_REPETITIONS.key(): effective_size(judged) if may_correlate else None,
        VARIATION.key(): coefficient_of_variation(judged),
        COST.key(): None if price is None or not has_tokens else price / (mean * 3600) * 1e6,
    }
