"""The parent's side of a worker: start it, watch its memory from outside, collect its events, and know how it ended.

While a worker measures, this process sleeps in a select and reads one small /proc file twenty times a second.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import selectors
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import interpreter, machine, memory
from .cell import Cell
from .errors import JournalError, LlmbenchError, MeasurementError, OutOfMemory, WorkerCrashed, WorkerTimeout
from .journal import SERVER_LOG, EventLog, redact_log, write_bytes
from .measure import Measured
from .memory import HostMemory
from .records import Divergence, LoadInfo, MemorySample, ModelFacts, TaskScore, TextScores, from_json, to_json
from .redaction import redact, worker_environment
from .server_process import bounded, log_end, wait_for_end

SAMPLE_S = 0.05
"""Time between two memory samples."""

LOOK_S = 2.0
"""Time between two searches for the processes of a server while it is measured."""

OnEvent = Callable[[Mapping[str, Any]], None]

More = Callable[["GroupOutcome"], tuple[Cell, Path] | None]
"""Which cell is measured next, and its folder, by what was measured; None for none."""


@dataclass(frozen=True)
class Limits:
    """What a worker may take at most: seconds for each thing that it does, and bytes of host memory. None is no limit."""

    load_s: float | None = None
    first_token_s: float | None = None
    repetition_s: float | None = None
    cell_s: float | None = None
    memory_bytes: int | None = None
    memory_limit: str = "memory_limit"  # how the limit of the memory is called in a message


@dataclass
class GroupOutcome:
    """What one worker left: its load, stage readings, memory samples, and per cell what was measured or why not."""

    load: LoadInfo | None = None
    peaks: dict[str, float] = field(default_factory=dict)
    idle_w: float | None = None
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)  # stage → its event; "peak" is per cell, in `cells`
    samples: list[MemorySample] = field(default_factory=list)
    measured: dict[int, Measured] = field(default_factory=dict)
    texts: dict[int, list[dict[str, str]]] = field(default_factory=dict)
    cells: dict[int, dict[str, Any]] = field(default_factory=dict)  # number → events "cell" and "peak" of that cell
    log: list[str] = field(default_factory=list)
    evaluated_ns: int | None = None  # when the evaluation of the quality began, after the last cell
    text_digest: str = ""  # of the text that is scored
    scores: TextScores | None = None
    divergences: dict[str, Divergence] = field(default_factory=dict)  # workload → beside the reference
    task_scores: dict[str, tuple[TaskScore, ...]] = field(default_factory=dict)  # task of lm-eval as asked → its scores
    withheld: list[str] = field(default_factory=list)  # why a figure of quality is absent
    environment: Mapping[str, Any] | None = None  # of the machine that it ran on, where that is not the command's
    error: LlmbenchError | None = None
    ended: bool = False
    interrupted: bool = False

    @property
    def current(self) -> int | None:
        """Number of the cell that was being measured when the worker ended; None while loading."""
        begun = [n for n in self.cells if n not in self.measured]
        return begun[-1] if begun else None

    @property
    def stage(self) -> str:
        """The last stage that was reached."""
        return list(self.stages)[-1] if self.stages else "starting"

    def fail(self, error: LlmbenchError) -> None:
        """Note why the worker did not come to its end. Once every cell is measured that costs figures of quality, nothing else."""
        if self.evaluated_ns is None:
            self.error = error
        else:
            self.withheld.append(f"The evaluation of the quality ended early: {error}")

    def take(self, event: Mapping[str, Any]) -> None:
        """Add one event of the worker."""
        match event["event"]:
            case "stage" if event["stage"] == "peak":
                self.cells[list(self.cells)[-1]]["peak"] = event
            case "stage" if event["stage"] == "unloaded" and self.evaluated_ns is not None:
                pass  # scoring leaves allocations behind (0.5 GB with LLM.int8): what is held then is not what loading left
            case "stage":
                self.stages[event["stage"]] = dict(event)
            case "launched":  # the server's own beginning, not that of the client
                self.stages["baseline"] = dict(event)
            case "peaks":
                self.peaks, self.idle_w = event["peaks"], event["idle_w"]
            case "load" | "described":
                self.load = from_json(LoadInfo, event["info"])
            case "cell":
                self.cells[event["number"]] = {"cell": event}
            case "measuring":
                self.cells[event["number"]] = {"cell": event}
            case "measured":
                self.measured[event["number"]] = from_json(Measured, event["measured"])
                self.texts[event["number"]] = event["texts"]
            case "failed":
                kind = {"OutOfMemory": OutOfMemory}.get(event["kind"], MeasurementError)
                self.fail(kind(event["message"]))
            case "evaluating":
                self.evaluated_ns, self.text_digest = event["t_ns"], event["digest"]
            case "scored":
                self.scores = from_json(TextScores, event["scores"])
            case "compared":
                self.divergences[event["workload"]] = from_json(Divergence, event["divergence"])
            case "tasked":
                self.task_scores[event["task"]] = tuple(from_json(TaskScore, score) for score in event["scores"])
            case "withheld":
                self.withheld.append(event["message"])
            case "end":
                self.ended, self.log = True, event["log"]


def run_worker(
    task: str,
    cells: Sequence[Cell],
    model: ModelFacts,
    folders: Sequence[Path],
    log_file: Path,
    on_event: OnEvent | None = None,
    limits: Limits | None = None,
    environment: Mapping[str, Any] | None = None,
    quality: Mapping[str, Any] | None = None,
    more: More | None = None,
    training: Mapping[str, Any] | None = None,
) -> GroupOutcome:
    """Run one job in a fresh process and wait for its end, good or bad: the worker's failure is in `outcome.error`, never raised.

    What it tells is kept in a file beside `log_file`, from which `replay` makes the outcome again; `environment` is kept with it.
    An interruption ends the worker and is told by `outcome.interrupted`, so that what was measured before is not lost.
    `quality` says what is evaluated after the last cell (see `reference.order`). With `more` the worker goes on with the cells that it
    chooses by what was measured; they have the numbers after those of `cells`. `training` is the order of a training (see `qat`).
    """
    outcome = GroupOutcome(environment=environment)
    threads = cells[0].threads or machine.physical_cores()
    job = {
        "task": task,
        "cells": to_json(cells),
        "model": to_json(model),
        "folders": [str(f) for f in folders],
        "threads": threads,
    }
    job |= {"quality": quality, "searches": more is not None, "training": training}
    failure: LlmbenchError | None = None
    process = _start(
        cells[0], log_file, _environment(threads, task == "prepare" and cells[0].weights != "random", cells[0])
    )
    watch = _Watch(
        process, outcome, limits or Limits(), on_event, watches_memory=cells[0].scenario != "online", more=more
    )
    try:
        assert process.stdin
        process.stdin.write((json.dumps(job) + "\n").encode())
        process.stdin.flush()
        with EventLog(log_file.with_suffix(".jsonl"), durable=False) as watch.told:
            watch.told.append("job", folders=[folder.name for folder in folders], environment=environment)
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
        _end(process)
        if watch.keeper:  # the server has our life for its own, and a moment more to end in order
            wait_for_end(watch.keeper)
        redact_log(log_file)
        if isinstance(failure, WorkerTimeout) and watch.keeper and outcome.load is None:
            failure = WorkerTimeout(f"{failure} {log_end(folders[0] / SERVER_LOG)}")
        _keep_server_log([*folders, *watch.added])
    if failure:
        outcome.fail(failure)
    elif not outcome.ended and not outcome.interrupted and outcome.error is None:
        outcome.fail(_sudden_end(process.returncode, outcome.stage, log_file))
    return outcome


def _keep_server_log(folders: Sequence[Path]) -> None:
    """Put the beginning and the end of a server's log among the artifacts of each cell that it served, without the secrets in it."""
    raw = folders[0] / SERVER_LOG
    with contextlib.suppress(OSError, JournalError):
        if raw.exists():
            text = bounded(raw.read_bytes()).decode(errors="replace")
            for folder in folders:
                write_bytes(folder / "artifacts" / SERVER_LOG, redact(text).encode())
            raw.unlink()


