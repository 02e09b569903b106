"""The transformers backend on real, tiny models: loading, generation and refusals."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mlflow_llmbench.backends.checkpoints import random_weights
from mlflow_llmbench.backends.huggingface import inspection
from mlflow_llmbench.backends.huggingface.backend import TransformersBackend
from mlflow_llmbench.config import models
from mlflow_llmbench.measure.batch import natural_lengths
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.errors import MissingError, ModelError, NotRealised, UsageError
from tests.loading import loaded

PROMPTS = [[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]]


def finite(model: Any) -> bool:
    with torch.inference_mode():
        return bool(torch.isfinite(model(torch.tensor(PROMPTS)).logits).all())


def steps_of(backend: TransformersBackend, count: int) -> list[list[int]]:
    steps: list[list[int]] = []
    backend.generate(PROMPTS, count, lambda step: steps.append(step.tolist()))
    return steps


def test_tokens_are_those_of_plain_greedy_decoding(tiny_model: Path) -> None:
    """Compare with a loop of forward passes without generate(), streamer or cache."""
    from transformers import AutoModelForCausalLM

    with loaded(Cell(model=str(tiny_model), quant="fp32")) as (backend, _):
        steps = steps_of(backend, 6)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    ids = torch.tensor(PROMPTS)
    with torch.inference_mode():
        for _ in range(6):
            ids = torch.cat([ids, plain(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert [list(row) for row in zip(*steps, strict=True)] == ids[:, 5:].tolist()


def test_a_forward_pass_alone_is_one_call_that_chooses_from_the_last_ids(tiny_model: Path) -> None:
    """One pass over all rows, padded on the left, whose logits give the first token that generate() gives."""
    with loaded(Cell(model=str(tiny_model), quant="fp32")) as (backend, _):
        seen: list[tuple[torch.Size, torch.Tensor]] = []

        def look(module: Any, arguments: Any, given: dict[str, Any], output: Any) -> None:
            seen.append((given["input_ids"].shape, output.logits))

        backend.model.register_forward_hook(look, with_kwargs=True)
        backend.forward([PROMPTS[0], [*PROMPTS[1], 15]])
        [(shape, logits)] = seen
        assert shape == (2, 6) and logits.shape[:2] == (2, 1)
        del seen[:]
        backend.forward(PROMPTS)
        [(_, logits)] = seen
        assert logits[:, -1].argmax(-1).tolist() == steps_of(backend, 1)[0]


def test_a_natural_length_is_that_of_a_model_that_may_stop(tiny_model: Path, tmp_path: Path) -> None:
    """A copy ends at what is the fourth token of the first row: transformers itself stops there."""
    import json

    from transformers import AutoModelForCausalLM

    with loaded(Cell(model=str(tiny_model), quant="fp32")) as (backend, _):
        row = [step[0] for step in steps_of(backend, 8)]
        assert backend.ends == frozenset({backend.model.config.eos_token_id})  # by its configuration
    at = next(n for n in range(3, 8) if row[n] not in row[:n])
    copy = tmp_path / "stops"
    shutil.copytree(tiny_model, copy)
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [row[at], 63]}))
    with loaded(Cell(model=str(copy), quant="fp32")) as (backend, _):
        assert backend.ends == {row[at], 63}
        output = [step[0] for step in steps_of(backend, 8)]
        found = natural_lengths(backend, [(PROMPTS[0], output)])
    plain = AutoModelForCausalLM.from_pretrained(copy, dtype=torch.float32)
    stopped = plain.generate(torch.tensor(PROMPTS[:1]), max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert output == row and found == (stopped.shape[1] - len(PROMPTS[0]),)


def test_length_is_forced_past_the_end_of_sequence_token(tiny_model: Path, tmp_path: Path) -> None:
    """The checkpoint's generation config ends at the very token that greedy decoding gives first."""
    import json

    with loaded(Cell(model=str(tiny_model))) as (backend, _):
        first = steps_of(backend, 1)[0]
    copy = tmp_path / "eager-to-stop"
    shutil.copytree(tiny_model, copy)
    (copy / "generation_config.json").write_text(
        json.dumps({"eos_token_id": first, "do_sample": True, "temperature": 5.0, "max_length": 7})
    )
    with loaded(Cell(model=str(copy))) as (backend, _):
        steps = steps_of(backend, 12)
    assert len(steps) == 12
    assert steps[0] == first


