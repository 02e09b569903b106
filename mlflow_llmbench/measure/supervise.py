"""Supervise a worker from its parent: start it, sample its memory, collect its events, and find out how it ended.

While a worker measures, this process sleeps in a select and reads one small /proc file twenty times a second.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import selectors
import shutil
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..backends.parallel import RankMemory, host_of
from ..config.request_fields import variables_of
from ..loadgen.server_process import bounded, log_end, wait_for_end
from ..records.cell import Cell
from ..records.codec import to_json
from ..records.errors import JournalError, LlmbenchError, MeasurementError, OutOfMemory, WorkerCrashed, WorkerTimeout
from ..records.redaction import PROXIES, redact, worker_environment
from ..records.results import MemorySample
from ..system import cpu_time, gpu, memory
from ..system.memory import HostMemory
from . import events, interpreter
from .events import CellAdded, Event, JobBegun, MemorySampled, RanksStarted, Report, ServerLaunched, StageMemory
from .journal import SERVER_LOG, EventLog, redact_log, write_bytes
from .live_load import LiveLoad, live_load
from .outcome import Clock, GroupOutcome
from .task import OFFLOADED, WorkerJob

SAMPLE_S = 0.05
"""Seconds between two samples of memory and CPU time."""

LOADING_SAMPLE_S = 0.01
"""The same while a model is loaded: its peak is short, and no token is timed."""

WAITED_S = 1.0
"""Seconds between two events that tell a display that time passes, while no cell is timed."""

RANK_GRACE_S = 10.0
"""Seconds in which a worker has to say itself that one of its ranks has ended."""

LOOK_S = 2.0
"""Seconds between two searches for the processes of a server while it is measured."""

OF_OPENAI = ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID")
"""Environment variables of OpenAI's own client."""

More = Callable[["GroupOutcome"], tuple[Cell, Path] | None]
"""Chooses the next cell and its folder from the results so far; None if there is none."""

Pause = Callable[["GroupOutcome"], None]
"""Keeps what is measured while the worker waits between two cells."""


@dataclass(frozen=True)
class Limits:
    """Limits of a worker: seconds per step and bytes of host memory. None means no limit."""

    load_s: float | None = None
    first_token_s: float | None = None
    repetition_s: float | None = None
    cell_s: float | None = None
    memory_bytes: int | None = None
    memory_limit: str = "memory_limit"  # name of the memory limit in a message


def run_worker(
    job: WorkerJob,
    log_file: Path,
    report: Report | None = None,
    limits: Limits | None = None,
    environment: Mapping[str, Any] | None = None,
    more: More | None = None,
    pause: Pause | None = None,
    waited: Report | None = None,
) -> GroupOutcome:
    """Run one job in a fresh process and wait for its end. A failure of the worker is in `outcome.error`, never raised.

    Its events and `environment` are written to a file beside `log_file`, from which `replay` can rebuild the outcome.
    An interruption ends the worker and sets `outcome.interrupted`, so that earlier measurements are not lost. With
    `more`, the worker goes on with the cells that `more` chooses from the results so far; their numbers follow those of
    the job's cells. `pause` is called after each cell but the last, and before the quality is evaluated; the worker
    waits until it returns. `waited` gets an event for each second in which no cell is timed, and one for each second of
    a long load on a server.
    """
    clock = Clock.now()
    outcome = GroupOutcome(environment=environment, clock=clock)
    failure: LlmbenchError | None = None
    is_client = job.cells[0].scenario == "online"
    live = live_load(job.cells) if is_client and waited and job.task == "measure" else None
    process = _start(job, log_file, live.variables if live else {})
    watch = _Watch(
        process, outcome, limits or Limits(), report, not is_client, more=more, pause=pause, waited=waited, live=live
    )
    try:
        assert process.stdin
        told = dataclasses.replace(
            job, searches=more is not None, pauses=pause is not None, memory_bytes=watch.limits.memory_bytes
        )
        process.stdin.write(told.to_line().encode())
        process.stdin.flush()
        with EventLog(log_file.with_suffix(".jsonl"), durable=False) as watch.journal:
            names = tuple(folder.name for folder in job.folders)
            watch.journal.append(JobBegun(names, environment, clock.wall_ms, t_ns=clock.t_ns))
            watch.collect()
        process.wait()
    except BrokenPipeError:
        process.wait()
    except MeasurementError as error:
        failure = error
    except KeyboardInterrupt:
        outcome.interrupted = True
        _stop(process)
        watch.drain()
    finally:
        watch.end()
        forget_offloaded(job.folders[:1])
        redact_log(log_file)
        if isinstance(failure, WorkerTimeout) and watch.keeper and outcome.load is None:
            failure = WorkerTimeout(f"{failure} {log_end(job.folders[0] / SERVER_LOG)}")
        _keep_server_log([*job.folders, *watch.added])
    if failure:
        outcome.fail(failure)
    elif not outcome.ended and not outcome.interrupted and outcome.error is None:
        outcome.fail(_sudden_end(process.returncode, outcome.stage, log_file))
    return outcome


