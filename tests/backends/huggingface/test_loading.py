"""Checkpoints that do not hold exactly the weights of their model are refused, with the names of tensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mlflow.exceptions import MlflowException
from safetensors.torch import load_file, save_file

from mlflow_llmbench import run
from mlflow_llmbench.backends.huggingface.backend import TransformersBackend
from mlflow_llmbench.measure.journal import read_result
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.errors import ModelError, NotRealised
from tests.gguf_files import write_llama
from tests.loading import loaded

Tensors = dict[str, torch.Tensor]
UP = "model.layers.1.mlp.up_proj.weight"
QUANTS = ["none", "bf16", "int8", "int4", "int8-wo", "hqq4", "quanto8"]


def edited(source: Path, folder: Path, edit: Callable[[Tensors], Tensors]) -> Path:
    """Copy a model's folder with other tensors in its weight file."""
    shutil.copytree(source, folder)
    file = folder / "model.safetensors"
    save_file({k: v.contiguous() for k, v in edit(load_file(file)).items()}, file, metadata={"format": "pt"})
    return folder


def without(*parts: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: one for name, one in tensors.items() if not any(part in name for part in parts)}


def refusal(folder: Path, **settings: str) -> str:
    with pytest.raises(NotRealised) as caught, loaded(Cell(model=str(folder), device="cpu", **settings)):
        pass
    return str(caught.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quant", QUANTS)
def test_a_missing_weight_is_named_with_every_quantization(tiny_model: Path, tmp_path: Path, quant: str) -> None:
    folder = edited(tiny_model, tmp_path / "hole", without(UP))
    said = refusal(folder, quant=quant)
    assert said.startswith("The checkpoint hole cannot be loaded. The files lack ")
    assert said.endswith("Download it again, or use another one.")
    assert f"tensors: {UP}" in said


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quant", QUANTS)
def test_a_weight_of_another_shape_is_named_with_every_quantization(
    tiny_model: Path, tmp_path: Path, quant: str
) -> None:
    folder = edited(tiny_model, tmp_path / "odd", lambda tensors: {**tensors, UP: torch.randn(256, 64)})
    said = refusal(folder, quant=quant)
    assert f"1 tensors of another shape: {UP} (stored (256, 64), needed (256, 128))" in said


@pytest.mark.parametrize(
    ("more", "name"),
    [
        ({"model.layers.0.mlp.up_proj.bias": torch.zeros(256)}, "model.layers.0.mlp.up_proj.bias"),
        ({"model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(2)}, "up_proj.weight_scale_inv"),
        ({"model.layers.2.mlp.up_proj.weight": torch.ones(256, 128)}, "model.layers.2.mlp.up_proj.weight"),
    ],
)
def test_a_tensor_of_a_layer_that_the_configuration_leaves_out_is_named(
    tiny_model: Path, tmp_path: Path, more: Tensors, name: str
) -> None:
    folder = edited(tiny_model, tmp_path / "more", lambda tensors: {**tensors, **more})
    said = refusal(folder)
    assert "hold 1 tensors of the model's layers that its configuration leaves out" in said and name in said


def test_what_may_be_missing_or_beside_the_weights_is_no_fault(tiny_model: Path, tmp_path: Path) -> None:
    """Buffers of earlier versions, other heads and scales of a cache; and the head, if it is tied to the embedding."""
    beside = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16),
        "model.layers.0.self_attn.masked_bias": torch.tensor(-1e4),
        "model.layers.0.self_attn.k_proj.k_scale": torch.ones(1),
        "score.weight": torch.ones(2, 128),
        "vision_tower.layers.0.fc.weight": torch.ones(2, 2),
    }
    with loaded(Cell(model=str(edited(tiny_model, tmp_path / "old", lambda tensors: {**tensors, **beside})))):
        pass
    tied = edited(tiny_model, tmp_path / "tied", without("lm_head"))
    assert "lm_head.weight" in refusal(tied)
    config = json.loads((tied / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with loaded(Cell(model=str(tied))) as (backend, _):
        assert backend.model.lm_head.weight is backend.model.model.embed_tokens.weight


def test_experts_of_which_one_is_missing_are_named(tmp_path: Path) -> None:
    """transformers puts the matrices of all experts into one tensor, and names it in its log only."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_local_experts": 4}
    config = MixtralConfig(**sizes, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "mixture")
    one = edited(tmp_path / "mixture", tmp_path / "one", without("layers.1.block_sparse_moe.experts.2.w1"))
    assert "do not hold all parts of model.layers.1.mlp.experts.gate_up_proj" in refusal(one)
    whole = edited(tmp_path / "mixture", tmp_path / "three", without("layers.1.block_sparse_moe.experts.2"))
    assert "model.layers.1.mlp.experts" in refusal(whole)


def test_a_gguf_file_that_lacks_a_tensor_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = edited(tiny_model, tmp_path / "hole", without(UP))
    file = write_llama(folder, tmp_path / "hole.gguf")
    assert f"tensors: {UP}" in refusal(file, quant="bf16")


def test_the_assistant_and_the_plan_of_a_mixed_quantization_are_looked_at_too(tiny_model: Path, tmp_path: Path) -> None:
    hole = edited(tiny_model, tmp_path / "hole", without(UP))
    cell = Cell(model=str(tiny_model), decode="assisted", assistant=str(hole), device="cpu")
    with pytest.raises(NotRealised, match=f"The checkpoint hole cannot be loaded.*{UP}"), loaded(cell):
        pass
    assert UP in refusal(hole, quant="mixed", quant_budget="6", workload="synthetic")


@pytest.mark.filterwarnings("ignore")  # MLflow's own, on its import
def test_a_registered_version_of_it_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    from mlflow_llmbench.tracking import serving_model

    hole = edited(tiny_model, tmp_path / "hole", without(UP))
    config = {
        "location": str(hole), "source": "folder", "revision": "", "trust_remote_code": False, "gguf_file": None,
        "tokenizer": None, "attention": "auto", "quantization": {}, "device": "cpu", "dtype": "auto", "threads": None,
        "kernel": "",
    }  # fmt: skip
    with pytest.raises(MlflowException, match=f"is not the measured checkpoint. The files lack .*{UP}"):
        serving_model.Checkpoint(config)


def test_files_that_are_cut_off_or_missing_are_found_before_a_worker_starts(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    cut = tmp_path / "cut"
    shutil.copytree(tiny_model, cut)
    data = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(data[:-1000])
    wanted = rf"model.safetensors of \S+cut is cut off: it has {len(data) - 1000:,} bytes, .* end at {len(data):,}\."
    with pytest.raises(ModelError, match=wanted):
        TransformersBackend.resolve(Cell(model=str(cut)))
    (cut / "model.safetensors").write_bytes(b"<html>an error page of a proxy</html>")
    with pytest.raises(ModelError, match=r"its header is damaged\. Download the model again\."):
        TransformersBackend.resolve(Cell(model=str(cut)))
    shards = tmp_path / "shards"
    shutil.copytree(tiny_model, shards)
    (shards / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(shards, max_shard_size="300KB")
    last = sorted(shards.glob("*.safetensors"))[-1]
    last.unlink()
    with pytest.raises(ModelError, match=rf"lacks 1 of its \d weight files: {last.name}\. Download the model again"):
        TransformersBackend.resolve(Cell(model=str(shards)))


def test_a_run_of_it_fails_in_one_line_with_its_stage(
    tiny_model: Path, tmp_path: Path, store_uri: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = edited(tiny_model, tmp_path / "hole", without(UP))
    done = run(model=str(folder), prompt_tokens=8, output_tokens=4, repetitions=5, warmup=1)
    assert done.outcome == "error"
    result = read_result(next(done.folder.glob("*/artifacts")))
    assert result.failure and result.failure.stage == "loading" and not result.repetitions
    assert f"The files lack 1 of the model's tensors: {UP}. Download it again" in result.failure.message
