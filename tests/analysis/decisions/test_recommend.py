"""Recommendations: limits, the front, refusals with reasons, changes that would alter the answer; then the command."""

from __future__ import annotations

import dataclasses
import html
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from mlflow_llmbench import run
from mlflow_llmbench.analysis.decisions import recommend as analysis
from mlflow_llmbench.analysis.decisions.candidates import MEMORY, Limit, Measure, candidates, interval, names_of
from mlflow_llmbench.analysis.decisions.dominance import Judge
from mlflow_llmbench.analysis.decisions.recommend import GOALS, QUALITY_MEASURES, Recommendation, choose
from mlflow_llmbench.cli.main import main
from mlflow_llmbench.config.cells import config_hash
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.errors import UsageError
from mlflow_llmbench.records.results import Failure, Hashes, MemoryStages, RunResult
from mlflow_llmbench.reports.charts.catalogue import draw_charts
from mlflow_llmbench.reports.recommendation import (
    answer,
    format_recommendation,
    recommendation_cells,
    recommendation_json,
    recommendation_markdown,
)

from ...results import GB, WIGGLE, known_noise
from ...results import made as result

TTFT = Measure("median time to first token", ("latency/ttft_ms_p50",), "lower")

KNOWN = Judge(calibrations=(known_noise(result()),))
"""Judge of a machine whose processes are known not to differ."""


def recommend(results: Sequence[RunResult], *given: Any, **arguments: Any) -> Recommendation:
    """Choose among results of machines whose processes are known not to differ."""
    known = [known_noise(one) for one in results]
    return analysis.recommend(results, *given, **{"calibrations": known, **arguments})


INT4 = result("int4", 1, step=8, memory=2)
INT8 = result("int8", 1, step=12, memory=4)
BF16 = result("bf16", 1, step=10, memory=6)
INT8_8 = result("int8", 8, step=20, ttft=60, memory=7)
ALL = [INT4, INT8, BF16, INT8_8]


def _drawn(found: Recommendation, folder: Path) -> list[Path]:
    return list(draw_charts("recommendation", found, folder).files)


def names(found: Sequence[object]) -> list[str]:
    return [getattr(one, "candidate", one).name for one in found]


@pytest.mark.parametrize("known", [True, False])
def test_what_one_metric_tells_alone_is_what_the_whole_comparison_says(known: bool) -> None:
    """Holm's p value is computed only where the metric's own does not decide."""
    noise = random.Random(18)
    pairs, target = [], GOALS["throughput"]
    for number in range(60):
        spread, change = 0.002 + 0.02 * (number % 5), 1 + noise.choice([0, 0.002, 0.02, 0.05, 0.5])
        one, other = (
            result(quant, 1, 10 * by, 20 * by, factors=[noise.gauss(1, spread) for _ in range(5 + number % 20)])
            for quant, by in (("bf16", change), ("int8", 1.0))
        )
        pairs.append(candidates([one, other]))
    told = []
    for a, b in pairs:
        judge = Judge(calibrations=(known_noise(a.result),) if known else ())
        key = target.key(a.metrics)
        assert key is not None
        effect = judge.compare(a, b).effect(key)
        assert effect is not None
        expected = judge.looks_better(a, b, target) and effect.effect == "better"
        assert judge.surely_better(a, b, target) == expected, (effect, a.name)
        told.append(expected)
    assert 0 < sum(told) < len(told)


def test_the_fastest_within_the_limits_wins_and_the_others_are_told_why() -> None:
    found = recommend(ALL, "throughput", [Limit("--max-memory", MEMORY, 6.0)])
    assert found.winner is not None and found.winner.name == "int4 batch 1"
    assert names(found.runners_up) == ["bf16 batch 1", "int8 batch 1"]
    assert found.runners_up[0].why.startswith("It generates 0.8")
    assert "and needs 3.00 times the memory." in found.runners_up[0].why
    assert [(r.candidate.name, r.why) for r in found.refused] == [
        ("int8 batch 8", "Its peak memory is 7.00 GB, and --max-memory is 6 GB.")
    ]
    assert found.changes == (
        "With --max-memory 7 GB, int8 batch 8 would win: output throughput 286 tokens/s instead of 96.2 tokens/s.",
    )
    assert (
        "Deploy int4 batch 1, the best for output throughput within --max-memory 6 GB: output throughput 96.2 tokens/s"
        in answer(found)
    )