def forget_offloaded(folders: Sequence[Path]) -> None:
    """Delete the weights that a worker, which has ended, has written into folders of cells."""
    for folder in folders:
        shutil.rmtree(folder / OFFLOADED, ignore_errors=True)


def _keep_server_log(folders: Sequence[Path]) -> None:
    """Write beginning and end of a server's log, without secrets, to the artifacts of each cell that it served."""
    raw = folders[0] / SERVER_LOG
    with contextlib.suppress(OSError, JournalError):
        if raw.exists():
            text = bounded(raw.read_bytes()).decode(errors="replace")
            for folder in folders:
                write_bytes(folder / "artifacts" / SERVER_LOG, redact(text).encode())
            raw.unlink()


def _start(job: WorkerJob, log_file: Path, own: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a worker that writes to its log, in the interpreter that its first cell names, with `own` variables too."""
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with log_file.open("ab") as log:
        return subprocess.Popen(
            interpreter.worker_command(job.cells[0].worker_python),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**environment_of(job), **own},
        )


def environment_of(job: WorkerJob) -> dict[str, str]:
    """Return the worker's environment variables.

    They hold no secrets except those that a download or a server needs, set the number of threads, make this package
    importable, silence progress bars and telemetry, and let CUDA count GPUs as the driver does. A server to be launched
    inherits them, may download, and chooses its own number of threads and order of GPUs.
    """
    cell = job.cells[0]
    downloads = job.task == "prepare" and cell.weights != "random"
    quiet = {
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        **gpu.PCI_ORDER,
    }
    asked = request_variables(cell)
    for_requests = {name: value for name, value in os.environ.items() if name in asked}
    if cell.launch:
        set_by_us = {name: quiet[name] for name in ("PYTHONUNBUFFERED", "HF_HUB_DISABLE_TELEMETRY")}
        return interpreter.variables(
            None, {**worker_environment(os.environ, downloads=True), **for_requests, **set_by_us}
        )
    counts = {"OMP_NUM_THREADS": str(job.threads), "MKL_NUM_THREADS": str(job.threads)}
    return interpreter.variables(
        cell.worker_python, {**worker_environment(os.environ, downloads), **for_requests, **quiet, **counts}
    )


def request_variables(cell: Cell) -> set[str]:
    """Return the names of the environment variables that requests to a cell's server may need."""
    proxies = {spelling for name in PROXIES for spelling in (name, name.lower())} if cell.proxy else set()
    return {*(OF_OPENAI if cell.url else ()), *variables_of(cell.extra_body, cell.headers), *proxies}


@dataclass
class _Watch:
    """Collect a worker's events until it closes its pipe, sample its memory and CPU time, and enforce its limits."""

    process: subprocess.Popen[bytes]
    outcome: GroupOutcome
    limits: Limits
    report: Report | None
    watches_memory: bool = True  # False for a client, whose memory is not the model's
    journal: EventLog | None = None
    more: More | None = None
    pause: Pause | None = None
    waited: Report | None = None
    live: LiveLoad | None = None
    told: float = 0.0  # when `waited` was last called
    added: list[Path] = field(default_factory=list)  # folders of the cells chosen by `more`
    keeper: int | None = None  # pid of the keeper, the ancestor of all processes of a server that we started
    ranks: tuple[int, ...] = ()  # pids of the worker's other ranks
    rank_gone: float | None = None  # when one of them was first seen to have ended
    pids: list[int] = field(default_factory=list)  # the server's processes when last searched for
    looked: float = 0.0
    cpu_s: dict[int, float] = field(default_factory=dict)  # CPU time of each process at the last sample
    unread: bytes = b""  # beginning of an incomplete line
    lines: deque[bytes] = field(default_factory=deque)  # complete lines that are not processed yet
    doing: tuple[str, str, float | None] = ("", "", None)  # the worker's step, its limit's name, its limit in s
    since: float = 0.0
    cell_since: float | None = None
    written: int = 0  # memory samples already in the journal

    def collect(self) -> None:
        """Collect events until the worker closes its pipe. Raises WorkerTimeout or OutOfMemory beyond a limit."""
        assert self.process.stdout
        pipe = self.process.stdout.fileno()
        self._begins("loading", "load_timeout_s", self.limits.load_s)
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            due = time.monotonic()
            while True:
                ready = selector.select(max(0.0, due - time.monotonic()))
                if time.monotonic() >= due:
                    if self.watches_memory or self.keeper:
                        self._sample()
                    self._check_time()
                    self._tell_time()
                    loading = self.outcome.stage == "loading" and not self.keeper
                    due = time.monotonic() + (LOADING_SAMPLE_S if loading else SAMPLE_S)
                if not ready:
                    continue
                chunk = os.read(pipe, 1 << 20)
                if not chunk:
                    return
                self._split(chunk)
                while self.lines:
                    if event := self._next():
                        self._take(event)

    def end(self) -> None:
        """Stop the worker, and wait for the end of what ends with it."""
        _end(self.process)
        if self.live:
            self.live.close()
        for pid in self.ranks:  # the kernel, or the end of their input, ends them with the worker
            wait_for_end(pid)
        if self.keeper:  # the server ends after its client, in order
            wait_for_end(self.keeper)

    def drain(self) -> None:
        """Read the remaining events of a worker that was interrupted and is gone; they may hold a measured cell."""
        assert self.process.stdout
        with contextlib.suppress(OSError):
            while chunk := os.read(self.process.stdout.fileno(), 1 << 20):
                self._split(chunk)
        while self.lines:
            self._next()

    def _split(self, chunk: bytes) -> None:
        *lines, self.unread = (self.unread + chunk).split(b"\n")
        self.lines.extend(lines)

    def _next(self) -> Event | None:
        """Return the next event; None for one that this version does not know.

        It is added to the outcome before its line is dropped, since an interruption can come between any two steps.
        """
        event = events.decode(self.lines[0])
        if isinstance(event, ServerLaunched):
            self.keeper = event.keeper
        if isinstance(event, RanksStarted):
            self.ranks = event.pids
        if isinstance(event, StageMemory) and self.keeper:
            self.looked = 0.0  # more processes may have been started
        if event:
            self.outcome.take(event)
        self.lines.popleft()
        return event

    def _take(self, event: Event) -> None:
        self._keep(event)
        match event:
            case events.Stage(stage="loading"):
                self._begins("loading", "load_timeout_s", self.limits.load_s)
            case events.CompilationBegun():
                self._begins("compiling", "load_timeout_s", self.limits.load_s)
            case events.CellBegun(number=number) if self.live:
                self.live.turn_to(number)
            case events.MeasuringBegun():
                self.cell_since = time.monotonic()
                self._begins("bringing a first token", "first_token_timeout_s", self.limits.first_token_s)
            case events.CellProgress():
                self._begins("one run of the cell", "repetition_timeout_s", self.limits.repetition_s)
            case events.CellMeasured():
                self.cell_since = None
                self._begins("ending the cell", "load_timeout_s", self.limits.load_s)
            case events.CellRequested():
                self._answer(self.more)
            case events.PauseBegun():
                self._answer(None)
            case (
                events.EvaluationBegun()
                | events.ScoringProgress()
                | events.TextScored()
                | events.WorkloadCompared()
                | events.TaskScored()
            ):
                self._begins("scoring one text", "repetition_timeout_s", self.limits.repetition_s)
        if self.report:
            self.report(event)

    def _answer(self, more: More | None) -> None:
        """Keep what is measured, and answer the waiting worker: the next cell of a search, or null if there is none."""
        if self.pause:
            self.pause(self.outcome)
        found = more(self.outcome) if more else None
        self.added += [found[1]] if found else []
        if found and self.live:
            self.live.cells.append(found[0])
        if found and self.journal:
            self.journal.append(CellAdded(found[1].name))
        line = json.dumps(to_json({"cell": found[0], "folder": str(found[1])} if found else None))
        assert self.process.stdin
        self.process.stdin.write(f"{line}\n".encode())
        self.process.stdin.flush()
        self._begins("going on after a cell", "load_timeout_s", self.limits.load_s)  # the pause was ours

    def _keep(self, event: Event) -> None:
        samples = self.outcome.samples[self.written :]
        self.written = len(self.outcome.samples)
        try:
            if self.journal and samples:
                self.journal.append(MemorySampled.of(samples))
            if self.journal:
                self.journal.append(event)
        except JournalError:  # only needed if this process is killed; the worker's own journal has the measurements
            self.journal = None

    def _begins(self, doing: str, name: str, limit_s: float | None) -> None:
        self.doing, self.since = (doing, name, limit_s), time.monotonic()

    def _check_time(self) -> None:
        checks = [(self.since, *self.doing)]
        if self.cell_since is not None:
            checks.append((self.cell_since, "the whole cell", "cell_timeout_s", self.limits.cell_s))
        for since, doing, name, limit_s in checks:
            if limit_s is not None and time.monotonic() - since > limit_s:
                raise WorkerTimeout(
                    f"The worker was ended at stage {self.outcome.stage}: {doing} took more than {name}={limit_s:g}. "
                    "Try a smaller configuration, or raise the limit."
                )

    def _tell_time(self) -> None:
        """Tell that a second has passed in which no cell was timed, or what is seen of a long load on a server."""
        now = time.monotonic()
        if self.live and self.waited and self.cell_since is not None and (seen := self.live.look(self.since)):
            self.waited(seen)
        if self.waited and self.cell_since is None and now - max(self.told, self.since) >= WAITED_S:
            self.told = now
            self.waited(events.Waited())

    def _sample(self) -> None:
        seen = self._server_memory() if self.keeper else self._worker_memory()
        if seen is None:
            return
        anonymous, now = seen.anonymous if seen.anonymous is not None else seen.rss, time.perf_counter_ns()
        self.outcome.samples.append(MemorySample(now, seen.rss, anonymous, cpus=self._cpus(now)))
        needed = anonymous + (self.outcome.load.mapped_weight_bytes if self.outcome.load else 0)
        limit = self.limits.memory_bytes
        if limit is not None and needed > limit:
            raise OutOfMemory(
                f"The {'server' if self.keeper else 'worker'} needed {needed / 1e9:.3f} GB at stage "
                f"{self.outcome.stage} and was ended there, since {self.limits.memory_limit} is {limit / 1e9:.3f} GB. "
                "Try a smaller batch_size or quantization."
            )

    def _cpus(self, now_ns: int) -> float | None:
        """Mean number of CPUs that the worker, or the server, has used since the last sample; None for the first."""
        pids = self.pids if self.keeper else [self.process.pid, *self.ranks]
        before, self.cpu_s = self.cpu_s, {pid: s for pid in pids if (s := cpu_time.process_s(pid)) is not None}
        used = [s - before[pid] for pid, s in self.cpu_s.items() if pid in before]
        return round(sum(used) / (now_ns - self.outcome.samples[-1].t_ns) * 1e9, 3) if used else None

    def _worker_memory(self) -> HostMemory | None:
        """Read the memory of the worker and its other ranks.

        Raises WorkerCrashed if a rank has ended and the worker, which may wait for it for ever, does not say so itself.
        """
        if not self.ranks:
            return memory.read(self.process.pid)
        read = [memory.read(pid) for pid in (self.process.pid, *self.ranks)]
        if None in read[1:] and read[0]:
            self.rank_gone = self.rank_gone or time.monotonic()
            if self.outcome.stage != "unloaded" and time.monotonic() - self.rank_gone > RANK_GRACE_S:
                raise WorkerCrashed(
                    f"Rank {read.index(None)} of {len(read)} ended at stage {self.outcome.stage}, and the worker "
                    "waited for it. Measure again, or use fewer ranks."
                )
        loads = self.outcome.load.ranks if self.outcome.load else None
        mapped = [one.mapped for one in loads] if loads else [0] * len(read)
        return host_of(tuple(RankMemory(host, mapped=size) for host, size in zip(read, mapped, strict=True)))

    def _server_memory(self) -> HostMemory:
        """Read the memory of a server's processes.

        The processes are searched for after a stage and every `LOOK_S`, since a search takes milliseconds.
        """
        assert self.keeper
        now = time.monotonic()
        if now - self.looked > LOOK_S:
            self.pids, self.looked = memory.descendants(self.keeper), now
        return memory.read_all(self.pids)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Stop the worker and close its pipes."""
    _stop(process)
    for stream in (process.stdin, process.stdout):
        if stream:
            stream.close()


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the worker: TERM, wait up to 2 s, then KILL."""
    for stop in (process.terminate, process.kill):
        if process.poll() is None:
            stop()
            try:
                process.wait(timeout=2)
            except subprocess.TimeoutExpired:
                continue


def _sudden_end(code: int, stage: str, log_file: Path) -> LlmbenchError:
    """Return the error for a worker that ended without reporting its end."""
    if code == -signal.SIGKILL:
        return OutOfMemory(
            f"The worker was killed at stage {stage}, most likely by the kernel because memory ran out. "
            "Try a smaller batch_size or quantization."
        )
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    tail = log_file.read_text(errors="replace").strip().splitlines()[-1:] or ["nothing was printed"]
    return WorkerCrashed(f"The worker ended with {how} at stage {stage}: {tail[0][:200]}. The whole log is {log_file}.")
