"""Quality: figures compared with hand-computed numbers, scores with plain torch on a tiny model, and whole commands."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file, save_file

from mlflow_llmbench import run
from mlflow_llmbench.analysis import quality
from mlflow_llmbench.backends.huggingface import scoring
from mlflow_llmbench.config.spec import parse
from mlflow_llmbench.measure import journal
from mlflow_llmbench.measure.events import CellBegun, EvaluationBegun, Event, JobFailed, StageMemory, TextScored
from mlflow_llmbench.measure.outcome import GroupOutcome, stages_of, timeline_of
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.errors import MeasurementError, UsageError
from mlflow_llmbench.records.metrics import KEYS
from mlflow_llmbench.records.results import Divergence, MemorySample, ModelFacts, Quality, RunResult, TextScores
from mlflow_llmbench.stats import t_interval
from mlflow_llmbench.sweeps import resume, sweep
from mlflow_llmbench.sweeps.sweep import SweepResult
from mlflow_llmbench.system.memory import HostMemory
from mlflow_llmbench.workloads.prompts import Text, load_text
from tests.backends.huggingface.test_backend import loaded
from tests.records.test_results import example as records_example

FAST = {"threads": 1, "output_tokens": 4, "prompt_tokens": 8, "repetitions": 2, "warmup": 1, "quality": "auto"}
TEXT = "The keeper wound the paddle down, and the chamber began to breathe. " * 12


def silent(number: int, limit: int) -> None:
    """Do nothing, in place of a worker's report of its progress."""


# Figures


def test_the_mean_over_clusters_of_one_size_is_that_of_their_means() -> None:
    clusters = [[1.0, 3.0], [2.0, 6.0], [5.0, 9.0]]
    found = quality.cluster_mean(clusters)
    assert found
    assert found.value == pytest.approx(26 / 6)
    assert (found.low, found.high) == pytest.approx(t_interval([2.0, 4.0, 7.0]))


def test_the_mean_over_clusters_of_unlike_sizes_by_hand() -> None:
    """Sums 6 and 0, sizes 3 and 1: mean 1.5, residuals 1.5 and −1.5, variance 2/1 · 4.5/16 = 0.5625, t(1) = 12.7062."""
    found = quality.cluster_mean([[1.0, 2.0, 3.0], [], [0.0]])
    assert found == quality.Estimate(
        1.5, pytest.approx(1.5 - 12.70620474 * 0.75), pytest.approx(1.5 + 12.70620474 * 0.75)
    )
    assert quality.cluster_mean([[2.0, 4.0]]) == quality.Estimate(3.0)
    assert quality.cluster_mean([[], []]) is None


def test_no_disagreement_is_not_certainty() -> None:
    """Wilson's lower limit of 20 of 20 is 20/(20 + 1.96²) = 0.8389, however many tokens each of the 20 prompts has."""
    found = quality.cluster_proportion([[True] * 30] * 20)
    assert found == quality.Estimate(1.0, pytest.approx(20 / (20 + 1.959964**2), abs=1e-6), 1.0)
    assert quality.cluster_proportion([[True, False]]) == quality.Estimate(0.5)


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    """Tokens of one prompt share a level: skewed for divergences, a beta-distributed share for agreement."""
    draw = np.random.default_rng(1)
    held = {"mean": 0, "share": 0}
    for _ in range(400):
        levels = draw.lognormal(0, 0.5, 24)
        values = [
            list(level * draw.exponential(1.0, size))
            for level, size in zip(levels, draw.integers(4, 17, 24), strict=True)
        ]
        mean = quality.cluster_mean(values)
        assert mean and mean.low is not None and mean.high is not None
        held["mean"] += mean.low <= math.exp(0.125) <= mean.high
        share = quality.cluster_proportion([list(draw.random(16) < p) for p in draw.beta(18, 2, 24)])
        assert share and share.low is not None and share.high is not None
        held["share"] += share.low <= 0.9 <= share.high
    assert 0.88 <= held["mean"] / 400 <= 0.98
    assert 0.91 <= held["share"] / 400 <= 0.99


def example(**fields: Any) -> Quality:
    scores = TextScores("bundled", 9, 4, 2, ((1.0, 2.0), (3.0, 2.0)), ((0.5, 1.5), (2.5, 1.5)))
    divergence = Divergence("tiny", "d", ((0.1, 0.3), (0.2, 0.2)), ((True, True), (True, False)))
    return dataclasses.replace(Quality("t", scores, divergence), **fields)


