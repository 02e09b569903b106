"""Failures: signals, kills, limits, full disks, unreachable servers. With real processes and a real store."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from mlflow_llmbench import run
from mlflow_llmbench.analysis import contention, verdict
from mlflow_llmbench.backends.fake import FakeBackend
from mlflow_llmbench.measure import journal
from mlflow_llmbench.measure.events import CellBegun, CellMeasured, Event, ModelLoaded
from mlflow_llmbench.measure.supervise import run_worker
from mlflow_llmbench.measure.task import WorkerJob
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.errors import JournalError, TrackingError, UsageError
from mlflow_llmbench.records.results import RunResult
from mlflow_llmbench.sweeps.sweep import SweepResult
from mlflow_llmbench.sweeps.upload import upload
from tests.servers import Door

ROOT = Path(__file__).resolve().parents[2]
CELL = {"backend": "fake", "output_tokens": 6, "prompt_tokens": 4, "repetitions": 5, "warmup": 1}
ARGUMENTS = [text for name, value in CELL.items() for text in (f"--{name.replace('_', '-')}", str(value))]
HANG = "fake:ttft_ms=1+itl_ms=1+fail=hang+below_batch=2"
"""A batch of two rows is measured at once; a batch of one row, next in the same worker, never ends."""


def fake(script: str = "ttft_ms=2+itl_ms=1", **parameters: Any) -> SweepResult:
    return run(model=f"fake:{script}", **(CELL | parameters))


def runs(uri: str) -> dict[str, Run]:
    client = MlflowClient(uri)
    found = client.search_runs([e.experiment_id for e in client.search_experiments()])
    return {str(one.info.run_id): one for one in found}


def states(uri: str, but: Sequence[str] = ()) -> dict[str, tuple[str, str | None]]:
    """Run name without its model → status and outcome, without the runs of these ids."""
    found = [one for run_id, one in runs(uri).items() if run_id not in but]
    return {without_model(one): (one.info.status, one.data.tags.get("llmbench.outcome")) for one in found}


def without_model(run: Run) -> str:
    return str(run.info.run_name).partition(" ")[2]


def until(condition: Callable[[], object], seconds: float = 200) -> None:
    """Wait until something holds. The limit only bounds a failure: importing torch takes a minute on a busy machine."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing came of it"
        time.sleep(0.05)


def start(folder: Path, uri: str, *arguments: str, **keywords: Any) -> subprocess.Popen[str]:
    """`llmbench run` of the fake backend in a folder, with a store."""
    command = [sys.executable, "-m", "mlflow_llmbench", "run", *ARGUMENTS, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": uri}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **keywords
    )


def first_cell_is_measured(folder: Path) -> bool:
    return any('"event":"measured"' in file.read_text() for file in folder.glob("llmbench-results/*/*/worker.jsonl"))


