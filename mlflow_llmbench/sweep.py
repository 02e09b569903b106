"""Run a plan: resolve, refuse what cannot work, then one worker per group of cells, and one MLflow run per cell.

One function, `run`, stands behind the command line, MLproject and Python. Nothing of this process runs while a worker
measures, except the watch over it: runs are uploaded when their group has ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from . import artifacts, charts, gpu, machine, memory, models, plan, report, supervise, tracking, upload
from .backends.base import backend_class
from .errors import UsageError, first_line
from .journal import new_sweep, write_json
from .records import Cell, Failure, Hashes, ModelFacts, Repetition, RunResult
from .report import Row
from .spec import BenchSpec, as_text, parse
from .supervise import GroupOutcome
from .workload import PromptSet, load_prompts

MOST_CELLS = 2000


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
class _Job:
    """One cell on its way: what is known of it before, and its run."""

    cell: Cell
    model: ModelFacts
    hashes: Hashes
    folder: Path
    name: str
    predicted: int | None
    refused: str | None = None
    run_id: str = ""
    started_ms: int = 0
    row: Row | None = None


@dataclass
class _Sweep:
    """State of one command."""

    spec: BenchSpec
    jobs: list[_Job]
    store: tracking.Store
    folder: Path
    environment: dict[str, Any]
    watcher: Watcher | None
    asked: Mapping[str, str]
    parent_id: str | None = None
    view: str | None = None
    not_uploaded: list[str] = field(default_factory=list)


def run(*, tracking_uri: str | None = None, experiment: str | None = None, watcher: Watcher | None = None, **parameters: object) -> SweepResult:
    """Measure one configuration, or a sweep where a parameter has several values.

    `parameters` have the names, values and defaults of the vocabulary (`model="opt-125m", quant="int8,int4"`, or a list).
    Raises LlmbenchError for what is wrong before anything starts; a cell that fails later is a row with its outcome.
    """
    spec = parse({name: value for name, value in parameters.items() if value is not None})
    cells = plan.expand_cells(spec)
    if len(cells) > MOST_CELLS:
        raise UsageError(f"The lists make {len(cells)} cells, and {MOST_CELLS} are the most. Give shorter lists.")
    prompts = {workload: load_prompts(workload) for workload in dict.fromkeys(cell.workload for cell in cells)}
    groups = plan.group_cells(cells)
    facts = [backend_class(group.first.backend).resolve(group.first) for group in groups]
    model_of = {cell: model for group, model in zip(groups, facts, strict=True) for cell in group.cells}
    _refuse_contexts(model_of)
    _refuse_twins(model_of)
    asked = {k: str(v) for k, v in parameters.items() if isinstance(v, str)}
    store = tracking.open_store(tracking_uri, experiment)
    tracking.refuse_other_params(store, plan.asked_params(spec) | asked)
    folder = new_sweep(spec.options.output_dir)
    environment = machine.environment(str(Path(__file__).parent))
    jobs = [_job(cell, model_of[cell], prompts[cell.workload], environment, folder, spec) for cell in cells]
    return _drive(_Sweep(spec, jobs, store, folder, environment, watcher, asked if store.given_run_id else {}))


def _refuse_twins(model_of: Mapping[Cell, ModelFacts]) -> None:
    """Raise UsageError if two cells are one configuration under two names: they would share a folder and a run."""
    first: dict[str, Cell] = {}
    for cell, model in model_of.items():
        twin = first.setdefault(plan.config_hash(cell, model), cell)
        if twin is not cell:
            raise UsageError(f"{twin.model} and {cell.model} are the same model, so their cells are the same. Leave one of them out.")


def _refuse_contexts(model_of: Mapping[Cell, ModelFacts]) -> None:
    """Raise UsageError if no cell at all fits its model's context; single cells of a sweep are refused one by one."""
    messages = [_context_message(cell, model) for cell, model in model_of.items()]
    if all(messages):
        raise UsageError(str(messages[0]))


def _context_message(cell: Cell, model: ModelFacts) -> str | None:
    asked = (cell.prompt_tokens or 0) + cell.output_tokens
    if model.context is None or asked <= model.context:
        return None
    return (
        f"prompt_tokens={as_text('prompt_tokens', cell.prompt_tokens)} + output_tokens={cell.output_tokens} is more than the context of {cell.model}, "
        f"{model.context} tokens. Ask for fewer tokens."
    )


