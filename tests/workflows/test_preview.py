"""Presets and `llmbench plan`: the right cells, memory, minimum time and refusals, and nothing started."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mlflow_llmbench import run
from mlflow_llmbench.analysis.layout import weights_text
from mlflow_llmbench.backends.huggingface import quantization
from mlflow_llmbench.cli.main import main
from mlflow_llmbench.config import models, spec
from mlflow_llmbench.config.cells import expand_cells
from mlflow_llmbench.config.choices import GRIDS
from mlflow_llmbench.config.model_shape import PROCESS_BYTES, Shape
from mlflow_llmbench.config.spec import parse
from mlflow_llmbench.records.cell import Cell, default_text
from mlflow_llmbench.records.errors import MissingError, UsageError
from mlflow_llmbench.records.results import ModelFacts
from mlflow_llmbench.sweeps.executor import MachineFacts
from mlflow_llmbench.sweeps.planning import plan
from mlflow_llmbench.system import estimate, machine
from mlflow_llmbench.system.estimate import Refusal
from mlflow_llmbench.workflows import preview

PAPER = (
    "opt-125m,opt-350m,opt-1.3b,opt-2.7b,opt-6.7b,"
    "pythia-70m,pythia-160m,pythia-410m,pythia-1b,pythia-2.8b,pythia-6.9b,pythia-12b,"
    "bloom-560m,bloom-1b1,bloom-3b,bloom-7b1,llama-2-7b,llama-2-13b,mistral-7b"
)


def test_the_papers_grid_for_its_models() -> None:
    cells = expand_cells(parse({"preset": "effillm", "model": PAPER, "weights": "random"}))
    precisions = ["fp32", "fp16", "int8", "int4", "gptq"]
    assert len(cells) == 19 * 7 * 7 * len(precisions)
    assert {(cell.output_tokens, cell.repetitions, cell.warmup) for cell in cells} == {(256, 10, None)}
    assert {cell.quant for cell in cells} == set(precisions)


def test_every_cell_of_the_papers_grid_is_tried_or_refused_with_its_reason() -> None:
    here = machine.environment()
    small_machine = MachineFacts(here, (here["hashes"]["env"],), {"auto": (8 * 10**9, "are free here")})
    found = plan(parse({"preset": "effillm", "model": PAPER, "weights": "random"}), small_machine)
    assert len(found.cells) == 19 * 7 * 7 * 5
    context = {
        m: 4096 if m.startswith("llama") else 32768 if m.startswith("mistral") else 2048 for m in PAPER.split(",")
    }
    lacking = ""
    try:
        quantization.require(Cell(quant="gptq"))
    except MissingError as error:
        lacking = str(error)
    for planned in found.cells:
        cell, refusal = planned.cell, planned.refusal
        if lacking and cell.quant == "gptq":
            assert refusal == Refusal("package", lacking)
        elif (cell.prompt_tokens or 0) + cell.output_tokens > context[cell.model]:
            assert refusal and refusal.kind == "context"
            assert f"is more than the context of {cell.model}, {context[cell.model]} tokens" in refusal.sentence
        elif (planned.predicted_bytes or 0) > 8 * 10**9:
            assert refusal and refusal.kind == "memory"
            wanted = f"{cell.model} with quant={cell.quant}, batch_size={cell.batch_size} needs about"
            assert wanted in refusal.sentence
        else:
            assert refusal is None and planned.predicted_bytes
    small = [planned for planned in found.tried if planned.cell.model == "opt-125m"]
    assert {planned.cell.prompt_tokens for planned in small} == {
        128,
        256,
        512,
        1024,
    }  # 2048 and 256 to come are more than its context
    largest = {planned.cell.quant for planned in found.tried if planned.cell.model == "llama-2-13b"}
    assert (largest or lacking) and not largest & {"fp32", "fp16", "int8"}


def test_a_quantization_without_its_package_is_refused_and_the_rest_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("CXX", "no-such-compiler")
    found = preview.preview(model="opt-125m", weights="random", quant="fp32,gptq")
    refused = {planned.cell.quant: planned.refusal for planned in found.cells}
    assert refused["fp32"] is None
    assert refused["gptq"] and refused["gptq"].sentence.startswith("quant=gptq needs ")
    assert "1 cell would be refused (package): quant=gptq needs " in preview.format_preview(found)
    with pytest.raises(MissingError, match="quant=gptq needs "):
        run(model="opt-125m", weights="random", quant="fp32,gptq")


def test_quick_is_a_twentieth_of_it_and_enough_for_every_law() -> None:
    cells = expand_cells(parse({"preset": "quick"}))
    assert len(cells) == 12
    assert len({cell.batch_size for cell in cells}) >= 3
    assert len({cell.prompt_tokens for cell in cells}) >= 4
    assert {cell.quant for cell in cells} == {"none"}


def test_what_is_given_overrides_the_preset() -> None:
    cells = expand_cells(parse({"preset": "QUICK", "batch_size": "1", "quant": "int8,int4"}))
    assert {(cell.batch_size, cell.prompt_tokens, cell.quant) for cell in cells} == {
        (1, s, q) for s in (64, 128, 256, 512) for q in ("int8", "int4")
    }


def test_mlproject_gives_everything_and_its_defaults_do_not_override() -> None:
    whole = {name: default_text(name) for name in spec.PARAMETERS}
    assert len(expand_cells(parse(whole))) == 1
    assert expand_cells(parse(whole | {"preset": "quick"})) == expand_cells(parse({"preset": "quick"}))
    cells = expand_cells(parse(whole | {"preset": "quick", "batch_size": "2,8"}))
    assert {cell.batch_size for cell in cells} == {2, 8}


def test_an_unknown_preset_is_named() -> None:
    with pytest.raises(UsageError, match="Unknown preset: quik. Did you mean quick\\? Known: quick, effillm."):
        parse({"preset": "quik"})
    for grid in GRIDS.values():
        assert set(grid) <= set(spec.PARAMETERS)


def test_the_least_time_by_hand() -> None:
    preset = models.PRESETS["opt-125m"]
    cell = Cell(
        model="opt-125m", quant="fp16", batch_size=2, prompt_tokens=100, output_tokens=11, warmup=1, repetitions=4
    )
    facts = ModelFacts("opt-125m", "preset", "facebook/opt-125m", "main", dtype="float16")
    shape, slow = preset.shape, {"read_bytes_per_s": 1e9, "flops_per_s": 1e15}
    weights = shape.weight_bytes("fp16", "float16")
    step = (weights + 2 * shape.kv_bytes(105)) / 1e9
    assert estimate.least_seconds(cell, facts, shape, slow) == pytest.approx(5 * (weights / 1e9 + 10 * step))
    counting = {"read_bytes_per_s": 1e15, "flops_per_s": 1e9}
    work = 2 * 100 * shape.flops_per_token(50) + 10 * 2 * shape.flops_per_token(105)
    assert estimate.least_seconds(cell, facts, shape, counting) == pytest.approx(5 * work / 1e9)
    assert estimate.least_seconds(cell, facts, shape, {}) is None
    assert estimate.least_seconds(cell, facts, None, slow) is None


def test_a_refusal_for_memory_has_sizes_that_differ() -> None:
    cell, facts = Cell(model="m", quant="bf16"), ModelFacts("m", "folder", "/m", "r")
    found = estimate.refusal(cell, facts, 606_000_000, (550_000_000, "are allowed by memory_limit"))
    assert found and "needs about 0.606 GB, and 0.550 GB are allowed by memory_limit. " in found.sentence


def test_ranks_share_the_weights_and_add_their_processes(nvml: Callable[[str], None]) -> None:
    preset = models.PRESETS["llama-2-13b"]
    facts = ModelFacts("llama-2-13b", "preset", "m", "main", config=dict(preset.config), dtype="float16")
    one = Cell(model="llama-2-13b", quant="fp16", device="cpu", prompt_tokens=64, output_tokens=16)
    sizes = [
        estimate.predicted_bytes(dataclasses.replace(one, tensor_parallel=ranks), facts, preset.shape) or 0
        for ranks in (1, 2, 4)
    ]
    weights = preset.shape.weight_bytes("fp16", "float16")
    assert sizes[1] - sizes[0] == (sizes[2] - sizes[1]) // 2  # each further rank adds as much
    assert PROCESS_BYTES < sizes[1] - sizes[0] < PROCESS_BYTES + 0.01 * weights
    nvml("driver 570\ngpu GPU-1 A\ngpu GPU-2 A\n")
    two = dataclasses.replace(one, device="cuda", tensor_parallel=2)
    room = (20 * 10**9, estimate.ON_GPU)
    assert weights > room[0] and estimate.refusal(two, facts, sizes[1], room) is None
    refused = estimate.refusal(two, facts, sizes[1], (12 * 10**9, estimate.ON_GPU))
    assert refused and refused.sentence.startswith(
        "llama-2-13b with quant=fp16, batch_size=1, tensor_parallel=2 needs about 13.4 GB on each of 2 GPUs, and "
        "12.0 GB are free on the GPU. "
    )
    rates = {"read_bytes_per_s": 1e9, "flops_per_s": 1e15}
    times = [estimate.least_seconds(cell, facts, preset.shape, rates) or 0 for cell in (one, two)]
    assert times[1] == pytest.approx(times[0] / 2)
    on_cpu = dataclasses.replace(two, device="cpu")
    assert estimate.least_seconds(on_cpu, facts, preset.shape, rates) == times[0]


def test_an_embedding_that_is_not_divided_counts_for_each_rank() -> None:
    """Measured with two ranks on a CPU: 0.385 GB of weights, where one rank has 0.282, and 1.14 GB needed."""
    preset = models.PRESETS["pythia-70m"]
    facts = ModelFacts("pythia-70m", "preset", "m", "main", config=dict(preset.config), dtype="float16")
    one = Cell(model="pythia-70m", quant="fp32", device="cpu", prompt_tokens=32, output_tokens=16)
    sizes = [
        estimate.predicted_bytes(dataclasses.replace(one, tensor_parallel=ranks), facts, preset.shape) or 0
        for ranks in (1, 2)
    ]
    assert sizes[1] - sizes[0] > PROCESS_BYTES + 4 * preset.shape.embedding_parameters
    assert sizes[1] == pytest.approx(1.14e9, rel=0.06)


SEVENTY = {
    "model_type": "llama", "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8, "intermediate_size": 28672, "vocab_size": 32000, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize(
    ("name", "config"), [("llama-2-13b", dict(models.PRESETS["llama-2-13b"].config)), ("a Llama of 70B", SEVENTY)]
)
def test_the_page_has_the_predicted_memory_of_each_gpu(name: str, config: dict[str, object], rows: int) -> None:
    shape, facts = Shape.from_config(config), ModelFacts("m", "folder", "/m", "r", config, dtype="float16")
    cell = Cell(model="m", quant="fp16", batch_size=rows, prompt_tokens=2048, output_tokens=256)
    sizes = [
        (estimate.predicted_bytes(dataclasses.replace(cell, tensor_parallel=gpus), facts, shape) or 0) / gpus / 1e9
        for gpus in (1, 2, 4, 8)
    ]
    row = " | ".join([name, str(rows), *(f"{size:.1f}" for size in sizes)])
    assert f"| {row} |" in (Path(__file__).parents[2] / "docs" / "scale.md").read_text()


def test_the_plan_says_cells_memory_time_and_refusals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLMBENCH_CACHE", str(tmp_path / "cache"))
    given = ["plan", "--preset", "quick", "--model", "opt-125m", "--weights", "random", "--quant", "fp32", "--json"]
    assert main([*given, "--prompt-tokens", "64,2048", "--memory-limit", "2GB"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    data = json.loads(last)
    assert lines[0].split() == ["batch_size", "prompt_tokens", "memory", "GB", "at", "least"]
    assert len(data["cells"]) == 6 and data["tried"] == 3 and data["loads"] == 1
    assert all("is more than the context of opt-125m, 2048 tokens" in cell["refused"] for cell in data["cells"][1::2])
    assert all(cell["least_s"] is None for cell in data["cells"])
    assert any(line.startswith("3 cells would be refused (context): ") for line in lines)
    assert "The time is unknown until a real model has been measured here" in lines[-1]
    assert list(tmp_path.iterdir()) == []  # nothing was started, nothing was written

    hardware = machine.environment()["hashes"]["hardware"]
    machine.best_peaks({"read_bytes_per_s": 1e10, "flops_per_s": 1e11}, f"{hardware} auto auto")
    assert main([*given, "--memory-limit", "700MB"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    data = json.loads(last)
    assert 0 <= data["tried"] < 12
    assert all(cell["least_s"] > 0 for cell in data["cells"])
    assert any("cells would be refused (memory): opt-125m with quant=fp32" in line for line in lines)


def test_the_plan_names_placement_where_a_model_does_not_fit_and_says_what_would_lie_where(
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ["plan", "--model", "opt-125m", "--weights", "random", "--device", "cpu", "--memory-limit", "600MB"]
    assert main([*given, "--quant", "bf16", "--placement", "single,auto", "--json"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    single, auto = json.loads(last)["cells"]
    where = auto["predicted_placement"]
    assert [*where] == ["cpu", "disk"] and sum(where.values()) == pytest.approx(250.5e6, rel=0.01)
    assert min(where.values()) > 0 and auto["refused"] is None and auto["predicted_bytes"] <= 600e6
    said = weights_text(where)
    assert lines[2].startswith("auto") and lines[2].endswith(said) and lines[1].endswith("–")
    assert single["predicted_placement"] is None
    assert single["refused"].endswith(f" With --placement auto its weights would lie in {said}.")
    assert main([*given, "--quant", "int8"]) == 0  # packed weights have no such way
    assert "placement" not in capsys.readouterr().out
    assert main([*given[:-1], "500MB", "--quant", "bf16", "--placement", "auto", "--batch-size", "64"]) == 0
    assert "of memory even with placement=auto, for the process, the KV cache" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("lines", "given", "message"),
    [
        ('{"prompt": "a"}\nnot json\n', {}, "line 2, is not a JSON object"),
        ('{"prompt": "a"}\n', {"history": "kept", "prompt_tokens": "auto"}, "history=kept needs conversations"),
    ],
)
def test_a_plan_reads_the_prompts_as_a_run_does(
    tiny_model: Path, tmp_path: Path, lines: str, given: dict[str, str], message: str
) -> None:
    (tmp_path / "mine.jsonl").write_text(lines)
    with pytest.raises(UsageError, match=message):
        preview.preview(model=str(tiny_model), workload=str(tmp_path / "mine.jsonl"), **given)


def test_long_plans_are_cut_and_summed() -> None:
    found = preview.preview(backend="fake", model="fake:", batch_size=",".join(map(str, range(1, 131))))
    text = preview.format_preview(found)
    assert "… and 30 more; --json has all." in text
    assert "130 of 130 cells would be measured, with 1 load" in text


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "–"), (0.44, "0.4 s"), (61.4, "61 s"), (210, "3.5 min"), (7560, "2.1 h")]
)
def test_durations_are_readable(seconds: float | None, text: str) -> None:
    assert preview.duration(seconds) == text


def test_refusals_are_counted_by_the_kind_that_they_were_made_with() -> None:
    found = preview.preview(backend="fake", model="fake:", decode="generate,prompt_lookup", batch_size="1,2,4")
    lines = preview.format_preview(found).splitlines()
    assert [line for line in lines if "refused (" in line] == [
        "2 cells would be refused (settings): decode=prompt_lookup proposes tokens for one row, and batch_size is 2. "
        "Use batch_size=1, or decode=generate."
    ]
    assert "4 of 6 cells would be measured, with 2 loads" in lines[-1]
