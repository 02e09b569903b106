"""Fitted laws in sentences: parameters with intervals, the paper's range, the best curve, and the misfit."""

from __future__ import annotations

from ...records.metric import GB
from .fitting import Fit
from .laws import LawFit
from .ranking import percent, verdict

PAPER_BYTES = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1.0, "int4": 0.5, "fp4": 0.5, "gptq": 0.5}
"""The paper's c of the memory law by quantization, GB per 10⁹ parameters."""


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
    value, low, high = (number * GB for number in (slope.value, slope.low, slope.high))
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
