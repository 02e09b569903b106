"""Recommend a configuration from results and limits, with the Pareto front and reasons against the others.

Only results that can be trusted and compared take part: outcome `ok`, one hardware, software and workload by the guard
of `compare`; suspect ones if accepted, invalid ones never. Limits are checked against the measured value; if the 95 %
interval reaches across a limit, a caution says so.

The front holds every result that nothing dominates. B dominates A if B is worse in no metric by more than the noise
threshold and better in some metric beyond chance: p below 0.05 after Holm in `compare`, and by more than the threshold.
A metric that a run has only once (memory, quality) counts as better beyond the threshold alone. A high percentile never
does: it is one number of many repetitions, which no test uses. Differences that chance could explain stay on the front.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...records.cell import differing
from ...records.errors import UsageError
from ...records.metric import Goal, QualityBound
from ...records.metrics import COST, ENERGY, KEYS, PEAK_MEMORY, TPOT, TTFT, shown_in
from ...records.results import Repetition, RunResult, Verdict
from ...stats import t_interval, welch
from ..comparison import (
    BETTER,
    RATE,
    SIGNIFICANCE,
    UNNAMED,
    UNTESTED,
    compare,
    differences,
    parameter_text,
    sentence,
)
from ..repetitions import PER_REPETITION, mean_ttft, typical_tpot, unit_values
from ..summary import hardware_name, summarize
from ..verdict import judge

PER_UNIT = {**PER_REPETITION, TTFT.key("mean"): mean_ttft, TPOT.key("p50"): typical_tpot}
"""Metric → its value for one repetition: compared metrics, and others that a limit can name; no high percentiles."""

ALLOWABLE = ("hardware", "software", "workload", "scenario")
"""Kinds of differences among the results that can be accepted."""


@dataclass(frozen=True)
class Measure:
    """Metric to judge a configuration by: its name in sentences, its keys (the first that a result has counts)."""

    label: str
    keys: tuple[str, ...]
    better: str  # "lower" or "higher"
    absent: str = "Measure again."  # what to do where no result has it

    def key(self, metrics: Mapping[str, float]) -> str | None:
        """The key that counts for a result with these metrics; None if it has none."""
        return next((key for key in self.keys if key in metrics), None)


GOALS = {
    entry.name: Measure(entry.words, (entry.key,), entry.metric.better, entry.place.advice) for entry in shown_in(Goal)
}
QUALITY_MEASURES = {
    entry.name: Measure(entry.words, (entry.key,), entry.metric.better, entry.place.advice)
    for entry in shown_in(QualityBound)
}
MEMORY = Measure("peak memory", PEAK_MEMORY, "lower")

ONCE = ("memory", "quality")
"""Sections of metrics that a run has only once."""


@dataclass(frozen=True)
class Limit:
    """Limit for a configuration: `option` as given, and the bound in the metric's unit (bytes, ms, ratio)."""

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


@dataclass(frozen=True)
class Refused:
    """A candidate that cannot be chosen: why, and the limits it misses, if that is the reason."""

    candidate: Candidate
    why: str
    missed: tuple[Limit, ...] = ()


@dataclass(frozen=True)
class RunnerUp:
    """A candidate within all limits that is not the winner; `why`: how it differs. `tied`: not measurably worse."""

    candidate: Candidate
    why: str
    tied: bool


@dataclass(frozen=True)
class Recommendation:
    """The recommendation. `winner` is None if no candidate keeps the limits.

    `front` and `eligible` include configurations beyond the limits.
    """

    goal: str
    limits: tuple[Limit, ...]
    winner: Candidate | None
    runners_up: tuple[RunnerUp, ...]
    eligible: tuple[Candidate, ...]
    front: tuple[Candidate, ...]
    objectives: tuple[Measure, ...]
    refused: tuple[Refused, ...]
    cautions: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    accepted_suspect: str | None = None


