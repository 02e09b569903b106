"""Address of a server, and the proxy before it."""

from __future__ import annotations

import base64
import contextlib
import ipaddress
import urllib.request
from dataclasses import dataclass, replace
from urllib.parse import unquote, urlsplit

from ..records.errors import UsageError
from ..records.redaction import keep_secret


@dataclass(frozen=True)
class Proxy:
    """An HTTP proxy: its host and port, and the value of the header that it asks for, "" for none."""

    host: str
    port: int
    authorization: str = ""


@dataclass(frozen=True)
class Address:
    """The address of a server: the parts of its URL, and the proxy by which it is reached."""

    host: str
    port: int
    tls: bool
    path: str
    proxy: Proxy | None = None

    @property
    def loopback(self) -> bool:
        """Return True if the host is a loopback address or `localhost`."""
        with contextlib.suppress(ValueError):
            return ipaddress.ip_address(self.host).is_loopback
        return self.host == "localhost"

    @property
    def authority(self) -> str:
        """Return host and port as in a Host header."""
        return self.endpoint if self.port != (443 if self.tls else 80) else self.endpoint.rpartition(":")[0]

    @property
    def endpoint(self) -> str:
        """Return host and port, which a tunnel is asked for."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def target(self) -> str:
        """Return the beginning of a request's target: a proxy gets the whole address (RFC 9112, section 3.2.2)."""
        return f"http://{self.authority}{self.path}" if self.proxy and not self.tls else self.path


def address_of(url: str) -> Address:
    """Return the parts of a URL that `spec` has validated."""
    parts = urlsplit(url)
    tls = parts.scheme == "https"
    return Address(parts.hostname or "", parts.port or (443 if tls else 80), tls, parts.path.rstrip("/"))


def by_environment(address: Address) -> Address:
    """Return the address with the proxy that the environment names for it, if it names one.

    HTTP_PROXY or HTTPS_PROXY, else ALL_PROXY, and NO_PROXY count, in capitals or not, as for other programs. Raises
    UsageError for a proxy that is no HTTP proxy.
    """
    if urllib.request.proxy_bypass_environment(address.endpoint):  # type: ignore[attr-defined]
        return address
    known = urllib.request.getproxies_environment()
    found = known.get("https" if address.tls else "http") or known.get("all")
    if not found:
        return address
    try:
        parts = urlsplit(found if "://" in found else f"http://{found}")
        host, port, why = parts.hostname, parts.port or 80, f"it is a {parts.scheme or 'different'} address"
    except ValueError:  # its text may hold a password
        host, port, why = None, 0, "its host or port cannot be read"
    if not host or parts.scheme != "http":
        raise UsageError(
            f"The environment names a proxy that is not http://HOST:PORT: {why}. Correct it, or leave proxy out."
        )
    return replace(address, proxy=Proxy(host, port, _credentials(parts.username, parts.password)))


def _credentials(user: str | None, password: str | None) -> str:
    if not user:
        return ""
    text = base64.b64encode(f"{unquote(user)}:{unquote(password or '')}".encode()).decode()
    keep_secret(text)
    return f"Basic {text}"
