"""The loop of a sweep: submit its load groups, keep what was measured, record what failed, skip what cannot fit."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from ..config.cells import asked_params, needs_no_less, option_params
from ..measure.events import CellBegun, CellMeasured, Event, GroupBegun, QualityWithheld, Stage
from ..measure.journal import claim, read_events, read_result, write_json
from ..measure.outcome import GroupOutcome
from ..measure.task import Task
from ..records.cell import Cell
from ..records.errors import JournalError, NodeLost
from ..records.invocation import note_folder, parameter_text
from ..records.redaction import redact_all
from ..records.results import Failure, RunResult
from ..reports import artifacts
from ..reports.result import Row, row_of, with_figures
from ..reports.sweep import Subject
from ..tracking.store import ui_command
from . import resume
from .cross_cell import CrossFindings, cross_findings
from .executor import Executor
from .job import Job, untold, write_job
from .planning import Plan
from .progress import ProgressListener
from .results import env_hashes, failed_result, incomplete_result, measured_result
from .run_recorder import RunRecorder
from .search import Search

MOST_LOSSES = 3
"""Most times that a cell is given to another machine of a cluster after its machine was lost."""

MIXED = (
    "The processes of this cell ran on nodes that differ, so they make no result. Run it again, or on identical nodes."
)

UNREACHED = "The command ended before this cell was measured."
STOPPED = "The command ended before this cell was measured in all its processes."


@dataclasses.dataclass(frozen=True)
class _Failed:
    """A cell that ran out of memory or time: cells that need at least as much are not tried. `loading`: at its load."""

    cell: Cell
    outcome: str
    loading: bool

    def text(self) -> str:
        """Return what failed, for the message of a skipped cell."""
        cell = self.cell
        tokens = f"{cell.prompt_tokens or 'auto'} + {cell.output_tokens} tokens"
        return "loading it" if self.loading else f"batch_size={cell.batch_size} with {tokens}"


class Sweep:
    """State of one command: its plan, and what was measured of it so far. `run` is the loop; each method is a step.

    `jobs` are in the order of the plan. A search replaces `plan` by one with more cells.
    """

    def __init__(
        self,
        plan: Plan,
        executor: Executor,
        recorder: RunRecorder,
        listener: ProgressListener,
        folder: Path,
        search: Search | None = None,
    ) -> None:
        self.plan, self.executor, self.recorder, self.listener = plan, executor, recorder, listener
        self.folder, self.search = folder, search
        self.jobs = [Job(planned, folder / planned.folder) for planned in plan.cells]
        self.job_of = {job.folder: job for job in self.jobs}
        self.findings = CrossFindings()
        self.withheld: set[str] = set()  # reasons for absent quality figures, already shown
        self.failed: list[_Failed] = []

    @functools.cached_property
    def earlier(self) -> dict[str, list[Path]]:
        """Folders of the cells of earlier sweeps, by configuration hash."""
        return resume.earlier_cells(self.folder)

    def run(self) -> str:
        """Open the runs, measure group by group, upload. Every run that was begun is ended, whatever happens.

        Returns the outcome of the command: ok, error or interrupted.
        """
        outcome = "error"
        with claim(self.folder):
            try:
                try:
                    self._open()
                    self._measure()
                    whole = all(job.row and job.row.outcome in ("ok", "skipped") for job in self.jobs)
                    outcome = "ok" if whole else "error"
                finally:
                    for task, left in self.executor.stop():
                        self._count(task, left)
            except KeyboardInterrupt:
                outcome = "interrupted"
            finally:
                try:
                    self._finish(outcome)
                except KeyboardInterrupt:  # the first signal came only now, and what it cut off is done again
                    outcome = "interrupted"
                    self._finish(outcome)
                self.listener.finish()
                note_folder(self.folder)
        return outcome

    def _open(self) -> None:
        """Write the plan, complete sweeps that were killed before, and begin the parent's run."""
        self._write_plan()
        if self.recorder.store:
            resume.close_abandoned(self.plan.spec.options.output_dir, self.recorder.store, self.listener.note)
        self.recorder.begin_parent()
        self.listener.start(max(len(self.jobs), self.search.cells if self.search else 0))

    def _write_plan(self) -> None:
        """Write sweep.json: the request, and the order of the cells."""
        store = self.recorder.store
        known = {
            "parameters": asked_params(self.plan.spec) | option_params(self.plan.spec),
            "cells": len(self.jobs),
            "order": [job.folder.name for job in self.jobs],
            "parent": self.plan.parent_name,
            "tracking_uri": store.uri if store else None,
            "experiment_id": store.experiment_id if store else None,
            "asked": self.recorder.asked,
            "environment": self.plan.machine.environment,
        }
        write_json(self.folder / "sweep.json", known)

    # Measure

    def _measure(self) -> None:
        """Measure every cell that is neither refused nor already measured, then what a search adds to them."""
        for job in self.jobs:
            if job.planned.refusal:
                self._fail(job, "refused", Failure("planning", job.planned.refusal.sentence))
            else:
                self._link(job)
        self._run_rounds()
        while self.search and (extended := self.search.extend(self.plan)):
            self._link(self._add(extended))
            self._run_rounds()

    def _run_rounds(self) -> None:
        """Measure every cell that has no result yet, one round per requested process.

        Every second round runs in reverse order (A B, B A, A B, …), so that drift over time affects all cells alike.
        Kalibera and Jones 2013 recommend processes in alternating order.
        """
        for number in range(max(job.cell.processes for job in self.jobs)):
            groups = [[self.job_of[self.folder / planned.folder] for planned in group] for group in self.plan.groups]
            groups = [[job for job in group if job.processes_done <= number] for group in groups]
            self._run_round(groups[:: -1 if number % 2 else 1])

    def _link(self, job: Job) -> None:
        """Take over an earlier result of this cell, or the processes that an earlier command has finished of it."""
        options = self.plan.spec.options
        if options.rerun or options.twin:  # a pair is always measured together
            return
        folders = self.earlier.get(job.planned.hashes.config, ())
        found = resume.find(job, self.plan.spec, folders, self.recorder.store, self.plan.machine.env_hashes)
        if found is None:
            return
        self._announce(job)
        again = parameter_text("rerun", "true")
        if found.outcome == "ok":
            self.listener.note(f"{job.name}: measured before, in {found.linked}. To measure it again: {again}.")
            self._keep(job, found)
            return
        job.earlier = found
        counted = f"{job.processes_done} of {job.cell.processes} processes were measured before"
        self.listener.note(f"{job.name}: {counted}, in {found.resumed}. To measure all again: {again}.")

    def _run_round(self, groups: Sequence[Sequence[Job]]) -> None:
        """Measure each group in one process. After a failure the remaining cells of the group get a new process."""
        executor, waiting = self.executor, deque(groups)
        while waiting or executor.busy:
            while waiting and executor.accepts_more:
                self._submit(waiting.popleft())
            if executor.busy:
                known = len(self.failed)
                left = self._take(*executor.wait(self._on_event, self._keep_between))
                if left:
                    waiting.appendleft(left)
                if len(self.failed) > known:  # waiting cells may be too large as well
                    waiting.extend(self._jobs_of(task) for task in executor.withdraw())

    def _submit(self, group: Sequence[Job]) -> None:
        """Submit the cells of a group that still need a process and are worth trying."""
        jobs = self._skip_larger_than_failed([job for job in group if job.row is None])
        if not jobs:
            return
        options = self.plan.spec.options
        if all(job.attempts or resume.has_quality(job.earlier, self.plan.spec) for job in jobs):
            # Quality is the same in every process.
            options = dataclasses.replace(options, quality="none")
        task = Task(
            tuple(job.cell for job in jobs),
            jobs[0].planned.model,
            tuple(job.folder for job in jobs),
            options,
            names=tuple(job.name for job in jobs),
            predicted_bytes=tuple(job.planned.predicted_bytes for job in jobs),
        )
        searched = self.search is not None and all(job.cell.processes == 1 for job in jobs)
        self.executor.submit(task, self._next_cell if searched else None)

    def _jobs_of(self, task: Task) -> list[Job]:
        return [self.job_of[folder] for folder in task.folders]

    def _on_event(self, task: Task, event: Event) -> None:
        """Handle an event of a task: begin its runs when it begins, and pass progress on to the listener."""
        job = self.job_of[task.folders[event.number if isinstance(event, CellBegun | CellMeasured) else 0]]
        match event:
            case GroupBegun():
                self._begin(self._jobs_of(task))
            case QualityWithheld(message=message) if message not in self.withheld:
                self.withheld.add(message)
                self.listener.note(message)
        match event:
            case CellBegun(node=str(node)):  # several at once: a line at the begin, the count at the end
                self.listener.note(f"{job.name}: measuring on {node}")
            case CellMeasured(node=str()):
                self._announce(job)
                self.listener.event(event)
            case Event(node=None):
                if isinstance(event, GroupBegun | CellBegun) or event in (Stage("preparing"), Stage("reference")):
                    self._announce(job)
                self.listener.event(event)

    def _announce(self, job: Job) -> None:
        """Tell the listener that this cell is next."""
        self.listener.cell(self.jobs.index(job) + 1, job.name)

    def _begin(self, jobs: Sequence[Job]) -> None:
        """Begin the run of a group's first cell. Those of the others begin with their results, at their own time."""
        now = int(time.time() * 1000)
        for job in jobs:
            if not job.started_ms:
                job.started_ms = now
                write_job(job)
        if not jobs[0].run_id:
            self.recorder.begin(jobs[0], now)

    def _next_cell(self, task: Task, outcome: GroupOutcome) -> tuple[Cell, Path] | None:
        """Choose the next cell of a search from the outcome of its task so far, and add it to the plan.

        Returns the cell and its folder, None when the search has ended, or goes on with another load. What was measured
        before is only added.
        """
        assert self.search
        jobs = self._jobs_of(task)
        environment = self.plan.machine.environment
        for own in outcome.measured:
            measured = dataclasses.replace(jobs[own], attempts=[(outcome, own)])
            self.search.tell(jobs[own].planned, measured_result(measured, self.plan.spec, environment))
        group = [job.planned for job in jobs]
        while extended := self.search.extend(self.plan, group):
            job = self._add(extended)
            self._link(job)
            if job.row is None:
                job.started_ms = int(time.time() * 1000)
                write_job(job)
                return job.cell, job.folder
        return None

    def _add(self, extended: Plan) -> Job:
        """Continue with a plan that has one more cell, last. Returns its job."""
        self.plan = extended
        planned = extended.cells[-1]
        job = Job(planned, self.folder / planned.folder)
        self.jobs.append(job)
        self.job_of[job.folder] = job
        self._write_plan()
        return job

    # Keep

    def _keep_between(self, task: Task, outcome: GroupOutcome) -> None:
        """Write and upload the cell that a worker has just measured, while it waits to go on with its group.

        Charts, and what only the end of the group brings, come with that. What fails here is tried again, and reported,
        there. A cell of several processes is left to the last of them.
        """
        number = next(reversed(outcome.measured))
        job = self.job_of[task.folders[number]]
        job.attempts.append((outcome, number))
        if job.cell.processes > 1:
            return
        with contextlib.suppress(Exception):
            result = redact_all(incomplete_result(job, self.plan.spec, self.plan.machine.environment))
            artifacts.write_cell(result, job.folder / "artifacts")
            self.listener.row(job.name, row_of(result))
            self.recorder.upload_between(job, result)

    def _count(self, task: Task, outcome: GroupOutcome) -> None:
        """Add the outcome to each job of the task that it measured, and note those that it only began."""
        for own, job in enumerate(self._jobs_of(task)):
            if outcome.interrupted and own in outcome.cells and own not in outcome.measured:
                _add_untold(job, outcome, own)
            if own in outcome.measured and all(known is not outcome for known, _ in job.attempts):
                job.attempts.append((outcome, own))  # unless it was kept between cells
            job.tried = (outcome, own) if own in outcome.cells and own not in outcome.measured else None

    def _take(self, task: Task, outcome: GroupOutcome) -> list[Job]:
        """Keep the results of a process. Returns the jobs that it failed to reach, which need another one.

        Raises KeyboardInterrupt if the process was interrupted.
        """
        self._count(task, outcome)
        if outcome.interrupted:
            raise KeyboardInterrupt
        jobs = self._jobs_of(task)
        left = [job for own, job in enumerate(jobs) if own not in outcome.measured]
        if isinstance(outcome.error, NodeLost):
            self._lose(left, outcome.error)
        elif outcome.error:
            self._fail_in(jobs, outcome)
        for job in jobs:
            if job.measured and job.row is None:
                self._succeed(job)
        return [job for job in left if job.row is None] if outcome.error else []

    def _lose(self, left: Sequence[Job], error: NodeLost) -> None:
        """Count a lost machine for its unmeasured jobs: they are retried, and fail after `MOST_LOSSES` losses."""
        noun = "cell of its group had" if len(left) == 1 else "cells of its group had"
        self.listener.note(f"{error} {len(left)} {noun} not been measured.")
        for job in left:
            job.lost += 1
            if job.lost > MOST_LOSSES:
                message = f"{error} This cell was lost in this way {job.lost} times."
                self._fail(job, "crashed", Failure("measuring", message))

    def _skip_larger_than_failed(self, jobs: Sequence[Job]) -> list[Job]:
        """Return the jobs that are worth trying. Those that need at least as much as a failed one become `skipped`."""
        left = []
        for job in jobs:
            failed = next((one for one in self.failed if _needs_no_less(job.cell, one)), None)
            if failed is None:
                left.append(job)
                continue
            message = f"Not tried: {failed.text()} ended with {failed.outcome}, and this cell needs at least as much."
            self._fail(job, "skipped", Failure("planning", message))
        return left

    def _fail_in(self, jobs: Sequence[Job], outcome: GroupOutcome) -> None:
        """Record the failure of the cell at which the worker failed, or of all cells if loading failed."""
        error = outcome.error
        word = getattr(error, "outcome", "error")
        loading = outcome.current is None
        failed = [job for job in jobs if job.row is None] if outcome.current is None else [jobs[outcome.current]]
        for job in failed:
            if not job.measured:
                self._fail(job, word, Failure(outcome.stage if loading else "measuring", str(error)), outcome)
        if word in ("oom", "timeout"):
            self.failed.append(_Failed(failed[0].cell, word, loading))

    def _succeed(self, job: Job, hurried: bool = False) -> None:
        environment = self.plan.machine.environment
        result = measured_result(job, self.plan.spec, environment)
        if len(env_hashes(job)) > 1:
            job.attempts, job.earlier = [], None  # together they are no result
            result = failed_result(job, self.plan.spec, environment, "error", Failure("measuring", MIXED))
            self._tell(job, result)
        self._keep(job, result, hurried)

    def _fail(
        self, job: Job, word: str, failure: Failure, outcome: GroupOutcome | None = None, hurried: bool = False
    ) -> None:
        result = failed_result(job, self.plan.spec, self.plan.machine.environment, word, failure, outcome)
        self._tell(job, result)
        self._keep(job, result, hurried)

    def _tell(self, job: Job, result: RunResult) -> None:
        """Tell the listener why a cell has no result."""
        self._announce(job)
        self.listener.note(f"{job.name}: {result.outcome}: {result.failure.message if result.failure else ''}")

    def _keep(self, job: Job, result: RunResult, hurried: bool = False) -> None:
        """Write the files of a cell, upload them and end its run. `hurried`: write them without charts, no more."""
        job.pending = result = redact_all(result)
        folder = job.folder / "artifacts"
        with self.recorder.report_errors(f"the files of {job.name}"):
            write_job(job)
            artifacts.write_cell(result, folder)
        if not hurried:
            with self.recorder.report_errors(f"the charts of {job.name}"):
                artifacts.draw_cell(result, folder / "charts")
        job.row, job.pending = row_of(result), None  # if interrupted before this line, `_finish` repeats the cell
        if self.search:
            self.search.tell(job.planned, result)
        self.listener.row(job.name, job.row)
        if not hurried:
            self.recorder.upload(job, result)

    # Finish

    def _finish(self, outcome: str) -> None:
        """End everything that is still open. If this is interrupted, it can be repeated.

        After an interruption only seconds are left: the runs are ended first, then all results are written without
        charts, and then uploaded for `HURRY_S`. The next command uploads the rest.
        """
        recorder, hurried = self.recorder, outcome == "interrupted"
        if hurried:
            recorder.kill(self.jobs)
        for job in self.jobs:
            if job.row is None and job.pending:
                self._keep(job, job.pending, hurried)
            elif job.row is None and job.measured:
                self._succeed(job, hurried)
        for job in self.jobs:
            if job.row is None:
                self._give_up(job, outcome)
        if hurried:
            recorder.complete_cells(self.jobs)
        self._find_across_cells()
        self._write_end(outcome, uploaded=False)
        self._compare(outcome, draw=not hurried)
        if not hurried:
            recorder.end_strays(self.jobs)
            recorder.retry(self.jobs)
        self._write_end(outcome, uploaded=not recorder.missed)

    def _write_end(self, outcome: str, uploaded: bool) -> None:
        """Write ended.json. Until it says that everything is uploaded, the next command uploads what is missing."""
        with self.recorder.report_errors("how the command ended"):
            write_json(self.folder / "ended.json", {"outcome": outcome, "uploaded": uploaded})

    def _give_up(self, job: Job, outcome: str) -> None:
        """Record a cell that the command did not finish; one that had not begun is only a row of the comparison."""
        word = "interrupted" if outcome == "interrupted" else "error"
        text = STOPPED if job.processes_done else UNREACHED
        failure = Failure("measuring" if job.started_ms else "waiting", text)
        if job.started_ms or job.processes_done or self.plan.parent_name is None:
            self._fail(job, word, failure, hurried=outcome == "interrupted")
        else:
            job.row = Row(job.cell, word, message=failure.message)

    def _find_across_cells(self) -> None:
        """Add metrics and findings that need several cells: pairs of `twin` or of ranks, the limits of `find`."""
        options = self.plan.spec.options
        if not (options.twin or options.find or max(job.cell.tensor_parallel for job in self.jobs) > 1):
            return
        with self.recorder.report_errors("what the cells say together"):
            whole = [job for job in self.jobs if job.row and job.row.outcome == "ok"]
            results = [read_result(job.folder / "artifacts") for job in whole]
            self.findings = cross_findings(results, [job.name for job in whole], options)
            for job, result, figures in zip(whole, results, self.findings.added, strict=True):
                job.row = with_figures(job.row, figures) if job.row else None
                self.recorder.add(job.run_id, f"what {job.name} shows beside other cells", figures, result.ended_ms)
            if options.find:
                write_json(self.folder / "comparison" / "goodput.json", self.findings.as_json())

    def _compare(self, outcome: str, draw: bool) -> None:
        """Write the comparison of the cells, log it on the parent run, and end that."""
        recorder = self.recorder
        if self.plan.parent_name is None:
            return
        measured = [(job.row, job.run_id) for job in self.jobs if job.row]
        folder = self.folder / "comparison"
        with recorder.report_errors("the comparison"):
            where = ui_command(recorder.address), recorder.store.experiment_id if recorder.store else ""
            subject = Subject(self.plan.spec, self.plan.parent_name, self.folder.name, *where)
            artifacts.write_sweep(measured, subject, folder, draw)
        recorder.finish(self.plan.spec, measured, folder, outcome, self.findings.figures)


def _add_untold(job: Job, outcome: GroupOutcome, own: int) -> None:
    """Add the measurement of a job that its worker completed and did not tell, to the outcome as number `own`."""
    with contextlib.suppress(JournalError, OSError):
        for measured in untold(job, read_events(job.folder / "events.jsonl")):
            outcome.measured[own], outcome.texts[own] = measured, ()


def _needs_no_less(cell: Cell, failed: _Failed) -> bool:
    """Return True if a cell needs at least the memory, or the time, of one that failed for want of it."""
    return needs_no_less(cell, failed.cell, ignore_shape=failed.loading, compare_time=failed.outcome == "timeout")
