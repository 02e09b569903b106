"""Noise between processes: its size from results or a calibration, and its part in the error of a comparison. Pure.

Effects that all repetitions of a process share (memory layout, order of compilation, clocks) cannot be seen in one
process. A result of one process is therefore compared with the variance between processes beside that of its
repetitions: Var = σ²_between + s²/n. σ²_between is the variance of the means of processes, minus what their
repetitions explain (Kalibera & Jones, Rigorous benchmarking in reasonable time, ISMM 2013). It comes from a calibration
of the machine, else from the other result if that has several processes, else it is assumed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, variance

from ..records.calibration import Calibration, Spread
from ..records.cell import Cell
from ..records.errors import UsageError
from ..records.results import Repetition, RunResult
from ..stats import Part
from .repetitions import COMPARED_VALUES, inference_units, process_count

ASSUMED = Spread(0.03**2, 5)
"""Spread that is assumed where none is known: 3 %, as uncertain as if six processes had shown it (1.9 to 7.4 %).

The layout of a program in memory alone changes its speed by several per cent (Mytkowicz et al., Producing wrong data
without doing anything obviously wrong, ASPLOS 2009). With 5 degrees of freedom, at most 5 % of comparisons of like with
like raise an alarm if processes differ by 3 %, or if each of them has one of two speeds that differ by 15 %
(`benchmarks/comparison_worlds.py`).
"""

LEAST_PROCESSES = 3
"""Fewest processes of a result whose spread is used for other results."""

ASSUMPTION, CALIBRATION, OTHER_SIDE = "assumed", "calibrated", "the other result"


SIZES = (5, 10, 20, 40, 80)
"""Numbers of repetitions for which the spread of the means of processes is known, as far as they were made."""


@dataclass(frozen=True)
class ProcessNoise:
    """Noise between processes as a comparison uses it. `origin` is a sentence on where it comes from.

    `repetitions`: fewest of the compared results, which decide the spread. `at_least_assumed`: the result was
    disturbed, which the calibration was not, so no spread below `ASSUMED` counts.
    """

    source: str
    origin: str
    repetitions: int
    spreads: dict[str, tuple[Spread, ...]] = field(default_factory=dict)
    at_least_assumed: bool = False

    def spread(self, key: str) -> Spread:
        """The spread of a metric, `ASSUMED` where it is not known."""
        found = self.spreads.get(key) or (ASSUMED,)
        known = next((one for one in reversed(found) if one.repetitions <= self.repetitions), found[0])
        return ASSUMED if self.at_least_assumed and known.variance < ASSUMED.variance else known

    def part(self, key: str, sides: int) -> Part:
        """The variance that it adds to a difference of which `sides` sides are of one process.

        Both sides have the same estimate, so it is multiplied before it is squared.
        """
        known = self.spread(key)
        share = (sides * known.between) ** 2 / known.degrees
        if known.within_degrees:
            share += (sides * known.within) ** 2 / known.within_degrees
        return Part(sides * known.variance, share, known.degrees if known.within_degrees else 0.0)


def device_of(result: RunResult) -> str:
    """Device that a result was measured on, without its number: `cpu`, `cuda`."""
    device = result.load.facts.get("model.device", result.cell.device) if result.load else result.cell.device
    return str(device).partition(":")[0]


def key_of(result: RunResult) -> tuple[str, str, str]:
    """Hardware, backend and device of a result, as in `Calibration.key`."""
    return result.hashes.hardware, result.cell.backend, device_of(result)


def noise_of(
    result: RunResult, other: RunResult, calibrations: Sequence[Calibration], disturbed: bool
) -> ProcessNoise | None:
    """The noise between processes to add to `result` in a comparison with `other`; None if it has several processes.

    `disturbed`: its verdict says that its repetitions are not alike.
    """
    if process_count(result) > 1:
        return None
    least = min(len(one.repetitions) for one in (result, other) if process_count(one) == 1)
    if known := next((one for one in calibrations if one.key == key_of(result)), None):
        found = ProcessNoise(CALIBRATION, _calibrated(known), least, dict(known.spreads))
    elif key_of(other) == key_of(result) and process_count(other) >= LEAST_PROCESSES:
        count = process_count(other)
        told = f"that of the {count} processes of the other result"
        found = ProcessNoise(OTHER_SIDE, told, least, spreads_of([other]))
    else:
        told = f"a standard deviation of {100 * ASSUMED.sd:g} %, which is assumed until this machine is calibrated"
        found = ProcessNoise(ASSUMPTION, told, least)
    return replace(found, at_least_assumed=disturbed)


def _calibrated(known: Calibration) -> str:
    day = time.strftime("%Y-%m-%d", time.gmtime(known.ended_ms / 1000))
    return f"that of {known.processes} processes of {known.of}, as calibrated on {day}"


def calibration_of(results: Sequence[RunResult]) -> Calibration:
    """Calibrate from results with several processes each, of one backend and device on one machine.

    The variances of several results are pooled; each is within one configuration. Raises UsageError if a result has
    fewer than `LEAST_PROCESSES` processes, has failed, or is of another machine, backend or device than the first.
    """
    if not results:
        raise UsageError(
            "There is no result to calibrate with. Give the run of one configuration in several processes."
        )
    for result in results:
        if process_count(result) < LEAST_PROCESSES:
            raise UsageError(
                f"A calibration needs results of at least {LEAST_PROCESSES} processes, and {_words(result.cell)} has "
                f"{process_count(result)}. Measure it with processes=10."
            )
        if key_of(result) != key_of(results[0]):
            raise UsageError(
                "A calibration is of one machine, backend and device, and the results are of "
                f"{' '.join(key_of(results[0]))} and {' '.join(key_of(result))}. Calibrate with those of one."
            )
    hardware, backend, device = key_of(results[0])
    return Calibration(
        hardware,
        backend,
        device,
        ", ".join(dict.fromkeys(_words(result.cell) for result in results)),
        sum(map(process_count, results)),
        sum(len(result.repetitions) for result in results),
        max(result.ended_ms for result in results),
        results[0].hashes.software,
        spreads=spreads_of(results),
    )


def _words(cell: Cell) -> str:
    return f"{cell.model.rstrip('/').rsplit('/', 1)[-1]} {cell.quant}"


def spreads_of(results: Sequence[RunResult]) -> dict[str, tuple[Spread, ...]]:
    """Spreads between processes of each compared metric that all repetitions have, pooled over the results."""
    found = {key: _spreads(results, of) for key, of in COMPARED_VALUES.items()}
    return {key: spreads for key, spreads in found.items() if spreads}


def _spreads(results: Sequence[RunResult], of: Callable[[Repetition], float | None]) -> tuple[Spread, ...]:
    """Spreads of one metric for each size, and for all repetitions; none if a repetition lacks the metric."""
    logs: list[list[list[float]]] = []
    for result in results:
        values = [[of(repetition) for repetition in process] for process in inference_units(result)]
        if any(value is None or value <= 0 for process in values for value in process):
            return ()
        logs.append([[math.log(value) for value in process if value] for process in values])
    least = min(len(process) for processes in logs for process in processes)
    sizes = sorted({*(size for size in SIZES if size <= least), least})
    return tuple(_spread(logs, size) for size in sizes)


def _spread(logs: Sequence[Sequence[Sequence[float]]], size: int) -> Spread:
    """Spread of means of `size` repetitions, from the logarithms of each result's processes.

    A process of w times as many repetitions gives w such means. Their variance is that of the means of the processes,
    plus (1 − 1/w) times that of the w means around them; each with its own degrees of freedom, and pooled over results.
    """
    between = inside = spread = 0.0
    degrees = inside_degrees = spread_degrees = 0
    least = min(len(process) for processes in logs for process in processes)
    parts = least // size
    for processes in logs:
        means = [[fmean(p[i * size : (i + 1) * size]) for i in range(parts)] for p in processes]
        degrees += len(processes) - 1
        between += (len(processes) - 1) * variance(map(fmean, means))
        if parts > 1:
            inside_degrees += len(processes) * (parts - 1)
            inside += sum((parts - 1) * variance(own) for own in means)
        spread_degrees += sum(len(p) - 1 for p in processes)
        spread += sum((len(p) - 1) * variance(p) for p in processes if len(p) > 1)
    first = between / degrees
    second = (1 - 1 / parts) * inside / inside_degrees if inside_degrees else 0.0
    share = first**2 / degrees + (second**2 / inside_degrees if inside_degrees else 0.0)
    within = spread / spread_degrees / size if spread_degrees else 0.0
    own_degrees = (first + second) ** 2 / share if share else float(degrees)
    return Spread(first + second, own_degrees, within, spread_degrees, size)
