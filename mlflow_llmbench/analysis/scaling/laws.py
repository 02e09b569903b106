"""Fit the scaling laws of the EffiLLM paper to measured cells, each together with rival curves.

NB & NB, "EffiLLM: A Comprehensive Framework for Benchmarking and Optimizing Large Language Models in
Resource-Constrained Environments" (2024), gives the formulas and typical exponents, without intervals. Here a law is
fitted to cells that differ only in its variable, on one machine with one software; `fits` documents the method. A law
that cannot be fitted is reported by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING

from ...records.cell import Cell, differing
from ...records.errors import NotFitted
from ...records.metrics import PROMPT_TOKENS, TTFT
from ...records.results import LoadInfo, RunResult
from ...stats import coefficient_of_variation
from ..comparison import DEVICE_PEAK, HOST_PEAK, RATE, UNNAMED
from ..efficiency import attended
from ..repetitions import PER_REPETITION, unit_values
from ..summary import summarize
from ..verdict import judge
from .curves import (
    Fit,
    Form,
    Prediction,
    constant,
    fit,
    line,
    linear,
    offset_power,
    percent,
    power,
    ranked,
    rate_per_step,
    reciprocal,
    share_of,
    verdict,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

MEDIAN_TTFT = TTFT.key("p50")
MEMORY = "memory"
"""Placeholder for the peak memory metric: the device's if all cells of a law have it, else the host's needed memory."""

REFUTED = 0.05
"""Significance level: below it, a law's residuals exceed the scatter of repetitions, so it is only an approximation."""

MODEL = ("model", "revision", "weights", "trust_remote_code", "allow_pickle", "workload")
"""Settings that may differ between models: speed and memory depend on a model's shape and the number of tokens, but not
on whether weights are published or random, nor on what the prompts say (with random weights there is no text)."""

MOST_NAMED = 4
"""Most models that a heading names."""

SHAPE = ("batch_size", "prompt_tokens", "output_tokens")


@dataclass(frozen=True)
class Law:
    """A law of the paper: a metric over a variable, with formula, rivals and the paper's range of the main parameter.

    `freed`: settings in which the cells of one fit may differ · `scale`: factor from the metric to the shown `unit`.
    """

    key: str
    title: str
    metric: str
    unit: str
    over: str
    freed: tuple[str, ...]
    form: Form
    rivals: tuple[Form, ...]
    main: str  # name of the parameter that describes the scaling
    paper: tuple[float, float] | None = None
    scale: float = 1.0


LAWS = (
    Law("throughput_by_batch", "throughput against batch size", RATE, "tokens/s", "batch_size", ("batch_size",),
        power("T = α·b^β", "α", "β"),
        (rate_per_step("T = b/(a + c·b)", "a", "c"), constant("T = a", "a")),
        "β"),
    Law("throughput_by_size", "throughput against model size", RATE, "tokens/s", "parameters", MODEL,
        power("T = γ·size^(−δ)", "γ", "δ", falling=True),
        (reciprocal("T = 1/(a + c·size)", "a", "c"),),
        "δ", (0.4, 0.6)),
    Law("throughput_by_length", "throughput against prompt length", RATE, "tokens/s",
        "prompt_tokens", ("prompt_tokens",),
        power("T = λ·s^(−μ)", "λ", "μ", falling=True),
        (reciprocal("T = 1/(a + c·s)", "a", "c"), constant("T = a", "a")),
        "μ", (0.2, 0.5)),
    Law("latency_by_size", "time to first token against model size", MEDIAN_TTFT, "ms", "parameters", MODEL,
        line("L = α + β·size", "α", "β"),
        (power("L = a·size^c", "a", "c"),),
        "β"),
    Law("latency_by_batch", "time to first token against batch size", MEDIAN_TTFT, "ms", "batch_size", ("batch_size",),
        power("L = L₁·b^φ", "L₁", "φ"),
        (line("L = a + c·b", "a", "c"), constant("L = a", "a")),
        "φ", (0.2, 0.5)),
    Law("latency_by_length", "time to first token against prompt length", MEDIAN_TTFT, "ms",
        "prompt_tokens", ("prompt_tokens",),
        offset_power("L = κ + ν·s^ω", ("κ", "ν", "ω")),
        (line("L = a + c·s", "a", "c"), power("L = a·s^c", "a", "c"), constant("L = a", "a")),
        "ω", (0.5, 1.0)),
    Law("memory_by_size", "peak memory against model size", MEMORY, "GB", "parameters", MODEL,
        line("M = overhead + c·size", "overhead", "c"),
        (power("M = a·size^p", "a", "p"),),
        "c", scale=1e-9),
    Law("memory_by_tokens", "peak memory against tokens held", MEMORY, "GB", "held_tokens", SHAPE,
        line("M = fixed + k·b·(s + n)", "fixed", "k"),
        (power("M = a·(b·(s + n))^p", "a", "p"), constant("M = a", "a")),
        "k", scale=1e-9),
)  # fmt: skip
"""Sources, by section of the paper: Scaling Analysis (T = α·b^β(s)), Throughput Analysis (δ, μ), Latency Analysis
(φ, ω, α + β·size), Memory Usage Analysis (c = 4, 2, 1, 0.5 GB per 10⁹ parameters for 32, 16, 8, 4 bits). Memory against
tokens held is our own law: a fixed part such as the weights, and the KV cache, which grows with
batch · (prompt + output)."""

