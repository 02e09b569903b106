"""The whole study over records with known parameters: claims, findings, recommendations, figures, reports."""

import dataclasses
import json
import re
import zlib
from collections.abc import Sequence
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from mlflow_llmbench.analysis.comparison import compare
from mlflow_llmbench.analysis.scaling import claims
from mlflow_llmbench.analysis.scaling.claims import CONFIRMED, NOT_CONFIRMED, UNSAID, Claim
from mlflow_llmbench.analysis.scaling.findings import Findings, find
from mlflow_llmbench.analysis.scaling.focus import labels
from mlflow_llmbench.analysis.scaling.tradeoffs import Ratio
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.errors import UsageError
from mlflow_llmbench.records.results import Divergence, Failure, LoadInfo, MemoryStages, Quality, RunResult
from mlflow_llmbench.reports import artifacts
from mlflow_llmbench.reports.charts.catalogue import charts_of
from mlflow_llmbench.reports.deployment import deployment_lead
from mlflow_llmbench.reports.study import format_study

from .test_laws import result

MODELS = {"pythia-70m": 0.07, "opt-125m": 0.125, "pythia-160m": 0.16, "gemma-3-270m": 0.27}
SPEED = {"bf16": 1.0, "int8": 0.92, "int4": 0.8, "gptq": 0.86}
BYTES = {"bf16": 2.0, "int8": 1.0, "int4": 0.5, "gptq": 0.5}
BATCHES, LENGTHS = (1, 4, 16), (64, 128, 512)
MACHINE = {"cpu": {"name": "AMD EPYC", "usable_cpus": 2}}


def measured(
    model: str = "opt-125m",
    quant: str = "bf16",
    batch: int = 1,
    prompt: int = 128,
    *,
    speed: float = 1.0,
    weights: str = "random",
    **other: Any,
) -> RunResult:
    """One cell: TTFT and TPOT grow with size, batch and length, divided by the quantization's speed and by `speed`."""
    size = MODELS[model]
    cell = Cell(
        model=model,
        quant=quant,
        weights=weights,
        batch_size=batch,
        prompt_tokens=prompt,
        output_tokens=16,
        repetitions=6,
    )
    fast = SPEED[quant] * speed
    facts = {"model.parameters": int(size * 1e9), "model.dtype": "bfloat16"}
    load = LoadInfo(1.0, weight_bytes=int(size * 1e9 * BYTES[quant]), kv_bytes_per_token=10_000, facts=facts)
    ttft, tpot = (20 + 300 * size * batch * (prompt / 128) ** 0.8) / fast, (5 + 40 * size + 0.5 * batch) / fast
    seed = zlib.crc32(f"{model} {quant} {batch} {prompt}".encode()) % 10_000
    made = result(cell, ttft, tpot, seed=seed, sigma=0.002, load=load, **other)
    peak = int(size * 1e9 * BYTES[quant])
    stages = MemoryStages({}, {"baseline": 0, "loaded": peak, "peak": peak + 10_000 * batch * (prompt + 16)})
    return dataclasses.replace(made, memory=stages, environment=MACHINE, sweep="20260101T000000Z-abcdef", steady=True)


def grid(
    models: Sequence[str] = ("pythia-70m", "opt-125m", "pythia-160m"),
    quants: Sequence[str] = tuple(SPEED),
    **other: Any,
) -> list[RunResult]:
    return [measured(m, q, b, s, **other) for m in models for q in quants for b in BATCHES for s in LENGTHS]


@pytest.fixture(scope="module")
def found() -> Findings:
    return find(grid())


def claim(found: Findings, key: str) -> Claim:
    return next(one for one in found.claims if one.key == key)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.91, 0.94, CONFIRMED), (0.5, 0.89, NOT_CONFIRMED), (0.96, 1.2, NOT_CONFIRMED), (0.89, 0.92, UNSAID),
     (0.8, 1.0, UNSAID), (None, None, UNSAID),
     (0.96, None, NOT_CONFIRMED), (0.92, None, UNSAID), (None, 0.8, NOT_CONFIRMED)],
)  # fmt: skip
def test_an_interval_confirms_refutes_or_says_nothing(low: float | None, high: float | None, verdict: str) -> None:
    assert claims.judge_range(low, high, (0.90, 0.95)) == verdict


