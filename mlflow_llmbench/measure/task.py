"""Tasks and jobs: a load group to measure, and what one worker process is given to do."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..records.cell import Cell, Options
from ..records.codec import from_json, to_json
from ..records.results import ModelFacts
from ..system import machine


@dataclass(frozen=True)
class Task:
    """A load group: cells that share a load, the folder of each, and the command's options with its limits.

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


@dataclass(frozen=True)
class QualityOrder:
    """The evaluation that a worker does after its last cell, or the references that it computes.

    `text`: name or path of the text to score, None for none · `digest`: of that text · `references`: workload → file
    of its reference · `is_reference`: True if the model is the reference itself · `withheld`: why nothing is compared ·
    `tasks`: tasks of lm-eval, each with at most `most_documents` of its documents.
    """

    text: str | None = None
    digest: str = ""
    references: Mapping[str, str] = field(default_factory=dict)
    is_reference: bool = False
    withheld: str = ""
    tasks: tuple[str, ...] = ()
    most_documents: int | None = None


OFFLOADED = "offloaded"
"""Folder in that of a load's first cell for weights that the worker writes to the disk. The parent deletes it."""


@dataclass(frozen=True)
class WorkerJob:
    """The job of one worker process, which reads it as one line of JSON.

    `task`: *prepare*, *resolve*, *measure*, *evaluate*, *reference* or *train* · `model`: None to resolve it ·
    `folders`: one for each cell · `searches`: True if the parent chooses further cells from the results · `pauses`:
    True if the worker waits after a cell until the parent has kept it · `training`: the order of a training (see
    `backends.huggingface.qat`) · `memory_bytes`: host memory beyond which the parent ends the worker.
    """

    task: str
    cells: tuple[Cell, ...]
    model: ModelFacts | None = None
    folders: tuple[Path, ...] = ()
    quality: QualityOrder | None = None
    searches: bool = False
    pauses: bool = False
    training: Mapping[str, Any] | None = None
    memory_bytes: int | None = None

    @property
    def threads(self) -> int:
        """Number of CPU threads: the requested one, or the physical cores that this process may use."""
        return self.cells[0].threads or machine.physical_cores()

    @property
    def facts(self) -> ModelFacts:
        """The model, which every job has but that of resolving it."""
        assert self.model
        return self.model

    def to_line(self) -> str:
        """Return the job as one line of JSON, with its newline."""
        return json.dumps({**to_json(self), "folders": list(map(str, self.folders))}) + "\n"

    @classmethod
    def from_line(cls, line: str) -> WorkerJob:
        """Return the job of a line of `to_line`."""
        job = from_json(cls, json.loads(line))
        return dataclasses.replace(job, folders=tuple(map(Path, job.folders)))
