"""Metrics of results under request load: windows, goodput, errors, requests in flight, and the client's own load. Pure.

Two windows are reported. *full* is the whole repetition, from the first sending to the last arrival, including ramp-up
and drain. *steady* begins when the first answer has ended and ends when the last request is sent: until then every user
is busy, or every arrival of the schedule has come. It counts the tokens that arrive in it, of any request.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from ..records.cell import Cell
from ..records.metrics import FAILURES, SERVER_COUNTERS, SERVER_GAUGES, SERVER_RATIOS, SERVER_TIMES
from ..records.results import EngineReadings, Repetition, RequestRecord, RunResult
from ..stats import percentile, supports
from .latency import chunk_gaps_ms, e2e_ms, gaps_ms, send_delay_ms, tpot_ms, ttft_ms, visible_ms

SINGLE_SHARE = 0.95
"""Minimum share of requests with one token in every chunk for their gaps to be called inter-token latency."""

TOGETHER_SHARE = 0.05
"""Maximum share of tokens read together with the one before for gaps to be called inter-token latency.

A few come together by chance.
"""

Figures = dict[str, float | None]


def online_figures(result: RunResult) -> Figures:
    """Metrics of a server's result by MLflow key; None removes a key that has no meaning here."""
    repetitions = result.repetitions
    requests = [r for repetition in repetitions for r in repetition.requests]
    cell = result.cell
    found: Figures = {
        "config/batch_size": None,
        "throughput/per_instance_tokens_per_s": None,
        "throughput/prefill_tokens_per_s": None,
    }
    found |= {
        "config/concurrency": None if cell.open_loop else cell.concurrency,
        "config/request_rate": cell.request_rate,
        "config/ramp_to": cell.ramp_to,
    }
    overload = overload_of(result)
    found["saturation/requests_per_s"] = overload.answered_per_s if overload else None
    if cell.trace:
        found["config/output_tokens"] = _mean([r.asked[1] for r in requests if r.asked])
    found |= _chunks(requests)
    if any(r.visible_ns is not None and r.visible_ns != r.stamps_ns[0] for r in requests):
        found |= statistics("latency/ttfo_ms", [value for r in requests if (value := visible_ms(r)) is not None])
    found |= _lengths(requests)
    found["throughput/requests_per_s"] = _mean([len(r.requests) / span for r in repetitions if (span := span_s(r)) > 0])
    found |= _windows(repetitions)
    found |= _goodput(cell, repetitions)
    found |= _errors(repetitions)
    found |= _in_flight(repetitions)
    return found | _client(repetitions) | _server(repetitions)


def stream_figures(result: RunResult) -> Figures:
    """Metrics of a stream batched in process: those of a server's result with the same meaning, and padding waste."""
    found = online_figures(result)
    for key in list(found):
        if key.startswith("errors/") or key == "lengths/cached_prompt_ratio":
            del found[key]  # nothing here can fail by itself, and no prefix is cached
    readings = [r.engine for r in result.repetitions if r.engine]
    lags = [lag / 1e6 for one in readings for lag in one.lags_ns]
    return found | {
        "config/batch_size": result.cell.batch_size,
        "config/concurrency": None,
        "efficiency/padding_waste_ratio": padding_waste(readings),
        **statistics("client/stamp_lag_ms", lags, (50, 99)),
    }


def padding_waste(readings: Sequence[EngineReadings]) -> float | None:
    """Share of the computed token positions that no answer needed: padding, and rows already finished.

    None if they were not counted.
    """
    computed = [one.positions for one in readings if one.positions]
    if not computed or len(computed) < len(readings):
        return None
    return 1 - sum(one.needed for one in readings) / sum(computed)


def statistics(key: str, values: Sequence[float], wanted: Sequence[int] = (50, 95, 99)) -> Figures:
    """Mean, and the `wanted` percentiles that the sample supports."""
    if not values:
        return {}
    found: Figures = {f"{key}_mean": fmean(values)}
    return found | {f"{key}_p{q}": percentile(values, q) for q in wanted if supports(len(values), q)}


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def span_s(repetition: Repetition) -> float:
    """Length of the full window, s."""
    return (max(r.stamps_ns[-1] for r in repetition.requests) - min(r.t0_ns for r in repetition.requests)) / 1e9


