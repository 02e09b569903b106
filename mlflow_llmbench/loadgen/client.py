"""The load client: sends requests in a closed or an open loop and keeps the answers as raw bytes with stamps.

It uses one thread and one event loop (uvloop if it is installed). While a load runs, nothing is parsed, logged or
garbage collected; requests are built before. The client also measures how late its event loop wakes up, how late it
sends, and how much CPU it uses, because a client that is the bottleneck reports its own latency.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..records.errors import first_line
from ..system.garbage import frozen_heap
from .address import Address
from .dialer import Dialer
from .http1 import Connection, Exchange, Limits
from .request_board import RequestBoard

BEAT_S = 0.02
"""Seconds between two measurements of the event loop's lag."""

WATCH_BEATS = 10
"""Lag measurements between two checks of the time limits of requests in flight."""

SCRAPE_S = 1.0
"""Seconds between two readings of the server's own metrics."""

MAX_SCRAPES = 30
"""Most readings that are kept. Above it, every second one is dropped and the time between readings doubles."""

STALE_S = 1.0
"""A connection that the server closed while idle ends within this many seconds after a request is written to it.

A later end is that of the request.
"""

NO_FILES = (errno.EMFILE, errno.ENFILE)

SCRAPE_LIMITS = Limits(connect_s=2, first_s=2, gap_s=2, total_s=5, most_bytes=1 << 20)

BuildRequest = Callable[[int], bytes]
"""Builds the whole request, head and body, of a request number."""


@dataclass(frozen=True)
class NextRequest:
    """The next request of a user, to be sent `after_ns` after the answer before it has ended: the time to think."""

    request: bytes
    after_ns: int = 0


FollowUp = Callable[[Exchange], NextRequest | None]
"""Builds the next request of the same user from an answer; None if there is none."""


@dataclass(frozen=True)
class Load:
    """The requests to send: at most `requests`, none of which starts after `duration_s`.

    Closed loop: `concurrency` users, each of which sends its next request when its last one is answered. Open loop:
    request i is sent `arrivals_ns[i]` after the start, whether or not earlier ones are answered.
    """

    requests: int | None = None
    concurrency: int = 1
    duration_s: float | None = None
    arrivals_ns: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Trace:
    """The result of a load: raw exchanges in the order of their numbers, and measurements of the client itself.

    `lags_ns`: delay of the event loop's wake-ups, one every 20 ms · `cpu_s`: CPU seconds of this process · `retries`:
    requests sent again because the server had closed an idle connection · `parts`: if several processes sent the load,
    the trace of each without its exchanges; only these have lags then · `scrapes`: the server's own metrics before,
    during and after the load.
    """

    exchanges: tuple[Exchange, ...]
    started_ns: int
    ended_ns: int
    lags_ns: tuple[int, ...]
    cpu_s: float
    retries: int = 0
    parts: tuple[Trace, ...] = ()
    scrapes: tuple[Exchange, ...] = ()


def merge(traces: Sequence[Trace]) -> Trace:
    """Merge the traces of processes that each sent a share of one load.

    All stamps come from one clock. CPU seconds and retries are summed.
    """
    return Trace(
        tuple(
            sorted((exchange for trace in traces for exchange in trace.exchanges), key=lambda exchange: exchange.number)
        ),
        min(trace.started_ns for trace in traces),
        max(trace.ended_ns for trace in traces),
        (),
        sum(trace.cpu_s for trace in traces),
        sum(trace.retries for trace in traces),
        tuple(replace(trace, exchanges=(), scrapes=()) for trace in traces),
        tuple(scrape for trace in traces for scrape in trace.scrapes),
    )


def new_loop() -> asyncio.AbstractEventLoop:
    """Return an event loop of uvloop if it is installed, else of asyncio."""
    with contextlib.suppress(ImportError):
        import uvloop

        loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
        return loop
    return asyncio.new_event_loop()


