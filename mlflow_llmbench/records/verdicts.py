"""Outcomes of cells and requests, reasons of verdicts, and the limits that they rest on."""

from __future__ import annotations

PERCENTILE_SUPPORT = {50: 1, 90: 29, 95: 59, 99: 299}
"""Smallest number of distinct samples that supports a percentile: n with 1 − q^n ≥ 0.95, so that the largest sample
lies above the percentile with 95 % probability (Wilks 1941)."""

LEAST_REPETITIONS = 5
"""Smallest number of timed repetitions for a confidence interval."""

CORRELATED_REPETITIONS = 20
"""Repetitions from which trend, step, two speeds and serial correlation are seen."""

JUDGED_REPETITIONS = 64
"""Repetitions from which rare disturbances are seen too.

If one repetition in 20 is slow, or the speed changes for five neighbours at a time, 30 repetitions show nothing in
up to a fifth of cases, 64 in a twentieth.
"""

JUDGED_WITHIN_S = 60.0
"""Timed seconds that `repetitions=auto` spends to reach `JUDGED_REPETITIONS`; it always takes
`CORRELATED_REPETITIONS`, unless they take more than `MOST_TIMED_S`."""

MOST_TIMED_S = 600.0
"""Timed seconds after which `auto` stops although the interval is still too wide or the repetitions are correlated."""

FOREIGN_CPU_LIMIT = 0.10
"""CPUs that others (processes, hypervisor) may use on average over all repetitions: a tenth of one core."""

SPOILED_CPU_LIMIT = 0.25
"""The same limit for one repetition, above which it counts as spoiled. Higher, because a short one meets bursts."""

VARIATION_LIMIT = 0.10
"""Standard deviation ÷ mean of repetitions or processes, above which they vary too much."""

FAILURES = ("truncated", "server_error", "timeout", "refused", "malformed")
"""Outcomes of a request to a server other than `complete`."""

REASONS: dict[str, str] = {
    "wrong_token_count": "invalid",
    "unfinished": "invalid",
    "client_bound": "invalid",
    "mbu_above_one": "invalid",
    "negative_gap": "invalid",
    "nonfinite_logits": "invalid",
    "not_steady": "suspect",
    "not_converged": "suspect",
    "too_few_samples": "suspect",
    "contended": "suspect",
    "too_short_to_judge": "suspect",
    "throttled": "suspect",
    "high_variation": "suspect",
    "trend": "suspect",
    "step": "suspect",
    "two_speeds": "suspect",
    "outliers": "suspect",
    "length_drift": "suspect",
    "prefix_cache_hits": "suspect",
    "bandwidth_doubtful": "suspect",
    "chunked_stream": "suspect",
    "collapsed_gaps": "suspect",
    "swapping": "suspect",
    "failed_requests": "suspect",
    "saturated": "suspect",
}
"""Reason code → the verdict it forces."""

DISTURBING = (
    "not_steady",
    "trend",
    "step",
    "two_speeds",
    "outliers",
    "high_variation",
    "contended",
    "throttled",
    "swapping",
)
"""Reasons for which the repetitions of one process are not taken for independent values around one mean."""

OUTCOMES = {
    "ok": "FINISHED",
    "oom": "FAILED",
    "crashed": "FAILED",
    "timeout": "FAILED",
    "refused": "FAILED",
    "error": "FAILED",
    "interrupted": "KILLED",
    "skipped": "KILLED",
}
"""Outcome of a cell → status of its MLflow run."""