def workers(parent: int) -> list[int]:
    """Process ids of the children of a process."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and f"\nPPid:\t{parent}\n" in (folder / "status").read_text():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.mark.parametrize(
    ("how", "whom"), [("SIGINT", "parent"), ("SIGTERM", "parent"), ("SIGINT", "group"), ("SIGHUP", "group")]
)
def test_an_interrupted_sweep_keeps_what_was_measured_and_ends_every_run(
    store_uri: str, tmp_path: Path, how: str, whom: str
) -> None:
    process = start(tmp_path, store_uri, "--model", HANG, "--batch-size", "1,2", start_new_session=True)
    until(lambda: first_cell_is_measured(tmp_path))
    [worker] = workers(process.pid)
    (os.killpg if whom == "group" else os.kill)(process.pid, getattr(signal, how))
    until(lambda: "RUNNING" not in {one.info.status for one in runs(store_uri).values() if without_model(one) != "b2"})
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert not alive(worker)
    assert states(store_uri) == {
        "b2": ("FINISHED", "ok"),
        "b1": ("KILLED", "interrupted"),
        "batch_size": ("KILLED", None),
    }
    assert "interrupted" in output


@pytest.mark.charts
def test_an_interruption_between_the_charts_of_a_cell_and_its_upload_loses_nothing(
    store_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow_llmbench.reports import artifacts

    draw = artifacts.draw_cell

    def interrupted(result: RunResult, folder: Path) -> None:
        draw(result, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(artifacts, "draw_cell", interrupted)
    assert fake().outcome == "interrupted"
    [only] = runs(store_uri).values()
    assert only.info.status == "FINISHED"
    assert only.data.metrics["trust/repetitions"] == 5
    assert only.data.tags["llmbench.uploaded"]


def test_what_a_worker_had_told_and_nobody_had_read_is_taken_after_an_interruption(tmp_path: Path) -> None:
    cells = [
        Cell(model="fake:ttft_ms=1+itl_ms=1", backend="fake", batch_size=rows, output_tokens=4, warmup=1, repetitions=3)
        for rows in (2, 1)
    ]
    folders = [tmp_path / str(cell.batch_size) for cell in cells]

    def measured(folder: Path) -> bool:
        log = folder / "events.jsonl"
        return log.exists() and '"complete"' in log.read_text()

    def tell(event: Event) -> None:
        if isinstance(event, CellBegun):  # the worker goes on meanwhile, and tells what nobody reads
            until(lambda: all(measured(folder) for folder in folders))
            raise KeyboardInterrupt

    outcome = run_worker(
        WorkerJob("measure", tuple(cells), FakeBackend.resolve(cells[0]), tuple(folders)), tmp_path / "worker.log", tell
    )
    assert outcome.interrupted
    assert 0 in outcome.measured


@pytest.mark.parametrize("whom", ["parent", "group"])
def test_a_killed_sweep_is_ended_at_the_next_start_and_nothing_measured_is_lost(
    store_uri: str, tmp_path: Path, whom: str
) -> None:
    process = start(tmp_path, store_uri, "--model", HANG, "--batch-size", "1,2", start_new_session=True)
    until(lambda: first_cell_is_measured(tmp_path))
    [worker] = workers(process.pid)
    (os.killpg if whom == "group" else os.kill)(process.pid, signal.SIGKILL)
    process.communicate(timeout=200)
    until(lambda: not alive(worker))
    assert {status for status, _ in states(store_uri).values()} == {"RUNNING"}
    other = fake("ttft_ms=1")
    assert other.outcome == "ok"
    assert states(store_uri, other.run_ids) == {
        "b2": ("FINISHED", "ok"),
        "b1": ("FAILED", "crashed"),
        "batch_size": ("FAILED", None),
    }
    kept = next(one for one in runs(store_uri).values() if without_model(one) == "b2")
    assert kept.data.metrics["trust/repetitions"] == 5
    assert kept.data.metrics["memory/host_rss_gb_peak"] > 0
    before = states(store_uri)
    fake("ttft_ms=1", rerun="true")
    assert {name: state for name, state in states(store_uri).items() if name in before} == before


def test_a_killed_sweep_is_uploaded_by_name_too(store_uri: str, store_template: Path, tmp_path: Path) -> None:
    process = start(tmp_path, store_uri, "--model", HANG, "--batch-size", "1,2")
    until(lambda: first_cell_is_measured(tmp_path))
    [folder] = tmp_path.glob("llmbench-results/*")
    with pytest.raises(JournalError, match="is still being written by a running command"):
        upload(str(folder), store_uri)
    process.kill()
    process.communicate(timeout=200)
    shutil.copy(store_template, tmp_path / "elsewhere.db")
    elsewhere = f"sqlite:///{tmp_path}/elsewhere.db"
    assert upload(str(folder), elsewhere).new == 3
    assert states(elsewhere)["b2"] == ("FINISHED", "ok")
    at_home = upload(str(folder), store_uri)
    assert at_home.new + at_home.completed == 3
    assert "RUNNING" not in {status for status, _ in states(store_uri).values()}


def test_a_worker_that_is_killed_is_out_of_memory_and_the_rest_goes_on(store_uri: str) -> None:
    result = fake("ttft_ms=1+itl_ms=1+fail=kill+above_batch=1", batch_size="1,2")
    assert [row.outcome for row in result.rows] == ["ok", "oom"]
    assert "was killed at stage loaded, most likely by the kernel because memory ran out" in result.rows[1].message


def test_an_error_of_our_own_ends_every_run(store_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow_llmbench.measure import supervise

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(supervise, "run_worker", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        fake(batch_size="1,2")
    assert {status for status, _ in states(store_uri).values()} == {"FAILED"}


def test_leaving_through_sys_exit_ends_every_run(store_uri: str, tmp_path: Path) -> None:
    """A program that calls `run` and exits during it by `sys.exit`, from a watcher."""
    program = (
        "import sys\nfrom mlflow_llmbench import run\nfrom mlflow_llmbench.sweeps.progress import NullListener\n"
        "from mlflow_llmbench.measure.events import RepetitionEnded\nclass Leaving(NullListener):\n"
        "    def event(self, event):\n        if isinstance(event, RepetitionEnded): sys.exit(3)\n"
        f"run(model='fake:', batch_size='1,2', progress=Leaving(), tracking_uri={store_uri!r}, **{CELL!r})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
        capture_output=True,
    )
    assert done.returncode == 3, done.stderr
    assert {status for status, _ in states(store_uri).values()} == {"FAILED"}


@pytest.mark.parametrize(
    ("script", "limit", "message"),
    [
        ("load_ms=60000", {"load_timeout_s": 2}, "loading took more than load_timeout_s=2"),
        (
            "ttft_ms=60000",
            {"first_token_timeout_s": 2},
            "bringing a first token took more than first_token_timeout_s=2",
        ),
        (
            "ttft_ms=1+itl_ms=12000",
            {"repetition_timeout_s": 2},
            "one run of the cell took more than repetition_timeout_s=2",
        ),
        ("ttft_ms=1+itl_ms=100", {"cell_timeout_s": 1.2}, "the whole cell took more than cell_timeout_s=1.2"),
    ],
)
def test_limits_of_time(store_uri: str, script: str, limit: dict[str, float], message: str) -> None:
    result = fake(script, **limit)
    assert result.rows[0].outcome == "timeout"
    assert message in result.rows[0].message
    assert {status for status, _ in states(store_uri).values()} == {"FAILED"}


def test_what_took_too_long_with_one_thread_is_tried_with_two(store_uri: str) -> None:
    result = fake("ttft_ms=60000", threads="1,2", first_token_timeout_s=1)
    assert [(row.cell.threads, row.outcome) for row in result.rows] == [(1, "timeout"), (2, "timeout")]


def test_a_model_larger_than_the_limit_of_memory_is_ended_before_the_machine_suffers(store_uri: str) -> None:
    result = fake("memory_mb=600+load_ms=1", memory_limit="300MB")
    assert result.rows[0].outcome == "oom"
    assert "at stage loading" in result.rows[0].message and "since memory_limit is 0.300 GB" in result.rows[0].message
    [failed] = runs(store_uri).values()
    assert 0.3 < failed.data.metrics["memory/host_needed_gb_peak"] < 0.6
    assert fake("memory_mb=100+load_ms=1", memory_limit="300MB").outcome == "ok"


def test_a_real_model_larger_than_the_limit(store_uri: str, tiny_model: Path) -> None:
    result = run(
        model=str(tiny_model), memory_limit="150MB", force=True, prompt_tokens=8, output_tokens=2, batch_size="1,2"
    )
    assert [row.outcome for row in result.rows] == ["oom", "oom"]
    assert "was ended there, since memory_limit is 0.150 GB" in result.rows[0].message


def test_what_a_cell_is_estimated_to_need_is_held_against_the_limit(store_uri: str, tiny_model: Path) -> None:
    result = run(model=str(tiny_model), memory_limit="200MB", prompt_tokens=8, output_tokens=2)
    assert result.rows[0].outcome == "refused"
    assert "0.200 GB are allowed by memory_limit" in result.rows[0].message


def test_cells_that_need_no_less_than_a_failed_one_are_skipped(store_uri: str) -> None:
    """Two numbers of threads are two loads: a cell that failed in the first is not tried in the second."""
    result = fake("ttft_ms=1+itl_ms=1+fail=oom+above_batch=2", batch_size="1,4", threads="1,2")
    by_cell = {(row.cell.threads, row.cell.batch_size): row.outcome for row in result.rows}
    assert by_cell == {(1, 1): "ok", (1, 4): "oom", (2, 1): "ok", (2, 4): "skipped"}
    assert states(store_uri)["b4 threads=2"] == ("KILLED", "skipped")
    skipped = "Not tried: batch_size=4 with 4 + 6 tokens ended with oom, and this cell needs at least as much."
    assert skipped in result.table()
    assert result.exit_code == 1


@pytest.fixture
def steady_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what the verdict says of the machine, which other tests keep busy: only valid results are reused."""
    of_the_machine = {*contention.CHECKS, *verdict.OF_THE_SERIES}
    kept = tuple(check for check in verdict.CHECKS if check not in of_the_machine)
    monkeypatch.setitem(verdict.CHECKS_OF, "offline", kept)


