"""Deployments on this machine: what is kept of them, what is refused, and a version through MLflow's own commands."""

from __future__ import annotations

import dataclasses
import http.server
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
from click.testing import CliRunner
from mlflow.deployments import get_deploy_client
from mlflow.deployments import interface as mlflow_deployments

from mlflow_llmbench.cli.main import main
from mlflow_llmbench.loadgen import detached_server
from mlflow_llmbench.loadgen.server_process import free_port
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.errors import MeasurementError, UsageError
from mlflow_llmbench.records.results import LoadInfo, ModelFacts
from mlflow_llmbench.sweeps.upload import upload
from mlflow_llmbench.system import memory, processes
from mlflow_llmbench.tracking.registry import register
from mlflow_llmbench.tracking.search import cells_of_sweep
from mlflow_llmbench.tracking.store import open_store
from mlflow_llmbench.workflows import deployed_client, deployment_state, deployments
from mlflow_llmbench.workflows.deployment_state import DeployedServer, DeploymentRecord
from mlflow_llmbench.workflows.gate import gate
from mlflow_llmbench.workflows.mlflow_deployments import DeploymentError
from mlflow_llmbench.workflows.run import online

from ..loadgen.test_server_process import ROOT, is_alive, notes, within
from ..results import made, stored
from ..tracking.test_registry import BUSY, measured_sweep

MARK = secrets.token_hex(8)  # of this run of the tests alone: others may run beside it
SWEEP = "20260101T000000Z-aaaaaa"


@pytest.fixture(autouse=True)
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder of state for each test, the plugin as if it were installed, and no process left."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    mlflow_deployments.plugin_store.register("llmbench", "mlflow_llmbench.workflows.mlflow_deployments")
    yield
    for name in deployment_state.names():
        deployments.delete(name)
    detached_server.end(None, MARK)


def server(url: str = "http://127.0.0.1:9", **more: Any) -> DeployedServer:
    settings = {"settings": dict(deployments.SETTINGS), "command": ("serve", "--port", "9")}
    begun = {"boot": processes.boot_id(), "begun_s": time.time()}
    return DeployedServer(
        **{"version": "models:/bot/1", "engine": "vllm", "mark": MARK, "url": url} | settings | begun | more
    )


def null_deployment(name: str = "bot") -> DeploymentRecord:
    """A deployment whose server is the null server, which has OpenAI's interface."""
    port = free_port()
    folder = deployment_state.folder_of(name) / MARK
    folder.mkdir(parents=True)
    command = (sys.executable, str(ROOT / "tests" / "launched_server.py"), "--port", str(port), "--note", "notes.jsonl")
    one = server(f"http://127.0.0.1:{port}", command=(*command, "--model", "null:ttft_ms=1"))
    record = DeploymentRecord(name, (deployments._run(name, one),))
    deployment_state.write(record)
    assert within(lambda: deployed_client.answers(one.url))
    return record


def mlflow_command(*arguments: str) -> tuple[int, str]:
    from mlflow.deployments.cli import commands

    done = CliRunner().invoke(commands, arguments)
    return done.exit_code, done.output


def test_a_record_is_read_as_it_was_written() -> None:
    keeper = detached_server.Keeper(7, 12.5)
    record = DeploymentRecord("bot", (server(keeper=keeper, needs_bytes=5, threads=2), server(mark="b" * 16)))
    deployment_state.write(record)
    assert deployment_state.read("bot") == record
    assert deployment_state.names() == ["bot"]
    assert deployment_state.read("other") is None


@pytest.mark.parametrize("name", ["", "a/b", "../x", ".hidden", "a b", "x" * 101, "ü"])
def test_a_name_is_that_of_a_folder(name: str) -> None:
    with pytest.raises(UsageError, match="Not a name for a deployment"):
        deployment_state.read(name)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"servers": []}', '{"servers": [{"mark": "x"}]}', '{"servers": 3}']
)
def test_a_damaged_record_is_one_line_and_can_be_deleted(content: str) -> None:
    record = null_deployment()
    file = deployment_state.folder_of("bot") / "state.json"
    file.write_text(content)
    with pytest.raises(UsageError, match=rf"The record of the deployment bot cannot be read: .* Its file is {file}"):
        deployments.require("bot")
    deployment_state.write(DeploymentRecord("other", (server(),)))
    damaged, other = get_deploy_client("llmbench").list_deployments()
    assert damaged["name"] == "bot" and damaged["status"].startswith("damaged: The record of the deployment bot cannot")
    assert (other["name"], other["status"]) == ("other", "stopped: it ended by itself")
    deployments.delete("other")
    deployments.delete("bot")
    assert record.current.keeper and not is_alive(record.current.keeper.pid)
    assert deployment_state.names() == []


