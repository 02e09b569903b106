"""NVIDIA GPUs through NVML: their properties, memory of our process, readings of a repetition. The only user of NVML.

Untested on GPU: written against nvidia-ml-py's interface and tested with a stand-in for that library.
Devices are counted as CUDA counts them, after CUDA_VISIBLE_DEVICES.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

THROTTLES = {
    0x8: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
"""Bits of NVML's clock event reasons by which the GPU is slower than it could be (nvml.h, nvmlClocksEventReasons).
The software power cap (0x4) is not among them: a GPU under full load normally runs at it."""


COUNTED = {
    "software thermal slowdown": "NVML_FI_DEV_CLOCKS_EVENT_REASON_SW_THERM_SLOWDOWN",
    "hardware thermal slowdown": "NVML_FI_DEV_CLOCKS_EVENT_REASON_HW_THERM_SLOWDOWN",
    "power brake": "NVML_FI_DEV_CLOCKS_EVENT_REASON_HW_POWER_BRAKE_SLOWDOWN",
}
"""The same reasons as counters of nanoseconds since the driver was loaded (nvml.h, field values; newer drivers)."""


@dataclass(frozen=True)
class GpuReading:
    """Readings of one GPU at one moment; values that it does not report are None or missing.

    `energy_j`: since the driver was loaded · `clock_mhz`, `memory_clock_mhz`: SM and memory clocks · `temperature_c`:
    °C · `throttles`: reasons why the clock is held back now · `foreign_processes`: number of processes computing on it
    that are not ours · `power_w`: W · `utilization_ratio`: share of the driver's last sample period (a sixth to one
    second) in which a kernel ran · `memory_errors`: uncorrected errors since the driver was loaded · `held_back_ns`:
    nanoseconds since then in which the clock was held back, by reason.
    """

    energy_j: float | None = None
    clock_mhz: int | None = None
    temperature_c: int | None = None
    throttles: tuple[str, ...] = ()
    foreign_processes: int | None = None
    memory_clock_mhz: int | None = None
    power_w: float | None = None
    utilization_ratio: float | None = None
    memory_errors: int | None = None
    held_back_ns: Mapping[str, int] = field(default_factory=dict)


@contextlib.contextmanager
def nvml() -> Iterator[Any]:
    """Yield the initialised NVML module, or None if it, a driver or a GPU is missing."""
    try:
        import pynvml
    except ImportError:
        yield None
        return
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def handles(module: Any) -> list[Any]:
    """Return handles in CUDA's order.

    CUDA_VISIBLE_DEVICES names indices or UUIDs; as in CUDA, the first unknown one ends the list.
    """
    every = [module.nvmlDeviceGetHandleByIndex(index) for index in range(module.nvmlDeviceGetCount())]
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return every
    found = []
    for name in filter(None, (part.strip() for part in wanted.split(","))):
        match = [h for i, h in enumerate(every) if name == str(i) or str(module.nvmlDeviceGetUUID(h)).startswith(name)]
        if not match:
            break
        found.append(match[0])
    return found


def gpus() -> list[dict[str, Any]]:
    """Return the visible GPUs: index, name, uuid, memory_bytes, driver, cuda (driver's version), power_limit_w, mig.

    `mig` is True if the GPU is divided into instances; memory is then that of the whole GPU.
    """
    with nvml() as module:
        if module is None:
            return []
        cuda = module.nvmlSystemGetCudaDriverVersion()
        found = []
        for index, handle in enumerate(handles(module)):
            one: dict[str, Any] = {
                "index": index,
                "name": module.nvmlDeviceGetName(handle),
                "uuid": module.nvmlDeviceGetUUID(handle),
                "memory_bytes": module.nvmlDeviceGetMemoryInfo(handle).total,
                "driver": module.nvmlSystemGetDriverVersion(),
                "cuda": f"{cuda // 1000}.{cuda % 1000 // 10}",
            }
            with contextlib.suppress(module.NVMLError):
                one["power_limit_w"] = module.nvmlDeviceGetPowerManagementLimit(handle) / 1000
            with contextlib.suppress(module.NVMLError, AttributeError):
                one["mig"] = bool(module.nvmlDeviceGetMigMode(handle)[0])
            found.append(one)
        return found


def compute_capability(index: int) -> tuple[int, int] | None:
    """Return the CUDA compute capability of GPU `index`, such as (9, 0); None if there is no such GPU."""
    with nvml() as module:
        found = handles(module) if module else []
        if index >= len(found):
            return None
        major, minor = module.nvmlDeviceGetCudaComputeCapability(found[index])
        return int(major), int(minor)


def free_bytes(index: int) -> int | None:
    """Return the free device memory of GPU `index` in bytes; None if there is no such GPU."""
    with nvml() as module:
        found = handles(module) if module else []
        return int(module.nvmlDeviceGetMemoryInfo(found[index]).free) if index < len(found) else None


def process_bytes(pid: int) -> int | None:
    """Return the device memory of a process in bytes, over all GPUs.

    None if the driver does not attribute memory to it (no GPU, a container, WSL).
    """
    with nvml() as module:
        if module is None:
            return None
        total, seen = 0, False
        for handle in handles(module):
            with contextlib.suppress(module.NVMLError):
                for process in module.nvmlDeviceGetComputeRunningProcesses(handle):
                    if process.pid == pid and process.usedGpuMemory is not None:
                        total, seen = total + process.usedGpuMemory, True
        return total if seen else None


def _foreign(processes: Any) -> int | None:
    """Return the number of other processes.

    None if we are not among them: the driver then counts pids of another namespace (a container).
    """
    pids = [process.pid for process in processes or []]
    if processes is None or (pids and os.getpid() not in pids):
        return None
    return len([pid for pid in pids if pid != os.getpid()])


def read(index: int) -> GpuReading | None:
    """Return the readings of GPU `index` now; None without it. Costs milliseconds: never call it in a timed region."""
    with nvml() as module:
        found = handles(module) if module else []
        if index >= len(found):
            return None
        handle = found[index]

        def ask(question: str, *constants: str) -> Any:
            try:
                return getattr(module, question)(handle, *(getattr(module, constant) for constant in constants))
            except (module.NVMLError, AttributeError):
                return None

        energy_mj, power_mw, used = (
            ask("nvmlDeviceGetTotalEnergyConsumption"),
            ask("nvmlDeviceGetPowerUsage"),
            ask("nvmlDeviceGetUtilizationRates"),
        )
        if (ask("nvmlDeviceGetMigMode") or [0])[0]:
            energy_mj = power_mw = used = None  # these cover all instances together
        bits = ask("nvmlDeviceGetCurrentClocksEventReasons")
        bits = ask("nvmlDeviceGetCurrentClocksThrottleReasons") if bits is None else bits  # its name in older drivers
        return GpuReading(
            energy_j=None if energy_mj is None else energy_mj / 1000,
            clock_mhz=ask("nvmlDeviceGetClockInfo", "NVML_CLOCK_SM"),
            temperature_c=ask("nvmlDeviceGetTemperature", "NVML_TEMPERATURE_GPU"),
            throttles=tuple(name for bit, name in THROTTLES.items() if (bits or 0) & bit),
            foreign_processes=_foreign(ask("nvmlDeviceGetComputeRunningProcesses")),
            memory_clock_mhz=ask("nvmlDeviceGetClockInfo", "NVML_CLOCK_MEM"),
            power_w=None if power_mw is None else power_mw / 1000,
            utilization_ratio=None if used is None else used.gpu / 100,
            memory_errors=ask("nvmlDeviceGetTotalEccErrors", "NVML_MEMORY_ERROR_TYPE_UNCORRECTED", "NVML_VOLATILE_ECC"),
            held_back_ns=_held_back(module, handle, ask),
        )


def _held_back(module: Any, handle: Any, ask: Callable[..., Any]) -> dict[str, int]:
    """Return the driver's counters of `COUNTED`, or else its older one of all thermal violations. Empty without any.

    Field numbers differ between versions of the library. A driver that uses such a number for another field returns a
    power smoothing setting, which does not change; its value type identifies it.
    """
    ids = {name: getattr(module, constant) for name, constant in COUNTED.items() if hasattr(module, constant)}
    found: dict[str, int] = {}
    with contextlib.suppress(module.NVMLError, AttributeError):
        values = module.nvmlDeviceGetFieldValues(handle, list(ids.values()))
        for name, value in zip(ids, values, strict=True):
            if value.nvmlReturn == 0 and value.valueType == module.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG:
                found[name] = int(value.value.ullVal)
    if found:
        return found
    violation = ask("nvmlDeviceGetViolationStatus", "NVML_PERF_POLICY_THERMAL")
    return {} if violation is None else {"thermal slowdown": int(violation.violationTime)}


def held_back_between(before: GpuReading, after: GpuReading) -> tuple[tuple[str, ...], float | None]:
    """Reasons why the clock was held back between two readings, and the longest time by one reason in seconds.

    Reasons are those whose counter increased and those present at the end, since not every driver counts every reason.
    The time is None without counters.
    """
    moved = {
        name: after.held_back_ns[name] - ns for name, ns in before.held_back_ns.items() if name in after.held_back_ns
    }
    reasons = dict.fromkeys([*(name for name, ns in moved.items() if ns > 0), *after.throttles])
    return tuple(reasons), max(0, *moved.values()) / 1e9 if moved else None
