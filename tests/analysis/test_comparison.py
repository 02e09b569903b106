"""Comparisons: numbers worked out by hand, A against A by simulation, and the exact words of refusals."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from scipy import stats as reference

from mlflow_llmbench.analysis import comparison as analysis
from mlflow_llmbench.analysis.comparability import ALLOWABLE, differences
from mlflow_llmbench.analysis.comparison import Comparison, sentence
from mlflow_llmbench.analysis.repetitions import output_rate, unit_values
from mlflow_llmbench.analysis.summary import summarize
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.errors import NotComparable, UsageError
from mlflow_llmbench.records.metrics import KEYS
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
from mlflow_llmbench.reports.comparison import (
    comparison_json,
    comparison_markdown,
    comparisons_markdown,
    format_comparison,
    format_comparisons,
)
from mlflow_llmbench.stats import t_interval

from ..results import known_noise

MS = 1_000_000
MACHINE = {
    "cpu": {"name": "AMD EPYC", "usable_cpus": 8, "physical_cores": 4, "architecture": "x86_64"},
    "memory": {"total_bytes": 24 * 2**30},
    "gpus": [],
    "os": {"system": "Linux", "release": "6.1", "libc": "glibc 2.36"},
    "python": "3.11.7",
    "packages": {"torch": "2.12", "transformers": "5.0"},
    "driver": "550",
    "cuda": "12.4",
}
RATE, MEMORY = "throughput/output_tokens_per_s", "memory/host_needed_gb_peak"


def result(
    factors: Sequence[float], quant: str = "bf16", ttft: Sequence[float] | None = None, **fields: Any
) -> RunResult:
    """Repetitions of 5 tokens: the first after 20 ms, then gaps of 8, 12, 10 and 10 ms, all times a factor each.

    TTFT can have its own factors.
    """
    repetitions = []
    for index, factor in enumerate(factors):
        t0 = index * 1000 * MS
        times = [20 * (ttft[index] if ttft else factor)]
        for gap in (8, 12, 10, 10):
            times.append(times[-1] + gap * factor)
        repetitions.append(
            Repetition(index, index, (RequestRecord(t0, tuple(t0 + round(time * MS) for time in times), 1, 8),))
        )
    base = RunResult(
        Cell(quant=quant, prompt_tokens=8, output_tokens=5, repetitions=max(len(factors), 1)),
        "ok",
        0,
        1,
        Hashes("c", "w", "h", "s", "e"),
        ModelFacts("opt", "folder", "/opt", "r"),
        MACHINE,
        LoadInfo(2.0, weight_bytes=4 * 10**9),
        repetitions=tuple(repetitions),
        steady=True,
        memory=MemoryStages(host_needed={"peak": 5 * 10**9}),
    )
    return dataclasses.replace(base, **fields)


def compare(a: RunResult, b: RunResult, **arguments: Any) -> Comparison:
    """Compare on a machine whose processes are known not to differ."""
    return analysis.compare(a, b, **{"calibrations": [known_noise(a)], **arguments})


def spread(scale: float, n: int = 5) -> list[float]:
    """Factors around `scale` whose logarithms lie evenly over a width of 0.02: mean and variance are known."""
    return [scale * math.exp(0.02 * (i / (n - 1) - 0.5)) for i in range(n)]


BF16 = result(spread(1.0))
INT4 = result(
    spread(0.75),
    "int4",
    load=LoadInfo(3.0, weight_bytes=10**9),
    memory=MemoryStages(host_needed={"peak": 2_750_000_000}),
)


def test_ratio_interval_and_p_by_hand() -> None:
    """Logarithms −0.01 … 0.01 in steps of 0.005 have variance 6.25e-5.

    Two samples of 5 give t on 8 degrees with error √(2 · 6.25e-5/5) = 0.005.
    """
    rate = compare(BF16, INT4).effect(RATE)
    assert rate.ratio == pytest.approx(1 / 0.75, rel=1e-6)
    half = 2.30600414 * 0.005
    assert (rate.low, rate.high) == (
        pytest.approx(math.exp(-half) / 0.75, rel=1e-6),
        pytest.approx(math.exp(half) / 0.75, rel=1e-6),
    )
    assert rate.a == pytest.approx(np.mean([5 / 0.060 / f for f in spread(1.0)]), rel=1e-6)
    assert rate.a == pytest.approx(summarize(BF16)[RATE])
    assert rate.effect == "better"
    assert rate.p_holm < 1e-6
    assert rate.p_ranks is None


def test_each_metric_has_its_own_definition_and_direction() -> None:
    comparison = compare(BF16, INT4)
    values = {effect.key: effect.a for effect in comparison.effects}
    centre = np.mean(spread(1.0))
    assert values["latency/ttft_ms_mean"] == pytest.approx(20 * centre, rel=1e-6)
    assert values["latency/itl_ms_p50"] == pytest.approx(10)  # the median, as in the table of a run
    assert values["latency/tpot_ms_mean"] == pytest.approx(10 * centre, rel=1e-6)
    assert values["latency/e2e_ms_mean"] == pytest.approx(60 * centre, rel=1e-6)
    assert {effect.key: effect.effect for effect in comparison.effects if effect.p_holm is not None} == dict.fromkeys(
        [RATE, "latency/ttft_ms_mean", "latency/itl_ms_p50", "latency/tpot_ms_mean", "latency/e2e_ms_mean"], "better"
    )
    assert {e.effect for e in compare(INT4, BF16).effects if e.p_holm is not None} == {"worse"}
    single = {e.key: (e.ratio, e.effect) for e in comparison.effects if e.p_holm is None}
    assert single == {
        MEMORY: (0.55, "not tested"),
        "memory/weight_gb": (0.25, "not tested"),
        "load/load_s": (1.5, "not tested"),
    }
    assert {effect.key for effect in comparison.effects} <= set(KEYS)


def test_sentence_to_quote() -> None:
    assert sentence(compare(BF16, INT4)) == (
        "int4 generates 1.33 times the tokens per second of bf16 (95 % interval 1.32 to 1.35) and needs 0.55 times the "
        "memory."
    )


def test_sentence_without_a_difference() -> None:
    other = result(spread(1.001), "fp16")
    assert sentence(compare(BF16, other)) == (
        "fp16 generates tokens no measurably faster or slower than bf16 (ratio 1.00, 95 % interval 0.99 to 1.01) and "
        "needs the same memory."
    )


def test_sentence_below_the_noise_threshold() -> None:
    steady = result([1.0, 1.0001, 0.9999, 1.0, 1.0], memory=MemoryStages())
    other = result([0.995, 0.9951, 0.9949, 0.995, 0.995], "fp16", memory=MemoryStages())
    comparison = compare(steady, other)
    assert comparison.effect(RATE).effect == "below the noise threshold"
    assert sentence(comparison) == (
        "fp16 generates tokens as fast as bf16 within the noise threshold of 1 % (ratio 1.0050, 95 % interval 1.0049 "
        "to 1.0051)."
    )
    assert compare(steady, other, noise=0.001).effect(RATE).effect == "better"


def test_sentence_of_single_repetitions() -> None:
    comparison = compare(result([1.0]), result([0.5], "int4", memory=MemoryStages()))
    assert sentence(comparison) == (
        "int4 generates 2.00 times the tokens per second of bf16 (one value, no interval). "
        "The verdict on bf16 is suspect (too_few_samples); that on int4 is suspect (too_few_samples)."
    )
    assert {effect.effect for effect in comparison.effects} == {"not tested"}
    assert format_comparison(comparison).endswith(
        "Nothing was tested: a test needs at least 2 repetitions on each side."
    )


def test_terminal_table() -> None:
    assert (
        format_comparison(compare(BF16, INT4))
        == """\
