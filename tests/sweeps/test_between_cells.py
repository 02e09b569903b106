"""What is kept between the cells of a group, while its worker waits, and what its end adds."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from mlflow_llmbench import run
from mlflow_llmbench.backends.fake import FakeBackend
from mlflow_llmbench.config.spec import parse
from mlflow_llmbench.measure import journal
from mlflow_llmbench.measure.events import CellBegun, EvaluationBegun, Event, PauseBegun
from mlflow_llmbench.measure.outcome import GroupOutcome, replay
from mlflow_llmbench.measure.supervise import run_worker
from mlflow_llmbench.measure.task import Task, WorkerJob
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.redaction import redact_all
from mlflow_llmbench.records.results import RunResult
from mlflow_llmbench.sweeps import run_recorder, sweep
from mlflow_llmbench.sweeps.executor import OnEvent, OnPause
from mlflow_llmbench.sweeps.job import read_job
from mlflow_llmbench.sweeps.local_executor import LocalExecutor
from mlflow_llmbench.sweeps.planning import plan
from mlflow_llmbench.sweeps.progress import NullListener
from mlflow_llmbench.sweeps.results import measured_result
from mlflow_llmbench.sweeps.sweep import SweepResult
from mlflow_llmbench.sweeps.upload import read_sweep, upload
from mlflow_llmbench.tracking import runs as tracked

CELL = {"backend": "fake", "output_tokens": 6, "prompt_tokens": 4, "repetitions": 5, "warmup": 1}
LAST = "unloaded"


class At(NullListener):
    """Calls a function when an event comes for the first time: while a later cell is being measured."""

    def __init__(self, kind: type[Event], number: int | None, then: Callable[[], None]) -> None:
        self.kind, self.number, self.then, self.seen = kind, number, then, False

    def event(self, event: Event) -> None:
        if isinstance(event, self.kind) and getattr(event, "number", None) == self.number and not self.seen:
            self.seen = True
            self.then()


def measure(watcher: NullListener, **parameters: Any) -> SweepResult:
    return run(**{**CELL, "model": "fake:ttft_ms=1+itl_ms=1", **parameters}, progress=watcher)


def children(uri: str) -> dict[str, Run]:
    """The runs of the cells by their names, without the model."""
    client = MlflowClient(uri)
    found = client.search_runs([one.experiment_id for one in client.search_experiments()])
    return {str(one.info.run_name).partition(" ")[2]: one for one in found if "llmbench.cell" in one.data.tags}


def kept() -> list[RunResult]:
    return [journal.read_result(file.parent) for file in Path().glob("llmbench-results/*/*/artifacts/result.json")]


def test_results_and_figures_are_there_while_a_later_cell_is_measured(store_uri: str) -> None:
    seen: dict[str, Any] = {}

    def look() -> None:
        seen["files"] = [
            json.loads(one.read_text()) for one in Path().glob("llmbench-results/*/*/artifacts/result.json")
        ]
        seen["runs"] = children(store_uri)

    done = measure(At(CellBegun, 2, look), batch_size="1,2,3")
    assert done.exit_code == 0
    assert sorted(one["cell"]["batch_size"] for one in seen["files"]) == [2, 3]
    assert all(one["incomplete"] and not one["timeline"] for one in seen["files"])
    early, whole = seen["runs"], children(store_uri)
    assert {name: one.info.status for name, one in early.items()} == dict.fromkeys(("b2", "b3"), "RUNNING")
    for name, one in early.items():
        assert one.data.metrics["trust/repetitions"] == 5
        assert "come with the end of the group" in one.data.tags["mlflow.note.content"]
        assert not {"llmbench.outcome", "llmbench.verdict", "llmbench.uploaded"} & one.data.tags.keys()
        assert one.data.metrics.items() <= whole[name].data.metrics.items()
    assert {one.info.status for one in whole.values()} == {"FINISHED"} and len(whole) == 3
    assert "come with the end" not in "".join(one.data.tags["mlflow.note.content"] for one in whole.values())


def test_a_result_is_in_the_end_what_the_whole_group_says(store_uri: str) -> None:
    """The journal of the ended worker gives the same results, and no figure has been uploaded with two values."""
    done = measure(NullListener(), batch_size="1,2")
    spec, known = read_sweep(done.folder)
    [log] = done.folder.glob("*/worker.jsonl")
    [(names, outcome)] = replay(journal.read_events(log))
    for number, name in enumerate(names):
        job = read_job(done.folder / name)
        job.attempts = [(outcome, number)]
        result = journal.read_result(job.folder / "artifacts")
        assert result == redact_all(measured_result(job, spec, known["environment"]))
        assert result.timeline and LAST in result.memory.host_rss and result.incomplete is None
    client = MlflowClient(store_uri)
    for one in children(store_uri).values():
        assert any(key.endswith(LAST) for key in one.data.metrics)
        for key in one.data.metrics:
            steps = [point.step for point in client.get_metric_history(one.info.run_id, key)]
            assert len(steps) == len(set(steps)), key


def test_what_a_killed_command_has_kept_between_cells_is_completed(
    store_uri: str, store_template: Path, tmp_path: Path
) -> None:
    """A copy of the folder while the last cell is measured is what a kill leaves."""

    def copy() -> None:
        [folder] = Path("llmbench-results").glob("*")
        shutil.copytree(folder, tmp_path / "killed" / folder.name)

    measure(At(CellBegun, 1, copy), batch_size="1,2")
    [folder] = (tmp_path / "killed").glob("*")
    [early] = folder.glob("*/artifacts")
    assert journal.read_result(early).incomplete
    shutil.copy(store_template, tmp_path / "elsewhere.db")
    elsewhere = f"sqlite:///{tmp_path}/elsewhere.db"
    upload(str(folder), elsewhere)
    result = journal.read_result(early)
    assert result.incomplete is None and result.timeline
    outcomes = {name: one.data.tags["llmbench.outcome"] for name, one in children(elsewhere).items()}
    assert outcomes == {"b2": "ok", "b1": "crashed"}


@pytest.mark.parametrize("where", ["the next cell", "the upload"])
def test_an_interruption_leaves_whole_what_was_kept_between_cells(
    store_uri: str, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    if where == "the upload":
        monkeypatch.setattr(tracked, "upload_figures", interrupt)
    done = measure(At(CellBegun, 1, interrupt), batch_size="1,2")
    assert done.outcome == "interrupted"
    first = children(store_uri)["b2"]
    assert (first.info.status, first.data.tags["llmbench.outcome"]) == ("FINISHED", "ok")
    assert first.data.metrics["trust/repetitions"] == 5
    assert [one.incomplete for one in kept() if one.outcome == "ok"] == [None]


def test_an_error_of_our_own_leaves_whole_what_was_kept_between_cells(store_uri: str) -> None:
    def fail() -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        measure(At(CellBegun, 1, fail), batch_size="1,2")
    found = {name: (one.info.status, one.data.tags["llmbench.outcome"]) for name, one in children(store_uri).items()}
    assert found == {"b2": ("FINISHED", "ok"), "b1": ("FAILED", "error")}
    assert [one.incomplete for one in kept()] == [None, None]


def test_a_store_that_is_not_quick_gets_the_later_cells_at_the_end(
    store_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every upload counts as slow here, so that only the first is tried between cells."""
    for name in ("QUICK_S", "QUICK_SHARE", "QUICK_REQUESTS"):
        monkeypatch.setattr(run_recorder, name, 0)
    seen: dict[str, Any] = {}

    def look() -> None:
        seen["files"], seen["runs"] = (
            len(kept()),
            {name for name, one in children(store_uri).items() if one.data.metrics},
        )

    done = measure(At(CellBegun, 2, look), batch_size="1,2,3")
    assert (seen["files"], seen["runs"]) == (2, {"b3"})
    assert done.exit_code == 0 and len(done.run_ids) == 3
    assert {one.data.tags["llmbench.uploaded"] for one in children(store_uri).values()} == {"true"}