def test_models_are_the_units_of_a_pooled_effect_where_there_are_enough() -> None:
    def effects(*models: str) -> list[tuple[str, Ratio]]:
        return [(model, Ratio("int8", value, value * 0.99, value * 1.01)) for model in models for value in (0.8, 0.9)]

    two, three = claims.pooled(effects("a", "b")), claims.pooled(effects("a", "b", "c"))
    assert (two.units, two.count, three.units, three.count) == ("groups", 4, "models", 3)
    assert two.value == pytest.approx((0.8 * 0.9) ** 0.5)
    assert three.low == pytest.approx(three.value)  # each model gives the same
    assert (three.least, three.most) == (0.8, 0.9)
    alone = claims.pooled([("a", Ratio("int8", 0.9, 0.88, 0.93))])
    assert (alone.low, alone.high, alone.units) == (0.88, 0.93, "repetitions")


def test_the_claims_of_a_machine_that_is_as_the_paper_says(found: Findings) -> None:
    verdicts = {one.key: one.verdict for one in found.claims}
    for key in ("int8_weights", "int8_speed", "int4_speed", "gptq_between"):
        assert verdicts[key] == CONFIRMED, claim(found, key)
    assert verdicts["int8_loss"] == NOT_CONFIRMED  # 8 % are more than 5 %
    assert claim(found, "int8_speed").range == "0.9 to 0.95"
    assert claim(found, "int8_weights").range == "0.5 ± 5 %"


def test_a_claim_that_is_wrong_here_is_not_confirmed_and_one_without_data_is_not_judged() -> None:
    slow = find([measured(m, q, speed=0.5 if q == "int8" else 1.0) for m in MODELS for q in ("bf16", "int8")])
    assert claim(slow, "int8_speed").verdict == NOT_CONFIRMED
    assert claim(slow, "int8_speed").measured.startswith("0.46")
    four = claim(slow, "int4_speed")
    assert (four.verdict, four.measured) == (UNSAID, "–")
    assert "No cell of int4 was measured together with a 16-bit cell" in four.why
    assert claim(slow, "gptq_between").why == "No cell of gptq was measured beside both int8 and int4."
    assert claim(slow, "best_batch").why.startswith("It needs cells that differ only in batch")


def test_the_slope_of_memory_is_held_against_the_papers_bytes(found: Findings) -> None:
    assert claim(found, "memory_per_parameter_fp16").verdict == CONFIRMED
    assert claim(found, "memory_per_parameter_int8").verdict == CONFIRMED
    assert claim(found, "memory_per_parameter_fp32").verdict == UNSAID


def test_random_and_published_weights_are_in_one_study_and_told_apart() -> None:
    quants = ["bf16", "int8"]
    results = grid(quants=quants) + grid(["gemma-3-270m"], quants, weights="hub")
    both = find(results)
    assert any(
        "cells have random weights, 18 cells have published weights." in line
        for line in both.sentences["What was measured"]
    )
    assert {"gemma-3-270m (real)", "opt-125m (random)"} <= set(labels(both.focus.cells).values())
    law = next(one for one in both.scaling.laws if one.law.key == "throughput_by_size")
    assert len(law.cells) == 4


def test_prompts_of_one_length_may_say_anything_and_those_of_their_own_length_not() -> None:
    def with_text(one: RunResult, prompt: int | None) -> RunResult:
        return dataclasses.replace(
            one, cell=dataclasses.replace(one.cell, workload="qa", weights="hub", prompt_tokens=prompt)
        )

    three, last = [measured(m) for m in list(MODELS)[:3]], measured("gemma-3-270m")
    sizes = [law for law in find([*three, with_text(last, 128)]).scaling.laws if law.law.over == "parameters"]
    assert sizes and all(len(law.cells) == 4 for law in sizes)
    texts = [with_text(one, None) for one in three]
    other = dataclasses.replace(
        last, cell=dataclasses.replace(last.cell, weights="hub", prompt_tokens=None, workload="code")
    )
    sizes = [law for law in find([*texts, other]).scaling.laws if law.law.over == "parameters"]
    assert sizes and all(len(law.cells) == 3 for law in sizes)


