"""Metrics as pure functions of stamps, against numbers worked out by hand."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from mlflow_llmbench.analysis import efficiency, summary
from mlflow_llmbench.analysis.repetitions import several_in_a_step
from mlflow_llmbench.analysis.verdict import judge, unsupported_percentiles
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.metrics import KEYS, SERIES
from mlflow_llmbench.records.results import (
    Hashes,
    LoadInfo,
    MemorySample,
    MemoryStages,
    ModelFacts,
    Noise,
    RankLoad,
    RankStages,
    Repetition,
    RequestRecord,
    RunResult,
    TextTimes,
)
from mlflow_llmbench.stats import block_bootstrap_interval

MS = 1_000_000


def result(gaps: list[list[float]], ttft: float = 10.0, rows: int = 2, **fields: Any) -> RunResult:
    """A result whose repetitions have the given gaps in ms."""
    repetitions = []
    for index, own in enumerate(gaps):
        t0 = index * 1000 * MS
        stamps = tuple(t0 + int((ttft + sum(own[:i])) * MS) for i in range(len(own) + 1))
        repetitions.append(
            Repetition(
                index, 1_000_000 + index * 1000, (RequestRecord(t0, stamps, rows, 8),), Noise(1.0, 0.0, 0.0, 1.0)
            )
        )
    cell = Cell(batch_size=rows, prompt_tokens=8, output_tokens=len(gaps[0]) + 1 if gaps else 4)
    empty = RunResult(
        cell,
        "ok",
        0,
        9_000_000,
        Hashes("a", "b", "c", "d", "e"),
        ModelFacts("m", "folder", "/m", "r"),
        {},
        repetitions=tuple(repetitions),
        steady=True,
    )
    return dataclasses.replace(empty, **fields)


def test_every_latency_and_rate_by_hand() -> None:
    metrics = summary.summarize(result([[2, 4, 6], [2, 4, 6]], ttft=10, rows=2))
    assert metrics["latency/ttft_ms_mean"] == 10
    assert metrics["latency/itl_ms_mean"] == 4
    assert metrics["latency/itl_ms_p50"] == 4
    assert metrics["latency/tpot_ms_mean"] == 4
    assert metrics["latency/e2e_ms_mean"] == 22
    assert metrics["throughput/output_tokens_per_s"] == pytest.approx(2 * 4 / 0.022)
    assert metrics["throughput/per_instance_tokens_per_s"] == pytest.approx(4 / 0.022)
    assert metrics["throughput/total_tokens_per_s"] == pytest.approx(2 * 12 / 0.022)
    assert metrics["throughput/prefill_tokens_per_s"] == pytest.approx(2 * 8 / 0.010)
    assert metrics["throughput/decode_tokens_per_s"] == pytest.approx(2 * 3 / 0.012)
    assert metrics["trust/repetitions"] == 2


def test_means_of_latencies_have_their_spread_over_repetitions_by_hand() -> None:
    """End to end in 14, 18 and 22 ms: the t quantile with 2 degrees of freedom is 4.303, so 4.303 · 4 / √3 = 9.937."""
    three = result([[2, 2], [4, 4], [6, 6]])
    metrics = summary.summarize(dataclasses.replace(three, cell=dataclasses.replace(three.cell, repetitions=3)))
    spread = {key: value for key, value in metrics.items() if key.endswith(("_sd", "_mean_ci_low", "_mean_ci_high"))}
    assert spread == pytest.approx(
        {
            **dict.fromkeys(("latency/ttft_ms_mean_ci_low", "latency/ttft_ms_mean_ci_high"), 10),
            "latency/ttft_ms_sd": 0,
            "latency/tpot_ms_sd": 2,
            "latency/tpot_ms_mean_ci_low": 0,  # 4 − 4.968: a time is not negative
            "latency/tpot_ms_mean_ci_high": 8.968,
            "latency/e2e_ms_sd": 4,
            "latency/e2e_ms_mean_ci_low": 8.063,
            "latency/e2e_ms_mean_ci_high": 27.937,
        },
        abs=1e-3,
    )
    once = summary.summarize(result([[2, 2]]))
    assert not [key for key in once if "_mean_ci" in key or key.endswith("_sd")]
    processes = summary.summarize(in_processes(result([[2, 2], [2, 2], [6, 6], [6, 6]]), 2))
    assert processes["latency/e2e_ms_sd"] == pytest.approx(8 / 2**0.5)  # of 14 and 22 ms, the processes' means


def test_percentiles_are_those_of_the_pooled_rows_and_absent_without_support() -> None:
    rng = np.random.default_rng(5)
    gaps = rng.uniform(1, 9, size=(12, 5)).tolist()
    metrics = summary.summarize(result(gaps, rows=3))
    pooled = np.repeat(np.array(gaps).ravel(), 3)
    assert metrics["latency/itl_ms_p50"] == pytest.approx(np.percentile(pooled, 50), rel=1e-5)
    assert metrics["latency/itl_ms_p95"] == pytest.approx(np.percentile(pooled, 95), rel=1e-5)
    assert "latency/itl_ms_p99" not in metrics  # 60 gaps, 299 are needed
    assert "latency/ttft_ms_p90" not in metrics  # 12 repetitions, 29 are needed
    assert unsupported_percentiles(result(gaps))[0] == "TTFT p90 (n = 12, needs 29)"


def test_all_keys_are_in_the_vocabulary_and_finite() -> None:
    full = result(
        [[2.0] * 7] * 6,
        load=LoadInfo(1.0, 1000, 900, 16, 2e3, 4.0),
        first_call_ms=50.0,
        price_per_hour=2.0,
        peaks={"read_bytes_per_s": 1e6, "flops_per_s": 1e9},
        memory=MemoryStages({"peak": 10, "loaded": 5}, {"peak": 8}, {}, None),
        timeline=(MemorySample(0, 5, 4), MemorySample(MS, 7, 6)),
    )
    metrics = summary.summarize(full)
    assert set(metrics) <= set(KEYS)
    assert all(math.isfinite(v) for v in metrics.values())
    assert metrics["cost/per_million_tokens"] == pytest.approx(
        2.0 / (metrics["throughput/output_tokens_per_s"] * 3600) * 1e6
    )
    assert metrics["efficiency/tokens_per_s_per_gb"] == pytest.approx(metrics["throughput/output_tokens_per_s"] / 8e-9)
    points = summary.series(full)
    assert {p.key for p in points} <= set(SERIES)
    assert len({(p.key, p.step) for p in points}) == len(points)
    assert not {p.key for p in points} & set(metrics)


def test_what_lies_around_the_model_is_of_each_row() -> None:
    times = TextTimes(tokenize_ns=(1_000_000, 2_000_000, 6_000_000), detokenize_ns=(500_000, 500_000, 800_000))
    plain = result([[2.0] * 7] * 6, rows=4)
    metrics = summary.summarize(dataclasses.replace(plain, text_times=times))
    assert metrics["latency/tokenize_ms_p50"] == 2
    assert metrics["latency/detokenize_ms_p50"] == 0.5
    assert metrics["latency/e2e_with_text_ms_mean"] == pytest.approx(metrics["latency/e2e_ms_mean"] + 4 * (3 + 0.6))
    assert "latency/e2e_with_text_ms_mean" not in summary.summarize(plain)


def test_natural_lengths_have_their_times_where_a_row_is_alone() -> None:
    """Six tokens, the first after 10 ms and one every 2 ms: three take 14 ms, two take 12 ms."""
    plain = result([[2.0] * 5] * 4, ttft=10.0, rows=1)
    metrics = summary.summarize(dataclasses.replace(plain, natural=(3, None, 2)))
    assert metrics["lengths/natural_tokens_mean"] == 2.5
    assert metrics["lengths/ended_ratio"] == pytest.approx(2 / 3)
    assert metrics["latency/natural_e2e_ms_mean"] == pytest.approx((14 + 12) / 2)
    rows = summary.summarize(dataclasses.replace(result([[2.0] * 5] * 4, rows=4), natural=(3, None, 2)))
    assert rows["lengths/natural_tokens_mean"] == 2.5 and "latency/natural_e2e_ms_mean" not in rows
    never = summary.summarize(dataclasses.replace(plain, natural=(None, None)))
    assert never["lengths/ended_ratio"] == 0 and "lengths/natural_tokens_mean" not in never


def test_the_forward_pass_alone_has_its_mean_and_median() -> None:
    plain = result([[2.0] * 7] * 6)
    metrics = summary.summarize(dataclasses.replace(plain, forward_ns=(4_000_000, 2_000_000, 9_000_000)))
    assert (metrics["latency/forward_ms_mean"], metrics["latency/forward_ms_p50"]) == (5.0, 4.0)
    assert not any(key.startswith("latency/forward") for key in summary.summarize(plain))


def test_series_have_their_steps_and_real_times() -> None:
    points = summary.series(result([[2, 4], [6, 8], [6, 10]]))
    itl = {p.step: (p.value, p.wall_ms) for p in points if p.key == "steps/itl_ms"}
    assert itl == {2: (6, 1_002_000 + 16), 3: (8, 1_002_000 + 26)}
    assert [p.step for p in points if p.key == "steps/ttft_ms"] == [1, 2, 3]
    assert [p.wall_ms for p in points if p.key == "steps/ttft_ms"] == [1_000_000, 1_001_000, 1_002_000]


def test_each_repetition_is_a_point_of_its_series() -> None:
    """Two rows of 3 tokens in 16, 24 and 26 ms; 3 tokens after 10 ms."""
    points = summary.series(result([[2, 4], [6, 8], [6, 10]]))
    found = {key: [p.value for p in points if p.key == key] for key in ("steps/e2e_ms", "steps/output_tokens_per_s")}
    assert found["steps/e2e_ms"] == [16, 24, 26]
    assert found["steps/output_tokens_per_s"] == pytest.approx([6 / 0.016, 6 / 0.024, 6 / 0.026])
    assert [p.step for p in points if p.key == "steps/output_tokens_per_s"] == [1, 2, 3]


def test_memory_samples_without_a_repetition_are_no_series() -> None:
    crashed = result([], timeline=(MemorySample(0, 5, 4), MemorySample(MS, 7, 6)), outcome="crashed")
    assert summary.series(crashed) == [] and summary.statistics(crashed) == []


def test_steps_that_bring_several_tokens_have_no_inter_token_latency() -> None:
    """Speculative decoding: if one step brings two tokens, single ones of other requests came by chance."""
    plain = result([[2, 2, 2]] * 5)
    guessed = dataclasses.replace(plain, cell=dataclasses.replace(plain.cell, decode="prompt_lookup"))
    assert not several_in_a_step(plain) and not several_in_a_step(guessed)
    assert summary.summarize(guessed)["latency/itl_ms_mean"] == 2
    first, *others = guessed.repetitions
    wide = dataclasses.replace(first.requests[0], tokens=5, chunk_tokens=(1, 2, 1, 1))
    some = dataclasses.replace(guessed, repetitions=(dataclasses.replace(first, requests=(wide,)), *others))
    assert several_in_a_step(some)
    metrics = summary.summarize(some)
    assert "latency/itl_ms_mean" not in metrics and metrics["latency/icl_ms_mean"] == 2
    assert not [p for p in summary.series(some) if "itl" in p.key]


def test_thinned_memory_keeps_the_peak() -> None:
    samples = tuple(MemorySample(i * MS, 9999 if i == 1234 else 100, 50) for i in range(3000))
    points = [p for p in summary.series(result([[1.0]] * 5, timeline=samples)) if p.key == "steps/host_rss_gb"]
    assert len(points) <= summary.MOST_SAMPLES
    assert max(p.value for p in points) == pytest.approx(9999e-9)


def test_system_metrics_are_samples_of_the_worker_at_their_real_times() -> None:
    """Half a second apart, of four CPUs; the first token of the first repetition was asked for at 1,000,000 ms."""
    samples = tuple(MemorySample(i * 500 * MS, 3_000_000 + i, 50, cpus=cpus) for i, cpus in enumerate((None, 4, 1.5)))
    one = result([[1.0]] * 5, timeline=samples, environment={"cpu": {"usable_cpus": 4}})

    def points(key: str, of: RunResult) -> list[tuple[int, float, int]]:
        return [(p.step, p.value, p.wall_ms) for p in summary.series(of) if p.key == f"system/{key}"]

    memory, cpu = "system_memory_usage_megabytes", "cpu_utilization_percentage"
    assert points(memory, one) == [(1, 3, 1_000_000), (2, 3.000001, 1_000_500), (3, 3.000002, 1_001_000)]
    assert points(cpu, one) == [(2, 100, 1_000_500), (3, 37.5, 1_001_000)]
    limited = dataclasses.replace(one, environment={"cpu": {"usable_cpus": 4, "quota_cpus": 1.5}})
    assert [value for _, value, _ in points(cpu, limited)] == pytest.approx([400 / 1.5, 100])
    assert not points(cpu, dataclasses.replace(one, environment={}))
    many = tuple(MemorySample(i * MS, 100, 50, cpus=i % 2) for i in range(3000))
    assert {value for _, value, _ in points(cpu, dataclasses.replace(one, timeline=many))} == {12.5}  # means of ten
    assert not points("gpu_0_power_usage_watts", one)


def test_readings_of_the_gpu_are_system_metrics_by_its_index() -> None:
    noise = Noise(1.0, utilization_ratio=0.9, power_w=350.0)
    plain = result([[1.0]] * 2, load=LoadInfo(1.0, facts={"model.device": "cuda:1"}))
    one = dataclasses.replace(
        plain,
        repetitions=tuple(dataclasses.replace(repetition, noise=noise) for repetition in plain.repetitions),
        environment={"gpus": [{"name": "A"}, {"name": "B"}]},
        memory=MemoryStages(device={"loaded": 2 * 10**9, "peak": 3 * 10**9, "unloaded": 10**6}),
        marks={"peak": 900 * MS, "baseline": 0, "loaded": 100 * MS},
    )
    found = {(p.key, p.step): (p.value, p.wall_ms) for p in summary.series(one) if p.key.startswith("system/")}
    assert found == {
        ("system/gpu_1_utilization_percentage", 1): (90, 1_000_011),
        ("system/gpu_1_utilization_percentage", 2): (90, 1_001_011),
        ("system/gpu_1_power_usage_watts", 1): (350, 1_000_011),
        ("system/gpu_1_power_usage_watts", 2): (350, 1_001_011),
        ("system/gpu_1_memory_usage_megabytes", 1): (2000, 1_000_100),
        ("system/gpu_1_memory_usage_megabytes", 2): (3000, 1_000_900),
    }


def test_bandwidth_utilization_by_hand_and_absent_when_the_cache_could_serve() -> None:
    load = LoadInfo(1.0, weight_bytes=1_000, step_bytes=800, kv_bytes_per_token=10)
    # 800 + 2 rows · 10 bytes · (8 + 4/2 tokens) = 1000 bytes per 2 ms = 500,000 bytes/s of 1,000,000.
    fields: dict[str, Any] = {"load": load, "peaks": {"read_bytes_per_s": 1e6}}
    assert efficiency.model_bandwidth_utilization(result([[2, 2, 2]] * 5, **fields)) == pytest.approx(0.5)
    cached = result([[2, 2, 2]] * 5, **(fields | {"load": dataclasses.replace(load, cache_bytes=201)}))
    assert efficiency.model_bandwidth_utilization(cached) is None
    assert efficiency.model_bandwidth_utilization(result([[2, 2, 2]] * 5, load=load)) is None


def test_hardware_has_the_name_of_the_device_that_computed() -> None:
    made = result([[10, 20]])
    environment = {"cpu": {"name": "AMD EPYC", "usable_cpus": 2}, "gpus": [{"name": "NVIDIA H200"}]}
    for device, named, expected in (
        ("cpu", None, "AMD EPYC, 2 CPUs"), ("cuda:0", "NVIDIA H200", "NVIDIA H200"), ("xpu:0", "Intel", "Intel"),
    ):  # fmt: skip
        facts = {"model.device": device} | ({"model.device_name": named} if named else {})
        one = dataclasses.replace(made, environment=environment, load=LoadInfo(1.0, facts=facts))
        assert summary.hardware_name(one) == expected


def test_several_devices_count_together() -> None:
    load = LoadInfo(1.0, step_bytes=800, kv_bytes_per_token=10, flops_per_token=100.0, cache_bytes=60)
    peaks = {"read_bytes_per_s": 1e6, "flops_per_s": 1e6}
    one = result([[2, 2, 2]] * 5, load=load, peaks=peaks, idle_w=1.0)
    two = dataclasses.replace(one, load=dataclasses.replace(load, devices=2))
    assert efficiency.model_bandwidth_utilization(two) == pytest.approx(0.25)
    mfu = efficiency.model_flops_utilization(one)
    assert mfu and efficiency.model_flops_utilization(two) == pytest.approx(mfu / 2)
    assert efficiency.read_share(dataclasses.replace(two, load=dataclasses.replace(load, devices=4))) is None
    assert efficiency.joules_per_token(two) is None


def test_the_largest_rank_and_the_sum_of_all_are_told() -> None:
    stages = MemoryStages(
        {}, {"peak": 5 * 10**9}, {},
        ranks=(RankStages({"loaded": 10**9, "peak": 2 * 10**9}), RankStages({"loaded": 10**9, "peak": 3 * 10**9})),
    )  # fmt: skip
    load = LoadInfo(1.0, 3 * 10**9, ranks=(RankLoad(10**9), RankLoad(2 * 10**9)))
    measured = result(
        [[2, 2, 2]] * 5, memory=stages, load=load, cell=Cell(batch_size=2, output_tokens=4, tensor_parallel=2)
    )
    found = summary.summarize(measured)
    assert (found["memory/host_needed_gb_peak"], found["memory/rank_host_needed_gb_peak"]) == (5, 3)
    assert (found["memory/rank_host_needed_gb_loaded"], found["memory/rank_weight_gb"]) == (1, 2)
    assert summary.summarize(dataclasses.replace(measured, collective_share=0.5))["parallel/communication_ratio"] == 0.5
    assert found["settings/tensor_parallel"] == 2 and "memory/rank_device_gb_peak" not in found
    points = [(p.key, p.step, p.value) for p in summary.series(measured) if "rank" in p.key]
    assert points == [
        ("steps/rank_weight_gb", 0, 1), ("steps/rank_weight_gb", 1, 2),
        ("steps/rank_host_needed_gb", 0, 2), ("steps/rank_host_needed_gb", 1, 3),
    ]  # fmt: skip
    assert not [key for key in summary.summarize(result([[2, 2, 2]] * 5)) if "rank" in key]


def test_sliding_windows_cut_what_is_read() -> None:
    load = LoadInfo(1.0, step_bytes=800, kv_bytes_per_token=10, sliding_window=4, sliding_share=0.5)
    assert efficiency.attended(load, 10) == 0.5 * 10 + 0.5 * 4
    assert efficiency.attended(load, 3) == 3
    fields: dict[str, Any] = {"load": load, "peaks": {"read_bytes_per_s": 1e6}}
    assert efficiency.model_bandwidth_utilization(result([[2, 2, 2]] * 5, **fields)) == pytest.approx(
        (800 + 2 * 10 * 7) / 0.002 / 1e6
    )


def test_flops_utilization_by_hand() -> None:
    # 2 rows; 8 + 4 tokens, of which 11 go through the body at 100 + 2 per token of context, 4 through the head at 1000;
    # 16 ms a request.
    load = LoadInfo(1.0, flops_per_token=100.0, head_flops=1000.0, attention_flops_per_context_token=2.0)
    measured = result([[2, 2, 2]] * 5, load=load, peaks={"flops_per_s": 1e6})
    assert efficiency.model_flops_utilization(measured) == pytest.approx(
        2 * (11 * (100 + 2 * 5.5) + 4 * 1000) / 0.016 / 1e6
    )


@pytest.mark.parametrize(
    ("measured", "word", "codes"),
    [
        (result([[2, 2, 2]] * 5), "valid", []),
        (result([[2, 2, 2]] * 4), "suspect", ["too_few_samples"]),
        (result([[2, 2, 2]] * 5, steady=False), "suspect", ["not_steady"]),
        (result([[2, 2, -1]] * 5), "invalid", ["negative_gap"]),
        (result([[2, 2, 2]] * 5, cell=Cell(batch_size=2, output_tokens=9)), "invalid", ["wrong_token_count"]),
        (
            result([[2, 2, 2], [9, 9, 9], [2, 2, 2], [9, 9, 9], [2, 2, 2]]),
            "suspect",
            ["not_converged", "high_variation", "two_speeds"],
        ),
        (
            result([[2, 2, 2]] * 5, load=LoadInfo(1.0, 1, 8000), peaks={"read_bytes_per_s": 1e6}),
            "suspect",
            ["bandwidth_doubtful"],
        ),
        (
            result([[2, 2, 2]] * 5, load=LoadInfo(1.0, 1, 8000), nominal_bandwidth=0.001),
            "invalid",
            ["mbu_above_one"],
        ),
    ],
)
def test_each_fault_gives_exactly_its_reason(measured: RunResult, word: str, codes: list[str]) -> None:
    verdict = judge(measured, summary.summarize(measured))
    assert (verdict.word, [r.code for r in verdict.reasons]) == (word, codes)
    for reason in verdict.reasons:
        assert reason.sentence.endswith(".")
        assert any(c.isdigit() for c in reason.sentence)


def in_processes(measured: RunResult, each: int) -> RunResult:
    """The same repetitions, each group of `each` measured in its own process."""
    return dataclasses.replace(
        measured, repetitions=tuple(dataclasses.replace(r, process=r.index // each) for r in measured.repetitions)
    )


def test_the_interval_of_several_processes_is_that_of_their_means_by_hand() -> None:
    """Gaps of 0.5 ms after 8.5 ms make 4 tokens in 10 ms: 400 tokens/s. Process means are 300 and 400 (rows 1)."""
    measured = in_processes(result([[0.5] * 3, [5.5] * 2 + [0.5], [0.5] * 3, [0.5] * 3], ttft=8.5, rows=1), 2)
    metrics = summary.summarize(measured)
    rate = "throughput/output_tokens_per_s"
    assert metrics[rate] == pytest.approx(350)
    half = 12.70620474 * math.sqrt(2 * 50**2) / math.sqrt(2)
    assert (metrics[f"{rate}_ci_low"], metrics[f"{rate}_ci_high"]) == (0.0, pytest.approx(350 + half))
    assert metrics["trust/relative_half_width"] == pytest.approx(half / 350)
    assert metrics["trust/cv_ratio"] == pytest.approx(math.sqrt(2) * 50 / 350)
    assert metrics["trust/repetitions"] == 4
    assert metrics["throughput/decode_tokens_per_s"] == pytest.approx((((2000 + 3000 / 11.5) / 2) + 2000) / 2)


def test_statistics_by_hand() -> None:
    """TTFT 10 ms, then gaps of f ms: end to end 13, 16, 19, 22 and 40 ms; 4 of them 16 ± 3, and one far out."""
    found = {s.key: s for s in summary.statistics(result([[f] * 3 for f in (1.0, 2.0, 3.0, 4.0, 10.0)], rows=1))}
    e2e = found["latency/e2e_ms"]
    assert (e2e.values, e2e.n, e2e.mean, e2e.median, e2e.mad) == ("repetitions", 5, 22, 19, 3)
    assert e2e.sd == pytest.approx(math.sqrt((81 + 36 + 9 + 0 + 324) / 4))
    half = 1.15 * 2.77644511 * math.sqrt(450 / 4 / 5)  # repetitions=auto: the factor for stopping when it is narrow
    assert (e2e.mean_low, e2e.mean_high) == (pytest.approx(22 - half), pytest.approx(22 + half))
    assert e2e.median_low is not None and e2e.median_high is not None
    assert 13 <= e2e.median_low <= 16 and 22 <= e2e.median_high <= 40
    assert found["latency/itl_ms"].median == 3
    assert found["throughput/output_tokens_per_s"].median == pytest.approx(4 / 0.019)
    steps = found["steps/itl_ms"]
    assert (steps.values, steps.n, steps.median, steps.mean_low, steps.median_low) == ("tokens", 3, 3, None, None)


def test_statistics_rest_on_processes_where_there_are_several() -> None:
    found = {
        s.key: s for s in summary.statistics(in_processes(result([[f] * 3 for f in (1.0, 3.0, 2.0, 4.0)], rows=1), 2))
    }
    e2e = found["latency/e2e_ms"]
    assert (e2e.values, e2e.n, e2e.mean, e2e.median, e2e.mad) == ("processes", 2, 17.5, 17.5, 1.5)
    assert e2e.median_low is None  # no bootstrap with fewer than 5


def test_the_series_of_gaps_has_the_interval_of_the_block_bootstrap() -> None:
    gaps = (10 + np.sin(np.arange(200) / 8) + np.random.default_rng(6).normal(0, 0.3, 200)).tolist()
    [steps] = [s for s in summary.statistics(result([gaps] * 5)) if s.key == "steps/itl_ms"]
    own = [point.value for point in summary.series(result([gaps] * 5)) if point.key == "steps/itl_ms"]
    assert (steps.median_low, steps.median_high) == block_bootstrap_interval(own, statistic="median")
    assert steps.n == 200


SLOW, FAST = [2.4, 2.4, 2.4], [2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("measured", "sentences"),
    [
        (in_processes(result([FAST] * 10), 2), {}),
        (
            in_processes(result([FAST] * 9), 3),
            {
                "too_few_samples": "There are 3 processes; an interval over processes needs at least 5. Raise "
                "processes to 5 or more."
            },
        ),
        (
            in_processes(result([FAST, FAST, SLOW, SLOW] * 3), 2),
            {
                "not_converged": "The 95 % interval of the throughput is ±4.2% after 6 processes, and the target is "
                "±2.0%. Raise processes, or close other programs."
            },
        ),
        (
            in_processes(result([FAST] * 10, steady=False), 2),
            {
                "not_steady": "In at least one of 5 processes the early and the late warm-up runs still differ by more "
                "than 5 %. Close other programs, or set warmup to a larger number."
            },
        ),
        (
            in_processes(result([FAST, [6.0] * 3] * 5), 2),
            {
                "high_variation": "The throughput of the repetitions varies by 28.7% (standard deviation ÷ mean; limit "
                "10%). Look for other programs that ran at the same time, and measure again."
            },
        ),
        (
            in_processes(
                result([FAST, FAST, [8.0] * 3, [8.0] * 3] * 3, cell=Cell(batch_size=2, output_tokens=4, repetitions=2)),
                2,
            ),
            {
                "high_variation": "The throughput of the processes varies by 39.4% (standard deviation ÷ mean; limit "
                "10%). Look for other programs that ran at the same time, and measure again."
            },
        ),
    ],
    ids=["alike", "three", "wide", "not steady", "within", "between"],
)
def test_the_verdict_on_several_processes_speaks_of_processes(measured: RunResult, sentences: dict[str, str]) -> None:
    """Rates of a batch of 2 · 4 tokens in 16 ms, and in 17.2, 28 or 34 ms.

    A half of each is ±3.6, 27.3 or 36 % from their mean, times √(n/(n − 1)).
    """
    found = {r.code: r.sentence for r in judge(measured, summary.summarize(measured)).reasons}
    assert {code: sentence for code, sentence in found.items() if code != "two_speeds"} == sentences


@pytest.mark.parametrize(
    ("noise", "code"),
    [
        (Noise(1.0, 0.05, 0.2), "contended"),
        (Noise(1.0, 0.0, 0.0, swapped_pages=100), "swapping"),
        (Noise(1.0, 0.02, 0.05), None),
    ],
)
def test_noise_beside_the_benchmark(noise: Noise, code: str | None) -> None:
    quiet = result([[2, 2, 2]] * 5)
    noisy = dataclasses.replace(
        quiet, repetitions=tuple(dataclasses.replace(r, noise=noise) for r in quiet.repetitions)
    )
    assert [r.code for r in judge(noisy, summary.summarize(noisy)).reasons] == ([code] if code else [])