def _job(cell: Cell, model: ModelFacts, prompts: PromptSet, environment: Mapping[str, Any], folder: Path, spec: BenchSpec) -> _Job:
    config = plan.config_hash(cell, model)
    shape = models.Shape.from_config(model.config) if model.config else None
    own = environment["hashes"]
    workload = prompts.digest(cell, shape.vocab_size if shape else None)
    hashes = Hashes(config, workload, own["hardware"], own["software"], own["env"])
    predicted = _predict(cell, model, shape)
    refused = _context_message(cell, model) or (None if spec.options.force else _memory_message(cell, predicted))
    return _Job(cell, model, hashes, folder / config, plan.cell_name(cell, spec.varied), predicted, refused)


def _predict(cell: Cell, model: ModelFacts, shape: models.Shape | None) -> int | None:
    """Estimated peak bytes of a cell, of loading or of generating, whichever is more; None if the architecture is unknown."""
    if shape is None:
        unpacked = {"fp32": 8, "fp16": 4, "bf16": 4}.get(cell.quant, 1) if model.source == "gguf" else 1
        return None if model.files_bytes is None else model.files_bytes * unpacked
    dtype = model.dtype if model.dtype in ("float32", "float16", "bfloat16") else "bfloat16"
    prompt = cell.prompt_tokens or 512
    running = models.memory_estimate(shape, cell.quant, dtype, cell.batch_size, prompt, cell.output_tokens)
    return max(running, models.load_memory_estimate(shape, cell.quant, dtype)) + models.PROCESS_BYTES


def _memory_message(cell: Cell, predicted: int | None) -> str | None:
    if machine.require_device(cell.device).startswith("cuda"):
        available, where = gpu.free_bytes(int(cell.device.partition(":")[2] or 0)), "on the GPU"
    else:
        available, where = memory.available_bytes(), "here"
    if predicted is None or available is None or predicted <= available:
        return None
    return (
        f"{cell.model} with quant={cell.quant}, batch_size={cell.batch_size} needs about {predicted / 1e9:.1f} GB, and {available / 1e9:.1f} GB are free {where}. "
        "Use a smaller model, batch or quantization, or try it all the same with force=true."
    )


def _drive(sweep: _Sweep) -> SweepResult:
    """Open the runs, measure group by group, upload, and end every run that was begun, whatever happens."""
    jobs, store = sweep.jobs, sweep.store
    write_json(sweep.folder / "sweep.json", {"parameters": plan.asked_params(sweep.spec), "cells": len(jobs)})
    if len(jobs) > 1:
        sweep.parent_id = tracking.begin_run(store, plan.sweep_name(sweep.spec), sweep=sweep.folder.name)
    if sweep.watcher:
        sweep.watcher.start(len(jobs))
    outcome = "error"
    try:
        for group in _groups(jobs):
            _run_group(sweep, group)
        outcome = "ok" if all(j.row and j.row.outcome in ("ok", "skipped") for j in jobs) else "error"
    except KeyboardInterrupt:
        outcome = "interrupted"
    finally:
        for job in jobs:
            if job.row is None:
                _close_unfinished(sweep, job, outcome)
        _finish_parent(sweep, outcome)
        if sweep.watcher:
            sweep.watcher.finish()
    rows = tuple(job.row for job in jobs if job.row)
    ids = tuple(job.run_id for job in jobs)
    ui = tracking.ui_command(store)
    page = sweep.view or f"#/experiments/{store.experiment_id}" + (f"/runs/{ids[0]}" if sweep.parent_id is None else "")
    return SweepResult(
        rows,
        tuple(sweep.spec.varied),
        outcome,
        sweep.folder,
        ids,
        sweep.parent_id,
        store.uri,
        store.experiment_id,
        ui,
        page,
        tuple(sweep.not_uploaded),
    )


def _groups(jobs: Sequence[_Job]) -> list[list[_Job]]:
    """The jobs again by load group."""
    by_cell = {job.cell: job for job in jobs}
    return [[by_cell[cell] for cell in group.cells] for group in plan.group_cells([job.cell for job in jobs])]


