"""Waiting of our threads and of the machine: the scheduler's run delay, and pressure (PSI).

These clocks are fine enough for a repetition of a millisecond, unlike the CPU times of /proc/stat, which count in
10 ms. A reading that is not available is None or absent.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path


def stall_s(proc: Path, resource: str) -> float | None:
    """Seconds since the start in which some task of the machine waited for `cpu`, `memory` or `io` (kernel: psi.rst).

    The kernel counts in microseconds, and weighs CPUs by their busy time.
    """
    with contextlib.suppress(OSError, IndexError, ValueError):
        return int((proc / "pressure" / resource).read_text().split("total=")[1].split()[0]) / 1e6
    return None


def run_delays_s(proc: Path, others: Iterable[int] = ()) -> dict[str, float] | None:
    """Seconds that each thread of this process, and of the `others`, was ready to run and waited for a CPU, by thread.

    The second number of /proc/<pid>/task/<tid>/schedstat, ns (kernel: sched-stats.rst). None where the kernel does not
    count it.
    """
    found = {}
    for process in ("self", *map(str, others)):
        with contextlib.suppress(OSError):
            for task in (proc / process / "task").iterdir():
                with contextlib.suppress(OSError, IndexError, ValueError):  # the thread may have ended
                    found[task.name] = int((task / "schedstat").read_text().split()[1]) / 1e9
    return found or None


def run_delay_between(before: Mapping[str, float] | None, after: Mapping[str, float] | None) -> float | None:
    """Seconds that threads waited for a CPU between two readings, summed over those that are still there."""
    if before is None or after is None:
        return None
    return sum(max(waited - before.get(thread, 0.0), 0.0) for thread, waited in after.items())