class LoadClient:
    """Connections to one server, kept between loads."""

    def __init__(self, address: Address, limits: Limits | None = None, tls: ssl.SSLContext | None = None) -> None:
        """`tls` replaces the context of an https address that verifies by the system's authorities."""
        self.limits = limits or Limits()
        self.loop = new_loop()
        self.dialer = Dialer(self.loop, address, tls)
        self.board: RequestBoard | None = None  # for other processes that look on
        self._idle: list[Connection] = []
        self._busy: dict[Connection, asyncio.Future[None]] = {}

    def run(
        self,
        build: BuildRequest,
        load: Load,
        expected: int | None = None,
        follow_up: FollowUp | None = None,
        ready: Callable[[], int] | None = None,
        scrape: bytes = b"",
    ) -> Trace:
        """Send a load and wait for the last answer.

        If the load has no fixed number of requests, `expected` ones are built before it starts, the rest when they are
        due. With `follow_up`, each request of a closed loop begins a conversation, whose user sends what `follow_up`
        returns for each answer. `ready` is called when everything is prepared, and returns the start in ns of the
        monotonic clock; without it the load starts at once. `scrape` is the request for the server's own metrics, if
        they are wanted.
        """
        count = len(load.arrivals_ns) if load.arrivals_ns is not None else load.requests
        built = [build(number) for number in range(count if count is not None else expected or load.concurrency)]
        return self.loop.run_until_complete(_Run(self, build, built, load, follow_up, scrape).run(ready))

    def ask(self, request: bytes) -> Exchange:
        """Send one request and return it with its answer."""
        return self.run(lambda _: request, Load(requests=1)).exchanges[0]

    def close(self) -> None:
        """Close all connections and the loop."""
        if self.loop.is_closed():
            return
        for connection in self._idle:
            connection.close()
        self.loop.run_until_complete(asyncio.sleep(0))
        self.loop.close()

    async def warm(self, number: int) -> None:
        """Open connections until `number` are idle. Those that the server has closed meanwhile are dropped.

        A refused connection is ignored here; the request that needs it will report it.
        """
        for _ in range(2):
            await asyncio.sleep(0)
        self.dialer.forget()  # a load begins with the addresses that its name has now
        self._idle = [connection for connection in self._idle if connection.usable]
        missing = [self.connect() for _ in range(number - len(self._idle))]
        self._idle += [
            found for found in await asyncio.gather(*missing, return_exceptions=True) if isinstance(found, Connection)
        ]

    async def connect(self, limits: Limits | None = None) -> Connection:
        """Open a new connection. Raises OSError, ssl.SSLError or asyncio.TimeoutError."""
        limits = limits or self.limits
        dialed = self.dialer.connect(lambda: Connection(limits, self._done))
        return await asyncio.wait_for(dialed, limits.connect_s)

    async def scrape(self, request: bytes) -> Exchange | None:
        """Read the server's own metrics over a separate connection; None if it has none or does not answer in time.

        Several addresses are several servers, each with metrics of its own, which are not read.
        """
        exchange = Exchange(-1)
        if self.dialer.several:
            return None
        try:
            connection = await self.connect(SCRAPE_LIMITS)
            try:
                await asyncio.wait_for(self.begin(connection, exchange, request), SCRAPE_LIMITS.total_s)
            finally:
                connection.close()
        except (OSError, asyncio.TimeoutError):
            return None
        return exchange if exchange.status == 200 and exchange.parts and not exchange.fault else None

    def scrape_now(self, request: bytes) -> Exchange | None:
        """Read the server's own metrics between loads; like `scrape`."""
        return self.loop.run_until_complete(self.scrape(request))

    def take(self) -> Connection | None:
        """Return an open idle connection, or None.

        It is the one used last, which the server is the least likely to close; of a server with several addresses the
        one used first, so that all get their share.
        """
        position = 0 if self.dialer.several else -1
        while self._idle:
            connection = self._idle.pop(position)
            if connection.usable:
                return connection
        return None

    def put(self, connection: Connection) -> None:
        """Return a connection to the idle ones."""
        if connection.usable:
            self._idle.append(connection)

    def begin(self, connection: Connection, exchange: Exchange, request: bytes) -> asyncio.Future[None]:
        """Send a request. The returned future is done when the answer has ended."""
        if self.board and exchange.number >= 0:  # not for a reading of the server's own metrics
            self.board.begin()
        future = self._busy[connection] = self.loop.create_future()
        connection.send(exchange, request)
        return future

    def watch(self, now: int) -> None:
        """End all requests that exceed their limits at `now` (ns, monotonic)."""
        for connection in list(self._busy):
            connection.overdue(now)

    def _done(self, connection: Connection, exchange: Exchange) -> None:
        if self.board and exchange.number >= 0:
            self.board.end(exchange)
        future = self._busy.pop(connection)
        if not future.done():
            future.set_result(None)