int4 generates 1.33 times the tokens per second of bf16 (95 % interval 1.32 to 1.35) and needs 0.55 times the memory.

                     bf16   int4  ratio   95 % interval  p (Holm)  effect
tokens/s            83.34  111.1   1.33    1.32 to 1.35    <0.001  better
TTFT mean ms        20.00  15.00  0.750  0.741 to 0.759    <0.001  better
ITL p50 ms          10.00  7.500  0.750  0.741 to 0.759    <0.001  better
TPOT mean ms        10.00  7.500  0.750  0.741 to 0.759    <0.001  better
end to end mean ms  60.00  45.00  0.750  0.741 to 0.759    <0.001  better
host peak GB        5.000  2.750   0.55               –         –  not tested
weights GB          4.000  1.000   0.25               –         –  not tested
load s              2.000  3.000   1.50               –         –  not tested

Welch's t test on the logarithms of 5 and 5 repetitions; p adjusted for 5 metrics (Holm); noise threshold 1 %. \
Values are those of the runs; ratios are those of geometric means over repetitions. One process of bf16 and int4 was \
measured; added to their error is the noise between processes, that of 10 processes of model none, as calibrated on \
1970-01-01: a standard deviation of 0 % in output throughput (1e+06 degrees of freedom)."""
    )


