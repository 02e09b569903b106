"""Progress of a sweep: cell of how many, stage, speed, finished rows, and the time left.

It has no thread and no timer: it works in its calls only, which come between timed regions. On a terminal
(`live_display`) and in a notebook (`notebook_display`), two lines are redrawn, at most four times a second, and for
repetitions at most once a second. Elsewhere (CI, the log of an MLflow run) each change of stage gets a plain line, and
a repetition only if there was none for a minute.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from statistics import fmean
from typing import Protocol, TextIO

from ..measure import events
from ..measure.events import Event
from ..records.text import rough_duration, short_number_text
from ..reports.result import Row, row_text
from .live_display import LiveDisplay, Status, cleaned
from .notebook_display import NotebookDisplay, in_notebook

WRITES_PER_S = 4
"""Most draws of a terminal in any second."""

AGAIN_S = 1.0
"""Least seconds before an event of the same kind draws again, such as that of one more repetition."""

QUIET_S = 60.0
"""Seconds without a line in a log after which a repetition gets one; also the least time left that is logged."""

SHORT_S = 120
"""Seconds left below which the time of day of the end is not shown."""

WARMING_UP = "warming up: the first calls are slower"

STAGES = {
    "planning": "planning",
    "preparing": "preparing the files",
    "reference": "computing the unquantized reference",
    "starting": "starting",
    "loading": "loading",
    "peak": "finishing",
    "unloaded": "ending",
}
"""Stage → text shown. *planning* comes from the command, *preparing* and *reference* from the sweep.