def test_the_front_keeps_what_is_best_at_something() -> None:
    found = recommend(ALL)
    assert found.winner is not None and found.winner.name == "int8 batch 8"
    assert names(found.front) == ["int8 batch 8", "int4 batch 1"]


def test_a_difference_that_chance_explains_dominates_nothing() -> None:
    wide = (1.0, 0.93, 1.07, 0.965, 1.035)
    near = result("bf16", factors=wide, step=10.3)
    found = recommend([result("int4", factors=wide), near])
    assert names(found.front) == ["int4", "bf16"]
    [other] = found.runners_up
    assert other.tied
    assert "bf16 (not measurably worse)" in format_recommendation(found)
    # The same means with narrow repetitions are a measured difference.
    narrow = recommend([result("int4"), result("bf16", step=10.3)])
    assert names(narrow.front) == ["int4"]
    assert not narrow.runners_up[0].tied


def test_better_in_one_thing_and_worse_in_another_dominates_nothing() -> None:
    faster = result("int4", step=5, memory=5)
    smaller = result("int8", step=10, memory=4)
    assert len(recommend([faster, smaller]).front) == 2
    assert names(recommend([result("int4", step=5, memory=4), smaller]).front) == ["int4"]


def test_memory_of_a_device_is_not_weighed_against_that_of_the_host() -> None:
    on_gpu = result("int4", step=5, memory=1)
    on_gpu = dataclasses.replace(on_gpu, memory=MemoryStages(host_needed={"peak": GB}, device={"peak": GB}))
    assert len(recommend([on_gpu, result("int8", memory=8)]).front) == 2


def test_ways_of_batching_and_of_keeping_a_history_are_configurations_of_their_own() -> None:
    base = result()

    def other(number: int, factor: float, **fields: Any) -> RunResult:
        cell = dataclasses.replace(base.cell, **fields)
        hashes = dataclasses.replace(base.hashes, config=config_hash(cell, base.model))
        return dataclasses.replace(result(step=10 * factor), cell=cell, hashes=hashes, ended_ms=2000 + number)

    stream = {"batching": "dynamic", "request_rate": 5.0}
    streams = [
        other(0, 1.2, **stream),
        other(1, 1.0, **stream, batch_wait_ms=20.0),
        other(2, 1.1, **(stream | {"batching": "continuous"})),
    ]
    found = recommend(streams, accept_suspect="made by hand")
    assert found.winner is not None and found.winner.name == "batching=dynamic batch_wait_ms=20"
    assert names(found.runners_up) == ["batching=continuous batch_wait_ms=100", "batching=dynamic batch_wait_ms=100"]
    assert found.refused == ()
    kept = recommend([other(0, 1.2, history="recomputed"), other(1, 1.0, history="kept")])
    assert kept.winner is not None and kept.winner.name == "history=kept"
    assert names(kept.runners_up) == ["history=recomputed"]


def test_a_rate_at_which_requests_come_is_no_configuration_to_choose() -> None:
    base = result()
    streams = [
        dataclasses.replace(
            result(step=step), cell=dataclasses.replace(base.cell, batching="static", request_rate=rate)
        )
        for rate, step in ((5.0, 10), (50.0, 5))
    ]
    [refused] = recommend(streams, accept_suspect="made by hand").refused
    assert "It cannot be compared with the 1 that are alike: request_rate 5 → 50." in refused.why


@pytest.mark.parametrize(
    ("goal", "winner"),
    [("throughput", "int8 batch 8"), ("latency", "int4 batch 1"), ("cost", "int8 batch 8"), ("energy", "int8 batch 8")],
)
def test_each_goal_has_its_metric(goal: str, winner: str) -> None:
    results = [dataclasses.replace(one, idle_w=10.0) for one in ALL]
    found = recommend(results, goal)
    assert found.winner is not None and found.winner.name == winner
    ends = interval(found.winner, found.objectives[0])
    assert ends is not None and ends[0] < found.winner.value(found.objectives[0]) < ends[1]


