"""Metrics of results under request load: windows, goodput, errors, requests in flight, and the client's own load. Pure.

Two windows are reported. *full* is the whole repetition, from the first sending to the last arrival, including ramp-up
and drain. *steady* begins when the first answer has ended and ends when the last request is sent: until then every user
is busy, or every arrival of the schedule has come. It counts the tokens that arrive in it, of any request.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import fmean, median

from ..records.cell import Cell
from ..records.metrics import (
    ACHIEVED_RATE,
    ASKED_RATE,
    ATTAINMENT,
    BATCH_SIZE,
    CACHED_PROMPT,
    CLIENT_CPU,
    CLIENT_CPUS,
    CLIENT_PROCESSES,
    CONCURRENCY,
    DECODE_RATE,
    FAILED,
    FAILED_RATIO,
    FULL_ITL,
    FULL_OUTPUT_RATE,
    FULL_REQUEST_RATE,
    FULL_TTFT,
    GOODPUT,
    ICL,
    IN_FLIGHT,
    ITL,
    LOOP_LAG,
    MADE_OUTPUT_TOKENS,
    OTHER_TOKENS,
    OUTPUT_RATE,
    OUTPUT_TOKENS,
    PADDING_WASTE,
    PER_INSTANCE_RATE,
    PREFILL_RATE,
    PROMPT_RATE,
    RAMP_E2E,
    RAMP_REQUEST_RATE,
    RAMP_TO,
    RAMP_TTFT,
    REASONING_TOKENS,
    REQUEST_RATE,
    RESENT_REQUESTS,
    SATURATION_RATE,
    SEND_DELAY,
    SENT_PROMPT_TOKENS,
    SKIPPED_EVENTS,
    STAMP_LAG,
    STEADY_ITL,
    STEADY_OUTPUT_RATE,
    STEADY_REQUEST_RATE,
    STEADY_TTFT,
    TOKENS_PER_CHUNK,
    TOTAL_RATE,
    TPOT,
    TTFO,
    TTFT,
    WITHOUT_TPOT,
)
from ..records.results import CONTENT, REASONING, EngineReadings, Repetition, RequestRecord, RunResult
from .figures import Figures, distribution, mean_of
from .latency import chunk_gaps_ms, e2e_ms, gaps_ms, send_delay_ms, tpot_ms, ttft_ms, visible_ms
from .overload import overload_of
from .repetitions import one_token_per_chunk, requests, span_s, total_rate, unit_values
from .server_figures import SERVER_FAMILIES


def online_figures(result: RunResult) -> Figures:
    """Metrics of a server's result by MLflow key; None removes a key that has no meaning here."""
    return {key: value for family in ONLINE for key, value in family(result).items()}


def stream_figures(result: RunResult) -> Figures:
    """Metrics of a stream batched in process: those of a server's result with the same meaning, and padding waste."""
    found = online_figures(result)
    for metric in (*FAILED.values(), FAILED_RATIO, CACHED_PROMPT):
        del found[metric.key()]  # nothing here can fail by itself, and no prefix is cached
    readings = [r.engine for r in result.repetitions if r.engine]
    return found | {
        BATCH_SIZE.key(): result.cell.batch_size,
        CONCURRENCY.key(): None,
        PADDING_WASTE.key(): padding_waste(readings),
        **distribution(STAMP_LAG, [lag / 1e6 for one in readings for lag in one.lags_ns]),
    }


def padding_waste(readings: Sequence[EngineReadings]) -> float | None:
    """Share of the computed token positions that no answer needed: padding, and rows already finished.

    None if they were not counted.
    """
    computed = [one.positions for one in readings if one.positions]
    if not computed or len(computed) < len(readings):
        return None
    return 1 - sum(one.needed for one in readings) / sum(computed)


def _settings(result: RunResult) -> Figures:
    """Settings of the load, and rates that have no meaning for a server."""
    cell, overload = result.cell, overload_of(result)
    found: Figures = {
        BATCH_SIZE.key(): None,
        PER_INSTANCE_RATE.key(): None,
        PREFILL_RATE.key(): None,
        CONCURRENCY.key(): None if cell.open_loop else cell.concurrency,
        ASKED_RATE.key(): cell.request_rate,
        RAMP_TO.key(): cell.ramp_to,
        SATURATION_RATE.key(): overload.answered_per_s if overload else None,
    }
    lengths = [r.asked[1] for r in requests(result) if r.asked]
    return found | {OUTPUT_TOKENS.key(): mean_of(lengths)} if cell.trace else found


def _latencies(result: RunResult) -> Figures:
    """Time to the first visible token, and inter-chunk latency instead of inter-token latency if a chunk is no token.

    The first visible token is told apart only if a reasoning channel came before it.
    """
    every = requests(result)
    found: Figures = {}
    if not one_token_per_chunk(every):
        found |= distribution(ICL, [gap for r in every for gap in chunk_gaps_ms(r)]) | dict.fromkeys(ITL.mlflow_keys())
    if any(r.visible_ns is not None and r.visible_ns != r.stamps_ns[0] for r in every):
        found |= distribution(TTFO, [value for r in every if (value := visible_ms(r)) is not None])
    return found


