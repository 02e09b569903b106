"""One load from several client processes: the same requests as from one, all divided, on one clock."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlflow_llmbench.analysis.summary import summarize
from mlflow_llmbench.backends.openai.backend import OpenAIBackend
from mlflow_llmbench.backends.openai.client_processes import Share
from mlflow_llmbench.loadgen.client import Load, Trace
from mlflow_llmbench.loadgen.http1 import Exchange
from mlflow_llmbench.measure.online import _processes_for
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.codec import from_json, to_json
from mlflow_llmbench.records.errors import MeasurementError
from mlflow_llmbench.records.results import ClientReadings, ModelFacts
from mlflow_llmbench.sweeps.sweep import run
from mlflow_llmbench.workloads.prompts import load_prompts

from ...measure.test_online import MS, QUIET, TWO_USERS, codes, result
from ...null_server import null_server, read_log

MODEL = "null:ttft_ms=20+itl_ms=2"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with null_server(MODEL) as url:
        yield url


def send(url: str, load: Load, processes: int, **settings: Any) -> tuple[Trace, dict[str, dict[str, Any]]]:
    """Return the trace of a load of requests for 4 tokens, and the server's log."""
    cell = Cell(**{"backend": "openai", "url": url, "model": MODEL, "output_tokens": 4, "prompt_tokens": 16} | settings)
    backend = OpenAIBackend(cell, ModelFacts("", "none", "", ""))
    backend.prompt_prefix = backend.conversation_prefix = "the same for all"
    read_log(url)
    try:
        trace = backend.send(load_prompts(cell.workload), cell, 0, load, processes=processes)
    finally:
        backend.close()
    assert {backend.read(exchange).outcome for exchange in trace.exchanges} == {"complete"}
    return trace, read_log(url)


@pytest.mark.parametrize(("users", "requests", "count"), [(5, 20, 2), (7, 3, 4), (4, 16, 4), (3, 100, 1), (16, 61, 3)])
def test_a_closed_load_is_divided_by_users_without_a_rest(users: int, requests: int, count: int) -> None:
    shares = [Share.of(Load(requests, users), index, count) for index in range(count)]
    assert sum(share.load.concurrency for share in shares) == users
    numbers = [share.number(position) for share in shares for position in range(share.load.requests or 0)]
    assert sorted(numbers) == list(range(requests))
    assert max(share.load.concurrency for share in shares) - min(share.load.concurrency for share in shares) <= 1
    forever = Share.of(Load(None, users, 1.0), 0, count)
    assert (forever.load.requests, forever.load.duration_s) == (None, 1.0)


def test_an_open_load_keeps_its_times() -> None:
    times = (0, 5, 7, 11, 20)
    shares = [Share.of(Load(5, arrivals_ns=times), index, 2) for index in range(2)]
    found = {share.number(position): at for share in shares for position, at in enumerate(share.load.arrivals_ns or ())}
    assert [found[number] for number in range(5)] == list(times)


@pytest.mark.parametrize(
    "load", [Load(11, 5), Load(arrivals_ns=tuple(range(0, 110_000_000, 10_000_000)))], ids=["closed", "open"]
)
def test_several_processes_send_what_one_sends_on_one_clock(server: str, load: Load) -> None:
    slow = "null:ttft_ms=200+itl_ms=2"
    alone, log_alone = send(server, load, 1, model=slow)
    several, log = send(server, load, 3, model=slow)
    assert (
        [exchange.number for exchange in several.exchanges]
        == [exchange.number for exchange in alone.exchanges]
        == list(range(11))
    )
    assert {number: entry["asked"] for number, entry in log.items()} == {
        number: entry["asked"] for number, entry in log_alone.items()
    }
    assert (len(several.parts), len(alone.parts), several.lags_ns) == (3, 0, ())
    assert len({part.started_ns for part in several.parts}) == 1
    assert several.cpu_s == pytest.approx(sum(part.cpu_s for part in several.parts))
    for exchange in several.exchanges:
        truth = log[str(exchange.number)]
        assert several.started_ns <= exchange.t0_ns < truth["received_ns"] < exchange.stamps[0] < several.ended_ns
        if load.arrivals_ns:
            assert exchange.intended_ns == several.started_ns + load.arrivals_ns[exchange.number] <= exchange.t0_ns
    if not load.arrivals_ns:
        fifth = sorted(exchange.t0_ns for exchange in several.exchanges)[4]
        assert fifth < min(
            exchange.stamps[0] for exchange in several.exchanges
        )  # five users begin together, before the first answer


