"""Executors: measure the groups of a sweep on this machine, one after another, or several at once on a Ray cluster.

`cluster.py` has the cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from .. import PACKAGE_DIR
from ..measure.events import Event
from ..measure.outcome import GroupOutcome
from ..system import machine
from .job import Job

Group = Sequence[Job]
"""Jobs that share one loaded model, in the order in which one process measures them."""

Tell = Callable[[Group, Event], None]
"""Callback for an event of a group: `GroupBegun`, or an event of its worker; on a cluster with the node's name."""


class Place(Protocol):
    """Executor of groups. `environment` is the fingerprint of its machine, or of one of them if there are several."""

    environment: Mapping[str, Any]
    env_hashes: Sequence[str]  # of all environments in which this executor may measure a cell

    def room(self, device: str) -> tuple[int | None, str]:
        """Return the most bytes that a cell may need on a device (None if unknown), and words to put after them."""

    @property
    def takes_more(self) -> bool:
        """True if another group can be given now."""

    @property
    def busy(self) -> bool:
        """True if a group was given that has not ended."""

    def give(self, group: Group) -> None:
        """Accept a group; it is measured as soon as a machine is free for it."""

    def wait(self, tell: Tell) -> tuple[Group, GroupOutcome]:
        """Wait until one of the groups has ended, passing events to `tell`. Returns that group and its outcome."""

    def recall(self) -> list[Group]:
        """Take back the groups that no machine has begun."""

    def stop(self) -> list[tuple[Group, GroupOutcome]]:
        """Stop everything now. Returns the groups that had not ended, each with what was measured of it."""

    def close(self) -> None:
        """Release the machines; nothing of ours stays there."""


class OneAtATime:
    """Base of executors that measure one group at a time, inside `wait`. They have no queue and nothing to clean up."""

    def __init__(self) -> None:
        self.environment: Mapping[str, Any] = machine.environment(str(PACKAGE_DIR))
        self.env_hashes: Sequence[str] = (self.environment["hashes"]["env"],)
        self.group: Group | None = None

    @property
    def takes_more(self) -> bool:
        """True if no group is waiting to be measured."""
        return self.group is None

    @property
    def busy(self) -> bool:
        """True if there is a group to measure."""
        return self.group is not None

    def give(self, group: Group) -> None:
        """Accept a group; `wait` measures it."""
        self.group = group

    def take(self) -> Group:
        """Return the given group and become free for another."""
        assert self.group
        group, self.group = self.group, None
        return group

    def recall(self) -> list[Group]:
        """Return nothing: there is no queue."""
        return []

    def stop(self) -> list[tuple[Group, GroupOutcome]]:
        """Return nothing: no measurement outlives its call of `wait`."""
        return []

    def close(self) -> None:
        """Do nothing: there is nothing to release."""