def test_several_comparisons_say_once_what_their_ratios_are() -> None:
    several = [compare(BF16, INT4), compare(INT4, BF16), compare(result([1.0]), result([0.5], "int4"))]
    once = "Values are those of the runs; ratios are those of geometric means over repetitions."
    for told in (format_comparisons(several), comparisons_markdown(several)):
        assert told.count(once) == 1 and told.count("Welch's t test") == 2
        assert told.index(once) > told.rindex("Welch's t test")
    assert format_comparisons(several[:1]) == format_comparison(several[0])


def test_markdown() -> None:
    lines = comparison_markdown(compare(BF16, INT4)).splitlines()
    assert lines[2:5] == [
        "|  | bf16 | int4 | ratio | 95 % interval | p (Holm) | effect |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
        "| tokens/s | 83.34 | 111.1 | 1.33 | 1.32 to 1.35 | <0.001 | better |",
    ]


def test_ranks_are_tested_where_there_are_enough() -> None:
    comparison = compare(
        *(in_processes([[f] for f in spread(scale, 8)], quant) for scale, quant in ((1.0, "bf16"), (0.75, "int4")))
    )
    assert comparison.effect(RATE).p_ranks == pytest.approx(2 / math.comb(16, 8))  # exact: no pair the other way round
    assert "p (ranks)" in format_comparison(comparison)
    alone = compare(result(spread(1.0, 8)), result(spread(0.75, 8), "int4"))
    assert alone.effect(RATE).p_ranks is None  # ranks of repetitions say nothing of the noise between processes


def test_pairs_see_through_a_drift_that_both_share() -> None:
    """Both slow down by a third; in each pair B takes 3 % less time, with a little noise.

    Welch sees the drift, the paired test sees the 3 %.
    """
    drift = [1.0, 1.1, 1.2, 1.25, 1.3, 1.35]
    noise = [0.969, 0.971, 0.97, 0.9695, 0.9705, 0.97]
    a, b = result(drift), result([d * n for d, n in zip(drift, noise, strict=True)], "int4")
    assert compare(a, b).effect(RATE).effect == "no difference seen"
    rate = compare(a, b, paired=True).effect(RATE)
    assert rate.effect == "better"
    assert rate.low < 1 / 0.97 < rate.high
    assert "Paired t test on the logarithms of 6 pairs of repetitions" in format_comparison(compare(a, b, paired=True))
    with pytest.raises(
        UsageError, match="Paired results need as many repetitions on both sides: 6 and 5. Compare them without paired."
    ):
        compare(a, INT4, paired=True)


def test_memory_is_not_compared_across_host_and_device() -> None:
    gpu = result(spread(0.5), "fp16", memory=MemoryStages(host_needed={"peak": 10**9}, device={"peak": 4 * 10**9}))
    assert compare(BF16, gpu).memory is None
    assert compare(gpu, dataclasses.replace(gpu, ended_ms=2)).memory.key == "memory/device_gb_peak"


def test_names_are_what_differs() -> None:
    def names(**changes: Any) -> tuple[str, str]:
        comparison = compare(BF16, dataclasses.replace(INT4, cell=dataclasses.replace(BF16.cell, **changes)))
        return comparison.name_a, comparison.name_b

    assert names(quant="int4", repetitions=9) == ("bf16", "int4")
    assert names(model="org/other-1b", threads=2) == ("opt-125m threads=auto", "other-1b threads=2")
    assert names(quant="none") == ("bf16", "quant=none")
    assert names() == ("A", "B")


def unlike(
    base: RunResult, *, hashes: dict[str, str] | None = None, environment: dict[str, Any] | None = None, **fields: Any
) -> RunResult:
    return dataclasses.replace(
        base,
        hashes=dataclasses.replace(base.hashes, **(hashes or {})),
        environment={**base.environment, **(environment or {})},
        **fields,
    )


OTHER_GPUS = [{"name": "NVIDIA H200", "memory_bytes": 141 * 10**9}] * 2
UNLIKE = {
    "hardware": (
        unlike(
            INT4, hashes={"hardware": "x"}, environment={"cpu": {**MACHINE["cpu"], "name": "Xeon"}, "gpus": OTHER_GPUS}
        ),
        "hardware: CPU AMD EPYC → Xeon, GPU none → 2 × NVIDIA H200 (141 GB)",
    ),
    "software": (
        unlike(
            INT4,
            hashes={"software": "x"},
            environment={"driver": "570", "packages": {"torch": "2.13", "transformers": "5.0", "gguf": "0.1"}},
        ),
        "software: driver 550 → 570, torch 2.12 → 2.13, gguf none → 0.1",
    ),
    "workload": (
        unlike(
            INT4,
            hashes={"workload": "x"},
            cell=dataclasses.replace(INT4.cell, seed=1),
            load=LoadInfo(3.0, vocab_size=32000),
        ),
        "workload: seed 0 → 1, vocabulary none → 32000 tokens",
    ),
    "scenario": (
        dataclasses.replace(INT4, cell=dataclasses.replace(INT4.cell, url="http://127.0.0.1:8000")),
        "scenario: scenario offline → online",
    ),
    "schema": (dataclasses.replace(INT4, schema=2), "schema: schema 1 → 2"),
    "verdict": (
        dataclasses.replace(INT4, cell=dataclasses.replace(INT4.cell, output_tokens=6)),
        "verdict: verdict valid → invalid (wrong_token_count)",
    ),
}
"""Kind → a result that differs from `BF16` only in this kind, and how the refusal lists the difference."""