def test_models_of_another_dtype_are_not_in_one_law() -> None:
    cells = [measured(m) for m in MODELS]
    other = dataclasses.replace(
        cells[0],
        load=dataclasses.replace(cells[0].load, facts={"model.parameters": 7 * 10**7, "model.dtype": "float16"}),
    )  # type: ignore[type-var]
    laws = find([other, *cells[1:]]).scaling.laws
    assert all(len(one.cells) == 3 for one in laws if one.law.over == "parameters")


def test_each_constraint_has_its_choice(found: Findings) -> None:
    own = {choice.constraint: choice.found.winner for choice in found.choices if choice.model == "opt-125m"}
    assert [constraint.partition(" ≤ ")[0] for constraint in own][:3] == [
        "the most tokens, whatever it takes",
        "memory",
        "time to first token",
    ]
    fastest = own["the most tokens, whatever it takes"]
    assert fastest and fastest.name == "quant=bf16 batch 16".replace("quant=", "")
    memory = next(winner for constraint, winner in own.items() if constraint.startswith("memory"))
    assert memory and memory.result.cell.quant == "gptq"  # the fastest of those in the lower half
    soonest = own["one user, the soonest answer"]
    assert soonest and soonest.result.cell.batch_size == 1


def test_suspect_cells_are_recommended_only_when_that_is_accepted() -> None:
    unsteady = [dataclasses.replace(one, steady=False) for one in grid(["opt-125m"], ["bf16"])]
    assert all(choice.found.winner is None for choice in find(unsteady).choices)
    assert all(choice.found.winner for choice in find(unsteady, accept_suspect="a busy machine").choices)


def test_each_limit_has_the_largest_model_that_keeps_it(found: Findings) -> None:
    """Rows by hand: TTFT 20 + 300·size·batch, TPOT 5 + 40·size + batch/2, in ms, divided by the speed."""
    rows = {one.constraint: one for one in found.deployments}
    assert [constraint.partition(" ≤ ")[0] for constraint in rows] == [
        "memory",
        *["first token"] * 3,
        "many users, each token within 50 ms",
        "any model: the most tokens",
        "any model: the soonest whole answer",
    ]
    chosen = {constraint: one.found.winner and one.found.winner.name for constraint, one in rows.items()}
    assert chosen["memory ≤ 0.5 GB"] == "pythia-160m bf16 batch 16"
    assert chosen["first token ≤ 50 ms"] == "pythia-70m bf16 batch 1"  # 41 ms; 57.5 and 68 for the others
    assert chosen["first token ≤ 100 ms"] == "pythia-160m bf16 batch 1"
    assert chosen["any model: the most tokens"] == "pythia-70m bf16 batch 16"
    second = rows["first token ≤ 100 ms"].second
    assert second and second.name == "pythia-70m bf16 batch 1"
    assert not any(one.better for one in rows.values())


def test_constraints_are_answered_at_every_measured_length(found: Findings, tmp_path: Path) -> None:
    """TTFT of the smallest model at 512 tokens: (20 + 21 · 4^0.8) = 84 ms, so nothing keeps 50 ms there."""
    assert found.focus.prompt == 128 and [one.prompt for one in found.lengths] == [64, 512]
    constraints = [one.constraint for one in found.deployments]
    short, long = (dict(zip(constraints, one.winners, strict=True)) for one in found.lengths)
    for winners, prompt in ((short, 64), (long, 512)):
        assert {one.result.cell.prompt_tokens for one in winners.values() if one} == {prompt}
    assert long["first token ≤ 50 ms"] is None and short["first token ≤ 50 ms"]
    most = long["any model: the most tokens"]
    assert most and most.name == "pythia-70m bf16 batch 16"
    artifacts.write_study(found, tmp_path)
    text = unescape((tmp_path / "study" / "report.md").read_text()).replace("\\", "")
    part = text[text.index("## At other prompt lengths") : text.index("## Findings")]
    assert "| constraint | 64 tokens | 512 tokens |" in part and "pythia-70m bf16 batch 16: " in part
    stored = json.loads((tmp_path / "study" / "study.json").read_text())
    assert [one["prompt_tokens"] for one in stored["deployments_by_length"]] == [64, 512]


