"""Format the verdict of a gate: a table for a terminal, Markdown, JSON, and JUnit XML for CI."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

from ..analysis.comparison import SIGNIFICANCE
from ..analysis.decisions.gate import INVALID, NOT_COMPARABLE, REGRESSED, Check, Gate
from ..records.metrics import KEYS
from ..records.text import finite
from .escaping import markdown, plain
from .tables import markdown_table, p_text, range_text, text_table

WORDS = {"pass": "PASSED", "regression": "REGRESSION", NOT_COMPARABLE: "NOT COMPARABLE", INVALID: "INVALID"}
HEADING = ["metric", "champion", "candidate", "worse by", "95 % interval of the ratio", "p (Holm)", "limit", ""]


def gate_cells(checks: Sequence[Check]) -> list[list[str]]:
    """Return the body of the table, one line per metric."""
    return [
        [
            check.key,
            _value(check.key, check.a),
            _value(check.key, check.b),
            check.worse_text(),
            range_text(check.low, check.high),
            p_text(check.p_holm),
            check.limit_text(),
            check.state,
        ]
        for check in checks
    ]


def format_gate(gate: Gate, champion: str, candidate: str) -> str:
    """Format the gate for a terminal: the verdict, the table, the notes."""
    lines = [plain(f"{WORDS[gate.verdict]}: {candidate} against {champion}. {gate.why}")]
    if gate.checks:
        lines += ["", text_table(HEADING, gate_cells(gate.checks), range(1, 7))]
    return "\n".join([*lines, *(["", *map(plain, gate.notes)] if gate.notes else [])])


def gate_markdown(gate: Gate, champion: str, candidate: str) -> str:
    """Return gate.md for a run's artifacts, a comment on a pull request or the summary of a CI job."""
    parts = [f"## {WORDS[gate.verdict]}: {markdown(candidate)} against {markdown(champion)}", markdown(gate.why)]
    if gate.checks:
        parts.append(markdown_table(HEADING, gate_cells(gate.checks)))
    parts += ["\n".join(f"- {markdown(note)}" for note in gate.notes)] if gate.notes else []
    if gate.checks:
        parts.append(
            "A metric that every repetition has regresses if it is worse by more than its limit and with "
            f"p < {SIGNIFICANCE:g} after Holm. A metric that a run has only once regresses if it is worse by more than "
            "its limit."
        )
    return "\n\n".join(parts) + "\n"


def gate_json(gate: Gate) -> dict[str, Any]:
    """Return the gate as plain JSON data; undefined numbers are null."""
    checks = [{name: finite(getattr(check, name)) for name in check.__dataclass_fields__} for check in gate.checks]
    return {
        "verdict": gate.verdict,
        "exit_code": gate.exit_code,
        "why": gate.why,
        "checks": checks,
        "notes": list(gate.notes),
        "significance": SIGNIFICANCE,
    }


def gate_junit(gate: Gate, champion: str, candidate: str) -> str:
    """Return JUnit XML: one test case per metric, or one case with an error if nothing could be compared."""
    errors = int(gate.verdict in (NOT_COMPARABLE, INVALID))
    failures = sum(check.state == REGRESSED for check in gate.checks)
    counts = {"tests": str(len(gate.checks) or 1), "failures": str(failures), "errors": str(errors)}
    suites = ElementTree.Element("testsuites", counts)
    suite = ElementTree.SubElement(
        suites, "testsuite", {"name": plain(f"llmbench gate: {candidate} against {champion}"), **counts}
    )
    for check in gate.checks:
        case = ElementTree.SubElement(suite, "testcase", {"classname": "llmbench.gate", "name": check.key})
        if check.state == REGRESSED:
            message = f"{check.worse_text().lstrip('+')} worse than the champion, and the limit is {check.limit_text()}"
            failure = ElementTree.SubElement(case, "failure", {"message": message, "type": "regression"})
            failure.text = (
                f"champion {_value(check.key, check.a)}, candidate {_value(check.key, check.b)}, "
                f"ratio {range_text(check.low, check.high)}, p {p_text(check.p_holm)}"
            )
    if errors:
        case = ElementTree.SubElement(suite, "testcase", {"classname": "llmbench.gate", "name": "comparison"})
        ElementTree.SubElement(case, "error", {"message": plain(gate.why), "type": gate.verdict})
    ElementTree.indent(suites)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(suites, encoding="unicode") + "\n"


def _value(key: str, value: float) -> str:
    metric = KEYS.get(key)
    unit = metric.unit if metric is not None and metric.unit != "0–1" else ""
    return f"{value:.4g} {unit}".strip()
