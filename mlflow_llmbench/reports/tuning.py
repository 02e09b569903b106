"""A tuning as text and as JSON: what it will measure, what it found, how far that goes, and the next commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..analysis.decisions.candidates import Limit
from ..analysis.decisions.recommend import GOALS, Recommendation
from ..config.cells import setting_text
from ..records.cell import Cell
from ..records.invocation import command_text, parameter_text
from ..records.redaction import redact
from ..records.text import plural
from .escaping import plain
from .recommendation import format_recommendation, recommendation_json
from .sweep_result import SweepResult, format_locations, sweep_json

UNLIKELY = 0.01
"""A chance below this is told as such. Larger ones are an order only: the model is too sure of itself (method.md)."""

MOST_NAMED = 5
"""Most configurations that a sentence names."""


@dataclass(frozen=True)
class TuningPlan:
    """What a tuning will do. `cells` configurations, of which the `excluded` are left out, by name with the reason.

    `trials` of the others will be measured. `asked` are the parameters that the user gave, as text.
    """

    goal: str
    limits: tuple[Limit, ...]
    varied: tuple[str, ...]
    cells: int
    excluded: Mapping[str, str]
    trials: int
    asked: Mapping[str, str] = field(default_factory=dict)

    @property
    def open(self) -> int:
        """Number of configurations that can be measured."""
        return self.cells - len(self.excluded)


@dataclass(frozen=True)
class TuningResult:
    """Result of a tuning. `found` is None if it was interrupted before anything could be chosen.

    Of the configurations that can be measured, `tried` were, `reused` of them by an earlier command. By name with the
    reason: `silent` told the search nothing, `doubtful` are suspect, and `failed` could not be measured. `chances`:
    name of an untried configuration → chance, by the search's model, that it is better than the winner; the largest
    first. `unseen`: values of each parameter that no trial had. `registration`: the command that registers the winner,
    or "".
    """

    plan: TuningPlan
    sweep: SweepResult
    found: Recommendation | None
    tried: int
    reused: int
    silent: Mapping[str, str]
    doubtful: Mapping[str, str]
    failed: Mapping[str, str]
    chances: Mapping[str, float]
    unseen: Mapping[str, Sequence[str]]
    registration: str = ""

    @property
    def untried(self) -> int:
        """Number of configurations that could be measured and were not."""
        return self.plan.open - self.tried

    @property
    def exit_code(self) -> int:
        """Exit code: 0 with a winner, 130 if interrupted, else 1; also 1 if not all was uploaded."""
        if self.sweep.outcome == "interrupted":
            return 130
        return int(not self.has_winner or bool(self.sweep.not_uploaded))

    @property
    def has_winner(self) -> bool:
        """True if a configuration is recommended."""
        return self.found is not None and self.found.winner is not None

    def table(self) -> str:
        """Return the comparison of the measured configurations as text."""
        return self.sweep.table()

    def __repr__(self) -> str:
        winner = self.found.winner.name if self.found and self.found.winner else "none"
        return f"<TuningResult: winner {winner}, {self.tried} of {self.plan.open} configurations measured>"


def format_tuning_plan(plan: TuningPlan) -> str:
    """Return the lines that are printed before anything is measured."""
    within = f" within {', '.join(map(str, plan.limits))}" if plan.limits else ""
    reasons = list(plan.excluded.values())
    lines = [
        f"Tunes {' × '.join(plan.varied)}: {plan.cells} configurations, for {GOALS[plan.goal].label}{within}.",
        *(
            [f"Left out: {plural(len(reasons), 'configuration')}. {reasons[0]}"]
            if len(reasons) == 1
            else [f"Left out: {len(reasons)} configurations. The first: {reasons[0]}"]
            if reasons
            else []
        ),
        f"Measures {plan.trials} of {'the other ' if reasons else 'these '}{plan.open}, one chosen after another. To "
        f"measure more or fewer: {parameter_text('trials', 'N')}.",
    ]
    return "\n".join(map(plain, lines))


def format_tuning(done: TuningResult) -> str:
    """Return the table of cells, the recommendation, how far it goes, where everything is, and the next commands."""
    steps = next_commands(done)
    blocks = [
        done.sweep.table(),
        *([format_recommendation(done.found)] if done.found else []),
        "\n".join(["How far this goes:", *(f"  {plain(line)}" for line in reach(done))]),
        format_locations(done.sweep),
        "\n".join(["Next:", *(f"  {command}\n    {why}" for command, why in steps)]) if steps else "",
    ]
    return "\n\n".join(filter(None, blocks))


def reach(done: TuningResult) -> list[str]:
    """Return sentences on what was measured and what was not, and how sure the winner is that of the whole grid."""
    reused = f", {done.reused} of them before this command" if done.reused else ""
    lines = [f"{done.tried} of {plural(done.plan.open, 'configuration')} were measured{reused}."]
    if done.plan.excluded:
        lines.append(f"{plural(len(done.plan.excluded), 'more configuration')} of the grid had been left out.")
    lines += [f"{name} could not be measured: {why}" for name, why in done.failed.items()]
    lines += [f"{name} told the search nothing: {why}." for name, why in done.silent.items()]
    if done.doubtful:
        names = _named(list(done.doubtful))
        lines.append(f"Suspect, so they guided the search only roughly and cannot win: {names}.")
    if not done.untried:
        if done.has_winner and not (done.silent or done.doubtful):
            lines.append("None was left, so the winner is that of the whole grid.")
        return lines
    doubt = "so it is not certain that the winner is that of the whole grid" if done.has_winner else "so one may do"
    lines.append(f"{done.untried} were not, {doubt}. {_hope(done)}".strip())
    lines += [f"Nothing was measured with {name}={','.join(values)}." for name, values in done.unseen.items()]
    return lines


def _named(names: Sequence[str]) -> str:
    return ", ".join(names[:MOST_NAMED]) + (f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else "")


def _hope(done: TuningResult) -> str:
    """Return which untried configurations may be better, by the search's model."""
    if not done.chances:
        return ""
    told = [(name, chance) for name, chance in done.chances.items() if chance >= UNLIKELY]
    by_model = "By the search's model, in which similar settings behave alike,"
    if not told:
        return f"{by_model} each of them is better with a chance below {UNLIKELY:.0%}."
    return f"{by_model} these are the likeliest to be better: {_named([name for name, _ in told])}."


