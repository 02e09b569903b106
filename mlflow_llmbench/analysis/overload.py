"""Overload of an open loop: does the number of unanswered requests grow for as long as requests are sent? Pure.

A server that keeps up has a backlog that varies about a level; one that does not has a backlog that grows with every
request, by the share of them that it cannot answer. This holds for a server that makes requests wait, and for one that
begins each at once and slows all of them down. Averages over the second and the last quarter of the sending are
compared. Three things make the backlog of a server that keeps up grow too, and are taken off or allowed for: answers
take a time without any overload; a loaded server fills slowly; arrivals are random.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median, pvariance

from ..records.results import Repetition, RequestRecord, RunResult
from .latency import e2e_ms, gaps_ms, tpot_ms, ttft_ms

QUARTERS = ((0.25, 0.5), (0.75, 1.0))
"""Parts of the time of sending whose mean backlogs are compared."""

GROWTH_Z = 2.6
"""Growth ÷ its standard deviation for a server exactly at its capacity, above which it is no chance (0.5 %)."""

FULL_LOAD = 0.85
"""Share of its capacity at which a server that keeps up is imagined, to tell how fast its backlog fills."""

SLOWDOWN = 2.0
"""Time of an answer ÷ that of an idle server which is not yet overload: larger batches take longer steps."""

LEAST_VARIANCE = 0.1
"""Least variance of arrivals and lengths (squared coefficient of variation): no server is perfectly regular."""

LEAST_GROWTH = 0.2
"""Share of the arriving requests by which a backlog grows that is not steady, where it may be one that fills slowly."""

HALF_UNANSWERED = 0.5
SLOW_ANSWERS = 3.0
"""Share of unanswered requests when the last is sent, and slowdown of the later answers, that are not steady together:
the run ended before the server's state could be told."""


LEAST_ANSWERED = 0.75
"""Rate of answers ÷ rate of requests below which few requests are not steady. Servers at up to 0.8 of their capacity,
simulated with 12 requests, have 0.8 or more; at 1.5 most have less."""


@dataclass(frozen=True)
class Overload:
    """Overload in an open loop: requests asked and answered per second, growth of a latency, and its name.

    `unanswered` of `sent` requests were unanswered when the last was sent (means over repetitions).
    """

    asked_per_s: float
    answered_per_s: float
    growth: float
    grew: str
    unanswered: float
    sent: float


@dataclass(frozen=True)
class _Stay:
    """One request in a queue: when it entered and left it, in s."""

    begin: float
    end: float


def overload_of(result: RunResult) -> Overload | None:
    """Return the overload of an open loop; None if the server kept up, or if that cannot be told.

    The rate of arrivals is compared with the rate at which the same requests are answered, so the time of an answer
    does not matter. For a ramp only the last third of its requests counts: a server that does not keep up works at its
    limit there.
    """
    if not result.cell.open_loop:
        return None
    if all(_growth(result, waits, filling=True).z <= GROWTH_Z for waits in (False, True)):
        return None
    pairs = [pair for one in result.repetitions if (pair := _rates(one, result.cell.ramp_to is not None))]
    if not pairs:
        return None
    grew, growth = max(
        (
            ("time to first token", _latency_growth(result, ttft_ms)),
            ("time of an answer", _latency_growth(result, e2e_ms)),
        ),
        key=lambda one: one[1],
    )
    return Overload(
        fmean(came for came, _ in pairs), fmean(done for _, done in pairs), growth, grew, *_unanswered(result)
    )


@dataclass(frozen=True)
class Filling:
    """An open loop that ended before the server's state could be told: means over repetitions, as in `Overload`."""

    unanswered: float
    sent: float
    answered_share: float | None