def recommend(
    results: Sequence[RunResult],
    goal: str = "throughput",
    limits: Sequence[Limit] = (),
    *,
    accept_suspect: str | None = None,
    allow: frozenset[str] = frozenset(),
    noise: float = 0.01,
) -> Recommendation:
    """Choose among results.

    `accept_suspect` is the reason for which suspect results take part; `allow` are kinds of `ALLOWABLE`; `noise` is a
    ratio. Raises UsageError for an unknown goal or kind of difference, or without results.
    """
    if goal not in GOALS:
        raise UsageError(f"Unknown goal: {goal}. Known: {', '.join(GOALS)}.")
    if unknown := sorted(allow - set(ALLOWABLE)):
        raise UsageError(f"Unknown difference to allow: {unknown[0]}. Known: {', '.join(ALLOWABLE)}.")
    if not results:
        raise UsageError("There is no result to choose from. Give the folder or the run of a sweep.")
    return choose(candidates(results), goal, limits, accept_suspect=accept_suspect, allow=allow, noise=noise)


def candidates(results: Sequence[RunResult]) -> list[Candidate]:
    """Results with their metrics and verdicts, named by the parameters that vary among them."""
    names = names_of(results)
    found = []
    for name, result in zip(names, results, strict=True):
        metrics = summarize(result)
        found.append(Candidate(name, result, metrics, judge(result, metrics)))
    return found


def choose(
    given: Sequence[Candidate],
    goal: str,
    limits: Sequence[Limit] = (),
    *,
    accept_suspect: str | None = None,
    allow: frozenset[str] = frozenset(),
    noise: float = 0.01,
) -> Recommendation:
    """Choose like `recommend`, from candidates with their metrics."""
    target = GOALS[goal]
    refused = [refusal for one in given if (refusal := _untrusted(one, accept_suspect))]
    trusted = _without(given, refused)
    refused += _unlike(trusted, allow)
    refused += _measured_again(_without(trusted, refused))
    refused += [_lacking(one, target) for one in _without(trusted, refused) if one.value(target) is None]
    eligible = sorted(_without(trusted, refused), key=lambda one: _order(one, target))
    beyond = [refusal for one in eligible if (refusal := _missed_limits(one, limits))]
    fitting = _without(eligible, beyond)
    winner = fitting[0] if fitting else None
    objectives = _objectives(eligible, target, limits)
    front = tuple(
        one
        for one in eligible
        if not any(dominates(other, one, objectives, noise) for other in eligible if other is not one)
    )
    suspects = [
        r.candidate
        for r in refused
        if r.candidate.verdict.word == "suspect"
        and not (eligible and _disallowed_differences(eligible[0], r.candidate, allow))
    ]
    suspects = _without(suspects, _measured_again([*eligible, *suspects]))
    return Recommendation(
        goal,
        tuple(limits),
        winner,
        tuple(_runner_up(winner, one, target, noise) for one in fitting[1:]) if winner else (),
        tuple(eligible),
        front,
        objectives,
        (*beyond, *refused),
        cautions=tuple(_cautions(winner, limits)) if winner else (),
        changes=tuple(_changes(winner, beyond, suspects, target, limits, noise)),
        accepted_suspect=accept_suspect if winner and winner.verdict.word == "suspect" else None,
    )


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


def _without(given: Sequence[Candidate], refused: Sequence[Refused]) -> list[Candidate]:
    out = {id(refusal.candidate) for refusal in refused}
    return [one for one in given if id(one) not in out]


def _order(one: Candidate, target: Measure) -> float:
    value = one.value(target) or 0.0
    return value if target.better == "lower" else -value


def _untrusted(one: Candidate, accept_suspect: str | None) -> Refused | None:
    """The refusal of a failed or invalid cell, or of a suspect one unless accepted."""
    failure, verdict = one.result.failure, one.verdict
    if failure:
        return Refused(one, f"It ended with {one.result.outcome} at stage {failure.stage}: {failure.message}")
    if verdict.word == "valid" or (verdict.word == "suspect" and accept_suspect):
        return None
    codes = ", ".join(reason.code for reason in verdict.reasons)
    advice = (
        ' Measure it again, or accept it with --accept-suspect "REASON".'
        if verdict.word == "suspect"
        else " Its numbers are not used."
    )
    return Refused(one, f"Its verdict is {verdict.word} ({codes}).{advice}")


