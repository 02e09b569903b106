"""Tables: as text for a terminal, as Markdown, as CSV, and in the layout that the MLflow UI shows.

Every cell is escaped for the place where it is shown. An absent value is None, or `MISSING` if it is text already.
"""

from __future__ import annotations

import csv
import io
import re
import shutil
import sys
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .escaping import markdown, plain

MISSING = "–"
GAP = "  "
"""Space between two columns of a text table."""

NARROWEST = 12
"""Least width to which a column of words is wrapped. In a terminal too narrow for that, lines get longer than it."""

_FORMULA = re.compile(r"\s*[=+\-@＝＋－＠]")
_NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?")


@dataclass(frozen=True)
class Table:
    """A table. Columns in `numeric` hold numbers, those in `measured` measured values.

    Cells (line, column) in `best` are the best of their column.
    """

    heading: tuple[str, ...]
    body: tuple[tuple[str, ...], ...]
    numeric: frozenset[int] = frozenset()
    measured: frozenset[int] = frozenset()
    best: frozenset[tuple[int, int]] = frozenset()


def text_table(
    heading: Sequence[object],
    body: Iterable[Sequence[object]],
    numeric: Collection[int] = (),
    width: int | None = None,
) -> str:
    """Return a table as text: columns in `numeric` are right-aligned, the others are left-aligned and wrapped.

    `width` is the length of a line in columns of the terminal. Without it, it is that of the terminal, and unlimited
    if the output goes to a file or pipe.
    """
    return "\n".join(line for lines in aligned([heading, *body], numeric, width) for line in lines)


def aligned(
    rows: Iterable[Sequence[object]], numeric: Collection[int] = (), width: int | None = None
) -> list[list[str]]:
    """Return the text lines of each row of a table; a row has several if a cell is wrapped. See `text_table`."""
    cells = [[MISSING if cell is None else plain(cell) for cell in row] for row in rows]
    if not cells:
        return []
    widths = [max(map(display_width, column)) for column in zip(*cells, strict=True)]
    limit = width or _terminal_width()
    if limit:
        _narrow(widths, numeric, limit)
    return [_lines(row, widths, numeric) for row in cells]


def display_width(text: str) -> int:
    """Return the number of terminal columns that a text takes: 2 for a wide character, 0 for a combining one."""
    return sum(
        0 if unicodedata.category(character) in ("Mn", "Me", "Cf") else 1 + _is_wide(character) for character in text
    )


def _is_wide(character: str) -> bool:
    return unicodedata.east_asian_width(character) in ("W", "F")


def _terminal_width() -> int | None:
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def _narrow(widths: list[int], numeric: Collection[int], limit: int) -> None:
    """Narrow the widest columns of words, one character at a time, until a line fits."""
    words = [column for column in range(len(widths)) if column not in numeric]
    while words and sum(widths) + len(GAP) * (len(widths) - 1) > limit:
        widest = max(words, key=lambda column: widths[column])
        if widths[widest] <= NARROWEST:
            return
        widths[widest] -= 1


def _lines(row: Sequence[str], widths: Sequence[int], numeric: Collection[int]) -> list[str]:
    wrapped = [_wrapped(cell, width) for cell, width in zip(row, widths, strict=True)]
    lines = []
    for number in range(max(map(len, wrapped))):
        cells = []
        for column, (parts, width) in enumerate(zip(wrapped, widths, strict=True)):
            text = parts[number] if number < len(parts) else ""
            space = " " * (width - display_width(text))
            cells.append(space + text if column in numeric else text + space)
        lines.append(GAP.join(cells).rstrip())
    return lines


def _wrapped(text: str, width: int) -> list[str]:
    """Break a text at spaces so that each part fits into `width`; a longer word is broken where it must be."""
    if display_width(text) <= width:
        return [text]
    lines = [""]
    for word in text.split():
        if lines[-1] and display_width(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        if lines[-1]:
            lines.append("")
        for character in word:
            if lines[-1] and display_width(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    return lines


def p_text(value: float | None) -> str:
    """Format a p value with three decimals; `<0.001` below."""
    return MISSING if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"


def range_text(low: float | None, high: float | None) -> str:
    """Format the interval of a ratio: `0.952 to 1.034`."""
    return MISSING if low is None or high is None else f"{low:.3f} to {high:.3f}"


def markdown_table(
    heading: Sequence[object],
    body: Iterable[Sequence[object]],
    numeric: Collection[int] = (),
    bold: Collection[tuple[int, int]] = (),
) -> str:
    """Return a Markdown table with every cell escaped.

    Columns in `numeric` are right-aligned. Cells (line, column) in `bold` are bold.
    """
    lines = []
    for number, line in enumerate(body):
        cells = [markdown(cell) for cell in line]
        lines.append([f"**{cell}**" if (number, column) in bold else cell for column, cell in enumerate(cells)])
    return table_of_markdown([markdown(cell) for cell in heading], lines, numeric)


def table_of_markdown(heading: Sequence[str], body: Iterable[Sequence[str]], numeric: Collection[int] = ()) -> str:
    """Return a Markdown table of cells that are Markdown already: text of ours, or escaped."""
    rules = ["---:" if column in numeric else "---" for column in range(len(heading))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heading, rules, *body))


def csv_table(heading: Sequence[object], body: Iterable[Sequence[object]]) -> str:
    r"""Return a CSV file (RFC 4180, but lines end in \n). An apostrophe precedes anything that looks like a formula.

    Every cell is quoted, because where semicolons separate, part of a cell could otherwise become a cell of its own.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)
    writer.writerows([_csv_cell(cell) for cell in line] for line in [heading, *body])
    return text.getvalue()


def _csv_cell(value: object) -> str:
    text = plain(value)
    return f"'{text}" if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else text


def split_table(heading: Sequence[str], body: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """Return a table in pandas' "split" layout, which the MLflow UI shows and compares between runs."""
    return {"columns": list(heading), "data": [list(row) for row in body]}
