"""Faults injected into whole runs, with real workers and processes: each gives exactly its reason.

Repetitions of 0.6 s make a delay of some tens of milliseconds on a busy machine harmless. Other work on the machine may
correctly add `contended`, and with it the reason for high variation; it may not add other reasons.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mlflow_llmbench import run
from mlflow_llmbench.analysis import latency
from mlflow_llmbench.measure import journal
from mlflow_llmbench.records.results import RunResult
from mlflow_llmbench.sweeps.sweep import SweepResult

TTFT, ITL, TOKENS = 100, 50, 11
SCRIPT = f"fake:ttft_ms={TTFT}+itl_ms={ITL}"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the faults are those of Linux")


def measure(script: str = SCRIPT, **parameters: Any) -> SweepResult:
    return run(
        model=script,
        **{"backend": "fake", "output_tokens": TOKENS, "prompt_tokens": 4, "repetitions": 5, "warmup": 1} | parameters,
    )


def reasons(result: SweepResult) -> list[str]:
    verdict = result.rows[0].verdict
    assert result.outcome == "ok" and verdict
    return [reason.code for reason in verdict.reasons]


def faults(result: SweepResult) -> set[str]:
    """The reasons without those caused by other work on this machine."""
    found = set(reasons(result))
    return found - {"contended", "high_variation"} if "contended" in found else found


def measured(result: SweepResult) -> RunResult:
    return journal.read_result(next(result.folder.glob("*/artifacts")))


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an installed package whose backends add machine faults to the fake one, found by entry point."""
    folder = tmp_path / "plugins"
    info = folder / "llmbench_faults-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llmbench-faults\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[mlflow_llmbench.backends]\nswapping = llmbench_faults:Swapping\nheated = llmbench_faults:Heated\n"
    )
    (folder / "llmbench_faults.py").write_text(f"""
from pathlib import Path
from mlflow_llmbench.system import machine
from mlflow_llmbench.backends.fake import FakeBackend

class Swapping(FakeBackend):
    '''Move 100 pages to disk in each call, as the kernel would count them.'''
    pages = 7_000
    def generate(self, prompts, output_tokens, emit):
        machine.PROC = Path({str(tmp_path)!r})
        self.pages += 100
        (machine.PROC / "vmstat").write_text(f"pswpin 5\\npswpout {{self.pages}}\\n")
        super().generate(prompts, output_tokens, emit)

class Heated(FakeBackend):
    '''Run on a GPU whose driver is the fake nvidia-ml-py below.'''
    device = "cuda:0"
""")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return folder


DRIVER = '''
"""A fake nvidia-ml-py with one GPU: throttled by heat for a tenth of all time, but never at the moment of a query."""
import time, types
class NVMLError(Exception): pass
NVML_CLOCK_SM = 1; NVML_CLOCK_MEM = 2; NVML_TEMPERATURE_GPU = 0; NVML_VALUE_TYPE_UNSIGNED_LONG_LONG = 3
NVML_FI_DEV_CLOCKS_EVENT_REASON_HW_THERM_SLOWDOWN = 270
def nvmlInit(): pass
def nvmlShutdown(): pass
def nvmlDeviceGetCount(): return 1
def nvmlDeviceGetHandleByIndex(index): return index
def nvmlDeviceGetUUID(handle): return "GPU-1"
def nvmlDeviceGetClockInfo(handle, kind): return 1980
def nvmlDeviceGetTemperature(handle, sensor): return 91
def nvmlDeviceGetCurrentClocksEventReasons(handle): return 0
def nvmlDeviceGetFieldValues(handle, ids):
    held = types.SimpleNamespace(ullVal=time.monotonic_ns() // 10)
    return [types.SimpleNamespace(nvmlReturn=0, valueType=3, value=held) for _ in ids]
'''


CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <time.h>
int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = (int (*)(clockid_t, struct timespec *)) dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(clock, now);
    struct timespec steady;
    if (clock == CLOCK_REALTIME && !real(CLOCK_MONOTONIC, &steady))
        now->tv_sec += 3600 * ((steady.tv_sec * 10 + steady.tv_nsec / 100000000) % 7 - 3);
    return failed;
}
"""
"""Code that steps the wall clock by an hour or more every 0.1 s, but not the monotonic clock, as settimeofday(2)."""


@pytest.fixture
def stepping_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    (tmp_path / "clock.c").write_text(CLOCK)
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-o", tmp_path / "clock.so", tmp_path / "clock.c", "-ldl"], check=True
    )
    monkeypatch.setenv("LD_PRELOAD", str(tmp_path / "clock.so"))


@contextmanager
def busy_neighbour() -> Iterator[None]:
    """A process that does not belong to us and takes a whole CPU."""
    burner = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        burner.kill()
        burner.wait()


def test_a_busy_neighbour_is_contention_and_nothing_else(store_uri: str) -> None:
    """Try at most three times: with further busy neighbours the numbers vary too."""
    for attempt in range(3):
        with busy_neighbour():
            result = measure(seed=attempt)
        if reasons(result) == ["contended"]:
            break
    assert reasons(result) == ["contended"]
    assert sum(r.noise.foreign_cpu_s or 0 for r in measured(result).repetitions if r.noise) > 0.5  # of 3 s
    assert any(r.noise and r.noise.spoiled for r in measured(result).repetitions)


def test_a_backend_that_stops_early_is_a_wrong_count_and_nothing_else(store_uri: str) -> None:
    result = measure(f"{SCRIPT}+stop_after=9")
    assert faults(result) == {"wrong_token_count"}
    assert result.rows[0].verdict and result.rows[0].verdict.word == "invalid"


def test_a_wall_clock_that_steps_changes_no_number_and_gives_no_reason(store_uri: str, stepping_clock: None) -> None:
    result = measure()
    repetitions = measured(result).repetitions
    starts = [r.wall_ms for r in repetitions]
    assert max(starts) - min(starts) > 3_500_000  # it did step, in the worker
    assert faults(result) == set()
    requests = [request for r in repetitions for request in r.requests]
    assert TTFT <= min(latency.ttft_ms(r) for r in requests) < 1.2 * TTFT  # may be late, never early
    assert 600 <= min(latency.e2e_ms(r) for r in requests) < 1.2 * 600
    assert result.rows[0].metrics["latency/itl_ms_p50"] == pytest.approx(ITL, rel=0.2)
    assert 0.7 * TOKENS / 0.6 < result.rows[0].metrics["throughput/output_tokens_per_s"] <= TOKENS / 0.6


def test_swapped_pages_are_swapping_and_nothing_else(store_uri: str, plugins: Path) -> None:
    result = measure(backend="swapping")
    assert [r.noise.swapped_pages for r in measured(result).repetitions if r.noise] == [100] * 5
    assert set(reasons(result)) - {"high_variation"} == {
        "swapping"
    }  # without CPU counters other busy processes cannot be seen


def test_a_hot_gpu_is_throttled_and_nothing_else(
    store_uri: str, plugins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fake nvidia-ml-py is on the worker's path only."""
    (tmp_path / "driver").mkdir()
    (tmp_path / "driver" / "pynvml.py").write_text(DRIVER)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "driver"), str(plugins)]))
    result = measure(backend="heated")
    assert faults(result) == {"throttled"}
    noises = [r.noise for r in measured(result).repetitions]
    assert all(
        n and n.throttles == ("hardware thermal slowdown",) and n.throttled_s == pytest.approx(n.wall_s / 10, rel=0.3)
        for n in noises
    )
    assert all(n and n.temperature_c == 91 for n in noises)


def test_broken_gpus_change_no_measurement_of_the_cpu(store_uri: str, nvml: Callable[[str], None]) -> None:
    """One is lost, one supports no query, one is divided and shows its instances to nobody but root."""
    nvml(
        "fail nvmlSystemGetDriverVersion 999\n"
        "gpu GPU-1 NVIDIA A100\nfail nvmlDeviceGetHandleByIndex_v2 15\n"
        "gpu GPU-2 NVIDIA GB10\nfail * 3\n"
        "gpu GPU-3 NVIDIA H100\nmig 1\nfail nvmlDeviceGetMemoryInfo 4\n"
    )
    environment = measured(measure(device="cpu", output_tokens=4, repetitions=2)).environment
    assert environment["driver"] is None
    assert [(one["name"], one["memory_bytes"]) for one in environment["gpus"]] == [("NVIDIA H100", None)]
