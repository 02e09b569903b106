"""Judge models against each other at equal memory: a smaller model unquantized, or a larger one in fewer bits?

Two results are rivals if they are of different models, or of one model that was pruned differently, and each is the
nearest to the other in peak memory, within `ALIKE`. Their quality is compared by bits per byte of the same text, which
does not depend on the tokenizer, or else by the score of a task that both were given.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ...records.metrics import BITS_PER_BYTE
from ...records.results import Quality, TaskScore
from ..quality import SHARES, Estimate, bits_per_byte, bits_per_byte_difference, task_estimate
from ..scaling.cells import parameter_count
from .candidates import MEMORY, Candidate

ALIKE = 1.15
"""Largest ratio of the peak memories of rivals."""


@dataclass(frozen=True)
class Rivals:
    """Two results at about equal memory; `smaller` has fewer parameters.

    `measure`: what quality is compared by; `lower`: less of it is better · `values`: of the smaller and the larger ·
    `difference`: smaller − larger, with its 95 % interval.
    """

    smaller: Candidate
    larger: Candidate
    measure: str
    values: tuple[Estimate, Estimate]
    difference: Estimate
    lower: bool

    @property
    def better(self) -> Candidate | None:
        """The better one. None if it cannot be told, since the interval has 0 in it or is unknown."""
        low, high = self.difference.low, self.difference.high
        if low is None or high is None or low <= 0 <= high:
            return None
        return self.smaller if (self.difference.value < 0) == self.lower else self.larger

    @property
    def memory_gb(self) -> float:
        """Geometric mean of their peak memories, GB."""
        return math.sqrt(_memory(self.smaller) * _memory(self.larger))


def rivals(given: Sequence[Candidate]) -> tuple[Rivals, ...]:
    """Return the rivals among results whose quality can be compared, least memory first.

    They are of one machine and software and of one shape: those of which most results have a quality. Suspect results
    take part, since neither memory nor quality is a time; failed and invalid ones do not.
    """
    known = [
        one for one in _newest(given) if one.verdict.word != "invalid" and MEMORY.key(one.metrics) and _scored(one)
    ]
    if not known:
        return ()
    shapes = Counter(map(_shape, known))
    chosen = max(shapes, key=shapes.__getitem__)
    alike = [one for one in known if _shape(one) == chosen]
    return tuple(sorted(filter(None, map(_judged, *_paired(alike))), key=lambda pair: pair.memory_gb))


def _scored(one: Candidate) -> bool:
    quality = one.result.quality
    return quality is not None and bool((quality.scores and quality.scores.token_bytes) or quality.tasks)


def _newest(given: Sequence[Candidate]) -> list[Candidate]:
    """Return the newest result of each configuration."""
    found: dict[tuple[str, str], Candidate] = {}
    for one in sorted(given, key=lambda one: one.result.ended_ms):
        found[one.result.hashes.config, one.result.hashes.env] = one
    return list(found.values())


def _shape(one: Candidate) -> tuple[object, ...]:
    cell = one.result.cell
    return (
        one.result.hashes.env, MEMORY.key(one.metrics), cell.batch_size, cell.prompt_tokens, cell.output_tokens,
        cell.batching, cell.concurrency,
    )  # fmt: skip


def _form(one: Candidate) -> tuple[str, str | None]:
    return one.result.cell.model, one.result.cell.prune


def _memory(one: Candidate) -> float:
    return one.value(MEMORY) or 0.0


def _apart(one: Candidate, other: Candidate) -> float:
    return abs(math.log(_memory(one) / _memory(other)))


def _paired(given: Sequence[Candidate]) -> tuple[list[Candidate], list[Candidate]]:
    """Return the rivals in two lists: of two forms of models, those that are nearest to each other in memory."""

    def nearest(one: Candidate, form: tuple[str, str | None]) -> Candidate:
        return min((other for other in given if _form(other) == form), key=lambda other: _apart(one, other))

    firsts, seconds = [], []
    for number, one in enumerate(given):
        for other in given[number + 1 :]:
            if _form(one) == _form(other) or _apart(one, other) > math.log(ALIKE):
                continue
            if nearest(one, _form(other)) is other and nearest(other, _form(one)) is one:
                firsts.append(one)
                seconds.append(other)
    return firsts, seconds


def _judged(one: Candidate, other: Candidate) -> Rivals | None:
    """Return two rivals with their quality compared; None if they have none in common."""
    smaller, larger = sorted((one, other), key=lambda own: parameter_count(own.result) or 0.0)
    first, second = smaller.result.quality, larger.result.quality
    if first is None or second is None:
        return None
    difference = bits_per_byte_difference(first, second)
    values = bits_per_byte(first), bits_per_byte(second)
    if difference and values[0] and values[1]:
        return Rivals(smaller, larger, BITS_PER_BYTE.title, (values[0], values[1]), difference, lower=True)
    for own, its in _common_tasks(first, second):
        ends = task_estimate(own), task_estimate(its)
        name = f"{own.metric.partition(',')[0]} of {own.task}"
        return Rivals(smaller, larger, name, ends, _score_difference(own, its), lower=False)
    return None


def _common_tasks(first: Quality, second: Quality) -> Iterator[tuple[TaskScore, TaskScore]]:
    """Yield the scores of tasks that both were given in the same way, those that are shares."""
    if first.tasks_digest != second.tasks_digest:
        return
    theirs = {(score.task, score.metric): score for score in second.tasks}
    for own in first.tasks:
        if not own.part and own.metric.startswith(SHARES) and (its := theirs.get((own.task, own.metric))):
            yield own, its


def _score_difference(own: TaskScore, its: TaskScore) -> Estimate:
    """Return the difference of two scores; its standard error is that of independent samples, which is too large here.

    The documents are the same, but which of them each answered is not kept, so nothing can be paired.
    """
    value = own.value - its.value
    if not own.stderr or not its.stderr:
        return Estimate(value)
    half = 1.96 * math.hypot(own.stderr, its.stderr)
    return Estimate(value, value - half, value + half)
