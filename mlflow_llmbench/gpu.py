"""NVIDIA GPUs through NVML: what they are, what our process holds, what they did during a repetition. The only user of NVML.

Untested on GPU: written against nvidia-ml-py's interface and tested with a stand-in for that library.
Devices are counted as CUDA counts them, after CUDA_VISIBLE_DEVICES.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

THROTTLES = {
    0x8: "hardware slowdown", 0x20: "software thermal slowdown", 0x40: "hardware thermal slowdown", 0x80: "power brake",
}  # fmt: skip
"""Bits of NVML's clock event reasons that mean that the GPU would go faster if it could (nvml.h, nvmlClocksEventReasons).
The software power cap (0x4) is not among them: it is how a GPU under full load normally runs."""


@dataclass(frozen=True)
class GpuReading:
    """One GPU at one moment: energy since the driver's load in J, SM clock in MHz, temperature in °C, why its clock is held back,
    and how many processes that are not ours compute on it. What it does not say is None.
    """

    energy_j: float | None = None
    clock_mhz: int | None = None
    temperature_c: int | None = None
    throttles: tuple[str, ...] = ()
    foreign_processes: int | None = None


@contextlib.contextmanager
def nvml() -> Iterator[Any]:
    """The initialised NVML module, or None without it, a driver or a GPU."""
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
    """Handles in CUDA's order. CUDA_VISIBLE_DEVICES names indices or UUIDs; the first that is unknown ends the list, as in CUDA."""
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
    """The visible GPUs: index, name, uuid, memory_bytes, driver, cuda (the driver's version), power_limit_w. Empty without any."""
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
            found.append(one)
        return found


def free_bytes(index: int) -> int | None:
    """Device memory of GPU `index` that nobody uses now; None without it."""
    with nvml() as module:
        found = handles(module) if module else []
        return int(module.nvmlDeviceGetMemoryInfo(found[index]).free) if index < len(found) else None


def process_bytes(pid: int) -> int | None:
    """Device memory that the driver attributes to a process, over all GPUs; None if it cannot say (no GPU, a container, WSL)."""
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
    """Processes that are not this one; None where the driver counts pids of another namespace (a container), so that we are not among them."""
    pids = [process.pid for process in processes or []]
    if processes is None or (pids and os.getpid() not in pids):
        return None
    return len([pid for pid in pids if pid != os.getpid()])


def read(index: int) -> GpuReading | None:
    """What GPU `index` says now; None without it. Costs a few milliseconds: never in a timed region."""
    with nvml() as module:
        found = handles(module) if module else []
        if index >= len(found):
            return None
        handle = found[index]

        def ask(question: str, *rest: Any) -> Any:
            try:
                return getattr(module, question)(handle, *rest)
            except (module.NVMLError, AttributeError):
                return None

        energy_mj = ask("nvmlDeviceGetTotalEnergyConsumption")
        bits = ask("nvmlDeviceGetCurrentClocksThrottleReasons") or 0
        processes = ask("nvmlDeviceGetComputeRunningProcesses")
        return GpuReading(
            None if energy_mj is None else energy_mj / 1000,
            ask("nvmlDeviceGetClockInfo", module.NVML_CLOCK_SM),
            ask("nvmlDeviceGetTemperature", module.NVML_TEMPERATURE_GPU),
            tuple(name for bit, name in THROTTLES.items() if bits & bit),
            _foreign(processes),
        )
