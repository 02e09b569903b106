"""Where the cells of a sweep are measured: on this machine, one group after the other, or on a cluster (`cluster.py`), several at a time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from . import estimate, machine, node
from .cell import Cell, Options
from .jobs import Job
from .supervise import GroupOutcome

Group = Sequence[Job]
"""Jobs that share a load, in the order in which one process measures them."""

Tell = Callable[[Group, Mapping[str, Any]], None]
"""Called with an event of a group: `begun`, and what its worker tells. What comes from a cluster has the node's name in `node`."""


class Place(Protocol):
    """Who measures groups. `environment` is the fingerprint of its machine, of one of them if there are several."""

    environment: Mapping[str, Any]
    env_hashes: Sequence[str]  # of the environments in which a cell may be measured here

    def room(self, device: str) -> tuple[int | None, str]:
        """Most bytes that a cell may need on a device, and words that follow on them; None where nobody says."""

    @property
    def takes_more(self) -> bool:
        """Whether another group can be given now."""

    @property
    def busy(self) -> bool:
        """Whether a group was given that has not ended."""

    def give(self, group: Group) -> None:
        """Take a group, to be measured as soon as there is a machine for it."""

    def wait(self, tell: Tell) -> tuple[Group, GroupOutcome]:
        """Wait until one of the groups has ended."""

    def recall(self) -> list[Group]:
        """Take back the groups that no machine has begun with."""

    def stop(self) -> list[tuple[Group, GroupOutcome]]:
        """End everything now. Returns what was measured of the groups that had not ended."""

    def close(self) -> None:
        """Leave the place; nothing of ours stays there."""


class OneAtATime:
    """What places have in common that measure one group at a time, in the call of `wait`; nothing waits there, and nothing is left behind."""

    def __init__(self) -> None:
        self.environment: Mapping[str, Any] = machine.environment(str(Path(__file__).parent))
        self.env_hashes: Sequence[str] = (self.environment["hashes"]["env"],)
        self.group: Group | None = None

    @property
    def takes_more(self) -> bool:
        """Whether it is free."""
        return self.group is None

    @property
    def busy(self) -> bool:
        """Whether there is a group to measure."""
        return self.group is not None

    def give(self, group: Group) -> None:
        """Take a group; `wait` measures it."""
        self.group = group

    def take(self) -> Group:
        """The group that was given; the place is free again."""
        assert self.group
        group, self.group = self.group, None
        return group

    def recall(self) -> list[Group]:
        """Nothing waits here."""
        return []

    def stop(self) -> list[tuple[Group, GroupOutcome]]:
        """What measures a group ends with the call that waits for it."""
        return []

    def close(self) -> None:
        """There is nothing to leave."""


class Here(OneAtATime):
    """The machine of the command: one group at a time, and nothing else meanwhile."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.options = options
        self.ask: Callable[[Group, GroupOutcome], Job | None] | None = None  # which cell of a search is next
        self.prepared: set[Cell] = set()  # cells whose files are on this disk

    def room(self, device: str) -> tuple[int | None, str]:
        """What is free here, and allowed."""
        return estimate.room_here(device, estimate.memory_limit(self.options.memory_limit)[0])

    def wait(self, tell: Tell) -> tuple[Group, GroupOutcome]:
        """Measure the group that was given."""
        group = self.take()
        task = task_of(group, self.options, prepare=not self.prepared.issuperset(job.cell for job in group))
        more = functools.partial(self._more, group) if self.ask else None
        outcome = node.measure_group(task, lambda event: tell(group, event), more=more)
        self.prepared |= {job.cell for job in group}
        return group, outcome

    def _more(self, group: Group, outcome: GroupOutcome) -> tuple[Cell, Path] | None:
        job = self.ask(group, outcome) if self.ask else None
        return (job.cell, job.folder) if job else None


def task_of(group: Group, options: Options, prepare: bool) -> node.Task:
    """What a machine has to know of a group. Quality is the same in each process, so the first one evaluates it."""
    if any(job.attempts for job in group):
        options = dataclasses.replace(options, quality="none")
    return node.Task(
        tuple(job.cell for job in group), group[0].model, tuple(job.folder for job in group), options, prepare
    )
