"""Progress display of a sweep on a text stream: which cell of how many, which stage, and the time left.

It has no thread and no timer. A worker event costs a few microseconds and at most one short write, so the display takes
no CPU from the model that is being measured. On a terminal one line is rewritten. Elsewhere (CI, the log of an MLflow
run) each change of stage gets a plain line, and repetitions get none. No colours and no escape sequences: a line is
erased with spaces.
"""

from __future__ import annotations

import os
import shutil
import time
import unicodedata
from collections import deque
from collections.abc import Callable
from statistics import fmean
from typing import Protocol, TextIO

from ..measure import events
from ..measure.events import Event

WRITES_PER_S = 4
"""Most writes to a terminal in any second. Repetitions only use those that changes of stage leave."""

SHORTEST_NAME = 12
"""Columns that a cell's name keeps on a narrow terminal; beyond that the rest of the line is cut."""

STAGES = {
    "preparing": "preparing the files",
    "reference": "computing the unquantized reference",
    "starting": "starting",
    "loading": "loading",
    "peak": "finishing",
    "unloaded": "unloaded",
}
"""Stage → text shown. *preparing* and *reference* come from the sweep, the others from the worker.

*baseline* is not shown because it takes no time; *loaded* is shown at the event `ModelLoaded`.
"""


class Progress:
    """Display of one sweep: call `start`, for each cell `cell` and `event` (worker events), and at the end `finish`.

    A worker numbers the cells of its own group; the sweep calls `cell` with their numbers in the whole plan, before it
    starts a worker and again at its event `CellBegun`. The same number twice is one cell. Cells may come in any order
    and are counted as they come. If the stream cannot be written to, the display ends but the sweep goes on.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self.stream: TextIO | None = stream
        self.clock = clock
        self.terminal = stream.isatty() and os.environ.get("TERM") != "dumb"
        self.writes: deque[float] = deque(maxlen=WRITES_PER_S)
        self.shown = 0  # columns of the line now on the terminal
        self.start(0)

    def start(self, total_cells: int) -> None:
        """Reset everything and begin a sweep of `total_cells` cells; shows nothing yet."""
        self.total = total_cells
        self.number, self.name, self.doing = 0, "", ""
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

    def cell(self, number: int, name: str) -> None:
        """Show cell `number` of the plan, counted from 1, as the current one. Cells may come in any order."""
        if (number, name) == (self.number, self.name):
            return
        self.over.add(self.number)  # also a cell that was skipped, or whose worker said nothing more
        self.number, self.name, self.limit = number, name, 0
        self.total = max(self.total, number)  # a search adds cells
        self.places.setdefault(number, len(self.places) + 1)
        self._now("", log=name)

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
                self._now_and_log("warming up")
            case events.CompilationBegun():
                self._now_and_log("compiling")
            case events.WarmupEnded(number=number, limit=limit):
                self.timed_since = self.clock()
                self._now(f"warm-up {number}/{limit}", again=number > 1)
            case events.RepetitionEnded(number=number, limit=limit):
                self.repetitions[self.number], self.limit = number, limit
                self._now(f"repetition {number}/{limit}", log="measuring" if number == 1 else "", again=number != 1)
            case events.CellMeasured(node=node):
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
        left = self._left()
        self._now(doing, log=f"{doing}, {left}" if left else doing)

    def note(self, text: str) -> None:
        """Write a line that stays, such as a warning or a failure."""
        if self.terminal:
            line = self._line()
            self._write(f"{self._erased()}{text}\n{line}", line)
        else:
            self._write(f"{text}\n")

    def finish(self) -> None:
        """Erase the line on the terminal, so that the next output starts on an empty one."""
        if self.terminal and self.shown:
            self._write(self._erased())

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
        """Show what the worker does now.

        On a terminal, rewrite the line if the limit of writes allows it; elsewhere write `log`, if not empty. `again`
        marks one more event of the same kind, which may be left out.
        """
        self.doing = doing
        if not self.terminal:
            if log:
                self._write(f"{self._count()}: {log}\n" if self.number else f"{log}\n")
            return
        now = self.clock()
        full = len(self.writes) == WRITES_PER_S and now - self.writes[0] < 1
        if full or (again and self.writes and now - self.writes[-1] < 1 / WRITES_PER_S):
            return
        self.writes.append(now)
        line = self._line()
        self._write(f"\r{line}{' ' * (min(self.shown, self._room()) - _columns(line))}", line)

    def _count(self) -> str:
        return f"cell {self.places[self.number]}/{self.total}"

    def _left(self) -> str:
        """Return `about 2 min left`, or `up to …` while the estimate rests on the limit of repetitions.

        Empty before anything is known and at the end.
        """
        seconds = self.seconds_left()
        if seconds is None or (self.number in self.over and not self._later()):
            return ""
        return f"{'about' if self.seconds else 'up to'} {rough_duration(seconds)} left"

    def _line(self) -> str:
        """Return the line: count, name, stage and time left, cut to the terminal's width, the name first."""
        count = self._count() if self.number else ""
        others = [part for part in (count, self.doing, self._left()) if part]
        name = _cut(self.name, max(self._room() - sum(_columns(part) + 3 for part in others), SHORTEST_NAME))
        return _cut(" · ".join(part for part in (*others[:1], name, *others[1:]) if part), self._room())

    def _room(self) -> int:
        """Return one column less than the terminal has, because some terminals wrap at the last one."""
        return max(_terminal_columns(self.stream) - 1, 1)

    def _erased(self) -> str:
        return f"\r{' ' * min(self.shown, self._room())}\r" if self.shown else ""

    def _write(self, text: str, line: str = "") -> None:
        """Write and flush; `line` is the line then on the terminal."""
        if self.stream is None:
            return
        try:
            self.stream.write(text)
            self.stream.flush()
        except (OSError, ValueError):  # a closed pipe, a closed file, a character that the stream cannot encode
            self.stream = None
        self.shown = _columns(line)


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


