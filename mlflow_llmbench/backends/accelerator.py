"""Devices of torch besides the CPU: wait for their work, their memory, and what their allocator keeps."""

from __future__ import annotations

from collections.abc import Sequence

from ..system.gpu import MemoryMeter
from .base import DeviceMemory


def synchronise(devices: Sequence[str]) -> None:
    """Wait until the devices have done their work. Nothing to wait for on a CPU."""
    for device in devices:
        if device != "cpu":
            import torch

            torch.cuda.synchronize(device)


def device_memory(devices: Sequence[str], meter: MemoryMeter | None, reset: bool = False) -> DeviceMemory | None:
    """Return the memory of this process on all of the devices; None on a CPU. `reset` starts a new peak.

    `meter` has the driver's view of the same devices.
    """
    if meter is None:
        return None
    import torch

    seen = DeviceMemory(
        sum(map(torch.cuda.memory_allocated, devices)),
        sum(map(torch.cuda.memory_reserved, devices)),
        sum(map(torch.cuda.max_memory_reserved, devices)),
        meter.read(),
    )
    for device in devices if reset else ():
        torch.cuda.reset_peak_memory_stats(device)
    return seen


def empty_caches(device: str) -> None:
    """Return what the allocators of all devices keep to the driver. Nothing to do on a CPU."""
    if device != "cpu":
        import torch

        torch.cuda.empty_cache()
