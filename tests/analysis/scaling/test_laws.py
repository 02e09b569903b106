"""Laws over records with known parameters: groups, intervals, rivals, cells left out, the report and the charts."""

import dataclasses
import html
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlflow_llmbench.analysis.scaling.laws import LawFit
from mlflow_llmbench.analysis.scaling.ranking import ranked
from mlflow_llmbench.analysis.scaling.roofline import roofline
from mlflow_llmbench.analysis.scaling.study import ScalingStudy, study_scaling
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.errors import OutOfRange, UsageError
from mlflow_llmbench.records.results import (
    Failure,
    Hashes,
    LoadInfo,
    MemoryStages,
    ModelFacts,
    Repetition,
    RequestRecord,
    RunResult,
)
from mlflow_llmbench.reports import artifacts
from mlflow_llmbench.reports.charts import scaling
from mlflow_llmbench.reports.charts.catalogue import draw_charts
from mlflow_llmbench.reports.scaling import format_scaling, scaling_json, scaling_markdown

MS = 1_000_000
BATCHES, LENGTHS = (1, 2, 4, 8, 16, 32), (128, 256, 512, 1024, 2048)
LOAD = LoadInfo(
    1.0, weight_bytes=10**9, step_bytes=10**9, kv_bytes_per_token=50_000, flops_per_token=2e9,
    facts={"model.parameters": 5 * 10**8, "model.dtype": "bfloat16"},
)  # fmt: skip


def result(
    cell: Cell,
    ttft_ms: float,
    tpot_ms: float,
    *,
    seed: int = 0,
    sigma: float = 0.005,
    env: str = "a",
    load: LoadInfo = LOAD,
    **other: Any,
) -> RunResult:
    """A measured cell of 6 repetitions whose times scatter by `sigma`."""
    draw, repetitions = np.random.default_rng(seed), []
    for index in range(6):
        first, gap = (value * MS * math.exp(draw.normal(0, sigma)) for value in (ttft_ms, tpot_ms))
        stamps = tuple(int(first + gap * i) for i in range(cell.output_tokens))
        repetitions.append(
            Repetition(index, 1000 + index, (RequestRecord(0, stamps, cell.batch_size, cell.prompt_tokens),))
        )
    peak = (
        400_000_000
        + (load.weight_bytes or 0)
        + 50_000 * cell.batch_size * ((cell.prompt_tokens or 0) + cell.output_tokens)
        + 10_000_000
    )
    stages = MemoryStages({}, {"baseline": 400_000_000, "loaded": 405_000_000 + (load.weight_bytes or 0), "peak": peak})
    hashes = Hashes(f"{hash(cell):016x}"[:16], "w", env, env, env)
    model = ModelFacts(cell.model, "preset", cell.model, "main")
    return RunResult(
        cell, "ok", seed, seed + 1, hashes, model, {}, load, repetitions=tuple(repetitions), memory=stages, **other
    )


def sweep(
    batches: Sequence[int] = BATCHES, lengths: Sequence[int] = LENGTHS, quant: str = "bf16", **other: Any
) -> list[RunResult]:
    """TTFT = 30 + 0.02·b·s^0.8 ms, TPOT = 20 + 1.5·b ms."""
    found = []
    for b in batches:
        for s in lengths:
            cell = Cell(model="opt-125m", quant=quant, batch_size=b, prompt_tokens=s, output_tokens=32, repetitions=6)
            found.append(result(cell, 30 + 0.02 * b * s**0.8, 20 + 1.5 * b, seed=100 * b + s, **other))
    return found


def law(study: ScalingStudy, key: str, where: str = "") -> LawFit:
    return next(found for found in study.laws if found.law.key == key and where in found.where)


def test_the_parameters_of_the_cells_come_back() -> None:
    study = study_scaling(sweep())
    assert study.subject == "opt-125m bf16"
    found = law(study, "latency_by_length", "batch_size=4")
    for name, truth in (("κ", 30.0), ("ν", 0.08), ("ω", 0.8)):
        parameter = found.fit.parameter(name)
        assert parameter.low is not None and parameter.high is not None
        assert parameter.low < truth < parameter.high
    assert found.where == "batch_size=4"
    assert [found.where for found in study.laws if found.law.key == "throughput_by_batch"] == [
        f"prompt_tokens={s}" for s in LENGTHS
    ]
    by_batch = law(study, "throughput_by_batch", "prompt_tokens=128")
    # 32 tokens take 30 + 0.02·b·128^0.8 + 31·(20 + 1.5·b) ms
    rival = by_batch.best.parameter("c")
    assert by_batch.best.form.formula == "T = b/(a + c·b)"
    assert (
        rival.low is not None
        and rival.high is not None
        and rival.low < (0.02 * 128**0.8 + 31 * 1.5) / 32e3 < rival.high
    )
    assert by_batch.refuted
    slope = law(study, "memory_by_tokens").fit.parameter("k")
    assert slope.value == pytest.approx(50_000e-9, rel=1e-3)
    assert study.refused == () and study.left_out == ()


