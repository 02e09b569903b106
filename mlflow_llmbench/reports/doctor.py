"""Format the report of `llmbench doctor` for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from ..backends.packages import NEEDED
from ..measure.runtime import Item
from ..records.invocation import command_text
from ..records.text import plural
from .tables import aligned


def format_report(items: Sequence[Item]) -> str:
    """Return the report on this machine as text: its items, and the verdict."""
    return f"{format_items(items)}\n\n{_verdict(items, names_schemes=True)}"


def format_summary(items: Sequence[Item]) -> str:
    """Return the report in four lines and the verdict: machine, software, what runs, what is missing."""
    able = [item for item in items if item.status == "ok"]
    schemes = [item for item in items if item.section == "Quantizations"]
    count = sum(item in able for item in schemes)
    lacking = [
        f"{item.name} (limited)" if item.status == "limited" else item.name
        for item in items
        if item not in able and item.section not in ("Quantizations", "Optional")
    ]
    lacking += [plural(len(schemes) - count, "quantization")] if count < len(schemes) else []
    rows = [
        ("Machine", "; ".join(_facts(items, "Machine", ("CPU", "memory", "GPU")))),
        ("Software", ", ".join(f"{item.name} {item.found}" for item in items if _is_needed(item))),
        (
            "Runs",
            f"{', '.join(item.name for item in able if item.section == 'Backends')}; "
            f"{count} of {len(schemes)} quantizations",
        ),
        ("Missing", ", ".join(lacking) or "nothing"),
    ]
    lines = [line for row in aligned(rows) for line in row]
    more = f"`{command_text('doctor')} -v` shows everything, with the commands that install what is missing."
    return "\n".join([*lines, "", _verdict(items), more])


def _is_needed(item: Item) -> bool:
    return item.section == "Software" and item.name in ("Python", *NEEDED)


def _facts(items: Sequence[Item], section: str, names: tuple[str, ...]) -> list[str]:
    return [item.found for item in items if item.section == section and item.name.startswith(names)]


def format_items(items: Sequence[Item]) -> str:
    """Return items as text: sections, one line per item, its advice below."""
    rows = [("", item.status, item.name, item.found) for item in items]
    advice = [("", "", "", item.advice or "") for item in items]
    texts = aligned([*rows, *advice])
    lines: list[str] = []
    section = None
    for item, found, advised in zip(items, texts, texts[len(items) :], strict=False):
        if item.section != section:
            lines += ["", item.section] if lines else [item.section]
            section = item.section
        lines += found + (advised if item.advice else [])
    return "\n".join(lines)


def _verdict(items: Sequence[Item], names_schemes: bool = False) -> str:
    lacking = [item for item in items if item.needed and item.status == "missing"]
    if lacking:
        reasons = dict.fromkeys(f"{item.name}: {item.found}. {item.advice or ''}".rstrip() for item in lacking)
        return "Not ready. " + " ".join(reasons)
    device = next((item.data["device"] for item in items if "device" in item.data), "cpu")
    schemes = [item.name for item in items if item.section == "Quantizations" and item.status == "ok"]
    told = f" and quant={','.join(schemes)}" if names_schemes else ""
    return f"Ready: models can be measured with device={device}{told}."
