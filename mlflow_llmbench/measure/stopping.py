"""Decision of `repetitions=auto`: when the repetitions of a cell are enough. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from ..analysis.contention import can_be_judged
from ..analysis.order import repetitions_to_judge
from ..analysis.repetitions import judged_values, span_s, work_rate
from ..records.cell import Cell
from ..records.results import Repetition
from ..records.verdicts import LEAST_REPETITIONS, MOST_TIMED_S
from ..stats import is_correlated, judge_sequence, sequence_interval

LOOKS = (20, 30, 45, 64, 80, 100, 150, 225, 340, 500, 750, 1100, 1700, 2500, 3800, 5700, 8500)
"""Numbers of repetitions at which `auto` decides once the order can be judged: few, because each look is a chance to
stop at a lucky spread."""


def enough(cell: Cell, repetitions: Sequence[Repetition], local: bool = True) -> bool:
    """Return True if `auto` may stop repeating.

    It decides as soon as there are enough to judge their order (`repetitions_to_judge`), and then at `LOOKS`. It stops
    in four cases:

    - the 95 % interval of the throughput lies within `precision_target`, neighbours are not correlated, and they are
      long enough together to judge contention
    - the order of the repetitions shows what more of them do not mend; the verdict names it
    - other programs spoiled most of the repetitions
    - the repetitions took ten minutes together

    With fewer than 5 repetitions unspoiled, it takes up to 10. Spoiled ones are kept, because leaving out results by
    hand would bias the rest. `local` is False for a server, whose own process would count as another program.
    """
    count = len(repetitions)
    if cell.repetitions is not None or count < LEAST_REPETITIONS:
        return False
    spoiled = sum(bool(local and r.noise and r.noise.spoiled) for r in repetitions)
    if count - spoiled < LEAST_REPETITIONS and count < 2 * LEAST_REPETITIONS:
        return False
    timed_s = math.fsum(map(span_s, repetitions))
    if timed_s > MOST_TIMED_S:
        return True
    wanted = repetitions_to_judge(timed_s / count)
    if count < wanted or (count > wanted and count not in LOOKS):
        return False
    rates = [rate for repetition in repetitions if (rate := work_rate(repetition)) is not None]
    if 2 * spoiled > count:
        return True
    if judge_sequence(judged_values(cell, repetitions), cell.precision_target):
        return True
    ends = sequence_interval(rates, stopped=True)
    narrow = ends is not None and (ends[1] - ends[0]) / 2 <= cell.precision_target * fmean(rates)
    return narrow and can_be_judged(repetitions) and not is_correlated(rates)
