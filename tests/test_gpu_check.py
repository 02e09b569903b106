"""The script for ten minutes on a GPU: one line for each step, whatever becomes of it. Its steps need a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.gpu_check import STEPS, run_steps, summed_up

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu_check.py"

PROGRAMS = {
    "holds": 'print(\'a word\'); print(\'{"confirmed": ["it holds"], "refuted": []}\')',
    "fails": "import sys; sys.exit('the driver is gone')",
    "mumbles": "print('no JSON')",
    "is silent": "",
    "hangs": "import subprocess, time; o = subprocess.Popen(['sleep', '600'])"
    "; open('pid', 'w').write(str(o.pid)); time.sleep(600)",
    "doubts": 'print(\'{"confirmed": [], "refuted": ["it holds too"]}\')',
}


def command(name: str) -> list[str]:
    return [sys.executable, "-c", PROGRAMS[name]]


def wait_for_end(pid: int) -> None:
    """Wait until a process that was killed is gone; the test's own time limit ends it otherwise."""
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.02)


def test_each_step_has_its_line_whatever_becomes_of_it(tmp_path: Path) -> None:
    told: list[Mapping[str, Any]] = []
    lines = run_steps({name: 3.0 if name == "hangs" else 60.0 for name in PROGRAMS}, command, 600, told.append)
    assert told == lines
    assert [line["step"] for line in lines] == list(PROGRAMS)
    errors = {line["step"]: line.get("error") for line in lines}
    assert errors == {
        "holds": None,
        "fails": "exit code 1: the driver is gone",
        "mumbles": "exit code 0: no JSON",
        "is silent": "exit code 0: nothing printed",
        "hangs": "stopped after its limit of 3 s",
        "doubts": None,
    }
    last = summed_up(lines)
    assert (last["confirmed"], last["refuted"]) == (["it holds"], ["it holds too"])
    assert sorted(last["failed"]) == ["fails", "hangs", "is silent", "mumbles"]
    wait_for_end(int((tmp_path / "pid").read_text()))  # what the stopped step had started


def test_what_the_time_does_not_allow_is_told_as_not_run() -> None:
    lines = run_steps({"holds": 60.0, "doubts": 60.0}, command, 0.5, lambda _: None)
    assert [line["error"] for line in lines] == ["not run: no time was left"] * 2


def test_a_step_is_over_when_the_script_is_stopped(tmp_path: Path) -> None:
    program = (
        "import os, sys; from benchmarks import gpu_check;"
        f"gpu_check._told_by([sys.executable, '-c', {PROGRAMS['hangs']!r}], 600)"
    )
    begin = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(143));"
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent.parent)}
    with subprocess.Popen([sys.executable, "-c", begin + program], env=environment) as script:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            time.sleep(0.05)
        script.terminate()
    wait_for_end(int((tmp_path / "pid").read_text()))


def test_the_limits_of_what_settles_most_leave_time_for_the_rest() -> None:
    assert len(STEPS) >= 12
    assert sum(step.limit_s for step in list(STEPS.values())[:7]) <= 380


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["message"] == "No NVIDIA GPU answers here, so nothing was checked."
    wrong = subprocess.run(
        [sys.executable, SCRIPT, "--device", "cpu", "--only", "none"], capture_output=True, text=True
    )
    assert wrong.returncode == 2
    assert "no step is named none; there are readings, " in wrong.stderr
