"""Look on while a load is sent to a server: rates, failures and latencies of the last seconds.

The process that stamps does nothing for it but write each ended request into mapped memory (`loadgen.request_board`).
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from ..loadgen.request_board import VARIABLE, EndedRequest, read_boards
from ..records.cell import Cell
from ..stats import percentile
from .events import LoadObserved

WINDOW_S = 10.0
"""Seconds that an observation covers."""

AFTER_S = 3.0
"""Seconds for which a load is left alone: short ones are never looked at."""

EVERY_S = 1.0
"""Seconds between two observations."""


def live_load(cells: Sequence[Cell]) -> LiveLoad | None:
    """Return what looks at the loads of cells; None if there is no room for it, which must not end a measurement."""
    try:
        return LiveLoad(cells)
    except OSError:
        return None


class LiveLoad:
    """Looks at the loads of one worker and of its client processes."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        self.cells = [*cells]
        self.cell = self.cells[0]
        self.folder = Path(tempfile.mkdtemp(prefix="llmbench-board-"))
        self.told = 0.0  # when it was last looked at

    @property
    def variables(self) -> dict[str, str]:
        """Environment variables of the worker."""
        return {VARIABLE: str(self.folder)}

    def turn_to(self, number: int) -> None:
        """Look at the loads of cell `number` from now on."""
        self.cell = self.cells[min(number, len(self.cells) - 1)]

    def look(self, since: float) -> LoadObserved | None:
        """Return an observation if one is due, for a load that began at `since` (s, monotonic)."""
        now = time.monotonic()
        if now - since < AFTER_S or now - self.told < EVERY_S:
            return None
        self.told = now
        seconds = min(WINDOW_S, now - since)
        seen = read_boards(self.folder, time.perf_counter_ns() - int(seconds * 1e9))
        return observed(self.cell, seen.ended, seen.in_flight, seconds)

    def close(self) -> None:
        """Remove the boards."""
        shutil.rmtree(self.folder, ignore_errors=True)


def observed(cell: Cell, ended: Sequence[EndedRequest], in_flight: int, seconds: float) -> LoadObserved:
    """Summarize requests that ended within some seconds."""
    whole = [one for one in ended if not one.failed and one.first_ns]
    limited = any(limit is not None for limit in (cell.slo_ttft_ms, cell.slo_tpot_ms, cell.slo_e2e_ms))
    return LoadObserved(
        round(seconds, 1),
        len(ended),
        len(ended) - len(whole),
        in_flight,
        _middle_and_high([(one.first_ns - one.begun_ns) / 1e6 for one in whole]) if cell.generates else None,
        _middle_and_high([(one.ended_ns - one.begun_ns) / 1e6 for one in whole]),
        sum(_is_good(cell, one) for one in whole) if limited else None,
    )


def _middle_and_high(values: Sequence[float]) -> tuple[float, float] | None:
    return (percentile(values, 50), percentile(values, 95)) if values else None


def _is_good(cell: Cell, one: EndedRequest) -> bool:
    """Return True if a request met the cell's limits, as far as can be told before its answer is parsed."""
    ttft, e2e = (one.first_ns - one.begun_ns) / 1e6, (one.ended_ns - one.begun_ns) / 1e6
    tpot = (e2e - ttft) / max(cell.output_tokens - 1, 1)
    limits = ((ttft, cell.slo_ttft_ms), (tpot, cell.slo_tpot_ms), (e2e, cell.slo_e2e_ms))
    return all(limit is None or value <= limit for value, limit in limits)
