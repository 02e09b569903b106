"""Structured pruning of tiny models: what goes, that the rest computes the same, and from the request to the result."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from mlflow_llmbench import run
from mlflow_llmbench.analysis.decisions.deployment import Evidence, deployment_of
from mlflow_llmbench.backends.huggingface import passages, pruning, recipe
from mlflow_llmbench.config.cells import config_hash, expand_cells, group_cells
from mlflow_llmbench.config.model_shape import Shape
from mlflow_llmbench.config.pruning import (
    FAMILIES,
    HEADS,
    LAYERS,
    MLP,
    Pruning,
    canonical,
    heads_left,
    pruned_config,
    refusal,
    unit_of,
    width_left,
)
from mlflow_llmbench.config.spec import parse
from mlflow_llmbench.measure.journal import read_result
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.errors import MeasurementError, UsageError
from mlflow_llmbench.records.results import ModelFacts, Verdict
from mlflow_llmbench.sweeps.planning import plan
from tests.architectures import tiny_config, write_tiny
from tests.loading import loaded

SHARE = {LAYERS: "layers-50%", MLP: "mlp-25%", HEADS: "heads-50%"}
CASES = [(kind, part) for kind, family in FAMILIES.items() for part in family.parts]
IDS = torch.tensor(passages.draw("test", 256, 4, 24))


def tiny(kind: str, folder: Path) -> Any:
    """A tiny model of a type with four layers, loaded, and its folder."""
    two = tiny_config(kind)
    settings = {name: value for name, value in two.to_dict().items() if name != "layer_types"}
    config = type(two).from_dict(settings | {FAMILIES[kind].layers_key: 4})
    torch.manual_seed(0)
    model = recipe.class_of(config).from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(folder)
    return model, folder


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


@pytest.mark.parametrize(("kind", "part"), CASES)
def test_what_is_left_computes_as_the_model_does_without_the_parts_that_went(
    kind: str, part: str, tmp_path: Path
) -> None:
    """The checkpoint that is written, loaded again, against the whole model with the same parts silenced."""
    model, _ = tiny(kind, tmp_path / "whole")
    whole = logits(model)
    family, shape = FAMILIES[kind], Shape.from_config(model.config.to_dict())
    assert shape
    silent = copy.deepcopy(model)
    stack, own = silent.get_submodule(family.stack), model.get_submodule(family.stack)
    with torch.inference_mode():
        if part == LAYERS:
            influence = pruning.block_influence(model, own, IDS)
            for number in sorted(range(4), key=lambda i: influence[i])[:2]:
                _skip(stack[number])
        else:
            name, units = (family.mlp_out, 0) if part == MLP else (family.heads_out, max(shape.kv_heads, 1))
            outs = [layer.get_submodule(name) for layer in own]
            of_heads = [] if part == MLP else pruning.head_norms(model, outs, units, IDS)
            norms = of_heads or pruning.channel_norms(model, outs, IDS)
            for layer, values in zip(stack, norms, strict=True):
                left = width_left(shape.intermediate_size, Pruning(MLP, 25)) if part == MLP else units // 2
                gone = values.argsort()[: len(values) - left]
                weight = layer.get_submodule(name).weight
                columns = weight if recipe.is_conv1d(layer.get_submodule(name)) else weight.T
                columns.unflatten(0, (len(values), -1))[gone] = 0
        pruning.prune(model, SHARE[part], IDS)
    model.save_pretrained(tmp_path / "pruned")
    again, _ = recipe.load_complete(str(tmp_path / "pruned"), dtype="auto")
    torch.testing.assert_close(logits(again.eval()), logits(silent), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(again), whole, atol=1e-5)
    left_over = sum(p.numel() for p in again.parameters())
    assert left_over < sum(p.numel() for p in silent.parameters())
    planned = Shape.from_config(pruned_config(silent.config.to_dict(), SHARE[part]))
    assert planned == Shape.from_config(again.config.to_dict())  # what the plan estimates with


def _skip(layer: Any) -> None:
    """Make a layer give back what it is given."""

    own = layer.forward

    def forward(hidden_states: Any, *given: Any, **named: Any) -> Any:
        computed = own(hidden_states, *given, **named)
        return (hidden_states, *computed[1:]) if isinstance(computed, tuple) else hidden_states

    layer.forward = forward


@pytest.mark.parametrize("part", [LAYERS, MLP, HEADS])
def test_parts_that_add_nothing_go_first(part: str, tmp_path: Path) -> None:
    """A quarter or half of the parts is zero: pruned of exactly these, the model computes the same."""
    model, source = tiny("qwen3", tmp_path / "idle")
    stack = model.get_submodule("model.layers")
    with torch.inference_mode():
        if part == LAYERS:
            for layer in (stack[1], stack[2]):
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
        for layer in stack:
            if part == MLP:
                layer.mlp.down_proj.weight[:, ::4].zero_()
            elif part == HEADS:
                layer.self_attn.o_proj.weight[:, :64].zero_()  # the first KV group: two heads of 32
    model.save_pretrained(source)
    with loaded(Cell(model=str(source), prune=SHARE[part])) as (backend, info):
        torch.testing.assert_close(logits(backend.model), logits(model), rtol=1e-4, atol=1e-5)
        removed = {LAYERS: "2 of 4 layers", MLP: "64 of 256 channels of each MLP"}
        assert info.facts["prune.removed"] == removed.get(part, "1 of 2 KV groups of each layer")
        assert info.facts.get("prune.layers") == ("1,2" if part == LAYERS else None)
        assert info.facts["prune.parameters_before"] == sum(p.numel() for p in model.parameters())
        assert info.facts["model.parameters"] < info.facts["prune.parameters_before"]
        assert info.made and json.loads(Path(info.made, "config.json").read_text())["model_type"] == "qwen3"


@pytest.mark.parametrize("part", [LAYERS, MLP, HEADS])
def test_a_model_that_overflows_is_not_pruned_at_random(part: str, tmp_path: Path) -> None:
    model, source = tiny("qwen3", tmp_path / "large")
    with torch.inference_mode():
        model.get_submodule("model.embed_tokens").weight.fill_(math.inf)
    model.save_pretrained(source)
    with (
        pytest.raises(MeasurementError, match=r"overflows on the calibration texts"),
        loaded(Cell(model=str(source), prune=SHARE[part])),
    ):
        pass


def test_block_influence_is_one_minus_the_cosine_similarity() -> None:
    """A layer that turns a vector by 60 degrees has an influence of a half, one that stretches it of nothing."""

    class Turn(torch.nn.Module):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            angle = torch.tensor(torch.pi / 3)
            turn = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
            return hidden_states @ turn.T

    class Stretch(torch.nn.Module):
        def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor]:
            return (3 * hidden_states,)

    class Stack(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList([Turn(), Stretch()])

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> None:
            self.layers[1](self.layers[0](hidden_states=torch.randn(*input_ids.shape, 2)))

    stack = Stack()
    assert pruning.block_influence(stack, stack.layers, IDS) == pytest.approx([0.5, 0], abs=1e-6)


def test_norms_are_those_of_the_contributions() -> None:
    """Two tokens, three channels, two outputs, by hand; and two heads of one channel each."""
    layer = torch.nn.Linear(3, 2, bias=False)
    layer.weight = torch.nn.Parameter(torch.tensor([[3.0, 0, 1], [4, 2, 0]]), requires_grad=False)
    values = torch.tensor([[1.0, 0, 2], [2, 1, 0]])

    class Model(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> None:
            layer(values[:, : layer.in_features])

    [norms] = pruning.channel_norms(Model(), [layer], torch.zeros(1, 2))
    assert norms.tolist() == pytest.approx([5 * 5**0.5, 2, 2])
    [each] = pruning.head_norms(Model(), [layer], 3, torch.zeros(1, 2))
    assert each.tolist() == pytest.approx(norms.tolist())  # heads of one channel are channels


def test_values_have_one_form() -> None:
    given = ("layers-25%", "MLP-12.50", "heads-50")
    assert [canonical(text) for text in given] == ["layers-25%", "mlp-12.5%", "heads-50%"]
    wrong = (("layers", "not a part and a share"), ("width-25%", "Give layers-25%"), ("mlp-95%", "from 1 to 90"))
    for text, said in wrong:
        with pytest.raises(UsageError, match=said):
            parse({"prune": text})
    assert Pruning(LAYERS, 25).kept(18) == 13  # 4.5 is rounded up
    assert [unit_of(width) for width in (11008, 2048, 256, 64, 2047)] == [128, 128, 16, 4, 1]
    assert width_left(11008, Pruning(MLP, 25)) % 128 == 0


def test_what_cannot_be_pruned_is_refused_with_what_can() -> None:
    gemma = {"model_type": "gemma3_text", "num_hidden_layers": 18, "hidden_size": 640, "intermediate_size": 2048}
    gemma |= {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144}
    assert refusal("gemma", gemma, "layers-25%") is None
    assert refusal("gemma", gemma, "heads-50%") is None
    shape = Shape.from_config(gemma)
    assert shape and heads_left(shape, Pruning(HEADS, 50)) == (2, 1)
    why = refusal("gemma", gemma, "heads-25%")
    assert why and "3 of the 4 heads" in why and why.endswith("Use prune=heads-50%,heads-75%.")
    assert "removes none of the 18 layers" in str(refusal("gemma", gemma, "layers-1%"))
    assert "Use prune=layers-3% or more" in str(refusal("gemma", gemma, "layers-1%"))
    opt = {"model_type": "opt", "num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 256}
    assert "the size of a head follows from other sizes. Use prune=layers-25%,mlp-25%" in str(
        refusal("opt", opt, "heads-25%")
    )
    assert "whose architecture is mamba" in str(refusal("m", {**opt, "model_type": "mamba"}, "layers-25%"))
    assert "is a GGUF file" in str(refusal("m", None, "layers-25%"))
    quantized = {**opt, "quantization_config": {"quant_method": "gptq"}}
    assert "is quantized already" in str(refusal("m", quantized, "mlp-25%"))


def test_a_refused_pruning_is_one_line_before_anything_is_written(tmp_path: Path, cache_folder: Path) -> None:
    source = write_tiny("phi3", tmp_path / "phi")
    with pytest.raises(UsageError, match="whose architecture is phi3"):
        plan(parse({"model": str(source), "prune": "layers-50%", "prompt_tokens": "8", "output_tokens": "8"}))
    with pytest.raises(UsageError, match="prune is a setting of transformers"):
        parse({"model": "m", "backend": "fake", "prune": "layers-50%"})
    assert not list(cache_folder.glob("pruned/phi*"))


def test_pruning_decides_the_configuration_and_the_load(tiny_model: Path) -> None:
    spec = parse({"model": str(tiny_model), "prune": "none,layers-50%", "batch_size": "1,2"})
    cells = expand_cells(spec)
    assert [len(group.cells) for group in group_cells(cells)] == [2, 2]
    facts = ModelFacts("m", "folder", "/m", "abc", {"model_type": "llama"})
    assert config_hash(Cell(model="m"), facts) == config_hash(Cell(model="m", prune=None), facts)
    assert len({config_hash(cell, facts) for cell in cells}) == 4
    planned = plan(spec).cells
    whole, pruned = planned[0], planned[2]
    assert (whole.predicted_bytes or 0) > (pruned.predicted_bytes or 0)
    assert pruned.model.pruned == "layers-50%" and pruned.model.config and pruned.model.config["num_hidden_layers"] == 1
    assert pruned.name.endswith("layers-50% b1")


def test_the_pruned_model_is_quantized(tiny_model: Path, cache_folder: Path) -> None:
    """Quantized after pruning, from the same checkpoint as the unquantized cell."""
    sizes = {}
    for quant in ("fp32", "int8"):
        with loaded(Cell(model=str(tiny_model), prune="mlp-50%", quant=quant)) as (_, info):
            facts, sizes[quant] = info.facts, info.weight_bytes or 0
            assert facts["prune.left"] == "2 layers, 128 channels of each MLP, 128 inputs from the heads"
            assert facts["prune.calibration"].startswith("qa+")
            assert facts["prune.parameters_before"] - facts["model.parameters"] == 2 * 3 * 128 * 128
    assert sizes["int8"] < sizes["fp32"]
    [folder] = cache_folder.glob("pruned/tiny-llama-mlp-50*")
    assert (folder / "tokenizer.json").exists() and not list(cache_folder.glob("pruned/.pruned-*"))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_prunings_with_and_without_quantization(store_uri: str, tiny_model: Path, cache_folder: Path) -> None:
    """Real workers: the model is pruned once for both quantizations, and quantized after that."""
    found = run(
        model=str(tiny_model), prune="none,mlp-50%", quant="fp32,int8", prompt_tokens=8, output_tokens=4, repetitions=5,
        warmup=1, quality="auto",
    )  # fmt: skip
    assert [row.outcome for row in found.rows] == ["ok"] * 4, found.table()
    results = {
        (result.cell.prune, result.cell.quant): result
        for result in map(read_result, sorted(found.folder.glob("*/artifacts")))
    }
    loads = {key: result.load for key, result in results.items() if result.load}
    sizes = {key: load.weight_bytes or 0 for key, load in loads.items()}
    assert sizes["mlp-50%", "fp32"] < sizes[None, "fp32"] and sizes["mlp-50%", "int8"] < sizes["mlp-50%", "fp32"]
    qualities = {key: result.quality for key, result in results.items()}
    assert all(quality and quality.divergence for quality in qualities.values()), qualities
    assert not any(quality.divergence.is_reference for quality in qualities.values() if quality and quality.divergence)
    kl = {key: quality.divergence.kl for key, quality in qualities.items() if quality and quality.divergence}
    assert max(max(prompt) for prompt in kl[None, "fp32"]) < 1e-5 < min(max(prompt) for prompt in kl["mlp-50%", "fp32"])
    [folder] = cache_folder.glob("pruned/tiny-llama-mlp-50*")
    evidence = Evidence("run", "sweep", Verdict("valid"))
    assert deployment_of(results["mlp-50%", "int8"], {}, evidence).config["location"] == str(folder)


@pytest.mark.slow
def test_random_weights_are_pruned_too(store_uri: str) -> None:
    found = run(
        model="pythia-70m", weights="random", prune="layers-50%", quant="bf16", prompt_tokens=8, output_tokens=4,
        repetitions=5, warmup=1,
    )  # fmt: skip
    assert [row.outcome for row in found.rows] == ["ok"]
    [result] = [read_result(path) for path in found.folder.glob("**/artifacts")]
    assert result.load and result.load.facts["prune.removed"] == "3 of 6 layers"
    assert result.load.facts["prune.calibration"] == "seeded ids"
