"""A worker with another rank: both are its memory and its CPU time, and neither outlives the other."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from mlflow_llmbench.backends.base import DeviceMemory
from mlflow_llmbench.backends.fake import FakeBackend
from mlflow_llmbench.backends.parallel import RankMemory, device_of, host_of
from mlflow_llmbench.measure import supervise
from mlflow_llmbench.measure.events import RanksStarted
from mlflow_llmbench.measure.journal import parse_events
from mlflow_llmbench.measure.outcome import GroupOutcome, stages_of
from mlflow_llmbench.measure.task import WorkerJob
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.errors import WorkerCrashed
from mlflow_llmbench.system import memory
from mlflow_llmbench.system.memory import HostMemory

MB = 1_000_000

BACKEND = '''
import dataclasses, subprocess, sys, time
from mlflow_llmbench.backends.fake import FakeBackend
from mlflow_llmbench.backends.parallel import RankMemory
from mlflow_llmbench.system import machine, memory


class Ranked(FakeBackend):
    """Has a rank that holds 200 MB and does nothing. With 13 tokens it dies in the second call, which never ends."""

    capabilities = dataclasses.replace(FakeBackend.capabilities, parameters=("tensor_parallel",))
    handed = 0

    def start_ranks(self):
        text = "import sys; held = b'1' * 200_000_000; print(); sys.stdin.read()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", text], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            preexec_fn=machine.die_with_parent,
        )
        self.process.stdout.readline()
        self.rank_pids = (self.process.pid,)

    def ready(self, prompts, output_tokens):
        self.handed += 1

    def generate(self, prompts, output_tokens, emit, *history):
        if self.handed == 2 and output_tokens == 13:
            self.process.kill()
            time.sleep(600)
        super().generate(prompts, output_tokens, emit, *history)

    def rank_memory(self):
        return (RankMemory(memory.read()), RankMemory(memory.read(self.process.pid)))

    def collective_share(self, prompts, output_tokens):
        return output_tokens / 100

    def end_ranks(self):
        self.process.kill()
'''


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WorkerJob:
    """A job for the backend above, which an installed package offers."""
    site = tmp_path / "site"
    info = site / "ranked-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "ranked.py").write_text(BACKEND)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ranked\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[mlflow_llmbench.backends]\nranked = ranked:Ranked\n")
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("PYTHONPATH", str(site))
    cell = Cell("fake:", backend="ranked", tensor_parallel=2, prompt_tokens=4, output_tokens=4, warmup=1, repetitions=3)
    (tmp_path / "cell").mkdir()
    return WorkerJob("measure", (cell,), FakeBackend.resolve(cell), (tmp_path / "cell",))


def measured(job: WorkerJob) -> tuple[GroupOutcome, int]:
    """Run a job; return its outcome and the process id of its rank."""
    log = job.folders[0] / "worker.log"
    outcome = supervise.run_worker(job, log)
    events = parse_events(log.with_suffix(".jsonl").read_bytes(), log)
    return outcome, next(event.pids[0] for event in events if isinstance(event, RanksStarted))


def test_the_memory_of_a_cell_is_that_of_all_its_ranks(job: WorkerJob) -> None:
    outcome, pid = measured(job)
    assert outcome.error is None and memory.read(pid) is None
    assert outcome.measured[0].collective_share == 0.04
    stages = stages_of(outcome, 0)
    assert stages.ranks and len(stages.ranks) == 2
    first, second = (rank.host_needed for rank in stages.ranks)
    assert second["peak"] >= 200 * MB > first["peak"]
    for stage in ("baseline", "loaded"):
        assert stages.host_needed[stage] == first[stage] + second[stage]
    assert stages.host_needed["peak"] >= first["peak"] + 200 * MB
    assert stages.host_rss["peak"] >= 200 * MB
    assert any(sample.anonymous > 200 * MB for sample in outcome.samples)


def test_a_worker_that_waits_for_a_dead_rank_is_ended(job: WorkerJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "RANK_GRACE_S", 0.3)
    outcome, pid = measured(dataclasses.replace(job, cells=(dataclasses.replace(job.cells[0], output_tokens=13),)))
    assert isinstance(outcome.error, WorkerCrashed)
    assert str(outcome.error) == (
        "Rank 1 of 2 ended at stage loaded, and the worker waited for it. Measure again, or use fewer ranks."
    )
    assert memory.read(pid) is None


def test_a_crash_that_a_worker_tells_of_its_rank_is_a_crash() -> None:
    outcome = GroupOutcome()
    line = {"event": "failed", "outcome": "crashed", "kind": "WorkerCrashed", "message": "Rank 1 of 2 ended."}
    for event in parse_events(json.dumps(line).encode() + b"\n", Path("worker.jsonl")):
        outcome.take(event)
    assert isinstance(outcome.error, WorkerCrashed) and outcome.error.outcome == "crashed"


def test_pages_that_ranks_share_count_once() -> None:
    """1,000 bytes of libraries and 300 of a checkpoint in each; the second rank maps 200 bytes of the checkpoint."""
    first = RankMemory(HostMemory(1_800, 500, 1_900), mapped=300)
    second = RankMemory(HostMemory(1_600, 400, 1_750), mapped=200)
    assert host_of([first, second]) == HostMemory(1_800 + 400 + 200, 900, 1_900 + 600 + 150)
    assert host_of([first]) == first.host
    assert host_of([first, RankMemory(None)]) is None
    assert host_of([RankMemory(HostMemory(9)), second]) == HostMemory(9 + 600, None, None)


def test_device_memory_of_ranks_is_their_sum_or_unknown() -> None:
    one = RankMemory(None, DeviceMemory(1, 2, 3, 4))
    assert device_of([one, one]) == DeviceMemory(2, 4, 6, 8)
    assert device_of([one, RankMemory(None, DeviceMemory(1, 2, 3))]) == DeviceMemory(2, 4, 6)
    assert device_of([one, RankMemory(None)]) is None