def test_pruned_models_are_models_of_their_own_and_not_ranked_by_size() -> None:
    def pruned(one: RunResult) -> RunResult:
        hashes = dataclasses.replace(one.hashes, config=f"{one.hashes.config}-pruned")
        return dataclasses.replace(one, cell=dataclasses.replace(one.cell, prune="layers-25%"), hashes=hashes)

    whole = grid(["opt-125m"], ["bf16"])
    found = find([*whole, *map(pruned, whole)])
    assert set(labels(found.focus.cells).values()) == {"opt-125m", "opt-125m layers-25%"}
    assert all(one.found.winner and one.found.winner.result.cell.prune is None for one in found.deployments)
    assert "Pruned models are not in it" in deployment_lead(found)
    assert not any(len({m.cell.prune for m in law.cells}) > 1 for law in found.scaling.laws)


def test_claims_and_exponents_that_rest_on_suspect_cells_say_so(found: Findings, tmp_path: Path) -> None:
    assert not any(one.suspect for one in found.claims)
    doubtful = [
        dataclasses.replace(one, steady=False) if (one.cell.quant, one.cell.prompt_tokens) == ("int8", 512) else one
        for one in grid()
    ]
    seen = find(doubtful)
    int8 = claim(seen, "int8_speed")
    assert (int8.suspect, int8.cells) == (9, 54)  # three models, batches and lengths, each with its reference
    assert claim(seen, "int4_speed").suspect == 0 and claim(seen, "memory_per_parameter_int8").suspect == 0
    assert claim(seen, "throughput_by_batch_form").suspect == 9
    assert {surface.suspect for surface in seen.scaling.surfaces} == {(), (512.0,)}
    artifacts.write_study(seen, tmp_path)
    text = unescape((tmp_path / "study" / "report.md").read_text())
    assert "9 of the 54 cells that it rests on are suspect." in text
    assert "Suspect: 9 of 54 cells." in format_study(seen)
    [figure] = [chart.draw(seen.scaling) for chart in charts_of("scaling") if chart.name == "exponent_by_length"]
    assert "hollow: suspect" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_a_better_cell_that_was_left_out_is_named_with_what_would_settle_it(tmp_path: Path) -> None:
    """The fastest cell of the largest model is suspect, and the only one of a model that is larger still invalid."""
    suspect = [
        dataclasses.replace(one, steady=False) if (one.cell.quant, one.cell.batch_size) == ("bf16", 16) else one
        for one in grid(["opt-125m"], ["bf16", "int8"])
    ]
    found = find(suspect)
    [most] = [one for one in found.deployments if one.constraint == "any model: the most tokens"]
    assert most.found.winner and most.found.winner.name == "int8 batch 16"
    assert most.better and (most.better.candidate.name, most.better.why) == ("bf16 batch 16", "suspect (not_steady)")
    artifacts.write_study(found, tmp_path)
    text = unescape((tmp_path / "study" / "report.md").read_text()).replace("\\", "")
    assert text.index("## What to deploy") < text.index("## Findings")
    assert "bf16 batch 16, under " in text
    assert "of int8 batch 16, but suspect (not_steady). To settle it, measure it again: llmbench run --model" in text
    cells = text[text.index("## All cells") :]
    assert cells.count("| suspect") == 3 and cells.count("| valid") == 15
    accepted = find(suspect, accept_suspect="a busy machine").deployments
    assert not any(one.better for one in accepted)
    assert find([dataclasses.replace(one, steady=False) for one in suspect]).deployments == ()
    larger = dataclasses.replace(measured("gemma-3-270m", "int8", 16), steady=False)
    rows = {one.constraint: one for one in find([*suspect, larger]).deployments}
    budget = rows["memory ≤ 0.5 GB"]
    assert budget.better and budget.better.candidate.result.cell.model == "gemma-3-270m"


def test_accepted_suspect_results_are_marked_with_the_reason(tmp_path: Path) -> None:
    unsteady = [dataclasses.replace(one, steady=False) for one in grid(["opt-125m", "pythia-70m"], ["bf16"])]
    alone = measured("gemma-3-270m", prompt=256)
    artifacts.write_study(find([*unsteady, alone], accept_suspect="a busy machine"), tmp_path)
    text = unescape((tmp_path / "study" / "report.md").read_text())
    assert "Suspect results take part and are marked, because: a busy machine." in text
    assert "opt-125m batch 16 (suspect)" in text and "(suspect) (" in text
    assert "Models that were measured only at other lengths or elsewhere are not in it: gemma-3-270m." in text
    found = json.loads((tmp_path / "study" / "study.json").read_text())
    assert {one["accepted_suspect"] for one in found["deployments"]} == {"a busy machine"}
    none = find(unsteady)
    assert "- No configuration can be recommended: none is valid." in format_study(none)
    assert "Choices by model:\n-" not in format_study(none)


