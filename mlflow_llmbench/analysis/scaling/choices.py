"""Choose a configuration for each model of a study under typical constraints: memory, first token, many users, one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from ..decisions.candidates import MEMORY, Limit, Measure, bound_text, candidates
from ..decisions.dominance import Judge
from ..decisions.recommend import Recommendation, choose
from .cells import MEDIAN_TTFT
from .focus import Focus, labels
from .study import MEAN_TPOT

LEAST_CHOICE = 2
"""Least number of configurations to choose among."""


@dataclass(frozen=True)
class Choice:
    """The recommended configuration of one model under one constraint."""

    model: str
    constraint: str
    found: Recommendation


TTFT_MEASURE = Measure("median time to first token", (MEDIAN_TTFT,), "lower")
TPOT_MEASURE = Measure("mean time per output token", (MEAN_TPOT,), "lower")


def choices_by_model(focus: Focus, accept_suspect: str | None, judge: Judge) -> Iterator[Choice]:
    """Choose for each model, at the prompt length of comparison, under each constraint.

    Limits of memory and time to first token are set so that half of the cells keep them.
    """
    names = labels(focus.cells)
    by_size = sorted(focus.cells, key=lambda m: m.variable("parameters") or 0.0)
    for model in dict.fromkeys(names[m.result.hashes.config] for m in by_size):
        own = [
            m.result
            for m in focus.cells
            if names[m.result.hashes.config] == model and m.variable("prompt_tokens") == focus.prompt
        ]
        given = candidates(own)
        if len(given) < LEAST_CHOICE:
            continue
        constraints: list[tuple[str, str, tuple[Limit, ...]]] = [
            ("the most tokens, whatever it takes", "throughput", ())
        ]
        for option, measure, goal in (
            ("memory", MEMORY, "throughput"),
            ("time to first token", TTFT_MEASURE, "throughput"),
        ):
            bound = _middle([value for one in given if (value := one.value(measure)) is not None])
            if bound:
                constraints.append((f"{option} ≤ {bound_text(measure, bound)}", goal, (Limit(option, measure, bound),)))
        gaps = [value for one in given if (value := one.value(TPOT_MEASURE)) is not None]
        if gaps:
            bound = _rounded_up(2 * min(gaps))
            constraints.append(
                (
                    f"many users, each with at least half the best speed: {bound:g} ms a token",
                    "throughput",
                    (Limit("time per token", TPOT_MEASURE, bound),),
                )
            )
        constraints.append(("one user, the soonest answer", "latency", ()))
        for words, goal, limits in constraints:
            yield Choice(model, words, choose(given, goal, limits, accept_suspect=accept_suspect, judge=judge))


def _middle(values: Sequence[float]) -> float | None:
    """Return the median, rounded up to two digits, as a bound; None if all values are the same."""
    return _rounded_up(median(values)) if values and min(values) < max(values) else None


def _rounded_up(value: float) -> float:
    step = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / step - 1e-9) * step:.6g}")
