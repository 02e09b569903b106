"""Memory of a cell at the five stages and over time, from its worker's events and from samples taken by the parent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from .measure import Measured
from .records import MemorySample, MemoryStages
from .supervise import GroupOutcome

MOST_SAMPLES = 2000
"""Most memory samples in a result. At twenty a second, a long run would otherwise make it unreadable."""


def stages_of(outcome: GroupOutcome, number: int) -> MemoryStages:
    """Return the memory in bytes of one cell of a group at the five stages.

    A stage that was not reached, or cannot be read on this machine, is absent.
    """
    mapped = outcome.load.mapped_weight_bytes if outcome.load else 0
    rss: dict[str, int] = {}
    needed: dict[str, int] = {}
    device: dict[str, int] = {}
    reserved_peak = None
    for stage in ("baseline", "loaded", "unloaded"):
        event = outcome.stages.get(stage)
        if event and event.get("host"):
            rss[stage] = event["host"]["rss"]
            if event["host"]["anonymous"] is not None:
                needed[stage] = event["host"]["anonymous"] + (mapped if stage == "loaded" else 0)
        if event and event.get("device"):
            device[stage] = _device_bytes(event["device"], peak=False)
    cell = outcome.cells.get(number, {})
    peak = cell.get("peak")
    if peak is None and outcome.samples and outcome.error:  # it failed: use the parent's samples up to then
        window = [s for s in outcome.samples if not cell or cell["cell"]["t_ns"] <= s.t_ns]
        rss["peak"] = max((s.rss for s in window), default=outcome.samples[-1].rss)
        needed["peak"] = max((s.anonymous for s in window), default=outcome.samples[-1].anonymous) + mapped
    if peak and peak.get("host"):
        own = peak["host"]
        window = [s for s in outcome.samples if cell["cell"]["t_ns"] <= s.t_ns <= peak["t_ns"]]
        rss["peak"] = max([own["peak_rss"] or own["rss"], *(s.rss for s in window)])
        steady = _steady_samples(window, outcome.measured.get(number))
        rss["steady"] = int(median([s.rss for s in steady])) if steady else own["rss"]
        if own["anonymous"] is not None:
            # Exact resident peak minus the file pages at the end: catches a spike between two samples.
            spike = rss["peak"] - (own["rss"] - own["anonymous"]) if own["peak_rss"] else 0
            needed["peak"] = max([own["anonymous"], spike, *(s.anonymous for s in window)]) + mapped
            needed["steady"] = (int(median([s.anonymous for s in steady])) if steady else own["anonymous"]) + mapped
    if peak and peak.get("device"):
        device["peak"] = _device_bytes(peak["device"], peak=True)
        device["steady"] = _device_bytes(peak["device"], peak=False)
        reserved_peak = peak["device"]["peak_reserved"] or None  # 0 means that it cannot be read
    return MemoryStages(rss, needed, device, reserved_peak)


def timeline_of(outcome: GroupOutcome, number: int) -> tuple[MemorySample, ...]:
    """Return the memory samples of the load, of one cell and of what follows it, thinned to `MOST_SAMPLES`.

    Each group of neighbouring samples is represented by its largest, so peaks are kept.
    """
    cell, loaded = outcome.cells.get(number, {}), outcome.stages.get("loaded")
    if "peak" in cell and loaded:
        measured = [s for s in outcome.samples if outcome.evaluated_ns is None or s.t_ns < outcome.evaluated_ns]
        unloading = outcome.samples[-1].t_ns - 1_000_000_000 if outcome.samples else 0
        kept = [
            s
            for s in measured
            if s.t_ns <= loaded["t_ns"] or cell["cell"]["t_ns"] <= s.t_ns <= cell["peak"]["t_ns"] or s.t_ns >= unloading
        ]
    elif cell and loaded:  # it failed: leave out the memory of earlier cells
        kept = [s for s in outcome.samples if s.t_ns <= loaded["t_ns"] or s.t_ns >= cell["cell"]["t_ns"]]
    else:
        kept = outcome.samples
    stride = -(-len(kept) // MOST_SAMPLES) or 1
    return tuple(max(kept[i : i + stride], key=lambda s: s.rss) for i in range(0, len(kept), stride))


def _device_bytes(seen: Mapping[str, Any], peak: bool) -> int:
    """Return the driver's memory of the process in bytes (context and libraries included), else the allocator's.

    The driver keeps no peak. It is computed as the memory outside the allocator now plus the allocator's peak.
    """
    reserved: int = seen["peak_reserved"] if peak else seen["reserved"]
    if seen["driver"] is None:
        return reserved
    outside: int = max(seen["driver"] - seen["reserved"], 0)
    return outside + reserved


def _steady_samples(window: Sequence[MemorySample], measured: Measured | None) -> list[MemorySample]:
    """Return the samples in the second half of the last repetition."""
    if measured is None or not measured.repetitions:
        return []
    last = measured.repetitions[-1].requests
    start, end = min(r.t0_ns for r in last), max(r.stamps_ns[-1] for r in last)
    return [s for s in window if (start + end) // 2 <= s.t_ns <= end]