def test_models_of_one_size_are_told_apart_by_speed() -> None:
    first, second = grid(["opt-125m"], ["bf16"]), grid(["opt-125m"], ["bf16"], speed=1.5)
    second = [dataclasses.replace(one, cell=dataclasses.replace(one.cell, model="opt-125m-b")) for one in second]
    second = [
        dataclasses.replace(one, hashes=dataclasses.replace(one.hashes, config=f"b{i}")) for i, one in enumerate(second)
    ]
    rows = find([*first, *second]).deployments
    assert {one.found.winner and one.found.winner.result.cell.model for one in rows} == {"opt-125m-b"}
    assert {one.second and one.second.result.cell.model for one in rows} <= {"opt-125m", None}


def test_the_interval_of_a_quantizations_effect_is_that_of_compare() -> None:
    """Also where repetitions are disturbed, and with the noise between processes."""
    fast, slow = measured(), measured(quant="int8")
    for a, b in ((fast, slow), (with_slow_repetition(fast), slow)):
        [effect] = find([a, b]).effects
        told = compare(a, b).effect("throughput/output_tokens_per_s")
        assert told and (effect.speed.value, effect.speed.low, effect.speed.high) == pytest.approx(
            (told.ratio, told.low, told.high)
        )
    assert effect.speed.high and effect.speed.low and effect.speed.high / effect.speed.low > 1.5


def with_slow_repetition(one: RunResult) -> RunResult:
    """One repetition took five times as long."""
    last = one.repetitions[-1]
    [request] = last.requests
    late = dataclasses.replace(request, stamps_ns=tuple(5 * stamp for stamp in request.stamps_ns))
    return dataclasses.replace(one, repetitions=(*one.repetitions[:-1], dataclasses.replace(last, requests=(late,))))


def test_a_best_batch_needs_some_of_the_papers_range() -> None:
    few = find([measured(batch=batch) for batch in (1, 2)])
    assert (claim(few, "best_batch").verdict, claim(few, "best_batch").measured) == (UNSAID, "–")


def test_budgets_are_rows_while_their_answers_differ() -> None:
    def of(budget: float, model: str, quant: str) -> RunResult:
        one = measured(model, quant)
        return dataclasses.replace(one, memory=MemoryStages({}, {"peak": int(budget * 1e9)}))

    cells = [of(5, "gemma-3-270m", "bf16"), of(3, "gemma-3-270m", "int8"), of(1.5, "opt-125m", "bf16")]
    found = find([*cells, of(0.9, "opt-125m", "int8")])
    memory = {one.constraint: one.found.winner for one in found.deployments if one.constraint.startswith("memory")}
    assert {constraint: winner and winner.name for constraint, winner in memory.items()} == {
        "memory ≤ 1 GB": "opt-125m int8",
        "memory ≤ 2 GB": "opt-125m bf16",
        "memory ≤ 4 GB": "gemma-3-270m int8",
        "memory ≤ 8 GB": "gemma-3-270m bf16",
    }


def with_setting(one: RunResult, started_ms: int, **settings: Any) -> RunResult:
    return dataclasses.replace(one, cell=dataclasses.replace(one.cell, **settings), started_ms=started_ms)


@pytest.mark.parametrize(
    ("quant", "settings"), [("gptq", {"group_size": 64}), ("int4", {"quant_budget": "5.5", "quant": "mixed"})]
)
def test_settings_of_a_quantization_need_no_reference_that_has_them_too(quant: str, settings: dict[str, Any]) -> None:
    """Settings of a quantization have no effect without one: a sweep of bf16 serves every later sweep."""
    usual = [measured(quant=quant), measured()]
    other = with_setting(measured(quant=quant, speed=0.5), 5, **settings)
    found = find([*usual, other])
    speeds = [(e.measured.cell.group_size, e.quant, e.speed.value) for e in found.effects]
    assert [speed[:2] for speed in speeds] == [(128, quant), (other.cell.group_size, other.cell.quant)]
    assert speeds[1][2] == pytest.approx(speeds[0][2] / 2, rel=0.02)
    assert any(name in quant_.where for quant_ in found.scaling.quants for name in settings if name != "quant")


