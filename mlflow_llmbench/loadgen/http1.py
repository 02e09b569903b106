"""HTTP/1.1 connections that stamp bytes on arrival and do little else with them.

A response is kept as it arrived: the body of each read without chunked framing, with the time at which the event loop
delivered it. The bytes are parsed after the run. Whatever a server sends, every request ends within its time limits and
within its budgets of bytes and reads.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

from ..records.errors import first_line

HEAD_BYTES = 65536
"""Most bytes of a response's status line and headers."""

BODILESS = (204, 304)

MAX_JOINED = 4096
"""Parts without a line ending that are shorter than this many bytes are joined with the next read.

Joining longer parts would copy too much.
"""


@dataclass(frozen=True)
class Limits:
    """Limits of one request.

    Seconds to connect, to the first token, between reads, and in total; bytes and reads of the answer. Reads within one
    line count as one.
    """

    connect_s: float = 10.0
    first_s: float = 300.0
    gap_s: float = 60.0
    total_s: float = 600.0
    most_bytes: int = 16 << 20
    most_reads: int = 100_000


@dataclass(eq=False)
class Exchange:
    """One request and the raw bytes of its answer.

    `stamps[i]` (ns, monotonic) is the arrival of `parts[i]`. Bytes without a line ending complete no event, so the next
    read is joined to them; such a part has the stamp of its last byte. `framed` is True if the body ended as its chunks
    or its length say. If only the end of the connection ends it, a truncation cannot be detected. `fault` is the
    outcome if the transport already knows it (`timeout`, `refused`, `malformed`), and `message` the reason.
    `conversation` and `turn` (from 1) identify the turn if requests depend on answers.
    """

    number: int
    intended_ns: int | None = None
    t0_ns: int = 0
    end_ns: int = 0
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    stamps: list[int] = field(default_factory=list)
    parts: list[bytes] = field(default_factory=list)
    framed: bool = False
    fault: str = ""
    message: str = ""
    conversation: int | None = None
    turn: int | None = None

    def fail(self, fault: str, message: str) -> None:
        """Set the outcome, unless it is already set."""
        if not self.fault:
            self.fault, self.message = fault, message


