"""Responses and embeddings: events and answers, requests, and whole runs without figures that have no meaning."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel

from mlflow_llmbench.backends.openai.answers import read_answer, read_embedding
from mlflow_llmbench.backends.openai.response_events import ResponseEvent, read_event
from mlflow_llmbench.config.cells import cell_name
from mlflow_llmbench.config.spec import parse
from mlflow_llmbench.loadgen.http1 import Exchange
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.errors import UsageError
from mlflow_llmbench.records.results import RequestRecord
from mlflow_llmbench.reports.result import table_cells
from mlflow_llmbench.sweeps.sweep import run

from ...null_server import null_server, read_log

MS = 1_000_000
USAGE = {"input_tokens": 9, "output_tokens": 3, "input_tokens_details": {"cached_tokens": 4}}


def streamed(*events: dict[str, Any] | str, framed: bool = True) -> RequestRecord:
    """Read a stream whose event i arrives i ms after the request."""
    exchange = Exchange(0, t0_ns=1, status=200, headers={"content-type": "text/event-stream"}, framed=framed)
    for number, event in enumerate(events, 1):
        data = event if isinstance(event, str) else f"event: {event['type']}\ndata: {json.dumps(event)}\n\n"
        exchange.parts.append(data.encode())
        exchange.stamps.append(number * MS)
    return read_answer(exchange)


def delta(kind: str, text: str = "a") -> dict[str, Any]:
    return {"type": f"response.{kind}.delta", "delta": text, "item_id": "m", "output_index": 0, "sequence_number": 3}


def ended(status: str = "completed", **more: Any) -> dict[str, Any]:
    return {"type": f"response.{status}", "response": {"status": status, "error": None, "usage": USAGE, **more}}


BEGUN = {"type": "response.created", "response": {"status": "queued", "error": None}}


def test_a_response_is_its_deltas_and_the_usage_of_its_end() -> None:
    read = streamed(BEGUN, delta("reasoning_text"), delta("output_text"), delta("output_text"), ended())
    assert (read.outcome, read.finish) == ("complete", "stop")
    assert read.stamps_ns == (2 * MS, 3 * MS, 4 * MS)
    assert (read.tokens, read.prompt_tokens, read.cached_tokens) == (3, 9, 4)
    assert read.channels == {"reasoning": 1, "content": 2}
    assert read.visible_ns == 3 * MS and read.skipped is None


def test_an_answer_of_the_full_length_is_incomplete_to_the_server_and_complete_to_us() -> None:
    cut = ended("incomplete", incomplete_details={"reason": "max_output_tokens"})
    read = streamed(BEGUN, *[delta("output_text")] * 3, cut)
    assert (read.outcome, read.finish, read.tokens) == ("complete", "length", 3)
    filtered = streamed(delta("output_text"), ended("incomplete", incomplete_details={"reason": "content_filter"}))
    assert (filtered.outcome, filtered.finish) == ("complete", "content_filter")


def test_the_end_token_is_that_of_the_last_event() -> None:
    read = streamed(delta("output_text"), delta("output_text"), ended())
    assert read.tokens == 3 and read.stamps_ns == (MS, 2 * MS, 3 * MS)


@pytest.mark.parametrize(
    ("events", "outcome", "message"),
    [
        ([BEGUN, ended("failed", error={"code": "x", "message": "Out of memory."})], "server_error", "Out of memory."),
        ([BEGUN, ended("failed")], "server_error", "The response failed."),
        ([{"type": "error", "message": "No engine.", "sequence_number": 1}], "server_error", "No engine."),
        ([BEGUN, delta("output_text")], "truncated", "stopped after 1 chunks"),
        ([BEGUN, ended()], "malformed", "had no token"),
        ([BEGUN, "data: [1, 2]\n\n"], "malformed", "Not an event"),
    ],
)
def test_a_response_that_does_not_end_well_is_told(events: list[Any], outcome: str, message: str) -> None:
    read = streamed(*events)
    assert read.outcome == outcome and message in read.message


def test_every_published_delta_has_a_channel() -> None:
    """The names of all events with a delta in OpenAI's own package; sound is no text."""
    published = pytest.importorskip("openai.types.responses")
    kinds = [one for one in vars(published).values() if isinstance(one, type) and issubclass(one, BaseModel)]
    names = {
        str(kind.model_fields["type"].annotation.__args__[0])  # type: ignore[union-attr]
        for kind in kinds
        if {"delta", "type"} <= kind.model_fields.keys() and kind.model_fields["delta"].annotation is str
    }
    assert len(names) > 8
    told = {name: read_event({"type": name, "delta": "x"}) for name in names}
    assert {name for name, event in told.items() if not event or not event.channel} == {"response.audio.delta"}
    assert read_event({"type": "response.output_text.delta", "delta": "x"}) == ResponseEvent("content", "x")
    assert read_event({"type": "response.monologue.delta", "delta": "x"}) == ResponseEvent("monologue", "x")
    assert read_event({"choices": []}) is None


