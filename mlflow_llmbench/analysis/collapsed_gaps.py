"""Verdict check for tokens that came together although they were made one after another. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean, median

from ..records.results import FIRST_RULES, Reason, RequestRecord, RunResult
from .latency import gaps_ms
from .repetitions import TOGETHER_SHARE, requests, several_in_a_step

LEAST_GAP_MS = 0.01
"""Minimum time between two tokens that a model computes; passing on tokens that exist already takes a tenth of it."""

ALL_TOGETHER = 0.95
"""Share of gaps below `LEAST_GAP_MS` from which a stream is no stream: the answer was handed over in one piece."""

COLLAPSED_RATIO = 0.1
"""Gap ÷ mean gap of its request below which the token counts as come together with the one before."""

SHARED_STEP_MS = 1.0
"""The same in ms where a model serves several requests at once: above it, a short gap is a step without a prefill."""

EARLIER_SHARE = 0.25
"""Limit of `together_share` for files of earlier versions, of which only a wrong median changes the verdict."""

MEDIAN_RATIO = 0.5
"""Least ratio of the median gap of a batch that is decoded alone to its mean gap. Quiet machines have above 0.9."""


def together_share(some: Sequence[RequestRecord], shared: bool) -> float:
    """Share of gaps that are collapsed: below a tenth of the mean gap of their request.

    The mean of a request does not change if its tokens are passed on late or in bursts, so that the share does not
    depend on how many come together, or on an odd or even number of tokens. `shared`: the model serves several requests
    at once, where only gaps below 1 ms count.
    """
    collapsed = total = 0
    for request in some:
        gaps = gaps_ms(request)
        limit = COLLAPSED_RATIO * fmean(gaps) if gaps else 0.0
        limit = min(limit, SHARED_STEP_MS) if shared else limit
        collapsed += sum(gap < limit for gap in gaps)
        total += len(gaps)
    return collapsed / total if total else 0.0


def handed_over_at_once(result: RunResult) -> float | None:
    """Median gap in ms if nearly all tokens of the requests came within microseconds; None if not."""
    gaps = [] if several_in_a_step(result) else [gap for request in requests(result) for gap in gaps_ms(request)]
    at_once = sum(gap < LEAST_GAP_MS for gap in gaps)
    return median(gaps) if gaps and at_once >= ALL_TOGETHER * len(gaps) else None


def collapsed(result: RunResult, metrics: dict[str, float]) -> Iterator[Reason]:
    """Check for gaps that are too short for the time that the model takes for a token.

    They are those of a reader that was late, or of a transport that holds tokens back: a token waits, and the next ones
    follow at once. Percentiles of the gaps are then neither those of the model nor those that a user sees.
    """
    if several_in_a_step(result) or handed_over_at_once(result) is not None:
        return
    every = requests(result)
    gaps = [gap for request in every for gap in gaps_ms(request)]
    if not gaps or min(gaps) < 0:
        return
    mean, middle = fmean(gaps), median(gaps)
    own = [median(found) / fmean(found) for r in every if (found := gaps_ms(r)) and fmean(found) > 0]
    shared = result.cell.scenario != "offline"
    seen, limit = "", EARLIER_SHARE if result.rules == FIRST_RULES else TOGETHER_SHARE
    if (share := together_share(every, shared)) > limit:
        seen = (
            f"{share:.0%} of the tokens came within a tenth of the mean gap after the one before (limit "
            f"{limit:.0%}; median gap {middle:.3g} ms, mean {mean:.3g} ms)"
        )
    elif not shared and own and (ratio := fmean(own)) < MEDIAN_RATIO:
        seen = (
            f"The median gap of a request is {ratio:.2g} of its mean gap (limit {MEDIAN_RATIO:g}; over all requests, "
            f"{middle:.3g} ms and {mean:.3g} ms)"
        )
    if seen:
        yield Reason(
            "collapsed_gaps",
            f"{seen}: tokens were held back or read late, and came in bursts. Inter-token latencies are not those of "
            "the model; the time per output token is. Measure again on a quiet machine, and emit each token as it is "
            "made.",
        )
