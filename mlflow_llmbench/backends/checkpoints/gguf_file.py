"""Read the header of a GGUF file: metadata, tensors and their types. Uses the standard library only.

Format: ggml's documentation (ggml-org/ggml, docs/gguf.md), versions 2 and 3, little-endian. The entries of a vocabulary
are counted, not kept, so a header is read in a fraction of a second, before anything heavy is imported.
"""

from __future__ import annotations

import math
import re
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ...records import reading
from ...records.errors import ModelError

TYPES: Mapping[int, tuple[str, int, int]] = {
    0: ("f32", 1, 4),
    1: ("f16", 1, 2),
    2: ("q4_0", 32, 18),
    3: ("q4_1", 32, 20),
    6: ("q5_0", 32, 22),
    7: ("q5_1", 32, 24),
    8: ("q8_0", 32, 34),
    10: ("q2_K", 256, 84),
    11: ("q3_K", 256, 110),
    12: ("q4_K", 256, 144),
    13: ("q5_K", 256, 176),
    14: ("q6_K", 256, 210),
    15: ("q8_K", 256, 292),
    16: ("iq2_xxs", 256, 66),
    17: ("iq2_xs", 256, 74),
    18: ("iq3_xxs", 256, 98),
    19: ("iq1_s", 256, 50),
    20: ("iq4_nl", 32, 18),
    21: ("iq3_s", 256, 110),
    22: ("iq2_s", 256, 82),
    23: ("iq4_xs", 256, 136),
    24: ("i8", 1, 1),
    25: ("i16", 1, 2),
    26: ("i32", 1, 4),
    27: ("i64", 1, 8),
    28: ("f64", 1, 8),
    29: ("iq1_m", 256, 56),
    30: ("bf16", 1, 2),
    34: ("tq1_0", 256, 54),
    35: ("tq2_0", 256, 66),
    39: ("mxfp4", 32, 17),
}
"""Type number in the file → (name, values per block, bytes per block)."""

FLOATS = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
"""Unquantized type → torch's name of it."""

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
LONGEST_ARRAY_KEPT = 4096
"""Longest array whose values are kept: enough for one value per layer, too short for a vocabulary."""

LONGEST_STRING = 1 << 24
MOST_HEADER_BYTES = 1 << 27
MOST_TENSORS, MOST_KEYS, MOST_ENTRIES, MOST_DIMENSIONS = 200_000, 100_000, 2_000_000, 8
MOST_ALIGNMENT = 1 << 20
LAST_TYPE = 255
"""Limits of a header, some ten times the largest that are published: 46,848 tensors, and vocabularies of 262,144 words
with 514,906 merges. Types beyond the last are no types of a later version."""

PART = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")