def single_share(requests: Sequence[RequestRecord]) -> float:
    """Share of requests with one token in every chunk."""
    return sum(r.single_tokens for r in requests) / len(requests)


def together_share(requests: Sequence[RequestRecord]) -> float:
    """Share of chunks read together with the one before, first chunks left out: a server or proxy held them back."""
    gaps = sum(max(len(r.stamps_ns) - 1, 0) for r in requests)
    return (
        sum(sooner == later for r in requests for sooner, later in itertools.pairwise(r.stamps_ns)) / gaps
        if gaps
        else 0.0
    )


def come_singly(requests: Sequence[RequestRecord]) -> bool:
    """Return True if tokens come one at a time, so that gaps are inter-token latencies."""
    return single_share(requests) >= SINGLE_SHARE and together_share(requests) <= TOGETHER_SHARE


def _chunks(requests: Sequence[RequestRecord]) -> Figures:
    """Inter-chunk latency instead of inter-token latency if a chunk is not a token."""
    if come_singly(requests):
        return {}
    found = statistics("latency/icl_ms", [gap for r in requests for gap in chunk_gaps_ms(r)])
    return found | {f"latency/itl_ms_{name}": None for name in ("mean", "p50", "p90", "p95", "p99")}


def _lengths(requests: Sequence[RequestRecord]) -> Figures:
    """Mean lengths really sent and generated, in tokens as the server counts them."""
    prompts = [r.prompt_tokens for r in requests if r.prompt_tokens is not None]
    chunks = sum(len(r.stamps_ns) for r in requests)
    return {
        "lengths/prompt_tokens_mean": _mean(prompts),
        "lengths/output_tokens_mean": fmean(r.output_tokens for r in requests),
        "lengths/tokens_per_chunk_mean": sum(r.output_tokens for r in requests) / chunks,
        "lengths/cached_prompt_ratio": cached_share(requests),
    }


def cached_share(requests: Sequence[RequestRecord]) -> float | None:
    """Share of the prompt tokens that came from the server's prefix cache; None if the server does not report it."""
    told = [(r.cached_tokens, r.prompt_tokens) for r in requests if r.cached_tokens is not None and r.prompt_tokens]
    return sum(cached for cached, _ in told) / sum(prompt for _, prompt in told) if told else None


def steady_window(repetition: Repetition) -> tuple[int, int] | None:
    """Begin and end in ns: the end of the first answer, the sending of the last request; None if empty."""
    every = (*repetition.requests, *repetition.failed)
    begin, end = min(r.end_ns or r.stamps_ns[-1] for r in every if r.end_ns or r.stamps_ns), max(r.t0_ns for r in every)
    return (begin, end) if end > begin else None


def _tokens_within(request: RequestRecord, begin: int, end: int) -> float:
    """Output tokens that arrived in a window; chunks of unknown size share the tokens equally."""
    share = request.output_tokens / len(request.stamps_ns)
    sizes = request.chunk_tokens or (share,) * len(request.stamps_ns)
    return sum(size for size, stamp in zip(sizes, request.stamps_ns, strict=True) if begin < stamp <= end)


