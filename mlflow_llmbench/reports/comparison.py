"""Render a comparison as text, Markdown and JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from ..analysis.comparison import (
    Comparison,
    interval_text,
    noise_sentences,
    percent_text,
    ratio_text,
    sentence,
    units_text,
)
from ..analysis.process_noise import ProcessNoise
from ..records.text import number_text
from .escaping import markdown, plain
from .tables import markdown_table, p_text, text_table


def comparison_cells(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Heading and body of the table; the column p (ranks) only if any metric has it."""
    with_ranks = any(effect.p_ranks is not None for effect in comparison.effects)
    heading = [
        "",
        comparison.name_a,
        comparison.name_b,
        "ratio",
        "95 % interval",
        "p (Holm)",
        *(["p (ranks)"] if with_ranks else []),
        "effect",
    ]
    body = []
    for effect in comparison.effects:
        scale = effect.entry.scale
        line = [
            effect.entry.heading,
            number_text(effect.a * scale),
            number_text(effect.b * scale),
            ratio_text(effect),
            interval_text(effect),
            p_text(effect.p_holm),
        ]
        body.append([*line, *([p_text(effect.p_ranks)] if with_ranks else []), effect.effect])
    return heading, body


def _method(comparison: Comparison, is_last: bool = True) -> str:
    """Sentences on how the table was made; those that are the same for every table only if it is the last one."""
    tested = _tested(comparison)
    if not tested:
        return "Nothing was tested: a test needs at least 2 repetitions on each side."
    test = "Paired" if comparison.paired else "Welch's"
    adjusted = f"p adjusted for {tested} metrics (Holm); noise threshold {percent_text(comparison.noise)}"
    tests = f"{test} t test on the logarithms of {units_text(comparison)}; {adjusted}."
    return " ".join([tests, *([_values(comparison)] if is_last else []), *noise_sentences(comparison)])


def _tested(comparison: Comparison) -> int:
    return sum(effect.p_holm is not None for effect in comparison.effects)


def _values(comparison: Comparison) -> str:
    """Sentence on values and ratios."""
    several = max(comparison.processes) > 1
    units = "processes, each the mean of its repetitions" if several else "repetitions"
    return f"Values are those of the runs; ratios are those of geometric means over {units}."


def _are_last(comparisons: Sequence[Comparison]) -> list[bool]:
    """True for each comparison below which the sentence on its values stands: the last one with that sentence."""
    last = {_values(one): number for number, one in enumerate(comparisons) if _tested(one)}
    return [last.get(_values(one)) == number for number, one in enumerate(comparisons)]


def format_comparison(comparison: Comparison, is_last: bool = True) -> str:
    """The comparison for a terminal: the sentence, the table, and the method."""
    heading, body = comparison_cells(comparison)
    table = text_table(heading, body, range(1, len(heading) - 1))
    return "\n".join([plain(sentence(comparison)), "", table, "", _method(comparison, is_last)])


def format_comparisons(comparisons: Sequence[Comparison]) -> str:
    """Comparisons for a terminal, one below the other; what holds for all is said once, at the end."""
    told = [format_comparison(*one) for one in zip(comparisons, _are_last(comparisons), strict=True)]
    return "\n\n".join(told)


def comparison_markdown(comparison: Comparison, is_last: bool = True) -> str:
    """The comparison as Markdown: the sentence, the table, and the method."""
    heading, body = comparison_cells(comparison)
    table = markdown_table(heading, body, range(1, len(heading) - 1))
    return "\n\n".join([markdown(sentence(comparison)), table, _method(comparison, is_last)]) + "\n"


def comparisons_markdown(comparisons: Sequence[Comparison]) -> str:
    """Comparisons as Markdown, like `format_comparisons`."""
    return "\n".join(comparison_markdown(*one) for one in zip(comparisons, _are_last(comparisons), strict=True))


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    """The comparison as plain JSON data: per metric both values, ratio, interval, p values and the effect in words."""
    effects = {
        effect.key: {
            f.name: getattr(effect, f.name) for f in dataclasses.fields(effect) if f.name not in ("entry", "parts")
        }
        for effect in comparison.effects
    }
    noises = [noise and _noise_json(comparison, noise) for noise in comparison.process_noise]
    unlike = [dataclasses.asdict(difference) for difference in comparison.labels]
    told = {
        "a": comparison.name_a,
        "b": comparison.name_b,
        "sentence": sentence(comparison),
        "noise": comparison.noise,
        "paired": comparison.paired,
    }
    counts = {"repetitions": list(comparison.repetitions), "processes": list(comparison.processes)}
    found = {"effects": effects, "process_noise": noises, "unlike": unlike, "doubts": list(comparison.doubts)}
    return {**told, **counts, **found}


def _noise_json(comparison: Comparison, noise: ProcessNoise) -> dict[str, Any]:
    """The noise between processes that was added to a result's error: source, and by metric sd and degrees."""
    spreads = {effect.key: noise.spread(effect.key) for effect in comparison.effects if effect.parts}
    return {
        "source": noise.source,
        "origin": noise.origin,
        "at_least_assumed": noise.at_least_assumed,
        "relative_sd": {key: spread.sd for key, spread in spreads.items()},
        "degrees": {key: spread.degrees for key, spread in spreads.items()},
    }
