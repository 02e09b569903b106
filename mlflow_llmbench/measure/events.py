"""Events of a measurement: one frozen dataclass for each, and the codec of their JSON lines.

A worker sends events to its parent. The parent adds its own, passes them to the display, and writes those of the worker
to `worker.jsonl`; the worker writes warm-ups and repetitions to `events.jsonl`. Readers dispatch on the class.

A line is a JSON object: the event's name, then its fields in the order of their declaration. To add an event, declare
its class here. A line written by an earlier version stays readable if each new field has a default.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..analysis.repetitions import output_rate
from ..backends.base import DeviceMemory
from ..backends.parallel import RankMemory
from ..records.codec import from_json, to_json
from ..records.errors import JournalError
from ..records.noise import OMITTED
from ..records.reading import parse_json
from ..records.results import (
    CellMeasurements,
    Divergence,
    LoadInfo,
    MemorySample,
    ModelFacts,
    Repetition,
    TaskScore,
    TextScores,
)
from ..system.memory import HostMemory

_CLASSES: dict[str, list[type[Event]]] = {}
"""Name in a line → its classes, a class with more fields before the one that it extends."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """Base of all events.

    `t_ns`: monotonic time at which a worker sent it · `node`: name of the cluster's node from which it came. Both are
    None where there is no worker, or no cluster.
    """

    name: ClassVar[str]
    t_ns: int | None = field(default=None, metadata=OMITTED)
    node: str | None = field(default=None, metadata=OMITTED)

    def __init_subclass__(cls, name: str = "") -> None:
        super().__init_subclass__()
        if name:
            cls.name = name
            _CLASSES.setdefault(name, []).insert(0, cls)

    @property
    def sent_ns(self) -> int:
        """`t_ns` of an event that a worker sent. Raises JournalError if it has none."""
        if self.t_ns is None:
            raise JournalError(f"The event {self.name} has no time t_ns. Measure the cell again with rerun=true.")
        return self.t_ns


Report = Callable[[Event], None]
"""Receiver of events: sends them to the parent, shows them, or keeps them."""


# A load group


@dataclass(frozen=True)
class GroupPlaced(Event, name="placed"):
    """A node of a cluster has taken the group."""


@dataclass(frozen=True)
class GroupBegun(Event, name="begun"):
    """The model's files are there, and the measurement of the group begins."""


@dataclass(frozen=True)
class Stage(Event, name="stage"):
    """A stage begins, such as *preparing*, *reference*, *starting*, *loading*, *training*."""

    stage: str


@dataclass(frozen=True)
class StageMemory(Stage, name="stage"):
    """A memory stage is reached: *baseline*, *loaded*, *peak*, *unloaded*. None for memory that cannot be read.

    `ranks`: memory of each of several ranks by itself, which `host` and `device` have together.
    """

    host: HostMemory | None
    device: DeviceMemory | None = None
    ranks: tuple[RankMemory, ...] | None = field(default=None, metadata=OMITTED)


@dataclass(frozen=True)
class PeaksMeasured(Event, name="peaks"):
    """Best rates of the device (see `Backend.peaks`), and its power in watts before the load."""

    peaks: Mapping[str, float]
    idle_w: float | None = None


@dataclass(frozen=True)
class RanksStarted(Event, name="ranks"):
    """The other ranks of a model run, with these process ids."""

    pids: tuple[int, ...]


@dataclass(frozen=True)
class ServerLaunched(Event, name="launched"):
    """A server process was started. `keeper`: PID of its parent · `host`: its memory before it loaded the model."""

    keeper: int
    host: HostMemory | None


@dataclass(frozen=True)
class ModelLoaded(Event, name="load"):
    """The model is loaded."""

    info: LoadInfo


@dataclass(frozen=True)
class LoadDescribed(Event, name="described"):
    """Properties of the loaded model, complete after a cell was measured."""

    info: LoadInfo


@dataclass(frozen=True)
class Waited(Event, name="waited"):
    """Another second has passed in which no cell was timed. The supervisor makes it, for displays; it is never sent."""


@dataclass(frozen=True)
class LoadObserved(Event, name="load_observed"):
    """The last `seconds` of a load that is still sent to a server. The supervisor makes it, for displays.

    `requests` ended, of which `failed` did not succeed; `in_flight` are under way. `ttft_ms` and `e2e_ms`: median and
    95th percentile of those that succeeded, None without any. `good`: requests that met the limits, None without
    limits. Answers are not parsed yet: the first bytes stand for the first token, and the length is the requested one.
    """

    seconds: float
    requests: int
    failed: int
    in_flight: int
    ttft_ms: tuple[float, float] | None
    e2e_ms: tuple[float, float] | None
    good: int | None


