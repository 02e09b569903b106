"""Readings of waiting, as the kernel writes them, and of a thread that really waits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlflow_llmbench.system import cgroups, machine, pressure


def test_run_delays_are_read_by_thread_in_nanoseconds(tmp_path: Path) -> None:
    for thread, text in (("7", "900 1500000000 12\n"), ("8", "1 250 2\n"), ("9", "damaged")):
        (tmp_path / "self" / "task" / thread).mkdir(parents=True)
        (tmp_path / "self" / "task" / thread / "schedstat").write_text(text)
    assert pressure.run_delays_s(tmp_path) == {"7": 1.5, "8": 250e-9}
    assert pressure.run_delays_s(tmp_path / "nothing") is None


def test_the_delay_between_two_readings_is_that_of_the_threads_that_are_left() -> None:
    before = {"1": 1.0, "2": 5.0, "reused": 9.0}
    assert pressure.run_delay_between(before, {"1": 1.25, "3": 0.5, "reused": 0.1}) == pytest.approx(0.75)
    assert pressure.run_delay_between(None, before) is None
    assert pressure.run_delay_between(before, None) is None


def test_stalls_are_read_in_microseconds(tmp_path: Path) -> None:
    (tmp_path / "pressure").mkdir()
    (tmp_path / "pressure" / "memory").write_text(
        "some avg10=0.00 avg60=0.00 avg300=0.00 total=1750000\nfull total=3\n"
    )
    assert pressure.stall_s(tmp_path, "memory") == 1.75
    assert pressure.stall_s(tmp_path, "cpu") is None


def test_noise_has_the_waiting_between_two_readings() -> None:
    def readings(at: float, delay: float, stalled: float, held: cgroups.Throttling | None) -> machine.Readings:
        return machine.Readings(
            at, 0.0, at, at, 0.0, 0, 0, 0, run_delays_s={"1": delay}, memory_pressure_s=stalled, throttling=held
        )

    noise = machine.noise_between(
        readings(1.0, 0.5, 2.0, cgroups.Throttling(10, 2, 1.0)),
        readings(2.0, 0.75, 2.5, cgroups.Throttling(20, 5, 1.5)),
    )
    assert (noise.run_delay_s, noise.memory_pressure_s) == (0.25, 0.5)
    assert (noise.quota_throttled_s, noise.quota_throttles, noise.busy_cpu_s) == (0.5, 3, 1.0)
    assert machine.noise_between(readings(1, 0, 0, None), readings(2, 0, 0, None)).quota_throttled_s is None


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="needs the scheduler's counters")
def test_a_process_that_shares_its_cpu_waits() -> None:
    """Two processes on one CPU: each is ready half of the time, so that both wait; at least 0.05 s of 0.3 s used."""
    code = (
        "import os, sys, time; from mlflow_llmbench.system import machine\n"
        f"os.sched_setaffinity(0, {{{min(os.sched_getaffinity(0))}}})\n"
        "child = os.fork()\n"
        "before = machine.take_readings()\n"
        "until = time.process_time() + 0.3\n"
        "while time.process_time() < until: pass\n"
        "if child:\n"
        "    print(machine.noise_between(before, machine.take_readings()).run_delay_s); os.waitpid(child, 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) > 0.05
