"""A server that a command starts: the command, the life and memory of its processes, and whole runs to MLflow."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from mlflow_llmbench.backends.openai.backend import OpenAIBackend
from mlflow_llmbench.backends.openai.discovery import name_among
from mlflow_llmbench.cli.main import main
from mlflow_llmbench.config import server_command
from mlflow_llmbench.config.cells import config_hash, expand_cells, group_cells
from mlflow_llmbench.config.spec import parse
from mlflow_llmbench.loadgen import server_process
from mlflow_llmbench.measure.events import Event, StageMemory
from mlflow_llmbench.measure.outcome import stages_of
from mlflow_llmbench.measure.supervise import run_worker
from mlflow_llmbench.measure.task import WorkerJob
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.errors import MeasurementError, UsageError
from mlflow_llmbench.records.results import ModelFacts
from mlflow_llmbench.sweeps.sweep import run
from mlflow_llmbench.system import memory

ROOT = Path(__file__).resolve().parents[2]
SERVER = f"{sys.executable} {ROOT / 'tests' / 'launched_server.py'} --port {{port}} --model {{model}}"
FAST: dict[str, Any] = {
    "backend": "openai",
    "model": "null:itl_ms=1",
    "output_tokens": 4,
    "prompt_tokens": 16,
    "warmup": 1,
    "repetitions": 5,
}
HEAVY = "null:itl_ms=1+ttft_ms=5"


def notes(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def is_alive(pid: int) -> bool:
    return memory.read(pid) is not None


def within(holds: Callable[[], bool]) -> bool:
    """Wait until something holds. The limit only bounds a failure: importing torch takes a minute on a busy machine."""
    deadline = time.monotonic() + 200
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.05)
    return holds()


def test_the_arguments_of_a_command() -> None:
    command = "serve '{model}' --port={port} --note 'two words' --quantization {quant}"
    filled = server_command.arguments(command, model="a b", port=81, quant="fp8")
    assert filled == ["serve", "a b", "--port=81", "--note", "two words", "--quantization", "fp8"]


@pytest.mark.parametrize("option", ["--quantization {quant}", "-q {quant}", "--quantization={quant}", "{quant}"])
def test_without_a_quantization_its_option_is_left_out(option: str) -> None:
    command = f"serve --port {{port}} {option} --last"
    assert server_command.arguments(command, model="m", port=81, quant="none") == ["serve", "--port", "81", "--last"]
    assert server_command.arguments("serve m-{quant}.gguf {port}", model="m", port=1, quant="none") == [
        "serve",
        "m-none.gguf",
        "1",
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"launch": "serve --port {port} --x {name}"},
            "launch has an unknown placeholder: {name}. Known: {model}, {port}, {quant}.",
        ),
        ({"launch": "serve --port 8000"}, "launch does not say where the server is to listen"),
        ({"launch": "serve 'x {port}"}, "launch cannot be read, no closing quotation"),
        (
            {"launch": "serve {port} --api-key abc"},
            "launch has an option that is named as a secret, --api-key, and the command would be logged",
        ),
        ({"launch": "serve {port} --hf sk-1234567890abcdefgh1"}, "launch has what looks like a secret"),
        ({"launch": "serve {port} --seed aB3dE5gH7jK9mN1pQ3sT5vW7"}, "launch has what looks like a secret"),
        (
            {"launch": "sh -c 'HF_TOKEN=abc serve {port}'"},
            "launch has a variable that is named as a secret, HF_TOKEN, and the",
        ),
        (
            {"launch": "serve --api-key abc"},
            "launch has an option that is named as a secret, --api-key, and the",
        ),
        ({"launch": "serve {port}", "url": "http://h"}, "url is for a running server, and launch starts one"),
        (
            {"launch": "serve {port}", "backend": "transformers"},
            "launch is given, and backend=transformers runs the model in this process",
        ),
        ({"launch": "serve {port}", "quant": "fp8"}, "quant=fp8 is asked for, and the server is not told"),
        ({"launch": "serve {port} {quant}", "quant": "a;b"}, "quant is not a word that a server could know: a;b"),
        ({"launch": "serve {port} ; none"}, "launch=none starts no server"),
        ({"launch": "serve {port}", "batch_size": "4"}, "batch_size, quant and weights are the server's own settings"),
        ({"url": "http://h", "quant": "int8"}, "batch_size, quant and weights are the server's own settings"),
    ],
)
def test_a_command_that_cannot_be_meant_is_refused_by_one_line(settings: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError) as error:
        parse({"backend": "openai", **settings})
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_a_program_that_is_not_there_is_refused_before_anything_starts(store_uri: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="launch begins with a program that was not found: serve-nothing"):
        run(tracking_uri=store_uri, launch="serve-nothing {port}", **FAST)
    assert not (tmp_path / "llmbench-results").exists()


def test_a_program_beside_the_interpreter_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert server_process.require_program(os.path.basename(sys.executable)) == sys.executable


def test_one_server_serves_the_cells_of_a_command_and_a_quantization() -> None:
    spec = parse(
        {
            "backend": "openai",
            "launch": "serve {port} {quant} ; serve {port} --q {quant}",
            "quant": "none,bnb-4bit",
            "concurrency": "1,2",
        }
    )
    groups = group_cells(expand_cells(spec))
    assert [len(group.cells) for group in groups] == [2, 2, 2, 2]
    facts = ModelFacts("m", "none", "m", "main")
    assert len({config_hash(cell, facts) for cell in expand_cells(spec)}) == 8
    assert expand_cells(spec)[0].scenario == "online"


def test_the_name_by_which_the_server_knows_the_model() -> None:
    facts = ModelFacts("opt-125m", "none", "facebook/opt-125m", "main")
    assert name_among(["facebook/opt-125m", "other"], facts) == "facebook/opt-125m"
    assert name_among(["other", "opt-125m"], facts) == "opt-125m"
    assert name_among(["the-only-one"], facts) == "the-only-one"
    assert name_among(["some", "others"], facts) == name_among([], facts) == "facebook/opt-125m"


def test_a_sweep_over_a_servers_quantizations_is_runs_in_mlflow(
    store_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    secrets = {
        "MLFLOW_TRACKING_PASSWORD": "canary-tracking-11",
        "AWS_SECRET_ACCESS_KEY": "canary-aws-22",
        "LLMBENCH_API_KEY": "canary-key-3333",
        "LLMBENCH_TLS_PASSWORD": "canary-tls-5555",
        "GATEWAY_KEY": "canary-gateway-6666",  # of the requests alone
    }
    for name, value in {**secrets, "HF_TOKEN": "hf_CanaryOfTheHub4444", "PLAIN": "seen"}.items():
        monkeypatch.setenv(name, value)
    for name in ("OMP_NUM_THREADS", "PYTHONPATH"):  # a variable of the user's own would reach the server
        monkeypatch.delenv(name, raising=False)
    note = tmp_path / "notes.jsonl"
    command = f"{SERVER} --note {note} --quant {{quant}} --megabytes 200 --say hello --tell HF_TOKEN"
    arguments = [
        "online",
        "--launch",
        command,
        "--model",
        HEAVY,
        *"--quant none,q4 --concurrency 2 --output-tokens 4".split(),
        *("--headers", '{"X-Key": "$GATEWAY_KEY"}'),
    ]
    assert (
        main([*arguments, "--prompt-tokens", "16", "--repetitions", "5", "--warmup", "1", "--tracking-uri", store_uri])
        == 0
    )
    started = notes(note)
    assert [(one["quant"], one["model"]) for one in started] == [("not given", HEAVY), ("q4", HEAVY)]
    for one in started:
        assert not is_alive(one["pid"])
        assert not is_alive(one["helper"])
        assert one["variables"]["PLAIN"] == "seen"
        assert one["variables"]["HF_TOKEN"]  # it may have to fetch the model
        assert not {*secrets, "PYTHONPATH", "OMP_NUM_THREADS"} & set(one["variables"])
    client = MlflowClient(store_uri)
    runs = client.search_runs([client.get_experiment_by_name("llmbench").experiment_id])
    cells = [one for one in runs if "mlflow.parentRunId" in one.data.tags]
    assert {(one.data.params["quant"], one.data.params["concurrency"]) for one in cells} == {("none", "2"), ("q4", "2")}
    for one in cells:
        metrics = one.data.metrics
        needed = {
            stage: metrics[f"memory/host_needed_gb_{stage}"]
            for stage in ("baseline", "loaded", "peak", "steady", "unloaded")
        }
        assert needed["baseline"] < 0.1 < 0.2 < needed["loaded"] <= needed["peak"]
        assert 0.2 < needed["steady"] < 0.4
        assert needed["unloaded"] == metrics["memory/host_rss_gb_unloaded"] == 0
        assert metrics["load/load_s"] > 0
        assert metrics["efficiency/tokens_per_s_per_gb"] > 0
        assert one.data.params["launch"] == command
        assert one.data.params["server.software"] == "null 1.2.3"
        assert "url" not in one.data.params
        assert one.data.tags["llmbench.scenario"] == "online"
        log = Path(client.download_artifacts(one.info.run_id, "server.log", str(tmp_path))).read_text()
        assert log.startswith("hello ***\n")
    everything = [path for path in tmp_path.rglob("*") if path.is_file() and path != note]
    told = [*secrets.values(), "hf_CanaryOfTheHub4444"]
    assert not [(path, secret) for path in everything for secret in told if secret.encode() in path.read_bytes()]
    assert not list(tmp_path.rglob("llmbench-results/*/*/server.log"))


def test_the_memory_at_a_stage_is_that_of_then_however_late_its_event_is_handled(tmp_path: Path) -> None:
    """On a busy machine the parent may handle an event only when the worker has ended the server."""
    note = tmp_path / "notes.jsonl"
    cell = Cell(launch=f"{SERVER} --note {note} --megabytes 200", concurrency=1, **FAST)

    def handle_late(event: Event) -> None:
        if isinstance(event, StageMemory) and event.stage == "loaded":
            assert within(lambda: not is_alive(notes(note)[0]["pid"]))

    (tmp_path / "cell").mkdir()
    job = WorkerJob("measure", (cell,), ModelFacts("m", "none", cell.model, "main"), (tmp_path / "cell",))
    outcome = run_worker(job, tmp_path / "worker.log", handle_late)
    assert outcome.error is None
    needed = stages_of(outcome, 0).host_needed
    assert min(needed["loaded"], needed["peak"], needed["steady"]) > 200e6
    assert needed["baseline"] < 100e6
    assert needed["unloaded"] == 0


def test_a_server_that_exits_at_once_is_a_failed_run_with_the_end_of_its_log(store_uri: str, tmp_path: Path) -> None:
    done = run(tracking_uri=store_uri, launch=f"{SERVER} --say 'no such model, sorry' --fail 3", **FAST)
    [row] = done.rows
    assert (row.outcome, done.exit_code) == ("error", 1)
    assert row.message == "The server ended by itself, with exit code 3. Its log ends with: no such model, sorry"
    [log] = tmp_path.glob("llmbench-results/*/*/artifacts/server.log")
    assert log.read_text() == "no such model, sorry \n"
    assert "memory/host_rss_gb_loaded" not in row.metrics


def test_a_server_that_crashes_in_the_middle_is_told_as_such(store_uri: str) -> None:
    done = run(
        tracking_uri=store_uri,
        launch=f"{SERVER} --say 'out of memory' --die 3",
        **{**FAST, "repetitions": 500, "requests": 50},
    )
    [row] = done.rows
    assert row.outcome == "error"
    assert row.message.startswith("The server ended by itself, with exit code 7. Its log ends with: out of memory")
    assert row.metrics == {}


def test_a_server_that_never_is_healthy_meets_the_time_limit(store_uri: str, tmp_path: Path) -> None:
    note = tmp_path / "notes.jsonl"
    done = run(
        tracking_uri=store_uri, launch=f"{SERVER} --note {note} --say loading --late 60", load_timeout_s=3, **FAST
    )
    [row] = done.rows
    assert row.outcome == "timeout"
    assert "took more than load_timeout_s=3" in row.message
    assert row.message.endswith("Its log ends with: loading")
    [one] = notes(note)
    assert not is_alive(one["pid"])
    assert not is_alive(one["helper"])


def start_long(tmp_path: Path, *more: str) -> tuple[subprocess.Popen[bytes], dict[str, Any]]:
    """A command that measures for minutes once its server runs."""
    note = tmp_path / "notes.jsonl"
    command = f"{SERVER} --note {note} {' '.join(more)}"
    arguments = [
        "--launch",
        command,
        *"--model null:itl_ms=50 --output-tokens 64 --repetitions 50 --tracking-uri sqlite:///mlflow.db".split(),
    ]
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    program = [sys.executable, "-m", "mlflow_llmbench", "online", *arguments]
    process = subprocess.Popen(
        program,
        cwd=tmp_path,
        env=variables,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        assert within(lambda: any("warmup" in file.read_text() for file in tmp_path.rglob("worker.jsonl")))
    except AssertionError:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process, notes(note)[0]


@pytest.mark.parametrize(
    ("end", "code"), [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGTERM, 130)]
)
def test_an_interrupted_command_leaves_no_server(
    store_uri: str, tmp_path: Path, end: signal.Signals, code: int
) -> None:
    process, server = start_long(tmp_path)
    os.killpg(process.pid, end)
    assert process.wait(200) == code
    assert not is_alive(server["pid"])
    assert not is_alive(server["helper"])
    assert list(tmp_path.rglob("artifacts/server.log"))


def test_a_killed_command_leaves_no_server(store_uri: str, tmp_path: Path) -> None:
    process, server = start_long(tmp_path)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert within(lambda: not is_alive(server["pid"]) and not is_alive(server["helper"]))


@pytest.mark.slow
def test_a_killed_command_leaves_no_server_that_is_deaf(store_uri: str, tmp_path: Path) -> None:
    process, server = start_long(tmp_path, "--deaf")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert within(lambda: not is_alive(server["pid"]) and not is_alive(server["helper"]))


def test_a_server_that_is_deaf_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_process, "GRACE_S", 0.3)
    code = "from mlflow_llmbench.loadgen import server_process as s; s.GRACE_S = 0.3; raise SystemExit(s.main())"
    monkeypatch.setattr(server_process, "KEEPER", (sys.executable, "-c", code))
    note = tmp_path / "notes.jsonl"
    program = [sys.executable, str(ROOT / "tests" / "launched_server.py"), "--port", "0", "--deaf", "--note", str(note)]
    server = server_process.ServerProcess(program, tmp_path / "server.log")
    assert within(note.exists)
    [one] = notes(note)
    assert set(server.processes) >= {one["pid"], one["helper"]}
    server.stop()
    assert not is_alive(one["pid"])
    assert not is_alive(one["helper"])


def test_a_server_that_cannot_be_started_says_why(tmp_path: Path) -> None:
    with pytest.raises(MeasurementError, match="The server cannot be started: Permission denied: /etc/passwd"):
        server_process.ServerProcess(["/etc/passwd"], tmp_path / "server.log")


def test_a_log_that_grows_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "server.log"
    log.write_bytes(b"first line\n" + b"x" * (server_process.MAX_LOG_BYTES + 1) + b"\nlast line\n")
    server_process.bound(log)
    kept = log.read_bytes()
    assert len(kept) < 1 << 19
    assert kept.startswith(b"first line\n")
    assert kept.endswith(b"\nlast line\n")
    assert server_process.CUT in kept
    server_process.bound(log)
    assert log.read_bytes() == kept
    assert server_process.bounded(b"short") == b"short"


def test_a_server_without_health_is_ready_when_it_lists_its_models(tmp_path: Path) -> None:
    import http.server

    from ..servers import serving

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/v1/models" else 404)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: Any) -> None: ...

    with serving(Handler) as url:
        backend = OpenAIBackend(Cell(backend="openai", url=url), ModelFacts("m", "none", "", ""))
        assert backend._is_healthy()
        backend.close()
        other = OpenAIBackend(Cell(backend="openai", url=f"{url}/elsewhere"), ModelFacts("m", "none", "", ""))
        assert not other._is_healthy()
        other.close()


def test_what_a_process_touches_of_a_mapped_file_is_counted(tmp_path: Path) -> None:
    """Only pages that are read again count as needed, as for a model that is mapped from its checkpoint."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(os.urandom(1 << 20) * 32)
    code = (
        f"import mmap, sys; f = open({str(file)!r}, 'rb'); "
        "m = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE)\n"
        "touch = lambda size: sum(m[i] for i in range(0, size, 4096))\n"
        "for line in sys.stdin: touch(int(line)); print('done', flush=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin
        assert process.stdout

        def touch(megabytes: int) -> None:
            print(megabytes << 20, file=process.stdin, flush=True)
            assert process.stdout
            process.stdout.readline()

        touch(32)
        if not memory.forget_references([process.pid]):
            pytest.skip("this kernel has no clear_refs")
        touch(8)
        assert memory.referenced_bytes([process.pid, process.pid]) == pytest.approx(8 << 20, rel=0.1)
        process.stdin.close()
