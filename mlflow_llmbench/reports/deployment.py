"""The first table of a study: which configuration to deploy under each constraint, across its models."""

from __future__ import annotations

from collections.abc import Sequence

from ..analysis.decisions.candidates import MEMORY, Candidate, figure
from ..analysis.decisions.recommend import GOALS, QUALITY_MEASURES
from ..analysis.scaling.cells import MEDIAN_TTFT
from ..analysis.scaling.deployment import DeploymentAnswer, models_elsewhere
from ..analysis.scaling.findings import Findings
from ..analysis.scaling.study import MEAN_TPOT
from ..records.metrics import OUTPUT_RATE
from ..records.text import number_text
from .result import command
from .tables import Table

NONE_VALID = "none is valid. Measure again on a quiet machine, or take suspect ones with --accept-suspect REASON."

DEPLOYMENT_HEADING = (
    "constraint", "deploy", "tokens/s", "TTFT ms", "ms per token", "peak memory", "best of another model", "quality",
)  # fmt: skip


def deployment_lead(found: Findings) -> str:
    """Say for which prompts and machine the answers hold, and by which rule; or why there are none."""
    shape = f"prompts of {found.focus.prompt:g} tokens on {found.focus.machine.name}"
    lead = (
        f"For {shape}. Within a limit the largest model that keeps it counts, with its configuration of the most "
        "tokens. Each figure is measured; the interval is the 95 % interval of the mean."
    )
    if reason := next((one.found.accepted_suspect for one in found.deployments if one.found.accepted_suspect), None):
        lead += f" Suspect results take part and are marked, because: {reason}."
    if any(one.cell.prune for one in found.results):
        lead += " Pruned models are not in it, since their size does not tell how good they are: see At equal memory."
    if elsewhere := models_elsewhere(found.results, found.focus):
        lead += f" Models that were measured only at other lengths or elsewhere are not in it: {', '.join(elsewhere)}."
    return lead if found.deployments else f"No configuration can be recommended for {shape}: {NONE_VALID}"


def deployment_notes(found: Findings) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Return what stands below the table: ties, what was left out, and intervals that cross a limit."""
    cautions = {c: None for one in found.deployments for c in one.found.cautions}
    return (
        ("Not measurably slower than the choice", tuple(filter(None, map(_ties, found.deployments)))),
        ("Looked better and was left out", left_out(found.deployments)),
        ("Intervals that cross a limit", tuple(cautions)),
    )


def deployments_table(rows: Sequence[DeploymentAnswer]) -> Table:
    """Return the table of the answers across models, with their quality if it was measured."""
    body = []
    for one in rows:
        winner = one.found.winner
        assert winner
        second = "–" if one.second is None else f"{marked(one.second)} ({_goal_text(one.second, one)})"
        value = "" if one.found.goal == "throughput" else f" ({_goal_text(winner, one)})"
        body.append([f"{one.constraint}{value}", marked(winner), *speed_figures(winner), second, _quality(winner)])
    shown = len(DEPLOYMENT_HEADING) - all(line[-1] == "–" for line in body)
    return Table(DEPLOYMENT_HEADING[:shown], tuple(tuple(line[:shown]) for line in body), frozenset(range(2, 6)))


def lengths_table(found: Findings) -> Table | None:
    """Return the table of the choices at the other prompt lengths, a column for each; None if there is no other."""
    if not found.lengths or not found.deployments:
        return None
    heading = ("constraint", *(f"{one.prompt:g} tokens" for one in found.lengths))
    columns = [one.winners for one in found.lengths]
    body = [
        (answer.constraint, *(_with_rate(column[number]) for column in columns))
        for number, answer in enumerate(found.deployments)
    ]
    return Table(heading, tuple(body))


def _with_rate(one: Candidate | None) -> str:
    """Return the name of a candidate with its throughput; a dash for none."""
    if one is None:
        return "–"
    rate = one.metrics.get(OUTPUT_RATE.key())
    return marked(one) + ("" if rate is None else f": {number_text(rate)} tokens/s")


def marked(one: Candidate) -> str:
    """Return the name of a candidate, marked if it is suspect."""
    return f"{one.name} (suspect)" if one.verdict.word == "suspect" else one.name


def _goal_text(one: Candidate, of: DeploymentAnswer) -> str:
    target = GOALS[of.found.goal]
    return figure(target.keys[-1], one.value(target) or 0.0)


def _quality(one: Candidate) -> str:
    """Return what the quantization costs, if it was measured."""
    found = [(measure, one.value(measure)) for measure in QUALITY_MEASURES.values()]
    shown = [f"{measure.label} {figure(measure.keys[-1], value)}" for measure, value in found if value is not None]
    return ", ".join(shown) or "–"


def _ties(one: DeploymentAnswer) -> str:
    names = [runner.candidate.name for runner in one.found.runners_up if runner.tied]
    return f"{one.constraint}: {', '.join(names)}." if names else ""


def left_out(rows: Sequence[DeploymentAnswer]) -> tuple[str, ...]:
    """Say which configurations would have been chosen under which constraints, why not, and what settles it."""
    found: dict[int, list[DeploymentAnswer]] = {}
    for row in rows:
        if row.better:
            found.setdefault(id(row.better.candidate), []).append(row)
    lines = []
    for own in found.values():
        better, winner = own[0].better, own[0].found.winner
        assert better and winner
        gain = f"{GOALS[own[0].found.goal].label} {_goal_text(better.candidate, own[0])}"
        lines.append(
            f"{better.candidate.name}, under {' and '.join(one.constraint for one in own)}: {gain} instead of "
            f"{_goal_text(winner, own[0])} of {winner.name}, but {better.why}. To settle it, measure it again: "
            f"{command(better.candidate.result.cell)} --rerun true"
        )
    return tuple(lines)


def speed_figures(one: Candidate) -> tuple[str, ...]:
    """Return throughput with its interval, TTFT, time per token and peak memory of a candidate as text."""
    rate, low, high = (one.metrics.get(key) for key in OUTPUT_RATE.mlflow_keys())
    first, gap = one.metrics.get(MEDIAN_TTFT), one.metrics.get(MEAN_TPOT)
    shown = (
        "–"
        if rate is None
        else number_text(rate)
        + (f" ({number_text(low)} to {number_text(high)})" if low is not None and high is not None else "")
    )
    key = MEMORY.key(one.metrics)
    peak = figure(key, one.metrics[key]) if key else "–"
    return shown, *("–" if value is None else number_text(value) for value in (first, gap)), peak
