"""One group of cells on a node of a cluster: in a scratch folder, without MLflow or Ray, reported as it runs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mlflow_llmbench.backends.fake import FakeBackend
from mlflow_llmbench.measure import group
from mlflow_llmbench.measure import outcome as outcome_measure
from mlflow_llmbench.measure import task as task_measure
from mlflow_llmbench.measure.events import Event
from mlflow_llmbench.measure.journal import parse_events
from mlflow_llmbench.records.cell import Cell, Options
from mlflow_llmbench.records.results import ModelFacts

ROOT = Path(__file__).resolve().parents[2]
HOME = Path("/somewhere/else/sweep")


def cell(script: str, **parameters: Any) -> Cell:
    return Cell(
        f"fake:{script}",
        backend="fake",
        output_tokens=4,
        **({"prompt_tokens": 4, "repetitions": 5, "warmup": 1} | parameters),
    )


def task(*cells: Cell, model: ModelFacts | None = None) -> task_measure.Task:
    return task_measure.Task(
        cells, model or FakeBackend.resolve(cells[0]), tuple(HOME / f"cell-{n}" for n in range(len(cells))), Options()
    )


class Letters:
    """Collect what a node posts, like the command's side does."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int | None]] = []
        self.files: dict[str, bytes] = {}
        self.after: list[dict[str, bytes]] = []  # the files after each event

    def __call__(self, event: Event, files: Mapping[str, bytes]) -> None:
        self.events.append((event.name, getattr(event, "number", None)))
        for path, more in files.items():
            self.files[path] = self.files.get(path, b"") + more
        self.after.append(dict(self.files))


def outcomes(told: bytes) -> list[tuple[list[str], outcome_measure.GroupOutcome]]:
    return list(outcome_measure.replay(parse_events(told, HOME / "worker.jsonl")))


def test_a_group_is_measured_in_a_scratch_folder_and_its_files_come_back() -> None:
    letters = Letters()
    outcome, files = group.measure_apart(
        task(cell("", batch_size=2), cell("")), {}, {"node": "far", "git": "abc"}, letters
    )
    assert letters.events == [
        ("placed", None),
        ("begun", None),
        ("cell", 0),
        ("measured", 0),
        ("cell", 1),
        ("measured", 1),
    ]
    assert sorted(outcome.measured) == [0, 1]
    assert outcome.environment is not None
    assert (outcome.environment["node"], outcome.environment["git"]) == ("far", "abc")
    assert {"cell-0/worker.jsonl", "cell-0/worker.log", "cell-0/events.jsonl", "cell-1/events.jsonl"} == set(files)
    [(names, again)] = outcomes(files["cell-0/worker.jsonl"])
    assert names == ["cell-0", "cell-1"]
    assert (again.measured, again.samples, again.environment) == (
        outcome.measured,
        outcome.samples,
        outcome.environment,
    )
    assert not HOME.exists()


def test_what_was_told_when_a_cell_had_ended_is_enough_for_its_result() -> None:
    """Each letter has whole lines, and all letters together are a prefix of the final files."""
    letters = Letters()
    outcome, files = group.measure_apart(task(cell("", batch_size=2), cell("")), {}, {}, letters)
    assert all(files[path].startswith(part) and part.endswith(b"\n") for path, part in letters.files.items())
    [(_, early)] = outcomes(letters.after[3]["cell-0/worker.jsonl"])  # after the first `measured`
    assert early.measured == {0: outcome.measured[0]}
    assert outcome_measure.stages_of(early, 0).host_rss.keys() == {"baseline", "loading", "loaded", "peak", "steady"}
    assert early.environment == outcome.environment


def test_the_cells_behind_one_that_failed_are_not_told() -> None:
    letters = Letters()
    outcome, files = group.measure_apart(task(cell("fail=crash+above_batch=1", batch_size=2)), {}, {}, letters)
    assert letters.events[-1] == ("cell", 0)
    assert getattr(outcome.error, "outcome", "") == "crashed"
    assert str(outcome.error).endswith(f"The whole log is {HOME}/cell-0/worker.log.")
    assert "cell-0/worker.log" in files


def test_a_workload_file_comes_along(tmp_path: Path) -> None:
    text = (json.dumps({"prompt": "one prompt"}) + "\n").encode()
    outcome, _ = group.measure_apart(
        task(cell("", workload="nowhere/mine.jsonl", prompt_tokens=None)), {"nowhere/mine.jsonl": text}, {}, Letters()
    )
    assert outcome.error is None
    assert outcome.texts[0][0]["prompt"] == "one prompt"


@pytest.mark.parametrize("source", ["folder", "gguf"])
def test_a_model_that_lies_on_another_disk_is_one_line(source: str) -> None:
    model = ModelFacts("mine", source, "/nowhere/mine", "0")
    outcome, files = group.measure_apart(task(cell(""), model=model), {}, {}, Letters())
    assert outcome.stage == "preparing"
    assert (
        str(outcome.error)
        == "There is no /nowhere/mine on this node. Put it on a disk that every node has under that path, "
        "or give a Hub id."
    )
    assert files == {}


def test_files_that_cannot_be_fetched_end_the_group_at_preparing() -> None:
    letters = Letters()
    model = ModelFacts("nobody/nothing", "hub", "nobody/nothing", "0" * 40)
    outcome, files = group.measure_apart(task(Cell("nobody/nothing"), model=model), {}, {}, letters)
    assert (outcome.stage, letters.events) == ("preparing", [("placed", None)])
    assert "LocalEntryNotFoundError" in str(outcome.error)
    assert "cell-0/prepare.log" in files


def test_a_node_needs_neither_mlflow_nor_ray_nor_matplotlib() -> None:
    """The task's module is imported in a process where these packages seem not installed."""
    program = (
        "import sys\nfor name in ('mlflow', 'ray', 'matplotlib'): sys.modules[name] = None\n"
        "from mlflow_llmbench.measure import group\nfrom mlflow_llmbench.sweeps import ray_executor\n"
        "from tests.measure.test_group import Letters, cell, task\n"
        "outcome, files = group.measure_apart(task(cell('')), {}, {}, Letters())\n"
        "print(sorted(outcome.measured), outcome.error, callable(ray_executor._on_node), "
        "callable(ray_executor._describe))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "[0] None True True\n", done.stderr
