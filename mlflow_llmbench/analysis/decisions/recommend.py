"""Recommend a configuration from results and limits, with the Pareto front and reasons against the others.

Only results that can be trusted and compared take part: outcome `ok`, one hardware, software and workload by the guard
of `compare`; suspect ones if accepted, invalid ones never. Limits are checked against the measured value; if the 95 %
interval reaches across a limit, a caution says so.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ...records.calibration import Calibration
from ...records.errors import UsageError
from ...records.metric import Goal, QualityBound
from ...records.metrics import shown_in
from ...records.results import RunResult
from ...records.text import known_words
from ..comparability import differences, same_evidence
from ..comparison import sentence
from .candidates import MEMORY, Candidate, Limit, Measure, bound_text, candidates, figure, interval
from .dominance import ALLOWABLE, DEFAULT_JUDGE, Judge
from .equal_memory import Rivals, rivals

GOALS = {entry.name: Measure.of(entry) for entry in shown_in(Goal)}
"""Name of a goal → its measure."""

QUALITY_MEASURES = {entry.name: Measure.of(entry) for entry in shown_in(QualityBound)}
"""Name of a quality that can be limited → its measure."""


@dataclass(frozen=True)
class Refused:
    """A candidate that cannot be chosen: why, and the limits it misses, if that is the reason."""

    candidate: Candidate
    why: str
    missed: tuple[Limit, ...] = ()


@dataclass(frozen=True)
class RunnerUp:
    """A candidate within all limits that is not the winner. How it compares is computed where it is asked for."""

    candidate: Candidate
    winner: Candidate
    target: Measure
    judge: Judge

    @cached_property
    def tied(self) -> bool:
        """True if it is not measurably worse than the winner."""
        return not self.judge.surely_better(self.candidate, self.winner, self.target)

    @cached_property
    def why(self) -> str:
        """Description of how it differs from the winner."""
        comparison = self.judge.compare(self.winner, self.candidate)
        text = sentence(dataclasses.replace(comparison, name_a=self.winner.name, name_b="It", labels=(), doubts=()))
        if self.target is GOALS["throughput"]:
            return text
        key = self.target.keys[-1]
        own, best = (figure(key, one.value(self.target) or 0.0) for one in (self.candidate, self.winner))
        return f"Its {self.target.label} is {own}, that of {self.winner.name} {best}. {text}"


@dataclass(frozen=True)
class Recommendation:
    """The recommendation. `winner` is None if no candidate keeps the limits.

    `equal_memory`: different models at about equal memory, with their quality compared. `front` and `eligible` include
    configurations beyond the limits.
    """

    goal: str
    limits: tuple[Limit, ...]
    winner: Candidate | None
    runners_up: tuple[RunnerUp, ...]
    eligible: tuple[Candidate, ...]
    objectives: tuple[Measure, ...]
    refused: tuple[Refused, ...]
    judge: Judge
    cautions: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    accepted_suspect: str | None = None
    equal_memory: tuple[Rivals, ...] = ()

    @cached_property
    def front(self) -> tuple[Candidate, ...]:
        """The candidates that no other dominates. Computed where it is asked for, since it compares all with all."""
        return tuple(
            one
            for one in self.eligible
            if not any(self.judge.dominates(other, one, self.objectives) for other in self.eligible if other is not one)
        )


def recommend(
    results: Sequence[RunResult],
    goal: str = "throughput",
    limits: Sequence[Limit] = (),
    *,
    accept_suspect: str | None = None,
    allow: frozenset[str] = frozenset(),
    noise: float = 0.01,
    calibrations: Sequence[Calibration] = (),
) -> Recommendation:
    """Choose among results.

    `accept_suspect` is the reason for which suspect results take part; `allow` are kinds of `ALLOWABLE`; `noise` is a
    ratio; `calibrations` are as in `compare`. Raises UsageError for an unknown goal or kind of difference, or without
    results.
    """
    if goal not in GOALS:
        raise UsageError(f"Unknown goal: {goal}. {known_words(goal, GOALS)}")
    if unknown := sorted(allow - set(ALLOWABLE)):
        raise UsageError(f"Unknown difference to allow: {unknown[0]}. {known_words(unknown[0], ALLOWABLE)}")
    if not results:
        raise UsageError("There is no result to choose from. Give the folder or the run of a sweep.")
    judged = Judge(noise, tuple(calibrations))
    given = candidates(results)
    found = choose(given, goal, limits, accept_suspect=accept_suspect, allow=allow, judge=judged)
    return dataclasses.replace(found, equal_memory=rivals(given))


def choose(
    given: Sequence[Candidate],
    goal: str,
    limits: Sequence[Limit] = (),
    *,
    accept_suspect: str | None = None,
    allow: frozenset[str] = frozenset(),
    judge: Judge = DEFAULT_JUDGE,
) -> Recommendation:
    """Choose like `recommend`, from candidates with their metrics."""
    target = GOALS[goal]
    refused = [refusal for one in given if (refusal := untrusted(one, accept_suspect))]
    trusted = _without(given, refused)
    refused += _unlike(trusted, allow)
    refused += _measured_again(_without(trusted, refused))
    refused += [_lacking(one, target) for one in _without(trusted, refused) if one.value(target) is None]
    eligible = sorted(_without(trusted, refused), key=lambda one: _order(one, target))
    beyond = [refusal for one in eligible if (refusal := missed_limits(one, limits))]
    fitting = _without(eligible, beyond)
    winner = fitting[0] if fitting else None
    objectives = _objectives(eligible, target, limits)
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
        tuple(RunnerUp(one, winner, target, judge) for one in fitting[1:]) if winner else (),
        tuple(eligible),
        objectives,
        (*beyond, *refused),
        judge,
        cautions=tuple(_cautions(winner, limits)) if winner else (),
        changes=tuple(_changes(winner, beyond, suspects, target, limits, judge)),
        accepted_suspect=accept_suspect if winner and winner.verdict.word == "suspect" else None,
    )


def _without(given: Sequence[Candidate], refused: Sequence[Refused]) -> list[Candidate]:
    out = {id(refusal.candidate) for refusal in refused}
    return [one for one in given if id(one) not in out]


def _order(one: Candidate, target: Measure) -> float:
    value = one.value(target) or 0.0
    return value if target.better == "lower" else -value


def untrusted(one: Candidate, accept_suspect: str | None) -> Refused | None:
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
        Refused(
            one,
            "It is the same evidence as a result that takes part: one measurement, given twice."
            if same_evidence(newest[_measured_as(one)].result, one.result)
            else "It was measured again later, and the newest counts.",
        )
        for one in given
        if newest[_measured_as(one)] is not one
    ]


def _measured_as(one: Candidate) -> tuple[str, str]:
    return one.result.hashes.config, one.result.hashes.hardware


def _lacking(one: Candidate, measure: Measure) -> Refused:
    return Refused(one, f"It has no {measure.keys[-1]}. {measure.absent}")


def missed_limits(one: Candidate, limits: Sequence[Limit]) -> Refused | None:
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


def _objectives(eligible: Sequence[Candidate], target: Measure, limits: Sequence[Limit]) -> tuple[Measure, ...]:
    """Metrics that the front weighs: the goal, those of limits, and memory, if every candidate has them."""
    wanted = dict.fromkeys([target, *(limit.measure for limit in limits), MEMORY])
    return tuple(
        measure for measure in wanted if measure is target or all(one.value(measure) is not None for one in eligible)
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
    judge: Judge,
) -> Iterator[str]:
    """Changes that would alter the answer: per limit the best candidate that misses only it, and a better suspect."""

    def wins(one: Candidate) -> bool:
        return winner is None or judge.surely_better(winner, one, target)

    named = False
    for limit in limits:
        alone = [r.candidate for r in beyond if r.missed == (limit,) and r.candidate.value(limit.measure) is not None]
        best = min(alone, key=lambda one: _order(one, target), default=None)
        if best is not None and wins(best):
            named = True
            yield (
                f"With {limit.option} {_loosened(limit, best)}, {best.name} would win: "
                f"{_figures(best, winner, target)}."
            )
    if winner is None and not named and beyond:
        nearest = min(beyond, key=lambda refusal: (len(refusal.missed), _order(refusal.candidate, target)))
        yield f"{nearest.candidate.name} is the nearest. {nearest.why}"
    keeping = [one for one in suspects if one.value(target) is not None and not missed_limits(one, limits)]
    best = min(keeping, key=lambda one: _order(one, target), default=None)
    if best is not None and (winner is None or judge.looks_better(winner, best, target)):
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