def rough_duration(seconds: float) -> str:
    """Format estimated seconds, rounded up coarsely: `5 s`, `40 s`, `2 min`, `1 h 20 min`."""
    if seconds <= 90:
        return f"{max(-(-seconds // 5) * 5, 5):.0f} s"
    minutes = int(-(-seconds // 60))
    if minutes <= 90:
        return f"{minutes} min"
    tens = -(-minutes // 10) * 10
    return f"{tens // 60} h {tens % 60} min" if tens % 60 else f"{tens // 60} h"


def _terminal_columns(stream: TextIO | None) -> int:
    """Return the width of the stream's terminal; if it has none, that of the environment or of standard output."""
    try:
        own = os.get_terminal_size(stream.fileno()).columns if stream else 0
    except (OSError, ValueError, AttributeError):
        own = 0
    return own or shutil.get_terminal_size().columns


def _columns(text: str) -> int:
    """Return the columns that a text takes: East Asian wide characters take two, combining marks none."""
    return len(text) if text.isascii() else sum(map(_width, text))


def _width(character: str) -> int:
    return 0 if unicodedata.combining(character) else 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _cut(text: str, room: int) -> str:
    """Return the text, its end replaced by `…` if it takes more than `room` columns."""
    used = kept = 0  # columns so far; characters that still leave a column for the `…`
    for position, character in enumerate(text):
        used += _width(character)
        if used > room:
            return f"{text[:kept]}…"
        if used < room:
            kept = position + 1
    return text


class ProgressListener(Protocol):
    """Receiver of a sweep's progress, such as `progress.Progress`."""

    def start(self, total_cells: int) -> None:
        """Begin: the plan has `total_cells` cells."""

    def cell(self, number: int, name: str) -> None:
        """Announce that cell `number` of the plan is next; also called for a cell that ends without a worker."""

    def event(self, event: Event) -> None:
        """Handle an event of a worker or of its group; its classes are in `measure.events`."""

    def note(self, text: str) -> None:
        """Show a line to the user."""

    def finish(self) -> None:
        """End: nothing more comes."""


class NullListener:
    """A listener that shows nothing."""

    def start(self, total_cells: int) -> None:
        """Do nothing."""

    def cell(self, number: int, name: str) -> None:
        """Do nothing."""

    def event(self, event: Event) -> None:
        """Do nothing."""

    def note(self, text: str) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing."""
