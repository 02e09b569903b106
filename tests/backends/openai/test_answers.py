"""One answer of a server, event by event: what is a token, of which channel, what is noise, what contradicts."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mlflow_llmbench.backends.openai.answers import read_answer
from mlflow_llmbench.loadgen.http1 import Exchange
from mlflow_llmbench.records.codec import from_json, to_json
from mlflow_llmbench.records.results import RequestRecord

STREAM = {"content-type": "text/event-stream"}


def read(*events: Any, headers: dict[str, str] = STREAM, status: int = 200) -> RequestRecord:
    """The record of an answer whose events (a text, or a value that is written as JSON) come 1 ns apart, from 1 on."""
    parts = [f"data: {one if isinstance(one, str) else json.dumps(one)}\n\n".encode() for one in events]
    return read_answer(
        Exchange(0, status=status, headers=headers, stamps=list(range(1, len(parts) + 1)), parts=parts, framed=True)
    )


def delta(**fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": None}]}


def end(reason: str = "stop", **fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": reason}]}


NOISE = [
    "null",
    "",
    "  ",
    {},
    {"choices": None},
    {"choices": []},
    {"object": "ping"},
    {"type": "ping"},
    {"id": "x", "object": "chat.completion.chunk", "choices": [], "prompt_filter_results": [{"prompt_index": 0}]},
    {"error": None},
    {"choices": [None]},
    {"choices": [{"index": 0, "delta": None, "finish_reason": None}]},
    {"choices": [{"index": 0, "finish_reason": None}]},
    delta(),
    delta(role="assistant", content=""),
    delta(role="assistant", content=None, tool_calls=None, refusal=None),
    delta(content=""),
    delta(content=[]),
    delta(reasoning_details=[]),
    delta(reasoning_details=[{"type": "reasoning.encrypted", "data": "AAAA", "format": "x", "index": 0}]),
    delta(thinking_blocks=[{"type": "thinking", "thinking": "", "signature": "AAAA"}]),
    delta(annotations=[{"type": "url_citation", "url_citation": {"url": "https://example.org"}}]),
]


@pytest.mark.parametrize("noise", NOISE, ids=json.dumps)
def test_what_carries_no_token_is_passed_over(noise: Any) -> None:
    record = read(noise, delta(content="a"), noise, delta(content="b"), noise, end("length"), noise, "[DONE]")
    assert (record.outcome, record.stamps_ns, record.visible_ns, record.channels) == ("complete", (2, 4), 2, None)


def test_events_without_choices_and_counts_are_counted() -> None:
    usage = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}
    record = read(
        "null", delta(role="assistant", content=""), delta(content="a"), {}, delta(content="b"), end(), usage, "[DONE]"
    )
    assert (record.outcome, record.skipped, record.tokens) == ("complete", 2, 2)
    quiet = read(delta(content="a"), end(), usage, "[DONE]")
    assert quiet.skipped is None and "skipped" not in to_json(quiet)


@pytest.mark.parametrize(
    ("fields", "channel"),
    [
        ({"reasoning_content": "hm"}, "reasoning"),
        ({"reasoning": "hm"}, "reasoning"),
        ({"content": "", "reasoning": "hm", "reasoning_content": "hm"}, "reasoning"),
        ({"content": None, "reasoning_details": [{"type": "reasoning.text", "text": "hm"}]}, "reasoning"),
        ({"reasoning_details": [{"type": "reasoning.summary", "summary": "hm"}]}, "reasoning"),
        ({"thinking_blocks": [{"type": "thinking", "thinking": "hm", "signature": None}]}, "reasoning"),
        ({"thinking": "hm"}, "reasoning"),
        ({"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}]}, "reasoning"),
        ({"tool_calls": [{"index": 0, "id": "c", "function": {"name": "f", "arguments": ""}}]}, "tools"),
        ({"function_call": {"arguments": "{"}}, "tools"),
        ({"refusal": "I"}, "refusal"),
        ({"audio": {"id": "a", "data": "AAAA", "transcript": "hello"}}, "audio"),
        ({"inner_monologue": "hm"}, "inner_monologue"),
    ],
)
def test_text_of_any_field_is_a_token_of_its_channel(fields: dict[str, Any], channel: str) -> None:
    """The first token is that of any channel, the first visible one that of the answer."""
    record = read(delta(role="assistant"), delta(**fields), delta(**fields), delta(content="a"), end(), "[DONE]")
    assert (record.outcome, record.stamps_ns, record.visible_ns) == ("complete", (2, 3, 4), 4)
    assert record.channels == {channel: 2, "content": 1}
    alone = read(delta(**fields), end(), "[DONE]")
    assert (alone.outcome, alone.visible_ns, alone.channels) == ("complete", None, {channel: 1})
    assert from_json(RequestRecord, to_json(alone)) == alone


def test_tokens_of_a_channel_are_counted_by_the_servers_counts() -> None:
    def counted(tokens: int, **fields: Any) -> dict[str, Any]:
        return {**delta(**fields), "usage": {"prompt_tokens": 1, "completion_tokens": tokens}}

    record = read(counted(5, reasoning="so it is"), counted(7, content="a b"), end("length"), "[DONE]")
    assert (record.chunk_tokens, record.channels) == ((5, 2), {"reasoning": 5, "content": 2})


def test_parts_of_the_content_are_its_text() -> None:
    both = [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "a"}]
    record = read(delta(content=both), delta(content=[{"type": "text", "text": "b"}]), end(), "[DONE]")
    assert (record.stamps_ns, record.visible_ns, record.channels) == ((1, 2), 1, None)
    legacy = read({"choices": [{"text": "a", "index": 0}]}, {"choices": [{"text": "", "finish_reason": "stop"}]})
    assert (legacy.outcome, legacy.stamps_ns) == ("complete", (1,))


@pytest.mark.parametrize(
    "event",
    [
        "not JSON",
        '{"choices": [{"delta": ',
        "[]",
        "5",
        '"text"',
        "true",
        {"choices": "none"},
        {"choices": {"delta": {}}},
        {"choices": [5]},
        {"choices": [{"delta": "text"}]},
        "[" * 100_000,
    ],
)
def test_what_contradicts_the_protocol_is_malformed_and_shown(event: Any) -> None:
    record = read(delta(content="a"), event, delta(content="b"), end(), "[DONE]")
    assert (record.outcome, record.stamps_ns) == ("malformed", (1,))
    shown = event if isinstance(event, str) else json.dumps(event)
    assert record.message.startswith(f"Not an event of a completion: {shown[:40]!r}"[:60].rstrip("'"))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ({"error": {"message": "Out of slots.", "code": 503}}, "Out of slots."),
        ({"error": "Out of slots."}, "Out of slots."),
        ({"object": "error", "message": "Out of slots.", "code": 400}, "Out of slots."),
    ],
)
def test_an_error_in_the_servers_own_words(error: dict[str, Any], words: str) -> None:
    record = read(delta(content="a"), error, "[DONE]")
    assert (record.outcome, record.message) == ("server_error", f"An error in the stream: {words}")
    plain = {"content-type": "application/json"}
    told = read_answer(Exchange(0, status=200, headers=plain, stamps=[1], parts=[json.dumps(error).encode()]))
    assert (told.outcome, told.message) == ("server_error", f"HTTP 200: {words}")


def test_a_refusal_says_when_to_come_back() -> None:
    body = json.dumps({"error": {"message": "Rate limit reached."}}).encode()
    headers = {"content-type": "application/json", "retry-after": "20"}
    record = read_answer(Exchange(0, status=429, headers=headers, stamps=[1], parts=[body]))
    assert (record.outcome, record.message) == ("refused", "HTTP 429: Rate limit reached. (Retry-After: 20)")


def test_an_answer_that_is_no_stream_is_shown() -> None:
    body = b'{"object": "text_completion",\n "choices": [{"text": "all at once"}]}'
    record = read_answer(
        Exchange(0, status=200, headers={"content-type": "application/json"}, stamps=[1], parts=[body])
    )
    assert record.outcome == "malformed"
    assert record.message.startswith('HTTP 200 with application/json instead of text/event-stream: {"object": "text')