def _run_group(sweep: _Sweep, group: Sequence[_Job]) -> None:
    """Measure the cells of one load; after a failure the rest, which is smaller, goes on in a new worker."""
    for job in group:
        if job.refused:
            _fail(sweep, job, "refused", Failure("planning", job.refused))
    waiting = [job for job in group if not job.refused]
    if waiting and not _prepare(sweep, waiting):
        return
    while waiting:
        for job in waiting:
            if not job.run_id:
                _begin(sweep, job)
        outcomes: list[GroupOutcome] = []
        while len(outcomes) < waiting[0].cell.processes and not any(outcome.interrupted for outcome in outcomes):
            outcomes.append(_run_once(sweep, waiting))
        for number, job in enumerate(waiting):
            if all(number in outcome.measured for outcome in outcomes):
                _succeed(sweep, job, number, outcomes)
        if any(outcome.interrupted for outcome in outcomes):
            raise KeyboardInterrupt
        failed = next((outcome for outcome in outcomes if outcome.error), None)
        if failed is None:
            return
        waiting = _after_failure(sweep, [job for job in waiting if job.row is None], waiting, failed)


def _run_once(sweep: _Sweep, jobs: Sequence[_Job]) -> GroupOutcome:
    watcher = sweep.watcher

    def tell(event: Mapping[str, Any]) -> None:
        if watcher and event["event"] == "cell":
            watcher.cell(sweep.jobs.index(jobs[event["number"]]) + 1, jobs[event["number"]].name)
        if watcher:
            watcher.event(event)

    if watcher:
        watcher.cell(sweep.jobs.index(jobs[0]) + 1, jobs[0].name)
    for job in jobs:
        write_json(job.folder / "cell.json", {"cell": job.cell, "model": job.model, "hashes": job.hashes})
    folders = [job.folder for job in jobs]
    return supervise.run_worker("measure", [job.cell for job in jobs], jobs[0].model, folders, jobs[0].folder / "worker.log", tell)


def _prepare(sweep: _Sweep, jobs: Sequence[_Job]) -> bool:
    """Fetch or write the model's files in a process of its own, so that neither its time nor its memory is measured."""
    job = jobs[0]
    if job.model.source in ("folder", "gguf", "none"):
        return True
    if sweep.watcher:
        sweep.watcher.cell(sweep.jobs.index(job) + 1, job.name)
        sweep.watcher.event({"event": "stage", "stage": "preparing"})
    outcome = supervise.run_worker("prepare", [job.cell], job.model, [job.folder], job.folder / "prepare.log")
    if outcome.interrupted:
        raise KeyboardInterrupt
    if outcome.error:
        for one in jobs:
            _fail(sweep, one, getattr(outcome.error, "outcome", "error"), Failure("preparing", str(outcome.error)))
    return outcome.error is None


def _after_failure(sweep: _Sweep, left: list[_Job], ran: Sequence[_Job], outcome: GroupOutcome) -> list[_Job]:
    """Record the cell that failed; return the cells that are worth another worker."""
    error = outcome.error
    assert error is not None
    word = getattr(error, "outcome", "error")
    failure = Failure(outcome.stage, str(error))
    if outcome.current is None:  # the load itself failed, and would again
        for job in left:
            _fail(sweep, job, word, failure, outcome)
        return []
    failed = ran[outcome.current]
    _fail(sweep, failed, word, Failure("measuring", str(error)), outcome)
    return [job for job in left if job.row is None]


def _begin(sweep: _Sweep, job: _Job) -> None:
    """Open the cell's run. A store that refuses does not stop the measurement: the run is begun when the cell is uploaded, or later."""
    job.started_ms = job.started_ms or int(time.time() * 1000)
    with _noted(sweep, f"the run of {job.name}"):
        job.run_id = tracking.begin_run(sweep.store, job.name, sweep.parent_id, sweep.folder.name, job.started_ms, job.hashes.config)


@contextlib.contextmanager
def _noted(sweep: _Sweep, name: str) -> Iterator[None]:
    """Go on after an error of drawing, writing or uploading; it is told at the end."""
    try:
        yield
    except Exception as error:
        text = tracking.without_password(first_line(error))
        sweep.not_uploaded.append(f"{name}: {text}")
        if sweep.watcher:
            sweep.watcher.note(f"Not uploaded: {name}: {text}. `llmbench upload {sweep.folder}` uploads it later.")


