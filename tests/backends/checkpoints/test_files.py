"""Files of a checkpoint as anybody may have written them: each is read, or refused in one line that names it."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlflow_llmbench.backends.checkpoints import files, sources
from mlflow_llmbench.config.model_shape import Shape
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.errors import LlmbenchError, ModelError
from mlflow_llmbench.records.results import ModelFacts
from mlflow_llmbench.system import estimate

CONFIG: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "intermediate_size": 256,
    "max_position_embeddings": 256, "tie_word_embeddings": False, "dtype": "float32", "hidden_act": "silu",
    "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 64, "use_sliding_window": True,
    "sliding_window_pattern": 2, "max_window_layers": 1, "head_dim": 32, "eos_token_id": 1, "is_decoder": True,
    "is_encoder_decoder": False, "quantization_config": None, "text_config": None, "auto_map": None,
    "num_experts": 0, "kv_lora_rank": None, "ssm_cfg": None, "attn_implementation": "eager",
}  # fmt: skip
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
PULL = "it is a Git LFS pointer, not the file itself: run `git lfs pull` in its repository."


def safetensors(header: bytes = b"{}", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header


@pytest.fixture(autouse=True)
def folder() -> Path:
    """A model's folder `m` with a configuration and a weight file without tensors."""
    folder = Path("m")
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "model.safetensors").write_bytes(safetensors())
    return folder


def find() -> ModelFacts:
    return sources.find_model(Cell(model="m"))


def refused() -> str:
    with pytest.raises(ModelError) as told:
        find()
    assert len(str(told.value).splitlines()) == 1
    return str(told.value)


def test_the_ordinary_folder_is_read() -> None:
    assert find().config == CONFIG


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("quantization_config", [], "quantization_config is [], which is not an object"),
        ("quantization_config", {"quant_method": ["gptq"]}, "its quant_method is ['gptq'], not a text"),
        ("text_config", "x", "text_config is x, which is not an object"),
        ("text_config", {"hidden_size": "x"}, "text_config.hidden_size is x, which is not a whole number"),
        ("architectures", "Llama", "architectures is Llama, which is not a list of texts"),
        ("architectures", [1], "architectures is [1], which is not a list of texts"),
        ("layer_types", [{}], "layer_types is [{}], which is not a list of texts"),
        ("model_type", {}, "model_type is {}, which is not a text"),
        ("hidden_size", "128", "hidden_size is 128, which is not a whole number"),
        ("vocab_size", True, "vocab_size is True, which is not a whole number"),
        ("num_hidden_layers", 10**20, "num_hidden_layers is 100000000000000000000, beyond every model"),
        ("num_hidden_layers", 10**400, "a number in it has 401 digits"),
        ("max_window_layers", "x", "max_window_layers is x, which is not a whole number"),
        ("tie_word_embeddings", "false", "tie_word_embeddings is false, which is not true or false"),
    ],
)
def test_a_value_of_a_wrong_type_is_named(folder: Path, key: str, value: Any, told: str) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, key: value}))
    assert refused() == f"The configuration of m cannot be read: {told}. Download the model again."


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"[]", "it is not a JSON object"),
        (b'{"a":' * 5000, "it is nested 5,000 levels deep, and at most 100 are read"),
        (b'{"model_type": "\\ud800"}', "a text in it has half of a surrogate pair, which is no character"),
        (b'{"a": "\xe9"}', "it is not UTF-8: byte 8 cannot be decoded"),
        (b"{} " + b" " * 20_000_000, "it has 20,000,003 bytes, and at most 20,000,000 are read"),
    ],
)
def test_a_configuration_that_is_none(folder: Path, content: bytes, told: str) -> None:
    (folder / "config.json").write_bytes(content)
    assert refused() == f"The configuration of m cannot be read: {told}. Download the model again."


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_byte_order_mark_that_transformers_would_not_read(folder: Path, name: str) -> None:
    (folder / name).write_text(json.dumps(CONFIG), encoding="utf-8-sig")
    told = "it begins with a byte order mark, which transformers does not read: save it as UTF-8 without one."
    assert refused().endswith(f" of m cannot be read: {told}")


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def pointer(path: Path) -> None:
    path.write_text(LFS)


def deep(path: Path) -> None:
    path.write_text("[" * 100_000)


