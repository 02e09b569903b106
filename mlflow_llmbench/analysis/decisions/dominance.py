"""Compare two candidates: better by how much, better beyond chance, and better in every metric (the Pareto front).

The front holds every result that nothing dominates. B dominates A if B is worse in no metric by more than the noise
threshold and better in some metric beyond chance: p below 0.05 after Holm in `compare`, and by more than the threshold.
A metric that a run has only once (memory, quality) counts as better beyond the threshold alone. A high percentile never
does: it is one number of many repetitions, which no test uses. Differences that chance could explain stay on the front.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ...records.calibration import Calibration
from ...records.metrics import KEYS
from ..comparison import (
    BETTER,
    COMPARED,
    SIGNIFICANCE,
    UNTESTED,
    Comparison,
    Errors,
    MetricTest,
    ValueOf,
    compare,
    metric_test,
)
from ..repetitions import PER_REPETITION
from .candidates import Candidate, Measure, values_of

ALLOWABLE = ("hardware", "software", "workload", "scenario")
"""Kinds of differences among the results that can be accepted."""

TESTED = frozenset(entry.key for entry in COMPARED)
"""Metrics that `compare` looks at; those with a value for each repetition are tested."""

ONCE = ("memory", "quality")
"""Sections of metrics that a run has only once."""


def gain(a: Candidate, b: Candidate, measure: Measure) -> float:
    """Logarithm of the ratio by which b is better than a; −∞ if incomparable, e.g. device memory with host memory."""
    key_a, key_b = measure.key(a.metrics), measure.key(b.metrics)
    if key_a is None or key_a != key_b:
        return -math.inf
    first, second = a.metrics[key_a], b.metrics[key_a]
    if first == second:
        return 0.0
    sign = 1 if measure.better == "higher" else -1
    if first <= 0 or second <= 0:
        return math.copysign(math.inf, (second - first) * sign)
    return sign * math.log(second / first)


@dataclass(frozen=True)
class Judge:
    """Rule by which one candidate is better than another. `noise` is a ratio, `calibrations` are as in `compare`."""

    noise: float = 0.01
    calibrations: tuple[Calibration, ...] = ()

    def compare(self, a: Candidate, b: Candidate) -> Comparison:
        """Compare two candidates that may differ in all that a recommendation can allow."""
        allow = frozenset([*ALLOWABLE, "schema"])
        called = a.name, b.name
        return compare(a.result, b.result, noise=self.noise, allow=allow, called=called, calibrations=self.calibrations)

    def dominates(self, b: Candidate, a: Candidate, objectives: Sequence[Measure]) -> bool:
        """Return True if b is in no metric worse than a by more than the noise threshold, and in some surely better."""
        gains = [gain(a, b, measure) for measure in objectives]
        threshold = math.log1p(self.noise)
        if any(one < -threshold for one in gains) or not any(one > threshold for one in gains):
            return False
        return any(self.surely_better(a, b, measure) for measure in objectives)

    def looks_better(self, a: Candidate, b: Candidate, measure: Measure) -> bool:
        """Return True if b is better than a by more than the noise threshold, by chance or not."""
        return gain(a, b, measure) > math.log1p(self.noise)

    def surely_better(self, a: Candidate, b: Candidate, measure: Measure) -> bool:
        """Return True if b is better than a by more than chance and the noise threshold would explain."""
        key = measure.key(a.metrics)
        if key is None or not self.looks_better(a, b, measure):
            return False
        if (told := self._told_alone(a, b, key)) is not None:
            return told
        effect = self.compare(a, b).effect(key)
        if effect is not None and effect.effect != UNTESTED:
            return effect.effect == BETTER
        if KEYS[key].section in ONCE:
            return True
        first, second = values_of(a, key), values_of(b, key)
        if first is None or second is None:
            return False
        test = self._test(a, b, key, (first, second))
        return test is not None and test.found.p_value < SIGNIFICANCE

    def _told_alone(self, a: Candidate, b: Candidate, key: str) -> bool | None:
        """Return what `compare` would say of one metric, if its own p value decides; None if not.

        Holm's p value is at least that, and at most that times the number of tests. Most of a thousand candidates are
        told apart in this way, in a fifth of the time.
        """
        of = PER_REPETITION.get(key)
        if of is None or key not in TESTED or not a.metrics.get(key):
            return None
        test = self._test(a, b, key, (of, of))
        if test is None:
            return None
        p_value, difference = test.found.p_value, test.found.difference
        if p_value >= SIGNIFICANCE:
            return False
        if p_value * len(TESTED) >= SIGNIFICANCE:
            return None
        return abs(difference) >= math.log1p(self.noise) and (difference > 0) == (KEYS[key].better == "higher")

    def _test(self, a: Candidate, b: Candidate, key: str, of: tuple[ValueOf, ValueOf]) -> MetricTest | None:
        errors = Errors.of(a.result, b.result, (a.verdict, b.verdict), paired=False, calibrations=self.calibrations)
        return metric_test(key, of, (a.result, b.result), errors)


DEFAULT_JUDGE = Judge()
"""Judge that knows no calibration."""