@dataclass(frozen=True)
class Tensor:
    """A tensor of the file. `shape` is in ggml's order (columns first); `kind` is the number of its type."""

    name: str
    shape: tuple[int, ...]
    kind: int
    stored_bytes: int

    @property
    def count(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def type_name(self) -> str:
        """Name of the type in llama.cpp; `type N` for a type that is not in `TYPES`."""
        return TYPES[self.kind][0] if self.kind in TYPES else f"type {self.kind}"


@dataclass(frozen=True)
class Header:
    """Metadata by key, and the tensors. An array of texts or one longer than `LONGEST_ARRAY_KEPT` is its length."""

    metadata: Mapping[str, Any]
    lengths: Mapping[str, int]  # of every array
    tensors: tuple[Tensor, ...]

    @property
    def architecture(self) -> str:
        """Name of the architecture: `llama`, `gemma3`, …; empty if the file does not say."""
        return str(self.metadata.get("general.architecture", ""))

    def of_model(self, key: str) -> Any:
        """Return the value of one of the architecture's keys, such as `block_count`; None if it is absent."""
        return self.metadata.get(f"{self.architecture}.{key}")

    @property
    def vocab_size(self) -> int | None:
        """Number of tokens in the vocabulary, which is the number of rows of the embedding."""
        embedding = next((t for t in self.tensors if t.name == "token_embd.weight"), None)
        return embedding.shape[-1] if embedding and len(embedding.shape) == 2 else None

    @property
    def context(self) -> int | None:
        """Context length of the model in tokens."""
        return self._count("context_length")

    @property
    def has_tokenizer(self) -> bool:
        """True if the file holds a vocabulary, so that text can be tokenized."""
        return str(self.metadata.get("tokenizer.ggml.model", "none")) not in ("none", "no_vocab")

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.stored_bytes for tensor in self.tensors)

    @property
    def tied(self) -> bool:
        """True if the input embedding is also the output head."""
        return not any(tensor.name == "output.weight" for tensor in self.tensors)

    @property
    def step_bytes(self) -> int:
        """Bytes that a decode step reads: all tensors but an embedding of which it reads one row.

        For a mixture of experts this counts all experts.
        """
        skipped = {
            "position_embd.weight",
            "per_layer_token_embd.weight",
            *(() if self.tied else ("token_embd.weight",)),
        }
        return sum(tensor.stored_bytes for tensor in self.tensors if tensor.name not in skipped)

    @property
    def linear(self) -> tuple[Tensor, ...]:
        """Weight matrices of the decoder's layers."""
        return tuple(
            t for t in self.tensors if t.name.startswith("blk.") and t.name.endswith(".weight") and len(t.shape) > 1
        )

    @property
    def linear_bits(self) -> float:
        """Mean stored bits per weight of the layers' matrices, scales included."""
        count = sum(tensor.count for tensor in self.linear)
        return 8 * sum(tensor.stored_bytes for tensor in self.linear) / count if count else 0.0

    @property
    def linear_types(self) -> str:
        """Types of the layers' matrices with the number of matrices of each, such as `q4_K × 90, q6_K × 18`."""
        counts = Counter(tensor.type_name for tensor in self.linear)
        return ", ".join(f"{name} × {count}" for name, count in sorted(counts.items()))

    @property
    def embedding_type(self) -> str:
        """Type of the input embedding."""
        return next((tensor.type_name for tensor in self.tensors if tensor.name == "token_embd.weight"), "unknown")

    def kv_values_per_token(self) -> int | None:
        """Return the number of key and value entries that one token of one row adds to the cache.

        Valid while no sliding window is full. None if it does not follow from the header.
        """
        layers, heads, hidden = map(self._count, ("block_count", "attention.head_count", "embedding_length"))
        if layers is None or heads is None or hidden is None or self.of_model("attention.kv_lora_rank"):
            return None
        key, value = (self._count(f"attention.{name}_length") or hidden // heads for name in ("key", "value"))
        kv_heads = self.of_model("attention.head_count_kv")
        if isinstance(kv_heads, list):
            return sum(kv_heads) * (key + value) if all(type(one) is int for one in kv_heads) else None
        return layers * (self._count("attention.head_count_kv") or heads) * (key + value)

    def _count(self, key: str) -> int | None:
        """Return the value of one of the architecture's keys that is a positive whole number, else None."""
        found = self.of_model(key)
        return found if type(found) is int and found > 0 else None

    def as_config(self) -> dict[str, Any]:
        """Return the sizes under the names of a `config.json`, for `models.Shape`. Absent values are left out."""
        architecture = self.architecture
        family = {"gemma3": "gemma3_text", "gptneox": "gpt_neox", "phi2": "phi"}.get(architecture, architecture)
        keys = {
            "num_hidden_layers": "block_count",
            "hidden_size": "embedding_length",
            "intermediate_size": "feed_forward_length",
            "num_attention_heads": "attention.head_count",
            "num_key_value_heads": "attention.head_count_kv",
            "head_dim": "attention.key_length",
            "sliding_window": "attention.sliding_window",
            "num_experts": "expert_count",
            "kv_lora_rank": "attention.kv_lora_rank",
            "ssm_cfg": "ssm.state_size",
        }
        found = {name: value for name, key in keys.items() if isinstance(value := self.of_model(key), int)}
        sizes = {"max_position_embeddings": self.context, "vocab_size": self.vocab_size}
        known = {name: size for name, size in sizes.items() if size}
        return {"model_type": family, "tie_word_embeddings": self.tied, **known, **found}


def parts_of(path: Path) -> list[Path]:
    """Return all files of a split model, given the first part; for any other file, the file itself.

    Raises ModelError if `path` is another part than the first.
    """
    part = PART.match(path.name)
    if part is None:
        return [path]
    if int(part["number"]) != 1 or int(part["count"]) < 1:
        raise ModelError(
            f"{path.name} is not the first part of a split model. Give {part['stem']}-00001-of-{part['count']}.gguf."
        )
    return [
        path.with_name(f"{part['stem']}-{number:05d}-of-{part['count']}.gguf")
        for number in range(1, int(part["count"]) + 1)
    ]


def read_header(path: Path) -> Header:
    """Read the header of a GGUF file and the tensors of all its parts. Raises ModelError for an unreadable file."""
    metadata: dict[str, Any] = {}
    lengths: dict[str, int] = {}
    tensors: list[Tensor] = []
    try:
        for number, part in enumerate(parts_of(path)):
            with reading.open_file(part) as file:
                found, counts, held = _Reader(file, part.stat().st_size).header()
            if number == 0:
                metadata, lengths = found, counts
            tensors += held
        if not tensors:
            raise ValueError("it has no tensors")
    except (OSError, ValueError, MemoryError) as error:
        raise ModelError(f"{path} is not a readable GGUF file: {error}. Download it again.") from None
    return Header(metadata, lengths, tuple(tensors))


class _Reader:
    """Read the fields of one file in their order. Whatever counts and lengths it claims, no read passes its limits."""

    def __init__(self, file: BinaryIO, file_bytes: int) -> None:
        self.file, self.file_bytes = file, file_bytes
        self.position = self.entries = 0

    def header(self) -> tuple[dict[str, Any], dict[str, int], list[Tensor]]:
        magic = self.take(4)
        if magic != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version, tensor_count, key_count = self.number("I"), self.number("Q"), self.number("Q")
        if version not in (2, 3):
            raise ValueError(f"its version is {version}; only 2 and 3 are supported")
        if tensor_count > MOST_TENSORS or key_count > MOST_KEYS:
            raise ValueError(f"it claims {tensor_count:,} tensors and {key_count:,} keys")
        metadata: dict[str, Any] = {}
        lengths: dict[str, int] = {}
        for _ in range(key_count):
            key = self.text()
            if key in metadata:
                raise ValueError(f"the key {key[:80]} is in it twice")
            kind = self.number("I")
            metadata[key] = self.array(key, lengths) if kind == ARRAY else self.value(kind)
        infos = [self.tensor_info() for _ in range(tensor_count)]
        if len({name for name, *_ in infos}) < len(infos):
            raise ValueError("two tensors in it have the same name")
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= MOST_ALIGNMENT or alignment & (alignment - 1):
            raise ValueError(f"its alignment is {str(alignment)[:40]}, which is no power of two")
        begin = -(-self.position // alignment) * alignment
        ends = [*sorted(offset for *_, offset in infos)[1:], self.file_bytes - begin]
        room = dict(zip(sorted(range(len(infos)), key=lambda number: infos[number][3]), ends, strict=False))
        tensors = []
        for number, (name, shape, kind, offset) in enumerate(infos):
            tensor = Tensor(name, shape, kind, _stored(name, shape, kind, room[number] - offset))
            if offset % alignment or not 0 <= tensor.stored_bytes <= room[number] - offset:
                last = room[number] == ends[-1]
                raise ValueError(
                    "it ends before its last tensor" if last else f"the tensor {name[:80]} is not where it should be"
                )
            tensors.append(tensor)
        return metadata, lengths, tensors

    def tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        """Return name, shape, type and offset of a tensor."""
        name, dimensions = self.text(), self.number("I")
        if dimensions > MOST_DIMENSIONS:
            raise ValueError(f"the tensor {name[:80]} claims {dimensions:,} dimensions")
        return name, tuple(self.number("Q") for _ in range(dimensions)), self.number("I"), self.number("Q")

    def forward(self, count: int) -> None:
        """Count the next bytes as read. Raises ValueError if the file or a header cannot have them."""
        self.position += count
        if self.position > self.file_bytes:
            raise ValueError("it ends within its header")
        if self.position > MOST_HEADER_BYTES:
            raise ValueError(f"its header claims more than {MOST_HEADER_BYTES:,} bytes")

    def take(self, count: int) -> bytes:
        self.forward(count)
        found = self.file.read(count)
        if len(found) < count:
            raise ValueError("it ends within its header")
        return found

    def skip(self, count: int) -> None:
        self.forward(count)
        self.file.seek(count, 1)

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def text(self) -> str:
        length = self.number("Q")
        if length > LONGEST_STRING:
            raise ValueError(f"a text in it claims {length:,} bytes")
        return self.take(length).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind not in SCALARS:
            raise ValueError(f"a value in it is of the unknown type {kind}")
        return self.number(SCALARS[kind])

    def array(self, key: str, lengths: dict[str, int]) -> Any:
        """Read an array. Return its values, or their number if they are not kept."""
        kind, count = self.number("I"), self.number("Q")
        lengths[key] = count
        if kind == STRING:
            self.entries += count
            if self.entries > MOST_ENTRIES:
                raise ValueError(f"the array {key[:80]} claims {count:,} texts")
            for _ in range(count):
                self.skip(self.number("Q"))
            return count
        if kind not in SCALARS:
            raise ValueError(f"the array {key[:80]} is of the unknown type {kind}")
        size = struct.calcsize(f"<{SCALARS[kind]}")
        if count > LONGEST_ARRAY_KEPT:
            self.skip(count * size)
            return count
        return list(struct.unpack(f"<{count}{SCALARS[kind]}", self.take(count * size)))


def _stored(name: str, shape: tuple[int, ...], kind: int, room: int) -> int:
    """Return the bytes of a tensor; for a type that is not in `TYPES`, all bytes before the next tensor.

    Raises ValueError for a shape that its type cannot have.
    """
    if kind not in TYPES:
        if kind > LAST_TYPE:
            raise ValueError(f"the tensor {name[:80]} is of the unknown type {kind}")
        return room
    _, block, size = TYPES[kind]
    count = math.prod(shape)
    if not shape or count % block or shape[0] % block:
        raise ValueError(f"the tensor {name[:80]} has a shape that its type cannot have: {shape}")
    return count // block * size
