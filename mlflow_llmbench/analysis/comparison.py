"""Compare two results: ratio, interval, test and effect per metric, a sentence to quote, a guard against unlike runs.

The unit of inference is the process if a result has several, else the repetition (`repetitions.inference_units`): each
gives one value per metric, and values within it are not counted again. Effects of a process on all its repetitions
(memory layout, clocks) do not show between two single processes, so the noise between processes is added to the error
of a result of one process (`process_noise`). If only the repetitions tell a difference, it *cannot be told*. The
repetitions of a disturbed process count as one value.

Ratios are B ÷ A of geometric means. Their 95 % interval and p value come from Student's t on the logarithms (Welch's
for independent units, the paired test for units measured in turns): the difference of mean logarithms is the logarithm
of the ratio, so the interval needs no approximation, unlike Fieller's for arithmetic means. p values are adjusted for
the number of metrics tested (Holm), so that at most 5 % of all comparisons of like with like show any difference. The
interval and the p value of a ratio can disagree at the edge, because the interval is for its metric alone.
"""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from ..records import invocation
from ..records.calibration import Calibration
from ..records.cell import differing
from ..records.errors import NotComparable, UsageError
from ..records.metric import Compared, Entry
from ..records.metrics import OUTPUT_RATE, PEAK_MEMORY, shown_in
from ..records.results import Repetition, RunResult, Verdict
from ..records.text import known_words
from ..records.verdicts import DISTURBING
from ..stats import MeanDifference, Part, holm, mann_whitney, mean_part, pair_differences, t_test
from .comparability import ALLOWABLE, Difference, differences, same_evidence, value_text
from .in_turns import command_in_turns
from .process_noise import ASSUMPTION, ProcessNoise, noise_of
from .repetitions import PER_REPETITION, process_count, unit_values
from .summary import summarize
from .verdict import judge

if TYPE_CHECKING:
    from pandas import DataFrame

SIGNIFICANCE = 0.05
"""A metric differs if its p value after Holm is below this: false alarms in at most 5 % of comparisons, all metrics."""

RANKS_NEED = 8
"""Minimum number of units on each side for the Mann–Whitney test to be shown beside t."""

RATE = OUTPUT_RATE.key()
DEVICE_PEAK, HOST_PEAK = PEAK_MEMORY

UNNAMED = ("warmup", "repetitions", "max_repetitions", "precision_target", "processes")
"""Parameters that set how long a cell is measured, not what it is."""

BETTER, WORSE, ALIKE, NOISE, UNTOLD, UNTESTED = (
    "better",
    "worse",
    "no difference seen",
    "below the noise threshold",
    "cannot be told",
    "not tested",
)


@dataclass(frozen=True)
class Effect:
    """Comparison of one metric. `a` and `b` are the metric's figures of both results, `ratio` is b ÷ a.

    Where every repetition has the metric, the ratio is that of geometric means over units, `values_a` and `values_b`
    are the values of the units, and `low` to `high` is the 95 % interval of the ratio. `p_value` is that of t alone;
    `p_holm`, after the adjustment, decides; `p_ranks` is Mann and Whitney's, alone. `p_units` is that of t without the
    noise between processes; it only tells why a difference is not seen. `parts` are those of the variance of the
    logarithm of the ratio. All of these are None or empty for a metric that a run has only once.
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
    p_units: float | None = None
    parts: tuple[Part, ...] = ()

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
    and `processes` are counts of A and B; several processes are a result's units. `process_noise` is what was added to
    the error of A and of B; None for several processes, whose units include it. `in_turns`: a command for both sides.
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
    process_noise: tuple[ProcessNoise | None, ProcessNoise | None] = (None, None)
    in_turns: str = ""

    def effect(self, key: str) -> Effect | None:
        """The effect on a metric, by MLflow key; None if either result lacks it."""
        return next((effect for effect in self.effects if effect.key == key), None)

    @property
    def memory(self) -> Effect | None:
        """Peak memory: of the device if both results have it, else needed host memory."""
        return self.effect(DEVICE_PEAK) or self.effect(HOST_PEAK)

    def to_pandas(self) -> DataFrame:
        """Return a data frame with a line for each metric, by MLflow key: both figures, ratio, interval, p, effect."""
        from pandas import DataFrame

        names = ("a", "b", "ratio", "low", "high", "p_holm", "effect")
        lines = [[getattr(effect, name) for name in names] for effect in self.effects]
        return DataFrame(lines, columns=names, index=[effect.key for effect in self.effects])

    def __repr__(self) -> str:
        return f"<Comparison of {self.name_b} with {self.name_a}: {sentence(self)}>"

    def _repr_html_(self) -> str:
        table = self.to_pandas().to_html(float_format="{:.4g}".format, na_rep="–")
        return f"<p><b>{html.escape(sentence(self))}</b></p>{table}"


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
    calibrations: Sequence[Calibration] = (),
) -> Comparison:
    """Compare two results of one kind of work on one machine; ratios are B ÷ A.

    `noise`: ratio below which a significant difference is called `below the noise threshold`. `paired`: both were
    measured in turns, and the i-th process of both belong together, or the i-th repetition if each has one process.
    `called`: their names, by default the parameters in which they differ. `allow`: kinds of differences (`ALLOWABLE`)
    that become labels. `calibrations`: known noise between processes, by machine. Raises NotComparable if the results
    differ in any other kind, are the same evidence, or if one is invalid or has no repetitions; UsageError for a wrong
    argument.
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
    if same_evidence(a, b):
        raise NotComparable(
            f"{name_a} and {name_b} are the same evidence: one measurement, of {a.sweep or 'one sweep'}. Compared with "
            "itself it shows nothing. Measure one of them again, or compare another run."
        )
    doubts = [
        f"{name} is {verdict.word} ({', '.join(reason.code for reason in verdict.reasons)})"
        for name, verdict in zip((name_a, name_b), verdicts, strict=True)
        if verdict.word != "valid"
    ]
    errors = Errors.of(a, b, verdicts, paired, calibrations)
    effects = _adjust(list(_effects(a, b, *metrics, errors)), noise)
    return Comparison(
        name_a, name_b, effects, repetitions, processes, paired, noise, tuple(unlike), tuple(doubts), errors.noises,
        command_in_turns(a.cell, b.cell),
    )  # fmt: skip


