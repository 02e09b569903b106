"""Run the gate: find the champion and the candidate, compare them, keep the verdict with the candidate's run."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..analysis.decisions import gate as analysis
from ..analysis.decisions.gate import DEFAULT_LIMIT, Gate
from ..measure.journal import write_bytes, write_json
from ..records.errors import UsageError
from ..records.redaction import redact
from ..records.results import RunResult
from ..reports.gate import HEADING, gate_cells, gate_json, gate_junit, gate_markdown
from ..reports.tables import split_table
from ..system import calibrations
from ..tracking import promotion, registry
from ..tracking.latest import resolve
from ..tracking.load_results import load_results
from ..tracking.registry import Registered
from ..tracking.store import Store, open_store
from . import deployments
from .gate_remeasurement import Remeasure, remeasure


@dataclass(frozen=True)
class GateRun:
    """Result of `gate`: the verdict with its checks, the champion, and the candidate.

    `candidate` is its name in messages, `run_id` its run (None if the store, `store_uri`, has none). `measured` is the
    parent run in which both sides were measured again (None if their own runs were used).
    """

    found: Gate
    champion: Registered
    candidate: str
    run_id: str | None
    measured: str | None
    store_uri: str

    @property
    def files(self) -> dict[str, bytes]:
        """The verdict as files: gate.md for people, junit.xml for a CI server."""
        texts = {"gate.md": gate_markdown, "junit.xml": gate_junit}
        return {
            name: redact(text(self.found, self.champion.uri, self.candidate)).encode() for name, text in texts.items()
        }


def gate(
    candidate: str | os.PathLike[str],
    against: str,
    limits: Mapping[str, float] | None = None,
    *,
    default_limit: float = DEFAULT_LIMIT,
    accept_suspect: str | None = None,
    again: Remeasure | None = None,
    tracking_uri: str | None = None,
    on_result: Callable[[GateRun], None] = lambda run: None,
) -> GateRun:
    """Compare `candidate` with the champion `against`, and keep the verdict with the candidate's run.

    `candidate` is a reference of `load_results` or of a registered version; `against` names a version. Either can be
    that of a deployment on this machine (`deployments:/NAME`). `limits` are the allowed regressions by metric (ratios),
    `default_limit` is that of all others. With `again`, both configurations are measured again first. `on_result` gets
    the result before it is logged. Raises LlmbenchError if there is no verdict.
    """
    candidate = deployments.version_of(candidate) if isinstance(candidate, str) else candidate
    against = deployments.version_of(against)
    store = open_store(tracking_uri, reads=True)
    champion = registry.registered_at(store, against)
    baseline = registry.result_of(store, champion.run_id)
    result, run_id, name = _candidate(candidate, store, tracking_uri, baseline)
    measured = None
    if again is None:
        found = analysis.decide(
            baseline,
            result,
            limits,
            limit=default_limit,
            accept_suspect=accept_suspect,
            calibrations=calibrations.kept(),
        )
    elif refused := analysis.refuse_unlike_work(baseline, result):
        found = refused
    else:
        done = remeasure(baseline, result, again, tracking_uri)
        found = analysis.decide(
            done.champion, done.candidate, limits, limit=default_limit, accept_suspect=accept_suspect, in_turns=True
        )
        found, measured = dataclasses.replace(found, notes=(*found.notes, *done.notes)), done.sweep.parent_id
    run = GateRun(found, champion, name, run_id, measured, store.uri)
    on_result(run)
    if run_id:
        _log(store, run, run_id, accept_suspect)
    return run


def _candidate(
    reference: str | os.PathLike[str], store: Store, tracking_uri: str | None, baseline: RunResult
) -> tuple[RunResult, str | None, str]:
    """Return the candidate's result, its run id (None if the store has none), and its name in messages.

    For a sweep, take the cell with the champion's configuration. Raises UsageError if there is not exactly one.
    """
    reference, _ = resolve(reference, tracking_uri)
    if reference.startswith("models:/"):
        version = registry.registered_at(store, reference)
        return registry.result_of(store, version.run_id), version.run_id, version.uri
    results = load_results(reference, tracking_uri)
    same = [result for result in results if len(results) == 1 or result.hashes.config == baseline.hashes.config]
    if len(same) != 1:
        raise UsageError(
            f"{reference} has {len(results)} cells, and {len(same)} of them have the champion's configuration. "
            "Give the run of one cell."
        )
    run_id = registry.run_behind(store, reference, same[0])
    return same[0], run_id, f"run {run_id}" if run_id else reference


def _log(store: Store, run: GateRun, run_id: str, accept_suspect: str | None) -> None:
    """Log the verdict on the candidate's run, and on the run of the project if `mlflow run` called us."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name, content in run.files.items():
            write_bytes(folder / name, content)
        write_json(folder / "gate.json", gate_json(run.found))
        write_json(folder / "table.json", split_table(HEADING, gate_cells(run.found.checks)))
        for kept_in in filter(None, (run_id, store.given_run_id)):
            promotion.log_gate(
                store, kept_in, run.champion, run.found.verdict, run.found.why, accept_suspect, folder, run.measured
            )
