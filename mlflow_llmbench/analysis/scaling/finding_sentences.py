"""The findings of a study in sentences with intervals, one function per heading of the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from ...records.backends import recorded_capabilities
from ...records.metrics import COST, ENERGY, KL, PERPLEXITY, TOP1
from ...records.quantizations import COLOURS
from ...records.results import RunResult
from ...records.text import large_number_text, number_text
from ..comparison import RATE
from ..decisions.candidates import figure
from .cells import MEDIAN_TTFT, Measured, describe, grouped, varied_settings
from .claims import Estimate, pooled, rests_text
from .effects import effect_ratio
from .focus import Focus, Machine, at_focus, labels, with_interval
from .paper_claims import QuantEffect
from .study import MEAN_TPOT, ScalingStudy
from .tradeoffs import Ratio


@dataclass(frozen=True)
class Across:
    """One configuration on two machines: throughput of the second ÷ that of the first, and if a result is suspect."""

    name: str
    first: str
    second: str
    speed: Ratio
    suspect: bool = False


def _shown(measured: Measured, key: str) -> str:
    """Format a metric with its interval: `123.4 tokens/s (121.0 to 125.1)`."""
    found = with_interval(measured, key)
    if found is None:
        return "–"
    value, low, high = found
    words = figure(key, value)
    return f"{words} ({number_text(low)} to {number_text(high)})" if low < high else words


def measured_sentences(
    results: Sequence[RunResult], cells: Sequence[Measured], machines: Sequence[Machine]
) -> Iterator[str]:
    """Say how much was measured, where, and which cells are best."""
    sweeps = len({result.sweep for result in results})
    suspect = sum(one.is_suspect for one in cells)
    text = f"{len(cells)} cells of {len(results)} can be used, from {sweeps} sweep{'' if sweeps == 1 else 's'}"
    yield f"{text}, on {'; '.join(f'{m.name} ({m.cells})' for m in machines)}." + (
        f" {suspect} of them are suspect." if suspect else ""
    )
    kinds = Counter("" if recorded_capabilities(m.cell.backend).scripted else m.cell.weights for m in cells)
    if len(kinds) > 1:
        shown = {"random": "random weights", "hub": "published weights", "": "no weights but a script (fake)"}
        told = ", ".join(f"{count} cells have {shown[kind]}" for kind, count in kinds.most_common())
        yield (
            f"{told}. Speed and memory follow from the shape of a model, so all are compared; quality is of published "
            "weights alone."
        )
    names = varied_settings([m.cell for m in cells])
    for what, key, better in (
        ("The highest throughput", RATE, max),
        ("The shortest time to first token", MEDIAN_TTFT, min),
    ):
        found = [m for m in cells if key in m.metrics]
        if found:
            best = better(found, key=lambda m: m.metrics[key])
            yield f"{what} is {_shown(best, key)}: {describe(best.cell, names)}."


def size_sentences(study: ScalingStudy) -> Iterator[str]:
    """Give the main parameter of each law over model size. The section on laws has the rest."""
    for key in ("throughput_by_size", "latency_by_size", "memory_by_size"):
        laws = [law for law in study.laws if law.law.key == key]
        if not laws:
            continue
        main, (low, high) = [law.fit.parameter(law.law.main) for law in laws], laws[0].fit.ranges[0]
        ends = [end for parameter in main for end in (parameter.low, parameter.high) if end is not None]
        shown = str(main[0])
        if len(laws) > 1:
            shown = f"{main[0].name} = {median(p.value for p in main):.3g}, the median" + (
                f" (intervals within {min(ends):.3g} to {max(ends):.3g})" if ends else ""
            )
        title = laws[0].law.title
        yield (
            f"{title[:1].upper()}{title[1:]}: {laws[0].law.form.formula} with {shown} of {_groups(len(laws))}, "
            f"from {low:.3g} to {high:.3g} · 10⁹ parameters."
        )


def _groups(count: int) -> str:
    return f"{count} group{'' if count == 1 else 's'} of cells"


def quantization_sentences(effects: Sequence[QuantEffect], not_said: list[tuple[str, str]]) -> Iterator[str]:
    """Compare each quantization with its reference: speed pooled over models or groups, and memory saved."""
    if not effects:
        not_said.append(
            (
                "what quantization costs",
                "no quantized cell was measured together with a reference that differs only in quantization",
            )
        )
    pairs = dict.fromkeys((effect.quant, effect.memory.reference) for effect in effects)
    for quant, reference in pairs:
        own = [e for e in effects if (e.quant, e.memory.reference) == (quant, reference)]
        speed = pooled([(e.measured.cell.model, e.speed) for e in own])
        first = pooled(
            [(e.measured.cell.model, effect_ratio(quant, e.measured, e.reference, MEDIAN_TTFT)) for e in own]
        )
        shares = [(median(values), name) for name, values in _saved(own) if values]
        saved = [f"{100 * abs(share):.3g} % {'less' if share >= 0 else 'more'} {name}" for share, name in shares]
        memory = f". It takes {' and '.join(saved)}" + (" (medians)" if len(own) > 1 else "") if saved else ""
        yield (
            f"{quant} against {reference}: {_with_spread(speed)} times the throughput, {_with_spread(first)} times the "
            f"time to first token; {rests_text(speed)}{memory}."
        )


def _with_spread(estimate: Estimate) -> str:
    """Format an effect with its interval and spread: `0.92 (0.91 to 0.93; from 0.8 to 1.0 in single cells)`."""
    text = str(estimate)
    if not estimate.spread:
        return text
    return f"{text[:-1]}; {estimate.spread})" if text.endswith(")") else f"{text} ({estimate.spread})"


def _saved(effects: Sequence[QuantEffect]) -> list[tuple[str, list[float]]]:
    weights = [e.memory.weights for e in effects if e.memory.weights is not None]
    return [
        ("memory for the weights", weights),
        ("memory at the peak", [e.memory.peak for e in effects if e.memory.peak is not None]),
    ]


def setting_sentences(focus: Focus, setting: str, words: str) -> Iterator[str]:
    """Compare throughput and latency at the smallest and the largest value of a setting.

    Pooled over the groups with the most frequent pair of smallest and largest value.
    """
    pairs: dict[tuple[float, float], list[tuple[Measured, Measured]]] = {}
    for _, group in grouped(focus.cells, (setting,)):
        placed = sorted((place, number) for number, m in enumerate(group) if (place := m.variable(setting)))
        if placed and placed[0][0] < placed[-1][0]:
            pairs.setdefault((placed[0][0], placed[-1][0]), []).append((group[placed[0][1]], group[placed[-1][1]]))
    if not pairs:
        return
    least, most = max(pairs, key=lambda ends: len(pairs[ends]))

    def effect(key: str) -> Estimate | None:
        found = [
            (low.cell.model, effect_ratio("", high, low, key))
            for low, high in pairs[least, most]
            if low.values(key) and high.values(key)
        ]
        return pooled(found) if found else None

    rate, first, gap = effect(RATE), effect(MEDIAN_TTFT), effect(MEAN_TPOT)
    if rate and first:
        text = (
            f"From {words} {least:g} to {most:g} throughput is {_with_spread(rate)} times as high, "
            f"the time to first token {_with_spread(first)} times as long"
        )
        yield (
            f"{text}{f', the time per output token {_with_spread(gap)} times' if gap else ''}; "
            f"over {rate.count} {rate.units}."
        )


def quality_sentences(focus: Focus, not_said: list[tuple[str, str]]) -> Iterator[str]:
    """Give KL divergence, agreement and perplexity by model and quantization, from the first cell that has them."""
    scored: dict[tuple[str, str], Measured] = {}
    names = labels(focus.cells)
    for measured in focus.cells:
        if TOP1.key() in measured.metrics or PERPLEXITY.key() in measured.metrics:
            scored.setdefault((names[measured.result.hashes.config], measured.cell.quant), measured)
    if not scored:
        random = all(m.cell.weights == "random" for m in focus.cells)
        not_said.append(
            (
                "quality",
                "the weights are random" if random else "it was not measured; use quality=auto and real weights",
            )
        )
    order = list(COLOURS)
    for (name, quant), measured in sorted(
        scored.items(), key=lambda one: (one[0][0], order.index(one[0][1]) if one[0][1] in order else len(order))
    ):
        parts = [
            f"{metric.title} {_shown(measured, metric.key())}"
            for metric in (TOP1, KL, PERPLEXITY)
            if metric.key() in measured.metrics
        ]
        yield f"{name} {quant}: {', '.join(parts)}."


def energy_sentences(focus: Focus, no_energy: str, not_said: list[tuple[str, str]]) -> Iterator[str]:
    """Give the energy per token at the shape of comparison, or the reason why there is none."""
    found = [m for m in focus.cells if ENERGY.key() in m.metrics]
    if not found:
        readings = [r.noise for m in focus.cells for r in m.result.repetitions if r.noise]
        seen = (
            "no energy counter could be read while it was measured"
            if not any(n.energy_j for n in readings)
            else "the power at rest is not known"
        )
        not_said.append(
            ("energy per token", f"{seen} on {focus.machine.name}{f'. {no_energy}' if no_energy else ''}".rstrip("."))
        )
        return
    names = labels(focus.cells)
    for measured in (m for m in found if at_focus(m, focus)):
        yield (
            f"{names[measured.result.hashes.config]} {measured.cell.quant}: "
            f"{figure(ENERGY.key(), measured.metrics[ENERGY.key()])} per token."
        )


def cost_sentences(
    cells: Sequence[Measured], machines: Sequence[Machine], not_said: list[tuple[str, str]]
) -> Iterator[str]:
    """Give the cheapest cell of each machine with a price."""
    if all(machine.price is None for machine in machines):
        not_said.append(("cost", "no price was given; give --price with money per hour"))
    for machine in machines:
        own = [m for m in cells if m.result.hashes.env == machine.env and m.metrics.get(COST.key())]
        if machine.price is None or not own:
            continue
        best = min(own, key=lambda m: m.metrics[COST.key()])
        value, low, high = with_interval(best, RATE) or (0.0, 0.0, 0.0)
        names = varied_settings([m.cell for m in own])
        bought, least, most = (large_number_text(rate * 3600 / machine.price) for rate in (value, low, high))
        yield (
            f"{machine.name} at {machine.price:.4g} per hour: one unit of money buys at best {bought} tokens ("
            f"{least} to {most}), "
            f"{number_text(best.metrics[COST.key()])} per million tokens, with {describe(best.cell, names)}."
        )


def compare_machines(cells: Sequence[Measured], machines: Sequence[Machine]) -> Iterator[Across]:
    """Compare every configuration that two machines have measured with the machine that has most cells."""
    found: dict[str, dict[tuple[str, str], Measured]] = {}
    for measured in cells:
        hashes = measured.result.hashes
        found.setdefault(hashes.env, {})[(hashes.config, hashes.workload)] = measured
    shared = [m for other in machines[1:] for key, m in found[other.env].items() if key in found[machines[0].env]]
    names = varied_settings([m.cell for m in shared])
    for other in machines[1:]:
        for key, measured in found[other.env].items():
            first = found[machines[0].env].get(key)
            if first is not None:
                yield Across(
                    describe(measured.cell, names),
                    machines[0].name,
                    other.name,
                    effect_ratio("", measured, first, RATE),
                    measured.is_suspect or first.is_suspect,
                )


def machine_sentences(
    across: Sequence[Across], machines: Sequence[Machine], not_said: list[tuple[str, str]]
) -> Iterator[str]:
    """Compare the throughput of the machines over the configurations that both measured, or say why it cannot be."""
    if len(machines) < 2:
        not_said.append(
            (
                "a comparison of machines",
                f"all cells were measured on {machines[0].name}; name the sweeps of others too",
            )
        )
    elif not across:
        not_said.append(("a comparison of machines", "no configuration was measured on two of them"))
    for second in dict.fromkeys(one.second for one in across):
        own = [one for one in across if one.second == second]
        speed = pooled([(one.name, one.speed) for one in own])
        yield (
            f"{second} has {_with_spread(speed)} times the throughput of {own[0].first}, "
            f"over {len(own)} configurations that both measured."
        )