The worker sends the others. *baseline* takes no time and is not shown; *loaded* is shown at the event `ModelLoaded`.
"""


class Progress:
    """Progress of one sweep: call `start`, for each cell `cell`, `event` (worker events) and `row`, at last `finish`.

    A worker numbers the cells of its own group; the sweep calls `cell` with their numbers in the whole plan, before it
    starts a worker and again at its event `CellBegun`. The same number twice is one cell. Cells may come in any order
    and are counted as they come. If the stream cannot be written to, the display ends but the sweep goes on.
    """

    def __init__(
        self,
        stream: TextIO,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        notebook: NotebookDisplay | None = None,
    ) -> None:
        self.stream: TextIO | None = stream
        self.clock, self.wall = clock, wall
        is_terminal = stream.isatty() and os.environ.get("TERM") != "dumb"
        self.live = notebook or (LiveDisplay(stream) if is_terminal else None)
        self.draws: deque[float] = deque(maxlen=WRITES_PER_S)
        self.written = clock()  # when the last line of a log was written
        self.start(0)

    def start(self, total_cells: int) -> None:
        """Reset everything and begin a sweep of `total_cells` cells; shows nothing yet."""
        self.total = total_cells
        self.number, self.name, self.doing = 0, "", ""
        self.rows: set[str] = set()  # names of the cells whose row was shown
        self.widest = 0  # of these names
        self.rates: list[float] = []  # tokens per second of this cell's repetitions
        self.load = ""  # last seconds of a load that is still sent
        self.places: dict[int, int] = {}  # number of a begun cell → its place in the order of measurement
        self.over: set[int] = set()  # numbers of cells that have ended, well or badly
        self.preparing = False
        self.seconds: dict[
            int, float
        ] = {}  # number of a measured cell → seconds, with its share of starting and loading
        self.repetitions: dict[int, int] = {}  # number of a cell → repetitions done
        self.limit = 0  # most repetitions of this cell
        self.since = self.clock()  # when the last cell ended, or the sweep began
        self.timed_since = self.since  # when the repetitions of this cell began
        self.doing_since = self.since

    def cell(self, number: int, name: str) -> None:
        """Show cell `number` of the plan, counted from 1, as the current one. Cells may come in any order."""
        if (number, cleaned(name)) == (self.number, self.name):
            return
        self.over.add(self.number)  # also a cell that was skipped, or whose worker said nothing more
        self.number, self.name, self.limit = number, cleaned(name), 0
        self.total = max(self.total, number)  # a search adds cells
        self.places.setdefault(number, len(self.places) + 1)
        self._now("", log=self.name)

    def event(self, event: Event) -> None:
        """Handle one event, as `supervise.run_worker` passes it on. Most classes of events change nothing."""
        match event:
            case events.Stage(stage=stage):
                self._show_stage(stage)
            case events.ModelLoaded(info=info):
                self._now_and_log("loaded" if info.load_s is None else f"loaded in {duration(info.load_s)}")
            case events.CellBegun():
                self.over.discard(self.number)  # one of several processes for one cell
                self.limit = self.repetitions[self.number] = 0
                self.timed_since = self.clock()
                self.rates = []
                self._now_and_log(WARMING_UP)
            case events.CompilationBegun():
                self._now_and_log("compiling")
            case events.WarmupEnded(number=number, limit=limit, until_steady=until_steady):
                self.timed_since, self.load = self.clock(), ""
                why = ", until the times are steady" if until_steady else ""
                self._now(f"warm-up {number}/{limit}{why}", again=number > 1)
            case events.RepetitionEnded(number=number, limit=limit, tokens_per_s=rate):
                self.repetitions[self.number], self.limit, self.load = number, limit, ""
                self.rates += [rate] if rate else []
                self._now(f"repetition {number}/{limit}", log=self._repetition_line(number, limit), again=number != 1)
            case events.Waited():
                self._draw(again=True)
            case events.LoadObserved():
                self._show_load(event)
            case events.CellMeasured(node=node):
                self.load = ""
                self._show_measured(node)
            case events.EvaluationBegun():
                self._now_and_log("evaluating quality")
            case events.ScoringProgress(number=number, limit=limit):
                self._now(f"quality {number}" if limit is None else f"quality {number}/{limit}", again=True)
            case events.JobFailed(message=message):
                self._end()
                self.over.add(self.number)
                self.doing = "failed"
                self.note(f"{f'{self._count()}: {self.name} ' if self.number else ''}failed: {message}")
            case events.JobEnded():
                self._end()

    def _show_load(self, seen: events.LoadObserved) -> None:
        """Show the last seconds of a load: on a terminal in the block, elsewhere as a line a minute."""
        self.load = load_text(seen)
        if self.live:
            self._draw(again=True)
        elif self.clock() - self.written >= QUIET_S:
            self._write(f"{self._count()}: {self.load}\n")

    def _repetition_line(self, number: int, limit: int) -> str:
        """Return the line of a log for a repetition, "" if it gets none."""
        if number > 1 and self.clock() - self.written < QUIET_S:
            return ""
        seconds = self.seconds_left()
        left = self._left(seconds) if seconds is not None and seconds >= QUIET_S else ""
        return ", ".join(filter(None, ["measuring" if number == 1 else f"repetition {number}/{limit}", left]))

    def _show_stage(self, stage: str) -> None:
        if stage in STAGES:
            self._count_stage(stage)
            is_new = stage in ("preparing", "reference", "starting", "loading")
            self._now(STAGES[stage], log=STAGES[stage] if is_new else "")

    def _show_measured(self, node: str | None) -> None:
        """Show that a cell is measured; `node` is its node of a cluster."""
        taken = self._end()
        self.over.add(self.number)
        self.seconds[self.number] = self.seconds.get(self.number, 0.0) + taken
        # When several nodes measure at once, the time since the last cell ended is not this cell's.
        doing = f"measured on {node}" if node else f"measured in {duration(taken)}"
        left = self._left(self.seconds_left())
        self._now(doing, log=f"{doing}, {left}" if left else doing)

    def row(self, name: str, row: Row) -> None:
        """Show the figures of a measured cell; a second row of the same cell changes nothing."""
        if row.outcome == "ok" and not row.linked and name not in self.rows:
            self.rows.add(name)
            self.widest = max(self.widest, len(name))
            if self.live:
                self.live.note(f"✓ {name:<{self.widest}}  {row_text(row)}", "green")
            else:
                self._write(f"{cleaned(name)}: {row_text(row)}\n")

    def note(self, text: str) -> None:
        """Write a line that stays, such as a warning or a failure."""
        if self.live:
            self.live.note(text)
        else:
            self._write(f"{text}\n")

    def finish(self) -> None:
        """Erase what is redrawn on the terminal, so that the next output starts on an empty line."""
        if self.live:
            self.live.stop()

    def seconds_left(self) -> float | None:
        """Return the estimated seconds to the end; None before anything is known.

        This cell: its remaining repetitions at their pace so far, or the mean of the measured cells minus its time so
        far. Each later cell: the mean of the measured cells, or this cell's estimated total. The expected number of
        repetitions is the mean over the measured cells; if there is none, it is the limit, which makes the estimate an
        upper bound.
        """
        now = self.clock()
        cell_s = fmean(self.seconds.values()) if self.seconds else None
        done = self.repetitions.get(self.number, 0)
        ended = self.number in self.over
        if ended and cell_s is not None:
            here: float = 0.0
        elif done and self.limit and not ended:
            needed = [n for number, n in self.repetitions.items() if number in self.seconds]
            expected = min(fmean(needed), self.limit) if needed else self.limit
            still = max(expected - done, 1.0 if done < self.limit else 0.0)
            here = still * (now - self.timed_since) / done
        elif cell_s is not None:
            here = max(cell_s - (now - self.since), 0.0)
        else:
            return None
        if cell_s is None:
            cell_s = now - self.since + here
        return here + self._later() * cell_s

    def _later(self) -> int:
        """Return the number of cells that have not begun."""
        return max(self.total - len(self.places), 0)

    def _count_stage(self, stage: str) -> None:
        if stage == "peak":  # no repetition follows
            self.limit = self.repetitions.get(self.number, 0)
        elif stage == "starting" and self.preparing:  # the time of a download must not count for later cells
            self._end()
        self.preparing = stage in ("preparing", "reference")

    def _end(self) -> float:
        """Start timing the next cell. Returns the seconds since the last one ended."""
        now = self.clock()
        taken, self.since = now - self.since, now
        return taken

    def _now_and_log(self, doing: str) -> None:
        """Show what the worker does now, on a terminal and elsewhere."""
        self._now(doing, log=doing)

    def _now(self, doing: str, log: str = "", again: bool = False) -> None:
        """Show what the worker does now: on a terminal in the block, elsewhere as a line `log`, if not empty.

        `again` marks one more event of the same kind, which need not be shown.
        """
        self.doing = doing
        if not again:
            self.doing_since = self.clock()
        if self.live:
            self._draw(again)
        elif log:
            self._write(f"{self._count()}: {log}\n" if self.number else f"{log}\n")

    def _draw(self, again: bool) -> None:
        """Draw the block on a terminal, if the limits allow it."""
        now = self.clock()
        full = len(self.draws) == WRITES_PER_S and now - self.draws[0] < 1
        if self.live is None or full or (again and self.draws and now - self.draws[-1] < AGAIN_S):
            return
        self.draws.append(now)
        self.live.draw(self._status(now))

    def _status(self, now: float) -> Status:
        is_over = self.number in self.over
        elapsed = now - self.doing_since
        rate = f"{short_number_text(fmean(self.rates))} tokens/s" if self.rates and not is_over else ""
        done = 0.0 if is_over or not self.limit else min(self.repetitions.get(self.number, 0) / self.limit, 1)
        return Status(
            self._count() if self.number else "",
            self.name,
            (self.doing, rate, duration(elapsed) if elapsed >= 1 and not is_over else ""),
            len(self.over) - (0 in self.over) + done,  # 0: before the first cell
            self.total,
            self._end_text(),
            "" if is_over else self.load,
        )

    def _count(self) -> str:
        return f"cell {self.places[self.number]}/{self.total}"

    def _left(self, seconds: float | None) -> str:
        """Return `about 2 min left`, or `up to …` while the estimate rests on the limit of repetitions.

        Empty before anything is known and at the end.
        """
        if seconds is None or (self.number in self.over and not self._later()):
            return ""
        return f"{'about' if self.seconds else 'up to'} {rough_duration(seconds)} left"

    def _end_text(self) -> str:
        """Return the time left, and the time of day at which it ends, if that is not soon."""
        seconds = self.seconds_left()
        left = self._left(seconds)
        if not left or seconds is None or seconds < SHORT_S:
            return left
        minutes = -(-(self.wall() + seconds) // 60)  # rounded up, as the time left is
        return f"{left}, until {time.strftime('%H:%M', time.localtime(60 * minutes))}"

    def _write(self, text: str) -> None:
        """Write and flush."""
        if self.stream is None:
            return
        self.written = self.clock()
        try:
            self.stream.write(text)
            self.stream.flush()
        except (OSError, ValueError):  # a closed pipe, a closed file, a character that the stream cannot encode
            self.stream = None


def load_text(seen: events.LoadObserved) -> str:
    """Return the last seconds of a load in one line: `12.4 requests/s · 38 in flight · TTFT 41, p95 95 ms · …`."""
    parts = [f"{short_number_text(seen.requests / seen.seconds)} requests/s", f"{seen.in_flight} in flight"]
    parts += [f"{seen.failed} failed"] if seen.failed else []
    for name, times in (("TTFT", seen.ttft_ms), ("e2e", seen.e2e_ms)):
        parts += [f"{name} {short_number_text(times[0])}, p95 {short_number_text(times[1])} ms"] if times else []
    if seen.good is not None:
        share = f" ({seen.good / seen.requests:.0%})" if seen.requests else ""
        parts.append(f"goodput {short_number_text(seen.good / seen.seconds)}/s{share}")
    return " · ".join(parts)


def duration(seconds: float) -> str:
    """Format measured seconds: `0.4 s`, `41 s`, `3 min 5 s`, `2 h 7 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class ProgressListener(Protocol):
    """Receiver of a sweep's progress, such as `progress.Progress`."""

    def start(self, total_cells: int) -> None:
        """Begin: the plan has `total_cells` cells."""

    def cell(self, number: int, name: str) -> None:
        """Announce that cell `number` of the plan is next; also called for a cell that ends without a worker."""

    def event(self, event: Event) -> None:
        """Handle an event of a worker or of its group; its classes are in `measure.events`."""

    def row(self, name: str, row: Row) -> None:
        """Announce the figures of a cell: as soon as it is measured, and again with all that its group brings."""

    def note(self, text: str) -> None:
        """Show a line to the user."""

    def finish(self) -> None:
        """End: nothing more comes."""


@contextlib.contextmanager
def listening(progress: bool | ProgressListener | None) -> Iterator[ProgressListener | None]:
    """Yield the listener of a function that is called from Python. None: show progress in notebooks only."""
    if not isinstance(progress, bool | None):
        yield progress
        return
    notebook = NotebookDisplay() if progress is not False and in_notebook() else None
    if not (progress or notebook):
        yield None
        return
    shown = Progress(sys.stderr, notebook=notebook)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "IProgress not found")  # tqdm misses widgets, which nothing here needs
        try:
            yield shown
        finally:
            shown.finish()


class NullListener:
    """A listener that shows nothing."""

    def start(self, total_cells: int) -> None:
        """Do nothing."""

    def cell(self, number: int, name: str) -> None:
        """Do nothing."""

    def event(self, event: Event) -> None:
        """Do nothing."""

    def row(self, name: str, row: Row) -> None:
        """Do nothing."""

    def note(self, text: str) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing."""
