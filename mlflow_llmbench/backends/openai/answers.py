"""Read one answer of a server: stamps and counts from its stream of events, or the error it tells."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from ...loadgen.http1 import Exchange
from ...loadgen.sse import EventParser
from ...records.results import CONTENT, RequestRecord
from .channels import channel_of
from .response_events import ResponseEvent, read_event

MAX_SERVER_TEXT, MAX_MESSAGE = 2000, 200
"""Characters of a server's error that are read, and of the message that is kept."""


@dataclasses.dataclass
class _Answer:
    """State of an answer while its events are read."""

    stamps: list[int] = dataclasses.field(default_factory=list)
    channels: list[str] = dataclasses.field(default_factory=list)  # of each stamp
    told: list[int | None] = dataclasses.field(default_factory=list)  # output tokens so far, as each chunk reports
    usage: dict[str, Any] = dataclasses.field(default_factory=dict)
    visible: int | None = None
    text: list[str] = dataclasses.field(default_factory=list)  # without the reasoning channel
    finish: str = ""
    finish_ns: int | None = None
    finish_has_text: bool = False  # the finish reason came in a chunk with text
    done: bool = False
    timings: dict[str, Any] = dataclasses.field(default_factory=dict)  # of llama.cpp, in the last chunk
    skipped: int = 0  # events without choices and counts: keep-alives, other objects
    fault: str = ""
    message: str = ""


def read_answer(exchange: Exchange, secrets: Sequence[str] = ()) -> RequestRecord:
    """Convert a raw answer to a record: one outcome, the stamps of chunks with tokens, and the server's token counts.

    The outcome `complete` needs at least one token, and either `[DONE]`, or a finish reason and a body that ended
    according to its chunks or length.

    `secrets` are removed from the server's message before that is cut, since half a key would not be recognised.
    """
    answer = answer_of(exchange)
    for secret in secrets:
        answer.message = answer.message.replace(secret, "…")
    tokens, details = (
        _count(answer.usage.get("completion_tokens")) or None,  # a count of 0 means that the server did not count
        answer.usage.get("prompt_tokens_details"),
    )
    sizes = _chunk_tokens(answer, tokens)
    return RequestRecord(
        t0_ns=exchange.t0_ns,
        stamps_ns=tuple(answer.stamps),
        prompt_tokens=_count(answer.usage.get("prompt_tokens")),
        intended_ns=exchange.intended_ns,
        outcome=answer.fault or "complete",
        message=answer.message[:MAX_MESSAGE],
        tokens=tokens,
        chunk_tokens=sizes,
        visible_ns=answer.visible,
        end_ns=exchange.end_ns,
        cached_tokens=_count(details.get("cached_tokens")) if isinstance(details, dict) else None,
        finish=answer.finish[:40] or "not told",
        conversation=exchange.conversation,
        turn=exchange.turn,
        channels=_channels(answer, sizes),
        skipped=answer.skipped or None,
        draft_tokens=_count(answer.timings.get("draft_n")),
        accepted_tokens=_count(answer.timings.get("draft_n_accepted")),
    )


def read_embedding(exchange: Exchange, secrets: Sequence[str] = ()) -> RequestRecord:
    """Convert an answer of the embeddings endpoint to a record, whose only stamp is the arrival of its last byte.

    It has no output tokens. The outcome `complete` needs a vector for the prompt.
    """
    answer = _Answer(fault=exchange.fault, message=exchange.message)
    body = _json(b"".join(exchange.parts).decode("utf-8", "replace")) if exchange.status == 200 else None
    if not answer.fault and (exchange.status != 200 or _is_error(body)):
        _check_head(exchange, answer)
        if not exchange.status:
            answer.fault, answer.message = "truncated", "The connection was closed before an answer."
    vectors = body.get("data") if isinstance(body, dict) else None
    if not answer.fault and not (isinstance(vectors, list) and vectors and all(map(_is_vector, vectors))):
        answer.fault, answer.message = "malformed", f"Not an answer with an embedding: {str(body)[:MAX_MESSAGE]!r}."
    for secret in secrets:
        answer.message = answer.message.replace(secret, "…")
    usage = body.get("usage") if isinstance(body, dict) else None
    return RequestRecord(
        t0_ns=exchange.t0_ns,
        stamps_ns=() if answer.fault else (exchange.stamps[-1],),
        prompt_tokens=_count(usage.get("prompt_tokens")) if isinstance(usage, dict) else None,
        intended_ns=exchange.intended_ns,
        outcome=answer.fault or "complete",
        message=answer.message[:MAX_MESSAGE],
        tokens=0,
        end_ns=exchange.end_ns,
        finish="not told",
    )


