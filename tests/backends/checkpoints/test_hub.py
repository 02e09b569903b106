"""Models from the Hub, against a server on loopback that answers as the Hub does, from a name to a measured run."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest
from mlflow import MlflowClient

from mlflow_llmbench.backends.checkpoints.hub import find_checkpoint
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.errors import ModelError
from mlflow_llmbench.records.invocation import Invocation, called_as
from tests.gguf_files import write_llama
from tests.servers import HTTPServer

ROOT = Path(__file__).resolve().parents[3]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(HTTPServer):
    """Serve one public model (`tiny/llama`) and one gated (`tiny/gated`). The server can stop answering."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.requests: list[str] = []
        self.silent = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    """The few addresses of the Hub's interface that a download needs."""

    server: Hub

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = urlparse(self.path).path
        self.server.requests.append(path)
        if self.server.silent:
            time.sleep(60)
        parts = path.strip("/").split("/")
        files = sorted(p for p in self.server.folder.iterdir() if p.is_file())
        if parts[:2] == ["api", "models"] and len(parts) >= 4:
            if parts[2:4] == ["tiny", "nothing"]:
                return self.refuse(404, "RepoNotFound")
            if parts[-1] == "no-such-tag":
                return self.refuse(404, "RevisionNotFound")
            if "tree" in parts:
                return self.send(
                    json.dumps(
                        [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0" * 40} for f in files]
                    ).encode(),
                    body,
                )
            siblings = [{"rfilename": f.name, "size": f.stat().st_size} for f in files]
            info = {
                "_id": "1",
                "id": "/".join(parts[2:4]),
                "modelId": "/".join(parts[2:4]),
                "sha": COMMIT,
                "private": False,
                "siblings": siblings,
                "tags": [],
            }
            return self.send(json.dumps(info).encode(), body)
        if len(parts) >= 5 and parts[2] == "resolve":
            if parts[1] == "gated":
                return self.refuse(403, "GatedRepo")
            file = self.server.folder / parts[4]
            return self.send(file.read_bytes(), body) if file.is_file() else self.refuse(404, "EntryNotFound")
        return self.refuse(404, "EntryNotFound")

    def send(self, data: bytes, body: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture
def hub(tiny_model: Path) -> Iterator[Hub]:
    server = Hub(tiny_model)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def llmbench(hub: Hub, folder: Path, store_uri: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "MLFLOW_TRACKING_URI": store_uri,
    }
    fast = ["--prompt-tokens", "8", "--output-tokens", "4", "--repetitions", "5", "--warmup", "1"]
    command = [sys.executable, "-m", "mlflow_llmbench", "run", *arguments, *fast]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("project", "told"), [(None, "the weights: --weights random."), ("/p", "the weights: -P weights=random.")]
)
def test_the_advice_without_the_hub_has_the_form_of_the_call(project: str | None, told: str) -> None:
    cell = Cell(model="nobody/nothing")
    with called_as(Invocation(project=project)), pytest.raises(ModelError) as error:
        find_checkpoint(cell, cell.model, "preset")
    assert told in str(error.value)


def test_a_hub_model_is_resolved_downloaded_once_and_measured(hub: Hub, store_uri: str, tmp_path: Path) -> None:
    done = llmbench(hub, tmp_path, store_uri, "--model", "tiny/llama", "--quant", "int8", "--json")
    assert done.returncode == 0, done.stderr
    [run] = json.loads(done.stdout.splitlines()[-1])["runs"]
    found = MlflowClient(store_uri).get_run(run["run_id"])
    assert found.data.params["model.revision"] == COMMIT
    assert found.data.params["revision"] == "main"
    weights = [r for r in hub.requests if r.endswith("model.safetensors")]
    assert weights
    assert all(COMMIT in r for r in weights)
    hub.requests.clear()
    hub.silent = True
    again = llmbench(hub, tmp_path, store_uri, "--model", "tiny/llama", "--quant", "int8", "--workload", "qa")
    assert again.returncode == 0, again.stderr
    assert not [r for r in hub.requests if r.endswith("model.safetensors")]


def test_a_gguf_file_of_a_repository_is_resolved_downloaded_once_and_measured(
    hub: Hub, store_uri: str, tmp_path: Path, tiny_model: Path
) -> None:
    hub.folder = tmp_path / "repository"
    hub.folder.mkdir()
    write_llama(tiny_model, hub.folder / "tiny-f32.gguf")
    (hub.folder / "other.gguf").write_bytes(b"GGUF")
    done = llmbench(hub, tmp_path, store_uri, "--model", "tiny/llama:tiny-f32.gguf", "--quant", "fp32", "--json")
    assert done.returncode == 0, done.stderr
    [run] = json.loads(done.stdout.splitlines()[-1])["runs"]
    found = MlflowClient(store_uri).get_run(run["run_id"])
    assert (found.data.params["model.revision"], found.data.params["model.weights_format"]) == (COMMIT, "gguf")
    fetched = [r for r in hub.requests if r.endswith(".gguf")]
    assert fetched
    assert all(COMMIT in r and r.endswith("tiny-f32.gguf") for r in fetched)
    hub.requests.clear()
    hub.shutdown()
    hub.server_close()
    again = llmbench(hub, tmp_path, store_uri, "--model", "tiny/llama:tiny-f32.gguf", "--quant", "bf16")
    assert again.returncode == 0, again.stderr
    assert not [r for r in hub.requests if r.endswith(".gguf")]


def test_a_gguf_file_that_a_repository_lacks_is_one_line(hub: Hub, store_uri: str, tmp_path: Path) -> None:
    done = llmbench(hub, tmp_path, store_uri, "--model", "tiny/llama:nothing.gguf", "--quant", "fp32")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "llmbench: The repository tiny/llama has no file nothing.gguf. Its GGUF files: none."
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model", "tiny/gated"],
            "The model tiny/gated is gated. Accept its terms at https://huggingface.co/tiny/gated, then run "
            "`hf auth login`",
        ),
        (["--model", "tiny/nothing"], "There is no model tiny/nothing on the Hub, or it is private."),
        (["--model", "tiny/llama", "--revision", "no-such-tag"], "The model tiny/llama has no revision no-such-tag."),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    hub: Hub, store_uri: str, tmp_path: Path, arguments: list[str], message: str
) -> None:
    done = llmbench(hub, tmp_path, store_uri, *arguments)
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith(f"llmbench: {message}")


