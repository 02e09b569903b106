"""Run load groups on this machine, one after another."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

from ..measure.group import measure_group
from ..measure.outcome import GroupOutcome
from ..measure.task import Task
from ..records.cell import Cell, Options
from ..system import estimate
from .executor import Group, OneAtATime, Tell
from .job import Job


class Here(OneAtATime):
    """Executor on the machine of the command: one group at a time, and nothing else meanwhile."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.options = options
        self.ask: Callable[[Group, GroupOutcome], Job | None] | None = None  # chooses the next cell of a search
        self.prepared: set[Cell] = set()  # cells whose files are on this disk

    def room(self, device: str) -> tuple[int | None, str]:
        """Return the bytes that are free on this machine and allowed by `memory_limit`."""
        return estimate.room_here(device, estimate.memory_limit(self.options.memory_limit)[0])

    def wait(self, tell: Tell) -> tuple[Group, GroupOutcome]:
        """Measure the given group."""
        group = self.take()
        task = task_of(group, self.options, prepare=not self.prepared.issuperset(job.cell for job in group))
        more = functools.partial(self._more, group) if self.ask else None
        outcome = measure_group(task, lambda event: tell(group, event), more=more)
        self.prepared |= {job.cell for job in group}
        return group, outcome

    def _more(self, group: Group, outcome: GroupOutcome) -> tuple[Cell, Path] | None:
        job = self.ask(group, outcome) if self.ask else None
        return (job.cell, job.folder) if job else None


def task_of(group: Group, options: Options, prepare: bool) -> Task:
    """Make the task of a group. Quality is the same in every process, so only the first process evaluates it."""
    if any(job.attempts for job in group):
        options = dataclasses.replace(options, quality="none")
    return Task(tuple(job.cell for job in group), group[0].model, tuple(job.folder for job in group), options, prepare)
