"""Structured pruning: what `prune` names, the architectures that can be pruned, and the sizes that are left.

Structured pruning removes whole parts of a model, so that what is left is an ordinary smaller checkpoint: layers of the
stack, channels of each MLP, or heads of each attention. `backends.huggingface.pruning` decides which ones go.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..records.errors import UsageError
from ..records.redaction import excerpt
from .model_shape import Shape

LAYERS, MLP, HEADS = "layers", "mlp", "heads"
PARTS = (LAYERS, MLP, HEADS)
LEAST, MOST = 1, 90
"""Percent of a part that can be removed."""

WIDEST_UNIT = 128
"""Channels of an MLP go in units of at most this many, since kernels and groups of quantized weights need multiples."""

LEAST_UNITS = 16
"""Least number of units in the width of an MLP."""

OWN_CHECK = ("llama", "gemma2", "gemma3_text")
"""Model types whose configuration must have a number of heads that divides the hidden size (transformers checks it)."""


@dataclass(frozen=True)
class Pruning:
    """A parsed value of `prune`: the part (one of `PARTS`) and the share of it that goes, in percent."""

    part: str
    percent: float

    def kept(self, count: int) -> int:
        """Return how many of `count` units are left: what goes is rounded to whole units, halves up."""
        return count - int(count * self.percent / 100 + 0.5)


@dataclass(frozen=True)
class Family:
    """Names in an architecture, of its modules and of the sizes in its configuration.

    - `stack`: the list of layers
    - `layers_key`, `width_key`: number of layers, and width of an MLP, in the configuration
    - `mlp_in`, `mlp_out`: linear layers of an MLP into its width, and out of it; empty if its width is no setting
    - `heads_in`, `heads_out`: projections of a layer's attention; empty if the size of a head follows from their number
    """

    stack: str
    layers_key: str = "num_hidden_layers"
    width_key: str = "intermediate_size"
    mlp_in: tuple[str, ...] = ()
    mlp_out: str = ""
    heads_in: tuple[str, ...] = ()
    heads_out: str = ""

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of it that can be pruned."""
        return (LAYERS, *((MLP,) if self.mlp_out else ()), *((HEADS,) if self.heads_out else ()))


_LLAMA = Family(
    "model.layers",
    mlp_in=("mlp.gate_proj", "mlp.up_proj"),
    mlp_out="mlp.down_proj",
    heads_in=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    heads_out="self_attn.o_proj",
)

FAMILIES: Mapping[str, Family] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"), _LLAMA),
    "opt": Family("model.decoder.layers", width_key="ffn_dim", mlp_in=("fc1",), mlp_out="fc2"),
    "gpt_neox": Family("gpt_neox.layers", mlp_in=("mlp.dense_h_to_4h",), mlp_out="mlp.dense_4h_to_h"),
    "gpt2": Family("transformer.h", "n_layer", "n_inner", ("mlp.c_fc",), "mlp.c_proj"),
    "bloom": Family("transformer.h", "n_layer"),
}
"""Model type → its names. Each one is tested on a tiny model (`tests/backends/huggingface/test_pruning.py`)."""


def parse(text: str) -> Pruning:
    """Parse a value such as `layers-25%`. Raises UsageError if it is none."""
    found = re.fullmatch(r"([a-z]+)-(\d+(?:\.\d+)?)%?", text.lower())
    if not found or found[1] not in PARTS:
        raise UsageError(
            f"prune is not a part and a share of it: {excerpt(text, 60)}. "
            f"Give {', '.join(f'{part}-25%' for part in PARTS)}, or none."
        )
    percent = float(found[2])
    if not LEAST <= percent <= MOST:
        raise UsageError(f"prune is not from {LEAST} to {MOST} percent: {excerpt(text, 60)}. Give another share.")
    return Pruning(found[1], percent)


def canonical(text: str) -> str:
    """Return a value of `prune` in its one form. Raises UsageError as `parse` does."""
    found = parse(text)
    return f"{found.part}-{found.percent:g}%"


