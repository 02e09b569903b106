"""Compare results by reference, and keep the comparisons with a run or in a folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence, Set

from ..analysis import comparison as comparison_analysis
from ..analysis.comparability import ALLOWABLE
from ..analysis.comparison import Comparison
from ..records.calibration import Calibration
from ..records.errors import UsageError
from ..records.results import RunResult
from ..records.text import known_words, plural
from ..reports import artifacts
from ..system import calibrations as calibrations_here
from ..tracking.load_results import Given, load_all
from .destination import NOT_KEPT, Destination


def compare(
    a: Given | Sequence[RunResult],
    b: Given | Sequence[RunResult] | None = None,
    *,
    noise: float = 0.01,
    allow: Set[str] = frozenset(),
    paired: bool = False,
    calibrations: Sequence[Calibration] | None = None,
    tracking_uri: str | None = None,
) -> Comparison:
    """Compare result `b` with result `a`; ratios are b ÷ a.

    Each is a result, what `run` or `load_results` returned for one cell, or a reference of one as in `load_results`.
    Without `b`, `a` has two cells, in the order of `load_results`. `noise`: ratio below which a significant difference
    is called noise. `allow`: kinds of differences between the results to accept (hardware, software, workload,
    scenario, schema, verdict). `paired`: both were measured in turns. `calibrations`: known noise between processes, by
    default what `llmbench calibrate` kept on this machine; () for none. Raises NotComparable if the results are not
    alike, are one measurement, or cannot be trusted; UsageError for a wrong argument; or the errors of `load_results`.
    """
    if b is None:
        first, second = _cells(a, 2, tracking_uri)
    else:
        [first], [second] = _cells(a, 1, tracking_uri), _cells(b, 1, tracking_uri)
    return comparison_analysis.compare(
        first,
        second,
        noise=noise,
        allow=frozenset(allow),
        paired=paired,
        calibrations=calibrations_here.kept() if calibrations is None else calibrations,
    )


def _cells(given: Given | Sequence[RunResult], count: int, tracking_uri: str | None) -> list[RunResult]:
    """Return the results behind an argument of `compare`. Raises UsageError if there are not `count`."""
    found = load_all(given, tracking_uri)
    if len(found) != count:
        name = os.fspath(given) if isinstance(given, str | os.PathLike) else f"A {type(given).__name__}"
        takes = "one is compared" if count == 1 else "two are compared if one argument is given"
        raise UsageError(
            f"{name} has {plural(len(found), 'cell')}, and {takes}. Give two results, such as the run ids of two "
            "cells, or two items of load_results(...)."
        )
    return found


def compare_all(
    references: Given | Iterable[Given],
    *,
    noise: float = 0.01,
    allow: frozenset[str] = frozenset(),
    paired: bool = False,
    destination: Destination = NOT_KEPT,
    tracking_uri: str | None = None,
    on_result: Callable[[Sequence[Comparison]], None] = lambda comparisons: None,
) -> list[Comparison]:
    """Compare all other results with the first. `references` are as in `load_results`; a sweep gives all its cells.

    `allow` are kinds of `ALLOWABLE`, `noise` is a ratio, `paired` compares value by value. `on_result` gets the
    comparisons before they are written and logged. Raises UsageError, NotComparable, or the errors of `load_results`.
    """
    if unknown := sorted(allow - set(ALLOWABLE)):
        raise UsageError(f"Unknown difference to allow: {unknown[0]}. {known_words(unknown[0], ALLOWABLE)}")
    first, *others = load_all(references, tracking_uri)
    if not others:
        raise UsageError(
            "A comparison needs two results, and there is one. Give another run, or the folder of a sweep."
        )
    known = calibrations_here.kept()
    comparisons = [
        comparison_analysis.compare(first, other, noise=noise, allow=allow, paired=paired, calibrations=known)
        for other in others
    ]
    on_result(comparisons)
    destination.keep(lambda folder: artifacts.write_comparisons(comparisons, folder), "comparison", tracking_uri)
    return comparisons