# One cell. `number` counts the cells of a group from 0.


@dataclass(frozen=True)
class CellBegun(Event, name="cell"):
    """The worker has turned to a cell."""

    number: int


@dataclass(frozen=True)
class CompilationBegun(Event, name="compiling"):
    """The decode step is being compiled for the cell's shape."""


@dataclass(frozen=True)
class MeasuringBegun(Event, name="measuring"):
    """The warm-up of a cell begins, and with it its clock and its memory peak."""

    number: int


@dataclass(frozen=True)
class CellProgress(Event):
    """Base of the events between two runs of a cell. `number_of_cell` is set when a worker sends them."""

    number_of_cell: int | None = field(default=None, kw_only=True, metadata=OMITTED)

    def of_cell(self, number: int) -> CellProgress:
        """Return the event as a worker sends it, without raw data, which the worker has written already."""
        return dataclasses.replace(self, number_of_cell=number)


ReportProgress = Callable[[CellProgress], None]
"""Receiver of a cell's progress, called between timed regions; only `FirstToken` comes during a warm-up."""


@dataclass(frozen=True)
class FirstToken(CellProgress, name="first_token"):
    """The first token of the first warm-up has arrived."""


@dataclass(frozen=True)
class WarmupEnded(CellProgress, name="warmup"):
    """Warm-up `number` (from 1) of at most `limit` has ended. `until_steady`: they go on until their times agree."""

    number: int
    limit: int
    seconds: float
    until_steady: bool | None = field(default=None, metadata=OMITTED)


@dataclass(frozen=True)
class RepetitionEnded(CellProgress, name="repetition"):
    """Repetition `number` (from 1) of at most `limit` has ended. `repetition` is only in the worker's own journal.

    `tokens_per_s`: output tokens per second of all rows, in the event that a worker sends.
    """

    number: int
    limit: int
    repetition: Repetition | None = field(default=None, metadata=OMITTED)
    tokens_per_s: float | None = field(default=None, metadata=OMITTED)

    def of_cell(self, number: int) -> CellProgress:
        """Return the event as a worker sends it, without raw data, which the worker has written already."""
        rate = output_rate(self.repetition) if self.repetition and self.repetition.requests else None
        return dataclasses.replace(self, number_of_cell=number, repetition=None, tokens_per_s=rate)


@dataclass(frozen=True)
class CellMeasured(Event, name="measured"):
    """A cell is measured. `texts`: prompt and output of each of its texts. None where only the progress is reported."""

    number: int
    measured: CellMeasurements | None = field(default=None, metadata=OMITTED)
    texts: tuple[Mapping[str, str], ...] | None = field(default=None, metadata=OMITTED)


@dataclass(frozen=True)
class CellRequested(Event, name="asks"):
    """The worker waits for the next cell of a search. What is measured is kept meanwhile."""


@dataclass(frozen=True)
class PauseBegun(Event, name="pause"):
    """A cell is measured and its group goes on. The worker waits for an answer while the cell is kept."""


# Quality


@dataclass(frozen=True)
class EvaluationBegun(Event, name="evaluating"):
    """Every cell is measured, and the evaluation of the quality begins. `digest`: of the text to score."""

    digest: str


@dataclass(frozen=True)
class ScoringProgress(Event, name="scoring"):
    """Text, prompt or model call `number` (from 1) of `limit` begins. None if their count is unknown."""

    number: int
    limit: int | None = field(default=None, metadata=OMITTED)


@dataclass(frozen=True)
class TextScored(Event, name="scored"):
    """The text is scored."""

    scores: TextScores


@dataclass(frozen=True)
class WorkloadCompared(Event, name="compared"):
    """The model is compared with the reference of a workload."""

    workload: str
    divergence: Divergence


@dataclass(frozen=True)
class TaskScored(Event, name="tasked"):
    """A task of lm-eval has its scores."""

    task: str
    scores: tuple[TaskScore, ...]


@dataclass(frozen=True)
class QualityWithheld(Event, name="withheld"):
    """A quality figure will be absent, for the reason in the message; `nonfinite` if logits are not finite."""

    message: str
    nonfinite: bool | None = field(default=None, metadata=OMITTED)


# Training


@dataclass(frozen=True)
class TrainingPlanned(Event, name="planned"):
    """All checks have passed. Parameters trained and frozen, quantized layers, needed bytes, sequences of the data."""

    trained: int
    frozen: int
    layers: int
    needed: int
    sequences: int


