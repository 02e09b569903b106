"""A scaling study as text: sentences to quote, tables, scaling.md and scaling.json."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ..analysis.scaling.fitting import Fit
from ..analysis.scaling.law_sentences import main_sentence, paper_range, parameters_text
from ..analysis.scaling.laws import LawFit
from ..analysis.scaling.memory_account import Growth, MemoryBreakdown
from ..analysis.scaling.ranking import percent
from ..analysis.scaling.study import WATCHED, BatchScaling, CliffSearch, QuantEfficiency, ScalingStudy, TokenCostAt
from ..analysis.scaling.surfaces import surface_sentence
from ..analysis.scaling.tradeoffs import Cliff, Ratio
from ..records.codec import to_json
from .escaping import markdown
from .tables import MISSING, markdown_table, text_table

METHOD = (
    "Each point is one measured cell. Curves minimise squared relative errors. Intervals are 95 %, Student's for power "
    "laws and by profile likelihood for the others, and assume that the curve is right. Nothing is predicted beyond "
    "the measured range."
)


def scaling_sections(study: ScalingStudy) -> dict[str, list[str]]:
    """Map heading → sentences; headings without sentences are left out."""
    found = {
        "Laws": [main_sentence(law) for law in study.laws],
        "Batch size and prompt length together": [surface_sentence(surface) for surface in study.surfaces],
        "Batch size": [sentence for batch in study.batches for sentence in _batch_sentences(batch)],
        "Quantization": [sentence for quant in study.quants for sentence in _quant_sentences(quant)],
        "Latency cliffs": _cliff_sentences(study.cliffs),
        "Prompt against output": [_token_cost_sentence(found) for found in study.exchanges],
        "Memory": list(_memory_sentences(study)),
        "Not said": _merged(study.refused),
        "Left out": [f"{line}." for line in study.left_out],
    }
    return {heading: sentences for heading, sentences in found.items() if sentences}


def _merged(refused: Sequence[str]) -> list[str]:
    """Merge refusals with the same reason into one line with the number of groups."""
    found: dict[tuple[str, str], list[str]] = {}
    for line in refused:
        what, _, why = line.partition("): ")
        name, _, where = what.rpartition(" (")
        found.setdefault((name, why), []).append(where)
    return [
        f"{name} ({places[0] if len(places) == 1 else f'{len(places)} groups'}): {why}"
        for (name, why), places in found.items()
    ]


def law_cells(study: ScalingStudy) -> tuple[list[str], list[list[str]]]:
    """Return heading and body of the table of laws."""
    heading = [
        "law", "cells", "formula", "parameters (95 % interval)", "range",
        "R²", "residual", "leave-one-out", "nearest curve",
    ]  # fmt: skip
    body = []
    for law in study.laws:
        low, high = law.fit.ranges[0]
        line = [
            law.law.title,
            f"{law.where}{_suspects(law)}",
            law.fit.form.formula,
            parameters_text(law.fit),
            f"{low:g} to {high:g}",
            MISSING if law.fit.r_squared is None else f"{law.fit.r_squared:.4f}",
        ]
        body.append([*line, percent(law.fit.sigma), percent(law.fit.loo_error), law.best.form.formula])
    return heading, body


def _suspects(law: LawFit) -> str:
    """Say how many of a law's cells are suspect; empty if none is."""
    count = sum(m.is_suspect for m in law.cells)
    return f" ({count} of {len(law.cells)} suspect)" if count else ""


def prediction_cells(study: ScalingStudy) -> tuple[list[str], list[list[str]]]:
    """Return heading and body of the table of predictions: unmeasured values, and the interval of a measurement."""
    heading = ["predicted, not measured", "cells", "at", "value", "95 % interval of a new measurement", "by"]
    body = []
    for law, p in study.predictions:
        name = law.law.title.partition(" against ")[0]
        interval = f"{p.low:.4g} to {p.high:.4g}"
        body.append(
            [
                name,
                f"{law.where}{_suspects(law)}",
                f"{law.law.over} {p.x[0]:g}",
                f"{p.value:.4g} {law.law.unit}",
                interval,
                law.best.form.formula,
            ]
        )
    return heading, body


def format_scaling(study: ScalingStudy) -> str:
    """Format the study for a terminal: the tables of laws and of predictions, then the sentences."""
    tables = [text_table(*table) for table in (law_cells(study), prediction_cells(study)) if table[1]]
    sentences = [
        "\n".join([f"{heading}:", *(f"- {sentence}" for sentence in found)])
        for heading, found in scaling_sections(study).items()
    ]
    return "\n\n".join([f"{study.cells} cells: {study.subject}", *tables, *sentences, METHOD])


