"""Measure one group of cells on this machine, also for a command on another: fetch the model's files, start a worker.

This module uses neither MLflow nor Ray, so a node of a cluster needs only what a worker needs.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..backends.base import LOCAL_FILES, backend_class
from ..records.cell import Cell, Options
from ..records.errors import JournalError, ModelError, UsageError
from ..records.results import ModelFacts
from ..system import estimate, machine
from . import quality_order, supervise
from .events import CellBegun, CellMeasured, Event, GroupBegun, GroupPlaced, Report, Stage
from .outcome import GroupOutcome
from .supervise import Limits, More, Pause
from .task import Task, WorkerJob

Post = Callable[[Event, Mapping[str, bytes]], None]
"""Called with an event and the bytes written since the last call, keyed by file path relative to the sweep's folder."""


def measure_group(
    task: Task,
    report: Report,
    environment: Mapping[str, Any] | None = None,
    more: More | None = None,
    pause: Pause | None = None,
) -> GroupOutcome:
    """Measure the cells of one load in a fresh process.

    `report` gets `GroupBegun` when that starts, and all events of the worker. Failures, also of fetching, are in the
    outcome's `error`. `environment` is kept with the outcome; `more` chooses further cells; `pause` keeps what is
    measured between two cells.
    """
    log = task.folders[0] / "worker.log"
    try:
        if task.prepare and not _is_prepared(task.cells[0], task.model):
            preparing = Stage("preparing")
            report(preparing)  # in a separate process, so that neither its time nor its memory is measured
            job = WorkerJob("prepare", task.cells[:1], task.model, task.folders[:1])
            fetched = supervise.run_worker(job, log.with_name("prepare.log"), waited=report)
            if fetched.error or fetched.interrupted:
                return GroupOutcome(
                    stages={"preparing": preparing},
                    error=fetched.error,
                    interrupted=fetched.interrupted,
                    environment=environment,
                )
        report(GroupBegun())
        limits = _limits(task.options)
        order, why = None, ""
        try:
            order = quality_order.order(task, report, environment, limits)
        except UsageError as error:
            why = str(error)
        job = WorkerJob("measure", task.cells, task.model, task.folders, order)
        outcome = supervise.run_worker(job, log, report, limits, environment, more, pause, waited=report)
        outcome.withheld += [why] if why else []
        return outcome
    except JournalError as error:
        return GroupOutcome(error=error, environment=environment)


def _is_prepared(cell: Cell, model: ModelFacts) -> bool:
    """Return True if the model's files are known to be on this machine.

    If the cell has another interpreter, only its own worker can tell, so the answer is False.
    """
    return cell.worker_python is None and backend_class(cell.backend).is_prepared(cell, model)


def _limits(options: Options) -> Limits:
    most, called = estimate.memory_limit(options.memory_limit)
    return Limits(
        options.load_timeout_s,
        options.first_token_timeout_s,
        options.repetition_timeout_s,
        options.cell_timeout_s,
        most,
        called,
    )


def measure_apart(
    task: Task, inputs: Mapping[str, bytes], known: Mapping[str, Any], post: Post
) -> tuple[GroupOutcome, dict[str, bytes]]:
    """Run `measure_group` in a scratch folder for a command on another machine.

    Return the outcome, and the contents of the files in the cells' folders. `inputs` holds the workload files that
    cells name; `known` is added to this machine's environment. `post` gets `GroupPlaced`, `GroupBegun`, `CellBegun`
    and `CellMeasured`, so that measurements are not lost with this machine.
    """
    with tempfile.TemporaryDirectory(prefix="llmbench-") as scratch:
        root = Path(scratch).resolve()
        environment = {**machine.environment(), **known}
        post(GroupPlaced(), {})
        local = [one.location for one in (task.model, task.model.assistant) if one and one.source in LOCAL_FILES]
        if absent := [location for location in local if not Path(location).exists()]:
            message = (
                f"There is no {absent[0]} on this node. Put it on a disk that every node has under that path, or give "
                "a Hub id."
            )
            return GroupOutcome(
                stages={"preparing": Stage("preparing")}, error=ModelError(message), environment=environment
            ), {}
        files = _Files(root, [folder.name for folder in task.folders])

        def report(event: Event) -> None:
            match event:  # times of this machine's clock mean nothing on another, and the files have the results
                case GroupBegun():
                    post(event, files.new())
                case CellBegun(number=number):
                    post(CellBegun(number), files.new())
                case CellMeasured(number=number):
                    post(CellMeasured(number), files.new())

        here = dataclasses.replace(
            task,
            cells=_with_inputs(task.cells, inputs, root),
            folders=tuple(root / folder.name for folder in task.folders),
        )
        outcome = measure_group(here, report, environment)
        names = {own.workload: asked.workload for own, asked in zip(here.cells, task.cells, strict=True)}
        outcome.divergences = {names[workload]: found for workload, found in outcome.divergences.items()}
        if outcome.error:  # a log that it names will be in the command's folder
            outcome.error = type(outcome.error)(str(outcome.error).replace(str(root), str(task.folders[0].parent)))
        return outcome, files.all()


def _with_inputs(cells: tuple[Cell, ...], inputs: Mapping[str, bytes], root: Path) -> tuple[Cell, ...]:
    """Write the workload files into `root`, and return the cells with the paths of these copies."""
    files = {name: root / f"workload-{number}" / Path(name).name for number, name in enumerate(inputs)}
    for name, file in files.items():
        file.parent.mkdir()
        file.write_bytes(inputs[name])
    return tuple(dataclasses.replace(cell, workload=str(files.get(cell.workload, cell.workload))) for cell in cells)


class _Files:
    """Reader of the growing files of some folders."""

    def __init__(self, root: Path, folders: list[str]) -> None:
        self.root, self.folders = root, folders
        self.read: dict[str, int] = {}  # path relative to the root → bytes already returned

    def all(self) -> dict[str, bytes]:
        """Return the whole content of every file."""
        files = [file for folder in self.folders for file in sorted((self.root / folder).glob("*"))]
        return {file.relative_to(self.root).as_posix(): file.read_bytes() for file in files}

    def new(self) -> dict[str, bytes]:
        """Return the content added since the last call, in whole lines."""
        found = {}
        for path, content in self.all().items():
            known = self.read.get(path, 0)
            self.read[path] = max(content.rfind(b"\n") + 1, known)
            found[path] = content[known : self.read[path]]
        return {path: content for path, content in found.items() if content}
