"""Commands that compare: compare, scaling, reproduce."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..records.invocation import LATEST
from .options import (
    EXPERIMENT,
    JSON,
    NOISE,
    PERMISSIONS,
    SHARE,
    TRACKING_URI,
    Option,
    allow,
    comma_list,
    command,
    output_dir,
    permissions,
)
from .output import known, print_json, progress

if TYPE_CHECKING:
    from ..analysis.comparison import Comparison
    from ..analysis.scaling.study import ScalingStudy


@command(
    "compare",
    "say how results differ, and whether that is more than noise",
    Option(
        "references",
        "run id, runs:/ID, sweep, or results folder; all others are compared with the first (default: latest sweep)",
        "RESULT",
        many=True,
        default=LATEST,
    ),
    allow("hardware", "software", "workload", "scenario", "schema", "verdict"),
    Option(
        "--paired",
        "pair the values: both were measured in alternating order, by process or by repetition",
        flag=True,
    ),
    Option(
        "--log", "log the comparison and its charts as artifacts of this run, under comparison/", "RUN", panel="results"
    ),
    Option("--output", "write the comparison and its charts into this folder", "FOLDER", panel="results"),
    NOISE,
    JSON,
    TRACKING_URI,
    EXPERIMENT,
    examples=("compare RUN_A RUN_B", "compare SWEEP_A SWEEP_B --allow software --output comparison"),
)
def compare(
    references: Sequence[str], allow: str | None, paired: bool, log: str | None, output: str | None, noise: float,
    json: bool, tracking_uri: str | None, experiment: str | None,
) -> int:  # fmt: skip
    """Compare and print a table per pair of results."""
    from ..reports.comparison import comparison_json, format_comparisons
    from ..workflows import compare
    from ..workflows.destination import Destination

    def show(comparisons: Sequence[Comparison]) -> None:
        print(f"{format_comparisons(comparisons)}\n")

    found = compare.compare_all(
        known(references, tracking_uri, experiment),
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
    "fit scaling laws: what batch, length, size and bits cost",
    Option(
        "references",
        "sweep, run id, runs:/ID, or results folder; several are studied together (default: latest sweep)",
        "SWEEP",
        many=True,
        default=LATEST,
    ),
    SHARE,
    Option("--at", "also predict at these values: batch_size=6,12 or prompt_tokens=300", "NAME=LIST", many=True),
    Option("--output", "write scaling.json, scaling.md and charts into this folder", "FOLDER", panel="results"),
    Option("--log", "log them as artifacts of this run, such as the parent of the sweep", "RUN", panel="results"),
    JSON,
    TRACKING_URI,
    EXPERIMENT,
    examples=("scaling SWEEP", "scaling SWEEP --at batch_size=6,12 --log RUN"),
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
        known(references, tracking_uri, experiment),
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


@command(
    "reproduce",
    "measure a run or a registered version again, and compare",
    Option("reference", "run id, runs:/ID, results folder, or models:/NAME@ALIAS", "RUN", entry_name="run"),
    Option("--margin", "largest difference that counts as equivalent (default: 5%)", "RATIO", default="5%"),
    *PERMISSIONS,
    Option("--url", "present address of the server, for a run that measured one", "URL", optional=True),
    output_dir("folder for results"),
    Option("--experiment", "MLflow experiment (default: the run's)", "NAME", panel="results"),
    JSON,
    TRACKING_URI,
    description="The exit code says whether they agree: 0 equivalent, 1 different, 4 undecided.",
    examples=("reproduce RUN", "reproduce models:/support-bot@champion --margin 3%"),
    failure_code=4,
    entry_point="reproduce",
    store="first",
)
def reproduce(
    reference: str, margin: str, trust_remote_code: bool, allow_pickle: bool, url: str | None, output_dir: str,
    experiment: str | None, json: bool, tracking_uri: str | None,
) -> int:  # fmt: skip
    """Print the verdict.

    Exit code: 0 equivalent, 1 different, 2 not comparable or a wrong parameter, 3 invalid, 4 undecided or not measured.
    """
    from ..analysis.decisions.gate import parse_ratio
    from ..reports import comparison, reproduction
    from ..workflows import reproduce

    with progress(plans=False) as shown:
        done = reproduce.reproduce(
            known([reference], tracking_uri, experiment)[0],
            margin=parse_ratio("--margin", margin),
            permissions=permissions(trust_remote_code, allow_pickle),
            url=url,
            output_dir=output_dir,
            tracking_uri=tracking_uri,
            experiment=experiment,
            watcher=shown,
            say=print,
        )
    print(reproduction.format_reproduction(done.found))
    if done.comparison:
        print(f"\n{comparison.format_comparison(done.comparison)}")
    if done.sweep:
        print(f"\nResults: {done.sweep.folder}")
    if json:
        told = {"original": done.original.name, "original_run_id": done.original.run_id, "run_id": done.run_id}
        print_json({**reproduction.reproduction_json(done.found), **told})
    return done.found.exit_code


COMMANDS = (compare, scaling, reproduce)


def _print_written(output: str | None) -> None:
    if output:
        print(f"Written: {output}")
