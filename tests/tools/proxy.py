"""An HTTP proxy on loopback that delays and counts requests: a store that is far away, or gone for a while."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import aiohttp
from aiohttp import web

HOP = {"connection", "keep-alive", "transfer-encoding", "upgrade", "te", "trailer", "content-length"}
"""Headers of one connection, which are not passed on."""

T = TypeVar("T")


class Proxy:
    """A port on loopback that forwards each request to a server, `delay_s` after it has come.

    `requests` counts what was answered, by its kind, and `times` has its begin and end (`time.perf_counter_ns`).
    `fault` is asked about each request before it is passed on: "cut" breaks its connection, "lose" passes it on and
    breaks the connection instead of answering. While `shut`, all connections are cut and new ones refused, as by a
    server that has been killed.
    """

    def __init__(self, target: str, delay_s: float = 0.0) -> None:
        self.target, self.delay_s, self.port = target, delay_s, 0
        self.requests: Counter[str] = Counter()
        self.times: list[tuple[int, int]] = []
        self.fault: Callable[[str], str | None] = lambda kind: None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._runner: web.AppRunner | None = None
        self._session = self._do(self._new_session())
        self.open()

    @property
    def address(self) -> str:
        """The proxy's own address."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def is_open(self) -> bool:
        """Whether it accepts connections."""
        return self._runner is not None

    def open(self) -> None:
        """Accept connections, on the same port as before."""
        if not self.is_open:
            self._do(self._open())

    def shut(self) -> None:
        """Cut all connections and refuse new ones."""
        if self.is_open:
            self._do(self._shut())

    def close(self) -> None:
        """Shut for ever."""
        self.shut()
        self._do(self._session.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _new_session(self) -> aiohttp.ClientSession:
        unlimited = aiohttp.TCPConnector(limit=0, force_close=True)  # the target may have been started again
        return aiohttp.ClientSession(
            connector=unlimited, auto_decompress=False, timeout=aiohttp.ClientTimeout(total=None), trust_env=False
        )

    async def _open(self) -> None:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self._pass_on)
        runner = web.AppRunner(app, shutdown_timeout=0.01, auto_decompress=False)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = int(runner.addresses[0][1])
        self._runner = runner

    async def _shut(self) -> None:
        runner, self._runner = self._runner, None
        if runner is None:
            return
        for connection in list(runner.server.connections) if runner.server else []:
            if connection.transport is not None:
                connection.transport.abort()
        await runner.cleanup()

    async def _pass_on(self, request: web.Request) -> web.StreamResponse:
        begun, kind = time.perf_counter_ns(), f"{request.method} {_kind(request.path)}"
        fault = self.fault(kind)
        if fault == "cut" and request.transport:
            request.transport.abort()
            return web.Response(status=503)
        body = await request.read()
        await asyncio.sleep(self.delay_s)
        headers = {key: value for key, value in request.headers.items() if key.lower() not in HOP | {"expect"}}
        async with self._session.request(
            request.method, self.target + request.raw_path, data=body, headers=headers, allow_redirects=False
        ) as answer:
            whole = await answer.read()
            self.requests[kind] += 1
            self.times.append((begun, time.perf_counter_ns()))
            if fault == "lose" and request.transport:
                request.transport.abort()
            response = web.StreamResponse(status=answer.status)
            for key, value in answer.headers.items():
                if key.lower() not in HOP or (key.lower() == "content-length" and request.method == "HEAD"):
                    response.headers.add(key, value)
            if request.method != "HEAD":
                response.content_length = len(whole)
            await response.prepare(request)
            await response.write_eof(whole)
            return response


def _kind(path: str) -> str:
    """Return what a request is for: the call of MLflow's API, `artifacts`, or `object`."""
    if "/mlflow-artifacts/" in path:
        return "artifacts"
    if "/mlflow/" in path:
        return path.rpartition("/mlflow/")[2]
    return path.strip("/") if path == "/health" else "object"
