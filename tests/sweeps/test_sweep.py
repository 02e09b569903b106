"""Whole commands with the fake backend: real workers, a real SQLite store, real files."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from mlflow_llmbench import run
from mlflow_llmbench.measure import journal
from mlflow_llmbench.records.errors import JournalError, LlmbenchError, TrackingError, UsageError
from mlflow_llmbench.reports.sweep import best_figures
from mlflow_llmbench.sweeps.sweep import SweepResult

ROOT = Path(__file__).resolve().parents[2]
FAST = {"backend": "fake", "output_tokens": 6, "prompt_tokens": 4, "repetitions": 5, "warmup": 1}


def fake(script: str = "ttft_ms=2+itl_ms=1", **parameters: Any) -> SweepResult:
    return run(model=f"fake:{script}", **(FAST | parameters))


@pytest.mark.charts
def test_one_cell_is_one_run_with_everything_in_it(store_uri: str) -> None:
    result = fake(price_per_hour=3.6)
    assert (result.outcome, result.exit_code, result.parent_id) == ("ok", 0, None)
    client = MlflowClient(store_uri)
    [found] = client.search_runs([result.experiment_id])
    assert found.info.run_id == result.run_ids[0]
    assert found.info.status == "FINISHED"
    assert found.info.run_name == "fake:ttft_ms=2+itl_ms=1 none b1 4+6"
    assert found.data.params["quant.method"] == "fake"
    assert found.data.params["threads"] == "auto"
    assert found.data.metrics["cost/per_million_tokens"] == pytest.approx(
        1e3 / found.data.metrics["throughput/output_tokens_per_s"]
    )
    assert found.data.tags["llmbench.outcome"] == "ok"
    assert "tokens/s (95 % interval" in found.data.tags["mlflow.note.content"]
    assert [p.step for p in client.get_metric_history(found.info.run_id, "steps/itl_ms")] == [2, 3, 4, 5, 6]
    artifacts = {item.path for item in client.list_artifacts(found.info.run_id)}
    assert {
        "result.json",
        "samples.csv.gz",
        "environment.json",
        "config.yaml",
        "report.md",
        "charts",
        "tables",
    } <= artifacts


@pytest.mark.charts
def test_the_checker_of_the_vocabulary_finds_no_fault(store_uri: str) -> None:
    fake(batch_size="1,3", repetitions="auto", warmup="auto", output_tokens="1,6")
    checker = ROOT.parent / "shared" / "check" / "main_job.py"
    if not checker.exists():
        pytest.skip("the vocabulary's checker is not beside this checkout")
    done = subprocess.run(
        [sys.executable, checker, "--tracking-uri", store_uri], capture_output=True, text=True, check=False
    )
    # With one output token there are no gaps: the checker reports these metrics as missing, and they must be absent.
    faults = [
        line for line in done.stdout.splitlines()[:-1] if line and "output_tokens=1" not in line and "torch" not in line
    ]
    assert [f for f in faults if not f.endswith("param decode missing")] == []


@pytest.mark.charts
def test_a_sweep_is_a_parent_with_children_named_by_what_varies(store_uri: str) -> None:
    result = fake(batch_size="1,2", output_tokens=[6, 4])
    client = MlflowClient(store_uri)
    runs = {r.info.run_id: r for r in client.search_runs([result.experiment_id])}
    assert len(runs) == 5
    assert result.parent_id
    parent = runs[result.parent_id]
    assert parent.data.params["batch_size"] == "1,2"
    assert parent.info.status == "FINISHED"
    names = [runs[i].info.run_name for i in result.run_ids]
    assert [name.partition(" ")[2] for name in names] == [
        "b1 output_tokens=6",
        "b1 output_tokens=4",
        "b2 output_tokens=6",
        "b2 output_tokens=4",
    ]
    assert {runs[i].data.tags["mlflow.parentRunId"] for i in result.run_ids} == {result.parent_id}
    assert {item.path for item in client.list_artifacts(result.parent_id)} >= {
        "comparison.md",
        "comparison.csv",
        "charts",
        "tables",
    }
    assert f"[Compare the cells in charts]({result.page})" in parent.data.tags["mlflow.note.content"]
    assert any(key.startswith("mlflow.sharedViewState.") for key in client.get_experiment(result.experiment_id).tags)
    heading = result.table().splitlines()[0].split()
    assert heading[:2] == ["batch_size", "output_tokens"]
    assert "quant" not in heading
    load_times = {runs[i].data.metrics["load/load_s"] for i in result.run_ids}
    assert len(load_times) == 1  # one load for all four cells
    figures, tags = best_figures(result.rows, ["batch_size", "output_tokens"])
    assert {key: value for key, value in parent.data.metrics.items() if key.startswith("best/")} == figures
    assert tags.items() <= {key.removeprefix("llmbench."): value for key, value in parent.data.tags.items()}.items()
    assert sum(int(part.split()[0]) for part in parent.data.tags["llmbench.cells"].split(", ")) == 4
    assert client.get_experiment(result.experiment_id).tags["mlflow.experimentKind"] == "custom_model_development"


def test_charts_are_left_out_where_they_are_switched_off(store_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMBENCH_CHARTS", "Off")
    result = fake(batch_size="1,2")
    assert (result.outcome, result.exit_code) == ("ok", 0)
    client = MlflowClient(store_uri)
    for run_id in (*result.run_ids, result.parent_id):
        files = {item.path for item in client.list_artifacts(str(run_id))}
        assert "report.md" in files and "charts" not in files
    assert not [path for path in result.folder.rglob("*") if path.suffix in (".svg", ".png")]
    assert "![" not in (result.folder / "comparison" / "report.md").read_text()


def test_raw_samples_carry_the_numbers(store_uri: str) -> None:
    result = fake(batch_size=2)
    folder = next(result.folder.glob("*/artifacts"))
    lines = gzip.decompress((folder / "samples.csv.gz").read_bytes()).decode().splitlines()
    assert lines[0] == "repetition,row,token,t_ns"
    assert len(lines) == 1 + 5 * 2 * 7
    stamps = [int(line.split(",")[3]) for line in lines[1:8]]
    assert stamps == sorted(stamps)
    assert journal.read_result(folder).repetitions[0].requests[0].t0_ns == stamps[0]
    events = list(journal.read_events(folder.parent / "events.jsonl"))
    assert [e.name for e in events] == ["warmup", *["repetition"] * 5, "complete"]


def test_the_run_that_mlflow_run_made_is_used(store_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = MlflowClient(store_uri)
    experiment = client.create_experiment("elsewhere")
    given = client.create_run(experiment)
    client.log_param(given.info.run_id, "batch_size", "02")
    client.log_param(given.info.run_id, "model", "'fake:ttft_ms=2+itl_ms=1'")
    monkeypatch.setenv("MLFLOW_RUN_ID", given.info.run_id)
    result = fake(batch_size="02")
    assert result.run_ids == (given.info.run_id,)
    found = client.get_run(given.info.run_id)
    assert (found.info.status, found.data.params["batch_size"], found.data.metrics["settings/batch_size"]) == (
        "FINISHED",
        "02",
        2,
    )
    assert result.not_uploaded == ()


def test_a_name_given_by_a_person_is_kept(store_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = MlflowClient(store_uri)
    given = client.create_run("0", run_name="my night run")
    monkeypatch.setenv("MLFLOW_RUN_ID", given.info.run_id)
    fake()
    assert client.get_run(given.info.run_id).info.run_name == "my night run"


def test_a_param_that_contradicts_is_told_and_the_run_ends(store_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = MlflowClient(store_uri)
    given = client.create_run("0")
    client.log_param(given.info.run_id, "batch_size", "16")
    monkeypatch.setenv("MLFLOW_RUN_ID", given.info.run_id)
    with pytest.raises(TrackingError, match="has batch_size=16 already, and 2 was asked for"):
        fake(batch_size=2)


def test_a_run_that_holds_a_result_is_not_overwritten(store_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    [first] = fake().run_ids
    before = MlflowClient(store_uri).get_run(first).data.tags
    monkeypatch.setenv("MLFLOW_RUN_ID", first)
    with pytest.raises(TrackingError, match="which holds a result already"):
        fake(batch_size=2)
    assert MlflowClient(store_uri).get_run(first).data.tags == before
    monkeypatch.setenv("MLFLOW_RUN_ID", "f" * 32)
    with pytest.raises(TrackingError, match="MLFLOW_RUN_ID names the run f+, which is not there"):
        fake()


def test_an_experiment_keeps_the_kind_that_somebody_gave_it(store_uri: str) -> None:
    client = MlflowClient(store_uri)
    given, plain = (client.create_experiment(name) for name in ("agents", "plain"))
    client.set_experiment_tag(given, "mlflow.experimentKind", "genai_development")
    for name, kind in (("agents", "genai_development"), ("plain", "custom_model_development")):
        fake(experiment=name, repetitions=2)
        found = client.get_experiment_by_name(name)
        assert found and found.tags["mlflow.experimentKind"] == kind
    assert client.get_experiment(plain).tags


def test_a_deleted_experiment_says_how_to_restore_it(store_uri: str) -> None:
    client = MlflowClient(store_uri)
    client.delete_experiment(client.create_experiment("llmbench"))
    with pytest.raises(
        TrackingError, match="The experiment llmbench is deleted. Restore it with `mlflow experiments restore"
    ):
        fake()


def test_a_half_made_store_is_one_line(tmp_path: Path) -> None:
    import sqlite3

    with sqlite3.connect(tmp_path / "half.db") as database:
        database.execute("CREATE TABLE experiments (experiment_id INTEGER)")
    with pytest.raises(TrackingError, match="delete a new file that was left incomplete") as caught:
        fake(tracking_uri=f"sqlite:///{tmp_path}/half.db")
    assert "\n" not in str(caught.value)


def test_two_commands_may_make_one_new_store_and_leave_nothing_else_behind(tmp_path: Path) -> None:
    (temporary := tmp_path / "temporary").mkdir()
    command = [
        sys.executable,
        *"-m mlflow_llmbench run --backend fake --model fake: --output-tokens 4 --repetitions 5".split(),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)}
    both = [
        subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    errors = [process.communicate(timeout=200)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    assert len(client.search_runs([e.experiment_id for e in client.search_experiments()])) == 2
    assert not list(temporary.iterdir())


def test_texts_longer_than_the_context_are_refused_not_measured(
    store_uri: str, tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "x" * 250}) + "\n" + json.dumps({"prompt": "short"}))
    result = run(
        model=str(tiny_model), workload="long.jsonl", prompt_tokens="auto", output_tokens=10, repetitions=5, warmup=1
    )
    assert result.rows[0].outcome == "error"
    assert "has 250 tokens, and with output_tokens=10 that is more than the context of 256" in result.rows[0].message


def test_texts_are_encoded_and_decoded_apart_from_the_model(store_uri: str) -> None:
    result = fake("ttft_ms=1+itl_ms=1", workload="qa", batch_size="2")
    metrics = MlflowClient(store_uri).get_run(result.run_ids[0]).data.metrics
    around = metrics["latency/e2e_with_text_ms_mean"] - metrics["latency/e2e_ms_mean"]
    assert around > metrics["latency/tokenize_ms_p50"] + metrics["latency/detokenize_ms_p50"] > 0


def test_out_of_memory_ends_one_cell_and_smaller_ones_go_on(store_uri: str) -> None:
    result = fake("ttft_ms=1+itl_ms=1+fail=oom+above_batch=2", batch_size="1,2,4,8")
    assert [row.outcome for row in result.rows] == ["ok", "ok", "oom", "oom"]
    assert result.exit_code == 1
    client = MlflowClient(store_uri)
    states = [client.get_run(i).info.status for i in result.run_ids]
    assert states == ["FINISHED", "FINISHED", "FAILED", "FAILED"]
    assert client.get_run(result.parent_id or "").info.status == "FAILED"
    assert re.search(r"oom \(2 cells\): fake:\S+ b4: Scripted out-of-memory error with 4 rows\.", result.table())


@pytest.mark.parametrize(
    ("script", "outcome", "message"),
    [
        ("fail=crash", "crashed", "The worker ended with exit code 13"),
        ("fail=crash+at=load", "crashed", "at stage loading"),
        ("fail=oom+at=load", "oom", "Scripted out-of-memory error"),
        ("fail=error", "error", "Scripted error"),
    ],
)
def test_failures_are_runs_too(store_uri: str, script: str, outcome: str, message: str) -> None:
    result = fake(script)
    assert result.rows[0].outcome == outcome
    assert message in result.rows[0].message
    found = MlflowClient(store_uri).get_run(result.run_ids[0])
    assert found.info.status == "FAILED"
    assert found.data.tags["llmbench.outcome"] == outcome
    assert found.data.tags["llmbench.verdict_reasons"] == "unfinished"
    assert "latency/ttft_ms_mean" not in found.data.metrics


def test_wrong_token_counts_are_invalid_not_hidden(store_uri: str) -> None:
    result = fake("ttft_ms=1+itl_ms=1+stop_after=4")
    assert result.rows[0].verdict and result.rows[0].verdict.word == "invalid"
    assert "wrong_token_count" in [r.code for r in result.rows[0].verdict.reasons]
    assert "returned 4 tokens instead of 6" in result.table()


def test_fresh_processes(store_uri: str) -> None:
    result = fake(processes=3)
    folder = next(result.folder.glob("*/artifacts"))
    repetitions = journal.read_result(folder).repetitions
    assert [r.process for r in repetitions] == [0] * 5 + [1] * 5 + [2] * 5
    assert [r.index for r in repetitions] == list(range(15))


def test_log_floods_are_counted_not_kept(store_uri: str) -> None:
    result = fake("ttft_ms=1+itl_ms=1+log_lines=500")
    assert (next(result.folder.glob("*/worker.log"))).read_text().count("a line that comes") <= 3
    folder = next(result.folder.glob("*/artifacts"))
    # One warm-up, five repetitions, and the pass that looks at logits.
    assert any(line.endswith("(× 3500)") for line in journal.read_result(folder).log)


@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        ({"model": "fake:x=1"}, UsageError, "does not know the setting"),
        ({"prompt_tokens": 900_000, "output_tokens": 200_000}, UsageError, "is more than the context"),
        ({"batch_size": list(range(1, 2502)), "prompt_tokens": [1, 2]}, UsageError, "make 5002 cells"),
        ({"output_dir": "/proc/nowhere"}, JournalError, "Cannot write into the output folder"),
        ({"tracking_uri": "nonsense://x"}, TrackingError, "cannot be used"),
    ],
)
def test_what_cannot_work_is_said_before_anything_starts(
    store_uri: str, parameters: dict[str, Any], error: type[LlmbenchError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        run(**(FAST | {"model": "fake:"} | parameters))
    assert "\n" not in str(caught.value)
    client = MlflowClient(store_uri)
    assert client.search_runs([e.experiment_id for e in client.search_experiments()]) == []


def test_a_cell_that_cannot_fit_is_refused_before_loading(store_uri: str, cache_folder: Path) -> None:
    result = run(model="llama-2-13b", weights="random", quant="fp32", batch_size=64, prompt_tokens=1000)
    assert result.rows[0].outcome == "refused"
    assert "needs about" in result.rows[0].message and "force=true" in result.rows[0].message
    assert not list(cache_folder.glob("checkpoints/llama*"))
    found = MlflowClient(store_uri).get_run(result.run_ids[0])
    assert (found.info.status, found.data.tags["llmbench.outcome"]) == ("FAILED", "refused")


def test_only_the_cells_beyond_the_context_are_refused(store_uri: str, tiny_model: Path) -> None:
    result = run(model=str(tiny_model), prompt_tokens="16,300", output_tokens=4, repetitions=5, warmup=1)
    assert [row.outcome for row in result.rows] == ["ok", "refused"]
    assert "256 tokens" in result.rows[1].message


def test_cells_measured_before_an_interruption_are_kept(store_uri: str, tmp_path: Path) -> None:
    """The larger cell, measured first, is quick; the smaller one stalls for ten minutes at its second token.

    The signal arrives there.
    """
    script = "fake:ttft_ms=1+itl_ms=1+fail=hang+below_batch=2"
    command = [sys.executable, *"-m mlflow_llmbench run --backend fake --model".split(), script, "--batch-size", "1,2"]
    command += ["--output-tokens", "6", "--prompt-tokens", "4", "--repetitions", "5", "--warmup", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": store_uri}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while (
        not any(b'"event":"complete"' in f.read_bytes() for f in tmp_path.glob("llmbench-results/*/*/events.jsonl"))
        and time.monotonic() < deadline
    ):
        time.sleep(0.1)
    for _ in range(3):  # an impatient user
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 130, errors
    client = MlflowClient(store_uri)
    runs = client.search_runs(
        [e.experiment_id for e in client.search_experiments()], "tags.`mlflow.parentRunId` != 'x'"
    )
    states = {r.data.params["batch_size"]: (r.info.status, r.data.tags["llmbench.outcome"]) for r in runs}
    assert states == {"2": ("FINISHED", "ok"), "1": ("KILLED", "interrupted")}
    assert "latency/ttft_ms_mean" in next(r for r in runs if r.data.params["batch_size"] == "2").data.metrics


@pytest.mark.parametrize("how", ["SIGTERM", "SIGHUP"])
def test_interrupting_keeps_what_is_known_and_ends_every_run(store_uri: str, tmp_path: Path, how: str) -> None:
    command = [
        sys.executable,
        *"-m mlflow_llmbench run --backend fake --model fake:ttft_ms=1+itl_ms=200".split(),
        *"--batch-size 1,2 --repetitions 5".split(),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": store_uri}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("llmbench-results/*/*/events.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(getattr(signal, how))
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 130, errors
    client = MlflowClient(store_uri)
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert {r.info.status for r in runs} == {"KILLED"}
    assert {r.data.tags.get("llmbench.outcome") for r in runs} == {"interrupted", None}
    assert "Traceback" not in errors
    assert "interrupted" in output


def test_json_files_are_strict(store_uri: str) -> None:
    result = fake("ttft_ms=0+itl_ms=0")
    for file in result.folder.rglob("*.json"):
        assert not {"NaN", "Infinity", "-Infinity"} & set(constants_of(file.read_text()))


def constants_of(text: str) -> list[str]:
    """Return the constants in a JSON text that standard JSON does not allow."""
    found: list[str] = []
    json.loads(text, parse_constant=found.append)
    return found


def test_two_names_of_one_configuration_are_refused(store_uri: str, tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "copy" / tiny_model.name)
    with pytest.raises(UsageError, match="are the same model"):
        run(model=[str(tiny_model), str(tmp_path / "copy" / tiny_model.name)], prompt_tokens=8, output_tokens=2)


def test_a_worker_that_hangs_is_ended_and_the_cell_is_a_timeout(tmp_path: Path) -> None:
    from mlflow_llmbench.backends.fake import FakeBackend
    from mlflow_llmbench.measure.supervise import Limits, run_worker
    from mlflow_llmbench.measure.task import WorkerJob
    from mlflow_llmbench.records.cell import Cell

    cell = Cell(model="fake:fail=hang", backend="fake")
    outcome = run_worker(
        WorkerJob("measure", (cell,), FakeBackend.resolve(cell), (tmp_path,)),
        tmp_path / "worker.log",
        limits=Limits(first_token_s=3.0),
    )
    assert getattr(outcome.error, "outcome", None) == "timeout"
    assert "at stage loaded: bringing a first token took more than first_token_timeout_s=3." in str(outcome.error)


@pytest.mark.slow
def test_a_smaller_cell_does_not_inherit_the_memory_of_a_larger_one(store_uri: str, tiny_model: Path) -> None:
    """Measure alone and after a large cell, interleaved.

    Allocator noise is some MB, the large cell's prefill over a hundred.
    """
    small = {
        "model": str(tiny_model),
        "quant": "fp32",
        "output_tokens": 2,
        "prompt_tokens": 8,
        "repetitions": 5,
        "warmup": 1,
    }
    alone = run(**small, batch_size="1").rows[0].metrics
    after = run(**small | {"prompt_tokens": "8,200"}, batch_size="1,256").rows
    [same] = [row.metrics for row in after if row.cell.batch_size == 1 and row.cell.prompt_tokens == 8]
    [large] = [row.metrics for row in after if row.cell.batch_size == 256 and row.cell.prompt_tokens == 200]
    key = "memory/host_needed_gb_peak"
    assert large[key] - alone[key] > 0.06
    assert same[key] - alone[key] < (large[key] - alone[key]) / 2