def test_every_kind_has_a_case() -> None:
    assert tuple(UNLIKE) == ALLOWABLE


@pytest.mark.parametrize("kind", UNLIKE)
def test_unlike_results_are_refused(kind: str) -> None:
    other, listed = UNLIKE[kind]
    with pytest.raises(NotComparable) as caught:
        compare(BF16, other)
    assert str(caught.value) == (
        f"The two results are not alike. {listed}. Measure both in the same way, or compare them anyway, with labels, "
        f"with --allow {kind}."
    )
    assert "\n" not in str(caught.value)
    with pytest.raises(NotComparable):
        compare(BF16, other, allow=frozenset(ALLOWABLE) - {kind})


@pytest.mark.parametrize("kind", UNLIKE)
def test_unlike_results_are_labelled_when_allowed(kind: str) -> None:
    other, listed = UNLIKE[kind]
    comparison = compare(BF16, other, allow=frozenset({kind}))
    assert f"{kind}: {', '.join(map(str, comparison.labels))}" == listed
    if kind == "verdict":
        assert sentence(comparison).endswith(" The verdict on int4 output_tokens=6 is invalid (wrong_token_count).")
        assert "conditions were not alike" not in sentence(comparison)
    else:
        told = listed.removeprefix(f"{kind}: ")
        assert f" The conditions were not alike: {told}." in sentence(comparison)
        assert told in format_comparison(comparison)
        assert told in comparison_markdown(comparison)


def test_all_kinds_are_named_at_once() -> None:
    other = unlike(INT4, hashes={"hardware": "x", "software": "y", "workload": "z"}, environment={"driver": "570"})
    with pytest.raises(NotComparable) as caught:
        compare(BF16, other)
    assert str(caught.value) == (
        "The two results are not alike. hardware: hardware hash h → x; software: driver 550 → 570; workload: workload "
        "hash w → z. Measure both in the same way, or compare them anyway, with labels, with --allow "
        "hardware,software,workload."
    )
    assert caught.value.exit_code == 2


def test_gpus_are_told_apart_by_what_their_drivers_told() -> None:
    part = {"name": "NVIDIA H100", "memory_bytes": 10 * 10**9, "mig": True, "multiprocessors": 16}
    unknown = {"name": "NVIDIA GB10", "memory_bytes": None}
    before, after = (
        dataclasses.replace(
            BF16, environment=MACHINE | {"gpus": gpus}, hashes=dataclasses.replace(BF16.hashes, hardware=str(len(gpus)))
        )
        for gpus in ([part], [unknown, part | {"multiprocessors": 32}])
    )
    assert list(map(str, differences(before, after))) == [
        "GPU NVIDIA H100 (10 GB, MIG, 16 multiprocessors) → NVIDIA GB10 + NVIDIA H100 (10 GB, MIG, 32 multiprocessors)"
    ]


def test_facts_that_an_earlier_version_did_not_record_are_no_differences() -> None:
    later = {"cuda_runtime": "12.6", "rocm": None, "cudnn": "9.10", "nccl": None}
    cpu = MACHINE["cpu"] | {"quota_cpus": 2.0}
    before = dataclasses.replace(BF16, environment=MACHINE)
    hashes = dataclasses.replace(BF16.hashes, hardware="with a quota", software="with libraries")
    after = dataclasses.replace(BF16, environment=MACHINE | later | {"cpu": cpu}, hashes=hashes)
    assert differences(before, after) == differences(after, before) == []
    hashes = dataclasses.replace(hashes, hardware="another quota", software="another library")
    other = MACHINE | later | {"cudnn": "9.1", "driver": "560", "cpu": cpu | {"quota_cpus": 1.5}}
    changed = dataclasses.replace(BF16, environment=other, hashes=hashes)
    assert list(map(str, differences(after, changed))) == [
        "CPU quota 2 CPUs → 1.5 CPUs",
        "driver 550 → 560",
        "cuDNN 9.10 → 9.1",
    ]
    assert list(map(str, differences(before, changed))) == ["driver 550 → 560"]
    unexplained = dataclasses.replace(before, hashes=dataclasses.replace(BF16.hashes, software="x"))
    assert list(map(str, differences(before, unexplained))) == [f"software hash {BF16.hashes.software} → x"]


