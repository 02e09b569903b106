"""Load results by reference: a folder, a run or a sweep."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

from ..measure.journal import read_result
from ..records.errors import JournalError, NotComparable, TrackingError
from ..records.results import RunResult
from ..reports.result_set import Results
from .latest import resolve
from .search import RUN_REFERENCE, cells_of_run, cells_of_sweep, download_result, source_of
from .store import open_store

Given = RunResult | str | os.PathLike[str]
"""A result, or a reference of results as in `load_results`; what `run` returned is one, of its folder."""

SWEEP_ID = re.compile(r"\d{8}T\d{6}Z-[0-9a-f]{6}")


def load_results(reference: str | os.PathLike[str], tracking_uri: str | None = None) -> Results:
    """Load results from a journal folder (of a cell or a sweep), a run id, `runs:/<id>`, a sweep's name, or `latest`.

    The results of a sweep, of its folder or its parent run, are in the order in which they were measured. The list has
    `to_pandas()` and `best("throughput")`, and a notebook shows it as a table. Raises JournalError or TrackingError,
    with a one-line message that says what was looked for, NotComparable for an imported run, and UsageError for what is
    no reference.
    """
    reference, _ = resolve(reference, tracking_uri)
    folder = Path(reference)
    if os.path.isdir(folder):
        found = (
            [folder / "result.json"]
            if (folder / "result.json").exists()
            else sorted([*folder.glob("artifacts/result.json"), *folder.glob("*/artifacts/result.json")])
        )
        if not found:
            raise JournalError(
                f"The folder {reference} holds no result. "
                "Give the folder that `llmbench run` printed, or that of a cell in it."
            )
        return Results(sorted((read_result(file.parent) for file in found), key=lambda result: result.started_ms))
    run = RUN_REFERENCE.fullmatch(reference)
    if run is None and not SWEEP_ID.fullmatch(reference):
        raise JournalError(
            f"{reference} is neither a folder, nor a run id, nor the name of a sweep. "
            "Give one of them; `llmbench run --json` prints all three."
        )
    store = open_store(tracking_uri, reads=True)
    ids = cells_of_run(store, run[1]) if run else cells_of_sweep(store, reference)
    if not ids and run and (source := source_of(store, run[1])):
        raise NotComparable(
            f"The run {run[1]} was imported from {source}: it has neither raw stamps nor the fingerprint of its "
            "machine, so nothing can be concluded from it. Look at its figures beside ours in the MLflow UI."
        )
    if not ids:
        raise TrackingError(
            f"{reference} is not in the store {store.uri}, or holds no measured cell. Check --tracking-uri."
        )
    with tempfile.TemporaryDirectory() as scratch:
        return Results(read_result(download_result(store, run_id, Path(scratch) / run_id)) for run_id in ids)


def load_all(given: Given | Iterable[Given], tracking_uri: str | None = None) -> list[RunResult]:
    """Load the results of a reference, or of several in their order. See `load_results`. A result stands for itself."""
    several = given if isinstance(given, Iterable) and not isinstance(given, str) else [given]
    return [
        result
        for one in several
        for result in ([one] if isinstance(one, RunResult) else load_results(one, tracking_uri))
    ]
