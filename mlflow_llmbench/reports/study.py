"""Reports of a study: report.md, report.html (one file that loads nothing), study.json, and text for a terminal.

report.md and report.html are made from the same sections.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..analysis.decisions.candidates import MEMORY, Candidate, interval
from ..analysis.scaling.cells import varied_settings
from ..analysis.scaling.choices import Choice
from ..analysis.scaling.claims import CONFIRMED, NOT_CONFIRMED, UNSAID, Claim
from ..analysis.scaling.findings import Findings
from ..analysis.scaling.focus import at_focus
from ..records.codec import to_json
from .charts.catalogue import charts_of
from .deployment import (
    NONE_VALID,
    deployment_lead,
    deployment_notes,
    deployments_table,
    left_out,
    lengths_table,
    marked,
    speed_figures,
)
from .equal_memory import EQUAL_MEMORY_LEAD, equal_memory_json, equal_memory_sentences, equal_memory_table
from .escaping import markdown
from .html import page
from .recommendation import answer
from .result import environment_facts, row_of, table_cells
from .scaling import METHOD, law_cells, scaling_sections
from .sweep import chart_name
from .tables import Table, markdown_table

MOST_LINES, MOST_GROUPS = 10, 6
"""Most sentences under one heading, and most groups of cells of one law, in the report; scaling.md has all."""

LENGTHS_LEAD = "The same constraints, answered for the other prompts. A dash: nothing measured there keeps it."
CLAIM_HEADING = ("the paper says", "its range", "measured here")
CHOICE_HEADING = ("model", "constraint", "deploy", "tokens/s", "TTFT ms", "ms per token", "peak memory", "note")


@dataclass(frozen=True)
class Drawn:
    """Pictures of a report: name → SVG and its path relative to report.md; and (figure, reason) for each not drawn."""

    figures: Mapping[str, tuple[bytes, str]]
    laws: Mapping[str, tuple[bytes, str]]
    missing: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Picture:
    """A figure of the report: its path relative to report.md, and its SVG."""

    name: str
    path: str
    svg: bytes
    caption: str


@dataclass(frozen=True)
class Section:
    """A heading and its content, in the order of the fields; empty parts are left out.

    `verdicts` has the verdict and its reason for each line of the table, or is empty. `groups` are lists with a heading
    of their own.
    """

    title: str
    lead: str = ""
    table: Table | None = None
    verdicts: tuple[tuple[str, str], ...] = ()
    groups: tuple[tuple[str, tuple[str, ...]], ...] = ()
    figures: tuple[Picture, ...] = ()


def sections(found: Findings, drawn: Drawn) -> list[Section]:
    """Return everything after the title, in the order of the report."""
    laws = scaling_sections(found.scaling)
    not_said = tuple(f"{what[:1].upper()}{what[1:]}: {why}." for what, why in found.not_said)
    not_drawn = tuple(f"{chart_name(name).capitalize()}: {why}." for name, why in drawn.missing)
    refused = tuple(laws.pop("Not said", []))
    left_out = tuple(laws.pop("Left out", []))
    environment = tuple(
        (machine.name, tuple(f"{name}: {value}" for name, value in _environment(found, machine.env)))
        for machine in found.machines
    )
    judged = [claim for claim in found.claims if claim.measured != "–"]
    rest = tuple((title, _cut(lines)) for title, lines in laws.items() if title != "Laws")
    told = [
        *_deploying(found),
        Section("Findings", groups=tuple(found.sentences.items())),
        Section(
            "The paper's claims",
            _claims_lead(found.claims),
            claims_table(judged),
            verdicts=tuple((claim.verdict, _reason(claim)) for claim in judged),
            groups=(("Nothing was measured for", _unmeasured(found.claims)),),
        ),
        Section(
            "Choices by model",
            _choices_lead(found),
            choices_table(found.choices) if found.choices else None,
            groups=_cautions(found.choices),
        ),
        Section(
            "Figures",
            " ".join(filter(None, [_figures_lead(found), found.focus.note])),
            figures=_pictures(drawn.figures),
        ),
        Section(
            "Laws",
            f"{METHOD} {_law_note(found)}",
            _law_table(found),
            groups=rest,
            figures=_pictures(drawn.laws),
        ),
        Section("Machines", table=_across_table(found) if found.across else None),
        Section(
            "Not determined",
            groups=(
                ("No data", not_said),
                ("Figures that are not drawn", not_drawn),
                ("Laws", refused),
                ("Cells left out", left_out),
            ),
        ),
        Section("All cells", table=_cells(found)),
        Section("Environment", groups=environment),
    ]
    return [one for one in told if one.lead or one.table or one.figures or any(lines for _, lines in one.groups)]


def _deploying(found: Findings) -> tuple[Section, ...]:
    """Return the sections that answer what to deploy: at the shape of comparison, at others, and at equal memory."""
    return (
        Section(
            "What to deploy",
            deployment_lead(found),
            deployments_table(found.deployments) if found.deployments else None,
            groups=deployment_notes(found),
        ),
        Section("At other prompt lengths", LENGTHS_LEAD if found.lengths else "", lengths_table(found)),
        Section(
            "At equal memory",
            EQUAL_MEMORY_LEAD if found.equal_memory else "",
            equal_memory_table(found.equal_memory),
            groups=(("Answers", equal_memory_sentences(found.equal_memory)),),
        ),
    )


def _cut(lines: Sequence[str]) -> tuple[str, ...]:
    """Keep the first `MOST_LINES` lines and add how many more scaling.md has."""
    more = [f"And {len(lines) - MOST_LINES} more, in scaling/scaling.md."] if len(lines) > MOST_LINES else []
    return (*lines[:MOST_LINES], *more)


def _law_table(found: Findings) -> Table | None:
    """Return the table of laws, each with at most `MOST_GROUPS` groups of cells: the shape of comparison first."""
    heading, body = law_cells(found.scaling)
    seen: Counter[str] = Counter()
    kept = []
    for _, line in sorted(
        zip(found.scaling.laws, body, strict=True),
        key=lambda pair: not any(at_focus(m, found.focus) for m in pair[0].cells),
    ):
        seen[line[0]] += 1
        if seen[line[0]] <= MOST_GROUPS:
            kept.append(line)
    return _plain_table(heading, sorted(kept, key=lambda line: list(seen).index(line[0])))


def _law_note(found: Findings) -> str:
    counts = Counter(law.law.key for law in found.scaling.laws)
    parts = (
        [f"Of each law at most {MOST_GROUPS} groups of cells are shown."]
        if any(count > MOST_GROUPS for count in counts.values())
        else []
    )
    predicted = len(found.scaling.predictions)
    parts += [
        f"All of them, and predictions for {predicted} cells that were not measured, are in scaling/scaling.md."
        if predicted
        else "All are in scaling/scaling.md."
    ]
    return " ".join(parts)


def _environment(found: Findings, env: str) -> list[tuple[str, str]]:
    return environment_facts(next(m.result.environment for m in found.cells if m.result.hashes.env == env))


def _plain_table(heading: Sequence[str], body: Sequence[Sequence[str]]) -> Table | None:
    return Table(tuple(heading), tuple(map(tuple, body))) if body else None


def _pictures(pictures: Mapping[str, tuple[bytes, str]]) -> tuple[Picture, ...]:
    """Return the pictures with their captions; figures of laws have none."""
    captions = {chart.name: chart.legend for chart in charts_of("study")}
    return tuple(Picture(name, path, svg, captions.get(name, "")) for name, (svg, path) in pictures.items())


def headline(found: Findings) -> str:
    """Summarize the study: how much was measured, where, and the verdicts on the paper's claims."""
    counts = Counter(claim.verdict for claim in found.claims)
    said = ", ".join(f"{counts[word]} {word}" for word in (CONFIRMED, NOT_CONFIRMED, UNSAID) if counts[word])
    return f"{found.sentences['What was measured'][0]} Of {len(found.claims)} claims of the paper: {said}."


