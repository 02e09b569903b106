"""Model presets (name → repository, parameters, context, architecture), and cost formulas that follow from a shape.

A `Preset` is a published model: its name, its exact number of parameters, and its exact architecture, so that
`weights=random` builds the real architecture without a download. A `Shape` holds the few integers that decide cost. It
is read from a preset or from any `config.json`, and every estimate of memory and work is a formula on it. Estimates are
made before a model is loaded, to refuse what cannot fit; figures that a run reports are measured, never estimated here.

Nothing heavy is imported: transformers builds a preset elsewhere, with `AutoConfig.for_model(**preset.config)`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from .model_shape import Shape


@dataclass(frozen=True)
class Preset:
    """A published model.

    `parameters`: exact count, tied weights once · `context`: tokens · `dtype`: of the published checkpoint, torch's
    name · `gated`: the repository requires a login and consent · `licence`: a short id · `config`: everything that
    `AutoConfig.for_model(**config)` of transformers 5 needs.
    """

    name: str
    repository: str
    parameters: int
    context: int
    dtype: str
    gated: bool
    licence: str
    family: str
    config: Mapping[str, Any] = field(repr=False, hash=False)

    @property
    def shape(self) -> Shape:
        """The sizes that decide its cost. Raises ValueError if they do not follow from the config."""
        shape = Shape.from_config(self.config)
        if shape is None:
            raise ValueError(
                f"preset without a shape: {self.name}. Give its config layers, hidden size, heads and vocabulary."
            )
        return shape


def find_preset(name: str) -> Preset | None:
    """Return the preset of this name or repository id (`opt-1.3b`, `facebook/opt-1.3b`), in any case, or None."""
    wanted = name.strip().lower()
    return next((p for p in PRESETS.values() if wanted in (p.name.lower(), p.repository.lower())), None)


def suggest_models(name: str, limit: int = 3) -> list[str]:
    """Return at most `limit` similar preset names, nearest first, ignoring any part before a slash. May be empty."""
    spellings = {p.repository.rpartition("/")[2].lower(): p.name for p in PRESETS.values()} | {p: p for p in PRESETS}
    near = difflib.get_close_matches(name.strip().lower().rpartition("/")[2], spellings, n=2 * limit, cutoff=0.5)
    return list(dict.fromkeys(spellings[spelling] for spelling in near))[:limit]


def _opt(name: str, parameters: int, layers: int, hidden: int, heads: int, **other: Any) -> Preset:
    config = {
        "model_type": "opt",
        "vocab_size": 50272,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "ffn_dim": 4 * hidden,
        "max_position_embeddings": 2048,
        "word_embed_proj_dim": hidden,
        "do_layer_norm_before": True,
        "tie_word_embeddings": True,
        "bos_token_id": 2,
        "eos_token_id": 2,
        "pad_token_id": 1,
        **other,
    }
    return Preset(name, f"facebook/{name}", parameters, 2048, "float16", False, "opt-175b", "opt", config)


def _pythia(name: str, parameters: int, layers: int, hidden: int, heads: int, vocab: int = 50304) -> Preset:
    config = {
        "model_type": "gpt_neox",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
        "max_position_embeddings": 2048,
        "use_parallel_residual": True,
        "attention_bias": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25},
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return Preset(name, f"EleutherAI/{name}", parameters, 2048, "float16", False, "apache-2.0", "gpt_neox", config)


def _bloom(name: str, parameters: int, layers: int, hidden: int, heads: int) -> Preset:
    config = {
        "model_type": "bloom",
        "vocab_size": 250_880,
        "hidden_size": hidden,
        "n_layer": layers,
        "n_head": heads,
        "seq_length": 2048,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
    }
    return Preset(
        name, f"bigscience/{name}", parameters, 2048, "float16", False, "bigscience-bloom-rail-1.0", "bloom", config
    )


@dataclass(frozen=True)
class _Family:
    """Common facts of models with rotary positions. `config`: keys of config.json that differ from `_rotary`'s."""

    context: int
    model_type: str = "llama"
    licence: str = "apache-2.0"
    gated: bool = False
    dtype: str = "bfloat16"
    config: Mapping[str, Any] = field(default_factory=dict)


