"""Sending times of the requests of an open loop, from a seed."""

from __future__ import annotations

import itertools
import math
import random

from ..records.cell import Cell
from .traces import read_trace

LEAST_REQUESTS = 12
"""Minimum requests per repetition: five repetitions then support a p95."""

AUTO_SECONDS = 10.0


def request_count(cell: Cell) -> int | None:
    """Requests of one repetition; None if only the duration of a closed loop ends it."""
    rate, duration = cell.mean_rate, cell.duration_s
    if cell.trace:
        recorded = [one for one in read_trace(cell.trace).requests if duration is None or one.at_ns <= duration * 1e9]
        return len(recorded[: cell.requests])
    if rate is not None:
        within = math.floor(rate * (AUTO_SECONDS if duration is None else duration)) + 1
        least = LEAST_REQUESTS if duration is None else 1
        return (
            max(within, least) if cell.requests is None else min(cell.requests, within if duration else cell.requests)
        )
    if cell.requests is not None or duration is not None:
        return cell.requests
    return max(LEAST_REQUESTS, 4 * cell.concurrency)


def arrival_times_ns(cell: Cell, repetition: int) -> tuple[int, ...] | None:
    """Intended sending times of the requests of a repetition, ns after its start; None for a closed loop.

    The gaps are independent: exponential (`poisson`), equal (`constant`), or gamma with shape `burstiness` (`gamma`),
    whose coefficient of variation is 1/√shape. They are scaled so that n requests take (n − 1)/rate: every repetition
    has exactly the requested rate, and repetitions differ by the server and not by the draw. The same seed gives the
    same times. Times of a trace are used as recorded.

    For a ramp the gaps are drawn on a scale of constant rate, that of Λ(t), the expected number of requests until t,
    and mapped back by Λ⁻¹ (time rescaling; Çinlar, Introduction to Stochastic Processes, 1975, section 4.7).
    """
    rate, count = cell.mean_rate, request_count(cell)
    if cell.trace:
        return tuple(one.at_ns for one in read_trace(cell.trace).requests[:count])
    if rate is None or count is None:
        return None
    draw = random.Random(f"{cell.seed}/arrivals/{repetition}")
    shape = {"constant": math.inf, "poisson": 1.0, "gamma": cell.burstiness}[cell.arrival]
    gaps = [1.0 if shape == math.inf else draw.gammavariate(shape, 1 / shape) for _ in range(count - 1)]
    scale = 1 / sum(gaps) if sum(gaps) > 0 else 0.0
    seconds = (count - 1) / rate
    shares = [min(1.0, at * scale) for at in itertools.accumulate(gaps, initial=0.0)]
    first, last = cell.request_rate or rate, cell.ramp_to or cell.request_rate or rate
    return tuple(round(_ramp_share(share, first / rate, last / rate) * seconds * 1e9) for share in shares)


def _ramp_share(share: float, first: float, last: float) -> float:
    """Share of the time by which a ramp has sent `share` of its requests; `first`, `last`: its rates ÷ their mean.

    Solves first · t + (last − first) · t²/2 = share for t, in a form that is exact for a constant rate too.
    """
    return 2 * share / (first + math.sqrt(first * first + 2 * (last - first) * share))