def _unlike(given: Sequence[Candidate], allow: frozenset[str]) -> list[Refused]:
    """Refuse what cannot be compared with the largest group of alike results; of equal groups the first counts."""
    groups: list[list[Candidate]] = []
    for one in given:
        home = next((group for group in groups if not _disallowed_differences(group[0], one, allow)), None)
        if home is None:
            groups.append([one])
        else:
            home.append(one)
    if len(groups) < 2:
        return []
    kept = max(groups, key=len)
    found = []
    for one in (one for group in groups if group is not kept for one in group):
        gap = _disallowed_differences(kept[0], one, allow)
        kinds = ",".join(dict.fromkeys(difference.kind for difference in gap))
        listed = ", ".join(map(str, gap))
        found.append(
            Refused(
                one,
                f"It cannot be compared with the {len(kept)} that are alike: {listed}. Choose among these alone, or "
                f"add --allow {kinds}.",
            )
        )
    return found


def _disallowed_differences(a: Candidate, b: Candidate, allow: frozenset[str]) -> list[Any]:
    return [difference for difference in differences(a.result, b.result) if difference.kind not in allow]


def _measured_again(given: Sequence[Candidate]) -> list[Refused]:
    """Refuse all but the newest result of a configuration that was measured several times on one hardware."""
    newest: dict[tuple[str, str], Candidate] = {}
    for one in given:
        known = newest.setdefault(_measured_as(one), one)
        if one.result.ended_ms > known.result.ended_ms:
            newest[_measured_as(one)] = one
    return [
        Refused(one, "It was measured again later, and the newest counts.")
        for one in given
        if newest[_measured_as(one)] is not one
    ]


def _measured_as(one: Candidate) -> tuple[str, str]:
    return one.result.hashes.config, one.result.hashes.hardware


def _lacking(one: Candidate, measure: Measure) -> Refused:
    return Refused(one, f"It has no {measure.keys[-1]}. {measure.absent}")


def _missed_limits(one: Candidate, limits: Sequence[Limit]) -> Refused | None:
    """The refusal of a candidate that misses limits, all of them named; a missing value misses its limit too."""
    missed = [limit for limit in limits if (value := one.value(limit.measure)) is None or not limit.keeps(value)]
    if not missed:
        return None
    return Refused(one, " ".join(_missed(one, limit) for limit in missed), tuple(missed))


def _missed(one: Candidate, limit: Limit) -> str:
    value, measure = one.value(limit.measure), limit.measure
    if value is None:
        return f"It has no {measure.keys[-1]}, so {limit} cannot be checked. {measure.absent}"
    return (
        f"Its {measure.label} is {figure(measure.keys[-1], value)}, and {limit.option} is "
        f"{bound_text(measure, limit.bound)}."
    )


def figure(key: str, value: float) -> str:
    """Format a value with its unit (GB, ms, tokens/s, J) and three significant digits."""
    unit = KEYS[key].unit if key in KEYS else ""
    if unit == "bytes":
        return f"{_digits(value / 1e9)} GB"
    words = {"ms": " ms", "1/s": " tokens/s", "J": " J"}
    return f"{_digits(value)}{words.get(unit, '')}"


def bound_text(measure: Measure, bound: float) -> str:
    """Format a bound as a person gives it: `6 GB`, `200 ms`, `0.05`."""
    unit = KEYS[measure.keys[-1]].unit if measure.keys[-1] in KEYS else ""
    return f"{bound / 1e9:.6g} GB" if unit == "bytes" else f"{bound:.6g}{' ms' if unit == 'ms' else ''}"


def _digits(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value:.{min(8, max(0, 2 - math.floor(math.log10(abs(value)))))}f}"


def values(one: Candidate, key: str) -> list[float] | None:
    """Values of a metric per unit (process or repetition); None if a run has it only once, or a unit lacks it."""
    of: Callable[[Repetition], float | None] | None = PER_UNIT.get(key)
    if key == COST.key():
        of = _cost(one.result.price_per_hour)
    elif key == ENERGY.key():
        of = _joules(one.result.idle_w)
    if of is None:
        return None
    return unit_values(one.result, of)