def test_the_first_token_comes_after_exactly_one_forward_pass(tiny_model: Path) -> None:
    with loaded(Cell(model=str(tiny_model))) as (backend, _):
        events: list[str] = []
        backend.model.register_forward_hook(lambda *_: events.append("forward"))
        backend.generate(PROMPTS, 3, lambda _: events.append("token"))
    assert events == ["forward", "token"] * 3


def test_a_stop_check_that_hands_tokens_over_late_is_refused(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stop check delays each token by one step, like transformers' DeferredStopCheck on Apple devices."""
    from transformers.generation import utils

    class OneStepBehind(utils.StopCheck):
        held: Any = None

        def __call__(self, unfinished: Any, tokens: Any, length: int) -> bool:
            streamer, self.streamer = self.streamer, None
            stop = super().__call__(unfinished, tokens, length)
            self.streamer = streamer
            if self.held is not None:
                streamer.put(self.held)
            self.held = tokens.cpu()
            return stop

        def finish(self) -> int:
            self.streamer.put(self.held)
            return 0

    monkeypatch.setattr(utils, "StopCheck", OneStepBehind)
    with (
        loaded(Cell(model=str(tiny_model))) as (backend, _),
        pytest.raises(NotRealised, match="after 2 forward passes, not 1"),
    ):
        steps_of(backend, 4)


@pytest.mark.parametrize(
    ("quant", "dtype", "bits", "kernel", "method"),
    [
        ("none", "float32", 32.0, "Linear", "none"),
        ("fp32", "float32", 32.0, "Linear", "none"),
        ("fp16", "float16", 16.0, "Linear", "none"),
        ("bf16", "bfloat16", 16.0, "Linear", "none"),
        ("int8", "bfloat16", 8.2, "Linear8bitLt", "bitsandbytes"),
        ("int4", "bfloat16", 4.5, "Linear4bit", "bitsandbytes"),
        ("fp4", "bfloat16", 4.5, "Linear4bit", "bitsandbytes"),
    ],
)
def test_what_is_loaded_is_what_was_asked(
    tiny_model: Path, quant: str, dtype: str, bits: float, kernel: str, method: str
) -> None:
    with loaded(Cell(model=str(tiny_model), quant=quant)) as (backend, info):
        assert info.facts["model.dtype"] == dtype
        assert info.facts["quant.bits_per_weight"] == pytest.approx(bits, abs=0.1)
        assert str(info.facts["quant.kernel"]).startswith(kernel)
        assert info.facts["quant.method"] == method
        assert info.facts["model.parameters"] == 426_624
        assert info.kv_bytes_per_token == 2 * 2 * 2 * 32 * getattr(torch, dtype).itemsize
        assert finite(backend.model)
        assert len(steps_of(backend, 4)) == 4


def test_weight_bytes_are_counted_by_hand(tiny_model: Path) -> None:
    embedding, head, norms = 512 * 128, 512 * 128, 5 * 128
    linear = 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 256 * 128)
    rotary = 2 * 16 * 4  # inverse frequencies and their copy, kept in fp32
    with loaded(Cell(model=str(tiny_model), quant="bf16")) as (_, info):
        assert info.weight_bytes == 2 * (embedding + head + norms + linear) + rotary
        assert info.step_bytes == info.weight_bytes - 2 * embedding
    with loaded(Cell(model=str(tiny_model), quant="int4")) as (_, info):
        layers = 14
        assert (
            info.weight_bytes
            == 2 * (embedding + head + norms) + linear // 2 + linear // 64 * 4 + layers * 16 * 4 + rotary
        )
    with loaded(Cell(model=str(tiny_model), quant="int8")) as (_, info):
        rows = 2 * (2 * 128 + 2 * 64 + 2 * 256 + 128)
        assert info.weight_bytes == 2 * (embedding + head + norms) + linear + 4 * rows + rotary


def test_a_dtype_that_was_not_realised_is_found(tiny_model: Path) -> None:
    with loaded(Cell(model=str(tiny_model), quant="bf16")) as (backend, _):
        backend.model.model.layers[0].mlp.float()
        found = inspection.inspect_model(backend.model)
    with pytest.raises(NotRealised, match="quant=bf16 was asked for"):
        inspection.verify("bf16", "cpu", found)
    with pytest.raises(NotRealised, match="quant=int8 was asked for, but the linear layers are"):
        inspection.verify("int8", "cpu", found)
    with pytest.raises(NotRealised, match="The model is on cpu, not on cuda:0"):
        inspection.verify("bf16", "cuda:0", found)


