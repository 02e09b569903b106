"""Verdict checks of the machine beside the measurement: other processes, the hypervisor, memory, quotas and heat.

Two kinds of clocks are weighed. Fine ones, in nanoseconds and microseconds, say how long our own threads (run delay) or
any task of the machine (PSI) waited for a CPU, at any length of a repetition. CPU times of the machine count in 10 ms:
they also see a neighbour that takes only caches and clock from us, once the repetitions are long enough together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from ipaddress import ip_address
from statistics import median
from urllib.parse import urlsplit

from ..records.noise import Noise
from ..records.results import FIRST_RULES, Reason, Repetition, RunResult
from ..records.text import finite
from ..records.verdicts import FOREIGN_CPU_LIMIT, SPOILED_CPU_LIMIT, VARIATION_LIMIT
from ..stats import coefficient_of_variation, judge_sequence
from .repetitions import judged_values, mean_e2e, mean_tpot, mean_ttft, work_rate

RUN_DELAY_LIMIT = 0.05
"""Seconds per second that our threads together may wait for a CPU: as a share, most that it can delay a step that all
threads work on. A quiet machine has below 0.01."""

PRESSURE_LIMIT = 0.10
"""Share of the time in which some task of the machine may wait for a CPU: the limit of the CPU time of others."""

JUDGED_S = 0.5
"""Time of all repetitions from which contention was judged by the first rules, s."""

MEMORY_PRESSURE_LIMIT = 0.05
"""Share of the time in which some task may wait for memory: reclaim, or a page that has to be read again."""

FULL_SHARE = 0.95
"""Share of the usable CPUs from which our own threads fill them: their waiting is then for each other."""

UNSEEN_CPUS = 0.6
"""CPUs of others that short repetitions may leave unseen, where the waiting of our threads is known."""

SWAPPED_PAGES_LIMIT = 256
FAULT_S = 0.001
"""Assumed time of a page fault that reads from the disk, s: 0.1 ms from an SSD to 10 ms from a disk."""

FAULT_SHARE = 0.02
"""Share of the time that such faults may take."""

FAULTS_LEAST = 32
"""Page faults from the disk that are never a reason: code of a library that is used for the first time."""

QUOTA_SHARE = 0.01
"""Share of the time in which a CPU quota may stop our threads."""

OUTLIER_RATIO = 1.5
"""Most that one repetition may differ from the median: half-way to one that took twice as long. The mean of 30
repetitions moves by 1.7 % for it, and their standard deviation stays below 10 %."""

Metrics = dict[str, float]


def noises_of(repetitions: Iterable[Repetition]) -> list[Noise]:
    """Noise of the repetitions that have one with a positive duration."""
    return [r.noise for r in repetitions if r.noise and (finite(r.noise.wall_s) or 0.0) > 0]


def summed(noises: Sequence[Noise], of: Callable[[Noise], float | None]) -> float | None:
    """Sum of a reading; None if no repetition has it. A reading that is not a number counts as not taken."""
    known = [value for noise in noises if (value := finite(of(noise))) is not None]
    return sum(known) if known else None


def share(noises: Sequence[Noise], of: Callable[[Noise], float | None]) -> float | None:
    """Sum of a reading in seconds ÷ duration of the repetitions that have it; None if no repetition has it."""
    known = [(value, noise.wall_s) for noise in noises if (value := finite(of(noise))) is not None]
    return sum(value for value, _ in known) / sum(wall for _, wall in known) if known else None


def unseen_cpus(noises: Sequence[Noise]) -> float:
    """CPUs of others that the kernel's coarse CPU times may hide: two standard deviations of `Noise.others_s`."""
    wall = sum(noise.wall_s for noise in noises)
    return 2 * math.sqrt(sum(noise.others_error_s**2 for noise in noises)) / wall if wall > 0 else math.inf


def can_be_judged(repetitions: Sequence[Repetition]) -> bool:
    """Return True if the repetitions are long enough together to tell how many CPUs others used.

    True too if nothing was recorded to judge by: other systems, and results of earlier versions.
    """
    noises = noises_of(repetitions)
    if summed(noises, lambda n: n.busy_cpu_s) is None:
        return True
    fine = summed(noises, lambda n: n.run_delay_s) is not None
    return unseen_cpus(noises) <= (UNSEEN_CPUS if fine else SPOILED_CPU_LIMIT)


