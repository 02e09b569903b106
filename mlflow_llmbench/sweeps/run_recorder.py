"""Begin, fill and end the MLflow runs of one sweep. An error of the store never stops a measurement.

A failed upload is reported and retried once at the end; until then the results stay in the sweep's folder. A store that
has not answered for a moment is asked whether it answers before a call, so that an unreachable one costs only seconds.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ..config.spec import BenchSpec
from ..measure.journal import write_json
from ..records.errors import StoreAway, first_line
from ..records.redaction import redact
from ..records.results import RunResult
from ..reports.result import Row
from ..tracking import runs, search, view
from ..tracking.explanations import reason
from ..tracking.reach import GOES_ON, answers, is_told
from ..tracking.store import address_of, open_store
from . import upload
from .job import Job, identity

if TYPE_CHECKING:
    from ..tracking.store import Store


T = TypeVar("T")

Destination = tuple[str | None, str | None]
"""A tracking URI and an experiment name; None for the default."""

HURRY_S = 10.0
"""Seconds after an interruption within which an upload begins; schedulers kill a command some time after their signal.
"""

PATIENCE_S = 5.0
"""Seconds spent in vain, waiting or in calls that failed, after which the store is not asked again until the end."""

FRESH_S = 10.0
"""Seconds after a call that succeeded during which the store is not asked whether it answers."""

QUICK_S = 1.0
QUICK_SHARE = 0.2
"""An upload between two cells is quick if it takes at most this many seconds, or this share of the cell's own time."""

QUICK_REQUESTS = 10
"""About as many requests, one after another, make one. From the time of the first it is known whether it is quick."""

REST_S = 60.0
REST_FACTOR = 10.0
"""After one that was not quick, or that failed, nothing is uploaded between cells for this many seconds, and for this
many times its duration, so that uploads take at most a tenth of the time."""


