"""Divide one load among several client processes on one clock."""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...loadgen.client import Load, Trace, merge
from ...records.cell import Cell
from ...records.errors import MeasurementError
from ...system.python_command import module_command, variables

HEAD_START_NS = 20_000_000
"""Nanoseconds from the last process's ready message to the common start, which each process must read in time."""


@dataclass(frozen=True)
class Share:
    """The part of a load that process `index` of `count` sends.

    The users of a closed loop, or the requests of an open loop, are dealt to the processes in turns. Request j of a
    process has the number (j div m) · U + index + count · (j mod m) in the whole load, where U is the number of users
    and m the number that this process has. An open loop has one user per process.
    """

    load: Load
    index: int
    count: int
    users: int
    own: int

    @classmethod
    def of(cls, load: Load, index: int, count: int) -> Share:
        """Return the share of a process. `count` is at most the number of users, or of requests of an open loop."""
        if load.arrivals_ns is not None:
            return cls(replace(load, arrivals_ns=load.arrivals_ns[index::count], requests=None), index, count, count, 1)
        own = len(range(index, load.concurrency, count))
        limit = (
            None
            if load.requests is None
            else sum(number % load.concurrency % count == index for number in range(load.requests))
        )
        return cls(replace(load, concurrency=own, requests=limit), index, count, load.concurrency, own)

    def number(self, position: int) -> int:
        """Return the number, in the whole load, of this process's request at a position."""
        return position // self.own * self.users + self.index + self.count * (position % self.own)


@dataclass(frozen=True)
class ClientTask:
    """A task of a client process: its share of a cell's load, and the backend's findings about the server (`state`)."""

    first: Cell
    cell: Cell
    repetition: int
    share: Share
    expected: int | None
    state: Mapping[str, Any]


class ClientProcesses:
    """The client processes. They are started once and serve all later loads of the same number of processes."""

    def __init__(self, count: int) -> None:
        command = module_command(sys.executable, "mlflow_llmbench.backends.openai.client_worker")
        self.processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=variables(os.environ))
            for _ in range(count)
        ]

    def send(self, tasks: Sequence[ClientTask]) -> Trace:
        """Send all shares of a load at once, wait for the last answer. Raises MeasurementError if a process fails."""
        for process, task in zip(self.processes, tasks, strict=True):
            self._tell(process, task)
        for process in self.processes:
            self._hear(process)
        start = time.perf_counter_ns() + HEAD_START_NS
        for process in self.processes:
            self._tell(process, start)
        return merge([self._hear(process) for process in self.processes])

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            for stream in (process.stdin, process.stdout):
                if stream:
                    with contextlib.suppress(OSError):
                        stream.close()
            process.kill()
            process.wait()

    def _tell(self, process: subprocess.Popen[bytes], what: object) -> None:
        assert process.stdin
        try:
            pickle.dump(what, process.stdin)
            process.stdin.flush()
        except OSError:
            raise self._lost(process) from None

    def _hear(self, process: subprocess.Popen[bytes]) -> Any:
        assert process.stdout
        try:
            found = pickle.load(process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            raise self._lost(process) from None
        if isinstance(found, str):
            raise MeasurementError(f"A client process failed: {found}. Check the worker's log.")
        return found

    def _lost(self, process: subprocess.Popen[bytes]) -> MeasurementError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=2)
        return MeasurementError(
            f"A client process ended without a message (exit code {process.returncode}). Check the worker's log and "
            "the free memory."
        )
