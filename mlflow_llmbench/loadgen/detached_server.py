"""Servers that go on after the command that started them, and that can be found and ended later.

The keeper of such a server (see `server_process`) is nobody's child. It is known by its process id and the time at
which it began, which no later process shares. All processes of a server have a mark in their environment, by which they
are found if the keeper was killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..records.errors import MeasurementError
from ..system import memory, processes
from ..system.python_command import variables
from .server_process import GRACE_S, KEEPER, log_end

MARK = "LLMBENCH_DEPLOYMENT"
"""Environment variable with the mark of a server."""

STARTED_WITHIN_S = 1.0
"""Most seconds by which two readings of one process's beginning differ."""


@dataclass(frozen=True)
class Keeper:
    """A keeper process: its id, and when it began (s after the machine was started)."""

    pid: int
    began_s: float

    @property
    def is_alive(self) -> bool:
        """Return True if this process still runs, and is not another one with its id."""
        began = processes.began(self.pid)
        return began is not None and abs(began - self.began_s) < STARTED_WITHIN_S


def start(arguments: Sequence[str], folder: Path, log: Path, environment: Mapping[str, str], mark: str) -> Keeper:
    """Start a server in a folder and return its keeper. Raises MeasurementError if it cannot be started."""
    starter = subprocess.Popen(
        KEEPER,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=variables({**environment, MARK: mark}),
        cwd=folder,
        start_new_session=True,
    )
    order = {
        "arguments": list(arguments),
        "log": str(log),
        "environment": {**environment, MARK: mark},
        "detached": True,
    }
    assert starter.stdin and starter.stdout
    with starter.stdin, starter.stdout:
        with contextlib.suppress(BrokenPipeError):
            starter.stdin.write(json.dumps(order).encode() + b"\n")
            starter.stdin.flush()
        line = starter.stdout.readline()
    starter.wait()
    told = json.loads(line) if line.endswith(b"\n") else {}
    began = processes.began(told["keeper"]) if "keeper" in told else None
    if began is None:
        raise MeasurementError(
            f"The server cannot be started: {told.get('failed', 'its keeper ended')}. {log_end(log)}"
        )
    return Keeper(told["keeper"], began)


def end(keeper: Keeper | None, mark: str) -> list[int]:
    """End a server and all its processes. Return the ids of those that could not be ended."""
    if keeper and keeper.is_alive:
        with contextlib.suppress(ProcessLookupError):
            os.kill(keeper.pid, signal.SIGTERM)
        deadline = time.monotonic() + GRACE_S + 5
        while keeper.is_alive and time.monotonic() < deadline:
            time.sleep(0.05)
    left = marked(mark)
    deadline = time.monotonic() + GRACE_S
    while left and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
        left = marked(mark)
    return left


def marked(mark: str) -> list[int]:
    """Return the ids of running processes with this mark."""
    return processes.with_variable(MARK, mark)


def held_memory(keeper: Keeper) -> memory.HostMemory:
    """Return the memory of a server's processes."""
    return memory.read_all(memory.descendants(keeper.pid))