def test_a_goal_that_was_not_measured_is_no_answer() -> None:
    found = recommend(ALL, "energy")
    assert found.winner is None
    assert found.refused[0].why.startswith("It has no efficiency/joules_per_token. It needs an energy counter")
    assert "there is no trusted and comparable result" in answer(found)


def test_failed_and_invalid_results_are_never_chosen() -> None:
    failed = dataclasses.replace(
        result("fp32", step=1, factors=()), outcome="oom", failure=Failure("loading", "Memory ran out.")
    )
    short = result("fp4", step=1)
    short = dataclasses.replace(short, cell=dataclasses.replace(short.cell, output_tokens=6))
    found = recommend([failed, short, INT8], accept_suspect="all of it")
    assert found.winner is not None and found.winner.result is INT8
    told = {r.candidate.result.cell.quant: r.why for r in found.refused}
    assert told["fp32"] == "It ended with oom at stage loading: Memory ran out."
    assert told["fp4"] == "Its verdict is invalid (wrong_token_count). Its numbers are not used."
    assert recommend([failed]).winner is None


def test_suspect_results_take_part_only_if_that_is_accepted() -> None:
    few = result("int4", step=5, factors=WIGGLE[:3])
    found = recommend([few, INT8])
    assert found.winner is not None and found.winner.name == "int8"
    assert (
        found.refused[0].why
        == 'Its verdict is suspect (too_few_samples). Measure it again, or accept it with --accept-suspect "REASON".'
    )
    assert found.changes == (
        "int4 looks better and is suspect: output throughput 125 tokens/s instead of 73.5 tokens/s. "
        "If it is measured again and valid, it would win.",
    )
    accepted = recommend([few, INT8], accept_suspect="a first look")
    assert accepted.winner is not None and accepted.winner.name == "int4"
    assert accepted.accepted_suspect == "a first look"
    assert "It is suspect, and was accepted: a first look." in answer(accepted)
    assert [row[-1] for row in recommendation_cells(accepted)[1]] == ["winner, suspect", "runner-up"]


def test_the_larger_group_of_alike_results_is_weighed() -> None:
    elsewhere = result(
        "fp4", step=1, hashes=Hashes("fp4", "w", "other", "s", "e2"), environment={"cpu": {"name": "Xeon"}}
    )
    found = recommend([elsewhere, INT4, INT8])
    assert found.winner is not None and found.winner.name == "int4"
    why = next(r.why for r in found.refused if r.candidate.result is elsewhere)
    assert why.startswith("It cannot be compared with the 2 that are alike: CPU AMD EPYC → Xeon.")
    assert why.endswith("add --allow hardware.")
    allowed = recommend([elsewhere, INT4, INT8], allow=frozenset(["hardware"]))
    assert allowed.winner is not None and allowed.winner.name == "fp4"


def test_of_one_configuration_the_newest_measurement_counts() -> None:
    later = dataclasses.replace(result("int4", step=20), ended_ms=3000)
    found = recommend([INT4, later])
    assert found.winner is not None and found.winner.result is later
    assert [r.why for r in found.refused] == ["It was measured again later, and the newest counts."]


def test_one_configuration_on_two_machines_is_two_to_choose_from() -> None:
    later = result(
        "int4", step=40, hashes=Hashes("int41", "w", "other", "s", "e2"), environment={"cpu": {"name": "Xeon"}}
    )
    later = dataclasses.replace(later, ended_ms=9000)
    here = dataclasses.replace(INT4, hashes=Hashes("int41", "w", "h", "s", "e"))
    found = recommend([here, later], allow=frozenset(["hardware"]))
    assert found.winner is not None and found.winner.result is here
    assert (found.winner.name, [r.candidate.name for r in found.runners_up], found.refused) == (
        "fake:x int4 batch 1 on AMD EPYC (h)",
        ["fake:x int4 batch 1 on Xeon (other)"],
        (),
    )


def test_a_suspect_result_that_was_measured_again_promises_nothing() -> None:
    lucky = dataclasses.replace(result("int8", step=2), steady=False, ended_ms=1000)
    again = dataclasses.replace(INT8, ended_ms=5000)
    assert not any("looks better" in line for line in recommend([lucky, again, INT4]).changes)
    assert any("looks better" in line for line in recommend([lucky, INT4]).changes)


