"""Reuse of earlier results: of the same configuration, environment and workload, or left by a killed command."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..analysis.layout import weights_of
from ..analysis.repetitions import process_count
from ..analysis.summary import summarize
from ..analysis.verdict import judge
from ..config.spec import BenchSpec
from ..measure import journal, quality_order
from ..records import reading
from ..records.cell import PARAMETERS
from ..records.errors import JournalError
from ..records.invocation import command_text
from ..records.reading import Unreadable
from ..records.redaction import redact
from ..records.results import FORMAT, HASH_DIGITS, RunResult
from ..tracking.explanations import reason
from ..tracking.search import download_result, find_measured
from ..workloads.prompts import load_text
from . import upload
from .job import Job
from .run_recorder import PATIENCE_S

if TYPE_CHECKING:
    from ..tracking.store import Store


def earlier_cells(sweep: Path) -> dict[str, list[Path]]:
    """Return the folders of the cells in the other sweeps beside this one, newest first, by configuration hash.

    A folder is named by the hash, and by more where several cells of a sweep have the same.
    """
    found: dict[str, list[Path]] = {}
    for folder in sorted(sweep.parent.glob("*/*"), reverse=True):
        if folder.parent != sweep:
            found.setdefault(folder.name[:HASH_DIGITS], []).append(folder)
    return found


def find(
    job: Job, spec: BenchSpec, folders: Sequence[Path], store: Store | None, env_hashes: Sequence[str]
) -> RunResult | None:
    """Return an earlier result of exactly this cell, from one of its folders or the store; None if there is none.

    It is finished and valid, or else has the processes that a stopped command finished: then `resumed` is set, and its
    outcome is not `ok`. It must have been measured in one of `env_hashes`, the environments of the machines that would
    measure it now. Server results are never reused: a server may have been restarted with other settings under the same
    address, and of a server that we start we know the command but not its files.
    """
    if job.cell.scenario == "online":
        return None
    env_hashes = (job.planned.hashes.env,) if job.planned.environment else env_hashes
    is_newest = True
    for found, source in _candidates(job, folders, store, env_hashes):
        if not _is_same(found, job, env_hashes):
            continue
        if found.outcome != "ok" and is_newest and 0 < process_count(found) < job.cell.processes:
            return _taken_over(dataclasses.replace(found, resumed=source), job, spec)
        if found.outcome == "ok" and _quality_is_there(found, spec) and _is_valid(found):
            return _taken_over(dataclasses.replace(found, linked=source), job, spec)
        is_newest = is_newest and found.outcome != "ok"  # what was stopped before it has been measured since
    return None


def _taken_over(found: RunResult, job: Job, spec: BenchSpec) -> RunResult:
    """Return an earlier result as one of this sweep, with what this command was told about the machine."""
    return dataclasses.replace(
        found,
        sweep=job.folder.parent.name,
        price_per_hour=spec.options.price_per_hour,
        nominal_bandwidth=spec.options.nominal_bandwidth,
    )


def _is_same(found: RunResult, job: Job, env_hashes: Sequence[str]) -> bool:
    """Return True if a whole result was measured, not taken over, with the configuration and workload of a job."""
    ours = [getattr(found.hashes, name) == getattr(job.planned.hashes, name) for name in ("config", "workload")]
    is_own = not found.linked and not found.incomplete and _lay_alike(found, job)
    return found.schema == FORMAT and is_own and found.hashes.env in env_hashes and all(ours)


MOVED = 0.1
"""Largest share of the weights that may have lain elsewhere than the plan now expects, in a result that is reused."""


def _lay_alike(found: RunResult, job: Job) -> bool:
    """Return True unless a model was laid out otherwise than it would be now: free memory and its limit decide that."""
    parts = weights_of(found)
    expected = job.planned.predicted_placement
    if found.cell.placement == PARAMETERS["placement"].default:
        return True
    if not parts or expected is None:
        return False
    elsewhere = sum(max(size - expected.get(place, 0), 0) for place, size in parts.items())
    return elsewhere <= MOVED * sum(parts.values())


def _is_valid(found: RunResult) -> bool:
    return judge(found, summarize(found)).word == "valid"


def has_quality(found: RunResult | None, spec: BenchSpec) -> bool:
    """Return True if the processes of an earlier command have measured the requested quality."""
    return found is not None and _quality_is_there(found, spec)


def _quality_is_there(found: RunResult, spec: BenchSpec) -> bool:
    """Return True if a result has the requested quality figures, on the same text and tasks."""
    if quality_order.never(found.cell):
        return True
    tasks = quality_order.tasks_digest(spec.options)
    if tasks and (found.quality is None or found.quality.tasks_digest != tasks or not found.quality.tasks):
        return False
    if spec.options.quality == "none":
        return True
    compared = spec.options.quality_reference is None or (
        found.quality is not None and found.quality.divergence is not None
    )
    return (
        compared
        and found.quality is not None
        and found.quality.text_digest == load_text(spec.options.quality_text).digest
    )


def _candidates(
    job: Job, folders: Sequence[Path], store: Store | None, env_hashes: Sequence[str]
) -> Iterator[tuple[RunResult, str]]:
    """Yield candidate results, each with its run id or folder: those of the folders, then the store's."""
    for folder in folders:
        with contextlib.suppress(JournalError):
            yield journal.read_result(folder / "artifacts"), _run_of(folder) or str(folder)
    if store is None:
        return
    # If the store fails here, the error is reported when it is written to.
    with contextlib.suppress(Exception), tempfile.TemporaryDirectory() as scratch:
        for env_hash in env_hashes:
            for run_id in find_measured(store, dataclasses.replace(job.planned.hashes, env=env_hash)):
                yield journal.read_result(download_result(store, run_id, Path(scratch) / run_id)), run_id


def _run_of(folder: Path) -> str:
    with contextlib.suppress(Unreadable, KeyError, TypeError):
        return str(reading.read_own_json(folder / "run.json")["run_id"])
    return ""


def close_abandoned(output_dir: str, store: Store, warn: Callable[[str], None]) -> None:
    """Complete the runs of sweeps whose command was killed, or could not upload everything to this store.

    Measured cells are kept and uploaded, and the cell that was running becomes `crashed`. An error is passed to `warn`.
    After `PATIENCE_S` in vain the others are left to a later command: the store of their artifacts may be away.
    """
    waited_s = 0.0
    for folder in journal.unfinished(output_dir):
        if waited_s > PATIENCE_S:
            return
        started = time.monotonic()
        try:
            known = upload.read_sweep(folder)[1]
            if str(known.get("tracking_uri")) != redact(store.uri):
                continue
            home = dataclasses.replace(
                store, given_run_id=None, experiment_id=known.get("experiment_id") or store.experiment_id
            )
            done = upload.finish(folder, home)
        except Exception as error:
            warn(
                f"The sweep {folder.name} did not end in order, and its runs cannot be completed: {reason(error)}. "
                f"To try again: `{command_text('upload', str(folder))}`."
            )
            waited_s += time.monotonic() - started
            continue
        waited_s += time.monotonic() - started if done.refused else 0.0
        if done.recovered is not None and (done.new or done.completed or done.there):
            warn(
                f"The sweep {folder.name} had been killed. Its runs are ended now; "
                f"{done.recovered} of its cells had been measured."
            )
        elif done.recovered is None and not done.problems:
            warn(f"The sweep {folder.name} had not been uploaded completely. It is now.")
        for problem in done.problems:
            warn(f"Of the sweep {folder.name} is not uploaded: {problem}")
