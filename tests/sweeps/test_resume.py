"""Commands that were stopped: what their processes have measured is kept, told as what it is, and continued."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from mlflow_llmbench import run
from mlflow_llmbench.measure import journal
from mlflow_llmbench.measure.events import CellBegun, CellCompleted, Event
from mlflow_llmbench.records.results import RunResult
from mlflow_llmbench.sweeps import resume
from mlflow_llmbench.sweeps.progress import NullListener
from mlflow_llmbench.sweeps.sweep import SweepResult
from mlflow_llmbench.sweeps.upload import upload
from mlflow_llmbench.system import memory

ROOT = Path(__file__).resolve().parents[2]
CELL = {"backend": "fake", "output_tokens": 6, "prompt_tokens": 4, "repetitions": 5, "warmup": 1}


class Stopping(NullListener):
    """Interrupts the command when a cell has begun for the n-th time."""

    def __init__(self, begun: int) -> None:
        self.left, self.notes = begun, list[str]()

    def event(self, event: Event) -> None:
        self.left -= isinstance(event, CellBegun)
        if self.left == 0:
            self.left = -1
            raise KeyboardInterrupt

    def note(self, text: str) -> None:
        self.notes.append(text)


def fake(**parameters: Any) -> SweepResult:
    return run(**({"model": "fake:ttft_ms=2+itl_ms=1", "processes": 3} | CELL | parameters))


def runs(uri: str) -> dict[str, Run]:
    client = MlflowClient(uri)
    found = client.search_runs([e.experiment_id for e in client.search_experiments()])
    return {str(one.info.run_id): one for one in found}


def empty_store(template: Path, folder: Path) -> str:
    """The address of another empty store, in a folder that is made."""
    folder.mkdir()
    shutil.copy(template, folder / "mlflow.db")
    return f"sqlite:///{folder}/mlflow.db"


def results(folder: Path) -> list[RunResult]:
    return [journal.read_result(file.parent) for file in sorted(folder.glob("*/artifacts/result.json"))]


def processes(result: RunResult) -> list[int]:
    return [one.process for one in result.repetitions if one.process >= 0]


def measured_here(folder: Path) -> int:
    """Number of processes that have measured a cell in this command."""
    logs = folder.glob("*/events.jsonl")
    return sum(isinstance(event, CellCompleted) for log in logs for event in journal.read_events(log))


def test_finished_processes_are_kept_told_and_continued(store_uri: str) -> None:
    stopped = fake(progress=Stopping(3))
    assert (stopped.outcome, stopped.exit_code, measured_here(stopped.folder)) == ("interrupted", 130, 2)
    [row] = stopped.rows
    assert "It was measured in 2 of 3 processes, which are kept." in row.message
    assert row.metrics["trust/repetitions"] == 10 and row.verdict is None
    [kept] = results(stopped.folder)
    assert (kept.outcome, processes(kept)) == ("interrupted", [0] * 5 + [1] * 5)
    found = runs(store_uri)[stopped.run_ids[0]]
    assert (found.info.status, found.data.tags["llmbench.outcome"]) == ("KILLED", "interrupted")
    assert found.data.metrics["trust/repetitions"] == 10

    listener = Stopping(99)
    whole = fake(progress=listener)
    assert (whole.outcome, measured_here(whole.folder)) == ("ok", 1)
    assert any("2 of 3 processes were measured before" in note for note in listener.notes)
    [result] = results(whole.folder)
    assert processes(result) == [0] * 5 + [1] * 5 + [2] * 5
    assert [one.index for one in result.repetitions] == list(range(15))
    assert result.repetitions[:10] == kept.repetitions
    assert (result.outcome, result.failure, result.resumed) == ("ok", None, stopped.run_ids[0])
    found = runs(store_uri)[whole.run_ids[0]]
    assert (found.info.status, found.data.metrics["trust/repetitions"]) == ("FINISHED", 15)
    assert f"runs/{stopped.run_ids[0]}" in found.data.tags["mlflow.note.content"]


def test_a_continued_cell_can_be_stopped_and_continued_again_and_rerun_measures_all(store_uri: str) -> None:
    assert fake(progress=Stopping(2)).outcome == "interrupted"
    second = fake(progress=Stopping(2))
    assert [processes(one) for one in results(second.folder)] == [[0] * 5 + [1] * 5]
    third = fake()
    assert [processes(one) for one in results(third.folder)] == [[0] * 5 + [1] * 5 + [2] * 5]
    assert measured_here(third.folder) == 1
    again = fake(rerun=True)
    assert measured_here(again.folder) == 3 and results(again.folder)[0].resumed is None


def test_the_folders_alone_are_enough_to_continue(store_uri: str, store_template: Path, tmp_path: Path) -> None:
    """Another store knows nothing of the earlier commands: their folders beside the new one are all there is."""
    stopped = fake(progress=Stopping(3))
    [kept] = results(stopped.folder)
    whole = fake(tracking_uri=empty_store(store_template, tmp_path / "second"))
    [result] = results(whole.folder)
    assert (whole.outcome, measured_here(whole.folder)) == ("ok", 1)
    assert result.repetitions[:10] == kept.repetitions and len(result.repetitions) == 15
    elsewhere = fake(tracking_uri=empty_store(store_template, tmp_path / "third"), output_dir="elsewhere")
    assert measured_here(elsewhere.folder) == 3


def test_each_cell_of_a_sweep_goes_on_where_it_stopped(store_uri: str) -> None:
    """Two cells in one load: the command is stopped in its second process, when that turns to the second cell."""
    stopped = fake(batch_size="1,2", progress=Stopping(4))
    assert sorted(one.message.split("measured in ")[-1][:6] for one in stopped.rows) == ["1 of 3", "2 of 3"]
    whole = fake(batch_size="1,2")
    assert whole.outcome == "ok" and measured_here(whole.folder) == 3
    assert [len(processes(one)) for one in results(whole.folder)] == [15, 15]


def test_a_failure_in_a_later_process_keeps_the_earlier_ones(store_uri: str) -> None:
    class Failing(NullListener):
        begun = 0

        def event(self, event: Event) -> None:
            self.begun += isinstance(event, CellBegun)
            if self.begun == 3 and isinstance(event, CellBegun):
                for child in memory.descendants(os.getpid()):
                    os.kill(child, signal.SIGKILL)

    result = fake(progress=Failing())
    [row] = result.rows
    assert row.outcome == "oom" and "measured in 2 of 3 processes" in row.message
    assert [processes(one) for one in results(result.folder)] == [[0] * 5 + [1] * 5]


KILLING = """
import os, signal
from mlflow_llmbench import run
from mlflow_llmbench.measure.events import CellBegun
from mlflow_llmbench.sweeps import resume
from mlflow_llmbench.sweeps.progress import NullListener

