"""Recommend a configuration among stored results, and keep the recommendation with their runs."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..analysis.decisions import recommend as analysis
from ..analysis.decisions.candidates import Limit
from ..analysis.decisions.deployment import Evidence, refusal_to_register
from ..analysis.decisions.recommend import Recommendation
from ..records.invocation import command_text
from ..reports import artifacts, html
from ..reports.recommendation import answer, recommendation_cells
from ..reports.tables import Table
from ..system import calibrations
from ..tracking import registry
from ..tracking.load_results import Given, load_all
from ..tracking.store import Store, address_of, open_store_if_any

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class Recommended:
    """Result of `recommend`: the recommendation, the sweep that it belongs to, and the run that holds it.

    The sweep is the winner's, else that of the first result. `run_id` is None if the store (`store_uri`) has no run of
    the sweep, or does not exist. `given_uri` is the store's address as the caller gave it. `refusal`: why the winner
    cannot be registered, None if it can be or there is none. `kept`: there is no winner, and the run keeps an earlier
    recommendation that has one.
    """

    found: Recommendation
    sweep: str
    run_id: str | None
    store_uri: str
    given_uri: str | None = None
    refusal: str | None = None
    kept: bool = False

    @property
    def registration(self) -> str:
        """The command that registers the winner; "" if it cannot be registered, or there is none."""
        if self.found.winner is None or self.run_id is None or self.refusal:
            return ""
        model = self.found.winner.result.cell.model.rstrip("/").rpartition("/")[2]
        name = re.sub(r"[^\w.-]+", "-", model)[:100].strip("-") or "model"
        where = {"tracking_uri": self.given_uri} if self.given_uri else {}
        return command_text("register", self.run_id, name=name, **where)

    @property
    def offer(self) -> str:
        """How to register the winner, or why that is refused; "" without a winner."""
        return f"Register the winner: {self.registration}" if self.registration else self.refusal or ""

    def to_pandas(self) -> DataFrame:
        """Return a data frame with a line for each candidate that can be trusted, by name: its measures and rank."""
        from pandas import DataFrame

        heading, body = recommendation_cells(self.found)
        values = [[one.value(measure) for measure in self.found.objectives] for one in self.found.eligible]
        lines = [[*own, *told[-2:]] for own, told in zip(values, body, strict=True)]
        columns = [*heading[1:-1], "rank"]
        return DataFrame(lines, columns=columns, index=[one.name for one in self.found.eligible])

    def __repr__(self) -> str:
        return f"<Recommended: {answer(self.found)}>"

    def _repr_html_(self) -> str:
        heading, body = recommendation_cells(self.found)
        table = Table(tuple(heading[:-1]), tuple(tuple(line[:-1]) for line in body))
        notes = [*self.found.cautions, *self.found.changes, *filter(None, [self.offer])]
        return html.cells(answer(self.found), table, [line[-1] for line in body], notes, last="rank")


def recommend(
    references: Given | Iterable[Given],
    goal: str = "throughput",
    limits: Sequence[Limit] = (),
    *,
    accept_suspect: str | None = None,
    allow: Set[str] = frozenset(),
    output: str | None = None,
    tracking_uri: str | None = None,
    own: str | None = None,
    on_result: Callable[[Recommendation], None] = lambda found: None,
) -> Recommended:
    """Choose the best of the results of `references` (one or several, see `load_results`) within limits.

    `limits` are as in `read_limits`. recommendation.json, .md and the chart are written into the folder `output`, and
    logged on the parent run of the sweep, unless there is no winner and the run holds a recommendation with one; the
    winner's run gets the tag `llmbench.recommended` with the goal. `on_result` gets the recommendation before that.
    `accept_suspect` and `allow` are as in `analysis.decisions.recommend.recommend`, `own` as in `open_store`. Raises
    UsageError, TrackingError or JournalError.
    """
    results = load_all(references, tracking_uri)
    found = analysis.recommend(
        results, goal, limits, accept_suspect=accept_suspect, allow=frozenset(allow), calibrations=calibrations.kept()
    )
    on_result(found)
    sweep = (found.winner.result if found.winner else results[0]).sweep
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(output or scratch)
        artifacts.write_recommendation(found, folder)
        store = open_store_if_any(tracking_uri, own=own)
        if store is None:
            return Recommended(found, sweep, None, address_of(), refusal=_refusal(None, found))
        parent = registry.parent_of_sweep(store, sweep)
        kept = found.winner is None and parent is not None and registry.has_winner(store, parent)
        for run_id in dict.fromkeys(filter(None, (None if kept else parent, store.given_run_id))):
            registry.log_folder(store, run_id, folder)
        if found.winner:
            registry.mark_recommended(store, sweep, found.winner.result.hashes.config, goal)
    return Recommended(found, sweep, parent, store.uri, tracking_uri, _refusal(store, found), kept)


def _refusal(store: Store | None, found: Recommendation) -> str | None:
    """Return why `register` would refuse the winner; None if it would not, or there is no winner."""
    if found.winner is None:
        return None
    if store is None:
        return f"There is no store with a run of {found.winner.name}."
    result = found.winner.result
    run_id = registry.run_of(store, result.sweep, result.hashes.config)
    if run_id is None:
        return f"The store has no run of {found.winner.name}."
    evidence = Evidence(run_id, result.sweep, found.winner.verdict, found.accepted_suspect, result.linked)
    return refusal_to_register(result, found.winner.metrics, evidence)
