"""Run load groups on this machine, one after another."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from ..measure.group import measure_group
from ..measure.outcome import GroupOutcome
from ..measure.task import Task
from ..records.cell import Cell, Options
from .executor import OnEvent, OnPause, SerialExecutor, this_machine


class LocalExecutor(SerialExecutor):
    """Executor on the machine of the command: one task at a time, and nothing else meanwhile."""

    def __init__(self, options: Options, devices: Iterable[str]) -> None:
        super().__init__(this_machine(options, devices))
        self.prepared: set[Cell] = set()  # cells whose files are on this disk

    def wait(self, on_event: OnEvent, on_pause: OnPause) -> tuple[Task, GroupOutcome]:
        """Measure the submitted task in a worker of its own."""
        task, next_cell = self.take()
        task = dataclasses.replace(task, prepare=not self.prepared.issuperset(task.cells))

        def more(so_far: GroupOutcome) -> tuple[Cell, Path] | None:
            nonlocal task
            found = next_cell(task, so_far) if next_cell else None
            if found:
                task = task.with_cell(*found)
            return found

        outcome = measure_group(
            task,
            lambda event: on_event(task, event),
            more=more if next_cell else None,
            pause=lambda so_far: on_pause(task, so_far),
        )
        self.prepared |= set(task.cells)
        return task, outcome
