"""Check the claims of the EffiLLM paper, and of Databricks' notes on LLM inference, against measurements."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from ...records.text import plural
from ..comparison import RATE
from . import memory_account
from .cells import Measured, grouped
from .claims import (
    CONFIRMED,
    NOT_CONFIRMED,
    UNSAID,
    Claim,
    around,
    by_majority,
    judge_range,
    pooled,
    range_text,
    rests_text,
)
from .effects import effect_ratio
from .fitting import Parameter
from .law_sentences import paper_range
from .laws import LawFit
from .memory_account import Reduction
from .study import ScalingStudy, quant_groups
from .tradeoffs import Ratio
from .trend_claims import trend_claims

BATCHES = (4, 16)
"""The paper's range of the best batch size per instance."""

GPTQ = "gptq"


@dataclass(frozen=True)
class QuantEffect:
    """A quantized cell against its reference, which differs only in quantization: throughput ratio and memory saved."""

    measured: Measured
    reference: Measured
    speed: Ratio
    memory: Reduction

    @property
    def quant(self) -> str:
        """The cell's quantization."""
        return self.measured.cell.quant

    @property
    def is_suspect(self) -> bool:
        """True if one of both cells is suspect."""
        return self.measured.is_suspect or self.reference.is_suspect

    @property
    def from_16_bits(self) -> bool:
        """True if the reference has 16-bit weights, as the paper's has."""
        return self.memory.theory == 1 - (memory_account.nominal_bits(self.quant) or 16) / 16


def quant_effects(cells: Sequence[Measured]) -> list[QuantEffect]:
    """Return the effect of every quantized cell that has a reference."""
    found = []
    for _, group in quant_groups(cells):
        by_quant = {measured.cell.quant: measured for measured in group}
        for saved in memory_account.reductions(group):
            measured, reference = by_quant[saved.quant], by_quant[saved.reference]
            speed = effect_ratio(saved.quant, measured, reference, RATE)
            found.append(QuantEffect(measured, reference, speed, saved))
    return found


def judge_claims(study: ScalingStudy, cells: Sequence[Measured]) -> list[Claim]:
    """Judge all claims of the paper, in its order, even if nothing was measured for them."""
    effects = [effect for effect in quant_effects(cells) if effect.from_16_bits]
    claims = [*_quantization_claims(effects), _between_claim(cells), _batch_claim(study)]
    claims += [*(_exponent_claim(study, *row) for row in EXPONENTS), *_memory_claims(study), *_form_claims(study)]
    return [_with_suspects(claim, study, effects, cells) for claim in [*claims, *trend_claims(study, cells)]]


LAWS_OF = {
    "best_batch": ("throughput_by_batch",),
    "batching_by_size": ("throughput_by_batch",),
    "batching_by_length": ("throughput_by_batch",),
    "length_by_size": ("throughput_by_length",),
    "length_over_batch": ("latency_by_length", "latency_by_batch"),
    "prompt_cost": ("latency_by_length",),
}
"""Claim → the laws whose cells it rests on. A claim that is called by a law's name rests on that one."""

QUANTS_OF = {"int8_speed": ("int8",), "int8_loss": ("int8",), "int4_speed": ("int4",)}
"""Claim → the quantizations whose cells it rests on, with their references."""

CELLS_OF = {"output_dominates": (), "bandwidth_bound": (), "consumer_cost": (), "ranks_by_length": (),
            "gptq_between": (GPTQ, "int8", "int4")}  # fmt: skip
"""Claim → the quantizations of the cells that it rests on; all with ()."""


def _with_suspects(
    claim: Claim, study: ScalingStudy, effects: Sequence[QuantEffect], cells: Sequence[Measured]
) -> Claim:
    """Return a claim with the numbers of cells that it rests on. One about memory rests on no time, and has none."""
    if claim.measured == "–":
        return claim
    laws = LAWS_OF.get(claim.key, (claim.key.removesuffix("_exponent").removesuffix("_form"),))
    found = [measured for law in study.laws if law.law.key in laws for measured in law.cells]
    for effect in effects:
        found += [effect.measured, effect.reference] if effect.quant in QUANTS_OF.get(claim.key, ()) else []
    if (quants := CELLS_OF.get(claim.key)) is not None:
        found += [measured for measured in cells if not quants or measured.cell.quant in quants]
    own = {id(measured): measured for measured in found}.values()
    return dataclasses.replace(claim, suspect=sum(measured.is_suspect for measured in own), cells=len(own))


