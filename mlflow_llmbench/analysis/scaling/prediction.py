"""Predict figures of cells that were not measured: from measured cells, or from the nominal rates of a machine.

From measured cells of one machine there are two ways. A fitted law predicts a cell between its cells, which differ in
nothing but the law's variable. The roofline predicts any other cell: the time that a cell takes at least, from its
bytes, its FLOPs and the machine's measured rates, is fitted to the times of the measured cells, as a share of it or
with a fixed part. Of the curves for a figure the one with the least leave-one-out error is taken. A model that is not
among the measured ones is judged by leaving out whole models.

From nominal rates there is only the roofline itself, a bound: no time is shorter. If measured cells of another machine
are given too, times are that bound over the share of it that they reached.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from ...config.model_shape import Shape
from ...records.cell import Cell
from ...records.errors import NotFitted
from ...records.hardware import Hardware
from ...records.metric import GB
from ...records.metrics import PROMPT_TOKENS
from ...records.results import LoadInfo, RunResult
from ...stats import t_quantile_975
from .. import probe
from ..comparison import DEVICE_PEAK, HOST_PEAK, RATE, UNNAMED
from .cells import MEDIAN_TTFT, Measured
from .curves import Form, constant, line, power, share_of
from .fitting import Fit, fit, left_out_error
from .laws import LAWS, MODEL, SHAPE, Law, fit_law
from .roofline import roofline
from .study import MEAN_TPOT

THROUGHPUT, FIRST_TOKEN, PER_TOKEN, MEMORY = (
    "throughput",
    "time to first token",
    "time per output token",
    "peak memory",
)
UNITS = {THROUGHPUT: "tokens/s", FIRST_TOKEN: "ms", PER_TOKEN: "ms", MEMORY: "GB"}
"""Figures that are predicted, with their units."""

OF_METRIC = {
    RATE: THROUGHPUT,
    MEDIAN_TTFT: FIRST_TOKEN,
    MEAN_TPOT: PER_TOKEN,
    DEVICE_PEAK: MEMORY,
    HOST_PEAK: MEMORY,
}

STEP_LAWS = tuple(
    Law(f"step_by_{over}", f"time per output token against {words}", MEAN_TPOT, "ms", over, (over,),
        line("P = a + c·x", "a", "c"), (power("P = a·x^c", "a", "c"), constant("P = a", "a")), "c")
    for over, words in (("batch_size", "batch size"), ("prompt_tokens", "prompt length"))
)  # fmt: skip
"""Laws of the time per output token, which the paper has none of: a step reads weights once and each row's cache."""

FORMULA = "formula of weights, cache and activations"

Bytes = Callable[[Cell, RunResult], float | None]
"""Function that estimates the peak memory of a cell by formula; its model is that of the result."""


@dataclass(frozen=True)
class PredictedFigure:
    """A predicted figure, with the 95 % interval of one measurement if cells were measured.

    `by`: curve or formula · `cells`: number of measured cells behind it · `error`: leave-one-out error, a relative
    standard deviation · `beyond`: how far it lies outside the measured cells, "" inside · `bound`: the figure is a
    limit of the machine, which a measurement can only miss.
    """

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    by: str = ""
    cells: int = 0
    error: float | None = None
    beyond: str = ""
    bound: Literal["", "at least", "at most"] = ""

    @property
    def unit(self) -> str:
        """Unit of the value."""
        return UNITS[self.name]


@dataclass(frozen=True)
class AskedModel:
    """What a prediction needs to know of a model in one quantization: its costs, parameters and dtype.

    `memory`: estimated peak bytes of a cell by formula, None if unknown.
    """

    costs: LoadInfo | None
    parameters: float | None
    dtype: str
    memory: Callable[[Cell], float | None]


@dataclass(frozen=True)
class PredictedCell:
    """A cell with its predicted figures. `measured`: the machine has measured it, so nothing is predicted.

    `fits`: whether its estimated memory fits on the machine, None if that is not known · `largest_batch`: the largest
    batch size that fits by the formula · `notes`: why figures are missing.
    """

    cell: Cell
    figures: tuple[PredictedFigure, ...] = ()
    measured: bool = False
    fits: bool | None = None
    largest_batch: int | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prediction:
    """Predicted cells, and what they rest on.

    `machine`: name of the machine that measured, None without measured cells · `hardware`: the machine that is
    predicted, None if it is the one that measured · `count` measured cells of `sweeps`, of which `suspect`.
    """

    cells: tuple[PredictedCell, ...]
    machine: str | None
    hardware: Hardware | None
    sweeps: tuple[str, ...]
    count: int
    suspect: int


