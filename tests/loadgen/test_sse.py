"""Server-sent events: the standard's own examples, and the same events for every cut."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlflow_llmbench.loadgen.sse import EventParser, ServerSentEvent

from ..work import calls

MOST_CALLS = 14
"""Calls of functions, of Python and of C, for an event of one line."""


def parse(*pieces: bytes) -> list[ServerSentEvent]:
    parser = EventParser()
    return [event for piece in pieces for event in parser.feed(piece)]


def data(*pieces: bytes) -> list[str]:
    return [event.data for event in parse(*pieces)]


STREAMS = {
    "completions": (
        b'data: {"choices": [{"text": "a"}]}\n\ndata: {"choices": [{"text": "\xc3\xa4\xe2\x82\xac"}]}\n\n'
        b"data: [DONE]\n\n"
    ),
    "crlf": b": ping\r\n\r\ndata: a\r\ndata: b\r\n\r\nevent: error\r\ndata: c\r\n\r\n",
    "cr": b"data: a\rdata: b\r\rdata: c\r\r",
    "mixed": b"data: a\r\n\ndata: b\r\rdata:c\n\r\ndata: d\n\n\n\r\r\n",
    "bom": b"\xef\xbb\xbfdata: first\n\nid: 7\ndata: second\n\n",
    "emoji": "data: \U0001f600\u00e9\U0001f1e9\U0001f1ea\n\n".encode(),
    "unfinished": b"data: a\n\ndata: b\n",
    "damaged": b"data: \xff\xe2\x82\n\ndata: ok\n\n",
    "fields": (
        b"data\n\ndata\ndata\n\nevent: x\n\nretry: 10\nunknown: y\nid: a\0b\ndata:  two spaces\n\nevent: y\ndata:\n\n"
    ),
}


def test_examples_of_the_standard() -> None:
    assert data(b"data: YHOO\ndata: +2\ndata: 10\n\n") == ["YHOO\n+2\n10"]
    stream = b": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event"
    assert parse(stream) == [ServerSentEvent("first event", id="1"), ServerSentEvent("second event")]
    assert data(b"data\n\ndata\ndata\n\ndata:") == ["", "\n"]
    assert data(b"data:test\n\ndata: test\n\n") == ["test", "test"]


def test_what_the_streams_hold() -> None:
    assert data(STREAMS["completions"]) == ['{"choices": [{"text": "a"}]}', '{"choices": [{"text": "ä€"}]}', "[DONE]"]
    assert parse(STREAMS["crlf"]) == [ServerSentEvent("a\nb"), ServerSentEvent("c", "error")]
    assert data(STREAMS["cr"]) == ["a\nb", "c"]
    assert data(STREAMS["mixed"]) == ["a", "b", "c", "d"]
    assert parse(STREAMS["bom"]) == [ServerSentEvent("first"), ServerSentEvent("second", id="7")]
    assert data(STREAMS["unfinished"]) == ["a"]
    assert data(STREAMS["damaged"]) == ["\ufffd\ufffd", "ok"]
    assert parse(STREAMS["fields"]) == [
        ServerSentEvent(""),
        ServerSentEvent("\n"),
        ServerSentEvent(" two spaces"),
        ServerSentEvent("", "y"),
    ]


def test_a_bom_counts_at_the_beginning_only() -> None:
    assert data(b"data: a\n\n\xef\xbb\xbfdata: b\n\n") == ["a"]


@pytest.mark.parametrize("name", STREAMS)
def test_every_cut_gives_the_same_events(name: str) -> None:
    stream = STREAMS[name]
    whole = parse(stream)
    assert whole == parse(*(stream[i : i + 1] for i in range(len(stream))))
    for cut in range(len(stream) + 1):
        assert parse(stream[:cut], stream[cut:]) == whole
        assert parse(stream[:cut], b"", stream[cut:]) == whole


@settings(max_examples=300, deadline=None)
@given(
    lines=st.lists(
        st.sampled_from([b"data: \xe2\x82\xac", b"data:x", b":c", b"", b"", b"event: e", b"id: 1", b"data"]),
        max_size=12,
    ),
    draw=st.data(),
)
def test_any_lines_any_endings_any_cuts(lines: list[bytes], draw: st.DataObject) -> None:
    endings = draw.draw(st.lists(st.sampled_from([b"\n", b"\r\n"]), min_size=len(lines), max_size=len(lines)))
    stream = b"".join(line + ending for line, ending in zip(lines, endings, strict=True))
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert parse(*pieces) == parse(b"".join(line + b"\n" for line in lines))


def test_an_event_is_told_by_the_piece_that_ends_it() -> None:
    parser = EventParser()
    assert parser.feed(b"data: a\n") == []
    assert parser.feed(b"\r") == [ServerSentEvent("a")]
    assert parser.feed(b"\n") == []


def test_parsing_an_event_takes_few_calls() -> None:
    payload = json.dumps(
        {"id": "cmpl-1", "object": "text_completion", "choices": [{"index": 0, "text": " word", "finish_reason": None}]}
    )
    few, many = ([f"data: {payload}\n\n".encode()] * count for count in (100, 1100))
    assert calls(lambda: parse(*many)) - calls(lambda: parse(*few)) <= 1000 * MOST_CALLS


def test_a_long_line_in_many_pieces_is_not_copied_for_each() -> None:
    """2 MB in 200,000 pieces: copying the rest for each piece would move 200 GB."""
    assert data(b"data: ", *[b"0123456789"] * 200_000, b"\n\n") == ["0123456789" * 200_000]
