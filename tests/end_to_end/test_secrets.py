"""Planted secrets must appear nowhere that a command writes: real commands, real workers, real stores."""

from __future__ import annotations

import base64
import gzip
import html
import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from mlflow import MlflowClient

from mlflow_llmbench.cli.main import main
from mlflow_llmbench.sweeps.upload import recover
from tests.end_to_end.test_survival import free_port, mlflow_server

ROOT = Path(__file__).resolve().parents[2]
FAST = ("--output-tokens", "3", "--prompt-tokens", "auto", "--repetitions", "5", "--warmup", "1")

BACKEND = '''
"""A leaky backend: all that it prints, logs, warns of, returns and raises contains the text of a file."""

import json, logging, os, pathlib, sys, warnings
from dataclasses import replace
from mlflow_llmbench.backends.fake import FakeBackend
from mlflow_llmbench.records.results import ModelFacts

FOLDER = pathlib.Path(os.environ["LLMBENCH_TEST_FOLDER"])
LEAK = (FOLDER / "planted.txt").read_text()


def tell(task):
    (FOLDER / f"{task}.json").write_text(json.dumps(dict(os.environ)))


class Leaky(FakeBackend):
    def __init__(self, cell, model):
        super().__init__(replace(cell, model="fake"), model)
        self.cell = cell

    @classmethod
    def resolve(cls, cell):
        location = f"{cell.model} {LEAK}"
        facts = ModelFacts(name=cell.model, source="hub", location=location, revision="1", config={"why": LEAK})
        return replace(facts, context=100000, dtype="float32")

    @classmethod
    def is_prepared(cls, cell, model):
        return False

    @classmethod
    def prepare(cls, cell, model):
        tell("prepare")
        print(LEAK)

    def load(self):
        tell("measure")
        print(LEAK)
        os.write(2, LEAK.encode())
        logging.getLogger("some.library").warning("asked with %s", LEAK)
        logging.getLogger("some.library").warning(LEAK)
        warnings.warn(LEAK)
        return super().load()

    def describe(self):
        return replace(super().describe(), facts={"model.license": LEAK[:3000]})

    def decode(self, ids):
        return LEAK

    def generate(self, prompts, output_tokens, emit):
        if "fails" in self.cell.model:
            raise RuntimeError(" ".join(LEAK.split()))
        if "crashes" in self.cell.model:
            sys.stderr.write(" ".join(LEAK.split()))
            sys.stderr.flush()
            os._exit(7)
        super().generate(prompts, output_tokens, emit)
'''

VARIABLES = {
    "MLFLOW_TRACKING_PASSWORD": "canary-01-Mlflow",
    "MLFLOW_TRACKING_TOKEN": "canary-02-Token",
    "AWS_SECRET_ACCESS_KEY": "canary/03+Aws/Secret",
    "AWS_SESSION_TOKEN": "canary04AwsSession==",
    "AZURE_STORAGE_CONNECTION_STRING": "AccountName=x;AccountKey=canary05Azure==",
    "OPENAI_API_KEY": "canary-06-openai",
    "GITHUB_TOKEN": "canary-07-github",
    "DATABRICKS_TOKEN": "canary-08-databricks",
    "MY_DB_PASSWD": "canary 09 with 'quotes' and \"spaces\"",
    "HF_TOKEN": "canary-10-hub",
    "DATABASE_URL": "postgresql://svc:canary-11/of@db@db.example/x",
    "HTTP_PROXY": "http://me:canary-12-proxy@proxy.example:3128",
    "PIP_INDEX_URL": "https://canary-13-index@pip.example/simple",
}
TEXTS = (
    "headers={'Authorization': 'Bearer canary-14.bearer'}",
    f"Authorization: Basic {base64.b64encode(b'user:canary-15').decode()}",
    "x-api-key: canary-16-header",
    "GET https://bucket.s3.example/k?X-Amz-Credential=canary17&X-Amz-Signature=canary18 403",
    "https://account.blob.example/c?sv=2024&sig=canary19%3D&se=1",
    "The token hf_Canary20ABCDEFG is not valid",
    "mlflow+https://user:canary-21@mlflow.example/api",
    "connect to postgresql://svc:canary-11/of@db@db.example/x",
    "via http://me:canary-12-proxy@proxy.example:3128",
    "index https://canary-13-index@pip.example/simple",
)
FILES = {
    "hub/token": "canary-22-tokenfile",
    "hub/stored_tokens": "[a]\nhf_token = canary-23-stored\n",
    "home/.mlflow/credentials": (
        "[mlflow]\nmlflow_tracking_username = me\nmlflow_tracking_password = canary-24-file\n"
    ),
}
CANARIES = [
    value
    for name, value in VARIABLES.items()
    if name not in ("DATABASE_URL", "HTTP_PROXY", "PIP_INDEX_URL", "AZURE_STORAGE_CONNECTION_STRING")
]
CANARIES += [
    "canary-11/of@db",
    "of@db@",
    "canary-12-proxy",
    "canary-13-index",
    "canary05Azure",
    "canary-14.bearer",
    base64.b64encode(b"user:canary-15").decode(),
]
CANARIES += [
    "canary-16-header",
    "canary17",
    "canary18",
    "canary19",
    "hf_Canary20",
    "canary-21",
    "canary-22-tokenfile",
    "canary-23-stored",
    "canary-24-file",
]


