"""Commands that work on stored results: upload, compare, scaling."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..records.errors import UsageError
from .options import Parser


def _reading(commands: Any) -> dict[str, Parser]:
    """Add the commands that read results."""
    upload = commands.add_parser("upload", help="upload what an MLflow store lacks of a results folder")
    upload.add_argument("folder", metavar="FOLDER", help="a sweep's folder, as printed by `llmbench run`")
    compare = commands.add_parser(
        "compare", help="report how two or more results differ, and whether that is more than noise"
    )
    compare.add_argument(
        "references",
        nargs="+",
        metavar="RESULT",
        help="run id, runs:/ID, sweep, or results folder; all others are compared with the first",
    )
    compare.add_argument(
        "--allow",
        metavar="LIST",
        default="",
        help="compare despite these differences: hardware,software,workload,scenario,schema,verdict",
    )
    compare.add_argument(
        "--paired",
        action="store_true",
        help="pair the values: both were measured in alternating order, by process or by repetition",
    )
    compare.add_argument(
        "--log", metavar="RUN", help="log the comparison and its charts as artifacts of this run, under comparison/"
    )
    compare.add_argument("--output", metavar="FOLDER", help="write the comparison and its charts into this folder")
    scaling = commands.add_parser(
        "scaling", help="fit scaling laws to a sweep, and report what batch, length, size and quantization cost"
    )
    scaling.add_argument(
        "references",
        nargs="+",
        metavar="SWEEP",
        help="sweep, run id, runs:/ID, or results folder; several are studied together",
    )
    scaling.add_argument(
        "--share",
        metavar="RATIO",
        type=float,
        default=0.5,
        help="share of the best throughput per instance that a batch size must keep (default: 0.5)",
    )
    scaling.add_argument(
        "--at",
        metavar="NAME=LIST",
        action="append",
        default=[],
        help="also predict at these values: batch_size=6,12 or prompt_tokens=300",
    )
    scaling.add_argument(
        "--output", metavar="FOLDER", help="write scaling.json, scaling.md and charts into this folder"
    )
    scaling.add_argument(
        "--log", metavar="RUN", help="log them as artifacts of this run, such as the parent of the sweep"
    )
    return {"upload": upload, "compare": compare, "scaling": scaling}


def _upload(given: argparse.Namespace) -> int:
    from ..sweeps.upload import upload

    done = upload(given.folder, given.tracking_uri, given.experiment)
    print(f"{done.new} runs uploaded, {done.completed} completed, {done.there} already there. Open them: {done.ui}")
    return 0


def _compare(given: argparse.Namespace) -> int:
    from ..analysis import comparison as comparison_analysis
    from ..analysis.comparison import ALLOWABLE
    from ..reports import files
    from ..reports.comparison import comparison_json, format_comparison
    from ..tracking.load_results import load_results

    allow = frozenset(filter(None, given.allow.split(",")))
    if unknown := sorted(allow - set(ALLOWABLE)):
        raise UsageError(f"Unknown difference to allow: {unknown[0]}. Known: {', '.join(ALLOWABLE)}.")
    results = [result for reference in given.references for result in load_results(reference, given.tracking_uri)]
    if len(results) < 2:
        raise UsageError(
            "A comparison needs two results, and there is one. Give another run, or the folder of a sweep."
        )
    comparisons = [
        comparison_analysis.compare(results[0], other, noise=given.noise, allow=allow, paired=given.paired)
        for other in results[1:]
    ]
    for comparison in comparisons:
        print(f"{format_comparison(comparison)}\n")
    _keep(given, lambda folder: files.write_comparisons(comparisons, folder), "comparison")
    if given.json:
        print(json.dumps([comparison_json(comparison) for comparison in comparisons], ensure_ascii=False))
    return 0


def _keep(given: argparse.Namespace, write: Callable[[Path], object], under: str) -> None:
    """Write the findings of a command into a folder (`--output`) and log them on a run under `under` (`--log`)."""
    if given.output:
        write(Path(given.output))
        print(f"Written: {given.output}")
    if given.log:  # from a temporary folder: the other may hold the user's own files
        from ..tracking import runs
        from ..tracking.store import open_store

        with tempfile.TemporaryDirectory() as scratch:
            write(Path(scratch))
            runs.log_folder(open_store(given.tracking_uri), given.log.removeprefix("runs:/"), Path(scratch), under)


def _scaling(given: argparse.Namespace) -> int:
    from ..analysis.scaling.study import study_scaling
    from ..reports import files
    from ..reports.scaling import format_study, study_json
    from ..tracking.load_results import load_results

    places = [place for text in given.at for place in _places(text)]
    results = [result for reference in given.references for result in load_results(reference, given.tracking_uri)]
    study = study_scaling(results, given.share, places)
    print(format_study(study))
    _keep(given, lambda folder: files.write_scaling(study, folder), "scaling")
    if given.json:
        print(json.dumps(study_json(study), ensure_ascii=False))
    return 0


def _places(text: str) -> list[tuple[str, float]]:
    """Parse `batch_size=6,12` into (name, value) pairs to predict at. Raises UsageError."""
    name, _, values = text.partition("=")
    if name not in ("batch_size", "prompt_tokens"):
        raise UsageError(f"--at takes batch_size or prompt_tokens and a list: {text}. Give --at batch_size=6,12.")
    try:
        return [(name, float(value)) for value in values.split(",")]
    except ValueError:
        raise UsageError(f"--at has a value that is not a number: {text}. Give --at {name}=6,12.") from None
