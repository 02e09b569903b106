"""Run a plan: resolve, refuse what cannot work, then one worker per group of cells, and one MLflow run per cell.

One function, `run`, stands behind the command line, MLproject and Python. Nothing of this process runs while a worker
measures, except the watch over it: runs are uploaded when their group has ended.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from . import artifacts, charts, estimate, jobs, machine, plan, reference, report, resume, supervise, tracking
from .backends.base import backend_class
from .errors import JournalError, UsageError
from .jobs import Job
from .journal import claim, new_sweep, write_json
from .ledger import Ledger
from .records import Cell, Failure, ModelFacts, RunResult
from .report import Row
from .spec import BenchSpec, parse
from .supervise import GroupOutcome, Limits
from .workload import load_prompts

MOST_CELLS = 2000

UNREACHED = "The command ended before this cell was measured."


class Watcher(Protocol):
    """Who is told how a sweep goes on; `progress.Progress` is one."""

    def start(self, total_cells: int) -> None:
        """The plan stands."""

    def cell(self, number: int, name: str) -> None:
        """Cell `number` of the plan is next; also for a cell that ends without a worker."""

    def event(self, event: Mapping[str, Any]) -> None:
        """A worker's event."""

    def note(self, text: str) -> None:
        """A line for the person who waits."""

    def finish(self) -> None:
        """Nothing more comes."""


class Silent:
    """A watcher that tells nobody."""

    def start(self, total_cells: int) -> None:
        """Say nothing."""

    def cell(self, number: int, name: str) -> None:
        """Say nothing."""

    def event(self, event: Mapping[str, Any]) -> None:
        """Say nothing."""

    def note(self, text: str) -> None:
        """Say nothing."""

    def finish(self) -> None:
        """Say nothing."""


@dataclass(frozen=True)
class SweepResult:
    """What a command left. `run_ids` belong to `rows`; `parent_id` is None for a single cell; `page` is the UI's page to open."""

    rows: tuple[Row, ...]
    varied: tuple[str, ...]
    outcome: str
    folder: Path
    run_ids: tuple[str, ...]
    parent_id: str | None
    tracking_uri: str
    experiment_id: str
    ui: str
    page: str
    not_uploaded: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """0 if every cell was measured or skipped, and all of it uploaded; 130 when interrupted; else 1."""
        return 130 if self.outcome == "interrupted" else int(self.outcome != "ok" or bool(self.not_uploaded))

    def table(self) -> str:
        """The comparison as text."""
        return report.format_table(self.rows, self.varied)


@dataclass
class _Sweep:
    """State of one command. `groups` are the jobs by what has to be loaded for them."""

    spec: BenchSpec
    jobs: list[Job]
    groups: list[list[Job]]
    ledger: Ledger
    folder: Path
    environment: dict[str, Any]
    watcher: Watcher
    no_reference: dict[str, str] = field(default_factory=dict)  # why quality has nothing to be compared with
    failed: list[tuple[Cell, str, bool]] = field(default_factory=list)  # cell, outcome, whether its load failed


def run(*, tracking_uri: str | None = None, experiment: str | None = None, watcher: Watcher | None = None, **parameters: object) -> SweepResult:
    """Measure one configuration, or a sweep where a parameter has several values.

    `parameters` have the names, values and defaults of the vocabulary (`model="opt-125m", quant="int8,int4"`, or a list).
    Raises LlmbenchError for what is wrong before anything starts; a cell that fails later is a row with its outcome.
    """
    spec = parse({name: value for name, value in parameters.items() if value is not None})
    cells = plan.expand_cells(spec)
    if len(cells) > MOST_CELLS:
        raise UsageError(f"The lists make {len(cells)} cells, and {MOST_CELLS} are the most. Give shorter lists.")
    groups = [group.cells for group in plan.group_cells(cells)]
    model_of = _resolve(groups)
    jobs.refuse_twins(cells, model_of)
    names = [plan.cell_name(cell, spec.varied) for cell in cells]
    asked = {k: str(v) for k, v in parameters.items() if isinstance(v, str)}
    sweep = _prepare(spec, cells, names, model_of, asked, (tracking_uri, experiment), plan.sweep_name(spec) if len(cells) > 1 else None, watcher)
    by_cell = {job.cell: job for job in sweep.jobs}
    sweep.groups = [[by_cell[cell] for cell in group] for group in groups]
    return _drive(sweep)


