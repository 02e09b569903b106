"""What can be wrong with numbers from behind a server, as reasons of a verdict: the client, the load, the server's shortcuts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from statistics import fmean

from .metrics import FOREIGN_CPU_LIMIT, PREFIX_CACHES
from .online_summary import (
    RATE_LIMIT,
    SINGLE_SHARE,
    TOGETHER_SHARE,
    cached_share,
    overload_of,
    single_share,
    steady_window,
    together_share,
)
from .records import Reason, RequestRecord, RunResult

CPU_LIMIT = 0.75
"""Share of its one core that the client may use (AIPerf flags its workers there)."""

LAG_LIMIT_MS = {50: 5.0, 99: 50.0}
"""How late the client's event loop may wake up, by percentile."""

DELAY_LIMIT_MS = 10.0
"""Median send delay of an open loop (the rule of inference-perf)."""

FAILED_LIMIT = 0.05
LENGTH_LIMIT = 0.02
CACHED_LIMIT = 0.01

Metrics = dict[str, float]


def _requests(result: RunResult) -> list[RequestRecord]:
    return [r for repetition in result.repetitions for r in repetition.requests]


def client(result: RunResult, metrics: Metrics) -> Iterator[Reason]:
    """The client was the bottleneck: its own lateness is in the numbers."""
    seen: list[str] = []
    if (cpu := metrics.get("client/cpu_ratio", 0.0)) > CPU_LIMIT:
        seen.append(f"it used {cpu:.0%} of its core, and the limit is {CPU_LIMIT:.0%}")
    for q, limit in LAG_LIMIT_MS.items():
        if (lag := metrics.get(f"client/loop_lag_ms_p{q}", 0.0)) > limit:
            seen.append(f"its event loop woke up {lag:.1f} ms late (p{q}), and the limit is {limit:g} ms")
    if (delay := metrics.get("client/send_delay_ms_p50", 0.0)) > DELAY_LIMIT_MS:
        seen.append(f"it sent {delay:.1f} ms later than meant (median), and the limit is {DELAY_LIMIT_MS:g} ms")
    if (ratio := metrics.get("client/rate_ratio", 1.0)) < RATE_LIMIT:
        seen.append(f"it reached {ratio:.0%} of the asked rate, and the limit is {RATE_LIMIT:.0%}")
    if seen:
        yield Reason(
            "client_bound",
            f"The client was too slow: {'; '.join(seen)}. Give it a quieter machine of its own, more client_processes, or a smaller load.",
        )


def failures(result: RunResult, metrics: Metrics) -> Iterator[Reason]:
    """Requests that did not end as they should."""
    failed = [r for repetition in result.repetitions for r in repetition.failed]
    if not failed:
        return
    total = len(failed) + len(_requests(result))
    kinds = ", ".join(f"{count} {word}" for word, count in Counter(r.outcome for r in failed).most_common())
    share, first = len(failed) / total, failed[0].message
    code = "unfinished" if share > FAILED_LIMIT else "failed_requests"
    yield Reason(
        code,
        f"{len(failed)} of {total} requests failed ({kinds}), the first with: {first} Latencies are those of the others. Look into the server's log.",
    )


def lengths(result: RunResult, metrics: Metrics) -> Iterator[Reason]:
    """Prompts or outputs of another length than asked for."""
    every, cell = _requests(result), result.cell
    asked = [r.asked or (cell.prompt_tokens, cell.output_tokens) for r in every]
    other = [r.output_tokens for r, (_, output) in zip(every, asked, strict=True) if r.output_tokens != output]
    if other:
        wanted = (
            "length that was asked" if cell.workload == "mixed" or cell.trace else f"asked {cell.output_tokens} tokens"
        )
        yield Reason(
            "length_drift",
            f"{len(other)} of {len(every)} answers have another length than the {wanted}, {fmean(other):.1f} on average; the rates "
            "are of the real lengths. Use a server that honours ignore_eos, or a shorter output_tokens.",
        )
    mean = metrics.get("lengths/prompt_tokens_mean")
    prompts = [prompt for prompt, _ in asked if prompt is not None]
    if mean is not None and prompts and abs(mean / fmean(prompts) - 1) > LENGTH_LIMIT:
        yield Reason(
            "length_drift",
            f"The prompts had {mean:.1f} tokens on average by the server's count instead of {fmean(prompts):g}. Set prompt_tokens so that the real length is the wanted one.",
        )


