"""Every exception that this package raises on purpose.

    LlmbenchError
    ├── UsageError             a parameter is wrong; nothing was started
    ├── ModelError             the model cannot be had: unknown, unreachable, gated, damaged
    ├── MissingError           a package, a device or a driver is not there
    ├── TrackingError          the MLflow store refuses, or cannot be what the address says
    │   └── StoreAway          the MLflow server does not answer now
    ├── JournalError           the output folder cannot be written, or a record in it cannot be read
    ├── NotComparable          two results differ in more than what was asked about
    ├── NotFitted              the data are too few, or of the wrong kind, for a law
    ├── OutOfRange             a law was asked about what lies beyond the data that it was fitted to
    └── MeasurementError       the measurement itself failed
        ├── OutOfMemory        memory ran out while loading or generating
        ├── WorkerCrashed      the worker process ended without a word
        │   └── NodeLost       the machine of a cluster that it ran on is gone
        ├── WorkerTimeout      the worker went over a time limit
        └── NotRealised        what was asked for is not what was loaded

A message says what is wrong, with which value, and what to do next, on one line. The command line prints it and
exits with `exit_code`; nothing in the library prints or exits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from .redaction import escape_controls, redact


def first_line(error: BaseException, limit: int = 200) -> str:
    """The first line of a foreign error's text without secrets, cut to `limit` characters; its class name if it has no text."""
    text = redact(str(error)).strip()  # before it is cut: half a secret is not recognised
    return escape_controls(text.splitlines()[0])[:limit] if text else type(error).__name__


class LlmbenchError(Exception):
    """Base of all errors of this package. Its message is one line that holds neither a secret nor a control character, whatever it was made of."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(escape_controls(redact(message)))


class UsageError(LlmbenchError):
    """A parameter is wrong; nothing was started."""

    exit_code = 2


class ModelError(LlmbenchError):
    """The model cannot be had: unknown, unreachable, gated or damaged."""


class MissingError(LlmbenchError):
    """A package, a device or a driver that the request needs is not there."""


class TrackingError(LlmbenchError):
    """The MLflow store refuses, or cannot be what the address says."""


class StoreAway(TrackingError):
    """The MLflow server does not answer now; it may later."""


class JournalError(LlmbenchError):
    """The output folder cannot be written, or a record in it cannot be read."""


class NotComparable(LlmbenchError):
    """Two results differ in more than what was asked about, or one of them cannot be trusted; nothing was compared."""

    exit_code = 2


class NotFitted(LlmbenchError):
    """The data are too few, or of the wrong kind, for a law; no parameters were made up."""

    exit_code = 2


class OutOfRange(LlmbenchError):
    """A law was asked about what lies beyond the data that it was fitted to; nothing was extrapolated."""

    exit_code = 2


class MeasurementError(LlmbenchError):
    """The measurement failed. `outcome` is the word of the vocabulary for it."""

    outcome = "error"


class OutOfMemory(MeasurementError):
    """Memory ran out while loading or generating."""

    outcome = "oom"


class WorkerCrashed(MeasurementError):
    """The worker process ended without saying why."""

    outcome = "crashed"


class NodeLost(WorkerCrashed):
    """The machine of a cluster that the worker ran on is gone; what it had not measured can be measured on another."""


class WorkerTimeout(MeasurementError):
    """The worker went over a time limit."""

    outcome = "timeout"


class NotRealised(MeasurementError):
    """What was asked for (a quantization, a dtype, a device) is not what was loaded."""


NO_MEMORY = (
    "can't allocate memory",
    "cannot allocate",
    "failed to allocate",
    "not enough memory",
    "out of memory",
    "bad_alloc",
    "available memory on node",
)
"""Words with which libraries say that memory ran out, in lower case."""


@contextlib.contextmanager
def foreign_errors(doing: str, library: str = "", said: Callable[[Exception], str] = first_line) -> Iterator[None]:
    """Map the errors of a library to ours, each on one line: OutOfMemory where its text or class says so, else MeasurementError."""
    try:
        yield
    except LlmbenchError:
        raise
    except MemoryError:
        raise OutOfMemory(f"Memory ran out while {doing}.") from None
    except Exception as error:
        kind = type(error).__name__
        text = (
            f"{library} failed while {doing}: {kind}: {said(error)}"
            if library
            else f"{kind} while {doing}: {said(error)}"
        )
        lacked = kind == "OutOfMemoryError" or any(word in str(error).lower() for word in NO_MEMORY)
        raise (OutOfMemory if lacked else MeasurementError)(text) from error
