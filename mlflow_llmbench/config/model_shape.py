"""Sizes of a decoder, and the bytes and operations that follow from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..records.quantizations import SCHEMES
from ..records.redaction import excerpt

_PLAIN_MLP = frozenset(  # two matrices and biases, instead of a gate and no biases as in later families
    ["opt", "gpt_neox", "bloom", "gpt2", "gpt_neo", "gptj",
     "gpt_bigcode", "codegen", "falcon", "mpt", "phi", "starcoder2"]
)  # fmt: skip
_TIED_UNLESS_SAID = frozenset(  # their config.json omits tie_word_embeddings where it is true (so does every Gemma's)
    ["opt", "bloom", "gpt2", "gpt_neo", "gpt_bigcode", "falcon", "mpt", "cohere", "smollm3", "starcoder2"]
)
_LEARNED_POSITIONS = {"opt": 2, "biogpt": 2, "gpt2": 0, "gpt_neo": 0, "gpt_bigcode": 0}  # rows beyond the context
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_COSTS_OTHERWISE = (  # experts, latent or shared attention, state spaces, encoders: the formulas do not hold
    *_EXPERTS,
    "kv_lora_rank",
    "num_kv_shared_layers",
    "hidden_size_per_layer_input",
    "ssm_cfg",
    "is_encoder_decoder",
)
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_HIDDEN = ("hidden_size", "n_embd", "n_embed", "d_model")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_CONTEXT = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length", "n_ctx")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads")
_INTERMEDIATE = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
_SIZES = (*_LAYERS, *_HIDDEN, *_HEADS, *_CONTEXT, *_KV_HEADS, *_INTERMEDIATE,
          "vocab_size", "head_dim", "word_embed_proj_dim", "sliding_window", "sliding_window_pattern")  # fmt: skip
_LARGEST_SIZE = 1 << 40
_GEMMA3_LEFT_OUT = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "vocab_size": 262_208,
    "sliding_window": 4096,
}

VALUE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Dtype → bytes of a value."""

PROCESS_BYTES = 350_000_000
"""Memory of Python, torch and the quantization library themselves: 0.35 GB, seen with torch 2.13 on a CPU."""