def costs_of(shape: Shape, quant: str, dtype: str, kv_value_bytes: float = 2) -> LoadInfo:
    """Return the costs of a model that was not loaded, by the formulas of its shape.

    Raises ValueError for a quantization without a formula.
    """
    costs = shape.cost_fields(kv_value_bytes)
    weights, step = shape.weight_bytes(quant, dtype), shape.step_bytes(quant, dtype)
    return LoadInfo(None, weight_bytes=weights, step_bytes=step, vocab_size=shape.vocab_size, **costs)


def predict_cell(cells: Sequence[Measured], asked: Cell, model: AskedModel, formula: Bytes) -> PredictedCell:
    """Predict a cell from measured cells of one machine with its settings, except for model, batch size and lengths."""
    like = [m for m in cells if _is_like(m, asked, model.dtype)]
    if any(_same(m.cell, asked, UNNAMED) for m in like):
        return PredictedCell(asked, measured=True)
    found: dict[str, list[PredictedFigure]] = {}
    for figure in (*_by_laws(like, asked, model.parameters), *_by_roofline(like, asked, model.costs)):
        found.setdefault(figure.name, []).append(figure)
    found.setdefault(MEMORY, []).extend(_by_formula(like, asked, model, formula))
    chosen = {name: min(ones, key=_merit) for name, ones in found.items() if ones}
    missing = [name for name in UNITS if name not in chosen and not (name == PER_TOKEN and asked.output_tokens < 2)]
    alike = f"{len(like)} measured cells have its quantization and settings"
    notes = [f"{', '.join(missing)}: {alike}; {NEEDED}"] if missing else []
    return PredictedCell(asked, tuple(chosen[name] for name in UNITS if name in chosen), notes=tuple(notes))


NEEDED = (
    "three of other batch sizes or prompt lengths around it are needed, or three with peak rates of the machine that "
    "were measured without doubt and with known costs of the model"
)


def _merit(figure: PredictedFigure) -> tuple[bool, float]:
    return bool(figure.beyond), math.inf if figure.error is None else figure.error


def _same(one: Cell, other: Cell, without: Sequence[str]) -> bool:
    fields = [f.name for f in dataclasses.fields(Cell) if f.name not in without]
    return all(getattr(one, name) == getattr(other, name) for name in fields)


def _is_like(measured: Measured, asked: Cell, dtype: str) -> bool:
    same_dtype = not (measured.dtype and dtype) or measured.dtype == dtype
    return same_dtype and _same(measured.cell, asked, (*UNNAMED, *MODEL, *SHAPE))


def _place(law: Law, asked: Cell, parameters: float | None) -> float | None:
    """Return a law's x of a cell that was not measured."""
    if law.over == "parameters":
        return parameters / 1e9 if parameters else None
    if asked.prompt_tokens is None:
        return float(asked.batch_size) if law.over == "batch_size" else None
    held = asked.batch_size * (asked.prompt_tokens + asked.output_tokens)
    return float(held if law.over == "held_tokens" else getattr(asked, law.over))


def _by_laws(like: Sequence[Measured], asked: Cell, parameters: float | None) -> Iterator[PredictedFigure]:
    """Yield a figure from each law whose cells lie on both sides of the asked one and differ in nothing else."""
    for law in (*LAWS, *STEP_LAWS):
        x = _place(law, asked, parameters)
        group = [m for m in like if _same(m.cell, asked, (*UNNAMED, *law.free_settings))]
        if x is None or not group:
            continue
        try:
            found = fit_law(law, "", group)
        except NotFitted:
            continue
        (low, high), name = found.best.ranges[0], OF_METRIC.get(found.metric)
        if name and low <= x <= high:
            yield _figure(name, found.best, x, found.best.loo_error, f"{found.best.form.formula}, {law.title}")


