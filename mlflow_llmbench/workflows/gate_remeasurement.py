"""Measure the champion and a candidate again on this machine, in alternating order, for a gate.

Registered runs may be weeks old and from another machine, which a gate on them refuses. Measured again in alternating
order, drift affects both sides alike and only their configurations differ. A software change that made both slower does
not show up this way; it shows up in the registered runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..records.cell import Options
from ..records.errors import UsageError
from ..records.invocation import command_text
from ..records.results import RunResult
from ..sweeps.planning import Plan, plan_in_turns
from ..sweeps.progress import ProgressListener
from ..sweeps.sweep import SweepResult, execute
from .ab import DEFAULT_PAIRS, open_executor_of_sides, parse_sides, sides
from .reproduce import parameters_again, require_same, unlike_here


@dataclass(frozen=True)
class Remeasure:
    """Request to measure both sides again: fresh processes per side, permissions, folder and experiment of the results.

    `permissions` are as in `reproduce.parameters_again`.
    """

    pairs: int = DEFAULT_PAIRS
    permissions: frozenset[str] = frozenset()
    output_dir: str | None = None
    experiment: str | None = None
    watcher: ProgressListener | None = None


@dataclass(frozen=True)
class GateRemeasurement:
    """Result of `remeasure`: the sweep of both sides, their new results, and notes on what differs from before."""

    sweep: SweepResult
    champion: RunResult
    candidate: RunResult
    notes: tuple[str, ...]


def remeasure(
    champion: RunResult, candidate: RunResult, again: Remeasure, tracking_uri: str | None = None
) -> GateRemeasurement:
    """Measure the configurations of two results in `again.pairs` fresh processes each, in alternating order.

    A side that fails is a result with its failure. Raises UsageError or NotComparable if a side cannot be rebuilt (see
    `reproduce.require_same`), MeasurementError if interrupted.
    """
    for result in (champion, candidate):
        if result.cell.scenario == "online":
            server = f"The server {result.cell.url}" if result.cell.url else "A server that a command starts"
            raise UsageError(
                f"{server} is not started from here. Measure it with `{command_text('online')}`, "
                "and gate that run without --measure."
            )
    sides_of = [parameters_again(result, again.permissions) for result in (champion, candidate)]
    common = {name: value for name, value in sides_of[0].items() if name in Options.__dataclass_fields__}
    common |= {"output_dir": [again.output_dir]} if again.output_dir else {}
    a, b = (
        {name: value for name, value in side.items() if name not in Options.__dataclass_fields__} for side in sides_of
    )
    requests, options = parse_sides(a, b, common, again.pairs)
    executor = open_executor_of_sides(requests, options)
    planned = plan_in_turns(requests, options, executor.machine)
    planned.require_packages()
    before = dict(zip(("champion", "candidate"), (champion, candidate), strict=True))
    for result, side in zip(before.values(), planned.cells, strict=True):
        require_same(result, side)
    done = execute(planned, executor, (tracking_uri, again.experiment), again.watcher)
    if done.outcome == "interrupted":
        raise KeyboardInterrupt
    return GateRemeasurement(done, *sides(done), tuple(_environment_notes(before, planned)))


def _environment_notes(before: Mapping[str, RunResult], planned: Plan) -> list[str]:
    unlike = {
        name: ", ".join(map(str, unlike_here(result, side, planned.machine)))
        for (name, result), side in zip(before.items(), planned.cells, strict=True)
    }
    return [
        f"This machine or its software differs from where the {name} was measured before: {told}."
        for name, told in unlike.items()
        if told
    ]