def test_the_exponent_by_length_and_the_joint_laws() -> None:
    [surface] = study_scaling(sweep()).surfaces
    betas = [found.parameter("β").value for _, found in surface.exponents]
    assert [length for length, _ in surface.exponents] == list(LENGTHS)
    assert betas == sorted(betas, reverse=True)  # longer prompts leave less to gain
    formulas = [found.form.formula for found in surface.joint]
    assert formulas == ["T = α·b^β(s)", "T = α(s)·b^β(s)", "T = b/(a + c·b + d·b·s)"]
    linear = surface.joint[-1]
    assert ranked(surface.joint)[0] is linear
    assert linear.predict(8.0, 300.0).predicted
    with pytest.raises(OutOfRange):
        linear.predict(8.0, 4096.0)


def test_the_papers_joint_law_is_nearest_where_it_holds() -> None:
    found = []
    for s, beta in ((128, 0.8), (512, 0.6), (2048, 0.4)):
        for b in BATCHES:
            cell = Cell(model="opt-125m", batch_size=b, prompt_tokens=s, output_tokens=32)
            each = b * 32e3 / (100 * b**beta) / 32  # ms, of every token
            found.append(result(cell, each, each, seed=b + s))
    [surface] = study_scaling(found).surfaces
    law_ = ranked(surface.joint)[0]
    assert law_.form.formula == "T = α·b^β(s)"
    for (_, single), name, truth in zip(
        surface.exponents, ("β(128)", "β(512)", "β(2048)"), (0.8, 0.6, 0.4), strict=True
    ):
        for parameter in (law_.parameter(name), single.parameter("β")):
            assert parameter.low is not None and parameter.high is not None
            assert parameter.low < truth < parameter.high


def test_laws_over_model_size_with_the_papers_ranges() -> None:
    found = []
    for i, billions in enumerate((0.125, 0.35, 1.3, 2.7, 6.7)):
        weights = int(billions * 2e9)
        load = dataclasses.replace(LOAD, weight_bytes=weights, facts={"model.parameters": int(billions * 1e9)})
        cell = Cell(model=f"opt-{billions}b", quant="bf16", output_tokens=32)
        found.append(result(cell, 5 + 40 * billions, 10 * billions**0.5, seed=i, load=load))
    study = study_scaling(found)
    size, latency, memory = (law(study, key) for key in ("throughput_by_size", "latency_by_size", "memory_by_size"))
    assert size.where == "bf16"
    assert 0.4 < size.fit.parameter("δ").value < 0.65
    slope = latency.fit.parameter("β")
    assert slope.low is not None and slope.high is not None and slope.low < 40 < slope.high
    cost = memory.fit.parameter("c")
    assert cost.value == pytest.approx(2.0, rel=1e-3)
    assert "The paper's δ of 0.4 to 0.6 is compatible with this." in scaling_json(study)["laws"][0]["sentence"]
    assert {one["law"]: one["paper"] for one in scaling_json(study)["laws"]}["memory_by_size"] == (2.0, 2.0)


def test_unlike_machines_and_settings_are_never_fitted_together() -> None:
    here, there = sweep(lengths=[128]), sweep(lengths=[128], env="b")
    study = study_scaling([*here, *there])
    assert [len(found.cells) for found in study.laws if found.law.key == "throughput_by_batch"] == [6, 6]
    assert {found.where for found in study.laws if found.law.key == "throughput_by_batch"} == {
        "opt-125m bf16 on an unnamed machine [a]",
        "opt-125m bf16 on an unnamed machine [b]",
    }
    other = sweep(lengths=[128], quant="int8")
    assert [found.where for found in study_scaling([*here, *other]).laws if found.law.key == "throughput_by_batch"] == [
        "bf16",
        "int8",
    ]


def test_invalid_cells_are_left_out_by_name() -> None:
    good = sweep(lengths=[128])
    bad = dataclasses.replace(good[-1], cell=dataclasses.replace(good[-1].cell, output_tokens=64), started_ms=7)
    failed = dataclasses.replace(
        good[0], outcome="oom", repetitions=(), failure=Failure("generate", "No memory."), started_ms=8
    )
    study = study_scaling([*good, bad, failed])
    assert study.cells == 6
    assert study.left_out == ("batch_size=32 output_tokens=64: wrong_token_count", "batch_size=1 output_tokens=32: oom")
    assert (
        "Left out:\n- batch_size=32 output_tokens=64: wrong_token_count.\n- batch_size=1 output_tokens=32: oom."
        in format_scaling(study)
    )
    with pytest.raises(UsageError, match="None of the 1 results can be used: opt-125m bf16: oom"):
        study_scaling([failed])