@pytest.mark.usefixtures("steady_machine")
def test_the_same_command_again_measures_only_what_is_missing(store_uri: str, tmp_path: Path) -> None:
    first = fake("ttft_ms=5+itl_ms=5", batch_size="1,2")
    assert [row.verdict.reasons for row in first.rows if row.verdict] == [(), ()]
    again = fake("ttft_ms=5+itl_ms=5", batch_size="1,2,3")
    found = [runs(store_uri)[run_id] for run_id in again.run_ids]
    assert [one.data.tags.get("llmbench.linked_run") for one in found] == [*first.run_ids, None]
    assert [row.metrics for row in again.rows[:2]] == [row.metrics for row in first.rows]
    assert {one.info.status for one in found} == {"FINISHED"}
    assert {one.data.tags["mlflow.parentRunId"] for one in found} == {again.parent_id}
    assert f"/runs/{first.run_ids[0]})" in found[0].data.tags["mlflow.note.content"]
    assert found[0].info.start_time == runs(store_uri)[first.run_ids[0]].info.start_time
    measured = fake("ttft_ms=5+itl_ms=5", batch_size="1,2", rerun=True)
    assert not any("llmbench.linked_run" in runs(store_uri)[run_id].data.tags for run_id in measured.run_ids)


@pytest.mark.usefixtures("steady_machine")
def test_what_was_measured_elsewhere_is_found_in_the_store(store_uri: str) -> None:
    first = fake("ttft_ms=5+itl_ms=5")
    shutil.rmtree(first.folder)
    again = fake("ttft_ms=5+itl_ms=5", price_per_hour=3.6)
    found = runs(store_uri)[again.run_ids[0]]
    assert found.data.tags["llmbench.linked_run"] == first.run_ids[0]
    assert found.data.metrics["cost/per_million_tokens"] > 0


