"""Typed events and their codec: every class, journals of earlier versions, lines of later ones, damaged lines."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mlflow_llmbench.backends.base import DeviceMemory
from mlflow_llmbench.backends.parallel import RankMemory
from mlflow_llmbench.measure import events, journal
from mlflow_llmbench.measure.events import Event, Stage, StageMemory, decode, encode, from_data, to_data
from mlflow_llmbench.measure.outcome import GroupOutcome, replay, stages_of, timeline_of
from mlflow_llmbench.records.codec import to_json
from mlflow_llmbench.records.errors import JournalError
from mlflow_llmbench.records.results import (
    CellMeasurements,
    Divergence,
    LoadInfo,
    MemorySample,
    ModelFacts,
    Noise,
    RankLoad,
    Repetition,
    RequestRecord,
    TaskScore,
    TextScores,
    TextTimes,
)
from mlflow_llmbench.system.memory import HostMemory

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "journals"
"""Journals written before events were classes: `worker` and `events` by a sweep of two fake cells, `every` by hand with
every event that then was. `*.outcome.json` is what was read from them then."""

HOST, DEVICE = HostMemory(100, 80, 120), DeviceMemory(10, 20, 30, 45)
REPETITION = Repetition(0, 17, (RequestRecord(10, (20, 30), rows=2, prompt_tokens=4),), Noise(0.5, steal_s=0.0))
MEASURED = CellMeasurements(
    1.5, (0.1,), True, (REPETITION,), (([1, 2], [3]),), (True,), TextTimes((1,), (2,)), 0.25, (3,)
)
EXAMPLES: Sequence[Event] = (
    events.GroupPlaced(node="far"),
    events.GroupBegun(),
    Stage("loading", t_ns=5),
    StageMemory("loaded", HOST, DEVICE, t_ns=6),
    StageMemory("peak", None, None),
    StageMemory("peak", HOST, DEVICE, (RankMemory(HOST, DEVICE), RankMemory(None, mapped=5))),
    events.PeaksMeasured({"read_bytes_per_s": 1e9}, None),
    events.RanksStarted((78, 79)),
    events.ServerLaunched(77, HostMemory(5)),
    events.ModelLoaded(LoadInfo(3.25, facts={"model.dtype": "float16"})),
    events.LoadDescribed(LoadInfo(None)),
    events.LoadDescribed(LoadInfo(None, devices=2, ranks=(RankLoad(4, 2), RankLoad(5)))),
    events.CellBegun(1, t_ns=7, node="far"),
    events.CompilationBegun(),
    events.MeasuringBegun(0),
    events.FirstToken(number_of_cell=2),
    events.WarmupEnded(1, 12, 0.125, number_of_cell=2),
    events.RepetitionEnded(1, 5, REPETITION),
    events.RepetitionEnded(1, 5, number_of_cell=0),
    events.CellMeasured(0, MEASURED, ({"prompt": "Grüße", "output": "zwölf\n"},)),
    events.CellMeasured(0),
    events.CellRequested(),
    events.PauseBegun(),
    events.EvaluationBegun("digest"),
    events.ScoringProgress(1, 3),
    events.ScoringProgress(7),
    events.Waited(),
    events.LoadObserved(10.0, 40, 2, 8, (41.5, 95.25), (900.0, 1200.5), 36),
    events.LoadObserved(3.5, 0, 0, 8, None, None, None),
    events.TextScored(TextScores("t", 9, 4, 2, ((0.5, 0.25),))),
    events.WorkloadCompared("qa", Divergence("r", "d", ((0.1,),), ((True,),))),
    events.TaskScored("arc", (TaskScore("arc", "acc", 0.5, None, 10, "1.0"),)),
    events.QualityWithheld("No reference."),
    events.TrainingPlanned(10, 5, 2, 1000, 8),
    events.TrainingStep(1, 3, 2.5),
    events.CheckpointSaved("/checkpoint"),
    events.ModelResolved(ModelFacts("m", "hub", "owner/m", "abc", config={"a": [1]}, context=64)),
    events.JobFailed("oom", "OutOfMemory", "Memory ran out."),
    events.JobEnded(("lib: a (× 2)",)),
    events.JobBegun(("cell-0", "cell-1"), {"node": "far"}),
    events.JobBegun(("cell-0",)),
    events.CellAdded("cell-2"),
    events.MemorySampled.of([MemorySample(1, 2, 3), MemorySample(4, 5, 6, 7)]),
    events.MemorySampled.of([MemorySample(1, 2, 3), MemorySample(4, 5, 6, 7, 0.0)]),
    events.CellCompleted(True, 1.5),
)


@pytest.mark.parametrize("event", EXAMPLES, ids=lambda event: type(event).__name__)
def test_an_event_comes_back_from_its_line_as_it_was(event: Event) -> None:
    line = encode(event)
    assert "\n" not in line
    again = decode(line)
    assert again == event and type(again) is type(event)
    assert decode(line.encode()) == event


def test_samples_come_back_with_and_without_the_cpus_in_use() -> None:
    for samples in ([MemorySample(1, 2, 3), MemorySample(4, 5, 6, 7, 0.0)], [MemorySample(1, 2, 3)], []):
        again = decode(encode(events.MemorySampled.of(samples)))
        assert isinstance(again, events.MemorySampled) and again.records() == samples
    earlier = decode('{"event": "samples", "samples": [[1, 2, 3, null]]}')
    assert isinstance(earlier, events.MemorySampled) and earlier.records() == [MemorySample(1, 2, 3)]


def test_every_class_has_an_example() -> None:
    classes = {kind for _, kind in inspect.getmembers(events, inspect.isclass) if issubclass(kind, Event)}
    assert {type(event) for event in EXAMPLES} == classes - {Event, events.CellProgress}


def test_events_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        EXAMPLES[0].t_ns = 1  # type: ignore[misc]


# Journals of earlier versions


@pytest.mark.parametrize("name", ["worker", "every", "events"])
def test_old_lines_are_read_and_would_be_written_as_they_are(name: str, tmp_path: Path) -> None:
    old = GOLDEN / f"{name}.jsonl"
    found = list(journal.read_events(old))
    assert len(found) == len(old.read_bytes().splitlines())
    with journal.EventLog(tmp_path / "new.jsonl") as log:
        for event in found:
            log.append(event)
    assert (tmp_path / "new.jsonl").read_bytes() == old.read_bytes()


@pytest.mark.parametrize(
    ("line", "event"),
    [
        ('{"event":"job","folders":["a"]}', events.JobBegun(("a",))),
        ('{"event":"peaks","t_ns":1,"peaks":{"flops_per_s":2.0}}', events.PeaksMeasured({"flops_per_s": 2.0}, t_ns=1)),
    ],
)
def test_lines_of_the_first_versions_lack_fields_that_came_later(line: str, event: Event) -> None:
    assert decode(line) == event


def test_the_line_on_the_pipe_is_that_of_earlier_workers() -> None:
    assert encode(events.WarmupEnded(1, 12, 0.5, number_of_cell=0, t_ns=9)) == (
        '{"event": "warmup", "t_ns": 9, "number_of_cell": 0, "number": 1, "limit": 12, "seconds": 0.5}'
    )
    assert encode(events.JobEnded(("é",), t_ns=9)) == '{"event": "end", "t_ns": 9, "log": ["\\u00e9"]}'
    assert encode(StageMemory("loaded", HostMemory(1), None, t_ns=9)) == (
        '{"event": "stage", "t_ns": 9, "stage": "loaded", '
        '"host": {"rss": 1, "anonymous": null, "peak_rss": null}, "device": null}'
    )
    assert encode(Stage("loading", t_ns=9)) == '{"event": "stage", "t_ns": 9, "stage": "loading"}'


@pytest.mark.parametrize("name", ["worker", "every"])
def test_an_old_journal_is_replayed_to_the_same_outcome(name: str) -> None:
    """Compare everything that a result is made of with what the code that wrote the journal made of it."""
    found = [summary(folders, outcome) for folders, outcome in replay(journal.read_events(GOLDEN / f"{name}.jsonl"))]
    expected = json.loads((GOLDEN / f"{name}.outcome.json").read_text(encoding="utf-8"))
    assert json.loads(json.dumps(found)) == expected


def summary(folders: Sequence[str], outcome: GroupOutcome) -> dict[str, Any]:
    numbers, first = sorted(outcome.cells), outcome.cells[0]
    names = (
        "load",
        "peaks",
        "idle_w",
        "samples",
        "measured",
        "texts",
        "log",
        "evaluated_ns",
        "text_digest",
        "scores",
        "divergences",
        "task_scores",
        "withheld",
        "environment",
        "ended",
        "current",
        "stage",
    )
    return {
        "folders": folders,
        **{name: to_json(getattr(outcome, name)) for name in names},
        "stages": list(outcome.stages),
        "marks": {
            **{stage: event.sent_ns for stage, event in outcome.stages.items()},
            "measuring": first.begun_ns,
            **({"peak": first.peak.sent_ns} if first.peak else {}),
        },
        "error": str(outcome.error) if outcome.error else None,
        "memory": [to_json(stages_of(outcome, number)) for number in numbers],
        "timeline": [to_json(timeline_of(outcome, number)) for number in numbers],
    }


# Lines of later versions, and damaged ones


def test_events_of_later_versions_are_skipped(tmp_path: Path) -> None:
    file = tmp_path / "worker.jsonl"
    file.write_text('{"event":"of 2031","t_ns":1,"x":[]}\n{"event":"more","folder":"b"}\n{"event":"of 2032"}\n')
    assert list(journal.read_events(file)) == [events.CellAdded("b")]
    assert decode('{"event": "of 2031"}') is None


@pytest.mark.parametrize("event", EXAMPLES, ids=lambda event: type(event).__name__)
def test_fields_of_later_versions_are_ignored(event: Event) -> None:
    assert from_data({**to_data(event), "of_a_later_version": {"x": 1}}) == event


def test_fields_of_later_versions_in_a_record_are_ignored() -> None:
    data = to_data(StageMemory("loaded", HOST, DEVICE))
    data["host"]["swapped"] = 5
    assert from_data(data) == StageMemory("loaded", HOST, DEVICE)


@pytest.mark.parametrize(
    "line",
    [
        '{"event": "warmup", "number": 1',
        '{"event": "warmup", "number": 1}',
        '{"number": 1}',
        '{"event": "load", "info": "fast"}',
        '{"event": "load", "info": {"weight_bytes": 1}}',
        '{"event": ["stage"]}',
        "[1, 2]",
        "7",
        "\x00\x00",
    ],
)
def test_a_damaged_line_is_an_error_but_at_the_end_of_an_interrupted_journal(line: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"This is no event: |The event warmup lacks a field: "):
        decode(line)
    whole = encode(events.CellAdded("a"))
    file = tmp_path / "worker.jsonl"
    file.write_text(f"{whole}\n{line}\n{whole}\n")
    with pytest.raises(JournalError, match=r"worker\.jsonl, line 2, is damaged"):
        list(journal.read_events(file))
    file.write_text(f"{whole}\n{line}")
    assert list(journal.read_events(file)) == [events.CellAdded("a")]


def test_an_event_that_needs_a_time_and_has_none_is_named() -> None:
    with pytest.raises(JournalError, match="The event cell has no time t_ns"):
        GroupOutcome().take(events.CellBegun(0))
