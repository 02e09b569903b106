"""Deployment ↔ Model Registry: the version that serves a measured configuration, its evidence, its aliases."""

from __future__ import annotations

from pathlib import Path

from . import tracking
from .tracking import Store, _plain_errors


def parent_of_sweep(store: Store, sweep: str) -> str | None:
    """The run that stands for a sweep: its parent, or the only run where it had one cell. None if the store has no run of it."""
    tops = [run for run in tracking.runs_of_sweep(store, sweep) if tracking.PARENT_TAG not in run.data.tags] if sweep else []
    return str(tops[0].info.run_id) if tops else None


def log_folder(store: Store, run_id: str, folder: Path) -> None:
    """Log all files of a folder as artifacts of a run. Raises TrackingError."""
    with _plain_errors(store.uri):
        store.client.log_artifacts(run_id, str(folder))