def test_a_stream_is_left_out_for_what_it_is_and_not_for_its_verdict() -> None:
    good = sweep(lengths=[128])
    streams = dataclasses.replace(
        good[0], cell=dataclasses.replace(good[0].cell, batching="static", request_rate=5.0), started_ms=8
    )
    text = format_scaling(study_scaling([*good, streams]))
    assert (
        text.partition("Left out:\n")[2]
        .splitlines()[0]
        .endswith(": a stream of requests; the laws hold for batches of one shape.")
    )


def test_the_heading_names_what_was_studied_and_not_the_first_cell_alone() -> None:
    one = sweep(batches=[1, 2], lengths=[128])
    assert study_scaling(one).subject == "opt-125m bf16"
    two = [
        dataclasses.replace(r, cell=dataclasses.replace(r.cell, model="pythia-70m", quant="int8"), started_ms=7)
        for r in one
    ]
    study = study_scaling([*one, *two])
    assert study.subject == "opt-125m, pythia-70m"
    assert scaling_markdown(study).startswith("# Scaling: opt-125m, pythia-70m\n")
    many = [
        dataclasses.replace(r, cell=dataclasses.replace(r.cell, model=f"m{i}"), started_ms=10 + i)
        for i in range(6)
        for r in one
    ]
    assert study_scaling(many).subject == "m0, m1, m2, m3 and 2 more bf16"


def test_lengths_that_span_less_than_512_tokens_still_say_what_a_prompt_costs() -> None:
    """`preset=quick` has lengths of 64 to 512 tokens, 448 apart."""
    study = study_scaling(sweep(batches=[1], lengths=[64, 128, 256, 512]))
    [found] = study.exchanges
    assert found.exchange.prompt_tokens == 448
    assert found.exchange.prompt[0] == pytest.approx(0.02 * (512**0.8 - 64**0.8), rel=0.1)
    assert found.exchange.output[0] == pytest.approx(8 * 21.5, rel=0.02)
    assert any(
        sentence.startswith("448 more prompt tokens cost")
        for sentence in scaling_json(study)["sentences"]["Prompt against output"]
    )
    assert study_scaling(sweep(batches=[1])).exchanges[0].exchange.prompt_tokens == 512


def test_a_result_that_is_named_twice_counts_once() -> None:
    results = sweep(lengths=[128])
    assert study_scaling([*results, *results]).cells == 6


def test_two_points_are_refused_by_name_and_one_is_no_law() -> None:
    study = study_scaling(sweep(batches=[1, 8], lengths=[128]))
    assert study.laws == ()
    assert any(
        line.startswith("throughput against batch size (opt-125m bf16): T = α·b^β cannot be fitted: 2 distinct points")
        for line in study.refused
    )
    assert study_scaling(sweep(batches=[1], lengths=[128])).refused == ()


def test_predictions_lie_between_the_cells_and_are_marked() -> None:
    study = study_scaling(sweep(batches=[1, 2, 8, 32], lengths=[128]), at=[("batch_size", 6)])
    rates = {p.x[0]: p for found, p in study.predictions if found.law.key == "throughput_by_batch"}
    assert sorted(rates) == [4, 6, 16]
    truth = 4 * 32e3 / (30 + 0.08 * 128**0.8 + 31 * (20 + 6))
    assert rates[4].low < truth < rates[4].high
    assert all(p["predicted"] is True for p in scaling_json(study)["predictions"])
    with pytest.raises(OutOfRange, match="64 lies outside the measured range 1 to 32"):
        study_scaling(sweep(batches=[1, 2, 8, 32], lengths=[128]), at=[("batch_size", 64)])
    with pytest.raises(
        UsageError, match="No law over prompt_tokens was fitted, so prompt_tokens=200 cannot be predicted"
    ):
        study_scaling(sweep(batches=[1, 2, 8, 32], lengths=[128]), at=[("prompt_tokens", 200)])
    with pytest.raises(UsageError, match="not between 0 and 1: 0"):
        study_scaling(sweep(lengths=[128]), share=0)


def test_the_roofline_is_a_rival_where_the_machine_is_known() -> None:
    peaks = {"read_bytes_per_s": 2e10, "flops_per_s": 1e12}
    prefill, step = roofline(LOAD, peaks, 1, 128, 32) or (0, 0)
    assert (prefill, step) == (128 * 2e9 / 1e12, (10**9 + 50_000 * 144) / 2e10)
    assert roofline(LOAD, {}, 1, 128, 32) is None
    assert roofline(dataclasses.replace(LOAD, devices=2), peaks, 1, 128, 32) == pytest.approx((prefill / 2, step / 2))
    found = []
    for b in BATCHES:  # every cell at 60 % of its roofline
        prefill, step = roofline(LOAD, peaks, b, 128, 32) or (0, 0)
        cell = Cell(model="opt-125m", batch_size=b, prompt_tokens=128, output_tokens=32)
        found.append(result(cell, prefill * 1e3 / 0.6, step * 1e3 / 0.6, seed=b, peaks=peaks))
    law_ = law(study_scaling(found), "throughput_by_batch")
    assert law_.best.form.formula == "T = e·roofline"
    share = law_.best.parameter("share of roofline")
    assert share.low is not None and share.high is not None and share.low < 0.6 < share.high