def _lengths(result: RunResult) -> Figures:
    """Mean lengths really sent and generated, in tokens as the server counts them."""
    every = requests(result)
    return {
        SENT_PROMPT_TOKENS.key("mean"): mean_of([r.prompt_tokens for r in every if r.prompt_tokens is not None]),
        MADE_OUTPUT_TOKENS.key("mean"): fmean(r.output_tokens for r in every),
        TOKENS_PER_CHUNK.key("mean"): sum(r.output_tokens for r in every) / sum(len(r.stamps_ns) for r in every),
        CACHED_PROMPT.key(): cached_share(every),
        SKIPPED_EVENTS.key(): sum(r.skipped or 0 for r in every) or None,
        **_channel_figures(every),
    }


def channel_tokens(some: Sequence[RequestRecord]) -> dict[str, int]:
    """Output tokens by channel; empty if all are of the answer itself."""
    found: Counter[str] = Counter()
    for request in some:
        found.update(request.channels or {CONTENT: request.output_tokens})
    return dict(found) if found.keys() - {CONTENT} else {}


def _channel_figures(every: Sequence[RequestRecord]) -> Figures:
    """Mean output tokens of the reasoning channel, and of all others but the answer."""
    found = channel_tokens(every)
    if not found:
        return {}
    reasoning = found.get(REASONING, 0)
    others = sum(found.values()) - reasoning - found.get(CONTENT, 0)
    return {REASONING_TOKENS.key("mean"): reasoning / len(every), OTHER_TOKENS.key("mean"): others / len(every)}


def _request_rate(result: RunResult) -> Figures:
    return {
        REQUEST_RATE.key(): mean_of([len(one.requests) / s for one in result.repetitions if (s := span_s(one)) > 0])
    }


def cached_share(some: Sequence[RequestRecord]) -> float | None:
    """Share of the prompt tokens that came from the server's prefix cache; None if the server does not report it."""
    known = [(r.cached_tokens, r.prompt_tokens) for r in some if r.cached_tokens is not None and r.prompt_tokens]
    return sum(cached for cached, _ in known) / sum(prompt for _, prompt in known) if known else None


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


def _share_within(request: RequestRecord, begin: int, end: int) -> float:
    """Share of an answer that arrived in a window: of its tokens, or of its chunks if it has none."""
    if request.output_tokens:
        return _tokens_within(request, begin, end) / request.output_tokens
    return sum(begin < stamp <= end for stamp in request.stamps_ns) / len(request.stamps_ns)


