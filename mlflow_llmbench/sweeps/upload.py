"""Upload a sweep's folder to a tracking store, leaving out what is there already.

Used when the server was unreachable during the sweep, or to upload from or to another machine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ..analysis.summary import Point, series
from ..config.cells import asked_params, sweep_name
from ..config.spec import BenchSpec, parse
from ..measure import journal, supervise
from ..measure.events import Event
from ..measure.outcome import GroupOutcome, replay
from ..measure.own_files import only_own_files
from ..records import reading
from ..records.errors import JournalError, UsageError, first_line
from ..records.metrics import PEAK_MEMORY
from ..records.redaction import redact
from ..records.results import Failure, RunResult
from ..records.verdicts import OUTCOMES
from ..reports import artifacts, sweep
from ..reports.result import Row, row_of, with_figures
from ..tracking import view
from ..tracking.explanations import plain_errors, reason
from ..tracking.runs import PARENT_TAG, begin_run, end_run, log_figures, upload_cell, upload_parent
from ..tracking.search import runs_of_sweep
from ..tracking.store import UPLOADED_TAG, Store, open_store, ui_command
from .cross_cell import cross_findings
from .job import Job, identity, read_job, untold
from .results import failed_result, measured_result

if TYPE_CHECKING:
    from mlflow.entities import Run


GIVE = "Give a folder that `llmbench run` has printed."
AGAIN = "Delete its folder and measure the cell again."

KILLED = "The command was killed before this cell was measured."
STOPPED = "The command was killed before this cell was measured in all its processes."


@dataclass
class Uploaded:
    """Result of an upload: numbers of runs that are new, completed, or were complete already, and where they are.

    `run_ids` maps the name of a cell's folder to its run · `page` is the published view, None if there is none ·
    `problems`: what could not be uploaded, one line each · `recovered`: cells that a killed command had measured, None
    if the command had ended.
    """

    new: int = 0
    completed: int = 0
    there: int = 0
    ui: str = ""
    parent_id: str | None = None
    page: str | None = None
    run_ids: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    refused: bool = False  # some of the problems are the store's, which may take it another time
    recovered: int | None = None

    def count(self, run: Run | None, outcome: str, is_empty: bool = False) -> str | None:
        """Count a run as new (None), completed now, or complete already. Returns its id, None for a new one.

        `is_empty`: nothing can be uploaded of it, so that it is complete when it has ended.
        """
        if run is None:
            self.new += 1
            return None
        if is_whole(run, outcome) or (is_empty and run.info.status != "RUNNING"):
            self.there += 1
        else:
            self.completed += 1
        return str(run.info.run_id)


def is_whole(run: Run | None, outcome: str) -> bool:
    """Return True if everything of a run has been uploaded and the run has ended with the status of its outcome."""
    return run is not None and UPLOADED_TAG in run.data.tags and run.info.status == OUTCOMES[outcome]


def upload(folder: str, tracking_uri: str | None = None, experiment: str | None = None) -> Uploaded:
    """Upload a sweep's folder, even if its command was killed. A second upload changes nothing.

    Raises JournalError if nothing of the folder can be uploaded, TrackingError for a problem of the store.
    """
    if not os.path.isdir(folder):
        raise JournalError(f"There is no folder {folder}. {GIVE}")

    def act(root: Path) -> Uploaded:
        read_sweep(root)
        if not journal.read_end(root) and journal.is_claimed(root):
            raise JournalError(journal.CLAIMED.format(folder))
        return _finish(root, open_store(tracking_uri, experiment))

    done = _with_own_files(Path(folder).resolve(), act)
    if not done.new + done.completed + done.there:
        nothing = f"{folder} holds no finished cell, so there is nothing to upload. {GIVE}"
        raise JournalError(done.problems[0] if done.problems else nothing)
    return done


def finish(root: Path, store: Store) -> Uploaded:
    """Recover a sweep if its command was killed, upload what the store lacks, and note it if that is its own store.

    Raises JournalError or TrackingError.
    """
    return _with_own_files(root, lambda own: _finish(own, store))


def _with_own_files(root: Path, act: Callable[[Path], Uploaded]) -> Uploaded:
    """Act on a folder, or on a copy without its links: nothing outside of it is read, uploaded or written.

    Each link becomes a problem of the result.
    """
    with only_own_files(root) as (own, left_out):
        try:
            done = act(own)
        except JournalError as error:
            raise (JournalError(left_out[0]) if left_out else error) from None
    done.problems = [*left_out, *(problem.replace(str(own), str(root)) for problem in done.problems)]
    return done


def _finish(root: Path, store: Store) -> Uploaded:
    with journal.claim(root), plain_errors(store.uri):
        kept, problems = (None, []) if journal.read_end(root) else recover(root)
        done = complete(root, store)
        done.recovered, done.problems = kept, problems + done.problems
        end = journal.read_end(root)
        is_home = str(read_sweep(root)[1].get("tracking_uri")) == redact(store.uri)
        if is_home and not done.refused and not end.get("uploaded"):
            with contextlib.suppress(JournalError):  # a disk that is read-only
                journal.write_json(root / "ended.json", {**end, "uploaded": True})
    return done


def complete(root: Path, store: Store, until: float | None = None) -> Uploaded:
    """Upload what an open store lacks of a sweep's folder. A second call changes nothing.

    A cell that cannot be read or is refused by the store becomes a line of `Uploaded.problems`, and its run is FAILED.
    With `until`, a time of `time.monotonic`, no upload begins after it, runs that are not complete then are KILLED, and
    the sweep's own run is left as it is. If there is neither a result nor a run, it does nothing. Raises JournalError
    or TrackingError.
    """
    spec, known = read_sweep(root)
    results, done = _results(root, known), Uploaded(ui=ui_command(store.uri))
    runs = runs_of_sweep(store, root.name)
    done.problems += results.problems.values()
    if not results.cells and not runs:
        return done
    if runs:  # the children of a run are in its experiment
        store = dataclasses.replace(store, experiment_id=runs[0].info.experiment_id)
    by_cell = _one_for_each(store, runs)
    parent = by_cell.pop("", None) if known["parent"] else None
    outcome = _outcome(root, [cell.result for cell in results.cells], known["cells"])
    lost = [name for name in results.problems if name not in by_cell or UPLOADED_TAG not in by_cell[name].data.tags]
    outcome = "error" if outcome == "ok" and lost else outcome
    if known["parent"]:
        begun = min((cell.result.started_ms for cell in results.cells if not cell.result.linked), default=None)
        done.parent_id = done.count(parent, outcome, is_empty=not results.cells) or begin_run(
            store, known["parent"], {"sweep": root.name}, None, begun
        )
    found_across = cross_findings(
        [cell.result for cell in results.cells], [cell.job.name for cell in results.cells], spec.options
    )
    measured: list[tuple[Row, str]] = []
    for cell, figures in zip(results.cells, found_across.added, strict=True):
        run = by_cell.pop(cell.job.folder.name, None)
        asked = known["asked"] if run and not known["parent"] else {}
        run_id = _complete_cell(store, cell, run, figures, asked, done, until)
        measured.append((with_figures(cell.row, figures), run_id))
    for run in by_cell.values():  # nothing that can be read is left of them
        if not run.data.tags.get(UPLOADED_TAG) and run.info.status in ("RUNNING", "FINISHED"):
            end_run(store, run.info.run_id, "crashed")
            done.completed += 1
    if until is None and done.parent_id:
        _complete_parent(root, store, parent, measured, found_across.figures, outcome, done)
    elif until is None and (done.new or done.completed):
        view.publish_single_runs(store, any(PEAK_MEMORY[0] in row.metrics for row, _ in measured))
    return done


def _one_for_each(store: Store, runs: Sequence[Run]) -> dict[str, Run]:
    """Return the run of each cell, and under "" the sweep's own, which has no cell. Ends others that are RUNNING.

    There are several if the answer to the beginning of one was lost, and it was begun again.
    """
    found: dict[str, Run] = {}
    children = Counter(run.data.tags.get(PARENT_TAG) for run in runs)
    for run in sorted(
        runs, key=lambda one: (UPLOADED_TAG in one.data.tags, children[one.info.run_id], len(one.data.metrics))
    ):
        other = found.get(name := run.data.tags.get("llmbench.cell", ""))
        if other and other.info.status == "RUNNING":
            end_run(store, other.info.run_id, "interrupted")
        found[name] = run
    return found


def _complete_parent(
    root: Path,
    store: Store,
    run: Run | None,
    measured: Sequence[tuple[Row, str]],
    figures: Mapping[str, float],
    outcome: str,
    done: Uploaded,
) -> None:
    """Upload what a store lacks of a sweep's own run; `run` is None if it has just begun. See `publish_parent`."""
    assert done.parent_id
    if is_whole(run, outcome) or (run and not measured and run.info.status != "RUNNING"):
        return
    spec, known = read_sweep(root)
    if measured:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            write_comparison(root, folder, store, spec, known["parent"], measured)
            _copy(root / "comparison" / "goodput.json", folder)
            asked = known["asked"] if run else {}
            done.page = publish_parent(store, done.parent_id, spec, measured, folder, asked, lambda text: None, figures)
    ended = max((row.ended_ms for row, _ in measured if row.ended_ms and not row.linked), default=None)
    word = "error" if outcome == "ok" and done.refused else outcome
    end_run(store, done.parent_id, word, _not_before(run, ended))


