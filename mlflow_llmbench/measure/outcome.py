"""The outcome of a load group, collected from the events of its worker, live or from its journal."""

from __future__ import annotations

import dataclasses
import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from ..backends.base import DeviceMemory
from ..records.errors import LlmbenchError, MeasurementError, OutOfMemory, WorkerCrashed
from ..records.results import (
    CellMeasurements,
    Divergence,
    LoadInfo,
    MemorySample,
    MemoryStages,
    RankStages,
    Repetition,
    TaskScore,
    TextScores,
)
from . import events
from .events import Event, StageMemory

FAILURES = {"OutOfMemory": OutOfMemory, "WorkerCrashed": WorkerCrashed}
"""Name of an error of a worker → its class, where that decides how its cells have ended."""

MOST_SAMPLES = 2000
"""Most memory samples in a result. At twenty a second, a long run would otherwise make it unreadable."""


def stages_of(outcome: GroupOutcome, number: int) -> MemoryStages:
    """Return the memory in bytes of one cell of a group at each stage.

    A stage that was not reached, or cannot be read on this machine, is absent.
    """
    load = outcome.load_of(number)
    mapped = load.mapped_weight_bytes if load else 0
    rss: dict[str, int] = {}
    needed: dict[str, int] = {}
    device: dict[str, int] = {}
    reserved_peak = None
    for stage in ("baseline", "loaded", "unloaded"):
        reached = outcome.stages.get(stage)
        if isinstance(reached, StageMemory) and reached.host:
            rss[stage] = reached.host.rss
            if reached.host.anonymous is not None:
                needed[stage] = reached.host.anonymous + (mapped if stage == "loaded" else 0)
        if isinstance(reached, StageMemory) and reached.device:
            device[stage] = _device_bytes(reached.device, peak=False)
            if stage == "loaded":
                device["loading"] = _device_bytes(reached.device, peak=True)
    if loading := _loading_peak(outcome, mapped):
        rss["loading"], needed["loading"] = loading
    cell = outcome.cells.get(number)
    peak = cell.peak if cell else None
    if peak is None and outcome.samples and outcome.error:  # it failed: use the parent's samples up to then
        window = [s for s in outcome.samples if not cell or cell.begun_ns <= s.t_ns]
        rss["peak"] = max((s.rss for s in window), default=outcome.samples[-1].rss)
        needed["peak"] = max((s.anonymous for s in window), default=outcome.samples[-1].anonymous) + mapped
    if cell and peak and peak.host:
        own = peak.host
        window = _between(outcome.samples, cell.begun_ns, peak.sent_ns)
        rss["peak"] = max([own.peak_rss or own.rss, *(s.rss for s in window)])
        steady = _steady_samples(window, outcome.measured.get(number))
        rss["steady"] = int(median([s.rss for s in steady])) if steady else own.rss
        if own.anonymous is not None:
            # Exact resident peak minus the file pages at the end: catches a spike between two samples.
            spike = rss["peak"] - (own.rss - own.anonymous) if own.peak_rss else 0
            needed["peak"] = max([own.anonymous, spike, *(s.anonymous for s in window)]) + mapped
            needed["steady"] = (int(median([s.anonymous for s in steady])) if steady else own.anonymous) + mapped
    if peak and peak.device:
        device["peak"] = _device_bytes(peak.device, peak=True)
        device["steady"] = _device_bytes(peak.device, peak=False)
        reserved_peak = peak.device.peak_reserved or None  # 0 means that it cannot be read
    return MemoryStages(rss, needed, device, reserved_peak, _rank_stages(outcome, peak))