@dataclass(frozen=True)
class Errors:
    """How the error of a difference between two results is made. `noises`: as `Comparison.process_noise`.

    `disturbed`: per result, True if its repetitions do not count as independent values.
    """

    paired: bool
    noises: tuple[ProcessNoise | None, ProcessNoise | None]
    disturbed: tuple[bool, bool]

    @classmethod
    def of(
        cls,
        a: RunResult,
        b: RunResult,
        verdicts: tuple[Verdict, Verdict],
        paired: bool,
        calibrations: Sequence[Calibration],
    ) -> Errors:
        """The errors of a comparison of two results with these verdicts.

        Pairs were measured in turns: what disturbed both is not in their differences.
        """
        first, second = (
            not paired and process_count(result) == 1 and any(reason.code in DISTURBING for reason in verdict.reasons)
            for result, verdict in ((a, verdicts[0]), (b, verdicts[1]))
        )
        noises = noise_of(a, b, calibrations, first), noise_of(b, a, calibrations, second)
        return cls(paired, noises, (first, second))

    def units(self, a: Sequence[float], b: Sequence[float], independent: bool) -> tuple[Part, ...]:
        """The variances of the mean logarithms of two results' units, or of the mean difference of pairs."""
        first, second = (independent or not disturbed for disturbed in self.disturbed)
        if self.paired:
            return (mean_part(pair_differences(a, b), first and second),)
        return mean_part(a, first), mean_part(b, second)

    def processes(self, key: str) -> tuple[Part, ...]:
        """The variances of a metric between processes, for the results of one process."""
        alone = [noise for noise in self.noises if noise]
        if len(alone) == 2 and alone[0].spread(key) == alone[1].spread(key):
            return (alone[0].part(key, 2),)
        return tuple(noise.part(key, 1) for noise in alone)


@dataclass(frozen=True)
class MetricTest:
    """Test of one metric: the values of both results' units, and the tests with and without noise between processes."""

    a: list[float]
    b: list[float]
    parts: tuple[Part, ...]
    found: MeanDifference
    units: MeanDifference


ValueOf = Callable[[Repetition], float | None]
"""Function that gives a metric of one repetition, None if it has none."""


def metric_test(
    key: str, of: tuple[ValueOf, ValueOf], results: tuple[RunResult, RunResult], errors: Errors
) -> MetricTest | None:
    """Test the logarithms of a metric of two results, each with its function.

    None if a repetition lacks it, or a result has fewer than 2 units.
    """
    first, second = (unit_values(result, own) for result, own in zip(results, of, strict=True))
    if not first or not second or min(*first, *second) <= 0 or min(len(first), len(second)) < 2:
        return None
    logs = [math.log(value) for value in first], [math.log(value) for value in second]
    difference = fmean(logs[1]) - fmean(logs[0])
    alone = errors.units(*logs, independent=True)
    units = errors.units(*logs, independent=False) if any(errors.disturbed) else alone
    parts = (*units, *errors.processes(key))
    return MetricTest(first, second, parts, t_test(difference, parts), t_test(difference, alone))


def _check(noise: float, allow: frozenset[str]) -> None:
    if not 0 <= noise < 1:
        raise UsageError(f"The noise threshold is not a ratio from 0 to below 1: {noise}. Give 0.01 for 1 %.")
    unknown = sorted(allow.difference(ALLOWABLE))
    if unknown:
        raise UsageError(
            f"Unknown kind of difference to allow: {', '.join(unknown)}. {known_words(unknown[0], ALLOWABLE)}"
        )


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
    a: RunResult, b: RunResult, metrics_a: Mapping[str, float], metrics_b: Mapping[str, float], errors: Errors
) -> Iterator[Effect]:
    """Effects on every compared metric that both results have, before the adjustment for their number."""
    # True if one model is on a device and the other on the host.
    elsewhere = (DEVICE_PEAK in metrics_a) != (DEVICE_PEAK in metrics_b)
    for entry in COMPARED:
        key = entry.key
        if (elsewhere and key == HOST_PEAK) or not metrics_a.get(key) or key not in metrics_b:
            continue
        effect = Effect(entry, metrics_a[key], metrics_b[key], metrics_b[key] / metrics_a[key])
        of = PER_REPETITION.get(key)
        if of is None:
            yield effect
        elif tested := metric_test(key, (of, of), (a, b), errors):
            yield _with_test(effect, tested, errors)
        else:
            values = unit_values(a, of) or (), unit_values(b, of) or ()
            yield dataclasses.replace(effect, values_a=tuple(values[0]), values_b=tuple(values[1]))


