"""Findings of one or several sweeps as data: sentences with intervals, claims, recommendations, costs, machines.

Everything is computed from the results; `study_report` renders it. A missing finding is listed with its reason, so that
it cannot be mistaken for a zero.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from ...records.cell import Cell
from ...records.errors import UsageError
from ...records.metric import interval_keys
from ...records.metrics import COST, ENERGY, KL, PERPLEXITY, TOP1
from ...records.quantizations import COLOURS
from ...records.results import RunResult
from ...records.text import number_text
from ...stats import t_interval
from ..comparison import RATE, UNNAMED
from ..decisions.recommend import (
    MEMORY,
    Limit,
    Measure,
    Recommendation,
    bound_text,
    candidates,
    choose,
    figure,
)
from ..summary import hardware_name
from .cells import MEDIAN_TTFT, Measured, describe, grouped, models_text, select_usable, varied_settings
from .paper_claims import Claim, Estimate, QuantEffect, judge_claims, pooled, quant_effects
from .study import MEAN_TPOT, Study, study_scaling
from .tradeoffs import Ratio, ratio

OF_MODEL = ("model", "revision", "weights", "backend", "trust_remote_code", "allow_pickle", "workload")
"""Settings of a model: in one figure each model may have its own, and those that vary are named."""

SHOWN = ("quant", "batch_size", "prompt_tokens")
"""The axes of the figures, beside the model."""

LEAST_CHOICE = 2
"""Least number of configurations to choose among."""


@dataclass(frozen=True)
class Machine:
    """One machine with one software: environment hash, name (with the hash if two share it), cells, price per hour."""

    env: str
    name: str
    cells: int
    price: float | None


@dataclass(frozen=True)
class Focus:
    """The cells in the figures: of one machine, differing only in model, quantization, batch size and prompt length.

    `batch`, `prompt`: the values held fixed while something else varies · `note`: what is left out.
    """

    machine: Machine
    cells: tuple[Measured, ...]
    batch: int
    prompt: float
    note: str


@dataclass(frozen=True)
class Choice:
    """The recommended configuration of one model under one constraint."""

    model: str
    constraint: str
    found: Recommendation


@dataclass(frozen=True)
class Across:
    """One configuration on two machines: throughput of the second ÷ that of the first."""

    name: str
    first: str
    second: str
    speed: Ratio


@dataclass(frozen=True)
class Findings:
    """Content of a study's report. `sentences`: heading → sentences. `not_said`: what is missing, and why."""

    title: str
    scaling: Study
    results: tuple[RunResult, ...]
    cells: tuple[Measured, ...]
    machines: tuple[Machine, ...]
    focus: Focus
    effects: tuple[QuantEffect, ...]
    sentences: Mapping[str, tuple[str, ...]]
    claims: tuple[Claim, ...]
    choices: tuple[Choice, ...]
    across: tuple[Across, ...]
    not_said: tuple[tuple[str, str], ...]


def find(
    results: Sequence[RunResult],
    *,
    share: float = 0.5,
    prices: Mapping[str, float] | None = None,
    accept_suspect: str | None = None,
    no_energy: str = "",
) -> Findings:
    """Study results.

    `prices`: money per hour by part of the hardware's name, "" for all; they replace the recorded prices.
    `accept_suspect`: reason for which suspect results may be recommended. `no_energy`: why energy cannot be read on
    this machine. Raises UsageError if no result can be used, or if a price matches no machine.
    """
    results = _priced(results, prices or {})
    study = study_scaling(results, share)
    cells, _ = select_usable(list({(r.hashes.config, r.hashes.env, r.started_ms): r for r in results}.values()))
    machines = _machines(cells)
    focus = _focus(cells, machines)
    effects = tuple(quant_effects(cells))
    choices = tuple(_choices(focus, accept_suspect))
    across = tuple(_across(cells, machines))
    not_said: list[tuple[str, str]] = []
    sentences = {
        "What was measured": _measured(results, cells, machines),
        "Model size": _by_size(study),
        "Quantization": _by_quantization(effects, not_said),
        "Batch size": _by_setting(focus, "batch_size", "batch size"),
        "Prompt length": _by_setting(focus, "prompt_tokens", "prompt length"),
        "Quality": _quality(focus, not_said),
        "Energy": _energy(focus, no_energy, not_said),
        "Cost": _cost(cells, machines, not_said),
        "Machines": _between_machines(across, machines, not_said),
    }
    told = {heading: tuple(found) for heading, lines in sentences.items() if (found := list(lines))}
    title = f"Study of {models_text(cells)}"
    claims = tuple(judge_claims(study, cells))
    return Findings(
        title,
        study,
        tuple(results),
        tuple(cells),
        machines,
        focus,
        effects,
        told,
        claims,
        choices,
        across,
        tuple(not_said),
    )


