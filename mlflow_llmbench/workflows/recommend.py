"""Keep a recommendation with its runs."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ..records.redaction import redact

if TYPE_CHECKING:
    from ..analysis.decisions.recommend import Recommendation
    from ..records.results import RunResult


def _keep_recommendation(given: argparse.Namespace, found: Recommendation, results: list[RunResult]) -> None:
    """Write recommendation.json, .md and the chart, and log them on the parent run of the winner's sweep."""
    from ..analysis.decisions import recommend
    from ..measure.journal import write_bytes, write_json
    from ..reports import recommendation
    from ..reports.charts import pareto
    from ..tracking import registry
    from ..tracking.store import open_store

    sweep = (found.winner.result if found.winner else results[0]).sweep
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(given.output or scratch)
        write_json(folder / "recommendation.json", recommend.recommendation_json(found))
        write_bytes(folder / "recommendation.md", recommendation.recommendation_markdown(found).encode())
        pareto.draw_recommendation(found, folder / "charts")
        store = open_store(given.tracking_uri)
        parent = registry.parent_of_sweep(store, sweep)
        for run_id in filter(None, (parent, store.given_run_id)):
            registry.log_folder(store, run_id, folder)
        if parent:
            advice = f" Register the winner: llmbench register {parent} --name NAME" if found.winner else ""
            print(f"\nLogged on run {parent}: recommendation.md.{advice}")
        else:
            print(f"\nNot logged: the store {redact(store.uri)} has no run of the sweep {sweep}.")