def _figure(
    name: str, found: Fit, x: float, error: float | None, by: str, invert: float | None = None
) -> PredictedFigure:
    """Return the figure of a curve at x, or `invert` ÷ the curve's value.

    The interval is that of one new measurement, or that of the leave-one-out error if that is larger.
    """
    (low, high), p = found.ranges[0], found.predict(x, beyond=True)
    t = t_quantile_975(len(found.y) - len(found.parameters))
    factor = math.exp(max(math.log(p.high / p.value), t * (error or 0.0)))
    value = p.value if invert is None else invert / p.value
    beyond = (
        "" if low <= x <= high else f"{x / high:.3g} times the largest" if x > high else f"{x / low:.3g} of the least"
    )
    return PredictedFigure(name, value, value / factor, value * factor, by, len(found.y), error, beyond)


@dataclass(frozen=True)
class _Work:
    """The roofline of a cell: least milliseconds of the prefill, of a step, and of the whole run."""

    prefill: float
    step: float
    run: float


def _work(costs: LoadInfo | None, peaks: Mapping[str, float], cell: Cell, prompt: float | None) -> _Work | None:
    if costs is None or not prompt:
        return None
    found = roofline(costs, peaks, cell.batch_size, prompt, cell.output_tokens)
    if found is None:
        return None
    prefill, step = found
    return _Work(1e3 * prefill, 1e3 * step, 1e3 * (prefill + (cell.output_tokens - 1) * step))


def rates_of(cells: Sequence[Measured]) -> dict[str, float]:
    """Return the median read bandwidth and FLOP/s that the probe measured before these cells; none that it doubts."""
    found = {}
    for rate in probe.AGREEMENT:
        values = [
            m.result.peaks[rate] for m in cells if m.result.peaks.get(rate) and not probe.doubt(m.result.peaks, rate)
        ]
        if values:
            found[rate] = median(values)
    return found


def _timed(cells: Sequence[Measured], peaks: Mapping[str, float]) -> Iterator[tuple[str, Measured, float, float]]:
    """Yield (figure, cell, least ms by the roofline, measured ms) of each time of each cell with known costs.

    The time of the throughput is that of the whole run: batch · output tokens ÷ throughput.
    """
    for m in cells:
        work = _work(m.result.load, peaks, m.cell, m.metrics.get(PROMPT_TOKENS.key()))
        if work is None:
            continue
        rate, tokens = m.metrics.get(RATE), m.cell.batch_size * m.cell.output_tokens
        times = (
            (THROUGHPUT, work.run, 1e3 * tokens / rate if rate else None),
            (FIRST_TOKEN, work.prefill, m.metrics.get(MEDIAN_TTFT)),
            (PER_TOKEN, work.step, m.metrics.get(MEAN_TPOT)),
        )
        yield from ((name, m, least, ms) for name, least, ms in times if ms)


SHARE = share_of("time = r/e, a share e of the roofline r", "1/e", lambda x: x)
WITH_FIXED_PART = line("time = a + c·r, r the roofline", "a", "c")
CURVES = (SHARE, WITH_FIXED_PART)


def _by_roofline(like: Sequence[Measured], asked: Cell, costs: LoadInfo | None) -> Iterator[PredictedFigure]:
    peaks = rates_of(like)
    work = _work(costs, peaks, asked, asked.prompt_tokens)
    if work is None:
        return
    points = list(_timed(like, peaks))
    places = {THROUGHPUT: work.run, FIRST_TOKEN: work.prefill, PER_TOKEN: work.step}
    for name, place in places.items():
        own = [(m.cell.model, least, ms) for figure, m, least, ms in points if figure == name]
        if name == PER_TOKEN and asked.output_tokens < 2:
            continue
        tokens = 1e3 * asked.batch_size * asked.output_tokens if name == THROUGHPUT else None
        yield from _best_curve(name, CURVES, own, place, asked.model, tokens)


