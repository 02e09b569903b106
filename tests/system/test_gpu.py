"""Tests of the GPU's readings, through NVIDIA's own Python module, with a library that answers as a driver does."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from mlflow_llmbench.records.errors import MissingError, NotRealised
from mlflow_llmbench.system import gpu, machine, torch_runtime

Nvml = Callable[[str], None]

SYSTEM = "driver 580.95\ncuda 13000\n"
SMALL = """gpu GPU-aaaa1111-0000 NVIDIA GeForce RTX 3060
memory 12884901888 12000000000 884901888
capability 8 6
limit 170000
mig 0
"""
LARGE = f"""gpu GPU-bbbb2222-0000 NVIDIA H200
memory 150754820096 140000000000 10754820096
capability 9 0
energy 5000000
power 412345
clocks 1980 3201
temperature 61
utilization 97 40
errors 0 4
reasons 0x40
field269 7000000
field270 540000000
limit 700000
mig 0
process {os.getpid()} 9000000000
process 1 7000000000
"""
BOTH = SYSTEM + SMALL + LARGE

LOST = "gpu GPU-cccc3333-0000 NVIDIA A100\nfail nvmlDeviceGetHandleByIndex_v2 15\n"
SHARED_MEMORY = "gpu GPU-dddd4444-0000 NVIDIA GB10\ncapability 12 1\n"
"""A DGX Spark: the driver supports no query of memory, since that is the host's."""

DIVIDED = """gpu GPU-eeee5555-0000 NVIDIA A100-SXM4-80GB
mig 1
fail nvmlDeviceGetMemoryInfo 4
fail nvmlDeviceGetComputeRunningProcesses_v3 4
capability 8 0
energy 9000
power 300000
clocks 1410 1593
temperature 44
utilization 50 50
"""
SLICES = f"""instance MIG-1111 NVIDIA A100-SXM4-80GB MIG 1g.10gb
memory 10200547328 10000000000 200547328
attributes 14
instance MIG-2222 NVIDIA A100-SXM4-80GB MIG 3g.40gb
memory 42144366592 42000000000 144366592
attributes 42
process {os.getpid()} 900
process 77 800
"""


def names() -> list[str]:
    return [one["name"] for one in gpu.gpus()]


def test_gpus_and_their_readings(nvml: Nvml) -> None:
    nvml(BOTH)
    small, large = gpu.gpus()
    assert small == {
        "index": 0, "name": "NVIDIA GeForce RTX 3060", "uuid": "GPU-aaaa1111-0000", "memory_bytes": 12_884_901_888,
        "power_limit_w": 170.0, "mig": False, "driver": "580.95", "cuda": "13.0",
    }  # fmt: skip
    assert (large["index"], large["memory_bytes"]) == (1, 150_754_820_096)
    assert gpu.read(1) == gpu.GpuReading(
        5000.0, 1980, 61, ("hardware thermal slowdown",), 1, 3201, 412.345, 0.97, 4,
        {"software thermal slowdown": 7_000_000, "hardware thermal slowdown": 540_000_000},
    )  # fmt: skip
    assert gpu.read(0) == gpu.GpuReading()  # it told nothing, which is not 0
    assert gpu.read(2) is None
    assert (gpu.compute_capability(0), gpu.compute_capability(1), gpu.compute_capability(2)) == ((8, 6), (9, 0), None)
    assert (gpu.free_bytes(1), gpu.process_bytes(1), gpu.process_bytes(os.getpid())) == (
        140_000_000_000, 7_000_000_000, 9_000_000_000,
    )  # fmt: skip
    assert gpu.problems() == []


def test_a_gpu_whose_memory_cannot_be_asked_for_is_a_gpu(nvml: Nvml) -> None:
    nvml(SYSTEM + SHARED_MEMORY)
    assert [(one["name"], one["memory_bytes"]) for one in gpu.gpus()] == [("NVIDIA GB10", None)]
    assert gpu.free_bytes(0) is None
    assert "mig" not in gpu.gpus()[0]
    assert machine.fingerprint()["gpus"][0]["memory_bytes"] is None


@pytest.mark.parametrize("question", [
    "nvmlDeviceGetName", "nvmlDeviceGetMemoryInfo", "nvmlDeviceGetMigMode", "nvmlDeviceGetPowerManagementLimit",
    "nvmlDeviceGetCudaComputeCapability", "nvmlDeviceGetComputeRunningProcesses_v3", "nvmlDeviceGetFieldValues",
    "nvmlDeviceGetClockInfo", "nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetCurrentClocksEventReasons",
])  # fmt: skip
@pytest.mark.parametrize("code", [3, 4, 15, 999])
def test_each_refusal_is_an_unknown_and_no_more(nvml: Nvml, question: str, code: int) -> None:
    nvml(BOTH + f"fail {question} {code}\n")
    assert [one["uuid"] for one in gpu.gpus()] == ["GPU-aaaa1111-0000", "GPU-bbbb2222-0000"]
    reading = gpu.read(1)
    assert reading is not None and reading.temperature_c == 61
    assert gpu.compute_capability(0) == (8, 6)
    assert gpu.free_bytes(0) == 12_000_000_000
    assert machine.fingerprint()["driver"] == "580.95"