def _windows(result: RunResult) -> Figures:
    """The same metrics over both windows, to show the effect of ramp-up and drain."""
    every, spans = requests(result), [(one, s) for one in result.repetitions if (s := span_s(one)) > 0]
    found: Figures = {
        FULL_OUTPUT_RATE.key(): mean_of([sum(r.output_tokens for r in one.requests) / s for one, s in spans]),
        FULL_REQUEST_RATE.key(): mean_of([len(one.requests) / s for one, s in spans]),
    }
    rates: list[float] = []
    answers: list[float] = []
    firsts: list[float] = []
    gaps: list[float] = []
    for one in result.repetitions:
        window = steady_window(one)
        if window is None:
            continue
        begin, end = window
        seconds = (end - begin) / 1e9
        rates.append(sum(_tokens_within(r, begin, end) for r in one.requests) / seconds)
        # Users in step end their answers in bursts, one at each end of the window: counting ends would be too high.
        answers.append(sum(_share_within(r, begin, end) for r in one.requests) / seconds)
        firsts += [ttft_ms(r) for r in one.requests if begin <= r.start_ns <= end]
        inside = [r for r in one.requests if r.single_tokens]
        gaps += [
            gap
            for r in inside
            for gap, a, b in zip(gaps_ms(r), r.stamps_ns, r.stamps_ns[1:], strict=False)
            if a >= begin and b <= end
        ]
    found |= {STEADY_OUTPUT_RATE.key(): mean_of(rates), STEADY_REQUEST_RATE.key(): mean_of(answers)}
    found |= distribution(FULL_TTFT, [ttft_ms(r) for r in every]) | distribution(STEADY_TTFT, firsts)
    if one_token_per_chunk(every):
        found |= distribution(FULL_ITL, [gap for r in every for gap in gaps_ms(r)]) | distribution(STEADY_ITL, gaps)
    return found


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
        found += [(RAMP_REQUEST_RATE.key, number, len(group) / seconds)] if seconds else []
        if complete:
            found += [
                (RAMP_TTFT.key, number, median(map(ttft_ms, complete))),
                (RAMP_E2E.key, number, median(map(e2e_ms, complete))),
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


def _goodput(result: RunResult) -> Figures:
    """Requests per second that met every limit, and their share of all judged requests; a failed request meets none.

    A request too short to have a time per output token cannot be judged by it: it is counted separately, not as good.
    """
    cell, repetitions = result.cell, result.repetitions
    if not slos(cell):
        return {}
    counts = [count_good(cell, one) for one in repetitions]
    good, judged = sum(good for good, _ in counts), sum(judged for _, judged in counts)
    sent = sum(len(one.requests) + len(one.failed) for one in repetitions)
    return {
        GOODPUT.key(): mean_of(
            [good / span for one, (good, _) in zip(repetitions, counts, strict=True) if (span := span_s(one)) > 0]
        ),
        ATTAINMENT.key(): good / judged if judged else None,
        WITHOUT_TPOT.key(): sent - judged,
    }


def count_good(cell: Cell, repetition: Repetition) -> tuple[int, int]:
    """Number of requests that met every limit, and of those that can be judged, failed ones included."""
    limits = slos(cell).values()
    values = [[of(request) for _, of in limits] for request in repetition.requests]
    able = [[value for value in one if value is not None] for one in values]
    able = [one for one in able if len(one) == len(limits)]
    good = sum(all(value <= limit for value, (limit, _) in zip(one, limits, strict=True)) for one in able)
    return good, len(able) + len(repetition.failed)


def _errors(result: RunResult) -> Figures:
    failed = [r for repetition in result.repetitions for r in repetition.failed]
    counts = {metric.key(): float(sum(r.outcome == word for r in failed)) for word, metric in FAILED.items()}
    return {**counts, FAILED_RATIO.key(): len(failed) / (len(failed) + len(requests(result)))}


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


def _in_flight(result: RunResult) -> Figures:
    means: list[float] = []
    most = 0
    for repetition in result.repetitions:
        levels = in_flight(repetition)
        span = levels[-1][0] - levels[0][0]
        area = sum(level * (later - at) for (at, level), (later, _) in itertools.pairwise(levels))
        means += [area / span] if span > 0 else []
        most = max([most, *(level for _, level in levels)])
    return {IN_FLIGHT.key("mean"): mean_of(means), IN_FLIGHT.key("max"): float(most)}


def _worst(each: Sequence[Figures]) -> Figures:
    """Largest value of each metric over the client processes: a late one must not be hidden by others."""
    return {
        key: max((value for figures in each if (value := figures.get(key)) is not None), default=None)
        for key in dict.fromkeys(k for f in each for k in f)
    }


def _client(result: RunResult) -> Figures:
    """Metrics that show if the client is the bottleneck (Envoy's poll delay; inference-perf's schedule delay)."""
    repetitions = result.repetitions
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
    lags = [distribution(LOOP_LAG, [lag / 1e6 for one in own for lag in one.lags_ns]) for own in processes]
    return {
        **_worst(lags),
        **distribution(SEND_DELAY, delays),
        CLIENT_PROCESSES.key(): len(processes) or None,
        CLIENT_CPU.key(): max(sum(one.cpu_s for one in own) for own in processes) / wall if wall else None,
        CLIENT_CPUS.key(): sum(one.cpu_s for one in readings) / wall if wall and len(processes) > 1 else None,
        RESENT_REQUESTS.key(): sum(one.retries for one in readings) if readings else None,
        # Requests that all come at once have no rate.
        ACHIEVED_RATE.key(): asked / sent if asked and sent else None,
    }


OF_TOKENS = (
    TTFT, ITL, ICL, TPOT, OUTPUT_RATE, TOTAL_RATE, DECODE_RATE, OUTPUT_TOKENS, MADE_OUTPUT_TOKENS, TOKENS_PER_CHUNK,
    FULL_OUTPUT_RATE, FULL_TTFT, STEADY_OUTPUT_RATE, STEADY_TTFT, WITHOUT_TPOT,
)  # fmt: skip
"""Metrics that answers without tokens do not have."""


def _without_tokens(result: RunResult) -> Figures:
    """What replaces the figures of tokens if answers have none: the rate of prompt tokens."""
    if result.cell.generates:
        return {}
    rates = unit_values(result, total_rate)
    counted = any(r.prompt_tokens for r in requests(result))
    absent: Figures = dict.fromkeys(key for metric in OF_TOKENS for key in metric.mlflow_keys())
    return absent | {PROMPT_RATE.key(): fmean(rates) if rates and counted else None}


ONLINE: tuple[Callable[[RunResult], Figures], ...] = (
    _settings,
    _latencies,
    _lengths,
    _request_rate,
    _windows,
    _goodput,
    _errors,
    _in_flight,
    _client,
    *SERVER_FAMILIES,
    _without_tokens,
)
"""Families of metrics of a result under request load."""
