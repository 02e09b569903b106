"""Requests that other processes see as they end."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest

from mlflow_llmbench.backends.openai.http_requests import http_request
from mlflow_llmbench.loadgen.address import address_of
from mlflow_llmbench.loadgen.client import Load, LoadClient
from mlflow_llmbench.loadgen.http1 import Exchange
from mlflow_llmbench.loadgen.request_board import ENTRIES, HEAD, VARIABLE, EndedRequest, RequestBoard, read_boards

from ..null_server import null_server
from .test_server_process import ROOT


def ended(t0_ns: int, end_ns: int, status: int = 200, fault: str = "", intended_ns: int | None = None) -> Exchange:
    return Exchange(0, intended_ns, t0_ns, end_ns, status, stamps=[t0_ns + 1], parts=[b"x"], fault=fault)


def test_requests_are_read_as_they_end(tmp_path: Path) -> None:
    board = RequestBoard(tmp_path)
    for _ in range(5):
        board.begin()
    board.end(ended(10, 20))
    board.end(ended(12, 30, status=500))
    board.end(ended(14, 40, fault="timeout", intended_ns=9))
    seen = read_boards(tmp_path, 0)
    assert seen.in_flight == 2
    assert seen.ended == (EndedRequest(9, 15, 40, 1), EndedRequest(12, 13, 30, 1), EndedRequest(10, 11, 20, 0))
    assert [one.ended_ns for one in read_boards(tmp_path, 30).ended] == [40, 30]
    assert read_boards(tmp_path / "nowhere", 0).ended == ()


def test_a_board_has_its_space_on_the_disk_before_it_is_used(tmp_path: Path) -> None:
    board = RequestBoard(tmp_path)
    [file] = tmp_path.iterdir()
    assert file.stat().st_blocks * 512 >= file.stat().st_size > ENTRIES
    board.begin()


def test_a_full_board_keeps_the_newest(tmp_path: Path) -> None:
    board = RequestBoard(tmp_path)
    for number in range(ENTRIES + 3):
        board.begin()
        board.end(ended(number, number + 1))
    seen = read_boards(tmp_path, 0).ended
    assert len(seen) == ENTRIES
    assert (seen[0].ended_ns, seen[-1].ended_ns) == (ENTRIES + 3, 4)


def test_the_boards_of_several_processes_are_one_view(tmp_path: Path) -> None:
    RequestBoard(tmp_path).end(ended(1, 2))
    code = (
        "import pathlib, sys; from mlflow_llmbench.loadgen.request_board import RequestBoard;"
        "RequestBoard(pathlib.Path(sys.argv[1])).begin()"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=True)
    (tmp_path / "1.board").write_bytes(b"")  # not written yet
    (tmp_path / "2.board").write_bytes(b"x" * (HEAD.size - 1))
    seen = read_boards(tmp_path, 0)
    assert (seen.in_flight, len(seen.ended)) == (1, 1)


def test_there_is_a_board_only_where_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert RequestBoard.of_environment() is None
    monkeypatch.setenv(VARIABLE, str(tmp_path / "nowhere"))
    assert RequestBoard.of_environment() is None
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    assert RequestBoard.of_environment()


def test_a_client_writes_what_it_sends_and_no_readings_of_metrics(tmp_path: Path) -> None:
    with null_server() as url:
        address = address_of(url)
        with contextlib.closing(LoadClient(address)) as client:
            client.board = RequestBoard(tmp_path)
            trace = client.run(
                lambda number: http_request(address, "/health" if number else "/nothing", number=number),
                Load(requests=8, concurrency=2),
                scrape=http_request(address, "/metrics"),
            )
    seen = read_boards(tmp_path, 0)
    assert len(trace.scrapes) == 2
    assert (seen.in_flight, len(seen.ended), sum(one.failed for one in seen.ended)) == (0, 8, 1)
    assert {one.ended_ns for one in seen.ended} == {exchange.end_ns for exchange in trace.exchanges}
