"""Devices of torch besides the CPU: their work, memory, caches and names. The only user of torch's device modules.

`cuda` (CUDA and ROCm), `xpu` (Intel) and `mps` (Apple) answer the same questions by their own modules
(`torch.get_device_module`). What a device does not tell is None. See docs/gpus.md for what has run on which.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..system import gpu, machine
from ..system.gpu import MemoryMeter
from .base import DeviceMemory

if TYPE_CHECKING:
    import torch

NO_FLOAT64 = ("mps",)
"""Kinds of devices without numbers of 64 bits."""


def kind_of(device: str) -> str:
    """Return the kind of a device: `cuda` for `cuda:1`."""
    return device.partition(":")[0]


def _module(device: str) -> Any:
    import torch

    return torch.get_device_module(kind_of(device))


def take(device: str) -> None:
    """Make a device the current one, for libraries that ask for no other. Of CUDA, check which GPU it is.

    Raises NotRealised.
    """
    if device == "cpu" or not hasattr(_module(device), "set_device"):
        return
    import torch

    _module(device).set_device(torch.device(device if ":" in device else f"{device}:0"))  # it takes no bare kind
    if kind_of(device) == "cuda":
        gpu.check_identity(device, str(torch.cuda.get_device_properties(device).uuid))


def synchronise(devices: Sequence[str]) -> None:
    """Wait until the devices have done their work. Nothing to wait for on a CPU."""
    for device in devices:
        if device != "cpu":
            module = _module(device)
            module.synchronize(*(() if kind_of(device) == "mps" else (device,)))


def device_memory(devices: Sequence[str], meter: MemoryMeter | None, reset: bool = False) -> DeviceMemory | None:
    """Return the memory of this process on all of the devices; None on a CPU. `reset` starts a new peak.

    `meter` has the driver's view of the same devices, where there is one.
    """
    if devices[0] == "cpu":
        return None
    module = _module(devices[0])
    if kind_of(devices[0]) == "mps":  # it has no peak, and one pool
        held = module.driver_allocated_memory()
        return DeviceMemory(module.current_allocated_memory(), held, held, held)
    seen = DeviceMemory(
        sum(map(module.memory_allocated, devices)),
        sum(map(module.memory_reserved, devices)),
        sum(map(module.max_memory_reserved, devices)),
        meter.read() if meter else None,
    )
    for device in devices if reset else ():
        module.reset_peak_memory_stats(device)
    return seen


def free_bytes(device: str) -> int:
    """Return the free memory of a device that is no CPU."""
    module = _module(device)
    if kind_of(device) == "mps":
        return max(int(module.recommended_max_memory()) - int(module.driver_allocated_memory()), 0)
    return int(module.mem_get_info(device)[0])


def empty_caches(device: str) -> None:
    """Return what the allocators of all devices keep to the driver. Nothing to do on a CPU."""
    if device != "cpu":
        _module(device).empty_cache()


def cache_bytes(device: str) -> int | None:
    """Return the size of a device's last-level cache; None if it is not known."""
    if device == "cpu":
        return machine.last_level_cache_bytes()
    properties = getattr(_module(device), "get_device_properties", lambda _: None)(device)
    size = getattr(properties, "L2_cache_size", None) or getattr(properties, "last_level_cache_size", None)
    return None if size is None else int(size)


def name(device: str) -> str | None:
    """Return the name of a device by torch; None for a CPU. Apple's GPUs have no name of their own."""
    if device == "cpu":
        return None
    find = getattr(_module(device), "get_device_name", None)
    return str(find(device)) if find else f"GPU of {machine.cpu_name()}"


def has_bfloat16(device: str) -> bool:
    """Return True if a device computes in bf16 natively."""
    if device == "cpu":
        return True
    import torch

    if kind_of(device) == "mps":
        return bool(torch.backends.mps.is_macos_or_newer(14, 0))
    module = _module(device)
    with module.device(device):  # it asks the current one
        emulated = {"including_emulation": False} if kind_of(device) == "cuda" else {}
        return bool(module.is_bf16_supported(**emulated))


def doubled(values: torch.Tensor) -> torch.Tensor:
    """Return a tensor in double precision, in host memory if its device has none."""
    return (values.cpu() if values.device.type in NO_FLOAT64 else values).double()


@contextlib.contextmanager
def stopping_at_once(device: str) -> Iterator[None]:
    """Have transformers look at each step's tokens in that step while the block runs, as on CUDA and CPUs.

    On Apple's GPUs it looks one step late: each token would be streamed one step late, and one more step computed.
    """
    from transformers.generation import utils

    check: Any = getattr(utils, "DeferredStopCheck", None)
    if kind_of(device) != "mps" or check is None:
        yield
        return
    before = check.__dict__["is_supported"]
    check.is_supported = staticmethod(lambda *_, **__: False)
    try:
        yield
    finally:
        check.is_supported = before
