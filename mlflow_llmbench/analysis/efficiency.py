"""Hardware efficiency of a result: bandwidth and FLOP/s utilization, memory and energy per token. Pure."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean

from ..records.cell import SPECULATIVE
from ..records.metric import GB
from ..records.metrics import BANDWIDTH, ENERGY, MBU, MFU, RATE_PER_GB, TOKENS_PER_STEP
from ..records.results import LoadInfo, RunResult
from ..records.text import finite
from . import probe
from .figures import Figures, mean_of
from .latency import chunk_gaps_ms, e2e_ms, tpot_ms
from .layout import gpu_count, moved
from .repetitions import output_rate, requests, several_in_a_step, unit_values

CACHE_FACTOR = 4
"""MBU is absent if the weights are under this many times the last-level cache, which would serve part of the reads."""


def rate_per_gb(result: RunResult) -> float | None:
    """Output tokens per second ÷ GB (10⁹ bytes) of peak memory: the device's if known, else needed host memory."""
    rates = unit_values(result, output_rate)
    peak = result.memory.device.get("peak") or result.memory.host_needed.get("peak")
    return fmean(rates) / (peak / GB) if rates and peak else None


def tokens_per_step(result: RunResult) -> float | None:
    """Output tokens per row ÷ steps (prefill and checks of proposed tokens) if steps can bring several; else None."""
    every = [r for r in requests(result) if r.chunk_tokens is not None]
    return sum(r.output_tokens for r in every) / sum(len(r.stamps_ns) for r in every) if every else None


def mean_step_ms(result: RunResult) -> float | None:
    """Mean time of a decode step: the time per output token, or the gap between steps that bring several tokens.

    None without any.
    """
    every = requests(result)
    return mean_of(
        [gap for r in every for gap in chunk_gaps_ms(r)]
        if several_in_a_step(result)
        else [value for r in every if (value := tpot_ms(r))]
    )


def mean_context(result: RunResult) -> float:
    """Mean number of tokens in the KV cache over the decode steps: P + N/2 for steps 2 … N."""
    lengths = [r.prompt_tokens or 0 for r in requests(result)]
    return fmean(lengths) + result.cell.output_tokens / 2


def attended(load: LoadInfo, context: float) -> float:
    """Mean number of context tokens that a layer attends to; a layer with a sliding window sees at most that window."""
    if load.sliding_window is None:
        return context
    return (1 - load.sliding_share) * context + load.sliding_share * min(context, load.sliding_window)


def measured_bandwidth(result: RunResult) -> float | None:
    """Read bandwidth measured before the load, GB/s; None if it was not measured."""
    measured = finite(result.peaks.get(probe.READ))
    return measured / GB if measured else None


def bandwidth(result: RunResult) -> float | None:
    """Read bandwidth that MBU is relative to, GB/s: the nominal one if given, else the measured one."""
    return measured_bandwidth(result) if result.nominal_bandwidth is None else result.nominal_bandwidth


def device_count(result: RunResult) -> int:
    """Number of devices that run the model at once: GPUs; the processes of ranks on a CPU share one.

    GPUs over which whole layers are laid out compute one after another, so they count as one.
    """
    return (result.load.devices if result.load else None) or 1


def read_share(result: RunResult) -> float | None:
    """(weight bytes read per step + batch · KV bytes at the mean context) ÷ mean TPOT ÷ bandwidth, even if above 1.

    Of several devices, the bytes that all of them read are divided by the bandwidth of all.

    After "LLM inference performance engineering" (Databricks 2023). If a step brings several tokens, its time replaces
    TPOT. None without a bandwidth, with fewer than two tokens, if the weights are under 4× the last-level cache, which
    would serve part of the reads, with a second model, whose reads are not known, or for a stream of requests.
    """
    if result.cell.scenario != "offline":
        return None
    load, rate, step_ms = result.load, bandwidth(result), mean_step_ms(result)
    if load is None or not load.step_bytes or not rate or not step_ms or result.cell.assistant:
        return None
    devices = device_count(result)
    if load.step_bytes < CACHE_FACTOR * (load.cache_bytes or 0) * devices:
        return None
    read = load.step_bytes + result.cell.batch_size * (load.kv_bytes_per_token or 0) * attended(
        load, mean_context(result)
    )
    return read / (step_ms / 1e3) / (rate * 1e9 * devices)


