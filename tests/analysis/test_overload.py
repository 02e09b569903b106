"""Open loops beyond and below the capacity of servers of several kinds, on virtual time, over several seeds."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

import pytest

from mlflow_llmbench.analysis import overload
from mlflow_llmbench.analysis.summary import summarize
from mlflow_llmbench.analysis.verdict import judge
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.results import (
    ClientReadings,
    LoadInfo,
    Repetition,
    RequestRecord,
    RunResult,
)

from .. import results
from .queues import Serve, arrivals, shared, synchronous

MS = 1_000_000
TOKENS, STEP = 16, 10.0

Lengths = list[int]


def slowing(slope: float, base: float) -> Callable[[Lengths], Serve]:
    return lambda lengths: lambda times: shared(times, lengths, slope, base)


def batched(rows: int, slope: float = 0.0, joining: bool = True) -> Callable[[Lengths], Serve]:
    return lambda lengths: lambda times: synchronous(times, lengths, rows, STEP, slope, joining)


SERVERS: dict[str, tuple[float, Callable[[Lengths], Serve]]] = {
    "processor sharing": (1 / (TOKENS * STEP), slowing(STEP, 0.0)),
    "larger batches, longer steps": (1 / TOKENS, slowing(1.0, 2 * STEP)),
    "eight rows in step": (8 / (TOKENS * STEP), batched(8)),
    "32 rows, longer steps": (32 / (TOKENS * (STEP + 16)), batched(32, 0.5)),
    "batches to their end": (8 / (TOKENS * STEP), batched(8, joining=False)),
    "one after another": (1 / (TOKENS * STEP), batched(1)),
}
"""Kind of server → requests per ms that it can answer, and the server for the lengths of the answers."""


def load(
    server: str, share: float, count: int, seed: int, kind: str = "poisson", mixed: bool = False, repetitions: int = 5
) -> RunResult:
    """An open loop at a share of a server's capacity."""
    capacity, serve = SERVERS[server]
    rng = random.Random(f"{server} {share} {count} {seed}")
    made = []
    for index in range(repetitions):
        times = arrivals(rng, count, share * capacity, kind)
        lengths = [rng.choice((TOKENS // 2, TOKENS, 3 * TOKENS // 2)) if mixed else TOKENS for _ in times]
        requests = tuple(
            RequestRecord(
                int(at * MS),
                tuple(int(stamp * MS) for stamp in stamps),
                prompt_tokens=10,
                intended_ns=int(at * MS),
                tokens=len(stamps),
                end_ns=int(stamps[-1] * MS),
                finish="length",
                asked=(10, len(stamps)),
            )
            for at, stamps in zip(times, serve(lengths)(times), strict=True)
        )
        client = ClientReadings(0, requests[-1].stamps_ns[-1], (MS // 10,) * 300, 0.05)
        made.append(Repetition(index, 0, requests, client=client))
    cell = Cell(
        backend="openai",
        url="http://h",
        model="m",
        output_tokens=TOKENS,
        prompt_tokens=10,
        request_rate=share * capacity * 1000,
        arrival=kind,
        repetitions=repetitions,
    )
    return results.made(cell=cell, load=LoadInfo(None), repetitions=tuple(made))


def codes(one: RunResult) -> set[str]:
    return {reason.code for reason in judge(one, summarize(one)).reasons}


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("count", [12, 20, 100])
def test_no_server_is_saturated_at_up_to_four_fifths_of_its_capacity(server: str, count: int) -> None:
    for share in (0.5, 0.8):
        for seed in range(6):
            assert overload.overload_of(load(server, share, count, seed)) is None
    assert overload.overload_of(load(server, 0.8, count, 7, mixed=True)) is None


@pytest.mark.parametrize("share", [1.5, 2.0, 3.0])
@pytest.mark.parametrize(
    "server", ["processor sharing", "eight rows in step", "batches to their end", "one after another"]
)
def test_a_server_at_one_and_a_half_of_its_capacity_is_saturated(server: str, share: float) -> None:
    """The rate that was answered is the capacity, and the sentence says how many were unanswered."""
    for seed, mixed in enumerate((False, False, True)):
        one = load(server, share, 100, seed, mixed=mixed)
        assert "saturated" in codes(one)
        found = overload.overload_of(one)
        assert found is not None
        if not mixed:  # a batch to its end computes padding too
            assert found.answered_per_s / found.asked_per_s == pytest.approx(1 / share, rel=0.2)
        assert found.unanswered > 0.15 * found.sent
        assert summarize(one)["saturation/requests_per_s"] == found.answered_per_s
        [sentence] = [r.sentence for r in judge(one, summarize(one)).reasons if r.code == "saturated"]
        assert f"{found.unanswered:.3g} of 100 requests were unanswered when the last was sent" in sentence


def test_a_server_that_slows_every_token_has_no_queue_before_the_first_and_is_saturated() -> None:
    """Its gaps grow many times over while first tokens come with the next step of all."""
    one = load("processor sharing", 3.0, 60, 1)
    metrics = summarize(one)
    assert metrics["latency/itl_ms_p50"] > 15 * STEP
    assert "saturated" in codes(one)


def test_regular_arrivals_five_percent_beyond_the_capacity_are_told() -> None:
    for server in ("eight rows in step", "one after another", "processor sharing"):
        assert overload.overload_of(load(server, 1.05, 300, 0, kind="constant")) is not None
        assert overload.overload_of(load(server, 0.95, 300, 0, kind="constant")) is None


@pytest.mark.parametrize("share", [1.5, 2.0, 3.0])
def test_too_few_requests_to_tell_are_never_valid(share: float) -> None:
    """Twenty requests to servers of all kinds, and a hundred to one whose backlog fills over minutes."""
    for seed in range(5):
        for server in ("processor sharing", "eight rows in step", "batches to their end", "one after another"):
            assert codes(load(server, share, 20, seed)) & {"saturated", "not_steady"}
        assert codes(load("larger batches, longer steps", share, 100, seed)) & {"saturated", "not_steady"}
        for server in SERVERS:
            for count in (20, 50):
                assert not codes(load(server, 0.5, count, seed)) & {"saturated", "not_steady"}


def test_failed_requests_count_as_unanswered_until_they_end() -> None:
    one = load("processor sharing", 0.5, 100, 3)
    refused = [
        dataclasses.replace(
            r,
            failed=tuple(
                dataclasses.replace(q, outcome="timeout", stamps_ns=(), end_ns=10**13) for q in r.requests[::2]
            ),
            requests=r.requests[1::2],
        )
        for r in one.repetitions
    ]
    assert overload.overload_of(dataclasses.replace(one, repetitions=tuple(refused))) is not None


def test_closed_loops_and_single_requests_have_no_overload() -> None:
    one = load("processor sharing", 3.0, 60, 1)
    closed = dataclasses.replace(one, cell=dataclasses.replace(one.cell, request_rate=None))
    assert overload.overload_of(closed) is None and overload.still_filling(closed) is None
    alone = tuple(dataclasses.replace(r, requests=r.requests[:1]) for r in one.repetitions)
    assert overload.overload_of(dataclasses.replace(one, repetitions=alone)) is None


def test_asked_and_answered_rates_by_hand() -> None:
    """Twelve requests, the first two at once, then one each 10 ms; one answer each 20 ms.

    The last third are four requests in 30 ms, and their answers in 60 ms.
    """
    begins = [0, *range(0, 110, 10)]
    requests = tuple(RequestRecord(at * MS, ((20 * i + 15) * MS, (20 * i + 20) * MS)) for i, at in enumerate(begins))
    found = overload._rates(Repetition(0, 0, requests), last_third=False)
    assert found == pytest.approx((11 / 0.100, 11 / 0.220))
    assert overload._rates(Repetition(0, 0, requests[::-1]), last_third=True) == pytest.approx((3 / 0.030, 3 / 0.060))
    refused = tuple(dataclasses.replace(r, outcome="timeout", stamps_ns=()) for r in requests[1::2])
    found = overload._rates(Repetition(0, 0, requests[::2], failed=refused), last_third=False)
    assert found == pytest.approx((11 / 0.100, 5 / 0.200))
    assert overload._rates(Repetition(0, 0, requests[1:3]), last_third=False) == pytest.approx((1 / 0.010, 1 / 0.020))
    for some in (requests[:1], requests[:2]):  # one request, and two that came at once
        assert overload._rates(Repetition(0, 0, some), last_third=False) is None
