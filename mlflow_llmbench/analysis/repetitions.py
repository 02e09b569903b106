"""Values of each repetition of a result, and the units over which values are averaged and compared. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from statistics import fmean, median

from ..records.cell import SPECULATIVE, Cell
from ..records.metrics import E2E, ITL, OUTPUT_RATE, TPOT, TTFT
from ..records.results import Repetition, RequestRecord, RunResult
from ..stats import bootstrap_interval, sequence_interval, t_interval
from .figures import mean_of, once_per_result
from .latency import e2e_ms, gaps_ms, tpot_ms, ttft_ms

SINGLE_SHARE = 0.95
"""Minimum share of requests with one token in every chunk for their gaps to be called inter-token latency."""

TOGETHER_SHARE = 0.05
"""Maximum share of tokens read together with the one before for gaps to be called inter-token latency.

A few come together by chance.
"""


def requests(result: RunResult) -> list[RequestRecord]:
    """All requests of all repetitions, in order."""
    return [request for repetition in result.repetitions for request in repetition.requests]


def span_s(repetition: Repetition) -> float:
    """Time from the first sending to the last arrival, s."""
    return (max(r.stamps_ns[-1] for r in repetition.requests) - min(r.t0_ns for r in repetition.requests)) / 1e9


def single_share(some: Sequence[RequestRecord]) -> float:
    """Share of requests with one token in every chunk."""
    return sum(r.single_tokens for r in some) / len(some)


def together_share(some: Sequence[RequestRecord]) -> float:
    """Share of chunks read together with the one before, first chunks left out: a server or proxy held them back."""
    gaps = sum(max(len(r.stamps_ns) - 1, 0) for r in some)
    together = sum(sooner == later for r in some for sooner, later in itertools.pairwise(r.stamps_ns))
    return together / gaps if gaps else 0.0


def one_token_per_chunk(some: Sequence[RequestRecord]) -> bool:
    """Return True if tokens come one at a time, so that gaps are inter-token latencies."""
    return single_share(some) >= SINGLE_SHARE and together_share(some) <= TOGETHER_SHARE


def several_in_a_step(result: RunResult) -> bool:
    """Return True if a step of the model, or a chunk of a server, brought several tokens.

    Then no request has inter-token latencies: one whose every step brought a single token did so by chance, and its
    gaps do not represent the others.
    """
    if result.cell.scenario == "online" and result.repetitions:
        return not one_token_per_chunk(requests(result))
    return result.cell.decode in SPECULATIVE and not all(request.single_tokens for request in requests(result))


def token_gaps(result: RunResult) -> list[float]:
    """Gaps between tokens in ms, of all requests with one token per stamp; empty if `several_in_a_step`."""
    return [] if several_in_a_step(result) else [gap for request in requests(result) for gap in gaps_ms(request)]


def by_process(result: RunResult) -> list[tuple[Repetition, ...]]:
    """Group the repetitions by the worker process in which they were measured, in the order of the processes."""
    processes: dict[int, list[Repetition]] = {}
    for repetition in result.repetitions:
        processes.setdefault(repetition.process, []).append(repetition)
    return [tuple(processes[number]) for number in sorted(processes)]


def inference_units(result: RunResult) -> list[tuple[Repetition, ...]]:
    """Group the repetitions by the unit of intervals and tests: the process if there are several, else the repetition.

    A process affects all its repetitions alike (memory layout, order of compilation, clocks), so they agree more with
    each other than with those of the next process, and an interval over them is too narrow. Each process therefore
    gives one value, the mean of its repetitions (Georges, Buytaert & Eeckhout, Statistically rigorous Java performance
    evaluation, OOPSLA 2007; Kalibera & Jones, Rigorous benchmarking in reasonable time, ISMM 2013, whose intervals use
    the means of the highest level that is repeated). Within a single process this effect cannot be seen.
    """
    processes = by_process(result)
    return processes if len(processes) > 1 else [(repetition,) for repetition in result.repetitions]


def process_count(result: RunResult) -> int:
    """Number of worker processes in which the repetitions were measured."""
    return len({repetition.process for repetition in result.repetitions})


def unit_values(result: RunResult, of: Callable[[Repetition], float | None]) -> list[float] | None:
    """One value per unit of `inference_units`: the mean over its repetitions.

    None if a repetition has none, or there is no repetition.
    """
    values = _unit_values(result, of)
    return None if values is None else list(values)


@once_per_result
def _unit_values(result: RunResult, of: Callable[[Repetition], float | None]) -> tuple[float, ...] | None:
    found = [[of(repetition) for repetition in unit] for unit in inference_units(result)]
    if not found or any(value is None for values in found for value in values):
        return None
    return tuple(fmean(value for value in values if value is not None) for values in found)


def output_rate(repetition: Repetition) -> float | None:
    """Output tokens per second: all tokens of all rows ÷ (last arrival − first sending); None without any."""
    seconds, tokens = span_s(repetition), sum(r.rows * r.output_tokens for r in repetition.requests)
    return tokens / seconds if seconds > 0 and tokens else None


def work_rate(repetition: Repetition) -> float | None:
    """Rate by which a repetition is judged: output tokens per second, or answers per second if they have no tokens."""
    seconds, rate = span_s(repetition), output_rate(repetition)
    return rate if rate is not None or not seconds else len(repetition.requests) / seconds


def total_rate(repetition: Repetition) -> float | None:
    """Prompt and output tokens per second, over the time span of `output_rate`."""
    seconds = span_s(repetition)
    tokens = sum(r.rows * (r.output_tokens + (r.prompt_tokens or 0)) for r in repetition.requests)
    return tokens / seconds if seconds > 0 else None


def prefill_rate(repetition: Repetition) -> float | None:
    """Computed prompt tokens of all rows ÷ TTFT, 1/s, mean over the requests."""
    return mean_of(
        [
            r.rows * r.prefilled_tokens / ttft_ms(r) * 1e3
            for r in repetition.requests
            if r.prefilled_tokens and ttft_ms(r) > 0
        ]
    )


def decode_rate(repetition: Repetition) -> float | None:
    """Tokens of all rows after the first ÷ the time they took, 1/s, mean over the requests."""
    return mean_of([r.rows / value * 1e3 for r in repetition.requests if (value := tpot_ms(r))])


def typical_gap(repetition: Repetition) -> float | None:
    """Median inter-token gap of all requests, ms; the mean would repeat the time per output token.

    None if tokens do not come one at a time.
    """
    if not one_token_per_chunk(repetition.requests):
        return None
    gaps = [gap for request in repetition.requests for gap in gaps_ms(request)]
    return median(gaps) if gaps else None


def mean_ttft(repetition: Repetition) -> float | None:
    """Mean time to first token of all requests, ms; None if answers have no tokens."""
    return mean_of(_firsts_ms(repetition))


def typical_ttft(repetition: Repetition) -> float | None:
    """Median time to first token of all requests, ms; None if answers have no tokens."""
    found = _firsts_ms(repetition)
    return median(found) if found else None


def _firsts_ms(repetition: Repetition) -> list[float]:
    return [ttft_ms(request) for request in repetition.requests if request.output_tokens]


def typical_tpot(repetition: Repetition) -> float | None:
    """Median time per output token of all requests, ms; None if no request has a second token."""
    found = [value for request in repetition.requests if (value := tpot_ms(request)) is not None]
    return median(found) if found else None


def own_lengths(cell: Cell) -> bool:
    """Return True if the repetitions differ in the length of their prompts: conversations, texts as they are."""
    return cell.history != "none" or cell.prompt_tokens is None


def judged_values(cell: Cell, repetitions: Sequence[Repetition]) -> list[float]:
    """Values in which a quiet machine shows no order: the `work_rate` of each repetition.

    With `own_lengths` it is the mean time per output token, ms, which hardly depends on the length of the prompt.
    """
    of = PER_REPETITION[TPOT.key("mean")] if own_lengths(cell) and cell.generates else work_rate
    return [value for repetition in repetitions if (value := of(repetition)) is not None]


def mean_interval(result: RunResult, values: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of the mean of `unit_values`: Student's over processes, `sequence_interval` over repetitions."""
    if process_count(result) > 1:
        return t_interval(values)
    return sequence_interval(values, stopped=result.cell.repetitions is None)