def _complete_cell(
    store: Store,
    cell: _Finished,
    run: Run | None,
    figures: Mapping[str, float],
    asked: Mapping[str, str],
    done: Uploaded,
    until: float | None,
) -> str:
    """Upload what a store lacks of one cell (see `complete`). Returns the id of its run, "" if it has none."""
    job, result = cell.job, cell.result
    if is_whole(run, result.outcome):
        assert run
        log_figures(store, run.info.run_id, figures, result.ended_ms)  # they may have come after everything else
    elif until is not None and time.monotonic() > until:
        done.problems.append(f"{job.name}: interrupted before it was uploaded")
        if run and run.info.status == "RUNNING":
            end_run(store, run.info.run_id, "interrupted")
        return str(run.info.run_id) if run else ""
    run_id = done.count(run, result.outcome) or begin_run(
        store, job.name, identity(job), done.parent_id, result.started_ms
    )
    done.run_ids[job.folder.name] = run_id
    if is_whole(run, result.outcome):
        return run_id
    try:
        upload_cell(store, run_id, result, job.folder / "artifacts", asked)
        log_figures(store, run_id, figures, result.ended_ms)
        end_run(store, run_id, result.outcome, _not_before(run, result.ended_ms))
    except KeyboardInterrupt:
        end_run(store, run_id, "interrupted")
        raise
    except Exception as error:
        end_run(store, run_id, "error")  # raises if the store is away
        done.refused = True
        done.problems.append(f"{job.name}: {reason(error)}")
    return run_id