PAPER_BYTES = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1.0, "int4": 0.5, "fp4": 0.5, "gptq": 0.5}
"""The paper's c of the memory law by quantization, GB per 10⁹ parameters."""


@dataclass(frozen=True)
class Measured:
    """A usable result with its summary metrics."""

    result: RunResult
    metrics: Mapping[str, float]

    @property
    def cell(self) -> Cell:
        """The cell that was measured."""
        return self.result.cell

    @property
    def dtype(self) -> str:
        """The dtype of the loaded weights, by torch's name; empty if unknown."""
        return str(self.result.load.facts.get("model.dtype", "")) if self.result.load else ""

    def variable(self, name: str) -> float | None:
        """Return a law's x: a setting, `parameters` in 10⁹, or `held_tokens` = batch · (prompt + output).

        None if the number of parameters or of prompt tokens is unknown.
        """
        prompt = self.metrics.get(PROMPT_TOKENS.key())
        if name == "parameters":
            count = self.result.load.facts.get("model.parameters") if self.result.load else None
            return float(count) / 1e9 if count else None
        if name == "held_tokens":
            return None if prompt is None else self.cell.batch_size * (prompt + self.cell.output_tokens)
        return prompt if name == "prompt_tokens" else float(getattr(self.cell, name))

    def values(self, metric: str) -> list[float]:
        """Return the metric's values above 0, per repetition, or per process if there are several.

        Empty for a metric that a run has only once.
        """
        of = PER_REPETITION.get(metric)
        found = unit_values(self.result, of) if of else None
        return [value for value in found or [] if value > 0]


@dataclass(frozen=True)
class LawFit:
    """A law fitted to the cells of one group, with its rivals.

    `noise`: relative standard error of a cell from its repetitions (root mean square), None for a metric that a run has
    only once · `p_misfit`: p value of the hypothesis that the residuals are no larger than `noise`.
    """

    law: Law
    where: str
    cells: tuple[Measured, ...]
    metric: str
    fit: Fit
    rivals: tuple[Fit, ...]
    noise: float | None
    p_misfit: float | None

    @property
    def best(self) -> Fit:
        """The best fit among the law and its rivals."""
        return ranked([self.fit, *self.rivals])[0]

    @property
    def refuted(self) -> bool:
        """True if the cells deviate from the law by more than their repetitions scatter."""
        return self.p_misfit is not None and self.p_misfit < REFUTED

    def predict(self, x: float) -> Prediction:
        """Predict a cell that was not measured from the best-fitting curve. Raises OutOfRange beyond the cells."""
        return self.best.predict(x)


@dataclass(frozen=True)
class Surface:
    """Throughput over batch size and prompt length together: the exponent β of each length, and the joint laws."""

    where: str
    exponents: tuple[tuple[float, Fit], ...]  # prompt tokens, the fit at that length
    joint: tuple[Fit, ...]  # the paper's (one α for all lengths), one α per length, linear latency, roofline


