"""Escape untrusted text for Markdown, HTML, CSV and the terminal. This is the only module that does.

Names of models and files, messages of libraries, and outputs of models are data, whatever they contain. Every table and
report passes them through here, so they cannot add an element, link, formula or control sequence to it.
"""

from __future__ import annotations

import csv
import html as html_entities
import io
import re
from collections.abc import Collection, Iterable, Sequence

_SPACES = re.compile(r"[\t-\r\x85\u2028\u2029]+")
_UNSEEN = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff"
    r"\ufff9-\ufffb\ud800-\udfff\ufffe\uffff\U000e0000-\U000e007f]"
)
"""Invisible characters that have an effect (controls, changes of direction, tags), and those UTF-8 cannot encode."""

_MARKDOWN = re.compile(
    r"[|`*\[\]\\~#@]|&(?=[#\w])|<(?![\s\d])"
    r"|(?<![^\W_])_|_(?![^\W_])"  # inside a word an underscore is a letter
    r"|:(?=//|[\w+-]+:)|(?<=www)\."  # URLs become links by themselves, and :name: becomes an emoji
    r"|^[->+=]|^\d{1,9}[.)](?=\s|$)",  # list, rule, quotation and heading marks count only at the beginning
    re.IGNORECASE,
)
"""Possible marks of Markdown: CommonMark, tables, GitHub's extensions, and Showdown, the renderer of the MLflow UI."""

_FORMULA = re.compile(r"\s*[=+\-@＝＋－＠]")
_NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?")


def plain(text: object) -> str:
    r"""Return one line of visible text: line breaks and tabs become spaces, invisible characters escapes (`\u202e`)."""
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), _SPACES.sub(" ", str(text)))


def markdown(text: object) -> str:
    """Return a value as inline Markdown that renders as exactly its characters.

    Marks become character references, which no renderer takes for marks (CommonMark 0.31 §2.5). Backslashes would not
    do in tables.
    """
    return _MARKDOWN.sub(_references, plain(text).strip())


def _references(found: re.Match[str]) -> str:
    return "".join(f"&#{ord(character)};" if not character.isdigit() else character for character in found[0])


def quotation(text: str) -> str:
    """Return text of several lines as a Markdown quotation that keeps its line breaks and indentation."""
    lines = []
    for line in text.expandtabs(4).splitlines():
        indent = len(line) - len(line.lstrip(" "))
        lines.append(f"> {'&nbsp;' * indent}{markdown(line)}  " if line.strip() else ">")
    return "\n".join(lines)


def code_block(text: str) -> str:
    """Return text of several lines as an indented Markdown code block, in which marks have no meaning.

    It needs an empty line before it.
    """
    return "\n".join(f"    {plain(line)}" for line in text.expandtabs(4).splitlines())


def markdown_table(
    heading: Sequence[object],
    body: Iterable[Sequence[object]],
    numeric: Collection[int] = (),
    bold: Collection[tuple[int, int]] = (),
) -> str:
    """Return a Markdown table with every cell escaped.

    Columns in `numeric` are right-aligned. Cells (line, column) in `bold` are bold.
    """
    rules = ["---:" if column in numeric else "---" for column in range(len(heading))]
    lines = [[markdown(cell) for cell in heading], rules]
    for number, line in enumerate(body):
        cells = [markdown(cell) for cell in line]
        lines.append([f"**{cell}**" if (number, column) in bold else cell for column, cell in enumerate(cells)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def html(text: object) -> str:
    """Escape a value for the text of an HTML element or for a quoted attribute."""
    return html_entities.escape(plain(text))


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
