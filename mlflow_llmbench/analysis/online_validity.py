"""Verdict checks of results from a server: the client, the load, and the server's shortcuts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from statistics import fmean

from ..records.metrics import (
    ACHIEVED_RATE,
    CACHED_PROMPT,
    CLIENT_CPU,
    IDEAL_HITS,
    LOOP_LAG,
    SEND_DELAY,
    SENT_PROMPT_TOKENS,
    SERVER,
    STAMP_LAG,
    TOKENS_PER_CHUNK,
    TTFT,
)
from ..records.results import FIRST_RULES, Reason, RunResult
from ..records.server_names import PREFIX_CACHES, TEMPLATE_TOKENS
from .online_metrics import cached_share, steady_window
from .overload import overload_of, still_filling
from .repetitions import SINGLE_SHARE, TOGETHER_SHARE, requests, single_share, together_share
from .server_figures import ideal_hits

CPU_LIMIT = 0.75
"""Maximum share of its one core that the client may use (AIPerf flags its workers there)."""

LAG_LIMIT_MS = {50: 5.0, 99: 50.0}
"""Maximum delay with which the client's event loop may wake up, in ms, by percentile."""

DELAY_LIMIT_MS = 10.0
"""Maximum median send delay of an open loop, in ms (the rule of inference-perf)."""

LATENESS_SHARE = 0.10
"""Maximum share of the time to first token that the client's own lateness may be, by means and by medians."""

TIMER_MS = 1.0
"""Step in which an event loop's timers wake up, ms: a measured lag is up to that long without any lateness."""

RATE_LIMIT = 0.95
"""Least rate that the client may reach, as a share of the rate that was asked for."""

FAILED_LIMIT = 0.05
LENGTH_LIMIT = 0.02
CACHED_LIMIT = 0.01

Metrics = dict[str, float]


def client(result: RunResult, metrics: Metrics) -> Iterator[Reason]:
    """Check that the client was not the bottleneck: otherwise its own delay is in the numbers."""
    seen: list[str] = []
    if (cpu := metrics.get(CLIENT_CPU.key(), 0.0)) > CPU_LIMIT:
        seen.append(f"it used {cpu:.0%} of its core (limit {CPU_LIMIT:.0%})")
    for q, limit in LAG_LIMIT_MS.items():
        if (lag := metrics.get(LOOP_LAG.key(f"p{q}"), 0.0)) > limit:
            seen.append(f"its event loop woke up {lag:.1f} ms late (p{q}; limit {limit:g} ms)")
    if (delay := metrics.get(SEND_DELAY.key("p50"), 0.0)) > DELAY_LIMIT_MS:
        seen.append(f"it sent {delay:.1f} ms later than meant (median; limit {DELAY_LIMIT_MS:g} ms)")
    seen += _lateness(metrics) if result.rules > FIRST_RULES else []
    if (ratio := metrics.get(ACHIEVED_RATE.key(), 1.0)) < RATE_LIMIT:
        seen.append(f"it reached {ratio:.0%} of the requested rate (limit {RATE_LIMIT:.0%})")
    if seen:
        yield Reason(
            "client_bound",
            f"The client was too slow: {'; '.join(seen)}. Give it a quieter machine of its own, more client_processes, "
            "or a smaller load.",
        )


def _lateness(metrics: Metrics) -> Iterator[str]:
    """Yield the client's lateness relative to the time to first token, which contains it.

    It is the delay of sending, which an open loop's latencies count from the intended time, and of reading: the lag of
    the event loop, or of the stamps of a batching engine.
    """
    for statistic, name in (("mean", "means"), ("p50", "medians")):
        measured = metrics.get(TTFT.key(statistic), 0.0)
        late = sum(metrics.get(metric.key(statistic), 0.0) for metric in (SEND_DELAY, STAMP_LAG))
        late += max(metrics.get(LOOP_LAG.key(statistic), 0.0) - TIMER_MS, 0.0)
        if measured > 0 and late > LATENESS_SHARE * measured:
            yield (
                f"it sent and read {late:.3g} ms late together, {late / measured:.0%} of the time to first token "
                f"({name}; limit {LATENESS_SHARE:.0%})"
            )
            return


def failures(result: RunResult, metrics: Metrics) -> Iterator[Reason]:
    """Check for requests that did not complete."""
    failed = [r for repetition in result.repetitions for r in repetition.failed]
    if not failed:
        return
    total = len(failed) + len(requests(result))
    kinds = ", ".join(f"{count} {word}" for word, count in Counter(r.outcome for r in failed).most_common())
    share, first = len(failed) / total, failed[0].message
    code = "unfinished" if share > FAILED_LIMIT else "failed_requests"
    yield Reason(
        code,
        f"{len(failed)} of {total} requests failed ({kinds}), the first with: {first} Latencies are those of the "
        "others. Look into the server's log.",
    )


def lengths(result: RunResult, metrics: Metrics) -> Iterator[Reason]:
    """Check for prompts or outputs of another length than requested."""
    every, cell = requests(result), result.cell
    asked = [r.asked or (cell.prompt_tokens, cell.output_tokens) for r in every]
    shorter = cell.ignore_eos == "false"  # an answer may end by itself
    other = [
        r.output_tokens
        for r, (_, output) in zip(every, asked, strict=True)
        if cell.generates and (r.output_tokens > output or (r.output_tokens < output and not shorter))
    ]
    if other:
        wanted = (
            "requested length" if cell.workload == "mixed" or cell.trace else f"requested {cell.output_tokens} tokens"
        )
        yield Reason(
            "length_drift",
            f"{len(other)} of {len(every)} answers do not have the {wanted}, but {fmean(other):.1f} tokens on average; "
            "the rates are of the real lengths. Use a server that honours ignore_eos, or a shorter output_tokens.",
        )
    mean = metrics.get(SENT_PROMPT_TOKENS.key("mean"))
    prompts = [prompt for prompt, _ in asked if prompt is not None]
    if mean is not None and prompts and abs(mean / fmean(prompts) - 1) > LENGTH_LIMIT:
        yield Reason(
            "length_drift",
            f"The prompts had {mean:.1f} tokens on average by the server's count instead of {fmean(prompts):g}. Set "
            "prompt_tokens so that the real length is the wanted one.",
        )