def test_alike_results_have_no_differences() -> None:
    """Facts outside the hash, such as the commit or the size of a cache, do not count as a difference."""
    assert (
        differences(
            BF16, unlike(INT4, environment={"git": "abc", "cpu": {**MACHINE["cpu"], "last_level_cache_bytes": 1}})
        )
        == []
    )


def test_when_requests_come_is_workload_and_how_many_users_there_are_is_not() -> None:
    def stream(**fields: Any) -> RunResult:
        return dataclasses.replace(
            BF16, cell=dataclasses.replace(BF16.cell, **({"url": "http://127.0.0.1:1", "request_rate": 5.0} | fields))
        )

    assert differences(stream(), stream()) == []
    for name, value, listed in (
        ("request_rate", 8.0, "request_rate 5 → 8"), ("ramp_to", 9.0, "ramp_to none → 9"),
        ("arrival", "constant", "arrival poisson → constant"), ("seed", 1, "seed 0 → 1"),
        ("requests", 40, "requests auto → 40"),
    ):  # fmt: skip
        [found] = differences(stream(), stream(**{name: value}))
        assert (found.kind, str(found)) == ("workload", listed)
    assert differences(stream(request_rate=None), stream(request_rate=None, concurrency=4, seed=1)) == []
    assert [str(found) for found in differences(stream(request_rate=None), stream())] == ["request_rate none → 5"]


def test_conversations_as_one_prompt_are_not_those_turn_by_turn() -> None:
    turns = unlike(INT4, hashes={"workload": "x"}, cell=dataclasses.replace(BF16.cell, history="kept"))
    assert [str(difference) for difference in differences(BF16, turns)] == [
        "conversations as one prompt → turn by turn"
    ]


def test_nothing_measured_cannot_be_allowed() -> None:
    failed = dataclasses.replace(result([], "int4"), outcome="oom", failure=Failure("loading", "Memory ran out."))
    with pytest.raises(
        NotComparable, match="int4 has no repetitions: its outcome is oom. Measure it again, or compare another run."
    ):
        compare(BF16, failed, allow=frozenset(ALLOWABLE))


def test_a_repetition_without_time_to_its_first_token_has_a_ratio_but_no_test() -> None:
    """The logarithm of 0 is none: the metric is shown and not tested, the others are."""
    at_once = result(spread(1.0), "int4", ttft=[0.0, 1.0, 1.0, 1.0, 1.0])
    for a, b in ((BF16, at_once), (at_once, BF16)):
        compared = compare(a, b)
        first = compared.effect("latency/ttft_ms_mean")
        assert (first.low, first.high, first.p_value) == (None, None, None) and 0 in (*first.values_a, *first.values_b)
        assert compared.effect("latency/itl_ms_p50").p_value is not None


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(
        UsageError,
        match="Unknown kind of difference to allow: weather. "
        "Known: hardware, software, workload, scenario, schema, verdict.",
    ):
        compare(BF16, INT4, allow=frozenset({"weather", "hardware"}))
    with pytest.raises(UsageError, match="The noise threshold is not a ratio from 0 to below 1: 5"):
        compare(BF16, INT4, noise=5)


def drawn(rng: np.random.Generator, n: int, scale: float = 1.0) -> RunResult:
    """A result of n repetitions with lognormal noise: 3 % on the whole repetition, 2 % more on the first token."""
    factors = scale * rng.lognormal(0, 0.03, n)
    return result(factors.tolist(), ttft=(factors * rng.lognormal(0, 0.02, n)).tolist())


def alarmed(comparison: Comparison) -> bool:
    return any(effect.p_holm is not None and effect.p_holm < 0.05 for effect in comparison.effects)


@pytest.mark.parametrize("in_pairs", [False, True])
def test_a_against_a_raises_few_alarms(in_pairs: bool) -> None:
    """Of 1,000 comparisons of like with like at most 5 % show a difference in any metric, below the noise or not.

    The share's standard deviation at 5 % is 0.7 %. The metrics depend on each other, which makes Holm stricter: about
    2 % are seen, and 8 % without the adjustment.
    """
    rng = np.random.default_rng(20)
    alarms = 0
    for _ in range(1000):
        n = int(rng.integers(5, 11))
        a, b = drawn(rng, n), drawn(rng, n if in_pairs else int(rng.integers(5, 11)))
        alarms += alarmed(compare(a, b, paired=in_pairs))
    assert alarms <= 50


