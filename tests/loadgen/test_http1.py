"""HTTP/1.1 answers cut anywhere give the same body, or the right fault."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlflow_llmbench.backends.openai.answers import read_answer
from mlflow_llmbench.loadgen.http1 import Connection, Exchange, Limits


def said(*events: bytes, status: int = 200) -> Exchange:
    """Return a whole answer of these parts, one read each."""
    return Exchange(
        0,
        t0_ns=1,
        end_ns=99,
        status=status,
        headers={"content-type": "text/event-stream"},
        stamps=list(range(10, 10 + len(events))),
        parts=list(events),
        framed=True,
    )


class Wire:
    """The transport that a connection writes to."""

    def __init__(self) -> None:
        self.closed = False

    def write(self, data: bytes) -> None: ...

    def abort(self) -> None:
        self.closed = True


def answer(
    pieces: list[bytes], *, cut: bool = False, limits: Limits | None = None
) -> tuple[Exchange, Connection, bool]:
    """Return the exchange that a connection makes of these reads, and True if it ended."""
    ended: list[Exchange] = []
    connection = Connection(limits or Limits(), lambda _, exchange: ended.append(exchange))
    wire: Any = Wire()
    connection.connection_made(wire)
    exchange = Exchange(0)
    connection.send(exchange, b"GET / HTTP/1.1\r\n\r\n")
    for piece in pieces:
        if not wire.closed:
            connection.data_received(piece)
    if cut:
        connection.connection_lost(None)
    assert len(ended) <= 1
    return exchange, connection, bool(ended)


def chunked(*parts: bytes, last: bytes = b"0\r\n\r\n") -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + last


def token(text: str, finish: str | None = None) -> bytes:
    return (
        b"data: "
        + json.dumps({"choices": [{"index": 0, "text": text, "finish_reason": finish}]}, ensure_ascii=False).encode()
        + b"\n\n"
    )


USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 3}}\n\n'
EVENTS = [token(" a"), token(" \u20ac\U0001f600"), token(" c0\r\n\r\n", "length"), USAGE, b"data: [DONE]\n\n"]
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
STREAMS = {
    "chunked": HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(*EVENTS),
    "odd chunks": HEAD
    + b"transfer-encoding: Chunked\r\n\r\n"
    + chunked(*(b"".join(EVENTS)[i : i + 7] for i in range(0, len(b"".join(EVENTS)), 7))),
    "extensions and trailers": HEAD
    + b"Transfer-Encoding: chunked\r\n\r\n"
    + chunked(*EVENTS, last=b"00;x=y\r\nA: b\r\nC: d\r\n\r\n").replace(b"\r\ndata", b";name=value \r\ndata"),
    "length": HEAD + b"Content-Length: %d\r\n\r\n" % len(b"".join(EVENTS)) + b"".join(EVENTS),
    "continue": b"HTTP/1.1 100 Continue\r\n\r\n" + HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(*EVENTS),
}
CLOSE = HEAD + b"Connection: close\r\n\r\n" + b"".join(EVENTS)


@pytest.mark.parametrize("name", STREAMS)
def test_every_cut_gives_the_same_answer(name: str) -> None:
    stream = STREAMS[name]
    for pieces in [[stream[:cut], stream[cut:]] for cut in range(len(stream))] + [
        [stream[i : i + 1] for i in range(len(stream))]
    ]:
        exchange, connection, ended = answer([piece for piece in pieces if piece])
        assert b"".join(exchange.parts) == b"".join(EVENTS)
        assert (ended, exchange.framed, exchange.fault, connection.usable) == (True, True, "", True)
        record = read_answer(exchange)
        assert (record.outcome, record.tokens, record.prompt_tokens, len(record.stamps_ns)) == ("complete", 3, 5, 3)


@pytest.mark.parametrize("stream", [*STREAMS.values(), CLOSE], ids=[*STREAMS, "close"])
def test_an_answer_that_was_cut_is_never_complete(stream: bytes) -> None:
    """Cut at every byte. An answer is complete only with its [DONE], wherever the connection ends after it."""
    for cut in range(len(stream)):
        exchange, connection, ended = answer([stream[:cut]] if cut else [], cut=True)
        record = read_answer(exchange)
        assert ended
        assert not connection.usable
        if record.outcome == "complete":
            assert b"DONE" in b"".join(exchange.parts)
            assert len(record.stamps_ns) == record.tokens == 3
        else:
            assert record.outcome == "truncated", (cut, record)
    assert read_answer(answer([stream], cut=True)[0]).outcome == "complete"


def test_a_finish_reason_ends_an_answer_only_if_its_framing_has_ended() -> None:
    """Some servers send no [DONE]."""
    head, body = HEAD + b"Transfer-Encoding: chunked\r\n\r\n", EVENTS[:4]
    assert read_answer(answer([head, chunked(*body)])[0]).outcome == "complete"
    assert read_answer(answer([head, chunked(*body, last=b"")], cut=True)[0]).outcome == "truncated"
    assert read_answer(answer([head, chunked(*body[:2])])[0]).outcome == "truncated"


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_number_of_cuts(draw: st.DataObject) -> None:
    stream = STREAMS[draw.draw(st.sampled_from(sorted(STREAMS)))]
    cuts = sorted(draw.draw(st.lists(st.integers(1, len(stream) - 1), max_size=8, unique=True)))
    exchange, _, _ = answer([stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)])
    assert b"".join(exchange.parts) == b"".join(EVENTS)
    assert exchange.stamps == sorted(exchange.stamps)


BROKEN = {
    "noise": b"SSH-2.0-OpenSSH\r\n\r\n",
    "no status": b"HTTP/1.1 OK\r\n\r\n",
    "endless headers": b"HTTP/1.1 200 OK\r\n" + b"X: %s\r\n" % (b"y" * 70_000),
    "negative chunk": HEAD + b"Transfer-Encoding: chunked\r\n\r\n-5\r\nabc\r\n",
    "underscore chunk": HEAD + b"Transfer-Encoding: chunked\r\n\r\n1_0\r\n0123456789abcdef\r\n",
    "long chunk size": HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"0" * 2000,
    "chunk without an end": HEAD + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabcdef\r\n",
    "unknown coding": HEAD + b"Transfer-Encoding: br\r\n\r\n",
    "two lengths": HEAD + b"Content-Length: 5, 6\r\n\r\n",
    "gzip": HEAD + b"Content-Encoding: gzip\r\nContent-Length: 5\r\n\r\n12345",
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_not_http_is_malformed(name: str) -> None:
    whole = BROKEN[name]
    for pieces in ([whole], [whole[i : i + 10] for i in range(0, len(whole), 10)]):
        exchange, connection, ended = answer(pieces)
        assert (ended, exchange.fault, connection.usable) == (True, "malformed", False)
        assert len(exchange.message) < 200
        assert read_answer(exchange).outcome == "malformed"


def test_an_answer_has_a_budget_of_bytes_and_of_reads() -> None:
    endless = [HEAD + b"\r\n", *[b"x" * 1000] * 200]
    exchange, _, ended = answer(endless, limits=Limits(most_bytes=50_000))
    assert (ended, exchange.fault) == (True, "malformed")
    assert not answer([HEAD + b"\r\n", *[b"x" * 1000] * 49], limits=Limits(most_bytes=50_000))[2]
    for reads, fault in ((100, ""), (101, "malformed"), (200, "malformed")):
        exchange, _, ended = answer([HEAD + b"\r\n", *[b"\n"] * reads], limits=Limits(most_reads=100))
        assert (ended, exchange.fault) == (bool(fault), fault)


def test_a_connection_is_used_again_only_where_the_answer_allows_it() -> None:
    assert answer([b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"])[1].usable
    assert not answer([b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"])[1].usable
    assert not answer([b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n"])[1].usable
    assert not answer([b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nab and more"])[1].usable
    assert not answer([b"HTTP/1.1 204 No Content\r\n\r\nbody"])[1].usable


def test_bytes_that_nobody_asked_for_close_the_connection() -> None:
    exchange, connection, ended = answer([b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\na"])
    assert ended
    connection.data_received(b"HTTP/1.1 408 Timeout\r\n\r\n")
    assert not connection.usable
    assert b"".join(exchange.parts) == b"a"


def test_stamps_are_those_of_the_reads_that_end_an_event() -> None:
    exchange, _, _ = answer([HEAD + b"\r\n" + EVENTS[0][:-1], EVENTS[0][-1:] + EVENTS[1], *EVENTS[2:]], cut=True)
    record = read_answer(exchange)
    assert record.stamps_ns == (exchange.stamps[1], exchange.stamps[1], exchange.stamps[2])


def test_an_answer_cut_into_its_bytes_is_no_flood() -> None:
    """Read byte by byte: one part per line, stamped with its last byte. Only endless lines are too many reads."""
    stream = STREAMS["chunked"]
    exchange, _, ended = answer([bytes([byte]) for byte in stream], limits=Limits(most_reads=20))
    assert ended
    assert (exchange.fault, b"".join(exchange.parts)) == ("", b"".join(EVENTS))
    assert all(part.count(b"\n") == 1 and part.endswith(b"\n") for part in exchange.parts)
    assert sorted(exchange.stamps) == exchange.stamps
    assert read_answer(exchange).outcome == "complete"
    lines, _, _ = answer([HEAD, b"\r\n", *[b"\n"] * 30], limits=Limits(most_reads=20))
    assert lines.fault == "malformed"
    line, _, _ = answer([HEAD, b"\r\n", *[b"x"] * 3 * 4096], limits=Limits(most_reads=20))
    assert [len(part) for part in line.parts] == [4096] * 3


def counted(tokens: int) -> bytes:
    return b'data: {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": %d}}\n\n' % tokens


def test_a_count_of_zero_for_an_answer_with_text_is_no_count() -> None:
    record = read_answer(said(token(" a"), token(" b", "length"), counted(0), b"data: [DONE]\n\n"))
    assert (record.outcome, record.tokens, record.output_tokens) == ("complete", None, 2)


def test_an_end_token_that_comes_with_text_makes_a_chunk_of_two_tokens() -> None:
    record = read_answer(said(token(" a"), token(" b", "stop"), counted(3), b"data: [DONE]\n\n"))
    assert (record.outcome, record.tokens, record.stamps_ns, record.single_tokens) == ("complete", 3, (10, 11), False)
    alone = read_answer(said(token(" a"), token(" b"), token("", "stop"), counted(3), b"data: [DONE]\n\n"))
    assert (alone.stamps_ns, alone.single_tokens) == ((10, 11, 12), True)


def test_no_part_of_a_key_is_left_where_a_message_is_cut() -> None:
    key = "Zq" + "7Kx9" * 10
    for before in range(60, 220, 10):
        text = json.dumps({"error": {"message": f"{'x' * before} {key} is wrong"}})
        for exchange in (
            said(text.encode(), status=401),
            said(f"data: {text}\n\n".encode()),
            said(f"data: {'y' * before}{key}\n\n".encode()),
        ):
            record = read_answer(exchange, key)
            assert "7Kx9" not in record.message
            assert 0 < len(record.message) <= 200


def test_a_pause_after_the_first_event_is_waiting_for_the_first_token() -> None:
    """Some servers send the role before they read the prompt."""
    limits = Limits(first_s=5.0, gap_s=1.0, total_s=60.0)
    head = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
    role, paused = chunked(token(""), last=b""), "The answer paused for longer than 1 s."
    for reads, after_s, message in (
        ([role], 2.0, ""),
        ([role], 6.0, "No token arrived within 5 s."),
        ([role, role], 2.0, paused),
        ([role + role], 2.0, paused),
    ):
        exchange, connection, _ = answer([head, *reads], limits=limits)
        connection.overdue(exchange.t0_ns + int(after_s * 1e9))
        assert exchange.message == message


def test_an_answer_that_was_too_large_is_not_kept() -> None:
    exchange, _, ended = answer([HEAD + b"\r\n", *[token(" a")] * 100], limits=Limits(most_bytes=2000))
    assert (ended, exchange.fault, exchange.parts, exchange.stamps) == (True, "malformed", [], [])
