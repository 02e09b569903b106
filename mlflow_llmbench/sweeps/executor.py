"""Executors: measure load groups on this machine, one after another, or several at once on a Ray cluster.

An executor knows tasks and the outcomes of their workers; it knows nothing of a sweep, its runs or its results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..measure.events import Event
from ..measure.outcome import GroupOutcome
from ..measure.task import Task
from ..records.cell import Cell, Options
from ..system import estimate, machine, placement
from ..system.estimate import AvailableMemory

OnEvent = Callable[[Task, Event], None]
"""Callback for an event of a task: `GroupBegun`, or an event of its worker; on a cluster with the node's name."""

OnPause = Callable[[Task, GroupOutcome], None]
"""Callback between two cells of a task, while its worker waits, with the outcome of the task so far."""

NextCell = Callable[[Task, GroupOutcome], tuple[Cell, Path] | None]
"""Choose the next cell of a search, with its folder, from the outcome of its task so far; None ends the search."""


@dataclass(frozen=True)
class MachineFacts:
    """Facts about the machines of an executor, from which a plan is made.

    `environment`: fingerprint of the machine, or of one of them if there are several · `env_hashes`: of all of them ·
    `memory`: available memory by value of `device`; a device that it lacks has no limit · `rates`: best rates measured
    before (see `machine.known_peaks`) · `rooms`: by value of `device`, the places that a model can be laid out over
    (see `placement.rooms`).
    """

    environment: Mapping[str, Any]
    env_hashes: tuple[str, ...]
    memory: Mapping[str, AvailableMemory] = field(default_factory=dict)
    rates: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    rooms: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


def this_machine(options: Options, devices: Iterable[str]) -> MachineFacts:
    """Return the facts of this machine, with the memory that is free now on `devices`; no limits with `force`.

    Raises MissingError if there is no such device.
    """
    environment = machine.environment()
    limit, _ = estimate.memory_limit(options.memory_limit)
    memory = {} if options.force else {device: estimate.available_memory(device, limit) for device in devices}
    rooms = {device: placement.rooms(device, limit) for device in memory}
    return MachineFacts(environment, (environment["hashes"]["env"],), memory, machine.known_peaks(), rooms)


class Executor(Protocol):
    """Measures tasks. An executor is used by one command, from one thread."""

    machine: MachineFacts

    @property
    def accepts_more(self) -> bool:
        """True if another task can be submitted now."""

    @property
    def busy(self) -> bool:
        """True if a submitted task has not ended."""

    def submit(self, task: Task, next_cell: NextCell | None = None) -> None:
        """Accept a task; it is measured as soon as a machine is free for it.

        On this machine `next_cell` chooses further cells; the task that `wait` returns has them.
        """

    def wait(self, on_event: OnEvent, on_pause: OnPause) -> tuple[Task, GroupOutcome]:
        """Wait until a task has ended, passing events to `on_event`. Returns the task and its outcome.

        `on_pause` is called between cells only where a worker can wait for it: on this machine.
        """

    def withdraw(self) -> list[Task]:
        """Withdraw the tasks that no machine has begun, and return them."""

    def stop(self) -> list[tuple[Task, GroupOutcome]]:
        """Stop everything now. Returns the tasks that had not ended, each with what was measured of it."""

    def close(self) -> None:
        """Release the machines; nothing of ours stays there."""


class SerialExecutor:
    """Base of executors that measure one task at a time, inside `wait`. They have no queue and nothing to clean up."""

    def __init__(self, facts: MachineFacts) -> None:
        self.machine = facts
        self._submitted: tuple[Task, NextCell | None] | None = None

    @property
    def accepts_more(self) -> bool:
        """True if no task is waiting to be measured."""
        return self._submitted is None

    @property
    def busy(self) -> bool:
        """True if there is a task to measure."""
        return self._submitted is not None

    def submit(self, task: Task, next_cell: NextCell | None = None) -> None:
        """Accept a task; `wait` measures it."""
        self._submitted = task, next_cell

    def take(self) -> tuple[Task, NextCell | None]:
        """Return the submitted task with its search, and become free for another."""
        assert self._submitted
        submitted, self._submitted = self._submitted, None
        return submitted

    def withdraw(self) -> list[Task]:
        """Return nothing: there is no queue."""
        return []

    def stop(self) -> list[tuple[Task, GroupOutcome]]:
        """Return nothing: no measurement outlives its call of `wait`."""
        return []

    def close(self) -> None:
        """Do nothing: there is nothing to release."""