class RunRecorder:
    """Records one sweep as runs of one store.

    `destination` is a tracking URI and an experiment name. Each problem is passed to `warn` as one line. `parent_name`
    is None for a single cell, which has no parent run.
    """

    def __init__(self, destination: Destination, parent_name: str | None, warn: Callable[[str], None]) -> None:
        self.destination, self.parent_name, self.warn = destination, parent_name, warn
        self.folder = Path()  # of the sweep, once it is known
        self.asked: Mapping[str, str] = {}  # params as `mlflow run` logged them
        self.store: Store | None = None
        self.parent_id: str | None = None
        self.page: str | None = None
        self.missed: list[str] = []  # not in the store yet; `retry` uploads it
        self.unwritten: list[str] = []  # could not be written to the disk
        self.waited_s = 0.0  # in vain
        self.heard_at = -FRESH_S  # time of `time.monotonic` at which the last call succeeded
        self.rests_until = 0.0  # time of `time.monotonic` before which nothing is uploaded between cells
        self.hurried = False  # the command was interrupted

    @property
    def address(self) -> str:
        """The store's address."""
        return self.store.uri if self.store else address_of(self.destination[0])

    def open(self, params: Mapping[str, str]) -> None:
        """Connect to the store. If it does not answer, warn and try again at the end.

        Raises TrackingError for an invalid address, or if the run that `mlflow run` has made has other params.
        """
        started = time.monotonic()
        try:
            self.store = open_store(*self.destination)
        except StoreAway as error:
            self.waited_s += time.monotonic() - started
            self.missed.append(f"the runs: {error}")
            if not is_told(error):
                self.warn(f"{error} {GOES_ON}")
            return
        runs.refuse_other_params(self.store, params)

    def begin_sweep(self, folder: Path, asked: Mapping[str, str]) -> None:
        """Record into the runs of this sweep's folder; `asked` are the params as `mlflow run` logged them."""
        self.folder = folder
        self.asked = asked if self.store and self.store.given_run_id else {}

    def begin_parent(self) -> None:
        """Begin the parent's run, if this sweep has a parent and it has not begun."""
        if self.parent_name is not None and self.parent_id is None:
            name = self.parent_name
            self.parent_id = self._call_store(
                "the sweep's own run", lambda store: runs.begin_run(store, name, {"sweep": self.folder.name})
            )

    def begin(self, job: Job, started_ms: int) -> None:
        """Begin the run of a cell, which has begun at `started_ms`, Unix time in milliseconds."""
        self.begin_parent()
        if self.parent_name is not None and self.parent_id is None:
            return  # a child without its parent would be lost among the runs
        started = self._call_store(
            f"the run of {job.name}",
            lambda store: runs.begin_run(store, job.name, identity(job), self.parent_id, started_ms),
        )
        if started:
            job.run_id = started
            with self.report_errors(f"the note of {job.name}'s run"):
                write_json(job.folder / "run.json", {"run_id": started, "tracking_uri": self.store and self.store.uri})

    def upload(self, job: Job, result: RunResult) -> None:
        """Log a cell's result on its run, and end the run: with the result's outcome only if everything has arrived.

        A run whose upload failed must not stay RUNNING either; it is FAILED until the rest is uploaded.
        """
        if not job.run_id:
            self.begin(job, result.started_ms)
        if not job.run_id:
            return
        asked = self.asked if self.parent_name is None else {}

        def send(store: Store) -> bool:
            runs.upload_cell(store, job.run_id, result, job.folder / "artifacts", asked)
            runs.end_run(store, job.run_id, result.outcome, result.ended_ms)
            return True

        job.uploaded = bool(self._call_store(job.name, send))
        if not job.uploaded:
            self.end(job.run_id, "error")
        elif self.parent_name is None:
            has_device = bool(result.memory.device)
            self._call_store("the view", lambda store: view.publish_single_runs(store, has_device))

    def upload_between(self, job: Job, result: RunResult) -> None:
        """Log the figures of a finished cell on its run while its group goes on, if the store answers quickly.

        The run stays open until `upload` completes it. The worker waits meanwhile, so an upload that is not quick is
        the last one for a while.
        """
        started = time.monotonic()
        if self.store is None or started < self.rests_until:
            return
        quick_s = max(QUICK_S, QUICK_SHARE * (result.ended_ms - result.started_ms) / 1000)
        done = self._answers(self.store) and QUICK_REQUESTS * (time.monotonic() - started) <= quick_s
        if done and not job.run_id:
            self.begin(job, result.started_ms)
        asked = self.asked if self.parent_name is None else {}

        def send(store: Store) -> bool:
            runs.upload_figures(store, job.run_id, result, job.folder / "artifacts", asked)
            return True

        done = done and bool(job.run_id and self._call_store(job.name, send))
        took = time.monotonic() - started
        if not done or took > quick_s:
            self.rests_until = time.monotonic() + max(REST_S, REST_FACTOR * took)

    def end(self, run_id: str, outcome: str) -> None:
        """End a run now."""
        self._call_store(f"the end of run {run_id}", lambda store: runs.end_run(store, run_id, outcome))

    def kill(self, jobs: Sequence[Job]) -> None:
        """End all runs that are open, as interrupted. They are completed later, unless that is interrupted too."""
        self.hurried = True
        for run_id in [job.run_id for job in jobs if not job.uploaded] + [self.parent_id or ""]:
            if run_id:
                self.end(run_id, "interrupted")

    def add(self, run_id: str, name: str, figures: Mapping[str, float], at_ms: int) -> None:
        """Log metrics of a run that come from a comparison with other runs."""
        if run_id and figures:
            self._call_store(name, lambda store: runs.log_figures(store, run_id, figures, at_ms))

    def finish(
        self,
        spec: BenchSpec,
        measured: Sequence[tuple[Row, str]],
        comparison: Path,
        outcome: str,
        figures: Mapping[str, float],
    ) -> None:
        """Log the comparison of the cells (rows and run ids) and the sweep's figures on the parent run, and end it."""
        if self.parent_id is None:
            return
        parent = self.parent_id

        def publish(store: Store) -> bool:
            self.page = upload.publish_parent(store, parent, spec, measured, comparison, self.asked, self.warn, figures)
            runs.end_run(store, parent, outcome)
            return True

        if not self._call_store("the comparison", publish):
            self.end(parent, "error" if outcome == "ok" else outcome)

    def complete_cells(self, jobs: Sequence[Job]) -> None:
        """Upload what the store lacks of the cells for `HURRY_S`, after an interruption at any moment."""
        until = time.monotonic() + HURRY_S
        self.missed += self._call_store("the cells", lambda store: self._complete(store, jobs, until)) or []

    def end_strays(self, jobs: Sequence[Job]) -> None:
        """End the sweep's runs that are open and not known here: the answer to their beginning was lost."""
        if self.hurried or self.missed:
            return  # the upload of what is missing ends them
        known = {self.parent_id, *(job.run_id for job in jobs)}

        def end(store: Store) -> None:
            for run_id in search.open_runs(store, self.folder.name):
                if run_id not in known:
                    runs.end_run(store, run_id, "interrupted")

        self._call_store("runs that were begun twice", end)

    def retry(self, jobs: Sequence[Job]) -> None:
        """Upload what the store does not have yet, if it answers now."""
        if not self.missed:
            return
        with contextlib.suppress(Exception):
            store = self.store or open_store(*self.destination)
            if answers(store.uri):
                self.missed = self._complete(store, jobs)

    def _complete(self, store: Store, jobs: Sequence[Job], until: float | None = None) -> list[str]:
        """Upload what a store lacks, with `until` only of the cells (see `upload.complete`). Return what failed."""
        done = upload.complete(self.folder, store, until)
        self.store, self.parent_id, self.page = store, done.parent_id, done.page or self.page
        for job in jobs:
            job.run_id = done.run_ids.get(job.folder.name, job.run_id)
        return done.problems

    @contextlib.contextmanager
    def report_errors(self, name: str) -> Iterator[None]:
        """Continue after an error of drawing or writing; warn now, and list it again at the end."""
        try:
            yield
        except Exception as error:
            self.unwritten.append(f"{name}: {first_line(error)}")
            self.warn(f"Not written: {name}: {first_line(error)}.")

    def _call_store(self, name: str, action: Callable[[Store], T]) -> T | None:
        """Call `action` with the store if it answers. Returns None if it does not, or if `action` fails."""
        is_fresh = time.monotonic() - self.heard_at < FRESH_S
        if self.store is None or not (is_fresh or self._answers(self.store)):
            self.missed.append(f"{name}: the store does not answer")
            return None
        started, self.heard_at = time.monotonic(), -FRESH_S
        try:
            done = action(self.store)
            self.heard_at = time.monotonic()
            return done
        except KeyboardInterrupt:
            if not self.hurried:
                raise
            self.missed.append(f"{name}: interrupted")
            return None
        except Exception as error:
            self.waited_s += time.monotonic() - started
            said = f"{name}: {reason(error)}"
            self.missed.append(said)
            self.warn(f"Not uploaded: {said}. It is kept in {self.folder}, and the upload is tried again at the end.")
            return None

    def _answers(self, store: Store) -> bool:
        if self.waited_s > PATIENCE_S:
            return False
        started = time.monotonic()
        if answers(store.uri):
            return True
        if not self.missed:
            self.warn(f"The MLflow store {redact(store.uri)} does not answer. Results are kept in {self.folder}.")
        self.waited_s += time.monotonic() - started
        return False
