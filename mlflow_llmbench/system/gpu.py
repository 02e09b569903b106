"""NVIDIA GPUs through NVML: their properties, memory of our process, readings of a repetition. The only user of NVML.

Devices are counted as CUDA counts them, after CUDA_VISIBLE_DEVICES. Each question is asked by itself: what a driver, a
GPU or a container does not answer is None, and a GPU that is lost does not hide the others. The tests ask NVIDIA's own
Python module with a library that gives the answers; see docs/gpus.md for what has run on which GPU.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ..records.errors import NotRealised

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
    module, _ = _started()
    try:
        yield module
    finally:
        if module:
            with contextlib.suppress(module.NVMLError):  # of a GPU that was lost meanwhile
                module.nvmlShutdown()


def _started() -> tuple[Any, str | None]:
    """Initialise NVML; return its module, or None and what the driver answers. No module and no text: no driver."""
    try:
        import pynvml
    except ImportError:
        return None, None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        absent = (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
        return None, None if error.value in absent else f"the NVIDIA driver does not start: {error}"
    return pynvml, None


def _ask(module: Any, question: str, *arguments: Any) -> Any:
    """Return NVML's answer; None if the driver or the library does not know it, or refuses it."""
    try:
        return getattr(module, question)(*arguments)
    except (module.NVMLError, AttributeError):
        return None


def _cards(module: Any) -> tuple[list[Any], list[str]]:
    """Return the handles of the GPUs that answer, in the order of their PCI addresses, and what the others say."""
    found, problems = [], []
    for index in range(_ask(module, "nvmlDeviceGetCount") or 0):
        try:
            handle = module.nvmlDeviceGetHandleByIndex(index)
            module.nvmlDeviceGetUUID(handle)
        except module.NVMLError as error:
            problems.append(f"GPU {index} of nvidia-smi does not answer: {error}")
        else:
            found.append(handle)
    return found, problems


def problems() -> list[str]:
    """Say what keeps GPUs of this machine from being used: the driver does not start, or one of them is lost."""
    module, problem = _started()
    if module is None:
        return [problem] if problem else []
    try:
        return _cards(module)[1]
    finally:
        with contextlib.suppress(module.NVMLError):
            module.nvmlShutdown()


def handles(module: Any) -> list[Any]:
    """Return handles in CUDA's order, which `PCI_ORDER` makes NVML's. A GPU that does not answer is left out.

    CUDA_VISIBLE_DEVICES names indices, or UUIDs of GPUs or of MIG instances; as in CUDA, the first unknown one ends the
    list. A GPU that is divided into instances is its first instance.
    """
    every = _cards(module)[0]
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = map(str, range(len(every))) if wanted is None else (part.strip() for part in wanted.split(","))
    found = []
    for name in filter(None, names):
        handle = _named(module, name, every)
        if handle is None:
            break
        found.append(handle)
    return found


def _named(module: Any, name: str, every: list[Any]) -> Any:
    """Return the handle of one name of CUDA_VISIBLE_DEVICES; None if it is unknown or not unique."""
    if name.startswith("MIG-"):
        return _ask(module, "nvmlDeviceGetHandleByUUID", name)
    match = [
        handle
        for index, handle in enumerate(every)
        if name == str(index)
        or (name.startswith("GPU-") and str(_ask(module, "nvmlDeviceGetUUID", handle)).startswith(name))
    ]
    return (_first_instance(module, match[0]) or match[0]) if len(match) == 1 else None


def _is_divided(module: Any, handle: Any) -> bool:
    return bool((_ask(module, "nvmlDeviceGetMigMode", handle) or [0])[0])


def _first_instance(module: Any, handle: Any) -> Any:
    """Return the first MIG instance of a GPU; None if it is not divided, or the driver does not show its instances."""
    places = (_ask(module, "nvmlDeviceGetMaxMigDeviceCount", handle) or 0) if _is_divided(module, handle) else 0
    found = (_ask(module, "nvmlDeviceGetMigDeviceHandleByIndex", handle, place) for place in range(places))
    return next((one for one in found if one is not None), None)


def _whole(module: Any, handle: Any) -> Any:
    """Return the GPU that a MIG instance is part of; None for a GPU."""
    answer = _ask(module, "nvmlDeviceIsMigDeviceHandle", handle)
    is_instance = bool(getattr(answer, "value", answer))
    return _ask(module, "nvmlDeviceGetDeviceHandleFromMigDeviceHandle", handle) if is_instance else None


