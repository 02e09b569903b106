"""Jobs: a cell of a sweep with its model and folder, the outcomes of its processes, and the result made from them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..measure.journal import write_json
from ..measure.outcome import GroupOutcome
from ..records.cell import Cell
from ..records.errors import JournalError
from ..records.results import Hashes, ModelFacts, from_json
from ..reports.result import Row


@dataclass(eq=False)  # compared by identity: lists of thousands are searched for a job
class Job:
    """One cell of a sweep: its model, hashes, folder and run, the reason if it is refused, and its row once it is done.

    `predicted` is the predicted peak memory in bytes, `started_ms` is Unix time in milliseconds.
    """

    cell: Cell
    model: ModelFacts
    hashes: Hashes
    folder: Path
    name: str
    predicted: int | None = None
    refused: str | None = None
    run_id: str = ""
    started_ms: int = 0
    # Outcome of each process that measured this cell, and the cell's number in that process.
    attempts: list[tuple[GroupOutcome, int]] = field(default_factory=list)
    environment: Mapping[str, Any] | None = None  # of the worker's interpreter, if it is not the command's
    lost: int = 0  # times that the machine was lost before it had measured this cell
    row: Row | None = None

    @property
    def measured(self) -> bool:
        """True if as many processes have measured it as were requested."""
        return len(self.attempts) >= self.cell.processes


def identity(job: Job) -> dict[str, str]:
    """Return the tags that identify the run of a job: its sweep, its folder in the sweep, its configuration."""
    return {"sweep": job.folder.parent.name, "cell": job.folder.name, "config_hash": job.hashes.config}


def write_job(job: Job) -> None:
    """Write cell.json: everything that a result needs besides the measurement. Raises JournalError."""
    known = {
        name: getattr(job, name)
        for name in ("cell", "model", "hashes", "name", "predicted", "started_ms", "environment")
    }
    write_json(job.folder / "cell.json", known)


def read_job(folder: Path) -> Job:
    """Read the job that `write_job` wrote into a folder. Raises JournalError."""
    try:
        known = json.loads((folder / "cell.json").read_text(encoding="utf-8"))
        cell, model, hashes = (
            from_json(Cell, known["cell"]),
            from_json(ModelFacts, known["model"]),
            from_json(Hashes, known["hashes"]),
        )
        own = {"started_ms": known["started_ms"], "environment": known.get("environment")}
        return Job(cell, model, hashes, folder, known["name"], known["predicted"], **own)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise JournalError(
            f"Cannot read {folder / 'cell.json'}: {error}. Delete the folder {folder} and measure the cell again."
        ) from None
