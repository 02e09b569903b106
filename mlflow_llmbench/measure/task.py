"""A task: the load group and options that a worker is given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..records.cell import Cell, Options
from ..records.results import ModelFacts


@dataclass(frozen=True)
class Task:
    """The task of one worker: cells that share a load, the folder of each, and the command's options with its limits.

    `prepare` is True if the model's files may not be on this machine yet.
    """

    cells: tuple[Cell, ...]
    model: ModelFacts
    folders: tuple[Path, ...]
    options: Options
    prepare: bool = True
