"""Capacity: how many servers some traffic needs, from measured loads of one server."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from ..analysis.decisions.capacity import CapacityPlan, of_rate, of_trace, plan_capacity
from ..analysis.goodput import searches
from ..records.cell import default_text
from ..records.errors import UsageError
from ..records.invocation import command_text
from ..records.results import RunResult
from ..tracking.load_results import Given, load_all
from ..workloads.traces import read_trace

WINDOW_S = 60.0
"""Length of the busiest part of a trace. Shorter peaks wait in the servers' queues."""

HEADROOM = 0.2
"""Share on top of the traffic: for a server that is lost or restarted, and for growth."""

ATTAINMENT = float(default_text("attainment"))
"""Share of the requests that has to meet the SLOs, as with `find=goodput`."""


def capacity(
    of: Given | Iterable[Given],
    *,
    rate: float | None = None,
    trace: str | None = None,
    window_s: float = WINDOW_S,
    headroom: float = HEADROOM,
    attainment: float = ATTAINMENT,
    tracking_uri: str | None = None,
) -> CapacityPlan:
    """Return how many servers a traffic needs, for each measured configuration of a server.

    `of`: references of loads of one server with SLOs, such as a sweep of `find=goodput` (see `load_results`) · `rate`:
    requests per second of all users together, or `trace`: a file of them, of which the busiest `window_s` seconds count
    · `headroom`: share on top. Nothing is measured or logged. Raises UsageError for a wrong argument, or results that
    are no such loads, and the errors of `load_results`.
    """
    if (rate is None) == (trace is None):
        raise UsageError("Say which traffic: --rate 12.5 (requests per second), or --trace FILE. Give one of them.")
    for name, value in (("rate", rate), ("window_s", window_s)):
        if value is not None and not 0 < value < math.inf:
            raise UsageError(f"{name} must be more than 0: {value:g}. Give for example 60.")
    if not 0 <= headroom < math.inf:
        raise UsageError(f"headroom must be at least 0: {headroom:g}. Give 0.2 for a fifth on top.")
    if not 0 < attainment < 1:
        raise UsageError(f"attainment is not between 0 and 1: {attainment:g}. Give 0.9 for nine of ten requests.")
    traffic = of_rate(rate) if rate is not None else of_trace(read_trace(str(trace)), window_s)
    results = load_all(of, tracking_uri)
    _require_loads(results)
    return CapacityPlan(traffic, headroom, attainment, plan_capacity(results, traffic, attainment, headroom))


def _require_loads(results: Sequence[RunResult]) -> None:
    """Raise UsageError unless there is a load of a server at a given rate that was judged by SLOs."""
    if any(trial.rate is not None for trials in searches(results).values() for trial in trials):
        return
    example = command_text("online", "--url", "URL", "--model", "NAME", "--find", "goodput", "--slo-ttft-ms", "500")
    raise UsageError(
        f"None of the {len(results)} results is a load of a server at a request rate with SLOs, so it is not known "
        f"what one server does. Measure it: {example}."
    )