def usable(results: Sequence[RunResult]) -> tuple[list[Measured], list[str]]:
    """Return the results with a valid or suspect verdict, and one line on each other result and why it is left out."""
    kept, left_out = [], []
    varied = varied_settings([result.cell for result in results])
    for result in results:
        metrics = summarize(result)
        verdict_ = judge(result, metrics)
        name = describe(result.cell, varied)
        if verdict_.word == "invalid":
            why = result.outcome if result.failure else ", ".join(reason.code for reason in verdict_.reasons)
            left_out.append(f"{name}: {why}")
        elif result.cell.batching:
            left_out.append(f"{name}: a stream of requests; the laws hold for batches of one shape")
        elif not result.repetitions:
            left_out.append(f"{name}: no repetitions")
        else:
            kept.append(Measured(result, metrics))
    return kept, left_out


def varied_settings(cells: Sequence[Cell]) -> list[str]:
    """Return the settings in which cells differ, without those that only control how long is measured."""
    return differing(cells, UNNAMED)


def describe(cell: Cell, names: Sequence[str]) -> str:
    """Name a cell by the given settings: `opt-125m int8 batch_size=4`. Without any, by model and quantization."""
    short = {"model": cell.model.rstrip("/").rsplit("/", 1)[-1], "quant": cell.quant}
    return " ".join(short[name] if name in short else f"{name}={getattr(cell, name)}" for name in names or short)


def models_text(cells: Sequence[Measured]) -> str:
    """List the names of the cells' models, at most `MOST_NAMED` of them."""
    names = list(dict.fromkeys(describe(measured.cell, ["model"]) for measured in cells))
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


def subject(cells: Sequence[Measured]) -> str:
    """Name the cells by their models, and by their quantization if all have the same."""
    quants = {measured.cell.quant for measured in cells}
    return " ".join([models_text(cells), *(quants if len(quants) == 1 else ())])


def grouped(cells: Sequence[Measured], freed: Sequence[str]) -> Iterator[tuple[str, list[Measured]]]:
    """Yield (name, cells) of groups that differ only in the freed settings, on one machine with one software.

    Groups are sorted by their settings and named by those that vary between them. Models share a group only if their
    weights have the same dtype, since `none` can mean a different one for each, and, if prompts are as long as their
    texts, only with the same workload.
    """
    fixed = [f.name for f in dataclasses.fields(Cell) if f.name not in (*UNNAMED, *freed)]
    told = [name for name in varied_settings([c.cell for c in cells]) if name not in freed]
    machines = {measured.result.hashes.env for measured in cells}
    across = "model" in freed
    dtypes = {measured.dtype for measured in cells} if across else {""}
    groups: dict[tuple[object, ...], list[Measured]] = {}
    for measured in cells:
        cell = measured.cell
        own = (cell.workload if across and cell.prompt_tokens is None else "", measured.dtype if across else "")
        key = (measured.result.hashes.env, *(getattr(cell, name) for name in fixed), *own)
        groups.setdefault(key, []).append(measured)
    for key in sorted(
        groups,
        key=lambda key: [
            (isinstance(v, str), v is None, v or 0) if not isinstance(v, str) else (True, False, v) for v in key
        ],
    ):
        first = groups[key][0]
        where = describe(
            first.cell,
            [name for name in told if name != "revision"] or [name for name in ("model", "quant") if name not in freed],
        )
        yield (
            where + (f" {key[-1]}" if len(dtypes) > 1 else "") + (f" on {key[0]}" if len(machines) > 1 else ""),
            groups[key],
        )


def fit_laws(cells: Sequence[Measured]) -> tuple[list[LawFit], list[str]]:
    """Fit every law to every group with two or more values of its variable; add one line for each fit that fails."""
    fitted: list[LawFit] = []
    refused: list[str] = []
    for law in LAWS:
        for where, group in grouped(cells, law.freed):
            if len({measured.variable(law.over) for measured in group}) < 2:
                continue
            try:
                fitted.append(fit_law(law, where, group))
            except NotFitted as error:
                refused.append(f"{law.title} ({where}): {error}")
    return fitted, refused