def _is_vector(entry: object) -> bool:
    """Return True for an entry with an embedding: numbers, or their bytes as a base64 text."""
    vector = entry.get("embedding") if isinstance(entry, dict) else None
    return isinstance(vector, list | str) and bool(vector)


def answer_of(exchange: Exchange) -> _Answer:
    """Parse the events of an answer and set its fault, if it has one."""
    answer = _Answer(fault=exchange.fault, message=exchange.message)
    if not answer.fault:
        _check_head(exchange, answer)
    if exchange.status == 200:
        _read_events(exchange, answer)
    if not answer.fault and not (answer.done or (answer.finish and exchange.framed)):
        answer.fault, answer.message = (
            "truncated",
            f"The answer stopped after {len(answer.stamps)} chunks, before its end.",
        )
        if not exchange.status:
            answer.message = (
                f"The connection was closed before an answer{f': {exchange.message}' if exchange.message else ''}."
            )
    tokens = _count(answer.usage.get("completion_tokens"))
    if (
        tokens == len(answer.stamps) + 1
        and answer.finish == "stop"
        and answer.finish_ns is not None
        and not answer.finish_has_text
    ):
        answer.stamps.append(answer.finish_ns)  # the end token, which has no text and comes with the finish reason
        answer.channels.append(CONTENT)
        answer.told.append(tokens)
    if not answer.fault and not answer.stamps:
        answer.fault, answer.message = "malformed", "The answer was complete but had no token."
    return answer


def _check_head(exchange: Exchange, answer: _Answer) -> None:
    """Set the fault and message of an answer that is not an event stream."""
    status, kind = exchange.status, exchange.headers.get("content-type", "").lower()
    if not status or (status == 200 and kind.startswith("text/event-stream")):
        return
    text = b"".join(exchange.parts)[:MAX_SERVER_TEXT].decode("utf-8", "replace")
    wait = exchange.headers.get("retry-after", "").strip()[:40]
    said = f"HTTP {status}: {_error_text(text)}{f' (Retry-After: {wait})' if wait else ''}"
    if status >= 500 and status != 503:
        answer.fault, answer.message = "server_error", said
    elif 300 <= status < 400:
        answer.fault, answer.message = (
            "refused",
            f"HTTP {status}: redirects are not followed. Give the final address as url.",
        )
    elif status >= 400:
        answer.fault, answer.message = "refused", said
    elif _is_error(_json(text)):
        answer.fault, answer.message = "server_error", said
    else:
        answer.fault, answer.message = (
            "malformed",
            f"HTTP {status} with {kind[:40] or 'no content type'} instead of text/event-stream"
            f"{': ' + ' '.join(text.split()) if text.strip() else '.'}",
        )


def _error_text(text: str) -> str:
    """Return the message of a JSON error, else the text itself, on one line."""
    found = _json(text)
    found = (found.get("error") or found) if isinstance(found, dict) else found
    found = (found.get("message") or found.get("detail") or found) if isinstance(found, dict) else found
    return " ".join(str(found)[:MAX_SERVER_TEXT].split())