def _rank_stages(outcome: GroupOutcome, peak: StageMemory | None) -> tuple[RankStages, ...] | None:
    """Return the memory of each of several ranks, where the worker read it; None for a worker without others."""
    reached = [outcome.stages.get(stage) for stage in ("baseline", "loaded", "unloaded")]
    found: list[tuple[dict[str, int], dict[str, int]]] = []
    for one in [*reached, peak]:
        if not isinstance(one, StageMemory):
            continue
        for rank, own in enumerate(one.ranks or ()):
            if rank == len(found):
                found.append(({}, {}))
            needed, device = found[rank]
            if own.host and own.host.anonymous is not None:
                spike = max((own.host.peak_rss or 0) - own.host.rss, 0) if one is peak else 0
                needed[one.stage] = own.host.anonymous + own.mapped + spike
            if own.device:
                device[one.stage] = _device_bytes(own.device, peak=one is peak)
    return tuple(RankStages(needed, device) for needed, device in found) or None


def _loading_peak(outcome: GroupOutcome, mapped: int) -> tuple[int, int] | None:
    """Return the resident and the needed peak of the load in bytes; None if it did not begin or was not seen.

    The resident one is the kernel's where it was reset before the load. For anonymous pages the kernel has none, so it
    is that of the samples. A cast checkpoint is unmapped at the end, so file pages of the end say nothing of the peak.
    """
    begun, loaded = outcome.stages.get("loading"), outcome.stages.get("loaded")
    if begun is None:
        return None
    until = loaded.sent_ns if loaded else None
    window = _between(outcome.samples, begun.sent_ns, until)
    own = loaded.host if isinstance(loaded, StageMemory) else None
    resident = [*(s.rss for s in window), *([own.peak_rss or own.rss] if own else [])]
    anonymous = [*(s.anonymous for s in window), *([own.anonymous or own.rss] if own else [])]
    return (max(resident), max(anonymous) + mapped) if resident else None