def test_quantizations_are_measured_against_their_reference() -> None:
    whole = result(Cell(quant="bf16", output_tokens=32), 30, 20)
    small = result(Cell(quant="int8", output_tokens=32), 30, 25, load=dataclasses.replace(LOAD, weight_bytes=6 * 10**8))
    [found] = study_scaling([whole, small]).quants
    assert found.reference == "bf16"
    [speed], [memory] = found.efficiency, found.memory
    assert speed.value == pytest.approx((30 + 31 * 20) / (30 + 31 * 25), rel=0.01)
    assert (memory.theory, memory.weights) == (0.5, pytest.approx(0.4))
    assert memory.peak == pytest.approx(4e8 / 1.418e9)


def test_the_report_says_the_same_in_all_forms(tmp_path: Path) -> None:
    study = study_scaling(sweep(), at=[("batch_size", 6)])
    data = json.loads(json.dumps(scaling_json(study), allow_nan=False))
    text, markdown = format_scaling(study), html.unescape(scaling_markdown(study, ["charts/x.svg"]))
    for sentences in data["sentences"].values():
        for sentence in sentences:
            assert sentence in text and sentence in markdown
    assert "The 512" not in text
    assert any("512 more prompt tokens cost" in sentence for sentence in data["sentences"]["Prompt against output"])
    assert "No cliff in" in data["sentences"]["Latency cliffs"][0]
    found = law(study, "throughput_by_batch", "prompt_tokens=128")
    told = next(entry for entry in data["laws"] if entry["law"] == "throughput_by_batch")
    assert told["fit"]["parameters"]["β"]["value"] == found.fit.parameter("β").value
    assert told["fit"]["residuals"] == list(found.fit.residuals)
    assert "![charts/x.svg](charts/x.svg)" in markdown


@pytest.mark.charts
def test_charts_draw_the_cells_and_nothing_beyond_them(tmp_path: Path) -> None:
    study = study_scaling(sweep(batches=[1, 2, 8, 32], lengths=[128, 1024]))
    files = artifacts.write_scaling(study, tmp_path / "one")
    names = {file.relative_to(tmp_path / "one").as_posix() for file in files}
    keys = {"throughput_by_batch", "latency_by_batch", "memory_by_tokens", "exponent_by_length"}
    assert names == {"scaling.json", "scaling.md"} | {f"charts/{key}.{kind}" for key in keys for kind in ("svg", "png")}
    again = artifacts.write_scaling(study, tmp_path / "two")
    assert [file.read_bytes() for file in files] == [file.read_bytes() for file in again]
    figure = scaling._law_figure([law(study, "throughput_by_batch", "prompt_tokens=128")], study)
    [axes] = figure.axes
    drawn = {line.get_label(): line.get_xydata() for line in axes.get_lines()}
    assert set(drawn) == {"law", "nearest rival", "measured", "predicted"}
    for points in drawn.values():
        assert points[:, 0].min() >= 1 and points[:, 0].max() <= 32
    assert list(drawn["measured"][:, 0]) == [1, 2, 8, 32]
    assert list(drawn["predicted"][:, 0]) == [4, 16]


def test_charts_of_many_groups_write_plain_numbers_and_tell_the_groups_apart(tmp_path: Path) -> None:
    cells = [
        dataclasses.replace(
            one,
            cell=dataclasses.replace(one.cell, model=model, workload=workload),
            hashes=dataclasses.replace(one.hashes, config=f"{model} {one.hashes.config}"),
        )
        for model, workload in (("a-model-with-a-longer-name", "synthetic"), ("another-model-with-such-a-name", "qa"))
        for one in sweep(batches=[1, 8, 64], lengths=[128, 1024])
    ]
    study = study_scaling(cells)
    laws = tuple(found for found in study.laws if found.law.key == "latency_by_batch")
    figure = scaling._law_figure(laws, study)
    titles = [axes.get_title(loc="left") or axes.get_title() for axes in figure.axes]
    assert len(titles) == len(laws) == 4
    assert [" ".join(title.split()) for title in titles] == [found.where for found in laws]
    assert any(axes.get_yscale() == "log" for axes in figure.axes)
    drawn, _ = draw_charts("scaling", dataclasses.replace(study, laws=laws, surfaces=()), tmp_path).files
    assert "mathdefault" not in drawn.read_text()
