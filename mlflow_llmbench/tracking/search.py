"""Find runs in a tracking store by their tags, and download their results."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..records.errors import TrackingError
from ..records.invocation import command_text
from ..records.results import Hashes
from .explanations import plain_errors, reason
from .reach import without_user
from .store import UPLOADED_TAG, Store

if TYPE_CHECKING:
    from mlflow.entities import Run

RUN_REFERENCE = re.compile(r"(?:runs:/)?([0-9a-f]{32})/?")
"""A run by its id, also as `runs:/ID`."""


def find_measured(store: Store, hashes: Hashes) -> list[str]:
    """Find runs with a complete, valid result of this configuration, environment and workload, in any experiment.

    Returns at most 5 ids, newest first.
    """
    wanted = {
        "config_hash": hashes.config,
        "env_hash": hashes.env,
        "workload_hash": hashes.workload,
        "outcome": "ok",
        "verdict": "valid",
    }
    clauses = [f"tags.`llmbench.{key}` = '{value}'" for key, value in wanted.items()] + [
        f"tags.`{UPLOADED_TAG}` = 'true'"
    ]
    experiments = [e.experiment_id for e in store.client.search_experiments()]
    found = store.client.search_runs(
        experiments, " and ".join(clauses), order_by=["attributes.start_time DESC"], max_results=5
    )
    return [str(run.info.run_id) for run in found]


def runs_of_sweep(store: Store, sweep: str) -> list[Run]:
    """Return all runs of a sweep in the store, in any experiment."""
    experiments = [e.experiment_id for e in store.client.search_experiments()]
    return list(store.client.search_runs(experiments, f"tags.`llmbench.sweep` = '{sweep}'", max_results=50_000))


def latest_sweep(store: Store, experiment_ids: Sequence[str]) -> Run | None:
    """Return the run of the cell that was measured last in these experiments; None if no sweep has been measured."""
    with plain_errors(store.uri):
        found = store.client.search_runs(
            [*experiment_ids],
            "tags.`llmbench.sweep` LIKE '%' and tags.`llmbench.outcome` LIKE '%'",
            order_by=["attributes.start_time DESC"],
            max_results=1,
        )
        return found[0] if found else None


def open_runs(store: Store, sweep: str) -> list[str]:
    """Return the ids of a sweep's runs in the store's experiment that are RUNNING."""
    wanted = f"tags.`llmbench.sweep` = '{sweep}' and attributes.status = 'RUNNING'"
    return [str(run.info.run_id) for run in store.client.search_runs([store.experiment_id], wanted, max_results=1000)]


def measured_runs(store: Store, sweep: str) -> list[Run]:
    """Return a sweep's runs that hold a result, in the order in which they started."""
    runs = [r for r in runs_of_sweep(store, sweep) if "llmbench.outcome" in r.data.tags]
    return sorted(runs, key=lambda r: int(r.info.start_time or 0))


def cells_of_sweep(store: Store, sweep: str) -> list[str]:
    """Return the ids of a sweep's runs that hold a result, in the order in which they started."""
    return [str(run.info.run_id) for run in measured_runs(store, sweep)]


def cells_of_run(store: Store, run_id: str) -> list[str]:
    """Return the run itself if it holds a result, else its children that do. Empty if the store does not have it."""
    from mlflow.exceptions import MlflowException

    try:
        run = store.client.get_run(run_id)
    except MlflowException:
        return []
    if "llmbench.outcome" in run.data.tags:
        return [run_id]
    return cells_of_sweep(store, run.data.tags["llmbench.sweep"]) if "llmbench.sweep" in run.data.tags else []


def download_result(store: Store, run_id: str, folder: Path) -> Path:
    """Fetch a run's result.json into `folder`, and return the folder. Raises TrackingError if the run has none."""
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from mlflow.exceptions import MlflowException

    folder.mkdir(parents=True, exist_ok=True)
    try:
        store.client.download_artifacts(run_id, "result.json", str(folder))
    except (MlflowException, OSError) as error:
        raise TrackingError(
            f"The run {run_id} has no result.json that can be read: {reason(error)}. "
            f"`{command_text('upload', 'FOLDER')}` completes a run."
        ) from None
    return folder


def require_run(store: Store, run_id: str) -> None:
    """Raise TrackingError unless the store has a run."""
    from mlflow.exceptions import MlflowException

    with plain_errors(store.uri):
        try:
            store.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            raise TrackingError(
                f"There is no run {run_id} in the MLflow store {without_user(store.uri)}. "
                "Give the id of one of its runs."
            ) from None


def find_tagged(store: Store, identity: Mapping[str, str]) -> str | None:
    """Return the newest complete run with these tags (named without `llmbench.`) in any experiment, or None."""
    with plain_errors(store.uri):
        clauses = [f"tags.`llmbench.{name}` = '{value}'" for name, value in identity.items()] + [
            f"tags.`{UPLOADED_TAG}` = 'true'"
        ]
        experiments = [e.experiment_id for e in store.client.search_experiments()]
        found = store.client.search_runs(
            experiments, " and ".join(clauses), order_by=["attributes.start_time DESC"], max_results=1
        )
        return str(found[0].info.run_id) if found else None


def source_of(store: Store, run_id: str) -> str | None:
    """Return the program that an imported run comes from; None for a run of ours or one that does not exist."""
    from mlflow.exceptions import MlflowException

    try:
        source: str | None = store.client.get_run(run_id).data.tags.get("llmbench.source")
    except MlflowException:
        return None
    return source
