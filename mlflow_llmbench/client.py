"""The load client: sends requests in a closed or an open loop and keeps what came back, as raw bytes with stamps.

One thread, one event loop (uvloop where it is installed). While a load runs nothing is parsed, logged or collected; all
requests are built before. The client watches itself: how late its event loop wakes up, how late it sends, and how much
CPU it takes, because a client that is the bottleneck reports its own latency.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import ipaddress
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

from .errors import first_line
from .http1 import Connection, Exchange, Limits

BEAT_S = 0.02
"""Time between two looks at the event loop's lag."""

WATCH_BEATS = 10
"""Every so many beats the requests in flight are held against their time limits."""

SCRAPE_S = 1.0
"""Time between two readings of the server's own metrics."""

MOST_SCRAPES = 30
"""Readings that are held; beyond it every second one is left out, and the time between them doubles."""

STALE_S = 1.0
"""An idle connection that the server had closed ends within this time after a request was written to it; a later end is of the request."""

NO_FILES = (errno.EMFILE, errno.ENFILE)

SCRAPE_LIMITS = Limits(connect_s=2, first_s=2, gap_s=2, total_s=5, most_bytes=1 << 20)

BuildRequest = Callable[[int], bytes]
"""The whole request of a number, head and body."""

FollowUp = Callable[[Exchange], bytes | None]
"""What the same user sends when an answer has ended; None if nothing."""


@dataclass(frozen=True)
class Load:
    """What is sent: `requests` at most, and none is begun after `duration_s`.

    Closed loop: `concurrency` users, each sends the next request when it has the answer to its last. Open loop: request i
    is sent `arrivals_ns[i]` after the start, whatever has been answered.
    """

    requests: int | None = None
    concurrency: int = 1
    duration_s: float | None = None
    arrivals_ns: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Trace:
    """What a load left: raw exchanges in the order of their numbers, and what the client saw of itself.

    `lags_ns`: expected against actual wake-up of the event loop, every 20 ms · `cpu_s`: CPU seconds of this process ·
    `retries`: requests sent again because the server had closed an idle connection · `parts`: what each of several processes left,
    without its exchanges, where several sent the load; the lags are theirs then · `scrapes`: the server's own metrics before, during and
    after the load.
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
    """The traces of processes that sent shares of one load as one: all stamps are of one clock, CPU seconds and retries are summed."""
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


@dataclass(frozen=True)
class Address:
    """Where a server listens: the parts of its URL."""

    host: str
    port: int
    tls: bool
    path: str

    @property
    def loopback(self) -> bool:
        """Whether it is this machine by its name."""
        with contextlib.suppress(ValueError):
            return ipaddress.ip_address(self.host).is_loopback
        return self.host == "localhost"

    @property
    def authority(self) -> str:
        """Host and port as a Host header has them."""
        name = f"[{self.host}]" if ":" in self.host else self.host
        return name if self.port == (443 if self.tls else 80) else f"{name}:{self.port}"


def address_of(url: str) -> Address:
    """The parts of a URL that `spec` has accepted."""
    parts = urlsplit(url)
    tls = parts.scheme == "https"
    return Address(parts.hostname or "", parts.port or (443 if tls else 80), tls, parts.path.rstrip("/"))


def new_loop() -> asyncio.AbstractEventLoop:
    """A loop of uvloop where it is installed, else of asyncio."""
    with contextlib.suppress(ImportError):
        import uvloop

        loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
        return loop
    return asyncio.new_event_loop()


class LoadClient:
    """Connections to one server, kept between loads."""

    def __init__(self, address: Address, limits: Limits | None = None) -> None:
        self.address = address
        self.limits = limits or Limits()
        self.loop = new_loop()
        self._tls = ssl.create_default_context() if address.tls else None  # verifies names and certificates
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
        """Send a load and wait for the last answer. `expected` requests are built before it starts, the rest when they are due.

        With `follow_up` the requests of a closed loop begin conversations, and their users send what follows on each answer. `ready`
        is called when all is prepared, and says when to begin, ns of the monotonic clock; without it the load begins at once.
        `scrape` is the request for the server's own metrics, if they are wanted.
        """
        count = len(load.arrivals_ns) if load.arrivals_ns is not None else load.requests
        built = [build(number) for number in range(count if count is not None else expected or load.concurrency)]
        return self.loop.run_until_complete(_Run(self, build, built, load, follow_up, scrape).run(ready))

    def ask(self, request: bytes) -> Exchange:
        """One request, and its answer."""
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
        """Have `number` idle connections; those that the server has closed meanwhile are dropped. A refusal is for the request to meet."""
        for _ in range(2):
            await asyncio.sleep(0)
        self._idle = [connection for connection in self._idle if connection.usable]
        missing = [self.connect() for _ in range(number - len(self._idle))]
        self._idle += [
            found for found in await asyncio.gather(*missing, return_exceptions=True) if isinstance(found, Connection)
        ]

    async def connect(self, limits: Limits | None = None) -> Connection:
        """A new connection. Raises OSError, ssl.SSLError or TimeoutError."""
        limits = limits or self.limits
        name = self.address.host if self._tls else None
        made = self.loop.create_connection(
            lambda: Connection(limits, self._done),
            self.address.host,
            self.address.port,
            ssl=self._tls,
            server_hostname=name,
        )
        return (await asyncio.wait_for(made, limits.connect_s))[1]

    async def scrape(self, request: bytes) -> Exchange | None:
        """The server's own metrics, over a connection of their own; None if it has none, or does not give them soon."""
        exchange = Exchange(-1)
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
        """The same between loads."""
        return self.loop.run_until_complete(self.scrape(request))

    def take(self) -> Connection | None:
        """An idle connection that is still open; the one used last, which the server is the least likely to close."""
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                return connection
        return None

    def put(self, connection: Connection) -> None:
        """Give a connection back."""
        if connection.usable:
            self._idle.append(connection)

    def begin(self, connection: Connection, exchange: Exchange, request: bytes) -> asyncio.Future[None]:
        """Send a request; the future is done when its answer has ended."""
        future = self._busy[connection] = self.loop.create_future()
        connection.send(exchange, request)
        return future

    def watch(self, now: int) -> None:
        """End what is over its limits."""
        for connection in list(self._busy):
            connection.overdue(now)

    def _done(self, connection: Connection, exchange: Exchange) -> None:
        future = self._busy.pop(connection)
        if not future.done():
            future.set_result(None)


