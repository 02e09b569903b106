"""Start a server as a child process. It and all its descendants end when this process ends, in whatever way.

A keeper process, `python -m mlflow_llmbench.loadgen.server_process`, stands between this process and the server. It
runs in its own session, so neither Ctrl-C nor a signal to our process group reaches it. It reads from a pipe that the
kernel closes when this process is gone, even if killed. Then it sends TERM to the server's process group, and KILL to
whatever is left after `GRACE_S`. Orphans of the server become the keeper's children (Linux: PR_SET_CHILD_SUBREAPER), so
it also finds those that moved into a session of their own. The keeper of a server that is to go on without us
(`detached_server`) waits for TERM, or for the server's end.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from ..records.errors import MeasurementError, MissingError, UsageError
from ..records.redaction import excerpt, redact
from ..system import machine, memory
from ..system.python_command import module_command, variables, without_ours

GRACE_S = 10.0
"""Seconds that a server has to end by itself before it is killed."""

MAX_LOG_BYTES = 16 << 20
"""Most bytes of a server's log on disk while it runs. A longer log is cut to its beginning and its end."""

HEAD_BYTES, TAIL_BYTES = 1 << 16, 3 << 16
"""Bytes that are kept of the beginning and of the end of a log."""

SECRETS = ("LLMBENCH_API_KEY", "LLMBENCH_TLS_PASSWORD")
"""Environment variables of the client."""

CUT = b"\n[... a part of the log is left out ...]\n"


KEEPER = tuple(module_command(sys.executable, "mlflow_llmbench.loadgen.server_process"))
"""Command that starts a keeper."""


def find_program(program: str) -> str | None:
    """Return the path of a program from PATH, or beside the running interpreter; None if there is none."""
    return shutil.which(program) or shutil.which(program, path=os.path.dirname(sys.executable))


def require_program(program: str) -> str:
    """Return the path of a program from PATH, or beside the running interpreter.

    Raises UsageError if there is none, MissingError if the system is not POSIX.
    """
    if os.name != "posix":
        raise MissingError("launch needs a POSIX system. Start the server yourself, and give url.")
    found = find_program(program)
    if found is None:
        raise UsageError(
            f"launch begins with a program that was not found: {excerpt(program, 100)}. Install it, or give its path."
        )
    return found


def free_port() -> int:
    """Return a port of the loopback interface on which nothing listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class ServerProcess:
    """A server and its keeper. Raises MeasurementError if it cannot be started.

    `hidden`: names of environment variables that are the client's and not the server's.
    """

    def __init__(self, arguments: Sequence[str], log: Path, hidden: Collection[str] = ()) -> None:
        self.log = log
        self.exit_code: int | None = None  # the server's, once it has ended by itself
        self._unread = b""
        self.keeper = subprocess.Popen(
            KEEPER,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=variables(os.environ),
            start_new_session=True,
        )
        order = {"arguments": list(arguments), "log": str(log), "environment": _environment(hidden)}
        assert self.keeper.stdin
        with contextlib.suppress(BrokenPipeError):
            self.keeper.stdin.write(json.dumps(order).encode() + b"\n")
            self.keeper.stdin.flush()
        told = self._hear(None)
        if "pid" not in told:
            self.stop()
            raise MeasurementError(
                f"The server cannot be started: {told.get('failed', 'its keeper ended')}. "
                "Try the command of launch by hand."
            )
        # The server's memory right after its start, as `memory.HostMemory`.
        self.beginning: dict[str, int | None] | None = told["beginning"]

    @property
    def processes(self) -> list[int]:
        """Ids of the server's current processes."""
        return memory.descendants(self.keeper.pid)

    def read_memory(self) -> memory.HostMemory:
        """Return the total memory of the server's current processes; 0 bytes once it has ended."""
        return memory.read_all(self.processes)

    def require_running(self) -> None:
        """Raise MeasurementError with the end of the log if the server has ended by itself. Call between loads."""
        if self.exit_code is None:
            self.exit_code = self._hear(0.0).get("ended")
        if self.exit_code is not None:
            how = (
                f"signal {signal.Signals(-self.exit_code).name}"
                if self.exit_code < 0
                else f"exit code {self.exit_code}"
            )
            raise MeasurementError(f"The server ended by itself, with {how}. {log_end(self.log)}")

    def stop(self) -> None:
        """End the server and all of its processes."""
        for stream in (self.keeper.stdin, self.keeper.stdout):
            if stream:
                with contextlib.suppress(OSError):
                    stream.close()
        try:
            self.keeper.wait(timeout=GRACE_S + 10)
        except subprocess.TimeoutExpired:
            self.keeper.kill()
            self.keeper.wait()

    def _hear(self, timeout_s: float | None) -> dict[str, Any]:
        """Return the keeper's next message, or an empty dict if none arrives within `timeout_s`."""
        assert self.keeper.stdout
        pipe = self.keeper.stdout.fileno()
        while b"\n" not in self._unread:
            if not select.select([pipe], [], [], timeout_s)[0]:
                return {}
            chunk = os.read(pipe, 4096)
            if not chunk:
                return {"failed": "its keeper ended", "ended": 1}
            self._unread += chunk
        line, _, self._unread = self._unread.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        return found


