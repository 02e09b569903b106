"""Display of a sweep on a terminal, by rich: finished rows above, and below them a block of two lines that is redrawn.

    ✓ int4 b1    104 tokens/s · TTFT 25.1 ms · 0.61 GB · valid
    cell 2/8 · int4 b4 · repetition 7/30 · 371 tokens/s · 12 s
    ━━━━━━━━━━━╸────────────────── about 4 min left, until 14:32

It has no thread and no timer: it is drawn in the calls of its methods, 0.2 to 0.4 ms each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

from ..records.redaction import Terminal, escape_controls, redact

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

BAR_COLUMNS = 30
SHORTEST_NAME = 12
"""Columns that a cell's name keeps on a narrow terminal; beyond that the rest of the line is cut."""


@dataclass(frozen=True)
class Status:
    """What is shown. `done`: cells that are done, with the share of the present one. `left`: time to the end.

    `load`: the last seconds of a load that is still sent, a line of its own.
    """

    place: str
    name: str
    doing: tuple[str, ...]
    done: float
    total: int
    left: str
    load: str = ""


class LiveDisplay:
    """The block at the bottom of a terminal. If the stream cannot be written to, it ends, and nothing else does."""

    def __init__(self, stream: TextIO) -> None:
        self.stream: TextIO | None = stream.stream if isinstance(stream, Terminal) else stream
        self.live: Live | None = None

    def draw(self, status: Status) -> None:
        """Draw the block anew."""
        self._try(lambda live: live.update(block(status, live.console.width - 1), refresh=True))

    def note(self, text: str, mark: str = "") -> None:
        """Write a line that stays above the block; `mark` is a style of rich for its first word."""
        from rich.text import Text

        line = Text(cleaned(text, keep="\n"))
        line.stylize(mark, 0, 1)
        self._try(lambda live: live.console.print(line, soft_wrap=True))

    def stop(self) -> None:
        """Erase the block, so that the next output starts on an empty line."""
        if self.live:
            self._try(lambda live: live.stop())
            self.live = None

    def _try(self, draw: Callable[[Live], object]) -> None:
        try:
            if self.stream is not None:
                self.live = self.live or _started(self.stream)
                draw(self.live)
        except (OSError, ValueError):  # a closed pipe, a closed file, a character that the stream cannot encode
            self.stream = None


def _started(stream: TextIO) -> Live:
    """Return the block, which keeps the cursor visible: a killed command must not leave a terminal without one."""
    from rich.console import Console
    from rich.live import Live

    class Plain(Console):
        def on_broken_pipe(self) -> None:  # rich would end the program
            raise BrokenPipeError

    console = Plain(file=stream, highlight=False, markup=False, emoji=False)
    live = Live(console=console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False)
    live.start()
    console.show_cursor(True)
    return live


def block(status: Status, room: int) -> RenderableType:
    """Return the lines of a status, `room` columns wide: two, or three with a load."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    after = "".join(f" · {part}" for part in status.doing if part)
    before = f"{status.place} · " if status.place else ""
    line = Text(no_wrap=True, overflow="ellipsis")
    name = Text(status.name, style="bold", no_wrap=True)
    name.truncate(max(room - Text(before + after).cell_len, SHORTEST_NAME), overflow="ellipsis")
    line.append(before, "dim").append_text(name).append(after if name else after.removeprefix(" · "))
    line.truncate(room, overflow="ellipsis")
    bar = Table.grid(padding=(0, 1))
    width = min(BAR_COLUMNS, max(room // 2, 1))
    left = Text(status.left, no_wrap=True, overflow="ellipsis")
    bar.add_row(ProgressBar(total=status.total or 1, completed=status.done, width=width), left)
    load = Text(status.load, no_wrap=True, overflow="ellipsis")
    load.truncate(room, overflow="ellipsis")
    return Group(line, *([load] if status.load else []), bar)


def cleaned(text: str, keep: str = "") -> str:
    """Return a text without secrets and control characters, since rich writes past the stream that masks them."""
    return escape_controls(redact(text), keep=keep)
