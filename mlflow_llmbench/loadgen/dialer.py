"""Open connections to a server: over its addresses in turn, by TLS, and through a proxy."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
import ssl
from collections.abc import Callable, Sequence
from typing import TypeVar

from ..records.errors import UsageError, first_line
from .address import Address, Proxy

PROXY_HEAD_BYTES = 16384
"""Most bytes of a proxy's answer to a request for a tunnel."""

PASSWORD = "LLMBENCH_TLS_PASSWORD"
"""Environment variable with the password of a client's key."""

P = TypeVar("P", bound=asyncio.Protocol)


def tls_context(ca: str | None = None, certificate: str | None = None, key: str | None = None) -> ssl.SSLContext:
    """Return a context that verifies names and certificates, by the authorities of a PEM file or of the system.

    `certificate` is the client's own, with its `key` in the same file or another. Raises UsageError for a file that
    cannot be used.
    """
    try:
        context = ssl.create_default_context(cafile=ca)
    except (OSError, ValueError) as error:
        raise UsageError(f"tls_ca has no certificates in PEM: {ca} ({first_line(error, 100)}). Correct it.") from None
    context.set_alpn_protocols(["http/1.1"])
    if certificate:
        try:
            context.load_cert_chain(certificate, key, password=lambda: os.environ.get(PASSWORD, ""))
        except (OSError, ValueError) as error:
            raise UsageError(
                f"tls_cert and its key cannot be used: {certificate} ({first_line(error, 100)}). Give both in PEM, "
                f"tls_key if they are two files, and {PASSWORD} in the environment if the key has a password."
            ) from None
    return context


class Dialer:
    """Opens the connections of one client.

    A name with several addresses, such as that of a load balancer, gets its connections in turns over those of one
    family: that of the first address which took a connection. Where one refuses, the next is tried.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, address: Address, tls: ssl.SSLContext | None = None) -> None:
        self.loop, self.address = loop, address
        self.tls = (tls or tls_context()) if address.tls else None
        self.turn = 0
        self.addresses: list[str] = []
        self._settled = False
        self._settling = asyncio.Lock()

    @property
    def several(self) -> bool:
        """Return True if the server has more than one address."""
        return len(self.addresses) > 1

    def forget(self) -> None:
        """Look the name up again for the next connection."""
        self._settled = False

    async def connect(self, make: Callable[[], P]) -> P:
        """Open a connection. Raises OSError or ssl.SSLError if no address takes one."""
        if not self._settled:
            async with self._settling:
                if not self._settled:
                    host, protocol = await self._first_of(await self._look_up(), make)
                    self.addresses = [other for other in self.addresses if (":" in other) == (":" in host)]
                    self.turn = self.addresses.index(host)
                    self._settled = True
                    return protocol
        self.turn = (self.turn + 1) % len(self.addresses)
        return (await self._first_of(_from(self.turn, self.addresses), make))[1]

    async def _look_up(self) -> list[str]:
        to = self.address.proxy or self.address
        try:
            self.addresses = [str(ipaddress.ip_address(to.host))]
        except ValueError:
            found = await self.loop.getaddrinfo(to.host, to.port, type=socket.SOCK_STREAM)
            names = list(dict.fromkeys(str(info[4][0]) for info in found))
            preferred = [name for name in names if (":" in name) == (":" in names[0])]
            others = [name for name in names if name not in preferred]
            # Client processes begin at different addresses.
            self.addresses = [*_from(os.getpid() % len(preferred), preferred), *others]
        return self.addresses

    async def _first_of(self, hosts: Sequence[str], make: Callable[[], P]) -> tuple[str, P]:
        """Return the first address that takes a connection, and the connection's protocol."""
        problem: OSError = OSError("the name has no address")
        for host in hosts:
            try:
                return host, await self._open(host, make)
            except ssl.SSLError:
                raise
            except OSError as error:
                problem = error
        raise problem

    async def _open(self, host: str, make: Callable[[], P]) -> P:
        name = self.address.host if self.tls else None
        proxy = self.address.proxy
        if proxy is None or self.tls is None:
            port = (proxy or self.address).port
            _, protocol = await self.loop.create_connection(make, host, port, ssl=self.tls, server_hostname=name)
            return protocol
        transport, tunnel = await self.loop.create_connection(lambda: _Tunnel(self.address, proxy), host, proxy.port)
        try:
            await tunnel.opened
            protocol = make()
            secured = await self.loop.start_tls(transport, protocol, self.tls, server_hostname=name)
        except BaseException:
            transport.abort()
            raise
        assert secured is not None
        protocol.connection_made(secured)
        return protocol


def _from(turn: int, hosts: Sequence[str]) -> list[str]:
    return [*hosts[turn:], *hosts[:turn]]


class _Tunnel(asyncio.Protocol):
    """Asks a proxy for a tunnel (RFC 9110, section 9.3.6). `opened` is done when there is one."""

    def __init__(self, address: Address, proxy: Proxy) -> None:
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        lines = [f"CONNECT {address.endpoint} HTTP/1.1", f"Host: {address.endpoint}"]
        lines += [f"Proxy-Authorization: {proxy.authorization}"] if proxy.authorization else []
        self.request = "\r\n".join([*lines, "", ""]).encode("latin-1")
        self.head = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.write(self.request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        self.head += data
        if self.opened.done():
            return
        if b"\r\n\r\n" in self.head:
            status = self.head.split(b"\r\n", 1)[0][:100].decode("latin-1")
            if status.split(" ")[1:2] == ["200"]:
                self.opened.set_result(None)
            else:
                self.opened.set_exception(OSError(f"the proxy refuses a tunnel: {status}"))
        elif len(self.head) > PROXY_HEAD_BYTES:
            self.opened.set_exception(OSError("the proxy's answer does not end"))

    def connection_lost(self, error: Exception | None) -> None:
        if not self.opened.done():
            self.opened.set_exception(OSError("the proxy closed the connection"))
