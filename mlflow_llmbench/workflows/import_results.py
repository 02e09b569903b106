"""Import results of other programs into the store, as runs tagged with their source.

They stand beside our runs and are never compared as if they were ours.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..analysis.other_tools import Foreign, read_foreign
from ..analysis.summary import Point
from ..measure.journal import write_text
from ..records import reading
from ..records.errors import UsageError
from ..records.reading import Unreadable
from ..records.redaction import MASK, redact, redact_all
from ..tracking import runs
from ..tracking.search import find_tagged
from ..tracking.store import Store, open_store

LARGEST = 200_000_000
"""Largest file that is read, in bytes; results with every single request take some tens of megabytes."""


@dataclass(frozen=True)
class Imported:
    """Result of `import_file`: the measurements, their runs in the same order, and the number of new runs."""

    found: tuple[Foreign, ...]
    run_ids: tuple[str, ...]
    new: int


def import_file(path: str, tracking_uri: str | None = None, experiment: str | None = None) -> Imported:
    """Make one MLflow run for each measurement in a result file, except for those imported before.

    Raises UsageError for a file that cannot be imported, TrackingError for a problem of the store.
    """
    content = _read(path)
    try:
        found = read_foreign(_parse(content))
    except Unreadable as error:
        raise UsageError(f"Cannot read {path}: {error}. Give the JSON file that the program wrote.") from None
    except UsageError as error:
        raise UsageError(f"Cannot import {path}. {error}") from None
    found = list(redact_all(found))
    digest = hashlib.sha256(content).hexdigest()[:16]
    store = open_store(tracking_uri, experiment)
    if store.given_run_id:
        raise UsageError("MLFLOW_RUN_ID is set, but an import makes its own runs. Unset it.")
    run_ids, new = [], 0
    for number, one in enumerate(found):
        identity = {"source": one.source, "import": f"{digest}-{number}"}
        run_id = find_tagged(store, identity)
        if run_id is None:
            run_id, new = _log(store, one, identity, Path(path).name, content), new + 1
        run_ids.append(run_id)
    return Imported(tuple(found), tuple(run_ids), new)


def _parse(content: bytes) -> Any:
    """Parse JSON, or JSON Lines (`llama-bench -o jsonl`) into the list of their objects. Raises Unreadable."""
    try:
        return reading.parse_json(content)
    except Unreadable:
        if b"\n" not in content.strip():
            raise
        lines = [line for _, _, line in reading.json_lines(reading.decode(content))]
        if len(lines) < 2 or None in lines:
            raise
        return lines


def _read(path: str) -> bytes:
    try:
        return reading.read_bytes(path, LARGEST)
    except Unreadable as error:
        raise UsageError(
            f"Cannot read {path}: {error}. Give the JSON file that the program wrote, without single requests if it is "
            "large."
        ) from None


def _log(store: Store, one: Foreign, identity: dict[str, str], file: str, content: bytes) -> str:
    now = int(time.time() * 1000)
    run_id = runs.begin_run(store, one.name, identity, started_ms=now)
    outcome = "error"
    try:
        points = [Point(key, 0, value, now) for key, value in {**one.own, **one.metrics}.items()]
        runs.log_values(store, run_id, dict(one.params), points)
        told = {"source_version": one.version, "tokens_by": one.tokens_by, "translated": ", ".join(sorted(one.metrics))}
        runs.set_tags(store, run_id, {name: value for name, value in told.items() if value})
        with tempfile.TemporaryDirectory() as scratch:
            name = redact(file).replace(MASK, "masked")
            write_text(Path(scratch) / name, content.decode("utf-8", "replace"))
            runs.log_folder(store, run_id, Path(scratch), "imported")
        runs.set_tags(store, run_id, {"uploaded": "true"})  # last, so that an import cut off midway is repeated
        outcome = "ok"
    finally:
        runs.end_run(store, run_id, outcome)
    return run_id
