"""Tiny random checkpoints of every architecture that transformers has for causal language models, and of others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

SIZES: Mapping[str, Any] = {
    **dict.fromkeys(("vocab_size", "text_vocab_size", "n_vocab"), 256),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_size", "dim_model"), 128),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim", "dim_ff"), 256),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("head_dim", "attention_head_dim", "linear_key_head_dim", "linear_value_head_dim", "dim_head"), 32),
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx"), 128),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_top_k", "top_k_experts"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "ffn_hidden_size"), 128),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 64),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 32),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"), 0),
    **dict.fromkeys(("vision_dim", "out_hidden_size", "projection_dim", "d_ff"), 128),
    **dict.fromkeys(("image_token_id", "image_token_index", "video_token_id", "audio_token_id"), 250),
    "vocab_size_per_layer_input": 256,
    "hidden_size_per_layer_input": 32,
    "depth": 2,
    "image_size": 28,
    "patch_size": 14,
}
"""Key of a configuration → its value in a tiny model, where the architecture has the key."""

OWN: Mapping[str, Mapping[str, Any]] = {
    **{
        kind: {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}}
        for kind in ("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text")
    },
    "prophetnet": {"num_encoder_layers": 2, "num_decoder_layers": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mamba2": {"head_dim": 64, "num_heads": 4, "expand": 2, "n_groups": 1},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds_dim": [64, 64], "axial_pos_shape": [8, 16]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "roc_bert": {"pronunciation_vocab_size": 64, "shape_vocab_size": 64},
    "zaya": {"num_hidden_layers": 4, "num_experts_per_tok": 1},
    "zamba": {"num_hidden_layers": 6, "attn_layer_period": 3, "attn_layer_offset": 2},
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
    },
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "dots3_note_text": {"num_key_value_heads": 4},
}
"""Settings of single architectures."""


MOST_PARAMETERS = 150_000_000


def causal_types() -> list[str]:
    """Return the model types that transformers has for causal language models."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def write_tiny(model_type: str, folder: Path, dtype: str = "float32", **own: Any) -> Path:
    """Write a checkpoint of an architecture with seeded random weights; `own` are further settings of its config."""
    import torch

    from mlflow_llmbench.backends.huggingface.recipe import class_of

    config = tiny_config(model_type)
    for name, value in own.items():
        setattr(config, name, value)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in class_of(config).from_config(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"not tiny: {size:,} parameters, from parts that have no sizes of ours")
    torch.manual_seed(0)
    class_of(config).from_config(config, dtype=getattr(torch, dtype)).save_pretrained(folder)
    return folder


def tiny_config(model_type: str, cls: Any = None) -> Any:
    """Return a tiny configuration of an architecture, with tiny parts if it is composed of several."""
    from transformers import CONFIG_MAPPING

    cls = cls or CONFIG_MAPPING[model_type]
    own = OWN.get(model_type, {})
    whole = cls()
    held = {name: getattr(whole, name, None) for name in cls.sub_configs or {}}
    parts = {
        name: tiny_config(part.model_type, type(part)) for name, part in held.items() if getattr(part, "model_type", "")
    }
    default = whole.to_dict()
    wanted = {name: value for name, value in SIZES.items() if name in default}
    if "is_decoder" in default or hasattr(whole, "is_decoder"):
        wanted |= {"is_decoder": True, "is_encoder_decoder": False}
    return cls(**{**wanted, **own, **{name: part.to_dict() for name, part in parts.items()}})