def _best_curve(
    name: str,
    forms: Sequence[Form],
    own: Sequence[tuple[str, float, float]],
    place: float,
    model: str,
    invert: float | None = None,
) -> Iterator[PredictedFigure]:
    """Yield the figure of the curve with the least leave-one-out error, if one can be fitted.

    `own`: (model, x, y) of each cell. The error is over cells if the model is among them, else over models.
    """
    x, y = [(least,) for _, least, _ in own], [value for *_, value in own]
    models = [one for one, *_ in own]
    found: list[tuple[float, Fit]] = []
    for form in forms:
        try:
            curve = fit(form, x, y)
        except NotFitted:
            continue
        if curve.undetermined:
            continue
        error = curve.loo_error if model in models else left_out_error(form, x, y, models)
        found.append((math.inf if error is None else error, curve))
    if found:
        error, curve = min(found, key=lambda pair: pair[0])
        told = None if math.isinf(error) else error
        yield _figure(name, curve, place, told, curve.form.formula, invert)


def _by_formula(like: Sequence[Measured], asked: Cell, model: AskedModel, formula: Bytes) -> Iterator[PredictedFigure]:
    """Yield the memory by formula, corrected by what the formula misses of the measured peaks, else as it is."""
    estimate = model.memory(asked)
    if estimate is None:
        return
    key = DEVICE_PEAK if like and all(DEVICE_PEAK in m.metrics for m in like) else HOST_PEAK
    own = [
        (m.cell.model, size / GB, m.metrics[key])
        for m in like
        if m.metrics.get(key) and (size := formula(m.cell, m.result))
    ]
    forms = (
        share_of("memory = c·formula", "c", lambda x: x),
        line("memory = a + c·formula", "a", "c"),
    )
    found = list(_best_curve(MEMORY, forms, own, estimate / GB, asked.model))
    yield from found or [PredictedFigure(MEMORY, estimate / GB, by=f"{FORMULA}, unchecked here")]


def shares_of(cells: Sequence[Measured]) -> dict[str, Fit]:
    """Return, for each time, the share of the roofline that measured cells reached, fitted; none that cannot be."""
    points, found = list(_timed(cells, rates_of(cells))), {}
    for name in (THROUGHPUT, FIRST_TOKEN, PER_TOKEN):
        own = [((least,), ms) for figure, _, least, ms in points if figure == name]
        try:
            found[name] = fit(SHARE, [x for x, _ in own], [y for _, y in own])
        except NotFitted:
            continue
    return found


def predict_on(hardware: Hardware, asked: Cell, model: AskedModel, shares: Mapping[str, Fit]) -> PredictedCell:
    """Predict a cell on a machine given by nominal rates: bounds, or with `shares` times at the share of others."""
    peaks = {probe.READ: hardware.bandwidth, probe.FLOPS: hardware.flops}
    work = _work(model.costs, peaks, asked, asked.prompt_tokens)
    figures = []
    if work:
        tokens = 1e3 * asked.batch_size * asked.output_tokens
        places = [(THROUGHPUT, work.run), (FIRST_TOKEN, work.prefill), (PER_TOKEN, work.step)]
        for name, place in places if asked.output_tokens > 1 else places[:2]:
            invert = tokens if name == THROUGHPUT else None
            if share := shares.get(name):
                figure = _figure(name, share, place, share.loo_error, share.form.formula, invert)
                figures.append(dataclasses.replace(figure, beyond=""))
            else:
                value, bound = (place, "at least") if invert is None else (invert / place, "at most")
                figures.append(PredictedFigure(name, value, by="the roofline", bound=bound))  # type: ignore[arg-type]
    size = model.memory(asked)
    if size is not None:
        figures.append(PredictedFigure(MEMORY, size / GB, by=FORMULA))
    fits = None if size is None or hardware.memory is None else size <= hardware.memory
    notes = [] if work else ["times: the costs of the model are not known"]
    return PredictedCell(asked, tuple(figures), False, fits, _largest_batch(hardware, asked, model), tuple(notes))


def _largest_batch(hardware: Hardware, asked: Cell, model: AskedModel) -> int | None:
    """Return the largest batch size that fits: the estimate grows by the same bytes for each row. 0 if none fits."""
    one, two = (model.memory(dataclasses.replace(asked, batch_size=size)) for size in (1, 2))
    if one is None or two is None or hardware.memory is None or two <= one:
        return None
    return max(0, 1 + math.floor((hardware.memory - one) / (two - one)))