def _not_before(run: Run | None, ended_ms: int | None) -> int | None:
    """Return the time at which a run ends, not before it has begun: somebody may have begun it after a measurement."""
    return max(ended_ms, int(run.info.start_time or 0)) if run and ended_ms is not None else ended_ms


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
    best, tags = sweep.best_figures(rows, spec.varied)
    points = [Point(key, 0, value, at_ms) for key, value in {**figures, **best}.items()]
    upload_parent(store, parent_id, asked_params(spec) | dict(asked), note, comparison, points, tags)
    return link


def read_sweep(root: Path) -> tuple[BenchSpec, dict[str, Any]]:
    """Read sweep.json: the specification, and the rest (cells, parent's name, order of the folders).

    Raises JournalError.
    """
    try:
        known = reading.read_own_json(root / "sweep.json")
        order = [str(name) for name in known.get("order", [])]
        more = {"parent": None, "asked": {}, **known, "order": order, "cells": int(known["cells"])}
        return parse(known["parameters"], recorded=True), more
    except (OSError, ValueError, KeyError, TypeError, AttributeError, UsageError):
        raise JournalError(f"{root} is not the folder of a sweep: it has no readable sweep.json. {GIVE}") from None


def recover(folder: Path) -> tuple[int, list[str]]:
    """Make results from the events that a killed command and its workers have kept, and mark the sweep as ended.

    Returns how many cells had been measured, and a line for each file that cannot be read. Raises JournalError.
    """
    spec, known = read_sweep(folder)
    supervise.forget_offloaded([*folder.glob("*")])
    for log in folder.glob("*/*.log"):
        journal.redact_log(log)
    problems: list[str] = []
    begun: dict[str, Job] = {}
    for file in sorted(folder.glob("*/cell.json")):
        try:
            begun[file.parent.name] = read_job(file.parent)
        except JournalError as error:
            problems.append(str(error))
    for job in begun.values():
        for names, outcome in replay(_readable(job.folder / "worker.jsonl", problems)):
            for number, name in enumerate(names):
                if name in begun and number in outcome.measured and number in outcome.texts:
                    begun[name].attempts.append((outcome, number))
                    begun[name].tried = None
                elif name in begun:
                    begun[name].tried = outcome, number
    whole, crashed = 0, False
    for job in begun.values():
        _add_untold(job, problems)
        whole += job.measured
        is_kept = (job.folder / "artifacts" / "result.json").exists()
        if not is_kept or (job.measured and _is_incomplete(job.folder / "artifacts")):
            crashed |= not job.measured
            try:
                _write(job, spec, known.get("environment") or {})
            except Exception as error:
                problems.append(f"The journal {job.folder} is damaged: {first_line(error)}. {AGAIN}")
    all_there = not crashed and len(list(folder.glob("*/artifacts/result.json"))) >= known["cells"]
    outcome_word = "crashed"
    if all_there:  # only the end of the command is missing
        outcome_word = _outcome(folder, [cell.result for cell in _results(folder, known).cells], known["cells"])
    journal.write_json(folder / "ended.json", {"outcome": outcome_word, "uploaded": False})
    return whole, problems