def test_a_percentile_that_no_test_is_made_of_dominates_nothing() -> None:
    measure = Measure("p95 time to first token", ("latency/ttft_ms_p95",), "lower")
    a, b = candidates([result(quant="int8"), result(quant="int4")])
    a, b = (
        dataclasses.replace(one, metrics={**one.metrics, "latency/ttft_ms_p95": p95})
        for one, p95 in ((a, 21.0), (b, 20.0))
    )
    assert not Judge().dominates(b, a, (GOALS["throughput"], measure))
    mean = Measure("mean time to first token", ("latency/ttft_ms_mean",), "lower")
    noisy, other = candidates(
        [
            result(quant="int8", factors=(0.8, 1.0, 1.3, 0.9, 1.1)),
            result(quant="int4", factors=(0.8, 1.0, 1.2, 0.9, 1.1)),
        ]
    )
    assert not Judge().dominates(other, noisy, (mean,))
    faster = candidates([result(quant="int8"), result(quant="int4", ttft=10)])
    assert KNOWN.dominates(faster[1], faster[0], (GOALS["throughput"], mean))


def test_quality_is_a_limit_and_absent_quality_is_not_good_quality() -> None:
    limit = Limit("--min-quality kl", QUALITY_MEASURES["kl"], 0.05)
    best, bad, absent = candidates([INT8, INT4, BF16])
    best, bad = (
        dataclasses.replace(one, metrics={**one.metrics, "quality/kl_vs_reference": kl})
        for one, kl in ((best, 0.04), (bad, 0.3))
    )
    found = choose([best, bad, absent], "throughput", [limit])
    assert found.winner is best
    told = {r.candidate.name: r.why for r in found.refused}
    assert told["int4"] == "Its KL divergence from the reference is 0.300 nats, and --min-quality kl is 0.05."
    assert told["bf16"].startswith("It has no quality/kl_vs_reference, so --min-quality kl 0.05 cannot be checked.")
    assert found.changes == (
        "With --min-quality kl 0.3, int4 would win: output throughput 96.2 tokens/s instead of 73.5 tokens/s.",
    )


def test_a_limit_inside_the_interval_is_a_caution() -> None:
    found = recommend([INT4], limits=[Limit("--max-ttft", TTFT, 20.05)])
    assert found.winner is not None
    [caution] = found.cautions
    assert "keeps --max-ttft 20.05 ms by its measured value only" in caution and "19.8 ms to 20.2 ms" in caution
    assert recommend([INT4], limits=[Limit("--max-ttft", TTFT, 21)]).cautions == ()


def test_nothing_keeps_the_limits() -> None:
    found = recommend(ALL, limits=[Limit("--max-memory", MEMORY, 1.0), Limit("--max-ttft", TTFT, 1.0)])
    assert found.winner is None and found.runners_up == ()
    assert found.changes[0].startswith(
        "int8 batch 8 is the nearest. Its peak memory is 7.00 GB, and --max-memory is 1 GB. "
        "Its median time to first token"
    )
    assert "none of the 4 trusted and comparable results meets the limits" in answer(found)
    data = json.loads(json.dumps(recommendation_json(found)))
    assert data["winner"] is None and len(data["refused"]) == 4


def test_wrong_use_of_the_function() -> None:
    with pytest.raises(UsageError, match="Unknown goal: speed. Known: throughput, latency, cost, energy"):
        recommend(ALL, "speed")
    with pytest.raises(UsageError, match="Unknown difference to allow: verdict"):
        recommend(ALL, allow=frozenset(["verdict"]))
    with pytest.raises(UsageError, match="no result to choose from"):
        recommend([])


