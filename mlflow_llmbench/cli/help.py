"""Help pages: the program's commands in groups, and a command's options in panels.

The short page of a command shows what people use first, the long one all options. A page is text of rich, wrapped here,
so that it is the same on a terminal and in a file, but for its colours.
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from ..records.parameter import PANELS
from .options import Command, Option

if TYPE_CHECKING:
    from rich.text import Text

WIDEST = 110
"""Most columns of a page; longer lines are hard to read."""

LEFT = 30
"""Columns of names; a longer name has its help on the next line."""

HEADING, NAME, METAVAR = "bold", "cyan", "dim"

SWEEPS = "A value with ,… takes a list, which makes a sweep: one run for each combination."

EXAMPLES = (
    "quickstart",
    "recommend --max-memory 6GB --max-ttft 200ms",
)
"""Two calls for the program's own page."""


def program_page(groups: Mapping[str, Sequence[Command]], program: str) -> Text:
    """Return the page of the program."""
    page = _Page()
    page.paragraph("Honest benchmarks of quantized language models, each one an MLflow run.")
    page.usage(f"{program} COMMAND [OPTIONS]")
    for title, commands in groups.items():
        page.heading(title)
        page.rows(((command.name, "", command.help) for command in commands), left=14)
    page.heading("Options")
    page.rows([("--version", "", "show the version"), ("-h, --help", "", "show this page")], left=14)
    page.examples(program, EXAMPLES)
    page.paragraph(f"`{program} COMMAND --help` shows the options of a command.")
    return page.text


def command_page(command: Command, program: str, all: bool) -> Text:
    """Return the page of a command, with all of its options or with those that people use first."""
    first = _first(command)
    others = [option for option in command.options if option not in [*command.positional, *first]]
    page = _Page()
    page.paragraph(command.sentence)
    if command.description:
        page.paragraph(command.description)
    if any(option.metavar.endswith(",…") and option.panel for option in command.options):
        page.paragraph(SWEEPS)
    page.usage(command.usage(program))
    if command.positional:
        page.heading("Arguments")
        page.options(command.positional)
    if first:
        page.heading("Common options")
        page.options(first)
    panels = {"": "Options", **PANELS} if all or not first else {}
    for key, title in panels.items():
        if chosen := [option for option in others if option.panel == key]:
            page.heading(title)
            page.options(chosen)
    page.examples(program, command.examples)
    if others and not panels:
        page.paragraph(f"{len(others)} more options: `{program} {command.name} --help-all`.")
    return page.text


def has_more(command: Command) -> bool:
    """Return True if the short page of a command leaves options out."""
    return bool(command.first)


def _first(command: Command) -> list[Option]:
    by_name = {option.argument: option for option in command.options}
    return [by_name[name] for name in command.first]


class _Page:
    """A page as it is written, from top to bottom."""

    def __init__(self) -> None:
        from rich.text import Text

        self.text = Text()
        self.width = min(shutil.get_terminal_size().columns, WIDEST)

    def paragraph(self, text: str) -> None:
        """Write a paragraph, after an empty line."""
        self._gap()
        self.text.append(textwrap.fill(text, self.width) + "\n")

    def heading(self, title: str) -> None:
        """Begin a section."""
        self._gap()
        self.text.append(f"{title}\n", HEADING)

    def usage(self, call: str) -> None:
        """Write how the command is called."""
        self._gap()
        self.text.append("Usage: ", HEADING).append(f"{call}\n")

    def options(self, options: Iterable[Option]) -> None:
        """Write options or arguments."""
        self.rows(
            ("" if one.positional else ", ".join(filter(None, [one.name, one.short])), one.called, one.help)
            for one in options
        )

    def rows(self, rows: Iterable[tuple[str, str, str]], left: int = LEFT) -> None:
        """Write names with their metavars on the left, help on the right."""
        for name, metavar, told in rows:
            length = len(name) + len(metavar) + bool(name and metavar)
            self.text.append("  ").append(name, NAME)
            self.text.append(f"{' ' if name and metavar else ''}").append(metavar, METAVAR if name else NAME)
            lines = textwrap.wrap(told, max(self.width - left - 4, 20), break_long_words=False, break_on_hyphens=False)
            if length > left:
                self.text.append("\n")
                length = -2
            for line in lines:
                self.text.append(" " * (left - length + 2) + line + "\n")
                length = -2

    def examples(self, program: str, examples: Iterable[str]) -> None:
        """Write calls that work as they stand, with the names of your results."""
        if examples:
            self.heading("Examples")
            for one in examples:
                self.text.append(f"  {program} {one}\n")

    def _gap(self) -> None:
        if self.text:
            self.text.append("\n")
