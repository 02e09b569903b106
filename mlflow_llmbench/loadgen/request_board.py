"""Requests as they end, in memory that other processes can read while a load is sent.

The client writes 32 bytes when a request has ended, and a number when one begins; it never waits, wakes or computes for
a reader. The board of each client process is a file in one folder, mapped into memory. Times are of the machine's
monotonic clock. Nothing here enters a result: answers are not parsed yet, so the first bytes of an answer stand for its
first token.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from .http1 import Exchange

VARIABLE = "LLMBENCH_BOARD"
"""Environment variable with the folder of the boards; without it there are none."""

HEAD = struct.Struct("qq")
"""Requests begun, requests ended."""

ENTRY = struct.Struct("qqqq")
"""Of a request: intended begin, first bytes (0 if none), end (ns), and 1 if it failed."""

ENTRIES = 1 << 14
"""Most requests on a board; later ones replace the oldest."""

SUFFIX = ".board"


class EndedRequest(NamedTuple):
    """A request that has ended. `first_ns` is 0 if no byte of an answer arrived."""

    begun_ns: int
    first_ns: int
    ended_ns: int
    failed: int


class RequestBoard:
    """The board of this process."""

    def __init__(self, folder: Path) -> None:
        size = HEAD.size + ENTRIES * ENTRY.size
        with (folder / f"{os.getpid()}{SUFFIX}").open("w+b") as file:
            # Written, not left as a hole: to write to a hole of a mapped file on a full disk would end this process.
            file.write(bytes(size))
            file.flush()
            self._memory = mmap.mmap(file.fileno(), size)
        self._begun = self._ended = 0

    @classmethod
    def of_environment(cls) -> RequestBoard | None:
        """Return the board that the parent of this process reads; None if it reads none."""
        folder = os.environ.get(VARIABLE)
        if folder:
            with contextlib.suppress(OSError, ValueError):  # a view must not end a measurement
                return cls(Path(folder))
        return None

    def begin(self) -> None:
        """Note that a request begins."""
        self._begun += 1
        HEAD.pack_into(self._memory, 0, self._begun, self._ended)

    def end(self, exchange: Exchange) -> None:
        """Note a request that has ended."""
        first = exchange.stamps[0] if exchange.stamps else 0
        failed = bool(exchange.fault) or exchange.status != 200
        place = HEAD.size + self._ended % ENTRIES * ENTRY.size
        ENTRY.pack_into(self._memory, place, exchange.intended_ns or exchange.t0_ns, first, exchange.end_ns, failed)
        self._ended += 1
        HEAD.pack_into(self._memory, 0, self._begun, self._ended)


@dataclass(frozen=True)
class BoardReading:
    """What the boards of a folder show: requests in flight, and those that ended since a time."""

    in_flight: int
    ended: tuple[EndedRequest, ...]


def read_boards(folder: Path, since_ns: int) -> BoardReading:
    """Read the boards of a folder. Boards that cannot be read are left out."""
    in_flight, ended = 0, list[EndedRequest]()
    for file in folder.glob(f"*{SUFFIX}"):
        with (
            contextlib.suppress(OSError, ValueError, struct.error),
            file.open("rb") as opened,
            mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as memory,
        ):
            begun, count = HEAD.unpack_from(memory, 0)
            in_flight += max(begun - count, 0)
            ended += _newest(memory, count, since_ns)
    return BoardReading(in_flight, tuple(ended))


def _newest(memory: mmap.mmap, count: int, since_ns: int) -> Iterator[EndedRequest]:
    """Yield the requests that ended since a time, the newest first."""
    for number in range(count - 1, max(count - ENTRIES, 0) - 1, -1):
        one = EndedRequest(*ENTRY.unpack_from(memory, HEAD.size + number % ENTRIES * ENTRY.size))
        if one.ended_ns < since_ns:
            return
        yield one