def _priced(results: Sequence[RunResult], prices: Mapping[str, float]) -> list[RunResult]:
    """Set the price of each result's hardware. Raises UsageError for a name that matches no hardware."""
    names = {hardware_name(result) for result in results}
    for part in prices:
        if not any(part.lower() in name.lower() for name in names):
            raise UsageError(
                f"No machine of the study is called {part}. "
                f"Give the price for one of these, or for a part of its name: {'; '.join(sorted(names))}."
            )
    found = []
    for result in results:
        price = next(
            (p for part, p in prices.items() if part and part.lower() in hardware_name(result).lower()), prices.get("")
        )
        found.append(result if price is None else dataclasses.replace(result, price_per_hour=price))
    return found


def _machines(cells: Sequence[Measured]) -> tuple[Machine, ...]:
    """Return the machines, the one with most cells first."""
    counts = Counter(measured.result.hashes.env for measured in cells)
    first = {env: next(m.result for m in cells if m.result.hashes.env == env) for env in counts}
    names = {env: hardware_name(result) for env, result in first.items()}
    alike = Counter(names.values())
    shown = {env: f"{name} [{env[:6]}]" if alike[name] > 1 else name for env, name in names.items()}
    return tuple(Machine(env, shown[env], count, first[env].price_per_hour) for env, count in counts.most_common())


def _focus(cells: Sequence[Measured], machines: Sequence[Machine]) -> Focus:
    """Choose the machine and settings of most cells, and the shape at which most models and quantizations meet."""
    here = [measured for measured in cells if measured.result.hashes.env == machines[0].env]
    held = [f.name for f in dataclasses.fields(Cell) if f.name not in (*UNNAMED, *OF_MODEL, *SHOWN)]
    counts = Counter(tuple(getattr(m.cell, name) for name in held) for m in here)
    settings = counts.most_common(1)[0][0]
    newest: dict[tuple[object, ...], Measured] = {}
    for measured in sorted(
        (m for m in here if tuple(getattr(m.cell, name) for name in held) == settings), key=lambda m: m.result.ended_ms
    ):
        newest[tuple(getattr(measured.cell, name) for name in (*OF_MODEL, *SHOWN))] = measured
    shown = list(newest.values())
    shapes: dict[tuple[int, float], int] = Counter(
        (m.cell.batch_size, prompt) for m in shown if (prompt := m.variable("prompt_tokens"))
    )
    batch, prompt = (
        min(shapes, key=lambda shape: (-shapes[shape], shape[0], abs(math.log(shape[1] / 128)))) if shapes else (1, 0.0)
    )
    others = len(here) - len(shown)
    told = ", ".join(
        f"{name}={getattr(shown[0].cell, name)}" for name in held if name in varied_settings([m.cell for m in here])
    )
    note = (
        f"{others} of the {len(here)} cells there are not shown: they were measured again or with other settings than "
        f"{told or 'these'}."
        if others
        else ""
    )
    return Focus(machines[0], tuple(shown), batch, prompt, note)


def labels(cells: Sequence[Measured]) -> dict[str, str]:
    """Map config hash → label of the cell's model: its name, with weights and workload if they vary among the cells."""
    varied = [name for name in ("weights", "workload") if len({getattr(m.cell, name) for m in cells}) > 1]
    words = {"hub": "real", "random": "random"}

    def label(cell: Cell) -> str:
        told = [words.get(str(getattr(cell, name)), str(getattr(cell, name))) for name in varied]
        return describe(cell, ["model"]) + (f" ({', '.join(told)})" if told else "")

    return {m.result.hashes.config: label(m.cell) for m in cells}