def embedded(body: Any, status: int = 200, kind: str = "application/json") -> RequestRecord:
    exchange = Exchange(0, t0_ns=1, status=status, headers={"content-type": kind}, framed=True, end_ns=9 * MS)
    data = (body if isinstance(body, str) else json.dumps(body)).encode()
    exchange.parts, exchange.stamps = [data[:5], data[5:]], [7 * MS, 8 * MS]
    return read_embedding(exchange)


def test_an_embedding_has_a_time_and_prompt_tokens_and_no_output() -> None:
    usage = {"prompt_tokens": 5, "total_tokens": 5}
    for vector in ([0.5, 1.0], "AACAPw=="):
        read = embedded({"object": "list", "data": [{"embedding": vector}], "usage": usage})
        assert (read.outcome, read.stamps_ns, read.output_tokens, read.prompt_tokens) == ("complete", (8 * MS,), 0, 5)
    assert embedded({"data": [{"embedding": [0.5]}]}).prompt_tokens is None


@pytest.mark.parametrize(
    ("body", "status", "outcome", "message"),
    [
        ({"data": []}, 200, "malformed", "Not an answer with an embedding"),
        ({"data": [{"embedding": []}]}, 200, "malformed", "Not an answer with an embedding"),
        ({"data": {"embedding": [1]}}, 200, "malformed", "Not an answer with an embedding"),
        ("<html>", 200, "malformed", "<html>"),
        ({"error": {"message": "Not a pooling model."}}, 200, "server_error", "Not a pooling model."),
        ({"error": {"message": "Not a pooling model."}}, 400, "refused", "HTTP 400: Not a pooling model."),
        ({"detail": "Broken."}, 500, "server_error", "HTTP 500: Broken."),
    ],
)
def test_what_is_no_embedding_is_told(body: Any, status: int, outcome: str, message: str) -> None:
    read = embedded(body, status)
    assert read.outcome == outcome and message in read.message and read.stamps_ns == ()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"endpoint": "embeddings", "output_tokens": "5"}, "answers without tokens, and output_tokens is given"),
        ({"endpoint": "embeddings", "temperature": "1"}, "answers without tokens, and temperature is given"),
        ({"endpoint": "embeddings", "slo_ttft_ms": "5"}, "answers without tokens, and slo_ttft_ms is given"),
        ({"endpoint": "responses", "max_tokens_field": "max_tokens"}, "always has max_output_tokens"),
        ({"endpoint": "responses", "thinking": "off"}, "thinking=off is for endpoint=chat"),
        ({"endpoint": "responses", "extra_body": '{"input": "x"}'}, "input"),
    ],
)
def test_settings_that_an_endpoint_does_not_have_are_refused(given: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse({"url": "http://h", "backend": "openai"} | given)
    assert message in str(caught.value)


def test_the_name_of_a_cell_says_what_is_asked_for() -> None:
    cell = Cell(backend="openai", url="http://h", model="m", endpoint="embeddings", prompt_tokens=64)
    assert cell_name(cell) == "m online c1 64 embedded"
    assert cell_name(dataclasses.replace(cell, endpoint="responses")) == "m online c1 64+128"


MODEL = "null:ttft_ms=10+itl_ms=3"
SHORT: dict[str, Any] = {"backend": "openai", "model": MODEL, "repetitions": 5, "warmup": 1, "prompt_tokens": 20}


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with null_server(MODEL) as url:
        yield url


def test_responses_are_measured_like_other_streams(server: str, store_uri: str) -> None:
    read_log(server)
    [row] = run(tracking_uri=store_uri, url=server, endpoint="responses", output_tokens=6, concurrency=2, **SHORT).rows
    assert row.outcome == "ok"
    assert row.metrics["lengths/output_tokens_mean"] == 6
    assert row.metrics["lengths/prompt_tokens_mean"] == 20
    assert row.metrics["latency/ttft_ms_p50"] > 9
    assert row.verdict is not None and "length_drift" not in {reason.code for reason in row.verdict.reasons}
    asked = [entry["asked"] for entry in read_log(server).values()]
    assert {one["max_output_tokens"] for one in asked} == {6, 16}  # 16 is a probe's, the fewest that OpenAI takes
    assert not any({"max_tokens", "stream_options", "messages", "prompt"} & set(one) for one in asked)
    assert all(one["ignore_eos"] and one["stream"] for one in asked)


def test_a_failed_response_is_a_failed_request(store_uri: str) -> None:
    with null_server("null:fails=1") as url:
        [row] = run(tracking_uri=store_uri, url=url, endpoint="responses", **SHORT | {"model": "null:fails=1"}).rows
    assert row.outcome == "error" and "Scripted failure." in row.message


@pytest.mark.parametrize(
    "load", [{"concurrency": 2}, {"request_rate": 60, "requests": 20}, {"concurrency": 3, "client_processes": 2}]
)
def test_embeddings_have_rates_and_latencies_and_nothing_of_tokens(
    server: str, store_uri: str, load: dict[str, Any]
) -> None:
    read_log(server)
    done = run(tracking_uri=store_uri, url=server, endpoint="embeddings", slo_e2e_ms=1000, **SHORT, **load)
    [row] = done.rows
    assert row.outcome == "ok"
    metrics = row.metrics
    assert metrics["latency/e2e_ms_p50"] > 9
    assert metrics["throughput/requests_per_s"] > 0
    assert metrics["throughput/prompt_tokens_per_s"] == pytest.approx(20 * metrics["throughput/requests_per_s"])
    assert metrics["lengths/prompt_tokens_mean"] == 20
    assert metrics["goodput/attainment_ratio"] == 1
    assert {"trust/relative_half_width", "trust/cv_ratio", "window/steady_requests_per_s"} <= set(metrics)
    assert not [key for key in metrics if "ttft" in key or "tpot" in key or "itl" in key or "icl" in key]
    heading, _ = table_cells([row], [])
    assert "end to end p50 ms" in heading and not [name for name in heading if "TTFT" in name]
    assert not [key for key in metrics if "output" in key or "total_tokens" in key or "chunk" in key]
    assert row.verdict is not None
    assert not {"length_drift", "chunked_stream"} & {reason.code for reason in row.verdict.reasons}
    for entry in read_log(server).values():
        assert set(entry["asked"]) == {"model", "input"}


def test_a_server_without_embeddings_says_so_before_anything_is_measured(store_uri: str) -> None:
    with null_server("null:status=404") as url:
        [row] = run(tracking_uri=store_uri, url=url, endpoint="embeddings", **SHORT | {"model": "null:status=404"}).rows
    assert row.outcome == "error" and "HTTP 404: Scripted status." in row.message
