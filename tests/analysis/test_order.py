"""The verdict on the order of the repetitions, in scripted worlds with a known truth."""

from __future__ import annotations

import dataclasses
import sys

import numpy as np
import pytest

from mlflow_llmbench.analysis.order import correlation, repetitions_to_judge, unjudged
from mlflow_llmbench.analysis.summary import summarize
from mlflow_llmbench.analysis.verdict import judge
from mlflow_llmbench.measure.stopping import enough
from mlflow_llmbench.records.results import FIRST_RULES, Noise, Repetition, RunResult
from mlflow_llmbench.stats import effective_size, is_correlated, judge_sequence, sequence_interval, t_interval

from ..results import made
from ..worlds import WORLDS, World, cell, repetition, repetitions

ALTERNATING = [1.01, 0.99, 1.005, 0.995, 1.0] * 20
"""Values without order: neighbours are no more alike than others."""


def result(rates: list[float], processes: int = 1, **settings: object) -> RunResult:
    every = tuple(dataclasses.replace(one, process=one.index * processes // len(rates)) for one in repetitions(rates))
    return made(cell=cell(**settings), repetitions=every)


def reasons(measured: RunResult) -> dict[str, str]:
    return {reason.code: reason.sentence for reason in judge(measured, summarize(measured)).reasons}


@pytest.mark.parametrize(
    ("rates", "code", "sentence"),
    [
        (
            [value * (1 + 0.3 * i / 29) for i, value in enumerate(ALTERNATING[:30])],
            "trend",
            "The throughput rose by 26% over 30 repetitions (limit 2%; t ",
        ),
        (
            [value * (0.85 if i >= 15 else 1) for i, value in enumerate(ALTERNATING[:30])],
            "step",
            "The throughput fell by 15% with the last 15 of 30 repetitions (limit 2%; t ",
        ),
        (
            [value * (1.15 if i % 3 == 1 else 1) for i, value in enumerate(ALTERNATING[:30])],
            "two_speeds",
            "The throughput of 10 of 30 repetitions was 15% higher than that of the others (limit 2%; separation ",
        ),
        (
            [value * (0.5 if i in (4, 17) else 1) for i, value in enumerate(ALTERNATING[:30])],
            "outliers",
            "The throughput of 2 of 30 repetitions was 50% lower than that of the others (limit 10%; separation ",
        ),
    ],
)
def test_each_departure_is_named_with_its_size(rates: list[float], code: str, sentence: str) -> None:
    found = reasons(result(rates, repetitions=30))
    assert found[code].startswith(sentence)
    assert found[code].endswith("measure again.")
    assert {"trend", "step", "two_speeds", "outliers"} & set(found) == {code}
    assert judge(result(rates, repetitions=30), summarize(result(rates, repetitions=30))).word == "suspect"
    assert not reasons(result(ALTERNATING[:30], repetitions=30))


def test_results_of_the_first_rules_keep_their_verdict() -> None:
    rising = result([value * (1 + 0.3 * i / 29) for i, value in enumerate(ALTERNATING[:30])], repetitions=30)
    assert "trend" in reasons(rising)
    assert "trend" not in reasons(dataclasses.replace(rising, rules=FIRST_RULES))


def test_departures_smaller_than_the_precision_asked_for_are_no_reason() -> None:
    rates = [1 + 0.0001 * (i % 2) + 0.03 * i / 29 for i in range(30)]
    assert set(reasons(result(rates, repetitions=30))) == {"trend"}
    assert not reasons(result(rates, repetitions=30, precision_target=0.05))
    few = [value * (0.92 if i == 7 else 1) for i, value in enumerate(ALTERNATING[:30])]
    assert not reasons(result(few, repetitions=30))


def test_processes_are_judged_in_their_order_and_by_their_mean_course() -> None:
    rising = [value * (1 + 0.1 * (i // 5)) for i, value in enumerate(ALTERNATING[:40])]
    assert reasons(result(rising, processes=8, repetitions=5))["trend"].startswith(
        "The throughput rose by 52% over 8 processes"
    )
    slowing = [value * (1 - 0.02 * (i % 10)) for i, value in enumerate(ALTERNATING[:60])]
    found = reasons(result(slowing, processes=6, repetitions=10))
    assert found["trend"].startswith("The throughput fell by 20% over 10 repetitions")


def test_texts_of_their_own_lengths_are_judged_by_the_time_per_token() -> None:
    """Prompts of two lengths make two speeds of throughput, and one time per output token."""
    short, long = repetition(0, 1.0), repetition(0, 1.0)
    request = long.requests[0]
    later = tuple(stamp + 2 * request.stamps_ns[0] for stamp in request.stamps_ns)
    long = dataclasses.replace(long, requests=(dataclasses.replace(request, stamps_ns=later),))
    mixed = tuple(dataclasses.replace(long if i % 2 else short, index=i) for i in range(30))
    measured = dataclasses.replace(result([1.0] * 30, repetitions=30), repetitions=mixed)
    assert "two_speeds" in reasons(measured)
    own = dataclasses.replace(measured, cell=dataclasses.replace(measured.cell, prompt_tokens=None))
    assert "two_speeds" not in reasons(own)


def test_the_report_says_what_cannot_be_judged_and_what_would() -> None:
    few = ["a second speed (needs 10 repetitions)", "serial correlation (needs 20 repetitions)"]
    rare = "slow repetitions that are rarer than 1 in 20 (needs 59 repetitions)"
    spells = "speeds that change for a few repetitions at a time (needs 64 repetitions)"
    between = "how processes differ (needs processes=5)"
    assert unjudged(result([1.0] * 5)) == [*few, spells, rare, between]
    assert unjudged(result([1.0] * 30)) == [spells, rare, between]
    assert unjudged(result([1.0] * 64, processes=5)) == []
    assert unjudged(result([])) == []


def test_correlated_neighbours_widen_the_interval_and_are_named() -> None:
    slow = [1 + 0.02 * np.sin(i / 1.5) for i in range(60)]
    plain, wide = t_interval(slow), sequence_interval(slow)
    assert plain and wide and wide[1] - wide[0] > 2 * (plain[1] - plain[0])
    assert effective_size(slow) < 10
    assert effective_size(slow[:19]) == 19 and effective_size(slow[:20]) < 10  # LEAST_CORRELATED
    sentence = correlation(result(slow, repetitions=60))
    assert sentence and sentence.startswith("Neighbouring repetitions resemble each other (lag-1 autocorrelation 0.8")
    assert correlation(result(ALTERNATING[:60], repetitions=60)) is None
    assert correlation(result(slow[:20], repetitions=20)) and correlation(result(slow[:19], repetitions=19)) is None
    known = summarize(result(slow, repetitions=60))["trust/effective_repetitions"]
    assert known == pytest.approx(effective_size(slow), rel=0.01)


# The rule of repetitions=auto


@pytest.mark.parametrize(
    ("run_s", "repetitions"),
    [(0.0, 64), (0.5, 64), (0.93, 64), (1.5, 40), (2.99, 21), (3.0, 20), (30.0, 20), (60.0, 10), (200.0, 5)],
)
def test_the_number_that_auto_takes_follows_their_duration(run_s: float, repetitions: int) -> None:
    assert repetitions_to_judge(run_s) == repetitions


def test_auto_stops_as_soon_as_the_order_can_be_judged() -> None:
    def stops(run_s: float, rates: list[float], **settings: object) -> int:
        every = repetitions(rates, run_s)
        return next(n for n in range(1, len(every) + 1) if enough(cell(**settings), every[:n]))

    assert stops(0.5, ALTERNATING) == 64
    assert stops(2.0, ALTERNATING) == 30
    assert stops(20.0, ALTERNATING) == 20
    wide = [1 + 0.2 * (value - 1) / 0.01 for value in ALTERNATING]
    assert stops(2.0, wide, precision_target=0.05) == 45
    assert stops(80.0, wide) == 8  # ten minutes
    assert not enough(cell(repetitions=7), repetitions(ALTERNATING[:64]))


def test_auto_goes_on_while_neighbours_are_alike_and_stops_where_more_do_not_help() -> None:
    slow = [1 + 0.004 * np.sin(i / 2) for i in range(100)]
    assert is_correlated(slow[:64])
    assert not any(enough(cell(), repetitions(slow[:n])) for n in (64, 80, 100))
    step = [value * (0.85 if i >= 32 else 1) for i, value in enumerate(ALTERNATING[:64])]
    assert enough(cell(), repetitions(step))
    assert not enough(cell(), repetitions(step[:63]))


def test_spoiled_repetitions_are_repeated_and_kept_but_not_without_end() -> None:
    def noisy(rates: list[float], *spoiled: int) -> tuple[Repetition, ...]:
        return tuple(
            dataclasses.replace(one, noise=Noise(wall_s=1.0, foreign_cpu_s=0.5 if one.index in spoiled else 0.0))
            for one in repetitions(rates, 130.0)
        )

    assert enough(cell(), noisy(ALTERNATING[:5]))
    assert not enough(cell(), noisy(ALTERNATING[:5], 4))
    assert enough(cell(), noisy(ALTERNATING[:7], 4))
    assert not enough(cell(), noisy(ALTERNATING[:9], *range(9)))
    assert enough(cell(), noisy(ALTERNATING[:10], *range(10)))
    assert enough(cell(), noisy(ALTERNATING[:5], 4), local=False)


# Coverage: a fast version of benchmarks/sequence_worlds.py


def outcome(world: World, n: int, series: int, seed: int) -> tuple[float, float]:
    """Share of series called valid, and the share of these whose interval covers the truth."""
    valid = covered = 0
    for row in world.draw(np.random.default_rng(seed), series, n):
        values = row.tolist()
        if not judge_sequence(values, 0.02):
            low, high = sequence_interval(values) or (0.0, 0.0)
            valid += 1
            covered += low <= world.truth <= high
    return valid / series, covered / max(valid, 1)


UNSEEN = ("5 % of repetitions twice as slow", "the same in blocks of 5", "processes differ by 3 %")
"""Worlds that 30 repetitions of one process cannot show often enough."""


@pytest.mark.parametrize("name", [name for name in WORLDS if name not in UNSEEN])
def test_valid_intervals_cover_the_truth_at_thirty_repetitions(name: str) -> None:
    """Bounds leave three standard errors of 300 series."""
    valid, covered = outcome(WORLDS[name], 30, 300, 11)
    if WORLDS[name].quiet:
        assert valid >= 0.95
        assert 0.94 <= covered <= 1
    else:
        assert valid <= 0.05 or covered >= 0.90


@pytest.mark.parametrize("n", [5, 10, 20, 60])
def test_quiet_series_are_seldom_called_disturbed_and_their_intervals_are_not_wide(n: int) -> None:
    values = WORLDS["normal 2 %"].draw(np.random.default_rng(5), 300, n)
    assert sum(bool(judge_sequence(row.tolist(), 0.0)) for row in values) <= 9
    wider = []
    for row in values:
        own, plain = sequence_interval(row.tolist()), t_interval(row.tolist())
        assert own and plain
        wider.append((own[1] - own[0]) / (plain[1] - plain[0]))
    assert 1 <= np.median(wider) <= {5: 1, 10: 1, 20: 1.4, 60: 1.2}[n] + 1e-9


def test_auto_decides_where_scipy_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker's own environment need not have it."""
    monkeypatch.setitem(sys.modules, "scipy", None)
    assert enough(cell(), repetitions(ALTERNATING[:64]))
    slow = [1 + 0.004 * np.sin(i / 2) for i in range(80)]
    assert not enough(cell(), repetitions(slow))
