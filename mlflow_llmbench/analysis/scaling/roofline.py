"""The roofline as a curve: the least time of prefill and decode steps that a machine's peaks allow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from ...records.metrics import PROMPT_TOKENS
from ...records.results import LoadInfo
from .. import probe
from ..comparison import RATE
from ..efficiency import attended
from .cells import MEDIAN_TTFT, Measured
from .curves import Form, share_of

if TYPE_CHECKING:
    from .curves import Array


def roofline(
    load: LoadInfo, peaks: Mapping[str, float], rows: float, prompt: float, output: float
) -> tuple[float, float] | None:
    """Return the least seconds of the prefill and of one decode step, from measured read bandwidth and FLOP/s.

    Each is the longer of reading (weights, and for a step the KV cache at the mean context) and computing (Williams,
    Waterman & Patterson, "Roofline", CACM 52, 2009), on all devices together. None if a peak or the model's bytes or
    FLOPs are unknown.
    """
    bandwidth, flops = peaks.get("read_bytes_per_s"), peaks.get("flops_per_s")
    if not (bandwidth and flops and load.step_bytes and load.flops_per_token):
        return None
    bandwidth, flops = bandwidth * (load.devices or 1), flops * (load.devices or 1)
    context, attention = prompt + output / 2, load.attention_flops_per_context_token or 0.0
    prefill_flops = rows * (prompt * (load.flops_per_token + attention * attended(load, prompt / 2)) + load.head_flops)
    step_flops = rows * (load.flops_per_token + load.head_flops + attention * attended(load, context))
    step_bytes = load.step_bytes + rows * (load.kv_bytes_per_token or 0) * attended(load, context)
    return max(load.step_bytes / bandwidth, prefill_flops / flops), max(step_bytes / bandwidth, step_flops / flops)


def roofline_form(metric: str, over: str, group: Sequence[Measured]) -> Iterator[Form]:
    """Yield a constant share of the roofline, if only a model's shape is varied and the machine's peaks are known."""
    if over not in ("batch_size", "prompt_tokens") or metric not in (RATE, MEDIAN_TTFT) or not group:
        return
    limit = roofline_limit(metric, over, group[0])
    if limit is not None:
        yield share_of(f"{'T' if metric == RATE else 'L'} = e·roofline", "share of roofline", limit)


def roofline_limit(metric: str, over: str, first: Measured) -> Callable[[Array], Array] | None:
    """Return the roofline's rate (tokens/s) or TTFT (ms) as a function of batch size, prompt length, or pairs of both.

    None without the model's load record or the machine's peaks.
    """
    import numpy as np

    load, peaks, cell = first.result.load, first.result.peaks, first.cell
    prompt = first.metrics.get(PROMPT_TOKENS.key(), 0.0)
    if any(probe.doubt(peaks, rate) for rate in probe.AGREEMENT):
        return None
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
