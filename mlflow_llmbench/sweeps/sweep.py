"""Measure one configuration or a sweep: parse, plan, execute.

The command line, MLproject and Python all call `run`. While a worker measures on this machine, this process only
watches it: figures are uploaded between cells, while it waits, and the rest when their group has ended. An executor
measures the groups, on this machine or on a cluster. This thread writes and uploads all results.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

from ..config.cells import asked_params
from ..config.spec import BenchSpec, parse
from ..measure.journal import new_sweep
from ..reports.sweep_result import SweepResult as SweepResult
from ..tracking.store import ui_command
from .executor import Executor
from .local_executor import LocalExecutor
from .loop import Sweep
from .planning import Plan, plan
from .progress import NullListener, ProgressListener
from .run_recorder import Destination, RunRecorder
from .search import GoodputSearch, Search


def run(
    *,
    tracking_uri: str | None = None,
    experiment: str | None = None,
    watcher: ProgressListener | None = None,
    **parameters: object,
) -> SweepResult:
    """Measure one configuration, or a sweep if a parameter has several values.

    `parameters` have the names, values and defaults of the command line (`model="opt-125m", quant="int8,int4"`, or a
    list). Raises LlmbenchError for an error found before anything starts. A cell that fails later is a row with its
    outcome.
    """
    spec = parse({name: value for name, value in parameters.items() if value is not None})
    asked = {name: value for name, value in parameters.items() if isinstance(value, str)}
    with contextlib.closing(open_executor(spec, watcher)) as executor:
        planned = plan(spec, executor.machine)
        return execute(planned, executor, (tracking_uri, experiment), watcher, asked)


def open_executor(spec: BenchSpec, listener: ProgressListener | None = None) -> Executor:
    """Return the executor of a request: this machine, or a connection to the requested cluster.

    Raises LlmbenchError if there is no such device or cluster.
    """
    device = str(spec.axes["device"][0])
    if spec.options.on == "here":
        return LocalExecutor(spec.options, [device])
    from . import ray_executor

    return ray_executor.connect(spec.options, device, (listener or NullListener()).note)


def execute(
    planned: Plan,
    executor: Executor,
    destination: Destination,
    listener: ProgressListener | None = None,
    asked: Mapping[str, str] | None = None,
    search: Search | None = None,
) -> SweepResult:
    """Measure a plan, which was made from the facts of this executor.

    `asked` are the parameters as the user wrote them. `search` adds cells to the plan; by default the one that the plan
    asks for, if any. Raises LlmbenchError for an error found before anything starts.
    """
    planned.require_packages()
    listener, asked = listener or NullListener(), asked or {}
    recorder = RunRecorder(destination, planned.parent_name, listener.note)
    recorder.open(asked_params(planned.spec) | dict(asked))
    folder = new_sweep(planned.spec.options.output_dir)
    recorder.begin_sweep(folder, asked)
    if search is None and planned.spec.options.find:
        search = GoodputSearch(planned.spec.options.attainment)
    sweep = Sweep(planned, executor, recorder, listener, folder, search)
    return _result(sweep, sweep.run())


def _result(sweep: Sweep, outcome: str) -> SweepResult:
    recorder, ids = sweep.recorder, tuple(job.run_id for job in sweep.jobs)
    store = recorder.store
    page = recorder.page or ""
    if store and not page:
        page = f"#/experiments/{store.experiment_id}" + (f"/runs/{ids[0]}" if recorder.parent_name is None else "")
    return SweepResult(
        tuple(job.row for job in sweep.jobs if job.row),
        sweep.plan.varied,
        outcome,
        sweep.folder,
        ids,
        recorder.parent_id,
        recorder.address,
        store.experiment_id if store else "",
        ui_command(recorder.address),
        page,
        (*recorder.unwritten, *recorder.missed),
        sweep.findings.sentences,
    )
