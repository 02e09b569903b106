"""Upload a results folder to a store that was unreachable before: nothing lost, nothing twice, nothing different."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import mlflow.data
import pytest
from mlflow import MlflowClient

from mlflow_llmbench import run
from mlflow_llmbench.cli.main import main
from mlflow_llmbench.measure import journal
from mlflow_llmbench.records.errors import JournalError
from mlflow_llmbench.sweeps.upload import upload

CELL_NAME = "fake:ttft_ms=2+itl_ms=1"
CELL = {"backend": "fake", "output_tokens": 6, "prompt_tokens": 4, "repetitions": 5, "warmup": 1}


def content(uri: str, experiment: str | None = None) -> dict[str, Any]:
    """Return the content of a store, or of one experiment, without its own ids and locations."""
    client = MlflowClient(uri)
    runs = client.search_runs([e.experiment_id for e in client.search_experiments() if experiment in (None, e.name)])
    found = {}
    for one in runs:
        tags = {
            k: v
            for k, v in one.data.tags.items()
            if k.startswith("llmbench.") or k in ("mlflow.note.content", "mlflow.runColor")
        }
        # The link to the view names the experiment and the parent's own id.
        tags["mlflow.note.content"] = re.sub(r"\(#/experiments/[^)]*\)", "(link)", tags.get("mlflow.note.content", ""))
        history = {
            k: [(m.step, m.value, m.timestamp) for m in client.get_metric_history(one.info.run_id, k)]
            for k in one.data.metrics
        }
        artifacts = sorted(item.path for item in client.list_artifacts(one.info.run_id))
        nested = "mlflow.parentRunId" in one.data.tags
        prompts = [vars(given.dataset) for given in one.inputs.dataset_inputs]
        found[one.info.run_name] = (one.info.status, one.data.params, tags, history, artifacts, nested, prompts)
    return found


@pytest.fixture
def elsewhere(store_template: Path, tmp_path: Path) -> str:
    """A second, empty store."""
    shutil.copy(store_template, tmp_path / "elsewhere.db")
    return f"sqlite:///{tmp_path}/elsewhere.db"


@pytest.mark.parametrize("batches", ["1", "1,2"])
def test_uploaded_late_equals_uploaded_at_once_and_twice_changes_nothing(
    store_uri: str, elsewhere: str, batches: str
) -> None:
    result = run(model="fake:ttft_ms=2+itl_ms=1", batch_size=batches, **CELL)
    first = upload(str(result.folder), elsewhere)
    assert (first.new, first.completed, first.there) == (len(result.rows) + (len(result.rows) > 1), 0, 0)
    late = content(elsewhere)
    assert late == content(store_uri)
    again = upload(str(result.folder), elsewhere)
    assert (again.new, again.completed) == (0, 0)
    assert content(elsewhere) == late
    assert upload(str(result.folder), store_uri).there == first.new


def test_runs_that_were_sent_the_same_are_found_by_the_digest_of_their_prompts(
    store_uri: str, elsewhere: str, tmp_path: Path
) -> None:
    (tmp_path / "mine.jsonl").write_text('{"prompt": "one two three"}\n')
    asked = {**CELL, "model": "fake:ttft_ms=2+itl_ms=1", "workload": f"qa,{tmp_path}/mine.jsonl", "batch_size": "1,2"}
    result = run(**asked)
    upload(str(result.folder), elsewhere)
    client = MlflowClient(store_uri)
    of_run = {run_id: client.get_run(run_id) for run_id in result.run_ids}
    for uri in (store_uri, elsewhere):
        store = MlflowClient(uri)
        experiments = [e.experiment_id for e in store.search_experiments()]
        for workload, name in (("qa", "qa"), (f"{tmp_path}/mine.jsonl", "mine")):
            [digest] = {
                r.data.tags["llmbench.workload_hash"] for r in of_run.values() if r.data.params["workload"] == workload
            }
            found = store.search_runs(experiments, f"dataset.digest = '{digest}' and dataset.name = '{name}'")
            assert sorted(r.data.params["batch_size"] for r in found) == ["1", "2"]
            assert {r.data.params["workload"] for r in found} == {workload}
    [of_file, *_] = [r.inputs.dataset_inputs for r in of_run.values() if "mine" in r.data.params["workload"]]
    assert json.loads(of_file[0].dataset.source) == {"uri": f"{tmp_path}/mine.jsonl"}
    assert mlflow.data.get_source(of_file[0].dataset).load() == f"{tmp_path}/mine.jsonl"
    assert [(tag.key, tag.value) for tag in of_file[0].tags] == [("mlflow.data.context", "benchmark")]


@pytest.mark.parametrize("call", ["log_artifact", "log_batch", "log_inputs"])
def test_what_a_failing_store_cut_off_is_completed_not_doubled(
    store_uri: str, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """mlflow's own client fails at one call from its second use on, whatever part of the upload had arrived."""
    real, uses = getattr(MlflowClient, call), []

    def failing(self: Any, *arguments: Any, **keywords: Any) -> Any:
        uses.append(1)
        if len(uses) > (1 if call == "log_batch" else 0):
            raise OSError("the store is away")
        return real(self, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, call, failing)
        result = run(model="fake:ttft_ms=2+itl_ms=1", **CELL)
    assert result.exit_code == 1
    assert "the store is away" in " ".join(result.not_uploaded)
    [(status, _, tags, *_)] = content(store_uri).values()
    assert status == "FAILED" and "llmbench.outcome" not in tags and "llmbench.verdict" not in tags
    assert upload(str(result.folder), store_uri).completed == 1
    [(status, _, tags, history, artifacts, *_)] = content(store_uri).values()
    assert history["latency/ttft_ms_mean"] and "samples.csv.gz" in artifacts and tags["llmbench.outcome"] == "ok"
    assert status == "FINISHED"
    assert upload(str(result.folder), store_uri).there == 1


