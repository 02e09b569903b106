"""Memory frontier of a sweep: the shapes that fit and those that do not, measured or predicted.

A cell grows in three dimensions: rows, prompt tokens, output tokens. A measured cell fits, and so does every smaller
one. A cell that was tried and failed does not fit, nor does any larger one. Shapes that exceed each other in different
dimensions are incomparable, so each boundary is a staircase: the largest that fit, the smallest that failed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..records.cell import Cell

TRIED = ("oom", "crashed", "timeout", "error")
"""Outcomes of a cell that was tried and failed: evidence."""

UNTRIED = ("refused", "skipped")
"""Outcomes of a cell not tried because it was expected to fail: a prediction. An interrupted cell is neither."""


@dataclass(frozen=True)
class Attempt:
    """One cell as evidence of what fits.

    `peak_bytes`: highest memory seen, on the device if there is one, else needed host memory; for a failed cell, the
    memory reached before the failure. `trusted`: False for a result with an invalid verdict, which proves nothing: it
    may not have held the requested tokens.
    """

    cell: Cell
    outcome: str
    peak_bytes: int | None = None
    predicted_bytes: int | None = None
    trusted: bool = True


@dataclass(frozen=True)
class Frontier:
    """Memory frontier of one model, loaded in one way.

    `load`: what was loaded, parameter → value. `fits`: the largest measured shapes, largest first. `failed`: the
    smallest that were tried and failed. `untried`: the smallest that were refused or skipped, if no smaller one failed.
    `contradicted`: cells that failed or were not tried although a cell at least as large was measured, so memory
    cannot be the reason. `prediction`: lowest and highest ratio of predicted to measured peak bytes.
    """

    load: Mapping[str, object]
    fits: tuple[Attempt, ...] = ()
    failed: tuple[Attempt, ...] = ()
    untried: tuple[Attempt, ...] = ()
    contradicted: tuple[Attempt, ...] = ()
    prediction: tuple[float, float] | None = None

    @property
    def boundary(self) -> str:
        """Source of the limit: `measured`, `predicted`, `measured and predicted`, `not reached`, or `unknown`.

        It is `unknown` without evidence.
        """
        if self.failed or self.untried:
            return " and ".join(
                word for word, found in (("measured", self.failed), ("predicted", self.untried)) if found
            )
        return "not reached" if self.fits else "unknown"


def is_within(small: Cell, large: Cell) -> bool:
    """Return True if a cell is no larger than another in any dimension: rows, prompt tokens, output tokens.

    A prompt of length `auto` (None) is as long as its workload makes it, so it compares only within one workload.
    """
    if small.prompt_tokens is None or large.prompt_tokens is None:
        prompt = small.prompt_tokens is large.prompt_tokens and small.workload == large.workload
    else:
        prompt = small.prompt_tokens <= large.prompt_tokens
    return prompt and small.batch_size <= large.batch_size and small.output_tokens <= large.output_tokens


def tokens(cell: Cell) -> int:
    """Tokens that a cell holds at its end: batch_size · (prompt_tokens + output_tokens), without unknown prompts."""
    return cell.batch_size * ((cell.prompt_tokens or 0) + cell.output_tokens)


def frontiers(attempts: Iterable[Attempt], load_parameters: Sequence[str]) -> list[Frontier]:
    """One frontier for each combination of the parameters that decide what is loaded, in the order of first cells."""
    groups: dict[tuple[object, ...], list[Attempt]] = {}
    for attempt in attempts:
        groups.setdefault(tuple(getattr(attempt.cell, name) for name in load_parameters), []).append(attempt)
    return [_frontier(dict(zip(load_parameters, key, strict=True)), group) for key, group in groups.items()]


def _frontier(load: Mapping[str, object], attempts: Sequence[Attempt]) -> Frontier:
    measured = [a for a in attempts if a.outcome == "ok" and a.trusted]
    fits = _largest(measured)
    known = [any(is_within(a.cell, fit.cell) for fit in fits) for a in attempts]
    beyond = [a for a, is_known in zip(attempts, known, strict=True) if not is_known]
    failed = _smallest([a for a in beyond if a.outcome in TRIED])
    untried = _smallest(
        [a for a in beyond if a.outcome in UNTRIED and not any(is_within(f.cell, a.cell) for f in failed)]
    )
    contradicted = tuple(
        a for a, is_known in zip(attempts, known, strict=True) if is_known and a.outcome in TRIED + UNTRIED
    )
    return Frontier(load, fits, failed, untried, contradicted, _prediction(measured))


def _size(attempt: Attempt) -> tuple[int, int, int]:
    """Sort key that puts no cell before one that it is within; of equal shapes, the higher peak is larger."""
    return tokens(attempt.cell), attempt.cell.batch_size, attempt.peak_bytes or 0


def _largest(attempts: Sequence[Attempt]) -> tuple[Attempt, ...]:
    """Attempts that are within no other, largest first; one of each shape."""
    kept: list[Attempt] = []
    for attempt in sorted(attempts, key=_size, reverse=True):
        if not any(is_within(attempt.cell, larger.cell) for larger in kept):
            kept.append(attempt)
    return tuple(kept)


def _smallest(attempts: Sequence[Attempt]) -> tuple[Attempt, ...]:
    """Attempts that no other is within, smallest first; one of each shape."""
    kept: list[Attempt] = []
    for attempt in sorted(attempts, key=_size):
        if not any(is_within(smaller.cell, attempt.cell) for smaller in kept):
            kept.append(attempt)
    return tuple(kept)


def _prediction(measured: Sequence[Attempt]) -> tuple[float, float] | None:
    ratios = [a.predicted_bytes / a.peak_bytes for a in measured if a.predicted_bytes and a.peak_bytes]
    return (min(ratios), max(ratios)) if ratios else None