def scaling_markdown(study: ScalingStudy, charts: Sequence[str] = ()) -> str:
    """Return scaling.md: the tables, the charts (paths relative to the file), the sentences."""
    parts = [f"# Scaling: {markdown(study.subject)}", f"{study.cells} cells. {METHOD}"]
    parts += [markdown_table(*table) for table in (law_cells(study), prediction_cells(study)) if table[1]]
    parts += [f"![{path}]({path})" for path in charts]
    for heading, sentences in scaling_sections(study).items():
        parts += [f"## {heading}", "\n".join(f"- {markdown(sentence)}" for sentence in sentences)]
    return "\n\n".join(parts) + "\n"


def scaling_json(study: ScalingStudy) -> dict[str, Any]:
    """Return the study as plain JSON data. Predictions have `predicted: true`; an absent value is null."""
    names = ["cells", "subject", "batches", "quants", "cliffs", "exchanges", "footprints", "refused", "left_out"]
    rest = {name: to_json(getattr(study, name)) for name in names}
    return {
        "laws": [_law_json(law) for law in study.laws],
        "surfaces": [
            {
                "where": surface.where,
                "exponents": [
                    {"prompt_tokens": length, **to_json(found.parameter("β"))} for length, found in surface.exponents
                ],
                "joint": [_fit_json(found) for found in surface.joint],
                "sentence": surface_sentence(surface),
            }
            for surface in study.surfaces
        ],
        **rest,
        "predictions": [
            {
                "law": law.law.key,
                "where": law.where,
                "metric": law.metric,
                "unit": law.law.unit,
                "curve": law.best.form.formula,
                "over": law.law.over,
                **to_json(predicted),
                "x": predicted.x[0],
            }
            for law, predicted in study.predictions
        ],
        "sentences": scaling_sections(study),
    }


def _law_json(law: LawFit) -> dict[str, Any]:
    return {
        "law": law.law.key,
        "where": law.where,
        "metric": law.metric,
        "unit": law.law.unit,
        "over": law.law.over,
        "paper": paper_range(law),
        "main": law.law.main,
        "fit": _fit_json(law.fit),
        "rivals": [_fit_json(rival) for rival in law.rivals],
        "nearest": law.best.form.formula,
        "noise": law.noise,
        "p_misfit": law.p_misfit,
        "config_hashes": [m.result.hashes.config for m in law.cells],
        "sentence": main_sentence(law),
    }


def _fit_json(found: Fit) -> dict[str, Any]:
    x = [place[0] if len(place) == 1 else list(place) for place in found.x]
    return {
        "formula": found.form.formula,
        "parameters": {p.name: {"value": p.value, "low": p.low, "high": p.high} for p in found.parameters},
        "x": x,
        "y": list(found.y),
        "residuals": list(found.residuals),
        "sigma": found.sigma,
        "r_squared": found.r_squared,
        "aicc": found.aicc,
        "loo_error": found.loo_error,
        "ranges": [list(ends) for ends in found.ranges],
    }


def _ratio(found: Ratio) -> str:
    interval = f" ({found.low:.3g} to {found.high:.3g})" if found.low is not None and found.high is not None else ""
    return f"{found.value:.3g}{interval}"


def _batch_sentences(batch: BatchScaling) -> Iterator[str]:
    if batch.efficiency:
        yield (
            f"Scaling efficiency η of the batch size ({batch.where}): "
            + ", ".join(f"{_ratio(found)} at {found.name}" for found in batch.efficiency)
            + "."
        )
    best = batch.optimal
    alike = f" (not measurably better than {', '.join(map(str, best.alike))})" if best.alike else ""
    yield (
        f"Best batch size ({batch.where}): {best.per_instance} by throughput per instance{alike}; the largest that "
        f"keeps {percent(best.share)} of that is {best.largest}; {best.throughput} has the highest throughput."
    )


def _quant_sentences(quant: QuantEfficiency) -> Iterator[str]:
    for speed, memory in zip(quant.efficiency, quant.memory, strict=True):
        saved = [
            f"{name} {percent(value)}"
            for name, value in (
                ("in theory", memory.theory),
                ("of the weights", memory.weights),
                ("of the peak", memory.peak),
            )
            if value is not None
        ]
        yield (
            f"{speed.name} against {quant.reference} ({quant.where}): {_ratio(speed)} times the throughput; "
            f"memory saved {', '.join(saved) or 'unknown'}."
        )