CALLS = [
    *(("1", call, 1) for call in ("create_run", "log_batch", "set_terminated")),
    *(("1,2", call, 3) for call in ("create_run", "set_terminated")),
    *(("1,2", *which) for which in (("log_batch", 8), ("log_inputs", 2), ("log_artifact", 9), ("log_artifact", 12))),
    *(("1,2", *which) for which in (("log_batch", 2), ("log_inputs", 1))),  # between the two cells
]
"""Batch sizes, a call of the store, and which of its uses is interrupted."""


@pytest.mark.parametrize(("batches", "call", "which"), CALLS)
def test_an_interruption_at_any_call_of_the_store_loses_nothing(
    store_uri: str, monkeypatch: pytest.MonkeyPatch, call: str, batches: str, which: int
) -> None:
    """The signal comes once, after the call has had its effect; what was measured then is whole in the end."""
    real, uses = getattr(MlflowClient, call), itertools.count(1)

    def interrupted(self: Any, *arguments: Any, **keywords: Any) -> Any:
        number = next(uses)  # files are sent by several threads
        done = real(self, *arguments, **keywords)
        if number == which:
            raise KeyboardInterrupt
        return done

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, call, interrupted)
        result = run(model="fake:ttft_ms=2+itl_ms=1", batch_size=batches, **CELL)
    assert (result.exit_code, result.not_uploaded) == (130, ())
    found = content(store_uri)
    assert len(found) == len(result.run_ids) + (result.parent_id is not None)
    between = (batches, call, which) in CALLS[-2:]
    for name, (status, _, tags, history, files, nested, _) in found.items():
        if nested or result.parent_id is None:
            assert tags["llmbench.uploaded"] == "true"
            if (batches, call) == ("1", "create_run") or (between and name.endswith(" b1")):  # not measured then
                assert (status, tags["llmbench.outcome"]) == ("KILLED", "interrupted")
                continue
            assert (status, tags["llmbench.outcome"]) == ("FINISHED", "ok"), name
            assert history["latency/ttft_ms_mean"] and "samples.csv.gz" in files
        else:
            assert status == "KILLED"
    assert upload(str(result.folder), store_uri).there == len(found)


