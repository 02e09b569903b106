"""Progress reporting of a sweep: the interface, and an implementation that shows nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class Watcher(Protocol):
    """Receiver of a sweep's progress, such as `progress.Progress`."""

    def start(self, total_cells: int) -> None:
        """Begin: the plan has `total_cells` cells."""

    def cell(self, number: int, name: str) -> None:
        """Announce that cell `number` of the plan is next; also called for a cell that ends without a worker."""

    def event(self, event: Mapping[str, Any]) -> None:
        """Handle a worker's event."""

    def note(self, text: str) -> None:
        """Show a line to the user."""

    def finish(self) -> None:
        """End: nothing more comes."""


class Silent:
    """A watcher that shows nothing."""

    def start(self, total_cells: int) -> None:
        """Do nothing."""

    def cell(self, number: int, name: str) -> None:
        """Do nothing."""

    def event(self, event: Mapping[str, Any]) -> None:
        """Do nothing."""

    def note(self, text: str) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing."""
