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
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from . import machine, memory
from .errors import JournalError, LlmbenchError, MeasurementError, OutOfMemory, WorkerCrashed, WorkerTimeout
from .journal import EventLog, redact_log
from .measure import Measured
from .records import Cell, Divergence, LoadInfo, MemorySample, MemoryStages, ModelFacts, TaskScore, TextScores, from_json, to_json
from .redaction import worker_environment

SAMPLE_S = 0.05
"""Time between two memory samples."""

MOST_SAMPLES = 2000
"""Memory samples that a result keeps; a night at twenty a second would make it unreadable."""

OnEvent = Callable[[Mapping[str, Any]], None]


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
) -> GroupOutcome:
    """Run one job in a fresh process and wait for its end, good or bad: the worker's failure is in `outcome.error`, never raised.

    What it tells is kept in a file beside `log_file`, from which `replay` makes the outcome again; `environment` is kept with it.
    An interruption ends the worker and is told by `outcome.interrupted`, so that what was measured before is not lost.
    `quality` says what is evaluated after the last cell (see `reference.order`).
    """
    outcome = GroupOutcome(environment=environment)
    threads = cells[0].threads or machine.physical_cores()
    job = {"task": task, "cells": to_json(cells), "model": to_json(model), "folders": [str(f) for f in folders], "threads": threads}
    job["quality"] = quality
    failure: LlmbenchError | None = None
    variables = _environment(threads, downloads=task == "prepare" and cells[0].weights != "random")
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with log_file.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow_llmbench.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=variables
        )
    watch = _Watch(process, outcome, limits or Limits(), on_event, watches_memory=cells[0].url is None)
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
        redact_log(log_file)
    if failure:
        outcome.fail(failure)
    elif not outcome.ended and not outcome.interrupted and outcome.error is None:
        outcome.fail(_sudden_end(process.returncode, outcome.stage, log_file))
    return outcome


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
            case "samples":
                outcome.samples += [MemorySample(*sample) for sample in event["samples"]]
            case _:
                outcome.take(event)
    if folders:
        yield folders, outcome


def _environment(threads: int, downloads: bool) -> dict[str, str]:
    """The worker's environment: no secret but what a download needs, as many threads as asked, this package importable, nothing that talks."""
    package_parent = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join([package_parent, *filter(None, [os.environ.get("PYTHONPATH")])])
    quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONUNBUFFERED": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return {
        **worker_environment(os.environ, downloads),
        **quiet,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
    }


@dataclass
class _Watch:
    """Takes a worker's events until it closes its pipe, samples its memory meanwhile, and holds it to its limits."""

    process: subprocess.Popen[bytes]
    outcome: GroupOutcome
    limits: Limits
    on_event: OnEvent | None
    watches_memory: bool = True  # that of a client is not its model's
    told: EventLog | None = None
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
                    if self.watches_memory:
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
            case "evaluating" | "scoring" | "scored" | "compared" | "tasked":
                self._begins("scoring one text", "repetition_timeout_s", self.limits.repetition_s)
        if self.on_event:
            self.on_event(event)

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
        seen = memory.read(self.process.pid)
        if seen is None:
            return
        anonymous = seen.anonymous if seen.anonymous is not None else seen.rss
        self.outcome.samples.append(MemorySample(time.perf_counter_ns(), seen.rss, anonymous))
        needed = anonymous + (self.outcome.load.mapped_weight_bytes if self.outcome.load else 0)
        limit = self.limits.memory_bytes
        if limit is not None and needed > limit:
            raise OutOfMemory(
                f"The worker needed {needed / 1e9:.3f} GB at stage {self.outcome.stage} and was ended there, since {self.limits.memory_limit} is "
                f"{limit / 1e9:.3f} GB. Try a smaller batch_size or quantization."
            )


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


