"""Steps of the sweep's loop: measure, keep, fail, skip."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from ..analysis import goodput
from ..config.cells import asked_params, cell_name, needs_no_less, option_params
from ..config.spec import BenchSpec
from ..measure.events import CellBegun, CellMeasured, Event, GroupBegun, QualityWithheld, Stage
from ..measure.journal import write_json
from ..measure.outcome import GroupOutcome
from ..records.cell import Cell
from ..records.errors import NodeLost
from ..records.invocation import parameter_text
from ..records.redaction import redact_all
from ..records.results import Failure, RunResult
from ..reports import files
from ..reports.result import row_of
from ..workloads.prompts import load_prompts
from . import planning, resume
from .cross_cell import Relations
from .executor import Group, Place
from .job import Job, write_job
from .mlflow_runs import Ledger
from .progress import Watcher
from .results import env_hashes, failed_result, measured_result

MOST_LOSSES = 3
"""Most times that a cell is given to another machine of a cluster after its machine was lost."""

MIXED = (
    "The processes of this cell ran on nodes that differ, so they make no result. Run it again, or on identical nodes."
)


@dataclass
class _Sweep:
    """State of one command. `groups` holds the jobs, those that share a loaded model together."""

    spec: BenchSpec
    jobs: list[Job]
    groups: list[list[Job]]
    ledger: Ledger
    folder: Path
    place: Place
    watcher: Watcher
    told: set[str] = field(default_factory=set)  # reasons already shown for withheld quality figures
    failed: list[tuple[Cell, str, bool]] = field(default_factory=list)  # cell, outcome, whether its load failed
    related: Relations = field(default_factory=Relations)


def _write_plan(sweep: _Sweep) -> None:
    store = sweep.ledger.store
    known = {
        "parameters": asked_params(sweep.spec) | option_params(sweep.spec),
        "cells": len(sweep.jobs),
        "order": [job.folder.name for job in sweep.jobs],
        "parent": sweep.ledger.parent_name,
        "tracking_uri": store.uri if store else None,
        "environment": sweep.place.environment,
    }
    write_json(sweep.folder / "sweep.json", known)


def _measure(sweep: _Sweep) -> None:
    """Measure every cell that is neither refused nor already measured, one round per requested process.

    Every second round runs in reverse order (A B, B A, A B, …), so that drift over time affects all cells alike.
    Kalibera and Jones 2013 recommend processes in alternating order.
    """
    for job in sweep.jobs:
        if job.refused:
            _fail(sweep, job, "refused", Failure("planning", job.refused))
        elif not (sweep.spec.options.rerun or sweep.spec.options.twin):  # a pair is always measured together
            _link(sweep, job)
    for number in range(max(job.cell.processes for job in sweep.jobs)):
        _run_round(sweep, sweep.groups[:: -1 if number % 2 else 1])


def _link(sweep: _Sweep, job: Job) -> None:
    """Take over an earlier result of this cell, if there is one."""
    found = resume.find(job, sweep.spec, sweep.ledger.store, sweep.place.env_hashes)
    if found:
        sweep.watcher.cell(sweep.jobs.index(job) + 1, job.name)
        again = parameter_text("rerun", "true")
        sweep.watcher.note(f"{job.name}: measured before, in {found.linked}. To measure it again: {again}.")
        job.started_ms = found.started_ms
        _keep(sweep, job, found)


def _run_round(sweep: _Sweep, groups: Sequence[Group]) -> None:
    """Measure each group in one process. After a failure the remaining cells of the group get a new process."""
    place, todo = sweep.place, deque(groups)
    while todo or place.busy:
        while todo and place.takes_more:
            waiting = _not_hopeless(sweep, [job for job in todo.popleft() if job.row is None])
            if waiting:
                place.give(waiting)
        if place.busy:
            known = len(sweep.failed)
            left = _take(sweep, *place.wait(lambda group, event: _tell(sweep, group, event)))
            if left:
                todo.appendleft(left)
            if len(sweep.failed) > known:  # waiting cells may be too large as well
                todo.extend(place.recall())


def _tell(sweep: _Sweep, group: Group, event: Event) -> None:
    """Handle an event of a group: begin its runs when it begins, and pass progress on to the watcher."""
    job = group[event.number] if isinstance(event, CellBegun | CellMeasured) else group[0]
    match event:
        case GroupBegun():
            _begin_runs(sweep, group)
        case QualityWithheld(message=message) if message not in sweep.told:
            sweep.told.add(message)
            sweep.watcher.note(message)
    number = sweep.jobs.index(job) + 1
    match event:
        case CellBegun(node=str(node)):  # several at once: a line at the begin, the count at the end
            sweep.watcher.note(f"{job.name}: measuring on {node}")
        case CellMeasured(node=str()):
            sweep.watcher.cell(number, job.name)
            sweep.watcher.event(event)
        case Event(node=None):
            if isinstance(event, GroupBegun | CellBegun) or event in (Stage("preparing"), Stage("reference")):
                sweep.watcher.cell(number, job.name)
            sweep.watcher.event(event)


def _begin_runs(sweep: _Sweep, group: Group) -> None:
    """Begin the run of each job of a group that has none."""
    for job in group:
        if not job.started_ms:
            job.started_ms = int(time.time() * 1000)
            write_job(job)
            sweep.ledger.begin(job)


def _search(sweep: _Sweep, group: Group, outcome: GroupOutcome) -> Job | None:
    """Return the next cell of a search as a job, chosen from the results so far and added to the group.

    Returns None when the search has ended.
    """
    here = [
        dataclasses.replace(job, attempts=[(outcome, own)]) for own, job in enumerate(group) if own in outcome.measured
    ]
    results = [measured_result(job, sweep.spec, sweep.place.environment) for job in here]
    cell = goodput.next_cell(results, sweep.spec.options.attainment)
    if cell is None:
        return None
    rates = tuple(dict.fromkeys([*sweep.spec.axes["request_rate"], cell.request_rate]))
    sweep.spec = sweep.ledger.spec = dataclasses.replace(sweep.spec, axes={**sweep.spec.axes, "request_rate": rates})
    name, prompts = cell_name(cell, sweep.spec.varied), {cell.workload: load_prompts(cell.workload)}
    [job] = planning.make_jobs(
        sweep.spec,
        [cell],
        [name],
        {cell: group[0].model},
        prompts,
        sweep.place.environment,
        sweep.place.room,
        sweep.folder,
    )
    job.started_ms = int(time.time() * 1000)
    sweep.jobs.append(job)
    cast(list[Job], group).append(job)
    _write_plan(sweep)
    write_job(job)
    sweep.ledger.begin(job)
    return job


def _count(group: Group, outcome: GroupOutcome) -> None:
    """Add the outcome to each job of the group that it measured."""
    for own, job in enumerate(group):
        if own in outcome.measured:
            job.attempts.append((outcome, own))


def _take(sweep: _Sweep, group: Group, outcome: GroupOutcome) -> list[Job]:
    """Keep the results of a process. Returns the jobs that still need one, because it failed before it reached them.

    Raises KeyboardInterrupt if the process was interrupted.
    """
    _count(group, outcome)
    if outcome.interrupted:
        raise KeyboardInterrupt
    left = [job for own, job in enumerate(group) if own not in outcome.measured]
    if isinstance(outcome.error, NodeLost):
        _lose(sweep, left, outcome.error)
    elif outcome.error:
        _fail_in(sweep, group, outcome)
    for job in group:
        if job.measured and job.row is None:
            _succeed(sweep, job)
    return [job for job in left if job.row is None] if outcome.error else []


def _lose(sweep: _Sweep, left: Sequence[Job], error: NodeLost) -> None:
    """Count a lost machine for its unmeasured jobs: they are retried, and fail after more than `MOST_LOSSES` losses."""
    sweep.watcher.note(f"{error} {len(left)} cells of its group had not been measured.")
    for job in left:
        job.lost += 1
        if job.lost > MOST_LOSSES:
            _fail(
                sweep,
                job,
                "crashed",
                Failure("measuring", f"{error} This cell was lost in this way {job.lost} times."),
            )


def _not_hopeless(sweep: _Sweep, waiting: Sequence[Job]) -> list[Job]:
    """Return the jobs that are worth trying. Those that need at least as much as a failed one become `skipped`."""
    left = []
    for job in waiting:
        smaller = next(
            (
                one
                for one in sweep.failed
                if needs_no_less(job.cell, one[0], ignore_shape=one[2], compare_time=one[1] == "timeout")
            ),
            None,
        )
        if smaller is None:
            left.append(job)
            continue
        what = (
            "loading it"
            if smaller[2]
            else f"batch_size={smaller[0].batch_size} with {smaller[0].prompt_tokens or 'auto'} + "
            f"{smaller[0].output_tokens} tokens"
        )
        _fail(
            sweep,
            job,
            "skipped",
            Failure("planning", f"Not tried: {what} ended with {smaller[1]}, and this cell needs at least as much."),
        )
    return left


def _fail_in(sweep: _Sweep, waiting: Group, outcome: GroupOutcome) -> None:
    """Record the failure of the cell at which the worker failed, or of all cells if loading failed."""
    error = outcome.error
    word = getattr(error, "outcome", "error")
    loading = outcome.current is None
    failed = [job for job in waiting if job.row is None] if outcome.current is None else [waiting[outcome.current]]
    for job in failed:
        if not job.measured:
            _fail(sweep, job, word, Failure(outcome.stage if loading else "measuring", str(error)), outcome)
    if word in ("oom", "timeout"):
        sweep.failed.append((failed[0].cell, word, loading))


def _succeed(sweep: _Sweep, job: Job, draw: bool = True) -> None:
    if len(env_hashes(job)) > 1:
        _fail(sweep, job, "error", Failure("measuring", MIXED), draw=draw)
        return
    _keep(sweep, job, measured_result(job, sweep.spec, sweep.place.environment), draw)


def _fail(
    sweep: _Sweep, job: Job, word: str, failure: Failure, outcome: GroupOutcome | None = None, draw: bool = True
) -> None:
    sweep.watcher.cell(sweep.jobs.index(job) + 1, job.name)
    sweep.watcher.note(f"{job.name}: {word}: {failure.message}")
    _keep(sweep, job, failed_result(job, sweep.spec, sweep.place.environment, word, failure, outcome), draw)


def _keep(sweep: _Sweep, job: Job, result: RunResult, draw: bool = True) -> None:
    """Write the files of a cell, upload them and end its run."""
    result = redact_all(result)
    folder = job.folder / "artifacts"
    with sweep.ledger.noted(f"the files of {job.name}"):
        write_job(job)
        files.write_cell(result, folder)
    if draw:
        with sweep.ledger.noted(f"the charts of {job.name}"):
            files.draw_cell(result, folder / "charts")
    job.row = row_of(result)  # if interrupted before this line, `_finish` repeats the cell
    sweep.ledger.upload(job, result)