@pytest.mark.usefixtures("steady_machine")
def test_what_was_measured_here_is_found_without_its_store(
    store_uri: str, store_template: Path, tmp_path: Path
) -> None:
    first = fake("ttft_ms=5+itl_ms=5")
    (tmp_path / "other").mkdir()
    other = f"sqlite:///{shutil.copy(store_template, tmp_path / 'other' / 'mlflow.db')}"
    again = fake("ttft_ms=5+itl_ms=5", tracking_uri=other)
    assert [row.linked for row in again.rows] == list(first.run_ids)
    assert runs(other)[again.run_ids[0]].info.status == "FINISHED"


@pytest.mark.usefixtures("steady_machine")
def test_what_is_not_valid_or_was_measured_otherwise_is_measured_again(store_uri: str) -> None:
    for script, other in (("ttft_ms=5+itl_ms=5+stop_after=3", {}), ("ttft_ms=5+itl_ms=5", {"seed": 1})):
        fake(script)
        [again] = fake(script, **other).run_ids
        assert "llmbench.linked_run" not in runs(store_uri)[again].data.tags


@pytest.mark.usefixtures("steady_machine")
def test_the_given_run_of_mlflow_is_filled_with_the_linked_result(
    store_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake("ttft_ms=5+itl_ms=5")
    given = MlflowClient(store_uri).create_run("0").info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", given)
    assert fake("ttft_ms=5+itl_ms=5").run_ids == (given,)
    assert runs(store_uri)[given].data.metrics["trust/repetitions"] == 5
    assert runs(store_uri)[given].info.status == "FINISHED"


@contextmanager
def mlflow_server(uri: str, folder: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Start a real `mlflow server` on loopback and wait until it answers."""
    import urllib.request

    command = [
        sys.executable,
        *"-m mlflow server --backend-store-uri".split(),
        uri,
        "--artifacts-destination",
        str(folder / "artifacts"),
        "--port",
    ]
    process = subprocess.Popen(
        [*command, str(port), "--workers", "1"],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )

    def healthy() -> bool:
        try:
            return bool(urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).status == 200)
        except OSError:
            return False

    try:
        until(healthy)
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def free_port() -> int:
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def test_a_server_that_is_away_from_start_to_end_costs_little_and_loses_nothing(store_uri: str, tmp_path: Path) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    result = fake(batch_size="1,2", threads="1,2", tracking_uri=address)
    assert [row.outcome for row in result.rows] == ["ok"] * 4
    assert result.exit_code == 1
    assert "does not answer" in result.not_uploaded[0]
    assert upload(str(result.folder), store_uri).new == 5
    assert {status for status, _ in states(store_uri).values()} == {"FINISHED"}


def test_a_server_that_goes_and_comes_back_has_everything_in_the_end(store_uri: str, tmp_path: Path) -> None:
    """The server is behind a proxy that closes when the first cell is done, and opens when its absence was told."""

    def results() -> int:
        return len(list(tmp_path.glob("llmbench-results/*/*/artifacts/result.json")))

    port = free_port()
    with mlflow_server(store_uri, tmp_path, port):
        door = Door(port)
        process = start(
            tmp_path,
            f"http://127.0.0.1:{door.port}",
            "--model",
            "fake:ttft_ms=2+itl_ms=50",
            "--batch-size",
            "1",
            "--threads",
            "1,2,3",
        )
        until(lambda: results() >= 1)
        door.shut()
        assert process.stderr
        assert any("does not answer" in line for line in process.stderr)  # read up to the line that says so
        door.open()
        output, errors = process.communicate(timeout=200)
        door.shut()
    assert process.returncode == 0, output + errors
    assert {status for status, _ in states(store_uri).values()} == {"FINISHED"}
    assert len(states(store_uri)) == 4
    children = [one for one in runs(store_uri).values() if "mlflow.parentRunId" in one.data.tags]
    assert all("latency/ttft_ms_mean" in one.data.metrics for one in children)


@pytest.mark.charts
def test_a_full_disk_fails_the_cell_and_says_so(store_uri: str, tmp_path: Path) -> None:
    """Limit the command's files to 40 kB; a journal of long repetitions is larger. Another process writes the store."""
    code = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)); sys.argv[0] = "
        "'llmbench'; runpy.run_module('mlflow_llmbench', run_name='__main__')"
    )
    port = free_port()
    with mlflow_server(store_uri, tmp_path, port):
        command = [
            sys.executable,
            "-c",
            code,
            *"run --backend fake --model fake:ttft_ms=0+itl_ms=0 --output-tokens 1,500".split(),
        ]
        command += ["--prompt-tokens", "4", "--repetitions", "20", "--warmup", "1", "--json"]
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}",
            "MPLCONFIGDIR": str(tmp_path),
        }
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=120
        )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    outcomes = {
        one["params"]["output_tokens"]: one["outcome"] for one in json.loads(done.stdout.splitlines()[-1])["runs"]
    }
    assert outcomes == {500: "error", 1: "ok"}
    assert "Cannot write" in done.stdout and "File too large" in done.stdout
    assert "RUNNING" not in {status for status, _ in states(store_uri).values()}


