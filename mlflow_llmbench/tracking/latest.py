"""References of results as text, and `latest`: the newest measured sweep."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from ..records.errors import UsageError
from ..records.invocation import LATEST, command_text
from ..records.redaction import redact
from ..records.text import plural
from . import search
from .store import open_store


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
    store = open_store(tracking_uri, experiment, reads=True)
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


def resolve(
    reference: str | os.PathLike[str], tracking_uri: str | None = None, experiment: str | None = None
) -> tuple[str, Latest | None]:
    """Return a reference as text, the newest sweep's name for `latest`, and that sweep, None for other references.

    A file or folder that is called `latest` is meant itself. Raises UsageError for what is no reference, and the errors
    of `latest_sweep`.
    """
    if not isinstance(reference, str | os.PathLike):
        raise UsageError(
            f"{type(reference).__name__} is not a reference of results. Give a folder, a run id, the name of a sweep, "
            f"{LATEST}, or what run(...) returned."
        )
    text = os.fspath(reference)
    if text != LATEST or os.path.exists(text):
        return text, None
    found = latest_sweep(tracking_uri, experiment)
    return found.sweep, found
