"""Where a sweep is: which cell of how many, which stage, and how long still. Written to a text stream, for a person who waits.

Nothing here runs by itself: no thread, no timer. An event of the worker costs a few microseconds and at most one short
write, so the display takes no CPU from the model that is being measured. On a terminal one line is rewritten; elsewhere
(CI, the log of an MLflow run) there is a plain line at each change of stage and none per repetition. No colours, no
escape sequences: a line is erased with spaces.
"""

from __future__ import annotations

import os
import shutil
import time
import unicodedata
from collections import deque
from collections.abc import Callable, Mapping
from statistics import fmean
from typing import Any, TextIO

WRITES_PER_S = 4
"""Most writes to a terminal in any second. Of these, repetitions use what is left by changes of stage."""

SHORTEST_NAME = 12
"""Columns that a cell's name keeps in a narrow terminal before the rest of the line is cut."""

STAGES = {"starting": "starting", "loading": "loading", "loaded": "loaded", "peak": "finishing", "unloaded": "unloaded"}
"""Stage of a worker → what is shown. *baseline* is a reading, nothing that one waits for."""


class Progress:
    """The display of one sweep: `start`, then for each cell `cell` and the worker's events, then `finish`.

    A worker numbers the cells of its own group. The sweep knows their names and positions, and calls `cell` before it
    starts a worker, or on the worker's event `cell`, or both: the same number twice is one cell. A stream that cannot be
    written to ends the display, never the sweep.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self.stream: TextIO | None = stream
        self.clock = clock
        self.terminal = stream.isatty() and os.environ.get("TERM") != "dumb"
        self.writes: deque[float] = deque(maxlen=WRITES_PER_S)
        self.shown = 0  # columns of the line that stands on the terminal
        self.start(0)

    def start(self, total_cells: int) -> None:
        """Begin: nothing is known, nothing is shown."""
        self.total = total_cells
        self.number, self.name, self.doing = 0, "", ""
        self.seconds: dict[int, float] = {}  # number of a measured cell → its seconds, with its share of starting and loading
        self.repetitions: dict[int, int] = {}  # number of a cell → repetitions done
        self.limit = 0  # most repetitions of this cell
        self.since = self.clock()  # when the last cell ended, or the sweep began
        self.timed_since = self.since  # when the repetitions of this cell began

    def cell(self, number: int, name: str) -> None:
        """Cell `number` of the sweep, counted from 1 in the order of measurement, is next."""
        if (number, name) == (self.number, self.name):
            return
        self.number, self.name, self.doing, self.limit = number, name, "", 0
        self._show(name)

    def event(self, event: Mapping[str, Any]) -> None:
        """One event of the worker, as `supervise.run_worker` passes it on. Unknown events change nothing."""
        match event["event"]:
            case "stage" if event["stage"] in STAGES:
                if not (event["stage"] == "loaded" and self.doing.startswith("loaded")):  # the event `load` said so, and how long
                    self._now(STAGES[event["stage"]], say=event["stage"] not in ("peak", "unloaded"))
            case "load":
                self._now(f"loaded in {duration(event['info']['load_s'])}" if event.get("info") else "loaded")
            case "cell":
                self.repetitions[self.number] = self.limit = 0
                self.timed_since = self.clock()
                self._now("warming up")
            case "warmup":
                self.timed_since = self.clock()
                self._now(f"warm-up {event['number']}/{event['limit']}", say=False)
            case "repetition":
                self.repetitions[self.number], self.limit = event["number"], event["limit"]
                self._now(f"repetition {event['number']}/{event['limit']}", say=False, stage=False)
                if event["number"] == 1:
                    self._say("measuring")
            case "measured":
                taken = self._end_of_cell()
                self.seconds[self.number] = self.seconds.get(self.number, 0.0) + taken
                self._now(f"measured in {duration(taken)}", rest=True)
            case "failed":
                self._end_of_cell()
                self._now("failed")
            case "end":
                self._end_of_cell()

    def note(self, text: str) -> None:
        """A line that stays: a warning, a failure."""
        if self.terminal:
            self._write(f"{self._erased()}{text}\n{self._line()}", self._line())
        else:
            self._write(f"{text}\n")

    def finish(self) -> None:
        """Take the line off the terminal, so that what is printed next starts in an empty one."""
        if self.terminal and self.shown:
            self._write(self._erased(), "")

    def seconds_left(self) -> float | None:
        """Estimated seconds to the end; None before anything is known.

        Of this cell: its repetitions still to do at their pace so far, or what the mean of the measured cells leaves.
        Of each later cell: the mean of the measured cells, or this one's estimated whole. Repetitions still to do are
        those that measured cells needed on average, or without one the limit, which makes an upper bound of it.
        """
        now = self.clock()
        cell_s = fmean(self.seconds.values()) if self.seconds else None
        done = self.repetitions.get(self.number, 0)
        if self.number in self.seconds:
            here: float = 0.0
        elif done and self.limit:
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
        return here + max(self.total - self.number, 0) * cell_s

    def _end_of_cell(self) -> float:
        """Start the count of the next cell; returns the seconds since the one before ended."""
        now = self.clock()
        taken, self.since = now - self.since, now
        return taken

    def _now(self, doing: str, say: bool = True, stage: bool = True, rest: bool = False) -> None:
        """What the worker does now. `say`: worth a line of a log · `stage`: not only one more repetition · `rest`: with the time left."""
        self.doing = doing
        if self.terminal:
            self._show("", stage)
        elif say:
            self._say(doing + self._rest(", ") if rest else doing)

    def _say(self, text: str) -> None:
        if not self.terminal:
            self._show(text)

    def _show(self, text: str, stage: bool = True) -> None:
        """Without a terminal write a line of text; on one rewrite the line, if the limit of writes allows it."""
        if not self.terminal:
            self._write(f"{self._count()}: {text}\n" if self.number else f"{text}\n")
            return
        now = self.clock()
        full = len(self.writes) == WRITES_PER_S and now - self.writes[0] < 1
        if full or (not stage and self.writes and now - self.writes[-1] < 1 / WRITES_PER_S):
            return
        self.writes.append(now)
        line = self._line()
        self._write(f"\r{line}{' ' * (self.shown - _columns(line))}", line)

    def _count(self) -> str:
        return f"cell {self.number}/{self.total}"

    def _rest(self, before: str) -> str:
        """`about 2 min left`, or `up to …` while it rests on the limit of repetitions; empty before anything is known and at the end."""
        left = self.seconds_left()
        if left is None or (self.number in self.seconds and self.number >= self.total):
            return ""
        return f"{before}{'about' if self.seconds else 'up to'} {rough_duration(left)} left"

    def _line(self) -> str:
        """The line as wide as the terminal allows, one column less, because some wrap at the last one."""
        room = max(_terminal_columns(self.stream) - 1, 1)
        parts = [self._count() if self.number else "", self.name, self.doing, self._rest("")]
        others = sum(_columns(part) + 3 for part in parts if part and part is not self.name)
        parts[1] = _cut(self.name, max(room - others, SHORTEST_NAME))
        return _cut(" · ".join(part for part in parts if part), room)

    def _erased(self) -> str:
        return f"\r{' ' * self.shown}\r" if self.shown else ""

    def _write(self, text: str, line: str = "") -> None:
        """Write and flush; `line` is what then stands on the terminal."""
        if self.stream is None:
            return
        try:
            self.stream.write(text)
            self.stream.flush()
        except (OSError, ValueError):  # a closed pipe, a closed file, a character that the stream cannot encode
            self.stream = None
        self.shown = _columns(line)


def duration(seconds: float) -> str:
    """Seconds that were measured, for reading: `0.4 s`, `41 s`, `3 min 5 s`, `2 h 7 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def rough_duration(seconds: float) -> str:
    """Seconds that were estimated, rounded up to what an estimate is worth: `5 s`, `40 s`, `2 min`, `1 h 20 min`."""
    if seconds <= 90:
        return f"{max(-(-seconds // 5) * 5, 5):.0f} s"
    minutes = int(-(-seconds // 60))
    if minutes <= 90:
        return f"{minutes} min"
    tens = -(-minutes // 10) * 10
    return f"{tens // 60} h {tens % 60} min" if tens % 60 else f"{tens // 60} h"


def _terminal_columns(stream: TextIO | None) -> int:
    """Width of the terminal behind the stream; of the one that the environment or standard output tells of where it has none."""
    try:
        own = os.get_terminal_size(stream.fileno()).columns if stream else 0
    except (OSError, ValueError, AttributeError):
        own = 0
    return own or shutil.get_terminal_size().columns


def _columns(text: str) -> int:
    """Columns that a text takes: East Asian wide characters take two, combining marks none."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _cut(text: str, room: int) -> str:
    """The text, with `…` for its end if it takes more than `room` columns."""
    if _columns(text) <= room:
        return text
    kept = text
    while kept and _columns(kept) > room - 1:
        kept = kept[:-1]
    return f"{kept}…"