def test_a_store_that_is_read_only(store_uri: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A full store is noticed before the start if the experiment must be created, else later; then results stay on
    disk."""
    only_read = store_uri.replace("sqlite:///", "sqlite:///file:") + "?mode=ro&uri=true"
    with pytest.raises(
        TrackingError,
        match=r"cannot be used: attempt to write a readonly database\. Check the path and its permissions",
    ):
        fake(tracking_uri=only_read)
    MlflowClient(store_uri).create_experiment("llmbench")
    result = fake(tracking_uri=only_read)
    assert (result.outcome, result.exit_code) == ("ok", 1)
    assert "readonly" in " ".join(result.not_uploaded)
    assert "Traceback" not in capfd.readouterr().err
    assert upload(str(result.folder), store_uri).new == 1


def test_two_sweeps_at_once_on_one_file(store_uri: str, tmp_path: Path) -> None:
    both = [start(tmp_path, store_uri, "--model", f"fake:ttft_ms={n}", "--batch-size", "1,2,3") for n in (1, 2)]
    errors = [process.communicate(timeout=200)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    assert [state for state in states(store_uri).values() if state[0] != "FINISHED"] == []
    assert len(runs(store_uri)) == 8


def test_the_journal_is_readable_after_a_crash_at_any_point(tmp_path: Path) -> None:
    """Cut the file at 200 places: exactly the complete events are read, and new ones are appended after them."""
    import random

    log = journal.EventLog(tmp_path / "whole.jsonl")
    for number in range(40):
        log.append(CellMeasured(number, texts=({"prompt": "zwölf\n" * number},)))
    log.close()
    whole = (tmp_path / "whole.jsonl").read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for place in random.Random(0).sample(range(len(whole) + 1), 200):
        cut = tmp_path / "cut.jsonl"
        cut.write_bytes(whole[:place])
        complete = sum(end <= place for end in ends)
        found = [event.number for event in journal.read_events(cut) if isinstance(event, CellMeasured)]
        assert found[:complete] == list(range(complete)) and len(found) <= complete + 1
        with journal.EventLog(cut) as log:
            log.append(CellMeasured(99))
        found = [event.number for event in journal.read_events(cut) if isinstance(event, CellMeasured)]
        assert found == [*range(complete), 99]


def test_a_half_written_result_is_not_accepted(store_uri: str) -> None:
    result = fake("ttft_ms=5+itl_ms=5")
    [file] = result.folder.glob("*/artifacts/result.json")
    text = file.read_text()
    file.write_text(text[: len(text) // 2])
    with pytest.raises(JournalError, match="Cannot read the result"):
        upload(str(result.folder), store_uri)


def test_one_of_each_failure_in_twenty_cells(store_uri: str) -> None:
    """All other cells are measured, the exit code is not 0, no run is left open, and the last lines name what failed
    and why."""
    scripts = {
        "oom": "ttft_ms=1+itl_ms=1+fail=oom+above_batch=3",
        "crashed": "ttft_ms=1+itl_ms=1+fail=crash+above_batch=3",
        "error": "ttft_ms=1+itl_ms=1+fail=error+above_batch=3",
        "timeout": "ttft_ms=1+itl_ms=1+fail=hang+above_batch=3",
        "ok": "ttft_ms=1+itl_ms=1",
    }
    result = run(
        model=[f"fake:{script}" for script in scripts.values()],
        **(CELL | {"batch_size": "1,2,3,4", "first_token_timeout_s": 3}),
    )
    outcomes = {
        script: [row.outcome for row in result.rows if row.cell.model == f"fake:{script}"]
        for script in scripts.values()
    }
    assert outcomes == {script: ["ok", "ok", "ok", word] for word, script in scripts.items()}
    assert (result.outcome, result.exit_code) == ("error", 1)
    assert "RUNNING" not in {status for status, _ in states(store_uri).values()}
    assert len(runs(store_uri)) == 21
    for word in ("oom", "crashed", "error", "timeout"):
        assert f"\n{word}: " in result.table()


def test_processes_are_in_turns(store_uri: str) -> None:
    """A B, B A, A B: the load of each process shows when it began."""
    result = fake(threads="1,2", processes=3)
    begun = []
    for folder in result.folder.glob("*/worker.jsonl"):
        thread = json.loads((folder.parent / "cell.json").read_text())["cell"]["threads"]
        begun += [(event.sent_ns, thread) for event in journal.read_events(folder) if isinstance(event, ModelLoaded)]
    assert [thread for _, thread in sorted(begun)] == [1, 2, 2, 1, 1, 2]
    assert {int(row.metrics["trust/repetitions"]) for row in result.rows} == {15}


def test_two_sides_in_turns(store_uri: str) -> None:
    from mlflow_llmbench.workflows.ab import parse_side, run_ab

    common = CELL | {"output_tokens": 20}
    done = run_ab(
        parse_side("model=fake:ttft_ms=2+itl_ms=2"), parse_side("model=fake:ttft_ms=2+itl_ms=6"), common, pairs=3
    )
    e2e = done.comparison.effect("latency/e2e_ms_mean")
    assert e2e and min(e2e.values_a) >= 2 + 19 * 2 and min(e2e.values_b) >= 2 + 19 * 6  # a busy machine takes longer
    assert done.comparison.processes == (3, 3)
    parent = runs(store_uri)[done.sweep.parent_id or ""]
    files = {item.path for item in MlflowClient(store_uri).list_artifacts(str(parent.info.run_id), "comparison")}
    assert {"comparison/comparison.md", "comparison/comparison.json"} <= files


def test_a_configuration_against_itself(store_uri: str) -> None:
    from mlflow_llmbench.workflows.ab import run_ab

    done = run_ab({}, {}, CELL | {"model": "fake:ttft_ms=5+itl_ms=3"}, pairs=3)
    assert done.comparison.processes == (3, 3)
    assert sorted(str(run.info.run_name) for run in runs(store_uri).values()) == ["A", "A against B", "B"]


@pytest.mark.parametrize(
    ("a", "b", "common", "message"),
    [
        ("int4", "quant=int8", {}, "not written as name=value: int4"),
        ("quant=int4,int8", "quant=int8", {}, "quant has several values: int4,int8"),
        ("quant=int4", "quant=int8", {"batch_size": "1,2"}, "batch_size has several values: 1,2"),
        ("speed=9", "quant=int8", {}, "Unknown parameter: speed"),
    ],
)
def test_sides_that_are_none(store_uri: str, a: str, b: str, common: dict[str, Any], message: str) -> None:
    from mlflow_llmbench.workflows.ab import parse_side, run_ab

    with pytest.raises(UsageError, match=message):
        run_ab(parse_side(a), parse_side(b), common)
    with pytest.raises(UsageError, match="too few pairs"):
        run_ab({}, {}, {}, pairs=1)
