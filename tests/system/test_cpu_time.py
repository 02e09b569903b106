"""CPU time of another process."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from mlflow_llmbench.system import cpu_time

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such clock")


def test_the_clock_of_a_process_is_that_of_its_threads_and_ends_with_it() -> None:
    own = cpu_time.process_s(os.getpid())
    assert own is not None and own <= time.process_time()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        first = cpu_time.process_s(process.pid)
        second = cpu_time.process_s(process.pid)
        assert first is not None and second is not None and 0 <= first <= second
        process.communicate(b"\n")
        assert cpu_time.process_s(process.pid) is None


def test_a_program_that_computes_is_among_the_busy_cpus() -> None:
    with subprocess.Popen([sys.executable, "-c", "print('', flush=True)\nwhile True: pass"], stdout=-1) as burner:
        try:
            assert burner.stdout and burner.stdout.readline()
            assert cpu_time.busy_cpus() > 0.2
        finally:
            burner.kill()
