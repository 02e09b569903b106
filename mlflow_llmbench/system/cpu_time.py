"""CPU time of other processes: of one from its own clock, and CPUs that all programs use."""

from __future__ import annotations

import sys
import time

CPU_CLOCK = 2
"""The kernel's number of the clock of a process that counts the time of its threads (CPUCLOCK_SCHED)."""


def process_s(pid: int) -> float | None:
    """Return the CPU time that the threads of a process have used, s; None if it has ended, or outside of Linux.

    Costs a few microseconds: one system call with the clock that clock_getcpuclockid(3) names, which Python lacks.
    """
    if sys.platform != "linux":
        return None
    try:
        return time.clock_gettime(~pid << 3 | CPU_CLOCK)
    except OSError:
        return None


def busy_cpus(seconds: float = 0.5) -> float:
    """Return the number of CPUs that programs use on this machine, mean of `seconds` in which this one waits."""
    import psutil

    return float(psutil.cpu_percent(interval=seconds) / 100 * (psutil.cpu_count() or 1))
