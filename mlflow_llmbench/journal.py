"""The journal: append-only raw records on disk, written before MLflow hears of anything. The only reader and writer of this format.

<output_dir>/<sweep_id>/sweep.json               what was asked
<output_dir>/<sweep_id>/<config_hash>/
    cell.json            the cell, the model's facts, hashes
    events.jsonl         one line per event: warm-ups, repetitions with all stamps, stages; flushed to the disk one by one
    result.json          everything, once the cell is complete
    worker.log           what libraries printed
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import JournalError
from .records import RunResult, from_json, to_json


def new_sweep(output_dir: str) -> Path:
    """Make a folder for one command, named by its start (UTC) so that folders sort by time. Raises JournalError."""
    folder = Path(output_dir).expanduser().resolve() / f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{secrets.token_hex(3)}"
    try:
        folder.mkdir(parents=True)
        probe = folder / ".writable"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise JournalError(f"Cannot write into the output folder {output_dir}: {error.strerror}. Give another one: output_dir=FOLDER.") from None
    return folder


def write_json(path: Path, data: object) -> None:
    """Write a JSON file whole or not at all: a temporary file, flushed to the disk, then renamed."""
    write_bytes(path, (json.dumps(to_json(data), ensure_ascii=False, indent=1, allow_nan=False) + "\n").encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all. Raises JournalError, for example when the disk is full."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):  # its folder may be a file
            temporary.unlink()
        raise JournalError(f"Cannot write {path}: {error.strerror}. Free some space or give another output_dir, then run again.") from None


class EventLog:
    """An append-only file of JSON lines; each line is on the disk when `append` returns."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("ab")

    def append(self, event: str, **data: Any) -> None:
        """Write one event and wait for the disk."""
        line = json.dumps({"event": event, **{key: to_json(value) for key, value in data.items()}}, ensure_ascii=False, separators=(",", ":"))
        self.file.write(line.encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """The events of a journal file; a last line that a crash cut off is left out. Raises JournalError for damage before it."""
    if not path.exists():
        return
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            yield json.loads(line)
        except ValueError:
            if number == len(lines):  # no newline after it: it was being written
                return
            raise JournalError(f"{path}, line {number}, is damaged. Delete the folder {path.parent} and measure the cell again.") from None


def read_result(folder: Path) -> RunResult:
    """The result of a finished cell. Raises JournalError if there is none or it cannot be read."""
    path = folder / "result.json"
    try:
        return from_json(RunResult, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise JournalError(f"Cannot read the result {path}: {error}. Give the folder of a measured cell.") from None


def samples_csv(result: RunResult) -> bytes:
    """`samples.csv.gz`: columns repetition,row,token,t_ns; token 0 is the sending, token i the arrival of the i-th output token."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["repetition", "row", "token", "t_ns"])
    for repetition in result.repetitions:
        row = 0
        for request in repetition.requests:
            for _ in range(request.rows):
                writer.writerows((repetition.index, row, token, t_ns) for token, t_ns in enumerate((request.t0_ns, *request.stamps_ns)))
                row += 1
    return gzip.compress(text.getvalue().encode(), mtime=0)
