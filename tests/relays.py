"""Real relays on loopback, for tests: one that ends TLS, one at another address, and an HTTP proxy."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


class Relay:
    """Accepts connections at an address and passes their bytes on, to one port of loopback or as a proxy is asked."""

    def __init__(self, to: int | None, authorization: str = "", refuses: bool = False) -> None:
        self.to, self.authorization, self.refuses = to, authorization, refuses
        self.port, self.connections, self.asked = 0, 0, list[str]()
        self.loop = asyncio.new_event_loop()
        self.server: asyncio.Server | None = None
        self.writers: list[asyncio.StreamWriter] = []

    async def start(self, host: str, port: int, context: ssl.SSLContext | None) -> None:
        self.server = await asyncio.start_server(self.accept, host, port, ssl=context)
        self.port = self.server.sockets[0].getsockname()[1]

    async def end(self) -> None:
        assert self.server is not None
        self.server.close()
        for writer in self.writers:
            writer.transport.abort()
        if others := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(others)
        for writer in self.writers:
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.writers.append(writer)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            if self.to is not None:
                await self.join(reader, writer, "127.0.0.1", self.to, b"")
            else:
                await self.answer(reader, writer)
        writer.close()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer as a proxy: to CONNECT with a tunnel, to a whole address with what its server answers."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.strip().split("\r\n")
        method, target, _ = first.split(" ")
        self.asked.append(f"{method} {target}")
        told = next(
            (value for line in lines if (value := line.partition(": ")[2]) and "proxy-auth" in line.lower()), ""
        )
        if told != self.authorization or self.refuses:
            writer.write(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
            return
        if method == "CONNECT":
            host, _, port = target.rpartition(":")
            writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            await self.join(reader, writer, host.strip("[]"), int(port), b"")
            return
        host, _, port = target.removeprefix("http://").partition("/")[0].partition(":")
        await self.join(reader, writer, host, int(port or 80), head.encode("latin-1"))

    async def join(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str, port: int, first: bytes
    ) -> None:
        other_reader, other_writer = await asyncio.open_connection(host, port)
        self.writers.append(other_writer)
        other_writer.write(first)
        await asyncio.gather(_pass_on(reader, other_writer), _pass_on(other_reader, writer))


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.close()


@contextlib.contextmanager
def relay(
    to: int | None,
    host: str = "127.0.0.1",
    port: int = 0,
    context: ssl.SSLContext | None = None,
    authorization: str = "",
    refuses: bool = False,
) -> Iterator[Relay]:
    """Yield a relay that runs in a thread. Without `to` it is an HTTP proxy, which wants `authorization`."""
    one = Relay(to, authorization, refuses)
    one.loop.run_until_complete(one.start(host, port, context))
    thread = threading.Thread(target=one.loop.run_forever)
    thread.start()
    try:
        yield one
    finally:
        one.loop.call_soon_threadsafe(one.loop.stop)
        thread.join()
        one.loop.run_until_complete(one.end())
        one.loop.close()


@dataclass(frozen=True)
class Certificates:
    """PEM files: of a private authority, of a server on loopback, and of a client whose key has a password."""

    ca: Path
    server: Path
    client: Path
    client_key: Path
    password: str = "correct horse"

    def context(self, wants_client: bool = False) -> ssl.SSLContext:
        """Return the context of the server."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.server)
        if wants_client:
            context.load_verify_locations(self.ca)
            context.verify_mode = ssl.CERT_REQUIRED
        return context


def certificates(folder: Path) -> Certificates:
    """Make the certificates in a folder."""
    found = Certificates(*(folder / f"{name}.pem" for name in ("ca", "server", "client", "client_key")))
    authority = ec.generate_private_key(ec.SECP256R1())
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "private authority")])
    found.ca.write_bytes(_signed(issuer, authority, issuer, authority, ca=True))
    for path, name in ((found.server, "localhost"), (found.client, "client")):
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = _signed(subject, key, issuer, authority)
        if path == found.server:
            certificate += _key(key, serialization.NoEncryption())
        else:
            found.client_key.write_bytes(_key(key, serialization.BestAvailableEncryption(found.password.encode())))
        path.write_bytes(certificate)
    return found


def _key(key: ec.EllipticCurvePrivateKey, encryption: serialization.KeySerializationEncryption) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


def _signed(
    subject: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    issuer: x509.Name,
    authority: ec.EllipticCurvePrivateKey,
    ca: bool = False,
) -> bytes:
    now = datetime.datetime.now(datetime.timezone.utc)
    names = [x509.DNSName("localhost"), x509.DNSName("balanced.test")]
    names += [x509.IPAddress(ipaddress.ip_address(address)) for address in ("127.0.0.1", "::1")]
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(authority, hashes.SHA256())
    )
    return made.public_bytes(serialization.Encoding.PEM)
