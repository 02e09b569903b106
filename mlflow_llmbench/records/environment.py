"""Names of the software facts in a result's environment, and facts that results of earlier versions do not have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

GPU_RUNTIME = {"cuda_runtime": "CUDA of torch", "rocm": "ROCm of torch", "cudnn": "cuDNN", "nccl": "NCCL"}
"""Libraries that torch uses on a GPU: key in the environment → name for people."""

GPU_SOFTWARE = {"driver": "driver", "cuda": "CUDA of the driver", **GPU_RUNTIME}
"""The same with the driver, and the highest CUDA version that it supports."""


def not_recorded(environment: Mapping[str, Any]) -> set[str]:
    """Return the names of facts that a result does not have because an earlier version measured it.

    Nothing is known of them, so they are no difference from another result.
    """
    lacking = {name for key, name in GPU_RUNTIME.items() if key not in environment}
    return lacking | ({QUOTA} if "quota_cpus" not in (environment.get("cpu") or {}) else set())


QUOTA = "CPU quota"


def quota_text(environment: Mapping[str, Any]) -> str | None:
    """Return the CPU quota of the control groups as text: `1.5 CPUs`; None without one."""
    quota = (environment.get("cpu") or {}).get("quota_cpus")
    return f"{quota:g} CPUs" if quota else None
