"""The job that a worker reads from its standard input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlflow_llmbench.measure.task import QualityOrder, WorkerJob
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
