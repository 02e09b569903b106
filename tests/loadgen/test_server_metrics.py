"""Read a server's /metrics: parsing, times of reading, and the figures made from them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import pytest

from mlflow_llmbench.analysis.summary import summarize
from mlflow_llmbench.backends.openai.backend import OpenAIBackend
from mlflow_llmbench.loadgen import client
from mlflow_llmbench.loadgen.client import Load, Trace
from mlflow_llmbench.loadgen.server_metrics import read_metrics
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.codec import from_json, to_json
from mlflow_llmbench.records.metrics import KEYS
from mlflow_llmbench.records.results import ModelFacts, RunResult, ServerReading
from mlflow_llmbench.sweeps.sweep import run
from mlflow_llmbench.workloads.prompts import load_prompts

from ..measure.test_online import CELL, MS, QUIET, TWO_USERS, codes, result
from ..null_server import null_server

MODEL = "null:ttft_ms=5+itl_ms=1"

TEXT = """# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a \\"b\\""} 3.0
vllm:num_requests_running{engine="1",model_name="x"} 2.0 1395066363000
vllm:kv_cache_usage_perc{engine="0"} 0.25
vllm:kv_cache_usage_perc{engine="1"} 0.5
vllm:request_queue_time_seconds_bucket{le="+Inf"} 4
vllm:request_queue_time_seconds_sum 1.5e-01
vllm:request_queue_time_seconds_count 4
vllm:num_requests_waiting NaN
tgi_queue_size +Inf
llamacpp:requests_processing
llamacpp:requests_deferred two
python_gc_objects_collected_total{generation="0"} 12
sglang:num_queue_reqs{x="y" 5
<html>
"""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with null_server(MODEL, f"{MODEL}+hits=8") as url:
        yield url


def send(url: str, script: str, load: Load, processes: int = 1, repetition: int = 0) -> tuple[OpenAIBackend, Trace]:
    cell = Cell(backend="openai", url=url, model=f"null:{script}", output_tokens=4, prompt_tokens=16)
    backend = OpenAIBackend(cell, ModelFacts("", "none", "", ""))
    try:
        return backend, backend.send(load_prompts("synthetic"), cell, repetition, load, processes=processes)
    finally:
        backend.close()


def test_label_sets_are_summed_and_of_shares_the_largest_is_taken() -> None:
    assert read_metrics(TEXT) == {
        "vllm:num_requests_running": 5,
        "vllm:kv_cache_usage_perc": 0.5,
        "vllm:request_queue_time_seconds_sum": 0.15,
        "vllm:request_queue_time_seconds_count": 4,
    }
    assert read_metrics("") == {}


@pytest.mark.parametrize("processes", [1, 2])
def test_a_server_is_read_before_during_and_after_a_load(
    server: str, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    """Four users at two slots: two wait while two are served."""
    if processes == 1:
        monkeypatch.setattr(client, "SCRAPE_S", 0.1)
    backend, trace = send(server, "ttft_ms=1300+itl_ms=1+slots=2", Load(4, 4), processes)
    readings = backend.readings(trace)
    assert readings[0].t_ns < trace.started_ns
    assert readings[-1].t_ns > trace.ended_ns
    during = [r for r in readings if trace.started_ns < r.t_ns < trace.ended_ns]
    assert len(during) >= (2 if processes == 2 else 8)
    assert len(readings) - len(during) in ((2,) if processes == 1 else (2, 3))
    assert max(r.values["vllm:num_requests_running"] for r in during) == 2
    assert max(r.values["vllm:num_requests_waiting"] for r in during) == 2
    assert readings[-1].values["vllm:num_requests_running"] == 0
    grown = {name: readings[-1].values[name] - readings[0].values[name] for name in readings[0].values}
    assert grown["vllm:prefix_cache_queries_total"] == 64
    assert grown["vllm:request_queue_time_seconds_count"] == 4
    assert 2.4 < grown["vllm:request_queue_time_seconds_sum"] < 6
    assert grown["vllm:num_preemptions_total"] == 0


def test_the_last_reading_is_after_the_last_process(server: str) -> None:
    """The first of two processes reads the metrics, and its only answer ends long before the second's."""
    backend, trace = send(server, "ttft_ms=20+itl_ms=1", Load(arrivals_ns=(0, 400_000_000)), processes=2)
    first, last = backend.readings(trace)[0], backend.readings(trace)[-1]
    assert trace.parts[0].ended_ns + 200e6 < trace.ended_ns < last.t_ns
    assert (
        last.values["vllm:request_queue_time_seconds_count"] - first.values["vllm:request_queue_time_seconds_count"]
        == 2
    )


def test_a_long_load_holds_a_bounded_number_of_readings(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "SCRAPE_S", 0.01)
    monkeypatch.setattr(client, "MAX_SCRAPES", 6)
    backend, trace = send(server, "ttft_ms=700+itl_ms=1", Load(1))
    times = [r.t_ns for r in backend.readings(trace)]
    assert 4 <= len(times) <= 8
    assert times == sorted(times)
    assert times[0] < trace.started_ns < trace.ended_ns < times[-1]


def test_warm_ups_and_servers_without_metrics_have_no_readings(server: str) -> None:
    for url, repetition in ((server, -1), (f"{server}/elsewhere", 0)):
        backend, trace = send(url, "ttft_ms=5+itl_ms=1", Load(2), repetition=repetition)
        assert {backend.read(exchange).outcome for exchange in trace.exchanges} == {"complete"}
        assert (trace.scrapes, backend.readings(trace)) == ((), ())


def told(*values: dict[str, float]) -> RunResult:
    """Five repetitions, each with these readings: the first one before its load, the last one after it."""
    one = result(*TWO_USERS)
    times = [-MS, *(number * 100 * MS for number in range(1, len(values) - 1)), QUIET.ended_ns + MS]
    readings = tuple(ServerReading(at, reading) for at, reading in zip(times, values, strict=False))
    return dataclasses.replace(one, repetitions=tuple(dataclasses.replace(r, server=readings) for r in one.repetitions))


def test_gauges_are_of_the_load_and_counters_of_their_growth() -> None:
    one = told(
        {
            "vllm:num_requests_running": 90,
            "vllm:num_preemptions_total": 10,
            "tgi_request_queue_duration_sum": 1,
            "tgi_request_queue_duration_count": 10,
        },
        {
            "vllm:num_requests_running": 2,
            "vllm:num_preemptions_total": 11,
            "tgi_request_queue_duration_sum": 1,
            "tgi_request_queue_duration_count": 10,
        },
        {
            "vllm:num_requests_running": 4,
            "vllm:num_preemptions_total": 11,
            "tgi_request_queue_duration_sum": 2,
            "tgi_request_queue_duration_count": 11,
        },
        {
            "vllm:num_requests_running": 90,
            "vllm:num_preemptions_total": 13,
            "tgi_request_queue_duration_sum": 4,
            "tgi_request_queue_duration_count": 12,
        },
    )
    own = {key: value for key, value in summarize(one).items() if key.startswith("server/")}
    assert own == {
        "server/vllm:num_requests_running_mean": 3,
        "server/vllm:num_requests_running_max": 4,
        "server/vllm:num_preemptions_total": 15,
        "server/tgi_request_queue_duration_mean": 1.5,
    }
    assert set(own) <= set(KEYS)
    assert from_json(RunResult, json.loads(json.dumps(to_json(one)))) == one
    assert not any(key.startswith("server/") for key in summarize(result(*TWO_USERS)))


def test_what_was_not_told_is_absent() -> None:
    restarted = told({"vllm:num_preemptions_total": 9}, {"vllm:num_preemptions_total": 1})
    never_waited = told(
        {"tgi_request_queue_duration_sum": 1, "tgi_request_queue_duration_count": 3},
        {"tgi_request_queue_duration_sum": 1, "tgi_request_queue_duration_count": 3},
    )
    short = told({"vllm:num_requests_running": 1}, {"vllm:num_requests_running": 1})
    for one in (restarted, never_waited, short, told({"vllm:num_preemptions_total": 9})):
        assert not any(key.startswith("server/") for key in summarize(one))


@pytest.mark.parametrize(("hits", "found"), [(10, {"prefix_cache_hits"}), (1, set())])
def test_the_prefix_cache_is_judged_by_metrics_where_answers_do_not_tell(hits: float, found: set[str]) -> None:
    before, after = (
        {"vllm:prefix_cache_hits_total": 5, "vllm:prefix_cache_queries_total": 50},
        {"vllm:prefix_cache_queries_total": 250},
    )
    one = told(before, after | {"vllm:prefix_cache_hits_total": 5 + hits})
    assert codes(one) == found
    quiet = tuple(
        dataclasses.replace(r, requests=tuple(dataclasses.replace(q, cached_tokens=0) for q in r.requests))
        for r in one.repetitions
    )
    assert codes(dataclasses.replace(one, repetitions=quiet)) == set()
    assert CELL.history == "none"


def test_a_server_that_tells_of_itself_is_a_cell(server: str, store_uri: str) -> None:
    settings: dict[str, Any] = {
        "backend": "openai",
        "url": server,
        "repetitions": 5,
        "warmup": 1,
        "output_tokens": 4,
        "prompt_tokens": 16,
    }
    done = run(tracking_uri=store_uri, model=f"{MODEL}+hits=8", **settings)
    [row] = done.rows
    assert row.outcome == "ok", row.message
    assert row.metrics["server/vllm:prefix_cache_hits_total"] == 8 * 12 * 5
    assert row.metrics["server/vllm:request_queue_time_seconds_mean"] >= 0
    assert row.verdict and "prefix_cache_hits" in {reason.code for reason in row.verdict.reasons}
