"""Connections over TLS, through proxies, and over several addresses, with real servers on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from mlflow_llmbench.backends.openai.backend import OpenAIBackend
from mlflow_llmbench.backends.openai.http_requests import http_request
from mlflow_llmbench.loadgen import client as client_module
from mlflow_llmbench.loadgen.address import address_of, by_environment
from mlflow_llmbench.loadgen.client import Load, LoadClient
from mlflow_llmbench.loadgen.dialer import PASSWORD, tls_context
from mlflow_llmbench.loadgen.http1 import Exchange
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.errors import ModelError, UsageError
from mlflow_llmbench.records.redaction import redact
from mlflow_llmbench.records.results import ModelFacts
from mlflow_llmbench.sweeps.sweep import run
from mlflow_llmbench.tracking.load_results import load_results

from ..null_server import null_server
from ..relays import Certificates, certificates, relay
from ..servers import serving

PROXY_VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with null_server() as url:
        yield url


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*PROXY_VARIABLES, *(name.upper() for name in PROXY_VARIABLES), "OPENAI_API_KEY", PASSWORD):
        monkeypatch.delenv(name, raising=False)


def port_of(url: str) -> int:
    return urlsplit(url).port or 0


def resolve(url: str, **settings: Any) -> str:
    return OpenAIBackend.resolve(Cell(backend="openai", url=url, model="null:", **settings)).revision


def ask(url: str, **tls: Any) -> Exchange:
    address = address_of(url)
    client = LoadClient(address, tls=tls_context(**tls) if address.tls else None)
    try:
        return client.ask(http_request(address, "/version"))
    finally:
        client.close()


def test_a_private_authority_is_given_by_name(server: str, made: Certificates) -> None:
    with relay(port_of(server), context=made.context()) as front:
        url = f"https://localhost:{front.port}"
        assert resolve(url, tls_ca=str(made.ca)) == "null 1.2.3"
        with pytest.raises(ModelError, match=r"CERTIFICATE_VERIFY_FAILED.*give the authority's as tls_ca=FILE"):
            resolve(url)
        assert ask(url, ca=str(made.ca)).status == 200


class Models(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        data = b'{"data": [{"id": "null:", "owned_by": "null 1.2.3"}]}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None: ...


def test_a_client_shows_its_certificate(made: Certificates, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own: dict[str, Any] = {"tls_ca": str(made.ca), "tls_cert": str(made.client), "tls_key": str(made.client_key)}
    with serving(Models, made.context(wants_client=True)) as plain:
        url = plain.replace("http:", "https:")
        with pytest.raises(ModelError, match=r"CERTIFICATE_REQUIRED.*give one as tls_cert=FILE"):
            resolve(url, tls_ca=str(made.ca))
        with pytest.raises(UsageError, match=rf"tls_cert and its key cannot be used: .*{PASSWORD} in the environment"):
            resolve(url, **own)
        monkeypatch.setenv(PASSWORD, made.password)
        assert resolve(url, **own) == "null 1.2.3"
        both = tmp_path / "both.pem"
        both.write_bytes(made.client.read_bytes() + made.client_key.read_bytes())
        assert resolve(url, tls_ca=str(made.ca), tls_cert=str(both)) == "null 1.2.3"
        both.write_text("nothing")
        with pytest.raises(UsageError, match="tls_ca has no certificates in PEM: .*both"):
            resolve(url, tls_ca=str(both))


def addresses(monkeypatch: pytest.MonkeyPatch, *found: str) -> None:
    """Let the system's resolver tell these addresses of the name balanced.test."""
    real = socket.getaddrinfo

    def told(host: Any, port: Any, *rest: Any, **more: Any) -> Any:
        names = found if host == "balanced.test" else (host,)
        return [info for name in names for info in real(name, port, *rest, **more)]

    monkeypatch.setattr(socket, "getaddrinfo", told)
    monkeypatch.setattr(client_module, "new_loop", asyncio.new_event_loop)  # libuv has a resolver of its own


