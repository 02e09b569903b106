"""A task: the load group and options that a worker is given."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..records.cell import Cell, Options
from ..records.results import ModelFacts


@dataclass(frozen=True)
class Task:
    """The task of one worker: cells that share a load, the folder of each, and the command's options with its limits.

    `prepare` is True if the model's files may not be on this machine yet. `names` of the cells for messages, and their
    `predicted_bytes` (None if unknown), are only needed by an executor that chooses a machine.
    """

    cells: tuple[Cell, ...]
    model: ModelFacts
    folders: tuple[Path, ...]
    options: Options
    prepare: bool = True
    names: tuple[str, ...] = ()
    predicted_bytes: tuple[int | None, ...] = ()

    def part(self, numbers: Sequence[int]) -> Task:
        """Return the task of some of the cells, by their positions."""
        chosen = {
            name: tuple(getattr(self, name)[number] for number in numbers)
            for name in ("cells", "folders", "names", "predicted_bytes")
        }
        return dataclasses.replace(self, **chosen)  # type: ignore[arg-type]

    def with_cell(self, cell: Cell, folder: Path) -> Task:
        """Return the task with one more cell, which a search has added."""
        return dataclasses.replace(self, cells=(*self.cells, cell), folders=(*self.folders, folder))
