"""Run a plan: resolve the models, refuse cells that cannot work, then start one worker per group and one run per cell.

The command line, MLproject and Python all call `run`. While a worker measures on this machine, this process only
watches it: runs are uploaded when their group has ended. A `Place` measures the groups, on this machine or on a
cluster. This thread writes and uploads all results.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from . import artifacts, estimate, goodput, interpreter, jobs, overview, plan, reference, report, resume, tracking
from .backends.base import backend_class
from .cell import Cell
from .errors import MissingError, NodeLost, UsageError
from .jobs import Job
from .journal import claim, new_sweep, read_result, write_json
from .ledger import Ledger
from .place import Group, Here, Place
from .records import Failure, ModelFacts, RunResult
from .redaction import redact_all
from .relations import Relations, relate
from .report import Row
from .spec import BenchSpec, parse
from .supervise import GroupOutcome
from .watcher import Silent, Watcher
from .workload import load_prompts, prompts_of

MOST_CELLS = 5000

MOST_LOSSES = 3
"""Most times that a cell is given to another machine of a cluster after its machine was lost."""

MIXED = (
    "The processes of this cell ran on nodes that differ, so they make no result. Run it again, or on identical nodes."
)
UNREACHED = "The command ended before this cell was measured."


@dataclass(frozen=True)
class SweepResult:
    """Result of a command.

    `run_ids` are in the order of the planned cells, "" where a cell has no run. `parent_id` is None for a single cell.
    `page` is the page to open in the MLflow UI.
    """

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
    sentences: tuple[str, ...] = ()  # findings that need several cells

    @property
    def exit_code(self) -> int:
        """Exit code: 0 if every cell was measured or skipped and all was uploaded, 130 if interrupted, else 1."""
        return 130 if self.outcome == "interrupted" else int(self.outcome != "ok" or bool(self.not_uploaded))

    def table(self) -> str:
        """Return the comparison as text."""
        return report.format_table(self.rows, self.varied)


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


def run(
    *,
    tracking_uri: str | None = None,
    experiment: str | None = None,
    watcher: Watcher | None = None,
    **parameters: object,
) -> SweepResult:
    """Measure one configuration, or a sweep if a parameter has several values.

    `parameters` have the names, values and defaults of the command line (`model="opt-125m", quant="int8,int4"`, or a
    list). Raises LlmbenchError for an error found before anything starts. A cell that fails later is a row with its
    outcome.
    """
    spec = parse({name: value for name, value in parameters.items() if value is not None})
    cells = expand(spec)
    groups = [group.cells for group in plan.group_cells(cells)]
    model_of = resolve_models(groups, spec.options.on)
    jobs.refuse_twins(cells, model_of)
    names = [plan.cell_name(cell, spec.varied) for cell in cells]
    asked = {k: str(v) for k, v in parameters.items() if isinstance(v, str)}
    parent_name = plan.sweep_name(spec) if len(cells) > 1 or spec.options.find else None
    watcher = watcher or Silent()
    with contextlib.closing(_open_place(spec, watcher)) as place:
        sweep = _prepare(spec, cells, names, model_of, asked, (tracking_uri, experiment), parent_name, watcher, place)
        by_cell = {job.cell: job for job in sweep.jobs}
        sweep.groups = [[by_cell[cell] for cell in group] for group in groups]
        if spec.options.find and isinstance(place, Here):
            place.ask = lambda group, outcome: _search(sweep, group, outcome)
        return _drive(sweep)


def run_sides(
    spec: BenchSpec,
    cells: Sequence[Cell],
    names: Sequence[str],
    store: tuple[str | None, str | None],
    watcher: Watcher | None = None,
) -> SweepResult:
    """Measure a given list of cells, each in its own processes, in alternating order: A B, then B A, then A B, …

    The cells need not be a product of lists, and two of them may be the same. `spec` holds the parameters of all of
    them. `store` is a tracking URI and an experiment name.
    """
    model_of = resolve_models([(cell,) for cell in cells])
    sweep = _prepare(
        spec, cells, names, model_of, {}, store, " against ".join(names), watcher or Silent(), Here(spec.options)
    )
    sweep.groups = [[job] for job in sweep.jobs]
    return _drive(sweep)


def run_in(
    place: Place,
    spec: BenchSpec,
    model: ModelFacts,
    store: tuple[str | None, str | None],
    watcher: Watcher | None = None,
) -> SweepResult:
    """Measure a specification of one model, already resolved, in the given place. `store` is as in `run_sides`."""
    cells = expand(spec)
    names = [plan.cell_name(cell, spec.varied) for cell in cells]
    parent_name = plan.sweep_name(spec) if len(cells) > 1 else None
    sweep = _prepare(
        spec, cells, names, dict.fromkeys(cells, model), {}, store, parent_name, watcher or Silent(), place
    )
    by_cell = {job.cell: job for job in sweep.jobs}
    sweep.groups = [[by_cell[cell] for cell in group.cells] for group in plan.group_cells(cells)]
    return _drive(sweep)


def expand(spec: BenchSpec) -> list[Cell]:
    """Return the cells of a specification. Raises UsageError if there are more than `MOST_CELLS`."""
    cells = plan.expand_cells(spec)
    if len(cells) > MOST_CELLS:
        raise UsageError(f"The lists make {len(cells)} cells, and the maximum is {MOST_CELLS}. Give shorter lists.")
    return cells


def resolve_models(
    groups: Sequence[Sequence[Cell]], on: str = "here", lacking: dict[Cell, str] | None = None
) -> dict[Cell, ModelFacts]:
    """Return the model of each cell. `groups` are cells that share a model.

    Raises UsageError if every cell exceeds its model's context or has settings that exclude each other. Otherwise such
    cells are refused later, one by one. Raises MissingError if a quantization needs a package that is not installed
    here. If `lacking` is given, that message is stored in it for each cell concerned instead.
    """

    def resolve(group: Sequence[Cell]) -> ModelFacts:
        # A cluster has other devices than this machine.
        cell = group[0] if on == "here" else dataclasses.replace(group[0], device="cpu")
        _refuse_unknown_paths(cell)
        try:
            return interpreter.resolve(cell)
        except MissingError as error:
            if lacking is None or cell.quant == "none":
                raise
            lacking.update(dict.fromkeys(group, str(error)))
            plain = reference.sibling(cell)  # the same model unquantized, which needs only transformers
            return backend_class(plain.backend).resolve(plain)

    facts = [resolve(group) for group in groups]
    model_of = {cell: model for group, model in zip(groups, facts, strict=True) for cell in group}
    messages = [
        estimate.beyond_context(cell, model) or estimate.contradiction(cell) for cell, model in model_of.items()
    ]
    if all(messages):
        raise UsageError(str(messages[0]))
    return model_of


def _refuse_unknown_paths(cell: Cell) -> None:
    """Raise UsageError if the backend lacks a decode path, history, batching or KV cache that the cell asks for.

    Without this check another path could be measured under the requested name.
    """
    known = backend_class(cell.backend).capabilities
    if cell.decode not in known.decodes:
        raise UsageError(f"backend={cell.backend} has no decode={cell.decode}. Use decode={','.join(known.decodes)}.")
    if cell.history in ("recomputed", "kept") and not known.conversations:
        raise UsageError(
            f"backend={cell.backend} cannot be measured turn by turn with history={cell.history}. Use history=none."
        )
    if cell.batching == "continuous" and not known.continuous:
        raise UsageError(f"backend={cell.backend} has no batching=continuous. Use batching=static or dynamic.")
    if cell.kv_cache is not None and cell.kv_cache not in known.kv_caches:
        raise UsageError(
            f"backend={cell.backend} has no kv_cache={cell.kv_cache}. "
            f"Use kv_cache={','.join(['auto', *known.kv_caches])}."
        )


def _open_place(spec: BenchSpec, watcher: Watcher) -> Place:
    """Return this machine, or connect to the requested cluster. Raises LlmbenchError if that fails."""
    if spec.options.on == "here":
        return Here(spec.options)
    from . import cluster

    return cluster.connect(spec.options, str(spec.axes["device"][0]), watcher.note)


def _prepare(
    spec: BenchSpec,
    cells: Sequence[Cell],
    names: Sequence[str],
    model_of: Mapping[Cell, ModelFacts],
    asked: Mapping[str, str],
    where: tuple[str | None, str | None],
    parent_name: str | None,
    watcher: Watcher,
    place: Place,
) -> _Sweep:
    """Open the store, create the sweep's folder and make the jobs: everything that can fail before measuring.

    `asked` are the parameters as the user wrote them, `where` is a tracking URI and an experiment name.
    """
    prompts = prompts_of(cells)
    reference.require(spec.options)
    ledger = Ledger(spec, parent_name, watcher.note)
    ledger.open(*where)
    if ledger.store:
        tracking.refuse_other_params(ledger.store, plan.asked_params(spec) | dict(asked))
    folder = new_sweep(spec.options.output_dir)
    given = ledger.store.given_run_id if ledger.store else None
    ledger.folder, ledger.asked = folder, asked if given else {}
    planned = jobs.make_jobs(spec, cells, names, model_of, prompts, place.environment, place.room, folder)
    return _Sweep(spec, planned, [], ledger, folder, place, watcher)


def _drive(sweep: _Sweep) -> SweepResult:
    """Open the runs, measure group by group, upload. Every run that was begun is ended, whatever happens."""
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
            for group, left in sweep.place.stop():
                _count(group, left)
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
        "tracking_uri": store.uri if store else None,
        "environment": sweep.place.environment,
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
        sweep.related.sentences,
    )


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
        sweep.watcher.note(f"{job.name}: measured before, in {found.linked}. To measure it again: rerun=true.")
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


def _tell(sweep: _Sweep, group: Group, event: Mapping[str, Any]) -> None:
    """Handle an event of a group: begin its runs when it begins, and pass progress on to the watcher."""
    job = group[event["number"]] if event["event"] in ("cell", "measured") else group[0]
    if event["event"] == "begun":
        for one in group:
            if not one.started_ms:
                one.started_ms = int(time.time() * 1000)
                jobs.write_job(one)
                sweep.ledger.begin(one)
    if event["event"] == "withheld" and event["message"] not in sweep.told:
        sweep.told.add(event["message"])
        sweep.watcher.note(event["message"])
    number, node = sweep.jobs.index(job) + 1, event.get("node")
    if node is None:
        if event["event"] in ("begun", "cell") or event.get("stage") in ("preparing", "reference"):
            sweep.watcher.cell(number, job.name)
        sweep.watcher.event(event)
    elif event["event"] == "cell":  # several at once: a line at the begin, the count at the end
        sweep.watcher.note(f"{job.name}: measuring on {node}")
    elif event["event"] == "measured":
        sweep.watcher.cell(number, job.name)
        sweep.watcher.event(event)


def _search(sweep: _Sweep, group: Group, outcome: GroupOutcome) -> Job | None:
    """Return the next cell of a search as a job, chosen from the results so far and added to the group.

    Returns None when the search has ended.
    """
    here = [
        dataclasses.replace(job, attempts=[(outcome, own)]) for own, job in enumerate(group) if own in outcome.measured
    ]
    results = [jobs.measured_result(job, sweep.spec, sweep.place.environment) for job in here]
    cell = goodput.next_cell(results, sweep.spec.options.attainment)
    if cell is None:
        return None
    rates = tuple(dict.fromkeys([*sweep.spec.axes["request_rate"], cell.request_rate]))
    sweep.spec = sweep.ledger.spec = dataclasses.replace(sweep.spec, axes={**sweep.spec.axes, "request_rate": rates})
    name, prompts = plan.cell_name(cell, sweep.spec.varied), {cell.workload: load_prompts(cell.workload)}
    [job] = jobs.make_jobs(
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
    jobs.write_job(job)
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
                if plan.needs_no_less(job.cell, one[0], of_any_shape=one[2], of_time=one[1] == "timeout")
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
    if len(jobs.env_hashes(job)) > 1:
        _fail(sweep, job, "error", Failure("measuring", MIXED), draw=draw)
        return
    _keep(sweep, job, jobs.measured_result(job, sweep.spec, sweep.place.environment), draw)


def _fail(
    sweep: _Sweep, job: Job, word: str, failure: Failure, outcome: GroupOutcome | None = None, draw: bool = True
) -> None:
    sweep.watcher.cell(sweep.jobs.index(job) + 1, job.name)
    sweep.watcher.note(f"{job.name}: {word}: {failure.message}")
    _keep(sweep, job, jobs.failed_result(job, sweep.spec, sweep.place.environment, word, failure, outcome), draw)


def _keep(sweep: _Sweep, job: Job, result: RunResult, draw: bool = True) -> None:
    """Write the files of a cell, upload them and end its run."""
    result = redact_all(result)
    folder = job.folder / "artifacts"
    with sweep.ledger.noted(f"the files of {job.name}"):
        jobs.write_job(job)
        artifacts.write_cell(result, folder)
    if draw:
        with sweep.ledger.noted(f"the charts of {job.name}"):
            artifacts.draw_cell(result, folder / "charts")
    job.row = report.row_of(result)  # if interrupted before this line, `_finish` repeats the cell
    sweep.ledger.upload(job, result)


def _relate(sweep: _Sweep) -> None:
    """Add metrics and findings that need several cells (`twin` pairs, the limits of `find`), if they were requested."""
    options = sweep.spec.options
    if not (options.twin or options.find):
        return
    with sweep.ledger.noted("what the cells say together"):
        whole = [job for job in sweep.jobs if job.row and job.row.outcome == "ok"]
        results = [read_result(job.folder / "artifacts") for job in whole]
        sweep.related = relate(results, [job.name for job in whole], options)
        for job, result, figures in zip(whole, results, sweep.related.added, strict=True):
            job.row = report.with_figures(job.row, figures) if job.row else None
            sweep.ledger.add(job.run_id, f"what the server adds to {job.name}", figures, result.ended_ms)
        if options.find:
            write_json(sweep.folder / "comparison" / "goodput.json", sweep.related.as_json())


def _finish(sweep: _Sweep, outcome: str) -> None:
    """End everything that is still open, quick steps first: after an interruption only seconds are left.

    Charts are not drawn then; they can be drawn later.
    """
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
    _relate(sweep)
    measured = [(job.row, job.run_id) for job in sweep.jobs if job.row]
    if ledger.parent_name is not None:
        with ledger.noted("the comparison"):
            place = tracking.ui_command(ledger.address), ledger.store.experiment_id if ledger.store else ""
            subject = overview.Subject(sweep.spec, ledger.parent_name, sweep.folder.name, *place)
            artifacts.write_sweep(measured, subject, sweep.folder / "comparison", draw)
        ledger.finish(measured, sweep.folder / "comparison", outcome, sweep.related.figures)
    with ledger.noted("how the command ended"):
        write_json(sweep.folder / "ended.json", {"outcome": outcome})
    if outcome != "interrupted":
        ledger.retry(sweep.jobs)