def test_a_difference_of_ten_percent_is_found_and_its_interval_holds_the_truth() -> None:
    """Of 400 with 5 to 10 repetitions of 3 % noise, at least 95 % find the loss of rate; 95 ± 3.3 % hold it (3 sd)."""
    rng = np.random.default_rng(21)
    found = held = 0
    for _ in range(400):
        rate = compare(drawn(rng, int(rng.integers(5, 11))), drawn(rng, int(rng.integers(5, 11)), 1.1)).effect(RATE)
        found += rate.effect == "worse"
        held += rate.low <= 1 / 1.1 <= rate.high
    assert found >= 380
    assert 0.917 <= held / 400 <= 0.983


def in_processes(factors: Sequence[Sequence[float]], *args: Any, **fields: Any) -> RunResult:
    """A result whose repetitions have these factors, process by process."""
    flat = result([factor for own in factors for factor in own], *args, **fields)
    numbers = [number for number, own in enumerate(factors) for _ in own]
    return dataclasses.replace(
        flat,
        repetitions=tuple(dataclasses.replace(r, process=n) for r, n in zip(flat.repetitions, numbers, strict=True)),
    )


def test_each_process_is_one_value_by_hand() -> None:
    """Five processes of 2 or 3 equal repetitions give the interval and p of five single repetitions, as above."""
    a = in_processes([[f] * (2 + i % 2) for i, f in enumerate(spread(1.0))])
    b = in_processes([[f] * 2 for f in spread(0.75)], "int4")
    comparison = compare(a, b)
    plain = compare(BF16, INT4)
    for key in (RATE, "latency/ttft_ms_mean", "latency/itl_ms_p50", "latency/e2e_ms_mean"):
        found, expected = comparison.effect(key), plain.effect(key)
        assert (found.ratio, found.low, found.p_value) == pytest.approx(
            (expected.ratio, expected.low, expected.p_value)
        )
        assert found.a == summarize(a)[key]
    assert comparison.effect(RATE).a == pytest.approx(summarize(a)[RATE])
    assert (comparison.repetitions, comparison.processes) == ((12, 10), (5, 5))


def test_a_process_gives_the_mean_of_its_repetitions() -> None:
    a, b = in_processes([[1.0, 1.2], [0.9, 1.3]]), in_processes([[1.0, 1.0], [1.0, 1.0]], "int4")
    e2e = compare(a, b).effect("latency/e2e_ms_mean")
    assert e2e.a == pytest.approx(66)
    assert (e2e.ratio, e2e.low) == (pytest.approx(1 / 1.1), pytest.approx(1 / 1.1))  # both processes have the mean 1.1
    assert compare(a, b).effect(RATE).a == pytest.approx(np.mean([5 / 0.060 / f for f in (1.0, 1.2, 0.9, 1.3)]))


def test_texts_say_which_unit_was_used() -> None:
    factors = [[f, f] for f in spread(1.0)]
    a, b, single = in_processes(factors), in_processes([[0.7 * f for f in own] for own in factors], "int4"), INT4
    assert format_comparison(compare(a, b)).endswith(
        "Welch's t test on the logarithms of 5 and 5 processes; p adjusted for 5 metrics (Holm); noise threshold 1 %. "
        "Values are those of the runs; ratios are those of geometric means over processes, each the mean of its "
        "repetitions."
    )
    assert "Paired t test on the logarithms of 5 pairs of processes;" in comparison_markdown(compare(a, b, paired=True))
    assert comparison_json(compare(a, b))["processes"] == [5, 5]
    mixed = format_comparison(compare(a, single))
    assert "One process of int4 was measured; added to its error is the noise between processes, " in mixed
    assert "Welch's t test on the logarithms of 5 processes and 5 repetitions;" in mixed
    assert "noise between processes" not in format_comparison(compare(a, b))
    with pytest.raises(
        UsageError, match="Paired results need as many processes on both sides: 5 and 1. Compare them without paired."
    ):
        compare(a, single, paired=True)
    with pytest.raises(UsageError, match="as many processes on both sides: 5 and 4"):
        compare(a, in_processes(factors[:4], "int4"), paired=True)


