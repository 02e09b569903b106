"""The journal: append-only raw records on disk, written before anything is logged to MLflow.

This module alone reads and writes the format.

<output_dir>/<sweep_id>/
    sweep.json           the requested parameters, and the environment
    ended.json           how the command ended, and whether everything is uploaded; missing until then
    .claim               locked by the command that writes here, for as long as it lives
    <config_hash>/       one folder per cell; a second cell with the same hash has the suffix -2
        cell.json            the cell, the model's facts, hashes
        events.jsonl         one line per event (warm-ups and repetitions with all stamps), each flushed to disk
        worker.jsonl         events and memory samples of a worker that began with this cell; can be replayed
        worker.log           output of libraries
        artifacts/           result.json and the files made from it, once the cell is complete
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import itertools
import json
import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..records import reading
from ..records.codec import from_json, to_json
from ..records.errors import JournalError
from ..records.reading import Unreadable
from ..records.redaction import masker, redact, redact_all
from ..records.results import RequestRecord, RunResult
from ..records.verdicts import OUTCOMES
from .events import Event, decode, to_data


def new_sweep(output_dir: str) -> Path:
    """Make a folder for one command, named by its start (UTC) so that folders sort by time. Raises JournalError."""
    folder = (
        Path(os.path.expanduser(output_dir)).resolve()
        / f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{secrets.token_hex(3)}"
    )
    try:
        folder.mkdir(parents=True)
        probe = folder / ".writable"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise JournalError(
            f"Cannot write into the output folder {output_dir}: {error.strerror}. Give another one: output_dir=FOLDER."
        ) from None
    return folder


CLAIMED = "{} is still being written by a running command, which uploads it. Wait until it ends."


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Lock a sweep's folder for writing until the end of the block, or until this process ends in any way.

    Raises JournalError if a living command holds it.
    """
    with contextlib.ExitStack() as held:
        # Without locks (Windows, some network disks, a disk that is read-only) nobody can be kept out.
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            file = held.enter_context((folder / ".claim").open("wb"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise JournalError(CLAIMED.format(folder)) from None
        yield


def is_claimed(folder: Path) -> bool:
    """Return True if a living command writes into a sweep's folder, or if the system cannot tell."""
    if not (folder / ".claim").is_file():  # a pipe would be waited for
        return False
    try:
        import fcntl

        with (folder / ".claim").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except (ImportError, OSError):
        return True
    return False


def unfinished(output_dir: str) -> list[Path]:
    """Return the folders of sweeps whose command was killed, or has not uploaded everything, oldest first."""
    root = Path(os.path.expanduser(output_dir))
    begun = [file.parent for file in sorted(root.glob("*/sweep.json"))]
    return [folder for folder in begun if not read_end(folder).get("uploaded", False) and not is_claimed(folder)]


def read_end(folder: Path) -> Mapping[str, Any]:
    """Return how a sweep's command ended (ended.json): `outcome`, and whether everything is `uploaded`.

    Empty if it was killed before it could write that. Earlier versions wrote no `uploaded`; theirs count as uploaded.
    """
    try:
        found = reading.read_own_json(folder / "ended.json")
        return {"uploaded": True, **found} if found["outcome"] in OUTCOMES else {}
    except (Unreadable, KeyError, TypeError):
        return {}


def write_json(path: Path, data: object) -> None:
    """Write a JSON file without secrets, atomically: write a temporary file, flush it to disk, rename it.

    Raises JournalError.
    """
    write_bytes(
        path, _utf8(json.dumps(redact_all(to_json(data)), ensure_ascii=False, indent=1, allow_nan=False) + "\n")
    )


SERVER_LOG = "server.log"
"""Output of a server that we started, in the folder of its first cell."""


def redact_log(path: Path) -> None:
    """Mask the secrets in a log. Another process wrote it, so they could not be kept out while it was written."""
    with contextlib.suppress(OSError, JournalError):
        if not path.is_file():  # a pipe would be waited for
            return
        text = path.read_bytes().decode(errors="replace")
        if redact(text) != text:
            path.unlink()  # if the disk is full, no log is better than one with a secret
            write_bytes(path, redact(text).encode())


def _utf8(text: str) -> bytes:
    r"""Encode JSON. What UTF-8 cannot encode, such as parts of a file name, becomes a JSON escape: `\udcff`."""
    return text.encode("utf-8", "backslashreplace")


_PICTURE = re.compile(r"(base64,[A-Za-z0-9+/=]{64,})")


def write_text(path: Path, text: str) -> None:
    """Write a text without secrets, atomically. Pictures in it stay as they are. Raises JournalError."""
    mask = masker()
    parts = (part if number % 2 else mask(part) for number, part in enumerate(_PICTURE.split(text)))
    write_bytes(path, _utf8("".join(parts)))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically. Raises JournalError, for example when the disk is full."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with _writing(path), contextlib.ExitStack() as failed:
        failed.callback(_remove, temporary)
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


def append_bytes(path: Path, data: bytes) -> None:
    """Append bytes to a journal that were written on another machine. Raises JournalError."""
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(data)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # the file does not exist, or its folder is a file
        path.unlink()


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn an OSError into a JournalError."""
    try:
        yield
    except OSError as error:
        raise JournalError(
            f"Cannot write {path}: {error.strerror}. Free some space or give another output_dir, then run again."
        ) from None


class EventLog:
    """An append-only file of JSON lines. With `durable`, each line is on disk when `append` returns.

    Raises JournalError.
    """

    def __init__(self, path: Path, durable: bool = True) -> None:
        self.path, self.durable = path, durable
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = path.open("ab", buffering=0)
            self.repair()

    def repair(self) -> None:
        """Cut off a last line that a crash left incomplete, so that the next line is not joined to it."""
        with self.path.open("rb+") as file:
            content = file.read()
            if content and not content.endswith(b"\n"):
                file.truncate(content.rfind(b"\n") + 1)

    def append(self, event: Event) -> None:
        """Write one event, without secrets; if durable, wait for the disk."""
        data = to_data(event)
        safe = {"event": data.pop("event"), **redact_all(data)}
        line = json.dumps(safe, ensure_ascii=False, separators=(",", ":"))
        with _writing(self.path):
            rest = memoryview(_utf8(line) + b"\n")
            while rest:  # a disk that becomes full takes a part and refuses the next
                rest = rest[self.file.write(rest) :]
            if self.durable:
                os.fsync(self.file.fileno())

    def __enter__(self) -> EventLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def read_events(path: Path) -> Iterator[Event]:
    """Yield the events of a journal file, without those of later versions and without a last line that is incomplete.

    Raises JournalError if an earlier line is damaged.
    """
    if path.exists():
        try:
            content = reading.read_bytes(path, reading.MOST_RESULT_BYTES, text=False)  # a power cut leaves zeros
        except Unreadable as error:
            raise JournalError(
                f"Cannot read {path}: {error}. Delete the folder {path.parent}, and measure the cell again."
            ) from None
        yield from parse_events(content, path)


def parse_events(content: bytes, path: Path) -> Iterator[Event]:
    """Yield the events in the content of a journal file, like `read_events`. `path` is for messages."""
    lines = content.split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            event = decode(line)
        except ValueError:
            if number == len(lines):  # no newline after it: a crash interrupted the writing
                return
            raise JournalError(
                f"{path}, line {number}, is damaged. Delete the folder {path.parent} and measure the cell again."
            ) from None
        if event:
            yield event


def read_result(folder: Path) -> RunResult:
    """Read the result of a finished cell. Raises JournalError if there is none or it cannot be read."""
    path = folder / "result.json"
    try:
        found = from_json(RunResult, reading.read_own_json(path))
        if found.outcome not in OUTCOMES:
            raise ValueError(f"its outcome is {found.outcome[:40]!r}")
        for repetition in found.repetitions:
            if not repetition.requests:
                raise ValueError(f"repetition {repetition.index} has no complete request")
            for request in repetition.requests:
                _check_request(request)
        return found
    except (OSError, ValueError, TypeError) as error:
        raise JournalError(f"Cannot read the result {path}: {error}. Give the folder of a measured cell.") from None


def _check_request(request: RequestRecord) -> None:
    """Raise ValueError for a request that nobody can have measured: from it figures would be made all the same."""
    times, chunks = (request.t0_ns, *request.stamps_ns), request.chunk_tokens
    if len(times) < 2 or request.rows < 1:
        raise ValueError("a complete request has no token")
    if any(later < sooner for sooner, later in itertools.pairwise(times)):
        raise ValueError("tokens of a request arrive before it was sent, or before an earlier token")
    if min(request.prompt_tokens or 0, request.cached_tokens or 0, request.output_tokens, *(chunks or ())) < 0:
        raise ValueError("a request has a negative number of tokens")
    if chunks is not None and len(chunks) != len(request.stamps_ns):
        raise ValueError("a request has other numbers of chunks and of stamps")


def _by_token(request: RequestRecord) -> Sequence[int]:
    """Return one stamp per token if the number of tokens per stamp is known, else the stamps as they are."""
    if request.chunk_tokens is None:
        return request.stamps_ns
    return [stamp for stamp, count in zip(request.stamps_ns, request.chunk_tokens, strict=True) for _ in range(count)]


def samples_csv(result: RunResult) -> bytes:
    """Return `samples.csv.gz` with columns repetition,row,token,t_ns.

    Token 0 is the sending, token i the arrival of the i-th output token; t_ns is in ns of a monotonic clock.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["repetition", "row", "token", "t_ns"])
    for repetition in result.repetitions:
        row = 0
        for request in repetition.requests:
            for _ in range(request.rows):
                writer.writerows(
                    (repetition.index, row, token, t_ns)
                    for token, t_ns in enumerate((request.t0_ns, *_by_token(request)))
                )
                row += 1
    return gzip.compress(text.getvalue().encode(), mtime=0)
