"""Overhead of a server: the same configuration behind it and without it. Pure: functions of two results.

Differences are server − without, of the values of each repetition (medians of TTFT and end to end, mean TPOT), with
Welch's 95 % interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from ..records.metric import GB
from ..records.metrics import (
    ADDED_E2E,
    ADDED_MEMORY,
    ADDED_TPOT,
    ADDED_TTFT,
    E2E,
    THROUGHPUT_RATIO,
    TPOT,
    TTFT,
)
from ..records.results import RunResult
from ..stats import welch
from .figures import Figures, interval_figures
from .repetitions import PER_REPETITION, output_rate, requests, unit_values

ADDED = {
    ADDED_TTFT: (TTFT.key("p50"), "to the first token"),
    ADDED_TPOT: (TPOT.key("mean"), "to each token after it"),
    ADDED_E2E: (E2E.key("p50"), "to the whole answer"),
}
"""Metric → the metric whose difference it is, and what the server adds to in words."""

ALIKE = 0.02
"""Mean lengths that differ by more than this share are unlike; times that depend on them are not compared."""


def added(offline: RunResult, served: RunResult) -> dict[str, float]:
    """Metrics of a pair by MLflow key; those that depend on unlike lengths are absent."""
    found: Figures = {}
    prompts = _alike(
        [_length(r.prompt_tokens) for r in requests(offline)], [_length(r.prompt_tokens) for r in requests(served)]
    )
    outputs = _alike([r.output_tokens for r in requests(offline)], [r.output_tokens for r in requests(served)])
    known = {ADDED_TTFT: prompts, ADDED_TPOT: True, ADDED_E2E: prompts and outputs}
    for metric, (of, _) in ADDED.items():
        without, behind = (unit_values(one, PER_REPETITION[of]) for one in (offline, served))
        difference = welch(without, behind) if without and behind and known[metric] else None
        if difference:
            found |= interval_figures(metric, difference.difference, difference.low, difference.high)
    rates = [unit_values(one, output_rate) for one in (offline, served)]
    if rates[0] and rates[1] and prompts and outputs:
        found[THROUGHPUT_RATIO.key()] = fmean(rates[1]) / fmean(rates[0])
    peaks = [one.memory.host_needed.get("peak") for one in (offline, served)]
    if peaks[0] is not None and peaks[1] is not None:
        found[ADDED_MEMORY.key()] = (peaks[1] - peaks[0]) / GB
    return {key: value for key, value in found.items() if value is not None}


def sentence(name: str, figures: dict[str, float]) -> str:
    """The difference as a sentence for the terminal; intervals are 95 %, in ms."""
    clauses = []
    for metric, (_, words) in ADDED.items():
        if metric.key() in figures:
            value, low, high = (figures[key] for key in metric.mlflow_keys())
            clauses.append(f"{value:+.3g} ms {words} ({low:+.3g} to {high:+.3g})")
    if (ratio := figures.get(THROUGHPUT_RATIO.key())) is not None:
        clauses.append(f"throughput × {ratio:.3g}")
    if not clauses:
        return f"{name}: no metric of the server can be compared with the same model without it."
    return f"{name}: the server adds {', '.join(clauses)}."


def _length(tokens: int | None) -> float:
    return float(tokens or 0)


def _alike(a: Sequence[float], b: Sequence[float]) -> bool:
    first, second = fmean(a or [0.0]), fmean(b or [0.0])
    return first > 0 and abs(second / first - 1) <= ALIKE
