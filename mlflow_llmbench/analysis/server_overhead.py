"""Overhead of a server: the same configuration behind it and without it. Pure: functions of two results.

Differences are server − without, of the values of each repetition (medians of TTFT and end to end, mean TPOT), with
Welch's 95 % interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from ..records.results import RunResult
from ..stats import welch
from .repetitions import PER_REPETITION, requests, unit_values

ADDED = {
    "twin/added_ttft_ms": "latency/ttft_ms_p50",
    "twin/added_tpot_ms": "latency/tpot_ms_mean",
    "twin/added_e2e_ms": "latency/e2e_ms_p50",
}
"""Metric → the metric whose difference it is."""

ALIKE = 0.02
"""Mean lengths that differ by more than this share are unlike; times that depend on them are not compared."""


def added(offline: RunResult, served: RunResult) -> dict[str, float]:
    """Metrics of a pair by MLflow key; those that depend on unlike lengths are absent."""
    found: dict[str, float] = {}
    prompts = _alike(
        [_length(r.prompt_tokens) for r in requests(offline)], [_length(r.prompt_tokens) for r in requests(served)]
    )
    outputs = _alike([r.output_tokens for r in requests(offline)], [r.output_tokens for r in requests(served)])
    known = {"twin/added_ttft_ms": prompts, "twin/added_tpot_ms": True, "twin/added_e2e_ms": prompts and outputs}
    for key, of in ADDED.items():
        without, behind = (unit_values(one, PER_REPETITION[of]) for one in (offline, served))
        difference = welch(without, behind) if without and behind and known[key] else None
        if difference:
            found |= {key: difference.difference, f"{key}_ci_low": difference.low, f"{key}_ci_high": difference.high}
    rate = PER_REPETITION["throughput/output_tokens_per_s"]
    rates = [unit_values(one, rate) for one in (offline, served)]
    if rates[0] and rates[1] and prompts and outputs:
        found["twin/throughput_ratio"] = fmean(rates[1]) / fmean(rates[0])
    peaks = [one.memory.host_needed.get("peak") for one in (offline, served)]
    if peaks[0] is not None and peaks[1] is not None:
        found["twin/added_host_needed_bytes"] = peaks[1] - peaks[0]
    return found


def sentence(name: str, figures: dict[str, float]) -> str:
    """The difference as a sentence for the terminal; intervals are 95 %, in ms."""
    words = {
        "twin/added_ttft_ms": "to the first token",
        "twin/added_tpot_ms": "to each token after it",
        "twin/added_e2e_ms": "to the whole answer",
    }
    told = [
        f"{figures[key]:+.3g} ms {what} ({figures[f'{key}_ci_low']:+.3g} to {figures[f'{key}_ci_high']:+.3g})"
        for key, what in words.items()
        if key in figures
    ]
    told += [f"throughput × {figures['twin/throughput_ratio']:.3g}"] if "twin/throughput_ratio" in figures else []
    if not told:
        return f"{name}: no metric of the server can be compared with the same model without it."
    return f"{name}: the server adds {', '.join(told)}."


def _length(tokens: int | None) -> float:
    return float(tokens or 0)


def _alike(a: Sequence[float], b: Sequence[float]) -> bool:
    first, second = fmean(a or [0.0]), fmean(b or [0.0])
    return first > 0 and abs(second / first - 1) <= ALIKE