def test_attention_is_as_asked(tiny_model: Path) -> None:
    with loaded(Cell(model=str(tiny_model), attention="eager")) as (_, info):
        assert info.facts["model.attention"] == "eager"


def test_parameters_that_stay_in_the_mapped_checkpoint_are_counted(tiny_model: Path) -> None:
    with loaded(Cell(model=str(tiny_model), quant="none")) as (_, info):
        assert 0.9 * info.weight_bytes <= info.mapped_weight_bytes <= info.weight_bytes
    with loaded(Cell(model=str(tiny_model), quant="bf16")) as (_, info):
        assert info.mapped_weight_bytes == 0


def test_text_goes_through_the_models_own_tokenizer(tiny_model: Path) -> None:
    with loaded(Cell(model=str(tiny_model))) as (backend, _):
        assert backend.decode(backend.encode("héllo")) == "héllo"


def test_random_checkpoint_is_seeded_written_once_and_loads_like_a_real_one(cache_folder: Path) -> None:
    preset = models.find_preset("pythia-70m")
    assert preset
    assert not random_weights.is_written(preset, seed=3)
    folder = random_weights.write_checkpoint(preset, seed=3)
    assert random_weights.is_written(preset, seed=3)
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    content = (folder / "model.safetensors").read_bytes()
    assert random_weights.write_checkpoint(preset, seed=3) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    shutil.rmtree(folder)
    assert (random_weights.write_checkpoint(preset, seed=3) / "model.safetensors").read_bytes() == content
    assert (random_weights.write_checkpoint(preset, seed=4) / "model.safetensors").read_bytes() != content
    with loaded(Cell(model="pythia-70m", weights="random", seed=3)) as (backend, info):
        assert info.facts["model.parameters"] == preset.parameters
        assert info.facts["model.revision"] == "random-seed3"
        assert finite(backend.model)
    assert not list(cache_folder.glob("checkpoints/.*"))


