"""Upload a sweep's folder to a tracking store, leaving out what is there already.

Used when the server was unreachable during the sweep, or to upload from or to another machine.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ..analysis.summary import Point
from ..config.cells import asked_params, sweep_name
from ..config.spec import BenchSpec, parse
from ..measure import journal
from ..measure.outcome import replay
from ..records import reading
from ..records.errors import JournalError
from ..records.results import Failure, RunResult
from ..reports import artifacts, sweep
from ..reports.result import Row, row_of, with_figures
from ..tracking import view
from ..tracking.runs import PARENT_TAG, begin_run, end_run, log_figures, upload_cell, upload_parent
from ..tracking.search import runs_of_sweep
from ..tracking.store import UPLOADED_TAG, Store, open_store, ui_command
from .cross_cell import cross_findings
from .job import Job, identity, read_job
from .results import failed_result, measured_result

if TYPE_CHECKING:
    from mlflow.entities import Run


KILLED = "The command was killed before this cell was measured."


@dataclass
class Uploaded:
    """Result of an upload: numbers of runs that are new, completed, or were complete already, and where they are.

    `run_ids` maps the name of a cell's folder to its run; `page` is the published view, None if there is none.
    """

    new: int = 0
    completed: int = 0
    there: int = 0
    ui: str = ""
    parent_id: str | None = None
    page: str | None = None
    run_ids: dict[str, str] = field(default_factory=dict)

    def count(self, run: Run | None) -> str | None:
        """Count a run as new (None), completed now, or complete already. Returns its id, None for a new one."""
        if run is None:
            self.new += 1
            return None
        if self.is_whole(run):
            self.there += 1
        else:
            self.completed += 1
        return str(run.info.run_id)

    @staticmethod
    def is_whole(run: Run | None) -> bool:
        """Return True if everything of a run has been uploaded and the run has ended."""
        return run is not None and UPLOADED_TAG in run.data.tags and run.info.status != "RUNNING"


def upload(folder: str, tracking_uri: str | None = None, experiment: str | None = None) -> Uploaded:
    """Upload a sweep's folder, even if its command was killed. A second upload changes nothing.

    Raises JournalError if the folder cannot be uploaded, TrackingError for a problem of the store.
    """
    if not os.path.isdir(folder):
        raise JournalError(f"There is no folder {folder}. Give a folder that `llmbench run` has printed.")
    root = Path(folder).resolve()
    _, known = read_sweep(root)
    if not (root / "ended.json").exists():
        if journal.is_claimed(root):
            raise JournalError(
                f"{folder} is still being written by a running command, which uploads it. Wait until it ends."
            )
        recover(root)
    if not _results(root, known):
        raise JournalError(
            f"{folder} holds no finished cell, so there is nothing to upload. "
            "Give a folder that `llmbench run` has printed."
        )
    return complete(root, open_store(tracking_uri, experiment))


def complete(root: Path, store: Store) -> Uploaded:
    """Upload what an open store lacks of a sweep's folder. A second call changes nothing.

    Raises JournalError or TrackingError.
    """
    spec, known = read_sweep(root)
    results = _results(root, known)
    runs = runs_of_sweep(store, root.name)
    done = Uploaded(ui=ui_command(store.uri))
    parent = next((r for r in runs if PARENT_TAG not in r.data.tags), None) if known["parent"] else None
    ended = max((result.ended_ms for _, result in results), default=None)
    if known["parent"]:
        begun = min((result.started_ms for _, result in results), default=None)
        done.parent_id = done.count(parent) or begin_run(store, known["parent"], {"sweep": root.name}, None, begun)
    by_cell = {run.data.tags.get("llmbench.cell"): run for run in runs}
    measured: list[tuple[Row, str]] = []
    found_across = cross_findings([result for _, result in results], [job.name for job, _ in results], spec.options)
    added = {job.folder.name: found for (job, _), found in zip(results, found_across.added, strict=True)}
    for job, result in results:
        run = by_cell.get(job.folder.name)
        run_id = done.count(run) or begin_run(store, job.name, identity(job), done.parent_id, result.started_ms)
        done.run_ids[job.folder.name] = run_id
        measured.append((with_figures(row_of(result), added[job.folder.name]), run_id))
        if not done.is_whole(run):
            upload_cell(store, run_id, result, job.folder / "artifacts", {})
            log_figures(store, run_id, added[job.folder.name], result.ended_ms)
            end_run(store, run_id, result.outcome, result.ended_ms)
    if done.parent_id and not done.is_whole(parent):
        if measured:
            with tempfile.TemporaryDirectory() as scratch:
                write_comparison(root, Path(scratch), store, spec, known["parent"], measured)
                _copy(root / "comparison" / "goodput.json", Path(scratch))
                done.page = publish_parent(
                    store, done.parent_id, spec, measured, Path(scratch), {}, lambda text: None, found_across.figures
                )
        end_run(store, done.parent_id, _outcome(root, [result for _, result in results], known["cells"]), ended)
    return done


def write_comparison(
    root: Path,
    folder: Path,
    store: Store,
    spec: BenchSpec,
    name: str,
    measured: Sequence[tuple[Row, str]],
) -> None:
    """Write the comparison of a sweep, with the run ids of this store, into `folder`.

    Charts that the sweep has drawn are copied; if it was killed before that, they are drawn.
    """
    drawn = root / "comparison" / "charts"
    if drawn.is_dir():
        shutil.copytree(drawn, folder / "charts")
    subject = sweep.Subject(spec, name, root.name, ui_command(store.uri), store.experiment_id)
    artifacts.write_sweep(measured, subject, folder, draw=not drawn.is_dir())


def _copy(file: Path, folder: Path) -> None:
    if file.exists():
        shutil.copy(file, folder)


def publish_parent(
    store: Store,
    parent_id: str,
    spec: BenchSpec,
    measured: Sequence[tuple[Row, str]],
    comparison: Path,
    asked: Mapping[str, str],
    warn: Callable[[str], None],
    figures: Mapping[str, float] = MappingProxyType({}),
) -> str | None:
    """Log a sweep's parent run: the view of its cells (rows with their run ids), description, params and comparison.

    Returns the view's page; None if the store does not accept one, with the reason passed to `warn`.
    """
    rows, ids = [row for row, _ in measured], [run_id for _, run_id in measured]
    link = view.publish(store, parent_id, sweep_name(spec), spec.varied, rows, ids, warn)
    note = (f"[Compare the cells in charts]({link})\n\n" if link else "") + sweep.description(rows, spec.varied)
    at_ms = max((row.ended_ms or 0 for row in rows), default=0)  # the same at each upload
    points = [Point(key, 0, value, at_ms) for key, value in figures.items()]
    upload_parent(store, parent_id, asked_params(spec) | dict(asked), note, comparison, points)
    return link


def read_sweep(root: Path) -> tuple[BenchSpec, dict[str, Any]]:
    """Read sweep.json: the specification, and the rest (cells, parent's name, order of the folders).

    Raises JournalError.
    """
    try:
        known = reading.read_own_json(root / "sweep.json")
        return parse(known["parameters"]), {"parent": None, "order": [], **known, "cells": int(known["cells"])}
    except (OSError, ValueError, KeyError, TypeError):
        raise JournalError(
            f"{root} is not the folder of a sweep: it has no readable sweep.json. "
            "Give a folder that `llmbench run` has printed."
        ) from None


def recover(folder: Path) -> int:
    """Make results from the worker events that a killed command has kept, and mark the sweep as ended.

    Returns how many cells had been measured. Raises JournalError.
    """
    spec, known = read_sweep(folder)
    for log in folder.glob("*/*.log"):
        journal.redact_log(log)
    begun = [read_job(file.parent) for file in sorted(folder.glob("*/cell.json"))]
    by_name = {job.folder.name: job for job in begun}
    for job in begun:
        for names, outcome in replay(journal.read_events(job.folder / "worker.jsonl")):
            for number in outcome.measured:
                if number in outcome.texts and names[number] in by_name:
                    by_name[names[number]].attempts.append((outcome, number))
    whole = 0
    for job in begun:
        whole += job.measured
        if not (job.folder / "artifacts" / "result.json").exists():
            _write(job, spec, known.get("environment") or {})
    journal.write_json(folder / "ended.json", {"outcome": "crashed"})
    return whole


def _write(job: Job, spec: BenchSpec, environment: Mapping[str, Any]) -> None:
    killed = Failure("measuring", KILLED)
    result = (
        measured_result(job, spec, environment)
        if job.measured
        else failed_result(job, spec, environment, "crashed", killed)
    )
    artifacts.write_cell(result, job.folder / "artifacts")
    with contextlib.suppress(Exception):
        artifacts.draw_cell(result, job.folder / "artifacts" / "charts")


def _results(root: Path, known: Mapping[str, Any]) -> list[tuple[Job, RunResult]]:
    """Return the finished cells in the order of the plan."""
    order = {name: number for number, name in enumerate(known["order"])}
    folders = [file.parent.parent for file in root.glob("*/artifacts/result.json")]
    folders.sort(key=lambda folder: order.get(folder.name, len(order)))
    results = [journal.read_result(folder / "artifacts") for folder in folders]
    return [(read_job(folder), result) for folder, result in zip(folders, results, strict=True)]


def _outcome(root: Path, results: list[RunResult], planned: int) -> str:
    """Return the outcome that the command wrote; without one, derive it from the cells."""
    try:
        return str(reading.read_own_json(root / "ended.json")["outcome"])
    except (OSError, ValueError, KeyError, TypeError):
        words = {result.outcome for result in results} | ({"interrupted"} if len(results) < planned else set())
    return "ok" if words <= {"ok", "skipped"} else "interrupted" if "interrupted" in words else "error"
