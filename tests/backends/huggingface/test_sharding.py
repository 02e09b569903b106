"""What cannot be sharded over ranks is refused in the plan, in one line, before any rank is started."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlflow_llmbench.backends.checkpoints.architectures import has_tensor_plan
from mlflow_llmbench.backends.huggingface import sharding
from mlflow_llmbench.backends.huggingface.backend import TransformersBackend
from mlflow_llmbench.cli.main import main
from mlflow_llmbench.config.spec import parse
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.errors import MissingError, UsageError
from mlflow_llmbench.records.results import ModelFacts
from mlflow_llmbench.sweeps.planning import plan

LLAMA = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8,
         "num_key_value_heads": 4, "vocab_size": 100, "intermediate_size": 128}  # fmt: skip
OPT = {"model_type": "opt", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "vocab_size": 100}
TWO = Cell(model="m", device="cpu", tensor_parallel=2)


def refused(cell: Cell, config: dict[str, Any] = LLAMA, source: str = "folder") -> str | None:
    return sharding.refusal(cell, ModelFacts("m", source, "/m", "r", config))


@pytest.mark.parametrize(
    ("cell", "config", "sentence"),
    [
        ({"tensor_parallel": 8}, LLAMA, "tensor_parallel=8 does not divide the 4 key and value heads of m. "
                                        "Use tensor_parallel=1,2,4."),
        ({"tensor_parallel": 3}, LLAMA, "tensor_parallel=3 does not divide the 8 attention heads of m. "
                                        "Use tensor_parallel=1,2."),
        ({}, OPT, "tensor_parallel=2 is not possible with m: transformers has no plan to shard the architecture opt. "
                  "Use tensor_parallel=1, or another model such as a Llama or Qwen."),
        ({}, LLAMA | {"model_type": "hrm_text"},
         "tensor_parallel=2 is not possible with m: transformers' plan to shard the architecture hrm_text fails, or "
         "changes what the model computes. Use tensor_parallel=1."),
        ({"quant": "int8"}, LLAMA, "tensor_parallel=2 cannot shard quant=int8. Use an unquantized checkpoint with "
                                   "quant=none,fp32,fp16,bf16."),
        ({}, LLAMA | {"quantization_config": {"quant_method": "gptq"}},
         "tensor_parallel=2 cannot shard gptq. Use an unquantized checkpoint with quant=none,fp32,fp16,bf16."),
        ({"decode": "prompt_lookup"}, LLAMA, "tensor_parallel=2 works with decode=generate and kv_cache=auto only, and "
                                             "decode=prompt_lookup is asked for. Use one of them."),
        ({"kv_cache": "int8"}, LLAMA, "tensor_parallel=2 works with decode=generate and kv_cache=auto only, and "
                                      "kv_cache=int8 is asked for. Use one of them."),
        ({"threads": 3}, LLAMA, "threads=3 cannot be divided over tensor_parallel=2. Give threads=2."),
    ],
)  # fmt: skip
def test_what_ranks_cannot_do(cell: dict[str, Any], config: dict[str, Any], sentence: str) -> None:
    asked = dataclasses.replace(TWO, **cell)
    assert refused(asked, config) == sentence
    assert refused(dataclasses.replace(asked, tensor_parallel=1), config) is None


def test_a_gguf_file_is_not_sharded() -> None:
    assert (refused(TWO, source="gguf") or "").startswith("tensor_parallel=2 cannot shard a GGUF file. ")


@pytest.mark.parametrize("given", [{}, {"quant": "bf16"}, {"quant": "fp32"}, {"quant": "fp16", "threads": 4}])
def test_what_ranks_can_do(given: dict[str, Any]) -> None:
    assert refused(dataclasses.replace(TWO, **given)) is None


def test_each_rank_needs_a_gpu(nvml: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    nvml("driver 570\ngpu GPU-1 A100\n")
    on_gpu = dataclasses.replace(TWO, device="cuda")
    assert refused(on_gpu) == "tensor_parallel=2 needs 2 GPUs, and this machine has 1. Use device=cpu, or fewer ranks."
    nvml("driver 570\ngpu GPU-1 A100\ngpu GPU-2 A100\n")
    assert refused(on_gpu) is None
    sentence = refused(dataclasses.replace(TWO, device="cuda:1"))
    assert sentence and sentence.endswith("Give device=cuda, and choose GPUs by CUDA_VISIBLE_DEVICES.")
    assert [sharding.device_of("cuda", on_gpu, rank) for rank in (0, 1)] == ["cuda:0", "cuda:1"]


@pytest.mark.parametrize(
    ("config", "known"),
    [
        ({"model_type": "llama"}, True),
        ({"model_type": "qwen3"}, True),
        ({"model_type": "gemma3_text"}, True),
        ({"model_type": "opt"}, False),
        ({"model_type": "gpt2"}, False),
        ({"model_type": "nobody_knows"}, None),
        ({"model_type": "llama", "auto_map": {"AutoModel": "own.Model"}}, None),
        ({}, None),
    ],
)
def test_architectures_that_transformers_can_shard(config: dict[str, Any], known: bool | None) -> None:
    assert has_tensor_plan(config) is known


def test_an_older_transformers_is_told_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingError, match=r"^tensor_parallel=2 needs a later transformers, .* pip install -U "):
        sharding.require(TWO)
    sharding.require(Cell())


def test_the_threads_of_a_cell_are_divided() -> None:
    assert [sharding.threads_of(Cell(threads=4, tensor_parallel=ranks)) for ranks in (1, 2, 4, 8)] == [4, 2, 1, 1]
    assert "tensor_parallel" in TransformersBackend.capabilities.parameters


def test_a_plan_refuses_single_cells_or_all(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["plan", "--model", str(tiny_model), "--device", "cpu", "--prompt-tokens", "8"]
    assert main([*given, "--quant", "bf16", "--tensor-parallel", "1,2,4"]) == 0
    said = capsys.readouterr().out
    assert "1 cell would be refused (settings): tensor_parallel=4 does not divide the 2 key and value heads" in said
    assert main([*given, "--quant", "int8", "--tensor-parallel", "1,2"]) == 0
    assert "(settings): tensor_parallel=2 cannot shard quant=int8. " in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"^tensor_parallel=4 does not divide the 2 key and value heads of "):
        plan(parse({"model": str(tiny_model), "tensor_parallel": "4", "device": "cpu", "prompt_tokens": "8"}))