def contention(result: RunResult, metrics: Metrics) -> Iterator[Reason]:
    """Check that no one else used the CPUs, and that this could be told."""
    noises = noises_of(result.repetitions)
    if result.rules == FIRST_RULES:
        noises = noises if sum(noise.wall_s for noise in noises) > JUDGED_S else []
        seen = [*_cpu_of_others(noises)]
    else:
        seen = [*_cpu_of_others(noises), *_waiting(result, noises)]
    if seen:
        yield Reason(
            "contended", f"During the repetitions {' and '.join(seen)}. Stop other programs, and measure again."
        )
    elif not can_be_judged(result.repetitions):
        wall = sum(noise.wall_s for noise in noises)
        yield Reason(
            "too_short_to_judge",
            f"The repetitions took {wall:.2g} s together, in which others may have used up to "
            f"{unseen_cpus(noises):.2g} CPUs without being seen (the kernel counts in 10 ms; limit {UNSEEN_CPUS:g}). "
            "Raise output_tokens or the number of repetitions.",
        )


def _cpu_of_others(noises: Sequence[Noise]) -> Iterator[str]:
    """Yield what processes that are not ours and the hypervisor took, if it is above the limit by more than its error.

    The sum over all repetitions counts: an average over the time of the measurement.
    """
    others = share(noises, lambda n: n.others_s)
    if others is not None and others - unseen_cpus(noises) > FOREIGN_CPU_LIMIT:
        stolen = max(share(noises, lambda n: n.steal_s) or 0.0, 0.0)
        yield (
            f"other processes used {max(others - stolen, 0.0):.2f} and the hypervisor took {stolen:.2f} CPUs' worth of "
            f"time (limit {FOREIGN_CPU_LIMIT:.2f} together)"
        )


def _waiting(result: RunResult, noises: Sequence[Noise]) -> Iterator[str]:
    """Yield how long threads waited for a CPU, unless our own threads filled all CPUs and waited for each other."""
    cpus, own = (result.environment.get("cpu") or {}).get("usable_cpus"), share(noises, lambda n: n.own_cpu_s)
    if cpus and own is not None and own >= FULL_SHARE * cpus:
        return
    delay, pressure = share(noises, lambda n: n.run_delay_s), share(noises, lambda n: n.pressure_s)
    if delay is not None and delay > RUN_DELAY_LIMIT:
        yield (
            f"the worker's threads were ready and waited for a CPU for {delay:.2g} s in each second (limit "
            f"{RUN_DELAY_LIMIT:g})"
        )
    if pressure is not None and pressure > PRESSURE_LIMIT:
        yield f"programs waited for a CPU {pressure:.0%} of the time (PSI; limit {PRESSURE_LIMIT:.0%})"


def of_the_client(result: RunResult, metrics: Metrics) -> Iterator[Reason]:
    """Check the client's machine. Other processes are no reason where the server runs on it: one of them is the server.

    The waiting of the client's own threads always is: it delays stamps.
    """
    noises = noises_of(result.repetitions)
    stolen, delay = share(noises, lambda n: n.steal_s), share(noises, lambda n: n.run_delay_s)
    pressure = share(noises, lambda n: n.pressure_s) if result.rules > FIRST_RULES else None
    seen = []
    if stolen is not None and stolen - unseen_cpus(noises) > FOREIGN_CPU_LIMIT:
        seen.append(
            f"the hypervisor took {stolen:.2f} CPUs' worth of time from the client's machine (limit "
            f"{FOREIGN_CPU_LIMIT:.2f})"
        )
    if delay is not None and delay > RUN_DELAY_LIMIT:
        seen.append(
            f"the client was ready and waited for a CPU for {delay:.2g} s in each second (limit {RUN_DELAY_LIMIT:g})"
        )
    if pressure is not None and pressure > PRESSURE_LIMIT and not _is_local(result):
        seen.append(
            f"programs on the client's machine waited for a CPU {pressure:.0%} of the time (PSI; limit "
            f"{PRESSURE_LIMIT:.0%})"
        )
    if seen:
        yield Reason("contended", f"During the repetitions {' and '.join(seen)}. Measure again on a quiet machine.")


