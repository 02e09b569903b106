"""Intel's and Apple's GPUs, and the name of Apple's CPUs: what can be known of them without importing torch."""

from __future__ import annotations

import platform
import subprocess
import sys

from ..records.errors import MissingError
from . import torch_runtime

KINDS = ("xpu", "mps")
"""Kinds of devices, as torch names them, that are taken only if they are asked for."""


def require(device: str) -> str:
    """Return the device, `mps`, `xpu` or `xpu:N`. Raises MissingError if this machine or its torch cannot have it."""
    where = f"{platform.system()} {platform.machine()}"
    if device == "mps" and (sys.platform, platform.machine()) != ("darwin", "arm64"):
        raise MissingError(f"There is no Apple GPU for device=mps: this machine is {where}. Use device=cpu.")
    if device.startswith("xpu") and not torch_runtime.has_xpu():
        raise MissingError(
            f"The installed torch has no support for Intel GPUs, which device={device} needs. "
            "Use device=cpu, or install the build of torch for XPU."
        )
    return device


def apple_cpu_name() -> str | None:
    """Return the name of the CPU of a Mac, such as `Apple M2 Pro`; None on other machines."""
    if sys.platform != "darwin":
        return None
    asked = ["sysctl", "-n", "machdep.cpu.brand_string"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
