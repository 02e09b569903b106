"""Headers of GGUF files that lie: each is read in bounded time and memory, or refused in one line."""

from __future__ import annotations

import contextlib
import os
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlflow_llmbench.backends.checkpoints import gguf_file, sources
from mlflow_llmbench.config.model_shape import Shape
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.errors import ModelError

U32, STRING, ARRAY, U64 = 4, 8, 9, 10


def text(value: str, claimed: int | None = None) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data) if claimed is None else claimed) + data


def pair(key: str, kind: int, value: Any) -> bytes:
    """Bytes of a key and its value, which are given as bytes where they lie."""
    packed = {U32: "<I", U64: "<Q"}
    data = value if isinstance(value, bytes) else text(value) if kind == STRING else struct.pack(packed[kind], value)
    return text(key) + struct.pack("<I", kind) + data


def array(kind: int, count: int, values: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + values


def tensor(name: str, *shape: int, kind: int = 0, offset: int = 0, dimensions: int | None = None) -> bytes:
    sizes = struct.pack(f"<{len(shape)}Q", *shape)
    return text(name) + struct.pack("<I", len(shape) if dimensions is None else dimensions) + sizes + struct.pack(
        "<IQ", kind, offset
    )  # fmt: skip


ORDINARY = (
    pair("general.architecture", STRING, "llama"), pair("llama.block_count", U32, 2),
    pair("llama.attention.head_count", U32, 4), pair("llama.embedding_length", U32, 64),
)  # fmt: skip
EMBEDDING = tensor("token_embd.weight", 64, 10)


def write(
    *keys: bytes, tensors: tuple[bytes, ...] = (EMBEDDING,), data: int = 2560, version: int = 3,
    tensor_count: int | None = None, key_count: int | None = None, alignment: int = 32,
) -> Path:  # fmt: skip
    head = b"GGUF" + struct.pack(
        "<IQQ",
        version,
        len(tensors) if tensor_count is None else tensor_count,
        len(keys) if key_count is None else key_count,
    )
    head += b"".join(keys) + b"".join(tensors)
    path = Path("model.gguf")
    path.write_bytes(head + bytes(-len(head) % alignment + data))
    return path


def test_an_ordinary_header_is_read() -> None:
    header = gguf_file.read_header(write(*ORDINARY))
    assert (header.architecture, header.vocab_size, header.weight_bytes) == ("llama", 10, 2560)
    assert header.kv_values_per_token() == 2 * 4 * (16 + 16)
    aligned = write(*ORDINARY, pair("general.alignment", U32, 64), alignment=64)
    assert gguf_file.read_header(aligned).weight_bytes == 2560
    two = (EMBEDDING, tensor("output.weight", 64, 10, offset=2560))
    assert not gguf_file.read_header(write(*ORDINARY, tensors=two, data=5120)).tied


LIES: dict[str, tuple[dict[str, Any], str]] = {
    "version": ({"version": 0x03000000}, "its version is 50331648"),
    "tensors": ({"tensor_count": 1 << 40}, "it claims 1,099,511,627,776 tensors and 4 keys"),
    "keys": ({"key_count": 1 << 63}, "and 9,223,372,036,854,775,808 keys"),
    "more tensors than there are": ({"tensor_count": 90_000}, ""),
    "dimensions": ({"tensors": (tensor("t", 1, dimensions=1 << 31),)}, "claims 2,147,483,648 dimensions"),
    "no dimensions": ({"tensors": (tensor("t"),)}, "a shape that its type cannot have"),
    "no tensors": ({"tensors": ()}, "it has no tensors"),
    "a size": ({"tensors": (tensor("t", 1 << 62, 1 << 62),)}, "it ends before its last tensor"),
    "a size that is no block": ({"tensors": (tensor("t", 33, 32, kind=2),)}, "a shape that its type cannot have"),
    "a type": ({"tensors": (tensor("t", 64, kind=4_000_000_000),)}, "of the unknown type 4000000000"),
    "an offset": ({"tensors": (tensor("t", 64, offset=1 << 62),)}, "it ends before its last tensor"),
    "an offset that is not aligned": ({"tensors": (tensor("t", 64, offset=7),)}, ""),
    "two tensors in one place": ({"tensors": (tensor("a", 64), tensor("b", 64))}, "the tensor a is not where"),
    "two tensors of one name": ({"tensors": (EMBEDDING, EMBEDDING)}, "two tensors in it have the same name"),
    "the file's end": ({"data": 100}, "it ends before its last tensor"),
}

VALUES: dict[str, tuple[bytes, str]] = {
    "alignment 0": (pair("general.alignment", U32, 0), "its alignment is 0, which is no power of two"),
    "alignment 3": (pair("general.alignment", U32, 3), "its alignment is 3,"),
    "alignment of a gigabyte": (pair("general.alignment", U32, 1 << 30), "its alignment is 1073741824,"),
    "a text as alignment": (pair("general.alignment", STRING, "32"), "its alignment is 32,"),
    "a list as alignment": (pair("general.alignment", ARRAY, array(U32, 1, bytes(4))), "its alignment is [0],"),
    "a key twice": (pair("general.architecture", STRING, "gemma"), "the key general.architecture is in it twice"),
    "a long key": (text("x", 1 << 40) + struct.pack("<I", U32), "a text in it claims 1,099,511,627,776 bytes"),
    "a long value": (pair("a", STRING, text("x", 1 << 25)), "a text in it claims 33,554,432 bytes"),
    "a value beyond the end": (pair("a", STRING, text("x", 1 << 20)), "it ends within its header"),
    "an unknown type": (pair("a", 77, b"\0" * 8), "a value in it is of the unknown type 77"),
    "an array of arrays": (pair("a", ARRAY, array(ARRAY, 9)), "the array a is of the unknown type 9"),
    "an array of numbers": (pair("a", ARRAY, array(U64, 1 << 61)), "it ends within its header"),
    "a short array of numbers": (pair("a", ARRAY, array(U64, 4000)), "it ends within its header"),
    "an array of texts": (pair("a", ARRAY, array(STRING, 1 << 60)), "the array a claims 1,152,921,504,606,"),
    "a text in an array": (pair("a", ARRAY, array(STRING, 2, text("x", 1 << 63))), "it ends within its header"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused_in_one_line(lie: str) -> None:
    changes, message = LIES[lie]
    check(write(*ORDINARY, **changes), message)


@pytest.mark.parametrize("lie", VALUES)
def test_a_value_that_lies_is_refused_in_one_line(lie: str) -> None:
    value, message = VALUES[lie]
    check(write(*ORDINARY, value), message)


def check(path: Path, message: str) -> None:
    with pytest.raises(
        ModelError, match=r"^model\.gguf is not a readable GGUF file: .*\. Download it again\.$"
    ) as told:
        gguf_file.read_header(path)
    assert message in str(told.value)


@pytest.mark.parametrize("lie", ["keys", "tensors", "texts", "numbers"])
def test_a_sparse_file_of_many_gigabytes_gives_no_header_of_that_size(
    lie: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind the claim lie zeros, which are empty keys, tensors and texts, as many as one likes."""
    monkeypatch.setattr(gguf_file, "MOST_HEADER_BYTES", 1 << 20)
    path = {
        "keys": lambda: write(key_count=100_000), "tensors": lambda: write(tensors=(), tensor_count=200_000),
        "texts": lambda: write(pair("a", ARRAY, array(STRING, 2_000_000)), tensors=()),
        "numbers": lambda: write(pair("a", ARRAY, array(U64, 1 << 32)), tensors=()),
    }[lie]()  # fmt: skip
    os.truncate(path, 60 * 10**9)
    with pytest.raises(ModelError, match="is not a readable GGUF file: "):
        gguf_file.read_header(path)


@pytest.mark.parametrize("key", ["block_count", "attention.head_count", "attention.head_count_kv", "embedding_length"])
@pytest.mark.parametrize(
    "value", [(U32, 0), (STRING, "x"), (ARRAY, array(STRING, 1, text("x"))), (ARRAY, array(U32, 0))]
)
def test_sizes_of_a_wrong_type_give_no_estimate(key: str, value: tuple[int, Any]) -> None:
    keys = [one for one in ORDINARY if f"llama.{key}".encode() + b"\x04" not in one]
    header = gguf_file.read_header(write(*keys, pair(f"llama.{key}", *value)))
    header.kv_values_per_token()
    Shape.from_config(header.as_config())
    assert header.linear_bits == 0


def test_what_is_in_the_place_of_a_file_is_named(tmp_path: Path) -> None:
    path = Path("model.gguf")
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(ModelError) as told:
        sources.find_model(Cell(model=str(path)))
    assert str(told.value) == (
        "model.gguf is not a GGUF file: it is a Git LFS pointer, not the file itself: run `git lfs pull` in its "
        "repository."
    )
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ModelError, match="There is no file model.gguf"):
        sources.find_model(Cell(model=str(path)))
    with pytest.raises(ModelError, match="it is a pipe, not a file"):
        gguf_file.read_header(path)
    with pytest.raises(ModelError, match="is not the first part of a split model"):
        gguf_file.parts_of(Path("m-00001-of-00000.gguf"))


@settings(max_examples=100, derandomize=True, deadline=None, database=None)
@given(st.lists(st.tuples(st.integers(0, 400), st.binary(min_size=1, max_size=9)), min_size=1, max_size=3))
def test_fuzz_a_damaged_header_is_read_or_refused_in_one_line(damage: list[tuple[int, bytes]]) -> None:
    path = write(
        *ORDINARY, pair("a", ARRAY, array(STRING, 2, text("x") + text("yz"))), pair("general.alignment", U32, 32)
    )
    content = bytearray(path.read_bytes())
    for position, found in damage:
        content[position : position + len(found)] = found
    path.write_bytes(content)
    with contextlib.suppress(ModelError):  # whose message is one line in any case
        header = gguf_file.read_header(path)
        Shape.from_config(header.as_config())
        assert (header.kv_values_per_token() or 0) >= 0
        assert header.step_bytes <= header.weight_bytes <= len(content)