def gpus() -> list[dict[str, Any]]:
    """Return the visible GPUs: index, name, uuid, memory_bytes, driver, cuda (driver's version), power_limit_w, mig.

    What the driver does not tell is None; `power_limit_w` and `mig` are then missing. `mig` is True if the GPU is
    divided into instances: name and memory are those of the instance, and `multiprocessors` tells its share.
    """
    with nvml() as module:
        if module is None:
            return []
        driver, cuda = _ask(module, "nvmlSystemGetDriverVersion"), _ask(module, "nvmlSystemGetCudaDriverVersion")
        version = None if cuda is None else f"{cuda // 1000}.{cuda % 1000 // 10}"
        return [
            {"index": index, **_properties(module, handle), "driver": driver, "cuda": version}
            for index, handle in enumerate(handles(module))
        ]


def _properties(module: Any, handle: Any) -> dict[str, Any]:
    """Return what the driver tells of one GPU or instance."""
    whole = _whole(module, handle)
    memory = _ask(module, "nvmlDeviceGetMemoryInfo", handle)
    found = {
        "name": _ask(module, "nvmlDeviceGetName", handle) or "NVIDIA GPU",
        "uuid": _ask(module, "nvmlDeviceGetUUID", handle),
        "memory_bytes": memory.total if memory else None,
    }
    limit_mw = _ask(module, "nvmlDeviceGetPowerManagementLimit", whole or handle)
    mode = [True] if whole else _ask(module, "nvmlDeviceGetMigMode", handle)
    part = _ask(module, "nvmlDeviceGetAttributes", handle) if whole else None
    return {
        **found,
        **({} if limit_mw is None else {"power_limit_w": limit_mw / 1000}),
        **({} if mode is None else {"mig": bool(mode[0])}),
        **({} if part is None else {"multiprocessors": part.multiprocessorCount}),
    }


def compute_capability(index: int) -> tuple[int, int] | None:
    """Return the CUDA compute capability of GPU `index`, such as (9, 0).

    None if there is no such GPU or the driver does not tell.
    """
    with nvml() as module:
        found = handles(module) if module else []
        if index >= len(found):
            return None
        answers = (
            _ask(module, "nvmlDeviceGetCudaComputeCapability", handle)
            for handle in (found[index], _whole(module, found[index]))
            if handle is not None
        )
        answer = next(filter(None, answers), None)
        return (int(answer[0]), int(answer[1])) if answer else None


def free_bytes(index: int) -> int | None:
    """Return the free device memory of GPU `index` in bytes.

    None if there is no such GPU, or if the driver does not tell: one that shares the host's memory.
    """
    with nvml() as module:
        found = handles(module) if module else []
        memory = _ask(module, "nvmlDeviceGetMemoryInfo", found[index]) if index < len(found) else None
        return int(memory.free) if memory else None


def process_bytes(pid: int) -> int | None:
    """Return the device memory of a process in bytes, over all GPUs.

    None if the driver does not attribute memory to it (no GPU, a container, WSL): it leaves the process out then, or
    reports 0.
    """
    with nvml() as module:
        if module is None:
            return None
        held = [
            process.usedGpuMemory
            for handle in handles(module)
            for process in _ask(module, "nvmlDeviceGetComputeRunningProcesses", handle) or []
            if process.pid == pid
        ]
        return sum(filter(None, held)) or None


BY_PROCESS = "the driver's figure of the process"
BY_FREE_MEMORY = "free memory of the driver, lost since before the start"
BY_ALLOCATOR = "the allocator, without CUDA's context"
"""Sources of the device memory of a process."""


class MemoryMeter:
    """Device memory of this process on some GPUs as the driver sees it. Make one before the process uses CUDA.

    Where the driver attributes no memory to processes, it is their free memory that was lost since then, in
    which the memory of other processes can be. `source` says which it was at the last reading.
    """

    def __init__(self, *indices: int) -> None:
        self.indices = indices
        self.free_before = self._free()
        self.source = BY_ALLOCATOR

    def _free(self) -> int | None:
        """Return the free memory of the GPUs together; None if the driver does not tell that of one."""
        found = [free_bytes(index) for index in self.indices]
        return None if None in found else sum(size or 0 for size in found)

    def read(self) -> int | None:
        """Return the bytes; None if the driver tells neither."""
        held, free = process_bytes(os.getpid()), self._free()
        if held is not None:
            self.source = BY_PROCESS
        elif free is not None and self.free_before is not None:
            self.source, held = BY_FREE_MEMORY, max(self.free_before - free, 0)
        else:
            self.source = BY_ALLOCATOR
        return held


