"""One plan: `llmbench plan` prints what `run` then does, and each cell is resolved, hashed and estimated once."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mlflow_llmbench import run
from mlflow_llmbench.cli.main import main
from mlflow_llmbench.config.spec import parse
from mlflow_llmbench.measure.journal import read_result
from mlflow_llmbench.records.cell import Cell, as_text
from mlflow_llmbench.records.results import ModelFacts, RunResult
from mlflow_llmbench.sweeps.executor import MachineFacts, this_machine
from mlflow_llmbench.sweeps.planning import plan, plan_in_turns
from mlflow_llmbench.sweeps.sweep import SweepResult
from mlflow_llmbench.workflows import ab, reproduce

CELL: dict[str, Any] = {
    "backend": "counted", "model": "fake:", "prompt_tokens": 4, "output_tokens": 4, "repetitions": 5, "warmup": 1
}  # fmt: skip
SWEEP = CELL | {"quant": "none,fp16", "batch_size": "1,2,4096", "prompt_tokens": "4,300", "memory_limit": "1GB"}

BACKEND = '''
import dataclasses
from mlflow_llmbench.backends.fake import FakeBackend
from mlflow_llmbench.config.models import PRESETS
from mlflow_llmbench.records.results import ModelFacts

RESOLVED, HASHED = [], []


class CountedFacts(ModelFacts):
    """A configuration is hashed with the identity of its model, which is read for nothing else here."""

    @property
    def identity(self):
        HASHED.append(self.name)
        return super().identity


class Counted(FakeBackend):
    """The fake backend with the shape of a real model, counting how often it is asked for the model."""

    @classmethod
    def resolve(cls, cell):
        RESOLVED.append(cell.quant)
        known = vars(super().resolve(cell)) | {"context": 128, "config": dict(PRESETS["pythia-70m"].config)}
        return CountedFacts(**known)
'''


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module of a backend that another package declares, with its counts."""
    site = tmp_path / "site"
    (site / "counted-1.0.dist-info").mkdir(parents=True)
    (site / "counted-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: counted\nVersion: 1.0\n")
    (site / "counted-1.0.dist-info" / "entry_points.txt").write_text(
        "[mlflow_llmbench.backends]\ncounted = counted_backend:Counted\n"
    )
    (site / "counted_backend.py").write_text(BACKEND)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", str(site))
    yield importlib.import_module("counted_backend")
    sys.modules.pop("counted_backend")


def results(done: SweepResult) -> dict[tuple[str, ...], RunResult]:
    """Map the parameters of each cell, as text, to its result."""
    found = [read_result(file.parent) for file in done.folder.glob("*/artifacts/result.json")]
    return {parameters(result.cell): result for result in found}


def parameters(cell: Cell) -> tuple[str, ...]:
    return tuple(as_text(name, value) for name, value in vars(cell).items())


