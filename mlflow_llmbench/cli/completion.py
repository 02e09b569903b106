"""Completion by the shell: the script that it needs, and the values of an option.

click asks this program for them while a command is typed, with `_LLMBENCH_COMPLETE` in the environment.
"""

from __future__ import annotations

from collections.abc import Iterator

from click.shell_completion import get_completion_class

from ..records.errors import UsageError
from ..records.invocation import PROGRAM
from ..records.text import known_words
from .options import Option

VARIABLE = "_LLMBENCH_COMPLETE"
SHELLS = ("bash", "zsh", "fish")


def script(shell: str) -> str:
    """Return the script for a shell. Raises UsageError for an unknown one."""
    found = get_completion_class(shell) if shell in SHELLS else None
    if found is None:
        raise UsageError(f"Unknown shell: {shell}. {known_words(shell, SHELLS)}")
    import click

    return found(click.Command(PROGRAM), {}, PROGRAM, VARIABLE).source()


def values(option: Option, incomplete: str) -> Iterator[tuple[str, str]]:
    """Yield the values that an incomplete one can become, with click's type of completion: `plain`, `file` or `dir`.

    Of a list, the part after the last comma is completed.
    """
    before, comma, word = incomplete.rpartition(",") if option.listed else ("", "", incomplete)
    words = option.words
    if option.metavar.startswith("MODEL"):
        from ..config.models import PRESETS

        words = tuple(PRESETS)
    found = [one for one in words if one.startswith(word)]
    for one in found:
        yield f"{before}{comma}{one}", "plain"
    if not found and option.metavar.startswith("FOLDER"):
        yield incomplete, "dir"
    elif not found and any(kind in option.metavar for kind in ("FILE", "MODEL", "PYTHON")):
        yield incomplete, "file"
