"""Claims and their verdicts: confirmed, not confirmed, or undecided.

A claim is a range, a measured value has a 95 % interval. An interval inside the range confirms the claim, one outside
does not, and one that crosses an end of the range leaves it undecided. A claim that is one number means that number
± `EXACT`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from ...records.text import plural
from ...stats import t_interval
from .tradeoffs import Ratio

CONFIRMED, NOT_CONFIRMED, UNSAID = "confirmed", "not confirmed", "cannot be said here"

EXACT = 0.05
"""Relative tolerance of a claim that is one number."""

LEAST_MODELS = 3
"""Least number of models to pool an effect over models; with fewer it is pooled over groups of cells."""


@dataclass(frozen=True)
class Estimate:
    """A pooled effect: geometric mean, 95 % interval, lowest and highest value.

    The mean is over `count` `units`: `models`, `groups` or `repetitions`. The interval is None for one value without
    repetitions.
    """

    value: float
    low: float | None
    high: float | None
    count: int
    units: str
    least: float
    most: float

    def __str__(self) -> str:
        interval = "" if self.low is None or self.high is None else f" ({self.low:.3g} to {self.high:.3g})"
        return f"{self.value:.3g}{interval}"

    @property
    def spread(self) -> str:
        """The lowest and the highest value as text; empty for one value."""
        return (
            ""
            if self.count == 1 and self.units == "repetitions"
            else f"from {self.least:.3g} to {self.most:.3g} in single cells"
        )


@dataclass(frozen=True)
class Claim:
    """One claim: the paper's statement, its range as text, the measured value, the verdict, and the reason for it.

    `suspect`, `cells`: number of suspect results among those that a figure of speed rests on, and of all of them.
    """

    key: str
    said: str
    range: str
    measured: str
    verdict: str
    why: str
    suspect: int = 0
    cells: int = 0


def pooled(effects: Sequence[tuple[str, Ratio]]) -> Estimate:
    """Pool the ratios of several cells: geometric mean, and Student's interval on the logarithms.

    `effects`: (model, ratio), at least one. Cells of one model are not independent, so each model gives one value if
    there are at least `LEAST_MODELS` models.
    """
    values = [effect.value for _, effect in effects]
    by_model: dict[str, list[float]] = {}
    for model, effect in effects:
        by_model.setdefault(model, []).append(math.log(effect.value))
    whole = len(by_model) >= LEAST_MODELS
    logs = [fmean(found) for found in by_model.values()] if whole else [math.log(value) for value in values]
    units = "models" if whole else "groups"
    if len(values) == 1:
        only = effects[0][1]
        return Estimate(only.value, only.low, only.high, 1, "repetitions", only.value, only.value)
    ends = t_interval(logs)
    low, high = (math.exp(ends[0]), math.exp(ends[1])) if ends else (None, None)
    return Estimate(math.exp(fmean(logs)), low, high, len(logs), units, min(values), max(values))


def judge_range(low: float | None, high: float | None, claimed: tuple[float, float]) -> str:
    """Return the verdict on a claimed range, given the measured interval; an end of None is unknown."""
    least, most = -math.inf if low is None else low, math.inf if high is None else high
    if claimed[0] <= least and most <= claimed[1]:
        return CONFIRMED
    return NOT_CONFIRMED if most < claimed[0] or least > claimed[1] else UNSAID


def rests_text(estimate: Estimate) -> str:
    """Say what the interval of an estimate is over."""
    if estimate.low is None:
        return "there is no interval"
    return (
        f"the interval is over {estimate.count} {estimate.units}"
        if estimate.units != "repetitions"
        else "the interval is over repetitions"
    )


def around(value: float) -> tuple[float, float]:
    """Turn a claim that is one number into a range."""
    return value * (1 - EXACT), value * (1 + EXACT)


def range_text(claimed: tuple[float, float]) -> str:
    """Return a claimed range as text."""
    middle = (claimed[0] + claimed[1]) / 2
    return (
        f"{middle:g} ± {EXACT:.0%}".replace("%", " %")
        if claimed == around(middle)
        else f"{claimed[0]:g} to {claimed[1]:g}"
    )


def by_majority(verdicts: Sequence[str], noun: str) -> tuple[str, str]:
    """Return the verdict of more than half, undecided if there is none, and how the intervals of each `noun` lie."""
    counts = Counter(verdicts)
    verdict = next((word for word, count in counts.items() if count * 2 > len(verdicts)), UNSAID)
    lie = (
        f"inside in {counts[CONFIRMED]}, outside in {counts[NOT_CONFIRMED]}, undecided in {counts[UNSAID]} of "
        f"{plural(len(verdicts), noun)}"
    )
    return verdict, lie
