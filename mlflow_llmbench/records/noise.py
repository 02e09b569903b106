"""Noise: activity of the machine during one repetition, apart from the measured work."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from .text import finite
from .verdicts import SPOILED_CPU_LIMIT

OMITTED: Mapping[str, bool] = {"omitted": True}
"""Metadata of a field that JSON lacks while its value is None. Any other None is written as null."""

TICK_S = 0.01
"""Step of the kernel's CPU times in /proc/stat, s (USER_HZ)."""

TIMER_S = 0.004
"""Usual interval of the kernel's timer interrupt, in which CPU time is counted, s."""


@dataclass(frozen=True)
class Noise:
    """Activity of the machine during one repetition, apart from the measured work.

    `steal_s`: CPU seconds taken by the hypervisor · `foreign_cpu_s`: CPU seconds used by processes that are not ours ·
    `busy_cpu_s`: CPU seconds used by all processes, from which it follows · `run_delay_s`: seconds that our own threads
    waited for a CPU, summed over threads (the scheduler counts ns) · `pressure_s`, `memory_pressure_s`: seconds in
    which some task of the machine waited for a CPU, or for memory (PSI) · `quota_throttled_s`, `quota_throttles`:
    seconds (summed over CPUs) and periods in which a CPU quota stopped our control groups · `major_faults`: page faults
    that read from the disk · `energy_j`: of the device, idle included ·
    `throttles`: why the GPU's clock was held back, during the repetition if the driver counts it, and at its end ·
    `throttled_s`: seconds by the longest-lasting reason · `gpu_memory_errors`: uncorrected errors (ECC). The rest is
    read once, when the repetition has ended: `frequency_mhz`: mean over our CPUs, or the GPU's SM clock ·
    `memory_clock_mhz`, `power_w`, `temperature_c`, `foreign_gpu_processes`: of the GPU · `utilization_ratio`: share of
    the last sixth of a second to one second in which the GPU ran a kernel.
    """

    wall_s: float
    steal_s: float | None = None
    foreign_cpu_s: float | None = None
    own_cpu_s: float | None = None
    pressure_s: float | None = None
    involuntary_switches: int | None = None
    major_faults: int | None = None
    swapped_pages: int | None = None
    frequency_mhz: float | None = None
    energy_j: float | None = None
    throttles: tuple[str, ...] = ()
    foreign_gpu_processes: int | None = None
    temperature_c: int | None = None
    throttled_s: float | None = None
    memory_clock_mhz: int | None = None
    power_w: float | None = None
    utilization_ratio: float | None = None
    gpu_memory_errors: int | None = None
    busy_cpu_s: float | None = field(default=None, metadata=OMITTED)
    run_delay_s: float | None = field(default=None, metadata=OMITTED)
    memory_pressure_s: float | None = field(default=None, metadata=OMITTED)
    quota_throttled_s: float | None = field(default=None, metadata=OMITTED)
    quota_throttles: int | None = field(default=None, metadata=OMITTED)

    @property
    def others_s(self) -> float | None:
        """CPU seconds that others used: processes that are not ours, and the hypervisor. None if neither is known.

        A difference of counters that is too coarse for a short repetition can be below 0.
        """
        own, busy, steal = finite(self.own_cpu_s), finite(self.busy_cpu_s), finite(self.steal_s)
        foreign = finite(self.foreign_cpu_s) if own is None or busy is None else busy - own
        return None if foreign is None and steal is None else (foreign or 0.0) + (steal or 0.0)

    @property
    def others_error_s(self) -> float:
        """Standard deviation of `others_s`, s.

        The kernel shows user, system and stolen time in ticks of 10 ms, and counts each CPU's share in whole
        interrupts of its timer, about 4 ms: the difference of two values cut off to a step q varies by q/√6.
        """
        busy_cpus = max(finite(self.own_cpu_s) or 0.0, 0.0) / self.wall_s if self.wall_s > 0 else 0.0
        return math.sqrt((3 * TICK_S**2 + busy_cpus * TIMER_S**2) / 6)

    @property
    def spoiled(self) -> bool:
        """True if others used so much CPU, or our threads waited so long for one, that it should be repeated.

        The limit for others is raised by twice the error of their CPU time, which matters for short repetitions.
        """
        wall = finite(self.wall_s)
        if not wall or wall <= 0:
            return False
        others = (self.others_s or 0.0) - 2 * self.others_error_s
        return max(others, finite(self.run_delay_s) or 0.0) > SPOILED_CPU_LIMIT * wall
