"""The newest measured sweep, for commands that are called without the name of one."""

from __future__ import annotations

import time
from dataclasses import dataclass

from ..records.errors import UsageError
from ..records.invocation import command_text
from ..records.redaction import redact
from ..records.text import plural
from ..tracking import search
from ..tracking.store import open_store


@dataclass(frozen=True)
class Latest:
    """A sweep in the store: its name, the models it measured, its experiment's name, and when its last cell began."""

    sweep: str
    models: tuple[str, ...]
    cells: int
    experiment: str
    started_ms: int

    def __str__(self) -> str:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.started_ms / 1000))
        cells = plural(self.cells, "cell")
        more = [f"{len(self.models) - 2} more"] if len(self.models) > 2 else []
        *first, last = [*self.models[:2], *more]
        models = f"{', '.join(first)} and {last}" if first else last
        return f"{self.sweep}, {cells} of {models} in the experiment {self.experiment}, measured at {when}"


def latest_sweep(tracking_uri: str | None = None, experiment: str | None = None) -> Latest:
    """Return the newest measured sweep of an experiment, by default the one into which `run` logs.

    Raises UsageError if it has none, and names the newest of the other experiments; TrackingError for the store.
    """
    store = open_store(tracking_uri, experiment)
    found = search.latest_sweep(store, [store.experiment_id])
    names = {str(one.experiment_id): str(one.name) for one in store.client.search_experiments()}
    here = names.get(store.experiment_id, store.experiment_id)
    if found is None:
        other = search.latest_sweep(store, list(names))
        advice = (
            f"The newest of the store is {other.data.tags['llmbench.sweep']}, in the experiment "
            f"{names[other.info.experiment_id]}: give its name."
            if other
            else f"Measure one with `{command_text('quickstart')}`, or give the folder of one."
        )
        raise UsageError(f"No sweep was measured in the experiment {here} of {redact(store.uri)}. {advice}")
    sweep = str(found.data.tags["llmbench.sweep"])
    cells = search.measured_runs(store, sweep)
    models = tuple(dict.fromkeys(run.data.params.get("model", "?") for run in cells))
    return Latest(sweep, models, len(cells), here, int(found.info.start_time or 0))
