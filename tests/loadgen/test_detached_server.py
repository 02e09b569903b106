"""Servers that go on without the command that started them: found again, and ended with all their processes."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from mlflow_llmbench.loadgen import detached_server
from mlflow_llmbench.loadgen.detached_server import MARK, Keeper
from mlflow_llmbench.loadgen.server_process import free_port
from mlflow_llmbench.records.errors import MeasurementError
from mlflow_llmbench.system import memory, processes

from .test_server_process import ROOT, is_alive, notes, within

MARKED = secrets.token_hex(8)  # of this run of the tests alone: others may run beside it


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    detached_server.end(None, MARKED)


def command(port: int, *more: str) -> list[str]:
    return [sys.executable, str(ROOT / "tests" / "launched_server.py"), "--port", str(port), *more]


def start(folder: Path, *more: str) -> tuple[Keeper, int, dict[str, Any]]:
    """Start a null server; return its keeper, its port, and its note once it answers."""
    port, note = free_port(), folder / "notes.jsonl"
    environment = {**os.environ, "OWN": "kept"}
    keeper = detached_server.start(
        command(port, "--note", str(note), *more), folder, folder / "server.log", environment, MARKED
    )
    assert within(lambda: answers(port))
    return keeper, port, notes(note)[-1]


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def test_a_server_survives_the_command_that_started_it(tmp_path: Path) -> None:
    code = (
        "import json, os, pathlib, sys\n"
        "from mlflow_llmbench.loadgen import detached_server\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        f"keeper = detached_server.start(sys.argv[2:], folder, folder / 'server.log', dict(os.environ), '{MARKED}')\n"
        "print(json.dumps([keeper.pid, keeper.began_s]))\n"
    )
    port, note = free_port(), tmp_path / "notes.jsonl"
    arguments = [str(tmp_path), *command(port, "--note", str(note), "--say", "hello")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, check=True
    )
    keeper = Keeper(*json.loads(done.stdout))
    assert within(lambda: answers(port))
    assert keeper.is_alive
    told = notes(note)[-1]
    assert told["pid"] in memory.descendants(keeper.pid) and told["helper"] in memory.descendants(keeper.pid)
    assert detached_server.held_memory(keeper).rss > 1 << 20
    assert "hello" in (tmp_path / "server.log").read_text()
    assert detached_server.end(keeper, MARKED) == []
    assert not any(map(is_alive, (keeper.pid, told["pid"], told["helper"])))
    assert not answers(port)
    assert detached_server.end(keeper, MARKED) == []  # nothing happens the second time


def test_all_processes_are_ended_after_the_keeper_was_killed(tmp_path: Path) -> None:
    keeper, _, told = start(tmp_path)
    assert told["variables"]["OWN"] == "kept" and told["variables"][MARK] == MARKED
    os.kill(keeper.pid, signal.SIGKILL)
    assert within(lambda: not is_alive(told["pid"]))  # the server has to end with its keeper
    assert not keeper.is_alive
    assert detached_server.marked(MARKED) == [told["helper"]]
    assert detached_server.end(keeper, MARKED) == []
    assert not is_alive(told["helper"])


def test_a_server_that_ends_by_itself_takes_its_keeper_along(tmp_path: Path) -> None:
    keeper, _, told = start(tmp_path, "--die", "0.5")
    assert within(lambda: not keeper.is_alive)
    assert not is_alive(told["helper"])
    assert detached_server.marked(MARKED) == []


def test_a_deaf_server_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keeper, _, told = start(tmp_path, "--deaf")
    assert detached_server.end(keeper, MARKED) == []
    assert not is_alive(told["pid"])


def test_a_program_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(MeasurementError, match="cannot be started: No such file or directory: /nowhere/server"):
        detached_server.start(["/nowhere/server"], tmp_path, tmp_path / "server.log", dict(os.environ), MARKED)


def test_another_process_with_the_same_id_is_not_the_keeper() -> None:
    own = Keeper(os.getpid(), processes.began(os.getpid()) or 0)
    assert own.is_alive
    assert not dataclasses.replace(own, began_s=own.began_s - 60).is_alive
    assert not Keeper(2**22 + 1, own.began_s).is_alive
    assert processes.boot_id() == processes.boot_id() != ""


def test_a_clock_that_is_set_leaves_a_keeper_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system tells dates of processes as the machine's start and the time since; setting the clock moves both."""
    own = Keeper(os.getpid(), processes.began(os.getpid()) or 0)
    started, began = psutil.boot_time(), psutil.Process().create_time()
    monkeypatch.setattr(psutil, "boot_time", lambda: started + 3600)
    monkeypatch.setattr(psutil.Process, "create_time", lambda _: began + 3600)
    assert own.is_alive