def _read_events(exchange: Exchange, answer: _Answer) -> None:
    """Read the events of the stream into `answer`, up to its end or the first event that contradicts the protocol."""
    parser = EventParser()
    for stamp, part in zip(exchange.stamps, exchange.parts, strict=True):
        for event in parser.feed(part):
            data = event.data.strip()
            if data == "[DONE]":
                answer.done = True
                return
            body = _json(data) if data else None
            if event.type == "error" or _is_error(body):
                answer.fault = answer.fault or "server_error"
                answer.message = answer.message or f"An error in the stream: {_error_text(data)}"
                return
            if body is None:  # a keep-alive
                answer.skipped += 1
            elif isinstance(body, dict) and (told := read_event(body)):
                _take_response_event(told, stamp, answer)
                if told.finish:
                    return
            elif not isinstance(body, dict) or not _take_chunk(body, stamp, answer):
                answer.fault, answer.message = (
                    answer.fault or "malformed",
                    answer.message or f"Not an event of a completion: {event.data[:MAX_SERVER_TEXT]!r}.",
                )
                return


def _json(text: str) -> Any:
    """Return the value of a JSON text, or the text itself if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _is_error(body: object) -> bool:
    return isinstance(body, dict) and bool(
        body.get("error") or body.get("object") == "error" or body.get("type") == "error"
    )


def _take_chunk(body: dict[str, Any], stamp: int, answer: _Answer) -> bool:
    """Read one chunk into `answer`. Return False if its choices are none."""
    usage, choices, timings = body.get("usage"), body.get("choices"), body.get("timings")
    if isinstance(timings, dict):
        answer.timings = timings
    if isinstance(usage, dict):
        answer.usage = usage
    elif not choices:
        answer.skipped += 1
    if choices is not None and not isinstance(choices, list):
        return False
    for choice in choices or ():
        if choice is None:
            continue
        delta = choice.get("delta") if isinstance(choice, dict) else choice
        if not isinstance(delta, dict | None):
            return False
        channel, visible = channel_of(choice if delta is None else delta, delta is not None)
        if channel:
            answer.stamps.append(stamp)
            answer.channels.append(channel)
            answer.told.append(_count(usage.get("completion_tokens")) if isinstance(usage, dict) else None)
            if visible:
                answer.visible = stamp if answer.visible is None else answer.visible
                answer.text.append(visible)
        if choice.get("finish_reason"):
            answer.finish, answer.finish_ns = str(choice["finish_reason"]), stamp
            answer.finish_has_text = bool(channel)
    return True


def _take_response_event(told: ResponseEvent, stamp: int, answer: _Answer) -> None:
    """Read one event of the Responses endpoint into `answer`."""
    if told.channel:
        answer.stamps.append(stamp)
        answer.channels.append(told.channel)
        answer.told.append(None)
        if told.channel == CONTENT:
            answer.visible = stamp if answer.visible is None else answer.visible
            answer.text.append(told.text)
    if told.error is not None:
        answer.fault = answer.fault or "server_error"
        answer.message = answer.message or f"An error in the stream: {_error_text(json.dumps({'error': told.error}))}"
    if told.finish:
        answer.usage, answer.done = dict(told.usage), True
        answer.finish, answer.finish_ns = told.finish, stamp


def _channels(answer: _Answer, sizes: tuple[int, ...] | None) -> dict[str, int] | None:
    """Return the output tokens of each channel, or its chunks if their sizes are not known; None if all are content."""
    found: dict[str, int] = {}
    for channel, size in zip(answer.channels, sizes or [1] * len(answer.channels), strict=True):
        found[channel] = found.get(channel, 0) + size
    return found if found.keys() - {CONTENT} else None


def _chunk_tokens(answer: _Answer, tokens: int | None) -> tuple[int, ...] | None:
    """Return the tokens of each chunk if every chunk reports the count so far; None if not, or if each holds one."""
    told = [count for count in answer.told if count is not None]
    if not told or len(told) != len(answer.stamps) or told[-1] != tokens:
        return None
    found = tuple(b - a for a, b in zip([0, *told[:-1]], told, strict=True))
    return None if all(size == 1 for size in found) or min(found) < 0 else found


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 40 else None