def replay(events: Iterable[Mapping[str, Any]]) -> Iterator[tuple[list[str], GroupOutcome]]:
    """What each worker of a journal (`worker.jsonl`) told before it, or this program, was killed: the names of its cells' folders, and the outcome."""
    outcome = GroupOutcome()
    folders: list[str] = []
    for event in events:
        match event["event"]:
            case "job":
                if folders:
                    yield folders, outcome
                folders, outcome = event["folders"], GroupOutcome(environment=event.get("environment"))
            case "more":
                folders.append(event["folder"])
            case "samples":
                outcome.samples += [MemorySample(*sample) for sample in event["samples"]]
            case _:
                outcome.take(event)
    if folders:
        yield folders, outcome


def _start(cell: Cell, log_file: Path, variables: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """A worker with its log, in the interpreter that the cell names."""
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with log_file.open("ab") as log:
        return subprocess.Popen(
            [interpreter.command(cell.worker_python), "-m", "mlflow_llmbench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=variables,
        )


def _environment(threads: int, downloads: bool, cell: Cell) -> dict[str, str]:
    """The worker's environment: no secret but what a download or a server needs, as many threads as asked, this package importable, nothing that talks.

    A server that it is to launch inherits it, may download, and has as many threads as it takes by itself.
    """
    quiet = {
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    if cell.launch:
        told = {"PYTHONUNBUFFERED": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        return interpreter.variables(None, {**worker_environment(os.environ, downloads=True), **told})
    key = {name: value for name, value in os.environ.items() if cell.url and name == "OPENAI_API_KEY"}
    counts = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    return interpreter.variables(
        cell.worker_python, {**worker_environment(os.environ, downloads), **key, **quiet, **counts}
    )


@dataclass
class _Watch:
    """Takes a worker's events until it closes its pipe, samples its memory meanwhile, and holds it to its limits."""

    process: subprocess.Popen[bytes]
    outcome: GroupOutcome
    limits: Limits
    on_event: OnEvent | None
    watches_memory: bool = True  # that of a client is not its model's
    told: EventLog | None = None
    more: More | None = None
    added: list[Path] = field(default_factory=list)  # folders of the cells that it has chosen
    keeper: int | None = None  # the process from which those of a server that we started descend
    pids: list[int] = field(default_factory=list)  # the server's, as they were last looked for
    looked: float = 0.0
    unread: bytes = b""  # what has come of a line that has not ended
    lines: deque[bytes] = field(default_factory=deque)  # not taken yet
    doing: tuple[str, str, float | None] = ("", "", None)  # what the worker does, the limit's name, the limit in s
    since: float = 0.0
    cell_since: float | None = None
    written: int = 0  # memory samples that are in the journal

    def collect(self) -> None:
        """Raises WorkerTimeout or OutOfMemory where a limit is passed."""
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
                    due = time.monotonic() + SAMPLE_S
                if not ready:
                    continue
                chunk = os.read(pipe, 1 << 20)
                if not chunk:
                    return
                self._split(chunk)
                while self.lines:
                    self._take(self._next())

    def drain(self) -> None:
        """After an interruption, once the worker is gone: take what it had told and nobody has read, a measured cell perhaps."""
        assert self.process.stdout
        with contextlib.suppress(OSError):
            while chunk := os.read(self.process.stdout.fileno(), 1 << 20):
                self._split(chunk)
        while self.lines:
            self._next()

    def _split(self, chunk: bytes) -> None:
        *lines, self.unread = (self.unread + chunk).split(b"\n")
        self.lines.extend(lines)

    def _next(self) -> dict[str, Any]:
        """The next event, added to the outcome before its line is given up: an interruption can come between any two steps."""
        event: dict[str, Any] = json.loads(self.lines[0])
        if event["event"] == "launched":
            self.keeper = event["keeper"]
        if self.keeper and event["event"] == "stage":
            event["host"] = dataclasses.asdict(self._server_memory(anew=True))
        self.outcome.take(event)
        self.lines.popleft()
        return event

    def _take(self, event: dict[str, Any]) -> None:
        self._keep(event)
        match event["event"]:
            case "stage" if event["stage"] == "loading":
                self._begins("loading", "load_timeout_s", self.limits.load_s)
            case "compiling":
                self._begins("compiling", "load_timeout_s", self.limits.load_s)
            case "measuring":
                self.cell_since = time.monotonic()
                self._begins("bringing a first token", "first_token_timeout_s", self.limits.first_token_s)
            case "first_token" | "warmup" | "repetition":
                self._begins("one run of the cell", "repetition_timeout_s", self.limits.repetition_s)
            case "measured":
                self.cell_since = None
                self._begins("ending the cell", "load_timeout_s", self.limits.load_s)
            case "asks":
                self._answer()
            case "evaluating" | "scoring" | "scored" | "compared" | "tasked":
                self._begins("scoring one text", "repetition_timeout_s", self.limits.repetition_s)
        if self.on_event:
            self.on_event(event)

    def _answer(self) -> None:
        """Tell the worker which cell is next."""
        found = self.more(self.outcome) if self.more else None
        self.added += [found[1]] if found else []
        if found and self.told:
            self.told.append("more", folder=found[1].name)
        line = json.dumps(to_json({"cell": found[0], "folder": str(found[1])} if found else None))
        assert self.process.stdin
        self.process.stdin.write(f"{line}\n".encode())
        self.process.stdin.flush()

    def _keep(self, event: dict[str, Any]) -> None:
        samples = [dataclasses.astuple(sample) for sample in self.outcome.samples[self.written :]]
        self.written = len(self.outcome.samples)
        try:
            if self.told and samples:
                self.told.append("samples", samples=samples)
            if self.told:
                self.told.append(**event)
        except JournalError:  # it serves only where this process is killed; the worker's own journal says what matters
            self.told = None

    def _begins(self, doing: str, name: str, limit_s: float | None) -> None:
        self.doing, self.since = (doing, name, limit_s), time.monotonic()

    def _check_time(self) -> None:
        checks = [(self.since, *self.doing)]
        if self.cell_since is not None:
            checks.append((self.cell_since, "the whole cell", "cell_timeout_s", self.limits.cell_s))
        for since, doing, name, limit_s in checks:
            if limit_s is not None and time.monotonic() - since > limit_s:
                raise WorkerTimeout(
                    f"The worker was ended at stage {self.outcome.stage}: {doing} took more than {name}={limit_s:g}. Try a smaller configuration, or allow it more."
                )

    def _sample(self) -> None:
        seen = self._server_memory() if self.keeper else memory.read(self.process.pid)
        if seen is None:
            return
        anonymous = seen.anonymous if seen.anonymous is not None else seen.rss
        self.outcome.samples.append(MemorySample(time.perf_counter_ns(), seen.rss, anonymous))
        needed = anonymous + (self.outcome.load.mapped_weight_bytes if self.outcome.load else 0)
        limit = self.limits.memory_bytes
        if limit is not None and needed > limit:
            raise OutOfMemory(
                f"The {'server' if self.keeper else 'worker'} needed {needed / 1e9:.3f} GB at stage {self.outcome.stage} and was ended there, since {self.limits.memory_limit} is "
                f"{limit / 1e9:.3f} GB. Try a smaller batch_size or quantization."
            )

    def _server_memory(self, anew: bool = False) -> HostMemory:
        """Memory of a server's processes, which are looked for `anew` at a stage, else now and then: that takes milliseconds."""
        assert self.keeper
        now = time.monotonic()
        if anew or now - self.looked > LOOK_S:
            self.pids, self.looked = memory.descendants(self.keeper), now
        return memory.read_all(self.pids)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Stop the worker and close its pipes."""
    _stop(process)
    for stream in (process.stdin, process.stdout):
        if stream:
            stream.close()


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Make sure that the worker is gone: ask, wait a little, insist."""
    for stop in (process.terminate, process.kill):
        if process.poll() is None:
            stop()
            try:
                process.wait(timeout=2)
            except subprocess.TimeoutExpired:
                continue


def _sudden_end(code: int, stage: str, log_file: Path) -> LlmbenchError:
    """The error for a worker that ended without a word."""
    if code == -signal.SIGKILL:
        return OutOfMemory(
            f"The worker was killed at stage {stage}, most likely by the kernel because memory ran out. Try a smaller batch_size or quantization."
        )
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    tail = log_file.read_text(errors="replace").strip().splitlines()[-1:] or ["nothing was printed"]
    return WorkerCrashed(f"The worker ended with {how} at stage {stage}: {tail[0][:200]}. The whole log is {log_file}.")
