"""A server that we start: the process and all that descends from it, which end with us, however we end.

Between us and the server stands a keeper, `python -m mlflow_llmbench.server_process`, in a session of its own, where neither
Ctrl-C nor a signal to our group reaches it. It reads from a pipe of ours, which the kernel closes when we are gone, killed or not; then it
asks the server's process group to end (TERM), and after `GRACE_S` ends what is left (KILL). Orphans of the server become its
children (PR_SET_CHILD_SUBREAPER of Linux), so that none is lost by going into a session of its own.
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import machine, memory
from .errors import MeasurementError, MissingError, UsageError

GRACE_S = 10.0
"""Seconds that a server has for its own ending before it is killed."""

MOST_LOG_BYTES = 16 << 20
"""Bytes of a server's log on the disk while it runs; what is more is given up, but for its beginning."""

HEAD_BYTES, TAIL_BYTES = 1 << 16, 3 << 16
"""Beginning and end of a log that are kept."""

CUT = b"\n[... a part of the log is left out ...]\n"


KEEPER = ("-m", "mlflow_llmbench.server_process")
"""What the interpreter runs as a keeper."""


def require_program(program: str) -> str:
    """The path of a program, from PATH or beside the interpreter that runs us. Raises UsageError or MissingError, one line."""
    if os.name != "posix":
        raise MissingError("launch needs a POSIX system. Start the server yourself, and give url.")
    found = shutil.which(program) or shutil.which(program, path=os.path.dirname(sys.executable))
    if found is None:
        raise UsageError(
            f"launch begins with a program that is not there: {program[:100]}. Install it, or give its path."
        )
    return found


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class ServerProcess:
    """A server and its keeper. Raises MeasurementError if it cannot be started."""

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        self.log = log
        self.exit_code: int | None = None  # of the server, once it has ended by itself
        self._unread = b""
        package_parent = str(Path(__file__).resolve().parent.parent)
        path = os.pathsep.join([package_parent, *filter(None, [os.environ.get("PYTHONPATH")])])
        self.keeper = subprocess.Popen(
            [sys.executable, *KEEPER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,
        )
        order = {"arguments": list(arguments), "log": str(log), "environment": _environment(package_parent)}
        assert self.keeper.stdin
        with contextlib.suppress(BrokenPipeError):
            self.keeper.stdin.write(json.dumps(order).encode() + b"\n")
            self.keeper.stdin.flush()
        told = self._hear(None)
        if "pid" not in told:
            self.stop()
            raise MeasurementError(
                f"The server cannot be started: {told.get('failed', 'its keeper ended')}. Try the command of launch by hand."
            )
        self.beginning: dict[str, int | None] | None = told[
            "beginning"
        ]  # its memory when it had just been started, as `memory.HostMemory`

    @property
    def processes(self) -> list[int]:
        """The server's processes now."""
        return memory.descendants(self.keeper.pid)

    def require_running(self) -> None:
        """Raises MeasurementError, with the end of its log, if the server has ended by itself; asked between loads."""
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
        """What the keeper says within a time; empty if nothing."""
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


def _environment(package_parent: str) -> dict[str, str]:
    """The server's variables: ours, which have no credentials of a store, without the client's key and the path to this package."""
    variables = {name: value for name, value in os.environ.items() if name not in ("LLMBENCH_API_KEY", "PYTHONPATH")}
    path = os.environ.get("PYTHONPATH", "").removeprefix(package_parent).lstrip(os.pathsep)
    return variables | ({"PYTHONPATH": path} if path else {})


def log_end(log: Path, lines: int = 6) -> str:
    """The last lines of a log as a sentence."""
    with contextlib.suppress(OSError):
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 4096))
            told = [line.strip()[:300] for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
        if told:
            return f"Its log ends with: {' | '.join(told[-lines:])[-1200:]}"
    return "It printed nothing."


def bounded(data: bytes) -> bytes:
    """A log as it is kept: its beginning and its end."""
    return data if len(data) <= HEAD_BYTES + TAIL_BYTES else data[:HEAD_BYTES] + CUT + data[-TAIL_BYTES:]


def bound(log: Path) -> None:
    """Keep a log that has grown too long from filling the disk. The server goes on writing at its end, since it appends."""
    with contextlib.suppress(OSError):
        if log.stat().st_size > MOST_LOG_BYTES:
            kept = bounded(log.read_bytes())
            os.truncate(log, 0)
            with log.open("ab") as file:
                file.write(kept)


def wait_for_end(pid: int) -> None:
    """Wait until the keeper of a client that is gone has ended its server, for a time that is more than it takes."""
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

    def run(self) -> int:
        order = json.loads(self._line())
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
        seen = memory.read(server.pid)  # at once: it grows from now on
        self._tell(pid=server.pid, beginning=seen and dataclasses.asdict(seen))
        asked = False
        while not asked:
            ready, _, _ = select.select([self.orders, wakes], [], [], 5.0)
            if wakes in ready:
                asked = signal.SIGTERM in os.read(wakes, 4096)
            self._reap()
            asked = asked or self.orders in ready
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
        """Take note of children that have ended: the server, and orphans that it left."""
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                if pid == self.server:
                    self.ended = True
                    self._tell(ended=os.waitstatus_to_exitcode(status))

    def _end_all(self) -> None:
        """Ask the server's group to end; what outlives the server is asked too, and what outlives `GRACE_S` is killed."""
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
    """Keep one server, as ordered on standard input, until that ends."""
    for name in (signal.SIGINT, signal.SIGHUP):
        signal.signal(name, lambda *_: None)  # not ignored: that would be inherited
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
    return _Keeper().run()


if __name__ == "__main__":
    sys.exit(main())