def _is_incomplete(folder: Path) -> bool:
    """Return True if the result in a folder was kept between two cells."""
    try:
        return bool(journal.read_result(folder).incomplete)
    except JournalError:
        return False


def _readable(path: Path, problems: list[str]) -> Iterator[Event]:
    """Yield the events of a journal file up to the first line that is damaged, and note that one."""
    try:
        yield from journal.read_events(path)
    except (JournalError, OSError) as error:
        problems.append(first_line(error))


def _add_untold(job: Job, problems: list[str]) -> None:
    """Add the processes that had measured a job and whose last event the killed command had not read."""
    for measured in untold(job, _readable(job.folder / "events.jsonl", problems)):
        outcome, number = job.tried or (GroupOutcome(), 0)
        told = dataclasses.replace(
            outcome, measured={**outcome.measured, number: measured}, texts={**outcome.texts, number: ()}
        )
        job.attempts.append((told, number))
        job.tried = None


def _write(job: Job, spec: BenchSpec, environment: Mapping[str, Any]) -> None:
    if job.measured:
        result = measured_result(job, spec, environment)
        result = dataclasses.replace(result, ended_ms=max(result.started_ms, min(result.ended_ms, _last_ms(job))))
    else:
        killed = Failure("measuring", STOPPED if job.processes_done else KILLED)
        result = failed_result(job, spec, environment, "crashed", killed, ended_ms=_last_ms(job))
    artifacts.write_cell(result, job.folder / "artifacts")
    with contextlib.suppress(Exception):
        artifacts.draw_cell(result, job.folder / "artifacts" / "charts")


def _last_ms(job: Job) -> int:
    """Return the time in epoch ms at which the journal of a job was last written."""
    written = [file.stat().st_mtime for file in job.folder.glob("*.json*")]
    return int(max(written) * 1000) if written else int(time.time() * 1000)


@dataclass(frozen=True)
class _Finished:
    """A finished cell on the disk: its job, its result, and its row."""

    job: Job
    result: RunResult
    row: Row


@dataclass(frozen=True)
class _Results:
    """The finished cells of a sweep in the order of the plan, and a line for each that cannot be read."""

    cells: list[_Finished]
    problems: dict[str, str]  # by the name of the cell's folder


def _results(root: Path, known: Mapping[str, Any]) -> _Results:
    order = {name: number for number, name in enumerate(known["order"])}
    folders = [file.parent.parent for file in root.glob("*/artifacts/result.json")]
    folders.sort(key=lambda folder: order.get(folder.name, len(order)))
    found = _Results([], {})
    for folder in folders:
        try:
            result = journal.read_result(folder / "artifacts")
            cell = _Finished(read_job(folder), result, row_of(result))
            series(result)
            found.cells.append(cell)
        except JournalError as error:
            found.problems[folder.name] = str(error)
        except Exception as error:  # its figures cannot be computed
            file, why = folder / "artifacts" / "result.json", f"{type(error).__name__}: {first_line(error)}"
            found.problems[folder.name] = f"Cannot read the result {file}: it is damaged ({why}). {AGAIN}"
    return found


def _outcome(root: Path, results: list[RunResult], planned: int) -> str:
    """Return the outcome that the command wrote; without one, derive it from the cells."""
    written = journal.read_end(root).get("outcome")
    if written in OUTCOMES:
        return str(written)
    words = {result.outcome for result in results} | ({"interrupted"} if len(results) < planned else set())
    return "ok" if words <= {"ok", "skipped"} else "interrupted" if "interrupted" in words else "error"
