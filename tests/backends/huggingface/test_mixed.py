"""Mixed quantization on a tiny model: measuring, choosing, loading and reporting."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from statistics import fmean

import pytest
import torch

from mlflow_llmbench import run
from mlflow_llmbench.analysis.scaling.cells import Measured
from mlflow_llmbench.analysis.scaling.memory_account import reductions
from mlflow_llmbench.backends.huggingface import mixed, passages
from mlflow_llmbench.backends.huggingface.backend import TransformersBackend
from mlflow_llmbench.backends.huggingface.inspection import verify_plan
from mlflow_llmbench.config.cells import config_hash, group_cells
from mlflow_llmbench.config.models import find_preset
from mlflow_llmbench.config.spec import parse
from mlflow_llmbench.measure.journal import read_result
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.codec import from_json, to_json
from mlflow_llmbench.records.errors import NotRealised, UsageError
from mlflow_llmbench.records.mixed_plan import Block, QuantPlan, Sensitivity
from mlflow_llmbench.records.results import LoadInfo, ModelFacts
from mlflow_llmbench.reports import artifacts
from mlflow_llmbench.reports.charts.mixed_plan import place, sensitivity_figure
from mlflow_llmbench.reports.charts.style import chart_style, save_figure
from mlflow_llmbench.reports.mixed_plan import plan_markdown
from mlflow_llmbench.system.estimate import predicted_bytes
from tests.architectures import write_tiny
from tests.reports.charts.test_result import texts
from tests.results import made

IDS = [list(range(100, 140))]


def made_up(budget: str = "8", **schemes: str) -> QuantPlan:
    """Four blocks of 1000 weights in two layers: the first attention is ten times as sensitive as the rest."""
    blocks = []
    for name, cost in (("m.0.attn", 1.0), ("m.0.mlp", 0.1), ("m.1.attn", 0.1), ("m.1.mlp", 0.1)):
        kl = {"int8": (0.01 * cost, 0.03 * cost), "int4": (0.5 * cost, 0.7 * cost)}
        blocks.append(Block(name, (f"{name}.a", f"{name}.b"), 1000, {"bf16": 2000, "int8": 1010, "int4": 560}, kl))
    uniform = {"int8": (0.02, 0.03), "int4": (0.7, 0.8)}
    found = Sensitivity(
        "m", "rev", "cpu", "bf16", 10_000_000, tuple(blocks), uniform, "qa, code", 16, {"torch": "1"}, 1.0
    )
    given = {block.name: "int8" for block in blocks} | {
        name.replace("_", "."): scheme for name, scheme in schemes.items()
    }
    return QuantPlan(found, budget, given, (0.01, 0.02))


def draw_plan(plan: QuantPlan, folder: Path) -> list[Path]:
    with chart_style():
        return save_figure(sensitivity_figure(plan), folder, "sensitivity")


def prepared(model: Path, **settings: str) -> tuple[TransformersBackend, LoadInfo]:
    cell = Cell(model=str(model), quant="mixed", **settings)  # type: ignore[arg-type]
    facts = TransformersBackend.resolve(cell)
    TransformersBackend.prepare(cell, facts)
    assert TransformersBackend.is_prepared(cell, facts)
    backend = TransformersBackend(cell, facts)
    return backend, backend.load()


def logits_of(backend: TransformersBackend) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = backend.model(torch.tensor(IDS)).logits
        return found


def test_the_choice_is_within_the_budget_and_spares_what_is_sensitive() -> None:
    found = made_up().sensitivity
    everything = mixed.choose(found, "16")
    assert set(everything.schemes.values()) == {"bf16"} and everything.predicted_kl == 0 and everything.bits == 16
    middle = mixed.choose(found, "8")
    assert middle.bits <= 8 and middle.counts == {"int8": 3, "int4": 1} and middle.schemes["m.0.attn"] == "int8"
    assert mixed.choose(found, "10.1").schemes["m.0.attn"] == "bf16"
    costs = [mixed.choose(found, str(bits)).predicted_kl for bits in (4.5, 5, 6, 7, 8, 8.1, 9, 12, 16)]
    assert costs == sorted(costs, reverse=True) and costs[0] > costs[-1] == 0
    least = mixed.choose(found, "4.48")
    assert set(least.schemes.values()) == {"int4"} and least.bits == 4.48 and least.nominal_bits == 4
    assert mixed.choose(found, "8.08").schemes == dict.fromkeys(
        middle.schemes, "int8"
    )  # a swap for bf16 would cost an int4 more


def test_a_budget_of_bytes_is_of_the_whole_model() -> None:
    found = dataclasses.replace(made_up().sensitivity, fixed_bytes=1_000_000)
    assert mixed.choose(found, "1004040B").weight_bytes == 1_004_040
    with pytest.raises(
        UsageError,
        match=r"quant_budget=1MB is too small for m: int4 throughout takes 4\.48 bits per weight, 1\.1MB with",
    ):
        mixed.choose(found, "1MB")
    with pytest.raises(UsageError, match=r"quant_budget=4 is too small"):
        mixed.choose(found, "4")


def test_blocks_are_attention_and_mlp_of_each_layer() -> None:
    names = {
        "model.layers.0.self_attn.q_proj": "model.layers.0.self_attn",
        "model.layers.0.self_attn.o_proj": "model.layers.0.self_attn",
        "model.layers.0.mlp.up_proj": "model.layers.0.mlp",
        "model.layers.10.fc1": "model.layers.10",
        "model.layers.10.fc2": "model.layers.10",
        "h.3.mlp.experts.1.w1": "h.3.mlp",
        "model.project_in": "model.project_in",
    }

    class Model(torch.nn.Module):
        head = torch.nn.Linear(2, 2)

        def get_output_embeddings(self) -> torch.nn.Module:
            return self.head

        def named_modules(self, *_: object, **__: object):  # type: ignore[no-untyped-def]
            yield from ((name, torch.nn.Linear(2, 2)) for name in names)
            yield "lm_head", self.head
            yield "model.norm", torch.nn.LayerNorm(2)

    found = mixed.blocks_of(Model())
    assert {name: block for block, inside in found.items() for name in inside} == names
    assert [place(name, 7) for name in ("model.layers.0.mlp", "model.layers.10", "model.project_in")] == [
        ("mlp", 0),
        ("layer", 10),
        ("model.project_in", 7),
    ]


@pytest.mark.parametrize(("quant", "budget"), [("bf16", "16"), ("int4", "4.75")])
def test_a_plan_of_one_scheme_is_that_quantization(tiny_model: Path, quant: str, budget: str) -> None:
    """The layers equal those of transformers bit for bit, so that only the mixture differs."""
    backend, info = prepared(tiny_model, quant_budget=budget)
    assert info.quant_plan and info.quant_plan.counts == {quant: 4}
    uniform = TransformersBackend(Cell(model=str(tiny_model), quant=quant), backend.facts)
    its = uniform.load()
    assert info.facts["quant.kernel"] == its.facts["quant.kernel"] and info.weight_bytes == its.weight_bytes
    assert torch.equal(logits_of(backend), logits_of(uniform))


def test_int8_layers_are_those_of_llm_int8(tiny_model: Path) -> None:
    uniform = TransformersBackend(
        Cell(model=str(tiny_model), quant="int8"), TransformersBackend.resolve(Cell(model=str(tiny_model)))
    )
    uniform.load()
    plain = TransformersBackend(Cell(model=str(tiny_model), quant="bf16"), uniform.facts)
    plain.load()
    modules = [name for inside in mixed.blocks_of(plain.model).values() for name in inside]
    mixed.realise(plain.model, dict.fromkeys(modules, "int8"), "cpu")
    assert torch.equal(logits_of(plain), logits_of(uniform))


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_layers_of_gpt2_are_blocks_and_equal_those_of_transformers(tmp_path: Path, quant: str) -> None:
    """GPT-2 holds its matrices the other way round."""
    folder = write_tiny("gpt2", tmp_path / "gpt2")
    uniform = TransformersBackend(
        Cell(model=str(folder), quant=quant), TransformersBackend.resolve(Cell(model=str(folder)))
    )
    uniform.load()
    plain = TransformersBackend(Cell(model=str(folder), quant="bf16"), uniform.facts)
    plain.load()
    blocks = mixed.blocks_of(plain.model)
    assert list(blocks) == [f"transformer.h.{layer}.{part}" for layer in (0, 1) for part in ("attn", "mlp")]
    mixed.realise(plain.model, dict.fromkeys([name for inside in blocks.values() for name in inside], quant), "cpu")
    assert torch.equal(logits_of(plain), logits_of(uniform))


def test_a_mixed_model_is_measured_made_and_verified(
    tiny_model: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LLMBENCH_CACHE", str(tmp_path))
    backend, info = prepared(tiny_model, quant_budget="8.5")
    plan = info.quant_plan
    assert plan and plan.sensitivity.revision == backend.facts.revision and plan.sensitivity.kept == "bf16"
    assert [block.name for block in plan.sensitivity.blocks] == [
        f"model.layers.{n}.{kind}" for n in (0, 1) for kind in ("self_attn", "mlp")
    ]
    for block in plan.sensitivity.blocks:
        assert 0 < block.cost("int8") < block.cost("int4") < 0.1
        assert (
            block.stored["bf16"] == 2 * block.weights
            and block.stored["int8"] < block.stored["bf16"]
            and len(block.kl["int8"]) == mixed.PASSAGES
        )
    assert plan.bits <= 8.5 and 0 < fmean(plan.measured_kl) < plan.sensitivity.additive_kl("int4")
    assert float(info.facts["quant.bits_per_weight"]) == pytest.approx(
        plan.bits, abs=0.3
    )  # 4-bit weights are packed anew in the first call
    assert info.facts["quant.method"] == "mixed" and "Linear8bitLt" in str(info.facts["quant.kernel"])
    assert from_json(QuantPlan, json.loads(json.dumps(to_json(plan)))) == plan
    logits_of(backend)
    described = backend.describe()
    assert float(described.facts["quant.bits_per_weight"]) == pytest.approx(plan.bits, abs=1e-3)
    assert described.weight_bytes == plan.weight_bytes
    [sensitivity] = tmp_path.glob("mixed/*/sensitivity.json")
    written = sensitivity.stat().st_mtime_ns
    prepared(tiny_model, quant_budget="6")
    assert sensitivity.stat().st_mtime_ns == written and len(list(tmp_path.glob("mixed/*/plan-*.json"))) == 2
    sensitivity.with_name("blocks.json").write_text(json.dumps(to_json(plan.sensitivity.blocks[:2])))
    sensitivity.unlink()  # as after an interruption in the third block
    measured, measure = [], mixed._measured_block
    monkeypatch.setattr(mixed, "_measured_block", lambda name, *rest: (measured.append(name), measure(name, *rest))[1])
    _, resumed = prepared(tiny_model, quant_budget="9")
    assert resumed.quant_plan and resumed.quant_plan.sensitivity.blocks == plan.sensitivity.blocks
    assert (
        measured == ["model.layers.1.self_attn", "model.layers.1.mlp"]
        and not sensitivity.with_name("blocks.json").exists()
    )
    again, _ = prepared(tiny_model, quant_plan=str(next(tmp_path.glob("mixed/*/plan-8.5.json"))))
    assert torch.equal(logits_of(again), logits_of(backend))


def test_the_model_is_as_before_after_a_block_was_tried(tiny_model: Path) -> None:
    backend = TransformersBackend(
        Cell(model=str(tiny_model), quant="bf16"), TransformersBackend.resolve(Cell(model=str(tiny_model)))
    )
    backend.load()
    before = logits_of(backend)
    with mixed._as(backend.model, {"model.layers.1.mlp.up_proj": "int4"}, "cpu"):
        assert not torch.equal(logits_of(backend), before)
    assert torch.equal(logits_of(backend), before)

    def interrupted() -> None:
        with mixed._as(backend.model, {"model.layers.1.mlp.up_proj": "int8"}, "cpu"):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    assert torch.equal(logits_of(backend), before)


def test_what_was_not_realised_is_found(tiny_model: Path) -> None:
    backend = TransformersBackend(
        Cell(model=str(tiny_model), quant="bf16"), TransformersBackend.resolve(Cell(model=str(tiny_model)))
    )
    backend.load()
    names = [name for inside in mixed.blocks_of(backend.model).values() for name in inside]
    verify_plan(dict.fromkeys(names, "bf16"), backend.model)
    with pytest.raises(
        NotRealised,
        match=r"The plan has model\.layers\.0\.self_attn\.q_proj in no scheme, but the model has Linear there",
    ):
        verify_plan(dict.fromkeys(names[1:], "bf16"), backend.model)
    with pytest.raises(
        NotRealised, match=r"The plan has model\.layers\.0\.self_attn\.q_proj in int8, but the model has Linear there"
    ):
        verify_plan(dict.fromkeys(names, "int8"), backend.model)
    with pytest.raises(NotRealised, match=r"in fp16, but its weights are bfloat16"):
        verify_plan(dict.fromkeys(names, "fp16"), backend.model)
    mixed.realise(backend.model, {names[0]: "int4"}, "cpu")
    with pytest.raises(NotRealised, match=r"in no scheme, but the model has Linear4bit there"):
        verify_plan(dict.fromkeys(names[1:], "bf16"), backend.model)
    with pytest.raises(
        NotRealised, match=r"The plan names the layer model\.layers\.7\.q, which this model does not have"
    ):
        mixed.realise(backend.model, {"model.layers.7.q": "int4"}, "cpu")


def test_a_plan_of_another_model_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    file = tmp_path / "quant_plan.json"
    file.write_text(json.dumps(to_json(made_up())))
    cell = Cell(model=str(tiny_model), quant="mixed", quant_plan=str(file))
    with pytest.raises(
        UsageError, match=r"was made for m rev, but the model is tiny-llama .*\. Make a plan for it with quant_budget\."
    ):
        TransformersBackend.resolve(cell)
    same_seed = dataclasses.replace(
        made_up(), sensitivity=dataclasses.replace(made_up().sensitivity, model="opt-125m", revision="random-seed0")
    )
    file.write_text(json.dumps(to_json(same_seed)))
    assert (
        TransformersBackend.resolve(
            Cell(model="opt-125m", weights="random", quant="mixed", quant_plan=str(file))
        ).quant_plan
        == same_seed
    )
    with pytest.raises(UsageError, match=r"was made for opt-125m random-seed0, but the model is opt-350m random-seed0"):
        TransformersBackend.resolve(Cell(model="opt-350m", weights="random", quant="mixed", quant_plan=str(file)))
    file.write_text(json.dumps(to_json(made_up(m_0_attn="int3"))))
    with pytest.raises(UsageError, match="is not a complete plan"):
        TransformersBackend.resolve(cell)
    file.write_text("[1]")
    with pytest.raises(UsageError, match="is not a plan"):
        TransformersBackend.resolve(cell)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"quant": "mixed"}, r"quant=mixed needs a budget\. Give quant_budget=5\.5"),
        ({"quant": "int8", "quant_budget": "5"}, r"quant_budget is a setting of quant=mixed\. Add quant=mixed"),
        ({"quant": "mixed", "quant_budget": "5,6"}, r"quant_budget is not a size: 5,6"),
        ({"quant": "mixed", "quant_budget": "99"}, r"quant_budget is not from 1 to 32 bits per weight: 99"),
        ({"quant": "mixed", "quant_budget": "few"}, r"quant_budget is not a size: few"),
        ({"quant": "mixed", "quant_plan": "nowhere.json"}, r"There is no plan file nowhere\.json"),
    ],
)
def test_a_budget_that_makes_no_sense(given: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(given)


def test_a_plan_decides_the_result_and_a_budget_no_other_quantization(tmp_path: Path) -> None:
    model = ModelFacts("m", "folder", "/m", "rev")
    assert config_hash(Cell(quant="int8", quant_budget="5"), model) == config_hash(Cell(quant="int8"), model)
    assert config_hash(Cell(quant="mixed", quant_budget="5"), model) != config_hash(
        Cell(quant="mixed", quant_budget="6"), model
    )
    cell = Cell(quant="mixed", quant_plan="a.json")
    first, second = (dataclasses.replace(model, quant_plan=plan) for plan in (made_up(), made_up(m_0_attn="bf16")))
    assert config_hash(cell, first) != config_hash(cell, second)
    assert config_hash(cell, first) == config_hash(dataclasses.replace(cell, quant_plan="b.json"), first)
    assert (
        len(group_cells([Cell(quant="mixed", quant_budget="5", workload=workload) for workload in ("qa", "code")])) == 2
    )
    (tmp_path / "p.json").write_text("{}")
    with pytest.raises(UsageError, match="Give one of them"):
        parse({"quant": "mixed", "quant_plan": str(tmp_path / "p.json"), "quant_budget": "5"})


def test_the_text_that_is_measured_is_not_calibrated_with() -> None:
    assert "qa" not in mixed._sets(Cell(workload="qa")) and "code" in mixed._sets(Cell(workload="qa"))
    assert mixed._sets(Cell(workload="synthetic")) == list(passages.BUNDLED)
    assert mixed._sets(Cell(weights="random")) == []


def test_texts_from_a_file_that_are_measured_are_left_out(tmp_path: Path) -> None:
    from mlflow_llmbench.workloads.prompts import load_prompts

    taken = load_prompts("code").texts[3]
    (tmp_path / "own.jsonl").write_text(json.dumps({"prompt": taken}))
    cell = Cell(workload=str(tmp_path / "own.jsonl"))
    assert (
        taken not in mixed._texts("code", cell)
        and len(mixed._texts("code", cell)) == len(load_prompts("code").texts) - 1
    )


def test_memory_saved_in_theory_is_that_of_the_plan() -> None:
    plan = made_up(m_0_attn="bf16", m_0_mlp="int4")
    results = [made("bf16"), made("mixed", load=LoadInfo(1.0, weight_bytes=10**9, quant_plan=plan))]
    [found] = reductions([Measured(result, {}) for result in results])
    assert found.theory == 1 - (16 + 4 + 8 + 8) / 4 / 16


def test_the_memory_that_is_predicted_is_that_of_the_unquantized_model() -> None:
    shape = find_preset("opt-125m").shape  # type: ignore[union-attr]
    model = ModelFacts("opt-125m", "preset", "facebook/opt-125m", "main", dtype="float16")
    mixed_one, plain = (predicted_bytes(Cell(quant=quant), model, shape) for quant in ("mixed", "none"))
    assert mixed_one == plain and plain


def test_what_the_plan_says(tmp_path: Path) -> None:
    plan = made_up(m_0_attn="bf16", m_0_mlp="int4")
    told = plan_markdown(plan)
    assert "Of 4 blocks, 1 in bf16, 2 in int8, 1 in int4" in told
    assert "| this plan | 9.16 | 10.0 | 0.064 | 0.015 (0–0.079) |" in told
    assert "| int8 throughout | 8.08 | 10.0 | 0.026 | 0.025 (0–0.089) |" in told
    files = draw_plan(plan, tmp_path)
    assert [file.name for file in files] == ["sensitivity.svg", "sensitivity.png"]
    words = texts(files[0])
    assert (
        "attn" in words
        and "mlp" in words
        and "kept in bf16" in words
        and "sum of costs 0.064 nats, measured 0.015" in words
    )
    assert draw_plan(plan, tmp_path / "again")[0].read_bytes() == files[0].read_bytes()


@pytest.mark.charts
def test_the_files_of_a_run_have_the_plan(tmp_path: Path) -> None:
    plan = made_up()
    result = made("mixed", load=LoadInfo(1.0, weight_bytes=10**9, quant_plan=plan))
    artifacts.write_cell(result, tmp_path)
    assert from_json(QuantPlan, json.loads((tmp_path / "quant_plan.json").read_text())) == plan
    assert (tmp_path / "quant_plan.md").read_text() == plan_markdown(plan)
    assert "sensitivity.svg" in [file.name for file in artifacts.draw_cell(result, tmp_path / "charts")]
    assert read_result(tmp_path) == result


@pytest.mark.filterwarnings("ignore:.*Any type hint is inferred:UserWarning")  # raised when mlflow.pyfunc is imported
def test_a_registered_version_has_the_plan_and_answers_with_it(tiny_model: Path) -> None:
    """The served model is made by other code, so it must equal the measured one bit for bit."""
    from mlflow_llmbench.analysis.decisions.deployment import Evidence, deployment_of
    from mlflow_llmbench.records.results import Verdict
    from mlflow_llmbench.tracking.serving_model import Checkpoint

    backend, info = prepared(tiny_model, quant_budget="8.5")
    result = made(cell=dataclasses.replace(backend.cell, device="cpu"), model=backend.facts, load=info)
    config = deployment_of(result, {}, Evidence("r", "s", Verdict("valid"))).config
    assert config["quantization"]["class"] == "mixed" and len(json.dumps(config)) < 8000
    served = Checkpoint(json.loads(json.dumps(config)))
    with torch.inference_mode():
        assert torch.equal(served.model(torch.tensor(IDS)).logits, logits_of(backend))


def test_a_mixed_version_is_exported_to_no_other_server() -> None:
    from mlflow_llmbench.analysis.decisions.export import TARGETS, export

    config = {"backend": "transformers", "quant": "mixed"}
    for target in TARGETS:
        with pytest.raises(
            UsageError,
            match=r"is quantized block by block, which .* cannot be told\. "
            r"Serve it with: mlflow models serve -m models:/bot/1",
        ):
            export(config, uri="models:/bot/1", target=target)


@pytest.mark.charts
@pytest.mark.slow
def test_a_mixed_quantization_from_budget_to_plan_file(store_uri: str, tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    fast = {"prompt_tokens": 8, "output_tokens": 4, "repetitions": 5, "warmup": 1}
    first = run(model=str(tmp_path / "model"), quant="mixed", quant_budget="7", quality="auto", **fast)
    assert [row.outcome for row in first.rows] == ["ok"], first.table()
    [folder] = first.folder.glob("*/artifacts")
    result = read_result(folder)
    assert (
        result.load
        and result.load.quant_plan
        and result.load.quant_plan.bits <= 7
        and result.quality
        and result.quality.divergence
    )
    assert float(result.load.facts["quant.bits_per_weight"]) <= 7
    assert (folder / "charts" / "sensitivity.svg").exists()
    second = run(model=str(tmp_path / "model"), quant="mixed", quant_plan=str(folder / "quant_plan.json"), **fast)
    assert [row.outcome for row in second.rows] == ["ok"], second.table()
    again = read_result(next(second.folder.glob("*/artifacts")))
    assert again.load and again.load.quant_plan == result.load.quant_plan