def test_no_pair_of_cells_counts_twice() -> None:
    """With two thresholds of LLM.int8 beside fp32 and bf16, fp32 against bf16 is one value, not one per threshold."""
    whole, single = measured(), with_setting(measured(speed=0.5), 3, quant="fp32")
    eights = [measured(quant="int8"), with_setting(measured(quant="int8", speed=0.9), 4, int8_threshold=0.0)]
    found = find([whole, single, *eights])
    assert sorted((e.quant, e.measured.cell.int8_threshold) for e in found.effects) == [
        ("fp32", 6),
        ("int8", 0.0),
        ("int8", 6),
    ]


def test_a_configuration_measured_twice_is_one_value_everywhere() -> None:
    """The newest valid result counts: in the effects, the laws, the choices and the figures."""
    cells = grid(["opt-125m"], ["bf16", "int8"])
    slower = [dataclasses.replace(measured(quant="int8", speed=0.5), started_ms=5000, ended_ms=6000)]
    suspect = [dataclasses.replace(measured(quant="int8", speed=0.2), started_ms=8000, ended_ms=9000, steady=False)]
    found = find([*cells, *slower, *suspect])
    own = [m for m in found.cells if (m.cell.quant, m.cell.batch_size, m.cell.prompt_tokens) == ("int8", 1, 128)]
    assert [m.result.started_ms for m in own] == [5000]
    speeds = {e.measured.result.started_ms: e.speed.value for e in found.effects if e.measured in own}
    assert speeds == {5000: pytest.approx(0.46, abs=0.01)}
    [efficiency] = [one for one in found.scaling.batches if one.where == "int8 prompt_tokens=128"]
    again = find([*(one for one in cells if one.hashes.config != slower[0].hashes.config), *slower])
    assert efficiency in again.scaling.batches
    assert [line for line in found.scaling.left_out if "measured again" in line] == [
        "int8 batch_size=1 prompt_tokens=128: measured again; the newest valid result of a configuration counts"
    ] * 2
    assert find([*cells, *cells]).scaling.left_out == ()


def test_prices_are_by_hardware_and_an_unknown_one_is_named() -> None:
    here, there = grid(["opt-125m"], ["bf16"]), grid(["opt-125m"], ["bf16"], speed=2.0, env="b")
    there = [dataclasses.replace(one, environment={"cpu": {"name": "Xeon", "usable_cpus": 8}}) for one in there]
    both = find(here + there, prices={"EPYC": 0.5, "xeon": 2.0})
    assert {machine.name: machine.price for machine in both.machines} == {"AMD EPYC, 2 CPUs": 0.5, "Xeon, 8 CPUs": 2.0}
    [line] = both.sentences["Machines"]
    assert line.startswith("Xeon, 8 CPUs has 2")
    assert len(both.across) == len(here)
    assert all(one.speed.value == pytest.approx(2, rel=0.01) for one in both.across)
    assert len(both.sentences["Cost"]) == 2
    with pytest.raises(
        UsageError,
        match=re.escape(
            "No machine of the study is called A100. "
            "Give the price for one of these, or for a part of its name: AMD EPYC, 2 CPUs."
        ),
    ):
        find(here, prices={"A100": 1.0})


def test_what_cannot_be_said_is_named_with_its_reason(found: Findings) -> None:
    said = dict(found.not_said)
    assert said["cost"] == "no price was given; give --price with money per hour"
    assert said["quality"] == "the weights are random"
    assert said["energy per token"] == "no energy counter could be read while it was measured on AMD EPYC, 2 CPUs"
    assert said["a comparison of machines"].startswith("all cells were measured on AMD EPYC, 2 CPUs")


