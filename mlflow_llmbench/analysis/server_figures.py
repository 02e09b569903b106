"""Figures that a server tells of itself: its own metrics, hits of its prefix cache, speculative decoding. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from ..records.cell import Cell
from ..records.metrics import ACCEPTANCE, ACCEPTED_LENGTH, IDEAL_HITS, SERVER, SERVER_HITS
from ..records.results import Repetition, RequestRecord, RunResult
from ..records.server_names import (
    ACCEPTED_TOKENS,
    COMPUTED_PROMPTS,
    DRAFT_TOKENS,
    DRAFTS,
    PREFIX_CACHES,
    SERVER_ACCEPTANCES,
    SERVER_ACCEPTED_LENGTHS,
    SERVER_COUNTERS,
    SERVER_GAUGES,
    SERVER_RATIOS,
    SERVER_TIMES,
)
from .figures import Figures, mean_of
from .repetitions import requests


def _own_metrics(result: RunResult) -> Figures:
    """The server's own metrics, under its own names: gauges while a load ran, growth of counters, means of histograms.

    If a counter went back, the server was restarted and the growth is unknown.
    """
    found: Figures = {}
    during, repetitions = _readings_during(result), result.repetitions
    for name in (*SERVER_GAUGES, *SERVER_RATIOS):
        values = [reading[name] for reading in during if name in reading]
        found |= {SERVER[name].key("mean"): fmean(values), SERVER[name].key("max"): max(values)} if values else {}
    for name in SERVER_COUNTERS:
        found[SERVER[name].key()] = _growth_of(name, repetitions)
    for name in SERVER_TIMES:
        seconds, count = _growth_of(f"{name}_sum", repetitions), _growth_of(f"{name}_count", repetitions)
        found[SERVER[name].key("mean")] = seconds / count if seconds is not None and count else None
    return found


def _readings_during(result: RunResult) -> list[Mapping[str, float]]:
    """Values that the server reported while a load ran."""
    return [
        reading.values
        for one in result.repetitions
        if one.client
        for reading in one.server
        if one.client.started_ns < reading.t_ns < one.client.ended_ns
    ]


def _growth_of(name: str, repetitions: Sequence[Repetition]) -> float | None:
    """Growth of a counter from before to after the loads; None unless every repetition has both and none went back."""
    grown = [
        one.server[-1].values[name] - one.server[0].values[name]
        for one in repetitions
        if len(one.server) > 1 and all(name in r.values for r in one.server)
    ]
    return sum(grown) if len(grown) == len(repetitions) and min(grown) >= 0 else None


def _prefix_cache(result: RunResult) -> Figures:
    """Hits of the server's prefix cache by its own counters, and those of a cache without limits."""
    return {IDEAL_HITS.key(): ideal_hits(requests(result), result.cell), SERVER_HITS.key(): _server_hits(result)}


def ideal_hits(some: Sequence[RequestRecord], cell: Cell) -> float | None:
    """Share of the prompt tokens that earlier requests of the repetition began with; None if it is not known."""
    shared = prompts = 0
    for request in some:
        length = request.prompt_tokens or (request.asked[0] if request.asked else cell.prompt_tokens)
        if request.shared_tokens is not None and length:
            shared, prompts = shared + min(request.shared_tokens, length), prompts + length
    return shared / prompts if prompts else None


def _server_hits(result: RunResult) -> float | None:
    """Share of the tokens that the server looked up in its prefix cache and found, over all repetitions.

    llama.cpp counts the tokens that it computed instead; the others of the prompts were in its cache. That holds only
    if all requests were answered, and if it had no others meanwhile.
    """
    for hits, queries in PREFIX_CACHES:
        found, asked = (_growth_of(name, result.repetitions) for name in (hits, queries))
        if found is not None and asked:
            return found / asked
    computed, sent = _growth_of(COMPUTED_PROMPTS, result.repetitions), [r.prompt_tokens for r in requests(result)]
    if computed is None or not all(sent) or any(one.failed for one in result.repetitions):
        return None
    total = sum(tokens or 0 for tokens in sent)
    return 1 - computed / total if 0 < computed <= total else None


def _speculation(result: RunResult) -> Figures:
    """Acceptance of speculative decoding: by counters (vLLM), by the answers (llama.cpp), or by gauges (SGLang)."""
    drafts, proposed, accepted = (
        _growth_of(name, result.repetitions) for name in (DRAFTS, DRAFT_TOKENS, ACCEPTED_TOKENS)
    )
    if proposed and accepted is not None:
        return {ACCEPTANCE.key(): accepted / proposed, ACCEPTED_LENGTH.key(): 1 + accepted / drafts if drafts else None}
    told = [(r.draft_tokens, r.accepted_tokens or 0) for r in requests(result) if r.draft_tokens]
    if told:
        return {ACCEPTANCE.key(): sum(yes for _, yes in told) / sum(all_of for all_of, _ in told)}
    speculating = [reading for reading in _readings_during(result) if any(map(reading.get, SERVER_ACCEPTED_LENGTHS))]
    return {
        metric.key(): mean_of([reading[name] for reading in speculating for name in names if name in reading])
        for metric, names in ((ACCEPTANCE, SERVER_ACCEPTANCES), (ACCEPTED_LENGTH, SERVER_ACCEPTED_LENGTHS))
    }


SERVER_FAMILIES: tuple[Callable[[RunResult], Figures], ...] = (_own_metrics, _prefix_cache, _speculation)
"""Families of metrics that a server tells about itself."""
