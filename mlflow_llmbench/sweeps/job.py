"""Jobs: a planned cell of a sweep with its folder, its run, and the outcomes of its processes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ..analysis.repetitions import process_count
from ..measure.events import Event
from ..measure.journal import write_json
from ..measure.outcome import GroupOutcome, measurements
from ..records import reading
from ..records.cell import Cell
from ..records.codec import from_json
from ..records.errors import JournalError
from ..records.results import CellMeasurements, Hashes, ModelFacts, RunResult
from ..reports.result import Row
from .planning import PlannedCell


@dataclass(eq=False)  # compared by identity: lists of thousands are searched for a job
class Job:
    """One cell of a sweep: its plan, its folder and run, the outcomes of its processes, and its row once it is done.

    `started_ms` is Unix time in milliseconds.
    """

    planned: PlannedCell
    folder: Path
    run_id: str = ""
    started_ms: int = 0
    # Outcome of each process that measured this cell, and the cell's number in that process.
    attempts: list[tuple[GroupOutcome, int]] = field(default_factory=list)
    # Outcome of a process that began this cell and did not end it, and the cell's number in it; for its dates.
    tried: tuple[GroupOutcome, int] | None = None
    earlier: RunResult | None = None  # of the processes that an earlier command has finished
    lost: int = 0  # times that the machine was lost before it had measured this cell
    pending: RunResult | None = None  # its result while that is being written
    row: Row | None = None
    uploaded: bool = False  # everything of it is in the store, and its run has ended

    @property
    def cell(self) -> Cell:
        """The cell to measure."""
        return self.planned.cell

    @property
    def name(self) -> str:
        """The name of its run."""
        return self.planned.name

    @property
    def measured(self) -> bool:
        """True if as many processes have measured it as were requested."""
        return self.processes_done >= self.cell.processes

    @property
    def processes_done(self) -> int:
        """Number of processes that have measured it, those of an earlier command included."""
        return len(self.attempts) + (process_count(self.earlier) if self.earlier else 0)

    def count_text(self) -> str:
        """Say how many of its processes have measured it."""
        return f"It was measured in {self.processes_done} of {self.cell.processes} processes, which are kept."


def untold(job: Job, journal: Iterable[Event]) -> list[CellMeasurements]:
    """Return what processes of a job have measured beyond its attempts, by the job's own journal.

    A worker writes the end of a cell to the disk before it tells it, so it can end between the two.
    """
    return list(measurements(journal))[len(job.attempts) :]


def identity(job: Job) -> dict[str, str]:
    """Return the tags that identify the run of a job: its sweep, its folder in the sweep, its configuration."""
    return {"sweep": job.folder.parent.name, "cell": job.folder.name, "config_hash": job.planned.hashes.config}


def write_job(job: Job) -> None:
    """Write cell.json: everything that a result needs besides the measurement. Raises JournalError."""
    planned = job.planned
    known = {
        "cell": planned.cell,
        "model": planned.model,
        "hashes": planned.hashes,
        "name": planned.name,
        "predicted": planned.predicted_bytes,
        "predicted_load": planned.predicted_load_bytes,
        "predicted_placement": planned.predicted_placement,
        "started_ms": job.started_ms,
        "environment": planned.environment,
    }
    write_json(job.folder / "cell.json", known)


def read_job(folder: Path) -> Job:
    """Read the job that `write_job` wrote into a folder. Raises JournalError."""
    try:
        known = reading.read_own_json(folder / "cell.json")
        planned = PlannedCell(
            from_json(Cell, known["cell"]),
            from_json(ModelFacts, known["model"]),
            from_json(Hashes, known["hashes"]),
            known["name"],
            folder.name,
            known["predicted"],
            environment=known.get("environment"),
            predicted_load_bytes=known.get("predicted_load"),
            predicted_placement=known.get("predicted_placement"),
        )
        return Job(planned, folder, started_ms=known["started_ms"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise JournalError(
            f"Cannot read {folder / 'cell.json'}: {error}. Delete the folder {folder} and measure the cell again."
        ) from None