def test_pairs_are_those_of_processes_by_number() -> None:
    """Both slow down by a third over the processes; in each pair B takes 3 % less, with unequal repetitions."""
    drift, noise = [1.0, 1.1, 1.2, 1.25, 1.3, 1.35], [0.969, 0.971, 0.97, 0.9695, 0.9705, 0.97]
    a, b = (
        in_processes([[d] * 2 for d in drift]),
        in_processes([[d * n] * 3 for d, n in zip(drift, noise, strict=True)], "int4"),
    )
    backwards = dataclasses.replace(b, repetitions=b.repetitions[::-1])
    assert compare(a, b).effect(RATE).effect == "no difference seen"
    for other in (b, backwards):
        rate = compare(a, other, paired=True).effect(RATE)
        assert rate.effect == "better"
        assert rate.low < 1 / 0.97 < rate.high


def drawn_in_processes(rng: np.random.Generator, k: int, n: int, scale: float = 1.0) -> RunResult:
    """k processes of n repetitions: 3 % between processes, shared by their repetitions, and 1 % per repetition."""
    shared = scale * rng.lognormal(0, 0.03, k)
    return in_processes([(own * rng.lognormal(0, 0.01, n)).tolist() for own in shared])


def as_one_process(measured: RunResult) -> RunResult:
    return dataclasses.replace(
        measured, repetitions=tuple(dataclasses.replace(r, process=0) for r in measured.repetitions)
    )


@pytest.mark.parametrize("in_pairs", [False, True])
def test_a_against_a_in_processes_raises_few_alarms(in_pairs: bool) -> None:
    """Of 1,000 comparisons of like with like, 5 to 8 processes that differ by 3 %, at most 5 % show any difference."""
    rng = np.random.default_rng(22)
    alarms = 0
    for _ in range(1000):
        k = int(rng.integers(5, 9))
        a, b = drawn_in_processes(rng, k, 3), drawn_in_processes(rng, k if in_pairs else int(rng.integers(5, 9)), 3)
        alarms += alarmed(compare(a, b, paired=in_pairs))
    assert alarms <= 50


def test_repetitions_taken_for_independent_raise_false_alarms() -> None:
    """Without the process as the unit, although the order is judged, at least 30 of 200 alike ones raise an alarm."""
    rng = np.random.default_rng(23)
    pairs = [(drawn_in_processes(rng, 5, 6), drawn_in_processes(rng, 5, 6)) for _ in range(200)]
    assert sum(alarmed(compare(as_one_process(a), as_one_process(b))) for a, b in pairs) >= 30
    assert sum(alarmed(compare(a, b)) for a, b in pairs) <= 10


def test_the_interval_of_the_throughput_covers_with_processes_and_not_without() -> None:
    """For 1,000 results of 5 processes of 10 repetitions, 92–98 % of the intervals hold the true rate.

    Student's interval over repetitions holds it in under 70 %.

    The true rate is the mean of 1/f over both lognormal effects, exp((0.03² + 0.01²)/2) of the base.
    """
    rng = np.random.default_rng(24)
    truth = 5 / 0.060 * math.exp((0.03**2 + 0.01**2) / 2)
    held = {"processes": 0, "repetitions": 0}
    for _ in range(1000):
        measured = drawn_in_processes(rng, 5, 10)
        metrics = summarize(measured)
        held["processes"] += metrics[f"{RATE}_ci_low"] <= truth <= metrics[f"{RATE}_ci_high"]
        ends = t_interval(unit_values(as_one_process(measured), output_rate) or [])
        held["repetitions"] += ends is not None and ends[0] <= truth <= ends[1]
    assert 920 <= held["processes"] <= 980
    assert held["repetitions"] < 700


def test_single_processes_differ_only_beyond_the_noise_between_processes() -> None:
    """By hand: Var = 2 · 6.25e-5/5 + 2 · 0.03², with Satterthwaite's degrees, of which the assumption has 5."""
    slower = result(spread(1.08), "int4", memory=BF16.memory)
    rate = compare(BF16, slower, calibrations=()).effect(RATE)
    units, assumed = 6.25e-5 / 5, 2 * 0.03**2
    degrees = (2 * units + assumed) ** 2 / (2 * units**2 / 4 + assumed**2 / 5)
    half = reference.t.ppf(0.975, degrees) * math.sqrt(2 * units + assumed)
    assert (rate.low, rate.high) == pytest.approx((math.exp(-half) / 1.08, math.exp(half) / 1.08), rel=1e-5)
    assert (rate.effect, rate.p_holm < 0.05, rate.p_units < 0.001) == ("cannot be told", False, True)
    assert compare(BF16, slower).effect(RATE).effect == "worse"
    assert compare(BF16, slower, calibrations=[known_noise(BF16, 0.005, 9)]).effect(RATE).effect == "worse"
    assert compare(BF16, slower, calibrations=[known_noise(BF16, 0.03, 9)]).effect(RATE).effect == "cannot be told"
    other_backend = dataclasses.replace(known_noise(BF16), backend="vllm")
    assert compare(BF16, slower, calibrations=[other_backend]).effect(RATE).effect == "cannot be told"


