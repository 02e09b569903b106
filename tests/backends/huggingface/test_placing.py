"""A model laid out over memory and disk: the same tokens, what landed where, and what cannot be laid out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlflow_llmbench.backends.huggingface import placing
from mlflow_llmbench.backends.huggingface.backend import TransformersBackend
from mlflow_llmbench.backends.huggingface.inspection import inspect_model, touch, verify
from mlflow_llmbench.config.model_shape import PROCESS_BYTES, Shape
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.errors import NotRealised
from mlflow_llmbench.records.results import ModelFacts, PlacedPart
from mlflow_llmbench.system import placement
from mlflow_llmbench.system.placement import MOVING_BYTES, SPARE, Working

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LAYERS = 6
SIZES = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "eos_token_id": 1,
    "bos_token_id": 0, "pad_token_id": 2,
}  # fmt: skip
PROMPTS = [list(range(3, 19)), list(range(40, 56))]


def tiny(folder: Path, *, tied: bool = False, pickled: bool = False) -> Path:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=tied))
    model.save_pretrained(folder)
    if pickled:
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    return folder


def limit_for(weights: float, needs: Working | None) -> int:
    """The memory limit that leaves room for so many bytes of weights."""
    assert needs
    return int((PROCESS_BYTES + MOVING_BYTES + needs.cache + needs.each + weights) / (1 - SPARE)) + 1


def generated(cell: Cell, weights: float | None, scratch: Path) -> tuple[Any, list[list[int]], TransformersBackend]:
    """Load a model, with room for so many bytes of weights if it is laid out, and generate eight tokens."""
    facts = TransformersBackend.resolve(cell)
    backend = TransformersBackend(cell, facts)
    if weights is not None:
        needs = placement.working([cell], facts)
        backend.make_room(limit_for(weights, needs), needs, scratch)
    info, tokens = backend.load(), []
    backend.generate(PROMPTS, 8, lambda step: tokens.append([*map(int, step)]))
    return info, tokens, backend


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("quant", ["fp32", "bf16"])
def test_layers_on_the_disk_give_the_same_tokens(tmp_path: Path, quant: str, tied: bool) -> None:
    folder = tiny(tmp_path / "tiny", tied=tied)
    cell = Cell(str(folder), quant=quant, device="cpu", batch_size=2, prompt_tokens=16, output_tokens=8)
    whole, expected, one = generated(cell, None, tmp_path)
    auto = dataclasses.replace(cell, placement="auto")
    for share in (100, 0.6, 0):
        info, tokens, backend = generated(auto, share * whole.weight_bytes, tmp_path / "offloaded")
        assert tokens == expected
        assert torch.equal(backend.logits(PROMPTS[0], 4), one.logits(PROMPTS[0], 4))
        parts = {part.place: part for part in info.placement}
        assert sum(part.weight_bytes for part in info.placement) == info.weight_bytes == whole.weight_bytes
        assert {*parts} == ({"cpu"} if share == 100 else {"disk"} if share == 0 else {"cpu", "disk"})
        assert info.facts["model.device"] == "cpu" and info.step_bytes == whole.step_bytes
        if share == 0.6:
            assert parts["cpu"].weight_bytes <= share * whole.weight_bytes
            assert set(parts["disk"].modules) >= {f"model.layers.{n}" for n in range(2, LAYERS)}
            assert (
                info.facts["placement.disk"].startswith("0.00") and "model.layers.2–5" in info.facts["placement.disk"]
            )
            assert info.mapped_weight_bytes <= parts["cpu"].weight_bytes  # what is on the disk needs no memory
        backend.close()
        assert not [*(tmp_path / "offloaded").glob("*")]  # read from the checkpoint itself


def test_pickled_weights_are_written_to_the_folder_that_was_given(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "tiny", pickled=True)
    cell = Cell(str(folder), quant="fp32", device="cpu", batch_size=2, prompt_tokens=16, output_tokens=8,
                allow_pickle=True)  # fmt: skip
    whole, expected, _ = generated(cell, None, tmp_path)
    auto = dataclasses.replace(cell, placement="auto")
    info, tokens, _ = generated(auto, whole.weight_bytes / 2, tmp_path / "offloaded")
    assert tokens == expected
    written = sum(file.stat().st_size for file in (tmp_path / "offloaded").glob("*.safetensors"))
    assert written >= 0.9 * next(part.weight_bytes for part in info.placement if part.place == "disk") > 0


@pytest.mark.parametrize("history", [False, True])
def test_a_kept_history_and_a_quantized_cache_work(tmp_path: Path, history: bool) -> None:
    cell = Cell(str(tiny(tmp_path / "tiny")), quant="fp32", device="cpu", placement="auto", prompt_tokens=16,
                output_tokens=8, kv_cache=None if history else "fp8")  # fmt: skip
    _, _, backend = generated(cell, 1_500_000, tmp_path / "offloaded")
    kept = backend.new_history() if history else None
    tokens: list[list[int]] = []
    backend.generate([PROMPTS[0]], 4, lambda step: tokens.append([*map(int, step)]), kept)
    assert len(tokens) == 4 and (kept is None or kept.tokens == len(PROMPTS[0]) + 3)


def test_the_prediction_is_what_accelerate_does(tmp_path: Path) -> None:
    """Several GPUs are asked of accelerate on the meta device: no layer is computed there."""
    from transformers.integrations.accelerate import _get_device_map

    for tied in (False, True):
        config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=tied)
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(config)
        shape = Shape.from_config(config.to_dict())
        assert shape
        pieces = placement._pieces(shape, 4)
        total = sum(pieces)
        for most in (
            {"cpu": 2 * total}, {"cpu": total // 2}, {"cpu": 0},
            {"cuda:0": 2 * total, "cpu": 2 * total}, {"cuda:0": total // 2, "cpu": 2 * total},
            {"cuda:0": total // 2, "cpu": total // 3}, {"cuda:0": 2 * total, "cuda:1": 2 * total, "cpu": 0},
            {"cuda:0": total // 3, "cuda:1": total // 3, "cpu": total},
        ):  # fmt: skip
            given = {int(place[5:]) if place != "cpu" else place: size for place, size in most.items()}
            found = _get_device_map(model, "auto", given, None)
            model.hf_device_map = found
            parts = {part.place: part.weight_bytes for part in placing.parts(model)}
            lying = list(zip(placement.fill(pieces, most), pieces, strict=True))
            expected = {place: sum(size for where, size in lying if where == place) for place in (*most, "disk")}
            for place in {*parts, *expected}:
                assert parts.get(place, 0) == pytest.approx(expected.get(place, 0), abs=0.01 * total), (tied, most)


def test_a_model_partly_on_a_gpu_is_inspected_by_its_copies_in_host_memory(tmp_path: Path) -> None:
    """The meta device stands for a GPU: layers in host memory are meta tensors beside it, with their data in hooks."""
    from accelerate import dispatch_model

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny(tmp_path / "tiny"), dtype=torch.bfloat16)
    before = inspect_model(model)
    where = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1, "model.rotary_emb": 1,
             **{f"model.layers.{n}": "cpu" for n in range(2, LAYERS)}, "model.norm": "cpu",
             "lm_head": "cpu"}  # fmt: skip
    on_meta = {name: "meta" if place in (0, 1) else place for name, place in where.items()}
    dispatch_model(model, on_meta, main_device="meta")
    model.hf_device_map = where
    touch(model)
    found = inspect_model(model)
    verify("bf16", "cuda:0", found)
    assert found.device == "cuda:0" and found.weight_bytes == before.weight_bytes
    assert (found.linear_bits, found.layers, found.dtypes) == (before.linear_bits, before.layers, before.dtypes)
    copy = placing.host_copy(model.model.layers[2].mlp.up_proj, "weight")
    assert copy is not None and not copy.is_meta
    assert placing.host_copy(model.model.layers[0].mlp.up_proj, "weight") is None
    parts = placing.parts(model)
    assert [part.place for part in parts] == ["cuda:0", "cuda:1", "cpu"]
    assert placing.facts(parts)["placement.cuda_1"].endswith("GB: model.layers.1, model.rotary_emb")
    with pytest.raises(NotRealised, match=r"^placement=auto left model\.embed_tokens\.weight without data on cuda:0"):
        placing.verify(Cell(placement="auto"), "cuda:0", model)
    model.hf_device_map = dict.fromkeys(where, "cpu") | {"lm_head": "disk"}
    with pytest.raises(NotRealised, match=r"^placement=auto found no room for a layer on cuda:0"):
        placing.verify(Cell(placement="auto"), "cuda:0", model)


def refused(config: dict[str, Any] | None = None, source: str = "folder", **given: Any) -> str | None:
    cell = Cell(model="m", device="cpu", placement="auto", **given)
    return TransformersBackend.refusal(cell, ModelFacts("m", source, "/m", "r", config or {"model_type": "llama"}))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"tensor_parallel": 2}, "placement=auto lays whole layers out over devices, and tensor_parallel=2 divides "
                                 "each. Use one of them."),
        ({"quant": "int8"}, "placement=auto cannot lay quant=int8 out: packed weights are not read layer by layer from "
                            "host memory or the disk. Use an unquantized checkpoint with quant=none,fp32,fp16,bf16, "
                            "or placement=single."),
        ({"decode": "compiled"}, "placement=auto works with decode=generate only, and decode=compiled is asked for: "
                                 "layers are moved while they are computed. Use one of them."),
        ({"batching": "continuous"}, "placement=auto cannot batch continuously, which takes the model's memory for "
                                     "its cache. Use batching=static,dynamic, or placement=single."),
    ],
)  # fmt: skip
def test_what_cannot_be_laid_out(given: dict[str, Any], sentence: str) -> None:
    assert refused(**given) == sentence


def test_packed_checkpoints_are_not_laid_out_and_others_are() -> None:
    packed = {"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}
    assert (refused(packed) or "").startswith("placement=auto cannot lay gptq out: ")
    assert (refused(source="gguf") or "").startswith("placement=auto cannot lay a GGUF file out: ")
    assert refused() is None and refused(quant="bf16", kv_cache="fp8", batching="dynamic") is None


def test_all_visible_gpus_take_layers_or_the_named_one(nvml: Callable[[str], None]) -> None:
    nvml("driver 570\ngpu GPU-1 A\nmemory 80000000000 60000000000 20000000000\ngpu GPU-2 A\n"
         "memory 80000000000 70000000000 10000000000\n")  # fmt: skip
    auto = Cell(device="cuda", placement="auto")
    assert placing.devices_of(auto, "cuda") == ("cuda:0", "cuda:1")
    assert placing.devices_of(dataclasses.replace(auto, device="cuda:1"), "cuda:1") == ("cuda:1",)
    assert placing.devices_of(Cell(device="cuda"), "cuda") == ("cuda",)
    most = placing.keywords(auto, 10**9, Working(10**9, 10**8), Path("f"))["max_memory"]
    assert [*most] == [0, 1, "cpu"] and most["cpu"] == int(1e9 * (1 - SPARE)) - PROCESS_BYTES - MOVING_BYTES


def test_parts_are_named_in_short(tmp_path: Path) -> None:
    parts = (PlacedPart("cpu", 1, ("",)), PlacedPart("disk", 2, ("a", "b.1", "b.2", "b.4", "c")))
    told = {"placement.cpu": "0.000000 GB: the whole model", "placement.disk": "0.000000 GB: a, b.1–2, b.4, c"}
    assert placing.facts(parts) == told and json.dumps(told)