def run_sides(
    spec: BenchSpec, cells: Sequence[Cell], names: Sequence[str], store: tuple[str | None, str | None], watcher: Watcher | None = None
) -> SweepResult:
    """Measure cells that are no product of lists, each in processes of its own, in turns: A B, then B A, then A B, …

    `spec` holds the parameters of all of them; `store` is a tracking URI and an experiment. Two cells may be the same.
    """
    model_of = _resolve([(cell,) for cell in cells])
    sweep = _prepare(spec, cells, names, model_of, {}, store, " against ".join(names), watcher)
    sweep.groups = [[job] for job in sweep.jobs]
    return _drive(sweep)


def _resolve(groups: Sequence[Sequence[Cell]]) -> dict[Cell, ModelFacts]:
    """The model of each cell. Raises UsageError if no cell at all fits its model's context; single ones are refused one by one."""
    facts = [backend_class(group[0].backend).resolve(group[0]) for group in groups]
    model_of = {cell: model for group, model in zip(groups, facts, strict=True) for cell in group}
    messages = [estimate.beyond_context(cell, model) for cell, model in model_of.items()]
    if all(messages):
        raise UsageError(str(messages[0]))
    return model_of


def _prepare(
    spec: BenchSpec,
    cells: Sequence[Cell],
    names: Sequence[str],
    model_of: Mapping[Cell, ModelFacts],
    asked: Mapping[str, str],
    where: tuple[str | None, str | None],
    parent_name: str | None,
    watcher: Watcher | None,
) -> _Sweep:
    """The folder, the store, the jobs: all that can be wrong before anything is measured."""
    prompts = {workload: load_prompts(workload) for workload in dict.fromkeys(cell.workload for cell in cells)}
    watcher = watcher or Silent()
    ledger = Ledger(spec, parent_name, watcher.note)
    ledger.open(*where)
    if ledger.store:
        tracking.refuse_other_params(ledger.store, plan.asked_params(spec) | dict(asked))
    folder = new_sweep(spec.options.output_dir)
    environment = machine.environment(str(Path(__file__).parent))
    given = ledger.store.given_run_id if ledger.store else None
    ledger.folder, ledger.asked = folder, asked if given else {}
    planned = jobs.make_jobs(spec, cells, names, model_of, prompts, environment, folder)
    return _Sweep(spec, planned, [], ledger, folder, environment, watcher)


def _drive(sweep: _Sweep) -> SweepResult:
    """Open the runs, measure group by group, upload, and end every run that was begun, whatever happens."""
    ledger = sweep.ledger
    with claim(sweep.folder):
        _write_plan(sweep)
        if ledger.store:
            resume.close_abandoned(sweep.spec.options.output_dir, ledger.store, sweep.watcher.note)
        ledger.begin_parent()
        sweep.watcher.start(len(sweep.jobs))
        outcome = "error"
        try:
            _measure(sweep)
            outcome = "ok" if all(job.row and job.row.outcome in ("ok", "skipped") for job in sweep.jobs) else "error"
        except KeyboardInterrupt:
            outcome = "interrupted"
        finally:
            _finish(sweep, outcome)
            sweep.watcher.finish()
    return _summary(sweep, outcome)


def _write_plan(sweep: _Sweep) -> None:
    store = sweep.ledger.store
    known = {
        "parameters": plan.asked_params(sweep.spec) | plan.option_params(sweep.spec),
        "cells": len(sweep.jobs),
        "order": [job.folder.name for job in sweep.jobs],
        "parent": sweep.ledger.parent_name,
        "tracking_uri": tracking.without_password(store.uri) if store else None,
        "environment": sweep.environment,
    }
    write_json(sweep.folder / "sweep.json", known)