def test_every_figure_by_hand() -> None:
    found = quality.figures(example())
    assert found["quality/perplexity"] == pytest.approx(math.exp(2.0))
    assert found["quality/perplexity_ratio"] == pytest.approx(math.exp(0.5))
    assert (found["quality/perplexity_ratio_ci_low"], found["quality/perplexity_ratio_ci_high"]) == pytest.approx(
        [math.exp(0.5)] * 2
    )
    assert found["quality/kl_vs_reference"] == pytest.approx(0.2)
    assert found["quality/kl_vs_reference_p50"] == pytest.approx(0.2)
    assert "quality/kl_vs_reference_p99" not in found  # 4 positions, 299 are needed
    assert found["quality/top1_agreement"] == 0.75
    assert set(found) <= set(KEYS)


def test_what_was_not_measured_is_absent_and_said() -> None:
    assert quality.figures(Quality(withheld=("why",))) == {}
    assert quality.sentences(Quality(withheld=("why",))) == ["why"]
    assert "noise floor" in " ".join(
        quality.sentences(example(divergence=Divergence("tiny", "d", ((0.0,),), ((True,),), is_reference=True)))
    )
    alone = example(scores=TextScores("mine.txt", 9, 4, 2, ((1.0,),)), divergence=None)
    assert set(quality.figures(alone)) == {f"quality/perplexity{end}" for end in ("", "_ci_low", "_ci_high")}


# Scores


def test_divergence_of_tiny_distributions_by_hand() -> None:
    """P = (1/2, 1/2), Q = (1/4, 3/4): KL = ½·ln 2 + ½·ln ⅔ = 0.143841 nats; a constant on the logits has no effect."""
    p, q = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log() + 7, torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log()
    distances, agrees = scoring.divergence(p, q)
    assert distances == pytest.approx([0.5 * math.log(2) + 0.5 * math.log(2 / 3), 0.0], abs=1e-6)
    assert agrees == [True, True]  # the first row of P has two most probable tokens, one of them Q's


def test_a_word_that_the_reference_rules_out_counts_nothing() -> None:
    p, q = torch.tensor([[0.0, 0.0, -math.inf]]), torch.tensor([[0.0, 0.0, 0.0]])
    assert scoring.divergence(p, q)[0] == pytest.approx([math.log(3) - math.log(2)])
    assert scoring.divergence(torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]]))[1] == [False]


@pytest.mark.parametrize(
    ("count", "window", "stride", "begin"), [(10, 4, 2, 1), (10, 4, 2, 0), (3, 8, 4, 1), (9, 4, 3, 0), (4, 4, 2, 0)]
)
def test_windows_score_each_token_once_with_context(count: int, window: int, stride: int, begin: int) -> None:
    plan = list(scoring.windows(count, window, stride, begin))
    assert [token for _, first, end in plan for token in range(first, end)] == list(range(begin, count))
    assert all(end - start <= window for start, _, end in plan)
    assert all(first - start >= min(window - stride, first) for start, first, _ in plan[1:])


def test_room_is_shared_prompts_first() -> None:
    assert scoring.share_room(50, 100_544) == (50, 32)
    assert scoring.share_room(50, 524_288) == (50, 11)
    assert scoring.share_room(200, 524_288) == (64, 8)
    assert scoring.share_room(64, 1_000_000) == (37, 8)
    assert scoring.share_room(1, 10**9) == (1, 8)


def test_perplexity_is_that_of_plain_torch(tiny_model: Path) -> None:
    """Each token's loss is compared with that of a forward pass over only the tokens that its window shows it."""
    with loaded(Cell(model=str(tiny_model))) as (backend, _):
        found = scoring.score_text(backend, Text("mine", TEXT), 64, silent)
        ids = list(backend.encode(TEXT))
        assert (found.tokens, found.window, found.stride) == (len(ids), 64, 32)
        assert sum(map(len, found.nll)) == len(ids) - 1  # nothing stands before the first
        values = [value for window in found.nll for value in window]
        ends = [64 + 32 * n for n in range(len(found.nll))]
        with torch.inference_mode():
            for token in (1, 5, 63, 64, 95, 96, 300, len(ids) - 1):
                end = min(next(end for end in ends if token < end), len(ids))
                seen = torch.tensor([ids[max(0, end - 64) : token]])
                loss = -torch.log_softmax(backend.model(seen).logits[0, -1].double(), -1)[ids[token]]
                assert values[token - 1] == pytest.approx(float(loss), abs=1e-4)
    assert quality.figures(Quality("", found))["quality/perplexity"] == pytest.approx(
        math.exp(sum(values) / len(values))
    )


