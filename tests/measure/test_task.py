"""The job that a worker reads from its standard input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlflow_llmbench.measure import supervise
from mlflow_llmbench.measure.task import OFFLOADED, QualityOrder, WorkerJob
from mlflow_llmbench.measure.worker import TASKS
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.results import ModelFacts
from mlflow_llmbench.system import machine

CELL = Cell("owner/m", backend="fake", batch_size=3)
FACTS = ModelFacts("owner/m", "hub", "owner/m", "abc", config={"layers": [1, 2]})


@pytest.mark.parametrize(
    "job",
    [
        WorkerJob("resolve", (CELL,)),
        WorkerJob("prepare", (CELL,), FACTS, (Path("/somewhere/Grüße"),)),
        WorkerJob(
            "measure",
            (CELL, Cell("owner/m", backend="fake")),
            FACTS,
            (Path("/a"), Path("/b")),
            QualityOrder("bundled", "digest", {"qa": "/cache/file"}, True, "why", ("arc", "mine.yaml"), 5),
            searches=True,
        ),
        WorkerJob("train", (CELL,), FACTS, (Path("/a"),), training={"folder": "/out", "room": [None, ""]}),
    ],
    ids=lambda job: str(job.task),
)
def test_a_job_comes_back_from_its_line(job: WorkerJob) -> None:
    line = job.to_line()
    assert line.endswith("\n") and line.count("\n") == 1
    assert WorkerJob.from_line(line) == job
    assert WorkerJob.from_line(json.dumps({**json.loads(line), "of_a_later_version": 1})) == job
    assert job.task in TASKS


def test_threads_are_those_of_the_first_cell_or_all_physical_cores() -> None:
    assert WorkerJob("measure", (Cell("m", threads=3), Cell("m", threads=5))).threads == 3
    assert WorkerJob("measure", (Cell("m"),)).threads == machine.physical_cores()


@pytest.mark.parametrize("fault", ["kill", "crash", "none"])
def test_weights_that_a_worker_wrote_to_the_disk_are_gone_after_its_end(tmp_path: Path, fault: str) -> None:
    model = "fake:" if fault == "none" else f"fake:fail={fault}"
    cell = Cell(model, backend="fake", prompt_tokens=4, output_tokens=2, warmup=1, repetitions=5)
    written = tmp_path / "cell" / OFFLOADED / "weight.safetensors"
    written.parent.mkdir(parents=True)
    written.write_text("as a worker with placement=auto has left it")
    job = WorkerJob("measure", (cell,), ModelFacts(model, "none", model, "r"), (tmp_path / "cell",))
    outcome = supervise.run_worker(job, tmp_path / "cell" / "worker.log", limits=supervise.Limits(memory_bytes=10**10))
    assert outcome.ended == (fault == "none") and not written.parent.exists()
    assert (tmp_path / "cell" / "worker.jsonl").exists()
