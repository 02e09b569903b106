"""Check claims that compare laws or figures with each other, and those of Databricks' notes on LLM inference.

Each pair of groups of cells differs in one thing, such as the model's size. The difference of two fitted parameters has
the interval of MOVER (Zou & Donner, Statistics in Medicine 27, 2008), which combines the intervals of both.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence

from ...records.cell import Cell
from ...records.metrics import E2E, MBU, TTFT, peak_memory
from ...records.quantizations import FLOAT_DTYPES
from ..comparison import RATE, UNNAMED
from ..summary import hardware_name
from .cells import MEDIAN_TTFT, Measured, grouped
from .claims import UNSAID, Claim, by_majority, judge_range, pooled, rests_text
from .effects import effect_ratio
from .fitting import Parameter
from .laws import MODEL, LawFit
from .study import ScalingStudy
from .tradeoffs import Ratio

Triple = tuple[float, float, float]
"""A value with the ends of its 95 % interval."""

CONSUMER = re.compile(r"\b(GeForce|RTX [2-5]0\d\d|Radeon RX|Ryzen|Core\b|Apple M\d)", re.IGNORECASE)
DATA_CENTRE = re.compile(r"\b(A100|A10G?|A30|A40|H100|H200|B200|L4|L40S?|T4|V100|MI\d{3}X?|EPYC|Xeon)\b", re.IGNORECASE)
"""Words in names of hardware by which it counts as one or the other; of others nothing is claimed."""

NEAR = 0.10
"""Relative tolerance of "near"."""

EXTRA_TOKENS = (512, 8)
"""Databricks: so many more prompt tokens cost less than so many more output tokens."""


def trend_claims(study: ScalingStudy, cells: Sequence[Measured]) -> list[Claim]:
    """Judge these claims, even if nothing was measured for them."""
    by_batch, by_length = _laws(study, "throughput_by_batch"), _laws(study, "throughput_by_length")
    positive, negative = (0.0, math.inf), (-math.inf, 0.0)
    return [
        _differences(
            "batching_by_size", "Larger models gain more from batching", "β of the largest − β of the smallest above 0",
            _ends(by_batch, MODEL, lambda m: m.variable("parameters")), positive,
            "cells of two models at several batch sizes",
        ),
        _differences(
            "length_by_size", "The throughput of larger models falls more with the prompt length",
            "μ of the largest − μ of the smallest above 0",
            _ends(by_length, MODEL, lambda m: m.variable("parameters")), positive,
            "cells of two models at several prompt lengths",
        ),
        _differences(
            "batching_by_length", "The gain of batching shrinks with the prompt length",
            "β of the longest − β of the shortest below 0",
            _ends(by_batch, ("prompt_tokens",), lambda m: m.variable("prompt_tokens")), negative,
            "cells at several batch sizes and two prompt lengths",
        ),
        _differences(
            "length_over_batch", "Time to first token grows more with length than with batch size", "ω − φ above 0",
            _omega_and_phi(study), positive, "cells at three prompt lengths and two batch sizes of one model",
        ),
        _gptq_memory(cells),
        _decode_share(cells),
        _prompt_against_output(study),
        _bandwidth(cells),
        _ranks_by_length(cells),
        Claim(
            "continuous_batching", "Continuous batching brings 10 to 20 times the throughput (Databricks)", "10 to 20",
            "–", UNSAID,
            "A study uses batches of one shape. Compare llmbench run --batching static,continuous --request-rate 2.",
        ),
        _consumer_cost(cells),
    ]  # fmt: skip


def _laws(study: ScalingStudy, key: str) -> list[LawFit]:
    return [law for law in study.laws if law.law.key == key]


def _settings(cell: Cell, without: Sequence[str]) -> tuple[object, ...]:
    """Return the settings that two groups of cells have in common."""
    fields = [f.name for f in dataclasses.fields(Cell) if f.name not in (*UNNAMED, *without)]
    return tuple(getattr(cell, name) for name in fields)


def _ends(laws: Sequence[LawFit], varied: Sequence[str], of: Callable[[Measured], float | None]) -> list[Triple]:
    """Return the main parameter at the highest value of `of` − that at the lowest, for groups alike otherwise."""
    alike: dict[tuple[object, ...], list[tuple[float, Parameter]]] = {}
    for law in laws:
        first = law.cells[0]
        value = of(first)
        if value is not None:
            key = (first.result.hashes.env, *_settings(first.cell, (*varied, *law.law.free_settings)))
            alike.setdefault(key, []).append((value, law.fit.parameter(law.law.main)))
    pairs = [(max(group, key=lambda pair: pair[0]), min(group, key=lambda pair: pair[0])) for group in alike.values()]
    found = [_difference(high[1], low[1]) for high, low in pairs if high[0] > low[0]]
    return [one for one in found if one]


def _omega_and_phi(study: ScalingStudy) -> list[Triple]:
    """Return ω − φ of each model and quantization, at the smallest batch size and the shortest prompt."""
    shape = ("batch_size", "prompt_tokens")

    def first(key: str, name: str) -> dict[tuple[object, ...], Parameter]:
        laws = sorted(_laws(study, key), key=lambda law: law.cells[0].variable(name) or 0.0, reverse=True)
        return {
            (law.cells[0].result.hashes.env, *_settings(law.cells[0].cell, shape)): law.fit.parameter(law.law.main)
            for law in laws
        }

    omegas, phis = first("latency_by_length", "batch_size"), first("latency_by_batch", "prompt_tokens")
    found = [_difference(omega, phis[key]) for key, omega in omegas.items() if key in phis]
    return [one for one in found if one]


def _difference(a: Parameter, b: Parameter) -> Triple | None:
    """Return a − b with its interval (MOVER), None if an end of either is not determined."""
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return None
    value = a.value - b.value
    below = math.hypot(a.value - a.low, b.high - b.value)
    above = math.hypot(a.high - a.value, b.value - b.low)
    return value, value - below, value + above


def _differences(
    key: str, said: str, claimed: str, found: Sequence[Triple], bounds: tuple[float, float], needs: str
) -> Claim:
    """Judge differences of several pairs; the majority of the pairs decides."""
    if not found:
        return Claim(key, said, claimed, "–", UNSAID, f"It needs {needs}.")
    return _majority(key, said, claimed, found, bounds, "pair")


def _majority(
    key: str, said: str, claimed: str, found: Sequence[Triple], bounds: tuple[float, float], noun: str
) -> Claim:
    verdict, lie = by_majority([judge_range(low, high, bounds) for _, low, high in found], noun)
    values = sorted(value for value, _, _ in found)
    shown = f"{values[0]:.3g}" if len(values) == 1 else f"{values[0]:.3g} to {values[-1]:.3g}"
    return Claim(key, said, claimed, shown, verdict, f"The interval lies {lie}.")


def _pool(
    key: str, said: str, claimed: str, found: Sequence[tuple[str, Ratio]], bounds: tuple[float, float], needs: str
) -> Claim:
    """Judge one figure of many cells by its mean over models, or groups of cells."""
    if not found:
        return Claim(key, said, claimed, "–", UNSAID, f"It needs {needs}.")
    estimate = pooled(found)
    parts = [part for part in (estimate.spread, rests_text(estimate)) if part]
    why = "; ".join(parts)
    verdict = judge_range(estimate.low, estimate.high, bounds)
    return Claim(key, said, claimed, str(estimate), verdict, f"{why[:1].upper()}{why[1:]}.")


def _gptq_memory(cells: Sequence[Measured]) -> Claim:
    found = []
    for _, group in grouped(cells, ("quant", "group_size")):
        by_quant = {measured.cell.quant: peak_memory(measured.metrics) for measured in group}
        gptq, int4 = by_quant.get("gptq"), by_quant.get("int4")
        if gptq and int4:
            found.append((group[0].cell.model, Ratio("gptq", gptq / int4, None, None)))
    said, claimed = "GPTQ takes about the memory of INT4", f"GPTQ ÷ INT4 within {1 - NEAR:g} to {1 + NEAR:g}"
    return _pool("gptq_memory", said, claimed, found, (1 - NEAR, 1 + NEAR), "cells of gptq and int4 that are alike")


def _consumer_cost(cells: Sequence[Measured]) -> Claim:
    """Judge the cost per token on the cheapest consumer hardware ÷ that on the cheapest of a data centre.

    For each configuration that both have measured, at the price per hour of each result.
    """
    alike: dict[tuple[str, str], dict[str, list[Measured]]] = {}
    for m in cells:
        name, hashes = hardware_name(m.result), m.result.hashes
        kind = "consumer" if CONSUMER.search(name) else "data centre" if DATA_CENTRE.search(name) else ""
        if kind and m.result.price_per_hour and m.metrics.get(RATE):
            alike.setdefault((hashes.config, hashes.workload), {}).setdefault(kind, []).append(m)
    found = []
    for kinds in alike.values():
        if len(kinds) == 2:
            own, other = (min(kinds[kind], key=_cost) for kind in ("consumer", "data centre"))
            speed = effect_ratio("", other, own, RATE)
            scale = (own.result.price_per_hour or 0.0) / (other.result.price_per_hour or 1.0)
            low, high = (None if end is None else end * scale for end in (speed.low, speed.high))
            found.append((own.cell.model, Ratio("", speed.value * scale, low, high)))
    return _pool(
        "consumer_cost", "Consumer hardware is the cheapest per token", "cost ÷ that of a data centre's below 1",
        found, (0.0, 1.0), "configurations that both kinds of hardware have measured, each with its price",
    )  # fmt: skip


def _cost(measured: Measured) -> float:
    return (measured.result.price_per_hour or 0.0) / measured.metrics[RATE]


def _decode_share(cells: Sequence[Measured]) -> Claim:
    found = []
    for measured in cells:
        first, whole = measured.metrics.get(TTFT.key("mean")), measured.metrics.get(E2E.key("mean"))
        if first and whole and whole > first:
            found.append((measured.cell.model, Ratio("", 1 - first / whole, None, None)))
    return _pool(
        "output_dominates", "The output length dominates the latency (Databricks)",
        "share of the time after the first token, 0.5 to 1", found, (0.5, 1.0), "cells with several output tokens",
    )  # fmt: skip


def _prompt_against_output(study: ScalingStudy) -> Claim:
    prompt, output = EXTRA_TOKENS
    scaled = [(one.exchange.equal_output, prompt / one.exchange.prompt_tokens) for one in study.exchanges]
    found = [(value * factor, low * factor, high * factor) for (value, low, high), factor in scaled]
    said = f"{prompt} more prompt tokens cost less than {output} more output tokens (Databricks)"
    claimed = f"as much as 0 to {output} output tokens"
    if not found:
        return Claim("prompt_cost", said, claimed, "–", UNSAID, "It needs cells that differ in prompt length alone.")
    return _majority("prompt_cost", said, claimed, found, (0.0, float(output)), "group")


def _bandwidth(cells: Sequence[Measured]) -> Claim:
    plain = [m for m in cells if m.cell.batch_size == 1 and (m.cell.quant == "none" or m.cell.quant in FLOAT_DTYPES)]
    found = [(m.cell.model, Ratio("", value, None, None)) for m in plain if (value := m.metrics.get(MBU.key()))]
    return _pool(
        "bandwidth_bound", "Memory bandwidth decides the speed of decoding at batch size 1 (Databricks)",
        "half of the measured bandwidth or more: 0.5 to 1", found, (0.5, 1.0),
        "unquantized cells at batch size 1 whose weights are larger than the caches",
    )  # fmt: skip


def _ranks_by_length(cells: Sequence[Measured]) -> Claim:
    """Judge how many times as soon the first token comes with most ranks, at the longest prompt ÷ at the shortest."""
    found = []
    for _, group in grouped(cells, ("tensor_parallel", "prompt_tokens")):
        gains = sorted(_gains_of_ranks(group))
        if len(gains) > 1:
            found.append((group[0].cell.model, _ratio_of(gains[-1][1], gains[0][1])))
    return _pool(
        "ranks_by_length", "Tensor parallelism brings the first token sooner as prompts lengthen (Databricks)",
        "gain at the longest prompt ÷ that at the shortest above 1", found, (1.0, math.inf),
        "cells with one and with several ranks (tensor_parallel=1,2) at two prompt lengths",
    )  # fmt: skip


def _gains_of_ranks(group: Sequence[Measured]) -> Iterator[tuple[int, Ratio]]:
    """Yield each prompt length that one rank and several have measured, with T(1) ÷ T(p) of the time to first token.

    p is the largest number of ranks that every such length has.
    """
    lengths: dict[int, dict[int, Measured]] = {}
    for measured in group:
        if measured.cell.prompt_tokens is not None:
            lengths.setdefault(measured.cell.prompt_tokens, {})[measured.cell.tensor_parallel] = measured
    both = {length: ranks for length, ranks in lengths.items() if 1 in ranks and len(ranks) > 1}
    common = set.intersection(*map(set, both.values())) if both else set()
    for length, ranks in both.items() if max(common, default=1) > 1 else ():
        yield length, effect_ratio("", ranks[1], ranks[max(common)], MEDIAN_TTFT)


def _ratio_of(a: Ratio, b: Ratio) -> Ratio:
    """Return a ÷ b of independent ratios: the half-widths of their logarithms are added in squares."""
    value = a.value / b.value
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return Ratio("", value, None, None)
    below = math.hypot(math.log(a.value / a.low), math.log(b.high / b.value))
    above = math.hypot(math.log(a.high / a.value), math.log(b.value / b.low))
    return Ratio("", value, value * math.exp(-below), value * math.exp(above))
