"""Sweeps on a real Ray cluster of two nodes on this machine. A package that only the second has distinguishes them."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from mlflow_llmbench import run
from mlflow_llmbench.measure import journal
from mlflow_llmbench.records.errors import LlmbenchError, MissingError, UsageError
from mlflow_llmbench.records.results import RunResult
from mlflow_llmbench.sweeps import ray_executor
from mlflow_llmbench.sweeps.progress import NullListener
from mlflow_llmbench.sweeps.sweep import SweepResult
from mlflow_llmbench.sweeps.upload import upload
from mlflow_llmbench.workflows import ab, preview
from tests.end_to_end.test_survival import alive, states, until, without_model

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'mlflow-llmbench[ray]'")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
    ),  # of Ray's own files
]

ROOT = Path(__file__).resolve().parents[2]
CELL = {"backend": "fake", "output_tokens": 4, "prompt_tokens": 4, "repetitions": 5, "warmup": 1}
CPUS = {"first": 4, "second": 2}
"""The first node has enough CPUs for two groups."""


HEAD = {
    "num_cpus": 0, "include_dashboard": False, "ray_client_server_port": 23117,
    # A dead node is noticed soon, and a slow one counts as alive.
    "_system_config": {"health_check_period_ms": 500, "health_check_failure_threshold": 12},
}  # fmt: skip


class Nodes:
    """The cluster, and its nodes by name."""

    def __init__(self, folder: Path) -> None:
        from ray.cluster_utils import Cluster

        dist_info = folder / "gguf-9.9.dist-info"
        dist_info.mkdir()
        (dist_info / "METADATA").write_text("Metadata-Version: 2.1\nName: gguf\nVersion: 9.9\n")
        self.folder = folder
        self.cluster = Cluster(initialize_head=True, head_node_args=HEAD)
        self.by_name: dict[str, Any] = {}
        for name in CPUS:
            self.add(name)

    def add(self, name: str) -> None:
        path = {"PYTHONPATH": str(self.folder)} if name == "second" else {}
        self.by_name[name] = self.cluster.add_node(num_cpus=CPUS[name], node_name=name, env_vars=path)

    def kill(self, name: str) -> None:
        self.cluster.remove_node(self.by_name.pop(name), allow_graceful=False)

    def restore(self) -> None:
        for name in CPUS.keys() - self.by_name.keys():
            self.add(name)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory, cache_folder: Path) -> Iterator[Nodes]:
    nodes = Nodes(tmp_path_factory.mktemp("second"))
    yield nodes
    session = nodes.cluster.head_node.get_session_dir_path()
    nodes.cluster.shutdown()
    shutil.rmtree(session, ignore_errors=True)


@pytest.fixture
def nodes(started: Nodes, monkeypatch: pytest.MonkeyPatch, store_uri: str) -> Iterator[Nodes]:
    started.restore()
    monkeypatch.setenv("RAY_ADDRESS", started.cluster.address)
    yield started
    assert not ray.is_initialized()


class Watching(NullListener):
    """Keep the lines, and call `on` when a cell begins on a node."""

    def __init__(self, on: Callable[[str, str], object] = lambda cell, node: None) -> None:
        self.lines: list[str] = []
        self.on = on

    def note(self, text: str) -> None:
        self.lines.append(text)
        cell, is_begun, node = text.partition(": measuring on ")
        if is_begun:
            self.on(cell, node)


def fake(script: str = "ttft_ms=2+itl_ms=1", **parameters: Any) -> SweepResult:
    return run(model=f"fake:{script}", **(CELL | {"on": "ray"} | parameters))


def results(found: SweepResult) -> dict[str, RunResult]:
    """Name of the cell → its result."""
    every = [journal.read_result(file.parent) for file in found.folder.glob("*/artifacts/result.json")]
    return {f"{one.cell.batch_size}/{one.cell.threads}": one for one in every}


def workers() -> dict[int, int]:
    """Our workers on this machine: process id → process id of the parent."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and b"mlflow_llmbench.measure.worker" in (folder / "cmdline").read_bytes():
                parent = int((folder / "status").read_text().split("PPid:")[1].split()[0])
                found[int(folder.name)] = parent
        except OSError:
            continue
    return found