@pytest.fixture
def planted(tmp_path: Path) -> dict[str, str]:
    """An environment full of secrets, in which an installed package declares the backend `leaky`."""
    site = tmp_path / "site"
    (site / "leaky-1.0.dist-info").mkdir(parents=True)
    (site / "leaky.py").write_text(BACKEND)
    (site / "leaky-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: leaky\nVersion: 1.0\n")
    (site / "leaky-1.0.dist-info" / "entry_points.txt").write_text("[mlflow_llmbench.backends]\nleaky = leaky:Leaky\n")
    known = [
        *VARIABLES.values(),
        "canary-22-tokenfile",
        "canary-23-stored",
        "canary-24-file",
        quote(VARIABLES["MY_DB_PASSWD"]),
    ]
    for file, text in {**FILES, "planted/planted.txt": "\n".join([*TEXTS, *known])}.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    kept = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    return {
        **kept,
        **VARIABLES,
        "HOME": str(tmp_path / "home"),
        "HF_HOME": str(tmp_path / "hub"),
        "LLMBENCH_TEST_FOLDER": str(tmp_path / "planted"),
        "PYTHONPATH": f"{site}{os.pathsep}{ROOT}",
        "no_proxy": "*",
        "OMP_NUM_THREADS": "1",
    }


def llmbench(environment: dict[str, str], folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mlflow_llmbench", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )


def places(text: str | bytes, canaries: list[str]) -> list[str]:
    """The planted secrets in a text, verbatim, in an address or in JSON."""
    content = text.encode(errors="surrogateescape") if isinstance(text, str) else text
    spellings = {canary: {canary, quote(canary, safe=""), json.dumps(canary)[1:-1]} for canary in canaries}
    return [canary for canary, found in spellings.items() if any(one.encode() in content for one in found)]


def found_in(folder: Path, canaries: list[str]) -> dict[str, list[str]]:
    """File → planted secrets in it, for every file below a folder except the planted files."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file() and path.relative_to(folder).parts[0] not in ("site", "home", "hub", "planted", "project"):
            content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            found |= {str(path.relative_to(folder)): seen} if (seen := places(content, canaries)) else {}
    return found


def test_there_are_at_least_twenty() -> None:
    assert len(CANARIES) >= 20


@pytest.mark.charts
def test_planted_secrets_are_found_nowhere(
    store_uri: str,
    tmp_path: Path,
    planted: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name in [name for name in os.environ if name not in planted]:
        monkeypatch.delenv(name)
    for name, value in planted.items():
        monkeypatch.setenv(name, value)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(
        urllib.request, "_opener", None
    )  # urllib keeps the proxies of its first use, here the planted one, for the process
    prompts = tmp_path / "planted" / "prompts.jsonl"
    prompts.write_text('{"prompt": "Say something."}\n{"prompt": "And canary-07-github."}\n')
    models = "https://user:canary-21@host.example/m,./canary-06-openai/fails,crashes?sig=canary19"
    run = (
        "run",
        "--backend",
        "leaky",
        "--workload",
        str(prompts),
        "--tracking-uri",
        store_uri,
        "--output-dir",
        "results",
        *FAST,
        "--json",
    )
    assert main([*run, "--model", models]) == 1
    shown = capfd.readouterr()
    last = json.loads(shown.out.splitlines()[-1])
    assert [one["outcome"] for one in last["runs"]] == ["ok", "error", "crashed"], shown.err
    folder, parent = last["folder"], last["parent_run_id"]
    for code, arguments in (
        (0, ("upload", folder, "--tracking-uri", f"sqlite:///{tmp_path}/other.db")),
        (2, ("compare", folder, parent, "--log", parent, "--tracking-uri", store_uri)),
        (1, (*run, "--model", "one", "--tracking-uri", "http://user:canary-21@127.0.0.1:1")),
        (1, (*run, "--model", "one", "--tracking-uri", "ftp://user:canary-21@127.0.0.1:1")),
        (1, ("run", "--model", "https://user:canary-21@host.example/m")),
        (2, ("run", "--backend", "fake", "--model", "https://user:canary-21@host.example/m")),
        (2, ("run", "--quant", "canary-08-databricks", "--batch-size", "canary-08-databricks")),
        (2, ("run", "--model", "a" * 30 + "https://user:canary-21@host/" + "b" * 1000)),
        (1, ("compare", "https://user:canary-21@host.example/m", parent)),
    ):
        assert main(arguments) == code, arguments
    also = capfd.readouterr()
    hub = {**planted, "HF_ENDPOINT": "http://user:canary-21@127.0.0.1:1", "HF_HUB_OFFLINE": "0"}
    asked = [llmbench(hub, tmp_path, *arguments) for arguments in (("doctor",), ("run", "--model", "opt-125m"))]
    assert [done.returncode for done in asked] == [0, 1]
    for text in (shown.out, shown.err, also.out, also.err, *(done.stdout + done.stderr for done in asked)):
        assert places(text, CANARIES) == [], text
    assert found_in(tmp_path, CANARIES) == {}
    notes = [
        run.data.tags["mlflow.note.content"] for run in MlflowClient(store_uri).search_runs([last["experiment_id"]])
    ]
    assert all("***" in html.unescape(note) for note in notes)  # they were there to be masked
    assert {path.name for path in tmp_path.rglob("*.log") if "***" in path.read_text()} == {"worker.log", "prepare.log"}


def test_a_worker_is_started_without_them(store_uri: str, tmp_path: Path, planted: dict[str, str]) -> None:
    run = ("run", "--backend", "leaky", "--model", "one", "--workload", "qa", "--tracking-uri", store_uri, *FAST)
    done = llmbench({**planted, "LLMBENCH_OURS": "stays", "CC": "stays too"}, tmp_path, *run)
    assert done.returncode == 0, done.stderr
    seen: dict[str, dict[str, Any]] = {
        task: json.loads((tmp_path / "planted" / f"{task}.json").read_text()) for task in ("prepare", "measure")
    }
    assert set(VARIABLES) & set(seen["measure"]) == set()
    assert set(VARIABLES) & set(seen["prepare"]) == {"HF_TOKEN", "HTTP_PROXY"}  # for a download
    assert places(json.dumps(seen["measure"]), CANARIES) == []
    for environment in seen.values():
        assert not [name for name in environment if name.startswith("MLFLOW_")]
        assert {name: environment[name] for name in ("LLMBENCH_OURS", "CC", "HF_HOME", "HOME", "PATH")} == {
            "LLMBENCH_OURS": "stays",
            "CC": "stays too",
            "HF_HOME": planted["HF_HOME"],
            "HOME": planted["HOME"],
            "PATH": planted["PATH"],
        }


@pytest.mark.charts
def test_what_a_killed_command_left_is_masked_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "canary-25-killed")
    (tmp_path / "sweep" / "cell").mkdir(parents=True)
    (tmp_path / "sweep" / "sweep.json").write_text('{"parameters": {"model": "fake", "backend": "fake"}, "cells": 1}')
    (tmp_path / "sweep" / "cell" / "worker.log").write_text("asked with canary-25-killed\n")
    assert recover(tmp_path / "sweep") == (0, [])
    assert (tmp_path / "sweep" / "cell" / "worker.log").read_text() == "asked with ***\n"


@pytest.mark.slow
def test_the_password_of_a_server_that_takes_it_is_kept_nowhere(
    store_uri: str, tmp_path: Path, planted: dict[str, str]
) -> None:
    port = free_port()
    with mlflow_server(store_uri, tmp_path, port):
        address = f"http://user:canary-21@127.0.0.1:{port}"
        run = (
            "run",
            "--backend",
            "leaky",
            "--model",
            "one",
            "--workload",
            "qa",
            "--batch-size",
            "1,2",
            "--tracking-uri",
            address,
            *FAST,
            "--json",
        )
        done = llmbench({name: value for name, value in planted.items() if "TRACKING" not in name}, tmp_path, *run)
    assert done.returncode == 0, done.stderr
    assert f"Open the comparison: http://***@127.0.0.1:{port}/#/experiments/" in done.stdout
    assert (
        "viewStateShareKey=llmbench-" in done.stdout
    )  # the server's version was asked for, without the password in the address
    known = [
        canary
        for canary in CANARIES
        if canary not in (VARIABLES["MLFLOW_TRACKING_PASSWORD"], VARIABLES["MLFLOW_TRACKING_TOKEN"])
    ]
    assert places(done.stdout + done.stderr, known) == []
    assert found_in(tmp_path, known) == {}


def test_a_token_that_a_client_has_noted_of_the_git_remote_leaves_the_store_again(
    store_uri: str, tmp_path: Path, planted: dict[str, str]
) -> None:
    """`mlflow run` records the address of the remote. MLflow 3.17 strips the user from it.

    Other versions may not, and a source can be any address.
    """
    client = MlflowClient(store_uri)
    tags = {
        "mlflow.source.git.repoURL": "https://user:canary-21@host.example/x.git",
        "mlflow.source.name": "https://canary-13-index@host.example/x.git",
    }
    run_id = client.create_run("0", tags={**tags, "mine": "stays"}).info.run_id
    environment = {**planted, "MLFLOW_RUN_ID": run_id, "MLFLOW_TRACKING_URI": store_uri}
    short = ("4" if part == "auto" else part for part in FAST)
    done = llmbench(environment, tmp_path, "run", "--backend", "fake", "--model", "fake:ttft_ms=1", *short)
    assert done.returncode == 0, done.stderr
    found = client.get_run(run_id).data.tags
    assert found["mlflow.source.git.repoURL"] == found["mlflow.source.name"] == "https://***@host.example/x.git"
    assert found["mine"] == "stays"