def caches(result: RunResult, metrics: Metrics) -> Iterator[Reason]:
    """Check for prompt tokens that the server took from its prefix cache though no request of the load shares them."""
    share = metrics.get(CACHED_PROMPT.key())
    for hits, queries in PREFIX_CACHES if share is None else ():
        if asked := metrics.get(SERVER[queries].key()):
            share = metrics.get(SERVER[hits].key(), 0.0) / asked
    shared = metrics.get(IDEAL_HITS.key(), 0.0)
    if result.cell.history == "sent":  # a later turn finds the earlier ones in the cache, as in real use
        first = [r for r in requests(result) if r.turn == 1]
        share, shared = cached_share(first), ideal_hits(first, result.cell) or 0.0
    limit = shared + CACHED_LIMIT + (_template_share(result) if IDEAL_HITS.key() in metrics else 0.0)
    if share is not None and share > limit:
        told = f" and requests share {shared:.1%} with earlier ones" if shared else ""
        yield Reason(
            "prefix_cache_hits",
            f"{share:.1%} of the prompt tokens came from the server's prefix cache{told} (limit {limit:.0%}): first "
            "tokens came sooner than with new prompts. Use another seed, or switch the cache off.",
        )


def _template_share(result: RunResult) -> float:
    """Largest share of the prompt tokens that the server's template can have before each prompt, and thus in common."""
    told = result.load.facts.get(TEMPLATE_TOKENS, 0) if result.load else 0
    lengths = [r.prompt_tokens for r in requests(result) if r.prompt_tokens]
    return float(told) / fmean(lengths) if lengths else 0.0


def chunks(result: RunResult, metrics: Metrics) -> Iterator[Reason]:
    """Check that each chunk of the stream is one token."""
    every = requests(result)
    if not result.cell.generates:
        return
    if all(r.tokens is None for r in every):
        yield Reason(
            "chunked_stream",
            "The server reports no token counts, so each chunk was counted as one token, and gaps are inter-chunk "
            "latency (icl_ms). Use a server that sends usage.",
        )
    elif single_share(every) < SINGLE_SHARE:
        yield Reason(
            "chunked_stream",
            f"Chunks hold {metrics[TOKENS_PER_CHUNK.key('mean')]:.2f} tokens on average; gaps between them are "
            "inter-chunk latency (icl_ms), and there is no inter-token latency. Let the server send each token by "
            "itself.",
        )
    elif (together := together_share(every)) > TOGETHER_SHARE:
        yield Reason(
            "chunked_stream",
            f"{together:.0%} of the tokens came together with the one before (limit {TOGETHER_SHARE:.0%}): the server, "
            "or a proxy before it, holds them back. The first token is therefore that of the first burst, and gaps are "
            "inter-chunk latency (icl_ms). Switch its buffering off, or measure behind it.",
        )


def saturation(result: RunResult, metrics: Metrics) -> Iterator[Reason]:
    """Check that an open loop did not overload the server: otherwise the numbers describe a growing queue."""
    found, cell = overload_of(result), result.cell
    if found is None:
        yield from _filling(result)
        return
    came = f"Requests came at {found.asked_per_s:.3g} per second and were answered at {found.answered_per_s:.3g}"
    if cell.ramp_to is not None:
        came = (
            f"The rate rose from {cell.request_rate:g} to {cell.ramp_to:g} requests per second; the last third of the "
            f"requests came at {found.asked_per_s:.3g} per second and were answered at {found.answered_per_s:.3g}, "
            "the rate at which the server is saturated"
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
        f"{came}; the {found.grew} grew {found.growth:.1f} times from the first third to later ones, and "
        f"{found.unanswered:.3g} of {found.sent:.3g} requests were unanswered when the last was sent. The latencies "
        f"are those of a queue that grows with the length of the run. {lower}.",
    )


def _filling(result: RunResult) -> Iterator[Reason]:
    """Check that the requests were enough to tell whether the server keeps up."""
    if (found := still_filling(result)) is not None and not _without_window(result):
        rate = "" if found.answered_share is None else f", at {found.answered_share:.0%} of the rate at which they came"
        yield Reason(
            "not_steady",
            f"{found.unanswered:.3g} of {found.sent:.3g} requests were unanswered when the last was sent, and all were "
            f"answered late{rate}: it cannot be told whether the server keeps up with this rate. Send more requests, "
            "or ask for a lower request_rate.",
        )


def windows(result: RunResult, metrics: Metrics) -> Iterator[Reason]:
    """Check for a steady window: without one, each repetition is only ramp-up and drain."""
    if _without_window(result):
        yield Reason(
            "not_steady",
            "The last request was sent before the first answer had ended, so there is no steady window. Send more "
            "requests than users.",
        )


def _without_window(result: RunResult) -> bool:
    return all(steady_window(repetition) is None for repetition in result.repetitions)


CHECKS = (client, failures, lengths, caches, chunks, saturation, windows)
