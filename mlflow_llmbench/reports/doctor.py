"""Format the report of `llmbench doctor` for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from ..measure.runtime import Item
from .tables import aligned


def format_report(items: Sequence[Item]) -> str:
    """Return the report on this machine as text: its items, and a sentence on what can be measured."""
    return f"{format_items(items)}\n\n{_last_sentence(items)}"


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


def _last_sentence(items: Sequence[Item]) -> str:
    lacking = [item.name for item in items if item.needed and item.status == "missing"]
    if lacking:
        return f"Not ready: {', '.join(dict.fromkeys(lacking))}. See the advice above."
    device = next((item.data["device"] for item in items if "device" in item.data), "cpu")
    quants = [item.name for item in items if item.section == "Quantizations" and item.status == "ok"]
    return f"Ready: models can be measured with device={device} and quant={','.join(quants)}."
