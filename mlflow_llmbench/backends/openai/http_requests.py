"""Build HTTP requests to a server, with the headers and fields that the user adds.

The API key comes only from the environment: LLMBENCH_API_KEY, else OPENAI_API_KEY, which is sent over TLS or to this
machine only, with the organization and project of OPENAI_ORG_ID and OPENAI_PROJECT_ID as OpenAI's own client does.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from ...config.request_fields import loaded, variables_of
from ...loadgen.address import Address
from ...records import references
from ...records.cell import Cell
from ...records.errors import UsageError

OPENAI = {"OPENAI_ORG_ID": "OpenAI-Organization", "OPENAI_PROJECT_ID": "OpenAI-Project"}
"""Variable → header that goes with OPENAI_API_KEY."""

Headers = Sequence[tuple[str, str]]
"""Names and values of headers."""


def api_key(address: Address) -> str:
    """Return the API key for a server; empty if there is none. Raises UsageError if no header can hold it."""
    return _api_key(address)[1]


def _api_key(address: Address) -> tuple[str, str]:
    """Return the variable of the API key, and the key."""
    names = ("LLMBENCH_API_KEY", "OPENAI_API_KEY") if address.tls or address.loopback else ("LLMBENCH_API_KEY",)
    name, key = next(((name, key) for name in names if (key := os.environ.get(name, "").strip())), ("", ""))
    return name, _plain(name, key)


def _plain(name: str, value: str) -> str:
    if not (value.isascii() and value.isprintable()):
        raise UsageError(f"{name} has a character that no HTTP header can hold. Set it to the key alone.")
    return value


def user_headers(cell: Cell) -> Headers:
    """Return the headers that the user adds, with the values of variables. Raises UsageError if one is not set."""
    found = loaded(cell.headers)
    return [(name, references.resolved("headers", value, os.environ)) for name, value in found.items()]


def user_body(cell: Cell) -> dict[str, Any]:
    """Return the fields that the user adds, with the values of variables. Raises UsageError if one is not set."""
    found: dict[str, Any] = references.in_texts(
        loaded(cell.extra_body), lambda text: references.resolved("extra_body", text, os.environ)
    )
    return found


def secrets_of(cell: Cell, address: Address) -> tuple[str, ...]:
    """Return the values that no message may repeat: the API key, and those of variables, longest first."""
    variables = variables_of(cell.extra_body, cell.headers)
    values = {api_key(address), *(os.environ.get(name, "").strip() for name in variables)}
    return tuple(sorted(values - {""}, key=len, reverse=True))


def http_request(
    address: Address, path: str, body: object = None, number: int | str = 0, headers: Headers = ()
) -> bytes:
    """Build a whole HTTP request: GET without a body, POST with one. `headers` replace ours of the same name."""
    # "replace" is for unpaired surrogates, which a server's answer may contain.
    data = b"" if body is None else json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
    own = {
        "Host": address.authority,
        "User-Agent": "llmbench",
        "Accept": "text/event-stream, application/json",
        "Accept-Encoding": "identity",
        **_of_key(address),
    }
    if address.proxy and address.proxy.authorization and not address.tls:
        own["Proxy-Authorization"] = address.proxy.authorization
    if data:
        own |= {"Content-Type": "application/json", "Content-Length": str(len(data)), "X-Request-Id": str(number)}
    given = {name.lower() for name, _ in headers}
    kept = {name: value for name, value in own.items() if name.lower() not in given}
    first = f"{'GET' if body is None else 'POST'} {address.target}{path} HTTP/1.1"
    lines = [first, *(f"{name}: {value}" for name, value in (*kept.items(), *headers))]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + data


def _of_key(address: Address) -> Mapping[str, str]:
    """Return the headers of the API key."""
    name, key = _api_key(address)
    if not key:
        return {}
    of_openai = OPENAI if name == "OPENAI_API_KEY" else {}
    more = {header: _plain(name, value) for name, header in of_openai.items() if (value := os.environ.get(name, ""))}
    return {"Authorization": f"Bearer {key}", **more}
