"""Compare stored results by reference, and keep the comparisons with a run or in a folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..analysis import comparison as comparison_analysis
from ..analysis.comparison import ALLOWABLE, Comparison
from ..records.errors import UsageError
from ..reports import artifacts
from ..tracking.load_results import load_all
from .destination import NOT_KEPT, Destination


def compare(
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
        raise UsageError(f"Unknown difference to allow: {unknown[0]}. Known: {', '.join(ALLOWABLE)}.")
    first, *others = load_all(references, tracking_uri)
    if not others:
        raise UsageError(
            "A comparison needs two results, and there is one. Give another run, or the folder of a sweep."
        )
    comparisons = [
        comparison_analysis.compare(first, other, noise=noise, allow=allow, paired=paired) for other in others
    ]
    on_result(comparisons)
    destination.keep(lambda folder: artifacts.write_comparisons(comparisons, folder), "comparison", tracking_uri)
    return comparisons
