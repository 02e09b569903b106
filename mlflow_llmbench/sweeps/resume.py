"""Reuse of earlier results: of the same configuration, environment and workload, or left by a killed command."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..analysis.summary import summarize
from ..analysis.verdict import judge
from ..config.spec import BenchSpec
from ..measure import journal, quality_order
from ..records import reading
from ..records.errors import JournalError, first_line
from ..records.invocation import command_text
from ..records.reading import Unreadable
from ..records.redaction import redact
from ..records.results import SCHEMA, RunResult
from ..tracking.search import download_result, find_measured
from ..workloads.prompts import load_text
from . import upload
from .job import Job

if TYPE_CHECKING:
    from ..tracking.store import Store


def find(job: Job, spec: BenchSpec, store: Store | None, env_hashes: Sequence[str]) -> RunResult | None:
    """Return a finished, valid result of exactly this cell, from the journal or the store; None if there is none.

    It must have been measured in one of `env_hashes`, the environments of the machines that would measure it now.
    Server results are never reused: a server may have been restarted with other settings under the same address, and of
    a server that we start we know the command but not its files.
    """
    if job.cell.scenario == "online":
        return None
    env_hashes = (job.planned.hashes.env,) if job.planned.environment else env_hashes
    for found, source in _candidates(job, store, env_hashes):
        same = found.schema == SCHEMA and found.outcome == "ok" and not found.linked and found.hashes.env in env_hashes
        ours = [getattr(found.hashes, name) == getattr(job.planned.hashes, name) for name in ("config", "workload")]
        if same and all(ours) and _quality_is_there(found, spec) and judge(found, summarize(found)).word == "valid":
            return dataclasses.replace(
                found,
                sweep=job.folder.parent.name,
                linked=source,
                price_per_hour=spec.options.price_per_hour,
                nominal_bandwidth=spec.options.nominal_bandwidth,
            )
    return None


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


def _candidates(job: Job, store: Store | None, env_hashes: Sequence[str]) -> Iterator[tuple[RunResult, str]]:
    """Yield candidate results, each with its run id or folder: the journal's, newest first, then the store's."""
    folders = job.folder.parent.parent.glob(f"*/{job.planned.hashes.config}*/artifacts")
    for folder in sorted(folders, reverse=True):
        if folder.parent != job.folder:
            with contextlib.suppress(JournalError):
                yield journal.read_result(folder), _run_of(folder.parent) or str(folder.parent)
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
    """End the runs of sweeps whose command was killed.

    Measured cells are kept and uploaded, and the cell that was running becomes `crashed`. An error is passed to `warn`.
    """
    for folder in journal.abandoned(output_dir):
        try:
            if _store_of(folder) == redact(store.uri):
                kept = upload.recover(folder)
                upload.complete(folder, dataclasses.replace(store, given_run_id=None))
                warn(
                    f"The sweep {folder.name} had been killed. Its runs are ended now; "
                    f"{kept} of its cells had been measured."
                )
        except Exception as error:
            warn(
                f"The sweep {folder.name} had been killed, and its runs cannot be ended: {first_line(error)}. "
                f"To try again: `{command_text('upload', str(folder))}`."
            )


def _store_of(folder: Path) -> str:
    try:
        return str(reading.read_own_json(folder / "sweep.json").get("tracking_uri"))
    except (Unreadable, AttributeError):
        return ""