def meter_of(*devices: str) -> MemoryMeter | None:
    """Return a meter of some devices together; None for a CPU."""
    indices = [int(device.partition(":")[2] or 0) for device in devices if device.startswith("cuda")]
    return MemoryMeter(*indices) if indices else None


PCI_ORDER = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
"""Variable of processes that use CUDA, which would count the fastest GPU first. NVML and nvidia-smi count so always."""


def check_identity(device: str, uuid: str) -> None:
    """Raise NotRealised if CUDA's device `device`, which has this UUID, is not the GPU whose readings are taken.

    Energy, memory and clocks would be those of another one. UUIDs of MIG instances are not compared.
    """
    visible, index = gpus(), int(device.partition(":")[2] or 0)
    known = str(visible[index]["uuid"] or "") if index < len(visible) else ""
    plain = known.removeprefix("GPU-")
    if known.startswith("GPU-") and plain != uuid.removeprefix("GPU-"):
        raise NotRealised(
            f"For CUDA {device} is the GPU {uuid}, and for the driver it is {known}, so readings would be those of "
            f"another GPU. Give the one to use by its UUID: CUDA_VISIBLE_DEVICES=GPU-{uuid.removeprefix('GPU-')}."
        )


def _foreign(processes: Any) -> int | None:
    """Return the number of other processes.

    None if we are not among them: the driver then shows none, or pids of another namespace (a container).
    """
    pids = [process.pid for process in processes or []]
    return len([pid for pid in pids if pid != os.getpid()]) if os.getpid() in pids else None


def read(index: int) -> GpuReading | None:
    """Return the readings of GPU `index` now; None without it. Costs milliseconds: never call it in a timed region.

    Of a MIG instance, clocks, temperature and throttling are those of the GPU that it is part of. Energy, power and
    utilization are None, since they cover all instances together.
    """
    with nvml() as module:
        found = handles(module) if module else []
        if index >= len(found):
            return None
        handle, whole = found[index], _whole(module, found[index])
        card, shared = whole or handle, whole is not None or _is_divided(module, found[index])

        def ask(one: Any, question: str, *constants: str) -> Any:
            numbers = [getattr(module, constant, None) for constant in constants]
            return None if None in numbers else _ask(module, question, one, *numbers)

        energy_mj = None if shared else ask(handle, "nvmlDeviceGetTotalEnergyConsumption")
        power_mw = None if shared else ask(handle, "nvmlDeviceGetPowerUsage")
        used = None if shared else ask(handle, "nvmlDeviceGetUtilizationRates")
        bits = ask(card, "nvmlDeviceGetCurrentClocksEventReasons")
        bits = ask(card, "nvmlDeviceGetCurrentClocksThrottleReasons") if bits is None else bits  # in older drivers
        errors = ("NVML_MEMORY_ERROR_TYPE_UNCORRECTED", "NVML_VOLATILE_ECC")
        return GpuReading(
            energy_j=None if energy_mj is None else energy_mj / 1000,
            clock_mhz=ask(card, "nvmlDeviceGetClockInfo", "NVML_CLOCK_SM"),
            temperature_c=ask(card, "nvmlDeviceGetTemperature", "NVML_TEMPERATURE_GPU"),
            throttles=tuple(name for bit, name in THROTTLES.items() if (bits or 0) & bit),
            foreign_processes=_foreign(ask(handle, "nvmlDeviceGetComputeRunningProcesses")),
            memory_clock_mhz=ask(card, "nvmlDeviceGetClockInfo", "NVML_CLOCK_MEM"),
            power_w=None if power_mw is None else power_mw / 1000,
            utilization_ratio=None if used is None else used.gpu / 100,
            memory_errors=ask(handle, "nvmlDeviceGetTotalEccErrors", *errors),
            held_back_ns=_held_back(module, card, partial(ask, card)),
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