def _quantization_claims(effects: Sequence[QuantEffect]) -> Iterator[Claim]:
    def speed(effect: QuantEffect) -> Ratio | None:
        return effect.speed

    def peak(effect: QuantEffect) -> Ratio | None:
        return None if effect.memory.peak is None else Ratio(effect.quant, 1 - effect.memory.peak, None, None)

    def weights(effect: QuantEffect) -> Ratio | None:
        return None if effect.memory.weights is None else Ratio(effect.quant, 1 - effect.memory.weights, None, None)

    rows: tuple[tuple[str, str, str, tuple[float, float], Callable[[QuantEffect], Ratio | None], str], ...] = (
        ("int8_memory", "int8", "INT8 takes half the memory", around(0.5), peak, "of the peak of 16 bits"),
        (
            "int8_weights",
            "int8",
            "INT8 takes half the memory: the weights alone",
            around(0.5),
            weights,
            "of the weights of 16 bits",
        ),
        (
            "int8_speed",
            "int8",
            "INT8 runs at 90–95 % of the speed",
            (0.90, 0.95),
            speed,
            "of the throughput of 16 bits",
        ),
        (
            "int8_loss",
            "int8",
            "INT8 loses 0–5 % of the speed (elsewhere in the paper)",
            (0.95, 1.0),
            speed,
            "of the throughput of 16 bits",
        ),
        ("int4_speed", "int4", "INT4 is 10–30 % slower", (0.70, 0.90), speed, "of the throughput of 16 bits"),
    )
    for key, quant, said, claimed, of, what in rows:
        found = [
            (effect.measured.cell.model, ratio) for effect in effects if effect.quant == quant and (ratio := of(effect))
        ]
        if not found:
            yield Claim(
                key,
                said,
                range_text(claimed),
                "–",
                UNSAID,
                f"No cell of {quant} was measured together with a 16-bit cell that differs only in quantization.",
            )
            continue
        estimate = pooled(found)
        inside = sum(claimed[0] <= ratio.value <= claimed[1] for _, ratio in found)
        lying = f"{inside} of {plural(len(found), 'cell')} lie in the range"
        parts = [lying, estimate.spread, rests_text(estimate)]
        why = f"{'; '.join(filter(None, parts))}."
        yield Claim(
            key, said, range_text(claimed), f"{estimate} {what}", judge_range(estimate.low, estimate.high, claimed), why
        )


def _between_claim(cells: Sequence[Measured]) -> Claim:
    """Judge whether GPTQ is slower than INT8 and faster than INT4, each by its interval."""
    against: dict[str, list[tuple[str, Ratio]]] = {"int8": [], "int4": []}
    for _, group in grouped(cells, ("quant", "group_size")):
        by_quant = {measured.cell.quant: measured for measured in group}
        if {GPTQ, *against} <= set(by_quant):
            for other, found in against.items():
                found.append(
                    (
                        group[0].cell.model,
                        effect_ratio(other, by_quant[GPTQ], by_quant[other], RATE),
                    )
                )
    said, claimed = "GPTQ lies between INT4 and INT8 in speed", "GPTQ ÷ INT8 below 1, GPTQ ÷ INT4 above 1"
    if not against["int8"]:
        return Claim(
            "gptq_between", said, claimed, "–", UNSAID, "No cell of gptq was measured beside both int8 and int4."
        )
    eight, four = pooled(against["int8"]), pooled(against["int4"])
    verdicts = judge_range(eight.low, eight.high, (0.0, 1.0)), judge_range(four.low, four.high, (1.0, math.inf))
    verdict = NOT_CONFIRMED if NOT_CONFIRMED in verdicts else UNSAID if UNSAID in verdicts else CONFIRMED
    return Claim(
        "gptq_between",
        said,
        claimed,
        f"{eight} of INT8, {four} of INT4",
        verdict,
        f"{rests_text(eight)[:1].upper()}{rests_text(eight)[1:]}.",
    )


def _batch_claim(study: ScalingStudy) -> Claim:
    """Judge the best batch size per instance, together with the sizes that are not measurably worse."""
    said, claimed = "The best batch size per instance is 4 to 16", "4 to 16"
    best = [
        {batch.optimal.per_instance, *batch.optimal.alike}
        for batch in study.batches
        if any(BATCHES[0] <= int(one.name) <= BATCHES[1] for one in batch.efficiency)
    ]
    if not best:
        why = f"It needs cells that differ only in batch size, and some of {claimed}."
        return Claim("best_batch", said, claimed, "–", UNSAID, why)
    inside = sum(all(BATCHES[0] <= size <= BATCHES[1] for size in sizes) for sizes in best)
    outside = sum(not any(BATCHES[0] <= size <= BATCHES[1] for size in sizes) for sizes in best)
    verdict = CONFIRMED if inside == len(best) else NOT_CONFIRMED if outside * 2 > len(best) else UNSAID
    sizes = sorted({batch.optimal.per_instance for batch in study.batches})
    why = (
        f"By Welch's test, the best sizes lie in the range in {inside} of {plural(len(best), 'group')} and outside "
        f"it in {outside}; otherwise sizes inside and outside are equally good."
    )
    return Claim("best_batch", said, claimed, f"best: {', '.join(map(str, sizes))}", verdict, why)