def _cost(price_per_hour: float | None) -> Callable[[Repetition], float | None]:
    rate_of = PER_UNIT[RATE]

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
    """95 % interval of the mean over units, always including the reported value; None if a run has it only once."""
    key = measure.key(one.metrics)
    found = values(one, key) if key else None
    ends = t_interval(found) if found else None
    if key is None or ends is None:
        return None
    return min(max(ends[0], 0.0), one.metrics[key]), max(ends[1], one.metrics[key])


def _objectives(eligible: Sequence[Candidate], target: Measure, limits: Sequence[Limit]) -> tuple[Measure, ...]:
    """Metrics that the front weighs: the goal, those of limits, and memory, if every candidate has them."""
    wanted = dict.fromkeys([target, *(limit.measure for limit in limits), MEMORY])
    return tuple(
        measure for measure in wanted if measure is target or all(one.value(measure) is not None for one in eligible)
    )


def dominates(b: Candidate, a: Candidate, objectives: Sequence[Measure], noise: float) -> bool:
    """Return True if b is in no metric worse than a by more than the noise threshold, and in some surely better."""
    gains = [_gain(a, b, measure) for measure in objectives]
    if any(gain < -math.log1p(noise) for gain in gains) or not any(gain > math.log1p(noise) for gain in gains):
        return False
    return any(_surely_better(a, b, measure, noise) for measure in objectives)


def _gain(a: Candidate, b: Candidate, measure: Measure) -> float:
    """Logarithm of the ratio by which b is better than a; −∞ if incomparable, e.g. device memory with host memory."""
    key_a, key_b = measure.key(a.metrics), measure.key(b.metrics)
    if key_a is None or key_a != key_b:
        return -math.inf
    first, second = a.metrics[key_a], b.metrics[key_a]
    if first == second:
        return 0.0
    sign = 1 if measure.better == "higher" else -1
    if first <= 0 or second <= 0:
        return math.copysign(math.inf, (second - first) * sign)
    return sign * math.log(second / first)


def _surely_better(a: Candidate, b: Candidate, measure: Measure, noise: float) -> bool:
    """Return True if b is better than a by more than chance and the noise threshold would explain."""
    key = measure.key(a.metrics)
    if key is None or _gain(a, b, measure) <= math.log1p(noise):
        return False
    effect = compare(a.result, b.result, noise=noise, allow=frozenset([*ALLOWABLE, "schema"])).effect(key)
    if effect is not None and effect.effect != UNTESTED:
        return effect.effect == BETTER
    if KEYS[key].section in ONCE:
        return True
    first, second = values(a, key), values(b, key)
    if first is None or second is None or min(*first, *second) <= 0:
        return False
    test = welch([math.log(value) for value in first], [math.log(value) for value in second])
    return test is not None and test.p_value < SIGNIFICANCE


def _runner_up(winner: Candidate, one: Candidate, target: Measure, noise: float) -> RunnerUp:
    """Describe how a candidate within all limits differs from the winner."""
    tied = not _surely_better(one, winner, target, noise)
    comparison = compare(winner.result, one.result, noise=noise, allow=frozenset([*ALLOWABLE, "schema"]))
    told = sentence(dataclasses.replace(comparison, name_a=winner.name, name_b="It", labels=(), doubts=()))
    return RunnerUp(one, told if target is GOALS["throughput"] else f"{_versus(winner, one, target)} {told}", tied)


def _versus(winner: Candidate, one: Candidate, target: Measure) -> str:
    mine, its = one.value(target) or 0.0, winner.value(target) or 0.0
    return (
        f"Its {target.label} is {figure(target.keys[-1], mine)}, that of {winner.name} {figure(target.keys[-1], its)}."
    )


