"""Quantization-aware training: arithmetic of the cell, separation of data, and recovery of the quality lost to int4."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mlflow_llmbench import run
from mlflow_llmbench.analysis.quality import Estimate, kl_reduction
from mlflow_llmbench.backends.huggingface import qat, scoring
from mlflow_llmbench.backends.huggingface.backend import TransformersBackend
from mlflow_llmbench.cli.main import main
from mlflow_llmbench.config import training
from mlflow_llmbench.config.training import Training, parse_training
from mlflow_llmbench.measure.events import Event, Report, Stage, TrainingPlanned, TrainingStep
from mlflow_llmbench.measure.worker import TrainingEvents
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.codec import to_json
from mlflow_llmbench.records.errors import MeasurementError, UsageError
from mlflow_llmbench.records.metrics import KEYS
from mlflow_llmbench.records.results import Divergence, Quality, TextScores
from mlflow_llmbench.reports.qat import (
    TRAINED,
    UNQUANTIZED,
    UNTRAINED,
    Trained,
    conclusion,
    format_trained,
    training_figures,
)
from mlflow_llmbench.workflows.qat import plan_evaluation
from mlflow_llmbench.workloads import training_texts
from mlflow_llmbench.workloads.training_texts import read_texts
from tests.end_to_end.test_survival import until
from tests.loading import loaded

pytestmark = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs the package torchao")

ROOT = Path(__file__).resolve().parents[2]
GROUP = 32
NOUNS, VERBS = (
    ("keeper", "miller", "lock", "river", "barge", "mule", "bridge"),
    ("opens", "passes", "mends", "sees", "paints", "leaves"),
)


def toy_text(sentences: int, seed: int = 0) -> str:
    """Sentences of a small grammar, 28 characters each on average."""
    draw = random.Random(seed)
    lines = [f"The {draw.choice(NOUNS)} {draw.choice(VERBS)} the {draw.choice(NOUNS)}." for _ in range(sentences)]
    return "\n".join(lines)


@pytest.fixture(scope="session")
def sharp_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with larger weights: it is sure of its next token, and int4 costs 0.15 nats in groups of 128."""
    folder = tmp_path_factory.mktemp("sharp") / "sharp-llama"
    shutil.copytree(tiny_model, folder)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        tensor.mul_(8 if name == "lm_head.weight" else 4 if tensor.dim() == 2 and "embed" not in name else 1)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def ordered(folder: Path, learned: str, held_out: str, room: Any = (None, ""), **settings: Any) -> dict[str, Any]:
    """Return the order of a training as the command gives it to its worker."""
    folder.mkdir(exist_ok=True)
    (folder / "learned.txt").write_text(learned)
    (folder / "held_out.txt").write_text(held_out)
    settings = {"steps": 3, "sequence_tokens": 64, "batch_size": 2} | settings
    return {
        "training": to_json(Training(**settings)),
        "learned": str(folder / "learned.txt"),
        "held_out": str(folder / "held_out.txt"),
        "room": room,
        "scratch": str(folder / ".scratch"),
        "folder": str(folder / "checkpoint"),
        "recipe": {"base": "tiny", "steps": settings["steps"]},
    }


def trained(model: Path, order: Mapping[str, Any], report: Report = lambda event: None, group: int = GROUP) -> Path:
    """Train in this process and return the checkpoint."""
    cell = Cell(model=str(model), quant="int4-wo", group_size=group, threads=1, device="cpu")
    qat.train(cell, TransformersBackend.resolve(cell), order, TrainingEvents(report))
    return Path(order["folder"])


# Arithmetic


def kernel_weights(linear: Any) -> torch.Tensor:
    """The weights of torch's own kernel: its product with the identity in float32, where nothing is rounded again."""
    packed = linear.weight
    eye = torch.eye(linear.in_features)
    size = packed.block_size[-1]
    return torch.ops.aten._weight_int4pack_mm_for_cpu(eye, packed.qdata, size, packed.scale_and_zero.float()).T