def _environment(hidden: Collection[str]) -> dict[str, str]:
    """Return the server's environment: ours without the client's secrets and what only our own processes need.

    Ours holds no credentials of a store.
    """
    return without_ours({n: value for n, value in os.environ.items() if n not in (*SECRETS, *hidden)})


def log_end(log: Path, lines: int = 6) -> str:
    """Return the last lines of a log as a sentence."""
    with contextlib.suppress(OSError):
        with log.open("rb") as file:
            start = file.seek(max(0, log.stat().st_size - 16384))
            if start:
                file.readline()  # its beginning is not known, so a secret in it would not be recognised
            text = redact(file.read().decode("utf-8", "replace"))
        told = [line.strip()[:300] for line in text.splitlines() if line.strip()]
        if told:
            return f"Its log ends with: {' | '.join(told[-lines:])[-1200:]}"
    return "It printed nothing."


def bounded(data: bytes) -> bytes:
    """Return a log cut to its beginning and its end."""
    return data if len(data) <= HEAD_BYTES + TAIL_BYTES else data[:HEAD_BYTES] + CUT + data[-TAIL_BYTES:]


def bound(log: Path) -> None:
    """Shorten a log that has grown too long. The server appends, so it goes on writing at the new end."""
    with contextlib.suppress(OSError):
        if log.stat().st_size > MAX_LOG_BYTES:
            kept = bounded(log.read_bytes())
            os.truncate(log, 0)
            with log.open("ab") as file:
                file.write(kept)


def wait_for_end(pid: int) -> None:
    """Wait until the keeper of a client that is gone has ended its server, at most `GRACE_S` + 5 seconds."""
    deadline = time.monotonic() + GRACE_S + 5
    while memory.read(pid) is not None and time.monotonic() < deadline:
        time.sleep(0.05)


class _Keeper:
    """The process between us and the server."""

    def __init__(self) -> None:
        self.orders = sys.stdin.fileno()
        self.told = sys.stdout.fileno()
        self.server = 0
        self.ended = False
        self.detached = False

    def read_order(self) -> dict[str, Any]:
        """Return the order: the server's `arguments`, `log` and `environment`, and whether it is `detached`."""
        order: dict[str, Any] = json.loads(self._line())
        self.detached = bool(order.get("detached"))
        return order

    def run(self, order: dict[str, Any]) -> int:
        wakes, wake = os.pipe()
        for end in (wakes, wake):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        for name in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(name, lambda *_: None)
        log = Path(order["log"])
        try:
            with log.open("ab") as out:
                server = subprocess.Popen(
                    order["arguments"],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    env=order["environment"],
                    start_new_session=True,
                    preexec_fn=machine.die_with_parent,
                )
        except OSError as error:
            self._tell(failed=f"{error.strerror}: {order['arguments'][0]}")
            return 1
        self.server = server.pid
        seen = memory.read(server.pid)  # read now: it grows from here on
        self._tell(pid=server.pid, keeper=os.getpid(), beginning=seen and dataclasses.asdict(seen))
        asked, watched = False, [wakes] if self.detached else [self.orders, wakes]
        while not asked:
            ready, _, _ = select.select(watched, [], [], 5.0)
            if wakes in ready:
                asked = signal.SIGTERM in os.read(wakes, 4096)
            self._reap()
            asked = asked or self.orders in ready or (self.detached and self.ended)
            bound(log)
        self._end_all()
        return 0

    def _line(self) -> bytes:
        line = b""
        while not line.endswith(b"\n"):
            byte = os.read(self.orders, 1)
            if not byte:
                raise SystemExit(0)
            line += byte
        return line

    def _tell(self, **what: object) -> None:
        with contextlib.suppress(OSError):
            os.write(self.told, json.dumps(what).encode() + b"\n")

    def _reap(self) -> None:
        """Reap children that have ended: the server, and orphans that it left."""
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                if pid == self.server:
                    self.ended = True
                    self._tell(ended=os.waitstatus_to_exitcode(status))

    def _end_all(self) -> None:
        """Send TERM to the server's group and to what outlives the server, and KILL to what outlives `GRACE_S`."""
        deadline, asked = time.monotonic() + GRACE_S, set[int]()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.server, signal.SIGTERM)
        while left := memory.descendants(os.getpid()):
            late = time.monotonic() > deadline
            for pid in left if late else set(left) - asked if self.ended else ():
                asked.add(pid)
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL if late else signal.SIGTERM)
            time.sleep(0.02)
            self._reap()


def main() -> int:
    """Run one server as ordered on standard input, until standard input closes; a detached one until TERM."""
    for name in (signal.SIGINT, signal.SIGHUP):
        signal.signal(name, lambda *_: None)  # not SIG_IGN, which the server would inherit
    keeper = _Keeper()
    order = keeper.read_order()
    if keeper.detached and os.fork():
        os._exit(0)  # so that nobody has to wait for the keeper
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
    return keeper.run(order)


if __name__ == "__main__":
    sys.exit(main())
