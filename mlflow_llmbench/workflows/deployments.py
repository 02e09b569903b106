"""Deploy registered versions on this machine: servers that go on after the command, and are found again by name.

A version is served by `mlflow models serve`, which runs it as it was measured, or by the server that `export` knows for
it. Its files are copied first, so that a deployment needs no store while it runs.
"""

from __future__ import annotations

import dataclasses
import os
import re
import secrets
import shlex
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..analysis.decisions.export import export
from ..loadgen import detached_server
from ..loadgen.server_process import SECRETS, find_program, free_port, log_end
from ..records.errors import MeasurementError, MissingError, UsageError
from ..records.invocation import DEPLOYMENT
from ..records.redaction import excerpt, worker_environment
from ..records.text import known_words, rough_duration
from ..system import memory
from ..system.processes import boot_id
from ..system.python_command import SAFE_PATH, module_command, without_ours
from ..tracking import registry
from ..tracking.registry import Registered
from ..tracking.store import open_store
from . import deployed_client, deployment_state
from .deployed_client import Protocol
from .deployment_state import LOG, MODEL, DeployedServer, DeploymentRecord

DELETE = "mlflow deployments delete -t llmbench --name {}"
UPDATE = "mlflow deployments update -t llmbench --name {}"

SETTINGS = {"server": "mlflow", "host": "127.0.0.1", "port": "auto", "timeout_s": "3600", "force": "false"}
"""Setting of a deployment → its default."""

HEALTH_S = 0.5
"""Seconds between two health checks of a starting server."""

TIMEOUT = "MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT"
"""Environment variable of `mlflow models serve`: seconds of a request, which may have to load the model."""


@dataclass(frozen=True)
class Engine:
    """A program that serves a version: its protocol, and its options for host and port."""

    protocol: Protocol
    host: str = "--host"
    port: str = "--port"


ENGINES = {
    "mlflow": Engine("mlflow", "-h", "-p"),
    "vllm": Engine("openai"),
    "sglang": Engine("openai"),
    "llama.cpp": Engine("openai"),
    "tgi": Engine("openai", "--hostname"),
}
"""Value of the setting `server` → how it is started and asked. All but the first are targets of `export`."""


@dataclass(frozen=True)
class ServableVersion:
    """A version that can be started: where it is, its files here, its configuration and requirements."""

    found: Registered
    model: Path
    config: Mapping[str, Any]
    requirements: tuple[str, ...]

    @property
    def uri(self) -> str:
        """Its URI."""
        return self.found.uri

    @property
    def needs_bytes(self) -> int | None:
        """Host memory that it was measured to need; None if that is the device's, or not known."""
        needs = self.config.get("needs") or {}
        peak = needs.get("peak_memory_bytes") if needs.get("memory_of") == "host" else None
        return int(peak) if isinstance(peak, int | float) else None


def create(name: str, version: str, given: Mapping[str, str]) -> DeploymentRecord:
    """Start the server of a registered version under a name, and return when it answers.

    Raises UsageError for a name that is taken, unknown settings, and versions that cannot be served, MeasurementError
    if the server does not start.
    """
    settings = check_settings(given)
    with deployment_state.locked(name):
        if found := deployment_state.read(name):
            again = "" if found.current.runs else f"To start it again: `{UPDATE.format(name)}`. "
            raise UsageError(f"There is a deployment {name} already. {again}To remove it: `{DELETE.format(name)}`.")
        with tempfile.TemporaryDirectory() as scratch:
            prepared = _prepare(version, Path(scratch))
            _require_memory(prepared, settings)
            return DeploymentRecord(name, (_start(name, prepared, settings, ()),))


def update(name: str, version: str | None, given: Mapping[str, str]) -> DeploymentRecord:
    """Let a deployment serve another version, or start its own again, and return when it answers.

    The new server is started beside the old one if memory and port allow, so that one of them always answers. Else the
    old one is ended first, and started again if the new one does not start. Raises what `create` raises.
    """
    with deployment_state.locked(name):
        record = require(name)
        old = record.current
        settings = check_settings({**old.settings, **given})
        for left in record.servers[1:]:  # of an update that was killed
            _end(name, left)
        with tempfile.TemporaryDirectory() as scratch:
            prepared = _prepare(version or old.version, Path(scratch))
            new = _replace(name, old, prepared, settings)
        deployment_state.write(DeploymentRecord(name, (new, old)))  # from here on the new one answers
        _end(name, old)
        record = DeploymentRecord(name, (new,))
        deployment_state.write(record)
        return record