@pytest.mark.parametrize("name", ["gemma-3-270m", "opt-350m", "bloom-560m"])
def test_random_checkpoints_of_odd_architectures_load_without_missing_weights(
    cache_folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tied heads, projected embeddings, ALiBi: cut to two layers so that it is quick."""
    import dataclasses

    from transformers import AutoModelForCausalLM

    preset = models.find_preset(name)
    assert preset
    layers = "n_layer" if "n_layer" in preset.config else "num_hidden_layers"
    config: dict[str, Any] = {**preset.config, layers: 2, "vocab_size": 2000}
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:2]
    small = dataclasses.replace(preset, name=f"{name}-small", config=config, parameters=10_000_000)
    folder = random_weights.write_checkpoint(small, seed=0)
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert finite(model)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"model": "opt-1.3"}, ModelError, r"Unknown model: opt-1\.3\. Did you mean opt-1\.3b"),
        ({"model": "./nowhere"}, ModelError, r"There is no model folder \./nowhere"),
        ({"model": "nowhere.gguf"}, ModelError, r"There is no file nowhere\.gguf"),
        ({"model": "my/own", "weights": "random"}, ModelError, r"weights=random needs a preset, and my/own is not one"),
        ({"model": "opt-125m"}, ModelError, r"The Hub cannot be reached for facebook/opt-125m.*: weights=random"),
        ({"model": "some/model"}, ModelError, r"The Hub cannot be reached for some/model.*give a local folder"),
    ],
)
def test_models_that_cannot_be_had(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        TransformersBackend.resolve(Cell(**settings))
    assert "\n" not in str(caught.value)


def test_damaged_and_contradicting_files(tmp_path: Path, tiny_model: Path) -> None:
    import json

    (tmp_path / "broken.gguf").write_bytes(b"not a model")
    with pytest.raises(ModelError, match="is not a GGUF file"):
        TransformersBackend.resolve(Cell(model=str(tmp_path / "broken.gguf")))
    with pytest.raises(UsageError, match="quant=int8 cannot be made from broken.gguf"):
        TransformersBackend.resolve(Cell(model=str(tmp_path / "broken.gguf"), quant="int8"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="has no config.json"):
        TransformersBackend.resolve(Cell(model=str(tmp_path / "empty")))
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="has no weights"):
        TransformersBackend.resolve(Cell(model=str(tmp_path / "empty")))
    copy = tmp_path / "quantized"
    shutil.copytree(tiny_model, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(UsageError, match=r"which is quantized already \(gptq\)"):
        TransformersBackend.resolve(Cell(model=str(copy), quant="int4"))
    (copy / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "x.Y"}}))
    assert TransformersBackend.resolve(Cell(model=str(copy))).source == "folder"  # transformers has Llama itself
    (copy / "config.json").write_text(
        json.dumps(config | {"auto_map": {"AutoModel": "x.Y"}, "model_type": "brand-new"})
    )
    with pytest.raises(ModelError, match="trust_remote_code=true"):
        TransformersBackend.resolve(Cell(model=str(copy)))


def test_a_quantization_without_its_package_names_the_command(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else found(name, *rest)
    )
    with pytest.raises(
        MissingError,
        match=r"quant=int4 needs the package bitsandbytes, which is not installed. Run: pip install bitsandbytes",
    ):
        TransformersBackend.resolve(Cell(model=str(tiny_model), quant="int4"))
    assert TransformersBackend.resolve(Cell(model=str(tiny_model), quant="bf16")).source == "folder"


def test_a_device_that_is_not_there(tiny_model: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(MissingError, match="There is no CUDA device for device=cuda"):
        TransformersBackend.resolve(Cell(model=str(tiny_model), device="cuda"))


def test_two_checkpoints_of_one_architecture_are_two_models(tiny_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    copy = tmp_path / tiny_model.name
    shutil.copytree(tiny_model, copy)
    first, same = (TransformersBackend.resolve(Cell(model=str(folder))).revision for folder in (tiny_model, copy))
    assert first == same
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"] += 1
    tensors["model.layers.1.mlp.up_proj.weight"] *= 2
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert TransformersBackend.resolve(Cell(model=str(copy))).revision != first


def test_what_the_first_call_repacks_is_counted_as_it_is_then(tiny_model: Path) -> None:
    """On CPUs with AVX-512 BF16, bitsandbytes repacks 4-bit weights in its first product, with smaller block maxima."""
    with loaded(Cell(model=str(tiny_model), quant="int4")) as (backend, before):
        steps_of(backend, 2)
        after = backend.describe()
    assert after.load_s == before.load_s
    assert 4.0 <= float(after.facts["quant.bits_per_weight"]) <= float(before.facts["quant.bits_per_weight"]) <= 4.6
    assert (after.weight_bytes or 0) <= (before.weight_bytes or 0)


@pytest.mark.parametrize(("quant", "kernel"), [("int8", "Linear8bitLt"), ("int4", "Linear4bit")])
def test_a_checkpoint_that_is_quantized_already_runs_as_it_is(
    tiny_model: Path, tmp_path: Path, quant: str, kernel: str
) -> None:
    with loaded(Cell(model=str(tiny_model), quant=quant)) as (backend, _):
        backend.model.save_pretrained(tmp_path / "saved")
    with loaded(Cell(model=str(tmp_path / "saved"))) as (backend, info):
        assert info.facts["quant.method"] == "bitsandbytes"
        assert str(info.facts["quant.kernel"]).startswith(kernel)
        assert len(steps_of(backend, 4)) == 4
    with pytest.raises(UsageError, match=r"which is quantized already \(bitsandbytes\)"):
        TransformersBackend.resolve(Cell(model=str(tmp_path / "saved"), quant=quant))


def test_closing_drops_compiled_code_and_the_memory_of_its_graphs(tiny_model: Path) -> None:
    graphs = []

    def keep(graph: Any, _: object) -> Any:
        graphs.append(graph)
        return graph.forward

    def step(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    compiled = torch.compile(step, backend=keep)
    for cell, expected in ((Cell(str(tiny_model)), 1), (Cell(str(tiny_model), decode="compiled"), 2)):
        backend = TransformersBackend(cell, TransformersBackend.resolve(cell))
        compiled(torch.ones(2))
        backend.close()
        compiled(torch.ones(2))
        assert len(graphs) == expected