@pytest.mark.parametrize("group", [32, 128])
def test_fake_quantized_weights_are_bit_for_bit_those_of_the_loaded_cell(tiny_model: Path, group: int) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    qat.prepare(model, group)
    with loaded(Cell(model=str(tiny_model), quant="int4-wo", group_size=group)) as (backend, _):
        names = {
            name
            for name, module in backend.model.named_modules()
            if type(getattr(module, "weight", None)).__name__ == "Int4OpaqueTensor"
        }
        assert names == {name for name, module in model.named_modules() if hasattr(module, "weight_fake_quantizer")}
        assert len(names) == 14
        for name in names:
            fake, real = model.get_submodule(name), backend.model.get_submodule(name)
            value = fake.weight_fake_quantizer(fake.weight)
            assert torch.equal(value, kernel_weights(real)), name
            assert len(value[0, :group].unique()) <= 16
            with torch.inference_mode():  # and the layer as the cell calls it, in bfloat16
                assert torch.equal(
                    real(torch.eye(fake.in_features, dtype=torch.bfloat16)).T, value.to(torch.bfloat16)
                ), name


def test_torchaos_own_fake_quantizer_has_the_same_integers_and_rounds_their_values_once_more(tiny_model: Path) -> None:
    """Compare with torchao's: equal scale and zero point, values within two bfloat16 roundings, far below a step."""
    from torchao.quantization.qat import IntxFakeQuantizer

    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    qat.prepare(model, GROUP)
    linear = model.model.layers[0].mlp.up_proj
    weight = linear.weight.detach()
    ours = linear.weight_fake_quantizer(weight)
    theirs = IntxFakeQuantizer(linear.weight_fake_quantizer.config)(weight.to(torch.bfloat16)).float()
    assert not torch.equal(ours, theirs)
    assert torch.allclose(ours, theirs, rtol=0, atol=float(ours.abs().max()) * 2**-7)