def test_what_a_tokenizer_puts_before_a_text_stands_before_every_window(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with loaded(Cell(model=str(tiny_model))) as (backend, _):
        plain = backend.encode
        monkeypatch.setattr(backend, "encode", lambda text: [0, *plain(text)])
        seen: list[list[int]] = []
        logits = backend.logits

        def watched(ids: Sequence[int], last: int) -> torch.Tensor:
            seen.append(list(ids))
            return logits(ids, last)

        monkeypatch.setattr(backend, "logits", watched)
        found = scoring.score_text(backend, Text("mine", TEXT), 64, silent)
    assert all(ids[0] == 0 and len(ids) <= 64 for ids in seen)
    assert sum(map(len, found.nll)) == found.tokens == len(TEXT.encode())


def test_a_text_that_is_too_short_is_refused(tiny_model: Path) -> None:
    with (
        loaded(Cell(model=str(tiny_model))) as (backend, _),
        pytest.raises(
            UsageError, match=r"The text mine is too short for a perplexity: 100 tokens\. Give at least 512 tokens"
        ),
    ):
        scoring.score_text(backend, Text("mine", "x" * 100), 64, silent)


def test_logits_that_are_not_finite_are_an_error() -> None:
    with pytest.raises(MeasurementError, match="not finite"):
        scoring.losses(torch.tensor([[math.nan, 0.0]]), [0])


@pytest.fixture(scope="module")
def reference_file(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": text}) + "\n" for text in ("To be", "Once upon a time", "x" * 300))
    )
    (folder / "text.txt").write_text(TEXT)
    text, files = load_text(str(folder / "text.txt")), {str(folder / "prompts.jsonl"): folder / "one.safetensors"}
    cell = Cell(model=str(tiny_model))
    with loaded(cell) as (backend, _):
        scoring.write_references(backend, text, files, backend.facts, "tiny", silent)
    return folder / "one.safetensors"


def test_a_model_beside_itself_does_not_diverge(tiny_model: Path, reference_file: Path) -> None:
    reference = scoring.read_reference(reference_file)
    assert reference.name == "tiny, float32"
    assert [len(ids) - positions for ids, positions in reference.prompts] == [
        5,
        16,
        256 - 32,
    ]  # the last prompt is cut to the context
    with loaded(Cell(model=str(tiny_model))) as (backend, _):
        found = scoring.compare(backend, reference, silent)
        continued = torch.tensor([reference.prompts[1][0][:16]])
        greedy = backend.model.generate(
            continued, attention_mask=torch.ones_like(continued), max_new_tokens=32, do_sample=False, pad_token_id=0
        )
    assert greedy[0].tolist() == list(reference.prompts[1][0])
    assert max(value for prompt in found.kl for value in prompt) < 1e-9
    assert all(all(prompt) for prompt in found.agrees)


def test_a_perturbed_copy_diverges_as_plain_torch_says(tiny_model: Path, reference_file: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    copy = tmp_path / "perturbed"
    shutil.copytree(tiny_model, copy)
    tensors = load_file(copy / "model.safetensors")
    tensors["lm_head.weight"] += 0.05 * torch.randn(
        tensors["lm_head.weight"].shape, generator=torch.Generator().manual_seed(1)
    )
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    reference = scoring.read_reference(reference_file)
    with loaded(Cell(model=str(copy))) as (backend, _):
        found = scoring.compare(backend, reference, silent)
    original, perturbed = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tiny_model, copy))
    for number, (ids, positions) in enumerate(reference.prompts):
        with torch.inference_mode():
            p, q = (model(torch.tensor([ids])).logits[0, -positions - 1 : -1] for model in (original, perturbed))
        expected = torch.nn.functional.kl_div(
            q.log_softmax(-1), p.log_softmax(-1), reduction="none", log_target=True
        ).sum(-1)
        assert list(found.kl[number]) == pytest.approx(expected.tolist(), rel=1e-3)
        assert list(found.agrees[number]) == (p.argmax(-1) == q.argmax(-1)).tolist()
    assert min(value for prompt in found.kl for value in prompt) > 1e-3