def caches(result: RunResult, metrics: Metrics) -> Iterator[Reason]:
    """The server had parts of the prompts in its prefix cache."""
    share = metrics.get("lengths/cached_prompt_ratio")
    for hits, queries in PREFIX_CACHES if share is None else ():
        if metrics.get(f"server/{queries}"):
            share = metrics.get(f"server/{hits}", 0.0) / metrics[f"server/{queries}"]
    if result.cell.history == "sent":  # a later turn finds the earlier ones there, as it would in use
        share = cached_share([r for r in _requests(result) if r.turn == 1])
    if share is not None and share > CACHED_LIMIT:
        yield Reason(
            "prefix_cache_hits",
            f"{share:.1%} of the prompt tokens came from the server's prefix cache, and the limit is {CACHED_LIMIT:.0%}: first tokens came sooner than "
            "new prompts would let them. Take another seed, or switch the cache off.",
        )


def chunks(result: RunResult, metrics: Metrics) -> Iterator[Reason]:
    """A chunk of the stream is not a token."""
    every = _requests(result)
    if all(r.tokens is None for r in every):
        yield Reason(
            "chunked_stream",
            "The server tells no token counts, so each chunk was counted as one token, and gaps are inter-chunk latency (icl_ms). Use a server that sends usage.",
        )
    elif single_share(every) < SINGLE_SHARE:
        yield Reason(
            "chunked_stream",
            f"Chunks hold {metrics['lengths/tokens_per_chunk_mean']:.2f} tokens on average; gaps between them are inter-chunk latency (icl_ms), and there is no "
            "inter-token latency. Ask the server to send each token by itself.",
        )
    elif (together := together_share(every)) > TOGETHER_SHARE:
        yield Reason(
            "chunked_stream",
            f"{together:.0%} of the tokens came together with the one before, and the limit is {TOGETHER_SHARE:.0%}: the server, or a proxy before it, holds them back, "
            "so that the first token is that of the first burst, and gaps are inter-chunk latency (icl_ms). Switch its buffering off, or measure behind it.",
        )


def saturation(result: RunResult, metrics: Metrics) -> Iterator[Reason]:
    """An open loop beyond what the server can do: the numbers describe the queue, which grows as long as the run lasts."""
    found, cell = overload_of(result), result.cell
    if found is None:
        return
    came = f"Requests came at {found.asked_per_s:.3g} per second and were answered at {found.answered_per_s:.3g}"
    if cell.ramp_to is not None:
        came = (
            f"The rate rose from {cell.request_rate:g} to {cell.ramp_to:g} requests per second; the last third of the requests came at "
            f"{found.asked_per_s:.3g} per second and were answered at {found.answered_per_s:.3g}, at which the server is saturated"
        )
    lower = (
        "Replay fewer of its requests"
        if cell.trace
        else "Ask for a lower request_rate"
        if cell.ramp_to is None
        else "Stay below it"
    )
    yield Reason(
        "saturated",
        f"{came}; the {found.grew} grew {found.growth:.1f} times from the first to the last third. The latencies are those of a queue that "
        f"grows with the length of the run. {lower}.",
    )


def windows(result: RunResult, metrics: Metrics) -> Iterator[Reason]:
    """Nothing was ever steady: each repetition is only filling and draining."""
    if all(steady_window(repetition) is None for repetition in result.repetitions):
        yield Reason(
            "not_steady",
            "The last request was sent before the first answer had ended, so there is no steady window. Send more requests than users.",
        )


def stolen(result: RunResult, metrics: Metrics) -> Iterator[Reason]:
    """CPU that the hypervisor took. Other processes are no reason: one of them may be the server."""
    noises = [r.noise for r in result.repetitions if r.noise]
    wall, steal = sum(n.wall_s for n in noises), sum(n.steal_s or 0.0 for n in noises)
    if wall > 0.5 and steal / wall > FOREIGN_CPU_LIMIT:
        yield Reason(
            "contended",
            f"During the repetitions the hypervisor took {steal / wall:.2f} CPUs' worth of time from the client's machine, and the limit is {FOREIGN_CPU_LIMIT:.2f}. "
            "Measure again on a quiet machine.",
        )


CHECKS = (client, failures, lengths, caches, chunks, saturation, windows, stolen)
