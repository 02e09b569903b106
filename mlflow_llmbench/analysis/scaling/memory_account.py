"""Memory of a cell: the parts of the peak, growth over a generation, and savings by quantization."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from ...config.model_shape import VALUE_BYTES
from ...records.backends import recorded_capabilities
from ...records.cell import Cell
from ...records.metrics import PROMPT_TOKENS, WEIGHTS
from ...records.quantizations import SCHEMES
from ...records.results import LoadInfo, MemorySample, RunResult
from ...stats import Trend, trend
from ..comparison import DEVICE_PEAK, HOST_PEAK
from ..efficiency import attended
from .cells import Measured

MOST_POINTS = 150
"""Most samples that a trend is computed from; more are thinned to medians of neighbours."""

REFERENCES = ("none", "bf16", "fp16", "fp32")
"""References for quantized cells: the first of these that was measured beside them is used."""


@dataclass(frozen=True)
class MemoryBreakdown:
    """Peak memory of a cell in parts, bytes. They add up to `peak` exactly, so a part may be below 0.

    `baseline`: libraries, before the load · `weights`: parameters as stored · `load_rest`: the rest after the load
    (quantization buffers, allocator, the device's context) · `cache`: KV cache of batch · (P + N − 1) tokens ·
    `run_rest`: the rest of generating (activations, logits, copies of the cache while it grows).
    """

    where: str  # "device" or "host"
    peak: int
    baseline: int
    weights: int
    load_rest: int
    cache: int
    run_rest: int

    @property
    def unexplained(self) -> int:
        """Bytes of the peak that are not baseline, weights or KV cache."""
        return self.load_rest + self.run_rest


@dataclass(frozen=True)
class Growth:
    """Growth of memory during the last generation, in bytes per output token of the whole batch.

    `seen`: measured growth · `expected`: growth of the KV cache · `between`: growth of the median level from one
    repetition to the next, in bytes per repetition.
    """

    where: str
    samples: int
    seen: Trend | None
    expected: float
    between: Trend | None

    @property
    def leak(self) -> Trend | None:
        """Growth during a generation beyond the KV cache, bytes per output token, with its interval."""
        return (
            Trend(self.seen.slope - self.expected, self.seen.low - self.expected, self.seen.high - self.expected)
            if self.seen
            else None
        )

    @property
    def grows(self) -> bool:
        """True if memory grows from one repetition to the next: the 95 % interval lies above 0."""
        return self.between is not None and self.between.low > 0


@dataclass(frozen=True)
class Reduction:
    """Memory saved by a quantization against a reference, as shares of 1 (below 0 if it takes more).

    `theory`: 1 − bits_q/bits_ref · `weights`: of the weights · `peak`: of the peak.
    """

    quant: str
    reference: str
    theory: float | None
    weights: float | None
    peak: float | None


def cache_bytes(load: LoadInfo, rows: int, tokens: float) -> int | None:
    """Bytes of a batch's KV cache after `tokens` tokens: rows · tokens held · bytes per token, sliding windows counted.

    None if the bytes per token are unknown.
    """
    return round(rows * attended(load, tokens) * load.kv_bytes_per_token) if load.kv_bytes_per_token else None


def account(measured: Measured) -> MemoryBreakdown | None:
    """Split the peak into parts; None if a stage, the weights or the size of the KV cache is unknown."""
    result, metrics = measured.result, measured.metrics
    where = "device" if DEVICE_PEAK in metrics else "host"
    stages = result.memory.device if where == "device" else result.memory.host_needed
    prompt = metrics.get(PROMPT_TOKENS.key())
    if (
        result.load is None
        or result.load.weight_bytes is None
        or prompt is None
        or not {"baseline", "loaded", "peak"} <= set(stages)
    ):
        return None
    cache = cache_bytes(result.load, result.cell.batch_size, prompt + result.cell.output_tokens - 1)
    if cache is None:
        return None
    load_rest = stages["loaded"] - stages["baseline"] - result.load.weight_bytes
    run_rest = stages["peak"] - stages["loaded"] - cache
    return MemoryBreakdown(
        where, stages["peak"], stages["baseline"], result.load.weight_bytes, load_rest, cache, run_rest
    )


def growth(result: RunResult) -> Growth | None:
    """Check a cell's memory timeline for leaks; None without samples in the repetitions or a known KV cache size."""
    if result.load is None or not result.load.kv_bytes_per_token or not result.repetitions:
        return None
    where = "device" if any(s.device is not None for s in result.timeline) else "host"
    spans = [
        (min(r.t0_ns for r in rep.requests), max(r.stamps_ns[-1] for r in rep.requests)) for rep in result.repetitions
    ]
    inside = [[(s.t_ns, _bytes(s, where)) for s in result.timeline if start <= s.t_ns <= end] for start, end in spans]
    if not any(inside):
        return None
    stamps = result.repetitions[-1].requests[-1].stamps_ns
    last = [(float(bisect.bisect_right(stamps, t)), value) for t, value in inside[-1] if t >= stamps[0]]
    x, y = _thinned(last)
    levels = [median(value for _, value in part) for part in inside if part]
    rows = 0 if _holds_whole_cache(result.cell) else result.repetitions[-1].requests[-1].rows
    expected = float(rows * result.load.kv_bytes_per_token)
    return Growth(where, len(last), trend(x, y), expected, trend([float(i) for i in range(len(levels))], levels))


def _holds_whole_cache(cell: Cell) -> bool:
    """Return True if the KV cache has its full size before the first token, so that it does not grow."""
    return cell.decode in recorded_capabilities(cell.backend).preallocates


def _bytes(sample: MemorySample, where: str) -> float:
    return float((sample.device or 0) if where == "device" else sample.anonymous)


def _thinned(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Thin points to at most `MOST_POINTS`, by medians of neighbours. Returns x and y."""
    stride = -(-len(points) // MOST_POINTS) or 1
    parts = [points[i : i + stride] for i in range(0, len(points), stride)]
    return [median(x for x, _ in part) for part in parts], [median(y for _, y in part) for part in parts]


def reductions(group: Sequence[Measured]) -> list[Reduction]:
    """Compare each quantization with the reference, among cells that differ only in quantization.

    Empty without a reference or without another quantization.
    """
    by_quant = {measured.cell.quant: measured for measured in group}
    reference = next((by_quant[quant] for quant in REFERENCES if quant in by_quant), None)
    if reference is None:
        return []
    return [_reduction(measured, reference) for measured in by_quant.values() if measured is not reference]


def _reduction(measured: Measured, reference: Measured) -> Reduction:
    def share(key: str) -> float | None:
        after, before = measured.metrics.get(key), reference.metrics.get(key)
        return 1 - after / before if after is not None and before else None

    bits, before = _bits(measured), _bits(reference)
    on_device = DEVICE_PEAK in measured.metrics and DEVICE_PEAK in reference.metrics
    peak = DEVICE_PEAK if on_device else HOST_PEAK
    theory = 1 - bits / before if bits and before else None
    return Reduction(measured.cell.quant, reference.cell.quant, theory, share(WEIGHTS.key()), share(peak))


def _bits(measured: Measured) -> float | None:
    """Nominal bits of a weight: by quantization, for `none` by the loaded dtype, for a mixed one the plan's mean."""
    plan = measured.result.load.quant_plan if measured.result.load else None
    if plan is not None:
        return plan.nominal_bits
    dtype = measured.result.load.facts.get("model.dtype") if measured.result.load else None
    return nominal_bits(measured.cell.quant) or 8 * VALUE_BYTES.get(str(dtype), 0) or None


def nominal_bits(quant: str) -> int | None:
    """Bits of a weight by quantization, without scales; None if it does not decide them."""
    return SCHEMES[quant].bits if quant in SCHEMES else None
