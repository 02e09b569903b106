"""Put a sweep's folder into a tracking store, as far as it is not there yet: after a server was away, or on another machine."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from . import artifacts, overview, plan, report, tracking, view
from .errors import JournalError
from .journal import read_result
from .records import RunResult
from .spec import BenchSpec, parse

if TYPE_CHECKING:
    from mlflow.entities import Run


@dataclass(frozen=True)
class Uploaded:
    """What an upload did: runs that are new, runs that were completed, runs that were whole already."""

    new: int
    completed: int
    there: int
    ui: str


def upload(folder: str, tracking_uri: str | None = None, experiment: str | None = None) -> Uploaded:
    """Upload the finished cells of a sweep's folder. A second upload changes nothing. Raises JournalError or TrackingError."""
    root = Path(folder)
    spec, planned = _read_spec(root)
    results = [(read_result(path.parent), path.parent) for path in root.glob("*/artifacts/result.json")]
    order = {cell: number for number, cell in enumerate(plan.expand_cells(spec))}
    results.sort(key=lambda pair: order.get(pair[0].cell, len(order)))
    if not results:
        raise JournalError(f"{folder} holds no finished cell, so there is nothing to upload. Give a folder that `llmbench run` has printed.")
    store = tracking.open_store(tracking_uri, experiment)
    runs = tracking.runs_of_sweep(store, root.name)
    counts = {"new": 0, "completed": 0, "there": 0}
    parent_id, parent_state = None, "there"
    if spec.varied:
        parents = [r for r in runs if tracking.PARENT_TAG not in r.data.tags]
        parent_state, parent_id = _state(parents[0] if parents else None)
        parent_id = parent_id or tracking.begin_run(store, plan.sweep_name(spec), None, root.name, min(r.started_ms for r, _ in results))
        counts[parent_state] += 1
    measured: list[tuple[report.Row, str]] = []
    by_config = {r.data.tags.get("llmbench.config_hash"): r for r in runs}
    for result, path in results:
        state, run_id = _state(by_config.get(result.hashes.config))
        counts[state] += 1
        name = plan.cell_name(result.cell, spec.varied)
        run_id = run_id or tracking.begin_run(store, name, parent_id, root.name, result.started_ms, result.hashes.config)
        measured.append((report.row_of(result), run_id))
        if state != "there":
            tracking.upload_cell(store, run_id, result, path, {})
            tracking.end_run(store, run_id, result.outcome, result.ended_ms)
    if parent_id and parent_state != "there":
        with tempfile.TemporaryDirectory() as comparison:  # with the run ids of this store, and also where the command died before it
            artifacts.write_sweep(
                measured, spec, Path(comparison), sweep=root.name, ui=tracking.ui_command(store), experiment_id=store.experiment_id
            )
            publish_parent(store, parent_id, spec, measured, Path(comparison), {}, lambda text: None)
        tracking.end_run(store, parent_id, _outcome([r for r, _ in results], planned), max(r.ended_ms for r, _ in results))
    return Uploaded(**counts, ui=tracking.ui_command(store))


def publish_parent(
    store: tracking.Store,
    parent_id: str,
    spec: BenchSpec,
    measured: Sequence[tuple[report.Row, str]],
    comparison: Path,
    asked: Mapping[str, str],
    warn: Callable[[str], None],
) -> str | None:
    """The parent of a sweep: the view of its cells (rows with their run ids), its description, params and comparison.

    Returns the view's page, None where the store did not take one; `warn` is told why.
    """
    rows, ids = [row for row, _ in measured], [run_id for _, run_id in measured]
    link = view.publish(store, parent_id, plan.sweep_name(spec), spec.varied, rows, ids, warn)
    note = (f"[Compare the cells in charts]({link})\n\n" if link else "") + overview.description(rows, spec.varied)
    tracking.upload_parent(store, parent_id, plan.asked_params(spec) | dict(asked), note, comparison)
    return link


def _state(run: Run | None) -> tuple[str, str | None]:
    """Whether a run is new, was begun, or is whole (all has arrived, and it has ended), and its id."""
    if run is None:
        return "new", None
    whole = tracking.UPLOADED_TAG in run.data.tags and run.info.status != "RUNNING"
    return ("there" if whole else "completed"), str(run.info.run_id)


def _outcome(results: list[RunResult], planned: int) -> str:
    """Outcome of the whole sweep; cells that were planned and have no result were never reached."""
    words = {result.outcome for result in results} | ({"interrupted"} if len(results) < planned else set())
    return "ok" if words <= {"ok", "skipped"} else "interrupted" if "interrupted" in words else "error"


def _read_spec(root: Path) -> tuple[BenchSpec, int]:
    """What was asked for, and how many cells that made."""
    try:
        data = json.loads((root / "sweep.json").read_text(encoding="utf-8"))
        return parse(data["parameters"]), int(data["cells"])
    except (OSError, ValueError, KeyError, TypeError):
        raise JournalError(
            f"{root} is not the folder of a sweep: it has no sweep.json that can be read. Give a folder that `llmbench run` has printed."
        ) from None
