"""Calibrations that were kept on this machine: one readable file per hardware, backend and device."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

from ..records import reading
from ..records.calibration import Calibration
from ..records.codec import from_json, to_json
from ..records.errors import JournalError, first_line
from .machine import cache_folder, replace_text

UNSAFE = re.compile(r"[^A-Za-z0-9_.-]+")


def folder() -> Path:
    """Return the folder of the calibrations, in `cache_folder`."""
    return cache_folder() / "calibrations"


def keep(calibration: Calibration) -> Path:
    """Write a calibration, atomically; it replaces an older one of the same key. Return its file.

    Raises JournalError if it cannot be written.
    """
    name = "-".join(UNSAFE.sub("_", part) for part in calibration.key)
    file = folder() / f"{name}.json"
    told = {
        "what": "noise between processes of one configuration, as llmbench calibrate measured it",
        "calibrated": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(calibration.ended_ms / 1000)),
        "relative_sd_between_processes": {key: round(some[-1].sd, 6) for key, some in calibration.spreads.items()},
    }
    try:
        replace_text(file, json.dumps({**told, **to_json(calibration)}, indent=1) + "\n")
    except OSError as error:
        raise JournalError(
            f"The calibration cannot be written to {file}: {first_line(error)}. Give another folder by LLMBENCH_CACHE."
        ) from None
    return file


def kept() -> tuple[Calibration, ...]:
    """Return all calibrations kept here, in the order of their names. Raises JournalError for a damaged file."""
    found = []
    for file in sorted(folder().glob("*.json")):
        try:
            found.append(from_json(Calibration, reading.read_own_json(file)))
        except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
            raise JournalError(
                f"The calibration {file} cannot be read: {first_line(error)}. Delete it, or calibrate again."
            ) from None
    return tuple(found)