def with_interval(measured: Measured, key: str, scale: float = 1.0) -> tuple[float, float, float] | None:
    """Return (value, low, high) of a metric, with the ends of its 95 % interval; None without the metric.

    Without an interval both ends are the value itself.
    """
    value = measured.metrics.get(key)
    if value is None:
        return None
    low, high = (measured.metrics.get(end) for end in interval_keys(key))
    if low is None or high is None:
        ends = t_interval(measured.values(key))
        low, high = (min(max(ends[0], 0.0), value), max(ends[1], value)) if ends else (value, value)
    return value * scale, low * scale, high * scale


def _shown(measured: Measured, key: str) -> str:
    """Format a metric with its interval: `123.4 tokens/s (121.0 to 125.1)`."""
    found = with_interval(measured, key)
    if found is None:
        return "–"
    value, low, high = found
    words = figure(key, value)
    return f"{words} ({number_text(low)} to {number_text(high)})" if low < high else words


def _measured(results: Sequence[RunResult], cells: Sequence[Measured], machines: Sequence[Machine]) -> Iterator[str]:
    """Say how much was measured, where, and which cells are best."""
    sweeps = len({result.sweep for result in results})
    suspect = sum(1 for one in candidates([m.result for m in cells]) if one.verdict.word == "suspect")
    text = f"{len(cells)} cells of {len(results)} can be used, from {sweeps} sweep{'' if sweeps == 1 else 's'}"
    yield f"{text}, on {'; '.join(f'{m.name} ({m.cells})' for m in machines)}." + (
        f" {suspect} of them are suspect." if suspect else ""
    )
    kinds = Counter(m.cell.weights for m in cells)
    if len(kinds) > 1:
        yield (
            f"{kinds['random']} cells have random weights and {kinds['hub']} published ones. Speed and memory follow "
            "from the shape of a model, so both kinds are compared; quality is of published weights alone."
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


def _by_size(study: Study) -> Iterator[str]:
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


def _by_quantization(effects: Sequence[QuantEffect], not_said: list[tuple[str, str]]) -> Iterator[str]:
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
            [
                (e.measured.cell.model, ratio(quant, e.measured.values(MEDIAN_TTFT), e.reference.values(MEDIAN_TTFT)))
                for e in own
            ]
        )
        shares = [(median(values), name) for name, values in _saved(own) if values]
        saved = [f"{100 * abs(share):.3g} % {'less' if share >= 0 else 'more'} {name}" for share, name in shares]
        yield (
            f"{quant} against {reference}: {_told(speed)} times the throughput, {_told(first)} times the time to first "
            f"token; over {speed.count} {speed.units}"
            f"{f'. It takes {_and(saved)}' if saved else ''}{' (medians)' if saved and len(own) > 1 else ''}."
        )


def _told(estimate: Estimate) -> str:
    """Format an effect with its interval and spread: `0.92 (0.91 to 0.93; from 0.8 to 1.0 in single cells)`."""
    text = str(estimate)
    if not estimate.spread:
        return text
    return f"{text[:-1]}; {estimate.spread})" if text.endswith(")") else f"{text} ({estimate.spread})"


def _and(words: Sequence[str]) -> str:
    return " and ".join(words)


def _saved(effects: Sequence[QuantEffect]) -> list[tuple[str, list[float]]]:
    weights = [e.memory.weights for e in effects if e.memory.weights is not None]
    return [
        ("memory for the weights", weights),
        ("memory at the peak", [e.memory.peak for e in effects if e.memory.peak is not None]),
    ]


