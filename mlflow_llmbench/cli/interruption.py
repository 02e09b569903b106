"""Signals that end a command in order: the first one interrupts it, and cannot get lost."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""From Ctrl-C, a scheduler, or a closed terminal."""

AGAIN_S = 0.01
"""Seconds after which an interruption that Python has dropped is raised again."""


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt at the first signal. Later ones are ignored, also after the block.

    Until then every run has ended and its results are saved. A signal that comes while Python runs a finalizer, such as
    those of SQLAlchemy, would be printed and dropped there: it is raised again soon after.
    """
    for name in SIGNALS:
        signal.signal(name, _interrupt)
    before = sys.unraisablehook
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, _interrupt)

        def dropped(unraisable: Any) -> None:
            if unraisable.exc_type is KeyboardInterrupt:
                signal.setitimer(signal.ITIMER_REAL, AGAIN_S)
            else:
                before(unraisable)

        sys.unraisablehook = dropped
    try:
        yield
    finally:
        sys.unraisablehook = before


def _interrupt(*_: object) -> None:
    for name in SIGNALS:
        signal.signal(name, signal.SIG_IGN)
    raise KeyboardInterrupt