def stages_of(outcome: GroupOutcome, number: int) -> MemoryStages:
    """The five memory stages of one cell of a group; a stage that was not reached, or cannot be read here, is absent."""
    mapped = outcome.load.mapped_weight_bytes if outcome.load else 0
    rss: dict[str, int] = {}
    needed: dict[str, int] = {}
    device: dict[str, int] = {}
    reserved_peak = None
    for stage in ("baseline", "loaded", "unloaded"):
        event = outcome.stages.get(stage)
        if event and event.get("host"):
            rss[stage] = event["host"]["rss"]
            if event["host"]["anonymous"] is not None:
                needed[stage] = event["host"]["anonymous"] + (mapped if stage == "loaded" else 0)
        if event and event.get("device"):
            device[stage] = _device_bytes(event["device"], peak=False)
    cell = outcome.cells.get(number, {})
    peak = cell.get("peak")
    if peak is None and outcome.samples and outcome.error:  # as far as it came, seen from outside twenty times a second
        window = [s for s in outcome.samples if not cell or cell["cell"]["t_ns"] <= s.t_ns]
        rss["peak"] = max((s.rss for s in window), default=outcome.samples[-1].rss)
        needed["peak"] = max((s.anonymous for s in window), default=outcome.samples[-1].anonymous) + mapped
    if peak and peak.get("host"):
        own = peak["host"]
        window = [s for s in outcome.samples if cell["cell"]["t_ns"] <= s.t_ns <= peak["t_ns"]]
        rss["peak"] = max([own["peak_rss"] or own["rss"], *(s.rss for s in window)])
        steady = _steady_samples(window, outcome.measured.get(number))
        rss["steady"] = int(median([s.rss for s in steady])) if steady else own["rss"]
        if own["anonymous"] is not None:
            # Resident peak (exact) less the file pages at the end, for a spike between two samples.
            spike = rss["peak"] - (own["rss"] - own["anonymous"])
            needed["peak"] = max([own["anonymous"], spike, *(s.anonymous for s in window)]) + mapped
            needed["steady"] = (int(median([s.anonymous for s in steady])) if steady else own["anonymous"]) + mapped
    if peak and peak.get("device"):
        device["peak"] = _device_bytes(peak["device"], peak=True)
        device["steady"] = _device_bytes(peak["device"], peak=False)
        reserved_peak = peak["device"]["peak_reserved"]
    return MemoryStages(rss, needed, device, reserved_peak)


def timeline_of(outcome: GroupOutcome, number: int) -> tuple[MemorySample, ...]:
    """Memory samples up to the end of the load and during one cell and after it, thinned to `MOST_SAMPLES`; peaks stay."""
    cell, loaded = outcome.cells.get(number, {}), outcome.stages.get("loaded")
    if "peak" in cell and loaded:
        measured = [s for s in outcome.samples if outcome.evaluated_ns is None or s.t_ns < outcome.evaluated_ns]
        unloading = outcome.samples[-1].t_ns - 1_000_000_000 if outcome.samples else 0
        kept = [s for s in measured if s.t_ns <= loaded["t_ns"] or cell["cell"]["t_ns"] <= s.t_ns <= cell["peak"]["t_ns"] or s.t_ns >= unloading]
    elif cell and loaded:  # it failed: what cells before it needed is not its own
        kept = [s for s in outcome.samples if s.t_ns <= loaded["t_ns"] or s.t_ns >= cell["cell"]["t_ns"]]
    else:
        kept = outcome.samples
    stride = -(-len(kept) // MOST_SAMPLES) or 1
    return tuple(max(kept[i : i + stride], key=lambda s: s.rss) for i in range(0, len(kept), stride))


def _device_bytes(seen: Mapping[str, Any], peak: bool) -> int:
    """What the driver attributes to the process (context and libraries included), else what the allocator holds.

    The driver keeps no peak: it is what lies outside the allocator now, plus the most that the allocator held.
    """
    reserved: int = seen["peak_reserved"] if peak else seen["reserved"]
    if seen["driver"] is None:
        return reserved
    outside: int = max(seen["driver"] - seen["reserved"], 0)
    return outside + reserved


def _steady_samples(window: Sequence[MemorySample], measured: Measured | None) -> list[MemorySample]:
    """Samples in the second half of the last repetition."""
    if measured is None or not measured.repetitions:
        return []
    last = measured.repetitions[-1].requests
    start, end = min(r.t0_ns for r in last), max(r.stamps_ns[-1] for r in last)
    return [s for s in window if (start + end) // 2 <= s.t_ns <= end]
