"""Deployments on this machine as they are kept on the disk: one folder each, with the servers of the deployment."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..loadgen.detached_server import Keeper
from ..records import reading
from ..records.errors import JournalError, MissingError, UsageError
from ..records.reading import Unreadable
from ..records.redaction import excerpt
from ..system.machine import replace_text
from ..system.processes import boot_id

STATE = "state.json"
LOG = "server.log"
MODEL = "model"
_MARK = re.compile("[0-9a-f]{16}")


@dataclass(frozen=True)
class DeployedServer:
    """A server of a deployment.

    `version`: URI of the registered version · `engine`: program that serves it, a key of `deployments.ENGINES` ·
    `mark`: its own, which names its folder too · `boot`: of the machine, when it was started · `command`: arguments of
    its process · `threads`: those of the measurement · `needs_bytes`: host memory that the version was measured to
    need, None if it is the device's or not known · `keeper`: None before it was started.
    """

    version: str
    engine: str
    mark: str
    url: str
    boot: str
    begun_s: float
    command: tuple[str, ...]
    settings: dict[str, str]
    threads: int | None = None
    needs_bytes: int | None = None
    keeper: Keeper | None = None

    @property
    def runs(self) -> bool:
        """Return True if its keeper runs, since this start of the machine."""
        return self.keeper is not None and self.boot == boot_id() and self.keeper.is_alive


@dataclass(frozen=True)
class DeploymentRecord:
    """A deployment: its name, and its servers. The first one answers; others are left of an update."""

    name: str
    servers: tuple[DeployedServer, ...]

    @property
    def current(self) -> DeployedServer:
        """The server that answers."""
        return self.servers[0]


def state_folder() -> Path:
    """Return the folder of all deployments: `$XDG_STATE_HOME/mlflow-llmbench/deployments`, or in ~/.local/state."""
    root = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    return root / "mlflow-llmbench" / "deployments"


def folder_of(name: str) -> Path:
    """Return the folder of a deployment. Raises UsageError if its name could not be that of a folder."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,99}", name, re.ASCII):
        raise UsageError(
            f"Not a name for a deployment: {excerpt(name, 100)}. Give letters, digits, dots and dashes, such as "
            "support-bot."
        )
    return state_folder() / name


def server_folder(name: str, mark: str) -> Path:
    """Return the folder of a server of a deployment: its model and its log."""
    return folder_of(name) / mark


def names() -> list[str]:
    """Return the names of all deployments."""
    try:
        return sorted(path.parent.name for path in state_folder().glob(f"*/{STATE}"))
    except OSError:
        return []


def marks(name: str) -> list[str]:
    """Return the marks of a deployment's servers that have a folder."""
    try:
        return [path.name for path in folder_of(name).iterdir() if _MARK.fullmatch(path.name)]
    except OSError:
        return []


def read(name: str) -> DeploymentRecord | None:
    """Return a deployment, None if there is none of this name. Raises UsageError if its record is damaged."""
    file = folder_of(name) / STATE
    if not file.exists():
        return None
    try:
        data = reading.read_own_json(file)
        servers = tuple(_server(one) for one in data["servers"])
        if not servers:
            raise Unreadable("it has no server")
        return DeploymentRecord(name, servers)
    except (Unreadable, KeyError, TypeError, AttributeError, ValueError) as error:
        told = error if isinstance(error, Unreadable) else "it has another form than this release writes"
        raise UsageError(f"The record of the deployment {name} cannot be read: {told}. Its file is {file}.") from None


def write(record: DeploymentRecord) -> None:
    """Write a deployment whole or not at all. Raises JournalError."""
    data = {"format": 1, "servers": [dataclasses.asdict(server) for server in record.servers]}
    file = folder_of(record.name) / STATE
    try:
        replace_text(file, json.dumps(data, indent=2))
    except OSError as error:
        raise JournalError(f"Cannot write {file}: {error.strerror}. Free space, or set XDG_STATE_HOME.") from None


def remove(name: str, server: DeployedServer | None = None) -> None:
    """Remove what is on the disk of a server of a deployment, or of the whole deployment."""
    shutil.rmtree(server_folder(name, server.mark) if server else folder_of(name), ignore_errors=True)


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold a deployment for one command.

    Raises UsageError if another one changes it now, JournalError if it cannot be written, MissingError if the system is
    not POSIX.
    """
    if os.name != "posix":
        raise MissingError("Deployments need a POSIX system. Serve the version by `mlflow models serve`.")
    import fcntl

    folder_of(name)
    file = state_folder() / f".{name}.lock"
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(file, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise JournalError(f"Cannot write {file}: {error.strerror}. Free space, or set XDG_STATE_HOME.") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UsageError(f"Another command is changing the deployment {name}. Wait for its end.") from None
    finally:
        os.close(handle)


def _server(data: dict[str, Any]) -> DeployedServer:
    known = {one.name: data[one.name] for one in dataclasses.fields(DeployedServer)}
    keeper = known["keeper"]
    known["keeper"] = Keeper(int(keeper["pid"]), float(keeper["began_s"])) if keeper else None
    found = DeployedServer(**{**known, "command": tuple(known["command"]), "settings": dict(known["settings"])})
    texts = (found.version, found.engine, found.mark, found.url, found.boot, *found.command)
    if not all(isinstance(text, str) for text in texts) or not _MARK.fullmatch(found.mark):
        raise Unreadable("it has another form than this release writes")
    return found