def test_a_continuation_ends_with_its_end_of_sequence() -> None:
    assert scoring._until_end([5, 6, 1, 7], {1}) == [5, 6, 1]
    assert scoring._until_end([5, 6], {1}) == [5, 6]
    for config, ends in (
        ({"eos_token_id": 1}, {1}),
        ({"text_config": {"eos_token_id": [1, 106]}}, {1, 106}),
        ({}, set()),
    ):
        assert scoring._end_ids(ModelFacts("m", "folder", "/m", "r", config)) == ends


def test_a_damaged_reference_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(MeasurementError, match="Delete it, so that it is computed again"):
        scoring.read_reference(tmp_path / "bad.safetensors")


def test_the_bundled_text_is_prose_and_code() -> None:
    text = load_text("bundled")
    assert len(text.content.split()) >= 2000
    assert all(part in text.content for part in ("The keeper of the lock", "def find_position", "SELECT c.name"))


# Reports of a worker


def test_a_worker_that_fails_while_it_evaluates_costs_nothing_but_quality() -> None:
    outcome = GroupOutcome()
    outcome.take(EvaluationBegun("d", t_ns=5))
    outcome.take(TextScored(TextScores("t", 2, 2, 1, ((1.0,),))))
    outcome.take(JobFailed("oom", "OutOfMemory", "Memory ran out."))
    assert outcome.error is None
    assert outcome.scores == TextScores("t", 2, 2, 1, ((1.0,),))
    assert outcome.withheld == ["The evaluation of the quality ended early: Memory ran out."]


def test_what_scoring_took_is_in_no_memory_stage_and_not_in_the_timeline() -> None:
    def outcome(*before_unloading: Event) -> GroupOutcome:
        found = GroupOutcome(samples=[MemorySample(t * 10**8, 10, 10) for t in range(100)])
        for event in (
            StageMemory("loaded", HostMemory(5, 4, 5), t_ns=10**9),
            CellBegun(0, t_ns=2 * 10**9),
            StageMemory("peak", HostMemory(5, 4, 5), t_ns=3 * 10**9),
            *before_unloading,
            StageMemory("unloaded", HostMemory(9, 4, 5), t_ns=95 * 10**8),
        ):
            found.take(event)
        return found

    plain, evaluated = outcome(), outcome(EvaluationBegun("d", t_ns=4 * 10**9))
    assert [s.t_ns // 10**8 for s in timeline_of(plain, 0)] == [*range(11), *range(20, 31), *range(89, 100)]
    assert [s.t_ns // 10**8 for s in timeline_of(evaluated, 0)] == [*range(11), *range(20, 31)]
    assert set(stages_of(plain, 0).host_rss) == {"loaded", "peak", "steady", "unloaded"}
    assert stages_of(evaluated, 0).host_rss == {
        k: v for k, v in stages_of(plain, 0).host_rss.items() if k != "unloaded"
    }


# Parameters and whole commands


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"quality": "best"}, "Unknown quality: best. Known: none, auto, true, false"),
        ({"quality_text": "nowhere.txt"}, "There is no text file nowhere.txt"),
        ({"quality_text": "n" * 300}, "There is no text file nnn"),
        (
            {"quality_text": "short.txt"},
            "short.txt is too short for a perplexity: 5 bytes. Give at least 512 tokens of text.",
        ),
        (
            {"quality_text": "latin.txt"},
            "Cannot read the text file latin.txt: it is not UTF-8: byte 4 cannot be decoded",
        ),
    ],
)
def test_wrong_parameters_are_one_line(tmp_path: Path, parameters: dict[str, str], message: str) -> None:
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "latin.txt").write_bytes("café ".encode("latin-1") * 200)
    with pytest.raises(UsageError) as caught:
        parse(parameters)
    assert str(caught.value).startswith(message)


def test_true_is_auto() -> None:
    assert parse({"quality": "true"}).options.quality == "auto"
    assert parse({"quality": "false"}).options.quality == parse({}).options.quality == "none"