def test_a_store_that_refuses_is_left_alone_until_the_end(store_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def refuse(store: Any, run_id: str, *_: Any) -> None:
        calls.append(run_id)
        raise OSError("the disk of the store is full")

    monkeypatch.setattr(tracked, "upload_figures", refuse)
    done = measure(NullListener(), batch_size="1,2,3")
    assert len(calls) == 1
    assert done.exit_code == 0 and not done.not_uploaded
    assert {one.info.status for one in children(store_uri).values()} == {"FINISHED"}


def test_cells_of_several_processes_are_kept_with_the_last(store_uri: str) -> None:
    seen: list[int] = []
    done = measure(At(CellBegun, 1, lambda: seen.append(len(kept()))), batch_size="1,2", processes=2)
    assert (seen, done.exit_code) == ([0], 0)


@pytest.mark.slow
def test_a_cell_is_kept_before_the_quality_is_evaluated(store_uri: str, tiny_model: Path) -> None:
    early: list[RunResult] = []
    parameters = {"model": str(tiny_model), "backend": "transformers", "quality": "auto", "output_tokens": 2}
    done = measure(At(EvaluationBegun, None, lambda: early.extend(kept())), **parameters)
    [before], [after] = early, kept()
    assert (before.incomplete, before.quality) == (True, None)
    assert done.exit_code == 0 and after.incomplete is None and after.quality and after.quality.scores


def test_the_next_cell_begins_after_the_pause(tmp_path: Path) -> None:
    cells = tuple(
        Cell(model="fake:ttft_ms=1+itl_ms=1", backend="fake", batch_size=rows, output_tokens=4, warmup=1, repetitions=3)
        for rows in (3, 2, 1)
    )
    folders = tuple(tmp_path / str(cell.batch_size) for cell in cells)
    ends: list[int] = []
    told: list[Event] = []

    def pause(outcome: GroupOutcome) -> None:
        assert len(outcome.measured) == len(outcome.described) == len(ends) + 1
        ends.append(time.perf_counter_ns())

    job = WorkerJob("measure", cells, FakeBackend.resolve(cells[0]), folders)
    outcome = run_worker(job, tmp_path / "worker.log", told.append, pause=pause)
    assert outcome.ended and len(outcome.measured) == 3
    begun = [event.sent_ns for event in told if isinstance(event, CellBegun)]
    asked = [event.sent_ns for event in told if isinstance(event, PauseBegun)]
    assert len(asked) == len(ends) == 2  # none after the last cell
    assert [a < e < b for a, e, b in zip(asked, ends, begun[1:], strict=True)] == [True, True]


class EndedUntold(LocalExecutor):
    """Interrupted when the worker had written the last cell's end to the disk, and had not told it yet."""

    def wait(self, on_event: OnEvent, on_pause: OnPause) -> tuple[Task, GroupOutcome]:
        task, outcome = super().wait(on_event, on_pause)
        number, _ = outcome.measured.popitem()
        outcome.texts.pop(number)
        outcome.interrupted = True
        return task, outcome


def test_a_cell_that_the_worker_completed_and_had_not_told_is_kept(store_uri: str) -> None:
    spec = parse({**CELL, "model": "fake:ttft_ms=1+itl_ms=1", "batch_size": "1,2"})
    executor = EndedUntold(spec.options, ["cpu"])
    done = sweep.execute(plan(spec, executor.machine), executor, (store_uri, None))
    assert done.outcome == "interrupted"
    runs = children(store_uri)
    assert {run.data.tags["llmbench.outcome"] for run in runs.values()} == {"ok"}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert all("latency/ttft_ms_mean" in run.data.metrics for run in runs.values()) and len(runs) == 2
