"""False alarms and power of comparisons in scripted worlds: two results of one configuration, of one process each.

    python benchmarks/comparison_worlds.py [--simulations 3000] [--auto 3000] [--output FILE]

In each world the repetitions of a process are drawn with a known fault (processes that differ, two speeds, serial
correlation, …). Both results are measured by the real rule of `repetitions=auto`, or with a fixed number. An alarm is a
metric called better or worse between two results of the same configuration. The verdict is not consulted, although it
calls many of these results suspect and widens their error: these are the alarms without its help. Three machines: one
that is not calibrated, one that was (10 processes of 20 repetitions of the same world, drawn again for each
comparison), and two results of 5 processes each. The test is computed for all comparisons at once; for some of them it
is checked against `compare`. Goals: at most 5 % alarms in every world; at least 90 % of true changes of 5 % found with
auto where the noise is a quiet 2 % and the machine is calibrated or measured in 5 processes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special  # type: ignore[import-untyped]

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mlflow_llmbench.analysis.comparison import BETTER, COMPARED, WORSE, compare
from mlflow_llmbench.analysis.process_noise import ASSUMED, SIZES, calibration_of
from mlflow_llmbench.measure.stopping import enough
from mlflow_llmbench.records.calibration import Calibration
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.results import Hashes, LoadInfo, ModelFacts, Repetition, RequestRecord, RunResult

Array = NDArray[np.float64]
Draw = Callable[[np.random.Generator, int, int], Array]
SEED, LENGTH = 17, 30
CALIBRATED = (10, 20)
PROCESSES = 5
TESTS = sum(entry.metric.section in ("throughput", "latency") for entry in COMPARED)
"""Compared metrics that every repetition has. In these worlds they change together, and Holm multiplies p by this."""


def quiet(sd: float) -> Draw:
    return lambda rng, k, n: 1 + sd * rng.standard_normal((k, n))


def processes(between: float, within: float) -> Draw:
    return lambda rng, k, n: (1 + between * rng.standard_normal((k, 1))) * (1 + within * rng.standard_normal((k, n)))


def two_speeds(block: int) -> Draw:
    """30 % of blocks of repetitions are 15 % faster; a block as long as a process makes a process fast or slow."""

    def draw(rng: np.random.Generator, k: int, n: int) -> Array:
        fast = (rng.random((k, n // block + 2)) < 0.3).repeat(block, axis=1)
        places = rng.integers(0, block, (k, 1)) + np.arange(n)
        return (1 + 0.15 * np.take_along_axis(fast, places, 1)) * (1 + 0.01 * rng.standard_normal((k, n)))

    return draw


def one_speed_each() -> Draw:
    return lambda rng, k, n: (1 + 0.15 * (rng.random((k, 1)) < 0.3)) * (1 + 0.01 * rng.standard_normal((k, n)))


def correlated(phi: float) -> Draw:
    def draw(rng: np.random.Generator, k: int, n: int) -> Array:
        values = rng.standard_normal((k, n))
        for i in range(1, n):
            values[:, i] = phi * values[:, i - 1] + (1 - phi**2) ** 0.5 * values[:, i]
        return 1 + 0.02 * values

    return draw


def course(change: float, step: bool) -> Draw:
    def draw(rng: np.random.Generator, k: int, n: int) -> Array:
        at = np.minimum(np.arange(n), LENGTH - 1)
        return 1 + change * ((at >= LENGTH / 2) if step else at / (LENGTH - 1)) + 0.01 * rng.standard_normal((k, n))

    return draw


def rarely_slow() -> Draw:
    return lambda rng, k, n: (1 - 0.5 * (rng.random((k, n)) < 0.05)) * (1 + 0.01 * rng.standard_normal((k, n)))


WORLDS: dict[str, Draw] = {
    "normal, 1 %": quiet(0.01),
    "normal, 2 %": quiet(0.02),
    "normal, 3 %": quiet(0.03),
    "processes differ by 3 %, repetitions by 1 %": processes(0.03, 0.01),
    "two speeds, repetition by repetition": two_speeds(1),
    "two speeds, in blocks of 5": two_speeds(5),
    "two speeds, in blocks of 10": two_speeds(10),
    "two speeds, process by process": one_speed_each(),
    "AR(1) 0.5": correlated(0.5),
    "AR(1) 0.8": correlated(0.8),
    "5 % of repetitions twice as slow": rarely_slow(),
    "trend of +20 % over 30 repetitions": course(0.2, step=False),
    "step of −15 % after 15 repetitions": course(-0.15, step=True),
}


def result(rates: Sequence[Sequence[float]], cell: Cell, number: int = 0) -> RunResult:
    """A result of these relative speeds, process by process: 4 tokens in half a second at speed 1."""
    made = []
    for process, own in enumerate(rates):
        for rate in own:
            begin, index = len(made) * 10**9, len(made)
            stamps = tuple(begin + round(part * 5e8 / rate) for part in (0.25, 0.5, 0.75, 1.0))
            made.append(Repetition(index, index, (RequestRecord(begin, stamps, prompt_tokens=8),), process=process))
    return RunResult(
        cell, "ok", number, number + 1, Hashes("c", "w", "h", "s", "e"), ModelFacts("m", "none", "m", "r"), {},
        LoadInfo(1.0, facts={"model.device": "cpu"}), repetitions=tuple(made), steady=True,
    )  # fmt: skip


def auto_counts(rates: Array, cell: Cell) -> NDArray[np.intp]:
    """The number of repetitions at which `auto` stops, for each row."""
    counts = []
    for row in rates:
        repetitions = result([row.tolist()], cell).repetitions
        most = min(cell.max_repetitions, len(row))
        counts.append(next((n for n in range(5, most) if enough(cell, repetitions[:n])), most))
    return np.array(counts)


@dataclass(frozen=True)
class Sides:
    """Mean, variance of the mean and degrees of freedom of the logarithms of many results; `counts`: repetitions."""

    mean: Array
    error: Array
    degrees: Array
    counts: NDArray[np.intp]


def single(rates: Array, counts: NDArray[np.intp]) -> Sides:
    """Results of one process each, a row of `rates` up to its count."""
    logs = np.where(np.arange(rates.shape[1]) < counts[:, None], np.log(rates), 0.0)
    mean = logs.sum(1) / counts
    squares = (logs**2).sum(1) - counts * mean**2
    return Sides(mean, squares / (counts - 1) / counts, counts - 1.0, counts)


def several(rng: np.random.Generator, draw: Draw, k: int) -> Sides:
    """Results of `PROCESSES` processes of 10 repetitions; the mean of a process is that of its repetitions."""
    means = np.log(draw(rng, k * PROCESSES, 10).mean(1).reshape(k, PROCESSES))
    return Sides(means.mean(1), means.var(1, ddof=1) / PROCESSES, np.full(k, PROCESSES - 1.0), np.full(k, PROCESSES))


def calibrations(rng: np.random.Generator, draw: Draw, counts: NDArray[np.intp]) -> tuple[Array, Array, float]:
    """The variance of two results' means between processes, on one calibrated machine for each count.

    With its share and the degrees of freedom of its first estimate.
    """
    machines, (processes, repetitions) = len(counts), CALIBRATED
    logs = np.log(draw(rng, machines * processes, repetitions).reshape(machines, processes, repetitions))
    spread = logs.var(2, ddof=1).mean(1)
    variance, share = np.empty(machines), np.empty(machines)
    for size in (n for n in SIZES if n <= repetitions):  # the largest that is not above the count stays
        chosen = np.maximum(counts, SIZES[0]) >= size
        windows = logs.reshape(machines, processes, -1, size).mean(3)
        parts = repetitions // size
        first = windows.mean(2).var(1, ddof=1)
        second = (1 - 1 / parts) * windows.var(2, ddof=1).mean(1) if parts > 1 else np.zeros(machines)
        between, within = first + second, spread / size
        shares = (2 * first) ** 2 / (processes - 1) + (2 * second) ** 2 / (processes * max(parts - 1, 1))
        shares += (2 * within) ** 2 / (processes * (repetitions - 1))
        variance = np.where(chosen, 2 * np.maximum(0.0, between - within), variance)
        share = np.where(chosen, shares, share)
    return variance, share, processes - 1.0


def alarms(sides: tuple[Sides, Sides], change: float, more: tuple[Any, Any, Any]) -> NDArray[np.bool_]:
    """True where b, faster by `change`, is called better or worse: p < 0.05 after Holm, and by more than 1 %."""
    a, b = sides
    difference = b.mean - a.mean + np.log1p(change)
    variance, share, least_degrees = more
    total = np.maximum(a.error + b.error + variance, np.sqrt(least_degrees * share))
    degrees = np.maximum(1.0, total**2 / (a.error**2 / a.degrees + b.error**2 / b.degrees + share))
    p = 2 * special.stdtr(degrees, -np.abs(difference) / np.sqrt(total))
    return (TESTS * p < 0.05) & (np.abs(difference) >= np.log1p(0.01))


ASSUMPTION = (2 * ASSUMED.variance, (2 * ASSUMED.between) ** 2 / ASSUMED.degrees, 0.0)
CHANGE = 0.05


@dataclass(frozen=True)
class Row:
    """Shares of one world: alarms between alike results, and found changes of 5 %."""

    world: str
    repetitions: str
    mean_repetitions: float
    alarms: dict[str, float]
    found: dict[str, float]


def simulate(world: str, repetitions: int | None, simulations: int, seed: int = SEED) -> Row:
    """Simulate comparisons in a world; `repetitions` None is auto."""
    rng = np.random.default_rng([seed, list(WORLDS).index(world), repetitions or 0])
    draw, cell = WORLDS[world], Cell(prompt_tokens=8, output_tokens=4, repetitions=repetitions)
    sides = []
    for _ in range(2):
        rates = draw(rng, simulations, repetitions or cell.max_repetitions)
        counts = np.full(simulations, repetitions) if repetitions else auto_counts(rates, cell)
        sides.append(single(rates, counts))
    a, b = sides
    cases: dict[str, tuple[tuple[Sides, Sides], tuple[Any, Any, Any]]] = {
        "not calibrated": ((a, b), ASSUMPTION),
        "calibrated": ((a, b), calibrations(rng, draw, np.minimum(a.counts, b.counts))),
        "5 processes": ((several(rng, draw, simulations), several(rng, draw, simulations)), (0.0, 0.0, 0.0)),
        "as before": ((a, b), (0.0, 0.0, 0.0)),
    }
    return Row(
        world,
        str(repetitions or "auto"),
        float(np.mean([a.counts, b.counts])),
        {name: float(alarms(two, 0.0, more).mean()) for name, (two, more) in cases.items()},
        {name: float(alarms(two, CHANGE, more).mean()) for name, (two, more) in cases.items()},
    )


def check(world: str, count: int, seed: int = SEED) -> int:
    """Compare `count` pairs of 10 repetitions by `compare` as well. Return the number of unlike answers.

    Pairs whose verdict says that a process was disturbed are left out: their error is wider in `compare`.
    """
    rng, draw = np.random.default_rng([seed, 1]), WORLDS[world]
    cell = Cell(prompt_tokens=8, output_tokens=4, repetitions=10)
    rates = draw(rng, 2 * count, 10)
    machine = calibration_of([result(draw(rng, *CALIBRATED).tolist(), cell)])
    spread = next(one for one in next(iter(machine.spreads.values())) if one.repetitions == 10)
    known = 2 * spread.variance, (2 * spread.between) ** 2 / spread.degrees
    known = known[0], known[1] + (2 * spread.within) ** 2 / spread.within_degrees, spread.degrees
    sides = single(rates, np.full(2 * count, 10))
    unlike = 0
    for more, given in ((ASSUMPTION, ()), (known, (machine,))):
        first, second = (Sides(*(getattr(sides, f)[i::2] for f in Sides.__dataclass_fields__)) for i in range(2))
        expected = alarms((first, second), 0.0, more)
        for i in range(count):
            unlike += _unlike(rates[2 * i], rates[2 * i + 1], cell, given, bool(expected[i]))
    return unlike


def _unlike(a: Array, b: Array, cell: Cell, machine: tuple[Calibration, ...], expected: bool) -> int:
    first, second = result([a.tolist()], cell, 1), result([b.tolist()], cell, 2)
    found = compare(first, second, calibrations=machine)
    if any(noise and noise.at_least_assumed for noise in found.process_noise):
        return 0
    return int(any(effect.effect in (BETTER, WORSE) for effect in found.effects) != expected)


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table, in per cent."""
    cases = list(rows[0].alarms)
    lines = [
        "| world | repetitions | " + " | ".join(f"alarms, {name}" for name in cases) + " | 5 % found, calibrated |"
    ]
    lines.append("| --- " * 2 + "| ---: " * (len(cases) + 1) + "|")
    for row in rows:
        shares = [row.alarms[name] for name in cases] + [row.found["calibrated"]]
        told = f"{row.repetitions} ({row.mean_repetitions:.0f})" if row.repetitions == "auto" else row.repetitions
        lines.append(f"| {row.world} | {told} | " + " | ".join(f"{100 * share:.1f}" for share in shares) + " |")
    return "\n".join(lines)


