"""Upload a results folder to a store that was unreachable before: nothing lost, nothing twice, nothing different."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import mlflow.data
import pytest
from mlflow import MlflowClient

from mlflow_llmbench import run
from mlflow_llmbench.records.errors import JournalError
from mlflow_llmbench.sweeps.upload import upload

CELL_NAME = "fake:ttft_ms=2+itl_ms=1"
CELL = {"backend": "fake", "output_tokens": 6, "prompt_tokens": 4, "repetitions": 5, "warmup": 1}


def content(uri: str) -> dict[str, Any]:
    """Return the content of a store, without its own ids and locations."""
    client = MlflowClient(uri)
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
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


@pytest.mark.parametrize("call", ["log_artifacts", "log_batch", "log_inputs", "set_tag"])
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
    assert {status for status, *_ in content(store_uri).values()} == {"FINISHED"}
    assert upload(str(result.folder), store_uri).completed == 1
    [(_, _, tags, history, artifacts, *_)] = content(store_uri).values()
    assert history["latency/ttft_ms_mean"] and "samples.csv.gz" in artifacts and tags["llmbench.outcome"] == "ok"
    assert upload(str(result.folder), store_uri).there == 1


def test_an_interruption_during_the_upload_leaves_no_run_open(store_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_artifacts", interrupted)
        result = run(model="fake:ttft_ms=2+itl_ms=1", **CELL)
    assert result.exit_code == 130
    assert {status for status, *_ in content(store_uri).values()} == {"FINISHED"}
    assert upload(str(result.folder), store_uri).completed == 1


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
        ["threads=1", "threads=2", f"{CELL_NAME}: threads"], "FINISHED"
    )


def test_failed_cells_are_uploaded_as_what_they_are(store_uri: str, elsewhere: str) -> None:
    result = run(model="fake:ttft_ms=1+itl_ms=1+fail=oom+above_batch=1", batch_size="1,2", **CELL)
    upload(str(result.folder), elsewhere)
    states = {
        name: (status, tags.get("llmbench.outcome")) for name, (status, _, tags, *_) in content(elsewhere).items()
    }
    assert states == {
        "batch_size=1": ("FINISHED", "ok"),
        "batch_size=2": ("FAILED", "oom"),
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