COMPUTE_DTYPE = "bfloat16"
"""Dtype in which quantized schemes compute, where the device has it."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder that decide its cost, with the formulas. All are counts except `tied` and `gated_mlp`.

    `embedding_dim`: differs from `hidden_size` only if the embedding is projected (OPT-350M) · `position_rows`: length
    of a learned position table, 0 for rotary or ALiBi · `sliding_layers`: number of layers that keep only the last
    `sliding_window` tokens (Gemma 3: 5 of 6 layers; Mistral-7B-v0.1: all); the others keep the whole context.
    """

    layers: int
    hidden_size: int
    attention_heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    context: int | None
    tied: bool
    gated_mlp: bool
    embedding_dim: int
    position_rows: int = 0
    sliding_window: int | None = None
    sliding_layers: int = 0

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Shape | None:
        """Read a preset's config or a parsed `config.json`; a nested `text_config` replaces its parent.

        Return None if an essential size is missing, or if cost does not follow from these sizes (mixtures of experts,
        latent attention, state-space layers, encoder-decoders): no estimate is better than a wrong one.
        """
        config = _decoder_part(config)
        family = str(config.get("model_type", ""))
        layers = _size(config, *_LAYERS)
        hidden = _size(config, *_HIDDEN)
        heads = _size(config, *_HEADS)
        vocab = _size(config, "vocab_size")
        if not (layers and hidden and heads and vocab) or _costs_otherwise(config):
            return None
        context = _size(config, *_CONTEXT)
        window, sliding_layers = _sliding(config, family, layers, context)
        one_kv_head = config.get("multi_query") and not config.get("new_decoder_architecture")
        activation = str(config.get("hidden_act") or config.get("activation_function") or "silu")
        gemma = family.startswith("gemma")
        return cls(
            layers=layers,
            hidden_size=hidden,
            attention_heads=heads,
            vocab_size=vocab,
            context=context,
            kv_heads=1 if one_kv_head else _size(config, *_KV_HEADS) or heads,
            head_dim=_size(config, "head_dim") or hidden // heads,
            intermediate_size=_size(config, *_INTERMEDIATE) or 4 * hidden,
            tied=bool(config.get("tie_word_embeddings", gemma or family in _TIED_UNLESS_SAID)),
            gated_mlp=gemma or (family not in _PLAIN_MLP and activation.startswith(("silu", "swi"))),
            embedding_dim=_size(config, "word_embed_proj_dim") or hidden,
            position_rows=context + _LEARNED_POSITIONS[family] if context and family in _LEARNED_POSITIONS else 0,
            sliding_window=window,
            sliding_layers=sliding_layers,
        )

    @property
    def linear_parameters(self) -> int:
        """Weights of the decoder's linear layers, the ones that quantization changes.

        layers · (2·hidden·heads·head_dim + 2·hidden·kv_heads·head_dim + m·hidden·intermediate), m = 3 with a gated MLP,
        else 2; plus 2·hidden·embedding_dim if the embedding is projected in and out. Biases are in `other_parameters`.
        """
        attention = 2 * self.hidden_size * self.head_dim * (self.attention_heads + self.kv_heads)
        mlp = (3 if self.gated_mlp else 2) * self.hidden_size * self.intermediate_size
        projected = self.embedding_dim != self.hidden_size
        return self.layers * (attention + mlp) + projected * 2 * self.hidden_size * self.embedding_dim

    @property
    def largest_linear(self) -> int:
        """Weights of the largest linear layer besides the head: hidden · max(intermediate, heads · head_dim)."""
        return self.hidden_size * max(self.intermediate_size, self.attention_heads * self.head_dim)

    @property
    def linear_rows(self) -> int:
        """Output rows of the same layers (int8 keeps one scale for each; a bias has one value for each)."""
        attention = self.head_dim * (self.attention_heads + 2 * self.kv_heads) + self.hidden_size
        mlp = (2 if self.gated_mlp else 1) * self.intermediate_size + self.hidden_size
        projected = self.embedding_dim != self.hidden_size
        return self.layers * (attention + mlp) + projected * (self.hidden_size + self.embedding_dim)

    @property
    def embedding_parameters(self) -> int:
        """Input embedding, vocab·embedding_dim, and learned positions, position_rows·hidden."""
        return self.vocab_size * self.embedding_dim + self.position_rows * self.hidden_size

    @property
    def head_parameters(self) -> int:
        """Output head, vocab·embedding_dim; 0 if tied, since it is then stored once, as the embedding."""
        return 0 if self.tied else self.vocab_size * self.embedding_dim

    @property
    def other_parameters(self) -> int:
        """Norms and biases, approximately: 2 norms a layer and 1 at the end; with a plain MLP, biases everywhere.

        Left out: norms of single heads (Qwen 3, Gemma 3), norms after a block (Gemma 3), an embedding norm (BLOOM).
        """
        norms = (2 * self.layers + 1) * self.hidden_size
        return norms if self.gated_mlp else 2 * norms + self.linear_rows

    @property
    def parameters(self) -> int:
        """All parameters, tied ones once; within 1 % of the published count of every preset."""
        return self.linear_parameters + self.embedding_parameters + self.head_parameters + self.other_parameters

    def kv_bytes_per_token(self, bytes_per_value: float = 2) -> int:
        """Bytes that one more token of one row adds to the KV cache while no window is full.

        2 · layers · kv_heads · head_dim · bytes_per_value; the 2 is for keys and values.
        """
        return round(2 * self.layers * self.kv_heads * self.head_dim * bytes_per_value)

    def kv_bytes(self, tokens: int, bytes_per_value: float = 2) -> int:
        """Bytes of the KV cache of one row after `tokens` tokens; a sliding layer holds at most its window.

        2 · kv_heads · head_dim · bytes_per_value · (full_layers · tokens + sliding_layers · min(tokens, window)).
        """
        return round(2 * self.kv_heads * self.head_dim * bytes_per_value * self._positions_held(tokens))

    def weight_bytes(self, quant: str = "none", dtype: str = "bfloat16") -> int:
        """Bytes of the parameters as stored, including quantization metadata, for a checkpoint of this `dtype`.

        `none` keeps `dtype`; `fp32`, `fp16` and `bf16` convert everything; the others follow the `Storage` of their
        scheme, with groups of 128 where the size can be chosen. Most change linear weights only; head, embeddings,
        norms and biases then stay at 2 bytes. Raises ValueError for an unknown scheme or dtype.
        """
        value_bytes = _value_bytes(quant, dtype)
        storage = SCHEMES[quant].storage
        if storage is None:
            return self.parameters * value_bytes
        if storage.everything:
            return round(self.parameters * storage.bytes_per_weight())
        linear = round(self.linear_parameters * storage.bytes_per_weight()) + storage.row_bytes * self.linear_rows
        return linear + (self.parameters - self.linear_parameters) * value_bytes

    def step_bytes(self, quant: str = "none", dtype: str = "bfloat16") -> int:
        """Bytes of the weights that a decode step reads: all but embeddings of which it looks up single rows.

        A tied embedding is the output head too, so it is read. Raises ValueError as `weight_bytes` does.
        """
        looked_up = self.position_rows * self.hidden_size + (0 if self.tied else self.vocab_size * self.embedding_dim)
        storage = SCHEMES[quant].storage
        each = storage.bytes_per_weight() if storage and storage.everything else _value_bytes(quant, dtype)
        return self.weight_bytes(quant, dtype) - round(looked_up * each)

    def flops_per_token(self, context: int) -> int:
        """Floating-point operations to process one token of one row that attends to `context` tokens.

        2 · (linear_parameters + vocab·embedding_dim) + 4 · heads · head_dim · (tokens held, summed over the layers):
        one multiplication and one addition per weight, and as much per key and per value. A tied head is computed too,
        so it counts; an embedding lookup does not. Without windows the last term is
        4 · layers · heads · head_dim · context.
        """
        matrices = self.linear_parameters + self.vocab_size * self.embedding_dim
        return 2 * matrices + 4 * self.attention_heads * self.head_dim * self._positions_held(context)

    def cost_fields(self, kv_value_bytes: float) -> dict[str, Any]:
        """The formulas as fields of `LoadInfo`, for a KV cache with `kv_value_bytes` bytes per value."""
        head = 2 * self.hidden_size * self.vocab_size
        return {
            "kv_bytes_per_token": self.kv_bytes_per_token(kv_value_bytes),
            "flops_per_token": self.flops_per_token(0) - head,
            "head_flops": head,
            "attention_flops_per_context_token": self.flops_per_token(1) - self.flops_per_token(0),
            "sliding_window": self.sliding_window,
            "sliding_share": self.sliding_layers / self.layers,
        }

    def _positions_held(self, tokens: int) -> int:
        in_window = tokens if self.sliding_window is None else min(tokens, self.sliding_window)
        return (self.layers - self.sliding_layers) * tokens + self.sliding_layers * in_window