class _Run:
    """One load on its way."""

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
        gc.collect()
        gc.freeze()
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
            gc.unfreeze()
        exchanges = sorted(self.exchanges, key=lambda exchange: exchange.number)
        if told and not await self._ask_server():
            self.scrapes.clear()  # without the last reading nothing is known of the whole load
        return Trace(
            tuple(exchanges), started, ended, tuple(self.lags), used, self.retries, scrapes=tuple(self.scrapes)
        )

    async def _ask_server(self) -> bool:
        """Read the server's own metrics; whether it has some."""
        found = await self.client.scrape(self.scrape) if self.scrape else None
        self.scrapes += [found] if found else []
        return found is not None

    async def _watch_server(self) -> None:
        pause = SCRAPE_S
        while True:
            await asyncio.sleep(pause)
            await self._ask_server()
            if len(self.scrapes) > MOST_SCRAPES:
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
            conversation, turn = (self.begun if self.follow_up else None), 1
            self.begun += 1
            while request is not None and time.perf_counter_ns() < self.stop_ns:
                exchange = Exchange(
                    len(self.exchanges), conversation=conversation, turn=turn if self.follow_up else None
                )
                self.exchanges.append(exchange)
                await self._exchange(exchange, request)
                if exchange.fault == "refused" and not exchange.status:
                    await asyncio.sleep(0.05)  # a server that is away is not asked in a tight loop
                request, turn = self.follow_up(exchange) if self.follow_up else None, turn + 1

    async def _open(self, started: int, arrivals_ns: tuple[int, ...]) -> None:
        """Send each request when it is due; those that are due already go at once, in order."""
        tasks: list[asyncio.Task[None]] = []
        loop = self.client.loop
        for number, offset in enumerate(arrivals_ns):
            intended = started + offset
            while (
                left := intended - time.perf_counter_ns()
            ) > 0:  # a loop's timer may be early by its resolution, a millisecond
                await asyncio.sleep(left / 1e9)
            exchange = Exchange(number, intended)
            self.exchanges.append(exchange)
            tasks.append(loop.create_task(self._exchange(exchange, self._request(number))))
        await asyncio.gather(*tasks)

    async def _exchange(self, exchange: Exchange, request: bytes) -> None:
        """Send one request and wait for its end; once more if the connection was an idle one that the server had closed."""
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