EXPONENTS = (
    ("throughput_by_size", "Throughput falls with model size as size^(−δ)", (0.4, 0.6)),
    ("throughput_by_length", "Throughput falls with prompt length as s^(−μ)", (0.2, 0.5)),
    ("latency_by_batch", "Time to first token grows with batch size as b^φ", (0.2, 0.5)),
    ("latency_by_length", "Time to first token grows with prompt length as s^ω", (0.5, 1.0)),
    ("e2e_by_size", "The whole latency grows more slowly than the model's size (Databricks)", (0.0, 1.0)),
)


def _exponent_claim(study: ScalingStudy, key: str, said: str, claimed: tuple[float, float]) -> Claim:
    laws = [law for law in study.laws if law.law.key == key]
    return _parameter_claim(f"{key}_exponent", said, laws, claimed)


def _memory_claims(study: ScalingStudy) -> Iterator[Claim]:
    """Judge the slope c of the memory law, GB per 10⁹ parameters, for each weight width."""
    laws = [law for law in study.laws if law.law.key == "memory_by_size"]
    for names, value in (("FP32", 4.0), ("FP16", 2.0), ("INT8", 1.0), ("INT4", 0.5)):
        own = [law for law in laws if _paper_bytes(law) == value]
        said = f"Memory grows by {value:g} GB per 10⁹ parameters at {names}"
        yield _parameter_claim(f"memory_per_parameter_{names.lower()}", said, own, around(value))


def _paper_bytes(law: LawFit) -> float | None:
    """Return the paper's c for a law's cells, GB per 10⁹ parameters; of an unquantized checkpoint by its dtype."""
    widths = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0}
    first, expected = law.cells[0], paper_range(law)
    return expected[0] if expected else widths.get(first.dtype) if first.cell.quant == "none" else None


def _parameter_claim(key: str, said: str, laws: Sequence[LawFit], claimed: tuple[float, float]) -> Claim:
    """Judge the main parameter of a law; the majority of the groups that it was fitted to decides."""
    if not laws:
        why = "The law could not be fitted: too few cells differ only in this."
        return Claim(key, said, range_text(claimed), "–", UNSAID, why)
    found = [law.fit.parameter(law.law.main) for law in laws]
    verdict, lie = by_majority([judge_range(one.low, one.high, claimed) for one in found], "group")
    refuted = sum(law.refuted for law in laws)
    parts = [lie]
    parts += [f"in {refuted} the cells deviate from the law by more than their repetitions scatter"] if refuted else []
    return Claim(key, said, range_text(claimed), _parameters(found), verdict, f"The interval lies {'; '.join(parts)}.")


def _parameters(found: Sequence[Parameter]) -> str:
    if len(found) == 1:
        return str(found[0])
    values = [one.value for one in found]
    return (
        f"{found[0].name} = {median(values):.3g} "
        f"(median of {len(values)} groups, {min(values):.3g} to {max(values):.3g})"
    )


def _form_claims(study: ScalingStudy) -> Iterator[Claim]:
    """Judge whether the paper's curve fits best among those tried."""
    for key, said in (
        ("throughput_by_batch", "Throughput follows a power of the batch size, α·b^β"),
        ("latency_by_size", "Time to first token is a line over model size"),
    ):
        laws = [law for law in study.laws if law.law.key == key]
        if not laws:
            yield Claim(
                f"{key}_form",
                said,
                "the nearest curve",
                "–",
                UNSAID,
                "The law could not be fitted: too few cells differ only in this.",
            )
            continue
        nearest, refuted = sum(law.best is law.fit for law in laws), sum(law.refuted for law in laws)
        others = sorted({law.best.form.formula for law in laws if law.best is not law.fit})
        verdict = (
            CONFIRMED if nearest == len(laws) and not refuted else NOT_CONFIRMED if nearest * 2 < len(laws) else UNSAID
        )
        shown = f"nearest in {nearest} of {plural(len(laws), 'group')}" + (
            f", else {', '.join(others)}" if others else ""
        )
        why = (
            f"In {refuted} of {plural(len(laws), 'group')} the cells deviate from it by more than their "
            "repetitions scatter."
        )
        yield Claim(f"{key}_form", said, "the nearest curve", shown, verdict, why)
