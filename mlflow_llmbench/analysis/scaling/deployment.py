"""Answer constraints across the models of a study: the largest model that keeps a limit, and the best of any model.

The rows are those of the recommendation table of EffiLLM (NB & NB, 2024, section 6.1): memory budgets, first token,
many users, cost, energy, quality. Within a limit a larger model counts as the better one, since speed across models
always prefers the smallest; rows of `any model` name that too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ...records.results import RunResult
from ..decisions.candidates import MEMORY, Candidate, Limit, Measure, bound_text, candidates
from ..decisions.dominance import Judge, gain
from ..decisions.recommend import GOALS, QUALITY_MEASURES, Recommendation, choose, missed_limits, untrusted
from .cells import parameter_count
from .choices import TPOT_MEASURE, TTFT_MEASURE
from .focus import Focus

BUDGETS_GB = (0.5, 1, 2, 4, 8, 16, 24, 80)
FIRST_TOKEN_MS = (50, 100, 200, 500, 1000, 2000, 5000, 10_000)
PER_TOKEN_MS = (50, 100, 200, 500, 1000)
"""Bounds that rows are made of. 200 ms a token is about the speed at which people read."""

MOST_ROWS = 3
"""Most rows of one kind of limit on time, those with different answers."""

ACROSS = frozenset(["workload"])
"""Kinds of differences between models: their tokenizers make other ids of one workload."""


@dataclass(frozen=True)
class Better:
    """A configuration that would have been chosen and was left out, and why: its verdict with codes, or its failure."""

    candidate: Candidate
    why: str


@dataclass(frozen=True)
class DeploymentAnswer:
    """The answer to one constraint: the recommendation among the models it names, and what was left out for no fault.

    `second`: the best of the candidates that are not the winner and not of its model, if there is another model.
    """

    constraint: str
    found: Recommendation
    second: Candidate | None = None
    better: Better | None = None


@dataclass(frozen=True)
class LengthAnswers:
    """The winner of each constraint at one prompt length, None where nothing keeps it."""

    prompt: float
    winners: tuple[Candidate | None, ...]


def deployments(
    results: Sequence[RunResult], focus: Focus, accept_suspect: str | None, judge: Judge
) -> tuple[DeploymentAnswer, ...]:
    """Answer each constraint from all results at the focus's machine, prompt length and other settings.

    Constraints that nothing keeps, or that have the answer of a row before them, are left out.
    """
    return tuple(_Answers(candidates(_at(results, focus)), accept_suspect, judge).rows())


def deployments_by_length(
    results: Sequence[RunResult],
    focus: Focus,
    answers: Sequence[DeploymentAnswer],
    accept_suspect: str | None,
    judge: Judge,
) -> tuple[LengthAnswers, ...]:
    """Answer the constraints of `answers` at each other prompt length, shortest first."""
    measured = {one.cell.prompt_tokens for one in results if one.hashes.env == focus.machine.env}
    lengths = sorted(length for length in measured if length and length != focus.prompt)
    found = []
    for length in lengths:
        own = _Answers(candidates(_at(results, focus, length)), accept_suspect, judge)
        found.append(LengthAnswers(length, tuple(own.again(one) for one in answers)))
    return tuple(one for one in found if any(one.winners))


def _at(results: Sequence[RunResult], focus: Focus, length: float | None = None) -> list[RunResult]:
    """Return the results at a prompt length, by default the one of the focus, whose settings they have.

    Pruned models are left out: the largest model that keeps a limit is taken to be the best one, and pruning makes that
    untrue.
    """
    shape, length = focus.cells[0].cell, length or focus.prompt
    return [
        one
        for one in results
        if one.hashes.env == focus.machine.env
        and one.cell.prune is None
        and (one.cell.prompt_tokens or focus.prompt) == length
        and (one.cell.output_tokens, one.cell.batching) == (shape.output_tokens, shape.batching)
    ]


def size_of(one: Candidate) -> float:
    """Number of parameters of a candidate's model, 0 if it is unknown."""
    return parameter_count(one.result) or 0.0


def models_elsewhere(results: Sequence[RunResult], focus: Focus) -> tuple[str, ...]:
    """Return the models that were measured, but not at the focus's machine, prompt length and other settings."""
    there = {one.cell.model for one in _at(results, focus)}
    return tuple(dict.fromkeys(one.cell.model for one in results if one.cell.model not in there))