def test_the_chart_and_the_markdown(tmp_path: Path) -> None:
    found = recommend(ALL, limits=[Limit("--max-memory", MEMORY, 6.0), Limit("--max-ttft", TTFT, 30)])
    files = _drawn(found, tmp_path)
    assert [file.name for file in files] == ["recommendation.svg", "recommendation.png"]
    text = files[0].read_text()
    assert all(
        name in text
        for name in ("int8 batch 8", "Peak memory (GB)", "Median time to first token (ms)", "winner", "limit")
    )
    assert _drawn(recommend([INT4]), tmp_path / "one") == []
    scored = [
        dataclasses.replace(one, metrics={**one.metrics, "quality/kl_vs_reference": 0.01})
        for one in candidates([INT8, INT4])
    ]
    files = _drawn(
        choose(scored, "throughput", [Limit("--min-quality", QUALITY_MEASURES["kl"], 0.05)]), tmp_path / "scored"
    )
    assert "KL divergence from the reference" in files[0].read_text()
    markdown = html.unescape(recommendation_markdown(found))
    assert "| int4 batch 1 | 96.2 tokens/s" in markdown and "- **int8 batch 8**: Its peak memory" in markdown


# The command

FAST = {"backend": "fake", "output_tokens": 6, "prompt_tokens": 4, "repetitions": 5, "warmup": 1}


@pytest.mark.charts
def test_the_command_logs_the_answer_on_the_sweeps_parent(store_uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = run(model="fake:ttft_ms=6+itl_ms=2+row_ms=0.2+memory_mb=8", batch_size="1,4", **FAST)
    arguments = [
        "recommend",
        sweep.parent_id or "",
        *"--max-ttft 1s --max-memory 6GB --accept-suspect".split(),
        "a busy test machine",
        "--json",
    ]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert out.startswith(
        "Deploy batch 4, the best for output throughput within --max-memory 6 GB, --max-ttft 1000 ms:"
    )
    assert f"Logged on run {sweep.parent_id}: recommendation.md." in out
    assert json.loads(out.splitlines()[-1])["winner"]["parameters"]["batch_size"] == 4
    client = MlflowClient(store_uri)
    assert {"recommendation.json", "recommendation.md"} <= {
        item.path for item in client.list_artifacts(sweep.parent_id or "")
    }
    assert "charts/recommendation.svg" in {item.path for item in client.list_artifacts(sweep.parent_id or "", "charts")}
    assert main([*arguments[:2], "--max-ttft", "1ms", "--accept-suspect", "x"]) == 1
    out = capsys.readouterr().out
    assert "Nothing is recommended" in out and "Register the winner" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--max-memory", "much"],
            "--max-memory is not a number with a unit (b,kb,mb,gb,tb,kib,mib,gib,tib): much. Give for example 6GB.",
        ),
        (
            ["--max-memory", "6"],
            "--max-memory is less than 1MB: 6. Give a size with its unit, such as 6GB or 500MB.",
        ),
        (
            ["--max-ttft", "200min"],
            "--max-ttft is not a number with a unit (us,µs,ms,s): 200min. Give for example 200ms.",
        ),
        (["--max-tpot", "p99=5ms"], "Unknown statistic in --max-tpot: p99. Known: mean, p50, p95."),
        (
            ["--min-quality", "bleu=3"],
            "Unknown quality: bleu. Known: kl, perplexity, bits_per_byte, top1. "
            "Give for example --min-quality kl=0.05.",
        ),
        (["--min-quality", "kl"], "--min-quality kl is not a number: . Give for example kl=0.05."),
        (["--goal", "speed"], "Unknown goal: speed. Known: throughput, latency, cost, energy, ttft, tpot, goodput."),
    ],
)
def test_bad_options_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow_llmbench.measure.journal import write_json

    write_json(tmp_path / "one" / "result.json", INT4)
    assert main(["recommend", str(tmp_path / "one"), *arguments]) == 2
    assert capsys.readouterr().err == f"llmbench: {message}\n"


def test_a_backend_that_the_quantization_tells_is_not_named() -> None:
    cells = [Cell(quant="int4"), Cell(quant="q4_k_m", backend="llama_cpp")]
    results = [result(cell=cell) for cell in cells]
    assert names_of(results) == ["int4", "q4_k_m"]
    other = dataclasses.replace(results[0], cell=Cell(quant="bf16", backend="llama_cpp"))
    assert names_of([*results, other]) == [
        "backend=transformers int4",
        "backend=llama_cpp q4_k_m",
        "backend=llama_cpp bf16",
    ]
