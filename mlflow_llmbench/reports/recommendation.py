"""Format a recommendation: for a terminal, as JSON, and as Markdown for artifacts and a version's description."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..analysis.decisions.candidates import Candidate, Measure, figure, interval
from ..analysis.decisions.recommend import GOALS, Recommendation
from ..records.metrics import SCHEMA
from .equal_memory import EQUAL_MEMORY_LEAD, equal_memory_json, equal_memory_sentences, equal_memory_table
from .escaping import markdown, plain
from .tables import MISSING, markdown_table, text_table

MOST_REFUSED = 30
"""Refusals that are shown on a terminal; recommendation.md and .json hold all."""


def format_recommendation(found: Recommendation) -> str:
    """Format the recommendation for a terminal: the answer, the table of candidates, refusals, possible changes."""
    heading, body = recommendation_cells(found)
    refused = [f"  {r.candidate.name}: {r.why}" for r in found.refused]
    more = [f"  and {len(refused) - MOST_REFUSED} more"] if len(refused) > MOST_REFUSED else []
    blocks = [
        [answer(found), *found.cautions],
        text_table(heading, body).splitlines() if body else [],
        _block("At equal memory:", [f"  {line}" for line in equal_memory_sentences(found.equal_memory)]),
        _block("Runners-up:", [f"  {_ranked(r.candidate.name, r.tied)}: {r.why}" for r in found.runners_up]),
        _block("Refused:", refused[:MOST_REFUSED] + more),
        _block("What would change the answer:", [f"  {line}" for line in found.changes]),
    ]
    return "\n\n".join("\n".join(map(plain, block)) for block in blocks if block)


def recommendation_markdown(found: Recommendation) -> str:
    """Return recommendation.md: the same, with every refusal."""
    heading, body = recommendation_cells(found)
    parts = ["# Recommendation", markdown(" ".join([answer(found), *found.cautions]))]
    parts += [markdown_table(heading, body)] if body else []
    pairs = equal_memory_table(found.equal_memory)
    parts += [f"## At equal memory\n\n{EQUAL_MEMORY_LEAD}", markdown_table(pairs.heading, pairs.body)] if pairs else []
    lists = {
        "Runners-up": [
            f"**{markdown(_ranked(r.candidate.name, r.tied))}**: {markdown(r.why)}" for r in found.runners_up
        ],
        "Refused": [f"**{markdown(r.candidate.name)}**: {markdown(r.why)}" for r in found.refused],
        "What would change the answer": [markdown(line) for line in found.changes],
    }
    for title, lines in lists.items():
        if lines:
            parts += [f"## {title}", "\n".join(f"- {line}" for line in lines)]
    parts.append(
        "Values are as measured, with the 95 % interval in brackets. A configuration is on the front if no other "
        "dominates it. One dominates another if it is nowhere worse by more than 1 % and somewhere significantly "
        "better (p < 0.05 after Holm)."
    )
    return "\n\n".join(parts) + "\n"


def recommendation_json(found: Recommendation) -> dict[str, Any]:
    """Return the recommendation as plain JSON data; `llmbench register` reads `winner`."""
    names = {id(one) for one in found.front}
    return {
        "schema": SCHEMA,
        "goal": found.goal,
        "limits": [
            {"option": limit.option, "metric": limit.measure.keys[-1], "bound": limit.bound} for limit in found.limits
        ],
        "winner": _entry(found.winner, found.objectives) if found.winner else None,
        "runners_up": [
            {**_entry(r.candidate, found.objectives), "why": r.why, "tied": r.tied} for r in found.runners_up
        ],
        "refused": [{"name": r.candidate.name, **_identity(r.candidate), "why": r.why} for r in found.refused],
        "front": [one.name for one in found.eligible if id(one) in names],
        "equal_memory": equal_memory_json(found.equal_memory),
        "cautions": list(found.cautions),
        "what_would_change": list(found.changes),
        "accepted_suspect": found.accepted_suspect,
    }


def answer(found: Recommendation) -> str:
    """Return the answer in one or two sentences: the winner with its figures, or the reason why there is none."""
    limits = ", ".join(map(str, found.limits))
    asked = f"{GOALS[found.goal].label}{f' within {limits}' if limits else ''}"
    if found.winner is None:
        trusted = len(found.eligible)
        why = (
            f"none of the {trusted} trusted and comparable results meets the limits"
            if trusted
            else "there is no trusted and comparable result"
        )
        return f"Nothing is recommended for {asked}: {why}."
    figures = ", ".join(f"{measure.label} {shown_with_interval(found.winner, measure)}" for measure in found.objectives)
    suspect = f" It is suspect, and was accepted: {found.accepted_suspect}." if found.accepted_suspect else ""
    return f"Deploy {found.winner.name}, the best for {asked}: {figures}.{suspect}"


def recommendation_cells(found: Recommendation) -> tuple[list[str], list[list[str]]]:
    """Return heading and body of the table of eligible candidates: figures, front, rank, and a mark if suspect."""
    heading = ["", *(measure.label for measure in found.objectives), "front", ""]
    front = {id(one) for one in found.front}
    places = {id(found.winner): "winner"} if found.winner else {}
    places |= {id(r.candidate): "as good" if r.tied else "runner-up" for r in found.runners_up}
    body = []
    for one in found.eligible:
        shown = [shown_with_interval(one, measure) for measure in found.objectives]
        suspect = ", suspect" if one.verdict.word == "suspect" else ""
        body.append(
            [one.name, *shown, "yes" if id(one) in front else "", places.get(id(one), "beyond a limit") + suspect]
        )
    return heading, body


def shown_with_interval(one: Candidate, measure: Measure) -> str:
    """Format a value with its interval: `123 tokens/s (121 to 125)`."""
    key, value = measure.keys[-1], one.value(measure)
    if value is None:
        return MISSING
    ends = interval(one, measure)
    return figure(key, value) + (
        f" ({figure(key, ends[0]).split()[0]} to {figure(key, ends[1]).split()[0]})" if ends else ""
    )


def _ranked(name: str, tied: bool) -> str:
    return f"{name} (not measurably worse)" if tied else name


def _block(title: str, lines: Sequence[str]) -> list[str]:
    return [title, *lines] if lines else []


def _identity(one: Candidate) -> dict[str, Any]:
    return {"sweep": one.result.sweep, "config_hash": one.result.hashes.config, "verdict": one.verdict.word}


def _entry(one: Candidate, objectives: Sequence[Measure]) -> dict[str, Any]:
    measured = {
        key: {"value": one.metrics[key], "interval": interval(one, m)}
        for m in objectives
        if (key := m.key(one.metrics))
    }
    return {"name": one.name, **_identity(one), "parameters": vars(one.result.cell), "measured": measured}