def still_filling(result: RunResult) -> Filling | None:
    """Return the figures of an open loop that ended before the server's state could be told; None if it did not.

    The backlog was still growing, as that of a server which fills slowly does too; or most requests were unanswered
    when the last was sent, and later ones took several times as long as on an idle server; or they were answered much
    more slowly than they came. Not for a ramp or a trace, whose rate is not one.
    """
    if result.cell.request_rate is None or result.cell.ramp_to is not None:
        return None
    unanswered, sent = _unanswered(result)
    late = [e2e_ms(r) for one in result.repetitions for r in _in_order(one.requests)[len(one.requests) // 2 :]]
    idle_s = _idle_s(result, waits=False)
    slow = bool(late) and idle_s > 0 and median(late) / 1e3 > SLOW_ANSWERS * idle_s
    growths = [_growth(result, waits, filling=False) for waits in (False, True)]
    growing = any(one.z > GROWTH_Z and one.share > LEAST_GROWTH for one in growths)
    pairs = [pair for one in result.repetitions if (pair := _rates(one, last_third=False))]
    share = fmean(done for _, done in pairs) / fmean(came for came, _ in pairs) if pairs else None
    lagging = share is not None and share < LEAST_ANSWERED
    if growing or lagging or (slow and unanswered > HALF_UNANSWERED * sent):
        return Filling(unanswered, sent, share)
    return None


@dataclass(frozen=True)
class _Growth:
    """Growth of a backlog ÷ its standard deviation for a server exactly at its capacity, and ÷ arriving requests."""

    z: float
    share: float


def _growth(result: RunResult, waits: bool, filling: bool) -> _Growth:
    """Growth of the backlog over all repetitions, from the second to the last quarter of the sending.

    For a server exactly at its capacity the backlog is a random walk with a variance of c²(arrivals) + c²(lengths) per
    request (heavy-traffic limit, Kingman 1961), and that of less loaded servers varies less. `waits`: only requests
    without a first token count, which a server with a limited batch keeps waiting. `filling`: the growth of a server at
    `FULL_LOAD` is taken off.
    """
    idle_s = _idle_s(result, waits)
    growth = variance = arrived = 0.0
    for one in result.repetitions:
        stays = _stays(one, waits)
        begins = [stay.begin for stay in stays]
        if len(stays) < 4 or begins[-1] <= begins[0]:
            continue
        (early, _), (late, _) = ((begins[0] + (begins[-1] - begins[0]) * (a + b) / 2, b) for a, b in QUARTERS)
        expected = _grown(begins, [_Stay(at, at + SLOWDOWN * idle_s) for at in begins])
        if filling and idle_s > 0:
            expected = max(expected, _filled(begins, idle_s, result.cell.ramp_to is not None))
        growth += _grown(begins, stays) - expected
        gaps = [b - a for a, b in itertools.pairwise(begins)]
        regular = result.cell.ramp_to is not None  # the gaps of a ramp differ by design
        spread = (0.0 if regular else _squared_cv(gaps)) + _squared_cv([float(r.output_tokens) for r in one.requests])
        between = sum(early < at <= late for at in begins)
        arrived += between
        variance += between * max(spread, LEAST_VARIANCE)
    return _Growth(growth / math.sqrt(variance), growth / arrived) if variance else _Growth(0.0, 0.0)


def _stays(repetition: Repetition, waits: bool) -> list[_Stay]:
    """Time of each request in the server, or until its first token, in order; a failed one stays until its end."""
    every = _in_order((*repetition.requests, *repetition.failed))
    return [
        _Stay(
            r.start_ns / 1e9,
            max((r.stamps_ns[0 if waits else -1] if r.stamps_ns else r.end_ns or r.start_ns), r.start_ns) / 1e9,
        )
        for r in every
    ]


def _in_order(some: Sequence[RequestRecord]) -> list[RequestRecord]:
    return sorted(some, key=lambda r: r.start_ns)


def _squared_cv(values: Sequence[float]) -> float:
    mean = fmean(values)
    return pvariance(values) / mean**2 if mean > 0 else 0.0


def _grown(begins: Sequence[float], stays: Sequence[_Stay]) -> float:
    """Mean number of requests in the last quarter of the sending − that in the second quarter."""
    span = begins[-1] - begins[0]
    means = []
    for part in QUARTERS:
        begin, end = (begins[0] + span * share for share in part)
        inside = sum(max(0.0, min(stay.end, end) - max(stay.begin, begin)) for stay in stays)
        means.append(inside / (end - begin))
    return means[1] - means[0]


def _filled(begins: Sequence[float], idle_s: float, ramp: bool) -> float:
    """Growth of the backlog of a server that keeps up at `FULL_LOAD`, for the same arrivals.

    b requests at once are answered at b/(S·(1 + βb)) per second: S seconds for one alone, and at most 1/(Sβ) per second
    for many, as when a batch takes a + c·b seconds per step. β is chosen so that the load is `FULL_LOAD` of that.
    """
    last = begins[len(begins) - len(begins) // 3 - 1 :] if ramp else begins
    if last[-1] <= last[0]:
        return 0.0
    slowing = FULL_LOAD / ((len(last) - 1) / (last[-1] - last[0]) * idle_s)
    span = begins[-1] - begins[0]
    step = span / 400
    held, total = 0.0, [0.0, 0.0]
    arrivals = iter(begins)
    upcoming: float | None = next(arrivals)
    for number in range(400):
        now = begins[0] + (number + 0.5) * step
        while upcoming is not None and upcoming <= now:
            held += 1
            upcoming = next(arrivals, None)
        held *= math.exp(-step / (idle_s * (1 + slowing * held)))
        for part, (begin, end) in enumerate(QUARTERS):
            total[part] += held / 400 / (end - begin) if begin <= (number + 0.5) / 400 < end else 0.0
    return total[1] - total[0]


def _idle_s(result: RunResult, waits: bool) -> float:
    """Seconds that an idle server takes for an answer of mean length (`waits`: for a first token).

    The least that was seen: the first request of a repetition is alone for a while. First tokens are compared per
    prompt token where lengths differ; of the gaps of a request, the 10th percentile counts, unless tokens come in
    bursts.
    """
    every = [r for one in result.repetitions for r in one.requests]
    prompts = [r.prompt_tokens for r in every if r.prompt_tokens]
    first = min(ttft_ms(r) for r in every)
    if len(prompts) == len(every):
        first = max(first, min(ttft_ms(r) / (r.prompt_tokens or 1) for r in every) * fmean(prompts))
    steps = []
    for request in every:
        mean, gaps = tpot_ms(request), sorted(gaps_ms(request))
        if mean is not None:
            quick = gaps[len(gaps) // 10] if gaps else mean
            steps.append(quick if quick > 0.1 * mean else mean)
    rest = 0.0 if waits or not steps else min(steps) * (fmean(r.output_tokens for r in every) - 1)
    return max(first + rest, 0.0) / 1e3


def _unanswered(result: RunResult) -> tuple[float, float]:
    """Mean numbers of requests that were unanswered when the last was sent, and that were sent, per repetition."""
    open_ones, sent = [], []
    for one in result.repetitions:
        stays = _stays(one, waits=False)
        open_ones.append(sum(stay.end > stays[-1].begin for stay in stays))
        sent.append(len(stays))
    return fmean(open_ones), fmean(sent)


def _rates(repetition: Repetition, last_third: bool) -> tuple[float, float] | None:
    """Requests and answers per second of all requests, or of the last third; failed requests count as unanswered."""
    order = _in_order((*repetition.requests, *repetition.failed))
    order = order[len(order) - len(order) // 3 :] if last_third else order
    ends = [r.stamps_ns[-1] for r in order if r.outcome == "complete"]
    if len(ends) < 2 or max(ends) == min(ends) or order[-1].start_ns == order[0].start_ns:
        return None
    return (len(order) - 1) / (order[-1].start_ns - order[0].start_ns) * 1e9, (len(ends) - 1) / (
        max(ends) - min(ends)
    ) * 1e9


def _latency_growth(result: RunResult, of: Callable[[RequestRecord], float]) -> float:
    """Median over repetitions of a latency's median in the later thirds of the requests ÷ that in the first third.

    The larger of the middle and the last third: the last requests are answered while the load ends.
    """
    grown = []
    for repetition in result.repetitions:
        order = _in_order(repetition.requests)
        if third := len(order) // 3:
            first, middle, last = (
                median(map(of, part)) for part in (order[:third], order[third:-third], order[-third:])
            )
            grown += [max(middle, last) / first] if first > 0 else []
    return median(grown) if grown else 1.0