def test_a_run_does_what_the_plan_has_printed(
    counted: ModuleType, store_uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [text for name, value in SWEEP.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    assert main(["plan", *options, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    measured = results(run(**SWEEP))
    assert len(measured) == len(printed["cells"]) == 12
    for cell in printed["cells"]:
        result = measured[tuple(cell["parameters"].values())]
        assert result.predicted_bytes == cell["predicted_bytes"]
        assert (result.failure.message if result.failure else None) == cell["refused"]
        assert result.outcome == ("refused" if cell["refused"] else "ok")
    refused = [cell["refused"] for cell in printed["cells"] if cell["refused"]]
    assert len([text for text in refused if "more than the context" in text]) == 6
    assert len([text for text in refused if "1.00 GB are allowed by memory_limit" in text]) == 2
    assert (printed["tried"], printed["loads"]) == (4, 2)


def test_results_have_the_hashes_names_and_folders_of_the_plan(counted: ModuleType, store_uri: str) -> None:
    planned = plan(parse(SWEEP))
    done = run(**SWEEP)
    measured = results(done)
    for one in planned.cells:
        assert measured[parameters(one.cell)].hashes == one.hashes
        known = json.loads((done.folder / one.folder / "cell.json").read_text())
        assert (known["name"], known["predicted"]) == (one.name, one.predicted_bytes)
    assert json.loads((done.folder / "sweep.json").read_text())["order"] == [one.folder for one in planned.cells]


def test_each_load_is_resolved_once_and_each_cell_hashed_once(counted: ModuleType, store_uri: str) -> None:
    run(**SWEEP)
    assert counted.RESOLVED == ["none", "fp16"]
    assert len(counted.HASHED) == 12


def test_two_sides_are_planned_once(counted: ModuleType, store_uri: str) -> None:
    ab.run_ab({}, {}, CELL, pairs=2)
    assert (counted.RESOLVED, len(counted.HASHED)) == (["none"], 1)
    ab.run_ab({"batch_size": 1}, {"batch_size": 2}, CELL, pairs=2)
    assert (counted.RESOLVED[1:], len(counted.HASHED[1:])) == (["none", "none"], 2)


def test_a_reproduction_is_planned_once(counted: ModuleType, store_uri: str) -> None:
    [run_id] = run(**CELL).run_ids
    counted.RESOLVED.clear()
    counted.HASHED.clear()
    assert reproduce.reproduce(run_id, tracking_uri=store_uri).run_id
    assert (counted.RESOLVED, len(counted.HASHED)) == (["none"], 1)


def test_a_plan_is_made_from_the_facts_of_the_executor(counted: ModuleType) -> None:
    spec = parse(CELL)
    here = this_machine(spec.options, ["auto"])
    hashes = {"hardware": "1" * 16, "software": "2" * 16, "env": "3" * 16}
    rates = {f"{hashes['hardware']} auto auto": {"read_bytes_per_s": 1e9, "flops_per_s": 1e12}}
    other = MachineFacts(
        {**here.environment, "hashes": hashes}, ("3" * 16,), {"auto": (10**6, "are free there")}, rates
    )
    [planned] = plan(spec, other).cells
    assert (planned.hashes.hardware, planned.hashes.software, planned.hashes.env) == tuple(hashes.values())
    assert planned.refusal and planned.refusal.kind == "memory" and "are free there" in planned.refusal.sentence
    assert planned.least_s and planned.least_s > 0
    assert plan(spec, dataclasses.replace(other, memory={})).cells[0].refusal is None


def test_two_equal_sides_have_folders_of_their_own() -> None:
    spec = parse(CELL | {"backend": "fake"})
    found = plan_in_turns([spec, spec], spec.options)
    first, second = found.cells
    assert (first.name, second.name, found.parent_name) == ("A", "B", "A against B")
    assert second.folder == f"{first.folder}-2" == f"{first.hashes.config}-2"
    assert found.groups == ((first,), (second,))


def test_a_search_extends_the_plan_by_a_cell_of_the_same_load() -> None:
    asked = {"backend": "openai", "url": "http://127.0.0.1:9", "model": "m", "request_rate": "1", "slo_ttft_ms": "100"}
    facts = ModelFacts("m", "server", "http://127.0.0.1:9", "unknown")
    before = plan(parse(asked | {"find": "goodput"}), model=facts)
    [origin] = before.cells
    after = before.with_cell(dataclasses.replace(origin.cell, request_rate=2.0), origin)
    assert after.cells[:1] == before.cells and after.groups == (after.cells,)
    assert after.spec.axes["request_rate"] == (1.0, 2.0)
    new = after.cells[1]
    assert (origin.name, new.name) == ("m 1/s", "m 2/s")
    assert new == dataclasses.replace(
        plan(parse(asked | {"find": "goodput", "request_rate": "2"}), before.machine, model=facts).cells[0]
    )


def test_a_given_model_is_not_resolved_and_its_vocabulary_decides_the_workload(counted: ModuleType) -> None:
    spec = parse(CELL)
    facts = ModelFacts("mine", "none", "", "main")
    first, same, other = (plan(spec, model=facts, vocab_size=size).cells[0].hashes.workload for size in (50, 50, 60))
    assert first == same != other
    assert counted.RESOLVED == []
