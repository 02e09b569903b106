"""Energy and GPU readings: real files in the kernel's layout, and the driver's library of conftest (no GPU needed)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlflow_llmbench.analysis import efficiency, summary
from mlflow_llmbench.analysis.verdict import judge
from mlflow_llmbench.records.codec import from_json, to_json
from mlflow_llmbench.records.results import Noise
from mlflow_llmbench.system import machine
from tests.analysis.test_summary import result

Nvml = Callable[[str], None]


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
    assert machine.take_readings("xpu:0").energy_j is None  # the packages' energy is not that of another device
    counters(tmp_path, 0, 0)  # wrapped
    assert machine.noise_between(before, machine.take_readings()).energy_j is None
    assert machine.idle_power_w("cpu", seconds=0.01) == 0.0


@pytest.mark.parametrize(
    ("watts", "power", "left"),
    [
        ([300, 180, 120, 117, 90], 117, 1),  # it agrees with the one before it
        ([75, 76, 80], 76, 1),
        ([10 * 2**n for n in range(12, 0, -1)], 80, 2),  # never: the last of ten
        ([100, None, 100], None, 1),
        ([0, 0, 5], 0, 1),
    ],
)
def test_idle_power_is_read_when_it_has_settled(watts: list[float | None], power: float | None, left: int) -> None:
    rest = list(watts)
    assert machine.settled(lambda: rest.pop(0)) == power
    assert len(rest) == left


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


GPU = "gpu GPU-1 NVIDIA H200\nclocks 1980 3201\ntemperature 88\n"


def between(nvml: Nvml, before: str, after: str) -> Noise:
    """Return the noise of a repetition during which what the GPU reports has changed."""
    nvml(GPU + before)
    first = machine.take_readings("cuda:0")
    nvml(GPU + after)
    return machine.noise_between(first, machine.take_readings("cuda:0"))


def held(software: int, hardware: int, brake: int) -> str:
    """The counters of newer drivers in ns."""
    return f"field269 {software}\nfield270 {hardware}\nfield271 {brake}\n"


def test_a_throttle_that_came_and_went_is_counted(nvml: Nvml) -> None:
    """At the end the clock is free again (idle), but the counters show that it was throttled."""
    idle, before = "reasons 0x1\n", held(7_000_000, 40_000_000, 1)
    noise = between(nvml, before, idle + held(7_000_000, 540_000_000, 1))
    assert (noise.throttles, noise.throttled_s) == (("hardware thermal slowdown",), 0.5)
    quiet = between(nvml, before, idle + before)
    assert (quiet.throttles, quiet.throttled_s) == ((), 0.0)
    both = between(nvml, before, idle + held(8_000_000, 40_000_000, 2_000_000_001))
    assert (both.throttles, both.throttled_s) == (("software thermal slowdown", "power brake"), 2.0)


def test_a_reason_that_stands_at_the_end_is_told_whatever_the_counters_say(nvml: Nvml) -> None:
    noise = between(nvml, held(0, 0, 0), "reasons 0x41\n" + held(0, 0, 0))
    assert (noise.throttles, noise.throttled_s) == (("hardware thermal slowdown",), 0.0)


@pytest.mark.parametrize(
    "fields",
    ["", "fail nvmlDeviceGetFieldValues 13\n", "kinds 1\n" + held(5, 5, 5)],
    ids=["refused one by one", "absent", "other fields by these numbers"],
)
def test_older_drivers_count_thermal_violations(nvml: Nvml, fields: str) -> None:
    noise = between(nvml, f"{fields}violation 3000000000\n", f"{fields}violation 3250000000\n")
    assert (noise.throttles, noise.throttled_s) == (("thermal slowdown",), 0.25)


def test_without_any_counter_the_time_is_absent(nvml: Nvml) -> None:
    assert between(nvml, "", "").throttled_s is None
    noise = machine.noise_between(machine.take_readings("cpu"), machine.take_readings("cpu"))
    assert noise.throttled_s is None


def test_what_else_a_gpu_says_of_a_repetition(nvml: Nvml) -> None:
    same = "power 412345\nutilization 97 40\nreasons 0x80\n"
    noise = between(nvml, same + "errors 9 4\nenergy 5000\n", same + "errors 9 6\nenergy 7500\n")
    assert (noise.frequency_mhz, noise.memory_clock_mhz, noise.power_w, noise.utilization_ratio) == (
        1980,
        3201,
        412.345,
        0.97,
    )
    assert (noise.gpu_memory_errors, noise.throttles, noise.energy_j) == (2, ("power brake",), 2.5)
    assert from_json(Noise, to_json(noise)) == noise


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
