"""The files that belong to a results folder: regular files in it, reached without a link.

A results folder may come from somebody else. A link in it can lead to any file of this machine, which would then be
read, uploaded, or written. A hard link cannot be told from the file itself, so a file with several names is no file of
the folder either.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..records.errors import JournalError


def own_files(folder: Path) -> list[Path]:
    """Return the regular files below a folder that are not links, sorted. Links to folders are not followed."""
    return sorted(path for path, refused in _entries(folder) if refused is None)


def refused_files(folder: Path) -> list[str]:
    """Return a line for everything else below a folder: what it is, and what to do."""
    return [
        f"{path} is {refused}, and was left out: only files of the folder itself are uploaded. "
        "Put a copy in its place, then upload again."
        for path, refused in sorted(_entries(folder))
        if refused is not None
    ]


@contextlib.contextmanager
def only_own_files(folder: Path) -> Iterator[tuple[Path, Sequence[str]]]:
    """Yield a folder without links and a line for each that was left out: the folder itself, or a copy of its files.

    What is written into a copy is lost. Raises JournalError if it cannot be made.
    """
    left_out = refused_files(folder)
    if not left_out:
        yield folder, ()
        return
    with tempfile.TemporaryDirectory(prefix="llmbench-") as scratch:
        copy = Path(scratch, folder.name)
        try:
            copy_own_files(folder, copy)
        except OSError as error:
            raise JournalError(
                f"{folder} has links, and its files cannot be copied without them: {error.strerror}. Remove the links."
            ) from None
        yield copy, left_out


def copy_own_files(folder: Path, target: Path) -> None:
    """Copy the regular files of a folder that are not links. Raises OSError."""
    target.mkdir(parents=True)
    for file in own_files(folder):
        place = target / file.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place, follow_symlinks=False)


def _entries(folder: Path) -> Iterator[tuple[Path, str | None]]:
    """Yield what is below a folder, except folders, each with what it is if it does not belong there."""
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return
    for entry in entries:
        mode, path = entry.stat(follow_symlinks=False), Path(entry.path)
        if stat.S_ISDIR(mode.st_mode):
            yield from _entries(path)
        elif stat.S_ISLNK(mode.st_mode):
            yield path, "a link"
        elif not stat.S_ISREG(mode.st_mode):
            yield path, "a pipe, a socket or a device"
        else:
            # `DirEntry.stat` does not count links on Windows.
            yield path, "a file with several names (hard links)" if mode.st_nlink > 1 else None
