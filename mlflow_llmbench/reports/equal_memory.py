"""Tell which of two models is better at equal memory: a sentence and a line of a table for each pair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..analysis.decisions.candidates import MEMORY, Candidate, figure
from ..analysis.decisions.equal_memory import ALIKE, Rivals
from ..analysis.quality import Estimate
from ..records.metrics import OUTPUT_RATE
from ..records.text import number_text
from .tables import Table

EQUAL_MEMORY_HEADING = (
    "at about", "smaller model", "its quality", "larger model", "its quality", "smaller − larger", "better",
)  # fmt: skip

EQUAL_MEMORY_LEAD = (
    f"Pairs of different models, or of one that was pruned differently, whose peak memories are within a factor of "
    f"{ALIKE:g}, by the quality of the same text or task. Bits per byte do not depend on a tokenizer; less is better. "
    "The interval is the 95 % interval of the difference, paired by the places of the text; with 0 in it, it cannot be "
    "told which is better."
)

UNTOLD = "cannot be told"


def equal_memory_sentences(found: Sequence[Rivals]) -> tuple[str, ...]:
    """Return the question and its answer for each pair."""
    return tuple(map(_sentence, found))


def _sentence(pair: Rivals) -> str:
    better = pair.better
    first, second = map(_quality_text, pair.values)
    other = pair.larger if better is pair.smaller else pair.smaller
    answer = (
        f"It {UNTOLD}: {pair.measure} {first} and {second}"
        if better is None
        else f"{better.name}: {pair.measure} {first if better is pair.smaller else second}, and of {other.name} "
        f"{second if better is pair.smaller else first}"
    )
    return (
        f"At about {figure(MEMORY.keys[-1], pair.memory_gb)}, {pair.smaller.name} or {pair.larger.name}? {answer}; the "
        f"difference is {_ends_text(pair.difference)}."
    )


def equal_memory_table(found: Sequence[Rivals]) -> Table | None:
    """Return the table of the pairs; None without any."""
    body = [
        (
            figure(MEMORY.keys[-1], pair.memory_gb),
            _with_costs(pair.smaller),
            f"{_quality_text(pair.values[0])} {pair.measure}",
            _with_costs(pair.larger),
            f"{_quality_text(pair.values[1])} {pair.measure}",
            _ends_text(pair.difference),
            pair.better.name if pair.better else UNTOLD,
        )
        for pair in found
    ]
    return Table(EQUAL_MEMORY_HEADING, tuple(body)) if body else None


def equal_memory_json(found: Sequence[Rivals]) -> list[dict[str, Any]]:
    """Return the pairs as plain data."""
    return [
        {
            "smaller": {"name": pair.smaller.name, "config_hash": pair.smaller.result.hashes.config},
            "larger": {"name": pair.larger.name, "config_hash": pair.larger.result.hashes.config},
            "memory_gb": pair.memory_gb,
            "measure": pair.measure,
            "values": [vars(value) for value in pair.values],
            "difference": vars(pair.difference),
            "better": pair.better.name if pair.better else None,
        }
        for pair in found
    ]


def _with_costs(one: Candidate) -> str:
    """Return a name with memory and speed; the speed of a suspect result is marked."""
    key, rate = MEMORY.key(one.metrics), one.metrics.get(OUTPUT_RATE.key())
    costs = [figure(key, one.metrics[key])] if key else []
    costs += [] if rate is None else [f"{number_text(rate)} tokens/s{'?' if one.verdict.word == 'suspect' else ''}"]
    return f"{one.name} ({', '.join(costs)})" if costs else one.name


def _quality_text(value: Estimate) -> str:
    ends = "" if value.low is None or value.high is None else f" ({value.low:.3f} to {value.high:.3f})"
    return f"{value.value:.3f}{ends}"


def _ends_text(value: Estimate) -> str:
    ends = "unknown interval" if value.low is None or value.high is None else f"{value.low:+.3f} to {value.high:+.3f}"
    return f"{value.value:+.3f} ({ends})"
