"""What landed where of a model that was laid out over several places, as a section of a report."""

from __future__ import annotations

from ..analysis.layout import parts_of, spans
from ..records.metric import GB
from ..records.results import RunResult
from ..records.text import short_number_text
from .tables import MISSING, markdown_table


def layout_sections(result: RunResult) -> list[str]:
    """Return heading and table of the weights in each place, beside what the plan expected; empty without a layout."""
    found, expected = {part.place: part for part in parts_of(result)}, result.predicted_placement or {}
    if not found:
        return []
    body = []
    for place in {**found, **{place: None for place, size in expected.items() if size}}:
        part = found.get(place)
        planned = short_number_text(expected[place] / GB) if place in expected else MISSING
        size = short_number_text(part.weight_bytes / GB) if part else "0"
        body.append([place, size, planned, ", ".join(spans(part.modules)) if part else MISSING])
    return ["## What landed where", markdown_table(["place", "weights GB", "planned GB", "modules"], body)]