def test_connections_are_spread_over_the_addresses_of_a_name(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = [f"127.0.0.{number}" for number in (1, 2, 3)]
    addresses(monkeypatch, *hosts)
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(relay(port_of(server), hosts[0]))
        others = [stack.enter_context(relay(port_of(server), host, first.port)) for host in hosts[1:]]
        relays = [first, *others]
        address = address_of(f"http://balanced.test:{first.port}")
        client = stack.enter_context(contextlib.closing(LoadClient(address)))

        def get(number: int) -> bytes:
            return http_request(address, "/health", number=number)

        trace = client.run(get, Load(requests=6, concurrency=6), scrape=http_request(address, "/metrics"))
        assert {exchange.status for exchange in trace.exchanges} == {200}
        assert [one.connections for one in relays] == [2, 2, 2]
        assert trace.scrapes == ()  # each server has metrics of its own
        for _ in range(12):  # one user: the connection that has waited longest is used
            client.ask(get(0))
        assert {one.used for one in client._idle} == {3}
        cell = Cell(backend="openai", url=f"http://balanced.test:{first.port}", model="null:ttft_ms=1", output_tokens=2)
        with contextlib.closing(OpenAIBackend(cell, ModelFacts("", "none", "", ""))) as backend:
            assert backend.load().facts["server.addresses"] == 3


def test_a_name_whose_first_address_refuses_keeps_to_the_other_family(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    addresses(monkeypatch, "::1", "127.0.0.1", "127.0.0.2")
    with relay(port_of(server), "127.0.0.1") as front:
        client = LoadClient(address_of(f"http://balanced.test:{front.port}"))
        exchanges = client.run(
            lambda number: http_request(client.dialer.address, "/health", number=number), Load(8, concurrency=4)
        ).exchanges
        client.close()
        assert [exchange.status for exchange in exchanges] == [200] * 8  # 127.0.0.2 refuses, and its turns are taken
        assert client.dialer.addresses == ["127.0.0.1", "127.0.0.2"]
        assert front.connections == 4


def test_an_address_of_ipv6(server: str) -> None:
    try:
        with relay(port_of(server), "::1") as front:
            assert resolve(f"http://[::1]:{front.port}") == "null 1.2.3"
            assert b"\r\nHost: [::1]:" in http_request(address_of(f"http://[::1]:{front.port}"), "/health")
    except OSError as error:
        pytest.skip(f"needs IPv6 on loopback: {error}")


def test_a_proxy_of_the_environment_is_used_where_that_is_asked_for(
    server: str, made: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        relay(None, authorization="Basic dXNlcjpzZWNyZXQtMTIz") as proxy,
        relay(port_of(server), context=made.context()) as front,
    ):
        monkeypatch.setenv("HTTP_PROXY", f"http://user:secret-123@127.0.0.1:{proxy.port}")
        monkeypatch.setenv("https_proxy", f"user:secret-123@127.0.0.1:{proxy.port}")
        assert resolve(server) == "null 1.2.3"
        assert proxy.asked == []
        assert resolve(server, proxy="environment") == "null 1.2.3"
        assert proxy.asked[0] == f"GET {server}/v1/models"
        secure = f"https://localhost:{front.port}"
        assert resolve(secure, proxy="environment", tls_ca=str(made.ca)) == "null 1.2.3"
        assert proxy.asked[-1] == f"CONNECT localhost:{front.port}"
        assert "dXNlcjpz" not in redact("Proxy-Authorization: Basic dXNlcjpzZWNyZXQtMTIz")
        count = len(proxy.asked)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        assert resolve(server, proxy="environment") == "null 1.2.3"
        assert len(proxy.asked) == count


def test_a_proxy_that_refuses_is_told(made: Certificates, monkeypatch: pytest.MonkeyPatch) -> None:
    with relay(None, refuses=True) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.port}")
        with pytest.raises(
            ModelError,
            match=r"the proxy refuses a tunnel: HTTP/1.1 407 Proxy Authentication Required.*or leave proxy",
        ):
            resolve("https://far.example.org", proxy="environment")
    monkeypatch.setenv("HTTPS_PROXY", "socks5://user:hunter2hunter2@127.0.0.1:1080")
    with pytest.raises(UsageError, match="a proxy that is not http://HOST:PORT: it is a socks5 address") as told:
        by_environment(address_of("https://far.example.org"))
    assert "hunter2" not in str(told.value)
    for unreadable in ("http://127.0.0.1:99999", "http://user:hunter2hunter2"):
        monkeypatch.setenv("HTTPS_PROXY", unreadable)
        with pytest.raises(UsageError, match=r": its host or port cannot be read\. Correct it") as told:
            by_environment(address_of("https://far.example.org"))
        assert "hunter2" not in str(told.value)


def test_a_run_goes_by_tls_and_through_a_proxy_from_every_client_process(
    server: str, made: Certificates, store_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "Basic dXNlcjpzZWNyZXQtMTIz"
    with (
        relay(None, authorization=secret) as proxy,
        relay(port_of(server), context=made.context(wants_client=True)) as front,
    ):
        monkeypatch.setenv("HTTPS_PROXY", f"http://user:secret-123@127.0.0.1:{proxy.port}")
        monkeypatch.setenv(PASSWORD, made.password)
        done = run(
            tracking_uri=store_uri,
            backend="openai",
            url=f"https://localhost:{front.port}",
            model="null:ttft_ms=5+itl_ms=3",
            tls_ca=str(made.ca),
            tls_cert=str(made.client),
            tls_key=str(made.client_key),
            proxy="environment",
            concurrency=4,
            client_processes=2,
            repetitions=2,
            warmup=1,
            requests=12,
            output_tokens=4,
            prompt_tokens=16,
        )
        assert done.exit_code == 0
        assert set(proxy.asked) == {f"CONNECT localhost:{front.port}"}
        [result] = load_results(done.folder)
        assert result.load and result.load.facts["server.proxy"] == f"127.0.0.1:{proxy.port}"
        assert all(len(repetition.client.parts) == 2 for repetition in result.repetitions if repetition.client)
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    hidden = (b"secret-123", secret.encode(), made.password.encode())
    assert not [1 for content in written for one in hidden if one in content]
