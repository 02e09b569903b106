"""A host without /proc, as macOS is one: command and worker take memory from psutil, and what only /proc has is absent.

Both processes look for /proc in a folder that does not exist; psutil has its own way to the system.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mlflow_llmbench import load_results, run
from mlflow_llmbench.system import machine, memory

HIDE = """
import pathlib
from mlflow_llmbench.system import machine, memory
memory.PROC = machine.PROC = pathlib.Path("/nowhere")
open({seen!r}, "a").write("hidden")
"""


@pytest.fixture
def without_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Hide /proc from this process and from those that it starts. Returns a file to which each of these writes."""
    seen, site = tmp_path / "seen.txt", tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(HIDE.format(seen=str(seen)))
    monkeypatch.setenv("PYTHONPATH", str(site), prepend=os.pathsep)
    monkeypatch.setattr(memory, "PROC", Path("/nowhere"))
    monkeypatch.setattr(machine, "PROC", Path("/nowhere"))
    return seen


def test_a_cell_is_measured_with_the_memory_that_psutil_tells(without_proc: Path, store_uri: str) -> None:
    result = run(model="fake:memory_mb=60", backend="fake", prompt_tokens=4, output_tokens=4, warmup=1, repetitions=5)
    assert [row.outcome for row in result.rows] == ["ok"], result.rows[0].message
    assert without_proc.read_text().startswith("hidden")
    [found] = load_results(result.folder)
    figures = result.rows[0].metrics
    assert figures["memory/host_rss_gb_loaded"] - figures["memory/host_rss_gb_baseline"] == pytest.approx(0.06, rel=0.3)
    assert "memory/host_needed_gb_peak" not in figures  # pages are not told apart
    assert found.timeline and all(repetition.noise for repetition in found.repetitions)


def test_a_worker_beyond_its_limit_is_ended(without_proc: Path, store_uri: str) -> None:
    cell = {"prompt_tokens": 4, "output_tokens": 4, "warmup": 1, "repetitions": 5}
    result = run(model="fake:memory_mb=400+load_ms=2000", backend="fake", memory_limit="200MB", **cell)
    assert result.rows[0].outcome == "oom" and "memory_limit is 0.200 GB" in result.rows[0].message


def test_processes_are_found_and_counted(without_proc: Path) -> None:
    own = memory.read()
    assert own and own.rss > 10**7 and own.anonymous is None
    assert memory.read(2**22 + 1) is None and memory.descendants(os.getpid()) == []
    assert not memory.reset_peak() and memory.mapped_parts([(0, 2**40)]) == [] and memory.referenced_bytes([1]) == 0
