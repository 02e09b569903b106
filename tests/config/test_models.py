"""The presets against transformers' real architectures, and the cost formulas against numbers worked out by hand."""

import ast
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mlflow_llmbench.config import model_shape, models
from mlflow_llmbench.config.model_shape import Shape, load_memory_estimate, memory_estimate
from mlflow_llmbench.config.models import PRESETS, Preset, find_preset, suggest_models
from mlflow_llmbench.records.quantizations import SCHEMES

PUBLISHED_COUNTS = {
    "opt-125m": 125_239_296,
    "opt-350m": 331_196_416,
    "opt-1.3b": 1_315_758_080,
    "opt-2.7b": 2_651_596_800,
    "opt-6.7b": 6_658_473_984,
    "pythia-70m": 70_426_624,
    "pythia-160m": 162_322_944,
    "pythia-410m": 405_334_016,
    "pythia-1b": 1_011_781_632,
    "pythia-1.4b": 1_414_647_808,
    "pythia-2.8b": 2_775_208_960,
    "pythia-6.9b": 6_857_302_016,
    "pythia-12b": 11_846_072_320,
    "bloom-560m": 559_214_592,
    "bloom-1b1": 1_065_314_304,
    "bloom-3b": 3_002_557_440,
    "bloom-7b1": 7_069_016_064,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "mistral-7b": 7_241_732_096,
    "gemma-3-270m": 268_098_176,
    "gemma-3-1b": 999_885_952,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "tinyllama-1.1b": 1_100_048_384,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "phi-4-mini": 3_836_021_760,
}
every_preset = pytest.mark.parametrize("preset", PRESETS.values(), ids=list(PRESETS))
LLAMA_2_7B_JSON = """{
  "_name_or_path": "meta-llama/Llama-2-7b-hf", "architectures": ["LlamaForCausalLM"], "bos_token_id": 1,
  "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
  "intermediate_size": 11008, "max_position_embeddings": 4096, "model_type": "llama", "num_attention_heads": 32,
  "num_hidden_layers": 32, "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
  "rope_scaling": null, "tie_word_embeddings": false, "torch_dtype": "float16", "vocab_size": 32000
}"""
BLOOM_560M_JSON = """{
  "architectures": ["BloomForCausalLM"], "attention_softmax_in_fp32": true, "bos_token_id": 1, "eos_token_id": 2,
  "model_type": "bloom", "n_embed": 1024, "n_inner": null, "n_layer": 24, "num_attention_heads": 16,
  "offset_alibi": 100, "pad_token_id": 3, "vocab_size": 250880
}"""
GEMMA_3_4B_JSON = """{
  "architectures": ["Gemma3ForConditionalGeneration"], "eos_token_id": [1, 106], "mm_tokens_per_image": 256,
  "model_type": "gemma3",
  "text_config": {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
                  "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024},
  "torch_dtype": "bfloat16", "vision_config": {"hidden_size": 1152, "num_attention_heads": 16, "num_hidden_layers": 27}
}"""
QWEN2_JSON = """{
  "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "hidden_size": 896, "intermediate_size": 4864,
  "max_position_embeddings": 32768, "max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 14,
  "num_hidden_layers": 24, "num_key_value_heads": 2, "sliding_window": 32768,
  "tie_word_embeddings": true, "use_sliding_window": false, "vocab_size": 151936
}"""
SMALL = {"hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4, "vocab_size": 100}


def shape_of(name: str) -> Shape:
    return PRESETS[name].shape


def read(config: dict[str, Any]) -> Shape:
    shape = Shape.from_config(config)
    assert shape is not None
    return shape


def build(preset: Preset) -> Any:
    """The model on torch's meta device: real shapes, no memory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config(AutoConfig.for_model(**preset.config))


@every_preset
def test_a_preset_builds_the_published_architecture(preset: Preset) -> None:
    before = json.dumps(dict(preset.config))
    model = build(preset)
    config = model.config

    assert (
        sum(parameter.numel() for parameter in model.parameters()) == preset.parameters == PUBLISHED_COUNTS[preset.name]
    )
    assert config.model_type == preset.family
    assert config.tie_word_embeddings is preset.shape.tied
    assert list(getattr(config, "layer_types", None) or ()).count("sliding_attention") in (
        0,
        preset.shape.sliding_layers,
    )
    assert json.dumps(dict(preset.config)) == before, "building a model changed the preset"


@every_preset
def test_the_shape_counts_what_the_model_holds(preset: Preset) -> None:
    import torch

    model = build(preset)
    head = model.get_output_embeddings()
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head]
    tables = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    shape = preset.shape

    assert shape.linear_parameters == sum(module.weight.numel() for module in linear)
    assert shape.linear_rows == sum(module.out_features for module in linear)
    assert shape.embedding_parameters == sum(module.weight.numel() for module in tables)
    assert shape.head_parameters == (0 if shape.tied else head.weight.numel())
    assert shape.parameters == pytest.approx(preset.parameters, rel=0.01)
    assert shape.context == preset.context


def test_every_published_model_is_a_preset_under_its_own_name() -> None:
    assert list(PRESETS) == list(PUBLISHED_COUNTS)
    assert all(name == preset.name for name, preset in PRESETS.items())
    assert len({preset.repository for preset in PRESETS.values()}) == len(PRESETS)
    assert {name for name, preset in PRESETS.items() if preset.gated} == {
        "llama-2-7b",
        "llama-2-13b",
        "gemma-3-270m",
        "gemma-3-1b",
        "llama-3.2-1b",
        "llama-3.2-3b",
    }
    assert {preset.dtype for preset in PRESETS.values()} == {"float16", "bfloat16"}


@pytest.mark.parametrize("module", [models, model_shape])
def test_only_the_standard_library_and_this_package_are_imported(module: ModuleType) -> None:
    tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}
    assert {name.partition(".")[0] for name in imported} <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("name", ["opt-1.3b", "facebook/opt-1.3b", "OPT-1.3B", "Facebook/OPT-1.3b", " opt-1.3b "])
def test_a_preset_is_found_by_name_and_by_repository(name: str) -> None:
    assert find_preset(name) is PRESETS["opt-1.3b"]


@pytest.mark.parametrize("name", ["", "opt", "meta/opt-1.3b", "facebook/opt-1.3b/", "gpt2"])
def test_an_unknown_name_finds_nothing(name: str) -> None:
    assert find_preset(name) is None


@pytest.mark.parametrize(
    ("typed", "first"),
    [
        ("opt-1.3", "opt-1.3b"),
        ("facebook/opt-13b", "opt-1.3b"),
        ("Llama-2-7b", "llama-2-7b"),
        ("meta-llama/Llama-3.2-1B-Instruct", "llama-3.2-1b"),
        ("qwen-0.6b", "qwen3-0.6b"),
        ("tinylama", "tinyllama-1.1b"),
        ("google/gemma-3-1b-it", "gemma-3-1b"),
    ],
)
def test_a_mistyped_name_suggests_its_neighbour(typed: str, first: str) -> None:
    assert suggest_models(typed)[0] == first


def test_suggestions_are_few_distinct_and_never_far_fetched() -> None:
    assert suggest_models("pythia-1b", limit=2) == ["pythia-1b", "pythia-12b"]
    assert len(set(suggest_models("opt"))) == len(suggest_models("opt")) <= 3
    assert suggest_models("zzzz") == []


def test_kv_bytes_of_known_models() -> None:
    assert shape_of("opt-125m").kv_bytes_per_token() == 2 * 12 * 768 * 2 == 36_864
    assert shape_of("llama-3.2-1b").kv_bytes_per_token() == 2 * 16 * 8 * 64 * 2 == 32_768
    assert shape_of("opt-125m").kv_bytes_per_token(bytes_per_value=4) == 73_728
    assert shape_of("llama-2-7b").kv_bytes(4096) == 2 * 1024**3  # the 2 GiB of a full row


def test_a_sliding_layer_holds_at_most_its_window() -> None:
    gemma = shape_of("gemma-3-270m")
    assert (gemma.sliding_window, gemma.sliding_layers, gemma.layers) == (512, 15, 18)
    one_layer_token = 2 * 1 * 256 * 2
    assert gemma.kv_bytes(512) == 18 * 512 * one_layer_token == 512 * gemma.kv_bytes_per_token()
    assert gemma.kv_bytes(2048) == (15 * 512 + 3 * 2048) * one_layer_token

    mistral = shape_of("mistral-7b")
    assert (mistral.sliding_window, mistral.sliding_layers) == (4096, 32)
    assert mistral.kv_bytes(32_768) == mistral.kv_bytes(4096) == 4096 * 131_072


def test_a_window_no_shorter_than_the_context_is_no_window() -> None:
    assert PRESETS["phi-4-mini"].config["sliding_window"] == 262_144
    assert (shape_of("phi-4-mini").sliding_window, shape_of("phi-4-mini").sliding_layers) == (None, 0)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"sliding_window": None}, (None, 0)),
        ({"sliding_window": 16}, (16, 6)),
        ({"sliding_window": 16, "sliding_window_pattern": 3}, (16, 4)),
        ({"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 3}, (16, 3)),
        ({"sliding_window": 16, "layer_types": ["full_attention"] * 6}, (None, 0)),
        ({"sliding_window": 16, "model_type": "gemma2"}, (16, 3)),
        ({"sliding_window": 16, "model_type": "qwen2"}, (None, 0)),
        ({"sliding_window": 16, "model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 4}, (16, 2)),
    ],
)
def test_which_layers_slide(config: dict[str, Any], expected: tuple[int | None, int]) -> None:
    shape = read({**SMALL, **config})
    assert (shape.sliding_window, shape.sliding_layers) == expected


def test_published_config_files_read_like_the_presets() -> None:
    assert Shape.from_config(json.loads(LLAMA_2_7B_JSON)) == shape_of("llama-2-7b")
    bloom = read(json.loads(BLOOM_560M_JSON))
    assert bloom.context is None  # the file does not say
    assert (bloom.parameters, bloom.tied, bloom.kv_heads) == (shape_of("bloom-560m").parameters, True, 16)
    qwen2 = read(json.loads(QWEN2_JSON))
    assert (qwen2.kv_heads, qwen2.head_dim, qwen2.sliding_window) == (2, 64, None)
    assert qwen2.parameters == pytest.approx(494_032_768, rel=0.01)


def test_a_nested_text_config_is_the_decoder() -> None:
    gemma = read(json.loads(GEMMA_3_4B_JSON))
    assert (gemma.layers, gemma.hidden_size, gemma.attention_heads, gemma.kv_heads, gemma.head_dim) == (
        34,
        2560,
        8,
        4,
        256,
    )
    assert (gemma.tied, gemma.gated_mlp, gemma.sliding_window, gemma.sliding_layers) == (True, True, 1024, 29)
    assert gemma.parameters == pytest.approx(3_880_263_168, rel=0.01)  # the language model of Gemma 3 4B


def test_an_unknown_family_is_read_by_the_usual_key_names() -> None:
    shape = read(
        {
            "model_type": "newcomer",
            "d_model": 512,
            "n_layers": 8,
            "n_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 96,
            "ffn_dim": 1536,
            "vocab_size": 32_000,
            "max_sequence_length": 8192,
            "hidden_act": "silu",
        }
    )
    assert shape == Shape(
        layers=8,
        hidden_size=512,
        attention_heads=8,
        kv_heads=2,
        head_dim=96,
        intermediate_size=1536,
        vocab_size=32_000,
        context=8192,
        tied=False,
        gated_mlp=True,
        embedding_dim=512,
    )
    attention, mlp = 512 * 96 * (8 + 2) * 2, 3 * 512 * 1536
    assert shape.linear_parameters == 8 * (attention + mlp)
    assert shape.parameters == 8 * (attention + mlp) + 2 * 32_000 * 512 + 17 * 512


def test_gpt2_has_learned_positions_and_a_plain_mlp() -> None:
    config = {
        "model_type": "gpt2",
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_positions": 1024,
        "n_ctx": 1024,
        "vocab_size": 50_257,
    }
    assert read(config).parameters == 124_439_808


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model_type": "llama", "hidden_size": 64},
        {**SMALL, "vocab_size": "many"},
        {**SMALL, "num_local_experts": 8},
        {**SMALL, "kv_lora_rank": 512},
        {**SMALL, "is_encoder_decoder": True},
        {**SMALL, "layer_types": ["linear_attention", "full_attention"] * 3},
    ],
)
def test_no_shape_where_the_formulas_do_not_hold(config: dict[str, Any]) -> None:
    assert Shape.from_config(config) is None


def test_weight_bytes_of_llama_3_2_1b() -> None:
    shape = shape_of("llama-3.2-1b")
    linear = 16 * (2 * 2048 * 64 * (32 + 8) + 3 * 2048 * 8192)
    rows = 16 * (64 * (32 + 2 * 8) + 2048 + 2 * 8192 + 2048)
    rest = 2 * (1_235_814_400 - linear)
    assert linear == 973_078_528
    assert shape.weight_bytes() == shape.weight_bytes("bf16", "float32") == 2 * 1_235_814_400
    assert shape.weight_bytes("fp32") == shape.weight_bytes("none", "float32") == 4 * 1_235_814_400
    assert shape.weight_bytes("int8") == linear + 4 * rows + rest
    assert shape.weight_bytes("int4") == shape.weight_bytes("fp4") == linear * 9 // 16 + rest
    assert shape.weight_bytes("gptq") == round(linear * (0.5 + 2.5 / 128)) + rest
    assert (
        shape.weight_bytes("gptq")
        < shape.weight_bytes("int4")
        < shape.weight_bytes("int8")
        < shape.weight_bytes("fp16")
    )


@pytest.mark.parametrize(
    ("quant", "dtype"), [("int3", "bfloat16"), ("none", "float8"), ("float16", "bfloat16"), ("int4", "half")]
)
def test_an_unknown_scheme_is_refused_by_name(quant: str, dtype: str) -> None:
    with pytest.raises(
        ValueError, match=f"quant={quant} with dtype={dtype}. Use one of none, fp32, fp16, bf16, int8, int4, fp4"
    ):
        shape_of("opt-125m").weight_bytes(quant, dtype)


def test_flops_count_a_tied_head_and_grow_with_the_context() -> None:
    opt = shape_of("opt-125m")
    matrices = 12 * 12 * 768**2 + 50_272 * 768
    assert opt.flops_per_token(0) == 2 * matrices
    assert opt.flops_per_token(1000) == 2 * matrices + 4 * 12 * 768 * 1000
    assert shape_of("mistral-7b").flops_per_token(30_000) == shape_of("mistral-7b").flops_per_token(4096)


def test_memory_estimate_is_the_sum_of_its_parts() -> None:
    shape = shape_of("opt-125m")
    weights, cache = 2 * shape.parameters, 4 * 300 * 36_864
    logits, activations = 4 * 50_272 * 4, 2 * 4 * 200 * 3072 * 4
    assert memory_estimate(shape, "none", "float16", 4, 200, 100) == weights + cache + logits + activations
    assert memory_estimate(shape, "fp32", "float16", 4, 200, 100) == 2 * weights + 2 * cache + logits + activations
    less = memory_estimate(shape, "int4", "float16", batch_size=1, prompt_tokens=128, output_tokens=128)
    assert isinstance(less, int)
    assert less < memory_estimate(shape, "none", "float16", batch_size=1, prompt_tokens=128, output_tokens=128)


def test_loading_needs_the_weights_and_what_quantizing_the_largest_layer_takes() -> None:
    small, large = shape_of("opt-125m"), shape_of("llama-2-7b")
    assert (small.largest_linear, large.largest_linear) == (768 * 3072, 4096 * 11008)
    assert (
        load_memory_estimate(small, "none", "float16")
        == load_memory_estimate(small, "fp16", "float16")
        == 2 * small.parameters
    )
    assert load_memory_estimate(small, "fp32", "float16") == 4 * small.parameters  # the checkpoint is only mapped
    for shape, quant in ((small, "int4"), (large, "int8")):
        layer = round(SCHEMES[quant].loading.layer_bytes * shape.largest_linear)
        assert layer > 0
        assert load_memory_estimate(shape, quant, "bfloat16") == shape.weight_bytes(quant) + layer
        head = 2 * shape.head_parameters  # cast, and loaded after the layers
        assert load_memory_estimate(shape, quant, "float16") == shape.weight_bytes(quant) + layer - head
    # HQQ quantizes a whole model that is loaded: cast to bf16 it takes memory, in bf16 already it stays in its files.
    layer = round(SCHEMES["hqq4"].loading.layer_bytes * small.largest_linear)
    assert load_memory_estimate(small, "hqq4", "float16") == 2 * small.parameters + layer
    assert load_memory_estimate(small, "hqq4", "bfloat16") == small.weight_bytes("hqq4") + layer
    assert load_memory_estimate(large, "gptq", "float16") == large.weight_bytes("gptq")
