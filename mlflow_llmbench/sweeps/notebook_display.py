"""Display of a sweep in a notebook: finished rows, and below them the block of `live_display`, replaced in place.

It needs nothing but the notebook: no widgets, no script, no thread. A notebook that is saved keeps the finished rows.
"""

from __future__ import annotations

import io
import uuid
from typing import TYPE_CHECKING

from .live_display import Status, block, cleaned

if TYPE_CHECKING:
    from rich.console import RenderableType

COLUMNS = 100

CODE = '<pre style="white-space: pre-wrap; line-height: 1.4; margin: 0; font-family: monospace">{code}</pre>'


class NotebookDisplay:
    """One output of a notebook's cell."""

    def __init__(self) -> None:
        self.rows: list[RenderableType] = []
        self.name = uuid.uuid4().hex
        self.is_shown = False

    def draw(self, status: Status) -> None:
        """Draw the block anew."""
        self._show(block(status, COLUMNS))

    def note(self, text: str, mark: str = "") -> None:
        """Write a line that stays above the block; `mark` is a style of rich for its first word."""
        from rich.text import Text

        line = Text(cleaned(text, keep="\n"))
        line.stylize(mark, 0, 1)
        self.rows.append(line)
        self._show()

    def stop(self) -> None:
        """Take the block away; the rows stay."""
        if self.is_shown:
            self._show()

    def _show(self, *below: RenderableType) -> None:
        """Publish the rows and what is below them, in place of what was published before."""
        from IPython.display import publish_display_data
        from rich.console import Console

        console = Console(
            file=io.StringIO(), record=True, width=COLUMNS, force_terminal=True, force_jupyter=False,
            color_system="truecolor", highlight=False, markup=False, emoji=False,
        )  # fmt: skip
        for one in [*self.rows, *below]:
            console.print(one)
        data = {
            "text/html": console.export_html(inline_styles=True, code_format=CODE, clear=False),
            "text/plain": console.export_text(),
        }
        publish_display_data(data, transient={"display_id": self.name}, update=self.is_shown)
        self.is_shown = True


def in_notebook() -> bool:
    """Return True if this process is the kernel of a notebook."""
    from rich.console import Console

    return Console().is_jupyter
