"""The number of servers for a traffic: from measured loads with known limits, of a rate and of a recorded day."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from mlflow_llmbench.analysis.decisions.capacity import (
    CapacityPlan,
    Servers,
    Traffic,
    of_rate,
    of_trace,
    plan_capacity,
    servers_for,
)
from mlflow_llmbench.analysis.goodput import GoodputLimit
from mlflow_llmbench.cli.main import main
from mlflow_llmbench.records.errors import UsageError
from mlflow_llmbench.records.results import RunResult
from mlflow_llmbench.reports.artifacts import write_cell
from mlflow_llmbench.reports.capacity import format_capacity
from mlflow_llmbench.workflows.capacity import capacity
from mlflow_llmbench.workloads.traces import read_trace

from ...measure.test_online import CELL
from ..test_goodput import measured

LOADS = [measured(None, 10), measured(10, 11), measured(20, 12), measured(40, 200), measured(28.3, 100)]
"""20 requests per second surely meet the SLO, 28.3 surely do not."""


def limit(rate: float | None, low: float | None, high: float | None) -> GoodputLimit:
    return GoodputLimit(CELL, 0.9, (), rate, low, high, None)


def recorded(times_s: Iterable[float]) -> str:
    """Write a trace of requests at these times, and return its name."""
    lines = [{"timestamp": 1000 * t, "input_length": 8, "output_length": 3} for t in times_s]
    Path("day.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return "day.jsonl"


@pytest.mark.parametrize(
    ("rate", "own", "expected"),
    [
        (50, (20, 16, 28.3), Servers(3, 2, 4)),
        (20, (20, 20, 28.3), Servers(1, 1, 1)),
        (60.00000000001, (20, 20, 30), Servers(3, 2, 3)),  # rounding is no request
        (20.1, (20, 20, 30), Servers(2, 1, 2)),
        (0.001, (20, 20, 30), Servers(1, 1, 1)),
        (50, (20, None, None), Servers(3, None, None)),
        (50, (None, None, 10), Servers(None, 5, None)),
        (0, (None, None, None), Servers(0, 0, 0)),
    ],
)
def test_the_number_of_servers_is_that_of_whole_ones(
    rate: float, own: tuple[float | None, float | None, float | None], expected: Servers
) -> None:
    assert servers_for(rate, limit(*own)) == expected


def test_the_interval_is_that_of_one_servers_goodput() -> None:
    [found] = plan_capacity(LOADS, of_rate(100), 0.9)
    assert found.servers == Servers(5, 4, 5)
    [more] = plan_capacity(LOADS, of_rate(100), 0.9, headroom=0.2)
    assert more.servers == Servers(6, 5, 6)


def test_the_peak_of_a_trace_is_its_busiest_window_wherever_it_begins() -> None:
    even = [float(n) for n in range(600)]  # one a second
    burst = [300.5 + n / 10 for n in range(300)]  # ten more a second, for thirty seconds
    found = of_trace(read_trace(recorded(sorted(even + burst))), 30.0)
    assert found.peak == pytest.approx((300 + 30) / 30, rel=0.01)
    assert 300 <= found.busiest_s <= 301
    assert found.mean == pytest.approx(900 / 599, rel=0.01)
    assert found.hours == ()
    brute = max(sum(t <= other < t + 30 for other in sorted(even + burst)) for t in sorted(even + burst)) / 30
    assert found.peak == brute


def test_a_day_is_answered_by_the_hour() -> None:
    draw = random.Random(22)
    rates = [1, 2, 0, 4]
    times = sorted(
        [0.0, *(hour * 3600 + draw.uniform(0, 3600) for hour, rate in enumerate(rates) for _ in range(rate * 3600))]
    )
    traffic = of_trace(read_trace(recorded(times)), 600.0)
    assert [round(rate) for rate in traffic.hours] == rates
    [found] = plan_capacity([measured(1, 10), measured(2, 10), measured(3, 200)], traffic, 0.9)
    assert [hour.count for hour in found.hours] == [1, 2, 0, 3]  # the busiest ten minutes are a little above the mean
    assert found.servers.count == 3 and found.server_hours == 6
    text = format_capacity(CapacityPlan(traffic, 0.0, 0.9, (found,)))
    assert "By the hour: 1, 2, 0, 3 servers, 6 server hours instead of 12 if their number follows the traffic." in text


def test_a_short_trace_is_one_window() -> None:
    found = of_trace(read_trace(recorded([0, 1, 2])), 60.0)
    assert (found.peak, found.mean, found.window_s) == (1.5, 1.5, 2.0)
    one = of_trace(read_trace(recorded([5])), 60.0)
    assert one.peak == pytest.approx(1 / 60)


def test_an_hour_is_no_longer_than_its_window() -> None:
    found = of_trace(read_trace(recorded(n / 2 for n in range(2 * 3 * 3600))), 7200.0)
    assert [round(rate, 2) for rate in found.hours] == [2.0, 2.0, 2.0]


def test_configurations_are_answered_beside_each_other_the_fewest_first() -> None:
    slower = [measured(rate, ttft, model="b") for rate, ttft in ((10, 11), (20, 200))]
    found = plan_capacity([*slower, *LOADS], of_rate(100), 0.9)
    assert [(one.limit.cell.model, one.servers.count) for one in found] == [(CELL.model, 5), ("b", 10)]


def test_prices_are_those_of_the_measured_machine() -> None:
    priced = [dataclasses.replace(one, price_per_hour=2.0) for one in LOADS]
    [found] = plan_capacity(priced, of_rate(100), 0.9)
    assert found.price_per_hour == 2.0
    assert found.price_of_million == pytest.approx(2 / (found.limit.rate or 0) / 3 / 3600 * 1e6, rel=0.2)
    text = format_capacity(CapacityPlan(of_rate(100), 0.0, 0.9, (found,)))
    assert "per hour" in text and "10.00" in text
    assert "per hour" not in format_capacity(
        CapacityPlan(of_rate(100), 0, 0.9, plan_capacity(LOADS, of_rate(100), 0.9))
    )


def test_what_limits_the_answer_is_said() -> None:
    nothing = plan_capacity([measured(10, 100)], of_rate(5), 0.9)
    assert nothing[0].servers.count is None
    text = format_capacity(CapacityPlan(of_rate(5), 0.0, 0.9, nothing))
    assert "No rate that was tried meets TTFT ≤ 20 ms for 90% of the requests" in text
    assert "No number of such servers helps." in text
    [open_end] = plan_capacity([measured(10, 11), measured(20, 12)], of_rate(50), 0.9)
    assert open_end.servers == Servers(3, None, 3)
    assert any(note.startswith("No measured rate was surely too high") for note in open_end.notes)
    assert any(
        re.match(r"[1-5] of its 5 loads are suspect: ", note) for note in plan_capacity(LOADS, of_rate(5), 0.9)[0].notes
    )
    longer = Traffic(50, 50, 60, lengths=(800.0, 200.0))
    [other] = plan_capacity(LOADS, longer, 0.9)
    assert any(note.startswith("The traffic's requests have 800 + 200 tokens in the mean") for note in other.notes)


@pytest.mark.parametrize(
    ("named", "told"),
    [
        ({}, "Say which traffic: --rate 12.5"),
        ({"rate": 1.0, "trace": "x"}, "Say which traffic: --rate 12.5"),
        ({"rate": 0.0}, "rate must be more than 0: 0."),
        ({"rate": float("nan")}, "rate must be more than 0: nan."),
        ({"rate": 1.0, "headroom": -0.1}, "headroom must be at least 0: -0.1."),
        ({"rate": 1.0, "attainment": 1.0}, "attainment is not between 0 and 1: 1."),
        ({"trace": "absent.jsonl"}, "Cannot read trace file absent.jsonl"),
    ],
)
def test_a_question_that_cannot_be_answered_is_refused_by_one_line(named: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError) as error:
        capacity((), **named)
    assert str(error.value).startswith(told) and "\n" not in str(error.value)


def kept(results: Sequence[RunResult]) -> str:
    folder = Path("results") / "20260101T000000Z-made"
    for number, one in enumerate(results):
        own = dataclasses.replace(one, hashes=dataclasses.replace(one.hashes, config=f"{number:016x}"))
        write_cell(own, folder / f"{number:016x}" / "artifacts")
    (folder / "sweep.json").write_text("{}")
    return str(folder)


def test_the_command_answers_from_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    folder = kept(LOADS)
    assert main(["capacity", folder, "--rate", "100", "--json"]) == 0
    out = capsys.readouterr().out
    assert "Traffic: 100.0 requests per second; with 20% headroom 120.0." in out
    assert out.splitlines()[3].split() == ["6", "5", "to", "6", "20.00", "(20.00", "to", "28.30)"]
    assert json.loads(out.splitlines()[-1])["configurations"][0]["servers"] == {"count": 6, "low": 5, "high": 6}
    assert not list(Path.cwd().glob("*.db"))  # nothing is logged


def test_results_without_a_rate_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    folder = kept([measured(None, 10)])
    assert main(["capacity", folder, "--rate", "100"]) == 2
    told = capsys.readouterr().err
    assert (
        "None of the 1 results is a load of a server at a request rate with SLOs" in told and "--find goodput" in told
    )
    for wrong in (
        ["--rate", "many"],
        ["--rate", "0"],
        ["--window", "1 day", "--rate", "1"],
        ["--headroom", "x", "--rate", "1"],
    ):
        assert main(["capacity", folder, *wrong]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
