"""A quickstart as text for a terminal: what it will do, and what it found, in one sentence that decides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..analysis.decisions.candidates import MEMORY, Candidate, figure
from ..analysis.decisions.recommend import GOALS, QUALITY_MEASURES, Recommendation, Refused
from ..records.cell import Cell
from ..records.invocation import command_text
from ..records.quantizations import SCHEMES
from ..records.text import plural, rough_duration
from .escaping import plain
from .recommendation import answer, recommendation_json, shown_with_interval
from .sweep_result import SweepResult, format_locations, sweep_json

BUSY_CPUS = 0.2
"""CPUs from which on other programs are worth a word beforehand."""

BUSY_NOW = "Other programs use {:.1f} CPUs now, which makes results suspect. Stop them for a decision that counts."

BUSY = "a busy machine"
"""Reason that is proposed to accept suspect results."""


@dataclass(frozen=True)
class QuickstartPlan:
    """What a quickstart will do: the model in words, quantizations, a cell for its lengths, and its estimated needs.

    Bytes are None if unknown. `left_out`: what could take part if it were installed, and how. `busy_cpus`: CPUs that
    other programs use now.
    """

    model: str
    quantizations: tuple[str, ...]
    cell: Cell
    seconds: float
    memory_bytes: int | None
    free_bytes: int | None
    disk_bytes: int
    left_out: str = ""
    busy_cpus: float = 0.0


@dataclass(frozen=True)
class QuickstartResult:
    """Result of a quickstart. `found` is None if it was interrupted.

    `registration`: the command that registers the recommended configuration, "" if it cannot be; `refusal`: why not.
    `given_uri`: address of the store as the user gave it; `asked`: the parameters as the user wrote them.
    """

    sweep: SweepResult
    found: Recommendation | None = None
    registration: str = ""
    refusal: str = ""
    given_uri: str | None = None
    asked: Mapping[str, str] = field(default_factory=dict)


def format_quickstart_plan(told: QuickstartPlan) -> str:
    """Return the lines that are printed before anything starts."""
    cell = told.cell
    needs = [f"{max(told.disk_bytes / 1e9, 0.1):.1f} GB of disk"]
    if told.memory_bytes is not None:
        free = "" if told.free_bytes is None else f" ({told.free_bytes / 1e9:.1f} GB are free)"
        needs.insert(0, f"{told.memory_bytes / 1e9:.1f} GB of memory{free}")
    lines = [
        f"Model: {told.model}",
        f"Measures {' and '.join(told.quantizations)}: {cell.prompt_tokens} prompt tokens, {cell.output_tokens} output "
        f"tokens, batch size {cell.batch_size}, {plural(cell.repetitions or 0, 'repetition')} each.",
        f"Takes about {rough_duration(told.seconds)}, up to {' and '.join(needs)}. Ctrl-C keeps what was measured.",
        *([f"Left out: {told.left_out}"] if told.left_out else []),
        *([BUSY_NOW.format(told.busy_cpus)] if told.busy_cpus >= BUSY_CPUS else []),
    ]
    return "\n".join(map(plain, lines))


def format_quickstart(done: QuickstartResult) -> str:
    """Return the table of cells, the decision, where everything is, and the next commands."""
    steps = next_commands(done)
    widest = max(len(command) for command, _ in steps)
    return "\n\n".join(
        [
            done.sweep.table(),
            *done.sweep.sentences,
            *([plain(decision(done.found))] if done.found else []),
            *([f"Not offered: registration. {done.refusal}"] if done.refusal else []),
            format_locations(done.sweep),
            "\n".join(["Next:", *(f"  {command:<{widest}}  {why}" for command, why in steps)]),
        ]
    )


def quickstart_json(done: QuickstartResult) -> Mapping[str, Any]:
    """Return the result as JSON data: that of the sweep, the recommendation, the decision, and the next commands."""
    told = {
        "recommendation": recommendation_json(done.found) if done.found else None,
        "decision": decision(done.found) if done.found else None,
        "next": [command for command, _ in next_commands(done)],
    }
    return {**sweep_json(done.sweep), **told}


def decision(found: Recommendation) -> str:
    """Return what to deploy and why, in few sentences, or that the results do not tell."""
    if found.winner is None:
        return " ".join([f"No decision: {'; '.join(map(_doubt, found.refused))}.", *found.changes])
    goal, looks_better = GOALS[found.goal], found.judge.looks_better
    suspect = [one for one in found.refused if one.candidate.verdict.word == "suspect"]
    if not found.runners_up and any(looks_better(found.winner, one.candidate, goal) for one in suspect):
        doubts = "; ".join(map(_doubt, found.refused))
        return " ".join([f"No decision: only {found.winner.name} is valid. {doubts}.", *found.changes])
    tied = [one.candidate for one in found.runners_up if one.tied]
    if tied:
        return _tie([found.winner, *tied], found)
    others = [f"{one.candidate.name}: {one.why}" for one in found.runners_up]
    refused = [f"Not considered: {'; '.join(map(_doubt, found.refused))}."] if found.refused else []
    return " ".join([answer(found), *_quality([found.winner]), *others, *refused, *found.changes])


def _doubt(one: Refused) -> str:
    """Return in few words why a result takes no part."""
    verdict = one.candidate.verdict
    if one.candidate.result.failure or verdict.word == "valid":
        return f"{one.candidate.name}: {one.why}".rstrip(".")
    return f"{one.candidate.name} is {verdict.word} ({', '.join(reason.code for reason in verdict.reasons)})"


def _tie(alike: Sequence[Candidate], found: Recommendation) -> str:
    """Return the decision among configurations whose speed cannot be told apart: the one that needs least memory."""
    rate = GOALS[found.goal]
    speeds = ", ".join(f"{one.name} {shown_with_interval(one, rate)}" for one in alike)
    told = f"Their {rate.label} cannot be told apart: {speeds}."
    sizes = [(size, one) for one in alike if (size := one.value(MEMORY)) is not None]
    if len(sizes) < len(alike):
        return " ".join([f"No decision between {_listed(alike)}.", told])
    sizes.sort(key=lambda pair: pair[0])
    (least, best), (most, _) = sizes[0], sizes[-1]
    key = MEMORY.key(best.metrics) or ""
    if least > most * (1 - WORTH_IT):
        return " ".join([f"No decision between {_listed(alike)}: they need the same memory.", told, *_quality(alike)])
    saved = f"It needs {figure(key, least)} of memory at its peak, the most of the others {figure(key, most)}."
    return " ".join([f"Deploy {best.name}, for its memory alone. {told} {saved}", *_quality(alike)])


WORTH_IT = 0.05
"""Least share of memory that decides between configurations of equal speed."""


def _quality(some: Sequence[Candidate]) -> list[str]:
    """Return a sentence on what the quantizations among these cost in quality, if that was measured or should be."""
    told = []
    for one in some:
        if SCHEMES[one.result.cell.quant].library is None:
            continue  # not quantized
        kl, top1 = (one.value(QUALITY_MEASURES[name]) for name in ("kl", "top1"))
        if kl is not None and top1 is not None:
            told.append(f"{one.name} chooses the unquantized model's next token in {top1:.0%} of places (KL {kl:.2g}).")
        else:
            told.append(f"What {one.name} costs in quality was not measured.")
    return told


def _listed(some: Sequence[Candidate]) -> str:
    return " and ".join(one.name for one in some)


def next_commands(done: QuickstartResult) -> list[tuple[str, str]]:
    """Return commands that work as they stand, each with what it is for."""
    sweep, found = Path(done.sweep.folder).name, done.found
    reference = sweep if done.sweep.parent_id and not done.sweep.not_uploaded else str(done.sweep.folder)
    where = {"tracking_uri": done.given_uri} if done.given_uri else {}
    asked = {name: value for name, value in done.asked.items() if value != "auto"}
    again = (command_text("quickstart", **asked, **where), "goes on: what is valid is not measured again")
    if found is None:
        return [again]
    suspect = any(one.candidate.verdict.word == "suspect" for one in found.refused)
    steps = [(command_text("compare", reference, **where), "is the difference more than noise?")]
    if found.winner:
        steps.append(
            (command_text("recommend", reference, max_ttft="200ms", **where), "choose within limits of your own")
        )
    if done.registration:
        steps.insert(0, (done.registration, "register it, to gate, promote and serve it"))
    if suspect:
        accepted = command_text("recommend", reference, accept_suspect=BUSY, **where)
        steps += [again, (accepted, "decide on suspect results all the same")]
    return steps
