"""Read a server's models and version before it is measured, or the facts of a model whose server is not started yet.

The API key comes only from the environment: LLMBENCH_API_KEY, else OPENAI_API_KEY, which is sent over TLS or to this
machine only.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any

from ...config.models import find_preset
from ...config.server_command import arguments
from ...loadgen.client import Address, LoadClient
from ...loadgen.http1 import Exchange, Limits
from ...loadgen.server_process import require_program
from ...records.cell import Cell
from ...records.errors import ModelError, UsageError
from ...records.redaction import escape_controls
from ...records.results import ModelFacts
from ..checkpoints.sources import find_model

RESOLVE = Limits(connect_s=10, first_s=10, gap_s=5, total_s=12, most_bytes=4 << 20)


def api_key(address: Address) -> str:
    """Return the API key for a server; empty if there is none. Raises UsageError if no header can hold it."""
    names = ("LLMBENCH_API_KEY", "OPENAI_API_KEY") if address.tls or address.loopback else ("LLMBENCH_API_KEY",)
    name, key = next(((name, key) for name in names if (key := os.environ.get(name, "").strip())), ("", ""))
    if not (key.isascii() and key.isprintable()):
        raise UsageError(f"{name} has a character that no HTTP header can hold. Set it to the key alone.")
    return key


def http_request(address: Address, path: str, body: object = None, number: int | str = 0) -> bytes:
    """Build a whole HTTP request: GET without a body, POST with one."""
    # "replace" is for unpaired surrogates, which a server's answer may contain.
    data = b"" if body is None else json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
    key = api_key(address)
    lines = [
        f"{'GET' if body is None else 'POST'} {address.path}{path} HTTP/1.1",
        f"Host: {address.authority}",
        "User-Agent: llmbench",
        "Accept: text/event-stream, application/json",
        "Accept-Encoding: identity",
        *([f"Authorization: Bearer {key}"] if key else []),
        *(
            ["Content-Type: application/json", f"Content-Length: {len(data)}", f"X-Request-Id: {number}"]
            if data
            else []
        ),
    ]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + data


def launchable(cell: Cell) -> ModelFacts:
    """Return the facts of a model whose server is not started yet. `location` replaces `{model}` in the command.

    A preset gets the name of its repository. A local model gets its path and the hash of its content. Raises UsageError
    or MissingError if the command's program cannot be found.
    """
    [program, *_] = arguments(cell.launch or "", model=cell.model, port=0, quant=cell.quant)
    require_program(program)
    preset = find_preset(cell.model)
    if os.path.exists(os.path.expanduser(cell.model)):
        found = find_model(dataclasses.replace(cell, quant="none"))
        return ModelFacts(cell.model, "none", found.location, found.revision, context=found.context)
    if preset is not None:
        return ModelFacts(cell.model, "none", preset.repository, cell.revision, context=preset.context)
    return ModelFacts(cell.model, "none", cell.model, cell.revision)


def name_among(listed: Sequence[str], model: ModelFacts) -> str:
    """Return the name by which a server that we started serves its model.

    It is our name of the model, the one in its command, or the only one that the server lists.
    """
    if model.name in listed and model.location not in listed:
        return model.name
    return listed[0] if len(listed) == 1 else model.location


@dataclasses.dataclass(frozen=True)
class ServerInfo:
    """A server's report of itself: its models by name, its version, and the `Server` header of its answer."""

    models: dict[str, dict[str, Any]]
    version: Any
    server: str

    def software(self, own: dict[str, Any]) -> str:
        """Return the server's name and version as far as it reports them. `own` is its entry of the model."""
        engine = str(own.get("owned_by") or "").strip() or self.server
        number = self.version.get("version") if isinstance(self.version, dict) else None
        return escape_controls(f"{engine} {number}" if number else engine)[:100]


def ask_server(client: LoadClient, address: Address, needed: bool = True) -> ServerInfo:
    """Ask a server for its models and version. Raises ModelError if it is `needed` but unreachable or wants a key."""
    listed, told = _ask_json(client, address, "/v1/models", needed)
    version, _ = _ask_json(client, address, "/version", needed=False)
    data = listed.get("data") if isinstance(listed, dict) else None
    entries = [entry for entry in data if isinstance(entry, dict)] if isinstance(data, list) else []
    models: dict[str, dict[str, Any]] = {}
    for entry in entries:
        models.setdefault(str(entry.get("id")), entry)
    return ServerInfo(models, version, told.headers.get("server", "unknown server"))


def _ask_json(client: LoadClient, address: Address, path: str, needed: bool = True) -> tuple[Any, Exchange]:
    """Return the JSON answer of a path, None if there is none, and the exchange.

    Raises ModelError if the server is `needed` but unreachable or wants a key.
    """
    exchange = client.ask(http_request(address, path))
    where = f"the server at {'https' if address.tls else 'http'}://{address.authority}{address.path}"
    if needed and (exchange.fault or not exchange.status):
        raise ModelError(
            f"Cannot reach {where}: {exchange.message or 'it closed the connection.'} Start it, or correct url."
        )
    if needed and exchange.status in (401, 403):
        raise ModelError(
            f"{where[0].upper()}{where[1:]} rejects the API key (HTTP {exchange.status}). Set LLMBENCH_API_KEY in the "
            "environment."
        )
    try:
        found = json.loads(b"".join(exchange.parts)) if exchange.status == 200 else None
    except (ValueError, RecursionError):
        found = None
    return found, exchange
