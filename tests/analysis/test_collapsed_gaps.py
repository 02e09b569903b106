"""Tokens that came in bursts although they were made one after another, offline and from a server."""

from __future__ import annotations

import dataclasses
import random

import pytest

from mlflow_llmbench.analysis.decisions.recommend import recommend
from mlflow_llmbench.analysis.summary import summarize
from mlflow_llmbench.analysis.verdict import judge
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.results import FIRST_RULES, RequestRecord, RunResult
from mlflow_llmbench.reports.result import row_of
from mlflow_llmbench.reports.sweep import leaders

from ..results import made

MS = 1_000_000


def with_gaps(gaps_of: list[list[float]], online: bool = False, **fields: object) -> RunResult:
    """Five or more repetitions with these gaps in ms after a first token at 20 ms."""
    base = made(factors=[1.0] * len(gaps_of), **fields)  # type: ignore[arg-type]
    repetitions = []
    for repetition, gaps in zip(base.repetitions, gaps_of, strict=True):
        stamps, now = [], repetition.requests[0].t0_ns + 20 * MS
        for gap in (0.0, *gaps):
            now += int(gap * MS)
            stamps.append(now)
        request = RequestRecord(repetition.requests[0].t0_ns, tuple(stamps), prompt_tokens=8)
        if online:
            request = dataclasses.replace(request, tokens=len(stamps), end_ns=now, finish="length")
        repetitions.append(dataclasses.replace(repetition, requests=(request,)))
    tokens = len(gaps_of[0]) + 1
    cell = dataclasses.replace(base.cell, output_tokens=tokens)
    if online:
        cell = Cell(backend="openai", url="http://h", model="m", output_tokens=tokens, prompt_tokens=8, repetitions=5)
    return dataclasses.replace(base, cell=cell, repetitions=tuple(repetitions))


def codes(one: RunResult) -> set[str]:
    return {reason.code for reason in judge(one, summarize(one)).reasons} - {"not_steady"}


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("count", [6, 7, 8, 31, 64, 127])
def test_every_second_token_collapsed_is_seen_at_odd_and_even_lengths(count: int, online: bool) -> None:
    gaps = [0.01 if i % 2 else 9.99 for i in range(count)]
    assert codes(with_gaps([gaps] * 5, online)) == {"collapsed_gaps"}


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("burst", [2, 3, 8, 16])
def test_bursts_of_any_size_are_seen(burst: int, online: bool) -> None:
    gaps = [5.0 * burst if i % burst == 0 else 0.011 for i in range(64)]
    found = with_gaps([gaps] * 5, online)
    assert codes(found) == {"collapsed_gaps"}
    [reason] = [r for r in judge(found, summarize(found)).reasons if r.code == "collapsed_gaps"]
    assert "of the tokens came within a tenth of the mean gap after the one before (limit 5%" in reason.sentence


@pytest.mark.parametrize("online", [False, True])
def test_gaps_of_a_quiet_machine_are_no_reason(online: bool) -> None:
    """Noise of 20 %, one stall of thirty tokens, a growing context, and steps of half a millisecond."""
    rng = random.Random(9)
    noisy = [max(rng.gauss(5, 1), 1.0) for _ in range(64)]
    for gaps in (noisy, [150.0 if i == 40 else 5.0 for i in range(64)], [5 + i / 20 for i in range(64)], [0.5] * 64):
        assert codes(with_gaps([gaps] * 5, online)) == set()


def test_few_late_tokens_are_no_reason() -> None:
    gaps = [10.0 if i == 7 else 0.01 if i == 8 else 5.0 for i in range(64)]
    assert codes(with_gaps([gaps] * 5)) == set()


def test_files_of_earlier_versions_keep_their_verdict_unless_the_median_is_wrong() -> None:
    few = with_gaps([[15.0 if i % 10 == 7 else 0.01 if i % 10 == 8 else 5.0 for i in range(64)]] * 5)
    half = with_gaps([[9.99 if i % 2 else 0.01 for i in range(63)]] * 5)
    assert codes(few) == codes(half) == {"collapsed_gaps"}
    assert codes(dataclasses.replace(few, rules=FIRST_RULES)) == set()
    assert codes(dataclasses.replace(half, rules=FIRST_RULES)) == {"collapsed_gaps"}


def test_a_median_far_below_the_mean_is_a_reason_of_a_batch_alone() -> None:
    """60 % of the gaps of 2 ms; behind a server those are the steps between prefills of other requests."""
    gaps = [2.0 if i % 5 < 3 else 14.5 for i in range(64)]
    assert codes(with_gaps([gaps] * 5)) == {"collapsed_gaps"}
    assert codes(with_gaps([gaps] * 5, online=True)) == set()


def test_steps_between_long_prefills_of_other_requests_are_not_collapsed() -> None:
    gaps = [400.0 if i % 6 == 0 else 8.0 for i in range(64)]
    assert codes(with_gaps([gaps] * 5, online=True)) == set()


def test_an_answer_in_one_piece_is_no_stream_and_nothing_else() -> None:
    assert codes(with_gaps([[0.001] * 7] * 5)) == {"chunked_stream"}
    assert codes(with_gaps([[0.001] * 8] * 5)) == {"chunked_stream"}


def test_such_a_cell_is_neither_recommended_nor_the_best_in_its_gaps() -> None:
    """Its median gap of 0.01 ms would win over a true 5 ms."""
    whole = with_gaps([[5.0] * 63] * 5, quant="none")
    bursts = with_gaps([[9.99 if i % 2 else 0.01 for i in range(63)]] * 5, quant="int8")
    slow = with_gaps([[7.0] * 63] * 5, quant="int4")
    rows = [row_of(one) for one in (whole, bursts, slow)]
    assert rows[1].metrics["latency/itl_ms_p50"] < 0.1 and rows[1].state == "suspect"
    assert [one.cell.quant for one in leaders(rows, "latency/itl_ms_p50")] == ["none"]
    found = recommend([whole, bursts, slow], "throughput")
    assert found.winner is not None and found.winner.result.cell.quant == "none"
    assert any(refusal.candidate.result.cell.quant == "int8" for refusal in found.refused)