def test_a_second_interruption_ends_the_upload_and_the_next_command_completes_it(
    store_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, sent, stopped = MlflowClient.log_artifact, set[tuple[str, str]](), list[bool]()

    def interrupted(self: Any, run_id: str, file: str, under: str | None) -> None:
        if stopped or (run_id, file) in sent:  # the first time is between the cells
            stopped.append(True)
            raise KeyboardInterrupt
        sent.add((run_id, file))
        real(self, run_id, file, under)

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_artifact", interrupted)
        result = run(model="fake:ttft_ms=2+itl_ms=1", batch_size="1,2", **CELL)
    assert result.exit_code == 130 and result.not_uploaded
    assert {(status, tags.get("llmbench.outcome")) for status, _, tags, *_ in content(store_uri).values()} == {
        ("KILLED", None)
    }
    run(model="fake:ttft_ms=1", **CELL)
    found = {name: one for name, one in content(store_uri).items() if "ttft_ms=1 " not in name}
    assert sorted(status for status, *_ in found.values()) == ["FINISHED", "FINISHED", "KILLED"]
    assert all(history["latency/ttft_ms_mean"] for *_, history, _, nested, _ in found.values() if nested)
    assert upload(str(result.folder), store_uri).there == 3


def test_a_store_that_refuses_new_runs_does_not_stop_the_sweep(
    store_uri: str, elsewhere: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, uses = MlflowClient.create_run, []

    def failing(self: Any, *arguments: Any, **keywords: Any) -> Any:
        uses.append(1)
        if len(uses) == 3:
            raise OSError("the store is away")
        return real(self, *arguments, **keywords)

    monkeypatch.setattr(MlflowClient, "create_run", failing)
    result = run(model="fake:ttft_ms=2+itl_ms=1", threads="1,2", **CELL)
    assert [row.outcome for row in result.rows] == ["ok", "ok"]
    assert {name: one[0] for name, one in content(store_uri).items()} == dict.fromkeys(
        [f"{CELL_NAME} threads=1", f"{CELL_NAME} threads=2", f"{CELL_NAME}: threads"], "FINISHED"
    )


def test_failed_cells_are_uploaded_as_what_they_are(store_uri: str, elsewhere: str) -> None:
    result = run(model="fake:ttft_ms=1+itl_ms=1+fail=oom+above_batch=1", batch_size="1,2", **CELL)
    upload(str(result.folder), elsewhere)
    states = {
        name: (status, tags.get("llmbench.outcome")) for name, (status, _, tags, *_) in content(elsewhere).items()
    }
    assert states == {
        f"{result.rows[0].cell.model} b1": ("FINISHED", "ok"),
        f"{result.rows[0].cell.model} b2": ("FAILED", "oom"),
        f"{result.rows[0].cell.model}: batch_size": ("FAILED", None),
    }


def test_a_store_that_breaks_in_the_middle_loses_nothing(store_uri: str, elsewhere: str, tmp_path: Path) -> None:
    """The table of metrics is gone when the cell is uploaded: the command goes on, says so, and keeps everything."""
    import sqlite3

    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        database.execute("DROP TABLE metrics")
    result = run(model="fake:ttft_ms=2+itl_ms=1", **CELL)
    assert result.outcome == "ok"
    assert len(result.not_uploaded) == 1
    assert result.not_uploaded[0].startswith(f"{CELL['backend']}:")
    assert upload(str(result.folder), elsewhere).new == 1
    [(status, _, tags, history, artifacts, *_)] = content(elsewhere).values()
    assert (status, tags["llmbench.outcome"]) == ("FINISHED", "ok")
    assert history["latency/ttft_ms_mean"]
    assert "samples.csv.gz" in artifacts


def test_folders_that_are_no_results(tmp_path: Path, store_uri: str) -> None:
    with pytest.raises(JournalError, match="has no readable sweep.json"):
        upload(str(tmp_path))
    (tmp_path / "sweep.json").write_text(json.dumps({"parameters": {}, "cells": 1}))
    with pytest.raises(JournalError, match="holds no finished cell"):
        upload(str(tmp_path))
    (tmp_path / "x" / "artifacts").mkdir(parents=True)
    (tmp_path / "x" / "artifacts" / "result.json").write_text('{"cell": {"model"')
    with pytest.raises(JournalError, match="Cannot read the result"):
        upload(str(tmp_path))


def damage(data: Any, *path: Any, value: Any) -> None:
    for key in path[:-1]:
        data = data[key]
    data[path[-1]] = value


REQUESTS = ("repetitions", 0, "requests")
DAMAGES: dict[str, tuple[tuple[Any, ...], Any]] = {
    "a list for an object": (("cell",), []),
    "a text for a list": (("repetitions",), "all of them"),
    "a number for an object": (("repetitions", 1), 7),
    "texts for stamps": ((*REQUESTS, 0, "stamps_ns"), ["soon"]),
    "a text for a time": (("started_ms",), "yesterday"),
    "no requests": (REQUESTS, []),
    "no stamps": ((*REQUESTS, 0, "stamps_ns"), []),
    "an unknown outcome": (("outcome",), "wonderful"),
    "no hashes": (("hashes",), None),
    "no cell": (("cell",), None),
    "no model": (("model",), None),
    "a list for memory": (("memory", "host_rss"), [1, 2]),
    "a text for a number of rows": (("cell", "batch_size"), "two"),
    "a number for a failure": (("failure",), 3),
    "numbers for names": (("environment",), 1),
}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sweep that no store has: a cell for each damage, and two more."""
    folder = tmp_path_factory.mktemp("kept")
    result = run(
        model=CELL_NAME,
        batch_size=[*range(1, len(DAMAGES) + 3)],
        output_dir=str(folder),
        tracking_uri="http://127.0.0.1:9",  # nobody answers there
        **CELL,
    )
    return result.folder


def copied(sweep: Path, folder: Path, cells: int) -> Path:
    """Copy the folder of a sweep with only its first cells."""
    shutil.copytree(sweep, folder / sweep.name)
    known = json.loads((sweep / "sweep.json").read_text())
    for name in known["order"][cells:]:
        shutil.rmtree(folder / sweep.name / name)
    return folder / sweep.name


def test_damaged_results_are_named_in_a_line_each_and_the_other_cells_are_uploaded(
    store_uri: str, kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two of the damaged cells have runs: a whole one, which stays, and one that a killed command left open."""
    folder = copied(kept, tmp_path, 2)
    upload(str(folder), store_uri)
    client = MlflowClient(store_uri)
    for one in client.search_runs([e.experiment_id for e in client.search_experiments()]):
        if one.info.run_name != f"{CELL_NAME} b1":
            client.delete_tag(one.info.run_id, "llmbench.uploaded")
            client.update_run(one.info.run_id, status="RUNNING")
    shutil.rmtree(folder)
    shutil.copytree(kept, folder)
    order = json.loads((folder / "sweep.json").read_text())["order"]
    files = [folder / name / "artifacts" / "result.json" for name in order]
    for file, (path, value) in zip(files, DAMAGES.values(), strict=False):
        data = json.loads(file.read_text())
        damage(data, *path, value=value)
        file.write_text(json.dumps(data))

    assert main(["upload", str(folder), "--tracking-uri", store_uri]) == 1
    said = capsys.readouterr().err.strip().splitlines()
    for case, line, file in zip(DAMAGES, said, files[: len(DAMAGES)], strict=True):
        assert line.startswith(f"llmbench: Cannot read the result {file}: "), case
    assert {name: status for name, (status, *_) in content(store_uri).items()} == {
        f"{CELL_NAME} b1": "FINISHED",
        f"{CELL_NAME} b2": "FAILED",
        f"{CELL_NAME} b{len(DAMAGES) + 1}": "FINISHED",
        f"{CELL_NAME} b{len(DAMAGES) + 2}": "FINISHED",
        f"{CELL_NAME}: batch_size": "FAILED",
    }


def test_a_damaged_result_does_not_stop_the_next_command(store_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(model=CELL_NAME, **CELL)
    [file] = first.folder.glob("*/artifacts/result.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "repetitions": "all of them"}))
    assert run(model=CELL_NAME, **CELL).outcome == "ok"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("sweep.json", "[]"),
        ("sweep.json", '{"cells": 3, "parameters": {"quant": "int99"}}'),
        ("sweep.json", '{"cells": "many", "parameters": {}}'),
        ("sweep.json", '{"cells": 3, "parameters": [1]}'),
        ("sweep.json", '{"cells": 3, "parameters": {}, "order": 4}'),
    ],
)
def test_a_damaged_sweep_is_told_in_one_line(
    store_uri: str, kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str
) -> None:
    folder = copied(kept, tmp_path, 1)
    (folder / name).write_text(text)
    assert main(["upload", str(folder), "--tracking-uri", store_uri]) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "no readable sweep.json" in said[0], said


@pytest.mark.parametrize("text", ["[]", '{"outcome": 3}', "{", '{"outcome": "wonderful"}'])
def test_a_damaged_end_is_that_of_a_killed_command(store_uri: str, kept: Path, tmp_path: Path, text: str) -> None:
    folder = copied(kept, tmp_path, 1)
    (folder / "ended.json").write_text(text)
    assert upload(str(folder), store_uri).new == 2
    assert sorted(status for status, *_ in content(store_uri).values()) == ["FAILED", "FINISHED"]  # the sweep's is not
    assert upload(str(folder), store_uri).there == 2


def test_a_folder_that_is_being_uploaded_is_left_alone(store_uri: str, kept: Path, tmp_path: Path) -> None:
    folder = copied(kept, tmp_path, 1)
    with journal.claim(folder), pytest.raises(JournalError, match="is still being written by a running command"):
        upload(str(folder), store_uri)
    assert content(store_uri) == {}