@dataclass(frozen=True)
class TrainingStep(Event, name="step"):
    """Step `number` (from 1) of `limit` is done, with the mean loss of its batch."""

    number: int
    limit: int
    loss: float


@dataclass(frozen=True)
class CheckpointSaved(Event, name="saved"):
    """The trained checkpoint is complete in its folder."""

    folder: str


# The end of a worker, and its answer about a model


@dataclass(frozen=True)
class ModelResolved(Event, name="resolved"):
    """The facts of the model, as another interpreter's backend resolves it."""

    model: ModelFacts


@dataclass(frozen=True)
class JobFailed(Event, name="failed"):
    """The job failed. `outcome`: its word in the vocabulary · `kind`: name of the error's class."""

    outcome: str
    kind: str
    message: str


@dataclass(frozen=True)
class JobEnded(Event, name="end"):
    """The worker ends in order. `log`: messages of libraries, each once with its count."""

    log: tuple[str, ...]


# Lines that only a journal has


@dataclass(frozen=True)
class JobBegun(Event, name="job"):
    """A worker was started. `folders`: names of its cells' folders · `environment`: of its machine, if not ours.

    `wall_ms`: epoch time in ms at the monotonic time `t_ns`; absent in journals of earlier versions.
    """

    folders: tuple[str, ...]
    environment: Mapping[str, Any] | None = None
    wall_ms: int | None = field(default=None, metadata=OMITTED)


@dataclass(frozen=True)
class CellAdded(Event, name="more"):
    """A search added a cell, with the name of its folder."""

    folder: str


@dataclass(frozen=True)
class MemorySampled(Event, name="samples"):
    """Samples since the last ones: rows of time in ns and resident, anonymous and device bytes, and the CPUs in use."""

    samples: tuple[tuple[int, int, int, int | None], ...]
    cpus: tuple[float | None, ...] | None = field(default=None, metadata=OMITTED)

    @classmethod
    def of(cls, samples: typing.Iterable[MemorySample]) -> MemorySampled:
        """Make the event of these samples."""
        taken = tuple(samples)
        rows = tuple((one.t_ns, one.rss, one.anonymous, one.device) for one in taken)
        return cls(rows, tuple(one.cpus for one in taken) if any(one.cpus is not None for one in taken) else None)

    def records(self) -> list[MemorySample]:
        """Return the samples."""
        cpus = self.cpus or (None,) * len(self.samples)
        return [MemorySample(*row, cpus=used) for row, used in zip(self.samples, cpus, strict=True)]


@dataclass(frozen=True)
class CellCompleted(Event, name="complete"):
    """The worker's own journal of a cell is complete.

    `measured` is that of `CellMeasured`, but the repetitions stand in the lines before this one. The texts are left
    out: only the parent knows which secrets it must mask in them.
    """

    steady: bool
    first_call_ms: float
    measured: CellMeasurements | None = field(default=None, metadata=OMITTED)


# The codec


def to_data(event: Event) -> dict[str, Any]:
    """Return the JSON object of an event's line."""
    data: dict[str, Any] = {"event": event.name}
    for own in dataclasses.fields(event):
        value = getattr(event, own.name)
        if value is not None or not own.metadata.get("omitted"):
            data[own.name] = to_json(value)
    return data


def from_data(data: Any) -> Event | None:
    """Return the event of a JSON object, or None for an event of a later version, of which this one knows nothing.

    Fields of later versions are ignored. Raises ValueError if the object is no event or lacks a field.
    """
    try:
        classes = _CLASSES.get(data["event"], [])
        fitting = [kind for kind in classes if _required(kind) <= data.keys()]
        if classes and not fitting:
            raise ValueError(f"The event {data['event']} lacks a field: {', '.join(_required(classes[-1]))}.")
        return from_json(fitting[0], data) if fitting else None
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"This is no event: {str(data)[:80]}.") from error


def _required(kind: type[Event]) -> set[str]:
    return {own.name for own in dataclasses.fields(kind) if own.default is dataclasses.MISSING}


def encode(event: Event) -> str:
    """Return the line of an event, without its newline."""
    return json.dumps(to_data(event))


def decode(line: str | bytes) -> Event | None:
    """Return the event of a line; None for an event of a later version. Raises ValueError for a damaged line."""
    try:
        data = parse_json(line, surrogates=True)
    except ValueError as error:
        raise ValueError(f"This is no event: {line[:80]!r}.") from error
    return from_data(data)