class Killing(NullListener):
    begun = 0
    def start(self, total):
        if {begun} == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    def event(self, event):
        self.begun += isinstance(event, CellBegun)
        if self.begun == {begun}:
            os.kill(os.getpid(), signal.SIGKILL)

run(progress=Killing(), **{parameters!r})
"""


def killed(folder: Path, uri: str, begun: int, **parameters: Any) -> Path:
    """The folder of a command that was killed when a cell had begun for the n-th time; 0: when its own run had."""
    parameters = {"model": "fake:ttft_ms=2+itl_ms=1", "tracking_uri": uri} | CELL | parameters
    done = subprocess.run(
        [sys.executable, "-c", KILLING.format(begun=begun, parameters=parameters)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
        capture_output=True,
        timeout=200,
    )
    assert done.returncode == -9, done.stderr
    [sweep] = folder.glob("llmbench-results/*")
    return sweep


def test_finished_processes_of_a_killed_command_are_kept_and_continued(store_uri: str, tmp_path: Path) -> None:
    folder = killed(tmp_path, store_uri, 3, processes=3)
    whole = fake()
    [kept] = results(folder)
    assert (kept.outcome, processes(kept)) == ("crashed", [0] * 5 + [1] * 5)
    assert kept.failure and "measured in 2 of 3 processes" in kept.failure.message
    assert [processes(one) for one in results(whole.folder)] == [[0] * 5 + [1] * 5 + [2] * 5]
    found = {one.data.tags["llmbench.sweep"]: one for one in runs(store_uri).values()}
    assert (found[folder.name].info.status, found[folder.name].data.metrics["trust/repetitions"]) == ("FAILED", 10)
    assert found[whole.folder.name].info.status == "FINISHED"


def test_a_sweep_that_was_killed_before_its_first_cell_is_ended_by_name(store_uri: str, tmp_path: Path) -> None:
    folder = killed(tmp_path, store_uri, 0, batch_size="1,2")
    [parent] = runs(store_uri).values()
    assert parent.info.status == "RUNNING"
    done = upload(str(folder), store_uri)
    assert (done.new, done.completed, done.problems) == (0, 1, [])
    [parent] = runs(store_uri).values()
    assert parent.info.status == "FAILED"
    before = parent.info.end_time
    assert upload(str(folder), store_uri).there == 1
    assert [one.info.end_time for one in runs(store_uri).values()] == [before]


def test_what_a_worker_had_measured_and_its_command_had_not_read_is_recovered(store_uri: str, tmp_path: Path) -> None:
    folder = killed(tmp_path, store_uri, 2, batch_size="1,2")
    [log] = folder.glob("*/worker.jsonl")
    told = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(told[: next(n for n, line in enumerate(told) if b'"event":"measured"' in line)]))
    upload(str(folder), store_uri)
    by_outcome = {one.outcome: one for one in results(folder)}
    assert sorted(by_outcome) == ["crashed", "ok"]
    assert len(by_outcome["ok"].repetitions) == 5
    assert by_outcome["ok"].load is not None


def test_a_damaged_journal_of_a_killed_command_is_named_and_costs_no_other_cell(store_uri: str, tmp_path: Path) -> None:
    folder = killed(tmp_path, store_uri, 2, batch_size="1,2", threads="1,2")
    [log] = folder.glob("*/worker.jsonl")
    told = log.read_bytes().splitlines(keepends=True)
    middle = next(n for n, line in enumerate(told) if b'"event":"measured"' in line) + 1
    log.write_bytes(b"".join([*told[:middle], b"{]\n", *told[middle:]]))
    done = upload(str(folder), store_uri)
    assert len(done.problems) == 1 and str(log) in done.problems[0]
    assert sorted(one.outcome for one in results(folder)) == ["crashed", "ok"]
    assert {one.info.status for one in runs(store_uri).values()} == {"FINISHED", "FAILED"}


def test_a_cell_lasts_from_its_own_begin_to_its_own_end(store_uri: str) -> None:
    """Four cells in one load: none overlaps another, and each run has the times of its result."""
    result = fake(processes=1, output_tokens="4,8,12,16")
    found = [(runs(store_uri)[run_id], one) for run_id, one in zip(result.run_ids, result.rows, strict=True)]
    assert all(one.info.end_time == row.ended_ms for one, row in found)
    spans = sorted((one.info.start_time, one.info.end_time) for one, _ in found)
    assert all(begin <= end for begin, end in spans)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))


def test_no_run_ends_before_it_begins(store_uri: str) -> None:
    refused = run(model="opt-1.3b", weights="random", memory_limit="100MB", batch_size="1,2")
    assert {row.outcome for row in refused.rows} == {"refused"}
    found = runs(store_uri)
    assert len(found) == 3 and all(one.info.start_time <= one.info.end_time for one in found.values())
    upload(str(refused.folder), store_uri)
    assert all(one.info.start_time <= one.info.end_time for one in runs(store_uri).values())


def test_a_store_that_keeps_failing_is_not_tried_for_each_sweep_of_before(
    store_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each failure exhausts the patience with the store here; the sweeps are completed when it works."""

    def failing(*_: Any) -> None:
        raise OSError("no room")

    def notes() -> list[str]:
        listener = Stopping(-1)
        fake(rerun=True, processes=1, progress=listener)
        return [note for note in listener.notes if " sweep " in note]

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_artifact", failing)
        for _ in range(3):
            fake(rerun=True, processes=1)
        assert len(notes()) == 3
        patch.setattr(resume, "PATIENCE_S", 0.0)
        [told] = notes()
        assert told.startswith("Of the sweep ") and "no room" in told
    assert len(notes()) == 5