def test_a_hub_that_does_not_answer_is_given_up_before_it_answers(hub: Hub, store_uri: str, tmp_path: Path) -> None:
    hub.silent = True
    done = llmbench(hub, tmp_path, store_uri, "--model", "opt-125m")
    assert "llmbench: The Hub cannot be reached for facebook/opt-125m" in done.stderr
    assert "--weights random" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_repository_of_pickles_is_refused_before_anything_is_downloaded(tiny_model: Path, tmp_path: Path) -> None:
    """Only presets may have them, at `main`: a pull request is a revision too."""
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    code = (
        "from mlflow_llmbench.backends.checkpoints.sources import find_model\n"
        "from mlflow_llmbench.records.cell import Cell\n"
        "for cell in (Cell('tiny/llama'), Cell('tiny/llama', allow_pickle=True), Cell('opt-125m'), "
        "Cell('opt-125m', revision='refs/pr/7')):\n"
        "    try:\n        print(find_model(cell).files_bytes)\n    except Exception as error:\n        print(error)\n"
    )
    server = Hub(folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_ENDPOINT": server.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "hf"),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    server.shutdown()
    server.server_close()
    refused, size, preset, pull_request = done.stdout.splitlines()
    assert (size, preset) == ("8", "8")
    assert refused.startswith("The weights of tiny/llama are a pickle (pytorch_model.bin), which can carry code")
    assert pull_request.startswith("The weights of opt-125m are a pickle (pytorch_model.bin), which can carry code")
    assert not [request for request in server.requests if request.endswith(".bin")]
