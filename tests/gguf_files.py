"""Write a tiny model as a GGUF file with the package gguf, so no test needs llama.cpp's converter or a download."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
BYTE_LEVEL = "a b"
"""A merge whose result is not in the vocabulary, so nothing is merged. llama.cpp requires at least one merge."""


def rotated(weight: Any, heads: int) -> Any:
    """Reorder the rows of a query or key projection for llama.cpp's rotary embedding.

    llama.cpp has pairs side by side, transformers has halves.
    """
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def write_llama(
    folder: Path, target: Path, tokenizer: bool = True, kind: str | None = None, template: str = ""
) -> Path:
    """Write a Llama's folder as a GGUF file, its matrices quantized by gguf to `kind` (such as `Q8_0`), or as is."""
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    _add_vocabulary(writer, folder, config["vocab_size"], tokenizer)
    if template:
        writer.add_chat_template(template)
    for name, weight in load_file(folder / "model.safetensors").items():
        _add_tensor(writer, name, weight.astype(np.float32), config, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def _add_tensor(writer: Any, name: str, weight: Any, config: dict[str, Any], kind: str | None) -> None:
    import gguf

    parts = name.removeprefix("model.").removesuffix(".weight").split(".", 2)
    if parts[0] == "layers":
        if parts[2].endswith("q_proj"):
            weight = rotated(weight, config["num_attention_heads"])
        if parts[2].endswith("k_proj"):
            weight = rotated(weight, config["num_key_value_heads"])
        stored = f"blk.{parts[1]}.{NAMES[parts[2]]}.weight"
    else:
        stored = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}[parts[0]] + ".weight"
    if kind and weight.ndim > 1:
        packed = getattr(gguf.GGMLQuantizationType, kind)
        writer.add_tensor(stored, gguf.quants.quantize(weight, packed), raw_dtype=packed)
    else:
        writer.add_tensor(stored, weight)


def _add_vocabulary(writer: Any, folder: Path, words: int, tokenizer: bool) -> None:
    if not tokenizer:
        writer.add_tokenizer_model("none")
        return
    known = json.loads((folder / "tokenizer.json").read_text())
    pieces = {number: piece for piece, number in known["model"]["vocab"].items()}
    special = {token["id"] for token in known["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([pieces.get(number, f"[PAD{number}]") for number in range(words)])
    writer.add_token_types([3 if number in special else 1 if number in pieces else 5 for number in range(words)])
    writer.add_token_merges([BYTE_LEVEL])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(False)