def of_ray() -> dict[int, int]:
    """Our workers whose parent is a process of a Ray task."""
    return {
        pid: parent for pid, parent in workers().items() if b"ray::" in Path(f"/proc/{parent}/cmdline").read_bytes()
    }


def test_groups_are_measured_on_both_nodes_and_never_two_at_once_on_one(
    nodes: Nodes, store_uri: str, store_template: Path, tmp_path: Path
) -> None:
    found = fake("ttft_ms=20+itl_ms=10", threads="1,2,3,4", batch_size="1,2")
    assert (found.outcome, found.exit_code) == ("ok", 0)
    by_cell = results(found)
    assert len(by_cell) == 8
    spans: dict[str, list[tuple[int, int]]] = {"first": [], "second": []}
    for threads in range(1, 5):
        both = [by_cell[f"{rows}/{threads}"] for rows in (1, 2)]
        assert {one.environment["node"] for one in both} == {both[0].environment["node"]}, (
            "a load serves its cells on one node"
        )
        stamps = [repetition.wall_ms for one in both for repetition in one.repetitions]
        spans[both[0].environment["node"]].append((min(stamps), max(stamps)))
    for times in spans.values():
        assert times, "a node was idle"
        ordered = sorted(times)
        assert all(before[1] < after[0] for before, after in itertools.pairwise(ordered))
    kept = found.folder / by_cell["2/1"].hashes.config
    assert [event.name for event in journal.read_events(kept / "events.jsonl")] == [
        "warmup",
        *["repetition"] * 5,
        "complete",
    ]
    assert (kept / "worker.log").exists()
    assert set(states(store_uri).values()) == {("FINISHED", "ok"), ("FINISHED", None)}
    shutil.copy(store_template, tmp_path / "elsewhere.db")
    assert upload(str(found.folder), f"sqlite:///{tmp_path}/elsewhere.db").new == 9
    valid = [
        run_id
        for run_id, row in zip(found.run_ids, found.rows, strict=True)
        if row.verdict and row.verdict.word == "valid"
    ]
    assert valid, "no result was good enough to be taken over, on a machine that is too busy for this test"
    again = fake("ttft_ms=20+itl_ms=10", threads="1,2,3,4", batch_size="1,2")
    assert {one.linked for one in results(again).values() if one.linked} == set(valid)


def test_the_fingerprint_is_that_of_the_node(nodes: Nodes, store_uri: str) -> None:
    found = fake("ttft_ms=20+itl_ms=10", threads="1,2", processes=2)
    by_node = {one.environment["node"]: one for one in results(found).values()}
    assert by_node.keys() == {"first", "second"}
    first, second = by_node["first"], by_node["second"]
    assert second.environment["packages"]["gguf"] == "9.9" != first.environment["packages"].get("gguf")
    assert first.hashes.software != second.hashes.software
    assert first.hashes.env != second.hashes.env
    assert first.hashes.hardware == second.hashes.hardware == first.environment["hashes"]["hardware"]
    assert [r.process for r in second.repetitions] == [0] * 5 + [1] * 5, "both processes ran on the node of the first"
    tags = {MlflowClient(store_uri).get_run(run_id).data.tags["llmbench.env_hash"] for run_id in found.run_ids}
    assert tags == {first.hashes.env, second.hashes.env}


def test_failures_end_one_cell_and_what_waits_behind_them_is_not_tried(nodes: Nodes) -> None:
    found = fake("ttft_ms=1+itl_ms=1+fail=oom+above_batch=2", batch_size="1,4", threads="1,2,3,4,5,6,7,8")
    outcomes = [row.outcome for row in found.rows]
    assert outcomes.count("ok") == 8
    assert outcomes.count("skipped") >= 1, "each of eight groups began before the failure of the first was known"
    assert outcomes.count("oom") + outcomes.count("skipped") == 8
    assert found.exit_code == 1


def test_a_crash_is_told_as_at_home(nodes: Nodes, store_uri: str) -> None:
    found = fake("fail=crash")
    [row] = found.rows
    assert row.outcome == "crashed"
    assert f"exit code 13 at stage loaded: nothing was printed. The whole log is {found.folder}" in row.message
    assert list(states(store_uri).values()) == [("FAILED", "crashed")]
    [result] = results(found).values()
    assert result.environment["node"] in CPUS


