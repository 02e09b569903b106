"""Run a plan: resolve the models, refuse cells that cannot work, then start one worker per group and one run per cell.

The command line, MLproject and Python all call `run`. While a worker measures on this machine, this process only
watches it: runs are uploaded when their group has ended. A `Place` measures the groups, on this machine or on a
cluster. This thread writes and uploads all results.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config.cells import asked_params, cell_name, group_cells, sweep_name
from ..config.spec import BenchSpec, parse
from ..measure import quality_order
from ..measure.journal import claim, new_sweep, read_result, write_json
from ..records.cell import Cell
from ..records.results import Failure, ModelFacts
from ..reports import files
from ..reports.result import Row, format_table, with_figures
from ..reports.sweep import Subject
from ..tracking import runs
from ..tracking.store import ui_command
from ..workloads.prompts import prompts_of
from . import planning, resume
from .cross_cell import relate
from .executor import Place
from .local_executor import Here
from .loop import _count, _fail, _measure, _search, _succeed, _Sweep, _write_plan
from .mlflow_runs import Ledger
from .planning import expand, resolve_models
from .progress import Silent, Watcher

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
        return format_table(self.rows, self.varied)


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
    groups = [group.cells for group in group_cells(cells)]
    model_of = resolve_models(groups, spec.options.on)
    planning.refuse_twins(cells, model_of)
    names = [cell_name(cell, spec.varied) for cell in cells]
    asked = {k: str(v) for k, v in parameters.items() if isinstance(v, str)}
    parent_name = sweep_name(spec) if len(cells) > 1 or spec.options.find else None
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
    names = [cell_name(cell, spec.varied) for cell in cells]
    parent_name = sweep_name(spec) if len(cells) > 1 else None
    sweep = _prepare(
        spec, cells, names, dict.fromkeys(cells, model), {}, store, parent_name, watcher or Silent(), place
    )
    by_cell = {job.cell: job for job in sweep.jobs}
    sweep.groups = [[by_cell[cell] for cell in group.cells] for group in group_cells(cells)]
    return _drive(sweep)


def _open_place(spec: BenchSpec, watcher: Watcher) -> Place:
    """Return this machine, or connect to the requested cluster. Raises LlmbenchError if that fails."""
    if spec.options.on == "here":
        return Here(spec.options)
    from . import ray_executor

    return ray_executor.connect(spec.options, str(spec.axes["device"][0]), watcher.note)


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
    quality_order.require(spec.options)
    ledger = Ledger(spec, parent_name, watcher.note)
    ledger.open(*where)
    if ledger.store:
        runs.refuse_other_params(ledger.store, asked_params(spec) | dict(asked))
    folder = new_sweep(spec.options.output_dir)
    given = ledger.store.given_run_id if ledger.store else None
    ledger.folder, ledger.asked = folder, asked if given else {}
    planned = planning.make_jobs(spec, cells, names, model_of, prompts, place.environment, place.room, folder)
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
        ui_command(ledger.address),
        page,
        (*ledger.unwritten, *ledger.missed),
        sweep.related.sentences,
    )


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
            job.row = with_figures(job.row, figures) if job.row else None
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
            place = ui_command(ledger.address), ledger.store.experiment_id if ledger.store else ""
            subject = Subject(sweep.spec, ledger.parent_name, sweep.folder.name, *place)
            files.write_sweep(measured, subject, sweep.folder / "comparison", draw)
        ledger.finish(measured, sweep.folder / "comparison", outcome, sweep.related.figures)
    with ledger.noted("how the command ended"):
        write_json(sweep.folder / "ended.json", {"outcome": outcome})
    if outcome != "interrupted":
        ledger.retry(sweep.jobs)