def _summary(sweep: _Sweep, outcome: str) -> SweepResult:
    ledger, ids = sweep.ledger, tuple(job.run_id for job in sweep.jobs)
    store = ledger.store
    page = ledger.page or ""
    if store and not page:
        page = f"#/experiments/{store.experiment_id}" + (f"/runs/{ids[0]}" if ledger.parent_name is None else "")
    return SweepResult(
        tuple(job.row for job in sweep.jobs if job.row),
        tuple(sweep.spec.varied),
        outcome,
        sweep.folder,
        ids,
        ledger.parent_id,
        ledger.address,
        store.experiment_id if store else "",
        tracking.ui_command(ledger.address),
        page,
        (*ledger.unwritten, *ledger.missed),
    )


def _measure(sweep: _Sweep) -> None:
    """Every cell that is neither refused nor known, in as many rounds as processes were asked for, each in turn from the other end.

    What drifts with time then meets all cells alike: in A B, B A, A B, … (Kalibera and Jones 2013 call for processes in turns).
    """
    for job in sweep.jobs:
        if job.refused:
            _fail(sweep, job, "refused", Failure("planning", job.refused))
        elif not sweep.spec.options.rerun:
            _link(sweep, job)
    for number in range(max(job.cell.processes for job in sweep.jobs)):
        for group in sweep.groups[:: -1 if number % 2 else 1]:
            _run_group(sweep, group, number)


def _link(sweep: _Sweep, job: Job) -> None:
    """Take over the result of a cell that was measured before."""
    found = resume.find(job, sweep.spec, sweep.ledger.store)
    if found:
        sweep.watcher.cell(sweep.jobs.index(job) + 1, job.name)
        sweep.watcher.note(f"{job.name}: measured before, in {found.linked}; rerun=true measures again.")
        job.started_ms = found.started_ms
        _keep(sweep, job, found)


def _run_group(sweep: _Sweep, group: Sequence[Job], number: int) -> None:
    """Measure the cells of one load in one process; after a failure the rest, which is smaller, goes on in a new one."""
    waiting = _not_hopeless(sweep, [job for job in group if job.row is None])
    if waiting and number == 0 and not _fetch(sweep, waiting):
        return
    while waiting:
        for job in waiting:
            if not job.started_ms:
                job.started_ms = int(time.time() * 1000)
                jobs.write_job(job)
                sweep.ledger.begin(job)
        outcome = _run_once(sweep, waiting)
        for own, job in enumerate(waiting):
            if own in outcome.measured:
                job.attempts.append((outcome, own))
        if outcome.interrupted:
            raise KeyboardInterrupt
        if outcome.error:
            _fail_in(sweep, waiting, outcome)
        for job in waiting:
            if job.measured and job.row is None:
                _succeed(sweep, job)
        left = [job for own, job in enumerate(waiting) if job.row is None and own not in outcome.measured]
        waiting = _not_hopeless(sweep, left) if outcome.error else []


def _run_once(sweep: _Sweep, waiting: Sequence[Job]) -> GroupOutcome:
    def tell(event: Mapping[str, Any]) -> None:
        if event["event"] == "cell":
            sweep.watcher.cell(sweep.jobs.index(waiting[event["number"]]) + 1, waiting[event["number"]].name)
        sweep.watcher.event(event)

    sweep.watcher.cell(sweep.jobs.index(waiting[0]) + 1, waiting[0].name)
    options = sweep.spec.options
    most, called = estimate.memory_limit(options.memory_limit)
    limits = Limits(
        options.load_timeout_s, options.first_token_timeout_s, options.repetition_timeout_s, options.cell_timeout_s, most, called
    )  # fmt: skip
    log = waiting[0].folder / "worker.log"
    cells, folders = [job.cell for job in waiting], [job.folder for job in waiting]
    try:
        quality = reference.order(sweep.spec, waiting, sweep.no_reference, tell, sweep.watcher.note, limits)
        return supervise.run_worker("measure", cells, waiting[0].model, folders, log, tell, limits, quality)
    except JournalError as error:
        return GroupOutcome(error=error)