def fit_law(law: Law, where: str, group: Sequence[Measured]) -> LawFit:
    """Fit one law and its rivals to one group. Raises NotFitted for the law; a rival that fails is left out."""
    metric = (
        law.metric
        if law.metric != MEMORY
        else DEVICE_PEAK
        if all(DEVICE_PEAK in m.metrics for m in group)
        else HOST_PEAK
    )
    placed = [(place, m) for m in group if (place := m.variable(law.over)) is not None and metric in m.metrics]
    placed.sort(key=lambda pair: pair[0])
    x = [place for place, _ in placed]
    y = [m.metrics[metric] * law.scale for _, m in placed]
    found = fit(law.form, x, y)
    rivals = [*law.rivals, *_roofline_form(law, [m for _, m in placed])]
    others = []
    for form in rivals:
        try:
            others.append(fit(form, x, y))
        except NotFitted:
            continue
    noise, p_misfit = _misfit(found, [m.values(metric) for _, m in placed])
    return LawFit(law, where, tuple(m for _, m in placed), metric, found, tuple(others), noise, p_misfit)


def _misfit(found: Fit, values: Sequence[Sequence[float]]) -> tuple[float | None, float | None]:
    """Return the typical relative standard error of a cell, and the p value of the F test of lack of fit against it.

    F = residual variance ÷ mean squared standard error, with n − p and Σ(repetitions − 1) degrees of freedom (Draper &
    Smith, Applied Regression Analysis, 1998, 2.1). Repetitions in one process do not show differences between
    processes, so a rejection means only that the cells scatter more than their repetitions, for whatever reason.
    """
    if any(len(v) < 2 for v in values):
        return None, None
    from scipy import special  # type: ignore[import-untyped]

    squares = mean((coefficient_of_variation(v) or 0.0) ** 2 / len(v) for v in values)
    if squares == 0:
        return 0.0, None
    degrees = len(found.y) - len(found.parameters), sum(len(v) - 1 for v in values)
    return squares**0.5, float(special.fdtrc(*degrees, found.sigma**2 / squares))


def roofline(
    load: LoadInfo, peaks: Mapping[str, float], rows: float, prompt: float, output: float
) -> tuple[float, float] | None:
    """Return the least seconds of the prefill and of one decode step, from measured read bandwidth and FLOP/s.

    Each is the longer of reading (weights, and for a step the KV cache at the mean context) and computing (Williams,
    Waterman & Patterson, "Roofline", CACM 52, 2009). None if a peak or the model's bytes or FLOPs are unknown.
    """
    bandwidth, flops = peaks.get("read_bytes_per_s"), peaks.get("flops_per_s")
    if not (bandwidth and flops and load.step_bytes and load.flops_per_token):
        return None
    context, attention = prompt + output / 2, load.attention_flops_per_context_token or 0.0
    prefill_flops = rows * (prompt * (load.flops_per_token + attention * attended(load, prompt / 2)) + load.head_flops)
    step_flops = rows * (load.flops_per_token + load.head_flops + attention * attended(load, context))
    step_bytes = load.step_bytes + rows * (load.kv_bytes_per_token or 0) * attended(load, context)
    return max(load.step_bytes / bandwidth, prefill_flops / flops), max(step_bytes / bandwidth, step_flops / flops)


def _roofline_form(law: Law, group: Sequence[Measured]) -> Iterator[Form]:
    """Yield a constant share of the roofline, if only a model's shape is varied and the machine's peaks are known."""
    if law.over not in ("batch_size", "prompt_tokens") or law.metric not in (RATE, MEDIAN_TTFT) or not group:
        return
    limit = _limit(law.metric, law.over, group[0])
    if limit is not None:
        name = "share of roofline"
        yield share_of(f"{'T' if law.metric == RATE else 'L'} = e·roofline", name, limit)


def _limit(metric: str, over: str, first: Measured) -> Callable[[Array], Array] | None:
    """Return the roofline's rate (tokens/s) or TTFT (ms) as a function of batch size, prompt length, or pairs of both.

    None without the model's load record or the machine's peaks.
    """
    import numpy as np

    load, peaks, cell = first.result.load, first.result.peaks, first.cell
    prompt = first.metrics.get(PROMPT_TOKENS.key(), 0.0)
    if load is None or roofline(load, peaks, cell.batch_size, prompt, cell.output_tokens) is None:
        return None

    def limit(x: Array) -> Array:
        found = []
        for place in np.asarray(x, dtype=np.float64).reshape(len(x), -1):
            rows = float(place[0]) if over in ("batch_size", "both") else float(cell.batch_size)
            length = float(place[-1]) if over in ("prompt_tokens", "both") else prompt
            prefill, step = roofline(load, peaks, rows, length, cell.output_tokens) or (np.nan, np.nan)
            found.append(
                prefill * 1e3
                if metric == MEDIAN_TTFT
                else rows * cell.output_tokens / (prefill + (cell.output_tokens - 1) * step)
            )
        return np.array(found)

    return limit