def _replace(name: str, old: DeployedServer, prepared: ServableVersion, settings: Mapping[str, str]) -> DeployedServer:
    """Start a server in place of an old one, which is ended first only if both cannot run at a time."""
    same_port = settings["port"] != "auto" and old.url.endswith(f":{settings['port']}")
    ends_first = old.runs and (same_port or not _fits(prepared))
    if ends_first:
        detached_server.end(old.keeper, old.mark)
    try:
        _require_memory(prepared, settings)
        return _start(name, prepared, settings, (old,))
    except BaseException:
        if ends_first:
            deployment_state.write(DeploymentRecord(name, (_run(name, old),)))
        raise


def delete(name: str) -> None:
    """End a deployment's servers and remove what is kept of it. Nothing happens if there is none.

    Raises MeasurementError for processes that cannot be ended.
    """
    with deployment_state.locked(name):
        try:
            record = deployment_state.read(name)
        except UsageError:  # damaged: its servers are found by their marks
            record = None
        for server in record.servers if record else ():
            _end(name, server)
        for mark in deployment_state.marks(name):
            _require_ended(name, detached_server.end(None, mark))
        deployment_state.remove(name)


def require(name: str) -> DeploymentRecord:
    """Return a deployment. Raises UsageError if there is none of this name."""
    found = deployment_state.read(name)
    if found is None:
        known = deployment_state.names()
        here = known_words(name, known) if known else "There are none on this machine."
        raise UsageError(f"There is no deployment {excerpt(name, 100)}. {here}")
    return found


def version_of(reference: str) -> str:
    """Return the version of `deployments:/NAME`, other references unchanged. Raises UsageError for an unknown name."""
    name = reference.removeprefix(DEPLOYMENT)
    return reference if name == reference else require(name).current.version


def address_of(url: str) -> str:
    """Return the address of `deployments:/NAME`, other addresses unchanged.

    Raises UsageError for a deployment that does not run, or whose server has not OpenAI's interface.
    """
    name = url.removeprefix(DEPLOYMENT)
    if name == url:
        return url
    server = require(name).current
    if ENGINES[server.engine].protocol != "openai":
        raise UsageError(
            f"The deployment {name} is served by MLflow, which has not OpenAI's interface. Deploy it with "
            "-C server=vllm, or another server, to measure it."
        )
    _require_running(name, server)
    return server.url


def _require_running(name: str, server: DeployedServer) -> None:
    if not server.runs:
        raise UsageError(f"The deployment {name} is {status(server)}. Start it again: `{UPDATE.format(name)}`.")


def status(server: DeployedServer) -> str:
    """Return how a server does: `running`, `not answering`, or `stopped` with the reason."""
    if server.runs:
        return "running" if deployed_client.answers(server.url) else "not answering"
    if server.boot != boot_id():
        return "stopped: the machine was started again"
    return "stopped: it ended by itself"


def describe(record: DeploymentRecord) -> dict[str, Any]:
    """Return what is known of a deployment: version, address, health, memory, time since its start, end of its log."""
    server, log = record.current, deployment_state.server_folder(record.name, record.current.mark) / LOG
    held = detached_server.held_memory(server.keeper) if server.runs and server.keeper else None
    return {
        **summary(record),
        "uptime": rough_duration(time.time() - server.begun_s) if held else None,
        "memory_gb": round(held.rss / 1e9, 3) if held else None,
        "measured_memory_gb": server.needs_bytes and round(server.needs_bytes / 1e9, 3),
        "keeper_pid": server.keeper.pid if held and server.keeper else None,
        "command": shlex.join(server.command),
        "log": str(log),
        "log_end": log_end(log),
    }


def summary(record: DeploymentRecord) -> dict[str, Any]:
    """Return name, status, version, kind of server and address of a deployment."""
    server = record.current
    return {
        "name": record.name,
        "status": status(server),
        "version": server.version,
        "flavor": "python_function" if server.engine == "mlflow" else server.engine,
        "url": server.url,
    }


