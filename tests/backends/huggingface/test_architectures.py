"""Architectures of many families, tiny and with random weights: what holds which quantization, and what is refused.

All that transformers has are in docs/reference/architectures.md, by benchmarks/architectures.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mlflow_llmbench import run
from mlflow_llmbench.backends.checkpoints import architectures
from mlflow_llmbench.backends.huggingface import inspection, recipe
from mlflow_llmbench.config import models
from mlflow_llmbench.measure.journal import read_result
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.errors import ModelError, NotRealised
from tests.architectures import causal_types, write_tiny
from tests.loading import loaded

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12], [13, 14, 15, 16, 17, 18, 19, 20]]
SEEING = ["qwen2_vl", "llava", "gemma3", "mistral3"]
FAST: dict[str, Any] = {"prompt_tokens": 8, "output_tokens": 4, "repetitions": 5, "warmup": 1}

pytestmark = pytest.mark.filterwarnings("ignore")


def generated(backend: Any) -> int:
    steps: list[Any] = []
    backend.generate(PROMPTS, 3, steps.append)
    assert bool(torch.isfinite(backend.logits(PROMPTS[0], 2)).all())
    return len(steps)


@pytest.mark.parametrize(
    ("model_type", "plain", "packed"),
    [
        ("gpt2", "Conv1D × 8", "Linear4bit × 8"),
        ("openai-gpt", "Conv1D × 8", "Linear4bit × 8"),
        ("opt", "Linear × 12", "Linear4bit × 12"),
        ("bloom", "Linear × 8", "Linear4bit × 8"),
        ("gpt_neox", "Linear × 8", "Linear4bit × 8"),
        ("gemma3_text", "Linear × 14", "Linear4bit × 14"),
        ("rwkv", "Linear × 14", "Linear4bit × 14"),
        ("bart", "Linear × 20", "Linear4bit × 20"),
        ("bert", "Linear × 13", "Linear4bit × 13"),
        ("gemma3", "Linear × 14", "Linear4bit × 14"),
        ("mixtral", "Linear × 8", None),
        ("granitemoe", "Linear × 8", None),
    ],
)
def test_layers_are_recognised_by_what_they_compute(
    tmp_path: Path, model_type: str, plain: str, packed: str | None
) -> None:
    """Each is measured in bf16; int4 changes all linear layers, or is refused for the experts that it would leave."""
    folder = write_tiny(model_type, tmp_path / "tiny")
    with loaded(Cell(model=str(folder), quant="bf16")) as (backend, info):
        assert (info.facts["quant.bits_per_weight"], info.facts["quant.kernel"]) == (16.0, plain)
        assert generated(backend) == 3
    if packed is None:
        with (
            pytest.raises(NotRealised, match="the experts of this model"),
            loaded(Cell(model=str(folder), quant="int4")),
        ):
            pass
        return
    with loaded(Cell(model=str(folder), quant="int4")) as (backend, info):
        assert info.facts["quant.kernel"] == packed
        assert 4.5 <= float(info.facts["quant.bits_per_weight"]) <= 4.6
        assert generated(backend) == 3


def test_layers_of_gpt2_are_those_that_were_trained(tmp_path: Path) -> None:
    """Counted by hand; with 8 bits the model computes what it computed before, though its matrices are transposed."""
    folder = write_tiny("gpt2", tmp_path / "gpt2")
    with loaded(Cell(model=str(folder), quant="fp32")) as (backend, info):
        assert info.facts["quant.bits_per_weight"] == 32.0 and info.facts["model.dtype"] == "float32"
        exact = backend.logits(PROMPTS[0], 4)
        found = inspection.inspect_model(backend.model)
        assert found.layers["Conv1D"].weights == 2 * (3 * 128 * 128 + 128 * 128 + 2 * 128 * 256)
        assert found.layers["Conv1D"].first == "transformer.h.0.attn.c_attn"
    with loaded(Cell(model=str(folder), quant="int8")) as (backend, _):
        near = torch.nn.functional.cosine_similarity(exact, backend.logits(PROMPTS[0], 4).float(), dim=-1)
    assert float(near.min()) > 0.999
    folder = write_tiny("falcon", tmp_path / "falcon")
    message = "bitsandbytes does not change layers of the class FalconLinear: use quant=none"
    with pytest.raises(NotRealised, match=message), loaded(Cell(model=str(folder), quant="int8")):
        pass
    folder = tmp_path / "gpt2"
    for quant in ("int8-wo", "hqq4", "quanto8"):
        message = (
            f"quant={quant} was asked for.*'Conv1D': 8.*100% of their weights.*does not change layers of the class"
        )
        with pytest.raises(NotRealised, match=message), loaded(Cell(model=str(folder), quant=quant)):
            pass


def test_recurrent_models_have_no_experts(tmp_path: Path) -> None:
    """Their states and mixings are parameters of three dimensions, which are multiplied element by element."""
    for model_type in ("mamba", "rwkv", "recurrent_gemma"):
        with loaded(Cell(model=str(write_tiny(model_type, tmp_path / model_type)), quant="bf16")) as (backend, _):
            assert inspection.inspect_model(backend.model).expert_weights == 0
            assert generated(backend) == 3


@pytest.mark.parametrize("model_type", ["hunyuan_v1_moe", "hy_v4"])
def test_a_small_layer_that_a_model_keeps_in_float32_is_no_reason(tmp_path: Path, model_type: str) -> None:
    """Its own code makes the router in float32, whatever dtype is asked for."""
    with loaded(Cell(model=str(write_tiny(model_type, tmp_path / model_type)), quant="bf16")) as (backend, info):
        found = inspection.inspect_model(backend.model)
        assert found.matrix_weights.keys() == {"bfloat16", "float32"}
        assert 16 < float(info.facts["quant.bits_per_weight"]) < 16.2
        assert generated(backend) == 3


def test_a_model_with_a_tenth_in_another_dtype_is_not_what_was_asked_for(tmp_path: Path) -> None:
    with loaded(Cell(model=str(write_tiny("opt", tmp_path / "opt")), quant="bf16")) as (backend, _):
        layers = backend.model.model.decoder.layers
        layers[0].fc1 = torch.nn.Linear(128, 256)
        with pytest.raises(NotRealised, match=r"quant=bf16 was asked for, but the linear layers hold 18\.00 bits"):
            inspection.verify("bf16", "cpu", inspection.inspect_model(backend.model))
        layers[0].fc1 = torch.nn.Linear(128, 256).half()
        with pytest.raises(NotRealised, match="quant=bf16 was asked for, but the parameters' dtypes are"):
            inspection.verify("bf16", "cpu", inspection.inspect_model(backend.model))


def test_a_layer_that_is_left_alone_is_named(tmp_path: Path) -> None:
    folder = write_tiny("opt", tmp_path / "opt")
    with loaded(Cell(model=str(folder), quant="int8")) as (backend, _):
        layers = backend.model.model.decoder.layers
        layers[0].fc1 = torch.nn.Linear(128, 256).bfloat16()
        found = inspection.inspect_model(backend.model)
        with pytest.raises(
            NotRealised, match=r"1\d% of their weights .* left model\.decoder\.layers\.0\.fc1 and others"
        ):
            inspection.verify("int8", "cpu", found)


def test_a_model_without_linear_layers_has_no_bits() -> None:
    class Table(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            from transformers import PretrainedConfig

            self.words, self.config = torch.nn.Embedding(8, 4), PretrainedConfig()

        def get_output_embeddings(self) -> None: ...

    found = inspection.inspect_model(Table())
    assert found.linear_bits is None and not found.layers and found.matrix_weights == {"float32": 32}
    with pytest.raises(NotRealised, match="has no linear layers that bitsandbytes knows"):
        inspection.verify("int4", "cpu", found)


@pytest.mark.parametrize("model_type", SEEING)
def test_the_text_side_of_a_model_that_sees_is_measured(tmp_path: Path, model_type: str) -> None:
    """Its tower is loaded and counted as memory; layers, bits and the bytes of a step are those of the text."""
    folder = write_tiny(model_type, tmp_path / model_type, dtype="bfloat16")
    with loaded(Cell(model=str(folder), quant="int4")) as (backend, info):
        names = recipe.linear_layers(backend.model)
        assert len(names) == 14 and not any("vis" in name for name in names)
        assert any("vis" in name for name, _ in backend.model.named_modules())
        assert info.facts["quant.kernel"] == "Linear4bit × 14" and info.step_bytes < info.weight_bytes
        assert info.vocab_size == 256
        assert generated(backend) == 3


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("model_type", SEEING)
def test_a_run_of_a_model_that_sees(tmp_path: Path, store_uri: str, model_type: str) -> None:
    done = run(model=str(write_tiny(model_type, tmp_path / model_type)), quant="int8", **FAST)
    assert done.outcome == "ok", done.table()
    result = read_result(next(done.folder.glob("*/artifacts")))
    assert result.load and result.load.facts["quant.kernel"] == "Linear8bitLt × 14"


# Models that do not generate text


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "BertForMaskedLM fills in masked words"),
        ({"model_type": "bert", "architectures": ["BertLMHeadModel"]}, "and its is_decoder is not set"),
        ({"model_type": "roberta"}, "roberta fills in masked words"),
        ({"model_type": "albert", "architectures": ["AlbertModel"]}, "fills in masked words"),
        ({"model_type": "deberta-v2", "architectures": ["DebertaV2ForMaskedLM"]}, "fills in masked words"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "is an encoder-decoder"),
        ({"model_type": "mt5", "is_encoder_decoder": True}, "is an encoder-decoder"),
        ({"model_type": "bart", "architectures": ["BartForConditionalGeneration"]}, "is an encoder-decoder"),
        ({"model_type": "whisper", "is_encoder_decoder": True}, "is an encoder-decoder"),
        ({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}, "classifies texts"),
        ({"model_type": "vit", "architectures": ["ViTModel"]}, "is not among those that transformers generates"),
    ],
)
def test_others_are_refused_by_their_configuration(
    tiny_model: Path, tmp_path: Path, config: dict[str, Any], what: str
) -> None:
    import shutil

    from mlflow_llmbench.backends.huggingface.backend import TransformersBackend

    shutil.copytree(tiny_model, tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="does not generate text token by token: its architecture") as caught:
        TransformersBackend.resolve(Cell(model=str(tmp_path / "other")))
    assert what in str(caught.value) and str(caught.value).endswith("Use a causal language model (GPT-2, Llama, …).")


def test_decoders_and_what_is_not_known_are_not_refused() -> None:
    for config in (
        {"model_type": "bert", "architectures": ["BertLMHeadModel"], "is_decoder": True},
        {"model_type": "bart", "architectures": ["BartForCausalLM"], "is_decoder": True},
        {"model_type": "llama"},
        {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]},
        {"model_type": "of-tomorrow", "architectures": ["OfTomorrowForCausalLM"]},
        {"model_type": "emu3_text_model", "architectures": ["Emu3ForCausalLM"]},
        {"model_type": "chatglm", "auto_map": {"AutoModelForCausalLM": "modeling.Chat"}},
        {},
        *(preset.config for preset in models.PRESETS.values()),
    ):
        assert architectures.no_generator(config) is None, config


def test_each_causal_architecture_of_transformers_is_let_through_as_a_decoder() -> None:
    """The tables are read from the text of transformers' modules, and are those that it has when it is imported."""
    from transformers.models.auto import modeling_auto

    tables = architectures._tables()
    assert tables["CAUSAL_LM"] == set(causal_types()) and "bert" in tables["ALL"]
    assert tables["MASKED_LM"] == set(modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES)
    for kind, name in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        config = {"model_type": kind, "architectures": [name], "is_decoder": True}
        assert architectures.no_generator(config) is None, kind


def test_plan_and_run_say_it_once_and_start_nothing(
    tmp_path: Path, store_uri: str, capfd: pytest.CaptureFixture[str]
) -> None:
    from mlflow_llmbench.cli.main import main

    folder = write_tiny("bert", tmp_path / "bert", is_decoder=False)
    for command in ("plan", "run"):
        assert main([command, "--model", str(folder), "--quant", "none,int8"]) == 1
        said = capfd.readouterr()
        assert (said.out + said.err).count("does not generate text token by token") == 1, said
        assert "Traceback" not in said.err and not list(tmp_path.glob("llmbench-results/*/*/artifacts"))


def test_a_gguf_file_of_an_encoder_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    import gguf
    import numpy as np

    from mlflow_llmbench.backends.huggingface.backend import TransformersBackend

    for kind, what in (("bert", "encodes texts"), ("t5", "is an encoder-decoder")):
        writer = gguf.GGUFWriter(tmp_path / f"{kind}.gguf", kind)
        writer.add_tensor("output_norm.weight", np.ones(4, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(ModelError, match=f"its architecture {kind} {what}"):
            TransformersBackend.resolve(Cell(model=str(tmp_path / f"{kind}.gguf")))