def missed(rows: Sequence[Row]) -> list[str]:
    """Goals that are not reached."""
    found = [
        f"{row.world}, {row.repetitions}, {name}: {share:.1%} alarms"
        for row in rows
        for name, share in row.alarms.items()
        if name != "as before" and share > 0.05
    ]
    return found + [
        f"{row.world}, {name}: {row.found[name]:.1%} of changes found"
        for row in rows
        for name in ("calibrated", "5 processes")
        if (row.world, row.repetitions) == ("normal, 2 %", "auto") and row.found[name] < 0.9
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description="False alarms and power of comparisons in scripted worlds.")
    parser.add_argument("--simulations", type=int, default=3000)
    parser.add_argument("--auto", type=int, default=3000, help="simulations with auto, which are slower")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    rows = [simulate(world, n, given.simulations if n else given.auto) for world in WORLDS for n in (5, 10, 30, None)]
    unlike = {world: check(world, 20) for world in WORLDS}
    print(table(rows))
    for line in missed(rows):
        print(f"missed: {line}")
    print(f"answers that differ from compare: {sum(unlike.values())} of {40 * len(unlike)}")
    if given.output:
        data = {
            "seed": SEED,
            "simulations": given.simulations,
            "auto": given.auto,
            "rows": [vars(row) for row in rows],
            "unlike": unlike,
        }
        given.output.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return int(bool(missed(rows)) or any(unlike.values()))


if __name__ == "__main__":
    sys.exit(main())
