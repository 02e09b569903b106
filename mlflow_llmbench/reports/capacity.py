"""The number of servers that a traffic needs, as text and as JSON data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..analysis.decisions.capacity import Capacity, CapacityPlan, Servers, Traffic
from ..analysis.goodput import GoodputLimit, slo_text
from ..records.cell import Cell, as_text, differing
from ..records.text import number_text, plural, short_number_text
from .tables import MISSING, text_table

HEADING = ("servers", "95 % interval", "goodput of one, requests/s", "per hour", "cost/1M tokens")


def format_capacity(plan: CapacityPlan) -> str:
    """Format the answer for a terminal: the traffic, a line for each configuration, what it assumes, and notes."""
    varied = differing([one.limit.cell for one in plan.found])
    body = [[*_names(one.limit.cell, varied), *_line(one)] for one in plan.found]
    heading = [*varied, *HEADING]
    kept = [n for n in range(len(heading)) if n < len(varied) + 3 or any(row[n] != MISSING for row in body)]
    shown = text_table(
        [heading[n] for n in kept], [[row[n] for n in kept] for row in body], range(len(varied), len(kept))
    )
    parts = [_traffic(plan.traffic, plan.headroom), shown, _assumed(plan)]
    notes = [f"- {name}{note}" for one in plan.found for name, notes in [_noted(one, varied)] for note in notes]
    return "\n\n".join([*parts, *(["\n".join(notes)] if notes else [])])


def _traffic(traffic: Traffic, headroom: float) -> str:
    with_headroom = f"; with {headroom:.0%} headroom {number_text(traffic.peak * (1 + headroom))}" if headroom else ""
    if traffic.window_s is None:
        return f"Traffic: {number_text(traffic.peak)} requests per second{with_headroom}."
    return (
        f"Traffic: at most {number_text(traffic.peak)} requests per second, in the "
        f"{short_number_text(traffic.window_s)} s from second {traffic.busiest_s:.0f} on"
        f"{with_headroom}. In the mean {number_text(traffic.mean)}."
    )


def _assumed(plan: CapacityPlan) -> str:
    cell, share = plan.found[0].limit.cell, f"{100 * plan.attainment:.4g}%"
    return (
        f"Enough that {share} of the requests meet {slo_text(cell)}, if every server is as the measured "
        "one and a load balancer deals requests out evenly. The interval is that of one server's goodput: at the rate "
        "that surely meets the SLOs, and at the one that surely does not."
    )


def _names(cell: Cell, varied: Sequence[str]) -> list[str]:
    return [as_text(name, getattr(cell, name)) for name in varied]


def _line(one: Capacity) -> list[str]:
    count, limit = one.servers.count, one.limit
    price = None if count is None or one.price_per_hour is None else count * one.price_per_hour
    return [
        MISSING if count is None else str(count),
        interval_text(one.servers),
        _goodput(limit),
        MISSING if price is None else number_text(price),
        MISSING if one.price_of_million is None else number_text(one.price_of_million),
    ]


def _goodput(limit: GoodputLimit) -> str:
    if limit.rate is None:
        return MISSING
    low, high = (None if end is None else number_text(end) for end in (limit.low, limit.high))
    return f"{number_text(limit.rate)} ({low or 'unknown'} to {high or 'unknown'})"


def interval_text(servers: Servers) -> str:
    """Return the interval of a number of servers: `3 to 5`, `at least 3`, `at most 5`, or `–`."""
    low, high = servers.low, servers.high
    if low is None and high is None:
        return MISSING
    if low is None:
        return f"at most {high}"
    return f"{low} to {high}" if high is not None else f"at least {low}"


def _noted(one: Capacity, varied: Sequence[str]) -> tuple[str, list[str]]:
    """Return the name of a configuration for its notes, and these."""
    name = ", ".join(f"{name} {text}" for name, text in zip(varied, _names(one.limit.cell, varied), strict=True))
    notes = [*one.notes]
    if one.limit.rate is None:
        notes.insert(0, f"{one.limit.sentence()} No number of such servers helps.")
    if one.hours and (total := one.server_hours) is not None and one.servers.count is not None:
        hours = ", ".join(str(hour.count) for hour in one.hours)
        always = one.servers.count * len(one.hours)
        saved = f", {plural(total, 'server hour')} instead of {always} if their number follows the traffic"
        notes.append(f"By the hour: {hours} servers{saved if total < always else ''}.")
    return f"{name}: " if name else "", notes


def capacity_json(plan: CapacityPlan) -> dict[str, Any]:
    """Return the answer as JSON data; an absent value is null. Rates are in requests per second."""
    varied = differing([one.limit.cell for one in plan.found])
    return {
        "peak_requests_per_s": plan.traffic.peak,
        "mean_requests_per_s": plan.traffic.mean,
        "window_s": plan.traffic.window_s,
        "headroom": plan.headroom,
        "attainment": plan.attainment,
        "configurations": [
            {
                "parameters": dict(zip(varied, _names(one.limit.cell, varied), strict=True)),
                "servers": _servers(one.servers),
                "hours": [_servers(hour) for hour in one.hours],
                "server_hours": one.server_hours,
                "goodput": {"rate": one.limit.rate, "low": one.limit.low, "high": one.limit.high},
                "price_per_hour": one.price_per_hour,
                "price_of_million_tokens": one.price_of_million,
                "notes": list(one.notes),
            }
            for one in plan.found
        ],
    }


def _servers(one: Servers) -> dict[str, int | None]:
    return {"count": one.count, "low": one.low, "high": one.high}
