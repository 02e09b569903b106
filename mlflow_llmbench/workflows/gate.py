"""Run the gate: find the champion and the candidate, compare them, keep the verdict."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ..analysis.decisions.limits import _told
from ..records.errors import UsageError
from ..records.redaction import redact

if TYPE_CHECKING:
    from ..analysis.decisions.gate import Gate
    from ..records.results import RunResult
    from ..tracking.registry import Registered
    from ..tracking.store import Store


def _permissions(given: argparse.Namespace) -> frozenset[str]:
    return frozenset(name for name in ("trust_remote_code", "allow_pickle") if getattr(given, name))


def _held(
    given: argparse.Namespace, baseline: RunResult, candidate: RunResult, limits: dict[str, float], limit: float
) -> tuple[Gate, str | None]:
    """Return the gate, and the parent run of the sweep that was measured for it (None if none was)."""
    from ..analysis.decisions import gate

    pairs = _pairs(given)
    if pairs is None:
        return gate.decide(baseline, candidate, limits, limit=limit, accept_suspect=_reason(given)), None
    if refused := gate.refuse_unlike_work(baseline, candidate):
        return refused, None

    from ..sweeps.progress import Progress
    from .gate_remeasurement import remeasure

    done = remeasure(
        baseline,
        candidate,
        pairs=pairs,
        permissions=_permissions(given),
        output_dir=given.output_dir,
        tracking_uri=given.tracking_uri,
        experiment=given.experiment,
        watcher=Progress(sys.stderr),
    )
    found = gate.decide(
        done.champion, done.candidate, limits, limit=limit, accept_suspect=_reason(given), in_turns=True
    )
    return dataclasses.replace(found, notes=(*found.notes, *done.notes)), done.sweep.parent_id


def _pairs(given: argparse.Namespace) -> int | None:
    """Return the number of fresh processes per side; None if the existing runs are used. Raises UsageError."""
    from .ab import DEFAULT_PAIRS

    text = _told(given.pairs)
    if text is None:
        return DEFAULT_PAIRS if given.measure else None
    if not text.isdecimal():
        raise UsageError(f"--pairs is not a whole number: {text}. Give at least 2; the default is {DEFAULT_PAIRS}.")
    return int(text)


def _candidate(given: argparse.Namespace, store: Store, baseline: RunResult) -> tuple[RunResult, str | None, str]:
    """Return the candidate's result, its run id (None if the store has none), and its name in messages.

    For a sweep, take the cell with the champion's configuration. Raises UsageError if there is not exactly one.
    """
    from ..tracking import registry
    from ..tracking.load_results import load_results

    if given.candidate.startswith("models:/"):
        version = registry.registered_at(store, given.candidate)
        return registry.result_of(store, version.run_id), version.run_id, version.uri
    results = load_results(given.candidate, given.tracking_uri)
    same = (
        results
        if len(results) == 1
        else [result for result in results if result.hashes.config == baseline.hashes.config]
    )
    if len(same) != 1:
        raise UsageError(
            f"{given.candidate} has {len(results)} cells, and {len(same)} of them have the champion's configuration. "
            "Give the run of one cell."
        )
    run_id = registry.run_behind(store, given.candidate, same[0])
    return same[0], run_id, f"run {run_id}" if run_id else given.candidate


def _write_gate(
    given: argparse.Namespace,
    found: Gate,
    files: dict[str, bytes],
    store: Store,
    champion: Registered,
    run_id: str | None,
    measured: str | None,
) -> None:
    from ..analysis.decisions import gate
    from ..measure.journal import write_bytes, write_json
    from ..reports.gate import HEADING, gate_cells
    from ..reports.tables import split_table
    from ..tracking import registry

    for option, name in ((given.markdown, "gate.md"), (given.junit, "junit.xml")):
        if option:
            write_bytes(Path(option), files[name])
    if run_id is None:
        print(
            f"\nNot logged: the store {redact(store.uri)} has no run of the candidate. "
            "Upload it with `llmbench upload`."
        )
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name, content in files.items():
            write_bytes(folder / name, content)
        write_json(folder / "gate.json", gate.gate_json(found))
        write_json(folder / "table.json", split_table(HEADING, gate_cells(found.checks)))
        for kept_in in filter(None, (run_id, store.given_run_id)):
            registry.log_gate(store, kept_in, champion, found.verdict, found.why, _reason(given), folder, measured)


def _reason(given: argparse.Namespace) -> str | None:
    """Return the reason for accepting suspect results, None if they are not accepted."""
    return _told(given.accept_suspect)
