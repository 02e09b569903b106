"""Fit the scaling laws of the EffiLLM paper to measured cells, each together with rival curves.

NB & NB, "EffiLLM: A Comprehensive Framework for Benchmarking and Optimizing Large Language Models in
Resource-Constrained Environments" (2024), gives the formulas and typical exponents, without intervals. Here a law is
fitted to cells that differ only in its variable, on one machine with one software; `fitting` documents the method. A
law that cannot be fitted is reported by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from ...records.errors import NotFitted
from ...records.metrics import E2E
from ...stats import coefficient_of_variation
from ..comparison import DEVICE_PEAK, HOST_PEAK, RATE
from .cells import MEDIAN_TTFT, Measured, grouped
from .curves import Form, constant, line, offset_power, power, rate_per_step, reciprocal
from .fitting import Fit, Prediction, fit
from .ranking import ranked
from .roofline import roofline_form

MEMORY = "memory"
"""Placeholder for the peak memory metric: the device's if all cells of a law have it, else the host's needed memory."""

REFUTED = 0.05
"""Significance level: below it, a law's residuals exceed the scatter of repetitions, so it is only an approximation."""

MODEL = ("model", "revision", "weights", "trust_remote_code", "allow_pickle", "workload")
"""Settings that may differ between models: speed and memory depend on a model's shape and the number of tokens, but not
on whether weights are published or random, nor on what the prompts say (with random weights there is no text)."""

SHAPE = ("batch_size", "prompt_tokens", "output_tokens")


@dataclass(frozen=True)
class Law:
    """A law of the paper: a metric over a variable, with formula, rivals and the paper's range of the main parameter.

    `free_settings`: settings in which the cells of one fit may differ.
    """

    key: str
    title: str
    metric: str
    unit: str
    over: str
    free_settings: tuple[str, ...]
    form: Form
    rivals: tuple[Form, ...]
    main: str  # name of the parameter that describes the scaling
    paper: tuple[float, float] | None = None


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
    Law("e2e_by_size", "end-to-end latency against model size", E2E.key("p50"), "ms", "parameters", MODEL,
        power("L = a·size^p", "a", "p"),
        (line("L = α + β·size", "α", "β"),),
        "p", (0.0, 1.0)),
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
        "c"),
    Law("memory_by_tokens", "peak memory against tokens held", MEMORY, "GB", "held_tokens", SHAPE,
        line("M = fixed + k·b·(s + n)", "fixed", "k"),
        (power("M = a·(b·(s + n))^p", "a", "p"), constant("M = a", "a")),
        "k"),
)  # fmt: skip
"""Sources, by section of the paper: Scaling Analysis (T = α·b^β(s)), Throughput Analysis (δ, μ), Latency Analysis
(φ, ω, α + β·size), Memory Usage Analysis (c = 4, 2, 1, 0.5 GB per 10⁹ parameters for 32, 16, 8, 4 bits). Memory against
tokens held is our own law: a fixed part such as the weights, and the KV cache, which grows with
batch · (prompt + output)."""


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


def fit_laws(cells: Sequence[Measured]) -> tuple[list[LawFit], list[str]]:
    """Fit every law to every group with two or more values of its variable; add one line for each fit that fails."""
    fitted: list[LawFit] = []
    refused: list[str] = []
    for law in LAWS:
        for where, group in grouped(cells, law.free_settings):
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
    y = [m.metrics[metric] for _, m in placed]
    found = fit(law.form, x, y)
    rivals = [*law.rivals, *roofline_form(law.metric, law.over, [m for _, m in placed])]
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


def interpolate(found: LawFit) -> list[Prediction]:
    """Predict unmeasured powers of two between a law's cells. Empty unless it is over batch size or prompt length."""
    if found.law.over not in ("batch_size", "prompt_tokens"):
        return []
    (low, high), tried = found.fit.ranges[0], {place[0] for place in found.fit.x}
    return [found.predict(float(x)) for x in (2**k for k in range(21)) if low < x < high and x not in tried]
