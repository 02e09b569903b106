"""Verdicts on what else the machine did: each kind of disturbance, at any length, and what was never recorded."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from mlflow_llmbench.analysis.contention import can_be_judged, of_the_client, unseen_cpus
from mlflow_llmbench.analysis.summary import summarize
from mlflow_llmbench.analysis.verdict import judge
from mlflow_llmbench.measure.stopping import enough
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.results import FIRST_RULES, RULES, Noise, Repetition, RequestRecord, RunResult

from ..results import made

MS = 1_000_000
TWO_CPUS = {"cpu": {"name": "x", "usable_cpus": 2}}


def quiet(wall_s: float = 1.0, **fields: Any) -> Noise:
    """One thread of ours computes, and nothing else happens."""
    readings: dict[str, Any] = {"steal_s": 0.0, "foreign_cpu_s": 0.0, "own_cpu_s": wall_s, "busy_cpu_s": wall_s}
    readings |= {"pressure_s": 0.0, "run_delay_s": 0.0, "memory_pressure_s": 0.0, "quota_throttled_s": 0.0}
    return Noise(wall_s, **(readings | {"major_faults": 0, "swapped_pages": 0, "quota_throttles": 0} | fields))


def beside(noises: Sequence[Noise], **fields: Any) -> RunResult:
    """Even repetitions beside which this was seen."""
    rng = random.Random(3)
    one = made(factors=[rng.gauss(1, 0.005) for _ in noises], environment=TWO_CPUS, **fields)
    pairs = zip(one.repetitions, noises, strict=True)
    return dataclasses.replace(one, repetitions=tuple(dataclasses.replace(r, noise=noise) for r, noise in pairs))


def codes(one: RunResult) -> list[str]:
    return [reason.code for reason in judge(one, summarize(one)).reasons]


@pytest.mark.parametrize(
    ("noise", "code", "words"),
    [
        (quiet(), None, ""),
        (quiet(busy_cpu_s=1.25), "contended", "other processes used 0.25 and the hypervisor took 0.00 CPUs"),
        (quiet(steal_s=0.2), "contended", "other processes used 0.00 and the hypervisor took 0.20 CPUs"),
        (quiet(run_delay_s=0.08), "contended", "waited for a CPU for 0.08 s in each second (limit 0.05)"),
        (quiet(pressure_s=0.2), "contended", "programs waited for a CPU 20% of the time (PSI; limit 10%)"),
        (quiet(memory_pressure_s=0.2), "swapping", "programs waited for memory 20% of the time (PSI; limit 5%)"),
        (quiet(major_faults=40), "swapping", "200 pages of the worker had to be read from the disk (limit 100)"),
        (quiet(swapped_pages=100), "swapping", "500 pages were swapped (limit 256)"),
        (quiet(quota_throttled_s=0.1, quota_throttles=3), "throttled", "in 15 periods, for 0.1 CPU seconds in each"),
        (Noise(1.0, pressure_s=0.6), "contended", "60%"),
        (Noise(1.0, run_delay_s=0.6), "contended", "0.6 s"),
        (quiet(major_faults=3, run_delay_s=0.01, pressure_s=0.03, quota_throttles=1, busy_cpu_s=1.04), None, ""),
    ],
)
def test_each_disturbance_has_its_reason(noise: Noise, code: str | None, words: str) -> None:
    one = beside([noise] * 5)
    verdict = judge(one, summarize(one))
    assert [reason.code for reason in verdict.reasons] == ([code] if code else [])
    assert all(words in reason.sentence for reason in verdict.reasons)


@pytest.mark.parametrize(
    "name",
    [
        "steal_s",
        "foreign_cpu_s",
        "busy_cpu_s",
        "own_cpu_s",
        "pressure_s",
        "run_delay_s",
        "memory_pressure_s",
        "quota_throttled_s",
        "major_faults",
        "swapped_pages",
        "wall_s",
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_a_reading_that_is_absent_or_no_number_is_no_reason(name: str, value: float | None) -> None:
    if name == "wall_s" and value is None:
        return
    noise = dataclasses.replace(quiet(), **{name: value})
    assert codes(beside([noise] * 5)) == []
    assert not noise.spoiled
    busy = dataclasses.replace(quiet(run_delay_s=0.9, pressure_s=0.9, busy_cpu_s=2.0), **{name: value})
    assert codes(beside([*[busy] * 4, quiet(run_delay_s=0.9, pressure_s=0.9)])) == ["contended"]


def test_results_that_recorded_less_are_judged_by_what_they_have() -> None:
    assert codes(beside([Noise(0.01, 0.0, 0.0, 0.01)] * 5)) == []
    assert codes(beside([Noise(1.0)] * 5)) == []
    one = made(factors=[1.0] * 5, environment={})
    nothing = tuple(dataclasses.replace(r, noise=None) for r in one.repetitions)
    assert codes(dataclasses.replace(one, repetitions=nothing)) == []
    assert can_be_judged(nothing)


def test_results_of_the_first_rules_are_judged_by_cpu_times_from_half_a_second_on() -> None:
    for noise, by_first in (
        (quiet(busy_cpu_s=1.25), ["contended"]),
        (quiet(0.1, busy_cpu_s=0.15), []),
        (quiet(run_delay_s=0.08), []),
        (quiet(pressure_s=0.2), []),
    ):
        one = beside([noise] * 5)
        assert codes(one) == ["contended"]
        assert codes(dataclasses.replace(one, rules=FIRST_RULES)) == by_first


@pytest.mark.parametrize(
    ("noise", "url", "rules", "words"),
    [
        (quiet(pressure_s=0.2), "http://10.0.0.5:8000/v1", RULES, "waited for a CPU 20% of the time"),
        (quiet(pressure_s=0.2), "http://10.0.0.5:8000/v1", FIRST_RULES, None),
        (quiet(pressure_s=0.2), "http://localhost:8000/v1", RULES, None),
        (quiet(pressure_s=0.2), "http://127.0.0.1:8000/v1", RULES, None),
        (quiet(run_delay_s=0.08), "http://localhost:8000/v1", RULES, "waited for a CPU for 0.08 s in each second"),
        (quiet(steal_s=0.2), "http://localhost:8000/v1", RULES, "the hypervisor took 0.20 CPUs"),
        (quiet(busy_cpu_s=2.0), "http://10.0.0.5:8000/v1", RULES, None),
    ],
)
def test_the_clients_machine_is_judged_by_what_delays_the_client(
    noise: Noise, url: str, rules: int, words: str | None
) -> None:
    one = beside([noise] * 5)
    one = dataclasses.replace(one, cell=dataclasses.replace(one.cell, url=url), rules=rules)
    found = list(of_the_client(one, {}))
    assert [reason.code for reason in found] == (["contended"] if words else [])
    assert all(words and words in reason.sentence for reason in found)


def test_threads_that_fill_all_cpus_wait_for_each_other() -> None:
    """Three threads on two CPUs: nothing else ran, so that nothing disturbed them."""
    full = quiet(own_cpu_s=1.98, busy_cpu_s=2.0, run_delay_s=0.95, pressure_s=0.9)
    assert codes(beside([full] * 5)) == []
    assert codes(beside([dataclasses.replace(full, own_cpu_s=1.5)] * 5)) == ["contended"]


@pytest.mark.parametrize("wall_s", [0.001, 0.01, 0.1])
def test_threads_that_wait_are_seen_at_any_length(wall_s: float) -> None:
    """A repetition of a millisecond is judged by the clock of the scheduler, in ns, and by pressure, in µs."""
    for fields in ({"run_delay_s": 0.3 * wall_s}, {"pressure_s": 0.5 * wall_s}):
        assert codes(beside([quiet(wall_s, busy_cpu_s=0.0, **fields)] * 5)) == ["contended"]
    assert quiet(wall_s, run_delay_s=0.3 * wall_s).spoiled


def ticks(rng: random.Random, wall_s: float, others_cpus: float) -> Noise:
    """Readings as the kernel gives them: user and system time of the machine in whole ticks of 10 ms."""
    own, others = wall_s, others_cpus * wall_s

    def counted(seconds: float) -> float:
        phase = rng.random()
        return (math.floor(seconds / 0.01 + phase) - math.floor(phase)) * 0.01

    return quiet(wall_s, busy_cpu_s=counted(0.9 * (own + others)) + counted(0.1 * (own + others)))


@pytest.mark.parametrize("count", [5, 30])
@pytest.mark.parametrize("wall_s", [0.004, 0.015, 0.05, 0.2, 1.0])
def test_coarse_counters_give_neither_false_alarms_nor_valid_runs_beside_a_burner(wall_s: float, count: int) -> None:
    """200 runs each: a quiet machine is never contended, one with a burner on another CPU hardly ever valid."""
    rng = random.Random(count * 1000 + int(wall_s * 1000))
    calm = [codes(beside([ticks(rng, wall_s, 0.0) for _ in range(count)])) for _ in range(200)]
    assert sum("contended" in found for found in calm) <= 2
    assert all(found in ([], ["too_short_to_judge"], ["contended"]) for found in calm)
    burner = [codes(beside([ticks(rng, wall_s, 1.0) for _ in range(count)])) for _ in range(200)]
    assert sum(found == [] for found in burner) <= 200 * 0.05


def test_auto_repeats_until_contention_can_be_judged() -> None:
    def repetitions(count: int, wall_s: float, **fields: Any) -> list[Repetition]:
        return [Repetition(i, 0, (RequestRecord(0, (10, 20)),), quiet(wall_s, **fields)) for i in range(count)]

    assert can_be_judged(repetitions(5, 0.02)) and not can_be_judged(repetitions(5, 0.01))
    assert [count for count in (64, 80, 100) if enough(Cell(), repetitions(count, 0.003))] == [80, 100]
    assert unseen_cpus([r.noise for r in repetitions(80, 0.003) if r.noise]) < 0.6
    # Without a fine clock a quarter of a CPU has to be seen.
    assert [n for n in (64, 80, 100) if enough(Cell(), repetitions(n, 0.006, run_delay_s=None))] == [100]
    assert enough(Cell(), repetitions(64, 0.006))
    [reason] = judge(one := beside([quiet(0.003)] * 30), summarize(one)).reasons
    assert reason.code == "too_short_to_judge"
    assert reason.sentence.startswith("The repetitions took 0.09 s together, in which others may have used up to ")


OUTLYING: dict[str, Callable[[RequestRecord], RequestRecord]] = {
    "end-to-end latency": lambda r: dataclasses.replace(
        r, stamps_ns=tuple(r.t0_ns + 2 * (stamp - r.t0_ns) for stamp in r.stamps_ns)
    ),
    "time to first token": lambda r: dataclasses.replace(
        r, stamps_ns=tuple(stamp + (r.stamps_ns[0] - r.t0_ns) for stamp in r.stamps_ns)
    ),
    "time per output token": lambda r: dataclasses.replace(
        r, stamps_ns=tuple(r.stamps_ns[0] + (stamp - r.stamps_ns[0]) // 2 for stamp in r.stamps_ns)
    ),
}


@pytest.mark.parametrize("name", OUTLYING)
@pytest.mark.parametrize("ttft", [2.0, 20.0])
def test_a_single_repetition_that_took_twice_as_long_is_said(name: str, ttft: float) -> None:
    one = beside([quiet()] * 30, ttft=ttft)
    assert codes(one) == []
    repetitions = list(one.repetitions)
    repetitions[17] = dataclasses.replace(repetitions[17], requests=(OUTLYING[name](repetitions[17].requests[0]),))
    one = dataclasses.replace(one, repetitions=tuple(repetitions))
    verdict = judge(one, summarize(one))
    assert {reason.code for reason in verdict.reasons} <= {"outliers", "high_variation"} and verdict.word == "suspect"


@pytest.mark.parametrize(("late", "more"), [({17}, ""), ({9, 17}, ", the largest of 2 such values")])
def test_as_many_outlying_values_are_named_as_there_are(late: set[int], more: str) -> None:
    one = beside([quiet()] * 30, ttft=2.0)
    repetitions = [
        dataclasses.replace(r, requests=(OUTLYING["time to first token"](r.requests[0]),)) if r.index in late else r
        for r in one.repetitions
    ]
    one = dataclasses.replace(one, repetitions=tuple(repetitions))
    [reason] = judge(one, summarize(one)).reasons
    [number] = [n for n in late if reason.sentence.startswith(f"The time to first token of repetition {n + 1} differs")]
    assert f"repetition {number + 1} differs from the median by a factor of 2{more} (limit 1.5)" in reason.sentence