class Scripted(http.server.BaseHTTPRequestHandler):
    """Answers every request with the same JSON."""

    text = b"{}"

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.text)))
        self.end_headers()
        self.wfile.write(self.text)

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@pytest.fixture
def scripted() -> Iterator[str]:
    """Address of a server with scripted answers."""
    with http.server.HTTPServer(("127.0.0.1", 0), Scripted) as one:
        thread = threading.Thread(target=one.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{one.server_port}"
        one.shutdown()
        thread.join()


@pytest.mark.parametrize("protocol", ["mlflow", "openai"])
@pytest.mark.parametrize(
    "text", [b"{}", b"[]", b"null", b"[" * 100_000, b'{"data": []}', b'{"data": [{"id": "m"}], "choices": [null]}']
)
def test_an_answer_of_another_form_is_one_line(
    scripted: str, protocol: deployed_client.Protocol, text: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Scripted, "text", text)
    with pytest.raises(MeasurementError, match=r"The deployment.* Read its log\.$"):
        deployed_client.predict(scripted, protocol, ["Hello"])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"inputs": 5}, "A row has no prompt"),
        ({"dataframe_split": {"data": [["a"]]}}, "A row has no prompt"),
        ({"dataframe_split": {"columns": ["prompt"], "data": [["a", "b"]]}}, "A row has no prompt"),
        ({"inputs": ["a"], "params": {"max_new_tokens": "x"}}, "max_new_tokens is not a whole number from 1: x. Give"),
        ({"inputs": ["a"], "params": {"max_new_tokens": -5}}, "max_new_tokens is not a whole number from 1: -5"),
        (
            {"inputs": ["a"], "params": {"temperature": 1.0}},
            "Unknown parameter of a request: temperature. Known: max_n",
        ),
        ({"inputs": ["a"], "params": [1]}, r"Unknown parameter of a request: \[1\]"),
    ],
)
def test_a_request_that_a_server_could_not_take_is_refused(inputs: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        deployed_client.predict("http://127.0.0.1:9", "openai", inputs)


def test_a_deployment_is_found_again_after_a_restart_as_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    record = null_deployment()
    assert deployments.status(record.current) == "running"
    monkeypatch.setattr(deployment_state, "boot_id", lambda: "another start")
    monkeypatch.setattr(deployments, "boot_id", lambda: "another start")
    found = deployments.describe(deployments.require("bot"))
    assert (found["status"], found["memory_gb"], found["uptime"]) == (
        "stopped: the machine was started again",
        None,
        None,
    )
    with pytest.raises(UsageError, match="is stopped: the machine was started again. Start it again: `mlflow dep"):
        deployments.predict("bot", ["Hello"])


def test_a_server_that_is_gone_or_silent_is_told() -> None:
    record = null_deployment()
    assert record.current.keeper
    process = deployments.describe(record)
    assert process["keeper_pid"] == record.current.keeper.pid
    assert process["memory_gb"] > 0.001 and process["uptime"]
    silent = dataclasses.replace(record.current, url="http://127.0.0.1:9")
    assert deployments.status(silent) == "not answering"
    os.kill(record.current.keeper.pid, signal.SIGKILL)
    assert within(lambda: not record.current.runs)
    assert deployments.status(record.current) == "stopped: it ended by itself"
    assert len(detached_server.marked(MARK)) == 1  # its helper, in a session of its own
    deployments.delete("bot")
    assert detached_server.marked(MARK) == []


def test_mlflows_commands_list_show_ask_and_delete(tmp_path: Path) -> None:
    null_deployment()
    client = get_deploy_client("llmbench")
    [listed] = client.list_deployments()
    assert (listed["name"], listed["status"], listed["version"]) == ("bot", "running", "models:/bot/1")
    code, told = mlflow_command("get", "-t", "llmbench", "--name", "bot")
    assert code == 0 and "status: running" in told and "log_end: Its log ends with: http:" in told
    rows = [{"prompt": "Hello there"}, {"prompt": "Why?"}]
    expected = [
        {"text": text, "prompt_tokens": words, "output_tokens": 2, "finish": "length"}
        for text, words in ((" word word", 2), (" word word", 1))
    ]
    assert (
        client.predict("bot", {"dataframe_records": rows, "params": {"max_new_tokens": 2}})["predictions"] == expected
    )
    frame = deployments.predict("bot", pd.DataFrame(rows))
    assert [row["prompt_tokens"] for row in frame] == [2, 1]
    with pytest.raises(DeploymentError, match="A row has no prompt"):
        client.predict("bot", [{"text": "x"}])
    assert mlflow_command("delete", "-t", "llmbench", "--name", "bot") == (0, "Deployment bot is deleted\n")
    assert mlflow_command("delete", "-t", "llmbench", "--name", "bot")[0] == 0  # nothing happens the second time
    code, told = mlflow_command("get", "-t", "llmbench", "--name", "bot")
    assert (code, told) == (1, "Error: There is no deployment bot. There are none on this machine.\n")
    assert "models:/support-bot@champion" in mlflow_command("help", "-t", "llmbench")[1]


def test_a_deployment_is_measured_and_gated_by_its_name(store_uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    record = null_deployment()
    asked = (
        "--model null:ttft_ms=1 --output-tokens 4 --prompt-tokens 16 --repetitions 5 --warmup 1 --requests 12".split()
    )
    assert main(["online", "--url", "deployments:/bot", *asked, "--tracking-uri", store_uri]) == 0
    assert "null:ttft_ms=1 online c1 16+4" in capsys.readouterr().err
    assert deployments.version_of("deployments:/bot") == "models:/bot/1"
    assert deployments.version_of("models:/bot/2") == "models:/bot/2"
    with pytest.raises(UsageError, match="There is no deployment other. Did you mean bot|There is no deployment other"):
        gate("deployments:/other", "models:/bot/1", tracking_uri=store_uri)
    with pytest.raises(UsageError, match="There is no models:/bot/1 in the store"):
        gate("llmbench-results", "deployments:/bot", tracking_uri=store_uri)
    by_mlflow = dataclasses.replace(record.current, engine="mlflow")
    deployment_state.write(DeploymentRecord("bot", (by_mlflow,)))
    with pytest.raises(UsageError, match="is served by MLflow, which has not OpenAI's interface"):
        online(url="deployments:/bot", model="m")
    deployment_state.write(record)
    deployments.delete("bot")
    with pytest.raises(UsageError, match="There is no deployment bot"):
        online(url="deployments:/bot", model="m")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"workers": "2"}, "Unknown setting: workers"),
        ({"server": "vlm"}, "Unknown server: vlm. Did you mean vllm"),
        ({"host": "-x"}, "host is not an address: -x"),
        ({"port": "0"}, "port is not from 1 to 65535: 0"),
        ({"timeout_s": "soon"}, "timeout_s is not a time in seconds: soon"),
        ({"force": "maybe"}, "force is neither true nor false: maybe"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_asked(given: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        deployments.create("bot", "models:/nothing/1", given)
    assert deployment_state.names() == []


def test_what_cannot_be_deployed_leaves_nothing(
    store_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store_uri)
    mlflow.set_tracking_uri(store_uri)
    with pytest.raises(UsageError, match="There is no models:/nothing/1 in the store"):
        deployments.create("bot", "models:/nothing/1", {})
    [fake] = stored(tmp_path / "fake", store_uri, made())
    register(open_store(store_uri), fake, "scripted")
    with pytest.raises(UsageError, match=r"models:/scripted/1 was measured with backend=\w+, and there is nothing to"):
        deployments.create("bot", "models:/scripted/1", {})
    null_deployment("taken")
    with pytest.raises(
        UsageError, match="There is a deployment taken already. To remove it: `mlflow deployments delete"
    ):
        deployments.create("taken", "models:/scripted/1", {})
    assert deployment_state.names() == ["taken"]
    with (
        deployment_state.locked("taken"),
        pytest.raises(UsageError, match="Another command is changing the deployment"),
    ):
        deployments.delete("taken")


@pytest.fixture
def packed(store_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A registered version of a GGUF file that needs 4 GB, in the store that commands use."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store_uri)
    mlflow.set_tracking_uri(store_uri)
    facts = {"quant.type": "Q4_0", "kv_cache.type": "f16", "model.tokenizer": "spm", "llama_cpp.threads": 2}
    result = made(
        cell=Cell(model="m.gguf", backend="llama_cpp", output_tokens=5, prompt_tokens=8, threads=2),
        model=ModelFacts("m", "folder", "/models/m", "c"),
        load=LoadInfo(1.0, facts=facts, made="/cache/m.gguf"),
    )
    [run_id] = stored(tmp_path / SWEEP, store_uri, result)
    return register(open_store(store_uri), run_id, "packed").uri


@pytest.fixture
def llama_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program `llama-server` that runs the null server.

    While the file that is returned exists it ends at once, or does not answer if the file says `deaf`.
    """
    folder, broken = tmp_path / "programs", tmp_path / "broken"
    folder.mkdir()
    script = folder / "llama-server"
    script.write_text(
        f"#!{sys.executable}\n"
        "import os, sys, time\n"
        f"if os.path.exists({str(broken)!r}):\n"
        f"    if open({str(broken)!r}).read() == 'deaf':\n"
        "        time.sleep(1000)\n"
        "    sys.exit('error: the file cannot be read')\n"
        "port = sys.argv[sys.argv.index('--port') + 1]\n"
        f"server = {str(ROOT / 'tests' / 'launched_server.py')!r}\n"
        "rest = ['--port', port, '--model', 'null:ttft_ms=1', '--note', 'notes.jsonl']\n"
        "os.execv(sys.executable, [sys.executable, server, *rest])\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    return broken


LLAMA = {"server": "llama.cpp", "timeout_s": "200", "force": "true"}


def test_a_version_is_served_by_another_server_as_export_says(packed: str, llama_server: Path) -> None:
    current = deployments.create("bot", packed, LLAMA).current
    assert deployments.require("bot").current == current
    words = " ".join(current.command)
    assert "/llama-server --model /cache/m.gguf --parallel 1 --ctx-size 13 --n-predict 5 --temp 0 --threads 2" in words
    assert words.endswith(f"--host 127.0.0.1 --port {current.url.rpartition(':')[2]}")
    found = deployments.describe(deployments.require("bot"))
    assert (found["status"], found["flavor"], found["measured_memory_gb"]) == ("running", "llama.cpp", 4.0)
    assert "\n" not in words
    [told] = notes(deployment_state.folder_of("bot") / current.mark / "notes.jsonl")
    assert told["variables"]["OMP_NUM_THREADS"] == "2"
    assert not {"MLFLOW_TRACKING_URI", "LLMBENCH_API_KEY"} & set(told["variables"])
    assert [row["output_tokens"] for row in deployments.predict("bot", [{"prompt": "Hello"}])] == [16]


def test_what_does_not_start_leaves_nothing(packed: str, llama_server: Path) -> None:
    llama_server.touch()
    with pytest.raises(
        MeasurementError, match=r"models:/packed/1 ended by itself. Its log ends with: error: the file can"
    ):
        deployments.create("bot", packed, LLAMA)
    assert deployment_state.names() == []
    assert not deployment_state.folder_of("bot").exists()
    with pytest.raises(UsageError, match="vllm is not offered for GGUF files"):
        deployments.create("bot", packed, {**LLAMA, "server": "vllm"})


def test_an_update_keeps_what_runs_until_the_new_server_answers(packed: str, llama_server: Path) -> None:
    first = deployments.create("bot", packed, LLAMA).current
    llama_server.touch()
    with pytest.raises(MeasurementError, match="ended by itself"):
        deployments.update("bot", packed, {})
    assert deployments.require("bot").servers == (first,)
    assert deployments.status(first) == "running"
    llama_server.unlink()
    second = deployments.update("bot", None, {}).current
    assert (second.version, second.settings) == (first.version, first.settings)
    assert second.url != first.url
    assert deployments.require("bot").servers == (second,)
    assert not first.runs and detached_server.marked(first.mark) == []
    assert deployments.status(second) == "running"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_command_that_is_stopped_leaves_nothing_that_delete_does_not_find(
    packed: str, llama_server: Path, number: signal.Signals
) -> None:
    llama_server.write_text("deaf")
    code = f"from mlflow_llmbench.workflows import deployments; deployments.create('bot', {packed!r}, {LLAMA!r})"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL) as command:
        assert within(lambda: deployment_state.names() == ["bot"])
        mark = deployments.require("bot").current.mark
        assert within(lambda: len(detached_server.marked(mark)) == 2)  # the keeper and its server
        assert within(lambda: deployments.require("bot").current.keeper is not None)
        command.send_signal(number)
        command.wait()
    if number == signal.SIGKILL:
        assert deployments.status(deployments.require("bot").current) == "not answering"
        deployments.delete("bot")
    assert detached_server.marked(mark) == []
    assert deployment_state.names() == []


def test_a_fixed_port_is_kept_and_the_old_server_comes_back_if_the_new_one_does_not(
    packed: str, llama_server: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = str(free_port())
    first = deployments.create("bot", packed, {**LLAMA, "port": port}).current
    with pytest.raises(UsageError, match=f"The port {port} of 127.0.0.1 cannot be used: Address already in use"):
        deployments.create("other", packed, {**LLAMA, "port": port})
    second = deployments.update("bot", None, {}).current
    assert second.url == first.url == f"http://127.0.0.1:{port}"
    assert detached_server.marked(first.mark) == []
    monkeypatch.setattr(memory, "available_bytes", lambda: 1_000_000_000)
    with pytest.raises(
        UsageError, match=r"packed/1 was measured to need 4 GB of memory, and 1 GB are free\. Free memory, or"
    ):
        deployments.update("bot", None, {"force": "false"})
    back = deployments.require("bot").current
    assert (back.mark, back.url) == (second.mark, second.url)
    assert within(lambda: deployments.status(back) == "running")


@pytest.fixture
def installed(tmp_path: Path) -> dict[str, str]:
    """Variables for a process that finds the plugin by its entry point, whatever is installed."""
    about = tmp_path / "installed" / "mlflow_llmbench_test-0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: mlflow-llmbench-test\nVersion: 0\n")
    text = (ROOT / "pyproject.toml").read_text().partition('[project.entry-points."mlflow.deployments"]\n')[2]
    (about / "entry_points.txt").write_text("[mlflow.deployments]\n" + text.splitlines()[0].replace('"', "") + "\n")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(about.parent), str(ROOT)])}


@pytest.mark.slow
def test_a_registered_version_is_deployed_by_mlflows_own_commands(
    tiny_model: Path,
    store_template: Path,
    store_uri: str,
    tmp_path: Path,
    installed: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sweep = measured_sweep(tmp_path, tiny_model, store_template)
    upload(str(sweep), store_uri)
    [run_id] = cells_of_sweep(open_store(store_uri), sweep.name)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store_uri)
    register(open_store(store_uri), run_id, "support-bot", accept_suspect=BUSY)
    expected = mlflow.pyfunc.load_model("models:/support-bot@candidate").predict([{"prompt": "Hello"}])
    environment = {**installed, "MLFLOW_TRACKING_URI": store_uri, "SOME_SECRET": "canary-12345678"}

    def command(*arguments: str, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "mlflow", "deployments", *arguments, "-t", "llmbench"],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    told = command("create", "--name", "bot", "-m", "models:/support-bot@candidate", "-C", "timeout_s=600")
    assert "python_function deployment bot is created" in told
    first = deployments.require("bot").current
    assert first.version == "models:/support-bot/1" and first.url.startswith("http://127.0.0.1:")
    seen = detached_server.marked(first.mark)
    assert len(seen) >= 2
    for pid in seen:
        assert b"canary" not in Path(f"/proc/{pid}/environ").read_bytes()
    found = command("get", "--name", "bot")
    assert "status: running" in found and "version: models:/support-bot/1" in found
    (tmp_path / "prompts.json").write_text(json.dumps([{"prompt": "Hello"}]))
    answers = json.loads(command("predict", "--name", "bot", "-I", "prompts.json").splitlines()[-1])
    assert answers["predictions"] == expected
    refused = command("predict", "--name", "bot", "-I", write(tmp_path, "x" * 40), code=1)
    assert "A prompt has 40 tokens, and 16 are the most that was measured" in refused and "Traceback" not in refused
    shutil.move(store_uri.removeprefix("sqlite:///"), tmp_path / "away.db")  # a deployment needs no store
    assert deployments.predict("bot", ["Hello"]) == expected
    shutil.move(tmp_path / "away.db", store_uri.removeprefix("sqlite:///"))
    command("update", "--name", "bot", "-m", "models:/support-bot/1")
    second = deployments.require("bot").current
    assert second.mark != first.mark and not any(map(is_alive, seen))
    assert deployments.predict("bot", ["Hello"]) == expected
    assert second.keeper
    os.kill(second.keeper.pid, signal.SIGKILL)
    assert within(lambda: not second.runs)
    assert "Start it again: `mlflow deployments update" in command(
        "predict", "--name", "bot", "-I", "prompts.json", code=1
    )
    command("update", "--name", "bot")
    assert detached_server.marked(second.mark) == []
    assert deployments.predict("bot", ["Hello"]) == expected
    last = detached_server.marked(deployments.require("bot").current.mark)
    command("delete", "--name", "bot")
    assert not any(map(is_alive, last))
    assert not (deployment_state.state_folder() / "bot").exists()


def write(folder: Path, prompt: str) -> str:
    (folder / "long.json").write_text(json.dumps([{"prompt": prompt}]))
    return "long.json"
