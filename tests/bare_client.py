"""A minimal client: sockets, one write, and a stamp for each event of a read. Nothing is checked or kept.

The load client's extra delay against this one is its own; the delay of both is the machine's. So a test needs no
absolute time.
"""

from __future__ import annotations

import asyncio
import time
from urllib.parse import urlsplit


def stamps(url: str, requests: list[bytes]) -> list[tuple[int, list[int]]]:
    """Send all requests at once. Return the time each was sent and those of its events, ns of the monotonic clock."""
    place = urlsplit(url)

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> tuple[int, list[int]]:
        sent = time.perf_counter_ns()
        writer.write(request)
        found: list[int] = []
        while data := await reader.read(1 << 16):
            found += [time.perf_counter_ns()] * data.count(b"data: {")
            if b"[DONE]" in data:
                break
        writer.close()
        return sent, found

    async def all_of_them() -> list[tuple[int, list[int]]]:
        pairs = [await asyncio.open_connection(place.hostname, place.port) for _ in requests]
        return await asyncio.gather(*(one(*pair, request) for pair, request in zip(pairs, requests, strict=True)))

    return asyncio.run(all_of_them())