def summaries() -> list[dict[str, Any]]:
    """Return the summaries of all deployments. A damaged one has its name, and as its status why it cannot be read."""
    found = []
    for name in deployment_state.names():
        try:
            record = deployment_state.read(name)
        except UsageError as error:
            found.append({"name": name, "status": f"damaged: {error} To remove it: `{DELETE.format(name)}`."})
        else:
            found += [summary(record)] if record else []
    return found


def predict(name: str, inputs: Any) -> Any:
    """Return a deployment's answers. See `deployed_client.predict`. Raises UsageError if it does not run."""
    server = require(name).current
    _require_running(name, server)
    return deployed_client.predict(server.url, ENGINES[server.engine].protocol, inputs)


def check_settings(given: Mapping[str, str]) -> dict[str, str]:
    """Return the settings of a deployment, complete. Raises UsageError for unknown ones and for wrong values."""
    for name in given:
        if name not in SETTINGS:
            raise UsageError(f"Unknown setting: {excerpt(name, 60)}. {known_words(name, SETTINGS)}")
    settings = {**SETTINGS, **{name: str(value).strip() for name, value in given.items()}}
    if settings["server"] not in ENGINES:
        raise UsageError(
            f"Unknown server: {excerpt(settings['server'], 60)}. {known_words(settings['server'], ENGINES)}"
        )
    if not re.fullmatch(r"[A-Za-z0-9.:-]{1,253}", settings["host"]) or settings["host"].startswith("-"):
        raise UsageError(f"host is not an address: {excerpt(settings['host'], 60)}. Give one such as 127.0.0.1.")
    port = settings["port"]
    if port != "auto" and not (port.isdecimal() and 0 < int(port) < 65536):
        raise UsageError(f"port is not from 1 to 65535: {excerpt(port, 60)}. Give a number, or auto.")
    if not re.fullmatch(r"\d{1,6}(\.\d+)?", settings["timeout_s"]) or float(settings["timeout_s"]) <= 0:
        raise UsageError(f"timeout_s is not a time in seconds: {excerpt(settings['timeout_s'], 60)}. Give 600.")
    if settings["force"] not in ("true", "false"):
        raise UsageError(f"force is neither true nor false: {excerpt(settings['force'], 60)}. Give true or false.")
    return settings


def _prepare(version: str, folder: Path) -> ServableVersion:
    """Copy a version from the registry. Its configuration and code are those that were registered."""
    store = open_store(reads=True)
    found = registry.registered_at(store, version)
    config, requirements = registry.copy_version(store, found, folder)
    if not config.get("engine"):
        raise UsageError(
            f"{found.uri} was measured with backend={config.get('backend')}, and there is nothing to serve. Register a "
            "run of a real model."
        )
    return ServableVersion(found, folder, config, requirements)


def _fits(prepared: ServableVersion) -> bool:
    """Return True if the version is known to fit into the memory that is free now."""
    free = memory.available_bytes()
    return prepared.needs_bytes is not None and free is not None and prepared.needs_bytes <= free


def _require_memory(prepared: ServableVersion, settings: Mapping[str, str]) -> None:
    free, needs = memory.available_bytes(), prepared.needs_bytes
    if settings["force"] == "false" and needs is not None and free is not None and needs > free:
        raise UsageError(
            f"{prepared.uri} was measured to need {needs / 1e9:.3g} GB of memory, and {free / 1e9:.3g} GB are free. "
            "Free memory, or add -C force=true."
        )


def _start(
    name: str,
    prepared: ServableVersion,
    settings: Mapping[str, str],
    others: tuple[DeployedServer, ...],
) -> DeployedServer:
    """Start a new server beside the `others` of a deployment, and wait until its model is loaded.

    It is on record before its process begins, so that nothing is left behind if this command is killed.
    """
    mark = secrets.token_hex(8)
    port = free_port() if settings["port"] == "auto" else _free(settings["host"], int(settings["port"]))
    host = settings["host"] if settings["host"] not in ("0.0.0.0", "::") else "127.0.0.1"
    folder = deployment_state.server_folder(name, mark)
    server = DeployedServer(
        version=prepared.uri,
        engine=settings["server"],
        mark=mark,
        url=f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}",
        boot=boot_id(),
        begun_s=time.time(),
        command=_command(prepared, settings, folder / MODEL, port),
        settings=dict(settings),
        threads=_threads(prepared),
        needs_bytes=prepared.needs_bytes,
    )
    try:
        deployment_state.write(DeploymentRecord(name, (*others, server)))
        shutil.copytree(prepared.model, folder / MODEL)
        server = _run(name, server)
        deployment_state.write(DeploymentRecord(name, (*others, server)))
        _wait(name, server)
        return server
    except BaseException:
        _end(name, server)
        if others:
            deployment_state.write(DeploymentRecord(name, others))
        else:
            deployment_state.remove(name)
        raise


