"""Latencies of one request in ms: pure functions of its time stamps.

In an open loop they count from the time at which the request was meant to be sent, so that the wait of an unsent
request is included (else: coordinated omission). The client's own delay is reported separately, as send delay.
"""

from __future__ import annotations

from itertools import pairwise

from ..records.results import RequestRecord


def gaps_ms(request: RequestRecord) -> list[float]:
    """Inter-token gaps of one request in ms: t(i) − t(i−1), i = 2 … N. Empty if a stamp stands for several tokens."""
    return [(b - a) / 1e6 for a, b in pairwise(request.stamps_ns)] if request.single_tokens else []


def chunk_gaps_ms(request: RequestRecord) -> list[float]:
    """Gaps between the arrivals of a stream in ms, whatever they hold; chunks of one read count as one arrival."""
    return [(b - a) / 1e6 for a, b in pairwise(dict.fromkeys(request.stamps_ns))]


def ttft_ms(request: RequestRecord) -> float:
    """Time to first token of any channel, t1 − t0, in ms."""
    return (request.stamps_ns[0] - request.start_ns) / 1e6


def visible_ms(request: RequestRecord) -> float | None:
    """Time to the first token outside a reasoning channel, in ms; None if there was none."""
    return None if request.visible_ns is None else (request.visible_ns - request.start_ns) / 1e6


def e2e_ms(request: RequestRecord) -> float:
    """End-to-end latency, tN − t0, in ms."""
    return (request.stamps_ns[-1] - request.start_ns) / 1e6


def tpot_ms(request: RequestRecord) -> float | None:
    """Time per output token after those of the first arrival, (tN − t1)/(N − n1), in ms; None if there are none.

    n1 is the number of tokens in the first arrival: 1 if tokens come one at a time, else the count of its chunks as
    reported by the server, or else estimated from the mean chunk size. With N − 1, a server that sends four tokens at a
    time would seem a third faster than it is.
    """
    tokens, stamps = request.output_tokens, request.stamps_ns
    at_first = stamps.count(stamps[0]) if stamps else 0
    if at_first == len(stamps):
        return None
    first = sum(request.chunk_tokens[:at_first]) if request.chunk_tokens else tokens / len(stamps) * at_first
    if tokens <= first:
        return None
    return (request.stamps_ns[-1] - request.stamps_ns[0]) / 1e6 / (tokens - first)


def send_delay_ms(request: RequestRecord) -> float | None:
    """Delay of an open-loop request's sending after its intended time, in ms; None in a closed loop."""
    return None if request.intended_ns is None else (request.t0_ns - request.intended_ns) / 1e6
