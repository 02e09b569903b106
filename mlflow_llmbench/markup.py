"""Text from outside on its way into Markdown, HTML, CSV or a terminal: the one place where it is made harmless.

Names of models and files, messages of libraries, and what a model wrote are data, whatever they contain. Every table and
report passes them through here, so that they add no element, link, formula or control sequence to what a person opens.
"""

from __future__ import annotations

import csv
import html as html_entities
import io
import re
from collections.abc import Collection, Iterable, Sequence

_SPACES = re.compile(r"[\t-\r\x85\u2028\u2029]+")
_UNSEEN = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\ud800-\udfff\ufffe\uffff\U000e0000-\U000e007f]"
)
"""Characters that are not seen but act: controls, changes of direction, tags; and what UTF-8 cannot write."""

_MARKDOWN = re.compile(
    r"[|`*\[\]\\~#@]|&(?=[#\w])|<(?![\s\d])"
    r"|(?<![^\W_])_|_(?![^\W_])"  # inside a word an underscore is a letter
    r"|:(?=//|[\w+-]+:)|(?<=www)\."  # addresses become links by themselves, and :name: becomes a picture
    r"|^[->+=]|^\d{1,9}[.)](?=\s|$)",  # only at its beginning would a text be a list, a rule, a quotation or a heading
    re.IGNORECASE,
)
"""What Markdown may take for a mark: CommonMark, tables, GitHub's extensions, and Showdown, which the MLflow UI renders with."""

_FORMULA = re.compile(r"\s*[=+\-@＝＋－＠]")
_NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?")


def plain(text: object) -> str:
    r"""One line of characters that are seen: line breaks and tabs become spaces, and what is unseen is written as `\u202e`."""
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), _SPACES.sub(" ", str(text)))


def markdown(text: object) -> str:
    """A value as inline Markdown that renders as its characters and nothing else.

    Marks become character references, which no renderer takes for marks (CommonMark 0.31 §2.5), unlike backslashes in tables.
    """
    return _MARKDOWN.sub(_references, plain(text).strip())


def _references(found: re.Match[str]) -> str:
    return "".join(f"&#{ord(character)};" if not character.isdigit() else character for character in found[0])


def quotation(text: str) -> str:
    """Text of several lines as a Markdown quotation with its own line breaks and indentation."""
    lines = []
    for line in text.expandtabs(4).splitlines():
        indent = len(line) - len(line.lstrip(" "))
        lines.append(f"> {'&nbsp;' * indent}{markdown(line)}  " if line.strip() else ">")
    return "\n".join(lines)


def code_block(text: str) -> str:
    """Text of several lines as an indented code block of Markdown, where no mark has a meaning. It needs an empty line before it."""
    return "\n".join(f"    {plain(line)}" for line in text.expandtabs(4).splitlines())


def markdown_table(
    heading: Sequence[object],
    body: Iterable[Sequence[object]],
    numeric: Collection[int] = (),
    bold: Collection[tuple[int, int]] = (),
) -> str:
    """A Markdown table, every cell harmless. Columns in `numeric` are aligned to the right; cells (line, column) in `bold` are bold."""
    rules = ["---:" if column in numeric else "---" for column in range(len(heading))]
    lines = [[markdown(cell) for cell in heading], rules]
    for number, line in enumerate(body):
        cells = [markdown(cell) for cell in line]
        lines.append([f"**{cell}**" if (number, column) in bold else cell for column, cell in enumerate(cells)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def html(text: object) -> str:
    """A value as the text of an HTML element or of a quoted attribute."""
    return html_entities.escape(plain(text))


def csv_table(heading: Sequence[object], body: Iterable[Sequence[object]]) -> str:
    r"""A CSV file (RFC 4180, lines end in \n). What a spreadsheet would take for a formula has an apostrophe before it.

    Every cell is quoted: where a semicolon separates, a part of a cell would else become one of its own.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)
    writer.writerows([_csv_cell(cell) for cell in line] for line in [heading, *body])
    return text.getvalue()


def _csv_cell(value: object) -> str:
    text = plain(value)
    return f"'{text}" if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else text
