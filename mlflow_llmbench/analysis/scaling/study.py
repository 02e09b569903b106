"""Scaling study of a set of measured cells: laws, trade-offs, memory, and a line for each thing that is missing."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from ...records.calibration import Calibration
from ...records.errors import LlmbenchError, UsageError
from ...records.metrics import TPOT
from ...records.results import RunResult
from ..comparison import RATE
from . import memory_account, tradeoffs
from .cells import MEDIAN_TTFT, Measured, grouped, select_usable, subject
from .effects import effect_ratio
from .fitting import Prediction
from .laws import LawFit, fit_laws, interpolate
from .memory_account import Growth, MemoryBreakdown, Reduction
from .surfaces import Surface, fit_surfaces
from .tradeoffs import Cliff, OptimalBatch, Ratio, TokenCost

T = TypeVar("T")

MEAN_TPOT = TPOT.key("mean")

STEEPEST = {"batch_size": 1.0, "prompt_tokens": 2.0}
"""Largest elasticity of latency without a cliff: rows could be run one by one; attention is quadratic in length."""

WATCHED = {MEDIAN_TTFT: "time to first token", MEAN_TPOT: "time per output token"}


@dataclass(frozen=True)
class GroupFinding:
    """A finding about one group of cells; `where` names the group."""

    where: str


@dataclass(frozen=True)
class BatchScaling(GroupFinding):
    """Scaling efficiency η_b of each batch size and the best sizes, for cells that differ only in batch size."""

    efficiency: tuple[Ratio, ...]
    optimal: OptimalBatch


@dataclass(frozen=True)
class QuantEfficiency(GroupFinding):
    """T_q / T_ref and the memory saved, for cells that differ only in quantization."""

    reference: str
    efficiency: tuple[Ratio, ...]
    memory: tuple[Reduction, ...]


@dataclass(frozen=True)
class CliffSearch(GroupFinding):
    """The cliffs of one series: its metric, the varied setting, its values, and the cells' configuration hashes.

    `suspect`: value of the setting → codes of the reasons for which its cell is suspect.
    """

    metric: str
    over: str
    places: tuple[float, ...]
    cliffs: tuple[Cliff, ...]
    config_hashes: tuple[str, ...] = ()
    suspect: Mapping[float, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenCostAt(GroupFinding):
    """Cost of prompt tokens in output tokens, at one shape."""

    exchange: TokenCost


@dataclass(frozen=True)
class Footprint(GroupFinding):
    """Peak memory of a cell in parts, and its growth."""

    account: MemoryBreakdown | None
    growth: Growth | None


@dataclass(frozen=True)
class ScalingStudy:
    """All findings, and one line for each computation that failed (`refused`) and each cell not used (`left_out`).

    `measured`: the cells that they are of.
    """

    cells: int
    subject: str
    laws: tuple[LawFit, ...]
    surfaces: tuple[Surface, ...] = ()
    batches: tuple[BatchScaling, ...] = ()
    quants: tuple[QuantEfficiency, ...] = ()
    cliffs: tuple[CliffSearch, ...] = ()
    exchanges: tuple[TokenCostAt, ...] = ()
    footprints: tuple[Footprint, ...] = ()
    predictions: tuple[tuple[LawFit, Prediction], ...] = ()
    refused: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    measured: tuple[Measured, ...] = ()


@dataclass
class Failures:
    """Collects one line for each computation that fails."""

    refused: list[str] = field(default_factory=list)

    def try_compute(self, what: str, compute: Callable[[], T]) -> T | None:
        """Return the computed value, or None after noting the reason of a LlmbenchError."""
        try:
            return compute()
        except LlmbenchError as error:
            self.refused.append(f"{what}: {error}")
            return None


def study_scaling(
    results: Sequence[RunResult],
    share: float = tradeoffs.KEPT_SHARE,
    at: Sequence[tuple[str, float]] = (),
    calibrations: Sequence[Calibration] = (),
) -> ScalingStudy:
    """Fit and compute everything that the results allow.

    `share`: share of the best per-instance throughput that a batch must keep. `at`: (setting, value) pairs to predict,
    in addition to the powers of two between the cells. `calibrations`: as in `compare`. Raises UsageError if no result
    can be used, if the share is outside 0 to 1, or if no law over a setting was fitted; OutOfRange for a value outside
    the range of a law over its setting.
    """
    check_share(share)
    cells, left_out = select_usable(results, calibrations)
    if not cells:
        raise UsageError(
            f"None of the {len(results)} results can be used: {'; '.join(left_out[:3])}. Measure them again."
        )
    failures = Failures()
    laws, refused = fit_laws(cells)
    surfaces, more = fit_surfaces(cells, laws)
    failures.refused += refused + more
    return ScalingStudy(
        len(cells),
        subject(cells),
        tuple(laws),
        tuple(surfaces),
        tuple(_batches(cells, share, failures)),
        tuple(_quants(cells)),
        tuple(_cliffs(cells, failures)),
        tuple(_token_costs(laws, failures)),
        tuple(_footprints(cells)),
        tuple(_predictions(laws, at)),
        tuple(failures.refused),
        tuple(left_out),
        tuple(cells),
    )


def check_share(share: float) -> None:
    """Raise UsageError unless 0 < share ≤ 1, for the share of the best per-instance throughput."""
    if not 0 < share <= 1:
        raise UsageError(
            f"The share of per-instance throughput to keep is not between 0 and 1: {share:g}. Give 0.5 for a half."
        )


def _batches(cells: Sequence[Measured], share: float, failures: Failures) -> Iterator[BatchScaling]:
    for where, group in grouped(cells, ("batch_size",)):
        rates: dict[int, list[float]] = {}
        for measured in group:
            rates.setdefault(measured.cell.batch_size, []).extend(measured.values(RATE))
        if len(rates) < 2:
            continue
        efficiency = failures.try_compute(
            f"scaling efficiency ({where})", functools.partial(tradeoffs.scaling_efficiency, rates)
        )
        yield BatchScaling(where, tuple(efficiency or ()), tradeoffs.optimal_batch(rates, share))


QUANT_SETTINGS = ("int8_threshold", "double_quant", "group_size", "quant_budget", "quant_plan")
"""Settings of some quantizations. They have no effect on cells that are not quantized, whatever their value there."""


def quant_groups(cells: Sequence[Measured]) -> Iterator[tuple[str, list[Measured]]]:
    """Yield groups of cells that differ only in quantization, one group for each choice of the quantization's settings.

    A group without an unquantized cell begins with one that was measured with other settings, if there is any. No pair
    of cells is in two groups.
    """

    def chosen(measured: Measured) -> tuple[object, ...]:
        return tuple(getattr(measured.cell, name) for name in QUANT_SETTINGS)

    choices = list(dict.fromkeys(map(chosen, cells)))
    varied = [i for i in range(len(QUANT_SETTINGS)) if len({choice[i] for choice in choices}) > 1]
    for choice in choices:
        settings = ", ".join(f"{QUANT_SETTINGS[i]}={'none' if choice[i] is None else choice[i]}" for i in varied)
        own = [
            measured
            for measured in cells
            if chosen(measured) == choice or measured.cell.quant in memory_account.REFERENCES
        ]
        for where, group in grouped(own, ("quant", *QUANT_SETTINGS)):
            of_choice = [measured for measured in group if chosen(measured) == choice]
            others = [m for m in group if m.cell.quant in memory_account.REFERENCES and chosen(m) != choice]
            own_reference = any(m.cell.quant in memory_account.REFERENCES for m in of_choice)
            beside = (
                [] if own_reference else sorted(others, key=lambda m: memory_account.REFERENCES.index(m.cell.quant))[:1]
            )
            yield f"{where} ({settings})" if settings else where, [*beside, *of_choice]


def _quants(cells: Sequence[Measured]) -> Iterator[QuantEfficiency]:
    for where, group in quant_groups(cells):
        memory = memory_account.reductions(group)
        if not memory:
            continue
        by_quant = {measured.cell.quant: measured for measured in group}
        reference = memory[0].reference
        ratios = [effect_ratio(r.quant, by_quant[r.quant], by_quant[reference], RATE) for r in memory]
        yield QuantEfficiency(where, reference, tuple(ratios), tuple(memory))


def _cliffs(cells: Sequence[Measured], failures: Failures) -> Iterator[CliffSearch]:
    for over, steepest in STEEPEST.items():
        for where, group in grouped(cells, (over,)):
            for metric, what in WATCHED.items():
                series: dict[float, list[float]] = {}
                for measured in group:
                    place, values = measured.variable(over), measured.values(metric)
                    if place and values:
                        series.setdefault(place, []).extend(values)
                if len(series) < 2:
                    continue
                found = failures.try_compute(
                    f"cliffs of {what} ({where})",
                    functools.partial(tradeoffs.find_cliffs, series, steepest),
                )
                if found is not None:
                    yield CliffSearch(
                        where,
                        metric,
                        over,
                        tuple(sorted(series)),
                        tuple(found),
                        tuple(m.result.hashes.config for m in group),
                        {
                            place: tuple(reason.code for reason in m.verdict.reasons)
                            for m in group
                            if m.is_suspect and (place := m.variable(over))
                        },
                    )


def _token_costs(laws: Sequence[LawFit], failures: Failures) -> Iterator[TokenCostAt]:
    """Compare prompt and output tokens for each group of prompt lengths.

    The line among the rivals gives the cost of a prompt token, the middle cell that of an output token. The comparison
    is for 512 more prompt tokens, or for the span of the measured lengths if that is smaller: `preset=quick` spans 448.
    """
    for law in laws:
        prefill = next((rival for rival in law.rivals if rival.form.formula == "L = a + c·s"), None)
        tpots = law.cells[len(law.cells) // 2].values(MEAN_TPOT)
        if law.law.key != "latency_by_length" or prefill is None or not tpots:
            continue
        low, high = prefill.ranges[0]
        more = min(tradeoffs.EXTRA_PROMPT_TOKENS, int(high - low))
        price = partial(tradeoffs.token_cost, prefill, tpots, more)
        found = failures.try_compute(f"{more} prompt tokens against 8 output tokens ({law.where})", price)
        if found:
            yield TokenCostAt(law.where, found)


def _footprints(cells: Sequence[Measured]) -> Iterator[Footprint]:
    for where, group in grouped(cells, ()):
        measured = group[-1]
        parts, grown = memory_account.account(measured), memory_account.growth(measured.result)
        if parts or grown:
            yield Footprint(where, parts, grown)


def _predictions(laws: Sequence[LawFit], at: Sequence[tuple[str, float]]) -> Iterator[tuple[LawFit, Prediction]]:
    for law in laws:
        yield from ((law, predicted) for predicted in interpolate(law))
        measured = {place[0] for place in law.fit.x}
        yield from ((law, law.predict(value)) for name, value in at if name == law.law.over and value not in measured)
    for name, value in at:
        if not any(law.law.over == name for law in laws):
            raise UsageError(
                f"No law over {name} was fitted, so {name}={value:g} cannot be predicted. "
                f"Measure three or more values of {name}."
            )