def _by_setting(focus: Focus, setting: str, words: str) -> Iterator[str]:
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
            (low.cell.model, ratio("", high.values(key), low.values(key)))
            for low, high in pairs[least, most]
            if low.values(key) and high.values(key)
        ]
        return pooled(found) if found else None

    rate, first, gap = effect(RATE), effect(MEDIAN_TTFT), effect(MEAN_TPOT)
    if rate and first:
        text = (
            f"From {words} {least:g} to {most:g} throughput is {_told(rate)} times as high, "
            f"the time to first token {_told(first)} times as long"
        )
        yield (
            f"{text}{f', the time per output token {_told(gap)} times' if gap else ''}; over {rate.count} {rate.units}."
        )


def _quality(focus: Focus, not_said: list[tuple[str, str]]) -> Iterator[str]:
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


def _energy(focus: Focus, no_energy: str, not_said: list[tuple[str, str]]) -> Iterator[str]:
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


def at_focus(measured: Measured, focus: Focus) -> bool:
    """Return True if a cell has the batch size and prompt length at which models and quantizations are compared."""
    return measured.cell.batch_size == focus.batch and measured.variable("prompt_tokens") == focus.prompt


def _cost(cells: Sequence[Measured], machines: Sequence[Machine], not_said: list[tuple[str, str]]) -> Iterator[str]:
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
        yield (
            f"{machine.name} at {machine.price:g} per hour: at best {number_text(value * 3600 / machine.price)} tokens "
            f"per unit of money ({number_text(low * 3600 / machine.price)} to "
            f"{number_text(high * 3600 / machine.price)}), "
            f"{number_text(best.metrics[COST.key()])} per million tokens, with {describe(best.cell, names)}."
        )


def _across(cells: Sequence[Measured], machines: Sequence[Machine]) -> Iterator[Across]:
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
                    ratio("", measured.values(RATE), first.values(RATE)),
                )


def _between_machines(
    across: Sequence[Across], machines: Sequence[Machine], not_said: list[tuple[str, str]]
) -> Iterator[str]:
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
            f"{second} has {_told(speed)} times the throughput of {own[0].first}, over {len(own)} configurations "
            "that both measured."
        )


TTFT_MEASURE = Measure("median time to first token", (MEDIAN_TTFT,), "lower")
TPOT_MEASURE = Measure("mean time per output token", (MEAN_TPOT,), "lower")


def _choices(focus: Focus, accept_suspect: str | None) -> Iterator[Choice]:
    """Choose for each model, at the prompt length of comparison, under each constraint.

    Limits of memory and time to first token are set so that half of the cells keep them.
    """
    names = labels(focus.cells)
    by_size = sorted(focus.cells, key=lambda m: m.variable("parameters") or 0.0)
    for model in dict.fromkeys(names[m.result.hashes.config] for m in by_size):
        own = [
            m.result
            for m in focus.cells
            if names[m.result.hashes.config] == model and m.variable("prompt_tokens") == focus.prompt
        ]
        given = candidates(own)
        if len(given) < LEAST_CHOICE:
            continue
        constraints: list[tuple[str, str, tuple[Limit, ...]]] = [
            ("the most tokens, whatever it takes", "throughput", ())
        ]
        for option, measure, goal in (
            ("memory", MEMORY, "throughput"),
            ("time to first token", TTFT_MEASURE, "throughput"),
        ):
            bound = _middle([value for one in given if (value := one.value(measure)) is not None])
            if bound:
                constraints.append((f"{option} ≤ {bound_text(measure, bound)}", goal, (Limit(option, measure, bound),)))
        gaps = [value for one in given if (value := one.value(TPOT_MEASURE)) is not None]
        if gaps:
            bound = _rounded_up(2 * min(gaps))
            constraints.append(
                (
                    f"many users, each with at least half the best speed: {bound:g} ms a token",
                    "throughput",
                    (Limit("time per token", TPOT_MEASURE, bound),),
                )
            )
        constraints.append(("one user, the soonest answer", "latency", ()))
        for words, goal, limits in constraints:
            yield Choice(model, words, choose(given, goal, limits, accept_suspect=accept_suspect))


def _middle(values: Sequence[float]) -> float | None:
    """Return the median, rounded up to two digits, as a bound; None if all values are the same."""
    return _rounded_up(median(values)) if values and min(values) < max(values) else None


def _rounded_up(value: float) -> float:
    step = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / step - 1e-9) * step:.6g}")