@pytest.mark.parametrize("question", ["nvmlSystemGetDriverVersion", "nvmlSystemGetCudaDriverVersion"])
def test_a_driver_that_does_not_tell_its_version(nvml: Nvml, question: str) -> None:
    nvml(f"{SYSTEM}fail {question} 999\n{SMALL}")
    one = gpu.gpus()[0]
    assert [one["driver"], one["cuda"]].count(None) == 1


def test_a_lost_gpu_hides_no_other(nvml: Nvml) -> None:
    nvml(SYSTEM + LOST + SMALL)
    assert names() == ["NVIDIA GeForce RTX 3060"]
    with pytest.raises(MissingError, match=r"no device cuda:1: this machine has one GPU, cuda:0\."):
        machine.require_device("cuda:1")
    assert gpu.problems() == ["GPU 0 of nvidia-smi does not answer: GPU is lost"]
    nvml(SYSTEM + SMALL + "fail nvmlDeviceGetUUID 15\n")  # lost after it was opened
    assert (names(), gpu.read(0)) == ([], None)
    assert machine.require_device("auto") == "cpu"
    assert len(gpu.problems()) == 1


def test_a_gpu_that_is_lost_between_two_readings(nvml: Nvml) -> None:
    nvml(BOTH)
    before = machine.take_readings("cuda:1")
    nvml(SYSTEM + SMALL + LARGE + "fail nvmlDeviceGetHandleByIndex_v2 15\n")
    noise = machine.noise_between(before, machine.take_readings("cuda:1"))
    assert noise.temperature_c is None
    assert noise.foreign_gpu_processes is None


def test_a_driver_that_does_not_start(nvml: Nvml) -> None:
    nvml(f"fail nvmlInitWithFlags 18\n{SMALL}")
    assert gpu.gpus() == []
    assert gpu.problems() == ["the NVIDIA driver does not start: RM has detected an NVML/RM version mismatch."]
    with pytest.raises(MissingError, match=r"for device=cuda: the NVIDIA driver does not start: .*mismatch\. Use "):
        machine.require_device("cuda")
    nvml("fail nvmlInitWithFlags 9\n")  # none is loaded: no problem on a machine without a GPU
    assert (gpu.gpus(), gpu.problems(), gpu.read(0), gpu.process_bytes(1)) == ([], [], None, None)


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("1", ["NVIDIA H200"]),
        ("1,0", ["NVIDIA H200", "NVIDIA GeForce RTX 3060"]),
        ("GPU-bbbb2222-0000", ["NVIDIA H200"]),
        ("GPU-bbbb", ["NVIDIA H200"]),
        ("GPU-", []),  # not unique
        ("GPU-bbbb2222-0000,9,0", ["NVIDIA H200"]),
        ("-1", []),
        ("", []),
        ("MIG-unknown", []),
    ],
)
def test_gpus_are_counted_as_cuda_counts_them(
    nvml: Nvml, monkeypatch: pytest.MonkeyPatch, visible: str, expected: list[str]
) -> None:
    nvml(BOTH)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert names() == expected
    assert [one["index"] for one in gpu.gpus()] == list(range(len(expected)))


