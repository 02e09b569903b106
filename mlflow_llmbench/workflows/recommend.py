"""Recommend a configuration among stored results, and keep the recommendation with their runs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..analysis.decisions import recommend as analysis
from ..analysis.decisions.candidates import Limit
from ..analysis.decisions.recommend import Recommendation
from ..reports import artifacts
from ..system import calibrations
from ..tracking import registry
from ..tracking.load_results import load_all
from ..tracking.store import open_store


@dataclass(frozen=True)
class Recommended:
    """Result of `recommend`: the recommendation, the sweep that it belongs to, and the run that holds it.

    The sweep is the winner's, else that of the first result. `run_id` is None if the store (`store_uri`) has no run of
    the sweep.
    """

    found: Recommendation
    sweep: str
    run_id: str | None
    store_uri: str


def recommend(
    references: Sequence[str],
    goal: str = "throughput",
    limits: Sequence[Limit] = (),
    *,
    accept_suspect: str | None = None,
    allow: frozenset[str] = frozenset(),
    output: str | None = None,
    tracking_uri: str | None = None,
    on_result: Callable[[Recommendation], None] = lambda found: None,
) -> Recommended:
    """Choose the best of the results of `references` (see `load_results`) within limits (see `read_limits`).

    recommendation.json, .md and the chart are written into the folder `output`, and logged on the parent run of the
    sweep. `on_result` gets the recommendation before that. `accept_suspect` and `allow` are as in
    `analysis.decisions.recommend.recommend`. Raises UsageError, TrackingError or JournalError.
    """
    results = load_all(references, tracking_uri)
    found = analysis.recommend(
        results, goal, limits, accept_suspect=accept_suspect, allow=allow, calibrations=calibrations.kept()
    )
    on_result(found)
    sweep = (found.winner.result if found.winner else results[0]).sweep
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(output or scratch)
        artifacts.write_recommendation(found, folder)
        store = open_store(tracking_uri)
        parent = registry.parent_of_sweep(store, sweep)
        for run_id in filter(None, (parent, store.given_run_id)):
            registry.log_folder(store, run_id, folder)
    return Recommended(found, sweep, parent, store.uri)
