"""Compare results by reference, and keep the comparisons with a run or in a folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence, Set

from ..analysis import comparison as comparison_analysis
from ..analysis.comparability import ALLOWABLE
from ..analysis.comparison import Comparison
from ..records.calibration import Calibration
from ..records.errors import UsageError
from ..records.results import RunResult
from ..records.text import known_words
from ..reports import artifacts
from ..system import calibrations as calibrations_here
from ..tracking.load_results import load_all, load_results
from .destination import NOT_KEPT, Destination


def compare(
    a: RunResult | str | os.PathLike[str],
    b: RunResult | str | os.PathLike[str],
    *,
    noise: float = 0.01,
    allow: Set[str] = frozenset(),
    paired: bool = False,
    calibrations: Sequence[Calibration] | None = None,
    tracking_uri: str | None = None,
) -> Comparison:
    """Compare result `b` with result `a`; ratios are b ÷ a.

    Each is a result, or a reference of one result as in `load_results`. `noise`: ratio below which a significant
    difference is called noise. `allow`: kinds of differences between the results to accept (hardware, software,
    workload, scenario, schema, verdict). `paired`: both were measured in turns. `calibrations`: known noise between
    processes, by default what `llmbench calibrate` kept on this machine; () for none. Raises NotComparable if the
    results are not alike, are one measurement, or cannot be trusted; UsageError for a wrong argument; or the errors of
    `load_results`.
    """
    return comparison_analysis.compare(
        _one(a, tracking_uri),
        _one(b, tracking_uri),
        noise=noise,
        allow=frozenset(allow),
        paired=paired,
        calibrations=calibrations_here.kept() if calibrations is None else calibrations,
    )


def _one(given: RunResult | str | os.PathLike[str], tracking_uri: str | None) -> RunResult:
    """Return the one result behind an argument of `compare`. Raises UsageError if there are several."""
    if isinstance(given, RunResult):
        return given
    found = load_results(given, tracking_uri)
    if len(found) != 1:
        raise UsageError(f"{os.fspath(given)} has {len(found)} cells, and one is compared. Give the run of one cell.")
    return found[0]


def compare_all(
    references: Sequence[str],
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
