"""Find processes again: by their id and beginning, or by a variable of their environment."""

from __future__ import annotations

import contextlib
from pathlib import Path


def boot_id() -> str:
    """Return what identifies the time since the machine was started: the kernel's id, or else the time itself."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    import psutil

    return f"{psutil.boot_time():.0f}"


def began(pid: int) -> float | None:
    """Return when a process began, s after the machine was started; None if it has ended.

    The date of the beginning would change with the machine's clock.
    """
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time() - psutil.boot_time())
    except psutil.Error:
        return None


def with_variable(name: str, value: str) -> list[int]:
    """Return the ids of this user's running processes that began with an environment variable of this value."""
    import psutil

    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(name) == value and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found