@pytest.mark.charts
def test_quality_is_told_where_it_was_measured(tmp_path: Path) -> None:
    def judged(quant: str, kl: float, agree: int) -> RunResult:
        divergence = Divergence(
            "bf16", "d", ((kl, kl * 1.1), (kl * 0.9, kl)), tuple((n < agree, True) for n in range(2))
        )
        return dataclasses.replace(measured(quant=quant, weights="hub"), quality=Quality(divergence=divergence))

    results = [judged("bf16", 1e-6, 2), judged("int8", 0.01, 2), judged("int4", 0.2, 1)]
    with_quality = find(results)
    assert any(line.startswith("opt-125m int4: top-1 agreement 0.75") for line in with_quality.sentences["Quality"])
    assert "quality" not in dict(with_quality.not_said)
    names = {path.stem for path in artifacts.write_study(with_quality, tmp_path) if path.suffix == ".svg"}
    assert {"quality_against_speed", "quantization_radar"} <= names
    assert "quality not measured" not in (tmp_path / "study/charts/quantization_radar.svg").read_text()


EVERY = {
    "against_model_size", "against_batch_size", "against_prompt_length", "per_instance",
    "heatmap_throughput", "heatmap_ttft", "heatmap_tpot",
    "memory_against_model_size", "memory_by_quantization", "memory_against_throughput",
    "models", "quantization_effect", "quantization_radar",
}  # fmt: skip


@pytest.mark.charts
@pytest.mark.slow
def test_every_figure_is_drawn_or_its_reason_is_told(found: Findings, tmp_path: Path) -> None:
    files = artifacts.write_study(found, tmp_path)
    charts = {path for path in files if path.parent == tmp_path / "study/charts"}
    assert {path.stem for path in charts if path.suffix == ".svg"} == EVERY
    assert {path.stem for path in charts if path.suffix == ".png"} == EVERY
    report, page = (tmp_path / "study" / name for name in ("report.md", "report.html"))
    text = report.read_text()
    for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
        assert (report.parent / path).exists(), path
    assert "Cost by hardware: no price was given; give --price with money per hour." in text
    assert "Quality against speed: it needs two cells" in text
    told = json.loads((tmp_path / "study/study.json").read_text())
    assert {one["figure"] for one in told["not_drawn"]} == {
        "quality_against_speed",
        "cost_by_hardware",
        "machines",
        "by_hardware",
    }
    assert [one["verdict"] for one in told["claims"]] == [one.verdict for one in found.claims]
    html = page.read_text()
    assert not re.findall(r'(?:src|href)="(?!data:|#)', html)
    assert "<script" not in html
    assert html.count("<img ") == len(re.findall(r"!\[", text))
    for one in found.claims:
        assert one.said in unescape(html)


@pytest.mark.charts
def test_one_cell_draws_nothing_and_says_why(tmp_path: Path) -> None:
    alone = find([measured()])
    charts = [path for path in artifacts.write_study(alone, tmp_path) if path.suffix in (".svg", ".png")]
    assert charts == []
    text = (tmp_path / "study/report.md").read_text()
    assert "Against batch size: it needs two values of batch_size at 128 prompt tokens." in text
    assert all(one.verdict == UNSAID for one in alone.claims)


def test_what_more_rows_and_longer_prompts_do_is_said_although_a_cell_is_missing() -> None:
    cells = [one for one in grid(["opt-125m"], ["bf16"]) if (one.cell.batch_size, one.cell.prompt_tokens) != (16, 512)]
    said = find(cells).sentences
    assert said["Batch size"][0].startswith("From batch size 1 to 16 throughput is ")
    assert said["Batch size"][0].endswith("over 2 groups.")  # of three prompt lengths, those with both ends
    assert said["Prompt length"][0].startswith("From prompt length 64 to 512 throughput is 0.")


@pytest.mark.charts
def test_a_cell_that_failed_is_marked_in_the_maps(tmp_path: Path) -> None:
    good = [one for one in grid(["opt-125m"], ["bf16"]) if (one.cell.batch_size, one.cell.prompt_tokens) != (16, 512)]
    failed = dataclasses.replace(
        measured(batch=16, prompt=512), outcome="oom", repetitions=(), failure=Failure("measuring", "no memory left")
    )
    artifacts.write_study(find([*good, failed]), tmp_path)
    assert ">oom<" in (tmp_path / "study/charts/heatmap_throughput.svg").read_text()