def _claims_lead(claims: Sequence[Claim]) -> str:
    return (
        "NB & NB, “EffiLLM” (2024), and Databricks' notes on LLM inference where named. A claim is confirmed if the "
        "whole 95 % interval of the measured value lies in its range, not confirmed if it lies outside, and cannot be "
        "said if it crosses an end. The verdicts hold for this hardware, this software and these models."
    )


def _unmeasured(claims: Sequence[Claim]) -> tuple[str, ...]:
    """Return the claims without a measured value, together where they need the same."""
    by_need: dict[str, list[str]] = {}
    for claim in claims:
        if claim.measured == "–":
            by_need.setdefault(claim.why, []).append(claim.said)
    return tuple(f"{'; '.join(said)}. {need}" for need, said in by_need.items())


def claims_table(claims: Sequence[Claim]) -> Table:
    """Return the table of the paper's claims and measured values."""
    return Table(
        CLAIM_HEADING,
        tuple(
            (claim.said, claim.range, f"{claim.measured} (suspect)" if claim.suspect else claim.measured)
            for claim in claims
        ),
    )


def _reason(claim: Claim) -> str:
    """Return the reason for a verdict, with the share of the results it rests on that are suspect."""
    doubt = f" {claim.suspect} of the {claim.cells} cells that it rests on are suspect." if claim.suspect else ""
    return f"{claim.why}{doubt}"