def interval_over_units(result: RunResult, key: str, values: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of a metric from its `unit_values`: the bootstrap's for a median, else `mean_interval`.

    None with too few values.
    """
    return bootstrap_interval(values, "median") if key.endswith("_p50") else mean_interval(result, values)


def mean_tpot(repetition: Repetition) -> float | None:
    """Mean time per output token of all requests, ms; None if no request has a second token."""
    return mean_of([value for request in repetition.requests if (value := tpot_ms(request)) is not None])


def mean_e2e(repetition: Repetition) -> float | None:
    """Mean end-to-end latency of all requests, ms."""
    return mean_of([e2e_ms(request) for request in repetition.requests])


COMPARED_VALUES: dict[str, Callable[[Repetition], float | None]] = {
    OUTPUT_RATE.key(): output_rate,
    TTFT.key("mean"): mean_ttft,
    ITL.key("p50"): typical_gap,
    TPOT.key("mean"): mean_tpot,
    E2E.key("mean"): mean_e2e,
}
"""Compared metric → its value for one repetition, None if it has none."""

PER_REPETITION: dict[str, Callable[[Repetition], float | None]] = {
    **COMPARED_VALUES,
    TTFT.key("p50"): typical_ttft,
    TPOT.key("p50"): typical_tpot,
    E2E.key("p50"): lambda repetition: median(map(e2e_ms, repetition.requests)),
}
"""Metric → its value for one repetition, None if it has none: the input of comparisons, limits and statistics."""
