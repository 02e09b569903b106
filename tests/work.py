"""Work of a function, counted and not timed, so that a busy machine changes nothing."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any


def calls(work: Callable[[], object]) -> int:
    """Number of calls of functions, of Python and of C, that a function makes in this thread."""
    count = 0

    def seen(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(seen)
    try:
        work()
    finally:
        sys.setprofile(before)
    return count


def cpu_s(command: Sequence[str], **given: Any) -> tuple[float, subprocess.CompletedProcess[str]]:
    """CPU seconds of a command and of its children, with what it printed; `given` is for `subprocess.run`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, check=False, **given)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done
