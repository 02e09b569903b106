"""A store that is away, slow, or lacks what its clients need is told at once, whoever names it."""

from __future__ import annotations

import http.server
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mlflow_llmbench import run
from mlflow_llmbench.cli.main import main
from mlflow_llmbench.records.errors import TrackingError
from mlflow_llmbench.tracking.reach import answers, patience_s, require_artifact_store, set_limits, without_user
from tests.servers import serving

DEAD = "http://127.0.0.1:1"
SMALL = {"backend": "fake", "model": "fake:ttft_ms=1", "prompt_tokens": 2, "output_tokens": 2, "warmup": 1}


@contextmanager
def late_server(after_s: float) -> Iterator[str]:
    """A server that answers each request some time after it came."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            time.sleep(after_s)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with serving(Handler) as address:
        yield address


@contextmanager
def silent_server() -> Iterator[tuple[str, list[int]]]:
    """A server that accepts connections and never answers; and how many it has accepted."""
    accepted, kept = [0], list[socket.socket]()
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def accept() -> None:
            while True:
                try:
                    kept.append(listening.accept()[0])
                except OSError:
                    return
                accepted[0] += 1

        thread = threading.Thread(target=accept)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", accepted
        listening.shutdown(socket.SHUT_RDWR)
        thread.join()
    for one in kept:
        one.close()


@pytest.mark.parametrize("command", ["upload absent", "register x --name y", "promote z", "export z --for vllm"])
def test_a_dead_server_of_the_environment_is_told_before_anything_else(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", DEAD)
    assert main(command.split()) == 1
    told = f"llmbench: The MLflow server {DEAD} does not answer. Check the address and that it runs.\n"
    assert capsys.readouterr().err == told


def test_a_command_that_measures_tells_a_dead_server_of_the_environment_before_it_plans(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", DEAD)
    assert main(["run", "--backend", "fake", "--model", "fake:unknown=1"]) != 0
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"The MLflow server {DEAD} does not answer. Measuring all the same")
    assert second.startswith("llmbench: ")
    assert main(["qat", "--model", "absent"]) == 1  # it cannot go on without a store, and does not say so
    assert "Measuring all the same" not in capsys.readouterr().err


def test_a_command_that_needs_no_store_does_not_look_at_the_environments(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], store_uri: str
) -> None:
    folders = [str(run(tracking_uri=store_uri, repetitions=3, rerun=True, **SMALL).folder) for _ in range(2)]
    capsys.readouterr()
    with silent_server() as (address, accepted):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        main(["compare", *folders])
        main(["plan", "--backend", "fake", "--model", "fake:ttft_ms=1"])
    out, err = capsys.readouterr()
    assert accepted == [0] and "does not answer" not in out + err


def test_a_slow_server_answers_and_one_that_is_slower_than_mlflows_limit_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with late_server(0.5) as address:
        assert answers(address)
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "0.05")
        assert not answers(address)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "soon")
    assert patience_s() == 10.0


def test_an_address_without_its_user_keeps_its_slashes() -> None:
    assert without_user("sqlite:////tmp/mlflow.db") == "sqlite:////tmp/mlflow.db"
    assert without_user("https://u:p@host:5000/a//b") == "https://host:5000/a//b"


def test_limits_that_the_user_has_set_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "7")
    set_limits()
    assert os.environ["AWS_MAX_ATTEMPTS"] == "7" and os.environ["AWS_DEFAULTS_MODE"] == "standard"


def test_a_server_that_hangs_is_asked_at_the_start_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "0.2")
    with silent_server() as (address, accepted):
        done = run(tracking_uri=address, threads="1,2,3", repetitions=3, **SMALL)
    assert (done.outcome, done.exit_code) == ("ok", 1)
    assert accepted == [2]


@pytest.mark.parametrize("scheme", ["postgresql", "postgresql+psycopg2", "mysql+pymysql", "mssql+pyodbc"])
def test_a_database_that_is_away_is_told_at_once(
    scheme: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """MLflow would try ten times, for 100 s; no driver is asked here, and the password is not shown."""
    address = f"{scheme}://me:a-password@127.0.0.1:1/runs"
    assert main(["upload", "absent", "--tracking-uri", address]) == 1
    shown = address.replace("me:a-password", "***")
    told = f"llmbench: The MLflow server {shown} does not answer. Check the address and that it runs.\n"
    assert capsys.readouterr().err == told


def test_a_database_that_listens_answers() -> None:
    with silent_server() as (address, _):
        place = address.removeprefix("http://")
        assert answers(f"postgresql://{place}/runs")
    assert answers("mssql+pyodbc:///?odbc_connect=DRIVER")  # its address does not say where it is
    assert answers("postgresql://host:port/runs")  # the driver has a better message


@pytest.mark.parametrize("module", ["boto3", "google.cloud.storage", "azure.storage.blob"])
def test_a_package_of_an_object_store_that_lacks_is_named(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    places = {"boto3": "s3://b/x", "google.cloud.storage": "gs://b/x", "azure.storage.blob": "wasbs://a.net/x"}
    for name in ("boto3", "google", "azure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(TrackingError) as raised:
        require_artifact_store(places[module])
    package = {"google.cloud.storage": "google-cloud-storage", "azure.storage.blob": "azure-storage-blob"}
    assert str(raised.value) == (
        f"The artifacts of this experiment are kept in {places[module]}, and are written there by this process: "
        f"the package {module} is not installed. Run: pip install {package.get(module, module)}"
    )
    require_artifact_store("mlflow-artifacts:/1")  # the server keeps them


def test_an_experiment_on_an_object_store_is_refused_at_once_without_its_package(
    store_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    MlflowClient(store_uri).create_experiment("far", artifact_location="s3://bucket/far")
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(TrackingError, match="kept in s3://bucket/far.*boto3 is not installed"):
        run(tracking_uri=store_uri, experiment="far", **SMALL)
    assert not Path("llmbench-results").exists()
