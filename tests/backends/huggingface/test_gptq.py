"""GPTQ on the CPU from end to end: calibrate, quantize, cache, load, run.

Needs the extra `gptq` and a C++ compiler; the first use compiles for a minute.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from mlflow_llmbench import run
from mlflow_llmbench.backends.huggingface import gptq, quantization
from mlflow_llmbench.backends.huggingface.backend import TransformersBackend
from mlflow_llmbench.config.cells import expand_cells, group_cells
from mlflow_llmbench.config.spec import parse
from mlflow_llmbench.measure.journal import read_result
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.errors import MissingError, UsageError
from mlflow_llmbench.records.quantizations import GPTQ
from mlflow_llmbench.records.results import Verdict
from tests.results import made

installed = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in GPTQ.packages) or not shutil.which("g++"),
    reason="needs mlflow-llmbench[gptq] and g++",
)
FAST = {"group_size": 64, "prompt_tokens": 8, "output_tokens": 4, "repetitions": 5, "warmup": 1}


@installed
@pytest.mark.timeout(600)
def test_a_checkpoint_is_quantized_once_and_measured(store_uri: str, tiny_model: Path, cache_folder: Path) -> None:
    first = run(model=str(tiny_model), quant="gptq", batch_size="1,2", **FAST)
    assert [row.outcome for row in first.rows] == ["ok", "ok"], first.table()
    result = read_result(next(first.folder.glob("*/artifacts")))
    assert result.load
    facts = result.load.facts
    assert (facts["quant.method"], facts["quant.bits"], facts["quant.group_size"]) == ("gptq", 4, 64)
    assert 4 < float(facts["quant.bits_per_weight"]) < 5.5
    assert facts["quant.calibration"] == "synthetic" and facts["quant.quantize_s"] > 0
    original = run(
        model=str(tiny_model), quant="fp32", **{name: value for name, value in FAST.items() if name != "group_size"}
    ).folder
    unquantized = read_result(next(original.glob("*/artifacts")))
    assert unquantized.load and facts["model.parameters"] == unquantized.load.facts["model.parameters"]
    assert (result.load.weight_bytes or 0) < 0.6 * (unquantized.load.weight_bytes or 0)
    [kept] = cache_folder.glob("gptq/*")
    written = (kept / "model.safetensors").stat().st_mtime_ns
    run(model=str(tiny_model), quant="gptq", rerun=True, **FAST)
    assert (kept / "model.safetensors").stat().st_mtime_ns == written
    assert not list(cache_folder.glob("gptq/.gptq-*"))


@installed
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")  # warnings of optimum and GPTQModel, which otherwise run in their own process
def test_what_is_loaded_computes_what_was_quantized(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stored format must be the configured one: with a zero point off by one, it still generates text."""
    import torch
    from transformers import AutoModelForCausalLM

    from mlflow_llmbench.analysis.decisions.deployment import Evidence, deployment_of
    from mlflow_llmbench.backends.huggingface.backend import TransformersBackend
    from mlflow_llmbench.tracking.serving_model import Checkpoint

    monkeypatch.setenv("LLMBENCH_CACHE", str(tmp_path))
    torch.manual_seed(0)
    ids = torch.randint(100, 500, (1, 64))
    with torch.inference_mode():
        exact = AutoModelForCausalLM.from_pretrained(tiny_model)(ids).logits.flatten().float()
        near = {}
        for quant in ("gptq8", "gptq"):
            cell = Cell(model=str(tiny_model), quant=quant, group_size=64)
            facts = TransformersBackend.resolve(cell)
            TransformersBackend.prepare(cell, facts)
            backend = TransformersBackend(cell, facts)
            info = backend.load()
            logits = backend.model(ids).logits.flatten().float()
            near[quant] = float(torch.nn.functional.cosine_similarity(exact, logits, dim=0))
            deployment = deployment_of(
                made(cell=cell, model=facts, load=info), {}, Evidence("r", "s", Verdict("valid"))
            )
            served = Checkpoint(dict(deployment.config))  # from the folder that was made and measured
            assert torch.equal(served.model(ids).logits.flatten().float(), logits)
    assert near["gptq8"] > 0.999
    assert near["gptq"] > 0.97


@installed
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")
def test_drawn_prompts_calibrate_without_a_tokenizer(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    cell = Cell(model=str(folder), quant="gptq", group_size=64, workload="mixed", batching="static", request_rate=1.0)
    facts = TransformersBackend.resolve(cell)
    TransformersBackend.prepare(cell, facts)
    assert gptq.recorded(str(gptq.folder_of(cell, facts)))["quant.calibration"] == "mixed"


def test_other_calibration_is_another_checkpoint_and_another_load() -> None:
    cells = [Cell(quant="gptq", workload=workload) for workload in ("qa", "code", "qa")]
    assert len(group_cells(list(dict.fromkeys(cells)))) == 2
    spec = parse({"quant": "gptq", "workload": "qa,code", "batch_size": "1,2"})
    assert [len(group.cells) for group in group_cells(expand_cells(spec))] == [2, 2]
    assert len(group_cells([Cell(quant="int4", workload=workload) for workload in ("qa", "code")])) == 1


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "installed", lambda name: False)
    with pytest.raises(
        MissingError,
        match=r"needs the package optimum, which is not installed\. Run: pip install 'gptqmodel>=7.0' 'optimum>=2.0'",
    ):
        quantization.require(Cell(quant="gptq"))
    monkeypatch.setattr(quantization, "installed", lambda name: True)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(MissingError, match=r"needs a C\+\+ compiler, .* no-such-compiler is not installed"):
        quantization.require(Cell(quant="gptq"))


def test_a_checkpoint_that_is_quantized_is_not_quantized_again(tiny_model: Path, tmp_path: Path) -> None:
    from mlflow_llmbench.backends.checkpoints.sources import find_model

    shutil.copytree(tiny_model, tmp_path / "made")
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    (tmp_path / "made" / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    with pytest.raises(UsageError, match="which is quantized already"):
        find_model(Cell(model=str(tmp_path / "made"), quant="gptq"))