def test_an_instance_is_named_by_its_uuid(nvml: Nvml, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml(SYSTEM + DIVIDED + SLICES + LARGE)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-2222")
    (one,) = gpu.gpus()
    assert (one["name"], one["memory_bytes"], one["mig"], one["multiprocessors"]) == (
        "NVIDIA A100-SXM4-80GB MIG 3g.40gb", 42_144_366_592, True, 42,
    )  # fmt: skip
    assert gpu.compute_capability(0) == (8, 0)  # the whole GPU's
    assert (gpu.free_bytes(0), gpu.process_bytes(os.getpid())) == (42_000_000_000, 900)
    # Clocks and temperature are those of the whole GPU; energy, power and utilization would be its neighbours' too.
    assert gpu.read(0) == gpu.GpuReading(
        clock_mhz=1410, temperature_c=44, foreign_processes=1, memory_clock_mhz=1593, utilization_ratio=None
    )
    assert machine.require_device("cuda") == "cuda"
    with pytest.raises(MissingError, match=r"There is no device cuda:1"):
        machine.require_device("cuda:1")


def test_a_divided_gpu_is_its_first_instance(nvml: Nvml, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml(SYSTEM + DIVIDED + SLICES + LARGE)
    assert names() == ["NVIDIA A100-SXM4-80GB MIG 1g.10gb", "NVIDIA H200"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert names() == ["NVIDIA A100-SXM4-80GB MIG 1g.10gb"]
    nvml(SYSTEM + DIVIDED + "fail nvmlDeviceGetMigDeviceHandleByIndex 4\n" + SLICES)  # instances are not shown
    (one,) = gpu.gpus()
    assert (one["name"], one["memory_bytes"], one["mig"]) == ("NVIDIA A100-SXM4-80GB", None, True)
    reading = gpu.read(0)
    assert reading and (reading.energy_j, reading.power_w, reading.clock_mhz) == (None, None, 1410)


def test_instances_of_one_gpu_are_different_hardware(nvml: Nvml, monkeypatch: pytest.MonkeyPatch) -> None:
    """So they do not share the best rates that the cache keeps by the hardware's hash."""
    unnamed = SLICES.replace(" MIG 1g.10gb", "").replace(" MIG 3g.40gb", "").replace("42144366592", "10200547328")
    for slices in (SLICES, unnamed):  # an older driver names the profile nowhere, and memory can be the same
        nvml(SYSTEM + DIVIDED + slices)
        hashes = []
        for uuid in ("MIG-1111", "MIG-2222"):
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", uuid)
            hashes.append(machine.fingerprint()["hashes"]["hardware"])
        assert hashes[0] != hashes[1]


@pytest.mark.parametrize(
    "processes",
    ["", "process 4000000 unknown\n", "process 4000000 5\n"],
    ids=["no process is shown", "pids of another namespace, no sizes", "pids of another namespace"],
)
def test_processes_that_a_container_does_not_show_are_unknown(nvml: Nvml, processes: str) -> None:
    nvml(SYSTEM + SMALL + processes)
    reading = gpu.read(0)
    assert reading is not None and reading.foreign_processes is None
    assert gpu.process_bytes(os.getpid()) is None


@pytest.mark.parametrize("size", ["0", "unknown"])
def test_memory_that_the_driver_does_not_attribute_is_unknown(nvml: Nvml, size: str) -> None:
    nvml(f"{SYSTEM}{SMALL}process {os.getpid()} {size}\nprocess 7 5\n")
    reading = gpu.read(0)
    assert reading is not None and reading.foreign_processes == 1
    assert gpu.process_bytes(os.getpid()) is None


def test_memory_of_a_process_by_the_best_source_that_there_is(nvml: Nvml) -> None:
    before, after = "memory 100 90 10\n", "memory 100 60 40\n"
    gpu_line, own = "gpu GPU-1 NVIDIA L4\n", f"process {os.getpid()}"
    nvml(gpu_line + before)
    meter = gpu.meter_of("cuda:0")
    assert meter is not None
    nvml(f"{gpu_line}{after}{own} 25\n")
    assert (meter.read(), meter.source) == (25, gpu.BY_PROCESS)
    nvml(f"{gpu_line}{after}{own} 0\n")
    assert (meter.read(), meter.source) == (30, gpu.BY_FREE_MEMORY)
    nvml(gpu_line + "memory 100 95 5\n")  # another process has freed some
    assert (meter.read(), meter.source) == (0, gpu.BY_FREE_MEMORY)
    nvml(gpu_line)
    assert (meter.read(), meter.source) == (None, gpu.BY_ALLOCATOR)
    assert gpu.meter_of("cpu") is None


def test_a_device_that_cuda_counts_otherwise_is_refused(nvml: Nvml, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml(BOTH)
    gpu.check_identity("cuda:1", "bbbb2222-0000")  # as torch tells it
    gpu.check_identity("cuda", "GPU-aaaa1111-0000")
    with pytest.raises(
        NotRealised, match=r"For CUDA cuda:0 is the GPU bbbb2222-0000, and for the driver it is GPU-aaaa"
    ):
        gpu.check_identity("cuda:0", "bbbb2222-0000")
    nvml(SYSTEM + SMALL + "fail nvmlDeviceGetMemoryInfo 3\n" + DIVIDED + SLICES)
    gpu.check_identity("cuda:1", "the UUID of an instance")
    gpu.check_identity("cuda:7", "of a GPU that the driver does not show")


@pytest.mark.parametrize(
    ("torch", "built_for", "driver", "device"),
    [
        ("2.13.0+cu130", "13.0", 13000, "cuda"),
        ("2.13.0+cu130", "13.2", 13000, "cuda"),  # minor versions are compatible
        ("2.13.0+cu130", "13.0", 12080, "cpu"),  # CUDA would not start, and each cell would fail
        ("2.9.0+cu128", "12.8", 13000, "cuda"),
        ("2.13.0+cpu", None, 13000, "cpu"),
        ("", None, 13000, "cuda"),  # a runtime without torch
        ("2.13.0+cu130", "13.0", None, "cuda"),  # the driver does not tell
    ],
)
def test_auto_takes_a_gpu_on_which_torch_starts(
    nvml: Nvml, monkeypatch: pytest.MonkeyPatch, torch: str, built_for: str | None, driver: int | None, device: str
) -> None:
    nvml((f"cuda {driver}\n" if driver else "") + SMALL)
    monkeypatch.setattr(machine, "packages", lambda: {"torch": torch} if torch else {})
    monkeypatch.setattr(torch_runtime, "versions", lambda: {"cuda_runtime": built_for})
    assert machine.require_device("auto") == device
    assert machine.require_device("cuda") == "cuda"