def timeline_of(outcome: GroupOutcome, number: int) -> tuple[MemorySample, ...]:
    """Return the memory samples of the load, of one cell and of what follows it, thinned to `MOST_SAMPLES`.

    Each group of neighbouring samples is represented by its largest, so peaks are kept.
    """
    cell, loaded = outcome.cells.get(number), outcome.stages.get("loaded")
    if cell and cell.peak and loaded:
        samples, loaded_ns, peak_ns = outcome.samples, loaded.sent_ns, cell.peak.sent_ns
        last_ns = outcome.evaluated_ns - 1 if outcome.evaluated_ns else None
        unloading = samples[-1].t_ns - 1_000_000_000 if samples else 0  # in a short run, before this cell
        kept = [
            *_between(samples, 0, loaded_ns),
            *_between(samples, max(unloading, loaded_ns + 1), cell.begun_ns - 1),
            *_between(samples, max(cell.begun_ns, loaded_ns + 1), peak_ns),
            *_between(samples, max(unloading, loaded_ns + 1, peak_ns + 1), last_ns),
        ]
    elif cell and loaded:  # it failed: leave out the memory of earlier cells
        kept = [*_between(outcome.samples, 0, loaded.sent_ns), *_between(outcome.samples, cell.begun_ns, None)]
    else:
        kept = outcome.samples
    stride = -(-len(kept) // MOST_SAMPLES) or 1
    return tuple(max(kept[i : i + stride], key=lambda s: s.rss) for i in range(0, len(kept), stride))


def _between(samples: list[MemorySample], begin_ns: int, end_ns: int | None) -> list[MemorySample]:
    """Return the samples from `begin_ns` to `end_ns`, both included; None is the end. Samples are in order of time."""
    begin = bisect_left(samples, begin_ns, key=lambda sample: sample.t_ns)
    end = len(samples) if end_ns is None else bisect_right(samples, end_ns, key=lambda sample: sample.t_ns)
    return samples[begin:end]


def _device_bytes(seen: DeviceMemory, peak: bool) -> int:
    """Return the driver's memory of the process in bytes (context and libraries included), else the allocator's.

    The driver keeps no peak. It is computed as the memory outside the allocator now plus the allocator's peak.
    """
    reserved = seen.peak_reserved if peak else seen.reserved
    return reserved if seen.driver is None else max(seen.driver - seen.reserved, 0) + reserved


def _steady_samples(window: Sequence[MemorySample], measured: CellMeasurements | None) -> list[MemorySample]:
    """Return the samples in the second half of the last repetition."""
    if measured is None or not measured.repetitions:
        return []
    last = measured.repetitions[-1].requests
    start, end = min(r.t0_ns for r in last), max(r.stamps_ns[-1] for r in last)
    return [s for s in window if (start + end) // 2 <= s.t_ns <= end]


@dataclass(frozen=True)
class Clock:
    """The epoch time in ms at a monotonic time in ns, by which monotonic times of the same machine are dated."""

    wall_ms: int
    t_ns: int

    @classmethod
    def now(cls) -> Clock:
        """Read both clocks."""
        return cls(int(time.time() * 1000), time.perf_counter_ns())

    def date_ms(self, t_ns: int) -> int:
        """Return the epoch time in ms of a monotonic time."""
        return self.wall_ms + (t_ns - self.t_ns) // 1_000_000


@dataclass(frozen=True)
class CellSpan:
    """Monotonic times in ns of one cell, and its memory at the end, if it reached that.

    `begun_ns`: its warm-up began · `turned_ns`: the worker turned to it · `ended_ns`: it was measured.
    """

    begun_ns: int
    peak: StageMemory | None = None
    turned_ns: int | None = None
    ended_ns: int | None = None


@dataclass
class GroupOutcome:
    """The outcome of one worker: its load, stage readings, memory samples, and the measurements or the error."""

    load: LoadInfo | None = None
    described: dict[int, LoadInfo] = field(default_factory=dict)  # number → the load as it was after that cell
    peaks: dict[str, float] = field(default_factory=dict)
    idle_w: float | None = None
    stages: dict[str, events.Stage] = field(default_factory=dict)  # stage → its event; "peak" is per cell, in `cells`
    samples: list[MemorySample] = field(default_factory=list)
    measured: dict[int, CellMeasurements] = field(default_factory=dict)
    texts: dict[int, tuple[Mapping[str, str], ...]] = field(default_factory=dict)
    cells: dict[int, CellSpan] = field(default_factory=dict)  # number → its begin and its memory
    log: list[str] = field(default_factory=list)
    evaluated_ns: int | None = None  # start of the quality evaluation, after the last cell
    text_digest: str = ""  # of the scored text
    scores: TextScores | None = None
    divergences: dict[str, Divergence] = field(default_factory=dict)  # workload → divergence from the reference
    task_scores: dict[str, tuple[TaskScore, ...]] = field(default_factory=dict)  # requested lm-eval task → its scores
    withheld: list[str] = field(default_factory=list)  # reasons why quality figures are absent
    nonfinite: str | None = None  # the one of them that says that logits are not finite
    environment: Mapping[str, Any] | None = None  # of the worker's machine, if it is not the command's
    clock: Clock | None = None  # read when the worker was started; None for journals of earlier versions
    error: LlmbenchError | None = None
    ended: bool = False
    interrupted: bool = False

    @property
    def current(self) -> int | None:
        """Number of the cell that was being measured when the worker ended; None if there was none."""
        begun = [n for n in self.cells if n not in self.measured]
        return begun[-1] if begun else None

    def load_of(self, number: int) -> LoadInfo | None:
        """Return the load as it was after a cell, so that later cells change nothing; the newest if it has no own."""
        return self.described.get(number, self.load)

    def dates_ms(self, number: int) -> tuple[int | None, int | None]:
        """Return the epoch times in ms at which the worker began and ended a cell, as far as they are known.

        The first cell of a worker has its start and the load too.
        """
        span = self.cells.get(number)
        if self.clock is None or span is None:
            return (self.clock.wall_ms if self.clock and number == 0 else None), None
        turned = span.begun_ns if span.turned_ns is None else span.turned_ns
        begun = self.clock.wall_ms if number == 0 else self.clock.date_ms(turned)
        return begun, None if span.ended_ns is None else self.clock.date_ms(span.ended_ns)

    @property
    def stage(self) -> str:
        """The last stage reached."""
        return list(self.stages)[-1] if self.stages else "starting"

    def fail(self, error: LlmbenchError) -> None:
        """Record why the worker ended early. Once every cell is measured, only quality figures are lost."""
        if self.evaluated_ns is None:
            self.error = error
        else:
            self.withheld.append(f"The evaluation of the quality ended early: {error}")

    def take(self, event: Event) -> None:
        """Add one event of the worker to the outcome."""
        match event:
            case StageMemory(stage="peak"):
                number = next(reversed(self.cells))
                self.cells[number] = dataclasses.replace(self.cells[number], peak=event)
            case StageMemory(stage="unloaded") if self.evaluated_ns is not None:
                pass  # scoring leaves allocations behind (0.5 GB with LLM.int8), which are not those of the load
            case events.Stage(stage=stage):
                self.stages[stage] = event
            case events.ServerLaunched(host=host):  # the baseline is the server's, not the client's
                self.stages["baseline"] = StageMemory("baseline", host, t_ns=event.t_ns)
            case events.PeaksMeasured(peaks=peaks, idle_w=idle_w):
                self.peaks, self.idle_w = dict(peaks), idle_w
            case events.ModelLoaded(info=info):
                self.load = info
            case events.LoadDescribed(info=info):
                self.load = info
                self.described.setdefault(list(self.measured)[-1] if self.measured else 0, info)
            case events.CellBegun(number=number):
                self.cells[number] = CellSpan(event.sent_ns, turned_ns=event.sent_ns)
            case events.MeasuringBegun(number=number):
                turned = self.cells[number].turned_ns if number in self.cells else None
                self.cells[number] = CellSpan(event.sent_ns, turned_ns=turned)
            case events.CellMeasured(number=number, measured=CellMeasurements() as measured):
                self.measured[number], self.texts[number] = measured, event.texts or ()
                if number in self.cells:
                    self.cells[number] = dataclasses.replace(self.cells[number], ended_ns=event.t_ns)
            case events.JobFailed(kind=kind, message=message):
                self.fail(FAILURES.get(kind, MeasurementError)(message))
            case events.JobEnded(log=log):
                self.ended, self.log = True, list(log)
            case _:
                self._take_quality(event)

    def _take_quality(self, event: Event) -> None:
        match event:
            case events.EvaluationBegun(digest=digest):
                self.evaluated_ns, self.text_digest = event.sent_ns, digest
            case events.TextScored(scores=scores):
                self.scores = scores
            case events.WorkloadCompared(workload=workload, divergence=divergence):
                self.divergences[workload] = divergence
            case events.TaskScored(task=task, scores=task_scores):
                self.task_scores[task] = task_scores
            case events.QualityWithheld(message=message):
                self.withheld.append(message)
                self.nonfinite = message if event.nonfinite else self.nonfinite


def measurements(journal: Iterable[Event]) -> Iterator[CellMeasurements]:
    """Read the measurements of each process that has completed a cell from its own `events.jsonl`."""
    repetitions: list[Repetition] = []
    for event in journal:
        match event:
            case events.RepetitionEnded(number=number, repetition=Repetition() as repetition):
                if number == 1:
                    repetitions = []  # those before belong to a process that was killed
                repetitions.append(repetition)
            case events.CellCompleted(measured=CellMeasurements() as rest):
                yield dataclasses.replace(rest, repetitions=tuple(repetitions))


def replay(journal: Iterable[Event]) -> Iterator[tuple[list[str], GroupOutcome]]:
    """Rebuild the outcome of each worker from its journal (`worker.jsonl`), after it or this program was killed.

    Yields the names of its cells' folders, and the outcome.
    """
    outcome = GroupOutcome()
    folders: list[str] = []
    for event in journal:
        match event:
            case events.JobBegun(environment=environment, wall_ms=wall_ms):
                if folders:
                    yield folders, outcome
                clock = None if wall_ms is None else Clock(wall_ms, event.sent_ns)
                folders, outcome = list(event.folders), GroupOutcome(environment=environment, clock=clock)
            case events.CellAdded(folder=folder):
                folders.append(folder)
            case events.MemorySampled():
                outcome.samples += event.records()
            case _:
                outcome.take(event)
    if folders:
        yield folders, outcome
