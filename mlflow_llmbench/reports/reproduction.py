"""Render a reproduction as text, Markdown and JSON."""

from __future__ import annotations

from typing import Any

from ..analysis.comparison import SIGNIFICANCE
from ..analysis.decisions.equivalence import WORDS, Reproduction
from ..records.text import finite, number_text
from .escaping import markdown, plain
from .tables import markdown_table, p_text, range_text, text_table

HEADING = ["metric", "original", "again", "ratio", "90 % interval", "p (within)", "p (beyond)", ""]


def reproduction_cells(found: Reproduction) -> list[list[str]]:
    """Body of the table, one line per metric."""
    return [
        [
            f.label or f.key,
            number_text(f.original),
            number_text(f.again),
            f"{f.ratio:.3f}",
            range_text(f.low, f.high),
            p_text(f.p_within),
            p_text(f.p_beyond),
            WORDS[f.state],
        ]
        for f in found.findings
    ]


def _method(found: Reproduction) -> str:
    return (
        f"Two one-sided Welch's t tests on the logarithms of {found.rests_on} against ±{100 * found.margin:.3g} %: "
        f"within if p < {SIGNIFICANCE:g}; beyond if p < {SIGNIFICANCE:g} after Holm. A metric that a run has only once "
        "is compared by its value."
    )


def format_reproduction(found: Reproduction) -> str:
    """The reproduction for a terminal: the sentence, the table, the method, the notes."""
    lines = [plain(found.why)]
    if found.findings:
        lines += ["", text_table(HEADING, reproduction_cells(found), range(1, 7)), "", _method(found)]
    return "\n".join([*lines, *(["", *map(plain, found.notes)] if found.notes else [])])


def reproduction_markdown(found: Reproduction) -> str:
    """The text of reproduction.md: the same as Markdown."""
    parts = [f"## {markdown(found.why)}"]
    if found.findings:
        parts += [markdown_table(HEADING, reproduction_cells(found), range(1, 7)), _method(found)]
    parts += ["\n".join(f"- {markdown(note)}" for note in found.notes)] if found.notes else []
    return "\n\n".join(parts) + "\n"


def reproduction_json(found: Reproduction) -> dict[str, Any]:
    """The reproduction as plain JSON data."""
    findings = [{name: finite(value) for name, value in vars(finding).items()} for finding in found.findings]
    return {
        "verdict": found.verdict,
        "exit_code": found.exit_code,
        "why": found.why,
        "margin": found.margin,
        "findings": findings,
        "notes": list(found.notes),
        "rests_on": found.rests_on,
    }
