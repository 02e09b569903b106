"""What need not be measured again: results of the same configuration, environment and workload, and what a killed command left."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from . import journal, reference, tracking, upload
from .errors import JournalError, first_line
from .jobs import Job
from .records import SCHEMA, RunResult
from .redaction import redact
from .spec import BenchSpec
from .summary import summarize
from .validity import judge
from .workload import load_text

if TYPE_CHECKING:
    from .tracking import Store


def find(job: Job, spec: BenchSpec, store: Store | None, env_hashes: Sequence[str]) -> RunResult | None:
    """A finished and valid result of just this cell, from the journal or from the store, as a result of this sweep; None if there is none.

    It was measured in an environment of `env_hashes`: those of the machines that would measure it now. Never one of a server: it
    may have been started anew with other settings under the same address, and of one that we start we know the command and not its files.
    """
    if job.cell.scenario == "online":
        return None
    env_hashes = (job.hashes.env,) if job.environment else env_hashes
    for found, source in _candidates(job, store, env_hashes):
        same = found.schema == SCHEMA and found.outcome == "ok" and not found.linked and found.hashes.env in env_hashes
        ours = [getattr(found.hashes, name) == getattr(job.hashes, name) for name in ("config", "workload")]
        if same and all(ours) and _quality_is_there(found, spec) and judge(found, summarize(found)).word == "valid":
            return dataclasses.replace(
                found, sweep=job.folder.parent.name, linked=source, price_per_hour=spec.options.price_per_hour
            )
    return None


def _quality_is_there(found: RunResult, spec: BenchSpec) -> bool:
    """Whether a result has the quality that is asked for, on the same text and tasks."""
    if reference.never(found.cell):
        return True
    tasks = reference.tasks_digest(spec.options)
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
    """Results that may do, newest first, each with the run or the folder that it was measured in."""
    folders = job.folder.parent.parent.glob(f"*/{job.hashes.config}*/artifacts")
    for folder in sorted(folders, reverse=True):
        if folder.parent != job.folder:
            with contextlib.suppress(JournalError):
                yield journal.read_result(folder), _run_of(folder.parent) or str(folder.parent)
    if store is None:
        return
    with (
        contextlib.suppress(Exception),
        tempfile.TemporaryDirectory() as scratch,
    ):  # a store that fails here says so when it is written to
        for env_hash in env_hashes:
            for run_id in tracking.find_measured(store, dataclasses.replace(job.hashes, env=env_hash)):
                yield journal.read_result(tracking.download_result(store, run_id, Path(scratch) / run_id)), run_id


def _run_of(folder: Path) -> str:
    with contextlib.suppress(OSError, ValueError, KeyError):
        return str(json.loads((folder / "run.json").read_text(encoding="utf-8"))["run_id"])
    return ""


def close_abandoned(output_dir: str, store: Store, warn: Callable[[str], None]) -> None:
    """End the runs of sweeps whose command was killed: what it had measured is kept and uploaded, the cell that it was at is `crashed`."""
    for folder in journal.abandoned(output_dir):
        try:
            if _store_of(folder) == redact(store.uri):
                kept = upload.recover(folder)
                upload.complete(folder, dataclasses.replace(store, given_run_id=None))
                warn(
                    f"The sweep {folder.name} had been killed. Its runs are ended now; {kept} of its cells had been measured."
                )
        except Exception as error:
            warn(
                f"The sweep {folder.name} had been killed, and its runs cannot be ended: {first_line(error)}. `llmbench upload {folder}` tries it again."
            )


def _store_of(folder: Path) -> str:
    try:
        return str(json.loads((folder / "sweep.json").read_text(encoding="utf-8")).get("tracking_uri"))
    except (OSError, ValueError, AttributeError):
        return ""
