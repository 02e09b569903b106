"""Ratio of a metric between two cells, with the interval that `compare` gives it."""

from __future__ import annotations

import math

from ..comparison import Errors, metric_test
from ..repetitions import PER_REPETITION
from ..summary import summarize
from ..verdict import judge
from .cells import Measured
from .tradeoffs import Ratio, ratio


def effect_ratio(name: str, over: Measured, under: Measured, metric: str) -> Ratio:
    """Return over ÷ under of geometric means, with the 95 % interval of `compare`.

    It includes serial correlation, the noise between processes, and that disturbed repetitions are not independent.
    """
    of, results = PER_REPETITION.get(metric), (under.result, over.result)
    if of is None:
        return ratio(name, over.values(metric), under.values(metric))
    first, second = (judge(result, summarize(result)) for result in results)
    errors = Errors.of(*results, (first, second), paired=False, calibrations=over.calibrations)
    tested = metric_test(metric, (of, of), results, errors)
    if tested is None:
        return ratio(name, over.values(metric), under.values(metric))
    found = tested.found
    return Ratio(name, math.exp(found.difference), math.exp(found.low), math.exp(found.high))
