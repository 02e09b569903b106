"""Conversations with a server, turn by turn: requests, counts, and whole runs to MLflow."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from mlflow_llmbench.analysis.summary import turns_of
from mlflow_llmbench.backends.openai.backend import OpenAIBackend
from mlflow_llmbench.cli.main import main
from mlflow_llmbench.loadgen.client import Load
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.results import ModelFacts, RequestRecord
from mlflow_llmbench.sweeps.sweep import run
from mlflow_llmbench.workloads.prompts import load_prompts

from ...measure.test_online import CELL, codes, request, result
from ...null_server import null_server, read_log

TALKS = (("Hello.", "And then?", "Thanks."), ("What now?",), ("One.", "Two."))
MODEL = "null:ttft_ms=10+itl_ms=1"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with null_server(MODEL) as url:
        yield url


@pytest.fixture
def talks(tmp_path: Path) -> Path:
    file = tmp_path / "talks.jsonl"
    lines = []
    for talk in TALKS:
        messages = [
            message
            for text in talk
            for message in ({"role": "user", "content": text}, {"role": "assistant", "content": "scripted"})
        ]
        lines.append(json.dumps({"messages": messages[:-1]}))
    file.write_text("\n".join(lines))
    return file


def hold(url: str, talks: Path, script: str, load: Load, **settings: Any) -> list[RequestRecord]:
    asked = {
        "endpoint": "chat",
        "history": "sent",
        "prompt_tokens": None,
        "output_tokens": 4,
        "workload": str(talks),
    } | settings
    cell = Cell(backend="openai", url=url, model=f"null:{script}", **asked)
    backend = OpenAIBackend(cell, ModelFacts("", "none", "", ""))
    read_log(url)
    try:
        trace = backend.send(load_prompts(str(talks)), cell, 0, load)
    finally:
        backend.close()
    return [backend.read(exchange) for exchange in trace.exchanges]


def test_each_turn_has_all_that_was_said_and_the_servers_own_answers(server: str, talks: Path) -> None:
    records = hold(server, talks, "ttft_ms=5+itl_ms=1", Load(requests=4, concurrency=2))
    assert {r.outcome for r in records} == {"complete"}
    assert sorted((r.conversation, r.turn) for r in records) == [
        (0, 1),
        (0, 2),
        (0, 3),
        (1, 1),
        (2, 1),
        (2, 2),
        (3, 1),
        (3, 2),
        (3, 3),
    ]
    log = read_log(server)
    first, second, third = (log[f"0-{turn}"] for turn in (1, 2, 3))
    messages = third["asked"]["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant"] * 2 + ["user"]
    assert messages[0]["content"].endswith(" Hello.")
    assert [m["content"] for m in messages[1:]] == [" word" * 4, "And then?", " word" * 4, "Thanks."]
    assert second["asked"]["messages"] == messages[:3]
    assert first["asked"]["messages"] == messages[:1]
    assert (
        log["3-1"]["asked"]["messages"] != first["asked"]["messages"]
    )  # the same conversation, with other unique words before it
    for number, turn in ((0, 2), (0, 3), (2, 2)):
        own, before = (next(r for r in records if (r.conversation, r.turn) == (number, t)) for t in (turn, turn - 1))
        assert own.t0_ns > before.stamps_ns[-1]
        assert (own.prompt_tokens or 0) > (before.prompt_tokens or 0)


def test_reasoning_is_not_sent_back(server: str, talks: Path) -> None:
    hold(server, talks, "ttft_ms=1+itl_ms=1+reasoning=3", Load(requests=1))
    assert read_log(server)["0-2"]["asked"]["messages"][1] == {"role": "assistant", "content": " word"}


@pytest.mark.parametrize("script", ["cut_at=3", "status=500", "error_at=2"])
def test_a_turn_that_fails_ends_its_conversation_and_no_other(server: str, talks: Path, script: str) -> None:
    records = hold(server, talks, script, Load(requests=3, concurrency=2))
    assert sorted((r.conversation, r.turn) for r in records) == [(0, 1), (1, 1), (2, 1)]
    assert "complete" not in {r.outcome for r in records}


def test_no_turn_is_begun_after_the_duration(server: str, talks: Path) -> None:
    records = hold(server, talks, "ttft_ms=60+itl_ms=1", Load(duration_s=0.1))
    assert [(r.conversation, r.turn) for r in records] == [(0, 1), (0, 2)]


def test_turns_are_told_by_their_number_and_later_ones_may_be_cached() -> None:
    cell = dataclasses.replace(CELL, history="sent", endpoint="chat", prompt_tokens=None)
    said = [
        request(0, 10, 20, 30, 40, turn=1, conversation=0),
        request(0, 14, 24, 34, 44, turn=1, conversation=1),
        request(45, 50, 60, 70, 80, turn=2, conversation=0, cached_tokens=8, prompt_tokens=20),
    ]
    untold = result(*[dataclasses.replace(r, cached_tokens=None) for r in said], cell=cell)
    assert [(t.number, t.count, t.prompt_tokens, t.prefilled_tokens, t.ttft_ms) for t in turns_of(untold)] == [
        (1, 10, 10, None, 12),
        (2, 5, 20, None, 5),
    ]
    told = [dataclasses.replace(r, cached_tokens=r.cached_tokens or 0) for r in said]
    values = turns_of(result(*told, cell=cell))[1].values()
    assert {series.key: value for series, value in values.items()} == {
        "steps/turn_prompt_tokens": 20,
        "steps/turn_prefilled_tokens": 12,
        "steps/turn_ttft_ms": 5,
        "steps/turn_e2e_ms": 35,
    }
    assert "prefix_cache_hits" not in codes(result(*told, cell=cell))
    assert "prefix_cache_hits" in codes(result(dataclasses.replace(told[0], cached_tokens=3), *told[1:], cell=cell))


def test_conversations_are_a_cell(server: str, talks: Path, store_uri: str) -> None:
    asked = [
        "--url",
        server,
        "--model",
        MODEL,
        "--workload",
        str(talks),
        *"--history sent --endpoint chat --prompt-tokens auto".split(),
    ]
    asked += [
        *"--concurrency 2 --requests 6 --output-tokens 4 --repetitions 5 --warmup 1 --tracking-uri".split(),
        store_uri,
    ]
    assert main(["online", *asked]) == 0
    client = MlflowClient(store_uri)
    [run] = client.search_runs([client.get_experiment_by_name("llmbench").experiment_id])
    assert run.data.params["history"] == "sent"
    points = {p.step: p.value for p in client.get_metric_history(run.info.run_id, "steps/turn_ttft_ms")}
    assert set(points) == {1, 2, 3}
    assert min(points.values()) > 9
    lengths = {p.step: p.value for p in client.get_metric_history(run.info.run_id, "steps/turn_prompt_tokens")}
    assert lengths[1] < lengths[2] < lengths[3]
    assert not client.get_metric_history(run.info.run_id, "steps/turn_prefilled_tokens")
    report = Path(client.download_artifacts(run.info.run_id, "report.md")).read_text()
    assert "## Turn by turn" in report


CALL = {"id": "c1", "type": "function", "function": {"name": "search", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "search", "parameters": {"type": "object"}}}
AGENT = [
    {"role": "system", "content": "You help."},
    {"role": "user", "content": "Where is it?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "It left.", "delay_ms": 60},
    {"role": "assistant", "content": "It left."},
    {"role": "user", "content": "Thanks.", "delay_ms": 120},
]


@pytest.fixture
def agents(tmp_path: Path) -> Path:
    file = tmp_path / "agents.jsonl"
    file.write_text(json.dumps({"messages": AGENT, "tools": [TOOL]}))
    return file


def test_an_agent_sends_its_tools_results_of_the_recorded_calls_and_thinks(server: str, agents: Path) -> None:
    records = hold(server, agents, "ttft_ms=5+itl_ms=1", Load(requests=2, concurrency=2))
    log = read_log(server)
    first, second, third = (log[f"1-{turn}"]["asked"] for turn in (1, 2, 3))
    assert first["tools"] == second["tools"] == third["tools"] == [TOOL]
    assert [m["role"] for m in third["messages"]] == ["system", "user", "assistant", "tool", "assistant", "user"]
    system, *asked = first["messages"]
    assert system["content"].endswith(" You help.") and len(system["content"].split()) == 8 + 2
    assert asked == [AGENT[1]]
    assert second["messages"] == [system, AGENT[1], AGENT[2], {k: v for k, v in AGENT[3].items() if k != "delay_ms"}]
    assert third["messages"][4:] == [
        {"role": "assistant", "content": " word" * 4},
        {"role": "user", "content": "Thanks."},
    ]
    for number, turn, delay_ms in ((0, 2, 60), (1, 2, 60), (0, 3, 120), (1, 3, 120)):
        own, before = (next(r for r in records if (r.conversation, r.turn) == (number, t)) for t in (turn, turn - 1))
        assert own.t0_ns >= (before.end_ns or 0) + delay_ms * 1_000_000


def test_a_turn_that_would_come_after_the_end_is_not_waited_for(server: str, agents: Path) -> None:
    file = agents.with_name("slow.jsonl")
    file.write_text(json.dumps({"messages": [*AGENT[:3], {**AGENT[3], "delay_ms": 80_000_000}]}))
    records = hold(server, file, "ttft_ms=5+itl_ms=1", Load(duration_s=0.2))
    assert {r.turn for r in records} == {1}


def test_groups_of_conversations_begin_alike_and_each_then_with_words_of_its_own(server: str, agents: Path) -> None:
    hold(server, agents, "ttft_ms=1", Load(requests=6), prefix_tokens=40, prefix_count=2)
    log = read_log(server)
    begun = [log[f"{number}-1"]["asked"]["messages"][0]["content"].split() for number in range(6)]
    assert {len(words) for words in begun} == {40 + 8 + 2}
    assert len({tuple(words[:40]) for words in begun}) == 2
    assert len({tuple(words[:48]) for words in begun}) == 6


def test_what_turns_share_is_told_and_found(agents: Path, store_uri: str) -> None:
    """The server counts words: two turns after a prefix of 40, of which all that was said before is known."""
    with null_server("null:cache=told") as url:
        done = run(
            tracking_uri=store_uri, backend="openai", url=url, model="null:cache=told", endpoint="chat", history="sent",
            workload=str(agents), prompt_tokens="auto", output_tokens=4, requests=6, repetitions=5, warmup=1,
            prefix_tokens=40,
        )  # fmt: skip
    [row] = done.rows
    # Turns of 53, 53 + 1 + 2 and 53 + 3 + 4 + 1 words: "None" stands for the recorded call.
    prompts = (53, 56, 61)
    assert row.metrics["lengths/prompt_tokens_mean"] == pytest.approx(sum(prompts) / 3)
    ideal = (5 / 6 * 40 + 53 + 56 + 3) / sum(prompts)
    assert row.metrics["prefix_cache/ideal_hit_ratio"] == pytest.approx(ideal)
    own = (5 / 6 * 40 + 53 + 56) / sum(prompts)  # the cache of the test's server keeps no answers
    assert row.metrics["prefix_cache/server_hit_ratio"] == pytest.approx(own, abs=0.005)
    assert row.verdict is not None and "prefix_cache_hits" not in {reason.code for reason in row.verdict.reasons}