_TYPES: tuple[tuple[str, tuple[type, ...], tuple[str, ...]], ...] = (
    ("an object", (dict,), ("quantization_config", "compression_config", "text_config", "auto_map", "rope_scaling",
                            "rope_parameters", "vision_config", "audio_config")),
    ("a list of texts", (list,), ("architectures", "layer_types")),
    ("a text", (str, dict), ("dtype", "torch_dtype")),
    ("a text", (str,), ("model_type", "hidden_act", "activation_function")),
    ("true or false", (bool, int), ("tie_word_embeddings", "is_decoder", "is_encoder_decoder", "use_sliding_window",
                                    "multi_query", "new_decoder_architecture")),
    ("a whole number or a list of them", (int, list), ("eos_token_id", "bos_token_id", "pad_token_id")),
    ("a whole number", (int, float, list), (*_SIZES, "max_window_layers")),
)  # fmt: skip
"""Name of a type, the types of Python that pass for it, and keys of a config.json that have it, or null. Some models
have a size for each layer, in a list, and no estimate."""


def wrong_type(config: Mapping[str, Any]) -> str | None:
    """Say which value of a parsed `config.json` has the wrong type, or is beyond all sizes; None if none has."""
    text = config.get("text_config")
    for part, place in ((config, ""), (text if isinstance(text, Mapping) else {}, "text_config.")):
        for wanted, types, keys in _TYPES:
            for key in keys:
                value = part.get(key)
                if value is not None and value is not False and not _has_type(value, types):
                    return f"{place}{key} is {excerpt(str(value), 40)}, which is not {wanted}"
                if isinstance(value, int) and abs(value) > _LARGEST_SIZE:
                    return f"{place}{key} is {excerpt(str(value), 40)}, beyond every model"
    method = (config.get("quantization_config") or {}).get("quant_method")
    return (
        None
        if method is None or isinstance(method, str)
        else f"its quant_method is {excerpt(str(method), 40)}, not a text"
    )


def _has_type(value: object, types: tuple[type, ...]) -> bool:
    if isinstance(value, bool):
        return bool in types
    if isinstance(value, list) and list in types:
        return all(isinstance(one, str if types == (list,) else int | float) for one in value)
    return isinstance(value, types)


def memory_estimate(
    shape: Shape,
    quant: str = "none",
    dtype: str = "bfloat16",
    batch_size: int = 1,
    prompt_tokens: int = 128,
    output_tokens: int = 128,
    kv_value_bytes: float | None = None,
) -> int:
    """Bytes needed at the peak of a run, without the interpreter and its libraries; `dtype` is the checkpoint's.

    weights + batch · KV(prompt + output) + the activations of the prefill: batch · vocab · 4 for the logits of the last
    position in fp32, and 2 · batch · prompt · max(intermediate, 3·hidden) · 4 for two of the widest tensors alive at
    once. The KV cache is in the compute dtype unless `kv_value_bytes` gives the bytes per value. Attention that stores
    its whole score matrix (`eager`) needs more.
    """
    besides = bytes_besides_weights(shape, quant, dtype, batch_size, prompt_tokens, output_tokens, kv_value_bytes)
    return shape.weight_bytes(quant, dtype) + sum(besides)