def _fetch(sweep: _Sweep, waiting: Sequence[Job]) -> bool:
    """Fetch or write the model's files in a process of its own, so that neither its time nor its memory is measured."""
    job = waiting[0]
    if job.model.source in ("folder", "gguf", "none"):
        return True
    sweep.watcher.cell(sweep.jobs.index(job) + 1, job.name)
    sweep.watcher.event({"event": "stage", "stage": "preparing"})
    outcome = supervise.run_worker("prepare", [job.cell], job.model, [job.folder], job.folder / "prepare.log")
    if outcome.interrupted:
        raise KeyboardInterrupt
    if outcome.error:
        for one in waiting:
            _fail(sweep, one, getattr(outcome.error, "outcome", "error"), Failure("preparing", str(outcome.error)))
    return outcome.error is None


def _not_hopeless(sweep: _Sweep, waiting: Sequence[Job]) -> list[Job]:
    """The jobs that are worth trying; those that need at least what another one did not get become `skipped`."""
    left = []
    for job in waiting:
        smaller = next((one for one in sweep.failed if plan.needs_no_less(job.cell, one[0], of_any_shape=one[2])), None)
        if smaller is None:
            left.append(job)
            continue
        what = (
            "loading it"
            if smaller[2]
            else f"batch_size={smaller[0].batch_size} with {smaller[0].prompt_tokens or 'auto'} + {smaller[0].output_tokens} tokens"
        )
        _fail(sweep, job, "skipped", Failure("planning", f"Not tried: {what} ended with {smaller[1]}, and this cell needs no less."))
    return left


def _fail_in(sweep: _Sweep, waiting: Sequence[Job], outcome: GroupOutcome) -> None:
    """Record the cell that a worker failed in, or all of them if it failed to load."""
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
    _keep(sweep, job, jobs.measured_result(job, sweep.spec, sweep.environment), draw)


def _fail(sweep: _Sweep, job: Job, word: str, failure: Failure, outcome: GroupOutcome | None = None, draw: bool = True) -> None:
    sweep.watcher.cell(sweep.jobs.index(job) + 1, job.name)
    sweep.watcher.note(f"{job.name}: {word}: {failure.message}")
    _keep(sweep, job, jobs.failed_result(job, sweep.spec, sweep.environment, word, failure, outcome), draw)


def _keep(sweep: _Sweep, job: Job, result: RunResult, draw: bool = True) -> None:
    """Write the files of a cell, then upload them, and end its run."""
    job.row = report.row_of(result)
    folder = job.folder / "artifacts"
    with sweep.ledger.noted(f"the files of {job.name}"):
        jobs.write_job(job)
        artifacts.write_cell(result, folder)
    if draw:
        with sweep.ledger.noted(f"the charts of {job.name}"):
            charts.draw_cell(result, folder / "charts")
    sweep.ledger.upload(job, result)


def _finish(sweep: _Sweep, outcome: str) -> None:
    """End what is still open, the quick things first: after an interruption there are seconds left, and charts can be drawn later."""
    ledger, draw = sweep.ledger, outcome != "interrupted"
    unfinished = [job for job in sweep.jobs if job.row is None and not job.measured]
    for job in unfinished:
        if job.run_id:
            ledger.end(job.run_id, "interrupted" if outcome == "interrupted" else "error")
    if ledger.parent_id and outcome == "interrupted":
        ledger.end(ledger.parent_id, outcome)
    for job in sweep.jobs:
        if job.row is None and job.measured:
            _succeed(sweep, job, draw)
    for job in unfinished:
        word = "interrupted" if outcome == "interrupted" else "error"
        failure = Failure("measuring" if job.started_ms else "waiting", UNREACHED)
        if job.started_ms or ledger.parent_name is None:
            _fail(sweep, job, word, failure, draw=draw)
        else:
            job.row = Row(job.cell, word, message=failure.message)
    measured = [(job.row, job.run_id) for job in sweep.jobs if job.row]
    if ledger.parent_name is not None:
        with ledger.noted("the comparison"):
            artifacts.write_sweep([row for row, _ in measured], sweep.spec.varied, sweep.folder / "comparison", draw)
        ledger.finish(measured, sweep.folder / "comparison", outcome)
    with ledger.noted("how the command ended"):
        write_json(sweep.folder / "ended.json", {"outcome": outcome})
    if outcome != "interrupted":
        ledger.retry(sweep.jobs)