def test_conversations_stay_with_their_process(server: str, tmp_path: Path) -> None:
    file = tmp_path / "talks.jsonl"
    talk = [
        {"role": "user", "content": "One."},
        {"role": "assistant", "content": "x"},
        {"role": "user", "content": "Two."},
    ]
    file.write_text(json.dumps({"messages": talk}))
    asked = {"history": "sent", "endpoint": "chat", "prompt_tokens": None, "workload": str(file)}
    trace, log = send(server, Load(5, 3), 2, **asked)
    assert sorted((exchange.conversation, exchange.turn) for exchange in trace.exchanges) == [
        (number, turn) for number in range(5) for turn in (1, 2)
    ]
    assert len({exchange.number for exchange in trace.exchanges}) == 10
    assert set(log) == {f"{number}-{turn}" for number in range(5) for turn in (1, 2)}
    assert log == {
        name: entry | {"asked": send_alone[name]["asked"]}
        for send_alone in [send(server, Load(5, 3), 1, **asked)[1]]
        for name, entry in log.items()
    }


def test_a_process_that_dies_is_one_clear_line(server: str) -> None:
    cell = Cell(backend="openai", url=server, model=MODEL, output_tokens=4, prompt_tokens=16)
    backend = OpenAIBackend(cell, ModelFacts("", "none", "", ""))
    prompts = load_prompts("synthetic")
    try:
        backend.send(prompts, cell, 0, Load(4, 2), processes=2)
        assert backend.others
        backend.others.processes[1].kill()
        with pytest.raises(MeasurementError) as caught:
            backend.send(prompts, cell, 1, Load(4, 2), processes=2)
        assert len(backend.send(prompts, cell, 1, Load(4, 2), processes=2).exchanges) == 4
    finally:
        backend.close()
    assert "A client process ended without a message (exit code -9)." in str(caught.value)


def test_a_late_process_is_not_hidden_by_the_others() -> None:
    late, busy = dataclasses.replace(QUIET, lags_ns=(20 * MS,) * 50), dataclasses.replace(QUIET, cpu_s=0.5)
    several = ClientReadings(0, 1000 * MS, (), 0.65, 1, (QUIET, late, busy, QUIET))
    one = result(*TWO_USERS, client=several)
    metrics = summarize(one)
    assert metrics["client/loop_lag_ms_p50"] == 20
    assert (metrics["client/cpu_ratio"], metrics["client/cpus"], metrics["client/processes"]) == (
        0.5,
        pytest.approx(0.65),
        4,
    )
    assert codes(one) == {"client_bound"}
    assert from_json(ClientReadings, json.loads(json.dumps(to_json(several)))) == several
    alone = summarize(result(*TWO_USERS))
    assert (alone["client/processes"], "client/cpus" in alone) == (1, False)


@pytest.mark.parametrize(
    ("load", "cpu_s", "cpus", "count"),
    [
        (Load(40, 10), 0.9, 16, 2),  # 0.9 s of CPU in a wave of 1 s
        (Load(40, 10), 0.2, 16, 1),
        (Load(40, 10), 9.0, 4, 3),
        (Load(40, 10), 9.0, 1, 1),
        (Load(arrivals_ns=(0, 500_000_000, 1_000_000_000)), 0.01, 16, 1),  # 1 ms for each of 10 requests, 3 in a second
        (
            Load(arrivals_ns=tuple(range(0, 1_000_000_000, 500_000))),
            0.01,
            16,
            5,
        ),  # 2000 in a second: 2.0 cores, and one request more
    ],
)
def test_auto_takes_what_a_wave_says(
    monkeypatch: pytest.MonkeyPatch, load: Load, cpu_s: float, cpus: int, count: int
) -> None:
    monkeypatch.setattr("mlflow_llmbench.system.machine.usable_cpus", lambda: set(range(cpus)))
    wave = Trace(tuple(Exchange(number) for number in range(10)), 0, 1_000_000_000, (), cpu_s)
    assert _processes_for(load, wave) == count


def test_several_processes_are_a_cell(server: str, store_uri: str) -> None:
    done = run(
        tracking_uri=store_uri,
        backend="openai",
        url=server,
        model=MODEL,
        concurrency=4,
        client_processes=2,
        repetitions=5,
        warmup=1,
        output_tokens=4,
        prompt_tokens=16,
    )
    [row] = done.rows
    assert row.outcome == "ok", row.message
    assert (row.metrics["client/processes"], row.metrics["in_flight/requests_max"]) == (2, 4)
    assert row.metrics["client/cpus"] >= row.metrics["client/cpu_ratio"]
