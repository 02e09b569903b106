"""The result of a study, as text for a terminal."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..analysis.scaling.findings import Findings
from .study import format_study
from .sweep_result import SweepResult, format_locations


@dataclass(frozen=True)
class StudyResult:
    """Result of a study. `sweep` is None if nothing was measured, `found` is None if the sweep was interrupted.

    `folder` holds study/ and scaling/ (None if they were only logged); `run_id` is the run that holds them (None if
    there is none).
    """

    sweep: SweepResult | None
    found: Findings | None
    folder: Path | None
    run_id: str | None

    @property
    def exit_code(self) -> int:
        """Exit code of the sweep, 0 without one."""
        return self.sweep.exit_code if self.sweep else 0


def format_study_result(done: StudyResult) -> str:
    """Format the result for a terminal: the cells that were measured, the findings, and where everything is."""
    parts = [f"{done.sweep.table()}\n"] if done.sweep else []
    if done.found:
        parts.append(format_study(done.found))
    if done.sweep:
        parts.append(f"\n{format_locations(done.sweep)}")
    if done.found:
        parts += [f"Report: {done.folder / 'study' / 'report.html'}"] if done.folder else []
        parts.append(
            f"Logged on run {done.run_id}: study/report.html."
            if done.run_id
            else "Not logged: the store has no run of these sweeps. Give --log RUN."
        )
    return "\n".join(parts)