def _with_test(effect: Effect, tested: MetricTest, errors: Errors) -> Effect:
    """Add ratio, interval and p values of a metric that was tested."""
    found = tested.found
    several = errors.noises == (None, None) and min(len(tested.a), len(tested.b)) >= RANKS_NEED
    ranks = mann_whitney(tested.a, tested.b) if several and not errors.paired else None
    return dataclasses.replace(
        effect,
        ratio=math.exp(found.difference),
        low=math.exp(found.low),
        high=math.exp(found.high),
        p_value=found.p_value,
        p_ranks=ranks.p_value if ranks else None,
        values_a=tuple(tested.a),
        values_b=tuple(tested.b),
        p_units=tested.units.p_value,
        parts=tested.parts,
    )


def _adjust(effects: Sequence[Effect], noise: float) -> tuple[Effect, ...]:
    """Adjust p values over all tested metrics (Holm) and name each effect."""
    adjusted = iter(holm([effect.p_value for effect in effects if effect.p_value is not None]))
    alone = iter(holm([effect.p_units for effect in effects if effect.p_units is not None]))
    return tuple(
        effect if effect.p_value is None else _classify(effect, next(adjusted), next(alone), noise)
        for effect in effects
    )


def _classify(effect: Effect, p_holm: float, p_alone: float, noise: float) -> Effect:
    small = abs(math.log(effect.ratio)) < math.log1p(noise)
    if p_holm >= SIGNIFICANCE:
        word = UNTOLD if p_alone < SIGNIFICANCE and not small else ALIKE
    elif small:
        word = NOISE
    else:
        word = BETTER if (effect.ratio > 1) == (effect.entry.metric.better == "higher") else WORSE
    return dataclasses.replace(effect, p_holm=p_holm, effect=word)


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
    if rate.effect == UNTOLD:
        return f"cannot be told from {other} in tokens per second (ratio {times}, {interval})"
    if rate.effect == ALIKE:
        return f"generates tokens no measurably faster or slower than {other} (ratio {times}, {interval})"
    if rate.effect == NOISE:
        return (
            f"generates tokens as fast as {other} within the noise threshold of {percent_text(comparison.noise)} "
            f"(ratio {times}, {interval})"
        )
    return f"generates {times} times the tokens per second of {other} ({interval})"


def _limits(comparison: Comparison) -> list[str]:
    """Sentences on limitations of the comparison: allowed differences, noise of processes, verdicts but valid."""
    unlike = [str(label) for label in comparison.labels if label.kind != "verdict"]
    found = [f"The conditions were not alike: {', '.join(unlike)}."] if unlike else []
    if any(effect.effect == UNTOLD for effect in comparison.effects):
        found.append(f"Two processes of one configuration may differ as much. {advice(comparison)}")
    return found + ([f"The verdict on {'; that on '.join(comparison.doubts)}."] if comparison.doubts else [])


def advice(comparison: Comparison) -> str:
    """Sentence on how to tell a difference that cannot be told: several processes, in turns, or a calibration."""
    found = f"Measure both again with {invocation.parameter_text('processes', '5')}, or in turns: {comparison.in_turns}"
    if any(noise and noise.source == ASSUMPTION for noise in comparison.process_noise):
        found += f"; or calibrate this machine once, and compare again: {invocation.command_text('calibrate')}"
    return f"{found}."


def noise_sentences(comparison: Comparison) -> list[str]:
    """Sentences on the noise between processes that was added to the error: its size, and where it comes from."""
    named: dict[str, list[str]] = {}
    for name, noise in zip((comparison.name_a, comparison.name_b), comparison.process_noise, strict=True):
        if noise:
            named.setdefault(_noise_text(noise), []).append(name)
    return [
        f"One process of {' and '.join(names)} was measured; added to {'its' if len(names) == 1 else 'their'} error is "
        f"the noise between processes, {told}."
        for told, names in named.items()
    ]


def _noise_text(noise: ProcessNoise) -> str:
    spread = noise.spread(RATE)
    text = noise.origin
    if noise.source != ASSUMPTION:
        text += f": a standard deviation of {percent_text(spread.sd)} in {OUTPUT_RATE.title}"
    if noise.at_least_assumed:
        text += ", taken as at least 3 % since it was disturbed"
    return f"{text} ({spread.degrees:.3g} degrees of freedom)"


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