def _succeed(sweep: _Sweep, job: _Job, number: int, outcomes: Sequence[GroupOutcome]) -> None:
    first = outcomes[0]
    measured = [outcome.measured[number] for outcome in outcomes]
    repetitions: list[Repetition] = []
    for process, one in enumerate(measured):
        repetitions += [dataclasses.replace(r, index=len(repetitions) + r.index, process=process) for r in one.repetitions]
    result = dataclasses.replace(
        _result(sweep, job, "ok"),
        load=first.load,
        first_call_ms=measured[0].first_call_ms if number == 0 else None,
        warmup_s=measured[0].warmup_s,
        steady=all(one.steady for one in measured),
        repetitions=tuple(repetitions),
        memory=supervise.stages_of(first, number),
        timeline=supervise.timeline_of(first, number),
        marks=_marks(first, number),
        peaks=machine.best_peaks(first.peaks, f"{job.hashes.hardware} {job.cell.device} {job.cell.threads or 'auto'}"),
        idle_w=first.idle_w,
        texts=tuple(first.texts[number]),
        log=tuple(first.log),
    )
    _keep(sweep, job, result)


def _marks(outcome: GroupOutcome, number: int) -> dict[str, int]:
    marks = {stage: int(event["t_ns"]) for stage, event in outcome.stages.items()}
    own = outcome.cells.get(number, {})
    return marks | ({"measuring": int(own["cell"]["t_ns"])} if own else {}) | ({"peak": int(own["peak"]["t_ns"])} if "peak" in own else {})


def _result(sweep: _Sweep, job: _Job, outcome: str, failure: Failure | None = None) -> RunResult:
    now = int(time.time() * 1000)
    price = sweep.spec.options.price_per_hour
    return RunResult(
        job.cell, outcome, job.started_ms or now, now, job.hashes, job.model, sweep.environment,
        failure=failure, predicted_bytes=job.predicted, price_per_hour=price, sweep=sweep.folder.name,
    )  # fmt: skip


def _fail(sweep: _Sweep, job: _Job, word: str, failure: Failure, outcome: GroupOutcome | None = None) -> None:
    result = _result(sweep, job, word, failure)
    if sweep.watcher:
        sweep.watcher.cell(sweep.jobs.index(job) + 1, job.name)
        sweep.watcher.note(f"{job.name}: {word}: {failure.message}")
    if outcome:
        number = outcome.current if outcome.current is not None else 0
        result = dataclasses.replace(
            result,
            load=outcome.load,
            memory=supervise.stages_of(outcome, number),
            timeline=supervise.timeline_of(outcome, number),
            log=tuple(outcome.log),
        )
    _keep(sweep, job, result)


def _keep(sweep: _Sweep, job: _Job, result: RunResult) -> None:
    """Write the files of a cell, then upload them, then end its run; neither an error nor an interruption leaves the run open."""
    folder = job.folder / "artifacts"
    job.row = report.row_of(result)
    with _noted(sweep, f"the files of {job.name}"):
        artifacts.write_cell(result, folder)
    with _noted(sweep, f"the charts of {job.name}"):
        charts.draw_cell(result, folder / "charts")
    try:
        if not job.run_id:
            _begin(sweep, job)
        if job.run_id:
            with _noted(sweep, job.name):
                tracking.upload_cell(sweep.store, job.run_id, result, folder, sweep.asked if sweep.parent_id is None else {})
    finally:
        if job.run_id:
            _end(sweep, job.run_id, result.outcome)


def _close_unfinished(sweep: _Sweep, job: _Job, outcome: str) -> None:
    """End a run that was begun, or was never reached, when the command ends early."""
    word = "interrupted" if outcome == "interrupted" else "error"
    failure = Failure("measuring" if job.run_id else "waiting", "The command ended before this cell was measured.")
    if sweep.parent_id is None or job.run_id:
        _fail(sweep, job, word, failure)
    else:
        job.row = Row(job.cell, word, message=failure.message)


def _finish_parent(sweep: _Sweep, outcome: str) -> None:
    if sweep.parent_id is None:
        return
    measured = [(job.row, job.run_id) for job in sweep.jobs if job.row]
    folder = sweep.folder / "comparison"
    tell = sweep.watcher.note if sweep.watcher else lambda text: None
    try:
        with _noted(sweep, "the comparison"):
            artifacts.write_sweep(
                measured, sweep.spec, folder, sweep=sweep.folder.name, ui=tracking.ui_command(sweep.store), experiment_id=sweep.store.experiment_id
            )
            sweep.view = upload.publish_parent(sweep.store, sweep.parent_id, sweep.spec, measured, folder, sweep.asked, tell)
    finally:
        _end(sweep, sweep.parent_id, outcome)


def _end(sweep: _Sweep, run_id: str, outcome: str) -> None:
    """End a run, also where its upload failed: a store that answers again must not show it as running."""
    with _noted(sweep, f"the end of run {run_id}"):
        tracking.end_run(sweep.store, run_id, outcome)
