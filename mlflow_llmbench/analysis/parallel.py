"""Several ranks compared with one: parallel efficiency, and how many times sooner tokens come. Pure.

η = T(p) / (p · T(1)), with the throughput T of p ranks: 1 if p devices do p times the work of one.
"""

from __future__ import annotations

from ..records.errors import NotComparable
from ..records.metrics import (
    OUTPUT_RATE,
    PARALLEL_EFFICIENCY,
    TPOT,
    TPOT_SPEEDUP,
    TTFT,
    TTFT_SPEEDUP,
)
from ..records.results import RunResult
from .comparison import compare
from .figures import interval_figures
from .verdict import judge


def gained(one: RunResult, several: RunResult) -> dict[str, float]:
    """Metrics of a result of several ranks against that of one, by MLflow key; empty if they cannot be compared.

    Intervals are those of `comparison.compare`, with the noise between processes.
    """
    try:
        found = compare(one, several)
    except NotComparable:
        return {}
    figures: dict[str, float | None] = {}
    ranks = several.cell.tensor_parallel
    for metric, key, speedup in (
        (PARALLEL_EFFICIENCY, OUTPUT_RATE.key(), False),
        (TTFT_SPEEDUP, TTFT.key("mean"), True),
        (TPOT_SPEEDUP, TPOT.key("mean"), True),
    ):
        effect = found.effect(key)
        if effect and effect.ratio > 0:
            ends = (effect.low, effect.high)
            if speedup:  # a time: half as long is twice as fast
                ratio, low, high = 1 / effect.ratio, *(1 / end if end else None for end in reversed(ends))
            else:
                ratio, low, high = effect.ratio / ranks, *(None if end is None else end / ranks for end in ends)
            figures |= interval_figures(metric, ratio, low, high)
    return {key: value for key, value in figures.items() if value is not None}


def sentence(name: str, one: RunResult, several: RunResult, figures: dict[str, float]) -> str:
    """The efficiency as a sentence for the terminal, with the share of time in collectives if it was measured."""
    ranks, share = several.cell.tensor_parallel, several.collective_share
    doubtful = [str(result.cell.tensor_parallel) for result in (one, several) if judge(result).word != "valid"]
    if PARALLEL_EFFICIENCY.key() not in figures:
        return f"{name}: cannot be compared with one rank."
    value, low, high = (figures.get(key) for key in PARALLEL_EFFICIENCY.mlflow_keys())
    text = f"{name}: parallel efficiency {value:.2f}"
    text += f" ({low:.2f} to {high:.2f})" if low is not None and high is not None else ""
    text += f", {(value or 0) * ranks:.2f} times the throughput of one rank"
    speedup = figures.get(TTFT_SPEEDUP.key())
    text += f", the first token {speedup:.2f} times as soon" if speedup else ""
    text += "" if share is None else f"; {share:.0%} of the time was spent in collectives"
    text += f"; not to be trusted, since the results of {' and '.join(doubtful)} ranks are suspect" if doubtful else ""
    return f"{text}."