def bytes_besides_weights(
    shape: Shape,
    quant: str,
    dtype: str,
    batch_size: int,
    prompt_tokens: int,
    output_tokens: int,
    kv_value_bytes: float | None = None,
) -> tuple[int, int]:
    """Bytes of the KV cache, and of logits and activations, at the peak of a run: the terms of `memory_estimate`."""
    cache = batch_size * shape.kv_bytes(prompt_tokens + output_tokens, kv_value_bytes or _value_bytes(quant, dtype))
    logits = batch_size * shape.vocab_size * 4
    return cache, logits + 2 * batch_size * prompt_tokens * max(shape.intermediate_size, 3 * shape.hidden_size) * 4


def load_memory_estimate(shape: Shape, quant: str = "none", dtype: str = "bfloat16") -> int:
    """Bytes needed at the peak of a load, without the interpreter; `dtype` is the checkpoint's.

    weights + the temporary tensors of the largest layer (`Loading.layer_bytes`). The checkpoint itself is mapped, so
    what is read of it is resident but not needed. Where a scheme casts the whole checkpoint first, that copy counts in
    place of the weights if it is larger. A head of its own is loaded last, when the layers are quantized: if it is
    cast, it takes the place of their temporary tensors.
    """
    loading, weights = SCHEMES[quant].loading, shape.weight_bytes(quant, dtype)
    layer = round(loading.layer_bytes * shape.largest_linear)
    if loading.unquantized_first and dtype != COMPUTE_DTYPE:
        return max(weights, shape.weight_bytes("none", COMPUTE_DTYPE)) + layer
    cast_head = 0 if dtype == COMPUTE_DTYPE else shape.head_parameters * VALUE_BYTES[COMPUTE_DTYPE]
    return weights + max(0, layer - cast_head)


def _value_bytes(quant: str, dtype: str) -> int:
    """Bytes of an unquantized value; quantized schemes compute in a 2-byte dtype. Raises ValueError if unknown."""
    scheme = SCHEMES.get(quant)
    stored = None if scheme is None else dtype if quant == "none" else "float16" if scheme.storage else scheme.dtype
    if stored not in VALUE_BYTES or dtype not in VALUE_BYTES:
        schemes = ", ".join(name for name, one in SCHEMES.items() if name == "none" or one.dtype or one.storage)
        raise ValueError(
            f"no memory formula for quant={quant} with dtype={dtype}. "
            f"Use one of {schemes} with one of {', '.join(VALUE_BYTES)}."
        )
    return VALUE_BYTES[stored]


def _size(config: Mapping[str, Any], *keys: str) -> int | None:
    """Return the value of the first of these keys that holds a positive whole number."""
    values = (config.get(key) for key in keys)
    return next((v for v in values if isinstance(v, int) and not isinstance(v, bool) and v > 0), None)


def read_by_step(config: Mapping[str, Any], held: int | None) -> int | None:
    """Return the bytes of weights that each decode step reads: `held`, or None for a mixture of experts.

    In a mixture a step reads only the experts that its tokens are sent to.
    """
    part = _decoder_part(config)
    return None if any(part.get(key) for key in _EXPERTS) else held


def _decoder_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config with its nested text_config on top, and the values that Gemma 3 leaves to transformers' defaults."""
    flat = {**config, **(config.get("text_config") or {})}
    return {**_GEMMA3_LEFT_OUT, **flat} if str(flat.get("model_type")).startswith("gemma3") else flat


def _costs_otherwise(config: Mapping[str, Any]) -> bool:
    other_layers = set(config.get("layer_types") or ()) - {"full_attention", "sliding_attention"}
    return bool(other_layers) or any(config.get(key) for key in _COSTS_OTHERWISE)


def _sliding(config: Mapping[str, Any], family: str, layers: int, context: int | None) -> tuple[int | None, int]:
    """Window in tokens and the number of layers that have it; (None, 0) without one shorter than the context."""
    window = _size(config, "sliding_window")
    if (
        window is None
        or (context and window >= context)
        or not config.get("use_sliding_window", not family.startswith("qwen"))
    ):
        return None, 0
    if config.get("layer_types"):
        count = list(config["layer_types"]).count("sliding_attention")
    elif pattern := _size(config, "sliding_window_pattern") or {"gemma2": 2, "gemma3": 6, "gemma3_text": 6}.get(family):
        count = layers - layers // pattern  # every pattern-th layer sees everything
    else:
        count = layers - int(config.get("max_window_layers") or 0)
    return (window, count) if count > 0 else (None, 0)
