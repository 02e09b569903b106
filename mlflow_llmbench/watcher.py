"""Who is told how a sweep goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


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


class Silent:
    """A watcher that tells nobody."""

    def start(self, total_cells: int) -> None:
        """Say nothing."""

    def cell(self, number: int, name: str) -> None:
        """Say nothing."""

    def event(self, event: Mapping[str, Any]) -> None:
        """Say nothing."""

    def note(self, text: str) -> None:
        """Say nothing."""

    def finish(self) -> None:
        """Say nothing."""