class Connection(asyncio.Protocol):
    """One connection with at most one request at a time.

    `done(connection, exchange)` is called once for each request that was sent.
    """

    def __init__(self, limits: Limits, done: Callable[[Connection, Exchange], None]) -> None:
        self.limits = limits
        self.done = done
        self.exchange: Exchange | None = None
        self.usable = False
        self.used = 0  # requests that have ended on this connection
        self.heard_ns = 0
        self._transport: asyncio.Transport | None = None
        self._take: Callable[[bytes, int], None] = self._head
        self._budget = 0
        self._keep = True
        self._rest = b""  # incomplete head or chunk size
        self._left = 0  # bytes left of the body (length), or of the chunk with its line ending (chunked)
        self._ending = False  # the last chunk has arrived, trailers follow

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Part of asyncio.Protocol."""
        self._transport, self.usable = cast(asyncio.Transport, transport), True  # uvloop's is no subclass

    def send(self, exchange: Exchange, request: bytes) -> None:
        """Write the request. `t0_ns` is taken right before the first time that it is sent."""
        assert self._transport is not None and self.exchange is None
        self.exchange = exchange
        self._take, self._rest, self._left, self._ending, self._keep = self._head, b"", 0, False, True
        self._budget = self.limits.most_bytes
        self.heard_ns = time.perf_counter_ns()
        exchange.t0_ns = exchange.t0_ns or self.heard_ns  # a request that is sent again keeps its first t0
        if self.usable:
            self._transport.write(request)
        else:
            self._finish(framed=False)

    def data_received(self, data: bytes) -> None:
        """Part of asyncio.Protocol: stamp the bytes, remove the framing, keep the rest."""
        now = time.perf_counter_ns()
        exchange = self.exchange
        if exchange is None:  # unsolicited bytes
            self.close()
            return
        self.heard_ns = now
        self._budget -= len(data)
        self._take(data, now)
        if self.exchange is exchange and (self._budget < 0 or len(exchange.parts) > self.limits.most_reads):
            exchange.parts.clear()  # a load may have many such answers: free their memory
            exchange.stamps.clear()
            self._break(
                "malformed",
                f"The answer exceeded {self.limits.most_bytes} bytes or {self.limits.most_reads} reads.",
            )

    def eof_received(self) -> None:
        """Part of asyncio.Protocol."""
        self._closed()

    def connection_lost(self, error: Exception | None) -> None:
        """Part of asyncio.Protocol."""
        if error is not None and self.exchange is not None and not self.exchange.status:
            self.exchange.message = first_line(error, 120)  # such as an alert of TLS
        self._closed()

    def overdue(self, now: int) -> None:
        """End the request if it exceeds one of its limits at `now` (ns, monotonic)."""
        exchange = self.exchange
        if exchange is None:
            return
        total, silent, limits = (now - exchange.t0_ns) / 1e9, (now - self.heard_ns) / 1e9, self.limits
        # The first event may hold only a role, which some servers send before they read the prompt.
        waiting = len(exchange.parts) < 2 and sum(part.count(b"data:") for part in exchange.parts) < 2
        if total > limits.total_s:
            self._break("timeout", f"The answer took longer than {limits.total_s:g} s.")
        elif waiting and total > limits.first_s:
            self._break("timeout", f"No token arrived within {limits.first_s:g} s.")
        elif not waiting and silent > limits.gap_s:
            self._break("timeout", f"The answer paused for longer than {limits.gap_s:g} s.")

    def close(self) -> None:
        """Close at once. A request in progress ends as truncated."""
        self.usable = False
        if self._transport is not None:
            self._transport.abort()
        self._closed()

    def _closed(self) -> None:
        self.usable = False
        if self.exchange is not None:
            self._finish(framed=False)

    def _break(self, fault: str, message: str) -> None:
        if self.exchange is not None:
            self.exchange.fail(fault, message)
        self.close()

    def _finish(self, framed: bool) -> None:
        exchange, self.exchange = self.exchange, None
        assert exchange is not None
        exchange.framed, exchange.end_ns = framed, time.perf_counter_ns()
        self.used += 1
        if self.usable and not (framed and self._keep):
            self.close()
        self.done(self, exchange)

    def _head(self, data: bytes, now: int) -> None:
        exchange = self.exchange
        assert exchange is not None
        rest = self._rest + data
        while True:
            head, found, rest_after = rest.partition(b"\r\n\r\n")
            if len(head) > HEAD_BYTES or not (rest.startswith(b"HTTP/1.") or b"HTTP/1.".startswith(rest)):
                self._break(
                    "malformed",
                    f"The answer does not begin like HTTP/1.1, or its headers do not end: {rest[:40]!r}.",
                )
                return
            if not found:
                self._rest = rest
                return
            first, *lines = head.decode("latin-1").split("\r\n")
            version, _, status = first.partition(" ")
            if not (status[:3].isdecimal() and len(status[:3]) == 3 and status[3:4] in ("", " ")):
                self._break("malformed", f"The answer has no status code: {first[:60]!r}.")
                return
            rest = rest_after
            if not 100 <= int(status[:3]) < 200:
                break
        self._rest, exchange.status = b"", int(status[:3])
        exchange.headers = {
            name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
        }
        self._begin_body(exchange, version, rest, now)

    def _begin_body(self, exchange: Exchange, version: str, rest: bytes, now: int) -> None:
        headers = exchange.headers
        connection = headers.get("connection", "").lower()
        self._keep = "close" not in connection and (version != "HTTP/1.0" or "keep-alive" in connection)
        coding, length = headers.get("transfer-encoding", "").lower(), headers.get("content-length")
        if headers.get("content-encoding", "identity").lower() not in ("identity", ""):
            self._break(
                "malformed", f"The answer is compressed ({headers['content-encoding'][:20]}), which was not asked for."
            )
        elif exchange.status in BODILESS:
            self._keep = self._keep and not rest
            self._finish(framed=True)
        elif coding:
            if coding != "chunked":
                self._break("malformed", f"Unknown transfer encoding: {coding[:40]}.")
                return
            self._take = self._chunked
            if rest:
                self._chunked(rest, now)
        elif length is not None:
            if not (length.isdecimal() and len(length) < 16):
                self._break("malformed", f"Content-Length is not a number: {length[:40]}.")
                return
            self._left, self._take = int(length), self._counted
            self._counted(rest, now)
        else:
            self._keep, self._take = False, self._until_close
            if rest:
                self._until_close(rest, now)

    def _add(self, data: bytes, now: int) -> None:
        assert self.exchange is not None
        stamps, parts = self.exchange.stamps, self.exchange.parts
        if parts and len(before := parts[-1]) < MAX_JOINED and b"\n" not in before and b"\r" not in before:
            parts[-1], stamps[-1] = before + data, now  # a proxy may split an event into single bytes
            return
        stamps.append(now)
        parts.append(data)

    def _until_close(self, data: bytes, now: int) -> None:
        self._add(data, now)

    def _counted(self, data: bytes, now: int) -> None:
        if len(data) > self._left:
            self._keep = False
            data = data[: self._left]
        self._left -= len(data)
        if data:
            self._add(data, now)
        if not self._left:
            self._finish(framed=True)

    def _chunked(self, data: bytes, now: int) -> None:
        """Remove the framing of chunks (RFC 9112, section 7.1). Chunks may be cut anywhere."""
        if self._rest:
            data, self._rest = self._rest + data, b""
        at, size = 0, len(data)
        found: list[bytes] = []
        while at < size:
            if self._left > 2:
                piece = data[at : at + self._left - 2]
                found.append(piece)
                at += len(piece)
                self._left -= len(piece)
                continue
            if self._left:  # the line ending after a chunk
                if data[at] != (13 if self._left == 2 else 10):
                    self._bad_chunk(found, now)
                    return
                at, self._left = at + 1, self._left - 1
                continue
            end = data.find(b"\r\n", at)
            if end < 0:
                self._rest = data[at:]
                if len(self._rest) > 1024:
                    self._bad_chunk(found, now)
                    return
                break
            line, at = data[at:end], end + 2
            if self._ending:
                if line:
                    continue
                if found:
                    self._add(b"".join(found), now)
                self._keep = self._keep and at == size
                self._finish(framed=True)
                return
            number = line.partition(b";")[0].strip()
            try:
                length = int(number, 16) if number.isalnum() and len(number) < 16 else -1
            except ValueError:
                length = -1
            if length < 0:
                self._bad_chunk(found, now)
                return
            self._left, self._ending = (length + 2, False) if length else (0, True)
        if found:
            self._add(found[0] if len(found) == 1 else b"".join(found), now)

    def _bad_chunk(self, found: list[bytes], now: int) -> None:
        if found:
            self._add(b"".join(found), now)
        self._break("malformed", "The answer violates the chunked framing of HTTP/1.1.")