def _windows(repetitions: Sequence[Repetition]) -> Figures:
    """The same metrics over both windows, to show the effect of ramp-up and drain."""
    requests = [r for repetition in repetitions for r in repetition.requests]
    found: Figures = {
        "window/full_output_tokens_per_s": _mean(
            [sum(r.output_tokens for r in one.requests) / s for one in repetitions if (s := span_s(one)) > 0]
        ),
        "window/full_requests_per_s": _mean([len(one.requests) / s for one in repetitions if (s := span_s(one)) > 0]),
    }
    rates: list[float] = []
    answers: list[float] = []
    firsts: list[float] = []
    gaps: list[float] = []
    for one in repetitions:
        window = steady_window(one)
        if window is None:
            continue
        begin, end = window
        seconds = (end - begin) / 1e9
        rates.append(sum(_tokens_within(r, begin, end) for r in one.requests) / seconds)
        # Users in step end their answers in bursts, one at each end of the window: counting ends would be too high.
        answers.append(sum(_tokens_within(r, begin, end) / r.output_tokens for r in one.requests) / seconds)
        firsts += [ttft_ms(r) for r in one.requests if begin <= r.start_ns <= end]
        inside = [r for r in one.requests if r.single_tokens]
        gaps += [
            gap
            for r in inside
            for gap, a, b in zip(gaps_ms(r), r.stamps_ns, r.stamps_ns[1:], strict=False)
            if a >= begin and b <= end
        ]
    found |= {"window/steady_output_tokens_per_s": _mean(rates), "window/steady_requests_per_s": _mean(answers)}
    pools: dict[str, Sequence[float]] = {"full_ttft_ms": [ttft_ms(r) for r in requests], "steady_ttft_ms": firsts}
    if come_singly(requests):
        pools |= {"full_itl_ms": [gap for r in requests for gap in gaps_ms(r)], "steady_itl_ms": gaps}
    for name, pool in pools.items():
        found |= {f"window/{name}_p{q}": percentile(pool, q) for q in (50, 99) if pool and supports(len(pool), q)}
    return found


RATE_LIMIT = 0.95
"""Answers per second ÷ requests per second below which a server does not keep up."""

GROWTH_LIMIT = 1.5
"""Median TTFT, or time of an answer, of the last third of the requests ÷ first third; from here on, a queue grows."""

STILL_GROWS = 1.2
"""The same for the last third ÷ the middle one.

Times of answers rise until as many are in flight as the rate brings, and then no longer.
"""


@dataclass(frozen=True)
class Overload:
    """Overload in an open loop: requests asked and answered per second, growth of a latency, and its name."""

    asked_per_s: float
    answered_per_s: float
    growth: float
    grew: str


def overload_of(result: RunResult) -> Overload | None:
    """Compare the load of an open loop with the server's rate of answers; None if the server kept up.

    The arrival rate is compared with the rate at which the same requests are answered, so the time of an answer does
    not matter. For a ramp only the last third of its requests counts: a server that does not keep up works at its limit
    there. A server that starts every request at once delays the answers instead of the first tokens, so the time of an
    answer is checked too, except under a rising rate, where it grows anyway, and a trace.
    """
    cell, grew = result.cell, "time to first token"
    if not cell.open_loop:
        return None
    growth = _growth(result, ttft_ms)
    if growth is None and cell.ramp_to is None and not cell.trace:
        grew, growth = "time of an answer", _growth(result, e2e_ms, STILL_GROWS)
    if growth is None:
        return None
    pairs = [pair for repetition in result.repetitions if (pair := _rates(repetition, cell.ramp_to is not None))]
    if not pairs:
        return None
    asked, answered = fmean(came for came, _ in pairs), fmean(done for _, done in pairs)
    return Overload(asked, answered, growth, grew) if answered < RATE_LIMIT * asked else None


