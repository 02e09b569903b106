"""What a user is told of a store that cannot be used: one line, at once, with MLflow's own advice."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mlflow_llmbench.cli.main import main
from mlflow_llmbench.records.errors import StoreAway, TrackingError
from mlflow_llmbench.tracking.reach import AWAY, is_told, told_at_once
from mlflow_llmbench.tracking.store import open_store
from mlflow_llmbench.workflows.reproduce import find_original

from ..results import made, write_sweep

DEAD = "http://127.0.0.1:1"
FAST = (
    "run --backend fake --model fake:ttft_ms=1 --repetitions 1 --warmup 1 --prompt-tokens 2 --output-tokens 2".split()
)


@contextmanager
def refusing_server(status: int) -> Iterator[str]:
    """A server that refuses each request as MLflow's does, with this status."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b"You are not authenticated. Please see https://www.mlflow.org/docs/latest/auth/index.html."
            self.rfile.read(int(self.headers.get("content-length") or 0))
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST: Callable[..., None] = do_GET

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (401, "it asks for a user (401 Unauthorized). Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or"),
        (403, "your user may not do this (403 Forbidden). Ask for the permission, or set MLFLOW_TRACKING_USERNAME and"),
    ],
)
def test_a_server_that_wants_a_user(status: int, told: str) -> None:
    with refusing_server(status) as address, pytest.raises(TrackingError) as raised:
        open_store(address)
    assert str(raised.value).startswith(f"The MLflow store {address} cannot be used: {told}")


@pytest.mark.parametrize(
    ("uri", "advice"),
    [
        ("file://{}/store", "set `MLFLOW_ALLOW_FILE_STORE=true` to opt out of this exception."),
        ("foo://{}", "Supported URI schemes are: "),
        ("databricks-uc", "Please specify a different tracking URI"),
    ],
)
def test_the_advice_of_mlflow_is_not_cut_off(
    uri: str, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    with pytest.raises(TrackingError) as raised:
        open_store(uri.format(tmp_path))
    assert advice in str(raised.value)
    assert "Check the address" not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_dead_server_is_told_before_anything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    told = f"llmbench: The MLflow server {DEAD} does not answer. Check the address and that it runs.\n"
    for arguments in (["upload", "absent"], ["compare", "a", "b"], ["register", "x", "--name", "y"], ["promote", "z"]):
        assert main([*arguments, "--tracking-uri", DEAD]) == 1
        assert capsys.readouterr().err == told
    assert main(["run", "--backend", "fake", "--model", "fake:unknown=1", "--tracking-uri", DEAD]) != 0
    first, *rest = capsys.readouterr().err.splitlines()
    assert first.startswith(f"The MLflow server {DEAD} does not answer. Measuring all the same")
    assert len(rest) == 1


def test_no_line_is_printed_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*FAST, "--tracking-uri", DEAD]) == 1
    out, err = capsys.readouterr()
    lines = [line for line in (out + err).splitlines() if "answer" in line or "ploaded" in line]
    assert len(lines) == len(set(lines))
    assert len([line for line in lines if "Measuring all the same" in line]) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        "recommend latest",
        "compare latest",
        "scaling latest",
        "study --of latest",
        "register --name bot",
        "recommend 20260101T000000Z-aaaaaa",
        "recommend FOLDER",
        "gate FOLDER --against models:/bot@champion",
        "promote models:/bot@candidate",
        "export models:/bot@champion --for vllm",
    ],
)
def test_a_command_that_reads_makes_no_database(
    arguments: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_sweep(tmp_path / "sweep", [made()])
    uri = f"sqlite:///{tmp_path}/none.db"
    words = [str(folder) if word == "FOLDER" else word for word in arguments.split()]
    assert main([*words, "--tracking-uri", uri]) in (1, 4)
    told = (
        f"There is no MLflow store at {uri}. Check --tracking-uri, or measure first: "
        f"`llmbench quickstart --tracking-uri {uri}`."
    )
    assert capsys.readouterr().err == f"llmbench: {told}\n"
    assert not (tmp_path / "none.db").exists()


@pytest.mark.parametrize("arguments", ["recommend FOLDER", "compare FOLDER", "scaling FOLDER", "study --of FOLDER"])
def test_a_command_over_files_makes_no_database_by_default(
    arguments: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    folder = write_sweep(tmp_path / "sweep", [made("int8"), made("int4")])
    assert main([str(folder) if word == "FOLDER" else word for word in arguments.split()]) in (0, 1, 2)
    assert "Traceback" not in capsys.readouterr().err
    assert find_original(str(write_sweep(tmp_path / "one", [made()]))).run_id is None
    assert not (tmp_path / "mlflow.db").exists()


def test_what_was_told_is_known_within_the_command_only() -> None:
    away = StoreAway(AWAY.format(DEAD))
    told: list[str] = []
    with told_at_once(DEAD, told.append):
        assert is_told(away) and len(told) == 1
        assert not is_told(StoreAway(AWAY.format("http://other")))
    assert not is_told(away)
    with told_at_once(None, None):
        assert not is_told(away)