class _Run:
    """One load while it is sent."""

    def __init__(
        self,
        client: LoadClient,
        build: BuildRequest,
        built: list[bytes],
        load: Load,
        follow_up: FollowUp | None,
        scrape: bytes,
    ) -> None:
        self.client, self.build, self.built, self.load, self.follow_up = client, build, built, load, follow_up
        self.begun, self.scrape = 0, scrape
        self.scrapes: list[Exchange] = []
        self.exchanges: list[Exchange] = []
        self.lags: list[int] = []
        self.retries = 0
        self.stop_ns = 0

    async def run(self, ready: Callable[[], int] | None) -> Trace:
        load, client = self.load, self.client
        await client.warm(
            load.concurrency if load.arrivals_ns is None else min(len(load.arrivals_ns), max(load.concurrency, 8))
        )
        with frozen_heap():
            return await self._send(ready)

    async def _send(self, ready: Callable[[], int] | None) -> Trace:
        load, client = self.load, self.client
        gc.disable()
        told = await self._ask_server()
        agreed = ready() if ready else 0
        while (left := agreed - time.perf_counter_ns()) > 0:
            await asyncio.sleep(left / 1e9)
        beat = client.loop.create_task(self._beat())
        watch = client.loop.create_task(self._watch_server()) if told else None
        cpu_s, started = time.process_time(), agreed or time.perf_counter_ns()
        self.stop_ns = started + int(load.duration_s * 1e9) if load.duration_s is not None else 1 << 62
        try:
            await (self._closed() if load.arrivals_ns is None else self._open(started, load.arrivals_ns))
        finally:
            ended, used = time.perf_counter_ns(), time.process_time() - cpu_s
            beat.cancel()
            if watch:
                watch.cancel()
            gc.enable()
        exchanges = sorted(self.exchanges, key=lambda exchange: exchange.number)
        if told and not await self._ask_server():
            self.scrapes.clear()  # without the last reading they do not cover the whole load
        return Trace(
            tuple(exchanges), started, ended, tuple(self.lags), used, self.retries, scrapes=tuple(self.scrapes)
        )

    async def _ask_server(self) -> bool:
        """Read the server's own metrics. Return True if it has some."""
        found = await self.client.scrape(self.scrape) if self.scrape else None
        self.scrapes += [found] if found else []
        return found is not None

    async def _watch_server(self) -> None:
        pause = SCRAPE_S
        while True:
            await asyncio.sleep(pause)
            await self._ask_server()
            if len(self.scrapes) > MAX_SCRAPES:
                del self.scrapes[2::2]
                pause *= 2

    def _request(self, number: int) -> bytes:
        return self.built[number] if number < len(self.built) else self.build(number)

    async def _closed(self) -> None:
        await asyncio.gather(*(self._user() for _ in range(self.load.concurrency)))

    async def _user(self) -> None:
        limit = self.load.requests
        while (limit is None or self.begun < limit) and time.perf_counter_ns() < self.stop_ns:
            request: bytes | None = self._request(self.begun)
            conversation, turn, due_ns = (self.begun if self.follow_up else None), 1, 0
            self.begun += 1
            while request is not None and await self._thought(due_ns):
                exchange = Exchange(
                    len(self.exchanges), conversation=conversation, turn=turn if self.follow_up else None
                )
                self.exchanges.append(exchange)
                await self._exchange(exchange, request)
                if exchange.fault == "refused" and not exchange.status:
                    await asyncio.sleep(0.05)  # do not ask an unreachable server in a tight loop
                after = self.follow_up(exchange) if self.follow_up else None
                request, turn = (after.request if after else None), turn + 1
                due_ns = exchange.end_ns + after.after_ns if after else 0

    async def _thought(self, due_ns: int) -> bool:
        """Wait until a request is due. Return False, at once, if that is after the end of the load."""
        while (left := due_ns - time.perf_counter_ns()) > 0 and due_ns < self.stop_ns:
            await asyncio.sleep(left / 1e9)
        return max(due_ns, time.perf_counter_ns()) < self.stop_ns

    async def _open(self, started: int, arrivals_ns: tuple[int, ...]) -> None:
        """Send each request when it is due. Overdue requests are sent at once, in order."""
        tasks: list[asyncio.Task[None]] = []
        loop = self.client.loop
        for number, offset in enumerate(arrivals_ns):
            intended = started + offset
            # The timer of an event loop may be early by its resolution, a millisecond.
            while (left := intended - time.perf_counter_ns()) > 0:
                await asyncio.sleep(left / 1e9)
            exchange = Exchange(number, intended)
            self.exchanges.append(exchange)
            tasks.append(loop.create_task(self._exchange(exchange, self._request(number))))
        await asyncio.gather(*tasks)

    async def _exchange(self, exchange: Exchange, request: bytes) -> None:
        """Send one request and wait for its end. Send it again if the server had closed the idle connection."""
        client = self.client
        for attempt in (1, 2):
            connection = client.take() if attempt == 1 else None
            if connection is None:
                try:
                    connection = await client.connect()
                except (OSError, asyncio.TimeoutError) as error:
                    exchange.t0_ns = exchange.end_ns = time.perf_counter_ns()
                    late = isinstance(error, asyncio.TimeoutError) and not isinstance(error, ssl.SSLError)
                    own = (
                        " This is the client's limit: raise it with `ulimit -n`, or send a smaller load."
                        if getattr(error, "errno", None) in NO_FILES
                        else ""
                    )
                    exchange.fail("timeout" if late else "refused", f"No connection: {first_line(error, 120)}.{own}")
                    return
            reused = connection.used > 0
            await client.begin(connection, exchange, request)
            client.put(connection)
            at_once = exchange.end_ns - exchange.t0_ns < STALE_S * 1e9
            if exchange.status or exchange.fault or not reused or not at_once or attempt == 2:
                return
            self.retries += 1
            exchange.message = ""

    async def _beat(self) -> None:
        clock, beats = time.perf_counter_ns, 0
        while True:
            due = clock() + int(BEAT_S * 1e9)
            await asyncio.sleep(BEAT_S)
            now = clock()
            self.lags.append(now - due)
            beats += 1
            if beats % WATCH_BEATS == 0:
                self.client.watch(now)