def sparse(path: Path) -> None:
    path.write_text("{}")
    os.truncate(path, 50 * 10**9)


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (pipe, "it is a pipe, not a file. Download the model again."),
        (pointer, PULL),
        (deep, "it is nested 100,000 levels deep, and at most 100 are read. Download the model again."),
        (sparse, "it has 50,000,000,000 bytes, and at most 200,000,000 are read. Download the model again."),
    ],
)
def test_a_small_file_that_transformers_would_read(
    folder: Path, name: str, damage: Callable[[Path], None], told: str
) -> None:
    damage(folder / name)
    what = "index" if "index" in name else "file"
    assert refused() == f"The {what} {name} of m cannot be read: {told}"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "merges.txt", "chat_template.jinja"])
@pytest.mark.parametrize("damage", [pipe, pointer, sparse])
def test_files_of_a_tokenizer(folder: Path, name: str, damage: Callable[[Path], None]) -> None:
    damage(folder / name)
    assert refused().startswith(f"The file {name} of m cannot be read: it ")


def test_texts_are_refused_before_the_load_if_no_file_is_a_tokenizers(folder: Path) -> None:
    """Of some types, as OPT's, transformers makes a tokenizer without files: it gives no ids for any text."""
    cell = Cell(model="m", workload="qa")
    with pytest.raises(ModelError, match=r"^m has no tokenizer, which texts need\. Add its files"):
        sources.find_model(cell)
    assert find().name == "m"  # drawn ids need none
    (folder / "vocab.json").write_text("{}")
    assert sources.find_model(cell).name == "m"


@pytest.mark.parametrize("kind", ["opt", "gemma3_text", "qwen3", "cohere"])
def test_an_empty_tokenizer_is_none(folder: Path, kind: str) -> None:
    from transformers import AutoConfig

    AutoConfig.for_model(kind).save_pretrained(folder)
    cell = Cell(model="m")
    with pytest.raises(ModelError, match=r"^m has no tokenizer"):
        sources.load_tokenizer(cell, ModelFacts("m", "folder", str(folder.resolve()), "r"))


@pytest.mark.parametrize(
    "content",
    ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": ["x"]}}', '{"weight_map": 1}',
     '{"weight_map": {"a": "\\u0000"}}'],
)  # fmt: skip
def test_an_index_of_wrong_types(folder: Path, content: str) -> None:
    (folder / "model.safetensors.index.json").write_text(content)
    assert refused() == (
        "The index model.safetensors.index.json of m cannot be read: it has no weight_map from tensors to files. "
        "Download the model again."
    )


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (LFS.encode(), f"cannot be read: {PULL}"),
        (safetensors(b"[" * 5000), "cannot be read: its header is damaged. Download the model again."),
        (safetensors(b'{"a": {"data_offsets": [0, "x"]}}'), "cannot be read: its header is damaged."),
        (safetensors(b'{"a": {"data_offsets": {}}}'), "cannot be read: its header is damaged."),
        (safetensors(b"{}", 1 << 60), "cannot be read: its header is damaged."),
        (safetensors(b"{}", 99_999_999), "is cut off: it has 10 bytes, and its tensors end at 100,000,007."),
    ],
)
def test_weights_that_are_none(folder: Path, content: bytes, told: str) -> None:
    (folder / "model.safetensors").write_bytes(content)
    assert refused().startswith(f"The weight file model.safetensors of m {told}")


def test_a_pipe_in_the_place_of_weights_is_not_waited_for(folder: Path) -> None:
    pipe(folder / "model.safetensors")
    told = "it is a pipe, not a file. Download the model again."
    assert refused() == f"The weight file model.safetensors of m cannot be read: {told}"


wrong = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.just(10**30),
    lambda inner: st.lists(inner, max_size=2)
    | st.dictionaries(st.sampled_from([*CONFIG, "quant_method"]), inner, max_size=2),
    max_leaves=4,
)  # fmt: skip


@settings(max_examples=50, derandomize=True, deadline=None, database=None)
@given(st.dictionaries(st.sampled_from([*CONFIG]), wrong, min_size=1, max_size=3))
def test_fuzz_a_configuration_is_read_or_refused(changes: dict[str, Any]) -> None:
    file, cell = Path("m/config.json"), Cell(model="m")
    file.write_text(json.dumps({**CONFIG, **changes}))
    try:
        facts = files.read_facts(cell, "folder", "m", "r", file, 1)
    except LlmbenchError:
        return
    estimate.predicted_bytes(cell, facts, Shape.from_config(facts.config or {}))