def test_what_cannot_be_told_says_why_and_what_to_do() -> None:
    slower = result(spread(1.08), "int4", memory=BF16.memory)
    comparison = compare(BF16, slower, calibrations=())
    assert sentence(comparison) == (
        "int4 cannot be told from bf16 in tokens per second (ratio 0.93, 95 % interval 0.83 to 1.03) and needs the "
        "same memory. Two processes of one configuration may differ as much. Measure both again with processes=5, or "
        "in turns: llmbench ab quant=bf16 quant=int4 --model opt-125m --prompt-tokens 8 --output-tokens 5 "
        "--repetitions 5; or calibrate this machine once, and compare again: llmbench calibrate."
    )
    assert format_comparison(comparison).endswith(
        "One process of bf16 and int4 was measured; added to their error is the noise between processes, a standard "
        "deviation of 3 %, which is assumed until this machine is calibrated (5 degrees of freedom)."
    )
    [first, second] = comparison_json(comparison)["process_noise"]
    assert first == second
    assert (first["source"], first["relative_sd"][RATE], first["degrees"][RATE]) == ("assumed", pytest.approx(0.03), 5)
    calibrated = compare(BF16, slower, calibrations=[known_noise(BF16, 0.03, 9)])
    assert "calibrate" not in sentence(calibrated)
    assert comparison_json(calibrated)["process_noise"][0]["source"] == "calibrated"


def test_a_result_of_several_processes_gives_its_noise_to_one_of_a_single_process() -> None:
    """The means of three processes have the logarithms −0.02, 0 and 0.02: a variance of 4e-4 with 2 degrees."""
    several = in_processes([[math.exp(x), math.exp(x)] for x in (-0.02, 0.0, 0.02)])
    comparison = compare(several, INT4, calibrations=())
    assert comparison.process_noise[0] is None
    noise = comparison.process_noise[1]
    assert noise is not None
    assert noise.source == "the other result"
    spread_of_rate = noise.spread(RATE)
    assert (spread_of_rate.between, spread_of_rate.degrees) == (pytest.approx(4e-4, rel=1e-5), 2)
    own, single = 4e-4 / 3, 6.25e-5 / 5
    degrees = (own + single + 4e-4) ** 2 / (own**2 / 2 + single**2 / 4 + 4e-4**2 / 2)
    half = reference.t.ppf(0.975, degrees) * math.sqrt(own + single + 4e-4)
    assert math.log(comparison.effect(RATE).high / comparison.effect(RATE).ratio) == pytest.approx(half, rel=1e-4)


def test_repetitions_of_a_disturbed_process_count_as_one() -> None:
    """With 12 % between repetitions the verdict is high_variation: their error is that of one, and 3 % at least."""
    disturbed = result([0.85, 0.9, 1.0, 1.1, 1.15])
    rate = compare(disturbed, INT4).effect(RATE)
    logs = [-math.log(f) for f in (0.85, 0.9, 1.0, 1.1, 1.15)]
    one, quiet = statistics.variance(logs), 6.25e-5 / 5
    degrees = (one + quiet + 9e-4) ** 2 / (one**2 / 4 + quiet**2 / 4 + 9e-4**2 / 5)
    half = reference.t.ppf(0.975, degrees) * math.sqrt(one + quiet + 9e-4)
    assert math.log(rate.high / rate.ratio) == pytest.approx(half, rel=1e-3)


def test_one_measurement_is_not_compared_with_itself() -> None:
    reused = dataclasses.replace(BF16, sweep="a later sweep", linked="the run that measured it")
    for other in (BF16, reused):
        with pytest.raises(NotComparable, match="A and B are the same evidence: one measurement, of "):
            compare(BF16, other)
    assert (
        compare(BF16, dataclasses.replace(BF16, started_ms=5, ended_ms=6)).effect(RATE).effect == "no difference seen"
    )


def test_processes_that_differ_raise_few_alarms_between_single_ones() -> None:
    """Of 300 comparisons of like with like, single processes that differ by 3 %, at most 5 % raise an alarm."""
    rng = np.random.default_rng(25)
    pairs = [(drawn_in_processes(rng, 1, 10), drawn_in_processes(rng, 1, 10)) for _ in range(300)]
    assert sum(alarmed(compare(a, b, calibrations=())) for a, b in pairs) <= 15
    assert sum(alarmed(compare(a, b)) for a, b in pairs) >= 150  # if processes were known not to differ