def _rotary(
    name: str, repository: str, parameters: int, sizes: tuple[int, int, int, int, int], family: _Family, **config: Any
) -> Preset:
    """A decoder with rotary positions, RMS norms, gated MLP. `sizes`: layers, hidden, heads, KV heads, intermediate."""
    layers, hidden, heads, kv_heads, intermediate = sizes
    whole = {
        "model_type": family.model_type,
        "vocab_size": 32_000,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "max_position_embeddings": family.context,
        "rms_norm_eps": 1e-5,
        "rope_parameters": _theta(1e4),
        "tie_word_embeddings": True,
        **_ids(1, 2, None),
        **family.config,
        **config,
    }
    return Preset(
        name,
        repository,
        parameters,
        family.context,
        family.dtype,
        family.gated,
        family.licence,
        family.model_type,
        whole,
    )


def _theta(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


def _ids(begin: int, end: int, pad: int | None) -> dict[str, int | None]:
    return {"bos_token_id": begin, "eos_token_id": end, "pad_token_id": pad}


_LLAMA = _Family(2048, config={"tie_word_embeddings": False})
_LLAMA_2 = _Family(4096, licence="llama2", gated=True, dtype="float16", config={"tie_word_embeddings": False})
_LLAMA_3_2 = _Family(
    131_072,
    licence="llama3.2",
    gated=True,
    config={
        "vocab_size": 128_256,
        **_ids(128_000, 128_001, None),
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
)
_MISTRAL = _Family(32_768, "mistral", config={"tie_word_embeddings": False, "sliding_window": 4096})
_GEMMA3 = _Family(
    32_768,
    "gemma3_text",
    licence="gemma",
    gated=True,
    config={
        "vocab_size": 262_144,
        **_ids(2, 1, 0),
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-6,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "rope_parameters": {"full_attention": _theta(1e6), "sliding_attention": _theta(1e4)},
    },
)
_SMOLLM2 = _Family(8192, config={"vocab_size": 49_152, **_ids(0, 0, None), "rope_parameters": _theta(1e5)})
_QWEN3 = _Family(
    40_960,
    "qwen3",
    config={
        "vocab_size": 151_936,
        **_ids(151_643, 151_645, None),
        "rope_parameters": _theta(1e6),
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
    },
)
_PHI_4 = _Family(
    131_072,
    "phi3",
    licence="mit",
    config={
        "vocab_size": 200_064,
        **_ids(199_999, 199_999, 199_999),
        "sliding_window": 262_144,
        "original_max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.75,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "short_factor": [1.0] * 48,
            "long_factor": [  # as in the published config.json
                1.0, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817, 2.187582649,
                2.446418898, 2.735880826, 3.059592084, 3.421605075, 3.826451687, 4.279200023, 4.785517845, 5.351743533,
                5.984965424, 6.693110555, 7.485043894, 8.370679318, 9.36110372, 10.4687158, 11.70738129, 13.09260651,
                14.64173252, 16.37415215, 18.31155283, 20.47818807, 22.90118105, 25.61086418, 28.64115884, 32.03,
                32.1, 32.13, 32.23, 32.6, 32.61, 32.64, 32.66, 32.7,
                32.71, 32.93, 32.97, 33.28, 33.49, 33.5, 44.16, 47.77,
            ],
        },
    },
)  # fmt: skip

_ALL = (
    _opt("opt-125m", 125_239_296, 12, 768, 12),
    _opt("opt-350m", 331_196_416, 24, 1024, 16,
         word_embed_proj_dim=512, do_layer_norm_before=False),  # unlike its siblings
    _opt("opt-1.3b", 1_315_758_080, 24, 2048, 32),
    _opt("opt-2.7b", 2_651_596_800, 32, 2560, 32),
    _opt("opt-6.7b", 6_658_473_984, 32, 4096, 32),
    _pythia("pythia-70m", 70_426_624, 6, 512, 8),
    _pythia("pythia-160m", 162_322_944, 12, 768, 12),
    _pythia("pythia-410m", 405_334_016, 24, 1024, 16),
    _pythia("pythia-1b", 1_011_781_632, 16, 2048, 8),
    _pythia("pythia-1.4b", 1_414_647_808, 24, 2048, 16),
    _pythia("pythia-2.8b", 2_775_208_960, 32, 2560, 32),
    _pythia("pythia-6.9b", 6_857_302_016, 32, 4096, 32, vocab=50432),
    _pythia("pythia-12b", 11_846_072_320, 36, 5120, 40, vocab=50688),
    _bloom("bloom-560m", 559_214_592, 24, 1024, 16),
    _bloom("bloom-1b1", 1_065_314_304, 24, 1536, 16),
    _bloom("bloom-3b", 3_002_557_440, 30, 2560, 32),
    _bloom("bloom-7b1", 7_069_016_064, 30, 4096, 32),
    _rotary("llama-2-7b", "meta-llama/Llama-2-7b-hf", 6_738_415_616, (32, 4096, 32, 32, 11008), _LLAMA_2),
    _rotary("llama-2-13b", "meta-llama/Llama-2-13b-hf", 13_015_864_320, (40, 5120, 40, 40, 13824), _LLAMA_2),
    _rotary("mistral-7b", "mistralai/Mistral-7B-v0.1", 7_241_732_096, (32, 4096, 32, 8, 14336), _MISTRAL),
    _rotary("gemma-3-270m", "google/gemma-3-270m", 268_098_176, (18, 640, 4, 1, 2048), _GEMMA3),
    _rotary("gemma-3-1b", "google/gemma-3-1b-pt", 999_885_952, (26, 1152, 4, 1, 6912), _GEMMA3),
    _rotary("qwen3-0.6b", "Qwen/Qwen3-0.6B", 596_049_920, (28, 1024, 16, 8, 3072), _QWEN3),
    _rotary("qwen3-1.7b", "Qwen/Qwen3-1.7B", 1_720_574_976, (28, 2048, 16, 8, 6144), _QWEN3),
    _rotary("smollm2-135m", "HuggingFaceTB/SmolLM2-135M", 134_515_008, (30, 576, 9, 3, 1536), _SMOLLM2),
    _rotary("smollm2-360m", "HuggingFaceTB/SmolLM2-360M", 361_821_120, (32, 960, 15, 5, 2560), _SMOLLM2),
    _rotary("smollm2-1.7b", "HuggingFaceTB/SmolLM2-1.7B", 1_711_376_384, (24, 2048, 32, 32, 8192),
            _SMOLLM2, rope_parameters=_theta(1.3e5)),
    _rotary("tinyllama-1.1b", "TinyLlama/TinyLlama-1.1B-Chat-v1.0", 1_100_048_384, (22, 2048, 32, 4, 5632), _LLAMA),
    _rotary("llama-3.2-1b", "meta-llama/Llama-3.2-1B", 1_235_814_400, (16, 2048, 32, 8, 8192), _LLAMA_3_2),
    _rotary("llama-3.2-3b", "meta-llama/Llama-3.2-3B", 3_212_749_824, (28, 3072, 24, 8, 8192), _LLAMA_3_2),
    _rotary("phi-4-mini", "microsoft/Phi-4-mini-instruct", 3_836_021_760, (32, 3072, 24, 8, 8192), _PHI_4),
)  # fmt: skip

PRESETS: Mapping[str, Preset] = MappingProxyType({preset.name: preset for preset in _ALL})
"""Every preset by name, families together, small before large."""