def fit_surfaces(cells: Sequence[Measured], fitted: Sequence[LawFit]) -> tuple[list[Surface], list[str]]:
    """Fit T(b, s) ≈ α·b^β(s) where the batch size was varied at two or more prompt lengths.

    The paper has one α for all lengths, so that length would not matter at b = 1. The rivals are an α per length,
    linear latency T = b/(a + c·b + d·b·s), and a share of the roofline. Also returns one line for each fit that fails.
    """
    surfaces: list[Surface] = []
    refused: list[str] = []
    for where, group in grouped(cells, ("batch_size", "prompt_tokens")):
        ids = {id(measured) for measured in group}
        lengths = [
            (f.cells[0].variable("prompt_tokens") or 0.0, f.fit)
            for f in fitted
            if f.law.key == "throughput_by_batch" and id(f.cells[0]) in ids
        ]
        if len(lengths) < 2:
            continue
        known = {length for length, _ in lengths}
        placed = [m for m in group if m.variable("prompt_tokens") in known]
        x = [(float(m.cell.batch_size), m.variable("prompt_tokens") or 0.0) for m in placed]
        joint = []
        for form in _joint_forms(sorted(known), placed[0]):
            try:
                joint.append(fit(form, x, [m.metrics[RATE] for m in placed]))
            except NotFitted as error:
                refused.append(f"throughput against batch size and prompt length ({where}): {error}")
        surfaces.append(Surface(where, tuple(sorted(lengths, key=lambda pair: pair[0])), tuple(joint)))
    return surfaces, refused


def _joint_forms(lengths: Sequence[float], first: Measured) -> Iterator[Form]:
    """Yield the paper's surface, the same with one α per length, linear latency, and a share of the roofline."""
    import numpy as np

    columns = np.array(lengths)

    def form(formula: str, shared: bool) -> Form:
        count = 1 if shared else len(lengths)
        names = ("α",) if shared else tuple(f"α({length:g})" for length in lengths)

        def basis(x: Array) -> Array:
            at = (x[:, 1:2] == columns).astype(np.float64)
            return np.column_stack([np.ones(len(x)) if shared else at, at * np.log(x[:, :1])])

        def logs(p: Array) -> Array:
            return np.concatenate([np.log(np.maximum(p[:count], 1e-300)), p[count:]])

        def value(p: Array, x: Array) -> Array:
            return np.asarray(np.where((p[:count] > 0).all(), np.exp(basis(x) @ logs(p)), np.nan))

        def gradient(p: Array, x: Array) -> Array:
            return np.asarray(value(p, x)[:, None] * basis(x) / np.concatenate([p[:count], np.ones(len(lengths))]))

        def starts(x: Array, y: Array) -> list[Array]:
            found = np.linalg.lstsq(basis(x), np.log(y), rcond=None)[0]
            return [np.concatenate([np.exp(found[:count]), found[count:]])]

        return Form(
            "joint power", formula, (*names, *(f"β({length:g})" for length in lengths)), value, gradient, starts
        )

    def latency(x: Array) -> Array:
        return np.column_stack([np.ones(len(x)), x[:, 0], x[:, 0] * x[:, 1]])

    yield form("T = α·b^β(s)", shared=True)
    yield form("T = α(s)·b^β(s)", shared=False)
    yield linear("T = b/(a + c·b + d·b·s)", ("a", "c", "d"), latency, lambda x: x[:, 0])
    limit = _limit(RATE, "both", first)
    if limit is not None:
        yield share_of("T = e·roofline", "share of roofline", limit)