def test_a_node_killed_in_the_middle_takes_only_the_unfinished_cell_with_it(
    nodes: Nodes, store_uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lost: list[str] = []

    def kill(cell: str, node: str) -> None:
        if cell.endswith(" b1") and not lost:
            lost.append(node)
            nodes.kill(node)

    watcher = Watching(kill)
    found = fake("ttft_ms=400+itl_ms=1", batch_size="1,2", progress=watcher)
    by_cell = results(found)
    assert found.outcome == "ok", found.table()
    [dead] = lost
    [left] = nodes.by_name
    assert {name: one.environment["node"] for name, one in by_cell.items()} == {"2/None": dead, "1/None": left}
    assert by_cell["2/None"].hashes.env != by_cell["1/None"].hashes.env
    assert {len(one.repetitions) for one in by_cell.values()} == {5}
    assert [line for line in watcher.lines if "is lost" in line] == [
        f"The node {dead} is lost (NodeDiedError). 1 cell of its group had not been measured."
    ]
    assert [line for line in watcher.lines if " b2: measuring" in line] == [
        f"fake:ttft_ms=400+itl_ms=1 b2: measuring on {dead}"
    ]
    assert {status for status, _ in states(store_uri).values()} == {"FINISHED"}
    until(lambda: not of_ray())
    assert "aylet" not in capsys.readouterr().out, "standard output is for the results"


def test_a_node_that_died_just_before_is_left_out(nodes: Nodes) -> None:
    """The cluster still lists it for some seconds; a task sent to it there ends with one of Ray's own errors."""
    nodes.kill("second")
    found = fake()
    assert found.outcome == "ok"


def test_processes_on_unlike_nodes_make_no_result(nodes: Nodes) -> None:
    """The node of the first process is killed before the second has ended, and the other node differs from it."""
    begun: list[str] = []

    def kill(cell: str, node: str) -> None:
        begun.append(node)
        if len(begun) == 2:
            nodes.kill(node)

    found = fake("ttft_ms=400+itl_ms=1", processes=2, progress=Watching(kill))
    assert begun[0] == begun[1] != begun[2]
    [row] = found.rows
    assert (row.outcome, "ran on nodes that differ" in row.message) == ("error", True)


def test_a_cell_whose_task_dies_again_and_again_has_crashed(nodes: Nodes) -> None:
    """Kill the cell's Ray process, and our worker with it, wherever it is tried."""
    gone: list[int] = []

    def kill(cell: str, node: str) -> None:
        if cell.endswith(" b1"):
            [(worker, parent)] = of_ray().items()
            os.kill(parent, signal.SIGKILL)
            until(lambda: not alive(worker))
            gone.append(worker)

    found = fake("ttft_ms=400+itl_ms=1", batch_size="1,2", progress=Watching(kill))
    assert [row.outcome for row in found.rows] == ["crashed", "ok"]
    assert len(gone) == 4
    assert "This cell was lost in this way 4 times." in found.rows[0].message


HANG = "fake:ttft_ms=1+itl_ms=1+fail=hang+below_batch=2"
"""A batch of two rows is measured at once; a batch of one row, next in the same worker, never ends."""


def start(folder: Path, *more: str) -> subprocess.Popen[str]:
    arguments = [text for name, value in CELL.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    command = [
        sys.executable,
        *"-m mlflow_llmbench run --model".split(),
        HANG,
        *"--batch-size 1,2 --on ray".split(),
        *arguments,
        *more,
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def the_second_cell_has_begun(folder: Path) -> bool:
    return any('"number":1' in file.read_text() for file in folder.glob("llmbench-results/*/*/worker.jsonl"))


@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM"])
def test_an_interruption_ends_the_workers_on_the_nodes_and_keeps_what_was_measured(
    nodes: Nodes, store_uri: str, tmp_path: Path, how: str
) -> None:
    process = start(tmp_path)
    until(lambda: the_second_cell_has_begun(tmp_path))
    [worker] = of_ray()
    process.send_signal(getattr(signal, how))
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    until(lambda: not alive(worker))
    assert states(store_uri) == {
        "b2": ("FINISHED", "ok"),
        "b1": ("KILLED", "interrupted"),
        "batch_size": ("KILLED", None),
    }
    assert "interrupted" in output


def test_a_killed_command_leaves_no_worker_and_what_has_arrived_can_be_uploaded(
    nodes: Nodes, store_uri: str, tmp_path: Path
) -> None:
    process = start(tmp_path)
    until(lambda: the_second_cell_has_begun(tmp_path))
    [worker] = of_ray()
    process.kill()
    process.communicate(timeout=200)
    until(lambda: not alive(worker))
    [folder] = tmp_path.glob("llmbench-results/*")
    assert upload(str(folder), store_uri).completed == 3
    assert states(store_uri) == {
        "b2": ("FINISHED", "ok"),
        "b1": ("FAILED", "crashed"),
        "batch_size": ("FAILED", None),
    }
    [kept] = [one for one in MlflowClient(store_uri).search_runs(["1"]) if without_model(one) == "b2"]
    [result] = [
        journal.read_result(file.parent)
        for file in folder.glob("*/artifacts/result.json")
        if '"outcome": "ok"' in file.read_text()
    ]
    assert result.environment["node"] in CPUS
    assert kept.data.tags["llmbench.env_hash"] == result.environment["hashes"]["env"]


def test_a_plan_is_made_from_the_facts_of_the_nodes(nodes: Nodes) -> None:
    found = preview.preview(**CELL, model="fake:", batch_size="1,2", on="ray")
    assert len(found.tried) == 2
    assert len(found.machine.env_hashes) == 2  # only the second node has another package
    assert found.machine.memory["auto"][1] == "are what the largest node of the cluster lets tasks have"
    assert not ray.is_initialized()


def test_from_a_machine_outside_of_the_cluster(nodes: Nodes) -> None:
    pytest.importorskip("grpc", reason="Ray Client needs grpcio: pip install 'mlflow-llmbench[ray]'")
    watcher = Watching()
    found = fake(batch_size="1,2", on="ray://127.0.0.1:23117", progress=watcher)
    assert [row.outcome for row in found.rows] == ["ok", "ok"]
    assert len([line for line in watcher.lines if ": measuring on " in line]) == 2


@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        ({"on": "rey"}, UsageError, "Unknown on: rey. Give here, ray, or ray://HOST:PORT"),
        ({"on": "ray://host"}, UsageError, "Unknown on: ray://host. Give here"),
        (
            {"device": "cuda:1"},
            UsageError,
            "device=cuda:1 names a GPU of one machine, but on=ray has several machines. Give device=cuda.",
        ),
        (
            {"on": "ray://127.0.0.1:9"},
            MissingError,
            "The Ray cluster ray://127.0.0.1:9 cannot be reached: .*by default port 10001",
        ),
        ({}, MissingError, "The Ray cluster 127.0.0.1:9 cannot be reached: .*ray start --head"),
    ],
)
def test_what_cannot_work_is_one_line_within_seconds_before_anything_starts(
    store_uri: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    parameters: dict[str, Any],
    error: type[LlmbenchError],
    message: str,
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")  # port `discard`: nobody listens
    with pytest.raises(error, match=message) as caught:
        fake(**parameters)
    assert "\n" not in str(caught.value)
    assert states(store_uri) == {}
    assert not (tmp_path / "llmbench-results").exists()


def test_a_gpu_that_no_node_has_is_told_before_anything_starts(nodes: Nodes, store_uri: str) -> None:
    with pytest.raises(
        MissingError, match=r"No node of the Ray cluster offers a GPU and a CPU to tasks \(device=cuda\)"
    ):
        fake(device="cuda")
    assert states(store_uri) == {}


def test_without_ray_the_command_to_install_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        MissingError, match=r"on=ray needs Ray, which is not installed. Run: pip install 'ray\[client\]>=2.40'"
    ):
        fake()


def test_a_comparison_in_turns_is_of_one_machine() -> None:
    with pytest.raises(UsageError, match="take turns on one machine, not on a cluster: on=ray. Leave it out."):
        ab.run_ab({"batch_size": 1}, {"batch_size": 2}, {**CELL, "model": "fake:", "on": "ray"})


def test_events_are_kept_until_they_have_been_received() -> None:
    queue = ray_executor.EventQueue()
    queue.put(1, "a")
    queue.put(1, "b")
    assert queue.after(0) == [(1, "a"), (1, "b")]
    assert queue.after(0) == [(1, "a"), (1, "b")], "the first answer was lost"
    queue.put(2, "c")
    assert queue.after(2) == [(2, "c")]
    assert queue.after(3) == []
