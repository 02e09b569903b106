"""Print on the terminal: help pages, one line of JSON, and warnings of versions."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TextIO

from ..records.invocation import LATEST
from ..records.redaction import Terminal

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from ..sweeps.progress import Progress


def console(stream: TextIO) -> Console:
    """Return rich's console for text of ours: it has colours on a terminal only, and none with NO_COLOR.

    It writes past `Terminal`, which escapes colours: pass no text that comes from elsewhere.
    """
    from rich.console import Console

    under = stream.stream if isinstance(stream, Terminal) else stream
    return Console(file=under, highlight=False, markup=False, emoji=False)


def show(page: RenderableType, stream: TextIO | None = None) -> None:
    """Print a page of ours, on stdout unless another stream is given."""
    console(stream or sys.stdout).print(page, end="", soft_wrap=True)


@contextlib.contextmanager
def progress(plans: bool = True) -> Iterator[Progress]:
    """Show the progress of a sweep on stderr, and take it off the terminal at the end, however that comes.

    It begins with the planning, unless something is printed before the sweep begins.
    """
    from ..measure.events import Stage
    from ..sweeps.progress import Progress

    shown = Progress(sys.stderr)
    if plans and shown.live:
        shown.event(Stage("planning"))
    try:
        yield shown
    finally:
        shown.finish()


def print_json(data: object, ensure_ascii: bool = False) -> None:
    """Print data as one line of JSON."""
    print(json.dumps(data, ensure_ascii=ensure_ascii))


def known(references: Sequence[str], tracking_uri: str | None, experiment: str | None = None) -> list[str]:
    """Return references of results, with the newest sweep for `latest`, and say on stderr which one that is.

    Raises UsageError if there is none, and TrackingError.
    """
    if LATEST not in references:
        return [*references]
    from ..tracking.latest import resolve

    resolved = [resolve(one, tracking_uri, experiment) for one in references]
    for found in dict.fromkeys(found for _, found in resolved if found):
        print(f"The latest sweep: {found}.", file=sys.stderr)
    return [text for text, _ in resolved]


def print_version_warnings() -> None:
    """Print a line on stderr for each package that is older than its oldest safe version."""
    from ..backends.packages import warnings_of_versions

    for line in warnings_of_versions():
        print(f"llmbench: {line}", file=sys.stderr)