def unit_of(width: int) -> int:
    """Return how many channels of an MLP go together: the largest power of two up to `WIDEST_UNIT` that divides it."""
    unit = WIDEST_UNIT
    while unit > 1 and (width % unit or width // unit < LEAST_UNITS):
        unit //= 2
    return unit


def width_left(width: int, pruning: Pruning) -> int:
    """Return the width of an MLP after pruning."""
    unit = unit_of(width)
    return pruning.kept(width // unit) * unit


def head_units(shape: Shape) -> tuple[int, str]:
    """Return the number of units of heads that can go, and their name: KV groups, or heads if there is one group.

    A KV group is a head of keys and values with the heads that share it (Ainslie et al. 2023, arXiv:2305.13245).
    """
    grouped = 1 < shape.kv_heads < shape.attention_heads
    return (shape.kv_heads, "KV groups") if grouped else (shape.attention_heads, "heads")


def heads_left(shape: Shape, pruning: Pruning) -> tuple[int, int]:
    """Return the numbers of heads and of KV heads after pruning."""
    left = pruning.kept(head_units(shape)[0])
    return (left * (shape.attention_heads // shape.kv_heads), left) if shape.kv_heads > 1 else (left, 1)


def refusal(model: str, config: Mapping[str, Any] | None, text: str) -> str | None:
    """Say why a model with this configuration cannot be pruned as asked, and what to do; None if it can."""
    asked, kind = f"prune={text}", str((config or {}).get("model_type") or "")
    if config is None or config.get("quantization_config"):
        what = "a GGUF file" if config is None else "quantized already"
        return f"{asked} needs a checkpoint with its own weights, and {model} is {what}. Give the unquantized model."
    family, shape, pruning = FAMILIES.get(kind), Shape.from_config(config), parse(text)
    if family is None or shape is None:
        return (
            f"{asked} cannot be made of {model}, whose architecture is {kind or 'unknown'}: "
            f"{', '.join(FAMILIES)} can be pruned. Use prune=none."
        )
    if pruning.part not in family.parts:
        fixed = "the width of the MLP" if pruning.part == MLP else "the size of a head"
        return (
            f"{asked} cannot be made of {model}: in the architecture {kind}, {fixed} follows from other sizes. "
            f"Use prune={','.join(f'{part}-{pruning.percent:g}%' for part in family.parts)}."
        )
    return _too_few(asked, model, shape, pruning) or _unfit_heads(asked, model, kind, shape, pruning)


def _too_few(asked: str, model: str, shape: Shape, pruning: Pruning) -> str | None:
    """Say that a share is less than one unit, or all of them."""
    count, unit = _units(shape, pruning.part)
    left = pruning.kept(count)
    if 0 < left < count:
        return None
    fitting = next((p for p in range(LEAST, MOST + 1) if 0 < Pruning(pruning.part, p).kept(count) < count), None)
    amount = f"removes none of the {count} {unit}" if left == count else f"leaves none of the {count} {unit}"
    advice = f"Use prune={pruning.part}-{fitting}% or more" if left == count and fitting else "Use another part"
    return f"{asked} {amount} of {model}. {advice}."


def _units(shape: Shape, part: str) -> tuple[int, str]:
    if part == LAYERS:
        return shape.layers, "layers"
    if part == HEADS:
        return head_units(shape)
    unit = unit_of(shape.intermediate_size)
    return shape.intermediate_size // unit, f"units of {unit} channels"


def _unfit_heads(asked: str, model: str, kind: str, shape: Shape, pruning: Pruning) -> str | None:
    """Say that transformers would refuse the number of heads that is left."""
    if pruning.part != HEADS or kind not in OWN_CHECK or shape.hidden_size % heads_left(shape, pruning)[0] == 0:
        return None
    count, unit = head_units(shape)
    shares = [Pruning(HEADS, 100 * gone / count) for gone in range(1, count)]
    fitting = [
        f"heads-{share.percent:.4g}%"
        for share in shares
        if shape.hidden_size % heads_left(shape, share)[0] == 0 and share.percent <= MOST
    ]
    advice = f"Use prune={','.join(fitting)}" if fitting else "Use prune=layers-25% or mlp-25%"
    return (
        f"{asked} leaves {heads_left(shape, pruning)[0]} of the {shape.attention_heads} heads of {model} (whole "
        f"{unit}), and in the architecture {kind} their number must divide the hidden size {shape.hidden_size}. "
        f"{advice}."
    )


def pruned_config(config: Mapping[str, Any], text: str, kept: Sequence[int] | None = None) -> dict[str, Any]:
    """Return the configuration of a model after pruning, which must be possible (`refusal`).

    `kept`: numbers of the layers that are left. Without them the first ones are assumed, which decides nothing but
    which layers have a sliding window.
    """
    family, shape, pruning = FAMILIES[str(config["model_type"])], Shape.from_config(config), parse(text)
    assert shape
    found = dict(config)
    if pruning.part == LAYERS:
        left = pruning.kept(shape.layers)
        numbers = range(left) if kept is None else kept
        lists = per_layer(config, shape.layers)
        found |= {name: [value[number] for number in numbers] for name, value in lists.items()}
        found[family.layers_key] = left
    elif pruning.part == MLP:
        found[family.width_key] = width_left(shape.intermediate_size, pruning)
    else:
        heads, kv_heads = heads_left(shape, pruning)
        found |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": shape.head_dim}
    return found


def per_layer(config: Mapping[str, Any], layers: int) -> dict[str, list[Any]]:
    """Return the settings that are a list with one value for each layer."""
    return {
        name: value
        for name, value in config.items()
        if isinstance(value, list) and len(value) == layers and name in ("layer_types", "no_rope_layers")
    }
