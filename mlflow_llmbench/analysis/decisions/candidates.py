"""Results as candidates for deployment: their metrics, verdict, name, limits, and values with intervals."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ...records.cell import differing
from ...records.metric import Entry, Goal, QualityBound
from ...records.metrics import COST, ENERGY, KEYS, PEAK_MEMORY
from ...records.results import Repetition, RunResult, Verdict
from ..comparison import RATE, UNNAMED, parameter_text
from ..repetitions import PER_REPETITION, interval_over_units, unit_values
from ..summary import hardware_name, summarize
from ..verdict import judge


@dataclass(frozen=True)
class Measure:
    """Metric to judge a configuration by: its name in sentences, its keys (the first that a result has counts)."""

    label: str
    keys: tuple[str, ...]
    better: str  # "lower" or "higher"
    absent: str = "Measure again."  # what to do where no result has it

    @classmethod
    def of(cls, entry: Entry[Goal] | Entry[QualityBound]) -> Measure:
        """The measure of one metric of the table."""
        return cls(entry.words, (entry.key,), entry.metric.better, entry.place.advice)

    def key(self, metrics: Mapping[str, float]) -> str | None:
        """The key that counts for a result with these metrics; None if it has none."""
        return next((key for key in self.keys if key in metrics), None)


MEMORY = Measure("peak memory", PEAK_MEMORY, "lower")


@dataclass(frozen=True)
class Limit:
    """Limit for a configuration: `option` as given, and the bound in the metric's unit (GB, ms, ratio)."""

    option: str
    measure: Measure
    bound: float

    def keeps(self, value: float) -> bool:
        """Return True if a value is within the limit, bound included."""
        return value <= self.bound if self.measure.better == "lower" else value >= self.bound

    def __str__(self) -> str:
        return f"{self.option} {bound_text(self.measure, self.bound)}"


@dataclass(frozen=True)
class Candidate:
    """One result with its metrics, its verdict, and its name among the others."""

    name: str
    result: RunResult
    metrics: Mapping[str, float]
    verdict: Verdict

    def value(self, measure: Measure) -> float | None:
        """The measured value; None if there is none."""
        key = measure.key(self.metrics)
        return None if key is None else self.metrics[key]


def candidates(results: Sequence[RunResult]) -> list[Candidate]:
    """Results with their metrics and verdicts, named by the parameters that vary among them."""
    names = names_of(results)
    found = []
    for name, result in zip(names, results, strict=True):
        metrics = summarize(result)
        found.append(Candidate(name, result, metrics, judge(result, metrics)))
    return found


def names_of(results: Sequence[RunResult]) -> list[str]:
    """Name each result by the parameters in which they differ (`int8 batch 4`), else by model, quantization and batch.

    Results with one name from several machines get the name of their machine as well.
    """
    varied = differing([result.cell for result in results], UNNAMED)
    names = [
        " ".join(_varied_text(name, getattr(result.cell, name)) for name in varied or ("model", "quant", "batch_size"))
        for result in results
    ]
    homes = [(name, result.hashes.hardware) for name, result in zip(names, results, strict=True)]
    twins = {name for name, count in Counter(name for name, _ in set(homes)).items() if count > 1}
    return [
        f"{name} on {_machine(result)}" if name in twins else name for name, result in zip(names, results, strict=True)
    ]


def _machine(result: RunResult) -> str:
    """Name of the GPU or CPU, with the hardware hash, since machines with the same one can differ otherwise."""
    return f"{hardware_name(result)} ({result.hashes.hardware[:6]})"


def _varied_text(name: str, value: object) -> str:
    return f"batch {value}" if name == "batch_size" else parameter_text(name, value)


def figure(key: str, value: float) -> str:
    """Format a value as it is shown, with three significant digits and the unit of the metric table."""
    metric = KEYS.get(key)
    return f"{_digits(value)} {metric.display_unit}".rstrip() if metric else _digits(value)


def bound_text(measure: Measure, bound: float) -> str:
    """Format a bound as a person gives it: `6 GB`, `200 ms`, `0.05`."""
    unit = KEYS[measure.keys[-1]].unit if measure.keys[-1] in KEYS else ""
    return f"{bound:.6g}{f' {unit}' if unit in ('GB', 'ms') else ''}"


def _digits(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value:.{min(8, max(0, 2 - math.floor(math.log10(abs(value)))))}f}"


def values_of(one: Candidate, key: str) -> Callable[[Repetition], float | None] | None:
    """The function that gives a metric of one repetition; None if a run has the metric only once."""
    if key == COST.key():
        return _cost(one.result.price_per_hour)
    if key == ENERGY.key():
        return _joules(one.result.idle_w)
    return PER_REPETITION.get(key)


def _cost(price_per_hour: float | None) -> Callable[[Repetition], float | None]:
    rate_of = PER_REPETITION[RATE]

    def cost(repetition: Repetition) -> float | None:
        rate = rate_of(repetition)
        return price_per_hour / (rate * 3600) * 1e6 if price_per_hour is not None and rate else None

    return cost


def _joules(idle_w: float | None) -> Callable[[Repetition], float | None]:
    def joules(repetition: Repetition) -> float | None:
        noise = repetition.noise
        if idle_w is None or noise is None or noise.energy_j is None:
            return None
        return (noise.energy_j - idle_w * noise.wall_s) / sum(r.rows * r.output_tokens for r in repetition.requests)

    return joules


def interval(one: Candidate, measure: Measure) -> tuple[float, float] | None:
    """95 % interval of the figure over units, always including it; None if a run has it only once."""
    key = measure.key(one.metrics)
    of = values_of(one, key) if key else None
    ends = interval_over_units(one.result, key, unit_values(one.result, of) or ()) if key and of else None
    if key is None or ends is None:
        return None
    return min(max(ends[0], 0.0), one.metrics[key]), max(ends[1], one.metrics[key])