def test_a_result_without_the_quality_that_is_asked_for_is_measured_again(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    plain, asked = parse({}), parse({"quality": "auto", "quality_text": str(tmp_path / "text.txt")})
    digest = load_text(str(tmp_path / "text.txt")).digest
    cases = [(None, False), (Quality(digest), True), (Quality(load_text("bundled").digest), False)]
    for found, there in cases:
        result = dataclasses.replace(records_example(), cell=Cell(), quality=found)
        assert resume._quality_is_there(result, plain)
        assert resume._quality_is_there(result, asked) is there
        random = dataclasses.replace(result, cell=Cell(weights="random"))
        assert resume._quality_is_there(random, asked)


def results_of(done: SweepResult) -> dict[str, RunResult]:
    return {found.cell.quant: found for found in map(journal.read_result, done.folder.glob("*/artifacts"))}


def test_a_backend_without_logits_says_so_and_has_no_figure(store_uri: str) -> None:
    said: list[str] = []
    watcher = sweep.NullListener()
    watcher.note = said.append  # type: ignore[method-assign]
    done = run(
        model="fake:ttft_ms=2", backend="fake", batch_size="1,2", attention="auto,sdpa", progress=watcher, **FAST
    )
    assert said == ["Quality is not measured with backend=fake, which gives no logits."]
    [result, *_] = results_of(done).values()
    assert result.outcome == "ok"
    assert result.quality == Quality(withheld=("Quality is not measured with backend=fake, which gives no logits.",))
    assert "which gives no logits" in (next(done.folder.glob("*/artifacts")) / "report.md").read_text()
    found = MlflowClient(store_uri).get_run(done.run_ids[0])
    assert not [key for key in found.data.metrics if key.startswith("quality/")]
    assert "which gives no logits" in found.data.tags["mlflow.note.content"]


@pytest.mark.charts
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_sweep_measures_quality_beside_speed(
    tiny_model: Path, store_uri: str, tmp_path: Path, cache_folder: Path
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    asked = {**FAST, "model": str(tiny_model), "quant": "none,bf16", "quality_text": str(tmp_path / "text.txt")}
    [before] = results_of(run(**{**asked, "quality": "none", "quant": "none"})).values()
    known = set((cache_folder / "references").glob("*.safetensors"))
    done = run(**asked)
    assert done.outcome == "ok"
    found = results_of(done)
    reference, bf16 = found["none"], found["bf16"]
    assert before.quality is None and reference.hashes == before.hashes
    assert reference.quality and reference.quality.divergence and bf16.quality and bf16.quality.divergence
    assert reference.quality.divergence.is_reference and not bf16.quality.divergence.is_reference
    assert reference.quality.withheld == bf16.quality.withheld == ()
    assert max(value for prompt in reference.quality.divergence.kl for value in prompt) < 1e-9
    assert 0 < quality.figures(bf16.quality)["quality/kl_vs_reference"] < 0.01  # type: ignore[operator]
    assert len({*(cache_folder / "references").glob("*.safetensors")} - known) == 1
    metrics = {
        r.data.params["quant"]: r.data.metrics
        for r in MlflowClient(store_uri).search_runs(
            [done.experiment_id], f"tags.llmbench.sweep = '{done.folder.name}'"
        )
        if "quant" in r.data.params
    }
    assert metrics["bf16"]["quality/perplexity"] == pytest.approx(500, rel=0.2)
    assert "quality/top1_agreement_ci_low" in metrics["bf16"]
    assert "KL nats" in done.table()
    assert (done.folder / "comparison" / "charts" / "quality.svg").exists()
    report = (done.folder / reference.hashes.config / "artifacts" / "report.md").read_text()
    assert "noise floor" in report
    assert {*reference.marks} == {*before.marks} - {"unloaded"}
    assert {*reference.memory.host_rss} == {*before.memory.host_rss} - {"unloaded"}


@pytest.mark.slow
def test_an_unquantized_model_that_does_not_fit_withholds_the_comparison_only(
    tiny_model: Path, store_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow_llmbench.system import estimate

    too_large = estimate.Refusal("memory", "It needs about 14 GB.")
    monkeypatch.setattr(estimate, "refusal", lambda cell, *_: too_large if cell.quant == "none" else None)
    (tmp_path / "text.txt").write_text(TEXT + "Not what another test has scored.")
    done = run(**FAST, model=str(tiny_model), quant="bf16", quality_text=str(tmp_path / "text.txt"))
    [result] = results_of(done).values()
    assert result.outcome == "ok"
    assert result.quality and result.quality.scores and result.quality.divergence is None
    assert result.quality.withheld == ("There is no unquantized model to compare with: It needs about 14 GB.",)
