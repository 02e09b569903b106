"""Commands that work on stored results: upload, compare, scaling."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .options import EXPERIMENT, JSON, NOISE, SHARE, TRACKING_URI, Option, comma_list, command
from .output import print_json

if TYPE_CHECKING:
    from ..analysis.comparison import Comparison
    from ..analysis.scaling.study import ScalingStudy


@command(
    "upload",
    "upload what an MLflow store lacks of a results folder",
    Option("folder", "a sweep's folder, as printed by `llmbench run`", "FOLDER"),
    TRACKING_URI,
    EXPERIMENT,
)
def upload(folder: str, tracking_uri: str | None, experiment: str | None) -> int:
    """Upload and print the counts of runs."""
    from ..sweeps.upload import upload

    done = upload(folder, tracking_uri, experiment)
    for problem in done.problems:
        print(f"llmbench: {problem}", file=sys.stderr)
    print(f"{done.new} runs uploaded, {done.completed} completed, {done.there} already there. Open them: {done.ui}")
    return int(bool(done.problems))


@command(
    "compare",
    "report how two or more results differ, and whether that is more than noise",
    Option(
        "references",
        "run id, runs:/ID, sweep, or results folder; all others are compared with the first",
        "RESULT",
        many=True,
    ),
    Option(
        "--allow",
        "compare despite these differences: hardware,software,workload,scenario,schema,verdict",
        "LIST",
        optional=True,
    ),
    Option(
        "--paired",
        "pair the values: both were measured in alternating order, by process or by repetition",
        flag=True,
    ),
    Option("--log", "log the comparison and its charts as artifacts of this run, under comparison/", "RUN"),
    Option("--output", "write the comparison and its charts into this folder", "FOLDER"),
    NOISE,
    JSON,
    TRACKING_URI,
    EXPERIMENT,
)
def compare(
    references: Sequence[str], allow: str | None, paired: bool, log: str | None, output: str | None, noise: float,
    json: bool, tracking_uri: str | None, experiment: str | None,
) -> int:  # fmt: skip
    """Compare and print a table per pair of results."""
    from ..reports.comparison import comparison_json, format_comparison
    from ..workflows import compare
    from ..workflows.destination import Destination

    def show(comparisons: Sequence[Comparison]) -> None:
        for comparison in comparisons:
            print(f"{format_comparison(comparison)}\n")

    found = compare.compare_all(
        references,
        noise=noise,
        allow=comma_list(allow),
        paired=paired,
        destination=Destination(output, log),
        tracking_uri=tracking_uri,
        on_result=show,
    )
    _print_written(output)
    if json:
        print_json([comparison_json(comparison) for comparison in found])
    return 0


@command(
    "scaling",
    "fit scaling laws to a sweep, and report what batch, length, size and quantization cost",
    Option(
        "references",
        "sweep, run id, runs:/ID, or results folder; several are studied together",
        "SWEEP",
        many=True,
    ),
    SHARE,
    Option("--at", "also predict at these values: batch_size=6,12 or prompt_tokens=300", "NAME=LIST", many=True),
    Option("--output", "write scaling.json, scaling.md and charts into this folder", "FOLDER"),
    Option("--log", "log them as artifacts of this run, such as the parent of the sweep", "RUN"),
    JSON,
    TRACKING_URI,
    EXPERIMENT,
)
def scaling(
    references: Sequence[str], share: float, at: Sequence[str], output: str | None, log: str | None,
    json: bool, tracking_uri: str | None, experiment: str | None,
) -> int:  # fmt: skip
    """Fit the laws and print them."""
    from ..reports.scaling import format_scaling, scaling_json
    from ..workflows import scaling
    from ..workflows.destination import Destination

    def show(study: ScalingStudy) -> None:
        print(format_scaling(study))

    found = scaling.scaling(
        references,
        share=share,
        at=[point for text in at for point in scaling.parse_points(text)],
        destination=Destination(output, log),
        tracking_uri=tracking_uri,
        on_result=show,
    )
    _print_written(output)
    if json:
        print_json(scaling_json(found))
    return 0


COMMANDS = (upload, compare, scaling)


def _print_written(output: str | None) -> None:
    if output:
        print(f"Written: {output}")
