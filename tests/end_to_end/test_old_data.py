"""Results of schema 1, measured by an earlier version of this package, are read, uploaded, resumed and served today.

tests/golden/schema1/README.md says how the data were made. Nothing in them is written by the code under test.
"""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
import tarfile
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from mlflow_llmbench import run
from mlflow_llmbench.cli.main import main
from mlflow_llmbench.sweeps.upload import upload
from mlflow_llmbench.system.machine import fingerprint
from mlflow_llmbench.tracking.load_results import load_results

DATA = Path(__file__).resolve().parent.parent / "golden" / "schema1" / "data.tar.xz"
PLACEHOLDER = "/placeholder"
"""Folder in the data that stands for the one in which they were made."""

OLD_ENVIRONMENT = "9f5a877a767a7234"
"""Hash of the machine and software that the data were measured with."""

FAILED_CELL, VALID, STREAM, SERVER, TINY, KILLED = (
    "20261130T022831Z-08a238",
    "20261130T022859Z-2e4ba4",
    "20261130T022921Z-6f3fa8",
    "20261130T023002Z-955772",
    "20261130T023030Z-bf5c0f",
    "20261130T025102Z-31afaa",
)
"""Sweeps in the data. The command of the last one was killed before it could upload anything."""

OF_UPLOAD = re.compile(
    r"llmbench\.(?!gate|registered|schema|mlflow_llmbench|bitsandbytes|optimum|gptqmodel|torchao|hqq)"
)
"""Our tags, without those that register and gate add to a run later, and those that schema 2 has another name for."""

BUSY = ("--accept-suspect", "the data were measured on a busy machine")
CELL = {"backend": "fake", "prompt_tokens": 4, "output_tokens": 6, "repetitions": 5, "warmup": 1, "threads": 1}


def unpack(folder: Path, environment: str = OLD_ENVIRONMENT) -> None:
    """Unpack the data: results, artifacts, a model, and the store as `mlflow.db`.

    Paths become those of `folder`. With `environment`, the hash of the machine is replaced, as if the data had been
    measured on a machine with that one.
    """

    def moved(text: str) -> str:
        return text.replace(PLACEHOLDER, str(folder)).replace(OLD_ENVIRONMENT, environment)

    with tarfile.open(DATA) as archive:
        archive.extractall(folder, filter="data")
    for file in (folder / "old").rglob("*"):
        if file.suffix in (".json", ".jsonl", ".yaml", ".md", ".sql") or file.name == "MLmodel":
            file.write_text(moved(file.read_text(encoding="utf-8")), encoding="utf-8")
    for entry in (folder / "old").iterdir():
        entry.rename(folder / entry.name)
    with sqlite3.connect(folder / "mlflow.db") as store:
        store.executescript((folder / "store.sql").read_text(encoding="utf-8"))


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """The data in the test's folder: its default store and its results folder."""
    unpack(tmp_path)
    mlflow.set_tracking_uri(None)
    return tmp_path


@pytest.fixture
def fresh_uri(store_template: Path, tmp_path: Path) -> str:
    """An empty store."""
    shutil.copy(store_template, tmp_path / "fresh.db")
    return f"sqlite:///{tmp_path}/fresh.db"


def runs_of(uri: str, sweep: str) -> dict[str, Run]:
    """Run name → run."""
    client = MlflowClient(uri)
    experiments = [one.experiment_id for one in client.search_experiments()]
    found = client.search_runs(experiments, f"tags.`llmbench.sweep` = '{sweep}'")
    return {str(one.info.run_name): one for one in found}


NEWER = {
    "tensor_parallel": "1", "placement": "single", "ignore_eos": "auto", "max_tokens_field": "auto", "temperature": "0",
}  # fmt: skip
"""Parameters that the old version did not have, with their defaults."""


def of_schema_2(key: str) -> tuple[str, float]:
    """The present key of a metric of schema 1, and how many of its units make one of the present."""
    if key.startswith(("memory/", "steps/host_rss", "steps/device")) and key != "memory/kv_bytes_per_token":
        return key.replace("_bytes", "_gb"), 1e9
    return key.replace("config/", "settings/"), 1.0


def store_of(folder: Path) -> str:
    return f"sqlite:///{folder}/mlflow.db"


def champion_run(folder: Path) -> str:
    return str(MlflowClient(store_of(folder)).get_model_version_by_alias("bot", "champion").run_id)


