"""Servers on virtual time: the stamps of requests that arrive in an open loop, in ms."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

Serve = Callable[[Sequence[float]], list[list[float]]]
"""Times of arrival → the stamps of each request's tokens."""


def arrivals(rng: random.Random, count: int, rate: float, kind: str = "poisson") -> list[float]:
    """Times of arrival with exactly this rate per ms, as the load client scales them."""
    gaps = [rng.expovariate(1) if kind == "poisson" else 1.0 for _ in range(count - 1)]
    scale = (count - 1) / rate / sum(gaps)
    times = [0.0]
    for gap in gaps:
        times.append(times[-1] + gap * scale)
    return times


def shared(times: Sequence[float], lengths: Sequence[int], slope: float, base: float = 0.0) -> list[list[float]]:
    """Begin every request at once; b requests together get a token each in base + slope · b ms (processor sharing)."""
    stamps: list[list[float]] = [[] for _ in times]
    left: dict[int, float] = {}
    now, nxt = 0.0, 0
    while nxt < len(times) or left:
        step = base + slope * len(left)
        until = now + min(left.values()) * step if left else float("inf")
        if nxt < len(times) and times[nxt] < until:
            for one in left:
                left[one] -= (times[nxt] - now) / step
            now, left[nxt], nxt = times[nxt], 1.0, nxt + 1
            continue
        for one in list(left):
            left[one] -= (until - now) / step
            if left[one] < 1e-9:
                stamps[one].append(until)
                left[one] = 1.0
                if len(stamps[one]) == lengths[one]:
                    del left[one]
        now = until
    return stamps


def synchronous(
    times: Sequence[float], lengths: Sequence[int], rows: int, base: float, slope: float = 0.0, joining: bool = True
) -> list[list[float]]:
    """Decode at most `rows` requests in step; others wait, for a free row or (not `joining`) for the batch's end."""
    stamps: list[list[float]] = [[] for _ in times]
    batch: list[int] = []
    now, nxt = 0.0, 0
    while nxt < len(times) or batch:
        if not batch:
            now = max(now, times[nxt])
        if joining or not batch:
            while nxt < len(times) and times[nxt] <= now and len(batch) < rows:
                batch.append(nxt)
                nxt += 1
        now += base + slope * len(batch)
        for one in batch:
            stamps[one].append(now)
        batch = [one for one in batch if len(stamps[one]) < lengths[one]]
    return stamps