def model_bandwidth_utilization(result: RunResult) -> float | None:
    """MBU: `read_share`; None if the bandwidth is one that `utilization_doubt` doubts."""
    return None if utilization_doubt(result) else read_share(result)


def utilization_doubt(result: RunResult) -> str | None:
    """Return why MBU is withheld although it could be computed, as a sentence; None if it is not."""
    found = read_share(result)
    if found is not None and (away := moved(result)):
        return f"MBU is left out, because each step brings weights from elsewhere, at another bandwidth: {away}."
    if found is None or result.nominal_bandwidth is not None:
        return None
    if why := probe.doubt(result.peaks):
        return (
            f"MBU is left out, because the bandwidth of {bandwidth(result):.3g} GB/s is doubtful: {why}. Measure again "
            "on a quiet machine, or give nominal_bandwidth."
        )
    if found > 1:
        return (
            f"The decode would have read {found:.2f} times the bandwidth of {bandwidth(result):.3g} GB/s that was "
            "measured here (limit 1), so MBU is left out: the probe measured too little, or tokens were not all "
            "computed. Give nominal_bandwidth, or measure again on a quiet machine."
        )
    return None


def joules_per_token(result: RunResult) -> float | None:
    """Energy above idle ÷ output tokens, J: Σ (energy − idle power · time) ÷ Σ tokens.

    None unless every repetition has a reading and the sum is above 0. None for several devices: the counter is that of
    the first one.
    """
    if device_count(result) > 1 or gpu_count(result) > 1:
        return None
    noises = [r.noise for r in result.repetitions]
    if result.idle_w is None or not all(n and n.energy_j is not None for n in noises):
        return None
    above = sum((n.energy_j or 0.0) - result.idle_w * n.wall_s for n in noises if n)
    tokens = sum(r.rows * r.output_tokens for r in requests(result))
    return above / tokens if tokens and above > 0 else None


def model_flops_utilization(result: RunResult) -> float | None:
    """MFU: FLOPs of prefill and decode ÷ their time ÷ best FLOP/s measured (PaLM, Chowdhery et al. 2022, appendix B).

    None if proposed tokens are checked, because the cost of rejected ones is not known, or if the peak is doubtful.
    """
    load, peak = result.load, None if probe.doubt(result.peaks, probe.FLOPS) else finite(result.peaks.get(probe.FLOPS))
    if load is None or not load.flops_per_token or not peak or result.cell.decode in SPECULATIVE:
        return None
    attention = load.attention_flops_per_context_token or 0.0
    done = seconds = 0.0
    for request in requests(result):
        prompt, output = request.prompt_tokens or 0, request.output_tokens
        last, held = prompt + output - 1, request.cached_tokens or 0
        # Token i attends to i tokens; the head is computed for the output tokens only, not for the prompt.
        body = (last - held) * (load.flops_per_token + attention * attended(load, (last + held) / 2))
        done += request.rows * (body + output * load.head_flops)
        seconds += e2e_ms(request) / 1e3
    return done / seconds / (peak * device_count(result)) if seconds else None


EFFICIENCY: dict[str, dict[str, Callable[[RunResult], float | None]]] = {
    "offline": {
        RATE_PER_GB.key(): rate_per_gb,
        MBU.key(): model_bandwidth_utilization,
        BANDWIDTH.key(): measured_bandwidth,
        MFU.key(): model_flops_utilization,
        ENERGY.key(): joules_per_token,
        TOKENS_PER_STEP.key("mean"): tokens_per_step,
    },
    "online": {RATE_PER_GB.key(): rate_per_gb},
    "batching": {RATE_PER_GB.key(): rate_per_gb, ENERGY.key(): joules_per_token},
}
"""Scenario → its metrics and their functions. MBU, MFU and steps are those of single batches of one length."""


def efficiency_figures(result: RunResult) -> Figures:
    """Efficiency metrics of a result by MLflow key."""
    return {key: of(result) for key, of in EFFICIENCY[result.cell.scenario].items()}