def test_the_gradient_passes_through_the_rounding(tiny_model: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    qat.prepare(model, GROUP)
    linear = model.model.layers[0].self_attn.q_proj
    inputs = torch.randn(5, linear.in_features, generator=torch.Generator().manual_seed(0))
    linear(inputs).sum().backward()
    assert torch.allclose(linear.weight.grad, inputs.sum(0).expand_as(linear.weight))


# Recovered quality


def divergences(model: Path, reference: Any, rows: torch.Tensor, quant: str) -> float:
    """Mean KL divergence from the unquantized model over all positions of the rows, as an ordinary cell gives it."""
    with loaded(Cell(model=str(model), quant=quant, group_size=GROUP)) as (backend, _):
        values = [
            kl
            for row, its in zip(rows, reference, strict=True)
            for kl in scoring.divergence(its, backend.logits(row.tolist(), len(row)))[0]
        ]
    return math.fsum(values) / len(values)


def test_training_takes_back_part_of_what_int4_costs(sharp_model: Path, tmp_path: Path) -> None:
    """Judged on sentences that neither the model nor the training has seen; the checkpoint is loaded like any other."""
    unseen = toy_text(60, seed=1)
    losses: list[float] = []

    def report(event: Event) -> None:
        losses.extend([event.loss] if isinstance(event, TrainingStep) else [])

    order = ordered(tmp_path / "out", toy_text(200), unseen, steps=30, learning_rate=3e-4, batch_size=4)
    checkpoint = trained(sharp_model, order, report)
    tokenizer: Any = AutoTokenizer.from_pretrained(sharp_model)
    rows = torch.tensor(qat.sequences(tokenizer, unseen, 64))[:12]
    with loaded(Cell(model=str(sharp_model))) as (backend, _):
        reference = [backend.logits(row.tolist(), len(row)) for row in rows]
    before, after = (
        divergences(sharp_model, reference, rows, "int4-wo"),
        divergences(checkpoint, reference, rows, "int4-wo"),
    )
    assert len(losses) == 30
    assert math.fsum(losses[-10:]) < 0.7 * math.fsum(losses[:10])
    assert before > 0.05
    assert 0 < after < 0.7 * before


def test_a_checkpoint_is_whole_says_what_it_was_made_of_and_leaves_the_embeddings(
    tiny_model: Path, tmp_path: Path
) -> None:
    sent: list[Event] = []
    checkpoint = trained(
        tiny_model,
        ordered(tmp_path / "out", toy_text(40), toy_text(40)),
        sent.append,
    )
    assert [event.name for event in sent if not isinstance(event, Stage)] == [
        "planned",
        "step",
        "step",
        "step",
        "saved",
    ]
    [plan] = [event for event in sent if isinstance(event, TrainingPlanned)]
    before, after = load_file(tiny_model / "model.safetensors"), load_file(checkpoint / "model.safetensors")
    frozen = ("model.embed_tokens.weight", "lm_head.weight")
    assert plan.frozen == sum(before[name].numel() for name in frozen)
    assert plan.trained + plan.frozen == sum(tensor.numel() for tensor in before.values())
    assert set(after) == set(before)
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert all(torch.equal(after[name], before[name].to(torch.bfloat16)) for name in frozen)
    assert not torch.equal(
        after["model.layers.0.mlp.up_proj.weight"], before["model.layers.0.mlp.up_proj.weight"].to(torch.bfloat16)
    )
    assert training.recorded(str(checkpoint)) == {"qat.base": "tiny", "qat.steps": 3}
    assert training.recorded(str(tiny_model)) == {}
    assert not (tmp_path / "out" / ".scratch").exists()


def test_the_same_seed_gives_the_same_weights(tiny_model: Path, tmp_path: Path) -> None:
    one, other = (
        load_file(
            trained(tiny_model, ordered(tmp_path / name, toy_text(40), toy_text(40), loss="lm")) / "model.safetensors"
        )
        for name in "ab"
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


# Refusals and stops


def test_too_little_memory_is_refused_with_both_sizes_before_the_weights_are_read(
    tiny_model: Path, tmp_path: Path
) -> None:
    order = ordered(tmp_path / "out", toy_text(40), toy_text(40), room=(1_000_000, "are free here"))
    with pytest.raises(
        MeasurementError,
        match=r"needs about 0\.4 GB, and 0\.0 GB are free here\. Use a smaller model, fewer sequence_tokens",
    ):
        trained(tiny_model, order, lambda event: pytest.fail(event.name))


def test_groups_that_do_not_fit_a_layer_are_refused_by_name(tiny_model: Path, tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.config.intermediate_size = 160
    smaller = AutoModelForCausalLM.from_config(model.config)
    smaller.save_pretrained(tmp_path / "odd")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "odd")
    with pytest.raises(
        MeasurementError, match=r"layers\.0\.mlp\.down_proj has 160 inputs, which group_size=64 does not divide"
    ):
        trained(tmp_path / "odd", ordered(tmp_path / "out", toy_text(40), toy_text(40)), group=64)


@pytest.mark.parametrize(("learned", "held", "line"), [
    (100, 600, "The data are too short to train on: 64 tokens beside what is held out, and one step takes "
               "batch_size=2 × sequence_tokens=64 tokens. Give more text, or smaller steps."),
    (600, 500, "What is held out is too short to measure quality on: 500 tokens, and 512 tokens are needed. "
               "Give more text, or a larger held_out than 0.2."),
])  # fmt: skip
def test_data_that_are_too_short_are_refused(
    tiny_model: Path, tmp_path: Path, learned: int, held: int, line: str
) -> None:
    """The tiny model's tokenizer makes each character a token."""
    with pytest.raises(UsageError) as caught:
        trained(tiny_model, ordered(tmp_path / "out", toy_text(40)[:learned], toy_text(40)[:held]))
    assert str(caught.value) == line


def test_a_loss_that_is_not_finite_stops_and_keeps_nothing(tiny_model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = math.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        MeasurementError,
        match=r"The loss at step 1 is not finite \(nan, gradient nan\), so nothing was kept\. "
        r"Use a smaller learning_rate",
    ):
        trained(broken, ordered(tmp_path / "out", toy_text(40), toy_text(40)))
    assert not (tmp_path / "out" / "checkpoint").exists()


def test_an_interruption_in_the_middle_leaves_no_checkpoint(tiny_model: Path, tmp_path: Path) -> None:
    def report(event: Event) -> None:
        if isinstance(event, TrainingStep) and event.number == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(tiny_model, ordered(tmp_path / "out", toy_text(40), toy_text(40)), report)
    assert not (tmp_path / "out" / "checkpoint").exists()


# Data and parameters


def texts(tmp_path: Path, **settings: Any) -> training_texts.Texts:
    return read_texts(Training(**({"sequence_tokens": 16, "batch_size": 1} | settings)))


def test_what_is_held_out_is_the_end_of_each_part_and_never_trained_on(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("\n\n".join(f"Paragraph {number} of one. {'x' * 80}" for number in range(40)))
    lines = [json.dumps({"text": f"Document {number} of two. {'y' * 80}"}) for number in range(20)]
    (tmp_path / "two.jsonl").write_text("\n".join(lines))
    found = texts(tmp_path, data=f"{tmp_path}/one.txt,{tmp_path}/two.jsonl", held_out=0.25)
    assert found.name == "one.txt+two.jsonl"
    assert [f"Paragraph {n} of one." in found.training for n in (0, 29, 30, 39)] == [True, True, False, False]
    assert [f"Paragraph {n} of one." in found.held_out for n in (0, 29, 30, 39)] == [False, False, True, True]
    assert [f"Document {n} of two." in found.held_out for n in (0, 14, 15, 19)] == [False, False, True, True]
    assert not set(found.training.split("\n\n")) & set(found.held_out.split("\n\n"))
    assert found.digest != texts(tmp_path, data=f"{tmp_path}/one.txt").digest


def test_the_shipped_texts_are_data_too(tmp_path: Path) -> None:
    found = texts(tmp_path, data="bundled,summarization", held_out=0.2)
    assert 0.15 < len(found.held_out) / (len(found.training) + len(found.held_out)) < 0.25


@pytest.mark.parametrize(("content", "line"), [
    ("short", "The data are too short to train on: data.txt has 5 characters. Give more text."),
    ("word " * 300, "What is held out is too short to measure quality on: 299 bytes, and 512 tokens are needed. "
                    "Give more text, or a larger held_out than 0.2."),
])  # fmt: skip
def test_a_short_text_is_refused_before_anything_is_loaded(
    tmp_path: Path, content: str, line: str, capsys: pytest.CaptureFixture[str], store_uri: str
) -> None:
    (tmp_path / "data.txt").write_text(content)
    assert main(["qat", "--data", "data.txt", "--sequence-tokens", "16", "--tracking-uri", store_uri]) == 2
    assert capsys.readouterr().err == f"llmbench: {line}\n"
    assert MlflowClient(store_uri).search_experiments()[0].name == "Default"
    assert not list(tmp_path.glob("llmbench-results"))


@pytest.mark.parametrize(("values", "line"), [
    ({"loss": "mse"}, "Unknown loss: mse. Give distill or lm."),
    ({"steps": 0}, "steps is too small: 0. The smallest is 1."),
    ({"learning_rate": "fast"}, "learning_rate is not a number: fast. Give a number from 1e-09."),
    ({"data": "none.txt"}, "There is no data file none.txt. Give a text file, a JSON Lines file, bundled, or "
                           "qa, summarization, creative, code, chat, domain."),
    ({"model": "a,b"}, "model takes one value here: a,b. Train one model at a time."),
    ({"quant": "int8"}, f"Unknown parameter: quant. Known: {', '.join(training.NAMES)}."),
])  # fmt: skip
def test_bad_parameters_get_one_line(values: dict[str, object], line: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_training(values)
    assert str(caught.value) == line


def test_a_file_name_that_no_system_takes_is_one_line() -> None:
    with pytest.raises(UsageError, match="There is no data file nnn"):
        parse_training({"data": "n" * 300})


def test_parameters_become_the_cell_that_is_trained_for() -> None:
    cell, options, asked = parse_training(
        {"group_size": "64", "steps": "7", "freeze_embeddings": "false", "threads": "2", "force": "true"}
    )
    assert (cell.quant, cell.group_size, cell.threads, options.force) == ("int4-wo", 64, 2, True)
    assert (asked.steps, asked.freeze_embeddings, asked.batch_size, asked.output) == (7, False, 4, None)


def test_an_output_that_is_there_is_not_overwritten(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], store_uri: str
) -> None:
    (tmp_path / "data.txt").write_text(toy_text(200))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    arguments = [
        "qat",
        "--model",
        str(tiny_model),
        *"--data data.txt --group-size 32 --output mine --tracking-uri".split(),
        store_uri,
    ]
    assert main(arguments) == 2
    assert (
        capsys.readouterr().err
        == "llmbench: output=mine exists already. Name a new folder, so that no checkpoint is overwritten.\n"
    )


def test_each_sequence_comes_once_before_any_comes_twice() -> None:
    rows = [[number] for number in range(10)]
    drawn = [row[0] for batch in qat.batches(rows, Training(steps=6, batch_size=4), 1) for row in batch]
    assert len(drawn) == 24
    assert sorted(drawn[:10]) == sorted(drawn[10:20]) == list(range(10))
    assert drawn[:10] != drawn[10:20]
    assert drawn == [row[0] for batch in qat.batches(rows, Training(steps=6, batch_size=4), 1) for row in batch]
    assert drawn != [row[0] for batch in qat.batches(rows, Training(steps=6, batch_size=4), 2) for row in batch]


def test_the_learning_rate_rises_over_a_tenth_and_falls_to_a_tenth() -> None:
    assert [qat.rate_at(number, 20) for number in (1, 2)] == [0.5, 1.0]
    assert qat.rate_at(11, 20) == pytest.approx(0.55)
    assert qat.rate_at(20, 20) == pytest.approx(0.1)
    assert qat.rate_at(1, 1) == 1.0


def test_needed_bytes_by_hand() -> None:
    """10 parameters trained (16 + 4 + 4), 5 frozen (4); 6 arrays of 8 × 100 logits (4: no teacher); all times 1.4."""
    asked = Training(sequence_tokens=8)
    assert training.needed_bytes(10, 5, 100, asked) == int(1.4 * (10 * 24 + 5 * 4 + 6 * 8 * 100 * 4))
    assert training.needed_bytes(10, 5, 100, dataclasses.replace(asked, loss="lm")) == int(
        1.4 * (10 * 20 + 5 * 4 + 4 * 8 * 100 * 4)
    )


# The report


def quality(*kl: tuple[float, ...], nll: float = 1.0, digest: str = "d") -> Quality:
    agrees = tuple(tuple(value < 0.2 for value in prompt) for prompt in kl)
    return Quality("t", TextScores("t", 9, 4, 2, ((nll, nll), (nll, nll))), Divergence("base", digest, kl, agrees))


def result(before: Quality, after: Quality) -> Trained:
    qualities = {UNQUANTIZED: quality((0.0, 0.0), (0.0, 0.0)), UNTRAINED: before, TRAINED: after}
    plan = {"trained": 10, "frozen": 5, "layers": 2, "needed": 100, "sequences": 3}
    return Trained(
        Cell(model="tiny", quant="int4-wo"), Training(), "h", "ok", plan=plan, losses=(1.0,), qualities=qualities
    )


def test_what_was_taken_back_by_hand() -> None:
    """Differences 0.2, 0.4 | 0.3, 0.3: mean 0.3 for both prompts, so the interval has no width; before it was 0.6."""
    done = result(quality((0.5, 0.7), (0.6, 0.6), nll=1.2), quality((0.3, 0.3), (0.3, 0.3), nll=1.1))
    found = training_figures(done)
    assert found["qat/kl_reduction"] == pytest.approx(0.3)
    assert found["qat/kl_reduction_ci_low"] == pytest.approx(found["qat/kl_reduction_ci_high"]) == pytest.approx(0.3)
    assert found["qat/kl_recovered_ratio"] == pytest.approx(0.5)
    assert (found["qat/ptq_kl_vs_reference"], found["quality/kl_vs_reference"]) == pytest.approx((0.6, 0.3))
    assert found["qat/ptq_perplexity"] == pytest.approx(math.exp(1.2))
    assert found["qat/unquantized_perplexity"] == pytest.approx(math.e)
    assert set(found) <= set(KEYS)
    assert conclusion(done).startswith(
        "Training recovered 50 % of the KL divergence that int4-wo costs without it: 0.300 nats [0.300, 0.300]"
    )
    lines = format_trained(done).splitlines()
    assert [line.split("  ")[0] for line in lines[:4]] == [
        "model",
        "unquantized",
        "int4-wo, group_size=128",
        "int4-wo, group_size=128, trained",
    ]


def test_a_conclusion_claims_no_more_than_its_interval() -> None:
    before = quality((0.5, 0.7), (0.6, 0.6))
    assert conclusion(result(before, quality((0.1, 0.2), (0.9, 0.9)))).startswith(
        "It cannot be told whether training helped: the KL divergence fell by 0.0750 nats [-"
    )
    assert conclusion(result(before, quality((0.8, 1.0), (0.9, 0.9)))).startswith(
        "Training made the KL divergence larger: -0.300 nats"
    )
    assert (
        conclusion(result(before, quality((0.1, 0.2), (0.9, 0.9), digest="e")))
        == "The effect of the training could not be measured."
    )


def test_divergences_at_other_positions_are_not_compared() -> None:
    assert kl_reduction(quality((0.5, 0.7)), quality((0.1, 0.2), digest="other")) is None
    assert kl_reduction(quality((0.5, 0.7)), quality((0.1, 0.2))) == Estimate(pytest.approx(0.45))


# Whole commands


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_training_is_a_run_and_its_checkpoint_a_cell(
    sharp_model: Path, tmp_path: Path, store_uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data.txt").write_text(toy_text(300))
    arguments = "--steps 40 --learning-rate 3e-4 --sequence-tokens 64 --group-size 32 --threads 1 --output made".split()
    assert (
        main(
            [
                "qat",
                "--model",
                str(sharp_model),
                "--data",
                "data.txt",
                *arguments,
                "--tracking-uri",
                store_uri,
                "--json",
            ]
        )
        == 0
    )
    out, err = capsys.readouterr()
    assert (
        "in float32, with 14 linear layers rounded as by int4-wo; the embeddings and the output head stay as they are"
        in err
    )
    last = json.loads(out.splitlines()[-1])
    assert last["checkpoint"] == str(tmp_path / "made")
    found = MlflowClient(store_uri).get_run(last["run_id"])
    assert found.info.status == "FINISHED"
    expected = {
        "quant": "int4-wo",
        "group_size": "32",
        "steps": "40",
        "learning_rate": "0.0003",
        "loss": "distill",
        "data": "data.txt",
    }
    assert {name: found.data.params[name] for name in expected} == expected
    metrics = found.data.metrics
    assert 0 < metrics["quality/kl_vs_reference"] < metrics["qat/ptq_kl_vs_reference"]
    assert metrics["qat/kl_reduction_ci_low"] > 0
    assert len(MlflowClient(store_uri).get_metric_history(last["run_id"], "qat/loss")) == 40
    contexts = {one.dataset.name: one.tags[0].value for one in found.inputs.dataset_inputs}
    assert contexts == {"data.txt": "training", "data.txt, held out": "evaluation"}
    tags = found.data.tags
    assert tags["llmbench.env_hash"] and tags["llmbench.uploaded"] == "true"
    assert "recovered" in tags["mlflow.note.content"]
    recipe = json.loads((tmp_path / "made" / training.RECIPE).read_text())
    assert recipe["data_hash"] == found.data.params["qat.data_hash"] == last["data_digest"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".made")]
    cell = run(
        model=str(tmp_path / "made"),
        quant="int4-wo",
        group_size=32,
        threads=1,
        prompt_tokens=8,
        output_tokens=4,
        repetitions=2,
        warmup=1,
    )
    assert cell.outcome == "ok"
    params = MlflowClient(store_uri).get_run(cell.run_ids[0]).data.params
    assert (params["qat.base"], params["qat.steps"], params["quant.group_size"]) == (sharp_model.name, "40", "32")


def test_both_models_are_planned_together_and_a_short_context_is_no_reason_to_refuse(
    tiny_model: Path, tmp_path: Path
) -> None:
    """By default a cell asks for 256 tokens, and this model has room for 64. A training ignores these lengths."""
    shutil.copytree(tiny_model, tmp_path / "short")
    file = tmp_path / "short" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "max_position_embeddings": 64}))
    cell, options, _ = parse_training({"model": str(tmp_path / "short"), "group_size": "32"})
    planned = plan_evaluation([dataclasses.replace(cell, quant="none"), cell], options)
    assert [(one.cell.quant, one.model.context, one.refusal) for one in planned.cells] == [
        ("none", 64, None),
        ("int4-wo", 64, None),
    ]
    again = plan_evaluation([cell], options, planned.machine)
    assert again.machine is planned.machine


@pytest.mark.slow
def test_an_interrupted_training_ends_killed_and_leaves_no_checkpoint(
    tiny_model: Path, tmp_path: Path, store_uri: str
) -> None:
    (tmp_path / "data.txt").write_text(toy_text(300))
    command = [
        sys.executable,
        *"-m mlflow_llmbench qat --model".split(),
        str(tiny_model),
        *"--data data.txt --group-size 32 --output made".split(),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": store_uri}
    process = subprocess.Popen(
        [*command, "--steps", "100000"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    journals = "llmbench-results/*/train/worker.jsonl"
    try:
        until(
            lambda: (
                process.poll() is not None
                or any('"event":"step"' in file.read_text() for file in tmp_path.glob(journals))
            )
        )
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=200)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "Interrupted. No checkpoint was written." in output
    client = MlflowClient(store_uri)
    [found] = client.search_runs([one.experiment_id for one in client.search_experiments()])
    assert found.info.status == "KILLED"
    assert client.get_metric_history(found.info.run_id, "qat/loss")
    assert not [path for path in tmp_path.iterdir() if "made" in path.name]
