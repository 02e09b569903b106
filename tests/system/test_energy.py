"""Energy and GPU readings: real files in the kernel's layout, and a fake of the driver's library (no GPU is needed)."""

from __future__ import annotations

import dataclasses
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from mlflow_llmbench.analysis import efficiency, summary
from mlflow_llmbench.analysis.verdict import judge
from mlflow_llmbench.records.codec import from_json, to_json
from mlflow_llmbench.records.results import Noise
from mlflow_llmbench.system import gpu, machine
from tests.analysis.test_summary import result


def counters(folder: Path, *micro_joules: int) -> None:
    for number, value in enumerate(micro_joules):
        (folder / f"intel-rapl:{number}").mkdir(exist_ok=True)
        (folder / f"intel-rapl:{number}" / "energy_uj").write_text(f"{value}\n")
        (folder / f"intel-rapl:{number}:0").mkdir(exist_ok=True)  # a part of the package, already counted in it
        (folder / f"intel-rapl:{number}:0" / "energy_uj").write_text("999999999\n")


def test_packages_are_added_and_their_parts_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "RAPL", tmp_path)
    assert machine.cpu_energy_j() is None
    counters(tmp_path, 5_000_000, 7_000_000)
    assert machine.cpu_energy_j() == 12.0
    before = machine.take_readings()
    counters(tmp_path, 6_000_000, 9_000_000)
    assert machine.noise_between(before, machine.take_readings()).energy_j == pytest.approx(3.0)
    counters(tmp_path, 0, 0)  # wrapped
    assert machine.noise_between(before, machine.take_readings()).energy_j is None
    assert machine.idle_power_w("cpu", seconds=0.01) == 0.0


def with_energy(gaps: list[list[float]], joules: float, idle_w: float | None) -> Any:
    measured = result(gaps, rows=2)
    noisy = tuple(dataclasses.replace(r, noise=Noise(1.0, 0.0, 0.0, energy_j=joules)) for r in measured.repetitions)
    return dataclasses.replace(measured, repetitions=noisy, idle_w=idle_w)


