"""How many servers some traffic needs, from what one server was measured to do within its SLOs. Pure.

A load balancer deals requests out evenly and at random, so each of n servers gets 1/n of the traffic with the same
kind of arrivals: independent arrivals stay independent when they are dealt out (Kingman, Poisson Processes, 1993,
5.1). The traffic that counts is its peak, with some headroom. One server does `GoodputLimit.rate`; the interval of the
answer comes from the ends of that: the rate that surely meets the SLOs, and the one that surely does not.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from ...records.metrics import COST
from ...records.results import RunResult
from ...workloads.traces import Recording
from ..goodput import GoodputLimit, configuration_of, limits
from ..repetitions import requests
from ..summary import summarize
from ..verdict import judge

ROUNDING = 1e-9
"""Share by which a number of servers may exceed a whole number: 3.0000000001 are 3."""

LENGTHS_DIFFER = 0.1
"""Share by which mean lengths of a traffic and of the measured requests may differ unsaid."""


@dataclass(frozen=True)
class Traffic:
    """Requests of all users together: `peak` and `mean` in requests per second.

    `window_s`: length of the busiest part, which `peak` is the mean rate of, in s; None for a constant rate ·
    `busiest_s`: when it begins · `hours`: highest rate in each hour of the traffic · `lengths`: mean prompt and output
    tokens, if they are known.
    """

    peak: float
    mean: float
    window_s: float | None = None
    busiest_s: float = 0.0
    hours: tuple[float, ...] = ()
    lengths: tuple[float, float] | None = None


@dataclass(frozen=True)
class Servers:
    """Numbers of servers for a rate: what is expected, and the 95 % interval. None where it is not known."""

    count: int | None
    low: int | None
    high: int | None


@dataclass(frozen=True)
class Capacity:
    """How many servers of one configuration the traffic needs, by its `limit`.

    `servers`: for the peak · `hours`: for each hour of the traffic · `price_per_hour`: of one server ·
    `price_of_million`: of a million output tokens at the highest rate that met the SLOs · `notes`: sentences on what
    limits the answer.
    """

    limit: GoodputLimit
    servers: Servers
    hours: tuple[Servers, ...] = ()
    price_per_hour: float | None = None
    price_of_million: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def server_hours(self) -> int | None:
        """Servers, added over the hours of the traffic, if their number follows it; None if one is not known."""
        counts = [one.count for one in self.hours]
        return sum(filter(None, counts)) if counts and None not in counts else None


@dataclass(frozen=True)
class CapacityPlan:
    """Servers for a traffic: with which headroom, for which share of the requests, and the answer by configuration."""

    traffic: Traffic
    headroom: float
    attainment: float
    found: tuple[Capacity, ...]


def of_rate(rate: float) -> Traffic:
    """Return a traffic of a constant mean rate, in requests per second."""
    return Traffic(rate, rate)


def of_trace(recording: Recording, window_s: float) -> Traffic:
    """Return the traffic of a trace. Its peak is the mean rate of the busiest `window_s` seconds, wherever they begin.

    A trace shorter than the window is one window.
    """
    times = [request.at_ns / 1e9 for request in recording.requests]
    lasts = times[-1] or window_s
    window = min(window_s, lasts)
    begins, peak = _busiest(times, window)
    hours = []
    for hour in range(math.ceil(lasts / 3600) if lasts > 3600 else 0):
        own = times[bisect_left(times, hour * 3600) : bisect_left(times, (hour + 1) * 3600)]
        hours.append(_busiest(own, min(window, 3600.0))[1] if own else 0.0)
    lengths = (
        fmean(request.prompt_tokens for request in recording.requests),
        fmean(request.output_tokens for request in recording.requests),
    )
    mean = len(times) / lasts
    return Traffic(max(peak, mean), mean, window, begins, tuple(hours), lengths)


def _busiest(times: Sequence[float], window: float) -> tuple[float, float]:
    """Return when the window with the most of these times begins, and its rate. A busiest window begins with a time."""
    counts = [bisect_left(times, begin + window) - number for number, begin in enumerate(times)]
    most = max(counts)
    return times[counts.index(most)], most / window


def servers_for(rate: float, limit: GoodputLimit) -> Servers:
    """Return the numbers of servers for a rate in requests per second, headroom included."""

    def needed(own: float | None) -> int | None:
        if rate == 0:
            return 0
        return None if not own else max(1, math.ceil(rate / own * (1 - ROUNDING)))

    return Servers(needed(limit.rate), needed(limit.high), needed(limit.low))


def plan_capacity(
    results: Sequence[RunResult], traffic: Traffic, asked: float, headroom: float = 0.0
) -> tuple[Capacity, ...]:
    """Return the capacity of each configuration among results of loads, the fewest servers first.

    `asked`: share of the requests that has to meet the SLOs · `headroom`: share of the traffic that comes on top.
    """
    found = []
    for limit in limits(results, asked):
        own = [one for one in results if one.outcome == "ok" and configuration_of(one) == limit.cell]
        hours = tuple(servers_for(rate * (1 + headroom), limit) for rate in traffic.hours)
        prices = {one.price_per_hour for one in own}
        price = prices.pop() if len(prices) == 1 else None
        notes = _notes(limit, traffic, own)
        servers = servers_for(traffic.peak * (1 + headroom), limit)
        found.append(Capacity(limit, servers, hours, price, _price_of_million(own, limit), notes))
    return tuple(sorted(found, key=lambda one: one.servers.count or math.inf))


def _price_of_million(own: Sequence[RunResult], limit: GoodputLimit) -> float | None:
    """Return the price of a million output tokens at the highest load that met the SLOs."""
    at = next((one for one in own if one.cell.request_rate == limit.rate), None)
    return summarize(at).get(COST.key()) if at and limit.rate else None


def _notes(limit: GoodputLimit, traffic: Traffic, own: Sequence[RunResult]) -> tuple[str, ...]:
    cell, notes = limit.cell, []
    if limit.rate is not None and limit.low is None:
        notes.append(
            "No measured rate surely meets the SLOs, so no number of servers is surely enough. Measure longer."
        )
    if limit.rate is not None and limit.high is None:
        notes.append("No measured rate was surely too high, so fewer servers may do. Search further up.")
    if cell.arrival != "poisson":
        notes.append(
            f"It was measured with arrival={cell.arrival}, and traffic that is dealt out to servers is random."
        )
    verdicts = [judge(one, summarize(one)) for one in own]
    if reasons := {reason.code for verdict in verdicts if verdict.word == "suspect" for reason in verdict.reasons}:
        suspect = sum(verdict.word == "suspect" for verdict in verdicts)
        notes.append(f"{suspect} of its {len(own)} loads are suspect: {', '.join(sorted(reasons))}.")
    measured = _mean_lengths(own)
    if traffic.lengths and measured and _differ(traffic.lengths, measured):
        mean, other = (f"{prompt:.0f} + {output:.0f}" for prompt, output in (traffic.lengths, measured))
        notes.append(
            f"The traffic's requests have {mean} tokens in the mean, the measured ones {other}. Measure with such "
            "lengths."
        )
    return tuple(notes)


def _mean_lengths(own: Sequence[RunResult]) -> tuple[float, float] | None:
    """Return mean prompt and output tokens of the measured requests that were answered."""
    every = [
        (request.prompt_tokens, request.output_tokens)
        for result in own
        for request in requests(result)
        if request.prompt_tokens is not None
    ]
    return (fmean(prompt for prompt, _ in every), fmean(output for _, output in every)) if every else None


def _differ(a: tuple[float, float], b: tuple[float, float]) -> bool:
    return any(abs(x - y) > LENGTHS_DIFFER * max(x, y) for x, y in zip(a, b, strict=True))