def _cells(found: Findings) -> Table:
    """Return the table of all results of the study, with their verdicts."""
    rows = [row_of(result) for result in found.results]
    heading, body = table_cells(rows, varied_settings([result.cell for result in found.results]))
    return Table(tuple(heading), tuple(map(tuple, body)))


def _choices_lead(found: Findings) -> str:
    if not found.choices:
        return "No model has two configurations at one prompt length to choose among."
    suspect = {
        refusal.candidate.result.hashes.config
        for choice in found.choices
        for refusal in choice.found.refused
        if not refusal.missed and refusal.candidate.verdict.word == "suspect"
    }
    left_out = (
        f" {len(suspect)} suspect configurations are not recommended; --accept-suspect REASON includes them."
        if suspect
        else ""
    )
    return (
        f"For prompts of {found.focus.prompt:g} tokens on {found.focus.machine.name}. Limits of memory and time to "
        "first token are set so that half of the configurations keep them; "
        f"llmbench recommend takes your own limits.{left_out}"
    )


def choices_table(choices: Sequence[Choice]) -> Table:
    """Return the table of the recommended configuration under each constraint; a dash if there is none."""
    body = []
    for choice in choices:
        winner = choice.found.winner
        ties = [runner.candidate.name for runner in choice.found.runners_up if runner.tied]
        note = answer(choice.found) if winner is None else f"not measurably worse: {', '.join(ties)}" if ties else ""
        figures = speed_figures(winner) if winner else ("–",) * 4
        body.append((choice.model, choice.constraint, marked(winner) if winner else "–", *figures, note))
    return Table(CHOICE_HEADING, tuple(body), frozenset(range(3, 7)))


