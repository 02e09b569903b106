"""What a server saves: prompts from its prefix cache beside those that requests share, and speculative decoding."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from mlflow_llmbench.analysis.summary import summarize
from mlflow_llmbench.loadgen.server_metrics import read_metrics
from mlflow_llmbench.records.codec import from_json, to_json
from mlflow_llmbench.records.results import LoadInfo, RequestRecord, RunResult, ServerReading
from mlflow_llmbench.sweeps.sweep import run

from ..null_server import null_server, read_log
from .test_online import QUIET, TWO_USERS, codes, result

IDEAL, OWN = "prefix_cache/ideal_hit_ratio", "prefix_cache/server_hit_ratio"
RATIO, LENGTH = "speculation/acceptance_ratio", "speculation/tokens_per_draft"


def reporting(one: RunResult, *readings: Mapping[str, float]) -> RunResult:
    """Let a server report these values before each repetition, in its middle, and after it."""
    times = (-1, QUIET.ended_ns // 2, QUIET.ended_ns + 1)
    told = tuple(ServerReading(at, values) for at, values in zip(times, readings, strict=True))
    return dataclasses.replace(one, repetitions=tuple(dataclasses.replace(r, server=told) for r in one.repetitions))


def growing(**to: float) -> list[dict[str, float]]:
    return [{name.replace("__", ":"): step * value for name, value in to.items()} for step in (0, 0.5, 1)]


def sharing(*tokens: int, cached: int | None = None) -> list[RequestRecord]:
    """Requests of 10 prompt tokens each, of which these are shared."""
    return [
        dataclasses.replace(request, shared_tokens=shared, cached_tokens=cached)
        for request, shared in zip(TWO_USERS, tokens, strict=True)
    ]


def test_hits_of_an_ideal_cache_are_told_where_the_load_shares_prefixes() -> None:
    assert IDEAL not in summarize(result(*TWO_USERS))
    metrics = summarize(result(*sharing(0, 6, 6, 4, 9)))
    assert metrics[IDEAL] == pytest.approx(25 / 50)
    assert OWN not in metrics
    assert summarize(result(*sharing(0, 0, 0, 0, 0)))[IDEAL] == 0


def test_hits_are_suspect_beyond_those_that_requests_share() -> None:
    assert codes(result(*sharing(0, 6, 6, 6, 7, cached=5))) == set()
    assert codes(result(*sharing(0, 4, 4, 4, 7, cached=5))) == {"prefix_cache_hits"}
    assert codes(result(*sharing(0, 0, 0, 0, 0, cached=0))) == set()


def test_tokens_of_the_template_are_common_to_all_requests_that_share() -> None:
    def templated(*some: RequestRecord, tokens: int) -> set[str]:
        return codes(dataclasses.replace(result(*some), load=LoadInfo(None, facts={"server.template_tokens": tokens})))

    assert templated(*sharing(0, 4, 4, 4, 7, cached=5), tokens=2) == set()
    assert templated(*sharing(0, 4, 4, 4, 7, cached=5), tokens=1) == {"prefix_cache_hits"}
    alone = [dataclasses.replace(request, cached_tokens=1) for request in TWO_USERS]
    assert templated(*alone, tokens=2) == {"prefix_cache_hits"}


@pytest.mark.parametrize(
    ("readings", "share"),
    [
        (growing(vllm__prefix_cache_queries_total=200, vllm__prefix_cache_hits_total=50), 0.25),
        (growing(vllm__gpu_prefix_cache_queries_total=200, vllm__gpu_prefix_cache_hits_total=0), 0.0),
        (growing(sglang__prompt_tokens_total=50, sglang__cached_tokens_total=20), 0.4),
        (growing(llamacpp__prompt_tokens_total=20), 0.6),  # computed, of 50 that were sent
        (growing(llamacpp__prompt_tokens_total=60), None),  # others used it too
        (growing(sglang__prompt_tokens_total=50), None),
        (growing(vllm__prefix_cache_queries_total=0, vllm__prefix_cache_hits_total=0), None),
        (growing(vllm__num_preemptions_total=1), None),
    ],
)
def test_the_servers_own_hits_come_from_its_counters(readings: list[dict[str, float]], share: float | None) -> None:
    metrics = summarize(reporting(result(*TWO_USERS), *readings))
    assert metrics.get(OWN) == (None if share is None else pytest.approx(share))


def test_computed_prompts_tell_no_hits_if_a_request_failed() -> None:
    failures = (dataclasses.replace(TWO_USERS[0], outcome="timeout", message="It took long."),)
    one = result(*TWO_USERS, failures=failures)
    assert OWN not in summarize(reporting(one, *growing(llamacpp__prompt_tokens_total=20)))


def test_acceptance_by_counters_by_answers_and_by_gauges() -> None:
    one = result(*TWO_USERS)
    assert not {RATIO, LENGTH} & set(summarize(one))
    drafts = "vllm__spec_decode_num_"
    vllm = growing(
        **{f"{drafts}drafts_total": 10, f"{drafts}draft_tokens_total": 40, f"{drafts}accepted_tokens_total": 25}
    )
    metrics = summarize(reporting(one, *vllm))
    assert (metrics[RATIO], metrics[LENGTH]) == (25 / 40, 1 + 25 / 10)
    assert metrics["server/vllm:spec_decode_num_draft_tokens_total"] == 5 * 40
    idle = growing(
        **{f"{drafts}drafts_total": 0, f"{drafts}draft_tokens_total": 0, f"{drafts}accepted_tokens_total": 0}
    )
    assert not {RATIO, LENGTH} & set(summarize(reporting(one, *idle)))
    told = [dataclasses.replace(r, draft_tokens=8, accepted_tokens=n) for n, r in enumerate(TWO_USERS)]
    metrics = summarize(result(*told))
    assert metrics[RATIO] == 10 / 40 and LENGTH not in metrics
    sglang = {"sglang:spec_accept_length": 2.5, "sglang:spec_accept_rate": 0.5}
    metrics = summarize(reporting(one, {}, sglang, {}))
    assert (metrics[RATIO], metrics[LENGTH]) == (0.5, 2.5)
    off = {"sglang:spec_accept_length": 0.0, "sglang:spec_accept_rate": 0.0}
    assert not {RATIO, LENGTH} & set(summarize(reporting(one, off, off, off)))


def test_engines_that_report_their_acceptance_are_not_added_up() -> None:
    text = "\n".join(f'sglang:spec_accept_length{{dp_rank="{rank}"}} {value}' for rank, value in enumerate((2.5, 2.0)))
    assert read_metrics(text) == {"sglang:spec_accept_length": 2.5}


def test_the_new_fields_come_back_from_json_and_are_left_out_where_absent() -> None:
    plain = TWO_USERS[0]
    assert not {"shared_tokens", "draft_tokens", "accepted_tokens"} & set(to_json(plain))
    told = dataclasses.replace(plain, shared_tokens=0, draft_tokens=3, accepted_tokens=0)
    assert from_json(RequestRecord, json.loads(json.dumps(to_json(told)))) == told


SHARING = {
    "prompt_tokens": 40,
    "prefix_tokens": 24,
    "prefix_count": 2,
    "output_tokens": 3,
    "requests": 12,
    "concurrency": 2,
}
SHORT: dict[str, Any] = {"backend": "openai", "repetitions": 5, "warmup": 1}


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with null_server("null:cache=told", "null:cache=metrics", "null:drafted=8+accepted=6") as url:
        yield url


def test_a_cache_finds_what_is_shared_and_no_more(server: str, store_uri: str) -> None:
    """Ten of twelve requests find the 24 tokens of their group; the first of each group finds none."""
    read_log(server)
    [row] = run(tracking_uri=store_uri, url=server, model="null:cache=told", **SHORT, **SHARING).rows
    assert row.metrics[IDEAL] == pytest.approx(10 * 24 / (12 * 40))
    cached = row.metrics["lengths/cached_prompt_ratio"]
    assert row.metrics[IDEAL] <= cached < row.metrics[IDEAL] + 0.02  # a word after the prefix may be the same by chance
    assert row.metrics[OWN] == pytest.approx(cached)
    assert row.verdict is not None and "prefix_cache_hits" not in {reason.code for reason in row.verdict.reasons}
    asked = [
        entry["asked"]["prompt"].split() for entry in read_log(server).values() if entry["asked"]["max_tokens"] == 3
    ]
    assert {len(words) for words in asked} == {40}
    [again] = run(tracking_uri=store_uri, url=server, model="null:cache=told", **SHORT, **SHARING).rows
    assert again.metrics["lengths/cached_prompt_ratio"] > 0.9  # the same seed on the same server
    assert again.verdict is not None and "prefix_cache_hits" in {reason.code for reason in again.verdict.reasons}


def test_without_counts_in_the_answers_each_run_has_prefixes_of_its_own(server: str, store_uri: str) -> None:
    for _ in range(2):
        [row] = run(tracking_uri=store_uri, url=server, model="null:cache=metrics", **SHORT, **SHARING).rows
        assert "lengths/cached_prompt_ratio" not in row.metrics
        assert row.metrics[IDEAL] == pytest.approx(10 * 24 / (12 * 40))
        assert row.metrics[IDEAL] <= row.metrics[OWN] < row.metrics[IDEAL] + 0.02
        assert row.verdict is not None and "prefix_cache_hits" not in {reason.code for reason in row.verdict.reasons}


def test_several_client_processes_share_the_same_prefixes(server: str, store_uri: str) -> None:
    settings = SHORT | SHARING | {"client_processes": 2}
    [row] = run(tracking_uri=store_uri, url=server, model="null:cache=metrics", **settings).rows
    assert row.metrics[IDEAL] == pytest.approx(10 * 24 / (12 * 40))
    assert row.metrics[IDEAL] <= row.metrics[OWN] < row.metrics[IDEAL] + 0.02


def test_a_trace_with_blocks_is_replayed_with_its_sharing(server: str, store_uri: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    blocks = [[0, 1, 2], [0, 1, 3], [0, 4], [0, 1, 2]]
    lengths = [1100, 1200, 600, 1100]
    lines = [
        {"timestamp": 20 * i, "input_length": n, "output_length": 2, "hash_ids": ids}
        for i, (n, ids) in enumerate(zip(lengths, blocks, strict=True))
    ]
    trace.write_text("\n".join(map(json.dumps, lines)))
    [row] = run(tracking_uri=store_uri, url=server, model="null:cache=metrics", trace=str(trace), **SHORT).rows
    assert row.metrics[IDEAL] == pytest.approx((0 + 1024 + 512 + 1100) / sum(lengths))
    assert row.metrics[IDEAL] <= row.metrics[OWN] < row.metrics[IDEAL] + 0.01
    assert row.metrics["lengths/prompt_tokens_mean"] == sum(lengths) / 4


def test_a_prefix_that_the_template_leaves_no_room_for_is_refused(server: str, store_uri: str) -> None:
    settings = SHORT | SHARING | {"prompt_tokens": 30}
    with null_server("null:prompt_extra=10") as url:
        [row] = run(tracking_uri=store_uri, url=url, model="null:prompt_extra=10", **settings).rows
    assert row.outcome == "error"
    assert "prompt_tokens=30 has no room for a prefix of 24 tokens" in row.message
    assert "the server's template adds 10 tokens" in row.message


@pytest.mark.parametrize("script", ["null:drafted=8+accepted=6", "null:drafted=8+accepted=6+timings=1"])
def test_acceptance_is_a_metric_of_the_run(server: str, store_uri: str, script: str) -> None:
    settings = SHORT | {"output_tokens": 4, "prompt_tokens": 16}
    [row] = run(tracking_uri=store_uri, url=server, model=script, **settings).rows
    assert row.metrics[RATIO] == 0.75
    assert row.metrics.get(LENGTH) == (None if "timings" in script else 1 + 6 / 2)
