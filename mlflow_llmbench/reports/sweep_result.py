"""The result of a command that measures a sweep, as text for a terminal and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..records.invocation import command_text
from ..records.redaction import redact
from .result import Row, format_table
from .result_set import ResultSet
from .sweep import headline


@dataclass(frozen=True)
class SweepResult(ResultSet):
    """Result of a command. Where a function takes a reference of results, it stands for its folder.

    `run_ids` are in the order of the planned cells, "" where a cell has no run. `parent_id` is None for a single cell.
    `page` is the page to open in the MLflow UI.
    """

    rows: tuple[Row, ...]
    varied: tuple[str, ...]
    outcome: str
    folder: Path
    run_ids: tuple[str, ...]
    parent_id: str | None
    tracking_uri: str
    experiment_id: str
    ui: str
    page: str
    not_uploaded: tuple[str, ...] = ()
    sentences: tuple[str, ...] = ()  # findings that need several cells

    @property
    def exit_code(self) -> int:
        """Exit code: 0 if every cell was measured or skipped and all was uploaded, 130 if interrupted, else 1."""
        return 130 if self.outcome == "interrupted" else int(self.outcome != "ok" or bool(self.not_uploaded))

    @property
    def address(self) -> str:
        """Address of its page in the MLflow UI, "" if the store is a database without a server."""
        return f"{self.ui}/{self.page}" if self.ui.startswith(("http://", "https://")) else ""

    def __fspath__(self) -> str:
        return str(self.folder)

    def table(self) -> str:
        """Return the comparison as text."""
        return format_table(self.rows, self.varied)

    def __repr__(self) -> str:
        folder = self.folder.relative_to(Path.cwd()) if self.folder.is_relative_to(Path.cwd()) else self.folder
        return f"<SweepResult in {folder}: {headline(self.rows, self.varied)}>"

    def _line(self, number: int, known: set[str]) -> dict[str, Any]:
        return super()._line(number, known) | {"run_id": self.run_ids[number] or None}

    def _more_lines(self) -> list[str]:
        return [*self.sentences, *format_locations(self).splitlines()]


def format_sweep_result(result: SweepResult) -> str:
    """Format the result for a terminal: the table of cells, what they say together, and where everything is."""
    return "\n\n".join([result.table(), *result.sentences, format_locations(result)])


def format_locations(result: SweepResult) -> str:
    """Return the lines that say where the results are and how to open them."""
    name = "comparison" if result.parent_id else "run"
    lines = [f"Results: {result.folder}", *(f"Not uploaded: {line}" for line in dict.fromkeys(result.not_uploaded))]
    if result.address:
        lines.append(f"Open the {name}: {result.address}")
    else:
        lines += [f"Open the {name}: {result.ui}", f"then http://127.0.0.1:5000/{result.page}"]
    if result.not_uploaded:
        lines.append(f"Upload the rest: {command_text('upload', str(result.folder))}")
    return "\n".join(lines)


def sweep_json(result: SweepResult) -> Mapping[str, Any]:
    """Return the result as one JSON object: outcome, locations, and runs with their parameters and metrics."""
    runs = [
        {
            "run_id": run_id,
            "outcome": row.outcome,
            "verdict": row.verdict.word if row.verdict else None,
            "verdict_reasons": [reason.code for reason in row.verdict.reasons] if row.verdict else [],
            "params": vars(row.cell),
            "metrics": dict(row.metrics),
            "message": row.message or None,
        }
        for run_id, row in zip(result.run_ids, result.rows, strict=True)
    ]
    locations = {
        "parent_run_id": result.parent_id,
        "tracking_uri": redact(result.tracking_uri),
        "experiment_id": result.experiment_id,
        "folder": str(result.folder),
        "not_uploaded": list(result.not_uploaded),
    }
    return {"outcome": result.outcome, **locations, "runs": runs}
