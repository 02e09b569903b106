"""Verdict on a result: whether its numbers can be trusted, and if not, why and what to try."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..records.metrics import RELATIVE_HALF_WIDTH, TPOT, VARIATION
from ..records.results import Reason, RunResult, Verdict
from ..records.verdicts import LEAST_REPETITIONS, PERCENTILE_SUPPORT, REASONS, VARIATION_LIMIT
from ..stats import coefficient_of_variation, supports
from . import collapsed_gaps, contention, online_validity, probe
from .efficiency import read_share, utilization_doubt
from .figures import once_per_result
from .latency import gaps_ms
from .layout import moved
from .logits_validity import logits
from .order import order
from .repetitions import PER_REPETITION, process_count, requests, several_in_a_step, work_rate
from .summary import summarize

Check = Callable[[RunResult, dict[str, float]], Iterator[Reason]]


def judge(result: RunResult, metrics: dict[str, float] | None = None) -> Verdict:
    """Return the verdict on a result: `word` is valid, suspect or invalid, `reasons` have a code and a sentence each.

    The worst reason decides; a failed cell is `invalid`. `metrics` are its summary by MLflow key, if it is known.
    """
    own = summarize(result)
    return _own_verdict(result) if metrics is None or metrics == own else _verdict(result, metrics)


@once_per_result
def _own_verdict(result: RunResult) -> Verdict:
    return _verdict(result, summarize(result))


def _verdict(result: RunResult, metrics: dict[str, float]) -> Verdict:
    if result.failure:
        sentence = f"The cell ended with {result.outcome} at stage {result.failure.stage}: {result.failure.message}"
        return Verdict("invalid", (Reason("unfinished", sentence),))
    reasons = tuple(reason for check in CHECKS_OF[result.cell.scenario] for reason in check(result, metrics))
    forced = {REASONS[reason.code] for reason in reasons}
    word = "invalid" if "invalid" in forced else "suspect" if forced else "valid"
    return Verdict(word, reasons)


def unsupported_percentiles(result: RunResult) -> list[str]:
    """Percentiles that are absent because the sample is too small, as `TTFT p95 (n = 12, needs 59)`."""
    every = requests(result)
    sizes = {
        "TTFT" if result.cell.generates else "end to end": len(every),
        "ITL": 0 if several_in_a_step(result) else sum(max(r.output_tokens - 1, 0) for r in every),
    }
    return [
        f"{name} p{q} (n = {n}, needs {PERCENTILE_SUPPORT[q]})"
        for name, n in sizes.items()
        if n
        for q in (90, 95, 99)
        if not supports(n, q)
    ]


def _counts(result: RunResult, metrics: dict[str, float]) -> Iterator[Reason]:
    every = [(r.output_tokens, r.asked[1] if r.asked else result.cell.output_tokens) for r in requests(result)]
    wrong = [(came, asked) for came, asked in every if came != asked]
    if wrong:
        yield Reason(
            "wrong_token_count",
            f"{len(wrong)} of {len(every)} requests returned {wrong[0][0]} tokens instead of {wrong[0][1]}; rates and "
            "latencies are not those of the requested length. Check the backend, or ask for a length that it can "
            "force.",
        )


def _negative_gaps(result: RunResult, metrics: dict[str, float]) -> Iterator[Reason]:
    smallest = min((gap for r in requests(result) for gap in gaps_ms(r)), default=0.0)
    if smallest < 0:
        yield Reason(
            "negative_gap",
            f"A token came {-smallest:.3f} ms before its predecessor; the clock or the backend is broken. Do not use "
            "these numbers.",
        )


def _together(result: RunResult, metrics: dict[str, float]) -> Iterator[Reason]:
    """Check for tokens handed over only after all were made: a user's function that does not stream."""
    if (apart := collapsed_gaps.handed_over_at_once(result)) is not None:
        yield Reason(
            "chunked_stream",
            f"The tokens of a request came together, {apart * 1000:.2g} µs apart (median; limit "
            f"{collapsed_gaps.LEAST_GAP_MS * 1000:g} µs): they were handed over when all were made, so neither the "
            "time to the first token nor the gaps are those of the model. Emit each token as it is made.",
        )