def last_json(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


@pytest.mark.parametrize("sweep", [FAILED_CELL, VALID, STREAM, SERVER, TINY])
def test_an_old_folder_uploads_to_the_runs_that_it_had(old: Path, fresh_uri: str, sweep: str) -> None:
    """Params, metrics, their histories and our tags are those that the old version uploaded, by their new names."""
    before = runs_of(store_of(old), sweep)
    done = upload(str(old / "llmbench-results" / sweep), fresh_uri)
    after = runs_of(fresh_uri, sweep)
    assert done.new == len(before) == len(after)
    clients = MlflowClient(store_of(old)), MlflowClient(fresh_uri)
    for name, one in before.items():
        other = after[name]
        assert other.info.status == one.info.status
        newer = {name: value for name, value in other.data.params.items() if name not in one.data.params}
        assert newer.items() <= NEWER.items()
        kept = {name: value for name, value in other.data.params.items() if name not in newer}
        assert kept.items() <= one.data.params.items()  # those that mean something in the cell
        assert {"model", "backend"} <= other.data.params.keys()
        for key in one.data.metrics:
            now, unit = of_schema_2(key)
            histories = [
                [(m.step, m.value / scale, m.timestamp) for m in client.get_metric_history(of.info.run_id, called)]
                for client, of, called, scale in zip(clients, (one, other), (key, now), (unit, 1), strict=True)
            ]
            assert histories[0] == histories[1]
        assert one.data.tags["llmbench.schema"] == "1" and other.data.tags["llmbench.schema"] == "2"
        tags = {key: value for key, value in one.data.tags.items() if OF_UPLOAD.match(key)}
        assert other.data.tags.items() >= tags.items()


@pytest.mark.charts
def test_what_a_killed_command_had_measured_is_recovered_from_its_journal(old: Path, fresh_uri: str) -> None:
    folder = old / "llmbench-results" / KILLED
    assert not list(folder.glob("*/artifacts"))
    assert upload(str(folder), fresh_uri).new == 3
    found = runs_of(fresh_uri, KILLED)
    states = {name: (one.info.status, one.data.tags.get("llmbench.outcome")) for name, one in found.items()}
    assert states["batch_size=2"] == ("FINISHED", "ok")
    assert states["batch_size=1"] == ("FAILED", "crashed")
    measured = found["batch_size=2"].data
    assert measured.metrics["trust/repetitions"] == 5
    assert measured.metrics["latency/ttft_ms_p50"] == pytest.approx(20, abs=5)
    assert upload(str(folder), fresh_uri).there == 3


def test_old_results_are_compared_by_folder_and_by_run(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = runs_of(store_of(old), VALID)
    assert main(["compare", cells["batch_size=1"].info.run_id, cells["batch_size=2"].info.run_id, "--json"]) == 0
    by_run = last_json(capsys)
    folders = {one.cell.batch_size: one for one in load_results(str(old / "llmbench-results" / VALID))}
    names = [f"llmbench-results/{VALID}/{folders[rows].hashes.config}" for rows in (1, 2)]
    assert main(["compare", *names, "--json"]) == 0
    assert last_json(capsys) == by_run


def test_a_configuration_is_recommended_from_old_results(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recommend", VALID, "--json"]) == 0
    assert last_json(capsys)["winner"]["parameters"]["batch_size"] == 2
    assert main(["recommend", TINY, *BUSY, "--min-quality", "kl=0.05", "--json"]) == 0
    assert last_json(capsys)["winner"]["parameters"]["quant"] == "bf16"


@pytest.mark.parametrize("source", ["journal", "store"])
def test_old_results_are_not_measured_again(tmp_path: Path, source: str) -> None:
    """The hashes of configuration and workload are those of today; that of the machine is set to this one's."""
    unpack(tmp_path, fingerprint()["hashes"]["env"])
    if source == "store":
        shutil.rmtree(tmp_path / "llmbench-results")
    old_runs = {name: one.info.run_id for name, one in runs_of(store_of(tmp_path), VALID).items()}
    done = run(model="fake:ttft_ms=20+itl_ms=10", batch_size="1,2", **CELL, tracking_uri=store_of(tmp_path))
    assert [row.linked for row in done.rows] == [old_runs[f"batch_size={row.cell.batch_size}"] for row in done.rows]
    assert not list(done.folder.glob("*/worker.jsonl"))


@pytest.mark.filterwarnings("ignore:.*type hint:UserWarning")  # of mlflow.pyfunc, when it is imported
def test_a_registered_version_of_old_answers(old: Path) -> None:
    model = mlflow.pyfunc.load_model("models:/bot@champion")
    first = model.predict([{"prompt": "One two"}, {"prompt": "Three"}], params={"max_new_tokens": 5})
    assert [answer["prompt_tokens"] for answer in first] == [7, 5]
    assert all(1 <= answer["output_tokens"] <= 5 for answer in first)
    inner = model.unwrap_python_model()
    assert inner.config["quantization"] == {
        "class": "BitsAndBytesConfig",
        "load_in_8bit": True,
        "llm_int8_threshold": 6.0,
    }


@pytest.mark.parametrize("target", ["transformers", "docker-compose"])
def test_a_registered_version_of_old_is_exported(old: Path, capsys: pytest.CaptureFixture[str], target: str) -> None:
    assert main(["export", "models:/bot@champion", "--for", target]) == 0
    assert str(old / "tiny-llama") in capsys.readouterr().out


def test_a_registered_version_of_old_is_known_as_the_evidence_of_its_own_run(
    old: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The candidate is the champion's own run, from which no verdict follows."""
    asked = ["gate", champion_run(old), "--against", "models:/bot@champion", "--default-limit", "500%", *BUSY, "--json"]
    assert main(asked) == 2
    found = last_json(capsys)
    assert found["verdict"] == "not_comparable"
    assert found["why"].startswith("Both sides are the same evidence")


@pytest.mark.slow
def test_a_registered_version_of_old_is_reproduced(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its configuration is measured again: configuration and workload have the hashes of the old run."""
    main(["reproduce", "models:/bot@champion", "--json"])  # its speed depends on this machine, and so does the verdict
    again, client = last_json(capsys)["run_id"], MlflowClient(store_of(old))
    before = client.get_run(champion_run(old)).data.tags
    after = client.get_run(again).data.tags
    assert before["llmbench.reproduced_by"] == again
    assert after["llmbench.outcome"] == "ok"
    for name in ("llmbench.config_hash", "llmbench.workload_hash"):
        assert after[name] == before[name]
