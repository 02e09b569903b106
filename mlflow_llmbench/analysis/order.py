"""Verdict on the order of the repetitions: trend, step, two speeds and outliers, and what their number cannot show."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import fmean

from ..records.results import FIRST_RULES, Reason, RunResult
from ..records.verdicts import (
    CORRELATED_REPETITIONS,
    JUDGED_REPETITIONS,
    JUDGED_WITHIN_S,
    LEAST_REPETITIONS,
    MOST_TIMED_S,
    PERCENTILE_SUPPORT,
)
from ..stats import Finding, autocorrelation, effective_size, is_correlated, judge_sequence
from ..stats.sequence import FEW_CHANGE
from .repetitions import by_process, judged_values, own_lengths, process_count

TWO_SPEEDS_SUPPORT = 10
"""Repetitions among which a second speed, taken in 3 of 10, is present with 97 % probability."""


def order(result: RunResult, metrics: dict[str, float]) -> Iterator[Reason]:
    """Check that the repetitions vary as independent values of one distribution do.

    A result of several processes is checked twice: its processes in their order, and the mean course of a process.
    Results of earlier versions keep their verdicts.
    """
    if result.rules == FIRST_RULES:
        return
    for noun, values in _series(result):
        found = judge_sequence(values, result.cell.precision_target)
        if found:
            yield Reason(found[0].kind, _sentence(found[0], noun, len(values), result))


def _series(result: RunResult) -> Iterator[tuple[str, list[float]]]:
    processes = by_process(result)
    if len(processes) < 2:
        yield "repetitions", judged_values(result.cell, result.repetitions)
        return
    values = [judged_values(result.cell, process) for process in processes]
    yield "processes", [fmean(some) for some in values if some]
    positions = zip(*([value / fmean(some) for value in some] for some in values if some and fmean(some)), strict=False)
    yield "repetitions", [fmean(at) for at in positions]


def _sentence(found: Finding, noun: str, count: int, result: RunResult) -> str:
    what = "time per output token" if own_lengths(result.cell) else "throughput"
    higher = found.change > 0
    size, verb = f"{abs(found.change):.0%}", "rose" if higher else "fell"
    least = result.cell.precision_target * (FEW_CHANGE if found.kind == "outliers" else 1)
    test = "t" if found.kind in ("trend", "step") else "separation"
    chance = f"; {test} {found.statistic:.3g}, by chance at most {found.limit:.2g}"
    limit = f"(limit {least:.0%}{chance if math.isfinite(found.statistic) else ''})"
    if found.kind == "trend":
        return (
            f"The {what} {verb} by {size} over {count} {noun} {limit}: it has no one value. Let the machine settle "
            "(warmup=10, other programs closed, mains power), and measure again."
        )
    if found.kind == "step":
        return (
            f"The {what} {verb} by {size} with the last {found.count} of {count} {noun} {limit}: something changed "
            "meanwhile. Look for programs that started or ended then, and measure again."
        )
    more = "higher" if higher else "lower"
    if found.kind == "two_speeds":
        return (
            f"The {what} of {found.count} of {count} {noun} was {size} {more} than that of the others {limit}: there "
            "are two speeds, and the mean is neither. Look for changing clocks and other programs, and measure again."
        )
    return (
        f"The {what} of {found.count} of {count} {noun} was {size} {more} than that of the others "
        f"{limit}: the mean depends on how many such there are. Look for programs that run now and then, and measure "
        "again."
    )


def repetitions_to_judge(run_s: float) -> int:
    """Repetitions of `run_s` seconds that `repetitions=auto` takes to judge their order: 64 or a minute, at least 20.

    Fewer, but at least 5, only where 20 take more than ten minutes together.
    """
    if run_s <= 0:
        return JUDGED_REPETITIONS
    wanted = min(max(CORRELATED_REPETITIONS, math.ceil(JUDGED_WITHIN_S / run_s)), JUDGED_REPETITIONS)
    return max(LEAST_REPETITIONS, min(wanted, math.ceil(MOST_TIMED_S / run_s)))


def correlation(result: RunResult) -> str | None:
    """Sentence that says that neighbouring repetitions are correlated and widen the interval; None if they are not."""
    if process_count(result) != 1 or len(result.repetitions) < CORRELATED_REPETITIONS:
        return None
    values = judged_values(result.cell, result.repetitions)
    if not is_correlated(values):
        return None
    size = effective_size(values)
    return (
        f"Neighbouring repetitions resemble each other (lag-1 autocorrelation {autocorrelation(values):.2f}): "
        f"{len(values)} of them determine the mean as well as {size:.0f} independent ones, and its interval is wider "
        "for it."
    )


def unjudged(result: RunResult) -> list[str]:
    """Departures from steady noise that this number of repetitions and processes cannot show, each with what would."""
    count, processes = len(result.repetitions), process_count(result)
    if not count or result.failure:
        return []
    needs = {
        "a second speed": TWO_SPEEDS_SUPPORT,
        "serial correlation": CORRELATED_REPETITIONS,
        "speeds that change for a few repetitions at a time": JUDGED_REPETITIONS,
        "slow repetitions that are rarer than 1 in 20": PERCENTILE_SUPPORT[95],
    }
    found = [f"{what} (needs {needed} repetitions)" for what, needed in needs.items() if count < needed]
    if processes < LEAST_REPETITIONS:
        found.append(f"how processes differ (needs processes={LEAST_REPETITIONS})")
    return found