def _bandwidth(result: RunResult, metrics: dict[str, float]) -> Iterator[Reason]:
    """Check that the decode was not faster than memory can be read.

    Only the nominal bandwidth proves it; a probe can have measured too little. A probe that is known to be doubtful
    proves nothing: MBU is absent then.
    """
    share = read_share(result)
    if share is None or share <= 1 or moved(result):
        return
    if result.nominal_bandwidth is not None:
        yield Reason(
            "mbu_above_one",
            f"The decode would have read {share:.2f} times the nominal bandwidth of {result.nominal_bandwidth:g} GB/s "
            "(limit 1): tokens were not all computed, or nominal_bandwidth is that of another device. Check both.",
        )
    elif not probe.doubt(result.peaks) and (why := utilization_doubt(result)):
        yield Reason("bandwidth_doubtful", why)


def _steadiness(result: RunResult, metrics: dict[str, float]) -> Iterator[Reason]:
    if result.cell.warmup is None and result.steady is False:
        processes = process_count(result)
        seen = f"In at least one of {processes} processes the early and the late warm-up runs"
        if processes < 2:
            seen = f"After {len(result.warmup_s)} warm-up runs the early and the late ones"
        yield Reason(
            "not_steady",
            f"{seen} still differ by more than 5 %. Close other programs, or set warmup to a larger number.",
        )


def _convergence(result: RunResult, metrics: dict[str, float]) -> Iterator[Reason]:
    width, target = metrics.get(RELATIVE_HALF_WIDTH.key()), result.cell.precision_target
    repetitions, processes = len(result.repetitions), process_count(result)
    if repetitions < LEAST_REPETITIONS:
        yield Reason(
            "too_few_samples",
            f"There are {repetitions} repetitions; an interval needs at least {LEAST_REPETITIONS}. Set repetitions to "
            "5 or more.",
        )
    elif 1 < processes < LEAST_REPETITIONS:
        yield Reason(
            "too_few_samples",
            f"There are {processes} processes; an interval over processes needs at least {LEAST_REPETITIONS}. Raise "
            "processes to 5 or more.",
        )
    elif width is not None and width > target and result.cell.repetitions is None:
        rests_on, more = (
            (f"{processes} processes", "processes")
            if processes > 1
            else (f"{repetitions} repetitions", "max_repetitions")
        )
        yield Reason(
            "not_converged",
            f"The 95 % interval of the throughput is ±{width:.1%} after {rests_on}, and the target is ±{target:.1%}. "
            f"Raise {more}, or close other programs.",
        )


def _variation(result: RunResult, metrics: dict[str, float]) -> Iterator[Reason]:
    """Check the variation between processes, if several, and between repetitions, which means of processes would hide.

    Conversations differ in their turns and therefore in throughput; on a quiet machine they share the time per output
    token, which is checked instead.
    """
    talks = result.cell.history != "none"
    of = PER_REPETITION[TPOT.key("mean")] if talks else work_rate
    rates = [rate for repetition in result.repetitions if (rate := of(repetition)) is not None]
    seen = {
        "processes": metrics.get(VARIATION.key()) if process_count(result) > 1 else None,
        "repetitions": coefficient_of_variation(rates),
    }
    found = {noun: cv for noun, cv in seen.items() if cv is not None and cv > VARIATION_LIMIT}
    if found:
        noun = max(found, key=found.__getitem__)
        what = "time per output token" if talks and noun == "repetitions" else "throughput"
        yield Reason(
            "high_variation",
            f"The {what} of the {noun} varies by {found[noun]:.1%} (standard deviation ÷ mean; limit "
            f"{VARIATION_LIMIT:.0%}). Look for other programs that ran at the same time, and measure again.",
        )


OF_THE_SERIES: tuple[Check, ...] = (_steadiness, _convergence, _variation, order, collapsed_gaps.collapsed)
"""Checks of the warm-up, the repetitions, and the gaps in them, in every scenario."""

CHECKS: tuple[Check, ...] = (
    _counts,
    logits,
    _negative_gaps,
    _together,
    _bandwidth,
    *OF_THE_SERIES,
    *contention.CHECKS,
)
ONLINE_CHECKS: tuple[Check, ...] = (
    _negative_gaps,
    *OF_THE_SERIES,
    *online_validity.CHECKS,
    contention.of_the_client,
    contention.memory,
    contention.throttling,
)
STREAM_CHECKS: tuple[Check, ...] = (
    _counts,
    logits,
    _negative_gaps,
    *OF_THE_SERIES,
    *contention.CHECKS,
    online_validity.client,
    online_validity.saturation,
    online_validity.windows,
)
CHECKS_OF = {"offline": CHECKS, "online": ONLINE_CHECKS, "batching": STREAM_CHECKS}