def _is_local(result: RunResult) -> bool:
    """Return True if the server runs on the client's machine: we started it, or its address is that of loopback."""
    host = urlsplit(result.cell.url or "").hostname or ""
    try:
        return bool(result.cell.launch) or ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def memory(result: RunResult, metrics: Metrics) -> Iterator[Reason]:
    """Check that pages were not read from the disk, and that nothing waited for memory."""
    noises = noises_of(result.repetitions)
    wall = sum(noise.wall_s for noise in noises)
    swapped, faults = summed(noises, lambda n: n.swapped_pages), summed(noises, lambda n: n.major_faults)
    waited, seen = share(noises, lambda n: n.memory_pressure_s), []
    if swapped is not None and swapped > SWAPPED_PAGES_LIMIT:
        seen.append(f"{swapped:.0f} pages were swapped (limit {SWAPPED_PAGES_LIMIT})")
    if faults is not None and faults > max(FAULTS_LEAST, FAULT_SHARE * wall / FAULT_S):
        seen.append(
            f"{faults:.0f} pages of the worker had to be read from the disk (limit "
            f"{max(FAULTS_LEAST, FAULT_SHARE * wall / FAULT_S):.0f})"
        )
    if waited is not None and waited > MEMORY_PRESSURE_LIMIT:
        seen.append(f"programs waited for memory {waited:.0%} of the time (PSI; limit {MEMORY_PRESSURE_LIMIT:.0%})")
    if seen:
        yield Reason(
            "swapping",
            f"During the repetitions {' and '.join(seen)}. The model does not fit in memory with the other programs: "
            "use a smaller batch_size or quantization.",
        )


def throttling(result: RunResult, metrics: Metrics) -> Iterator[Reason]:
    """Check that heat or power did not limit the GPU, that no quota stopped the CPUs, and that the GPU was ours."""
    noises = [r.noise for r in result.repetitions if r.noise]
    held = [n for n in noises if n.throttles]
    if held:
        names = dict.fromkeys(name for n in held for name in n.throttles)
        counted = sum(finite(n.throttled_s) or 0.0 for n in held)
        temperatures = [n.temperature_c for n in noises if n.temperature_c is not None]
        hottest = f", up to {max(temperatures)} °C" if temperatures else ""
        lasted = f", for {counted:.2g} s of {sum(n.wall_s for n in noises):.3g} s" if counted else ""
        yield Reason(
            "throttled",
            f"The GPU held its clock back in {len(held)} of {len(noises)} repetitions ({', '.join(names)}{lasted}"
            f"{hottest}; limit 0). Improve its cooling or raise its power limit, and measure again.",
        )
    timed = noises_of(result.repetitions)
    stopped, periods = share(timed, lambda n: n.quota_throttled_s), summed(timed, lambda n: n.quota_throttles) or 0
    if stopped is not None and stopped > QUOTA_SHARE:
        yield Reason(
            "throttled",
            f"A CPU quota of this container or service stopped the worker in {periods:.0f} periods, for {stopped:.2g} "
            f"CPU seconds in each second (limit {QUOTA_SHARE:g}). Raise the quota, or use fewer threads.",
        )
    foreign = max((n.foreign_gpu_processes or 0 for n in noises), default=0)
    if foreign:
        yield Reason(
            "contended",
            f"{foreign} other processes computed on the GPU (limit 0). Stop them, and measure again.",
        )


def outliers(result: RunResult, metrics: Metrics) -> Iterator[Reason]:
    """Check that no repetition is far from the others: the variation over many hides it, but their mean has it.

    Conversations, and prompts of unequal lengths, are compared by the time per output token only. Where the throughput
    varies or is out of order, that is said instead.
    """
    paces = judged_values(result.cell, result.repetitions)
    cv = coefficient_of_variation(paces)
    if (cv is not None and cv > VARIATION_LIMIT) or judge_sequence(paces, result.cell.precision_target):
        return
    found = [
        (max(value / middle, middle / value), value, number, name)
        for name, of in _compared(result)
        if (values := [(r.index + 1, value) for r in result.repetitions if (value := finite(of(r)))])
        and (middle := median(value for _, value in values)) > 0
        for number, value in values
        if value > 0 and max(value / middle, middle / value) > OUTLIER_RATIO
    ]
    if found:
        ratio, _, number, name = max(found)
        more = f", the largest of {len(found)} such values" if len(found) > 1 else ""
        yield Reason(
            "outliers",
            f"The {name} of repetition {number} differs from the median by a factor of {ratio:.2g}{more} (limit "
            f"{OUTLIER_RATIO:g}). Look for other programs that ran at the same time, and measure again.",
        )


def _compared(result: RunResult) -> Iterator[tuple[str, Callable[[Repetition], float | None]]]:
    """Yield the values of a repetition that are about equal on a quiet machine, with their names."""
    if result.cell.scenario != "offline":
        yield "throughput", work_rate
        return
    yield "time per output token", mean_tpot
    lengths = {request.prompt_tokens for r in result.repetitions for request in r.requests}
    if result.cell.history == "none" and len(lengths) == 1:
        yield "end-to-end latency", mean_e2e
        yield "time to first token", mean_ttft


CHECKS = (contention, memory, throttling, outliers)
"""Checks of a model that runs in the worker."""