def _cliff_sentences(searches: Sequence[CliffSearch]) -> list[str]:
    found = [
        f"Latency cliff ({search.where}): from {search.over.replace('_', ' ')} {cliff.before:g} to {cliff.after:g} "
        f"the {WATCHED[search.metric]} grows {cliff.factor:.2f} times more than the neighbouring steps explain "
        f"(p {'< 0.001' if cliff.p_value < 0.001 else f'= {cliff.p_value:.3f}'}).{_doubt(search, cliff)}"
        for search in searches
        for cliff in search.cliffs
    ]
    clean = sum(not search.cliffs for search in searches)
    return [
        *found,
        *(
            [f"No cliff in {clean} of {len(searches)} series of latency over batch size or prompt length."]
            if clean
            else []
        ),
    ]


def _doubt(search: CliffSearch, cliff: Cliff) -> str:
    """Say which of the two cells of a cliff are suspect, and why; empty if none is."""
    found = {place: codes for place in (cliff.before, cliff.after) if (codes := search.suspect.get(place))}
    if not found:
        return ""
    told = " and ".join(f"at {place:g} ({', '.join(codes)})" for place, codes in found.items())
    cells = "The cell" if len(found) == 1 else "The cells"
    return (
        f" {cells} {told} {'is' if len(found) == 1 else 'are'} suspect, so the step may come from a disturbance. "
        "Measure again on a quiet machine."
    )


def _token_cost_sentence(found: TokenCostAt) -> str:
    e = found.exchange
    return (
        f"{e.prompt_tokens} more prompt tokens cost {e.prompt[0]:.3g} ms ({e.prompt[1]:.3g} to {e.prompt[2]:.3g}) of "
        f"time to first token, {e.output_tokens} more output tokens {e.output[0]:.3g} ms ({e.output[1]:.3g} to "
        f"{e.output[2]:.3g}) ({found.where}): the prompt tokens cost as much as "
        f"{e.equal_output[0]:.3g} output tokens ({e.equal_output[1]:.3g} to {e.equal_output[2]:.3g})."
    )


def _memory_sentences(study: ScalingStudy) -> Iterator[str]:
    """Give the highest peak on host and device in parts, every cell that leaks, and the number of those that do not."""
    accounts = [(f.where, f.account) for f in study.footprints if f.account]
    for place in sorted({account.where for _, account in accounts}):
        where, parts = max(((w, a) for w, a in accounts if a.where == place), key=lambda pair: pair[1].peak)
        yield account_sentence(where, parts)
    checked = [(f.where, f.growth) for f in study.footprints if f.growth and f.growth.between]
    leaking = [(where, grown) for where, grown in checked if grown.grows]
    yield from (leak_sentence(where, grown) for where, grown in leaking)
    if len(checked) > len(leaking):
        yield (
            f"No growth of memory from repetition to repetition is seen in {len(checked) - len(leaking)} of "
            f"{len(checked)} cells that could be checked."
        )
    for found in study.footprints:
        if found.growth and found.growth.leak:
            leak = found.growth.leak
            if leak.low > 0:
                yield (
                    f"During a generation ({found.where}) memory grows by {leak.slope:,.0f} bytes a token "
                    f"({leak.low:,.0f} to {leak.high:,.0f}) more than the KV cache's {found.growth.expected:,.0f}."
                )


def account_sentence(where: str, parts: MemoryBreakdown) -> str:
    """Write the peak as the sum of its parts."""
    named = {
        "before the load": parts.baseline,
        "weights": parts.weights,
        "left by the load (buffers, allocator)": parts.load_rest,
        "KV cache": parts.cache,
        "while generating (activations, logits, copies of the cache)": parts.run_rest,
    }
    terms = " ".join(f"{'−' if value < 0 else '+'} {abs(value) / 1e9:.3f} GB {name}" for name, value in named.items())
    return f"Highest {parts.where} peak ({where}): {parts.peak / 1e9:.3f} GB = {terms.removeprefix('+ ')}."


def leak_sentence(where: str, grown: Growth) -> str:
    """Report memory that grows from one repetition to the next; empty without a trend."""
    kept = grown.between
    return (
        f"Memory grows from repetition to repetition ({where}): {kept.slope:,.0f} bytes each "
        f"({kept.low:,.0f} to {kept.high:,.0f}). Look for a leak."
        if kept
        else ""
    )
