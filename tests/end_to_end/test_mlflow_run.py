"""The project through the real `mlflow run`, as the README and docs/measure.md show it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

ROOT = Path(__file__).resolve().parents[2]
SHORT = {"prompt_tokens": "8", "output_tokens": "4", "warmup": "1", "repetitions": "5"}


def mlflow_run(
    store_uri: str, folder: Path, entry: str = "main", **parameters: str
) -> subprocess.CompletedProcess[str]:
    where = {} if entry in ("recommend", "register", "gate", "reproduce") else {"output_dir": f"{folder}/results"}
    given = [part for name, value in (where | parameters).items() for part in ("-P", f"{name}={value}")]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "MLFLOW_TRACKING_URI": store_uri}
    command = [sys.executable, "-m", "mlflow", "run", str(ROOT), "--env-manager", "local", "-e", entry, *given]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_a_single_configuration_is_the_projects_own_run(store_uri: str, tmp_path: Path, tiny_model: Path) -> None:
    done = mlflow_run(store_uri, tmp_path, model=str(tiny_model), quant="int8", **SHORT)
    assert done.returncode == 0, done.stderr[-2000:]
    client = MlflowClient(store_uri)
    [found] = client.search_runs(["0"])
    assert found.info.status == "FINISHED"
    assert found.data.tags["mlflow.source.type"] == "PROJECT"
    assert found.data.params["quant"] == "int8"
    assert found.data.params["quant.method"] == "bitsandbytes"
    assert found.data.metrics["latency/ttft_ms_mean"] > 0
    assert "Traceback" not in done.stderr


@pytest.mark.charts
def test_a_list_makes_the_projects_run_the_parent(store_uri: str, tmp_path: Path) -> None:
    done = mlflow_run(store_uri, tmp_path, backend="fake", model="fake:ttft_ms=2+itl_ms=1", batch_size="1,2", **SHORT)
    assert done.returncode == 0, done.stderr[-2000:]
    runs = MlflowClient(store_uri).search_runs(["0"])
    [parent] = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
    children = [r for r in runs if r is not parent]
    assert sorted(r.info.run_name.rpartition(" ")[2] for r in children) == ["b1", "b2"]
    assert {r.data.tags["mlflow.parentRunId"] for r in children} == {parent.info.run_id}
    assert {r.info.status for r in runs} == {"FINISHED"}
    assert parent.data.params["batch_size"] == "1,2"
    heading = next(line for line in done.stdout.splitlines() if line.startswith("batch_size"))
    assert "tokens/s" in heading


def test_a_study_stays_with_the_projects_run(store_uri: str, tmp_path: Path) -> None:
    model = "fake:ttft_ms=4+itl_ms=1+row_ms=1"
    done = mlflow_run(
        store_uri,
        tmp_path,
        "study",
        backend="fake",
        model=model,
        batch_size="1,2",
        prompt_tokens="8",
        output_tokens="4",
        warmup="1",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    client = MlflowClient(store_uri)
    [parent] = [run for run in client.search_runs(["0"]) if "mlflow.parentRunId" not in run.data.tags]
    assert parent.info.status == "FINISHED"
    assert parent.data.params["of"] == "none" and parent.data.params["preset"] == "quick"
    assert "study/report.html" in {item.path for item in client.list_artifacts(parent.info.run_id, "study")}


def test_a_quickstart_is_the_projects_run_and_keeps_its_recommendation(store_uri: str, tmp_path: Path) -> None:
    done = mlflow_run(store_uri, tmp_path, "quickstart", backend="fake", model="fake:ttft_ms=2+itl_ms=1")
    assert done.returncode == 0, done.stderr[-2000:]
    client = MlflowClient(store_uri)
    [parent] = [run for run in client.search_runs(["0"]) if "mlflow.parentRunId" not in run.data.tags]
    assert (parent.info.status, parent.data.params["quant"]) == ("FINISHED", "auto")
    assert "recommendation.md" in {item.path for item in client.list_artifacts(parent.info.run_id)}
    assert f"compare {parent.data.tags['llmbench.sweep']}" in done.stdout


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("quant", "int44", "Did you mean int4?"), ("batch_size", "abc", "batch_size is not a whole number: abc")],
)
def test_a_bad_parameter_fails_the_run_with_one_line(
    store_uri: str, tmp_path: Path, name: str, value: str, message: str
) -> None:
    done = mlflow_run(store_uri, tmp_path, **{name: value})
    assert done.returncode == 1
    assert message in done.stderr
    [found] = MlflowClient(store_uri).search_runs(["0"])
    assert found.info.status == "FAILED"


@pytest.mark.slow
def test_the_decision_by_entry_points(store_uri: str, tmp_path: Path) -> None:
    """Recommend, register, gate, reproduce; each also saves its outcome in the project's own run."""
    client = MlflowClient(store_uri)

    def entry(name: str, /, code: int = 0, **parameters: str) -> Run:
        done = mlflow_run(store_uri, tmp_path, name, **parameters)
        assert done.returncode == code, done.stdout[-2000:] + done.stderr[-2000:]
        return client.search_runs(
            ["0"], "tags.`mlflow.project.entryPoint` = '" + name + "'", order_by=["attributes.start_time DESC"]
        )[0]

    model = "fake:ttft_ms=20+itl_ms=10"
    swept = entry(
        "main",
        backend="fake",
        model=model,
        batch_size="1,2",
        **SHORT,
    )
    chosen = entry("recommend", sweep=swept.info.run_id, max_ttft="1s", accept_suspect="busy")
    assert "recommendation.json" in {item.path for item in client.list_artifacts(chosen.info.run_id)}
    entry("register", run=swept.info.run_id, name="bot", accept_suspect="busy")
    gated = entry(
        "gate",
        candidate="models:/bot@candidate",
        against="models:/bot/1",
        pairs="3",
        default_limit="60%",
        accept_suspect="busy",
    )
    assert (gated.data.tags["llmbench.gate"], gated.data.tags["llmbench.gate_against"]) == ("pass", "models:/bot/1")
    assert gated.data.tags["llmbench.gate_measured"] == gated.info.run_id  # what was measured for it are its children
    again = entry("reproduce", run="models:/bot@candidate", margin="90%")
    assert again.data.tags["llmbench.reproduction"] == "equivalent"
    assert again.data.tags["llmbench.reproduces"] == client.get_model_version("bot", "1").run_id
