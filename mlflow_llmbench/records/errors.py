"""Exceptions of this package.

    LlmbenchError
    ├── UsageError             a parameter is wrong; nothing was started
    ├── ModelError             the model is not available: unknown, unreachable, gated, damaged
    ├── MissingError           a package, a device or a driver is missing
    ├── TrackingError          the MLflow store refuses a request, or its address is not that of a store
    │   └── StoreAway          the MLflow server does not answer now
    ├── JournalError           the output folder cannot be written, or a record in it cannot be read
    ├── NotComparable          two results differ in more than the question allows
    ├── NotFitted              the data are too few, or of the wrong kind, for a law
    ├── OutOfRange             a law was asked about values beyond the data that it was fitted to
    └── MeasurementError       the measurement itself failed
        ├── OutOfMemory        memory ran out while loading or generating
        ├── WorkerCrashed      the worker process ended without an error message
        │   └── NodeLost       the cluster machine that it ran on is gone
        ├── WorkerTimeout      the worker exceeded a time limit
        ├── NotRealised        the loaded model is not what was asked for
        └── NotFinite          the model gave logits that are NaN or infinite

A message is one line: what is wrong, the value, and what to do. The command line prints it and exits with `exit_code`;
nothing in the library prints or exits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from .redaction import escape_controls, redact


def first_line(error: BaseException, limit: int = 200) -> str:
    """Return the first line of a foreign error without secrets, cut to `limit` characters, or else its class name."""
    text = redact(str(error)).strip()  # before it is cut: half a secret is not recognised
    return escape_controls(text.splitlines()[0])[:limit] if text else type(error).__name__


LONGEST_MESSAGE = 3000
"""Most characters of a message: a hostile value or name does not fill a terminal, a tag or a log."""


class LlmbenchError(Exception):
    """Base of all errors of this package. The message becomes one line without secrets and control characters."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        text = escape_controls(redact(message))
        if len(text) > LONGEST_MESSAGE:  # keep what is wrong, and what to do
            text = f"{text[: LONGEST_MESSAGE // 2]} … {text[-LONGEST_MESSAGE // 2 :]}"
        super().__init__(text)

    def _render_traceback_(self) -> list[str]:
        """Return what IPython shows: the message, without the frames of this package."""
        return [f"{type(self).__name__}: {self}"]


class UsageError(LlmbenchError):
    """A parameter is wrong; nothing was started."""

    exit_code = 2


class ModelError(LlmbenchError):
    """The model is not available: unknown, unreachable, gated or damaged."""


class MissingError(LlmbenchError):
    """A package, device or driver that the request needs is missing."""


class TrackingError(LlmbenchError):
    """The MLflow store refuses a request, or its address is not that of a store."""


class StoreAway(TrackingError):
    """The MLflow server does not answer now; it may answer later."""


class JournalError(LlmbenchError):
    """The output folder cannot be written, or a record in it cannot be read."""


class NotComparable(LlmbenchError):
    """Two results differ in more than the question allows, or one cannot be trusted; nothing was compared."""

    exit_code = 2


class NotFitted(LlmbenchError):
    """The data are too few, or of the wrong kind, for a law; no parameters were invented."""

    exit_code = 2


class OutOfRange(LlmbenchError):
    """A law was asked about values beyond the data that it was fitted to; nothing was extrapolated."""

    exit_code = 2


class MeasurementError(LlmbenchError):
    """The measurement failed. `outcome` is the vocabulary's word for the failure."""

    outcome = "error"


class OutOfMemory(MeasurementError):
    """Memory ran out while loading or generating."""

    outcome = "oom"


class WorkerCrashed(MeasurementError):
    """The worker process ended without an error message."""

    outcome = "crashed"


class NodeLost(WorkerCrashed):
    """The cluster machine that the worker ran on is gone. Cells it had not measured can be measured on another."""


class WorkerTimeout(MeasurementError):
    """The worker exceeded a time limit."""

    outcome = "timeout"


class NotRealised(MeasurementError):
    """The loaded quantization, dtype or device is not the one that was asked for."""


class NotFinite(MeasurementError):
    """The model gave logits that are NaN or infinite."""


NO_MEMORY = (
    "can't allocate memory",
    "cannot allocate",
    "failed to allocate",
    "not enough memory",
    "out of memory",
    "bad_alloc",
    "available memory on node",
    "_status_alloc_failed",  # of cuBLAS and cuDNN
)
"""Phrases by which libraries report that memory ran out, in lower case."""


@contextlib.contextmanager
def foreign_errors(doing: str, library: str = "", said: Callable[[Exception], str] = first_line) -> Iterator[None]:
    """Map the errors of a library to ours, one line each: OutOfMemory if text or class say so, or MeasurementError."""
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