def test_joules_per_token_are_above_idle_and_proportional() -> None:
    # 5 repetitions of 2 rows · 4 tokens; 30 J each, of which 10 W · 1 s are idle energy.
    assert efficiency.joules_per_token(with_energy([[2, 2, 2]] * 5, 30.0, 10.0)) == pytest.approx(20 / 8)
    once, twice = with_energy([[2.0] * 3] * 5, 30.0, 10.0), with_energy([[2.0] * 7] * 5, 50.0, 10.0)
    assert efficiency.joules_per_token(once) == pytest.approx(efficiency.joules_per_token(twice))
    assert efficiency.joules_per_token(with_energy([[2, 2, 2]] * 5, 30.0, None)) is None
    assert efficiency.joules_per_token(with_energy([[2, 2, 2]] * 5, 5.0, 10.0)) is None
    assert "efficiency/joules_per_token" in summary.summarize(once)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A fake pynvml with two GPUs, of which the second is hot, throttled and used by another process."""
    module: Any = types.ModuleType("pynvml")
    module.NVMLError = type("NVMLError", (Exception,), {})
    module.NVML_CLOCK_SM, module.NVML_TEMPERATURE_GPU = 1, 0
    process, own = (
        types.SimpleNamespace(pid=1, usedGpuMemory=7_000),
        types.SimpleNamespace(pid=os.getpid(), usedGpuMemory=1_000),
    )
    module.nvmlInit = module.nvmlShutdown = lambda: None
    module.nvmlDeviceGetCount = lambda: 2
    module.nvmlDeviceGetHandleByIndex = lambda index: index
    module.nvmlDeviceGetUUID = lambda handle: f"GPU-{handle}{handle}{handle}"
    module.nvmlDeviceGetName = lambda handle: f"Card {handle}"
    module.nvmlDeviceGetMemoryInfo = lambda handle: types.SimpleNamespace(total=10_000 * (handle + 1), free=9_000)
    module.nvmlSystemGetDriverVersion = lambda: "570.1"
    module.nvmlSystemGetCudaDriverVersion = lambda: 12080
    module.nvmlDeviceGetTotalEnergyConsumption = lambda handle: 5_000
    module.nvmlDeviceGetCurrentClocksThrottleReasons = lambda handle: 0x41 if handle else 0x1
    module.nvmlDeviceGetComputeRunningProcesses = lambda handle: [process, own] if handle else []
    module.nvmlDeviceGetClockInfo = lambda handle, _: 1980
    module.nvmlDeviceGetTemperature = lambda handle, _: 88

    def no_limit(handle: int) -> int:
        raise module.NVMLError("not supported")

    module.nvmlDeviceGetPowerManagementLimit = no_limit
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return module


def test_gpus_are_counted_as_cuda_counts_them(driver: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [g["name"] for g in gpu.gpus()] == ["Card 0", "Card 1"]
    assert (gpu.gpus()[0]["cuda"], "power_limit_w" in gpu.gpus()[0]) == ("12.8", False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert [g["name"] for g in gpu.gpus()] == ["Card 1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-111,0,nonsense,1")
    assert [g["name"] for g in gpu.gpus()] == ["Card 1", "Card 0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu.gpus() == []
    assert machine.require_device("auto") == "cpu"


def test_readings_of_a_gpu(driver: types.ModuleType) -> None:
    assert gpu.read(0) == gpu.GpuReading(5.0, 1980, 88, (), 0)
    assert gpu.read(1) == gpu.GpuReading(5.0, 1980, 88, ("hardware thermal slowdown",), 1)
    assert gpu.read(2) is None
    assert (gpu.process_bytes(1), gpu.process_bytes(2), gpu.free_bytes(0), gpu.free_bytes(5)) == (
        7_000,
        None,
        9_000,
        None,
    )
    noise = machine.noise_between(machine.take_readings("cuda:1"), machine.take_readings("cuda:1"))
    assert (noise.energy_j, noise.frequency_mhz, noise.throttles, noise.foreign_gpu_processes) == (
        0.0,
        1980,
        ("hardware thermal slowdown",),
        1,
    )


COUNTERS = {251: "software", 252: "hardware", 253: "brake"}


def with_counters(driver: Any, held_ns: dict[int, int], kind: int = 3, refused: tuple[int, ...] = ()) -> None:
    """Give the fake the field values of newer drivers; `held_ns` can change between two readings.

    `kind` 3: unsigned long long.
    """
    for number, name in zip(
        COUNTERS, ("SW_THERM_SLOWDOWN", "HW_THERM_SLOWDOWN", "HW_POWER_BRAKE_SLOWDOWN"), strict=True
    ):
        setattr(driver, f"NVML_FI_DEV_CLOCKS_EVENT_REASON_{name}", number)
    driver.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG = 3

    def values(handle: int, ids: list[int]) -> list[Any]:
        return [
            types.SimpleNamespace(
                nvmlReturn=3 if i in refused else 0,
                valueType=kind,
                value=types.SimpleNamespace(ullVal=held_ns.get(i, 0)),
            )
            for i in ids
        ]

    driver.nvmlDeviceGetFieldValues = values


def between(change: Any, device: str = "cuda:0") -> Noise:
    """Return the noise of a repetition during which `change` happened."""
    before = machine.take_readings(device)
    change()
    return machine.noise_between(before, machine.take_readings(device))


def test_a_throttle_that_came_and_went_is_counted(driver: Any) -> None:
    """At the end the clock is free again (GPU 0 says idle), but the counters show that it was throttled."""
    held = {251: 7_000_000, 252: 40_000_000, 253: 1}
    with_counters(driver, held)
    noise = between(lambda: held.update({252: 540_000_000}))
    assert (noise.throttles, noise.throttled_s) == (("hardware thermal slowdown",), 0.5)
    quiet = between(lambda: None)
    assert (quiet.throttles, quiet.throttled_s) == ((), 0.0)
    both = between(lambda: held.update({251: 8_000_000, 253: 2_000_000_001}))
    assert (both.throttles, both.throttled_s) == (("software thermal slowdown", "power brake"), 2.0)


def test_a_reason_that_stands_at_the_end_is_told_whatever_the_counters_say(driver: Any) -> None:
    with_counters(driver, {})
    noise = between(lambda: None, "cuda:1")
    assert (noise.throttles, noise.throttled_s) == (("hardware thermal slowdown",), 0.0)


@pytest.mark.parametrize("fault", ["absent", "refused", "another field by that number"])
def test_older_drivers_count_thermal_violations(driver: Any, fault: str) -> None:
    violations = [3_000_000_000]
    driver.NVML_PERF_POLICY_THERMAL = 1
    driver.nvmlDeviceGetViolationStatus = lambda handle, policy: types.SimpleNamespace(
        violationTime=violations[policy - 1], referenceTime=0
    )
    if fault != "absent":
        with_counters(
            driver,
            {251: 5},
            kind=1 if fault == "another field by that number" else 3,
            refused=tuple(COUNTERS) if fault == "refused" else (),
        )
    noise = between(lambda: violations.__setitem__(0, 3_250_000_000))
    assert (noise.throttles, noise.throttled_s) == (("thermal slowdown",), 0.25)


def test_without_any_counter_the_time_is_absent(driver: Any) -> None:
    assert between(lambda: None).throttled_s is None
    assert between(lambda: None, "cpu").throttled_s is None


def test_what_else_a_gpu_says_of_a_repetition(driver: Any) -> None:
    errors = [4]
    driver.NVML_CLOCK_MEM, driver.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, driver.NVML_VOLATILE_ECC = 2, 1, 0
    driver.nvmlDeviceGetClockInfo = lambda handle, kind: {1: 1980, 2: 3201}[kind]
    driver.nvmlDeviceGetPowerUsage = lambda handle: 412_345
    driver.nvmlDeviceGetUtilizationRates = lambda handle: types.SimpleNamespace(gpu=97, memory=40)
    driver.nvmlDeviceGetTotalEccErrors = lambda handle, kind, counter: errors[0] if (kind, counter) == (1, 0) else -1
    driver.nvmlDeviceGetCurrentClocksEventReasons = lambda handle: 0x80
    noise = between(lambda: errors.__setitem__(0, 6))
    assert (noise.frequency_mhz, noise.memory_clock_mhz, noise.power_w, noise.utilization_ratio) == (
        1980,
        3201,
        412.345,
        0.97,
    )
    assert (noise.gpu_memory_errors, noise.throttles) == (2, ("power brake",))
    assert from_json(Noise, to_json(noise)) == noise


def test_a_gpu_cut_into_instances_says_so_and_nothing_that_is_its_neighbours(driver: Any) -> None:
    driver.nvmlDeviceGetMigMode = lambda handle: [handle, 0]
    driver.nvmlDeviceGetPowerUsage = lambda handle: 300_000
    assert [g["mig"] for g in gpu.gpus()] == [False, True]
    whole, part = gpu.read(0), gpu.read(1)
    assert whole and part
    assert (whole.energy_j, whole.power_w) == (5.0, 300.0)
    assert (part.energy_j, part.power_w, part.utilization_ratio, part.clock_mhz) == (None, None, None, 1980)
    hashes = machine.environment()["hashes"]["hardware"]
    driver.nvmlDeviceGetMigMode = lambda handle: [0, 0]
    assert machine.environment()["hashes"]["hardware"] != hashes


def test_in_a_container_whose_pids_are_not_the_drivers_nothing_is_said_of_foreign_processes(driver: Any) -> None:
    driver.nvmlDeviceGetComputeRunningProcesses = lambda handle: [
        types.SimpleNamespace(pid=4_000_000, usedGpuMemory=None)
    ]
    reading = gpu.read(0)
    assert reading and reading.foreign_processes is None


def test_a_driver_that_does_not_answer_is_no_gpu(driver: Any) -> None:
    def fail() -> None:
        raise driver.NVMLError("driver not loaded")

    driver.nvmlInit = fail
    assert gpu.gpus() == []
    assert gpu.read(0) is None
    assert gpu.process_bytes(1) is None


def test_throttling_and_foreign_processes_give_their_reasons() -> None:
    quiet = result([[2, 2, 2]] * 5)
    for noise, codes in (
        (Noise(1.0, throttles=("hardware thermal slowdown",), temperature_c=88), ["throttled"]),
        (Noise(1.0, foreign_gpu_processes=2), ["contended"]),
        (Noise(1.0, foreign_gpu_processes=0, temperature_c=60), []),
    ):
        measured = dataclasses.replace(
            quiet, repetitions=tuple(dataclasses.replace(r, noise=noise) for r in quiet.repetitions)
        )
        verdict = judge(measured, summary.summarize(measured))
        assert [r.code for r in verdict.reasons] == codes
    assert verdict.word == "valid"


def test_the_sentence_on_throttling_says_why_and_for_how_long() -> None:
    quiet = result([[2, 2, 2]] * 5)
    hot = Noise(1.0, throttles=("power brake",), throttled_s=0.25, temperature_c=88)
    measured = dataclasses.replace(
        quiet,
        repetitions=tuple(dataclasses.replace(r, noise=hot if r.index < 2 else Noise(1.0)) for r in quiet.repetitions),
    )
    [reason] = judge(measured, summary.summarize(measured)).reasons
    assert reason.sentence == (
        "The GPU held its clock back in 2 of 5 repetitions "
        "(power brake, for 0.5 s of 5 s, up to 88 °C; limit 0). "
        "Improve its cooling or raise its power limit, and measure again."
    )
    silent = dataclasses.replace(hot, throttled_s=None, temperature_c=None)
    measured = dataclasses.replace(
        quiet, repetitions=tuple(dataclasses.replace(r, noise=silent) for r in quiet.repetitions)
    )
    [reason] = judge(measured, summary.summarize(measured)).reasons
    assert "in 5 of 5 repetitions (power brake; limit 0)" in reason.sentence
