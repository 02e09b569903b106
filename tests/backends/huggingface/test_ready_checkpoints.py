"""Ready-quantized GPTQ and AWQ checkpoints: loaded as they are, measured as ordinary cells with quant=none."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mlflow_llmbench import run
from mlflow_llmbench.backends.huggingface import gptq
from mlflow_llmbench.backends.huggingface.backend import TransformersBackend
from mlflow_llmbench.config import models
from mlflow_llmbench.measure.journal import read_result
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.errors import MissingError, UsageError
from mlflow_llmbench.records.quantizations import GPTQ
from mlflow_llmbench.records.results import ModelFacts
from mlflow_llmbench.system import estimate

installed = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in GPTQ.packages) or not shutil.which("g++"),
    reason="needs mlflow-llmbench[gptq] and g++",
)
FAST = {"prompt_tokens": 8, "output_tokens": 4, "repetitions": 5, "warmup": 1}
GROUP = 64
NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)
"""AWQ's GEMM layout: the column, of eight neighbouring ones, in each four bits of a word, from the lowest."""


def write_awq(source: Path, folder: Path) -> dict[str, Any]:
    """Write a checkpoint in AWQ's GEMM format, in its published layout; return the weights that it represents.

    No library of AWQ is used.
    """
    import torch
    from safetensors.torch import load_file, save_file

    def pack(values: torch.Tensor) -> torch.Tensor:
        words = torch.zeros(values.shape[0], values.shape[1] // 8, dtype=torch.int32)
        for place, column in enumerate(NIBBLES):
            words |= values[:, column::8].to(torch.int32) << (4 * place)
        return words

    shutil.copytree(source, folder)
    stored: dict[str, torch.Tensor] = {}
    meant: dict[str, torch.Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if not name.endswith("proj.weight"):
            stored[name] = weight.half()
            meant[name] = stored[name].float()
            continue
        rows, columns = weight.shape
        groups = weight.T.reshape(columns // GROUP, GROUP, rows)
        low, high = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
        scale = ((high - low) / 15).half().float()
        zero = (-low / scale).round().clamp(0, 15)
        levels = (groups / scale[:, None] + zero[:, None]).round().clamp(0, 15)
        base = name.removesuffix(".weight")
        stored |= {
            f"{base}.qweight": pack(levels.reshape(columns, rows)),
            f"{base}.qzeros": pack(zero),
            f"{base}.scales": scale.half(),
        }
        meant[name] = ((levels - zero[:, None]) * scale[:, None]).reshape(columns, rows).T
    save_file(
        {name: tensor.contiguous() for name, tensor in stored.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = json.loads((folder / "config.json").read_text())
    method = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float16", "quantization_config": method}))
    return meant


@installed
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")  # warnings of GPTQModel, which otherwise runs in a process of its own
def test_an_awq_checkpoint_is_measured_and_computes_what_it_stands_for(
    tiny_model: Path, tmp_path: Path, store_uri: str
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    meant = write_awq(tiny_model, tmp_path / "tiny-awq")
    done = run(model=str(tmp_path / "tiny-awq"), **FAST)
    assert done.outcome == "ok", done.table()
    result = read_result(next(done.folder.glob("*/artifacts")))
    assert result.load and result.cell.quant == "none"
    facts = result.load.facts
    assert (facts["quant.method"], facts["quant.bits"], facts["quant.group_size"]) == ("awq", 4, GROUP)
    assert (
        4.25 < float(facts["quant.bits_per_weight"]) < 4.6
    )  # the kernel for CPUs unpacks the zero points in its first call
    assert "Awq" in str(facts["quant.kernel"])
    exact = AutoModelForCausalLM.from_pretrained(tiny_model)
    original = exact.state_dict()["model.layers.0.mlp.up_proj.weight"].clone()
    ids = torch.randint(100, 500, (1, 64), generator=torch.Generator().manual_seed(0))
    cell = Cell(model=str(tmp_path / "tiny-awq"), device="cpu")
    backend = TransformersBackend(cell, TransformersBackend.resolve(cell))
    assert backend.load().facts["quant.bits_per_weight"] == pytest.approx(4 + 16 / GROUP + 4 / GROUP, abs=0.001)
    with torch.inference_mode():
        exact.load_state_dict(meant, strict=False)
        assert not torch.equal(exact.state_dict()["model.layers.0.mlp.up_proj.weight"], original)
        expected = exact(ids).logits.flatten().float()
        found = backend.model(ids).logits.flatten().float()
    assert float(torch.nn.functional.cosine_similarity(expected, found, dim=0)) > 0.9999


@installed
@pytest.mark.timeout(600)
def test_a_ready_gptq_checkpoint_is_measured_as_it_is(
    tiny_model: Path, tmp_path: Path, store_uri: str, cache_folder: Path
) -> None:
    made = run(model=str(tiny_model), quant="gptq", group_size=GROUP, seed=7, **FAST)
    assert made.outcome == "ok", made.table()
    newest = max(cache_folder.glob("gptq/*"), key=lambda folder: folder.stat().st_mtime)
    shutil.copytree(newest, tmp_path / "from-elsewhere")
    (tmp_path / "from-elsewhere" / gptq.RECIPE).unlink()
    done = run(model=str(tmp_path / "from-elsewhere"), **FAST)
    assert done.outcome == "ok", done.table()
    own, ready = (read_result(next(folder.glob("*/artifacts"))) for folder in (made.folder, done.folder))
    assert own.load and ready.load and ready.cell.quant == "none"
    assert (ready.load.facts["quant.method"], ready.load.facts["quant.bits"]) == ("gptq", 4)
    assert ready.load.facts["quant.bits_per_weight"] == own.load.facts["quant.bits_per_weight"]
    assert "quant.calibration" not in ready.load.facts


@pytest.mark.parametrize(("method", "package"), [("awq", "gptqmodel"), ("gptq", "optimum")])
def test_what_a_ready_checkpoint_needs_is_named(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, package: str
) -> None:
    shutil.copytree(tiny_model, tmp_path / "ready")
    config = json.loads((tmp_path / "ready" / "config.json").read_text())
    (tmp_path / "ready" / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": method, "bits": 4}})
    )
    with pytest.raises(
        UsageError,
        match=rf"quant=int4 cannot be made from .*, which is quantized already \({method}\)\. Use quant=none",
    ):
        TransformersBackend.resolve(Cell(model=str(tmp_path / "ready"), quant="int4", device="cpu"))
    known = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name in GPTQ.packages else known(name, *rest)
    )
    wanted = (
        rf"ready is quantized with {method}, and loading it needs the package {package}, which is not installed\. "
        r"Run: pip install 'gptqmodel>=7.0' 'optimum>=2.0'"
    )
    with pytest.raises(MissingError, match=wanted):
        TransformersBackend.resolve(Cell(model=str(tmp_path / "ready"), device="cpu"))


@pytest.mark.parametrize(
    ("method", "backend", "packed"),
    [
        ("awq", "transformers", True), ("gptq", "transformers", True),
        ("bitsandbytes", "transformers", True), ("torchao", "transformers", True),
        ("compressed-tensors", "transformers", False), ("compressed-tensors", "vllm", True),
        ("mxfp4", "transformers", False),
    ],
)  # fmt: skip
def test_a_ready_checkpoint_is_expected_to_take_the_room_of_its_files_where_it_stays_packed(
    method: str, backend: str, packed: bool
) -> None:
    preset = models.find_preset("opt-1.3b")
    assert preset
    plain = ModelFacts("m", "folder", "m", "r", {}, "float16", 2048)
    as_gptq = preset.shape.weight_bytes("gptq", "float16")
    ready = ModelFacts(
        "m", "folder", "m", "r", {"quantization_config": {"quant_method": method}}, "float16", 2048, as_gptq
    )
    expected = estimate.predicted_bytes(Cell(quant="gptq" if packed else "none"), plain, preset.shape)
    assert estimate.predicted_bytes(Cell(backend=backend), ready, preset.shape) == expected
    peaks = {"read_bytes_per_s": 1e10, "flops_per_s": 1e15}
    assert estimate.least_seconds(Cell(), ready, preset.shape, peaks) == estimate.least_seconds(
        Cell(quant="gptq" if packed and backend == "transformers" else "none"), plain, preset.shape, peaks
    )
