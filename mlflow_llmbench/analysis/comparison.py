"""Compare two results: ratio, interval, test and effect per metric, a sentence to quote, a guard against unlike runs.

The unit of inference is the process if a result has several, else the repetition (`repetitions.inference_units`): each
gives one value per metric, and values within it are not counted again. Effects of a process on all its repetitions
(memory layout, clocks) do not show between two single processes: measure in several, or interleaved, before you believe
a small difference.

Ratios are B ÷ A of geometric means. Their 95 % interval and p value come from Student's t on the logarithms (Welch's
for independent units, the paired test for units measured in turns): the difference of mean logarithms is the logarithm
of the ratio, so the interval needs no approximation, unlike Fieller's for arithmetic means. p values are adjusted for
the number of metrics tested (Holm), so that at most 5 % of all comparisons of like with like show any difference. The
interval and the p value of a ratio can disagree at the edge, because the interval is for its metric alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ..records.cell import DRAWN, Cell, differing
from ..records.environment import GPU_SOFTWARE, QUOTA, not_recorded, quota_text
from ..records.errors import NotComparable, UsageError
from ..records.metric import Compared, Entry
from ..records.metrics import OUTPUT_RATE, PEAK_MEMORY, shown_in
from ..records.results import RunResult, Verdict
from ..stats import holm, mann_whitney, paired, welch
from .repetitions import PER_REPETITION, process_count, unit_values
from .summary import summarize
from .verdict import judge

SIGNIFICANCE = 0.05
"""A metric differs if its p value after Holm is below this: false alarms in at most 5 % of comparisons, all metrics."""

RANKS_NEED = 8
"""Minimum number of units on each side for the Mann–Whitney test to be shown beside t."""

RATE = OUTPUT_RATE.key()
DEVICE_PEAK, HOST_PEAK = PEAK_MEMORY

ALLOWABLE = ("hardware", "software", "workload", "scenario", "schema", "verdict")
"""Kinds of differences that the guard refuses and `allow` can accept."""

UNNAMED = ("warmup", "repetitions", "max_repetitions", "precision_target", "processes")
"""Parameters that set how long a cell is measured, not what it is."""

STREAM = ("request_rate", "ramp_to", "arrival", "burstiness", "seed", "requests")
"""Parameters that set when the requests of an open loop come."""

BETTER, WORSE, ALIKE, NOISE, UNTESTED = (
    "better",
    "worse",
    "no difference seen",
    "below the noise threshold",
    "not tested",
)


@dataclass(frozen=True)
class Difference:
    """Difference between two results: its kind (one of `ALLOWABLE`), its name, and both values as text."""

    kind: str
    name: str
    a: str
    b: str

    def __str__(self) -> str:
        return f"{self.name} {self.a} → {self.b}"


@dataclass(frozen=True)
class Effect:
    """Comparison of one metric. `a` and `b` are means over units; `ratio` is b ÷ a of geometric means.

    `low` to `high` is the 95 % interval of the ratio. `p_value` is that of t alone; `p_holm`, after the adjustment,
    decides; `p_ranks` is Mann and Whitney's, alone. All of these are None for a metric that a run has only once.
    `values_a` and `values_b` are the values of the units.
    """

    entry: Entry[Compared]
    a: float
    b: float
    ratio: float
    effect: str = UNTESTED
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    p_holm: float | None = None
    p_ranks: float | None = None
    values_a: tuple[float, ...] = ()
    values_b: tuple[float, ...] = ()

    @property
    def key(self) -> str:
        """MLflow key of the metric."""
        return self.entry.key

    @property
    def is_repeated(self) -> bool:
        """True if every repetition has the metric; False if a run has it once."""
        return self.key in PER_REPETITION


@dataclass(frozen=True)
class Comparison:
    """Result B against result A.

    `labels` are the differences found by the guard and allowed; `doubts` are verdicts other than valid. `repetitions`
    and `processes` are counts of A and B; if a result has several processes, they are its units.
    """

    name_a: str
    name_b: str
    effects: tuple[Effect, ...]
    repetitions: tuple[int, int]
    processes: tuple[int, int]
    paired: bool
    noise: float
    labels: tuple[Difference, ...] = ()
    doubts: tuple[str, ...] = ()

    def effect(self, key: str) -> Effect | None:
        """The effect on a metric, by MLflow key; None if either result lacks it."""
        return next((effect for effect in self.effects if effect.key == key), None)

    @property
    def memory(self) -> Effect | None:
        """Peak memory: of the device if both results have it, else needed host memory."""
        return self.effect(DEVICE_PEAK) or self.effect(HOST_PEAK)


COMPARED = shown_in(Compared)
"""Compared metrics, in the order of the table."""


def compare(
    a: RunResult,
    b: RunResult,
    *,
    noise: float = 0.01,
    allow: frozenset[str] = frozenset(),
    paired: bool = False,
    called: tuple[str, str] | None = None,
) -> Comparison:
    """Compare two results of one kind of work on one machine; ratios are B ÷ A.

    `noise`: ratio below which a significant difference is called `below the noise threshold`. `paired`: both were
    measured in turns, and the i-th process of both belong together, or the i-th repetition if each has one process.
    `called`: their names, by default the parameters in which they differ. `allow`: kinds of differences (`ALLOWABLE`)
    that become labels. Raises NotComparable if the results differ in any other kind, if one is invalid or has no
    repetitions; UsageError for a wrong argument.
    """
    _check(noise, allow)
    name_a, name_b = called or names(a, b)
    for name, result in ((name_a, a), (name_b, b)):
        if not result.repetitions:
            raise NotComparable(
                f"{name} has no repetitions: its outcome is {result.outcome}. Measure it again, or compare another run."
            )
    repetitions, processes = (len(a.repetitions), len(b.repetitions)), (process_count(a), process_count(b))
    if paired:
        _check_pairs(repetitions, processes)
    metrics = summarize(a), summarize(b)
    verdicts = judge(a, metrics[0]), judge(b, metrics[1])
    unlike = [*differences(a, b), *_invalid(verdicts)]
    _refuse([difference for difference in unlike if difference.kind not in allow])
    doubts = [
        f"{name} is {verdict.word} ({', '.join(reason.code for reason in verdict.reasons)})"
        for name, verdict in zip((name_a, name_b), verdicts, strict=True)
        if verdict.word != "valid"
    ]
    effects = _adjust(list(_effects(a, b, *metrics, paired)), noise)
    return Comparison(name_a, name_b, effects, repetitions, processes, paired, noise, tuple(unlike), tuple(doubts))


def _check(noise: float, allow: frozenset[str]) -> None:
    if not 0 <= noise < 1:
        raise UsageError(f"The noise threshold is not a ratio from 0 to below 1: {noise}. Give 0.01 for 1 %.")
    unknown = sorted(allow.difference(ALLOWABLE))
    if unknown:
        raise UsageError(f"Unknown kind of difference to allow: {', '.join(unknown)}. Known: {', '.join(ALLOWABLE)}.")


def _check_pairs(repetitions: tuple[int, int], processes: tuple[int, int]) -> None:
    """Raise UsageError if the units of the two results do not form pairs."""
    noun, (first, second) = ("processes", processes) if max(processes) > 1 else ("repetitions", repetitions)
    if first != second:
        raise UsageError(
            f"Paired results need as many {noun} on both sides: {first} and {second}. Compare them without paired."
        )


def _refuse(unlike: Sequence[Difference]) -> None:
    """Raise NotComparable for differences that are not allowed."""
    if not unlike:
        return
    kinds = [kind for kind in ALLOWABLE if any(difference.kind == kind for difference in unlike)]
    listed = "; ".join(f"{kind}: " + ", ".join(str(d) for d in unlike if d.kind == kind) for kind in kinds)
    raise NotComparable(
        f"The two results are not alike. {listed}. Measure both in the same way, or compare them anyway, with labels, "
        f"with --allow {','.join(kinds)}."
    )


def _invalid(verdicts: tuple[Verdict, Verdict]) -> list[Difference]:
    """The verdicts as a difference to refuse, if either is invalid."""
    if all(verdict.word != "invalid" for verdict in verdicts):
        return []
    first, second = (f"{v.word} ({', '.join(r.code for r in v.reasons)})" if v.reasons else v.word for v in verdicts)
    return [Difference("verdict", "verdict", first, second)]


def _effects(
    a: RunResult, b: RunResult, metrics_a: Mapping[str, float], metrics_b: Mapping[str, float], in_pairs: bool
) -> Iterator[Effect]:
    """Effects on every compared metric that both results have, before the adjustment for their number."""
    # True if one model is on a device and the other on the host.
    elsewhere = (DEVICE_PEAK in metrics_a) != (DEVICE_PEAK in metrics_b)
    for entry in COMPARED:
        key = entry.key
        if elsewhere and key == HOST_PEAK:
            continue
        if of := PER_REPETITION.get(key):
            first, second = unit_values(a, of), unit_values(b, of)
            if first and second and min(*first, *second) > 0:
                yield _tested(entry, first, second, in_pairs)
        elif metrics_a.get(key) and key in metrics_b:
            yield Effect(entry, metrics_a[key], metrics_b[key], metrics_b[key] / metrics_a[key])


def _tested(entry: Entry[Compared], a: Sequence[float], b: Sequence[float], in_pairs: bool) -> Effect:
    """Compute ratio, interval and p values of one metric from its values per unit."""
    logs_a, logs_b = [math.log(value) for value in a], [math.log(value) for value in b]
    ratio = math.exp(fmean(logs_b) - fmean(logs_a))
    found = (paired if in_pairs else welch)(logs_a, logs_b)
    effect = Effect(entry, fmean(a), fmean(b), ratio, values_a=tuple(a), values_b=tuple(b))
    if found is None:
        return effect
    ranks = mann_whitney(a, b) if not in_pairs and min(len(a), len(b)) >= RANKS_NEED else None
    p_ranks = ranks.p_value if ranks else None
    return dataclasses.replace(
        effect, low=math.exp(found.low), high=math.exp(found.high), p_value=found.p_value, p_ranks=p_ranks
    )


def _adjust(effects: Sequence[Effect], noise: float) -> tuple[Effect, ...]:
    """Adjust p values over all tested metrics (Holm) and name each effect."""
    adjusted = iter(holm([effect.p_value for effect in effects if effect.p_value is not None]))
    return tuple(
        _classify(effect, next(adjusted), noise) if effect.p_value is not None else effect for effect in effects
    )


def _classify(effect: Effect, p_holm: float, noise: float) -> Effect:
    if p_holm >= SIGNIFICANCE:
        word = ALIKE
    elif abs(math.log(effect.ratio)) < math.log1p(noise):
        word = NOISE
    else:
        word = BETTER if (effect.ratio > 1) == (effect.entry.metric.better == "higher") else WORSE
    return dataclasses.replace(effect, p_holm=p_holm, effect=word)


def differences(a: RunResult, b: RunResult) -> list[Difference]:
    """Differences between two results that were not asked about: hardware, software, workload, scenario, schema.

    Hashes decide; the readable facts behind them explain. If no fact differs, the hashes are shown. A fact that an
    earlier version did not record is no difference, although the other result's hash includes it.
    """
    unknown = not_recorded(a.environment) | not_recorded(b.environment)
    described = {"hardware": _hardware, "software": _software, "workload": _workload}
    found: list[Difference] = []
    for kind, describe in described.items():
        hash_a, hash_b = getattr(a.hashes, kind), getattr(b.hashes, kind)
        if hash_a != hash_b:
            found += _unlike(kind, describe(a), describe(b), unknown) or (
                []
                if _explained(unknown, describe(a), describe(b))
                else [Difference(kind, f"{kind} hash", hash_a, hash_b)]
            )
    named = {difference.name for difference in found}
    found += [difference for difference in _streams(a.cell, b.cell) if difference.name not in named]
    for kind, word_a, word_b in (
        ("scenario", a.cell.scenario, b.cell.scenario),
        ("schema", str(a.schema), str(b.schema)),
    ):
        if word_a != word_b:
            found.append(Difference(kind, kind, word_a, word_b))
    return found


def _unlike(
    kind: str, facts_a: Mapping[str, str], facts_b: Mapping[str, str], unknown: Collection[str]
) -> list[Difference]:
    """Facts in which two results differ, without those that are unknown for one of them."""
    known = [name for name in dict.fromkeys([*facts_a, *facts_b]) if name not in unknown]
    readable = [Difference(kind, name, facts_a.get(name, "none"), facts_b.get(name, "none")) for name in known]
    return [difference for difference in readable if difference.a != difference.b]


def _explained(unknown: Collection[str], *facts: Mapping[str, str]) -> bool:
    """Return True if only one of two results has a fact, so that their hashes differ by it."""
    return any((name in facts[0]) != (name in facts[1]) for name in unknown)


def _streams(a: Cell, b: Cell) -> list[Difference]:
    """Differences between two open loops in the load put on the system: when their requests come.

    None between closed loops: their number of users is a choice, like a batch size. A trace has its times in
    `workload_hash`.
    """
    if a.scenario != b.scenario or a.trace or b.trace or not (a.open_loop or b.open_loop):
        return []
    names = STREAM if a.open_loop and b.open_loop else STREAM[:1]
    pairs = [(name, value_text(name, getattr(a, name)), value_text(name, getattr(b, name))) for name in names]
    return [Difference("workload", name, first, second) for name, first, second in pairs if first != second]


def _hardware(result: RunResult) -> dict[str, str]:
    """Readable facts behind `hardware_hash`."""
    cpu: Mapping[str, Any] = result.environment.get("cpu") or {}
    total = (result.environment.get("memory") or {}).get("total_bytes")
    found: Sequence[Mapping[str, Any]] = result.environment.get("gpus") or []
    gpus = Counter(
        f"{gpu['name']} ({gpu['memory_bytes'] / 1e9:.0f} GB{', MIG' if gpu.get('mig') else ''})" for gpu in found
    )
    facts = {
        "CPU": cpu.get("name"),
        "architecture": cpu.get("architecture"),
        "usable CPUs": cpu.get("usable_cpus"),
        "physical cores": cpu.get("physical_cores"),
        QUOTA: quota_text(result.environment),
        "memory": f"{round(total / 2**30)} GiB" if total else None,
        "GPU": " + ".join(f"{count} × {name}" if count > 1 else name for name, count in gpus.items()) or None,
    }
    return _stated(facts)


def _software(result: RunResult) -> dict[str, str]:
    """Readable facts behind `software_hash`."""
    environment = result.environment
    system: Mapping[str, Any] = environment.get("os") or {}
    facts = {
        **{name: environment.get(key) for key, name in GPU_SOFTWARE.items()},
        "OS": " ".join(filter(None, [system.get("system"), system.get("release")])) or None,
        "libc": system.get("libc"),
        "Python": environment.get("python"),
    }
    return _stated({**facts, **(environment.get("packages") or {})})


def _workload(result: RunResult) -> dict[str, str]:
    """Readable facts behind `workload_hash`; the texts themselves are not in the result."""
    facts: dict[str, Any] = {
        name: value_text(name, getattr(result.cell, name)) for name in ("workload", "prompt_tokens", "output_tokens")
    }
    facts["conversations"] = "as one prompt" if result.cell.history == "none" else "turn by turn"
    if result.cell.workload in DRAWN:
        size = (
            result.load.vocab_size
            if result.load and result.load.vocab_size
            else (result.model.config or {}).get("vocab_size")
        )
        facts |= {"seed": result.cell.seed, "vocabulary": f"{size} tokens" if size else None}
    return _stated(facts)


def _stated(facts: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in facts.items() if value not in (None, "")}


def names(a: RunResult, b: RunResult) -> tuple[str, str]:
    """Names of the two results: the parameters in which their cells differ (`bf16`, `int4`), else A and B."""
    varied = differing([a.cell, b.cell], UNNAMED)
    first, second = (" ".join(parameter_text(name, getattr(result.cell, name)) for name in varied) for result in (a, b))
    return (first, second) if first != second else ("A", "B")


def parameter_text(name: str, value: object) -> str:
    """A parameter in the name of a result: `int4`, `opt-125m`, `threads=2`."""
    if name == "model":
        return str(value).rstrip("/").rsplit("/", 1)[-1]
    if name == "quant" and value != "none":
        return str(value)
    return f"{name}={value_text(name, value)}"


def value_text(name: str, value: object) -> str:
    """A parameter value as on the command line: `auto` for None, `true` and `false`, 5 for 5.0."""
    if value is None:
        return str(Cell.__dataclass_fields__[name].metadata["unset"])
    if isinstance(value, float):
        return f"{value:g}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def sentence(comparison: Comparison) -> str:
    """The comparison as one sentence to quote: throughput with interval, and memory; then its limitations, if any."""
    rate, memory = comparison.effect(RATE), comparison.memory
    claims = [_rate_claim(comparison, rate)] if rate else []
    if memory:
        times = ratio_text(memory)
        claims.append("needs the same memory" if float(times) == 1 else f"needs {times} times the memory")
    parts = [f"{comparison.name_b} {' and '.join(claims)}."] if claims else []
    return " ".join([*parts, *_limits(comparison)])


def _rate_claim(comparison: Comparison, rate: Effect) -> str:
    times, other = ratio_text(rate), comparison.name_a
    interval = f"95 % interval {interval_text(rate)}" if rate.low is not None else "one value, no interval"
    if rate.effect == ALIKE:
        return f"generates tokens no measurably faster or slower than {other} (ratio {times}, {interval})"
    if rate.effect == NOISE:
        return (
            f"generates tokens as fast as {other} within the noise threshold of {percent_text(comparison.noise)} "
            f"(ratio {times}, {interval})"
        )
    return f"generates {times} times the tokens per second of {other} ({interval})"


def _limits(comparison: Comparison) -> list[str]:
    """Sentences on limitations of the comparison: allowed differences, single processes, verdicts other than valid."""
    unlike = [str(label) for label in comparison.labels if label.kind != "verdict"]
    found = [f"The conditions were not alike: {', '.join(unlike)}."] if unlike else []
    if min(comparison.processes) == 1 < max(comparison.processes):
        single = comparison.name_a if comparison.processes[0] == 1 else comparison.name_b
        found.append(
            f"{single} was measured in one process: an effect of the process on all its repetitions is not seen."
        )
    return found + ([f"The verdict on {'; that on '.join(comparison.doubts)}."] if comparison.doubts else [])


def ratio_text(effect: Effect) -> str:
    """A ratio with two decimals, or up to four if its interval is narrow."""
    return f"{effect.ratio:.{_decimals(effect)}f}"


def interval_text(effect: Effect) -> str:
    """The 95 % interval of a ratio with as many decimals as the ratio; – without one."""
    if effect.low is None or effect.high is None:
        return "–"
    decimals = _decimals(effect)
    return f"{effect.low:.{decimals}f} to {effect.high:.{decimals}f}"


def _decimals(effect: Effect) -> int:
    if effect.low is None or effect.high is None:
        return 2 if effect.ratio >= 0.1 else 4
    half = (effect.high - effect.low) / 2
    return min(4, max(2, math.ceil(-math.log10(half)))) if half > 0 else 4


def percent_text(ratio: float) -> str:
    """0.01 → `1 %`."""
    return f"{100 * ratio:.3g} %"


def units_text(comparison: Comparison) -> str:
    """Units of the test: `5 and 6 repetitions`, `10 pairs of processes`, `5 processes and 8 repetitions`."""
    counts = zip(comparison.repetitions, comparison.processes, strict=True)
    (first, noun), (second, other) = (
        (processes, "processes") if processes > 1 else (repetitions, "repetitions") for repetitions, processes in counts
    )
    if comparison.paired:
        return f"{first} pairs of {noun}"
    return f"{first} and {second} {noun}" if noun == other else f"{first} {noun} and {second} {other}"