class _Answers:
    """The candidates of a study and the rule of choosing among them."""

    def __init__(self, given: Sequence[Candidate], accept_suspect: str | None, judge: Judge) -> None:
        self.given, self.accept_suspect, self.judge = given, accept_suspect, judge
        self.sizes = sorted({size_of(one) for one in given}, reverse=True)

    def rows(self) -> Iterator[DeploymentAnswer]:
        yield from self._limited("memory", MEMORY, BUDGETS_GB, "memory ≤ {}", len(BUDGETS_GB))
        yield from self._limited("time to first token", TTFT_MEASURE, FIRST_TOKEN_MS, "first token ≤ {}", MOST_ROWS)
        yield from self._limited(
            "time per token", TPOT_MEASURE, PER_TOKEN_MS, "many users, each token within {}", MOST_ROWS
        )
        measure = QUALITY_MEASURES["kl"]
        if bound := self._quality_bound(measure):
            row = self._row(f"{measure.label} ≤ {bound_text(measure, bound)}", (Limit("kl", measure, bound),))
            yield from [row] if row else []
        whole = [("any model: the most tokens", "throughput"), ("any model: the soonest whole answer", "latency")]
        whole += [("any model: the lowest cost", "cost"), ("any model: the lowest energy", "energy")]
        for words, goal in whole:
            if any(one.value(GOALS[goal]) is not None for one in self.given) and (found := self._any(words, goal)):
                yield found

    def again(self, answer: DeploymentAnswer) -> Candidate | None:
        """Return the winner here of a constraint that was answered elsewhere."""
        limits = answer.found.limits
        if limits:
            row = self._row(answer.constraint, limits)
        else:
            row = self._any(answer.constraint, answer.found.goal) if self.given else None
        return row.found.winner if row else None

    def _limited(
        self, option: str, measure: Measure, bounds: Sequence[float], words: str, most: int
    ) -> Iterator[DeploymentAnswer]:
        """Yield the rows of one kind of limit: from the first bound that something keeps to the first that all keep."""
        seen: set[str] = set()
        for bound in bounds:
            limit = Limit(option, measure, bound)
            values = [value for one in self.given if (value := one.value(measure)) is not None]
            row = self._row(words.format(bound_text(measure, bound)), (limit,))
            if row and row.found.winner and row.found.winner.name not in seen and len(seen) < most:
                seen.add(row.found.winner.name)
                yield row
            if values and all(map(limit.keeps, values)):
                return

    def _row(self, words: str, limits: tuple[Limit, ...]) -> DeploymentAnswer | None:
        """Choose the largest model that keeps the limits, and its configuration with the most tokens."""
        for size in self.sizes:
            own = [one for one in self.given if size_of(one) == size]
            found = self._choose(own, "throughput", limits)
            if found.winner:
                model = found.winner.result.cell.model
                others = [one for one in self.given if size_of(one) <= size and one.result.cell.model != model]
                second = self._choose(others, "throughput", limits).winner if others else None
                larger = [one for one in self.given if size_of(one) > size]
                return DeploymentAnswer(words, found, second, self._better(found, [*larger, *own], larger))
        return None

    def _any(self, words: str, goal: str) -> DeploymentAnswer | None:
        found = self._choose(self.given, goal, ())
        if not found.winner:
            return None
        others = [one for one in self.given if one.result.cell.model != found.winner.result.cell.model]
        second = self._choose(others, goal, ()).winner if others else None
        return DeploymentAnswer(words, found, second, self._better(found, self.given, ()))

    def _choose(self, own: Sequence[Candidate], goal: str, limits: tuple[Limit, ...]) -> Recommendation:
        return choose(own, goal, limits, accept_suspect=self.accept_suspect, allow=ACROSS, judge=self.judge)

    def _better(self, found: Recommendation, given: Sequence[Candidate], larger: Sequence[Candidate]) -> Better | None:
        """Return the best of the candidates that keep the limits, look better than the winner and cannot be trusted.

        One of a `larger` model looks better whatever its speed.
        """
        assert found.winner
        winner, target = found.winner, GOALS[found.goal]
        sizes, left_out = {id(one) for one in larger}, []
        for one in given:
            if not untrusted(one, self.accept_suspect) or one.value(target) is None or missed_limits(one, found.limits):
                continue
            if id(one) in sizes or self.judge.looks_better(winner, one, target):
                left_out.append(one)
        if not left_out:
            return None
        best = max(left_out, key=lambda one: (id(one) in sizes, gain(winner, one, target)))
        why = best.result.outcome if best.result.failure else best.verdict.word
        codes = ", ".join(reason.code for reason in best.verdict.reasons)
        return Better(best, f"{why} ({codes})" if codes else why)

    def _quality_bound(self, measure: Measure) -> float | None:
        """Return a bound of a divergence that some candidates keep and some miss: the geometric middle of all."""
        values = sorted(value for one in self.given if (value := one.value(measure)) is not None and value > 0)
        if len(values) < 2 or values[0] == values[-1]:
            return None
        return float(f"{math.sqrt(values[0] * values[-1]):.2g}")
