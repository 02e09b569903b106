"""When the requests of an open loop are sent, from a seed."""

from __future__ import annotations

import math
import random

from .records import Cell

LEAST_REQUESTS = 12
"""Requests of a repetition at least: five repetitions then support a p95."""

AUTO_SECONDS = 10.0


def request_count(cell: Cell) -> int | None:
    """Requests of one repetition; None where only the duration ends it."""
    if cell.requests is not None:
        return cell.requests
    if cell.duration_s is not None:
        return None
    return max(LEAST_REQUESTS, math.ceil(cell.request_rate * AUTO_SECONDS) if cell.request_rate else 4 * cell.concurrency)


def arrival_times_ns(cell: Cell, repetition: int) -> tuple[int, ...] | None:
    """When each request of a repetition is meant to be sent, ns after its start; None for a closed loop.

    The gaps have the mean 1/rate and are independent: exponential (`poisson`), equal (`constant`), or of a gamma
    distribution with the shape `burstiness` (`gamma`), whose coefficient of variation is 1/√shape. The first request is
    sent at once. The same seed gives the same times.
    """
    rate = cell.request_rate
    if rate is None:
        return None
    draw = random.Random(f"{cell.seed}/arrivals/{repetition}")
    limit = cell.duration_s * 1e9 if cell.duration_s is not None else math.inf
    count = request_count(cell)
    found: list[int] = []
    at = 0.0
    while at <= limit and (count is None or len(found) < count):
        found.append(round(at))
        if cell.arrival == "constant":
            at = len(found) / rate * 1e9  # no sum of rounding errors
        elif cell.arrival == "poisson":
            at += draw.expovariate(rate) * 1e9
        else:
            at += draw.gammavariate(cell.burstiness, 1 / (rate * cell.burstiness)) * 1e9
    return tuple(found)