def _free(host: str, port: int) -> int:
    """Return a port on which nothing listens. Raises UsageError if something does."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise UsageError(f"The port {port} of {host} cannot be used: {error.strerror}. Give another port.") from None
    return port


def _run(name: str, server: DeployedServer) -> DeployedServer:
    """Begin the process of a server, and return the server with its keeper."""
    folder = deployment_state.server_folder(name, server.mark)
    keeper = detached_server.start(server.command, folder, folder / LOG, _environment(server), server.mark)
    return dataclasses.replace(server, keeper=keeper, boot=boot_id(), begun_s=time.time())


def _command(prepared: ServableVersion, settings: Mapping[str, str], model: Path, port: int) -> tuple[str, ...]:
    """Return the command of a version's server."""
    engine = ENGINES[settings["server"]]
    where = (engine.host, settings["host"], engine.port, str(port))
    if settings["server"] == "mlflow":
        serve = ("models", "serve", "-m", str(model), "--env-manager", "local", "--workers", "1", *where)
        return (*module_command(sys.executable, "mlflow"), *serve)
    text = export(prepared.config, prepared.requirements, uri=prepared.uri, target=settings["server"])
    lines = [line.removesuffix("\\") for line in text.splitlines() if not line.startswith("#")]
    words = shlex.split(" ".join(lines))
    program = sys.executable if words[0] == "python" else find_program(words[0])
    if program is None:
        raise MissingError(
            f"server={settings['server']} needs the program {words[0]}, which was not found. Install it, or leave "
            "server out."
        )
    return (program, *words[1:], *where)


def _threads(prepared: ServableVersion) -> int | None:
    threads = prepared.config.get("threads")
    return int(threads) if threads else None


def _environment(server: DeployedServer) -> dict[str, str]:
    """Return the server's environment: this one without secrets, but with those of the Hub, and as measured."""
    kept = without_ours(worker_environment(os.environ, downloads=True))
    own = {name: value for name, value in kept.items() if name not in SECRETS}
    own["PATH"] = os.pathsep.join(filter(None, [os.path.dirname(sys.executable), own.get("PATH")]))
    threads = {name: str(server.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if server.threads}
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return {**own, **threads, **quiet, SAFE_PATH: "1", TIMEOUT: "86400", "PYTHONUNBUFFERED": "1"}


def _wait(name: str, server: DeployedServer) -> None:
    """Wait until a server is healthy and has loaded its model. Raises MeasurementError if it ends or takes too long."""
    log = deployment_state.server_folder(name, server.mark) / LOG
    seconds = float(server.settings["timeout_s"])
    deadline = time.monotonic() + seconds
    while True:
        healthy = deployed_client.answers(server.url)
        if not server.runs:
            raise MeasurementError(f"The server of {server.version} ended by itself. {log_end(log)}")
        if healthy:
            break
        if time.monotonic() > deadline:
            raise MeasurementError(
                f"The server of {server.version} did not answer within {seconds:g} s (timeout_s). {log_end(log)}"
            )
        time.sleep(HEALTH_S)
    try:
        left = max(1.0, deadline - time.monotonic())
        deployed_client.load_model(server.url, ENGINES[server.engine].protocol, left)
    except MeasurementError as error:
        raise MeasurementError(
            f"The server of {server.version} does not load its model. {error} {log_end(log)}"
        ) from None


def _end(name: str, server: DeployedServer) -> None:
    """End a server and remove its folder. Raises MeasurementError for processes that cannot be ended."""
    _require_ended(name, detached_server.end(server.keeper if server.runs else None, server.mark))
    deployment_state.remove(name, server)


def _require_ended(name: str, left: Sequence[int]) -> None:
    if left:
        raise MeasurementError(
            f"{len(left)} processes of the deployment {name} cannot be ended: {', '.join(map(str, left[:5]))}. End "
            "them yourself, then delete it again."
        )