def _cautions(choices: Sequence[Choice]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    lines = dict.fromkeys(f"{choice.model}: {caution}" for choice in choices for caution in choice.found.cautions)
    return (("Intervals that cross a limit", tuple(lines)),)


def _figures_lead(found: Findings) -> str:
    focus = found.focus
    words = f"Figures show {len(focus.cells)} cells of {focus.machine.name}"
    return (
        f"{words}. Figures that compare models or quantizations at one shape use batch size {focus.batch} with "
        f"{focus.prompt:g} prompt tokens."
    )


def _across_table(found: Findings) -> Table:
    body = []
    for one in found.across:
        ends = (
            f"{one.speed.low:.3g} to {one.speed.high:.3g}"
            if one.speed.low is not None and one.speed.high is not None
            else "–"
        )
        name = f"{one.name} (suspect)" if one.suspect else one.name
        body.append((name, one.first, one.second, f"{one.speed.value:.3g}", ends))
    return Table(
        ("configuration", "first", "second", "throughput, second ÷ first", "95 % interval"), tuple(body), frozenset({3})
    )


def study_markdown(found: Findings, told: Sequence[Section]) -> str:
    """Return report.md, whose `sections` are in `told`."""
    parts = [f"# {markdown(found.title)}", f"**{markdown(headline(found))}**"]
    for one in told:
        parts.append(f"## {one.title}")
        parts += [markdown(one.lead)] if one.lead else []
        parts += [_markdown(one.table, one.verdicts)] if one.table else []
        for title, lines in one.groups:
            if lines:
                parts += [f"### {markdown(title)}", "\n".join(f"- {markdown(line)}" for line in lines)]
        for picture in one.figures:
            caption = f"\n\n{markdown(picture.caption)}" if picture.caption else ""
            parts.append(f"![{chart_name(picture.name)}]({picture.path}){caption}")
    return "\n\n".join(parts) + "\n"


def _markdown(table: Table, verdicts: Sequence[tuple[str, str]]) -> str:
    """Return a table as Markdown, with the verdicts as its last columns if there are any."""
    if not verdicts:
        return markdown_table(table.heading, table.body, table.numeric)
    body = [(*line, *verdict) for line, verdict in zip(table.body, verdicts, strict=True)]
    return markdown_table([*table.heading, "verdict", "reason"], body, table.numeric)


VERDICT_CLASS = {CONFIRMED: "valid", NOT_CONFIRMED: "failed", UNSAID: ""}
"""Verdict on a claim → CSS class of its badge."""


def study_page(found: Findings, told: Sequence[Section]) -> str:
    """Return report.html, whose `sections` are in `told`. It has no script and makes no request."""
    return page(
        "study.html.j2",
        title=found.title,
        headline=headline(found),
        sections=told,
        verdict_classes=VERDICT_CLASS,
    )


def format_study(found: Findings) -> str:
    """Format the study for a terminal: findings, claims, recommendations, what is missing.

    Laws and figures are only in the files.
    """
    blocks = [headline(found)]
    if found.deployments:
        lines = deployments_table(found.deployments).body
        deploy = [f"- {line[0]}: {line[1]} ({line[2]} tokens/s, {line[5]})" for line in lines]
        deploy += [f"- Left out: {line}" for line in left_out(found.deployments)]
        blocks.append("\n".join(["What to deploy:", *deploy]))
        if pairs := equal_memory_sentences(found.equal_memory):
            blocks.append("\n".join(["At equal memory:", *(f"- {line}" for line in pairs)]))
    else:
        blocks.append(f"What to deploy:\n- No configuration can be recommended: {NONE_VALID}")
    blocks += ["\n".join([f"{title}:", *(f"- {line}" for line in lines)]) for title, lines in found.sentences.items()]
    judged = [c for c in found.claims if c.measured != "–"]
    claims = [
        f"- {c.said} ({c.range}): {c.verdict}. {c.measured}."
        + (f" Suspect: {c.suspect} of {c.cells} cells." if c.suspect else "")
        for c in judged
    ]
    claims += [f"- {UNSAID.capitalize()}: {line}" for line in _unmeasured(found.claims)]
    blocks.append("\n".join(["The paper's claims:", *claims]))
    if found.choices:
        table = choices_table([choice for choice in found.choices if choice.found.winner])
        blocks.append(
            "\n".join(
                [
                    "Choices by model:",
                    *(f"- {line[0]}, {line[1]}: {line[2]} ({line[3]} tokens/s)" for line in table.body),
                ]
            )
        )
    blocks.append("\n".join(["Not determined:", *(f"- {what}: {why}." for what, why in found.not_said)]))
    return "\n\n".join(block for block in blocks if "\n" in block or block == blocks[0])


def study_json(found: Findings, missing: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Return study.json as plain data; scaling.json holds the laws."""
    return {
        "title": found.title,
        "headline": headline(found),
        "cells": len(found.cells),
        "machines": to_json(found.machines),
        "comparison_shape": {
            "batch_size": found.focus.batch,
            "prompt_tokens": found.focus.prompt,
            "machine": found.focus.machine.name,
        },
        "findings": to_json(found.sentences),
        "claims": to_json(found.claims),
        "quantization": [
            {
                "config_hash": e.measured.result.hashes.config,
                "reference": e.reference.result.hashes.config,
                "speed": to_json(e.speed),
                "memory": to_json(e.memory),
            }
            for e in found.effects
        ],
        "recommendations": [
            {
                "model": c.model,
                "constraint": c.constraint,
                "winner": c.found.winner and _chosen(c.found.winner),
                "answer": answer(c.found),
            }
            for c in found.choices
        ],
        "deployments": [
            {
                "constraint": one.constraint,
                "winner": one.found.winner and _chosen(one.found.winner),
                "accepted_suspect": one.found.accepted_suspect,
                "next_best_model": one.second and _chosen(one.second),
                "left_out": one.better and {**_chosen(one.better.candidate), "why": one.better.why},
            }
            for one in found.deployments
        ],
        "deployments_by_length": [
            {"prompt_tokens": one.prompt, "winners": [winner and _chosen(winner) for winner in one.winners]}
            for one in found.lengths
        ],
        "equal_memory": equal_memory_json(found.equal_memory),
        "across_machines": to_json(found.across),
        "not_said": [{"what": what, "why": why} for what, why in found.not_said],
        "not_drawn": [{"figure": name, "why": why} for name, why in missing],
    }


def _chosen(one: Candidate) -> dict[str, Any]:
    return {
        "name": one.name,
        "config_hash": one.result.hashes.config,
        "sweep": one.result.sweep,
        "memory_interval": interval(one, MEMORY),
    }