def untried(found: LawFit) -> list[Prediction]:
    """Predict unmeasured powers of two between a law's cells. Empty unless it is over batch size or prompt length."""
    if found.law.over not in ("batch_size", "prompt_tokens"):
        return []
    (low, high), tried = found.fit.ranges[0], {place[0] for place in found.fit.x}
    return [found.predict(float(x)) for x in (2**k for k in range(21)) if low < x < high and x not in tried]


def main_sentence(found: LawFit) -> str:
    """Describe a fitted law: group, parameters with intervals, range, the paper's range, and which curve fits best."""
    parts = [
        f"{found.law.title[:1].upper()}{found.law.title[1:]} ({found.where}): "
        f"{found.fit.form.formula} with {parameters_text(found.fit)}"
    ]
    low, high = found.fit.ranges[0]
    parts = [f"{parts[0]}, from {len(found.cells)} cells with {found.law.over.replace('_', ' ')} {low:g} to {high:g}."]
    return " ".join(
        filter(None, [*parts, _against_paper(found), verdict(found.fit, found.rivals), _misfit_sentence(found)])
    )


def parameters_text(found: Fit) -> str:
    """List all parameters with their intervals: `α = 201 (130 to 310), β = 0.62 (0.55 to 0.69)`."""
    return ", ".join(map(str, found.parameters))


def describe_fit(found: Fit) -> str:
    """Describe a curve with its parameters' values, without intervals: `T = b/(a + c·b), a = 0.02, c = 0.001`."""
    return ", ".join([found.form.formula, *(f"{p.name} = {p.value:.3g}" for p in found.parameters)])


def paper_range(found: LawFit) -> tuple[float, float] | None:
    """Return the paper's range of a law's main parameter, for the memory law the quantization's bytes per parameter."""
    if found.law.key == "memory_by_size":
        bytes_ = PAPER_BYTES.get(found.cells[0].cell.quant)
        return None if bytes_ is None else (bytes_, bytes_)
    return found.law.paper


def _against_paper(found: LawFit) -> str:
    """Say whether the interval of the main parameter overlaps the paper's range."""
    expected, main = paper_range(found), found.fit.parameter(found.law.main)
    if found.law.key == "memory_by_tokens":
        return _against_cache(found)
    if expected is None:
        return ""
    said = f"{expected[0]:g}" if expected[0] == expected[1] else f"{expected[0]:g} to {expected[1]:g}"
    if not main.determined:
        return f"The paper's {main.name} of {said} can be neither confirmed nor refuted with these cells."
    meets = (main.low or 0.0) <= expected[1] and (main.high or 0.0) >= expected[0]
    return f"The paper's {main.name} of {said} is {'compatible with this' if meets else 'not compatible with this'}."


def _against_cache(found: LawFit) -> str:
    """Compare the slope of memory with the KV cache's bytes per token."""
    load, slope = found.cells[0].result.load, found.fit.parameter("k")
    if load is None or not load.kv_bytes_per_token or slope.low is None or slope.high is None:
        return ""
    value, low, high = (number / found.law.scale for number in (slope.value, slope.low, slope.high))
    return (
        f"That is {value:,.0f} bytes for each token held ({low:,.0f} to {high:,.0f}); "
        f"the KV cache takes {load.kv_bytes_per_token:,}."
    )


def _misfit_sentence(found: LawFit) -> str:
    """Warn if the residuals are larger than the scatter of the repetitions explains."""
    if not found.refuted or not found.noise:
        return ""
    worst = max(range(len(found.cells)), key=lambda i: abs(found.fit.residuals[i]))
    times = found.fit.sigma / found.noise
    return (
        f"It is an approximation: the cells deviate from it by typically {percent(found.fit.sigma)}, {times:.0f} times "
        f"what their repetitions explain, most at {found.fit.x[worst][0]:g}."
    )


def surface_sentence(surface: Surface) -> str:
    """Say how β depends on the prompt length, and which joint law fits best."""
    betas = ", ".join(f"{_exponent(found)} at {length:g}" for length, found in surface.exponents)
    law, *rivals = surface.joint or (None,)
    return (
        f"Exponent β of the batch size by prompt length ({surface.where}): {betas}. "
        f"{verdict(law, rivals) if law else ''}"
    ).strip()


def _exponent(found: Fit) -> str:
    return str(found.parameter("β")).removeprefix("β = ")