def next_commands(done: TuningResult) -> list[tuple[str, str]]:
    """Return commands that work as they stand, each with what it is for."""
    asked = dict(done.plan.asked)
    steps = [(done.registration, "registers the winner")] if done.registration else []
    if done.sweep.outcome == "interrupted":
        return [(command_text("tune", **asked), "goes on: what is measured and valid is not measured again")]
    if done.silent or done.doubtful:
        steps.append(
            (command_text("tune", **asked), "measures again what is suspect or invalid, and goes on from that")
        )
    if done.untried:
        more = {**asked, "trials": str(min(2 * done.plan.trials, done.plan.open))}
        whole = {**asked, "trials": str(done.plan.open)}
        steps += [(command_text("tune", **more), "goes on with as many trials again")] if more != whole else []
        steps.append((command_text("tune", **whole), "measures the rest too, so that the winner is certain"))
    return steps


def tuning_json(done: TuningResult) -> dict[str, Any]:
    """Return the tuning as JSON data, without the cells and the recommendation: what tuning.json has."""
    plan = done.plan
    return {
        "goal": plan.goal,
        "limits": [str(limit) for limit in plan.limits],
        "varied": list(plan.varied),
        "configurations": plan.cells,
        "left_out": dict(plan.excluded),
        "trials": plan.trials,
        "tried": done.tried,
        "reused": done.reused,
        "untried": done.untried,
        "silent": dict(done.silent),
        "doubtful": dict(done.doubtful),
        "failed": dict(done.failed),
        "chances": dict(done.chances),
        "unseen": {name: list(values) for name, values in done.unseen.items()},
        "sentences": reach(done),
    }


def tuning_result_json(done: TuningResult) -> Mapping[str, Any]:
    """Return everything as JSON data: the sweep, the recommendation, the tuning, and the next commands."""
    return {
        **sweep_json(done.sweep),
        "recommendation": recommendation_json(done.found) if done.found else None,
        "tuning": tuning_json(done),
        "next": [command for command, _ in next_commands(done)],
    }


def configuration_name(cell: Cell, varied: Sequence[str]) -> str:
    """Return a configuration by the settings that vary: `int4 b8`."""
    return redact(" ".join(setting_text(name, cell) for name in varied if name != "backend"))
