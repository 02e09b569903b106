"""Lead the other ranks of a sharded model: start their processes, hand them our calls, and notice when one ends.

A call goes to the ranks as one line of JSON on their standard input. A rank that is about to make it answers, waits
for the others in a barrier, makes the call, and answers again. It ends when its standard input closes, and on Linux at
once when this process ends, however that happens.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ...records import errors
from ...records.cell import Cell
from ...records.codec import to_json
from ...records.errors import LlmbenchError, MeasurementError, WorkerCrashed
from ...records.results import ModelFacts
from ...system import memory
from ...system.python_command import module_command, safe
from ..base import DeviceMemory
from ..parallel import RankMemory
from . import sharding

MODULE = "mlflow_llmbench.backends.huggingface.rank"

GRACE_S = 2.0
"""Seconds that a rank gets to end by itself."""


class Ranks:
    """The processes of ranks 1 and above. Their calls and ours are the same, in the same order."""

    def __init__(self, cell: Cell, model: ModelFacts) -> None:
        self.cell, self.model, self.count = cell, model, cell.tensor_parallel
        self.folder = Path(tempfile.mkdtemp(prefix="llmbench-ranks-"))
        self.processes: list[subprocess.Popen[bytes]] = []
        self._unanswered = 0  # answers that each rank still owes
        self._begun = False
        self._failure: LlmbenchError | None = None

    @property
    def store(self) -> Path:
        """File by which the ranks find each other."""
        return self.folder / "store"

    def start(self) -> tuple[int, ...]:
        """Start the processes, wait until their libraries are imported, and return their ids."""
        threads = sharding.threads_of(self.cell)
        counts = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        for rank in range(1, self.count):
            process = subprocess.Popen(
                module_command(sys.executable, MODULE),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=safe({**os.environ, **counts}),
            )
            self.processes.append(process)
            self._write(rank, {"cell": to_json(self.cell), "model": to_json(self.model), "rank": rank,
                               "store": str(self.store)})  # fmt: skip
        self._unanswered = 1
        self.answers()
        return tuple(process.pid for process in self.processes)

    def ask(self, name: str, *arguments: Any) -> None:
        """Let each rank call a function of `rank.CALLS`; `answers` waits for what they return."""
        self.answers()
        for rank in range(1, self.count):
            self._write(rank, [name, *arguments])
        self._unanswered = 1

    def answers(self) -> list[Any]:
        """Wait for the ranks' last answers and return them. Raises MeasurementError if a rank failed or has ended."""
        found: list[Any] = []
        if self._failure:
            raise self._failure
        while self._unanswered:
            found = [self._read(rank) for rank in range(1, self.count)]
            self._unanswered -= 1
        return found

    def device_memory(self, reset: bool = False) -> list[DeviceMemory | None]:
        """Return the device memory of each rank; `reset` starts a new peak."""
        self.ask("device_memory", reset)
        return [None if one is None else DeviceMemory(**one) for one in self.answers()]

    def memory(self, device: DeviceMemory | None, parts: Sequence[sharding.Part]) -> tuple[RankMemory, ...]:
        """Return the memory of all ranks: of this process, whose device memory is given, and of the others.

        `parts` are those of the model that they hold, in the same order; empty without a model.
        """
        self.answers()
        hosts = [memory.read(), *(memory.read(process.pid) for process in self.processes)]
        devices = [device, *(self.device_memory() if device else [None] * len(self.processes))]
        mapped = [memory.union_bytes(part.mapped) for part in parts] or [0] * self.count
        return tuple(map(RankMemory, hosts, devices, mapped))

    def begin(self, name: str, *arguments: Any) -> None:
        """Hand a call in which ranks meet to each of them, and return together with all that are about to make it."""
        self.ask(name, *arguments)
        self.answers()
        self._unanswered, self._begun = 1, True
        with self._blamed():
            sharding.meet()

    @contextlib.contextmanager
    def together(self, name: str, *arguments: Any) -> Iterator[None]:
        """Make a call in this process that the other ranks make too; `begin` may have handed it to them already."""
        if not self._begun:
            self.begin(name, *arguments)
        self._begun = False
        with self._blamed():
            yield

    @contextlib.contextmanager
    def _blamed(self) -> Iterator[None]:
        """Raise the error of the rank that made a call fail here, if one did. The ranks are then out of step."""
        try:
            yield
        except Exception as error:
            own = error if isinstance(error, LlmbenchError) else MeasurementError(errors.first_line(error))
            self._failure = self._ended() or own
            raise self._failure from error

    def _write(self, rank: int, data: Any) -> None:
        pipe = self.processes[rank - 1].stdin
        assert pipe
        try:
            pipe.write(json.dumps(data).encode() + b"\n")
            pipe.flush()
        except OSError:
            self._failure = self._ended() or WorkerCrashed(f"Rank {rank} of {self.count} takes no more calls.")
            raise self._failure from None

    def _read(self, rank: int) -> Any:
        pipe = self.processes[rank - 1].stdout
        assert pipe
        line = pipe.readline()
        answer = json.loads(line) if line.endswith(b"\n") else None
        if answer is None or "failed" in answer:
            self._failure = self._error_of(rank, answer)
            raise self._failure
        return answer["answer"]

    def _error_of(self, rank: int, answer: Any) -> LlmbenchError:
        """Return the error that a rank reported, or the one that says how it ended."""
        if answer:
            kind = getattr(errors, answer["failed"], MeasurementError)
            text = f"Rank {rank} of {self.count}: {answer['message']}"
            return kind(text) if issubclass(kind, LlmbenchError) else MeasurementError(text)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.processes[rank - 1].wait(timeout=GRACE_S)
        return WorkerCrashed(_how(rank, self.count, self.processes[rank - 1].poll()))

    def _ended(self) -> LlmbenchError | None:
        """Return the error of the first rank that has ended, or ends within a moment; None if all go on."""
        for rank, process in enumerate(self.processes, 1):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=GRACE_S / len(self.processes))
            if process.poll() is not None and process.stdout:
                lines = [json.loads(line) for line in process.stdout.read().splitlines()]
                return self._error_of(rank, next((line for line in lines if "failed" in line), None))
        return None

    def forget_store(self) -> None:
        """Delete the file by which the ranks found each other, so that nothing is left of a worker that is killed.

        Only with gloo, which has connected all ranks by then; NCCL may connect them later.
        """
        if not sharding.connects_later():
            shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """End all ranks: close their standard input, and kill those that go on, perhaps in a collective."""
        for process in self.processes:
            with contextlib.suppress(OSError):
                if process.stdin:
                    process.stdin.close()
        for process in self.processes:
            try:
                process.wait(timeout=0 if self._failure else GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout:
                process.stdout.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        if not self._failure:
            sharding.leave()


def _how(rank: int, count: int, code: int | None) -> str:
    if code is not None and code < 0:
        how = f"ended with signal {signal.Signals(-code).name}"
        how += ", perhaps because memory ran out" if -code == signal.SIGKILL else ""
    else:
        how = "closed its pipe" if code is None else f"ended with exit code {code}"
    return f"Rank {rank} of {count} {how}. Measure again, or use fewer ranks; its messages are in the worker's log."
