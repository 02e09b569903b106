"""Print results on the terminal: one JSON object, and where the results of a sweep are."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..records.invocation import command_text
from ..records.redaction import redact

if TYPE_CHECKING:
    from ..sweeps.sweep import SweepResult


def print_json(data: object, ensure_ascii: bool = False) -> None:
    """Print data as one line of JSON."""
    print(json.dumps(data, ensure_ascii=ensure_ascii))


def print_version_warnings() -> None:
    """Print a line on stderr for each package that is older than its oldest safe version."""
    from ..backends.packages import warnings_of_versions

    for line in warnings_of_versions():
        print(f"llmbench: {line}", file=sys.stderr)


def print_locations(result: SweepResult) -> None:
    """Print where the results are and how to open them."""
    print(f"\nResults: {result.folder}")
    for line in result.not_uploaded:
        print(f"Not uploaded: {line}")
    name = "comparison" if result.parent_id else "run"
    if result.ui.startswith("http"):
        print(f"Open the {name}: {result.ui}/{result.page}")
    else:
        print(f"Open the {name}: {result.ui}\nthen http://127.0.0.1:5000/{result.page}")
    if result.not_uploaded:
        print(f"Upload the rest: {command_text('upload', str(result.folder))}")


def sweep_json(result: SweepResult) -> Mapping[str, Any]:
    """Return the result as one JSON object: outcome, locations, and runs with their parameters and metrics."""
    runs = [
        {
            "run_id": run_id,
            "outcome": row.outcome,
            "verdict": row.verdict.word if row.verdict else None,
            "verdict_reasons": [reason.code for reason in row.verdict.reasons] if row.verdict else [],
            "params": vars(row.cell),
            "metrics": dict(row.metrics),
            "message": row.message or None,
        }
        for run_id, row in zip(result.run_ids, result.rows, strict=True)
    ]
    locations = {
        "parent_run_id": result.parent_id,
        "tracking_uri": redact(result.tracking_uri),
        "experiment_id": result.experiment_id,
        "folder": str(result.folder),
        "not_uploaded": list(result.not_uploaded),
    }
    return {"outcome": result.outcome, **locations, "runs": runs}
