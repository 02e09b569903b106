"""Escape untrusted text for Markdown and the terminal; templates escape HTML (`reports.html`).

Names of models and files, messages of libraries, and outputs of models are data, whatever they contain. Every table and
report passes them through here, so they cannot add an element, link, formula or control sequence to it.
"""

from __future__ import annotations

import re

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
