"""Read a server's models and version before it is measured, or the facts of a model whose server is not started yet."""

from __future__ import annotations

import dataclasses
import json
import os.path
from collections.abc import Sequence
from typing import Any

from ...config.models import find_preset
from ...config.server_command import arguments
from ...loadgen.address import Address, address_of, by_environment
from ...loadgen.client import LoadClient
from ...loadgen.dialer import tls_context
from ...loadgen.http1 import Exchange, Limits
from ...loadgen.server_process import require_program
from ...records.cell import Cell
from ...records.errors import ModelError
from ...records.redaction import escape_controls
from ...records.results import ModelFacts
from ..checkpoints.sources import find_model
from .http_requests import Headers, http_request

RESOLVE = Limits(connect_s=10, first_s=10, gap_s=5, total_s=12, most_bytes=4 << 20)


def server_address(cell: Cell) -> Address:
    """Return the address of a cell's server, with the proxy of the environment if the cell asks for it."""
    address = address_of(cell.url or "")
    return by_environment(address) if cell.proxy else address


def open_client(cell: Cell, limits: Limits) -> LoadClient:
    """Return a client of a cell's server. Raises UsageError for certificates or a proxy that cannot be used."""
    address = server_address(cell)
    return LoadClient(address, limits, tls_context(cell.tls_ca, cell.tls_cert, cell.tls_key) if address.tls else None)


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


def ask_server(client: LoadClient, address: Address, needed: bool = True, headers: Headers = ()) -> ServerInfo:
    """Ask a server for its models and version. Raises ModelError if it is `needed` but unreachable or wants a key."""
    listed, told = _ask_json(client, address, "/v1/models", needed, headers)
    version, _ = _ask_json(client, address, "/version", False, headers)
    data = listed.get("data") if isinstance(listed, dict) else None
    entries = [entry for entry in data if isinstance(entry, dict)] if isinstance(data, list) else []
    models: dict[str, dict[str, Any]] = {}
    for entry in entries:
        models.setdefault(str(entry.get("id")), entry)
    return ServerInfo(models, version, told.headers.get("server", "unknown server"))


def _ask_json(client: LoadClient, address: Address, path: str, needed: bool, headers: Headers) -> tuple[Any, Exchange]:
    """Return the JSON answer of a path, None if there is none, and the exchange.

    Raises ModelError if the server is `needed` but unreachable or wants a key.
    """
    exchange = client.ask(http_request(address, path, headers=headers))
    where = f"the server at {'https' if address.tls else 'http'}://{address.authority}{address.path}"
    if needed and (exchange.fault or not exchange.status):
        raise ModelError(
            f"Cannot reach {where}: {exchange.message or 'it closed the connection.'} {_way_out(exchange.message)}"
        )
    if needed and exchange.status in (401, 403):
        raise ModelError(
            f"{where[0].upper()}{where[1:]} rejects the API key (HTTP {exchange.status}). Set LLMBENCH_API_KEY in the "
            "environment, or give the header that it wants in headers."
        )
    try:
        found = json.loads(b"".join(exchange.parts)) if exchange.status == 200 else None
    except (ValueError, RecursionError):
        found = None
    return found, exchange


def _way_out(message: str) -> str:
    """Return what to do about a connection that failed."""
    lower = message.lower()
    if "certificate_verify_failed" in lower.replace(" ", "_"):
        return "If its certificate is that of a private authority, give the authority's as tls_ca=FILE."
    if "certificate_required" in lower.replace(" ", "_") or "handshake failure" in lower:
        return "If it wants a certificate of the client, give one as tls_cert=FILE."
    if "the proxy" in lower:
        return "Correct HTTPS_PROXY or NO_PROXY, or leave proxy out."
    return "Start it, or correct url."
