"""A view of a load while it is sent: worked examples, and a real load."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from pathlib import Path
from unittest.mock import Mock

import pytest

from mlflow_llmbench.loadgen.request_board import EndedRequest, RequestBoard
from mlflow_llmbench.measure import live_load
from mlflow_llmbench.measure.events import Event, LoadObserved
from mlflow_llmbench.measure.live_load import LiveLoad, observed
from mlflow_llmbench.measure.supervise import run_worker
from mlflow_llmbench.measure.task import WorkerJob
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.results import ModelFacts

from ..null_server import null_server

MS = 1_000_000
CELL = Cell(backend="openai", url="http://h", model="m", output_tokens=11)


def request(ttft_ms: int, e2e_ms: int, failed: int = 0) -> EndedRequest:
    return EndedRequest(1000 * MS, (1000 + ttft_ms) * MS, (1000 + e2e_ms) * MS, failed)


def test_a_worked_example() -> None:
    ended = [request(10, 110), request(20, 220), request(30, 330), request(5, 6, failed=1)]
    found = observed(CELL, ended, 7, 10.0)
    assert (found.requests, found.failed, found.in_flight, found.good) == (4, 1, 7, None)
    assert found.ttft_ms == pytest.approx((20, 29)) and found.e2e_ms == pytest.approx((220, 319))
    for limits, good in (
        ({"slo_ttft_ms": 20.0}, 2),
        ({"slo_tpot_ms": 20.0}, 2),  # 10, 20 and 30 ms
        ({"slo_e2e_ms": 110.0}, 1),
        ({"slo_ttft_ms": 20.0, "slo_e2e_ms": 110.0}, 1),
    ):
        assert observed(dataclasses.replace(CELL, **limits), ended, 0, 10.0).good == good  # type: ignore[arg-type]
    embedded = observed(dataclasses.replace(CELL, endpoint="embeddings"), ended, 0, 10.0)
    assert embedded.ttft_ms is None and embedded.e2e_ms == found.e2e_ms
    none = observed(dataclasses.replace(CELL, slo_e2e_ms=1.0), [EndedRequest(1, 0, 9, 1)], 0, 10.0)
    assert (none.failed, none.ttft_ms, none.e2e_ms, none.good) == (1, None, None, 0)


def test_a_short_load_is_left_alone_and_a_long_one_is_looked_at_each_second() -> None:
    live = LiveLoad([CELL])
    try:
        RequestBoard(live.folder).begin()
        now = time.monotonic()
        assert live.look(now - live_load.AFTER_S + 2) is None
        seen = live.look(now - 60)
        assert seen and (seen.in_flight, seen.seconds) == (1, live_load.WINDOW_S)
        assert live.look(now - 60) is None
        live.told -= live_load.EVERY_S
        assert live.look(now - 60)
    finally:
        live.close()
    assert not live.folder.exists()


def test_without_room_for_it_nothing_is_shown_and_the_measurement_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "mkdtemp", Mock(side_effect=OSError(28, "No space left on device")))
    assert live_load.live_load([CELL]) is None


def test_what_a_worker_sends_is_seen_while_it_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AFTER_S", "EVERY_S"):
        monkeypatch.setattr(live_load, name, 0.1)
    heard: list[Event] = []
    with null_server() as url:
        cell = Cell(
            backend="openai",
            url=url,
            model="null:ttft_ms=5+itl_ms=5",
            output_tokens=4,
            prompt_tokens=16,
            concurrency=4,
            duration_s=2.0,
            client_processes=2,
            warmup=1,
            repetitions=1,
            slo_e2e_ms=1e6,
        )
        (tmp_path / "cell").mkdir()
        job = WorkerJob("measure", (cell,), ModelFacts("m", "none", url, "main"), (tmp_path / "cell",))
        outcome = run_worker(job, tmp_path / "worker.log", waited=heard.append)
    assert outcome.error is None
    seen = [event for event in heard if isinstance(event, LoadObserved)]
    busiest = max(seen, key=lambda one: one.requests)
    assert busiest.requests > 4 and busiest.failed == 0
    assert busiest.good == busiest.requests
    assert busiest.ttft_ms and busiest.e2e_ms and busiest.ttft_ms[0] < busiest.e2e_ms[0]
    assert max(one.in_flight for one in seen) in range(1, 5)
    assert "load_observed" not in (tmp_path / "worker.jsonl").read_text()