def _cautions(winner: Candidate, limits: Sequence[Limit]) -> Iterator[str]:
    """Cautions for limits that the winner keeps by its measured value, but not with its whole interval."""
    for limit in limits:
        ends, key = interval(winner, limit.measure), limit.measure.keys[-1]
        if ends and not all(map(limit.keeps, ends)):
            shown = " to ".join(figure(key, end) for end in ends)
            yield (
                f"{winner.name} keeps {limit} by its measured value only: the 95 % interval of its "
                f"{limit.measure.label} is {shown}. Measure more repetitions, or leave more room."
            )


def _changes(
    winner: Candidate | None,
    beyond: Sequence[Refused],
    suspects: Sequence[Candidate],
    target: Measure,
    limits: Sequence[Limit],
    noise: float,
) -> Iterator[str]:
    """Changes that would alter the answer: per limit the best candidate that misses only it, and a better suspect."""

    def wins(one: Candidate) -> bool:
        return winner is None or _surely_better(winner, one, target, noise)

    told = False
    for limit in limits:
        alone = [r.candidate for r in beyond if r.missed == (limit,) and r.candidate.value(limit.measure) is not None]
        best = min(alone, key=lambda one: _order(one, target), default=None)
        if best is not None and wins(best):
            told = True
            yield (
                f"With {limit.option} {_loosened(limit, best)}, {best.name} would win: "
                f"{_figures(best, winner, target)}."
            )
    if winner is None and not told and beyond:
        nearest = min(beyond, key=lambda refusal: (len(refusal.missed), _order(refusal.candidate, target)))
        yield f"{nearest.candidate.name} is the nearest. {nearest.why}"
    keeping = [one for one in suspects if one.value(target) is not None and not _missed_limits(one, limits)]
    best = min(keeping, key=lambda one: _order(one, target), default=None)
    if best is not None and (winner is None or _gain(winner, best, target) > math.log1p(noise)):
        yield (
            f"{best.name} looks better and is suspect: {_figures(best, winner, target)}. If it is measured again and "
            "valid, it would win."
        )


def _figures(best: Candidate, winner: Candidate | None, target: Measure) -> str:
    key = target.keys[-1]
    mine = figure(key, best.value(target) or 0.0)
    return f"{target.label} {mine}" + (f" instead of {figure(key, winner.value(target) or 0.0)}" if winner else "")


def _loosened(limit: Limit, one: Candidate) -> str:
    """The limit that would let a candidate pass, rounded to the side on which it does."""
    value = one.value(limit.measure) or 0.0
    step = 10.0 ** (math.floor(math.log10(value)) - 1) if value > 0 else 1.0
    steps = value / step
    rounded = (math.ceil(steps - 1e-9) if limit.measure.better == "lower" else math.floor(steps + 1e-9)) * step
    return bound_text(limit.measure, rounded)


def recommendation_json(found: Recommendation) -> dict[str, Any]:
    """The recommendation as plain JSON data; `llmbench register` reads `winner`."""
    names = {id(one) for one in found.front}
    return {
        "schema": 1,
        "goal": found.goal,
        "limits": [
            {"option": limit.option, "metric": limit.measure.keys[-1], "bound": limit.bound} for limit in found.limits
        ],
        "winner": _entry(found.winner, found.objectives) if found.winner else None,
        "runners_up": [
            {**_entry(r.candidate, found.objectives), "why": r.why, "tied": r.tied} for r in found.runners_up
        ],
        "refused": [{"name": r.candidate.name, **_identity(r.candidate), "why": r.why} for r in found.refused],
        "front": [one.name for one in found.eligible if id(one) in names],
        "cautions": list(found.cautions),
        "what_would_change": list(found.changes),
        "accepted_suspect": found.accepted_suspect,
    }


def _identity(one: Candidate) -> dict[str, Any]:
    return {"sweep": one.result.sweep, "config_hash": one.result.hashes.config, "verdict": one.verdict.word}


def _entry(one: Candidate, objectives: Sequence[Measure]) -> dict[str, Any]:
    measured = {
        key: {"value": one.metrics[key], "interval": interval(one, m)}
        for m in objectives
        if (key := m.key(one.metrics))
    }
    return {"name": one.name, **_identity(one), "parameters": vars(one.result.cell), "measured": measured}