def _rates(repetition: Repetition, last_third: bool) -> tuple[float, float] | None:
    """Requests and answers per second of all requests, or of the last third; failed requests count as unanswered."""
    order = sorted((*repetition.requests, *repetition.failed), key=lambda r: r.start_ns)
    order = order[len(order) - len(order) // 3 :] if last_third else order
    ends = [r.stamps_ns[-1] for r in order if r.outcome == "complete"]
    if len(ends) < 2 or max(ends) == min(ends) or order[-1].start_ns == order[0].start_ns:
        return None
    return (len(order) - 1) / (order[-1].start_ns - order[0].start_ns) * 1e9, (len(ends) - 1) / (
        max(ends) - min(ends)
    ) * 1e9


def _growth(result: RunResult, of: Callable[[RequestRecord], float], at_the_end: float = 0.0) -> float | None:
    """Median over repetitions of a latency's median in the last third of the requests ÷ that in the first third.

    None if it is below `GROWTH_LIMIT`, or if the same over the middle third is below `at_the_end`.
    """
    grown, lately = [], []
    for repetition in result.repetitions:
        order = sorted(repetition.requests, key=lambda r: r.start_ns)
        if third := len(order) // 3:
            first, middle, last = (
                median(map(of, part)) for part in (order[:third], order[third:-third], order[-third:])
            )
            if first > 0 and middle > 0:
                grown.append(last / first)
                lately.append(last / middle)
    return median(grown) if grown and median(grown) >= GROWTH_LIMIT and median(lately) >= at_the_end else None


TENTHS = 10


def ramp_steps(result: RunResult) -> list[tuple[str, int, float]]:
    """Series of a ramp: key, tenth of its time from 1, and value over the requests of all repetitions in that tenth."""
    if result.cell.ramp_to is None:
        return []
    tenths: list[list[RequestRecord]] = [[] for _ in range(TENTHS)]
    seconds = 0.0
    for repetition in result.repetitions:
        every = (*repetition.requests, *repetition.failed)
        first, last = min(r.start_ns for r in every), max(r.start_ns for r in every)
        seconds += (last - first) / 1e9 / TENTHS
        for request in every:
            tenths[min(TENTHS - 1, (request.start_ns - first) * TENTHS // max(1, last - first))].append(request)
    found: list[tuple[str, int, float]] = []
    for number, group in enumerate(tenths, 1):
        complete = [r for r in group if r.outcome == "complete"]
        found += [("steps/ramp_request_rate", number, len(group) / seconds)] if seconds else []
        if complete:
            found += [
                ("steps/ramp_ttft_ms", number, median(map(ttft_ms, complete))),
                ("steps/ramp_e2e_ms", number, median(map(e2e_ms, complete))),
            ]
    return found


def slos(cell: Cell) -> dict[str, tuple[float, Callable[[RequestRecord], float | None]]]:
    """The service level limits that are set, in ms, each with the function of the request that it limits."""
    wanted: dict[str, tuple[float | None, Callable[[RequestRecord], float | None]]] = {
        "ttft": (cell.slo_ttft_ms, ttft_ms),
        "tpot": (cell.slo_tpot_ms, tpot_ms),
        "e2e": (cell.slo_e2e_ms, e2e_ms),
    }
    return {name: (limit, of) for name, (limit, of) in wanted.items() if limit is not None}


def _goodput(cell: Cell, repetitions: Sequence[Repetition]) -> Figures:
    """Requests per second that met every limit, and their share of all judged requests; a failed request meets none.

    A request too short to have a time per output token cannot be judged by it: it is counted separately, not as good.
    """
    limits = slos(cell)
    if not limits:
        return {}
    counts = [met(cell, one) for one in repetitions]
    good, judged = sum(good for good, _ in counts), sum(judged for _, judged in counts)
    sent = sum(len(one.requests) + len(one.failed) for one in repetitions)
    return {
        "goodput/requests_per_s": _mean(
            [good / span for one, (good, _) in zip(repetitions, counts, strict=True) if (span := span_s(one)) > 0]
        ),
        "goodput/attainment_ratio": good / judged if judged else None,
        "goodput/requests_without_tpot": sent - judged,
    }


def met(cell: Cell, repetition: Repetition) -> tuple[int, int]:
    """Number of requests that met every limit, and of those that can be judged, failed ones included."""
    limits = slos(cell).values()
    values = [[of(request) for _, of in limits] for request in repetition.requests]
    able = [[value for value in one if value is not None] for one in values]
    able = [one for one in able if len(one) == len(limits)]
    good = sum(all(value <= limit for value, (limit, _) in zip(one, limits, strict=True)) for one in able)
    return good, len(able) + len(repetition.failed)


def _errors(repetitions: Sequence[Repetition]) -> Figures:
    failed = [r for repetition in repetitions for r in repetition.failed]
    sent = len(failed) + sum(len(repetition.requests) for repetition in repetitions)
    counts = {f"errors/{word}": float(sum(r.outcome == word for r in failed)) for word in FAILURES}
    return {**counts, "errors/failed_ratio": len(failed) / sent}


def in_flight(repetition: Repetition) -> list[tuple[int, int]]:
    """Requests in flight over time, failed ones included: (ns, number from then on)."""
    every = (*repetition.requests, *repetition.failed)
    changes = [(r.t0_ns, 1) for r in every] + [
        (end, -1) for r in every if (end := r.end_ns or max(r.stamps_ns, default=r.t0_ns))
    ]
    found: list[tuple[int, int]] = []
    now = 0
    for at, change in sorted(changes):
        now += change
        found.append((at, now))
    return found


def _in_flight(repetitions: Sequence[Repetition]) -> Figures:
    means: list[float] = []
    most = 0
    for repetition in repetitions:
        levels = in_flight(repetition)
        span = levels[-1][0] - levels[0][0]
        area = sum(level * (later - at) for (at, level), (later, _) in itertools.pairwise(levels))
        means += [area / span] if span > 0 else []
        most = max([most, *(level for _, level in levels)])
    return {"in_flight/requests_mean": _mean(means), "in_flight/requests_max": float(most)}


def _server(repetitions: Sequence[Repetition]) -> Figures:
    """The server's own metrics, under its own names: gauges while a load ran, growth of counters, means of histograms.

    If a counter went back, the server was restarted and the growth is unknown.
    """
    found: Figures = {}
    during = [
        reading.values
        for one in repetitions
        if one.client
        for reading in one.server
        if one.client.started_ns < reading.t_ns < one.client.ended_ns
    ]
    for name in (*SERVER_GAUGES, *SERVER_RATIOS):
        values = [reading[name] for reading in during if name in reading]
        found |= {f"server/{name}_mean": fmean(values), f"server/{name}_max": max(values)} if values else {}
    for name in SERVER_COUNTERS:
        found[f"server/{name}"] = _growth_of(name, repetitions)
    for name in SERVER_TIMES:
        seconds, count = _growth_of(f"{name}_sum", repetitions), _growth_of(f"{name}_count", repetitions)
        found[f"server/{name}_mean"] = seconds / count if seconds is not None and count else None
    return found


def _growth_of(name: str, repetitions: Sequence[Repetition]) -> float | None:
    """Growth of a counter from before to after the loads; None unless every repetition has both and none went back."""
    grown = [
        one.server[-1].values[name] - one.server[0].values[name]
        for one in repetitions
        if len(one.server) > 1 and all(name in r.values for r in one.server)
    ]
    return sum(grown) if len(grown) == len(repetitions) and min(grown) >= 0 else None


def _worst(each: Sequence[Figures]) -> Figures:
    """Largest value of each metric over the client processes: a late one must not be hidden by others."""
    return {
        key: max((value for figures in each if (value := figures.get(key)) is not None), default=None)
        for key in dict.fromkeys(k for f in each for k in f)
    }


def _client(repetitions: Sequence[Repetition]) -> Figures:
    """Metrics that show if the client is the bottleneck (Envoy's poll delay; inference-perf's schedule delay)."""
    readings = [r.client for r in repetitions if r.client]
    processes = [
        [one.processes[i] for one in readings if len(one.processes) > i]
        for i in range(max((len(r.processes) for r in readings), default=0))
    ]
    every = [r for repetition in repetitions for r in (*repetition.requests, *repetition.failed)]
    delays = [delay for r in every if (delay := send_delay_ms(r)) is not None]
    wall = sum(one.ended_ns - one.started_ns for one in readings) / 1e9
    asked = sent = 0
    for repetition in repetitions:
        order = [r for r in (*repetition.requests, *repetition.failed) if r.intended_ns is not None]
        if len(order) > 1:
            asked += max(r.start_ns for r in order) - min(r.start_ns for r in order)
            sent += max(r.t0_ns for r in order) - min(r.start_ns for r in order)
    found = _worst(
        [
            statistics("client/loop_lag_ms", [lag / 1e6 for one in own for lag in one.lags_ns], (50, 99))
            for own in processes
        ]
    )
    return (
        found
        | statistics("client/send_delay_ms", delays, (50, 99))
        | {
            "client/processes": len(processes) or None,
            "client/cpu_ratio": max(sum(one.cpu_s for one in own) for own in processes) / wall if wall else None,
            "client/cpus": sum(one.cpu_s for one in readings) / wall if wall and len(processes) > 1 else None,
            "client/resent_requests": sum(one.retries for one in readings) if readings else None,
            # Requests that all come at once have no rate.
            "client/rate_ratio": asked / sent if asked and sent else None,
        }
    )
